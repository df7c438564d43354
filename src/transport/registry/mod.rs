//! A repository of a registry: a small client of the OCI distribution-spec.
//!
//! ```text
//! GET  /v2/R/manifests/TAG|DIGEST       a manifest or index: resolved once, then by digest alone
//! GET  /v2/R/blobs/DIGEST               a blob; Range after a cut                        blobs.rs
//! GET  /v2/R/referrers/DIGEST           signatures and such; else the tag sha256-HEX     referrers.rs
//! GET  /v2/R/tags/list                  versions
//! POST /v2/R/blobs/uploads/, PUT        a blob; PUT /v2/R/manifests/…                    push.rs
//! ```
//!
//! Names of a store stand so in a registry, below a prefix that the user chooses:
//!
//! ```text
//! mos/system/system:200              PREFIX/mos/system/system:200
//! mos/system/system:sha256/HEX       PREFIX/mos/system/system:HEX
//! mos/images/hostfs:sha256/HEX       PREFIX/mos/images/hostfs:HEX
//! ```
//!
//! Nothing that a registry sends is believed. What is asked for by digest is checked against it,
//! what is asked for by tag is named by the digest of the bytes that came, and every answer is
//! bounded while it is read. Who may see credentials is in `auth` and `client`.
//!
//! Why a client of our own: the section "Registries" of docs/design.md.

mod auth;
mod blobs;
mod certificates;
mod client;
mod credentials;
mod error;
mod home;
mod http;
mod proxy;
mod push;
mod referrers;
mod secret;
mod settings;
mod text;
mod tls;
mod uploads;
mod url;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::http::{HeaderName, Method, header};

pub use error::RegistryError;
pub use push::Uploaded;

use client::{Client, Scope};
use http::{Answer, Ask};
use settings::{Endpoint, Settings};
use uploads::Uploads;
use url::{Origin, Url};

use super::reference::{Host, Malformed, Reference, TagOrDigest, is_repository, is_tag};
use super::{Access, Blob, RangeAsk, Transport, TransportError};
use crate::digest::Digest;
use crate::image::oci::{DOCKER_INDEX, DOCKER_MANIFEST, Descriptor, INDEX, MANIFEST, MAX_MANIFEST_BYTES};
use crate::sorting;
use crate::sys::locks;

/// The most bytes of a page of tags or referrers.
const MAX_PAGE: u64 = 4 << 20;
/// The most pages of a list.
const MAX_PAGES: usize = 100;
/// The most tags of a list.
const MAX_TAGS: usize = 100_000;
/// How long a mirror that did not answer is not asked.
const DEAD_FOR: Duration = Duration::from_secs(300);
/// How many documents are remembered, so that what was found by name is not sent twice.
const REMEMBERED: usize = 16;
/// The media types that are asked for. Registries answer 404 for one that is not named.
const ACCEPT: [&str; 4] = [MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_INDEX];
/// The digest that a registry says a document has.
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A repository of a registry, or a prefix that repositories stand below.
pub struct Registry {
    shared: Arc<Shared>,
    host: Host,
    repository: String,
    /// Mirrors, then the registry itself.
    endpoints: Vec<Endpoint>,
}

/// What the repositories of a command share.
struct Shared {
    client: Client,
    settings: Settings,
    plain: bool,
    /// Mirrors that did not answer, and when; they are not asked again for [`DEAD_FOR`].
    dead: Mutex<HashMap<Origin, Instant>>,
    /// The last documents that were fetched.
    documents: Mutex<Vec<(Descriptor, Vec<u8>)>>,
    uploads: Uploads,
}

impl From<RegistryError> for TransportError {
    fn from(error: RegistryError) -> Self {
        Self::Registry(Box::new(error))
    }
}

impl Registry {
    /// Opens `HOST[:PORT]/REPOSITORY`. Nothing is asked yet.
    ///
    /// # Errors
    /// [`RegistryError::Config`] and [`RegistryError::Blocked`] of registries.conf; [`RegistryError::Config`] of a file of
    /// credentials that the user named.
    pub fn open(location: &str, access: &Access) -> Result<Self, TransportError> {
        let bad = |why: Malformed| TransportError::BadSource {
            found: format!("docker://{}", text::shown(location)),
            why: why.allowed(),
        };
        let Reference { host, mut repository, .. } = Reference::parse(location).map_err(bad)?;
        if credentials::is_hub(&host.to_string()) && !repository.contains('/') {
            repository = format!("library/{repository}");
        }
        let client = Client::new(access.clone());
        credentials::check_named(access)?;
        let shared = Shared {
            client,
            settings: Settings::load()?,
            plain: access.plain_http,
            dead: Mutex::default(),
            documents: Mutex::default(),
            uploads: Uploads::default(),
        };
        Self::new(Arc::new(shared), host, repository)
    }

    fn new(shared: Arc<Shared>, host: Host, repository: String) -> Result<Self, TransportError> {
        let access = shared.client.access();
        let known = |host: &Host| {
            access.certificates.is_some()
                || certificates::find(host, None).map_or(true, |found| found != tls::Certificates::default())
        };
        let endpoints = shared.settings.endpoints(&host, &repository, shared.plain, &known)?;
        Ok(Self { shared, host, repository, endpoints })
    }

    /// Another repository of the same registry, below the same prefix.
    ///
    /// # Errors
    /// [`TransportError::BadSource`] for what is not a repository's name.
    pub fn at(&self, below: &str) -> Result<Self, TransportError> {
        let repository = self.joined(below);
        if !is_repository(&repository) {
            let found = format!("docker://{}/{}", self.host, text::shown(&repository));
            return Err(TransportError::BadSource { found, why: Malformed::Repository.allowed() });
        }
        Self::new(self.shared.clone(), self.host.clone(), repository)
    }

    /// `PREFIX/below`. A user may have named the system's repository in place of its prefix.
    fn joined(&self, below: &str) -> String {
        let system = crate::image::oci::SYSTEM_REPOSITORY;
        let prefix = match self.repository.strip_suffix(system) {
            Some(prefix) if prefix.is_empty() || prefix.ends_with('/') => prefix.trim_end_matches('/'),
            _ => &self.repository,
        };
        if prefix.is_empty() { below.to_string() } else { format!("{prefix}/{below}") }
    }

    /// The repository's name.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    fn client(&self) -> &Client {
        &self.shared.client
    }

    /// The registry itself, for what is written.
    fn home(&self) -> Result<&Endpoint, TransportError> {
        // `endpoints` of settings ends with it always.
        self.endpoints.last().ok_or_else(|| RegistryError::NotListed { location: self.location() }.into())
    }

    fn url(endpoint: &Endpoint, rest: &str) -> Url {
        Url { origin: endpoint.origin.clone(), path: format!("/v2/{}/{rest}", endpoint.repository) }
    }

    /// Asks the mirrors in order, then the registry; the first that answers well counts.
    fn each<T>(
        &self,
        fit: impl Fn(&Endpoint) -> bool,
        mut ask: impl FnMut(&Endpoint) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        let last = self.endpoints.len().saturating_sub(1);
        let mirrors = self.endpoints.get(..last).unwrap_or_default();
        for mirror in mirrors.iter().filter(|mirror| fit(mirror) && !self.is_dead(mirror)) {
            match ask(mirror) {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    log::info!("mirror {}: {error}; asking the next server", mirror.origin);
                    self.note_dead(mirror, &error);
                }
            }
        }
        ask(self.home()?)
    }

    fn dead(&self) -> std::sync::MutexGuard<'_, HashMap<Origin, Instant>> {
        locks::lock(&self.shared.dead)
    }

    /// Remembers a mirror that cannot be reached. The registry itself is asked each time.
    fn note_dead(&self, endpoint: &Endpoint, error: &TransportError) {
        if let TransportError::Registry(error) = error
            && matches!(**error, RegistryError::Network { unreachable: true, .. })
            && self.endpoints.last() != Some(endpoint)
        {
            self.dead().insert(endpoint.origin.clone(), Instant::now());
        }
    }

    fn is_dead(&self, endpoint: &Endpoint) -> bool {
        self.dead().get(&endpoint.origin).is_some_and(|since| since.elapsed() < DEAD_FOR)
    }

    fn get(&self, endpoint: &Endpoint, url: &Url, accept: &[&str]) -> Result<Answer, RegistryError> {
        let mut ask = Ask::new(Method::GET);
        if !accept.is_empty() {
            ask.headers.push((header::ACCEPT, accept.join(", ")));
        }
        self.client().send(endpoint, url, &Scope::Pull, &ask)
    }

    /// A manifest or index, with what it is.
    fn document(&self, which: &TagOrDigest) -> Result<(Descriptor, Vec<u8>), TransportError> {
        let by_tag = matches!(which, TagOrDigest::Tag(_));
        let fit = |endpoint: &Endpoint| if by_tag { endpoint.by_tag } else { endpoint.by_digest };
        let found = self.each(fit, |endpoint| self.document_at(endpoint, which))?;
        self.remember(found.clone());
        Ok(found)
    }

    fn document_at(
        &self,
        endpoint: &Endpoint,
        which: &TagOrDigest,
    ) -> Result<(Descriptor, Vec<u8>), TransportError> {
        let url = Self::url(endpoint, &format!("manifests/{which}"));
        let answer = self.get(endpoint, &url, &ACCEPT)?;
        if answer.status != 200 {
            return Err(answer.unexpected().into());
        }
        let request = answer.request().to_string();
        let kind = answer.header(&header::CONTENT_TYPE).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_string();
        let bytes = answer.bytes("a manifest", MAX_MANIFEST_BYTES)?;
        // Rule: what the document says of itself counts, then the header.
        let kind = media_type(&bytes).unwrap_or(kind);
        if !ACCEPT.contains(&kind.as_str()) {
            let why = format!("expected a manifest or index, found the media type `{}`", text::shown(&kind));
            return Err(RegistryError::Protocol { request, why }.into());
        }
        let found = Descriptor::of(&kind, &bytes);
        match which {
            // Rule: a digest names bytes; `Docker-Content-Digest` is the server's word only.
            TagOrDigest::Digest(expected) if *expected != found.digest => {
                Err(TransportError::DigestMismatch {
                    object: request,
                    expected: *expected,
                    found: found.digest,
                })
            }
            _ => Ok((found, bytes)),
        }
    }

    fn remember(&self, document: (Descriptor, Vec<u8>)) {
        let mut documents = locks::lock(&self.shared.documents);
        documents.retain(|(known, _)| known.digest != document.0.digest);
        if documents.len() >= REMEMBERED {
            documents.remove(0);
        }
        documents.push(document);
    }

    fn remembered(&self, digest: &Digest) -> Option<Vec<u8>> {
        let documents = locks::lock(&self.shared.documents);
        documents.iter().find(|(known, _)| known.digest == *digest).map(|(_, bytes)| bytes.clone())
    }

    /// Where a name of a store is: the repository, and tag or digest there.
    fn place_of(&self, name: &str) -> Result<(Option<Self>, TagOrDigest), TransportError> {
        let bad = |why: Malformed| TransportError::BadSource { found: text::shown(name), why: why.allowed() };
        match name.split_once(':') {
            Some((repository, tag)) if repository != "sha256" => {
                let tag = tag.strip_prefix("sha256/").unwrap_or(tag);
                Ok((Some(self.at(repository)?), TagOrDigest::parse(tag).map_err(bad)?))
            }
            _ => Ok((None, TagOrDigest::parse(name).map_err(bad)?)),
        }
    }

    /// An error that says which names there are, if that is what is wrong.
    fn name_missing(&self, name: &str, error: TransportError) -> TransportError {
        match error {
            TransportError::Registry(registry) if matches!(*registry, RegistryError::NotFound { .. }) => {
                let (of_digests, named): (Vec<_>, Vec<_>) = self
                    .list_tags()
                    .unwrap_or_default()
                    .into_iter()
                    .filter(|tag| !tag.starts_with("sha256-"))
                    .partition(|tag| is_of_digest(tag));
                // Names of digests say nothing to a person, and there are many; but an image may have no other.
                let mut available = match named.is_empty() {
                    true => of_digests.into_iter().filter(|tag| tag.len() == 64).collect(),
                    false => named,
                };
                sorting::sort(&mut available);
                let tag = match name.strip_prefix("sha256:") {
                    Some(_) => name,
                    None => name.rsplit_once(':').map_or(name, |(_, tag)| tag),
                };
                TransportError::NameMissing { location: self.location(), name: text::shown(tag), available }
            }
            error => error,
        }
    }

    fn list_tags(&self) -> Result<Vec<String>, TransportError> {
        self.each(|endpoint| endpoint.by_tag, |endpoint| self.list_tags_at(endpoint))
    }

    fn list_tags_at(&self, endpoint: &Endpoint) -> Result<Vec<String>, TransportError> {
        // Not `oci_spec`'s TagList: Go writes `null` for a list without tags.
        #[derive(Deserialize)]
        struct Tags {
            tags: Option<Vec<String>>,
        }
        let mut url = Self::url(endpoint, "tags/list?n=1000");
        let mut found = Vec::new();
        for _ in 0..MAX_PAGES {
            let answer = self.get(endpoint, &url, &[])?;
            match answer.status {
                200 => {}
                404 if endpoint == self.home()? => return Ok(Vec::new()),
                _ => return Err(answer.unexpected().into()),
            }
            let next = self.next_page(endpoint, &answer)?;
            let request = answer.request().to_string();
            let kind = text::shown(answer.header(&header::CONTENT_TYPE).unwrap_or("none"));
            let bytes = answer.bytes("a list of tags", MAX_PAGE)?;
            let page: Tags = serde_json::from_slice(&bytes).map_err(|error| {
                let error = text::shown(&error.to_string());
                let why = format!("expected a list of tags in JSON, found the media type `{kind}`: {error}");
                RegistryError::Protocol { request, why }
            })?;
            // What is not a tag cannot be asked for either.
            found.extend(page.tags.unwrap_or_default().into_iter().filter(|tag| is_tag(tag)));
            if found.len() > MAX_TAGS {
                break;
            }
            match next {
                Some(next) => url = next,
                None => break,
            }
        }
        found.truncate(MAX_TAGS);
        Ok(found)
    }

    /// The next page of a list (RFC 8288, `Link: <URL>; rel="next"`), which must be of the same server.
    fn next_page(&self, endpoint: &Endpoint, answer: &Answer) -> Result<Option<Url>, TransportError> {
        let Some(link) = answer.headers(&header::LINK).find(|link| link.contains("next")) else {
            return Ok(None);
        };
        let Some(target) = link_target(link) else {
            return Ok(None);
        };
        let next = self.client().next(endpoint, &answer.url, answer.request(), target)?;
        if next.origin != endpoint.origin {
            let (request, to) = (answer.request().to_string(), next.to_string());
            let why = "the next page of a list must be of the same server";
            return Err(RegistryError::Redirect { request, to, why }.into());
        }
        Ok(Some(next))
    }
}

/// Where a `Link` leads.
fn link_target(link: &str) -> Option<&str> {
    link.trim().strip_prefix('<')?.split_once('>').map(|(target, _)| target)
}

/// Reads any text as the headers and the token of an answer, for fuzzing: it must come to an end, and no more.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub fn read_headers(text: &str) {
    let Ok(from) = Url::parse("https://registry.example.org/v2/a/tags/list?n=1000") else { return };
    let _ = auth::challenges(text.lines());
    let _ = auth::token(text.as_bytes());
    for line in text.lines() {
        if let Ok(url) = from.join(link_target(line).unwrap_or(line)) {
            // What is written for requests is read as the same.
            assert_eq!(Url::parse(&url.full()).map(|again| again.full()), Ok(url.full()), "{line:?}");
        }
    }
}

/// Whether a tag is HEX, or HEX and what stands beside it (`HEX.sig`).
fn is_of_digest(tag: &str) -> bool {
    tag.get(..64).is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The media type that a document says of itself.
fn media_type(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
    }
    serde_json::from_slice::<Typed>(bytes).ok()?.media_type.filter(|text| !text.is_empty())
}

fn is_document(blob: &Descriptor) -> bool {
    blob.is_manifest() || blob.is_index()
}

impl Transport for Registry {
    fn location(&self) -> String {
        format!("docker://{}/{}", self.host, self.repository)
    }

    fn entries(&self) -> Result<Vec<Descriptor>, TransportError> {
        Err(RegistryError::NotListed { location: self.location() }.into())
    }

    fn lookup(&self, name: &str) -> Result<Vec<Descriptor>, TransportError> {
        let (other, which) = self.place_of(name)?;
        let registry = other.as_ref().unwrap_or(self);
        let (found, _) = registry.document(&which).map_err(|error| registry.name_missing(name, error))?;
        Ok(vec![found])
    }

    fn fetch(&self, blob: &Descriptor, max_bytes: u64) -> Result<Vec<u8>, TransportError> {
        if blob.size > max_bytes {
            return Err(TransportError::TooBig { digest: blob.digest, size: blob.size, max: max_bytes });
        }
        let object = format!("{}@{}", self.location(), blob.digest);
        let bytes = match self.remembered(&blob.digest) {
            Some(bytes) => bytes,
            None if is_document(blob) => {
                self.document(&TagOrDigest::Digest(blob.digest))
                    .map_err(|error| self.blob_missing(blob, error))?
                    .1
            }
            None => self.small_blob(blob)?,
        };
        if bytes.len() as u64 != blob.size {
            return Err(TransportError::SizeMismatch {
                object,
                expected: blob.size,
                found: bytes.len() as u64,
            });
        }
        let found = Digest::of(&bytes);
        if found != blob.digest {
            return Err(TransportError::DigestMismatch { object, expected: blob.digest, found });
        }
        Ok(bytes)
    }

    fn open(&self, blob: &Descriptor, offset: u64) -> Result<Blob, TransportError> {
        if is_document(blob) {
            let bytes = self.fetch(blob, MAX_MANIFEST_BYTES)?;
            let from = bytes.get(offset as usize..).unwrap_or_default().to_vec();
            return Ok(Blob::Stream(Box::new(std::io::Cursor::new(from))));
        }
        Ok(Blob::Stream(Box::new(self.stream(blob, offset)?)))
    }

    fn read_range(
        &self,
        blob: &Descriptor,
        offset: u64,
        buffer: &mut [u8],
        ask: &RangeAsk,
    ) -> Result<(), TransportError> {
        self.part(blob, offset, buffer, ask)
    }

    fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, TransportError> {
        self.list_referrers(subject, artifact_type)
    }

    fn tags(&self, repository: &str) -> Result<Vec<String>, TransportError> {
        self.at(repository)?.list_tags()
    }

    fn within(&self, repository: &str) -> Result<Box<dyn Transport>, TransportError> {
        Ok(Box::new(self.at(repository)?))
    }

    fn peek(&self, name: &str) -> Result<Option<Digest>, TransportError> {
        let (other, which) = self.place_of(name)?;
        let registry = other.as_ref().unwrap_or(self);
        registry.each(
            |endpoint| endpoint.by_tag,
            |endpoint| {
                let url = Self::url(endpoint, &format!("manifests/{which}"));
                let mut ask = Ask::new(Method::HEAD);
                ask.headers.push((header::ACCEPT, ACCEPT.join(", ")));
                let answer = registry.client().send(endpoint, &url, &Scope::Pull, &ask)?;
                match answer.status {
                    200 => Ok(answer.header(&CONTENT_DIGEST).and_then(|text| text.parse().ok())),
                    _ => Err(answer.unexpected().into()),
                }
            },
        )
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn default_name(&self) -> Option<&'static str> {
        Some("latest")
    }
}
