//! Accepts connections, and limits their number.
//!
//! Every connection carries one request. A connection waits either for the event loop, which ends by itself within
//! [`HttpLimits::answer`], or for its client (to send a request, to read a response): then it is *idle*. Idle connections
//! give way to new ones, and the accept loop keeps up with a flood, because it never waits for another host's client:
//!
//! - A host that has [`HttpLimits::per_source`] connections gets another one in place of its own oldest idle one, if that has
//!   had its [`HttpLimits::grace`]; otherwise its new connection is refused (reset).
//! - If other hosts hold [`HttpLimits::connections`] together, the oldest idle connection of the host that holds most
//!   gives way; if none is idle, the new connection is refused.
//! - This host's own connections, such as the kubelet's probes, have [`HttpLimits::own_host`] places of their own. The oldest
//!   idle one gives way; while none is idle, new connections wait in the kernel's queue.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::HttpLimits;
use super::routes::HttpRoutes;
use crate::error_hints;

/// Pause after a failed `accept`, mostly for lack of descriptors; another attempt at once would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Longest request line and headers, in bytes; the least that hyper allows.
const MAX_REQUEST: usize = 8192;

/// At most one log line of refused connections in this time.
const REFUSALS_LOGGED_EVERY: Duration = Duration::from_secs(60);

/// Accepts and serves connections until it is cancelled.
pub(super) async fn accept(listener: TcpListener, site: Arc<HttpRoutes>, limits: HttpLimits) {
    let mut connections = HttpConnections { open: VecDeque::new(), progress: Arc::new(Notify::new()), limits };
    let mut refusals = Refusals::default();
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                if std::mem::take(&mut failing) {
                    info!("connections for metrics are accepted again");
                }
                let source = ConnectionSource::new(peer.ip(), stream.local_addr().ok().map(|own| own.ip()));
                if connections.make_room(source).await {
                    connections.add(stream, source, Arc::clone(&site));
                } else {
                    refusals.log(peer);
                    reset(&stream);
                }
                // Lets the connection read a request that has arrived already, before others may take its place.
                tokio::task::yield_now().await;
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    let error = error_hints::add_open_files_hint(error.to_string());
                    warn!(error, "cannot accept connections for metrics, trying again");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Has the stream end with a reset when it is dropped, so that the kernel keeps no state of it.
fn reset(stream: &TcpStream) {
    // If it fails, the stream ends in the ordinary way.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Where a connection comes from, for the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ConnectionSource {
    /// From this host: the client has the address that it has connected to. The kernel drops packets from the network
    /// that claim this.
    OwnHost,
    /// From this IPv4 address, or this IPv6 /64, which one host may have for itself.
    Other(IpAddr),
}

impl ConnectionSource {
    fn new(peer: IpAddr, own: Option<IpAddr>) -> ConnectionSource {
        if Some(peer) == own {
            return ConnectionSource::OwnHost;
        }
        ConnectionSource::Other(match peer.to_canonical() {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
        })
    }
}

/// Refused connections since the last log line.
#[derive(Default)]
struct Refusals {
    logged: Option<Instant>,
    count: u64,
}

impl Refusals {
    fn log(&mut self, peer: SocketAddr) {
        self.count += 1;
        if self.logged.is_none_or(|logged| logged.elapsed() >= REFUSALS_LOGGED_EVERY) {
            let refused = std::mem::take(&mut self.count);
            self.logged = Some(Instant::now());
            warn!(refused, last = %peer.ip(), "too many connections to the metrics port; refusing new ones");
        }
    }
}

/// The open connections, oldest first.
struct HttpConnections {
    open: VecDeque<HttpConnection>,
    /// Notified when a connection stops waiting for the event loop, and when it ends.
    progress: Arc<Notify>,
    limits: HttpLimits,
}

struct HttpConnection {
    task: AbortHandle,
    source: ConnectionSource,
    since: Instant,
    /// Set while the connection waits for the event loop, not for its client.
    busy: Arc<AtomicBool>,
}

impl HttpConnection {
    fn is_idle(&self) -> bool {
        !self.busy.load(Ordering::Relaxed)
    }
}

/// What a new connection finds.
enum Room {
    Free,
    /// In place of this one.
    Evict(usize),
    /// Once another has made progress.
    Wait,
    None,
}

impl HttpConnections {
    /// Makes room for one more connection. False if it is to be refused.
    async fn make_room(&mut self, source: ConnectionSource) -> bool {
        loop {
            self.open.retain(|connection| !connection.task.is_finished());
            match self.room(source) {
                Room::Free => return true,
                Room::None => return false,
                Room::Wait => self.progress.notified().await,
                Room::Evict(index) => {
                    if let Some(evicted) = self.open.remove(index) {
                        evicted.task.abort();
                    }
                }
            }
        }
    }

    fn room(&self, source: ConnectionSource) -> Room {
        let held = self.open.iter().filter(|connection| connection.source == source).count();
        let oldest_idle = |of: ConnectionSource| self.open.iter().position(|open| open.source == of && open.is_idle());
        if source == ConnectionSource::OwnHost {
            return match oldest_idle(source) {
                _ if held < self.limits.own_host.max(1) => Room::Free,
                Some(index) => Room::Evict(index),
                None => Room::Wait,
            };
        }
        if held >= self.limits.per_source {
            let had_its_grace = |index: &usize| self.open[*index].since.elapsed() >= self.limits.grace;
            return oldest_idle(source).filter(had_its_grace).map_or(Room::None, Room::Evict);
        }
        let mut holders: HashMap<ConnectionSource, usize> = HashMap::new();
        for open in self.open.iter().filter(|open| open.source != ConnectionSource::OwnHost) {
            *holders.entry(open.source).or_default() += 1;
        }
        if holders.values().sum::<usize>() < self.limits.connections {
            return Room::Free;
        }
        let idle = self.open.iter().enumerate().rev().filter(|(_, open)| open.is_idle());
        // Of equals, the last, which is the oldest, is the maximum.
        let victim = idle.filter_map(|(index, open)| Some((index, holders.get(&open.source)?))).max_by_key(|(_, n)| *n);
        victim.map_or(Room::None, |(index, _)| Room::Evict(index))
    }

    fn add(&mut self, stream: TcpStream, source: ConnectionSource, site: Arc<HttpRoutes>) {
        let busy = Arc::new(AtomicBool::new(false));
        let work = BusyFlag { busy: Arc::clone(&busy), progress: Arc::clone(&self.progress) };
        let task = tokio::spawn(serve(stream, site, work, self.limits)).abort_handle();
        self.open.push_back(HttpConnection { task, source, since: Instant::now(), busy });
    }
}

/// Says whether a connection waits for the event loop.
struct BusyFlag {
    busy: Arc<AtomicBool>,
    progress: Arc<Notify>,
}

impl BusyFlag {
    /// Sets the flag until the returned guard is dropped.
    fn begin(&self) -> BusyGuard<'_> {
        self.busy.store(true, Ordering::Relaxed);
        BusyGuard(self)
    }
}

impl Drop for BusyFlag {
    fn drop(&mut self) {
        self.progress.notify_one();
    }
}

struct BusyGuard<'a>(&'a BusyFlag);

impl Drop for BusyGuard<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Relaxed);
        self.0.progress.notify_one();
    }
}

/// Serves one connection to its end.
async fn serve(stream: TcpStream, site: Arc<HttpRoutes>, work: BusyFlag, limits: HttpLimits) {
    let service = service_fn(async |request: hyper::Request<Incoming>| {
        let _busy = work.begin();
        Ok::<_, Infallible>(site.answer(request.method(), request.uri().path()).await)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.headers)
        .keep_alive(false)
        // A client may close its sending side after the request, as `nc -N` does.
        .half_close(true)
        .max_buf_size(MAX_REQUEST)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(limits.connection, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a connection to the metrics port failed"),
        Err(_) => debug!("a connection to the metrics port took too long"),
    }
}
