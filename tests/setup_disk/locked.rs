//! A disk that another program has locked.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use super::{Disk, Machine, refused_untouched};

/// udev locks a disk for a moment, while it looks at what is new; a program that keeps the lock uses the disk.
#[test]
fn a_lock_on_the_disk_is_waited_for() {
    let (disk, machine) = (Disk::new(), Machine::provisioned());
    let holder = File::open(&disk.device).unwrap();
    holder.lock_shared().unwrap();
    let words = ["--disk", &disk.device];
    let why = format!("{} is in use: another program has locked it", disk.device);
    refused_untouched(&disk, &mut machine.setup(200, &words), 1, &why);
    let mut child = machine.setup(200, &words).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("floor: ") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0);
    }
    holder.unlock().unwrap();
    said.read_to_string(&mut line).unwrap();
    assert!(child.wait().unwrap().success(), "{line}");
    disk.expect_installed(200);
}
