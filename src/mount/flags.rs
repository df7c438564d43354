//! The flags of a mount, as mount(8) has them.

use super::MountError;

/// What a mount does to the file system as a whole, of what `-o` can ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountFlags {
    /// No setuid, setgid and file capabilities.
    pub nosuid: bool,
    /// No device nodes.
    pub nodev: bool,
    /// No programs.
    pub noexec: bool,
    /// All users may enter a mount that an ordinary user made (root's always are open to all, under
    /// [`Access::Checked`]).
    pub allow_other: bool,
    /// The user who mounts and root may enter.
    pub allow_root: bool,
    /// Who may read what.
    pub access: Access,
}

/// Who may read what of a FUSE mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Access {
    /// The kernel compares modes and owners, as on any file system.
    #[default]
    Checked,
    /// Whoever may enter may read everything: the user who mounts, and others only as the flags allow.
    Mounter,
}

impl MountFlags {
    /// For an image that nobody signed: neither setuid programs nor device nodes.
    pub fn untrusted() -> Self {
        Self { nosuid: true, nodev: true, ..Self::default() }
    }

    /// As `MOUNT_ATTR_*` bits (mount_setattr(2)).
    pub fn attributes(&self) -> u64 {
        [
            (self.nosuid, libc::MOUNT_ATTR_NOSUID),
            (self.nodev, libc::MOUNT_ATTR_NODEV),
            (self.noexec, libc::MOUNT_ATTR_NOEXEC),
        ]
        .iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |all, (_, bit)| all | bit)
    }

    /// Takes over a list of options as mount(8) gives it.
    ///
    /// Options for mount(8) and systemd alone (`x-…`, `_netdev`, `nofail` …) are passed over. The
    /// tree is read-only always, so `rw` is refused.
    pub fn apply(&mut self, options: &str) -> Result<(), MountError> {
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option {
                "nosuid" => self.nosuid = true,
                "suid" => self.nosuid = false,
                "nodev" => self.nodev = true,
                "dev" => self.nodev = false,
                "noexec" => self.noexec = true,
                "exec" => self.noexec = false,
                "allow_other" => self.allow_other = true,
                "ro"
                | "defaults"
                | "auto"
                | "noauto"
                | "nofail"
                | "_netdev"
                | "noatime"
                | "relatime"
                | "nodiratime"
                | "default_permissions" => {}
                other if other.starts_with("x-") || other.starts_with("comment=") => {}
                other => return Err(MountError::Option { option: other.to_string() }),
            }
        }
        Ok(())
    }
}
