//! The functions of tpm2-tss' enhanced system API (libtss2-esys), loaded when first needed.
//!
//! Most commands never talk to a TPM. Linked in the usual way, libtss2-esys and what it needs would
//! add 0.3 ms to the start of each of them, a fifth of it, and mosfs would not start at all on a host
//! without tpm2-tss. Loaded here, they cost nothing until a TPM is asked for.
//!
//! The signatures are those of the `tss-esapi-sys` bindings: the compiler compares them below.

use std::ffi::CStr;
use std::sync::OnceLock;

use tss_esapi::tss2_esys as tss;
use tss_esapi::tss2_esys::{
    ESYS_CONTEXT, ESYS_TR, TPM2_HANDLE, TPM2B_AUTH, TPM2B_DIGEST, TPM2B_MAX_NV_BUFFER, TPM2B_NAME,
    TPM2B_NONCE, TPM2B_NV_PUBLIC, TPM2B_OPERAND, TPM2B_PUBLIC, TPM2B_SENSITIVE, TPM2B_TIMEOUT,
    TPML_DIGEST_VALUES, TPMS_CAPABILITY_DATA, TPMT_SIGNATURE, TPMT_SYM_DEF, TPMT_TK_AUTH, TPMT_TK_VERIFIED,
    TSS2_ABI_VERSION, TSS2_TCTI_CONTEXT,
};

/// The library's name, with the version of its ABI: the same in Debian 12 and 13.
const NAME: &CStr = c"libtss2-esys.so.0";

macro_rules! functions {
    ($($symbol:ident($($argument:ty),* $(,)?) $(-> $result:ty)?;)*) => {
        /// The functions that mosfs calls.
        #[allow(non_snake_case)]
        pub(super) struct Library {
            $(pub(super) $symbol: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        // Compares each signature with that of the bindings. Nothing uses these constants, so
        // that they make no reference to the symbols, and the linker does not need the library.
        $(const _: unsafe extern "C" fn($($argument),*) $(-> $result)? = tss::$symbol;)*

        impl Library {
            fn open() -> Result<Self, String> {
                // SAFETY: NAME ends with a zero byte. Loading the library runs its and
                // libcrypto's constructors, which need nothing of us. It is never unloaded.
                let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
                if handle.is_null() {
                    return Err(last_error());
                }
                Ok(Self {$($symbol: {
                    let name = concat!(stringify!($symbol), "\0");
                    // SAFETY: the handle is open and the name ends with a zero byte.
                    let address = unsafe { libc::dlsym(handle, name.as_ptr().cast()) };
                    if address.is_null() {
                        return Err(last_error());
                    }
                    // SAFETY: the address is that of the C function of this name, whose
                    // signature is the one of the bindings (compared above).
                    unsafe {
                        std::mem::transmute::<
                            *mut libc::c_void,
                            unsafe extern "C" fn($($argument),*) $(-> $result)?,
                        >(address)
                    }
                },)*})
            }
        }
    };
}

functions! {
    Esys_Initialize(*mut *mut ESYS_CONTEXT, *mut TSS2_TCTI_CONTEXT, *mut TSS2_ABI_VERSION) -> u32;
    Esys_Finalize(*mut *mut ESYS_CONTEXT);
    Esys_Free(*mut libc::c_void);
    Esys_TR_FromTPMPublic(*mut ESYS_CONTEXT, TPM2_HANDLE, ESYS_TR, ESYS_TR, ESYS_TR, *mut ESYS_TR) -> u32;
    Esys_TR_GetName(*mut ESYS_CONTEXT, ESYS_TR, *mut *mut TPM2B_NAME) -> u32;
    Esys_TR_Close(*mut ESYS_CONTEXT, *mut ESYS_TR) -> u32;
    Esys_TRSess_GetNonceTPM(*mut ESYS_CONTEXT, ESYS_TR, *mut *mut TPM2B_NONCE) -> u32;
    Esys_FlushContext(*mut ESYS_CONTEXT, ESYS_TR) -> u32;
    Esys_PCR_Extend(*mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPML_DIGEST_VALUES) -> u32;
    Esys_GetCapability(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, u32, u32, u32, *mut u8, *mut *mut TPMS_CAPABILITY_DATA,
    ) -> u32;
    Esys_NV_ReadPublic(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *mut *mut TPM2B_NV_PUBLIC, *mut *mut TPM2B_NAME,
    ) -> u32;
    Esys_NV_Read(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, u16, u16, *mut *mut TPM2B_MAX_NV_BUFFER,
    ) -> u32;
    Esys_NV_Write(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_MAX_NV_BUFFER, u16,
    ) -> u32;
    Esys_NV_DefineSpace(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_AUTH, *const TPM2B_NV_PUBLIC,
        *mut ESYS_TR,
    ) -> u32;
    Esys_NV_UndefineSpace(*mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR) -> u32;
    Esys_LoadExternal(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_SENSITIVE, *const TPM2B_PUBLIC, ESYS_TR,
        *mut ESYS_TR,
    ) -> u32;
    Esys_VerifySignature(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_DIGEST, *const TPMT_SIGNATURE,
        *mut *mut TPMT_TK_VERIFIED,
    ) -> u32;
    Esys_StartAuthSession(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_NONCE, u8,
        *const TPMT_SYM_DEF, u16, *mut ESYS_TR,
    ) -> u32;
    Esys_PolicyNV(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_OPERAND, u16, u16,
    ) -> u32;
    Esys_PolicyCpHash(*mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_DIGEST) -> u32;
    Esys_PolicyNvWritten(*mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, u8) -> u32;
    Esys_PolicySigned(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_NONCE, *const TPM2B_DIGEST,
        *const TPM2B_NONCE, i32, *const TPMT_SIGNATURE, *mut *mut TPM2B_TIMEOUT, *mut *mut TPMT_TK_AUTH,
    ) -> u32;
    Esys_PolicyAuthorize(
        *mut ESYS_CONTEXT, ESYS_TR, ESYS_TR, ESYS_TR, ESYS_TR, *const TPM2B_DIGEST, *const TPM2B_NONCE,
        *const TPM2B_NAME, *const TPMT_TK_VERIFIED,
    ) -> u32;
}

/// What the dynamic loader says of its last failure.
fn last_error() -> String {
    // SAFETY: dlerror returns null or a string that lives until this thread's next such call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return format!("cannot load {}", NAME.to_string_lossy());
    }
    // SAFETY: as above; it is copied at once.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The library, loaded at the first call; its error is kept as well.
pub(super) fn load() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(Library::open).as_ref().map_err(String::as_str)
}
