//! A sending socket with its send buffer, and what its errors mean.
//!
//! Each worker has two. Normally all downstreams share the first one and its send buffer. What can fill that buffer for
//! long is a downstream whose neighbour does not answer: the kernel holds its datagrams for seconds while it resolves
//! the address. Therefore a downstream with recent errors uses the second socket. There, a full buffer affects only
//! other degraded downstreams, and nothing waits.
//!
//! On the first socket, a full buffer means that the network is slower than the senders. Then it is best to wait,
//! because the listener's receive buffer takes up what arrives meanwhile. The wait is short. If half of the buffer is
//! not free after it, the buffer does not drain at all: for a while, what does not fit is dropped at once, so that
//! downstreams on other paths are not held up.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr, SetStruct, SndBufForce};
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::{Batch, ErrorReport, next_report};
use super::steer;
use crate::model::DropReason;
use crate::net::Family;

/// The send queue for downstreams without recent errors.
pub const MAIN: usize = 0;
/// The send queue for downstreams with recent errors.
pub const DEGRADED: usize = 1;

/// Requested size of the send buffer in bytes. One unresolved neighbour holds up to 208 KiB (`unres_qlen_bytes`), so
/// this is enough for about twenty at once until their errors arrive.
pub const SEND_BUFFER: usize = 4 << 20;
/// The longest wait for half of a full buffer to become free.
pub const MAX_BUFFER_WAIT: Duration = Duration::from_millis(5);
/// After a wait in vain, nothing waits for this long.
pub const NO_WAIT_PERIOD: Duration = Duration::from_secs(1);
/// How often one datagram is sent again because the error was an earlier datagram's. Each attempt empties the error
/// queue, so only a flood of forged ICMP messages reaches this.
const MAX_RETRIES: u32 = 64;

/// The maximum number of reports read for one batch: several for each datagram of the longest one. More are forged, and
/// must not hold up the worker.
const MAX_REPORTS: usize = 4096;

/// Whether IPv4 packets are marked "do not fragment".
#[derive(Clone)]
struct MtuDiscover;

nix::setsockopt_impl!(MtuDiscover, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::c_int, SetStruct<'_, libc::c_int>);

/// What can happen to messages of a send queue's list. `message` and `datagram` are indices into the list.
#[derive(Debug, Clone, Copy)]
pub enum SendEvent<'a> {
    /// A datagram could not be sent.
    Lost {
        /// The message that contains it.
        message: usize,
        /// Its own index.
        datagram: usize,
        /// The kernel's error.
        error: &'a io::Error,
    },
    /// The kernel does not segment this message: its datagrams are sent one by one.
    Unsegmented {
        /// Its index.
        message: usize,
        /// The length of each datagram but the last, in bytes.
        each: u32,
    },
}

/// One sending socket of a worker.
#[derive(Debug)]
pub struct SendQueue {
    number: usize,
    socket: Socket,
    no_wait_until: Option<Instant>,
    reports: Vec<ErrorReport>,
}

impl SendQueue {
    /// Opens the socket.
    ///
    /// # Errors
    /// When the kernel refuses the socket or one of its options.
    pub fn open(number: usize, family: Family) -> Result<Self> {
        let domain = if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))
            .context("cannot open a socket to send with")?;
        if family == Family::V6 {
            socket.set_only_v6(false).context("cannot clear IPV6_V6ONLY")?;
            setsockopt(&socket, Ipv6RecvErr, &true).context("cannot set IPV6_RECVERR")?;
        }
        // Reports ICMP errors with the destination, and also drops in this host's own queues, as ENOBUFS.
        setsockopt(&socket, Ipv4RecvErr, &true).context("cannot set IP_RECVERR")?;
        mark_fragmentable(&socket)?;
        if setsockopt(&socket, SndBufForce, &SEND_BUFFER).is_err() {
            // Without CAP_NET_ADMIN, the kernel limits the size to net.core.wmem_max.
            socket.set_send_buffer_size(SEND_BUFFER).context("cannot set SO_SNDBUF")?;
        }
        // Replies of downstreams would fill the receive buffer, which error reports need.
        steer::drop_new_datagrams(&socket)?;
        Ok(SendQueue { number, socket, no_wait_until: None, reports: Vec::new() })
    }

    /// Sends this queue's list of the batch. `on_event` is called for each datagram that could not be sent; all others
    /// were sent.
    pub fn flush(&mut self, batch: &mut Batch, mut on_event: impl FnMut(SendEvent<'_>)) {
        let (mut message, mut retries) = (0, 0);
        while message < batch.messages(self.number) {
            match batch.send(self.number, message, self.socket.as_fd()) {
                Ok(sent) => message += sent,
                Err(error) if retries < MAX_RETRIES && self.should_retry(&error) => {
                    retries += 1;
                    continue;
                }
                Err(error) => {
                    let datagrams = batch.datagrams(self.number, message);
                    if datagrams.len() > 1 && refuses_segmentation(&error) {
                        on_event(SendEvent::Unsegmented {
                            message,
                            each: batch.length(self.number, datagrams.start) as u32,
                        });
                        datagrams.for_each(|datagram| self.send_unsegmented(batch, message, datagram, &mut on_event));
                    } else {
                        datagrams.for_each(|datagram| on_event(SendEvent::Lost { message, datagram, error: &error }));
                    }
                    message += 1;
                }
            }
            retries = 0;
        }
        if message > 0 {
            // On this host and its links, errors arrive before the call that caused them returns.
            self.read_error_queue();
        }
    }

    /// Sends one datagram of a message on its own.
    fn send_unsegmented(
        &mut self,
        batch: &mut Batch,
        message: usize,
        datagram: usize,
        on_event: &mut impl FnMut(SendEvent<'_>),
    ) {
        let mut retries = 0;
        while let Err(error) = batch.send_unsegmented(self.number, message, datagram, self.socket.as_fd()) {
            if retries == MAX_RETRIES || !self.should_retry(&error) {
                on_event(SendEvent::Lost { message, datagram, error: &error });
                return;
            }
            retries += 1;
        }
    }

    /// The errors of datagrams sent earlier, since the last call.
    pub fn reports(&mut self) -> impl Iterator<Item = ErrorReport> + '_ {
        self.reports.drain(..)
    }

    /// True if the send should be repeated.
    ///
    /// The kernel returns the error of an earlier datagram from the next call, whichever it is, and does not send then.
    /// A report in the error queue distinguishes such an error from the message's own.
    fn should_retry(&mut self, error: &io::Error) -> bool {
        match error.kind() {
            io::ErrorKind::Interrupted => true,
            io::ErrorKind::WouldBlock => self.wait_for_room(),
            // Always an earlier datagram's error: only a reply can tell that a port is closed.
            io::ErrorKind::ConnectionRefused => {
                self.read_error_queue();
                true
            }
            _ => self.read_error_queue(),
        }
    }

    /// Reads the error queue. True if it was not empty.
    fn read_error_queue(&mut self) -> bool {
        let before = self.reports.len();
        while self.reports.len() < MAX_REPORTS
            && let Some(report) = next_report(self.socket.as_fd())
        {
            self.reports.push(report);
        }
        self.reports.len() > before
    }

    /// Waits until half of a full send buffer is free. False if that is unlikely to happen.
    fn wait_for_room(&mut self) -> bool {
        let start = Instant::now();
        if self.number != MAIN || self.no_wait_until.is_some_and(|until| start < until) {
            return false;
        }
        loop {
            // A queued report makes the socket ready although there is no room, which would make this a busy loop.
            self.read_error_queue();
            let left = MAX_BUFFER_WAIT.saturating_sub(start.elapsed());
            if left.is_zero() {
                self.no_wait_until = Some(Instant::now() + NO_WAIT_PERIOD);
                return false;
            }
            let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            // A failed poll is treated like one that timed out: `left` ends the loop.
            let _ = poll(&mut sockets, timeout);
            if sockets[0].revents().is_some_and(|ready| ready.contains(PollFlags::POLLOUT)) {
                return true;
            }
        }
    }
}

/// Lets routers fragment what the socket sends over IPv4. Otherwise, datagrams that are too long for a link are lost.
///
/// # Errors
/// When the kernel refuses.
pub fn mark_fragmentable(socket: &Socket) -> Result<()> {
    setsockopt(socket, MtuDiscover, &libc::IP_PMTUDISC_DONT).context("cannot set IP_MTU_DISCOVER")
}

/// True if the cause may be segmentation: the segments are longer than the route's MTU (`EMSGSIZE`, in older kernels
/// `EINVAL`), or the device does not support it (`EIO`).
fn refuses_segmentation(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO | libc::EOPNOTSUPP))
}

/// The reason under which an error is counted.
pub fn drop_reason(errno: i32) -> DropReason {
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

    /// Sends datagrams of 1,000 bytes to one address. Returns the errors.
    fn send(queue: &mut SendQueue, batch: &mut Batch, to: SocketAddr) -> Vec<Option<i32>> {
        let through = UdpSocket::bind("127.0.0.1:0").unwrap();
        through.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut errors = Vec::new();
        for _ in 0..40 {
            sender.send_to(&[0; 1000], through.local_addr().unwrap()).unwrap();
            // Blocks until it is there.
            through.peek(&mut [0; 1]).unwrap();
            assert_eq!(batch.receive(through.as_fd()).unwrap(), 1);
            let segment = batch.message(0).segments().next().unwrap().unwrap();
            batch.address(queue.number, &RawAddress::new(to, Family::V4), u32::MAX);
            batch.push(queue.number, segment);
            queue.flush(batch, |event| match event {
                SendEvent::Lost { error, .. } => errors.push(error.raw_os_error()),
                SendEvent::Unsegmented { .. } => panic!("{event:?}"),
            });
        }
        errors
    }

    fn ip(arguments: &str) {
        let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}: {status}");
    }

    /// Waits for an error report of this socket, and leaves it in the queue.
    fn wait_for_error(queue: &SendQueue) {
        let mut sockets = [PollFd::new(queue.socket.as_fd(), PollFlags::empty())];
        poll(&mut sockets, PollTimeout::from(20_000u16)).unwrap();
        assert_eq!(sockets[0].revents(), Some(PollFlags::POLLERR));
    }

    /// In its own network namespace: a neighbour that never answers fills a send buffer.
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
        let (mut batch, mut main) = (Batch::new(1, 2000, 1).unwrap(), SendQueue::open(MAIN, Family::V4).unwrap());
        let mut degraded = SendQueue::open(DEGRADED, Family::V4).unwrap();
        main.socket.set_send_buffer_size(20_000).unwrap();

        let errors = send(&mut main, &mut batch, dead);
        assert!(errors.len() > 10 && errors.len() < 40, "{errors:?}");
        assert!(errors.iter().all(|&errno| errno == Some(libc::EAGAIN)));
        // It waited once in vain, and does not wait again.
        assert!(main.no_wait_until.is_some() && !main.wait_for_room());
        // Each socket has its own buffer.
        assert_eq!(send(&mut degraded, &mut batch, living.local_addr().unwrap()), []);

        // The error report costs only the dead neighbour's datagrams.
        wait_for_error(&main);
        assert_eq!(send(&mut main, &mut batch, living.local_addr().unwrap()), []);
        let report = ErrorReport { to: (dead.ip(), dead.port()), errno: libc::EHOSTUNREACH };
        let reports: Vec<ErrorReport> = main.reports().collect();
        assert!(!reports.is_empty() && reports.iter().all(|each| *each == report), "{reports:?}");
    }

    #[test]
    fn netns_a_dead_neighbour_fills_one_send_queue_until_the_kernel_gives_up() {
        if let Err(panic) = std::thread::spawn(dead_neighbour).join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn an_error_that_came_back_costs_no_other_datagram() {
        let closed = UdpSocket::bind("127.0.0.5:0").unwrap().local_addr().unwrap();
        let living = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (mut batch, mut queue) = (Batch::new(1, 2000, 1).unwrap(), SendQueue::open(MAIN, Family::V4).unwrap());
        for _ in 0..5 {
            assert_eq!(send(&mut queue, &mut batch, closed), []);
            assert_eq!(send(&mut queue, &mut batch, living.local_addr().unwrap()), []);
        }
        queue.socket.send_to(b"?", &closed.into()).unwrap();
        wait_for_error(&queue);
        assert_eq!(send(&mut queue, &mut batch, living.local_addr().unwrap()), []);
        let report = ErrorReport { to: (closed.ip(), closed.port()), errno: libc::ECONNREFUSED };
        let mut reports = 0;
        let start = Instant::now();
        while reports < 201 {
            assert!(start.elapsed() < Duration::from_secs(20), "{reports} refusals came back");
            queue.read_error_queue();
            queue.reports().for_each(|each| {
                assert_eq!(each, report);
                reports += 1;
            });
        }
    }

    #[test]
    fn answers_of_downstreams_are_turned_away() {
        let queue = SendQueue::open(MAIN, Family::V4).unwrap();
        let port = {
            queue.socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
            queue.socket.local_addr().unwrap().as_socket().unwrap().port()
        };
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"pong", ("127.0.0.1", port)).unwrap();
        let error = queue.socket.recv(&mut [std::mem::MaybeUninit::uninit(); 8]).unwrap_err();
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
            assert_eq!(drop_reason(errno), expected, "errno {errno}");
        }
    }
}
