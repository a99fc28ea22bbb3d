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

/// The log lines of `events`.
fn logged(options: LogOptions, environment: &LogEnvironment, events: impl FnOnce()) -> String {
    let captured = Captured::default();
    let writer = captured.clone();
    let subscriber = subscriber(options, environment, move || writer.clone()).expect("a subscriber");
    capture::with(subscriber, events);
    captured.text()
}

fn guide_lines() {
    let interface = String::from("eth0");
    tracing::info!(interface, "attached TC eBPF program to ingress");
    tracing::info!(listener_id = %crate::model::ListenerId(0), endpoints = 3_usize, "updated tc_ebpf downstream set");
}

/// Removes the time, which must be in RFC 3339 and UTC.
fn without_time(line: &str) -> &str {
    let (time, rest) = line.split_once(' ').expect("a time");
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000Z", "{line}");
    rest
}

#[test]
fn text_is_what_the_guide_greps_for() {
    let text = logged(LogOptions::default(), &LogEnvironment::default(), guide_lines);
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
    let journal = LogEnvironment { journal: true, ..LogEnvironment::default() };
    let text = logged(LogOptions::default(), &journal, guide_lines);
    assert_eq!(text.lines().next(), Some(r#"<6> INFO attached TC eBPF program to ingress interface="eth0""#));
}

#[test]
fn the_journal_gets_each_lines_priority() {
    let journal = LogEnvironment { journal: true, ..LogEnvironment::default() };
    let all = LogOptions { level: LogLevel::Trace, ..LogOptions::default() };
    let text = logged(all, &journal, one_of_each);
    let ours: Vec<&str> = text.lines().filter(|line| line.contains("ours")).collect();
    assert_eq!(ours, ["<3>ERROR ours 1", "<4> WARN ours 2", "<6> INFO ours 3", "<7>DEBUG ours 4", "<7>TRACE ours 5"]);
    assert!(!logged(all, &LogEnvironment::default(), one_of_each).contains("<3>"));
}

#[test]
fn json_is_one_object_per_line() {
    let options = LogOptions { format: LogFormat::Json, ..LogOptions::default() };
    for journal in [false, true] {
        let text =
            logged(options, &LogEnvironment { journal, terminal: true, ..LogEnvironment::default() }, guide_lines);
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
fn colours_are_for_terminals_without_no_color() {
    for (terminal, no_color, coloured) in
        [(false, false, false), (false, true, false), (true, true, false), (true, false, true)]
    {
        let text = logged(
            LogOptions::default(),
            &LogEnvironment { terminal, no_color, ..LogEnvironment::default() },
            guide_lines,
        );
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

fn counts(level: LogLevel, rust_log: Option<&str>) -> (usize, usize) {
    let environment = LogEnvironment { rust_log: rust_log.map(str::to_owned), ..LogEnvironment::default() };
    let text = logged(LogOptions { level, ..LogOptions::default() }, &environment, one_of_each);
    (text.matches("ours").count(), text.matches("theirs").count())
}

#[test]
fn levels_are_ours_and_libraries_stay_quiet() {
    let expected = [
        (LogLevel::Off, (0, 0)),
        (LogLevel::Error, (1, 1)),
        (LogLevel::Warn, (2, 2)),
        (LogLevel::Info, (3, 2)),
        (LogLevel::Debug, (4, 2)),
        (LogLevel::Trace, (5, 2)),
    ];
    for (level, seen) in expected {
        assert_eq!(counts(level, None), seen, "{level:?}");
    }
}

#[test]
fn rust_log_overrides_the_level() {
    assert_eq!(counts(LogLevel::Off, Some("trace")), (5, 4));
    assert_eq!(counts(LogLevel::Trace, Some("warn,hyper=info")), (2, 3));
    assert_eq!(counts(LogLevel::Trace, Some("off")), (0, 0));
    assert_eq!(counts(LogLevel::Info, Some("")), (3, 2), "empty is as good as unset");
    assert_eq!(counts(LogLevel::Info, Some(" ")), (3, 2), "empty is as good as unset");
}

#[test]
fn an_invalid_rust_log_is_one_clear_line() {
    for directives in ["udp_fanout=loud", "a=b=c", "info,=,"] {
        let Err(error) = filter(LogLevel::Info, Some(directives)) else { panic!("{directives} is accepted") };
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

/// Set in the environment of the processes that the last test starts.
const CHILD: &str = "UDP_FANOUT_TEST_LOGS";

/// Runs only in a process that the next test starts.
#[test]
fn logs_in_a_process_of_its_own() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    init(LogOptions { level: LogLevel::Trace, format: LogFormat::Text }).expect("logging starts");
    for _ in 0..3 {
        one_of_each();
    }
    println!("survived");
}

#[test]
fn a_standard_error_that_cannot_be_written_does_no_harm() {
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
