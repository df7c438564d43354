//! Makes a unified kernel image: appends sections to systemd's stub, a PE program.
//!
//! ```text
//! 0          DOS header; at 60 the offset of:
//! e_lfanew   `PE\0\0`, COFF header (20 bytes), optional header (PE32+), section table (40 bytes each)
//!            room up to the end of the headers, or to the first section: new rows of the table go there
//! ...        the stub's sections
//! ...        new sections, each at a multiple of the file alignment
//! ```
//!
//! Source: Microsoft's PE Format; systemd's systemd-stub(7) for the sections. The stub's symbols, which lie behind
//! its last section, are dropped: nothing loads them, and tools for signing refuse gaps.
//!
//! A stub comes from an image, so every offset is checked before it is used.

/// Sections begin at multiples of a page in memory, whatever smaller alignment the stub has.
const PAGE: u64 = 4096;
/// Largest program that is made, in bytes: the firmware's loader counts in 31 bits.
const MAX_BYTES: u64 = 1 << 31;
/// Most sections that a program may have (PE Format, COFF header, `NumberOfSections`).
const MAX_SECTIONS: usize = 96;
/// `IMAGE_SCN_CNT_INITIALIZED_DATA | IMAGE_SCN_MEM_READ`.
const DATA: u32 = 0x4000_0040;

/// Why a program is not one that sections can be appended to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeError {
    /// It ends before a structure that it announces.
    #[error("{what} at {offset} is beyond the end of the program")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Its offset in bytes.
        offset: u64,
    },
    /// A field that has another value than an EFI program's.
    #[error("{what}: found {found:#x}, expected {expected}")]
    Field {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What is allowed.
        expected: &'static str,
    },
    /// It is signed: the signature would not cover what is appended.
    #[error("the program is signed already; expected an unsigned one")]
    Signed,
    /// It has no room for more rows in the section table.
    #[error("room for {room} more sections, expected {wanted}")]
    NoRoom {
        /// How many fit.
        room: usize,
        /// How many are to be appended.
        wanted: usize,
    },
    /// It has a section of this name.
    #[error("the program already has a section {name}")]
    Taken {
        /// The name.
        name: String,
    },
    /// The result would be too large.
    #[error("the program would have {bytes} bytes, more than {MAX_BYTES}")]
    TooBig {
        /// Its size in bytes.
        bytes: u64,
    },
}

/// A section of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Section {
    /// Its name.
    pub name: String,
    /// Where it begins in memory.
    pub address: u32,
    /// How many bytes it has in memory.
    pub size: u32,
    /// Where its bytes begin in the file.
    pub offset: u32,
    /// How many bytes it has in the file.
    pub stored: u32,
}

/// The headers of a program, checked.
#[derive(Debug)]
struct Headers {
    /// Offset of `PE\0\0`.
    pe: usize,
    /// Offset of the section table.
    table: usize,
    file_alignment: u64,
    section_alignment: u64,
    headers_bytes: u64,
    /// Offset of the data directory's row of the certificate table; none if there are fewer rows.
    certificates: Option<usize>,
    sections: Vec<Section>,
}

fn bytes<'a>(file: &'a [u8], at: usize, len: usize, what: &'static str) -> Result<&'a [u8], PeError> {
    let end = at.checked_add(len);
    let part = end.and_then(|end| file.get(at..end));
    part.ok_or(PeError::Truncated { what, offset: at as u64 })
}

fn u16_at(file: &[u8], at: usize, what: &'static str) -> Result<u16, PeError> {
    let part = bytes(file, at, 2, what)?;
    Ok(u16::from_le_bytes([part[0], part[1]]))
}

fn u32_at(file: &[u8], at: usize, what: &'static str) -> Result<u32, PeError> {
    let part = bytes(file, at, 4, what)?;
    Ok(u32::from_le_bytes([part[0], part[1], part[2], part[3]]))
}

impl Headers {
    fn parse(file: &[u8]) -> Result<Self, PeError> {
        let field = |what, found: u64, expected| Err(PeError::Field { what, found, expected });
        let magic = u16_at(file, 0, "the DOS header")?;
        if magic != u16::from_le_bytes(*b"MZ") {
            return field("the DOS header's magic", u64::from(magic), "MZ");
        }
        let pe = u32_at(file, 60, "the DOS header")? as usize;
        let magic = u32_at(file, pe, "the PE header")?;
        if magic != u32::from_le_bytes(*b"PE\0\0") {
            return field("the PE header's magic", u64::from(magic), "PE");
        }
        let count = usize::from(u16_at(file, pe + 6, "the COFF header")?);
        if count == 0 || count > MAX_SECTIONS {
            return field("the number of sections", count as u64, "1 to 96");
        }
        let optional_bytes = usize::from(u16_at(file, pe + 20, "the COFF header")?);
        let optional = pe + 24;
        let magic = u16_at(file, optional, "the optional header")?;
        if magic != 0x20b {
            return field("the optional header's magic", u64::from(magic), "0x20b, PE32+");
        }
        if optional_bytes < 112 {
            return field("the size of the optional header", optional_bytes as u64, "112 or more");
        }
        bytes(file, optional, optional_bytes, "the optional header")?;
        let word = |at| u32_at(file, optional + at, "the optional header");
        let (section_alignment, file_alignment) = (word(32)?, word(36)?);
        if !file_alignment.is_power_of_two() || !(16..=65536).contains(&file_alignment) {
            return field("the file alignment", u64::from(file_alignment), "a power of two from 16 to 65536");
        }
        if !section_alignment.is_power_of_two() || section_alignment < file_alignment {
            let expected = "a power of two, not below the file alignment";
            return field("the section alignment", u64::from(section_alignment), expected);
        }
        let directories = word(108)? as usize;
        let certificates =
            (directories > 4 && optional_bytes >= 112 + 5 * 8).then_some(optional + 112 + 4 * 8);
        let table = optional + optional_bytes;
        let mut sections = Vec::with_capacity(count);
        for index in 0..count {
            let at = table + 40 * index;
            let row = bytes(file, at, 40, "the section table")?;
            let word = |at| u32_at(file, table + 40 * index + at, "the section table");
            let name: Vec<u8> = row[..8].iter().copied().take_while(|byte| *byte != 0).collect();
            let section = Section {
                name: String::from_utf8_lossy(&name).into_owned(),
                size: word(8)?,
                address: word(12)?,
                stored: word(16)?,
                offset: word(20)?,
            };
            if section.stored > 0 {
                bytes(file, section.offset as usize, section.stored as usize, "a section")?;
            }
            // The size in the file is rounded up, and may reach into the next section.
            let end = |last: &Section| u64::from(last.address) + u64::from(last.size);
            if sections.last().is_some_and(|last| end(last) > u64::from(section.address)) {
                return field(
                    "a section's address",
                    u64::from(section.address),
                    "the end of the one before it, or more",
                );
            }
            sections.push(section);
        }
        let headers_bytes = u64::from(word(60)?);
        Ok(Self {
            pe,
            table,
            file_alignment: u64::from(file_alignment),
            section_alignment: u64::from(section_alignment),
            headers_bytes,
            certificates,
            sections,
        })
    }

    /// Where the first section's bytes begin in the file, and where the last one's end.
    fn stored(&self) -> (u64, u64) {
        let stored = self.sections.iter().filter(|section| section.stored > 0);
        let first = stored.clone().map(|section| u64::from(section.offset)).min();
        let end = stored.map(|section| u64::from(section.offset) + u64::from(section.stored)).max();
        (first.unwrap_or(self.headers_bytes), end.unwrap_or(self.headers_bytes))
    }
}

fn end_in_memory(section: &Section) -> u64 {
    u64::from(section.address) + u64::from(section.size.max(section.stored))
}

/// Returns the sections of a program.
///
/// # Errors
/// [`PeError`] if it is not a whole EFI program.
pub(super) fn sections(program: &[u8]) -> Result<Vec<Section>, PeError> {
    Ok(Headers::parse(program)?.sections)
}

/// Returns the bytes of a section of a program; `None` if it has none of this name.
///
/// # Errors
/// [`PeError`] if it is not a whole EFI program.
pub(super) fn section<'a>(program: &'a [u8], name: &str) -> Result<Option<&'a [u8]>, PeError> {
    let found = sections(program)?.into_iter().find(|section| section.name == name);
    found
        .map(|section| {
            bytes(program, section.offset as usize, section.size.min(section.stored) as usize, "a section")
        })
        .transpose()
}

/// Appends sections to an unsigned program: names of at most 8 bytes, and their content.
///
/// # Errors
/// [`PeError`].
pub(super) fn append(stub: &[u8], new: &[(&str, &[u8])]) -> Result<Vec<u8>, PeError> {
    let headers = Headers::parse(stub)?;
    if let Some(at) = headers.certificates
        && u32_at(stub, at + 4, "the data directory")? != 0
    {
        return Err(PeError::Signed);
    }
    let (first, end) = headers.stored();
    let table_end = headers.table + 40 * headers.sections.len();
    let limit = first.min(headers.headers_bytes);
    let room = (limit.saturating_sub(table_end as u64) / 40) as usize;
    if room < new.len() {
        return Err(PeError::NoRoom { room, wanted: new.len() });
    }
    let stored: u64 = new.iter().map(|(_, content)| content.len() as u64 + headers.file_alignment).sum();
    let alignment = headers.section_alignment.max(PAGE);
    let memory: u64 = new.iter().map(|(_, content)| content.len() as u64 + alignment).sum();
    let last = headers.sections.iter().map(end_in_memory).max().unwrap_or(0);
    let bytes_in_all = (end + stored).max(last + memory);
    if bytes_in_all > MAX_BYTES {
        return Err(PeError::TooBig { bytes: bytes_in_all });
    }
    // All values below fit in 32 bits, since the sum of all sizes does.
    let mut program = bytes(stub, 0, end as usize, "a section")?.to_vec();
    program.reserve_exact(stored as usize);
    let mut address = last.next_multiple_of(alignment);
    for (index, (name, content)) in new.iter().enumerate() {
        let taken = headers.sections.iter().any(|section| section.name == *name)
            || new.iter().take(index).any(|(other, _)| other == name);
        if taken || name.len() > 8 {
            return Err(PeError::Taken { name: (*name).to_string() });
        }
        program.resize((program.len() as u64).next_multiple_of(headers.file_alignment) as usize, 0);
        let offset = program.len() as u64;
        let stored = (content.len() as u64).next_multiple_of(headers.file_alignment);
        let mut row = [0; 40];
        row[..name.len()].copy_from_slice(name.as_bytes());
        for (at, value) in
            [(8, content.len() as u64), (12, address), (16, stored), (20, offset), (36, u64::from(DATA))]
        {
            row[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
        program[table_end + 40 * index..][..40].copy_from_slice(&row);
        program.extend_from_slice(content);
        program.resize((offset + stored) as usize, 0);
        address = (address + content.len() as u64).next_multiple_of(alignment);
    }
    let count = (headers.sections.len() + new.len()) as u16;
    let optional = headers.pe + 24;
    program[headers.pe + 6..][..2].copy_from_slice(&count.to_le_bytes());
    // The symbols are gone: PointerToSymbolTable, NumberOfSymbols.
    program[headers.pe + 12..][..8].fill(0);
    // SizeOfImage; and the checksum, which EFI firmware does not look at.
    let image = address.next_multiple_of(headers.section_alignment) as u32;
    program[optional + 56..][..4].copy_from_slice(&image.to_le_bytes());
    program[optional + 64..][..4].fill(0);
    Ok(program)
}

/// Whether a program is another one with a signature added: the same bytes, but for the checksum and the row of the
/// certificate table, and then the certificates.
pub(super) fn is_signed_form_of(signed: &[u8], unsigned: &[u8]) -> bool {
    let Ok(headers) = Headers::parse(unsigned) else { return false };
    let Some(certificates) = headers.certificates else { return false };
    let (Some(begin), Ok(size)) =
        (signed.get(..unsigned.len()), u32_at(signed, certificates + 4, "the data directory"))
    else {
        return false;
    };
    let mut plain = begin.to_vec();
    for (at, len) in [(headers.pe + 24 + 64, 4), (certificates, 8)] {
        match (plain.get_mut(at..at + len), unsigned.get(at..at + len)) {
            (Some(place), Some(original)) => place.copy_from_slice(original),
            _ => return false,
        }
    }
    size > 0 && plain == unsigned
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A small EFI program: one section of code, room for `room` more rows in the table.
    pub(in crate::publish::boot) fn stub(room: usize) -> Vec<u8> {
        let (pe, optional_bytes) = (128, 240);
        let table = pe + 24 + optional_bytes;
        let headers = (table + 40 * (1 + room)).next_multiple_of(512);
        let mut file = vec![0; headers + 512];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"MZ");
        put(60, &(pe as u32).to_le_bytes());
        put(pe, b"PE\0\0\x64\x86\x01\0");
        put(pe + 12, &[7; 8]);
        put(pe + 20, &(optional_bytes as u16).to_le_bytes());
        let optional = pe + 24;
        put(optional, &0x20bu16.to_le_bytes());
        put(optional + 32, &4096u32.to_le_bytes());
        put(optional + 36, &512u32.to_le_bytes());
        put(optional + 56, &8192u32.to_le_bytes());
        // The room ends here, although the first section begins later.
        put(optional + 60, &((table + 40 * (1 + room)) as u32).to_le_bytes());
        put(optional + 108, &16u32.to_le_bytes());
        put(table, b".text\0\0\0");
        put(table + 8, &100u32.to_le_bytes());
        put(table + 12, &4096u32.to_le_bytes());
        put(table + 16, &512u32.to_le_bytes());
        put(table + 20, &(headers as u32).to_le_bytes());
        file.extend_from_slice(b"symbols");
        file
    }

    #[test]
    fn sections_are_appended_and_read_back() {
        let big = vec![9; 5000];
        let program = append(&stub(2), &[(".linux", &big), (".cmdline", b"root=mosfs")]).unwrap();
        let names: Vec<_> =
            sections(&program).unwrap().into_iter().map(|one| (one.name, one.address)).collect();
        assert_eq!(names, [(".text".into(), 4096), (".linux".into(), 8192), (".cmdline".into(), 16384)]);
        assert_eq!(section(&program, ".linux").unwrap().unwrap(), big);
        assert_eq!(section(&program, ".cmdline").unwrap().unwrap(), b"root=mosfs");
        assert_eq!(section(&program, ".initrd").unwrap(), None);
        assert_eq!(program.len() % 512, 0);
        assert!(!program.windows(7).any(|part| part == b"symbols"));
        // SizeOfImage covers all sections.
        assert_eq!(u32_at(&program, 128 + 24 + 56, "").unwrap(), 20480);
    }

    #[test]
    fn a_stub_that_cannot_take_them_is_refused() {
        let two: [(&str, &[u8]); 2] = [(".linux", b"k"), (".initrd", b"i")];
        assert_eq!(append(&stub(1), &two), Err(PeError::NoRoom { room: 1, wanted: 2 }));
        assert_eq!(append(&stub(3), &[(".text", b"")]), Err(PeError::Taken { name: ".text".into() }));
        assert_eq!(append(&stub(3), &[two[0], two[0]]), Err(PeError::Taken { name: ".linux".into() }));
        let mut signed = stub(3);
        signed[128 + 24 + 112 + 36..][..4].copy_from_slice(&8u32.to_le_bytes());
        assert_eq!(append(&signed, &two), Err(PeError::Signed));
    }

    /// Each a stub with one field changed, and the error.
    #[test]
    fn hostile_programs_are_errors() {
        let (pe, optional) = (128, 152);
        let table = optional + 240;
        let changed = |at: usize, bytes: &[u8]| {
            let mut file = stub(2);
            file[at..at + bytes.len()].copy_from_slice(bytes);
            append(&file, &[(".linux", b"k")]).unwrap_err()
        };
        let field = |what, found, expected| PeError::Field { what, found, expected };
        assert_eq!(changed(0, b"ZM"), field("the DOS header's magic", 0x4d5a, "MZ"));
        let far = u64::from(u32::MAX);
        assert_eq!(changed(60, &[0xff; 4]), PeError::Truncated { what: "the PE header", offset: far });
        assert_eq!(changed(pe, b"NE\0\0"), field("the PE header's magic", 0x454e, "PE"));
        assert_eq!(changed(pe + 6, &[0, 0]), field("the number of sections", 0, "1 to 96"));
        assert_eq!(changed(pe + 6, &[0xff, 0xff]), field("the number of sections", 65535, "1 to 96"));
        assert!(matches!(changed(pe + 6, &[96, 0]), PeError::Field { .. } | PeError::Truncated { .. }));
        assert_eq!(changed(pe + 20, &[10, 0]), field("the size of the optional header", 10, "112 or more"));
        assert!(matches!(
            changed(pe + 20, &[0xff, 0xff]),
            PeError::Truncated { what: "the optional header", .. }
        ));
        assert_eq!(
            changed(optional, &[0x0b, 1]),
            field("the optional header's magic", 0x10b, "0x20b, PE32+")
        );
        let power = "a power of two from 16 to 65536";
        assert_eq!(changed(optional + 36, &[0; 4]), field("the file alignment", 0, power));
        assert_eq!(changed(optional + 36, &3u32.to_le_bytes()), field("the file alignment", 3, power));
        let above = "a power of two, not below the file alignment";
        assert_eq!(changed(optional + 32, &[0; 4]), field("the section alignment", 0, above));
        assert_eq!(changed(optional + 60, &[0; 4]), PeError::NoRoom { room: 0, wanted: 1 });
        for (at, what) in [(table + 16, "the stored size"), (table + 20, "the offset")] {
            let error = changed(at, &[0xff; 4]);
            assert!(matches!(error, PeError::Truncated { what: "a section", .. }), "{what}: {error:?}");
        }
        assert!(matches!(changed(table + 12, &[0xff; 4]), PeError::TooBig { .. }));
        assert!(matches!(changed(table + 8, &[0xff; 4]), PeError::TooBig { .. }));
        assert!(matches!(changed(optional + 32, &0x8000_0000u32.to_le_bytes()), PeError::TooBig { .. }));
    }

    #[test]
    fn every_beginning_of_a_program_is_an_error_or_whole() {
        let file = stub(2);
        for len in 0..file.len() {
            let whole = append(&file[..len], &[(".linux", b"k")]).is_ok();
            assert_eq!(whole, len >= file.len() - b"symbols".len(), "{len}");
        }
    }

    #[test]
    fn overlapping_sections_are_refused() {
        let mut program = append(&stub(3), &[(".linux", b"k")]).unwrap();
        program[392 + 40 + 12..][..4].copy_from_slice(&4096u32.to_le_bytes());
        let expected = "the end of the one before it, or more";
        assert_eq!(
            sections(&program),
            Err(PeError::Field { what: "a section's address", found: 4096, expected })
        );
    }

    #[test]
    fn a_signature_changes_nothing_else() {
        let unsigned = append(&stub(2), &[(".linux", b"k")]).unwrap();
        let mut signed = unsigned.clone();
        let row = 152 + 112 + 32;
        signed[row..row + 4].copy_from_slice(&(unsigned.len() as u32).to_le_bytes());
        signed[row + 4..row + 8].copy_from_slice(&16u32.to_le_bytes());
        signed[152 + 64..][..4].copy_from_slice(&[1; 4]);
        signed.extend_from_slice(&[5; 16]);
        assert!(is_signed_form_of(&signed, &unsigned));
        assert!(!is_signed_form_of(&unsigned, &unsigned), "it has no certificates");
        assert!(!is_signed_form_of(&signed[..100], &unsigned));
        signed[1000] ^= 1;
        assert!(!is_signed_form_of(&signed, &unsigned));
    }
}
