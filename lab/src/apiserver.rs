//! A small Kubernetes API server for tests: the real wire protocol, none of our code.
//!
//! TLS with an authority made on the spot, bearer tokens, RBAC, API discovery, GET, LIST in pages and WATCH with
//! resource versions, bookmarks, `410 Gone` and chunked streaming, written after the API concepts in the Kubernetes
//! documentation and the behaviour of kube-apiserver. A test drives it from outside: it changes objects, forgets
//! history, goes away and comes back on the same port, cuts, freezes or slows its connections, takes rights and
//! tokens away. It runs in a thread of its own and listens on 127.0.0.1 only.

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

/// No wait for anything lasts longer than this: something is wrong then.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The user behind the token that works.
pub const USER: &str = "system:serviceaccount:udp-fanout:udp-fanout";

/// A request as the server saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Without the query.
    pub path: String,
    /// Decoded, in the order given.
    pub query: Vec<(String, String)>,
    /// The status it was answered with.
    pub code: u16,
}

impl Seen {
    /// The first value of a query parameter.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.query.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// A watch, not a list.
    pub fn is_watch(&self) -> bool {
        self.get("watch").is_some_and(|value| value == "true" || value == "1")
    }

    /// A list of EndpointSlices that was answered.
    pub fn is_list(&self) -> bool {
        !self.is_watch() && self.path.ends_with("/endpointslices") && self.code == 200
    }
}

/// All that the server knows and how it is to behave.
#[derive(Default)]
pub struct State {
    store: Store,
    /// Served versions of discovery.k8s.io, preferred first.
    versions: Vec<String>,
    tokens: Vec<String>,
    rules: Vec<Rule>,
    seen: Vec<Seen>,
    /// Answers to give to the next requests, whatever they ask.
    canned: Vec<(u16, Value)>,
    /// Bodies are written in pieces of this size with this pause between them.
    drip: Option<(usize, Duration)>,
    /// Nothing is written while this is set.
    frozen: bool,
    /// Every watch ends as soon as it is open.
    hang_up: bool,
    /// Watches open now.
    watches: usize,
    /// Requests that no genuine server would accept.
    violations: Vec<String>,
}

/// State, and how to wait for it to change.
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The same for tasks.
    version: tokio::sync::watch::Sender<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that gives up while it looks must not make the others' cleaning up fail as well.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        self.version.send_modify(|version| *version += 1);
        result
    }
}

/// The running server. Dropping it ends it.
pub struct ApiServer {
    shared: Arc<Shared>,
    files: Files,
    orders: Option<tokio::sync::mpsc::UnboundedSender<Order>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ApiServer {
    /// A server that allows [`USER`] to list and watch EndpointSlices and nothing else but API discovery.
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

    /// A kubeconfig for it: current context's namespace `default`, token in a file.
    pub fn kubeconfig(&self) -> PathBuf {
        self.files.kubeconfig()
    }

    /// Creates or replaces an object. Kind and version are filled in.
    pub fn apply(&self, kind: Kind, object: Value) {
        self.shared.change(|state| state.store.apply(kind, object));
    }

    /// Several objects, each a change of its own.
    pub fn apply_all(&self, kind: Kind, objects: impl IntoIterator<Item = Value>) {
        for object in objects {
            self.apply(kind, object);
        }
    }

    /// Deletes an object, which must exist.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        self.shared.change(|state| state.store.delete(kind, namespace, name));
    }

    /// The version of the last change.
    pub fn resource_version(&self) -> u64 {
        self.shared.lock().store.version()
    }

    /// Forgets all history, as etcd does every few minutes: older versions are answered 410 from now on.
    pub fn compact(&self) {
        self.shared.change(|state| state.store.compact());
    }

    /// Goes back in time, as after a restore from a backup: the objects stay, their versions start low again. Only while stopped.
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

    /// Puts another token into the file that the kubeconfig names.
    pub fn hand_out_token(&self, token: &str) {
        self.files.write_token(token);
    }

    /// A new certificate by a new authority, for new connections; the kubeconfig's file has the new authority.
    pub fn rotate_authority(&mut self) {
        let tls = self.files.rotate();
        self.order(|done| Order::Tls(tls, done));
    }

    /// The next requests get these answers, one each.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = (u16, Value)>) {
        self.shared.change(|state| state.canned.extend(answers));
    }

    /// Sends everyone who watches a bookmark of the latest version.
    pub fn bookmark(&self) {
        self.shared.change(|state| {
            let version = state.store.version();
            state.store.signal(Signal::Bookmark(version));
        });
    }

    /// Ends all open watches in good order, as when their time is up.
    pub fn end_watches(&self) {
        self.shared.change(|state| state.store.signal(Signal::End));
    }

    /// Sends this line to everyone who watches, as if it were an event.
    pub fn send_line(&self, line: &str) {
        self.shared.change(|state| state.store.signal(Signal::Line(line.to_owned())));
    }

    /// Accepts watches and ends them at once, as a proxy without a server behind it may.
    pub fn hang_up(&self, hang_up: bool) {
        self.shared.change(|state| state.hang_up = hang_up);
    }

    /// Keeps connections open and writes nothing to them.
    pub fn freeze(&self, frozen: bool) {
        self.shared.change(|state| state.frozen = frozen);
    }

    /// Writes all bodies in pieces with pauses from now on.
    pub fn drip(&self, drip: Option<(usize, Duration)>) {
        self.shared.change(|state| state.drip = drip);
    }

    /// Breaks all connections without a word of TLS.
    pub fn cut(&self) {
        self.order(Order::Cut);
    }

    /// Stops listening and breaks all connections.
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

    /// Every request so far, in order of their answers.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// Open watches.
    pub fn watches(&self) -> usize {
        self.shared.lock().watches
    }

    /// Waits until this is true of all requests so far.
    pub fn wait_for(&self, what: &str, mut condition: impl FnMut(&[Seen]) -> bool) {
        self.wait(what, |state| condition(&state.seen));
    }

    /// Waits until so many watches are open.
    pub fn wait_for_watches(&self, number: usize) {
        self.wait(&format!("{number} watches"), |state| state.watches == number);
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&State) -> bool) {
        let until = Instant::now() + DEADLINE;
        let mut state = self.shared.lock();
        while !condition(&state) {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not come about; requests: {:#?}", state.seen);
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
            assert!(violations.is_empty(), "requests that no genuine API server would accept: {violations:#?}");
        }
    }
}
