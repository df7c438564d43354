//! A disk with a write cache that a power cut loses: an NBD server in memory.
//!
//! QEMU's own drives cannot lose what the guest wrote without a flush: killing QEMU leaves it in the
//! host's page cache. Here a write goes into a cache of sectors; a FLUSH makes all that is in it
//! durable; a write with FUA makes itself durable. [`Disk::cut`] is the power cut: for each sector that was
//! written since the last flush, chance decides whether the platter has what it had before, or any one
//! of what was written to it since. So writes are lost, torn between sectors of 512 bytes, and
//! reordered, which is what a disk may do, and no more.
//!
//! Protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle
//! handshake, simple replies, one client at a time. All integers are big-endian.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const SECTOR: usize = 512;

/// NBD_FLAG_HAS_FLAGS, SEND_FLUSH, SEND_FUA.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3;

/// What a machine asked of the disk.
#[allow(dead_code)]
#[derive(Debug, Clone)]
pub enum Operation {
    /// Bytes were read from here on.
    Read(u64),
    /// These were written here; durable at once with FUA.
    Write(u64, Vec<u8>, bool),
    Flush,
}

/// What is on the disk, and what is only in its cache.
#[derive(Default)]
struct Content {
    /// What a power cut leaves.
    platter: Vec<u8>,
    /// What a reader sees.
    seen: Vec<u8>,
    /// All that was written to a sector since the last flush, in order.
    cache: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    /// How many writes and flushes there were.
    operations: u64,
    /// The number of the one at which the power goes, and the file that says so.
    cut_at: Option<(u64, PathBuf)>,
    /// All of them since [`Disk::record`].
    log: Option<Vec<Operation>>,
}

impl Content {
    /// Counts a write or a flush; whether the power goes with it.
    fn count(&mut self) -> bool {
        self.operations += 1;
        match &self.cut_at {
            Some((at, file)) if self.operations >= *at => {
                std::fs::write(file, "").expect("the file that says so");
                true
            }
            _ => false,
        }
    }

    fn log(&mut self, operation: impl FnOnce() -> Operation) {
        if let Some(log) = &mut self.log {
            log.push(operation());
        }
    }

    fn write(&mut self, at: usize, data: &[u8], durable: bool) {
        self.seen[at..at + data.len()].copy_from_slice(data);
        if durable {
            self.platter[at..at + data.len()].copy_from_slice(data);
        }
        for (index, sector) in data.chunks_exact(SECTOR).enumerate() {
            let number = at / SECTOR + index;
            if durable {
                // What was written to it before must not come after it.
                self.cache.remove(&number);
            } else {
                self.cache.entry(number).or_default().push(sector.try_into().expect("a sector"));
            }
        }
    }

    /// `chance(n)` gives a number below n.
    fn cut(&mut self, mut chance: impl FnMut(u64) -> u64) -> Loss {
        self.cut_at = None;
        let mut loss = Loss { cached: self.cache.len(), lost: 0, operations: self.operations };
        // Of ten: how much of the cache reaches the platter this time, from nothing to everything.
        let reaches = chance(11);
        for (number, written) in std::mem::take(&mut self.cache) {
            let at = number * SECTOR;
            // A disk may write a sector out early, and then again: any of the versions may be there.
            let which = if chance(10) < reaches {
                match chance(4) {
                    0 => Some(chance(written.len() as u64) as usize),
                    _ => Some(written.len() - 1),
                }
            } else {
                None
            };
            if which != Some(written.len() - 1) {
                loss.lost += 1;
            }
            if let Some(sector) = which.and_then(|index| written.get(index)) {
                self.platter[at..at + SECTOR].copy_from_slice(sector);
            }
        }
        self.seen.copy_from_slice(&self.platter);
        loss
    }

    fn flush(&mut self) {
        for number in std::mem::take(&mut self.cache).into_keys() {
            let at = number * SECTOR;
            self.platter[at..at + SECTOR].copy_from_slice(&self.seen[at..at + SECTOR]);
        }
    }
}

/// The power goes at the last of these operations of a machine that ran on `image`: a write is in the cache, a flush has not
/// begun. Returns what is on the disk then, and what was lost.
#[allow(dead_code)]
pub fn cut_at(image: &[u8], operations: &[Operation], chance: impl FnMut(u64) -> u64) -> (Vec<u8>, Loss) {
    let mut content = Content { platter: image.to_vec(), seen: image.to_vec(), ..Content::default() };
    for (number, operation) in operations.iter().enumerate() {
        let is_last = number + 1 == operations.len();
        match operation {
            Operation::Read(_) => {}
            Operation::Write(at, data, durable) => content.write(*at as usize, data, *durable && !is_last),
            Operation::Flush if is_last => {}
            Operation::Flush => content.flush(),
        }
    }
    let loss = content.cut(chance);
    (content.seen, loss)
}

/// What a power cut did.
#[derive(Debug, Clone, Copy)]
pub struct Loss {
    /// Sectors that were in the cache.
    pub cached: usize,
    /// Those that keep something else than what was written to them last.
    pub lost: usize,
    /// How many writes and flushes there were since the disk was made.
    pub operations: u64,
}

/// The disk, and the server that offers it.
pub struct Disk {
    socket: PathBuf,
    content: Arc<Mutex<Content>>,
    /// Whether a client is being served.
    busy: Arc<AtomicBool>,
}

impl Disk {
    /// Offers an image at a Unix socket, for as long as the program runs.
    pub fn serve(image: Vec<u8>, socket: &Path) -> Self {
        assert_eq!(image.len() % SECTOR, 0, "a disk has whole sectors");
        let content = Content { platter: image.clone(), seen: image, ..Content::default() };
        let content = Arc::new(Mutex::new(content));
        let listener = UnixListener::bind(socket).expect("a socket");
        let busy = Arc::new(AtomicBool::new(false));
        let shared = (content.clone(), busy.clone());
        std::thread::spawn(move || {
            let (content, busy) = shared;
            for client in listener.incoming().flatten() {
                busy.store(true, Ordering::SeqCst);
                let _ = talk(client, &content);
                busy.store(false, Ordering::SeqCst);
            }
        });
        Self { socket: socket.into(), content, busy }
    }

    /// Where QEMU finds it.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What is on the disk for whoever reads it now.
    pub fn image(&self) -> Vec<u8> {
        lock(&self.content).seen.clone()
    }

    /// Begins to write down what is asked of the disk.
    #[allow(dead_code)]
    pub fn record(&self) {
        lock(&self.content).log = Some(Vec::new());
    }

    /// What was asked of it since, by a machine that has ended.
    #[allow(dead_code)]
    pub fn recorded(&self) -> Vec<Operation> {
        while self.busy.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        lock(&self.content).log.take().unwrap_or_default()
    }

    /// Lets the power go at the `number`-th write or flush from now, and then makes `file`.
    ///
    /// That write is in the cache and that flush has not begun; neither is ever answered, and neither is
    /// anything after it. So nothing that waits for the disk goes on until the machine is killed.
    pub fn cut_after(&self, number: u64, file: &Path) {
        let content = &mut *lock(&self.content);
        content.cut_at = Some((content.operations + number, file.into()));
    }

    /// Puts back what [`Disk::image`] returned, for a machine that has ended, as if nothing had been written since.
    pub fn put_back(&self, image: &[u8]) {
        while self.busy.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let content = &mut *lock(&self.content);
        content.cut_at = None;
        content.cache.clear();
        content.seen.copy_from_slice(image);
        content.platter.copy_from_slice(image);
    }

    /// The power goes, for a machine that has ended. `chance(n)` gives a number below n.
    pub fn cut(&self, chance: impl FnMut(u64) -> u64) -> Loss {
        // What the machine had sent before it ended has reached the disk.
        while self.busy.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        lock(&self.content).cut(chance)
    }
}

fn lock(content: &Mutex<Content>) -> MutexGuard<'_, Content> {
    content.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number<const N: usize>(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes.iter().fold(0, |all, &byte| all << 8 | u64::from(byte)))
}

/// Serves a client to its end.
fn talk(mut client: UnixStream, content: &Mutex<Content>) -> io::Result<()> {
    if !negotiate(&mut client, lock(content).seen.len() as u64)? {
        return Ok(());
    }
    loop {
        if number::<4>(&mut client)? != 0x2560_9513 {
            return Err(io::Error::other("no NBD request"));
        }
        let flags = number::<2>(&mut client)?;
        let kind = number::<2>(&mut client)?;
        let cookie = number::<8>(&mut client)?;
        let (offset, len) = (number::<8>(&mut client)? as usize, number::<4>(&mut client)? as usize);
        let mut reply = Vec::with_capacity(16 + if kind == 0 { len } else { 0 });
        reply.extend_from_slice(&0x6744_6698_u32.to_be_bytes());
        reply.extend_from_slice(&0_u32.to_be_bytes());
        reply.extend_from_slice(&cookie.to_be_bytes());
        let mut dead = false;
        match kind {
            // NBD_CMD_READ
            0 => {
                let content = &mut *lock(content);
                content.log(|| Operation::Read(offset as u64));
                reply.extend_from_slice(&content.seen[offset..offset + len]);
            }
            // NBD_CMD_WRITE, with NBD_CMD_FLAG_FUA
            1 => {
                let mut data = vec![0; len];
                client.read_exact(&mut data)?;
                assert!(offset % SECTOR == 0 && len % SECTOR == 0, "whole sectors are written");
                let content = &mut *lock(content);
                dead = content.count();
                content.log(|| Operation::Write(offset as u64, data.clone(), flags & 1 != 0));
                content.write(offset, &data, flags & 1 != 0 && !dead);
            }
            // NBD_CMD_DISC
            2 => return Ok(()),
            // NBD_CMD_FLUSH
            3 => {
                let content = &mut *lock(content);
                dead = content.count();
                content.log(|| Operation::Flush);
                if !dead {
                    content.flush();
                }
            }
            // EINVAL
            _ => reply[4..8].copy_from_slice(&22_u32.to_be_bytes()),
        }
        if dead {
            // Until the machine is killed.
            return io::copy(&mut client, &mut io::sink()).map(|_| ());
        }
        client.write_all(&reply)?;
    }
}

/// The handshake; whether transmission begins.
fn negotiate(client: &mut UnixStream, bytes: u64) -> io::Result<bool> {
    // NBDMAGIC, IHAVEOPT, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
    client.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    number::<4>(client)?;
    loop {
        number::<8>(client)?;
        let option = number::<4>(client)?;
        let len = number::<4>(client)? as usize;
        let mut data = vec![0; len.min(1 << 16)];
        client.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut all = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            all.extend_from_slice(&(option as u32).to_be_bytes());
            all.extend_from_slice(&kind.to_be_bytes());
            all.extend_from_slice(&(data.len() as u32).to_be_bytes());
            all.extend_from_slice(data);
            client.write_all(&all)
        };
        match option {
            // NBD_OPT_ABORT: NBD_REP_ACK
            2 => {
                reply(1, &[])?;
                return Ok(false);
            }
            // NBD_OPT_INFO, NBD_OPT_GO: NBD_REP_INFO with NBD_INFO_EXPORT, NBD_REP_ACK
            6 | 7 => {
                let mut info = vec![0, 0];
                info.extend_from_slice(&bytes.to_be_bytes());
                info.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
                reply(3, &info)?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(true);
                }
            }
            // NBD_REP_ERR_UNSUP
            _ => reply((1 << 31) + 1, &[])?,
        }
    }
}

#[test]
fn a_cut_loses_only_what_was_not_flushed() {
    let mut content = Content { platter: vec![0; 4096], seen: vec![0; 4096], ..Content::default() };
    content.write(0, &[1; 1024], false);
    content.flush();
    content.write(0, &[2; 1024], false);
    content.write(0, &[3; 512], false);
    content.write(1024, &[4; 512], true);
    assert_eq!(content.cache.len(), 2);
    let disk = Disk { socket: PathBuf::new(), content: Arc::new(Mutex::new(content)), busy: Arc::default() };
    assert_eq!(disk.image()[..512], [3; 512]);
    // Nothing of the cache reaches the platter.
    let loss = disk.cut(|_| 0);
    assert_eq!((loss.cached, loss.lost), (2, 2));
    assert_eq!(disk.image()[..1024], [1; 1024]);
    assert_eq!(disk.image()[1024..1536], [4; 512]);
}
