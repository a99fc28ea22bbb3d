//! The daemon's counters: on its metrics page, and in the kernel's map `STATS` as `bpftool` shows it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Metrics, Namespace, Report};

/// How long the daemon may take to count what has arrived. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(10);

/// One listener's counters in one datapath, in datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PacketCounts {
    pub received: u64,
    pub forwarded: u64,
    pub dropped: u64,
    pub passed: u64,
}

impl PacketCounts {
    pub const NOTHING: PacketCounts = PacketCounts { received: 0, forwarded: 0, dropped: 0, passed: 0 };

    /// `count` datagrams, all forwarded to downstreams.
    pub fn forwarded(count: u64) -> PacketCounts {
        PacketCounts { received: count, forwarded: count, ..PacketCounts::NOTHING }
    }

    fn of_page(page: &Metrics, listener: &str, mode: &str) -> PacketCounts {
        let sum = |what: &str| {
            page.sum(&format!("udp_fanout_packets_{what}_total"), &[("listener", listener), ("mode", mode)])
        };
        PacketCounts {
            received: sum("received"),
            forwarded: sum("forwarded"),
            dropped: sum("dropped"),
            passed: sum("passed"),
        }
    }

    /// The sum over all CPUs of one entry of a dump by `bpftool`.
    pub fn of_dump(dump: &Value, listener_id: u64) -> PacketCounts {
        let entries = dump.as_array().unwrap().iter().map(|entry| &entry["formatted"]);
        let entry = entries.into_iter().find(|entry| entry["key"] == listener_id).expect("an entry of the listener");
        let sum = |field: &str| {
            let values = entry["values"].as_array().unwrap();
            values.iter().map(|cpu| cpu["value"][field].as_u64().unwrap()).sum()
        };
        PacketCounts {
            received: sum("pkts_received"),
            forwarded: sum("pkts_forwarded"),
            dropped: sum("pkts_dropped"),
            passed: sum("pkts_passed"),
        }
    }
}

/// The program under test.
pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

/// A daemon in the lab's gateway, ready.
pub fn start(lab: &Lab, config: &DaemonConfig) -> Daemon {
    Daemon::start(&lab.gateway, binary(), config).unwrap()
}

/// Checks that the daemon's counters of its first listener are exactly these: the kernel program's (`None` where there
/// is no kernel program) on the page and in the map, and the socket's on the page.
///
/// Workers count a batch after they have sent it, so this waits until all datagrams are counted.
pub fn check_counters(daemon: &Daemon, gateway: &Namespace, kernel: Option<PacketCounts>, user: PacketCounts) {
    check_listener_counters(daemon, gateway, ("lab", 0), kernel, user);
}

/// As [`check_counters`], for the listener with this name and ID.
pub fn check_listener_counters(
    daemon: &Daemon,
    gateway: &Namespace,
    (listener, id): (&str, u64),
    kernel: Option<PacketCounts>,
    user: PacketCounts,
) {
    let deadline = Instant::now() + LIMIT;
    let page = loop {
        let page = daemon.metrics(gateway).unwrap();
        for mode in ["tc_ebpf", "userspace"] {
            let seen = PacketCounts::of_page(&page, listener, mode);
            assert_eq!(seen.received, seen.forwarded + seen.dropped + seen.passed, "{mode} {seen:?}");
        }
        if PacketCounts::of_page(&page, listener, "userspace").received == user.received || Instant::now() > deadline {
            break page;
        }
    };
    let drops: Vec<_> =
        page.select("udp_fanout_packets_dropped_total", &[]).filter(|sample| sample.value > 0.0).collect();
    assert_eq!(PacketCounts::of_page(&page, listener, "userspace"), user, "the socket's counters; drops: {drops:?}");
    assert_eq!(
        PacketCounts::of_page(&page, listener, "tc_ebpf"),
        kernel.unwrap_or_default(),
        "the kernel program's counters; drops: {drops:?}"
    );
    let has_series = page.has("udp_fanout_packets_received_total", &[("listener", listener), ("mode", "tc_ebpf")]);
    assert_eq!(has_series, kernel.is_some());
    if let Some(kernel) = kernel {
        assert_eq!(PacketCounts::of_dump(&stats_map(daemon), id), kernel, "counters in the map STATS");
    }
}

/// Checks that the metrics page counts for each downstream what its receiver got.
pub fn check_downstream_counters(daemon: &Daemon, gateway: &Namespace, report: &Report) {
    let page = daemon.metrics(gateway).unwrap();
    for receiver in &report.receivers {
        let endpoint = receiver.address.unwrap().to_string();
        let labels = [("listener", "lab"), ("endpoint", endpoint.as_str())];
        assert_eq!(page.sum("udp_fanout_downstream_packets_total", &labels), receiver.received, "{endpoint}\n{report}");
        assert_eq!(page.sum("udp_fanout_downstream_bytes_total", &labels), receiver.bytes, "{endpoint}\n{report}");
    }
}

/// The daemon's own map `STATS`, dumped.
fn stats_map(daemon: &Daemon) -> Value {
    bpftool(&["map", "dump", "id", &stats_map_id(daemon)])
}

/// The ID of the daemon's own map `STATS`. Maps have no namespaces, so others may have maps of that name.
pub fn stats_map_id(daemon: &Daemon) -> String {
    let ids = map_ids(daemon);
    let list = bpftool(&["map", "list"]);
    let ours = list
        .as_array()
        .unwrap()
        .iter()
        .find(|map| map["name"] == "STATS" && map["id"].as_u64().is_some_and(|id| ids.contains(&id)));
    ours.expect("the daemon has a map STATS")["id"].to_string()
}

/// The IDs of the maps that the daemon holds open.
fn map_ids(daemon: &Daemon) -> Vec<u64> {
    let descriptors = fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap();
    let texts = descriptors.filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok());
    texts.filter_map(|text| text.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok())).collect()
}

/// The JSON output of `bpftool`.
pub fn bpftool(words: &[&str]) -> Value {
    let output =
        Command::new("bpftool").arg("--json").args(words).output().expect("bpftool runs (Debian package bpftool)");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "bpftool {words:?}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// The lines of `tc filter show dev DEVICE ingress` that are about BPF programs.
pub fn filters(namespace: &Namespace, device: &str) -> Vec<String> {
    let text = namespace.tc(&format!("filter show dev {device} ingress")).unwrap();
    text.lines().filter(|line| line.contains(" handle ")).map(str::to_owned).collect()
}
