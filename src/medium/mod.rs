//! Install media.
//!
//! ```text
//! layout.rs   what is where on a medium, and what it is called
//! content.rs  the blobs of one system, and the files of the EFI system partition
//! write.rs    both into a file, through:
//!   iso9660.rs  ISO 9660, boot catalog and partition table
//!   fat.rs      the EFI system partition
//! check.rs    both again, out of a file that nobody vouches for, through:
//!   read.rs     what must be where
//!   view.rs     the blobs
//! ```

mod check;
mod content;
mod error;
pub mod fat;
mod iso9660;
pub mod layout;
pub mod read;
mod view;
mod write;

pub use check::{Checked, NotAsWritten, Problem, check};
pub use error::MediumError;
pub use write::{Extras, Written, check_output, write};
