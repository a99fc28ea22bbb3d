//! `udp-fanout status` on a busy gateway: shares, delivery paths, health, and drops with their reasons.

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};

const HEALTH: &str = "[health]\nenabled = true\ninterval_secs = 0.6\ntimeout_secs = 0.5\n";

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

fn status(lab: &Lab, daemon: &Daemon, options: &[&str]) -> Output {
    let mut command = lab.gateway.command(binary());
    command.args(["status", "--interval", "0.1", "--socket"]).arg(daemon.status_socket()).args(options);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn report(lab: &Lab, daemon: &Daemon) -> Value {
    serde_json::from_slice(&status(lab, daemon, &["--json"]).stdout).unwrap()
}

#[test]
fn netns_status_tells_ways_drops_and_who_is_ill() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::GatewayHost]).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    config.listeners[0].downstreams.push(("nowhere".into(), "10.99.0.1:514".parse().unwrap(), 1));
    let mut daemon = Daemon::spawn(&lab.gateway, binary(), &(config.to_toml() + HEALTH)).unwrap();
    daemon.wait_for_line("endpoints=4").unwrap();
    // The one without a route cannot be probed, so it is removed from the round robin.
    let line = daemon.wait_for_line("health check failed").unwrap();
    assert!(line.contains("10.99.0.1:514"), "{line}");
    daemon.wait_for_line("endpoints=3").unwrap();

    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    sender.send(300, &collectors).unwrap();
    assert!(collectors.finish(&[&sender]).unwrap().is_perfect());

    let seen = report(&lab, &daemon);
    let listener = &seen["listeners"][0];
    assert_eq!((&listener["mode"], &listener["mode_reason"]), (&json!("tc_ebpf"), &json!("configured")));
    assert_eq!((&listener["interfaces"], &listener["policy"]), (&json!(["eth0"]), &json!("round_robin")));
    assert_eq!((&listener["received"], &listener["forwarded"]), (&json!(300), &json!(300)));
    assert_eq!(listener["datapaths"]["tc_ebpf"]["forwarded"], 300);
    assert_eq!((&listener["waits_for"], &listener["drops"]), (&Value::Null, &json!({})));
    let downstreams = listener["downstreams"].as_array().unwrap();
    let of = |key: &str| downstreams.iter().map(|downstream| downstream[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("way"), [json!("out1"), json!("pod2"), json!("local"), Value::Null]);
    assert_eq!(of("packets"), [100, 100, 100, 0]);
    let states: Vec<_> = downstreams.iter().map(|downstream| downstream["health"]["state"].clone()).collect();
    assert_eq!((&states[3], &downstreams[3]["share"]), (&json!("unhealthy"), &json!(0.0)));
    assert!(downstreams[3]["health"]["failure"].as_str().unwrap().contains("nreachable"), "{downstreams:?}");

    let table = String::from_utf8(status(&lab, &daemon, &[]).stdout).unwrap();
    let row = table.lines().find(|line| line.contains("  nowhere  ")).unwrap_or_else(|| panic!("{table}"));
    assert!(row.contains("unhealthy") && row.contains("0%"), "{table}");
    daemon.stop().unwrap();
}

#[test]
fn netns_status_names_what_is_wrong() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    config.listeners[0].downstreams.push(("nowhere".into(), "10.99.0.1:514".parse().unwrap(), 1));
    let daemon = Daemon::start(&lab.gateway, binary(), &config).unwrap();
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    // Half of them have no route.
    sender.burst(100, &collectors).unwrap();
    assert!(collectors.wait_for(50, udp_fanout_lab::traffic::PATIENCE));

    let seen = report(&lab, &daemon);
    let listener = &seen["listeners"][0];
    assert_eq!((&listener["dropped"], &listener["drops"]), (&json!(50), &json!({ "no_route": 50 })));
    assert_eq!(listener["downstreams"][1]["way"], "no route");
    assert_eq!(seen["problems"], json!(["listener \"lab\": no route to downstream 10.99.0.1:514"]));

    lab.gateway.ip("link set eth0 down").unwrap();
    lab.gateway.ip("link del eth0").unwrap();
    let missing = "listener \"lab\": interface not found: eth0";
    let gone = loop {
        let seen = report(&lab, &daemon);
        let problems = seen["problems"].as_array().unwrap();
        if problems.iter().any(|problem| problem.as_str().unwrap().starts_with(missing)) {
            break seen;
        }
    };
    assert!(gone["listeners"][0]["waits_for"].as_str().unwrap().starts_with("interface not found"), "{gone}");
    daemon.stop().unwrap();
}
