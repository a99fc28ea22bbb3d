//! A small Kubernetes API server for tests: the real wire protocol, without any code of the program.
//!
//! TLS with a generated certificate authority, bearer tokens, RBAC, API discovery, GET, LIST in pages and WATCH with
//! resource versions, bookmarks, `410 Gone` and chunked streaming, written after the API concepts in the Kubernetes
//! documentation and the behaviour of kube-apiserver. A test changes objects, compacts the history, stops
//! and restarts the server on the same port, closes, freezes or slows its connections, and revokes permissions and
//! tokens. The server runs on its own thread and listens on 127.0.0.1 only.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "only tests use this, and a panic is how a test fails")]

mod answer;
mod auth;
mod feed;
mod kubeconfig;
mod serve;
mod store;

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

pub use self::auth::Rule;
use self::kubeconfig::Files;
use self::serve::Order;
pub use self::store::Kind;
use self::store::{Signal, Store};

/// Timeout of every wait. A passing test never reaches it.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The user that the accepted token belongs to.
pub const USER: &str = "system:serviceaccount:udp-fanout:udp-fanout";

/// A request that the server has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The path without the query.
    pub path: String,
    /// Decoded query parameters, in the order of the request.
    pub query: Vec<(String, String)>,
    /// The HTTP status of the response.
    pub code: u16,
}

impl Seen {
    /// The first value of a query parameter.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.query.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// True for a watch, false for a list.
    pub fn is_watch(&self) -> bool {
        self.get("watch").is_some_and(|value| value == "true" || value == "1")
    }

    /// True for a successful list of EndpointSlices.
    pub fn is_list(&self) -> bool {
        !self.is_watch() && self.path.ends_with("/endpointslices") && self.code == 200
    }
}

/// The server's objects, and the behaviour that the test has set.
#[derive(Default)]
pub struct State {
    store: Store,
    /// Served versions of discovery.k8s.io, preferred first.
    versions: Vec<String>,
    tokens: Vec<String>,
    rules: Vec<Rule>,
    seen: Vec<Seen>,
    /// Responses for the next requests, regardless of their content.
    canned: Vec<(u16, Value)>,
    /// Write bodies in pieces of this many bytes, with this pause after each.
    drip: Option<(usize, Duration)>,
    /// Write nothing while this is set.
    frozen: bool,
    /// End every watch as soon as it is open.
    hang_up: bool,
    /// Number of open watches.
    watches: usize,
    /// Requests that kube-apiserver would reject.
    violations: Vec<String>,
}

/// The state, with notifications of its changes.
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Notifies tasks of changes.
    version: tokio::sync::watch::Sender<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panics while it holds the lock must not make the cleanup of others fail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        self.version.send_modify(|version| *version += 1);
        result
    }
}

/// A running server. Dropping it stops the server.
pub struct ApiServer {
    shared: Arc<Shared>,
    files: Files,
    orders: Option<tokio::sync::mpsc::UnboundedSender<Order>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ApiServer {
    /// Starts a server that allows [`USER`] API discovery, and to list and watch EndpointSlices.
    pub fn start() -> ApiServer {
        let state = State {
            versions: vec!["v1".to_owned(), "v1beta1".to_owned()],
            tokens: vec!["token-1".to_owned()],
            rules: vec![Rule::new(&["list", "watch"], "endpointslices")],
            ..State::default()
        };
        let version = tokio::sync::watch::Sender::new(0);
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), version });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let files = Files::new(listener.local_addr().unwrap(), "token-1");
        let (orders, inbox) = tokio::sync::mpsc::unbounded_channel();
        let thread = {
            let (shared, tls) = (shared.clone(), files.tls());
            std::thread::Builder::new()
                .name("apiserver".to_owned())
                .spawn(move || serve::run(listener, tls, shared, inbox))
                .unwrap()
        };
        ApiServer { shared, files, orders: Some(orders), thread: Some(thread) }
    }

    /// The path of a kubeconfig for this server. The current context's namespace is `default`; the token is in a file.
    pub fn kubeconfig(&self) -> PathBuf {
        self.files.kubeconfig()
    }

    /// Creates or replaces an object. The server fills in kind and version.
    pub fn apply(&self, kind: Kind, object: Value) {
        self.shared.change(|state| state.store.apply(kind, object));
    }

    /// Creates or replaces several objects, with one change each.
    pub fn apply_all(&self, kind: Kind, objects: impl IntoIterator<Item = Value>) {
        for object in objects {
            self.apply(kind, object);
        }
    }

    /// Deletes an object, which must exist.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        self.shared.change(|state| state.store.delete(kind, namespace, name));
    }

    /// The resource version of the last change.
    pub fn resource_version(&self) -> u64 {
        self.shared.lock().store.version()
    }

    /// Compacts the history, as etcd does every few minutes: a watch from an older version gets 410 from now on.
    pub fn compact(&self) {
        self.shared.change(|state| state.store.compact());
    }

    /// Resets the resource versions, as after a restore from a backup; the objects stay. Only while the server is stopped.
    pub fn rewind(&self) {
        self.shared.change(|state| state.store.rewind());
    }

    /// Serves these versions of discovery.k8s.io from now on.
    pub fn serve_versions(&self, versions: &[&str]) {
        self.shared.change(|state| state.versions = versions.iter().map(|&version| version.to_owned()).collect());
    }

    /// Replaces all rules.
    pub fn set_rules(&self, rules: &[Rule]) {
        self.shared.change(|state| state.rules = rules.to_vec());
    }

    /// Adds a rule.
    pub fn allow(&self, rule: Rule) {
        self.shared.change(|state| state.rules.push(rule));
    }

    /// Accepts only this token from now on.
    pub fn accept_token(&self, token: &str) {
        self.shared.change(|state| state.tokens = vec![token.to_owned()]);
    }

    /// Writes another token into the kubeconfig's token file.
    pub fn hand_out_token(&self, token: &str) {
        self.files.write_token(token);
    }

    /// Uses a new certificate, by a new authority, for new connections. Writes the authority into the kubeconfig's file.
    pub fn rotate_authority(&mut self) {
        let tls = self.files.rotate();
        self.order(|done| Order::Tls(tls, done));
    }

    /// Answers the next requests with these responses, one each.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = (u16, Value)>) {
        self.shared.change(|state| state.canned.extend(answers));
    }

    /// Sends a bookmark with the latest version on all watches.
    pub fn bookmark(&self) {
        self.shared.change(|state| {
            let version = state.store.version();
            state.store.signal(Signal::Bookmark(version));
        });
    }

    /// Ends all open watches regularly, as at their timeout.
    pub fn end_watches(&self) {
        self.shared.change(|state| state.store.signal(Signal::End));
    }

    /// Sends this line on all watches, as if it were an event.
    pub fn send_line(&self, line: &str) {
        self.shared.change(|state| state.store.signal(Signal::Line(line.to_owned())));
    }

    /// Accepts watches and ends them immediately, as a proxy without a backend may.
    pub fn hang_up(&self, hang_up: bool) {
        self.shared.change(|state| state.hang_up = hang_up);
    }

    /// Keeps connections open without writing to them, until set to false.
    pub fn freeze(&self, frozen: bool) {
        self.shared.change(|state| state.frozen = frozen);
    }

    /// Writes all bodies in pieces of this size with this pause from now on.
    pub fn drip(&self, drip: Option<(usize, Duration)>) {
        self.shared.change(|state| state.drip = drip);
    }

    /// Closes all connections without a TLS close_notify.
    pub fn cut(&self) {
        self.order(Order::Cut);
    }

    /// Stops listening and closes all connections.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }

    /// Listens again on the same port.
    pub fn restart(&self) {
        self.order(Order::Listen);
    }

    fn order(&self, order: impl FnOnce(serve::Done) -> Order) {
        let (done, waiting) = std::sync::mpsc::channel();
        self.orders.as_ref().unwrap().send(order(serve::Done(done))).ok().unwrap();
        waiting.recv_timeout(DEADLINE).unwrap();
    }

    /// All requests so far, in the order of the responses.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// Number of open watches.
    pub fn watches(&self) -> usize {
        self.shared.lock().watches
    }

    /// Waits until the condition holds for the list of all requests so far.
    pub fn wait_for(&self, what: &str, mut condition: impl FnMut(&[Seen]) -> bool) {
        self.wait(what, |state| condition(&state.seen));
    }

    /// Waits until this number of watches is open.
    pub fn wait_for_watches(&self, number: usize) {
        self.wait(&format!("{number} watches"), |state| state.watches == number);
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&State) -> bool) {
        let until = Instant::now() + DEADLINE;
        let mut state = self.shared.lock();
        while !condition(&state) {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "timed out waiting for {what}; requests: {:#?}", state.seen);
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        let violations = std::mem::take(&mut self.shared.lock().violations);
        if !std::thread::panicking() {
            assert!(violations.is_empty(), "requests that kube-apiserver would reject: {violations:#?}");
        }
    }
}
