//! What the floor does: it rises, and never falls.

use std::thread;

use mosfs::internals::error::{Class, Classified};
use mosfs::internals::floor::{FileFloor, check, check_update};
use mosfs::internals::sys::tpm::TpmError;
use tempfile::tempdir;

use crate::*;

#[test]
fn one_raise_takes_the_floor_from_200_to_20261123() {
    let swtpm = provisioned(200);
    assert_eq!(second_opinion(&swtpm), 200);
    let mut floor = floor(&swtpm);
    floor.raise(20_261_123, &signed(20_261_123)).expect("a raise by any amount");
    assert_eq!(floor.read().unwrap(), 20_261_123);
    drop(floor);
    assert_eq!(second_opinion(&swtpm), 20_261_123);
    assert_nothing_left(&swtpm);
}

#[test]
fn the_floor_survives_a_power_cycle() {
    let mut swtpm = provisioned(200);
    swtpm.restart();
    assert_eq!(floor(&swtpm).read().unwrap(), 200);
    let mut floor = floor(&swtpm);
    floor.raise(201, &signed(201)).unwrap();
    drop(floor);
    swtpm.restart();
    assert_eq!(second_opinion(&swtpm), 201);
}

#[test]
fn a_floor_that_is_at_or_above_the_version_stays_and_that_is_success() {
    let swtpm = provisioned(200);
    let mut floor = floor(&swtpm);
    for version in [200, 199, 1] {
        floor.raise(version, &signed(version)).expect("nothing to do");
        assert_eq!(floor.read().unwrap(), 200);
    }
    // But never with a signature that is none.
    let error = floor.raise(199, &signed(200)).unwrap_err();
    assert!(matches!(error, FloorError::BadFloorSignature { version: 199, .. }), "{error}");
}

#[test]
fn at_boot_a_version_below_the_floor_is_refused_naming_both() {
    let swtpm = provisioned(20_261_123);
    let mut floor = floor(&swtpm);
    assert_eq!(check(&mut floor, 20_261_123).unwrap(), 20_261_123);
    assert_eq!(check(&mut floor, 20_261_124).unwrap(), 20_261_123);
    let error = check(&mut floor, 200).unwrap_err();
    assert!(matches!(error, FloorError::Rollback { version: 200, floor: 20_261_123 }), "{error}");
    assert_eq!(error.class(), Class::Rollback);
    assert!(error.to_string().contains("200") && error.to_string().contains("20261123"));
}

#[test]
fn at_update_the_version_is_above_the_current_one_and_above_the_floor() {
    let swtpm = provisioned(200);
    let mut floor = floor(&swtpm);
    assert_eq!(check_update(&mut floor, 201, Some(200)).unwrap(), 200);
    // A first install may put the floor's own version back.
    assert_eq!(check_update(&mut floor, 200, None).unwrap(), 200);
    for (version, current) in [(200, 200), (199, 200), (150, 199), (200, 100)] {
        let error = check_update(&mut floor, version, Some(current)).unwrap_err();
        assert!(matches!(error, FloorError::NotNewer { version: v, .. } if v == version), "{error}");
        assert_eq!(error.class(), Class::Rollback);
    }
    // The disk says 100, but the floor is at 200.
    let error = check_update(&mut floor, 150, Some(100)).unwrap_err();
    assert!(matches!(error, FloorError::Rollback { version: 150, floor: 200 }), "{error}");
    let error = check_update(&mut floor, 199, None).unwrap_err();
    assert!(matches!(error, FloorError::Rollback { version: 199, floor: 200 }), "{error}");
}

#[test]
fn no_tpm_is_told_from_a_tpm_without_a_floor() {
    let swtpm = Swtpm::start();
    let error = floor(&swtpm).read().unwrap_err();
    assert!(matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NotProvisioned, .. }), "{error}");
    assert_eq!(error.class(), Class::Tpm);
    let error = floor(&swtpm).raise(200, &signed(200)).unwrap_err();
    assert!(matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NotProvisioned, .. }), "{error}");
    let tcti = swtpm.tcti();
    drop(swtpm);
    let error = floor_at(tcti).read().unwrap_err();
    assert!(matches!(error, FloorError::Tpm(TpmError::Absent { .. })), "{error}");
    assert_eq!(error.class(), Class::Tpm);
    let error = floor_at(Tcti::Device("/dev/no-such-tpm".into())).read().unwrap_err();
    assert!(matches!(error, FloorError::Tpm(TpmError::Absent { .. })), "{error}");
    assert!(error.to_string().contains("/dev/no-such-tpm"), "{error}");
}

#[test]
fn a_second_provisioning_is_refused_and_changes_nothing() {
    let swtpm = provisioned(200);
    let error = provision(&swtpm).unwrap_err();
    assert!(matches!(error, FloorError::AlreadyProvisioned { .. }), "{error}");
    assert_eq!(error.class(), Class::Tpm);
    assert_eq!(second_opinion(&swtpm), 200);
    assert_nothing_left(&swtpm);
}

#[test]
fn an_interrupted_provisioning_is_told_and_can_be_finished() {
    let mut swtpm = Swtpm::start();
    let begun = floor(&swtpm).provision(provision_key().public(), &authorization()).unwrap();
    // A power cut before the signature came.
    swtpm.restart();
    drop(begun);
    let error = floor(&swtpm).read().unwrap_err();
    assert!(
        matches!(error, FloorError::InTpm { problem: TpmFloorProblem::ProvisionIncomplete, .. }),
        "{error}"
    );
    assert_eq!(error.class(), Class::Tpm);
    provision(&swtpm).expect("the same again");
    assert_eq!(floor(&swtpm).read().unwrap(), 0);
}

#[test]
fn a_provisioning_that_is_given_up_leaves_no_index() {
    let swtpm = Swtpm::start();
    drop(floor(&swtpm).provision(provision_key().public(), &authorization()).unwrap());
    assert_eq!(swtpm.handles("handles-nv-index"), [""; 0]);
    assert_nothing_left(&swtpm);
}

#[test]
fn a_full_tpm_is_told() {
    let swtpm = Swtpm::start();
    let mut index = 0x0150_1000;
    // Large ones until none fits, then small ones.
    for size in ["2048", "256", "16", "8"] {
        while swtpm
            .tool(
                "tpm2_nvdefine",
                &[&format!("{index:#010x}"), "-C", "o", "-s", size, "-a", "ownerread|ownerwrite"],
            )
            .status
            .success()
        {
            index += 1;
            assert!(index < 0x0150_1000 + 2000, "this TPM does not fill up");
        }
    }
    let error = provision(&swtpm).unwrap_err();
    assert!(matches!(error, FloorError::InTpm { problem: TpmFloorProblem::NvFull, .. }), "{error}");
    assert_eq!(error.class(), Class::Tpm);
    assert_nothing_left(&swtpm);
}

#[test]
fn an_owner_authorization_stops_provisioning_but_not_a_floor_that_exists() {
    let swtpm = Swtpm::start();
    swtpm.tool_ok("tpm2_changeauth", &["-c", "owner", "secret"]);
    let error = provision(&swtpm).unwrap_err();
    assert!(matches!(error, FloorError::InTpm { problem: TpmFloorProblem::OwnerAuthNeeded, .. }), "{error}");
    assert_eq!(error.class(), Class::Tpm);
    assert_nothing_left(&swtpm);
    swtpm.tool_ok("tpm2_changeauth", &["-c", "owner", "-p", "secret"]);
    provision(&swtpm).unwrap();
    swtpm.tool_ok("tpm2_changeauth", &["-c", "owner", "secret"]);
    let mut floor = floor(&swtpm);
    floor.raise(7, &signed(7)).expect("the floor's key is needed, not the owner's");
    assert_eq!(floor.read().unwrap(), 7);
}

#[test]
fn a_floor_reads_and_rises_during_dictionary_attack_lockout() {
    let swtpm = provisioned(200);
    swtpm.tool_ok(
        "tpm2_dictionarylockout",
        &["--setup-parameters", "--max-tries=1", "--recovery-time=1000", "--lockout-recovery-time=1000"],
    );
    swtpm.tool_ok(
        "tpm2_nvdefine",
        &["0x01500051", "-C", "o", "-s", "8", "-a", "authread|authwrite", "-p", "right"],
    );
    let guess = || swtpm.tool("tpm2_nvread", &["0x01500051", "-C", "0x01500051", "-P", "wrong", "-s", "8"]);
    guess();
    let told = String::from_utf8_lossy(&guess().stderr).into_owned();
    assert!(told.contains("0x921"), "the TPM is not in lockout: {told}");
    let mut floor = floor(&swtpm);
    assert_eq!(floor.read().unwrap(), 200);
    floor.raise(201, &signed(201)).expect("NO_DA");
    assert_eq!(floor.read().unwrap(), 201);
}

#[test]
fn unclean_stops_of_the_tpm_raise_no_lockout_counter() {
    let mut swtpm = provisioned(200);
    swtpm.tool_ok("tpm2_dictionarylockout", &["--setup-parameters", "--max-tries=1"]);
    for version in 201..206 {
        floor(&swtpm).raise(version, &signed(version)).expect("no lockout");
        swtpm.restart();
    }
    assert_eq!(second_opinion(&swtpm), 205);
}

#[test]
fn of_two_raises_at_once_the_higher_one_stays() {
    let swtpm = provisioned(200);
    for round in 0..3 {
        let base = 1000 * (round + 1);
        thread::scope(|scope| {
            for version in [base + 300, base + 400, base + 400, base + 301] {
                let tcti = swtpm.tcti();
                scope.spawn(move || {
                    let mut floor = floor_at(tcti);
                    floor.raise(version, &signed(version)).expect("a raise, or nothing to do");
                    assert!(floor.read().unwrap() >= version);
                });
            }
        });
        assert_eq!(second_opinion(&swtpm), base + 400);
    }
    assert_nothing_left(&swtpm);
}

#[test]
fn a_power_cut_at_any_moment_of_a_raise_leaves_the_old_floor_or_the_new_one() {
    let mut swtpm = provisioned(200);
    let mut stood_at = 200;
    let (mut old, mut new) = (0, 0);
    for round in 0_u64..24 {
        let version = 1000 + round;
        let signature = signed(version);
        let tcti = swtpm.tcti();
        let raising = thread::spawn(move || floor_at(tcti).raise(version, &signature));
        // From before the first command to after the last one.
        thread::sleep(Duration::from_micros(round * 700));
        swtpm.restart();
        let outcome = raising.join().expect("no panic");
        let stands_at = floor(&swtpm).read().expect("a floor that reads");
        assert!(stands_at == stood_at || stands_at == version, "{stands_at} after {stood_at} and {version}");
        // What was reported as done is done.
        assert!(outcome.is_err() || stands_at == version, "a raise that was lost");
        if stands_at == version {
            new += 1
        } else {
            old += 1
        }
        stood_at = stands_at;
    }
    eprintln!("{old} times the old floor, {new} times the new one");
    floor(&swtpm).raise(5000, &signed(5000)).expect("it still rises");
    assert_eq!(second_opinion(&swtpm), 5000);
}

#[test]
fn twenty_provisionings_and_raises_in_a_row_leave_nothing_in_the_tpm() {
    let swtpm = Swtpm::start();
    let other = sign_provision(&new_key(), &[[7; 32].as_slice(), &[0; 4]].concat(), Path::new("")).unwrap();
    for _ in 0..20 {
        let mut begun = floor(&swtpm).provision(provision_key().public(), &authorization()).unwrap();
        let error = begun.finish_unchecked(&other).unwrap_err();
        assert!(matches!(error, FloorError::BadProvisionSignature), "{error}");
    }
    assert_nothing_left(&swtpm);
    provision(&swtpm).unwrap();
    for version in 1..=20 {
        floor(&swtpm).raise(version, &signed(version)).unwrap();
    }
    assert_nothing_left(&swtpm);
}

#[test]
fn one_connection_can_be_used_for_long() {
    let swtpm = provisioned(0);
    let mut floor = floor(&swtpm);
    for version in 1..=30 {
        floor.raise(version, &signed(version)).unwrap();
        assert_eq!(floor.read().unwrap(), version);
    }
    drop(floor);
    assert_nothing_left(&swtpm);
}

#[test]
fn the_development_floor_is_a_file_and_says_that_it_protects_nothing() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("floor");
    let mut floor = FileFloor::new(path.clone(), None);
    let warning =
        "the floor is kept in a file (--floor file): it protects nothing against whoever can write the disk";
    assert_eq!(floor.warning(), Some(warning));
    assert_eq!(floor.read().unwrap(), 0);
    assert!(!floor.needs_signature());
    floor.raise(200, &[]).unwrap();
    floor.raise(100, &[]).expect("nothing to do");
    assert_eq!(floor.read().unwrap(), 200);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "200\n");
    assert!(matches!(check(&mut floor, 199), Err(FloorError::Rollback { version: 199, floor: 200 })));
    assert!(matches!(floor.provision(), Err(FloorError::AlreadyProvisioned { .. })));
    for garbage in
        ["", "200", "-1\n", "200\n\n", "2e2\n", " 200\n", "99999999999999999999\n", "9007199254740992\n"]
    {
        std::fs::write(&path, garbage).unwrap();
        let error = floor.read().unwrap_err();
        assert!(matches!(error, FloorError::FileTampered { .. }), "{garbage:?}: {error}");
        assert_eq!(error.class(), Class::Tpm);
    }
}

#[test]
fn the_development_floor_of_a_device_with_a_floor_key_wants_its_signature() {
    let dir = tempdir().unwrap();
    let mut floor = FileFloor::new(dir.path().join("floor"), Some(policy()));
    assert!(floor.needs_signature());
    floor.raise(200, &signed(200)).unwrap();
    assert!(matches!(
        floor.raise(201, &signed(200)),
        Err(FloorError::BadFloorSignature { version: 201, .. })
    ));
    assert_eq!(floor.read().unwrap(), 200);
}
