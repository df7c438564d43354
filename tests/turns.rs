//! Threads of a FUSE mount that take turns (`mount/fuse/lead.rs`): they serve what each of them alone would, at once and
//! one after the other, and every one of them ends with the mount. As `--spin=never` has it, and every ordinary user.

#[path = "common/squashfs.rs"]
#[allow(dead_code)]
mod images;
#[path = "common/layout.rs"]
mod layout;
#[path = "common/unmount.rs"]
mod unmount;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use images::{mksquashfs, need_root};
use layout::{Layout, OurMount, is_alive, kill, wait_until};
use tempfile::TempDir;
use unmount::unmount;

/// A layout with an image of small files, which share blocks, and large ones, and what is in them.
struct Fixture {
    folder: TempDir,
    layout: Layout,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

fn fixture() -> Fixture {
    need_root();
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    let mut files = BTreeMap::new();
    let mut add = |name: String, len: usize| {
        let seed = files.len() as u32 + 1;
        let bytes: Vec<u8> = (0..len as u32)
            .map(|at| (at.wrapping_mul(2_654_435_761).wrapping_mul(seed) >> 13) as u8 & 31)
            .collect();
        let path = tree.join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &bytes).unwrap();
        files.insert(PathBuf::from(name), bytes);
    };
    for number in 0..400 {
        add(format!("small/{}/{number}", number % 10), 100 + number * 37 % 9000);
    }
    for number in 0..6 {
        add(format!("large/{number}"), 700_000 + number * 131_072);
    }
    let image = folder.path().join("image");
    mksquashfs(&tree, &image, "-comp lz4 -Xhc -no-xattrs");
    let layout = Layout::new(&folder.path().join("oci"));
    let layer = layout.layer(&image);
    layout.image("all", &[layer.descriptor]);
    Fixture { folder, layout, files }
}

impl Fixture {
    fn mount(&self, options: &[&str]) -> OurMount {
        OurMount::new(&self.layout.source("all"), &self.folder.path().join("m"), options)
    }

    /// Reads every file whole, beginning somewhere else for each reader.
    fn read_all(&self, at: &Path, reader: usize) {
        let skip = reader * self.files.len() / 8;
        for (name, expected) in self.files.iter().cycle().skip(skip).take(self.files.len()) {
            let found = fs::read(at.join(name)).unwrap_or_else(|error| panic!("{}: {error}", name.display()));
            assert!(found == *expected, "{} differs", name.display());
        }
    }
}

/// Unmounts and waits until nothing is left.
fn end(mount: OurMount) {
    let pid = mount.pid();
    unmount(Command::new("umount").arg(&mount.at));
    wait_until("the daemon ends", || !is_alive(pid));
    drop(mount);
}

#[test]
fn many_readers_see_the_same_bytes_with_any_number_of_threads() {
    let fixture = fixture();
    for threads in ["1", "2", "3", "8"] {
        let mount = fixture.mount(&["--spin=never", "--threads", threads, "--cache-mib", "1"]);
        std::thread::scope(|scope| {
            for reader in 0..8 {
                let (fixture, at) = (&fixture, &mount.at);
                scope.spawn(move || fixture.read_all(at, reader));
            }
        });
        // Random parts of large files, from several readers: blocks that are decoded for a part.
        std::thread::scope(|scope| {
            for reader in 0..4u64 {
                let (fixture, at) = (&fixture, &mount.at);
                scope.spawn(move || {
                    let name = Path::new("large/5");
                    let (file, expected) = (File::open(at.join(name)).unwrap(), &fixture.files[name]);
                    let mut seed = reader + 1;
                    for _ in 0..300 {
                        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let offset = (seed >> 33) % (expected.len() as u64 - 5000);
                        let mut bytes = [0; 5000];
                        file.read_exact_at(&mut bytes, offset).unwrap();
                        assert!(bytes[..] == expected[offset as usize..][..5000], "{offset} differs");
                    }
                });
            }
        });
        // After all that, one request at a time.
        fixture.read_all(&mount.at, 0);
        end(mount);
    }
}

/// A thread that sleeps as the leader, and followers that wait for it, all end when the mount does: unmounted idle,
/// straight after a burst, or by a signal.
#[test]
fn every_thread_ends_with_the_mount() {
    let fixture = fixture();
    for threads in ["1", "2", "8"] {
        let options = ["--spin=never", "--threads", threads];
        end(fixture.mount(&options));
        let mount = fixture.mount(&options);
        std::thread::scope(|scope| {
            for reader in 0..8 {
                let (fixture, at) = (&fixture, &mount.at);
                scope.spawn(move || fixture.read_all(at, reader));
            }
        });
        end(mount);
        let mount = fixture.mount(&options);
        fixture.read_all(&mount.at, 0);
        let pid = mount.pid();
        kill("-TERM", pid);
        wait_until("the daemon ends", || !is_alive(pid));
        drop(mount);
    }
}

/// Readers that are killed while they wait for an answer (FUSE_INTERRUPT) leave a mount that serves the others.
#[test]
fn a_killed_reader_disturbs_nobody() {
    let fixture = fixture();
    let mount = fixture.mount(&["--spin=never", "--threads", "2", "--cache-mib", "1"]);
    for _ in 0..20 {
        let mut readers: Vec<_> = (0..4)
            .map(|_| {
                let mut child = Command::new("cat")
                    .args((0..6).map(|number| mount.at.join(format!("large/{number}"))))
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap();
                // It has begun to read.
                child.stdout.as_mut().unwrap().read_exact(&mut [0; 1]).unwrap();
                child
            })
            .collect();
        for reader in &mut readers {
            reader.kill().unwrap();
        }
        for mut reader in readers {
            reader.wait().unwrap();
        }
        // The kernel's pages go, so that the next readers ask again.
        fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    }
    fixture.read_all(&mount.at, 3);
    end(mount);
}

/// A mount that nobody uses does not poll: its daemon takes no time.
#[test]
fn an_idle_mount_sleeps() {
    let fixture = fixture();
    let mount = fixture.mount(&["--spin=never"]);
    fixture.read_all(&mount.at, 0);
    let switches = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", mount.pid())).unwrap();
        let status = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
        let all = status.map(|text| {
            let lines = text.lines().filter(|line| line.contains("ctxt_switches"));
            lines.map(|line| line.split_whitespace().last().unwrap().parse::<u64>().unwrap()).sum::<u64>()
        });
        all.sum::<u64>()
    };
    let ticks = || {
        // proc(5): utime and stime, the 14th and 15th words.
        let stat = fs::read_to_string(format!("/proc/{}/stat", mount.pid())).unwrap();
        let words: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        words[11].parse::<u64>().unwrap() + words[12].parse::<u64>().unwrap()
    };
    // Its threads come to rest, whatever else this machine does.
    wait_until("the daemon is at rest", || {
        let before = (switches(), ticks());
        std::thread::sleep(std::time::Duration::from_millis(500));
        before == (switches(), ticks())
    });
    end(mount);
}
