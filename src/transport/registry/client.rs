//! Requests to a registry: who asks, where answers lead, and when to ask again.
//!
//! ```text
//! ask ─ 401/403 of the registry itself ─> new credentials, once ─> ask
//!     ─ 3xx ─> follow, at most 5 times; Authorization only to the same scheme, host and port
//!     ─ no connection, a cut, 408, 425, 429, 5xx ─> wait, ask again, a bounded number of times
//! ```

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use ureq::http::{Method, header};

use super::auth::{self, Challenge};
use super::credentials::{self, Credential};
use super::error::RegistryError;
use super::http::{Answer, Ask, Http, Payload};
use super::secret::Secret;
use super::settings::Endpoint;
use super::url::{Origin, Url, escape};
use crate::sorting;
use crate::sys::{locks, process};
use crate::transport::access::Access;

/// The most redirects that are followed for a request.
const MAX_REDIRECTS: usize = 5;
/// How often a request is sent again with a pass that another request got; with one of its own, once.
const RENEWALS: u32 = 3;
/// How often a request is sent that fails for a reason that may pass.
pub(super) const TRIES: u32 = 6;
/// How often, where there is no connection at all: a name that is wrong should not take long to say so.
const TRIES_TO_CONNECT: u32 = 3;

/// What a request needs to be allowed to do (distribution-spec's token scopes).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scope {
    /// Read the endpoint's repository.
    Pull,
    /// Write to it as well.
    Push,
    /// Write to it, and read another repository of the registry.
    Mount(String),
}

impl Scope {
    fn texts(&self, repository: &str) -> Vec<String> {
        match self {
            Self::Pull => vec![format!("repository:{repository}:pull")],
            Self::Push => vec![format!("repository:{repository}:pull,push")],
            Self::Mount(from) => {
                vec![format!("repository:{repository}:pull,push"), format!("repository:{from}:pull")]
            }
        }
    }
}

/// A client of registries, one for a command. Threads share it.
pub(super) struct Client {
    http: Http,
    /// What each registry has let us in with.
    granted: Mutex<HashMap<Origin, Granted>>,
}

/// What a registry has let us in with.
#[derive(Default)]
struct Granted {
    challenge: Option<Challenge>,
    /// By scopes; of Basic, which knows no scopes, by repository.
    passes: HashMap<String, Authorization>,
    count: u64,
}

/// The value of an `Authorization` header.
#[derive(Clone)]
struct Authorization {
    value: Secret,
    until: Option<Instant>,
    /// Tells a pass from the one that took its place.
    number: u64,
}

impl Client {
    /// A client that has not asked anything.
    ///
    /// Rule (docs/design.md, no secret in a core dump): passwords, tokens and keys of client certificates are in no core
    /// dump. They pass through the buffers of HTTP and TLS, so that all memory of the process is left out, not that of
    /// [`Secret`] alone.
    pub(super) fn new(access: Access) -> Self {
        process::leave_memory_out_of_dumps();
        Self { http: Http::new(access), granted: Mutex::new(HashMap::new()) }
    }

    /// How the user reaches registries.
    pub(super) fn access(&self) -> &Access {
        self.http.access()
    }

    /// How long a silent server is waited for.
    pub(super) fn patience(&self) -> Duration {
        self.http.access().patience
    }

    /// Sends a request to a URL of a registry or to one that it named; the answer may have any status
    /// but 401, 403 and those that are worth another try.
    ///
    /// # Errors
    /// [`RegistryError`]; [`RegistryError::Denied`] where credentials do not help.
    pub(super) fn send(
        &self,
        endpoint: &Endpoint,
        url: &Url,
        scope: &Scope,
        ask: &Ask<'_>,
    ) -> Result<Answer, RegistryError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let (error, wait) = match self.once(endpoint, url, scope, ask) {
                Ok(answer) if is_busy(answer.status) => {
                    let wait = answer.header(&header::RETRY_AFTER).and_then(|text| text.trim().parse().ok());
                    (answer.unexpected(), wait.map(Duration::from_secs))
                }
                Ok(answer) => return Ok(answer),
                Err(error) if error.is_temporary() => (error, None),
                Err(error) => return Err(error),
            };
            let most = match error {
                RegistryError::Network { unreachable: true, .. } => TRIES_TO_CONNECT,
                _ => TRIES,
            };
            if tries >= most {
                return Err(error);
            }
            log::info!("{error}; asking again");
            thread::sleep(self.pause(tries, wait));
        }
    }

    /// How long to wait before another try: doubled each time, from 1/120 to 1/3 of the patience
    /// (250 ms to 10 s), with jitter; or what the server asks for, to twice the patience (60 s).
    pub(super) fn pause(&self, tries: u32, asked: Option<Duration>) -> Duration {
        let patience = self.patience();
        let doubled = (patience / 120).saturating_mul(1 << tries.saturating_sub(1).min(10)).min(patience / 3);
        // Half of it is fixed, the other half random, so that a fleet does not come back all at once.
        let random = RandomState::new().build_hasher().finish();
        let jitter = doubled.mul_f64(0.5 + (random % 1024) as f64 / 2048.0);
        asked.map_or(jitter, |asked| asked.min(patience * 2).max(jitter))
    }

    /// Sends a request, with new credentials and a new redirect if the first ones are not accepted.
    ///
    /// # Errors
    /// As [`Client::send`], which sends again what fails for a reason that may pass.
    pub(super) fn once(
        &self,
        endpoint: &Endpoint,
        url: &Url,
        scope: &Scope,
        ask: &Ask<'_>,
    ) -> Result<Answer, RegistryError> {
        let ours = url.origin == endpoint.origin;
        let mut pass = if ours { self.pass(endpoint, scope) } else { None };
        let mut renewed = 0;
        let mut asked_anew = false;
        loop {
            let answer = self.follow(endpoint, url, ask, pass.as_ref())?;
            let at_home = answer.url.origin == endpoint.origin;
            match answer.status {
                // The link to a store ends after some minutes: ask the registry for a new one, once.
                400 | 401 | 403 if ours && !at_home && !asked_anew => asked_anew = true,
                401 | 403
                    if ours && at_home && renewed < RENEWALS && (answer.status == 401 || pass.is_some()) =>
                {
                    let (new, is_own) = self.renew(endpoint, scope, answer, pass.as_ref())?;
                    // Another thread's may have ended while this one waited for its answer.
                    renewed = if is_own { RENEWALS } else { renewed + 1 };
                    pass = Some(new);
                }
                401 | 403 => {
                    let credentials = match ours && at_home {
                        true => self.origin_of_credentials(endpoint),
                        false => "at the server that the registry leads to".into(),
                    };
                    return Err(denied(answer, credentials));
                }
                _ => return Ok(answer),
            }
        }
    }

    /// Follows redirects. Rules: the registry's credentials go to its own scheme, host and port
    /// alone; https never leads to http; what is written follows only where its method is kept.
    fn follow(
        &self,
        endpoint: &Endpoint,
        url: &Url,
        ask: &Ask<'_>,
        pass: Option<&Authorization>,
    ) -> Result<Answer, RegistryError> {
        let first = url;
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let own = url.origin == endpoint.origin;
            let pass = pass.filter(|_| own).map(|pass| &pass.value);
            let answer = self.http.send(&url, ask, pass).map_err(|error| match error {
                // A host that nobody has named needs a word on where it comes from.
                RegistryError::Network { request, why, unreachable } if url.origin != first.origin => {
                    let why = format!("{why} (redirected from {first})");
                    RegistryError::Network { request, why, unreachable }
                }
                error => error,
            })?;
            let keeps = matches!(answer.status, 307 | 308);
            let leads = keeps || matches!(answer.status, 301..=303);
            let Some(location) = answer.header(&header::LOCATION).filter(|_| leads) else {
                return Ok(answer);
            };
            let next = self.next(endpoint, &url, answer.request(), location)?;
            let reads = ask.method == Method::GET || ask.method == Method::HEAD;
            if !keeps && !reads {
                return Err(RegistryError::Redirect {
                    request: answer.request().to_string(),
                    to: next.to_string(),
                    why: "what is written cannot follow a redirect of this status",
                });
            }
            url = next;
        }
        Err(RegistryError::Redirect {
            request: format!("{} {url}", ask.method),
            to: "the next server".into(),
            why: "the redirects do not end",
        })
    }

    /// Where an answer leads: a redirect, an upload's location, the next page of a list.
    ///
    /// # Errors
    /// [`RegistryError::Redirect`].
    pub(super) fn next(
        &self,
        endpoint: &Endpoint,
        from: &Url,
        request: &str,
        location: &str,
    ) -> Result<Url, RegistryError> {
        let refused = |to: String, why| RegistryError::Redirect { request: request.to_string(), to, why };
        let shown = || super::text::shown(location.split('?').next().unwrap_or_default());
        let next = from.join(location).map_err(|why| refused(shown(), why))?;
        // Rule: plain http only where the registry itself is plain by the user's word.
        if !next.origin.https && (from.origin.https || endpoint.origin.https) {
            return Err(refused(next.to_string(), "https must not lead to plain http"));
        }
        if auth::is_internal(&next.origin.host()) && !auth::is_internal(&endpoint.origin.host()) {
            let why = "it is on this machine or its network link, and the registry is not";
            return Err(refused(next.to_string(), why));
        }
        Ok(next)
    }

    /// The pass that the registry accepted for this before, if it has not ended.
    fn pass(&self, endpoint: &Endpoint, scope: &Scope) -> Option<Authorization> {
        let granted = locks::lock(&self.granted);
        let pass = granted.get(&endpoint.origin)?.passes.get(&key(endpoint, scope))?;
        pass.until.is_none_or(|until| Instant::now() < until).then(|| pass.clone())
    }

    /// Gets a new pass after `refused` was not accepted. One thread asks, the others wait and share it. Returns whether
    /// this thread has asked, too.
    fn renew(
        &self,
        endpoint: &Endpoint,
        scope: &Scope,
        answer: Answer,
        refused: Option<&Authorization>,
    ) -> Result<(Authorization, bool), RegistryError> {
        let mut all = locks::lock(&self.granted);
        let granted = all.entry(endpoint.origin.clone()).or_default();
        let key = key(endpoint, scope);
        if let Some(pass) = granted.passes.get(&key)
            && refused.is_none_or(|refused| refused.number != pass.number)
            && pass.until.is_none_or(|until| Instant::now() < until)
        {
            return Ok((pass.clone(), false));
        }
        let mut offered = auth::challenges(answer.headers(&header::WWW_AUTHENTICATE));
        sorting::sort_by_key(&mut offered, |challenge| matches!(challenge, Challenge::Basic));
        // A 403 names no challenge: the one of the last 401 still holds.
        let Some(challenge) = offered.into_iter().next().or_else(|| granted.challenge.clone()) else {
            return Err(denied(answer, "and it names no way to log in that this client knows".into()));
        };
        let host = endpoint.origin.host().to_string();
        let found = credentials::find(self.http.access(), &host, &endpoint.repository)?;
        let (value, life) = match &challenge {
            Challenge::Basic => match found.credential {
                Some(Credential::Basic { user, password }) => (auth::basic(&user, &password), None),
                _ => return Err(denied(answer, found.origin)),
            },
            Challenge::Bearer { realm, service, scope: named } => {
                let (url, with_credentials) = auth::realm_url(&endpoint.origin, realm)?;
                let mut scopes: Vec<String> = scope.texts(&endpoint.repository);
                // A proxy knows the repository by another name than we do.
                let named = named.iter().flat_map(|named| named.split(' ')).filter(|named| !named.is_empty());
                for named in named {
                    if !scopes.iter().any(|known| known == named) {
                        scopes.push(named.to_string());
                    }
                }
                let credential = found.credential.filter(|_| with_credentials);
                let (token, life) =
                    self.token(&url, service.as_deref(), &scopes, credential.as_ref(), &found.origin)?;
                (auth::bearer(&token), Some(life))
            }
        };
        granted.count += 1;
        let pass =
            Authorization { value, until: life.map(|life| Instant::now() + life), number: granted.count };
        granted.passes.insert(key, pass.clone());
        granted.challenge = Some(challenge);
        Ok((pass, true))
    }

    /// Asks a token service.
    fn token(
        &self,
        realm: &Url,
        service: Option<&str>,
        scopes: &[String],
        credential: Option<&Credential>,
        origin: &str,
    ) -> Result<(Secret, Duration), RegistryError> {
        let (form, who);
        let mut url = realm.clone();
        let ask = match credential {
            Some(Credential::Identity(token)) => {
                // docker's token-service specification, "oauth": the refresh token goes in the body.
                let mut fields = format!(
                    "grant_type=refresh_token&client_id=mosfs&refresh_token={}&scope={}",
                    escape(token.expose()),
                    escape(&scopes.join(" "))
                );
                service.iter().for_each(|service| fields += &format!("&service={}", escape(service)));
                (form, who) = (fields, None);
                let mut ask = Ask { payload: Payload::Bytes(form.as_bytes()), ..Ask::new(Method::POST) };
                ask.headers.push((header::CONTENT_TYPE, "application/x-www-form-urlencoded".into()));
                ask
            }
            other => {
                service.iter().for_each(|service| url = url.with("service", service));
                scopes.iter().for_each(|scope| url = url.with("scope", scope));
                who = match other {
                    Some(Credential::Basic { user, password }) => {
                        url = url.with("account", user);
                        Some(auth::basic(user, password))
                    }
                    _ => None,
                };
                Ask::new(Method::GET)
            }
        };
        let mut tries = 0;
        let answer = loop {
            tries += 1;
            let failed = match self.http.send(&url, &ask, who.as_ref()) {
                Ok(answer) if is_busy(answer.status) => answer.unexpected(),
                Ok(answer) => break answer,
                Err(error) if error.is_temporary() => error,
                Err(error) => return Err(error),
            };
            if tries >= TRIES_TO_CONNECT {
                return Err(failed);
            }
            thread::sleep(self.pause(tries, None));
        };
        let credentials = match credential {
            Some(_) => origin.to_string(),
            None => format!("at the token service, {origin}"),
        };
        match answer.status {
            200 => {}
            400 | 401 | 403 => return Err(denied(answer, credentials)),
            _ => return Err(answer.unexpected()),
        }
        let request = answer.request().to_string();
        let bytes = answer.bytes("a token", auth::MAX_TOKEN)?;
        auth::token(&bytes).map_err(|why| RegistryError::Protocol { request, why: why.into() })
    }

    fn origin_of_credentials(&self, endpoint: &Endpoint) -> String {
        let host = endpoint.origin.host().to_string();
        match credentials::find(self.http.access(), &host, &endpoint.repository) {
            Ok(found) => found.origin,
            Err(error) => error.to_string(),
        }
    }
}

fn key(endpoint: &Endpoint, scope: &Scope) -> String {
    scope.texts(&endpoint.repository).join(" ")
}

fn denied(answer: Answer, credentials: String) -> RegistryError {
    let (status, request) = (answer.status, answer.request().to_string());
    RegistryError::Denied { request, status, said: answer.said(), credentials }
}

/// Whether the same request may be answered at another time.
fn is_busy(status: u16) -> bool {
    matches!(status, 408 | 425 | 429) || (500..=599).contains(&status) && status != 501
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_bounded_whatever_a_server_asks_for() {
        let client = Client::new(Access::default());
        let seconds =
            |tries, asked: Option<u64>| client.pause(tries, asked.map(Duration::from_secs)).as_secs_f64();
        for tries in 1..40 {
            assert!((0.125..=10.0).contains(&seconds(tries, None)), "{tries}");
        }
        assert!(seconds(1, None) <= 0.25 && seconds(20, None) >= 5.0);
        assert_eq!(seconds(1, Some(1_000_000_000)), 60.0);
        assert_eq!(seconds(1, Some(7)), 7.0);
        assert!(seconds(1, Some(0)) >= 0.125);
    }
}
