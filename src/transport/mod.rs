//! Where images come from: one file per kind of source, one row each in [`SCHEMES`].
//!
//! A transport finds a name and hands out bytes. Manifests are checked against digest and size
//! before anyone sees them; a blob is a stream whose digest the store checks while it copies.

pub mod access;
pub mod ocidir;
pub mod parallel;
pub mod reference;
#[cfg(feature = "registry")]
pub mod registry;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use crate::digest::Digest;
use crate::error::{Class, Classified, IoError};
use crate::image::ahead;
use crate::image::blobs::Blobs;
use crate::image::index::Index;
use crate::image::oci::{Descriptor, Manifest, OciError, OciImage, Platform};
use crate::sorting;

pub use access::Access;
pub use ocidir::OciDir;

/// How deep indexes may nest: `index.json`, an index of platforms, and one to spare.
const MAX_INDEX_DEPTH: usize = 4;

/// How many entries without a name are looked at to find the only image.
const MAX_UNNAMED: usize = 256;

/// A place that images are fetched from.
pub trait Transport: Send + Sync {
    /// The place as a user writes it, for messages.
    fn location(&self) -> String;

    /// All manifests and indexes that the place lists, named or not.
    fn entries(&self) -> Result<Vec<Descriptor>, TransportError>;

    /// The descriptors of a name. More than one where they are for different platforms.
    ///
    /// # Errors
    /// [`TransportError::NameMissing`] with the names that there are.
    fn lookup(&self, name: &str) -> Result<Vec<Descriptor>, TransportError>;

    /// A whole blob that fits in memory, checked against digest and size.
    ///
    /// # Errors
    /// [`TransportError::TooBig`] before anything is read where the size is above `max_bytes`;
    /// [`TransportError::DigestMismatch`] or [`TransportError::SizeMismatch`].
    fn fetch(&self, blob: &Descriptor, max_bytes: u64) -> Result<Vec<u8>, TransportError>;

    /// A blob, from byte `offset` on. Nothing is checked: the reader hashes what it gets.
    fn open(&self, blob: &Descriptor, offset: u64) -> Result<Blob, TransportError>;

    /// Fills `buffer` with the bytes of a blob at `offset`, by one request to each server that may have it. Nothing
    /// is checked, and nothing is tried again: the reader verifies what comes, and knows how long it can wait.
    ///
    /// # Errors
    /// As [`Transport::open`]; [`TransportError::NoRanges`] where the place sends whole blobs only.
    fn read_range(
        &self,
        blob: &Descriptor,
        offset: u64,
        buffer: &mut [u8],
        ask: &RangeAsk,
    ) -> Result<(), TransportError> {
        let _ = ask;
        let read = self.open(blob, offset)?.read_exact(buffer);
        Ok(read.map_err(|source| IoError::new("read", self.location(), source))?)
    }

    /// The manifests whose `subject` is `subject`, all of them or of one artifact type.
    fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, TransportError>;

    /// The tags of a repository: whatever TAG there is in names `REPOSITORY:TAG`, in no order.
    fn tags(&self, repository: &str) -> Result<Vec<String>, TransportError>;

    /// The part of this place that holds the blobs of `REPOSITORY:…`. A registry keeps each
    /// repository's blobs apart; a layout has one heap.
    fn within(&self, repository: &str) -> Result<Box<dyn Transport>, TransportError>;

    /// The manifest or index that a name stands for, if the place can say so without sending it.
    ///
    /// It is the place's word, and good for nothing but saving a transfer.
    fn peek(&self, name: &str) -> Result<Option<Digest>, TransportError> {
        Ok(self.lookup(name)?.first().map(|found| found.digest))
    }

    /// Whether blobs come from another machine, so that what came before a cut is worth keeping.
    fn is_remote(&self) -> bool {
        false
    }

    /// The name that is meant where none is given.
    fn default_name(&self) -> Option<&'static str> {
        None
    }
}

/// How a part of a blob is asked for.
#[derive(Debug, Clone, Copy)]
pub struct RangeAsk {
    /// No answer is waited for after this.
    pub deadline: Instant,
    /// What came before did not verify: ask the servers in the opposite order, the registry itself first.
    pub distrusted: bool,
}

/// A blob that is open for reading.
pub enum Blob {
    /// A file of this machine: its blocks may be shared (reflink) rather than copied.
    File(File),
    /// Bytes that come from elsewhere.
    Stream(Box<dyn Read + Send>),
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Blob::File(file) => file.read(buffer),
            Blob::Stream(stream) => stream.read(buffer),
        }
    }
}

/// What every transport can do with the five things above.
impl dyn Transport + '_ {
    /// The manifest that a name stands for on `platform`.
    ///
    /// Without a name, the place's own default, or the only image there. Nested indexes are followed; of several platforms
    /// the one asked for is taken.
    ///
    /// # Errors
    /// [`TransportError::WrongPlatform`] where there are only others, [`TransportError::NameMissing`].
    pub fn find_image(&self, name: Option<&str>, platform: &Platform) -> Result<Descriptor, TransportError> {
        let name = name.or(self.default_name());
        let found = match name {
            Some(name) => self.lookup(name)?,
            None => self.only_image(platform)?,
        };
        let object = match name {
            Some(name) if name.starts_with('@') => format!("{}{name}", self.location()),
            Some(name) => format!("{}:{name}", self.location()),
            None => self.location(),
        };
        self.choose(&object, found, platform, 0)
    }

    /// The entries of the only image there: of those with names, or, where no image has one, of those without.
    ///
    /// Artifacts that speak of an image, such as its signature, are none.
    fn only_image(&self, platform: &Platform) -> Result<Vec<Descriptor>, TransportError> {
        let images: Vec<_> =
            self.entries()?.into_iter().filter(|one| one.is_image() && one.artifact_type.is_none()).collect();
        let available = names_of(&images);
        let (named, mut unnamed): (Vec<_>, Vec<_>) =
            images.into_iter().partition(|one| one.ref_name().is_some());
        let found = if named.is_empty() {
            if unnamed.len() > 1 && unnamed.len() <= MAX_UNNAMED {
                unnamed.retain(|one| !self.is_artifact(one));
                unnamed.retain(|one| {
                    one.platform.as_ref().is_none_or(|other| platform.accepts(other).is_some())
                });
            }
            unnamed
        } else {
            named
        };
        match found.iter().map(|one| one.digest).collect::<BTreeSet<_>>().len() {
            1 => Ok(found),
            _ => Err(TransportError::NameNeeded { location: self.location(), found: found.len(), available }),
        }
    }

    /// Whether a manifest is that of an artifact. One that cannot be read is no artifact: opening it returns the error.
    fn is_artifact(&self, entry: &Descriptor) -> bool {
        let manifest = || self.manifest(entry).ok();
        entry.is_manifest()
            && manifest()
                .is_some_and(|manifest| manifest.artifact_type.is_some() || manifest.subject.is_some())
    }

    /// Takes the one descriptor for `platform`, and follows it until it is a manifest.
    fn choose(
        &self,
        object: &str,
        found: Vec<Descriptor>,
        platform: &Platform,
        depth: usize,
    ) -> Result<Descriptor, TransportError> {
        let mut best: Option<(usize, Descriptor)> = None;
        let mut others = Vec::new();
        let mut unreadable = None;
        for one in found {
            if !one.is_image() {
                unreadable = unreadable.or(Some(one.media_type));
                continue;
            }
            let rank = match &one.platform {
                // No word about the platform: an image that was stored for one machine.
                None => 0,
                Some(other) => match platform.accepts(other) {
                    Some(rank) => rank,
                    None => {
                        others.push(other.to_string());
                        continue;
                    }
                },
            };
            match &best {
                Some((least, first)) if *least == rank && first.digest != one.digest => {
                    return Err(TransportError::Ambiguous {
                        object: object.into(),
                        digests: [first.digest, one.digest],
                    });
                }
                Some((least, _)) if *least <= rank => {}
                _ => best = Some((rank, one)),
            }
        }
        let Some((_, chosen)) = best else {
            if let (Some(media_type), true) = (unreadable, others.is_empty()) {
                let why = format!(
                    "its media type is `{media_type}`, which is neither an image manifest nor an index"
                );
                return Err(TransportError::UnreadableEntry { object: object.into(), why });
            }
            return Err(TransportError::WrongPlatform {
                object: object.into(),
                expected: platform.to_string(),
                found: if others.is_empty() { "no image at all".into() } else { others.join(", ") },
            });
        };
        if !chosen.is_index() {
            return Ok(chosen);
        }
        if depth >= MAX_INDEX_DEPTH {
            return Err(TransportError::TooDeep { object: object.into(), max: MAX_INDEX_DEPTH });
        }
        let bytes = self.fetch(&chosen, crate::image::oci::MAX_MANIFEST_BYTES)?;
        let index = Index::parse(&bytes, crate::image::oci::MAX_MANIFEST_BYTES).map_err(|source| {
            TransportError::Document { object: format!("{object} ({})", chosen.digest), source }
        })?;
        self.choose(object, index.manifests, platform, depth + 1)
    }

    /// Fetches and reads an image manifest.
    pub fn image(&self, manifest: &Descriptor) -> Result<OciImage, TransportError> {
        // `fetch` has compared its digest.
        self.image_as(manifest, |bytes| OciImage::of(bytes, manifest.digest))
    }

    /// The same for an image that is opened next, from the blobs that this returns: see [`ahead::parse`].
    pub(crate) fn image_to_open(
        &self,
        manifest: &Descriptor,
        blobs: Arc<dyn Blobs>,
    ) -> Result<(OciImage, Arc<dyn Blobs>), TransportError> {
        self.image_as(manifest, |bytes| ahead::parse(bytes, manifest.digest, blobs))
    }

    fn image_as<T>(
        &self,
        manifest: &Descriptor,
        parse: impl FnOnce(&[u8]) -> Result<T, OciError>,
    ) -> Result<T, TransportError> {
        let bytes = self.fetch(manifest, crate::image::oci::MAX_MANIFEST_BYTES)?;
        parse(&bytes).map_err(|source| TransportError::Document {
            object: format!("{}@{}", self.location(), manifest.digest),
            source,
        })
    }

    /// Fetches and reads a manifest, of an image or an artifact.
    pub fn manifest(&self, manifest: &Descriptor) -> Result<Manifest, TransportError> {
        self.image(manifest).map(|image| image.manifest)
    }
}

/// The names of descriptors, sorted, each once.
pub fn names_of(entries: &[Descriptor]) -> Vec<String> {
    let mut names: Vec<_> = entries.iter().filter_map(|one| one.ref_name()).map(str::to_string).collect();
    sorting::sort(&mut names);
    names.dedup();
    names
}

/// A place and a name there, as a user writes them: `oci:DIR[:NAME]`, `oci:DIR@sha256:HEX`, `docker://…`.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use mosfs::{Access, Platform, SourceRef};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let example = Example::publish()?;
/// # let text = format!("oci:{}:web", example.folder.path().join("images").display());
/// // oci:/srv/images:web
/// let source: SourceRef = text.parse()?;
/// let place = source.open(&Access::default())?;
/// let found = place.find_image(source.name.as_deref(), &Platform::this_machine())?;
/// assert_eq!(place.image(&found)?.layers.len(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRef {
    scheme: &'static str,
    /// What stands between scheme and name: a folder.
    pub location: String,
    /// The name, where one is given; `@sha256:HEX` names anything by its digest.
    pub name: Option<String>,
}

/// A place, and a name there.
type NamedLocation = (String, Option<String>);

/// One kind of source.
struct Scheme {
    /// What a reference begins with.
    name: &'static str,
    /// Splits what follows `name:` into place and name; what is wrong with it otherwise.
    split: fn(&str) -> Result<NamedLocation, &'static str>,
}

/// The scheme of OCI layouts.
const OCI: &str = "oci";
/// The scheme of registries.
const DOCKER: &str = "docker";

/// All kinds of source. A new one is one file, one row here and one in [`SourceRef::open`].
///
/// How a place is opened is not in this table: a program that only reads layouts (the start
/// program) must not hold the code of a registry's client because it parses a source.
const SCHEMES: [Scheme; 2] =
    [Scheme { name: OCI, split: ocidir::split }, Scheme { name: DOCKER, split: reference::split }];

/// What skopeo and podman read besides, and mosfs does not.
pub const FOREIGN: [&str; 7] =
    ["oci-archive", "docker-archive", "dir", "docker-daemon", "containers-storage", "ostree", "sif"];

impl SourceRef {
    /// A folder of this machine that holds an OCI layout.
    pub fn oci(dir: &Path, name: Option<&str>) -> Self {
        Self { scheme: OCI, location: dir.to_string_lossy().into_owned(), name: name.map(Into::into) }
    }

    /// Opens the place.
    ///
    /// # Errors
    /// [`TransportError::NotALayout`]; [`TransportError::LeftOut`] for a registry where the program
    /// was built without them.
    pub fn open(&self, access: &Access) -> Result<Box<dyn Transport>, TransportError> {
        match self.scheme {
            OCI => Ok(Box::new(self.layout()?)),
            #[cfg(feature = "registry")]
            DOCKER => Ok(Box::new(registry::Registry::open(&self.location, access)?)),
            scheme => {
                let _ = access;
                Err(TransportError::LeftOut { scheme })
            }
        }
    }

    /// The layout, for what needs files of this machine.
    ///
    /// # Errors
    /// [`TransportError::NotHere`] for all other sources; [`TransportError::NotALayout`].
    pub fn layout(&self) -> Result<OciDir, TransportError> {
        match self.scheme {
            OCI => OciDir::open(Path::new(&self.location)),
            _ => Err(TransportError::NotHere { found: self.to_string() }),
        }
    }

    /// The name that an image of this source gets in a store: `REPOSITORY:TAG`, without the registry's host; of a layout,
    /// the name there.
    pub(crate) fn image_name(&self) -> String {
        let name = self.name.as_deref().unwrap_or("latest");
        if !self.is_registry() {
            return name.to_string();
        }
        let (_, repository) = self.location.split_once('/').unwrap_or(("", &self.location));
        format!("{repository}:{name}")
    }

    /// Whether it is a registry.
    pub fn is_registry(&self) -> bool {
        self.scheme == DOCKER
    }
}

impl FromStr for SourceRef {
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Self, TransportError> {
        let wrong =
            |why| TransportError::BadSource { found: text.chars().take(200).collect::<String>(), why };
        let (scheme, rest) = text
            .split_once(':')
            .ok_or(wrong("there is no scheme; expected oci:DIR[:NAME] or docker://HOST/NAME[:TAG]"))?;
        let row =
            SCHEMES.iter().find(|row| row.name == scheme).ok_or_else(|| match FOREIGN.contains(&scheme) {
                true => TransportError::Foreign { found: text.chars().take(200).collect() },
                false => wrong("the scheme is unknown; expected oci:DIR[:NAME] or docker://HOST/NAME[:TAG]"),
            })?;
        let (location, name) = (row.split)(rest).map_err(wrong)?;
        Ok(Self { scheme: row.name, location, name })
    }
}

impl std::fmt::Display for SourceRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // `oci://DIR` is a way to write `oci:DIR`: a folder with two slashes needs two more.
        let slashes = if self.is_registry() || self.location.starts_with("//") { "//" } else { "" };
        write!(f, "{}:{slashes}{}", self.scheme, self.location)?;
        let mark = |name: &str| match name {
            // A name by digest begins with its own mark.
            _ if name.starts_with('@') => "",
            _ if self.is_registry() && name.contains(':') => "@",
            _ => ":",
        };
        self.name.iter().try_for_each(|name| write!(f, "{}{name}", mark(name)))
    }
}

/// Why something cannot be had from a place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The user's words are not a source.
    #[error("`{found}` is not a source: {why}")]
    BadSource {
        /// What was given.
        found: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A kind of source that this program was built without.
    #[error("this program was built without sources of the kind `{scheme}:`; use an `oci:` folder")]
    LeftOut {
        /// The kind.
        scheme: &'static str,
    },
    /// A kind of source that other tools read.
    #[error(
        "`{found}` is not read as it is: copy it into a layout first, `skopeo copy {found} oci:DIR:NAME`"
    )]
    Foreign {
        /// What was given.
        found: String,
    },
    /// An entry that was asked for, and that mosfs cannot read.
    #[error("{object} cannot be read: {why}")]
    UnreadableEntry {
        /// The place and name.
        object: String,
        /// What is wrong with it.
        why: String,
    },
    /// A place that sends whole blobs only was asked for a part of one.
    #[error("{location} does not send parts of blobs: it answers a Range with {found}")]
    NoRanges {
        /// The place.
        location: String,
        /// What it answers.
        found: String,
    },
    /// Something that needs files of this machine was asked of another place.
    #[error("{found} is not a folder of this machine, and this needs one")]
    NotHere {
        /// The source.
        found: String,
    },
    /// A registry refused, failed, or does not answer as one.
    #[cfg(feature = "registry")]
    #[error(transparent)]
    Registry(#[from] Box<registry::RegistryError>),
    /// A folder that is not an OCI image layout.
    #[error("{} is not an OCI image layout: {why}", dir.display())]
    NotALayout {
        /// The folder.
        dir: PathBuf,
        /// What is missing or wrong.
        why: String,
    },
    /// No image has that name.
    #[error("{location} has no image named `{name}`; it has {}", list(available))]
    NameMissing {
        /// The place.
        location: String,
        /// The name asked for.
        name: String,
        /// The names that there are.
        available: Vec<String>,
    },
    /// A name must be given, as there is not exactly one image.
    #[error(
        "{location} holds {found} images, so a name or a digest (`@sha256:…`) is needed; its names are {}",
        list(available)
    )]
    NameNeeded {
        /// The place.
        location: String,
        /// How many images there are.
        found: usize,
        /// The names that there are.
        available: Vec<String>,
    },
    /// One name stands for two images.
    #[error("{object} stands for two images: {} and {}", digests[0], digests[1])]
    Ambiguous {
        /// The place and name.
        object: String,
        /// The first two images.
        digests: [Digest; 2],
    },
    /// There is no image for this machine.
    #[error("{object} is not for this machine: expected {expected}, found {found}")]
    WrongPlatform {
        /// The place and name.
        object: String,
        /// The platform asked for.
        expected: String,
        /// The platforms that there are.
        found: String,
    },
    /// Indexes that point at indexes without end.
    #[error("{object}: image indexes nest deeper than {max}")]
    TooDeep {
        /// The place and name.
        object: String,
        /// The bound.
        max: usize,
    },
    /// A blob that is listed is not there.
    #[error("{location} does not have the blob {digest}")]
    BlobMissing {
        /// The place.
        location: String,
        /// The blob.
        digest: Digest,
    },
    /// A document is larger than what is read.
    #[error("{digest} has {size} bytes, more than the {max} allowed for its kind")]
    TooBig {
        /// The blob.
        digest: Digest,
        /// Its size, in bytes.
        size: u64,
        /// The bound, in bytes.
        max: u64,
    },
    /// The content is not what the digest promises.
    #[error("{object}: the content has digest {found}, expected {expected}")]
    DigestMismatch {
        /// The blob, with its place.
        object: String,
        /// The digest that it should have.
        expected: Digest,
        /// The digest that it has.
        found: Digest,
    },
    /// The content is longer or shorter than promised.
    #[error("{object}: the content has {found} bytes, expected {expected}")]
    SizeMismatch {
        /// The blob, with its place.
        object: String,
        /// The size that it should have, in bytes.
        expected: u64,
        /// The size that it has, in bytes; of a stream that was cut off, what was read until then.
        found: u64,
    },
    /// A manifest or index cannot be read.
    #[error("{object}: {source}")]
    Document {
        /// The document, with its place.
        object: String,
        /// What is wrong with it.
        source: OciError,
    },
    /// The operating system's answer.
    #[error(transparent)]
    Io(#[from] IoError),
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 20;
    if names.is_empty() {
        return "none".into();
    }
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

impl TransportError {
    /// Whether the same may succeed at another time: the network failed, or a server is busy.
    pub fn is_temporary(&self) -> bool {
        match self {
            #[cfg(feature = "registry")]
            Self::Registry(error) => error.is_temporary(),
            _ => false,
        }
    }
}

impl Classified for TransportError {
    fn class(&self) -> Class {
        match self {
            Self::BadSource { .. }
            | Self::LeftOut { .. }
            | Self::NotHere { .. }
            | Self::Foreign { .. }
            | Self::UnreadableEntry { .. }
            | Self::WrongPlatform { .. }
            | Self::NameMissing { .. }
            | Self::NameNeeded { .. } => Class::Input,
            Self::NotALayout { .. } => Class::Input,
            Self::DigestMismatch { .. } | Self::SizeMismatch { .. } => Class::Verification,
            Self::Document { source, .. } => source.class(),
            #[cfg(feature = "registry")]
            Self::Registry(error) => error.class(),
            _ => Class::Failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, Option<String>) {
        let source: SourceRef = text.parse().unwrap();
        (source.location, source.name)
    }

    #[test]
    fn the_forms_of_a_source() {
        let name = |text: &str| Some(text.to_string());
        assert_eq!(parsed("oci:dir"), ("dir".into(), None));
        assert_eq!(parsed("oci:/a/b:v1"), ("/a/b".into(), name("v1")));
        assert_eq!(parsed("oci://a/b:v1"), ("a/b".into(), name("v1")));
        assert_eq!(parsed("oci:///a/b:v1"), ("/a/b".into(), name("v1")));
        let long = "mos/images/hostfs:sha256/00";
        assert_eq!(parsed(&format!("oci:/s:{long}")), ("/s".into(), name(long)));
        let digest = format!("@{}", Digest::of(b""));
        let by_digest = format!("oci:/s{digest}");
        assert_eq!(parsed(&by_digest), ("/s".into(), name(&digest)));
        assert_eq!(by_digest.parse::<SourceRef>().unwrap().to_string(), by_digest);
        // A name may hold the like.
        let within = format!("v1{digest}");
        assert_eq!(parsed(&format!("oci:/s:{within}")), ("/s".into(), name(&within)));
        assert_eq!(parsed("docker://h:5000/x:1"), ("h:5000/x".into(), name("1")));
        assert_eq!(parsed("docker://h/a/b"), ("h/a/b".into(), None));
        let pinned = format!("docker://h/x@{}", Digest::of(b""));
        assert_eq!(parsed(&pinned), ("h/x".into(), name(&Digest::of(b"").to_string())));
        assert_eq!(pinned.parse::<SourceRef>().unwrap().to_string(), pinned);
    }

    #[test]
    fn what_is_not_a_source() {
        for bad in [
            "",
            "dir",
            "oci:",
            "oci::x",
            "oci://",
            "oci:d:",
            "docker:x",
            "docker://",
            "docker://h",
            "docker://h/A",
            "docker://h/x:",
            "tarball:/x",
        ] {
            let error = bad.parse::<SourceRef>().unwrap_err();
            assert!(matches!(error, TransportError::BadSource { .. }), "{bad}: {error}");
            assert_eq!(error.class(), Class::Input);
        }
        for other in ["dir:/x", "oci-archive:/x.tar:name", "docker-daemon:x:y"] {
            let error = other.parse::<SourceRef>().unwrap_err();
            assert!(matches!(error, TransportError::Foreign { .. }), "{other}: {error}");
            assert!(error.to_string().contains(&format!("`skopeo copy {other} oci:DIR:NAME`")), "{error}");
            assert_eq!(error.class(), Class::Input);
        }
        let error = "docker://h/x".parse::<SourceRef>().unwrap().layout().unwrap_err();
        assert!(matches!(error, TransportError::NotHere { .. }), "{error}");
        assert_eq!(error.class(), Class::Input);
    }
}
