//! Discovery under faults: whatever fails between the daemon and the API server, no endpoint is lost.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use udp_fanout::testing::discovery::{Discovery, DiscoverySettings, DiscoveryTimeouts, ErrorKind};
use udp_fanout_lab::apiserver::{ApiServer, Kind, Rule, Seen};
use udp_fanout_lab::cluster::{namespace, ready, slice};
use udp_fanout_testkit::watching::{Watching, limits, log_count, logged, request, waits};

/// A watched Service with one endpoint.
fn followed(name: &str, limits: DiscoveryTimeouts) -> (ApiServer, Watching) {
    let server = ApiServer::start();
    change(&server, name, "10.0.0.1");
    let mut watching = Watching::with(&server.kubeconfig(), vec![request(name)], None, limits);
    watching.until(&["10.0.0.1:5514"]);
    server.wait_for_watches(1);
    (server, watching)
}

/// Replaces the service's endpoint.
fn change(server: &ApiServer, name: &str, address: &str) {
    server.apply(Kind::EndpointSlice, slice("logging", name, &format!("{name}-a"), [ready(address)]));
}

/// A change that the Service's watch does not report.
fn change_elsewhere(server: &ApiServer) {
    server.apply(Kind::EndpointSlice, slice("elsewhere", "other", "other-a", [ready("10.9.9.9")]));
}

fn lists(server: &ApiServer) -> usize {
    server.seen().iter().filter(|seen| seen.is_list()).count()
}

fn failure(code: u16, reason: &str) -> (u16, Value) {
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "because", "reason": reason, "code": code}),
    )
}

/// The next update has this endpoint, and no other update came before.
fn becomes(watching: &mut Watching, address: &str) {
    assert_eq!(watching.next_addresses(), [format!("{address}:5514")]);
}

#[test]
fn the_last_set_survives_an_outage() {
    let (server, mut watching) = followed("outage", limits());
    server.stop();
    watching.wait_status("three failures", |status| !status.synced && status.errors[0].1 >= 3);
    watching.quiet();
    logged(&["WARN cannot follow the endpoints of logging/outage", "the last known endpoints stay in use"]);
    change(&server, "outage", "10.0.0.2");
    server.restart();
    becomes(&mut watching, "10.0.0.2");
    watching.wait_status("sync", |status| status.synced);
    logged(&["INFO endpoints of logging/outage are being followed again"]);
    assert_eq!(log_count(&["cannot follow the endpoints of logging/outage"]), 1, "logged once");
    assert_eq!(lists(&server), 1, "the history was long enough to resume");
    assert!(watching.errors(ErrorKind::Connect) >= 3);
}

#[test]
fn a_blip_after_a_long_outage_is_followed_as_soon_as_any_other() {
    let longest = DiscoveryTimeouts { backoff_max: Duration::from_secs(3600), ..limits() };
    let (server, mut watching) = followed("blip", longest);
    server.stop();
    watching.wait_status("an outage", |status| status.errors[ErrorKind::Connect as usize].1 >= 12);
    server.restart();
    watching.wait_status("sync", |status| status.synced);
    // A watch that is not answered at once.
    std::thread::sleep(longest.short_watch * 2);
    let before = waits("blip").len();
    server.stop();
    watching.wait_status("a failure", |status| !status.synced);
    change(&server, "blip", "10.0.0.2");
    server.restart();
    becomes(&mut watching, "10.0.0.2");
    let waits = waits("blip");
    assert!(waits[..before].iter().all(|wait| *wait <= Duration::from_secs(1)), "while refused: {waits:?}");
    assert!(waits[before] <= longest.backoff_min, "the first wait of the blip: {waits:?}");
}

#[test]
fn a_watch_is_followed_again_when_its_list_is_complete() {
    let (server, mut watching) = followed("complete", limits());
    server.stop();
    logged(&["WARN cannot follow the endpoints of logging/complete"]);
    change(&server, "complete", "10.0.0.2");
    change_elsewhere(&server);
    server.compact();
    // The accepted watch reports 410 for the old version, and the server refuses the list that follows.
    server.set_rules(&[Rule::new(&["watch"], "endpointslices")]);
    server.restart();
    watching.wait_status("refusals", |status| status.errors[ErrorKind::Forbidden as usize].1 >= 3);
    assert!(watching.errors(ErrorKind::Expired) >= 1);
    assert_eq!(log_count(&["endpoints of logging/complete are being followed again"]), 0);
    assert!(!watching.status().synced);
    server.set_rules(&[Rule::new(&["list", "watch"], "endpointslices")]);
    becomes(&mut watching, "10.0.0.2");
    logged(&["INFO endpoints of logging/complete are being followed again"]);
}

#[test]
fn a_410_is_answered_by_a_list_without_a_wait() {
    let slow = DiscoveryTimeouts { backoff_min: Duration::from_secs(60), ..limits() };
    let (server, mut watching) = followed("promptly", slow);
    change_elsewhere(&server);
    server.compact();
    server.end_watches();
    // Within the deadline of a test, which is half of the wait.
    server.wait_for("a second list", |seen| seen.iter().filter(|seen| seen.is_list()).count() == 2);
    change(&server, "promptly", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
    assert_eq!(waits("promptly"), [Duration::ZERO]);
}

#[test]
fn discovery_waits_for_a_server_that_is_not_there_yet() {
    let server = ApiServer::start();
    change(&server, "early", "10.0.0.1");
    server.stop();
    let mut watching = Watching::start(&server, vec![request("early")]);
    logged(&["WARN cannot follow the endpoints of logging/early", "none are known yet"]);
    watching.quiet();
    server.restart();
    becomes(&mut watching, "10.0.0.1");
}

#[test]
fn a_cut_connection_is_resumed_where_it_was() {
    let (server, mut watching) = followed("cut", limits());
    for round in 2..8 {
        let version = server.resource_version();
        server.cut();
        let from = version.to_string();
        server.wait_for("resumption", |seen| {
            seen.iter().any(|seen| seen.is_watch() && seen.get("resourceVersion") == Some(&from))
        });
        let address = format!("10.0.0.{round}");
        change(&server, "cut", &address);
        becomes(&mut watching, &address);
    }
    assert_eq!(lists(&server), 1);
    assert_eq!(watching.status().watch_restarts, 6);
}

#[test]
fn a_watch_that_ends_in_good_order_is_no_failure() {
    let (server, mut watching) = followed("order", limits());
    server.end_watches();
    watching.wait_status("a second watch", |status| status.watch_restarts == 1);
    change(&server, "order", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
    assert!(watching.status().errors.iter().all(|(_, count)| *count == 0));
}

#[test]
fn history_that_is_gone_means_a_new_list_and_one_update() {
    let (server, mut watching) = followed("gone", limits());
    server.stop();
    change(&server, "gone", "10.0.0.2");
    change_elsewhere(&server);
    server.compact();
    server.restart();
    becomes(&mut watching, "10.0.0.2");
    watching.quiet();
    assert_eq!(lists(&server), 2);
    assert!(watching.errors(ErrorKind::Expired) >= 1);
}

#[test]
fn a_410_instead_of_a_watch_means_a_new_list() {
    let (server, mut watching) = followed("answer", limits());
    server.answer_next([failure(410, "Expired")]);
    server.end_watches();
    server.wait_for("a second list", |seen| seen.iter().filter(|seen| seen.is_list()).count() == 2);
    change(&server, "answer", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
}

#[test]
fn a_list_that_expires_between_two_pages_is_begun_again() {
    let server = ApiServer::start();
    let one = |n: usize| slice("logging", "pages", &format!("pages-{n:04}"), [ready(&udp_fanout_lab::cluster::nth(n))]);
    server.apply_all(Kind::EndpointSlice, (0..600).map(one));
    // Version, first page; then, instead of the second:
    let mut watching = {
        server.drip(Some((4096, Duration::from_micros(200))));
        let watching = Watching::start(&server, vec![request("pages")]);
        server.wait_for("the first page", |seen| seen.iter().any(Seen::is_list));
        server.compact();
        watching
    };
    assert_eq!(watching.next_update().set.downstreams.len(), 600);
    let seen = server.seen();
    assert!(seen.iter().any(|seen| seen.get("continue").is_some() && seen.code == 410), "{seen:#?}");
}

#[test]
fn bookmarks_keep_a_quiet_watch_resumable() {
    let (server, mut watching) = followed("quiet", limits());
    change_elsewhere(&server);
    server.bookmark();
    let at = server.resource_version();
    // Whatever comes after the bookmark on the same stream proves that it has been read.
    change(&server, "quiet", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
    change_elsewhere(&server);
    server.bookmark();
    server.compact();
    server.end_watches();
    server.wait_for_watches(1);
    change(&server, "quiet", "10.0.0.3");
    becomes(&mut watching, "10.0.0.3");
    assert_eq!(lists(&server), 1, "no 410, though the last event of our own was before the compaction");
    let last = server.seen().into_iter().rfind(Seen::is_watch).unwrap();
    assert!(last.get("resourceVersion").unwrap().parse::<u64>().unwrap() > at);
}

#[test]
fn a_watch_that_falls_silent_is_replaced() {
    let impatient = DiscoveryTimeouts {
        stall_timeout: Duration::from_millis(300),
        request_timeout: Duration::from_millis(300),
        ..limits()
    };
    let (server, mut watching) = followed("silent", impatient);
    server.freeze(true);
    change(&server, "silent", "10.0.0.2");
    watching
        .wait_status("a stall", |status| status.errors.iter().any(|&(kind, n)| kind == ErrorKind::Stalled && n > 0));
    // The new requests hang as well.
    watching
        .wait_status("a timeout", |status| status.errors.iter().any(|&(kind, n)| kind == ErrorKind::Connect && n > 0));
    watching.quiet();
    server.freeze(false);
    becomes(&mut watching, "10.0.0.2");
}

#[test]
fn a_server_restored_from_a_backup_is_listed_anew() {
    let impatient = DiscoveryTimeouts { stall_timeout: Duration::from_millis(300), ..limits() };
    let (server, mut watching) = followed("backup", impatient);
    for _ in 0..100 {
        change_elsewhere(&server);
    }
    change(&server, "backup", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
    server.stop();
    server.rewind();
    server.restart();
    // Our resource version is far ahead of the server's: it accepts the watch, which would wait forever.
    server.wait_for_watches(1);
    change(&server, "backup", "10.0.0.3");
    becomes(&mut watching, "10.0.0.3");
    assert_eq!(lists(&server), 2);
}

#[test]
fn an_expired_token_is_read_again_at_once() {
    let (server, mut watching) = followed("token", limits());
    server.accept_token("token-2");
    server.cut();
    watching.wait_status("a refusal", |status| {
        status.errors.iter().any(|&(kind, n)| kind == ErrorKind::Unauthorized && n > 2)
    });
    watching.quiet();
    assert_eq!(log_count(&["cannot follow the endpoints of logging/token", "401 Unauthorized"]), 1);
    server.hand_out_token("token-2");
    change(&server, "token", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
}

#[test]
fn a_new_certificate_authority_is_read_again() {
    let (mut server, mut watching) = followed("authority", limits());
    server.stop();
    server.rotate_authority();
    server.restart();
    change(&server, "authority", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
    assert!(watching.errors(ErrorKind::Tls) >= 1);
}

#[test]
fn a_missing_rule_is_named_with_its_remedy() {
    let server = ApiServer::start();
    server.set_rules(&[]);
    change(&server, "denied", "10.0.0.1");
    let mut wanted = request("denied");
    wanted.services[0].namespace = Some("secret".to_owned());
    server.apply(Kind::EndpointSlice, slice("secret", "denied", "denied-a", [ready("10.0.0.1")]));
    let mut watching = Watching::start(&server, vec![wanted]);
    let line = logged(&["WARN EndpointSlice not found", "namespace \"secret\""]);
    for part in [
        "system:serviceaccount:udp-fanout:udp-fanout may not list and watch endpointslices",
        "apiGroups [\"discovery.k8s.io\"], resources [\"endpointslices\"], verbs [\"list\", \"watch\"]",
        "; fix: udp-fanout rbac --config /etc/udp-fanout/config.toml | kubectl apply -f -;",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    watching.wait_status("more refusals", |status| {
        status.errors.iter().any(|&(kind, n)| kind == ErrorKind::Forbidden && n > 3)
    });
    assert_eq!(log_count(&["WARN EndpointSlice not found", "namespace \"secret\""]), 1);
    watching.quiet();
    server.allow(Rule::new(&["list", "watch"], "endpointslices").within("secret"));
    becomes(&mut watching, "10.0.0.1");
    logged(&["INFO endpoints of secret/denied are being followed again"]);
}

#[test]
fn refusals_of_a_server_that_starts_are_no_alarm() {
    let server = ApiServer::start();
    change(&server, "starting", "10.0.0.1");
    // The version request, and lists.
    server.answer_next((0..5).map(|_| failure(403, "Forbidden")));
    let mut watching = Watching::start(&server, vec![request("starting")]);
    becomes(&mut watching, "10.0.0.1");
    assert!(watching.errors(ErrorKind::Forbidden) >= 3);
    server.wait_for_watches(1);
    assert_eq!(log_count(&["WARN", "logging/starting"]), 0);
    assert_eq!(log_count(&["the daemon's account may not list and watch"]), 0);
    assert_eq!(log_count(&["logging/starting are being followed again"]), 0, "no outage was reported");
}

#[test]
fn a_first_start_without_rights_claims_no_last_known_endpoints() {
    let server = ApiServer::start();
    server.set_rules(&[]);
    let mut wanted = request("unknown");
    wanted.services[0].namespace = Some("nothing-yet".to_owned());
    let _watching = Watching::start(&server, vec![wanted]);
    let line = logged(&["WARN EndpointSlice not found", "namespace \"nothing-yet\""]);
    assert!(line.ends_with("; none are known yet"), "{line}");
}

#[test]
fn a_rule_taken_away_does_not_take_the_endpoints_away() {
    let (server, mut watching) = followed("revoked", limits());
    server.set_rules(&[Rule::new(&["list"], "endpointslices")]);
    server.cut();
    logged(&["WARN EndpointSlice not found", "namespace \"logging\"", "may not list and watch"]);
    watching.wait_status("more refusals", |status| {
        status.errors.iter().any(|&(kind, n)| kind == ErrorKind::Forbidden && n > 3)
    });
    watching.quiet();
    assert!(!watching.status().synced);
    change(&server, "revoked", "10.0.0.2");
    server.set_rules(&[Rule::new(&["list", "watch"], "endpointslices")]);
    becomes(&mut watching, "10.0.0.2");
}

#[test]
fn a_namespace_that_may_be_looked_at_and_is_missing_is_the_cause_of_a_refusal() {
    let server = ApiServer::start();
    server.set_rules(&[Rule::new(&["get"], "namespaces")]);
    server.apply(Kind::Namespace, namespace("logging"));
    let mut wanted = request("typo");
    wanted.services[0].namespace = Some("loging".to_owned());
    let _watching = Watching::start(&server, vec![wanted]);
    logged(&["WARN EndpointSlice not found: namespace \"loging\" does not exist"]);
}

#[test]
fn troubles_of_the_server_are_waited_out() {
    let server = ApiServer::start();
    change(&server, "trouble", "10.0.0.1");
    let mut busy = failure(429, "TooManyRequests");
    busy.1["details"] = json!({"retryAfterSeconds": 1});
    server.answer_next([
        failure(503, "ServiceUnavailable"),
        failure(500, "InternalError"),
        busy,
        failure(504, "Timeout"),
    ]);
    let mut watching = Watching::start(&server, vec![request("trouble")]);
    becomes(&mut watching, "10.0.0.1");
    assert_eq!((watching.errors(ErrorKind::Server), watching.errors(ErrorKind::Throttled)), (3, 1));
    // Every retry was logged.
    assert_eq!(server.seen().iter().filter(|seen| seen.code >= 400).count(), 4);
}

#[test]
fn events_that_make_no_sense_lead_to_a_new_list() {
    let (server, mut watching) = followed("nonsense", limits());
    let error = failure(500, "InternalError").1;
    let nonsense = [
        r#"{"type":"MODIFIED","object":{"metadata":{"name":"nonsense-a","resourceVersion":"999999"},"addressType":5}}"#
            .to_owned(),
        "this is not JSON".to_owned(),
        format!(r#"{{"type":"ERROR","object":{error}}}"#),
    ];
    for (n, line) in nonsense.iter().enumerate() {
        // Only watches that are open at the time get an event.
        server.wait_for("a watch", |seen| seen.iter().filter(|seen| seen.is_watch()).count() == n + 1);
        server.send_line(line);
        server.wait_for("a list", |seen| seen.iter().filter(|seen| seen.is_list()).count() == n + 2);
        let address = format!("10.0.1.{n}");
        change(&server, "nonsense", &address);
        becomes(&mut watching, &address);
    }
    assert_eq!((watching.errors(ErrorKind::Protocol), watching.errors(ErrorKind::Server)), (2, 1));
}

#[test]
fn a_slow_server_is_read_to_the_end() {
    let server = ApiServer::start();
    server.drip(Some((7, Duration::from_micros(100))));
    change(&server, "slow", "10.0.0.1");
    let mut watching = Watching::start(&server, vec![request("slow")]);
    becomes(&mut watching, "10.0.0.1");
    change(&server, "slow", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
    assert!(watching.status().errors.iter().all(|(_, count)| *count == 0));
}

#[test]
fn connections_cut_in_the_middle_of_a_line_lose_nothing() {
    let (server, mut watching) = followed("middle", limits());
    server.drip(Some((11, Duration::from_micros(300))));
    for round in 0..30 {
        change(&server, "middle", &format!("10.0.1.{round}"));
        // Cut at an arbitrary point of the slow line.
        std::thread::yield_now();
        server.cut();
    }
    server.drip(None);
    watching.until(&["10.0.1.29:5514"]);
}

#[test]
fn watches_that_end_at_once_are_not_renewed_in_a_tight_loop() {
    let server = ApiServer::start();
    change(&server, "short", "10.0.0.1");
    server.hang_up(true);
    let started = Instant::now();
    let patient = DiscoveryTimeouts {
        short_watch: Duration::from_secs(10),
        backoff_min: Duration::from_millis(40),
        backoff_max: Duration::from_secs(10),
        ..limits()
    };
    let mut watching = Watching::with(&server.kubeconfig(), vec![request("short")], None, patient);
    becomes(&mut watching, "10.0.0.1");
    server.wait_for("eight watches", |seen| seen.iter().filter(|seen| seen.is_watch()).count() == 8);
    // At least half of 40, 80, 160, 320, 640 and 1,280 ms.
    assert!(started.elapsed() >= Duration::from_millis(1260), "{:?}", started.elapsed());
    server.hang_up(false);
    change(&server, "short", "10.0.0.2");
    becomes(&mut watching, "10.0.0.2");
}

#[test]
fn api_discovery_that_is_forbidden_or_empty_is_no_obstacle() {
    let server = ApiServer::start();
    server.serve_versions(&["v1beta1"]);
    change(&server, "versions", "10.0.0.1");
    // The version request is forbidden, so v1 is tried; it is not served, so v1beta1 is tried.
    server.answer_next([failure(403, "Forbidden")]);
    let mut watching = Watching::start(&server, vec![request("versions")]);
    becomes(&mut watching, "10.0.0.1");
    let paths: Vec<String> = server.seen().into_iter().map(|seen| seen.path).collect();
    assert!(paths[1].contains("/v1/") && paths[3].contains("/v1beta1/"), "{paths:?}");

    let ancient = ApiServer::start();
    ancient.serve_versions(&[]);
    change(&ancient, "ancient", "10.0.0.1");
    let mut watching = Watching::start(&ancient, vec![request("ancient")]);
    logged(&["WARN cannot follow the endpoints of logging/ancient", "Kubernetes 1.19 or later is needed"]);
    ancient.serve_versions(&["v1"]);
    becomes(&mut watching, "10.0.0.1");
}

#[test]
fn a_storm_of_changes_is_gathered() {
    let (server, mut watching) = followed("storm", limits());
    let started = Instant::now();
    for n in 0..2000 {
        change(&server, "storm", &format!("10.2.{}.{}", n / 250, n % 250 + 1));
    }
    let updates = watching.until(&["10.2.7.250:5514"]);
    let elapsed = started.elapsed();
    // The first at once, then one for each window.
    let most = elapsed.as_millis() / limits().coalesce.as_millis() + 2;
    println!("2,000 changes became {updates} updates in {elapsed:?}");
    assert!(u128::try_from(updates).unwrap() <= most, "{updates} updates in {elapsed:?}");
}

#[test]
fn starting_without_usable_credentials_is_an_error_in_one_line() {
    let server = ApiServer::start();
    let kubeconfig = server.kubeconfig();
    let start = |path: &std::path::Path| {
        let settings =
            DiscoverySettings { kubeconfig: Some(path.to_owned()), limits: limits(), ..DiscoverySettings::from_env() };
        let poll = mio::Poll::new().unwrap();
        let waker = std::sync::Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
        let (sender, _updates) = std::sync::mpsc::channel();
        format!("{:#}", Discovery::start(vec![request("any")], settings, sender, waker).unwrap_err())
    };
    let missing = start(std::path::Path::new("/nonexistent/kubeconfig"));
    assert!(
        missing.contains("cannot use the kubeconfig /nonexistent/kubeconfig") && !missing.contains('\n'),
        "{missing}"
    );
    let proxied =
        std::fs::read_to_string(&kubeconfig).unwrap().replace("{server:", "{proxy-url: \"http://proxy\", server:");
    std::fs::write(&kubeconfig, proxied).unwrap();
    assert!(start(&kubeconfig).contains("proxy-url http://proxy/ is not supported"), "{}", start(&kubeconfig));
    std::fs::write(&kubeconfig, "not: [a, kubeconfig").unwrap();
    let broken = start(&kubeconfig);
    assert!(broken.contains(kubeconfig.to_str().unwrap()), "{broken}");
}

#[test]
fn shutting_down_does_not_wait_for_the_server() {
    let (server, watching) = followed("end", limits());
    server.freeze(true);
    server.cut();
    assert!(watching.discovery.is_running());
    watching.discovery.shutdown();
    server.freeze(false);
}
