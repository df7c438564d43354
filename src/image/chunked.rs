//! A layer of many blobs: one of metadata, which names the others, the chunks, by their digests.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::blobs::Blobs;
use crate::digest::Digest;

/// The chunks that a manifest lists: the digest and the stored size of each, in bytes.
pub type Chunks = BTreeMap<Digest, u64>;

/// What a chunked layer is read from.
#[derive(Debug, Clone)]
pub struct ChunkedLayer {
    /// The blob of metadata.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// The chunks that the manifest lists. One that is not among them is not copied and may be collected, so a
    /// layer that uses it is refused.
    pub chunks: Arc<Chunks>,
    /// Where the blobs are.
    pub blobs: Arc<dyn Blobs>,
}
