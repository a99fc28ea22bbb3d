//! Accepts connections, and limits their number.
//!
//! Every connection carries one request. A connection waits either for its client (to send a
//! request, to read a response) or for the event loop. The latter ends by itself within [`HttpLimits::answer`]; of the
//! former, the oldest gives way when a new connection finds all places taken and the oldest has had its
//! [`HttpLimits::grace`]. So idle connections do not block a scrape. While no connection can
//! give way, new ones wait in the kernel's queue.

use std::collections::VecDeque;
use std::convert::Infallible;
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

/// Accepts and serves connections until it is cancelled.
pub(super) async fn accept(listener: TcpListener, site: Arc<HttpRoutes>, limits: HttpLimits) {
    let mut connections = HttpConnections { open: VecDeque::new(), progress: Arc::new(Notify::new()), limits };
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if std::mem::take(&mut failing) {
                    info!("connections for metrics are accepted again");
                }
                connections.make_room().await;
                connections.add(stream, Arc::clone(&site));
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

/// The open connections, oldest first.
struct HttpConnections {
    open: VecDeque<HttpConnection>,
    /// Notified when a connection stops waiting for the event loop, and when it ends.
    progress: Arc<Notify>,
    limits: HttpLimits,
}

struct HttpConnection {
    task: AbortHandle,
    since: Instant,
    /// Set while the connection waits for the event loop, not for its client.
    busy: Arc<AtomicBool>,
}

impl HttpConnections {
    async fn make_room(&mut self) {
        loop {
            self.open.retain(|connection| !connection.task.is_finished());
            if self.open.len() < self.limits.connections.max(1) {
                return;
            }
            let idle = self.open.iter().position(|connection| !connection.busy.load(Ordering::Relaxed));
            let Some(oldest) = idle else {
                self.progress.notified().await;
                continue;
            };
            let grace = self.limits.grace.saturating_sub(self.open[oldest].since.elapsed());
            if grace.is_zero() {
                self.open[oldest].task.abort();
                self.open.remove(oldest);
            } else {
                // Either way, the loop checks again.
                let _ = tokio::time::timeout(grace, self.progress.notified()).await;
            }
        }
    }

    fn add(&mut self, stream: TcpStream, site: Arc<HttpRoutes>) {
        let busy = Arc::new(AtomicBool::new(false));
        let work = BusyFlag { busy: Arc::clone(&busy), progress: Arc::clone(&self.progress) };
        let task = tokio::spawn(serve(stream, site, work, self.limits)).abort_handle();
        self.open.push_back(HttpConnection { task, since: Instant::now(), busy });
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
