//! The HTTP endpoint over real connections, with a stand-in for the event loop.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::{Duration, UNIX_EPOCH};

use mio::{Events, Poll, Token, Waker};
use socket2::{Domain, Socket, Type};
use udp_fanout::testing::config::MetricsConfig;
use udp_fanout::testing::metrics::http::{
    HttpLimits, ListenerReadiness, ListenerServing, MainLoopRequest, MetricsListener, MetricsServer, ReadinessReport,
    ReadinessState, ServingReport,
};
use udp_fanout::testing::metrics::{
    DownstreamSnapshot, ListenerSnapshot, MetricsSnapshot, PlanApplyCounts, ReloadCounts,
};
use udp_fanout::testing::model::{DownstreamCounters, FragmentCounters, ListenerCounters, Mode};

/// The timeout of every wait. Only a failing test waits that long.
const NEVER: Duration = Duration::from_secs(600);
const PATIENT: HttpLimits = HttpLimits {
    answer: NEVER,
    headers: NEVER,
    connection: NEVER,
    connections: 64,
    per_source: 64,
    own_host: 64,
    grace: Duration::ZERO,
};

fn config(bind: &str, path: &str) -> MetricsConfig {
    MetricsConfig { bind: bind.parse().expect("an address"), path: path.to_owned() }
}

/// A stand-in for the event loop: a mio waker wakes it, and it replies to all requests that have arrived.
struct Loop {
    end: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Loop {
    fn start(
        mut poll: Poll,
        waker: Arc<Waker>,
        requests: Receiver<MainLoopRequest>,
        answer: fn(MainLoopRequest),
    ) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&end);
        let thread = std::thread::spawn(move || {
            let mut events = Events::with_capacity(8);
            while !ends.load(Ordering::SeqCst) {
                poll.poll(&mut events, None).expect("poll");
                requests.try_iter().for_each(answer);
            }
        });
        Loop { end, waker, thread: Some(thread) }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        self.waker.wake().expect("wake");
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking(), "the stand-in loop panicked");
        }
    }
}

/// An endpoint whose requests are not read yet.
fn endpoint(path: &str, limits: HttpLimits) -> (MetricsServer, Receiver<MainLoopRequest>, Poll, Arc<Waker>) {
    endpoint_at("127.0.0.1:0", path, limits)
}

fn endpoint_at(
    bind: &str,
    path: &str,
    limits: HttpLimits,
) -> (MetricsServer, Receiver<MainLoopRequest>, Poll, Arc<Waker>) {
    let poll = Poll::new().expect("epoll");
    let waker = Arc::new(Waker::new(poll.registry(), Token(0)).expect("a waker"));
    let bound = MetricsListener::new(&config(bind, path)).expect("a port");
    let (server, requests) = bound.serve(Arc::clone(&waker), limits).expect("a thread");
    (server, requests, poll, waker)
}

/// An endpoint with an event loop that replies to each request with `answer`.
fn answered_by(answer: fn(MainLoopRequest), limits: HttpLimits) -> (MetricsServer, Loop) {
    let (server, requests, poll, waker) = endpoint("/metrics", limits);
    (server, Loop::start(poll, waker, requests, answer))
}

fn snapshot(downstreams: u32) -> MetricsSnapshot {
    let downstream = |n: u32| DownstreamSnapshot {
        endpoint: SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + n), 514)),
        counters: DownstreamCounters { packets: n.into(), bytes: 0 },
    };
    let counters = ListenerCounters { packets_received: 42, packets_forwarded: 42, ..Default::default() };
    MetricsSnapshot {
        started: UNIX_EPOCH,
        plan_applies: PlanApplyCounts::default(),
        reloads: ReloadCounts { success: 0, error: 0, last_good: true, last_success: UNIX_EPOCH },
        listeners: vec![ListenerSnapshot {
            name: "syslog".into(),
            mode: Mode::Userspace,
            mode_reason: "configured".into(),
            replicates: false,
            active: downstreams as usize,
            counters: vec![(Mode::Userspace, counters)],
            downstreams: (0..downstreams).map(downstream).collect(),
        }],
        fragments: FragmentCounters::default(),
        programs_ahead: Vec::new(),
        health: Vec::new(),
        health_transitions: Vec::new(),
        probes: udp_fanout::testing::health::probe_stats::ProbeStatsByKind::default(),
        discovery: Vec::new(),
    }
}

fn healthy(request: MainLoopRequest) {
    match request {
        // The client may have disconnected.
        MainLoopRequest::Scrape(reply) => drop(reply.send(Ok(snapshot(2)))),
        MainLoopRequest::Readiness(reply) => drop(reply.send(ReadinessReport::default())),
        MainLoopRequest::Serving(reply) => {
            let listeners = ["a", "b"].map(|name| ListenerServing {
                name: name.into(),
                serves: true,
                detail: "serving".to_owned(),
            });
            drop(reply.send(ServingReport { listeners: listeners.into() }));
        }
    }
}

/// A raw response.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: String,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

fn connect(server: &MetricsServer) -> TcpStream {
    let stream = TcpStream::connect(server.address()).expect("a connection");
    // Makes a hanging test fail.
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    stream
}

fn read_answer(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("a response");
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP response: {text:?}"));
    let (status, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let status = status.strip_prefix("HTTP/1.1 ").or(status.strip_prefix("HTTP/1.0 ")).expect("a status line");
    Answer { status: status[..3].parse().expect("a status"), headers: headers.to_owned(), body: body.to_owned() }
}

fn send(server: &MetricsServer, request: &str) -> TcpStream {
    let mut stream = connect(server);
    stream.write_all(request.as_bytes()).expect("sent");
    stream
}

fn request(server: &MetricsServer, method: &str, path: &str) -> Answer {
    read_answer(send(server, &format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")))
}

fn get(server: &MetricsServer, path: &str) -> Answer {
    request(server, "GET", path)
}

#[test]
fn metrics_come_from_the_loop_at_each_scrape() {
    let (server, requests, _poll, _waker) = endpoint("/metrics", PATIENT);
    for downstreams in [1, 3] {
        let client = send(&server, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        match requests.recv().expect("a request") {
            MainLoopRequest::Scrape(reply) => reply.send(Ok(snapshot(downstreams))).expect("a client waits"),
            MainLoopRequest::Readiness(_) | MainLoopRequest::Serving(_) => panic!("unexpected request"),
        }
        let answer = read_answer(client);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        assert_eq!(answer.header("content-length"), Some(answer.body.len().to_string().as_str()));
        let active = format!("udp_fanout_downstream_active{{listener=\"syslog\"}} {downstreams}\n");
        assert!(answer.body.contains(&active), "{}", answer.body);
    }
}

#[test]
fn a_waker_reaches_the_loop_and_every_page_works() {
    let (server, _loop) = answered_by(healthy, PATIENT);
    assert!(
        get(&server, "/metrics")
            .body
            .contains("udp_fanout_packets_received_total{listener=\"syslog\",mode=\"userspace\"} 42\n")
    );
    assert_eq!(get(&server, "/metrics?name=x").status, 200);
    let health = get(&server, "/healthz");
    assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
    let ready = get(&server, "/readyz");
    assert_eq!((ready.status, ready.body.as_str()), (200, "ready\n"));
    let index = get(&server, "/");
    assert_eq!(index.status, 200);
    for path in ["/metrics", "/healthz", "/readyz", "/serving"] {
        assert!(index.body.contains(path), "{}", index.body);
    }
}

#[test]
fn the_configured_path_replaces_the_usual_one() {
    let (server, requests, poll, waker) = endpoint("/custom/stats", PATIENT);
    let _loop = Loop::start(poll, waker, requests, healthy);
    assert!(get(&server, "/custom/stats").body.contains("udp_fanout_build_info"));
    assert_eq!(get(&server, "/metrics").status, 404);

    let (server, requests, poll, waker) = endpoint("/", PATIENT);
    let _loop = Loop::start(poll, waker, requests, healthy);
    assert!(get(&server, "/").body.contains("udp_fanout_build_info"));
    assert_eq!(get(&server, "/healthz").status, 200);
}

#[test]
fn a_probes_path_is_refused_for_metrics() {
    for path in ["/healthz", "/readyz", "/serving", "/serving/a"] {
        let error = MetricsListener::new(&config("127.0.0.1:0", path)).expect_err("a clash").to_string();
        assert!(error.contains(path) && error.contains("metrics.path"), "{error}");
    }
}

#[test]
fn head_is_get_without_the_body() {
    let (server, _loop) = answered_by(healthy, PATIENT);
    for path in ["/metrics", "/healthz", "/readyz", "/serving", "/"] {
        let whole = get(&server, path);
        let head = request(&server, "HEAD", path);
        assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
        assert_eq!(head.header("content-length"), whole.header("content-length"), "{path}");
        assert_eq!(head.header("content-type"), whole.header("content-type"), "{path}");
    }
}

#[test]
fn other_paths_are_404_and_other_methods_405() {
    let (server, _loop) = answered_by(healthy, PATIENT);
    for path in ["/metricsx", "/metrics/", "/servingx", "/healthz/x", "//", "/%2e%2e/etc/passwd"] {
        let answer = get(&server, path);
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.body.contains("/metrics"), "{}", answer.body);
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
        let answer = request(&server, method, "/metrics");
        assert_eq!(answer.status, 405, "{method}");
        assert_eq!(answer.header("allow"), Some("GET, HEAD"));
        assert_eq!(request(&server, method, "/nowhere").status, 404, "{method}");
    }
}

#[test]
fn malformed_requests_are_refused_and_do_no_harm() {
    let (server, _loop) = answered_by(healthy, PATIENT);
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(7 << 10));
    assert_eq!(read_answer(send(&server, &long)).status, 200);
    let cases = [
        ("rubbish\r\n\r\n".to_owned(), 400),
        ("GET\r\n\r\n".to_owned(), 400),
        ("GET /metrics HTTP/9.9\r\n\r\n".to_owned(), 400),
        ("GET /metrics HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), 400),
        ("\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}".to_owned(), 400),
        (format!("GET /metrics HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(200)), 431),
    ];
    for (request, status) in cases {
        assert_eq!(read_answer(send(&server, &request)).status, status, "{request:?}");
    }
    // Longer than the buffer: closed, with or without a response, since part of it was never read.
    let mut endless = connect(&server);
    let mut sink = Vec::new();
    let _ = endless.write_all(format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20)).as_bytes());
    let _ = endless.read_to_end(&mut sink);
    assert_eq!(get(&server, "/metrics").status, 200);
}

#[test]
fn old_and_half_closed_clients_are_served() {
    let (server, _loop) = answered_by(healthy, PATIENT);
    let client = send(&server, "GET /metrics HTTP/1.0\r\n\r\n");
    client.shutdown(Shutdown::Write).expect("half closed");
    assert_eq!(read_answer(client).status, 200);
}

#[test]
fn a_connection_carries_one_request() {
    let (server, _loop) = answered_by(healthy, PATIENT);
    // `get` reads to the end of the connection, which comes although the client asks to keep it.
    let answer = read_answer(send(&server, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n"));
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("connection"), Some("close"));
}

#[test]
fn a_stalled_loop_is_reported_on_every_page_that_needs_it() {
    let limits = HttpLimits { answer: Duration::from_millis(20), ..PATIENT };
    let (server, requests, _poll, _waker) = endpoint("/metrics", limits);
    for path in ["/healthz", "/readyz", "/serving", "/serving/a", "/metrics"] {
        let answer = get(&server, path);
        assert_eq!(answer.status, 503, "{path}");
        assert_eq!(answer.body, "the main loop has not replied for 20ms\n");
        // The loop, once it runs again, sees that no client waits.
        assert!(requests.recv().expect("a request").abandoned());
    }
    assert_eq!(get(&server, "/").status, 200);
}

#[test]
fn a_loop_stalled_for_long_costs_no_memory() {
    let limits = HttpLimits { answer: Duration::from_millis(1), connections: 0, own_host: 3, ..PATIENT };
    let (server, requests, _poll, _waker) = endpoint("/metrics", limits);
    for _ in 0..20 {
        assert_eq!(get(&server, "/healthz").status, 503);
    }
    assert_eq!(requests.try_iter().count(), 3);
}

#[test]
fn a_loop_that_has_ended_is_reported() {
    let (server, requests, _poll, _waker) = endpoint("/metrics", PATIENT);
    drop(requests);
    for path in ["/healthz", "/readyz", "/serving", "/serving/a", "/metrics"] {
        let answer = get(&server, path);
        assert_eq!((answer.status, answer.body.as_str()), (503, "the main loop has ended\n"), "{path}");
    }
}

#[test]
fn a_question_dropped_is_answered_at_once() {
    let (server, _loop) = answered_by(drop, PATIENT);
    assert_eq!(get(&server, "/healthz").status, 503);
}

#[test]
fn a_scrape_that_fails_says_why() {
    fn failing(request: MainLoopRequest) {
        if let MainLoopRequest::Scrape(reply) = request {
            let error = anyhow::anyhow!("permission denied").context("cannot read map STATS");
            let _ = reply.send(Err(error));
        }
    }
    let (server, _loop) = answered_by(failing, PATIENT);
    let answer = get(&server, "/metrics");
    assert_eq!((answer.status, answer.body.as_str()), (503, "cannot read map STATS: permission denied\n"));
}

#[test]
fn readiness_names_each_listener_that_is_not_ready() {
    fn starting(request: MainLoopRequest) {
        let MainLoopRequest::Readiness(reply) = request else { return };
        let listener = |name: &str, readiness| ListenerReadiness { name: name.into(), readiness };
        let listeners = vec![
            listener("a", ReadinessState::Ready),
            listener("b", ReadinessState::NotAttached("interface not found: eth9".to_owned())),
            listener("c", ReadinessState::NoDownstreamSet),
        ];
        let _ = reply.send(ReadinessReport { listeners });
    }
    let (server, _loop) = answered_by(starting, PATIENT);
    let answer = get(&server, "/readyz");
    assert_eq!(answer.status, 503);
    assert_eq!(
        answer.body,
        "listener b: not attached: interface not found: eth9\nlistener c: waiting for its first downstream set\n"
    );
    assert_eq!(get(&server, "/healthz").status, 200);
}

#[test]
fn serving_is_of_all_listeners_or_of_one() {
    fn half(request: MainLoopRequest) {
        let MainLoopRequest::Serving(reply) = request else { return };
        let listener =
            |name: &str, serves, detail: &str| ListenerServing { name: name.into(), serves, detail: detail.to_owned() };
        let listeners = vec![listener("a.1", true, "serving"), listener("b", false, "no downstreams found")];
        let _ = reply.send(ServingReport { listeners });
    }
    let (server, _loop) = answered_by(half, PATIENT);
    for (path, status, body) in [
        ("/serving", 503, "listener a.1: serving\nlistener b: no downstreams found\n"),
        ("/serving/a.1", 200, "listener a.1: serving\n"),
        ("/serving/b", 503, "listener b: no downstreams found\n"),
        ("/serving/a", 404, "no listener \"a\"; there are: a.1, b\n"),
        ("/serving/", 404, "no listener \"\"; there are: a.1, b\n"),
    ] {
        let answer = get(&server, path);
        assert_eq!((answer.status, answer.body.as_str()), (status, body), "{path}");
    }
}

#[test]
fn a_hundred_idle_clients_do_not_stop_a_scrape() {
    let (server, _loop) = answered_by(healthy, PATIENT);
    let mut idle: Vec<_> = (0..100).map(|_| connect(&server)).collect();
    for client in &mut idle[50..] {
        client.write_all(b"GET /metrics HT").expect("sent");
    }
    for _ in 0..3 {
        assert_eq!(get(&server, "/metrics").status, 200);
    }
}

#[test]
fn clients_that_do_not_read_block_no_others() {
    fn huge(request: MainLoopRequest) {
        match request {
            MainLoopRequest::Scrape(reply) => drop(reply.send(Ok(snapshot(5_000)))),
            MainLoopRequest::Readiness(reply) => drop(reply.send(ReadinessReport::default())),
            MainLoopRequest::Serving(reply) => drop(reply.send(ServingReport::default())),
        }
    }
    let (server, _loop) = answered_by(huge, HttpLimits { own_host: 4, ..PATIENT });
    let _idle: Vec<_> = (0..8).map(|_| send(&server, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).collect();
    assert_eq!(get(&server, "/healthz").status, 200);
    let page = get(&server, "/metrics");
    assert_eq!(page.body.matches("udp_fanout_downstream_packets_total{").count(), 5_000);
}

#[test]
fn a_client_whose_answer_is_being_made_is_not_pushed_out() {
    let (server, requests, _poll, _waker) = endpoint("/metrics", HttpLimits { own_host: 2, ..PATIENT });
    let scraper = send(&server, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let MainLoopRequest::Scrape(reply) = requests.recv().expect("a request") else { panic!("unexpected request") };
    let mut idle = connect(&server);
    let _pushes_it_out = connect(&server);
    assert_eq!(idle.read(&mut [0]).expect("end of stream"), 0);
    reply.send(Ok(snapshot(1))).expect("the scraper waits");
    assert_eq!(read_answer(scraper).status, 200);
}

#[test]
fn clients_over_the_limit_wait_while_all_others_are_being_answered() {
    let (server, requests, _poll, _waker) = endpoint("/metrics", HttpLimits { own_host: 2, grace: NEVER, ..PATIENT });
    let probe = || send(&server, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    let early = [probe(), probe()];
    let held = [(); 2].map(|()| requests.recv().expect("a request"));
    let late = [probe(), probe()];
    held.into_iter().for_each(healthy);
    assert_eq!(early.map(|client| read_answer(client).status), [200, 200]);
    (0..2).for_each(|_| healthy(requests.recv().expect("a request")));
    assert_eq!(late.map(|client| read_answer(client).status), [200, 200]);
}

/// Connects from 127.0.0.N. To a server on 127.0.0.1, that is another host for every N but 1.
fn connect_from(server: &MetricsServer, n: u8) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, n], 0)).into()).expect("an address of the loopback interface");
    // A refused connection is reset, perhaps before `connect` returns.
    if let Err(error) = socket.connect(&server.address().into()) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    socket.into()
}

const PROBE: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";

fn probe_from(server: &MetricsServer, n: u8) -> TcpStream {
    let mut stream = connect_from(server, n);
    stream.write_all(PROBE).expect("sent");
    stream
}

/// Waits until the server has closed the connection without a response. Of one that was reset within `connect`, reading says
/// that it is not connected.
fn is_refused(mut stream: &TcpStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::NotConnected),
    }
}

/// Whether an idle connection still carries a request.
fn still_serves(mut stream: TcpStream) -> bool {
    stream.write_all(PROBE).expect("sent");
    read_answer(stream).status == 200
}

#[test]
fn a_host_gets_as_many_connections_as_it_may_have_and_other_hosts_get_theirs() {
    let (server, _loop) = answered_by(healthy, HttpLimits { per_source: 3, grace: NEVER, ..PATIENT });
    let idle = [(); 3].map(|()| connect_from(&server, 2));
    for _ in 0..200 {
        assert!(is_refused(&connect_from(&server, 2)));
    }
    assert_eq!(read_answer(probe_from(&server, 3)).status, 200);
    assert_eq!(get(&server, "/healthz").status, 200);
    // Those within the limit were not disturbed.
    assert!(idle.into_iter().all(still_serves));
    assert_eq!(read_answer(probe_from(&server, 2)).status, 200);
}

#[test]
fn after_its_grace_a_hosts_oldest_idle_connection_gives_way_to_its_next() {
    let (server, _loop) = answered_by(healthy, HttpLimits { per_source: 2, ..PATIENT });
    let [oldest, second, third] = [(); 3].map(|()| connect_from(&server, 2));
    assert!(is_refused(&oldest));
    assert!(still_serves(second) && still_serves(third));
}

#[test]
fn if_other_hosts_hold_all_places_the_one_that_holds_most_loses_its_oldest_idle_one() {
    let limits = HttpLimits { connections: 4, per_source: 2, grace: NEVER, ..PATIENT };
    let (server, _loop) = answered_by(healthy, limits);
    let single = connect_from(&server, 2);
    let [of_two, younger] = [(); 2].map(|()| connect_from(&server, 3));
    let last = connect_from(&server, 4);
    let new = connect_from(&server, 5);
    assert!(is_refused(&of_two));
    assert!([single, younger, last, new].into_iter().all(still_serves));
}

#[test]
fn this_hosts_places_are_its_own() {
    let limits = HttpLimits { connections: 2, per_source: 2, own_host: 1, ..PATIENT };
    let (server, requests, _poll, _waker) = endpoint("/metrics", limits);
    let busy = [2, 3].map(|n| probe_from(&server, n));
    let held = [(); 2].map(|()| requests.recv().expect("a request"));
    assert!(is_refused(&connect_from(&server, 4)), "every connection slot of other hosts waits for the event loop");
    let own = send(&server, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    healthy(requests.recv().expect("a request"));
    assert_eq!(read_answer(own).status, 200);
    held.into_iter().for_each(healthy);
    assert_eq!(busy.map(|client| read_answer(client).status), [200, 200]);
}

#[test]
fn a_flood_of_half_open_clients_of_many_hosts_ends_with_the_limits() {
    let (server, _loop) =
        answered_by(healthy, HttpLimits { headers: Duration::from_millis(50), ..HttpLimits::default() });
    let flood: Vec<_> = (2..102).flat_map(|n| [(); 3].map(|()| connect_from(&server, n))).collect();
    // All are closed, the last ones by the time limit for headers.
    assert!(flood.iter().all(is_refused));
    assert_eq!(read_answer(probe_from(&server, 2)).status, 200);
}

#[test]
fn clients_that_dawdle_are_hung_up_on() {
    let (server, _loop) = answered_by(healthy, HttpLimits { headers: Duration::from_millis(50), ..PATIENT });
    let mut sink = Vec::new();
    connect(&server).read_to_end(&mut sink).expect("end of stream");
    send(&server, "GET /metrics HTTP/1.1\r\n").read_to_end(&mut sink).expect("end of stream");
    assert!(sink.is_empty());

    let (server, _loop) = answered_by(healthy, HttpLimits { connection: Duration::from_millis(50), ..PATIENT });
    connect(&server).read_to_end(&mut sink).expect("end of stream");
    assert!(sink.is_empty());
}

#[test]
fn a_port_in_use_is_one_clear_line() {
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = other.local_addr().expect("an address").to_string();
    let error = MetricsListener::new(&config(&address, "/metrics")).expect_err("in use").to_string();
    assert!(error.starts_with(&format!("cannot serve metrics on {address}: address already in use; ")), "{error}");
    assert!(error.contains("metrics.bind") && !error.contains('\n'), "{error}");
}

#[test]
fn an_address_of_another_host_is_one_clear_line() {
    // 192.0.2.0/24 is reserved for documentation.
    let error = MetricsListener::new(&config("192.0.2.1:9090", "/metrics")).expect_err("not ours").to_string();
    assert!(error.starts_with("cannot serve metrics on 192.0.2.1:9090: this host has no such address; "), "{error}");
}

#[test]
fn shutdown_closes_connections_and_frees_the_port() {
    // An address of its own, so that no other test can take the port once it is free.
    let (server, requests, _poll, _waker) = endpoint_at("127.77.0.1:0", "/metrics", PATIENT);
    let address = server.address();
    let mut idle = connect(&server);
    let mut waiting = send(&server, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let request = requests.recv().expect("a request");
    server.shutdown();
    assert!(request.abandoned());
    assert!(requests.recv().is_err(), "the thread has ended");
    let mut sink = Vec::new();
    assert_eq!(idle.read_to_end(&mut sink).expect("end of stream"), 0);
    assert_eq!(waiting.read_to_end(&mut sink).expect("end of stream"), 0);
    MetricsListener::new(&config(&address.to_string(), "/metrics")).expect("the port is free");
}
