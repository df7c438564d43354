//! `mosfs mount FILE`: what the command line says of an image in a plain file.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::digest::Digest;
use crate::error::{AnyError, Class, Classified, IoContext};
use crate::image::overlay::Shown;
use crate::image::plain::{Check, PlainFile, TreePlace};
use crate::manifest::TargetName;
use crate::transport::SourceRef;

/// Where the image and its hash tree are.
#[derive(Debug, Default, PartialEq, Eq, Args)]
pub(super) struct FileArgs {
    /// Plain file: the image begins at this byte of FILE.
    #[arg(long, value_name = "BYTES")]
    pub(super) offset: Option<u64>,
    /// Plain file: the hash tree is in this file [default: behind the image].
    #[arg(long, value_name = "FILE")]
    pub(super) hash_file: Option<PathBuf>,
    /// Plain file: the hash tree's superblock begins at this byte of FILE, or of --hash-file.
    #[arg(long, value_name = "BYTES")]
    pub(super) hash_offset: Option<u64>,
}

/// What is asked to be mounted.
#[derive(Debug, Clone, Copy)]
pub(super) enum MountSource<'a> {
    /// A target of the current deployment.
    Target(&'a str),
    /// An image of an OCI layout.
    Image(&'a str),
    /// An image of a registry.
    Registry(&'a str),
    /// An image in a plain file.
    File(&'a Path),
}

/// Whether there is a file that may hold an image.
fn is_file(path: impl AsRef<Path>) -> bool {
    let kind = std::fs::metadata(path).map(|found| found.file_type());
    kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device())
}

/// The error of a target that cannot be mounted, where a file has its name.
pub(super) fn target_or_file(name: &str, error: AnyError) -> AnyError {
    match is_file(name) {
        true => FileArgsError::Target { why: error.chain(), class: error.class() }.into(),
        false => error,
    }
}

impl FileArgs {
    fn is_given(&self) -> bool {
        self.offset.is_some() || self.hash_file.is_some() || self.hash_offset.is_some()
    }

    /// What `source` means. A path with a `/` is a file, unless a scheme stands before it, and so is what cannot be a
    /// target's name. Another bare name is a target; it is a file where a file has that name and the options say how to
    /// verify one, which nobody needs to say of a target.
    pub(super) fn asked<'a>(&self, source: &'a OsStr, says_how_to_verify: bool) -> MountSource<'a> {
        let bytes = source.as_bytes();
        let file = MountSource::File(Path::new(source));
        let Some(text) = source.to_str() else { return file };
        if [&b"/"[..], b"./", b"../"].iter().any(|begin| bytes.starts_with(begin)) {
            return file;
        }
        // A source has a scheme; a target's name cannot hold a colon.
        if text.contains(':') {
            let is_registry = text.parse().is_ok_and(|source: SourceRef| source.is_registry());
            return if is_registry { MountSource::Registry(text) } else { MountSource::Image(text) };
        }
        let is_name = text.parse::<TargetName>().is_ok();
        if !is_name || self.is_given() || says_how_to_verify && is_file(source) {
            return file;
        }
        MountSource::Target(text)
    }

    /// The file to mount.
    ///
    /// # Errors
    /// [`FileArgsError`].
    pub(super) fn file(
        &self,
        path: &Path,
        root_hashes: &[Digest],
        unsafe_no_verity: bool,
    ) -> Result<PlainFile, AnyError> {
        let tree = match (&self.hash_file, self.hash_offset) {
            (Some(file), offset) => TreePlace::File { path: file.clone(), offset: offset.unwrap_or(0) },
            (None, Some(offset)) => TreePlace::At(offset),
            (None, None) => TreePlace::Appended,
        };
        let check = match root_hashes {
            // Rule (docs/design.md, unverified mounts): only `--unsafe-no-verity` makes one.
            [] if unsafe_no_verity && tree == TreePlace::Appended => Check::UnsafeNoVerity,
            [] if !unsafe_no_verity => {
                // Of a file that is not there, that is what to say.
                std::fs::metadata(path).on("open", path)?;
                return Err(FileArgsError::NoRootHash { path: path.to_path_buf() }.into());
            }
            [root_hash] if !unsafe_no_verity => Check::RootHash { root_hash: *root_hash, tree },
            [_] | [] => return Err(FileArgsError::Both.into()),
            several => return Err(FileArgsError::RootHashes { found: several.len() }.into()),
        };
        Ok(PlainFile { path: path.to_path_buf(), offset: self.offset.unwrap_or(0), check })
    }

    /// Refuses these options for what is not a plain file.
    ///
    /// # Errors
    /// [`FileArgsError::NotAFile`] with the first one that was given.
    pub(super) fn refuse(&self, shown: &FileOptions) -> Result<(), AnyError> {
        let given = [
            ("--offset", self.offset.is_some()),
            ("--hash-file", self.hash_file.is_some()),
            ("--hash-offset", self.hash_offset.is_some()),
            ("-o subdir", !shown.shown.subdir.as_os_str().is_empty()),
            ("-o uid", shown.shown.uid.is_some()),
            ("-o gid", shown.shown.gid.is_some()),
            ("-o timeout", shown.idle.is_some()),
        ];
        match given.iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) => Err(FileArgsError::NotAFile { option }.into()),
            None => Ok(()),
        }
    }

    /// The same options for another process, with absolute paths.
    pub(super) fn to_arguments(&self) -> io::Result<Vec<OsString>> {
        let mut all = Vec::new();
        for (name, value) in [("--offset", self.offset), ("--hash-offset", self.hash_offset)] {
            all.extend(value.map(|value| format!("{name}={value}").into()));
        }
        if let Some(file) = &self.hash_file {
            let mut option = OsString::from("--hash-file=");
            option.push(std::path::absolute(file)?);
            all.push(option);
        }
        Ok(all)
    }
}

/// The options of `-o` that a plain file has.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct FileOptions {
    /// How the image is shown.
    pub(super) shown: Shown,
    /// Unmount after so long without a request and without an open file.
    pub(super) idle: Option<Duration>,
}

impl FileOptions {
    /// Takes over an option of `-o`. Returns false where it is none of these.
    ///
    /// # Errors
    /// [`FileArgsError::Value`].
    pub(super) fn take(&mut self, option: &str) -> Result<bool, AnyError> {
        let Some((name, value)) = option.split_once('=') else { return Ok(false) };
        let number = |expected| {
            value.parse::<u32>().map_err(|_| FileArgsError::Value { option: option.to_string(), expected })
        };
        match name {
            "uid" => self.shown.uid = Some(number("a user id")?),
            "gid" => self.shown.gid = Some(number("a group id")?),
            "subdir" => self.shown.subdir = value.into(),
            "timeout" => {
                let seconds = number("a number of seconds")?;
                self.idle = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Refuses what a writable mount cannot do.
    ///
    /// # Errors
    /// [`FileArgsError::IdleWritable`].
    pub(super) fn check_with_upper(&self, is_writable: bool) -> Result<(), AnyError> {
        match self.idle {
            Some(_) if is_writable => Err(FileArgsError::IdleWritable.into()),
            _ => Ok(()),
        }
    }

    /// The same options for another process.
    pub(super) fn to_arguments(&self) -> Vec<OsString> {
        let mut all = Vec::new();
        let Shown { subdir, uid, gid } = &self.shown;
        all.extend(uid.map(|uid| format!("-ouid={uid}").into()));
        all.extend(gid.map(|gid| format!("-ogid={gid}").into()));
        all.extend(self.idle.map(|idle| format!("-otimeout={}", idle.as_secs()).into()));
        if !subdir.as_os_str().is_empty() {
            let mut option = OsString::from("-osubdir=");
            option.push(subdir);
            all.push(option);
        }
        all
    }
}

/// What is wrong with the options of a plain file.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileArgsError {
    /// Nothing could be verified.
    #[error("{}: no root hash was given: it cannot be verified", path.display())]
    NoRootHash {
        /// The file.
        path: PathBuf,
    },
    /// A bare name is that of a target, and there is a file with it.
    #[error("{why}")]
    Target {
        /// Why the target cannot be mounted.
        why: String,
        /// Its class.
        class: Class,
    },
    /// Verification was asked for, and none.
    #[error("--unsafe-no-verity excludes --root-hash, --hash-file and --hash-offset")]
    Both,
    /// A plain file has one root hash.
    #[error("expected one --root-hash for a plain file, found {found}")]
    RootHashes {
        /// How many were given.
        found: usize,
    },
    /// An option of plain files for something else.
    #[error("{option} is for a plain file, found a target or an OCI image")]
    NotAFile {
        /// The option.
        option: &'static str,
    },
    /// The daemon of a writable mount does not see who uses it.
    #[error("-o timeout excludes a writable mount")]
    IdleWritable,
    /// An option has a value that makes no sense.
    #[error("mount option `{option}`: expected {expected}")]
    Value {
        /// The option.
        option: String,
        /// What its value should be.
        expected: &'static str,
    },
}

impl Classified for FileArgsError {
    fn class(&self) -> Class {
        match self {
            Self::NoRootHash { .. } => Class::Verification,
            Self::Target { class, .. } => *class,
            _ => Class::Input,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_a_target_unless_the_options_are_those_of_a_file() {
        let none = FileArgs::default();
        let is_file = |args: &FileArgs, source: &str, verify| {
            matches!(args.asked(OsStr::new(source), verify), MountSource::File(_))
        };
        for file in ["/a", "./a", "../a", "a/b", "/a:b", "./oci:x"] {
            assert!(is_file(&none, file, false), "{file}");
        }
        // `rustfmt.toml` is a file of the folder that tests run in.
        assert!(is_file(&none, "rustfmt.toml", true) && !is_file(&none, "rustfmt.toml", false));
        assert!(!is_file(&none, "src", true) && !is_file(&none, "hostfs", true));
        for no_name in ["App.AppImage", "app_x86_64.sqfs2 ", "an image", ".", "-"] {
            assert!(is_file(&none, no_name, false), "{no_name}");
        }
        assert!(is_file(&FileArgs { offset: Some(1), ..FileArgs::default() }, "hostfs", false));
        assert!(matches!(none.asked(OsStr::new("oci:/a:b"), true), MountSource::Image("oci:/a:b")));
        let registry = "docker://registry.example/a:b";
        assert!(
            matches!(none.asked(OsStr::new(registry), true), MountSource::Registry(found) if found == registry)
        );
        assert!(is_file(&none, "a/b", true));
        assert!(matches!(none.asked(OsStr::from_bytes(b"\xff"), false), MountSource::File(_)));
    }

    #[test]
    fn nothing_is_mounted_unverified_by_default() {
        // A file of the folder that tests run in.
        let (args, path, hash) = (FileArgs::default(), Path::new("Cargo.toml"), Digest::of(b"x"));
        let code = |args: &FileArgs, hashes: &[Digest], no_verity| {
            args.file(path, hashes, no_verity).map_err(|error| error.class())
        };
        assert_eq!(code(&args, &[], false).unwrap_err(), Class::Verification);
        let missing = args.file(Path::new("/nowhere/x"), &[], false).unwrap_err();
        assert!(missing.to_string().starts_with("cannot open /nowhere/x: "), "{missing}");
        assert_eq!(code(&args, &[], true).unwrap().check, Check::UnsafeNoVerity);
        assert!(matches!(code(&args, &[hash], false).unwrap().check, Check::RootHash { .. }));
        assert_eq!(code(&args, &[hash], true).unwrap_err(), Class::Input);
        assert_eq!(code(&args, &[hash, hash], false).unwrap_err(), Class::Input);
        let tree = FileArgs { hash_offset: Some(4096), ..FileArgs::default() };
        assert_eq!(code(&tree, &[], true).unwrap_err(), Class::Input);
    }

    #[test]
    fn options_of_a_file_are_taken_and_go_to_another_process_unchanged() {
        let mut options = FileOptions::default();
        for option in ["uid=1000", "gid=4294967294", "subdir=usr/share", "timeout=5"] {
            assert!(options.take(option).unwrap(), "{option}");
        }
        for other in ["ro", "fsname=x", "uid"] {
            assert!(!options.take(other).unwrap(), "{other}");
        }
        for wrong in ["uid=-1", "gid=x", "timeout=", "uid=4294967296"] {
            assert_eq!(options.take(wrong).unwrap_err().class(), Class::Input, "{wrong}");
        }
        let mut again = FileOptions::default();
        for argument in options.to_arguments() {
            assert!(again.take(argument.to_str().unwrap().strip_prefix("-o").unwrap()).unwrap());
        }
        assert_eq!(again, options);
    }
}
