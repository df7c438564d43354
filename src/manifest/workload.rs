//! What a container target runs and how it is kept running: the optional fields of a target that both manifests share.
//!
//! ```text
//! needs: [NAME]                       started after these are healthy
//! health: {command: [..], interval: 10s, timeout: 5s, retries: 3, start: 60s}
//! ready: notify                       the program reports that it is ready; in place of health
//! run: {command: [..], environment: {NAME: TEXT}, init: false, stop_seconds: 10,
//!       restart: always | on-failure | no, writable: false | true | size=SIZE}
//! resources: {memory: SIZE, tasks: N, cpu: N%}
//! capabilities: [NET_ADMIN]           added to the few that a container has
//! devices: [/dev/ttyUSB0]
//! secrets: [NAME]                     credentials of systemd, at /run/secrets/NAME
//! ```
//!
//! Values stay as written, so that a signed manifest has one form. Methods return them with their defaults.

use std::collections::BTreeMap;
use std::time::Duration;

use super::TargetName;
use super::rules;
use super::tree::Value;

/// The optional fields of a container target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    /// Targets that must be healthy before this one is started.
    pub needs: Option<Vec<TargetName>>,
    /// How its health is asked.
    pub health: Option<Health>,
    /// Whether the program reports that it is ready.
    pub ready: Option<Ready>,
    /// What is run.
    pub run: Option<Run>,
    /// What it may use of the machine.
    pub resources: Option<Resources>,
    /// Capabilities that are added, without `CAP_`.
    pub capabilities: Option<Vec<String>>,
    /// Devices of the host, by path.
    pub devices: Option<Vec<String>>,
    /// Credentials of systemd, by name.
    pub secrets: Option<Vec<String>>,
}

/// A command that succeeds when the target is healthy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The command and its arguments; it runs inside the target.
    pub command: Vec<String>,
    /// Time between two attempts, as written.
    pub interval: Option<String>,
    /// Time after which an attempt has failed, as written.
    pub timeout: Option<String>,
    /// How many failures in a row make the target unhealthy.
    pub retries: Option<u64>,
    /// Time in which failures do not count, as written.
    pub start: Option<String>,
}

/// What is run in a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Run {
    /// In place of the image's Entrypoint and Cmd.
    pub command: Option<Vec<String>>,
    /// Added to the image's Env.
    pub environment: Option<BTreeMap<String, String>>,
    /// Whether a small init is process 1, which forwards signals and reaps.
    pub init: Option<bool>,
    /// Seconds between the stop signal and SIGKILL.
    pub stop_seconds: Option<u64>,
    /// When it is started again.
    pub restart: Option<Restart>,
    /// Whether the root is writable.
    pub writable: Option<Writable>,
}

/// Whether a target's root file system is writable, in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writable {
    /// Read-only. The default.
    No,
    /// Writable until the target stops.
    Yes,
    /// The same, with at most this size, as written.
    Size(String),
}

/// Limits of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// Most memory, as written: `256M`.
    pub memory: Option<String>,
    /// Most processes and threads.
    pub tasks: Option<u64>,
    /// Most processor time, as written: `150%` is one and a half cores.
    pub cpu: Option<String>,
}

words! {
    /// When a target is started again (`restart`).
    Restart {
        /// Whenever it ends. The default.
        Always = "always",
        /// When it fails.
        OnFailure = "on-failure",
        /// Never.
        No = "no",
    }
}

words! {
    /// How a program reports that it is ready (`ready`).
    Ready {
        /// Over the socket of sd_notify(3).
        Notify = "notify",
    }
}

/// Time between two attempts, if the manifest states none.
const INTERVAL: Duration = Duration::from_secs(10);
/// Time after which an attempt has failed, if the manifest states none.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Time in which failures do not count, if the manifest states none.
const START: Duration = Duration::from_secs(60);
/// Failures in a row, if the manifest states none.
const RETRIES: u64 = 3;

impl Health {
    /// Time between two attempts.
    pub fn interval(&self) -> Duration {
        time_or(self.interval.as_deref(), INTERVAL)
    }

    /// Time after which an attempt has failed.
    pub fn timeout(&self) -> Duration {
        time_or(self.timeout.as_deref(), TIMEOUT)
    }

    /// Time in which failures do not count.
    pub fn start(&self) -> Duration {
        time_or(self.start.as_deref(), START)
    }

    /// How many failures in a row make the target unhealthy.
    pub fn retries(&self) -> u64 {
        self.retries.unwrap_or(RETRIES)
    }
}

fn time_or(text: Option<&str>, default: Duration) -> Duration {
    text.and_then(|text| rules::time(text).ok()).unwrap_or(default)
}

impl Workload {
    /// Whether nothing is written.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What is run, with the defaults.
    pub fn run(&self) -> Run {
        self.run.clone().unwrap_or_default()
    }

    /// The targets that must be healthy before this one is started.
    pub fn needs(&self) -> &[TargetName] {
        self.needs.as_deref().unwrap_or_default()
    }
}

/// The fields of a target that a [`Workload`] is read from.
pub(super) const FIELDS: [&str; 8] =
    ["needs", "health", "ready", "run", "resources", "capabilities", "devices", "secrets"];

/// Returns the tree of the fields of a [`Workload`] that are written.
pub(super) fn tree(workload: &Workload) -> [(&str, Option<Value<'_>>); 8] {
    fn texts<'a>(list: &'a Option<Vec<String>>) -> Option<Value<'a>> {
        list.as_ref().map(|all| Value::list(all.iter().map(|one| Value::text(one))))
    }
    fn text(text: &Option<String>) -> Option<Value<'_>> {
        text.as_deref().map(Value::text)
    }
    let truth = |value: bool| Value::Plain(if value { "true".into() } else { "false".into() });
    let Workload { needs, health, ready, run, resources, capabilities, devices, secrets } = workload;
    let health = health.as_ref().map(|health| {
        Value::map([
            ("command", Some(Value::list(health.command.iter().map(|one| Value::text(one))))),
            ("interval", text(&health.interval)),
            ("timeout", text(&health.timeout)),
            ("retries", health.retries.map(Value::integer)),
            ("start", text(&health.start)),
        ])
    });
    let run = run.as_ref().map(|run| {
        let environment = run
            .environment
            .as_ref()
            .map(|all| Value::map(all.iter().map(|(name, value)| (name.as_str(), Some(Value::text(value))))));
        let writable = run.writable.as_ref().map(|writable| match writable {
            Writable::No => truth(false),
            Writable::Yes => truth(true),
            Writable::Size(size) => Value::Text(format!("size={size}").into()),
        });
        Value::map([
            ("command", texts(&run.command)),
            ("environment", environment),
            ("init", run.init.map(truth)),
            ("stop_seconds", run.stop_seconds.map(Value::integer)),
            ("restart", run.restart.map(|restart| Value::text(restart.as_str()))),
            ("writable", writable),
        ])
    });
    let resources = resources.as_ref().map(|resources| {
        Value::map([
            ("memory", text(&resources.memory)),
            ("tasks", resources.tasks.map(Value::integer)),
            ("cpu", text(&resources.cpu)),
        ])
    });
    let needs = needs.as_ref().map(|needs| Value::list(needs.iter().map(|name| Value::text(name.as_str()))));
    [
        ("needs", needs),
        ("health", health),
        ("ready", ready.map(|ready| Value::text(ready.as_str()))),
        ("run", run),
        ("resources", resources),
        ("capabilities", texts(capabilities)),
        ("devices", texts(devices)),
        ("secrets", texts(secrets)),
    ]
}
