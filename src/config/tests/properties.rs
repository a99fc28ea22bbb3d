//! Properties of the reader: it survives anything, TOML and YAML mean the same, and a rendering means what was read.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Map, Value, json};
use udp_fanout_testkit::fuzz::config::survives;

use super::bad_input::cases;
use super::{Config, ONE};
use crate::config::keys;

const FILES: [&str; 2] = ["c.toml", "c.yaml"];

/// The configuration read from this one's rendering.
fn again(config: &Config) -> Config {
    let rendered = config.render();
    let mut read =
        Config::parse(&rendered, Path::new("rendered.toml")).unwrap_or_else(|error| panic!("{error}\n{rendered}"));
    read.path.clone_from(&config.path);
    read
}

// ---- Anything ----

/// Good files of both notations, and the bad ones of `refused.txt`.
fn seeds() -> Vec<String> {
    let mut seeds: Vec<String> = cases().into_iter().map(|case| case.text).collect();
    let guide = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/guide-snippets.md"));
    let (yaml, other): (Vec<_>, Vec<_>) = guide.split("```").partition(|part| part.starts_with("yaml"));
    assert!(!other.is_empty());
    seeds.extend(yaml.into_iter().map(|part| part["yaml".len()..].to_owned()));
    seeds.push(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/config/reference.toml")).to_owned());
    seeds.push(ONE.to_owned());
    seeds
}

/// Something done to a text, at places chosen by the indices.
#[derive(Debug, Clone)]
enum Change {
    Remove(Index, Index),
    Repeat(Index, Index),
    Insert(Index, String),
    SwapLines(Index, Index),
    Splice(Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let mut words: Vec<String> =
        ["[", "]", "[[", "{", "}", "\"", "'", "=", ":", "- ", "\n", "\t", "#", ",", ".", "&a ", "*a", "<<: "]
            .iter()
            .chain(&[
                "0",
                "-1",
                "1e999",
                "nan",
                "true",
                "null",
                "~",
                "---\n",
                "!!str ",
                "\u{feff}",
                "\u{0}",
                "é",
                "0.0.0.0:0",
                "[::]:1",
            ])
            .map(ToString::to_string)
            .collect();
    keys::walk(&mut |_, key| {
        words.extend([format!("{} = ", key.name), format!("{}: ", key.name), key.example.to_owned()])
    });
    let index = any::<Index>;
    prop_oneof![
        (index(), index()).prop_map(|(a, b)| Change::Remove(a, b)),
        (index(), index()).prop_map(|(a, b)| Change::Repeat(a, b)),
        (index(), select(words)).prop_map(|(a, word)| Change::Insert(a, word)),
        (index(), index()).prop_map(|(a, b)| Change::SwapLines(a, b)),
        (index(), index()).prop_map(|(a, b)| Change::Splice(a, b)),
    ]
}

/// A character boundary of the text.
fn place(text: &str, index: &Index) -> usize {
    let mut at = index.index(text.len() + 1);
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn changed(text: &str, change: &Change, seeds: &[String]) -> String {
    let range = |a: &Index, b: &Index| {
        let (a, b) = (place(text, a), place(text, b));
        // Short stretches leave more of the file to go wrong.
        let end = a.max(b).min(a.min(b) + 40);
        let end = (a.min(b)..=end).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(end);
        a.min(b)..end
    };
    match change {
        Change::Remove(a, b) => {
            let range = range(a, b);
            text[..range.start].to_owned() + &text[range.end..]
        }
        Change::Repeat(a, b) => {
            let range = range(a, b);
            text[..range.end].to_owned() + &text[range.start..]
        }
        Change::Insert(a, word) => {
            let at = place(text, a);
            text[..at].to_owned() + word + &text[at..]
        }
        Change::SwapLines(a, b) => {
            let mut lines: Vec<&str> = text.lines().collect();
            if !lines.is_empty() {
                let (a, b) = (a.index(lines.len()), b.index(lines.len()));
                lines.swap(a, b);
            }
            lines.join("\n")
        }
        Change::Splice(a, b) => {
            let other = b.get(seeds);
            text[..place(text, a)].to_owned() + &other[place(other, b)..]
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_text_is_survived(text in ".{0,200}", file in select(&FILES[..])) {
        survives(&text, file);
    }

    #[test]
    fn any_change_to_a_file_is_survived(
        seed in any::<Index>(),
        changes in prop::collection::vec(change(), 1..6),
        file in select(&FILES[..]),
    ) {
        let seeds = seeds();
        let mut text = seed.get(&seeds).clone();
        for change in &changes {
            text = changed(&text, change, &seeds);
        }
        survives(&text, file);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), file in select(&FILES[..])) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(file);
        std::fs::write(&path, &bytes).unwrap();
        if let Err(error) = Config::load(&path) {
            prop_assert!(error.to_string().starts_with(path.to_str().unwrap()));
        }
    }
}

// ---- Good files ----

/// A table of those keys that are there.
fn table<const N: usize>(entries: [(&str, Option<Value>); N]) -> Value {
    let there = entries.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    Value::Object(there.collect::<Map<_, _>>())
}

fn maybe<T: std::fmt::Debug + Clone + Into<Value>>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Option<Value>> {
    prop::option::of(value).prop_map(|value| value.map(Into::into))
}

fn settings() -> impl Strategy<Value = Value> {
    let numbers = (maybe(0u32..=1_024), maybe(1u32..=1_024), maybe(4_096u32..=1_073_741_823), maybe(1u32..=65_507));
    (numbers, maybe(any::<bool>()), maybe(any::<bool>())).prop_map(
        |((workers, batch, buffer, packet), pin, preserve)| {
            table([
                ("workers", workers),
                ("batch_size", batch),
                ("recv_buf_size", buffer),
                ("max_packet_size", packet),
                ("pin_cpus", pin),
                ("preserve_source", preserve),
            ])
        },
    )
}

fn interface() -> impl Strategy<Value = Value> {
    let name = "[a-z][a-z0-9.-]{0,10}";
    prop_oneof![
        Just(json!("auto")),
        name.prop_map(Value::from),
        prop::collection::hash_set(name, 1..4).prop_map(|names| {
            let names: Vec<String> = names.into_iter().filter(|name| name != "auto").collect();
            if names.is_empty() { json!("auto") } else { json!(names) }
        }),
    ]
}

/// Receivers of IP version 6 or 4, each with an address of its own.
fn downstreams() -> impl Strategy<Value = Vec<(u32, Option<String>, Option<u32>)>> {
    // Under `replicate`, what is a weight here becomes a sample.
    let one = (any::<u32>(), prop::option::of("[!#-&(-\\[\\]-_a-~]{1,40}"), prop::option::of(1u32..=65_535));
    prop::collection::vec(one, 1..6)
}

fn source() -> impl Strategy<Value = (bool, Value)> {
    let label = "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?";
    let port = || prop_oneof![(1u16..).prop_map(Value::from), "[a-z]([a-z0-9-]{0,10}[a-z0-9])?".prop_map(Value::from)];
    let one = label.prop_map(|name| vec![("service", name.into())]);
    let several = (label, prop::collection::btree_map(label, prop::option::of((maybe(label), maybe(port()))), 1..4))
        .prop_map(|(name, others)| {
            let other = |(name, own): (String, Option<_>)| match own {
                None => Value::from(name),
                Some((namespace, port)) => {
                    table([("service", Some(name.into())), ("namespace", namespace), ("port", port)])
                }
            };
            let others = others.into_iter().filter(|(other, _)| *other != name).map(other);
            vec![("services", others.chain([Value::from(name.clone())]).collect())]
        });
    let locality = maybe(select(vec!["cluster", "prefer_node", "node", "prefer_zone"]));
    let terminating = maybe(select(vec!["never", "fallback", "until_gone"]));
    let service = (maybe(label), prop_oneof![one, several], port(), locality, terminating).prop_map(
        |(namespace, services, port, locality, terminating)| {
            let keys = [("namespace", namespace), ("port", Some(port)), ("locality", locality)];
            let mut kubernetes = table(keys);
            kubernetes["terminating"] = terminating.unwrap_or_else(|| "fallback".into());
            services.into_iter().for_each(|(key, value)| kubernetes[key] = value);
            json!({ "kubernetes": kubernetes })
        },
    );
    let known = (any::<bool>(), downstreams()).prop_map(|(v6, all)| {
        let downstream = |(index, (host, name, weight)): (usize, (u32, Option<String>, Option<u32>))| {
            // Unicast, and different for each.
            let port = 1_000 + index as u16;
            let address = match v6 {
                true => SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, (host >> 16) as u16, host as u16], port)),
                false => SocketAddr::from(([10, (host >> 16) as u8, (host >> 8) as u8, host as u8], port)),
            };
            table([
                ("name", name.map(|name| format!("{name}{index}").into())),
                ("address", Some(address.to_string().into())),
                ("weight", weight.map(Into::into)),
            ])
        };
        (v6, json!({ "downstream": all.into_iter().enumerate().map(downstream).collect::<Vec<_>>() }))
    });
    prop_oneof![known, (any::<bool>(), service)]
}

const PROTOCOLS: [&str; 8] = ["raw", "syslog", "statsd", "netflow", "ipfix", "sflow", "gelf", "dns"];
/// `policy` and `hash_on`.
const POLICIES: [(Option<&str>, Option<&str>); 7] = [
    (None, None),
    (Some("round_robin"), None),
    (Some("replicate"), None),
    (Some("hash"), None),
    (Some("hash"), Some("source_ip")),
    (Some("hash"), Some("source")),
    (Some("hash"), Some("flow")),
];

/// Prefixes of IP version 6 or 4, each there once; `sources`, where there are any, and perhaps a `rate_limit`.
fn senders(v6: bool) -> impl Strategy<Value = (Option<Value>, Option<Value>)> {
    let prefix = (0u8..=32).prop_map(move |length| match v6 {
        true => format!("2001:db8::/{}", 32 + u32::from(length)),
        false => format!(
            "{}/{length}",
            std::net::Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0))
        ),
    });
    let list = prop::collection::btree_set(prefix, 0..4).prop_map(|prefixes| match prefixes.len() {
        0 => None,
        1 => prefixes.first().map(|only| json!(only)),
        _ => Some(json!(prefixes)),
    });
    let limit = (1u32..=10_000_000, maybe(1u32..=100_000_000), maybe(0u8..=32), maybe(0u8..=128));
    let limit = limit.prop_map(|(rate, burst, v4, v6)| {
        table([("packets_per_second", Some(rate.into())), ("burst", burst), ("ipv4_prefix", v4), ("ipv6_prefix", v6)])
    });
    ((list.clone(), list), prop::option::of(limit)).prop_map(|((allow, deny), limit)| {
        let some = allow.is_some() || deny.is_some();
        (some.then(|| table([("allow", allow), ("deny", deny)])), limit)
    })
}

fn listener() -> impl Strategy<Value = Value> {
    let mode = maybe(select(vec!["auto", "tc_ebpf", "userspace"]));
    let keys = (
        "[A-Za-z0-9._-]{1,20}",
        any::<bool>(),
        maybe(interface()),
        mode,
        (maybe(select(PROTOCOLS.to_vec())), select(POLICIES.to_vec())),
        maybe(settings()),
        maybe(health(true)),
    );
    let source = source().prop_flat_map(|(v6, source)| (Just(v6), Just(source), senders(v6)));
    (keys, source).prop_map(
        |((name, wildcard, interface, mode, (protocol, policy), settings, health), (v6, mut source, senders))| {
            let ip = match (v6, wildcard) {
                (true, true) => "[::]",
                (true, false) => "[2001:db8::ffff:1]",
                (false, true) => "0.0.0.0",
                (false, false) => "192.0.2.1",
            };
            let (mut policy, hash_on) = policy;
            if protocol == Some(json!("gelf")) && policy == Some("round_robin") {
                policy = None;
            }
            if policy == Some("replicate") {
                for downstream in source.get_mut("downstream").and_then(Value::as_array_mut).into_iter().flatten() {
                    let downstream = downstream.as_object_mut().unwrap();
                    if let Some(weight) = downstream.remove("weight").and_then(|weight| weight.as_u64()) {
                        downstream.insert("sample".into(), json!(weight as f64 / 65_535.0));
                    }
                }
            }
            table([
                ("name", Some(name.into())),
                ("protocol", protocol),
                ("hash_on", hash_on.map(Into::into)),
                ("bind", Some(ip.into())),
                ("interface", interface),
                ("mode", mode),
                ("policy", policy.map(Into::into)),
                ("downstream", source.get("downstream").cloned()),
                ("kubernetes", source.get("kubernetes").cloned()),
                ("health", health),
                ("settings", settings),
                ("sources", senders.0),
                ("rate_limit", senders.1),
            ])
        },
    )
}

/// A `health` table; with `own`, a listener's, which says whether it is enabled.
fn health(own: bool) -> impl Strategy<Value = Value> {
    let centiseconds = (1u32..=360_000).prop_flat_map(|interval| (Just(interval), 1..=interval, 0..=interval));
    let text = || maybe(prop_oneof!["[ -~]{0,20}", "hex:([0-9a-f]{2} ?){0,9}"]);
    let of_protocol = (maybe(1u16..), text(), text(), maybe("/[a-z0-9%/]{0,20}"));
    let protocol = maybe(select(vec!["icmp", "udp_echo", "udp", "tcp", "http"]));
    let judgement = (maybe(1u32..=100), maybe(1u32..=100), maybe(any::<bool>()));
    let enabled = maybe(any::<bool>()).prop_map(move |given| if own { given.or(Some(json!(true))) } else { given });
    (enabled, centiseconds, protocol, of_protocol, judgement).prop_map(
        |(enabled, (interval, timeout, slow), protocol, (port, payload, expect, path), (unhealthy, healthy, open))| {
            let seconds = |n: u32| if n.is_multiple_of(100) { json!(n / 100) } else { json!(f64::from(n) / 100.0) };
            let name = protocol.as_ref().and_then(Value::as_str).unwrap_or("icmp").to_owned();
            let goes = |key: &str, value: Option<Value>| {
                value.filter(|_| match key {
                    "path" => name == "http",
                    "port" => name != "icmp",
                    _ => name == "udp",
                })
            };
            table([
                ("enabled", enabled),
                ("interval_secs", Some(seconds(interval))),
                ("timeout_secs", Some(seconds(timeout))),
                ("port", goes("port", port)),
                ("payload", goes("payload", payload)),
                ("expect", goes("expect", expect)),
                ("path", goes("path", path)),
                ("protocol", Some(protocol.unwrap_or_else(|| "icmp".into()))),
                ("unhealthy_threshold", unhealthy),
                ("healthy_threshold", healthy),
                ("fail_open", open),
                ("slow_start_secs", Some(seconds(slow))),
            ])
        },
    )
}

/// A whole file that breaks no rule.
fn good_file() -> impl Strategy<Value = Value> {
    let metrics =
        (maybe(any::<bool>()), maybe(select(vec!["[::]:9100", "127.0.0.1:1"])), maybe("/[a-z0-9._~-]{0,20}x"))
            .prop_map(|(enabled, bind, path)| table([("enabled", enabled), ("bind", bind), ("path", path)]));
    let limits = (maybe(10u32..=4_096), maybe(100u32..=1_000_000))
        .prop_map(|(listeners, downstreams)| table([("max_listeners", listeners), ("max_downstreams", downstreams)]));
    let socket = maybe("/[a-z0-9/._-]{0,60}x");
    let succession = (maybe(select(vec!["detach", "keep"])), maybe("/[a-z0-9/_-]{0,60}x"), maybe(0u32..=31_536_000));
    (prop::collection::vec(listener(), 1..8), maybe(health(false)), maybe(metrics), maybe(limits), socket, succession)
        .prop_map(|(mut listeners, health, metrics, limits, socket, (on_exit, pins, headless))| {
            for (index, listener) in listeners.iter_mut().enumerate() {
                let text = |key: &str| listener[key].as_str().unwrap().to_owned();
                let (name, bind) = (format!("{}-{index}", text("name")), format!("{}:{}", text("bind"), 5_000 + index));
                listener["name"] = name.into();
                listener["bind"] = bind.into();
            }
            table([
                ("listeners", Some(listeners.into())),
                ("health", health),
                ("metrics", metrics),
                ("limits", limits),
                ("status_socket", socket),
                ("on_exit", on_exit),
                ("pin_path", pins),
                ("max_headless_secs", headless),
            ])
        })
}

/// Block style YAML, with plain scalars where they are text.
fn yaml(value: &Value, indent: usize, out: &mut String) {
    let margin = "  ".repeat(indent);
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            for (key, value) in entries {
                write!(out, "\n{margin}{key}:").unwrap();
                yaml(value, indent + 1, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                write!(out, "\n{margin}-").unwrap();
                yaml(item, indent + 1, out);
            }
        }
        Value::String(text) if ["tc_ebpf", "round_robin", "icmp"].contains(&&**text) || text.starts_with("10.") => {
            write!(out, " {text}").unwrap();
        }
        // JSON is YAML.
        other => write!(out, " {other}").unwrap(),
    }
}

proptest! {
    #[test]
    fn toml_and_yaml_mean_the_same_and_so_does_the_rendering(file in good_file()) {
        let toml = toml::to_string(&file).unwrap();
        let mut block = String::new();
        yaml(&file, 0, &mut block);
        let read = |text: &str, file: &str| {
            let mut config = Config::parse(text, Path::new(file)).unwrap_or_else(|error| panic!("{error}\n{text}"));
            config.path = "c".into();
            config
        };
        let from_toml = read(&toml, "c.toml");
        prop_assert_eq!(&read(&block, "c.yaml"), &from_toml);
        prop_assert_eq!(&read(&file.to_string(), "c.yml"), &from_toml);
        prop_assert_eq!(again(&from_toml), from_toml);
    }
}
