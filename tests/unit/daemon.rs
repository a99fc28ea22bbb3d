//! The program without privileges: the example that `make run` starts, its shutdown, its log, its HTTP
//! pages, and the commands beside `run`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use udp_fanout_lab::{Metrics, scrape};

use crate::loopback::own_address;

/// The timeout of every wait. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(20);

/// Where the example listens, where its receivers are, and where it serves metrics, on its own loopback address.
const LISTENER: u16 = 15_514;
const RECEIVERS: [u16; 3] = [15_521, 15_522, 15_523];
const METRICS: u16 = 9_090;

fn udp_fanout() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_udp-fanout"));
    command.env_remove("RUST_LOG").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// `config/udp-fanout.toml` in a temporary directory, with another address instead of 127.0.0.1.
fn example(address: Ipv4Addr) -> (TempDir, PathBuf) {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/udp-fanout.toml");
    let text = fs::read_to_string(shipped).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("udp-fanout.toml");
    fs::write(&path, text.replace("127.0.0.1", &address.to_string())).unwrap();
    (directory, path)
}

/// The running example, with its receivers.
struct Running {
    address: Ipv4Addr,
    child: Child,
    log: BufReader<ChildStderr>,
    receivers: Vec<UdpSocket>,
    directory: TempDir,
}

impl Running {
    /// Starts it and waits until it is ready.
    fn start(options: &[&str]) -> Running {
        let address = own_address();
        let receivers = RECEIVERS.map(|port| UdpSocket::bind((address, port)).unwrap());
        receivers.iter().for_each(|receiver| receiver.set_read_timeout(Some(LIMIT)).unwrap());
        let (directory, path) = example(address);
        let mut command = udp_fanout();
        command.args(["run", "--config"]).arg(path).args(options).stderr(Stdio::piped());
        command.arg("--status-socket").arg(directory.path().join("status.sock"));
        let mut child = command.spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut running = Running { address, child, log, receivers: receivers.into(), directory };
        // The last log line of the start.
        running.read_log_until("serving metrics");
        running
    }

    /// The lines of the log up to one that contains `needle`.
    fn read_log_until(&mut self, needle: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "ended without {needle:?}: {lines:#?}");
            let found = line.contains(needle);
            lines.push(line.trim_end().to_owned());
            if found {
                return lines;
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Sends `count` numbered datagrams.
    fn send(&self, count: u8) {
        let sender = UdpSocket::bind((self.address, 0)).unwrap();
        for number in 0..count {
            sender.send_to(&[number; 32], (self.address, LISTENER)).unwrap();
        }
    }

    /// Waits until each receiver has got this many datagrams, and returns them.
    fn receive(&self, counts: [usize; 3]) -> BTreeSet<u8> {
        let mut seen = BTreeSet::new();
        for (receiver, count) in self.receivers.iter().zip(counts) {
            for _ in 0..count {
                let mut buffer = [0; 64];
                let length = receiver.recv(&mut buffer).unwrap();
                assert_eq!((length, buffer[31]), (32, buffer[0]));
                assert!(seen.insert(buffer[0]), "twice: {}", buffer[0]);
            }
        }
        seen
    }

    /// Checks that no receiver gets another datagram.
    fn nothing_more(&self) {
        for receiver in &self.receivers {
            receiver.set_nonblocking(true).unwrap();
            assert!(receiver.recv(&mut [0; 64]).is_err());
        }
    }

    fn page(&self, path: &str) -> scrape::Page {
        scrape::fetch(SocketAddr::from((self.address, METRICS)), path).unwrap()
    }

    /// Sends a signal. Returns the exit status and the rest of the log.
    fn end(mut self, signal: Signal) -> (ExitStatus, Vec<String>) {
        kill(self.pid(), signal).unwrap();
        let rest: Vec<String> = self.log.by_ref().lines().map_while(Result::ok).collect();
        (self.child.wait().unwrap(), rest)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_example_forwards_and_serves_its_pages() {
    let running = Running::start(&[]);
    running.send(99);
    assert_eq!(running.receive([33; 3]).len(), 99);
    assert_eq!(running.page("/healthz"), scrape::Page { status: 200, body: "ok\n".into() });
    assert_eq!(running.page("/readyz"), scrape::Page { status: 200, body: "ready\n".into() });
    assert_eq!(running.page("/nowhere").status, 404);
    let labels = [("listener", "demo"), ("mode", "userspace")];
    // A worker counts a batch once it has sent it, which may be a moment after it has arrived.
    let metrics = loop {
        let metrics = Metrics::parse(&running.page("/metrics").body).unwrap();
        if metrics.sum("udp_fanout_packets_received_total", &labels) == 99 {
            break metrics;
        }
    };
    assert_eq!(metrics.sum("udp_fanout_packets_forwarded_total", &labels), 99);
    assert_eq!(metrics.sum("udp_fanout_bytes_forwarded_total", &labels), 99 * 32);
    for port in RECEIVERS {
        let endpoint = format!("{}:{port}", running.address);
        let labels = [("listener", "demo"), ("endpoint", endpoint.as_str())];
        assert_eq!(metrics.sum("udp_fanout_downstream_packets_total", &labels), 33);
    }
    running.nothing_more();
}

#[test]
fn signals_end_it_well_and_what_is_queued_is_forwarded_first() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let running = Running::start(&[]);
        // A stopped daemon reads no datagrams; when it continues, it has both them and the signal to handle.
        kill(running.pid(), Signal::SIGSTOP).unwrap();
        let stopped = waitpid(running.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
        running.send(90);
        kill(running.pid(), signal).unwrap();
        let receivers: Vec<UdpSocket> = running.receivers.iter().map(|socket| socket.try_clone().unwrap()).collect();
        let (status, log) = running.end(Signal::SIGCONT);
        assert_eq!(status.code(), Some(0), "{signal}: {log:#?}");
        let name = signal.as_str();
        assert!(log.iter().any(|line| line.ends_with(&format!("INFO stopping signal=\"{name}\""))), "{log:#?}");
        assert!(!log.iter().any(|line| line.contains("WARN") || line.contains("ERROR")), "{log:#?}");
        for receiver in receivers {
            receiver.set_nonblocking(true).unwrap();
            for _ in 0..30 {
                receiver.recv(&mut [0; 64]).expect("all that was queued has been forwarded");
            }
            assert!(receiver.recv(&mut [0; 64]).is_err());
        }
    }
}

#[test]
fn the_log_reads_as_the_guide_says() {
    let address = own_address();
    let (directory, path) = example(address);
    let socket = directory.path().join("status.sock");
    let mut command = udp_fanout();
    command.arg("-c").arg(path).arg("--status-socket").arg(socket);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut lines = Vec::new();
    while !lines.last().is_some_and(|line: &String| line.contains("serving metrics")) {
        let mut line = String::new();
        assert!(log.read_line(&mut line).unwrap() > 0, "{lines:#?}");
        lines.push(line.trim_end().to_owned());
    }
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    let after_time: Vec<&str> =
        lines.iter().map(|line| line.split_once("Z ").expect("a time").1.trim_start()).collect();
    for expected in [
        &format!(
            "INFO listener configured listener=\"demo\" bind={address}:15514 mode=userspace reason=\"configured\""
        ),
        "INFO updated userspace downstream set listener_id=0 endpoints=3",
        &format!("INFO serving metrics address={address}:9090"),
    ] {
        assert!(after_time.contains(&expected), "no {expected:?} in {after_time:#?}");
    }
}

#[test]
fn the_log_can_be_json() {
    let mut running = Running::start(&["--log-format", "json", "--log-level", "debug"]);
    kill(running.pid(), Signal::SIGTERM).unwrap();
    let lines: Vec<Value> =
        running.read_log_until("stopping").iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        for key in ["timestamp", "level", "target", "message"] {
            assert!(line[key].is_string(), "no {key} in {line}");
        }
    }
    let stopping = lines.last().unwrap();
    assert_eq!((stopping["message"].as_str(), stopping["signal"].as_str()), (Some("stopping"), Some("SIGTERM")));
    assert_eq!(stopping["level"], "INFO");
}

#[test]
fn an_error_at_the_start_is_json_as_well() {
    let mut command = udp_fanout();
    let output = command.args(["--config", "/nonexistent.toml", "--log-format", "json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let last: Value = serde_json::from_str(stderr(&output).lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "ERROR");
    assert!(last["message"].as_str().unwrap().starts_with("/nonexistent.toml: no such file; "), "{last}");
}

#[test]
fn the_journal_gets_priorities_and_every_other_stream_does_not() {
    let directory = tempfile::tempdir().unwrap();
    for (ours, format, error) in [(true, "text", "<3>ERROR "), (false, "text", "20"), (true, "json", "{")] {
        let path = directory.path().join("stderr");
        let file = fs::File::create(&path).unwrap();
        let stat = file.metadata().unwrap();
        let stream = format!("{}:{}", stat.dev(), stat.ino() + u64::from(!ours));
        let mut command = udp_fanout();
        command.args(["--config", "/nonexistent.toml", "--log-format", format]).env("JOURNAL_STREAM", stream);
        assert_eq!(command.stderr(file).status().unwrap().code(), Some(78));
        let log = fs::read_to_string(&path).unwrap();
        let last = log.lines().last().unwrap();
        assert!(last.starts_with(error) && last.contains("/nonexistent.toml: no such file"), "{log}");
        assert_eq!(log.starts_with("<6> INFO "), ours && format == "text", "{log}");
    }
}

fn run(words: &[&str]) -> Output {
    udp_fanout().args(words).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

#[test]
fn check_prints_what_a_configuration_amounts_to() {
    for name in ["udp-fanout.toml", "reference.toml", "syslog.toml", "kubernetes.toml", "multi-tenant.toml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name);
        let output = run(&["check", "--config", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", stderr(&output));
        let effective = stdout(&output);
        assert!(effective.contains("[[listeners]]") && effective.contains("batch_size = "), "{name}: {effective}");
        // The printed configuration prints as itself.
        let directory = tempfile::tempdir().unwrap();
        let again = directory.path().join("effective.toml");
        fs::write(&again, effective).unwrap();
        let output = run(&["check", "--config", again.to_str().unwrap()]);
        assert_eq!((output.status.code(), stdout(&output)), (Some(0), effective), "{name}: {}", stderr(&output));
    }
}

#[test]
fn check_says_everything_that_is_wrong_and_fails() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wrong.toml");
    fs::write(&path, "[[listeners]]\nname = \"a\"\nbindd = \"x\"\nmode = 5\n").unwrap();
    let output = run(&["check", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stdout(&output), "");
    let lines: Vec<&str> = stderr(&output).lines().collect();
    let path = path.display();
    assert!(
        lines.iter().any(|line| line.starts_with(&format!("{path}:3: listeners[0].bindd: unknown key"))),
        "{lines:#?}"
    );
    assert!(lines.iter().any(|line| line.starts_with(&format!("{path}:4: listeners[0].mode: "))), "{lines:#?}");
    assert!(lines.iter().all(|line| line.starts_with(&format!("{path}:"))), "{lines:#?}");
}

#[test]
fn the_command_line_explains_itself() {
    let version = run(&["--version"]);
    let text = stdout(&version).trim_end();
    let revision = text.strip_prefix(concat!("udp-fanout ", env!("CARGO_PKG_VERSION"), " (")).unwrap();
    let revision = revision.strip_suffix(')').unwrap();
    assert!(revision == "unknown" || revision.len() >= 7, "{text}");
    assert!(version.status.success());

    for (words, expected) in [
        (&["--help"][..], "SIGTERM, SIGINT"),
        (&["-h"], "Usage:"),
        (&["run", "--help"], "--log-format"),
        (&["check", "--help"], "--config"),
        (&["completions", "bash"], "complete -F"),
        (&["completions", "zsh"], "#compdef udp-fanout"),
        (&["completions", "fish"], "complete -c udp-fanout"),
        (&["man"], ".TH udp-fanout 8"),
    ] {
        let output = run(words);
        assert!(output.status.success() && output.stderr.is_empty(), "{words:?}: {}", stderr(&output));
        assert!(stdout(&output).contains(expected), "{words:?}: {}", stdout(&output));
    }
    for words in [&["--confg", "x"][..], &["fly"], &["completions"], &["check", "--log-level", "debug"]] {
        let output = run(words);
        assert_eq!((output.status.code(), stdout(&output)), (Some(2), ""), "{words:?}");
        assert!(stderr(&output).starts_with("error: "), "{words:?}: {}", stderr(&output));
    }
}

fn status(running: &Running, options: &[&str]) -> Command {
    let mut command = udp_fanout();
    command.args(["status", "--interval", "0.1", "--socket"]).arg(running.directory.path().join("status.sock"));
    command.args(options);
    command
}

#[test]
fn status_shows_what_the_daemon_does() {
    let running = Running::start(&[]);
    running.send(99);
    assert_eq!(running.receive([33; 3]).len(), 99);
    // A worker counts a batch once it has sent it, which may be a moment after it has arrived.
    let report = loop {
        let output = status(&running, &["--json"]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        if report["listeners"][0]["forwarded"] == 99 {
            break report;
        }
    };
    assert_eq!(report["daemon"]["pid"], running.child.id());
    assert_eq!(report["problems"], Value::Array(vec![]));
    let listener = &report["listeners"][0];
    assert_eq!((listener["name"].as_str(), listener["mode"].as_str()), (Some("demo"), Some("userspace")));
    assert_eq!((&listener["received"], &listener["dropped"]), (&99.into(), &0.into()));
    assert!(listener["rates"]["packets"].is_number());
    for (nth, port) in RECEIVERS.iter().enumerate() {
        let downstream = &listener["downstreams"][nth];
        assert_eq!(downstream["address"], format!("{}:{port}", running.address));
        assert_eq!((&downstream["packets"], &downstream["bytes"]), (&33.into(), &(33 * 32).into()));
        assert!((downstream["share"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-9);
    }

    let output = status(&running, &[]).output().unwrap();
    let table = stdout(&output);
    assert!(output.status.success() && !table.contains('\u{1b}'), "no colours in a pipe: {table}");
    let start = format!("udp-fanout {} (", env!("CARGO_PKG_VERSION"));
    assert!(table.starts_with(&start), "{table}");
    let row = |start: &str| table.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{table}"));
    let words: Vec<&str> = row("demo ").split_whitespace().collect();
    assert_eq!((words[2], words[4], words[9], words[10]), ("userspace", "round_robin", "99", "0"), "{table}");
    assert_eq!(table.lines().filter(|line| line.contains("  33%  ") && line.contains("  33  ")).count(), 3, "{table}");
}

#[test]
fn status_runs_until_its_reader_leaves() {
    let running = Running::start(&[]);
    let mut watching = status(&running, &["--watch", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let uptimes: Vec<f64> = lines
        .by_ref()
        .take(3)
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap()["daemon"]["uptime_secs"].as_f64().unwrap())
        .collect();
    assert!(uptimes.is_sorted_by(|a, b| a < b), "{uptimes:?}");
    drop(lines);
    assert!(watching.wait().unwrap().success());
}

#[test]
fn status_without_a_daemon_says_what_to_do() {
    let (directory, path) = example(own_address());
    // `status` reads the socket's path even from a file that is invalid by now.
    let text = fs::read_to_string(&path).unwrap();
    let socket = directory.path().join("own.sock");
    fs::write(&path, format!("status_socket = {socket:?}\nwatch = \"the birds\"\n{text}")).unwrap();
    let output = run(&["status", "--config", path.to_str().unwrap()]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(1), ""));
    let expected = format!(
        "no udp-fanout answers at {}: start it (`systemctl start udp-fanout`), or name its configuration with --config or \
         its socket with --socket\n",
        socket.display()
    );
    assert_eq!(stderr(&output), expected);
}

#[test]
fn the_status_socket_is_one_daemons_own_and_goes_with_it() {
    let running = Running::start(&[]);
    let socket = running.directory.path().join("status.sock");
    let (_directory, other) = example(own_address());
    let output =
        udp_fanout().arg("-c").arg(other).arg("--status-socket").arg(&socket).args(["-l", "warn"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("another udp-fanout answers there already"), "{}", stderr(&output));
    assert!(status(&running, &[]).output().unwrap().status.success());
    let (ended, _) = running.end(Signal::SIGTERM);
    assert!(ended.success() && !socket.exists());
}
