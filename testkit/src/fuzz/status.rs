//! The status socket: requests and responses as either side reads them, and a client that sends anything, in pieces.

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use mio::{Poll, Token};
use udp_fanout::testing::control::protocol::{ResponseHead, StatusReply, StatusRequest, TraceLine};
use udp_fanout::testing::control::report::StatusReport;
use udp_fanout::testing::control::server::{StatusServer, TOKENS};
use udp_fanout::testing::control::trace::TraceSubscription;
use udp_fanout::testing::control::{rates, tables};

/// Separates what the client writes at a time: a byte that does not occur in text.
const CUT: u8 = 0xff;

/// Reads the input as requests, responses and lines, and has a client send it.
pub fn run(bytes: &[u8]) {
    request(bytes);
    let _ = ResponseHead::parse(bytes).map_err(|error| assert!(!error.to_string().is_empty()));
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        report(line);
        trace_line(line);
    }
    WORLD.with_borrow_mut(|world| world.get_or_insert_with(World::new).converse(bytes));
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

/// Numbers may lose their last digit on the way, so records are not compared.
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
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

struct World {
    server: StatusServer,
    _poll: Poll,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let server = StatusServer::bind(&directory.path().join("socket"), poll.registry(), Token(0)).unwrap();
        World { server, _poll: poll, directory }
    }

    /// Whatever the client sends, it gets at most one response at a time, and a trace ends when it sends more.
    fn converse(&mut self, bytes: &[u8]) {
        let mut client = UnixStream::connect(self.directory.path().join("socket")).unwrap();
        client.set_nonblocking(true).unwrap();
        let (mut tracing, mut open) = (false, true);
        for piece in bytes.split(|&byte| byte == CUT) {
            // The server has closed the connection, or does not read any more.
            if !open || client.write_all(piece).is_err() {
                break;
            }
            let said = self.turn(&mut client, &mut open);
            assert!(!said.windows(10).any(|start| start == b"\nHTTP/1.1 "), "{}", String::from_utf8_lossy(&said));
            assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 ") || said.starts_with(b"{"));
            if tracing {
                assert!(piece.is_empty() || !open, "a trace goes on though the client has sent something");
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
        assert_eq!(self.server.subscriptions().count(), 0, "a client that has gone still has a trace");
    }

    /// Lets the server do what there is to do, and reads what it sends.
    fn turn(&mut self, client: &mut UnixStream, open: &mut bool) -> Vec<u8> {
        self.serve();
        let mut said = Vec::new();
        match client.read_to_end(&mut said) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => *open = false,
        }
        said
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
