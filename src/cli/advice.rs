//! What a user can do about an error. All hints are here, and only [`super::output`] asks for them.

use super::kernel::KernelArgsError;
use super::plain::FileArgsError;
use crate::convert::ConvertError;
use crate::convert::erofs::ErofsError;
use crate::convert::job::IngestError;
use crate::convert::puzzlefs::PuzzlefsError;
use crate::deploy::DeployError;
use crate::deploy::activate::NotActive;
use crate::deploy::booted::BootRecordError;
use crate::deploy::esp::EspError;
use crate::error::{AnyError, Class, Classified};
use crate::floor::{FloorError, TpmFloorProblem};
use crate::image::plain::PlainError;
use crate::image::verity::VerityError;
use crate::manifest::{ImportErrors, SystemError};
use crate::medium::MediumError;
use crate::mount::MountError;
use crate::publish::boot::{BootTargetError, InitramfsError, KernelError};
use crate::publish::build::BuildError;
use crate::publish::keys::GenerateError;
use crate::run::RunError;
use crate::setup::SetupError;
use crate::store::StoreError;
use crate::store::fsck::NotWhole;
use crate::sys::tpm::TpmError;
use crate::transport::TransportError;
#[cfg(feature = "registry")]
use crate::transport::registry::RegistryError;
use crate::trust::pem::SecretInPublic;
use crate::trust::{ConfigError, KeyError, SignError, TrustError};

/// What a user can do about an error, if there is something. The library's errors say what is
/// wrong; only here is it said what to run.
///
/// An error type with advice has a function below and a row here. A type that wraps another one
/// as `#[error(transparent)]` is looked through by its own function, because `source` skips it.
pub(super) fn of(error: &AnyError) -> Option<&'static str> {
    let mut cause = Some(error.inner());
    while let Some(this) = cause {
        let found = None
            .or_else(|| this.downcast_ref().and_then(for_floor))
            .or_else(|| this.downcast_ref().and_then(for_activation))
            .or_else(|| this.downcast_ref().and_then(for_deploy))
            .or_else(|| this.downcast_ref().and_then(for_boot_record))
            .or_else(|| this.downcast_ref().and_then(for_store))
            .or_else(|| this.downcast_ref().and_then(for_transport))
            .or_else(|| this.downcast_ref().and_then(for_secret))
            .or_else(|| this.downcast_ref().and_then(for_not_whole))
            .or_else(|| this.downcast_ref().and_then(for_trust))
            .or_else(|| this.downcast_ref().and_then(for_config))
            .or_else(|| this.downcast_ref().and_then(for_key))
            .or_else(|| this.downcast_ref().and_then(for_generate))
            .or_else(|| this.downcast_ref().and_then(for_sign))
            .or_else(|| this.downcast_ref().and_then(for_system))
            .or_else(|| this.downcast_ref().and_then(for_transport))
            .or_else(|| this.downcast_ref().and_then(for_import))
            .or_else(|| this.downcast_ref().and_then(for_build))
            .or_else(|| this.downcast_ref().and_then(for_esp))
            .or_else(|| this.downcast_ref().and_then(for_kernel_args))
            .or_else(|| this.downcast_ref().and_then(for_file))
            .or_else(|| this.downcast_ref().and_then(for_mount))
            .or_else(|| this.downcast_ref().and_then(for_run))
            .or_else(|| this.downcast_ref().and_then(for_ingest))
            .or_else(|| this.downcast_ref().and_then(for_convert))
            .or_else(|| this.downcast_ref().and_then(for_medium))
            .or_else(|| this.downcast_ref().and_then(for_setup));
        if found.is_some() {
            return found;
        }
        cause = this.source();
    }
    None
}

fn for_setup(error: &SetupError) -> Option<&'static str> {
    Some(match error {
        SetupError::NotNamed => "name the disk with `--disk`, or in the answers file",
        SetupError::NotEmpty { .. } => {
            "if everything on it may be lost, name it with `--wipe DEVICE` as well, or say `wipe: yes` in the answers file"
        }
        SetupError::Several { .. } => {
            "name one with `--disk`, or in the answers file: its path, serial:S or wwn:W"
        }
        SetupError::NoMatch { .. } => {
            "name one with `--disk`; one that is not empty also requires `--wipe DEVICE`, or `wipe: yes` in the answers file"
        }
        SetupError::InUse { .. } => "unmount it and close what uses it, or choose another disk",
        SetupError::NotADisk { .. } => "name the whole disk, such as /dev/sda or /dev/nvme0n1",
        SetupError::NoFloor => {
            "give the provisioning key with `--provision-key`, or `--provision-pub` if it is elsewhere (an install medium \
             takes them from a medium labelled MOSFS-PROVISION), or provision the TPM with `mosfs floor provision` first"
        }
        SetupError::Program { .. } => "install e2fsprogs, which has mke2fs",
        SetupError::Esp(error) => return for_esp(error),
        _ => return None,
    })
}

fn for_medium(error: &MediumError) -> Option<&'static str> {
    Some(match error {
        MediumError::NoKernel { .. } => {
            "`mosfs build --ca` makes the target `boot` from the kernel in the hostfs image, which must have mke2fs \
             (Debian: e2fsprogs)"
        }
        MediumError::Output { found: "a block device", .. } => {
            "write the medium to a file, and copy it to the stick: `dd if=FILE of=DEVICE bs=4M conv=fsync`"
        }
        MediumError::Deploy(error) => return for_deploy(error),
        MediumError::Store(error) => return for_store(error),
        MediumError::Transport(error) => return for_transport(error),
        MediumError::Secret(error) => return for_secret(error),
        _ => return None,
    })
}

fn for_esp(error: &EspError) -> Option<&'static str> {
    match error {
        EspError::NoSpace { .. } => Some(
            "remove files that are no longer needed from EFI/Linux, or use a larger EFI system partition",
        ),
        EspError::None { .. } => Some("mount the EFI system partition, and name it with `--esp DIR`"),
        _ => None,
    }
}

fn for_kernel_args(error: &KernelArgsError) -> Option<&'static str> {
    matches!(error, KernelArgsError::NoFloorKey).then_some("add `--floor-key` or `--floor-pub`")
}

fn for_build(error: &BuildError) -> Option<&'static str> {
    match error {
        BuildError::Boot(BootTargetError::Kernel(
            KernelError::Several { .. } | KernelError::NotThere { .. },
        )) => Some("`--kernel RELEASE` selects one"),
        BuildError::Boot(BootTargetError::Initramfs(InitramfsError::NoProgram { .. })) => {
            Some("install mosfs in the hostfs image, as a package or with `make install`")
        }
        BuildError::Boot(BootTargetError::Missing { .. }) => {
            Some("install systemd's stub and boot loader in the hostfs image (Debian: systemd-boot-efi)")
        }
        BuildError::NoMedium { .. } => {
            Some("name the file with `--iso`, or remove `image_type` to build the system alone")
        }
        BuildError::NoIpv6 { .. } => {
            Some("remove `ipv6` from the target, or use `network: {type: host}` to have the host's addresses")
        }
        _ => None,
    }
}

fn for_run(error: &RunError) -> Option<&'static str> {
    match error {
        RunError::NoIdMap { .. } => Some(
            "run mosfs activate: before Linux 6.12, it mounts images with other ids for containers. A volume requires a \
             file system whose ids the kernel maps, such as ext4, xfs or btrfs",
        ),
        RunError::NotMounted { .. } => Some("run mosfs activate"),
        RunError::NotRunning { .. } => Some(
            "`mosfs ps` shows how it has ended, `mosfs logs NAME` what it has written; `mosfs activate` starts it",
        ),
        RunError::Running { .. } => Some("`mosfs exec NAME -- COMMAND` runs a command in it"),
        RunError::VolumeOwner { .. } => Some(
            "change the owner of what is in it (chown -R): files of volumes have the ids that the container sees, not \
             those of the host",
        ),
        RunError::Destination { .. } => Some(
            "name another place in `destination`, or another `source`; one is a file, the other a folder",
        ),
        RunError::NoProgram { .. } => {
            Some("install the package on the device; the system's image must have it")
        }
        RunError::NoFolder { .. } => {
            Some("build the image with a plain, empty folder there, or with nothing")
        }
        RunError::NoCommand { .. } => Some(
            "write `run: {command: [PROGRAM, ARGUMENT...]}` for the target, or give its image an Entrypoint",
        ),
        _ => None,
    }
}

fn for_ingest(error: &IngestError) -> Option<&'static str> {
    match error {
        IngestError::Puzzlefs(PuzzlefsError::TooLarge { .. } | PuzzlefsError::Metadata { .. }) => {
            Some("split the target, or use squashfs: `storage_type: atomfs`")
        }
        _ => None,
    }
}

fn for_convert(error: &ConvertError) -> Option<&'static str> {
    let ConvertError::Erofs(error) = error else { return None };
    match error {
        ErofsError::Program(_) | ErofsError::Version { .. } => Some(
            "install erofs-utils 1.8 or newer (Debian 13 has 1.8.6), or pack squashfs layers: `--layer-format squashfs`, \
             `layer: {format: squashfs}`",
        ),
        ErofsError::Differs { .. } => {
            Some("this version of mkfs.erofs has a fault: take another one, or pack squashfs layers")
        }
        _ => None,
    }
}

fn for_store(error: &StoreError) -> Option<&'static str> {
    match error {
        StoreError::Transport(error) => for_transport(error),
        _ => None,
    }
}

fn for_transport(error: &TransportError) -> Option<&'static str> {
    match error {
        TransportError::WrongPlatform { .. } => {
            Some("`mosfs build --platform OS/ARCH` builds for other machines")
        }
        #[cfg(feature = "registry")]
        TransportError::Registry(error) => for_registry(error),
        _ => None,
    }
}

#[cfg(feature = "registry")]
fn for_registry(error: &RegistryError) -> Option<&'static str> {
    Some(match error {
        RegistryError::Denied { .. } => {
            "log in with `podman login` or `docker login`, or give --authfile (docs/registries.md, credentials)"
        }
        RegistryError::Tls { why, .. } if why.contains("plain HTTP") => {
            "give --plain-http if you trust the network in between (docs/registries.md, certificates)"
        }
        // As a server of HTTPS answers plain HTTP.
        RegistryError::Status { status: 400, request, .. } if request.contains(" http://") => {
            "if this server speaks HTTPS, put its CA into certs.d, or give --cert-dir (docs/registries.md, certificates)"
        }
        RegistryError::Tls { .. } => {
            "put the registry's CA, a file *.crt, into certs.d, or give --cert-dir (docs/registries.md, certificates)"
        }
        RegistryError::Network { unreachable: true, .. } => {
            "check the address, and the variables that name a proxy; then run the command again: what was received is kept"
        }
        RegistryError::Network { .. } | RegistryError::Stalled { .. } => {
            "run the command again: what was received is kept"
        }
        _ => return None,
    })
}

fn for_trust(error: &TrustError) -> Option<&'static str> {
    Some(match error {
        TrustError::Expired { .. } => {
            "ask the publisher for a system signed with a renewed certificate, or check this machine's clock"
        }
        TrustError::NotYetValid { .. } => "check this machine's clock",
        TrustError::IncompleteChain { .. } => {
            "append the certificates between the signer and the CA to the certificate file"
        }
        TrustError::SelfSigned { .. } | TrustError::UntrustedCertificate { .. } => {
            "do not install this system unless its publisher confirms the certificate"
        }
        TrustError::OtherProduct { .. } | TrustError::ManifestOtherProduct { .. } => {
            "this system was made for other devices"
        }
        TrustError::BadSignature { .. } => {
            "fetch the system again; if it fails again, its bytes were changed after signing"
        }
        TrustError::Revoked { .. } => {
            "install a system that is signed with another key: this one was taken back (docs/keys.md)"
        }
        TrustError::PrivateKey { .. } => {
            "give a file with certificates only; if the other one was published, replace the key (docs/keys.md)"
        }
        TrustError::TruncatedSignature { .. } | TrustError::UnreadableCertificate { .. } => {
            "fetch the file again"
        }
        _ => return None,
    })
}

fn for_deploy(error: &DeployError) -> Option<&'static str> {
    Some(match error {
        DeployError::Trust(error) => return for_trust(error),
        DeployError::Transport(error) => return for_transport(error),
        DeployError::Store(error) => return for_store(error),
        DeployError::Esp(error) => return for_esp(error),
        DeployError::VersionElsewhere { .. } => "build the other system with a higher version",
        DeployError::Floor(error) => return for_floor(error),
        DeployError::NothingInstalled { .. } => "run `mosfs install` first, or give --system",
        DeployError::Locked { .. } => "let the other process finish, or end it; `--wait` waits longer",
        DeployError::NoSuchTarget { .. } => {
            "if a newer version has it, that one is pending: it runs after the next boot (`mosfs status`)"
        }
        DeployError::AlreadyInstalled { .. } => "run `mosfs update` for the next version",
        DeployError::SameVersionOtherDigest { .. } => "build the other system with a higher version",
        DeployError::NoSpace { .. } => {
            "free space on this file system: mosfs has removed what it no longer needs; nothing was fetched"
        }
        DeployError::MissingBlob { .. } => "run `mosfs repair SOURCE` with a source that has this system",
        DeployError::Damaged { .. } => "run `mosfs repair`, or `mosfs repair SOURCE`; all else was done",
        DeployError::NotMended { .. } => "run `mosfs repair SOURCE` with a source that has this system",
        DeployError::OtherThanNamed { .. } => {
            "leave out the name to take the highest version that verifies; the source's index was changed"
        }
        DeployError::BootUnknown { .. } => {
            "run it in the system that mosfs has started; for a machine that mosfs never starts there is --unbooted"
        }
        DeployError::StillFetching { .. } => {
            "`mosfs update --finish` fetches the rest; `mosfs status` shows how much of it is here"
        }
        DeployError::NoSource { .. } => {
            "name it: `mosfs activate --lazy --from docker://…`, or `mosfs update docker://…`"
        }
        DeployError::NoTriesLeft { .. } => "`mosfs update --again SOURCE` tries it once more",
        DeployError::NotSigned { .. } => {
            "copy the whole system: its signature and certificate are artifacts of their own"
        }
        DeployError::BootRecord(error) => return for_boot_record(error),
        _ => return None,
    })
}

fn for_boot_record(error: &BootRecordError) -> Option<&'static str> {
    match error {
        BootRecordError::Malformed { .. } => Some("`mosfs boot` writes it at each boot: restart the machine"),
        BootRecordError::Io(_) => None,
    }
}

fn for_secret(_: &SecretInPublic) -> Option<&'static str> {
    Some("give a file with public data only; if the other one was published, replace the key (docs/keys.md)")
}

fn for_not_whole(_: &NotWhole) -> Option<&'static str> {
    Some(
        "on a device, `mosfs repair` restores what it can from the device itself, and `mosfs repair SOURCE` fetches the rest",
    )
}

fn for_config(error: &ConfigError) -> Option<&'static str> {
    Some(match error {
        ConfigError::Missing { .. } => {
            "give --ca and --product to `mosfs install`, or --config if the configuration is elsewhere"
        }
        ConfigError::OtherCa { .. } | ConfigError::OtherProduct { .. } => {
            "leave out --ca and --product to use what this device trusts"
        }
        ConfigError::OtherFloorKey { .. } => "a device keeps its floor key; name the recorded one",
        ConfigError::Secret(error) => return for_secret(error),
        ConfigError::Key(error) => return for_key(error),
        ConfigError::BadCrl { .. } => "write it with `openssl ca -gencrl`, signed by the CA (docs/keys.md)",
        _ => return None,
    })
}

fn for_key(error: &KeyError) -> Option<&'static str> {
    Some(match error {
        KeyError::OpenToOthers { .. } => "run `chmod 600` on it, and consider whether someone has read it",
        KeyError::Unsupported { .. } => "make a key with `mosfs keys generate`",
        KeyError::Unusable { .. } => "make the floor's keys with `mosfs keys generate`",
        KeyError::Secret(error) => return for_secret(error),
        _ => return None,
    })
}

fn for_generate(error: &GenerateError) -> Option<&'static str> {
    match error {
        GenerateError::Exists { .. } => Some("choose another folder"),
        _ => None,
    }
}

fn for_sign(error: &SignError) -> Option<&'static str> {
    match error {
        SignError::KeyMismatch { .. } => Some("give --key and --cert of the same signer"),
        SignError::Certificate(error) => for_trust(error),
        SignError::Key(error) => for_key(error),
    }
}

fn for_system(error: &SystemError) -> Option<&'static str> {
    match error {
        SystemError::NotCanonical { .. } => Some("`mosfs manifest canonical FILE` prints the canonical form"),
        _ => None,
    }
}

fn for_file(error: &FileArgsError) -> Option<&'static str> {
    match error {
        FileArgsError::NoRootHash { .. } => Some(
            "give --root-hash, which `veritysetup format` prints, or mount it unverified with --unsafe-no-verity",
        ),
        FileArgsError::Target { .. } => {
            Some("a bare name is that of a target; to mount the file of that name, write `./` before it")
        }
        _ => None,
    }
}

fn for_mount(error: &MountError) -> Option<&'static str> {
    let MountError::File(PlainError::Verity { source, .. }) = error else { return None };
    match source {
        VerityError::Missing { .. } => {
            Some("if the hash tree is elsewhere, give --hash-file or --hash-offset")
        }
        VerityError::Superblock { .. } => Some(
            "make the hash tree with `veritysetup format`: SHA-256, blocks of 4096 bytes, with a superblock",
        ),
        _ => None,
    }
}

fn for_import(errors: &ImportErrors) -> Option<&'static str> {
    (errors.class() == Class::Verification)
        .then_some("the image there is not the pinned one; inspect it before you change the pin")
}

/// What to do where the floor was not raised.
const RAISE_AGAIN: &str = "run `mosfs commit` again; if it still fails, something else writes to this TPM";

/// What to do about an error of the floor.
fn for_floor(error: &FloorError) -> Option<&'static str> {
    Some(match error {
        FloorError::Tpm(error) => return for_tpm(error),
        FloorError::InTpm { problem, .. } => for_tpm_floor(problem),
        FloorError::Rollback { .. } => "install a version that is not below the floor",
        FloorError::NotNewer { .. } => "build the update with a higher version",
        FloorError::RaiseRefused { .. } => RAISE_AGAIN,
        FloorError::BadFloorSignature { .. } | FloorError::NoFloorSignature { .. } => {
            "sign the version with `mosfs floor sign`, or build with --floor-key, with this product's floor key"
        }
        FloorError::BadProvisionSignature => {
            "sign the nonce of this run with `mosfs floor sign-provision`; a signature over an earlier nonce is refused"
        }
        FloorError::FirstWriteNotAuthorized { .. } => {
            "append the output of `mosfs floor authorize` (made with the floor key) to the provisioning key's file, \
             or give it with --authorization"
        }
        FloorError::AlreadyProvisioned { .. } => {
            "there is nothing to do; `mosfs floor show` prints the floor"
        }
        FloorError::NotConfigured { .. } => {
            "name it once with `mosfs floor provision --floor-pub F --product UUID`"
        }
        FloorError::FileTampered { .. } => "delete the file: it is a development floor",
        FloorError::Config(error) => return for_config(error),
        FloorError::Key(error) => return for_key(error),
        FloorError::VersionRange { .. } | FloorError::Io(_) => return None,
    })
}

/// What to do about a TPM that did not do what it was asked to do.
fn for_tpm(error: &TpmError) -> Option<&'static str> {
    Some(match error {
        TpmError::Absent { .. } => {
            "load the TPM's driver or name the TPM with --tpm; a development machine may use --floor file"
        }
        TpmError::Library { .. } => {
            "install libtss2-esys-3.0.2-0 (tpm2-tss); an initramfs must carry libtss2-esys.so.0"
        }
        TpmError::Timeout { .. } | TpmError::Busy { .. } => {
            "try again; see who uses the TPM (fuser /dev/tpmrm0), or allow more with --tpm-timeout"
        }
        _ => return None,
    })
}

/// What to do about a floor in a TPM that cannot be used.
fn for_tpm_floor(problem: &TpmFloorProblem) -> &'static str {
    match problem {
        TpmFloorProblem::NotProvisioned => {
            "provision the device with `mosfs floor provision`; if it had a floor, its TPM has been cleared"
        }
        TpmFloorProblem::ProvisionIncomplete => {
            "run `mosfs floor provision` again; if the device had a floor, it has been deleted"
        }
        TpmFloorProblem::IndexTampered { .. } => {
            "this is not the floor that the factory made, or CONFIG names another floor key or product: \
             inspect the device before it is trusted again (docs/floor.md, \"Recovery\")"
        }
        TpmFloorProblem::NotRaised { .. } => RAISE_AGAIN,
        TpmFloorProblem::PolicyMismatch { .. } => {
            "the TPM disagrees with the floor's digests: report this with the TPM's model"
        }
        TpmFloorProblem::NvFull => {
            "free an NV index with tpm2_nvundefine (tpm2_getcap handles-nv-index lists them)"
        }
        TpmFloorProblem::OwnerAuthNeeded => {
            "clear the owner's authorization while provisioning: tpm2_changeauth -c owner -p OLD"
        }
    }
}

/// What a user can do about targets that are not active.
fn for_activation(error: &NotActive) -> Option<&'static str> {
    error.only_busy.then_some(
        "stop the processes that use it, then run `mosfs activate` again; they were not interrupted",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_too_large_for_puzzlefs_has_another_way() {
        let source = PuzzlefsError::TooLarge { chunks: 26_000, max_bytes: 4 << 20 }.into();
        let target = "hostfs".parse().unwrap();
        let error = AnyError::from(BuildError::Image { target, source });
        assert_eq!(error.class(), Class::Input);
        let text = error.to_string();
        assert!(text.starts_with("target `hostfs`: ") && text.contains("4194304 bytes"), "{text}");
        assert_eq!(of(&error), Some("split the target, or use squashfs: `storage_type: atomfs`"));
    }
}
