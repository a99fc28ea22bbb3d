//! `udp-fanout doctor` on healthy hosts, and on hosts with one problem each.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Namespace, Place};

const HEALTH: &str = "[health]\nenabled = true\n";

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

/// What the doctor found: level, check and text with fix.
struct Findings {
    all: Vec<(String, String, String)>,
    well: bool,
}

impl Findings {
    /// The only finding of this level and check.
    fn finding(&self, level: &str, check: &str) -> &str {
        let mut found = self.all.iter().filter(|(l, c, _)| l == level && c == check).map(|(_, _, text)| text.as_str());
        let text = found.next().unwrap_or_else(|| panic!("no {level} {check} in {:#?}", self.all));
        assert_eq!(found.next(), None, "{level} {check} in {:#?}", self.all);
        text
    }

    /// Checks that only these levels and checks are not ok, and that the exit code agrees.
    fn only(&self, expected: &[(&str, &str)]) -> &Self {
        let bad: Vec<_> = self.all.iter().filter(|(level, ..)| level != "ok").collect();
        let kinds: Vec<_> = bad.iter().map(|(level, check, _)| (level.as_str(), check.as_str())).collect();
        assert_eq!(kinds, expected, "{:#?}", self.all);
        assert_eq!(self.well, !expected.iter().any(|(level, _)| *level == "problem"));
        self
    }
}

/// Runs the doctor in a namespace, with this command prefix, if any.
fn doctor_behind(namespace: &Namespace, before: &[&str], config: &str, options: &[&str]) -> Findings {
    let directory = tempfile::tempdir().unwrap();
    let path = write(&directory, config);
    let words: Vec<&str> = before.iter().copied().chain([binary().to_str().unwrap()]).collect();
    let mut command = namespace.command(words[0]);
    command.args(&words[1..]).args(["doctor", "--json", "--config", &path]).args(options);
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let text = |finding: &Value| {
        let fix = finding["fix"].as_str().map_or_else(String::new, |fix| format!("; {fix}"));
        finding["text"].as_str().unwrap().to_owned() + &fix
    };
    let word = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let findings = report["findings"].as_array().unwrap().iter();
    let all = findings.map(|finding| (word(finding, "level"), word(finding, "check"), text(finding))).collect();
    Findings { all, well: output.status.success() }
}

/// The file's path. Unless the configuration sets one, the status socket is one without a daemon.
fn write(directory: &TempDir, config: &str) -> String {
    let path = directory.path().join("config.toml");
    let socket = directory.path().join("status.sock");
    let head = if config.contains("status_socket") { String::new() } else { format!("status_socket = {socket:?}\n") };
    fs::write(&path, head + config).unwrap();
    path.to_str().unwrap().to_owned()
}

fn doctor(lab: &Lab, config: &str) -> Findings {
    doctor_behind(&lab.gateway, &[], config, &[])
}

fn config(lab: &Lab, mode: &str) -> String {
    DaemonConfig::for_lab(lab, mode).to_toml()
}

/// The kernel gives up on neighbours after 0.1 s instead of 3 s.
fn shorten_neighbour_timeout(lab: &Lab, device: &str) {
    lab.gateway.sysctl(&format!("net.ipv4.neigh.{device}.retrans_time_ms"), "30").unwrap();
}

#[test]
fn netns_a_healthy_host_is_found_healthy_in_both_modes() {
    let lab = Lab::builder().receivers(Place::ALL).build().unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let found = doctor(&lab, &(config(&lab, mode) + HEALTH));
        found.only(&[]);
        assert!(found.finding("ok", "route").contains("all 5 downstreams"), "{:#?}", found.all);
        assert!(found.finding("ok", "neighbour").contains("all 4 next hops are resolved"), "{:#?}", found.all);
        found.finding("ok", "ping");
        assert!(found.finding("ok", "daemon").contains("no udp-fanout answers"));
        if mode == "tc_ebpf" {
            found.finding("ok", "kernel");
            found.finding("ok", "privileges");
            found.finding("ok", "filter");
            found.finding("ok", "interface");
        }
    }
    let v6 = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(true).build().unwrap();
    doctor(&v6, &config(&v6, "tc_ebpf")).only(&[]);
}

#[test]
fn netns_it_prints_one_line_per_finding() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = write(&directory, &config(&lab, "tc_ebpf"));
    let output = lab.gateway.command(binary()).args(["doctor", "-c", &path]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{text}");
    let (last, findings) = text.lines().collect::<Vec<_>>().split_last().map(|(l, f)| (*l, f.to_vec())).unwrap();
    assert_eq!(last, "0 problems, 0 warnings");
    assert!(findings.len() >= 10 && findings.iter().all(|line| line.starts_with("ok       ")), "{text}");
}

#[test]
fn netns_egress_paths_that_lead_nowhere_are_found() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::BehindRouter]).build().unwrap();
    shorten_neighbour_timeout(&lab, "out1");
    shorten_neighbour_timeout(&lab, "rtr2");
    let mut nowhere = DaemonConfig::for_lab(&lab, "tc_ebpf");
    nowhere.listeners[0].downstreams.push(("nowhere".into(), "10.99.0.1:514".parse().unwrap(), 1));
    let found = doctor(&lab, &nowhere.to_toml());
    assert!(found.only(&[("problem", "route")]).finding("problem", "route").contains("nowhere (10.99.0.1)"));

    let mut dead = DaemonConfig::for_lab(&lab, "tc_ebpf");
    dead.listeners[0].downstreams.push(("dead".into(), "10.0.10.77:514".parse().unwrap(), 1));
    let found = doctor(&lab, &dead.to_toml());
    let text = found.only(&[("problem", "neighbour")]).finding("problem", "neighbour");
    assert!(text.contains("nobody on out1 replies for 10.0.10.77") && text.contains("to dead"), "{text}");

    // The router of a receiver two hops away.
    lab.gateway.ip("route replace 10.1.11.0/24 via 10.0.11.78").unwrap();
    let found = doctor(&lab, &config(&lab, "userspace"));
    let text = found.only(&[("problem", "neighbour")]).finding("problem", "neighbour");
    assert!(text.contains("nobody on rtr2 replies for 10.0.11.78") && text.contains("to receiver-2"), "{text}");

    lab.gateway.ip("route replace unreachable 10.1.11.0/24").unwrap();
    assert!(doctor(&lab, &config(&lab, "tc_ebpf")).finding("problem", "route").contains("receiver-2"));
}

#[test]
fn netns_an_egress_mtu_below_the_ingress_mtu_is_found() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    lab.gateway.ip("link set pod2 mtu 1400").unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let found = doctor(&lab, &config(&lab, mode));
        let text = found.only(&[("warning", "mtu")]).finding("warning", "mtu");
        assert!(text.contains("eth0 receives packets of 1500 bytes, but pod2 takes only 1400"), "{text}");
        assert!(text.contains("to receiver-2") && text.ends_with("keep payloads up to 1372 bytes"), "{text}");
    }
}

#[test]
fn netns_source_validation_that_drops_datagrams_is_found() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    lab.gateway.ip("route add default via 10.0.10.2").unwrap();
    let userspace = config(&lab, "userspace");
    let found = doctor(&lab, &userspace);
    let text = found.only(&[("warning", "rp_filter")]).finding("warning", "rp_filter");
    assert!(text.contains("rp_filter is 1 on eth0, but the default route uses out1"), "{text}");

    let ask = |config: &str, sender: &str| doctor_behind(&lab.gateway, &[], config, &["--sender", sender]);
    let refused = ask(&userspace, "192.0.2.7");
    refused.only(&[("warning", "rp_filter"), ("problem", "sender")]);
    let text = refused.finding("problem", "sender");
    assert!(
        text.contains("drops datagrams of 192.0.2.7 that arrive on eth0") && text.contains("rp_filter=2"),
        "{text}"
    );
    assert!(ask(&userspace, "10.0.0.2").finding("ok", "sender").contains("accepts datagrams of 10.0.0.2"));
    // The kernel program runs before it, so it affects only datagrams to the socket.
    ask(&config(&lab, "tc_ebpf"), "192.0.2.7").only(&[("warning", "rp_filter"), ("warning", "sender")]);

    for device in ["all", "eth0"] {
        lab.gateway.sysctl(&format!("net.ipv4.conf.{device}.rp_filter"), "2").unwrap();
    }
    ask(&userspace, "192.0.2.7").only(&[]);
}

#[test]
fn netns_interfaces_without_traffic_are_found() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let good = config(&lab, "tc_ebpf");
    lab.sender.ip("link set eth0 down").unwrap();
    let found = doctor(&lab, &good);
    assert!(found.finding("problem", "interface").contains("eth0 is up, but its other end is not"), "{:#?}", found.all);
    lab.gateway.ip("link set eth0 down").unwrap();
    let found = doctor(&lab, &good);
    assert!(found.finding("problem", "interface").contains("eth0 is down"), "{:#?}", found.all);
    let found = doctor(&lab, &good.replace("\"eth0\"", "\"eth9\""));
    assert!(found.finding("problem", "interface").contains("interface not found: eth9"), "{:#?}", found.all);
    let found = doctor(&lab, &good.replace("tc_ebpf", "auto").replace("\"eth0\"", "\"auto\""));
    let text = found.finding("warning", "interface");
    assert!(text.contains("selects userspace: no interface carries a default route"), "{text}");
}

#[test]
fn netns_foreign_programs_on_the_interface_are_found() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let good = config(&lab, "tc_ebpf");
    let add = |place: &str| {
        // return 0
        let words = format!("filter add dev eth0 ingress {place} bpf direct-action bytecode");
        let mut command = lab.gateway.command("tc");
        assert!(command.args(words.split(' ')).arg("1,6 0 0 0,").status().unwrap().success(), "{place}");
    };
    lab.gateway.tc("qdisc add dev eth0 clsact").unwrap();
    add("pref 50000");
    doctor(&lab, &good).only(&[]);
    add("pref 7");
    let found = doctor(&lab, &good);
    let text = found.only(&[("warning", "filter")]).finding("warning", "filter");
    assert!(text.contains("eth0: the filter bpf at pref 7 sees packets before udp-fanout"), "{text}");
    // As a TCX program, ours runs before all filters.
    doctor(&lab, &format!("attach = \"tcx\"\n{good}")).only(&[]);
    lab.gateway.tc("filter del dev eth0 ingress pref 7").unwrap();
    add("pref 49152 handle 0x7566");
    let found = doctor(&lab, &good);
    let text = found.only(&[("problem", "filter")]).finding("problem", "filter");
    assert!(text.contains("has the pref 49152 and handle 0x7566 of udp-fanout"), "{text}");
}

#[test]
fn netns_missing_privileges_are_found_by_name() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let without = |drop: &str, config: &str| {
        let bounding = format!("--bounding-set={drop}");
        doctor_behind(&lab.gateway, &["setpriv", "--inh-caps=-all", &bounding], config, &[])
    };
    let good = config(&lab, "tc_ebpf");
    let found = without("-sys_admin,-bpf", &good);
    let text = found.only(&[("problem", "privileges")]).finding("problem", "privileges");
    assert!(text.starts_with("CAP_BPF is missing; run as root, or grant"), "{text}");
    without("-sys_admin,-bpf", &good.replace("tc_ebpf", "auto")).only(&[("warning", "privileges")]);

    let found = without("-net_raw", &(config(&lab, "userspace") + HEALTH));
    let text = found.only(&[("problem", "ping")]).finding("problem", "ping");
    assert!(text.contains("net.ipv4.ping_group_range, which is \"1 0\"") && text.contains("CAP_NET_RAW"), "{text}");

    let large = DaemonConfig::for_lab(&lab, "userspace").settings("recv_buf_size = 1073741823").to_toml();
    let found = without("-net_admin", &large);
    let text = found.only(&[("warning", "buffer")]).finding("warning", "buffer");
    assert!(text.contains("recv_buf_size is 1073741823") && text.contains("net.core.rmem_max"), "{text}");

    let low = config(&lab, "userspace").replace(":5514\"\nmode", ":514\"\nmode");
    let found = without("-net_bind_service", &low);
    assert!(found.only(&[("problem", "bind")]).finding("problem", "bind").contains("may not bind 10.0.0.1:514"));
}

#[test]
fn netns_addresses_that_cannot_be_bound_are_found() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let good = config(&lab, "userspace");
    let taken = udp_fanout_lab::traffic::bind(&lab.gateway, lab.listener()).unwrap();
    let found = doctor(&lab, &good);
    assert!(
        found
            .only(&[("problem", "bind")])
            .finding("problem", "bind")
            .contains("another program has a socket on 10.0.0.1:5514")
    );
    drop(taken);
    let found = doctor(&lab, &good.replace("10.0.0.1:5514", "10.0.0.99:5514"));
    assert!(
        found
            .only(&[("problem", "bind")])
            .finding("problem", "bind")
            .contains("10.0.0.99 is not an address of this host")
    );
}

#[test]
fn netns_an_invalid_file_is_a_problem_for_each_mistake() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let wrong = config(&lab, "tc_ebpf").replace("mode =", "mood =").replace("weight = 1", "weight = 0");
    let found = doctor(&lab, &wrong);
    found.only(&[("problem", "config"), ("problem", "config")]);
    assert!(found.all.iter().any(|(_, _, text)| text.contains("listeners[0].mood: unknown key")), "{:#?}", found.all);
    let odd = DaemonConfig::for_lab(&lab, "tc_ebpf").extra("protocol = \"netflow\"\npolicy = \"round_robin\"");
    doctor(&lab, &odd.to_toml()).only(&[("warning", "config")]);
}

#[test]
fn netns_problems_of_the_running_daemon_and_filters_of_a_stopped_one_are_found() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let mut specified = DaemonConfig::for_lab(&lab, "tc_ebpf");
    let mut daemon = Daemon::start(&lab.gateway, binary(), &specified).unwrap();
    let asking = |daemon: &Daemon, config: &DaemonConfig| {
        format!("status_socket = {:?}\n{}", daemon.status_socket(), config.to_toml())
    };
    let found = doctor(&lab, &asking(&daemon, &specified));
    let pid = daemon.pid().to_string();
    assert!(found.only(&[]).finding("ok", "daemon").contains(&format!("runs as process {pid}, reports no problem")));

    daemon.signal(Signal::SIGKILL).unwrap();
    daemon.wait().unwrap();
    let found = doctor(&lab, &asking(&daemon, &specified));
    assert!(found.only(&[("warning", "filter")]).finding("warning", "filter").contains("has left its filter"));

    specified.listeners[0].downstreams.push(("nowhere".into(), "10.99.0.1:514".parse().unwrap(), 1));
    let daemon = Daemon::start(&lab.gateway, binary(), &specified).unwrap();
    let found = doctor(&lab, &asking(&daemon, &specified));
    found.only(&[("problem", "daemon"), ("problem", "route")]);
    assert!(found.finding("problem", "daemon").contains("no route to downstream 10.99.0.1:514"));
}
