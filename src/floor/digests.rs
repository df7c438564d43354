//! The floor's digests: pure computation, no TPM.
//!
//! `H` is SHA-256, `Z` is 32 zero bytes, integers are big-endian, `‖` joins. Numbers of commands and
//! algorithms come from the TPM 2.0 library specification, part 2; its part 3 describes, for each policy
//! command, how it extends the digest.
//!
//! ```text
//! Name of a key    000B ‖ H(TPMT_PUBLIC)
//! TPMT_PUBLIC      0023 000B 00040000 0000 0010 0018 000B 0003 0010 0020 x 0020 y
//!                  ECC, SHA-256, sign only, no policy, no cipher, ECDSA with SHA-256, P-256, no KDF
//!                  (what `tpm2_loadexternal -G ecc:ecdsa-sha256 -a sign -u floor.pub` loads)
//! ref              H("mosfs-floor-v1" ‖ 00 ‖ the product's UUID, 16 bytes)
//! authPolicy       H(H(Z ‖ 0000016A ‖ Name_F) ‖ ref)                      PolicyAuthorize
//! Name_u, Name_w   000B ‖ H(01500050 ‖ 000B ‖ attributes ‖ 0020 authPolicy ‖ 0008)
//!                  attributes 02060008 before the first write, 22060008 after it
//! cp(N, V)         H(00000137 ‖ N ‖ N ‖ 0008 V ‖ 0000)                    NV_Write of V
//! bump(V)          H(H(Z ‖ 00000149 ‖ H(V ‖ 0000 ‖ 0005) ‖ Name_w)        PolicyNV, V is greater
//!                    ‖ 0000016E ‖ cp(Name_w, V))                          PolicyCpHash
//! first write      a = H(Z ‖ 0000018F ‖ 00)                               PolicyNvWritten, no
//!                  b = H(H(a ‖ 00000160 ‖ Name_P))                        PolicySigned, empty policyRef
//!                  H(b ‖ 0000016E ‖ cp(Name_u, 0))                        PolicyCpHash
//! signed           the floor key signs H(policy ‖ ref), for a bump and for the first write
//! ```
//!
//! None of this depends on the device: one signature of the floor key serves every device of a product.

use std::fmt;

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::digest::hex;
use crate::trust::p256::P256PublicKey;

/// The handle of the floor's NV index, in the range that the owner assigns (TCG registry of reserved TPM 2.0
/// handles and localities, table "NV indexes").
pub const INDEX: u32 = 0x0150_0050;
/// `TPMA_NV_POLICYWRITE | OWNERREAD | AUTHREAD | NO_DA` (TPM 2.0 part 2, section "TPMA_NV").
pub const ATTRIBUTES: u32 = 0x0206_0008;
/// The same with `TPMA_NV_WRITTEN`, which the TPM sets at the first write.
pub const ATTRIBUTES_WRITTEN: u32 = 0x2206_0008;
/// The size of the index's data, in bytes: one unsigned 64-bit number, big-endian.
pub const DATA_BYTES: u16 = 8;
/// The highest version (docs/design.md, versions); 0 only means provisioned.
pub const MAX_VERSION: u64 = (1 << 53) - 1;

/// `TPM_ALG_SHA256`.
const SHA256: [u8; 2] = [0x00, 0x0b];
const CC_NV_WRITE: [u8; 4] = [0, 0, 0x01, 0x37];
const CC_POLICY_NV: [u8; 4] = [0, 0, 0x01, 0x49];
const CC_POLICY_SIGNED: [u8; 4] = [0, 0, 0x01, 0x60];
const CC_POLICY_AUTHORIZE: [u8; 4] = [0, 0, 0x01, 0x6a];
const CC_POLICY_CP_HASH: [u8; 4] = [0, 0, 0x01, 0x6e];
const CC_POLICY_NV_WRITTEN: [u8; 4] = [0, 0, 0x01, 0x8f];
/// `TPM_EO_UNSIGNED_LT`.
const UNSIGNED_LT: [u8; 2] = [0x00, 0x05];
/// The offset in the index's data of every comparison and write.
const OFFSET: [u8; 2] = [0, 0];

/// H over the concatenated parts.
fn h(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize().into()
}

/// The Name of a key or an index, by which the TPM identifies it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Name([u8; 34]);

impl Name {
    fn of(public_area: &[&[u8]]) -> Self {
        let mut name = [0; 34];
        let (algorithm, digest) = name.split_at_mut(2);
        algorithm.copy_from_slice(&SHA256);
        digest.copy_from_slice(&h(public_area));
        Self(name)
    }

    /// Returns the Name of a key; the module documentation describes its public area.
    pub fn of_key(key: &P256PublicKey) -> Self {
        const HEAD: [u8; 20] = [
            0x00, 0x23, 0x00, 0x0b, 0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x00, 0x18, 0x00, 0x0b,
            0x00, 0x03, 0x00, 0x10,
        ];
        const SIZE: [u8; 2] = [0x00, 0x20];
        Self::of(&[&HEAD, &SIZE, key.x(), &SIZE, key.y()])
    }

    /// Returns the Name of the floor's index with these attributes.
    fn of_index(auth_policy: &[u8; 32], attributes: u32) -> Self {
        Self::of(&[
            &INDEX.to_be_bytes(),
            &SHA256,
            &attributes.to_be_bytes(),
            &[0x00, 0x20],
            auth_policy,
            &DATA_BYTES.to_be_bytes(),
        ])
    }

    /// The 34 bytes.
    pub const fn as_bytes(&self) -> &[u8; 34] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The floor of one product: everything that follows from its floor key and its UUID.
#[derive(Debug, Clone)]
pub struct Policy {
    key: P256PublicKey,
    product: Uuid,
    reference: [u8; 32],
    auth_policy: [u8; 32],
    unwritten: Name,
    written: Name,
}

impl Policy {
    /// The floor of a product.
    pub fn new(key: P256PublicKey, product: Uuid) -> Self {
        let reference = h(&[b"mosfs-floor-v1", &[0], product.as_bytes()]);
        let authorize = h(&[&[0; 32], &CC_POLICY_AUTHORIZE, Name::of_key(&key).as_bytes()]);
        let auth_policy = h(&[&authorize, &reference]);
        Self {
            key,
            product,
            reference,
            auth_policy,
            unwritten: Name::of_index(&auth_policy, ATTRIBUTES),
            written: Name::of_index(&auth_policy, ATTRIBUTES_WRITTEN),
        }
    }

    /// The floor key's public half.
    pub fn key(&self) -> &P256PublicKey {
        &self.key
    }

    /// The product.
    pub fn product(&self) -> Uuid {
        self.product
    }

    /// `ref`: prevents the signatures of one product from working on another's devices.
    pub fn reference(&self) -> &[u8; 32] {
        &self.reference
    }

    /// `authPolicy`: who may write the index.
    pub fn auth_policy(&self) -> &[u8; 32] {
        &self.auth_policy
    }

    /// `Name_u`: the index's Name before the first write.
    pub fn name_unwritten(&self) -> Name {
        self.unwritten
    }

    /// `Name_w`: the index's Name from the first write on.
    pub fn name_written(&self) -> Name {
        self.written
    }

    /// `cp(Name_w, V)`: the parameters of an NV_Write of `version`.
    pub fn write_parameters(&self, version: u64) -> [u8; 32] {
        cp(&self.written, version)
    }

    /// `bump(V)`: the policy under which `version` may be written.
    pub fn bump(&self, version: u64) -> [u8; 32] {
        let operand = h(&[&version.to_be_bytes(), &OFFSET, &UNSIGNED_LT]);
        let compared = h(&[&[0; 32], &CC_POLICY_NV, &operand, self.written.as_bytes()]);
        h(&[&compared, &CC_POLICY_CP_HASH, &self.write_parameters(version)])
    }

    /// `cp(Name_u, 0)`: the parameters of the first write.
    pub fn first_write_parameters(&self) -> [u8; 32] {
        cp(&self.unwritten, 0)
    }

    /// The policy of the first write, by the holder of the provisioning key.
    pub fn first_write(&self, provision_key: &P256PublicKey) -> [u8; 32] {
        let unwritten = h(&[&[0; 32], &CC_POLICY_NV_WRITTEN, &[0]]);
        let key = h(&[&unwritten, &CC_POLICY_SIGNED, Name::of_key(provision_key).as_bytes()]);
        // The policyRef is empty, but still enters the hash.
        let signed = h(&[&key]);
        h(&[&signed, &CC_POLICY_CP_HASH, &self.first_write_parameters()])
    }

    /// What the floor key signs with SHA-256 to allow a policy: `policy ‖ ref`.
    pub fn message(&self, policy: &[u8; 32]) -> Vec<u8> {
        [policy.as_slice(), &self.reference].concat()
    }

    /// The digest of [`message`](Self::message): `H(policy ‖ ref)`.
    pub fn to_sign(&self, policy: &[u8; 32]) -> [u8; 32] {
        h(&[policy, &self.reference])
    }
}

fn cp(name: &Name, version: u64) -> [u8; 32] {
    h(&[
        &CC_NV_WRITE,
        name.as_bytes(),
        name.as_bytes(),
        &DATA_BYTES.to_be_bytes(),
        &version.to_be_bytes(),
        &OFFSET,
    ])
}
