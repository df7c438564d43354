//! `registries.conf` of podman, skopeo and docker's neighbours: mirrors, other names, blocked registries.
//!
//! ```toml
//! [[registry]]
//! prefix = "registry.example.org/team"     # or *.example.org; without one, location
//! location = "internal.example.org/team"   # where it really is; without one, prefix
//! insecure = true                          # plain http; never: unverified TLS
//! blocked = true
//! [[registry.mirror]]                      # tried in this order before the registry
//! location = "mirror.local:5000/team"
//! insecure = true
//! pull-from-mirror = "digest-only"         # all (default), digest-only, tag-only
//! ```
//!
//! Read from `$CONTAINERS_REGISTRIES_CONF`; else the user's `~/.config/containers/registries.conf`,
//! else `/etc/containers/registries.conf`; then `registries.conf.d/*.conf` beside that file.
//! Of several prefixes the longest counts. Short names and what else is in the file mean nothing here.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::RegistryError;
use super::home;
use super::url::Origin;
use crate::sorting;
use crate::sys::file::{self, Links};
use crate::transport::reference::{Host, is_repository};

/// The largest file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Which of a mirror's manifests are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
enum PullFrom {
    #[default]
    All,
    DigestOnly,
    TagOnly,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    pull_from_mirror: PullFrom,
}

#[derive(Debug, Clone, Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
struct Row {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirror_by_digest_only: bool,
    mirror: Vec<Mirror>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
struct File {
    registry: Vec<Row>,
}

/// All rows, of all files.
#[derive(Debug, Default)]
pub(super) struct Settings {
    rows: Vec<Row>,
}

/// A server that holds a repository: the registry itself, or a mirror of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// Where the server is.
    pub origin: Origin,
    /// What the repository is called there.
    pub repository: String,
    /// Whether tags may be asked for.
    pub by_tag: bool,
    /// Whether digests may be asked for.
    pub by_digest: bool,
}

impl Settings {
    /// Reads the files of this machine and user.
    ///
    /// # Errors
    /// [`RegistryError::Config`] for a file that is not TOML of this kind: a mirror or a block that is
    /// overlooked would be worse.
    pub(super) fn load() -> Result<Self, RegistryError> {
        let named = std::env::var_os("CONTAINERS_REGISTRIES_CONF").filter(|path| !path.is_empty());
        let main = match named {
            Some(path) => PathBuf::from(path),
            None => home::config()
                .map(|config| config.join("containers/registries.conf"))
                .filter(|path| path.exists())
                .unwrap_or_else(|| "/etc/containers/registries.conf".into()),
        };
        let mut folder = main.clone().into_os_string();
        folder.push(".d");
        let mut more = Vec::new();
        if let Ok(entries) = fs::read_dir(&folder) {
            more.extend(entries.flatten().map(|entry| entry.path()));
        }
        more.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
        sorting::sort(&mut more);
        let mut settings = Self::default();
        for path in std::iter::once(main).chain(more) {
            match file::find_regular(&path, Links::Followed, MAX_FILE) {
                Ok(Some(bytes)) => settings.add(&path, &bytes)?,
                Ok(None) => {}
                Err(error) => return Err(RegistryError::Config { path, why: error.source.to_string() }),
            }
        }
        Ok(settings)
    }

    /// Adds a file's rows; a row replaces an earlier one of the same prefix.
    fn add(&mut self, path: &Path, bytes: &[u8]) -> Result<(), RegistryError> {
        let wrong = |why: String| RegistryError::Config { path: path.to_path_buf(), why };
        let text = std::str::from_utf8(bytes).map_err(|_| wrong("it is not UTF-8".into()))?;
        let file: File =
            toml::from_str(text).map_err(|error| wrong(error.to_string().trim().replace('\n', " ")))?;
        for mut row in file.registry {
            if row.prefix.is_empty() {
                row.prefix = row.location.clone();
            }
            let wildcard = row.prefix.starts_with("*.");
            if row.location.is_empty() && !wildcard {
                row.location = row.prefix.clone();
            }
            let locations = row.mirror.iter().map(|mirror| &mirror.location);
            let named = Some(&row.location).filter(|location| !location.is_empty());
            for location in named.into_iter().chain(locations) {
                split(location)
                    .ok_or_else(|| wrong(format!("`{location}` is not a location HOST[:PORT][/NAME]")))?;
            }
            self.rows.retain(|known| known.prefix != row.prefix);
            self.rows.push(row);
        }
        Ok(())
    }

    /// The servers that hold a repository: mirrors in their order, then the registry.
    ///
    /// `plain` is whether the user said that the registry speaks plain http, `known` whether there are
    /// certificates for a host of this machine. Rule: plain http only by the user's or the
    /// administrator's word, or for this machine itself where nobody gave it a certificate.
    ///
    /// # Errors
    /// [`RegistryError::Blocked`].
    pub(super) fn endpoints(
        &self,
        host: &Host,
        repository: &str,
        plain: bool,
        known: &dyn Fn(&Host) -> bool,
    ) -> Result<Vec<Endpoint>, RegistryError> {
        let name = format!("{host}/{repository}");
        let row = self.rows.iter().filter(|row| matches(&row.prefix, host, &name));
        let row = row.max_by_key(|row| row.prefix.len()).cloned().unwrap_or_default();
        if row.blocked {
            return Err(RegistryError::Blocked { host: host.to_string() });
        }
        let endpoint = |host: &Host, repository: String, insecure: bool, from: PullFrom| {
            let host = hub(host);
            let https = !(insecure || host.is_loopback() && !known(&host));
            Endpoint {
                origin: Origin::new(https, &host),
                repository,
                by_tag: from != PullFrom::DigestOnly,
                by_digest: from != PullFrom::TagOnly,
            }
        };
        // What follows the prefix stays; of a wildcard nothing but the host matched.
        let rest = match row.prefix.starts_with("*.") || row.prefix.is_empty() {
            true => name.split_once('/').map(|(_, path)| format!("/{path}")).unwrap_or_default(),
            false => name.strip_prefix(row.prefix.as_str()).unwrap_or_default().to_string(),
        };
        let at = |location: &str, insecure: bool, from: PullFrom| {
            let (host, path) = split(location)?;
            let joined = format!("{path}{rest}");
            Some(endpoint(&host, joined.trim_matches('/').to_string(), insecure, from))
        };
        let mut endpoints = Vec::new();
        for mirror in &row.mirror {
            let from = if row.mirror_by_digest_only { PullFrom::DigestOnly } else { mirror.pull_from_mirror };
            endpoints.extend(at(&mirror.location, mirror.insecure, from));
        }
        let insecure = plain || row.insecure;
        endpoints.push(match at(&row.location, insecure, PullFrom::All) {
            Some(endpoint) if !row.location.is_empty() => endpoint,
            _ => endpoint(host, repository.to_string(), insecure, PullFrom::All),
        });
        Ok(endpoints)
    }
}

/// Docker Hub's registry is on another host than its name says.
fn hub(host: &Host) -> Host {
    match host.name.as_str() {
        "docker.io" | "index.docker.io" => Host { name: "registry-1.docker.io".into(), port: host.port },
        _ => host.clone(),
    }
}

/// Whether a row's prefix is about this repository.
fn matches(prefix: &str, host: &Host, name: &str) -> bool {
    match prefix.strip_prefix('*') {
        Some(domain) => domain.len() > 1 && host.name.ends_with(domain),
        None => name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
    }
}

/// `HOST[:PORT][/NAME]`; the path with its slash.
fn split(location: &str) -> Option<(Host, &str)> {
    let at = location.find('/').unwrap_or(location.len());
    let (host, path) = location.split_at(at);
    let host = Host::parse(host)?;
    (path.is_empty() || is_repository(&path[1..])).then_some((host, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(text: &str, host: &str, repository: &str) -> Vec<String> {
        let mut settings = Settings::default();
        settings.add(Path::new("f"), text.as_bytes()).unwrap();
        let host = Host::parse(host).unwrap();
        let endpoints = settings.endpoints(&host, repository, false, &|_| false).unwrap();
        endpoints.iter().map(|one| format!("{}/{}", one.origin, one.repository)).collect()
    }

    #[test]
    fn mirrors_come_first_and_in_order() {
        let text = r#"
            unqualified-search-registries = ["docker.io"]
            [[registry]]
            prefix = "r.example.org/team"
            location = "inner.example.org:8443/deep"
            [[registry.mirror]]
            location = "127.0.0.1:5000/cache"
            [[registry.mirror]]
            location = "m.example.org"
            insecure = true
            pull-from-mirror = "digest-only"
        "#;
        let expected = [
            "http://127.0.0.1:5000/cache/a",
            "http://m.example.org/a",
            "https://inner.example.org:8443/deep/a",
        ];
        assert_eq!(urls(text, "r.example.org", "team/a"), expected);
        assert_eq!(urls(text, "r.example.org", "teams/a"), ["https://r.example.org/teams/a"]);
        assert_eq!(urls(text, "docker.io", "library/a"), ["https://registry-1.docker.io/library/a"]);
    }

    #[test]
    fn the_longest_prefix_counts_and_a_wildcard_keeps_the_name() {
        let text = r#"
            [[registry]]
            location = "h"
            insecure = true
            [[registry]]
            prefix = "h/a"
            location = "other"
            [[registry]]
            prefix = "*.example.org"
            [[registry.mirror]]
            location = "m/all"
        "#;
        assert_eq!(urls(text, "h", "x"), ["http://h/x"]);
        assert_eq!(urls(text, "h", "a/x"), ["https://other/x"]);
        assert_eq!(urls(text, "b.example.org", "x"), ["https://m/all/x", "https://b.example.org/x"]);
    }

    #[test]
    fn blocked_and_broken() {
        let mut settings = Settings::default();
        settings.add(Path::new("f"), b"[[registry]]\nlocation = \"h\"\nblocked = true\n").unwrap();
        let host = Host::parse("h").unwrap();
        let error = settings.endpoints(&host, "x", false, &|_| false).unwrap_err();
        assert!(matches!(error, RegistryError::Blocked { .. }));
        for bad in
            ["[[registry", "[[registry]]\nlocation = \"h/../x\"", "[[registry]]\nlocation = 1", "\u{7f}\0"]
        {
            let error = settings.add(Path::new("f.conf"), bad.as_bytes()).unwrap_err();
            assert!(matches!(error, RegistryError::Config { .. }), "{error}");
        }
    }

    #[test]
    fn plain_http_needs_a_word_or_this_machine() {
        let settings = Settings::default();
        let https = |host: &str, plain: bool, known: bool| {
            let host = Host::parse(host).unwrap();
            settings.endpoints(&host, "x", plain, &|_| known).unwrap()[0].origin.https
        };
        assert!(https("h", false, false));
        assert!(!https("h", true, false));
        assert!(!https("127.0.0.1:5000", false, false));
        assert!(https("127.0.0.1:5000", false, true));
        assert!(https("127.0.0.1.nip.io", false, false));
    }
}
