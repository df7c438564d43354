//! How the layers of a target are made: the field `layer` of the import manifest.
//!
//! ```yaml
//! layer: {format: squashfs, compression: lz4, block_size: 64K}
//! ```
//!
//! It says what tar layers become. Layers that are file system images already stay as they are.

use super::decode::{Decoder, Path};
use super::rules;
use super::tree::{Node, Position, Value};

words! {
    /// The format of new layers (`layer.format`).
    LayerKind {
        /// squashfs. The default.
        Squashfs = "squashfs",
        /// erofs.
        Erofs = "erofs",
    }
}

words! {
    /// The codec of new layers (`layer.compression`).
    LayerCompression {
        /// zstd. The default of squashfs.
        Zstd = "zstd",
        /// lz4, compressed by its high-compression mode. The default of erofs.
        Lz4 = "lz4",
    }
}

/// What the publisher chose for the layers of a target. What is `None` was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerChoice {
    /// Their format.
    pub format: Option<LayerKind>,
    /// What compresses their blocks.
    pub compression: Option<LayerCompression>,
    /// Size of their blocks, of erofs of their physical clusters, in bytes.
    pub block_bytes: Option<u32>,
    /// The position of the field in the file.
    pub at: Position,
}

const FIELDS: &[&str] = &["format", "compression", "block_size"];

/// Decodes the field `layer`.
pub(super) fn decode(decoder: &mut Decoder, node: &Node<'_>, path: &Path<'_>) -> Option<LayerChoice> {
    let fields = decoder.fields(node, node.at, path, FIELDS)?;
    let format = decoder.optional(&fields, path, "format", |decoder, node, path| {
        decoder.word(node, path, LayerKind::WORDS, LayerKind::from_word)
    });
    let compression = decoder.optional(&fields, path, "compression", |decoder, node, path| {
        decoder.word(node, path, LayerCompression::WORDS, LayerCompression::from_word)
    });
    let block_bytes = decoder.optional(&fields, path, "block_size", |decoder, node, path| {
        decoder.text_as(node, path, rules::block_size)
    });
    Some(LayerChoice { format: format?, compression: compression?, block_bytes: block_bytes?, at: node.at })
}

impl LayerChoice {
    /// The field as it is written.
    pub(super) fn tree(&self) -> Value<'static> {
        let size = |bytes| rules::BLOCK_SIZES.iter().find(|(_, known)| *known == bytes);
        let size = self.block_bytes.and_then(size);
        Value::map([
            ("format", self.format.map(|word| Value::text(word.as_str()))),
            ("compression", self.compression.map(|word| Value::text(word.as_str()))),
            ("block_size", size.map(|(word, _)| Value::text(word))),
        ])
    }
}
