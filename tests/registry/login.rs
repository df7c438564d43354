//! Who is let in, who sees credentials, and which servers are believed: certificates, plain http, tokens,
//! files and helpers of credentials.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use openssl::base64::encode_block;
use openssl::ssl::{SslAcceptor, SslFiletype, SslMethod, SslVerifyMode};

use crate::debian::{Config, Debian};
use crate::faults::served;
use crate::place::{Place, display, in_core_dumps, layers_of, load, refused, text};
use crate::server::{Fault, Options, Server};

/// A CA and what it signs, made by the openssl command.
struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    fn new(place: &Place) -> Self {
        let dir = place.path("tls");
        fs::create_dir(&dir).unwrap();
        let this = Self { dir };
        this.authority("ca");
        this.authority("other");
        this.leaf("good", "ca", "IP:127.0.0.1,DNS:localhost", 10);
        this.leaf("named", "ca", "DNS:registry.example.org", 10);
        this.leaf("client", "ca", "DNS:client", 10);
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn sh(&self, script: &str) {
        let output = Command::new("sh").arg("-ec").arg(script).current_dir(&self.dir).output().expect("sh");
        assert!(output.status.success(), "{script}: {}", text(&output.stderr));
    }

    fn authority(&self, name: &str) {
        self.sh(&format!(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.crt \
             -days 10 -subj /CN={name} 2>/dev/null"
        ));
    }

    fn leaf(&self, name: &str, by: &str, names: &str, days: i32) {
        self.sh(&format!(
            "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name} 2>/dev/null\n\
             echo 'subjectAltName={names}' >{name}.ext\n\
             openssl x509 -req -in {name}.csr -CA {by}.crt -CAkey {by}.key -CAcreateserial -days {days} -extfile {name}.ext -out {name}.pem 2>/dev/null"
        ));
    }

    /// A certificate that ended before the year 2000 was over.
    fn expired(&self) {
        self.sh(
            "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout old.key -out old.csr -subj /CN=old 2>/dev/null\n\
             echo 'subjectAltName=IP:127.0.0.1' >old.ext\n\
             faketime '2000-01-01 00:00:00' openssl x509 -req -in old.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile old.ext -out old.pem 2>/dev/null",
        );
    }

    /// A server's side with this certificate; one that requires a client's, with `clients`.
    fn acceptor(&self, name: &str, clients: bool) -> Arc<SslAcceptor> {
        let mut builder = SslAcceptor::mozilla_intermediate(SslMethod::tls_server()).unwrap();
        builder.set_certificate_file(self.path(&format!("{name}.pem")), SslFiletype::PEM).unwrap();
        builder.set_private_key_file(self.path(&format!("{name}.key")), SslFiletype::PEM).unwrap();
        if clients {
            builder.set_ca_file(self.path("ca.crt")).unwrap();
            builder.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        }
        Arc::new(builder.build())
    }

    /// A folder as `--cert-dir` takes it.
    fn folder(&self, name: &str, files: &[(&str, &str)]) -> String {
        let folder = self.path(name);
        fs::create_dir_all(&folder).unwrap();
        for (from, to) in files {
            fs::copy(self.path(from), folder.join(to)).unwrap();
        }
        display(&folder)
    }
}

fn pull<'a>(source: &'a str, store: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["pull", source, "--store", store], more].concat()
}

#[test]
fn a_certificate_must_be_of_this_host_in_time_and_of_a_known_ca() {
    let place = Place::new();
    let certificates = Certificates::new(&place);
    certificates.expired();
    place.publish(200, &[40_000]);
    let trusted = certificates.folder("trusted", &[("ca.crt", "ca.crt")]);
    let stranger = certificates.folder("stranger", &[("other.crt", "ca.crt")]);
    let store = display(&place.path("copy"));
    for (name, folder, words) in [
        ("named", &trusted, "mismatch"),
        ("old", &trusted, "certificate has expired"),
        ("good", &stranger, "unable to get local issuer certificate"),
    ] {
        let server =
            Server::start(Options { tls: Some(certificates.acceptor(name, false)), ..Options::default() });
        load(&place.publisher.store(), 200, "p", &server);
        let source = server.source("p");
        place.refused(
            &pull(&source, &store, &["--cert-dir", folder]),
            1,
            &["TLS: the certificate of 127.0.0.1", words],
        );
        assert!(server.take_log().is_empty(), "nothing is asked through it");
    }
    let server =
        Server::start(Options { tls: Some(certificates.acceptor("good", false)), ..Options::default() });
    load(&place.publisher.store(), 200, "p", &server);
    place.ok(&pull(&server.source("p"), &store, &["--cert-dir", &trusted]));
    // In the administrator's folder, by the registry's name and port.
    let certs_d = place.path("home/containers/certs.d").join(server.host());
    fs::create_dir_all(&certs_d).unwrap();
    fs::copy(certificates.path("ca.crt"), certs_d.join("our-ca.crt")).unwrap();
    place.pull(&server.source("p"), "copy-2");
    // A file that is no certificate is an error, not one CA less.
    fs::write(certs_d.join("broken.crt"), "x").unwrap();
    let source = server.source("p");
    place.refused(&pull(&source, &store, &[]), 2, &["broken.crt"]);
}

#[test]
fn a_client_certificate_is_shown_where_it_is_asked_for() {
    let place = Place::new();
    let certificates = Certificates::new(&place);
    place.publish(200, &[40_000]);
    let server =
        Server::start(Options { tls: Some(certificates.acceptor("good", true)), ..Options::default() });
    load(&place.publisher.store(), 200, "p", &server);
    let without = certificates.folder("without", &[("ca.crt", "ca.crt")]);
    let with = certificates
        .folder("with", &[("ca.crt", "ca.crt"), ("client.pem", "me.cert"), ("client.key", "me.key")]);
    let store = display(&place.path("copy"));
    let (source, half) = (server.source("p"), certificates.folder("half", &[("client.pem", "me.cert")]));
    let output = place.run(&pull(&source, &store, &["--cert-dir", &without]));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    place.refused(&pull(&source, &store, &["--cert-dir", &half]), 2, &["me.key is missing"]);
    place.ok(&pull(&source, &store, &["--cert-dir", &with]));
}

#[test]
fn plain_http_needs_a_word_where_the_registry_is_not_this_machine() {
    let (place, server, _) = served(Options::default(), 40_000);
    // An address that leads to this machine, and is not one of its own names.
    let source = format!("docker://{}/p", server.host().replace("127.0.0.1", "0.0.0.0"));
    let store = display(&place.path("copy"));
    place.refused(&pull(&source, &store, &[]), 1, &["https://0.0.0.0", "TLS"]);
    let debian = Debian::start(&Config::default());
    let other = format!("docker://0.0.0.0:{}/p", debian.port);
    place.refused(&pull(&other, &store, &[]), 1, &["speak plain HTTP?", "hint: give --plain-http"]);
    assert!(server.take_log().is_empty());
    place.ok(&pull(&source, &store, &["--plain-http"]));
}

#[test]
fn https_never_leads_to_plain_http() {
    let place = Place::new();
    let certificates = Certificates::new(&place);
    let trusted = certificates.folder("trusted", &[("ca.crt", "ca.crt")]);
    place.publish(200, &[40_000]);
    let layer = layers_of(&place.publisher.store(), 200)[0].clone();
    let registry =
        Server::start(Options { tls: Some(certificates.acceptor("good", false)), ..Options::default() });
    load(&place.publisher.store(), 200, "p", &registry);
    let plain = Server::start(Options::default());
    plain.put_blob("x", &place.publisher.store().get(&layer.digest, 1 << 20).unwrap());
    let (location, digest) = (format!("{}/v2/x/blobs/{}", plain.url(), layer.digest), layer.digest);
    registry.script(move |seen, _| {
        seen.gets(&digest).then(|| Fault::Answer(302, vec![("Location", location.clone())], Vec::new()))
    });
    let (source, store) = (registry.source("p"), display(&place.path("copy")));
    place.refused(
        &pull(&source, &store, &["--cert-dir", &trusted]),
        1,
        &["https must not lead to plain http"],
    );
    assert!(plain.take_log().is_empty());
    // The same for the place of an upload.
    let location = format!("{}/v2/x/blobs/uploads/1", plain.url());
    registry.script(move |seen, _| {
        (seen.method == "POST").then(|| Fault::Answer(202, vec![("Location", location.clone())], Vec::new()))
    });
    let ours = display(&place.store());
    let to = registry.source("new");
    place.refused(
        &["push", "--store", &ours, &to, "--cert-dir", &trusted],
        1,
        &["https must not lead to plain http"],
    );
    assert!(plain.take_log().is_empty());
}

fn auth_file(place: &Place, name: &str, host: &str, pair: &str) -> String {
    let path = place.path(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let json = format!(r#"{{"auths":{{"{host}":{{"auth":"{}"}}}}}}"#, encode_block(pair.as_bytes()));
    fs::write(&path, json).unwrap();
    display(&path)
}

#[test]
fn a_token_service_elsewhere_is_asked_without_the_password() {
    let place = Place::new();
    let certificates = Certificates::new(&place);
    let trusted = certificates.folder("trusted", &[("ca.crt", "ca.crt")]);
    let tls = || Some(certificates.acceptor("good", false));
    let service =
        Server::start(Options { tls: tls(), tokens: Some((String::new(), None)), ..Options::default() });
    let realm = format!("{}/token", service.url().replace("127.0.0.1", "localhost"));
    let registry = Server::start(Options {
        tls: tls(),
        tokens: Some(("u:hunter2".into(), Some(realm))),
        ..Options::default()
    });
    let file = auth_file(&place, "auth.json", &registry.host(), "u:hunter2");
    let (source, store) = (registry.source("p"), display(&place.path("copy")));
    let args = pull(&source, &store, &["-vv", "--cert-dir", &trusted, "--authfile", &file]);
    let said = place.refused(&args, 1, &["access denied"]);
    assert!(!said.contains("hunter2"), "{said}");
    let log = service.take_log();
    assert!(!log.is_empty() && log.iter().all(|seen| seen.header("authorization").is_none()), "{log:?}");

    // A plain service of an https registry is not asked at all.
    let plain = Server::start(Options { tokens: Some((String::new(), None)), ..Options::default() });
    let registry = Server::start(Options {
        tls: tls(),
        tokens: Some(("u:hunter2".into(), Some(format!("{}/token", plain.url())))),
        ..Options::default()
    });
    let source = registry.source("p");
    place.refused(
        &pull(&source, &store, &["--cert-dir", &trusted]),
        1,
        &["names the token service", "it is not https"],
    );
    assert!(plain.take_log().is_empty());
}

#[test]
fn passwords_and_tokens_are_found_and_never_shown() {
    let place = Place::new();
    place.publish(200, &[60_000]);
    let basic = Server::start(Options { basic: Some("u:hunter2".into()), ..Options::default() });
    let tokens = Server::start(Options {
        tokens: Some(("u:hunter2".into(), None)),
        token_life: Some(3),
        ..Options::default()
    });
    let mut said = String::new();
    for (at, server) in [&basic, &tokens].into_iter().enumerate() {
        load(&place.publisher.store(), 200, "p", server);
        let source = server.source("p");
        let store = display(&place.path(&format!("copy-{at}")));
        // Without, with the wrong ones, and with the right ones; -vv all the time.
        let output = place.run(&pull(&source, &store, &["-vv"]));
        said += &refused(&output, 1, &["access denied (401", "without credentials: there is no file of any"]);
        let wrong = auth_file(&place, "wrong.json", &server.host(), "u:hunter2-not");
        let output = place.run(&pull(&source, &store, &["-vv", "--authfile", &wrong]));
        said += &refused(&output, 1, &["access denied (401", "with the credentials of", "wrong.json"]);
        let right = auth_file(&place, "right.json", &format!("{}/p", server.host()), "u:hunter2");
        let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        server.script(move |seen, _| {
            let cut =
                seen.path.contains("/blobs/") && count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) < 2;
            cut.then_some(Fault::Cut(10))
        });
        let output = place.run(&pull(&source, &store, &["-vv", "--authfile", &right, "--progress-fd", "1"]));
        assert!(text(&output.stdout).contains(r#""event":"done""#), "{}", text(&output.stdout));
        assert!(output.status.success(), "{}", text(&output.stderr));
        said += &text(&output.stderr);
        said += &text(&output.stdout);
        // podman's place, then docker's, without being named.
        for name in ["home/containers/auth.json", "home/.docker/config.json"] {
            let file = auth_file(&place, name, &server.host(), "u:hunter2");
            server.heal();
            place.ok(&pull(&source, &display(&place.path(&format!("by-{at}-{}", name.len()))), &[]));
            fs::remove_file(file).unwrap();
        }
    }
    let secrets = ["hunter2", "sesame", &encode_block(b"u:hunter2")];
    assert!(said.contains("going on at byte") || said.contains("fetch"), "the log was on: {said}");
    for secret in secrets {
        assert!(!said.contains(secret), "{secret} is shown: {said}");
        for name in ["copy-0", "copy-1"] {
            let found = Command::new("grep").args(["-rl", secret]).arg(place.path(name)).output().unwrap();
            assert!(found.stdout.is_empty(), "{secret} is kept: {}", text(&found.stdout));
        }
    }
}

/// Ends a process when it is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pull that waits for the bytes of a blob, with a password, a token and an environment that it was given.
#[test]
fn core_dumps_hold_no_password_and_no_token() {
    let place = Place::new();
    place.publish(200, &[60_000]);
    let options = Options { tokens: Some(("u:hunter2".into(), None)), ..Options::default() };
    let server = Server::start(options);
    load(&place.publisher.store(), 200, "p", &server);
    let layer = layers_of(&place.publisher.store(), 200).remove(0).digest;
    server.script(move |seen, _| seen.gets(&layer).then_some(Fault::Stall(100)));
    let file = auth_file(&place, "auth.json", &server.host(), "u:hunter2");
    let store = display(&place.path("copy"));
    let mut command =
        place.command(&pull(&server.source("p"), &store, &["--authfile", &file, "--net-timeout", "100"]));
    command.env("HTTPS_PROXY", "http://u:proxy-word@127.0.0.1:9").env("NO_PROXY", "127.0.0.1");
    let pull = Ended(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    while server.sent(&layer) == 0 {
        thread::sleep(Duration::from_millis(5));
    }
    let secrets = ["hunter2", "sesame", &encode_block(b"u:hunter2"), "proxy-word"];
    let dumped = in_core_dumps(&place, pull.0.id(), &secrets);
    assert!(dumped.iter().all(|(shown, _)| *shown == 0), "{dumped:?}");
    assert!(dumped[1].1 > 0 && dumped[3].1 > 0, "they are in its memory: {dumped:?}");
}

/// A registry that lets anyone in does not need the file; a name with a mistake in it is found all the same.
#[test]
fn a_file_of_credentials_that_is_named_is_there_and_can_be_read() {
    let (place, server, _) = served(Options::default(), 30_000);
    let (source, store) = (server.source("p"), display(&place.path("copy")));
    let missing = display(&place.path("no.json"));
    place.refused(&pull(&source, &store, &["--authfile", &missing]), 2, &["no.json", "No such file"]);
    fs::write(place.path("broken.json"), "{\"auths\": \"hunter2\"").unwrap();
    let mut command = place.command(&pull(&source, &store, &[]));
    let output = command.env("REGISTRY_AUTH_FILE", place.path("broken.json")).output().unwrap();
    let said = refused(&output, 2, &["broken.json: it is not a file of credentials (line 1, column"]);
    assert!(!said.contains("hunter2"), "{said}");
    assert!(server.take_log().is_empty(), "nothing is asked");
}

/// Each token is new, and none is good.
#[test]
fn a_registry_that_accepts_no_token_is_given_up() {
    let options = Options { tokens: Some((String::new(), None)), ..Options::default() };
    let (place, server, _) = served(options, 30_000);
    let realm = format!("Bearer realm=\"{}/token\",service=\"test\"", server.url());
    server.script(move |seen, _| {
        let refused = || Fault::Answer(401, vec![("WWW-Authenticate", realm.clone())], Vec::new());
        seen.path.starts_with("/v2/").then(refused)
    });
    let store = display(&place.path("copy"));
    place.refused(&pull(&server.source("p"), &store, &[]), 1, &["access denied (401"]);
    let log = server.take_log();
    assert_eq!(log.iter().filter(|seen| seen.path.starts_with("/v2/")).count(), 2, "{log:?}");
}

/// The proxy is named, as it is not the registry that cannot be reached, and its password is not shown.
#[test]
fn a_proxy_that_cannot_be_reached_is_named() {
    let place = Place::new();
    let store = display(&place.path("copy"));
    let args = pull("docker://registry.example.org/p", &store, &["-vv"]);
    let output = place.command(&args).env("HTTPS_PROXY", "http://u:hunter2@127.0.0.1:1").output().unwrap();
    let words =
        ["Connection refused", "(through the proxy 127.0.0.1:1 of HTTPS_PROXY)", "hint: check the address"];
    let said = refused(&output, 1, &words);
    assert!(!said.contains("hunter2"), "{said}");
}

fn helper(place: &Place, name: &str, script: &str) {
    let bin = place.path("bin");
    fs::create_dir_all(&bin).unwrap();
    let path = bin.join(format!("docker-credential-{name}"));
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn with_helper(place: &Place, name: &str, source: &str) -> std::process::Output {
    let file = place.path("helpers.json");
    fs::write(&file, format!(r#"{{"credsStore":"{name}"}}"#)).unwrap();
    let (file, store) = (display(&file), display(&place.path("copy")));
    let path = format!("{}:{}", display(&place.path("bin")), std::env::var("PATH").unwrap());
    let mut command = place.command(&pull(source, &store, &["-vv", "--authfile", &file]));
    command.env("PATH", path).output().unwrap()
}

#[test]
fn credential_helpers_are_asked_and_bounded() {
    let options = Options { tokens: Some(("u:hunter2".into(), None)), ..Options::default() };
    let (place, server, _) = served(options, 30_000);
    let source = server.source("p");
    let good = r#"read host; [ "$1" = get ] || exit 1; printf '{"ServerURL":"%s","Username":"u","Secret":"hunter2"}' "$host""#;
    let identity = r#"printf '{"Username":"<token>","Secret":"u:hunter2"}'"#;
    for (name, script) in [("good", good), ("identity", identity)] {
        helper(&place, name, script);
        let output = with_helper(&place, name, &source);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        let _ = fs::remove_dir_all(place.path("copy"));
    }
    for (name, script, words) in [
        ("none", "echo credentials not found in native keychain; exit 1", "without credentials"),
        ("fails", "echo hunter2; exit 3", "it ended with"),
        ("odd", "echo hunter2", "not the JSON of a helper"),
        ("much", "head -c 200000 /dev/zero", "too long"),
        ("hangs", "sleep 60 & echo hunter2; wait", "did not answer within 10 s"),
    ] {
        helper(&place, name, script);
        let said = refused(&with_helper(&place, name, &source), 1, &[words]);
        assert!(!said.contains("hunter2"), "{name}: {said}");
    }
    let said =
        refused(&with_helper(&place, "absent", &source), 1, &["docker-credential-absent", "cannot be run"]);
    assert!(!said.contains("hunter2"));
}

#[test]
fn debians_registry_lets_in_who_has_the_password() {
    let place = Place::new();
    let certificates = Certificates::new(&place);
    place.publish(200, &[40_000]);
    // bcrypt of `hunter2`: what htpasswd -B writes.
    let file = place.path("htpasswd");
    fs::write(&file, HTPASSWD).unwrap();
    let (certificate, key) = (certificates.path("good.pem"), certificates.path("good.key"));
    let config =
        Config { htpasswd: Some(Path::new(&file)), tls: Some((&certificate, &key)), ..Config::default() };
    let registry = Debian::start(&config);
    let trusted = certificates.folder("trusted", &[("ca.crt", "ca.crt")]);
    let (to, store, copy) = (registry.source("p"), display(&place.store()), display(&place.path("copy")));
    // On this machine plain HTTP is spoken, as long as there is no folder of certificates for the registry.
    place.refused(
        &["push", "--store", &store, &to],
        1,
        &["the server answers 400", "hint: if this server speaks HTTPS, put its CA into certs.d"],
    );
    place.refused(&["push", "--store", &store, &to, "--cert-dir", &trusted], 1, &["access denied (401"]);
    let right = auth_file(&place, "right.json", &registry.host(), "u:hunter2");
    place.ok(&["push", "--store", &store, &to, "--cert-dir", &trusted, "--authfile", &right]);
    place.ok(&pull(&to, &copy, &["--cert-dir", &trusted, "--authfile", &right]));
}

const HTPASSWD: &str = "u:$2b$04$eGoycTz04ZVpM40o9jF7L.AzjrT9luyLUoZ/0K/fsfRLH3v6/waHu\n";
