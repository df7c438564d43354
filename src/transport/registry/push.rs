//! Writing to a registry.
//!
//! A blob is asked for first (HEAD), then mounted from another repository that has it, then sent whole:
//! `POST …/uploads/` returns a location, one `PUT` fills it. An upload that breaks begins again at a new place:
//! registries in use (distribution before 3.0) lose a broken one, and append to it whatever
//! `Content-Range` says. A digest is checked by the registry and again here, by its name.
//!
//! An upload that is given up is cancelled (`DELETE` on its location, distribution-spec), so that the registry does not
//! keep its bytes until it looks for old ones: after an error, and when the command is ended
//! ([`Registry::cancel_uploads`]). A registry that cannot be reached, or that does not answer, is not asked again for that.

use std::fs::File;
use std::thread;

use ureq::http::{HeaderName, Method, header};

use super::client::{Scope, TRIES};
use super::error::RegistryError;
use super::http::{Answer, Ask, Payload};
use super::settings::Endpoint;
use super::uploads::{Beginning, Upload};
use super::{CONTENT_DIGEST, Registry, is_document};
use crate::digest::Digest;
use crate::image::oci::Descriptor;
use crate::progress::Task;
use crate::transport::{Transport, TransportError};

/// The answer of a registry that has understood the `subject` of a manifest.
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");

/// How a blob came to be in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uploaded {
    /// It was there.
    Present,
    /// It was in another repository of the registry.
    Mounted,
    /// It was sent.
    Sent,
}

impl Registry {
    /// Whether the repository has a blob or manifest.
    pub fn has(&self, blob: &Descriptor) -> Result<bool, TransportError> {
        let endpoint = self.home()?;
        let kind = if is_document(blob) { "manifests" } else { "blobs" };
        let url = Self::url(endpoint, &format!("{kind}/{}", blob.digest));
        let mut ask = Ask::new(Method::HEAD);
        if is_document(blob) {
            ask.headers.push((header::ACCEPT, blob.media_type.to_string()));
        }
        let answer = self.client().send(endpoint, &url, &Scope::Push, &ask)?;
        match answer.status {
            // A length that is not the blob's is a broken upload of someone else: send it again.
            200 => Ok(answer.length().is_none_or(|length| length == blob.size)),
            404 => Ok(false),
            _ => Err(answer.unexpected().into()),
        }
    }

    /// Puts a blob into the repository. `elsewhere` is a repository of this registry that has it.
    ///
    /// # Errors
    /// [`TransportError::Registry`].
    pub fn put_blob(
        &self,
        blob: &Descriptor,
        file: &File,
        elsewhere: Option<&str>,
        task: &Task,
    ) -> Result<Uploaded, TransportError> {
        if self.has(blob)? {
            task.advance(blob.size);
            return Ok(Uploaded::Present);
        }
        let mut upload = None;
        if let Some(from) = elsewhere.filter(|from| *from != self.repository()) {
            match self.mount(blob, from)? {
                Mount::Done => {
                    task.advance(blob.size);
                    return Ok(Uploaded::Mounted);
                }
                Mount::Upload(begun) => upload = Some(begun),
                Mount::Refused => {}
            }
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let sent = match upload.take() {
                Some(upload) => self.fill(&upload, blob, file, task),
                None => self.begin(blob).and_then(|upload| self.fill(&upload, blob, file, task)),
            };
            match sent {
                Ok(()) => return Ok(Uploaded::Sent),
                Err(TransportError::Registry(error)) if tries < TRIES && is_lost(&error) => {
                    log::info!("{error}; sending {} again", blob.digest);
                    thread::sleep(self.client().pause(tries, None));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks the registry to take a blob from another of its repositories.
    fn mount(&self, blob: &Descriptor, from: &str) -> Result<Mount, TransportError> {
        let endpoint = self.home()?;
        let url =
            Self::url(endpoint, "blobs/uploads/").with("mount", &blob.digest.to_string()).with("from", from);
        let _beginning = self.beginning(blob)?;
        let answer = match self.client().send(endpoint, &url, &Scope::Mount(from.into()), &empty_post()) {
            Ok(answer) => answer,
            // Who may write here may not read there: send it.
            Err(RegistryError::Denied { .. }) => return Ok(Mount::Refused),
            Err(error) => return Err(error.into()),
        };
        match answer.status {
            201 => Ok(Mount::Done),
            202 => Ok(Mount::Upload(self.upload_at(endpoint, &answer, blob)?)),
            _ => Ok(Mount::Refused),
        }
    }

    /// Asks for a place to send a blob to.
    fn begin(&self, blob: &Descriptor) -> Result<Upload, TransportError> {
        let endpoint = self.home()?;
        let url = Self::url(endpoint, "blobs/uploads/");
        let _beginning = self.beginning(blob)?;
        let answer = self.client().send(endpoint, &url, &Scope::Push, &empty_post())?;
        match answer.status {
            202 => self.upload_at(endpoint, &answer, blob),
            _ => Err(answer.unexpected().into()),
        }
    }

    fn beginning(&self, blob: &Descriptor) -> Result<Beginning<'_>, TransportError> {
        self.shared.uploads.begin().ok_or_else(|| self.cancelled(blob))
    }

    fn cancelled(&self, blob: &Descriptor) -> TransportError {
        RegistryError::Cancelled { location: self.location(), digest: blob.digest }.into()
    }

    /// The upload that an answer has begun.
    fn upload_at(
        &self,
        endpoint: &Endpoint,
        answer: &Answer,
        blob: &Descriptor,
    ) -> Result<Upload, TransportError> {
        let Some(location) = answer.header(&header::LOCATION) else {
            let (request, why) = (answer.request().to_string(), "the answer has no Location".into());
            return Err(RegistryError::Protocol { request, why }.into());
        };
        let place = self.client().next(endpoint, &answer.url, answer.request(), location)?;
        let upload = (endpoint.clone(), place);
        match self.shared.uploads.add(upload.clone()) {
            true => Ok(upload),
            false => Err(self.cancelled(blob)),
        }
    }

    /// Sends a blob; an upload that fails is cancelled.
    fn fill(
        &self,
        upload: &Upload,
        blob: &Descriptor,
        file: &File,
        task: &Task,
    ) -> Result<(), TransportError> {
        let sent = self.put(upload, blob, file, task);
        let was_open = self.shared.uploads.remove(upload);
        match sent {
            Err(_) if !was_open => Err(self.cancelled(blob)),
            Err(TransportError::Registry(error)) if is_open_after(&error) => {
                self.cancel(upload);
                Err(error.into())
            }
            sent => sent,
        }
    }

    fn put(
        &self,
        (endpoint, place): &Upload,
        blob: &Descriptor,
        file: &File,
        task: &Task,
    ) -> Result<(), TransportError> {
        let url = place.with("digest", &blob.digest.to_string());
        let mut ask = Ask::new(Method::PUT);
        ask.headers.push((header::CONTENT_TYPE, "application/octet-stream".into()));
        ask.payload = Payload::File { file, size: blob.size, task };
        let answer = self.client().once(endpoint, &url, &Scope::Push, &ask)?;
        match answer.status {
            201 | 204 => Ok(()),
            _ => Err(answer.unexpected().into()),
        }
    }

    /// Cancels the uploads that are under way in all repositories of this command, which is about to end, and lets none
    /// begin. Each is asked for once. A request that begins one is waited for as long as the registry may be silent.
    pub fn cancel_uploads(&self) {
        self.shared.uploads.end(self.client().patience(), |upload| self.cancel(upload));
    }

    /// Cancels an upload. What the registry says to that changes nothing for the caller.
    fn cancel(&self, (endpoint, place): &Upload) {
        match self.client().once(endpoint, place, &Scope::Push, &Ask::new(Method::DELETE)) {
            Ok(answer) => log::info!("{} is cancelled (status {})", answer.request(), answer.status),
            Err(error) => log::info!("an upload is not cancelled: {error}"),
        }
    }

    /// Puts a manifest or index under a tag or digest; whether the registry knows about `subject`.
    ///
    /// # Errors
    /// [`TransportError::DigestMismatch`] where the registry says that it stored something else.
    pub fn put_document(&self, name: &str, media_type: &str, bytes: &[u8]) -> Result<bool, TransportError> {
        let endpoint = self.home()?;
        let url = Self::url(endpoint, &format!("manifests/{name}"));
        let mut ask = Ask::new(Method::PUT);
        ask.headers.push((header::CONTENT_TYPE, media_type.into()));
        ask.payload = Payload::Bytes(bytes);
        let answer = self.client().send(endpoint, &url, &Scope::Push, &ask)?;
        if !matches!(answer.status, 200 | 201) {
            return Err(answer.unexpected().into());
        }
        let expected = Digest::of(bytes);
        let said = answer.header(&CONTENT_DIGEST).and_then(|text| text.parse::<Digest>().ok());
        if let Some(found) = said.filter(|found| *found != expected) {
            let object = answer.request().to_string();
            return Err(TransportError::DigestMismatch { object, expected, found });
        }
        Ok(answer.header(&SUBJECT).is_some())
    }

    /// Puts referrers of `subject`, which are in this repository already, where readers find them,
    /// on a registry that does not do so by itself.
    pub fn put_referrers(&self, subject: &Digest, referrers: &[Descriptor]) -> Result<(), TransportError> {
        self.add_to_tag(subject, referrers)
    }
}

enum Mount {
    Done,
    Upload(Upload),
    Refused,
}

fn empty_post() -> Ask<'static> {
    // Without a body the length must be said: some servers wait for one.
    Ask { payload: Payload::Bytes(&[]), ..Ask::new(Method::POST) }
}

/// Whether the registry may still keep an upload that ended with this error, and may answer.
fn is_open_after(error: &RegistryError) -> bool {
    match error {
        RegistryError::Network { unreachable, .. } => !unreachable,
        RegistryError::Stalled { .. } | RegistryError::NotFound { .. } | RegistryError::Denied { .. } => {
            false
        }
        _ => true,
    }
}

/// Whether an upload is lost and another one may do better.
fn is_lost(error: &RegistryError) -> bool {
    error.is_temporary() || matches!(error, RegistryError::NotFound { .. })
}
