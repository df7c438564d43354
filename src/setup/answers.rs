//! The answers file: what `mosfs setup` would otherwise ask.
//!
//! ```yaml
//! disk: only-empty        # or serial:S, wwn:W, path:/dev/disk/by-path/…
//! wipe: no                # yes: the disk need not be empty
//! ```
//!
//! Every field may be left out. The file is not signed: it can choose a disk, whose content is then lost.

use std::path::Path;
use std::str::FromStr;

use super::disk::Choice;
use super::error::SetupError;
use crate::manifest::tree::{Entry, Value};
use crate::manifest::yaml;
use crate::sys::file::read_named;

/// The answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answers {
    /// Which disk to set up.
    pub disk: Option<Choice>,
    /// Whether it may be erased.
    pub wipe: bool,
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
            _ => return Err(("an unknown field".into(), "disk, wipe")),
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
        let answers = Answers::parse(b"disk: serial:A1\nwipe: yes\n", "answers.yaml").unwrap();
        let expected = Answers { disk: Some(Choice::Serial("A1".into())), wipe: true };
        assert_eq!(answers, expected);
        assert_eq!(Answers::parse(b"wipe: no\n", "a").unwrap(), Answers::default());
    }

    #[test]
    fn every_problem_is_named_with_its_place() {
        let text = b"disk: sda\nwipe: maybe\nwhipe: yes\n";
        let error = Answers::parse(text, "answers.yaml").unwrap_err();
        assert_eq!(error.class(), Class::Input);
        let text = error.to_string();
        for line in [
            "answers.yaml:1:1: disk: found `sda`; allowed: only-empty, serial:S, wwn:W, or path:/dev/…",
            "answers.yaml:2:1: wipe: found `maybe`; allowed: yes or no",
            "answers.yaml:3:1: whipe: found an unknown field; allowed: disk, wipe",
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
