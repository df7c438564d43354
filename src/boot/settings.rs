//! What CONFIG says about booting.
//!
//! ```text
//! CONFIG/overlay       scratch, tmpfs or ro: the least strict place for writes to the root   default tmpfs
//! CONFIG/root-target   names of targets that may be the root beside the hostfs, one a line;
//!                      the first one is the root unless the command line names another
//! CONFIG/on-failure    reboot, halt or shell: what follows a boot that fails                 default reboot
//! CONFIG/watchdog      seconds that the watchdog leaves the system to take it over           default none
//! ```
//!
//! CONFIG lies in the initramfs, which whoever signs the kernel vouches for. What is not there has its
//! default; what makes no sense is an error, never a default.

use std::path::{Path, PathBuf};

use super::cmdline::Overlay;
use crate::error::{Class, Classified, IoError};
use crate::manifest::system::Target;
use crate::manifest::{ServiceType, SystemManifest, TargetName};
use crate::sys::file::{self, Links};

/// The file that names the overlay.
pub const OVERLAY_FILE: &str = "overlay";
/// The file that names targets which may be the root.
pub const ROOT_TARGET_FILE: &str = "root-target";
/// The file that says what follows a failed boot.
pub const ON_FAILURE_FILE: &str = "on-failure";
/// The file that says how long the watchdog waits for the system.
pub const WATCHDOG_FILE: &str = "watchdog";

/// The times that the watchdog may wait, in seconds: the longest is what Intel's has.
const WATCHDOG_SECONDS: std::ops::RangeInclusive<u32> = 10..=613;

/// No such file is longer, in bytes.
const MAX_BYTES: u64 = 16 << 10;

/// What follows a boot that fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// The machine restarts after a pause.
    #[default]
    Reboot,
    /// The machine stops.
    Halt,
    /// The console gets the root shell of the initramfs.
    Shell,
}

impl OnFailure {
    const NAMES: [(&'static str, OnFailure); 3] =
        [("reboot", Self::Reboot), ("halt", Self::Halt), ("shell", Self::Shell)];
}

/// What CONFIG says about booting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The least strict overlay.
    pub overlay: Overlay,
    /// Targets that may be the root beside the hostfs; the first one is the default.
    pub root_targets: Vec<TargetName>,
    /// What follows a boot that fails.
    pub on_failure: OnFailure,
    /// Whether a watchdog is started, and the seconds after which it restarts a machine whose system has not taken it
    /// over. Only the init of a kernel image of `mosfs build` starts one.
    pub watchdog: Option<u32>,
}

/// Why CONFIG's word on booting cannot be used, or is not kept.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A word that is none of those that there are.
    #[error("{}: `{found}` is not allowed here; expected {expected}", path.display())]
    BadWord {
        /// The file.
        path: PathBuf,
        /// What it says, shortened.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// A machine that halts feeds no watchdog.
    #[error(
        "{}: the watchdog would restart a machine that halts, as CONFIG/{ON_FAILURE_FILE} asks for", path.display()
    )]
    HaltAndWatchdog {
        /// The file.
        path: PathBuf,
    },
    /// The command line asks for less than the trusted configuration demands.
    #[error(
        "kernel command line: mosfs.overlay={asked}: the product's configuration allows nothing less strict than {allowed}"
    )]
    LaxOverlay {
        /// What the command line asks for.
        asked: &'static str,
        /// What CONFIG/overlay says, or the default.
        allowed: &'static str,
    },
    /// The system has no such target.
    #[error("the system has no target {wanted}, found {found}")]
    NoTarget {
        /// The name, or `of service type hostfs`.
        wanted: String,
        /// The names that it has.
        found: String,
    },
    /// A target that was never meant to be a root.
    #[error(
        "target {target} cannot be the root: its service type is {found}, expected hostfs, or a target that CONFIG/{ROOT_TARGET_FILE} names"
    )]
    NotARoot {
        /// The target.
        target: String,
        /// Its service type.
        found: &'static str,
    },
    /// A file that cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl Classified for SettingsError {
    fn class(&self) -> Class {
        match self {
            Self::Io(error) => error.class(),
            _ => Class::Input,
        }
    }
}

impl Settings {
    /// Reads them.
    pub fn load(config: &Path) -> Result<Self, SettingsError> {
        let overlay = word(config, OVERLAY_FILE, Overlay::parse, "scratch, tmpfs or ro")?;
        let on_failure = word(
            config,
            ON_FAILURE_FILE,
            |text| OnFailure::NAMES.iter().find(|(name, _)| *name == text).map(|(_, word)| *word),
            "reboot, halt or shell",
        )?;
        let watchdog = word(
            config,
            WATCHDOG_FILE,
            |text| text.parse().ok().filter(|seconds| WATCHDOG_SECONDS.contains(seconds)),
            "a number of seconds from 10 to 613",
        )?;
        if watchdog.is_some() && on_failure == Some(OnFailure::Halt) {
            return Err(SettingsError::HaltAndWatchdog { path: config.join(WATCHDOG_FILE) });
        }
        let path = config.join(ROOT_TARGET_FILE);
        let text = read(&path)?.unwrap_or_default();
        let names = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let root_targets = names
            .map(|name| {
                name.parse().map_err(|_| SettingsError::BadWord {
                    path: path.clone(),
                    found: shown(name),
                    expected: "names of targets, one a line",
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            overlay: overlay.unwrap_or(Overlay::Tmpfs),
            root_targets,
            on_failure: on_failure.unwrap_or_default(),
            watchdog,
        })
    }

    /// The overlay: what CONFIG says, or something stricter that the command line asks for.
    pub fn overlay(&self, asked: Option<Overlay>) -> Result<Overlay, SettingsError> {
        match asked {
            // Rule: nothing on the command line can lower security.
            Some(asked) if asked < self.overlay => {
                Err(SettingsError::LaxOverlay { asked: asked.name(), allowed: self.overlay.name() })
            }
            Some(asked) => Ok(asked),
            None => Ok(self.overlay),
        }
    }

    /// The target of a system that is the root; `asked` is what the command line names.
    pub fn root<'a>(
        &self,
        manifest: &'a SystemManifest,
        asked: Option<&str>,
    ) -> Result<(&'a TargetName, &'a Target), SettingsError> {
        let targets = &manifest.targets;
        let asked = asked.or(self.root_targets.first().map(TargetName::as_str));
        let found = match asked {
            Some(name) => targets.iter().find(|(known, _)| known.as_str() == name),
            None => targets.iter().find(|(_, target)| target.service_type == ServiceType::Hostfs),
        };
        let (name, target) = found.ok_or_else(|| SettingsError::NoTarget {
            wanted: asked.unwrap_or("of service type hostfs").to_string(),
            found: targets.keys().map(|name| name.as_str()).collect::<Vec<_>>().join(", "),
        })?;
        // Rule: only a hostfs target, or one that CONFIG names, can be the root. The command line is
        // anybody's, and other images hold tools that no root should have.
        if target.service_type != ServiceType::Hostfs && !self.root_targets.contains(name) {
            let found = target.service_type.as_str();
            return Err(SettingsError::NotARoot { target: name.to_string(), found });
        }
        Ok((name, target))
    }
}

/// The one word of a file, `None` where there is no file.
fn word<T>(
    config: &Path,
    file: &str,
    parse: impl Fn(&str) -> Option<T>,
    expected: &'static str,
) -> Result<Option<T>, SettingsError> {
    let path = config.join(file);
    let Some(text) = read(&path)? else { return Ok(None) };
    match parse(text.trim()) {
        Some(word) => Ok(Some(word)),
        None => Err(SettingsError::BadWord { path, found: shown(text.trim()), expected }),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_debug).collect()
}

fn read(path: &Path) -> Result<Option<String>, IoError> {
    let bytes = file::find_regular(path, Links::Followed, MAX_BYTES)?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::manifest::Network;
    use std::fs;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn load(files: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::load(folder(files).path())
    }

    #[test]
    fn what_is_not_there_has_its_default_and_nonsense_is_an_error() {
        let none = load(&[]).unwrap();
        assert_eq!((none.overlay, none.on_failure), (Overlay::Tmpfs, OnFailure::Reboot));
        assert!(none.root_targets.is_empty());
        assert_eq!(none.watchdog, None);
        assert_eq!(load(&[("watchdog", "90\n")]).unwrap().watchdog, Some(90));
        let all = load(&[("overlay", "ro"), ("root-target", "kiosk\n\nother\n"), ("on-failure", "halt\n")])
            .unwrap();
        assert_eq!((all.overlay, all.on_failure), (Overlay::ReadOnly, OnFailure::Halt));
        assert_eq!(all.root_targets.iter().map(TargetName::as_str).collect::<Vec<_>>(), ["kiosk", "other"]);
        for (file, text) in [
            ("overlay", "rw"),
            ("overlay", ""),
            ("root-target", "../x"),
            ("on-failure", "shell yes"),
            ("watchdog", ""),
            ("watchdog", "off"),
            ("watchdog", "9"),
            ("watchdog", "614"),
            ("watchdog", "-60"),
            ("watchdog", "4294967356"),
        ] {
            let error = load(&[(file, text)]).unwrap_err();
            assert!(matches!(error, SettingsError::BadWord { .. }), "{file}: {text}: {error}");
            assert_eq!(error.class(), Class::Input);
        }
        let error = load(&[("watchdog", "60"), ("on-failure", "halt")]).unwrap_err();
        assert!(matches!(error, SettingsError::HaltAndWatchdog { .. }), "{error}");
        assert_eq!(error.class(), Class::Input);
    }

    #[test]
    fn the_command_line_can_only_be_stricter_than_the_configuration() {
        use Overlay::{ReadOnly, Scratch, Tmpfs};
        let of = |text: &str, asked| load(&[("overlay", text)]).unwrap().overlay(asked);
        assert_eq!(of("tmpfs", None).unwrap(), Tmpfs);
        assert_eq!(of("tmpfs", Some(ReadOnly)).unwrap(), ReadOnly);
        let error = of("tmpfs", Some(Scratch)).unwrap_err();
        assert!(matches!(error, SettingsError::LaxOverlay { asked: "scratch", allowed: "tmpfs" }));
        assert_eq!(error.class(), Class::Input);
        assert_eq!(of("scratch\n", None).unwrap(), Scratch);
        assert_eq!(of("scratch\n", Some(Tmpfs)).unwrap(), Tmpfs);
        assert!(matches!(of("ro", Some(Tmpfs)).unwrap_err(), SettingsError::LaxOverlay { .. }));
    }

    fn manifest(targets: &[(&str, ServiceType)]) -> SystemManifest {
        let target = |service_type| Target {
            digest: Digest::of(b""),
            size: 1,
            version: "1".into(),
            service_type,
            network: Network::None,
            nsgroup: None,
            mounts: None,
            workload: Default::default(),
        };
        SystemManifest {
            version: 1,
            product: uuid::Uuid::nil(),
            targets: targets.iter().map(|(name, kind)| (name.parse().unwrap(), target(*kind))).collect(),
        }
    }

    /// Rule: "Only a hostfs target, or one that CONFIG names, can be the root."
    #[test]
    fn only_a_hostfs_or_what_the_configuration_names_is_a_root() {
        let system = manifest(&[
            ("app", ServiceType::Container),
            ("data", ServiceType::FsOnly),
            ("host", ServiceType::Hostfs),
        ]);
        let root = |files: &[(&str, &str)], asked: Option<&str>| {
            let settings = load(files).unwrap();
            settings.root(&system, asked).map(|(name, _)| name.to_string())
        };
        assert_eq!(root(&[], None).unwrap(), "host");
        assert_eq!(root(&[], Some("host")).unwrap(), "host");
        for asked in ["app", "data"] {
            let error = root(&[], Some(asked)).unwrap_err();
            assert!(matches!(&error, SettingsError::NotARoot { target, .. } if target == asked), "{error}");
            assert_eq!(error.class(), Class::Input);
        }
        assert!(matches!(root(&[], Some("none")).unwrap_err(), SettingsError::NoTarget { .. }));
        let named = [("root-target", "data\n")];
        assert_eq!(root(&named, None).unwrap(), "data");
        assert_eq!(root(&named, Some("host")).unwrap(), "host");
        assert!(matches!(root(&named, Some("app")).unwrap_err(), SettingsError::NotARoot { .. }));
        assert!(matches!(
            root(&[("root-target", "gone")], None).unwrap_err(),
            SettingsError::NoTarget { .. }
        ));
    }
}
