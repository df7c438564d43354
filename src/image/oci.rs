//! OCI documents: descriptors, image manifests, and the layers of an image; `index.rs` has the indexes.
//!
//! ```text
//! index.json ── descriptor ──> manifest ── descriptor ──> config
//!                                  └────── descriptors ─> layers, first = bottom
//! ```
//!
//! These types parse only bytes that were checked against a digest (docs/design.md, chain of trust). They
//! keep fields that mosfs does not know, so rewriting another tool's `index.json` loses nothing, and write
//! them in a fixed order, so the same value always produces the same bytes. For that reason documents do not
//! use the types of the `oci-spec` crate, whose maps have a random order; the names of machines and
//! annotations do come from it.
//!
//! Bounds: [`MAX_MANIFEST_BYTES`] per document, [`MAX_LAYERS`] layers, [`MAX_CHUNKS`] chunks.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::Value;

use super::format::{Chunks, ImageFormat, LayerFormat, TwoSizes};
use crate::digest::{Digest, hex};
use crate::error::{Class, Classified};
pub use crate::image::platform::Platform;

/// The largest manifest or nested index that is read, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// The most layers that an image may have.
pub const MAX_LAYERS: usize = 1_000;
/// The most entries of a manifest that are chunks of a layer.
pub const MAX_CHUNKS: usize = 65_536;

/// The repository of system manifests, in a store and below a prefix of a registry.
pub const SYSTEM_REPOSITORY: &str = "mos/system/system";
/// Media type of an OCI image manifest (image-spec, media-types.md).
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image config.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of the empty JSON object, the config of an artifact.
pub const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// The bytes of the empty JSON object.
pub const EMPTY_BYTES: &[u8] = b"{}";
/// Docker's media type of an image manifest (schema 2), read like an OCI one.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's media type of an image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker's media type of an image index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Media type of the squashfs layers that mosfs creates (stacker's).
pub const SQUASHFS_ZSTD: &str = "application/vnd.stacker.image.layer.squashfs+zstd";
/// Media type of those that are compressed with lz4.
pub const SQUASHFS_LZ4: &str = "application/vnd.stacker.image.layer.squashfs+lz4";
/// Media type of the erofs layers that mosfs creates, compressed with zstd.
pub const EROFS_ZSTD: &str = "application/vnd.stacker.image.layer.erofs+zstd";
/// Media type of those that are compressed with lz4's high-compression mode.
pub const EROFS_LZ4: &str = "application/vnd.stacker.image.layer.erofs+lz4hc";

/// Annotation of a descriptor in `index.json` that names it.
pub const REF_NAME: &str = oci_spec::image::ANNOTATION_REF_NAME;
/// Annotation of a layer's descriptor with its root hash: 64 hex digits.
pub const ROOT_HASH: &str = "io.stackeroci.stacker.atomfs_verity_root_hash";
/// Older name of [`ROOT_HASH`].
pub const ROOT_HASH_OLD: &str = "io.stackeroci.stacker.squashfs_verity_root_hash";

/// A blob's type, digest and size (image-spec, descriptor.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type of the blob.
    #[serde(deserialize_with = "media_type")]
    pub media_type: Cow<'static, str>,
    /// SHA-256 of the blob; other algorithms are an error.
    pub digest: Digest,
    /// Size of the blob, in bytes.
    pub size: u64,
    /// The platform that it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Box<Platform>>,
    /// The artifact type, if the blob is an artifact's manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Free words about it.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The fields that mosfs does not know.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

impl Descriptor {
    /// A descriptor without annotations.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type_of(media_type),
            digest,
            size,
            platform: None,
            artifact_type: None,
            annotations: BTreeMap::new(),
            extra: BTreeMap::new(),
        }
    }

    /// Returns the descriptor of bytes in memory.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// Returns its name in `index.json`.
    pub fn ref_name(&self) -> Option<&str> {
        self.annotations.get(REF_NAME).map(String::as_str)
    }

    /// Returns its tag, if its name in `index.json` is `REPOSITORY:TAG`.
    pub(crate) fn tag_in(&self, repository: &str) -> Option<String> {
        Some(self.ref_name()?.strip_prefix(repository)?.strip_prefix(':')?.to_string())
    }

    /// Whether it is an image index rather than a manifest.
    pub fn is_index(&self) -> bool {
        self.media_type == INDEX || self.media_type == DOCKER_INDEX
    }

    /// Whether it is of a kind that mosfs reads: a manifest or an index.
    pub fn is_image(&self) -> bool {
        self.is_manifest() || self.is_index()
    }

    /// Whether it is the config of an image, rather than of an artifact.
    pub(crate) fn is_image_config(&self) -> bool {
        self.media_type == CONFIG || self.media_type == DOCKER_CONFIG
    }

    /// Whether it is an image manifest.
    pub fn is_manifest(&self) -> bool {
        self.media_type == MANIFEST || self.media_type == DOCKER_MANIFEST
    }
}

/// An image manifest, of an image or an artifact (image-spec, manifest.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// `application/vnd.oci.image.manifest.v1+json`; umoci leaves it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The artifact type, if this is an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, the bottom one first.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub layers: Vec<Descriptor>,
    /// The manifest that this one refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free words about it.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The fields that mosfs does not know.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

/// Go writes a list or map that was never allocated as `null`.
pub(super) fn null_is_empty<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// A media type, without memory of its own where it is that of chunks: a manifest may list 26,000 of them.
fn media_type_of(text: &str) -> Cow<'static, str> {
    LayerFormat::constant(text).map_or_else(|| Cow::Owned(text.into()), Cow::Borrowed)
}

/// Reads a media type where it is, without a copy.
fn media_type<'de, D: Deserializer<'de>>(from: D) -> Result<Cow<'static, str>, D::Error> {
    struct Text;

    impl Visitor<'_> for Text {
        type Value = Cow<'static, str>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(media_type_of(text))
        }
    }

    from.deserialize_str(Text)
}

impl Manifest {
    /// Creates an artifact with one layer and no config (image-spec, manifest.md, "Guidelines for Artifact
    /// Usage").
    pub fn artifact(artifact_type: &str, layer: Descriptor, subject: Option<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(MANIFEST.into()),
            artifact_type: Some(artifact_type.into()),
            config: Descriptor::of(EMPTY, EMPTY_BYTES),
            layers: vec![layer],
            subject,
            annotations: BTreeMap::new(),
            extra: BTreeMap::new(),
        }
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// See [`OciError`]; bytes of another kind of document are [`OciError::WrongMediaType`].
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        bounded("image manifest", bytes, MAX_MANIFEST_BYTES)?;
        let manifest: Self = json("image manifest", bytes)?;
        check_kind("image manifest", manifest.media_type.as_deref(), &[MANIFEST, DOCKER_MANIFEST])?;
        // image-spec, manifest.md: a document must not be readable as both a manifest and an index, or two
        // readers see two images under one digest (GHSA-77vh-xpmg-72qh).
        if manifest.extra.contains_key("manifests") {
            return Err(OciError::Ambiguous { document: "image manifest", field: "manifests" });
        }
        check_schema("image manifest", manifest.schema_version)?;
        let chunks = manifest.layers.iter().filter(|one| LayerFormat::is_chunk(&one.media_type)).count();
        limit("image manifest", "layers", manifest.layers.len() - chunks, MAX_LAYERS)?;
        limit("image manifest", "chunks", chunks, MAX_CHUNKS)?;
        Ok(manifest)
    }

    /// The bytes that are stored: always the same for the same value.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// Returns the artifact type: `artifactType`, else the config's media type (image-spec, manifest.md).
    pub fn kind(&self) -> &str {
        self.artifact_type.as_deref().unwrap_or(&self.config.media_type)
    }

    /// Whether it is a referrer of `subject`, with this artifact type where one is asked for.
    pub(crate) fn refers_to(&self, subject: &Digest, artifact_type: Option<&str>) -> bool {
        let is_about = self.subject.as_ref().is_some_and(|about| about.digest == *subject);
        is_about && artifact_type.is_none_or(|wanted| self.kind() == wanted)
    }
}

pub(super) fn to_bytes(value: &impl Serialize) -> Vec<u8> {
    // These types hold strings, integers, maps with string keys and values that came from JSON: serializing
    // them cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

pub(super) fn json<'a, T: Deserialize<'a>>(document: &'static str, bytes: &'a [u8]) -> Result<T, OciError> {
    // Whether it is UTF-8 is asked once, and not for each string: there may be 100,000.
    let text = str::from_utf8(bytes).map_err(de::Error::custom);
    text.and_then(serde_json::from_str).map_err(|source| OciError::Json { document, source })
}

pub(super) fn bounded(document: &'static str, bytes: &[u8], max: u64) -> Result<(), OciError> {
    match bytes.len() as u64 {
        size if size > max => Err(OciError::TooBig { document, size, max }),
        _ => Ok(()),
    }
}

pub(super) fn limit(
    document: &'static str,
    what: &'static str,
    found: usize,
    max: usize,
) -> Result<(), OciError> {
    if found > max { Err(OciError::TooMany { document, what, found, max }) } else { Ok(()) }
}

pub(super) fn check_schema(document: &'static str, found: u32) -> Result<(), OciError> {
    if found == 2 { Ok(()) } else { Err(OciError::Schema { document, found }) }
}

pub(super) fn check_kind(
    document: &'static str,
    found: Option<&str>,
    allowed: &[&str],
) -> Result<(), OciError> {
    match found {
        Some(found) if !found.is_empty() && !allowed.contains(&found) => {
            Err(OciError::WrongMediaType { document, expected: allowed[0].into(), found: found.into() })
        }
        _ => Ok(()),
    }
}

/// What the bytes of a layer are verified against when they are read, according to the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// A root hash: every block, through the hash tree in the layer's own file.
    RootHash(Digest),
    /// The digests of the blobs: each blob as a whole.
    Content,
    /// Nothing.
    None,
}

impl Trust {
    /// The root hash, if there is one.
    pub fn root_hash(self) -> Option<Digest> {
        match self {
            Self::RootHash(hash) => Some(hash),
            Self::Content | Self::None => None,
        }
    }
}

/// One layer of an image: parsed here, and passed on unchanged to the code that mounts, checks or converts
/// it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// SHA-256 of the blob.
    pub digest: Digest,
    /// Size of the blob, in bytes, with the verity tree.
    pub size: u64,
    /// What its bytes are verified against. The reader of a blob enforces the rule (docs/design.md, both or
    /// neither): root hash and tree are both present, or both absent.
    pub trust: Trust,
    /// As in the manifest, to be written back unchanged.
    media_type: String,
    format: Option<LayerFormat>,
}

impl LayerDescriptor {
    /// Creates a layer of this media type.
    pub fn new(media_type: &str, digest: Digest, size: u64, trust: Trust) -> Self {
        let format = LayerFormat::of(media_type);
        Self { digest, size, trust, media_type: media_type.to_string(), format }
    }

    /// Reads a layer's descriptor.
    ///
    /// # Errors
    /// [`OciError::RootHash`] if the annotation is not 64 hex digits, or if the two annotations differ.
    pub fn from_descriptor(descriptor: &Descriptor) -> Result<Self, OciError> {
        let bad = |found: &str| OciError::RootHash {
            layer: descriptor.digest,
            found: found.chars().take(100).collect(),
        };
        let mut root_hash = None;
        for name in [ROOT_HASH, ROOT_HASH_OLD] {
            let Some(text) = descriptor.annotations.get(name) else { continue };
            let hash = Digest::from_hex(text).map_err(|_| bad(text))?;
            if root_hash.is_some_and(|other| other != hash) {
                return Err(bad(text));
            }
            root_hash = Some(hash);
        }
        let trust = root_hash.map_or(Trust::None, Trust::RootHash);
        let mut layer = Self::new(&descriptor.media_type, descriptor.digest, descriptor.size, trust);
        if layer.format.is_some_and(LayerFormat::is_chunked) {
            // Many blobs have no common tree: their digests are all there is.
            layer.trust = Trust::Content;
        }
        Ok(layer)
    }

    /// Returns the layer with other verification data.
    pub fn with_trust(self, trust: Trust) -> Self {
        Self { trust, ..self }
    }

    /// The format of the blob.
    ///
    /// # Errors
    /// [`OciError::UnknownLayer`].
    pub fn format(&self) -> Result<LayerFormat, OciError> {
        self.format
            .ok_or_else(|| OciError::UnknownLayer { layer: self.digest, media_type: self.media_type.clone() })
    }

    /// Returns how to read it as a file system in one file, if it is one.
    pub fn image(&self) -> Option<ImageFormat> {
        self.format.and_then(LayerFormat::image)
    }

    /// Returns its media type as in the manifest, for manifests and messages; code should use the format.
    pub fn media_type(&self) -> &str {
        &self.media_type
    }

    /// Returns the descriptor for a manifest.
    pub fn to_descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(&self.media_type, self.digest, self.size);
        if let Some(hash) = self.trust.root_hash() {
            descriptor.annotations.insert(ROOT_HASH.into(), hex(hash.as_bytes()));
        }
        descriptor
    }
}

/// An image: its manifest, parsed from bytes whose digest the caller has checked.
#[derive(Debug, Clone, PartialEq)]
pub struct OciImage {
    /// SHA-256 of the manifest's bytes.
    pub digest: Digest,
    /// Size of the manifest, in bytes.
    pub size: u64,
    /// The layers, the bottom one first.
    pub layers: Vec<LayerDescriptor>,
    /// The chunks of a layer that consists of many blobs; else empty.
    pub chunks: Arc<Chunks>,
    /// The manifest as written: its layers and chunks are all the blobs that the image needs.
    pub manifest: Manifest,
}

impl OciImage {
    /// Parses the manifest of an image.
    ///
    /// The digest of the image is that of `bytes`; the caller compares it with the expected one, or obtained
    /// the bytes from code that did, such as `Store::get`.
    ///
    /// # Errors
    /// See [`OciError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        Self::of(bytes, Digest::of(bytes))
    }

    /// Parses the manifest of an image, whose digest has just been computed, and so is not computed again.
    pub(crate) fn of(bytes: &[u8], digest: Digest) -> Result<Self, OciError> {
        let manifest = Manifest::parse(bytes)?;
        let (mut layers, mut listed) = (Vec::new(), Vec::new());
        for descriptor in &manifest.layers {
            if !LayerFormat::is_chunk(&descriptor.media_type) {
                layers.push(LayerDescriptor::from_descriptor(descriptor)?);
                continue;
            }
            listed.push((descriptor.digest, descriptor.size));
        }
        let chunks = Chunks::new(listed)?;
        // Rule: a layer of many blobs is the whole image. Otherwise it would be unknown which layer a chunk
        // belongs to.
        let chunked = layers.iter().filter(|layer| layer.format.is_some_and(LayerFormat::is_chunked)).count();
        if chunked != 0 && (chunked, layers.len()) != (1, 1) || chunked == 0 && !chunks.is_empty() {
            return Err(OciError::Mixed { chunked, others: layers.len() - chunked, chunks: chunks.len() });
        }
        let size = bytes.len() as u64;
        Ok(Self { digest, size, layers, chunks: Arc::new(chunks), manifest })
    }
}

/// Why an OCI document is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// It is not JSON, or a field is missing or of the wrong type.
    #[error("{document}: {source}")]
    Json {
        /// Which kind of document.
        document: &'static str,
        /// The parser's message, with line and column.
        source: serde_json::Error,
    },
    /// It is larger than the limit.
    #[error("{document} of {size} bytes is larger than the {max} bytes allowed")]
    TooBig {
        /// Which kind of document.
        document: &'static str,
        /// Its size, in bytes.
        size: u64,
        /// The bound, in bytes.
        max: u64,
    },
    /// It lists more than the limit.
    #[error("{document} has {found} {what}, more than the {max} allowed")]
    TooMany {
        /// Which kind of document.
        document: &'static str,
        /// What it lists too many of.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// The bound.
        max: usize,
    },
    /// `schemaVersion` is not 2.
    #[error("{document} has schemaVersion {found}, expected 2")]
    Schema {
        /// Which kind of document.
        document: &'static str,
        /// What it says.
        found: u32,
    },
    /// It declares another media type.
    #[error("{document} has media type `{found}`, expected `{expected}`")]
    WrongMediaType {
        /// Which kind of document was expected.
        document: &'static str,
        /// The media type of that kind.
        expected: String,
        /// What it says.
        found: String,
    },
    /// It could be read both as a manifest and as an index.
    #[error("{document} also has the field `{field}` of another kind of document")]
    Ambiguous {
        /// Which kind of document was expected.
        document: &'static str,
        /// The field that must not be there.
        field: &'static str,
    },
    /// The root hash of a layer is malformed, or its two annotations differ.
    #[error("layer {layer}: root hash `{found}` is not 64 hex digits, or differs from its older annotation")]
    RootHash {
        /// The layer.
        layer: Digest,
        /// The annotation.
        found: String,
    },
    /// A chunk is listed with two sizes.
    #[error(transparent)]
    ChunkSize(#[from] TwoSizes),
    /// A layer of many blobs is not the only layer, or there are chunks without such a layer.
    #[error(
        "the image has {chunked} layers made of chunks, {others} other layers and {chunks} chunks; expected one layer made of chunks alone, or no chunks"
    )]
    Mixed {
        /// How many layers are made of chunks.
        chunked: usize,
        /// How many other layers there are.
        others: usize,
        /// How many chunks there are.
        chunks: usize,
    },
    /// A layer is of a kind that mosfs cannot read.
    #[error("layer {layer}: unknown media type `{media_type}`")]
    UnknownLayer {
        /// The layer.
        layer: Digest,
        /// Its media type.
        media_type: String,
    },
}

impl Classified for OciError {
    fn class(&self) -> Class {
        Class::Failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn manifest(more: &str) -> Vec<u8> {
        format!(r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{D}","size":2}}{more}}}"#)
            .into_bytes()
    }

    #[test]
    fn what_umoci_and_go_write_is_read() {
        assert_eq!(Manifest::parse(&manifest("")).unwrap().layers, []);
        let null = manifest(r#","layers":null,"annotations":null"#);
        assert_eq!(Manifest::parse(&null).unwrap().layers, []);
    }

    #[test]
    fn one_document_is_never_two_kinds() {
        let both = manifest(r#","layers":[],"manifests":[]"#);
        assert!(matches!(Manifest::parse(&both), Err(OciError::Ambiguous { field: "manifests", .. })));
        let typed = manifest(&format!(r#","mediaType":"{INDEX}""#));
        assert!(matches!(Manifest::parse(&typed), Err(OciError::WrongMediaType { .. })));
    }

    #[test]
    fn bounds_hold() {
        let layer = format!(r#"{{"mediaType":"c","digest":"{D}","size":2}}"#);
        let many = manifest(&format!(r#","layers":[{}]"#, vec![layer; MAX_LAYERS + 1].join(",")));
        assert!(matches!(Manifest::parse(&many), Err(OciError::TooMany { found: 1001, max: 1000, .. })));
        let big = vec![b' '; MAX_MANIFEST_BYTES as usize + 1];
        assert!(matches!(Manifest::parse(&big), Err(OciError::TooBig { .. })));
        let sha512 = manifest("").iter().map(|b| *b as char).collect::<String>().replace("sha256", "sha512");
        assert!(matches!(Manifest::parse(sha512.as_bytes()), Err(OciError::Json { .. })));
    }

    #[test]
    fn media_types_are_read_as_they_are_written() {
        for (written, is_constant) in [
            (r"application/vnd.puzzlefs.image.filedata.v1+zstd", true),
            (r"application\/vnd.puzzlefs.image.filedata.v1", true),
            (r"application/vnd.puzzlefs.image.filedata.v1+zst", false),
            (r"application\/vnd.oci.image.layer.v1.tar", false),
            ("", false),
        ] {
            let digest = Digest::of(b"");
            let json = format!(r#"{{"mediaType":"{written}","digest":"{digest}","size":0}}"#);
            let read: Descriptor = serde_json::from_str(&json).unwrap();
            let expected = written.replace('\\', "");
            assert_eq!(read, Descriptor::new(&expected, digest, 0));
            assert_eq!(read.media_type, expected);
            assert_eq!(matches!(read.media_type, Cow::Borrowed(_)), is_constant, "{written}");
        }
        let error = serde_json::from_str::<Descriptor>(r#"{"mediaType":1}"#).unwrap_err().to_string();
        assert!(error.starts_with("invalid type: integer `1`, expected a string"), "{error}");
    }

    #[test]
    fn many_chunks_are_one_layer() {
        const ROOTFS: &str = "application/vnd.puzzlefs.image.rootfs.v1";
        const CHUNK: &str = "application/vnd.puzzlefs.image.filedata.v1+zstd";
        let entry = |media_type: &str, number: usize, size: u64| {
            let digest = Digest::of(&number.to_le_bytes());
            format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{size}}}"#)
        };
        let parse =
            |entries: &[String]| OciImage::parse(&manifest(&format!(r#","layers":[{}]"#, entries.join(","))));
        let mut entries = vec![entry(ROOTFS, 0, 100)];
        entries.extend((1..2000).map(|number| entry(CHUNK, number, 7)));
        entries.push(entry(CHUNK, 5, 7));
        let image = parse(&entries).unwrap();
        assert_eq!((image.layers.len(), image.chunks.len()), (1, 1999));
        assert_eq!((image.layers[0].trust, image.layers[0].size), (Trust::Content, 100));
        let found = image.chunks.find(&Digest::of(&5_usize.to_le_bytes()), 4);
        assert_eq!(found, Some((4, 7)));
        assert_eq!(image.manifest.layers.len(), 2001, "all blobs that the image needs");

        let two_sizes = [entry(ROOTFS, 0, 100), entry(CHUNK, 1, 7), entry(CHUNK, 1, 8)];
        assert!(matches!(parse(&two_sizes), Err(OciError::ChunkSize(TwoSizes { sizes: [7, 8], .. }))));
        for mixed in [
            vec![entry(ROOTFS, 0, 100), entry(ROOTFS, 1, 100)],
            vec![entry(ROOTFS, 0, 100), entry(SQUASHFS_ZSTD, 1, 100)],
            vec![entry(SQUASHFS_ZSTD, 0, 100), entry(CHUNK, 1, 100)],
            vec![entry(CHUNK, 1, 100)],
        ] {
            assert!(matches!(parse(&mixed), Err(OciError::Mixed { .. })), "{mixed:?}");
        }
        let many: Vec<_> = (0..=MAX_CHUNKS).map(|_| r#"{"mediaType":"MT","digest":"D","size":1}"#).collect();
        let short = "application/vnd.puzzlefs.image.filedata.v1";
        let text = many.join(",").replace("MT", short).replace("\"D\"", &format!("\"{D}\""));
        let error = Manifest::parse(&manifest(&format!(r#","layers":[{text}]"#))).unwrap_err();
        // 4 MiB hold fewer of them, so that bound comes first.
        assert!(matches!(error, OciError::TooBig { .. } | OciError::TooMany { .. }), "{error}");
    }

    #[test]
    fn a_root_hash_has_two_names_and_one_value() {
        let mut descriptor = Descriptor::of(SQUASHFS_ZSTD, b"x");
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        assert_eq!(LayerDescriptor::from_descriptor(&descriptor).unwrap().trust, Trust::None);
        descriptor.annotations.insert(ROOT_HASH_OLD.into(), one.hex());
        assert_eq!(LayerDescriptor::from_descriptor(&descriptor).unwrap().trust, Trust::RootHash(one));
        descriptor.annotations.insert(ROOT_HASH.into(), one.hex());
        assert_eq!(LayerDescriptor::from_descriptor(&descriptor).unwrap().trust, Trust::RootHash(one));
        descriptor.annotations.insert(ROOT_HASH.into(), two.hex());
        assert!(matches!(LayerDescriptor::from_descriptor(&descriptor), Err(OciError::RootHash { .. })));
        descriptor.annotations.insert(ROOT_HASH.into(), "00".into());
        assert!(matches!(LayerDescriptor::from_descriptor(&descriptor), Err(OciError::RootHash { .. })));
    }
}
