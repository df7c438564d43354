//! Images that the puzzlefs tool made.

use crate::dump::dump;
use crate::images::{IMAGES, expected, open, unpack};

#[test]
fn the_images_of_the_tool_are_read_as_they_were_meant() {
    for (layout, name, tree) in IMAGES {
        let folder = tempfile::tempdir().unwrap();
        unpack(layout, folder.path());
        let (found, expected) = (dump(&open(folder.path(), name)), expected(tree));
        for (found, expected) in found.lines().zip(expected.lines()) {
            assert_eq!(found, expected, "{layout}:{name}");
        }
        assert_eq!(found.lines().count(), expected.lines().count(), "{layout}:{name}");
    }
}
