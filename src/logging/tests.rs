use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use super::*;

/// A writer whose text can be read back.
#[derive(Debug, Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("lock").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Captured {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("lock").clone()).expect("UTF-8")
    }
}

/// What is written while `events` runs.
fn logged(options: Options, surroundings: &Surroundings, events: impl FnOnce()) -> String {
    let captured = Captured::default();
    let writer = captured.clone();
    let subscriber = subscriber(options, surroundings, move || writer.clone()).expect("a subscriber");
    capture::with(subscriber, events);
    captured.text()
}

fn guide_lines() {
    let interface = String::from("eth0");
    tracing::info!(interface, "attached TC eBPF program to ingress");
    tracing::info!(listener_id = %crate::model::ListenerId(0), endpoints = 3_usize, "updated tc_ebpf downstream set");
}

/// Removes what must be a time in RFC 3339, UTC.
fn without_time(line: &str) -> &str {
    let (time, rest) = line.split_once(' ').expect("a time");
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000Z", "{line}");
    rest
}

#[test]
fn text_is_what_the_guide_greps_for() {
    let text = logged(Options::default(), &Surroundings::default(), guide_lines);
    let lines: Vec<_> = text.lines().map(without_time).collect();
    assert_eq!(
        lines,
        [
            r#" INFO attached TC eBPF program to ingress interface="eth0""#,
            " INFO updated tc_ebpf downstream set listener_id=0 endpoints=3",
        ]
    );
}

#[test]
fn the_journal_has_the_time_already() {
    let journal = Surroundings { journal: true, ..Surroundings::default() };
    let text = logged(Options::default(), &journal, guide_lines);
    assert_eq!(text.lines().next(), Some(r#" INFO attached TC eBPF program to ingress interface="eth0""#));
}

#[test]
fn json_is_an_object_a_line() {
    let options = Options { format: Format::Json, ..Options::default() };
    for journal in [false, true] {
        let text = logged(options, &Surroundings { journal, terminal: true, ..Surroundings::default() }, guide_lines);
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["level"], "INFO");
        assert_eq!(lines[0]["message"], "attached TC eBPF program to ingress");
        assert_eq!(lines[0]["interface"], "eth0");
        assert_eq!(lines[1]["endpoints"], 3);
        assert_eq!(without_time(&format!("{} ", lines[0]["timestamp"].as_str().expect("a time"))), "");
    }
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    for (terminal, no_color, coloured) in
        [(false, false, false), (false, true, false), (true, true, false), (true, false, true)]
    {
        let text =
            logged(Options::default(), &Surroundings { terminal, no_color, ..Surroundings::default() }, guide_lines);
        assert_eq!(text.contains('\x1b'), coloured, "terminal {terminal}, NO_COLOR {no_color}");
    }
}

fn one_of_each() {
    tracing::error!("ours 1");
    tracing::warn!("ours 2");
    tracing::info!("ours 3");
    tracing::debug!("ours 4");
    tracing::trace!("ours 5");
    tracing::error!(target: "hyper", "theirs 1");
    tracing::warn!(target: "hyper", "theirs 2");
    tracing::info!(target: "hyper", "theirs 3");
    tracing::trace!(target: "hyper", "theirs 5");
}

fn counts(level: Level, rust_log: Option<&str>) -> (usize, usize) {
    let surroundings = Surroundings { rust_log: rust_log.map(str::to_owned), ..Surroundings::default() };
    let text = logged(Options { level, ..Options::default() }, &surroundings, one_of_each);
    (text.matches("ours").count(), text.matches("theirs").count())
}

#[test]
fn levels_are_ours_and_libraries_stay_quiet() {
    let expected = [
        (Level::Off, (0, 0)),
        (Level::Error, (1, 1)),
        (Level::Warn, (2, 2)),
        (Level::Info, (3, 2)),
        (Level::Debug, (4, 2)),
        (Level::Trace, (5, 2)),
    ];
    for (level, seen) in expected {
        assert_eq!(counts(level, None), seen, "{level:?}");
    }
}

#[test]
fn rust_log_wins() {
    assert_eq!(counts(Level::Off, Some("trace")), (5, 4));
    assert_eq!(counts(Level::Trace, Some("warn,hyper=info")), (2, 3));
    assert_eq!(counts(Level::Trace, Some("off")), (0, 0));
    assert_eq!(counts(Level::Info, Some("")), (3, 2), "empty is as good as unset");
    assert_eq!(counts(Level::Info, Some(" ")), (3, 2), "empty is as good as unset");
}

#[test]
fn a_rust_log_that_makes_no_sense_is_one_clear_line() {
    for directives in ["udp_fanout=loud", "a=b=c", "info,=,"] {
        let Err(error) = filter(Level::Info, Some(directives)) else { panic!("{directives} is accepted") };
        let text = format!("{error:#}");
        assert!(text.starts_with("environment variable RUST_LOG: "), "{text}");
        assert!(text.contains("unset it") && !text.contains('\n'), "{text}");
    }
}

#[test]
fn the_journal_is_known_by_device_and_inode() {
    assert!(is_journal(Some("8:123"), Some((8, 123))));
    for (value, stderr) in [
        (None, Some((8, 123))),
        (Some("8:123"), None),
        (Some("8:123"), Some((8, 124))),
        (Some("9:123"), Some((8, 123))),
        (Some("8"), Some((8, 123))),
        (Some("x:y"), None),
        (None, None),
    ] {
        assert!(!is_journal(value, stderr), "{value:?} {stderr:?}");
    }
}

/// Set in the environment of the processes that the next test starts.
const CHILD: &str = "UDP_FANOUT_TEST_LOGS";

/// Does nothing but in a process started by the test after it.
#[test]
fn logs_in_a_process_of_its_own() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    init(Options { level: Level::Trace, format: Format::Text }).expect("logging starts");
    for _ in 0..3 {
        one_of_each();
    }
    println!("survived");
}

#[test]
fn a_standard_error_that_cannot_be_written_kills_nobody() {
    let (reader, closed_pipe) = std::io::pipe().expect("a pipe");
    drop(reader);
    let full_disk = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    for stderr in [Stdio::from(closed_pipe), Stdio::from(full_disk)] {
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "--nocapture", "logging::tests::logs_in_a_process_of_its_own"])
            .env(CHILD, "1")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(stderr)
            .output()
            .expect("a process");
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("survived"), "{}: {stdout}", output.status);
    }
}
