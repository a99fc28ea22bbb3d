use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as Client;
use std::thread;
use std::time::Duration;

use mio::{Events, Poll, Waker};
use tempfile::TempDir;

use super::*;
use crate::control::client::StatusClient;
use crate::control::protocol::ResponseHead;
use crate::control::report::StatusReport;

const FIRST: Token = Token(100);
const LIMIT: Duration = Duration::from_secs(20);

/// A server in a thread of its own, as the event loop would run it.
struct ServerThread {
    directory: TempDir,
    waker: Waker,
    thread: Option<thread::JoinHandle<()>>,
}

impl ServerThread {
    fn start(answer: impl FnMut(&StatusRequest) -> StatusReply + Send + 'static) -> ServerThread {
        let directory = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let waker = Waker::new(poll.registry(), Token(0)).unwrap();
        let server = StatusServer::bind(&directory.path().join("sub/status.sock"), poll.registry(), FIRST).unwrap();
        let thread = Some(thread::spawn(move || serve(poll, server, answer)));
        ServerThread { directory, waker, thread }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("sub/status.sock")
    }

    fn client(&self) -> Client {
        let client = Client::connect(self.path()).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client
    }

    fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.waker.wake().unwrap();
            thread.join().unwrap();
        }
    }
}

impl Drop for ServerThread {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(mut poll: Poll, mut server: StatusServer, mut answer: impl FnMut(&StatusRequest) -> StatusReply) {
    let mut events = Events::with_capacity(8);
    loop {
        poll.poll(&mut events, None).unwrap();
        for event in &events {
            if event.token() == Token(0) {
                return;
            }
            assert!(server.owns(event.token()));
            server.on_event(event.token(), &mut answer);
        }
    }
}

fn large() -> StatusReply {
    let problems = vec!["a long way down".repeat(1_000); 200];
    StatusReply::Report(Box::new(StatusReport { problems, ..Default::default() }))
}

fn small(problem: &str) -> StatusReply {
    StatusReply::Report(Box::new(StatusReport { problems: vec![problem.to_owned()], ..Default::default() }))
}

fn ask(client: &Client) -> StatusReply {
    (&mut &*client).write_all(&StatusRequest::Status.to_bytes()).unwrap();
    read(client)
}

/// Reads one response; of an error, the reason.
fn read(client: &Client) -> StatusReply {
    let mut reader = BufReader::new(client);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(reader.read_until(b'\n', &mut head).unwrap() > 0, "{}", String::from_utf8_lossy(&head));
    }
    let head = ResponseHead::parse(&head).unwrap();
    let mut body = vec![0; usize::try_from(head.length.unwrap()).unwrap()];
    reader.read_exact(&mut body).unwrap();
    if head.code == 200 {
        return StatusReply::Report(serde_json::from_slice(&body).unwrap());
    }
    let code = StatusCode::from_u16(head.code).unwrap();
    StatusReply::Error(RequestError::new(code, String::from_utf8(body).unwrap().trim_end()))
}

fn is_closed(client: &Client) -> bool {
    matches!((&mut &*client).read(&mut [0; 64]), Ok(0) | Err(_))
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_server() {
    let mut running = ServerThread::start(|_| large());
    let mode = fs::symlink_metadata(running.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    running.stop();
    assert!(!running.path().exists());
}

#[test]
fn a_check_asks_for_any_answer_and_waits_a_bounded_time() {
    let running = ServerThread::start(|request| {
        assert_eq!(*request, StatusRequest::Alive);
        StatusReply::Alive
    });
    StatusClient::check(&running.path()).unwrap();

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _stuck = net::UnixListener::bind(&path).unwrap();
    let error = StatusClient::check(&path).unwrap_err().to_string();
    assert_eq!(error, "the daemon has not answered within 2s; it may be stuck: see its log, or restart it");
}

#[test]
fn a_check_ends_although_the_daemon_accepts_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let _waiting = Client::connect(&path).unwrap();
    let error = StatusClient::check(&path).unwrap_err().to_string();
    assert!(error.starts_with("the daemon has not answered within 2s; "), "{error}");
}

#[test]
fn a_client_asks_as_often_as_it_likes_and_gets_whole_answers() {
    let mut asked = 0;
    let running = ServerThread::start(move |request| {
        assert_eq!(*request, StatusRequest::Status);
        asked += 1;
        if asked % 2 == 0 { large() } else { small(&asked.to_string()) }
    });
    let client = running.client();
    for round in 0..5 {
        assert_eq!(ask(&client), small(&(2 * round + 1).to_string()));
        assert_eq!(ask(&client), large());
    }
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let running = ServerThread::start(|_| small("answered"));
    let client = running.client();
    for byte in StatusRequest::Status.to_bytes() {
        (&client).write_all(&[byte]).unwrap();
    }
    assert_eq!(read(&client), small("answered"));
}

#[test]
fn nonsense_is_answered_and_ends_the_connection() {
    let running = ServerThread::start(|_| large());
    let two = [StatusRequest::Status.to_bytes(), StatusRequest::Status.to_bytes()].concat();
    let endless = [&b"GET /"[..], &vec![b'x'; MAX_REQUEST]].concat();
    for (sent, reason) in [(&b"status\n"[..], "not an HTTP request"), (&two, "one request"), (&endless, "at most 4096")]
    {
        let client = running.client();
        (&client).write_all(sent).unwrap();
        let StatusReply::Error(RequestError { reason: answer, .. }) = read(&client) else {
            panic!("{sent:?} was accepted")
        };
        assert!(answer.contains(reason), "{answer}");
        assert!(is_closed(&client));
    }
    assert_eq!(ask(&running.client()), large());
}

#[test]
fn a_client_that_speaks_the_protocol_before_http_hears_so_in_that_protocol() {
    let running = ServerThread::start(|_| large());
    let client = running.client();
    (&client).write_all(b"{\"version\":1,\"request\":\"status\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(&client).read_line(&mut line).unwrap();
    let said: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(said["version"], 2, "{line}");
    assert!(is_closed(&client));
}

#[test]
fn clients_that_hold_the_socket_open_keep_nobody_out() {
    let running = ServerThread::start(|_| large());
    // Some say nothing, some stop in the middle, some do not read what they are told.
    let silent: Vec<Client> = (0..40)
        .map(|n| {
            let client = running.client();
            match n % 3 {
                0 => {}
                1 => (&client).write_all(b"GET /status HTTP/1.1\r\nHost:").unwrap(),
                _ => (&client).write_all(&StatusRequest::Status.to_bytes()).unwrap(),
            }
            client
        })
        .collect();
    let client = running.client();
    for _ in 0..3 {
        assert_eq!(ask(&client), large());
    }
    assert!(is_closed(&silent[0]), "the longest silent has gone");
    drop(silent);
    assert_eq!(ask(&client), large());
}

#[test]
fn a_socket_that_is_left_over_is_replaced_and_a_living_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("status.sock");
    let poll = Poll::new().unwrap();
    let bind = || StatusServer::bind(&path, poll.registry(), FIRST).map(drop).map_err(|error| format!("{error:#}"));
    drop(net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "as after a kill");
    bind().unwrap();
    assert!(!path.exists());

    let living = net::UnixListener::bind(&path).unwrap();
    let refused = bind().unwrap_err();
    assert!(refused.contains(path.to_str().unwrap()) && refused.contains("another udp-fanout answers"), "{refused}");
    drop(living);

    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let refused = bind().unwrap_err();
    assert!(refused.contains("not a socket") && refused.contains("status_socket"), "{refused}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_socket_of_somebody_else_is_not_removed_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("status.sock");
    let poll = Poll::new().unwrap();
    let server = StatusServer::bind(&path, poll.registry(), FIRST).unwrap();
    fs::remove_file(&path).unwrap();
    // Keeps the inode's number from being used again.
    fs::write(directory.path().join("filler"), "x").unwrap();
    let theirs = net::UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
    drop(theirs);
}

/// Lets the server do what it can.
fn drive(poll: &mut Poll, server: &mut StatusServer) {
    let mut events = Events::with_capacity(8);
    poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
    for event in &events {
        server.on_event(event.token(), |_| StatusReply::Trace(TraceSubscription::default(), "tracing".into()));
    }
}

#[test]
fn a_client_that_traces_and_does_not_read_costs_little_and_is_told_how_many_lines_were_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let mut poll = Poll::new().unwrap();
    let mut server = StatusServer::bind(&directory.path().join("status.sock"), poll.registry(), FIRST).unwrap();
    let client = Client::connect(&server.path).unwrap();
    (&client).write_all(&StatusRequest::Trace(TraceQuery::default()).to_bytes()).unwrap();
    while server.subscriptions().count() == 0 {
        drive(&mut poll, &mut server);
    }
    let line = TraceLine::Note { note: "x".repeat(1_000) };
    let mut kept = 0;
    for _ in 0..4_000 {
        server.publish(&line, |_| true);
        kept = kept.max(server.connections.iter().map(|(_, connection)| connection.output.len()).sum());
    }
    assert!(kept <= MAX_UNREAD + 2_000, "{kept} bytes are kept");
    let dropped = server.connections.iter().map(|(_, connection)| connection.dropped).sum::<u64>();
    assert!(dropped > 0);

    client.set_nonblocking(true).unwrap();
    let mut text = Vec::new();
    let lines = |text: &[u8]| text.windows(2).filter(|end| end == b"}\n").count() as u64;
    // The first line, and those that were not dropped.
    while lines(&text) < 1 + 4_000 - dropped {
        let _ = (&client).read_to_end(&mut text);
        drive(&mut poll, &mut server);
    }
    server.publish(&line, |_| true);
    while lines(&text) < 1 + 4_000 - dropped + 2 {
        let _ = (&client).read_to_end(&mut text);
    }
    let told = format!("{dropped} lines were dropped");
    assert!(String::from_utf8(text).unwrap().contains(&told), "{told}");

    // It ends the trace by closing the connection, or by sending anything.
    (&client).write_all(b"enough\n").unwrap();
    while server.subscriptions().count() > 0 {
        drive(&mut poll, &mut server);
    }
    assert!(server.connections.is_empty());
}

#[test]
fn a_trace_ends_after_as_many_datagrams_as_were_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let mut poll = Poll::new().unwrap();
    let mut server = StatusServer::bind(&directory.path().join("status.sock"), poll.registry(), FIRST).unwrap();
    let client = Client::connect(&server.path).unwrap();
    let query = TraceQuery { count: Some(2), ..TraceQuery::default() };
    (&client).write_all(&StatusRequest::Trace(query).to_bytes()).unwrap();
    while server.subscriptions().count() == 0 {
        drive(&mut poll, &mut server);
    }
    let record = TraceLine::Record(Box::new(crate::control::trace::tests::record()));
    server.publish(&record, |_| true);
    server.publish(&TraceLine::Note { note: "no datagram".into() }, |_| true);
    assert_eq!(server.subscriptions().count(), 1);
    server.publish(&record, |_| true);
    server.publish(&record, |_| true);
    assert!(server.connections.is_empty());
    let mut text = String::new();
    (&client).read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("\"listener\":").count(), 2, "{text}");
}
