//! What the mount table shows as the source of a mount: what the user asked for, cut where it is too long.
//!
//! Records hold the whole text; nothing is found by what is shown here.

use std::borrow::Cow;

/// The longest source that mount(2) takes is PATH_MAX with its NUL, in bytes; some is left for escapes.
pub(super) const MOUNT_BYTES_MAX: usize = 4000;
/// The longest value of an option of fsconfig(2), in bytes: 256 with its NUL (fs/fsopen.c).
pub(super) const FSCONFIG_BYTES_MAX: usize = 255;

/// Stands for what was cut out.
const CUT: &str = "…";

/// The source in at most `max` bytes: its beginning and its end, which have the scheme and the name.
pub(super) fn cut(source: &str, max: usize) -> Cow<'_, str> {
    if source.len() <= max {
        return Cow::Borrowed(source);
    }
    let keep = max.saturating_sub(CUT.len());
    let is_boundary = |at: &usize| source.is_char_boundary(*at);
    let head = (0..=keep / 3).rev().find(is_boundary).unwrap_or(0);
    let tail = (source.len() - (keep - keep / 3)..=source.len()).find(is_boundary).unwrap_or(source.len());
    Cow::Owned([&source[..head], CUT, &source[tail..]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_their_beginning_and_end() {
        assert_eq!(cut("oci:/d:name", 255), "oci:/d:name");
        let long = format!("oci:/{}:name", "ü/".repeat(3000));
        for max in [3, 4, 10, 255, 4000] {
            let short = cut(&long, max);
            assert!(short.len() <= max && short.len() + 4 >= max, "{max}: {}", short.len());
        }
        let short = cut(&long, 255);
        assert!(short.starts_with("oci:/ü") && short.ends_with("/:name") && short.contains(CUT));
    }
}
