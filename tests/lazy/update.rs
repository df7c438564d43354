//! `mosfs update --lazy`: pending at once, the rest before it boots. A half-fetched system never does.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;

use mosfs::internals::deploy::choice::Role;
use mosfs::internals::image::oci::Descriptor;
use mosfs::internals::store::Store;
use serde_json::Value;

use crate::device::{Device, text};
use crate::fixture::wait_until;
use crate::place::{Place, layers_of, load};
use crate::server::{Fault, Options, Server};

const SIGKILL: i32 = 9;

/// A device that runs version 200 of a registry that has version 201 too.
struct Fleet {
    place: Place,
    server: Server,
    device: Device,
    source: String,
    /// The layers of version 201.
    layers: Vec<Descriptor>,
}

impl Fleet {
    fn new() -> Self {
        let (place, server) = (Place::new(), Server::start(Options::default()));
        let device = Device::with_file_floor();
        place.publish(200, &[60_000]);
        load(&place.publisher.store(), 200, "p", &server);
        let source = server.source("p");
        let install = place.install_args(&source);
        device.ok(&install.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(device.boot(), (200, Role::Current));
        place.publish(201, &[400_000, 300_000, 200_000]);
        load(&place.publisher.store(), 201, "p", &server);
        let layers = layers_of(&place.publisher.store(), 201);
        Self { place, server, device, source, layers }
    }

    /// Makes the registry refuse layers, so that nothing of them is fetched.
    fn refuse_layers(&self) {
        let layers: Vec<_> = self.layers.iter().map(|layer| layer.digest).collect();
        self.server.script(move |seen, _| {
            let refused = layers.iter().any(|layer| seen.gets(layer));
            refused.then(|| Fault::Answer(403, Vec::new(), Vec::new()))
        });
    }

    /// Makes the registry send so many layers, the first ones; the others never come.
    fn stall_layers_after(&self, count: usize) {
        let layers: Vec<_> = self.layers[count..].iter().map(|layer| layer.digest).collect();
        self.server
            .script(move |seen, _| layers.iter().any(|layer| seen.gets(layer)).then_some(Fault::Stall(10)));
    }

    fn update_args(&self) -> [&str; 5] {
        ["update", "--lazy", "--net-timeout", "2", &self.source]
    }

    /// Begins the update while the registry refuses its layers, and waits until the process in the background has
    /// given up.
    fn begin(&self) {
        self.refuse_layers();
        self.device.ok(&self.update_args());
        self.wait_for_error();
        self.server.heal();
    }

    fn wait_for_error(&self) {
        wait_until("the failure is recorded", || {
            self.device.state().last_update.is_some_and(|update| update.error.is_some())
        });
        // It still has the task for a moment.
        let lock = self.device.system().join("fetch.lock");
        wait_until("the task is free", || fs::File::open(&lock).is_ok_and(|file| file.try_lock().is_ok()));
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.device.ok(&["status", "--json"])).expect("JSON")
    }

    fn store(&self) -> Store {
        Store::open(&self.device.system().join("store")).expect("a store")
    }

    /// The layers that are blobs of the store.
    fn whole(&self) -> BTreeSet<String> {
        let store = self.store();
        self.layers.iter().filter(|layer| store.has(layer)).map(|layer| layer.digest.hex()).collect()
    }

    /// What must hold until all is here: version 200 boots, no try is spent, and nothing of 201 has a name or a
    /// folder that an earlier mosfs could boot.
    fn assert_old_boots(&self, when: &str) {
        assert_eq!(self.device.boot(), (200, Role::Current), "{when}");
        let state = self.device.state();
        let Some(pending) = &state.pending else { return };
        assert!(pending.fetching && pending.tries_left == 3, "{when}: {pending:?}");
        let refused = state.last_boot.expect("a boot").refused;
        assert!(refused.iter().any(|one| one.why.contains("still being fetched")), "{when}: {refused:?}");
    }

    fn has_names_of_201(&self) -> bool {
        let names = self.store().names().expect("names");
        names.iter().any(|(name, _)| name == "mos/system/system:201")
    }

    fn assert_new_boots(&self) {
        assert!(self.has_names_of_201());
        assert_eq!(self.device.boot(), (201, Role::Pending));
        assert!(self.device.ok(&["commit"]).contains("version 201 is current now"));
        self.device.ok(&["verify"]);
    }
}

#[test]
fn a_lazy_update_is_pending_at_once_and_boots_once_all_of_it_is_here() {
    let fleet = Fleet::new();
    // Slow enough that it cannot be done before this test has looked.
    let layers: Vec<_> = fleet.layers.iter().map(|layer| layer.digest).collect();
    fleet
        .server
        .script(move |seen, _| layers.iter().any(|layer| seen.gets(layer)).then_some(Fault::Slow(40_000)));
    let said = fleet.device.ok(&fleet.update_args());
    assert!(said.contains("version 201") && said.contains("fetched in the background"), "{said}");
    assert!(said.contains("tried at the first boot after that"), "{said}");
    fleet.assert_old_boots("at once");
    assert_eq!(fleet.device.versions(), [200], "a folder is what boots");
    assert!(!fleet.has_names_of_201());
    let status = fleet.status();
    let rows = status["fetching"].as_array().expect("layers");
    assert_eq!(rows.len(), 3);
    for row in rows {
        let layer = fleet.layers.iter().find(|layer| row["digest"] == *layer.digest.to_string());
        assert_eq!(row["size"].as_u64(), layer.map(|layer| layer.size));
        assert!(row["have"].as_u64() <= row["size"].as_u64());
        assert_eq!(row["state"], "fetching");
    }
    assert!(fleet.device.ok(&["status"]).contains("% of 1 MiB here, being fetched"));
    // What runs goes on meanwhile: nobody waits for the rest.
    assert!(fleet.device.ok(&["commit"]).contains("version 200 was current already"));
    // Refused while the fetch has the store, which it may not have yet or no longer. Nothing that is needed goes either
    // way: the rest of this test shows that.
    let collected = fleet.device.run(&["gc"]);
    match collected.status.code() {
        Some(0) => {}
        Some(1) => assert!(String::from_utf8_lossy(&collected.stderr).contains("is in use"), "{collected:?}"),
        other => panic!("gc: exit {other:?}: {collected:?}"),
    }
    fleet.server.heal();
    wait_until("all of it is here", || fleet.device.state().fetching().is_none());
    assert_eq!(fleet.whole().len(), 3);
    assert!(fleet.status()["fetching"].as_array().expect("rows").is_empty());
    fleet.assert_new_boots();
}

#[test]
fn without_a_network_the_old_system_boots_and_the_next_run_finishes() {
    let fleet = Fleet::new();
    fleet.begin();
    fleet.assert_old_boots("after a failure");
    let status = fleet.device.ok(&["status"]);
    assert!(status.contains("0 % of 1 MiB here, being fetched (") && status.contains("403"), "{status}");
    // Still away: it fails again, and nothing changes.
    fleet.refuse_layers();
    fleet.device.refused(&["update", "--finish", "--net-timeout", "2"], 1, &["403"]);
    fleet.assert_old_boots("after another failure");
    fleet.server.heal();
    let said = fleet.device.ok(&["update", "--finish"]);
    assert!(said.contains("is pending: it is tried at the next boot"), "{said}");
    assert!(fleet.device.ok(&["update", "--finish"]).contains("nothing is left to fetch"));
    fleet.assert_new_boots();
}

#[test]
fn an_ordinary_update_finishes_too_or_puts_another_version_in_its_place() {
    let fleet = Fleet::new();
    fleet.begin();
    fleet.place.publish(202, &[50_000]);
    load(&fleet.place.publisher.store(), 202, "p", &fleet.server);
    let named = format!("{}:201", fleet.source);
    fleet.device.ok(&["update", &named]);
    assert_eq!(fleet.device.state().fetching(), None);
    assert_eq!(fleet.device.boot(), (201, Role::Pending));
    // And the other way round: what was begun is dropped, with what came of it.
    let fleet = Fleet::new();
    fleet.begin();
    fleet.place.publish(202, &[50_000]);
    load(&fleet.place.publisher.store(), 202, "p", &fleet.server);
    fleet.device.ok(&["update", &fleet.source]);
    assert_eq!(fleet.device.state().sources.len(), 2, "those of 200 and 202");
    assert_eq!(fleet.device.boot(), (202, Role::Pending));
    assert_eq!(fleet.whole().len(), 0);
}

#[test]
fn nothing_boots_or_commits_what_is_half_here() {
    let fleet = Fleet::new();
    // Two of three layers come.
    let last = fleet.layers[2].digest;
    fleet.server.script(move |seen, _| seen.gets(&last).then(|| Fault::Answer(403, Vec::new(), Vec::new())));
    fleet.device.ok(&fleet.update_args());
    fleet.wait_for_error();
    fleet.assert_old_boots("half of it here");
    // Another layer of the whole is damaged by the disk: it is read before anything has a name.
    let whole = fleet.whole();
    assert!(!whole.is_empty());
    let path = fleet.device.system().join("store/blobs/sha256").join(whole.first().expect("one"));
    let mut bytes = fs::read(&path).expect("a blob");
    bytes[5000] ^= 1;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("a mode");
    fs::write(&path, &bytes).expect("a file");
    // A state file that is lost: what is on the disk counts, and 201 is not.
    let state = fleet.device.system().join("state.json");
    let kept = fs::read(&state).expect("a state");
    fs::write(&state, "{").expect("a file");
    assert_eq!(fleet.device.boot().0, 200);
    fs::write(&state, &kept).expect("a file");
    // A machine that mosfs never booted, where a commit may take what is pending.
    let mut fresh: Value = serde_json::from_slice(&kept).expect("JSON");
    fresh["last_boot"] = Value::Null;
    fs::write(&state, fresh.to_string()).expect("a file");
    fs::remove_file(fleet.device.boot_record()).expect("a record");
    fleet.device.refused(
        &["commit", "--unbooted"],
        1,
        &["201-", "is still being fetched, and not all of it is here", "update --finish"],
    );
    assert_eq!(fleet.device.state().current.map(|id| id.version), Some(200));
    fleet.server.heal();
    fleet.device.ok(&["update", "--finish"]);
    fleet.assert_new_boots();
}

#[test]
fn the_checks_come_first_and_a_layout_is_no_registry() {
    let fleet = Fleet::new();
    let before = fleet.device.snapshot();
    let layout = fleet.place.publisher.source_of(201);
    fleet.device.refused(&["update", "--lazy", &layout], 2, &["for --lazy", &layout]);
    fleet.device.refused(&["update", "--lazy", "--check", &fleet.source], 2, &["cannot be used with"]);
    fleet.device.refused(&["update"], 2, &["SOURCE"]);
    let old = format!("{}:199", fleet.source);
    fleet.place.publish(199, &[1000]);
    load(&fleet.place.publisher.store(), 199, "p", &fleet.server);
    fleet.device.refused(&["update", "--lazy", &old], 4, &["199"]);
    let state = fleet.device.state();
    assert_eq!((state.pending, state.current.map(|id| id.version)), (None, Some(200)));
    let blobs = |files: &[(std::path::PathBuf, Vec<u8>)]| {
        files.iter().filter(|(path, _)| path.to_string_lossy().contains("blobs/")).count()
    };
    assert_eq!(blobs(&fleet.device.snapshot()), blobs(&before), "what is refused leaves nothing");
    let here = format!("{}:200", fleet.source);
    assert!(fleet.device.ok(&["update", "--lazy", &here]).contains("version 200 is installed already"));
}

/// A kill at each commit point, of the command and of the process that finishes. After each, the old system boots until
/// the last step is done, garbage collection takes nothing that is needed, and no complete layer is asked for again.
#[test]
fn kills_at_every_point_leave_the_old_system_or_the_new_one() {
    let fleet = Fleet::new();
    let killed_at = |args: &[&str], point: &str| {
        let output = fleet.device.command(args).env("MOSFS_FAILPOINT", point).output().expect("mosfs runs");
        let killed = output.status.signal() == Some(SIGKILL);
        assert!(killed || output.status.success(), "{point}: {}", text(&output.stderr));
        killed
    };
    fleet.refuse_layers();
    for point in [
        "store.blob.synced:1",
        "store.blob.renamed:2",
        "deploy.fetching.prepared",
        "deploy.state.written",
        "deploy.state.renamed",
        "deploy.fetching.begun",
    ] {
        assert!(killed_at(&fleet.update_args(), point), "{point}");
        fleet.assert_old_boots(point);
        fleet.device.ok(&["gc"]);
    }
    assert!(fleet.device.state().fetching().is_some(), "the last kill came after it was noted");
    fleet.server.heal();
    let mut kills = 0;
    // Each point with how many layers may be here after it at most: layers are fetched side by side, and how far the
    // others are at the kill of one is nothing that a test can know.
    for (point, most) in [
        ("store.partial.written:1", 1),
        ("store.blob.written:1", 1),
        ("store.blob.synced:1", 1),
        ("store.blob.renamed:1", 1),
        ("store.blob.fetched:1", 2),
        ("store.partial.written:1", 3),
        ("deploy.fetching.fetched", 3),
        ("deploy.blobs.fetched", 3),
        ("deploy.names.set", 3),
        ("deploy.folder.written", 3),
        ("deploy.folder.renamed", 3),
        ("deploy.state.written", 3),
    ] {
        fleet.stall_layers_after(most);
        let before = fleet.whole();
        fleet.server.take_log();
        kills += u32::from(killed_at(&["update", "--finish", "--net-timeout", "100"], point));
        for seen in fleet.server.take_log() {
            let again = fleet
                .layers
                .iter()
                .any(|layer| seen.gets(&layer.digest) && before.contains(&layer.digest.hex()));
            assert!(!again, "{point}: a complete layer is asked for again: {seen:?}");
        }
        assert!(fleet.device.state().fetching().is_some(), "{point}");
        fleet.assert_old_boots(point);
        fleet.device.ok(&["gc"]);
        assert!(before.is_subset(&fleet.whole()), "{point}: garbage collection took what is needed");
    }
    assert_eq!(kills, 12);
    fleet.server.heal();
    // The state is the last step: from its rename on, the new system boots.
    assert!(killed_at(&["update", "--finish"], "deploy.state.renamed"));
    assert_eq!(fleet.device.state().fetching(), None);
    fleet.assert_new_boots();
}
