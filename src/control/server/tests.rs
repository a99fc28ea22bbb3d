use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as Client;
use std::thread;
use std::time::Duration;

use mio::{Events, Poll, Waker};
use tempfile::TempDir;

use super::*;
use crate::control::report::StatusReport;

const FIRST: Token = Token(100);
const LIMIT: Duration = Duration::from_secs(20);

/// A server in a thread of its own, as the event loop would run it.
struct Running {
    directory: TempDir,
    waker: Waker,
    thread: Option<thread::JoinHandle<()>>,
}

impl Running {
    fn start(answer: impl FnMut(&StatusRequest) -> StatusResponse + Send + 'static) -> Running {
        let directory = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let waker = Waker::new(poll.registry(), Token(0)).unwrap();
        let server = StatusServer::bind(&directory.path().join("sub/status.sock"), poll.registry(), FIRST).unwrap();
        let thread = Some(thread::spawn(move || serve(poll, server, answer)));
        Running { directory, waker, thread }
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

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(mut poll: Poll, mut server: StatusServer, mut answer: impl FnMut(&StatusRequest) -> StatusResponse) {
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

fn large() -> StatusResponse {
    let problems = vec!["a long way down".repeat(1_000); 200];
    StatusResponse::Report(Box::new(StatusReport { problems, ..Default::default() }))
}

fn ask(client: &Client) -> StatusResponse {
    (&mut &*client).write_all(&StatusRequest::Status.to_line()).unwrap();
    read(client)
}

fn read(client: &Client) -> StatusResponse {
    let mut line = Vec::new();
    BufReader::new(client).read_until(b'\n', &mut line).unwrap();
    StatusResponse::from_line(&line).unwrap()
}

fn is_closed(client: &Client) -> bool {
    matches!((&mut &*client).read(&mut [0; 64]), Ok(0) | Err(_))
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_server() {
    let mut running = Running::start(|_| large());
    let mode = fs::symlink_metadata(running.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    running.stop();
    assert!(!running.path().exists());
}

#[test]
fn a_client_asks_as_often_as_it_likes_and_gets_whole_answers() {
    let mut asked = 0;
    let running = Running::start(move |request| {
        assert_eq!(*request, StatusRequest::Status);
        asked += 1;
        if asked % 2 == 0 { large() } else { StatusResponse::Error(format!("{asked}")) }
    });
    let client = running.client();
    for round in 0..5 {
        assert_eq!(ask(&client), StatusResponse::Error(format!("{}", 2 * round + 1)));
        assert_eq!(ask(&client), large());
    }
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let running = Running::start(|_| StatusResponse::Error("answered".into()));
    let client = running.client();
    for byte in StatusRequest::Status.to_line() {
        (&client).write_all(&[byte]).unwrap();
    }
    assert_eq!(read(&client), StatusResponse::Error("answered".into()));
}

#[test]
fn nonsense_is_answered_and_ends_the_connection() {
    let running = Running::start(|_| large());
    let two = [StatusRequest::Status.to_line(), StatusRequest::Status.to_line()].concat();
    let endless = vec![b'x'; REQUEST];
    for (sent, reason) in [(&b"GET /\n"[..], "expected a line"), (&two, "one request"), (&endless, "at most 4096")] {
        let client = running.client();
        (&client).write_all(sent).unwrap();
        let StatusResponse::Error(answer) = read(&client) else { panic!("{sent:?} was accepted") };
        assert!(answer.contains(reason), "{answer}");
        assert!(is_closed(&client));
    }
    assert_eq!(ask(&running.client()), large());
}

#[test]
fn clients_that_hold_the_socket_open_keep_nobody_out() {
    let running = Running::start(|_| large());
    // Some say nothing, some stop in the middle, some do not read what they are told.
    let silent: Vec<Client> = (0..40)
        .map(|n| {
            let client = running.client();
            match n % 3 {
                0 => {}
                1 => (&client).write_all(b"{\"version\"").unwrap(),
                _ => (&client).write_all(&StatusRequest::Status.to_line()).unwrap(),
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
    assert!(refused.contains("no socket") && refused.contains("status_socket"), "{refused}");
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
        let response = StatusResponse::Note("tracing".into());
        server.on_event(event.token(), |_| StatusReply {
            response: response.clone(),
            subscription: Some(TraceSubscription::default()),
        });
    }
}

#[test]
fn a_client_that_traces_and_does_not_read_costs_little_and_hears_what_it_has_missed() {
    let directory = tempfile::tempdir().unwrap();
    let mut poll = Poll::new().unwrap();
    let mut server = StatusServer::bind(&directory.path().join("status.sock"), poll.registry(), FIRST).unwrap();
    let client = Client::connect(server.path()).unwrap();
    (&client).write_all(&StatusRequest::Trace { listener: None, source: None }.to_line()).unwrap();
    while server.subscriptions().count() == 0 {
        drive(&mut poll, &mut server);
    }
    let line = StatusResponse::Note("x".repeat(1_000));
    let mut kept = 0;
    for _ in 0..4_000 {
        server.publish(&line, |_| true);
        kept = kept.max(server.connections.iter().map(|(_, connection)| connection.output.len()).sum());
    }
    assert!(kept <= UNREAD + 2_000, "{kept} bytes are kept");
    let left_out = server.connections.iter().map(|(_, connection)| connection.left_out).sum::<u64>();
    assert!(left_out > 0);

    client.set_nonblocking(true).unwrap();
    let mut text = Vec::new();
    let lines = |text: &[u8]| text.iter().filter(|&&byte| byte == b'\n').count() as u64;
    // The first answer, and what was not left out.
    while lines(&text) < 1 + 4_000 - left_out {
        let _ = (&client).read_to_end(&mut text);
        drive(&mut poll, &mut server);
    }
    server.publish(&line, |_| true);
    while lines(&text) < 1 + 4_000 - left_out + 2 {
        let _ = (&client).read_to_end(&mut text);
    }
    let told = format!("{left_out} lines are left out");
    assert!(String::from_utf8(text).unwrap().contains(&told), "{told}");

    // It ends the trace by going, or by saying anything.
    (&client).write_all(b"enough\n").unwrap();
    while server.subscriptions().count() > 0 {
        drive(&mut poll, &mut server);
    }
    assert!(server.connections.is_empty());
}
