//! The backends: who can serve a mount, and the names by which the kernel's lists and our records know them.

use std::str::FromStr;

/// The name of the kernel's backend in records.
pub const DM_VERITY: &str = "dm-verity";

/// The name of the FUSE backend in records.
pub const FUSE: &str = "fuse";

/// The type that the kernel lists our FUSE mounts with.
pub const FUSE_KIND: &str = "fuse.mosfs";

/// What the mount table shows as the device of our overlays begins so; what was asked for follows.
pub const OVERLAY_SOURCE_PREFIX: &str = "mosfs:";

/// Who serves a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backend {
    /// dm-verity where the user is root and the kernel can, else FUSE.
    #[default]
    Auto,
    /// The kernel: loop, dm-verity, squashfs or erofs, overlayfs.
    DmVerity,
    /// A daemon that reads and verifies in user space.
    Fuse,
}

impl Backend {
    /// The names that `--backend` takes.
    pub const NAMES: [(&'static str, Backend); 3] =
        [("auto", Backend::Auto), ("dm-verity", Backend::DmVerity), ("fuse", Backend::Fuse)];
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        by_name(&Self::NAMES, text, "is not a backend")
    }
}

/// The value of that name; else a sentence with the names that there are.
pub(super) fn by_name<T: Copy>(names: &[(&str, T)], text: &str, wrong: &str) -> Result<T, String> {
    names.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
        let (last, others) = names.split_last().map_or(("", names), |((last, _), others)| (*last, others));
        let others: Vec<&str> = others.iter().map(|(name, _)| *name).collect();
        format!("`{text}` {wrong}; expected {} or {last}", others.join(", "))
    })
}
