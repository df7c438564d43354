//! What reaches stdout and stderr: nothing that a terminal would obey, no panic where they are closed, full
//! or gone, and modes that do not depend on the umask.

#[path = "deploy/device.rs"]
#[allow(dead_code, reason = "the tests of deployments use the rest")]
mod device;
#[path = "common/publish.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod publish;
#[path = "common/swtpm.rs"]
#[allow(dead_code, reason = "the floor's own tests use the rest")]
mod swtpm;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use device::{Device, text};
use publish::Publisher;
use tempfile::TempDir;

fn installed() -> (TempDir, Publisher, Device) {
    let dir = tempfile::tempdir().unwrap();
    let publisher = Publisher::new(dir.path());
    publisher.publish(200, "host");
    let device = Device::with_file_floor();
    device.install(&publisher, 200);
    (dir, publisher, device)
}

/// The commands that print an answer.
fn commands(publisher: &Publisher) -> Vec<Vec<String>> {
    let source = publisher.source_of(200);
    let words = |text: &str| text.split(' ').map(str::to_string).collect::<Vec<_>>();
    let mut all = vec![
        words("status"),
        words("status --json"),
        words("verify"),
        words("gc --dry-run"),
        words("floor show"),
        words("floor show --json"),
        words("commit"),
        words(&format!("update --check {source}")),
        words(&format!("manifest show {source}")),
        words("generate completions bash"),
        words("--help"),
        words("--version"),
        words("status --help"),
    ];
    let key = publisher.key("floor.key").display().to_string();
    // Behind a global option, so that the device's floor is not named: signing takes none.
    all.push(words(&format!("--json floor sign --version 7 --product {} --key {key}", publish::PRODUCT)));
    all
}

fn as_words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

#[test]
fn a_full_disk_for_the_answer_is_a_failure_that_is_said() {
    let (_dir, publisher, device) = installed();
    for words in commands(&publisher) {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = device.command(&as_words(&words)).stdout(full).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(said.contains("cannot write stdout: No space left on device"), "{words:?}: {said}");
        assert!(!said.contains("panicked"), "{words:?}: {said}");
    }
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let (_dir, publisher, device) = installed();
    for words in commands(&publisher) {
        // A pipe whose other end is closed already.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = device.command(&as_words(&words)).stdout(writer).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{words:?}: {said}");
        assert!(!said.contains("panicked") && !said.contains("Broken pipe"), "{words:?}: {said}");
    }
}

#[test]
fn a_stderr_that_cannot_be_written_changes_no_exit_code() {
    let (_dir, publisher, device) = installed();
    let wrong = ["mount".to_string(), "no-such-target".into(), "/nowhere".into()];
    let usage = ["status".to_string(), "--no-such-option".into()];
    for (words, code) in commands(&publisher)
        .into_iter()
        .map(|words| (words, 0))
        .chain([(wrong.to_vec(), 2), (usage.to_vec(), 2)])
    {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = device.command(&as_words(&words)).stderr(full).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = device.command(&as_words(&words)).stderr(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}");
    }
}

#[test]
fn descriptors_that_are_closed_at_the_start_are_no_file_of_ours() {
    let (dir, publisher, device) = installed();
    publisher.publish(201, "next");
    for closed in ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"] {
        let _ = fs::remove_dir_all(device.system());
        device.install(&publisher, 200);
        let source = publisher.source_of(201);
        let mosfs = env!("CARGO_BIN_EXE_mosfs");
        let script = format!("exec {mosfs} update '{source}' --floor file {closed}");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).env("MOSFS_SYSTEM", device.system()).env("MOSFS_CONFIG", device.config());
        let output = shell.env("MOSFS_RUN", dir.path().join("run")).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{closed}: {}", text(&output.stderr));
        assert_eq!(device.state().pending.unwrap().deployment.version, 201, "{closed}");
        // No line of the answer lies in a blob, an index or the state.
        device.ok(&["verify"]);
    }
}

/// Characters that a terminal obeys, or that forge or hide text.
fn is_obeyed(c: char) -> bool {
    c != '\n' && c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200b}')
}

/// What others may have written, as a part of a path.
const EVIL: &str = "a\u{1b}[2J\u{1b}]0;x\u{7}\nmosfs: all is well\r\u{9b}2J\u{202e}gnp\u{200b}\u{7f}";

fn is_plain(output: &Output, words: &[&str]) {
    for bytes in [&output.stdout, &output.stderr] {
        let said = String::from_utf8(bytes.clone()).unwrap();
        assert!(!said.chars().any(is_obeyed), "{words:?}: {said:?}");
        assert!(!said.lines().any(|line| line == "mosfs: all is well"), "{words:?}: {said:?}");
    }
}

#[test]
fn text_of_others_is_escaped_on_its_way_to_a_terminal() {
    let (dir, publisher, device) = installed();
    let evil = dir.path().join(EVIL);
    fs::create_dir(&evil).unwrap();
    let path = |name: &str| evil.join(name).display().to_string();
    fs::write(evil.join("m.yaml"), format!("version: 1\n\"x{}\": 1\n", EVIL.escape_debug())).unwrap();
    fs::write(evil.join("m.json"), "{\"a\":1}").unwrap();
    let source = format!("oci:{}", evil.display());
    for words in [
        vec!["manifest", "check", &path("m.yaml")],
        vec!["manifest", "check", &path("m.json")],
        vec!["manifest", "check", &path("absent")],
        vec!["verify", &source],
        vec!["mount", &source, &path("at")],
        vec!["mount", EVIL, &path("at")],
        vec!["update", &source],
        vec!["gc", "--store", &path("")],
        vec!["umount", &path("at")],
        vec!["status", &format!("--{EVIL}")],
        vec!["status", "--floor", EVIL],
        vec![EVIL],
    ] {
        let output = device.command(&words).output().unwrap();
        assert!(!output.status.success(), "{words:?}");
        assert!(!output.stderr.is_empty(), "{words:?}");
        is_plain(&output, &words);
    }
    // What the disk says in an answer: why the last update failed, the name of an image, a file's name.
    let state = device.system().join("state.json");
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    value["last_update"] = serde_json::json!({ "version": null, "error": EVIL });
    fs::write(&state, value.to_string()).unwrap();
    let output = device.command(&["status"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    is_plain(&output, &["status"]);
    assert!(text(&output.stdout).contains("last update failed: a\\u{1b}[2J"), "{}", text(&output.stdout));
    let output = device.command(&["status", "--json"]).output().unwrap();
    is_plain(&output, &["status", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["last_update"]["error"], EVIL, "JSON says the same value");
    let index = publisher.store().dir().join("index.json");
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    value["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] = EVIL.into();
    value["manifests"][0]["size"] = 1.into();
    fs::write(&index, value.to_string()).unwrap();
    let source = publisher.source();
    let output = device.command(&["verify", &source]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    is_plain(&output, &["verify"]);
    assert!(text(&output.stdout).contains("a\\u{1b}[2J"), "{}", text(&output.stdout));
}

#[test]
fn errors_of_a_manifest_have_a_line_each() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.yaml");
    fs::write(&file, "version: x\nproduct: y\n").unwrap();
    let device = Device::with_file_floor();
    let output = device.command(&["manifest", "check", file.to_str().unwrap()]).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let lines: Vec<_> = said.lines().collect();
    assert!(lines[0].starts_with("mosfs: the import manifest has "), "{said}");
    assert!(
        lines[1].starts_with(file.to_str().unwrap()) && lines[2].starts_with(file.to_str().unwrap()),
        "{said}"
    );
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).permissions().mode()
        & 0o7777
}

#[test]
fn folders_and_files_have_their_mode_whatever_the_umask() {
    for umask in ["077", "027", "000"] {
        let dir = tempfile::tempdir().unwrap();
        let publisher = Publisher::new(dir.path());
        publisher.publish(200, "host");
        let device = Device::with_file_floor();
        let mosfs = env!("CARGO_BIN_EXE_mosfs");
        let with_umask = |words: &str| {
            let script = format!("umask {umask}; exec {mosfs} {words}");
            let mut shell = Command::new("sh");
            shell.args(["-c", &script]).stdin(Stdio::null());
            shell.env("MOSFS_SYSTEM", device.system()).env("MOSFS_CONFIG", device.config());
            let output = shell.env("MOSFS_RUN", device.dir.join("run/below")).output().unwrap();
            assert!(output.status.success(), "umask {umask}: {words}: {}", text(&output.stderr));
        };
        let (source, ca) = (publisher.source_of(200), publisher.key("ca.pem"));
        with_umask(&format!(
            "install '{source}' --floor file --ca {} --product {}",
            ca.display(),
            publish::PRODUCT
        ));
        let keys = device.dir.join("new/keys");
        with_umask(&format!("keys generate {} --product {}", keys.display(), publish::PRODUCT));
        with_umask("commit --floor file");
        let at = device.dir.join("at");
        fs::create_dir(&at).unwrap();
        with_umask(&format!("mount --backend fuse hostfs {}", at.display()));
        let records = device.dir.join("run/below/mounts");
        let record = fs::read_dir(&records)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|ending| ending == "json"))
            .expect("a record");
        let record_mode = mode(&record);
        with_umask(&format!("umount {}", at.display()));
        assert_eq!(record_mode, 0o644, "umask {umask}");
        let deployment =
            fs::read_dir(device.system().join("deployments")).unwrap().next().unwrap().unwrap().path();
        let system = device.system();
        for (path, expected) in [
            (system.clone(), 0o755),
            (system.join("deployments"), 0o755),
            (deployment.clone(), 0o755),
            (deployment.join("manifest.json"), 0o644),
            (system.join("state.json"), 0o644),
            (system.join("floor"), 0o644),
            (system.join("store"), 0o755),
            (system.join("store/blobs"), 0o755),
            (system.join("store/blobs/sha256"), 0o755),
            (system.join("store/index.json"), 0o644),
            (device.config(), 0o755),
            (device.config().join("manifestCA.pem"), 0o644),
            (device.config().join("product"), 0o644),
            (device.dir.join("run"), 0o755),
            (device.dir.join("run/below"), 0o755),
            (records.clone(), 0o755),
            (device.dir.join("new"), 0o755),
            (keys.clone(), 0o755),
            (keys.join("ca.key"), 0o600),
            (keys.join("ca.pem"), 0o644),
        ] {
            assert_eq!(mode(&path), expected, "umask {umask}: {}", path.display());
        }
        for blob in fs::read_dir(system.join("store/blobs/sha256")).unwrap() {
            assert_eq!(mode(&blob.unwrap().path()), 0o444, "umask {umask}");
        }
    }
}
