//! `trust/`: trust that is taken back, or was never given: revoked certificates, intermediates for other uses, and
//! private keys in public files.

#[path = "common/pki.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod pki;

use mosfs::internals::error::{Class, Classified};
use mosfs::internals::manifest::SystemManifest;
use mosfs::internals::trust::config::CaFile;
use mosfs::internals::trust::{Anchor, Dates, SignError, Signed, SigningKey, TrustError, Verified};
use pki::{CA, PRODUCT, Pki, mosfs};

/// Verifies the manifest of the device with a signature and a certificate, by file name.
fn verify(pki: &Pki, sig: &str, cert: &str) -> Result<Verified, TrustError> {
    let signed = Signed {
        manifest: pki.read("m.json"),
        signature: pki.read(sig),
        certificate: pki.read(cert),
        floor_signature: None,
    };
    let ca = CaFile::load(&pki.path("ca.pem")).unwrap();
    signed.verify(&Anchor::new(ca, PRODUCT.parse().unwrap()), Dates::check_now())
}

#[test]
fn intermediates_issue_only_for_what_they_are_for() {
    // Rule (RFC 5280, section 4.2.1.12): "the certificate MUST only be used for one of the purposes indicated".
    let pki = Pki::with_ca();
    for (name, usage, good) in [
        ("tls-ca", "extendedKeyUsage=serverAuth,clientAuth\n", false),
        ("own-ca", "extendedKeyUsage=1.2.3.4\n", false),
        ("code-ca", "extendedKeyUsage=codeSigning\n", true),
        ("any-ca", "extendedKeyUsage=anyExtendedKeyUsage\n", true),
        ("plain-ca", "", true),
    ] {
        let (leaf, extensions) = (format!("{name}-leaf"), format!("{CA}{usage}"));
        pki.key(name, "ec:P-256").issue(name, &format!("/CN={name}"), "ca", &extensions, &[]);
        pki.signer(&leaf, "ec:P-256", name).sign(&leaf);
        pki.write("chain.pem", [pki.read(&format!("{leaf}.pem")), pki.read(&format!("{name}.pem"))].concat());
        let sig = format!("{leaf}.sig");
        if good {
            verify(&pki, &sig, "chain.pem").unwrap();
            continue;
        }
        let error = verify(&pki, &sig, "chain.pem").unwrap_err();
        assert_eq!(error.class(), Class::Verification);
        assert!(
            matches!(&error, TrustError::WrongUsage { certificate, extension: "extendedKeyUsage", lacks: "codeSigning" }
                if *certificate == format!("CN={name}")),
            "{error}"
        );
    }
}

#[test]
fn a_certificate_that_its_issuer_revoked_is_refused_wherever_it_stands_in_the_chain() {
    let pki = Pki::with_ca();
    pki.key("middle", "ec:P-256").issue("middle", "/CN=Middle", "ca", CA, &[]);
    pki.signer("good", "ec:P-256", "ca").sign("good");
    pki.signer("bad", "ec:P-256", "ca").sign("bad");
    pki.signer("deep", "ec:P-256", "middle").sign("deep");
    pki.write("deep-chain.pem", [pki.read("deep.pem"), pki.read("middle.pem")].concat());
    let verified = |name: &str, cert: &str, crl: &str| {
        let words = ["manifest", "verify", "m.json", "--sig"].map(String::from).to_vec();
        let path = |name: &str| pki.path(name).to_string_lossy().into_owned();
        let more = [path(&format!("{name}.sig")), "--cert".into(), path(cert), "--ca".into(), path("ca.pem")];
        let mut words = [words, more.to_vec()].concat();
        words[2] = path("m.json");
        if !crl.is_empty() {
            words.extend(["--crl".to_string(), path(crl)]);
        }
        let words: Vec<&dyn AsRef<std::ffi::OsStr>> = words.iter().map(|word| word as _).collect();
        let output = mosfs(&words);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    pki.revoke("bad", "ca").crl("ca", "one.pem");
    assert_eq!(verified("bad", "bad.pem", "").0, Some(0), "without the list");
    let (code, said) = verified("bad", "bad.pem", "one.pem");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("was revoked by `CN=Manifest CA` at ") && said.contains("hint: "), "{said}");
    assert_eq!(verified("good", "good.pem", "one.pem").0, Some(0));
    assert_eq!(verified("deep", "deep-chain.pem", "one.pem").0, Some(0));
    // An intermediate, by the CA; a signer below an intermediate, by the intermediate.
    pki.revoke("middle", "ca").crl("ca", "two.pem");
    let (code, said) = verified("deep", "deep-chain.pem", "two.pem");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("`CN=Middle` was revoked by `CN=Manifest CA`"), "{said}");
    pki.revoke("deep", "middle").crl("middle", "three.pem");
    pki.write("both.pem", [pki.read("one.pem"), pki.read("three.pem")].concat());
    let (code, said) = verified("deep", "deep-chain.pem", "both.pem");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("was revoked by `CN=Middle`"), "{said}");
    // A list of another key with the intermediate's name says nothing about what the intermediate issued.
    let forger = Pki::new();
    for file in ["deep.pem", "good.pem"] {
        std::fs::copy(pki.path(file), forger.path(file)).unwrap();
    }
    forger.root("middle", "/CN=Middle", CA).revoke("deep", "middle").crl("middle", "forged.pem");
    pki.write("forged.pem", forger.read("forged.pem"));
    assert_eq!(verified("deep", "deep-chain.pem", "forged.pem").0, Some(0));
    // With the CA's name it is an error, not a silence.
    forger.root("ca", "/CN=Manifest CA", CA).revoke("good", "ca").crl("ca", "forged-ca.pem");
    pki.write("forged-ca.pem", forger.read("forged-ca.pem"));
    let (code, said) = verified("good", "good.pem", "forged-ca.pem");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("is not signed by that CA"), "{said}");
}

#[test]
fn a_private_key_in_a_public_file_is_refused_wherever_one_is_taken() {
    let pki = Pki::with_ca();
    pki.signer("ec", "ec:P-256", "ca").sign("ec");
    let keys = pki.path("keys");
    assert!(mosfs(&[&"keys", &"generate", &keys, &"--product", &PRODUCT]).status.success());
    // Of each kind, before and behind what is public.
    pki.openssl(&["ec", "-in", "ec.key", "-out", "sec1.key"]);
    pki.openssl(&["pkey", "-in", "ec.key", "-aes256", "-passout", "pass:x", "-out", "encrypted.key"]);
    for key in ["ec.key", "sec1.key", "encrypted.key"] {
        for first in [true, false] {
            let join = |public: Vec<u8>| {
                let key = pki.read(key);
                if first { [key, public] } else { [public, key] }.concat()
            };
            let manifest = SystemManifest::parse(&pki.read("m.json")).unwrap();
            let signer = SigningKey::load(&pki.path("ec.key")).unwrap();
            let error = Signed::create(&manifest, &signer, &join(pki.read("ec.pem")), Dates::check_now());
            let error = error.unwrap_err();
            assert_eq!(error.class(), Class::Input);
            assert!(
                matches!(&error, SignError::Certificate(TrustError::PrivateKey { label }) if label.ends_with("PRIVATE KEY")),
                "{error}"
            );
            let public = |name: &str| {
                pki.write("both.pem", join(std::fs::read(keys.join(name)).unwrap()));
                pki.path("both.pem")
            };
            let said = |words: &[&dyn AsRef<std::ffi::OsStr>]| {
                let output = mosfs(words);
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert_eq!(output.status.code(), Some(2), "{said}");
                assert!(said.contains("both.pem holds a private key (`"), "{said}");
                assert!(said.contains("hint: give a file with public data only"), "{said}");
            };
            let (json, sig, cert) = (pki.path("m.json"), pki.path("ec.sig"), pki.path("ec.pem"));
            let ca = pki.path("ca.pem");
            pki.write("both.pem", join(pki.read("ca.pem")));
            let both = pki.path("both.pem");
            said(&[&"manifest", &"verify", &json, &"--sig", &sig, &"--cert", &cert, &"--ca", &both]);
            said(&[&"install", &"oci:/nowhere", &"--product", &PRODUCT, &"--ca", &both]);
            pki.write("both.pem", join(pki.read("ec.pem")));
            said(&[&"manifest", &"verify", &json, &"--sig", &sig, &"--cert", &both, &"--ca", &ca]);
            let both = public("provision.pub");
            let (floor, product) = (keys.join("floor.key"), PRODUCT);
            said(&[
                &"floor",
                &"authorize",
                &"--provision-pub",
                &both,
                &"--key",
                &floor,
                &"--product",
                &product,
            ]);
            let both = public("floor.pub");
            let (key, system) = (keys.join("provision.key"), pki.path("system"));
            said(&[
                &"floor",
                &"provision",
                &"--provision-key",
                &key,
                &"--floor-pub",
                &both,
                &"--product",
                &product,
                &"--system",
                &system,
                &"--config",
                &pki.path("config"),
                &"--floor",
                &"file",
            ]);
        }
    }
    // What is signed carries the certificates alone, whatever else stands in the file.
    let noisy =
        [b"a comment\n".to_vec(), pki.read("ec.pem"), pki.read("ca.pem"), b"more\n".to_vec()].concat();
    let manifest = SystemManifest::parse(&pki.read("m.json")).unwrap();
    let signer = SigningKey::load(&pki.path("ec.key")).unwrap();
    let signed = Signed::create(&manifest, &signer, &noisy, Dates::check_now()).unwrap();
    let expected = pki.openssl(&["x509", "-in", "ec.pem"]).stdout;
    assert_eq!(signed.certificate, [expected, pki.openssl(&["x509", "-in", "ca.pem"]).stdout].concat());
}
