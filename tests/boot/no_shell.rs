//! With `root=mosfs` nobody gets a root shell from the initramfs unless CONFIG says so: not after a boot that failed,
//! and not for a word of the kernel command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::device::{Device, SMALL, fleet};
use super::machine::{Cut, Ended, Machine, make_initrd};
use super::{DRACUT, INITRAMFS_TOOLS, KERNEL};

/// What the initramfs of each generator shows when it gives a shell.
const SHELLS: [&str; 4] =
    ["(initramfs)", "Entering emergency mode", "Dropping to debug shell", "Press Enter for maintenance"];

/// Words of the kernel command line that ask for a shell, and take `panic=-1` of tests/vm/run back.
const ASKS: &str =
    "root=mosfs panic= rd.shell=1 rd.shell rd.emergency= systemd.debug-shell=1 rd.systemd.debug_shell=1";

/// A machine with a TPM and no disk.
fn without_disk(device: &Device, initrd: &Path, words: &str) -> Machine {
    Machine { system: None, cmdline: format!("{ASKS} {words}"), ..device.machine_with(initrd) }
}

fn stops(machine: &Machine, verdict: i32, words: &[&str]) -> Ended {
    let ended = machine.expect(verdict, words);
    ended.without(&SHELLS);
    ended
}

#[test]
fn initramfs_tools_restarts_after_a_failed_boot() {
    let device = Device::with(SMALL);
    let machine = without_disk(&device, &fleet().initrd(INITRAMFS_TOOLS, KERNEL), "");
    let said =
        "mosfs: no system is booted (exit code 1), the reason is above; this machine restarts in 5 seconds";
    stops(&machine, 1, &["no system partition: LABEL=mosfs", said]);
}

#[test]
fn dracut_restarts_after_a_failed_boot() {
    let device = Device::with(SMALL);
    let machine = without_disk(&device, &fleet().initrd(DRACUT, KERNEL), "");
    let said = [
        "no system partition: LABEL=mosfs",
        "mosfs: no system is booted (exit code 1)",
        "mosfs: this machine restarts in 5 seconds",
    ];
    stops(&machine, 1, &said);
}

#[test]
fn initramfs_tools_gives_no_shell_for_a_break() {
    let device = Device::with(SMALL);
    let machine = without_disk(&device, &fleet().initrd(INITRAMFS_TOOLS, KERNEL), "break=premount,mount");
    // There is no verdict: the boot was not begun.
    stops(&machine, 125, &["Spawning shell within the initramfs", "Rebooting automatically"]);
}

#[test]
fn dracut_gives_no_shell_for_a_break_or_another_target() {
    let device = Device::with(SMALL);
    for words in ["rd.break=pre-mount", "rd.systemd.unit=rescue.target", "rd.systemd.unit=emergency.target"] {
        let machine = without_disk(&device, &fleet().initrd(DRACUT, KERNEL), words);
        stops(&machine, 125, &["mosfs: this machine restarts in 5 seconds"]);
    }
}

/// An initramfs whose CONFIG says what follows a failed boot.
fn initrd_with(device: &Device, generator: &str, on_failure: &str) -> PathBuf {
    let config = device.path("config-of-initrd");
    fs::create_dir(&config).expect("a folder");
    for entry in fs::read_dir(fleet().config()).expect("list") {
        let from = entry.expect("an entry").path();
        fs::copy(&from, config.join(from.file_name().expect("a name"))).expect("a copy");
    }
    fs::write(config.join("on-failure"), on_failure).expect("a file");
    let initrd = device.path("initrd");
    make_initrd(&initrd, generator, KERNEL, &config);
    initrd
}

#[test]
fn the_configuration_can_ask_for_a_halt() {
    let device = Device::with(SMALL);
    let initrd = initrd_with(&device, INITRAMFS_TOOLS, "halt\n");
    let mut machine = without_disk(&device, &initrd, "");
    // A machine that halts does not go off.
    let said = "the reason is above; this machine halts";
    machine.cut = Some(Cut::After(said.into(), Duration::from_secs(10)));
    stops(&machine, 137, &[said]);
}

#[test]
fn the_configuration_can_allow_a_shell() {
    for (generator, prompt) in [(INITRAMFS_TOOLS, "(initramfs)"), (DRACUT, "Entering emergency mode")] {
        let device = Device::with(SMALL);
        let initrd = initrd_with(&device, generator, "shell\n");
        let mut machine = without_disk(&device, &initrd, "");
        machine.cut = Some(Cut::After(prompt.into(), Duration::ZERO));
        machine.expect(137, &["mosfs: no system is booted (exit code 1)"]);
    }
}
