//! `mosfs iso`: install media as other tools see them, the same bytes for the same input, and what `--verify` finds.

#[path = "kernel/fixture.rs"]
#[allow(dead_code)]
mod fixture;
#[path = "common/installer.rs"]
mod installer;
#[path = "common/tools.rs"]
mod tools;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use fixture::{MOSFS, PRODUCT, Publisher, refused};
use tempfile::TempDir;
use tools::{need_root, run, run_any, sh};

/// What the import manifest of a medium says.
const ISO: &str = "image_type: iso\n";

/// A publisher with version 200 in a store, and its medium `install.iso`.
fn publisher() -> &'static Publisher {
    static PUBLISHER: OnceLock<Publisher> = OnceLock::new();
    PUBLISHER.get_or_init(|| {
        let publisher = installer::publisher();
        publisher.import(200, ISO);
        run(&mut publisher.command("store", &["--iso", "install.iso"]));
        publisher
    })
}

fn mosfs(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(MOSFS);
    command.current_dir(dir).args(words).env_remove("MOSFS_FAILPOINT").env("MOSFS_CONFIG", dir.join("none"));
    command
}

fn verify(file: &Path) -> Command {
    installer::verify(mosfs(publisher().dir(), &[]), file)
}

/// What `--verify` says of a medium that is not good.
fn bad(file: &Path) -> String {
    refused(&mut verify(file), 3)
}

/// Where a partition begins, and its size, in bytes.
fn esp(iso: &Path) -> (u64, u64) {
    let table = run(Command::new("sfdisk").arg("-d").arg(iso));
    let row = table.lines().find(|line| line.contains("C12A7328-F81F-11D2-BA4B-00A0C93EC93B"));
    let row = row.unwrap_or_else(|| panic!("no EFI system partition: {table}"));
    let number = |key: &str| {
        let text = row.split(key).nth(1).unwrap().trim_start_matches([' ', '=']);
        text.split(',').next().unwrap().trim().parse::<u64>().unwrap() * 512
    };
    assert!(row.contains("iso2 :"), "{row}");
    (number("start"), number("size"))
}

#[test]
fn other_tools_find_the_system_and_the_kernel_on_a_medium() {
    let (publisher, dir) = (publisher(), TempDir::new().unwrap());
    let iso = publisher.path("install.iso");
    let torito = run(Command::new("xorriso").arg("-indev").arg(&iso).args(["-report_el_torito", "plain"]));
    let images: Vec<_> = torito.lines().filter(|line| line.starts_with("El Torito boot img")).collect();
    assert!(images.len() == 1 && images[0].contains(" UEFI "), "{torito}");
    let said = run(Command::new("sfdisk").arg("--verify").arg(&iso));
    assert!(said.contains("No errors detected"), "{said}");
    let (at, size) = esp(&iso);
    // What the firmware finds on a CD is what it finds on a stick.
    let lba = images[0].split_whitespace().last().unwrap().parse::<u64>().unwrap();
    assert_eq!(lba * 2048, at, "{torito}");
    sh(
        dir.path(),
        &format!(
            "dd if={} of=esp bs=1M iflag=skip_bytes,count_bytes skip={at} count={size} status=none",
            iso.display()
        ),
    );
    run(Command::new("fsck.fat").arg("-n").arg(dir.path().join("esp")));
    sh(dir.path(), &format!("mcopy -n -i {}@@{at} ::EFI/BOOT/BOOTX64.EFI boot.efi", iso.display()));
    let all = sh(dir.path(), "mdir -/ -b -i esp ::");
    assert_eq!(
        all.lines().filter(|line| !line.ends_with('/')).collect::<Vec<_>>(),
        ["::/EFI/BOOT/BOOTX64.EFI"]
    );
    let target = publisher.unpack("store", 200).join("mosfs.efi");
    assert!(
        fs::read(dir.path().join("boot.efi")).unwrap() == fs::read(target).unwrap(),
        "BOOTX64.EFI is mosfs.efi"
    );
    let sections = sh(dir.path(), "objdump -h boot.efi");
    for name in [".osrel", ".cmdline", ".linux", ".initrd"] {
        assert!(sections.contains(name), "{sections}");
    }

    let out = dir.path().join("out");
    run(Command::new("xorriso")
        .args(["-osirrox", "on", "-indev"])
        .arg(&iso)
        .args(["-extract", "/"])
        .arg(&out));
    let files = sh(&out, "find . -type f -printf '%P\\n' | grep -v '^store/blobs/' | LC_ALL=C sort");
    assert_eq!(files, "mosfs/medium.json\nstore/index.json\nstore/oci-layout\n");
    let manifest = publisher.manifest("store", 200);
    let canonical = run(&mut mosfs(publisher.dir(), &["manifest", "show", "oci:store"]));
    let digest = mosfs::internals::digest::Digest::of(canonical.trim_end().as_bytes());
    let medium: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("mosfs/medium.json")).unwrap()).unwrap();
    assert_eq!(medium["format"], 1);
    assert_eq!(medium["product"], PRODUCT);
    assert_eq!(medium["version"], 200);
    assert_eq!(manifest["version"], 200);
    assert_eq!(medium["system"], digest.to_string());
    // Names, blobs, signatures are those of a copy.
    sh(dir.path(), "chmod -R u+w out");
    run(&mut mosfs(dir.path(), &["verify", "oci:out/store"]));
    run(mosfs(publisher.dir(), &["pull", "oci:store:200", "--store"]).arg(dir.path().join("copy")));
    let names = |store: &str| {
        let text = fs::read_to_string(dir.path().join(store).join("index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut all: Vec<_> =
            index["manifests"].as_array().unwrap().iter().map(ToString::to_string).collect();
        all.sort();
        all
    };
    assert_eq!(names("out/store"), names("copy"));
    let blobs = |store: &str| sh(&dir.path().join(store), "ls blobs/sha256");
    assert_eq!(blobs("out/store"), blobs("copy"));
    let place = dir.path().join("image");
    run(Command::new("skopeo")
        .args(["copy", "--quiet"])
        .arg(format!("oci:{}:{}", out.join("store").display(), image_name(&manifest)))
        .arg(format!("oci:{}", place.display())));
}

fn image_name(manifest: &serde_json::Value) -> String {
    let digest = manifest["targets"]["hostfs"]["digest"].as_str().unwrap();
    format!("mos/images/hostfs:{}", digest.replace(':', "/"))
}

/// Rule (ISO 9660 of xorriso): names of Rock Ridge, and nobody may write.
#[test]
fn names_and_modes_are_those_of_rock_ridge() {
    let list = run(Command::new("xorriso")
        .arg("-indev")
        .arg(publisher().path("install.iso"))
        .args(["-find", "/", "-exec", "lsdl"]));
    let modes: Vec<_> = list.lines().filter(|line| line.ends_with('\'')).collect();
    assert!(modes.len() > 12, "{list}");
    for line in &modes {
        assert!(line.starts_with("dr-xr-xr-x") || line.starts_with("-r--r--r--"), "{line}");
        assert!(line.contains(" 0        0 "), "{line}");
    }
    assert!(list.contains("'/store/oci-layout'"), "{list}");
}

#[test]
fn a_medium_is_hardly_larger_than_its_store_and_its_kernel() {
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    let iso = size(&publisher().path("install.iso"));
    let folder = publisher().path("store");
    let store: u64 = sh(&folder, "cat blobs/sha256/* | wc -c").trim().parse().unwrap();
    let kernel = size(&publisher().unpack("store", 200).join("mosfs.efi"));
    // FAT16 has a smallest size; the partition begins at a whole MiB, and the medium ends with 300 KiB of zeros.
    let esp = (kernel + kernel / 50 + (2 << 20)).max(6 << 20);
    assert!(iso < store + esp + (2 << 20), "{iso} bytes, store {store}, kernel {kernel}");
    assert!(iso < store + (30 << 20), "{iso} bytes, store {store}");
}

/// A command as nobody, without a network, tomorrow, who lets no one else read.
fn as_nobody(dir: &Path, program: &Path, words: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--net", "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .args(["faketime", "-f", "+1d", "sh", "-ec", "umask 077; exec \"$@\"", "sh"])
        .arg(program)
        .args(words)
        .current_dir(dir)
        .env("HOME", dir)
        .env_remove("MOSFS_FAILPOINT");
    command
}

/// The same input is the same medium, whoever builds and writes it, where and when.
#[test]
fn the_same_input_is_the_same_medium() {
    need_root();
    let publisher = installer::publisher();
    publisher.import(200, ISO);
    run(&mut publisher.command("store", &["--iso", "one.iso"]));
    let dir = TempDir::new().unwrap();
    // Readable for anybody, as the program is.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let other = dir.path().join("a/b");
    fs::create_dir_all(other.parent().unwrap()).unwrap();
    sh(publisher.dir(), &format!("cp -a . {}", other.display()));
    sh(&other, "chmod -R a+rX . && chmod 600 keys/*.key && chown -R 65534:65534 .");
    let program = dir.path().join("mosfs");
    fs::copy(MOSFS, &program).unwrap();
    run(&mut as_nobody(&other, &program, &["iso", "oci:store", "-o", "two.iso"]));
    let (one, two) = (publisher.path("one.iso"), other.join("two.iso"));
    run(Command::new("cmp").arg(&one).arg(&two));
    assert_eq!(fs::metadata(&two).unwrap().permissions().mode() & 0o777, 0o644);
    // From a copy of the store, whose index is in another order, and with another system in it.
    publisher.build(199, "copy", &[]);
    run(&mut mosfs(publisher.dir(), &["pull", "oci:store", "--store", "copy"]));
    publisher.build(201, "copy", &[]);
    run(&mut mosfs(publisher.dir(), &["iso", "oci:copy:200", "-o", "three.iso"]));
    run(Command::new("cmp").arg(&one).arg(publisher.path("three.iso")));
    let left = sh(publisher.dir(), "ls -A | grep '^\\.' || true");
    assert_eq!(left, "", "nothing is left beside the media");
    // All of it by nobody, in a store of their own.
    let build = publisher.command("theirs", &["--iso", "theirs.iso", "--jobs", "1"]);
    let words: Vec<_> = build.get_args().map(|word| word.to_str().unwrap()).collect();
    publisher.import(200, ISO);
    fs::copy(publisher.path("import.yaml"), other.join("import.yaml")).unwrap();
    run(&mut as_nobody(&other, &program, &words));
    run(Command::new("cmp").arg(&one).arg(other.join("theirs.iso")));
}

#[test]
fn answers_and_keys_are_on_the_medium_and_private_keys_never() {
    let publisher = publisher();
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let iso = |more: &[&str]| {
        let mut command = mosfs(publisher.dir(), &["iso", "oci:store", "-o"]);
        command.arg(path("x.iso")).args(more);
        command
    };
    let answers = path("answers.yaml");
    let file = answers.to_str().unwrap();
    fs::write(&answers, "disk: only-empty\nwipe: no\n").unwrap();
    run(&mut iso(&["--answers", file]));
    run(Command::new("xorriso").args(["-osirrox", "on", "-indev"]).arg(path("x.iso")).args([
        "-extract",
        "/mosfs/answers.yaml",
        path("found").to_str().unwrap(),
    ]));
    assert_eq!(fs::read(path("found")).unwrap(), fs::read(&answers).unwrap());
    let said = run(&mut verify(&path("x.iso")));
    assert!(said.contains("answers (not signed)"), "{said}");

    fs::remove_file(path("x.iso")).unwrap();
    fs::write(&answers, "dsk: only-empty\n").unwrap();
    let said = refused(&mut iso(&["--answers", file]), 2);
    assert!(said.contains("answers.yaml:1:1: dsk: found an unknown field"), "{said}");
    let key = fs::read_to_string(publisher.path("keys/provision.key")).unwrap();
    let comment: String = key.lines().map(|line| format!("# {line}\n")).collect();
    fs::write(&answers, format!("{comment}disk: only-empty\n")).unwrap();
    let said = refused(&mut iso(&["--answers", file]), 2);
    assert!(said.contains("private key"), "{said}");

    let keys = path("sb");
    fs::create_dir(&keys).unwrap();
    let folder = keys.to_str().unwrap();
    let said = refused(&mut iso(&["--enroll", folder]), 2);
    assert!(said.contains("sb/PK.auth: no such file; expected PK.auth, KEK.auth, db.auth"), "{said}");
    for name in ["PK", "KEK", "db"] {
        // EFI_TIME, WIN_CERTIFICATE_UEFI_GUID with 40 bytes, and a list.
        let mut auth = vec![0; 16];
        auth.extend_from_slice(&40_u32.to_le_bytes());
        auth.extend_from_slice(&[0x00, 0x02, 0xf1, 0x0e]);
        auth.extend_from_slice(&[0x9d, 0xd2, 0xaf, 0x4a, 0xdf, 0x68, 0xee, 0x49]);
        auth.extend_from_slice(&[0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7]);
        auth.extend_from_slice(format!("{name:16}the list").as_bytes());
        fs::write(keys.join(format!("{name}.auth")), auth).unwrap();
        fs::write(keys.join(format!("{name}.key")), &key).unwrap();
    }
    run(&mut iso(&["--enroll", folder]));
    let bytes = fs::read(path("x.iso")).unwrap();
    assert!(!bytes.windows(11).any(|part| part == b"PRIVATE KEY"));
    let said = run(&mut verify(&path("x.iso")));
    assert!(said.contains("keys to enroll (not signed)"), "{said}");
    let (at, _) = esp(&path("x.iso"));
    let copy = |name: &str| {
        sh(dir.path(), &format!("rm -f part; mcopy -n -i x.iso@@{at} ::{name} part"));
        fs::read(path("part")).unwrap()
    };
    let boot = publisher.unpack("store", 200);
    assert!(copy("EFI/BOOT/BOOTX64.EFI") == fs::read(boot.join("loader.efi")).unwrap());
    assert!(copy("EFI/Linux/mosfs.efi") == fs::read(boot.join("mosfs.efi")).unwrap());
    assert_eq!(copy("loader/keys/auto/KEK.auth"), fs::read(keys.join("KEK.auth")).unwrap());
    // systemd-boot 252 of Debian 12 knows no `if-safe`, shows an error for it, and enrolls nothing.
    let loader = fs::read(boot.join("loader.efi")).unwrap();
    let magic = b"#### LoaderInfo: systemd-boot 252";
    let way = if loader.windows(magic.len()).any(|part| part == magic) { "manual" } else { "if-safe" };
    let conf = String::from_utf8(copy("loader/loader.conf")).unwrap();
    assert_eq!(conf, format!("timeout 5\nsecure-boot-enroll {way}\n"));
    fs::remove_file(path("x.iso")).unwrap();
    fs::copy(keys.join("PK.key"), keys.join("PK.auth")).unwrap();
    let said = refused(&mut iso(&["--enroll", folder]), 2);
    assert!(said.contains("PK.auth") && said.contains("private key"), "{said}");
    fs::write(keys.join("PK.auth"), [1; 100]).unwrap();
    let said = refused(&mut iso(&["--enroll", folder]), 2);
    assert!(said.contains("PK.auth: expected a signed update of a UEFI variable"), "{said}");
    assert!(!path("x.iso").exists());
}

#[test]
fn a_medium_that_cannot_be_is_refused_before_anything_is_written() {
    let publisher = installer::publisher();
    publisher.import(200, ISO);
    let said = refused(&mut publisher.command("store", &[]), 2);
    assert!(said.contains("import.yaml: image_type: `iso` requires an install medium"), "{said}");
    assert!(said.contains("`--iso`"), "{said}");
    let said = refused(
        publisher.signed_by("keys", "store").args(["--floor-key", "keys/floor.key", "--iso", "x"]),
        2,
    );
    assert!(said.contains("--iso requires a system with a kernel of its own"), "{said}");
    assert!(!publisher.path("store").exists());
    let said = refused(&mut publisher.command("store", &["--iso", "keys"]), 2);
    assert!(
        said.contains("keys: expected the path of a regular file or a new one, found a folder"),
        "{said}"
    );
    // Where a file would replace a disk.
    let disk = publisher.path("disk");
    symlink("/dev/full", &disk).unwrap();
    let said = refused(&mut publisher.command("store", &["--iso", "disk"]), 2);
    assert!(
        said.contains("disk: expected the path of a regular file or a new one, found a special file"),
        "{said}"
    );
    // A system without a kernel.
    publisher.import(200, "");
    run(publisher.signed_by("keys", "plain").args(["--floor-key", "keys/floor.key"]));
    let said = refused(&mut mosfs(publisher.dir(), &["iso", "oci:plain", "-o", "x"]), 2);
    assert!(
        said.contains(
            "version 200 has no kernel that an install medium could start: it has no target `boot`"
        ),
        "{said}"
    );
    assert!(said.contains("`mosfs build --ca`"), "{said}");
    // One whose kernel could not install it.
    let other = Publisher::new();
    other.build(200, "store", &[]);
    let said = refused(&mut mosfs(other.dir(), &["iso", "oci:store", "-o", "x"]), 2);
    assert!(said.contains("its hostfs had no mke2fs"), "{said}");
    let said = refused(&mut mosfs(publisher.dir(), &["iso", "oci:plain:7", "-o", "x"]), 2);
    assert!(said.contains('7'), "{said}");
    refused(&mut mosfs(publisher.dir(), &["iso", "oci:plain"]), 2);
    refused(&mut mosfs(publisher.dir(), &["iso", "-o", "x"]), 2);
    refused(&mut mosfs(publisher.dir(), &["iso", "oci:plain", "--verify", "x"]), 2);
    assert!(!publisher.path("x").exists());
    // In two halves, the second writes the medium.
    publisher.import(200, ISO);
    let first = ["--to-sign", "message", "--floor-to-sign", "floor", "--floor-pub", "keys/floor.pub"];
    let mut command =
        mosfs(publisher.dir(), &["build", "import.yaml", "--store", "halves", "--ca", "keys/ca.pem"]);
    run(command.args(first));
    sh(
        publisher.dir(),
        "openssl dgst -sha256 -sign keys/signer.key -out sig message && \
         openssl dgst -sha256 -sign keys/floor.key -out floor.sig floor",
    );
    let mut command =
        mosfs(publisher.dir(), &["build", "message", "--store", "halves", "--signature", "sig"]);
    command.args([
        "--cert",
        "keys/signer.pem",
        "--floor-signature",
        "floor.sig",
        "--floor-pub",
        "keys/floor.pub",
    ]);
    run(command.args(["--iso", "halves.iso"]));
    let mut command =
        mosfs(publisher.dir(), &["iso", "--ca", "keys/ca.pem", "--product", PRODUCT, "--verify"]);
    run(command.arg("halves.iso"));
}

/// A blob that is damaged in the store is not copied to a medium.
#[test]
fn what_is_not_as_it_was_signed_does_not_get_onto_a_medium() {
    let publisher = installer::publisher();
    publisher.build(200, "store", &[]);
    let folder = publisher.path("store");
    let largest = sh(&folder, "ls -S blobs/sha256 | head -1");
    let blob = publisher.path("store").join("blobs/sha256").join(largest.trim());
    flip(&blob, fs::metadata(&blob).unwrap().len() / 2);
    let iso = || mosfs(publisher.dir(), &["iso", "oci:store", "-o", "x.iso"]);
    let said = refused(&mut iso(), 3);
    assert!(said.contains(largest.trim()) || said.contains("block"), "{said}");
    fs::remove_file(&blob).unwrap();
    let said = refused(&mut iso(), 1);
    assert!(said.contains(&format!("does not have the blob sha256:{}", largest.trim())), "{said}");
    assert_eq!(sh(publisher.dir(), "ls -A | grep -c iso || true").trim(), "0");
}

/// Flips a bit of a file.
fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap_or_else(|_| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::File::options().read(true).write(true).open(path).unwrap()
    });
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 4;
    file.write_all_at(&byte, at).unwrap();
}

/// A copy of the medium, to be damaged.
struct Copy {
    _dir: TempDir,
    iso: PathBuf,
    bytes: Vec<u8>,
}

impl Copy {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let iso = dir.path().join("copy.iso");
        let bytes = fs::read(publisher().path("install.iso")).unwrap();
        fs::write(&iso, &bytes).unwrap();
        Self { _dir: dir, iso, bytes }
    }

    /// Where these bytes are on the medium.
    fn find(&self, part: &[u8]) -> u64 {
        let begin = &part[..part.len().min(64)];
        let at = self.bytes.windows(begin.len()).position(|window| window == begin);
        at.expect("the bytes are on the medium") as u64
    }

    /// What is said of the medium with one bit flipped.
    fn flipped(&self, at: u64) -> String {
        flip(&self.iso, at);
        let said = bad(&self.iso);
        flip(&self.iso, at);
        said
    }
}

/// The blobs of the store's artifacts of a type: what they say of a system.
fn artifact(kind: &str) -> Vec<u8> {
    let store = publisher().path("store");
    let read = |digest: &serde_json::Value| {
        let hex = digest.as_str().unwrap().trim_start_matches("sha256:").to_string();
        fs::read(store.join("blobs/sha256").join(hex)).unwrap()
    };
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(store.join("index.json")).unwrap()).unwrap();
    let all = index["manifests"].as_array().unwrap();
    let entry =
        all.iter().find(|entry| entry["artifactType"].as_str().is_some_and(|found| found.contains(kind)));
    let entry = entry.unwrap_or_else(|| panic!("no {kind} in {index}"));
    let manifest: serde_json::Value = serde_json::from_slice(&read(&entry["digest"])).unwrap();
    read(&manifest["layers"][0]["digest"])
}

#[test]
fn a_good_medium_verifies_also_on_a_stick() {
    let iso = publisher().path("install.iso");
    let said = run(&mut verify(&iso));
    assert!(said.contains("good: version 200 (sha256:") && said.contains("kernel id sha256:"), "{said}");
    let id = publisher().kernel_id("store", 200);
    assert!(said.contains(&id), "{said}");
    let said = run(verify(&iso).arg("--json"));
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["kernel_id"], format!("sha256:{id}"));
    assert_eq!(said["version"], 200);
    // With CONFIG in place of options.
    let config = TempDir::new().unwrap();
    fs::copy(publisher().path("keys/ca.pem"), config.path().join("manifestCA.pem")).unwrap();
    fs::copy(publisher().path("keys/floor.pub"), config.path().join("floor.pub")).unwrap();
    fs::write(config.path().join("product"), format!("{PRODUCT}\n")).unwrap();
    let mut command = mosfs(publisher().dir(), &["iso", "--verify", "install.iso"]);
    run(command.env("MOSFS_CONFIG", config.path()));
    // A stick is larger than what was written to it.
    need_root();
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk");
    sh(dir.path(), &format!("cp {} disk && truncate -s +64M disk", iso.display()));
    let device = run(Command::new("losetup").args(["--find", "--show"]).arg(&disk));
    let outcome = run_any(&mut verify(Path::new(device.trim())));
    run(Command::new("losetup").args(["-d", device.trim()]));
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    let said = bad(&disk);
    assert!(said.contains("bytes, expected"), "{said}");
}

#[test]
fn a_medium_of_others_or_of_another_product_is_refused() {
    let dir = TempDir::new().unwrap();
    fixture::generate_keys(dir.path(), "keys");
    let iso = publisher().path("install.iso");
    let other = |ca: &str, product: &str| {
        let mut command = mosfs(dir.path(), &["iso", "--ca", ca, "--product", product, "--verify"]);
        refused(command.arg(&iso), 3)
    };
    let said = other("keys/ca.pem", PRODUCT);
    assert!(said.contains("CA"), "{said}");
    let ca = publisher().path("keys/ca.pem");
    let said = other(ca.to_str().unwrap(), "11111111-2222-4333-8444-555555555555");
    assert!(said.contains("product"), "{said}");
    // Nobody said what to trust.
    let said = refused(&mut mosfs(dir.path(), &["iso", "--verify", iso.to_str().unwrap()]), 3);
    assert!(said.contains("trusts no"), "{said}");
    refused(
        &mut mosfs(dir.path(), &["iso", "--verify", "nowhere", "--ca", "keys/ca.pem", "--product", PRODUCT]),
        1,
    );
}

#[test]
fn each_part_of_a_medium_is_checked() {
    let copy = Copy::new();
    let publisher = publisher();
    let (esp_at, esp_size) = esp(&copy.iso);
    let blob = |descriptor: &serde_json::Value| {
        let digest = descriptor["digest"].as_str().unwrap().trim_start_matches("sha256:").to_string();
        fs::read(publisher.path("store").join("blobs/sha256").join(digest)).unwrap()
    };
    let manifest = publisher.manifest("store", 200);
    let image: serde_json::Value = serde_json::from_slice(&blob(&manifest["targets"]["hostfs"])).unwrap();
    for layer in [&image["layers"][0], &publisher.boot("store", 200)["layers"][0]] {
        let bytes = blob(layer);
        let said = copy.flipped(copy.find(&bytes) + bytes.len() as u64 / 2);
        assert!(said.contains(layer["digest"].as_str().unwrap()), "{said}");
        assert!(said.contains("its content has digest"), "{said}");
    }
    for (kind, expected) in [
        ("vnd.mos.system.manifest", "digest"),
        ("signature", "digest"),
        ("certificate", "digest"),
        ("floor", "digest"),
    ] {
        let said = copy.flipped(copy.find(&artifact(kind)) + 20);
        assert!(said.contains(expected), "{kind}: {said}");
    }
    for (at, object) in [
        (0x100, "MBR"),
        (0x200 + 0x50, "partition table"),
        (0x400 + 128 + 2, "partition table"),
        (0x400 + 256, "partition table"),
        (0x7000, "partition table"),
        (0x8000 + 813, "volume descriptor"),
        (0x8800 + 100, "boot record"),
        (0x9000 + 7, "ISO 9660"),
        (esp_at - 1, "ISO 9660"),
        (esp_at + 3, "EFI system partition"),
        (esp_at + 512 + 40, "EFI system partition"),
        // The kernel itself, and free space behind it.
        (esp_at + esp_size / 4, "EFI system partition"),
        (esp_at + esp_size - 9, "EFI system partition"),
        (esp_at + esp_size + 5, "ISO 9660"),
        (copy.bytes.len() as u64 - 1, "backup of the partition table"),
        (copy.bytes.len() as u64 - 512 + 0x20, "backup of the partition table"),
    ] {
        let said = copy.flipped(at);
        assert!(said.contains(&format!("byte {at} ({object}) is not as mosfs writes it")), "{at}: {said}");
    }
    let json = copy.find(b"{\"format\":1,");
    let said = copy.flipped(json + 3);
    assert!(said.contains("mosfs/medium.json"), "{said}");
    run(&mut verify(&copy.iso));
}

/// No bit of a medium is free.
#[test]
fn no_bit_of_a_medium_is_free() {
    let copy = Copy::new();
    let seed: u64 = std::env::var("MOSFS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let rounds = if std::env::var("MOSFS_CAMPAIGN").is_ok_and(|long| long == "long") { 2000 } else { 60 };
    let mut state = seed;
    for _ in 0..rounds {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 20) % copy.bytes.len() as u64;
        // Half of them before the content.
        let at = if state & 1 << 19 == 0 { at } else { at % 0x12000 };
        flip(&copy.iso, at);
        let outcome = run_any(&mut verify(&copy.iso));
        assert_eq!(outcome.status.code(), Some(3), "byte {at} (MOSFS_SEED={seed})");
        flip(&copy.iso, at);
    }
}

#[test]
fn a_medium_that_ends_early_or_holds_more_is_refused() {
    let copy = Copy::new();
    let whole = copy.bytes.len() as u64;
    for length in
        [0, 1, 2047, 32768, 34816, 40000, whole / 2, whole - 2048, whole - 1, whole + 1, whole + 2048]
    {
        fs::File::options().write(true).open(&copy.iso).unwrap().set_len(length).unwrap();
        bad(&copy.iso);
        fs::write(&copy.iso, &copy.bytes).unwrap();
    }
    // Another file, by a tool that adds to images.
    fs::write(copy.iso.with_file_name("more"), "more").unwrap();
    let more = copy.iso.with_file_name("more.iso");
    run_any(
        Command::new("xorriso")
            .arg("-indev")
            .arg(&copy.iso)
            .arg("-outdev")
            .arg(&more)
            .args(["-boot_image", "any", "keep", "-map"])
            .arg(copy.iso.with_file_name("more"))
            .arg("/store/more"),
    );
    bad(&more);
    let said = bad(Path::new("/bin/true"));
    assert!(
        said.contains("it is no install medium: there is no ISO 9660 volume labelled MOSFS-INSTALL"),
        "{said}"
    );
}

/// A system is signed with a target `boot` whose kernel has another id than it says.
#[test]
fn a_kernel_id_is_computed_again() {
    let publisher = installer::publisher();
    publisher.build(200, "store", &[]);
    let layout = publisher.path("store");
    let mut boot = publisher.boot("store", 200);
    boot["annotations"]["vnd.mos.boot.kernel-id"] = format!("sha256:{}", "ab".repeat(32)).into();
    let bytes = serde_json::to_vec(&boot).unwrap();
    let digest = mosfs::internals::digest::Digest::of(&bytes);
    fs::write(layout.join("blobs/sha256").join(digest.hex()), &bytes).unwrap();
    let index = layout.join("index.json");
    let mut entries: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    entries["manifests"].as_array_mut().unwrap().push(serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest.to_string(), "size": bytes.len(),
        "annotations": { "org.opencontainers.image.ref.name": "other" },
    }));
    fs::write(index, entries.to_string()).unwrap();
    let target = "  boot:\n    url: \"oci:store:other\"\n    version: 0.0.1\n    service_type: fs-only\n    \
                  network: {type: none}\n";
    publisher.import(200, target);
    let mut command = publisher.signed_by("keys", "other");
    run(command.args(["--floor-key", "keys/floor.key", "--iso", "x.iso"]));
    let mut command =
        mosfs(publisher.dir(), &["iso", "--ca", "keys/ca.pem", "--product", PRODUCT, "--verify"]);
    let said = refused(command.arg("x.iso"), 3);
    assert!(said.contains(&format!("its kernel id is sha256:{}", "ab".repeat(32))), "{said}");
    assert!(said.contains(&publisher.kernel_id("store", 200)), "{said}");
}

#[test]
fn without_a_name_the_highest_version_is_on_the_medium() {
    let publisher = installer::publisher();
    publisher.build(200, "store", &[]);
    publisher.put_kernel("two");
    publisher.build(201, "store", &[]);
    run(&mut mosfs(publisher.dir(), &["iso", "oci:store", "-o", "new.iso"]));
    let mut command =
        mosfs(publisher.dir(), &["iso", "--ca", "keys/ca.pem", "--product", PRODUCT, "--verify"]);
    let said = run(command.arg("new.iso"));
    assert!(said.contains("version 201") && said.contains(&publisher.kernel_id("store", 201)), "{said}");
}

/// Every commit point of a medium.
#[test]
fn a_crash_leaves_the_old_medium_or_the_new_one() {
    let publisher = installer::publisher();
    publisher.build(200, "store", &[]);
    let iso = || mosfs(publisher.dir(), &["iso", "oci:store", "-o", "x.iso"]);
    fs::write(publisher.path("x.iso"), "old").unwrap();
    let crash = |point: &str| {
        let output = run_any(iso().env("MOSFS_FAILPOINT", point));
        assert_eq!(output.status.code(), None, "{point}: {}", String::from_utf8_lossy(&output.stderr));
        fs::read(publisher.path("x.iso")).unwrap()
    };
    assert_eq!(crash("medium.image.written"), b"old");
    let new = crash("medium.image.renamed");
    run(&mut iso());
    assert!(fs::read(publisher.path("x.iso")).unwrap() == new);
}
