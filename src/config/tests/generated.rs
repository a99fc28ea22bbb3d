//! What is generated from the types of the file: the tables of keys in `docs/CONFIGURATION.md`, and `config/reference.toml`.
//!
//! `make config-docs` rewrites both.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::config::keys::{self, KeyKind, KeySpec, WhenAbsent};

/// Compares a generated file with what is there, or rewrites it.
fn compare(path: &str, expected: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&file, expected).unwrap();
    }
    let there = fs::read_to_string(&file).unwrap();
    assert!(there == expected, "{path} is out of date: run make config-docs");
}

/// All tables of keys, by their path: the file itself has none.
fn tables() -> BTreeMap<String, &'static [KeySpec]> {
    let mut tables = BTreeMap::from([(String::new(), keys::top())]);
    keys::walk(&mut |path, key| {
        let list = if matches!(key.kind, KeyKind::Tables(_) | KeyKind::NamesOrTables(..)) { "[]" } else { "" };
        if !key.kind.children().is_empty() {
            tables.insert(format!("{path}{list}"), key.kind.children());
        }
    });
    tables
}

#[test]
fn every_key_has_a_meaning_an_example_and_a_range() {
    let mut count = 0;
    keys::walk(&mut |path, key| {
        count += 1;
        assert!(!key.meaning.is_empty() && key.meaning.ends_with(['.', ')']), "{path}: {:?}", key.meaning);
        assert_eq!(
            key.example.is_empty(),
            !key.kind.children().is_empty() && !matches!(key.kind, KeyKind::NamesOrTables(..)),
            "{path}"
        );
        if let WhenAbsent::Means(words) = &key.absent {
            assert!(!words.is_empty(), "{path}: give it a default, or x-absent");
        }
        match &key.kind {
            KeyKind::Text(form) | KeyKind::Texts(form) => assert_ne!(form, "text", "{path}: give it x-accepts"),
            KeyKind::Integer(range) | KeyKind::IntegerOrText(range, _) => {
                assert!(range.end() > range.start(), "{path}")
            }
            KeyKind::Number(range) | KeyKind::Seconds(range) => assert!(range.end() > range.start(), "{path}"),
            _ => {}
        }
    });
    assert!(count > 70, "{count} keys");
}

// ---- docs/CONFIGURATION.md ----

/// The rows for the keys of one table, as Markdown.
fn markdown(table: &str, keys: &[KeySpec]) -> String {
    let mut text = String::from("| key | type | takes | default | meaning | example |\n|---|---|---|---|---|---|\n");
    let header = table.replace("[]", "");
    let header = if header.is_empty() { header } else { header + "." };
    for key in keys {
        let default = match &key.absent {
            WhenAbsent::Refused => "required".to_owned(),
            WhenAbsent::Default(value) => format!("`{value}`"),
            WhenAbsent::Means(words) => words.to_owned(),
        };
        let example = match (&key.kind, key.example.as_str()) {
            (KeyKind::Tables(_), "") => format!("`[[{header}{}]]`", key.name),
            (_, "") => format!("`[{header}{}]`", key.name),
            (_, example) => format!("`{} = {example}`", key.name),
        };
        let (name, kind, accepts) = (&key.name, key.kind.type_name(), key.kind.accepts());
        let _ = writeln!(text, "| `{name}` | {kind} | {accepts} | {default} | {} | {example} |", key.meaning);
    }
    text
}

#[test]
fn the_documentation_has_every_key() {
    let path = "docs/CONFIGURATION.md";
    let mut expected = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    for (table, keys) in tables() {
        let start = format!("<!-- keys{}{table} -->\n", if table.is_empty() { "" } else { " " });
        let from = expected.find(&start).unwrap_or_else(|| panic!("{path} lacks {start}")) + start.len();
        let to = from + expected[from..].find("<!-- end of keys -->").unwrap();
        expected.replace_range(from..to, &format!("\n{}\n", markdown(&table, keys)));
    }
    compare(path, &expected);
}

// ---- config/reference.toml ----

/// One table of the reference.
struct Section {
    /// What stands above it, if it begins a part of the file.
    title: &'static str,
    /// Its header in TOML; the file itself has none.
    header: &'static str,
    /// The path of its keys.
    table: &'static str,
    /// Keys that are set here in place of their default or example.
    set: &'static [(&'static str, &'static str)],
    shown: Shown,
}

/// Which keys of a table are shown.
#[derive(Clone, Copy, PartialEq)]
enum Shown {
    /// All, with their meanings.
    All,
    /// Those alone that are set.
    Set,
    /// All, and the whole table, as a comment.
    Commented,
    /// The same without their meanings, which stand elsewhere.
    Examples,
}

const SECTIONS: &[Section] = &[
    Section { title: "The daemon itself.", header: "", table: "", set: &[], shown: Shown::All },
    Section {
        title: "A listener: an address that datagrams are sent to, and its receivers. At least one.",
        header: "[[listeners]]",
        table: "listeners[]",
        set: &[("name", "\"syslog\""), ("bind", "\"0.0.0.0:5514\"")],
        shown: Shown::All,
    },
    Section {
        title: "",
        header: "[listeners.sources]",
        table: "listeners[].sources",
        set: &[],
        shown: Shown::Commented,
    },
    Section {
        title: "",
        header: "[listeners.rate_limit]",
        table: "listeners[].rate_limit",
        set: &[],
        shown: Shown::Commented,
    },
    Section { title: "", header: "[listeners.health]", table: "listeners[].health", set: &[], shown: Shown::Examples },
    Section { title: "", header: "[listeners.settings]", table: "listeners[].settings", set: &[], shown: Shown::All },
    Section {
        title: "",
        header: "[[listeners.downstream]]",
        table: "listeners[].downstream[]",
        set: &[("address", "\"10.0.1.10:5514\"")],
        shown: Shown::All,
    },
    Section {
        title: "Another listener, with receivers from Kubernetes.",
        header: "[[listeners]]",
        table: "listeners[]",
        set: &[("name", "\"statsd\""), ("bind", "\"0.0.0.0:8125\"")],
        shown: Shown::Set,
    },
    Section {
        title: "",
        header: "[listeners.kubernetes]",
        table: "listeners[].kubernetes",
        set: &[("service", "\"statsd-receivers\""), ("port", "8125")],
        shown: Shown::All,
    },
    Section {
        title: "Another listener, with receivers from several Services of Kubernetes.",
        header: "[[listeners]]",
        table: "listeners[]",
        set: &[("name", "\"netflow\""), ("bind", "\"0.0.0.0:2055\"")],
        shown: Shown::Set,
    },
    Section {
        title: "",
        header: "[listeners.kubernetes]",
        table: "listeners[].kubernetes",
        set: &[("port", "2055")],
        shown: Shown::Set,
    },
    Section {
        title: "",
        header: "[[listeners.kubernetes.services]]",
        table: "listeners[].kubernetes.services[]",
        set: &[("service", "\"collectors-blue\"")],
        shown: Shown::All,
    },
    Section {
        title: "",
        header: "[[listeners.kubernetes.services]]",
        table: "listeners[].kubernetes.services[]",
        set: &[("service", "\"collectors-green\"")],
        shown: Shown::Set,
    },
    Section {
        title: "Health checks of all receivers of all listeners.",
        header: "[health]",
        table: "health",
        set: &[],
        shown: Shown::All,
    },
    Section {
        title: "The HTTP endpoint. Without this table there is none; with it, enabled is true by default.",
        header: "[metrics]",
        table: "metrics",
        set: &[("enabled", "false")],
        shown: Shown::All,
    },
    Section {
        title: "Sizes of the kernel program's maps, fixed while the daemon runs.",
        header: "[limits]",
        table: "limits",
        set: &[],
        shown: Shown::All,
    },
];

const HEAD: &str = "# udp-fanout: every key there is.
#
# Keys without a `#` are either required or set to their default, so leaving them out changes nothing.
# Keys behind a `#` have no default; what follows the `#` is an example.
# docs/CONFIGURATION.md says more about each. Check a file with: udp-fanout check --config FILE
#
# The same keys work in YAML, in a file whose name ends in .yaml or .yml.
# This file is generated from the program's own types (make config-docs).
";

/// Text as comment lines of at most 119 characters.
fn comment(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().unwrap();
        match line.chars().count() + word.chars().count() < 117 {
            true if line.is_empty() => line.push_str(word),
            true => *line = format!("{line} {word}"),
            false => lines.push(word.to_owned()),
        }
    }
    lines.iter().map(|line| format!("# {line}\n")).collect()
}

/// What stands above a key: the meaning without links, the values it takes, and what its absence means.
fn above(key: &KeySpec) -> String {
    let required = if matches!(key.absent, WhenAbsent::Refused) { "Required. " } else { "" };
    let mut meaning = key.meaning.replace("See [", "See docs/CONFIGURATION.md, ");
    while let Some((before, link)) = meaning.split_once("](#") {
        meaning = format!("{before}{}", link.split_once(')').unwrap().1);
    }
    let takes = match key.kind {
        KeyKind::Flag | KeyKind::Table(_) | KeyKind::Tables(_) => String::new(),
        _ => format!(" Takes {}.", key.kind.accepts()),
    };
    let absent = match &key.absent {
        WhenAbsent::Means(words) => format!(" Without it: {words}."),
        _ => String::new(),
    };
    comment(&format!("{required}{meaning}{takes}{absent}"))
}

fn reference() -> String {
    let tables = tables();
    let mut text = HEAD.to_owned();
    for section in SECTIONS {
        let begin =
            if section.title.is_empty() { "\n".to_owned() } else { format!("\n\n# ---- {} ----\n", section.title) };
        text += &begin;
        let whole = matches!(section.shown, Shown::Commented | Shown::Examples);
        if whole {
            let mut of_table = None;
            keys::walk(&mut |path, key| of_table = of_table.or((path == section.table).then_some(key)));
            let mut words = above(of_table.unwrap());
            if section.shown == Shown::Examples {
                words += &comment("Each key is described under [health].");
            }
            let _ = writeln!(text, "{words}# {}", section.header);
        } else if !section.header.is_empty() {
            let _ = writeln!(text, "{}", section.header);
        }
        for key in tables[section.table] {
            let set = section.set.iter().find(|(name, _)| *name == key.name).map(|(_, value)| *value);
            if !key.kind.children().is_empty() || (section.shown == Shown::Set && set.is_none()) {
                continue;
            }
            if matches!(section.shown, Shown::All | Shown::Commented) {
                let _ = write!(text, "\n{}", above(key));
            }
            let (mark, value) = match (&key.absent, set) {
                (_, Some(value)) => ("", value),
                (WhenAbsent::Default(value), None) if !whole => ("", value.as_str()),
                _ => ("# ", key.example.as_str()),
            };
            let _ = writeln!(text, "{mark}{} = {value}", key.name);
        }
    }
    text
}

#[test]
fn the_reference_is_up_to_date() {
    compare("config/reference.toml", &reference());
}
