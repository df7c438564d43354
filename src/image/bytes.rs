//! The one way to bytes that nobody has checked yet: a file, a block device, a range of a blob elsewhere.
//!
//! Everything that reads an image sits on top of this trait: [`super::verity::locate`] finds the verity data
//! with it, [`super::verified::VerifiedSource`] checks what it returns. Code that reads many blocks is generic
//! over it, so that the reads of a file stay direct calls.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::Arc;

use super::source::ReadError;

/// Random access to unchecked bytes. Every call may return other bytes than the one before.
#[allow(clippy::len_without_is_empty, reason = "nobody asks whether an image is empty")]
pub trait ReadAt: Send + Sync {
    /// How many bytes there are.
    ///
    /// # Errors
    /// The operating system's, or the transport's, answer.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where the range ends behind the last byte; else the operating
    /// system's, or the transport's, answer. What `buffer` then holds is of no use.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn len(&self) -> io::Result<u64> {
        let metadata = self.metadata()?;
        if metadata.file_type().is_block_device() {
            // Its size is where it ends. Reads name their offset, so the position does not matter.
            return (&mut &*self).seek(SeekFrom::End(0));
        }
        Ok(metadata.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }
}

/// How many bytes there are, as a reader reports it.
pub(super) fn len(bytes: &(impl ReadAt + ?Sized)) -> Result<u64, ReadError> {
    bytes.len().map_err(|source| ReadError::Io { offset: 0, len: 0, source })
}

/// Fills `buffer`, as a reader reports it.
pub(super) fn read_exact(
    bytes: &(impl ReadAt + ?Sized),
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), ReadError> {
    let len = buffer.len();
    bytes.read_exact_at(buffer, offset).map_err(|source| ReadError::Io { offset, len, source })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_read_where_it_was_asked_for_and_never_beyond_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let shared: Arc<dyn ReadAt> = Arc::new(file);
        assert_eq!(ReadAt::len(&shared).unwrap(), 10);
        let mut buffer = [0; 4];
        read_exact(&shared, 3, &mut buffer).unwrap();
        assert_eq!(&buffer, b"3456");
        match read_exact(&shared, 7, &mut buffer) {
            Err(ReadError::Io { offset: 7, len: 4, source }) => {
                assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_device_reports_its_own_error_rather_than_an_end() {
        // A character device has no size, and is no block device.
        let null = File::open("/dev/null").unwrap();
        assert_eq!(ReadAt::len(&null).unwrap(), 0);
        assert!(read_exact(&null, 0, &mut [0; 1]).is_err());
    }
}
