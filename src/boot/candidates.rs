//! The devices that may be the system partition, in the order in which they are tried.
//!
//! ```text
//! sysfs    every block device with a size, its holders, its partitions
//! udev     where it runs: devices that it has not looked at yet, or that it assigns to others, are not used
//! libblkid what is on a device (sys/blkid.rs), asked by a process of its own for each
//! e2fsck   by a process of its own, for ext4 on a device that can be written (e2fsck.rs)
//! mount    by a process of its own, attached nowhere; looked into; then handed over
//! ```
//!
//! A device is a candidate where libblkid finds one file system on it that mosfs knows, with the label or UUID
//! that is looked for. Members of RAIDs, volume groups, multipath disks, and encrypted volumes carry the label of
//! what is inside; they are never taken: one half of a mirror that is written to is no mirror any more. Neither is
//! a device that something else holds.
//!
//! Where libblkid finds nothing, the superblock may be damaged. A partition whose name in the GPT is the label that is
//! looked for, and a device that the command line names, are candidates then too, after all others: e2fsck looks for a
//! copy of the superblock.
//!
//! Nothing on a candidate is trusted, so a wrong one can only lead to a refusal. That must not stop a boot: the next
//! one is tried where one is empty, broken, foreign, or does not answer. Devices that do not answer are left
//! behind, since no signal reaches whoever asks them; the others do not wait for them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::cmdline::Partition;
use super::e2fsck::{self, Check};
use crate::sorting;
use crate::sys::blkid::{self, Content};
use crate::sys::disk;
use crate::sys::file::{self, Links};
use crate::sys::helper::Helper;
use crate::sys::mountapi::{self, CallError, FsContext};

/// How often the devices are looked at while they appear.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long the device that comes first by its order may take to answer before a later one is taken.
const ORDER_WITHIN: Duration = Duration::from_millis(500);
/// How long a check may take before it is worth a word.
const SAY_AFTER: Duration = Duration::from_secs(3);
/// The least time that a device is given to answer, also where nothing is to be waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Where the kernel lists block devices.
const SYSFS: &str = "/sys/class/block";
/// Where udev keeps what it knows of devices, and the socket that shows that it runs.
const UDEV_DATA: &str = "/run/udev/data";
const UDEV_SOCKET: &str = "/run/udev/control";

/// What libblkid calls the file systems that a system partition may have, and what the kernel calls their driver.
const FILE_SYSTEMS: [(&str, &str); 5] =
    [("ext4", "ext4"), ("ext3", "ext4"), ("ext2", "ext4"), ("xfs", "xfs"), ("btrfs", "btrfs")];

/// The driver of the file systems that e2fsck checks.
const CHECKED: &str = "ext4";

/// The option that mounts without replaying the journal, by driver: for a device that cannot be written.
const NO_REPLAY: [(&str, &str, Option<&str>); 3] =
    [("ext4", "norecovery", None), ("xfs", "norecovery", None), ("btrfs", "rescue", Some("nologreplay"))];

/// A block device with a file system that may be the system partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its node.
    pub device: PathBuf,
    /// The kernel's name of the file system's driver.
    pub file_system: &'static str,
    /// Whether libblkid finds nothing there, so that only a repair can make it one.
    pub is_damaged: bool,
}

/// A device that was not taken, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// Its node.
    pub device: PathBuf,
    /// The reason, as part of a sentence.
    pub why: String,
}

/// What is known of a device.
#[derive(Debug)]
enum Knowledge {
    /// A process is asking it.
    Asked(Helper),
    /// It may be the partition.
    Candidate(&'static str),
    /// It may be the partition if its superblock can be repaired.
    Damaged,
    /// It was given to the caller.
    Given,
    /// It is not the partition; with a reason where that is worth a word.
    No(Option<String>),
}

/// A device as sysfs shows it. Another disk of the same name is another device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Device {
    name: String,
    /// `MAJOR:MINOR`.
    number: String,
    /// The kernel's count of disks, where it has one (5.15 and up), and the size: a medium that is changed.
    generation: String,
}

impl Device {
    fn node(&self) -> PathBuf {
        // sysfs writes the `/` of a node's name as `!`.
        Path::new("/dev").join(self.name.replace('!', "/"))
    }

    fn sysfs(&self) -> PathBuf {
        Path::new(SYSFS).join(&self.name)
    }

    /// The device of this name; `None` where it has no content (no medium, no file behind it).
    fn of(name: &str) -> Option<Self> {
        let folder = Path::new(SYSFS).join(name);
        let read = |file: &str| Some(text(&folder.join(file))?.trim().to_string());
        let size = read("size").filter(|size| size != "0")?;
        let sequence = read("diskseq").or_else(|| read("../diskseq")).unwrap_or_default();
        let (name, number) = (name.to_string(), read("dev")?);
        Some(Self { name, number, generation: format!("{sequence} {size}") })
    }

    /// By name; loop, RAM and device-mapper devices last, and disks with partitions after what has none.
    fn order(&self) -> (bool, bool, &str) {
        let is_virtual = ["loop", "ram", "dm-", "zram"].iter().any(|prefix| self.name.starts_with(prefix));
        let has_partitions = fs::read_dir(self.sysfs()).is_ok_and(|mut list| {
            list.any(|entry| entry.is_ok_and(|entry| entry.path().join("partition").exists()))
        });
        (is_virtual, has_partitions, &self.name)
    }

    /// Its name in the partition table, if it has one there.
    fn partition_name(&self) -> Option<String> {
        let uevent = text(&self.sysfs().join("uevent"))?;
        uevent.lines().find_map(|line| line.strip_prefix("PARTNAME=")).map(str::to_string)
    }

    /// Who holds it: a RAID, a device-mapper device.
    fn holder(&self) -> Option<String> {
        let mut list = fs::read_dir(self.sysfs().join("holders")).ok()?;
        Some(list.next()?.ok()?.file_name().to_string_lossy().into_owned())
    }
}

/// What udev says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Udev {
    /// Nothing against it; also where udev does not run.
    Fine,
    /// It has not looked at it yet, or waits for more devices.
    NotReady,
    /// It belongs to something else.
    Others(&'static str),
}

/// The text of a small file of sysfs or of udev's database.
fn text(path: &Path) -> Option<String> {
    const MAX_BYTES: u64 = 64 << 10;
    String::from_utf8(file::read_regular(path, Links::Followed, MAX_BYTES).ok()?).ok()
}

impl Udev {
    fn of(number: &str) -> Self {
        if !Path::new(UDEV_SOCKET).exists() {
            return Self::Fine;
        }
        match text(&Path::new(UDEV_DATA).join(format!("b{number}"))) {
            Some(text) => Self::parse(&text),
            None => Self::NotReady,
        }
    }

    /// The text of udev's database: a line each, `E:KEY=VALUE` is a property.
    fn parse(text: &str) -> Self {
        let property = |key: &str| {
            text.lines()
                .filter_map(|line| line.strip_prefix("E:")?.strip_prefix(key)?.strip_prefix('='))
                .next_back()
        };
        if property("DM_MULTIPATH_DEVICE_PATH") == Some("1") || property("ID_FS_TYPE") == Some("mpath_member")
        {
            return Self::Others("it is a path of a multipath disk");
        }
        if property("DM_UDEV_DISABLE_OTHER_RULES_FLAG") == Some("1") {
            return Self::Others("it is a part of another device-mapper device");
        }
        if property("SYSTEMD_READY") == Some("0") {
            return Self::NotReady;
        }
        Self::Fine
    }
}

/// What the process that asks a device sends back.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    Nothing,
    Ambiguous,
    Superblock { kind: String, usage: String, label: String, uuid: String },
    Error(String),
}

impl Said {
    fn of(device: &Path) -> Self {
        // O_NONBLOCK: an empty drive answers at once.
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(device);
        match open.and_then(|file: File| blkid::probe(&file)) {
            Ok(Content::Nothing) => Self::Nothing,
            Ok(Content::Ambiguous) => Self::Ambiguous,
            Ok(Content::Superblock(one)) => {
                Self::Superblock { kind: one.kind, usage: one.usage, label: one.label, uuid: one.uuid }
            }
            Err(error) => Self::Error(error.to_string()),
        }
    }

    /// What follows for a search of a device with this name in a partition table.
    fn judge(self, wanted: &Partition, partition_name: Option<&str>) -> Knowledge {
        let no = |why: &str| Knowledge::No(Some(why.to_string()));
        match self {
            Self::Nothing => match wanted {
                Partition::Device(_) => Knowledge::Damaged,
                Partition::Label(name) if partition_name == Some(name) => Knowledge::Damaged,
                _ => Knowledge::No(None),
            },
            Self::Ambiguous => no("it has the signatures of more than one file system or volume"),
            Self::Error(why) => Knowledge::No(Some(format!("it cannot be read: {why}"))),
            Self::Superblock { kind, usage, .. } if matches!(usage.as_str(), "raid" | "crypto") => {
                Knowledge::No(Some(format!("it is a part of something else ({kind})")))
            }
            Self::Superblock { kind, label, uuid, .. } => {
                let is_wanted = match wanted {
                    Partition::Device(_) => true,
                    Partition::Label(name) => label == *name,
                    Partition::Uuid(name) => uuid.eq_ignore_ascii_case(name),
                };
                let driver = FILE_SYSTEMS.iter().find(|(name, _)| *name == kind);
                match driver {
                    _ if !is_wanted => Knowledge::No(None),
                    Some((_, driver)) => Knowledge::Candidate(driver),
                    None => Knowledge::No(Some(format!("it holds {kind}, expected ext4, xfs or btrfs"))),
                }
            }
        }
    }
}

/// A search for the system partition.
#[derive(Debug)]
pub struct Search {
    wanted: Partition,
    begin: Instant,
    patience: Duration,
    known: BTreeMap<Device, Knowledge>,
}

impl Search {
    /// Begins a search that has been waiting since `begin` and ends after `patience`.
    ///
    /// # Errors
    /// Where libblkid cannot be loaded.
    pub fn new(wanted: &Partition, begin: Instant, patience: Duration) -> io::Result<Self> {
        // Before the first fork, so that each child has it.
        blkid::load()?;
        Ok(Self { wanted: wanted.clone(), begin, patience, known: BTreeMap::new() })
    }

    /// Devices that are not candidates though they might have been, and why.
    pub fn passed_over(&self) -> Vec<PassedOver> {
        let why = |knowledge: &Knowledge| match knowledge {
            Knowledge::Asked(_) => Some("it does not answer".to_string()),
            Knowledge::No(why) => why.clone(),
            Knowledge::Candidate(_) | Knowledge::Damaged | Knowledge::Given => None,
        };
        self.known
            .iter()
            .filter_map(|(device, knowledge)| {
                Some(PassedOver { device: device.node(), why: why(knowledge)? })
            })
            .collect()
    }

    /// Has new devices asked, and takes the answers that are there.
    fn look(&mut self) {
        // udev that is slow, or has died, must not stop a boot.
        let trust_udev = self.begin.elapsed() < self.patience / 2;
        let devices = self.devices();
        // What was asked of a device that is gone is of no use.
        self.known.retain(|device, _| devices.contains(device));
        for device in devices {
            if self.known.contains_key(&device) {
                continue;
            }
            let knowledge = match Udev::of(&device.number) {
                Udev::NotReady if trust_udev => continue,
                Udev::Others(why) => Knowledge::No(Some(why.to_string())),
                Udev::Fine | Udev::NotReady => {
                    let node = device.node();
                    let ask = move || (serde_json::to_vec(&Said::of(&node)).unwrap_or_default(), None);
                    match Helper::start(ask) {
                        Ok(helper) => Knowledge::Asked(helper),
                        Err(error) => Knowledge::No(Some(format!("it cannot be asked: {error}"))),
                    }
                }
            };
            self.known.insert(device, knowledge);
        }
        for (device, knowledge) in &mut self.known {
            let Knowledge::Asked(helper) = knowledge else { continue };
            let said = match helper.answer(Duration::ZERO) {
                Ok(None) => continue,
                Ok(Some(answer)) => serde_json::from_slice(&answer.bytes)
                    .unwrap_or_else(|error| Said::Error(error.to_string())),
                Err(error) => Said::Error(error.to_string()),
            };
            *knowledge = said.judge(&self.wanted, device.partition_name().as_deref());
        }
    }

    /// The devices that are there now.
    fn devices(&self) -> Vec<Device> {
        if let Partition::Device(path) = &self.wanted {
            return device_of_node(Path::new(path)).into_iter().collect();
        }
        let Ok(entries) = fs::read_dir(SYSFS) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter_map(|name| Device::of(&name)).collect()
    }
}

/// The candidates in order; waits for the next one until the search's time is over. No device is given twice.
impl Iterator for Search {
    type Item = Candidate;

    fn next(&mut self) -> Option<Candidate> {
        loop {
            self.look();
            let mut is_asking = false;
            let (mut found, mut damaged) = (None, None);
            let mut in_order: Vec<_> = self.known.iter().collect();
            sorting::sort_by_key(&mut in_order, |(device, _)| device.order());
            for (device, knowledge) in in_order {
                match knowledge {
                    Knowledge::Asked(helper) => {
                        is_asking |= helper.started.elapsed() < ANSWER_WITHIN;
                        // It comes before the candidates that follow, and may still answer.
                        if helper.started.elapsed() < ORDER_WITHIN {
                            break;
                        }
                    }
                    Knowledge::Candidate(file_system) => {
                        found = Some((device.clone(), *file_system, false));
                        break;
                    }
                    Knowledge::Damaged => {
                        damaged.get_or_insert_with(|| (device.clone(), CHECKED, true));
                    }
                    Knowledge::Given | Knowledge::No(_) => {}
                }
            }
            if let Some((device, file_system, is_damaged)) = found.or(damaged.filter(|_| !is_asking)) {
                let why = device.holder().map(|holder| format!("{holder} holds it"));
                let candidate = Candidate { device: device.node(), file_system, is_damaged };
                let is_free = why.is_none();
                let next = if is_free { Knowledge::Given } else { Knowledge::No(why) };
                self.known.insert(device, next);
                if is_free {
                    return Some(candidate);
                }
                continue;
            }
            if self.begin.elapsed() >= self.patience && !is_asking {
                return None;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The device that a node or a link to one stands for.
fn device_of_node(path: &Path) -> Option<Device> {
    let name = fs::read_link(disk::sysfs(path)?).ok()?.file_name()?.to_str()?.to_string();
    Device::of(&name)
}

/// A candidate that is mounted, attached nowhere yet.
#[derive(Debug)]
pub struct Mounted {
    /// The mount. Dropping it undoes it.
    pub mount: OwnedFd,
    /// Whether nothing can be written to it.
    pub read_only: bool,
}

/// What the process that mounts sends back, with the mount.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Mounted { read_only: bool },
    Failed(String),
}

impl Candidate {
    /// Checks its file system, mounts it, and looks whether it holds a system. It has `patience` for each answer. `say` gets
    /// a sentence where the check has corrected something, or takes long.
    ///
    /// # Errors
    /// Why it is no system partition, as part of a sentence.
    pub fn mount(
        &self,
        patience: Duration,
        watchdog: Option<&Path>,
        say: &dyn Fn(&str),
    ) -> Result<Mounted, String> {
        let patience = patience.max(ANSWER_WITHIN);
        let checked = self.check(patience, watchdog, say);
        if checked == Some(Ok(true)) {
            say(&format!("{}: e2fsck has corrected its file system", self.device.display()));
        }
        let mounted = if self.is_damaged && !matches!(checked, Some(Ok(_))) {
            Err("it has no file system".to_string())
        } else {
            self.mount_checked(patience)
        };
        let Some(Err(check)) = checked else { return mounted };
        match mounted {
            Ok(mounted) => {
                say(&format!("{}: its file system is mounted as it is: {check}", self.device.display()));
                Ok(mounted)
            }
            Err(why) => Err(format!("{why}; {check}")),
        }
    }

    /// Checks its file system, where that can be done; returns whether something was corrected.
    fn check(
        &self,
        patience: Duration,
        watchdog: Option<&Path>,
        say: &dyn Fn(&str),
    ) -> Option<Result<bool, String>> {
        if self.file_system != CHECKED || e2fsck::is_read_only(&self.device) {
            return None;
        }
        let program = e2fsck::program()?;
        let check = Check { program, device: &self.device, patience, watchdog };
        let ask = || serde_json::to_vec(&check.make()).unwrap_or_default();
        let helper = match Helper::start(|| (ask(), None)) {
            Ok(helper) => helper,
            Err(error) => return Some(Err(error.to_string())),
        };
        let answer = helper.answer(SAY_AFTER).and_then(|answer| match answer {
            Some(answer) => Ok(Some(answer)),
            None => {
                say(&format!(
                    "{}: its file system is checked, which can take minutes",
                    self.device.display()
                ));
                helper.answer(e2fsck::MAX_TIME + patience)
            }
        });
        Some(match answer {
            Ok(Some(answer)) => serde_json::from_slice(&answer.bytes)
                .unwrap_or_else(|_| Err("the process that checked it answered nonsense".into())),
            Ok(None) => Err("the process that checked it did not answer".into()),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Mounts it, and looks whether it holds a system, within `patience`.
    fn mount_checked(&self, patience: Duration) -> Result<Mounted, String> {
        let work = || match mount_and_look(self) {
            Ok(Mounted { mount, read_only }) => (Outcome::Mounted { read_only }, Some(mount)),
            Err(why) => (Outcome::Failed(why), None),
        };
        let helper = Helper::start(|| {
            let (outcome, mount) = work();
            (serde_json::to_vec(&outcome).unwrap_or_default(), mount)
        });
        let helper = helper.map_err(|error| error.to_string())?;
        let answer = helper.answer(patience).map_err(|error| error.to_string())?;
        let answer = answer.ok_or_else(|| format!("it did not answer within {} s", patience.as_secs()))?;
        match (serde_json::from_slice(&answer.bytes), answer.descriptor) {
            (Ok(Outcome::Mounted { read_only }), Some(mount)) => Ok(Mounted { mount, read_only }),
            (Ok(Outcome::Failed(why)), _) => Err(why),
            _ => Err("the process that mounted it answered nonsense".into()),
        }
    }
}

/// Mounts, writable where that is possible, and looks for what a system partition has.
fn mount_and_look(candidate: &Candidate) -> Result<Mounted, String> {
    let driver = candidate.file_system;
    let mounted = match attempt(candidate, &[]) {
        Ok(mount) => Mounted { mount, read_only: false },
        // EACCES: the kernel's word for a device that is read-only (get_tree_bdev).
        Err(error) if matches!(error.errno(), libc::EACCES | libc::EROFS | libc::EPERM) => {
            let replay = NO_REPLAY.iter().find(|(name, ..)| *name == driver);
            let no_replay = replay.map(|(_, key, value)| (*key, *value));
            let options = [("ro", None)].into_iter().chain(no_replay).collect::<Vec<_>>();
            let mount = attempt(candidate, &[("ro", None)]).or_else(|_| attempt(candidate, &options));
            Mounted { mount: mount.map_err(|error| error.to_string())?, read_only: true }
        }
        Err(error) => return Err(error.to_string()),
    };
    if ["state.json", "deployments"].iter().any(|name| mountapi::has_entry(mounted.mount.as_fd(), name)) {
        Ok(mounted)
    } else {
        Err("it holds no system".into())
    }
}

fn attempt(candidate: &Candidate, options: &[(&str, Option<&str>)]) -> Result<OwnedFd, CallError> {
    let context = FsContext::open(candidate.file_system)?;
    context.set_string("source", candidate.device.as_os_str().as_encoded_bytes())?;
    for (key, value) in options {
        match value {
            Some(value) => context.set_string(key, value.as_bytes())?,
            None => context.set_flag(key)?,
        }
    }
    // Nothing on it is trusted: no programs, no devices, no setuid. What is executed comes from verified
    // layers, whose devices and modes are those of the layer's own mount.
    context.mount(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(kind: &str, usage: &str, label: &str) -> Said {
        let uuid = "6d1f6e2a-0c5c-4b0a-9d2e-0a1b2c3d4e5f";
        Said::Superblock { kind: kind.into(), usage: usage.into(), label: label.into(), uuid: uuid.into() }
    }

    fn judged(said: Said, wanted: &Partition) -> Result<&'static str, Option<String>> {
        match said.judge(wanted, None) {
            Knowledge::Candidate(driver) => Ok(driver),
            Knowledge::No(why) => Err(why),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_a_file_system_with_the_name_is_a_candidate() {
        let label = Partition::Label("mosfs".into());
        let of = |kind: &str, usage: &str, name: &str| judged(superblock(kind, usage, name), &label);
        assert_eq!(of("ext4", "filesystem", "mosfs"), Ok("ext4"));
        assert_eq!(of("ext3", "filesystem", "mosfs"), Ok("ext4"));
        assert_eq!(of("btrfs", "filesystem", "mosfs"), Ok("btrfs"));
        assert_eq!(of("ext4", "filesystem", "other"), Err(None));
        let others = of("vfat", "filesystem", "mosfs").unwrap_err().unwrap();
        assert_eq!(others, "it holds vfat, expected ext4, xfs or btrfs");
        // Whatever label they carry.
        for kind in ["linux_raid_member", "LVM2_member", "bcache", "zfs_member", "drbd", "isw_raid_member"] {
            let why = of(kind, "raid", "mosfs").unwrap_err().unwrap();
            assert_eq!(why, format!("it is a part of something else ({kind})"));
        }
        assert!(of("crypto_LUKS", "crypto", "mosfs").unwrap_err().unwrap().contains("crypto_LUKS"));
        assert!(judged(Said::Ambiguous, &label).unwrap_err().unwrap().contains("more than one"));
        let uuid = Partition::Uuid("6d1f6e2a-0c5c-4b0a-9d2e-0a1b2c3d4e5f".into());
        assert_eq!(judged(superblock("xfs", "filesystem", ""), &uuid), Ok("xfs"));
        let device = Partition::Device("/dev/x".into());
        assert_eq!(judged(superblock("xfs", "filesystem", ""), &device), Ok("xfs"));
        assert!(judged(superblock("linux_raid_member", "raid", ""), &device).unwrap_err().is_some());
    }

    #[test]
    fn what_may_be_repaired_is_what_has_the_name() {
        let may = |wanted: &Partition, name: Option<&str>| {
            matches!(Said::Nothing.judge(wanted, name), Knowledge::Damaged)
        };
        let label = Partition::Label("mosfs".into());
        assert!(may(&label, Some("mosfs")));
        assert!(!may(&label, Some("mosfs-esp")));
        assert!(!may(&label, None));
        assert!(!may(&Partition::Uuid("6d1f6e2a-0c5c-4b0a-9d2e-0a1b2c3d4e5f".into()), Some("mosfs")));
        assert!(may(&Partition::Device("/dev/x".into()), None));
        // Whatever its name, it is not what holds something else.
        let others = superblock("vfat", "filesystem", "mosfs").judge(&label, Some("mosfs"));
        assert!(matches!(others, Knowledge::No(Some(_))));
    }

    #[test]
    fn udevs_word_is_kept() {
        for (text, expected) in [
            ("I:12\nE:ID_FS_TYPE=ext4\nE:ID_FS_LABEL=mosfs\n", Udev::Fine),
            ("E:ID_FS_TYPE=mpath_member\n", Udev::Others("it is a path of a multipath disk")),
            ("E:DM_MULTIPATH_DEVICE_PATH=1\n", Udev::Others("it is a path of a multipath disk")),
            ("E:DM_MULTIPATH_DEVICE_PATH=0\nE:SYSTEMD_READY=1\n", Udev::Fine),
            ("E:SYSTEMD_READY=0\n", Udev::NotReady),
            (
                "E:DM_UDEV_DISABLE_OTHER_RULES_FLAG=1\n",
                Udev::Others("it is a part of another device-mapper device"),
            ),
            ("E:XSYSTEMD_READY=0\nS:SYSTEMD_READY=0\n", Udev::Fine),
        ] {
            assert_eq!(Udev::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn a_partition_that_never_comes_ends_the_wait() {
        let wanted = Partition::Device("/dev/no-such-disk".into());
        let mut search = Search::new(&wanted, Instant::now(), Duration::ZERO).unwrap();
        assert_eq!(search.next(), None);
        assert!(search.passed_over().is_empty());
    }
}
