//! Keys, certificates and signatures made by the real `openssl` command, right and wrong ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// The product of the device in tests.
pub const PRODUCT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";
/// Another product of the same publisher.
pub const OTHER_PRODUCT: &str = "00f6a9a4-3b6e-4a8c-9d0c-64b7a42c5f11";

/// Extensions of a CA.
pub const CA: &str = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n\
     subjectKeyIdentifier=hash\n";
/// Extensions of a signer.
pub const SIGNER: &str = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
     subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n";

/// What a `SystemManifest` of a product is in bytes, written by hand.
pub fn manifest_of(product: &str) -> String {
    let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    format!(
        r#"{{"mediatype":"application/vnd.mos.system.manifest.v1","product":"{product}","targets":{{"hostfs":{{"digest":"sha256:{digest}","network":{{"type":"host"}},"service_type":"hostfs","size":3993,"version":"0.0.1"}}}},"version":200}}"#
    )
}

/// The subject of a signer.
pub fn signer_of(product: &str) -> String {
    format!("/CN=manifest default:{product}")
}

/// A folder with keys (`NAME.key`), certificates (`NAME.pem`) and signatures.
pub struct Pki {
    pub dir: TempDir,
}

impl Pki {
    /// An empty folder.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let database = "[req]\ndistinguished_name=dn\n[dn]\n[ca]\ndefault_ca=any\n[any]\ndatabase=index.txt\nserial=serial\n\
             new_certs_dir=.\npolicy=policy\ndefault_md=sha256\nunique_subject=no\n[policy]\ncommonName=supplied\n";
        fs::write(dir.path().join("openssl.cnf"), database).unwrap();
        fs::write(dir.path().join("index.txt"), "").unwrap();
        fs::write(dir.path().join("serial"), "01\n").unwrap();
        Self { dir }
    }

    /// The path of a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The content of a file.
    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Writes a file.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Runs `openssl` in the folder; its words are split at spaces, unless they come apart already.
    pub fn openssl(&self, words: &[&str]) -> Output {
        let output = Command::new("openssl").args(words).current_dir(self.dir.path()).output();
        let output = output.expect("the openssl command is needed (Debian package openssl)");
        assert!(output.status.success(), "openssl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    /// Makes `NAME.key`: `ec:CURVE`, `rsa:BITS`, or the name of another algorithm.
    pub fn key(&self, name: &str, kind: &str) -> &Self {
        let out = format!("{name}.key");
        let (algorithm, option) = match kind.split_once(':') {
            Some(("ec", curve)) => ("EC", Some(format!("ec_paramgen_curve:{curve}"))),
            Some(("rsa", bits)) => ("RSA", Some(format!("rsa_keygen_bits:{bits}"))),
            _ => (kind, None),
        };
        let mut words = vec!["genpkey", "-algorithm", algorithm, "-out", &out];
        words.extend(option.iter().flat_map(|option| ["-pkeyopt", option.as_str()]));
        self.openssl(&words);
        self
    }

    /// Makes `NAME.key` on P-256 and `NAME.pem`, which issues itself.
    pub fn root(&self, name: &str, subject: &str, extensions: &str) -> &Self {
        self.key(name, "ec:P-256");
        let (key, pem, ext) = (format!("{name}.key"), format!("{name}.pem"), format!("{name}.ext"));
        self.write(&ext, extensions);
        let request = self.request(name, subject);
        self.openssl(&[
            "x509", "-req", "-in", &request, "-signkey", &key, "-days", "365", "-extfile", &ext, "-out", &pem,
        ]);
        self
    }

    fn request(&self, name: &str, subject: &str) -> String {
        let (key, csr) = (format!("{name}.key"), format!("{name}.csr"));
        self.openssl(&[
            "req",
            "-new",
            "-key",
            &key,
            "-subj",
            subject,
            "-config",
            "openssl.cnf",
            "-out",
            &csr,
        ]);
        csr
    }

    /// Makes `NAME.pem` of `NAME.key`, issued by `ISSUER`, with more words for `openssl x509`.
    pub fn issue(&self, name: &str, subject: &str, issuer: &str, extensions: &str, more: &[&str]) -> &Self {
        let request = self.request(name, subject);
        let (pem, ext) = (format!("{name}.pem"), format!("{name}.ext"));
        let (ca, ca_key) = (format!("{issuer}.pem"), format!("{issuer}.key"));
        self.write(&ext, extensions);
        let words = [
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            "365",
            "-extfile",
            &ext,
            "-out",
            &pem,
        ];
        self.openssl(&[&words, more].concat());
        self
    }

    /// A signer of the device's product: key and certificate, as they should be.
    pub fn signer(&self, name: &str, kind: &str, issuer: &str) -> &Self {
        self.key(name, kind).issue(name, &signer_of(PRODUCT), issuer, SIGNER, &[])
    }

    /// The same, valid between two times (`YYYYMMDDHHMMSSZ`).
    pub fn dated_signer(&self, name: &str, issuer: &str, from: &str, until: &str) -> &Self {
        self.key(name, "ec:P-256");
        let request = self.request(name, &signer_of(PRODUCT));
        let (pem, ext) = (format!("{name}.pem"), format!("{name}.ext"));
        let (ca, ca_key) = (format!("{issuer}.pem"), format!("{issuer}.key"));
        self.write(&ext, SIGNER);
        self.openssl(&[
            "ca",
            "-batch",
            "-notext",
            "-rand_serial",
            "-config",
            "openssl.cnf",
            "-in",
            &request,
            "-cert",
            &ca,
            "-keyfile",
            &ca_key,
            "-startdate",
            from,
            "-enddate",
            until,
            "-extfile",
            &ext,
            "-out",
            &pem,
        ]);
        self
    }

    /// Revokes `NAME.pem`, which `ISSUER` issued.
    pub fn revoke(&self, name: &str, issuer: &str) -> &Self {
        let (pem, ca, key) = (format!("{name}.pem"), format!("{issuer}.pem"), format!("{issuer}.key"));
        self.openssl(&["ca", "-config", "openssl.cnf", "-cert", &ca, "-keyfile", &key, "-revoke", &pem]);
        self
    }

    /// Makes the issuer's list of what it has revoked.
    pub fn crl(&self, issuer: &str, out: &str) -> &Self {
        self.make_crl(issuer, out, &["-crldays", "30"])
    }

    /// The same, of a time and to be renewed at another (`YYYYMMDDHHMMSSZ`).
    pub fn dated_crl(&self, issuer: &str, out: &str, [from, until]: [&str; 2]) -> &Self {
        self.make_crl(issuer, out, &["-crl_lastupdate", from, "-crl_nextupdate", until])
    }

    fn make_crl(&self, issuer: &str, out: &str, more: &[&str]) -> &Self {
        let (ca, key) = (format!("{issuer}.pem"), format!("{issuer}.key"));
        let words = ["ca", "-config", "openssl.cnf", "-cert", &ca, "-keyfile", &key, "-gencrl", "-out", out];
        self.openssl(&[&words, more].concat());
        self
    }

    /// Signs FILE with NAME.key, to `SIG`, with more words for `openssl dgst`.
    pub fn sign_with(&self, name: &str, file: &str, sig: &str, more: &[&str]) -> &Self {
        let key = format!("{name}.key");
        self.openssl(&[&["dgst"], more, &["-sign", &key, "-out", sig, file]].concat());
        self
    }

    /// Signs `m.json` with NAME.key as the design says, to `NAME.sig`.
    pub fn sign(&self, name: &str) -> &Self {
        self.sign_with(name, "m.json", &format!("{name}.sig"), &["-sha256"])
    }

    /// A CA `ca`, and the device's manifest `m.json`.
    pub fn with_ca() -> Self {
        let pki = Self::new();
        pki.root("ca", "/CN=Manifest CA", CA);
        pki.write("m.json", manifest_of(PRODUCT));
        pki
    }
}

/// Runs `mosfs` with an empty environment of its own variables.
pub fn mosfs(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
    command.env_remove("MOSFS_CONFIG").env_remove("MOSFS_SYSTEM").env_remove("MOSFS_FAILPOINT");
    words.iter().for_each(|word| {
        command.arg(word.as_ref());
    });
    command.output().unwrap()
}

/// The mode of a file, less its type.
pub fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().mode() & 0o7777
}
