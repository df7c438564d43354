//! Rows about containers: from the start until the first request is answered, beside `podman run --rootfs` of the same trees.
//!
//! ```text
//! DIR/containers/    keys/, store/, device/ with ten targets installed, images/ with them as tar layers, trees/ for podman
//! ```
//! Each container is a web server on a port of the host's network. mosfs runs them in the foreground, as their units do, on
//! a mount through FUSE; podman's store is in the scratch folder.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};

use crate::Result;
use crate::fixture::{Fixture, build, once, shell};
use crate::peers;
use crate::rows::{Goal, Row, Unit, Who, beside, row};
use crate::system::{install, on_device, words};

/// Containers of the system.
const CONTAINERS: usize = 10;
/// The port of the first one.
const FIRST_PORT: usize = 18_080;
/// How long they may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

const RUN: &str = "mosfs";
const RUN_MOUNTED: &str = "mosfs, mounted already";
const PODMAN: &str = "podman run --rootfs";

const HALF: &[Goal] = &[beside(PODMAN, 0.5)];

const fn started(id: &'static str, title: &'static str, goals: &'static [Goal]) -> Row {
    Row { ours: RUN, who: Who::Programs, ..row(id, title, goals, STARTED) }
}

const STARTED: &str = "From the first command until each container has answered a request. mosfs verifies the signature, mounts \
     over FUSE, and gives each container ids of its own; podman runs the same trees from folders. Cold: images and trees are \
     dropped from the page cache.";

/// The rows of this module.
pub const ROWS: &[Row] = &[
    started("run1", "Start 1 container", HALF),
    started("run10", "Start 10 containers", HALF),
    started("run1cold", "Start 1 container, cold", HALF),
    started("run10cold", "Start 10 containers, cold", HALF),
    Row {
        unit: Unit::Megabytes,
        ours: RUN,
        who: Who::Programs,
        ..row(
            "runmem",
            "Memory for each of 10 containers",
            &[],
            "Anonymous memory of the processes that serve and watch a running container, without its own.",
        )
    },
];

/// Whether a row is one of these.
pub fn has(row: &Row) -> bool {
    ROWS.iter().any(|own| own.id == row.id)
}

/// Who takes part in it.
pub fn programs(row: &Row) -> &'static [&'static str] {
    if row.id == "runmem" { &[PODMAN, RUN] } else { &[PODMAN, RUN, RUN_MOUNTED] }
}

/// One run. None where the program is not installed.
pub fn run(row: &Row, name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Option<f64>> {
    let needed = if name == PODMAN { "podman" } else { "crun" };
    if shell(&format!("command -v {needed}")).is_err() {
        return Ok(None);
    }
    let system = fixture.scratch().with_file_name("containers");
    once(&system, |to| make(to, mosfs))?;
    let count = if row.id.starts_with("run1") && !row.id.starts_with("run10") { 1 } else { CONTAINERS };
    let files = files_below(&if name == PODMAN { system.join("trees") } else { system.join("device") })?;
    for file in &files {
        if row.id.ends_with("cold") {
            fadvise(File::open(file)?, 0, None, Advice::DontNeed)?;
        } else {
            std::io::copy(&mut File::open(file)?, &mut std::io::sink())?;
        }
    }
    let measured = match name {
        PODMAN => podman(&system, &fixture.scratch(), count),
        _ => ours(&system, count, mosfs, name == RUN_MOUNTED),
    }?;
    Ok(Some(if row.id == "runmem" { measured.anonymous / 1e6 / count as f64 } else { measured.seconds }))
}

/// What a run took.
struct Measured {
    seconds: f64,
    anonymous: f64,
}

fn target(number: usize) -> String {
    format!("t{number:02}")
}

fn make(to: &Path, mosfs: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let dir = to.display();
    shell(&format!("umoci init --layout '{dir}/images'"))?;
    let mut targets = String::new();
    for number in 0..CONTAINERS {
        let (name, port) = (target(number), FIRST_PORT + number);
        shell(&format!(
            "mkdir -p '{dir}/trees/{name}'/{{bin,www}} && cp /bin/busybox '{dir}/trees/{name}/bin/' && \
             echo '{name}' >'{dir}/trees/{name}/www/index.html' && \
             tar -cf '{dir}/layer.tar' -C '{dir}/trees/{name}' . && umoci new --image '{dir}/images:{name}' && \
             umoci raw add-layer --image '{dir}/images:{name}' '{dir}/layer.tar' && \
             umoci config --image '{dir}/images:{name}' --config.cmd /bin/busybox --config.cmd httpd --config.cmd -f \
             --config.cmd -p --config.cmd {port} --config.cmd -h --config.cmd /www"
        ))?;
        writeln!(
            targets,
            "  {name}: {{url: \"oci:{dir}/images:{name}\", version: 1.0.0, service_type: container, network: {{type: host}}}}"
        )?;
    }
    build(to, mosfs, 1, "", &targets)?;
    install(to, mosfs)
}

/// All files below a folder.
fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// Waits until each of the first containers answers a request with its own page. `started` are the commands that run them,
/// or have started them.
fn answered(count: usize, started: &mut [Child]) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    for number in 0..count {
        while ask(FIRST_PORT + number).is_none_or(|page| !page.ends_with(&format!("\n{}\n", target(number))))
        {
            for (number, child) in started.iter_mut().enumerate() {
                if let Some(status) = child.try_wait()?.filter(|status| !status.success()) {
                    return Err(format!("container {number}: its command ended with {status}").into());
                }
            }
            if Instant::now() > end {
                return Err(format!("container {number} does not answer").into());
            }
            thread::sleep(Duration::from_micros(500));
        }
    }
    Ok(())
}

/// A command for the program that starts a container. Its mount namespace has the one hierarchy of control groups, which crun
/// requires, where the machine has another.
fn starter(program: &Path) -> Command {
    let script =
        "test -e /sys/fs/cgroup/cgroup.controllers || mount -t cgroup2 none /sys/fs/cgroup; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-c", script, "sh"]).arg(program);
    command.stdin(Stdio::null());
    command
}

fn ask(port: usize) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", u16::try_from(port).ok()?)).ok()?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    Some(page)
}

fn ours(system: &Path, count: usize, mosfs: &Path, is_mounted: bool) -> Result<Measured> {
    let names: Vec<String> = (0..count).map(target).collect();
    let others = peers::fuse_servers();
    let mut mount = words(&["activate", "--backend", "fuse", "--daemon", "fork", "--floor", "file"]);
    mount.extend(names.iter().cloned());
    let device = system.join("device");
    if is_mounted {
        on_device(mosfs, system, &device, &mount)?;
    }
    let began = Instant::now();
    let mounted = if is_mounted { Ok(()) } else { on_device(mosfs, system, &device, &mount) };
    let mut children: Vec<Child> = Vec::new();
    for name in &names {
        let mut command = starter(mosfs);
        command.args(["run-target", name]).stdout(Stdio::null());
        command.env("MOSFS_SYSTEM", device.join("system")).env("MOSFS_CONFIG", device.join("config"));
        children.push(command.env("MOSFS_RUN", system.join("run")).spawn()?);
    }
    let right = mounted.and_then(|()| answered(count, &mut children));
    let seconds = began.elapsed().as_secs_f64();
    let servers = peers::fuse_servers().into_iter().filter(|pid| !others.contains(pid));
    let all = servers.chain(children.iter().map(Child::id));
    let anonymous = all.filter_map(peers::anonymous_part_bytes).sum::<u64>() as f64;
    for (child, name) in children.iter_mut().zip(&names) {
        let state = system.join("run/crun");
        let _ = shell(&format!(
            "crun --cgroup-manager=disabled --root '{}' delete --force {name}",
            state.display()
        ));
        let _ = child.kill();
        child.wait()?;
    }
    for name in &names {
        let point = system.join("run/targets").join(name).display().to_string();
        let unmounted = peers::run(&[mosfs.display().to_string(), "umount".into(), point]);
        if right.is_ok() {
            unmounted?;
        }
    }
    right?;
    Ok(Measured { seconds, anonymous })
}

/// The limits: those that podman sets by itself may be above its own, which it may not raise.
const PODMAN_RUN: &str =
    "run --detach --cgroups=disabled --network host --ulimit nofile=1024:1024 --ulimit nproc=1024:1024";

fn podman(system: &Path, scratch: &Path, count: usize) -> Result<Measured> {
    let names: Vec<String> = (0..count).map(target).collect();
    let dir = |name: &str| scratch.join(name).display().to_string();
    let mut podman =
        words(&["podman", "--root", &dir("root"), "--runroot", &dir("run"), "--tmpdir", &dir("tmp")]);
    let options = "--storage-driver vfs --runtime crun --cgroup-manager cgroupfs --events-backend none";
    podman.extend(options.split(' ').map(String::from));
    fs::create_dir_all(scratch)?;
    // Its own store is made by the first command. A run that was killed has left its containers there.
    let remove = [podman.clone(), words(&["rm", "--force", "--time", "0", "--all"])].concat();
    peers::run(&remove)?;
    let log = |name: &str| scratch.join(format!("{name}.log"));
    let began = Instant::now();
    let mut children = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let mut command = starter(Path::new("podman"));
        command.args(&podman[1..]).args(PODMAN_RUN.split(' ')).args(["--name", name, "--rootfs"]);
        command.arg(system.join("trees").join(name));
        command.args(["/bin/busybox", "httpd", "-f", "-p", &(FIRST_PORT + number).to_string(), "-h", "/www"]);
        let output = File::create(log(name))?;
        children.push(command.stdout(output.try_clone()?).stderr(output).spawn()?);
    }
    let right = answered(count, &mut children);
    let seconds = began.elapsed().as_secs_f64();
    for child in &mut children {
        child.wait()?;
    }
    // Its conmon, and what that starts for the clean-up: their commands name the folder.
    let watchers = || -> Result<Vec<u32>> {
        let found = Command::new("pgrep").args(["-f", &dir("run")]).output()?.stdout;
        Ok(String::from_utf8_lossy(&found).split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
    };
    let pids = watchers()?.into_iter();
    let anonymous = pids.filter_map(peers::anonymous_part_bytes).sum::<u64>() as f64;
    let removed = peers::run(&remove);
    right.map_err(|error| {
        let said: Vec<String> =
            names.iter().map(|name| fs::read_to_string(log(name)).unwrap_or_default()).collect();
        format!("{error}: {}", said.concat().trim())
    })?;
    removed?;
    let end = Instant::now() + PATIENCE;
    while !watchers()?.is_empty() {
        if Instant::now() > end {
            return Err("podman's processes do not end".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    fs::remove_dir_all(scratch)?;
    Ok(Measured { seconds, anonymous })
}
