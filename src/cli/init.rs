//! mosfs as the first process of its own initramfs ([`crate::boot::init`]): prints what it says.

use super::output;
use crate::boot::init;
use crate::error::AnyError;

/// Starts the system of this machine. It does not return.
pub(super) fn main() -> ! {
    let error = init::run(&|text| output::note(text));
    output::report(&AnyError::from(error));
    init::fail(&|text| output::message(text))
}
