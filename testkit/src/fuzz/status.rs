//! The status socket: parsing of requests and responses, and a client that sends arbitrary bytes in several writes.

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use mio::{Poll, Token};
use udp_fanout::testing::control::protocol::{ResponseHead, StatusReply, StatusRequest, TraceLine};
use udp_fanout::testing::control::report::StatusReport;
use udp_fanout::testing::control::server::{StatusServer, TOKENS};
use udp_fanout::testing::control::trace::TraceSubscription;
use udp_fanout::testing::control::{rates, tables};

/// Separates the client's writes: a byte that does not occur in UTF-8.
const CUT: u8 = 0xff;

/// Parses the input as requests, responses and lines, and sends it from a client.
pub fn run(bytes: &[u8]) {
    request(bytes);
    let _ = ResponseHead::parse(bytes).map_err(|error| assert!(!error.to_string().is_empty()));
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        report(line);
        trace_line(line);
    }
    FIXTURE.with_borrow_mut(|fixture| fixture.get_or_insert_with(Fixture::new).run_client(bytes));
}

fn request(bytes: &[u8]) {
    match StatusRequest::parse(bytes) {
        Ok(None) => {}
        Ok(Some(parsed)) => {
            assert!(parsed.length <= bytes.len());
            let again = StatusRequest::parse(&parsed.request.to_bytes()).unwrap().unwrap();
            assert_eq!(again.request, parsed.request);
        }
        Err(error) => {
            assert!(!error.reason.is_empty() && !error.reason.contains('\n'));
            assert!(StatusReply::Error(error).to_bytes(true).ends_with(b"\n"));
        }
    }
}

fn report(line: &[u8]) {
    let Ok(mut report) = serde_json::from_slice::<StatusReport>(line) else { return };
    let before = report.clone();
    rates::add(&mut report, &before);
    assert!(tables::render(&report, false).ends_with('\n'));
    assert!(tables::render(&report, true).len() >= tables::render(&report, false).len());
}

/// Records are not compared: floating-point numbers may lose their last digit.
fn trace_line(line: &[u8]) {
    let Ok(read) = TraceLine::from_line(line) else { return };
    let line = read.to_line();
    assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
    match (read, TraceLine::from_line(&line).unwrap()) {
        (TraceLine::Record(record), TraceLine::Record(_)) => assert!(!record.to_string().is_empty()),
        (read, again) => assert_eq!(read, again),
    }
}

thread_local! {
    static FIXTURE: RefCell<Option<Fixture>> = const { RefCell::new(None) };
}

struct Fixture {
    server: StatusServer,
    _poll: Poll,
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let server = StatusServer::bind(&directory.path().join("socket"), poll.registry(), Token(0)).unwrap();
        Fixture { server, _poll: poll, directory }
    }

    /// Asserts that a client gets at most one response at a time, and that a trace ends when the client sends more.
    fn run_client(&mut self, bytes: &[u8]) {
        let mut client = UnixStream::connect(self.directory.path().join("socket")).unwrap();
        client.set_nonblocking(true).unwrap();
        let (mut tracing, mut open) = (false, true);
        for piece in bytes.split(|&byte| byte == CUT) {
            // The server has closed the connection, or has stopped reading.
            if !open || client.write_all(piece).is_err() {
                break;
            }
            let received = self.turn(&mut client, &mut open);
            assert!(
                !received.windows(10).any(|start| start == b"\nHTTP/1.1 "),
                "{}",
                String::from_utf8_lossy(&received)
            );
            assert!(received.is_empty() || received.starts_with(b"HTTP/1.1 ") || received.starts_with(b"{"));
            if tracing {
                assert!(piece.is_empty() || !open, "the trace continues after the client has sent something");
                if open {
                    self.server.publish(&TraceLine::Note { note: "datagram".to_owned() }, |_| true);
                    let line = self.turn(&mut client, &mut open);
                    assert!(matches!(TraceLine::from_line(&line), Ok(TraceLine::Note { .. })));
                }
            }
            tracing |= self.server.subscriptions().count() > 0;
        }
        drop(client);
        self.serve();
        assert_eq!(self.server.subscriptions().count(), 0, "a disconnected client still has a trace");
    }

    /// Lets the server handle its pending events, and reads what it sends.
    fn turn(&mut self, client: &mut UnixStream, open: &mut bool) -> Vec<u8> {
        self.serve();
        let mut received = Vec::new();
        match client.read_to_end(&mut received) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => *open = false,
        }
        received
    }

    fn serve(&mut self) {
        for token in 0..TOKENS {
            self.server.on_event(Token(token), |request| match request {
                StatusRequest::Status => StatusReply::Report(Box::<StatusReport>::default()),
                StatusRequest::Alive => StatusReply::Alive,
                StatusRequest::Trace(_) => StatusReply::Trace(TraceSubscription::default(), "tracing".to_owned()),
            });
        }
    }
}
