//! The largest numbers of listeners and downstreams: each has its share, and a change of one of many takes effect
//! soon.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use super::counters::binary;
use udp_fanout_lab::{Collectors, Daemon, Expect, Lab, Metrics, Place, Sender};

const MANY: u32 = 10_000;
const LISTENERS: u32 = 256;
const METRICS: &str = "127.0.0.1:9090";

/// A network behind a neighbour of the gateway. One receiver has all of its addresses.
fn lab() -> Lab {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let router = lab.sites[0].address.ip();
    lab.gateway.ip(&format!("route add 10.77.0.0/16 via {router}")).unwrap();
    lab.namespace_of(&lab.sites[0]).ip("route add local 10.77.0.0/16 dev lo").unwrap();
    lab
}

fn address(lab: &Lab, number: u32) -> SocketAddr {
    (Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 77, 0, 0)) + number), lab.sites[0].address.port()).into()
}

fn collect(lab: &Lab) -> Collectors {
    let any = SocketAddr::from(([0, 0, 0, 0], lab.sites[0].address.port()));
    let place = ("all", lab.namespace_of(&lab.sites[0]), any);
    Collectors::start_at([place], Expect::OneOfThem).unwrap()
}

fn start(lab: &Lab, config: &str) -> Daemon {
    let config = format!("watch_config = false\n{config}[metrics]\nbind = \"{METRICS}\"\n");
    let mut daemon = Daemon::spawn(&lab.gateway, binary(), &config).unwrap();
    daemon.wait_for_line("serving metrics").unwrap();
    daemon
}

fn page(lab: &Lab) -> Metrics {
    Metrics::scrape(&lab.gateway, METRICS.parse().unwrap(), "/metrics").unwrap()
}

/// The daemon's packet counters by downstream.
fn shares(lab: &Lab) -> BTreeMap<SocketAddr, u64> {
    let page = page(lab);
    let samples = page.select("udp_fanout_downstream_packets_total", &[]);
    samples.map(|sample| (sample.label("endpoint").unwrap().parse().unwrap(), sample.value as u64)).collect()
}

/// A listener with [`MANY`] downstreams, of which this one is replaced by another.
fn many(lab: &Lab, mode: &str, keys: &str, replaced: Option<u32>) -> String {
    let mut text = format!(
        "limits = {{ max_downstreams = {MANY} }}\n[[listeners]]\nname = \"lab\"\nbind = \"{}\"\ninterface = \"eth0\"\nmode = \
         \"{mode}\"\nsettings = {{ workers = 1 }}\n{keys}\ndownstream = [\n",
        lab.listener()
    );
    for number in 0..MANY {
        let number = if replaced == Some(number) { MANY } else { number };
        let _ = writeln!(text, "{{ address = \"{}\" }},", address(lab, number));
    }
    text + "]\n"
}

#[test]
fn netns_each_of_ten_thousand_downstreams_has_its_share() {
    let lab = lab();
    for mode in ["tc_ebpf", "userspace"] {
        let begun = Instant::now();
        let mut daemon = start(&lab, &many(&lab, mode, "", None));
        println!("{MANY} downstreams, {mode}: started in {:?}", begun.elapsed());
        let collectors = collect(&lab);
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(2 * u64::from(MANY), &collectors).unwrap();
        let begun = Instant::now();
        let got = shares(&lab);
        println!("{MANY} downstreams, {mode}: page of metrics in {:?}", begun.elapsed());
        assert_eq!(got.len() as u32, MANY);
        assert!(got.values().all(|&packets| packets == 2), "{mode}: two rounds");

        replace_one(&lab, &mut daemon, mode, "");
        sender.send(u64::from(MANY), &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{mode}: {report}");
        let got = shares(&lab);
        assert_eq!((got.get(&address(&lab, 7_000)), got.get(&address(&lab, MANY))), (None, Some(&1)));
        assert!(got.iter().all(|(to, &packets)| packets == if *to == address(&lab, MANY) { 1 } else { 3 }));
        let (status, took, log) = daemon.stop().unwrap();
        println!("{MANY} downstreams, {mode}: stopped in {took:?}");
        assert!(status.success(), "{log}");
    }
}

/// Replaces one downstream.
#[expect(clippy::print_stdout, reason = "informative output, on which no test depends")]
fn replace_one(lab: &Lab, daemon: &mut Daemon, mode: &str, keys: &str) {
    let new = many(lab, mode, keys, Some(7_000));
    let begun = Instant::now();
    daemon.reload(&format!("watch_config = false\n{new}[metrics]\nbind = \"{METRICS}\"\n")).unwrap();
    println!("{MANY} downstreams, {mode} {keys:?}: one replaced in {:?}", begun.elapsed());
}

#[test]
fn netns_each_flow_keeps_to_one_of_ten_thousand_downstreams() {
    let lab = lab();
    let keys = "policy = \"hash\"\nhash_on = \"source\"";
    let mut daemon = start(&lab, &many(&lab, "tc_ebpf", keys, None));
    let collectors = collect(&lab);
    let mut senders: Vec<Sender> = (0..200).map(|_| Sender::in_lab(&lab).unwrap()).collect();
    for _ in 0..3 {
        for sender in &mut senders {
            sender.send(2, &collectors).unwrap();
        }
    }
    let report = collectors.finish(&senders.iter().collect::<Vec<_>>()).unwrap();
    assert!(report.is_perfect(), "{report}");
    let got = shares(&lab);
    let hit: Vec<u64> = got.into_values().filter(|&packets| packets > 0).collect();
    assert!(hit.iter().all(|packets| packets % 6 == 0), "{hit:?}");
    // 200 of 10,000 collide a few times.
    assert!(hit.len() > 180, "{} downstreams for 200 flows", hit.len());
    replace_one(&lab, &mut daemon, "tc_ebpf", keys);
}

fn listener_at(lab: &Lab, number: u32) -> SocketAddr {
    let port = 20_000 + u16::try_from(number).unwrap();
    SocketAddr::new(lab.listener().ip(), port)
}

/// Listeners with these numbers, with two downstreams each.
fn listeners(lab: &Lab, numbers: impl Iterator<Item = u32>, mode: &str) -> String {
    let mut text = format!("limits = {{ max_listeners = {LISTENERS}, max_downstreams = {} }}\n", 2 * LISTENERS);
    for number in numbers {
        let (bind, first, second) = (listener_at(lab, number), address(lab, 2 * number), address(lab, 2 * number + 1));
        let _ = writeln!(
            text,
            "[[listeners]]\nname = \"l{number}\"\nbind = \"{bind}\"\ninterface = \"eth0\"\nmode = \"{mode}\"\ndownstream = \
             [{{ address = \"{first}\" }}, {{ address = \"{second}\" }}]"
        );
    }
    text
}

#[test]
fn netns_each_of_256_listeners_serves_its_own() {
    let lab = lab();
    for mode in ["tc_ebpf", "userspace"] {
        let begun = Instant::now();
        let mut daemon = start(&lab, &listeners(&lab, 0..LISTENERS, mode));
        println!("{LISTENERS} listeners, {mode}: started in {:?}", begun.elapsed());
        let collectors = collect(&lab);
        let source = (lab.sender_address(), 0);
        let mut senders: Vec<Sender> = (0..LISTENERS)
            .map(|number| Sender::open(&lab.sender, source, listener_at(&lab, number)).unwrap())
            .collect();
        for sender in &mut senders {
            sender.send(20, &collectors).unwrap();
        }
        let report = collectors.finish(&senders.iter().collect::<Vec<_>>()).unwrap();
        assert!(report.is_complete(), "{mode}: {report}");
        let got = shares(&lab);
        assert_eq!(got.len() as u32, 2 * LISTENERS);
        assert!(got.values().all(|&packets| packets == 10), "{mode}: {got:?}");
        let page = page(&lab);
        let labels = [("mode", mode)];
        let samples = page.select("udp_fanout_packets_forwarded_total", &labels);
        let forwarded: Vec<u64> = samples.map(|sample| sample.value as u64).collect();
        assert_eq!(forwarded, vec![20; LISTENERS as usize], "{mode}");
        let begun = Instant::now();
        let rest = listeners(&lab, (0..LISTENERS).step_by(2), mode);
        daemon.reload(&format!("watch_config = false\n{rest}[metrics]\nbind = \"{METRICS}\"\n")).unwrap();
        println!("{LISTENERS} listeners, {mode}: half of them removed in {:?}", begun.elapsed());
        assert_eq!(shares(&lab).len() as u32, LISTENERS);
        let (status, took, log) = daemon.stop().unwrap();
        println!("{LISTENERS} listeners, {mode}: stopped in {took:?}");
        assert!(status.success(), "{log}");
    }
}
