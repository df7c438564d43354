//! `mosfs floor` as a person and a script use it: two halves, exit codes, what is recorded.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Instant;

use mosfs::internals::digest::{Digest, hex};
use mosfs::internals::floor::check_signature;
use mosfs::internals::floor::digests::INDEX;
use mosfs::internals::floor::signature::authorization_block;
use tempfile::TempDir;

use crate::common::swtpm::{run_tool, write_private};
use crate::*;

/// A folder with keys, CONFIG and SYSTEM.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        let block = authorization_block(&authorization());
        write_private(&bench.path("floor.key"), FLOOR_KEY.as_bytes());
        write_private(&bench.path("provision.key"), format!("{PROVISION_KEY}{block}").as_bytes());
        fs::write(bench.path("floor.pub"), floor_key().public().to_pem().unwrap()).unwrap();
        let public = String::from_utf8(provision_key().public().to_pem().unwrap()).unwrap();
        fs::write(bench.path("provision.pub"), public + &block).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `mosfs floor`, in the folder, so that arguments can name its files.
    fn command(&self, swtpm: Option<&Swtpm>, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosfs"));
        command
            .current_dir(self.dir.path())
            .env("MOSFS_CONFIG", self.path("config"))
            .env("MOSFS_SYSTEM", self.path("system"))
            .env_remove("TSS2_LOG")
            .arg("floor")
            .args(arguments);
        if let Some(swtpm) = swtpm {
            command.args(["--tpm", &swtpm.tcti_text()]);
        }
        command
    }

    fn run(&self, swtpm: Option<&Swtpm>, arguments: &[&str]) -> Output {
        self.command(swtpm, arguments).stdin(Stdio::null()).output().unwrap()
    }

    fn ok(&self, swtpm: Option<&Swtpm>, arguments: &[&str]) -> String {
        let output = self.run(swtpm, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Fails with this code, and says this; gives all that it says.
    fn fails(&self, swtpm: Option<&Swtpm>, arguments: &[&str], code: i32, says: &str) -> String {
        let output = self.run(swtpm, arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(says), "{arguments:?}: `{says}` is not in: {errors}");
        errors
    }
}

const PRODUCT_TEXT: &str = "de6c82c5-2e01-4c92-949b-a6545d30fc06";
const AT_HAND: [&str; 7] =
    ["provision", "--provision-key", "provision.key", "--floor-pub", "floor.pub", "--product", PRODUCT_TEXT];
const TWO_HALVES: [&str; 11] = [
    "provision",
    "--provision-pub",
    "provision.pub",
    "--floor-pub",
    "floor.pub",
    "--product",
    PRODUCT_TEXT,
    "--nonce-out",
    "nonce",
    "--signature-in",
    "signature",
];

fn wait_for(path: &Path) {
    let end = Instant::now() + BUDGET;
    while !path.exists() {
        assert!(Instant::now() < end, "{} does not appear", path.display());
        thread::sleep(Duration::from_millis(5));
    }
}

fn succeeded(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_keys_that_mosfs_makes_provision_a_device() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    let made = Command::new(env!("CARGO_BIN_EXE_mosfs"))
        .args(["keys", "generate", "made", "--product", PRODUCT_TEXT])
        .current_dir(bench.dir.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    bench.ok(
        Some(&swtpm),
        &[
            "provision",
            "--provision-key",
            "made/provision.key",
            "--floor-pub",
            "made/floor.pub",
            "--product",
            PRODUCT_TEXT,
        ],
    );
    let shown = bench.ok(Some(&swtpm), &["show"]);
    assert!(shown.starts_with("floor: 0\n"), "{shown}");
    // openssl still reads the files that hold the authorization.
    for arguments in
        [["pkey", "-in", "made/provision.key"].as_slice(), &["pkey", "-pubin", "-in", "made/provision.pub"]]
    {
        let output =
            run_tool(Command::new("openssl").args(arguments).current_dir(bench.dir.path()), "openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn provision_records_in_config_what_it_was_given_and_refuses_another() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    bench.ok(Some(&swtpm), &AT_HAND);
    assert_eq!(fs::read(bench.path("config/floor.pub")).unwrap(), floor_key().public().to_pem().unwrap());
    assert_eq!(fs::read_to_string(bench.path("config/product")).unwrap(), format!("{PRODUCT_TEXT}\n"));
    // From now on they need not be given.
    bench.ok(Some(&swtpm), &["show"]);
    bench.fails(Some(&swtpm), &["provision", "--provision-key", "provision.key"], 5, "has its floor already");
    fs::write(bench.path("other.pub"), new_key().public().to_pem().unwrap()).unwrap();
    let errors = bench.fails(
        Some(&swtpm),
        &["provision", "--provision-key", "provision.key", "--floor-pub", "other.pub"],
        3,
        "this device has another floor key",
    );
    for key in ["config/floor.pub", "other.pub"] {
        let arguments = ["pkey", "-pubin", "-in", key, "-outform", "DER"];
        let der =
            run_tool(Command::new("openssl").args(arguments).current_dir(bench.dir.path()), "openssl").stdout;
        let digest = Digest::of(&der).to_string();
        assert!(errors.contains(&digest), "{key} is not named as {digest}: {errors}");
    }
    assert_eq!(fs::read(bench.path("config/floor.pub")).unwrap(), floor_key().public().to_pem().unwrap());
    bench.fails(
        Some(&swtpm),
        &["provision", "--provision-key", "provision.key", "--product", &OTHER_PRODUCT.to_string()],
        3,
        "this device is product",
    );
    assert_eq!(fs::read_to_string(bench.path("config/product")).unwrap(), format!("{PRODUCT_TEXT}\n"));
}

#[test]
fn provisioning_works_in_two_halves_over_files() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    let child = bench
        .command(Some(&swtpm), &TWO_HALVES)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(&bench.path("nonce"));
    assert_eq!(fs::read(bench.path("nonce")).unwrap().len(), 36);
    // Where the provisioning key lives. It never was on the device.
    bench
        .ok(None, &["sign-provision", "--nonce", "nonce", "--key", "provision.key", "--output", "signature"]);
    succeeded(child);
    assert_eq!(second_opinion(&swtpm), 0);
    // The nonce has served.
    let errors = bench.fails(Some(&swtpm), &TWO_HALVES, 5, "has its floor already");
    assert!(errors.contains("hint: "), "{errors}");
}

#[test]
fn provisioning_takes_the_signature_that_openssl_makes() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    let child = bench
        .command(Some(&swtpm), &TWO_HALVES)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(&bench.path("nonce"));
    let output = run_tool(
        Command::new("openssl")
            .args(["dgst", "-sha256", "-sign", "provision.key", "-out", "signature", "nonce"])
            .current_dir(bench.dir.path()),
        "openssl",
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    succeeded(child);
    assert_eq!(second_opinion(&swtpm), 0);
}

#[test]
fn provisioning_works_in_two_halves_over_stdin_and_stdout() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    let mut arguments = TWO_HALVES;
    (arguments[8], arguments[10]) = ("-", "-");
    let mut device = bench
        .command(Some(&swtpm), &arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut nonce = [0; 36];
    device.stdout.as_mut().unwrap().read_exact(&mut nonce).unwrap();
    let mut publisher = bench
        .command(None, &["sign-provision", "--nonce", "-", "--key", "provision.key"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    publisher.stdin.take().unwrap().write_all(&nonce).unwrap();
    let signature = publisher.wait_with_output().unwrap().stdout;
    assert_eq!(signature.len(), 64);
    device.stdin.take().unwrap().write_all(&signature).unwrap();
    let output = device.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.is_empty(), "stdout carries the nonce alone");
    assert_eq!(second_opinion(&swtpm), 0);
}

#[test]
fn an_old_signature_does_not_provision_and_leaves_no_index() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    fs::write(bench.path("nonce.old"), [[7; 32].as_slice(), &[0; 4]].concat()).unwrap();
    bench.ok(None, &["sign-provision", "--nonce", "nonce.old", "--key", "provision.key", "-o", "signature"]);
    bench.fails(Some(&swtpm), &TWO_HALVES, 5, "not the provisioning key's over the nonce of this session");
    assert_eq!(swtpm.handles("handles-nv-index"), [""; 0]);
    assert_nothing_left(&swtpm);
    fs::remove_file(bench.path("signature")).unwrap();
    let arguments = [TWO_HALVES.as_slice(), &["--wait", "0"]].concat();
    bench.fails(Some(&swtpm), &arguments, 5, "no signature of a provisioning key appeared");
    assert_eq!(swtpm.handles("handles-nv-index"), [""; 0]);
}

#[test]
fn a_provisioning_key_that_the_floor_key_did_not_authorize_is_refused() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    write_private(&bench.path("provision.key"), PROVISION_KEY.as_bytes());
    bench.fails(Some(&swtpm), &AT_HAND, 2, "found none");
    // For another product.
    bench.ok(
        None,
        &[
            "authorize",
            "--provision-pub",
            "provision.pub",
            "--key",
            "floor.key",
            "--product",
            &OTHER_PRODUCT.to_string(),
            "-o",
            "block",
        ],
    );
    let arguments = [AT_HAND.as_slice(), &["--authorization", "block"]].concat();
    bench.fails(Some(&swtpm), &arguments, 2, "found 1 for another key or product");
    assert_eq!(swtpm.handles("handles-nv-index"), [""; 0]);
    bench.ok(
        None,
        &[
            "authorize",
            "--provision-pub",
            "provision.pub",
            "--key",
            "floor.key",
            "--product",
            PRODUCT_TEXT,
            "-o",
            "block",
        ],
    );
    bench.ok(Some(&swtpm), &arguments);
}

#[test]
fn the_provisioning_key_signs_nothing_but_a_nonce() {
    let bench = Bench::new();
    for content in [vec![], vec![0; 35], vec![0; 37], vec![1; 36], b"a manifest".to_vec()] {
        fs::write(bench.path("nonce"), &content).unwrap();
        bench.fails(
            None,
            &["sign-provision", "--nonce", "nonce", "--key", "provision.key"],
            2,
            "expected a nonce",
        );
    }
}

#[test]
fn floor_sign_gives_64_bytes_for_one_version_and_product() {
    let bench = Bench::new();
    bench.ok(
        None,
        &[
            "sign",
            "--version",
            "20261123",
            "--key",
            "floor.key",
            "--product",
            PRODUCT_TEXT,
            "--output",
            "floor.sig",
        ],
    );
    let signature = fs::read(bench.path("floor.sig")).unwrap();
    assert_eq!(signature.len(), 64);
    check_signature(&policy(), 20_261_123, &signature).unwrap();
    check_signature(&policy(), 200, &signature).unwrap_err();
    let output =
        bench.run(None, &["sign", "--version", "200", "--key", "floor.key", "--product", PRODUCT_TEXT]);
    check_signature(&policy(), 200, &output.stdout).expect("the same to stdout");
    for version in ["0", "9007199254740992", "18446744073709551615"] {
        bench.fails(
            None,
            &["sign", "--version", version, "--key", "floor.key", "--product", PRODUCT_TEXT],
            2,
            "expected 1 to 9007199254740991",
        );
    }
    bench.fails(None, &["sign", "--version", "-1", "--key", "floor.key", "--product", PRODUCT_TEXT], 2, "");
    bench.fails(
        None,
        &["sign", "--version", "1", "--key", "floor.pub", "--product", PRODUCT_TEXT],
        2,
        "floor.pub",
    );
}

#[test]
fn private_keys_that_others_can_read_are_refused_by_each_command() {
    use std::os::unix::fs::PermissionsExt;
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    for key in ["floor.key", "provision.key"] {
        fs::set_permissions(bench.path(key), fs::Permissions::from_mode(0o644)).unwrap();
    }
    fs::write(bench.path("nonce"), [0; 36]).unwrap();
    for arguments in [AT_HAND.as_slice(), &["sign-provision", "--nonce", "nonce", "--key", "provision.key"]] {
        bench.fails(
            Some(&swtpm).filter(|_| arguments[0] == "provision"),
            arguments,
            2,
            "provision.key has mode 0644",
        );
    }
    for arguments in [
        ["sign", "--version", "1", "--key", "floor.key", "--product", PRODUCT_TEXT].as_slice(),
        &["authorize", "--provision-pub", "provision.pub", "--key", "floor.key", "--product", PRODUCT_TEXT],
    ] {
        bench.fails(None, arguments, 2, "floor.key has mode 0644");
    }
    assert_eq!(swtpm.handles("handles-nv-index"), [""; 0]);
}

#[test]
fn show_tells_what_tpm2_tools_tell() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    bench.ok(Some(&swtpm), &AT_HAND);
    floor(&swtpm).raise(20_261_123, &signed(20_261_123)).unwrap();
    let shown: serde_json::Value =
        serde_json::from_str(&bench.ok(Some(&swtpm), &["show", "--json"])).unwrap();
    assert_eq!(shown["kind"], "tpm");
    assert_eq!(shown["floor"], 20_261_123);
    assert_eq!(shown["index"], format!("{INDEX:#010x}"));
    assert_eq!(shown["product"], PRODUCT_TEXT);
    assert_eq!(shown["policy"], hex(policy().auth_policy()));
    let public = String::from_utf8(swtpm.tool_ok("tpm2_nvreadpublic", &["0x01500050"])).unwrap();
    assert!(public.contains(shown["name"].as_str().unwrap()), "{public}");
    assert!(public.contains("value: 0x22060008") && shown["attributes"] == "0x22060008");
    assert_eq!(second_opinion(&swtpm), 20_261_123);
}

#[test]
fn exit_codes_and_advice_tell_the_failures_apart() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    let config = bench.path("config");
    fs::create_dir(&config).unwrap();
    let errors = bench.fails(Some(&swtpm), &["show"], 5, "this device has no floor key");
    assert!(errors.contains("hint: "), "{errors}");
    fs::copy(bench.path("floor.pub"), config.join("floor.pub")).unwrap();
    bench.fails(Some(&swtpm), &["show"], 5, "this device has no product");
    fs::write(config.join("product"), "no uuid\n").unwrap();
    bench.fails(Some(&swtpm), &["show"], 2, "no uuid");
    fs::write(config.join("product"), format!("{PRODUCT_TEXT}\n")).unwrap();
    let errors = bench.fails(Some(&swtpm), &["show"], 5, "NV index 0x01500050 does not exist");
    assert!(errors.contains("hint: "), "{errors}");
    // One line of what and why, then advice; nothing of tpm2-tss' own.
    assert_eq!(errors.lines().count(), 2, "{errors}");
    swtpm.tool_ok("tpm2_nvdefine", &["0x01500050", "-C", "o", "-s", "8", "-a", "authwrite|authread"]);
    bench.fails(Some(&swtpm), &["show"], 5, "is not this product's floor");
    bench.fails(
        Some(&swtpm),
        &["provision", "--provision-key", "provision.key"],
        5,
        "is not this product's floor",
    );
    bench.fails(
        None,
        &["show", "--tpm", "device:/dev/no-such-tpm"],
        5,
        "no TPM answers at device:/dev/no-such-tpm",
    );
    bench.fails(None, &["show", "--tpm", "carrier-pigeon:"], 2, "does not say how to reach a TPM");
    // A second client of the simulator, with little patience.
    let _other = std::net::TcpStream::connect(("127.0.0.1", swtpm.port())).unwrap();
    bench.fails(Some(&swtpm), &["show", "--tpm-timeout", "1"], 5, "did not find an NV index within 1s");
}

#[test]
fn the_development_floor_warns_each_time() {
    let bench = Bench::new();
    let warning = "it protects nothing against whoever can write the disk";
    for arguments in [
        ["provision", "--floor", "file"].as_slice(),
        &["show", "--floor", "file"],
        &["show", "--floor", "file", "--json"],
    ] {
        let output = bench.run(None, arguments);
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains(warning));
    }
    assert_eq!(fs::read_to_string(bench.path("system/floor")).unwrap(), "0\n");
    bench.fails(None, &["provision", "--floor", "file"], 5, "has its floor already");
    fs::write(bench.path("system/floor"), "garbage\n").unwrap();
    bench.fails(None, &["show", "--floor", "file"], 5, "garbage");
}

#[test]
fn a_crash_at_each_step_of_provisioning_can_be_run_again() {
    for failpoint in
        ["floor.index.defined", "config.floor.linked", "config.product.linked", "floor.index.provisioned"]
    {
        let (bench, swtpm) = (Bench::new(), Swtpm::start());
        let crashed =
            bench.command(Some(&swtpm), &AT_HAND).env("MOSFS_FAILPOINT", failpoint).output().unwrap();
        assert!(!crashed.status.success(), "{failpoint} was not passed");
        // What the killed process left in a TPM that has no resource manager.
        swtpm.tool_ok("tpm2_flushcontext", &["-l"]);
        swtpm.tool_ok("tpm2_flushcontext", &["-t"]);
        if failpoint == "floor.index.provisioned" {
            // It was done; only saying so was cut off.
            bench.fails(Some(&swtpm), &AT_HAND, 5, "has its floor already");
        } else {
            bench.ok(Some(&swtpm), &AT_HAND);
        }
        assert!(bench.ok(Some(&swtpm), &["show"]).starts_with("floor: 0\n"));
        assert_eq!(fs::read_to_string(bench.path("config/product")).unwrap(), format!("{PRODUCT_TEXT}\n"));
        assert_eq!(fs::read(bench.path("config/floor.pub")).unwrap(), floor_key().public().to_pem().unwrap());
    }
}

#[test]
fn nothing_secret_is_said() {
    let (bench, swtpm) = (Bench::new(), Swtpm::start());
    let secret: Vec<&str> =
        [FLOOR_KEY, PROVISION_KEY].iter().flat_map(|key| key.lines().skip(1).take(3)).collect();
    for arguments in [
        [AT_HAND.as_slice(), &["-vv"]].concat(),
        vec!["show", "-vv"],
        vec!["sign", "--version", "1", "--key", "floor.key", "--product", PRODUCT_TEXT, "-o", "sig", "-vv"],
    ] {
        let swtpm = (arguments[0] != "sign").then_some(&swtpm);
        let output = bench
            .command(swtpm, &arguments)
            .env("TSS2_LOG", "all+trace")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success());
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        for secret in &secret {
            assert!(!said.contains(secret));
        }
    }
}
