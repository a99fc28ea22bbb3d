//! Talking to the kernel over `NETLINK_ROUTE`: requests, answers, and the framing of both.
//!
//! [`links`](super::links), [`addresses`](super::addresses) and [`routes`](super::routes) ask through a [`Connection`];
//! [`monitor`](super::monitor) shares the framing. Requests are written by `netlink-packet-route`. Answers are taken
//! apart here, attribute by attribute, and only the attributes that this program needs are looked at: a link whose
//! driver adds something nobody has seen before must not make the whole host unreadable.

use std::io;
use std::num::NonZeroI32;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use netlink_packet_core::{
    NLA_HEADER_SIZE, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_ALIGNTO, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer, NetlinkHeader, NetlinkMessage, NlasIterator, parse_i32,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Bytes of a receive buffer. The kernel fills at most 32 KiB of it at a time when it lists things, and grows a
/// message beyond that only where one single link or route needs more.
pub(super) const BUFFER_SIZE: usize = 64 * 1024;

/// How often a listing is started anew because the host changed while the kernel was writing it. Being interrupted
/// so often in a row takes a host that does nothing but change.
const ATTEMPTS: u32 = 20;

/// Requests sent before their answers are read. The kernel answers all of them before `send` returns, so their answers
/// must fit into the socket's receive buffer: about 1 KiB each as the kernel counts, of 208 KiB by default.
const BATCH: usize = 64;

/// How long to wait for an answer. The kernel answers at once; this only keeps the event loop from hanging for ever
/// should it not.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A socket for requests to the kernel.
pub(super) struct Connection {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
}

/// Why an exchange did not complete.
enum Setback {
    /// Part of the answer is missing; asking again can help.
    Incomplete(&'static str),
    /// The kernel's own refusal.
    Refused(io::Error),
    /// Something that asking again will not cure.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Setback {
    fn from(error: anyhow::Error) -> Self {
        Setback::Failed(error)
    }
}

impl Connection {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel refuses the socket.
    pub(super) fn open() -> Result<Self> {
        let socket = open_socket()?;
        // All three need a kernel newer than 4.20 at most; without them the kernel lists more than asked for (which
        // the readers skip) and repeats requests inside errors.
        let _ = socket.set_netlink_get_strict_chk(true);
        let _ = socket.set_cap_ack(true);
        socket2::SockRef::from(&socket)
            .set_read_timeout(Some(PATIENCE))
            .context("cannot set the receive timeout of a netlink socket")?;
        Ok(Self { socket, buffer: vec![0; BUFFER_SIZE], sequence: 0 })
    }

    /// Lists all objects of one sort: sends `request` and hands every answer's type-specific part to `read`, which
    /// may skip it. A listing during which the host changed is thrown away and started again.
    ///
    /// # Errors
    /// Names `what`. A refusal by the kernel can be found as an [`io::Error`] in the error's chain.
    pub(super) fn dump<T>(
        &mut self,
        what: &str,
        request: &RouteNetlinkMessage,
        read: impl Fn(&[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>> {
        let mut why = "";
        for _ in 0..ATTEMPTS {
            match self.try_dump(request, &read) {
                Ok(items) => return Ok(items),
                Err(Setback::Incomplete(reason)) => why = reason,
                Err(Setback::Refused(error)) => {
                    return Err(error).with_context(|| format!("the kernel refuses to list the host's {what}"));
                }
                Err(Setback::Failed(error)) => {
                    self.discard();
                    return Err(error.context(format!("cannot list the host's {what}")));
                }
            }
            self.discard();
        }
        bail!("cannot list the host's {what}: {why}, {ATTEMPTS} times in a row");
    }

    /// Asks each of `requests`, each of which has one answer, and hands `answer` the request's position and the
    /// type-specific part of the answer or the kernel's refusal. An answer can come twice; the later one counts.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or whatever `answer` returns.
    pub(super) fn ask(
        &mut self,
        requests: &[RouteNetlinkMessage],
        mut answer: impl FnMut(usize, io::Result<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        // Batches still to be sent, as start and end; taken from the back.
        let mut todo: Vec<(usize, usize)> =
            (0..requests.len()).step_by(BATCH).map(|start| (start, requests.len().min(start + BATCH))).rev().collect();
        while let Some((start, end)) = todo.pop() {
            match self.try_batch(&requests[start..end], |index, reply| answer(start + index, reply)) {
                Ok(()) => {}
                // Where the answers to a batch do not fit the receive buffer, those to half of it may.
                Err(Setback::Incomplete(_)) if end - start > 1 => {
                    let middle = start.midpoint(end);
                    todo.extend([(middle, end), (start, middle)]);
                    self.discard();
                }
                Err(Setback::Incomplete(why)) => {
                    self.discard();
                    bail!("netlink answers incompletely: {why}");
                }
                Err(Setback::Refused(error)) => return Err(error.into()),
                Err(Setback::Failed(error)) => {
                    self.discard();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Tells the kernel to do each of `requests`, creating what is not there. What it refuses is not done.
    ///
    /// # Errors
    /// When the kernel cannot be told.
    pub(super) fn tell(&mut self, requests: &[RouteNetlinkMessage]) -> Result<()> {
        for batch in requests.chunks(BATCH) {
            // Without NLM_F_ACK the kernel answers refusals only, and has answered when `send` returns.
            match self.send(batch, NLM_F_REQUEST | NLM_F_CREATE) {
                Ok(_) => self.discard(),
                Err(Setback::Incomplete(why)) => bail!("netlink answers incompletely: {why}"),
                Err(Setback::Refused(error)) => return Err(error.into()),
                Err(Setback::Failed(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn try_dump<T>(
        &mut self,
        request: &RouteNetlinkMessage,
        read: &impl Fn(&[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>, Setback> {
        let sequence = self.send(std::slice::from_ref(request), NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut items = Vec::new();
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            for frame in frames(&self.buffer[..length]) {
                let frame = frame?;
                if frame.sequence != sequence {
                    continue;
                }
                interrupted |= frame.flags & NLM_F_DUMP_INTR != 0;
                match frame.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match frame.error()? {
                            Some(error) => Err(Setback::Refused(error)),
                            None if interrupted => Err(Setback::Incomplete("it changed while being listed")),
                            None => Ok(items),
                        };
                    }
                    _ => items.extend(read(frame.payload)?),
                }
            }
        }
    }

    fn try_batch(
        &mut self,
        requests: &[RouteNetlinkMessage],
        mut answer: impl FnMut(usize, io::Result<&[u8]>) -> Result<()>,
    ) -> Result<(), Setback> {
        let first = self.send(requests, NLM_F_REQUEST)?;
        let mut outstanding = requests.len();
        while outstanding > 0 {
            let length = self.receive()?;
            for frame in frames(&self.buffer[..length]) {
                let frame = frame?;
                // What belongs to no request of this batch is a late answer to an earlier, abandoned one.
                let index = frame.sequence.wrapping_sub(first) as usize;
                if index >= requests.len() {
                    continue;
                }
                outstanding = outstanding.saturating_sub(1);
                match frame.kind {
                    NLMSG_ERROR => match frame.error()? {
                        Some(error) => answer(index, Err(error))?,
                        None => return Err(anyhow!("the kernel acknowledged a question without answering it").into()),
                    },
                    _ => answer(index, Ok(frame.payload))?,
                }
            }
        }
        Ok(())
    }

    /// Sends the requests as one datagram, numbered upwards from the number returned.
    fn send(&mut self, requests: &[RouteNetlinkMessage], flags: u16) -> Result<u32, Setback> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(requests.len() * 64);
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message = NetlinkMessage::new(NetlinkHeader::default(), request.clone().into());
            message.header.flags = flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = bytes.len();
            // The next message starts at a multiple of NLMSG_ALIGNTO.
            bytes.resize(start + message.buffer_len().next_multiple_of(usize::from(NLMSG_ALIGNTO)), 0);
            message.serialize(&mut bytes[start..]);
        }
        match self.socket.send(&bytes, 0) {
            Ok(_) => Ok(first),
            Err(error) => Err(anyhow::Error::new(error).context("cannot send to netlink").into()),
        }
    }

    /// Waits for a datagram and returns its length.
    fn receive(&mut self) -> Result<usize, Setback> {
        loop {
            // With MSG_TRUNC the kernel tells the datagram's length even where the buffer is shorter.
            match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    self.buffer.resize(length.next_power_of_two(), 0);
                    return Err(Setback::Incomplete("an answer was longer than the buffer for it"));
                }
                Ok(length) => return Ok(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Err(Setback::Incomplete("answers overran the socket's receive buffer"));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(anyhow!("the kernel has not answered within {PATIENCE:?}").into());
                }
                Err(error) => return Err(anyhow::Error::new(error).context("cannot receive from netlink").into()),
            }
        }
    }

    /// Reads and forgets everything that is still coming, so that the next request is not taken for a second
    /// listing while an abandoned one still runs.
    fn discard(&mut self) {
        loop {
            match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

/// Opens a socket that hears nobody but the kernel.
///
/// # Errors
/// When the kernel refuses it.
pub(super) fn open_socket() -> Result<Socket> {
    let context = "cannot open a netlink socket (AF_NETLINK must be allowed by seccomp and systemd)";
    let mut socket = Socket::new(NETLINK_ROUTE).context(context)?;
    socket.bind_auto().context(context)?;
    socket.connect(&SocketAddr::new(0, 0)).context(context)?;
    Ok(socket)
}

/// One message of a datagram.
pub(super) struct Frame<'a> {
    /// The message's type, such as `RTM_NEWLINK`.
    pub(super) kind: u16,
    flags: u16,
    sequence: u32,
    /// The type-specific header and the attributes.
    pub(super) payload: &'a [u8],
}

impl Frame<'_> {
    /// The error that a message of type `NLMSG_ERROR` or `NLMSG_DONE` carries.
    pub(super) fn error(&self) -> Result<Option<io::Error>> {
        if self.kind == NLMSG_DONE && self.payload.is_empty() {
            return Ok(None);
        }
        let code = self.payload.get(..4).context("a netlink error message without a code")?;
        Ok(NonZeroI32::new(parse_i32(code)?).map(|code| io::Error::from_raw_os_error(code.get().saturating_abs())))
    }
}

/// The messages of a datagram. Ends after the first malformed one.
pub(super) fn frames(mut bytes: &[u8]) -> impl Iterator<Item = Result<Frame<'_>>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let frame = match NetlinkBuffer::new_checked(bytes) {
            Ok(frame) => frame,
            Err(error) => {
                bytes = &[];
                return Some(Err(error.into()));
            }
        };
        let length = frame.length() as usize;
        let header = length - frame.payload_length();
        let message = Frame {
            kind: frame.message_type(),
            flags: frame.flags(),
            sequence: frame.sequence_number(),
            payload: &bytes[header..length],
        };
        bytes = bytes.get(length.next_multiple_of(usize::from(NLMSG_ALIGNTO))..).unwrap_or_default();
        Some(Ok(message))
    })
}

/// The attributes in `bytes` as type and value. Ends after the first malformed one.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8])>> {
    NlasIterator::new(bytes).map(|attribute| {
        let attribute = attribute?;
        let length = usize::from(attribute.length());
        Ok((attribute.kind(), &attribute.into_inner()[NLA_HEADER_SIZE..length]))
    })
}

/// What follows the first `length` bytes of a message, its type-specific header.
pub(super) fn after_header(payload: &[u8], length: usize) -> Result<&[u8]> {
    ensure!(payload.len() >= length, "a netlink message of {} bytes, shorter than its header", payload.len());
    Ok(&payload[length..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::routes;
    use netlink_packet_route::link::LinkMessage;
    use proptest::prelude::*;
    use std::mem::MaybeUninit;
    use std::os::fd::{FromRawFd, IntoRawFd};

    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0, 0]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_datagram_of_several_messages_is_taken_apart() {
        let mut bytes = message(16, 7, b"abcde");
        bytes.extend(message(24, 8, b""));
        bytes.extend(message(NLMSG_DONE, 8, &0i32.to_ne_bytes()));
        let seen: Vec<_> =
            frames(&bytes).map(|f| f.unwrap()).map(|f| (f.kind, f.sequence, f.payload.to_vec())).collect();
        assert_eq!(seen, [(16, 7, b"abcde".to_vec()), (24, 8, vec![]), (3, 8, vec![0; 4])]);
    }

    #[test]
    fn a_message_cut_short_is_an_error_and_the_last_one() {
        let mut bytes = message(16, 7, b"abcd");
        bytes.extend(&message(16, 7, b"abcd")[..18]);
        let seen: Vec<_> = frames(&bytes).map(|f| f.is_ok()).collect();
        assert_eq!(seen, [true, false]);
    }

    #[test]
    fn error_codes_are_read_from_errors_and_ends() {
        let code = |kind, payload: &[u8]| {
            let bytes = message(kind, 1, payload);
            frames(&bytes).next().unwrap().unwrap().error()
        };
        let refused = code(NLMSG_ERROR, &(-libc::ENETUNREACH).to_ne_bytes()).unwrap().unwrap();
        assert_eq!(refused.raw_os_error(), Some(libc::ENETUNREACH));
        assert!(code(NLMSG_ERROR, &0i32.to_ne_bytes()).unwrap().is_none());
        assert!(code(NLMSG_DONE, &[]).unwrap().is_none());
        assert_eq!(
            code(NLMSG_DONE, &(-libc::ENOENT).to_ne_bytes()).unwrap().unwrap().raw_os_error(),
            Some(libc::ENOENT)
        );
        assert!(code(NLMSG_ERROR, &[1, 2]).is_err());
        assert!(code(NLMSG_ERROR, &i32::MIN.to_ne_bytes()).unwrap().is_some());
    }

    /// A connection to a kernel that is made up: to each request it answers with the datagrams that `answers` returns
    /// for how many requests came before, for the number that `send` gave the first message, and for its flags.
    fn connected_to(answers: impl Fn(usize, u32, u16) -> Vec<Vec<u8>> + Send + 'static) -> Connection {
        let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [MaybeUninit::uninit(); 8192];
            for count in 0.. {
                let length = theirs.recv(&mut buffer).unwrap();
                // SAFETY: so many bytes have just been received into the buffer.
                let request: Vec<u8> = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
                let Some(first) = frames(&request).next() else { return };
                let first = first.unwrap();
                for answer in answers(count, first.sequence, first.flags) {
                    theirs.send(&answer).unwrap();
                }
            }
        });
        // SAFETY: `into_raw_fd` has just given up the descriptor, which is open and a socket.
        let socket = unsafe { Socket::from_raw_fd(ours.into_raw_fd()) };
        Connection { socket, buffer: vec![0; BUFFER_SIZE], sequence: u32::MAX - 1 }
    }

    fn dump(connection: &mut Connection) -> Result<Vec<u8>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        connection.dump("things", &request, |payload| Ok(payload.first().copied()))
    }

    fn interrupted(mut message: Vec<u8>) -> Vec<u8> {
        message[6..8].copy_from_slice(&NLM_F_DUMP_INTR.to_ne_bytes());
        message
    }

    fn done(sequence: u32) -> Vec<u8> {
        message(NLMSG_DONE, sequence, &0i32.to_ne_bytes())
    }

    #[test]
    fn a_listing_during_which_the_host_changed_is_taken_again() {
        let mut connection = connected_to(|count, sequence, flags| {
            assert_eq!(flags, NLM_F_REQUEST | NLM_F_DUMP);
            let second = message(16, sequence, b"b");
            let second = if count == 0 { interrupted(second) } else { second };
            vec![message(16, sequence, b"a"), second, done(sequence)]
        });
        assert_eq!(dump(&mut connection).unwrap(), b"ab");
        assert_eq!(dump(&mut connection).unwrap(), b"ab");
    }

    #[test]
    fn a_host_that_does_nothing_but_change_is_given_up_on() {
        let mut connection = connected_to(|_, sequence, _| vec![interrupted(done(sequence))]);
        let error = dump(&mut connection).unwrap_err().to_string();
        assert_eq!(error, "cannot list the host's things: it changed while being listed, 20 times in a row");
    }

    #[test]
    fn a_refusal_to_list_can_be_told_apart() {
        let mut connection =
            connected_to(|_, sequence, _| vec![message(NLMSG_DONE, sequence, &(-libc::ENOENT).to_ne_bytes())]);
        let error = dump(&mut connection).unwrap_err();
        assert_eq!(error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error), Some(libc::ENOENT));
        assert!(error.to_string().contains("the host's things"), "{error}");
    }

    #[test]
    fn an_answer_longer_than_the_buffer_makes_the_buffer_grow() {
        let mut connection = connected_to(|_, sequence, _| vec![message(16, sequence, &[7; 5000]), done(sequence)]);
        connection.buffer.truncate(64);
        assert_eq!(dump(&mut connection).unwrap(), [7]);
        assert!(connection.buffer.len() >= 5016);
    }

    #[test]
    fn answers_to_abandoned_requests_are_not_taken_for_todays() {
        let mut connection = connected_to(|_, sequence, _| {
            let stale = sequence.wrapping_sub(1);
            vec![message(16, stale, b"x"), done(stale), message(16, sequence, b"a"), done(sequence)]
        });
        assert_eq!(dump(&mut connection).unwrap(), b"a");
    }

    #[test]
    fn nonsense_from_the_kernel_is_an_error() {
        let mut connection = connected_to(|_, _, _| vec![vec![1, 2, 3]]);
        assert!(format!("{:#}", dump(&mut connection).unwrap_err()).contains("cannot list the host's things"));
    }

    #[test]
    fn answers_in_any_order_find_their_requests() {
        let requests = vec![RouteNetlinkMessage::GetLink(LinkMessage::default()); 3];
        let mut connection = connected_to(|_, first, _| {
            let refused = (-libc::ENETUNREACH).to_ne_bytes();
            vec![
                message(16, first.wrapping_add(2), b"c"),
                message(16, first.wrapping_add(9), b"x"),
                message(16, first, b"a"),
                message(NLMSG_ERROR, first.wrapping_add(1), &refused),
            ]
        });
        let mut seen = vec![None; 3];
        let record = |index: usize, reply: io::Result<&[u8]>| {
            seen[index] = Some(reply.map(<[u8]>::to_vec).map_err(|error| error.raw_os_error()));
            Ok(())
        };
        connection.ask(&requests, record).unwrap();
        let expected = [Ok(b"a".to_vec()), Err(Some(libc::ENETUNREACH)), Ok(b"c".to_vec())];
        assert_eq!(seen, expected.map(Some));
    }

    /// With the real kernel, which asks for no privilege to answer: so small a buffer takes only one or two answers.
    #[test]
    fn answers_that_overrun_the_socket_are_asked_for_again() {
        let requests: Vec<_> = (0..200).map(|n| routes::request_for([127, 0, 0, n].into())).collect();
        let mut connection = Connection::open().unwrap();
        socket2::SockRef::from(&connection.socket).set_recv_buffer_size(1).unwrap();
        let mut answers = vec![0; requests.len()];
        let record = |index: usize, _: io::Result<&[u8]>| {
            answers[index] += 1;
            Ok(())
        };
        connection.ask(&requests, record).unwrap();
        assert!(answers.iter().all(|&count| count > 0), "{answers:?}");
        assert!(connection.sequence > 200, "the socket was never overrun: {} requests", connection.sequence);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_framing_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for frame in frames(&bytes).map_while(Result::ok) {
                let _ = frame.error();
                let _ = attributes(frame.payload).count();
            }
            let _ = attributes(&bytes).count();
        }
    }
}
