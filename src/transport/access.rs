//! How registries are reached: what a user says once for a whole command.

use std::path::PathBuf;
use std::time::Duration;

/// How long a silent server is waited for, unless the user says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How registries are reached. It holds no secret: credentials are looked up when a registry asks.
#[derive(Debug, Clone)]
pub struct Access {
    /// Speak plain HTTP to the registries that the user named.
    pub plain_http: bool,
    /// The only file to take credentials from.
    pub auth_file: Option<PathBuf>,
    /// A folder of `*.crt` (CAs), `*.cert` and `*.key` (client certificates) for these registries.
    pub certificates: Option<PathBuf>,
    /// How long a silent server is waited for; a transfer below 1 KiB/s over this time is broken.
    pub patience: Duration,
}

impl Default for Access {
    fn default() -> Self {
        Self { plain_http: false, auth_file: None, certificates: None, patience: PATIENCE }
    }
}
