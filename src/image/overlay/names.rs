//! The attributes by which overlayfs knows what a layer hides.
//!
//! Rules (Linux `Documentation/filesystems/overlayfs.rst`, for mounts without the option `userxattr`,
//! which is how the kernel backend mounts):
//! - `trusted.overlay.opaque` = `y` on a folder hides the folders below it; the value `x` marks a folder
//!   that has whiteouts made of attributes;
//! - `trusted.overlay.whiteout` on an empty regular file makes it a whiteout;
//! - no other attribute under `trusted.overlay.` is shown, but for the escaped ones:
//!   `trusted.overlay.overlay.NAME` is shown as `trusted.overlay.NAME`, one level less;
//! - `user.overlay.NAME` means nothing, and is shown like any other attribute.

/// `y`: the folder hides what the layers below have at its place.
pub const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// On an empty regular file: the name is deleted.
pub const WHITEOUT: &[u8] = b"trusted.overlay.whiteout";
/// The folder's content is elsewhere in the stack.
pub const REDIRECT: &[u8] = b"trusted.overlay.redirect";
/// The file's content is elsewhere in the stack.
pub const METACOPY: &[u8] = b"trusted.overlay.metacopy";

/// What overlayfs' own attributes begin with.
const OWN: &[u8] = b"trusted.overlay.";
/// What an attribute of the content begins with where its own name would begin with [`OWN`].
const ESCAPED: &[u8] = b"trusted.overlay.overlay.";
/// The same for mounts with the option `userxattr`.
const OWN_OF_USERS: &[u8] = b"user.overlay.";

/// The name that a mount shows of an attribute of a layer; `None` where it shows none.
pub fn shown(name: Vec<u8>) -> Option<Vec<u8>> {
    match name.strip_prefix(ESCAPED) {
        Some(rest) => Some([OWN, rest].concat()),
        None if name.starts_with(OWN) => None,
        None => Some(name),
    }
}

/// Whether an attribute that a mount shows by this name has another one in the layer.
pub fn is_renamed(shown: &[u8]) -> bool {
    shown.starts_with(OWN)
}

/// Whether an attribute would steer an overlay, of whatever options.
pub fn steers(name: &[u8]) -> bool {
    name.starts_with(OWN) || name.starts_with(OWN_OF_USERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_level_of_escapes_is_taken_off() {
        let shown = |name: &[u8]| shown(name.to_vec());
        assert_eq!(shown(b"trusted.overlay.opaque"), None);
        assert_eq!(shown(b"trusted.overlay.anything"), None);
        assert_eq!(shown(b"trusted.overlay.overlay.opaque").unwrap(), b"trusted.overlay.opaque");
        let twice = b"trusted.overlay.overlay.overlay.x";
        assert_eq!(shown(twice).unwrap(), b"trusted.overlay.overlay.x");
        for same in ["trusted.overlayx", "trusted.x", "user.overlay.opaque", "user.overlay.overlay.opaque"] {
            assert_eq!(shown(same.as_bytes()).unwrap(), same.as_bytes());
        }
        assert!(is_renamed(b"trusted.overlay.opaque"));
        for same in ["trusted.overlayx", "trusted.x", "user.overlay.opaque", "security.selinux"] {
            assert!(!is_renamed(same.as_bytes()), "{same}");
        }
    }
}
