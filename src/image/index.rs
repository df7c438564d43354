//! OCI image indexes: `index.json` of a layout, or the platforms of an image. Rules as in [`super::oci`].
//!
//! Bounds: [`MAX_INDEX_BYTES`], [`MAX_INDEX_ENTRIES`].

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::oci::{
    DOCKER_INDEX, Descriptor, INDEX, OciError, REF_NAME, bounded, check_kind, check_schema, json, limit,
    null_is_empty, to_bytes,
};

/// The largest `index.json` that is read, in bytes.
pub const MAX_INDEX_BYTES: u64 = 16 << 20;
/// The most entries that an index may have.
pub const MAX_INDEX_ENTRIES: usize = 65_536;

/// An image index: `index.json` of a layout, or a list of the platforms of an image
/// (image-spec, image-index.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "IndexDocument", into = "IndexDocument")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// [`INDEX`]; many tools leave it out.
    pub media_type: Option<String>,
    /// Manifests and nested indexes.
    pub manifests: Vec<Descriptor>,
    /// The entries that mosfs cannot read, as they were written: with a digest of another algorithm, say. They
    /// are passed over, and written back behind the others.
    pub unread: Vec<UnreadEntry>,
    /// Free words about it.
    pub annotations: BTreeMap<String, String>,
    /// The fields that mosfs does not know.
    pub extra: BTreeMap<String, Value>,
}

/// An entry of an index that is no descriptor to mosfs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnreadEntry(Value);

impl UnreadEntry {
    /// Returns its name in `index.json`.
    pub fn ref_name(&self) -> Option<&str> {
        self.0.get("annotations")?.get(REF_NAME)?.as_str()
    }

    /// Why it cannot be read.
    pub fn why(&self) -> String {
        serde_json::from_value::<Descriptor>(self.0.clone())
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    }
}

/// An index as it is written.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IndexDocument {
    schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    manifests: Vec<IndexEntry>,
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    extra: BTreeMap<String, Value>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum IndexEntry {
    Read(Box<Descriptor>),
    Unread(UnreadEntry),
}

impl<'de> Deserialize<'de> for IndexEntry {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // From the value that would be written back, in which a field that was given twice has its last value: so an
        // entry that cannot be read now cannot be read after it was written either.
        let entry = Value::deserialize(from)?;
        Ok(match Descriptor::deserialize(&entry) {
            Ok(descriptor) => Self::Read(Box::new(descriptor)),
            Err(_) => Self::Unread(UnreadEntry(entry)),
        })
    }
}

impl From<IndexDocument> for Index {
    fn from(document: IndexDocument) -> Self {
        let IndexDocument { schema_version, media_type, manifests: entries, annotations, extra } = document;
        let (mut manifests, mut unread) = (Vec::new(), Vec::new());
        for entry in entries {
            match entry {
                IndexEntry::Read(descriptor) => manifests.push(*descriptor),
                IndexEntry::Unread(entry) => unread.push(entry),
            }
        }
        Self { schema_version, media_type, manifests, unread, annotations, extra }
    }
}

impl From<Index> for IndexDocument {
    fn from(index: Index) -> Self {
        let Index { schema_version, media_type, manifests, unread, annotations, extra } = index;
        let read = manifests.into_iter().map(|descriptor| IndexEntry::Read(Box::new(descriptor)));
        let entries = read.chain(unread.into_iter().map(IndexEntry::Unread)).collect();
        Self { schema_version, media_type, manifests: entries, annotations, extra }
    }
}

impl Index {
    /// An index without entries.
    pub fn empty() -> Self {
        Self {
            schema_version: 2,
            media_type: Some(INDEX.into()),
            manifests: Vec::new(),
            unread: Vec::new(),
            annotations: BTreeMap::new(),
            extra: BTreeMap::new(),
        }
    }

    /// Reads an index; `max_bytes` is [`MAX_INDEX_BYTES`] or [`MAX_MANIFEST_BYTES`](super::oci::MAX_MANIFEST_BYTES).
    ///
    /// # Errors
    /// See [`OciError`].
    pub fn parse(bytes: &[u8], max_bytes: u64) -> Result<Self, OciError> {
        bounded("image index", bytes, max_bytes)?;
        let index: Self = json("image index", bytes)?;
        check_kind("image index", index.media_type.as_deref(), &[INDEX, DOCKER_INDEX])?;
        if let Some(field) = ["layers", "config"].into_iter().find(|field| index.extra.contains_key(*field)) {
            return Err(OciError::Ambiguous { document: "image index", field });
        }
        check_schema("image index", index.schema_version)?;
        limit("image index", "entries", index.manifests.len() + index.unread.len(), MAX_INDEX_ENTRIES)?;
        Ok(index)
    }

    /// The bytes that are stored: always the same for the same value.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    #[test]
    fn a_list_that_go_never_allocated_is_empty() {
        assert_eq!(Index::parse(br#"{"schemaVersion":2,"manifests":null}"#, 1000).unwrap().manifests, []);
    }

    #[test]
    fn an_index_is_no_manifest() {
        let both = br#"{"schemaVersion":2,"manifests":[],"layers":[]}"#;
        assert!(matches!(Index::parse(both, 1000), Err(OciError::Ambiguous { field: "layers", .. })));
    }

    #[test]
    fn unknown_fields_survive_and_bytes_are_stable() {
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"m","digest":"{D}","size":2,"annotations":{{"a":"1","b":"2"}},"data":"e30=","urls":["u"]}}],"x":{{"y":[1]}}}}"#
        );
        let index = Index::parse(text.as_bytes(), MAX_INDEX_BYTES).unwrap();
        assert_eq!(String::from_utf8(index.to_bytes()).unwrap(), text);
    }

    #[test]
    fn entries_that_cannot_be_read_are_kept() {
        let odd = r#"{"annotations":{"org.opencontainers.image.ref.name":"other"},"digest":"sha512:00","mediaType":"m","size":2}"#;
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{odd},{{"mediaType":"m","digest":"{D}","size":2}},7]}}"#
        );
        let index = Index::parse(text.as_bytes(), MAX_INDEX_BYTES).unwrap();
        assert_eq!((index.manifests.len(), index.unread.len()), (1, 2));
        assert_eq!(index.unread[0].ref_name(), Some("other"));
        assert!(index.unread[0].why().contains("sha512:00"), "{}", index.unread[0].why());
        let back = Index::parse(&index.to_bytes(), MAX_INDEX_BYTES).unwrap();
        assert_eq!(back, index);
        assert!(String::from_utf8(index.to_bytes()).unwrap().contains(odd));
    }

    #[test]
    fn an_entry_with_a_field_twice_reads_the_same_after_it_was_written() {
        let twice = format!(r#"{{"digest":"sha512:00","mediaType":"m","size":2,"digest":"{D}"}}"#);
        let text = format!(r#"{{"schemaVersion":2,"manifests":[7,{twice}]}}"#);
        let index = Index::parse(text.as_bytes(), MAX_INDEX_BYTES).unwrap();
        assert_eq!((index.manifests.len(), index.unread.len()), (1, 1));
        assert_eq!(index.manifests[0].digest.to_string(), D);
        assert_eq!(Index::parse(&index.to_bytes(), MAX_INDEX_BYTES).unwrap(), index);
    }
}
