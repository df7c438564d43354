//! Tar streams made by hand: also those that no tool would write.

#![allow(dead_code)]

/// A tar stream that is being written.
#[derive(Default, Clone)]
pub struct Tarball {
    /// What there is of it, without the blocks of zeros at the end.
    pub bytes: Vec<u8>,
}

/// A header with sensible fields; change what the test is about.
#[derive(Clone)]
pub struct Header(pub [u8; 512]);

impl Header {
    /// A header of a type, `0` for a file.
    pub fn new(kind: u8, name: &[u8], size: u64) -> Self {
        let mut header = Self([0; 512]);
        header.set(0, name).octal(100, 8, 0o644).octal(108, 8, 0).octal(116, 8, 0);
        header.octal(124, 12, size).octal(136, 12, 1_000_000_000);
        header.0[156] = kind;
        header.set(257, b"ustar\x0000");
        header
    }

    /// Writes bytes at an offset.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) -> &mut Self {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Writes an octal field with a NUL at its end.
    pub fn octal(&mut self, offset: usize, len: usize, value: u64) -> &mut Self {
        let text = format!("{value:0width$o}\0", width = len - 1);
        self.set(offset, text.as_bytes())
    }

    fn sealed(mut self) -> [u8; 512] {
        self.set(148, b"        ");
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        self.set(148, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

impl Tarball {
    /// Adds a header and content, padded.
    pub fn raw(&mut self, header: Header, content: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(&header.sealed());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, content: &[u8]) -> &mut Self {
        self.raw(Header::new(b'0', name.as_bytes(), content.len() as u64), content)
    }

    /// Adds a folder.
    pub fn dir(&mut self, name: &str) -> &mut Self {
        let mut header = Header::new(b'5', name.as_bytes(), 0);
        header.octal(100, 8, 0o755);
        self.raw(header, b"")
    }

    /// Adds a hard (`1`) or symbolic (`2`) link.
    pub fn link(&mut self, kind: u8, name: &str, target: &str) -> &mut Self {
        let mut header = Header::new(kind, name.as_bytes(), 0);
        header.set(157, target.as_bytes());
        self.raw(header, b"")
    }

    /// Adds an extended header for the next entry.
    pub fn pax(&mut self, records: &[(&[u8], &[u8])]) -> &mut Self {
        let bytes: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.raw(Header::new(b'x', b"pax", bytes.len() as u64), &bytes)
    }

    /// The whole stream.
    pub fn end(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.extend_from_slice(&[0; 1024]);
        bytes
    }
}

/// One record of an extended header; its length counts itself.
pub fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}
