//! A sending socket, and what its errors mean.
//!
//! Each worker has two. All downstreams share the first, and with it one send buffer. What fills such a buffer for
//! long is a downstream whose neighbour does not answer: the kernel holds its datagrams for seconds while it asks for
//! the address. Once errors have come back for a downstream, its datagrams therefore take the second socket, where
//! only others of their kind can suffer from a full buffer, and where nobody waits.
//!
//! On the first socket a full buffer means that the network is slower than the senders. Waiting loses least then: the
//! listener's receive buffer fills meanwhile. The wait is short, and if the buffer has not emptied by half after
//! it, it is not emptying at all: for a while what does not fit is dropped at once, so that those who can be reached over
//! another way are not held up.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr, SetStruct, SndBufForce};
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::{Batch, Report, next_report};
use super::steer;
use crate::model::DropReason;
use crate::net::Family;

/// The lane for everyone in good standing.
pub const MAIN: usize = 0;
/// The lane for downstreams with recent errors.
pub const TROUBLED: usize = 1;

/// Bytes of send buffer asked for. One unanswering neighbour holds up to 208 KiB of it (`unres_qlen_bytes`), so this
/// is enough for some twenty at once until their errors are back.
pub const SEND_BUFFER: usize = 4 << 20;
/// Longest wait for a full buffer to empty by half.
pub const PATIENCE: Duration = Duration::from_millis(5);
/// How long nobody waits after a wait in vain.
pub const IMPATIENCE: Duration = Duration::from_secs(1);
/// How often one datagram is tried again because the error was another's. Each time, reports of earlier datagrams have
/// been read, so this is never reached unless somebody forges ICMP messages faster than we can read them.
const MAX_RETRIES: u32 = 64;

/// Most reports read for one batch: several for each of the longest batch's datagrams. More come only from somebody who
/// forges them, and must not keep the worker from its work.
const MAX_REPORTS: usize = 4096;

/// Whether IPv4 packets are marked "do not fragment".
#[derive(Clone)]
struct MtuDiscover;

nix::setsockopt_impl!(MtuDiscover, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::c_int, SetStruct<'_, libc::c_int>);

/// What may happen to a lane's list on its way. Messages and datagrams are named by their numbers in the list.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A datagram could not be sent.
    Lost {
        /// The message it is in.
        message: usize,
        /// Its own number.
        datagram: usize,
        /// Why.
        error: &'a io::Error,
    },
    /// The kernel does not take this message in one piece: its datagrams are sent one by one.
    Apart {
        /// Its number.
        message: usize,
        /// The bytes of each of them, but for the last.
        each: u32,
    },
}

/// One sending socket of a worker.
#[derive(Debug)]
pub struct Lane {
    number: usize,
    socket: Socket,
    no_wait_until: Option<Instant>,
    reports: Vec<Report>,
}

impl Lane {
    /// Opens the socket.
    ///
    /// # Errors
    /// When the kernel has no such sockets or refuses one of the options.
    pub fn open(number: usize, family: Family) -> Result<Self> {
        let domain = if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))
            .context("cannot open a socket to send with")?;
        if family == Family::V6 {
            socket.set_only_v6(false).context("cannot clear IPV6_V6ONLY")?;
            setsockopt(&socket, Ipv6RecvErr, &true).context("cannot set IPV6_RECVERR")?;
        }
        // Reports ICMP errors together with the destination, and drops in our own host's queues as ENOBUFS, which are
        // silent otherwise.
        setsockopt(&socket, Ipv4RecvErr, &true).context("cannot set IP_RECVERR")?;
        mark_fragmentable(&socket)?;
        if setsockopt(&socket, SndBufForce, &SEND_BUFFER).is_err() {
            // Without CAP_NET_ADMIN the kernel gives what net.core.wmem_max allows.
            socket.set_send_buffer_size(SEND_BUFFER).context("cannot set SO_SNDBUF")?;
        }
        // Answers of downstreams would sit in the receive buffer, which error reports need.
        steer::refuse_all(&socket)?;
        Ok(Lane { number, socket, no_wait_until: None, reports: Vec::new() })
    }

    /// Sends this lane's list of the batch. `tell` hears of each datagram that could not be sent; the others were.
    pub fn flush(&mut self, batch: &mut Batch, mut tell: impl FnMut(Event<'_>)) {
        let (mut message, mut retries) = (0, 0);
        while message < batch.messages(self.number) {
            match batch.send(self.number, message, self.socket.as_fd()) {
                Ok(sent) => message += sent,
                Err(error) if retries < MAX_RETRIES && self.again(&error) => {
                    retries += 1;
                    continue;
                }
                Err(error) => {
                    let datagrams = batch.datagrams(self.number, message);
                    if datagrams.len() > 1 && wants_datagrams_apart(&error) {
                        tell(Event::Apart { message, each: batch.length(self.number, datagrams.start) as u32 });
                        datagrams.for_each(|datagram| self.send_apart(batch, message, datagram, &mut tell));
                    } else {
                        datagrams.for_each(|datagram| tell(Event::Lost { message, datagram, error: &error }));
                    }
                    message += 1;
                }
            }
            retries = 0;
        }
        if message > 0 {
            // On this host and its links, errors come back before the call that caused them returns.
            self.collect();
        }
    }

    /// Sends one datagram of a message by itself.
    fn send_apart(&mut self, batch: &mut Batch, message: usize, datagram: usize, tell: &mut impl FnMut(Event<'_>)) {
        let mut retries = 0;
        while let Err(error) = batch.send_apart(self.number, message, datagram, self.socket.as_fd()) {
            if retries == MAX_RETRIES || !self.again(&error) {
                tell(Event::Lost { message, datagram, error: &error });
                return;
            }
            retries += 1;
        }
    }

    /// What has come back for datagrams sent earlier, since the last call.
    pub fn reports(&mut self) -> impl Iterator<Item = Report> + '_ {
        self.reports.drain(..)
    }

    /// True if a send is worth repeating.
    ///
    /// The kernel hands an error that came back for an earlier datagram to whichever call is next, and does not send then.
    /// Reports in the queue tell such an error from the message's own.
    fn again(&mut self, error: &io::Error) -> bool {
        match error.kind() {
            io::ErrorKind::Interrupted => true,
            io::ErrorKind::WouldBlock => self.wait(),
            // Never an error of the datagram at hand: nothing but an answer can tell that a port is closed.
            io::ErrorKind::ConnectionRefused => {
                self.collect();
                true
            }
            _ => self.collect(),
        }
    }

    /// Reads the error queue. True if it held anything.
    fn collect(&mut self) -> bool {
        let before = self.reports.len();
        while self.reports.len() < MAX_REPORTS
            && let Some(report) = next_report(self.socket.as_fd())
        {
            self.reports.push(report);
        }
        self.reports.len() > before
    }

    /// Waits for a full buffer to empty by half. False if there is no hope of it.
    fn wait(&mut self) -> bool {
        let start = Instant::now();
        if self.number != MAIN || self.no_wait_until.is_some_and(|until| start < until) {
            return false;
        }
        loop {
            // A report makes the socket ready without there being room, and would turn this into a busy loop.
            self.collect();
            let left = PATIENCE.saturating_sub(start.elapsed());
            if left.is_zero() {
                self.no_wait_until = Some(Instant::now() + IMPATIENCE);
                return false;
            }
            let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            // A failed poll is like one that timed out: `left` ends the loop.
            let _ = poll(&mut sockets, timeout);
            if sockets[0].revents().is_some_and(|ready| ready.contains(PollFlags::POLLOUT)) {
                return true;
            }
        }
    }
}

/// Has what a socket sends over IPv4 fragmented on its way, where it is longer than some link, rather than lost.
///
/// # Errors
/// When the kernel refuses.
pub fn mark_fragmentable(socket: &Socket) -> Result<()> {
    setsockopt(socket, MtuDiscover, &libc::IP_PMTUDISC_DONT).context("cannot set IP_MTU_DISCOVER")
}

/// True if an error may be about the datagrams' sharing a message: each is longer than the route's MTU (`EMSGSIZE`, in
/// older kernels `EINVAL`), or the device lacks what it takes (`EIO`).
fn wants_datagrams_apart(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO | libc::EOPNOTSUPP))
}

/// The reason under which an error is counted.
pub fn reason(errno: i32) -> DropReason {
    match errno {
        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::EHOSTDOWN => DropReason::Unreachable,
        libc::ECONNREFUSED => DropReason::Refused,
        libc::EMSGSIZE => DropReason::TooBig,
        libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => DropReason::SendBufferFull,
        _ => DropReason::SendFailed,
    }
}

#[cfg(test)]
mod tests {
    use super::super::mmsg::RawAddress;
    use super::*;
    use std::net::{SocketAddr, UdpSocket};

    /// Fills a batch with datagrams of 1,000 bytes and sends them to one address. Says which errors there were.
    fn send(lane: &mut Lane, batch: &mut Batch, to: SocketAddr) -> Vec<Option<i32>> {
        let through = UdpSocket::bind("127.0.0.1:0").unwrap();
        through.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut errors = Vec::new();
        for _ in 0..40 {
            sender.send_to(&[0; 1000], through.local_addr().unwrap()).unwrap();
            // Blocks until it is there.
            through.peek(&mut [0; 1]).unwrap();
            assert_eq!(batch.receive(through.as_fd()).unwrap(), 1);
            let piece = batch.message(0).pieces().next().unwrap().unwrap();
            batch.address(lane.number, &RawAddress::new(to, Family::V4), u32::MAX);
            batch.queue(lane.number, piece);
            lane.flush(batch, |event| match event {
                Event::Lost { error, .. } => errors.push(error.raw_os_error()),
                Event::Apart { .. } => panic!("{event:?}"),
            });
        }
        errors
    }

    fn ip(arguments: &str) {
        let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}: {status}");
    }

    /// Waits until something has come back for what this socket sent, and leaves it there.
    fn wait_for_error(lane: &Lane) {
        let mut sockets = [PollFd::new(lane.socket.as_fd(), PollFlags::empty())];
        poll(&mut sockets, PollTimeout::from(20_000u16)).unwrap();
        assert_eq!(sockets[0].revents(), Some(PollFlags::POLLERR));
    }

    /// In a network namespace of its own, with a neighbour that never answers and a buffer that it fills alone.
    fn dead_neighbour() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a new network namespace needs CAP_SYS_ADMIN");
        ip("link set lo up");
        ip("link add fo0 type veth peer name fo1");
        ip("address add 10.77.0.1/24 dev fo0");
        ip("link set fo0 up");
        ip("link set fo1 up");
        // The kernel gives up after one second rather than three.
        ip("ntable change name arp_cache dev fo0 retrans 500 mcast_probes 2");
        let dead = SocketAddr::from(([10, 77, 0, 2], 514));
        let living = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (mut batch, mut main) = (Batch::new(1, 2000, 1).unwrap(), Lane::open(MAIN, Family::V4).unwrap());
        let mut troubled = Lane::open(TROUBLED, Family::V4).unwrap();
        main.socket.set_send_buffer_size(20_000).unwrap();

        let errors = send(&mut main, &mut batch, dead);
        assert!(errors.len() > 10 && errors.len() < 40, "{errors:?}");
        assert!(errors.iter().all(|&errno| errno == Some(libc::EAGAIN)));
        // It has waited once, in vain, and does not again.
        assert!(main.no_wait_until.is_some() && !main.wait());
        // Sockets do not share their buffers.
        assert_eq!(send(&mut troubled, &mut batch, living.local_addr().unwrap()), []);

        // The verdict costs no datagram but the dead neighbour's own.
        wait_for_error(&main);
        assert_eq!(send(&mut main, &mut batch, living.local_addr().unwrap()), []);
        let report = Report { to: (dead.ip(), dead.port()), errno: libc::EHOSTUNREACH };
        let reports: Vec<Report> = main.reports().collect();
        assert!(!reports.is_empty() && reports.iter().all(|each| *each == report), "{reports:?}");
    }

    #[test]
    fn netns_a_dead_neighbour_fills_one_lane_until_the_kernel_gives_up() {
        if let Err(panic) = std::thread::spawn(dead_neighbour).join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn an_error_that_came_back_costs_no_other_datagram() {
        let closed = UdpSocket::bind("127.0.0.5:0").unwrap().local_addr().unwrap();
        let living = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (mut batch, mut lane) = (Batch::new(1, 2000, 1).unwrap(), Lane::open(MAIN, Family::V4).unwrap());
        for _ in 0..5 {
            assert_eq!(send(&mut lane, &mut batch, closed), []);
            assert_eq!(send(&mut lane, &mut batch, living.local_addr().unwrap()), []);
        }
        lane.socket.send_to(b"?", &closed.into()).unwrap();
        wait_for_error(&lane);
        assert_eq!(send(&mut lane, &mut batch, living.local_addr().unwrap()), []);
        let report = Report { to: (closed.ip(), closed.port()), errno: libc::ECONNREFUSED };
        let mut reports = 0;
        let start = Instant::now();
        while reports < 201 {
            assert!(start.elapsed() < Duration::from_secs(20), "{reports} refusals came back");
            lane.collect();
            lane.reports().for_each(|each| {
                assert_eq!(each, report);
                reports += 1;
            });
        }
    }

    #[test]
    fn answers_of_downstreams_are_turned_away() {
        let lane = Lane::open(MAIN, Family::V4).unwrap();
        let port = {
            lane.socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
            lane.socket.local_addr().unwrap().as_socket().unwrap().port()
        };
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"pong", ("127.0.0.1", port)).unwrap();
        let error = lane.socket.recv(&mut [std::mem::MaybeUninit::uninit(); 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn every_error_has_its_reason() {
        for (errno, expected) in [
            (libc::ENETUNREACH, DropReason::Unreachable),
            (libc::EHOSTUNREACH, DropReason::Unreachable),
            (libc::ENETDOWN, DropReason::Unreachable),
            (libc::ECONNREFUSED, DropReason::Refused),
            (libc::EMSGSIZE, DropReason::TooBig),
            (libc::EAGAIN, DropReason::SendBufferFull),
            (libc::ENOBUFS, DropReason::SendBufferFull),
            (libc::EPERM, DropReason::SendFailed),
            (libc::EACCES, DropReason::SendFailed),
        ] {
            assert_eq!(reason(errno), expected, "errno {errno}");
        }
    }
}
