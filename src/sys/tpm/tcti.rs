//! The transport to a TPM: bytes of commands out, bytes of responses in, never waiting for ever.
//!
//! The enhanced system API of tpm2-tss talks to a TPM through a table of callbacks (TSS 2.0 TCTI
//! specification, `TSS2_TCTI_CONTEXT_COMMON_V2`). This is such a table, because those of
//! tpm2-tss 3.2 cannot be bounded in time: the one for swtpm ignores the time limit that it is
//! given, so that a second client of one swtpm waits for ever. It also needs no `dlopen` of
//! `libtss2-tcti-device.so.0`, which would have to be copied into an initramfs.
//!
//! What is received is checked before tpm2-tss sees it:
//!
//! ```text
//! offset 0  u16 tag           0x8001 or 0x8002
//!        2  u32 size          10 ..= 4096, and exactly what was received
//!        6  u32 response code  0, or a TPM 2.0 code: below 0x1000 with bit 7 or bit 8 set
//! ```
//! (TPM 2.0 library specification, part 1, section "Response header"; part 2, `TPM_RC`.) A code with
//! other bits could pass for one of the library's own, such as "try again".
//!
//! Invariant: a [`Channel`] is used by one thread, is reached through shared references alone, and
//! its state is borrowed only while no callback runs.

use std::cell::RefCell;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use tss_esapi::tss2_esys as tss;

/// The size of the header of a response, in bytes.
const HEADER_BYTES: usize = 10;
/// The largest response that is taken, in bytes (`TPM2_MAX_RESPONSE_SIZE`, tss2_tpm2_types.h).
const MAX_RESPONSE_BYTES: usize = 4096;
/// `TPM_ST_NO_SESSIONS` and `TPM_ST_SESSIONS` (TPM 2.0 part 2, section "TPM_ST").
const TAGS: [u16; 2] = [0x8001, 0x8002];
/// Marks our own table of callbacks; the library never looks at it.
const MAGIC: u64 = 0x6d6f_7366_7374_706d;
/// How long to wait before asking again for a device that another process holds.
const POLL_BUSY: Duration = Duration::from_millis(10);

/// `TSS2_TCTI_RC_IO_ERROR` and others of layer 10 (tss2_common.h).
const RC_IO_ERROR: u32 = 0x000a_000a;
const RC_NOT_IMPLEMENTED: u32 = 0x000a_0002;
const RC_BAD_REFERENCE: u32 = 0x000a_0005;
const RC_BAD_SEQUENCE: u32 = 0x000a_0007;
const RC_INSUFFICIENT_BUFFER: u32 = 0x000a_0006;

/// How to reach a TPM, in the words of tpm2-tss: `device:/dev/tpmrm0`,
/// `swtpm:host=127.0.0.1,port=2321` or `swtpm:path=/run/swtpm.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tcti {
    /// A character device, through the kernel's resource manager.
    Device(PathBuf),
    /// A TPM simulator's data channel over TCP.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port of the data channel.
        port: u16,
    },
    /// A TPM simulator's data channel over a Unix socket.
    Unix(PathBuf),
}

/// Why a text does not say how to reach a TPM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{found}` does not say how to reach a TPM: expected `device:/dev/tpmrm0`, \
     `swtpm:host=127.0.0.1,port=2321` or `swtpm:path=SOCKET`"
)]
pub struct TctiError {
    /// The text as it was given.
    pub found: String,
}

impl FromStr for Tcti {
    type Err = TctiError;

    fn from_str(text: &str) -> Result<Self, TctiError> {
        let wrong = || TctiError { found: text.chars().take(200).collect() };
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        match kind {
            "device" if rest.is_empty() => Ok(Tcti::Device(PathBuf::from("/dev/tpmrm0"))),
            "device" => Ok(Tcti::Device(PathBuf::from(rest))),
            "swtpm" => {
                let (mut host, mut port, mut path) = ("127.0.0.1".to_string(), 2321_u16, None);
                for part in rest.split(',').filter(|part| !part.is_empty()) {
                    match part.split_once('=').ok_or_else(wrong)? {
                        ("host", value) => host = value.to_string(),
                        ("port", value) => port = value.parse().map_err(|_| wrong())?,
                        ("path", value) => path = Some(PathBuf::from(value)),
                        _ => return Err(wrong()),
                    }
                }
                Ok(match path {
                    Some(path) => Tcti::Unix(path),
                    None => Tcti::Tcp { host, port },
                })
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Tcti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tcti::Device(path) => write!(f, "device:{}", path.display()),
            Tcti::Tcp { host, port } => write!(f, "swtpm:host={host},port={port}"),
            Tcti::Unix(path) => write!(f, "swtpm:path={}", path.display()),
        }
    }
}

/// What went wrong below the TPM's own answers.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing came before the deadline.
    Timeout,
    /// The connection broke.
    Io(io::Error),
    /// What came is no response of a TPM 2.0.
    Garbled(String),
}

trait Link: Read + Write + AsRawFd {}
impl Link for File {}
impl Link for TcpStream {}
impl Link for UnixStream {}

/// The table of callbacks with the connection behind it.
#[repr(C)]
pub(super) struct Channel {
    /// First, so that a pointer to the table is a pointer to the channel.
    common: tss::TSS2_TCTI_CONTEXT_COMMON_V2,
    state: RefCell<State>,
}

struct State {
    link: Box<dyn Link>,
    /// A character device returns a whole response to one read; a socket returns a stream.
    whole_reads: bool,
    deadline: Instant,
    /// A response that has arrived whole and was not taken yet.
    response: Option<Vec<u8>>,
    failure: Option<Failure>,
}

impl Channel {
    /// Connects; waits for a device that is busy until the deadline.
    pub(super) fn connect(tcti: &Tcti, deadline: Instant) -> Result<Self, Failure> {
        let (link, whole_reads): (Box<dyn Link>, bool) = match tcti {
            Tcti::Device(path) => (Box::new(open_device(path, deadline)?), true),
            Tcti::Tcp { host, port } => (Box::new(connect_tcp(host, *port, deadline)?), false),
            Tcti::Unix(path) => {
                let stream = UnixStream::connect(path).map_err(Failure::Io)?;
                stream.set_nonblocking(true).map_err(Failure::Io)?;
                (Box::new(stream), false)
            }
        };
        Ok(Self {
            common: tss::TSS2_TCTI_CONTEXT_COMMON_V2 {
                v1: tss::TSS2_TCTI_CONTEXT_COMMON_V1 {
                    magic: MAGIC,
                    version: 2,
                    transmit: Some(transmit),
                    receive: Some(receive),
                    finalize: None,
                    cancel: Some(cancel),
                    getPollHandles: Some(poll_handles),
                    setLocality: Some(set_locality),
                },
                makeSticky: Some(make_sticky),
            },
            state: RefCell::new(State { link, whole_reads, deadline, response: None, failure: None }),
        })
    }

    /// Sets the time by which whatever comes next must have been answered.
    pub(super) fn set_deadline(&self, deadline: Instant) {
        if let Ok(mut state) = self.state.try_borrow_mut() {
            state.deadline = deadline;
        }
    }

    /// The time by which whatever comes next must have been answered.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.state.try_borrow().ok().map(|state| state.deadline)
    }

    /// The failure since the last call of this, if there was one.
    pub(super) fn take_failure(&self) -> Option<Failure> {
        self.state.try_borrow_mut().ok().and_then(|mut state| state.failure.take())
    }
}

fn open_device(path: &PathBuf, deadline: Instant) -> Result<File, Failure> {
    loop {
        // O_NONBLOCK: the kernel (4.20 and up) then works on a command in the background, and
        // poll(2) says when the response is there.
        match OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
        {
            Ok(file) => return Ok(file),
            // /dev/tpm0 has room for one process; /dev/tpmrm0 for all.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() >= deadline {
                    return Err(Failure::Timeout);
                }
                std::thread::sleep(POLL_BUSY);
            }
            Err(error) => return Err(Failure::Io(error)),
        }
    }
}

fn connect_tcp(host: &str, port: u16, deadline: Instant) -> Result<TcpStream, Failure> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs().map_err(Failure::Io)? {
        let left = left(deadline).ok_or(Failure::Timeout)?;
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(Failure::Io)?;
                stream.set_nonblocking(true).map_err(Failure::Io)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(Failure::Timeout),
            Err(error) => last = error,
        }
    }
    Err(Failure::Io(last))
}

/// What is left until the deadline, or `None` where nothing is.
fn left(deadline: Instant) -> Option<Duration> {
    deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

impl State {
    /// Waits for `events` or for the deadline, whichever is first.
    fn wait(&self, events: libc::c_short) -> Result<(), Failure> {
        loop {
            let left = left(self.deadline).ok_or(Failure::Timeout)?;
            // Rounded up, so that a wait of less than a millisecond does not spin.
            let milliseconds = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
            let mut entry = libc::pollfd { fd: self.link.as_raw_fd(), events, revents: 0 };
            // SAFETY: `entry` is one valid pollfd for the length of the call, and its descriptor is
            // kept open by `self.link`.
            match unsafe { libc::poll(&raw mut entry, 1, milliseconds) } {
                0 => {}
                -1 => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(Failure::Io(error));
                    }
                }
                _ => return Ok(()),
            }
        }
    }

    fn send(&mut self, mut command: &[u8]) -> Result<(), Failure> {
        while !command.is_empty() {
            left(self.deadline).ok_or(Failure::Timeout)?;
            match self.link.write(command) {
                Ok(0) => return Err(Failure::Io(io::ErrorKind::WriteZero.into())),
                Ok(sent) => command = command.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(libc::POLLOUT)?,
                Err(error) => return Err(Failure::Io(error)),
            }
        }
        Ok(())
    }

    /// One read that got something, or the deadline.
    fn read_some(&mut self, into: &mut [u8]) -> Result<usize, Failure> {
        loop {
            // Waits first: the kernel's TPM device answers a read that comes too early with no
            // bytes. With bytes announced, no bytes mean the end.
            self.wait(libc::POLLIN)?;
            match self.link.read(into) {
                Ok(0) => return Err(Failure::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Failure::Io(error)),
            }
        }
    }

    fn fetch(&mut self) -> Result<Vec<u8>, Failure> {
        let mut response = vec![0_u8; MAX_RESPONSE_BYTES];
        if self.whole_reads {
            let count = self.read_some(&mut response)?;
            response.truncate(count);
            let size = check_header(&response)?;
            if size != count {
                return Err(Failure::Garbled(format!("{count} bytes with {size} in their header")));
            }
            return Ok(response);
        }
        let mut filled = 0;
        let mut wanted = HEADER_BYTES;
        while filled < wanted {
            // `wanted` is at most MAX_RESPONSE_BYTES: check_header saw to that.
            let Some(space) = response.get_mut(filled..wanted) else { break };
            filled += self.read_some(space)?;
            if filled == HEADER_BYTES {
                wanted = check_header(response.get(..filled).unwrap_or_default())?;
            }
        }
        response.truncate(filled);
        Ok(response)
    }
}

/// The size that the header of a response names; everything in it is checked.
fn check_header(response: &[u8]) -> Result<usize, Failure> {
    let short = || Failure::Garbled(format!("a response of {} bytes", response.len()));
    let (tag, rest) = response.split_first_chunk::<2>().ok_or_else(short)?;
    let (size, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let (code, _) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let tag = u16::from_be_bytes(*tag);
    if !TAGS.contains(&tag) {
        return Err(Failure::Garbled(format!("a response with the tag {tag:#06x}")));
    }
    let size = u32::from_be_bytes(*size);
    let bytes = usize::try_from(size).ok().filter(|size| (HEADER_BYTES..=MAX_RESPONSE_BYTES).contains(size));
    let bytes = bytes.ok_or_else(|| Failure::Garbled(format!("a response that says it has {size} bytes")))?;
    let code = u32::from_be_bytes(*code);
    if code != 0 && (code >= 0x1000 || code & 0x180 == 0) {
        return Err(Failure::Garbled(format!("the response code {code:#x}, which no TPM 2.0 returns")));
    }
    if code != 0 && bytes != HEADER_BYTES {
        return Err(Failure::Garbled(format!("an error response of {bytes} bytes")));
    }
    Ok(bytes)
}

/// The channel behind a pointer that the library hands back.
///
/// # Safety
/// The pointer is the one that was given to `Esys_Initialize`: to a live [`Channel`].
unsafe fn channel<'a>(context: *mut tss::TSS2_TCTI_CONTEXT) -> Option<&'a Channel> {
    // SAFETY: the caller passes a pointer to a live Channel, which only shared references reach.
    unsafe { context.cast::<Channel>().as_ref() }
}

/// TCTI specification, `transmit`: sends a command.
///
/// # Safety
/// Called by the library alone, with the context that it was given and, for its length, valid pointers.
unsafe extern "C" fn transmit(
    context: *mut tss::TSS2_TCTI_CONTEXT,
    size: tss::size_t,
    command: *const u8,
) -> u32 {
    // SAFETY: the library passes the context that it was given.
    let Some(channel) = (unsafe { channel(context) }) else { return RC_BAD_REFERENCE };
    let size = match usize::try_from(size) {
        Ok(size) if !command.is_null() && size <= MAX_RESPONSE_BYTES => size,
        _ => return RC_BAD_REFERENCE,
    };
    // SAFETY: the library passes `size` readable bytes (TCTI specification, "transmit").
    let command = unsafe { std::slice::from_raw_parts(command, size) };
    let Ok(mut state) = channel.state.try_borrow_mut() else { return RC_BAD_SEQUENCE };
    state.response = None;
    match state.send(command) {
        Ok(()) => 0,
        Err(failure) => {
            state.failure = Some(failure);
            RC_IO_ERROR
        }
    }
}

/// TCTI specification, `receive`: returns the response, or its size where the buffer is too small.
///
/// # Safety
/// Called by the library alone, with the context that it was given and, for its length, valid pointers.
unsafe extern "C" fn receive(
    context: *mut tss::TSS2_TCTI_CONTEXT,
    size: *mut tss::size_t,
    response: *mut u8,
    _timeout: i32,
) -> u32 {
    // SAFETY: the library passes the context that it was given.
    let Some(channel) = (unsafe { channel(context) }) else { return RC_BAD_REFERENCE };
    // SAFETY: the library passes a pointer to a size that lives through the call, or null.
    let Some(size) = (unsafe { size.as_mut() }) else { return RC_BAD_REFERENCE };
    let Ok(mut state) = channel.state.try_borrow_mut() else { return RC_BAD_SEQUENCE };
    if state.response.is_none() {
        match state.fetch() {
            Ok(bytes) => state.response = Some(bytes),
            Err(failure) => {
                state.failure = Some(failure);
                return RC_IO_ERROR;
            }
        }
    }
    let Some(bytes) = state.response.as_ref() else { return RC_BAD_SEQUENCE };
    let given = *size;
    *size = bytes.len() as tss::size_t;
    if response.is_null() {
        // "How large is it?": the response stays here.
        return 0;
    }
    if given < *size {
        return RC_INSUFFICIENT_BUFFER;
    }
    // SAFETY: the library says that `response` has room for `given` bytes, which is enough, and
    // its buffer cannot overlap with ours.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), response, bytes.len()) };
    state.response = None;
    0
}

/// TCTI specification, `cancel`: not offered.
///
/// # Safety
/// Called by the library alone, with the context that it was given and, for its length, valid pointers.
unsafe extern "C" fn cancel(_context: *mut tss::TSS2_TCTI_CONTEXT) -> u32 {
    RC_NOT_IMPLEMENTED
}

/// TCTI specification, `getPollHandles`: not offered.
///
/// # Safety
/// Called by the library alone, with the context that it was given and, for its length, valid pointers.
unsafe extern "C" fn poll_handles(
    _context: *mut tss::TSS2_TCTI_CONTEXT,
    _handles: *mut tss::TSS2_TCTI_POLL_HANDLE,
    _count: *mut tss::size_t,
) -> u32 {
    RC_NOT_IMPLEMENTED
}

/// TCTI specification, `setLocality`: not offered.
///
/// # Safety
/// Called by the library alone, with the context that it was given and, for its length, valid pointers.
unsafe extern "C" fn set_locality(_context: *mut tss::TSS2_TCTI_CONTEXT, _locality: u8) -> u32 {
    RC_NOT_IMPLEMENTED
}

/// TCTI specification, `makeSticky`: not offered.
///
/// # Safety
/// Called by the library alone, with the context that it was given and, for its length, valid pointers.
unsafe extern "C" fn make_sticky(
    _context: *mut tss::TSS2_TCTI_CONTEXT,
    _handle: *mut tss::TPM2_HANDLE,
    _sticky: u8,
) -> u32 {
    RC_NOT_IMPLEMENTED
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(tag: u16, size: u32, code: u32) -> Vec<u8> {
        [&tag.to_be_bytes()[..], &size.to_be_bytes(), &code.to_be_bytes()].concat()
    }

    #[test]
    fn the_words_for_a_tpm_are_those_of_tpm2_tss() {
        for (text, expected) in [
            ("device:/dev/tpmrm0", Tcti::Device("/dev/tpmrm0".into())),
            ("device", Tcti::Device("/dev/tpmrm0".into())),
            ("swtpm:host=::1,port=9", Tcti::Tcp { host: "::1".into(), port: 9 }),
            ("swtpm:path=/a/b", Tcti::Unix("/a/b".into())),
        ] {
            assert_eq!(text.parse::<Tcti>().unwrap(), expected);
        }
        for text in ["", "tabrmd:", "swtpm:port=70000", "swtpm:nonsense", "swtpm:host"] {
            assert!(text.parse::<Tcti>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_header_that_no_tpm_sends_is_refused() {
        assert_eq!(check_header(&response(0x8001, 10, 0)).unwrap(), 10);
        assert_eq!(check_header(&response(0x8002, 4096, 0)).unwrap(), 4096);
        assert_eq!(check_header(&response(0x8001, 10, 0x18b)).unwrap(), 10);
        for bad in [
            response(0x00c4, 10, 0),       // TPM 1.2
            response(0x8001, 9, 0),        // shorter than itself
            response(0x8001, 4097, 0),     // longer than any
            response(0x8001, u32::MAX, 0), // far longer than any
            response(0x8001, 10, 9),       // TSS2_BASE_RC_TRY_AGAIN
            response(0x8001, 10, 0xa0009), // the same of a layer
            response(0x8001, 20, 0x922),   // an error has no body
            vec![0x80],
            vec![],
        ] {
            assert!(matches!(check_header(&bad), Err(Failure::Garbled(_))), "{bad:x?}");
        }
    }
}
