//! The tree that both manifest formats are read into: nodes with positions, not yet decoded.

use std::borrow::Cow;

/// A position in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Position {
    /// Line, counted from 1.
    pub line: usize,
    /// Column in characters, counted from 1.
    pub column: usize,
    /// Distance from the start of the file: in bytes for JSON, in characters for YAML.
    pub offset: usize,
}

impl Position {
    /// The first character of a file.
    pub const START: Self = Self { line: 1, column: 1, offset: 0 };

    /// Returns the position of byte `offset` of `bytes`, with `offset` unchanged.
    pub fn of_byte(bytes: &[u8], offset: usize) -> Self {
        let before = bytes.get(..offset).unwrap_or(bytes);
        let line_start = before.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
        let column = String::from_utf8_lossy(&before[line_start..]).chars().count() + 1;
        Self { line, column, offset }
    }
}

/// One node of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node<'a> {
    /// Where it begins.
    pub at: Position,
    /// What it is.
    pub value: Value<'a>,
}

impl<'a> Node<'a> {
    /// The value of a key, if this is a mapping that has it.
    pub fn field(&self, name: &str) -> Option<&Node<'a>> {
        let Value::Map(entries) = &self.value else { return None };
        entries.iter().find(|entry| entry.key == name).map(|entry| &entry.node)
    }

    /// An item, counted from 0, if this is a list that has it.
    pub fn item(&self, index: usize) -> Option<&Node<'a>> {
        let Value::List(items) = &self.value else { return None };
        items.get(index)
    }
}

/// The value of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'a> {
    /// Text that is always a string: quoted in YAML, a string in JSON.
    Text(Cow<'a, str>),
    /// Unquoted text: a number, a boolean, null or, in YAML, also a string.
    Plain(Cow<'a, str>),
    /// A sequence.
    List(Vec<Node<'a>>),
    /// A mapping, in the order of the file. A reader may leave duplicate keys in it.
    Map(Vec<Entry<'a>>),
}

/// One entry of a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Where the key begins.
    pub at: Position,
    /// The key.
    pub key: Cow<'a, str>,
    /// The value.
    pub node: Node<'a>,
}

impl<'a> From<Value<'a>> for Node<'a> {
    fn from(value: Value<'a>) -> Self {
        Self { at: Position::default(), value }
    }
}

impl<'a> Value<'a> {
    /// A string node that borrows.
    pub fn text(text: &'a str) -> Self {
        Self::Text(Cow::Borrowed(text))
    }

    /// An integer node.
    pub fn integer(integer: u64) -> Self {
        Self::Plain(Cow::Owned(integer.to_string()))
    }

    /// A list node.
    pub fn list(items: impl IntoIterator<Item = Value<'a>>) -> Self {
        Self::List(items.into_iter().map(Node::from).collect())
    }

    /// A mapping node of the entries that are present.
    pub fn map(entries: impl IntoIterator<Item = (&'a str, Option<Value<'a>>)>) -> Self {
        let entry = |(key, value): (&'a str, Option<Value<'a>>)| {
            Some(Entry { at: Position::default(), key: Cow::Borrowed(key), node: value?.into() })
        };
        Self::Map(entries.into_iter().filter_map(entry).collect())
    }
}
