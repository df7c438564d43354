//! Reading a squashfs image through before it is taken over: what is signed can be mounted and read.
//!
//! The digest says that the image is the one its publisher meant, and the hash tree will say that each block is
//! what it was. Neither says that it makes sense: images with unsorted folders or broken tables are in use, and fail
//! when somebody looks.

use std::ops::ControlFlow;

use super::ConvertError;
use crate::image::overlay::names;
use crate::image::source::Source;
use crate::image::squashfs::{Compressor, Event, Squashfs, Superblock};
use crate::image::{Layer, LayerError};
use std::sync::Arc;

/// Opens an image and reads all of it: tables, folders, inodes, attributes, and each block of content. Returns its
/// superblock.
///
/// # Errors
/// [`ConvertError::Unreadable`] with the first fault and the number of the others;
/// [`ConvertError::NotForKernel`] and [`ConvertError::Steers`] for what one backend would serve otherwise than the
/// other.
pub(super) fn squashfs(source: Arc<dyn Source>) -> Result<Superblock, ConvertError> {
    let unreadable = |source| ConvertError::Unreadable { path: "/".into(), source, others: 0 };
    let image = Squashfs::open(source).map_err(unreadable)?;
    // lz4_comp_opts() of fs/squashfs/lz4_wrapper.c refuses an image without options, or with another version.
    if image.superblock().compressor == Compressor::Lz4 {
        let options = image.compressor_options().map_err(unreadable)?;
        if options.as_deref().and_then(|options| options.first_chunk()) != Some(&1u32.to_le_bytes()) {
            let why = "it is compressed with lz4 and has no options of lz4's format 1".into();
            return Err(ConvertError::NotForKernel { why });
        }
    }
    // fs/squashfs/decompressor.c has no such decoder.
    if image.superblock().compressor == Compressor::Lzma {
        let why = "it is compressed with lzma, which the kernel's squashfs cannot decode".into();
        return Err(ConvertError::NotForKernel { why });
    }
    let mut first: Option<(String, LayerError)> = None;
    let mut others = 0u64;
    let mut steers = None;
    let _ = image.check_all(&mut |event| {
        match event {
            Event::Problem { path, error } if first.is_none() => {
                first = Some((super::tar::show(path), error))
            }
            Event::Problem { .. } => others += 1,
            Event::Node { path, node, attr } if attr.has_xattrs && steers.is_none() => {
                // What cannot be read comes as a problem of its own.
                let all = image.xattrs(node).unwrap_or_default();
                // kernel_overlay.rs mounts with redirect_dir=nofollow and metacopy=off: the kernel refuses these names.
                let found = all.iter().find(|(name, _)| name == names::REDIRECT || name == names::METACOPY);
                steers = found.map(|(name, _)| (super::tar::show(path), super::tar::show(name)));
            }
            Event::Node { .. } | Event::Content(_) => {}
        }
        ControlFlow::Continue(())
    });
    if let Some((path, source)) = first {
        return Err(ConvertError::Unreadable { path, source, others });
    }
    match steers {
        Some((path, name)) => Err(ConvertError::Steers { path, name }),
        None => Ok(*image.superblock()),
    }
}
