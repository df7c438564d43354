//! Reads YAML into a tree, for import manifests.
//!
//! A subset of YAML 1.2: one document of mappings, sequences and scalars. Anchors, aliases and tags are
//! refused: nothing in a manifest needs them, and aliases let a small file describe a huge tree. Events are
//! pulled one by one and put on an explicit stack, so nothing here recurses. Bounds: [`MAX_BYTES`],
//! [`MAX_DEPTH`], [`MAX_NODES`].

use std::borrow::Cow;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use super::decode::{Problem, ProblemKind, excerpt};
use super::tree::{Entry, Node, Position, Value};

/// Maximum size of an import manifest, in bytes: 1 MiB.
pub const MAX_BYTES: usize = 1 << 20;
/// Deepest nesting of an import manifest. A manifest needs seven levels.
pub const MAX_DEPTH: usize = 16;
/// Maximum number of nodes of an import manifest, not counting keys.
pub const MAX_NODES: usize = 1 << 16;

/// A container that is not closed yet.
enum Open<'a> {
    List { at: Position, items: Vec<Node<'a>> },
    Map { at: Position, entries: Vec<Entry<'a>>, key: Option<(Position, Cow<'a, str>)> },
}

/// Reads a file into a tree.
///
/// # Errors
/// All uses of refused features, and the first violation of YAML itself, in the order of the file. Includes a
/// tree if the file could be read to its end.
pub fn read(bytes: &[u8]) -> (Option<Node<'_>>, Vec<Problem>) {
    if bytes.len() > MAX_BYTES {
        let found = format!("{} bytes", bytes.len());
        let problem =
            problem(ProblemKind::TooLarge, Position::START, found, format!("at most {MAX_BYTES} bytes"));
        return (None, vec![problem]);
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let at = Position::of_byte(bytes, error.valid_up_to());
            let byte = bytes.get(error.valid_up_to()).copied().unwrap_or_default();
            let problem =
                problem(ProblemKind::Encoding, at, format!("the byte 0x{byte:02x}"), "UTF-8".into());
            return (None, vec![problem]);
        }
    };
    let mut composer = Composer::default();
    let mut parser = Parser::new_from_str(text);
    while let Some(event) = parser.next_event() {
        let (event, at) = match event {
            Ok((event, span)) => (event, position(&span.start)),
            Err(error) => {
                let at = position(error.marker());
                let found = format!("an error ({})", excerpt(error.info()));
                composer.problems.push(problem(ProblemKind::Syntax, at, found, "YAML".into()));
                return (None, composer.problems);
            }
        };
        if matches!(event, Event::StreamEnd) {
            break;
        }
        if !composer.take(event, at) {
            return (None, composer.problems);
        }
    }
    if composer.root.is_none() && composer.problems.is_empty() {
        let empty =
            problem(ProblemKind::Syntax, Position::START, "no document".into(), "one document".into());
        composer.problems.push(empty);
    }
    (composer.root, composer.problems)
}

fn problem(kind: ProblemKind, at: Position, found: String, allowed: String) -> Problem {
    Problem { at, field: String::new(), kind, found, allowed }
}

fn position(marker: &Marker) -> Position {
    // The parser counts columns from 0, messages from 1.
    Position { line: marker.line().max(1), column: marker.col() + 1, offset: marker.index() }
}

#[derive(Default)]
struct Composer<'a> {
    open: Vec<Open<'a>>,
    root: Option<Node<'a>>,
    problems: Vec<Problem>,
    documents: usize,
    nodes: usize,
}

impl<'a> Composer<'a> {
    /// Processes the next event. Returns whether to continue.
    fn take(&mut self, event: Event<'a>, at: Position) -> bool {
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    self.refuse(ProblemKind::Unsupported, at, "a second document", "one document");
                    return false;
                }
                true
            }
            Event::Alias(_) => {
                self.refuse(ProblemKind::Unsupported, at, "an alias", "values written out, without aliases");
                self.push(Value::Plain(Cow::Borrowed("")), at)
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.no_extras(anchor, tag.is_some(), at);
                let plain = style == ScalarStyle::Plain;
                self.push(if plain { Value::Plain(text) } else { Value::Text(text) }, at)
            }
            Event::SequenceStart(anchor, tag) => {
                self.no_extras(anchor, tag.is_some(), at);
                self.enter(Open::List { at, items: Vec::new() }, at)
            }
            Event::MappingStart(anchor, tag) => {
                self.no_extras(anchor, tag.is_some(), at);
                self.enter(Open::Map { at, entries: Vec::new(), key: None }, at)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::List { at, items }) => self.push(Value::List(items), at),
                Some(Open::Map { at, entries, .. }) => self.push(Value::Map(entries), at),
                None => true,
            },
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => true,
        }
    }

    fn refuse(&mut self, kind: ProblemKind, at: Position, found: &str, allowed: &str) {
        self.problems.push(problem(kind, at, found.into(), allowed.into()));
    }

    fn no_extras(&mut self, anchor: usize, tag: bool, at: Position) {
        if anchor > 0 {
            self.refuse(ProblemKind::Unsupported, at, "an anchor", "values without anchors");
        }
        if tag {
            self.refuse(ProblemKind::Unsupported, at, "a tag", "values without tags");
        }
    }

    fn enter(&mut self, container: Open<'a>, at: Position) -> bool {
        if self.open.len() >= MAX_DEPTH {
            let allowed = format!("at most {MAX_DEPTH} levels");
            self.refuse(ProblemKind::TooDeep, at, "a deeper level", &allowed);
            return false;
        }
        self.open.push(container);
        true
    }

    /// Inserts a finished node into its parent.
    fn push(&mut self, value: Value<'a>, at: Position) -> bool {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            self.refuse(ProblemKind::TooLarge, at, "more values", &format!("at most {MAX_NODES} values"));
            return false;
        }
        let node = Node { at, value };
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::List { items, .. }) => items.push(node),
            Some(Open::Map { entries, key, .. }) => match key.take() {
                Some((at, key)) => entries.push(Entry { at, key, node }),
                None => match node.value {
                    Value::Plain(text) | Value::Text(text) => *key = Some((at, text)),
                    Value::List(_) | Value::Map(_) => {
                        *key = Some((at, Cow::Borrowed("")));
                        self.refuse(
                            ProblemKind::Unsupported,
                            at,
                            "a key that is not a text",
                            "keys that are texts",
                        );
                    }
                },
            },
        }
        true
    }
}
