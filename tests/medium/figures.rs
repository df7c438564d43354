//! How long a start takes with the kernel image of a system, and with the initramfs of dracut and of initramfs-tools; how
//! long the steps of an installation take; how large a medium is.
//!
//! Not a test of speed: it prints tables for docs/boot.md and docs/install.md, and fails only where a machine does not start.
//!
//! ```text
//! cargo test --release --test medium figures -- --ignored --nocapture
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::fixture::{MOSFS, PRODUCT};
use super::install::STEPS;
use super::machine::{Ended, Machine, make_initrd, median};
use super::real::{CMDLINE, Device, build, medium, publisher};
use super::tools::{run, sh};

/// How often each machine starts.
const ROUNDS: usize = 5;

/// What a system shows of its start. `$up` is its age when its init began.
const ACTION: &str = r#"echo "vm: init of the system at $up"
/usr/bin/busybox dmesg | sed -n 's/^\[ *\([0-9.]*\)\] Run \/init as init process.*/vm: init of the initramfs at \1/p'
echo "vm: measured $(tr -d '\036\n' </run/log/systemd/tpm2-measure.log)"
echo "vm: boot.json $(cat /run/mosfs/boot.json)"
[ ! -e /sys/firmware/efi ] || mosfs commit || end 9
"#;

fn unpacked_and_packed(initrd: &Path) -> (usize, usize) {
    let packed = fs::read(initrd).expect("the initramfs");
    // A section of a kernel image is padded.
    let mut decoder = zstd::Decoder::with_buffer(&*packed).expect("zstd").single_frame();
    let mut unpacked = Vec::new();
    decoder.read_to_end(&mut unpacked).expect("an initramfs that is zstd from its first byte on");
    let rest = decoder.finish();
    assert!(rest.len() < 4096 && rest.iter().all(|byte| *byte == 0), "one frame");
    let again = zstd::encode_all(&*unpacked, 19).expect("zstd");
    (unpacked.len(), again.len())
}

fn milliseconds(text: &str) -> f64 {
    1e3 * text.trim().parse::<f64>().expect("seconds")
}

/// The moments of a start, in milliseconds since the kernel's own, and the phases of `mosfs boot`.
fn moments(ended: &Ended) -> Vec<(String, f64)> {
    let after = |word: &str| {
        *ended.after(word).first().unwrap_or_else(|| panic!("expected `{word}`\n{}", ended.console))
    };
    let measured: serde_json::Value = serde_json::from_str(after("vm: measured ")).expect("JSON");
    let rooted = measured["content"]["timestamp"].as_f64().expect("a time") / 1e3;
    let record: serde_json::Value = serde_json::from_str(after("vm: boot.json ")).expect("JSON");
    let phases = record["phases_ms"].as_array().expect("phases").iter().map(|phase| {
        let name = phase[0].as_str().expect("a name");
        let ms = phase[1].as_f64().expect("milliseconds");
        (format!("  {name}"), ms)
    });
    let mut list = vec![("kernel to /init".into(), milliseconds(after("vm: init of the initramfs at ")))];
    list.push(("kernel to the mounted root".into(), rooted));
    list.push(("kernel to the system's init".into(), milliseconds(after("vm: init of the system at "))));
    list.extend(phases);
    list
}

/// Prints how long each step of an installation took: from its line on the console to the next one.
fn print_steps(machine: &Machine) {
    let begin = Instant::now();
    let mut last: Option<(String, f64)> = None;
    let mut is_over = false;
    let ended = machine.watch(|line| {
        if is_over {
            return;
        }
        let Some(at) = STEPS.iter().find_map(|word| line.find(word)) else { return };
        let now = begin.elapsed().as_secs_f64();
        match last.take() {
            None => println!("FIGURE power-on to the first line of setup: {now:.1} s"),
            Some((step, since)) => println!("FIGURE {:5.1} s after  {step}", now - since),
        }
        is_over = line[at..].starts_with("vm: ");
        last = Some((line[at..].trim_end().to_string(), now));
    });
    ended.expect(0, &[]);
}

#[test]
#[ignore = "prints figures, of a release build"]
fn starts_installations_and_sizes() {
    let publisher = publisher(ACTION);
    // systemd in dracut's initramfs starts nothing but an operating system.
    publisher.put("usr/lib/os-release", "ID=figures\n");
    let system = build(&publisher, 200, &["--cmdline", CMDLINE]);
    let image = medium(&publisher, &system, "figures", Some("disk: only-empty\n"));
    let bytes = |command: &str| sh(publisher.dir(), command).trim().to_string();
    println!("FIGURE store {} bytes", bytes("cat store-200/blobs/sha256/* | wc -c"));
    println!("FIGURE medium {} bytes", bytes("stat -c %s figures.iso"));

    let device = Device::new(&publisher);
    print_steps(&device.machine(&image, "cd"));

    // The same root as a system whose kernel is the host's.
    let config = device.path("config");
    publisher.import(200, "");
    run(&mut publisher.signed_by("keys", "plain"));
    let mut install = Command::new(MOSFS);
    install.current_dir(publisher.dir()).args([
        "install",
        "oci:plain",
        "--ca",
        "keys/ca.pem",
        "--product",
        PRODUCT,
    ]);
    run(install.env("MOSFS_SYSTEM", device.path("system")).env("MOSFS_CONFIG", &config));
    fs::copy(publisher.path("keys/floor.pub"), config.join("floor.pub")).unwrap();

    let kernel_image = publisher.unpack("store-200", 200).join("mosfs.efi").display().to_string();
    let initrd = device.path("uki");
    sh(publisher.dir(), &format!("objcopy -O binary -j .initrd {} {}", kernel_image, initrd.display()));
    let (unpacked, packed) = unpacked_and_packed(&initrd);
    println!("FIGURE kernel image {} bytes", bytes(&format!("stat -c %s {}", kernel_image)));
    println!("FIGURE initramfs of the kernel image: {unpacked} bytes, {packed} packed");

    let mut machines = vec![("kernel image", Machine { medium: None, ..device.machine(&image, "cd") })];
    for generator in ["dracut", "initramfs-tools"] {
        let initrd = device.path(generator);
        make_initrd(&initrd, generator, "6.12", &config);
        let (unpacked, packed) = unpacked_and_packed(&initrd);
        println!("FIGURE initramfs of {generator}: {unpacked} bytes, {packed} packed");
        let machine = Machine {
            system: Some(device.path("system")),
            tpm: Some(device.path("tpm")),
            memory: 1024,
            cmdline: "root=mosfs rd.shell=0 rd.emergency=poweroff".into(),
            ..Machine::new(&initrd)
        };
        machines.push((generator, machine));
    }

    let mut all: BTreeMap<(usize, String, usize), Vec<f64>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for (way, (_, machine)) in machines.iter().enumerate() {
            let ended = machine.expect(0, &["vm: version 200"]);
            for (number, (name, ms)) in moments(&ended).into_iter().enumerate() {
                all.entry((number, name, way)).or_default().push(ms);
            }
        }
    }
    for ((_, name, way), times) in &all {
        println!("FIGURE {name} with {}: {:.0} ms", machines[*way].0, median(times));
    }
}
