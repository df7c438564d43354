//! Deployments: install, update, status, commit, boot choice, and no way back.
//!
//! Test names say which rule of the design they hold. The TPM is a real swtpm; the second opinion
//! is tpm2-tools'.

#[path = "../common/pki.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod pki;
#[path = "../common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "../common/swtpm.rs"]
#[allow(dead_code, reason = "the floor's own tests use the rest")]
mod swtpm;

mod crash;
mod device;
mod floor;
mod limits;
mod offers;
mod recover;
mod replace;
mod rules;
mod same;
mod signers;
mod space;
