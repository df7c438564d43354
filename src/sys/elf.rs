//! Reads of an ELF program what the kernel and the dynamic loader read of it (elf(5)): the machine that it is for, the
//! loader that starts it (`PT_INTERP`), and the libraries that it names (`DT_NEEDED`).
//!
//! ```text
//! header ─> program headers ─> PT_INTERP: the loader's path
//!                           ─> PT_DYNAMIC: numbers of DT_NEEDED ─> names in DT_STRTAB, an address ─> PT_LOAD: its place
//! ```
//!
//! Section headers are not read: a program runs without them. The bytes are hostile, and may be the first part of a
//! program alone; what lies outside of them is an error.

/// Most names that a program may have.
const MAX_NEEDED: usize = 1000;

const PT_LOAD: u64 = 1;
const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

/// Why a program cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// No ELF program.
    #[error("not an ELF program")]
    Other,
    /// A part of it is missing.
    #[error("not a whole ELF program: its {0} lies outside the file")]
    Cut(&'static str),
    /// A name of a library that is not one.
    #[error("`{found}` is not the name of a library")]
    Name {
        /// The name, shortened.
        found: String,
    },
}

/// An ELF program or library, or the first bytes of one.
#[derive(Debug, Clone, Copy)]
pub struct Elf<'a> {
    bytes: &'a [u8],
    /// 64-bit.
    is_wide: bool,
    /// Big-endian.
    is_big: bool,
}

/// A program header.
struct Segment {
    kind: u64,
    /// Its place in the file, in bytes.
    offset: u64,
    /// Its place in memory.
    address: u64,
    /// Its length in the file, in bytes.
    length: u64,
}

impl<'a> Elf<'a> {
    /// The program that begins with these bytes.
    ///
    /// # Errors
    /// [`ElfError::Other`].
    pub fn new(bytes: &'a [u8]) -> Result<Self, ElfError> {
        if !bytes.starts_with(b"\x7fELF") {
            return Err(ElfError::Other);
        }
        // The kernel goes by the machine, and looks at neither of these.
        Ok(Self { bytes, is_wide: bytes.get(4) == Some(&2), is_big: bytes.get(5) == Some(&2) })
    }

    /// Whether numbers begin with their highest byte.
    pub fn is_big_endian(&self) -> bool {
        self.is_big
    }

    /// The machine that it is for (`e_machine`).
    ///
    /// # Errors
    /// [`ElfError::Cut`].
    pub fn machine(&self) -> Result<u64, ElfError> {
        self.number(18, 2, "header")
    }

    /// The path of the loader, without the zero byte that ends it; libraries and static programs have none.
    ///
    /// # Errors
    /// [`ElfError::Cut`].
    pub fn loader(&self) -> Result<Option<&'a [u8]>, ElfError> {
        let Some(segment) = self.segment(&|segment| segment.kind == PT_INTERP)? else { return Ok(None) };
        let path = self.bytes(segment.offset, segment.length, "loader's path")?;
        Ok(path.split(|byte| *byte == 0).next())
    }

    /// The names of the libraries that it needs, in its order.
    ///
    /// # Errors
    /// [`ElfError`].
    pub fn libraries(&self) -> Result<Vec<String>, ElfError> {
        const DYNAMIC: &str = "dynamic section";
        let Some(dynamic) = self.segment(&|segment| segment.kind == PT_DYNAMIC)? else {
            return Ok(Vec::new());
        };
        let word = self.word();
        let (mut names, mut strings) = (Vec::new(), None);
        for at in 0..dynamic.length / (2 * word) {
            let entry = dynamic.offset.checked_add(at * 2 * word).ok_or(ElfError::Cut(DYNAMIC))?;
            let value = || self.number(entry.saturating_add(word), word, DYNAMIC);
            match self.number(entry, word, DYNAMIC)? {
                DT_NULL => break,
                DT_NEEDED if names.len() == MAX_NEEDED => return Err(name_of(b"...")),
                DT_NEEDED => names.push(value()?),
                DT_STRTAB => strings = Some(value()?),
                _ => {}
            }
        }
        names.into_iter().map(|name| self.library(strings, name)).collect()
    }

    /// The name at a place in the table of strings, which is at an address in memory.
    fn library(&self, strings: Option<u64>, name: u64) -> Result<String, ElfError> {
        const NAME: &str = "name of a library";
        let cut = || ElfError::Cut(NAME);
        let address = strings.and_then(|strings| strings.checked_add(name)).ok_or_else(cut)?;
        let holds = |one: &Segment| {
            one.kind == PT_LOAD && one.address <= address && address - one.address < one.length
        };
        let segment = self.segment(&holds)?.ok_or_else(cut)?;
        let skip = address - segment.address;
        let rest = self.bytes(segment.offset.saturating_add(skip), segment.length - skip, NAME)?;
        let end = rest.iter().position(|byte| *byte == 0).ok_or_else(cut)?;
        match std::str::from_utf8(&rest[..end]) {
            Ok(text) if !text.is_empty() && text.len() <= 255 && is_name(text) => Ok(text.to_string()),
            _ => Err(name_of(&rest[..end])),
        }
    }

    /// The first segment of a kind.
    fn segment(&self, is: &dyn Fn(&Segment) -> bool) -> Result<Option<Segment>, ElfError> {
        const HEADERS: &str = "program header";
        let word = self.word();
        // e_phoff, e_phentsize and e_phnum; p_offset, p_vaddr and p_filesz.
        let (table, size, count, offset, address, length) =
            if self.is_wide { (32, 54, 56, 8, 16, 32) } else { (28, 42, 44, 4, 8, 16) };
        let table = self.number(table, word, "header")?;
        let size = self.number(size, 2, "header")?;
        for at in 0..self.number(count, 2, "header")? {
            let entry = table.checked_add(at * size).ok_or(ElfError::Cut(HEADERS))?;
            let field = |at: u64, length: u64| self.number(entry.saturating_add(at), length, HEADERS);
            let segment = Segment {
                kind: field(0, 4)?,
                offset: field(offset, word)?,
                address: field(address, word)?,
                length: field(length, word)?,
            };
            if is(&segment) {
                return Ok(Some(segment));
            }
        }
        Ok(None)
    }

    /// The size of an address, in bytes.
    fn word(&self) -> u64 {
        if self.is_wide { 8 } else { 4 }
    }

    fn number(&self, at: u64, length: u64, what: &'static str) -> Result<u64, ElfError> {
        let bytes = self.bytes(at, length, what)?;
        let place = |at: usize| if self.is_big { bytes.len() - 1 - at } else { at };
        Ok((0..bytes.len()).fold(0, |all, at| all | u64::from(bytes[place(at)]) << (8 * at)))
    }

    fn bytes(&self, at: u64, length: u64, what: &'static str) -> Result<&'a [u8], ElfError> {
        let range = || {
            let at = usize::try_from(at).ok()?;
            self.bytes.get(at..at.checked_add(usize::try_from(length).ok()?)?)
        };
        range().ok_or(ElfError::Cut(what))
    }
}

/// Whether a text is the name of a file in a folder that libraries are searched in.
fn is_name(text: &str) -> bool {
    !text.chars().any(|c| c == '/' || c.is_control())
}

fn name_of(found: &[u8]) -> ElfError {
    ElfError::Name { found: String::from_utf8_lossy(found).escape_default().take(100).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_needs_the_c_library_and_its_loader() {
        let program = std::fs::read("/proc/self/exe").unwrap();
        let elf = Elf::new(&program).unwrap();
        let libraries = elf.libraries().unwrap();
        assert!(libraries.iter().any(|name| name.starts_with("libc.so")), "{libraries:?}");
        assert!(elf.loader().unwrap().is_some_and(|path| path.starts_with(b"/lib")));
        assert!(elf.machine().is_ok());
        // Cut anywhere in its headers it is an error, and nothing panics.
        for len in (0..4096).step_by(7) {
            assert!(Elf::new(&program[..len]).and_then(|elf| elf.libraries()).is_err(), "{len}");
        }
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        for text in ["", "#!/bin/sh\n", "\x7fEL"] {
            assert_eq!(Elf::new(text.as_bytes()).unwrap_err(), ElfError::Other, "{text}");
        }
        for text in ["\x7fELF", "\x7fELF\x02\x01"] {
            let elf = Elf::new(text.as_bytes()).unwrap();
            assert_eq!(
                (elf.machine(), elf.loader()),
                (Err(ElfError::Cut("header")), Err(ElfError::Cut("header")))
            );
        }
    }

    /// A library with a segment of all of it, and these names.
    fn library(is_wide: bool, is_big: bool, names: &[&[u8]]) -> Vec<u8> {
        const BASE: u64 = 0x40_0000;
        let word = if is_wide { 8 } else { 4 };
        let put = |bytes: &mut Vec<u8>, at: usize, length: usize, number: u64| {
            bytes.resize(bytes.len().max(at + length), 0);
            for index in 0..length {
                let byte = (number >> (8 * index)) as u8;
                bytes[if is_big { at + length - 1 - index } else { at + index }] = byte;
            }
        };
        let mut bytes = b"\x7fELF\0\0".to_vec();
        (bytes[4], bytes[5]) = (1 + u8::from(is_wide), 1 + u8::from(is_big));
        put(&mut bytes, 18, 2, 62);
        let header = if is_wide { [32, 54, 56, 8, 16, 32] } else { [28, 42, 44, 4, 8, 16] };
        let (table, size) = (64, 56);
        put(&mut bytes, header[0], word, table as u64);
        put(&mut bytes, header[1], 2, size as u64);
        put(&mut bytes, header[2], 2, 2);
        let (dynamic, strings) = (200, 200 + (names.len() + 2) * 2 * word);
        let dynamic_length = (names.len() + 2) * 2 * word;
        let mut text = vec![0];
        for (at, name) in names.iter().enumerate() {
            put(&mut bytes, dynamic + (at + 1) * 2 * word, word, DT_NEEDED);
            put(&mut bytes, dynamic + (at + 1) * 2 * word + word, word, text.len() as u64);
            text.extend_from_slice(name);
            text.push(0);
        }
        put(&mut bytes, dynamic, word, DT_STRTAB);
        put(&mut bytes, dynamic + word, word, BASE + strings as u64);
        bytes.resize(strings, 0);
        bytes.extend_from_slice(&text);
        let whole = bytes.len() as u64;
        let segments = [(PT_LOAD, 0, BASE, whole), (PT_DYNAMIC, dynamic as u64, 0, dynamic_length as u64)];
        for (at, (kind, offset, address, length)) in segments.into_iter().enumerate() {
            put(&mut bytes, table + at * size, 4, kind);
            put(&mut bytes, table + at * size + header[3], word, offset);
            put(&mut bytes, table + at * size + header[4], word, address);
            put(&mut bytes, table + at * size + header[5], word, length);
        }
        bytes
    }

    #[test]
    fn names_are_read_in_both_sizes_and_byte_orders() {
        for (is_wide, is_big) in [(true, false), (true, true), (false, false), (false, true)] {
            let bytes = library(is_wide, is_big, &[b"libone.so.1", b"libtwo.so"]);
            let elf = Elf::new(&bytes).unwrap();
            assert_eq!(elf.libraries().unwrap(), ["libone.so.1", "libtwo.so"], "{is_wide} {is_big}");
            assert_eq!((elf.machine(), elf.loader()), (Ok(62), Ok(None)));
            assert_eq!(elf.is_big_endian(), is_big);
            // Whatever is wrong is an error or another answer, and never a panic.
            for at in 0..bytes.len() {
                for value in [0, 0x7f, 0xff] {
                    let mut bytes = bytes.clone();
                    bytes[at] = value;
                    let _ = Elf::new(&bytes).and_then(|elf| elf.loader().and(elf.libraries()));
                }
                let _ = Elf::new(&bytes[..at]).and_then(|elf| elf.libraries());
            }
        }
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let read = |names: &[&[u8]]| Elf::new(&library(true, false, names)).and_then(|elf| elf.libraries());
        for name in [&b""[..], b"../lib.so", b"/etc/passwd", b"a\nb", b"\xff"] {
            let found = String::from_utf8_lossy(name).escape_default().to_string();
            assert_eq!(read(&[b"libone.so", name]), Err(ElfError::Name { found }));
        }
        assert_eq!(read(&[&b"libone.so"[..]; MAX_NEEDED]).unwrap().len(), MAX_NEEDED);
        assert!(matches!(read(&[&b"libone.so"[..]; MAX_NEEDED + 1]), Err(ElfError::Name { .. })));
        let cut = ElfError::Cut("name of a library");
        let mut bytes = library(true, false, &[b"libone.so"]);
        bytes.pop();
        assert_eq!(Elf::new(&bytes).unwrap().libraries(), Err(cut));
    }
}
