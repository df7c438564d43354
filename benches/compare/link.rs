//! A slow link: a proxy on this machine that passes bytes on late, and no more of them a second than the link has.
//!
//! Each direction delays by half a round trip. What the server sends is counted, and all connections share its rate.
//! A new connection costs a round trip of its own, as TCP's greeting does.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;

/// Bytes a second from the server: 100 Mbit/s.
pub const BYTES_PER_SECOND: f64 = 12.5e6;
/// There and back.
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// What is passed on at a time, in bytes: 0.65 ms of the link.
const PIECE: usize = 8 << 10;
/// How far the link may catch up, where this process was late: less than the pipe holds.
const CATCH_UP: Duration = Duration::from_millis(5);

/// A link to a server; it ends when it is dropped.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    server: SocketAddr,
    /// When all that was sent so far is through.
    free: Mutex<Instant>,
    sent: AtomicU64,
    stop: AtomicBool,
}

impl Link {
    /// A link to the server at this address.
    pub fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            server,
            free: Mutex::new(Instant::now()),
            sent: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let own = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if own.stop.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), shared) = (stream, own.clone()) else { continue };
                // A connection that fails ends on both sides, which is what its client has to cope with.
                thread::spawn(move || drop(shared.pass(stream)));
            }
        });
        Ok(Self { address, shared })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that the server has sent through it, with the heads of its answers.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that listens.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    fn pass(&self, client: TcpStream) -> std::io::Result<()> {
        thread::sleep(ROUND_TRIP);
        let server = TcpStream::connect(self.server)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (from_client, from_server) = (client.try_clone()?, server.try_clone()?);
        thread::scope(|scope| {
            scope.spawn(|| self.one_way(from_client, server, false));
            self.one_way(from_server, client, true);
        });
        Ok(())
    }

    /// Passes bytes on until one side ends.
    fn one_way(&self, mut from: TcpStream, mut to: TcpStream, shaped: bool) {
        let (pipe, out) = mpsc::channel::<(Instant, Vec<u8>)>();
        thread::scope(|scope| {
            scope.spawn(move || {
                for (due, bytes) in out {
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    if to.write_all(&bytes).is_err() {
                        break;
                    }
                }
                // Also ends the reading of the other direction.
                let _ = to.shutdown(Shutdown::Both);
            });
            let mut buffer = vec![0; PIECE];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let through = if shaped { self.reserve(count) } else { Instant::now() };
                thread::sleep(through.saturating_duration_since(Instant::now()));
                if pipe.send((through + ROUND_TRIP / 2, buffer[..count].to_vec())).is_err() {
                    break;
                }
            }
            drop(pipe);
            let _ = from.shutdown(Shutdown::Read);
        });
    }

    /// Takes the link for some bytes; when they are through.
    fn reserve(&self, bytes: usize) -> Instant {
        self.sent.fetch_add(bytes as u64, Ordering::SeqCst);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let start = (*free).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        *free = start + Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND);
        *free
    }
}
