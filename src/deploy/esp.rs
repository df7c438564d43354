//! The EFI system partition: kernels of the deployments, as a function of the state file.
//!
//! ```text
//! ESP/EFI/Linux/mosfs-VERSION-ID.efi      a kernel that has started a healthy system; ID: 12 hex digits of its id
//! ESP/EFI/Linux/mosfs-VERSION-ID+3.efi    one that has not: systemd-boot counts its tries in the name (`+LEFT-DONE`)
//! ESP/EFI/Linux/mosfs-….efi.new           one that is being written
//! ESP/EFI/BOOT/BOOTX64.EFI                systemd-boot, where firmware looks without an entry of its own
//! ESP/EFI/mosfs/loader                    SHA-256 of the BOOTX64.EFI that mosfs wrote: another one is of others
//! ```
//!
//! There is one file for each kernel that current, pending and previous deployment name; a version that keeps the
//! kernel of the one before it changes nothing here. systemd-boot starts the highest version among those with tries
//! left (Boot Loader Specification, "Sorting"; systemd-boot(7), "Boot counting").
//!
//! **Crashes.** A kernel is written under its temporary name, synced and read back before the state file names its
//! deployment, and has its final name afterwards. After a crash in between, the old kernel boots, passes over the
//! pending deployment without spending a try, and the next command finishes. Kernels are removed last.
//!
//! A commit ends the count of the kernel that runs before it raises the floor. Otherwise the last try could be spent
//! on a boot that raises the floor and is cut off: systemd-boot would then always start the old kernel, whose system
//! the floor refuses.
//!
//! A crash while FAT renames a file may leave both names with one content. To remove one of them would free the
//! blocks of both, so nothing is removed or replaced that has the kernel id of a file that stays. One moment earlier the
//! new name is there and empty: such a file has no blocks, is no kernel, and is replaced or removed.
//!
//! Files of others are neither changed nor removed. Systems without a kernel of their own have nothing here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::DeployError;
pub use super::esp_error::EspError;
use super::id::DeploymentId;
use super::state::{Pending, State, TRIES};
use super::{System, deployment, kernel, target};
use crate::digest::Digest;
use crate::error::{IoContext, IoError};
use crate::image::boot::{self, LOADER, UKI};
use crate::image::oci::OciImage;
use crate::manifest::SystemManifest;
use crate::sorting;
use crate::store::Store;
use crate::sys::atomic;
use crate::sys::failpoint;
use crate::sys::file::{self, Links};
use crate::sys::mountapi::{self, CallError, FsContext};
use crate::trust::TrustError;

/// Largest kernel image or loader that is written, in bytes.
const MAX_FILE: u64 = 512 << 20;
/// Space for folders and the loader's record in addition to the files, in bytes.
const RESERVE: u64 = 1 << 20;
/// Longest list of mounts that is read, in bytes.
const MAX_MOUNTS: u64 = 16 << 20;
/// How many hex digits of a kernel id a file name has.
const ID_DIGITS: usize = 12;
/// How often a partition that is waited for is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What a file that is being written ends with.
const NEW: &str = ".new";

/// A mounted EFI system partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Esp {
    root: PathBuf,
}

/// A kernel of ours in `EFI/Linux`, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Present {
    /// The file name.
    name: String,
    /// The version in it.
    version: u64,
    /// The first digits of the kernel id.
    id: String,
    /// How many tries it has left, where they are counted.
    tries_left: Option<u32>,
}

impl Present {
    /// Reads a file name: `mosfs-VERSION-ID[+LEFT[-DONE]].efi`; `None` for those of others.
    fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("mosfs-")?.strip_suffix(".efi")?;
        let (rest, count) = match rest.split_once('+') {
            Some((rest, count)) => (rest, Some(count)),
            None => (rest, None),
        };
        let (version, id) = rest.split_once('-')?;
        let is_id =
            id.len() == ID_DIGITS && id.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c));
        let decimal = |text: &str| {
            let plain = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
            plain.then(|| text.parse::<u64>().ok()).flatten()
        };
        let tries_left = match count.map(|count| count.split_once('-').unwrap_or((count, "0"))) {
            Some((left, done)) => {
                decimal(done)?;
                Some(u32::try_from(decimal(left)?).ok()?)
            }
            None => None,
        };
        is_id.then(|| {
            Some(Self { name: name.into(), version: decimal(version)?, id: id.into(), tries_left })
        })?
    }
}

/// A kernel that a deployment names.
#[derive(Debug, Clone)]
struct Wanted {
    id: Digest,
    /// The highest version that names it.
    version: u64,
    /// Whether only the pending deployment names it.
    on_trial: bool,
    /// The image of the target `boot`, and the deployment's version.
    image: OciImage,
}

impl Wanted {
    fn digits(&self) -> String {
        self.id.hex()[..ID_DIGITS].to_string()
    }
}

/// What is to be done on an EFI system partition.
#[derive(Debug, Default)]
pub struct Plan {
    /// Kernels to write, with their final names.
    write: Vec<(Wanted, String)>,
    /// Files to rename, from and to.
    rename: Vec<(String, String)>,
    /// Files of ours that nothing names.
    remove: Vec<String>,
    /// The image whose loader should be there.
    loader: Option<OciImage>,
}

/// What changed on an EFI system partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// The names of kernels that were written.
    pub written: Vec<String>,
    /// A file that belongs to others and is in the way, as a sentence.
    pub others: Option<String>,
}

impl Changed {
    /// Writes it to the log.
    pub fn report(&self) {
        for name in &self.written {
            log::info!("EFI/Linux/{name} is in place");
        }
        if let Some(others) = &self.others {
            log::warn!("{others}");
        }
    }
}

impl Esp {
    /// Returns the EFI system partition that is mounted at a folder.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn kernels(&self) -> PathBuf {
        self.root.join("EFI/Linux")
    }

    fn loader(&self) -> PathBuf {
        self.root.join("EFI/BOOT/BOOTX64.EFI")
    }

    fn loader_record(&self) -> PathBuf {
        self.root.join("EFI/mosfs/loader")
    }

    /// The names in `EFI/Linux`.
    fn names(&self) -> Result<Vec<String>, IoError> {
        let folder = self.kernels();
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.on("list", &folder)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry.on("list", &folder)?.file_name().into_string());
        }
        sorting::sort(&mut names);
        Ok(names)
    }

    /// Plans what makes the partition match a state: `booted` is what this boot runs, and `floor` what the floor is,
    /// where these are known. `again`: a kernel whose tries are used up is tried again.
    ///
    /// # Errors
    /// [`EspError`]. A previous deployment that cannot be read is passed over, as it cannot be booted.
    pub fn plan(
        &self,
        system: &System,
        state: &State,
        booted: Option<DeploymentId>,
        floor: Option<u64>,
        again: bool,
    ) -> Result<Plan, EspError> {
        let wanted = wanted(system, state, booted, floor)?;
        let names = self.names()?;
        let (names, empty): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| self.size(name) > 0);
        let present: Vec<Present> = names.iter().filter_map(|name| Present::parse(name)).collect();
        let mut plan = Plan { loader: wanted.first().map(|one| one.image.clone()), ..Plan::default() };
        // The ids of the kernels that stay.
        let mut kept: Vec<String> = Vec::new();
        // Versions in file names must sort as those of the deployments; the lowest one first.
        let mut above = None;
        for one in wanted.into_iter().rev() {
            let digits = one.digits();
            let found = best(present.iter().filter(|file| file.id == digits));
            let stays = |file: &&Present| file.version <= one.version && Some(file.version) > above;
            let version = found.filter(stays).map_or(one.version, |file| file.version);
            above = Some(version);
            let fresh = format!("mosfs-{version}-{digits}+{TRIES}.efi");
            let name = match found {
                _ if !one.on_trial => format!("mosfs-{version}-{digits}.efi"),
                // The boot loader counts on.
                Some(file)
                    if file.version == version && file.tries_left.is_some_and(|left| left > 0 || !again) =>
                {
                    file.name.clone()
                }
                _ => fresh,
            };
            match found {
                Some(file) => {
                    kept.push(digits);
                    if !names.contains(&name) {
                        plan.rename.push((file.name.clone(), name));
                    }
                }
                None => plan.write.push((one, name)),
            }
        }
        let new_names: Vec<String> = plan.write.iter().map(|(_, name)| format!("{name}{NEW}")).collect();
        for name in &names {
            let Some(ours) = Present::parse(name.strip_suffix(NEW).unwrap_or(name)) else { continue };
            if !kept.contains(&ours.id) && !new_names.contains(name) {
                plan.remove.push(name.clone());
            }
        }
        let targets = plan.rename.iter().map(|(_, to)| to.clone());
        let targets: Vec<String> = targets.chain(plan.write.iter().map(|(_, name)| name.clone())).collect();
        for name in empty {
            let is_ours = Present::parse(name.strip_suffix(NEW).unwrap_or(&name)).is_some();
            if is_ours && !targets.contains(&name) && !new_names.contains(&name) {
                plan.remove.push(name);
            }
        }
        Ok(plan)
    }

    /// Requires room for what a system that is not in the store yet would add: its OCI manifest of the target `boot`
    /// is all that is known of it.
    ///
    /// # Errors
    /// [`EspError::NoSpace`].
    pub fn check_room(&self, version: u64, image: &OciImage) -> Result<(), EspError> {
        let Some(id) = boot::kernel_id(image).ok().flatten() else { return Ok(()) };
        let digits = &id.hex()[..ID_DIGITS];
        let names = self.names()?;
        let mut present = names.iter().filter_map(|name| Present::parse(name));
        if present.any(|file| file.id == digits && self.size(&file.name) > 0) {
            return Ok(());
        }
        let bytes = image.manifest.annotations.get(boot::BYTES).and_then(|text| text.parse::<u64>().ok());
        self.require(version, bytes.unwrap_or(0).saturating_add(RESERVE), 0)
    }

    fn require(&self, version: u64, needed: u64, freed: u64) -> Result<(), EspError> {
        let free = file::available_bytes(&self.root).on("stat", &self.root)?;
        let available = free.saturating_add(freed);
        if needed <= available {
            return Ok(());
        }
        let mut kernels: Vec<_> =
            self.names()?.into_iter().map(|name| (name.clone(), self.size(&name))).collect();
        sorting::sort_by(&mut kernels, |one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
        Err(EspError::NoSpace { path: self.root.clone(), needed, available, version, kernels })
    }

    fn size(&self, name: &str) -> u64 {
        fs::symlink_metadata(self.kernels().join(name)).map_or(0, |metadata| metadata.len())
    }

    /// Writes the kernels of a plan under temporary names, synced and read back. Nothing starts them yet.
    ///
    /// # Errors
    /// [`EspError::NoSpace`] before anything is written; then what nothing names is removed already.
    pub fn stage(&self, store: &Store, plan: &Plan) -> Result<(), EspError> {
        if plan.write.is_empty() {
            return Ok(());
        }
        for (wanted, name) in &plan.write {
            let bytes = read(store, &wanted.image, UKI)?;
            if self.require(wanted.version, bytes.len() as u64 + RESERVE, 0).is_err() {
                self.remove(plan)?;
            }
            self.require(wanted.version, bytes.len() as u64 + RESERVE, 0)?;
            let folder = self.kernels();
            file::create_folders(&folder)?;
            let path = folder.join(format!("{name}{NEW}"));
            file::remove_if_there(&path)?;
            atomic::write_new(&path, &bytes, 0o600).on("write", &path)?;
            if file::read_regular(&path, Links::Refused, MAX_FILE)? != bytes {
                return Err(EspError::ReadBack { path });
            }
            failpoint::hit("esp.kernel.written");
        }
        Ok(())
    }

    /// Gives the staged kernels their names, brings the loader up to date, and removes what nothing names.
    ///
    /// # Errors
    /// [`EspError`]; the next call goes on where this one stopped.
    pub fn switch(&self, store: &Store, plan: &Plan) -> Result<Changed, EspError> {
        let mut changed = Changed::default();
        let folder = self.kernels();
        // The loader first: one that cannot start the kernels must not find them.
        if let Some(image) = &plan.loader {
            changed.others = self.update_loader(store, image)?;
        }
        let written = plan.write.iter().map(|(_, name)| (format!("{name}{NEW}"), name.clone()));
        for (from, to) in written.chain(plan.rename.iter().cloned()) {
            let (from, path) = (folder.join(from), folder.join(&to));
            fs::rename(&from, &path).on("rename", &from)?;
            failpoint::hit("esp.kernel.renamed");
            changed.written.push(to);
        }
        if !changed.written.is_empty() {
            self.sync()?;
        }
        self.remove(plan)?;
        Ok(changed)
    }

    fn remove(&self, plan: &Plan) -> Result<(), EspError> {
        for name in &plan.remove {
            let path = self.kernels().join(name);
            file::remove_if_there(&path)?;
            failpoint::hit("esp.kernel.removed");
        }
        if plan.remove.is_empty() { Ok(()) } else { self.sync() }
    }

    fn sync(&self) -> Result<(), EspError> {
        let folder = file::open_folder(&self.root).on("open", &self.root)?;
        Ok(file::sync_file_system(&folder).on("sync", &self.root)?)
    }

    /// Writes the loader where it differs from the one that mosfs wrote; returns a sentence where another one is
    /// there.
    fn update_loader(&self, store: &Store, image: &OciImage) -> Result<Option<String>, EspError> {
        let bytes = read(store, image, LOADER)?;
        let wanted = Digest::of(&bytes);
        let (path, record) = (self.loader(), self.loader_record());
        let present = file::find_regular(&path, Links::Refused, MAX_FILE)?.map(|bytes| Digest::of(&bytes));
        let recorded = file::find_regular(&record, Links::Refused, 1 << 10)?;
        let recorded = recorded.and_then(|text| String::from_utf8_lossy(&text).trim().parse::<Digest>().ok());
        if present == Some(wanted) {
            return Ok(None);
        }
        if present.is_some() && present != recorded {
            return Ok(Some(format!("{} belongs to another system, and is not replaced", path.display())));
        }
        for file in [&path, &record] {
            if let Some(folder) = file.parent() {
                file::create_folders(folder)?;
            }
        }
        // The loader first: a record of one that was never written would make another's ours.
        atomic::replace(&path, &bytes, 0o600, "esp.loader").on("replace", &path)?;
        atomic::replace(&record, format!("{wanted}\n").as_bytes(), 0o600, "esp.record")
            .on("replace", &record)?;
        Ok(None)
    }
}

/// The file of a kernel that may stay the longest: one without a count, or the one with the most tries left.
fn best<'a>(files: impl Iterator<Item = &'a Present>) -> Option<&'a Present> {
    files.max_by_key(|file| file.tries_left.unwrap_or(u32::MAX))
}

/// Reads a file of an image of the target `boot`.
fn read(store: &Store, image: &OciImage, file: &'static str) -> Result<Vec<u8>, EspError> {
    let bytes = store.files(image)?.read(file, MAX_FILE)?;
    bytes.ok_or(EspError::Missing { image: image.digest, file })
}

fn deploy(error: DeployError) -> EspError {
    EspError::Deploy(error.into())
}

/// The kernels that deployments name, the one of the highest version first.
fn wanted(
    system: &System,
    state: &State,
    booted: Option<DeploymentId>,
    floor: Option<u64>,
) -> Result<Vec<Wanted>, EspError> {
    let pending = state.pending.as_ref();
    // What is still being fetched has no folder, and its kernel may not be here.
    let is_tried = |one: &&Pending| !one.fetching && (one.tries_left > 0 || booted == Some(one.deployment));
    let pending = pending.filter(is_tried);
    let pending = pending.map(|one| one.deployment);
    // Rule (docs/design.md, floor at boot): what is below the floor is never started.
    let startable = |id: &DeploymentId| floor.is_none_or(|floor| id.version >= floor);
    // The boot loader takes the highest version first: one above the current version would no longer be a fallback.
    let is_fallback = |id: &DeploymentId| state.current.is_none_or(|current| id.version < current.version);
    let previous = state.previous.filter(|id| startable(id) && is_fallback(id));
    let all = [(pending, true), (state.current, false), (previous, false), (booted, false)];
    let mut kernels: BTreeMap<Digest, Wanted> = BTreeMap::new();
    for (id, is_pending) in all {
        let Some(id) = id else { continue };
        // What runs without having been blessed is the pending one, which is on trial.
        if !is_pending && pending == Some(id) && state.current != Some(id) {
            continue;
        }
        let found = match kernel_of(system, &id) {
            Ok(found) => found,
            // It can never be booted, and holds nothing up.
            Err(error) if state.previous == Some(id) && state.current != Some(id) => {
                log::warn!("the kernel of deployment {id} is not known: {error}");
                None
            }
            Err(error) => return Err(deploy(error)),
        };
        let Some((kernel, image)) = found else { continue };
        let one = Wanted { id: kernel, version: id.version, on_trial: is_pending, image };
        kernels
            .entry(kernel)
            .and_modify(|known| {
                known.version = known.version.max(one.version);
                known.on_trial &= one.on_trial;
            })
            .or_insert(one);
    }
    let mut wanted: Vec<Wanted> = kernels.into_values().collect();
    sorting::sort_by_key(&mut wanted, |one| std::cmp::Reverse(one.version));
    Ok(wanted)
}

/// The kernel that a deployment names, and the image that holds it.
fn kernel_of(system: &System, id: &DeploymentId) -> Result<Option<(Digest, OciImage)>, DeployError> {
    let signed = deployment::read(system, id)?;
    let digest = Digest::of(&signed.manifest);
    let manifest = SystemManifest::parse(&signed.manifest).map_err(TrustError::from)?;
    if digest != id.digest {
        return Err(DeployError::OtherManifest { id: *id, version: manifest.version, digest });
    }
    let Some(kernel) = kernel::required(system, &manifest)? else { return Ok(None) };
    let Some((name, target)) = manifest.targets.iter().find(|(name, _)| name.as_str() == boot::TARGET) else {
        return Ok(None);
    };
    Ok(Some((kernel, target::image_of(&system.store()?, name.as_str(), target)?)))
}

/// Whether a deployment names this kernel.
pub(super) fn names(system: &System, id: &DeploymentId, kernel: Option<Digest>) -> bool {
    kernel_of(system, id).is_ok_and(|found| found.map(|(found, _)| found) == kernel)
}

/// Brings a partition up to date with the state on the disk. The caller holds the system's lock.
///
/// # Errors
/// [`EspError`].
pub fn sync(
    system: &System,
    esp: &Esp,
    booted: Option<DeploymentId>,
    floor: Option<u64>,
) -> Result<Changed, EspError> {
    let state = system.state().map_err(deploy)?;
    let plan = esp.plan(system, &state, booted, floor, false)?;
    if plan.loader.is_none() && plan.remove.is_empty() {
        return Ok(Changed::default());
    }
    let store = system.store()?;
    esp.stage(&store, &plan)?;
    esp.switch(&store, &plan)
}

/// Returns where an EFI system partition is mounted: the first of `/efi`, `/boot/efi` and `/boot` that is one
/// (bootctl(1), `--esp-path`).
pub fn mounted() -> Option<Esp> {
    let text = file::read_named(Path::new("/proc/self/mounts"), MAX_MOUNTS).ok()?;
    let text = String::from_utf8_lossy(&text);
    let is_vfat = |place: &str| {
        text.lines().any(|line| {
            let mut words = line.split(' ').skip(1);
            words.next() == Some(place) && words.next() == Some("vfat")
        })
    };
    // A look into it mounts it where systemd does so at the first use.
    let look = |place: &&str| {
        let _ = Path::new(place).join("EFI").metadata();
    };
    ["/efi", "/boot/efi", "/boot"].into_iter().inspect(look).find(|place| is_vfat(place)).map(Esp::at)
}

/// The vendor GUID of variables of boot loaders (Boot Loader Interface).
const LOADER_VARIABLE: &str =
    "/sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// Returns the partition that the boot loader was started from; `None` if it does not say so (Boot Loader Interface,
/// `LoaderDevicePartUUID`). Early in a boot, udev may not have found it yet: it is waited for, at most for `patience`.
///
/// # Errors
/// [`EspError::NoDevice`].
pub fn device_of_this_boot(patience: Duration) -> Result<Option<PathBuf>, EspError> {
    let Some(uuid) = loader_partition() else { return Ok(None) };
    wait_for_device(Path::new("/dev/disk/by-partuuid").join(uuid), patience).map(Some)
}

fn wait_for_device(device: PathBuf, patience: Duration) -> Result<PathBuf, EspError> {
    let end = Instant::now() + patience;
    while !device.exists() {
        if Instant::now() >= end {
            return Err(EspError::NoDevice { device, waited: patience });
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(device)
}

/// Returns the UUID of the partition that the boot loader was started from, in lower case; `None` if it does not say so,
/// as after a start from a CD.
pub fn loader_partition() -> Option<String> {
    // Four bytes of attributes, then UTF-16 with a zero at its end.
    let bytes = file::read_named(Path::new(LOADER_VARIABLE), 1 << 10).ok()?;
    let units = bytes.get(4..)?.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let text: String =
        char::decode_utf16(units.take_while(|unit| *unit != 0)).collect::<Result<_, _>>().ok()?;
    let uuid = text.to_ascii_lowercase();
    let plain = uuid.len() == 36 && uuid.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
    plain.then_some(uuid)
}

/// Mounts an EFI system partition: for root alone, and nothing on it can be run.
///
/// # Errors
/// [`EspError::Mount`], [`EspError::Io`].
pub fn mount(device: &Path, folder: &Path) -> Result<(), EspError> {
    file::create_folders(folder)?;
    let mounted = || -> Result<(), CallError> {
        let context = FsContext::open("vfat")?;
        context.set_string("source", device.as_os_str().as_encoded_bytes())?;
        context.set_string("umask", b"077")?;
        // A rename writes the new name before it removes the old one.
        context.set_flag("dirsync")?;
        let flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        mountapi::attach(context.mount(flags)?, folder)
    };
    mounted().map_err(|source| EspError::Mount { device: device.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_waited_for_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("esp");
        let error = wait_for_device(device.clone(), Duration::from_millis(1)).unwrap_err().to_string();
        let expected =
            "did not appear within 0 s: the EFI system partition that this machine was started from";
        assert_eq!(error, format!("{} {expected}", device.display()));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait_for_device(device.clone(), Duration::from_secs(3600)));
            fs::write(&device, "").unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), device);
        });
    }

    #[test]
    fn the_names_of_our_kernels() {
        let parse = |name: &str| Present::parse(name).map(|file| (file.version, file.id, file.tries_left));
        let id = "0123456789ab".to_string();
        assert_eq!(parse("mosfs-200-0123456789ab.efi"), Some((200, id.clone(), None)));
        assert_eq!(parse("mosfs-200-0123456789ab+3.efi"), Some((200, id.clone(), Some(3))));
        assert_eq!(parse("mosfs-200-0123456789ab+0-3.efi"), Some((200, id, Some(0))));
        for others in [
            "linux.efi",
            "mosfs-200.efi",
            "mosfs-200-0123456789AB.efi",
            "mosfs-200-0123456789abc.efi",
            "mosfs-x-0123456789ab.efi",
            "mosfs-+1-0123456789ab.efi",
            "mosfs-200-0123456789ab+.efi",
            "mosfs-200-0123456789ab+3-x.efi",
            "mosfs-200-0123456789ab.efi.new",
        ] {
            assert_eq!(parse(others), None, "{others}");
        }
    }
}
