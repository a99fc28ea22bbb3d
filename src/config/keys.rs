//! Every key of a configuration file: type, range, default, meaning, example.
//!
//! Derived from the types of `file` and their attributes, once, when it is first asked for. `schema_check` checks files
//! against it; `udp-fanout schema`, `config/reference.toml` and the tables in `docs/CONFIGURATION.md` are made from it.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::sync::LazyLock;

use schemars::generate::SchemaSettings;
use serde_json::Value as Json;

use super::file::ConfigFile;

/// One key.
#[derive(Debug)]
pub struct KeySpec {
    /// The name, without the tables around it.
    pub name: String,
    /// The values it takes.
    pub kind: KeyKind,
    /// What its absence means.
    pub absent: WhenAbsent,
    /// A sensible value, as TOML. Empty for tables, whose keys have their own.
    pub example: String,
    /// What it does, in a sentence or two of Markdown.
    pub meaning: String,
}

/// The values a key takes.
#[derive(Debug)]
pub enum KeyKind {
    /// A table with these keys.
    Table(Vec<KeySpec>),
    /// A list of tables with these keys.
    Tables(Vec<KeySpec>),
    /// A list of tables with these keys; text, described here, stands for a table with only the first key.
    NamesOrTables(String, Vec<KeySpec>),
    /// Text of the form described here.
    Text(String),
    /// Text or a list of texts of the form described here.
    Texts(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// `true` or `false`.
    Flag,
    /// A whole number within these bounds.
    Integer(RangeInclusive<i64>),
    /// A whole number within these bounds, or text of the form described here.
    IntegerOrText(RangeInclusive<i64>, String),
    /// A number within these bounds, which may have a fraction.
    Number(RangeInclusive<f64>),
    /// A number of seconds within these bounds, which may have a fraction.
    Seconds(RangeInclusive<f64>),
}

/// What the absence of a key means.
#[derive(Debug)]
pub enum WhenAbsent {
    /// The table that it belongs to is incomplete.
    Refused,
    /// This value, as TOML, is used.
    Default(String),
    /// What the words say.
    Means(String),
}

impl KeyKind {
    /// The keys of a table or of a list's tables.
    #[must_use]
    pub fn children(&self) -> &[KeySpec] {
        match self {
            KeyKind::Table(keys) | KeyKind::Tables(keys) | KeyKind::NamesOrTables(_, keys) => keys,
            _ => &[],
        }
    }

    /// The type in words, for tables of documentation.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            KeyKind::Table(_) => "table",
            KeyKind::Tables(_) => "list of tables",
            KeyKind::NamesOrTables(..) => "list of texts or tables",
            KeyKind::Text(_) | KeyKind::Choice(_) => "text",
            KeyKind::Texts(_) => "text or list of texts",
            KeyKind::Flag => "boolean",
            KeyKind::Integer(_) => "integer",
            KeyKind::IntegerOrText(..) => "integer or text",
            KeyKind::Number(_) | KeyKind::Seconds(_) => "number",
        }
    }

    /// The values it takes, in words that follow "expected".
    #[must_use]
    pub fn accepts(&self) -> String {
        match self {
            KeyKind::Table(_) => "a table".to_owned(),
            KeyKind::Tables(_) => "a list of tables".to_owned(),
            KeyKind::NamesOrTables(form, _) => format!("a list of {form}, each alone or in a table"),
            KeyKind::Text(form) | KeyKind::Texts(form) => form.clone(),
            KeyKind::Choice(choices) => {
                let quoted: Vec<String> = choices.iter().map(|choice| format!("\"{choice}\"")).collect();
                quoted.join(" or ")
            }
            KeyKind::Flag => "true or false".to_owned(),
            KeyKind::Integer(range) => format!("an integer from {} to {}", range.start(), range.end()),
            KeyKind::IntegerOrText(range, form) => {
                format!("an integer from {} to {} or {form}", range.start(), range.end())
            }
            KeyKind::Number(range) => format!("a number from {} to {}", range.start(), range.end()),
            KeyKind::Seconds(range) => format!("seconds from {} to {}", range.start(), range.end()),
        }
    }
}

static TOP: LazyLock<Vec<KeySpec>> = LazyLock::new(|| keys_of(&schema(), None));

/// The keys at the top of a file.
#[must_use]
pub fn top() -> &'static [KeySpec] {
    &TOP
}

/// Calls `visit` with every key and its path, such as `listeners[].settings.workers`, tables before their keys.
pub fn walk(visit: &mut dyn FnMut(&str, &'static KeySpec)) {
    fn down(prefix: &str, keys: &'static [KeySpec], visit: &mut dyn FnMut(&str, &'static KeySpec)) {
        for key in keys {
            let path = format!("{prefix}{}", key.name);
            visit(&path, key);
            let list = if matches!(key.kind, KeyKind::Tables(_) | KeyKind::NamesOrTables(..)) { "[]" } else { "" };
            down(&format!("{path}{list}."), key.kind.children(), visit);
        }
    }
    down("", top(), visit);
}

/// The JSON Schema (draft 2020-12) of a configuration file, for editors: what `udp-fanout schema` prints.
#[must_use]
pub fn json_schema() -> String {
    let mut schema = schema();
    if let Json::Object(root) = &mut schema {
        root.insert("title".to_owned(), "udp-fanout configuration".into());
    }
    without_extensions(&mut schema);
    let mut text = String::new();
    let _ = write!(text, "{schema:#}");
    text.push('\n');
    text
}

/// The schema with our extensions (`x-…`), all in one piece, and as strict as the file: no nulls, no unknown keys.
fn schema() -> Json {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    let mut schema = settings.into_generator().into_root_schema_for::<ConfigFile>().to_value();
    simplify(&mut schema);
    schema
}

/// Takes out what the derived schema says of `Option` (null is allowed) and of the width of integers, and turns
/// enumerations into plain lists of their values.
fn simplify(schema: &mut Json) {
    match schema {
        Json::Array(items) => items.iter_mut().for_each(simplify),
        Json::Object(object) => {
            object.values_mut().for_each(simplify);
            object
                .retain(|key, value| key != "format" && !(key == "default" && (value.is_null() || value.is_object())));
            let null = |value: &Json| *value == serde_json::json!({ "type": "null" });
            if let Some(Json::Array(mut any)) = object.remove("anyOf") {
                any.retain(|one| !null(one));
                match (any.pop(), any.is_empty()) {
                    (Some(Json::Object(only)), true) => {
                        for (key, value) in only {
                            object.entry(key).or_insert(value);
                        }
                    }
                    (Some(last), _) => {
                        any.push(last);
                        object.insert("anyOf".to_owned(), Json::Array(any));
                    }
                    (None, _) => {}
                }
            }
            if let Some(Json::Array(types)) = object.get_mut("type") {
                types.retain(|one| one != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    object.insert("type".to_owned(), only);
                }
            }
            if let Some(Json::Array(values)) = object.get_mut("enum") {
                values.retain(|one| !one.is_null());
            }
            if let Some(Json::Array(variants)) = object.get("oneOf") {
                let values: Option<Vec<Json>> = variants.iter().map(|one| one.get("const").cloned()).collect();
                if let Some(values) = values {
                    object.remove("oneOf");
                    object.insert("type".to_owned(), "string".into());
                    object.insert("enum".to_owned(), Json::Array(values));
                }
            }
        }
        _ => {}
    }
}

/// Removes our own keywords, and turns links within the documentation into their text.
fn without_extensions(schema: &mut Json) {
    match schema {
        Json::Array(items) => items.iter_mut().for_each(without_extensions),
        Json::Object(object) => {
            object.retain(|key, _| !key.starts_with("x-"));
            if let Some(Json::String(description)) = object.get_mut("description") {
                let pieces: Vec<&str> =
                    description.split("](#").enumerate().map(|(n, piece)| after_link(n, piece)).collect();
                *description = pieces.concat().replace("See [", "See docs/CONFIGURATION.md, ").replace('\n', " ");
            }
            object.values_mut().for_each(without_extensions);
        }
        _ => {}
    }
}

/// A piece behind a link's `](#`, without the link's target.
fn after_link(n: usize, piece: &str) -> &str {
    if n == 0 { piece } else { piece.split_once(')').map_or(piece, |(_, rest)| rest) }
}

/// The keys of a table's schema, in the order of the fields. `absent`, if given, is what the absence of each means.
fn keys_of(schema: &Json, absent: Option<&str>) -> Vec<KeySpec> {
    let empty = Vec::new();
    let list = |key: &str| schema.get(key).and_then(Json::as_array).unwrap_or(&empty);
    let required = list("required");
    let spec = |name: &Json| {
        let of_key = schema.get("properties")?.get(name.as_str()?)?;
        Some(key_spec(name.as_str()?, of_key, required.contains(name), absent))
    };
    list("x-order").iter().filter_map(spec).collect()
}

fn key_spec(name: &str, schema: &Json, required: bool, absent: Option<&str>) -> KeySpec {
    let text = |key: &str| schema.get(key).and_then(Json::as_str).unwrap_or_default();
    let absent = match (schema.get("default"), absent.unwrap_or(text("x-absent"))) {
        _ if required => WhenAbsent::Refused,
        (Some(default), "") => WhenAbsent::Default(as_toml(default)),
        (_, words) => WhenAbsent::Means(words.to_owned()),
    };
    let kind = kind_of(schema);
    let example = schema.get("examples").and_then(|examples| examples.get(0)).map(as_toml).unwrap_or_default();
    let meaning = text("description").replace('\n', " ");
    KeySpec { name: name.to_owned(), kind, absent, example, meaning }
}

fn kind_of(schema: &Json) -> KeyKind {
    let accepts = || schema.get("x-accepts").and_then(Json::as_str).unwrap_or("text").to_owned();
    let integers = || bound(schema, "minimum", Json::as_i64)..=bound(schema, "maximum", Json::as_i64);
    let numbers = || bound(schema, "minimum", Json::as_f64)..=bound(schema, "maximum", Json::as_f64);
    let absent = schema.get("x-absent-keys").and_then(Json::as_str);
    if schema.get("properties").is_some() {
        return KeyKind::Table(keys_of(schema, absent));
    }
    if let Some(choices) = schema.get("enum").and_then(Json::as_array) {
        return KeyKind::Choice(choices.iter().filter_map(Json::as_str).map(str::to_owned).collect());
    }
    if let Some(items) = schema.get("items") {
        let table = items.get("anyOf").and_then(Json::as_array).and_then(|any| any.last());
        return match table {
            Some(table) => KeyKind::NamesOrTables(accepts(), keys_of(table, None)),
            None => KeyKind::Tables(keys_of(items, None)),
        };
    }
    match schema.get("type") {
        Some(Json::Array(_)) => KeyKind::IntegerOrText(integers(), accepts()),
        Some(Json::String(one)) => match one.as_str() {
            "boolean" => KeyKind::Flag,
            "integer" => KeyKind::Integer(integers()),
            "number" if schema.get("x-unit").is_some() => KeyKind::Seconds(numbers()),
            "number" => KeyKind::Number(numbers()),
            _ => KeyKind::Text(accepts()),
        },
        _ => KeyKind::Texts(accepts()),
    }
}

fn bound<T: Default>(schema: &Json, key: &str, value: fn(&Json) -> Option<T>) -> T {
    schema.get(key).and_then(value).unwrap_or_default()
}

/// A JSON value as TOML has it.
fn as_toml(value: &Json) -> String {
    toml::Value::try_from(value).map(|value| value.to_string()).unwrap_or_default()
}
