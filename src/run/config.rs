//! The configuration of an image: what it runs, as whom, where (OCI image specification, config).
//!
//! The bytes were checked against the digest in the verified OCI manifest. Their content is still the image's: each
//! value is checked before it is used.

use serde::Deserialize;

use super::RunError;
use crate::digest::Digest;
use crate::manifest::TargetName;

/// Most bytes of a configuration.
pub const MAX_BYTES: u64 = 4 << 20;

/// What an image runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// `USER[:GROUP]`, by name or number; root if empty.
    pub user: Option<String>,
    /// `NAME=VALUE` each.
    pub env: Option<Vec<String>>,
    /// The program and its first arguments.
    pub entrypoint: Option<Vec<String>>,
    /// More arguments, or the program where there is no entrypoint.
    pub cmd: Option<Vec<String>>,
    /// Where the program starts.
    pub working_dir: Option<String>,
    /// The signal that asks the program to end, such as `SIGINT`.
    pub stop_signal: Option<String>,
}

impl ImageConfig {
    /// Parses a configuration. An image without one (`{}`) runs nothing by itself.
    ///
    /// # Errors
    /// [`RunError::Config`] for anything that is not JSON of the right types, and for values that no process can have.
    pub fn parse(target: &TargetName, digest: &Digest, bytes: &[u8]) -> Result<Self, RunError> {
        #[derive(Deserialize)]
        struct Document {
            #[serde(default)]
            config: Option<ImageConfig>,
        }
        let bad = |why: String| RunError::Config { target: target.to_string(), digest: *digest, why };
        let document: Document = serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
        let config = document.config.unwrap_or_default();
        let words = [&config.env, &config.entrypoint, &config.cmd].into_iter().flatten().flatten();
        if let Some(word) = words.chain(&config.working_dir).find(|word| word.contains('\0')) {
            return Err(bad(format!("a NUL byte in {word:?}")));
        }
        if let Some(bad_entry) = config
            .env
            .iter()
            .flatten()
            .find(|entry| entry.split_once('=').is_none_or(|(name, _)| name.is_empty()))
        {
            return Err(bad(format!("{bad_entry:?} in Env is no NAME=VALUE")));
        }
        if let Some(dir) = config.working_dir.as_deref().filter(|dir| !dir.is_empty())
            && (!dir.starts_with('/') || dir.split('/').any(|part| part == ".."))
        {
            return Err(bad(format!("WorkingDir {dir:?} is no absolute path without `..`")));
        }
        if let Some(signal) = config.stop_signal.as_deref()
            && config.stop_signal().is_none()
        {
            return Err(bad(format!("StopSignal {signal:?} is no signal")));
        }
        Ok(config)
    }

    /// The signal that asks the program to end, as systemd names it; SIGTERM if the image states none.
    pub fn stop_signal(&self) -> Option<String> {
        let Some(text) = self.stop_signal.as_deref().filter(|text| !text.is_empty()) else {
            return Some("SIGTERM".into());
        };
        if let Ok(number) = text.parse::<usize>() {
            // Numbers of signals that all architectures of Linux share (signal(7)); real-time ones have names here.
            return match number {
                1..=15 => Some(SIGNALS.get(number - 1)?.to_string()),
                34..=64 => Some(format!("SIGRTMIN+{}", number - 34)),
                _ => None,
            };
        }
        let name = if text.starts_with("SIG") { text.to_string() } else { format!("SIG{text}") };
        let real_time = |name: &str| {
            let offset = name.strip_prefix("SIGRTMIN+")?;
            offset.parse::<u8>().ok().filter(|offset| *offset <= 30)
        };
        let known = SIGNALS.contains(&name.as_str()) || MORE_SIGNALS.contains(&name.as_str());
        (known || name == "SIGRTMIN" || real_time(&name).is_some()).then_some(name)
    }

    /// The number of that signal, if it is the same on all architectures.
    pub fn stop_signal_number(&self) -> Option<usize> {
        let name = self.stop_signal()?;
        SIGNALS.iter().position(|known| *known == name).map(|index| index + 1)
    }
}

/// The signals 1 to 15 of all architectures that mosfs runs on.
const SIGNALS: [&str; 15] = [
    "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGUSR1",
    "SIGSEGV", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM",
];
/// Other signals that an image may name.
const MORE_SIGNALS: [&str; 4] = ["SIGWINCH", "SIGPWR", "SIGCONT", "SIGURG"];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ImageConfig, String> {
        let name = "web".parse().unwrap();
        ImageConfig::parse(&name, &Digest::of(b"x"), json.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_tools_write_is_read() {
        let config = parse(
            r#"{"architecture":"amd64","os":"linux","config":{"User":"www:33","Env":["PATH=/bin","A=b c=d"],
            "Entrypoint":["/bin/sh","-c"],"Cmd":["echo hi"],"WorkingDir":"/srv","Labels":{"a":"b"},"StopSignal":"SIGINT"}}"#,
        )
        .unwrap();
        assert_eq!(config.user.as_deref(), Some("www:33"));
        assert_eq!(config.entrypoint.as_deref(), Some(&["/bin/sh".to_string(), "-c".into()][..]));
        assert_eq!(config.stop_signal().as_deref(), Some("SIGINT"));
        assert_eq!(parse("{}").unwrap(), ImageConfig::default());
        assert_eq!(parse(r#"{"config":null}"#).unwrap(), ImageConfig::default());
        assert_eq!(parse(r#"{"config":{"Env":null,"Cmd":null}}"#).unwrap(), ImageConfig::default());
    }

    #[test]
    fn signals_have_the_names_of_systemd() {
        for (text, name) in [
            ("", "SIGTERM"),
            ("15", "SIGTERM"),
            ("QUIT", "SIGQUIT"),
            ("SIGRTMIN+3", "SIGRTMIN+3"),
            ("37", "SIGRTMIN+3"),
            ("SIGWINCH", "SIGWINCH"),
        ] {
            let config = ImageConfig { stop_signal: Some(text.into()), ..ImageConfig::default() };
            assert_eq!(config.stop_signal().as_deref(), Some(name), "{text}");
        }
    }

    #[test]
    fn what_no_process_can_have_is_refused() {
        for (json, why) in [
            ("[", "EOF"),
            (r#"{"config":{"Cmd":"sh"}}"#, "invalid type"),
            (r#"{"config":{"Cmd":["a\u0000b"]}}"#, "NUL byte"),
            (r#"{"config":{"Env":["=x"]}}"#, "NAME=VALUE"),
            (r#"{"config":{"Env":["x"]}}"#, "NAME=VALUE"),
            (r#"{"config":{"WorkingDir":"srv"}}"#, "WorkingDir"),
            (r#"{"config":{"WorkingDir":"/a/../../etc"}}"#, "WorkingDir"),
            (r#"{"config":{"StopSignal":"SIGNOPE"}}"#, "StopSignal"),
            (r#"{"config":{"StopSignal":"99"}}"#, "StopSignal"),
        ] {
            let said = parse(json).unwrap_err();
            assert!(said.contains(why) && said.contains("target web"), "{json}: {said}");
        }
    }
}
