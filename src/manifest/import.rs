//! The import manifest: what a publisher writes (docs/MANIFESTS.md).
//!
//! ```yaml
//! version: 200                     # required, 1 .. 2^53-1
//! mediatype: application/vnd.mos.import.manifest.v1
//! image_type: iso
//! product: de6c82c5-2e01-4c92-949b-a6545d30fc06        # required
//! storage_type: atomfs             # atomfs (default) | puzzlefs
//! targets:                         # required
//!   NAME:
//!     url: oci:PATH[:REF]          # required, or docker://HOST[:PORT]/NAME[:TAG|@DIGEST]
//!     version: 0.0.1               # required; quotes are not needed, the text is kept as written
//!     service_type: hostfs         # required: hostfs | container | fs-only
//!     network:                     # required: host | none | simple
//!       type: simple
//!       ipv4: 10.0.3.99/24         # only with simple, like ipv6 and ports
//!       ipv6: fd00::99/64
//!       ports: [{host: 80, container: 5000, protocol: tcp}]    # protocol: tcp (default) | udp
//!     nsgroup: ""
//!     mounts: [{destination: /data, source: /srv/data, type: bind, options: [rbind, ro]}]
//!     layer:                           # how tar layers are packed
//!       format: squashfs               # squashfs | erofs
//!       compression: lz4               # zstd | lz4
//!       block_size: 64K                # 16K to 1M
//!     digest: sha256:…             # pins: the expected image at the URL
//!     size: 3993
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path as FilePath, PathBuf};

use uuid::Uuid;

use super::consistency::{self, Step};
use super::decode::{Decoder, Dialect, Path, Problem, ProblemKind, service_tree};
use super::system::{SystemManifest, Target};
use super::tree::{Entry, Node, Position, Value};
use super::{
    IMPORT_MEDIA_TYPE, ImageType, ImageUrl, LayerChoice, Mount, Network, ServiceType, StorageType,
    TargetName, Workload, json, layer, rules, workload, yaml,
};
use crate::digest::Digest;
use crate::error::{Class, Classified};
use crate::sorting;

/// A validated import manifest.
///
/// ```
/// use mosfs::{Digest, ImportManifest, Resolved};
///
/// let yaml = b"\
/// version: 7
/// product: de6c82c5-2e01-4c92-949b-a6545d30fc06
/// targets:
///   web:
///     url: oci:/srv/images:web
///     version: 1.2.0
///     service_type: container
///     network: {type: host}
/// ";
/// let import = ImportManifest::parse("import.yaml".as_ref(), yaml)?;
/// assert_eq!(import.targets["web"].url.to_string(), "oci:/srv/images:web");
///
/// // Once the images are in a store, it becomes a system manifest.
/// let image = Resolved { digest: Digest::of(b"the OCI manifest"), size: 16 };
/// let system = import.to_system(&[("web".parse()?, image)].into())?;
/// assert_eq!(system.version, 7);
///
/// // All problems are reported at once, each with its place.
/// let wrong = ImportManifest::parse("import.yaml".as_ref(), b"version: 0").unwrap_err();
/// assert!(wrong.to_string().contains("import.yaml:1:10: "), "{wrong}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportManifest {
    /// The file that it was read from, for messages.
    pub file: PathBuf,
    /// The version of the whole system, 1 to 2^53-1.
    pub version: u64,
    /// Whether the file states its media type.
    pub has_media_type: bool,
    /// What is built for the first installation.
    pub image_type: Option<ImageType>,
    /// The product that the system is for.
    pub product: Uuid,
    /// How images are stored, if the file states it.
    pub storage_type: Option<StorageType>,
    /// The targets by name; at least one.
    pub targets: BTreeMap<TargetName, ImportTarget>,
}

/// One target of an import manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportTarget {
    /// Where its image is.
    pub url: ImageUrl,
    /// The position of the URL in the file.
    pub url_at: Position,
    /// Its version.
    pub version: String,
    /// How it is used.
    pub service_type: ServiceType,
    /// Its network.
    pub network: Network,
    /// The group of targets whose ids are mapped alike.
    pub nsgroup: Option<String>,
    /// Mounts inside it.
    pub mounts: Option<Vec<Mount>>,
    /// What a container runs, and how it is kept running.
    pub workload: Workload,
    /// How its layers are made.
    pub layer: Option<LayerChoice>,
    /// The required digest of the OCI manifest at the URL.
    pub digest: Option<Pin<Digest>>,
    /// The required size of the OCI manifest at the URL, in bytes.
    pub size: Option<Pin<u64>>,
}

consistency::view!(ImportTarget);

/// A value that the publisher pinned, and its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin<T> {
    /// The value.
    pub value: T,
    /// Its position in the file.
    pub at: Position,
}

/// The image of a target's URL, once it is in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolved {
    /// Digest of the OCI manifest.
    pub digest: Digest,
    /// Size of the OCI manifest in bytes.
    pub size: u64,
}

/// One problem of an import manifest, with everything needed to fix it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}:{}:{}: {problem}", file.display(), problem.at.line, problem.at.column)]
pub struct ImportError {
    /// The file.
    pub file: PathBuf,
    /// Line, column, field, what was found and what is allowed.
    pub problem: Problem,
}

/// All problems of an import manifest, in the order of the file. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ImportErrors(pub Vec<ImportError>);

impl ImportErrors {
    fn new(file: &FilePath, problems: Vec<Problem>) -> Self {
        Self(problems.into_iter().map(|problem| ImportError { file: file.to_path_buf(), problem }).collect())
    }
}

impl fmt::Display for ImportErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [one] => write!(f, "{one}"),
            many => {
                write!(f, "the import manifest has {} errors", many.len())?;
                many.iter().try_for_each(|error| write!(f, "\n{error}"))
            }
        }
    }
}

impl Classified for ImportErrors {
    /// A pin checks data from elsewhere; all other problems are in the file itself.
    fn class(&self) -> Class {
        let pin = self.0.iter().any(|error| error.problem.kind == ProblemKind::PinMismatch);
        if pin { Class::Verification } else { Class::Input }
    }
}

const FIELDS: &[&str] = &["version", "mediatype", "image_type", "product", "storage_type", "targets"];
const TARGET_FIELDS: &[&str] =
    &["url", "version", "service_type", "network", "nsgroup", "mounts", "layer", "digest", "size"];

impl ImportManifest {
    /// Parses and checks a manifest. `file` is its name, for messages; nothing is opened.
    ///
    /// # Errors
    /// All problems of the file.
    pub fn parse(file: &FilePath, bytes: &[u8]) -> Result<Self, ImportErrors> {
        let (root, mut problems) = yaml::read(bytes);
        let mut decoder = Decoder::new(Dialect::Yaml);
        let manifest = root.and_then(|root| decode(&mut decoder, &root, file));
        problems.extend(decoder.into_problems());
        sorting::sort_by_key(&mut problems, |problem| (problem.at.line, problem.at.column));
        match manifest {
            Some(manifest) if problems.is_empty() => Ok(manifest),
            _ => Err(ImportErrors::new(file, problems)),
        }
    }

    /// Returns how images are stored.
    pub fn storage_type(&self) -> StorageType {
        self.storage_type.unwrap_or(StorageType::Atomfs)
    }

    /// Requires that the image at a target's URL matches the publisher's pins. `found` is the OCI manifest at
    /// the URL, before any conversion.
    ///
    /// # Errors
    /// A [`ProblemKind::PinMismatch`] at the position of each pin that does not match.
    pub fn check_pins(&self, name: &TargetName, found: &Resolved) -> Result<(), ImportErrors> {
        let Some(target) = self.targets.get(name) else { return Ok(()) };
        let mut problems = Vec::new();
        let mut mismatch = |at, field: &str, found: String, pinned: String| {
            let field = Path::ROOT.field("targets").field(name.as_str()).field(field).to_string();
            let found = format!("{found} at {}", target.url);
            let allowed = format!("the pinned {pinned}");
            problems.push(Problem { at, field, kind: ProblemKind::PinMismatch, found, allowed });
        };
        if let Some(pin) = &target.digest
            && pin.value != found.digest
        {
            mismatch(pin.at, "digest", found.digest.to_string(), pin.value.to_string());
        }
        if let Some(pin) = &target.size
            && pin.value != found.size
        {
            mismatch(pin.at, "size", found.size.to_string(), pin.value.to_string());
        }
        if problems.is_empty() { Ok(()) } else { Err(ImportErrors::new(&self.file, problems)) }
    }

    /// Returns the system manifest that this describes, with the images in the store. Pins are not checked:
    /// stored images may have been converted.
    ///
    /// # Errors
    /// A target of the manifest that `stored` lacks, as a problem of its URL.
    pub fn to_system(&self, stored: &BTreeMap<TargetName, Resolved>) -> Result<SystemManifest, ImportErrors> {
        let mut targets = BTreeMap::new();
        let mut problems = Vec::new();
        for (name, target) in &self.targets {
            let Some(Resolved { digest, size }) = stored.get(name).copied() else {
                let field = Path::ROOT.field("targets").field(name.as_str()).field("url").to_string();
                let (found, allowed) =
                    ("an image that is not in the store".into(), "an image that is".into());
                problems.push(Problem {
                    at: target.url_at,
                    field,
                    kind: ProblemKind::MissingField,
                    found,
                    allowed,
                });
                continue;
            };
            let ImportTarget { version, service_type, network, nsgroup, mounts, workload, .. } =
                target.clone();
            targets.insert(
                name.clone(),
                Target { digest, size, version, service_type, network, nsgroup, mounts, workload },
            );
        }
        if !problems.is_empty() {
            return Err(ImportErrors::new(&self.file, problems));
        }
        Ok(SystemManifest { version: self.version, product: self.product, targets })
    }

    /// Returns the import manifest itself as reproducible JSON: the same fields, without omitted ones.
    pub fn canonical(&self) -> Vec<u8> {
        let product = self.product.to_string();
        let urls: Vec<_> = self.targets.values().map(|target| target.url.to_string()).collect();
        let digests: Vec<_> =
            self.targets.values().map(|target| target.digest.map(|pin| pin.value.to_string())).collect();
        let targets = self.targets.iter().zip(urls.iter().zip(&digests));
        let targets = Value::map(targets.map(|((name, target), (url, digest))| {
            let ImportTarget {
                version, service_type, network, nsgroup, mounts, workload, layer, size, ..
            } = target;
            let own = [
                ("url", Some(Value::text(url))),
                ("layer", layer.as_ref().map(LayerChoice::tree)),
                ("digest", digest.as_deref().map(Value::text)),
                ("size", size.map(|pin| Value::integer(pin.value))),
            ];
            let service = service_tree(version, *service_type, network, nsgroup, mounts, workload);
            (name.as_str(), Some(Value::map(own.into_iter().chain(service))))
        }));
        let root = Value::map([
            ("version", Some(Value::integer(self.version))),
            ("mediatype", self.has_media_type.then(|| Value::text(IMPORT_MEDIA_TYPE))),
            ("image_type", self.image_type.map(|word| Value::text(word.as_str()))),
            ("product", Some(Value::text(&product))),
            ("storage_type", self.storage_type.map(|word| Value::text(word.as_str()))),
            ("targets", Some(targets)),
        ]);
        json::write(&root.into())
    }
}

fn decode(decoder: &mut Decoder, root: &Node<'_>, file: &FilePath) -> Option<ImportManifest> {
    let path = &Path::ROOT;
    let fields = decoder.fields(root, root.at, path, FIELDS)?;
    let version = decoder
        .required(&fields, path, "version", "an integer from 1 to 9007199254740991")
        .and_then(|node| decoder.integer(node, &path.field("version")));
    let media_type = decoder.optional(&fields, path, "mediatype", |decoder, node, path| {
        let known = |word: &str| (word == IMPORT_MEDIA_TYPE).then_some(());
        decoder.word(node, path, &[IMPORT_MEDIA_TYPE], known)
    });
    let image_type = decoder.optional(&fields, path, "image_type", |decoder, node, path| {
        decoder.word(node, path, ImageType::WORDS, ImageType::from_word)
    });
    let product = decoder
        .required(&fields, path, "product", "the UUID of the product")
        .and_then(|node| decoder.text_as(node, &path.field("product"), rules::uuid));
    let storage_type = decoder.optional(&fields, path, "storage_type", |decoder, node, path| {
        decoder.word(node, path, StorageType::WORDS, StorageType::from_word)
    });
    let targets =
        decoder.required(&fields, path, "targets", "a mapping of target names to targets").and_then(|node| {
            let targets = decoder.targets(node, &path.field("targets"), target)?;
            agree(decoder, node, &path.field("targets"), &targets);
            Some(targets)
        });
    if let (Some(Some(StorageType::Puzzlefs)), Some(targets)) = (storage_type, &targets) {
        let with_layers = targets.iter().filter_map(|(name, target)| Some((name, target.layer?)));
        for (name, choice) in with_layers {
            let path = path.field("targets");
            let path = path.field(name.as_str());
            decoder.problem::<()>(
                ProblemKind::BadValue,
                choice.at,
                &path.field("layer"),
                "`layer` with storage_type puzzlefs",
                "only with storage_type atomfs",
            );
        }
    }
    Some(ImportManifest {
        file: file.to_path_buf(),
        version: version?,
        has_media_type: media_type?.is_some(),
        image_type: image_type?,
        product: product?,
        storage_type: storage_type?,
        targets: targets?,
    })
}

/// Reports what the targets do not agree on ([`consistency`]), at the field that says it.
fn agree(
    decoder: &mut Decoder,
    node: &Node<'_>,
    path: &Path<'_>,
    targets: &BTreeMap<TargetName, ImportTarget>,
) {
    let views = targets.iter().map(|(name, target)| (name, consistency::View::from(target)));
    for finding in consistency::check(views) {
        let of_target = path.field(finding.target.as_str());
        let (mut node, mut field) =
            (node.field(finding.target.as_str()).unwrap_or(node), of_target.to_string());
        for step in &finding.path {
            let below = match step {
                Step::Field(name) => node.field(name),
                Step::Item(index) => node.item(*index),
            };
            // A field that is not written is reported where its mapping is.
            node = below.unwrap_or(node);
        }
        field = format!("{field}.{}", finding.field());
        decoder.report(node.at, field, finding.found, finding.allowed);
    }
}

fn target(decoder: &mut Decoder, entry: &Entry<'_>, path: &Path<'_>) -> Option<ImportTarget> {
    let fields = decoder.fields(&entry.node, entry.at, path, &[TARGET_FIELDS, &workload::FIELDS].concat())?;
    let url = decoder
        .required(&fields, path, "url", "oci:PATH[:REF] or docker://HOST[:PORT]/NAME[:TAG|@DIGEST]")
        .and_then(|node| {
            let url = decoder.text_as(node, &path.field("url"), str::parse::<ImageUrl>)?;
            Some((url, node.at))
        });
    let service = decoder.service(&fields, path);
    let layer = decoder.optional(&fields, path, "layer", layer::decode);
    let digest = decoder.optional(&fields, path, "digest", |decoder, node, path| {
        let value = decoder.text_as(node, path, rules::digest)?;
        Some(Pin { value, at: node.at })
    });
    let size = decoder.optional(&fields, path, "size", |decoder, node, path| {
        let value = decoder.integer(node, path)?;
        Some(Pin { value, at: node.at })
    });
    let ((url, url_at), service) = (url?, service?);
    Some(ImportTarget {
        url,
        url_at,
        version: service.version,
        service_type: service.service_type,
        network: service.network,
        nsgroup: service.nsgroup,
        mounts: service.mounts,
        workload: service.workload,
        layer: layer?,
        digest: digest?,
        size: size?,
    })
}
