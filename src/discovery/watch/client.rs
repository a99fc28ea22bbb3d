//! The HTTP client of one Service's watch.
//!
//! kube's own stack retries on its own (up to 15 times, up to 1,000 s apart), logs each attempt and waits forever on a
//! silent connection. This client reports each failure instead, records what happens in the [`ConnectionState`], gives every
//! read a timeout, and delays the renewal of watches that break at once.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, Result};
use http::header::{RETRY_AFTER, USER_AGENT};
use http::{HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::{Bytes, Incoming};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::Client;
use kube::client::{Body, ConfigExt};
use tokio::time::{Instant, Sleep};
use tower::{BoxError, ServiceBuilder, service_fn};

use super::super::DiscoveryTimeouts;
use super::backoff::Backoff;
use super::connection_state::ConnectionState;

/// TCP keepalive: first probe and interval. After [`KEEPALIVE_RETRIES`] unanswered probes the kernel closes the connection, so a
/// lost network is noticed within a minute without a request to the API server.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_RETRIES: u32 = 3;

/// The most time for the TCP handshake: one repetition of the SYN, after 1 s. With the wait after a failed attempt, a server that
/// returns after a network outage is reached within 2 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A resumed watch that is still open after this long works: a version that is too old is refused at once.
const RESUME_GRACE: Duration = Duration::from_millis(250);

const AGENT: &str = concat!("udp-fanout/", env!("CARGO_PKG_VERSION"));

/// A client with the credentials of `config`. It connects with the first request.
///
/// # Errors
/// If the credentials cannot be used, for example an unreadable certificate.
pub(super) fn connect(
    config: &kube::Config,
    limits: DiscoveryTimeouts,
    connection: Arc<ConnectionState>,
) -> Result<Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(limits.request_timeout.min(CONNECT_TIMEOUT)));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE));
    tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
    let tls = config.rustls_https_connector_with_connector(tcp).context("cannot prepare TLS to the API server")?;
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(limits.request_timeout)
        .build(tls);
    let exchange = service_fn(move |mut request: Request<Body>| {
        let (http, connection) = (http.clone(), connection.clone());
        // For the API server's audit log and its administrators.
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(AGENT));
        async move {
            let watch = is_watch(&request);
            if watch {
                delay_short_watches(&connection, &limits).await;
            }
            let answer = tokio::time::timeout(limits.request_timeout, http.request(request)).await;
            let answer = answer.map_err(|_| ApiTimeout(limits.request_timeout))?.map_err(BoxError::from)?;
            connection.set_retry_after(retry_after(&answer));
            let watch = watch && answer.status().is_success();
            if watch {
                connection.watch_opened();
            }
            let timeout = if watch { limits.stall_timeout } else { limits.request_timeout };
            Ok::<_, BoxError>(answer.map(|body| TimedBody::new(body, timeout, watch.then_some(connection))))
        }
    });
    let stack = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("cannot prepare the credentials for the API server")?)
        .layer(config.extra_headers_layer().context("cannot prepare the headers for the API server")?)
        .map_err(BoxError::from)
        .service(exchange);
    Ok(Client::new(stack, config.default_namespace.clone()))
}

/// The header `Retry-After` of a reply that is an error. kube-apiserver always gives seconds.
fn retry_after<B>(answer: &Response<B>) -> Option<Duration> {
    if answer.status().is_success() {
        return None;
    }
    answer.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

fn is_watch(request: &Request<Body>) -> bool {
    request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"))
}

/// Waits before a watch if the previous ones were short: kube's watcher itself renews an ended watch at once.
async fn delay_short_watches(connection: &ConnectionState, limits: &DiscoveryTimeouts) {
    let short = connection.count_short_watches(limits.short_watch);
    if short > 1 {
        let backoff = Backoff::new(limits.backoff_min, limits.backoff_max);
        tokio::time::sleep(backoff.wait(short - 1)).await;
    }
}

/// A response body that fails after `timeout` without data. A watch's body also records activity and stalls.
struct TimedBody {
    body: Incoming,
    timeout: Duration,
    deadline: Pin<Box<Sleep>>,
    watch: Option<Arc<ConnectionState>>,
    /// When an open watch counts as working; none afterwards.
    grace: Option<Pin<Box<Sleep>>>,
}

impl TimedBody {
    fn new(body: Incoming, timeout: Duration, watch: Option<Arc<ConnectionState>>) -> TimedBody {
        let grace = watch.is_some().then(|| Box::pin(tokio::time::sleep(RESUME_GRACE.min(timeout))));
        TimedBody { body, timeout, deadline: Box::pin(tokio::time::sleep(timeout)), watch, grace }
    }
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            if matches!(frame, Some(Ok(_))) {
                this.deadline.as_mut().reset(Instant::now() + this.timeout);
                if let Some(connection) = &this.watch {
                    connection.record_activity();
                }
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)));
        }
        if let (Some(connection), Some(grace)) = (&this.watch, &mut this.grace)
            && grace.as_mut().poll(cx).is_ready()
        {
            this.grace = None;
            connection.confirm_watch();
        }
        ready!(this.deadline.as_mut().poll(cx));
        if let Some(connection) = &this.watch {
            connection.record_stall();
        }
        Poll::Ready(Some(Err(ApiTimeout(this.timeout).into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The API server sent nothing for this long.
#[derive(Debug)]
pub(super) struct ApiTimeout(Duration);

impl fmt::Display for ApiTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the API server sent nothing for {:?}", self.0)
    }
}

impl std::error::Error for ApiTimeout {}
