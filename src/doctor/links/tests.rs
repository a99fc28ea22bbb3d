use super::super::{DoctorFinding, Severity};
use super::*;

fn link(up: bool) -> Link {
    Link {
        index: 2,
        name: "eth0".into(),
        kind: None,
        up,
        ethernet: true,
        l3_device: false,
        l3_ingress: false,
        loopback: false,
        mtu: 1500,
        mac: None,
        direct_peer: false,
        running: true,
    }
}

fn found(judge: impl FnOnce(&mut Findings)) -> Vec<DoctorFinding> {
    let mut findings = Findings::default();
    judge(&mut findings);
    findings.0
}

fn levels(judge: impl FnOnce(&mut Findings)) -> Vec<Severity> {
    found(judge).into_iter().map(|finding| finding.level).collect()
}

#[test]
fn a_link_must_be_up_at_both_ends() {
    for (up, running, level) in [
        (true, Some(true), Severity::Ok),
        (true, None, Severity::Ok),
        (true, Some(false), Severity::Problem),
        (false, Some(false), Severity::Problem),
    ] {
        assert_eq!(levels(|findings| judge_link(&link(up), running, findings)), [level]);
    }
}

fn filter(kind: &str, priority: u32, handle: u32, name: &str) -> TcFilter {
    TcFilter { kind: kind.into(), priority, handle, name: name.into() }
}

#[test]
fn programs_before_ours_are_named_and_later_ones_are_not() {
    let ours = filter("bpf", PRIORITY, HANDLE, "udp_fanout:[42]");
    let judge = |filters: &[TcFilter], preceding: &[String], daemon_runs| {
        found(|findings| judge_programs(&link(true), filters, preceding, daemon_runs, findings))
    };
    let alone = judge(&[ours.clone(), filter("bpf", 50_000, 1, "later:[1]")], &[], true);
    assert_eq!(alone.iter().map(|finding| finding.level).collect::<Vec<_>>(), [Severity::Ok]);

    let preceding = ["the XDP program seven".to_owned(), "the filter flower at pref 2".to_owned()];
    let found = judge(std::slice::from_ref(&ours), &preceding, true);
    assert_eq!(found.len(), 2, "{found:?}");
    for (finding, what) in found.iter().zip(&preceding) {
        assert_eq!(finding.level, Severity::Warning);
        assert!(finding.text.starts_with(&format!("eth0: {what} sees packets before udp-fanout")), "{finding:?}");
    }

    let taken = judge(&[filter("bpf", PRIORITY, HANDLE, "theirs:[4]")], &[], false);
    assert!(taken[0].level == Severity::Problem && taken[0].text.contains("theirs"), "{taken:?}");
    let left = judge(&[ours], &[], false);
    assert!(left[0].level == Severity::Warning && left[0].text.contains("has left its filter"), "{left:?}");
}

#[test]
fn an_address_must_be_the_hosts_and_free() {
    let facts = HostFacts {
        addresses: vec![crate::host::HostAddress { link: 2, address: [10, 0, 0, 1].into() }],
        ..Default::default()
    };
    let judge = |bind: &str, kernel, free| {
        let text =
            format!("[[listeners]]\nname = \"a\"\nbind = \"{bind}\"\ndownstream = [{{ address = \"10.9.9.9:1\" }}]\n");
        let config = Config::parse(&text, std::path::Path::new("c.toml")).unwrap();
        levels(|findings| judge_bind(&config.listeners[0], kernel, &facts, free, findings))
    };
    for kernel in [false, true] {
        assert_eq!(judge("10.0.0.1:514", kernel, Ok(())), [Severity::Ok]);
        assert_eq!(judge("0.0.0.0:514", kernel, Ok(())), [Severity::Ok]);
        assert_eq!(judge("10.0.0.1:514", kernel, Err(ErrorKind::AddrInUse)), [Severity::Problem]);
        assert_eq!(judge("10.0.0.1:514", kernel, Err(ErrorKind::PermissionDenied)), [Severity::Problem]);
    }
    for free in [Ok(()), Err(ErrorKind::AddrNotAvailable)] {
        assert_eq!(judge("10.0.0.9:514", false, free), [Severity::Problem]);
        assert_eq!(judge("10.0.0.9:514", true, free), [Severity::Warning], "a load balancer may announce it");
    }
}
