//! The answers file: what `mosfs setup` would otherwise ask.
//!
//! ```yaml
//! disk: only-empty        # or serial:S, wwn:W, path:/dev/disk/by-path/…
//! wipe: no                # yes: the disk need not be empty
//! floor: key              # ask: wait at the console for the medium with the provisioning key; remote: it is elsewhere
//! after: reboot           # or poweroff, or wait for Enter
//! console: ttyS0          # one more console
//! ```
//!
//! Every field may be left out. The last three are for an install medium ([`crate::setup::installer`]); a setup on a host
//! has options for the floor, and does not end the machine. The file is not signed: it can choose a disk, whose content
//! is then lost.

use std::path::Path;
use std::str::FromStr;

use super::disk::Choice;
use super::error::SetupError;
use crate::manifest::tree::{Entry, Value};
use crate::manifest::yaml;
use crate::sys::file::read_named;

/// Where the provisioning key comes from if the TPM has no floor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FloorWay {
    /// From the medium for it, if there is one.
    #[default]
    Key,
    /// The same; if there is none, it is waited for at the console.
    Ask,
    /// The key is elsewhere: the medium carries a nonce there, and its signature back.
    Remote,
}

/// What the machine does after an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// It starts again.
    Reboot,
    /// It is switched off.
    PowerOff,
    /// It starts again when somebody has removed the medium, or pressed Enter.
    Wait,
}

/// The answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answers {
    /// Which disk to set up.
    pub disk: Option<Choice>,
    /// Whether it may be erased.
    pub wipe: bool,
    /// Where the provisioning key comes from.
    pub floor: FloorWay,
    /// What the machine does after an installation; `None` leaves it to the kind of medium.
    pub after: Option<After>,
    /// One more console, such as `ttyS0`.
    pub console: Option<String>,
}

impl Answers {
    /// Reads an answers file.
    ///
    /// # Errors
    /// [`SetupError::Answers`] with all problems; [`SetupError::Io`].
    pub fn load(path: &Path) -> Result<Self, SetupError> {
        let bytes = read_named(path, yaml::MAX_BYTES as u64)?;
        Self::parse(&bytes, &path.display().to_string())
    }

    /// Reads the text of an answers file; `name` is for the errors.
    ///
    /// # Errors
    /// [`SetupError::Answers`] with all problems.
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, SetupError> {
        let (tree, found) = yaml::read(bytes);
        let mut problems: Vec<String> = Vec::new();
        for problem in found {
            problems.push(format!("{name}:{}:{}: {problem}", problem.at.line, problem.at.column));
        }
        let mut answers = Self::default();
        match tree.map(|node| node.value) {
            None => {}
            Some(Value::Map(entries)) => {
                for (number, entry) in entries.iter().enumerate() {
                    let twice = entries[..number].iter().any(|other| other.key == entry.key);
                    let result =
                        if twice { Err(("a duplicate".into(), "once")) } else { answers.take(entry) };
                    if let Err((found, allowed)) = result {
                        let (at, key) = (entry.at, &entry.key);
                        problems.push(format!(
                            "{name}:{}:{}: {key}: found {found}; allowed: {allowed}",
                            at.line, at.column
                        ));
                    }
                }
            }
            Some(_) => {
                problems.push(format!("{name}:1:1: found no mapping; allowed: `disk: …`, and the like"))
            }
        }
        if problems.is_empty() { Ok(answers) } else { Err(SetupError::Answers { problems }) }
    }

    fn take(&mut self, entry: &Entry<'_>) -> Result<(), (String, &'static str)> {
        let text = match &entry.node.value {
            Value::Text(text) | Value::Plain(text) => text.as_ref(),
            _ => return Err(("a list or a mapping".into(), "one word")),
        };
        let wrong = |allowed: &'static str| (format!("`{text}`"), allowed);
        match entry.key.as_ref() {
            "disk" => {
                let allowed = "only-empty, serial:S, wwn:W, or path:/dev/…";
                self.disk = Some(Choice::from_str(text).map_err(|_| wrong(allowed))?);
            }
            "wipe" => {
                self.wipe = match text {
                    "yes" | "true" => true,
                    "no" | "false" => false,
                    _ => return Err(wrong("yes or no")),
                }
            }
            "floor" => {
                self.floor = match text {
                    "key" => FloorWay::Key,
                    "ask" => FloorWay::Ask,
                    "remote" => FloorWay::Remote,
                    _ => return Err(wrong("key, ask or remote")),
                }
            }
            "after" => {
                self.after = Some(match text {
                    "reboot" => After::Reboot,
                    "poweroff" => After::PowerOff,
                    "wait" => After::Wait,
                    _ => return Err(wrong("reboot, poweroff or wait")),
                })
            }
            "console" => {
                let plain = text.bytes().all(|c| c.is_ascii_alphanumeric());
                if text.is_empty() || !plain {
                    return Err(wrong("the name of a terminal, such as ttyS0"));
                }
                self.console = Some(text.to_string());
            }
            _ => return Err(("an unknown field".into(), "disk, wipe, floor, after, console")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Classified};

    #[test]
    fn answers_are_read() {
        let text = b"disk: serial:A1\nwipe: yes\nfloor: ask\nafter: poweroff\nconsole: ttyS1\n";
        let expected = Answers {
            disk: Some(Choice::Serial("A1".into())),
            wipe: true,
            floor: FloorWay::Ask,
            after: Some(After::PowerOff),
            console: Some("ttyS1".into()),
        };
        assert_eq!(Answers::parse(text, "answers.yaml").unwrap(), expected);
        for (word, after) in [("reboot", After::Reboot), ("wait", After::Wait)] {
            let answers = Answers::parse(format!("after: {word}\nfloor: key\n").as_bytes(), "a").unwrap();
            assert_eq!(answers, Answers { after: Some(after), ..Answers::default() });
        }
        assert_eq!(Answers::parse(b"wipe: no\n", "a").unwrap(), Answers::default());
        assert_eq!(Answers::parse(b"floor: remote\n", "a").unwrap().floor, FloorWay::Remote);
    }

    #[test]
    fn every_problem_is_named_with_its_place() {
        let text = b"disk: sda\nwipe: maybe\nwhipe: yes\nfloor: file\nafter: halt\nconsole: ../sda\n";
        let error = Answers::parse(text, "answers.yaml").unwrap_err();
        assert_eq!(error.class(), Class::Input);
        let text = error.to_string();
        for line in [
            "answers.yaml:1:1: disk: found `sda`; allowed: only-empty, serial:S, wwn:W, or path:/dev/…",
            "answers.yaml:2:1: wipe: found `maybe`; allowed: yes or no",
            "answers.yaml:3:1: whipe: found an unknown field; allowed: disk, wipe, floor, after, console",
            "answers.yaml:4:1: floor: found `file`; allowed: key, ask or remote",
            "answers.yaml:5:1: after: found `halt`; allowed: reboot, poweroff or wait",
            "answers.yaml:6:1: console: found `../sda`; allowed: the name of a terminal, such as ttyS0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n---\n{text}");
        }
        let error = Answers::parse(b"disk: [a]\n", "a").unwrap_err().to_string();
        assert_eq!(error, "a:1:1: disk: found a list or a mapping; allowed: one word");
        let error = Answers::parse(b"wipe: no\nwipe: yes\n", "a").unwrap_err().to_string();
        assert!(error.starts_with("a:2:1: "), "{error}");
        assert!(Answers::parse(b"- a\n", "a").unwrap_err().to_string().contains("found no mapping"));
        assert!(Answers::parse(b"a: &x 1\n", "a").is_err());
        assert!(Answers::parse(&[0xff], "a").is_err());
    }
}
