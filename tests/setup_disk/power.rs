//! Power cuts during a setup, on a disk that loses what was not flushed.
//!
//! At the cut the disk stops answering, and of what was in its cache chance decides what is on it. Then firmware finds no
//! boot loader on the disk, or a whole one beside a whole kernel and system; and the same setup runs again on what is left,
//! without `--wipe`.
//!
//! `make campaign` cuts 200 times, or MOSFS_POWER_CUTS times. MOSFS_SEED gives the same moments and losses again, as far as
//! the order of writes is the same.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::thread;

use tempfile::TempDir;

use super::nbd;
use super::plugged::{Chance, PAUSE, Plugged, cuts_and_seed};
use super::tools::{need_root, run, run_any};
use super::{Disk, MIB, Machine, attach, publisher};

/// How many of the last writes and flushes are of the EFI system partition and what follows, at most.
const LAST: u64 = 24;

/// A disk of the server as a block device; it goes before the file that it is made of, also where a check fails.
struct Device {
    disk: Disk,
    plugged: Plugged,
}

fn plug(server: &nbd::Disk) -> Device {
    let plugged = Plugged::new(server, MIB << 20);
    let image = plugged.file().to_path_buf();
    let device = attach(&image, &["--partscan"]);
    let disk = Disk { _dir: TempDir::new().unwrap(), image, device };
    // A setup that is continued needs the partitions of before.
    drop(disk.held());
    Device { disk, plugged }
}

/// Whether firmware finds a boot loader on the disk. Then everything that it starts must be whole.
fn is_startable(disk: &Disk, cut: &str) -> bool {
    let _held = disk.held();
    let esp = disk.part(1);
    let list = run_any(Command::new("mdir").args(["-/", "-b", "-i", &esp, "::"]));
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let names: Vec<_> = list.lines().filter_map(|line| line.strip_prefix("::/")).collect();
    if !names.contains(&"EFI/BOOT/BOOTX64.EFI") {
        return false;
    }
    let kernel = format!("EFI/Linux/mosfs-200-{}.efi", &publisher().kernel_id("store", 200)[..12]);
    let files = publisher().unpack("store", 200);
    for (name, file) in [("EFI/BOOT/BOOTX64.EFI", "loader.efi"), (&kernel, "mosfs.efi")] {
        let found = run_any(Command::new("mtype").args(["-i", &esp, &format!("::/{name}")])).stdout;
        assert!(found == fs::read(files.join(file)).unwrap(), "{cut}: {name} is there in part: {names:?}");
    }
    fs::remove_dir_all(files).unwrap();
    // Nothing is mounted: that would replay the journal.
    let state = run(Command::new("debugfs").args(["-R", "cat /state.json", &disk.part(2)]));
    assert!(state.contains("\"current\":\"200-") || state.contains("\"current\": \"200-"), "{cut}: {state}");
    true
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
    let device = plug(&server);
    run(&mut setup(&device.disk));
    device.disk.expect_installed(200);
    drop(device);
    let whole = server.cut(|_| 0);
    assert_eq!(whole.cached, 0, "what is said to be installed is on the disk");
    let (mut cached, mut lost) = (0, 0);
    let mut steps = BTreeMap::<String, u32>::new();
    let mut startable = 0;
    for number in 1..=cuts {
        server.put_back(&empty);
        let device = plug(&server);
        // Every other one falls where the EFI system partition is written, which has few operations.
        let operation = match number % 2 {
            0 => whole.operations - chance.below(LAST.min(whole.operations)),
            _ => 1 + chance.below(whole.operations),
        };
        let file = place.path().join(format!("cut-{number}"));
        server.cut_after(operation, &file);
        let mut command = setup(&device.disk);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // It may need fewer operations this time.
        while !file.exists() && child.try_wait().unwrap().is_none() {
            thread::sleep(PAUSE);
        }
        let _ = child.kill();
        device.plugged.unplug();
        let said = child.wait_with_output().unwrap().stdout;
        drop(device);
        let loss = server.cut(|limit| chance.below(limit));
        let said = String::from_utf8_lossy(&said);
        let step = said.lines().last().and_then(|line| line.split(':').next()).unwrap_or_default();
        println!(
            "FIGURE seed {seed} cut {number}: at operation {operation} of {}, in `{step}`: {} of {} sectors lost",
            whole.operations, loss.lost, loss.cached
        );
        *steps.entry(step.to_string()).or_default() += 1;
        (cached, lost) = (cached + loss.cached, lost + loss.lost);
        let device = plug(&server);
        startable += u32::from(is_startable(&device.disk, &format!("cut {number}")));
        let said = run(&mut setup(&device.disk));
        assert!(said.contains("MOSFS-INSTALL-VERDICT: 0 "), "{said}");
        device.disk.expect_installed(200);
        drop(device);
        // Nothing of it is in a cache alone.
        assert_eq!(server.cut(|_| 0).cached, 0);
    }
    println!(
        "FIGURE {cuts} power cuts in {steps:?}, {lost} of {cached} sectors lost; {startable} disks could start before the next setup"
    );
    assert!(cached > 0, "the disk had nothing to lose, so that nothing was tested");
    assert_eq!(machine.floor(), 0);
}
