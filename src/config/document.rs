//! A configuration file as a tree of values, each with its line.
//!
//! [`toml`] and [`yaml`] make the same tree, so that the later stages and their messages are the same for both formats.
//! `schema_check` checks the tree against the table of keys; `file` converts it into types.

mod toml;
mod yaml;

use std::fmt;
use std::path::Path;

use super::problem::{Problems, quoted};

/// The notation of a configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notation {
    Toml,
    Yaml,
}

impl Notation {
    /// The notation that the file's name selects: YAML for `*.yaml` and `*.yml` in any case, otherwise TOML.
    pub(super) fn of(path: &Path) -> Notation {
        match path.extension() {
            Some(end) if end.eq_ignore_ascii_case("yaml") || end.eq_ignore_ascii_case("yml") => Notation::Yaml,
            _ => Notation::Toml,
        }
    }

    /// `key` set to `value` in this notation.
    pub(super) fn assignment(self, key: &str, value: &str) -> String {
        match self {
            Notation::Toml => format!("{key} = {value}"),
            Notation::Yaml => format!("{key}: {value}"),
        }
    }
}

/// A file's content.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) notation: Notation,
    pub(super) root: DocumentNode,
}

/// A value and its line, from 1. The line of a table's entry is that of its key.
#[derive(Debug)]
pub(super) struct DocumentNode {
    pub(super) line: usize,
    pub(super) value: DocumentValue,
}

/// The values of both notations.
#[derive(Debug)]
pub(super) enum DocumentValue {
    /// YAML's null: a key without a value.
    Nothing,
    Flag(bool),
    Integer(i128),
    Number(f64),
    Text(String),
    /// A date or time of TOML. No key takes one.
    Date(String),
    List(Vec<DocumentNode>),
    /// In the file's order.
    Table(Vec<(String, DocumentNode)>),
}

impl Document {
    /// Parses a file's text in the notation that its name selects.
    ///
    /// # Errors
    /// The first violation of the notation, with its line.
    pub(super) fn read(text: &str, path: &Path) -> Result<Document, Problems> {
        // Some editors put a byte order mark first, which UTF-8 does not need.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let notation = Notation::of(path);
        let root = match notation {
            Notation::Toml => toml::read(text, path)?,
            Notation::Yaml => yaml::read(text, path)?,
        };
        Ok(Document { notation, root })
    }

    /// The value of a key at the top of the file.
    pub(super) fn top(&self, key: &str) -> Option<&DocumentValue> {
        match &self.root.value {
            DocumentValue::Table(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| &node.value),
            _ => None,
        }
    }

    /// The line of a key; if it is not in the file, the line of the nearest table or list around it.
    pub(super) fn line(&self, key: &KeyPath) -> Option<usize> {
        let mut node = &self.root;
        let mut line = None;
        for step in &key.0 {
            let next = match (step, &node.value) {
                (KeyStep::Key(key), DocumentValue::Table(entries)) => {
                    entries.iter().find(|(name, _)| name == key).map(|(_, node)| node)
                }
                (KeyStep::Index(index), DocumentValue::List(items)) => items.get(*index),
                _ => None,
            };
            let Some(next) = next else { break };
            node = next;
            line = Some(node.line);
        }
        line
    }
}

/// The problem of a file with a syntax error; `content` is the line that has it.
fn invalid(path: &Path, line: Option<usize>, content: &str, message: &str) -> Problems {
    match content {
        "" => Problems::one(path, line, message),
        _ => Problems::one(path, line, format!("{} is {message}", quoted(content))),
    }
}

impl fmt::Display for DocumentValue {
    /// The kind and the value, shortened for a message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DocumentValue::Nothing => f.write_str("nothing"),
            DocumentValue::Flag(flag) => write!(f, "{flag}"),
            DocumentValue::Integer(number) => write!(f, "the number {number}"),
            DocumentValue::Number(number) => write!(f, "the number {number:?}"),
            DocumentValue::Text(text) => write!(f, "the text {}", quoted(text)),
            DocumentValue::Date(date) => write!(f, "the date {}", quoted(date)),
            DocumentValue::List(items) => write!(f, "a list of {}", items.len()),
            DocumentValue::Table(_) => f.write_str("a table"),
        }
    }
}

/// One step down the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum KeyStep {
    Key(String),
    Index(usize),
}

impl From<&str> for KeyStep {
    fn from(key: &str) -> KeyStep {
        KeyStep::Key(key.to_owned())
    }
}

impl From<usize> for KeyStep {
    fn from(index: usize) -> KeyStep {
        KeyStep::Index(index)
    }
}

/// The path of a value. Shown as `listeners[0].downstream[2].address`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct KeyPath(pub(super) Vec<KeyStep>);

impl KeyPath {
    /// This key's path with one more step.
    pub(super) fn then(&self, step: impl Into<KeyStep>) -> KeyPath {
        let mut longer = self.clone();
        longer.0.push(step.into());
        longer
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, step) in self.0.iter().enumerate() {
            match step {
                KeyStep::Index(index) => write!(f, "[{index}]")?,
                KeyStep::Key(key) => {
                    let dot = if n == 0 { "" } else { "." };
                    let plain = key.len() <= 40 && key.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
                    match plain && !key.is_empty() {
                        true => write!(f, "{dot}{key}")?,
                        false => write!(f, "{dot}{}", quoted(key))?,
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = "\u{feff}# comment\nhealth.enabled = true\n\n[[listeners]]\nname = \"a\"\n\n  [[listeners.downstream]]\n  address = \"x\"\n[[listeners]]\nname = \"b\"\nsettings = { workers = 1_000 }\n";
    const YAML: &str = "\u{feff}# comment\nhealth: {enabled: true}\n\nlisteners:\n- name: a\n\n  downstream:\n    - address: x\n-\n  name: b\n  settings:\n    workers: 1000\n";

    fn lines(text: &str, file: &str) -> Vec<Option<usize>> {
        let document = Document::read(text, Path::new(file)).unwrap();
        let listeners = KeyPath::default().then("listeners");
        let (first, second) = (listeners.then(0), listeners.then(1));
        [
            KeyPath::default().then("health").then("enabled"),
            first.then("name"),
            first.then("downstream").then(0),
            first.then("downstream").then(0).then("address"),
            // Not in the file: the nearest around it.
            first.then("downstream").then(0).then("weight"),
            second.then("name"),
            second.then("settings").then("workers"),
            KeyPath::default().then("metrics").then("bind"),
        ]
        .iter()
        .map(|key| document.line(key))
        .collect()
    }

    #[test]
    fn every_value_knows_its_line() {
        let all = [Some(2), Some(5), Some(7), Some(8), Some(7), Some(10), Some(11), None];
        assert_eq!(lines(TOML, "c.toml"), all);
        let all = [Some(2), Some(5), Some(8), Some(8), Some(8), Some(10), Some(12), None];
        assert_eq!(lines(YAML, "c.yml"), all);
    }

    #[test]
    fn the_name_decides_the_notation() {
        for (name, format) in [
            ("c.yaml", Notation::Yaml),
            ("c.YML", Notation::Yaml),
            ("c.toml", Notation::Toml),
            ("c", Notation::Toml),
            ("yaml", Notation::Toml),
            ("c.yaml.bak", Notation::Toml),
        ] {
            assert_eq!(Notation::of(Path::new(name)), format, "{name}");
        }
    }

    #[test]
    fn odd_keys_are_quoted_in_paths() {
        let path = KeyPath::default().then("listeners").then(3).then("a b").then("bind");
        assert_eq!(path.to_string(), "listeners[3].\"a b\".bind");
    }
}
