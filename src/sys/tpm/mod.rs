//! A TPM 2.0: the commands that the floor and the measurement of a boot need, through tpm2-tss' enhanced system API (ESYS).
//!
//! Typed values and their conversions to the C structures are those of `tss-esapi`; the calls are
//! those of its `tss-esapi-sys`, because `tss_esapi::Context` has no `TPM2_PolicyNV`, keeps its raw context
//! to itself, and cannot bound a call in time.
//!
//! ```text
//! Tpm ──Rc──> Inner { ESYS_CONTEXT, Channel (our TCTI) }
//! Session ──Rc──^   Object ──Rc──^        flushed when dropped, on every path
//! ```
//!
//! Time: a [`Tpm`] has a budget for whatever is done between two calls of [`Tpm::restart_clock`]. A call
//! that would go beyond it fails with [`TpmError::Timeout`], after which the context can only be dropped.
//!
//! Locks: none within the process (a context belongs to one thread). [`Tpm::lock`] keeps other
//! processes of mosfs from raising the same floor meanwhile. A socket to a simulator is exclusive as it is.

mod commands;
mod library;
mod pcr;
mod tcti;

use std::cell::Cell;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tss_esapi::constants::response_code::Tss2ResponseCode;
use tss_esapi::structures::SymmetricDefinition;
use tss_esapi::tss2_esys as tss;

use commands::{build_nv_public, build_public};
use library::Library;
pub use pcr::{BankAlgorithm, BankDigest};
use tcti::{Channel, Failure};

use super::flock::Lock;
pub use tcti::Tcti;

/// `TPM2_RC_RETRY`, `TPM2_RC_NV_RATE`, `TPM2_RC_YIELDED`, `TPM2_RC_TESTING`: the same command may do later
/// (TPM 2.0 part 2, section "TPM_RC", warnings).
const BUSY_CODES: [u32; 4] = [0x922, 0x920, 0x908, 0x90a];
/// How often a command is sent again to a TPM that is busy.
const BUSY_RETRIES: u32 = 8;
/// The pause before the first of them; it doubles each time: 2.5 s in all.
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// `TPM2_ALG_SHA256` (TPM 2.0 part 2, section "TPM_ALG_ID").
const ALG_SHA256: u16 = 0x000b;
/// `TPM2_SE_POLICY`.
const SE_POLICY: u8 = 0x01;
/// No session, no parent.
const NONE: u32 = tss::ESYS_TR_NONE;
/// The session that stands for an empty password.
const PASSWORD: u32 = tss::ESYS_TR_PASSWORD;
/// The owner hierarchy. A ticket of the null hierarchy would be empty, and PolicyAuthorize refuses that.
const OWNER: u32 = tss::ESYS_TR_RH_OWNER;

/// A TPM command that failed.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// There is no TPM there.
    #[error("no TPM answers at {tcti}: {source}")]
    Absent {
        /// Where it was looked for.
        tcti: Tcti,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// tpm2-tss is not installed, or is of another ABI.
    #[error("cannot load the TPM library: {message}")]
    Library {
        /// What the dynamic loader said.
        message: String,
    },
    /// No answer within the budget, or another process holds the TPM.
    #[error("the TPM at {tcti} did not {operation} within {budget:?}")]
    Timeout {
        /// Where the TPM is.
        tcti: Tcti,
        /// What it was asked to do.
        operation: &'static str,
        /// The time limit.
        budget: Duration,
    },
    /// It is still busy after all retries.
    #[error("the TPM at {tcti} is still too busy to {operation} after {tries} tries (response {code:#x})")]
    Busy {
        /// Where the TPM is.
        tcti: Tcti,
        /// What it was asked to do.
        operation: &'static str,
        /// How often it was asked.
        tries: u32,
        /// The last response code.
        code: u32,
    },
    /// The connection broke.
    #[error("the TPM at {tcti} went away while asked to {operation}: {source}")]
    Io {
        /// Where the TPM is.
        tcti: Tcti,
        /// What it was asked to do.
        operation: &'static str,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// Its response is malformed.
    #[error("the TPM at {tcti} was asked to {operation} and answered nonsense: {found}")]
    Garbled {
        /// Where the TPM is.
        tcti: Tcti,
        /// What it was asked to do.
        operation: &'static str,
        /// What is wrong with the answer.
        found: String,
    },
    /// It refused, with a response code (TPM 2.0 part 2, section "TPM_RC").
    #[error("the TPM at {tcti} refused to {operation}: response {code:#x}, {meaning}")]
    Refused {
        /// Where the TPM is.
        tcti: Tcti,
        /// What it was asked to do.
        operation: &'static str,
        /// The response code.
        code: u32,
        /// What the code means.
        meaning: String,
    },
}

impl TpmError {
    /// The TPM's response code, where it was the TPM that refused.
    pub fn code(&self) -> Option<u32> {
        match self {
            TpmError::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// Whether tpm2-tss can be loaded.
///
/// # Errors
/// [`TpmError::Library`] with what the dynamic loader said.
pub fn check_library() -> Result<(), TpmError> {
    let loaded = library::load().map(|_| ());
    loaded.map_err(|message| TpmError::Library { message: message.to_string() })
}

/// Keeps tpm2-tss from writing to stderr what is reported as an error anyway, unless
/// `TSS2_LOG` is set.
///
/// To be called before the process has threads, because it changes the environment.
pub fn silence_library() {
    if std::env::var_os("TSS2_LOG").is_none() {
        // SAFETY: the caller has no other threads yet, so that nobody reads the environment now.
        unsafe { std::env::set_var("TSS2_LOG", "all+none") };
    }
}

/// A P-256 public key, in the form that the TPM loads: sign only, ECDSA with SHA-256, name algorithm SHA-256, no policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicPoint {
    /// The x coordinate, big-endian.
    pub x: [u8; 32],
    /// The y coordinate, big-endian.
    pub y: [u8; 32],
}

/// The public area of an NV index (TPM 2.0 part 2, section "TPMS_NV_PUBLIC"); its name algorithm is SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvArea {
    /// The handle, `0x01......`.
    pub index: u32,
    /// The attributes (`TPMA_NV`).
    pub attributes: u32,
    /// The policy that some attributes refer to; empty where there is none.
    pub policy: Vec<u8>,
    /// The size of the data, in bytes.
    pub bytes: u16,
}

/// What PolicyAuthorize requires: proof that this TPM checked a signature.
pub struct VerifiedTicket(tss::TPMT_TK_VERIFIED);

struct Inner {
    library: &'static Library,
    esys: Cell<*mut tss::ESYS_CONTEXT>,
    /// From `Box::into_raw`; only reached through shared references until `Inner` is dropped.
    channel: *mut Channel,
    tcti: Tcti,
    budget: Duration,
}

/// A connection to a TPM.
pub struct Tpm(Rc<Inner>);

/// A policy session; flushed when dropped.
pub struct Session {
    inner: Rc<Inner>,
    handle: tss::ESYS_TR,
}

/// A key that is loaded into the TPM; flushed when dropped.
pub struct Object {
    inner: Rc<Inner>,
    handle: tss::ESYS_TR,
}

/// An NV index as ESYS knows it; closed when dropped (the index itself stays).
pub struct NvIndex {
    inner: Rc<Inner>,
    handle: tss::ESYS_TR,
}

impl Tpm {
    /// Connects to a TPM; `budget` is the time for this and for what follows, see the module's comment.
    pub fn open(tcti: &Tcti, budget: Duration) -> Result<Self, TpmError> {
        let library =
            library::load().map_err(|message| TpmError::Library { message: message.to_string() })?;
        let deadline = Instant::now() + budget;
        let channel = Channel::connect(tcti, deadline).map_err(|failure| match failure {
            Failure::Io(source) => TpmError::Absent { tcti: tcti.clone(), source },
            Failure::Timeout => {
                TpmError::Timeout { tcti: tcti.clone(), operation: "accept a connection", budget }
            }
            Failure::Garbled(found) => {
                TpmError::Garbled { tcti: tcti.clone(), operation: "accept a connection", found }
            }
        })?;
        let channel = Box::into_raw(Box::new(channel));
        // From here on `inner` frees the channel, and the context where there is one.
        let inner = Inner { library, esys: Cell::new(null_mut()), channel, tcti: tcti.clone(), budget };
        let mut esys = null_mut();
        // SAFETY: the out-pointer is valid; the channel begins with a TCTI table, and lives until
        // `Inner` is dropped, which finalizes the context first.
        let code = unsafe { (library.Esys_Initialize)(&raw mut esys, channel.cast(), null_mut()) };
        inner.esys.set(esys);
        inner.outcome("start a context", code)?;
        Ok(Self(Rc::new(inner)))
    }

    /// Gives the full budget to what follows.
    pub fn restart_clock(&self) {
        self.0.channel().set_deadline(Instant::now() + self.0.budget);
    }

    /// Waits until no other process of mosfs holds this lock file, and holds it.
    ///
    /// The lock is a file of mosfs, because anyone who may open the TPM's device could lock that for ever.
    ///
    /// # Errors
    /// [`TpmError::Timeout`] when the budget is spent; [`TpmError::Io`] where there can be no lock file.
    pub fn lock(&self, path: &Path) -> Result<Lock, TpmError> {
        let operation = "be free of other processes";
        loop {
            match Lock::try_exclusive(path) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) => {}
                Err(source) if source.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TpmError::Io { tcti: self.0.tcti.clone(), operation, source }),
            }
            if self.0.channel().deadline().is_none_or(|deadline| Instant::now() >= deadline) {
                return Err(self.0.timeout(operation));
            }
            std::thread::sleep(BUSY_PAUSE);
        }
    }

    /// Looks up an NV index.
    pub fn nv_index(&self, index: u32) -> Result<NvIndex, TpmError> {
        let mut handle = NONE;
        self.0.call("find an NV index", |library, esys| {
            // SAFETY: the context is live and the out-pointer valid.
            unsafe { (library.Esys_TR_FromTPMPublic)(esys, index, NONE, NONE, NONE, &raw mut handle) }
        })?;
        Ok(NvIndex { inner: self.0.clone(), handle })
    }

    /// Defines an NV index with an empty auth value, under the owner's (empty) authorization.
    pub fn nv_define(&self, area: &NvArea) -> Result<NvIndex, TpmError> {
        let operation = "define an NV index";
        let public = self.0.built(operation, build_nv_public(area))?;
        let auth = tss::TPM2B_AUTH::default();
        let mut handle = NONE;
        self.0.call(operation, |library, esys| {
            // SAFETY: the context is live, and all pointers are to values that outlive the call.
            unsafe {
                (library.Esys_NV_DefineSpace)(
                    esys,
                    OWNER,
                    PASSWORD,
                    NONE,
                    NONE,
                    &raw const auth,
                    &raw const public,
                    &raw mut handle,
                )
            }
        })?;
        Ok(NvIndex { inner: self.0.clone(), handle })
    }

    /// Deletes an NV index, under the owner's (empty) authorization.
    pub fn nv_undefine(&self, index: NvIndex) -> Result<(), TpmError> {
        self.0.call("delete an NV index", |library, esys| {
            // SAFETY: the context is live.
            unsafe { (library.Esys_NV_UndefineSpace)(esys, OWNER, index.handle, PASSWORD, NONE, NONE) }
        })?;
        // ESYS has forgotten the handle with the index.
        let mut index = index;
        index.handle = NONE;
        Ok(())
    }

    /// Loads a public key into the owner hierarchy.
    pub fn load_public(&self, point: &PublicPoint) -> Result<Object, TpmError> {
        let operation = "load a public key";
        let public = self.0.built(operation, build_public(point))?;
        let mut handle = NONE;
        self.0.call(operation, |library, esys| {
            // SAFETY: the context is live; no private part; the pointers are to values that outlive the call.
            unsafe {
                (library.Esys_LoadExternal)(
                    esys,
                    NONE,
                    NONE,
                    NONE,
                    null(),
                    &raw const public,
                    OWNER,
                    &raw mut handle,
                )
            }
        })?;
        Ok(Object { inner: self.0.clone(), handle })
    }

    /// Starts a policy session: unbound, unsalted, SHA-256.
    pub fn policy_session(&self) -> Result<Session, TpmError> {
        let operation = "start a session";
        let symmetric = self.0.built(operation, tss::TPMT_SYM_DEF::try_from(SymmetricDefinition::Null))?;
        let mut handle = NONE;
        self.0.call(operation, |library, esys| {
            // SAFETY: the context is live; a null nonceCaller has ESYS draw one; the other
            // pointers are to values that outlive the call.
            unsafe {
                (library.Esys_StartAuthSession)(
                    esys,
                    NONE,
                    NONE,
                    NONE,
                    NONE,
                    NONE,
                    null(),
                    SE_POLICY,
                    &raw const symmetric,
                    ALG_SHA256,
                    &raw mut handle,
                )
            }
        })?;
        Ok(Session { inner: self.0.clone(), handle })
    }
}

impl Inner {
    fn channel(&self) -> &Channel {
        // SAFETY: the channel lives until `self` is dropped, and nobody makes a unique reference to it.
        unsafe { &*self.channel }
    }

    fn timeout(&self, operation: &'static str) -> TpmError {
        TpmError::Timeout { tcti: self.tcti.clone(), operation, budget: self.budget }
    }

    /// Makes one ESYS call, again while the TPM says that it is busy.
    fn call(
        &self,
        operation: &'static str,
        mut call: impl FnMut(&Library, *mut tss::ESYS_CONTEXT) -> u32,
    ) -> Result<(), TpmError> {
        let mut pause = BUSY_PAUSE;
        for tries in 1.. {
            let code = call(self.library, self.esys.get());
            if !BUSY_CODES.contains(&code) {
                return self.outcome(operation, code);
            }
            let deadline = self.channel().deadline().unwrap_or_else(Instant::now);
            if tries > BUSY_RETRIES || Instant::now() + pause >= deadline {
                return Err(TpmError::Busy { tcti: self.tcti.clone(), operation, tries, code });
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        Ok(())
    }

    /// Turns a return code of the library into our error.
    fn outcome(&self, operation: &'static str, code: u32) -> Result<(), TpmError> {
        let tcti = self.tcti.clone();
        // What our own transport noticed says more than the library's code for it.
        match self.channel().take_failure() {
            Some(Failure::Timeout) => return Err(self.timeout(operation)),
            Some(Failure::Io(source)) => return Err(TpmError::Io { tcti, operation, source }),
            Some(Failure::Garbled(found)) => return Err(TpmError::Garbled { tcti, operation, found }),
            None if code == 0 => return Ok(()),
            None => {}
        }
        let meaning = Tss2ResponseCode::from(code).to_string();
        // A layer (bits 16 and up) means that the library refused what came, not the TPM
        // (tss2_common.h, TSS2_RC_LAYER_MASK).
        if code > 0xffff {
            return Err(TpmError::Garbled { tcti, operation, found: format!("tpm2-tss says {code:#x}") });
        }
        Err(TpmError::Refused { tcti, operation, code, meaning })
    }

    /// What we build ourselves fits; this is for the case that it does not.
    fn built<T>(&self, operation: &'static str, value: tss_esapi::Result<T>) -> Result<T, TpmError> {
        self.parsed(operation, value)
    }

    fn parsed<T>(&self, operation: &'static str, value: tss_esapi::Result<T>) -> Result<T, TpmError> {
        value.map_err(|error| TpmError::Garbled {
            tcti: self.tcti.clone(),
            operation,
            found: error.to_string(),
        })
    }

    /// Copies what the library allocated, and frees it.
    ///
    /// # Safety
    /// The pointer is null, or one that the library gave to its caller to free, and is not used again.
    unsafe fn take<T: Copy>(&self, operation: &'static str, pointer: *mut T) -> Result<T, TpmError> {
        if pointer.is_null() {
            return self.outcome(operation, 0).and_then(|()| {
                let found = "nothing where a value was due".to_string();
                Err(TpmError::Garbled { tcti: self.tcti.clone(), operation, found })
            });
        }
        // SAFETY: not null, and by the caller's word an initialised value of the library's.
        let value = unsafe { *pointer };
        // SAFETY: by the caller's word ours to free, once.
        unsafe { (self.library.Esys_Free)(pointer.cast()) };
        Ok(value)
    }

    /// Makes a call that returns one value which its caller has to free, and returns a copy of the value.
    ///
    /// # Safety
    /// `call` may only let the library put a pointer of that kind into its last argument.
    unsafe fn fetch<T: Copy>(
        &self,
        operation: &'static str,
        mut call: impl FnMut(&Library, *mut tss::ESYS_CONTEXT, *mut *mut T) -> u32,
    ) -> Result<T, TpmError> {
        let mut value = null_mut();
        self.call(operation, |library, esys| call(library, esys, &raw mut value))?;
        // SAFETY: by the caller's word null or ours to free, and this is its only use.
        unsafe { self.take(operation, value) }
    }

    fn flush(&self, handle: tss::ESYS_TR, what: &str) {
        if handle == NONE {
            return;
        }
        // SAFETY: the context is live, and the handle is not used again.
        let code = unsafe { (self.library.Esys_FlushContext)(self.esys.get(), handle) };
        if code != 0 {
            // After a broken connection this cannot work; the kernel's resource manager then
            // flushes what the closed descriptor had.
            log::debug!("{}: cannot flush {what}: {code:#x}", self.tcti);
            self.channel().take_failure();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut esys = self.esys.get();
        if !esys.is_null() {
            // SAFETY: the context came from Esys_Initialize and is finalized once, while the
            // channel that it points to still lives.
            unsafe { (self.library.Esys_Finalize)(&raw mut esys) };
        }
        // SAFETY: from Box::into_raw in `Tpm::open`, freed once; the context that pointed to it is gone.
        drop(unsafe { Box::from_raw(self.channel) });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.inner.flush(self.handle, "a session");
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        self.inner.flush(self.handle, "a key");
    }
}

impl Drop for NvIndex {
    fn drop(&mut self) {
        if self.handle != NONE {
            let mut handle = self.handle;
            // SAFETY: the context is live, and the handle is not used again. No command is sent.
            unsafe { (self.inner.library.Esys_TR_Close)(self.inner.esys.get(), &raw mut handle) };
        }
    }
}
