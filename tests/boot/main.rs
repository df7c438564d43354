//! Boots in a virtual machine: a real Debian, an initramfs of the real generators, a TPM.
//!
//! ```text
//! activation.rs  how long `mosfs activate` takes, for docs/benchmarks.md
//! debian.rs      boots to multi-user on each backend from each generator; updates, failures, rollback
//! figures.rs     how long `mosfs boot` takes, for docs/boot.md
//! hooks.rs       what the generators refuse to make
//! host.rs        `mosfs boot` without a machine
//! refused.rs     what is refused before anything of it runs
//! no_shell.rs    what follows a boot that fails
//! partitions.rs  which disk is taken, and what a boot is measured as, without a machine
//! power.rs       power cuts during update and commit, with a disk that loses its write cache
//! ```
//! Each test prepares a system partition and a TPM on the host with the real commands, boots
//! (tests/vm/run), and reads the serial console. Fixtures: common/device.rs.

#[path = "../common/device.rs"]
mod device;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/nbd.rs"]
mod nbd;
#[allow(dead_code)]
#[path = "../common/publish.rs"]
mod publish;
#[allow(dead_code)]
#[path = "../common/swtpm.rs"]
mod swtpm;

mod activation;
mod debian;
mod figures;
mod hooks;
mod host;
mod no_shell;
mod partitions;
mod power;
mod refused;

/// The generators of initramfs that Debian has.
const INITRAMFS_TOOLS: &str = "initramfs-tools";
const DRACUT: &str = "dracut";
/// The kernel that most boots run.
const KERNEL: &str = "6.12";
/// The oldest one that is supported: Debian 12's own.
const OLD_KERNEL: &str = "6.1";
