//! Every way a configuration can be wrong, with the whole message: file and line, key, value, fix.
//!
//! The cases are in `tests/data/refused.txt`; those that are too long to write down are here.

use std::path::Path;

use super::{Config, ONE, config};

const CASES: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/refused.txt"));

/// A configuration that must be refused.
pub(super) struct Case {
    /// The file's name, which decides the notation.
    pub(super) file: &'static str,
    /// The file's text.
    pub(super) text: String,
    /// The message, without the file's name in front of its lines.
    message: String,
}

/// All cases of `refused.txt`.
pub(super) fn cases() -> Vec<Case> {
    let case = |case: &str| {
        let mut lines = case.lines();
        let file = match lines.next() {
            Some("toml") => "c.toml",
            Some("yaml") => "c.yaml",
            other => panic!("a case of {other:?}"),
        };
        let is_message = |line: &&str| line.starts_with("=> ");
        let text: String = lines.clone().take_while(|line| !is_message(line)).flat_map(|line| [line, "\n"]).collect();
        let message: Vec<&str> = lines.filter(is_message).map(|line| &line[3..]).collect();
        Case { file, text, message: message.join("\n") }
    };
    format!("\n{CASES}").split("\n=== ").skip(1).map(case).collect()
}

/// The message without the file's name in front of each line.
fn refusal(text: &str, file: &str) -> String {
    let error = match Config::parse(text, Path::new(file)) {
        Ok(config) => panic!("accepted:\n{text}\nas {config:?}"),
        Err(error) => error.to_string(),
    };
    let strip = |line: &str| line.strip_prefix(file).unwrap_or_else(|| panic!("no file in: {line}")).to_owned();
    error.lines().map(strip).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_mistake_is_refused_with_its_message() {
    let cases = cases();
    assert!(cases.len() >= 140, "only {} cases were read", cases.len());
    for case in cases {
        assert!(!case.message.is_empty(), "no message for:\n{}", case.text);
        assert_eq!(refusal(&case.text, case.file), case.message, "\n{}", case.text);
        for line in case.message.lines() {
            assert!(line.contains("; ") || line.ends_with('?'), "no fix in: {line}");
        }
    }
}

#[test]
fn the_file_that_the_cases_were_made_from_is_good() {
    assert_eq!(config(ONE).listeners.len(), 1);
    let changed = cases().iter().filter(|case| case.text.contains("name = \"a\"\n")).count();
    assert!(changed > 50);
}

/// `count` listeners, each right by itself.
fn listeners(count: u32) -> String {
    let listener = |n: u32| ONE.replace("\"a\"", &format!("\"a{n}\"")).replace("5514", &n.to_string());
    (1..=count).map(listener).collect()
}

#[test]
fn there_are_no_more_listeners_than_the_limit() {
    assert_eq!(config(&listeners(256)).listeners.len(), 256);
    assert_eq!(
        refusal(&listeners(257), "c.toml"),
        ": limits.max_listeners: 256, but the file has 257 listeners; raise it to 257 or more, or remove listeners"
    );
    let raised = listeners(257) + "[limits]\nmax_listeners = 257\n";
    assert_eq!(config(&raised).listeners.len(), 257);
    assert_eq!(
        refusal(&listeners(4_097), "c.toml"),
        ": limits.max_listeners: 256, but the file has 4097 listeners; the maximum is 4096, so split the file between several hosts"
    );
}

#[test]
fn downstreams_of_all_listeners_count_towards_the_limit() {
    let two = listeners(2);
    assert_eq!(config(&(two.clone() + "[limits]\nmax_downstreams = 2\n")).limits.max_downstreams, 2);
    assert_eq!(
        refusal(&(two + "[limits]\nmax_downstreams = 1\n"), "c.toml"),
        ":10: limits.max_downstreams: 1, but the file has 2 downstreams; raise it to 2 or more, or remove downstreams"
    );
}

#[test]
fn a_listener_replicates_to_64_at_most() {
    let text = |count: u32, policy: &str| {
        let all: String = (1..=count).map(|port| format!("{{ address = \"10.0.0.1:{port}\" }}, ")).collect();
        format!("[[listeners]]\nname = \"a\"\nbind = \"0.0.0.0:5514\"\npolicy = \"{policy}\"\ndownstream = [{all}]\n")
    };
    config(&text(64, "replicate"));
    config(&text(65, "hash"));
    assert_eq!(
        refusal(&text(65, "replicate"), "c.toml"),
        ":5: listeners[0].downstream: 65 downstreams, but a replicating listener has at most 64; remove some, or name a second udp-fanout that serves the rest"
    );
}

#[test]
fn a_small_file_cannot_become_a_large_tree() {
    let mut aliases = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for n in 1..20 {
        let before = format!("*a{}", n - 1);
        aliases += &format!("a{n}: &a{n} [{}]\n", [before.as_str(); 10].join(", "));
    }
    let message = refusal(&aliases, "c.yaml");
    assert!(
        message.ends_with("is not valid YAML: nested too deep, or too much repeated by aliases; write the values out"),
        "{message}"
    );
    for deep in ["[", "{a: ", "- "] {
        let message = refusal(&deep.repeat(100_000), "c.yaml");
        assert!(message.contains(" is not valid YAML: "), "{message}");
    }
    let dotted = ["a"; 100_000].join(".");
    for deep in ["a = [".repeat(100_000), "a = {a = ".repeat(100_000), format!("[{dotted}]"), format!("{dotted} = 1")] {
        let message = refusal(&deep, "c.toml");
        assert!(message.contains("not valid TOML: "), "{message}");
    }
}

/// As many mistakes as fit into a file: the check gives up early.
#[test]
fn a_file_full_of_mistakes_is_not_checked_to_its_end() {
    let unknown: String = (0..200_000).map(|n| format!("k{n} = 1\n")).collect();
    let misspelt = ONE.to_owned() + &"[[listeners]]\nnam = 'b'\nbin = '0.0.0.0:1'\n".repeat(30_000);
    let prefixes: String = (0..60_000).map(|n| format!("'x{n}', ")).collect();
    let prefixes = format!("{ONE}[listeners.sources]\nallow = [{prefixes}]\n");
    for text in [unknown, misspelt, prefixes] {
        let start = std::time::Instant::now();
        let message = refusal(&text, "c.toml");
        assert!(message.ends_with(": at least 480 more problems; fix the first 20 and run again"), "{message}");
        assert_eq!(message.lines().count(), 21);
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
    }
}
