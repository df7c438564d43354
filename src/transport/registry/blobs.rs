//! Blobs: small ones whole, others as a stream that goes on after a cut.
//!
//! After a cut the rest is asked for by `Range`, with `If-Range` where the server gave an ETag. A
//! 206 must be exactly what was asked for; a 200 is the whole blob again, of which the part that
//! is here is skipped. A server that cuts again and again is given up after [`TRIES`] cuts without
//! [`PROGRESS`] between them; then the next server goes on at the same place. What comes is hashed
//! by whoever reads the stream, so bytes of two servers may meet in one blob.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use ureq::http::{Method, header};

use super::client::{Scope, TRIES};
use super::error::RegistryError;
use super::http::{Answer, Ask, Reader, of_io};
use super::settings::Endpoint;
use super::{Registry, Shared};
use crate::image::oci::Descriptor;
use crate::transport::{RangeAsk, Transport, TransportError};

/// How much must have come since the last cut for the count of cuts to begin again, in bytes.
const PROGRESS: u64 = 64 << 10;

impl Registry {
    /// A blob that fits in memory; its size is checked, its digest is not.
    pub(super) fn small_blob(&self, blob: &Descriptor) -> Result<Vec<u8>, TransportError> {
        let mut bytes = Vec::new();
        // The stream ends one byte beyond the promised size at the latest.
        self.stream(blob, 0)?.read_to_end(&mut bytes).map_err(of_stream)?;
        Ok(bytes)
    }

    /// A blob from byte `offset` on; at most one byte beyond its size comes.
    pub(super) fn stream(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, TransportError> {
        let mirrors = self.endpoints.iter().filter(|one| one.by_digest && !self.is_dead(one)).cloned();
        let mut stream = BlobStream {
            shared: self.shared.clone(),
            location: self.location(),
            endpoints: mirrors.collect(),
            server: 0,
            blob: blob.clone(),
            at: offset,
            reader: None,
            etag: None,
            cuts: 0,
            since_cut: 0,
        };
        stream.connect()?;
        Ok(stream)
    }

    /// Fills `buffer` with a part of a blob: one request to each server until one answers well.
    pub(super) fn part(
        &self,
        blob: &Descriptor,
        offset: u64,
        buffer: &mut [u8],
        ask: &RangeAsk,
    ) -> Result<(), TransportError> {
        let mut servers: Vec<&Endpoint> =
            self.endpoints.iter().filter(|one| one.by_digest && !self.is_dead(one)).collect();
        if ask.distrusted {
            servers.reverse();
        }
        let mut failed = None;
        for endpoint in servers {
            match self.part_from(endpoint, blob, offset, buffer, ask) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.note_dead(endpoint, &error);
                    // Of several servers the last error counts, but one that may pass before one that will not.
                    failed = match failed {
                        Some(TransportError::Registry(first))
                            if first.is_temporary() && !error.is_temporary() =>
                        {
                            Some(TransportError::Registry(first))
                        }
                        _ => Some(error),
                    };
                }
            }
        }
        Err(failed.unwrap_or_else(|| RegistryError::NotListed { location: self.location() }.into()))
    }

    fn part_from(
        &self,
        endpoint: &Endpoint,
        blob: &Descriptor,
        offset: u64,
        buffer: &mut [u8],
        ask: &RangeAsk,
    ) -> Result<(), TransportError> {
        let url = Self::url(endpoint, &format!("blobs/{}", blob.digest));
        let last = offset.saturating_add(buffer.len() as u64).saturating_sub(1);
        let mut request = Ask::new(Method::GET);
        // One range only: some servers refuse several.
        request.headers.push((header::RANGE, format!("bytes={offset}-{last}")));
        let answer = self.client().once(endpoint, &url, &Scope::Pull, &request)?;
        let expected = format!("bytes {offset}-{last}/{}", blob.size);
        let wrong = |answer: &Answer, why: String| -> TransportError {
            RegistryError::Protocol { request: answer.request().to_string(), why }.into()
        };
        match answer.status {
            206 => {
                let found = answer.header(&header::CONTENT_RANGE).unwrap_or("none").to_string();
                if found != expected {
                    let found = super::text::shown(&found);
                    return Err(wrong(&answer, format!("asked for {expected}, the server sends {found}")));
                }
                // Another length is another content: nothing of it is used.
                if let Some(length) = answer.length().filter(|length| *length != buffer.len() as u64) {
                    let why = format!("asked for {} bytes, the server sends {length}", buffer.len());
                    return Err(wrong(&answer, why));
                }
            }
            // The whole blob, which begins with what was asked for.
            200 if offset == 0 => {
                if let Some(length) = answer.length().filter(|length| *length != blob.size) {
                    let object = format!("{} in {}", blob.digest, self.location());
                    return Err(TransportError::SizeMismatch { object, expected: blob.size, found: length });
                }
            }
            200 => {
                let location = format!("{} ({})", self.location(), endpoint.origin);
                return Err(TransportError::NoRanges { location, found: "200 and the whole blob".into() });
            }
            404 => return Err(self.blob_missing(blob, answer.unexpected().into())),
            416 => {
                let object = format!("{} in {}", blob.digest, self.location());
                return Err(TransportError::SizeMismatch { object, expected: blob.size, found: offset });
            }
            _ => return Err(answer.unexpected().into()),
        }
        let request = answer.request().to_string();
        let mut reader = answer.into_reader();
        let mut filled = 0;
        while filled < buffer.len() {
            if Instant::now() > ask.deadline {
                let why = format!("{filled} of {} bytes came in time", buffer.len());
                return Err(RegistryError::Stalled { request, why }.into());
            }
            match reader.read(buffer.get_mut(filled..).unwrap_or_default()).map_err(of_io)? {
                0 => {
                    let why = format!("the server ended the part after {filled} of {} bytes", buffer.len());
                    return Err(RegistryError::Network { request, why, unreachable: false }.into());
                }
                got => filled += got,
            }
        }
        // To its end, so that the connection can be used again.
        if last + 1 < blob.size || offset > 0 {
            let _ = reader.read(&mut [0; 1]);
        }
        Ok(())
    }

    /// An error that says that a blob is missing, if that is what is wrong.
    pub(super) fn blob_missing(&self, blob: &Descriptor, error: TransportError) -> TransportError {
        missing(&self.location(), blob, error)
    }
}

fn missing(location: &str, blob: &Descriptor, error: TransportError) -> TransportError {
    match error {
        TransportError::Registry(error) if matches!(*error, RegistryError::NotFound { .. }) => {
            TransportError::BlobMissing { location: location.into(), digest: blob.digest }
        }
        error => error,
    }
}

/// Says how much of a blob came before it was given up.
fn at_byte(error: TransportError, at: u64, size: u64) -> TransportError {
    let TransportError::Registry(mut error) = error else { return error };
    if let RegistryError::Network { why, .. } | RegistryError::Stalled { why, .. } = &mut *error {
        why.push_str(&format!(", after {at} of {size} bytes"));
    }
    TransportError::Registry(error)
}

/// The error of a [`BlobStream`].
pub(super) fn of_stream(error: io::Error) -> TransportError {
    match error.downcast::<TransportError>() {
        Ok(error) => error,
        Err(error) => of_io(error).into(),
    }
}

/// A blob that is being received. Its errors hold a [`TransportError`].
pub(super) struct BlobStream {
    shared: Arc<Shared>,
    location: String,
    endpoints: Vec<Endpoint>,
    /// Which of the servers is asked.
    server: usize,
    blob: Descriptor,
    /// The next byte.
    at: u64,
    reader: Option<Reader>,
    etag: Option<String>,
    cuts: u32,
    since_cut: u64,
}

impl BlobStream {
    /// Asks for the rest; goes on to the next server where one does not have it.
    fn connect(&mut self) -> Result<(), TransportError> {
        loop {
            let Some(endpoint) = self.endpoints.get(self.server).cloned() else {
                return Err(RegistryError::NotListed { location: self.location.clone() }.into());
            };
            match self.connect_to(&endpoint) {
                Ok(reader) => {
                    self.reader = Some(reader);
                    return Ok(());
                }
                Err(error) if self.server + 1 < self.endpoints.len() => {
                    log::info!("mirror {}: {error}; asking the next server", endpoint.origin);
                    self.next_server();
                }
                Err(error) => return Err(missing(&self.location, &self.blob, error)),
            }
        }
    }

    fn next_server(&mut self) {
        self.server += 1;
        (self.cuts, self.etag) = (0, None);
    }

    fn connect_to(&mut self, endpoint: &Endpoint) -> Result<Reader, TransportError> {
        let url = Registry::url(endpoint, &format!("blobs/{}", self.blob.digest));
        let mut ask = Ask::new(Method::GET);
        if self.at > 0 {
            ask.headers.push((header::RANGE, format!("bytes={}-", self.at)));
            if let Some(etag) = &self.etag {
                ask.headers.push((header::IF_RANGE, etag.clone()));
            }
        }
        let answer = self.shared.client.send(endpoint, &url, &Scope::Pull, &ask)?;
        let size = self.blob.size;
        let object = format!("{} in {}", self.blob.digest, self.location);
        let other_size = |found| TransportError::SizeMismatch { object, expected: size, found };
        let protocol = |why: String| RegistryError::Protocol { request: answer.request().to_string(), why };
        match answer.status {
            200 => {
                if let Some(length) = answer.length().filter(|length| *length != size) {
                    return Err(other_size(length));
                }
                let etag = answer.header(&header::ETAG).filter(|etag| etag.starts_with('"'));
                self.etag = etag.map(str::to_string);
                let mut reader = answer.into_reader();
                // The beginning is here already.
                let skipped = io::copy(&mut (&mut reader).take(self.at), &mut io::sink()).map_err(of_io)?;
                if skipped < self.at {
                    return Err(other_size(skipped));
                }
                Ok(reader)
            }
            206 if self.at > 0 => {
                let found = answer.header(&header::CONTENT_RANGE).unwrap_or("none").to_string();
                let expected = format!("bytes {}-{}/{size}", self.at, size.saturating_sub(1));
                if found != expected {
                    let found = super::text::shown(&found);
                    return Err(protocol(format!("asked for {expected}, the server sends {found}")).into());
                }
                Ok(answer.into_reader())
            }
            // Nothing lies there: the blob is shorter than its descriptor says.
            416 => Err(other_size(self.at)),
            _ => Err(answer.unexpected().into()),
        }
    }

    /// After a cut: waits, and asks for the rest.
    fn recover(&mut self, error: TransportError) -> Result<(), TransportError> {
        let temporary = matches!(&error, TransportError::Registry(error) if error.is_temporary());
        if !temporary {
            return Err(error);
        }
        self.reader = None;
        self.cuts = if self.since_cut >= PROGRESS { 1 } else { self.cuts + 1 };
        self.since_cut = 0;
        if self.cuts >= TRIES {
            if self.server + 1 >= self.endpoints.len() {
                return Err(at_byte(error, self.at, self.blob.size));
            }
            self.next_server();
        }
        log::info!("{error}; going on at byte {} of {}", self.at, self.blob.size);
        thread::sleep(self.shared.client.pause(self.cuts.max(1), None));
        self.connect()
    }

    fn step(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, TransportError> {
        let left = self.blob.size.saturating_add(1).saturating_sub(self.at);
        let most = left.min(buffer.len() as u64) as usize;
        let Some(reader) = &mut self.reader else { return Ok(Some(0)) };
        let error = match reader.read(buffer.get_mut(..most).unwrap_or_default()) {
            Ok(0) if self.at >= self.blob.size => return Ok(Some(0)),
            Ok(0) => RegistryError::Network {
                request: format!("GET {}@{}", self.location, self.blob.digest),
                why: "the server ended the blob too early".into(),
                unreachable: false,
            },
            Ok(got) => {
                self.at += got as u64;
                self.since_cut = self.since_cut.saturating_add(got as u64);
                return Ok(Some(got));
            }
            // All is here: what breaks after the last byte does not matter.
            Err(_) if self.at == self.blob.size => return Ok(Some(0)),
            Err(error) => of_io(error),
        };
        self.recover(error.into())?;
        Ok(None)
    }
}

impl Read for BlobStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(got) = self.step(buffer).map_err(io::Error::other)? {
                return Ok(got);
            }
        }
    }
}
