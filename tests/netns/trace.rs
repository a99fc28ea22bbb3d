//! `udp-fanout trace` on a busy gateway: the outcome of single datagrams that match the filter, and nothing more once
//! the client has gone.

use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

fn command(lab: &Lab, daemon: &Daemon, options: &[&str]) -> Command {
    let mut command = lab.gateway.command(binary());
    command.args(["trace", "--socket"]).arg(daemon.status_socket()).args(options);
    command
}

/// A running trace.
struct Trace {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    notes: BufReader<ChildStderr>,
}

impl Trace {
    fn start(lab: &Lab, daemon: &Daemon, options: &[&str]) -> (Trace, String) {
        let mut command = command(lab, daemon, options);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut note = String::new();
        let mut notes = BufReader::new(child.stderr.take().unwrap());
        notes.read_line(&mut note).unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        (Trace { child, lines, notes }, note)
    }

    fn next(&mut self) -> String {
        self.lines.next().expect("a line").unwrap()
    }

    fn next_json(&mut self) -> Value {
        serde_json::from_str(&self.next()).unwrap()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn exchange(lab: &Lab, count: u64) -> Sender {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(count, &collectors).unwrap();
    assert!(collectors.finish(&[&sender]).unwrap().is_complete());
    sender
}

/// Whether tracing is on in the kernel program.
fn is_on(daemon: &Daemon) -> bool {
    let fds = format!("/proc/{}/fd", daemon.pid());
    for entry in std::fs::read_dir(fds).unwrap().flatten() {
        let info = format!("/proc/{}/fdinfo/{}", daemon.pid(), entry.file_name().to_string_lossy());
        let Ok(info) = std::fs::read_to_string(info) else { continue };
        let Some(id) = info.lines().find_map(|line| line.strip_prefix("map_id:")) else { continue };
        let shown = bpftool(&["map", "show", "id", id.trim()]);
        if shown["name"].as_str().is_some_and(|name| ".data.trace".starts_with(name) || name.ends_with(".data.trace")) {
            let dumped = bpftool(&["map", "dump", "id", id.trim()]);
            return dumped.to_string().contains("\"on\":1");
        }
    }
    panic!("no map .data.trace");
}

fn bpftool(arguments: &[&str]) -> Value {
    let output =
        Command::new("bpftool").arg("-j").args(arguments).output().expect("bpftool runs (Debian package bpftool)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn netns_a_trace_shows_each_datagram_and_ends_when_told() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::GatewayHost]).build().unwrap();
    let daemon = Daemon::start(&lab.gateway, binary(), &DaemonConfig::for_lab(&lab, "tc_ebpf")).unwrap();
    exchange(&lab, 30);
    assert!(!is_on(&daemon));
    let (mut trace, note) = Trace::start(&lab, &daemon, &["--json", "--count", "6"]);
    assert_eq!(note, "tracing until interrupted\n");
    assert!(is_on(&daemon));
    let sender = exchange(&lab, 6);
    let source = sender.address().unwrap().to_string();
    let mut names: Vec<String> = Vec::new();
    for _ in 0..6 {
        let line = trace.next_json();
        assert_eq!((&line["listener"], &line["interface"]), (&json!("lab"), &json!("eth0")), "{line}");
        assert_eq!((&line["source"], &line["destination"]), (&json!(source), &json!("10.0.0.1:5514")), "{line}");
        assert_eq!((&line["fate"], &line["bytes"], &line["datagrams"]), (&json!("forwarded"), &json!(100), &json!(1)));
        let site = lab.sites.iter().find(|site| site.name == line["name"]).unwrap();
        assert_eq!(line["downstream"], json!(site.address.to_string()));
        let out = match site.place {
            Place::OtherInterface => json!("out1"),
            Place::Pod => json!("pod2"),
            _ => Value::Null,
        };
        assert_eq!(line["out_interface"], out, "{line}");
        names.push(site.name.clone());
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 3);
    assert!(trace.child.wait().unwrap().success());
    // The daemon notices after a while that the client has gone.
    while is_on(&daemon) {}
    daemon.stop().unwrap();
}

#[test]
fn netns_only_what_is_asked_for_is_shown_and_drops_have_their_reasons() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    let mut nowhere = config.listeners[0].clone();
    (nowhere.name, nowhere.bind) = ("nowhere".into(), "10.0.0.1:9000".into());
    nowhere.downstreams = vec![("away".into(), "10.99.0.1:514".parse().unwrap(), 1)];
    let mut sockets = config.listeners[0].clone();
    (sockets.name, sockets.bind, sockets.mode) = ("sockets".into(), "10.0.0.1:9001".into(), "userspace".into());
    config.listeners.extend([nowhere, sockets]);
    let daemon = Daemon::start(&lab.gateway, binary(), &config).unwrap();
    let (mut drops, _) = Trace::start(&lab, &daemon, &["--listener", "nowhere"]);
    let (mut mine, note) = Trace::start(&lab, &daemon, &["--source", "10.0.0.0/24", "--json"]);
    assert_eq!(note, "tracing until interrupted; listeners in mode userspace are not traced: sockets\n");
    let (_strangers, _) = Trace::start(&lab, &daemon, &["--source", "192.0.2.0/24"]);
    exchange(&lab, 3);
    let socket = udp_fanout_lab::traffic::bind(&lab.sender, "10.0.0.2:0".parse().unwrap()).unwrap();
    socket.send_to(b"to nobody", "10.0.0.1:9000").unwrap();
    let line = drops.next();
    assert!(line.contains(" nowhere 10.0.0.2:") && line.contains(" dropped -> 10.99.0.1:514 away: no_route"), "{line}");
    let seen: Vec<Value> = (0..4).map(|_| mine.next_json()).collect();
    let of = |key: &str| seen.iter().map(|line| line[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("listener"), [json!("lab"), json!("lab"), json!("lab"), json!("nowhere")]);
    assert_eq!(of("reason"), [Value::Null, Value::Null, Value::Null, json!("no_route")]);

    for (options, reason) in [
        (["--listener", "lob"], "there is no listener \"lob\"; there are lab, nowhere, sockets\n"),
        (["--listener", "sockets"], "listener \"sockets\" is in mode userspace (configured), which is not traced"),
        (["--source", "10.0.0.0/33"], "\"10.0.0.0/33\" is neither an address nor a prefix"),
    ] {
        let refused = command(&lab, &daemon, &options).output().unwrap();
        assert_eq!(refused.status.code(), Some(1));
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(text.starts_with(reason), "{text}");
    }
    daemon.stop().unwrap();
    // Its clients learn that the daemon has ended.
    let mut last = String::new();
    mine.notes.read_line(&mut last).unwrap();
    assert!(last.starts_with("the daemon has closed the connection"), "{last}");
    assert_eq!(mine.child.wait().unwrap().code(), Some(1));
}

#[test]
fn netns_a_flood_is_shown_in_part_and_a_client_that_is_killed_ends_its_trace() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let mut daemon = Daemon::start(&lab.gateway, binary(), &DaemonConfig::for_lab(&lab, "tc_ebpf")).unwrap();
    let mut killed = command(&lab, &daemon, &["--json"]);
    let mut killed = killed.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut notes = BufReader::new(killed.stderr.take().unwrap()).lines();
    assert_eq!(notes.next().unwrap().unwrap(), "tracing until interrupted");
    exchange(&lab, 20_000);
    let note = "more than 1000 datagrams in a second: the rest of this second is not shown";
    assert_eq!(notes.next().unwrap().unwrap(), note);
    killed.kill().unwrap();
    killed.wait().unwrap();
    while is_on(&daemon) {}
    exchange(&lab, 300);
    assert!(!daemon.log().contains("ERROR"), "{}", daemon.log());
    daemon.stop().unwrap();
}
