//! Checks a document against the table of keys: unknown and missing keys, wrong types, numbers out of range, texts that
//! are not among the choices. `rules` checks what takes several keys, and the inside of texts.

use super::document::{Document, DocumentNode, DocumentValue, KeyPath, KeyStep, Notation};
use super::keys::{self, KeyKind, KeySpec, WhenAbsent};
use super::problem::{Problems, quoted};

/// Adds every mistake found to `problems`.
pub(super) fn check(document: &Document, problems: &mut Problems) {
    let mut checker = SchemaChecker { document, problems, at: KeyPath::default() };
    match &document.root.value {
        DocumentValue::Table(entries) => checker.table(keys::top(), entries, document.root.line),
        other => checker.fault(
            document.root.line,
            format!("expected keys such as `listeners` at the top of the file, got {other}; start with listeners:"),
        ),
    }
}

struct SchemaChecker<'a> {
    document: &'a Document,
    problems: &'a mut Problems,
    /// The path of the value being checked.
    at: KeyPath,
}

impl SchemaChecker<'_> {
    fn fault(&mut self, line: usize, message: String) {
        let key = Some(self.at.to_string()).filter(|key| !key.is_empty());
        self.problems.add(Some(line), key, message);
    }

    /// Runs `check` one step further down, unless there are too many problems already.
    fn within(&mut self, step: impl Into<KeyStep>, check: impl FnOnce(&mut Self)) {
        if self.problems.is_full() {
            return;
        }
        self.at.0.push(step.into());
        check(self);
        self.at.0.pop();
    }

    fn table(&mut self, keys: &'static [KeySpec], entries: &[(String, DocumentNode)], line: usize) {
        // Keys present under a misspelt name: they are not reported as missing too.
        let mut meant = Vec::new();
        for (name, node) in entries {
            if self.problems.is_full() {
                return;
            }
            let known = keys.iter().find(|key| key.name == *name);
            let near = match known {
                Some(_) => None,
                None => nearest(name, keys.iter().map(|key| key.name.as_str())),
            };
            self.within(name.as_str(), |checker| match (known, near) {
                (Some(key), _) => checker.value(key, node),
                (None, Some(near)) => checker.fault(node.line, format!("unknown key; did you mean `{near}`?")),
                (None, None) => checker.fault(node.line, unknown(name, keys)),
            });
            meant.extend(near);
        }
        for key in keys {
            let there = entries.iter().any(|(name, _)| *name == key.name) || meant.contains(&key.name.as_str());
            // `rules` reports a file without listeners.
            if !there && matches!(key.absent, WhenAbsent::Refused) && !matches!(key.kind, KeyKind::Tables(_)) {
                let add = self.document.notation.assignment(&key.name, &key.example);
                self.within(key.name.as_str(), |checker| {
                    checker.fault(line, format!("missing; add it, for example {add}"))
                });
            }
        }
    }

    fn value(&mut self, key: &'static KeySpec, node: &DocumentNode) {
        match (&key.kind, &node.value) {
            (KeyKind::Table(keys), DocumentValue::Table(entries)) => self.table(keys, entries, node.line),
            (KeyKind::Tables(keys), DocumentValue::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.within(index, |checker| match &item.value {
                        DocumentValue::Table(entries) => checker.table(keys, entries, item.line),
                        other => {
                            let known = names(keys);
                            checker
                                .fault(item.line, format!("expected a table, got {other}; give it the keys {known}"));
                        }
                    });
                }
            }
            (KeyKind::NamesOrTables(_, keys), DocumentValue::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.within(index, |checker| match &item.value {
                        DocumentValue::Text(_) => {}
                        DocumentValue::Table(entries) => checker.table(keys, entries, item.line),
                        other => {
                            let known = names(keys);
                            let fix = format!("write a name in quotes, or a table with the keys {known}");
                            checker.fault(item.line, format!("expected text or a table, got {other}; {fix}"));
                        }
                    });
                }
            }
            (KeyKind::Text(_) | KeyKind::Texts(_) | KeyKind::IntegerOrText(..), DocumentValue::Text(_))
            | (KeyKind::Flag, DocumentValue::Flag(_)) => {}
            (KeyKind::Texts(_), DocumentValue::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    if !matches!(item.value, DocumentValue::Text(_)) {
                        self.within(index, |checker| checker.wrong_type(key, item));
                    }
                }
            }
            (KeyKind::Choice(choices), DocumentValue::Text(text)) => {
                if !choices.contains(text) {
                    let near = nearest(text, choices.iter().map(String::as_str));
                    let fix = near.map_or_else(
                        || format!("write \"{}\"", choices[0]),
                        |near| format!("did you mean \"{near}\"?"),
                    );
                    self.fault(node.line, format!("expected {}, got {}; {fix}", key.kind.accepts(), quoted(text)));
                }
            }
            (KeyKind::Integer(range) | KeyKind::IntegerOrText(range, _), DocumentValue::Integer(number)) => {
                let inside = i64::try_from(*number).is_ok_and(|number| range.contains(&number));
                self.range(key, node, inside);
            }
            #[expect(clippy::cast_precision_loss, reason = "the range is far below where a float loses whole numbers")]
            (KeyKind::Number(range) | KeyKind::Seconds(range), DocumentValue::Integer(number)) => {
                self.range(key, node, range.contains(&(*number as f64)));
            }
            (KeyKind::Number(range) | KeyKind::Seconds(range), DocumentValue::Number(number)) => {
                self.range(key, node, range.contains(number));
            }
            _ => self.wrong_type(key, node),
        }
    }

    fn range(&mut self, key: &'static KeySpec, node: &DocumentNode, inside: bool) {
        if !inside {
            let message =
                format!("{} is out of range; give {}, for example {}", node.value, key.kind.accepts(), key.example);
            self.fault(node.line, message);
        }
    }

    fn wrong_type(&mut self, key: &'static KeySpec, node: &DocumentNode) {
        let expected = match &key.kind {
            KeyKind::Text(form) | KeyKind::Texts(form) => format!("text ({form})"),
            _ => key.kind.accepts(),
        };
        let fix = match (&key.kind, &node.value) {
            (_, DocumentValue::Nothing) if key.kind.children().is_empty() => {
                format!("give it a value, for example {}, or remove the key", key.example)
            }
            (_, DocumentValue::Nothing) => "give it keys, or remove it".to_owned(),
            (KeyKind::NamesOrTables(..), _) => format!("write for example {}", key.example),
            (KeyKind::Tables(_), DocumentValue::Table(_)) => match self.document.notation {
                Notation::Toml => format!("write [[{}]] with two brackets", self.header()),
                Notation::Yaml => format!("start each table under {} with a dash", key.name),
            },
            (KeyKind::Table(_), DocumentValue::List(_)) => match self.document.notation {
                Notation::Toml => format!("write [{}] with one bracket", self.header()),
                Notation::Yaml => format!("write the keys under {} without a dash", key.name),
            },
            (KeyKind::Table(keys) | KeyKind::Tables(keys), _) => format!("give it the keys {}", names(keys)),
            (
                KeyKind::Text(_) | KeyKind::Texts(_) | KeyKind::Choice(_),
                DocumentValue::Integer(_) | DocumentValue::Number(_) | DocumentValue::Flag(_),
            ) => {
                format!("put it in quotes, for example {}", key.example)
            }
            (KeyKind::Integer(_) | KeyKind::Number(_) | KeyKind::Seconds(_), DocumentValue::Text(text))
                // Not `010`, which YAML reads as text without any quotes.
                if text.parse::<f64>().is_ok() && (!text.starts_with('0') || text.starts_with("0.")) =>
            {
                format!("remove the quotes, for example {}", key.example)
            }
            _ => format!("write for example {}", key.example),
        };
        self.fault(node.line, format!("expected {expected}, got {}; {fix}", node.value));
    }

    /// The path as a TOML header: without indices.
    fn header(&self) -> String {
        let keys = self.at.0.iter().filter_map(|step| match step {
            KeyStep::Key(key) => Some(key.as_str()),
            KeyStep::Index(_) => None,
        });
        keys.collect::<Vec<_>>().join(".")
    }
}

fn names(keys: &[KeySpec]) -> String {
    let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
    names.join(", ")
}

fn unknown(name: &str, here: &'static [KeySpec]) -> String {
    // It may be the right key in the wrong table.
    let mut elsewhere = None;
    keys::walk(&mut |path, key| {
        if key.name == name && elsewhere.is_none() {
            elsewhere = Some(match path.rsplit_once('.') {
                Some((table, _)) => format!("unknown key here; it belongs in `{table}`"),
                None => "unknown key here; it belongs at the top of the file".to_owned(),
            });
        }
    });
    elsewhere.unwrap_or_else(|| format!("unknown key; remove it, or use one of {}", names(here)))
}

/// The candidate that was probably meant, if one is near enough: one wrong letter in three, or its beginning, or the
/// candidate with a suffix.
fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A long text is not a misspelt short key, and comparing it would take long.
    if text.len() > 64 {
        return None;
    }
    let text = text.to_ascii_lowercase().replace('-', "_");
    candidates
        .map(|candidate| {
            let begun = text.len() >= 3 && candidate.starts_with(&text);
            let continued = candidate.len() >= 4 && text.starts_with(candidate);
            (if begun || continued { 1 } else { strsim::damerau_levenshtein(&text, candidate) }, candidate)
        })
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}
