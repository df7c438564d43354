//! The programs of the host that run containers.

use std::path::PathBuf;

use super::{Container, RunError};

/// The runtime, and the package of Debian that has it.
pub const RUNTIME: (&str, &str) = ("crun", "crun");
/// The programs that make networks, and their packages.
const OF_NETWORKS: [(&str, &str); 2] = [("ip", "iproute2"), ("nft", "nftables")];

/// A program of the search path, or of where programs of the administrator are.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from));
    folders.into_iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Requires the programs that start a container.
///
/// # Errors
/// [`RunError::NoProgram`] with the first that is missing.
pub fn check(container: &Container) -> Result<(), RunError> {
    let of_networks = if container.is_simple() { &OF_NETWORKS[..] } else { &[] };
    match [RUNTIME].iter().chain(of_networks).find(|(program, _)| find(program).is_none()) {
        None => Ok(()),
        Some((program, package)) => {
            Err(RunError::NoProgram { target: container.name.to_string(), program, package })
        }
    }
}
