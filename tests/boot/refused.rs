//! What is refused, and with which words, before anything of it is mounted.

use std::fs;
use std::path::PathBuf;

use super::device::{Device, SMALL, SMALL_NEXT, flip, superblock};
use super::machine::Machine;
use super::swtpm::Swtpm;
use super::{DRACUT, INITRAMFS_TOOLS, KERNEL};

/// What Linux prints with `loglevel=7` when a layer is set up: the loop device gets its file, and
/// dm-verity its table. `initramfs_tools_on_dm_verity_...` wants both.
pub const KERNEL_SAYS_MOUNTED: [&str; 2] =
    ["loop0: detected capacity change", "device-mapper: verity: sha256"];

/// What is said of a manifest and a signature that do not belong together, whichever of them was changed.
const NOT_SIGNED: [&str; 1] = ["the signature does not match the manifest sha256:"];

/// Words that ask to skip checks.
const ASKS: &str = " loglevel=7 mosfs.verify=0 mosfs.floor=none mosfs.floor=file mosfs.tpm=none mosfs.unsafe=1 \
    mosfs.unsafe-no-verity mosfs.ca=/tmp/ca MOSFS_CONFIG=/tmp MOSFS_TPM=device:/dev/null MOSFS_FLOOR=file";

fn asking(device: &Device, generator: &'static str) -> Machine {
    let mut machine = device.machine(generator, KERNEL);
    machine.cmdline += ASKS;
    machine
}

/// Boots with a byte of a file changed; wants a refusal for verification with these words.
fn changed(
    generator: &'static str,
    file: impl Fn(&Device) -> (PathBuf, usize),
    words: &[&str],
    nothing: &[&str],
) {
    let device = Device::with(SMALL);
    let (file, at) = file(&device);
    flip(&file, at);
    let ended = asking(&device, generator).expect(3, &["no deployment can be booted: 100-"]);
    for word in words {
        assert!(ended.console.contains(word), "expected `{word}` on the console\n{}", ended.console);
    }
    ended.without(&["booting version"]);
    ended.without(nothing);
}

#[test]
fn a_changed_manifest() {
    let file = |device: &Device| (device.deployment(SMALL).join("manifest.json"), 40);
    changed(INITRAMFS_TOOLS, file, &NOT_SIGNED, &KERNEL_SAYS_MOUNTED);
}

#[test]
fn a_changed_signature() {
    let file = |device: &Device| (device.deployment(SMALL).join("manifest.sig"), 20);
    changed(INITRAMFS_TOOLS, file, &NOT_SIGNED, &KERNEL_SAYS_MOUNTED);
}

#[test]
fn a_changed_certificate() {
    let file = |device: &Device| (device.deployment(SMALL).join("cert.pem"), 300);
    changed(INITRAMFS_TOOLS, file, &["certificate"], &KERNEL_SAYS_MOUNTED);
}

#[test]
fn a_changed_oci_manifest() {
    let file = |device: &Device| (device.blob(&device.image(SMALL)), 50);
    changed(DRACUT, file, &["sha256:"], &KERNEL_SAYS_MOUNTED);
}

/// What the root hash covers directly: the top of the tree, or the one data block of an image that
/// has no more.
fn top_of_tree(layer: PathBuf) -> (PathBuf, usize) {
    let top = superblock(&layer) + 4096;
    let at = if fs::metadata(&layer).expect("the layer").len() > top as u64 { top } else { 100 };
    (layer, at)
}

#[test]
fn a_changed_tree() {
    let file = |device: &Device| top_of_tree(device.own_layer(SMALL));
    // The kernel finds it when it mounts the layer: what was set up is gone again, and nothing was mounted.
    changed(DRACUT, file, &["verity: layer sha256:", "is corrupt"], &[]);
}

#[test]
fn a_pending_system_with_a_changed_tree_gives_way_in_the_same_boot() {
    let device = Device::with(SMALL);
    device.update(SMALL_NEXT);
    let (layer, at) = top_of_tree(device.own_layer(SMALL_NEXT));
    flip(&layer, at);
    let ended = device.machine(INITRAMFS_TOOLS, KERNEL).run();
    // It has no init, so that it ends here.
    for word in ["deployment 101-", "was not booted: verity: layer sha256:", "booting version 100"] {
        assert!(ended.console.contains(word), "expected `{word}` on the console\n{}", ended.console);
    }
    assert!(!ended.console.contains("booting version 101"));
}

#[test]
fn no_tpm() {
    let device = Device::with(SMALL);
    let machine = Machine { tpm: None, ..asking(&device, INITRAMFS_TOOLS) };
    machine.expect(5, &["no TPM answers at device:/dev/tpmrm0"]).without(&KERNEL_SAYS_MOUNTED);
}

#[test]
fn a_tpm_that_was_not_provisioned() {
    let device = Device::with(SMALL);
    let empty = device.path("tpm-empty");
    fs::create_dir(&empty).expect("a folder");
    let machine = Machine { tpm: Some(empty), ..asking(&device, DRACUT) };
    machine.expect(5, &["has no floor: NV index 0x01500050 does not exist"]).without(&KERNEL_SAYS_MOUNTED);
}

#[test]
fn another_index_of_the_same_number() {
    let device = Device::with(SMALL);
    let fake = device.path("tpm-fake");
    fs::create_dir(&fake).expect("a folder");
    {
        let tpm = Swtpm::start_in(&fake);
        let attributes = "ownerwrite|ownerread|authread|authwrite|no_da";
        tpm.tool_ok("tpm2_nvdefine", &["0x01500050", "-C", "o", "-s", "8", "-a", attributes]);
        let zero = device.path("zero");
        fs::write(&zero, [0; 8]).expect("a file");
        tpm.tool_ok("tpm2_nvwrite", &["0x01500050", "-C", "o", "-i", zero.to_str().expect("a path")]);
    }
    let machine = Machine { tpm: Some(fake), ..asking(&device, INITRAMFS_TOOLS) };
    machine.expect(5, &["is not this product's floor: its Name is"]).without(&KERNEL_SAYS_MOUNTED);
}
