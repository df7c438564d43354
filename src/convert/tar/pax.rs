//! Extended headers (POSIX.1-2017 pax, "pax Extended Header"): `LENGTH KEY=VALUE\n` …

use super::Problem;
use super::field::decimal;

/// A key and its value.
pub(super) type Record = (Vec<u8>, Vec<u8>);

/// The most bytes that global records may take, together.
const MAX_GLOBAL_BYTES: usize = 1 << 20;

/// What an attribute's key begins with.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// The same of libarchive, with names and values encoded; it writes both.
const LIBARCHIVE_XATTR: &[u8] = b"LIBARCHIVE.xattr.";

/// Reads the records of an extended header. A NUL in place of a record ends it, as in GNU tar.
pub(super) fn records(bytes: &[u8]) -> Result<Vec<Record>, Problem> {
    let bad = |why: &str| Problem::Pax { why: why.into() };
    let mut records = Vec::new();
    let mut rest = bytes;
    while rest.first().is_some_and(|byte| *byte != 0) {
        // GNU tar steps over blanks before the length and more than one behind it.
        let blanks = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        let digits = rest[blanks..].iter().take(20).take_while(|byte| byte.is_ascii_digit()).count();
        let length = decimal(&rest[blanks..blanks + digits]).ok_or_else(|| bad("a record has no length"))?;
        let start = blanks + digits;
        let gap = rest[start..].iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        if gap == 0 {
            return Err(bad("no blank follows a record's length"));
        }
        let (start, length) = (start + gap, usize::try_from(length).unwrap_or(usize::MAX));
        if length > rest.len() - blanks || length + blanks <= start {
            return Err(bad("a record is longer than the header"));
        }
        let end = blanks + length;
        let record = rest[start..end].strip_suffix(b"\n").ok_or_else(|| bad("no newline ends a record"))?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(|| bad("no `=` in a record"))?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        rest = &rest[end..];
    }
    Ok(records)
}

/// Whether a key says something of an entry that is read; all others are passed over.
fn counts(key: &[u8]) -> bool {
    matches!(key, b"path" | b"linkpath" | b"uid" | b"gid" | b"mtime" | b"size")
        || [XATTR, LIBARCHIVE_XATTR, b"SCHILY.acl.", b"GNU.sparse."]
            .iter()
            .any(|known| key.starts_with(known))
}

/// The records that hold for all entries that follow.
#[derive(Debug, Default)]
pub(super) struct Global(Vec<Record>);

impl Global {
    /// Takes the records of a global header: a later one of a key replaces the earlier.
    pub(super) fn add(&mut self, records: Vec<Record>) -> Result<(), Problem> {
        for (key, value) in records {
            if counts(&key) {
                self.0.retain(|(known, _)| *known != key);
                self.0.push((key, value));
            }
        }
        let found: usize = self.0.iter().map(|(key, value)| key.len() + value.len()).sum();
        if found > MAX_GLOBAL_BYTES {
            let (found, max) = (found as u64, MAX_GLOBAL_BYTES as u64);
            return Err(Problem::TooBig { what: "the size of the global headers", found, max });
        }
        Ok(())
    }
}

/// The records that hold for one entry: those of the global headers, then its own.
#[derive(Clone, Copy)]
pub(super) struct Records<'a> {
    pub global: &'a Global,
    pub own: &'a [Record],
}

impl<'a> Records<'a> {
    /// All records, in the order in which they count.
    pub(super) fn all(self) -> impl DoubleEndedIterator<Item = &'a Record> {
        self.global.0.iter().chain(self.own)
    }

    /// The value of a key. The last one counts; an empty value takes it away (POSIX pax).
    pub(super) fn get(self, key: &[u8]) -> Option<&'a [u8]> {
        let (_, value) = self.all().rev().find(|(name, _)| name == key)?;
        (!value.is_empty()).then_some(value)
    }

    /// The extended attributes.
    pub(super) fn xattrs(self) -> Result<Vec<Record>, Problem> {
        let mut xattrs: Vec<Record> = Vec::new();
        for (key, value) in self.all() {
            let Some(name) = key.strip_prefix(XATTR).filter(|name| !name.is_empty()) else { continue };
            if name.contains(&0) {
                return Err(Problem::Pax { why: format!("the attribute name `{}`", super::show(name)) });
            }
            let name = decoded(name);
            xattrs.retain(|(known, _)| *known != name);
            xattrs.push((name, value.clone()));
        }
        Ok(xattrs)
    }

    /// Whether there are access control lists in star's text form.
    pub(super) fn has_acls(self) -> bool {
        self.all().any(|(key, value)| key.starts_with(b"SCHILY.acl.") && !value.is_empty())
    }

    /// The attributes that only libarchive's own records have, by the names in them.
    pub(super) fn libarchive_only(self) -> impl Iterator<Item = &'a [u8]> {
        self.all().filter_map(move |(key, _)| {
            let name = key.strip_prefix(LIBARCHIVE_XATTR)?;
            let both =
                self.all().any(|(other, _)| other.strip_prefix(XATTR).is_some_and(|other| other == name));
            (!both).then_some(name)
        })
    }
}

/// The name of an attribute: GNU tar writes `=` as `%3D` and `%` as `%25`.
fn decoded(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let [first, more @ ..] = rest {
        let (byte, after) = match more {
            [b'3', b'D', after @ ..] if *first == b'%' => (b'=', after),
            [b'2', b'5', after @ ..] if *first == b'%' => (b'%', after),
            _ => (*first, more),
        };
        out.push(byte);
        rest = after;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_attributes_are_decoded_once() {
        assert_eq!(decoded(b"user.a%3Db%253D%3d%"), b"user.a=b%3D%3d%");
    }

    #[test]
    fn records_end_at_a_nul() {
        let found = records(b"6 a=b\n  7 a=cd\n\0\0garbage").unwrap();
        assert_eq!(found, [(b"a".to_vec(), b"b".to_vec()), (b"a".to_vec(), b"cd".to_vec())]);
        for bad in [
            &b"6 a=bc\n"[..],
            b"x",
            b"6a=b\n",
            b"99 a=b\n",
            b"2 a=b\n",
            b"6 abc\n",
            b"99999999999999999999 a=b\n",
        ] {
            assert!(records(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn global_records_are_replaced_and_bounded() {
        let mut global = Global::default();
        let record = |key: &str, size| (key.as_bytes().to_vec(), vec![b'1'; size]);
        for _ in 0..100 {
            global.add(vec![record("path", 1 << 19), record("unknown", 1 << 20)]).unwrap();
        }
        assert_eq!(global.0.len(), 1);
        assert!(global.add(vec![record("linkpath", 1 << 20)]).is_err());
    }
}
