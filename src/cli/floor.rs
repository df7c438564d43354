//! `mosfs floor`: provision, show, and sign for the floor.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use uuid::Uuid;

use super::Global;
use crate::digest::hex;
use crate::error::{AnyError, Class, Classified, IoContext, IoError};
use crate::floor::signature::{self, PROVISION_MESSAGE_BYTES};
use crate::floor::{
    self, Config, FileFloor, Floor, FloorError, KeyError, Place, PrivateKey, PublicKey, Signature, Tcti,
    TpmFloor,
};
use crate::sys::atomic;

/// Where the floor is: for each command that asks it.
#[derive(Debug, Clone, Args)]
pub struct FloorArgs {
    /// How to reach the TPM: device:/dev/tpmrm0, swtpm:host=127.0.0.1,port=2321 or swtpm:path=SOCKET.
    #[arg(long, env = "MOSFS_TPM", default_value = "device:/dev/tpmrm0", value_name = "TCTI")]
    pub tpm: Tcti,
    /// Where the floor is kept: `file` is for development, and protects nothing.
    #[arg(long, value_enum, default_value_t = Kind::Tpm, value_name = "KIND")]
    pub floor: Kind,
    /// How long the TPM may take, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    pub tpm_timeout: u64,
}

/// Where the floor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// In the TPM.
    Tpm,
    /// In a file of the state folder.
    File,
}

impl FloorArgs {
    /// The place that the arguments name.
    pub fn place(&self, global: &Global) -> Place {
        match self.floor {
            Kind::Tpm => Place::Tpm(self.tpm.clone(), Duration::from_secs(self.tpm_timeout)),
            Kind::File => Place::File(global.system.join("floor")),
        }
    }

    /// Whether the floor is the development floor.
    pub fn in_file(&self) -> bool {
        self.floor == Kind::File
    }

    /// Opens the floor without a warning: for those who only show it.
    pub fn open_quietly(&self, global: &Global) -> Result<Box<dyn Floor>, AnyError> {
        Ok(floor::open(&self.place(global), &Config::load(&global.config)?)?)
    }

    /// Opens the floor, and says each time that the development floor protects nothing.
    pub fn open(&self, global: &Global) -> Result<Box<dyn Floor>, AnyError> {
        let floor = floor::open(&self.place(global), &Config::load(&global.config)?)?;
        warn(floor.as_ref());
        Ok(floor)
    }
}

fn warn(floor: &dyn Floor) {
    if let Some(warning) = floor.warning() {
        eprintln!("mosfs: warning: {warning}");
    }
}

/// The lowest version that a device still runs.
#[derive(Debug, Args)]
pub struct FloorCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Provision(Provision),
    Show(Show),
    Sign(Sign),
    Authorize(Authorize),
    SignProvision(SignProvision),
}

/// Give this device's TPM a floor, once, in the factory.
///
/// With the provisioning key at hand: --provision-key. With the key elsewhere: --provision-pub, --nonce-out and
/// --signature-in; the command writes the nonce, keeps the TPM's session open, and waits for the signature.
#[derive(Debug, Args)]
struct Provision {
    /// The provisioning key (PEM, private).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["provision_pub", "nonce_out", "signature_in"])]
    provision_key: Option<PathBuf>,
    /// The provisioning key's public half, when the key is elsewhere.
    #[arg(long, value_name = "FILE", requires = "nonce_out", requires = "signature_in")]
    provision_pub: Option<PathBuf>,
    /// Write what the provisioning key must sign to this file (36 bytes); `-` is stdout.
    #[arg(long, value_name = "FILE", requires = "provision_pub")]
    nonce_out: Option<PathBuf>,
    /// Take the signature from this file, as soon as it is there; `-` is stdin.
    #[arg(long, value_name = "FILE", requires = "provision_pub")]
    signature_in: Option<PathBuf>,
    /// How long to wait for the signature, in seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    wait: u64,
    /// The floor key's authorization of the provisioning key, where the key's file does not hold it.
    #[arg(long, value_name = "FILE")]
    authorization: Option<PathBuf>,
    /// The floor key's public half; recorded in CONFIG.
    #[arg(long, value_name = "FILE")]
    floor_pub: Option<PathBuf>,
    /// The product; recorded in CONFIG.
    #[arg(long, value_name = "UUID")]
    product: Option<Uuid>,
    #[command(flatten)]
    floor: FloorArgs,
}

/// Show the floor.
#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    floor: FloorArgs,
}

/// Sign a version for every device of a product (64 bytes, to stdout or a file).
#[derive(Debug, Args)]
#[command(disable_version_flag = true)]
struct Sign {
    /// The version.
    #[arg(long, value_name = "V")]
    version: u64,
    /// The floor key (PEM, private).
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The product.
    #[arg(long, value_name = "UUID")]
    product: Uuid,
    /// Where to write it; stdout if not given.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Authorize a provisioning key, with the floor key: a PEM block to append to its file.
#[derive(Debug, Args)]
struct Authorize {
    /// The provisioning key's public half.
    #[arg(long, value_name = "FILE")]
    provision_pub: PathBuf,
    /// The floor key (PEM, private).
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The product.
    #[arg(long, value_name = "UUID")]
    product: Uuid,
    /// Where to write it; stdout if not given.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Sign what `floor provision --nonce-out` wrote, where the provisioning key lives (64 bytes).
#[derive(Debug, Args)]
struct SignProvision {
    /// What is to be signed; `-` is stdin.
    #[arg(long, value_name = "FILE")]
    nonce: PathBuf,
    /// The provisioning key (PEM, private).
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Where to write it; stdout if not given.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What only the command line can get wrong.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error(
        "floor provision: expected --provision-key, or --provision-pub with --nonce-out and --signature-in"
    )]
    NoKey,
    #[error("{}: no signature of a provisioning key appeared within {waited:?}", path.display())]
    NoSignature { path: PathBuf, waited: Duration },
}

impl Classified for UsageError {
    fn class(&self) -> Class {
        match self {
            UsageError::NoKey => Class::Input,
            UsageError::NoSignature { .. } => Class::Failure,
        }
    }
}

/// Runs `mosfs floor`.
pub fn run(args: &FloorCommand, global: &Global) -> Result<(), AnyError> {
    match &args.command {
        Command::Provision(args) => provision(args, global),
        Command::Show(args) => show(args, global),
        Command::Sign(args) => {
            let key = PrivateKey::read(&args.key)?;
            write_out(args.output.as_deref(), &floor::sign_version(&key, &args.product, args.version)?)
        }
        Command::Authorize(args) => {
            let key = PrivateKey::read(&args.key)?;
            let provision_key = PublicKey::read(&args.provision_pub)?;
            let authorization = signature::authorize(&key, &args.product, &provision_key)?;
            write_out(args.output.as_deref(), signature::authorization_block(&authorization).as_bytes())
        }
        Command::SignProvision(args) => {
            let key = PrivateKey::read(&args.key)?;
            let message = read_in(&args.nonce)?;
            write_out(args.output.as_deref(), &signature::sign_provision(&key, &message, &args.nonce)?)
        }
    }
}

fn provision(args: &Provision, global: &Global) -> Result<(), AnyError> {
    let floor_pub = args.floor_pub.as_deref().map(PublicKey::read).transpose()?;
    let config = Config::load(&global.config)?.with(floor_pub, args.product)?;
    let (tcti, budget) = match args.floor.place(global) {
        Place::Tpm(tcti, budget) => (tcti, budget),
        Place::File(path) => {
            let floor = FileFloor::new(path, config.policy().ok());
            warn(&floor);
            config.record()?;
            floor.provision()?;
            println!("{} is provisioned: it stands at 0", floor.place());
            return Ok(());
        }
    };
    let policy = config.policy()?;
    // The key, or its public half, and the file that should hold the authorization.
    let (private, public, file) = match (&args.provision_key, &args.provision_pub) {
        (Some(file), _) => {
            let key = PrivateKey::read(file)?;
            let public = *key.public();
            (Some(key), public, file)
        }
        (None, Some(file)) => (None, PublicKey::read(file)?, file),
        (None, None) => return Err(UsageError::NoKey.into()),
    };
    let source = args.authorization.as_ref().unwrap_or(file);
    let text = fs::read(source).on("read", source)?;
    let authorization =
        signature::find_authorization(&policy, &public, &text, &source.display().to_string())?;
    let mut floor = TpmFloor::new(policy, tcti, budget);
    let begun = floor.provision(&public, &authorization)?;
    // Recorded before the TPM's floor becomes final: a device must not have a floor and not know whose.
    config.record()?;
    let signature = match (&private, &args.nonce_out, &args.signature_in) {
        (Some(key), _, _) => signature::sign_provision(key, &begun.message(), file)?.to_vec(),
        (None, Some(nonce), Some(signature)) => {
            write_out(Some(nonce.as_path()), &begun.message())?;
            wait_for_signature(signature, Duration::from_secs(args.wait), |bytes| {
                signature::check_provision(&public, &begun.message(), bytes)
            })?
        }
        _ => return Err(UsageError::NoKey.into()),
    };
    begun.finish(&signature)?;
    let stands_at = floor.read()?;
    if args.nonce_out.as_deref() != Some(Path::new("-")) {
        println!("{} is provisioned: it stands at {stands_at}", floor.place());
    }
    Ok(())
}

fn show(args: &Show, global: &Global) -> Result<(), AnyError> {
    let config = Config::load(&global.config)?;
    match args.floor.place(global) {
        Place::File(path) => {
            let mut floor = FileFloor::new(path, config.policy().ok());
            warn(&floor);
            let version = floor.read()?;
            if global.json {
                println!("{}", serde_json::json!({"kind": "file", "place": floor.place(), "floor": version}));
            } else {
                println!("floor: {version} ({})", floor.place());
            }
        }
        Place::Tpm(tcti, budget) => {
            let policy = config.policy()?;
            let name = policy.name_written();
            let product = policy.product();
            let mut floor = TpmFloor::new(policy, tcti.clone(), budget);
            let version = floor.read()?;
            let area = floor.area()?;
            if global.json {
                let answer = serde_json::json!({
                    "kind": "tpm",
                    "place": tcti.to_string(),
                    "product": product.to_string(),
                    "index": format!("{:#010x}", area.index),
                    "attributes": format!("{:#010x}", area.attributes),
                    "policy": hex(&area.policy),
                    "name": name.to_string(),
                    "floor": version,
                });
                println!("{answer}");
            } else {
                println!("floor: {version}");
                println!("place: {}", floor.place());
                println!("product: {product}");
                println!("attributes: {:#010x}", area.attributes);
                println!("policy: {}", hex(&area.policy));
                println!("name: {name}");
            }
        }
    }
    Ok(())
}

/// Writes a signature or a nonce: to a file, whole or not at all, or to stdout.
fn write_out(path: Option<&Path>, bytes: &[u8]) -> Result<(), AnyError> {
    let Some(path) = path.filter(|path| *path != Path::new("-")) else {
        let mut out = io::stdout().lock();
        let text = bytes.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
        let written =
            if out.is_terminal() && !text { writeln!(out, "{}", hex(bytes)) } else { out.write_all(bytes) };
        written.and_then(|()| out.flush()).on("write", "stdout")?;
        return Ok(());
    };
    let is_file = fs::metadata(path).map_or(true, |meta| meta.is_file());
    if !is_file {
        // A pipe or a terminal.
        let mut file = OpenOptions::new().write(true).open(path).on("open", path)?;
        file.write_all(bytes).on("write", path)?;
        return Ok(());
    }
    // A temporary name of this process' own: there is no lock.
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    Ok(atomic::replace_through(&temporary, path, bytes, 0o644, "floor.out").on("write", path)?)
}

/// Reads what is small, from a file or from stdin.
fn read_in(path: &Path) -> Result<Vec<u8>, IoError> {
    const MAX_BYTES: u64 = 4096;
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        io::stdin().lock().take(MAX_BYTES).read_to_end(&mut bytes).on("read", "stdin")?;
    } else {
        File::open(path).on("open", path)?.take(MAX_BYTES).read_to_end(&mut bytes).on("read", path)?;
    }
    Ok(bytes)
}

/// Waits until a file holds a signature that `check` takes, and gives it.
///
/// A file that is still being written does not check; one that stays as it is for a while is wrong.
fn wait_for_signature(
    path: &Path,
    wait: Duration,
    check: impl Fn(&[u8]) -> Result<Signature, FloorError>,
) -> Result<Vec<u8>, AnyError> {
    const PAUSE: Duration = Duration::from_millis(50);
    const SETTLED: u32 = 20;
    if path == Path::new("-") {
        return Ok(read_in(path)?);
    }
    let end = Instant::now() + wait;
    let mut last: Option<(Vec<u8>, u32)> = None;
    loop {
        match read_in(path) {
            Ok(bytes) if !bytes.is_empty() => match check(&bytes) {
                Ok(_) => return Ok(bytes),
                Err(error) => {
                    let seen = match last {
                        Some((before, seen)) if before == bytes => seen + 1,
                        _ => 0,
                    };
                    if seen >= SETTLED {
                        return Err(error.into());
                    }
                    last = Some((bytes, seen));
                }
            },
            Ok(_) => {}
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= end {
            return Err(UsageError::NoSignature { path: path.to_path_buf(), waited: wait }.into());
        }
        thread::sleep(PAUSE);
    }
}

/// What to do about an error of the floor.
pub fn advice(error: &FloorError) -> Option<&'static str> {
    Some(match error {
        FloorError::NoTpm { .. } => {
            "load the TPM's driver or name the TPM with --tpm; a development machine may use --floor file"
        }
        FloorError::NoLibrary { .. } => {
            "install libtss2-esys-3.0.2-0 (tpm2-tss); an initramfs must carry libtss2-esys.so.0"
        }
        FloorError::NotProvisioned { .. } => {
            "provision the device with `mosfs floor provision`; if it had a floor, somebody cleared its TPM"
        }
        FloorError::ProvisionIncomplete { .. } => {
            "run `mosfs floor provision` again; if the device had a floor, somebody deleted it"
        }
        FloorError::FloorIndexTampered { .. } => {
            "this is not the floor that the factory made, or CONFIG names another floor key or product: \
             inspect the device before it is trusted again (docs/floor.md, \"Recovery\")"
        }
        FloorError::Rollback { .. } => "install a version that is not below the floor",
        FloorError::NotNewer { .. } => "build the update with a higher version",
        FloorError::RaiseRefused { .. } | FloorError::NotRaised { .. } => {
            "run `mosfs commit` again; if it stays, something else writes to this TPM"
        }
        FloorError::BadFloorSignature { .. } | FloorError::NoFloorSignature { .. } => {
            "sign the version with `mosfs floor sign`, or build with --floor-key, with this product's floor key"
        }
        FloorError::PolicyMismatch { .. } => {
            "the TPM disagrees with the floor's digests: report this with the TPM's model"
        }
        FloorError::BadProvisionSignature => {
            "sign the nonce of this run with `mosfs floor sign-provision`; an earlier nonce does not do"
        }
        FloorError::FirstWriteNotAuthorized { .. } => {
            "append the output of `mosfs floor authorize` (made with the floor key) to the provisioning key's file, \
             or give it with --authorization"
        }
        FloorError::NvFull { .. } => {
            "free an NV index with tpm2_nvundefine (tpm2_getcap handles-nv-index lists them)"
        }
        FloorError::AlreadyProvisioned { .. } => "nothing is to be done; `mosfs floor show` shows it",
        FloorError::OwnerAuthNeeded { .. } => {
            "take the owner's authorization away for the provisioning: tpm2_changeauth -c owner -p OLD"
        }
        FloorError::TpmBusy(_) => {
            "try again; see who uses the TPM (fuser /dev/tpmrm0), or allow more with --tpm-timeout"
        }
        FloorError::NotConfigured { .. } => {
            "name it once with `mosfs floor provision --floor-pub F --product UUID`"
        }
        FloorError::ConfigConflict { .. } => {
            "a device keeps its product and its floor key; name the recorded ones"
        }
        FloorError::FileTampered { .. } => "delete the file: it is a development floor",
        FloorError::Config(error) => return super::output::for_anchor(error),
        FloorError::Key(error) => return for_key(error),
        FloorError::Tpm(_) | FloorError::VersionRange { .. } | FloorError::Io(_) => return None,
    })
}

/// What to do about a key of the floor that cannot be used.
pub fn for_key(error: &KeyError) -> Option<&'static str> {
    match error {
        KeyError::Private(error) => super::output::for_key(error),
        KeyError::Unusable { .. } => Some("make the floor's keys with `mosfs keys generate`"),
        _ => None,
    }
}

const _: () = assert!(PROVISION_MESSAGE_BYTES == 36, "the help text says so");
