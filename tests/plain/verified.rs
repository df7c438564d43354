//! What verifies a plain file, and what does not.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use crate::images::run;
use crate::layout::{OurMount, mosfs, open_rw};
use crate::mounted::{Mounted, unmount};
use crate::scan::{assert_same, scan};
use crate::{Fixture, as_nobody};

/// What of a mount is equal to the kernel's own mount of the image.
fn assert_as_the_kernel(fixture: &Fixture, ours: &Path, what: &str) {
    let kernel = Mounted::of("squashfs", &fixture.image(), fixture.path("kernel"));
    assert_same(&scan(&kernel.0), &scan(ours), what);
    drop(kernel);
    fs::remove_dir(fixture.path("kernel")).unwrap();
}

#[test]
fn the_tree_may_be_appended_elsewhere_in_the_file_or_in_another_file() {
    let fixture = Fixture::new();
    let (image, bytes) = (fixture.image(), fixture.image_bytes());
    let (appended, root_hash) = fixture.appended();
    let shown = |file: &Path, options: &[&str], root_hash: &str| {
        let options = [options, &["--root-hash", root_hash]].concat();
        let mount = fixture.mount(file, &options);
        let record = mount.record().unwrap();
        assert!(record.verified && record.digest.is_none(), "{record:?}");
        assert_eq!(record.layers[0].root_hash.unwrap().hex(), root_hash);
        assert_eq!(record.source, file.to_str().unwrap());
        assert_as_the_kernel(&fixture, &mount.at, &format!("{options:?}"));
    };
    shown(&appended, &[], &root_hash);
    // What would be a whiteout in a layer is a device in a plain file.
    let mount = fixture.mount(&appended, &["--root-hash", &root_hash]);
    assert_eq!(fs::metadata(mount.at.join("dev/whiteout")).unwrap().rdev(), 0);
    drop(mount);

    // With a gap between the image and the tree, at a place that is no whole block.
    let elsewhere = fixture.path("elsewhere");
    fs::copy(&image, &elsewhere).unwrap();
    let at = (bytes + 20_000) / 512 * 512;
    let hash = fixture.veritysetup(
        &format!("--hash-offset={at} --data-blocks={}", bytes / 4096),
        &elsewhere,
        &elsewhere,
    );
    shown(&elsewhere, &["--hash-offset", &at.to_string()], &hash);

    // In a file of its own, with any salt, alone or at an offset.
    let tree = fixture.path("hash-tree");
    for salt in ["-", "00", &"ab".repeat(32), &"cd".repeat(256)] {
        let hash = fixture.veritysetup(&format!("--salt={salt}"), &image, &tree);
        shown(&image, &["--hash-file", tree.to_str().unwrap()], &hash);
    }
    let hash = fixture.veritysetup("--hash-offset=1536", &image, &tree);
    shown(&image, &["--hash-file", tree.to_str().unwrap(), "--hash-offset", "1536"], &hash);
}

#[test]
fn an_image_inside_another_file_is_mounted_for_root_and_for_an_ordinary_user() {
    let fixture = Fixture::new();
    let (appended, root_hash) = fixture.appended();
    // An AppImage: a program before the image. A SIF file: more behind it.
    let offset = 12_345;
    let whole = fixture.inside(&appended, offset, 70_001);
    let number = offset.to_string();
    let options = ["--offset", &number, "--root-hash", &root_hash];
    let mount = fixture.mount(&whole, &options);
    assert_as_the_kernel(&fixture, &mount.at, "at an offset");
    drop(mount);

    let (program, at) = fixture.of_nobody("mosfs");
    let words = [&["mount"], &options[..], &[whole.to_str().unwrap(), at.to_str().unwrap()]].concat();
    let words: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
    let output = as_nobody(&program, &words);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let _mount = OurMount { at: at.clone() };
    let cat = as_nobody("cat", &[at.join("text").as_os_str()]);
    assert_eq!(cat.stdout, fs::read(fixture.path("tree/text")).unwrap());
    let output = as_nobody(&program, &["umount".as_ref(), at.as_os_str()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    // The tree at an offset of the file that also holds the image; both with other bytes around them.
    let tree = fixture.path("hash-tree");
    let hash = fixture.veritysetup("", &fixture.image(), &tree);
    let both = [fs::read(fixture.image()).unwrap(), fs::read(&tree).unwrap()].concat();
    fs::write(fixture.path("both"), both).unwrap();
    let whole = fixture.inside(&fixture.path("both"), 8192, 10);
    let hash_offset = (8192 + fixture.image_bytes()).to_string();
    let mount =
        fixture.mount(&whole, &["--offset", "8192", "--hash-offset", &hash_offset, "--root-hash", &hash]);
    assert_as_the_kernel(&fixture, &mount.at, "both in another file");
}

#[test]
fn nothing_is_mounted_unverified_unless_that_is_asked_for() {
    let fixture = Fixture::new();
    let image = fixture.image();
    fixture.refused(&image, &[], 3, &["no root hash was given", "--root-hash"]);
    let mount = fixture.mount(&image, &["--unsafe-no-verity"]);
    assert!(!mount.record().unwrap().verified);
    assert_as_the_kernel(&fixture, &mount.at, "unverified");
    drop(mount);
    let hash = "0".repeat(64);
    fixture.refused(&image, &["--unsafe-no-verity", "--root-hash", &hash], 2, &["excludes"]);
    fixture.refused(&image, &["--root-hash", &hash, "--root-hash", &hash], 2, &["one --root-hash"]);
    fixture.refused(&image, &["--root-hash", &hash], 3, &["no verity data"]);
    fixture.refused(&image, &["--root-hash", "12"], 2, &["--root-hash"]);
    // dm-verity is for layers.
    fixture.refused(&image, &["--unsafe-no-verity", "--backend", "dm-verity"], 1, &["FUSE alone"]);
    // These are for a plain file alone.
    for option in [
        &["--offset", "1"][..],
        &["--hash-offset=1"],
        &["--hash-file=x"],
        &["-o", "uid=1"],
        &["-o", "timeout=1"],
    ] {
        fixture.refused(Path::new("oci:/nonexistent"), option, 2, &["is for a plain file"]);
    }
}

#[test]
fn a_bare_name_is_a_file_where_the_options_say_how_to_verify_it() {
    let fixture = Fixture::new();
    let at = fixture.path("m");
    fs::create_dir(&at).unwrap();
    let mount = |options: &[&str]| {
        let mut command = mosfs();
        command.current_dir(fixture.path("")).arg("mount").args(options).args(["image", "m"]);
        command.output().unwrap()
    };
    let output = mount(&["--unsafe-no-verity"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mounted = OurMount { at: at.canonicalize().unwrap() };
    // Whoever asks for the mount later is in another folder.
    assert_eq!(mounted.record().unwrap().source, fixture.image().to_str().unwrap());
    drop(mounted);
    // A target of a system, of which there is none here.
    let output = mount(&["--system", "nowhere", "--config", "nowhere"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !said.contains("root hash was given"), "{said}");
}

#[test]
fn a_changed_byte_is_an_error_wherever_the_tree_is() {
    let fixture = Fixture::new();
    let (appended, root_hash) = fixture.appended();
    let tree = fixture.path("hash-tree");
    let other = fixture.veritysetup("--salt=-", &fixture.image(), &tree);
    let flip = |file: &Path, at: u64| {
        let file = open_rw(file);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    };
    let tree_option = ["--hash-file", tree.to_str().unwrap(), "--root-hash", &other];
    let appended_option = ["--root-hash", root_hash.as_str()];
    // Content: the block of that file cannot be read, all others can.
    for (file, options) in [(&appended, &appended_option[..]), (&fixture.image(), &tree_option)] {
        // The first data block of the image.
        flip(file, 4096 + 96);
        let mount = fixture.mount(file, options);
        let mut failed = 0;
        for entry in fs::read_dir(&mount.at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() && fs::read(&path).is_err_and(|error| error.raw_os_error() == Some(libc::EIO)) {
                failed += 1;
            }
        }
        assert!(failed > 0, "nothing failed");
        assert_eq!(
            fs::read(mount.at.join("size-100")).unwrap(),
            fs::read(fixture.path("tree/size-100")).unwrap()
        );
        drop(mount);
        flip(file, 4096 + 96);
    }
    // The superblock of the file system, and the top of the tree.
    for at in [0, 100, fixture.image_bytes() + 4096] {
        flip(&appended, at);
        fixture.refused(&appended, &appended_option, if at == 0 { 2 } else { 3 }, &[]);
        flip(&appended, at);
    }
    flip(&tree, 4096);
    fixture.refused(&fixture.image(), &tree_option, 3, &["verity: block", "expected"]);
    flip(&tree, 4096);
    // The salt.
    flip(&tree, 88);
    fixture.refused(&fixture.image(), &tree_option, 3, &[]);
    flip(&tree, 88);
    // Another root hash, and a file that goes on behind the tree.
    fixture.refused(&appended, &["--root-hash", &other], 3, &["verity: block", &other]);
    fs::write(fixture.path("longer"), [fs::read(&appended).unwrap(), vec![0]].concat()).unwrap();
    fixture.refused(&fixture.path("longer"), &appended_option, 3, &["the image file has", "expected"]);
}

#[test]
fn what_veritysetup_can_write_and_mosfs_does_not_read_is_named() {
    let fixture = Fixture::new();
    let (image, tree) = (fixture.image(), fixture.path("hash-tree"));
    for (options, words) in [
        ("--hash=sha512", &["algorithm is `sha512`", "expected `sha256`"][..]),
        ("--hash=sha1", &["algorithm is `sha1`"]),
        ("--data-block-size=1024", &["data_block_size is 1024, expected 4096"]),
        ("--hash-block-size=1024", &["hash_block_size is 1024, expected 4096"]),
        ("--format=0", &["hash_type is 0, expected 1"]),
        ("--no-superblock", &["signature is", "expected `verity"]),
    ] {
        let _ = fs::remove_file(&tree);
        let hash = fixture.veritysetup(options, &image, &tree);
        // The root hash of another algorithm has another length.
        let hash = &format!("{hash:0<64}")[..64];
        let given = ["--hash-file", tree.to_str().unwrap(), "--root-hash", hash];
        fixture.refused(&image, &given, 3, words);
    }
    // A tree of the first half of the image.
    let half = fixture.image_bytes() / 4096 / 2;
    let hash = fixture.veritysetup(&format!("--data-blocks={half}"), &image, &tree);
    let covered = format!("covers {} bytes", half * 4096);
    fixture.refused(&image, &["--hash-file", tree.to_str().unwrap(), "--root-hash", &hash], 3, &[&covered]);
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    let fixture = Fixture::new();
    let (appended, root_hash) = fixture.appended();
    let hash = ["--root-hash", root_hash.as_str()];
    let with = |options: &[&str], code, words: &[&str]| {
        fixture.refused(&appended, &[&hash[..], options].concat(), code, words);
    };
    let most = u64::MAX.to_string();
    for offset in ["1", "4096", &most, "9223372036854775807", "1000000000000"] {
        with(&["--offset", offset], 2, &["no file system image at offset", offset]);
    }
    for offset in [&most, "9223372036854775807", "1000000000000"] {
        with(&["--hash-offset", offset], 3, &["verity superblock"]);
    }
    with(&["--hash-offset", "0"], 3, &["signature is"]);
    with(&["--offset=-1"], 2, &["--offset"]);
    with(&["--hash-file", "/nonexistent"], 1, &["/nonexistent"]);
    with(
        &["--hash-file", "/dev/zero"],
        1,
        &["expected a regular file or a block device, found a character device"],
    );
    fixture.refused(Path::new("/dev/null"), &["--unsafe-no-verity"], 1, &["a character device"]);
    fixture.refused(&fixture.path("tree"), &["--unsafe-no-verity"], 1, &["a folder"]);
    fixture.refused(&fixture.path("tree/text"), &["--unsafe-no-verity"], 2, &["expected squashfs or erofs"]);
    fixture.refused(&fixture.path("tree/size-0"), &["--unsafe-no-verity"], 2, &["found the end of the file"]);
    // The number of blocks in the superblock, which no hash covers.
    let at = fixture.image_bytes() + 72;
    for blocks in [
        0_u64,
        1,
        fixture.image_bytes() / 4096 - 1,
        fixture.image_bytes() / 4096 + 1,
        1 << 50,
        1 << 52,
        u64::MAX,
    ] {
        open_rw(&appended).write_all_at(&blocks.to_le_bytes(), at).unwrap();
        with(&[], 3, &[]);
        with(&["--hash-offset", &fixture.image_bytes().to_string()], 3, &[]);
    }
}

#[test]
fn a_mount_is_written_to_in_memory_and_a_subfolder_can_be_its_root() {
    let fixture = Fixture::new();
    let (appended, root_hash) = fixture.appended();
    let hash = ["--root-hash", root_hash.as_str()];
    let mount = fixture.mount(&appended, &[&hash[..], &["--writable"]].concat());
    fs::write(mount.at.join("text"), "other").unwrap();
    assert_eq!(fs::read_to_string(mount.at.join("text")).unwrap(), "other");
    drop(mount);
    let options = [&hash[..], &["-o", "subdir=/links/,uid=1000,gid=4294967294"]].concat();
    let mount = fixture.mount(&appended, &options);
    assert_eq!(fs::read(mount.at.join("one")).unwrap(), fs::read(fixture.path("tree/links/one")).unwrap());
    for path in [mount.at.clone(), mount.at.join("one")] {
        let found = fs::metadata(path).unwrap();
        assert_eq!((found.uid(), found.gid()), (1000, 4_294_967_294));
    }
    drop(mount);
    for (folder, why) in
        [("text", "`text` is not a folder"), ("links/none", "no file is called `none`"), ("links/..", "`..`")]
    {
        let option = format!("subdir={folder}");
        fixture.refused(&appended, &[&hash[..], &["-o", &option]].concat(), 2, &[why]);
    }
    fixture.refused(&appended, &[&hash[..], &["--writable", "-o", "timeout=5"]].concat(), 2, &["excludes"]);
}

#[test]
fn a_block_device_holds_an_image_and_is_larger_than_it() {
    let fixture = Fixture::new();
    let (appended, root_hash) = fixture.appended();
    // Sectors are whole, and a partition is rarely as large as what is in it.
    open_rw(&appended).set_len(fs::metadata(&appended).unwrap().len() + (1 << 20)).unwrap();
    let device = run(
        "mount",
        "losetup",
        &["--find", "--show", "--read-only"]
            .map(OsStr::new)
            .into_iter()
            .chain([appended.as_os_str()])
            .collect::<Vec<_>>(),
    );
    let device = String::from_utf8(device).unwrap().trim().to_string();
    let mount = fixture.mount(Path::new(&device), &["--root-hash", &root_hash]);
    assert_as_the_kernel(&fixture, &mount.at, "a device");
    unmount(Command::new("umount").arg(&mount.at));
    run("mount", "losetup", &["--detach", &device].map(OsStr::new));
}

#[test]
fn an_erofs_image_is_mounted_like_one_of_squashfs() {
    let fixture = Fixture::new();
    let (image, tree) = (fixture.path("erofs"), fixture.path("hash-tree"));
    run("erofs-utils", "mkfs.erofs", &[image.as_os_str(), fixture.path("tree").as_os_str()]);
    let hash = fixture.veritysetup("", &image, &tree);
    let whole = fixture.inside(&image, 4608, 100);
    let options = ["--offset", "4608", "--hash-file", tree.to_str().unwrap(), "--root-hash", &hash];
    let mount = fixture.mount(&whole, &options);
    for name in ["text", "size-0", "size-70000", "size-2097157", "links/one"] {
        let (ours, made) = (mount.at.join(name), fixture.path("tree").join(name));
        assert_eq!(fs::read(ours).unwrap(), fs::read(made).unwrap(), "{name}");
    }
    assert_eq!(fs::metadata(mount.at.join("dev/whiteout")).unwrap().rdev(), 0);
    drop(mount);
    fixture.refused(&whole, &["--offset", "4608"], 3, &["no root hash was given"]);
}

/// Root hashes as people copy them, and those of other algorithms.
#[test]
fn a_root_hash_is_read_in_either_case_and_another_length_is_named() {
    let fixture = Fixture::new();
    let (file, root_hash) = fixture.appended();
    for text in [root_hash.to_uppercase(), format!("sha256:{root_hash}")] {
        let mount = fixture.mount(&file, &["--root-hash", &text]);
        assert!(mount.record().unwrap().verified);
    }
    for (text, found) in [
        ("a".repeat(40), "found 40"),
        ("0".repeat(128), "found 128"),
        (format!("{root_hash} "), "found 64 and more"),
        (String::new(), "found 0"),
    ] {
        let words = ["expected 64 hex digits (SHA-256), ", found];
        fixture.refused(&file, &["--root-hash", &text], 2, &words);
    }
}

/// What a download that was broken off leaves.
#[test]
fn a_file_that_is_cut_off_is_named_so() {
    let fixture = Fixture::new();
    let bytes = fs::read(fixture.image()).unwrap();
    let used = u64::from_le_bytes(bytes[40..48].try_into().unwrap());
    let (cut, inside) = (fixture.path("cut"), 4096 * 3);
    for len in [4096, 100_000, bytes.len() - 4096] {
        fs::write(&cut, &bytes[..len]).unwrap();
        let words = format!("cut: the file ends after {len} of the {used} bytes of the image");
        fixture.refused(&cut, &["--unsafe-no-verity"], 1, &[&words]);
        let file = fixture.inside(&cut, inside, 0);
        let offset = inside.to_string();
        let words = format!("inside: the file ends after {len} of the {used} bytes of the image");
        fixture.refused(&file, &["--unsafe-no-verity", "--offset", &offset], 1, &[&words]);
    }
}

/// The one who runs this has a file in the folder, and no device of mosfs.
#[test]
fn a_bare_name_that_is_no_target_leads_to_the_file() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("m")).unwrap();
    for name in ["app.squashfs", "My App.AppImage"] {
        fs::copy(fixture.image(), fixture.path(name)).unwrap();
    }
    let run = |args: &[&str]| {
        let config = fixture.path("no-config");
        let output = mosfs()
            .args(["--config".as_ref(), config.as_os_str(), "mount".as_ref()])
            .args(args)
            .current_dir(fixture.path(""))
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run(&["app.squashfs", "m"]);
    assert!(code == 3 && said.contains("hint: a bare name is that of a target; to mount the file"), "{said}");
    let (code, said) = run(&["other.squashfs", "m"]);
    assert!(code == 3 && !said.contains("a bare name"), "{said}");
    // No target has such a name.
    let (code, said) = run(&["My App.AppImage", "m"]);
    assert!(code == 3 && said.starts_with("mosfs: My App.AppImage: no root hash was given"), "{said}");
    for missing in ["Missing.AppImage", "./missing", "a/missing"] {
        let (code, said) = run(&[missing, "m"]);
        assert!(code == 1 && said.starts_with(&format!("mosfs: cannot open {missing}: ")), "{said}");
    }
}
