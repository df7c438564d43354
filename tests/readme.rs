//! What the README and its pages say is tried: the tour is run as it stands, and commands that are named exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const MOSFS: &str = env!("CARGO_BIN_EXE_mosfs");

fn text(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The pages for users.
fn pages() -> Vec<(String, String)> {
    let docs = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).unwrap();
    let mut names: Vec<String> = docs
        .map(|entry| format!("docs/{}", entry.unwrap().file_name().into_string().unwrap()))
        .filter(|name| name.ends_with(".md"))
        .collect();
    names.push("README.md".into());
    names.sort();
    names.into_iter().map(|name| (name.clone(), text(&name))).collect()
}

/// The blocks of code of a page.
fn blocks(page: &str) -> Vec<String> {
    page.split("\n```")
        .skip(1)
        .step_by(2)
        .map(|block| block.split_once('\n').unwrap().1.to_string())
        .collect()
}

fn run(package: &str, command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
        panic!("cannot run {:?}: {error}; install the Debian package {package}", command.get_program())
    })
}

/// Runs a script in a folder, with mosfs on its path.
fn script(folder: &Path, text: &str) -> Output {
    let program = Path::new(MOSFS).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    run(
        "bash",
        Command::new("bash").args(["-euo", "pipefail", "-c", text]).current_dir(folder).env("PATH", path),
    )
}

#[test]
fn the_tour_of_the_readme_works_as_it_stands() {
    let readme = text("README.md");
    let tour = blocks(&readme).into_iter().find(|block| block.contains("mosfs keys generate")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let image = "mkdir tree && echo hello >tree/greeting\n\
                 umoci init --layout images && umoci new --image images:debian\n\
                 umoci insert --rootless --image images:debian tree /tree";
    let made = script(folder.path(), image);
    assert!(made.status.success(), "umoci (Debian package umoci): {}", String::from_utf8_lossy(&made.stderr));
    let toured = script(folder.path(), &tour);
    let (said, failed) = (String::from_utf8_lossy(&toured.stdout), String::from_utf8_lossy(&toured.stderr));
    let _ = Command::new("umount").arg("-l").arg(folder.path().join("mnt")).stderr(Stdio::null()).status();
    assert!(toured.status.success(), "{said}\n{failed}");
    for word in ["tree\n", "version 1 (sha256:", "hostfs at "] {
        assert!(said.contains(word), "the tour does not say `{word}`: {said}");
    }
}

/// Words after `mosfs` that are commands, as `floor provision`; none where it is no command line.
fn command_line(words: &str) -> Option<Vec<&str>> {
    let is_name = |word: &&str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    let words: Vec<&str> =
        words.split(' ').take_while(is_name).filter(|word| !word.starts_with('-')).collect();
    (!words.is_empty()).then_some(words)
}

#[test]
fn commands_and_options_that_are_named_exist() {
    let mut seen = BTreeSet::new();
    for (name, page) in pages() {
        // Code in lines and in blocks.
        let inline = page.split('`').skip(1).step_by(2).map(String::from).filter(|code| !code.contains('\n'));
        let lines =
            blocks(&page).into_iter().flat_map(|block| block.lines().map(String::from).collect::<Vec<_>>());
        for code in inline.chain(lines) {
            for part in code.split("&&").map(str::trim) {
                let Some(rest) = part.strip_prefix("mosfs ") else { continue };
                let Some(words) = command_line(rest) else { continue };
                let mut command = Command::new(MOSFS);
                // A target's name stands where a command of `floor` or `manifest` may.
                let depth = if ["floor", "manifest", "keys"].contains(&words[0]) { 2 } else { 1 };
                let words: Vec<&str> = words.into_iter().take(depth).collect();
                let output = run("", command.args(&words).arg("--help"));
                assert!(
                    output.status.success(),
                    "{name} names `mosfs {}`, which does not exist",
                    words.join(" ")
                );
                let help = String::from_utf8(output.stdout).unwrap();
                for option in part.split([' ', '`', '|']).filter(|word| word.starts_with("--")) {
                    let option: &str = option.split(['=', ']', ',', ')']).next().unwrap();
                    let is_there = help.split(|c: char| c.is_whitespace() || ",<[".contains(c));
                    assert!(
                        option == "--" || is_there.into_iter().any(|word| word == option),
                        "{name} names `{option}` of `mosfs {}`",
                        words.join(" ")
                    );
                }
                seen.insert(words[0].to_string());
            }
        }
    }
    for command in ["activate", "mount", "umount", "install", "status", "build"] {
        assert!(seen.contains(command), "the pages never show `mosfs {command}`: {seen:?}");
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    for (name, page) in pages() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(&name).parent().map(PathBuf::from).unwrap();
        for link in page.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !link.contains("://") && !link.starts_with('#') {
                let path = folder.join(link.split('#').next().unwrap());
                assert!(path.exists(), "{name} links to {link}");
            }
        }
    }
}

#[test]
fn every_command_is_in_the_pages() {
    let help = run("", Command::new(MOSFS).arg("--help"));
    let help = String::from_utf8(help.stdout).unwrap();
    let all: String = pages().into_iter().map(|(_, page)| page).collect();
    // `mosfs --help` lists commands in groups, the help of a command those below it.
    let titles = ["Publisher:", "Device:", "Any host:", "Plumbing:", "Commands:"];
    // Options follow: with a title, or in the first one's case without.
    let more = |line: &&str| !line.ends_with("ptions:") && !line.trim_start().starts_with('-');
    let list = help.lines().skip_while(|line| !titles.contains(line)).take_while(more);
    let list = list.filter(|line| line.starts_with("  "));
    for line in list.filter(|line| !line.starts_with("   ")) {
        let Some(name) = line.split_whitespace().next() else { continue };
        let found =
            name == "help" || all.contains(&format!("`{name}`")) || all.contains(&format!("mosfs {name}"));
        assert!(found, "no page says anything of `mosfs {name}`");
    }
}
