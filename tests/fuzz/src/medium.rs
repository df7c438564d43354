//! Images of install media.

use std::io;

use mosfs::internals::image::bytes::ReadAt;
use mosfs::internals::medium::read::read;

/// Where the first and the last sector of the EFI system partition stand, in bytes.
const ESP_AT: usize = 1024 + 128 + 32;
/// Where ISO 9660 begins, in bytes.
const VOLUME_AT: usize = 32 << 10;
/// The size of the image, in bytes. What no input says is zero.
const SIZE: u64 = 64 << 20;

/// 16 bytes of the partition table, and ISO 9660 from its first descriptor on: folders that lead anywhere. What is read
/// of them is laid out anew and compared, which no such image stands, since its MBR is missing.
pub fn image(bytes: &[u8]) {
    let Some((esp, volume)) = bytes.split_first_chunk::<16>() else { return };
    assert!(read(&Sparse { esp, volume }, false).is_err());
}

struct Sparse<'a> {
    esp: &'a [u8],
    volume: &'a [u8],
}

impl ReadAt for Sparse<'_> {
    fn len(&self) -> io::Result<u64> {
        Ok(SIZE)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buffer.len() as u64 > SIZE {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(0);
        let offset = offset as usize;
        for (at, part) in [(ESP_AT, self.esp), (VOLUME_AT, self.volume)] {
            let (begin, end) = (at.max(offset), (at + part.len()).min(offset + buffer.len()));
            if begin < end {
                buffer[begin - offset..end - offset].copy_from_slice(&part[begin - at..end - at]);
            }
        }
        Ok(())
    }
}
