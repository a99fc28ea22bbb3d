//! Every configuration in the project loads: the files in `config/`, the snippets in the documentation and in the
//! deployment guide. Their statements about keys agree with the code.
//!
//! (`src/config/tests/generated.rs` makes the tables of keys in `docs/CONFIGURATION.md` and `config/reference.toml`.)

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use udp_fanout::testing::config::keys::{self, KeyKind, KeySpec, WhenAbsent};
use udp_fanout::testing::config::{Config, DownstreamSource, HandoverConfig, Interfaces, OnExit, RequestedMode};
use udp_fanout::testing::discovery::{PortRef, ServiceRef};
use udp_fanout::testing::health::settings::ProbeProtocol;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_in(directory: &str, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(repository().join(directory)) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == extension));
    files.sort();
    files
}

// ---- The files in config/ ----

#[test]
fn every_file_in_config_loads_and_its_rendering_is_equal() {
    let files: Vec<PathBuf> = ["toml", "yaml", "yml"].iter().flat_map(|end| files_in("config", end)).collect();
    let there = fs::read_dir(repository().join("config")).unwrap().count();
    assert_eq!(files.len(), there, "everything in config/ is a configuration");
    for file in files {
        let config = Config::load(&file).unwrap_or_else(|error| panic!("{error}"));
        let rendered = config.render();
        // The rendering is TOML whatever the file was.
        let mut again = Config::parse(&rendered, Path::new("rendered.toml")).unwrap();
        again.path.clone_from(&config.path);
        assert_eq!(again, config, "{}:\n{rendered}", file.display());
    }
}

#[test]
fn the_examples_are_what_they_promise() {
    let load = |name: &str| Config::load(&repository().join("config").join(name)).unwrap();

    let run = load("udp-fanout.toml");
    for listener in &run.listeners {
        assert_eq!(listener.mode, RequestedMode::Userspace, "works without root");
        assert!(listener.bind.ip().is_loopback() && listener.bind.port() > 1024);
        let DownstreamSource::Static(downstreams) = &listener.source else { panic!("works without a cluster") };
        assert!(downstreams.len() == 3 && downstreams.iter().all(|d| d.address.ip().is_loopback()));
    }
    assert_eq!(run.metrics.unwrap().bind.to_string(), "127.0.0.1:9090");

    let syslog = load("syslog.toml");
    assert_eq!(syslog.listeners[0].mode, RequestedMode::TcEbpf);
    assert_eq!(
        syslog.handover,
        HandoverConfig { on_exit: OnExit::Keep, ..HandoverConfig::default() },
        "the unit's pin directory"
    );
    assert!(matches!(&syslog.listeners[0].source, DownstreamSource::Static(downstreams) if downstreams.len() == 3));

    let kubernetes = load("kubernetes.toml");
    assert!(kubernetes.listeners.iter().all(|l| matches!(l.source, DownstreamSource::Kubernetes(_))));

    let tenants = load("multi-tenant.toml");
    let guide = snippets(&repository().join("tests/data/guide-snippets.md")).pop().unwrap();
    let guide = Config::parse(&guide.text, Path::new("guide.yaml")).unwrap();
    assert_eq!(tenants.listeners, guide.listeners, "the guide's example");
}

/// Required keys only.
const MINIMAL: &str = r#"
    [[listeners]]
    name = "syslog"
    bind = "0.0.0.0:5514"
    downstream = [{ address = "10.0.1.10:5514" }]
    [[listeners]]
    name = "statsd"
    bind = "0.0.0.0:8125"
    kubernetes = { service = "statsd-receivers", port = 8125 }
    [[listeners]]
    name = "netflow"
    bind = "0.0.0.0:2055"
    kubernetes = { services = [{ service = "collectors-blue" }, { service = "collectors-green" }], port = 2055 }
"#;

#[test]
fn the_reference_sets_every_key_to_its_default() {
    let path = repository().join("config/reference.toml");
    let reference = Config::load(&path).unwrap();
    assert_eq!(reference, Config::parse(MINIMAL, &path).unwrap());
}

#[test]
fn the_reference_holds_every_key() {
    let text = fs::read_to_string(repository().join("config/reference.toml")).unwrap();
    let set = leaves(&text.parse::<toml::Table>().unwrap());
    let uncommented = uncomment(&text);
    let mut uncommented: toml::Table = uncommented.parse().unwrap();
    let shown = leaves(&uncommented);
    probe_by_udp(&mut uncommented);
    Config::parse(&uncommented.to_string(), Path::new("reference.toml")).unwrap_or_else(|error| panic!("{error}"));
    keys::walk(&mut |path, key| {
        if !key.kind.children().is_empty() {
            return;
        }
        assert!(shown.contains_key(path), "config/reference.toml lacks {path}");
        match &key.absent {
            // The reference shows the table, whose absence means the opposite of this default.
            WhenAbsent::Default(_) if path == "metrics.enabled" => assert_eq!(set[path], "false"),
            // The whole table is an example.
            WhenAbsent::Default(_) if path.starts_with("listeners[].rate_limit.") => {}
            WhenAbsent::Default(default) => {
                assert_eq!(set.get(path), Some(default), "config/reference.toml: {path}");
            }
            // Required in most files, and set somewhere in the reference.
            WhenAbsent::Means(_) if ["service", "port"].contains(&key.name.as_str()) && set.contains_key(path) => {}
            WhenAbsent::Means(_) => assert!(!set.contains_key(path), "config/reference.toml sets {path}: no default"),
            // Or the whole table that requires it is an example.
            WhenAbsent::Refused => {
                let table = path.trim_end_matches(key.name.as_str());
                let example = !set.keys().any(|other| other.starts_with(table));
                assert!(example || set.contains_key(path), "config/reference.toml: {path} is required");
            }
        }
    });
}

/// Keeps of the health check keys those of `udp`, because some exclude each other.
fn probe_by_udp(table: &mut toml::Table) {
    for (key, value) in table.iter_mut() {
        match value {
            toml::Value::Table(health) if key == "health" => {
                health.insert("protocol".to_owned(), "udp".into());
                health.remove("path");
            }
            toml::Value::Array(items) => items.iter_mut().filter_map(toml::Value::as_table_mut).for_each(probe_by_udp),
            _ => {}
        }
    }
}

/// Removes the `# ` from lines such as `# key = value` and `# [listeners.table]`.
fn uncomment(text: &str) -> String {
    let line = |line: &str| {
        let key = line.strip_prefix("# ").filter(|rest| {
            if rest.starts_with("[listeners.") && rest.ends_with(']') {
                return true;
            }
            let name = rest.split(" = ").next().unwrap_or_default();
            rest.contains(" = ") && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        });
        key.unwrap_or(line).to_owned() + "\n"
    };
    text.lines().map(line).collect()
}

/// Every value that is not a table, by its path; for lists of tables, the first one's that has it.
fn leaves(table: &toml::Table) -> BTreeMap<String, String> {
    fn down(prefix: &str, value: &toml::Value, out: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                table.iter().for_each(|(key, value)| down(&format!("{prefix}.{key}"), value, out))
            }
            toml::Value::Array(items) if items.iter().all(toml::Value::is_table) => {
                items.iter().for_each(|item| down(&format!("{prefix}[]"), item, out));
            }
            leaf => {
                out.entry(prefix.trim_start_matches('.').to_owned()).or_insert(leaf.to_string());
            }
        }
    }
    let mut out = BTreeMap::new();
    down("", &toml::Value::Table(table.clone()), &mut out);
    out
}

// ---- The table of keys ----

/// A file in which the key of this path has this value, with only the required keys besides.
fn with(path: &str, value: &str) -> String {
    let mut text = MINIMAL.parse::<toml::Table>().unwrap();
    let parsed: toml::Table = format!("value = {value}").parse().unwrap();
    let mut at = &mut text;
    let (tables, key) = path.rsplit_once('.').unwrap_or(("", path));
    for table in tables.split('.').filter(|table| !table.is_empty()) {
        // Of a list, the first; but the second listener has a `kubernetes`, and the third one with `services`.
        let (name, list) = table.strip_suffix("[]").map_or((table, false), |name| (name, true));
        let entry = at.entry(name).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = match (list, entry) {
            (true, toml::Value::Array(items)) => {
                let index = match name {
                    "listeners" if path.contains(".services[]") => 2,
                    "listeners" if path.contains(".kubernetes.") => 1,
                    _ => 0,
                };
                items[index].as_table_mut().unwrap()
            }
            (_, toml::Value::Table(table)) => table,
            other => panic!("{path}: {other:?}"),
        };
    }
    at.insert(key.to_owned(), parsed["value"].clone());
    // Keys of one policy only, unless it is the default.
    let needs = match key {
        "hash_on" => Some("hash"),
        "sample" if value != "1" => Some("replicate"),
        _ => None,
    };
    if let (Some(policy), Some(listeners)) = (needs, text["listeners"].as_array_mut()) {
        listeners[0].as_table_mut().unwrap().insert("policy".to_owned(), policy.into());
    }
    // Keys of one protocol of health checks only.
    let protocol = match key {
        "port" => Some("tcp"),
        "payload" | "expect" => Some("udp"),
        "path" => Some("http"),
        _ => None,
    };
    if let Some(protocol) = protocol.filter(|_| tables.ends_with("health")) {
        let health = match tables.starts_with("listeners") {
            true => &mut text["listeners"][0]["health"],
            false => &mut text["health"],
        };
        health.as_table_mut().unwrap().insert("protocol".to_owned(), protocol.into());
    }
    // A rate limit has a rate.
    let limit = text["listeners"][0].get_mut("rate_limit").and_then(toml::Value::as_table_mut);
    if let Some(limit) = limit.filter(|limit| !limit.contains_key("packets_per_second")) {
        limit.insert("packets_per_second".to_owned(), 1.into());
    }
    toml::to_string(&text).unwrap()
}

fn every_leaf(visit: &mut dyn FnMut(&str, &'static KeySpec)) {
    keys::walk(&mut |path, key| {
        if key.kind.children().is_empty() {
            visit(path, key);
        }
    });
}

#[test]
fn every_default_in_the_table_is_the_real_one() {
    let path = Path::new("c.toml");
    let minimal = Config::parse(MINIMAL, path).unwrap();
    every_leaf(&mut |name, key| {
        let WhenAbsent::Default(default) = &key.absent else { return };
        let config = Config::parse(&with(name, default), path).unwrap();
        if name.starts_with("metrics.") {
            let empty = Config::parse(&format!("{MINIMAL}\n[metrics]"), path).unwrap();
            assert!(empty.metrics.is_some());
            assert_eq!(config, empty, "{name} = {default}");
        } else if name.starts_with("listeners[].rate_limit.") {
            let required_only = with("listeners[].rate_limit.packets_per_second", "1");
            assert_eq!(config, Config::parse(&required_only, path).unwrap(), "{name} = {default}");
        } else {
            assert_eq!(config, minimal, "{name} = {default}");
        }
    });
}

#[test]
fn every_example_in_the_table_loads() {
    every_leaf(&mut |name, key| {
        Config::parse(&with(name, &key.example), Path::new("c.toml"))
            .unwrap_or_else(|error| panic!("the example of {name}: {error}"));
    });
}

#[test]
fn every_range_in_the_table_is_the_real_one() {
    let try_value = |name: &str, value: String| Config::parse(&with(name, &value), Path::new("c.toml"));
    every_leaf(&mut |name, key| {
        let (inside, outside): (Vec<String>, Vec<String>) = match &key.kind {
            KeyKind::Integer(range) | KeyKind::IntegerOrText(range, _) => {
                let (low, high) = (*range.start(), *range.end());
                let max_is_too_small_for_the_file = name == "limits.max_listeners" && low == 1;
                let low_inside = if max_is_too_small_for_the_file { low + 2 } else { low };
                (vec![low_inside.to_string(), high.to_string()], vec![(low - 1).to_string(), (high + 1).to_string()])
            }
            KeyKind::Seconds(range) => {
                let inside = if name.ends_with("health.interval_secs") { range.end() } else { range.start() };
                let (below, above) = (range.start() - 0.001, range.end() + 0.001);
                let outside = [below, -1.0, above, f64::NAN, f64::INFINITY];
                (vec![format!("{inside:?}")], outside.map(|value| format!("{value:?}").to_lowercase()).into())
            }
            KeyKind::Number(range) => (
                vec![format!("{:?}", range.start()), format!("{:?}", range.end())],
                vec!["0".into(), "-0.5".into(), "1.000001".into(), "nan".into(), "inf".into()],
            ),
            KeyKind::Choice(choices) => (choices.iter().map(|c| format!("{c:?}")).collect(), vec!["\"other\"".into()]),
            _ => return,
        };
        for value in inside {
            try_value(name, value.clone()).unwrap_or_else(|error| panic!("{name} = {value}: {error}"));
        }
        for value in outside {
            let error = try_value(name, value.clone()).err().unwrap_or_else(|| panic!("{name} = {value} is accepted"));
            let leaf = name.rsplit('.').next().unwrap();
            assert!(error.to_string().contains(&format!("{leaf}: ")), "{name} = {value}: {error}");
        }
    });
}

// ---- The JSON Schema ----

/// Validates each instance by a schema, with the validator that `scripts/tools.sh` installs for manifests: true for
/// those that are valid.
fn valid_by_schema(schema: &str, instances: &[serde_json::Value]) -> Vec<bool> {
    const VALIDATE: &str = "import json, sys, jsonschema
schema, instances = json.load(sys.stdin)
jsonschema.Draft202012Validator.check_schema(schema)
validator = jsonschema.Draft202012Validator(schema)
print(json.dumps([[e.message for e in validator.iter_errors(i)] for i in instances]))";
    let tool =
        Command::new(repository().join("scripts/tools.sh")).args(["--bin", "kubernetes-validate"]).output().unwrap();
    let directories = String::from_utf8(tool.stdout).unwrap();
    let python = Path::new(directories.lines().last().unwrap()).join("python");
    let mut validator = Command::new(python)
        .args(["-c", VALIDATE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the validator is not installed: run scripts/tools.sh test");
    let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
    let input = serde_json::to_vec(&(schema, instances)).unwrap();
    validator.stdin.take().unwrap().write_all(&input).unwrap();
    let output = validator.wait_with_output().unwrap();
    assert!(output.status.success());
    let errors: Vec<Vec<String>> = serde_json::from_slice(&output.stdout).unwrap();
    errors.iter().inspect(|errors| eprintln!("{errors:?}")).map(Vec::is_empty).collect()
}

fn as_json(toml: &str) -> serde_json::Value {
    serde_json::to_value(toml.parse::<toml::Table>().unwrap()).unwrap()
}

#[test]
fn every_shipped_configuration_is_valid_by_the_json_schema_and_a_wrong_one_is_not() {
    let files = files_in("config", "toml");
    let mut good: Vec<serde_json::Value> =
        files.iter().map(|file| as_json(&fs::read_to_string(file).unwrap())).collect();
    good.extend(files.iter().map(|file| as_json(&Config::load(file).unwrap().render())));
    every_leaf(&mut |name, key| good.push(as_json(&with(name, &key.example))));
    let yaml =
        snippets(&repository().join("tests/data/guide-snippets.md")).into_iter().filter(|s| s.notation == "yaml");
    good.extend(yaml.map(|snippet| serde_saphyr::from_str::<serde_json::Value>(&completed(&snippet)).unwrap()));
    let mut all = good.clone();
    for [path, value] in [
        ["nmae", "1"],
        ["listeners[].bnd", "1"],
        ["listeners[].downstream[].adress", "\"x\""],
        ["listeners[].mode", "\"kernel\""],
        ["listeners[].settings.workers", "1025"],
        ["listeners[].health.port", "0"],
        ["health.interval_secs", "0"],
        ["metrics", "[]"],
        ["listeners", "[{ name = \"a\" }]"],
    ] {
        all.push(as_json(&with(path, value)));
    }
    all.push(serde_json::json!({}));
    let valid = valid_by_schema(&keys::json_schema(), &all);
    for (instance, (number, valid)) in all.iter().zip(valid.into_iter().enumerate()) {
        assert_eq!(valid, number < good.len(), "{instance}");
    }
}

// ---- Documentation ----

/// A fenced block of configuration in a Markdown file.
struct Snippet {
    /// For messages: the file and the line it starts on.
    origin: String,
    /// `toml` or `yaml`.
    notation: String,
    /// Without the fence and its indentation.
    text: String,
}

/// The fenced blocks that hold configuration: TOML or YAML with one of our keys at the top.
fn snippets(file: &Path) -> Vec<Snippet> {
    let text = fs::read_to_string(file).unwrap();
    let mut lines = text.lines().enumerate();
    let mut found = Vec::new();
    while let Some((number, line)) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        let Some(notation) = line.trim().strip_prefix("```").filter(|word| ["toml", "yaml"].contains(word)) else {
            continue;
        };
        let body: Vec<&str> = lines
            .by_ref()
            .map(|(_, line)| line)
            .take_while(|line| line.trim() != "```")
            .map(|line| line.get(indent..).unwrap_or_default())
            .collect();
        if body.iter().any(|line| top_level_key(line, notation).is_some()) {
            let origin = format!("{}:{}", file.display(), number + 1);
            found.push(Snippet { origin, notation: notation.to_owned(), text: body.join("\n") });
        }
    }
    found
}

/// The key, if the line opens one of ours at the top: `health:`, `[health]`, `health.enabled = `, `[[listeners]]`.
fn top_level_key(line: &str, notation: &str) -> Option<&'static str> {
    let keys = ["listeners", "health", "metrics", "settings", "limits"];
    keys.into_iter().find(|key| match notation {
        "yaml" => line.starts_with(&format!("{key}:")),
        _ => {
            let rest = line.trim_start_matches('[').strip_prefix(key);
            rest.is_some_and(|rest| rest.starts_with([']', '.', ' ', '=']))
        }
    })
}

/// Completes a snippet to a whole file: one without a listener is added to a file that has one, and
/// `settings` go into that listener.
fn completed(snippet: &Snippet) -> String {
    let keys: BTreeSet<_> = snippet.text.lines().filter_map(|line| top_level_key(line, &snippet.notation)).collect();
    let text = &snippet.text;
    let yaml = snippet.notation == "yaml";
    if keys.contains("listeners") {
        return text.clone();
    }
    let listener = if yaml {
        "listeners:\n  - name: a\n    bind: \"127.0.0.1:5514\"\n    downstream: [{address: \"127.0.0.1:1\"}]\n"
    } else {
        "[[listeners]]\nname = \"a\"\nbind = \"127.0.0.1:5514\"\ndownstream = [{ address = \"127.0.0.1:1\" }]\n"
    };
    if !keys.contains("settings") {
        return format!("{listener}{text}\n");
    }
    assert_eq!(keys.len(), 1, "{}: settings belong in a listener", snippet.origin);
    let inner: String = match yaml {
        true => text.lines().map(|line| format!("    {line}\n")).collect(),
        false => text.replace("[settings", "[listeners.settings"),
    };
    format!("{listener}{inner}\n")
}

fn load_snippet(snippet: &Snippet) -> Config {
    let file = format!("{}.{}", snippet.origin, snippet.notation);
    Config::parse(&completed(snippet), Path::new(&file)).unwrap_or_else(|error| panic!("{error}\n{}", snippet.text))
}

#[test]
fn every_configuration_in_the_documentation_loads() {
    let mut files = files_in("docs", "md");
    files.extend(files_in(".", "md"));
    let all: Vec<Snippet> = files.iter().flat_map(|file| snippets(file)).collect();
    let here = all.iter().filter(|snippet| snippet.origin.contains("CONFIGURATION.md")).count();
    assert!(here >= 9, "docs/CONFIGURATION.md has examples of every table, found {here}");
    for snippet in &all {
        load_snippet(snippet);
    }
}

#[test]
fn every_configuration_in_the_deployment_guide_loads_and_means_what_the_guide_says() {
    let all = snippets(&repository().join("tests/data/guide-snippets.md"));
    assert_eq!(all.len(), 10);
    let configs: Vec<Config> = all.iter().map(load_snippet).collect();

    let step_3 = &configs[0].listeners[0];
    assert_eq!(step_3.name, "syslog");
    assert_eq!(step_3.bind.to_string(), "0.0.0.0:5514");
    assert_eq!(step_3.interfaces, Interfaces::Named(vec!["eth0".into()]));
    assert_eq!(step_3.mode, RequestedMode::TcEbpf);
    let DownstreamSource::Kubernetes(service) = &step_3.source else { panic!() };
    let expected = ServiceRef {
        namespace: Some("logging".into()),
        service: "vector-aggregators".into(),
        port: PortRef::Number(5514),
    };
    assert_eq!(service.services, [expected]);

    let userspace = &configs[2].listeners[0];
    assert_eq!(userspace.mode, RequestedMode::Userspace);
    assert_eq!(userspace.settings.batch_size, 64);
    assert_eq!((userspace.settings.workers, userspace.settings.pin_cpus), (4, true));

    let health = &configs[3].health.as_ref().unwrap().probe;
    assert_eq!((health.interval, health.timeout), (Duration::from_secs(5), Duration::from_secs(2)));
    assert_eq!(health.protocol, ProbeProtocol::Icmp);

    let metrics = configs[4].metrics.as_ref().unwrap();
    assert_eq!((metrics.bind.to_string().as_str(), metrics.path.as_str()), ("0.0.0.0:9090", "/metrics"));

    let DownstreamSource::Static(downstreams) = &configs[5].listeners[0].source else { panic!() };
    let shown: Vec<String> = downstreams.iter().map(|d| format!("{} {} {}", d.name, d.address, d.weight)).collect();
    assert_eq!(shown, ["receiver-1 10.0.1.10:9000 1", "receiver-2 10.0.1.11:9000 1", "receiver-3 10.0.1.12:9000 1"]);

    assert!(configs[6].listeners[0].settings.pin_cpus);
    assert_eq!(configs[7].listeners[0].settings.recv_buf_size, Some(16_777_216));
    assert!(configs[8].health.is_some());
    assert_eq!(configs[9].listeners.len(), 3);
}
