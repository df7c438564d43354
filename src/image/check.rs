//! Reading all content of a layer, whatever its format: each stored block once.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::layer::{BlockId, FileType, Layer, LayerError, NodeId, Place};
use crate::progress::Progress;
use crate::sorting;
use crate::sys::locks;

/// Reads, verifies and decodes every stored block that a file of the layer uses, on up to `threads` threads.
///
/// For a format whose reader has checked the tree when it was opened: folders are walked as they are. Returns what
/// is wrong, in the order of the blocks. Memory: 16 bytes for each block, 8 for each file of a walk.
pub fn content(layer: &dyn Layer, threads: NonZeroUsize, progress: &Progress) -> Vec<LayerError> {
    let blocks = match blocks(layer) {
        Ok(blocks) => blocks.into_iter().collect::<Vec<_>>(),
        Err(error) => return vec![error],
    };
    let decoded = blocks.iter().map(|block| u64::from(block.decoded_max)).sum();
    let task = progress.task("verify", "content", Some(decoded));
    let (next, bad) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        let mut out = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = blocks.get(number) else { return };
            if let Err(error) = layer.decode(*block, &mut out) {
                locks::lock(&bad).push((number, error));
            }
            task.advance(block.decoded_max.into());
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(blocks.len().max(1)) {
            scope.spawn(work);
        }
        work();
    });
    let mut bad = locks::into_inner(bad);
    sorting::sort_by_key(&mut bad, |(number, _)| *number);
    bad.into_iter().map(|(_, error)| error).collect()
}

/// All stored blocks that files use.
fn blocks(layer: &dyn Layer) -> Result<BTreeSet<BlockId>, LayerError> {
    let mut blocks = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut todo: Vec<NodeId> = vec![layer.root()];
    while let Some(folder) = todo.pop() {
        let mut files = Vec::new();
        layer.read_dir(folder, 0, &mut |entry| {
            match entry.kind {
                FileType::Directory => todo.push(entry.node),
                FileType::Regular => files.push(entry.node),
                _ => {}
            }
            true
        })?;
        for file in files.into_iter().filter(|file| seen.insert(*file)) {
            let size = layer.attr(file)?.size_bytes;
            let mut at = 0;
            while at < size {
                let extent = layer.extent(file, at)?;
                if let Place::Block(block) | Place::Shared { block, .. } = extent.place {
                    blocks.insert(block);
                }
                let end = extent.file_offset.saturating_add(extent.len.into());
                if end <= at {
                    let why = format!("expected an extent that holds offset {at}, found one up to {end}");
                    return Err(LayerError::Corrupt { table: "extent", offset: at, why });
                }
                at = end;
            }
        }
    }
    Ok(blocks)
}
