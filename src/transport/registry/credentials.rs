//! Who we are to a registry: the files and helpers of podman, skopeo and docker.
//!
//! A file that the user names (`--authfile`, `$REGISTRY_AUTH_FILE`) is the only one. Without it, the
//! first of these that knows the registry:
//!
//! ```text
//! $XDG_RUNTIME_DIR/containers/auth.json    else /run/containers/UID/auth.json     podman login
//! ~/.config/containers/auth.json
//! $DOCKER_CONFIG/config.json               else ~/.docker/config.json             docker login
//! ```
//!
//! In a file, `auths` has the most exact key first: `HOST/a/b`, `HOST/a`, `HOST`. A helper of
//! `credHelpers` for the host, or of `credsStore`, comes before `auths`. A helper is
//! `docker-credential-NAME get`: it has 10 s and 64 KiB, and what it prints is never shown.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::error::RegistryError;
use super::home;
use super::secret::Secret;
use crate::sys::file::{self, Links};
use crate::transport::access::Access;

/// The largest file of credentials, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The most that a helper may print, in bytes.
const MAX_HELPER: u64 = 64 << 10;
/// How long a helper may take.
const HELPER_TIME: Duration = Duration::from_secs(10);
/// Docker Hub's key in files that `docker login` writes.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// What a registry is shown.
pub(super) enum Credential {
    /// User and password.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: Secret,
    },
    /// A refresh token of OAuth 2, for the token service.
    Identity(Secret),
}

/// A credential and where it is from.
pub(super) struct FoundCredential {
    /// The credential, if there is one.
    pub credential: Option<Credential>,
    /// For messages: `credentials of FILE` or `no credentials in FILE, FILE`.
    pub origin: String,
}

/// A file of credentials. Docker's has many more fields.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    identitytoken: Option<String>,
}

/// Checks a file that the user named, before anything is asked: a registry that lets anyone in would never need it, and a
/// wrong name would be found where another one is asked.
///
/// # Errors
/// [`RegistryError::Config`].
pub(super) fn check_named(access: &Access) -> Result<(), RegistryError> {
    let (paths, required) = files(access);
    for path in paths.iter().filter(|_| required) {
        // A pipe is read once, when it is needed.
        let found = path.metadata();
        if found.is_err() || found.is_ok_and(|found| found.is_file()) {
            load(path, required)?;
        }
    }
    Ok(())
}

/// The credential for a repository of a registry.
///
/// # Errors
/// [`RegistryError::Config`] for a file that cannot be read or is not JSON; [`RegistryError::Helper`].
pub(super) fn find(access: &Access, host: &str, repository: &str) -> Result<FoundCredential, RegistryError> {
    let (paths, required) = files(access);
    let mut looked = Vec::new();
    for path in &paths {
        let Some(file) = load(path, required)? else { continue };
        if let Some(credential) = look_up(&file, path, host, repository)? {
            return Ok(FoundCredential {
                credential: Some(credential),
                origin: format!("with the credentials of {}", path.display()),
            });
        }
        looked.push(path.display().to_string());
    }
    let origin = match looked.is_empty() {
        true => "without credentials: there is no file of any".to_string(),
        false => format!("without credentials: there are none for {host} in {}", looked.join(", ")),
    };
    Ok(FoundCredential { credential: None, origin })
}

/// The files to look into, and whether they must be there.
fn files(access: &Access) -> (Vec<PathBuf>, bool) {
    let named = std::env::var_os("REGISTRY_AUTH_FILE").filter(|path| !path.is_empty());
    if let Some(path) = access.auth_file.clone().or(named.map(PathBuf::from)) {
        return (vec![path], true);
    }
    let run = home::folder("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
    let run = run
        .unwrap_or_else(|| format!("/run/containers/{}/auth.json", crate::sys::daemon::real_ids().0).into());
    let docker = home::folder("DOCKER_CONFIG").or_else(|| Some(home::own()?.join(".docker")));
    let paths = [
        Some(run),
        home::config().map(|config| config.join("containers/auth.json")),
        docker.map(|dir| dir.join("config.json")),
    ];
    (paths.into_iter().flatten().collect(), false)
}

fn load(path: &Path, required: bool) -> Result<Option<AuthFile>, RegistryError> {
    let wrong = |why: String| RegistryError::Config { path: path.to_path_buf(), why };
    let read = match required {
        true => file::read_named(path, MAX_FILE).map(Some),
        false => file::find_regular(path, Links::Followed, MAX_FILE),
    };
    let Some(bytes) = read.map_err(|error| wrong(error.source.to_string()))? else { return Ok(None) };
    // What serde would quote of the file may be a password: only the place of the error is said.
    let parsed = serde_json::from_slice(&bytes).map_err(|error| {
        wrong(format!("it is not a file of credentials (line {}, column {})", error.line(), error.column()))
    })?;
    Ok(Some(parsed))
}

fn look_up(
    file: &AuthFile,
    path: &Path,
    host: &str,
    repository: &str,
) -> Result<Option<Credential>, RegistryError> {
    let helper = file.cred_helpers.get(host).or(file.creds_store.as_ref()).filter(|name| !name.is_empty());
    if let Some(name) = helper {
        let server = if is_hub(host) { HUB_KEY } else { host };
        if let Some(found) = ask_helper(name, server)? {
            return Ok(Some(found));
        }
    }
    let Some((key, entry)) = best(&file.auths, host, repository) else { return Ok(None) };
    if let Some(token) = entry.identitytoken.as_deref().filter(|token| !token.is_empty()) {
        return Ok(Some(Credential::Identity(Secret::new(token))));
    }
    let Some(auth) = entry.auth.as_deref().filter(|auth| !auth.is_empty()) else { return Ok(None) };
    let wrong = || RegistryError::Config {
        path: path.to_path_buf(),
        why: format!("the entry `{}` has no `auth` in base64 of USER:PASSWORD", super::text::shown(key)),
    };
    let decoded = openssl::base64::decode_block(auth.trim()).map_err(|_| wrong())?;
    let text = String::from_utf8(decoded).map_err(|_| wrong())?;
    let (user, password) = text.trim_end_matches('\0').split_once(':').ok_or_else(wrong)?;
    Ok(Some(Credential::Basic { user: user.to_string(), password: Secret::new(password) }))
}

/// The most exact key: the longest that is the repository or a folder above it.
fn best<'a>(
    auths: &'a BTreeMap<String, Entry>,
    host: &str,
    repository: &str,
) -> Option<(&'a str, &'a Entry)> {
    let full = format!("{host}/{repository}");
    let mut key = full.as_str();
    loop {
        if let Some((key, entry)) = auths.get_key_value(key) {
            return Some((key, entry));
        }
        match key.rsplit_once('/') {
            Some((shorter, _)) => key = shorter,
            None => break,
        }
    }
    // docker writes URLs: https://HOST/v1/.
    auths.iter().find_map(|(key, entry)| {
        let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"))?;
        let named = rest.split('/').next()?;
        (named == host || is_hub(host) && is_hub(named)).then_some((key.as_str(), entry))
    })
}

/// Whether a host is Docker Hub, by any of its names.
pub(super) fn is_hub(host: &str) -> bool {
    matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io")
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    #[serde(default)]
    username: String,
    secret: String,
}

fn ask_helper(name: &str, server: &str) -> Result<Option<Credential>, RegistryError> {
    let failed = |why: &str| RegistryError::Helper { helper: super::text::shown(name), why: why.to_string() };
    // Rule: the name is one of a program, never a path.
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return Err(failed("its name may hold a-z, 0-9 and hyphens only"));
    }
    let mut child = Command::new(format!("docker-credential-{name}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(&format!("it cannot be run: {error}")))?;
    let begun = Instant::now();
    if let Some(mut input) = child.stdin.take() {
        // One that does not read what it is asked is seen by its answer.
        let _ = input.write_all(server.as_bytes());
    }
    let (send, receive) = mpsc::channel();
    let output = child.stdout.take();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = output.map(|output| output.take(MAX_HELPER + 1).read_to_end(&mut bytes));
        let _ = send.send((bytes, matches!(read, Some(Ok(_)))));
    });
    let answer = receive.recv_timeout(HELPER_TIME);
    let stop = |child: &mut std::process::Child| {
        let _ = child.kill();
        let _ = child.wait();
    };
    let bytes = match answer {
        Ok((bytes, true)) if bytes.len() as u64 <= MAX_HELPER => bytes,
        Ok(_) => {
            stop(&mut child);
            return Err(failed("its answer is too long or cannot be read"));
        }
        Err(_) => {
            stop(&mut child);
            return Err(failed("it did not answer within 10 s"));
        }
    };
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if begun.elapsed() < HELPER_TIME => thread::sleep(Duration::from_millis(5)),
            _ => {
                stop(&mut child);
                return Err(failed("it did not end within 10 s"));
            }
        }
    };
    if !status.success() {
        // The one thing that helpers agree to say for "none".
        let none = String::from_utf8_lossy(&bytes).contains("credentials not found");
        return if none { Ok(None) } else { Err(failed(&format!("it ended with {status}"))) };
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&bytes).map_err(|_| failed("its answer is not the JSON of a helper"))?;
    let secret = Secret::new(&answer.secret);
    Ok(Some(match answer.username.as_str() {
        "<token>" => Credential::Identity(secret),
        user => Credential::Basic { user: user.to_string(), password: secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user_of(json: &str, host: &str, repository: &str) -> Option<String> {
        let file: AuthFile = serde_json::from_str(json).unwrap();
        match look_up(&file, Path::new("f"), host, repository).unwrap()? {
            Credential::Basic { user, .. } => Some(user),
            Credential::Identity(token) => Some(format!("token {}", token.expose())),
        }
    }

    fn auth(user: &str) -> String {
        format!(r#"{{"auth":"{}"}}"#, openssl::base64::encode_block(format!("{user}:pa:ss").as_bytes()))
    }

    #[test]
    fn the_most_exact_key_wins() {
        let json = format!(
            r#"{{"auths":{{"h:5000":{},"h:5000/a/b":{},"h:5000/a":{},"https://other/v1/":{},"{HUB_KEY}":{}}},"HttpHeaders":{{}}}}"#,
            auth("host"),
            auth("b"),
            auth("a"),
            auth("other"),
            auth("hub")
        );
        for (host, repository, user) in [
            ("h:5000", "a/b/c", Some("b")),
            ("h:5000", "a/bc", Some("a")),
            ("h:5000", "x", Some("host")),
            ("h", "a/b", None),
            ("other", "x", Some("other")),
            ("registry-1.docker.io", "library/x", Some("hub")),
            ("docker.io", "library/x", Some("hub")),
        ] {
            assert_eq!(user_of(&json, host, repository).as_deref(), user, "{host}/{repository}");
        }
        let token = r#"{"auths":{"h":{"auth":"eDp5","identitytoken":"t"}}}"#;
        assert_eq!(user_of(token, "h", "r").as_deref(), Some("token t"));
    }

    #[test]
    fn a_file_that_is_wrong_is_named_and_not_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        std::fs::write(&path, r#"{"auths": "hunter2"}"#).unwrap();
        let access = Access { auth_file: Some(path.clone()), ..Access::default() };
        let error = find(&access, "h", "r").err().unwrap().to_string();
        assert!(error.contains("auth.json") && !error.contains("hunter2"), "{error}");
        std::fs::write(&path, r#"{"auths":{"h":{"auth":"aHVudGVyMg=="}}}"#).unwrap();
        let error = find(&access, "h", "r").err().unwrap().to_string();
        assert!(
            error.contains("USER:PASSWORD") && !error.contains("hunter2") && !error.contains("aHVu"),
            "{error}"
        );
        std::fs::remove_file(&path).unwrap();
        assert!(find(&access, "h", "r").is_err(), "a file that was named must be there");
        assert!(check_named(&access).is_err(), "before anything is asked");
        std::fs::write(&path, "{}").unwrap();
        assert!(check_named(&access).is_ok());
    }

    #[test]
    fn a_helper_is_a_name_and_not_a_path() {
        for name in ["../x", "/bin/sh", "a b", "A"] {
            let file = format!(r#"{{"credsStore":"{name}"}}"#);
            let file: AuthFile = serde_json::from_str(&file).unwrap();
            let error = look_up(&file, Path::new("f"), "h", "r").err().unwrap();
            assert!(matches!(error, RegistryError::Helper { .. }), "{error}");
        }
    }
}
