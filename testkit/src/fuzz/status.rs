//! The status socket: its lines as either side reads them, and a client that says anything, in pieces.

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use mio::{Poll, Token};
use udp_fanout::control::protocol::{StatusRequest, StatusResponse};
use udp_fanout::control::report::StatusReport;
use udp_fanout::control::server::{StatusReply, StatusServer, TOKENS};
use udp_fanout::control::trace::TraceSubscription;
use udp_fanout::control::{rates, tables};

/// Where the input is cut into what a client writes at a time: a byte that no text has.
const CUT: u8 = 0xff;

/// Reads the input as lines, and lets a client say it.
pub fn run(bytes: &[u8]) {
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        request(line);
        response(line);
    }
    WORLD.with_borrow_mut(|world| world.get_or_insert_with(World::new).converse(bytes));
}

fn request(line: &[u8]) {
    match StatusRequest::from_line(line) {
        Ok(request) => assert_eq!(StatusRequest::from_line(&request.to_line()), Ok(request)),
        Err(reason) => assert!(!reason.is_empty() && !reason.contains('\n')),
    }
}

/// Numbers may lose their last digit on the way, so answers are not compared.
fn response(line: &[u8]) {
    let Ok(response) = StatusResponse::from_line(line) else { return };
    let line = response.to_line();
    assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
    let again = StatusResponse::from_line(&line);
    match (response, again) {
        (StatusResponse::Report(mut report), Ok(StatusResponse::Report(again))) => {
            rates::add(&mut report, &again);
            assert!(tables::render(&report, false).ends_with('\n'));
            assert!(tables::render(&report, true).len() >= tables::render(&report, false).len());
        }
        (StatusResponse::Traced(traced), Ok(StatusResponse::Traced(_))) => assert!(!traced.to_string().is_empty()),
        (one @ (StatusResponse::Note(_) | StatusResponse::Error(_)), again) => assert_eq!(again.ok(), Some(one)),
        (one, again) => panic!("{one:?} became {again:?}"),
    }
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

struct World {
    server: StatusServer,
    _poll: Poll,
    _directory: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        let poll = Poll::new().unwrap();
        let server = StatusServer::bind(&directory.path().join("socket"), poll.registry(), Token(0)).unwrap();
        World { server, _poll: poll, _directory: directory }
    }

    /// What the client is told must be answers, at most one for each request, until it has asked for a trace.
    fn converse(&mut self, bytes: &[u8]) {
        let mut client = UnixStream::connect(self.server.path()).unwrap();
        client.set_nonblocking(true).unwrap();
        let (mut watching, mut open) = (false, true);
        for piece in bytes.split(|&byte| byte == CUT) {
            // The server has closed the connection, or is not reading any more.
            if !open || client.write_all(piece).is_err() {
                break;
            }
            let answers = self.turn(&mut client, &mut open);
            let lines = piece.iter().filter(|&&byte| byte == b'\n').count();
            assert!(answers.len() <= lines.max(1), "{answers:?}");
            assert!(
                answers.iter().all(|answer| matches!(answer, StatusResponse::Error(_))) || lines == 1,
                "{answers:?}"
            );
            if watching {
                assert!(piece.is_empty() || !open, "a trace goes on though the client has spoken");
                if open {
                    self.server.publish(&StatusResponse::Note("datagram".to_owned()), |_| true);
                    assert_eq!(self.turn(&mut client, &mut open).len(), 1);
                }
            }
            watching |= answers.iter().any(|answer| matches!(answer, StatusResponse::Note(_)));
        }
        drop(client);
        self.serve();
        assert_eq!(self.server.subscriptions().count(), 0, "a client that has gone is still told");
    }

    /// Lets the server do what there is to do, and reads what it says.
    fn turn(&mut self, client: &mut UnixStream, open: &mut bool) -> Vec<StatusResponse> {
        self.serve();
        let mut said = Vec::new();
        match client.read_to_end(&mut said) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => *open = false,
        }
        assert!(said.is_empty() || said.ends_with(b"\n"));
        said.split_inclusive(|&byte| byte == b'\n').map(|line| StatusResponse::from_line(line).unwrap()).collect()
    }

    fn serve(&mut self) {
        for token in 0..TOKENS {
            self.server.on_event(Token(token), |request| match request {
                StatusRequest::Status => StatusResponse::Report(Box::<StatusReport>::default()).into(),
                StatusRequest::Trace { .. } => StatusReply {
                    response: StatusResponse::Note("tracing".to_owned()),
                    subscription: Some(TraceSubscription::default()),
                },
            });
        }
    }
}
