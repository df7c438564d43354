//! How a registry lets us in: challenges, tokens, and whom we may ask for them.
//!
//! ```text
//! 401  WWW-Authenticate: Bearer realm="https://auth.h/token",service="h",scope="repository:a/b:pull"
//! GET  https://auth.h/token?service=h&scope=repository:a/b:pull     with user and password, or none
//! 200  {"token":"…","expires_in":300}
//! ```
//!
//! The password of a registry goes to that registry, or to the token service that it names if the
//! service is evidently its own ([`may_ask`]); a token goes to the registry alone. A challenge
//! counts only in an answer of the registry itself, never in one of a server that it redirects to.

use std::time::Duration;

use serde::Deserialize;

use super::error::RegistryError;
use super::secret::Secret;
use super::url::{Origin, Url};
use crate::transport::reference::Host;

/// The most bytes of a token service's answer.
pub(super) const MAX_TOKEN: u64 = 64 << 10;
/// How long a token lives that does not say.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// How long before its end a token is no longer used.
const MARGIN: Duration = Duration::from_secs(10);
/// The most challenges that are read from an answer.
const MAX_CHALLENGES: usize = 8;

/// The authentication that a registry requires (RFC 9110, section 11.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// With user and password.
    Basic,
    /// With a token of this service.
    Bearer {
        /// The service's URL.
        realm: String,
        /// What the service calls the registry.
        service: Option<String>,
        /// What the request needs.
        scope: Option<String>,
    },
}

/// The challenges in the headers of an answer, less those of other schemes.
pub(super) fn challenges<'a>(headers: impl Iterator<Item = &'a str>) -> Vec<Challenge> {
    headers.flat_map(parse).take(MAX_CHALLENGES).collect()
}

/// Reads one header: `SCHEME name=value, name="value", SCHEME …`. What makes no sense is left out.
fn parse(header: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let word_end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        if word_end == 0 {
            break;
        }
        let (word, after) = rest.split_at(word_end);
        let after = after.trim_start_matches([' ', '\t']);
        // `realm = "x"` is legal; a word without `=` behind it begins a challenge.
        let Some(value) = after.strip_prefix('=') else {
            found.push((word.to_ascii_lowercase(), Vec::new()));
            rest = after;
            continue;
        };
        let value = value.trim_start_matches([' ', '\t']);
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => match unquote(quoted) {
                Some(both) => both,
                None => break,
            },
            None => {
                let end = value.find([' ', '\t', ',']).unwrap_or(value.len());
                (value[..end].to_string(), &value[end..])
            }
        };
        if let Some((_, parameters)) = found.last_mut() {
            parameters.push((word.to_ascii_lowercase(), value));
        }
        rest = after;
    }
    let get = |parameters: &[(String, String)], name: &str| {
        parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    };
    let challenge = |(scheme, parameters): (String, Vec<(String, String)>)| match scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: get(&parameters, "realm")?,
            service: get(&parameters, "service"),
            scope: get(&parameters, "scope"),
        }),
        _ => None,
    };
    found.into_iter().filter_map(challenge).collect()
}

/// What stands before the closing quote, unescaped, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

/// Whether a token service may be asked, and if so whether with the registry's credentials.
///
/// Rules: the service is https, or on the registry's own host where the user said that it is plain;
/// it is not on this machine or its link unless the registry is; credentials go to it only if its
/// host is the registry's, is the domain above it, or shares that domain.
///
/// # Errors
/// The rule that forbids to ask at all.
pub(super) fn may_ask(registry: &Origin, realm: &Url) -> Result<bool, &'static str> {
    let (ours, theirs) = (registry.host(), realm.origin.host());
    let same_host = ours.name == theirs.name;
    if !realm.origin.https && (registry.https || !same_host) {
        return Err("it is not https");
    }
    if is_internal(&theirs) && !is_internal(&ours) {
        return Err("it is on this machine or its network link, and the registry is not");
    }
    Ok(same_host || registry.https && shares_domain(&ours, &theirs))
}

/// Whether a host is written as an address that only this machine and its link can reach.
pub(super) fn is_internal(host: &Host) -> bool {
    let link_local = match host.address() {
        Some(std::net::IpAddr::V4(address)) => address.is_link_local() || address.is_unspecified(),
        Some(std::net::IpAddr::V6(address)) => {
            let mapped = address.to_ipv4_mapped().is_some_and(|v4| v4.is_link_local() || v4.is_loopback());
            address.is_unicast_link_local() || address.is_unspecified() || mapped
        }
        None => false,
    };
    host.is_loopback() || link_local
}

/// `registry.example.org` with `auth.example.org` or `example.org`, but not two hosts below `co.uk`.
fn shares_domain(ours: &Host, theirs: &Host) -> bool {
    if ours.address().is_some() || theirs.address().is_some() {
        return false;
    }
    let Some((_, domain)) = ours.name.split_once('.') else { return false };
    let labels: Vec<_> = domain.split('.').collect();
    let is_public = match labels.as_slice() {
        [] | [_] => true,
        // There is no list of public suffixes here: `co.uk`, `com.au`.
        [second, top] => top.len() == 2 && second.len() <= 3,
        _ => false,
    };
    !is_public && (theirs.name == domain || theirs.name.ends_with(&format!(".{domain}")))
}

/// Reads a token service's answer: the token, and how long it may be used.
pub(super) fn token(answer: &[u8]) -> Result<(Secret, Duration), &'static str> {
    #[derive(Deserialize)]
    struct Token {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    // What serde would quote may be the token.
    let read: Token = serde_json::from_slice(answer).map_err(|_| "its answer is not the JSON of a token")?;
    let text = read.token.filter(|text| !text.is_empty()).or(read.access_token).unwrap_or_default();
    if text.is_empty() {
        return Err("its answer holds no token");
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("its token holds characters that no header has");
    }
    let life = read.expires_in.map_or(DEFAULT_LIFE, |seconds| Duration::from_secs(seconds.min(86_400)));
    Ok((Secret::new(&text), life.saturating_sub(MARGIN)))
}

/// The header of user and password (RFC 7617).
pub(super) fn basic(user: &str, password: &Secret) -> Secret {
    let pair = format!("{user}:{}", password.expose());
    Secret::new(&format!("Basic {}", openssl::base64::encode_block(pair.as_bytes()).replace('\n', "")))
}

/// The header of a token (RFC 6750).
pub(super) fn bearer(token: &Secret) -> Secret {
    Secret::new(&format!("Bearer {}", token.expose()))
}

/// Where a realm leads.
///
/// # Errors
/// [`RegistryError::Realm`].
pub(super) fn realm_url(registry: &Origin, realm: &str) -> Result<(Url, bool), RegistryError> {
    let refused = |why| RegistryError::Realm {
        registry: registry.to_string(),
        realm: super::text::shown(realm.split('?').next().unwrap_or_default()),
        why,
    };
    let url = Url::parse(realm).map_err(refused)?;
    let with_credentials = may_ask(registry, &url).map_err(refused)?;
    Ok((url, with_credentials))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer_of(header: &str) -> Option<(String, Option<String>, Option<String>)> {
        challenges([header].into_iter()).into_iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service, scope } => Some((realm, service, scope)),
            Challenge::Basic => None,
        })
    }

    #[test]
    fn challenges_of_registries() {
        let text = |text: &str| Some(text.to_string());
        assert_eq!(
            bearer_of(
                r#"Bearer realm="https://a/t",service="h",scope="repository:a:pull repository:b:pull,push""#
            ),
            Some(("https://a/t".into(), text("h"), text("repository:a:pull repository:b:pull,push")))
        );
        assert_eq!(
            bearer_of(r#"Basic realm="x", bearer REALM = "https://a/t\"" , error=invalid_token"#),
            Some(("https://a/t\"".into(), None, None))
        );
        assert_eq!(challenges([r#"Basic realm="x""#].into_iter()), [Challenge::Basic]);
        assert_eq!(challenges(["Negotiate", "Digest a=b, Basic"].into_iter()), [Challenge::Basic]);
        for broken in
            ["", ",,,", "=", "Bearer", "Bearer realm=", r#"Bearer realm="x"#, "Bearer service=x", "\"", "é=é"]
        {
            assert_eq!(bearer_of(broken).filter(|(realm, ..)| !realm.is_empty()), None, "{broken}");
        }
        let many = vec!["Basic"; 100].join(", ");
        assert_eq!(challenges([many.as_str()].into_iter()).len(), MAX_CHALLENGES);
    }

    #[test]
    fn who_is_asked_for_a_token_and_who_sees_the_password() {
        let ask = |registry: &str, realm: &str| {
            may_ask(&Url::parse(registry).unwrap().origin, &Url::parse(realm).unwrap())
        };
        for (registry, realm, answer) in [
            ("https://registry-1.docker.io", "https://auth.docker.io/token", Ok(true)),
            ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth", Ok(true)),
            ("https://h", "https://h/token", Ok(true)),
            ("https://h:5000", "https://h:5001/token", Ok(true)),
            ("https://registry.example.org", "https://evil.org/t", Ok(false)),
            ("https://example.org", "https://evil.org/t", Ok(false)),
            ("https://a.co.uk", "https://b.co.uk/t", Ok(false)),
            ("https://10.0.0.1", "https://10.0.0.2/t", Ok(false)),
            ("http://127.0.0.1:5000", "http://127.0.0.1:5001/t", Ok(true)),
            ("http://h.example.org", "https://auth.example.org/t", Ok(false)),
        ] {
            assert_eq!(ask(registry, realm), answer, "{registry} {realm}");
        }
        for (registry, realm) in [
            ("https://h", "http://h/t"),
            ("http://h", "http://other/t"),
            ("https://h", "https://127.0.0.1/t"),
            ("https://h", "https://localhost/t"),
            ("https://h", "https://169.254.169.254/t"),
            ("https://h", "https://[fe80::1]/t"),
            ("https://h", "https://[::ffff:127.0.0.1]/t"),
        ] {
            assert!(ask(registry, realm).is_err(), "{registry} {realm}");
        }
    }

    #[test]
    fn answers_of_token_services() {
        let read = |text: &str| {
            token(text.as_bytes()).map(|(token, life)| (token.expose().to_string(), life.as_secs()))
        };
        assert_eq!(read(r#"{"token":"t","expires_in":300}"#), Ok(("t".into(), 290)));
        assert_eq!(read(r#"{"access_token":"t"}"#), Ok(("t".into(), 50)));
        assert_eq!(read(r#"{"token":"t","expires_in":3}"#), Ok(("t".into(), 0)));
        for bad in ["", "{}", r#"{"token":""}"#, r#"{"token":"a\r\nb"}"#, r#"{"token":1}"#, "[]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
