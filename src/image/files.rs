//! Files of a merged view by their paths, for a program that reads an image without mounting it.
//!
//! Links are followed within the image: an absolute target begins at the image's own root, and `..` does not lead
//! above it. So a hostile image cannot name a file of this machine.

use super::layer::{Attr, FileType, LayerError, Place};
use super::overlay::{Merged, OverlayError, ROOT};

/// How many links a path may lead through (`MAXSYMLINKS` in linux/namei.h).
const MAX_LINKS: usize = 40;
/// Longest path that is resolved, in bytes (`PATH_MAX` in linux/limits.h).
const MAX_PATH: usize = 4096;

/// Why a file of an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The image cannot be read, or does not verify.
    #[error("/{path}: {source}")]
    Image {
        /// The path, without the leading slash.
        path: String,
        /// What the view says.
        source: OverlayError,
    },
    /// A file's content cannot be decoded.
    #[error("/{path}: {source}")]
    Content {
        /// The path, without the leading slash.
        path: String,
        /// What the layer says.
        source: LayerError,
    },
    /// Links that lead in a circle, or a path that grows without end.
    #[error("/{path}: more than {MAX_LINKS} links, or a path of more than {MAX_PATH} bytes")]
    Links {
        /// The path, without the leading slash.
        path: String,
    },
    /// A folder, a device or the like where a regular file was expected.
    #[error("/{path} is not a regular file")]
    NotRegular {
        /// The path, without the leading slash.
        path: String,
    },
    /// A file that is larger than its reader expects.
    #[error("/{path} has {found} bytes, expected at most {max}")]
    TooBig {
        /// The path, without the leading slash.
        path: String,
        /// Its size in bytes.
        found: u64,
        /// The most bytes that are read.
        max: u64,
    },
}

/// A file of an image.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its inode number in the view.
    pub ino: u64,
    /// What stat(2) shows of it.
    pub attr: Attr,
    /// Its path after all links, without the leading slash.
    pub path: String,
}

/// The files of an image.
pub struct Files {
    view: Merged,
}

impl Files {
    /// Returns the files of a merged view.
    pub fn new(view: Merged) -> Self {
        Self { view }
    }

    /// Returns what is at a path, after all links; `None` if there is nothing.
    ///
    /// # Errors
    /// [`FilesError::Image`], [`FilesError::Links`].
    pub fn find(&self, path: &str) -> Result<Option<Found>, FilesError> {
        let failed = |source| FilesError::Image { path: path.trim_matches('/').into(), source };
        let endless = || FilesError::Links { path: path.trim_matches('/').into() };
        let mut links = 0;
        // The names that are still to be looked up, the next one last.
        let mut todo: Vec<Vec<u8>> = names(path.as_bytes()).rev().map(<[u8]>::to_vec).collect();
        let mut done: Vec<(u64, Vec<u8>)> = Vec::new();
        let (mut ino, mut attr) = (ROOT, self.view.attr(ROOT).map_err(failed)?);
        while let Some(name) = todo.pop() {
            if attr.kind != FileType::Directory {
                return Ok(None);
            }
            if name == b".." {
                done.pop();
                ino = done.last().map_or(ROOT, |(ino, _)| *ino);
                attr = self.view.attr(ino).map_err(failed)?;
                continue;
            }
            let Some((next, found)) = self.view.lookup(ino, &name).map_err(failed)? else { return Ok(None) };
            if found.kind != FileType::Symlink {
                done.push((next, name));
                (ino, attr) = (next, found);
                continue;
            }
            links += 1;
            let target = self.view.read_link(next).map_err(failed)?;
            let length = todo.iter().map(|name| name.len() + 1).sum::<usize>() + target.len();
            if links > MAX_LINKS || length > MAX_PATH {
                return Err(endless());
            }
            if target.starts_with(b"/") {
                done.clear();
                (ino, attr) = (ROOT, self.view.attr(ROOT).map_err(failed)?);
            }
            todo.extend(names(&target).rev().map(<[u8]>::to_vec));
        }
        let parts: Vec<_> = done.iter().map(|(_, name)| String::from_utf8_lossy(name)).collect();
        Ok(Some(Found { ino, attr, path: parts.join("/") }))
    }

    /// Reads a regular file whole; `None` if there is nothing at the path.
    ///
    /// # Errors
    /// [`FilesError`]; [`FilesError::TooBig`] before anything is read.
    pub fn read(&self, path: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, FilesError> {
        let Some(found) = self.find(path)? else { return Ok(None) };
        let path = || path.trim_matches('/').to_string();
        if found.attr.kind != FileType::Regular {
            return Err(FilesError::NotRegular { path: path() });
        }
        let size = found.attr.size_bytes;
        if size > max_bytes {
            return Err(FilesError::TooBig { path: path(), found: size, max: max_bytes });
        }
        let (mut bytes, mut block) = (Vec::new(), Vec::new());
        while (bytes.len() as u64) < size {
            let at = bytes.len() as u64;
            let image = |source| FilesError::Image { path: path(), source };
            let (layer, extent) = self.view.extent(found.ino, at).map_err(image)?;
            // The view has checked that the extent holds `at`.
            let (skip, len) = ((at - extent.file_offset) as usize, extent.len as usize);
            let left = usize::try_from(size - at).unwrap_or(usize::MAX);
            let take = (len - skip).min(left);
            let (id, begin) = match extent.place {
                Place::Hole => {
                    bytes.resize(bytes.len() + take, 0);
                    continue;
                }
                Place::Block(id) => (id, skip),
                Place::Shared { block, offset } => (block, offset as usize + skip),
            };
            let content = |source| FilesError::Content { path: path(), source };
            self.view.layers()[layer].decode(id, &mut block).map_err(content)?;
            let Some(part) = block.get(begin..).and_then(|rest| rest.get(..take)) else {
                let why = format!("a block of {} bytes, expected {} at {begin}", block.len(), take);
                return Err(content(LayerError::Corrupt { table: "data block", offset: id.start, why }));
            };
            bytes.extend_from_slice(part);
        }
        Ok(Some(bytes))
    }

    /// Returns the names in a folder that are UTF-8, in the order of their bytes; none if it is not a folder.
    ///
    /// # Errors
    /// [`FilesError`].
    pub fn list(&self, path: &str) -> Result<Vec<String>, FilesError> {
        let mut names = Vec::new();
        let Some(found) = self.find(path)? else { return Ok(names) };
        if found.attr.kind == FileType::Directory {
            let each = &mut |entry: super::overlay::Entry| {
                names.extend(String::from_utf8(entry.name));
                true
            };
            let failed = |source| FilesError::Image { path: path.trim_matches('/').into(), source };
            self.view.read_dir(found.ino, 0, each).map_err(failed)?;
        }
        Ok(names)
    }
}

/// The names of a path, without empty ones and `.`.
fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".")
}
