//! Device-mapper by ioctl: the few commands that a read-only verity device requires (<linux/dm-ioctl.h>,
//! interface 4.0 and up).
//!
//! A request and its reply share one buffer:
//!
//! ```text
//! offset  0  version[3], data_size, data_start, target_count, open_count, flags, event_nr, pad: u32 each
//! offset 40  dev: u64 (huge encoding)
//! offset 48  name: 128 bytes      offset 176  uuid: 129 bytes      offset 305  7 bytes of padding
//! offset 312 (data_start)  targets or names, each record beginning at a multiple of 8
//! ```
//!
//! A target is `sector_start, length: u64, status, next: u32, type: 16 bytes`, then its parameters
//! as a NUL-terminated string. What the kernel returns is parsed within the bounds of the reply.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

const HEADER_BYTES: usize = 312;
const TARGET_BYTES: usize = 40;
const NAME_BYTES: usize = 128;
const UUID_BYTES: usize = 129;
const TYPE_BYTES: usize = 16;
/// Initial room for a reply. A verity table is 300 bytes.
const FIRST_REPLY_BYTES: usize = 16 << 10;
/// Largest accepted reply, in bytes.
const MAX_REPLY_BYTES: usize = 4 << 20;

const DM_READONLY_FLAG: u32 = 1 << 0;
const DM_SUSPEND_FLAG: u32 = 1 << 1;
const DM_STATUS_TABLE_FLAG: u32 = 1 << 4;
const DM_ACTIVE_PRESENT_FLAG: u32 = 1 << 5;
const DM_INACTIVE_PRESENT_FLAG: u32 = 1 << 6;
const DM_BUFFER_FULL_FLAG: u32 = 1 << 8;
const DM_DEFERRED_REMOVE: u32 = 1 << 17;

/// The command numbers of <linux/dm-ioctl.h>.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Command {
    Version = 0,
    ListDevices = 2,
    DevCreate = 3,
    DevRemove = 4,
    DevSuspend = 6,
    DevStatus = 7,
    TableLoad = 9,
    TableStatus = 12,
    GetTargetVersion = 17,
}

impl Command {
    /// `_IOWR(DM_IOCTL, command, struct dm_ioctl)`.
    fn request(self) -> libc::Ioctl {
        ((3u32 << 30) | ((HEADER_BYTES as u32) << 16) | (0xfd << 8) | self as u32) as libc::Ioctl
    }
}

/// The open control node, `/dev/mapper/control`.
#[derive(Debug)]
pub struct Control {
    file: File,
}

/// The state of a device, as reported by the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Its UUID, which identifies its creator: `MOSFS-VERITY-…`, `LVM-…`, `CRYPT-…`, or empty.
    pub uuid: String,
    /// Device number, as `st_rdev` has it.
    pub dev: u64,
    /// How many holders it has.
    pub open_count: u32,
    /// Whether it has a live table.
    pub live: bool,
    /// Whether it has a loaded table that is not live yet.
    pub loaded: bool,
    /// Whether it is suspended.
    pub suspended: bool,
    /// Whether it is read-only.
    pub read_only: bool,
    /// Whether it is removed with its last holder.
    pub deferred_remove: bool,
}

/// One target of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// First sector (of 512 bytes) of the device that it serves.
    pub start_sector: u64,
    /// How many sectors it serves.
    pub sectors: u64,
    /// Its type, such as `verity`.
    pub kind: String,
    /// Its parameters, or its status.
    pub parameters: String,
}

/// A device in the list of all devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedDevice {
    /// Device number, as `st_rdev` has it.
    pub dev: u64,
    /// Its name.
    pub name: String,
}

impl Control {
    /// Opens device-mapper. `NotFound` if the kernel lacks it (the module dm-mod).
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/mapper/control")?;
        let control = Self { file };
        // The interface has been stable since 4.0; another major number would have another layout.
        let [major, ..] = control.version()?;
        if major != 4 {
            return Err(io::Error::other(format!("device-mapper interface {major} in place of 4")));
        }
        Ok(control)
    }

    /// Version of the kernel's interface.
    pub fn version(&self) -> io::Result<[u32; 3]> {
        let reply = self.call(Command::Version, &Request::default())?;
        Ok([reply.u32_at(0)?, reply.u32_at(4)?, reply.u32_at(8)?])
    }

    /// Returns the version of a target type; the kernel loads its module first. Linux 5.6 (interface 4.41).
    ///
    /// # Errors
    /// `EINVAL` if the kernel has no such type; `ENOTTY` if it is older.
    pub fn target_version(&self, kind: &str) -> io::Result<[u32; 3]> {
        let reply = self.call(Command::GetTargetVersion, &Request { name: kind, ..Request::default() })?;
        // A struct dm_target_versions: next, then the version.
        let at = (reply.u32_at(16)? as usize).saturating_add(4);
        Ok([reply.u32_at(at)?, reply.u32_at(at.saturating_add(4))?, reply.u32_at(at.saturating_add(8))?])
    }

    /// Creates a read-only device without a table. `EBUSY` if the name or the UUID is in use.
    pub fn create(&self, name: &str, uuid: &str) -> io::Result<()> {
        self.call(
            Command::DevCreate,
            &Request { name, uuid, flags: DM_READONLY_FLAG, ..Request::default() },
        )?;
        Ok(())
    }

    /// Loads a read-only table of one target into a device; [`Control::resume`] makes it live.
    pub fn load(&self, name: &str, target: &Target) -> io::Result<()> {
        let request = Request { name, flags: DM_READONLY_FLAG, target: Some(target), ..Request::default() };
        self.call(Command::TableLoad, &request)?;
        Ok(())
    }

    /// Makes the loaded table the live one.
    pub fn resume(&self, name: &str) -> io::Result<()> {
        self.call(Command::DevSuspend, &Request { name, flags: DM_READONLY_FLAG, ..Request::default() })?;
        Ok(())
    }

    /// Removes a device. A busy one is removed with its last holder if `deferred`, else the error is `EBUSY`.
    pub fn remove(&self, name: &str, deferred: bool) -> io::Result<()> {
        let flags = if deferred { DM_DEFERRED_REMOVE } else { 0 };
        self.call(Command::DevRemove, &Request { name, flags, ..Request::default() })?;
        Ok(())
    }

    /// Returns the state of a device. `ENXIO` if there is none of that name.
    pub fn status(&self, name: &str) -> io::Result<DeviceStatus> {
        let reply = self.call(Command::DevStatus, &Request { name, ..Request::default() })?;
        let flags = reply.u32_at(28)?;
        Ok(DeviceStatus {
            uuid: reply.text_at(176, UUID_BYTES)?,
            dev: decode_dev(reply.u64_at(40)?),
            open_count: reply.u32_at(24)?,
            live: flags & DM_ACTIVE_PRESENT_FLAG != 0,
            loaded: flags & DM_INACTIVE_PRESENT_FLAG != 0,
            suspended: flags & DM_SUSPEND_FLAG != 0,
            read_only: flags & DM_READONLY_FLAG != 0,
            deferred_remove: flags & DM_DEFERRED_REMOVE != 0,
        })
    }

    /// Returns the live table of a device, as loaded.
    pub fn table(&self, name: &str) -> io::Result<Vec<Target>> {
        self.targets(name, DM_STATUS_TABLE_FLAG)
    }

    /// Returns the status of each target of a device. For verity it is `V` (valid) or `C` (corrupt block
    /// seen).
    pub fn target_status(&self, name: &str) -> io::Result<Vec<Target>> {
        self.targets(name, 0)
    }

    fn targets(&self, name: &str, flags: u32) -> io::Result<Vec<Target>> {
        let reply = self.call(Command::TableStatus, &Request { name, flags, ..Request::default() })?;
        parse_targets(&reply)
    }

    /// Lists all devices of the machine.
    pub fn list(&self) -> io::Result<Vec<ListedDevice>> {
        parse_names(&self.call(Command::ListDevices, &Request::default())?)
    }

    fn call(&self, command: Command, request: &Request<'_>) -> io::Result<Reply> {
        let mut reply_bytes = FIRST_REPLY_BYTES;
        loop {
            let mut buffer = request.encode(reply_bytes)?;
            // SAFETY: the buffer begins with a struct dm_ioctl whose data_size is the length of
            // the whole buffer, beyond which the kernel neither reads nor writes; it is aligned
            // to 8 bytes and outlives the call.
            let result =
                unsafe { libc::ioctl(self.file.as_raw_fd(), command.request(), buffer.as_mut_ptr()) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            let reply = Reply { bytes: buffer.iter().flat_map(|word| word.to_ne_bytes()).collect() };
            if reply.u32_at(28)? & DM_BUFFER_FULL_FLAG == 0 {
                return Ok(reply);
            }
            if reply_bytes >= MAX_REPLY_BYTES {
                return Err(invalid("a reply of more than 4 MiB"));
            }
            reply_bytes *= 4;
        }
    }
}

/// The input of a command.
#[derive(Default)]
struct Request<'a> {
    name: &'a str,
    uuid: &'a str,
    flags: u32,
    target: Option<&'a Target>,
}

impl Request<'_> {
    /// Returns the bytes of the request, with room for a reply, as words for alignment.
    fn encode(&self, reply_bytes: usize) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0u8; HEADER_BYTES];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        put(0, &4u32.to_ne_bytes());
        put(16, &(HEADER_BYTES as u32).to_ne_bytes());
        put(20, &u32::from(self.target.is_some()).to_ne_bytes());
        put(28, &self.flags.to_ne_bytes());
        put(48, c_text(self.name, NAME_BYTES)?);
        put(176, c_text(self.uuid, UUID_BYTES)?);
        if let Some(target) = self.target {
            bytes.extend_from_slice(&target.start_sector.to_ne_bytes());
            bytes.extend_from_slice(&target.sectors.to_ne_bytes());
            bytes.extend_from_slice(&[0; 8]);
            let mut kind = c_text(&target.kind, TYPE_BYTES)?.to_vec();
            kind.resize(TYPE_BYTES, 0);
            bytes.extend_from_slice(&kind);
            bytes.extend_from_slice(c_text(&target.parameters, usize::MAX)?);
            bytes.push(0);
        }
        let words = bytes.len().max(HEADER_BYTES + reply_bytes).div_ceil(8);
        bytes.resize(words * 8, 0);
        bytes[12..16].copy_from_slice(&((words * 8) as u32).to_ne_bytes());
        Ok(bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or([0; 8]))).collect())
    }
}

/// Returns the bytes of a string, which must fit with a NUL into `room` bytes.
fn c_text(text: &str, room: usize) -> io::Result<&[u8]> {
    if text.len() >= room || text.contains('\0') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("device-mapper takes less than {room} bytes without NUL, found {text:?}"),
        ));
    }
    Ok(text.as_bytes())
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("device-mapper answered {why}"))
}

/// Converts the kernel's `huge_encode_dev` to the encoding of makedev(3).
fn decode_dev(dev: u64) -> u64 {
    let major = (dev >> 8) & 0xfff;
    let minor = (dev & 0xff) | ((dev >> 12) & 0xfff00);
    libc::makedev(major as u32, minor as u32)
}

/// The bytes of a reply; every access is within bounds or an error.
struct Reply {
    bytes: Vec<u8>,
}

impl Reply {
    fn slice(&self, offset: usize, len: usize) -> io::Result<&[u8]> {
        offset
            .checked_add(len)
            .and_then(|end| self.bytes.get(offset..end))
            .ok_or_else(|| invalid("a record beyond its reply"))
    }

    fn array<const N: usize>(&self, offset: usize) -> io::Result<[u8; N]> {
        self.slice(offset, N)?.try_into().map_err(|_| invalid("a record beyond its reply"))
    }

    fn u32_at(&self, offset: usize) -> io::Result<u32> {
        Ok(u32::from_ne_bytes(self.array(offset)?))
    }

    fn u64_at(&self, offset: usize) -> io::Result<u64> {
        Ok(u64::from_ne_bytes(self.array(offset)?))
    }

    /// A NUL-terminated string within `limit` bytes.
    fn text_at(&self, offset: usize, limit: usize) -> io::Result<String> {
        let end = offset.saturating_add(limit).min(self.bytes.len());
        let bytes = self.bytes.get(offset..end).ok_or_else(|| invalid("a text beyond its reply"))?;
        let len = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..len]).into_owned())
    }
}

/// Reads the records after a TABLE_STATUS; `next` counts from the first record (dm_target_spec).
fn parse_targets(reply: &Reply) -> io::Result<Vec<Target>> {
    let start = reply.u32_at(16)? as usize;
    let count = reply.u32_at(20)? as usize;
    let mut targets = Vec::new();
    let mut at = start;
    for _ in 0..count {
        targets.push(Target {
            start_sector: reply.u64_at(at)?,
            sectors: reply.u64_at(at.saturating_add(8))?,
            kind: reply.text_at(at.saturating_add(24), TYPE_BYTES)?,
            parameters: reply.text_at(at.saturating_add(TARGET_BYTES), usize::MAX)?,
        });
        let next = start.saturating_add(reply.u32_at(at.saturating_add(20))? as usize);
        // Records only go forward, so no reply can make this loop endless.
        if next < at.saturating_add(TARGET_BYTES) {
            break;
        }
        at = next;
    }
    if targets.len() == count { Ok(targets) } else { Err(invalid("fewer targets than it counts")) }
}

/// Reads the records after a LIST_DEVICES; `next` counts from the record itself (dm_name_list).
fn parse_names(reply: &Reply) -> io::Result<Vec<ListedDevice>> {
    let mut at = reply.u32_at(16)? as usize;
    let mut names = Vec::new();
    // A device number 0 in the first record means that there are no devices.
    while reply.u64_at(at)? != 0 {
        names.push(ListedDevice {
            dev: decode_dev(reply.u64_at(at)?),
            name: reply.text_at(at.saturating_add(12), NAME_BYTES)?,
        });
        match reply.u32_at(at.saturating_add(8))? as usize {
            0 => break,
            next => at = at.saturating_add(next),
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reply with the given data after the header.
    fn reply(target_count: u32, data: &[u8]) -> Reply {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[16..20].copy_from_slice(&(HEADER_BYTES as u32).to_ne_bytes());
        bytes[20..24].copy_from_slice(&target_count.to_ne_bytes());
        bytes.extend_from_slice(data);
        Reply { bytes }
    }

    fn record(next: u32, kind: &str, parameters: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&7u64.to_ne_bytes());
        bytes.extend_from_slice(&800u64.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&next.to_ne_bytes());
        bytes.extend_from_slice(kind.as_bytes());
        bytes.resize(TARGET_BYTES, 0);
        bytes.extend_from_slice(parameters.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn the_request_numbers_are_those_of_the_kernel() {
        // printf("%lx", DM_VERSION), DM_TABLE_LOAD, compiled against <linux/dm-ioctl.h>.
        assert_eq!(Command::Version.request() as u32, 0xc138_fd00);
        assert_eq!(Command::TableLoad.request() as u32, 0xc138_fd09);
    }

    #[test]
    fn a_request_carries_name_flags_and_target() {
        let target =
            Target { start_sector: 0, sectors: 8, kind: "verity".into(), parameters: "1 7:0".into() };
        let request = Request { name: "n", uuid: "u", flags: DM_READONLY_FLAG, target: Some(&target) };
        let words = request.encode(0).unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let encoded = Reply { bytes };
        assert_eq!(encoded.u32_at(0).unwrap(), 4);
        assert_eq!(encoded.u32_at(12).unwrap() as usize, words.len() * 8);
        assert_eq!(encoded.u32_at(28).unwrap(), 1);
        assert_eq!(encoded.text_at(48, 128).unwrap(), "n");
        assert_eq!(encoded.text_at(176, 129).unwrap(), "u");
        let back = parse_targets(&encoded).unwrap();
        assert_eq!(back, [target]);
    }

    #[test]
    fn names_that_do_not_fit_are_refused_and_not_cut() {
        for name in ["a".repeat(128), "a\0b".to_string()] {
            let request = Request { name: &name, ..Request::default() };
            assert_eq!(request.encode(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn targets_are_read_in_order() {
        let first = record(56, "verity", "1 7:0 7:0");
        assert_eq!(first.len(), 56);
        let data = [first, record(0, "linear", "7:1 0")].concat();
        let targets = parse_targets(&reply(2, &data)).unwrap();
        assert_eq!(targets.len(), 2);
        assert_eq!((targets[0].start_sector, targets[0].sectors), (7, 800));
        assert_eq!(targets[1].kind, "linear");
        assert_eq!(targets[1].parameters, "7:1 0");
    }

    #[test]
    fn broken_replies_are_errors() {
        for next in [0, 8, u32::MAX, 1 << 20] {
            let error = parse_targets(&reply(2, &record(next, "verity", "V"))).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "next {next}");
        }
        assert!(parse_targets(&reply(1, &[0; 20])).is_err());
        assert!(parse_names(&reply(0, &[])).is_err());
        let mut name = 1u64.to_ne_bytes().to_vec();
        name.extend_from_slice(&u32::MAX.to_ne_bytes());
        name.extend_from_slice(b"x\0\0\0");
        assert!(parse_names(&reply(0, &name)).is_err());
    }

    #[test]
    fn device_numbers_are_decoded() {
        assert_eq!(decode_dev(0xfd00 | 5), libc::makedev(253, 5));
        assert_eq!(decode_dev((253 << 8) | (0x123 << 20) | 0x45), libc::makedev(253, 0x12345));
    }
}
