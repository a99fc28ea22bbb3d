//! The table of every key a configuration file may hold: kind, default, range, meaning.
//!
//! It is the one place that says what a key is. `shape` checks files against it, the tests hold the serde types of
//! `file`, `config/reference.toml` and `docs/CONFIGURATION.md` to it, and a key missing from either fails them.

mod health;

use std::ops::RangeInclusive;

pub use self::health::{HEALTH, LISTENER_HEALTH};
use super::{
    BATCH_SIZES, BURSTS, HEADLESS_SECONDS, MAX_DOWNSTREAMS, MAX_LISTENERS, MAX_SENDERS, MAX_SOURCES, PACKET_RATES,
    PACKET_SIZES, RECV_BUF_SIZES, RESOLVE_SECONDS, SAMPLES, WEIGHTS, WORKER_COUNTS,
};

/// One key.
#[derive(Debug)]
pub struct KeySpec {
    /// Its name, without the tables it is in.
    pub name: &'static str,
    /// What it takes.
    pub kind: KeyKind,
    /// What happens without it.
    pub absent: WhenAbsent,
    /// A value that makes sense, as TOML. Empty for tables, whose keys have their own.
    pub example: &'static str,
    /// What it does, in a sentence or two.
    pub meaning: &'static str,
}

/// What a key takes.
#[derive(Debug)]
pub enum KeyKind {
    /// A table with these keys.
    Table(&'static [KeySpec]),
    /// A list of tables with these keys.
    Tables(&'static [KeySpec]),
    /// A list of tables with these keys; text, as the words here say, stands for a table with only the first of them.
    NamesOrTables(&'static str, &'static [KeySpec]),
    /// Text, which must be what the words here say.
    Text(&'static str),
    /// Text or a list of texts, which must be what the words here say.
    Texts(&'static str),
    /// One of these texts.
    Choice(&'static [&'static str]),
    /// `true` or `false`.
    Flag,
    /// A whole number within these bounds.
    Integer(RangeInclusive<i64>),
    /// A whole number within these bounds, or text, which must be what the words here say.
    IntegerOrText(RangeInclusive<i64>, &'static str),
    /// A number within these bounds, which may have a fraction.
    Number(RangeInclusive<f64>),
    /// A number of seconds within these bounds, which may have a fraction.
    Seconds(RangeInclusive<f64>),
}

impl KeyKind {
    /// The keys of a table or of a list's tables.
    #[must_use]
    pub fn children(&self) -> &'static [KeySpec] {
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
            KeyKind::Text(form) | KeyKind::Texts(form) => (*form).to_owned(),
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

/// What the absence of a key means.
#[derive(Debug)]
pub enum WhenAbsent {
    /// The table that it belongs in is incomplete.
    Refused,
    /// This value, as TOML, is assumed.
    Default(&'static str),
    /// What the words say.
    Means(&'static str),
}

const fn key(
    name: &'static str,
    kind: KeyKind,
    absent: WhenAbsent,
    example: &'static str,
    meaning: &'static str,
) -> KeySpec {
    KeySpec { name, kind, absent, example, meaning }
}

const PORT: KeyKind = KeyKind::IntegerOrText(1..=65_535, "the name of a Service's port");

const fn wide(range: RangeInclusive<u32>) -> RangeInclusive<i64> {
    *range.start() as i64..=*range.end() as i64
}

/// The keys of the file itself.
pub static FILE: &[KeySpec] = &[
    key(
        "listeners",
        KeyKind::Tables(LISTENER),
        WhenAbsent::Refused,
        "",
        "The addresses that datagrams are sent to, and where each hands them on. At least one; a listener's position at the start, from 0, is its `listener_id` in logs.",
    ),
    key(
        "health",
        KeyKind::Table(HEALTH),
        WhenAbsent::Means("no health checks"),
        "",
        "Health checks of all downstreams of all listeners.",
    ),
    key(
        "metrics",
        KeyKind::Table(METRICS),
        WhenAbsent::Means("no HTTP endpoint"),
        "",
        "The HTTP endpoint for Prometheus, `/healthz` and `/readyz`.",
    ),
    key(
        "limits",
        KeyKind::Table(LIMITS),
        WhenAbsent::Means("the defaults of its keys"),
        "",
        "Sizes of the kernel program's maps. They cost kernel memory and stay as they are while the daemon runs.",
    ),
    key(
        "watch_config",
        KeyKind::Flag,
        WhenAbsent::Default("true"),
        "false",
        "Read the file again when it changes, as on SIGHUP. See [Changing a running daemon](#changing-a-running-daemon).",
    ),
    key(
        "status_socket",
        KeyKind::Text("an absolute path of at most 107 bytes"),
        WhenAbsent::Default("\"/run/udp-fanout/status.sock\""),
        "\"/run/udp-fanout/edge.sock\"",
        "The Unix socket on which the daemon answers `udp-fanout status`; only its own user and root may open it. Daemons that share a file system need one each.",
    ),
    key(
        "attach",
        KeyKind::Choice(&["clsact", "tcx", "auto"]),
        WhenAbsent::Default("\"clsact\""),
        "\"tcx\"",
        "How the kernel program is attached to interfaces. See [Other programs on the same interface](#other-programs-on-the-same-interface).",
    ),
    key(
        "tcx_order",
        KeyKind::Choice(&["first", "last"]),
        WhenAbsent::Default("\"first\""),
        "\"last\"",
        "Its place among an interface's TCX programs, where it is attached as one: before or behind those that are there.",
    ),
    key(
        "on_exit",
        KeyKind::Choice(&["detach", "keep"]),
        WhenAbsent::Default("\"detach\""),
        "\"keep\"",
        "What becomes of the kernel program when the daemon ends: it is taken off the interfaces (`detach`), or goes on forwarding until the next daemon takes over (`keep`). See [Restart and upgrade without loss](#restart-and-upgrade-without-loss).",
    ),
    key(
        "pin_path",
        KeyKind::Text("an absolute path in a BPF file system"),
        WhenAbsent::Default("\"/sys/fs/bpf/udp-fanout\""),
        "\"/sys/fs/bpf/udp-fanout-edge\"",
        "The directory in which the program and its maps are kept under `on_exit = \"keep\"`, and in which the next daemon looks for them. Daemons of one network namespace need one each.",
    ),
    key(
        "max_headless_secs",
        KeyKind::Integer(wide(HEADLESS_SECONDS)),
        WhenAbsent::Default("300"),
        "3600",
        "Seconds after which the kernel program, if no daemon has been there, passes everything up the host's stack instead of forwarding to receivers of which nobody knows whether they still are. 0 means never.",
    ),
];

/// The keys of one of `listeners`.
pub static LISTENER: &[KeySpec] = &[
    key(
        "name",
        KeyKind::Text("1 to 63 of A-Z a-z 0-9 . _ -"),
        WhenAbsent::Refused,
        "\"syslog\"",
        "Its name in logs and in the `listener` label of metrics. No two listeners share one.",
    ),
    key(
        "bind",
        KeyKind::Text("IP:port"),
        WhenAbsent::Refused,
        "\"0.0.0.0:5514\"",
        "The address and port that senders send to. `0.0.0.0` stands for all IPv4 addresses of the host and `[::]` for all its IPv6 addresses, and only those. A multicast group is joined on each `interface`. No two listeners share an address and port.",
    ),
    key(
        "interface",
        KeyKind::Texts("an interface name, a list of them, or \"auto\""),
        WhenAbsent::Default("\"auto\""),
        "[\"eth0\", \"eth1\"]",
        "Where the kernel program is attached: the interfaces on which datagrams arrive. `\"auto\"` means those that carry a default route. It may be a physical one, a VLAN device, a bridge, one end of a pair, a tun device or WireGuard; IP tunnels and PPP need `mode = \"userspace\"`. Userspace mode ignores it, but for a multicast group, which is joined there and for which the names must be given.",
    ),
    key(
        "mode",
        KeyKind::Choice(&["auto", "tc_ebpf", "userspace"]),
        WhenAbsent::Default("\"auto\""),
        "\"tc_ebpf\"",
        "The datapath: the kernel program (`tc_ebpf`), sockets (`userspace`), or the first where the kernel and the daemon's privileges allow it, else the second (`auto`). The log says which one `auto` took, and why.",
    ),
    key(
        "protocol",
        KeyKind::Choice(&["raw", "syslog", "statsd", "netflow", "ipfix", "sflow", "gelf", "dns"]),
        WhenAbsent::Default("\"raw\""),
        "\"netflow\"",
        "What the datagrams are. It decides the policy where `policy` is not there, and what is said about one that is.",
    ),
    key(
        "policy",
        KeyKind::Choice(&["round_robin", "hash", "replicate"]),
        WhenAbsent::Means("what suits the `protocol`"),
        "\"hash\"",
        "How a datagram's downstream is chosen: the next one in turn (`round_robin`), always the same for one sender (`hash`), or all of them, a copy each (`replicate`, for at most 64 downstreams).",
    ),
    key(
        "hash_on",
        KeyKind::Choice(&["source_ip", "source", "flow"]),
        WhenAbsent::Means("`\"source_ip\"` under `hash`"),
        "\"source_ip\"",
        "What makes a sender one and the same under `hash`: its address (`source_ip`), its address and port (`source`), or both addresses and both ports (`flow`). Other policies do not take it.",
    ),
    key(
        "sources",
        KeyKind::Table(SOURCES),
        WhenAbsent::Means("everybody may send"),
        "",
        "Who may send to the listener. What others send is dropped and counted as `source_denied`.",
    ),
    key(
        "rate_limit",
        KeyKind::Table(RATE_LIMIT),
        WhenAbsent::Means("senders may send as fast as they like"),
        "",
        "How fast each sender may send. What it sends beyond that is dropped and counted as `rate_limited`.",
    ),
    key(
        "downstream",
        KeyKind::Tables(DOWNSTREAM),
        WhenAbsent::Means("`kubernetes` must be there"),
        "",
        "The receivers, where they are known beforehand. Either this or `kubernetes`.",
    ),
    key(
        "resolve_interval_secs",
        KeyKind::Seconds(RESOLVE_SECONDS),
        WhenAbsent::Default("30"),
        "5",
        "Seconds after which the names of downstreams that are given by name are looked up again.",
    ),
    key(
        "kubernetes",
        KeyKind::Table(KUBERNETES),
        WhenAbsent::Means("`downstream` must be there"),
        "",
        "The Services whose ready endpoints are the receivers. Either this or `downstream`.",
    ),
    key(
        "health",
        KeyKind::Table(LISTENER_HEALTH),
        WhenAbsent::Means("as in `health`"),
        "",
        "Health checks of this listener's downstreams, where they differ from those of all listeners.",
    ),
    key(
        "settings",
        KeyKind::Table(SETTINGS),
        WhenAbsent::Means("the defaults of its keys"),
        "",
        "The listener's userspace datapath, which in `tc_ebpf` mode forwards what the kernel program leaves to it.",
    ),
];

/// What an address range looks like.
const PREFIXES: &str = "an address, a prefix such as 10.0.0.0/8, or a list of them";

/// The keys of `listeners[].sources`.
pub static SOURCES: &[KeySpec] = &[
    key(
        "allow",
        KeyKind::Texts(PREFIXES),
        WhenAbsent::Means("everybody that `deny` does not name"),
        "[\"10.0.0.0/8\", \"192.0.2.7\"]",
        "Addresses whose datagrams are taken. With it, those of nobody else are.",
    ),
    key(
        "deny",
        KeyKind::Texts(PREFIXES),
        WhenAbsent::Means("nobody that may send otherwise"),
        "\"10.1.0.0/16\"",
        "Addresses whose datagrams are dropped. Where `allow` names a sender too, the longer prefix decides, and `deny` if both are the same.",
    ),
];

/// The keys of `listeners[].rate_limit`.
pub static RATE_LIMIT: &[KeySpec] = &[
    key(
        "packets_per_second",
        KeyKind::Integer(wide(PACKET_RATES)),
        WhenAbsent::Refused,
        "10000",
        "Datagrams in a second that each sender may send, over time.",
    ),
    key(
        "burst",
        KeyKind::Integer(wide(BURSTS)),
        WhenAbsent::Means("as many as `packets_per_second`"),
        "20000",
        "Datagrams that it may send at once after a pause.",
    ),
    key(
        "ipv4_prefix",
        KeyKind::Integer(0..=32),
        WhenAbsent::Means("32"),
        "24",
        "How many bits of an IPv4 address make a sender: with 24, a network of 256 addresses is one; with 0, all senders together are.",
    ),
    key("ipv6_prefix", KeyKind::Integer(0..=128), WhenAbsent::Means("64"), "56", "The same for IPv6."),
];

/// The keys of one of `listeners[].downstream`.
pub static DOWNSTREAM: &[KeySpec] = &[
    key(
        "name",
        KeyKind::Text("1 to 253 printable ASCII characters without blanks, quotes and backslashes"),
        WhenAbsent::Means("its address"),
        "\"receiver-1\"",
        "Its name in logs. No two downstreams of a listener share one.",
    ),
    key(
        "address",
        KeyKind::Text("IP:port or name:port"),
        WhenAbsent::Refused,
        "\"10.0.1.10:5514\"",
        "Where its datagrams are sent: an address of one host, of the same IP version as the listener's `bind`, or a DNS name, of which each address of that version is a downstream. No two downstreams of a listener share one.",
    ),
    key(
        "weight",
        KeyKind::Integer(wide(WEIGHTS)),
        WhenAbsent::Default("1"),
        "2",
        "Its share of the datagrams, relative to the listener's other downstreams. Not under `replicate`.",
    ),
    key(
        "sample",
        KeyKind::Number(SAMPLES),
        WhenAbsent::Default("1"),
        "0.01",
        "The part of the datagrams that is copied to it, each drawn by lot; 1 means every one. Only under `replicate`.",
    ),
];

/// The keys of `listeners[].kubernetes`.
pub static KUBERNETES: &[KeySpec] = &[
    key(
        "namespace",
        KeyKind::Text("a namespace's name"),
        WhenAbsent::Means("the daemon's own namespace"),
        "\"logging\"",
        "The namespace of its Services.",
    ),
    key(
        "service",
        KeyKind::Text("a Service's name"),
        WhenAbsent::Means("`services` must be there"),
        "\"vector-aggregators\"",
        "The Service's name. A headless one is recommended.",
    ),
    key(
        "services",
        KeyKind::NamesOrTables("Services' names", SERVICES),
        WhenAbsent::Means("`service` must be there"),
        "[\"vector-blue\", \"vector-green\"]",
        "Several Services, whose endpoints are the receivers together. Either this or `service`.",
    ),
    key(
        "port",
        PORT,
        WhenAbsent::Means("each of `services` must have its own"),
        "5514",
        "The UDP port that the receivers listen on: the container's, not the Service's. Or the name of a port of the Service, and each EndpointSlice says which number that is.",
    ),
    key(
        "locality",
        KeyKind::Choice(&["cluster", "prefer_node", "node", "prefer_zone"]),
        WhenAbsent::Default("\"cluster\""),
        "\"prefer_node\"",
        "Which endpoints take part, by where they run: all alike (`cluster`), those on the daemon's node and, while it has none, all (`prefer_node`), only those on the daemon's node (`node`), or those in its zone and, while it has none, all (`prefer_zone`).",
    ),
    key(
        "terminating",
        KeyKind::Choice(&["never", "fallback", "until_gone"]),
        WhenAbsent::Default("\"fallback\""),
        "\"until_gone\"",
        "Whether endpoints take part that are shutting down and still serve: never, while no endpoint is ready (`fallback`), or like ready ones until they are gone (`until_gone`).",
    ),
];

/// The keys of one of `listeners[].kubernetes.services`.
pub static SERVICES: &[KeySpec] = &[
    key(
        "service",
        KeyKind::Text("a Service's name"),
        WhenAbsent::Refused,
        "\"vector-aggregators\"",
        "The Service's name. A headless one is recommended.",
    ),
    key(
        "namespace",
        KeyKind::Text("a namespace's name"),
        WhenAbsent::Means("that of `kubernetes`"),
        "\"logging\"",
        "The Service's namespace.",
    ),
    key("port", PORT, WhenAbsent::Means("that of `kubernetes`"), "\"syslog\"", "The port on this Service's endpoints."),
];

/// The keys of `listeners[].settings`.
pub static SETTINGS: &[KeySpec] = &[
    key(
        "workers",
        KeyKind::Integer(wide(WORKER_COUNTS)),
        WhenAbsent::Default("0"),
        "4",
        "Worker threads, each with its own socket; 0 means one for each CPU.",
    ),
    key(
        "batch_size",
        KeyKind::Integer(wide(BATCH_SIZES)),
        WhenAbsent::Default("64"),
        "128",
        "Most messages taken from or given to the kernel in one system call. A message is one datagram, or up to 64 of one sender that arrived together.",
    ),
    key("pin_cpus", KeyKind::Flag, WhenAbsent::Default("false"), "true", "Keep each worker on a CPU of its own."),
    key(
        "recv_buf_size",
        KeyKind::Integer(wide(RECV_BUF_SIZES)),
        WhenAbsent::Means("the host's default"),
        "16777216",
        "Receive buffer of each worker's socket, in bytes: how much may wait while a worker is busy.",
    ),
    key(
        "max_packet_size",
        KeyKind::Integer(wide(PACKET_SIZES)),
        WhenAbsent::Default("65507"),
        "9000",
        "Longest datagram forwarded, in bytes of payload. A longer one is dropped and counted as `truncated`.",
    ),
    key(
        "preserve_source",
        KeyKind::Flag,
        WhenAbsent::Default("false"),
        "true",
        "Send in the senders' names: receivers see the sender's address and port, as in `tc_ebpf` mode. Takes `CAP_NET_RAW`.",
    ),
];

/// The keys of `metrics`.
pub static METRICS: &[KeySpec] = &[
    key(
        "enabled",
        KeyKind::Flag,
        WhenAbsent::Default("true"),
        "false",
        "Serve the endpoint. Without the whole `metrics` table it is not served.",
    ),
    key(
        "bind",
        KeyKind::Text("IP:port"),
        WhenAbsent::Default("\"0.0.0.0:9090\""),
        "\"127.0.0.1:9090\"",
        "The TCP address and port it is served on.",
    ),
    key(
        "path",
        KeyKind::Text("a path that starts with /"),
        WhenAbsent::Default("\"/metrics\""),
        "\"/metrics\"",
        "The path of the Prometheus page. `/healthz` and `/readyz` have their own use.",
    ),
];

/// The keys of `limits`.
pub static LIMITS: &[KeySpec] = &[
    key("max_listeners", KeyKind::Integer(wide(MAX_LISTENERS)), WhenAbsent::Default("256"), "1024", "Most listeners."),
    key(
        "max_downstreams",
        KeyKind::Integer(wide(MAX_DOWNSTREAMS)),
        WhenAbsent::Default("16384"),
        "100000",
        "Most downstreams of all listeners together.",
    ),
    key(
        "max_sources",
        KeyKind::Integer(wide(MAX_SOURCES)),
        WhenAbsent::Default("65536"),
        "500000",
        "Most prefixes in the `sources` of all listeners together.",
    ),
    key(
        "max_senders",
        KeyKind::Integer(wide(MAX_SENDERS)),
        WhenAbsent::Default("65536"),
        "500000",
        "Most senders whose `rate_limit` is kept apart at one time, of all listeners together; of more, the longest silent ones begin anew.",
    ),
];

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
    down("", FILE, visit);
}
