//! A registry on a thread, whose answers a test can spoil.
//!
//! It speaks the distribution-spec from memory: manifests, blobs with ranges, tags, uploads, mounts and
//! referrers. Each request is noted ([`Seen`]), and the bytes of each blob that were sent are counted
//! ([`Server::sent`]). A test's [`Script`] looks at a request before it is answered and says what is to go
//! wrong ([`Fault`]). After a client was killed, [`Server::settle`] waits until nothing of its requests is
//! still being answered.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use mosfs::internals::digest::Digest;
use openssl::ssl::{SslAcceptor, SslStream};
use serde_json::{Value, json};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The status of the answer, and how many bytes of a body were sent; 0 until the answer has ended.
    pub status: u16,
    pub sent: u64,
    /// How many requests came before it.
    number: usize,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Whether it asks for the content of this blob.
    pub fn gets(&self, digest: &Digest) -> bool {
        self.method == "GET" && self.path.ends_with(&format!("/blobs/{digest}"))
    }
}

/// What goes wrong with an answer.
#[derive(Clone)]
pub enum Fault {
    /// Another answer: status, headers, body.
    Answer(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// The connection ends after so many bytes of the body.
    Cut(u64),
    /// So many bytes of the body, and then silence until the client goes away.
    Stall(u64),
    /// So many bytes of the body, and then one byte at a time, each after this time.
    Drip(u64, Duration),
    /// The whole body, at so many bytes a second.
    Slow(u64),
    /// Another header, in place of one of that name, or beside the others.
    Header(&'static str, String),
    /// The whole body with status 200, whatever range was asked for.
    NoRange,
    /// The body with so many more bytes, in chunks, so that no length is said; `u64::MAX` never ends.
    Longer(u64),
    /// The body less its last bytes, in chunks.
    Shorter(u64),
    /// The byte at this place is another one.
    Flip(u64),
    /// These bytes, and the connection ends.
    Raw(Vec<u8>),
    /// These bytes again and again, until the client goes away.
    RawForever(Vec<u8>),
    /// Headers one byte at a time, each after this time, until the client goes away.
    DripHead(Duration),
    /// The connection ends after this many bytes of the request's body were read.
    CutRequest(u64),
}

/// Looks at a request, with how many were seen before it, and says what is to go wrong.
pub type Script = Arc<dyn Fn(&Seen, usize) -> Option<Fault> + Send + Sync>;

/// What the registry is made to be.
#[derive(Clone, Default)]
pub struct Options {
    /// Whether it knows about referrers.
    pub referrers: bool,
    /// `user:password` that it requires, with Basic.
    pub basic: Option<String>,
    /// `user:password` for tokens; empty lets everyone have one. The realm, if it is not the server's own.
    pub tokens: Option<(String, Option<String>)>,
    /// What a token's answer says of its life, in seconds.
    pub token_life: Option<u64>,
    /// Where clients come in through TLS.
    pub tls: Option<Arc<SslAcceptor>>,
    /// Whether a POST with `mount` always starts an upload.
    pub no_mount: bool,
}

struct State {
    options: Options,
    address: String,
    blobs: Mutex<HashMap<(String, String), Arc<Vec<u8>>>>,
    manifests: Mutex<BTreeMap<(String, String), (String, Vec<u8>)>>,
    uploads: Mutex<HashMap<String, Vec<u8>>>,
    log: Mutex<Vec<Seen>>,
    script: Mutex<Option<Script>>,
    count: AtomicU64,
    /// The bytes of each blob's content that were sent, by digest, since the start.
    sent: Mutex<HashMap<String, u64>>,
    /// Connections that were accepted and have not ended.
    open: AtomicU64,
    tokens: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// A registry that runs until it is dropped.
pub struct Server {
    state: Arc<State>,
    port: u16,
}

struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

trait Stream: Read + Write + Send {
    fn close(&self);
}

impl Stream for TcpStream {
    fn close(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Stream for SslStream<TcpStream> {
    fn close(&self) {
        let _ = self.get_ref().shutdown(Shutdown::Both);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Server {
    pub fn start(options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        let state = Arc::new(State {
            options,
            address: format!("{scheme}://127.0.0.1:{port}"),
            blobs: Mutex::default(),
            manifests: Mutex::default(),
            uploads: Mutex::default(),
            log: Mutex::default(),
            script: Mutex::default(),
            count: AtomicU64::new(0),
            sent: Mutex::default(),
            open: AtomicU64::new(0),
            tokens: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), shared) = (stream, shared.clone()) else { continue };
                shared.open.fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || {
                    serve(&shared, stream);
                    shared.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { state, port }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        self.state.address.clone()
    }

    /// `docker://127.0.0.1:PORT/` and what follows.
    pub fn source(&self, rest: &str) -> String {
        format!("docker://{}/{rest}", self.host())
    }

    /// Says what is to go wrong from now on.
    pub fn script(&self, script: impl Fn(&Seen, usize) -> Option<Fault> + Send + Sync + 'static) {
        *lock(&self.state.script) = Some(Arc::new(script));
    }

    /// Nothing goes wrong from now on.
    pub fn heal(&self) {
        *lock(&self.state.script) = None;
    }

    /// The requests so far, and forgets them.
    pub fn take_log(&self) -> Vec<Seen> {
        std::mem::take(&mut *lock(&self.state.log))
    }

    /// The bytes of a blob's content that were sent since the start, whatever was taken from the log. What a
    /// client that was killed did not read is counted too. It grows while an answer is sent.
    pub fn sent(&self, digest: &Digest) -> u64 {
        lock(&self.state.sent).get(&digest.to_string()).copied().unwrap_or(0)
    }

    /// Waits until every client's connection has ended, as those of a process end that has exited or was killed.
    /// From then on nothing is added to the log or to the counters.
    pub fn settle(&self) {
        // Connections are accepted in order: once this one has, all before it have been.
        let mut last = TcpStream::connect(("127.0.0.1", self.port)).expect("a connection");
        last.shutdown(Shutdown::Write).expect("an end");
        let _ = last.read_to_end(&mut Vec::new());
        while self.state.open.load(Ordering::SeqCst) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// How many uploads have begun and have neither ended nor been cancelled.
    pub fn open_uploads(&self) -> usize {
        lock(&self.state.uploads).len()
    }

    pub fn put_blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let key = (repository.to_string(), digest.to_string());
        lock(&self.state.blobs).insert(key, Arc::new(bytes.to_vec()));
        digest
    }

    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let mut manifests = lock(&self.state.manifests);
        for name in [digest.to_string(), tag.to_string()] {
            manifests.insert((repository.into(), name), (media_type.into(), bytes.to_vec()));
        }
        digest
    }

    /// The names under which a repository has manifests: digests and tags.
    pub fn names(&self, repository: &str) -> Vec<String> {
        let manifests = lock(&self.state.manifests);
        manifests.keys().filter(|(one, _)| one == repository).map(|(_, name)| name.clone()).collect()
    }

    pub fn manifest(&self, repository: &str, name: &str) -> Option<Vec<u8>> {
        let key = (repository.to_string(), name.to_string());
        lock(&self.state.manifests).get(&key).map(|(_, bytes)| bytes.clone())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(state: &State, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = match &state.options.tls {
        None => talk(state, stream),
        Some(acceptor) => match acceptor.accept(stream) {
            Ok(stream) => talk(state, stream),
            Err(_) => Ok(()),
        },
    };
}

fn talk(state: &State, stream: impl Stream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_ascii_whitespace();
        let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
        let number = state.count.fetch_add(1, Ordering::SeqCst) as usize;
        let mut seen = Seen {
            method: method.into(),
            path: path.into(),
            headers: BTreeMap::new(),
            status: 0,
            sent: 0,
            number,
        };
        loop {
            let mut line = String::new();
            stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            seen.headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
        }
        // It may wait for other requests.
        let script = lock(&state.script).clone();
        let fault = script.and_then(|script| script(&seen, number));
        let length = seen.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        lock(&state.log).push(seen.clone());
        let most = if let Some(Fault::CutRequest(most)) = fault { most } else { length };
        let mut body = Vec::new();
        (&mut stream).take(most.min(length)).read_to_end(&mut body)?;
        if most < length {
            stream.get_ref().close();
            return Ok(());
        }
        let reply = match &fault {
            Some(Fault::Answer(status, headers, body)) => {
                Reply { status: *status, headers: headers.clone(), body: body.clone() }
            }
            other => answer(state, &seen, &body, matches!(other, Some(Fault::NoRange))),
        };
        let status = reply.status;
        let head_only = seen.method == "HEAD";
        let of_blob = seen.path.rsplit_once("/blobs/").map(|(_, digest)| digest).filter(|_| status < 300);
        let count = |bytes: u64| {
            if let Some(digest) = of_blob {
                *lock(&state.sent).entry(digest.to_string()).or_default() += bytes;
            }
        };
        let (sent, open) = send(stream.get_mut(), reply, fault, head_only, &count);
        // Unless it was taken meanwhile.
        if let Some(entry) = lock(&state.log).iter_mut().find(|entry| entry.number == number) {
            (entry.status, entry.sent) = (status, sent);
        }
        if !open {
            stream.get_ref().close();
            return Ok(());
        }
    }
}

/// The body of an answer on its way; what was handed to the connection is counted as it goes.
struct Body<'a, S> {
    stream: &'a mut S,
    sent: u64,
    count: &'a dyn Fn(u64),
}

impl<S: Stream> Body<'_, S> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(16 << 10) {
            self.stream.write_all(piece)?;
            self.sent += piece.len() as u64;
            (self.count)(piece.len() as u64);
        }
        self.stream.flush()
    }

    fn put_chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        write!(self.stream, "{:x}\r\n", bytes.len())?;
        self.put(bytes)?;
        self.stream.write_all(b"\r\n")
    }
}

/// Sends an answer; how many bytes of the body, and whether the connection is still good.
fn send(
    stream: &mut impl Stream,
    mut reply: Reply,
    fault: Option<Fault>,
    head_only: bool,
    count: &dyn Fn(u64),
) -> (u64, bool) {
    let mut chunked = false;
    match &fault {
        Some(Fault::Header(name, value)) => {
            reply.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
            reply.headers.push((name, value.clone()));
        }
        Some(Fault::Flip(at)) => {
            if let Some(byte) = reply.body.get_mut(*at as usize) {
                *byte ^= 1;
            }
        }
        Some(Fault::Longer(more)) => {
            chunked = true;
            if *more < u64::MAX {
                reply.body.extend(std::iter::repeat_n(b'x', *more as usize));
            }
        }
        Some(Fault::Shorter(less)) => {
            chunked = true;
            reply.body.truncate(reply.body.len().saturating_sub(*less as usize));
        }
        Some(Fault::Raw(bytes)) => {
            let _ = stream.write_all(bytes);
            return (0, false);
        }
        Some(Fault::RawForever(bytes)) => {
            while stream.write_all(bytes).is_ok() {}
            return (0, false);
        }
        Some(Fault::DripHead(pause)) => {
            let endless = b"HTTP/1.1 200 OK\r\nX: ".iter().chain(std::iter::repeat(&b'y'));
            for byte in endless {
                if stream.write_all(&[*byte]).and_then(|()| stream.flush()).is_err() {
                    break;
                }
                thread::sleep(*pause);
            }
            return (0, false);
        }
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} x\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let has_length = reply.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    if chunked {
        head += "Transfer-Encoding: chunked\r\n";
    } else if !has_length {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    head += "\r\n";
    if stream.write_all(head.as_bytes()).is_err() {
        return (0, false);
    }
    if head_only {
        return (0, stream.flush().is_ok());
    }
    let body = reply.body;
    let first = |most: u64| &body[..(most as usize).min(body.len())];
    let mut out = Body { stream, sent: 0, count };
    let open = match fault {
        Some(Fault::Cut(most)) => {
            let _ = out.put(first(most));
            false
        }
        Some(Fault::Stall(most)) => {
            let _ = out.put(first(most));
            // Until the client has had enough.
            let _ = out.stream.read(&mut [0; 1]);
            false
        }
        Some(Fault::Drip(most, pause)) => {
            let head = first(most);
            out.put(head).is_ok()
                && body[head.len()..].chunks(1).all(|byte| {
                    let sent = out.put(byte).is_ok();
                    thread::sleep(pause);
                    sent
                })
        }
        Some(Fault::Slow(rate)) => body.chunks(16 << 10).all(|bytes| {
            let sent = out.put(bytes).is_ok();
            thread::sleep(Duration::from_secs_f64(bytes.len() as f64 / rate as f64));
            sent
        }),
        _ if chunked => {
            let endless = matches!(fault, Some(Fault::Longer(u64::MAX)));
            let mut outcome = out.put_chunk(&body);
            while endless && outcome.is_ok() {
                outcome = out.put_chunk(&[b'x'; 65536]);
            }
            outcome.and_then(|()| out.stream.write_all(b"0\r\n\r\n")).is_ok()
        }
        _ => out.put(&body).is_ok(),
    };
    (out.sent, open)
}

fn error(status: u16, code: &str) -> Reply {
    let body = json!({ "errors": [{ "code": code, "message": "as the test wants it" }] });
    Reply {
        status,
        headers: vec![("Content-Type", "application/json".into())],
        body: body.to_string().into_bytes(),
    }
}

/// What a registry without faults answers.
fn answer(state: &State, seen: &Seen, body: &[u8], no_range: bool) -> Reply {
    let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
    let parameters: HashMap<String, String> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_string(), unescape(value)))
        .collect();
    if path == "/token" {
        return token(state, seen, &parameters, body);
    }
    if let Some(refused) = authorize(state, seen) {
        return refused;
    }
    let Some(rest) = path.strip_prefix("/v2/") else { return error(404, "NOT_FOUND") };
    let split = |word: &str| rest.rsplit_once(&format!("/{word}/"));
    if let Some((repository, place)) = split("blobs/uploads") {
        return upload(state, seen, repository, place, &parameters, body);
    }
    if let Some((repository, digest)) = split("blobs") {
        return blob(state, seen, repository, digest, no_range);
    }
    if let Some((repository, name)) = split("manifests") {
        return manifest(state, seen, repository, name, body);
    }
    if let Some((repository, subject)) = split("referrers").filter(|_| state.options.referrers) {
        return referrers(state, repository, subject, parameters.get("artifactType"));
    }
    if let Some(repository) = rest.strip_suffix("/tags/list") {
        let manifests = lock(&state.manifests);
        let tags: Vec<_> = manifests
            .keys()
            .filter(|(one, name)| one == repository && !name.contains(':'))
            .map(|(_, name)| name.clone())
            .collect();
        if tags.is_empty() {
            return error(404, "NAME_UNKNOWN");
        }
        let body = json!({ "name": repository, "tags": tags }).to_string().into_bytes();
        return Reply { status: 200, headers: Vec::new(), body };
    }
    error(404, "NOT_FOUND")
}

fn token(state: &State, seen: &Seen, parameters: &HashMap<String, String>, body: &[u8]) -> Reply {
    let Some((required, _)) = &state.options.tokens else { return error(404, "NOT_FOUND") };
    let basic = format!("Basic {}", openssl::base64::encode_block(required.as_bytes()));
    let refresh = format!("refresh_token={}", required.replace(':', "%3A"));
    let by_refresh =
        seen.method == "POST" && String::from_utf8_lossy(body).contains(&refresh.replace("%3A", ":"));
    if !required.is_empty() && seen.header("authorization") != Some(&basic) && !by_refresh {
        return error(401, "UNAUTHORIZED");
    }
    let mut tokens = lock(&state.tokens);
    let scope = parameters.get("scope").cloned().unwrap_or_default();
    let token = format!("sesame-{}-{}", tokens.len(), Digest::of(scope.as_bytes()).hex());
    tokens.push(token.clone());
    let mut answer = json!({ "token": token });
    if let Some(life) = state.options.token_life {
        answer["expires_in"] = life.into();
    }
    Reply { status: 200, headers: Vec::new(), body: answer.to_string().into_bytes() }
}

/// The answer to a request that is not let in.
fn authorize(state: &State, seen: &Seen) -> Option<Reply> {
    let shown = seen.header("authorization");
    let refused = |challenge: String| {
        let mut reply = error(401, "UNAUTHORIZED");
        reply.headers.push(("WWW-Authenticate", challenge));
        Some(reply)
    };
    if let Some(basic) = &state.options.basic {
        let expected = format!("Basic {}", openssl::base64::encode_block(basic.as_bytes()));
        return if shown == Some(&expected) { None } else { refused("Basic realm=\"r\"".into()) };
    }
    let (_, realm) = state.options.tokens.as_ref()?;
    let good = lock(&state.tokens).iter().any(|token| shown == Some(&format!("Bearer {token}")));
    if good {
        return None;
    }
    let realm = realm.clone().unwrap_or_else(|| format!("{}/token", state.address));
    refused(format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"repository:x:pull\""))
}

impl Server {
    /// Every token so far is worth nothing from now on.
    pub fn expire_tokens(&self) {
        for token in lock(&self.state.tokens).iter_mut() {
            token.push_str("-expired");
        }
    }
}

fn blob(state: &State, seen: &Seen, repository: &str, digest: &str, no_range: bool) -> Reply {
    let key = (repository.to_string(), digest.to_string());
    let Some(bytes) = lock(&state.blobs).get(&key).cloned() else { return error(404, "BLOB_UNKNOWN") };
    let mut headers = vec![("Docker-Content-Digest", digest.to_string()), ("ETag", format!("\"{digest}\""))];
    let range = seen.header("range").and_then(|range| range.strip_prefix("bytes="));
    let Some((first, last)) = range.and_then(|range| range.split_once('-')).filter(|_| !no_range) else {
        if seen.method == "HEAD" {
            headers.push(("Content-Length", bytes.len().to_string()));
        }
        return Reply { status: 200, headers, body: bytes.to_vec() };
    };
    let first: usize = first.parse().expect("a single range");
    let last = last.parse().unwrap_or(usize::MAX).min(bytes.len().saturating_sub(1));
    if first >= bytes.len() {
        return error(416, "RANGE_INVALID");
    }
    headers.push(("Content-Range", format!("bytes {first}-{last}/{}", bytes.len())));
    Reply { status: 206, headers, body: bytes[first..=last].to_vec() }
}

fn manifest(state: &State, seen: &Seen, repository: &str, name: &str, body: &[u8]) -> Reply {
    let key = (repository.to_string(), name.to_string());
    let mut manifests = lock(&state.manifests);
    if seen.method == "PUT" {
        let kind = seen.header("content-type").unwrap_or_default().to_string();
        let digest = Digest::of(body);
        if let Some(missing) = missing(state, repository, &manifests, body) {
            return error(400, if missing { "MANIFEST_BLOB_UNKNOWN" } else { "MANIFEST_INVALID" });
        }
        manifests.insert((repository.into(), digest.to_string()), (kind.clone(), body.to_vec()));
        manifests.insert(key, (kind, body.to_vec()));
        let mut headers = vec![("Docker-Content-Digest", digest.to_string())];
        let parsed: Value = serde_json::from_slice(body).expect("JSON");
        if let Some(subject) = parsed["subject"]["digest"].as_str().filter(|_| state.options.referrers) {
            headers.push(("OCI-Subject", subject.to_string()));
        }
        return Reply { status: 201, headers, body: Vec::new() };
    }
    let Some((kind, bytes)) = manifests.get(&key) else { return error(404, "MANIFEST_UNKNOWN") };
    // As distribution has it: what is not named in Accept is not there.
    if !seen.header("accept").unwrap_or_default().contains(kind.as_str()) {
        return error(404, "MANIFEST_UNKNOWN");
    }
    let digest = Digest::of(bytes).to_string();
    let mut headers = vec![("Content-Type", kind.clone()), ("Docker-Content-Digest", digest)];
    if seen.method == "HEAD" {
        headers.push(("Content-Length", bytes.len().to_string()));
    }
    Reply { status: 200, headers, body: bytes.clone() }
}

/// Whether a blob or child of a manifest is missing; `None` if it may be stored.
fn missing(
    state: &State,
    repository: &str,
    manifests: &BTreeMap<(String, String), (String, Vec<u8>)>,
    body: &[u8],
) -> Option<bool> {
    let Ok(parsed) = serde_json::from_slice::<Value>(body) else { return Some(false) };
    let blobs = lock(&state.blobs);
    let digests = |field: &str| {
        let list = parsed[field].as_array().cloned().unwrap_or_default();
        list.iter().filter_map(|one| one["digest"].as_str().map(str::to_string)).collect::<Vec<_>>()
    };
    let mut wanted = digests("layers");
    wanted.extend(parsed["config"]["digest"].as_str().map(str::to_string));
    let key = |digest: &String| (repository.to_string(), digest.clone());
    let absent = wanted.iter().any(|digest| !blobs.contains_key(&key(digest)))
        || digests("manifests").iter().any(|digest| !manifests.contains_key(&key(digest)));
    absent.then_some(true)
}

fn referrers(state: &State, repository: &str, subject: &str, kind: Option<&String>) -> Reply {
    let mut found = Vec::new();
    for ((one, name), (media_type, bytes)) in lock(&state.manifests).iter() {
        let parsed: Value = serde_json::from_slice(bytes).unwrap_or_default();
        if one != repository || !name.contains(':') || parsed["subject"]["digest"] != *subject {
            continue;
        }
        if kind.is_none_or(|kind| parsed["artifactType"] == **kind) {
            found.push(json!({
                "mediaType": media_type, "digest": name, "size": bytes.len(), "artifactType": parsed["artifactType"],
            }));
        }
    }
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": found,
    });
    let headers = vec![("Content-Type", "application/vnd.oci.image.index.v1+json".to_string())];
    Reply { status: 200, headers, body: index.to_string().into_bytes() }
}

fn upload(
    state: &State,
    seen: &Seen,
    repository: &str,
    place: &str,
    parameters: &HashMap<String, String>,
    body: &[u8],
) -> Reply {
    if seen.method == "POST" {
        let mounted = parameters.get("mount").zip(parameters.get("from")).filter(|_| !state.options.no_mount);
        if let Some((digest, from)) = mounted {
            let mut blobs = lock(&state.blobs);
            if let Some(bytes) = blobs.get(&(from.clone(), digest.clone())).cloned() {
                blobs.insert((repository.into(), digest.clone()), bytes);
                return Reply { status: 201, headers: Vec::new(), body: Vec::new() };
            }
        }
        let mut uploads = lock(&state.uploads);
        let place = format!("u{}", seen.number);
        uploads.insert(place.clone(), Vec::new());
        // Relative, and without a query: both are legal.
        let location = format!("/v2/{repository}/blobs/uploads/{place}");
        return Reply { status: 202, headers: vec![("Location", location)], body: Vec::new() };
    }
    if seen.method == "DELETE" {
        return match lock(&state.uploads).remove(place) {
            Some(_) => Reply { status: 204, headers: Vec::new(), body: Vec::new() },
            None => error(404, "BLOB_UPLOAD_UNKNOWN"),
        };
    }
    let Some(digest) = parameters.get("digest").filter(|_| seen.method == "PUT") else {
        return error(405, "UNSUPPORTED");
    };
    if lock(&state.uploads).remove(place).is_none() {
        return error(404, "BLOB_UPLOAD_UNKNOWN");
    }
    if *digest != Digest::of(body).to_string() {
        return error(400, "DIGEST_INVALID");
    }
    lock(&state.blobs).insert((repository.into(), digest.clone()), Arc::new(body.to_vec()));
    Reply { status: 201, headers: Vec::new(), body: Vec::new() }
}

fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let digits: String = bytes.by_ref().take(2).map(char::from).collect();
                out.push(u8::from_str_radix(&digits, 16).expect("two hex digits"));
            }
            b'+' => out.push(b' '),
            byte => out.push(byte),
        }
    }
    String::from_utf8(out).expect("UTF-8")
}
