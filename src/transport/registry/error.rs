//! Why a registry cannot be read or written.

use std::path::PathBuf;

use crate::error::{Class, Classified};

/// Why a registry cannot be read or written.
///
/// No variant holds a secret, and a URL is shown without user and query: signed URLs carry a
/// credential there.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No connection, or one that broke.
    #[error("{request}: {why}")]
    Network {
        /// Method and URL.
        request: String,
        /// What the network says.
        why: String,
        /// Whether there was no connection at all.
        unreachable: bool,
    },
    /// The server's certificate is not accepted, or there is no TLS.
    #[error("{request}: TLS: {why}")]
    Tls {
        /// Method and URL.
        request: String,
        /// What is wrong.
        why: String,
    },
    /// The server is silent, or so slow that it must be broken.
    #[error("{request}: {why}")]
    Stalled {
        /// Method and URL.
        request: String,
        /// How long and how little.
        why: String,
    },
    /// The registry does not let this client in.
    #[error("{request}: access denied ({status}{}), {credentials}", said_after(said))]
    Denied {
        /// Method and URL.
        request: String,
        /// 401 or 403.
        status: u16,
        /// What the server says.
        said: String,
        /// Where the credentials came from, or why there are none.
        credentials: String,
    },
    /// There is no such thing.
    #[error("{request}: not found{}", said_after(said))]
    NotFound {
        /// Method and URL.
        request: String,
        /// What the server says.
        said: String,
    },
    /// Any other status that was not expected.
    #[error("{request}: the server answers {status}{}", said_after(said))]
    Status {
        /// Method and URL.
        request: String,
        /// The status.
        status: u16,
        /// What the server says.
        said: String,
    },
    /// The answer breaks HTTP or the distribution-spec.
    #[error("{request}: {why}")]
    Protocol {
        /// Method and URL.
        request: String,
        /// What was expected and found.
        why: String,
    },
    /// An answer is longer than what is read.
    #[error("{request}: the answer is longer than the {max} bytes allowed for {what}")]
    TooLong {
        /// Method and URL.
        request: String,
        /// What was to be read.
        what: &'static str,
        /// The bound, in bytes.
        max: u64,
    },
    /// A redirect leads where it must not.
    #[error("{request}: refused to follow to {to}: {why}")]
    Redirect {
        /// Method and URL.
        request: String,
        /// Where it leads.
        to: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The token service that a registry names must not be asked.
    #[error("{registry} names the token service {realm}: {why}")]
    Realm {
        /// The registry.
        registry: String,
        /// The service's URL.
        realm: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// A file of settings, certificates or credentials cannot be used.
    #[error("{}: {why}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A credential helper did not answer as one. Its output is never shown.
    #[error("credential helper docker-credential-{helper}: {why}")]
    Helper {
        /// Its name.
        helper: String,
        /// What went wrong.
        why: String,
    },
    /// The proxy of the environment cannot be used.
    #[error("environment variable {variable}: {why}")]
    Proxy {
        /// The variable.
        variable: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// registries.conf forbids this registry.
    #[error("registry {host} is blocked by registries.conf")]
    Blocked {
        /// The registry.
        host: String,
    },
    /// Something is asked of a place that holds only single images.
    #[error("{location}: a registry does not list what it holds; name a tag or a digest")]
    NotListed {
        /// The place.
        location: String,
    },
    /// The command that sends a blob is about to end.
    #[error("{location}: the upload of {digest} is cancelled")]
    Cancelled {
        /// The repository.
        location: String,
        /// The blob.
        digest: crate::digest::Digest,
    },
    /// Someone else writes the same list of referrers again and again.
    #[error("{location}: the list of referrers of {subject} was changed by someone else {tries} times")]
    Contended {
        /// The repository.
        location: String,
        /// The digest that the list is about.
        subject: crate::digest::Digest,
        /// How often it was tried.
        tries: u32,
    },
}

fn said_after(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

impl RegistryError {
    /// Whether the same request may succeed at another time: the network, a stall, a busy server.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Network { .. } | Self::Stalled { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429) || *status >= 500,
            _ => false,
        }
    }
}

impl Classified for RegistryError {
    fn class(&self) -> Class {
        match self {
            Self::Config { .. } | Self::Proxy { .. } | Self::NotListed { .. } => Class::Input,
            _ => Class::Failure,
        }
    }
}
