//! Which hard links of a lower layer are hidden by the layers above it.
//!
//! A layer counts all links that it has. Where a layer above hides some of them, the merged view shows
//! fewer, and so does the tree that the image unpacks to. The difference is found once, when
//! somebody first asks for the link count of a file below the top layer that has more than one: by
//! a walk of the merged folders alone and of the trees that are hidden in them. Folders that one
//! layer has alone are not walked.

use std::collections::HashMap;

use super::cursor::Merge;
use super::{Chain, Merged, OverlayError, Part, at};
use crate::image::layer::{FileType, LayerError};
use crate::image::source::ReadError;

/// For each file with hidden links how many they are.
///
/// The walk looks at no more entries than the layers say that they have files (twice, and 1,000
/// more), so that a tree that loops comes to an end. Beyond that, or on an error, it gives up
/// with what it has, and says so in the log.
///
/// # Errors
/// One of reading, which may be another one at the next time (a network).
pub(super) fn hidden_links(view: &Merged, root: &[Part]) -> Result<HashMap<Part, u32>, OverlayError> {
    let mut walk = Walk {
        view,
        hidden: HashMap::new(),
        budget: view.stat_fs().files.saturating_mul(2).saturating_add(1000),
    };
    match walk.merged(root) {
        Ok(true) => {}
        Ok(false) => {
            log::warn!("link counts: more entries than the layers have files; some counts are too high")
        }
        Err(error @ OverlayError::Layer { source: LayerError::Read(ReadError::Io { .. }), .. }) => {
            return Err(error);
        }
        Err(error) => log::warn!("link counts: {error}; some counts are too high"),
    }
    Ok(walk.hidden)
}

struct Walk<'a> {
    view: &'a Merged,
    hidden: HashMap<Part, u32>,
    /// How many entries may still be looked at.
    budget: u64,
}

impl Walk<'_> {
    /// Walks merged folders from `root` down. Returns false where the budget ran out.
    fn merged(&mut self, root: &[Part]) -> Result<bool, OverlayError> {
        let mut todo: Vec<Box<[Part]>> = vec![root.into()];
        while let Some(parts) = todo.pop() {
            let mut merge = Merge::new(self.view, &parts, None)?;
            while let Some(group) = merge.next()? {
                let mut chain = Chain::default();
                let mut more = true;
                for (part, entry) in group.iter() {
                    if !self.spend() {
                        return Ok(false);
                    }
                    let found = Part { layer: part.layer, node: entry.node };
                    let visible = chain.parts.len();
                    more = more && self.view.extend(&mut chain, found, entry.kind)?;
                    if chain.parts.len() == visible && !self.hide(found, entry.kind)? {
                        return Ok(false);
                    }
                }
                if chain.parts.len() > 1 {
                    todo.push(chain.parts.into_boxed_slice());
                }
                merge.accept();
            }
        }
        Ok(true)
    }

    /// Counts a hidden file, or all files of a hidden folder.
    fn hide(&mut self, part: Part, kind: FileType) -> Result<bool, OverlayError> {
        if kind != FileType::Directory {
            self.count(part)?;
            return Ok(true);
        }
        let mut todo = vec![part];
        while let Some(dir) = todo.pop() {
            let mut files = Vec::new();
            let mut within = true;
            self.view.layers[dir.layer]
                .read_dir(dir.node, 0, &mut |entry| {
                    within = self.budget > 0;
                    self.budget = self.budget.saturating_sub(1);
                    let found = Part { layer: dir.layer, node: entry.node };
                    match entry.kind {
                        FileType::Directory => todo.push(found),
                        _ => files.push(found),
                    }
                    within
                })
                .map_err(|source| at(dir, source))?;
            for file in files {
                self.count(file)?;
            }
            if !within {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn count(&mut self, part: Part) -> Result<(), OverlayError> {
        if self.view.part_attr(part)?.nlink > 1 {
            let count = self.hidden.entry(part).or_default();
            *count = count.saturating_add(1);
        }
        Ok(())
    }

    fn spend(&mut self) -> bool {
        let within = self.budget > 0;
        self.budget = self.budget.saturating_sub(1);
        within
    }
}
