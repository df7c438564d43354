//! Tar layers into squashfs: against what GNU tar and umoci unpack, through the kernel's reader and unsquashfs.

#[path = "common/tarball.rs"]
mod tarball;
#[path = "common/tools.rs"]
mod tools;

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use mosfs::convert::{ConvertError, Converted, TarLayer, convert_tar};
use mosfs::digest::Digest;
use mosfs::image::oci::Compression;
use mosfs::progress::Progress;
use tempfile::TempDir;
use tools::{assert_same_tree, need_root, run, sh, snapshot};

fn layer_of(bytes: &[u8], compression: Compression) -> TarLayer {
    TarLayer { digest: Digest::of(bytes), size: bytes.len() as u64, compression, diff_id: None }
}

fn convert_with(
    bytes: &[u8],
    layer: &TarLayer,
    to: &Path,
    threads: usize,
) -> Result<Converted, ConvertError> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(to).unwrap();
    let threads = NonZeroUsize::new(threads).unwrap();
    convert_tar(bytes, layer, &file, threads, &mut |_| Ok(None), &Progress::silent())
}

fn convert(bytes: &[u8], to: &Path) -> Result<Converted, ConvertError> {
    convert_with(bytes, &layer_of(bytes, Compression::None), to, 2)
}

/// An image that the kernel has mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, dir: PathBuf) -> Self {
        need_root();
        fs::create_dir_all(&dir).unwrap();
        run(Command::new("mount").args(["-t", "squashfs", "-o", "loop,ro"]).arg(image).arg(&dir));
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A tree with one of everything, packed by GNU tar.
fn everything() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        need_root();
        let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join("convert");
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(&base).unwrap();
        sh(
            &base,
            r#"
            mkdir tree; cd tree
            chmod 1751 .; chown 12:34 .
            mkdir -m 2750 dir; chown 3000000000:4000000000 dir
            echo small > dir/small; : > dir/empty; chmod 4755 dir/small
            head -c 131072 /dev/urandom > block; head -c 131071 /dev/urandom > under; head -c 131073 /dev/urandom > over
            head -c 1000003 /dev/zero | tr '\0' 'a' > compressible
            head -c 700001 /dev/urandom > random
            truncate -s 5M sparse; printf middle | dd of=sparse bs=1 seek=2500000 conv=notrunc status=none
            truncate -s 300000 all-holes
            truncate -s 1000000 tail-hole; head -c 200000 /dev/urandom | dd of=tail-hole conv=notrunc status=none
            ln dir/small hard-1; ln dir/small dir/hard-2
            ln -s 'some/where else' soft; ln -s "$(head -c 3000 /dev/zero | tr '\0' l)" long-soft
            mknod null c 1 3; mknod big-minor c 10 300; mknod disk b 259 70000; mkfifo pipe; chmod 640 null pipe
            name=$(printf 'n%.0s' $(seq 255)); echo x > $name
            printf y > "$(printf 'bad\377utf8')"; printf z > 'new
line'
            mkdir -p deep/$name/$name/$name; echo d > deep/$name/$name/$name/file
            mkdir many; i=0; while [ $i -lt 3000 ]; do echo $((i % 7)) > many/file-with-a-long-enough-name-$i; i=$((i+1)); done
            setfattr -n user.text -v value dir/small; setfattr -n user.binary -v 0x000a3d00ff dir/small
            setfattr -n trusted.thing -v t dir; setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 block
            setfattr -n user.empty dir/empty; setfattr -h -n trusted.link -v l soft; setfattr -h -n trusted.dev -v l null
            setfattr -n user.large -v "$(head -c 3000 /dev/zero | tr '\0' v)" over
            touch -d @1234567890.123456789 dir/small; touch -h -d @4000000000 soft; touch -d @0 dir/empty
            touch -d @1111111111 many dir deep .
            "#,
        );
        base
    })
}

fn pack(options: &str) -> Vec<u8> {
    let base = everything();
    let command = format!("tar --sort=name --xattrs --xattrs-include='*' {options} -C tree -cf - .");
    let output = tools::run_any(Command::new("sh").arg("-ec").arg(command).current_dir(base));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// What the source tree is, with what tar and squashfs keep: whole seconds.
fn expected() -> std::collections::BTreeMap<PathBuf, String> {
    snapshot(&everything().join("tree"))
}

#[test]
fn everything_arrives_as_it_was() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image");
    let expected = expected();
    for options in [
        "--format=posix",
        "--format=posix --sparse",
        "--format=posix --sparse --sparse-version=0.1",
        "--format=posix --sparse --sparse-version=0.0",
    ] {
        let stream = pack(options);
        let done = convert(&stream, &image).unwrap();
        assert_eq!(done.notes, [] as [String; 0], "{options}");
        let mounted = Mounted::new(&image, folder.path().join("mnt"));
        assert_same_tree(&expected, &snapshot(&mounted.0));
        drop(mounted);
        let out = folder.path().join("unsquashed");
        run(Command::new("unsquashfs")
            .args(["-quiet", "-no-progress", "-strict-errors", "-d"])
            .arg(&out)
            .arg(&image));
        assert_same_tree(&expected, &snapshot(&out));
        fs::remove_dir_all(out).unwrap();
    }
}
