//! `mosfs activate` under systemd: a Debian in a virtual machine, installed with `make install`.
//!
//! The targets are mounted at boot by mosfs-activate.service, FUSE daemons live in units of their own,
//! come back when they are killed, and do not keep the machine from shutting down in order.
//! What the booted system does is a script in its image; each of its steps prints a line, and the
//! verdict is that of the first step that failed.

#[path = "common/device.rs"]
mod device;
#[path = "common/machine.rs"]
mod machine;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "common/publish.rs"]
mod publish;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "common/swtpm.rs"]
mod swtpm;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use device::{Device, MOSFS, START, make_initrd, no_login, put, strip};
use machine::{
    Ended, Machine, debian_13_image, debian_image, script, script_path, source_file, squashfs, tool,
};
use publish::Publisher;

/// Runs when multi-user.target is reached; `/usr/local/bin/vm-steps` does what is tested.
const VERDICT_UNIT: &str = "[Unit]\nDefaultDependencies=no\nAfter=multi-user.target\n\
    [Service]\nType=oneshot\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\n\
    ExecStart=/bin/sh /usr/local/bin/vm-verdict\n\
    [Install]\nWantedBy=multi-user.target\n";

/// Reports what is not as it should be, and goes down in order: systemd ends all that runs, and the log of the
/// shutdown is on the console.
const VERDICT: &str = r#"
code=0
sh /usr/local/bin/vm-steps || code=$?
if [ $code -ne 0 ]; then
    journalctl --no-pager -b -o cat -u 'mosfs*' -u 'mnt-*' | tail -n 60
    systemctl --no-pager --no-legend list-units 'mosfs*' 'mnt-*' 'run-mosfs-targets-*'
    mosfs status
fi
echo "MOSFS-VM-VERDICT: $code"
systemctl --no-block poweroff
"#;

/// What the steps use. `step NUMBER WORDS` comes before what may fail with that number.
const HELPERS: &str = r#"
export MOSFS_SYSTEM=/run/mosfs/system MOSFS_CONFIG=/run/mosfs/config
targets=/run/mosfs/targets
step() { number=$1; shift; echo "vm: step $number: $*"; }
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
# What containers are made of and leave behind, besides processes.
# There is always one; where a process ends while lsns looks at it, it lists none.
namespaces() { list=$(lsns --noheadings --type "$1" --output NS) && test -n "$list"; }
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

/// Targets that are mounted.
const STEPS: &str = r#"
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

/// Containers, in the boot that has mounted them through dm-verity.
const CONTAINERS: &str = r#"
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
# From outside: another network namespace, linked with the host's.
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
want test "$(page 80)" = "this is web"

step 21 "nothing is restarted that has not changed"
db=$(since db) web=$(since web)
want mosfs activate
want test "$(since db) $(since web)" = "$db $web"
mosfs activate --dry-run | grep -F 'would keep the container of job: it has done its work' || fail "a job is not done twice"
mosfs activate | grep -xF 'container of job has done its work' || fail "activate says what a job is"
mosfs status | grep -xF '          job 1.0.0: done' || fail "the status shows a job"
# What needs it has started after its end, and only that has ended.
want test "$(runs)" = 1
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
want test "$(runs)" = 1
# By hand it is, and what needs it is restarted with it.
web=$(since web)
want systemctl restart mosfs-target@job.service
want is_state job done
want test "$(runs)" = 2
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

/// The same, later.
const LONG_CONTAINERS: &str = r#"
step 26 "restarts and activations leave nothing behind"
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
want test "$(mosfs exec hog -- cat /content)" = second
want test "$(mosfs ps | awk '$1 == "bomb" {print $5}')" = '82->8082/tcp'
want test "$(grep -c . /tmp/sums)" -ge 1
test "$(grep '^.*  /bin/busybox$' /tmp/sums | sort -u | wc -l)" = 1 || fail "the old image served other bytes"
# No mount, namespace or device of the old one, and no rule for its port.
is_as_before() { counts | sed 's/8082/8081/; s/dport 82 /dport 81 /' >/tmp/after; diff /tmp/before /tmp/after; }
await is_as_before

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

"#;

/// What comes before the containers of a machine with Debian 13.
const DEBIAN_13: &str = r#"
step 9 "this is Debian 13, and the targets are mounted through dm-verity"
systemctl --version | head -n 1
crun --version | head -n 1
want grep -q '^VERSION_CODENAME=trixie$' /etc/os-release
for name in app web; do want grep -q " $targets/$name overlay ro,nosuid,nodev" /proc/self/mounts; done
"#;

/// The other backend, where no other steps have mounted through it.
const ALL_THROUGH_FUSE: &str = r#"
step 29 "the containers that are mounted in another way are still the same"
want mosfs activate --backend fuse
want grep -q " $targets/web fuse.mosfs " /proc/self/mounts
"#;

/// The same through FUSE: a daemon that dies takes what runs on it along, and both come back.
const THROUGH_FUSE: &str = r#"
step 30 "a container follows the daemon that serves its image, also after a daemon-reload"
want systemctl daemon-reload
await is_state web running
unit=$(unit_of $targets/web)
want systemctl is-active "$unit"
web=$(since web)
want kill -KILL "$(property MainPID "$unit")"
await is_again web "$web"
want mosfs exec web -- cat /tmp/up

step 31 "all stops, and nothing is left"
want systemctl stop 'mosfs-target@*.service'
want test -z "$(ls /run/mosfs/crun)"
want test -z "$(grep -lx crun /proc/[0-9]*/comm)"
kill $outside
await test ! -e /sys/class/net/out0
for kind in net pid user ipc; do want test "$(lsns --noheadings --type $kind --output NS | wc -l)" = 1; done
ls /sys/class/net | grep mosfs && fail "an interface is left"
nft list tables | grep mosfs && fail "a rule of the firewall is left"
find /sys/fs/cgroup -name 'mosfs-target@*' | grep . && fail "a control group is left"
for place in $targets/* /mnt/early /mnt/late; do want mosfs umount "$place"; done
await sh -c "! systemctl --no-legend list-units 'mosfs-fuse@*' | grep ."
"#;

/// Containers before Linux 6.12, whose kernel maps no ids of FUSE and squashfs.
const SHIFTED: &str = r#"
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

/// What each of several boots finds, each of which goes down with all containers running.
const REBOOTED: &str = r#"
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

/// The version that is published and booted.
const VERSION: u64 = 200;
/// The version after it, in which one target has another image and one another port.
const NEXT: u64 = 201;
/// A version with a target that does not get healthy.
const SICK: u64 = 202;

/// The folders of modules that containers with network `simple` require.
const MODULES: [&str; 9] = [
    "kernel/drivers/net",
    "kernel/lib",
    "kernel/net/802",
    "kernel/net/bridge",
    "kernel/net/ipv4/netfilter",
    "kernel/net/ipv6/netfilter",
    "kernel/net/llc",
    "kernel/net/netfilter",
    "kernel/crypto",
];

/// Puts these modules of one of Debian's kernels into a tree.
fn put_modules(kernel: &str, top: &Path) {
    let modules = script_path(script("kernel").arg(kernel)).join("lib/modules");
    let release = fs::read_dir(&modules).unwrap().next().unwrap().unwrap().file_name();
    let (from, to) = (modules.join(&release), top.join("usr/lib/modules").join(&release));
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        tool("coreutils", Command::new("cp").arg("-rT").args([from, to]));
    };
    for folder in MODULES.iter().filter(|folder| from.join(folder).exists()) {
        copy(&from.join(folder), &to.join(folder));
    }
    for file in fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file())
    {
        copy(&file, &to.join(file.file_name().unwrap()));
    }
}

/// Publishes a Debian with what `make install` installs, targets, and two later versions of them. Files are made in `dir`.
fn publish(publisher: &Publisher, dir: &Path, debian: &Path, kernel: &str, steps: &str) {
    let top = &dir.join("top");
    let stripped = dir.join("mosfs");
    strip(START, &stripped);
    strip(MOSFS, &dir.join("mosfs-full"));
    let mut install = Command::new("make");
    install.arg("--silent").arg("install").current_dir(source_file(""));
    install.arg(format!("DESTDIR={}", top.display())).arg(format!("MOSFS={}", stripped.display()));
    tool("make", &mut install);
    put(top, "etc/machine-id", "0123456789abcdef0123456789abcdef\n");
    put(top, "etc/systemd/system/vm-verdict.service", VERDICT_UNIT);
    put(top, "usr/local/bin/vm-verdict", VERDICT);
    put(top, "usr/local/bin/vm-steps", steps);
    put(
        top,
        "etc/fstab",
        "app /mnt/early mosfs backend=fuse,system=/run/mosfs/system,config=/run/mosfs/config,ro 0 0\n\
         app /mnt/late mosfs _netdev,x-systemd.after=mosfs-activate.service,backend=fuse,nosuid 0 0\n",
    );
    for folder in ["etc/mosfs", "var/lib/mosfs", "mnt/early", "mnt/late", "mnt/none"] {
        fs::create_dir_all(top.join(folder)).unwrap();
    }
    let units = top.join("etc/systemd/system");
    let enable = |unit: &str, target: &str, from: &str| {
        let folder = units.join(target);
        fs::create_dir_all(&folder).unwrap();
        symlink(format!("{from}/{unit}"), folder.join(unit)).unwrap();
    };
    enable("vm-verdict.service", "multi-user.target.wants", "..");
    for unit in ["mosfs-activate.service", "mosfs-commit.service"] {
        enable(unit, "multi-user.target.wants", "/usr/lib/systemd/system");
    }
    enable("mosfs-activate.service", "boot-complete.target.requires", "/usr/lib/systemd/system");
    no_login(top);
    put_modules(kernel, top);
    put(
        top,
        "usr/local/bin/busybox",
        fs::read("/bin/busybox").expect("/bin/busybox (Debian package busybox-static)"),
    );
    fs::set_permissions(top.join("usr/local/bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let image = dir.join("top.squashfs");
    squashfs(top, &image, &["-all-root"]);
    let host = vec![publisher.add_image(debian), publisher.add_image(&image)];
    let target = |name: &str| vec![publisher.add_layer(name)];
    let tree = dir.join("busybox");
    put(
        &tree,
        "bin/busybox",
        fs::read("/bin/busybox").expect("/bin/busybox (Debian package busybox-static)"),
    );
    fs::set_permissions(tree.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    for applet in ["sh", "cat", "date", "grep", "ls", "sleep", "touch", "id", "test"] {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    let image = dir.join("busybox.squashfs");
    squashfs(&tree, &image, &["-all-root"]);
    let busybox = vec![publisher.add_image(&image)];
    let targets = [
        ("hostfs", "hostfs", host),
        ("app", "fs-only", target("app")),
        ("data-set", "fs-only", target("data-set")),
        // Its daemon stays as long as a container mounts it, whatever is unmounted on the host.
        ("shared", "fs-only", target("shared")),
        ("bomb", "container", busybox.clone()),
        ("db", "container", busybox.clone()),
        ("hog", "container", [&busybox[..], &target("first")].concat()),
        ("job", "container", busybox.clone()),
        ("web", "container", busybox.clone()),
    ];
    let shell = |script: &str| serde_json::json!({ "Cmd": ["/bin/sh", "-c", script] });
    publisher.container(
        "db",
        "network: {type: none}",
        &shell("trap 'exit 0' TERM; while :; do sleep 1; done"),
    );
    let web = |health: &str| {
        let fields = format!(
            "network: {{type: simple, ports: [{{host: 80, container: 8080}}]}}, needs: [db, job], health: {{{health}}}, \
             resources: {{memory: 64M, tasks: 50}}, mounts: [{{destination: /data, type: volume, source: web}}, \
             {{destination: /set, type: target, source: shared}}, {{destination: /job, type: volume, source: job}}]"
        );
        let script = "cat /job/state > /tmp/job; echo \"started $(cat /set/content)\"; date >> /data/starts; \
                      echo 'this is web' > /tmp/index.html; /bin/busybox httpd -p 8080 -h /tmp; sleep 2; \
                      echo yes > /tmp/up; trap 'exit 0' TERM; while :; do sleep 1; done";
        publisher.container("web", &fields, &shell(script));
    };
    // However slow the machine is, what is up is healthy.
    web("command: [/bin/cat, /tmp/up], interval: 1s, timeout: 60s");
    // Both wait until they are asked.
    let asked = "until test -e /go/go; do sleep 1; done";
    let volume = "mounts: [{destination: /go, type: volume, source: go}]";
    publisher.container(
        "hog",
        &format!(
            "network: {{type: none}}, run: {{restart: no, stop_seconds: 5}}, {volume}, resources: {{memory: 32M}}"
        ),
        &shell(&format!("{asked}; exec /bin/busybox tail /dev/zero")),
    );
    let bomb = |port: u16| {
        let ports = format!("ports: [{{host: {}, container: {port}}}]", port - 8000);
        let fields = format!(
            "network: {{type: simple, {ports}}}, run: {{restart: no, stop_seconds: 4}}, {volume}, \
             resources: {{tasks: 30}}"
        );
        // When it is stopped it has not done its work, and is started again.
        let script = format!("trap 'exit 9' TERM; {asked}; while :; do sleep 1000 & done");
        publisher.container("bomb", &fields, &shell(&script));
    };
    bomb(8081);
    publisher.container(
        "job",
        "network: {type: none}, run: {restart: no}, mounts: [{destination: /data, type: volume, source: job}]",
        &shell(
            "echo begun > /data/state; echo run >> /data/runs; sleep 2; test ! -e /data/fail || exit 7; \
             echo finished > /data/state",
        ),
    );
    publisher.publish_targets(VERSION, &targets, true);
    bomb(8082);
    let changed = |(name, kind, layers): &(&'static str, &'static str, Vec<_>)| match *name {
        "hog" => (*name, *kind, [&busybox[..], &target("second")].concat()),
        _ => (*name, *kind, layers.clone()),
    };
    publisher.publish_targets(NEXT, &targets.iter().map(changed).collect::<Vec<_>>(), true);
    bomb(8081);
    web("command: [/bin/false], interval: 1s, start: 1s, retries: 1");
    publisher.publish_targets(SICK, &targets, true);
}

/// Boots a device with this Debian and this kernel, which does `steps`; wants verdict 0 and these words on the console.
fn boots(debian: &Path, kernel: &'static str, steps: &str, cmdline: &str, words: &[&str]) -> Ended {
    let dir = tempfile::tempdir().unwrap();
    let (_device, machine) = machine_of(dir.path(), debian, kernel, steps, cmdline);
    machine.expect(0, words)
}

/// Makes a device with this Debian and this kernel, which does `steps`, and the machine that boots it.
fn machine_of(
    dir: &Path,
    debian: &Path,
    kernel: &'static str,
    steps: &str,
    cmdline: &str,
) -> (Device, Machine) {
    let publisher = Publisher::new(dir);
    publish(&publisher, dir, debian, kernel, steps);
    let device = Device::of(publisher, VERSION);
    carry_targets(&dir.join("store"), &device);
    let initrd = device.path("initrd");
    let mut machine = Machine { kernel, ..device.machine_with(&initrd) };
    make_initrd(&initrd, "initramfs-tools", machine.kernel, device.config());
    machine.cmdline += &format!(" loglevel=6 {cmdline}");
    machine.timeout *= if is_long() { 8 } else { 1 };
    (device, machine)
}

/// Puts the publisher's store onto the partition, for updates in the machine, but for the large blobs that it has.
fn carry_targets(store: &Path, device: &Device) {
    let to = device.system().join("vm-source");
    tool("coreutils", Command::new("cp").arg("-rT").args([store, &to]));
    for entry in fs::read_dir(to.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap()) {
        if entry.metadata().unwrap().len() > 4 << 20 {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}

/// Whether campaigns are long (`make campaign`).
fn is_long() -> bool {
    std::env::var("MOSFS_CAMPAIGN").is_ok_and(|value| value == "long")
}

/// What systemd and the kernel say at the end of a shutdown in order.
const IN_ORDER: &str = "reboot: Power down";

#[test]
fn targets_are_active_at_boot_and_their_daemons_come_back() {
    let first = "grep -q '^mosfs:' /proc/self/mounts || exit 3\n\
         test $(grep -c ' /run/mosfs/targets/[^ ]* overlay ro,nosuid,nodev' /proc/self/mounts) = 8 || exit 4\n";
    let words = ["vm: step 29", "vm: step 18", "vm: step 31", "data-set (fuse): verified", IN_ORDER];
    // Restarts, with an activation after each fifth one.
    let rounds = if is_long() { "500" } else { "5" };
    let mut containers = [CONTAINERS, &LONG_CONTAINERS.replace("ROUNDS", rounds)].concat();
    for (name, version) in [("NEXT", NEXT), ("SICK", SICK), ("VERSION", VERSION)] {
        containers = containers.replace(name, &version.to_string());
    }
    let steps = format!("{first}{HELPERS}{containers}{STEPS}{THROUGH_FUSE}");
    without_failures(&boots(debian_image(), "6.12", &steps, "", &words));
}

fn without_failures(ended: &Ended) {
    ended.without(&["I/O error"]);
    // What systemd says of any unit, but for containers that are to fail.
    let failed = |line: &&str| line.contains("Failed to start") && !line.contains("Target ");
    assert_eq!(ended.console.lines().find(failed), None);
}

#[test]
#[cfg_attr(not(feature = "campaign"), ignore = "takes minutes: `make campaign` runs it")]
fn containers_run_on_debian_13_through_both_backends() {
    let steps = format!("{HELPERS}{DEBIAN_13}{CONTAINERS}{ALL_THROUGH_FUSE}{THROUGH_FUSE}");
    let words = ["vm: step 9", "vm: step 25", "vm: step 31", IN_ORDER];
    without_failures(&boots(&debian_13_image(), "6.12", &steps, "", &words));
}

#[test]
fn containers_start_in_order_and_keep_their_volumes_over_reboots_with_all_of_them_running() {
    let dir = tempfile::tempdir().unwrap();
    let steps = format!("{HELPERS}{REBOOTED}");
    let (device, mut machine) = machine_of(dir.path(), debian_image(), "6.12", &steps, "");
    machine.disk = Some(device.path("disk.qcow2"));
    for boot in 1..=2 {
        let ended = machine.expect(0, &[&format!("vm: boot {boot} is done"), IN_ORDER]);
        // The devices of the images are there until the last container has ended.
        ended.without(&["I/O error", "Input/output error", "Failed to execute shutdown"]);
        machine.system = None;
    }
}

#[test]
fn a_root_through_fuse_serves_to_the_end_of_an_orderly_shutdown() {
    let root = "mosfs activate --backend fuse || exit 3\n\
         pid=$(pgrep -f '^@mosfs') || pid=$(grep -l '^@mosfs' /proc/[0-9]*/cmdline | head -n 1 | cut -d/ -f3)\n\
         test -n \"$pid\" || exit 4\n\
         echo \"vm: the root's daemon is $pid: $(tr '\\0' ' ' </proc/$pid/cmdline)\"\n\
         test \"$(cat /run/mosfs/targets/app/content)\" = app || exit 5\n";
    let steps = format!("{HELPERS}{SHIFTED}{root}");
    let words = ["vm: step 41", "vm: the root's daemon is ", IN_ORDER];
    // Debian 12's own kernel.
    let ended = boots(debian_image(), "6.1", &steps, "mosfs.backend=fuse", &words);
    // A root whose daemon was killed would have said so here.
    ended.without(&[
        "Transport endpoint is not connected",
        "Input/output error",
        "Failed to execute shutdown",
    ]);
}
