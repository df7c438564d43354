//! What somebody with root, or with the disk and everything that was ever recorded, cannot do.

use mosfs::internals::error::{Class, Classified};
use mosfs::internals::floor::Floor as _;
use mosfs::internals::floor::digests::{INDEX, Name};
use mosfs::internals::sys::tpm::{NvArea, PublicPoint, Tpm};
use mosfs::internals::trust::p256::P256PublicKey;
use tempfile::tempdir;

use crate::*;

fn point(key: &P256PublicKey) -> PublicPoint {
    PublicPoint { x: *key.x(), y: *key.y() }
}

/// Does what a raise does, without any of our own checks; the TPM's response code where it refuses.
fn raw_raise(swtpm: &Swtpm, compare_with: u64, write: u64, signed_version: u64) -> Result<(), u32> {
    let code =
        |error: mosfs::internals::sys::tpm::TpmError| error.code().unwrap_or_else(|| panic!("{error}"));
    let policy = policy();
    let tpm = Tpm::open(&swtpm.tcti(), BUDGET).unwrap();
    let index = tpm.nv_index(INDEX).map_err(code)?;
    let session = tpm.policy_session().map_err(code)?;
    session.policy_nv_less_than(&index, &compare_with.to_be_bytes()).map_err(code)?;
    session.policy_cp_hash(&policy.write_parameters(signed_version)).map_err(code)?;
    let key = tpm.load_public(&point(policy.key())).map_err(code)?;
    let bump = policy.bump(signed_version);
    let ticket = key.verify(&policy.to_sign(&bump), &signed(signed_version)).map_err(code)?;
    let name = Name::of_key(policy.key());
    session.policy_authorize(&bump, policy.reference(), name.as_bytes(), &ticket).map_err(code)?;
    index.write(&session, &write.to_be_bytes()).map_err(code)
}

#[test]
fn the_way_around_our_checks_works_for_a_higher_version() {
    // So that the refusals below are the TPM's, not mistakes of the test.
    let swtpm = provisioned(200);
    raw_raise(&swtpm, 300, 300, 300).expect("a raise");
    assert_eq!(second_opinion(&swtpm), 300);
}

#[test]
fn the_tpm_itself_refuses_the_way_back() {
    let swtpm = provisioned(20_261_123);
    // Rule: PolicyNV(current < V). The signature for 200 is good, and was public once.
    assert_eq!(raw_raise(&swtpm, 200, 200, 200), Err(0x126));
    assert_eq!(raw_raise(&swtpm, 20_261_123, 20_261_123, 20_261_123), Err(0x126));
    // A comparison that holds, with the signature for 200: not the policy that was signed.
    assert_eq!(raw_raise(&swtpm, 20_261_124, 200, 200), Err(0x1c4));
    // Rule: PolicyCpHash. A signed raise to 20261124, but 200 is written.
    assert_eq!(raw_raise(&swtpm, 20_261_124, 200, 20_261_124), Err(0x99d));
    assert_eq!(second_opinion(&swtpm), 20_261_123);
    assert_nothing_left(&swtpm);
}

#[test]
fn tpm2_tools_cannot_lower_the_floor_either() {
    let swtpm = provisioned(20_261_123);
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("200"), 200_u64.to_be_bytes()).unwrap();
    for hierarchy in ["o", "p", "0x01500050"] {
        let output = swtpm.tool("tpm2_nvwrite", &["-C", hierarchy, "-i", &path("200"), "0x01500050"]);
        assert!(!output.status.success(), "written with -C {hierarchy}");
    }
    swtpm.tool_ok("tpm2_startauthsession", &["-S", &path("s"), "--policy-session"]);
    let output = swtpm.tool(
        "tpm2_policynv",
        &["-S", &path("s"), "-C", "0x01500050", "-i", &path("200"), "0x01500050", "ult"],
    );
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && told.contains("0x126"), "{told}");
    for tool in ["tpm2_nvincrement", "tpm2_nvwritelock"] {
        assert!(!swtpm.tool(tool, &["-C", "o", "0x01500050"]).status.success(), "{tool}");
    }
    let output = swtpm.tool("tpm2_nvsetbits", &["-C", "o", "-i", "0", "0x01500050"]);
    assert!(!output.status.success());
    swtpm.tool_ok("tpm2_flushcontext", &[path("s")]);
    assert_eq!(second_opinion(&swtpm), 20_261_123);
}

#[test]
fn a_signature_of_another_product_or_key_does_not_raise() {
    let swtpm = provisioned(200);
    let others = [
        sign_version(&floor_key(), &OTHER_PRODUCT, 300).unwrap(),
        sign_version(&new_key(), &PRODUCT, 300).unwrap(),
        signed(299),
        signed(301),
        authorization(),
    ];
    for signature in &others {
        let error = floor(&swtpm).raise(300, signature).unwrap_err();
        assert!(matches!(error, FloorError::BadFloorSignature { version: 300, .. }), "{error}");
        assert_eq!(error.class(), Class::Tpm);
    }
    // The TPM, asked without our own check, says the same: 0x2DB.
    let policy = policy();
    let tpm = Tpm::open(&swtpm.tcti(), BUDGET).unwrap();
    for signature in &others {
        let key = tpm.load_public(&point(policy.key())).unwrap();
        let error = key.verify(&policy.to_sign(&policy.bump(300)), signature).err().expect("a refusal");
        assert_eq!(error.code(), Some(0x2db), "{error}");
    }
    drop(tpm);
    assert_eq!(second_opinion(&swtpm), 200);
    assert_nothing_left(&swtpm);
}

/// What somebody who watched a provisioning has: the nonce, and the signature over it.
fn watched_provisioning(swtpm: &Swtpm) -> Signature {
    let begun = floor(swtpm).provision(provision_key().public(), &authorization()).unwrap();
    let signature = sign_provision(&provision_key(), &begun.message(), Path::new("")).unwrap();
    begun.finish(&signature).unwrap();
    signature
}

#[test]
fn an_index_that_was_deleted_and_made_again_is_no_floor_even_with_everything_replayed() {
    let swtpm = Swtpm::start();
    let recorded = watched_provisioning(&swtpm);
    floor(&swtpm).raise(20_261_123, &signed(20_261_123)).unwrap();
    // The owner's authorization is empty: whoever has root can do this.
    swtpm.tool_ok("tpm2_nvundefine", &["-C", "o", "0x01500050"]);
    let error = floor(&swtpm).read().unwrap_err();
    assert!(matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NotProvisioned, .. }), "{error}");
    // The same public area again, which gives the Name that an unwritten floor has.
    {
        let tpm = Tpm::open(&swtpm.tcti(), BUDGET).unwrap();
        let auth_policy = policy().auth_policy().to_vec();
        tpm.nv_define(&NvArea { index: INDEX, attributes: 0x0206_0008, policy: auth_policy, bytes: 8 })
            .unwrap();
    }
    let error = floor(&swtpm).read().unwrap_err();
    assert!(
        matches!(error, FloorError::InTpm { problem: TpmFloorProblem::ProvisionIncomplete, .. }),
        "{error}"
    );
    assert_eq!(error.class(), Class::Tpm);
    // The recorded first write: the session's nonce is another one now.
    let mut begun = floor(&swtpm).provision(provision_key().public(), &authorization()).unwrap();
    let error = begun.finish_unchecked(&recorded).unwrap_err();
    assert!(matches!(error, FloorError::BadProvisionSignature), "{error}");
    assert_eq!(error.class(), Class::Tpm);
    drop(begun);
    // A key of the attacker's own: the floor key authorized another one.
    let error = floor(&swtpm).provision(new_key().public(), &authorization()).err().expect("a refusal");
    assert!(matches!(error, FloorError::FirstWriteNotAuthorized { .. }), "{error}");
    // A recorded raise: PolicyNV cannot compare what was never written.
    assert_eq!(raw_raise(&swtpm, 200, 200, 200), Err(0x14a));
    let error = floor(&swtpm).read().unwrap_err();
    assert!(
        matches!(error, FloorError::InTpm { problem: TpmFloorProblem::ProvisionIncomplete, .. }),
        "{error}"
    );
    assert_nothing_left(&swtpm);
}

#[test]
fn a_replayed_nonce_is_refused_with_0x5db() {
    let swtpm = Swtpm::start();
    let message = [[7_u8; 32].as_slice(), &[0; 4]].concat();
    let signature = sign_provision(&provision_key(), &message, Path::new("")).unwrap();
    let tpm = Tpm::open(&swtpm.tcti(), BUDGET).unwrap();
    let session = tpm.policy_session().unwrap();
    let key = tpm.load_public(&point(provision_key().public())).unwrap();
    let nonce = session.nonce().unwrap();
    let error = session.policy_signed(&key, &nonce, &signature).unwrap_err();
    assert_eq!(error.code(), Some(0x5db), "{error}");
    // The recorded nonce in place of the session's: the TPM knows its own.
    let error = session.policy_signed(&key, &[7; 32], &signature).unwrap_err();
    assert_eq!(error.code().map(|code| code & 0x3f), Some(0x0f), "{error}");
}

#[test]
fn a_look_alike_index_is_no_floor() {
    let auth_policy = policy().auth_policy().to_vec();
    let area = |attributes, policy: &[u8], bytes| NvArea {
        index: INDEX,
        attributes,
        policy: policy.to_vec(),
        bytes,
    };
    let look_alikes = [
        // Anybody may write it, and it has the right policy besides.
        area(0x0206_000c, &auth_policy, 8),
        area(0x0206_000a, &auth_policy, 8),
        // The right attributes, the attacker's policy, which is met by nothing at all.
        area(0x0206_0008, &[0; 32], 8),
        // Another product's floor.
        area(0x0206_0008, Policy::new(*floor_key().public(), OTHER_PRODUCT).auth_policy(), 8),
        // It forgets at each start; it counts; it is larger.
        area(0x0a06_0008, &auth_policy, 8),
        area(0x0206_0018, &auth_policy, 8),
        area(0x0206_0008, &auth_policy, 16),
    ];
    for look_alike in &look_alikes {
        let swtpm = Swtpm::start();
        {
            let tpm = Tpm::open(&swtpm.tcti(), BUDGET).unwrap();
            tpm.nv_define(look_alike).unwrap();
        }
        if look_alike.attributes & 0x4 != 0 {
            // AUTHWRITE: also with a version in it.
            let dir = tempdir().unwrap();
            let data = dir.path().join("data");
            std::fs::write(&data, 200_u64.to_be_bytes()).unwrap();
            let data = data.display().to_string();
            swtpm.tool_ok("tpm2_nvwrite", &["-C", "0x01500050", "-i", data.as_str(), "0x01500050"]);
        }
        for error in [
            floor(&swtpm).read().unwrap_err(),
            floor(&swtpm).raise(300, &signed(300)).unwrap_err(),
            provision(&swtpm).unwrap_err(),
        ] {
            assert!(
                matches!(error, FloorError::InTpm { problem: TpmFloorProblem::IndexTampered { .. }, .. }),
                "{look_alike:x?}: {error}"
            );
            assert_eq!(error.class(), Class::Tpm);
        }
        assert_nothing_left(&swtpm);
    }
}

#[test]
fn a_written_look_alike_with_a_lower_version_is_no_floor() {
    let swtpm = provisioned(20_261_123);
    let dir = tempdir().unwrap();
    let data = dir.path().join("data").display().to_string();
    std::fs::write(&data, 200_u64.to_be_bytes()).unwrap();
    swtpm.tool_ok("tpm2_nvundefine", &["-C", "o", "0x01500050"]);
    swtpm.tool_ok(
        "tpm2_nvdefine",
        &["0x01500050", "-C", "o", "-s", "8", "-a", "authwrite|ownerread|authread|no_da"],
    );
    swtpm.tool_ok("tpm2_nvwrite", &["-C", "0x01500050", "-i", &data, "0x01500050"]);
    assert_eq!(second_opinion(&swtpm), 200);
    let error = floor(&swtpm).read().unwrap_err();
    let expected = policy().name_written();
    assert!(
        matches!(&error, FloorError::InTpm { problem: TpmFloorProblem::IndexTampered { expected: e, .. }, .. } if *e == expected),
        "{error}"
    );
    assert!(error.to_string().contains(&expected.to_string()), "{error}");
}

#[test]
fn a_cleared_tpm_has_no_floor_and_gets_none_by_itself() {
    let swtpm = provisioned(200);
    swtpm.tool_ok("tpm2_clear", &["-c", "p"]);
    for _ in 0..2 {
        let error = floor(&swtpm).read().unwrap_err();
        assert!(
            matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NotProvisioned, .. }),
            "{error}"
        );
        let error = floor(&swtpm).raise(300, &signed(300)).unwrap_err();
        assert!(
            matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NotProvisioned, .. }),
            "{error}"
        );
    }
    assert_eq!(swtpm.handles("handles-nv-index"), [""; 0]);
}

#[test]
fn a_session_prepared_before_a_raise_ends_with_the_power() {
    // PolicyNV is checked when it is called. Root who prepared a session for 300 before a raise to 400 can use it after
    // the raise, until the TPM is reset: docs/attackers.md says so. What is never possible is a version
    // that was not above the floor when the machine was started.
    let mut swtpm = provisioned(200);
    let policy = policy();
    {
        let tpm = Tpm::open(&swtpm.tcti(), BUDGET).unwrap();
        let index = tpm.nv_index(INDEX).unwrap();
        let session = tpm.policy_session().unwrap();
        session.policy_nv_less_than(&index, &300_u64.to_be_bytes()).unwrap();
        session.policy_cp_hash(&policy.write_parameters(300)).unwrap();
        let key = tpm.load_public(&point(policy.key())).unwrap();
        let bump = policy.bump(300);
        let ticket = key.verify(&policy.to_sign(&bump), &signed(300)).unwrap();
        let name = Name::of_key(policy.key());
        session.policy_authorize(&bump, policy.reference(), name.as_bytes(), &ticket).unwrap();
        drop((index, key));
        std::mem::forget(session);
        std::mem::forget(tpm);
    }
    swtpm.restart();
    // The session is gone.
    assert_nothing_left(&swtpm);
    floor(&swtpm).raise(400, &signed(400)).unwrap();
    assert_eq!(second_opinion(&swtpm), 400);
}
