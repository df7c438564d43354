//! `tests/setup`: that it installs until nothing is missing, and that its table has every program that is called.
//! `tests/all`: that it runs every test program.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

#[path = "common/program.rs"]
mod program;
#[path = "common/shell.rs"]
mod shell;

use program::copy_program;

fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

// ---------------------------------------------------------------------------------------------
// Installing, with an apt that is made up
// ---------------------------------------------------------------------------------------------

/// A machine that has every tool but those of two packages, and an apt-get of our own.
struct Machine {
    dir: tempfile::TempDir,
}

/// What apt does in a test: `has NAME`, `add NAME`, `remove NAME` work on the tools of this machine, and `$*` are the
/// packages. Each call is written to `$0.log`.
const APT_GET: &str = r#"#!/bin/bash
echo "$*" >>"$0.log"
bin=${0%/*}
has() { [ -e "$bin/$1" ]; }
add() { printf '#!/bin/sh\n' >"$bin/$1" && chmod 0755 "$bin/$1"; }
remove() { rm -f "$bin/$1"; }
asked() { [[ " $packages " == *" $1 "* ]]; }
case " $* " in *' install '*) ;; *) exit 0 ;; esac
packages=${*##*install }
"#;

/// The two tools, and what apt calls them.
const TOOLS: [(&str, &str); 2] = [("qemu-img", "qemu-utils"), ("qemu-system-x86_64", "qemu-system-x86")];

/// Makes a program of this text.
fn program_of(path: &Path, text: &str) {
    let text_file = path.with_extension("text");
    fs::write(&text_file, text).unwrap();
    fs::set_permissions(&text_file, Permissions::from_mode(0o755)).unwrap();
    copy_program(text_file, path);
}

impl Machine {
    fn new(apt_get: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = std::env::var("PATH").unwrap() + ":/usr/local/sbin:/usr/sbin:/sbin";
        for folder in std::env::split_paths(&path) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let ours =
                    TOOLS.iter().any(|(tool, _)| name == *tool) || name == "apt-get" || name == "apt-cache";
                if !ours {
                    // The first folder of PATH that has a name wins.
                    let _ = symlink(entry.path(), dir.path().join(name));
                }
            }
        }
        program_of(&dir.path().join("apt-get"), &format!("{APT_GET}{apt_get}"));
        program_of(&dir.path().join("apt-cache"), "#!/bin/sh\necho 'Filename: one'\n");
        Self { dir }
    }

    fn add(self, tool: &str) -> Self {
        program_of(&self.dir.path().join(tool), "#!/bin/sh\n");
        self
    }

    /// Runs `tests/setup test`; how it ended, and how often packages were installed.
    fn set_up(&self) -> (Output, usize) {
        let output = Command::new("bash")
            .arg(package().join("tests/setup"))
            .arg("test")
            .env("PATH", self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let log = fs::read_to_string(self.dir.path().join("apt-get.log")).unwrap_or_default();
        let installs = log.lines().filter(|line| line.contains(" install ")).count();
        (output, installs)
    }

    fn has(&self, tool: &str) -> bool {
        self.dir.path().join(tool).exists()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn all_packages_go_into_one_transaction() {
    let machine = Machine::new(
        "asked qemu-utils && asked qemu-system-x86 && asked umoci || exit 100\nadd qemu-img\nadd qemu-system-x86_64",
    );
    let (output, installs) = machine.set_up();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(installs, 1);
    // Nothing is missing any more: apt is not even asked.
    let (output, installs) = machine.set_up();
    assert!(output.status.success() && said(&output).is_empty(), "{}", said(&output));
    assert_eq!(installs, 1);
}

/// The qemu-utils that was there fits no qemu-system-x86 that can be had, so that it goes; its successor comes then.
#[test]
fn a_package_that_another_one_removed_is_installed_again() {
    let machine = Machine::new(
        "if ! has qemu-system-x86_64; then add qemu-system-x86_64; remove qemu-img; else add qemu-img; fi",
    )
    .add("qemu-img");
    let (output, installs) = machine.set_up();
    assert!(output.status.success(), "{}", said(&output));
    assert!(machine.has("qemu-img") && machine.has("qemu-system-x86_64"));
    assert_eq!(installs, 2);
}

#[test]
fn where_not_all_packages_fit_those_that_are_missing_are_installed() {
    let machine = Machine::new("! asked umoci || exit 100\nadd qemu-img\nadd qemu-system-x86_64");
    let (output, installs) = machine.set_up();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(installs, 2, "all of them, then the two");
}

#[test]
fn what_cannot_be_installed_is_named_with_its_package() {
    let machine = Machine::new("exit 100");
    let (output, _) = machine.set_up();
    assert_eq!(output.status.code(), Some(1));
    for (tool, package) in TOOLS {
        let line = format!("missing: {tool} (Debian package: {package})");
        assert!(said(&output).contains(&line), "{}", said(&output));
    }
}

/// Each of the two removes the other, for ever.
#[test]
fn two_packages_that_exclude_each_other_end_it() {
    let machine = Machine::new(
        "if has qemu-img; then remove qemu-img; add qemu-system-x86_64; else remove qemu-system-x86_64; add qemu-img; fi",
    )
    .add("qemu-img");
    let (output, installs) = machine.set_up();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("still missing"), "{}", said(&output));
    assert_eq!(installs, 2);
}

// ---------------------------------------------------------------------------------------------
// The table
// ---------------------------------------------------------------------------------------------

/// What the rows of some groups name.
struct Rows {
    /// Commands, and the last part of files.
    tools: BTreeSet<String>,
    packages: BTreeSet<String>,
}

fn rows_of(groups: &[&str]) -> Rows {
    let text = fs::read_to_string(package().join("tests/setup")).unwrap();
    let table = text.split_once("<<-'ROWS'\n").unwrap().1.split_once("ROWS\n").unwrap().0;
    let mut rows = Rows { tools: BTreeSet::new(), packages: BTreeSet::new() };
    for row in table.lines().filter(|row| !row.trim().is_empty()) {
        let columns: Vec<_> = row.split('|').map(str::trim).collect();
        let [group, what, packages] = columns[..] else { panic!("a row has three columns: {row}") };
        assert!(!packages.is_empty(), "a row names a package: {row}");
        if groups.contains(&group)
            && let Some(("cmd" | "file", name)) = what.split_once(':')
        {
            rows.tools.insert(name.rsplit('/').next().unwrap().to_string());
            rows.packages.extend(packages.split(' ').map(String::from));
        }
    }
    assert!(rows.tools.len() >= 4, "{groups:?} have {:?}", rows.tools);
    rows
}

/// All files of the source below these paths.
fn files(paths: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo: Vec<_> = paths.iter().map(|path| package().join(path)).collect();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Our own program; what the Rust toolchain brings; what tests/setup itself looks for first; and what every Debian has
/// although no essential package owns the name: `awk` is one of several that base-files requires.
const WITHOUT_A_ROW: &[&str] = &[
    "mosfs",
    "cargo",
    "rustc",
    "rustdoc",
    "rustup",
    "cargo-fuzz",
    "cargo-deb",
    "apt-get",
    "apt-cache",
    "sudo",
    "awk",
];

/// Of these commands, those that are in no package of Debian that is essential or among `packages`.
fn in_no_package(commands: &BTreeSet<String>, packages: &BTreeSet<String>) -> BTreeSet<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${Package} ${Essential}\n"]);
    let output = query.output().expect("run dpkg-query (Debian package dpkg)");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut there: BTreeSet<_> = text.lines().filter_map(|line| line.strip_suffix(" yes")).collect();
    assert!(there.contains("coreutils"), "{there:?}");
    there.extend(packages.iter().map(String::as_str));

    let mut query = Command::new("dpkg-query");
    query.arg("-S").args(commands.iter().map(|command| format!("*bin/{command}"))).env("LC_ALL", "C");
    // It says on stderr what it has not found, and exits with 1.
    let output = query.output().expect("run dpkg-query (Debian package dpkg)");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut found = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with("diversion")) {
        let (owners, path) = line.split_once(": ").unwrap();
        let (folder, name) = path.rsplit_once('/').unwrap();
        let on_path = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"].contains(&folder);
        if on_path && owners.split(", ").any(|owner| there.contains(owner.split(':').next().unwrap())) {
            found.insert(name);
        }
    }
    commands.iter().filter(|command| !found.contains(command.as_str())).cloned().collect()
}

/// Wants each program that these files call to have a row in one of the groups, or to be on every Debian.
fn check(groups: &[&str], paths: &[&str]) {
    let rows = rows_of(groups);
    let mut called: BTreeMap<String, String> = BTreeMap::new();
    // The scanner's own tests name programs that there are not.
    for file in files(paths).into_iter().filter(|file| !file.ends_with("common/shell.rs")) {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let name = file.strip_prefix(package()).unwrap().display().to_string();
        let first = text.lines().next().unwrap_or("");
        let found = if name.ends_with(".rs") {
            shell::called_by_rust(&text)
        } else if first.starts_with("#!") && first.ends_with("sh") {
            shell::called_by_script(&text)
        } else if name == "Makefile" {
            shell::called_by_script(&shell::of_makefile(&text))
        } else {
            continue;
        };
        for (command, line) in found {
            called.entry(command).or_insert_with(|| format!("{name}:{line}"));
        }
    }
    assert!(called.len() >= 5, "{paths:?} call {called:?} only");
    let unknown: BTreeSet<_> = called
        .keys()
        .filter(|command| !rows.tools.contains(*command) && !WITHOUT_A_ROW.contains(&command.as_str()))
        // What tests call so is to be missing.
        .filter(|command| !command.starts_with("no-such-"))
        .cloned()
        .collect();
    let lacking = in_no_package(&unknown, &rows.packages);
    let list: Vec<_> = lacking.iter().map(|command| format!("{}: {command}", called[command])).collect();
    assert!(
        lacking.is_empty(),
        "these programs are called and have no row in tests/setup for {groups:?}:\n{}",
        list.join("\n")
    );
}

#[test]
fn the_tests_have_a_row_for_each_program() {
    let mut paths = vec!["tests/as-root", "tests/private-mounts", "tests/fresh"];
    let top: Vec<_> = fs::read_dir(package().join("tests"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir() || entry.path().extension() == Some(OsStr::new("rs")))
        .map(|entry| format!("tests/{}", entry.file_name().to_str().unwrap()))
        // They have groups of their own.
        .filter(|name| !["tests/deb.rs", "tests/fuzz"].contains(&name.as_str()))
        .collect();
    paths.extend(top.iter().map(String::as_str));
    check(&["build", "test"], &paths);
}

/// What the packages are tried with is set up by `make deb` besides.
#[test]
fn the_test_of_the_packages_has_a_row_for_each_program() {
    check(&["build", "test", "deb"], &["tests/deb", "tests/deb.rs"]);
}

#[test]
fn the_demo_has_a_row_for_each_program() {
    check(&["build", "demo"], &["tests/demo"]);
}

#[test]
fn the_benchmarks_have_a_row_for_each_program() {
    check(&["build", "bench"], &["benches", "tests/soak"]);
}

#[test]
fn what_lint_and_ci_call_has_a_row() {
    check(&["build", "lint"], &["Makefile", ".ci/run"]);
}

#[test]
fn a_program_that_no_group_has_is_found() {
    let commands: BTreeSet<_> =
        ["cp", "sed", "sh", "mount", "umount", "no-such-program"].map(String::from).into();
    let none = in_no_package(&commands, &BTreeSet::new());
    assert_eq!(none, ["mount", "no-such-program", "umount"].map(String::from).into());
    let none = in_no_package(&commands, &["mount".to_string()].into());
    assert_eq!(none, ["no-such-program".to_string()].into());
}

// ---------------------------------------------------------------------------------------------
// `make test`, with a cargo that is made up
// ---------------------------------------------------------------------------------------------

/// Fails the tests of `$FAILS`, and asks the real cargo what there is. Each call is written to `$0.log`.
const CARGO: &str = r#"#!/bin/bash
echo "$*" >>"$0.log"
case "$* " in
metadata*) exec "$REAL" "$@" ;;
*"--test $FAILS "*) exit 101 ;;
esac
"#;

#[test]
fn every_test_program_is_run_once_and_each_failure_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (cargo, calls) = (dir.path().join("cargo"), dir.path().join("cargo.log"));
    program_of(&cargo, CARGO);
    let tests = fs::read_dir(package().join("tests")).unwrap().map(|entry| entry.unwrap().path());
    let programs =
        tests.filter(|path| path.extension() == Some(OsStr::new("rs")) || path.join("main.rs").exists());
    let mut programs: Vec<_> =
        programs.map(|path| path.file_stem().unwrap().to_str().unwrap().to_string()).collect();
    programs.sort();
    for (fails, code) in [("none", 0), ("boot", 1), ("activate_boot", 1), ("store", 1)] {
        let _ = fs::remove_file(&calls);
        let mut all = Command::new(package().join("tests/all"));
        all.env("CARGO", &cargo).env("REAL", env!("CARGO"));
        all.env("CARGO_TARGET_DIR", dir.path()).env("FAILS", fails);
        let output = all.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{fails}: {output:?}");
        let said = fs::read_to_string(&calls).unwrap();
        let words: Vec<_> = said.split_whitespace().collect();
        let mut run: Vec<_> =
            words.windows(2).filter(|pair| pair[0] == "--test").map(|pair| pair[1]).collect();
        run.sort_unstable();
        assert_eq!(run, programs, "{fails}");
        for part in ["--lib", "--bins", "--doc"] {
            assert_eq!(words.iter().filter(|word| **word == part).count(), 1, "{fails}: {part}");
        }
    }
}
