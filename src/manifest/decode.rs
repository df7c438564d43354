//! Decodes trees into types: the common decoder of both manifests. It continues after a problem, so all
//! problems of a file are reported at once.

use std::collections::BTreeMap;
use std::fmt;

use super::rules::{self, Refused};
use super::tree::{Entry, Node, Position, Value};
use super::workload::{self, Workload};
use super::{MAX_INTEGER, Mount, Network, Port, Protocol, ServiceType, TargetName};
use crate::sorting;

/// The kinds of problem of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ProblemKind {
    /// Not YAML, or not JSON.
    Syntax,
    /// Not UTF-8.
    Encoding,
    /// More bytes or more nodes than a manifest may have.
    TooLarge,
    /// Nested deeper than a manifest may be.
    TooDeep,
    /// Legal in the format but not in a manifest: aliases, anchors, tags, several documents.
    Unsupported,
    /// A duplicate key in a mapping.
    DuplicateKey,
    /// A field that does not exist.
    UnknownField,
    /// A missing required field.
    MissingField,
    /// The wrong type, such as a list instead of a string.
    WrongType,
    /// The right type, but a value that is not allowed.
    BadValue,
    /// A second target of service type `hostfs`.
    SecondHostfs,
    /// No targets.
    NoTargets,
    /// A pin (`digest`, `size`) that does not match the image at the URL.
    PinMismatch,
}

/// One problem of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problem {
    /// Where it is.
    pub at: Position,
    /// Path of the field, such as `targets.hostfs.mounts[0].type`; empty for the file as a whole.
    pub field: String,
    /// Its kind.
    pub kind: ProblemKind,
    /// What was found, as text.
    pub found: String,
    /// What is allowed there, as text.
    pub allowed: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "found {}; allowed: {}", self.found, self.allowed)
    }
}

/// The format that a tree was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// A string may be unquoted.
    Yaml,
    /// A string is always quoted.
    Json,
}

/// The position of the decoder, as a list of steps from the root.
#[derive(Clone, Copy)]
pub struct Path<'p> {
    parent: Option<&'p Path<'p>>,
    step: Step<'p>,
}

#[derive(Clone, Copy)]
enum Step<'p> {
    Root,
    Field(&'p str),
    Item(usize),
}

impl<'p> Path<'p> {
    /// The whole file.
    pub const ROOT: Self = Self { parent: None, step: Step::Root };

    /// A field of this mapping.
    pub fn field(&'p self, name: &'p str) -> Self {
        Self { parent: Some(self), step: Step::Field(name) }
    }

    /// An item of this list, counted from 0.
    pub fn item(&'p self, index: usize) -> Self {
        Self { parent: Some(self), step: Step::Item(index) }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Root => Ok(()),
            Step::Item(index) => write!(f, "[{index}]"),
            Step::Field(name) => {
                if self.parent.is_some_and(|parent| !matches!(parent.step, Step::Root)) {
                    f.write_str(".")?;
                }
                f.write_str(&excerpt(name))
            }
        }
    }
}

/// Returns at most 80 characters of a string, for messages.
pub(super) fn excerpt(text: &str) -> String {
    rules::printable(text, 80)
}

/// Describes a node.
pub(super) fn describe(node: &Node<'_>) -> String {
    match &node.value {
        Value::Text(text) => format!("\"{}\"", excerpt(text)),
        Value::Plain(text) if is_null(text) => "nothing".into(),
        Value::Plain(text) => format!("`{}`", excerpt(text)),
        Value::List(items) => format!("a list of {}", items.len()),
        Value::Map(_) => "a mapping".into(),
    }
}

/// Returns whether an unquoted string is null (YAML 1.2, section 10.3.2; JSON has only `null`).
fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// The fields found in a mapping; each key once, all known.
pub struct Fields<'n, 'a> {
    at: Position,
    entries: BTreeMap<&'n str, &'n Entry<'a>>,
}

impl<'n, 'a> Fields<'n, 'a> {
    /// Returns the value of an optional field.
    pub fn get(&self, name: &str) -> Option<&'n Node<'a>> {
        self.entries.get(name).map(|entry| &entry.node)
    }
}

/// Decodes a tree and collects its problems.
pub struct Decoder {
    dialect: Dialect,
    /// The target found to be the root file system.
    hostfs: Option<String>,
    problems: Vec<Problem>,
}

/// The fields of a target that both manifests share.
pub(super) struct Service {
    pub version: String,
    pub service_type: ServiceType,
    pub network: Network,
    pub nsgroup: Option<String>,
    pub mounts: Option<Vec<Mount>>,
    pub workload: Workload,
}

/// Fields of older systems, and what stands in their place.
const FORMER: &[(&str, &str)] = &[(
    "storage",
    "`mounts` of the target with {type: volume, source: NAME, destination: DIR}, which keeps NAME across updates",
)];

const MOUNT_FIELDS: &[&str] = &["destination", "source", "type", "options"];
const NETWORK_FIELDS: &[&str] = &["type", "ipv4", "ipv6", "ports"];
const PORT_FIELDS: &[&str] = &["host", "container", "protocol", "address"];

impl Decoder {
    /// Creates a decoder without problems.
    pub fn new(dialect: Dialect) -> Self {
        Self { dialect, hostfs: None, problems: Vec::new() }
    }

    /// Returns the problems so far, in the order of the file.
    pub fn into_problems(mut self) -> Vec<Problem> {
        sorting::sort_by_key(&mut self.problems, |problem| (problem.at.line, problem.at.column));
        self.problems
    }

    /// Records a problem. Returns `None`, for the caller to return.
    pub fn problem<T>(
        &mut self,
        kind: ProblemKind,
        at: Position,
        path: &Path<'_>,
        found: impl Into<String>,
        allowed: impl Into<String>,
    ) -> Option<T> {
        let (found, allowed) = (found.into(), allowed.into());
        self.problems.push(Problem { at, field: path.to_string(), kind, found, allowed });
        None
    }

    /// Records a value that breaks a rule, at a field whose path is text already.
    pub(super) fn report(&mut self, at: Position, field: String, found: String, allowed: String) {
        self.problems.push(Problem { at, field, kind: ProblemKind::BadValue, found, allowed });
    }

    /// Decodes a value that a rule may refuse.
    pub fn checked<T>(&mut self, node: &Node<'_>, path: &Path<'_>, outcome: Result<T, Refused>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(refused) => {
                self.problem(ProblemKind::BadValue, node.at, path, describe(node), refused.allowed)
            }
        }
    }

    /// Decodes the fields of a mapping. `at` is the position of its key, to report missing fields.
    pub fn fields<'n, 'a>(
        &mut self,
        node: &'n Node<'a>,
        at: Position,
        path: &Path<'_>,
        known: &[&str],
    ) -> Option<Fields<'n, 'a>> {
        let Value::Map(all) = &node.value else {
            let allowed = format!("a mapping with {}", known.join(", "));
            return self.problem(ProblemKind::WrongType, node.at, path, describe(node), allowed);
        };
        let entries = self.unique(all, path);
        let entries = entries.into_iter().filter_map(|(key, entry)| {
            if known.contains(&key) {
                return Some((key, entry));
            }
            let found = format!("the unknown field `{}`", excerpt(key));
            let former = FORMER.iter().find(|(name, _)| *name == key);
            let allowed = former.map_or_else(|| known.join(", "), |(_, instead)| (*instead).to_string());
            self.problem(ProblemKind::UnknownField, entry.at, &path.field(key), found, allowed)
        });
        Some(Fields { at, entries: sorting::map(entries) })
    }

    /// Returns the entries of a mapping by key. Of duplicate keys the first one counts.
    pub(super) fn unique<'n, 'a>(
        &mut self,
        all: &'n [Entry<'a>],
        path: &Path<'_>,
    ) -> BTreeMap<&'n str, &'n Entry<'a>> {
        let mut entries: BTreeMap<&str, &Entry<'_>> = BTreeMap::new();
        for entry in all {
            let key = &*entry.key;
            if let Some(first) = entries.get(key) {
                let Position { line, column, .. } = first.at;
                let found = format!("a second `{}` (the first is at {line}:{column})", excerpt(key));
                self.problem::<()>(
                    ProblemKind::DuplicateKey,
                    entry.at,
                    &path.field(key),
                    found,
                    "each key once",
                );
            } else {
                entries.insert(key, entry);
            }
        }
        entries
    }

    /// Returns the value of a required field.
    pub fn required<'n, 'a>(
        &mut self,
        fields: &Fields<'n, 'a>,
        path: &Path<'_>,
        name: &str,
        allowed: &str,
    ) -> Option<&'n Node<'a>> {
        match fields.get(name) {
            Some(node) => Some(node),
            None => {
                let allowed = format!("{allowed} (required)");
                self.problem(ProblemKind::MissingField, fields.at, &path.field(name), "nothing", allowed)
            }
        }
    }

    /// A text.
    pub fn text<'n>(&mut self, node: &'n Node<'_>, path: &Path<'_>) -> Option<&'n str> {
        match &node.value {
            Value::Text(text) => Some(text),
            // In YAML a string may be unquoted, and is kept as written: `version: 1.10`.
            Value::Plain(text) if self.dialect == Dialect::Yaml && !is_null(text) => Some(text),
            _ => self.problem(ProblemKind::WrongType, node.at, path, describe(node), "a text"),
        }
    }

    /// Decodes a string that a rule parses.
    pub fn text_as<T>(
        &mut self,
        node: &Node<'_>,
        path: &Path<'_>,
        rule: impl FnOnce(&str) -> Result<T, Refused>,
    ) -> Option<T> {
        let text = self.text(node, path)?;
        self.checked(node, path, rule(text))
    }

    /// Decodes a string that a rule accepts, as written.
    pub(super) fn text_that(
        &mut self,
        node: &Node<'_>,
        path: &Path<'_>,
        rule: impl FnOnce(&str) -> Result<(), Refused>,
    ) -> Option<String> {
        self.text_as(node, path, |text| rule(text).map(|()| text.to_string()))
    }

    /// Decodes one of several words.
    pub fn word<T>(
        &mut self,
        node: &Node<'_>,
        path: &Path<'_>,
        words: &[&str],
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(node, path)?;
        match read(text) {
            Some(value) => Some(value),
            None => self.problem(ProblemKind::BadValue, node.at, path, describe(node), words.join(", ")),
        }
    }

    /// Decodes an integer from 1 to 2^53-1 in decimal digits, without sign or leading zero.
    pub fn integer(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<u64> {
        const ALLOWED: &str = "an integer from 1 to 9007199254740991";
        let Value::Plain(text) = &node.value else {
            return self.problem(ProblemKind::WrongType, node.at, path, describe(node), ALLOWED);
        };
        let decimal = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
        match text.parse::<u64>() {
            Ok(integer) if decimal && (1..=MAX_INTEGER).contains(&integer) => Some(integer),
            _ if text.parse::<i128>().is_ok() => {
                self.problem(ProblemKind::BadValue, node.at, path, describe(node), ALLOWED)
            }
            _ => self.problem(ProblemKind::WrongType, node.at, path, describe(node), ALLOWED),
        }
    }

    /// Decodes the items of a list, each with `one`; `None` if any of them is wrong.
    pub(super) fn list<T>(
        &mut self,
        node: &Node<'_>,
        path: &Path<'_>,
        mut one: impl FnMut(&mut Self, &Node<'_>, &Path<'_>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Value::List(items) = &node.value else {
            return self.problem(ProblemKind::WrongType, node.at, path, describe(node), "a list");
        };
        // Not `collect::<Option<_>>()`, which stops at the first problem.
        let decoded: Vec<Option<T>> =
            items.iter().enumerate().map(|(index, item)| one(self, item, &path.item(index))).collect();
        decoded.into_iter().collect()
    }

    /// Decodes an optional field: the outer option is `None` if it is present and wrong.
    pub fn optional<T>(
        &mut self,
        fields: &Fields<'_, '_>,
        path: &Path<'_>,
        name: &str,
        one: impl FnOnce(&mut Self, &Node<'_>, &Path<'_>) -> Option<T>,
    ) -> Option<Option<T>> {
        match fields.get(name) {
            None => Some(None),
            Some(node) => one(self, node, &path.field(name)).map(Some),
        }
    }

    /// Decodes the mapping of all targets.
    pub(super) fn targets<T>(
        &mut self,
        node: &Node<'_>,
        path: &Path<'_>,
        mut one: impl FnMut(&mut Self, &Entry<'_>, &Path<'_>) -> Option<T>,
    ) -> Option<BTreeMap<TargetName, T>> {
        let Value::Map(all) = &node.value else {
            let allowed = "a mapping of target names to targets";
            let kind = match &node.value {
                Value::Plain(text) if is_null(text) => ProblemKind::NoTargets,
                Value::List(items) if items.is_empty() => ProblemKind::NoTargets,
                _ => ProblemKind::WrongType,
            };
            return self.problem(kind, node.at, path, describe(node), allowed);
        };
        if all.is_empty() {
            return self.problem(ProblemKind::NoTargets, node.at, path, "no targets", "at least one target");
        }
        let mut targets = BTreeMap::new();
        let mut good = true;
        for entry in all {
            // In the order of the file, so that the second of two root file systems is reported.
            let path = path.field(&entry.key);
            let name = match entry.key.parse::<TargetName>() {
                Ok(name) if targets.contains_key(&name) => {
                    let found = format!("a second target `{name}`");
                    self.problem(ProblemKind::DuplicateKey, entry.at, &path, found, "each name once")
                }
                Ok(name) => Some(name),
                Err(refused) => {
                    let found = format!("the name `{}`", excerpt(&entry.key));
                    // Its content is decoded as well, to report its problems.
                    let _ = one(self, entry, &path);
                    self.problem(ProblemKind::BadValue, entry.at, &path, found, refused.allowed)
                }
            };
            match name {
                Some(name) => {
                    let target = one(self, entry, &path);
                    good &= target.is_some();
                    targets.insert(name, target);
                }
                None => good = false,
            }
        }
        let targets = sorting::map(targets.into_iter().filter_map(|(name, target)| Some((name, target?))));
        good.then_some(targets)
    }

    /// The fields of a target that both manifests share.
    pub(super) fn service(&mut self, fields: &Fields<'_, '_>, path: &Path<'_>) -> Option<Service> {
        let version = self
            .required(fields, path, "version", "the version of the target")
            .and_then(|node| self.text_that(node, &path.field("version"), rules::target_version));
        let service_type = self.service_type(fields, path);
        let network = self
            .required(fields, path, "network", "a mapping with type host, none or simple")
            .and_then(|node| self.network(node, &path.field("network")));
        let nsgroup = self
            .optional(fields, path, "nsgroup", |this, node, path| this.text_that(node, path, rules::nsgroup));
        let mounts =
            self.optional(fields, path, "mounts", |this, node, path| this.list(node, path, Self::mount));
        let workload = self.workload(fields, path);
        if let Some(other) = service_type.filter(|word| *word != ServiceType::Container) {
            for name in workload::FIELDS {
                if let Some(node) = fields.get(name) {
                    let found = format!("`{name}` with service_type {other}");
                    let allowed = "only with service_type container";
                    self.problem::<()>(ProblemKind::BadValue, node.at, &path.field(name), found, allowed);
                }
            }
        }
        Some(Service {
            version: version?,
            service_type: service_type?,
            network: network?,
            nsgroup: nsgroup?,
            mounts: mounts?,
            workload: workload?,
        })
    }

    fn service_type(&mut self, fields: &Fields<'_, '_>, path: &Path<'_>) -> Option<ServiceType> {
        let words = ServiceType::WORDS;
        let node = self.required(fields, path, "service_type", &words.join(", "))?;
        let field = path.field("service_type");
        let service_type = self.word(node, &field, words, ServiceType::from_word)?;
        if service_type == ServiceType::Hostfs {
            if let Some(first) = &self.hostfs {
                let found = format!("a second hostfs (the first is {first})");
                let allowed = "one target with service_type hostfs";
                return self.problem(ProblemKind::SecondHostfs, node.at, &field, found, allowed);
            }
            self.hostfs = Some(path.to_string());
        }
        Some(service_type)
    }

    fn network(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Network> {
        let fields = self.fields(node, node.at, path, NETWORK_FIELDS)?;
        let kind = self.required(&fields, path, "type", "host, none, simple");
        let kind = kind.and_then(|node| {
            let known = |word: &str| Network::TYPES.iter().copied().find(|known| *known == word);
            self.word(node, &path.field("type"), Network::TYPES, known)
        });
        let ipv4 =
            self.optional(&fields, path, "ipv4", |this, node, path| this.text_that(node, path, rules::ipv4));
        let ipv6 =
            self.optional(&fields, path, "ipv6", |this, node, path| this.text_that(node, path, rules::ipv6));
        let ports =
            self.optional(&fields, path, "ports", |this, node, path| this.list(node, path, Self::port));
        let (kind, ipv4, ipv6, ports) = (kind?, ipv4?, ipv6?, ports?);
        if kind == "simple" {
            return Some(Network::Simple { ipv4, ipv6, ports });
        }
        let network = if kind == "host" { Network::Host } else { Network::None };
        let mut good = true;
        for (name, entry) in fields.entries.iter().filter(|(name, _)| **name != "type") {
            let found = format!("`{name}` with type {kind}");
            self.problem::<()>(
                ProblemKind::BadValue,
                entry.at,
                &path.field(name),
                found,
                "only with type simple",
            );
            good = false;
        }
        good.then_some(network)
    }

    fn port(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Port> {
        let fields = self.fields(node, node.at, path, PORT_FIELDS)?;
        let host = self.port_number(&fields, path, "host");
        let container = self.port_number(&fields, path, "container");
        let protocol = self.optional(&fields, path, "protocol", |this, node, path| {
            this.word(node, path, Protocol::WORDS, Protocol::from_word)
        });
        let address = self.optional(&fields, path, "address", |this, node, path| {
            this.text_that(node, path, rules::host_address)
        });
        Some(Port { host: host?, container: container?, protocol: protocol?, address: address? })
    }

    fn port_number(&mut self, fields: &Fields<'_, '_>, path: &Path<'_>, name: &str) -> Option<u16> {
        let node = self.required(fields, path, name, "an integer from 1 to 65535")?;
        let number = self.integer(node, &path.field(name))?;
        self.checked(node, &path.field(name), rules::port(number))
    }

    fn mount(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Mount> {
        let fields = self.fields(node, node.at, path, MOUNT_FIELDS)?;
        let destination = self
            .required(&fields, path, "destination", "an absolute path")
            .and_then(|node| self.text_that(node, &path.field("destination"), rules::destination));
        let source = self.optional(&fields, path, "source", |this, node, path| {
            this.text_that(node, path, rules::mount_text)
        });
        let kind = self.optional(&fields, path, "type", |this, node, path| {
            this.text_that(node, path, rules::mount_type)
        });
        let options = self.optional(&fields, path, "options", |this, node, path| {
            this.list(node, path, |this, node, path| this.text_that(node, path, rules::mount_text))
        });
        Some(Mount { destination: destination?, source: source?, kind: kind?, options: options? })
    }
}

/// Returns the tree of the fields of a target that both manifests share, without empty options.
pub(super) fn service_tree<'a>(
    version: &'a str,
    service_type: ServiceType,
    network: &'a Network,
    nsgroup: &'a Option<String>,
    mounts: &'a Option<Vec<Mount>>,
    workload: &'a Workload,
) -> impl Iterator<Item = (&'a str, Option<Value<'a>>)> {
    let optional = |text: &'a Option<String>| text.as_deref().map(Value::text);
    let port = |port: &'a Port| {
        Value::map([
            ("host", Some(Value::integer(port.host.into()))),
            ("container", Some(Value::integer(port.container.into()))),
            ("protocol", port.protocol.map(|protocol| Value::text(protocol.as_str()))),
            ("address", optional(&port.address)),
        ])
    };
    let mount = |mount: &'a Mount| {
        let options = mount.options.as_ref();
        Value::map([
            ("destination", Some(Value::text(&mount.destination))),
            ("source", optional(&mount.source)),
            ("type", optional(&mount.kind)),
            ("options", options.map(|all| Value::list(all.iter().map(|one| Value::text(one))))),
        ])
    };
    let kind = ("type", Some(Value::text(network.type_name())));
    let network = match network {
        Network::Host | Network::None => Value::map([kind]),
        Network::Simple { ipv4, ipv6, ports } => {
            let ports = ports.as_ref().map(|ports| Value::list(ports.iter().map(port)));
            Value::map([kind, ("ipv4", optional(ipv4)), ("ipv6", optional(ipv6)), ("ports", ports)])
        }
    };
    [
        ("version", Some(Value::text(version))),
        ("service_type", Some(Value::text(service_type.as_str()))),
        ("network", Some(network)),
        ("nsgroup", optional(nsgroup)),
        ("mounts", mounts.as_ref().map(|mounts| Value::list(mounts.iter().map(mount)))),
    ]
    .into_iter()
    .chain(workload::tree(workload))
}
