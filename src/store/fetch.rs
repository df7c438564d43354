//! Blobs from a transport into a store: from another machine by way of `partial.rs`, so that what came before a cut is kept.

use std::sync::Arc;

use super::{StoreError, Writer, partial};
use crate::image::oci::Descriptor;
use crate::progress::{self, Progress, Task};
use crate::sys::failpoint;
use crate::transport::{Transport, parallel};

/// A blob to fetch, for [`Writer::fetch_all`].
pub struct FetchJob<'a> {
    /// Where it is.
    pub from: &'a dyn Transport,
    /// The blob.
    pub blob: &'a Descriptor,
    /// Whether to fetch it whatever has its name in the store.
    pub again: bool,
    /// What to call it to people.
    pub object: String,
}

impl Writer<'_> {
    /// Fetches a blob from a transport, unless it exists; returns whether it was fetched.
    ///
    /// # Errors
    /// [`TransportError::SizeMismatch`](crate::transport::TransportError::SizeMismatch) or
    /// [`TransportError::DigestMismatch`](crate::transport::TransportError::DigestMismatch); then nothing is stored.
    pub fn fetch(&self, from: &dyn Transport, blob: &Descriptor, task: &Task) -> Result<bool, StoreError> {
        if self.store().has(blob) {
            task.advance(blob.size);
            return Ok(false);
        }
        if from.is_remote() {
            return partial::receive(self, from, blob, false, task);
        }
        let temp = self.receive(from, blob, task)?;
        self.commit(temp, &blob.digest)?;
        Ok(true)
    }

    /// Fetches blobs, several at a time, each once.
    ///
    /// # Errors
    /// As [`Writer::fetch`], of the first that failed.
    pub fn fetch_all(&self, jobs: &[FetchJob<'_>], progress: &Progress) -> Result<(), StoreError> {
        let all: u64 = jobs.iter().map(|job| job.blob.size).sum();
        let whole = Arc::new(progress.task("fetch", progress::ALL, Some(all)));
        parallel::for_each(jobs, |job| {
            let task = progress.task("fetch", &job.object, Some(job.blob.size)).part_of(&whole);
            match job.again {
                true => self.refetch(job.from, job.blob, &task)?,
                false => self.fetch(job.from, job.blob, &task).map(|_| ())?,
            }
            failpoint::hit("store.blob.fetched");
            Ok(())
        })
    }

    /// Fetches a blob even if the store has one of that name, and replaces it: the same bytes, or a repaired
    /// copy.
    ///
    /// # Errors
    /// As [`Writer::fetch`].
    pub fn refetch(&self, from: &dyn Transport, blob: &Descriptor, task: &Task) -> Result<(), StoreError> {
        if from.is_remote() {
            return partial::receive(self, from, blob, true, task).map(|_| ());
        }
        let temp = self.receive(from, blob, task)?;
        self.commit(temp, &blob.digest)
    }
}
