//! `make install`: every file where Debian puts it, and each of them good for what it is for.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const MOSFS: &str = env!("CARGO_BIN_EXE_mosfs");

/// What is installed besides man pages, by path below DESTDIR: the mode, and what begins each file.
const FILES: &[(&str, u32, &str)] = &[
    ("usr/bin/mosfs", 0o755, "\x7fELF"),
    ("usr/libexec/mosfs/mosfs-full", 0o755, "\x7fELF"),
    ("usr/lib/dracut/modules.d/90mosfs/module-setup.sh", 0o755, "#!/bin/bash"),
    ("usr/lib/dracut/modules.d/90mosfs/mosfs-generator.sh", 0o755, "#!/bin/sh"),
    ("usr/lib/dracut/modules.d/90mosfs/mosfs-root.sh", 0o755, "#!/bin/sh"),
    ("usr/lib/dracut/modules.d/90mosfs/mosfs-stop.sh", 0o755, "#!/bin/sh"),
    ("usr/lib/dracut/modules.d/90mosfs/mount-mosfs.sh", 0o755, "#!/bin/sh"),
    ("usr/lib/dracut/modules.d/90mosfs/parse-mosfs.sh", 0o755, "#!/bin/sh"),
    ("usr/lib/systemd/system/mosfs-activate.service", 0o644, "#"),
    ("usr/lib/systemd/system/mosfs-commit.service", 0o644, "#"),
    ("usr/lib/systemd/system/mosfs-update-finish.service", 0o644, "#"),
    ("usr/lib/systemd/system/mosfs-update.service", 0o644, "#"),
    ("usr/lib/systemd/system/mosfs-update.timer", 0o644, "#"),
    ("usr/sbin/mount.mosfs", 0o755, "#!/bin/sh"),
    ("usr/share/bash-completion/completions/mosfs", 0o644, "_mosfs()"),
    ("usr/share/fish/vendor_completions.d/mosfs.fish", 0o644, "#"),
    ("usr/share/initramfs-tools/hooks/mosfs", 0o755, "#!/bin/sh"),
    ("usr/share/initramfs-tools/scripts/init-top/mosfs", 0o755, "#!/bin/sh"),
    // Sourced, not run.
    ("usr/share/initramfs-tools/scripts/mosfs", 0o644, "# Boot script"),
    ("usr/share/zsh/vendor-completions/_mosfs", 0o644, "#compdef mosfs"),
];

fn run(package: &str, command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| {
        panic!("cannot run {:?}: {error}; install the Debian package {package}", command.get_program())
    })
}

/// Runs a program that must succeed and say nothing of what is wrong.
fn quiet(package: &str, command: &mut Command) -> String {
    let output = run(package, command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{command:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn install(destination: &Path, more: &[&str]) {
    let mut make = Command::new("make");
    make.args(["--silent", "install"]).args(more).current_dir(env!("CARGO_MANIFEST_DIR"));
    make.arg(format!("DESTDIR={}", destination.display())).arg(format!("MOSFS={MOSFS}"));
    // A make that runs this test must not hand its own settings on.
    for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "DESTDIR", "PREFIX", "MOSFS"] {
        make.env_remove(name);
    }
    quiet("make", &mut make);
}

/// What `make install` makes, once.
fn installed() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("install");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place).unwrap();
        install(&place, &[]);
        place
    })
}

/// All files below a folder with their modes.
fn files(root: &Path) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
                found.insert(name, path.metadata().unwrap().permissions().mode() & 0o7777);
            }
        }
    }
    found
}

/// The commands that `mosfs --help` lists, those of a command as `COMMAND-SUB`.
fn commands(words: &[&str]) -> Vec<String> {
    let help = quiet("", Command::new(MOSFS).args(words).arg("--help"));
    // `mosfs --help` lists commands in groups, the help of a command those below it.
    let titles = ["Publisher:", "Device:", "Any host:", "Plumbing:", "Commands:"];
    // Options follow: with a title, or in the first one's case without.
    let more = |line: &&str| !line.ends_with("ptions:") && !line.trim_start().starts_with('-');
    let list = help.lines().skip_while(|line| !titles.contains(line)).take_while(more);
    // The text of a long line goes on below, further to the right.
    let names = list.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names: Vec<_> = names.map(|line| line.split_whitespace().next().unwrap()).collect();
    names
        .into_iter()
        .filter(|name| *name != "help")
        .flat_map(|name| {
            let words = [words, &[name]].concat();
            let mut all = vec![words.join("-")];
            all.extend(commands(&words));
            all
        })
        .collect()
}

#[test]
fn every_file_is_where_debian_puts_it_and_there_is_no_other() {
    let mut expected: BTreeMap<String, u32> =
        FILES.iter().map(|(path, mode, _)| (path.to_string(), *mode)).collect();
    let commands = commands(&[]);
    for name in ["activate", "boot", "mount", "floor-provision"] {
        assert!(commands.iter().any(|one| one == name), "{commands:?}");
    }
    expected.insert("usr/share/man/man1/mosfs.1".into(), 0o644);
    expected.extend(commands.iter().map(|name| (format!("usr/share/man/man1/mosfs-{name}.1"), 0o644)));
    assert_eq!(files(installed()), expected);
    for (path, _, begin) in FILES {
        let bytes = fs::read(installed().join(path)).unwrap();
        assert!(bytes.starts_with(begin.as_bytes()), "{path} does not begin with {begin:?}");
    }
}

#[test]
fn what_is_installed_is_what_is_in_the_source() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pairs = [
        ("mount-helpers", "usr/lib/systemd/system", "service"),
        ("initramfs/dracut/90mosfs", "usr/lib/dracut/modules.d/90mosfs", "sh"),
    ];
    for (from, to, ending) in pairs {
        let mut count = 0;
        for entry in fs::read_dir(source.join(from)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|one| one == ending) {
                let other = installed().join(to).join(path.file_name().unwrap());
                assert_eq!(fs::read(&path).unwrap(), fs::read(other).unwrap(), "{}", path.display());
                count += 1;
            }
        }
        assert!(count > 0, "{from}");
    }
}

#[test]
fn another_prefix_is_in_the_units_too() {
    let place = tempfile::tempdir().unwrap();
    install(place.path(), &["PREFIX=/opt/mosfs"]);
    let unit = place.path().join("opt/mosfs/lib/systemd/system/mosfs-activate.service");
    let unit = fs::read_to_string(unit).unwrap();
    assert!(unit.contains("\nExecStart=/opt/mosfs/bin/mosfs activate "), "{unit}");
    assert!(!unit.contains("=/usr/bin/mosfs"), "{unit}");
    let here = files(installed()).into_keys().map(|path| path.replacen("usr/", "opt/mosfs/", 1));
    assert_eq!(files(place.path()).into_keys().collect::<Vec<_>>(), here.collect::<Vec<_>>());
}

#[test]
fn systemd_takes_the_units() {
    // systemd-analyze wants the programs to be there: those that were just installed.
    let folder = tempfile::tempdir().unwrap();
    let program = installed().join("usr/bin/mosfs");
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--man=no", "--recursive-errors=no"]);
    for (path, ..) in FILES.iter().filter(|(path, ..)| path.ends_with(".service")) {
        let text = fs::read_to_string(installed().join(path)).unwrap();
        assert!(text.contains("=/usr/bin/mosfs "), "{path}");
        let unit = folder.path().join(Path::new(path).file_name().unwrap());
        fs::write(&unit, text.replace("=/usr/bin/mosfs ", &format!("={} ", program.display()))).unwrap();
        command.arg(unit);
    }
    quiet("systemd", &mut command);
    // It does look: a unit with a word that it does not know.
    let bad = folder.path().join("bad.service");
    fs::write(&bad, "[Service]\nExecStart=/bin/true\nKilMode=process\n").unwrap();
    let output = run("systemd", Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(bad));
    assert!(String::from_utf8_lossy(&output.stderr).contains("KilMode"));
}

#[test]
fn the_units_can_be_enabled() {
    let place = tempfile::tempdir().unwrap();
    install(place.path(), &[]);
    let mut enable = Command::new("systemctl");
    enable.arg(format!("--root={}", place.path().display())).args(["--quiet", "enable"]);
    quiet("systemd", enable.args(["mosfs-activate.service", "mosfs-commit.service"]));
    for link in [
        "multi-user.target.wants/mosfs-activate.service",
        "multi-user.target.wants/mosfs-commit.service",
        "boot-complete.target.requires/mosfs-activate.service",
    ] {
        let link = place.path().join("etc/systemd/system").join(link);
        assert!(link.symlink_metadata().is_ok(), "{}", link.display());
    }
}

#[test]
fn units_call_commands_that_there_are() {
    for (path, ..) in FILES.iter().filter(|(path, ..)| path.ends_with(".service")) {
        let text = fs::read_to_string(installed().join(path)).unwrap();
        let lines: Vec<_> = text.lines().filter_map(|line| line.split_once("=/usr/bin/mosfs ")).collect();
        assert!(!lines.is_empty(), "{path}");
        for (_, words) in lines {
            // What systemd puts in: `$NAME` is words, none by default, and `${NAME}` is one word.
            let words = words.split(' ').filter(|word| !word.starts_with('$') || word.starts_with("${"));
            let words: Vec<_> =
                words.map(|word| if word == "${SOURCE}" { "oci:/srv" } else { word }).collect();
            // Options are parsed before help is given, so that one which is not there is an error.
            quiet("", Command::new(MOSFS).args(&words).arg("--help"));
        }
        for page in text.lines().filter_map(|line| line.strip_prefix("Documentation=man:")) {
            let page = page.replace("(1)", ".1");
            assert!(installed().join("usr/share/man/man1").join(&page).exists(), "{path} names {page}");
        }
    }
}

#[test]
fn man_pages_can_be_read() {
    let pages: Vec<_> = files(installed()).into_keys().filter(|path| path.ends_with(".1")).collect();
    assert!(pages.len() > 20, "{pages:?}");
    for page in pages {
        let mut command = Command::new("man");
        command.args(["--warnings", "--local-file", "--locale=C.UTF-8"]).arg(installed().join(&page));
        let text = quiet("man-db", command.env("MANWIDTH", "80").env_remove("MAN_KEEP_FORMATTING"));
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"] {
            assert!(text.contains(section), "{page} has no {section}:\n{text}");
        }
    }
}

#[test]
fn shell_files_are_sound() {
    // shellcheck looks for its rules in the folders above a file, and the target folder may lie anywhere.
    let rules = installed().with_file_name(".shellcheckrc");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(".shellcheckrc"), rules).unwrap();
    let mut checked = 0;
    for (path, _, begin) in FILES {
        let shell = match *begin {
            "#!/bin/sh" | "# Boot script" => "sh",
            "#!/bin/bash" | "_mosfs()" => "bash",
            _ => continue,
        };
        let file = installed().join(path);
        quiet(shell, Command::new(shell).arg("-n").arg(&file));
        // Completions are made by clap_complete, in its own style.
        if *begin != "_mosfs()" {
            let mut command = Command::new("shellcheck");
            command.args(["--severity=warning", "--shell", shell, "--external-sources"]).arg(&file);
            let output = run("shellcheck", &mut command);
            assert!(output.status.success(), "{path}:\n{}", String::from_utf8_lossy(&output.stdout));
        }
        checked += 1;
    }
    assert_eq!(checked, 11);
}

#[test]
fn bash_completes_commands_and_options() {
    let file = installed().join("usr/share/bash-completion/completions/mosfs");
    let ask = |line: &str| {
        let words: Vec<_> = line.split(' ').collect();
        let script = format!(
            "source {}; COMP_WORDS=({}); COMP_CWORD={}; _mosfs mosfs '{}' '{}'; echo \"${{COMPREPLY[@]}}\"",
            file.display(),
            line,
            words.len() - 1,
            words[words.len() - 1],
            words[words.len() - 2],
        );
        quiet("bash", Command::new("bash").args(["--norc", "-c", &script]))
    };
    assert_eq!(ask("mosfs act").trim(), "activate");
    assert_eq!(ask("mosfs activate --dry").trim(), "--dry-run");
    assert_eq!(ask("mosfs floor prov").trim(), "provision");
}
