//! Referrers: the manifests that say something about another one.
//!
//! A registry that knows them has `/referrers/DIGEST` and answers the PUT of a manifest with
//! `OCI-Subject`. For all others the client keeps an index under the tag `sha256-HEX` of the subject
//! (distribution-spec, "Referrers Tag Schema"). Nothing guards that tag against a second writer: it is
//! read again after it was written, until what was written is there.

use std::thread;

use ureq::http::header;

use super::error::RegistryError;
use super::{MAX_PAGE, MAX_PAGES, Registry};
use crate::digest::Digest;
use crate::image::index::Index;
use crate::image::oci::{Descriptor, INDEX, MANIFEST, MAX_MANIFEST_BYTES};
use crate::transport::reference::TagOrDigest;
use crate::transport::{Transport, TransportError};

/// The most referrers of one subject that are looked at.
const MAX_REFERRERS: usize = 256;
/// How often the fallback index is written.
const WRITES: u32 = 8;

/// The tag that the referrers of a subject are kept under.
fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

impl Registry {
    /// The referrers of a subject, by the registry's list or else by the fallback tag.
    pub(super) fn list_referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, TransportError> {
        let listed = match self.referrers_of_registry(subject)? {
            Some(listed) => listed,
            None => self.referrers_of_tag(subject)?.manifests,
        };
        let mut found = Vec::new();
        for mut entry in listed.into_iter().take(MAX_REFERRERS) {
            if !entry.is_manifest() || entry.size > MAX_MANIFEST_BYTES {
                continue;
            }
            if entry.artifact_type.is_none() {
                // Old writers leave it out. One broken neighbour must not hide the others.
                let transport: &dyn Transport = self;
                let Ok(manifest) = transport.manifest(&entry) else { continue };
                entry.artifact_type = Some(manifest.kind().to_string());
            }
            if artifact_type.is_none_or(|wanted| entry.artifact_type.as_deref() == Some(wanted)) {
                found.push(entry);
            }
        }
        Ok(found)
    }

    /// The registry's own list; `None` where it has no such lists.
    fn referrers_of_registry(&self, subject: &Digest) -> Result<Option<Vec<Descriptor>>, TransportError> {
        self.each(
            |endpoint| endpoint.by_digest,
            |endpoint| {
                let mut url = Self::url(endpoint, &format!("referrers/{subject}"));
                let mut found = Vec::new();
                for page in 0..MAX_PAGES {
                    let answer = self.get(endpoint, &url, &[INDEX])?;
                    match answer.status {
                        200 => {}
                        // Registries without lists answer 404, some 400, 405 or 501.
                        400 | 404 | 405 | 501 if page == 0 => return Ok(None),
                        _ => return Err(answer.unexpected().into()),
                    }
                    let is_index =
                        answer.header(&header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with(INDEX));
                    if !is_index && page == 0 {
                        return Ok(None);
                    }
                    let (next, object) = (self.next_page(endpoint, &answer)?, answer.request().to_string());
                    let bytes = answer.bytes("a list of referrers", MAX_PAGE)?;
                    let index = Index::parse(&bytes, MAX_PAGE)
                        .map_err(|source| TransportError::Document { object, source })?;
                    found.extend(index.manifests);
                    match next {
                        Some(next) if found.len() <= MAX_REFERRERS => url = next,
                        _ => break,
                    }
                }
                Ok(Some(found))
            },
        )
    }

    /// The index under the fallback tag; an empty one where there is none.
    fn referrers_of_tag(&self, subject: &Digest) -> Result<Index, TransportError> {
        let tag = fallback_tag(subject);
        let (found, bytes) = match self.document(&TagOrDigest::Tag(tag.clone())) {
            Ok(found) => found,
            Err(TransportError::Registry(error)) if matches!(*error, RegistryError::NotFound { .. }) => {
                return Ok(Index::empty());
            }
            Err(error) => return Err(error),
        };
        // Some registries answer with the subject itself.
        if !found.is_index() {
            return Ok(Index::empty());
        }
        let object = format!("{}:{tag}", self.location());
        Index::parse(&bytes, MAX_MANIFEST_BYTES).map_err(|source| TransportError::Document { object, source })
    }

    /// Adds referrers to the fallback tag of their subject.
    pub(super) fn add_to_tag(
        &self,
        subject: &Digest,
        referrers: &[Descriptor],
    ) -> Result<(), TransportError> {
        let tag = fallback_tag(subject);
        for tries in 1..=WRITES {
            let mut index = self.referrers_of_tag(subject)?;
            let absent: Vec<_> = referrers
                .iter()
                .filter(|one| !index.manifests.iter().any(|known| known.digest == one.digest))
                .cloned()
                .collect();
            if absent.is_empty() {
                return Ok(());
            }
            let before = std::mem::take(&mut index.manifests);
            // The newest first: a reader looks at a bounded number of them.
            index.manifests = absent
                .into_iter()
                .map(|mut one| {
                    one.annotations.remove(crate::image::oci::REF_NAME);
                    one.media_type = MANIFEST.into();
                    one
                })
                .chain(before)
                .collect();
            self.put_document(&tag, INDEX, &index.to_bytes())?;
            if tries > 1 {
                // Someone else writes as well: do not meet them each time.
                thread::sleep(self.client().pause(tries, None));
            }
        }
        Err(RegistryError::Contended { location: self.location(), subject: *subject, tries: WRITES }.into())
    }
}
