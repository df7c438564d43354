//! Options of commands that reach registries.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Global;
use crate::transport::Access;

/// Options of commands that reach registries.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Registry options")]
pub(super) struct RegistryArgs {
    /// Use plain HTTP for the registries of this command. Registries on this machine (localhost, 127.0.0.0/8, [::1]) do
    /// not need this option.
    #[allow(
        rustdoc::broken_intra_doc_links,
        reason = "`[::1]` is an address; the text is also the option's help"
    )]
    #[arg(long)]
    plain_http: bool,
    /// Read credentials only from this file, in the format that `podman login` and `docker login` write.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// Use this folder instead of certs.d: trust its CAs (*.crt) in addition to the system's, and log in with its
    /// client certificate (*.cert, *.key).
    #[arg(long, value_name = "DIR")]
    cert_dir: Option<PathBuf>,
    /// How long to wait for a server that does not answer, in seconds. A transfer slower than 1 KiB/s over this time
    /// fails too.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=3600))]
    net_timeout: u16,
}

impl RegistryArgs {
    /// How registries are to be reached. Shows the log from now on.
    pub(super) fn access(&self, global: &Global) -> Access {
        super::log::show(global);
        self.quiet_access()
    }

    /// How registries are to be reached, by a command that has a log of its own.
    pub(super) fn quiet_access(&self) -> Access {
        Access {
            plain_http: self.plain_http,
            auth_file: self.authfile.clone(),
            certificates: self.cert_dir.clone(),
            patience: Duration::from_secs(self.net_timeout.into()),
        }
    }

    /// The same options for another command, each with its value.
    pub(super) fn arguments(&self) -> Vec<(&'static str, Option<String>)> {
        let path = |path: &PathBuf| {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            Some(absolute.display().to_string())
        };
        let mut all = vec![("--net-timeout", Some(self.net_timeout.to_string()))];
        all.extend(self.plain_http.then_some(("--plain-http", None)));
        all.extend(self.authfile.iter().map(|file| ("--authfile", path(file))));
        all.extend(self.cert_dir.iter().map(|dir| ("--cert-dir", path(dir))));
        all
    }
}
