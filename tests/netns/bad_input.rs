//! The real program refuses what cannot work in one line that names what, where and the fix, with exit code 1, and
//! leaves nothing on the host. Where it can work with fewer features, it does, and the log says why.

use std::fs::{self, Permissions};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// A directory that every account can use, with a copy of the program: the one that cargo has built may be
/// below a home directory that only its owner may enter.
struct Stage {
    directory: TempDir,
}

impl Stage {
    fn new() -> Stage {
        let prefix = format!("{}{}-", udp_fanout_lab::cleanup::DIRECTORY_PREFIX, std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        Stage { directory }
    }

    /// Writes a file that every account can read.
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        path
    }

    fn program(&self) -> PathBuf {
        let path = self.directory.path().join("udp-fanout");
        if !path.exists() {
            // By another process: a file that this one has written cannot be run while a program that another thread
            // is just starting holds a copy of the descriptor.
            let built = env!("CARGO_BIN_EXE_udp-fanout");
            assert!(
                Command::new("install")
                    .arg("--mode=755")
                    .args([built.as_ref(), path.as_path()])
                    .status()
                    .unwrap()
                    .success()
            );
        }
        path
    }
}

/// The program that cargo has built.
fn built() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

/// Runs the daemon on a configuration that it must refuse, with this command prefix (a program that drops privileges
/// and runs the rest of its line), if any. Checks the exit code, and that there is exactly one line besides those that
/// only inform; returns that line from its level on.
fn refusal(namespace: &Namespace, before: &[&str], program: &Path, config: &Path) -> String {
    let mut words: Vec<&str> = before.to_vec();
    let (program, config) = (program.to_str().unwrap(), config.to_str().unwrap());
    // A refusal is immediate; a daemon that still runs has not refused.
    let socket = Path::new(config).with_file_name("status.sock");
    words.extend(["timeout", "30", program, "run", "--config", config, "--status-socket", socket.to_str().unwrap()]);
    let mut command = namespace.command(words[0]);
    let output = command.args(&words[1..]).env_remove("RUST_LOG").env("NO_COLOR", "1").output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = if Path::new(config).exists() { 1 } else { 78 };
    assert_eq!(output.status.code(), Some(code), "{config}:\n{log}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let mut lines = log.lines().filter(|line| !line.contains("  INFO "));
    let line = lines.next().unwrap_or_else(|| panic!("{config} was refused without a message:\n{log}"));
    assert_eq!(lines.next(), None, "{config}: more than one line:\n{log}");
    let (_, line) = line.split_once("Z ").unwrap_or_else(|| panic!("no time in front of {line:?}"));
    line.to_owned()
}

/// True if the daemon has left nothing on the gateway: no filter on any interface, no socket of its ports.
fn nothing_left(gateway: &Namespace) {
    for device in [INGRESS, "out1"] {
        let filters = gateway.tc(&format!("filter show dev {device} ingress")).unwrap();
        assert!(!filters.contains("udp_fanout"), "{filters}");
    }
    let sockets = gateway.tool("cat", "/proc/thread-self/net/udp /proc/thread-self/net/tcp").unwrap();
    let ports = [5514, 9090].map(|port| format!(":{port:04X} "));
    // A closed connection's end, state 6 (TIME_WAIT), is the kernel's.
    let open = sockets.lines().filter(|line| line.split_whitespace().nth(3) != Some("06"));
    let bound = open.filter(|line| ports.iter().any(|port| line.contains(port)));
    assert_eq!(bound.collect::<Vec<_>>(), Vec::<&str>::new());
}

const GOOD: &str = "\
[[listeners]]
name = \"syslog\"
bind = \"10.0.0.1:5514\"
mode = \"tc_ebpf\"
interface = \"eth0\"
[[listeners.downstream]]
address = \"10.0.10.2:5514\"
";

/// The mistake, a configuration made from [`GOOD`] with it, and the expected line, which begins with the file's path.
type Faulty = (&'static str, String, &'static str);

/// [`GOOD`] with one text replaced by another.
fn with(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replace(from, to)
}

fn faulty_listeners() -> Vec<Faulty> {
    let twice = |from: &str, to: &str| format!("{GOOD}{}", with(from, to));
    vec![
        ("unknown key", with("mode =", "mod ="), ":4: listeners[0].mod: unknown key; did you mean `mode`?"),
        (
            "wrong type",
            with("\"10.0.0.1:5514\"", "5514"),
            ":3: listeners[0].bind: expected text (IP:port), got the number 5514; put it in quotes, for example \"0.0.0.0:5514\"",
        ),
        (
            "unknown mode",
            with("tc_ebpf", "xdp"),
            ":4: listeners[0].mode: expected \"auto\" or \"tc_ebpf\" or \"userspace\", got \"xdp\"; write \"auto\"",
        ),
        (
            "no listeners",
            String::new(),
            ": listeners: no listeners; add one with a name, a bind address and its downstreams (config/reference.toml shows every key)",
        ),
        (
            "duplicate names",
            twice("10.0.0.1:5514", "10.0.0.1:5515"),
            ":9: listeners[1].name: \"syslog\" is already the name of listeners[0]; rename one",
        ),
        (
            "two listeners on one address and port",
            twice("\"syslog\"", "\"other\""),
            ":10: listeners[1].bind: \"10.0.0.1:5514\" is taken by listeners[0] (\"syslog\", \"10.0.0.1:5514\"); give one another port or address",
        ),
        (
            "port 0",
            with("10.0.0.1:5514", "10.0.0.1:0"),
            ":3: listeners[0].bind: \"10.0.0.1:0\" has port 0; give a port from 1 to 65535",
        ),
    ]
}

fn faulty_downstreams() -> Vec<Faulty> {
    let listener = GOOD.split("[[listeners.downstream]]").next().unwrap();
    vec![
        (
            "no downstreams and no kubernetes",
            listener.to_owned(),
            ":1: listeners[0]: \"syslog\" has no receivers; add `downstream` or `kubernetes`",
        ),
        (
            "an empty list of downstreams",
            format!("{listener}downstream = []\n"),
            ":6: listeners[0].downstream: \"syslog\" has no downstreams; add one with an `address`",
        ),
        (
            "a downstream that is the listener itself",
            with("10.0.10.2:5514", "10.0.0.1:5514"),
            ":7: listeners[0].downstream[0].address: \"10.0.0.1:5514\" is the listener itself (bind \"10.0.0.1:5514\"), which would be a loop; give the receiver another port or address",
        ),
        (
            "an IPv6 downstream of an IPv4 listener",
            with("10.0.10.2:5514", "[fd00::9]:5514"),
            ":7: listeners[0].downstream[0].address: \"[fd00::9]:5514\" is IPv6 but the listener's bind, \"10.0.0.1:5514\", is IPv4; give the receiver's IPv4 address, or add a listener for IPv6",
        ),
        (
            "weight 0",
            format!("{GOOD}weight = 0\n"),
            ":8: listeners[0].downstream[0].weight: the number 0 is out of range; give an integer from 1 to 65535, for example 2",
        ),
        (
            "no TOML",
            "listeners = [".to_owned(),
            ":1: \"listeners = [\" is not valid TOML: unclosed array, expected `]`; correct the line",
        ),
    ]
}

fn lab() -> Lab {
    Lab::builder().receiver(Place::OtherInterface).build().unwrap()
}

#[test]
fn netns_faulty_files_are_refused() {
    let (lab, stage) = (lab(), Stage::new());
    for (what, text, message) in [faulty_listeners(), faulty_downstreams()].concat() {
        let config = stage.write("config.toml", &text);
        let line = refusal(&lab.gateway, &[], built(), &config);
        assert_eq!(line, format!("ERROR {}{message}", config.display()), "{what}");
    }
    nothing_left(&lab.gateway);
}

#[test]
fn netns_files_that_cannot_be_read_are_refused() {
    let (lab, stage) = (lab(), Stage::new());
    let missing = stage.directory.path().join("missing.toml");
    let fix = "no such file; create it (config/reference.toml shows every key), or name another with --config";
    assert_eq!(refusal(&lab.gateway, &[], built(), &missing), format!("ERROR {}: {fix}", missing.display()));

    let directory = stage.directory.path();
    let fix = "is a directory; name a file in it with --config";
    assert_eq!(refusal(&lab.gateway, &[], built(), directory), format!("ERROR {}: {fix}", directory.display()));

    let secret = stage.write("secret.toml", GOOD);
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    let line = refusal(&lab.gateway, &UNPRIVILEGED, &stage.program(), &secret);
    let fix = "permission denied; run as a user who may read it, or change its owner or mode";
    assert_eq!(line, format!("ERROR {}: {fix}", secret.display()));
    nothing_left(&lab.gateway);
}

#[test]
fn netns_an_unknown_interface_is_refused() {
    let (lab, stage) = (lab(), Stage::new());
    for (interface, missing) in [("\"eth9\"", "eth9"), ("[\"eth0\", \"eth9\", \"eth8\"]", "eth9")] {
        let config = stage.write("config.toml", &GOOD.replace("\"eth0\"", interface));
        let line = refusal(&lab.gateway, &[], built(), &config);
        let start = format!("ERROR listener \"syslog\": interface not found: {missing} (this host has ");
        let there = line.strip_prefix(&start).unwrap_or_else(|| panic!("{line}")).trim_end_matches(')');
        let there: Vec<&str> = there.split(", ").collect();
        assert!(there.contains(&"eth0") && there.contains(&"out1") && !there.contains(&"lo"), "{line}");
    }
    let config = stage.write("config.toml", &GOOD.replace("\"eth0\"", "\"auto\""));
    let line = refusal(&lab.gateway, &[], built(), &config);
    let start = "ERROR listener \"syslog\": no interface carries a default route, so interface = \"auto\" finds none";
    assert!(line.starts_with(start) && line.ends_with("; name one"), "{line}");
    nothing_left(&lab.gateway);
}

#[test]
fn netns_addresses_that_cannot_be_had_are_refused() {
    let (lab, stage) = (lab(), Stage::new());
    for mode in ["tc_ebpf", "userspace"] {
        let text = GOOD.replace("tc_ebpf", mode) + "[metrics]\nbind = \"127.0.0.1:9090\"\n";
        let config = stage.write("config.toml", &text);
        let taken: UdpSocket = lab.gateway.run(|| Ok(UdpSocket::bind("10.0.0.1:5514")?)).unwrap();
        let line = refusal(&lab.gateway, &[], built(), &config);
        let message = "listener \"syslog\": cannot bind 10.0.0.1:5514: address already in use; another program listens \
                       there (see `ss -ulpn sport = :5514`)";
        assert_eq!(line, format!("ERROR {message}"));
        drop(taken);
        nothing_left(&lab.gateway);

        let taken: TcpListener = lab.gateway.run(|| Ok(TcpListener::bind("127.0.0.1:9090")?)).unwrap();
        let line = refusal(&lab.gateway, &[], built(), &config);
        let message = "cannot serve metrics on 127.0.0.1:9090: address already in use; stop the program that uses it \
                       (`ss -ltnp sport = :9090` shows it) or change metrics.bind";
        assert_eq!(line, format!("ERROR {message}"));
        drop(taken);
        nothing_left(&lab.gateway);
    }
    // In the other mode the TC program can serve an address that no interface has.
    let text = GOOD.replace("tc_ebpf", "userspace").replace("10.0.0.1:5514", "10.0.0.99:5514");
    let elsewhere = stage.write("config.toml", &text);
    let line = refusal(&lab.gateway, &[], built(), &elsewhere);
    assert!(line.starts_with("ERROR listener \"syslog\": cannot bind 10.0.0.99:5514: no interface of"), "{line}");
    nothing_left(&lab.gateway);
}

/// Runs the rest of the line as a user without privileges.
const UNPRIVILEGED: [&str; 5] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];

#[test]
fn netns_too_little_privilege_is_refused_by_name() {
    let (lab, stage) = (lab(), Stage::new());
    let config = stage.write("config.toml", GOOD);
    let fix = "run as root, or grant the capabilities (systemd: AmbientCapabilities=, Kubernetes: \
               securityContext.capabilities.add), or set mode = \"userspace\"";
    let without = |bounding: &'static str| -> Vec<&'static str> { vec!["setpriv", "--inh-caps=-all", bounding] };
    let cases = [
        (UNPRIVILEGED.to_vec(), "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are"),
        (without("--bounding-set=-net_admin"), "CAP_NET_ADMIN is"),
        (without("--bounding-set=-sys_admin,-bpf"), "CAP_BPF is"),
        (without("--bounding-set=-sys_admin,-perfmon"), "CAP_PERFMON is"),
        (without("--bounding-set=-sys_admin,-bpf,-net_admin"), "CAP_BPF and CAP_NET_ADMIN are"),
    ];
    for (before, missing) in cases {
        let line = refusal(&lab.gateway, &before, &stage.program(), &config);
        let what = "listener \"syslog\": failed to attach TC program: permission denied";
        assert_eq!(line, format!("ERROR {what}: {missing} missing: {fix}"), "{before:?}");
    }
    nothing_left(&lab.gateway);
}

#[test]
fn netns_a_kernel_that_lacks_something_is_refused_by_name() {
    let (lab, stage) = (lab(), Stage::new());
    let config = stage.write("config.toml", GOOD);
    let hide_types = "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"";
    let line = refusal(&lab.gateway, &["unshare", "--mount", "sh", "-c", hide_types, "sh"], built(), &config);
    assert!(line.starts_with("ERROR listener \"syslog\": failed to attach TC program: kernel "), "{line}");
    let fix = "has no type information at /sys/kernel/btf/vmlinux: use a kernel built with CONFIG_DEBUG_INFO_BTF, or mount \
               /sys, or set mode = \"userspace\"";
    assert!(line.ends_with(fix), "{line}");
    nothing_left(&lab.gateway);
}

#[test]
fn netns_a_user_with_three_capabilities_can_do_it_all() {
    let (lab, stage) = (lab(), Stage::new());
    let capabilities = "-all,+bpf,+net_admin,+perfmon";
    let ambient = format!("--ambient-caps={capabilities}");
    let inheritable = format!("--inh-caps={capabilities}");
    let before = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", &inheritable, &ambient];
    let config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    let mut daemon = Daemon::start_behind(&lab.gateway, &before, &stage.program(), &config).unwrap();
    exchange(&lab, &[Lab::SENDER]);
    assert_eq!(
        daemon.metrics(&lab.gateway).unwrap().sum("udp_fanout_packets_forwarded_total", &[("mode", "tc_ebpf")]),
        100
    );
    daemon.wait_for_logged("attached TC eBPF program to ingress interface=\"eth0\"").unwrap();
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
    nothing_left(&lab.gateway);
}

/// Sends 100 datagrams through the daemon; they must arrive once each, with one of these addresses as the source.
fn exchange(lab: &Lab, sources: &[std::net::IpAddr]) {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(100, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{report}");
    assert!(report.receivers[0].sources.iter().all(|source| sources.contains(&source.ip())), "{report}");
}

#[test]
fn netns_auto_does_without_what_it_cannot_have_and_says_why() {
    let (lab, stage) = (lab(), Stage::new());
    let mut config = DaemonConfig::for_lab(&lab, "auto");
    let cases = [
        (
            &UNPRIVILEGED[..],
            "eth0",
            "reason=\"CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are missing: run as root, or grant",
        ),
        (&[], "eth9", "reason=\"interface not found: eth9 (this host has "),
        (&[], "auto", "reason=\"no interface carries a default route, so interface = "),
    ];
    for (before, interface, reason) in cases {
        config.listeners[0].interface = Some(interface.into());
        let mut daemon = Daemon::start_behind(&lab.gateway, before, &stage.program(), &config).unwrap();
        let line = daemon.wait_for_logged("listener configured").unwrap();
        assert!(line.contains("mode=userspace") && line.contains(reason), "{line}");
        exchange(&lab, &lab.gateway_addresses().unwrap());
        let page = daemon.metrics(&lab.gateway).unwrap();
        assert_eq!(page.sum("udp_fanout_packets_forwarded_total", &[("mode", "userspace")]), 100);
        assert_eq!(page.select("udp_fanout_listener_mode_info", &[("mode", "userspace")]).count(), 1);
        let (status, _, log) = daemon.stop().unwrap();
        assert!(status.success(), "{log}");
        nothing_left(&lab.gateway);
    }
}
