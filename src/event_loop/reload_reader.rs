//! Reads and checks the configuration file on a thread of its own, so that neither a file system that hangs nor a large file
//! stops the event loop.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mio::Waker;

use crate::config::Config;

/// How long reading may take before it is reported as stalled.
const STALL_REPORT: Duration = Duration::from_secs(5);

/// Why the configuration is read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReloadCause {
    /// `SIGHUP`.
    Signal,
    /// inotify reports that the file may have changed.
    File,
}

impl ReloadCause {
    /// The `cause` in the log.
    pub(super) fn name(self) -> &'static str {
        match self {
            ReloadCause::Signal => "SIGHUP",
            ReloadCause::File => "the file has changed",
        }
    }
}

/// The read under way, if any. Requests that come meanwhile result in one more read.
#[derive(Debug)]
pub(super) struct ConfigReader {
    load: fn(&Path) -> Result<Config>,
    running: Option<RunningRead>,
    /// Another read is wanted after this one: the file may have changed since it was opened.
    queued: Option<ReloadCause>,
}

#[derive(Debug)]
struct RunningRead {
    cause: ReloadCause,
    result: Receiver<Result<Config>>,
    /// When the read is reported as stalled; none once it has been.
    report_due: Option<Instant>,
}

impl ConfigReader {
    /// A reader that reads with `load`, which may block.
    pub(super) fn new(load: fn(&Path) -> Result<Config>) -> ConfigReader {
        ConfigReader { load, running: None, queued: None }
    }

    /// Starts to read the file; `waker` wakes the event loop at the end. If a read is under way, another one follows it.
    ///
    /// # Errors
    /// When no thread can be started, or the read under way has stalled.
    pub(super) fn start(&mut self, path: &Path, cause: ReloadCause, waker: &Arc<Waker>, now: Instant) -> Result<()> {
        if let Some(running) = &self.running {
            // A signal's reload is always answered in the log.
            self.queued = if self.queued == Some(ReloadCause::Signal) { self.queued } else { Some(cause) };
            return if running.report_due.is_some() { Ok(()) } else { Err(stalled(path)) };
        }
        let (sender, result) = mpsc::channel();
        let (load, file, waker) = (self.load, path.to_owned(), Arc::clone(waker));
        let body = move || {
            // Sending fails if the daemon ends.
            if sender.send(load(&file)).is_ok() {
                drop(sender);
                if let Err(error) = waker.wake() {
                    tracing::error!(%error, "cannot wake the event loop for the new configuration");
                }
            }
        };
        let thread = std::thread::Builder::new().name("fo-config".to_owned()).spawn(body);
        thread.with_context(|| format!("{}: cannot start the thread that reads it", path.display()))?;
        self.running = Some(RunningRead { cause, result, report_due: Some(now + STALL_REPORT) });
        Ok(())
    }

    /// What a read that has ended gave, and why the file was read.
    pub(super) fn take_result(&mut self) -> Option<(ReloadCause, Result<Config>)> {
        let running = self.running.as_ref()?;
        let result = match running.result.try_recv() {
            Ok(result) => result,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err(anyhow::anyhow!("the thread that reads the configuration has died")),
        };
        let cause = running.cause;
        self.running = None;
        Some((cause, result))
    }

    /// The request that came while the last read was under way.
    pub(super) fn take_queued(&mut self) -> Option<ReloadCause> {
        self.queued.take_if(|_| self.running.is_none())
    }

    /// The error to report, once, when the read under way takes too long, and why the file is read.
    pub(super) fn take_stall(&mut self, path: &Path, now: Instant) -> Option<(ReloadCause, anyhow::Error)> {
        let running = self.running.as_mut()?;
        running.report_due.take_if(|due| *due <= now)?;
        Some((running.cause, stalled(path)))
    }

    /// True while the file is read and has not been reported as stalled.
    pub(super) fn in_progress(&self) -> bool {
        self.report_due().is_some()
    }

    /// When [`take_stall`](Self::take_stall) is due.
    pub(super) fn report_due(&self) -> Option<Instant> {
        self.running.as_ref().and_then(|running| running.report_due)
    }
}

fn stalled(path: &Path) -> anyhow::Error {
    anyhow::anyhow!(
        "{}: cannot be read within {} seconds; check its file system with `cat`. It is put in force as soon as it can be read",
        path.display(),
        STALL_REPORT.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use mio::{Events, Poll, Token};

    use super::*;

    const PATH: &str = "/etc/c.toml";

    /// Waits until the reader has a result.
    fn wait(poll: &mut Poll, reader: &mut ConfigReader) -> (ReloadCause, String) {
        let mut events = Events::with_capacity(1);
        loop {
            if let Some((cause, result)) = reader.take_result() {
                return (cause, result.unwrap_err().to_string());
            }
            poll.poll(&mut events, Some(Duration::from_secs(10))).unwrap();
            assert!(!events.is_empty(), "nobody woke the loop");
        }
    }

    #[test]
    fn a_read_that_hangs_is_reported_once_and_a_later_request_is_answered_after_it() {
        static FILE_SYSTEM: Mutex<()> = Mutex::new(());
        fn hang(_: &Path) -> Result<Config> {
            drop(FILE_SYSTEM.lock());
            anyhow::bail!("read")
        }
        let mut poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
        let (path, start) = (Path::new(PATH), Instant::now());
        let mut reader = ConfigReader::new(hang);
        let hanging = FILE_SYSTEM.lock().unwrap();

        reader.start(path, ReloadCause::File, &waker, start).unwrap();
        assert!(reader.in_progress() && reader.take_result().is_none());
        reader.start(path, ReloadCause::Signal, &waker, start).unwrap();
        reader.start(path, ReloadCause::File, &waker, start).unwrap();
        assert!(reader.take_queued().is_none(), "one read at a time");
        assert!(reader.take_stall(path, start + STALL_REPORT - Duration::from_millis(1)).is_none());
        let (cause, error) = reader.take_stall(path, reader.report_due().unwrap()).unwrap();
        assert_eq!(cause, ReloadCause::File);
        assert!(error.to_string().starts_with("/etc/c.toml: cannot be read within 5 seconds; "), "{error}");
        assert!(reader.take_stall(path, start + 9 * STALL_REPORT).is_none() && !reader.in_progress());
        assert!(reader.start(path, ReloadCause::Signal, &waker, start).is_err(), "still hangs");

        drop(hanging);
        assert_eq!(wait(&mut poll, &mut reader), (ReloadCause::File, "read".to_owned()));
        assert_eq!(reader.take_queued(), Some(ReloadCause::Signal));
        assert!(reader.take_queued().is_none() && reader.report_due().is_none());
        reader.start(path, ReloadCause::Signal, &waker, start).unwrap();
        assert_eq!(wait(&mut poll, &mut reader).0, ReloadCause::Signal);
    }
}
