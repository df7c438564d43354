//! Digests and signatures: fixed values without a TPM, and the same from a TPM.

use std::fs;
use std::path::Path;
use std::process::Command;

use mosfs::internals::digest::hex;
use mosfs::internals::error::{Class, Classified};
use mosfs::internals::floor::digests::{MAX_VERSION, Name};
use mosfs::internals::floor::{FloorError, Policy, check_signature, sign_version};
use mosfs::internals::trust::KeyError;
use mosfs::internals::trust::p256::{P256PrivateKey, P256PublicKey};
use tempfile::tempdir;

use crate::common::swtpm::{Swtpm, run_tool, write_private};
use crate::*;

/// Worked out with another program from the formulas under "The floor's bytes" in docs/design.md for the two keys in main.rs.
const NAME_F: &str = "000b332b73fd8ffc929a0919d2f36eb7835e0904ee969a74e4fdb541ee591809bad4";
const NAME_P: &str = "000bfc43d1cef9ad56a8e50f63ad918f459c748c2b24848181946f0702726e9748e1";
const REF: &str = "a63162d2506c83c6b28d06578050f2474e3ef2dfe93ecc1eb3f55931b09761f1";
const AUTH_POLICY: &str = "433ccc43c84a209535a4da172afce4e024dcc7a15f921935a5f37f8f7425bb86";
const NAME_U: &str = "000b61382df4d6db02026b83ecf41c24d10fc66cb5058a3b0a8ba188f1928a8caed6";
const NAME_W: &str = "000be7cff1af8d8adb74b4593a8e07e8446fe2c61bbfd8ceb853ab21d7d0e9a69339";
const CP_200: &str = "f48ad41a526191b7e10906080af41594a692dd8a7cf4406713ef73687eb42d96";
const BUMP_200: &str = "25f0fcd9aef5807c0dc5be8827b4f7f2e477798bc203c981ae6ba034898976a9";
const BUMP_20261123: &str = "e2d90d6df5e6cc45a8ada13a56fafb70062cc3a2dfcf75e6cb9836dc117844a7";
const FIRST_WRITE: &str = "3c829f325760a268291d03bd8d8c451db1f0ed71cd62489376ac0349591eedb8";
const TO_SIGN_200: &str = "ac9f805547ec251af6f498f5e00c0d8d3da659308b80d5c2275293067e5d0c4f";

#[test]
fn digests_match_the_golden_vectors() {
    let policy = policy();
    assert_eq!(Name::of_key(floor_key().public()).to_string(), NAME_F);
    assert_eq!(Name::of_key(provision_key().public()).to_string(), NAME_P);
    assert_eq!(hex(policy.reference()), REF);
    assert_eq!(hex(policy.auth_policy()), AUTH_POLICY);
    assert_eq!(policy.name_unwritten().to_string(), NAME_U);
    assert_eq!(policy.name_written().to_string(), NAME_W);
    assert_eq!(hex(&policy.write_parameters(200)), CP_200);
    assert_eq!(hex(&policy.bump(200)), BUMP_200);
    assert_eq!(hex(&policy.bump(20_261_123)), BUMP_20261123);
    assert_eq!(hex(&policy.first_write(provision_key().public())), FIRST_WRITE);
    assert_eq!(hex(&policy.to_sign(&policy.bump(200))), TO_SIGN_200);
}

#[test]
fn each_of_key_product_and_version_changes_the_digests() {
    let policy = policy();
    let other_product = Policy::new(*floor_key().public(), OTHER_PRODUCT);
    let other_key = Policy::new(*provision_key().public(), PRODUCT);
    assert_ne!(policy.auth_policy(), other_product.auth_policy());
    assert_ne!(policy.auth_policy(), other_key.auth_policy());
    assert_ne!(policy.bump(200), policy.bump(201));
    assert_ne!(policy.first_write(floor_key().public()), policy.first_write(provision_key().public()));
}

#[test]
fn the_tpm_computes_the_same_names_and_policies() {
    let swtpm = provisioned(100);
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    // The keys' Names.
    for (key, expected) in [(floor_key(), NAME_F), (provision_key(), NAME_P)] {
        fs::write(path("key.pub"), key.public().to_pem().unwrap()).unwrap();
        swtpm.tool_ok(
            "tpm2_loadexternal",
            &[
                "-C",
                "o",
                "-G",
                "ecc:ecdsa-sha256",
                "-a",
                "sign",
                "-u",
                &path("key.pub"),
                "-c",
                &path("key.ctx"),
                "-n",
                &path("key.name"),
            ],
        );
        swtpm.tool_ok("tpm2_flushcontext", &["-t"]);
        assert_eq!(hex(&fs::read(path("key.name")).unwrap()), expected);
        fs::rename(path("key.name"), path(&format!("{}.name", &expected[4..8]))).unwrap();
    }
    // The index: Name, attributes, policy, size.
    let public = String::from_utf8(swtpm.tool_ok("tpm2_nvreadpublic", &["0x01500050"])).unwrap();
    for expected in [
        format!("name: {NAME_W}"),
        "value: 0x22060008".into(),
        "friendly: policywrite|ownerread|authread|no_da|written".into(),
        "size: 8".into(),
        format!("authorization policy: {}", AUTH_POLICY.to_uppercase()),
        "friendly: sha256".into(),
    ] {
        assert!(public.contains(&expected), "{expected} is not in {public}");
    }
    let session = path("session");
    let digest = path("digest");
    let start = |policy_session: bool| {
        let mut arguments = vec!["-S", &session, "-g", "sha256"];
        if policy_session {
            arguments.push("--policy-session");
        }
        swtpm.tool_ok("tpm2_startauthsession", &arguments);
    };
    let end = || {
        swtpm.tool_ok("tpm2_flushcontext", &[&session]);
        hex(&fs::read(&digest).unwrap())
    };
    // authPolicy, by a trial session of PolicyAuthorize.
    fs::write(path("ref"), policy().reference()).unwrap();
    start(false);
    swtpm.tool_ok(
        "tpm2_policyauthorize",
        &["-S", &session, "-L", &digest, "-q", &path("ref"), "-n", &path("332b.name")],
    );
    assert_eq!(end(), AUTH_POLICY);
    // bump(200), by a real session: the floor is at 100.
    fs::write(path("operand"), 200_u64.to_be_bytes()).unwrap();
    fs::write(path("cp"), [[0, 32].as_slice(), &policy().write_parameters(200)].concat()).unwrap();
    start(true);
    swtpm.tool_ok(
        "tpm2_policynv",
        &["-S", &session, "-C", "0x01500050", "-i", &path("operand"), "0x01500050", "ult"],
    );
    swtpm.tool_ok("tpm2_policycphash", &["-S", &session, "-L", &digest, "--cphash", &path("cp")]);
    assert_eq!(end(), BUMP_200);
    // cp(200), as the tool that would write it works it out.
    swtpm.tool_ok(
        "tpm2_nvwrite",
        &["-C", "0x01500050", "-i", &path("operand"), "--cphash", &path("cp.tool"), "0x01500050"],
    );
    let cp = fs::read(path("cp.tool")).unwrap();
    assert!(hex(&cp).ends_with(CP_200), "{}", hex(&cp));
}

#[test]
fn openssl_checks_our_floor_signature_and_we_check_its() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let openssl = |arguments: &[&str]| {
        let output = run_tool(Command::new("openssl").args(arguments), "openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    write_private(Path::new(&path("key")), FLOOR_KEY.as_bytes());
    fs::write(path("pub"), floor_key().public().to_pem().unwrap()).unwrap();
    fs::write(path("digest"), policy().to_sign(&policy().bump(200))).unwrap();
    // Ours, as DER.
    let ours = signed(200);
    let number = |bytes: &[u8]| openssl::bn::BigNum::from_slice(bytes).unwrap();
    let der = openssl::ecdsa::EcdsaSig::from_private_components(number(&ours[..32]), number(&ours[32..]))
        .unwrap()
        .to_der()
        .unwrap();
    fs::write(path("sig"), der).unwrap();
    openssl(&[
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        &path("pub"),
        "-in",
        &path("digest"),
        "-sigfile",
        &path("sig"),
    ]);
    // Theirs, as r and s.
    openssl(&["pkeyutl", "-sign", "-inkey", &path("key"), "-in", &path("digest"), "-out", &path("theirs")]);
    let theirs = openssl::ecdsa::EcdsaSig::from_der(&fs::read(path("theirs")).unwrap()).unwrap();
    let raw = [theirs.r().to_vec_padded(32).unwrap(), theirs.s().to_vec_padded(32).unwrap()].concat();
    check_signature(&policy(), 200, &raw).expect("what openssl signs is a floor signature");
}

#[test]
fn a_floor_signature_is_for_one_key_one_product_and_one_version() {
    let bad = |policy: &Policy, version: u64, signature: &[u8]| {
        let error = check_signature(policy, version, signature).unwrap_err();
        assert!(matches!(error, FloorError::BadFloorSignature { version: v, .. } if v == version), "{error}");
        assert_eq!(error.class(), Class::Tpm);
    };
    let ours = signed(200);
    check_signature(&policy(), 200, &ours).expect("a good signature");
    bad(&policy(), 201, &ours);
    bad(&Policy::new(*floor_key().public(), OTHER_PRODUCT), 200, &ours);
    bad(&Policy::new(*new_key().public(), PRODUCT), 200, &ours);
    bad(&policy(), 200, &ours[..63]);
    bad(&policy(), 200, &[ours.as_slice(), &[0]].concat());
    bad(&policy(), 200, &[]);
    bad(&policy(), 200, &[0; 64]);
    bad(&policy(), 200, &[0xff; 64]);
    for at in [0, 31, 32, 63] {
        let mut flipped = ours;
        flipped[at] ^= 1;
        bad(&policy(), 200, &flipped);
    }
    // The authorization of a provisioning key is no floor signature of anything.
    bad(&policy(), 200, &authorization());
}

#[test]
fn a_version_is_1_to_2_to_the_53_less_1() {
    for version in [1, 200, 20_261_123, MAX_VERSION] {
        check_signature(&policy(), version, &signed(version)).expect("a version");
    }
    for version in [0, MAX_VERSION + 1, u64::MAX] {
        let error = sign_version(&floor_key(), &PRODUCT, version).unwrap_err();
        assert!(matches!(error, FloorError::VersionRange { version: v } if v == version), "{error}");
        assert_eq!(error.class(), Class::Input);
    }
}

#[test]
fn a_private_key_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempdir().unwrap();
    let path = dir.path().join("floor.key");
    write_private(&path, FLOOR_KEY.as_bytes());
    P256PrivateKey::read(&path).expect("a key of mode 0600");
    for mode in [0o640, 0o604, 0o620, 0o644, 0o666] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let error = P256PrivateKey::read(&path).err().expect("a refusal");
        assert!(matches!(error, KeyError::OpenToOthers { mode: m, .. } if m == mode), "{error}");
    }
}

#[test]
fn keys_of_other_kinds_are_refused() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let openssl = |arguments: &[&str]| {
        let output = run_tool(Command::new("openssl").args(arguments).current_dir(dir.path()), "openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-out", "p384"]);
    openssl(&["genpkey", "-algorithm", "RSA", "-out", "rsa"]);
    openssl(&["genpkey", "-algorithm", "ED25519", "-out", "ed25519"]);
    openssl(&[
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-aes128",
        "-pass",
        "pass:x",
        "-out",
        "locked",
    ]);
    fs::write(path("text"), "hello").unwrap();
    fs::write(path("empty"), "").unwrap();
    for name in ["p384", "rsa", "ed25519", "locked", "text", "empty"] {
        write_private(&path(name), &fs::read(path(name)).unwrap());
        let error = P256PrivateKey::read(&path(name)).err().unwrap_or_else(|| panic!("{name} is taken"));
        assert!(
            matches!(
                error,
                KeyError::Unusable { .. } | KeyError::Unreadable { .. } | KeyError::Unsupported { .. }
            ),
            "{name}: {error}"
        );
        assert_eq!(error.class(), Class::Input);
    }
    for name in ["p384", "rsa"] {
        openssl(&["pkey", "-in", name, "-pubout", "-out", "public"]);
        let error = P256PublicKey::read(&path("public")).err().unwrap_or_else(|| panic!("{name} is taken"));
        assert!(matches!(error, KeyError::Unusable { .. }), "{name}: {error}");
    }
}

#[test]
fn a_missing_swtpm_is_named_with_its_package() {
    let result = std::panic::catch_unwind(|| run_tool(&mut Command::new("no-such-tool"), "some-package"));
    let message = *result.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("no-such-tool") && message.contains("`some-package`"), "{message}");
    let _ = Swtpm::start();
}
