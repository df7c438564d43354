//! `mosfs iso` from a registry, and `mosfs iso --verify` of what is no install medium, or was made to look like one.

#[path = "registry/debian.rs"]
#[allow(dead_code)]
mod debian;
#[path = "kernel/fixture.rs"]
#[allow(dead_code)]
mod fixture;
#[path = "common/installer.rs"]
mod installer;
#[path = "common/tools.rs"]
mod tools;

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use debian::{Config, Debian};
use fixture::{MOSFS, Publisher, refused};
use tempfile::TempDir;
use tools::{run, sh};

/// How much memory a check may have, in KiB: what is verified is read in parts.
const MAX_MEMORY: u64 = 1 << 20;
/// The sectors of ISO 9660, in bytes.
const SECTOR: usize = 2048;

/// A publisher with version 200 in a store, and its medium `install.iso`.
fn publisher() -> &'static Publisher {
    static PUBLISHER: OnceLock<Publisher> = OnceLock::new();
    PUBLISHER.get_or_init(|| {
        let publisher = installer::publisher();
        publisher.build(200, "store", &[]);
        run(&mut mosfs(publisher.dir(), &["iso", "oci:store", "-o", "install.iso"]));
        publisher
    })
}

/// `mosfs` with little memory, for a home without settings.
fn mosfs(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-ec", &format!("ulimit -v {MAX_MEMORY}; exec \"$@\""), "sh", MOSFS]).args(words);
    command.current_dir(dir).env_remove("MOSFS_FAILPOINT").env("MOSFS_CONFIG", dir.join("none"));
    for variable in ["REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_RUNTIME_DIR"] {
        command.env_remove(variable);
    }
    command.env("HOME", dir);
    command
}

fn verify(file: &Path) -> Command {
    installer::verify(mosfs(publisher().dir(), &[]), file)
}

/// What `--verify` says of a file that is no good medium.
fn bad(file: &Path) -> String {
    refused(&mut verify(file), 3)
}

/// A system that a registry holds makes the same medium as the one in the publisher's store.
#[test]
fn a_medium_of_a_registrys_system_has_the_same_bytes() {
    let (publisher, registry, dir) =
        (publisher(), Debian::start(&Config::default()), TempDir::new().unwrap());
    let to = registry.source("fleet");
    run(&mut mosfs(publisher.dir(), &["push", "--store", "store", &to]));
    let iso = |source: &str| {
        let mut command = mosfs(dir.path(), &["iso", source, "-o", "remote.iso"]);
        command.args(["--net-timeout", "30"]);
        command
    };
    for source in [to.clone(), format!("{to}:200")] {
        run(&mut iso(&source));
        run(Command::new("cmp").arg(dir.path().join("remote.iso")).arg(publisher.path("install.iso")));
        assert_eq!(sh(dir.path(), "ls -A"), "remote.iso\n", "nothing is left beside the medium");
        fs::remove_file(dir.path().join("remote.iso")).unwrap();
    }
    // A version that is not there, a prefix that is not there, a registry that is not there.
    let said = refused(&mut iso(&format!("{to}:7")), 2);
    assert!(said.contains("has no image named `7`; it has `200`"), "{said}");
    let said = refused(&mut iso(&registry.source("nobody")), 2);
    assert!(said.contains("nobody is not a system"), "{said}");
    drop(registry);
    refused(&mut iso(&to), 1);
    assert_eq!(sh(dir.path(), "ls -A"), "", "neither a medium nor what it would be made of");
}

/// A pipe can be read once.
#[test]
fn answers_may_come_from_a_pipe() {
    let (publisher, dir) = (publisher(), TempDir::new().unwrap());
    let iso = dir.path().join("piped.iso");
    let script = format!(
        "echo 'disk: serial:S3Z9NB0K' | {MOSFS} iso oci:store -o {} --answers /dev/stdin",
        iso.display()
    );
    sh(publisher.dir(), &script);
    run(Command::new("xorriso")
        .args(["-osirrox", "on", "-indev"])
        .arg(&iso)
        .args(["-extract", "/mosfs/answers.yaml"])
        .arg(dir.path().join("found")));
    assert_eq!(fs::read_to_string(dir.path().join("found")).unwrap(), "disk: serial:S3Z9NB0K\n");
    assert!(run(&mut verify(&iso)).contains("answers (not signed)"));
}

#[test]
fn what_is_no_file_with_an_image_is_refused_at_once() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("folder")).unwrap();
    let _socket = UnixListener::bind(path("socket")).unwrap();
    sh(dir.path(), "mkfifo fifo; ln -s loop loop; ln -s fifo link");
    for (name, found) in [
        ("folder", "a folder"),
        ("fifo", "a named pipe"),
        ("link", "a named pipe"),
        ("socket", "a socket"),
        ("loop", "symbolic links"),
        ("/dev/zero", "a character device"),
        ("nowhere", "No such file"),
    ] {
        let said = refused(&mut verify(&path(name)), 1);
        assert!(said.contains(found), "{name}: {said}");
    }
    // Files, but none is an image of a medium.
    fs::write(path("empty"), "").unwrap();
    fs::write(path("text"), "disk: only-empty\n".repeat(10_000)).unwrap();
    fs::File::create(path("sparse")).unwrap().set_len(1 << 40).unwrap();
    let ends = "it has 0 bytes, and ends before the volume descriptor at byte 32768 does";
    assert!(bad(&path("empty")).contains(ends));
    for name in ["text", "sparse"] {
        let said = bad(&path(name));
        assert!(said.contains("there is no ISO 9660 volume labelled MOSFS-INSTALL"), "{name}: {said}");
    }
}

/// Images by another program, of the very files of a good medium: with its label, they are still not what mosfs writes.
#[test]
fn an_image_by_another_program_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    run(Command::new("xorriso")
        .args(["-osirrox", "on", "-indev"])
        .arg(publisher().path("install.iso"))
        .args(["-extract", "/"])
        .arg(path("tree")));
    let make = |name: &str, options: &str| {
        sh(dir.path(), &format!("xorriso -as mkisofs -quiet {options} -o {name} tree 2>&1"));
        bad(&path(name))
    };
    let said = make("other.iso", "-r -V DEBIAN");
    assert!(said.contains("there is no ISO 9660 volume labelled MOSFS-INSTALL"), "{said}");
    let said = make("label.iso", "-r -V MOSFS-INSTALL");
    assert!(said.contains("EFI system partition"), "{said}");
    // Names as ISO 9660 alone has them.
    make("plain.iso", "-V MOSFS-INSTALL");
    // With a partition where a medium has it.
    let esp = "dd if=/dev/zero of=esp bs=1M count=6 status=none";
    sh(dir.path(), esp);
    make(
        "esp.iso",
        "-r -V MOSFS-INSTALL -append_partition 2 0xef esp -appended_part_as_gpt -e --interval:appended_partition_2:all:: -no-emul-boot",
    );
    sh(dir.path(), "chmod -R u+w tree; rm -r tree/mosfs");
    let said = make("without.iso", "-r -V MOSFS-INSTALL");
    assert!(said.contains("it has no /mosfs/medium.json"), "{said}");
}

/// The records of a folder of an image: where each one is, in bytes.
fn records(image: &[u8], at: usize, size: usize) -> Vec<usize> {
    let (mut found, mut place) = (Vec::new(), at);
    while place < at + size {
        match usize::from(image[place]) {
            0 => place = (place + 1).next_multiple_of(SECTOR),
            length => {
                found.push(place);
                place += length;
            }
        }
    }
    found
}

fn number(image: &[u8], at: usize) -> usize {
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize
}

/// Folders of a good medium, made into what no folder is. Everything is bounded, and nothing leads out of the image.
#[test]
fn folders_that_are_none_are_refused() {
    let dir = TempDir::new().unwrap();
    let copy = dir.path().join("copy.iso");
    let good = fs::read(publisher().path("install.iso")).unwrap();
    let root = 16 * SECTOR + 156;
    let (at, size) = (number(&good, root + 2) * SECTOR, number(&good, root + 10));
    let in_root = records(&good, at, size);
    assert_eq!(in_root.len(), 4, "itself, the one above, mosfs, store");
    let store = in_root[3];
    let (store_at, store_size) = (number(&good, store + 2) * SECTOR, number(&good, store + 10));
    let file = *records(&good, store_at, store_size).last().unwrap();
    assert_eq!(good[file + 25] & 2, 0, "a file");
    let name = file + good[file..].windows(2).position(|pair| pair == b"NM").unwrap();
    let length = usize::from(good[name + 2]) - 5;
    fs::write(&copy, &good).unwrap();
    let image = fs::File::options().write(true).open(&copy).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        image.write_all_at(bytes, at as u64).unwrap();
        let said = bad(&copy);
        image.write_all_at(&good[at..at + bytes.len()], at as u64).unwrap();
        said
    };
    let sector = |sector: usize| (sector as u32).to_le_bytes();
    // Folders in themselves, or in each other, of any size, and at the very end.
    for (at, bytes) in [
        (root + 2, sector(16)),
        (root + 2, [0xff; 4]),
        (root + 10, [0xff; 4]),
        (root + 10, [0; 4]),
        (root + 10, sector(127 << 20)),
        (store + 2, sector(at / SECTOR)),
        (store + 2, sector(good.len() / SECTOR - 1)),
        (store + 2, sector(good.len() / SECTOR)),
        (store + 10, [0xff; 4]),
        (store + 10, sector(good.len())),
        // A file of 4 GiB, and one that is nowhere.
        (file + 10, [0xff; 4]),
        (file + 2, [0xff; 4]),
    ] {
        with(at, &bytes);
    }
    // Names that lead elsewhere, that are none, and that another file has.
    let names = ["..", ".", "/etc", "a/../b", "", "\0", "\u{1b}[2J", "index.json", "Mosfs"];
    for other in names.into_iter().filter(|other| other.len() <= length) {
        let mut field = good[name..name + 5 + length].to_vec();
        field[5..5 + other.len()].copy_from_slice(other.as_bytes());
        field[2] = (5 + other.len()) as u8;
        let said = with(name, &field);
        assert!(!said.contains('\u{1b}'), "{said:?}");
    }
    // Lengths of records, identifiers and names.
    for at in [in_root[0], in_root[2], store, file, store + 32, file + 32, name + 2] {
        for value in [0, 1, 2, 4, 5, 33, 34, 127, 254, 255] {
            if good[at] != value {
                with(at, &[value]);
            }
        }
    }
    // A folder that is a file, a file that is a folder or goes on without end.
    for (at, flags) in [(store + 25, 0), (file + 25, 2), (file + 25, 0x80), (in_root[2] + 25, 0x82)] {
        with(at, &[flags]);
    }
    run(&mut verify(&copy));
}

/// Wherever a document names a blob, it may name one that is not on the medium.
#[test]
fn a_medium_that_lacks_what_it_names_is_refused() {
    let good = fs::read(publisher().path("install.iso")).unwrap();
    let dir = TempDir::new().unwrap();
    let copy = dir.path().join("copy.iso");
    fs::write(&copy, &good).unwrap();
    let image = fs::File::options().write(true).open(&copy).unwrap();
    let name = b"\"digest\":\"sha256:";
    let places: Vec<_> =
        good.windows(name.len()).enumerate().filter(|(_, part)| part == name).map(|(at, _)| at).collect();
    assert!(places.len() > 8, "in the index, and in manifests");
    for at in places {
        let at = at + name.len();
        let other = if good[at] == b'0' { b"1" } else { b"0" };
        image.write_all_at(other, at as u64).unwrap();
        bad(&copy);
        image.write_all_at(&good[at..=at], at as u64).unwrap();
    }
    run(&mut verify(&copy));
}

#[test]
fn a_medium_that_says_it_is_another_version_is_refused() {
    let publisher = publisher();
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("copy.iso");
    let mut bytes = fs::read(publisher.path("install.iso")).unwrap();
    let json = b"\"version\":200";
    let at = bytes.windows(json.len()).position(|window| window == json).unwrap();
    bytes[at + json.len() - 1] = b'1';
    fs::write(&image, &bytes).unwrap();
    let said = bad(&image);
    assert!(said.contains("mosfs/medium.json names another system than the one in /store"), "{said}");
}
