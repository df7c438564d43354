//! URLs of registries: where a request goes, and where an answer leads.

use std::fmt;

use crate::transport::reference::Host;

/// Scheme, host and port: what may see the credentials of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    /// Whether it is https.
    pub https: bool,
    /// The host, in lower case.
    pub name: String,
    /// The port.
    pub port: u16,
}

impl Origin {
    /// The origin of a host.
    pub(super) fn new(https: bool, host: &Host) -> Self {
        let port = host.port.unwrap_or(if https { 443 } else { 80 });
        Self { https, name: host.name.to_ascii_lowercase(), port }
    }

    /// The host, with its port if that is not the scheme's own.
    pub(super) fn host(&self) -> Host {
        let own = if self.https { 443 } else { 80 };
        Host { name: self.name.clone(), port: (self.port != own).then_some(self.port) }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.https { "https" } else { "http" }, self.host())
    }
}

/// A URL. [`fmt::Display`] leaves out the query, which may hold a signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url {
    /// Where.
    pub origin: Origin,
    /// Path and query, beginning with `/`.
    pub path: String,
}

impl Url {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it: another scheme, a user or password in it, characters that no URL has.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let (https, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
            _ => return Err("it is not an http or https URL"),
        };
        if text.bytes().any(|b| !b.is_ascii_graphic()) {
            return Err("it holds characters that no URL has");
        }
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if authority.contains('@') {
            return Err("it holds a user or password");
        }
        let host = Host::parse(authority).ok_or("it has no valid host")?;
        let path = path.split('#').next().unwrap_or_default();
        let path = if path.starts_with('/') { path.to_string() } else { format!("/{path}") };
        Ok(Self { origin: Origin::new(https, &host), path })
    }

    /// Resolves a reference in an answer from this URL (RFC 3986, section 5), without `..`.
    ///
    /// # Errors
    /// As [`Url::parse`].
    pub(super) fn join(&self, reference: &str) -> Result<Self, &'static str> {
        if reference.contains("://") && !reference.starts_with('/') && !reference.starts_with('?') {
            return Self::parse(reference);
        }
        if let Some(rest) = reference.strip_prefix("//") {
            return Self::parse(&format!("{}://{rest}", if self.origin.https { "https" } else { "http" }));
        }
        let path = self.path.split('?').next().unwrap_or_default();
        let joined = match reference {
            "" => return Ok(self.clone()),
            _ if reference.starts_with('/') => reference.to_string(),
            _ if reference.starts_with('?') => format!("{path}{reference}"),
            _ => format!(
                "{}{reference}",
                path.rsplit_once('/').map_or("/".into(), |(dir, _)| format!("{dir}/"))
            ),
        };
        Self::parse(&format!("{}{joined}", self.origin))
    }

    /// The same URL with one more parameter.
    pub(super) fn with(&self, name: &str, value: &str) -> Self {
        let join = if self.path.contains('?') { '&' } else { '?' };
        Self { origin: self.origin.clone(), path: format!("{}{join}{name}={}", self.path, escape(value)) }
    }

    /// The whole URL, as it is sent.
    pub(super) fn full(&self) -> String {
        format!("{}{}", self.origin, self.path)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.split('?').next().unwrap_or_default();
        write!(f, "{}{}", self.origin, super::text::shown(path))
    }
}

/// Escapes what cannot stand in a query (RFC 3986); `:` and `/`, which digests and names hold, can.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'/' | b',' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_joined() {
        let base = Url::parse("https://h:5000/v2/r/blobs/uploads/?a=1").unwrap();
        for (reference, joined) in [
            ("https://other/x?y=1", "https://other/x?y=1"),
            ("//other/x", "https://other/x"),
            ("/v2/x?_state=a://b", "https://h:5000/v2/x?_state=a://b"),
            ("abc?d=e", "https://h:5000/v2/r/blobs/uploads/abc?d=e"),
            ("?d=e", "https://h:5000/v2/r/blobs/uploads/?d=e"),
            ("HTTP://H/x#y", "http://h/x"),
        ] {
            assert_eq!(base.join(reference).unwrap().full(), joined);
        }
        for bad in
            ["ftp://h/x", "https://u:p@h/", "https://h/\r\nx", "https:///x", "https://h:0/", "https://h/ x"]
        {
            assert!(base.join(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn parameters_are_added_and_not_shown() {
        let url = Url::parse("https://h/x").unwrap();
        let signed = url.with("digest", "sha256:00").with("s", "a b&c");
        assert_eq!(signed.full(), "https://h/x?digest=sha256:00&s=a%20b%26c");
        assert_eq!(signed.to_string(), "https://h/x");
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |text: &str| Url::parse(text).unwrap().origin;
        assert_eq!(origin("https://H/"), origin("https://h:443/x"));
        assert_ne!(origin("https://h/"), origin("http://h/"));
        assert_ne!(origin("http://h:1/"), origin("http://h:2/"));
    }
}
