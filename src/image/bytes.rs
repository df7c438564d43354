//! Access to bytes that are not yet verified: a file, a block device, or a range of a blob elsewhere.
//!
//! Everything that reads an image is built on this trait: [`super::verity::locate`] finds the verity data
//! with it, [`super::verified::VerifiedSource`] verifies what it returns. Code that reads many blocks is
//! generic over it, so reads of a file remain direct calls.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::Arc;

use super::source::ReadError;

/// Random access to unverified bytes. Every call may return different bytes.
#[allow(clippy::len_without_is_empty, reason = "nobody asks whether an image is empty")]
pub trait ReadAt: Send + Sync {
    /// Returns the number of bytes.
    ///
    /// # Errors
    /// The error of the operating system or the transport.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range ends after the last byte; else the error of the
    /// operating system or the transport. The content of `buffer` is then undefined.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Says that bytes that were read there do not verify. Returns whether another read may return others,
    /// because they have been fetched again.
    fn distrust(&self, offset: u64, len: u64) -> bool {
        let _ = (offset, len);
        false
    }
}

thread_local! {
    static MAY_WAIT: Cell<bool> = const { Cell::new(true) };
}

/// Runs `work` in this thread without waiting for another machine: a read of bytes that are not on this one
/// fails with [`io::ErrorKind::WouldBlock`].
pub fn without_waiting<T>(work: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            MAY_WAIT.set(self.0);
        }
    }
    let _restore = Restore(MAY_WAIT.replace(false));
    work()
}

/// Returns whether this thread may wait for another machine (see [`without_waiting`]).
pub fn may_wait() -> bool {
    MAY_WAIT.get()
}

impl ReadAt for File {
    fn len(&self) -> io::Result<u64> {
        let metadata = self.metadata()?;
        if metadata.file_type().is_block_device() {
            // The size is the offset of the end. Reads use explicit offsets, so the position does not matter.
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

    fn distrust(&self, offset: u64, len: u64) -> bool {
        (**self).distrust(offset, len)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }

    fn distrust(&self, offset: u64, len: u64) -> bool {
        (**self).distrust(offset, len)
    }
}

/// Returns the number of bytes, with a reader's error type.
pub(super) fn len(bytes: &(impl ReadAt + ?Sized)) -> Result<u64, ReadError> {
    bytes.len().map_err(|source| ReadError::Io { offset: 0, len: 0, source })
}

/// Fills `buffer`, with a reader's error type.
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
        // A character device has no size and is not a block device.
        let null = File::open("/dev/null").unwrap();
        assert_eq!(ReadAt::len(&null).unwrap(), 0);
        assert!(read_exact(&null, 0, &mut [0; 1]).is_err());
    }
}
