//! The machine that the figures are from, and how much of it was taken away meanwhile.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

/// What a reader must know to judge the figures.
pub fn describe() -> Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_string())
    };
    let flags = field("flags").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_kib: u64 =
        memory.lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0);
    json!({
        "cpu": field("model name").or(field("CPU implementer")).unwrap_or_else(|| std::env::consts::ARCH.into()),
        "cores": std::thread::available_parallelism().map_or(1, |n| n.get()),
        "sha_ni": flags.split_whitespace().any(|flag| flag == "sha_ni"),
        "memory_gib": (memory_kib as f64 / 1024.0 / 1024.0 * 10.0).round() / 10.0,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "debian": fs::read_to_string("/etc/debian_version").unwrap_or_default().trim(),
        "virtual": flags.split_whitespace().any(|flag| flag == "hypervisor"),
        "commit": said("git", &["describe", "--always", "--dirty"]),
        "date": said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        "tools": {
            "squashfuse": version_of("squashfuse"),
            "erofs-utils": version_of("erofs-utils"),
            "squashfs-tools": version_of("squashfs-tools"),
            "umoci": version_of("umoci"),
            "cryptsetup": version_of("cryptsetup-bin"),
        },
    })
}

fn said(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn version_of(package: &str) -> Option<String> {
    said("dpkg-query", &["-W", "-f", "${Version}", package])
}

/// Time of all CPUs so far, in ticks: in all, and stolen by the machine below.
pub struct Ticks {
    all: u64,
    stolen: u64,
}

impl Ticks {
    /// The ticks until now.
    pub fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        // user nice system idle iowait irq softirq steal (proc_stat(5)); guest time is part of user.
        let fields: Vec<u64> = stat
            .lines()
            .next()
            .map(|line| line.split_whitespace().skip(1).take(8).filter_map(|f| f.parse().ok()).collect())
            .unwrap_or_default();
        Self { all: fields.iter().sum(), stolen: fields.get(7).copied().unwrap_or(0) }
    }

    /// Percent of the CPUs' time since `self` that was stolen.
    pub fn stolen_percent_since(&self) -> f64 {
        let now = Self::now();
        let all = now.all.saturating_sub(self.all);
        if all == 0 { 0.0 } else { 100.0 * now.stolen.saturating_sub(self.stolen) as f64 / all as f64 }
    }
}
