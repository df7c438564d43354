//! Platform configuration registers: which banks are active, and extending all of them.

use tss_esapi::tss2_esys as tss;

use super::{NONE, PASSWORD, Tpm, TpmError};

/// `TPM2_CAP_PCRS` (TPM 2.0 part 2, section "TPM_CAP").
const CAP_PCRS: u32 = 0x5;
/// Most banks that a TPM has (`TPM2_NUM_PCR_BANKS`, tss2_tpm2_types.h).
const MAX_BANKS: usize = 16;

/// The hash algorithm of a bank of PCRs (TPM 2.0 part 2, section "TPM_ALG_ID").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BankAlgorithm {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// SM3 with 256 bits.
    Sm3,
}

impl BankAlgorithm {
    /// Number, name, and size of a digest in bytes.
    const TABLE: [(BankAlgorithm, u16, &'static str, usize); 5] = [
        (Self::Sha1, 0x0004, "sha1", 20),
        (Self::Sha256, 0x000b, "sha256", 32),
        (Self::Sha384, 0x000c, "sha384", 48),
        (Self::Sha512, 0x000d, "sha512", 64),
        (Self::Sm3, 0x0012, "sm3", 32),
    ];

    fn row(self) -> (u16, &'static str, usize) {
        let row = Self::TABLE.iter().find(|(algorithm, ..)| *algorithm == self);
        row.map_or((0, "", 0), |&(_, number, name, bytes)| (number, name, bytes))
    }

    fn of_number(number: u16) -> Option<Self> {
        Self::TABLE.iter().find(|(_, known, ..)| *known == number).map(|(algorithm, ..)| *algorithm)
    }

    /// Its name in lower case, which OpenSSL and event logs know it by.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The size of its digests, in bytes.
    pub fn digest_bytes(self) -> usize {
        self.row().2
    }
}

/// What a PCR is extended with in one bank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BankDigest {
    /// The bank.
    pub algorithm: BankAlgorithm,
    /// The digest, of [`BankAlgorithm::digest_bytes`] bytes.
    pub digest: Vec<u8>,
}

impl Tpm {
    /// The banks in which this PCR exists, in the TPM's order.
    ///
    /// # Errors
    /// [`TpmError::Garbled`] where one of them has an algorithm that [`BankAlgorithm`] lacks: a bank that
    /// nobody extends can be extended by anybody later.
    pub fn pcr_banks(&self, pcr: u32) -> Result<Vec<BankAlgorithm>, TpmError> {
        let operation = "list its banks of PCRs";
        let mut more = 0;
        // SAFETY: the closure makes one call of the library, with a live context, that fills the pointer.
        let answer = unsafe {
            self.0.fetch(operation, |library, esys, data| {
                (library.Esys_GetCapability)(esys, NONE, NONE, NONE, CAP_PCRS, 0, 1, &raw mut more, data)
            })
        }?;
        let garbled = |found: String| TpmError::Garbled { tcti: self.0.tcti.clone(), operation, found };
        if answer.capability != CAP_PCRS {
            return Err(garbled(format!("capability {:#x}", answer.capability)));
        }
        // SAFETY: the union's field is the one that `capability` names; it is plain data.
        let list = unsafe { answer.data.assignedPCR };
        let count = usize::try_from(list.count).unwrap_or(usize::MAX);
        let selections =
            list.pcrSelections.get(..count).ok_or_else(|| garbled(format!("{count} banks of PCRs")))?;
        let (byte, bit) = (pcr as usize / 8, 1u8 << (pcr % 8));
        let has = |one: &&tss::TPMS_PCR_SELECTION| {
            let selected = one.pcrSelect.get(..usize::from(one.sizeofSelect)).unwrap_or(&one.pcrSelect);
            selected.get(byte).is_some_and(|bits| bits & bit != 0)
        };
        selections
            .iter()
            .filter(has)
            .map(|one| {
                BankAlgorithm::of_number(one.hash).ok_or_else(|| {
                    garbled(format!("an active bank of the unknown algorithm {:#06x}", one.hash))
                })
            })
            .collect()
    }

    /// Extends a PCR in several banks with one command.
    ///
    /// A bank that does not exist is passed over by the TPM without a word (TPM 2.0 part 3, section
    /// "TPM2_PCR_Extend"): ask for the [banks](Self::pcr_banks) first.
    pub fn pcr_extend(&self, pcr: u32, digests: &[BankDigest]) -> Result<(), TpmError> {
        let operation = "extend a PCR";
        let mut values = tss::TPML_DIGEST_VALUES::default();
        for (slot, one) in values.digests.iter_mut().zip(digests) {
            slot.hashAlg = one.algorithm.row().0;
            // The union's longest member has the bytes of all others at its beginning.
            let mut bytes = [0; 64];
            bytes.iter_mut().zip(&one.digest).for_each(|(to, from)| *to = *from);
            slot.digest = tss::TPMU_HA { sha512: bytes };
            values.count += 1;
        }
        debug_assert!(digests.len() <= MAX_BANKS);
        self.0.call(operation, |library, esys| {
            // SAFETY: the context is live, and `values` outlives the call. The handles of PCRs are
            // their numbers (ESYS_TR_PCR0 is 0); their authorization is the empty password.
            unsafe { (library.Esys_PCR_Extend)(esys, pcr, PASSWORD, NONE, NONE, &raw const values) }
        })
    }
}
