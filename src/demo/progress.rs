//! Progress of what takes longer than two seconds.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use udp_fanout_lab::traffic::Progress;

use super::report::with_thousands;
use crate::output::print;

/// How long a step may take before the demo says that it is still at it, and how often it repeats that.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);
/// How often the count is redrawn on a terminal.
const REDRAW_INTERVAL: Duration = Duration::from_millis(50);

/// Runs `work`. Calls `report` in intervals while it runs, and returns what `work` returned.
fn report_while<T>(interval: Duration, mut report: impl FnMut() + Send, work: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        let (done, wait) = mpsc::channel::<()>();
        scope.spawn(move || {
            while wait.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                report();
            }
        });
        let outcome = work();
        drop(done);
        outcome
    })
}

/// Runs `work`, and prints what it is doing every two seconds until it is done.
pub(super) fn announce_if_slow<T>(step: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let report = || print_best_effort(&format!("{step}: {} s so far\n", start.elapsed().as_secs()));
    report_while(REPORT_INTERVAL, report, work)
}

/// Runs `work` and meanwhile prints how many datagrams were sent and have arrived: in place on a terminal, otherwise a
/// line every two seconds. Prints the final count as well.
pub(super) fn show_progress<T>(progress: &Arc<Progress>, count: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let terminal = io::stdout().is_terminal();
    let report = || {
        let (sent, arrived) = progress.now();
        // The two counts are read one after the other.
        let [sent, count, arrived] = [sent, count, arrived.min(sent)].map(with_thousands);
        let line = format!("{sent} of {count} sent, {arrived} arrived");
        print_best_effort(&if terminal { format!("\r\x1b[K{line}") } else { format!("{line}\n") });
    };
    let interval = if terminal { REDRAW_INTERVAL } else { REPORT_INTERVAL };
    let outcome = report_while(interval, report, work);
    report();
    print_best_effort(if terminal { "\n\n" } else { "\n" });
    outcome
}

/// Progress is worth no error: the results are printed, or fail, by themselves.
fn print_best_effort(text: &str) {
    let _ = print(text.as_bytes());
}
