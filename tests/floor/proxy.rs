//! A TPM in between: passes commands on to a simulator, or answers in its stead.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use mosfs::internals::sys::tpm::Tcti;

/// What to do with a command.
pub enum Do {
    /// Pass it on.
    Forward,
    /// Pass it on, then change the response.
    Mangle(Box<dyn FnOnce(&mut Vec<u8>) + Send>),
    /// Answer with this response code.
    Code(u32),
    /// Answer with these bytes.
    Bytes(Vec<u8>),
    /// Never answer.
    Hang,
    /// Close the connection.
    Close,
}

/// The proxy; ends when dropped.
pub struct Proxy {
    port: u16,
    stop: Arc<AtomicBool>,
    client: Arc<Mutex<Option<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
}

/// The command code of a command.
pub fn command_code(command: &[u8]) -> u32 {
    u32::from_be_bytes(command[6..10].try_into().unwrap())
}

/// A response without a body.
pub fn response(code: u32) -> Vec<u8> {
    [&0x8001_u16.to_be_bytes()[..], &10_u32.to_be_bytes(), &code.to_be_bytes()].concat()
}

fn read_message(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; 10];
    stream.read_exact(&mut message).ok()?;
    let size = u32::from_be_bytes(message[2..6].try_into().unwrap()) as usize;
    message.resize(size.max(10), 0);
    stream.read_exact(&mut message[10..]).ok()?;
    Some(message)
}

impl Proxy {
    /// Serves one client after another; `decide` gets the number of the command, from 0, and the command.
    pub fn start(behind: Option<u16>, mut decide: impl FnMut(usize, &[u8]) -> Do + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, current) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let (stopped, slot) = (stop.clone(), current.clone());
        let thread = thread::spawn(move || {
            let mut number = 0;
            for client in listener.incoming() {
                let Ok(mut client) = client else { return };
                *slot.lock().unwrap() = client.try_clone().ok();
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                // Of its own for each client, as the client's own connection would be.
                let mut tpm = behind.and_then(|port| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok());
                while let Some(command) = read_message(&mut client) {
                    let action = decide(number, &command);
                    number += 1;
                    let mut forward = || {
                        let tpm = tpm.as_mut()?;
                        tpm.write_all(&command).ok()?;
                        read_message(tpm)
                    };
                    let answer = match action {
                        Do::Forward => forward(),
                        Do::Mangle(change) => forward().map(|mut answer| {
                            change(&mut answer);
                            answer
                        }),
                        Do::Code(code) => Some(response(code)),
                        Do::Bytes(bytes) => Some(bytes),
                        Do::Hang => {
                            // Until the client gives up.
                            let _ = client.read(&mut [0]);
                            None
                        }
                        Do::Close => None,
                    };
                    let Some(answer) = answer else { break };
                    if client.write_all(&answer).is_err() {
                        break;
                    }
                }
                // There is another descriptor of it in the slot.
                let _ = client.shutdown(Shutdown::Both);
            }
        });
        Self { port, stop, client: current, thread: Some(thread) }
    }

    /// How to reach it.
    pub fn tcti(&self) -> Tcti {
        Tcti::Tcp { host: "127.0.0.1".into(), port: self.port }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(client) = self.client.lock().unwrap().take() {
            let _ = client.shutdown(Shutdown::Both);
        }
        // Wakes the listener.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
