//! Runs the system's resolver (`getaddrinfo`), which honours `/etc/hosts`, `/etc/nsswitch.conf` and `/etc/resolv.conf`.
//!
//! A call blocks and cannot be aborted, so each runs on one of a few threads, `fo-dns-N`, started on demand. The daemon does
//! not wait for them when it ends.

use std::fmt;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use mio::Waker;

/// The most concurrent lookups: enough that a few silent name servers do not delay the other names.
const MAX_THREADS: usize = 8;

/// The result of a lookup.
#[derive(Debug)]
pub struct LookupResult {
    /// The name.
    pub host: Arc<str>,
    /// The addresses, or the resolver's error.
    pub addresses: Result<Vec<IpAddr>, String>,
}

/// Resolves a name. Blocks, possibly for many seconds.
pub type ResolveFn = fn(&str) -> Result<Vec<IpAddr>, String>;

/// The threads that look names up.
pub struct LookupPool {
    resolve: ResolveFn,
    waker: Arc<Waker>,
    jobs: Sender<Arc<str>>,
    /// Shared by the threads; one at a time waits for a job.
    inbox: Arc<Mutex<Receiver<Arc<str>>>>,
    outbox: Sender<LookupResult>,
    answers: Receiver<LookupResult>,
    threads: usize,
    /// Submitted lookups without a result.
    outstanding: usize,
}

impl fmt::Debug for LookupPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LookupPool").field("threads", &self.threads).field("outstanding", &self.outstanding).finish()
    }
}

impl LookupPool {
    /// A pool without threads; they start on demand. Wakes `waker` after each result.
    #[must_use]
    pub fn new(waker: Arc<Waker>, resolve: ResolveFn) -> LookupPool {
        let (jobs, inbox) = mpsc::channel();
        let (outbox, answers) = mpsc::channel();
        let inbox = Arc::new(Mutex::new(inbox));
        LookupPool { resolve, waker, jobs, inbox, outbox, answers, threads: 0, outstanding: 0 }
    }

    /// Queues a lookup. [`next_result`](Self::next_result) returns its result later.
    pub fn submit(&mut self, host: Arc<str>) {
        self.outstanding += 1;
        if self.outstanding > self.threads && self.threads < MAX_THREADS {
            match self.start_thread() {
                Ok(()) => self.threads += 1,
                Err(error) if self.threads == 0 => {
                    let addresses = Err(format!("cannot start a thread (fo-dns) for the lookup: {error}"));
                    // Cannot fail: `self` owns the receiver.
                    let _ = self.outbox.send(LookupResult { host, addresses });
                    return;
                }
                // The existing threads do it.
                Err(_) => {}
            }
        }
        // Cannot fail: `self` owns the receiver.
        let _ = self.jobs.send(host);
    }

    /// The next result, if there is one.
    pub fn next_result(&mut self) -> Option<LookupResult> {
        let answer = self.answers.try_recv().ok()?;
        self.outstanding -= 1;
        Some(answer)
    }

    fn start_thread(&self) -> std::io::Result<()> {
        let (inbox, outbox, waker) = (Arc::clone(&self.inbox), self.outbox.clone(), Arc::clone(&self.waker));
        let resolve = self.resolve;
        let body = move || {
            // Ends when the pool is dropped.
            loop {
                let job = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(host) = job else { return };
                let addresses = resolve(&host);
                if outbox.send(LookupResult { host, addresses }).is_err() {
                    return;
                }
                if let Err(error) = waker.wake() {
                    tracing::error!(%error, "cannot wake the event loop: it applies the addresses only when another event wakes it");
                }
            }
        };
        std::thread::Builder::new().name(format!("fo-dns-{}", self.threads)).spawn(body).map(drop)
    }
}

/// Resolves `host` with `getaddrinfo`.
///
/// # Errors
/// The resolver's message. It may be the same for an outage and for a name that does not exist.
pub fn resolve_with_system(host: &str) -> Result<Vec<IpAddr>, String> {
    // The port is not used.
    let found = (host, 0).to_socket_addrs().map_err(|error| {
        let text = error.to_string();
        text.strip_prefix("failed to lookup address information: ").unwrap_or(&text).to_owned()
    })?;
    Ok(found.map(|address| address.ip().to_canonical()).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Barrier;
    use std::time::Duration;

    use mio::{Events, Poll, Token};

    use super::*;

    fn answers(poll: &mut Poll, lookups: &mut LookupPool, count: usize) -> Vec<LookupResult> {
        let mut events = Events::with_capacity(8);
        let mut answers = Vec::new();
        while answers.len() < count {
            poll.poll(&mut events, Some(Duration::from_secs(20))).unwrap();
            assert!(!events.is_empty(), "{answers:?}");
            answers.extend(std::iter::from_fn(|| lookups.next_result()));
        }
        answers
    }

    #[test]
    fn the_system_knows_this_host() {
        let mut poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
        let mut lookups = LookupPool::new(waker, resolve_with_system);
        lookups.submit("localhost".into());
        // Longer than any name may be, so that no server is asked.
        let impossible = "x.".repeat(200);
        lookups.submit(impossible.as_str().into());
        let answers = answers(&mut poll, &mut lookups, 2);
        let of = |host: &str| &answers.iter().find(|answer| &*answer.host == host).unwrap().addresses;
        assert!(of("localhost").as_ref().unwrap().iter().all(IpAddr::is_loopback));
        assert!(!of(&impossible).as_ref().unwrap_err().is_empty());
        assert_eq!(lookups.outstanding, 0);
    }

    /// All threads but one are held up by names whose servers are silent.
    #[test]
    fn silent_servers_hold_up_nobody_else() {
        static SILENCE: Barrier = Barrier::new(MAX_THREADS);
        fn resolve(host: &str) -> Result<Vec<IpAddr>, String> {
            if host.starts_with("silent") {
                SILENCE.wait();
            }
            Ok(vec![])
        }
        let mut poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
        let mut lookups = LookupPool::new(waker, resolve);
        (1..MAX_THREADS).for_each(|n| lookups.submit(format!("silent{n}").into()));
        (0..20).for_each(|n| lookups.submit(format!("quick{n}").into()));
        let quick = answers(&mut poll, &mut lookups, 20);
        assert!(quick.iter().all(|answer| answer.host.starts_with("quick")));
        assert_eq!((lookups.threads, lookups.outstanding), (MAX_THREADS, MAX_THREADS - 1));
        SILENCE.wait();
        let rest: BTreeSet<Arc<str>> =
            answers(&mut poll, &mut lookups, MAX_THREADS - 1).into_iter().map(|a| a.host).collect();
        assert_eq!(rest.len(), MAX_THREADS - 1);
    }
}
