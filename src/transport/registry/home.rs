//! Where a user's settings are.

use std::path::PathBuf;

/// `$XDG_CONFIG_HOME`, else `~/.config`.
pub(super) fn config() -> Option<PathBuf> {
    folder("XDG_CONFIG_HOME").or_else(|| Some(own()?.join(".config")))
}

/// `$HOME`. There is none early in a boot and in many units.
pub(super) fn own() -> Option<PathBuf> {
    folder("HOME")
}

/// A folder that a variable of the environment names; a relative path is not one.
pub(super) fn folder(variable: &str) -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os(variable)?);
    path.is_absolute().then_some(path)
}
