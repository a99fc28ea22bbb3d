//! Parses TOML into [`DocumentNode`]s.

use std::path::Path;

use toml::de::{DeTable, DeValue, Error};

use super::{DocumentNode, DocumentValue};
use crate::config::problem::{Problems, one_line};

/// Parses a whole TOML file.
pub(super) fn read(text: &str, path: &Path) -> Result<DocumentNode, Problems> {
    let lines = LineIndex::of(text);
    match DeTable::parse(text) {
        Ok(table) => Ok(DocumentNode { line: 1, value: self::table(table.into_inner(), &lines) }),
        Err(error) => Err(explain(&error, text, &lines, path)),
    }
}

fn explain(error: &Error, text: &str, lines: &LineIndex, path: &Path) -> Problems {
    let line = error.span().map(|span| lines.line(span.start));
    let content = line.and_then(|line| text.lines().nth(line - 1)).unwrap_or_default().trim();
    let what = one_line(error.message());
    let fix = if looks_like_yaml(text) {
        "this looks like YAML, so give the file a name that ends in .yaml"
    } else if what.contains("duplicate") {
        "keep one of the two"
    } else if content.ends_with('=') {
        "give the key a value"
    } else if unquoted_text(content) {
        "text must be in quotes"
    } else {
        "correct the line"
    };
    super::invalid(path, line, content, &format!("not valid TOML: {what}; {fix}"))
}

/// True if the file starts with `key:` or `---`, which TOML does not allow.
fn looks_like_yaml(text: &str) -> bool {
    let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    first.is_some_and(|line| {
        let key = line.split_once(':').map_or("", |(key, _)| key);
        line == "---" || (!key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
    })
}

/// True for `key = some text`.
fn unquoted_text(line: &str) -> bool {
    let Some((_, value)) = line.split_once('=') else { return false };
    value.trim_start().starts_with(|c: char| c.is_ascii_alphanumeric() || "/:.".contains(c))
}

fn table(table: DeTable<'_>, lines: &LineIndex) -> DocumentValue {
    let mut entries: Vec<_> = table.into_iter().collect();
    // The parser's map is sorted by key; messages follow the order of the file.
    entries.sort_by_key(|(key, _)| key.span().start);
    let entry = |(key, value): (toml::Spanned<_>, toml::Spanned<DeValue<'_>>)| {
        let line = lines.line(key.span().start);
        let key: std::borrow::Cow<'_, str> = key.into_inner();
        (key.into_owned(), DocumentNode { line, value: self::value(value.into_inner(), lines) })
    };
    DocumentValue::Table(entries.into_iter().map(entry).collect())
}

fn value(value: DeValue<'_>, lines: &LineIndex) -> DocumentValue {
    match value {
        DeValue::String(text) => DocumentValue::Text(text.into_owned()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => DocumentValue::Integer(number),
            // Larger than any key allows; a float is exact enough for the message.
            Err(_) => DocumentValue::Number(number.as_str().parse().unwrap_or(f64::INFINITY)),
        },
        DeValue::Float(number) => DocumentValue::Number(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(flag) => DocumentValue::Flag(flag),
        DeValue::Datetime(date) => DocumentValue::Date(date.to_string()),
        DeValue::Array(items) => DocumentValue::List(
            items
                .into_iter()
                .map(|item| DocumentNode {
                    line: lines.line(item.span().start),
                    value: self::value(item.into_inner(), lines),
                })
                .collect(),
        ),
        DeValue::Table(entries) => self::table(entries, lines),
    }
}

/// The byte offset at which each line of a text starts.
struct LineIndex(Vec<usize>);

impl LineIndex {
    fn of(text: &str) -> LineIndex {
        LineIndex(std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect())
    }

    /// The line, from 1, of a byte offset.
    fn line(&self, offset: usize) -> usize {
        self.0.partition_point(|&start| start <= offset)
    }
}
