//! Tests of the whole way from a file's text to a [`Config`](super::Config) or to a message.

mod bad_input;
mod generated;
mod properties;

use std::fs;
use std::path::Path;

use super::*;
use crate::discovery::PortRef;
use crate::health::settings as probe;
use crate::model::HashOn;

/// A file with one listener, without anything that need not be there.
const ONE: &str = "[[listeners]]\nname = \"a\"\nbind = \"0.0.0.0:5514\"\ndownstream = [{ address = \"10.0.0.1:1\" }]\n";

fn config(text: &str) -> Config {
    Config::parse(text, Path::new("c.toml")).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = config(ONE);
    assert_eq!(config.health, None);
    assert_eq!(config.metrics, None);
    assert_eq!(
        config.limits,
        MapLimits { max_listeners: 256, max_downstreams: 16_384, max_sources: 65_536, max_senders: 65_536 }
    );
    assert_eq!(config.status_socket, Path::new("/run/udp-fanout/status.sock"));
    assert_eq!(config.attach, AttachConfig { hook: AttachHook::Clsact, order: TcxOrder::First });
    let listener = &config.listeners[0];
    assert_eq!(listener.interfaces, Interfaces::Auto);
    assert_eq!(listener.mode, RequestedMode::Auto);
    assert_eq!(listener.policy, Policy::RoundRobin);
    assert!(listener.sources.allows_everyone());
    assert_eq!(listener.rate_limit, None);
    let DownstreamSource::Static(downstreams) = &listener.source else { panic!() };
    assert_eq!(&*downstreams[0].name, "10.0.0.1:1", "its address");
    assert_eq!((downstreams[0].weight, downstreams[0].sample), (1, Downstream::ALL));
    assert_eq!(listener.protocol, ListenerProtocol::Raw);
    assert_eq!(config.warnings, [""; 0]);
    let settings = UserspaceSettings {
        workers: 0,
        batch_size: 64,
        pin_cpus: false,
        recv_buf_size: None,
        max_packet_size: 65_507,
        preserve_source: false,
    };
    assert_eq!(listener.settings, settings);
    assert_eq!(config.listeners.len(), 1);
}

#[test]
fn a_metrics_table_enables_metrics_unless_it_says_otherwise() {
    let metrics = |text: &str| config(&format!("{ONE}[metrics]\n{text}")).metrics;
    let default = MetricsConfig { bind: "0.0.0.0:9090".parse().unwrap(), path: "/metrics".into() };
    assert_eq!(metrics(""), Some(default));
    assert_eq!(metrics("bind = \"[::1]:80\"\npath = \"/\"").unwrap().path, "/");
    assert_eq!(metrics("enabled = false"), None);
}

#[test]
fn a_health_table_must_enable_health_checks() {
    let health = |text: &str| config(&format!("{ONE}[health]\n{text}")).health;
    assert_eq!(health("interval_secs = 1.5\ntimeout_secs = 1"), None);
    let enabled = health("enabled = true\ninterval_secs = 0.25\ntimeout_secs = 0.25").unwrap();
    assert_eq!(
        (enabled.probe.interval, enabled.probe.timeout),
        (Duration::from_millis(250), Duration::from_millis(250))
    );
    assert_eq!(enabled.probe.protocol, probe::ProbeProtocol::Icmp);
}

#[test]
fn a_listeners_health_table_wins_key_by_key() {
    let text = "[health]\nprotocol = \"http\"\nport = 80\nfail_open = false\n";
    let of = |own: &str| config(&format!("{text}{ONE}[listeners.health]\n{own}"));
    let health = |own: &str| of(own).listeners[0].health.clone();
    let enabled = health("enabled = true").unwrap();
    assert_eq!(enabled.probe.protocol, probe::ProbeProtocol::Http { port: Some(80), path: "/".into() });
    assert!(!enabled.fail_open);
    let other = health("enabled = true\nprotocol = \"tcp\"\nfail_open = true").unwrap();
    assert_eq!(other.probe.protocol, probe::ProbeProtocol::Tcp { port: None });
    assert!(other.fail_open);
    assert_eq!(health("port = 81"), None);
    let warning = "listeners[0].health: health checks are not enabled, so nothing is checked; add enabled = true";
    assert_eq!(of("port = 81").warnings, [warning]);
    assert_eq!(of("enabled = false\nport = 81").warnings, [""; 0]);
    assert_eq!(of("").warnings, [""; 0]);
}

#[test]
fn interfaces_are_a_name_a_list_or_auto() {
    let interfaces = |value: &str| {
        config(&ONE.replace("name", &format!("interface = {value}\nname"))).listeners.remove(0).interfaces
    };
    let named = |names: &[&str]| Interfaces::Named(names.iter().map(ToString::to_string).collect());
    assert_eq!(interfaces("\"auto\""), Interfaces::Auto);
    assert_eq!(interfaces("\"eth0\""), named(&["eth0"]));
    assert_eq!(interfaces("[\"eth0\"]"), named(&["eth0"]));
    assert_eq!(interfaces("[\"eth1\", \"eth0.100\"]"), named(&["eth1", "eth0.100"]));
}

#[test]
fn numbers_may_be_written_as_each_notation_allows() {
    let batch_size = |text: &str, file: &str| {
        let config = Config::parse(text, Path::new(file)).unwrap_or_else(|error| panic!("{error}"));
        config.listeners[0].settings.batch_size
    };
    for number in ["1_000", "+1000", "0x3e8", "0o1750", "0b11_1110_1000"] {
        let text = format!("{ONE}[listeners.settings]\nbatch_size = {number}\n");
        assert_eq!(batch_size(&text, "c.toml"), 1_000, "{number}");
    }
    for number in ["1000", "+1000", "0x3e8", "0o1750"] {
        let text = format!(
            "listeners:\n- {{name: a, bind: 0.0.0.0:1, downstream: [{{address: 10.0.0.1:1}}], settings: {{batch_size: {number}}}}}\n"
        );
        assert_eq!(batch_size(&text, "c.yaml"), 1_000, "{number}");
    }
}

/// [`ONE`] with these lines in its listener and these keys in its downstream.
fn one_with(lines: &str, downstream: &str) -> String {
    ONE.replace("name", &format!("{lines}\nname")).replace(":1\" }", &format!(":1\"{downstream} }}"))
}

#[test]
fn a_policy_is_what_the_file_says_or_what_suits_the_protocol() {
    let policy = |lines: &str| {
        let config = config(&one_with(lines, ""));
        assert_eq!(config.warnings, [""; 0], "{lines}");
        config.listeners[0].policy
    };
    let by_address = Policy::Hash(HashOn::SourceIp);
    assert_eq!(policy("policy = \"hash\""), by_address);
    assert_eq!(policy("policy = \"hash\"\nhash_on = \"flow\""), Policy::Hash(HashOn::Flow));
    assert_eq!(policy("policy = \"replicate\""), Policy::Replicate);
    for (protocol, expected) in [
        ("raw", Policy::RoundRobin),
        ("syslog", Policy::RoundRobin),
        ("dns", Policy::RoundRobin),
        ("netflow", by_address),
        ("ipfix", by_address),
        ("sflow", by_address),
        ("statsd", by_address),
        ("gelf", Policy::GelfMessage),
    ] {
        assert_eq!(policy(&format!("protocol = \"{protocol}\"")), expected, "{protocol}");
    }
    assert_eq!(policy("protocol = \"ipfix\"\nhash_on = \"source\""), Policy::Hash(HashOn::Source));
    assert_eq!(policy("protocol = \"gelf\"\npolicy = \"hash\""), by_address);
    assert_eq!(policy("protocol = \"netflow\"\npolicy = \"replicate\""), Policy::Replicate);
}

#[test]
fn what_may_break_a_protocol_is_warned_about() {
    let warnings = |lines: &str, downstream: &str| config(&one_with(lines, downstream)).warnings;
    let end = "remove `policy` to get the one that suits the protocol";
    for (protocol, policy, why) in [
        (
            "netflow",
            "round_robin",
            "separates NetFlow v9 and IPFIX records from their templates, unless exporters use v5 or receivers share templates",
        ),
        (
            "ipfix",
            "round_robin",
            "separates NetFlow v9 and IPFIX records from their templates, unless exporters use v5 or receivers share templates",
        ),
        (
            "sflow",
            "round_robin",
            "leaves each receiver gaps in the sequence numbers, which it counts as losses unless it ignores them",
        ),
        (
            "statsd",
            "round_robin",
            "splits a sender's gauges and sets between receivers, which makes them wrong, unless it sends counters only",
        ),
        ("dns", "replicate", "makes every receiver answer every query, unless all but one stay silent"),
    ] {
        let expected = format!("listeners[0].policy: \"{policy}\" {why}; {end}");
        assert_eq!(warnings(&format!("protocol = \"{protocol}\"\npolicy = \"{policy}\""), ""), [expected]);
    }
    let replicate = |protocol: &str| format!("protocol = \"{protocol}\"\npolicy = \"replicate\"");
    let at = "listeners[0].downstream[0].sample";
    assert_eq!(
        warnings(&replicate("ipfix"), ", sample = 0.5"),
        [format!("{at}: 0.5 leaves out templates, without which records cannot be read; remove it to copy everything")]
    );
    assert_eq!(warnings(&replicate("gelf"), ", sample = 0.5").len(), 1);
    assert_eq!(warnings(&replicate("ipfix"), ", sample = 1.0"), [""; 0]);
    assert_eq!(warnings(&replicate("syslog"), ", sample = 0.5"), [""; 0]);
}

#[test]
fn a_sample_is_a_part_of_all_that_a_u32_can_say() {
    let sample = |part: &str| {
        let config = config(&one_with("policy = \"replicate\"", &format!(", sample = {part}")));
        let DownstreamSource::Static(downstreams) = &config.listeners[0].source else { panic!() };
        assert!(config.render().contains(&format!("sample = {part}\n")), "{}", config.render());
        downstreams[0].sample
    };
    assert_eq!(sample("1"), Downstream::ALL);
    assert_eq!(sample("0.5"), 1 << 31);
    assert_eq!(sample("0.01"), 42_949_673);
    assert_eq!(sample("0.000001"), 4_295);
}

#[test]
fn services_share_what_they_do_not_say_themselves() {
    let source = |kubernetes: &str| {
        let text = format!("[[listeners]]\nname = \"a\"\nbind = \"0.0.0.0:1\"\nkubernetes = {{ {kubernetes} }}\n");
        let DownstreamSource::Kubernetes(source) = config(&text).listeners.remove(0).source else { panic!() };
        source
    };
    let service = |namespace: Option<&str>, service: &str, port: PortRef| ServiceRef {
        namespace: namespace.map(str::to_owned),
        service: service.to_owned(),
        port,
    };
    let number = PortRef::Number;
    let one = source("service = \"s\", port = 5514");
    assert_eq!(one.services, [service(None, "s", number(5514))]);
    assert_eq!((one.locality, one.terminating), (Locality::Cluster, Terminating::Fallback));
    let several = source(
        "namespace = \"n\", port = \"syslog\", locality = \"node\", terminating = \"until_gone\", \
         services = [\"a\", { service = \"b\", port = 1 }, { service = \"a\", namespace = \"m\" }, { service = \"a\", port = 2 }]",
    );
    let named = || PortRef::Name("syslog".to_owned());
    assert_eq!(
        several.services,
        [
            service(Some("n"), "a", named()),
            service(Some("n"), "b", number(1)),
            service(Some("m"), "a", named()),
            service(Some("n"), "a", number(2)),
        ]
    );
    assert_eq!((several.locality, several.terminating), (Locality::Node, Terminating::UntilGone));
    let own = source("services = [{ service = \"a\", port = 1 }, { service = \"b\", port = \"x\" }]");
    assert_eq!(own.services, [service(None, "a", number(1)), service(None, "b", PortRef::Name("x".to_owned()))]);
}

#[test]
fn a_name_among_the_downstreams_makes_all_of_them_a_source_of_names() {
    let text = one_with("resolve_interval_secs = 2.5", ", weight = 2").replace("10.0.0.1:1", "Vector.example:1");
    let config = config(&text);
    let DownstreamSource::Names(source) = &config.listeners[0].source else { panic!() };
    assert_eq!(source.interval, Duration::from_millis(2_500));
    let entry = &source.entries[0];
    assert_eq!(
        (entry.address.to_string(), &*entry.name, entry.weight),
        ("vector.example:1".into(), "vector.example:1", 2)
    );
    assert!(config.render().contains("resolve_interval_secs = 2.5\n"), "{}", config.render());
    assert!(config.render().contains("address = \"vector.example:1\"\n"), "{}", config.render());
    let request = config.listeners[0].names_request().unwrap();
    assert_eq!((request.entries, request.interval), (source.entries.clone(), source.interval));
    assert!(config.listeners[0].discovery_request().is_none());
}

#[test]
fn listeners_may_share_a_port_where_their_sockets_can() {
    for [first, second] in [
        ["127.0.0.1:53", "127.0.0.2:53"],
        ["0.0.0.0:53", "[::]:53"],
        ["0.0.0.0:53", "[::1]:53"],
        ["0.0.0.0:53", "0.0.0.0:54"],
    ] {
        let receiver = |bind: &str| if bind.starts_with('[') { "[2001:db8::1]:1" } else { "10.0.0.1:1" };
        let listener = |name: &str, bind: &str| {
            let receiver = receiver(bind);
            format!(
                "[[listeners]]\nname = \"{name}\"\nbind = \"{bind}\"\ndownstream = [{{ address = \"{receiver}\" }}]\n"
            )
        };
        assert_eq!(config(&(listener("a", first) + &listener("b", second))).listeners.len(), 2);
    }
}

#[test]
fn downstreams_may_be_near_the_listener_without_being_it() {
    for (bind, address) in [
        ("0.0.0.0:5514", "127.0.0.1:5515"),
        ("0.0.0.0:5514", "10.0.0.1:5514"),
        ("127.0.0.1:5514", "127.0.0.2:5514"),
        ("[::]:5514", "[::1]:5515"),
    ] {
        config(&ONE.replace("0.0.0.0:5514", bind).replace("10.0.0.1:1", address));
    }
}

#[test]
fn yaml_anchors_and_merge_keys_work() {
    let text = "
listeners:
  - &base
    name: a
    bind: 0.0.0.0:1
    mode: userspace
    downstream: &receivers
      - address: 10.0.0.1:1
  - <<: *base
    name: b
    bind: 0.0.0.0:2
  - {name: c, bind: '0.0.0.0:3', downstream: *receivers}
";
    let config = Config::parse(text, Path::new("c.yaml")).unwrap();
    let shown: Vec<_> = config.listeners.iter().map(|l| (l.name.as_str(), l.bind.port(), l.mode)).collect();
    let (auto, user) = (RequestedMode::Auto, RequestedMode::Userspace);
    assert_eq!(shown, [("a", 1, user), ("b", 2, user), ("c", 3, auto)]);
    assert!(config.listeners.iter().all(|l| l.source == config.listeners[0].source));
}

#[test]
fn many_listeners_may_share_one_list() {
    let mut text = String::from("listeners:\n- {name: a0, bind: 0.0.0.0:1000, downstream: &all [");
    (1..=150).for_each(|n| text += &format!("{{name: r{n}, address: 10.0.0.{n}:1}}, "));
    text += "]}\n";
    (1..256).for_each(|n| text += &format!("- {{name: a{n}, bind: 0.0.0.0:{}, downstream: *all}}\n", 1_000 + n));
    text += "limits: {max_downstreams: 100000}\n";
    let config = Config::parse(&text, Path::new("c.yaml")).unwrap_or_else(|error| panic!("{error}"));
    assert!(config.listeners.iter().all(|l| matches!(&l.source, DownstreamSource::Static(all) if all.len() == 150)));
}

#[test]
fn a_rendering_reads_well() {
    let text = ONE.replace("name", "interface = [\"eth0\", \"eth1\"]\nname")
        + "[health]\nenabled = true\ntimeout_secs = 0.5\n";
    let expected = r#"watch_config = true
status_socket = "/run/udp-fanout/status.sock"
attach = "clsact"
tcx_order = "first"
on_exit = "detach"
pin_path = "/sys/fs/bpf/udp-fanout"
max_headless_secs = 300

[[listeners]]
name = "a"
bind = "0.0.0.0:5514"
interface = ["eth0", "eth1"]
mode = "auto"
protocol = "raw"
policy = "round_robin"
resolve_interval_secs = 30

[[listeners.downstream]]
name = "10.0.0.1:1"
address = "10.0.0.1:1"
weight = 1
sample = 1

[listeners.settings]
workers = 0
batch_size = 64
pin_cpus = false
max_packet_size = 65507
preserve_source = false

[health]
enabled = true
interval_secs = 5
timeout_secs = 0.5
protocol = "icmp"
unhealthy_threshold = 1
healthy_threshold = 2
fail_open = true
slow_start_secs = 0

[metrics]
enabled = false
bind = "0.0.0.0:9090"
path = "/metrics"

[limits]
max_listeners = 256
max_downstreams = 16384
max_sources = 65536
max_senders = 65536
"#;
    assert_eq!(config(&text).render(), expected);
}

#[test]
fn files_are_loaded_and_those_that_cannot_be_are_named_with_the_fix() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let message = |name: &str| {
        let error = Config::load(&path(name)).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 1, "{error}");
        error.strip_prefix(&format!("{}", path(name).display())).unwrap_or_else(|| panic!("{error}")).to_owned()
    };

    fs::write(path("good.toml"), ONE).unwrap();
    let loaded = Config::load(&path("good.toml")).unwrap();
    assert_eq!(loaded.path, path("good.toml"));

    assert_eq!(
        message("absent.toml"),
        ": no such file; create it (config/reference.toml shows every key), or name another with --config"
    );
    fs::create_dir(path("directory")).unwrap();
    assert_eq!(message("directory"), ": is a directory; name a file in it with --config");
    fs::write(path("latin1.toml"), b"# ok\n# caf\xe9\n").unwrap();
    assert_eq!(message("latin1.toml"), ":2: not UTF-8 text; save the file as UTF-8");
}

#[test]
fn a_large_file_is_read() {
    let mut text =
        String::from("limits:\n  max_downstreams: 1000000\nlisteners:\n- name: a\n  bind: 0.0.0.0:1\n  downstream:\n");
    for n in 0..100_000u32 {
        text += &format!("  - address: 10.{}.{}.{}:9\n", n >> 16, (n >> 8) & 255, n & 255);
    }
    let config = Config::parse(&text, Path::new("c.yaml")).unwrap();
    assert!(matches!(&config.listeners[0].source, DownstreamSource::Static(all) if all.len() == 100_000));
}
