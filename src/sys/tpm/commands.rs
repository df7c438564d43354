//! The commands on what is in the TPM: indexes, keys, sessions; and the structures that they take.

use std::ptr::null_mut;

use tss_esapi::attributes::{NvIndexAttributes, ObjectAttributesBuilder};
use tss_esapi::handles::NvIndexTpmHandle;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::structures::{
    Digest, EccParameter, EccPoint, EccScheme, EccSignature, HashScheme, MaxNvBuffer, Name, Nonce, NvPublic,
    NvPublicBuilder, PublicBuilder, PublicEccParametersBuilder, Signature, VerifiedTicket as Ticket,
};
use tss_esapi::tss2_esys as tss;

use super::{Inner, NONE, NvArea, NvIndex, Object, PASSWORD, PublicPoint, Session, TpmError, VerifiedTicket};

/// `TPM2_EO_UNSIGNED_LT`.
const EO_UNSIGNED_LT: u16 = 0x0005;

impl NvIndex {
    /// The index's Name: the digest of its public area behind the algorithm's number.
    pub fn name(&self) -> Result<Vec<u8>, TpmError> {
        name_of(&self.inner, "return an index's Name", self.handle)
    }

    /// The index's public area, as the TPM reports it.
    pub fn area(&self) -> Result<NvArea, TpmError> {
        let operation = "describe an NV index";
        let (mut public, mut name) = (null_mut(), null_mut());
        self.inner.call(operation, |library, esys| {
            // SAFETY: the context is live and the out-pointers valid.
            unsafe {
                (library.Esys_NV_ReadPublic)(
                    esys,
                    self.handle,
                    NONE,
                    NONE,
                    NONE,
                    &raw mut public,
                    &raw mut name,
                )
            }
        })?;
        // SAFETY: the call succeeded, so that both are ours to free.
        let (public, _) = unsafe { (self.inner.take(operation, public)?, self.inner.take(operation, name)?) };
        let attributes = public.nvPublic.attributes;
        let policy = self.inner.parsed(operation, Digest::try_from(public.nvPublic.authPolicy))?;
        Ok(NvArea {
            index: public.nvPublic.nvIndex,
            attributes,
            policy: policy.value().to_vec(),
            bytes: public.nvPublic.dataSize,
        })
    }

    /// Reads the first `bytes` bytes under the index's own, empty authorization.
    pub fn read(&self, bytes: u16) -> Result<Vec<u8>, TpmError> {
        let operation = "read an NV index";
        let at = self.handle;
        // SAFETY: the closure makes one call of the library, with a live context, that fills the pointer.
        let data = unsafe {
            self.inner.fetch(operation, |library, esys, data| {
                (library.Esys_NV_Read)(esys, at, at, PASSWORD, NONE, NONE, bytes, 0, data)
            })
        }?;
        Ok(self.inner.parsed(operation, MaxNvBuffer::try_from(data))?.value().to_vec())
    }

    /// Writes from the first byte on, authorized by what `session` has proved.
    pub fn write(&self, session: &Session, data: &[u8]) -> Result<(), TpmError> {
        let operation = "write an NV index";
        let data = tss::TPM2B_MAX_NV_BUFFER::from(self.inner.built(operation, MaxNvBuffer::try_from(data))?);
        self.inner.call(operation, |library, esys| {
            // SAFETY: the context is live, and `data` outlives the call.
            unsafe {
                (library.Esys_NV_Write)(
                    esys,
                    self.handle,
                    self.handle,
                    session.handle,
                    NONE,
                    NONE,
                    &raw const data,
                    0,
                )
            }
        })
    }
}

impl Object {
    /// Has the TPM check an ECDSA signature (`r` then `s`, 32 bytes each, big-endian) over a digest.
    pub fn verify(&self, digest: &[u8; 32], signature: &[u8; 64]) -> Result<VerifiedTicket, TpmError> {
        let operation = "check a signature";
        let digest =
            tss::TPM2B_DIGEST::from(self.inner.built(operation, Digest::try_from(digest.as_slice()))?);
        let signature = self.inner.built(operation, build_signature(signature))?;
        let (digest, signature) = (&raw const digest, &raw const signature);
        // SAFETY: as in `NvIndex::read`; and what is pointed to outlives the call.
        let ticket = unsafe {
            self.inner.fetch(operation, |library, esys, ticket| {
                (library.Esys_VerifySignature)(esys, self.handle, NONE, NONE, NONE, digest, signature, ticket)
            })
        }?;
        // Only parsed to have its sizes checked; it goes back as it came.
        self.inner.parsed(operation, Ticket::try_from(ticket))?;
        Ok(VerifiedTicket(ticket))
    }
}

impl Session {
    /// The number that the TPM drew for this session.
    pub fn nonce(&self) -> Result<Vec<u8>, TpmError> {
        let operation = "return a session's nonce";
        // SAFETY: as in `NvIndex::read`.
        let nonce = unsafe {
            self.inner.fetch(operation, |library, esys, nonce| {
                (library.Esys_TRSess_GetNonceTPM)(esys, self.handle, nonce)
            })
        }?;
        Ok(self.inner.parsed(operation, Nonce::try_from(nonce))?.value().to_vec())
    }

    /// TPM2_PolicyNV: proves that the index holds less than `operand`, both unsigned and big-endian.
    pub fn policy_nv_less_than(&self, index: &NvIndex, operand: &[u8]) -> Result<(), TpmError> {
        let operation = "compare an NV index";
        let operand = tss::TPM2B_OPERAND::from(self.inner.built(operation, Digest::try_from(operand))?);
        self.inner.call(operation, |library, esys| {
            // SAFETY: the context is live, and `operand` outlives the call.
            unsafe {
                (library.Esys_PolicyNV)(
                    esys,
                    index.handle,
                    index.handle,
                    self.handle,
                    PASSWORD,
                    NONE,
                    NONE,
                    &raw const operand,
                    0,
                    EO_UNSIGNED_LT,
                )
            }
        })
    }

    /// TPM2_PolicyNvWritten with "no": the index was never written.
    pub fn policy_nv_unwritten(&self) -> Result<(), TpmError> {
        self.inner.call("demand an unwritten index", |library, esys| {
            // SAFETY: the context is live.
            unsafe { (library.Esys_PolicyNvWritten)(esys, self.handle, NONE, NONE, NONE, 0) }
        })
    }

    /// TPM2_PolicyCpHash: only the command with this digest of its parameters.
    pub fn policy_cp_hash(&self, digest: &[u8; 32]) -> Result<(), TpmError> {
        let operation = "bind a session to a command";
        let digest =
            tss::TPM2B_DIGEST::from(self.inner.built(operation, Digest::try_from(digest.as_slice()))?);
        self.inner.call(operation, |library, esys| {
            // SAFETY: the context is live, and `digest` outlives the call.
            unsafe { (library.Esys_PolicyCpHash)(esys, self.handle, NONE, NONE, NONE, &raw const digest) }
        })
    }

    /// TPM2_PolicySigned with this session's nonce, expiration 0, empty policyRef and cpHash.
    pub fn policy_signed(&self, key: &Object, nonce: &[u8], signature: &[u8; 64]) -> Result<(), TpmError> {
        let operation = "take a signature over its nonce";
        let nonce = tss::TPM2B_NONCE::from(self.inner.built(operation, Nonce::try_from(nonce))?);
        let empty = tss::TPM2B_DIGEST::default();
        let signature = self.inner.built(operation, build_signature(signature))?;
        let (mut timeout, mut ticket) = (null_mut(), null_mut());
        self.inner.call(operation, |library, esys| {
            // SAFETY: the context is live, and all pointers are to values that outlive the call.
            unsafe {
                (library.Esys_PolicySigned)(
                    esys,
                    key.handle,
                    self.handle,
                    NONE,
                    NONE,
                    NONE,
                    &raw const nonce,
                    &raw const empty,
                    &raw const empty,
                    0,
                    &raw const signature,
                    &raw mut timeout,
                    &raw mut ticket,
                )
            }
        })?;
        // SAFETY: the call succeeded, so that both are ours to free.
        unsafe {
            self.inner.take(operation, timeout)?;
            self.inner.take(operation, ticket)?;
        }
        Ok(())
    }

    /// TPM2_PolicyAuthorize: what was proved so far is `approved`, and the key with the Name `key`
    /// signed that, as the ticket shows.
    pub fn policy_authorize(
        &self,
        approved: &[u8; 32],
        reference: &[u8; 32],
        key: &[u8],
        ticket: &VerifiedTicket,
    ) -> Result<(), TpmError> {
        let operation = "take an authorized policy";
        let built = |bytes: &[u8]| self.inner.built(operation, Digest::try_from(bytes));
        let approved = tss::TPM2B_DIGEST::from(built(approved)?);
        let reference = tss::TPM2B_NONCE::from(built(reference)?);
        let key = tss::TPM2B_NAME::from(self.inner.built(operation, Name::try_from(key.to_vec()))?);
        self.inner.call(operation, |library, esys| {
            // SAFETY: the context is live, and all pointers are to values that outlive the call.
            unsafe {
                (library.Esys_PolicyAuthorize)(
                    esys,
                    self.handle,
                    NONE,
                    NONE,
                    NONE,
                    &raw const approved,
                    &raw const reference,
                    &raw const key,
                    &raw const ticket.0,
                )
            }
        })
    }
}

/// The Name of an object or index.
fn name_of(inner: &Inner, operation: &'static str, handle: tss::ESYS_TR) -> Result<Vec<u8>, TpmError> {
    // SAFETY: as in `NvIndex::read`.
    let name = unsafe {
        inner.fetch(operation, |library, esys, name| (library.Esys_TR_GetName)(esys, handle, name))
    }?;
    Ok(inner.parsed(operation, Name::try_from(name))?.value().to_vec())
}

pub(super) fn build_nv_public(area: &NvArea) -> tss_esapi::Result<tss::TPM2B_NV_PUBLIC> {
    let public: NvPublic = NvPublicBuilder::new()
        .with_nv_index(NvIndexTpmHandle::new(area.index)?)
        .with_index_name_algorithm(HashingAlgorithm::Sha256)
        .with_index_attributes(NvIndexAttributes::try_from(area.attributes)?)
        .with_index_auth_policy(Digest::try_from(area.policy.as_slice())?)
        .with_data_area_size(usize::from(area.bytes))
        .build()?;
    public.try_into()
}

pub(super) fn build_public(point: &PublicPoint) -> tss_esapi::Result<tss::TPM2B_PUBLIC> {
    let scheme = EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256));
    let public = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(ObjectAttributesBuilder::new().with_sign_encrypt(true).build()?)
        .with_ecc_parameters(
            PublicEccParametersBuilder::new_unrestricted_signing_key(scheme, EccCurve::NistP256).build()?,
        )
        .with_ecc_unique_identifier(EccPoint::new(
            EccParameter::try_from(point.x.as_slice())?,
            EccParameter::try_from(point.y.as_slice())?,
        ))
        .build()?;
    // Its size is worked out when it is marshalled.
    Ok(tss::TPM2B_PUBLIC { size: 0, publicArea: public.into() })
}

pub(super) fn build_signature(signature: &[u8; 64]) -> tss_esapi::Result<tss::TPMT_SIGNATURE> {
    let (r, s) = signature.split_at(32);
    Signature::EcDsa(EccSignature::create(
        HashingAlgorithm::Sha256,
        EccParameter::try_from(r)?,
        EccParameter::try_from(s)?,
    )?)
    .try_into()
}
