//! Holds the rules of the source tree (docs/ARCHITECTURE.md), naming file and line where one is broken:
//! imports point one way, `unsafe` stays in `src/sys` with a reason, only `src/cli/output.rs` prints, and no file grows
//! without saying why.

#[path = "architecture/circles.rs"]
mod circles;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{fs, iter};

/// The modules that every module may use; they use each other alone.
const BASE: &[&str] = &["digest", "error", "progress", "sorting", "sys", "text"];

/// The other modules, and which of them each may use: three pillars, and what stands on them.
///
/// ```text
/// bytes  image <- mount          what is read, and how it is shown
/// places image <- transport <- store <- convert
/// belief manifest <- trust <- floor
/// ```
const EDGES: &[(&str, &[&str])] = &[
    ("image", &[]),
    ("mount", &["image"]),
    ("transport", &["image"]),
    ("store", &["image", "transport"]),
    ("convert", &["image", "transport", "store"]),
    // The grammar of registry names.
    ("manifest", &["transport"]),
    ("trust", &["manifest"]),
    ("floor", &["trust"]),
    ("deploy", &["image", "mount", "transport", "store", "manifest", "trust", "floor"]),
    ("publish", &["image", "transport", "store", "convert", "manifest", "trust", "floor"]),
    ("run", &["image", "mount", "store", "manifest", "deploy"]),
    ("medium", &["image", "transport", "store", "manifest", "trust", "floor", "deploy", "publish"]),
    ("setup", &["image", "transport", "store", "manifest", "trust", "floor", "deploy", "medium"]),
    // The first process of a machine installs instead, if it was started from a medium.
    ("boot", &["mount", "store", "manifest", "trust", "floor", "deploy", "setup"]),
    (
        "cli",
        &[
            "image",
            "mount",
            "transport",
            "store",
            "convert",
            "manifest",
            "trust",
            "floor",
            "deploy",
            "publish",
            "run",
            "medium",
            "setup",
            "boot",
        ],
    ),
];

/// Longest file without a reason, in lines.
const MAX_LINES: usize = 800;

/// Files over [`MAX_LINES`], each with the reason why it is not two files.
const LONG_FILES: &[(&str, &str)] = &[];

/// A source file: its path below the package, its text, and its code without comments and literals.
struct SourceFile {
    path: String,
    text: String,
    code: String,
}

impl SourceFile {
    fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { path: path.into(), code: code_only(&text), text }
    }

    /// The module of the crate that the file belongs to: `image` for `src/image/layer.rs`. None for the roots.
    fn module(&self) -> Option<&str> {
        let below = self.path.strip_prefix("src/")?;
        let name = below.split('/').next()?;
        let name = name.strip_suffix(".rs").unwrap_or(name);
        (!matches!(name, "lib" | "main" | "full")).then_some(name)
    }

    /// The file without its unit tests, which may use what stands above it.
    fn without_tests(&self) -> SourceFile {
        let end = self.code.find("#[cfg(test)]\nmod ").unwrap_or(self.code.len());
        SourceFile { path: self.path.clone(), text: String::new(), code: self.code[..end].into() }
    }

    fn line_of(&self, offset: usize) -> usize {
        self.code[..offset].matches('\n').count() + 1
    }

    /// Offsets where `word` stands as a word of its own.
    fn words<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        self.code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
            !is_word(self.code[..at].chars().next_back())
                && !is_word(self.code[at + word.len()..].chars().next())
        })
    }
}

/// Replaces comments, strings and character literals with blanks; lines and offsets stay.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut blank = |from: usize, to: usize| {
        for byte in &mut out[from..to] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let length = if rest.starts_with(b"//") {
            rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(bytes, at) {
            length
        } else if rest[0] == b'"' {
            quoted(rest, b'"')
        } else if rest[0] == b'\'' && is_char_literal(&text[at..]) {
            quoted(rest, b'\'')
        } else {
            at += 1;
            continue;
        };
        blank(at, at + length);
        at += length;
    }
    String::from_utf8(out).expect("whole characters were blanked")
}

/// Length of the (nested) block comment that `rest` begins with.
fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// Length of the raw string (`r"…"`, `br#"…"#`, …) that begins at `at`, if one does.
fn raw_string(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') {
        return None;
    }
    let prefix = [&b"br"[..], b"cr", b"r"].into_iter().find(|p| rest.starts_with(p))?.len();
    let hashes = rest[prefix..].iter().take_while(|&&b| b == b'#').count();
    if rest.get(prefix + hashes) != Some(&b'"') {
        return None;
    }
    let end: Vec<u8> = iter::once(b'"').chain(iter::repeat_n(b'#', hashes)).collect();
    let body = prefix + hashes + 1;
    let length = rest[body..].windows(end.len()).position(|w| w == end);
    Some(length.map_or(rest.len(), |length| body + length + end.len()))
}

/// Length of the literal that `rest` begins with, up to and with its closing `quote`.
fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b if b == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Tells `'a'` and `'\n'` from the lifetime `'a`.
fn is_char_literal(rest: &str) -> bool {
    let mut chars = rest.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

fn package() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below these folders of the package.
fn sources(folders: &[&str]) -> Vec<SourceFile> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a readable folder") {
            let entry = entry.expect("a readable entry");
            let path = entry.path();
            if path.is_dir() && entry.file_name() != "target" {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    for folder in folders {
        let dir = package().join(folder);
        if dir.is_dir() {
            walk(&dir, &mut found);
        }
    }
    found.sort();
    found
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(package()).expect("below the package").display().to_string();
            SourceFile::new(name, fs::read_to_string(&path).expect("UTF-8 source"))
        })
        .collect()
}

/// Modules named after `crate::` at this offset: one, or those of a group in braces.
fn modules_named(code: &str, offset: usize) -> Vec<(usize, String)> {
    let ident = |at: usize| -> String {
        code[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    if !code[offset..].starts_with('{') {
        return vec![(offset, ident(offset))];
    }
    let (mut depth, mut wanted, mut found) = (0, false, Vec::new());
    for (at, c) in code[offset..].char_indices() {
        match c {
            '{' => (depth, wanted) = (depth + 1, depth == 0),
            '}' if depth == 1 => break,
            '}' => depth -= 1,
            ',' => wanted = depth == 1,
            c if wanted && !c.is_whitespace() => {
                found.push((offset + at, ident(offset + at)));
                wanted = false;
            }
            _ => {}
        }
    }
    found
}

/// The modules that `module` may use; none for a module that has no place.
fn allowed(module: &str) -> Option<Vec<&'static str>> {
    let above = EDGES.iter().find(|(name, _)| *name == module).map(|(_, allowed)| *allowed);
    let above = above.or_else(|| BASE.contains(&module).then_some(&[]))?;
    Some(above.iter().chain(BASE).copied().collect())
}

fn check_edges(file: &SourceFile, report: &mut String) {
    let Some(own) = file.module() else { return };
    let Some(allowed) = allowed(own) else {
        writeln!(report, "{}:1: module {own} has no place in the table of tests/architecture.rs", file.path)
            .unwrap();
        return;
    };
    for at in file.words("crate") {
        let Some(path) = file.code[at + 5..].strip_prefix("::") else { continue };
        let offset = file.code.len() - path.len();
        for (at, other) in modules_named(&file.code, offset) {
            let is_module = EDGES.iter().any(|(name, _)| *name == other) || BASE.contains(&other.as_str());
            if is_module && other != own && !allowed.contains(&other.as_str()) {
                writeln!(report, "{}:{}: {own} must not use {other}", file.path, file.line_of(at)).unwrap();
            }
        }
    }
}

fn check_unsafe(file: &SourceFile, report: &mut String) {
    let lines: Vec<&str> = file.text.lines().collect();
    for at in file.words("unsafe") {
        let line = file.line_of(at);
        if file.module() != Some("sys") {
            writeln!(report, "{}:{line}: unsafe outside src/sys", file.path).unwrap();
            continue;
        }
        if is_a_contract(&file.code[at..]) {
            continue;
        }
        // Upwards: the rest of the statement, then the comment above it.
        let mut reason = has_reason(lines[line - 1]);
        for above in lines[..line - 1].iter().rev().take(12) {
            let above = above.trim();
            if reason || above.is_empty() {
                break;
            }
            reason = has_reason(above);
            let comment = above.starts_with("//") || above.starts_with("#[");
            if !comment && above.ends_with([';', '}']) {
                break;
            }
        }
        if !reason {
            writeln!(report, "{}:{line}: unsafe without a SAFETY line", file.path).unwrap();
        }
    }
}

fn has_reason(line: &str) -> bool {
    line.contains("// SAFETY:") || line.contains("/// # Safety")
}

/// Whether this `unsafe` only says what callers must hold: a function that is not public, or a type of function.
/// (What public ones ask for is in their documentation, which clippy wants.) Its body has blocks of its own.
fn is_a_contract(code: &str) -> bool {
    let mut words =
        code.split_whitespace().skip(1).skip_while(|word| *word == "extern" || word.starts_with('"'));
    // The ABI's name is a literal, and blank by now.
    words.next().is_some_and(|word| word == "fn" || word.starts_with("fn("))
}

fn check_printing(file: &SourceFile, report: &mut String) {
    if !file.path.starts_with("src/") || file.path == "src/cli/output.rs" {
        return;
    }
    for name in ["println", "eprintln", "print", "eprint", "dbg"] {
        for at in file.words(name) {
            if file.code[at + name.len()..].starts_with('!') {
                let line = file.line_of(at);
                writeln!(report, "{}:{line}: {name}! outside src/cli/output.rs", file.path).unwrap();
            }
        }
    }
    for name in ["stdout", "stderr"] {
        for at in file.words(name) {
            if file.code[at + name.len()..].starts_with("()") {
                let line = file.line_of(at);
                writeln!(report, "{}:{line}: {name}() outside src/cli/output.rs", file.path).unwrap();
            }
        }
    }
}

fn check_length(file: &SourceFile, allowed: &[(&str, &str)], report: &mut String) {
    let lines = file.text.lines().count();
    let listed = allowed.iter().any(|(path, _)| *path == file.path);
    if lines > MAX_LINES && !listed {
        writeln!(report, "{}:{lines}: over {MAX_LINES} lines; split it, or list it with a reason", file.path)
            .unwrap();
    }
    if lines <= MAX_LINES && listed {
        writeln!(report, "{}:{lines}: is listed as a long file and is not one", file.path).unwrap();
    }
}

fn run(folders: &[&str], check: impl Fn(&SourceFile, &mut String)) {
    let files = sources(folders);
    assert!(files.len() >= 10, "only {} source files found below {}", files.len(), package().display());
    let mut report = String::new();
    for file in &files {
        check(file, &mut report);
    }
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn modules_use_what_the_table_allows() {
    run(&["src"], check_edges);
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let files = sources(&["src", "benches/compare"]);
    let files: Vec<_> = files.iter().map(SourceFile::without_tests).collect();
    let found = circles::circles(&files);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_table_has_no_circle_and_each_module_once() {
    let library = SourceFile::new("src/lib.rs", fs::read_to_string(package().join("src/lib.rs")).unwrap());
    // The public ones hold names for others, and no code.
    let mut declared: Vec<String> = library
        .words("mod")
        .filter(|&at| !library.code[..at].ends_with("pub "))
        .flat_map(|at| modules_named(&library.code, at + "mod ".len()))
        .map(|(_, name)| name)
        .collect();
    let mut listed: Vec<&str> = EDGES.iter().map(|(name, _)| *name).chain(BASE.iter().copied()).collect();
    declared.sort();
    listed.sort_unstable();
    assert_eq!(declared, listed);
    // Each module stands behind those that it may use.
    for (at, (name, allowed)) in EDGES.iter().enumerate() {
        for other in *allowed {
            let before = EDGES[..at].iter().any(|(earlier, _)| earlier == other);
            assert!(before, "{name} may use {other}, which does not stand before it");
        }
    }
}

#[test]
fn unsafe_stays_in_sys_and_says_why() {
    run(&["src"], check_unsafe);
}

#[test]
fn only_the_output_module_prints() {
    run(&["src"], check_printing);
}

#[test]
fn no_file_grows_without_a_reason() {
    run(&["src", "tests", "benches"], |file, report| check_length(file, LONG_FILES, report));
    for (path, reason) in LONG_FILES {
        assert!(package().join(path).is_file(), "{path} is listed as a long file and does not exist");
        assert!(!reason.is_empty(), "{path} is listed without a reason");
    }
}

/// What only `src/sys/file.rs` (and its neighbours that write) may call, so that everything on a disk is
/// opened by how far it is trusted and has its mode whatever the umask. With the files that may, and why.
const FILE_CALLS: &[(&str, &[&str])] = &[
    (
        "read_to_string",
        &[
            "src/boot/event_log.rs", // the kernel's boot id and uptime
            "src/sys/daemon.rs",     // the kernel's map of user ids
        ],
    ),
    ("create_dir", &["src/sys/file.rs"]),
    ("create_dir_all", &["src/sys/file.rs"]),
    ("DirBuilder", &["src/sys/file.rs", "src/sys/atomic.rs"]),
    (
        "File::open",
        &[
            "src/sys/file.rs",               // what the administrator names
            "src/sys/atomic.rs",             // folders, to sync them
            "src/boot/partition.rs",         // block devices
            "src/sys/namespace.rs",          // namespaces of processes
            "src/mount/kernel/dm_verity.rs", // the node of a device that was just made
            "src/trust/keys.rs",             // a key that the administrator names, whose mode is checked
            "src/sys/daemon.rs",             // the kernel's load, which stays open
        ],
    ),
];

/// The code of a file before its tests, which write and read what they like.
fn before_tests(file: &SourceFile) -> &str {
    file.code.find("#[cfg(test)]").map_or(&file.code, |end| &file.code[..end])
}

fn check_file_calls(file: &SourceFile, report: &mut String) {
    for (call, allowed) in FILE_CALLS {
        let code = before_tests(file);
        for (at, _) in code.match_indices(call) {
            let whole = !code[at + call.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
                && !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if whole && !allowed.contains(&file.path.as_str()) {
                writeln!(report, "{}:{}: {call} outside src/sys/file.rs", file.path, file.line_of(at))
                    .unwrap();
            }
        }
    }
}

#[test]
fn files_are_opened_by_how_far_they_are_trusted() {
    run(&["src"], check_file_calls);
    let bad = SourceFile::new("src/store/a.rs", "fn f() {\n    std::fs::File::open(path);\n}\n");
    let mut report = String::new();
    check_file_calls(&bad, &mut report);
    assert_eq!(report, "src/store/a.rs:2: File::open outside src/sys/file.rs\n");
}

#[test]
fn failpoints_have_names_of_one_form() {
    let mut names = 0;
    for file in sources(&["src"]) {
        for rest in file.text.split("failpoint::hit(\"").skip(1) {
            let name = rest.split('"').next().unwrap_or_default();
            let word = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase());
            assert!(
                name.split('.').count() == 3 && name.split('.').all(word),
                "{}: failpoint `{name}`, expected MODULE.OBJECT.STATE",
                file.path
            );
            names += 1;
        }
    }
    assert!(names > 20, "{names} failpoints found");
}

#[cfg(test)]
mod the_rules_themselves {
    use super::*;

    fn said(path: &str, text: &str, check: impl Fn(&SourceFile, &mut String)) -> String {
        let mut report = String::new();
        check(&SourceFile::new(path, text), &mut report);
        report
    }

    #[test]
    fn an_import_that_the_table_does_not_allow_is_named_with_its_line() {
        let text =
            "use crate::error::Class;\nuse crate::{\n    digest::Digest,\n    store::{Store, gc},\n};\n";
        assert_eq!(
            said("src/image/layer.rs", text, check_edges),
            "src/image/layer.rs:4: image must not use store\n"
        );
        assert!(said("src/mount/plan.rs", text, check_edges).contains("mount must not use store"));
        assert_eq!(said("src/deploy/plan.rs", text, check_edges), "");
        let inline = "fn f() {\n    crate::cli::main();\n}\n";
        assert_eq!(
            said("src/boot/mod.rs", inline, check_edges),
            "src/boot/mod.rs:2: boot must not use cli\n"
        );
        let visible =
            "pub(crate) fn f() {}\n// crate::cli in a comment, and \"\n const A: &str = \"crate::cli::x\";\n";
        assert_eq!(said("src/boot/mod.rs", visible, check_edges), "");
        assert!(said("src/other.rs", "", check_edges).contains("has no place"));
    }

    #[test]
    fn unsafe_needs_the_right_place_and_a_reason() {
        let bare = "fn f() {\n    let a = 1;\n    unsafe { g() }\n}\n";
        assert_eq!(said("src/image/a.rs", bare, check_unsafe), "src/image/a.rs:3: unsafe outside src/sys\n");
        assert_eq!(
            said("src/sys/a.rs", bare, check_unsafe),
            "src/sys/a.rs:3: unsafe without a SAFETY line\n"
        );
        let reasoned = "fn f() {\n    // SAFETY: g takes nothing.\n    let a =\n        unsafe { g() };\n}\n";
        assert_eq!(said("src/sys/a.rs", reasoned, check_unsafe), "");
        let callback = "unsafe extern \"C\" fn f(_: *mut u8) -> u32 {\n    0\n}\ntype F = unsafe fn(u8);\n";
        assert_eq!(said("src/sys/a.rs", callback, check_unsafe), "");
        assert!(said("src/sys/a.rs", "unsafe extern \"C\" {}\n", check_unsafe).contains("without a SAFETY"));
        assert!(
            said("src/sys/a.rs", "unsafe impl Send for A {}\n", check_unsafe).contains("without a SAFETY")
        );
        let words = "// unsafe\nconst A: &str = \"unsafe\";\n#[allow(unsafe_code)]\nconst B: char = '\"';\n";
        assert_eq!(said("src/image/a.rs", words, check_unsafe), "");
    }

    #[test]
    fn printing_is_seen_through_literals_and_lifetimes() {
        let text = "fn f<'a>(x: &'a str) {\n    let q = '\\'';\n    let r = r#\"println!(\"no\")\"#;\n    println!(\"{x}\");\n}\n";
        assert_eq!(
            said("src/store/a.rs", text, check_printing),
            "src/store/a.rs:4: println! outside src/cli/output.rs\n"
        );
        assert_eq!(said("src/cli/output.rs", text, check_printing), "");
        let nested = "/* a /* b */ println!() */ fn f() {}\n";
        assert_eq!(said("src/store/a.rs", nested, check_printing), "");
    }

    #[test]
    fn a_long_file_must_be_listed_and_a_listed_file_must_be_long() {
        let long = "\n".repeat(MAX_LINES + 1);
        let listed = [("src/a.rs", "one table")];
        assert!(said("src/a.rs", &long, |f, r| check_length(f, &[], r)).contains("over 800 lines"));
        assert_eq!(said("src/a.rs", &long, |f, r| check_length(f, &listed, r)), "");
        assert!(said("src/a.rs", "", |f, r| check_length(f, &listed, r)).contains("is not one"));
    }
}
