//! Names that have addresses, lose them, and get others.

use proptest::prelude::*;

use super::*;

const A: ListenerId = ListenerId(0);
const B: ListenerId = ListenerId(1);

impl NameCache {
    /// The number of names whose last lookup failed.
    fn unresolved(&self) -> usize {
        self.hosts.values().filter(|host| host.failures > 0).count()
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn request(listener: ListenerId, family: Family, addresses: &[&str]) -> ResolveRequest {
    let entry = |(n, text): (usize, &&str)| {
        let address = text.parse().map(DownstreamAddress::Ip).unwrap_or_else(|_| {
            let (host, port) = text.rsplit_once(':').unwrap();
            DownstreamAddress::Name { host: host.into(), port: port.parse().unwrap() }
        });
        DownstreamEntry {
            name: format!("d{n}").into(),
            address,
            weight: 1 + u32::try_from(n).unwrap(),
            sample: Downstream::ALL,
        }
    };
    let entries = addresses.iter().enumerate().map(entry).collect();
    ResolveRequest { listener, name: format!("l{listener}").into(), family, entries, interval: secs(30) }
}

fn ips(texts: &[&str]) -> Result<Vec<IpAddr>, String> {
    Ok(texts.iter().map(|text| text.parse().unwrap()).collect())
}

fn shown(updates: &[(ListenerId, Vec<Downstream>)]) -> Vec<(u32, String)> {
    let set = |set: &[Downstream]| {
        set.iter().map(|d| format!("{}={}*{}", d.name, d.address, d.weight)).collect::<Vec<_>>().join(" ")
    };
    updates.iter().map(|(id, downstreams)| (id.0, set(downstreams))).collect()
}

#[test]
fn each_address_of_a_name_is_a_downstream_of_its_weight() {
    let mut names = NameCache::default();
    names.replace_requests(vec![request(A, Family::V4, &["10.0.0.9:1", "c.example:514"])], secs(0));
    assert_eq!(shown(&names.take_updates()), [(0, "d0=10.0.0.9:1*1".to_owned())], "what is known need not wait");
    assert_eq!(names.due(secs(0)), ["c.example".into()]);
    assert_eq!((names.due(secs(99)), names.next_deadline()), (vec![], None), "being asked for");
    names.handle_lookup_result(
        "c.example",
        ips(&["10.0.0.2", "::2", "10.0.0.1", "10.0.0.2", "0.0.0.0", "224.0.0.1"]),
        secs(1),
    );
    let expected = "d0=10.0.0.9:1*1 d1=10.0.0.1:514*2 d1=10.0.0.2:514*2";
    assert_eq!(shown(&names.take_updates()), [(0, expected.to_owned())]);
    assert_eq!(names.next_deadline(), Some(secs(31)));
    // The same in another order is no news.
    names.due(secs(31));
    names.handle_lookup_result("c.example", ips(&["10.0.0.1", "10.0.0.2"]), secs(31));
    assert_eq!(names.take_updates(), []);
    names.due(secs(61));
    names.handle_lookup_result("c.example", ips(&["10.0.0.3"]), secs(61));
    assert_eq!(shown(&names.take_updates()), [(0, "d0=10.0.0.9:1*1 d1=10.0.0.3:514*2".to_owned())]);
}

#[test]
fn a_listener_waits_until_something_is_known_and_an_outage_changes_nothing() {
    let mut names = NameCache::default();
    names.replace_requests(vec![request(A, Family::V4, &["c.example:514"])], secs(0));
    let mut now = secs(0);
    // Asked for again ever more seldom, but as often as usual at least.
    for wait in [1, 2, 4, 8, 16, 30, 30] {
        assert_eq!(names.due(now).len(), 1);
        names.handle_lookup_result("c.example", Err("no".into()), now);
        assert_eq!(names.take_updates(), []);
        assert_eq!(names.next_deadline(), Some(now + secs(wait)));
        assert_eq!(names.unresolved(), 1);
        now += secs(wait);
    }
    names.due(now);
    names.handle_lookup_result("c.example", ips(&["10.0.0.1"]), now);
    assert_eq!(names.take_updates().len(), 1);
    names.due(now + secs(30));
    names.handle_lookup_result("c.example", Err("no".into()), now + secs(30));
    assert_eq!(names.take_updates(), []);
    names.due(now + secs(60));
    // Only half an answer: the other half stays as it was.
    names.handle_lookup_result("c.example", ips(&["::1"]), now + secs(60));
    assert_eq!((names.take_updates(), names.unresolved()), (vec![], 0));
}

#[test]
fn one_name_serves_listeners_of_both_families_and_overlaps_count_once() {
    let mut names = NameCache::default();
    let v6 = ResolveRequest { interval: secs(5), ..request(B, Family::V6, &["c.example:1"]) };
    names.replace_requests(vec![request(A, Family::V4, &["c.example:1", "d.example:1", "10.0.0.1:1"]), v6], secs(0));
    assert_eq!(shown(&names.take_updates()), [(0, "d2=10.0.0.1:1*3".to_owned())]);
    assert_eq!(names.due(secs(0)).len(), 2);
    names.handle_lookup_result("d.example", ips(&["10.0.0.1"]), secs(0));
    assert_eq!(shown(&names.take_updates()), [(0, "d1=10.0.0.1:1*2".to_owned())], "the first that says so");
    names.handle_lookup_result("c.example", ips(&["10.0.0.1", "2001:db8::1"]), secs(0));
    let expected = [(0, "d0=10.0.0.1:1*1".to_owned()), (1, "d0=[2001:db8::1]:1*1".to_owned())];
    assert_eq!(shown(&names.take_updates()), expected);
    assert_eq!(names.next_deadline(), Some(secs(5)), "as often as the most impatient listener wants");
}

#[test]
fn requests_may_change_at_any_time() {
    let mut names = NameCache::default();
    let (one, two) = (request(A, Family::V4, &["c.example:1"]), request(A, Family::V4, &["c.example:2"]));
    names.replace_requests(vec![one.clone()], secs(0));
    names.due(secs(0));
    names.handle_lookup_result("c.example", ips(&["10.0.0.1"]), secs(0));
    assert_eq!(names.take_updates().len(), 1);
    names.replace_requests(vec![one.clone()], secs(1));
    assert_eq!(names.take_updates(), [], "unchanged");
    names.replace_requests(vec![two], secs(1));
    assert_eq!(shown(&names.take_updates()), [(0, "d0=10.0.0.1:2*1".to_owned())], "known already");
    // Asked for while it is not wanted any more, and wanted again while it is asked for.
    names.due(secs(30));
    names.replace_requests(vec![], secs(31));
    names.handle_lookup_result("c.example", ips(&["10.0.0.2"]), secs(31));
    assert_eq!((names.take_updates(), names.next_deadline()), (vec![], None));
    names.replace_requests(vec![one], secs(32));
    assert_eq!(names.take_updates(), []);
    names.handle_lookup_result("c.example", ips(&["10.0.0.3"]), secs(32));
    assert_eq!(names.take_updates().len(), 1);
}

proptest! {
    /// Whatever comes, a set once published is never empty again, and names go on being asked for.
    #[test]
    fn no_history_leaves_a_listener_without_downstreams(
        steps in prop::collection::vec((0u8..4, prop::collection::vec(0u8..4, 0..4), 0u64..40), 1..60),
    ) {
        let mut names = NameCache::default();
        let requests = || vec![request(A, Family::V4, &["a.example:1", "b.example:1"]), request(B, Family::V4, &["b.example:1"])];
        names.replace_requests(requests(), secs(0));
        let mut now = secs(0);
        let mut asked: Vec<Arc<str>> = Vec::new();
        for (what, addresses, wait) in steps {
            now += secs(wait);
            asked.extend(names.due(now));
            if what == 0 {
                names.replace_requests(requests(), now);
            } else if let Some(name) = asked.pop() {
                let addresses = addresses.into_iter().map(|n| IpAddr::from([10, 0, 0, n])).collect();
                let answer = if what == 1 { Err("no".to_owned()) } else { Ok(addresses) };
                names.handle_lookup_result(&name, answer, now);
            }
            for (_, set) in names.take_updates() {
                prop_assert!(!set.is_empty());
            }
            prop_assert_eq!(names.hosts.values().filter(|host| host.due.is_none()).count(), asked.len());
            prop_assert!(names.next_deadline().is_none_or(|due| due <= now + secs(30)));
        }
    }
}
