//! Trust: what is right is verified, whoever made it; each attack is refused with an error of its
//! own, by the library and by the command, which exits with 3.

#[path = "common/pki.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod pki;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mosfs::internals::digest::Digest;
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::manifest::{SystemError, SystemManifest};
use mosfs::internals::trust::config::CaFile;
use mosfs::internals::trust::{
    Anchor, ConfigError, Dates, KeyError, SignError, Signed, SigningKey, TrustError, Verified,
};
use pki::{CA, OTHER_PRODUCT, PRODUCT, Pki, SIGNER, manifest_of, mode, mosfs, signer_of};
use uuid::Uuid;

fn product() -> Uuid {
    PRODUCT.parse().unwrap()
}

fn anchor(pki: &Pki) -> Anchor {
    Anchor::new(CaFile::load(&pki.path("ca.pem")).unwrap(), product())
}

/// The parts of a signed manifest, by file name.
fn signed(pki: &Pki, manifest: &str, sig: &str, cert: &str) -> Signed {
    Signed {
        manifest: pki.read(manifest),
        signature: pki.read(sig),
        certificate: pki.read(cert),
        floor_signature: None,
    }
}

fn verify(pki: &Pki, manifest: &str, sig: &str, cert: &str) -> Result<Verified, TrustError> {
    signed(pki, manifest, sig, cert).verify(&anchor(pki), Dates::check_now())
}

/// Runs `mosfs manifest verify` for the device's product; returns exit code and stderr.
fn verify_command(pki: &Pki, manifest: &str, sig: &str, cert: &str) -> (Option<i32>, String) {
    let [manifest, sig, cert, ca] = [manifest, sig, cert, "ca.pem"].map(|name| pki.path(name));
    let output = mosfs(&[
        &"manifest",
        &"verify",
        &manifest,
        &"--sig",
        &sig,
        &"--cert",
        &cert,
        &"--ca",
        &ca,
        &"--product",
        &PRODUCT,
    ]);
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Requires that library and command refuse, and returns the library's error.
fn refused(pki: &Pki, manifest: &str, sig: &str, cert: &str) -> TrustError {
    let error = verify(pki, manifest, sig, cert).expect_err("should be refused");
    assert_eq!(error.class(), Class::Verification, "{error}");
    let (code, stderr) = verify_command(pki, manifest, sig, cert);
    assert_eq!(code, Some(3), "{error}: {stderr}");
    assert!(stderr.starts_with(&format!("mosfs: {error}\n")), "`{stderr}` should say `{error}`");
    error
}

/// Requires that an expression is of a variant, and says what it is if not.
macro_rules! assert_is {
    ($error:expr, $variant:pat $(if $guard:expr)?) => {{
        let error = $error;
        assert!(matches!(&error, $variant $(if $guard)?), "expected {}, found {error:?}", stringify!($variant));
    }};
}

#[test]
fn what_openssl_signs_is_verified() {
    let pki = Pki::with_ca();
    for (name, kind) in [("ec", "ec:P-256"), ("rsa2", "rsa:2048"), ("rsa3", "rsa:3072")] {
        pki.signer(name, kind, "ca").sign(name);
        let verified = verify(&pki, "m.json", &format!("{name}.sig"), &format!("{name}.pem")).unwrap();
        assert_eq!(verified.digest(), Digest::of(manifest_of(PRODUCT).as_bytes()));
        assert_eq!(verified.bytes(), manifest_of(PRODUCT).as_bytes());
        assert_eq!(verified.manifest().version, 200);
        assert_eq!((verified.signer().name.as_str(), verified.signer().product), ("default", product()));
        let (code, stderr) = verify_command(&pki, "m.json", &format!("{name}.sig"), &format!("{name}.pem"));
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
    }
}

#[test]
fn what_mosfs_signs_openssl_verifies() {
    let pki = Pki::with_ca();
    for rsa in [false, true] {
        let dir = pki.path(if rsa { "rsa" } else { "ecdsa" });
        let option: &[&dyn AsRef<std::ffi::OsStr>] = if rsa { &[&"--rsa"] } else { &[] };
        let words: &[&dyn AsRef<std::ffi::OsStr>] = &[&"keys", &"generate", &dir, &"--product", &PRODUCT];
        assert!(mosfs(&[words, option].concat()).status.success());
        let (key, sig) = (dir.join("signer.key"), dir.join("m.sig"));
        let output = mosfs(&[&"manifest", &"sign", &pki.path("m.json"), &"--key", &key, &"-o", &sig]);
        assert!(output.status.success(), "{output:?}");
        let dir = dir.to_str().unwrap();
        let (cert, public) = (format!("{dir}/signer.pem"), format!("{dir}/signer.pub"));
        pki.openssl(&["x509", "-in", &cert, "-noout", "-pubkey", "-out", &public]);
        let verified = pki.openssl(&[
            "dgst",
            "-sha256",
            "-verify",
            &public,
            "-signature",
            &format!("{dir}/m.sig"),
            "m.json",
        ]);
        assert_eq!(verified.stdout, b"Verified OK\n");
        // OpenSSL's own verification of the chain, as strict as it can be.
        let ca = format!("{dir}/ca.pem");
        pki.openssl(&["verify", "-x509_strict", "-auth_level", "2", "-no-CApath", "-CAfile", &ca, &cert]);
    }
}

#[test]
fn the_signature_is_beside_the_manifest_unless_told_otherwise() {
    let pki = Pki::with_ca();
    pki.signer("ec", "ec:P-256", "ca");
    let output = mosfs(&[&"manifest", &"sign", &pki.path("m.json"), &"--key", &pki.path("ec.key")]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("m.json.sig"));
    verify(&pki, "m.json", "m.json.sig", "ec.pem").unwrap();
    // What no device would accept is not signed.
    pki.write("spaced.json", manifest_of(PRODUCT).replace(',', ", "));
    let output = mosfs(&[&"manifest", &"sign", &pki.path("spaced.json"), &"--key", &pki.path("ec.key")]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!pki.path("spaced.json.sig").exists());
}

#[test]
fn certificates_of_other_cas_are_refused() {
    let pki = Pki::with_ca();
    // A CA with the name of the right one, with and without key identifiers; and one of another name.
    pki.root("twin", "/CN=Manifest CA", CA).signer("twin-signer", "ec:P-256", "twin").sign("twin-signer");
    assert_is!(
        refused(&pki, "m.json", "twin-signer.sig", "twin-signer.pem"),
        TrustError::UntrustedCertificate { ca, .. } if ca == "CN=Manifest CA"
    );
    let bare = "basicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=none\n";
    pki.root("bare", "/CN=Manifest CA", bare).key("bare-signer", "ec:P-256");
    let extensions = "subjectKeyIdentifier=none\nauthorityKeyIdentifier=none\n";
    pki.issue("bare-signer", &signer_of(PRODUCT), "bare", extensions, &[]).sign("bare-signer");
    assert_is!(
        refused(&pki, "m.json", "bare-signer.sig", "bare-signer.pem"),
        TrustError::UntrustedCertificate { issuer, .. } if issuer == "CN=Manifest CA"
    );
    pki.root("other", "/CN=Other CA", CA).signer("other-signer", "ec:P-256", "other").sign("other-signer");
    assert_is!(
        refused(&pki, "m.json", "other-signer.sig", "other-signer.pem"),
        TrustError::IncompleteChain { issuer, ca, .. } if issuer == "CN=Other CA" && ca == "CN=Manifest CA"
    );
    // A CA that comes along with its certificate is still not the device's.
    pki.write("chain.pem", [pki.read("other-signer.pem"), pki.read("other.pem")].concat());
    assert_is!(
        refused(&pki, "m.json", "other-signer.sig", "chain.pem"),
        TrustError::UntrustedCertificate { .. }
    );
    // Nor is one that the environment offers as the system's.
    let [manifest, sig, cert, ca] =
        ["m.json", "other-signer.sig", "other-signer.pem", "ca.pem"].map(|n| pki.path(n));
    let output = Command::new(env!("CARGO_BIN_EXE_mosfs"))
        .args(["manifest", "verify"])
        .arg(manifest)
        .args([Path::new("--sig"), &sig, Path::new("--cert"), &cert, Path::new("--ca"), &ca])
        .env("SSL_CERT_FILE", pki.path("other.pem"))
        .env("SSL_CERT_DIR", pki.dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[test]
fn self_signed_certificates_are_refused() {
    let pki = Pki::with_ca();
    pki.root("me", &signer_of(PRODUCT), SIGNER).sign("me");
    assert_is!(
        refused(&pki, "m.json", "me.sig", "me.pem"),
        TrustError::SelfSigned { certificate, .. } if certificate.contains(PRODUCT)
    );
    // With the CA's certificate behind it, it is no better.
    pki.write("both.pem", [pki.read("me.pem"), pki.read("ca.pem")].concat());
    assert_is!(refused(&pki, "m.json", "me.sig", "both.pem"), TrustError::SelfSigned { .. });
    // A CA that signs manifests itself, with the CN of a signer.
    pki.root("ca", &signer_of(PRODUCT), CA).sign("ca");
    assert_is!(refused(&pki, "m.json", "ca.sig", "ca.pem"), TrustError::SelfSigned { .. });
}

#[test]
fn chains_have_to_be_whole_and_of_cas() {
    let pki = Pki::with_ca();
    pki.key("middle", "ec:P-256").issue("middle", "/CN=Middle", "ca", CA, &[]);
    pki.signer("leaf", "ec:P-256", "middle").sign("leaf");
    assert_is!(
        refused(&pki, "m.json", "leaf.sig", "leaf.pem"),
        TrustError::IncompleteChain { issuer, .. } if issuer == "CN=Middle"
    );
    pki.write("chain.pem", [pki.read("leaf.pem"), pki.read("middle.pem")].concat());
    verify(&pki, "m.json", "leaf.sig", "chain.pem").unwrap();
    // Also where the CA that the device was given is itself an intermediate.
    let ca = CaFile::load(&pki.path("middle.pem")).unwrap();
    let outcome =
        signed(&pki, "m.json", "leaf.sig", "leaf.pem").verify(&Anchor::new(ca, product()), Dates::LogOnly);
    outcome.unwrap();
    // But the signer is never its own anchor.
    let ca = CaFile::load(&pki.path("leaf.pem")).unwrap();
    let outcome =
        signed(&pki, "m.json", "leaf.sig", "leaf.pem").verify(&Anchor::new(ca, product()), Dates::LogOnly);
    assert_is!(outcome.unwrap_err(), TrustError::SelfSigned { .. });

    // A signer that issues certificates; one whose own says nothing about CAs; one that only says
    // what its key is for, which OpenSSL takes for a CA.
    for (name, extensions) in [
        ("signer", SIGNER),
        ("not-ca", "basicConstraints=critical,CA:FALSE\n"),
        ("silent", "subjectKeyIdentifier=hash\n"),
        ("usage", "keyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n"),
    ] {
        let leaf = format!("{name}-leaf");
        pki.key(name, "ec:P-256").issue(name, &format!("/CN={name}"), "ca", extensions, &[]);
        pki.signer(&leaf, "ec:P-256", name).sign(&leaf);
        pki.write("chain.pem", [pki.read(&format!("{leaf}.pem")), pki.read(&format!("{name}.pem"))].concat());
        assert_is!(
            refused(&pki, "m.json", &format!("{leaf}.sig"), "chain.pem"),
            TrustError::NotACa { certificate } if *certificate == format!("CN={name}")
        );
    }
    // A CA that may have no CA below it.
    let short = CA.replace("CA:TRUE", "CA:TRUE,pathlen:0");
    pki.key("short", "ec:P-256").issue("short", "/CN=Short", "ca", &short, &[]);
    pki.key("below", "ec:P-256").issue("below", "/CN=Below", "short", CA, &[]);
    pki.signer("deep", "ec:P-256", "below").sign("deep");
    let chain = ["deep.pem", "below.pem", "short.pem"].map(|name| pki.read(name)).concat();
    pki.write("chain.pem", chain);
    assert_is!(refused(&pki, "m.json", "deep.sig", "chain.pem"), TrustError::BadChain { reason, .. } if reason.contains("path length"));
    // An extension that nobody understands, marked as critical.
    let unknown = format!("{SIGNER}1.2.3.4=critical,DER:0500\n");
    pki.key("odd", "ec:P-256").issue("odd", &signer_of(PRODUCT), "ca", &unknown, &[]).sign("odd");
    assert_is!(refused(&pki, "m.json", "odd.sig", "odd.pem"), TrustError::BadChain { reason, .. } if reason.contains("critical"));
}

#[test]
fn dates_are_checked_or_only_logged() {
    let pki = Pki::with_ca();
    pki.dated_signer("old", "ca", "20200101000000Z", "20210101000000Z").sign("old");
    pki.dated_signer("new", "ca", "21000101000000Z", "21010101000000Z").sign("new");
    assert_is!(
        refused(&pki, "m.json", "old.sig", "old.pem"),
        TrustError::Expired { not_after, .. } if not_after == "Jan  1 00:00:00 2021 GMT"
    );
    assert_is!(
        refused(&pki, "m.json", "new.sig", "new.pem"),
        TrustError::NotYetValid { not_before, .. } if not_before == "Jan  1 00:00:00 2100 GMT"
    );
    for name in ["old", "new"] {
        let both = signed(&pki, "m.json", &format!("{name}.sig"), &format!("{name}.pem"));
        both.verify(&anchor(&pki), Dates::LogOnly).unwrap();
    }
    // On the last second it is valid still, one later it is not.
    let last = UNIX_EPOCH + Duration::from_secs(1_609_459_200);
    let at = |time| signed(&pki, "m.json", "old.sig", "old.pem").verify(&anchor(&pki), Dates::Check(time));
    let ca_too = at(last).unwrap_err();
    assert_is!(ca_too, TrustError::NotYetValid { certificate, .. } if certificate == "CN=Manifest CA");
    assert_is!(at(last + Duration::from_secs(1)).unwrap_err(), TrustError::Expired { .. });
    assert_is!(at(SystemTime::UNIX_EPOCH).unwrap_err(), TrustError::NotYetValid { .. });
    // The CA's own dates count as well.
    pki.signer("ec", "ec:P-256", "ca").sign("ec");
    let far = Dates::Check(UNIX_EPOCH + Duration::from_secs(5_000_000_000));
    let outcome = signed(&pki, "m.json", "ec.sig", "ec.pem").verify(&anchor(&pki), far);
    assert_is!(outcome.unwrap_err(), TrustError::Expired { .. });
}

#[test]
fn other_products_are_refused() {
    let pki = Pki::with_ca();
    let (ours, theirs) = (product(), OTHER_PRODUCT.parse::<Uuid>().unwrap());
    pki.write("other.json", manifest_of(OTHER_PRODUCT));
    // Another product of the same publisher, all of it.
    pki.key("theirs", "ec:P-256").issue("theirs", &signer_of(OTHER_PRODUCT), "ca", SIGNER, &[]);
    pki.sign_with("theirs", "other.json", "theirs.sig", &["-sha256"]);
    assert_is!(
        refused(&pki, "other.json", "theirs.sig", "theirs.pem"),
        TrustError::OtherProduct { certificate, device } if (*certificate, *device) == (theirs, ours)
    );
    // Their signer on our manifest.
    pki.sign("theirs");
    assert_is!(refused(&pki, "m.json", "theirs.sig", "theirs.pem"), TrustError::OtherProduct { .. });
    // Our signer on their manifest.
    pki.signer("ours", "ec:P-256", "ca").sign_with("ours", "other.json", "ours.sig", &["-sha256"]);
    assert_is!(
        refused(&pki, "other.json", "ours.sig", "ours.pem"),
        TrustError::ManifestOtherProduct { manifest, certificate } if (*manifest, *certificate) == (theirs, ours)
    );
    // Without --product it is the certificate's that counts, and the manifest's has to equal it.
    let [manifest, sig, cert, ca] =
        ["other.json", "ours.sig", "ours.pem", "ca.pem"].map(|name| pki.path(name));
    let output = mosfs(&[&"manifest", &"verify", &manifest, &"--sig", &sig, &"--cert", &cert, &"--ca", &ca]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[test]
fn the_cn_binds_to_one_product() {
    let pki = Pki::with_ca();
    for (name, subject) in [
        ("none", "/O=nobody".to_string()),
        ("bare", format!("/CN={PRODUCT}")),
        ("word", format!("/CN=Manifest default:{PRODUCT}")),
        ("name", format!("/CN=manifest {PRODUCT}")),
        ("tail", format!("/CN=manifest default:{PRODUCT}x")),
        ("unit", format!("/CN=default/OU=manifest default:{PRODUCT}")),
        ("two", format!("/CN=manifest a:{OTHER_PRODUCT}/CN=manifest a:{PRODUCT}")),
        ("same", format!("/CN=manifest a:{PRODUCT}/CN=manifest a:{PRODUCT}")),
    ] {
        pki.key(name, "ec:P-256").issue(name, &subject, "ca", SIGNER, &[]).sign(name);
        assert_is!(
            refused(&pki, "m.json", &format!("{name}.sig"), &format!("{name}.pem")),
            TrustError::NoProduct { .. }
        );
    }
}

#[test]
fn certificates_for_other_uses_are_refused() {
    let pki = Pki::with_ca();
    for (name, extensions, lacking) in [
        ("agree", "keyUsage=critical,keyAgreement\n", "digitalSignature"),
        ("tls", "keyUsage=digitalSignature\nextendedKeyUsage=serverAuth\n", "codeSigning"),
        ("own", "extendedKeyUsage=1.2.3.4\n", "codeSigning"),
    ] {
        pki.key(name, "ec:P-256").issue(name, &signer_of(PRODUCT), "ca", extensions, &[]).sign(name);
        assert_is!(
            refused(&pki, "m.json", &format!("{name}.sig"), &format!("{name}.pem")),
            TrustError::WrongUsage { lacks, .. } if *lacks == lacking
        );
    }
    // A certificate that says nothing about its use, or says code signing, is fine.
    for (name, extensions) in [("plain", ""), ("code", "extendedKeyUsage=codeSigning\n")] {
        pki.key(name, "ec:P-256").issue(name, &signer_of(PRODUCT), "ca", extensions, &[]).sign(name);
        verify(&pki, "m.json", &format!("{name}.sig"), &format!("{name}.pem")).unwrap();
    }
}

#[test]
fn weak_and_unknown_algorithms_are_refused() {
    let pki = Pki::with_ca();
    pki.signer("small", "rsa:1024", "ca").sign("small");
    assert_is!(refused(&pki, "m.json", "small.sig", "small.pem"), TrustError::WeakCertificate { .. });
    pki.key("sha1", "ec:P-256").issue("sha1", &signer_of(PRODUCT), "ca", SIGNER, &["-sha1"]).sign("sha1");
    assert_is!(refused(&pki, "m.json", "sha1.sig", "sha1.pem"), TrustError::WeakCertificate { .. });
    for (name, kind, found) in [
        ("p384", "ec:P-384", "ECDSA on secp384r1"),
        ("k256", "ec:secp256k1", "ECDSA on secp256k1"),
        ("rsa-pss", "RSA-PSS", "RSA-PSS"),
    ] {
        pki.signer(name, kind, "ca").sign(name);
        assert_is!(
            refused(&pki, "m.json", &format!("{name}.sig"), &format!("{name}.pem")),
            TrustError::UnsupportedKey { found: this } if this == found
        );
    }
    pki.signer("ed", "ED25519", "ca").write("ed.sig", [0; 64]);
    assert_is!(refused(&pki, "m.json", "ed.sig", "ed.pem"), TrustError::UnsupportedKey { found } if found == "Ed25519");

    // The right keys with the wrong digest or padding.
    pki.signer("rsa", "rsa:2048", "ca").signer("ec", "ec:P-256", "ca");
    let pss: &[&str] = &["-sha256", "-sigopt", "rsa_padding_mode:pss"];
    for (key, options) in [
        ("rsa", &["-sha1"][..]),
        ("rsa", &["-sha512"]),
        ("rsa", pss),
        ("ec", &["-sha1"]),
        ("ec", &["-sha384"]),
    ] {
        pki.sign_with(key, "m.json", "odd.sig", options);
        assert_is!(
            refused(&pki, "m.json", "odd.sig", &format!("{key}.pem")),
            TrustError::BadSignature { .. }
        );
    }
}

#[test]
fn signatures_of_other_files_and_keys_are_refused() {
    let pki = Pki::with_ca();
    pki.write("older.json", manifest_of(PRODUCT).replace("200", "199"));
    for (name, kind) in [("rsa", "rsa:2048"), ("ec", "ec:P-256")] {
        let (sig, cert) = (format!("{name}.sig"), format!("{name}.pem"));
        pki.signer(name, kind, "ca").sign_with(name, "older.json", &sig, &["-sha256"]);
        let digest = Digest::of(manifest_of(PRODUCT).as_bytes());
        assert_is!(refused(&pki, "m.json", &sig, &cert), TrustError::BadSignature { manifest } if *manifest == digest);
        // Another signer of the same product.
        pki.signer("second", kind, "ca").sign("second");
        assert_is!(refused(&pki, "m.json", "second.sig", &cert), TrustError::BadSignature { .. });
        // A signature that was cut, emptied, or lengthened.
        pki.sign(name);
        let whole = pki.read(&sig);
        for length in [0, 1, 8, whole.len() / 2, whole.len() - 1] {
            pki.write("cut.sig", &whole[..length]);
            assert_is!(
                refused(&pki, "m.json", "cut.sig", &cert),
                TrustError::TruncatedSignature { found, .. } if *found == length
            );
        }
        pki.write("long.sig", [&whole[..], b"\n"].concat());
        assert_is!(refused(&pki, "m.json", "long.sig", &cert), TrustError::MalformedSignature { .. });
        pki.write("huge.sig", vec![0; 5000]);
        assert_is!(
            refused(&pki, "m.json", "huge.sig", &cert),
            TrustError::TooLarge { what: "signature", .. }
        );
    }
}

#[test]
fn truncated_and_garbled_files_are_refused() {
    let pki = Pki::with_ca();
    pki.signer("ec", "ec:P-256", "ca").sign("ec");
    let (manifest, cert) = (pki.read("m.json"), pki.read("ec.pem"));
    for length in [0, 1, manifest.len() / 2, manifest.len() - 1] {
        pki.write("cut.json", &manifest[..length]);
        assert_is!(refused(&pki, "cut.json", "ec.sig", "ec.pem"), TrustError::BadSignature { .. });
    }
    for length in [0, 10, 40, cert.len() / 2, cert.len() - 10] {
        pki.write("cut.pem", &cert[..length]);
        assert_is!(refused(&pki, "m.json", "ec.sig", "cut.pem"), TrustError::UnreadableCertificate { .. });
    }
    // The second certificate of a file counts as well.
    pki.write("cut.pem", [&cert[..], &cert[..cert.len() / 2]].concat());
    assert_is!(refused(&pki, "m.json", "ec.sig", "cut.pem"), TrustError::UnreadableCertificate { .. });
    for garbage in
        [&b"garbage"[..], &[0; 100], b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    {
        pki.write("bad.pem", garbage);
        assert_is!(refused(&pki, "m.json", "ec.sig", "bad.pem"), TrustError::UnreadableCertificate { .. });
    }
    pki.write("many.pem", cert.repeat(9));
    assert_is!(refused(&pki, "m.json", "ec.sig", "many.pem"), TrustError::UnreadableCertificate { .. });
    pki.write("huge.pem", vec![b'\n'; (64 << 10) + 1]);
    assert_is!(
        refused(&pki, "m.json", "ec.sig", "huge.pem"),
        TrustError::TooLarge { what: "certificate", .. }
    );
    pki.write("huge.json", vec![b' '; (4 << 20) + 1]);
    assert_is!(refused(&pki, "huge.json", "ec.sig", "ec.pem"), TrustError::TooLarge { what: "manifest", .. });
}

#[test]
fn every_changed_byte_of_a_signed_manifest_is_refused() {
    let pki = Pki::with_ca();
    pki.signer("ec", "ec:P-256", "ca").sign("ec");
    let anchor = anchor(&pki);
    let good = signed(&pki, "m.json", "ec.sig", "ec.pem");
    good.clone().verify(&anchor, Dates::LogOnly).unwrap();
    for at in 0..good.manifest.len() {
        for xor in [0x01, 0x20, 0x80] {
            let mut bad = good.clone();
            bad.manifest[at] ^= xor;
            assert_is!(bad.verify(&anchor, Dates::LogOnly).unwrap_err(), TrustError::BadSignature { .. });
        }
    }
    for at in 0..good.signature.len() {
        let mut bad = good.clone();
        bad.signature[at] ^= 0x01;
        assert_is!(
            bad.verify(&anchor, Dates::LogOnly).unwrap_err(),
            TrustError::BadSignature { .. }
                | TrustError::MalformedSignature { .. }
                | TrustError::TruncatedSignature { .. }
        );
    }
}

#[test]
fn what_is_signed_is_read_strictly() {
    let pki = Pki::with_ca();
    pki.signer("ec", "ec:P-256", "ca");
    let good = manifest_of(PRODUCT);
    for (file, expected) in [
        (good.replace(',', ", "), "form"),
        (format!("{good}\n"), "form"),
        (good.replace("\"version\":200", "\"version\":200,\"version\":201"), "json"),
        (good.replace("\"version\":200", "\"version\":200,\"x\":1"), "fields"),
        (String::from("hello"), "json"),
    ] {
        pki.write("odd.json", &file);
        pki.sign_with("ec", "odd.json", "odd.sig", &["-sha256"]);
        match (refused(&pki, "odd.json", "odd.sig", "ec.pem"), expected) {
            (TrustError::Manifest(SystemError::NotCanonical { .. }), "form")
            | (TrustError::Manifest(SystemError::Json(_)), "json")
            | (TrustError::Manifest(SystemError::Fields(_)), "fields") => {}
            (error, expected) => panic!("{file}: expected {expected}, found {error:?}"),
        }
    }
}

fn generate(dir: &Path, more: &[&dyn AsRef<std::ffi::OsStr>]) -> std::process::Output {
    let words: [&dyn AsRef<std::ffi::OsStr>; 5] = [&"keys", &"generate", &dir, &"--product", &PRODUCT];
    mosfs(&[&words, more].concat())
}

const KEY_FILES: [&str; 8] = [
    "ca.key",
    "ca.pem",
    "floor.key",
    "floor.pub",
    "provision.key",
    "provision.pub",
    "signer.key",
    "signer.pem",
];

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn generated_keys_are_private_and_never_overwritten() {
    let pki = Pki::new();
    let dir = pki.path("new/keys");
    let output = generate(&dir, &[&"--name", &"ran"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(names(&dir), KEY_FILES);
    for name in KEY_FILES {
        let expected = if name.ends_with(".key") { 0o600 } else { mode(&dir.join(name)) };
        assert_eq!(mode(&dir.join(name)), expected, "{name}");
        assert_eq!(mode(&dir.join(name)) & 0o022, 0, "{name}");
    }
    let subject =
        pki.openssl(&["x509", "-in", "new/keys/signer.pem", "-noout", "-subject", "-nameopt", "RFC2253"]);
    assert_eq!(String::from_utf8(subject.stdout).unwrap(), format!("subject=CN=manifest ran:{PRODUCT}\n"));
    // Floor and provisioning keys are P-256 pairs (docs/floor.md).
    for name in ["floor", "provision"] {
        let (key, public) = (format!("new/keys/{name}.key"), format!("new/keys/{name}.pub"));
        let made = pki.openssl(&["pkey", "-in", &key, "-pubout"]).stdout;
        // The provisioning key's authorization follows it.
        assert!(pki.read(&public).starts_with(&made));
        let text = pki.openssl(&["pkey", "-in", &key, "-noout", "-text"]).stdout;
        assert!(String::from_utf8(text).unwrap().contains("NIST CURVE: P-256"));
    }

    let before: Vec<_> = KEY_FILES.iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
    let output = generate(&dir, &[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let after: Vec<_> = KEY_FILES.iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
    assert!(before == after);
    // One file in the way, even a dangling link, and none is written.
    let dir = pki.path("occupied");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("provision.pub")).unwrap();
    assert_eq!(generate(&dir, &[]).status.code(), Some(2));
    assert_eq!(names(&dir), ["provision.pub"]);
    // Beside other files they fit.
    let dir = pki.path("shared");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("README"), "").unwrap();
    assert!(generate(&dir, &[]).status.success());
    assert_eq!(names(&dir).len(), 9);
}

#[test]
fn a_crash_leaves_whole_keys_only() {
    let pki = Pki::new();
    for count in [1, 4, 8] {
        let dir = pki.path(&count.to_string());
        let output = Command::new(env!("CARGO_BIN_EXE_mosfs"))
            .args(["keys", "generate", "--product", PRODUCT])
            .arg(&dir)
            .env("MOSFS_FAILPOINT", format!("keys.file.linked:{count}"))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), None, "killed at the failpoint: {output:?}");
        let made: Vec<_> = names(&dir).into_iter().filter(|name| !name.starts_with('.')).collect();
        assert_eq!(made.len(), count);
        for name in made {
            let text = fs::read_to_string(dir.join(&name)).unwrap();
            assert!(text.trim_end().ends_with("-----"), "{name}: {text}");
        }
        assert_eq!(generate(&dir, &[]).status.code(), Some(2), "and none is overwritten");
    }
}

#[test]
fn names_and_products_of_keys_have_to_fit_into_a_certificate() {
    let pki = Pki::new();
    let dir = pki.path("keys");
    // RFC 5280 gives a CN 64 characters, of which `manifest `, `:` and the UUID take 46.
    for name in ["", "a-name-of-19-letter", "a\nb"] {
        let output = generate(&dir, &[&"--name", &name]);
        assert_eq!(output.status.code(), Some(2), "{name:?}: {output:?}");
    }
    let output = mosfs(&[&"keys", &"generate", &dir, &"--product", &"default"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!dir.exists());
    assert!(generate(&dir, &[&"--name", &"a-name-of-18-lette"]).status.success());
}

#[test]
fn private_keys_that_others_can_use_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let pki = Pki::with_ca();
    pki.signer("ec", "ec:P-256", "ca");
    let key = pki.path("ec.key");
    for (bits, fine) in
        [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false), (0o601, false)]
    {
        fs::set_permissions(&key, fs::Permissions::from_mode(bits)).unwrap();
        match SigningKey::load(&key) {
            Ok(_) => assert!(fine, "{bits:o}"),
            Err(KeyError::OpenToOthers { mode, .. }) => assert!(!fine && mode == bits, "{bits:o}"),
            Err(error) => panic!("{bits:o}: {error}"),
        }
    }
    let output = mosfs(&[&"manifest", &"sign", &pki.path("m.json"), &"--key", &key]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("chmod 600"));
    assert!(!pki.path("m.json.sig").exists());
}

#[test]
fn keys_that_no_device_accepts_do_not_sign() {
    let pki = Pki::with_ca();
    pki.key("small", "rsa:1024").key("p384", "ec:P-384").key("ed", "ED25519").key("ec", "ec:P-256");
    for (name, expected) in [("small", "RSA of 1024 bits"), ("p384", "ECDSA on secp384r1"), ("ed", "Ed25519")]
    {
        match SigningKey::load(&pki.path(&format!("{name}.key"))) {
            Err(KeyError::Unsupported { found, .. }) => assert_eq!(found, expected),
            other => panic!("{name}: {:?}", other.err()),
        }
    }
    // An encrypted key is an error, and not a question on the terminal.
    pki.openssl(&["pkey", "-in", "ec.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key"]);
    fs::set_permissions(pki.path("locked.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    match SigningKey::load(&pki.path("locked.key")) {
        Err(KeyError::Unreadable { reason, .. }) => assert!(reason.contains("encrypted"), "{reason}"),
        other => panic!("{:?}", other.err()),
    }
    fs::copy(pki.path("ec.key"), pki.path("cut.key")).unwrap();
    fs::write(pki.path("cut.key"), &pki.read("ec.key")[..100]).unwrap();
    assert!(matches!(SigningKey::load(&pki.path("cut.key")), Err(KeyError::Unreadable { .. })));
}

#[test]
fn the_publisher_is_told_before_any_device_is() {
    let pki = Pki::with_ca();
    pki.signer("ec", "ec:P-256", "ca").key("other", "ec:P-256");
    pki.dated_signer("old", "ca", "20200101000000Z", "20210101000000Z");
    pki.key("theirs", "ec:P-256").issue("theirs", &signer_of(OTHER_PRODUCT), "ca", SIGNER, &[]);
    let manifest = SystemManifest::parse(&pki.read("m.json")).unwrap();
    let create = |key: &str, cert: &str| {
        let key = SigningKey::load(&pki.path(key)).unwrap();
        Signed::create(&manifest, &key, &pki.read(cert), Dates::check_now())
    };
    let made = create("ec.key", "ec.pem").unwrap();
    assert_eq!(made.manifest, pki.read("m.json"));
    made.verify(&anchor(&pki), Dates::check_now()).unwrap();
    let error = create("other.key", "ec.pem").unwrap_err();
    assert_eq!(error.class(), Class::Input);
    assert_is!(error, SignError::KeyMismatch { certificate } if certificate.contains(PRODUCT));
    let error = create("old.key", "old.pem").unwrap_err();
    assert_eq!(error.class(), Class::Verification);
    assert_is!(error, SignError::Certificate(TrustError::Expired { .. }));
    let error = create("theirs.key", "theirs.pem").unwrap_err();
    assert_eq!(error.class(), Class::Verification);
    assert_is!(error, SignError::Certificate(TrustError::ManifestOtherProduct { .. }));
    let error = create("ec.key", "ca.pem").unwrap_err();
    assert_eq!(error.class(), Class::Input);
    assert_is!(error, SignError::Certificate(TrustError::WrongUsage { .. }));
}

#[test]
fn a_device_keeps_the_anchor_that_it_was_given_first() {
    let pki = Pki::with_ca();
    pki.root("other", "/CN=Manifest CA", CA);
    let config = pki.path("etc/mosfs");
    let load = |name: &str| CaFile::load(&pki.path(name)).unwrap();
    let other: Uuid = OTHER_PRODUCT.parse().unwrap();

    // Nothing there, and nothing given.
    assert_is!(Anchor::load(&config).unwrap_err(), ConfigError::Missing { what: "manifest CA", .. });
    let missing = |ca, product| Anchor::plan(&config, ca, product).err().unwrap();
    assert_is!(missing(None, Some(product())), ConfigError::Missing { what: "manifest CA", .. });
    let error = missing(Some(load("ca.pem")), None);
    assert_eq!(error.class(), Class::Verification);
    assert_is!(error, ConfigError::Missing { what: "product", .. });
    assert!(!config.exists(), "a plan writes nothing");

    let plan = Anchor::plan(&config, Some(load("ca.pem")), Some(product())).unwrap();
    assert_eq!(plan.writes(), [config.join("product"), config.join("manifestCA.pem")]);
    assert_eq!(plan.anchor().product(), product());
    assert!(!config.exists(), "a plan writes nothing");
    plan.apply().unwrap();
    assert_eq!(names(&config), ["manifestCA.pem", "product"]);
    assert_eq!(fs::read(config.join("manifestCA.pem")).unwrap(), pki.read("ca.pem"));
    assert_eq!(fs::read_to_string(config.join("product")).unwrap(), format!("{PRODUCT}\n"));
    assert_eq!(Anchor::load(&config).unwrap().product(), product());

    // The same again, or nothing given: nothing to write. Others: refused, naming both.
    for (ca, given) in [(None, None), (Some(load("ca.pem")), Some(product()))] {
        let plan = Anchor::plan(&config, ca, given).unwrap();
        assert!(plan.writes().is_empty());
        plan.apply().unwrap();
    }
    let error = missing(Some(load("other.pem")), None);
    assert_eq!(error.class(), Class::Verification);
    assert_is!(error, ConfigError::OtherCa { has, given, .. } if has != given);
    let error = missing(None, Some(other));
    assert_eq!(error.class(), Class::Verification);
    assert_is!(error, ConfigError::OtherProduct { has, given, .. } if (*has, *given) == (product(), other));
    assert_eq!(fs::read(config.join("manifestCA.pem")).unwrap(), pki.read("ca.pem"));

    // A file that appears after the plan is not overwritten.
    let late = pki.path("late");
    let plan = Anchor::plan(&late, Some(load("ca.pem")), Some(product())).unwrap();
    fs::create_dir(&late).unwrap();
    fs::write(late.join("manifestCA.pem"), "theirs").unwrap();
    assert_is!(plan.apply().unwrap_err(), ConfigError::Io(_));
    assert_eq!(names(&late), ["manifestCA.pem"]);
    assert_eq!(fs::read(late.join("manifestCA.pem")).unwrap(), b"theirs");
}

#[test]
fn a_config_that_cannot_be_read_trusts_nothing() {
    let pki = Pki::with_ca();
    let config = pki.path("config");
    fs::create_dir(&config).unwrap();
    fs::write(config.join("product"), "default\n").unwrap();
    fs::write(config.join("manifestCA.pem"), pki.read("ca.pem")).unwrap();
    assert_is!(Anchor::load(&config).unwrap_err(), ConfigError::BadProduct { found, .. } if found == "default\\n");
    fs::write(config.join("product"), PRODUCT).unwrap();
    Anchor::load(&config).unwrap();
    for bad in [&b""[..], b"garbage", &pki.read("ca.pem")[..200], &pki.read("ca.key")] {
        fs::write(config.join("manifestCA.pem"), bad).unwrap();
        assert_is!(Anchor::load(&config).unwrap_err(), ConfigError::BadCa { .. });
    }
    // Several CAs: any of them may end a chain.
    pki.root("next", "/CN=Next CA", CA).signer("ec", "ec:P-256", "next").sign("ec");
    fs::write(config.join("manifestCA.pem"), [pki.read("ca.pem"), pki.read("next.pem")].concat()).unwrap();
    let both = signed(&pki, "m.json", "ec.sig", "ec.pem");
    both.verify(&Anchor::load(&config).unwrap(), Dates::check_now()).unwrap();
}
