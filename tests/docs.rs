//! The documents stand alone: what the source cites exists, and what a page links to is there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The text files of the project: path below its top, and content.
fn files() -> Vec<(String, String)> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let listed = listed.expect("git (Debian package git) is needed").stdout;
    let mut files = Vec::new();
    for name in String::from_utf8(listed).unwrap().split_terminator('\0') {
        if let Ok(text) = std::fs::read_to_string(root().join(name)) {
            files.push((name.to_string(), text));
        }
    }
    assert!(files.len() > 150, "git lists only {} text files", files.len());
    files
}

/// The rules of docs/design.md: each is written once as `*name*:` at the start of a list's entry or a paragraph.
fn rules() -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("docs/design.md")).unwrap();
    let mut rules = BTreeSet::new();
    for line in text.lines() {
        let line = line.strip_prefix("- ").unwrap_or(line);
        if let Some((name, _)) = line.strip_prefix('*').and_then(|rest| rest.split_once("*:")) {
            assert!(rules.insert(name.to_string()), "docs/design.md has two rules named {name}");
        }
    }
    assert!(rules.len() > 30, "{rules:?}");
    rules
}

/// The text of comments with their wraps undone, so that a citation may be wrapped.
fn unwrapped(text: &str) -> String {
    let mut joined = String::new();
    for line in text.lines() {
        let line = line.trim_start();
        let comment = line.trim_start_matches('/').trim_start_matches('!');
        joined.push_str(if line.starts_with("//") { comment.trim_start() } else { line });
        joined.push(' ');
    }
    joined
}

#[test]
fn every_cited_rule_exists() {
    const CITE: &str = concat!("docs/design", ".md, ");
    let (rules, mut wrong, mut cited) = (rules(), Vec::new(), BTreeSet::new());
    let source = |name: &str| name != "tests/docs.rs" && (name.ends_with(".rs") || name.ends_with(".sh"));
    for (name, text) in files().iter().filter(|(name, _)| source(name)) {
        let text = unwrapped(text);
        for (at, _) in text.match_indices(CITE) {
            let mut rest = &text[at + CITE.len()..];
            if rest.starts_with("the table") {
                continue;
            }
            // One rule, or several joined by commas; the longest name that fits, as names may hold commas.
            loop {
                let rule =
                    rules.iter().filter(|rule| rest.starts_with(rule.as_str())).max_by_key(|rule| rule.len());
                let Some(rule) = rule else {
                    wrong.push(format!("{name}: no rule `{}`", rest.chars().take(40).collect::<String>()));
                    break;
                };
                cited.insert(rule.clone());
                rest = &rest[rule.len()..];
                match rest.strip_prefix(", ") {
                    Some(more) if rules.iter().any(|rule| more.starts_with(rule.as_str())) => rest = more,
                    _ => break,
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(cited.len() > 20, "{cited:?}");
}

#[test]
fn every_document_that_is_named_is_in_the_repository() {
    let files = files();
    let names: BTreeSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    let is_here = |from: &str, path: &str| {
        let folder = Path::new(from).parent().unwrap_or(Path::new(""));
        let beside = folder.join(path);
        names.contains(path)
            || names.contains(format!("docs/{path}").as_str())
            || beside.to_str().is_some_and(|beside| names.contains(beside))
            || root().join(&beside).exists()
    };
    // Documents of others that a comment may cite by their file's name.
    const OTHERS: [&str; 7] = [
        "layer.md",
        "image-layout.md",
        "proto.md",
        "manifest.md",
        "descriptor.md",
        "media-types.md",
        "image-index.md",
    ];
    let mut wrong = Vec::new();
    for (name, text) in &files {
        if name.starts_with("tests/fuzz/corpus") || name == "Cargo.lock" || name == "tests/docs.rs" {
            continue;
        }
        let is_word = |c: char| !(c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '/'));
        for word in text.split(is_word).filter(|word| word.ends_with(".md") && word.len() > 3) {
            if !is_here(name, word) && !OTHERS.contains(&word.rsplit('/').next().unwrap_or(word)) {
                wrong.push(format!("{name} names {word}"));
            }
        }
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    let mut wrong = Vec::new();
    let mut links = 0;
    for (name, text) in files().iter().filter(|(name, _)| name.ends_with(".md")) {
        for (at, _) in text.match_indices("](") {
            let Some(target) = text[at + 2..].split(')').next() else { continue };
            if target.contains("://") {
                continue;
            }
            links += 1;
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let to = if path.is_empty() {
                root().join(name)
            } else {
                root().join(name).parent().unwrap().join(path)
            };
            let Ok(page) = std::fs::read_to_string(&to) else {
                if !to.exists() {
                    wrong.push(format!("{name} links to {target}"));
                }
                continue;
            };
            let headings = page.lines().filter(|line| line.starts_with('#')).map(slug);
            if !anchor.is_empty() && !headings.into_iter().any(|heading| heading == anchor) {
                wrong.push(format!("{name} links to {target}, which has no such heading"));
            }
        }
    }
    assert!(links > 30, "only {links} links were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A heading as the link to it spells it: lower case, spaces as `-`, punctuation left out.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let keep = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    text.chars().filter(keep).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn the_index_of_docs_lists_every_page() {
    let index = std::fs::read_to_string(root().join("docs/README.md")).unwrap();
    let missing: Vec<String> = files()
        .into_iter()
        .map(|(name, _)| name)
        .filter_map(|name| name.strip_prefix("docs/").map(Into::into))
        .filter(|name: &String| name != "README.md" && !index.contains(&format!("({name})")))
        .collect();
    assert!(missing.is_empty(), "docs/README.md does not list {missing:?}");
}

#[test]
fn the_index_of_tests_lists_every_file() {
    let index = std::fs::read_to_string(root().join("tests/README.md")).unwrap();
    let mut missing = BTreeSet::new();
    for (name, _) in files() {
        let Some(rest) = name.strip_prefix("tests/") else { continue };
        let target = match rest.split_once('/') {
            Some((folder, "main.rs")) => format!("{folder}/"),
            None if rest.ends_with(".rs") => rest.to_string(),
            _ => continue,
        };
        if !index.contains(&format!("`{target}`")) {
            missing.insert(target);
        }
    }
    assert!(missing.is_empty(), "tests/README.md does not list {missing:?}");
}
