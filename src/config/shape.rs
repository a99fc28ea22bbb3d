//! Checks a document's shape against the table of keys: unknown and missing keys, wrong types, numbers out of range,
//! texts that are none of the choices. What is left for `rules` is what needs more than one key, or a text's inside.

use super::document::{Document, Format, KeyPath, Node, Step, Value};
use super::keys::{self, Absent, Key, Kind};
use super::problem::{Problems, quoted};

/// Adds everything that is wrong with the document's shape.
pub(super) fn check(document: &Document, problems: &mut Problems) {
    let mut shape = Shape { document, problems, at: KeyPath::default() };
    match &document.root.value {
        Value::Table(entries) => shape.table(keys::FILE, entries, document.root.line),
        other => shape.fault(
            document.root.line,
            format!("expected keys such as `listeners` at the top of the file, got {other}; start with listeners:"),
        ),
    }
}

struct Shape<'a> {
    document: &'a Document,
    problems: &'a mut Problems,
    /// Where we are.
    at: KeyPath,
}

impl Shape<'_> {
    fn fault(&mut self, line: usize, message: String) {
        let key = Some(self.at.to_string()).filter(|key| !key.is_empty());
        self.problems.add(Some(line), key, message);
    }

    /// Runs `check` one step further down.
    fn within(&mut self, step: impl Into<Step>, check: impl FnOnce(&mut Self)) {
        self.at.0.push(step.into());
        check(self);
        self.at.0.pop();
    }

    fn table(&mut self, keys: &'static [Key], entries: &[(String, Node)], line: usize) {
        // Keys that are there under a misspelt name, about which one message is enough.
        let mut meant = Vec::new();
        for (name, node) in entries {
            let known = keys.iter().find(|key| key.name == name);
            let near = nearest(name, keys.iter().map(|key| key.name));
            self.within(name.as_str(), |shape| match (known, near) {
                (Some(key), _) => shape.value(key, node),
                (None, Some(near)) => shape.fault(node.line, format!("unknown key; did you mean `{near}`?")),
                (None, None) => shape.fault(node.line, unknown(name, keys)),
            });
            meant.extend(near.filter(|_| known.is_none()));
        }
        for key in keys {
            let there = entries.iter().any(|(name, _)| name == key.name) || meant.contains(&key.name);
            // `rules` says what a file without listeners lacks.
            if !there && matches!(key.absent, Absent::Refused) && !matches!(key.kind, Kind::Tables(_)) {
                let add = self.document.format.assignment(key.name, key.example);
                self.within(key.name, |shape| shape.fault(line, format!("missing; add it, for example {add}")));
            }
        }
    }

    fn value(&mut self, key: &'static Key, node: &Node) {
        match (&key.kind, &node.value) {
            (Kind::Table(keys), Value::Table(entries)) => self.table(keys, entries, node.line),
            (Kind::Tables(keys), Value::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.within(index, |shape| match &item.value {
                        Value::Table(entries) => shape.table(keys, entries, item.line),
                        other => {
                            let known = names(keys);
                            shape.fault(item.line, format!("expected a table, got {other}; give it the keys {known}"));
                        }
                    });
                }
            }
            (Kind::NamesOrTables(_, keys), Value::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.within(index, |shape| match &item.value {
                        Value::Text(_) => {}
                        Value::Table(entries) => shape.table(keys, entries, item.line),
                        other => {
                            let known = names(keys);
                            let fix = format!("write a name in quotes, or a table with the keys {known}");
                            shape.fault(item.line, format!("expected text or a table, got {other}; {fix}"));
                        }
                    });
                }
            }
            (Kind::Text(_) | Kind::Texts(_) | Kind::IntegerOrText(..), Value::Text(_))
            | (Kind::Flag, Value::Flag(_)) => {}
            (Kind::Texts(_), Value::List(items)) => {
                for (index, item) in items.iter().enumerate() {
                    if !matches!(item.value, Value::Text(_)) {
                        self.within(index, |shape| shape.wrong_type(key, item));
                    }
                }
            }
            (Kind::Choice(choices), Value::Text(text)) => {
                if !choices.contains(&text.as_str()) {
                    let near = nearest(text, choices.iter().copied());
                    let fix = near.map_or_else(
                        || format!("write \"{}\"", choices[0]),
                        |near| format!("did you mean \"{near}\"?"),
                    );
                    self.fault(node.line, format!("expected {}, got {}; {fix}", key.kind.accepts(), quoted(text)));
                }
            }
            (Kind::Integer(range) | Kind::IntegerOrText(range, _), Value::Integer(number)) => {
                let inside = i64::try_from(*number).is_ok_and(|number| range.contains(&number));
                self.range(key, node, inside);
            }
            #[expect(clippy::cast_precision_loss, reason = "the range is far below where a float loses whole numbers")]
            (Kind::Number(range) | Kind::Seconds(range), Value::Integer(number)) => {
                self.range(key, node, range.contains(&(*number as f64)));
            }
            (Kind::Number(range) | Kind::Seconds(range), Value::Number(number)) => {
                self.range(key, node, range.contains(number));
            }
            _ => self.wrong_type(key, node),
        }
    }

    fn range(&mut self, key: &'static Key, node: &Node, inside: bool) {
        if !inside {
            let message =
                format!("{} is out of range; give {}, for example {}", node.value, key.kind.accepts(), key.example);
            self.fault(node.line, message);
        }
    }

    fn wrong_type(&mut self, key: &'static Key, node: &Node) {
        let expected = match key.kind {
            Kind::Text(form) | Kind::Texts(form) => format!("text ({form})"),
            _ => key.kind.accepts(),
        };
        let fix = match (&key.kind, &node.value) {
            (_, Value::Nothing) if key.kind.children().is_empty() => {
                format!("give it a value, for example {}, or remove the key", key.example)
            }
            (_, Value::Nothing) => "give it keys, or remove it".to_owned(),
            (Kind::NamesOrTables(..), _) => format!("write for example {}", key.example),
            (Kind::Tables(_), Value::Table(_)) => match self.document.format {
                Format::Toml => format!("write [[{}]] with two brackets", self.header()),
                Format::Yaml => format!("start each table under {} with a dash", key.name),
            },
            (Kind::Table(_), Value::List(_)) => match self.document.format {
                Format::Toml => format!("write [{}] with one bracket", self.header()),
                Format::Yaml => format!("write the keys under {} without a dash", key.name),
            },
            (Kind::Table(keys) | Kind::Tables(keys), _) => format!("give it the keys {}", names(keys)),
            (
                Kind::Text(_) | Kind::Texts(_) | Kind::Choice(_),
                Value::Integer(_) | Value::Number(_) | Value::Flag(_),
            ) => {
                format!("put it in quotes, for example {}", key.example)
            }
            (Kind::Integer(_) | Kind::Number(_) | Kind::Seconds(_), Value::Text(text))
                // Not `010`, which YAML reads as text without any quotes.
                if text.parse::<f64>().is_ok() && (!text.starts_with('0') || text.starts_with("0.")) =>
            {
                format!("remove the quotes, for example {}", key.example)
            }
            _ => format!("write for example {}", key.example),
        };
        self.fault(node.line, format!("expected {expected}, got {}; {fix}", node.value));
    }

    /// The path as a TOML header has it: without indices.
    fn header(&self) -> String {
        let keys = self.at.0.iter().filter_map(|step| match step {
            Step::Key(key) => Some(key.as_str()),
            Step::Index(_) => None,
        });
        keys.collect::<Vec<_>>().join(".")
    }
}

fn names(keys: &[Key]) -> String {
    let names: Vec<&str> = keys.iter().map(|key| key.name).collect();
    names.join(", ")
}

fn unknown(name: &str, here: &'static [Key]) -> String {
    // Perhaps the right key in the wrong table.
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

/// The candidate that was probably meant, if one is near enough: a slip in every third letter, or its end
/// left off or something put after it.
fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Long texts are no slips of a short key, and comparing them would take long.
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
