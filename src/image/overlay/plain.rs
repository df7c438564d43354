//! One image that is no layer of a stack, shown as it is.
//!
//! The rules of overlayfs do not apply: a character device 0:0 is shown as one, and so is every attribute. The user can
//! have a folder of the image as the root, and all files belong to one user or group.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::{Merged, OverlayError, Part};
use crate::image::layer::{Attr, FileType, Layer, LayerError};

/// How a plain image is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shown {
    /// The folder of the image that is shown as the root; empty for the image's own root.
    pub subdir: PathBuf,
    /// The owner of all files, in place of those in the image.
    pub uid: Option<u32>,
    /// The group of all files, in place of those in the image.
    pub gid: Option<u32>,
}

impl Shown {
    pub(super) fn attr(&self, attr: Attr) -> Attr {
        Attr { uid: self.uid.unwrap_or(attr.uid), gid: self.gid.unwrap_or(attr.gid), ..attr }
    }
}

impl Merged {
    /// The view of one image that is no layer.
    ///
    /// # Errors
    /// [`OverlayError::Subdir`], or a folder that cannot be read.
    pub fn plain(image: Arc<dyn Layer>, shown: Shown) -> Result<Self, OverlayError> {
        let root = subdir(&*image, &shown.subdir)?;
        Ok(Self::with_root(vec![image], vec![root], Some(shown)))
    }
}

/// The folder of an image; symbolic links are not followed.
fn subdir(image: &dyn Layer, folder: &Path) -> Result<Part, OverlayError> {
    let wrong = |why: &str| OverlayError::Subdir { folder: folder.to_path_buf(), why: why.to_string() };
    let failed = |source: LayerError| OverlayError::Layer { layer: 0, source };
    let mut node = image.root();
    for component in folder.components() {
        let name = match component {
            Component::RootDir | Component::CurDir => continue,
            Component::Normal(name) => name.as_bytes(),
            Component::ParentDir | Component::Prefix(_) => return Err(wrong("`..` leads out of a folder")),
        };
        let Some(entry) = image.lookup(node, name).map_err(failed)? else {
            return Err(wrong(&format!("no file is called `{}`", name.escape_ascii())));
        };
        if entry.kind != FileType::Directory {
            return Err(wrong(&format!("`{}` is not a folder", name.escape_ascii())));
        }
        node = entry.node;
    }
    Ok(Part { layer: 0, node })
}
