//! `mosfs keys`: keys for development.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{Global, output};
use crate::error::AnyError;
use crate::publish::keys;

/// Make keys for development.
#[derive(Debug, Args)]
pub(super) struct Keys {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a manifest CA, a signer, a floor key and a provisioning key; never overwrite a file.
    Generate(Generate),
}

#[derive(Debug, Args)]
struct Generate {
    /// The folder to write them to.
    dir: PathBuf,
    /// The product that the signer signs for.
    #[arg(long, value_name = "UUID", value_parser = output::uuid)]
    product: Uuid,
    /// The product's name in the signer's certificate.
    #[arg(long, default_value = "default")]
    name: String,
    /// Make the signer's key RSA instead of ECDSA P-256.
    #[arg(long)]
    rsa: bool,
}

/// Runs `mosfs keys`.
pub(super) fn run(args: &Keys, global: &Global) -> Result<(), AnyError> {
    let Command::Generate(args) = &args.command;
    let request = keys::Request { product: args.product, name: args.name.clone(), rsa_signer: args.rsa };
    let files = keys::generate(&args.dir, &request)?;
    if global.json {
        let files: Vec<_> = files.iter().map(|file| file.to_string_lossy()).collect();
        return output::json(&serde_json::json!({ "files": files }));
    }
    files.iter().try_for_each(|file| output::line(file.display()))
}
