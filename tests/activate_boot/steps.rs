//! What booted systems do, as parts of a script of the shell.

/// What the steps use. `step NUMBER WORDS` comes before what may fail with that number.
pub const HELPERS: &str = r#"
export MOSFS_SYSTEM=/run/mosfs/system MOSFS_CONFIG=/run/mosfs/config
targets=/run/mosfs/targets
number=1
step() { number=$1; shift; echo "vm: step $number, $(cut -d' ' -f1 /proc/uptime) s: $*"; }
fail() { echo "vm: failed at step $number: $*"; exit "$number"; }
want() { "$@" || fail "$*"; }
unit_of() { echo "mosfs-fuse@$(systemd-escape --path "$1").service"; }
property() { systemctl show --value -p "$1" "$2"; }
# Waits until a command succeeds, for a minute of this slow machine.
await() {
    for _ in $(seq 300); do
        if "$@" 2>/dev/null; then return 0; fi
        sleep 0.2
    done
    fail "waited in vain: $*"
}
backend() { mosfs status --json | tr '{' '\n' | grep -F "\"source\":\"$1\"" | head -n 1; }
content() { test "$(cat "$1/content")" = "$2"; }
is_new() { now=$(property MainPID "$1"); test "$now" != 0 && test "$now" != "$2"; }
# Of containers: `since NAME` is the process of its runtime.
since() { property MainPID "mosfs-target@$1.service"; }
state() { mosfs ps | awk -v name="$1" '$1 == name {print $3}'; }
is_state() { test "$(state "$1")" = "$2"; }
runs() { grep -c run /run/mosfs/system/volumes/job/runs; }
is_again() { is_new "mosfs-target@$1.service" "$2" && is_state "$1" running; }
# There is always one; where a process ends while lsns looks at it, it lists none.
namespaces() { list=$(lsns --noheadings --type "$1" --output NS) && test -n "$list"; }
# What containers are made of and leave behind, besides processes.
counts() {
    grep -c . /proc/self/mounts
    find /sys/fs/cgroup/mosfs.slice -type d | wc -l
    for kind in net pid user ipc uts; do
        await namespaces $kind
        echo "$list" | wc -l
    done
    ls /run/mosfs/containers /run/mosfs/crun /sys/class/net
    nft list ruleset
    ls -d /sys/block/dm-* | wc -l
    ls -d /sys/block/loop*/loop | wc -l
}
"#;

/// What a boot has mounted through dm-verity: the root, and eight targets.
pub const THROUGH_DM_VERITY: &str = r#"
grep -q '^mosfs:' /proc/self/mounts || exit 3
test $(grep -c ' /run/mosfs/targets/[^ ]* overlay ro,nosuid,nodev' /proc/self/mounts) = 8 || exit 4
"#;

/// Targets that are mounted.
pub const STEPS: &str = r#"
step 10 "the service has mounted the targets before multi-user.target"
want systemctl is-active mosfs-activate.service
for name in app data-set; do want content $targets/$name "$name"; done
want test ! -e $targets/hostfs
mosfs activate --json | tee /tmp/kept
want test "$(grep -o '"action":"keep"' /tmp/kept | wc -l)" = 13

step 11 "lines of fstab are mounted, early and late"
for name in early late; do
    want systemctl is-active mnt-$name.mount
    want content /mnt/$name app
    want systemctl is-active "$(unit_of /mnt/$name)"
done

step 12 "through FUSE, each daemon is in a unit of its own"
want mosfs activate --backend fuse
for name in app data-set; do
    unit=$(unit_of $targets/$name)
    want content $targets/$name "$name"
    want systemctl is-active "$unit"
    want test "$(property KillMode "$unit")" = process
    want test "$(property Restart "$unit")" = on-failure
    pid=$(property MainPID "$unit")
    want grep -qF "/$unit" "/proc/$pid/cgroup"
done
mosfs status | grep -F "$targets" | sed 's/^/vm: /'

step 13 "a daemon that is killed comes back, and is mounted again, also after a daemon-reload"
want systemctl daemon-reload
for place in $targets/data-set /mnt/early; do
    unit=$(unit_of $place)
    pid=$(property MainPID "$unit")
    want kill -KILL "$pid"
    await is_new "$unit" "$pid"
    await systemctl --quiet is-active "$unit"
    await cat $place/content
done
want content $targets/data-set data-set
want content /mnt/early app
await systemctl --quiet is-active mnt-early.mount

step 14 "one that is killed while somebody is inside, too"
unit=$(unit_of $targets/app)
pid=$(property MainPID "$unit")
(cd $targets/app && exec sleep 1000) &
holder=$!
want kill -KILL "$pid"
await is_new "$unit" "$pid"
await content $targets/app app
kill $holder

step 15 "the daemons do not end with the service that started them"
pid=$(property MainPID "$unit")
want systemctl restart mosfs-activate.service
want test "$(property MainPID "$unit")" != 0
want content $targets/app app

step 16 "a dead daemon that no unit keeps is seen and mended"
want mosfs umount $targets/app
await sh -c "! systemctl --quiet is-active '$unit'"
want mosfs mount --backend fuse --daemon fork app $targets/app
pid=$(mosfs status --json | tr '{' '\n' | grep -o '"pid":[0-9]*' | cut -d: -f2 | sort -n | tail -n 1)
want kill -KILL "$pid"
await sh -c "mosfs status | grep -F '$targets/app' | grep -q 'mosfs activate'"
want mosfs activate --backend fuse
want content $targets/app app
want systemctl is-active "$unit"

step 17 "a mount that is unmounted ends its unit and is not mounted again"
want umount $targets/data-set
unit=$(unit_of $targets/data-set)
await sh -c "! systemctl --quiet is-active '$unit'"
want test "$(property LoadState "$unit")" = not-found
want mosfs activate --backend fuse
want content $targets/data-set data-set

step 18 "an image that does not verify says so, not its unit"
# (mosfs mount: what is wrong is found before the unit is started)
mosfs mount --backend fuse --daemon unit --root-hash "$(printf '%064d' 1)" app /mnt/none >/tmp/said 2>&1
want test $? = 3
want grep -q 'root hash' /tmp/said

step 19 "what is used of an old mount neither keeps its name nor ends with it"
mkdir -p /run/held /run/none
unit=$(unit_of $targets/app)
want mount -t overlay held -o "lowerdir=$targets/app:/run/none" /run/held
want mosfs umount $targets/app
want mosfs activate --backend fuse
want content $targets/app app
want content /run/held app
want systemctl is-active "${unit%.service}--1.service"
want kill -KILL "$(property MainPID "$unit")"
await sh -c "! systemctl --quiet is-active '$unit'"
want umount /run/held
want test "$(grep -c " $targets/app " /proc/self/mounts)" = 1
want content $targets/app app
"#;

/// Another network namespace, linked with the host's: `page PORT` is what the host serves there.
pub const OUTSIDE: &str = r#"
unshare --net sleep 100000 &
outside=$!
# Until unshare has made it, its namespace is the host's.
is_elsewhere() { test "$(readlink /proc/$1/ns/net)" != "$(readlink /proc/self/ns/net)"; }
await is_elsewhere $outside
want ip link add out0 type veth peer name out1 netns $outside
want ip address add 192.0.2.1/24 dev out0
want ip link set out0 up
want nsenter --net=/proc/$outside/ns/net ip address add 192.0.2.2/24 dev out1
want nsenter --net=/proc/$outside/ns/net ip link set out1 up
page() { nsenter --net=/proc/$outside/ns/net /usr/local/bin/busybox wget -q -O - "http://192.0.2.1:$1/"; }
"#;

/// Containers, in the boot that has mounted them through dm-verity.
pub const CONTAINERS: &str = r#"
step 20 "containers run at boot, in order, and the boot is committed when they are healthy"
for name in db web; do
    want systemctl is-active "mosfs-target@$name.service"
    want is_state $name running
done
want is_state job done
await systemctl is-active mosfs-commit.service
journalctl --no-pager -b -o cat -u mosfs-target@web | grep -F 'started shared' || fail "the output is in the journal"
want mosfs exec web -- cat /tmp/up
mosfs exec web -- touch /x && fail "the root is writable"
mosfs exec web -- touch /set/x && fail "a target is writable"
want test "$(mosfs exec web -- cat /proc/self/uid_map | awk '{print $2}')" -ge 524288
want test "$(mosfs exec web -- grep -c '^NoNewPrivs:.1$' /proc/self/status)" = 1
want test "$(mosfs exec web -- grep -c '^Seccomp:.2$' /proc/self/status)" = 1
want test "$(property MemoryMax mosfs-target@web.service)" = 67108864
want test "$(property TasksMax mosfs-target@web.service)" = 50
want grep -qF "/mosfs.slice/mosfs-target@web.service" "/proc/$(since web)/cgroup"
want test "$(stat -c %a /run/mosfs/system/volumes)" = 700
grep -F containers /proc/self/mounts && fail "mounts of containers are on the host"
mosfs ps | sed 's/^/vm: /'
mosfs status | grep '^          web 1.0.0: running, 80->8080/tcp$' || fail "the status shows containers"
want test "$(page 80)" = "this is web"

step 21 "nothing is restarted that has not changed"
db=$(since db) web=$(since web)
# A job is run once a boot.
ran=${boot:-1}
want mosfs activate
want test "$(since db) $(since web)" = "$db $web"
mosfs activate --dry-run | grep -F 'would keep the container of job: it has done its work' || fail "a job is not done twice"
mosfs activate | grep -xF 'container of job has done its work' || fail "activate says what a job is"
mosfs status | grep -xF '          job 1.0.0: done' || fail "the status shows a job"
# What needs it has started after its end, and only that has ended.
want test "$(runs)" = "$ran"
want mosfs exec web -- grep -x finished /tmp/job

step 22 "what is killed comes back, and nothing of it is left"
for what in runtime container; do
    web=$(since web)
    pid=$web
    test $what = runtime || pid=$(cat "/proc/$web/task/$web/children")
    want kill -KILL "$pid"
    await is_again web "$web"
    # The shell of one container, besides what it and the health command have started.
    procs=/sys/fs/cgroup/mosfs.slice/mosfs-target@web.service/cgroup.procs
    want test "$(for pid in $(cat $procs); do cat /proc/$pid/comm; done | grep -cx sh)" = 1
done
want mosfs exec web -- cat /data/starts

step 23 "what is needed is restarted with what needs it"
db=$(since db) web=$(since web)
want systemctl restart mosfs-target@db.service
want test "$(since db)" != "$db"
await is_again web "$web"
# What needs a job is started again by hand, by a crash (step 22) and with what it needs; the job is not run again.
web=$(since web)
want systemctl restart mosfs-target@web.service
await is_again web "$web"
want is_state job done
want test "$(runs)" = "$ran"
# By hand it is, and what needs it is restarted with it.
web=$(since web)
want systemctl restart mosfs-target@job.service
want is_state job done
want test "$(runs)" = $((ran + 1))
await is_again web "$web"
# One that fails keeps down what needs it.
want touch /run/mosfs/system/volumes/job/fail
systemctl restart mosfs-target@job.service && fail "a job that fails has started"
want is_state job failed
await is_state web stopped
mosfs ps | grep -xF 'web: it needs job, which has failed' || fail "ps says why"
systemctl start mosfs-target@web.service && fail "it has started without what it needs"
mosfs activate 2>/tmp/said && fail "an activation succeeds without a job"
want grep -F 'it needs job, which has failed' /tmp/said
want grep -F 'its program ended with exit code 7' /tmp/said
want rm /run/mosfs/system/volumes/job/fail
want mosfs activate
want is_state job done
want is_state web running

step 24 "a container that is stopped is started by the next activation, and leaves nothing"
want systemctl stop mosfs-target@web.service mosfs-target@hog.service
want is_state web stopped
# It has no handler for its stop signal, and is killed after its `stop_seconds`.
want test "$(property Result mosfs-target@hog.service)" = timeout
want test ! -e /run/mosfs/crun/web
want systemctl stop mosfs-target@bomb.service
want test ! -e /sys/class/net/mosfs0
nft list tables | grep mosfs && fail "a rule of the firewall is left"
want mosfs activate
for name in web hog bomb; do want is_state $name running; done
want test "$(page 80)" = "this is web"
# An activation that is killed at any point is completed by the next one.
for point in run.unit.written run.unit.renamed run.units.written run.units.started; do
    want systemctl stop mosfs-target@hog.service
    rm -f /run/systemd/system/mosfs-target@hog.service
    MOSFS_FAILPOINT=$point mosfs activate
    want test $? = 137
done
want mosfs activate
want is_state hog running
want nft flush ruleset
want systemctl reload mosfs-activate.service
want test "$(page 80)" = "this is web"

# The clean-up has its own time: here, the network is held for longer than `stop_seconds`.
want systemctl stop mosfs-target@web.service
flock /run/mosfs/network.lock sleep 12 &
want systemctl stop mosfs-target@bomb.service
wait $!
want test ! -e /sys/class/net/mosfs0
want test "$(ls /run/mosfs/notes | grep -c '[.]network$')" = 0
# Where it was killed all the same, the next activation removes what is left.
want mosfs activate
want systemctl stop mosfs-target@web.service
flock /run/mosfs/network.lock sleep 12 &
holder=$!
systemctl stop --no-block mosfs-target@bomb.service
is_cleaning() { test "$(property SubState mosfs-target@bomb.service)" = stop-post; }
await is_cleaning
want kill -KILL "$(property ControlPID mosfs-target@bomb.service)"
want wait $holder
want mosfs activate hog
want test ! -e /sys/class/net/mosfs0
want mosfs activate
for name in web hog bomb; do want is_state $name running; done

step 25 "a memory hog and a fork bomb end alone, and the next activation starts them again"
db=$(since db) web=$(since web)
want touch /run/mosfs/system/volumes/go/go
await is_state hog failed
want test "$(property Result mosfs-target@hog.service)" = oom-kill
await is_state bomb failed
journalctl --no-pager -b -o cat -u mosfs-target@bomb | grep -F "can't fork" || fail "a limit of processes"
want test "$(page 80)" = "this is web"
want test "$(since db) $(since web)" = "$db $web"
want rm /run/mosfs/system/volumes/go/go
want mosfs activate
for name in hog bomb; do want is_state $name running; done

"#;

/// The same, over restarts and updates.
pub const UPDATED_CONTAINERS: &str = r#"
step 32 "a firewall that refuses the rules keeps down only what has published ports"
await systemctl is-active mosfs-commit.service
db=$(since db) hog=$(since hog)
want systemctl stop mosfs-target@web.service mosfs-target@bomb.service
want mv /usr/sbin/nft /usr/sbin/nft.real
printf '#!/bin/sh\necho "Error: Could not process rule: No such file or directory" >&2\nexit 1\n' >/usr/sbin/nft
want chmod 755 /usr/sbin/nft
mosfs activate 2>/tmp/said && fail "an activation succeeds without a network"
for name in web bomb; do
    want grep -F "target $name: cannot set up its network" /tmp/said
    says_why() { mosfs ps | grep -F "$name: " | grep -F 'Could not process rule'; }
    await says_why
done
want test "$(since db) $(since hog)" = "$db $hog"
want mv /usr/sbin/nft.real /usr/sbin/nft
want mosfs activate
for name in web bomb; do want is_state $name running; done
want test "$(page 80)" = "this is web"

step 26 "restarts and activations leave nothing behind"
db=$(since db) web=$(since web)
counts >/tmp/before
descriptors=$(ls /proc/1/fd | wc -l)
for round in $(seq ROUNDS); do
    want systemctl restart mosfs-target@bomb.service
    # systemd gives up on what is started too often.
    want systemctl reset-failed mosfs-target@bomb.service
    test $((round % 5)) != 0 || want mosfs activate
done
counts >/tmp/after
diff /tmp/before /tmp/after || fail "restarts leave something behind"
want test "$(ls /proc/1/fd | wc -l)" -le $((descriptors + 8))
want test "$(since db) $(since web)" = "$db $web"

step 27 "what is not healthy any more is restarted"
web=$(since web)
want mosfs exec web -- /bin/busybox rm /tmp/up
await is_again web "$web"
journalctl --no-pager -b -o cat -u mosfs-target@web | grep -F 'it is not healthy: failure 3 of 3 in a row' ||
    fail "the journal says why"
want test "$(property NRestarts mosfs-target@web.service)" -ge 1

step 28 "an update restarts what has changed alone, and what is replaced serves to its end"
# As after a reboot, without one: boot.json says which version runs.
becomes() { sed -i "s/\"deployment\":\"[^\"]*\"/\"deployment\":\"$(cd $MOSFS_SYSTEM/deployments && ls -d $1-*)\"/" /run/mosfs/boot.json; }
counts >/tmp/before
db=$(since db) web=$(since web) hog=$(since hog) bomb=$(since bomb)
mosfs exec hog -- /bin/sh -c 'while :; do /bin/busybox md5sum /bin/busybox; done' | cat >/tmp/sums &
await test -s /tmp/sums
want mosfs update "oci:/run/mosfs/system/vm-source:NEXT"
want becomes NEXT
want mosfs activate
want test "$(since db) $(since web)" = "$db $web"
want is_again hog "$hog"
want is_again bomb "$bomb"
# A target has come that is before all others in their order. The others keep ids and addresses, and know it.
want is_state api running
address() { mosfs exec "$1" -- grep " $2\$" /etc/hosts | cut -d' ' -f1; }
for name in web bomb api; do want test "$(address web $name)" = "$(address $name $name)"; done
want test "$(mosfs exec web -- /bin/busybox wget -q -O - "http://$(address web api):8080/")" = "this is api"
want test "$(mosfs exec api -- /bin/busybox wget -q -O - "http://$(address api web):8080/")" = "this is web"
mosfs activate --dry-run | grep -F container | grep -v 'would keep' && fail "an activation is done"
want test "$(mosfs exec hog -- cat /content)" = second
want test "$(mosfs ps | awk '$1 == "bomb" {print $5}')" = '82->8082/tcp'
want test "$(grep -c . /tmp/sums)" -ge 1
test "$(grep '^.*  /bin/busybox$' /tmp/sums | sort -u | wc -l)" = 1 || fail "the old image served other bytes"

step 29 "a version that does not get healthy is not committed"
floor=$(mosfs floor show --json)
want mosfs update "oci:/run/mosfs/system/vm-source:SICK"
want becomes SICK
mosfs activate >/tmp/said 2>&1
want test $? = 1
want grep -F 'target web' /tmp/said
want grep -F 'it is not healthy' /tmp/said
# It is restarted again and again; between two starts ps says why.
says_why() { mosfs ps | grep -F 'web: ' | grep -F 'it is not healthy'; }
await says_why
mosfs commit >/tmp/said 2>&1
want test $? = 1
want grep -F 'target web' /tmp/said
want test "$(mosfs floor show --json)" = "$floor"
want becomes VERSION
want mosfs activate
for name in db web hog bomb; do want is_state $name running; done
want test "$(page 80)" = "this is web"
# One has gone meanwhile, and what nothing has changed of still runs.
want test "$(since db)" = "$db"
mosfs exec web -- grep -F api /etc/hosts && fail "what has gone still has a name"
# No mount, namespace or device of other versions is left, and no rule for their ports.
is_as_before() { counts >/tmp/after; diff /tmp/before /tmp/after; }
await is_as_before

"#;

/// What comes before the containers of a machine with Debian 13.
pub const DEBIAN_13: &str = r#"
step 9 "this is Debian 13, and the targets are mounted through dm-verity"
systemctl --version | head -n 1
crun --version | head -n 1
want grep -q '^VERSION_CODENAME=trixie$' /etc/os-release
for name in app web; do want grep -q " $targets/$name overlay ro,nosuid,nodev" /proc/self/mounts; done
"#;

/// The other backend, where no other steps have mounted through it.
pub const ALL_THROUGH_FUSE: &str = r#"
step 29 "the containers that are mounted in another way are still the same"
want mosfs activate --backend fuse
want grep -q " $targets/web fuse.mosfs " /proc/self/mounts
"#;

/// The same through FUSE: a daemon that dies takes what runs on it along, and both come back.
pub const THROUGH_FUSE: &str = r#"
step 30 "a container follows the daemon that serves its image, also after a daemon-reload"
want systemctl daemon-reload
await is_state web running
unit=$(unit_of $targets/web)
want systemctl is-active "$unit"
web=$(since web)
want kill -KILL "$(property MainPID "$unit")"
await is_again web "$web"
want mosfs exec web -- cat /tmp/up

"#;

/// The end of all containers.
pub const ALL_STOPS: &str = r#"
step 31 "all stops, and nothing is left"
want systemctl stop 'mosfs-target@*.service'
want test -z "$(ls /run/mosfs/crun)"
want test -z "$(grep -lx crun /proc/[0-9]*/comm)"
test -z "$outside" || want kill $outside
await test ! -e /sys/class/net/out0
for kind in net pid user ipc; do want test "$(lsns --noheadings --type $kind --output NS | wc -l)" = 1; done
ls /sys/class/net | grep mosfs && fail "an interface is left"
nft list tables | grep mosfs && fail "a rule of the firewall is left"
find /sys/fs/cgroup -name 'mosfs-target@*' | grep . && fail "a control group is left"
for place in $targets/* $(ls -d /run/mosfs/shifted/*/* /mnt/early /mnt/late 2>/dev/null); do want mosfs umount "$place"; done
await sh -c "! systemctl --no-legend list-units 'mosfs-fuse@*' | grep ."
"#;

/// Containers before Linux 6.12, whose kernel maps no ids of FUSE and squashfs.
pub const SHIFTED: &str = r#"
step 40 "containers run on trees whose ids their daemons move, where the kernel cannot map them"
case $(uname -r) in 6.1.*) ;; *) fail "this is Linux $(uname -r)" ;; esac
for name in db web; do want is_state $name running; done
mosfs status | grep -F /run/mosfs/shifted | sed 's/^/vm: /'
shifted=$(ls -d /run/mosfs/shifted/*/web)
want test "$(stat -c %u:%g $shifted/bin/busybox)" = "$(basename "$(dirname "$shifted")"):$(basename "$(dirname "$shifted")")"
want test "$(mosfs exec web -- /bin/busybox stat -c %u:%g /bin/busybox /set/content | sort -u)" = 0:0
want test "$(mosfs exec web -- cat /proc/self/uid_map | awk '{print $2}')" -ge 524288
want test "$(mosfs exec web -- cat /set/content)" = shared
want test "$(stat -c %u /run/mosfs/system/volumes/web/starts)" = 0
want systemctl is-active "$(unit_of "$shifted")"

step 41 "and follow them when they die"
web=$(since web) db=$(since db)
want kill -KILL "$(property MainPID "$(unit_of "$shifted")")"
await is_again web "$web"
want test "$(since db)" = "$db"
want mosfs exec web -- cat /set/content
want mosfs activate
want test "$(since db)" = "$db"
"#;

/// What each of several boots finds, the first of which goes down with all containers running.
pub const REBOOTED: &str = r#"
echo boot >>$MOSFS_SYSTEM/vm-boots
boot=$(grep -c . $MOSFS_SYSTEM/vm-boots)
step 50 "boot $boot: what is needed starts before what needs it, and volumes have what was written"
grep -q ' /run/mosfs/targets/web overlay ' /proc/self/mounts || fail "the image is mounted through dm-verity"
for name in db web hog bomb; do want is_state $name running; done
want is_state job done
began() { property "$1" "mosfs-target@$2.service"; }
web=$(began ExecMainStartTimestampMonotonic web)
want test "$web" -ge "$(began ActiveEnterTimestampMonotonic db)"
want test "$web" -ge "$(began ExecMainExitTimestampMonotonic job)"
# A job is run once a boot.
want test "$(runs)" = "$boot"
want mosfs exec web -- grep -x finished /tmp/job
starts=$MOSFS_SYSTEM/volumes/web/starts
test $boot != 1 || head -n 1 "$starts" >$MOSFS_SYSTEM/vm-first
want test "$(mosfs exec web -- /bin/busybox head -n 1 /data/starts)" = "$(cat $MOSFS_SYSTEM/vm-first)"
want test "$(grep -c . "$starts")" -ge "$boot"
want test "$(stat -c %u:%g "$starts")" = 0:0
want test "$(stat -c %a $MOSFS_SYSTEM/volumes)" = 700
# The partition of the volumes is in use until the end, and was left clean all the same.
dmesg | grep 'EXT4-fs.*recovery' && fail "the partition was not left clean"
want grep -q " /run/mosfs/system ext4 rw" /proc/self/mounts
echo "vm: boot $boot is done"
"#;
