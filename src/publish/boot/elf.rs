//! Reads from a program or a library what the dynamic loader needs to start it: the loader itself (`PT_INTERP`) and the
//! libraries that it names (`DT_NEEDED`).

use object::Endianness;
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

/// Most names that a program may have.
const MAX_NEEDED: usize = 1000;

/// Why a program cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Not an ELF program of 64 bits, or a part of it is missing.
    #[error("not a 64-bit ELF program: {0}")]
    Malformed(String),
    /// A name of a library that is not one.
    #[error("`{found}` is not the name of a library")]
    Name {
        /// The name, shortened.
        found: String,
    },
}

/// What a program needs to start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Needed {
    /// The path of the dynamic loader; libraries and static programs have none.
    pub loader: Option<String>,
    /// The names of libraries, in the order of the program.
    pub libraries: Vec<String>,
}

/// Reads what a program needs.
///
/// # Errors
/// [`ElfError`].
pub(super) fn needed(program: &[u8]) -> Result<Needed, ElfError> {
    let malformed = |error: object::read::Error| ElfError::Malformed(error.to_string());
    let header = FileHeader64::<Endianness>::parse(program).map_err(malformed)?;
    let endian = header.endian().map_err(malformed)?;
    let mut needed = Needed::default();
    for segment in header.program_headers(endian, program).map_err(malformed)? {
        if let Some(path) = segment.interpreter(endian, program).map_err(malformed)? {
            needed.loader = Some(text(path)?);
        }
    }
    let sections = header.sections(endian, program).map_err(malformed)?;
    let Some((entries, link)) = sections.dynamic(endian, program).map_err(malformed)? else {
        return Ok(needed);
    };
    let strings = sections.strings(endian, program, link).map_err(malformed)?;
    for entry in entries.iter().filter(|entry| entry.d_tag(endian) == DT_NEEDED) {
        let name = entry.string(endian, strings).map_err(malformed)?;
        let name = text(name)?;
        if name.is_empty() || name.contains('/') || needed.libraries.len() == MAX_NEEDED {
            return Err(ElfError::Name { found: name });
        }
        needed.libraries.push(name);
    }
    Ok(needed)
}

fn text(bytes: &[u8]) -> Result<String, ElfError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.len() <= 4096 && !text.chars().any(char::is_control) => Ok(text.to_string()),
        _ => Err(ElfError::Name { found: String::from_utf8_lossy(bytes).chars().take(100).collect() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_needs_the_c_library_and_its_loader() {
        let program = std::fs::read("/proc/self/exe").unwrap();
        let found = needed(&program).unwrap();
        assert!(found.libraries.iter().any(|name| name.starts_with("libc.so")), "{found:?}");
        assert!(found.loader.is_some_and(|path| path.starts_with("/lib")));
        // Cut anywhere in its headers it is an error, and nothing panics.
        for len in (0..4096).step_by(7) {
            assert!(needed(&program[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        for text in ["", "#!/bin/sh\n", "\x7fELF"] {
            assert!(matches!(needed(text.as_bytes()), Err(ElfError::Malformed(_))), "{text}");
        }
    }
}
