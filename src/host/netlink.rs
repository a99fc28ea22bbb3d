//! `NETLINK_ROUTE`: sends requests, receives replies, and splits both into messages and attributes.
//!
//! [`links`](super::links), [`addresses`](super::addresses), [`routes`](super::routes) and [`neighbours`](super::neighbours)
//! use a [`NetlinkSocket`]; [`monitor`](super::monitor) shares [`raw_messages`]. `netlink-packet-route` writes the requests.
//! Replies are read attribute by attribute, and only the attributes that this program needs: an attribute that a driver adds
//! must not make the whole host unreadable.

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

/// Bytes of a receive buffer. The kernel fills at most 32 KiB at a time in a dump, and more only for a single link or route
/// that needs it.
pub(super) const BUFFER_SIZE: usize = 64 * 1024;

/// How many times a dump is started because the host changed while the kernel was writing it. Only a host that changes
/// constantly interrupts so many in a row.
const ATTEMPTS: u32 = 20;

/// Requests sent before their replies are read. The kernel replies to all of them before `send` returns, so the replies must
/// fit into the socket's receive buffer: about 1 KiB each as the kernel counts, of 208 KiB by default.
const BATCH: usize = 64;

/// How long to wait for a reply. The kernel replies at once; the limit only keeps the event loop from hanging if it does not.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// A `NETLINK_ROUTE` socket for requests.
pub(super) struct NetlinkSocket {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
}

/// Why a dump or a batch of requests did not complete.
enum DumpError {
    /// Part of the reply is missing; another attempt can help.
    Incomplete(&'static str),
    /// The kernel refused the request.
    Refused(io::Error),
    /// Another attempt cannot help.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for DumpError {
    fn from(error: anyhow::Error) -> Self {
        DumpError::Failed(error)
    }
}

impl NetlinkSocket {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel refuses the socket.
    pub(super) fn open() -> Result<Self> {
        let socket = open_socket()?;
        // Linux 4.20 has both. Without them, the kernel lists more than requested (which the readers skip) and copies the
        // request into each error.
        let _ = socket.set_netlink_get_strict_chk(true);
        let _ = socket.set_cap_ack(true);
        socket2::SockRef::from(&socket)
            .set_read_timeout(Some(REPLY_TIMEOUT))
            .context("cannot set the receive timeout of a netlink socket")?;
        Ok(Self { socket, buffer: vec![0; BUFFER_SIZE], sequence: 0 })
    }

    /// Lists all objects of one kind: sends `request` and passes the payload of every reply to `read`, which may skip it. If
    /// the host changes during the dump, it starts again.
    ///
    /// # Errors
    /// Names `what`. The chain contains the kernel's refusal as an [`io::Error`].
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
                Err(DumpError::Incomplete(reason)) => why = reason,
                Err(DumpError::Refused(error)) => {
                    return Err(error).with_context(|| format!("the kernel refuses to list the host's {what}"));
                }
                Err(DumpError::Failed(error)) => {
                    self.discard();
                    return Err(error.context(format!("cannot list the host's {what}")));
                }
            }
            self.discard();
        }
        bail!("cannot list the host's {what}: {why}, {ATTEMPTS} times in a row");
    }

    /// Sends `requests`, each of which has one reply, and passes to `handle` the request's position and the reply's payload or
    /// the kernel's refusal. It may do so twice for one request; the later reply counts.
    ///
    /// # Errors
    /// When netlink fails, or the error that `handle` returns.
    pub(super) fn query(
        &mut self,
        requests: &[RouteNetlinkMessage],
        mut handle: impl FnMut(usize, io::Result<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        // Batches still to be sent, as start and end. The last one is next.
        let mut todo: Vec<(usize, usize)> =
            (0..requests.len()).step_by(BATCH).map(|start| (start, requests.len().min(start + BATCH))).rev().collect();
        while let Some((start, end)) = todo.pop() {
            match self.try_batch(&requests[start..end], |index, reply| handle(start + index, reply)) {
                Ok(()) => {}
                // If the replies to a batch do not fit into the receive buffer, the replies to half of it may.
                Err(DumpError::Incomplete(_)) if end - start > 1 => {
                    let middle = start.midpoint(end);
                    todo.extend([(middle, end), (start, middle)]);
                    self.discard();
                }
                Err(DumpError::Incomplete(why)) => {
                    self.discard();
                    bail!("incomplete netlink reply: {why}");
                }
                Err(DumpError::Refused(error)) => return Err(error.into()),
                Err(DumpError::Failed(error)) => {
                    self.discard();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Sends `requests`, each of which creates or updates an object. Refusals by the kernel are ignored.
    ///
    /// # Errors
    /// When netlink fails.
    pub(super) fn create(&mut self, requests: &[RouteNetlinkMessage]) -> Result<()> {
        for batch in requests.chunks(BATCH) {
            // Without NLM_F_ACK, the kernel replies only to refused requests, and does so before `send` returns.
            match self.send(batch, NLM_F_REQUEST | NLM_F_CREATE) {
                Ok(_) => self.discard(),
                Err(DumpError::Incomplete(why)) => bail!("incomplete netlink reply: {why}"),
                Err(DumpError::Refused(error)) => return Err(error.into()),
                Err(DumpError::Failed(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn try_dump<T>(
        &mut self,
        request: &RouteNetlinkMessage,
        read: &impl Fn(&[u8]) -> Result<Option<T>>,
    ) -> Result<Vec<T>, DumpError> {
        let sequence = self.send(std::slice::from_ref(request), NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut items = Vec::new();
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            for message in raw_messages(&self.buffer[..length]) {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match message.error()? {
                            Some(error) => Err(DumpError::Refused(error)),
                            None if interrupted => Err(DumpError::Incomplete("it changed while being listed")),
                            None => Ok(items),
                        };
                    }
                    _ => items.extend(read(message.payload)?),
                }
            }
        }
    }

    fn try_batch(
        &mut self,
        requests: &[RouteNetlinkMessage],
        mut handle: impl FnMut(usize, io::Result<&[u8]>) -> Result<()>,
    ) -> Result<(), DumpError> {
        let first = self.send(requests, NLM_F_REQUEST)?;
        let mut outstanding = requests.len();
        while outstanding > 0 {
            let length = self.receive()?;
            for message in raw_messages(&self.buffer[..length]) {
                let message = message?;
                // A sequence number outside this batch belongs to a late reply to an earlier, abandoned one.
                let index = message.sequence.wrapping_sub(first) as usize;
                if index >= requests.len() {
                    continue;
                }
                outstanding = outstanding.saturating_sub(1);
                match message.kind {
                    NLMSG_ERROR => match message.error()? {
                        Some(error) => handle(index, Err(error))?,
                        None => return Err(anyhow!("the kernel acknowledged a request but sent no reply").into()),
                    },
                    _ => handle(index, Ok(message.payload))?,
                }
            }
        }
        Ok(())
    }

    /// Sends the requests as one datagram and returns the first one's sequence number; the others follow it.
    fn send(&mut self, requests: &[RouteNetlinkMessage], flags: u16) -> Result<u32, DumpError> {
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
    fn receive(&mut self) -> Result<usize, DumpError> {
        loop {
            // With MSG_TRUNC, the kernel returns the datagram's length even if the buffer is shorter.
            match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    self.buffer.resize(length.next_power_of_two(), 0);
                    return Err(DumpError::Incomplete("a reply was longer than the receive buffer"));
                }
                Ok(length) => return Ok(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Err(DumpError::Incomplete("replies overran the socket's receive buffer"));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(anyhow!("no reply from the kernel within {REPLY_TIMEOUT:?}").into());
                }
                Err(error) => return Err(anyhow::Error::new(error).context("cannot receive from netlink").into()),
            }
        }
    }

    /// Reads and drops all pending replies. The kernel refuses a second dump (`EBUSY`) while an abandoned one still runs.
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

/// Opens a socket that receives only from the kernel.
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

/// One netlink message of a datagram.
pub(super) struct RawMessage<'a> {
    /// Such as `RTM_NEWLINK`.
    pub(super) kind: u16,
    flags: u16,
    sequence: u32,
    /// The type-specific header and the attributes.
    pub(super) payload: &'a [u8],
}

impl RawMessage<'_> {
    /// The error in a message of type `NLMSG_ERROR` or `NLMSG_DONE`.
    pub(super) fn error(&self) -> Result<Option<io::Error>> {
        if self.kind == NLMSG_DONE && self.payload.is_empty() {
            return Ok(None);
        }
        let code = self.payload.get(..4).context("a netlink error message without a code")?;
        Ok(NonZeroI32::new(parse_i32(code)?).map(|code| io::Error::from_raw_os_error(code.get().saturating_abs())))
    }
}

/// The messages of a datagram. Ends after the first malformed one.
pub(super) fn raw_messages(mut bytes: &[u8]) -> impl Iterator<Item = Result<RawMessage<'_>>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let buffer = match NetlinkBuffer::new_checked(bytes) {
            Ok(buffer) => buffer,
            Err(error) => {
                bytes = &[];
                return Some(Err(error.into()));
            }
        };
        let length = buffer.length() as usize;
        let header = length - buffer.payload_length();
        let message = RawMessage {
            kind: buffer.message_type(),
            flags: buffer.flags(),
            sequence: buffer.sequence_number(),
            payload: &bytes[header..length],
        };
        bytes = bytes.get(length.next_multiple_of(usize::from(NLMSG_ALIGNTO))..).unwrap_or_default();
        Some(Ok(message))
    })
}

/// The attributes in `bytes`, as type and value. Ends after the first malformed one.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8])>> {
    NlasIterator::new(bytes).map(|attribute| {
        let attribute = attribute?;
        let length = usize::from(attribute.length());
        Ok((attribute.kind(), &attribute.into_inner()[NLA_HEADER_SIZE..length]))
    })
}

/// The payload behind its type-specific header of `length` bytes.
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
            raw_messages(&bytes).map(|f| f.unwrap()).map(|f| (f.kind, f.sequence, f.payload.to_vec())).collect();
        assert_eq!(seen, [(16, 7, b"abcde".to_vec()), (24, 8, vec![]), (3, 8, vec![0; 4])]);
    }

    #[test]
    fn a_message_cut_short_is_an_error_and_the_last_one() {
        let mut bytes = message(16, 7, b"abcd");
        bytes.extend(&message(16, 7, b"abcd")[..18]);
        let seen: Vec<_> = raw_messages(&bytes).map(|f| f.is_ok()).collect();
        assert_eq!(seen, [true, false]);
    }

    #[test]
    fn error_codes_are_read_from_errors_and_ends() {
        let code = |kind, payload: &[u8]| {
            let bytes = message(kind, 1, payload);
            raw_messages(&bytes).next().unwrap().unwrap().error()
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

    /// A socket to a fake kernel. It replies to each request with the datagrams that `answers` returns for the number of
    /// earlier requests, the sequence number of the first message, and its flags.
    fn connected_to(answers: impl Fn(usize, u32, u16) -> Vec<Vec<u8>> + Send + 'static) -> NetlinkSocket {
        let (ours, theirs) = socket2::Socket::pair(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [MaybeUninit::uninit(); 8192];
            for count in 0.. {
                let length = theirs.recv(&mut buffer).unwrap();
                // SAFETY: the kernel has just written `length` bytes into the buffer.
                let request: Vec<u8> = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
                let Some(first) = raw_messages(&request).next() else { return };
                let first = first.unwrap();
                for answer in answers(count, first.sequence, first.flags) {
                    theirs.send(&answer).unwrap();
                }
            }
        });
        // SAFETY: `into_raw_fd` has just released the descriptor, which is an open socket.
        let socket = unsafe { Socket::from_raw_fd(ours.into_raw_fd()) };
        NetlinkSocket { socket, buffer: vec![0; BUFFER_SIZE], sequence: u32::MAX - 1 }
    }

    fn dump(socket: &mut NetlinkSocket) -> Result<Vec<u8>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        socket.dump("things", &request, |payload| Ok(payload.first().copied()))
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
        let mut socket = connected_to(|count, sequence, flags| {
            assert_eq!(flags, NLM_F_REQUEST | NLM_F_DUMP);
            let second = message(16, sequence, b"b");
            let second = if count == 0 { interrupted(second) } else { second };
            vec![message(16, sequence, b"a"), second, done(sequence)]
        });
        assert_eq!(dump(&mut socket).unwrap(), b"ab");
        assert_eq!(dump(&mut socket).unwrap(), b"ab");
    }

    #[test]
    fn a_host_that_does_nothing_but_change_is_given_up_on() {
        let mut socket = connected_to(|_, sequence, _| vec![interrupted(done(sequence))]);
        let error = dump(&mut socket).unwrap_err().to_string();
        assert_eq!(error, "cannot list the host's things: it changed while being listed, 20 times in a row");
    }

    #[test]
    fn a_refusal_to_list_can_be_told_apart() {
        let mut socket =
            connected_to(|_, sequence, _| vec![message(NLMSG_DONE, sequence, &(-libc::ENOENT).to_ne_bytes())]);
        let error = dump(&mut socket).unwrap_err();
        assert_eq!(error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error), Some(libc::ENOENT));
        assert!(error.to_string().contains("the host's things"), "{error}");
    }

    #[test]
    fn an_answer_longer_than_the_buffer_makes_the_buffer_grow() {
        let mut socket = connected_to(|_, sequence, _| vec![message(16, sequence, &[7; 5000]), done(sequence)]);
        socket.buffer.truncate(64);
        assert_eq!(dump(&mut socket).unwrap(), [7]);
        assert!(socket.buffer.len() >= 5016);
    }

    #[test]
    fn answers_to_abandoned_requests_are_not_taken_for_todays() {
        let mut socket = connected_to(|_, sequence, _| {
            let stale = sequence.wrapping_sub(1);
            vec![message(16, stale, b"x"), done(stale), message(16, sequence, b"a"), done(sequence)]
        });
        assert_eq!(dump(&mut socket).unwrap(), b"a");
    }

    #[test]
    fn nonsense_from_the_kernel_is_an_error() {
        let mut socket = connected_to(|_, _, _| vec![vec![1, 2, 3]]);
        assert!(format!("{:#}", dump(&mut socket).unwrap_err()).contains("cannot list the host's things"));
    }

    #[test]
    fn answers_in_any_order_find_their_requests() {
        let requests = vec![RouteNetlinkMessage::GetLink(LinkMessage::default()); 3];
        let mut socket = connected_to(|_, first, _| {
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
        socket.query(&requests, record).unwrap();
        let expected = [Ok(b"a".to_vec()), Err(Some(libc::ENETUNREACH)), Ok(b"c".to_vec())];
        assert_eq!(seen, expected.map(Some));
    }

    /// With the real kernel, unprivileged: so small a buffer holds only one or two replies.
    #[test]
    fn answers_that_overrun_the_socket_are_asked_for_again() {
        let requests: Vec<_> = (0..200).map(|n| routes::request_for([127, 0, 0, n].into())).collect();
        let mut socket = NetlinkSocket::open().unwrap();
        socket2::SockRef::from(&socket.socket).set_recv_buffer_size(1).unwrap();
        let mut answers = vec![0; requests.len()];
        let record = |index: usize, _: io::Result<&[u8]>| {
            answers[index] += 1;
            Ok(())
        };
        socket.query(&requests, record).unwrap();
        assert!(answers.iter().all(|&count| count > 0), "{answers:?}");
        assert!(socket.sequence > 200, "the socket was never overrun: {} requests", socket.sequence);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_framing_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in raw_messages(&bytes).map_while(Result::ok) {
                let _ = message.error();
                let _ = attributes(message.payload).count();
            }
            let _ = attributes(&bytes).count();
        }
    }
}
