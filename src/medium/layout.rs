//! The layout of an install medium.
//!
//! ```text
//! ISO 9660, volume label MOSFS-INSTALL
//!   /mosfs/medium.json       which system is on the medium: a hint, not signed
//!   /mosfs/answers.yaml      what the setup would ask; optional
//!   /mosfs/enroll/*.auth     keys to enroll; optional
//!   /store                   an OCI layout that holds exactly one system, with signature, certificate, floor signature
//! GPT partition 2, an EFI system partition with FAT
//!   EFI/BOOT/BOOTX64.EFI     mosfs.efi of the target `boot`, byte for byte
//! ```
//!
//! With keys to enroll, the EFI system partition is:
//!
//! ```text
//! EFI/BOOT/BOOTX64.EFI       loader.efi of the target `boot`: systemd-boot
//! EFI/Linux/mosfs.efi        mosfs.efi of the target `boot`
//! loader/loader.conf         `secure-boot-enroll if-safe`, or `manual` where systemd-boot is older than 253
//! loader/keys/auto/*.auth    the keys of /mosfs/enroll
//! ```
//!
//! Nothing on the medium counts boots. Two other media may be there: `MOSFS-ANSWERS` with `/answers.yaml`, which is read
//! instead of the file on the install medium, and `MOSFS-PROVISION` with `/provision.key`. Where that key is elsewhere, the
//! latter has `/provision.pub`, and carries `/nonce-UUID` there and `/signature-UUID` back. No private key is ever on an
//! install medium.

use uuid::Uuid;

use crate::digest::{Digest, Hasher};
use crate::error::{Class, Classified};
use crate::manifest::decode::{Decoder, Dialect, Path, Problem};
use crate::manifest::tree::{Node, Value};
use crate::manifest::{SystemManifest, json, rules};

/// The volume label of an install medium.
pub const LABEL: &str = "MOSFS-INSTALL";
/// The label of a second medium with answers, which are read instead of those on the install medium.
pub const ANSWERS_LABEL: &str = "MOSFS-ANSWERS";
/// The label of a second medium with the provisioning key.
pub const PROVISION_LABEL: &str = "MOSFS-PROVISION";

/// The folder of the OCI layout.
pub const STORE: &str = "store";
/// The file that names the system.
pub const MEDIUM_FILE: &str = "mosfs/medium.json";
/// The answers on the install medium.
pub const ANSWERS: &str = "mosfs/answers.yaml";
/// The folder of the keys to enroll, which are on the EFI system partition as well.
pub const ENROLL: &str = "mosfs/enroll";
/// The answers on a medium labelled [`ANSWERS_LABEL`].
pub const OTHER_ANSWERS: &str = "answers.yaml";
/// The provisioning key on a medium labelled [`PROVISION_LABEL`].
pub const PROVISION_KEY: &str = "provision.key";
/// The public half of the provisioning key there, with its authorization, where the key itself is elsewhere.
pub const PROVISION_PUB: &str = "provision.pub";
/// The beginnings of the names of a nonce that such a key must sign, and of the signature; the machine's UUID follows.
pub const NONCE: &str = "nonce";
/// See [`NONCE`].
pub const SIGNATURE: &str = "signature";

/// What the firmware starts from the EFI system partition.
pub const ESP_BOOT: &str = "EFI/BOOT/BOOTX64.EFI";
/// The kernel on the EFI system partition of a medium that enrolls keys, where [`ESP_BOOT`] is systemd-boot.
pub const ESP_KERNEL: &str = "EFI/Linux/mosfs.efi";
/// systemd-boot's settings on such a medium.
pub const LOADER_CONF: &str = "loader/loader.conf";
/// Their content. systemd-boot enrolls the keys by itself only where a mistake does not lock anybody out: in virtual
/// machines. Elsewhere its menu offers it.
pub const LOADER_CONF_TEXT: &str = "timeout 5\nsecure-boot-enroll if-safe\n";
/// The same for a systemd-boot that does not know that: its menu offers it.
pub const LOADER_CONF_TEXT_MANUAL: &str = "timeout 5\nsecure-boot-enroll manual\n";
/// The first version of systemd-boot that knows `if-safe` (NEWS of systemd, "CHANGES WITH 253").
const IF_SAFE_SINCE: u32 = 253;

/// Returns the content of [`LOADER_CONF`] for a systemd-boot, whose section `.sdmagic` has its version (systemd-boot's
/// boot.c): `#### LoaderInfo: systemd-boot VERSION ####`.
pub fn loader_conf(loader: &[u8]) -> &'static str {
    const MAGIC: &[u8] = b"#### LoaderInfo: systemd-boot ";
    let at = loader.windows(MAGIC.len()).position(|part| part == MAGIC).map(|at| at + MAGIC.len());
    let version = at.and_then(|at| loader.get(at..)).unwrap_or_default();
    let digits = version.iter().copied().take_while(u8::is_ascii_digit).take(6);
    let version = digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
    if version >= IF_SAFE_SINCE { LOADER_CONF_TEXT } else { LOADER_CONF_TEXT_MANUAL }
}

/// The folder of the keys on such a medium: systemd-boot's set of keys named `auto`.
pub const ENROLL_KEYS: &str = "loader/keys/auto";
/// The files in it that systemd-boot reads; all three are required.
pub const ENROLL_FILES: [&str; 3] = ["PK.auth", "KEK.auth", "db.auth"];

/// Largest [`MEDIUM_FILE`], in bytes.
pub const MAX_MEDIUM_FILE: usize = 4096;
/// The format of [`MEDIUM_FILE`].
const FORMAT: u64 = 1;
/// How many characters the label of a FAT file system has.
const FAT_LABEL: usize = 11;

/// Whether a file system has this label. FAT has 11 characters for it, so there the first 11 suffice.
pub fn is_labelled(found: &str, wanted: &str) -> bool {
    found == wanted || wanted.get(..FAT_LABEL).is_some_and(|begin| found == begin)
}

/// What [`MEDIUM_FILE`] says. It is not signed: what the medium holds is what verifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Medium {
    /// The product.
    pub product: Uuid,
    /// The version of the system.
    pub version: u64,
    /// Digest of the system manifest.
    pub system: Digest,
}

/// Why bytes are not a [`MEDIUM_FILE`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MediumFileError {
    /// It is too long.
    #[error("{MEDIUM_FILE} has {found} bytes, expected at most {MAX_MEDIUM_FILE}")]
    TooLong {
        /// Its size in bytes.
        found: usize,
    },
    /// A field is missing, unknown or wrong, or it is not JSON at all.
    #[error("{MEDIUM_FILE}: {0}")]
    Field(Problem),
    /// It is of a later mosfs.
    #[error("{MEDIUM_FILE}: found format {found}, expected {FORMAT}")]
    Format {
        /// The format.
        found: u64,
    },
    /// The right fields in another form.
    #[error("{MEDIUM_FILE} is not in canonical form")]
    NotCanonical,
}

impl Classified for MediumFileError {
    fn class(&self) -> Class {
        Class::Verification
    }
}

impl Medium {
    /// Returns what a medium with this system says.
    pub fn of(manifest: &SystemManifest) -> Self {
        Self { product: manifest.product, version: manifest.version, system: manifest.digest() }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// [`MediumFileError`] for anything but what [`Medium::to_bytes`] writes.
    pub fn parse(bytes: &[u8]) -> Result<Self, MediumFileError> {
        if bytes.len() > MAX_MEDIUM_FILE {
            return Err(MediumFileError::TooLong { found: bytes.len() });
        }
        let root = json::read(bytes).map_err(MediumFileError::Field)?;
        let mut decoder = Decoder::new(Dialect::Json);
        let decoded = decode(&mut decoder, &root);
        if let Some(problem) = decoder.into_problems().into_iter().next() {
            return Err(MediumFileError::Field(problem));
        }
        let (format, medium) = decoded.ok_or(MediumFileError::NotCanonical)?;
        if format != FORMAT {
            return Err(MediumFileError::Format { found: format });
        }
        if medium.to_bytes() != bytes {
            return Err(MediumFileError::NotCanonical);
        }
        Ok(medium)
    }

    /// Returns the file's bytes: `{"format":1,"product":UUID,"system":"sha256:HEX","version":N}`, reproducible JSON.
    pub fn to_bytes(self) -> Vec<u8> {
        let (product, system) = (self.product.to_string(), self.system.to_string());
        let root = Value::map([
            ("format", Some(Value::integer(FORMAT))),
            ("product", Some(Value::text(&product))),
            ("system", Some(Value::text(&system))),
            ("version", Some(Value::integer(self.version))),
        ]);
        json::write(&root.into())
    }

    /// The GUID of the medium's partition table: the same for the same system.
    pub fn disk_guid(&self) -> Uuid {
        self.derive("mosfs-medium-disk-v1")
    }

    /// The GUID of its EFI system partition. systemd's stub reports it in `LoaderDevicePartUUID`, unless the medium is a
    /// CD.
    pub fn esp_guid(&self) -> Uuid {
        self.derive("mosfs-medium-esp-v1")
    }

    /// The GUID of the partition that covers the ISO 9660 file system.
    pub fn iso_guid(&self) -> Uuid {
        self.derive("mosfs-medium-iso-v1")
    }

    /// The volume id of the FAT file system.
    pub fn fat_id(&self) -> u32 {
        self.esp_guid().as_fields().0
    }

    fn derive(&self, label: &str) -> Uuid {
        let mut hasher = Hasher::new();
        hasher.update(label.as_bytes());
        hasher.update(&[0]);
        hasher.update(self.system.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finish().as_bytes()[..16]);
        uuid::Builder::from_custom_bytes(bytes).into_uuid()
    }
}

fn decode(decoder: &mut Decoder, root: &Node<'_>) -> Option<(u64, Medium)> {
    let path = &Path::ROOT;
    let fields = decoder.fields(root, root.at, path, &["format", "product", "system", "version"])?;
    let format = decoder
        .required(&fields, path, "format", "1")
        .and_then(|node| decoder.integer(node, &path.field("format")));
    let product = decoder
        .required(&fields, path, "product", "the UUID of the product")
        .and_then(|node| decoder.text_as(node, &path.field("product"), rules::uuid));
    let system = decoder
        .required(&fields, path, "system", "the digest of the system manifest")
        .and_then(|node| decoder.text_as(node, &path.field("system"), rules::digest));
    let version = decoder
        .required(&fields, path, "version", "an integer from 1 to 9007199254740991")
        .and_then(|node| decoder.integer(node, &path.field("version")));
    Some((format?, Medium { product: product?, version: version?, system: system? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn medium() -> Medium {
        Medium {
            product: "de6c82c5-2e01-4c92-949b-a6545d30fc06".parse().unwrap(),
            version: 200,
            system: Digest::of(b"abc"),
        }
    }

    const TEXT: &str = concat!(
        r#"{"format":1,"product":"de6c82c5-2e01-4c92-949b-a6545d30fc06","#,
        r#""system":"sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad","version":200}"#
    );

    #[test]
    fn the_file_has_one_form() {
        assert_eq!(String::from_utf8(medium().to_bytes()).unwrap(), TEXT);
        assert_eq!(Medium::parse(TEXT.as_bytes()), Ok(medium()));
        let not = |text: &str| Medium::parse(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(not(&format!("{TEXT}\n")), "mosfs/medium.json is not in canonical form");
        assert_eq!(
            not(&TEXT.replace(r#"at":1"#, r#"at":2"#)),
            "mosfs/medium.json: found format 2, expected 1"
        );
        for (from, to, why) in [
            (r#","version":200"#, "", "version: found nothing"),
            (":200", ":0", "version: found `0`"),
            (":200", ":-1", "version: found `-1`"),
            (r#""format":1,"#, r#""format":1,"more":1,"#, "found the unknown field `more`"),
            ("sha256:ba", "sha512:ba", "system: found"),
            ("de6c", "zz6c", "product: found"),
            ("{", "", "found"),
        ] {
            let said = not(&TEXT.replacen(from, to, 1));
            assert!(said.contains(why), "{to}: {said}");
        }
        assert_eq!(not(&" ".repeat(5000)), "mosfs/medium.json has 5000 bytes, expected at most 4096");
    }

    #[test]
    fn another_system_has_other_identifiers() {
        let (one, other) = (medium(), Medium { system: Digest::of(b"abd"), ..medium() });
        let all = |m: Medium| [m.disk_guid(), m.esp_guid(), m.iso_guid()];
        assert_eq!(all(one), all(Medium { version: 9, ..one }));
        let mut ids: Vec<_> = all(one).into_iter().chain(all(other)).collect();
        assert!(ids.iter().all(|id| id.get_version_num() == 8 && id.get_variant() == uuid::Variant::RFC4122));
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 6);
    }

    #[test]
    fn a_label_may_be_cut_to_what_fat_has() {
        assert!(is_labelled("MOSFS-ANSWERS", ANSWERS_LABEL) && is_labelled("MOSFS-ANSWE", ANSWERS_LABEL));
        assert!(is_labelled("MOSFS-PROVI", PROVISION_LABEL));
        assert!(!is_labelled("MOSFS-ANS", ANSWERS_LABEL) && !is_labelled("MOSFS-INSTA", ANSWERS_LABEL));
    }

    #[test]
    fn only_a_boot_loader_that_knows_if_safe_is_asked_for_it() {
        let loader =
            |version: &str| format!("MZ\0\0#### LoaderInfo: systemd-boot {version} ####\0").into_bytes();
        for version in ["253", "257.7-1", "260~rc1", "1000"] {
            assert_eq!(loader_conf(&loader(version)), LOADER_CONF_TEXT, "{version}");
        }
        for version in ["252.39-1~deb12u2", "25", ""] {
            assert_eq!(loader_conf(&loader(version)), LOADER_CONF_TEXT_MANUAL, "{version}");
        }
        assert_eq!(loader_conf(b"another loader"), LOADER_CONF_TEXT_MANUAL);
        assert_eq!(loader_conf(&loader(&"9".repeat(40))), LOADER_CONF_TEXT);
    }
}
