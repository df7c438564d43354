//! The options of `mosfs build` that make the target `boot`: a kernel of the system's own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use uuid::Uuid;

use crate::boot::cmdline::{self, CmdlineError};
use crate::boot::settings::{
    ON_FAILURE_FILE, OVERLAY_FILE, OnFailure, ROOT_TARGET_FILE, Settings, WATCHDOG_FILE,
};
use crate::error::{AnyError, Class, Classified};
use crate::image::boot::CLOCK_FILE;
use crate::publish::boot::{EfiSigner, Spec};
use crate::sys::file::{self, Links};
use crate::trust::config::{CA_FILE, CaFile, FLOOR_KEY_FILE, PRODUCT_FILE};
use crate::trust::crl::CRL_FILE;
use crate::trust::p256::{P256PrivateKey, P256PublicKey};
use crate::trust::{Anchor, Certificate};

/// Largest file of CONFIG, in bytes.
const MAX_CONFIG_FILE: u64 = 1 << 20;
/// The files that `--boot-config` may add.
const MORE_FILES: [&str; 5] = [OVERLAY_FILE, ROOT_TARGET_FILE, ON_FAILURE_FILE, WATCHDOG_FILE, CRL_FILE];

/// A kernel of the system's own.
#[derive(Debug, Args)]
#[command(next_help_heading = "Kernel of the system")]
pub(super) struct KernelArgs {
    /// Make the target `boot` from the kernel in the hostfs image: a unified kernel image that trusts this manifest CA
    /// (PEM). It also needs the floor key: --floor-key or --floor-pub.
    #[arg(long, value_name = "FILE", conflicts_with = "signature")]
    ca: Option<PathBuf>,
    /// Take the kernel of this release, where the image has several.
    #[arg(long, value_name = "RELEASE", requires = "ca")]
    kernel: Option<String>,
    /// Add these words to the kernel command line, `root=mosfs panic=-1`.
    #[arg(long, value_name = "WORDS", requires = "ca", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Take the files overlay, root-target, on-failure, watchdog and crl.pem of the kernel's CONFIG from this folder.
    #[arg(long, value_name = "DIR", requires = "ca")]
    boot_config: Option<PathBuf>,
    /// Sign for Secure Boot with sbsign and this private key (PEM).
    #[arg(long, value_name = "FILE", requires = "ca", requires = "sb_cert", conflicts_with = "sb_sign")]
    sb_key: Option<PathBuf>,
    /// The certificate of --sb-key (PEM).
    #[arg(long, value_name = "FILE", requires = "sb_key")]
    sb_cert: Option<PathBuf>,
    /// Sign for Secure Boot with `COMMAND IN OUT`, for a key in a token.
    #[arg(long, value_name = "COMMAND", requires = "ca")]
    sb_sign: Option<OsString>,
}

/// Why the options do not describe a kernel that could boot.
#[derive(Debug, thiserror::Error)]
pub(super) enum KernelArgsError {
    /// Without a floor key a boot is refused.
    #[error("the kernel needs the floor key to check the floor; found none")]
    NoFloorKey,
    /// CONFIG has one floor key.
    #[error("the kernel takes one floor key, found {found}")]
    FloorKeys {
        /// How many were given.
        found: usize,
    },
    /// There is no shell in the initramfs.
    #[error("{}: `shell` is not possible: the initramfs that mosfs build makes has no shell", path.display())]
    NoShell {
        /// The file.
        path: PathBuf,
    },
    /// A word of the kernel command line that would stop every boot.
    #[error("--cmdline: {0}")]
    Cmdline(#[from] CmdlineError),
    /// A root that is not mosfs.
    #[error("--cmdline: `root=` names another root than mosfs")]
    OtherRoot,
}

impl Classified for KernelArgsError {
    fn class(&self) -> Class {
        Class::Input
    }
}

impl KernelArgs {
    /// Returns what the target `boot` is to be, if there is to be one. `certificate` is that of the signer, if it is known.
    pub(super) fn spec(
        &self,
        product: Uuid,
        certificate: Option<&[u8]>,
        floor_keys: &[P256PrivateKey],
        floor_pub: &[P256PublicKey],
    ) -> Result<Option<Spec>, AnyError> {
        let Some(ca) = &self.ca else { return Ok(None) };
        let more = self.cmdline.as_deref().unwrap_or_default();
        match cmdline::parse(&format!("root=mosfs {more}")).map_err(KernelArgsError::from)? {
            Some(_) => {}
            None => return Err(KernelArgsError::OtherRoot.into()),
        }
        let mut keys: Vec<_> = match floor_pub {
            [] => floor_keys.iter().map(|key| *key.public()).collect(),
            given => given.to_vec(),
        };
        keys.dedup();
        let [floor_key] = keys[..] else {
            return Err(match keys.len() {
                0 => KernelArgsError::NoFloorKey,
                found => KernelArgsError::FloorKeys { found },
            }
            .into());
        };
        let ca_file = CaFile::load(ca)?;
        let ca_pem = ca_file.to_pem().map_err(|error| file_error(ca, error))?;
        let mut clock = ca_file.valid_from().map_err(|error| file_error(ca, error))?;
        if let Some(pem) = certificate {
            clock = clock.max(Certificate::from_pem(pem)?.valid_from()?);
        }
        let mut anchor = Anchor::new(ca_file, product);
        let mut config = BTreeMap::from([
            (CA_FILE.to_string(), ca_pem),
            (PRODUCT_FILE.to_string(), format!("{product}\n").into_bytes()),
            (FLOOR_KEY_FILE.to_string(), floor_key.to_pem()?),
            (CLOCK_FILE.to_string(), format!("{clock}\n").into_bytes()),
        ]);
        if let Some(folder) = &self.boot_config {
            // What makes no sense is an error now, not at every boot.
            let settings = Settings::load(folder)?;
            if settings.on_failure == OnFailure::Shell {
                return Err(KernelArgsError::NoShell { path: folder.join(ON_FAILURE_FILE) }.into());
            }
            for name in MORE_FILES {
                let path = folder.join(name);
                if let Some(content) = file::find_regular(&path, Links::Followed, MAX_CONFIG_FILE)? {
                    config.insert(name.to_string(), content);
                    if name == CRL_FILE {
                        anchor = anchor.with_crls(&path)?;
                    }
                }
            }
        }
        let signer = match (&self.sb_key, &self.sb_cert, &self.sb_sign) {
            (Some(key), Some(certificate), _) => {
                Some(EfiSigner::Sbsign { key: key.clone(), certificate: certificate.clone() })
            }
            (_, _, Some(command)) => Some(EfiSigner::Command(command.clone())),
            _ => None,
        };
        let (kernel, cmdline) = (self.kernel.clone(), self.cmdline.clone());
        Ok(Some(Spec { anchor, config, kernel, cmdline, signer }))
    }
}

fn file_error(path: &Path, error: openssl::error::ErrorStack) -> AnyError {
    crate::error::IoError::new("read", path, std::io::Error::other(error)).into()
}
