//! `mosfs floor`: provision, show, and sign for the floor.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use uuid::Uuid;

use super::{Global, output};
use crate::digest::hex;
use crate::error::{AnyError, Class, Classified, IoContext, IoError};
use crate::floor::signature::{self, PROVISION_MESSAGE_BYTES};
use crate::floor::{self, FileFloor, Floor, FloorError, FloorLocation, Tcti, TpmFloor};
use crate::setup::floor::{AuthorizedKey, LONGEST_WAIT, ProvisionKey};
use crate::sys::{atomic, file};
use crate::trust::config::ConfigPlan;
use crate::trust::p256::{P256PrivateKey, P256PublicKey, Signature};

/// Where the floor is: for each command that asks it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "TPM options")]
pub(super) struct FloorArgs {
    /// How to reach the TPM: device:/dev/tpmrm0, swtpm:host=127.0.0.1,port=2321 or swtpm:path=SOCKET.
    #[arg(long, env = "MOSFS_TPM", default_value = "device:/dev/tpmrm0", value_name = "TCTI")]
    pub tpm: Tcti,
    /// Where the floor is kept. `file` is for development and protects nothing.
    #[arg(long, value_enum, default_value_t = Kind::Tpm, value_name = "KIND")]
    pub floor: Kind,
    /// How long to wait for the TPM, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    pub tpm_timeout: u64,
}

/// Where the floor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// In the TPM
    Tpm,
    /// In a file in the system folder
    File,
}

impl FloorArgs {
    /// The place that the arguments name.
    pub(super) fn place(&self, global: &Global) -> FloorLocation {
        match self.floor {
            Kind::Tpm => FloorLocation::Tpm(self.tpm.clone(), Duration::from_secs(self.tpm_timeout)),
            Kind::File => FloorLocation::File(global.system.join("floor")),
        }
    }

    /// Whether the floor is the development floor.
    pub(super) fn in_file(&self) -> bool {
        self.floor == Kind::File
    }

    /// The same options for another command, each with its value.
    pub(super) fn arguments(&self) -> Vec<(&'static str, Option<String>)> {
        let kind = self.floor.to_possible_value().map(|value| value.get_name().to_string());
        vec![
            ("--tpm", Some(self.tpm.to_string())),
            ("--floor", kind),
            ("--tpm-timeout", Some(self.tpm_timeout.to_string())),
        ]
    }

    /// Opens the floor without a warning: for those who only show it.
    pub(super) fn open_quietly(&self, global: &Global) -> Result<Box<dyn Floor>, AnyError> {
        Ok(floor::open(&self.place(global), &global.config)?)
    }

    /// Opens the floor, and says each time that the development floor protects nothing.
    pub(super) fn open(&self, global: &Global) -> Result<Box<dyn Floor>, AnyError> {
        let floor = floor::open(&self.place(global), &global.config)?;
        warn(floor.as_ref());
        Ok(floor)
    }
}

fn warn(floor: &dyn Floor) {
    if let Some(warning) = floor.warning() {
        output::warning(warning);
    }
}

/// The key that a floor is provisioned with, here or on another machine: for each command that provisions one.
#[derive(Debug, Args)]
pub(super) struct ProvisionKeyArgs {
    /// The provisioning key (PEM, private).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["provision_pub", "nonce_out", "signature_in"])]
    pub provision_key: Option<PathBuf>,
    /// The public provisioning key, if the private key is on another machine.
    #[arg(long, value_name = "FILE", requires = "nonce_out", requires = "signature_in")]
    pub provision_pub: Option<PathBuf>,
    /// Write the 36 bytes that the provisioning key must sign to this file; `-` is stdout.
    #[arg(long, value_name = "FILE", requires = "provision_pub")]
    pub nonce_out: Option<PathBuf>,
    /// Wait for this file and read the signature from it; `-` is stdin.
    #[arg(long, value_name = "FILE", requires = "provision_pub")]
    pub signature_in: Option<PathBuf>,
    /// How long to wait for the signature, in seconds.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(..=LONGEST_WAIT), value_name = "SECONDS")]
    pub wait: u64,
}

impl ProvisionKeyArgs {
    /// Writes the message, and waits for its signature by the provisioning key.
    ///
    /// # Errors
    /// [`FloorError::BadProvisionSignature`]; [`UsageError::NoSignature`].
    fn for_signature(
        &self,
        key: &P256PublicKey,
        message: &[u8],
        written: impl Fn(&Path, &Path),
    ) -> Result<Vec<u8>, AnyError> {
        let (Some(nonce), Some(signature)) = (&self.nonce_out, &self.signature_in) else {
            return Err(UsageError::NoKey.into());
        };
        write_out(Some(nonce), message)?;
        written(nonce, signature);
        wait_for_signature(signature, Duration::from_secs(self.wait), |bytes| {
            signature::check_provision(key, message, bytes)
        })
    }

    /// The key, if one is given. `written` is called when the message is written, before the wait for its signature.
    fn key<'a>(&'a self, written: impl Fn(&Path, &Path) + 'a) -> Option<ProvisionKey<'a>> {
        let sign = move |key: &P256PublicKey, message: &[u8]| self.for_signature(key, message, &written);
        match (&self.provision_key, &self.provision_pub) {
            (Some(file), _) => Some(ProvisionKey::Here(file)),
            (None, Some(file)) => Some(ProvisionKey::Elsewhere(file, Box::new(sign))),
            (None, None) => None,
        }
    }

    /// The key for a setup, whose steps are on stdout.
    ///
    /// # Errors
    /// [`UsageError::NonceOnStdout`].
    pub(super) fn for_setup(&self, quiet: bool) -> Result<Option<ProvisionKey<'_>>, AnyError> {
        if self.nonce_out.as_deref() == Some(Path::new("-")) {
            return Err(UsageError::NonceOnStdout.into());
        }
        Ok(self.key(move |nonce, signature| {
            if !quiet {
                // The verdict at the end reports a stdout that cannot be written.
                let (nonce, signature) = (nonce.display(), signature.display());
                let _ =
                    output::line(format_args!("nonce: {nonce}; waiting for its signature in {signature}"));
            }
        }))
    }
}

/// Manage the floor, the lowest version that a device will run.
#[derive(Debug, Args)]
pub(super) struct FloorCommand {
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

/// Create the floor in this device's TPM, once, in the factory.
///
/// If the provisioning key is on this machine, use --provision-key. Otherwise use --provision-pub, --nonce-out and
/// --signature-in: the command writes the nonce, keeps the TPM session open, and waits for the signature.
#[derive(Debug, Args)]
struct Provision {
    #[command(flatten)]
    key: ProvisionKeyArgs,
    /// The floor key's authorization of the provisioning key, if the key's file does not include it.
    #[arg(long, value_name = "FILE")]
    authorization: Option<PathBuf>,
    /// The public floor key; saved in CONFIG.
    #[arg(long, value_name = "FILE")]
    floor_pub: Option<PathBuf>,
    /// The product; saved in CONFIG.
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

/// Sign a version for all devices of a product (64 bytes, to stdout or a file).
#[derive(Debug, Args)]
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
    /// The output file [default: stdout].
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Authorize a provisioning key with the floor key: print a PEM block to append to its file.
#[derive(Debug, Args)]
struct Authorize {
    /// The public provisioning key.
    #[arg(long, value_name = "FILE")]
    provision_pub: PathBuf,
    /// The floor key (PEM, private).
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The product.
    #[arg(long, value_name = "UUID")]
    product: Uuid,
    /// The output file [default: stdout].
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Sign the output of `floor provision --nonce-out` with the provisioning key (64 bytes).
#[derive(Debug, Args)]
struct SignProvision {
    /// The file to sign; `-` is stdin.
    #[arg(long, value_name = "FILE")]
    nonce: PathBuf,
    /// The provisioning key (PEM, private).
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The output file [default: stdout].
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
    #[error("setup: the steps are on stdout; expected a file as --nonce-out, found `-`")]
    NonceOnStdout,
    #[error("{}: no signature of a provisioning key appeared within {waited} seconds", path.display())]
    NoSignature { path: PathBuf, waited: u64 },
}

impl Classified for UsageError {
    fn class(&self) -> Class {
        match self {
            UsageError::NoKey | UsageError::NonceOnStdout => Class::Input,
            // The TPM stays without a floor.
            UsageError::NoSignature { .. } => Class::Tpm,
        }
    }
}

/// Runs `mosfs floor`.
pub(super) fn run(args: &FloorCommand, global: &Global) -> Result<(), AnyError> {
    match &args.command {
        Command::Provision(args) => provision(args, global),
        Command::Show(args) => show(args, global),
        Command::Sign(args) => {
            let key = P256PrivateKey::read(&args.key)?;
            write_out(args.output.as_deref(), &floor::sign_version(&key, &args.product, args.version)?)
        }
        Command::Authorize(args) => {
            let key = P256PrivateKey::read(&args.key)?;
            let provision_key = P256PublicKey::read(&args.provision_pub)?;
            let authorization = signature::authorize(&key, &args.product, &provision_key)?;
            write_out(args.output.as_deref(), signature::authorization_block(&authorization).as_bytes())
        }
        Command::SignProvision(args) => {
            let key = P256PrivateKey::read(&args.key)?;
            let message = read_in(&args.nonce)?;
            write_out(args.output.as_deref(), &signature::sign_provision(&key, &message, &args.nonce)?)
        }
    }
}

fn provision(args: &Provision, global: &Global) -> Result<(), AnyError> {
    let floor_pub = args.floor_pub.as_deref().map(P256PublicKey::read).transpose()?;
    let mut config = ConfigPlan::new(&global.config);
    let (floor_key, product) = (config.floor_key(floor_pub)?, config.product(args.product)?);
    let policy = floor::policy_of(&global.config, floor_key, product);
    let (tcti, budget) = match args.floor.place(global) {
        FloorLocation::Tpm(tcti, budget) => (tcti, budget),
        FloorLocation::File(path) => {
            let floor = FileFloor::new(path, policy.ok());
            warn(&floor);
            config.apply()?;
            floor.provision()?;
            return output::line(format_args!("{} is provisioned: the floor is 0", floor.place()));
        }
    };
    let policy = policy?;
    let key = args.key.key(|_, _| {}).ok_or(UsageError::NoKey)?;
    let key = AuthorizedKey::new(&policy, key, args.authorization.as_deref())?;
    let mut floor = TpmFloor::new(policy, tcti, budget);
    let begun = floor.provision(&key.public, &key.authorization)?;
    // Recorded before the TPM's floor becomes final: a device must not have a floor and not know whose.
    config.apply()?;
    let signature = key.sign(&begun.message())?;
    begun.finish(&signature)?;
    let stands_at = floor.read()?;
    if args.key.nonce_out.as_deref() != Some(Path::new("-")) {
        output::line(format_args!("{} is provisioned: the floor is {stands_at}", floor.place()))?;
    }
    super::output::note(
        "the initramfs carries a copy of the configuration: make it again (update-initramfs -u, or dracut --force)",
    );
    Ok(())
}

fn show(args: &Show, global: &Global) -> Result<(), AnyError> {
    match args.floor.place(global) {
        FloorLocation::File(path) => {
            let mut floor = FileFloor::new(path, floor::find_policy(&global.config)?);
            warn(&floor);
            let version = floor.read()?;
            output::answer(
                global,
                || json!({"kind": "file", "place": floor.place(), "floor": version}),
                || format!("floor: {version} ({})", floor.place()),
            )
        }
        FloorLocation::Tpm(tcti, budget) => {
            let policy = floor::policy(&global.config)?;
            let name = policy.name_written();
            let product = policy.product();
            let mut floor = TpmFloor::new(policy, tcti.clone(), budget);
            let version = floor.read()?;
            let area = floor.area()?;
            output::answer(
                global,
                || {
                    json!({
                        "kind": "tpm",
                        "place": tcti.to_string(),
                        "product": product.to_string(),
                        "index": format!("{:#010x}", area.index),
                        "attributes": format!("{:#010x}", area.attributes),
                        "policy": hex(&area.policy),
                        "name": name.to_string(),
                        "floor": version,
                    })
                },
                || {
                    vec![
                        format!("floor: {version}"),
                        format!("place: {}", floor.place()),
                        format!("product: {product}"),
                        format!("attributes: {:#010x}", area.attributes),
                        format!("policy: {}", hex(&area.policy)),
                        format!("name: {name}"),
                    ]
                },
            )
        }
    }
}

/// Writes a signature or a nonce: to a file, whole or not at all, or to stdout.
fn write_out(path: Option<&Path>, bytes: &[u8]) -> Result<(), AnyError> {
    let Some(path) = path.filter(|path| *path != Path::new("-")) else {
        return output::binary(bytes);
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
    if path == Path::new("-") {
        return file::read_at_most(io::stdin().lock(), Path::new("stdin"), MAX_BYTES);
    }
    file::read_named(path, MAX_BYTES)
}

/// Waits until a file holds a signature that `check` accepts, and returns it.
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
            return Err(UsageError::NoSignature { path: path.to_path_buf(), waited: wait.as_secs() }.into());
        }
        thread::sleep(PAUSE);
    }
}

const _: () = assert!(PROVISION_MESSAGE_BYTES == 36, "the help text says so");
