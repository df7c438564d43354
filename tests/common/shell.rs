//! Which programs a script or a Rust test calls, as far as the text shows it.
//!
//! Not a shell: it knows where a command begins, quotes, substitutions, here-documents, `case`, and the words that
//! run their arguments. What a variable holds, it does not know.

use std::collections::{BTreeMap, BTreeSet};

/// What bash has itself.
const BUILTINS: &[&str] = &[
    "alias", "break", "cd", "command", "compgen", "continue", "declare", "echo", "eval", "exec", "exit",
    "export", "false", "hash", "kill", "let", "local", "mapfile", "printf", "pwd", "read", "readonly",
    "return", "set", "shift", "shopt", "source", "test", "trap", "true", "type", "ulimit", "umask", "unset",
    "wait", "fi", "done", "esac",
];

/// Words that are followed by a command, after options and assignments.
const RUN_THEIR_ARGUMENT: &[&str] =
    &["as_root", "command", "env", "exec", "need", "nice", "quiet", "refused", "run", "sudo", "try", "xargs"];

/// Words after which a command begins as it does at the start of a line.
const KEYWORDS: &[&str] = &["!", "{", "}", "if", "then", "else", "elif", "do", "while", "until", "time"];

/// The programs that a shell script calls, each with the first line that does.
pub fn called_by_script(text: &str) -> BTreeMap<String, usize> {
    let mut scan = Scan { text: text.as_bytes(), ..Scan::default() };
    scan.commands(None);
    let Scan { found, functions, .. } = scan;
    found
        .into_iter()
        .filter(|(name, _)| !functions.contains(name) && !BUILTINS.contains(&name.as_str()))
        .collect()
}

/// The recipes of a Makefile, as one script, with its lines where they were.
pub fn of_makefile(text: &str) -> String {
    let recipe = |line: &str| {
        let line = line.strip_prefix('\t').unwrap_or("").trim_start_matches('@');
        line.replace("$$", "$") + "\n"
    };
    text.lines().map(recipe).collect()
}

/// The programs that Rust code calls by a literal name, each with the first line that does.
pub fn called_by_rust(text: &str) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    let line_of = |at: usize| text[..at].matches('\n').count() + 1;
    let literal = |at: usize| text[at..].split_once('"').map(|(literal, _)| literal);
    // Before the programs of a test they are called with more than one word before the literal.
    for begin in ["Command::new(\"", "command(\"", ".tool(\"tpm2_", ".tool_ok(\"tpm2_"] {
        for (at, _) in text.match_indices(begin) {
            let before = text[..at].chars().next_back();
            let start = at + begin.rfind('"').unwrap_or(0) + 1;
            let Some(name) = literal(start).filter(|name| !name.starts_with("/proc/")) else { continue };
            let name = name.rsplit('/').next().unwrap_or(name);
            let word = before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '.');
            if !word && is_program(name) || begin.starts_with('.') {
                found.entry(name.to_string()).or_insert(line_of(at));
            }
        }
    }
    // Scripts that are written out: `sh(folder, "…")`.
    for (at, _) in text.match_indices("sh(") {
        let start = text[..at].chars().next_back();
        if start.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let Some((_, rest)) = text[at..].split_once('"').filter(|(before, _)| !before.contains(';')) else {
            continue;
        };
        let offset = text.len() - rest.len();
        for (name, line) in called_by_script(&unescaped(rest)) {
            found.entry(name).or_insert(line_of(offset) + line - 1);
        }
    }
    found
}

/// The text of a literal of Rust, up to its closing quote.
fn unescaped(rest: &str) -> String {
    let mut text = String::new();
    let mut chars = rest.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => match chars.next() {
                Some('n') => text.push('\n'),
                Some('\n') | None => {}
                Some(c) => text.push(c),
            },
            c => text.push(c),
        }
    }
    text
}

/// Whether a word can be the name of a program.
fn is_program(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.len() > 1
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "_.+-".contains(c))
}

#[derive(Default)]
struct Scan<'a> {
    text: &'a [u8],
    at: usize,
    found: BTreeMap<String, usize>,
    functions: BTreeSet<String>,
    /// The ends of here-documents that begin at the next line.
    here: Vec<String>,
    /// Lines before the text, where it is a part of another.
    lines_before: usize,
}

impl Scan<'_> {
    fn rest(&self) -> &[u8] {
        &self.text[self.at.min(self.text.len())..]
    }

    fn starts(&self, with: &str) -> bool {
        self.rest().starts_with(with.as_bytes())
    }

    fn line(&self) -> usize {
        self.lines_before
            + self.text[..self.at.min(self.text.len())].iter().filter(|b| **b == b'\n').count()
            + 1
    }

    /// Moves behind the next `end`.
    fn skip_past(&mut self, end: &str) {
        while self.at < self.text.len() && !self.starts(end) {
            self.at += 1;
        }
        self.at += end.len();
    }

    /// Reads commands up to `end`, or to the end of the text.
    fn commands(&mut self, end: Option<u8>) {
        let mut expected = true;
        // Words whose next argument is a command, too, and may be quoted.
        let mut of_argument = false;
        // The program whose arguments these are.
        let mut program = String::new();
        let mut cases = 0_usize;
        while let Some(&byte) = self.rest().first() {
            match byte {
                b'\n' => {
                    self.at += 1;
                    self.skip_here_documents();
                    (expected, of_argument) = (true, false);
                }
                _ if byte.is_ascii_whitespace() => self.at += 1,
                b'#' => {
                    while self.rest().first().is_some_and(|b| *b != b'\n') {
                        self.at += 1;
                    }
                }
                b';' if self.starts(";;") && cases > 0 => {
                    self.at += 2;
                    cases -= self.pattern();
                    expected = true;
                }
                _ if Some(byte) == end => {
                    self.at += 1;
                    return;
                }
                b'(' if self.starts("((") => self.skip_past("))"),
                b';' | b'&' | b'|' | b'(' | b')' => {
                    self.at += 1;
                    (expected, of_argument) = (true, false);
                }
                b'<' | b'>' if self.rest().get(1) == Some(&b'(') => {
                    self.at += 2;
                    self.commands(Some(b')'));
                }
                b'<' | b'>' => self.redirection(),
                _ => {
                    let (line, quoted, start) = (self.line(), byte == b'\'' || byte == b'"', self.at);
                    let word = self.word();
                    if of_argument && quoted {
                        let inner = String::from_utf8_lossy(&self.text[start + 1..self.at - 1]).into_owned();
                        self.nested(&inner, line);
                        of_argument = false;
                        continue;
                    }
                    if of_argument && (word.starts_with(['-', '$']) || word.contains('=')) {
                        continue;
                    }
                    if !expected && !of_argument {
                        // sh -c '…'
                        of_argument = matches!(program.as_str(), "sh" | "bash")
                            && word.starts_with('-')
                            && word.ends_with('c');
                        continue;
                    }
                    (expected, of_argument) = (false, false);
                    match word.as_str() {
                        "[[" => self.skip_past("]]"),
                        "case" => {
                            self.skip_past(" in");
                            cases += 1;
                            cases -= self.pattern();
                            expected = true;
                        }
                        "esac" => cases = cases.saturating_sub(1),
                        "for" => {
                            while self.rest().first().is_some_and(|b| *b != b'\n' && *b != b';') {
                                if self.starts("$(") {
                                    self.at += 2;
                                    self.commands(Some(b')'));
                                } else {
                                    self.at += 1;
                                }
                            }
                        }
                        _ if KEYWORDS.contains(&word.as_str()) => expected = true,
                        _ if self.starts("()") => {
                            self.at += 2;
                            self.functions.insert(word);
                            expected = true;
                        }
                        _ if is_assignment(&word) => {
                            expected = true;
                            if word.ends_with('=') && self.starts("(") {
                                self.skip_array();
                            }
                        }
                        _ => {
                            of_argument = RUN_THEIR_ARGUMENT.contains(&word.as_str());
                            let name = word.rsplit('/').next().unwrap_or_default();
                            program = name.to_string();
                            // A path that is not absolute is a script of the project.
                            let ours = word.contains('/') && !word.starts_with('/');
                            if is_program(name) && !word.contains('$') && !ours {
                                self.found.entry(name.to_string()).or_insert(line);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Moves over the pattern of a `case` branch; 1 where `esac` comes in its place.
    fn pattern(&mut self) -> usize {
        while self.rest().first().is_some_and(|b| b.is_ascii_whitespace()) {
            self.at += 1;
        }
        while self.starts("#") {
            self.skip_past("\n");
            while self.rest().first().is_some_and(|b| b.is_ascii_whitespace()) {
                self.at += 1;
            }
        }
        if self.starts("esac") {
            self.at += 4;
            return 1;
        }
        while self.rest().first().is_some_and(|b| *b != b')') {
            self.word_or_byte();
        }
        self.at += 1;
        0
    }

    fn word_or_byte(&mut self) {
        let before = self.at;
        if !self.rest().first().is_some_and(|b| b.is_ascii_whitespace() || *b == b'|') {
            self.word();
        }
        if self.at == before {
            self.at += 1;
        }
    }

    /// Moves over an array's elements, in which there may be substitutions.
    fn skip_array(&mut self) {
        self.at += 1;
        while let Some(&byte) = self.rest().first() {
            match byte {
                b')' => break,
                b'#' => self.skip_past("\n"),
                _ if byte.is_ascii_whitespace() => self.at += 1,
                _ => self.word_or_byte(),
            }
        }
        self.at += 1;
    }

    fn redirection(&mut self) {
        if self.starts("<<<") {
            self.at += 3;
        } else if self.starts("<<") {
            self.at += 2;
            if self.starts("-") {
                self.at += 1;
            }
            let word = self.word();
            self.here.push(word.trim_matches(['\'', '"']).to_string());
            return;
        } else {
            self.at += 1;
            while self.rest().first().is_some_and(|b| b"<>&|".contains(b)) {
                self.at += 1;
            }
        }
        while self.starts(" ") {
            self.at += 1;
        }
        self.word();
    }

    fn skip_here_documents(&mut self) {
        for end in std::mem::take(&mut self.here) {
            loop {
                let line: Vec<u8> = self.rest().iter().copied().take_while(|b| *b != b'\n').collect();
                if line.is_empty() && self.rest().is_empty() {
                    break;
                }
                self.at += line.len() + 1;
                if String::from_utf8_lossy(&line).trim_start_matches('\t') == end {
                    break;
                }
            }
        }
    }

    /// Reads one word; what is substituted in it becomes `$`, and is read for commands of its own.
    fn word(&mut self) -> String {
        let mut word = String::new();
        while let Some(&byte) = self.rest().first() {
            match byte {
                b'\\' => {
                    self.at += 2;
                    if self.text.get(self.at - 1) != Some(&b'\n') {
                        word.push('\\');
                    }
                }
                b'\'' => {
                    self.at += 1;
                    let start = self.at;
                    self.skip_past("'");
                    let end = (self.at.max(1) - 1).min(self.text.len());
                    word.push_str(&String::from_utf8_lossy(&self.text[start..end]));
                }
                b'"' => {
                    self.at += 1;
                    self.double_quoted();
                    word.push('$');
                }
                b'$' => {
                    self.dollar();
                    word.push('$');
                }
                _ if byte.is_ascii_whitespace() || b";&|()<>`".contains(&byte) => break,
                _ => {
                    word.push(char::from(byte));
                    self.at += 1;
                }
            }
        }
        if word.is_empty() && self.rest().first() == Some(&b'`') {
            self.at += 1;
        }
        word
    }

    fn double_quoted(&mut self) {
        while let Some(&byte) = self.rest().first() {
            match byte {
                b'"' => {
                    self.at += 1;
                    return;
                }
                b'\\' => self.at += 2,
                b'$' => self.dollar(),
                _ => self.at += 1,
            }
        }
    }

    /// Reads what begins with `$`.
    fn dollar(&mut self) {
        self.at += 1;
        if self.starts("((") {
            self.skip_past("))");
        } else if self.starts("(") {
            self.at += 1;
            self.commands(Some(b')'));
        } else if self.starts("{") {
            let mut depth = 0;
            while let Some(&byte) = self.rest().first() {
                self.at += 1;
                match byte {
                    b'{' => depth += 1,
                    b'}' => depth -= 1,
                    b'\\' => self.at += 1,
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
        } else {
            // `$'…'` is a word of its own; of names and `$1` the rest may follow as letters.
            if !self.starts("'")
                && !self.rest().is_empty()
                && !self.rest()[0].is_ascii_whitespace()
                && !self.starts("\"")
            {
                self.at += 1;
            }
        }
    }

    /// Reads a script that stands in quotes.
    fn nested(&mut self, text: &str, line: usize) {
        let mut inner = Scan { text: text.as_bytes(), lines_before: line - 1, ..Scan::default() };
        inner.commands(None);
        for (name, line) in inner.found {
            self.found.entry(name).or_insert(line);
        }
        self.functions.extend(inner.functions);
    }
}

fn is_assignment(word: &str) -> bool {
    let Some((name, _)) = word.split_once('=') else { return false };
    let name = name.strip_suffix('+').unwrap_or(name);
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_[]$".contains(c))
}

mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        called_by_script(text).into_keys().collect()
    }

    #[test]
    fn commands_are_found_wherever_they_stand() {
        assert_eq!(
            names("a1 x; b1 | c1 && ! d1 || { e1; }\nif f1; then g1; fi"),
            ["a1", "b1", "c1", "d1", "e1", "f1", "g1"]
        );
        assert_eq!(names("x=$(a1 \"$(b1 c)\") y=1 d1 \"$(e1)\" <(f1)"), ["a1", "b1", "d1", "e1", "f1"]);
        assert_eq!(names("for i in $(a1); do b1 $i >c 2>&1 <d & done"), ["a1", "b1"]);
        assert_eq!(names("case $x in\n a | b) c1 ;;\n *) d1 ;; esac; e1"), ["c1", "d1", "e1"]);
        assert_eq!(names("case \"$1\" in d) e1 ;; # why\n f) (g1) ;;\n esac\nh1"), ["e1", "g1", "h1"]);
    }

    #[test]
    fn what_is_no_command_is_left_out() {
        assert_eq!(names("# a1\nb1 'c1; d1' \"e1 | f1\" # g1\n"), ["b1"]);
        assert_eq!(names("cat <<-'END'\n\ta1\n\tEND\nb1 <<<c1"), ["b1", "cat"]);
        assert_eq!(
            names("f() {\n a1\n}\nf x; cd y; [ -e z ] && [[ $a == b || c ]] && b1; ((i++)); echo $((1 + 2))"),
            ["a1", "b1"]
        );
        assert_eq!(names("all=(a1 $(b1) # c1\n d1)\nall+=(e1)\n$f1 g1; \"$h1\" i1"), ["b1"]);
    }

    #[test]
    fn words_that_run_their_argument_are_followed() {
        assert_eq!(
            names("sudo -n env A=b a1; exec b1; xargs -r c1"),
            ["a1", "b1", "c1", "env", "sudo", "xargs"]
        );
        assert_eq!(
            names("run 'a1 | b1'; bash -ec 'c1; d1' x; tests/e1 y; /bin/f1"),
            ["a1", "b1", "bash", "c1", "d1", "f1", "run"]
        );
    }

    #[test]
    fn recipes_are_read_as_scripts() {
        let text = "A := $(shell a1)\nall: b1 ## c1\n\t@d1 $(A)\n\tfor x in y; do\n\t\te1 $$(f1)\n\tdone\n";
        assert_eq!(names(&of_makefile(text)), ["d1", "e1", "f1"]);
    }

    #[test]
    fn rust_is_read_as_well() {
        let text = "Command::new(\"a1\"); Command::new(\"/sbin/b1\"); x.command(\"no\"); command(\"c1\");\n\
                    tpm.tool_ok(\"tpm2_d\", 1); sh(dir, \"e1 x\\nf1 | \\\n g1\"); push(\"h1\")";
        assert_eq!(
            called_by_rust(text).into_keys().collect::<Vec<_>>(),
            ["a1", "b1", "c1", "e1", "f1", "g1", "tpm2_d"]
        );
    }
}
