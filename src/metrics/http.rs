//! The HTTP endpoint: metrics, liveness, readiness, and which listeners serve.
//!
//! One thread, `fo-http`, runs a small tokio runtime and hyper. It holds no state of the daemon: for every request it
//! sends a [`MainLoopRequest`] through a channel, wakes the event loop, and waits a limited time for the reply. So pages are
//! current, and `/healthz` answers 200 only while the event loop runs.
//!
//! - [`MetricsListener`] binds the port, so that a port in use fails the start.
//! - `connections` accepts connections and keeps slow clients and floods from blocking others.
//! - `routes` turns one HTTP request into one response.

mod connections;
mod routes;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use mio::Waker;
use socket2::{Domain, Socket, Type};
use tokio::sync::oneshot;

use super::MetricsSnapshot;
use crate::config::MetricsConfig;

/// Path of the liveness probe.
pub const HEALTH_PATH: &str = "/healthz";
/// Path of the readiness probe.
pub const READY_PATH: &str = "/readyz";

/// Connections that wait in the kernel until they are accepted. The kernel's limit is `net.core.somaxconn`, 4096 since
/// Linux 5.4.
const BACKLOG: i32 = 4096;

/// Path of the probe for load balancers; `/serving/LISTENER` is that of one listener.
pub const SERVING_PATH: &str = "/serving";

/// A request of the HTTP thread to the event loop. If the sender is dropped or no reply comes, the client gets 503.
#[derive(Debug)]
pub enum MainLoopRequest {
    /// For the metrics page. An error becomes the body of a 503.
    Scrape(oneshot::Sender<anyhow::Result<MetricsSnapshot>>),
    /// For readiness; and for liveness, where any reply will do.
    Readiness(oneshot::Sender<ReadinessReport>),
    /// Which listeners forward.
    Serving(oneshot::Sender<ServingReport>),
}

impl MainLoopRequest {
    /// True if the client has gone, so that the reply need not be computed.
    #[must_use]
    pub fn abandoned(&self) -> bool {
        match self {
            MainLoopRequest::Scrape(reply) => reply.is_closed(),
            MainLoopRequest::Readiness(reply) => reply.is_closed(),
            MainLoopRequest::Serving(reply) => reply.is_closed(),
        }
    }
}

/// Readiness of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReadinessReport {
    /// Every configured listener.
    pub listeners: Vec<ListenerReadiness>,
}

/// Readiness of one listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerReadiness {
    /// Its name.
    pub name: Arc<str>,
    /// Whether it serves.
    pub readiness: ReadinessState,
}

/// Whether a listener serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadinessState {
    /// Attached, and has had its first downstream set.
    Ready,
    /// Its datapath is not in place, for this reason.
    NotAttached(String),
    /// No downstream set has come yet.
    NoDownstreamSet,
}

/// Which listeners forward.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServingReport {
    /// Every configured listener.
    pub listeners: Vec<ListenerServing>,
}

/// Whether one listener forwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerServing {
    /// Its name.
    pub name: Arc<str>,
    /// It is ready and has a usable downstream.
    pub serves: bool,
    /// To how many downstreams, or why not.
    pub detail: String,
}

/// Time-outs and the number of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// How long the event loop may take to reply.
    pub answer: Duration,
    /// How long a client may take to send its request.
    pub headers: Duration,
    /// How long a connection may last in total, which bounds clients that do not read their response.
    pub connection: Duration,
    /// Open connections from other hosts. One more closes an idle one (see `connections`), or is refused.
    pub connections: usize,
    /// Open connections from one other host: an IPv4 address, or an IPv6 /64. One more closes the oldest idle one that
    /// has had its `grace`, or is refused.
    pub per_source: usize,
    /// Open connections from this host, at least 1. Other hosts cannot take these places. One more closes the oldest idle
    /// one, or waits.
    pub own_host: usize,
    /// How long a connection is not closed in favour of another from the same host: time for its request to arrive.
    pub grace: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            answer: Duration::from_secs(2),
            headers: Duration::from_secs(5),
            connection: Duration::from_secs(30),
            connections: 64,
            per_source: 8,
            own_host: 32,
            grace: Duration::from_millis(100),
        }
    }
}

/// A bound port that is not served yet.
#[derive(Debug)]
pub struct MetricsListener {
    listener: Arc<TcpListener>,
    address: SocketAddr,
    path: String,
}

impl MetricsListener {
    /// Binds the configured address and port.
    ///
    /// # Errors
    /// When the port is in use, the address is not this host's, privileges are missing, or `metrics.path` is the path of a
    /// probe.
    pub fn new(config: &MetricsConfig) -> anyhow::Result<Self> {
        if is_probe_path(&config.path) {
            bail!("metrics.path `{}` is the path of a probe; choose another, such as `/metrics`", config.path);
        }
        let listener = listen(config.bind).map_err(|e| bind_error(config.bind, &e))?;
        warn_of_short_queue();
        let address = listener.local_addr().context("cannot read the metrics socket's address")?;
        Ok(MetricsListener { listener: Arc::new(listener), address, path: config.path.clone() })
    }

    /// The bound address and port; port 0 in the configuration lets the kernel choose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts the thread. Its requests arrive at the returned receiver. Several may share a wake-up, so the event loop takes all
    /// of them at each.
    ///
    /// # Errors
    /// When the kernel refuses a thread or an epoll instance.
    pub fn serve(
        self,
        waker: Arc<Waker>,
        limits: HttpLimits,
    ) -> anyhow::Result<(MetricsServer, Receiver<MainLoopRequest>)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .context("cannot set up the HTTP endpoint")?;
        let listener = {
            let _inside = runtime.enter();
            let listener = self.listener.try_clone().and_then(tokio::net::TcpListener::from_std);
            listener.context("cannot set up the HTTP endpoint")?
        };
        // Each connection has at most one pending request, so a full channel means a stalled event loop.
        let (requests, receiver) = mpsc::sync_channel(limits.connections + limits.own_host.max(1));
        let main_loop = routes::MainLoopHandle { requests, waker, timeout: limits.answer };
        let site = Arc::new(routes::HttpRoutes { main_loop, metrics_path: self.path });
        let (stop, stopped) = oneshot::channel::<()>();
        let (ended, done) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("fo-http".to_owned())
            .spawn(move || {
                let _ended = ended;
                runtime.block_on(async {
                    tokio::select! {
                        biased;
                        _ = stopped => {}
                        () = connections::accept(listener, site, limits) => {}
                    }
                });
                // Open connections end with the runtime.
                drop(runtime);
            })
            .context("cannot start the HTTP thread")?;
        Ok((
            MetricsServer {
                address: self.address,
                listener: self.listener,
                running: Some(HttpThread { stop, done, thread }),
            },
            receiver,
        ))
    }
}

fn is_probe_path(path: &str) -> bool {
    path == HEALTH_PATH || path == READY_PATH || routes::serving_target(path).is_some()
}

/// A non-blocking listening socket with a long queue.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Logs that the kernel shortens the queue, if it does. A process without /proc is not told.
fn warn_of_short_queue() {
    let limit = std::fs::read_to_string("/proc/sys/net/core/somaxconn").ok().and_then(|text| text.trim().parse().ok());
    if let Some(limit) = limit.filter(|limit: &i32| *limit < BACKLOG) {
        tracing::info!(
            "net.core.somaxconn = {limit} limits the queue of new connections to the metrics port, which would be \
             {BACKLOG}; a flood of connections fills it sooner. To raise it: `sysctl -w net.core.somaxconn={BACKLOG}`"
        );
    }
}

fn bind_error(address: SocketAddr, error: &std::io::Error) -> anyhow::Error {
    let (what, fix) = match error.kind() {
        ErrorKind::AddrInUse => (
            "address already in use".to_owned(),
            format!(
                "stop the program that uses it (`ss -ltnp sport = :{}` shows it) or change metrics.bind",
                address.port()
            ),
        ),
        ErrorKind::AddrNotAvailable => (
            "this host has no such address".to_owned(),
            "set metrics.bind to one that `ip address` shows, or to 0.0.0.0".to_owned(),
        ),
        ErrorKind::PermissionDenied => (
            "permission denied".to_owned(),
            "ports below 1024 need CAP_NET_BIND_SERVICE; grant it or change the port in metrics.bind".to_owned(),
        ),
        _ => (error.to_string(), "check metrics.bind".to_owned()),
    };
    anyhow!("cannot serve metrics on {address}: {what}; {fix}")
}

/// The running endpoint. Dropping it shuts it down.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    /// The same socket as the thread's, and as a successor's on the same port.
    listener: Arc<TcpListener>,
    running: Option<HttpThread>,
}

#[derive(Debug)]
struct HttpThread {
    stop: oneshot::Sender<()>,
    /// Disconnected once the thread has ended.
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

impl MetricsServer {
    /// How long a shutdown waits for the thread, which may be rendering a page for very many downstreams.
    const SHUTDOWN: Duration = Duration::from_millis(100);

    /// The served address and port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same port, to be served with the metrics at another path. This server can be shut down after that; no connection
    /// is refused in between.
    #[must_use]
    pub fn with_path(&self, path: &str) -> MetricsListener {
        MetricsListener { listener: Arc::clone(&self.listener), address: self.address, path: path.to_owned() }
    }

    /// Closes the port and all connections and ends the thread, within 100 ms.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let Some(HttpThread { stop, done, thread }) = self.running.take() else { return };
        // Fails if the thread has ended already.
        let _ = stop.send(());
        // The thread may take a while to close the port, which its successor may need.
        if Arc::strong_count(&self.listener) == 1 {
            let _ = socket2::SockRef::from(&*self.listener).shutdown(std::net::Shutdown::Both);
        }
        match done.recv_timeout(Self::SHUTDOWN) {
            Err(RecvTimeoutError::Timeout) => tracing::warn!("the HTTP thread is busy; stopping without it"),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                if thread.join().is_err() {
                    tracing::error!("the HTTP thread had panicked");
                }
            }
        }
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.stop();
    }
}
