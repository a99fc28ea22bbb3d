//! Notifications to a service manager, and the limit of open files: in userspace mode,
//! without privileges.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::loopback::own_address;

/// The timeout of every wait. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(20);

/// A service manager with one service.
struct Manager {
    socket: UnixDatagram,
    name: String,
    directory: TempDir,
    address: Ipv4Addr,
    child: Option<Child>,
}

impl Manager {
    /// Listens on a socket in the file system, or on an abstract one.
    fn new(in_abstract: bool) -> Manager {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = path.to_str().unwrap().to_owned();
        let (socket, name) = if in_abstract {
            let address = SocketAddr::from_abstract_name(&name).unwrap();
            (UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}"))
        } else {
            (UnixDatagram::bind(&path).unwrap(), name)
        };
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Manager { socket, name, directory, address: own_address(), child: None }
    }

    fn config(&self, extra: &str) -> String {
        let address = self.address;
        format!(
            "watch_config = false\n[[listeners]]\nname = \"a\"\nbind = \"{address}:5514\"\nmode = \"userspace\"\n\
             downstream = [{{ address = \"{address}:5515\" }}]\n{extra}\n"
        )
    }

    fn config_path(&self) -> PathBuf {
        self.directory.path().join("config.toml")
    }

    fn write(&self, config: &str) {
        let new = self.directory.path().join("new");
        fs::write(&new, config).unwrap();
        fs::rename(new, self.config_path()).unwrap();
    }

    /// Starts the program with a command prefix that executes it.
    fn start(&mut self, config: &str, before: &[&str], environment: &[(&str, &str)]) {
        self.write(config);
        let mut words = before.iter().copied().chain([env!("CARGO_BIN_EXE_udp-fanout")]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(["run", "--config"]).arg(self.config_path());
        command.arg("--status-socket").arg(self.directory.path().join("status.sock"));
        command.env_remove("RUST_LOG").env("NO_COLOR", "1").env("NOTIFY_SOCKET", &self.name);
        command.env_remove("WATCHDOG_USEC").env_remove("WATCHDOG_PID").envs(environment.iter().copied());
        let log = fs::File::create(self.directory.path().join("log")).unwrap();
        self.child = Some(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.as_ref().unwrap().id().cast_signed())
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// The lines of the next message.
    fn receive(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        str::from_utf8(&message[..length]).unwrap().lines().map(str::to_owned).collect()
    }

    /// The next message that is not about the watchdog.
    fn hear_news(&self) -> Vec<String> {
        loop {
            let lines = self.receive();
            if lines != ["WATCHDOG=1"] {
                return lines;
            }
        }
    }

    /// The next message, which reports a reload. Returns its time in microseconds of the monotonic clock.
    fn hear_reloading(&self) -> u64 {
        let [reloading, time] = self.receive().try_into().unwrap();
        assert_eq!(reloading, "RELOADING=1");
        time.strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap()
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        self.child.as_mut().unwrap().wait().unwrap()
    }

    /// The soft and the hard limit of open files of the program.
    fn open_files(&self) -> (u64, u64) {
        let text = fs::read_to_string(format!("/proc/{}/limits", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let mut words = line.split_whitespace().map(|word| word.parse().unwrap_or(0));
        (words.next().unwrap(), words.next().unwrap())
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

const READY: &str = "STATUS=1 listener in userspace, 1 downstream";

#[test]
fn the_service_manager_hears_of_start_reload_and_stop() {
    for in_abstract in [false, true] {
        let mut manager = Manager::new(in_abstract);
        manager.start(&manager.config(""), &[], &[]);
        assert_eq!(manager.receive(), ["READY=1", READY]);
        // READY is true: a datagram is forwarded.
        let receiver = UdpSocket::bind((manager.address, 5515)).unwrap();
        receiver.set_read_timeout(Some(LIMIT)).unwrap();
        receiver.send_to(b"x", (manager.address, 5514)).unwrap();
        assert_eq!(receiver.recv(&mut [0]).unwrap(), 1);

        let second = format!(
            "[[listeners]]\nname = \"b\"\nbind = \"{}:5516\"\nmode = \"userspace\"\n\
             downstream = [{{ address = \"127.0.0.2:1\" }}, {{ address = \"127.0.0.3:1\" }}]\n",
            manager.address
        );
        let two = manager.config(&second);
        manager.write(&two);
        manager.signal(Signal::SIGHUP);
        let first = manager.hear_reloading();
        assert_eq!(manager.receive(), ["READY=1", "STATUS=2 listeners in userspace, 3 downstreams"]);

        // A refused reload ends as well, and the status says what is wrong.
        manager.write("listeners = 3\n");
        manager.signal(Signal::SIGHUP);
        let second = manager.hear_reloading();
        assert!(first < second);
        let [ready, status] = manager.receive().try_into().unwrap();
        assert_eq!(ready, "READY=1");
        let expected = "STATUS=2 listeners in userspace, 3 downstreams; 1 problem: the configuration file has changed and \
                        cannot be put in force: ";
        assert!(status.starts_with(expected), "{status}");
        // And so does one without a change.
        manager.write(&two);
        manager.signal(Signal::SIGHUP);
        manager.hear_reloading();
        assert_eq!(manager.receive(), ["READY=1", "STATUS=2 listeners in userspace, 3 downstreams"]);

        manager.signal(Signal::SIGTERM);
        assert_eq!(manager.receive()[0], "STOPPING=1");
        assert!(manager.wait().success(), "{}", manager.log());
    }
}

#[test]
fn a_change_of_the_file_is_a_reload_too_and_health_is_part_of_the_status() {
    let mut manager = Manager::new(false);
    let watched = manager.config("").replace("watch_config = false\n", "");
    manager.start(&watched, &[], &[]);
    assert_eq!(manager.receive(), ["READY=1", READY]);
    // Nothing listens there.
    let health = "[health]\nenabled = true\ninterval_secs = 0.2\ntimeout_secs = 0.2\nprotocol = \"tcp\"\nport = 9\n";
    manager.write(&format!("{watched}{health}"));
    manager.hear_reloading();
    assert_eq!(manager.receive(), ["READY=1", READY]);
    let problem = "listener \"a\": all downstreams fail their health checks: still sending to all of them, since fail_open = true";
    assert_eq!(manager.receive(), [format!("{READY} (1 unhealthy); 1 problem: {problem}")]);
}

#[test]
fn the_watchdog_is_fed_while_the_loop_turns_and_not_before_it_does() {
    let mut manager = Manager::new(false);
    manager.start(&manager.config(""), &[], &[("WATCHDOG_USEC", "60000")]);
    assert_eq!(manager.receive(), ["READY=1", READY]);
    for _ in 0..10 {
        assert_eq!(manager.receive(), ["WATCHDOG=1"]);
    }
    manager.signal(Signal::SIGTERM);
    assert_eq!(manager.hear_news()[0], "STOPPING=1");
    assert!(manager.wait().success(), "{}", manager.log());

    // A watchdog of another process is ignored.
    let mut manager = Manager::new(false);
    manager.start(&manager.config(""), &[], &[("WATCHDOG_USEC", "1000"), ("WATCHDOG_PID", "1")]);
    assert_eq!(manager.receive(), ["READY=1", READY]);
    manager.signal(Signal::SIGTERM);
    assert_eq!(manager.receive()[0], "STOPPING=1");
}

#[test]
fn a_start_that_fails_is_never_ready() {
    let mut manager = Manager::new(false);
    let _taken = UdpSocket::bind((manager.address, 5514)).unwrap();
    manager.start(&manager.config(""), &[], &[("WATCHDOG_USEC", "60000")]);
    assert!(!manager.wait().success());
    manager.socket.set_nonblocking(true).unwrap();
    assert!(manager.socket.recv(&mut [0; 100]).is_err(), "nothing was said");
}

#[test]
fn a_manager_that_cannot_be_told_is_no_reason_to_fail() {
    let mut manager = Manager::new(false);
    manager.start(&manager.config(""), &[], &[("NOTIFY_SOCKET", "/nowhere/at/all"), ("WATCHDOG_USEC", "30000")]);
    let deadline = Instant::now() + LIMIT;
    while !manager.log().contains("cannot notify the service manager") {
        assert!(Instant::now() < deadline, "{}", manager.log());
        thread::yield_now();
    }
    manager.signal(Signal::SIGTERM);
    assert!(manager.wait().success());
    assert_eq!(manager.log().matches("cannot notify the service manager").count(), 1, "{}", manager.log());
}

#[test]
fn a_manager_that_is_there_later_hears_all_the_same() {
    let mut manager = Manager::new(false);
    let late = manager.directory.path().join("late");
    manager.start(&manager.config(""), &[], &[("NOTIFY_SOCKET", late.to_str().unwrap())]);
    let deadline = Instant::now() + LIMIT;
    while !manager.log().contains("cannot notify the service manager") {
        assert!(Instant::now() < deadline, "{}", manager.log());
        thread::yield_now();
    }
    manager.socket = UnixDatagram::bind(late).unwrap();
    manager.socket.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(manager.receive(), ["READY=1", READY]);
}

#[test]
fn the_limit_of_open_files_is_raised_to_what_the_workers_need() {
    let mut manager = Manager::new(false);
    // 256, 10 for each worker, and the health checks' maximum.
    let config = manager.config("settings.workers = 40");
    manager.start(&config, &["prlimit", "--nofile=100:20000"], &[]);
    assert_eq!(manager.receive(), ["READY=1", READY]);
    let (soft, hard) = manager.open_files();
    assert_eq!((soft, hard), (256 + 400 + 16_384, 20_000));
    let open = fs::read_dir(format!("/proc/{}/fd", manager.pid())).unwrap().count();
    assert!(open > 100 && open < 656 - 200, "{open} are open");
    assert!(!manager.log().contains("limit of open files"), "{}", manager.log());
}

#[test]
fn a_limit_of_open_files_that_is_too_low_is_warned_about() {
    let mut manager = Manager::new(false);
    let config = manager.config("settings.workers = 4");
    // The program must not raise the hard limit, even when root runs the tests.
    let root = nix::unistd::geteuid().is_root();
    let before = ["prlimit", "--nofile=100:200", "setpriv", "--bounding-set=-sys_resource"];
    manager.start(&config, if root { &before } else { &before[..2] }, &[]);
    assert_eq!(manager.receive(), ["READY=1", READY]);
    assert_eq!(manager.open_files(), (200, 200));
    let log = manager.log();
    let expected = "the limit of open files is 200, and the listeners' workers may need 296, so that sockets may be missing; \
                    raise the hard limit (LimitNOFILE=296 in the unit";
    assert!(log.contains(expected), "{log}");
}
