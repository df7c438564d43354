//! Power cuts during a setup, on a disk that loses what was not flushed.
//!
//! At the cut the disk stops answering, and of what was in its cache chance decides what is on it. Then the same setup runs
//! again on what is left, without `--wipe`.
//!
//! `make campaign` cuts 200 times, or MOSFS_POWER_CUTS times. MOSFS_SEED gives the same moments and losses again, as far as
//! the order of writes is the same.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::thread;

use tempfile::TempDir;

use super::nbd;
use super::plugged::{Chance, PAUSE, Plugged, cuts_and_seed};
use super::tools::{need_root, run};
use super::{Disk, MIB, Machine, attach};

/// The server's disk as a block device; it goes before the file that it is made of.
fn plug(server: &nbd::Disk) -> (Disk, Plugged) {
    let plugged = Plugged::new(server, MIB << 20);
    let image = plugged.file().to_path_buf();
    let device = attach(&image, &["--partscan"]);
    let disk = Disk { _dir: TempDir::new().unwrap(), image, device };
    // A setup that is continued needs the partitions of before.
    drop(disk.held());
    (disk, plugged)
}

/// Acceptance: a power cut at any moment of a setup, and the same setup succeeds without `--wipe`.
#[test]
fn a_setup_after_a_power_cut_needs_no_word() {
    need_root();
    let (cuts, seed) = cuts_and_seed(3);
    let mut chance = Chance::new(seed);
    let machine = Machine::provisioned();
    let setup = |disk: &Disk| machine.setup(200, &["--disk", &disk.device]);
    let place = TempDir::new().unwrap();
    let empty = vec![0; (MIB << 20) as usize];
    let server = nbd::Disk::serve(empty.clone(), &place.path().join("disk.sock"));
    // A setup that nothing disturbs: how many writes and flushes it has.
    let (disk, plugged) = plug(&server);
    run(&mut setup(&disk));
    disk.expect_installed(200);
    drop((disk, plugged));
    let whole = server.cut(|_| 0);
    assert_eq!(whole.cached, 0, "what is said to be installed is on the disk");
    let (mut cached, mut lost) = (0, 0);
    let mut steps = BTreeMap::<String, u32>::new();
    for number in 1..=cuts {
        server.put_back(&empty);
        let (disk, plugged) = plug(&server);
        let operation = 1 + chance.below(whole.operations);
        let file = place.path().join(format!("cut-{number}"));
        server.cut_after(operation, &file);
        let mut command = setup(&disk);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // It may need fewer operations this time.
        while !file.exists() && child.try_wait().unwrap().is_none() {
            thread::sleep(PAUSE);
        }
        let _ = child.kill();
        plugged.unplug();
        let said = child.wait_with_output().unwrap().stdout;
        drop((disk, plugged));
        let loss = server.cut(|limit| chance.below(limit));
        let said = String::from_utf8_lossy(&said);
        let step = said.lines().last().and_then(|line| line.split(':').next()).unwrap_or_default();
        println!(
            "FIGURE seed {seed} cut {number}: at operation {operation} of {}, in `{step}`: {} of {} sectors lost",
            whole.operations, loss.lost, loss.cached
        );
        *steps.entry(step.to_string()).or_default() += 1;
        (cached, lost) = (cached + loss.cached, lost + loss.lost);
        let (disk, plugged) = plug(&server);
        let said = run(&mut setup(&disk));
        assert!(said.contains("MOSFS-INSTALL-VERDICT: 0 "), "{said}");
        disk.expect_installed(200);
        drop((disk, plugged));
        // Nothing of it is in a cache alone.
        assert_eq!(server.cut(|_| 0).cached, 0);
    }
    println!("FIGURE {cuts} power cuts in {steps:?}, {lost} of {cached} sectors lost");
    assert!(cached > 0, "the disk had nothing to lose, so that nothing was tested");
    assert_eq!(machine.floor(), 0);
}
