//! Answers HTTP requests: asks the event loop, and renders the reply.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response, StatusCode};
use mio::Waker;
use tokio::sync::oneshot;

use super::{HEALTH_PATH, MainLoopRequest, READY_PATH, ReadinessReport, ReadinessState, SERVING_PATH, ServingReport};
use crate::metrics::render;
use crate::version;

type HttpResponse = Response<Full<Bytes>>;

/// The pages.
pub(super) struct HttpRoutes {
    pub(super) main_loop: MainLoopHandle,
    pub(super) metrics_path: String,
}

/// Sends requests to the event loop.
pub(super) struct MainLoopHandle {
    pub(super) requests: SyncSender<MainLoopRequest>,
    pub(super) waker: Arc<Waker>,
    pub(super) timeout: Duration,
}

/// Why the event loop did not reply.
enum MainLoopError {
    Stalled(Duration),
    Ended,
    Dropped,
    NotWoken(std::io::Error),
}

impl fmt::Display for MainLoopError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MainLoopError::Stalled(timeout) => write!(f, "the main loop has not replied for {timeout:?}"),
            MainLoopError::Ended => f.write_str("the main loop has ended"),
            MainLoopError::Dropped => f.write_str("the main loop has dropped the request"),
            MainLoopError::NotWoken(error) => write!(f, "the main loop cannot be woken: {error}"),
        }
    }
}

impl MainLoopHandle {
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> MainLoopRequest) -> Result<T, MainLoopError> {
        let (reply, answer) = oneshot::channel();
        self.requests.try_send(request(reply)).map_err(|error| match error {
            TrySendError::Full(_) => MainLoopError::Stalled(self.timeout),
            TrySendError::Disconnected(_) => MainLoopError::Ended,
        })?;
        self.waker.wake().map_err(MainLoopError::NotWoken)?;
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(MainLoopError::Dropped),
            Err(_) => Err(MainLoopError::Stalled(self.timeout)),
        }
    }
}

impl HttpRoutes {
    pub(super) async fn answer(&self, method: &Method, path: &str) -> HttpResponse {
        let known = [self.metrics_path.as_str(), HEALTH_PATH, READY_PATH, "/"].contains(&path);
        let serving = serving_target(path);
        if !known && serving.is_none() {
            return text(StatusCode::NOT_FOUND, format!("no such page; there are:\n{}", self.index()));
        }
        if !matches!(*method, Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".to_owned());
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        // The configured path comes first: it may be `/`.
        if let Some(target) = serving {
            return self.serving(target).await;
        }
        match path {
            _ if path == self.metrics_path => self.metrics().await,
            HEALTH_PATH => self.healthz().await,
            READY_PATH => self.readyz().await,
            _ => text(StatusCode::OK, format!("udp-fanout {}\n{}", version::long(), self.index())),
        }
    }

    fn index(&self) -> String {
        let pages = [
            (self.metrics_path.as_str(), "metrics in Prometheus' text format"),
            (HEALTH_PATH, "200 while the main loop runs"),
            (READY_PATH, "200 once every listener is attached and has had its first downstream set"),
            (SERVING_PATH, "200 while every listener has a usable downstream; /serving/LISTENER is for one listener"),
        ];
        let mut index = String::new();
        for (path, what) in pages {
            // Writing to a String cannot fail.
            let _ = writeln!(index, "{path:<12} {what}");
        }
        index
    }

    async fn metrics(&self) -> HttpResponse {
        match self.main_loop.ask(MainLoopRequest::Scrape).await {
            Ok(Ok(snapshot)) => {
                page(StatusCode::OK, HeaderValue::from_static(render::CONTENT_TYPE), render::render(&snapshot))
            }
            Ok(Err(error)) => unavailable(format!("{error:#}")),
            Err(error) => unavailable(error),
        }
    }

    async fn healthz(&self) -> HttpResponse {
        match self.main_loop.ask(MainLoopRequest::Readiness).await {
            Ok(_) => text(StatusCode::OK, "ok\n".to_owned()),
            Err(error) => unavailable(error),
        }
    }

    async fn serving(&self, target: ServingTarget<'_>) -> HttpResponse {
        match self.main_loop.ask(MainLoopRequest::Serving).await {
            Ok(report) => serving_page(&report, target),
            Err(error) => unavailable(error),
        }
    }

    async fn readyz(&self) -> HttpResponse {
        match self.main_loop.ask(MainLoopRequest::Readiness).await {
            Ok(health) => readiness(&health),
            Err(error) => unavailable(error),
        }
    }
}

/// What a path of `/serving` asks for.
#[derive(Debug, Clone, Copy)]
pub(super) enum ServingTarget<'a> {
    AllListeners,
    Listener(&'a str),
}

/// None for every other path.
pub(super) fn serving_target(path: &str) -> Option<ServingTarget<'_>> {
    let rest = path.strip_prefix(SERVING_PATH)?;
    if rest.is_empty() {
        Some(ServingTarget::AllListeners)
    } else {
        rest.strip_prefix('/').map(ServingTarget::Listener)
    }
}

fn serving_page(report: &ServingReport, target: ServingTarget<'_>) -> HttpResponse {
    let wanted = |name: &str| match target {
        ServingTarget::AllListeners => true,
        ServingTarget::Listener(wanted) => wanted == name,
    };
    let mut body = String::new();
    let (mut found, mut all) = (false, true);
    for listener in report.listeners.iter().filter(|listener| wanted(&listener.name)) {
        found = true;
        all &= listener.serves;
        // Writing to a String cannot fail.
        let _ = writeln!(body, "listener {}: {}", listener.name, listener.detail);
    }
    match target {
        ServingTarget::Listener(name) if !found => {
            let names: Vec<&str> = report.listeners.iter().map(|listener| &*listener.name).collect();
            text(StatusCode::NOT_FOUND, format!("no listener {name:?}; there are: {}\n", names.join(", ")))
        }
        _ if all => text(StatusCode::OK, body),
        _ => text(StatusCode::SERVICE_UNAVAILABLE, body),
    }
}

fn readiness(health: &ReadinessReport) -> HttpResponse {
    let mut missing = String::new();
    for listener in &health.listeners {
        // Writing to a String cannot fail.
        let _ = match &listener.readiness {
            ReadinessState::Ready => Ok(()),
            ReadinessState::NotAttached(reason) => {
                writeln!(missing, "listener {}: not attached: {reason}", listener.name)
            }
            ReadinessState::NoDownstreamSet => {
                writeln!(missing, "listener {}: waiting for its first downstream set", listener.name)
            }
        };
    }
    if missing.is_empty() {
        text(StatusCode::OK, "ready\n".to_owned())
    } else {
        text(StatusCode::SERVICE_UNAVAILABLE, missing)
    }
}

fn unavailable(reason: impl fmt::Display) -> HttpResponse {
    text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n"))
}

fn text(status: StatusCode, body: String) -> HttpResponse {
    page(status, HeaderValue::from_static("text/plain; charset=utf-8"), body)
}

fn page(status: StatusCode, content_type: HeaderValue, body: String) -> HttpResponse {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    // A cached page would be out of date.
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
