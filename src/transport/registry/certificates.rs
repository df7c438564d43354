//! Private CAs and client certificates, where docker and podman keep them.
//!
//! ```text
//! DIR/HOST[:PORT]/*.crt     CAs, trusted for this registry beside the system's
//! DIR/HOST[:PORT]/*.cert    client certificate; its key is the *.key of the same name
//! ```
//!
//! DIR is `~/.config/containers/certs.d`, `/etc/containers/certs.d`, `/etc/docker/certs.d`: the
//! first that has a folder for the registry. A folder given by the user stands in place of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::RegistryError;
use super::tls::Certificates;
use crate::sorting;
use crate::transport::reference::Host;

/// The certificates for a registry.
///
/// # Errors
/// [`RegistryError::Config`] for a folder that cannot be read, for one that was given and has no certificate, and for a
/// certificate without its key.
pub(super) fn find(host: &Host, given: Option<&Path>) -> Result<Certificates, RegistryError> {
    if let Some(folder) = given {
        let wrong = |why: &str| Err(RegistryError::Config { path: folder.into(), why: why.into() });
        if folder.is_file() {
            return wrong("it is a file; expected a folder with CAs (*.crt)");
        }
        return match read(folder)? {
            // Whoever names one means something by it: `ca.pem` in it would be overlooked.
            Some(found) if found == Certificates::default() => {
                wrong("it has no CA (*.crt) and no client certificate (*.cert and *.key)")
            }
            Some(found) => Ok(found),
            None => wrong("there is no such folder"),
        };
    }
    for dir in folders() {
        if let Some(found) = read(&dir.join(host.to_string()))? {
            return Ok(found);
        }
    }
    Ok(Certificates::default())
}

fn folders() -> impl Iterator<Item = PathBuf> {
    let own = super::home::config().map(|config| config.join("containers/certs.d"));
    own.into_iter().chain(["/etc/containers/certs.d".into(), "/etc/docker/certs.d".into()])
}

fn read(folder: &Path) -> Result<Option<Certificates>, RegistryError> {
    let wrong = |path: &Path, why: String| RegistryError::Config { path: path.to_path_buf(), why };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrong(folder, error.to_string())),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(|error| wrong(folder, error.to_string()))?.path());
    }
    sorting::sort(&mut paths);
    let with = |extension: &str| {
        paths
            .iter()
            .filter(|path| path.extension().is_some_and(|found| found == extension))
            .cloned()
            .collect::<Vec<_>>()
    };
    let authorities = with("crt");
    let mut client = None;
    for certificate in with("cert") {
        let key = certificate.with_extension("key");
        if !paths.contains(&key) {
            return Err(wrong(&certificate, format!("its key {} is missing", key.display())));
        }
        client = client.or(Some((certificate, key)));
    }
    Ok(Some(Certificates { authorities, client }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_certificates() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::parse("h:5000").unwrap();
        for name in ["b.crt", "a.crt", "me.cert", "me.key", "readme.txt"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let found = find(&host, Some(dir.path())).unwrap();
        assert_eq!(found.authorities, [dir.path().join("a.crt"), dir.path().join("b.crt")]);
        assert_eq!(found.client, Some((dir.path().join("me.cert"), dir.path().join("me.key"))));
        fs::remove_file(dir.path().join("me.key")).unwrap();
        let error = find(&host, Some(dir.path())).unwrap_err();
        assert!(error.to_string().contains("me.key is missing"), "{error}");
        let error = |path: &str| find(&host, Some(&dir.path().join(path))).unwrap_err().to_string();
        assert!(error("none").contains("there is no such folder"), "{}", error("none"));
        assert!(error("a.crt").contains("it is a file; expected a folder"), "{}", error("a.crt"));
        fs::create_dir(dir.path().join("other")).unwrap();
        fs::write(dir.path().join("other/ca.pem"), "").unwrap();
        assert!(error("other").contains("it has no CA (*.crt)"), "{}", error("other"));
    }
}
