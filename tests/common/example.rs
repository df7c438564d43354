// A system for the examples in the documentation of the crate, which include this file. It is published with the
// crate's public names alone, so it shows what a publisher's program needs.

/// A signed system with one target, `web`, and a device that trusts its publisher. All of it goes with `folder`.
#[allow(dead_code)]
struct Example {
    folder: tempfile::TempDir,
    /// The store that holds the system.
    store: mosfs::Store,
    /// What the device trusts: the CA and the product.
    config: std::path::PathBuf,
    /// Keys and certificates: `ca.pem`, `signer.pem`, `signer.key` and others.
    keys: std::path::PathBuf,
    product: mosfs::Uuid,
}

#[allow(dead_code)]
impl Example {
    const FILE: &str = "usr/lib/os-release";
    const TEXT: &[u8] = b"NAME=example\n";

    fn publish() -> Result<Self, Box<dyn std::error::Error>> {
        use std::fs;

        use mosfs::*;

        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        let product: Uuid = "de6c82c5-2e01-4c92-949b-a6545d30fc06".parse()?;
        let keys = path("keys");
        generate_keys(&keys, &KeyRequest { product, name: "example".into(), rsa_signer: false })?;

        let images = Store::create(&path("images"))?;
        Self::put_image(&images, "web")?;
        let yaml = format!(
            "version: 7\nproduct: {product}\ntargets:\n  web:\n    url: oci:{}:web\n    version: 1.2.0\n    \
             service_type: container\n    network: {{type: host}}\n",
            images.dir().display()
        );
        let import = ImportManifest::parse("import.yaml".as_ref(), yaml.as_bytes())?;
        let store = Store::create(&path("store"))?;
        let signer = Signer {
            key: &SigningKey::load(&keys.join("signer.key"))?,
            certificate: &fs::read(keys.join("signer.pem"))?,
            dates: Dates::check_now(),
            floor_keys: &[],
        };
        let effort = Effort { threads: std::num::NonZeroUsize::MIN, packing: Packing::default() };
        let sources = BuildSources { access: &Access::default(), platform: &Platform::this_machine(), boot: None };
        build(&import, &store, &signer, effort, &sources, &Progress::silent())?;

        let config = path("config");
        fs::create_dir(&config)?;
        fs::copy(keys.join("ca.pem"), config.join("manifestCA.pem"))?;
        fs::write(config.join("product"), format!("{product}\n"))?;
        Ok(Self { folder, store, config, keys, product })
    }

    /// Puts an image with one tar layer into a layout.
    fn put_image(layout: &mosfs::Store, name: &str) -> Result<(), Box<dyn std::error::Error>> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(Self::TEXT.len() as u64);
        tar.append_data(&mut header, Self::FILE, Self::TEXT)?;
        let tar = tar.into_inner()?;

        let writer = layout.writer()?;
        let layer = writer.put_bytes("application/vnd.oci.image.layer.v1.tar", &tar)?;
        let platform = mosfs::Platform::this_machine();
        let config = format!(
            r#"{{"architecture":"{}","os":"{}","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            platform.architecture, platform.os, layer.digest
        );
        let config = writer.put_bytes("application/vnd.oci.image.config.v1+json", config.as_bytes())?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = mosfs::OciManifest {
            schema_version: 2,
            media_type: Some(media_type.into()),
            artifact_type: None,
            config,
            layers: vec![layer],
            subject: None,
            annotations: Default::default(),
            extra: Default::default(),
        };
        let manifest = writer.put_bytes(media_type, &manifest.to_bytes())?;
        writer.set_name(name, &manifest)?;
        Ok(())
    }
}
