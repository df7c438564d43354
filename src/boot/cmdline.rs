//! What the kernel command line may say to `mosfs boot`. Pure: text in, options out.
//!
//! ```text
//! root=mosfs[:TARGET]                       boot mosfs; which target is the root (default: the hostfs)
//! mosfs.system=LABEL=…|UUID=…|/dev/…        the system partition (default LABEL=mosfs)
//! mosfs.backend=auto|dm-verity|fuse         who serves the root
//! mosfs.overlay=tmpfs|scratch|ro            where writes to the root go
//! ```
//!
//! Everything else is ignored. **Nothing here can lower security**: there is no word for skipping
//! a check, both backends verify every block, the partition is never trusted, and an overlay less
//! strict than the one that the trusted configuration names is refused ([`Overlay`]).

use crate::manifest::rules;
use crate::mount::Backend;

/// Where the writes to the root file system go, from the least strict to the strictest.
///
/// Rule: the upper layer of `scratch` lies on the system partition, in which nothing is trusted; it
/// can replace every verified file. So it is used only where the trusted configuration
/// (`CONFIG/overlay`, inside the initramfs) says `scratch`; the command line may only be stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Overlay {
    /// A folder on the system partition: kept, and trusted by nobody.
    Scratch,
    /// Memory: gone at the next boot.
    Tmpfs,
    /// Nowhere: the root is read-only.
    ReadOnly,
}

impl Overlay {
    const NAMES: [(&'static str, Overlay); 3] =
        [("scratch", Overlay::Scratch), ("tmpfs", Overlay::Tmpfs), ("ro", Overlay::ReadOnly)];

    /// Its name on the command line and in `CONFIG/overlay`.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, overlay)| *overlay == self).map_or("", |(name, _)| name)
    }

    /// The overlay of that name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, overlay)| *overlay)
    }
}

/// How the system partition is specified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Partition {
    /// By the label of its file system.
    Label(String),
    /// By the UUID of its file system, in lower case.
    Uuid(String),
    /// By its device node.
    Device(String),
}

impl std::fmt::Display for Partition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Label(label) => write!(f, "LABEL={label}"),
            Self::Uuid(uuid) => write!(f, "UUID={uuid}"),
            Self::Device(path) => f.write_str(path),
        }
    }
}

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootOptions {
    /// The target that is to be the root; `None`: the one of service type hostfs.
    pub target: Option<String>,
    /// The system partition.
    pub partition: Partition,
    /// Who serves the root.
    pub backend: Backend,
    /// Where writes go; `None`: what the trusted configuration says.
    pub overlay: Option<Overlay>,
}

impl Default for BootOptions {
    fn default() -> Self {
        Self {
            target: None,
            partition: Partition::Label("mosfs".into()),
            backend: Backend::Auto,
            overlay: None,
        }
    }
}

/// A word of the command line that is ours but makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel command line: {key}={found}: expected {expected}")]
pub struct CmdlineError {
    /// The word's key.
    pub key: &'static str,
    /// Its value.
    pub found: String,
    /// What is allowed.
    pub expected: &'static str,
}

/// Longest value that is repeated in an error, in characters.
const SHOWN: usize = 100;

/// Reads a kernel command line; `None` where `root=` does not name mosfs.
///
/// Where a key comes twice the last one counts, as for the kernel. Words end at white space outside
/// double quotes.
///
/// # Errors
/// A value of ours that is not one of those allowed.
pub fn parse(line: &str) -> Result<Option<BootOptions>, CmdlineError> {
    let mut options = BootOptions::default();
    let mut is_ours = false;
    for word in words(line) {
        let Some((key, value)) = word.split_once('=') else { continue };
        let wrong =
            |key, expected| CmdlineError { key, found: value.chars().take(SHOWN).collect(), expected };
        match key {
            "root" => match value.strip_prefix("mosfs") {
                Some("") => (is_ours, options.target) = (true, None),
                Some(rest) if rest.starts_with(':') => {
                    let name = &rest[1..];
                    if rules::name(name).is_err() {
                        return Err(wrong("root", "mosfs or mosfs:TARGET"));
                    }
                    (is_ours, options.target) = (true, Some(name.to_string()));
                }
                _ => is_ours = false,
            },
            "mosfs.system" => {
                options.partition = partition(value)
                    .ok_or_else(|| wrong("mosfs.system", "LABEL=…, UUID=… or a path below /dev/"))?;
            }
            "mosfs.backend" => {
                options.backend =
                    value.parse().map_err(|_| wrong("mosfs.backend", "auto, dm-verity or fuse"))?;
            }
            "mosfs.overlay" => {
                options.overlay = Some(
                    Overlay::parse(value).ok_or_else(|| wrong("mosfs.overlay", "tmpfs, scratch or ro"))?,
                );
            }
            _ => {}
        }
    }
    Ok(is_ours.then_some(options))
}

fn partition(value: &str) -> Option<Partition> {
    let plain = |text: &str| !text.is_empty() && text.len() <= 255 && !text.contains('/');
    if let Some(label) = value.strip_prefix("LABEL=") {
        return plain(label).then(|| Partition::Label(label.to_string()));
    }
    if let Some(uuid) = value.strip_prefix("UUID=") {
        let uuid = uuid.to_ascii_lowercase();
        let fits = uuid.len() <= 36 && uuid.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
        return (fits && !uuid.is_empty()).then_some(Partition::Uuid(uuid));
    }
    let below = value.strip_prefix("/dev/")?;
    let sound = below.split('/').all(|part| !matches!(part, "" | "." | ".."));
    sound.then(|| Partition::Device(value.to_string()))
}

/// The words of a line, without the quotes that keep white space in them (kernel: `next_arg`).
fn words(line: &str) -> impl Iterator<Item = String> + '_ {
    let mut chars = line.chars().peekable();
    std::iter::from_fn(move || {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        chars.peek()?;
        let (mut word, mut quoted) = (String::new(), false);
        while let Some(c) = chars.next_if(|c| quoted || !c.is_whitespace()) {
            if c == '"' { quoted = !quoted } else { word.push(c) }
        }
        Some(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ours(line: &str) -> BootOptions {
        parse(line).unwrap().expect("root=mosfs")
    }

    #[test]
    fn another_root_is_not_ours() {
        for line in [
            "",
            "quiet splash",
            "root=/dev/sda1 mosfs.backend=fuse",
            "root=mosfsx",
            "root=mosfs root=LABEL=x",
        ] {
            assert_eq!(parse(line), Ok(None), "{line}");
        }
    }

    #[test]
    fn the_words_are_read() {
        assert_eq!(ours("root=mosfs"), BootOptions::default());
        assert_eq!(ours("ro root=mosfs:other-fs quiet").target.as_deref(), Some("other-fs"));
        let all = ours("root=mosfs mosfs.system=UUID=DE6C82C5-2e01 mosfs.backend=fuse mosfs.overlay=ro\n");
        assert_eq!(all.partition, Partition::Uuid("de6c82c5-2e01".into()));
        assert_eq!(all.backend, Backend::Fuse);
        assert_eq!(all.overlay, Some(Overlay::ReadOnly));
        let line = "root=mosfs mosfs.system=\"LABEL=my disk\"";
        assert_eq!(ours(line).partition, Partition::Label("my disk".into()));
        let line = "root=mosfs mosfs.system=/dev/disk/by-id/x";
        assert_eq!(ours(line).partition, Partition::Device("/dev/disk/by-id/x".into()));
    }

    #[test]
    fn the_last_of_two_counts() {
        assert_eq!(
            ours("root=mosfs mosfs.overlay=scratch mosfs.overlay=ro").overlay,
            Some(Overlay::ReadOnly)
        );
        assert_eq!(ours("root=mosfs:a root=mosfs").target, None);
    }

    #[test]
    fn values_that_make_no_sense_are_errors() {
        for (line, key) in [
            ("root=mosfs:../x", "root"),
            ("root=mosfs:", "root"),
            ("root=mosfs mosfs.system=/etc/passwd", "mosfs.system"),
            ("root=mosfs mosfs.system=/dev/../etc/passwd", "mosfs.system"),
            ("root=mosfs mosfs.system=LABEL=../x", "mosfs.system"),
            ("root=mosfs mosfs.system=UUID=../x", "mosfs.system"),
            ("root=mosfs mosfs.backend=none", "mosfs.backend"),
            ("root=mosfs mosfs.overlay=rw", "mosfs.overlay"),
        ] {
            assert_eq!(parse(line).unwrap_err().key, key, "{line}");
        }
    }

    /// Rule (docs/design.md, kernel command line): nothing on it can turn a check off.
    #[test]
    fn words_that_ask_to_skip_checks_change_nothing() {
        let asks = "root=mosfs mosfs.verify=0 mosfs.floor=none mosfs.floor=file mosfs.unsafe mosfs.unsafe-no-verity \
                    mosfs.config=/tmp mosfs.tpm=swtpm: mosfs.product=x mosfs.ca=/tmp/ca systemd.verity=0 mosfs.root-hash=00";
        assert_eq!(ours(asks), BootOptions::default());
    }

    #[test]
    fn stricter_compares_greater() {
        assert!(Overlay::Scratch < Overlay::Tmpfs && Overlay::Tmpfs < Overlay::ReadOnly);
        for (name, overlay) in Overlay::NAMES {
            assert_eq!(Overlay::parse(name), Some(overlay));
            assert_eq!(overlay.name(), name);
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in "(root=mosfs[:a-z]{0,5} )?(mosfs\\.(system|backend|overlay)=\\PC{0,20} ?){0,4}\\PC{0,40}") {
            let _ = parse(&line);
        }
    }
}
