//! One HTTP request and its answer, with every size and time bounded.
//!
//! Bounds: 64 KiB of headers; a connection in 10 s or less; no silence longer than [`Access::patience`], no
//! answer's head later than that, and no body slower than 1 KiB/s over that time ([`Rate`]), which
//! a limit for each read alone would let pass. Redirects are not followed here, statuses are not
//! errors, and nothing is decompressed: `identity` is asked for, and all else is refused.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectProxyConnector, Connector, TcpConnector};
use ureq::{Agent, Body, SendBody};

use super::certificates;
use super::error::RegistryError;
use super::proxy::{self, Route};
use super::secret::Secret;
use super::text;
use super::tls::{TlsConnector, TlsFailure};
use super::url::{Origin, Url};
use crate::progress::Task;
use crate::sys::locks;
use crate::transport::access::Access;

/// The most bytes of headers that are read.
const MAX_HEADERS: usize = 64 << 10;
/// The most bytes of an error's body that are read.
const MAX_ERROR: u64 = 16 << 10;
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How much longer than for others is waited for the answer to an upload: the registry may copy the
/// whole blob before it answers.
const AFTER_UPLOAD: u32 = 10;
/// The least bytes a second of a transfer that is not broken.
const LEAST_RATE: u64 = 1 << 10;
/// Connections to one server that are kept open.
const IDLE: usize = 8;
/// The most warnings of servers that a command reports.
const MAX_WARNINGS: usize = 8;

/// What is sent with a request. It can be sent again.
#[derive(Clone, Copy)]
pub(super) enum Payload<'a> {
    /// Nothing.
    None,
    /// Bytes in memory.
    Bytes(&'a [u8]),
    /// The first bytes of a file.
    File {
        /// The file.
        file: &'a File,
        /// How many bytes.
        size: u64,
        /// Receives the number of bytes sent.
        task: &'a Task,
    },
}

/// A request, less where it goes and who asks.
pub(super) struct Ask<'a> {
    /// The method.
    pub method: Method,
    /// Headers, less `Authorization`.
    pub headers: Vec<(HeaderName, String)>,
    /// What is sent.
    pub payload: Payload<'a>,
}

impl Ask<'_> {
    /// A request without headers or payload.
    pub(super) fn new(method: Method) -> Self {
        Self { method, headers: Vec::new(), payload: Payload::None }
    }
}

/// Sends requests; keeps connections open. One for a command.
pub(super) struct Http {
    access: Access,
    agents: Mutex<HashMap<Origin, Agent>>,
    /// The warnings that were reported.
    warnings: Mutex<HashSet<(Origin, String)>>,
}

impl Http {
    /// A client that has not connected to anything.
    pub(super) fn new(access: Access) -> Self {
        Self { access, agents: Mutex::default(), warnings: Mutex::default() }
    }

    /// How the user reaches registries.
    pub(super) fn access(&self) -> &Access {
        &self.access
    }

    /// Sends a request once. Any status is an answer.
    ///
    /// # Errors
    /// [`RegistryError::Network`], [`RegistryError::Tls`], [`RegistryError::Stalled`],
    /// [`RegistryError::TooLong`], [`RegistryError::Protocol`], [`RegistryError::Config`].
    pub(super) fn send(
        &self,
        url: &Url,
        ask: &Ask<'_>,
        who: Option<&Secret>,
    ) -> Result<Answer, RegistryError> {
        let request = format!("{} {url}", ask.method);
        let agent = self.agent(&url.origin)?;
        let protocol = |why: String| RegistryError::Protocol { request: request.clone(), why };
        let mut builder = Request::builder().method(ask.method.clone()).uri(url.full());
        for (name, value) in &ask.headers {
            builder = builder.header(name, value);
        }
        builder = builder.header(header::ACCEPT_ENCODING, "identity");
        if let Some(who) = who {
            let mut value = HeaderValue::from_str(who.expose())
                .map_err(|_| protocol("the token holds characters that no header has".into()))?;
            value.set_sensitive(true);
            builder = builder.header(header::AUTHORIZATION, value);
        }
        let silence = self.access.patience;
        let head = if matches!(ask.payload, Payload::None) { silence } else { silence * AFTER_UPLOAD };
        let fail = |error| through_proxy(&url.origin, failed(&request, silence, error));
        let sent = match ask.payload {
            Payload::None => self.run(&agent, builder.body(()), head),
            Payload::Bytes(bytes) => {
                builder = builder.header(header::CONTENT_LENGTH, bytes.len());
                self.run(&agent, builder.body(bytes), head)
            }
            Payload::File { file, size, task } => {
                builder = builder.header(header::CONTENT_LENGTH, size);
                let mut reader = FilePart { file, at: 0, size, task };
                self.run(&agent, builder.body(SendBody::from_reader(&mut reader)), head)
            }
        };
        let (parts, body) = sent.map_err(fail)?.into_parts();
        let encoding = parts.headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
        if encoding.is_some_and(|encoding| !encoding.is_empty() && encoding != b"identity") {
            return Err(protocol("the answer is compressed, though it was asked for as it is".into()));
        }
        self.report_warnings(&url.origin, &parts.headers);
        let rate = Rate::new(silence);
        let body = Reader { body: body.into_reader(), rate, request, silence };
        Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, url: url.clone(), body })
    }

    /// Reports what a server warns of, each warning once. Rule: nothing else follows from one.
    fn report_warnings(&self, origin: &Origin, headers: &HeaderMap) {
        for value in headers.get_all(header::WARNING) {
            let Some(text) = value.to_str().ok().and_then(text::of_warning) else { continue };
            let mut reported = locks::lock(&self.warnings);
            if reported.len() < MAX_WARNINGS && reported.insert((origin.clone(), text.clone())) {
                log::warn!("{origin} warns: {text}");
            }
        }
    }

    fn run(
        &self,
        agent: &Agent,
        request: ureq::http::Result<Request<impl ureq::AsSendBody>>,
        head: Duration,
    ) -> Result<ureq::http::Response<Body>, ureq::Error> {
        agent.run(agent.configure_request(request?).timeout_recv_response(Some(head)).build())
    }

    /// The agent of a server. Certificates and proxy differ from one to the next.
    fn agent(&self, origin: &Origin) -> Result<Agent, RegistryError> {
        let mut agents = locks::lock(&self.agents);
        if let Some(agent) = agents.get(origin) {
            return Ok(agent.clone());
        }
        let proxy = match route(origin)? {
            Route::Direct => None,
            Route::Proxy { variable, url, .. } => {
                let why = "expected the URL of an http or https proxy";
                Some(ureq::Proxy::new(url.expose()).map_err(|_| RegistryError::Proxy { variable, why })?)
            }
        };
        let silence = self.access.patience;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(proxy)
            .user_agent(concat!("mosfs/", env!("CARGO_PKG_VERSION")))
            .accept("")
            .accept_encoding("")
            .max_response_header_size(MAX_HEADERS)
            .input_buffer_size(128 << 10)
            .output_buffer_size(128 << 10)
            .max_idle_connections(IDLE * 2)
            .max_idle_connections_per_host(IDLE)
            .timeout_resolve(Some(CONNECT.min(silence)))
            .timeout_connect(Some(CONNECT.min(silence)))
            .timeout_per_read(Some(silence))
            .timeout_per_write(Some(silence))
            .build();
        let tls =
            TlsConnector::new(&certificates::find(&origin.host(), self.access.certificates.as_deref())?)?;
        let chain = ().chain(ConnectProxyConnector::default()).chain(TcpConnector::default()).chain(tls);
        let agent = Agent::with_parts(config, chain, DefaultResolver::default());
        agents.insert(origin.clone(), agent.clone());
        Ok(agent)
    }
}

/// The route to a server, by the variables of the environment.
fn route(origin: &Origin) -> Result<Route, RegistryError> {
    proxy::route(origin.https, &origin.host(), &|name| std::env::var(name).ok())
}

/// Names the proxy where the network has failed on the way through one: it is not the server that was asked for.
fn through_proxy(origin: &Origin, error: RegistryError) -> RegistryError {
    match (error, route(origin)) {
        (RegistryError::Network { request, why, unreachable }, Ok(Route::Proxy { variable, shown, .. })) => {
            let why = format!("{why} (through the proxy {shown} of {variable})");
            RegistryError::Network { request, why, unreachable }
        }
        (error, _) => error,
    }
}

/// Names what went wrong, without anything that a server could have put into it unescaped.
fn failed(request: &str, silence: Duration, error: ureq::Error) -> RegistryError {
    let request = request.to_string();
    let network =
        |why: String, unreachable| RegistryError::Network { request: request.clone(), why, unreachable };
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            network("no connection in time".into(), true)
        }
        ureq::Error::Timeout(_) => RegistryError::Stalled {
            request,
            why: format!("the server was silent for {} s", silence.as_secs()),
        },
        ureq::Error::HostNotFound => network("the host is not known".into(), true),
        ureq::Error::Io(error) => {
            let why = error.to_string();
            let unreachable = matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
            );
            // What the standard library says of getaddrinfo(3), without a kind of its own.
            let unknown = why.starts_with("failed to lookup address information");
            network(text::shown(&why), unreachable || unknown)
        }
        ureq::Error::Other(error) => match error.downcast::<TlsFailure>() {
            Ok(failure) => RegistryError::Tls { request, why: text::shown(&failure.to_string()) },
            Err(error) => network(text::shown(&error.to_string()), false),
        },
        ureq::Error::LargeResponseHeader(..) => {
            RegistryError::TooLong { request, what: "headers", max: MAX_HEADERS as u64 }
        }
        ureq::Error::ConnectionFailed => network("the connection failed".into(), true),
        ureq::Error::ConnectProxyFailed(why) => network(format!("proxy: {}", text::shown(&why)), true),
        ureq::Error::BodyStalled => network("the transfer stopped".into(), false),
        error => RegistryError::Protocol { request, why: text::shown(&error.to_string()) },
    }
}

/// An answer: status and headers are here, the body is still to be read.
pub(super) struct Answer {
    /// The status.
    pub status: u16,
    headers: HeaderMap,
    /// What was asked.
    pub url: Url,
    body: Reader,
}

impl Answer {
    /// A header, if it is there and is text.
    pub(super) fn header(&self, name: &HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// All values of a header.
    pub(super) fn headers(&self, name: &HeaderName) -> impl Iterator<Item = &str> {
        self.headers.get_all(name).iter().filter_map(|value| value.to_str().ok())
    }

    /// `Content-Length`, in bytes.
    pub(super) fn length(&self) -> Option<u64> {
        self.header(&header::CONTENT_LENGTH)?.parse().ok()
    }

    /// Method and URL, for messages.
    pub(super) fn request(&self) -> &str {
        &self.body.request
    }

    /// The body, whole.
    ///
    /// # Errors
    /// [`RegistryError::TooLong`] as soon as it is longer than `max`, whatever its length was said to be.
    pub(super) fn bytes(mut self, what: &'static str, max: u64) -> Result<Vec<u8>, RegistryError> {
        let request = self.body.request.clone();
        let too_long = || RegistryError::TooLong { request: request.clone(), what, max };
        if self.length().is_some_and(|length| length > max) {
            return Err(too_long());
        }
        let mut bytes = Vec::new();
        let mut buffer = [0; 16 << 10];
        loop {
            match self.body.read(&mut buffer).map_err(of_io)? {
                0 => return Ok(bytes),
                got if (bytes.len() + got) as u64 > max => return Err(too_long()),
                got => bytes.extend_from_slice(buffer.get(..got).unwrap_or_default()),
            }
        }
    }

    /// What an error says, shortened and without control characters. Errors while reading it do not matter.
    pub(super) fn said(mut self) -> String {
        let mut bytes = Vec::new();
        let _ = (&mut self.body).take(MAX_ERROR).read_to_end(&mut bytes);
        text::of_error(&bytes)
    }

    /// The error that this status is, for a caller that did not expect it.
    pub(super) fn unexpected(self) -> RegistryError {
        let (status, request) = (self.status, self.request().to_string());
        let said = self.said();
        match status {
            404 => RegistryError::NotFound { request, said },
            _ => RegistryError::Status { request, status, said },
        }
    }

    /// The body, to be read piece by piece. Its errors hold a [`RegistryError`] ([`of_io`]).
    pub(super) fn into_reader(self) -> Reader {
        self.body
    }
}

/// The body of an answer.
pub(super) struct Reader {
    body: ureq::BodyReader<'static>,
    rate: Rate,
    request: String,
    silence: Duration,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let begun = Instant::now();
        let got = self.body.read(buffer).map_err(|error| {
            io::Error::other(failed(&self.request, self.silence, ureq::Error::from(error)))
        })?;
        if got > 0 && !self.rate.keeps(got as u64, begun.elapsed()) {
            let why = format!("less than {LEAST_RATE} bytes a second came for {} s", self.silence.as_secs());
            let request = self.request.clone();
            return Err(io::Error::other(RegistryError::Stalled { request, why }));
        }
        Ok(got)
    }
}

/// The error of a [`Reader`].
pub(super) fn of_io(error: io::Error) -> RegistryError {
    let why = error.to_string();
    match error.into_inner().map(|inner| inner.downcast::<RegistryError>()) {
        Some(Ok(error)) => *error,
        _ => RegistryError::Network { request: "read".into(), why: text::shown(&why), unreachable: false },
    }
}

/// Finds transfers that are too slow to be alive. Only the time spent waiting for the server counts.
struct Rate {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl Rate {
    fn new(window: Duration) -> Self {
        Self { window, waited: Duration::ZERO, bytes: 0 }
    }

    /// Notes what came; whether the transfer is still fast enough.
    fn keeps(&mut self, bytes: u64, waited: Duration) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        self.waited += waited;
        if self.waited < self.window {
            return true;
        }
        let least = LEAST_RATE.saturating_mul(self.waited.as_millis() as u64) / 1000;
        let keeps = self.bytes >= least;
        (self.bytes, self.waited) = (0, Duration::ZERO);
        keeps
    }
}

/// Reads the beginning of a file, wherever others have moved its cursor.
struct FilePart<'a> {
    file: &'a File,
    at: u64,
    size: u64,
    task: &'a Task,
}

impl Read for FilePart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = (self.size - self.at).min(buffer.len() as u64) as usize;
        let got = self.file.read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at += got as u64;
        self.task.advance(got as u64);
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dripping_transfer_is_broken_and_a_slow_one_is_not() {
        let window = Duration::from_secs(30);
        let mut drip = Rate::new(window);
        // One byte in four seconds: each read is in time.
        let broken = (0..8).position(|_| !drip.keeps(1, Duration::from_secs(4)));
        assert_eq!(broken, Some(7));
        let mut slow = Rate::new(window);
        assert!((0..100).all(|_| slow.keeps(2048, Duration::from_secs(2))));
        // Nothing is held against the server while nobody reads.
        let mut idle = Rate::new(window);
        assert!((0..100).all(|_| idle.keeps(1, Duration::ZERO)));
    }
}
