//! Where the provisioning key is elsewhere: a nonce goes to it on a medium, and its signature comes back.
//!
//! ```text
//! on the medium labelled MOSFS-PROVISION (ext4 or FAT; UUID is the machine's, by which one medium serves several):
//!   /provision.pub        the public half of the key, with the floor key's authorization
//!   /nonce-UUID           36 bytes to sign, written here
//!   /signature-UUID       the signature, 64 bytes or DER
//!
//! mosfs setup    writes the nonce, waits for the signature; the disk is written after that
//! here           nonce -> medium; the medium may leave and return; medium -> signature
//! ```
//!
//! A nonce is of one session of the TPM (docs/design.md, first write), and a session ends when the machine does. So the
//! machine stays on until the signature is here; another start makes another nonce, and what was signed before is refused.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::error::SetupError;
use super::floor::LONGEST_WAIT;
use super::media::{self, Second};
use crate::error::{IoContext, IoError};
use crate::medium::layout;
use crate::sys::atomic;
use crate::sys::file::{read_named, remove_if_there};

/// Where the firmware's UUID of the machine is.
const MACHINE: &str = "/sys/class/dmi/id/product_uuid";
/// How often the medium is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest nonce, signature and UUID, in bytes.
const MAX_BYTES: u64 = 4 << 10;

/// What carries a nonce and its signature between a setup and a medium.
pub struct Courier {
    /// The files of the setup.
    nonce: PathBuf,
    signature: PathBuf,
    /// Their names on the medium.
    nonce_name: String,
    signature_name: String,
    /// Whether the nonce is on the medium.
    is_out: bool,
    /// What was on the medium when it was last looked at: a file that is being written changes.
    seen: Vec<u8>,
    /// What was said last, so that it is said once.
    said: String,
    looked: Option<Instant>,
}

impl Courier {
    /// Has a setup exchange files in this folder.
    ///
    /// # Errors
    /// Those of removing what an earlier setup left there.
    pub(super) fn new(folder: &Path, setup: &mut Command) -> Result<Self, IoError> {
        let machine = read_named(Path::new(MACHINE), MAX_BYTES).unwrap_or_default();
        let this = Self::between(folder.join(layout::NONCE), folder.join(layout::SIGNATURE), &machine);
        for path in [&this.nonce, &this.signature] {
            remove_if_there(path)?;
        }
        setup.arg("--nonce-out").arg(&this.nonce).arg("--signature-in").arg(&this.signature);
        setup.arg("--wait").arg(LONGEST_WAIT.to_string());
        Ok(this)
    }

    /// Carries between these files of a setup and a medium. `machine` is what the firmware says is the machine's UUID; one
    /// that has none has the plain names.
    pub fn between(nonce: PathBuf, signature: PathBuf, machine: &[u8]) -> Self {
        let uuid = Uuid::try_parse_ascii(machine.trim_ascii()).ok().filter(|uuid| !uuid.is_nil());
        let of = |name: &str| uuid.map_or_else(|| name.to_string(), |uuid| format!("{name}-{uuid}"));
        Self {
            nonce,
            signature,
            nonce_name: of(layout::NONCE),
            signature_name: of(layout::SIGNATURE),
            is_out: false,
            seen: Vec::new(),
            said: String::new(),
            looked: None,
        }
    }

    /// Does what there is to do, if it is time to look again. What is in the way, such as a medium that cannot be written, is
    /// said, and may be put right.
    pub(super) fn go(&mut self, say: &dyn Fn(&str)) {
        let is_due = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY);
        if is_due && self.nonce.exists() && !self.signature.exists() {
            let found = media::second(layout::PROVISION_LABEL);
            let text = match found.and_then(|medium| medium.map_or(Ok(None), |medium| self.visit(&medium))) {
                Ok(text) => text,
                Err(error) => Some(format!("mosfs: {error}")),
            };
            if let Some(text) = text.filter(|text| *text != self.said) {
                say(&text);
                self.said = text;
            }
            self.looked = Some(Instant::now());
        }
    }

    /// Puts the nonce onto a medium that is here, or the signature from it to where the setup waits for it. Returns what there
    /// is to say.
    ///
    /// # Errors
    /// Those of the medium.
    pub fn visit(&mut self, medium: &Second) -> Result<Option<String>, SetupError> {
        let (nonce, signature) = (&self.nonce_name, &self.signature_name);
        if !self.is_out {
            // A signature that is there is over an earlier nonce.
            medium.write(nonce, &read_named(&self.nonce, MAX_BYTES)?, signature)?;
            self.is_out = true;
            return Ok(Some(format!(
                "mosfs: /{nonce} is on {device}, which may be taken out now. Where the provisioning key is, run `mosfs floor \
                 sign-provision --nonce {nonce} --key provision.key --output {signature}`, and put the medium in here again. \
                 Leave this machine on: when it starts again, it makes another nonce.",
                device = medium.device.display()
            )));
        }
        let found = medium.read(signature, MAX_BYTES)?.unwrap_or_default();
        if found.is_empty() || found != self.seen {
            self.seen = found;
            return Ok(None);
        }
        atomic::replace(&self.signature, &found, 0o600, "installer.signature")
            .on("write", &self.signature)?;
        Ok(Some(format!("mosfs: /{signature} is on {}", medium.device.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_have_the_name_of_the_machine() {
        let names = |machine: &[u8]| {
            let courier = Courier::between("n".into(), "s".into(), machine);
            (courier.nonce_name, courier.signature_name)
        };
        let uuid = "03000200-0400-0500-0006-000700080009";
        let named = (format!("nonce-{uuid}"), format!("signature-{uuid}"));
        assert_eq!(names(format!("{uuid}\n").as_bytes()), named);
        let plain = ("nonce".to_string(), "signature".to_string());
        for machine in ["", "00000000-0000-0000-0000-000000000000\n", "../../etc/passwd", "Not Settable"] {
            assert_eq!(names(machine.as_bytes()), plain, "{machine}");
        }
        assert_eq!(names(&[0xff; 36]), plain);
    }
}
