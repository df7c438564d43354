//! Which proxy of the environment a request goes through, chosen by its scheme.
//!
//! `HTTPS_PROXY` for https, `HTTP_PROXY` for http, then `ALL_PROXY`, each in upper or lower case;
//! `NO_PROXY` is a list of hosts, domains, addresses, networks (`10.0.0.0/8`), each with or without
//! a port, or `*`. This machine itself is never reached through a proxy.

use std::net::IpAddr;

use super::error::RegistryError;
use super::secret::Secret;
use super::text;
use crate::transport::reference::Host;

/// Where a request goes.
pub(super) enum Route {
    /// Straight to the server.
    Direct,
    /// Through a proxy.
    Proxy {
        /// The variable that names it.
        variable: &'static str,
        /// Its URL, which may hold a password.
        url: Secret,
        /// Its host and port, for messages.
        shown: String,
    },
}

/// The route to a server. `get` reads a variable of the environment.
///
/// # Errors
/// [`RegistryError::Proxy`] for a kind of proxy that this client does not speak to.
pub(super) fn route(
    https: bool,
    host: &Host,
    get: &dyn Fn(&str) -> Option<String>,
) -> Result<Route, RegistryError> {
    let names: &[&'static str] = match https {
        true => &["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"],
        false => &["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"],
    };
    let found = names.iter().find_map(|name| Some((*name, get(name).filter(|value| !value.is_empty())?)));
    let Some((variable, url)) = found else { return Ok(Route::Direct) };
    let exempt = ["NO_PROXY", "no_proxy"].into_iter().find_map(get).unwrap_or_default();
    if host.is_loopback() || exempt.split([',', ' ']).any(|rule| exempts(rule.trim(), https, host)) {
        return Ok(Route::Direct);
    }
    let url = if url.contains("://") { url } else { format!("http://{url}") };
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(RegistryError::Proxy { variable, why: "expected the URL of an http or https proxy" });
    }
    let authority = url.split_once("://").map_or("", |(_, rest)| rest).split('/').next().unwrap_or_default();
    let shown = text::shown(authority.rsplit('@').next().unwrap_or_default());
    Ok(Route::Proxy { variable, url: Secret::new(&url), shown })
}

/// Whether one word of `NO_PROXY` is about this host.
fn exempts(rule: &str, https: bool, host: &Host) -> bool {
    if rule.is_empty() {
        return false;
    }
    if rule == "*" {
        return true;
    }
    let address = host.address();
    if let Some((network, bits)) = rule.split_once('/') {
        return match (network.parse(), bits.parse(), address) {
            (Ok(network), Ok(bits), Some(address)) => is_in(address, network, bits),
            _ => false,
        };
    }
    let (name, port) = match Host::parse(rule.trim_start_matches("*.").trim_start_matches('.')) {
        Some(Host { name, port }) => (name, port),
        // An IPv6 address without brackets.
        None => (format!("[{rule}]"), None),
    };
    if port.is_some_and(|port| port != host.port.unwrap_or(if https { 443 } else { 80 })) {
        return false;
    }
    let (ours, theirs) = (host.name.to_ascii_lowercase(), name.to_ascii_lowercase());
    ours == theirs || address.is_none() && ours.ends_with(&format!(".{theirs}"))
}

fn is_in(address: IpAddr, network: IpAddr, bits: u32) -> bool {
    let shift = |width: u32| width.checked_sub(bits);
    match (address, network) {
        (IpAddr::V4(one), IpAddr::V4(two)) => shift(32).is_some_and(|shift| {
            u32::from(one).checked_shr(shift).unwrap_or(0) == u32::from(two).checked_shr(shift).unwrap_or(0)
        }),
        (IpAddr::V6(one), IpAddr::V6(two)) => shift(128).is_some_and(|shift| {
            u128::from(one).checked_shr(shift).unwrap_or(0) == u128::from(two).checked_shr(shift).unwrap_or(0)
        }),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(https: bool, host: &str, variables: &[(&str, &str)]) -> Option<String> {
        let get = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        };
        match route(https, &Host::parse(host).unwrap(), &get).unwrap() {
            Route::Direct => None,
            Route::Proxy { url, shown, .. } => {
                assert!(!shown.contains("sekret"), "{shown}");
                Some(url.expose().to_string())
            }
        }
    }

    #[test]
    fn the_scheme_chooses_the_proxy() {
        let both = [("HTTPS_PROXY", "http://s:1"), ("http_proxy", "p:2")];
        assert_eq!(through(true, "example.org", &both).as_deref(), Some("http://s:1"));
        assert_eq!(through(false, "example.org", &both).as_deref(), Some("http://p:2"));
        assert_eq!(through(false, "example.org", &both[..1]), None);
        assert_eq!(through(true, "h", &[("ALL_PROXY", "http://a")]).as_deref(), Some("http://a"));
        assert_eq!(through(true, "127.0.0.1:5000", &both), None);
        for url in ["http://u:sekret@p:1/", "u:sekret@p:1", "http://u:sek@sekret@p:1"] {
            assert!(through(true, "h", &[("HTTPS_PROXY", url)]).is_some_and(|used| used.contains(url)));
        }
        let socks = |name: &str| (name == "all_proxy").then(|| "socks5://x".to_string());
        assert!(matches!(
            route(true, &Host::parse("h").unwrap(), &socks),
            Err(RegistryError::Proxy { variable: "all_proxy", .. })
        ));
    }

    #[test]
    fn no_proxy_names_hosts_domains_networks_and_ports() {
        for (rule, host, direct) in [
            ("example.org", "example.org", true),
            ("example.org", "a.example.org", true),
            (".example.org", "a.example.org", true),
            ("example.org", "badexample.org", false),
            ("example.org:5000", "example.org:5000", true),
            ("example.org:5000", "example.org", false),
            ("example.org:443", "example.org", true),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("0.0.0.0/0", "11.1.2.3", true),
            ("fe80::/10", "[fe80::1]", true),
            ("fe80::1", "[fe80::1]", true),
            ("10.1.2.3", "10.1.2.3:5000", true),
            ("a, b ,example.org", "example.org", true),
            ("*", "example.org", true),
            ("", "example.org", false),
            ("10.0.0.0/99", "10.1.2.3", false),
        ] {
            let found = through(true, host, &[("HTTPS_PROXY", "http://p"), ("no_proxy", rule)]);
            assert_eq!(found.is_none(), direct, "{rule} {host}");
        }
    }
}
