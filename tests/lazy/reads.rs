//! What is fetched, when nothing goes wrong.

use std::fs;
use std::thread;

use mosfs::internals::store::Store;

use crate::fixture::{FILES, Lazy, wait_until};
use crate::place::display;
use crate::server::Fault;
use crate::unmount::unmount;

#[test]
fn what_is_read_is_fetched_once_and_nothing_else() {
    let lazy = Lazy::new();
    let mount = lazy.mount("m");
    let first = lazy.fetched(&lazy.server.take_log());
    assert!(first < lazy.size(), "mounting has fetched everything: {first} of {}", lazy.size());
    assert_eq!(mount.read(3), Ok(()), "{}", mount.log());
    assert_eq!(mount.read(FILES - 1), Ok(()), "{}", mount.log());
    lazy.server.take_log();
    // Again, past the page cache: nothing is asked for.
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert_eq!(mount.read(3), Ok(()));
    assert_eq!(lazy.parts(&lazy.server.take_log()).len(), 0);
    mount.read_all();
    let status = mount.status();
    let layers = status["lazy"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for layer in layers {
        assert!(layer["have"].as_u64().unwrap() <= layer["size"].as_u64().unwrap());
    }
    mount.unmount();
}

#[test]
fn every_byte_is_asked_for_once_however_many_read_it() {
    let lazy = Lazy::new();
    let mount = lazy.mount("m");
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| mount.read_all());
        }
    });
    // By the ranges that were asked for: no byte of a layer twice.
    for (number, layer) in lazy.layers.iter().enumerate() {
        let log = lazy.server.take_log();
        let mut asked: Vec<(u64, u64)> = log
            .iter()
            .filter(|seen| seen.gets(&layer.digest))
            .map(|seen| {
                let (first, last) = seen.header("range").unwrap()[6..].split_once('-').unwrap();
                (first.parse().unwrap(), last.parse().unwrap())
            })
            .collect();
        asked.sort_unstable();
        assert!(asked.windows(2).all(|pair| pair[0].1 < pair[1].0), "layer {number}: {asked:?}");
        if number == 0 {
            assert!(!asked.is_empty());
        }
    }
}

#[test]
fn the_rest_comes_in_the_background_and_the_image_is_one_of_the_store_then() {
    let lazy = Lazy::new();
    let mount = lazy.mount_with("m", &[]);
    wait_until("both layers are blobs", || lazy.is_whole(0) && lazy.is_whole(1));
    let store = Store::open(&lazy.cache()).unwrap();
    let name = format!("p/mos/images/hostfs:{}", lazy.image.hex());
    wait_until("the image has a name", || store.resolve(&name).is_ok());
    assert_eq!(store.resolve(&name).unwrap().digest, lazy.image);
    assert!(!lazy.part(0).exists() && !lazy.part(1).exists());
    lazy.place.ok(&["verify", &format!("oci:{}", lazy.cache().display())]);
    // The registry may go: the running mount, and every later one of this digest, need it no more.
    lazy.server.script(|_, _| Some(Fault::Cut(0)));
    mount.read_all();
    wait_until("status says so", || {
        mount.status()["lazy"].as_array().unwrap().iter().all(|layer| layer["state"] == "complete")
    });
    lazy.server.take_log();
    let output = lazy.command(&lazy.pinned(), "again", &[]).output().unwrap();
    assert!(output.status.success(), "{}", crate::place::text(&output.stderr));
    assert_eq!(lazy.server.take_log().len(), 0);
    let _ = std::process::Command::new("umount").arg(lazy.place.path("again")).status();
}

#[test]
fn garbage_collection_leaves_what_is_mounted_and_takes_the_rest() {
    let lazy = Lazy::new();
    let cache = display(&lazy.cache());
    // Refused while the mount makes a blob of a layer that is whole.
    let collect = || {
        wait_until("the store is free", || {
            let output = lazy.place.run(&["gc", "--store", &cache]);
            let said = crate::place::text(&output.stderr);
            assert!(output.status.success() || said.contains("is in use"), "{said}");
            output.status.success()
        });
    };
    let mount = lazy.mount("m");
    mount.read_all();
    collect();
    assert!(lazy.part(0).exists() || lazy.is_whole(0));
    lazy.server.take_log();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    mount.read_all();
    assert_eq!(lazy.parts(&lazy.server.take_log()).len(), 0);
    let pid = mount.pid();
    mount.unmount();
    wait_until("the daemon has ended", || mosfs::internals::sys::process::started_at(pid).is_none());
    // Its last threads may still be on their way out, and hold their files.
    wait_until("nothing is left", || {
        collect();
        let left = fs::read_dir(lazy.cache().join(".mosfs/lazy")).unwrap().count();
        left == 0 && !lazy.part(0).exists()
    });
}

#[test]
fn an_ordinary_user_mounts_an_image_of_a_registry() {
    const USER: u32 = 65534;
    let lazy = Lazy::new();
    let home = lazy.place.path("nobody");
    let at = home.join("m");
    fs::create_dir_all(&at).unwrap();
    for path in [&home, &at] {
        std::os::unix::fs::chown(path, Some(USER), Some(USER)).unwrap();
    }
    fs::set_permissions(lazy.place.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let program = home.join("mosfs");
    crate::program::copy_program(env!("CARGO_BIN_EXE_mosfs"), &program);
    crate::program::copy_program(env!("CARGO_BIN_EXE_mosfs-full"), home.join("mosfs-full"));
    let as_user = |command: &str| {
        let output = std::process::Command::new("setpriv")
            .args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups", "sh", "-c"])
            .arg(command)
            .env("HOME", &home)
            .env("XDG_RUNTIME_DIR", &home)
            .env("CONTAINERS_REGISTRIES_CONF", home.join("none"))
            .env_remove("XDG_CACHE_HOME")
            .output()
            .expect("setpriv (Debian package util-linux) runs");
        assert!(output.status.success(), "{command}: {}", crate::place::text(&output.stderr));
    };
    as_user(&format!("{} mount {} {}", display(&program), lazy.source(), display(&at)));
    as_user(&format!("cat {}/d*/f* | wc -c | grep -qx {}", display(&at), FILES * crate::fixture::FILE_BYTES));
    let blob = |layer: usize| home.join(".cache/mosfs/blobs/sha256").join(lazy.layers[layer].digest.hex());
    wait_until("the image is whole, in the user's cache", || blob(0).exists() && blob(1).exists());
    as_user(&format!("fusermount3 -u {}", display(&at)));
}

#[test]
fn the_store_may_be_named_from_the_working_folder() {
    let lazy = Lazy::new();
    let (at, source) = (lazy.place.path("m"), lazy.source());
    fs::create_dir_all(&at).unwrap();
    let args = ["mount", "--store", "cache", "--net-timeout", "2", &source, "m"];
    let output = lazy.place.command(&args).current_dir(lazy.place.dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", crate::place::text(&output.stderr));
    for number in 0..FILES {
        let bytes = fs::read(at.join(format!("d{}/f{number}", number % 4))).unwrap();
        assert!(bytes == crate::fixture::content(number).as_bytes(), "file {number}");
    }
    wait_until("both layers are blobs", || lazy.is_whole(0) && lazy.is_whole(1));
    unmount(std::process::Command::new("umount").arg(&at));
}
