//! Decodes the fields of a container ([`super::workload`]).

use std::collections::BTreeMap;

use super::TargetName;
use super::decode::{Decoder, Fields, Path, ProblemKind, describe, excerpt};
use super::rules;
use super::tree::{Node, Value};
use super::workload::{Health, Ready, Resources, Restart, Run, Workload, Writable};

const HEALTH_FIELDS: &[&str] = &["command", "interval", "timeout", "retries", "start"];
const RUN_FIELDS: &[&str] = &["command", "environment", "init", "stop_seconds", "restart", "writable"];
const RESOURCE_FIELDS: &[&str] = &["memory", "tasks", "cpu"];

impl Decoder {
    /// The fields that only a container has.
    pub(super) fn workload(&mut self, fields: &Fields<'_, '_>, path: &Path<'_>) -> Option<Workload> {
        let needs = self.optional(fields, path, "needs", |this, node, path| {
            this.list(node, path, |this, node, path| this.text_as(node, path, str::parse::<TargetName>))
        });
        let health = self.optional(fields, path, "health", Self::health);
        let ready = self.optional(fields, path, "ready", |this, node, path| {
            this.word(node, path, Ready::WORDS, Ready::from_word)
        });
        let run = self.optional(fields, path, "run", Self::run);
        let resources = self.optional(fields, path, "resources", Self::resources);
        let mut texts = |name, rule: fn(&str) -> Result<(), rules::Refused>| {
            self.optional(fields, path, name, |this, node, path| {
                this.list(node, path, |this, node, path| this.text_that(node, path, rule))
            })
        };
        let capabilities = texts("capabilities", rules::capability);
        let devices = texts("devices", rules::device);
        let secrets = texts("secrets", rules::name);
        if let (Some(Some(_)), Some(node)) = (&health, fields.get("ready")) {
            let field = path.field("ready");
            self.problem::<()>(
                ProblemKind::BadValue,
                node.at,
                &field,
                "`ready` beside `health`",
                "one of the two",
            );
        }
        Some(Workload {
            needs: needs?,
            health: health?,
            ready: ready?,
            run: run?,
            resources: resources?,
            capabilities: capabilities?,
            devices: devices?,
            secrets: secrets?,
        })
    }

    fn health(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Health> {
        let fields = self.fields(node, node.at, path, HEALTH_FIELDS)?;
        let command = self
            .required(&fields, path, "command", "a list of a program and its arguments")
            .and_then(|node| self.command(node, &path.field("command")));
        let mut time = |name| {
            self.optional(&fields, path, name, |this, node, path| {
                this.text_that(node, path, |text| rules::time(text).map(|_| ()))
            })
        };
        let (interval, timeout, start) = (time("interval"), time("timeout"), time("start"));
        let retries = self.optional(&fields, path, "retries", |this, node, path| {
            let number = this.integer(node, path)?;
            this.checked(node, path, rules::up_to_1000(number))
        });
        Some(Health {
            command: command?,
            interval: interval?,
            timeout: timeout?,
            retries: retries?,
            start: start?,
        })
    }

    fn run(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Run> {
        let fields = self.fields(node, node.at, path, RUN_FIELDS)?;
        let command = self.optional(&fields, path, "command", Self::command);
        let environment = self.optional(&fields, path, "environment", Self::environment);
        let init = self.optional(&fields, path, "init", Self::boolean);
        let stop_seconds = self.optional(&fields, path, "stop_seconds", |this, node, path| {
            let number = this.integer(node, path)?;
            this.checked(node, path, rules::stop_seconds(number))
        });
        let restart = self.optional(&fields, path, "restart", |this, node, path| {
            this.word(node, path, Restart::WORDS, Restart::from_word)
        });
        let writable = self.optional(&fields, path, "writable", |this, node, path| {
            if let Value::Plain(text) = &node.value
                && let Some(writable) = boolean(text)
            {
                return Some(if writable { Writable::Yes } else { Writable::No });
            }
            this.text_as(node, path, rules::writable).map(Writable::Size)
        });
        Some(Run {
            command: command?,
            environment: environment?,
            init: init?,
            stop_seconds: stop_seconds?,
            restart: restart?,
            writable: writable?,
        })
    }

    fn resources(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Resources> {
        let fields = self.fields(node, node.at, path, RESOURCE_FIELDS)?;
        let memory = self.optional(&fields, path, "memory", |this, node, path| {
            this.text_that(node, path, |text| rules::size(text).map(|_| ()))
        });
        let tasks = self.optional(&fields, path, "tasks", |this, node, path| this.integer(node, path));
        let cpu = self
            .optional(&fields, path, "cpu", |this, node, path| this.text_that(node, path, rules::percent));
        Some(Resources { memory: memory?, tasks: tasks?, cpu: cpu? })
    }

    /// A program and its arguments.
    fn command(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<Vec<String>> {
        let command =
            self.list(node, path, |this, node, path| this.text_that(node, path, rules::argument))?;
        if command.first().is_none_or(String::is_empty) {
            let found = if command.is_empty() { "an empty list" } else { "a program without a name" };
            let allowed = "a list of a program and its arguments";
            return self.problem(ProblemKind::BadValue, node.at, path, found, allowed);
        }
        Some(command)
    }

    fn environment(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<BTreeMap<String, String>> {
        const ALLOWED: &str = "a mapping of names of variables ([A-Za-z_][A-Za-z0-9_]*) to texts";
        let Value::Map(all) = &node.value else {
            return self.problem(ProblemKind::WrongType, node.at, path, describe(node), ALLOWED);
        };
        let mut environment = BTreeMap::new();
        let mut good = true;
        for (key, entry) in self.unique(all, path) {
            let path = path.field(key);
            let value = self.text_that(&entry.node, &path, rules::argument);
            if rules::variable(key).is_err() {
                let found = format!("the name `{}`", excerpt(key));
                self.problem::<()>(ProblemKind::BadValue, entry.at, &path, found, ALLOWED);
                good = false;
            }
            match value {
                Some(value) => _ = environment.insert(key.to_string(), value),
                None => good = false,
            }
        }
        good.then_some(environment)
    }

    fn boolean(&mut self, node: &Node<'_>, path: &Path<'_>) -> Option<bool> {
        match &node.value {
            Value::Plain(text) if boolean(text).is_some() => boolean(text),
            _ => self.problem(ProblemKind::WrongType, node.at, path, describe(node), "true, false"),
        }
    }
}

/// A boolean of YAML 1.2 (section 10.3.2) in its JSON form.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}
