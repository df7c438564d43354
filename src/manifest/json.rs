//! Reproducible JSON, and a strict reader for it.
//!
//! Written form: keys sorted by byte, no white space, no trailing newline, integers only, UTF-8; in strings
//! only `"` and `\` are escaped. This is the subset on which RFC 8785 (JCS) and OLPC canonical JSON agree, as
//! long as keys are ASCII, integers stay within ±(2^53-1), and strings contain no control characters. The
//! reader refuses everything else, so no two writers can disagree about the bytes of a manifest.
//!
//! The reader accepts any JSON in that subset (white space, any order of keys, any escapes). To require the
//! written form, compare the output of [`write()`] for the tree with the bytes.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::MAX_INTEGER;
use super::decode::{Problem, ProblemKind, excerpt};
use super::tree::{Entry, Node, Position, Value};

/// Maximum size of a document, in bytes: 4 MiB.
pub const MAX_BYTES: usize = 4 << 20;
/// Deepest nesting.
pub const MAX_DEPTH: usize = 32;
/// Maximum number of values, not counting keys; bounds the memory of a tree to a few tens of MiB.
pub const MAX_NODES: usize = 1 << 18;

/// Writes a tree in reproducible form.
pub fn write(node: &Node<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    write_node(node, &mut out);
    out
}

fn write_node(node: &Node<'_>, out: &mut Vec<u8>) {
    match &node.value {
        Value::Text(text) => write_text(text, out),
        Value::Plain(text) => out.extend_from_slice(text.as_bytes()),
        Value::List(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_node(item, out);
            }
            out.push(b']');
        }
        Value::Map(entries) => {
            let mut sorted: Vec<_> = entries.iter().collect();
            sorted.sort_unstable_by(|a, b| a.key.as_bytes().cmp(b.key.as_bytes()));
            out.push(b'{');
            for (index, entry) in sorted.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_text(&entry.key, out);
                out.push(b':');
                write_node(&entry.node, out);
            }
            out.push(b'}');
        }
    }
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let mut rest = text.as_bytes();
    while let Some(at) = rest.iter().position(|b| matches!(b, b'"' | b'\\')) {
        let (plain, special) = rest.split_at(at);
        out.extend_from_slice(plain);
        out.extend_from_slice(&[b'\\', special[0]]);
        rest = &special[1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

/// Reads a document.
///
/// # Errors
/// The first problem; reading stops there.
pub fn read(bytes: &[u8]) -> Result<Node<'_>, Problem> {
    let problem = |offset, kind, found: String, allowed: String| Problem {
        at: Position::of_byte(bytes, offset),
        field: String::new(),
        kind,
        found,
        allowed,
    };
    if bytes.len() > MAX_BYTES {
        let (found, allowed) = (format!("{} bytes", bytes.len()), format!("at most {MAX_BYTES} bytes"));
        return Err(problem(0, ProblemKind::TooLarge, found, allowed));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let byte = bytes.get(error.valid_up_to()).copied().unwrap_or_default();
        let found = format!("the byte 0x{byte:02x}");
        problem(error.valid_up_to(), ProblemKind::Encoding, found, "UTF-8".into())
    })?;
    let mut reader = Reader { text, bytes, at: 0, nodes: 0, line: 1, line_start: 0, depth: 0 };
    let document = reader.document();
    document.map_err(|Stop { at, kind, found, allowed }| problem(at, kind, found, allowed))
}

/// Why reading stops, at byte `at`.
struct Stop {
    at: usize,
    kind: ProblemKind,
    found: String,
    allowed: String,
}

struct Reader<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    nodes: usize,
    depth: usize,
    line: usize,
    line_start: usize,
}

impl<'a> Reader<'a> {
    fn document(&mut self) -> Result<Node<'a>, Stop> {
        self.skip_space();
        let node = self.value()?;
        self.skip_space();
        match self.peek() {
            None => Ok(node),
            Some(_) => Err(self.unexpected("the end of the file")),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn stop(&self, kind: ProblemKind, found: impl Into<String>, allowed: impl Into<String>) -> Stop {
        Stop { at: self.at, kind, found: found.into(), allowed: allowed.into() }
    }

    fn unexpected(&self, allowed: &str) -> Stop {
        let found = match self.text.get(self.at..).and_then(|rest| rest.chars().next()) {
            Some(found) => format!("`{}`", found.escape_debug()),
            None => "the end of the file".into(),
        };
        self.stop(ProblemKind::Syntax, found, allowed)
    }

    /// Returns the position of the next byte. Columns count bytes here, which are characters in a manifest.
    fn position(&self) -> Position {
        Position { line: self.line, column: self.at - self.line_start + 1, offset: self.at }
    }

    fn skip_space(&mut self) {
        while let Some(byte @ (b' ' | b'\t' | b'\r' | b'\n')) = self.peek() {
            self.at += 1;
            if byte == b'\n' {
                self.line += 1;
                self.line_start = self.at;
            }
        }
    }

    fn expect(&mut self, byte: u8, allowed: &str) -> Result<(), Stop> {
        if self.peek() != Some(byte) {
            return Err(self.unexpected(allowed));
        }
        self.at += 1;
        Ok(())
    }

    fn value(&mut self) -> Result<Node<'a>, Stop> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(self.stop(
                ProblemKind::TooLarge,
                "more values",
                format!("at most {MAX_NODES} values"),
            ));
        }
        let at = self.position();
        let value = match self.peek() {
            Some(b'{') => self.nested(Self::map)?,
            Some(b'[') => self.nested(Self::list)?,
            Some(b'"') => Value::Text(self.string()?),
            Some(b'-' | b'0'..=b'9') => Value::Plain(Cow::Borrowed(self.integer()?)),
            Some(b't') => self.literal("true")?,
            Some(b'f') => self.literal("false")?,
            Some(b'n') => self.literal("null")?,
            _ => return Err(self.unexpected("a value")),
        };
        Ok(Node { at, value })
    }

    fn nested(&mut self, read: fn(&mut Self) -> Result<Value<'a>, Stop>) -> Result<Value<'a>, Stop> {
        // Recursion is bounded here.
        if self.depth >= MAX_DEPTH {
            return Err(self.stop(
                ProblemKind::TooDeep,
                "a deeper level",
                format!("at most {MAX_DEPTH} levels"),
            ));
        }
        self.depth += 1;
        self.at += 1;
        let value = read(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn map(&mut self) -> Result<Value<'a>, Stop> {
        let mut entries: Vec<Entry<'a>> = Vec::new();
        // Build a set only once a key is out of order, which never happens in reproducible JSON.
        let mut seen: Option<BTreeSet<Cow<'a, str>>> = None;
        self.skip_space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Value::Map(entries));
        }
        loop {
            self.skip_space();
            let at = self.position();
            if self.peek() != Some(b'"') {
                return Err(self.unexpected("a key in quotes"));
            }
            let key = self.string()?;
            if !key.is_ascii() {
                let stop = self.stop(
                    ProblemKind::Unsupported,
                    format!("the key `{}`", excerpt(&key)),
                    "keys in ASCII",
                );
                return Err(Stop { at: at.offset, ..stop });
            }
            let in_order = entries.last().is_none_or(|last| last.key < key);
            if seen.is_none() && !in_order {
                seen = Some(entries.iter().map(|entry| entry.key.clone()).collect());
            }
            if seen.as_mut().is_some_and(|seen| !seen.insert(key.clone())) {
                let found = format!("a second `{}`", excerpt(&key));
                let stop = self.stop(ProblemKind::DuplicateKey, found, "each key once");
                return Err(Stop { at: at.offset, ..stop });
            }
            self.skip_space();
            self.expect(b':', "`:`")?;
            self.skip_space();
            let node = self.value()?;
            entries.push(Entry { at, key, node });
            self.skip_space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => break,
                _ => return Err(self.unexpected("`,` or `}`")),
            }
        }
        self.at += 1;
        Ok(Value::Map(entries))
    }

    fn list(&mut self) -> Result<Value<'a>, Stop> {
        let mut items = Vec::new();
        self.skip_space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Value::List(items));
        }
        loop {
            self.skip_space();
            items.push(self.value()?);
            self.skip_space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => break,
                _ => return Err(self.unexpected("`,` or `]`")),
            }
        }
        self.at += 1;
        Ok(Value::List(items))
    }

    fn literal(&mut self, word: &'static str) -> Result<Value<'a>, Stop> {
        if !self.bytes[self.at..].starts_with(word.as_bytes()) {
            return Err(self.unexpected("a value"));
        }
        self.at += word.len();
        Ok(Value::Plain(Cow::Borrowed(word)))
    }

    fn integer(&mut self) -> Result<&'a str, Stop> {
        let start = self.at;
        let allowed = "an integer from -9007199254740991 to 9007199254740991";
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let digits = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        let fraction = matches!(self.peek(), Some(b'.' | b'e' | b'E'));
        while matches!(self.peek(), Some(b'.' | b'e' | b'E' | b'+' | b'-' | b'0'..=b'9')) {
            self.at += 1;
        }
        let text = self.text.get(start..self.at).unwrap_or_default();
        let magnitude = text.get(digits - start..).unwrap_or_default();
        let leading_zero = magnitude.len() > 1 && magnitude.starts_with('0');
        let in_range = magnitude.parse::<u64>().is_ok_and(|number| number <= MAX_INTEGER);
        if fraction || leading_zero || !in_range || text == "-0" {
            let stop = self.stop(ProblemKind::BadValue, format!("`{}`", excerpt(text)), allowed);
            return Err(Stop { at: start, ..stop });
        }
        Ok(text)
    }

    /// Reads a quoted string; borrowed if it contains no escape.
    fn string(&mut self) -> Result<Cow<'a, str>, Stop> {
        self.at += 1;
        let start = self.at;
        let mut owned: Option<String> = None;
        let mut run = start;
        loop {
            match self.peek() {
                None => return Err(self.unexpected("`\"`")),
                Some(b'"') => {
                    let tail = self.text.get(run..self.at).unwrap_or_default();
                    self.at += 1;
                    return Ok(match owned {
                        None => self.control_free(Cow::Borrowed(tail), start)?,
                        Some(mut text) => {
                            text.push_str(tail);
                            self.control_free(Cow::Owned(text), start)?
                        }
                    });
                }
                Some(b'\\') => {
                    let text = owned.get_or_insert_default();
                    text.push_str(self.text.get(run..self.at).unwrap_or_default());
                    self.at += 1;
                    let decoded = self.escape()?;
                    owned.get_or_insert_default().push(decoded);
                    run = self.at;
                }
                Some(0..0x20) => return Err(self.unexpected("a text without control characters")),
                Some(_) => self.at += 1,
            }
        }
    }

    fn control_free(&self, text: Cow<'a, str>, start: usize) -> Result<Cow<'a, str>, Stop> {
        if !text.chars().any(char::is_control) {
            return Ok(text);
        }
        let found = format!("\"{}\"", excerpt(&text));
        let stop = self.stop(ProblemKind::Unsupported, found, "a text without control characters");
        Err(Stop { at: start, ..stop })
    }

    /// Reads the character of an escape, after its `\`.
    fn escape(&mut self) -> Result<char, Stop> {
        let decoded = match self.peek() {
            Some(byte @ (b'"' | b'\\' | b'/')) => byte as char,
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                self.at += 1;
                return self.unicode_escape();
            }
            _ => return Err(self.unexpected("an escape: one of \" \\ / b f n r t u")),
        };
        self.at += 1;
        Ok(decoded)
    }

    fn unicode_escape(&mut self) -> Result<char, Stop> {
        let at = self.at;
        let first = self.hex4()?;
        let code = match first {
            // A pair of surrogates (RFC 8259, section 7).
            0xd800..=0xdbff if self.bytes[self.at..].starts_with(b"\\u") => {
                self.at += 2;
                match self.hex4()? {
                    second @ 0xdc00..=0xdfff => 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00),
                    _ => first,
                }
            }
            _ => first,
        };
        char::from_u32(code).ok_or_else(|| {
            let stop =
                self.stop(ProblemKind::Encoding, format!("the lone surrogate \\u{first:04x}"), "pairs");
            Stop { at, ..stop }
        })
    }

    fn hex4(&mut self) -> Result<u32, Stop> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|byte| (byte as char).to_digit(16));
            code = code << 4 | digit.ok_or_else(|| self.unexpected("a hex digit"))?;
            self.at += 1;
        }
        Ok(code)
    }
}
