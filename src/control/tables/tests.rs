use super::*;
use crate::control::report::{DaemonReport, HealthReport, ServiceReport};

fn downstream(port: u16, share: f64, health: Option<HealthReport>) -> DownstreamReport {
    DownstreamReport {
        name: format!("receiver-{port}"),
        address: ([10, 0, 1, 10], port).into(),
        weight: 1,
        share,
        age_secs: 7_384.0,
        health,
        way: Some("eth1".into()),
        packets: 600,
        bytes: 60_000,
        rates: Some(Rates { packets: 6_172.8, ..Default::default() }),
    }
}

fn report() -> StatusReport {
    let healthy = HealthReport { state: "healthy".into(), for_secs: 61.0, ..Default::default() };
    let failure = Some("no answer within 2s".to_owned());
    let unhealthy = HealthReport { state: "unhealthy".into(), for_secs: 9.0, failure, ..Default::default() };
    StatusReport {
        daemon: DaemonReport {
            version: "0.1.0 (abc)".into(),
            pid: 4711,
            uptime_secs: 11_530.0,
            config: "/etc/udp-fanout/config.toml".into(),
            ..Default::default()
        },
        listeners: vec![ListenerReport {
            name: "syslog".into(),
            bind: "0.0.0.0:5514".into(),
            mode: "tc_ebpf".into(),
            mode_reason: "configured".into(),
            interfaces: vec!["eth0".into(), "eth1".into()],
            policy: "round_robin".into(),
            received: 1_234,
            dropped: 20,
            drops: [("no_route".to_owned(), 3), ("ttl_expired".to_owned(), 17)].into(),
            downstreams: vec![downstream(1, 1.0, Some(healthy)), downstream(2, 0.0, Some(unhealthy))],
            rates: Some(Rates { packets: 12_345.6, bytes: 1e6, forwarded: 12_345.6, dropped: 0.0 }),
            ..Default::default()
        }],
        services: vec![ServiceReport { namespace: "logging".into(), service: "vector".into(), ..Default::default() }],
        problems: vec!["listener \"syslog\": no route to downstream 10.0.1.10:2".into()],
    }
}

#[test]
fn a_report_reads_well() {
    let expected = "\
udp-fanout 0.1.0 (abc), pid 4711, up 3h 12m, /etc/udp-fanout/config.toml

LISTENER  BIND          MODE     INTERFACE  POLICY        IN/s  OUT/s  DROP/s  BIT/s  RECEIVED  DROPPED
syslog    0.0.0.0:5514  tc_ebpf  eth0,eth1  round_robin  12.3k  12.3k       0  8.00M      1234       20
  syslog: tc_ebpf: configured
  syslog: dropped: 3 no_route, 17 ttl_expired

LISTENER  DOWNSTREAM  ADDRESS      HEALTH                               AGE  SHARE  OUT/s  SENT  VIA
syslog    receiver-1  10.0.1.10:1  healthy 1m 1s                      2h 3m   100%  6.17k   600  eth1
syslog    receiver-2  10.0.1.10:2  unhealthy 9s: no answer within 2s  2h 3m     0%  6.17k   600  eth1

SERVICE         SYNCED  LAST EVENT  ERRORS
logging/vector  no           never  -

! listener \"syslog\": no route to downstream 10.0.1.10:2
";
    let text = render(&report(), false);
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn colours_mark_what_needs_attention_and_change_nothing_else() {
    let coloured = render(&report(), true);
    let bad: Vec<&str> = coloured.lines().filter(|line| line.starts_with(RED)).collect();
    assert_eq!(bad.len(), 3, "{bad:?}");
    assert!(bad[0].contains("receiver-2") && bad[1].contains("logging/vector") && bad[2].contains("no route"));
    let plain = [BOLD, RED, YELLOW, PLAIN].iter().fold(coloured.clone(), |text, code| text.replace(code, ""));
    assert_eq!(plain, render(&report(), false));
}

#[test]
fn numbers_are_short_and_grow_with_what_they_stand_for() {
    for (rate, shown) in [
        (0.0, "0"),
        (0.04, "0"),
        (0.05, "0.1"),
        (9.96, "10.0"),
        (99.9, "99.9"),
        (99.96, "100"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (9_994.0, "9.99k"),
        (9_996.0, "10.0k"),
        (123_456.0, "123k"),
        (1_250_000.0, "1.25M"),
        (2.5e12, "2500G"),
    ] {
        assert_eq!(scaled(rate), shown, "{rate}");
    }
    for (share, shown) in [(0.0, "0%"), (0.001, "0.1%"), (0.0999, "10%"), (1.0 / 3.0, "33%"), (1.0, "100%")] {
        assert_eq!(percent(share), shown, "{share}");
    }
    for (seconds, shown) in [
        (-1.0, "0s"),
        (0.9, "0s"),
        (59.9, "59s"),
        (60.0, "1m"),
        (3_661.0, "1h 1m"),
        (86_400.0, "1d"),
        (183_600.0, "2d 3h"),
    ] {
        assert_eq!(span(seconds), shown, "{seconds}");
    }
}
