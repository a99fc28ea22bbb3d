//! Receivers given by name, in the real daemon: resolved, changed and lost, while numbered datagrams flow. The names
//! are in a hosts file and a name server of the test's own, which replace the machine's for the daemon.

use std::fs::{self, OpenOptions};
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use udp_fanout_lab::daemon::Surroundings;
use udp_fanout_lab::dns_server::{Answer, DnsServer};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender, scrape};

/// The size of the hosts file in bytes: constant, so that one write can change it.
const HOSTS: usize = 512;

/// The files of the daemon's resolver.
struct Resolver {
    directory: TempDir,
}

impl Resolver {
    fn new() -> Resolver {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("nsswitch.conf", "hosts: files dns\n");
        write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n");
        write("hosts", &"\n".repeat(HOSTS));
        Resolver { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces the entries of the hosts file.
    fn hosts(&self, entries: &[(IpAddr, &str)]) {
        let mut text: String = entries.iter().map(|(ip, name)| format!("{ip} {name}\n")).collect();
        text.extend(std::iter::repeat_n('\n', HOSTS - text.len()));
        let file = OpenOptions::new().write(true).open(self.path("hosts")).unwrap();
        file.write_all_at(text.as_bytes(), 0).unwrap();
    }

    /// Starts the daemon with these files in place of the machine's.
    fn start(&self, lab: &Lab, config: &DaemonConfig) -> Daemon {
        let script = "for file in hosts resolv.conf nsswitch.conf; do mount --bind \"$0/$file\" \"/etc/$file\" || exit; \
                      done; exec \"$@\"";
        let directory = self.directory.path().to_str().unwrap();
        let before = ["unshare", "--mount", "sh", "-c", script, directory];
        let mut daemon =
            Daemon::spawn_behind(&lab.gateway, &before, binary(), &config.to_toml(), &Surroundings::default()).unwrap();
        daemon.wait_for_line("serving metrics").unwrap();
        daemon
    }
}

/// The program under test.
fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

/// One listener, whose receivers are the addresses of `name`.
fn by_name(lab: &Lab, mode: &str, address: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode);
    config.listeners[0].downstreams.clear();
    config.extra(&format!("downstream = [{{ address = \"{address}\" }}]\nresolve_interval_secs = 1"))
}

fn updated(mode: &str, endpoints: usize) -> String {
    format!("updated {mode} downstream set listener_id=0 endpoints={endpoints}")
}

fn ready(lab: &Lab) -> scrape::Page {
    scrape::get(&lab.gateway, "127.0.0.1:9090".parse().unwrap(), "/readyz").unwrap()
}

/// Sends `n` datagrams and returns how many each receiver got.
fn shares(lab: &Lab, n: u64) -> Vec<u64> {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(n, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{report}");
    report.counts()
}

#[test]
fn netns_a_name_in_the_hosts_file_is_followed() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let [first, second] = [lab.sites[0].address.ip(), lab.sites[1].address.ip()];
    for mode in ["tc_ebpf", "userspace"] {
        let resolver = Resolver::new();
        let mut daemon = resolver.start(&lab, &by_name(&lab, mode, "collector:5514"));
        // The name does not resolve yet, so there is no receiver.
        let line =
            daemon.wait_for_logged("cannot resolve the name of a downstream: the listener waits for it").unwrap();
        assert!(line.contains("listener=\"lab\" name=\"collector\""), "{line}");
        let page = ready(&lab);
        assert_eq!(page.status, 503);
        assert!(page.body.contains("listener lab: waiting for its first downstream set"), "{}", page.body);

        resolver.hosts(&[(first, "collector"), ("2001:db8::1".parse().unwrap(), "collector")]);
        daemon.wait_for_line(&updated(mode, 1)).unwrap();
        assert_eq!((ready(&lab).status, shares(&lab, 100)), (200, vec![100, 0]));
        resolver.hosts(&[(first, "collector"), (second, "collector")]);
        daemon.wait_for_line(&updated(mode, 2)).unwrap();
        assert_eq!(shares(&lab, 100), [50, 50]);
        resolver.hosts(&[]);
        daemon.wait_for_line("the last known addresses stay in use").unwrap();
        assert_eq!(shares(&lab, 100), [50, 50]);
        resolver.hosts(&[(second, "collector")]);
        daemon.wait_for_line("name can be resolved again").unwrap();
        daemon.wait_for_line(&updated(mode, 1)).unwrap();
        assert_eq!(shares(&lab, 100), [0, 100]);
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_a_name_in_dns_is_followed_and_an_outage_changes_nothing() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(true).build().unwrap();
    let [first, second] = [lab.sites[0].address.ip(), lab.sites[1].address.ip()];
    let server = DnsServer::start(&lab.gateway);
    server.set("collector.example.org", Answer::Addresses(vec![first]));
    let resolver = Resolver::new();
    let mut config = by_name(&lab, "userspace", "Collector.Example.ORG:5514");
    config.head = "watch_config = false".into();
    let mut daemon = resolver.start(&lab, &config);
    daemon.wait_for_logged(&updated("userspace", 1)).unwrap();
    assert_eq!(shares(&lab, 50), [50, 0]);
    server.set("collector.example.org", Answer::Addresses(vec![second, first]));
    daemon.wait_for_line(&updated("userspace", 2)).unwrap();
    for outage in [Answer::ServerFailure, Answer::NoSuchName, Answer::Addresses(vec!["10.0.0.9".parse().unwrap()])] {
        let half = matches!(outage, Answer::Addresses(_));
        server.set("collector.example.org", outage);
        if half {
            // A reply without an address for an IPv6 listener: no outage, and nothing changes.
            server.wait_for_queries(4);
        } else {
            daemon.wait_for_line("the last known addresses stay in use").unwrap();
        }
        assert_eq!(shares(&lab, 100), [50, 50]);
        server.set("collector.example.org", Answer::Addresses(vec![first, second]));
        if !half {
            daemon.wait_for_line("name can be resolved again").unwrap();
        }
    }
    // A reload to another name keeps the receivers until that one is resolved.
    config.listeners[0].extra = config.listeners[0].extra.replace("Collector", "other");
    server.set("other.example.org", Answer::ServerFailure);
    daemon.reload(&config.to_toml()).unwrap();
    daemon.wait_for_line("cannot resolve the name of a downstream").unwrap();
    assert_eq!(shares(&lab, 100), [50, 50]);
    server.set("other.example.org", Answer::Addresses(vec![second]));
    daemon.wait_for_line(&updated("userspace", 1)).unwrap();
    assert_eq!(shares(&lab, 50), [0, 50]);
    // Without a name server the daemon waits and does not end.
    drop(server);
    daemon.wait_for_line("the last known addresses stay in use").unwrap();
    assert_eq!(shares(&lab, 50), [0, 50]);
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
}
