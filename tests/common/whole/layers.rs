//! Layers written entry by entry, for what no tool would write, or not in that order.

use std::fs;
use std::path::Path;

use tar::{Builder, EntryType, Header};

use super::commands::{command, join, run};

/// A tar layer in the making.
pub struct Layer {
    tar: Builder<Vec<u8>>,
    mtime: u64,
}

/// An empty layer.
pub fn layer() -> Layer {
    Layer { tar: Builder::new(Vec::new()), mtime: 1_500_000_000 }
}

impl Layer {
    /// One entry of any kind. Each has an mtime of its own.
    pub fn entry(mut self, path: &[u8], kind: EntryType, mode: u32, link: &[u8], content: &[u8]) -> Self {
        self.mtime += 1;
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(self.mtime);
        header.set_size(content.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(0).expect("a device number");
            header.set_device_minor(0).expect("a device number");
        }
        // Written into the field, for the crate refuses names that lead astray.
        let gnu = header.as_gnu_mut().expect("a GNU header");
        gnu.name[..path.len()].copy_from_slice(path);
        gnu.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.tar.append(&header, content).expect("append to the tar");
        self
    }

    /// A regular file.
    pub fn file(self, path: &str, content: &str) -> Self {
        self.entry(path.as_bytes(), EntryType::Regular, 0o644, b"", content.as_bytes())
    }

    /// A regular file of any bytes.
    pub fn content(self, path: &str, content: &[u8]) -> Self {
        self.entry(path.as_bytes(), EntryType::Regular, 0o644, b"", content)
    }

    /// A folder.
    pub fn dir(self, path: &str) -> Self {
        self.entry(path.as_bytes(), EntryType::Directory, 0o755, b"", b"")
    }

    /// Another name of a file.
    pub fn hard(self, path: &str, target: &str) -> Self {
        self.entry(path.as_bytes(), EntryType::Link, 0o644, target.as_bytes(), b"")
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path.as_bytes(), EntryType::Symlink, 0o777, target.as_bytes(), b"")
    }

    /// Extended headers of the next entry.
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.tar.append_pax_extensions(records.iter().copied()).expect("append to the tar");
        self
    }

    /// The finished tar.
    pub fn bytes(self) -> Vec<u8> {
        self.tar.into_inner().expect("finish the tar")
    }
}

/// Makes the image `name` of a new layout, or another one of it, of these layers, the first is the bottom.
pub fn image(layout: &Path, name: &str, layers: Vec<Layer>) {
    let image = join(layout, ":", name);
    if !layout.exists() {
        run(command("umoci").args(["init", "--layout"]).arg(layout));
    }
    run(command("umoci").args(["new", "--image"]).arg(&image));
    for layer in layers {
        let file = layout.with_extension("tar");
        fs::write(&file, layer.bytes()).expect("write the tar");
        run(command("umoci").args(["raw", "add-layer", "--image"]).arg(&image).arg(&file));
        fs::remove_file(file).expect("remove the tar");
    }
}
