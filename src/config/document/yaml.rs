//! Parses YAML into [`DocumentNode`]s.
//!
//! Scalars follow YAML 1.2: only `true` and `false` are booleans, and `010` is text. A file holds one document. Anchors,
//! aliases and merge keys work, within limits that keep a small file from becoming a large tree.

use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Error, MessageFormatter, Options, Spanned, UserMessageFormatter};

use super::{DocumentNode, DocumentValue};
use crate::config::problem::{Problems, one_line};

/// The deepest nesting accepted. No key is nested deeper than five; the limit keeps recursion from exhausting the stack.
const MAX_DEPTH: usize = 32;

/// Most keys and values that aliases may repeat: enough for 256 listeners that share a list of 150 downstreams. Nested
/// aliases, which grow exponentially, soon reach it.
const MAX_REPEATED: usize = 300_000;

/// Parses a whole YAML file. An empty file is an empty table.
pub(super) fn read(text: &str, path: &Path) -> Result<DocumentNode, Problems> {
    match serde_saphyr::from_str_with_options::<DocumentNode>(text, options()) {
        Ok(DocumentNode { value: DocumentValue::Nothing, .. }) => Ok(empty()),
        Ok(node) => Ok(node),
        Err(error) => match error.without_snippet() {
            Error::Eof { .. } => Ok(empty()),
            error => Err(explain(error, text, path)),
        },
    }
}

fn empty() -> DocumentNode {
    DocumentNode { line: 1, value: DocumentValue::Table(Vec::new()) }
}

fn options() -> Options {
    let mut options = Options::default();
    options.with_snippet = false;
    options.strict_booleans = true;
    options.leading_zero_numbers_as_strings = true;
    options.alias_limits.max_total_replayed_events = MAX_REPEATED;
    if let Some(budget) = &mut options.budget {
        budget.max_depth = MAX_DEPTH;
        budget.max_recorded_anchor_events = MAX_REPEATED;
        // Many listeners may share one list.
        budget.enforce_alias_anchor_ratio = false;
        // The file's size limits these.
        budget.max_events = usize::MAX;
        budget.max_nodes = usize::MAX;
    }
    options
}

fn explain(error: &Error, text: &str, path: &Path) -> Problems {
    let line = error.location().and_then(|at| usize::try_from(at.line()).ok()).filter(|&line| line > 0);
    let content = line.and_then(|line| text.lines().nth(line - 1)).unwrap_or_default().trim();
    let mut cause = error;
    while let Error::AliasError { error, .. } | Error::WithSnippet { error, .. } = cause {
        cause = error;
    }
    let too_large = matches!(cause, Error::Budget { .. } | Error::AliasReplayLimitExceeded { .. });
    let what = match too_large {
        true => "nested too deep, or too much repeated by aliases".to_owned(),
        false => one_line(&UserMessageFormatter.format_message(cause)),
    };
    let fix = match cause {
        _ if too_large => "write the values out",
        Error::MultipleDocuments { .. } => "keep one, and remove the `---` between them",
        Error::DuplicateMappingKey { .. } => "keep one of the two",
        _ if what.contains("found a tab") => "indent with spaces",
        _ if content.contains(": [") && content.contains("]:") => "put the address in quotes",
        _ => "correct the line or its indentation",
    };
    super::invalid(path, line, content, &format!("not valid YAML: {what}; {fix}"))
}

impl<'de> Deserialize<'de> for DocumentNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DocumentNode, D::Error> {
        let spanned = Spanned::<DocumentValue>::deserialize(deserializer)?;
        Ok(DocumentNode { line: line(&spanned), value: spanned.value })
    }
}

fn line<T>(spanned: &Spanned<T>) -> usize {
    usize::try_from(spanned.referenced.line()).unwrap_or(usize::MAX)
}

impl<'de> Deserialize<'de> for DocumentValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DocumentValue, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = DocumentValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<DocumentValue, E> {
        Ok(DocumentValue::Nothing)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<DocumentValue, E> {
        Ok(DocumentValue::Flag(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<DocumentValue, E> {
        Ok(DocumentValue::Integer(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<DocumentValue, E> {
        Ok(DocumentValue::Integer(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<DocumentValue, E> {
        Ok(DocumentValue::Number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<DocumentValue, E> {
        Ok(DocumentValue::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<DocumentValue, E> {
        Ok(DocumentValue::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<DocumentValue, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(DocumentValue::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<DocumentValue, A::Error> {
        let mut table = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let node: DocumentNode = entries.next_value()?;
            table.push((key.value.clone(), DocumentNode { line: line(&key), value: node.value }));
        }
        Ok(DocumentValue::Table(table))
    }
}
