//! Network namespaces for containers, and containers that run in one of them.

#[path = "wait.rs"]
mod wait;

use std::process::{Child, Command, Stdio};

use super::container::World;

pub use wait::wait_until;

/// Two network namespaces that are linked: the host with 192.0.2.1, and the outside with 192.0.2.2.
pub struct Networks {
    pub host: Child,
    pub outside: Child,
}

impl Networks {
    pub fn new() -> Self {
        let namespace = || {
            let child = Command::new("unshare").args(["--net", "sleep", "3600"]).stdin(Stdio::null()).spawn();
            child.expect("unshare (Debian package util-linux)")
        };
        let networks = Self { host: namespace(), outside: namespace() };
        // Until unshare has made them.
        for child in [&networks.host, &networks.outside] {
            let is_own = || {
                let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
                link(&child.id().to_string()) != link("self")
            };
            wait_until("a network namespace", is_own);
        }
        let outside = networks.outside.id();
        networks.on_host(&format!(
            "ip link set lo up && ip link add out0 type veth peer name out1 netns {outside} && \
             ip address add 192.0.2.1/24 dev out0 && ip link set out0 up"
        ));
        networks.outside(
            "ip link set lo up && ip address add 192.0.2.2/24 dev out1 && ip link set out1 up && \
                               ip route add default via 192.0.2.1",
        );
        networks
    }

    pub fn enter(child: &Child) -> Command {
        let mut command = Command::new("nsenter");
        // With /sys of that network.
        command.args([
            &format!("--net=/proc/{}/ns/net", child.id()),
            "--",
            "unshare",
            "--mount",
            "--propagation",
        ]);
        command.args(["slave", "sh", "-c", "mount -t sysfs none /sys && exec \"$@\"", "sh"]);
        command
    }

    pub fn on_host(&self, script: &str) -> String {
        output(Self::enter(&self.host).args(["sh", "-c", script]))
    }

    pub fn outside(&self, script: &str) -> String {
        output(Self::enter(&self.outside).args(["sh", "-c", script]))
    }

    /// `mosfs` on the host.
    pub fn mosfs(&self, world: &World, args: &[&str]) -> Command {
        let inner = world.command(args);
        let mut command = Self::enter(&self.host);
        command.arg(inner.get_program()).args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for child in [&mut self.host, &mut self.outside] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What a command prints, which must succeed.
pub fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// A container that runs.
pub struct Running {
    pub child: Child,
}

impl Running {
    pub fn start(networks: &Networks, world: &World, target: &str) -> Self {
        let child = networks.mosfs(world, &["run-target", target]).stdin(Stdio::null()).spawn().unwrap();
        let running = Self { child };
        // As its unit does: the process of the runtime, into which nsenter, unshare and mosfs turn.
        let mut wait = networks.mosfs(world, &["run-target", "--wait-healthy", target]);
        output(wait.env("MAINPID", running.child.id().to_string()));
        running
    }
}

impl Drop for Running {
    /// Kills mosfs, the runtime and the container at once, as when power goes. The runtime has taken the place of mosfs,
    /// or is its child where the output of the tests is a file.
    fn drop(&mut self) {
        let mut pids = vec![self.child.id().to_string()];
        let mut known = 0;
        while let Some(pid) = pids.get(known) {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            pids.extend(children.unwrap_or_default().split_whitespace().map(str::to_owned));
            known += 1;
        }
        let _ = Command::new("kill").arg("-9").args(&pids).status();
        let _ = self.child.wait();
    }
}
