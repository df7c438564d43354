//! What is left of a container that has ended: removed by its unit, and by the next activation where that was killed.
//!
//! ```text
//! state of the runtime   RUN/crun/NAME; also removed by the next start
//! use of the bridge      RUN/notes/NAME.network (network.rs)
//! ```
//! Mounts, interfaces, namespaces and control groups end with the last process of the container, and need nobody.
//!
//! **Rule:** the time that a program has to stop is not the time that the clean-up has. TimeoutStopSec= of the unit is
//! that of the program, and systemd holds ExecStopPost= to it, too: the clean-up asks for more (sd_notify(3)).

use std::fs;
use std::time::Duration;

use serde::Deserialize;

use super::places::Places;
use super::{RunError, network, runtime, units};
use crate::manifest::rules;
use crate::sys::{file, notify};

/// How long a clean-up may take.
pub const TIME: Duration = Duration::from_secs(90);

/// How a container has ended, in systemd's words (systemd.exec(5), environment variables of ExecStopPost=).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ended {
    /// `success`, `exit-code`, `signal`, `oom-kill`, …
    pub result: String,
    /// `exited`, `killed` or `dumped`: how the main process ended.
    pub how: String,
    /// Its exit code, or the name of the signal without SIG.
    pub status: String,
}

impl Ended {
    /// Reads `$SERVICE_RESULT`, `$EXIT_CODE` and `$EXIT_STATUS`.
    pub fn from_environment() -> Self {
        let value = |name| std::env::var(name).unwrap_or_default();
        Self { result: value("SERVICE_RESULT"), how: value("EXIT_CODE"), status: value("EXIT_STATUS") }
    }

    /// Why it failed, as a sentence about the target; `None` if it did not.
    pub fn failure(&self) -> Option<String> {
        let Self { result, how, status } = self;
        let sentence = match result.as_str() {
            "" | "success" => return None,
            "oom-kill" => "the kernel ended it, as it used more memory than it may".to_string(),
            "timeout" => "it took too long to start or to stop, and was killed".to_string(),
            "exit-code" if how == "exited" => format!("its program ended with exit code {status}"),
            "signal" | "core-dump" if !status.is_empty() => format!("signal SIG{status} ended its program"),
            other => format!("its unit failed ({other})"),
        };
        Some(sentence)
    }
}

/// Removes what a container has left when its unit has stopped, and notes why it has failed, if it has.
pub fn clean(places: &Places, target: &str, ended: &Ended) {
    if let Err(error) = notify::service_says(&format!("EXTEND_TIMEOUT_USEC={}", TIME.as_micros())) {
        log::warn!("target {target}: cannot ask the service manager for time to clean up: {error}");
    }
    note_failure(places, target, ended);
    // With --force: the runtime itself may have been killed.
    let _ = runtime::delete(places, target, true);
    if let Err(why) = network::leave(places, target) {
        log::warn!("target {target}: {why}");
    }
}

/// Notes why a container has failed, unless there is a better reason.
fn note_failure(places: &Places, target: &str, ended: &Ended) {
    let Some(failure) = ended.failure() else { return };
    // That the runtime has failed is not the program's matter.
    let of_runtime = runtime_error(places, target).map(|why| format!("the runtime cannot run it: {why}"));
    let failure = of_runtime.unwrap_or(failure);
    match units::last_error(places, target) {
        None => {
            let error = RunError::Unit { target: target.into(), why: failure };
            units::note_error(places, target, &error.to_string());
        }
        Some(noted) if noted.ends_with(units::ENDED_EARLY) => {
            units::note_error(places, target, &format!("{noted}: {failure}"));
        }
        Some(_) => {}
    }
}

/// Most bytes of the runtime's log that are read.
const MAX_LOG: u64 = 64 << 10;

/// The last error of the runtime that ran a container, if it had one.
fn runtime_error(places: &Places, target: &str) -> Option<String> {
    /// A line of its log (`--log-format=json`).
    #[derive(Deserialize)]
    struct Line {
        msg: String,
        level: String,
    }
    let text = file::find_regular(&places.runtime_log(target), file::Links::Refused, MAX_LOG).ok()??;
    let lines = serde_json::Deserializer::from_slice(&text).into_iter::<Line>();
    let errors = lines.map_while(Result::ok).filter(|line| line.level == "error");
    Some(rules::printable(errors.last()?.msg.trim(), 500))
}

/// Removes what is left of all containers that have ended and whose clean-up was killed. What runs or starts meanwhile
/// stays.
///
/// # Errors
/// What ip(8) and nft(8) say, if the network of containers cannot be removed.
pub fn tidy(places: &Places) -> Result<(), String> {
    for entry in fs::read_dir(places.runtime()).into_iter().flatten().flatten() {
        let Ok(target) = entry.file_name().into_string() else { continue };
        if runtime::pid(places, &target).is_none() {
            // Without --force, the runtime refuses to delete one that was started meanwhile.
            let _ = runtime::delete(places, &target, false);
        }
    }
    network::tidy(places)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ended(result: &str, how: &str, status: &str) -> Ended {
        Ended { result: result.into(), how: how.into(), status: status.into() }
    }

    #[test]
    fn what_has_failed_says_why_and_keeps_the_better_reason() {
        for (how, sentence) in [
            (ended("success", "exited", "0"), None),
            (ended("exit-code", "exited", "3"), Some("its program ended with exit code 3")),
            (ended("signal", "killed", "SEGV"), Some("signal SIGSEGV ended its program")),
            (
                ended("oom-kill", "killed", "KILL"),
                Some("the kernel ended it, as it used more memory than it may"),
            ),
            (
                ended("timeout", "killed", "KILL"),
                Some("it took too long to start or to stop, and was killed"),
            ),
            (ended("resources", "", ""), Some("its unit failed (resources)")),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let places = Places { run: dir.path().into(), system: dir.path().into() };
            note_failure(&places, "web", &how);
            let noted = units::last_error(&places, "web");
            assert_eq!(noted, sentence.map(|sentence| format!("target web: {sentence}")), "{how:?}");
        }
        // What the runtime says is better than how it has ended; its warnings and what is no log are no reasons.
        let dir = tempfile::tempdir().unwrap();
        let places = Places { run: dir.path().into(), system: dir.path().into() };
        let failed = ended("exit-code", "exited", "3");
        let line = |level: &str, msg: &str| json!({ "msg": msg, "level": level, "time": "x" }).to_string();
        places.make_notes().unwrap();
        for (log, said) in [
            (String::new(), "its program ended with exit code 3"),
            ("broken\n".to_string(), "its program ended with exit code 3"),
            (line("warning", "odd"), "its program ended with exit code 3"),
            (
                line("error", "no\u{1b}cgroup") + "\n" + &line("warning", "odd"),
                "the runtime cannot run it: no\\u{1b}cgroup",
            ),
            (line("error", "first") + &line("error", "last\n"), "the runtime cannot run it: last"),
        ] {
            let _ = fs::remove_file(places.error("web"));
            fs::write(places.runtime_log("web"), &log).unwrap();
            note_failure(&places, "web", &failed);
            assert_eq!(units::last_error(&places, "web"), Some(format!("target web: {said}")), "{log}");
        }
        // What is started once more has the reason of the last time, until it has one of its own.
        let state = |active: &str| units::State { active: active.into(), ..units::State::default() };
        let why_not = |active: &str| units::why_not(&places, "web", &state(active));
        let reason = Some("target web: the runtime cannot run it: last".to_string());
        assert_eq!(why_not("failed"), reason);
        units::forget_last_run(&places, "web");
        assert_eq!((why_not("activating"), why_not("inactive")), (reason, None));
        note_failure(&places, "web", &ended("signal", "killed", "SEGV"));
        let own = Some("target web: signal SIGSEGV ended its program".to_string());
        assert_eq!((why_not("activating"), why_not("failed")), (own.clone(), own));
        units::forget_last_run(&places, "web");
        units::forget_last_run(&places, "web");
        assert_eq!(why_not("activating"), None, "the start before that one did not fail");
        let dir = tempfile::tempdir().unwrap();
        let places = Places { run: dir.path().into(), system: dir.path().into() };
        units::note_error(&places, "web", "target web: it ended before it was healthy");
        note_failure(&places, "web", &failed);
        let both = "target web: it ended before it was healthy: its program ended with exit code 3";
        assert_eq!(units::last_error(&places, "web").as_deref(), Some(both));
        units::note_error(&places, "web", "target web: its image is not mounted");
        note_failure(&places, "web", &failed);
        assert_eq!(
            units::last_error(&places, "web").as_deref(),
            Some("target web: its image is not mounted")
        );
    }
}
