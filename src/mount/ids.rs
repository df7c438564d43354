//! User and group ids that a mount shows moved to another range.
//!
//! Linux maps the ids of a FUSE mount since 6.12 (mount_setattr(2), `MOUNT_ATTR_IDMAP`). For earlier kernels, the daemon
//! shows what such a mount would show:
//!
//! | what | ids 0 to COUNT-1 | others |
//! | --- | --- | --- |
//! | owner and group (stat) | FIRST + id | none: (uid_t) -1, which Linux shows as the overflow id and lets nobody be |
//! | ids in POSIX ACLs (`system.posix_acl_*`) | FIRST + id | the same; Linux refuses access to such a file |
//! | root of file capabilities (`security.capability`) | FIRST + id, revision 3 | the same |
//!
//! Requests carry no id that would have to be moved back: a tree is read-only, and the kernel compares owners itself.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What stands for no id: (uid_t) -1.
const NONE: u32 = u32::MAX;

/// A range that ids are moved to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdShift {
    /// What id 0 is shown as.
    pub first: u32,
    /// How many ids there are from 0 on.
    pub count: u32,
}

impl IdShift {
    /// What an id is shown as.
    pub fn id(&self, id: u32) -> u32 {
        if id < self.count { self.first.checked_add(id).unwrap_or(NONE) } else { NONE }
    }

    /// What an extended attribute is shown as.
    pub fn xattr(&self, name: &[u8], value: &[u8]) -> Vec<u8> {
        match name {
            b"system.posix_acl_access" | b"system.posix_acl_default" => self.acl(value),
            b"security.capability" => self.capability(value),
            _ => value.to_vec(),
        }
    }

    /// An ACL (include/uapi/linux/posix_acl_xattr.h): version 2 in 32 bits, then tag and mode in 16 bits each and an id in
    /// 32 bits for each entry; little-endian.
    fn acl(&self, value: &[u8]) -> Vec<u8> {
        /// Tags of entries that have an id (include/uapi/linux/posix_acl.h): ACL_USER and ACL_GROUP.
        const WITH_ID: [u16; 2] = [0x02, 0x08];
        let mut moved = value.to_vec();
        for entry in moved.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
            let (tag, id) = entry.split_at_mut(4);
            if let ([low, high, ..], Ok(bytes)) = (tag, <[u8; 4]>::try_from(&*id))
                && WITH_ID.contains(&u16::from_le_bytes([*low, *high]))
            {
                id.copy_from_slice(&self.id(u32::from_le_bytes(bytes)).to_le_bytes());
            }
        }
        moved
    }

    /// File capabilities (include/uapi/linux/capability.h): magic and flags in 32 bits, two sets of two words, and in
    /// revision 3 the id of the root of the user namespace that they hold in. Revision 2 holds for id 0.
    fn capability(&self, value: &[u8]) -> Vec<u8> {
        const REVISION: u32 = 0xff00_0000;
        const REVISION_2: u32 = 0x0200_0000;
        const REVISION_3: u32 = 0x0300_0000;
        let word = |at: usize| value.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let Some(magic) = word(0) else { return value.to_vec() };
        let root = match (magic & REVISION, value.len()) {
            (REVISION_2, 20) => 0,
            (REVISION_3, 24) => word(20).unwrap_or(0),
            _ => return value.to_vec(),
        };
        let mut moved = (magic & !REVISION | REVISION_3).to_le_bytes().to_vec();
        moved.extend_from_slice(value.get(4..20).unwrap_or_default());
        moved.extend_from_slice(&self.id(root).to_le_bytes());
        moved
    }
}

impl fmt::Display for IdShift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.first, self.count)
    }
}

impl FromStr for IdShift {
    type Err = String;

    /// Parses `FIRST:COUNT`. The last id of the range must be below (uid_t) -1.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| -> Option<u32> {
            // No sign, which parse takes.
            text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
        };
        let parse = || {
            let (first, count) = text.split_once(':')?;
            let (first, count) = (number(first)?, number(count)?);
            (count > 0 && first.checked_add(count).is_some()).then_some(Self { first, count })
        };
        parse()
            .ok_or_else(|| format!("`{text}` is no range of ids; expected FIRST:COUNT, such as 100000:65536"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIFT: IdShift = IdShift { first: 100_000, count: 65_536 };

    #[test]
    fn ids_of_the_range_are_moved_and_others_are_nobody_s() {
        for (id, shown) in [(0, 100_000), (1000, 101_000), (65_535, 165_535), (65_536, NONE), (NONE, NONE)] {
            assert_eq!(SHIFT.id(id), shown, "{id}");
        }
    }

    #[test]
    fn a_range_is_written_as_it_is_read() {
        assert_eq!("100000:65536".parse(), Ok(SHIFT));
        assert_eq!(SHIFT.to_string(), "100000:65536");
        assert_eq!("0:4294967295".parse(), Ok(IdShift { first: 0, count: NONE }));
        for bad in
            ["", "1", "1:", ":1", "1:0", "-1:5", "+1:5", "1:2:3", "4294967295:1", "0:4294967296", "a:b"]
        {
            assert!(bad.parse::<IdShift>().unwrap_err().contains("FIRST:COUNT"), "{bad}");
        }
    }

    #[test]
    fn entries_of_acls_are_moved_where_they_have_an_id() {
        let acl = |entries: &[(u16, u16, u32)]| {
            let mut bytes = 2u32.to_le_bytes().to_vec();
            for (tag, mode, id) in entries {
                bytes.extend_from_slice(&tag.to_le_bytes());
                bytes.extend_from_slice(&mode.to_le_bytes());
                bytes.extend_from_slice(&id.to_le_bytes());
            }
            bytes
        };
        // The owner and the mask have no id; (uid_t) -1 stands in its place.
        let stored =
            acl(&[(0x01, 6, NONE), (0x02, 4, 1000), (0x08, 5, 33), (0x08, 5, 70_000), (0x10, 7, NONE)]);
        let shown =
            acl(&[(0x01, 6, NONE), (0x02, 4, 101_000), (0x08, 5, 100_033), (0x08, 5, NONE), (0x10, 7, NONE)]);
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            assert_eq!(SHIFT.xattr(name.as_bytes(), &stored), shown);
        }
        assert_eq!(SHIFT.xattr(b"user.acl", &stored), stored);
        // What is no ACL stays what it is.
        for odd in [&b""[..], b"\x02\0", b"\x02\0\0\0\x02\0\x04"] {
            assert_eq!(SHIFT.xattr(b"system.posix_acl_access", odd), odd);
        }
    }

    #[test]
    fn capabilities_hold_for_the_root_of_the_range() {
        let sets = [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0];
        let stored = |magic: u32, root: Option<u32>| {
            let mut bytes = magic.to_le_bytes().to_vec();
            bytes.extend_from_slice(&sets);
            bytes.extend(root.into_iter().flat_map(u32::to_le_bytes));
            bytes
        };
        let shown = |value: &[u8]| SHIFT.xattr(b"security.capability", value);
        assert_eq!(shown(&stored(0x0200_0001, None)), stored(0x0300_0001, Some(100_000)));
        assert_eq!(shown(&stored(0x0300_0000, Some(7))), stored(0x0300_0000, Some(100_007)));
        // Revision 1, and what is cut short.
        assert_eq!(shown(&stored(0x0100_0000, None)), stored(0x0100_0000, None));
        assert_eq!(shown(b"\x00\x00"), b"\x00\x00");
    }
}
