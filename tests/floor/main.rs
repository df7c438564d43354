//! The floor: its digests, what the TPM enforces, and what happens when somebody tampers with it.
//!
//! All on a real TPM simulator (swtpm), with tpm2-tools as the second opinion.

#[path = "../common/mod.rs"]
mod common;

mod attacks;
mod cli;
mod golden;
mod hostile;
mod proxy;
mod rules;

use std::path::Path;
use std::time::Duration;

use mosfs::internals::floor::signature::{authorize, sign_provision};
use mosfs::internals::floor::{Floor, FloorError, Policy, Tcti, TpmFloor, TpmFloorProblem, sign_version};
use mosfs::internals::trust::p256::{P256PrivateKey, Signature};
use uuid::Uuid;

use common::swtpm::Swtpm;

/// A product.
const PRODUCT: Uuid = Uuid::from_u128(0xde6c_82c5_2e01_4c92_949b_a654_5d30_fc06);
/// Another one.
const OTHER_PRODUCT: Uuid = Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888);
/// Enough for a simulator on a busy machine.
const BUDGET: Duration = Duration::from_secs(300);

/// A floor key, made for these tests.
const FLOOR_KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgt3Zk3v5shsLlhpga
pOo1RVTg2CCMwqh8ekpnuQkg8a2hRANCAATUuOGG9FkZ/Eo+Oj8ymg3lbFEL94Af
8ST8p4gsFA8ftoyAlQPcK1CeiwZ2KhzJwuVk2iGTOXLLWsOSNZuGbsyE
-----END PRIVATE KEY-----
";
/// A provisioning key, made for these tests.
const PROVISION_KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgz+UQlxdaT3kcX3WQ
EDOkABpZaFl+8e60h63RS/nrqvyhRANCAAQhnYbYykC5kj3xiUijwEi9Ii/9ymAX
y2SLn0cJZLkd5xNUE3wMo4kd3Nf1Yb4mOghifgUY3vvNY1ZW5vT8bJPA
-----END PRIVATE KEY-----
";

fn floor_key() -> P256PrivateKey {
    P256PrivateKey::from_pem(FLOOR_KEY.as_bytes(), Path::new("floor.key")).expect("a key")
}

fn provision_key() -> P256PrivateKey {
    P256PrivateKey::from_pem(PROVISION_KEY.as_bytes(), Path::new("provision.key")).expect("a key")
}

fn new_key() -> P256PrivateKey {
    P256PrivateKey::generate().expect("a key")
}

fn policy() -> Policy {
    Policy::new(*floor_key().public(), PRODUCT)
}

fn authorization() -> Signature {
    authorize(&floor_key(), &PRODUCT, provision_key().public()).expect("an authorization")
}

fn signed(version: u64) -> Signature {
    sign_version(&floor_key(), &PRODUCT, version).expect("a signature")
}

fn floor_at(tcti: Tcti) -> TpmFloor {
    TpmFloor::new(policy(), tcti, BUDGET)
}

fn floor(swtpm: &Swtpm) -> TpmFloor {
    floor_at(swtpm.tcti())
}

fn provision(swtpm: &Swtpm) -> Result<(), FloorError> {
    let begun = floor(swtpm).provision(provision_key().public(), &authorization())?;
    let signature = sign_provision(&provision_key(), &begun.message(), Path::new("nonce"))?;
    begun.finish(&signature)
}

/// A TPM whose floor stands at `version`.
fn provisioned(version: u64) -> Swtpm {
    let swtpm = Swtpm::start();
    provision(&swtpm).expect("a provisioned TPM");
    if version > 0 {
        floor(&swtpm).raise(version, &signed(version)).expect("a raised floor");
    }
    swtpm
}

/// The floor as tpm2-tools reads it.
fn second_opinion(swtpm: &Swtpm) -> u64 {
    let bytes = swtpm.tool_ok("tpm2_nvread", &["-C", "0x01500050", "-s", "8", "0x01500050"]);
    u64::from_be_bytes(bytes.try_into().expect("8 bytes"))
}

/// Rule (docs/design.md, flush): every path flushes what it made. A simulator has three slots for each.
fn assert_nothing_left(swtpm: &Swtpm) {
    assert_eq!(swtpm.handles("handles-transient"), [""; 0], "keys left in the TPM");
    assert_eq!(swtpm.handles("handles-loaded-session"), [""; 0], "sessions left in the TPM");
}
