//! A publisher with keys, OCI images of tar layers that umoci makes, and a store. The tests of a format add what is its own.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use mosfs::internals::image::oci::OciImage;
use mosfs::internals::store::Store;
use tempfile::TempDir;

use crate::publish::{PRODUCT, Publisher};
use crate::tarball::Tarball;
use crate::tools::{need_root, sh};

/// A publisher with keys, images that umoci makes, and a store.
pub struct Fixture {
    pub dir: TempDir,
    pub publisher: Publisher,
}

impl Fixture {
    pub fn new() -> Self {
        need_root();
        let dir = TempDir::new().unwrap();
        let publisher = Publisher::new(dir.path());
        sh(dir.path(), "umoci init --layout images");
        Self { dir, publisher }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an image of layers, the bottom one first.
    pub fn image_of_layers(&self, name: &str, layers: &[Tarball]) {
        sh(self.dir.path(), &format!("umoci new --image images:{name}"));
        for tar in layers {
            fs::write(self.path("layer.tar"), tar.end()).unwrap();
            sh(self.dir.path(), &format!("umoci raw add-layer --image images:{name} layer.tar"));
        }
    }

    /// Writes the import manifest: lines below the product, and of each target its name, service type, image and more lines.
    pub fn import(&self, version: u64, head: &str, targets: &[(&str, &str, &str, &str)]) {
        let mut text = format!("version: {version}\nproduct: {PRODUCT}\n{head}targets:\n");
        for (name, service, image, more) in targets {
            text += &format!(
                "  {name}:\n    url: \"oci:images:{image}\"\n    version: 1.0.0\n    service_type: {service}\n    \
                 network: {{type: host}}\n{more}"
            );
        }
        fs::write(self.path("import.yaml"), text).unwrap();
    }

    /// `mosfs build` of the import manifest into a store.
    pub fn build_into(&self, store: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        command.current_dir(self.dir.path()).args(["build", "import.yaml", "--store", store]);
        command.args(["--key", "keys/signer.key", "--cert", "keys/signer.pem"]);
        command.args(["--floor-key", "keys/floor.key"]);
        command
    }

    /// The image of a target, of which there is one, in a store.
    pub fn image_in(&self, store: &str, target: &str) -> OciImage {
        let store = Store::open(&self.path(store)).unwrap();
        let prefix = format!("mos/images/{target}:");
        let names = store.names().unwrap();
        let (_, found) = names.iter().find(|(name, _)| name.starts_with(&prefix)).unwrap();
        store.image(&found.digest).unwrap()
    }
}
