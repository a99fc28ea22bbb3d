//! The service of the Debian package under a real systemd: in its sandbox it starts, forwards in both modes, follows
//! its configuration, and keeps forwarding through restarts, kills and upgrades, until it is stopped for good.
//!
//! Installs the package of `make deb` on the machine it runs on. `make test-systemd` runs it on an emulated machine
//! with systemd as its first process (`scripts/test-kernels.sh`).

use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Metrics, Place, Report, Sender};

const CONFIG: &str = "/etc/udp-fanout/config.toml";
const PINS: &str = "/sys/fs/bpf/udp-fanout";
/// The timeout of every wait, long because machines are emulated.
const LIMIT: Duration = Duration::from_secs(120);
/// The polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The pause between groups of datagrams in a continuous flow.
const PACE: Duration = Duration::from_millis(10);
/// An unassigned user ID, as an earlier service account may have left.
const OTHER_UID: u32 = 61_999;

/// The machine, the package on it, and the network around it.
struct Machine {
    lab: Lab,
}

/// The command's standard output. Panics if the command fails.
fn run(program: &str, arguments: &str) -> String {
    let (succeeded, said) = attempt(program, arguments);
    assert!(succeeded, "{program} {arguments}: {said}\n{}", journal());
    said
}

/// Whether the command succeeds, and both of its outputs.
fn attempt(program: &str, arguments: &str) -> (bool, String) {
    let mut command = Command::new(program);
    let output = command.args(arguments.split_whitespace()).stdin(Stdio::null()).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), said)
}

/// Without the triggers of other packages, such as indexing manual pages.
fn dpkg(arguments: &str) -> String {
    run("dpkg", &format!("--no-triggers {arguments}"))
}

fn journal() -> String {
    attempt("journalctl", "--no-pager --output=cat --lines=100 --unit=udp-fanout").1
}

/// Prints a line for `scripts/test-kernels.sh`.
fn say(what: &str) {
    // Bypasses the test harness, which captures output and has begun a line.
    io::stdout().write_all(format!("\n@@say {what}\n").as_bytes()).unwrap();
}

fn property(name: &str) -> String {
    run("systemctl", &format!("show --value --property={name} udp-fanout")).trim().to_owned()
}

/// Waits for the condition. Panics with the service's log on timeout.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "never happened: {what}\n{}", journal());
        // Polling is expensive on the emulated machine.
        thread::sleep(POLL_INTERVAL);
    }
}

/// The pinned programs.
fn pinned_programs() -> Vec<PathBuf> {
    fs::read_dir(PINS).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

fn package() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let version = env!("CARGO_PKG_VERSION").replace('-', "~");
    let files = fs::read_dir(target.join("debian")).expect("make deb").map(|entry| entry.unwrap().path());
    let ours = format!("udp-fanout_{version}-1_");
    let mut ours = files.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&ours));
    ours.next().expect("make deb")
}

impl Machine {
    fn new() -> Machine {
        let own = fs::read_to_string("/proc/cmdline").unwrap().contains(" udp_fanout.init=systemd");
        assert!(own, "this installs a package and starts services; run `make test-systemd` instead");
        let places = [Place::OtherInterface, Place::Pod, Place::Pod];
        Machine { lab: Lab::builder().receivers(places).on_machine(true).build().unwrap() }
    }

    fn config(&self, on_exit: &str) -> DaemonConfig {
        let mut config = DaemonConfig::for_lab(&self.lab, "tc_ebpf");
        config.head = format!("on_exit = \"{on_exit}\"");
        config
    }

    fn write(&self, config: &str) {
        let health = "[health]\nenabled = true\ninterval_secs = 5\ntimeout_secs = 5\nprotocol = \"icmp\"\n";
        fs::create_dir_all("/etc/udp-fanout").unwrap();
        fs::write(format!("{CONFIG}.new"), format!("{config}{health}")).unwrap();
        fs::rename(format!("{CONFIG}.new"), CONFIG).unwrap();
    }

    fn install(&self) -> String {
        dpkg(&format!("--install {}", package().display()))
    }

    /// Sends `count` datagrams to the listener, all of which must arrive once.
    fn exchange(&self, count: u64) {
        let collectors = Collectors::start(&self.lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&self.lab).unwrap().patience(LIMIT);
        sender.send(count, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}\n{}", journal());
    }

    fn filter(&self) -> Option<String> {
        let shown = self.lab.gateway.tc(&format!("filter show dev {INGRESS} ingress")).unwrap();
        shown.lines().find(|line| line.contains("udp_fanout")).map(str::to_owned)
    }

    fn metrics(&self) -> Metrics {
        let address = SocketAddr::from(([127, 0, 0, 1], 9090));
        Metrics::scrape(&self.lab.gateway, address, "/metrics").unwrap()
    }

    /// The kernel datapath's counters of the lab's listener: received and forwarded.
    fn counted(&self) -> (u64, u64) {
        let page = self.metrics();
        let labels = [("listener", "lab"), ("mode", "tc_ebpf")];
        let sum = |what: &str| page.sum(&format!("udp_fanout_packets_{what}_total"), &labels);
        (sum("received"), sum("forwarded"))
    }

    /// Installed with a configuration, it is started and enabled, with few privileges beyond those of the kernel
    /// program.
    fn it_starts_sandboxed(&self) {
        self.write(&self.config("keep").to_toml());
        self.install();
        assert_eq!(property("ActiveState"), "active", "{}", journal());
        assert_eq!(property("UnitFileState"), "enabled");
        let status = fs::read_to_string(format!("/proc/{}/status", property("MainPID"))).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        let user: u32 = field("Uid:").split_whitespace().next().unwrap().parse().unwrap();
        assert!((61_184..=65_519).contains(&user), "{user}");
        assert_eq!(field("CapEff:"), field("CapBnd:"));
        self.exchange(300);
        assert_eq!(self.counted(), (300, 300));
        let [program] = pinned_programs().try_into().unwrap();
        assert_eq!((fs::metadata(PINS).unwrap().uid(), fs::metadata(program).unwrap().uid()), (user, user));

        let (below, security) = attempt("systemd-analyze", "security --no-pager --threshold=20 udp-fanout.service");
        let overall = security.lines().last().unwrap_or_default();
        say(&format!("installed and running. {}", overall.trim_start_matches("→ ")));
        assert!(below, "{security}");
    }

    /// Other features work in the sandbox: pings, names, low ports, status, the watchdog.
    fn features_work_in_the_sandbox(&self) {
        let receiver = &self.lab.sites[1];
        let inside = self.lab.namespace_of(receiver);
        fs::write("/etc/hosts", format!("127.0.0.1 localhost\n{} receiver.test\n", receiver.address.ip())).unwrap();
        let mut low = self.config("keep");
        low.listeners.push(udp_fanout_lab::ListenerSpec {
            name: "low".into(),
            bind: "10.0.0.1:514".into(),
            interface: None,
            mode: "userspace".into(),
            downstreams: Vec::new(),
            samples: Vec::new(),
            extra: "downstream = [{ address = \"receiver.test:5600\" }]".into(),
            settings: "preserve_source = true\npin_cpus = true\nworkers = 1".into(),
        });
        // Changes are followed without a reload command.
        self.write(&low.to_toml());
        let well = "2 listeners (1 in the kernel, 1 in userspace), 4 downstreams";
        until("two listeners and no problems", || property("StatusText") == well);
        let answered = [("protocol", "icmp"), ("result", "answered")];
        until("replies to pings", || self.metrics().sum("udp_fanout_health_probes_total", &answered) >= 4);
        let address = SocketAddr::new(receiver.address.ip(), 5600);
        let collectors = Collectors::start_at([("low", inside, address)], Expect::OneOfThem).unwrap();
        let target = "10.0.0.1:514".parse().unwrap();
        let mut sender = Sender::open(&self.lab.sender, (Lab::SENDER, 0), target).unwrap().patience(LIMIT);
        sender.send(100, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}\n{}", journal());

        let status = run("udp-fanout", "status --interval 0.1");
        assert!(status.contains("healthy") && !status.contains("unhealthy") && !status.contains("\n!"), "{status}");
        let (_, found) = attempt("udp-fanout", &format!("doctor --config {CONFIG}"));
        assert!(found.contains("ok       daemon") && !found.contains("\nproblem"), "{found}");
        let fed = property("WatchdogTimestampMonotonic");
        until("a watchdog notification", || property("WatchdogTimestampMonotonic") != fed);
        let log = journal();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }

    /// A reload applies changes, and nothing if one is wrong.
    fn it_reloads(&self) {
        let unwatched = self.config("keep").to_toml().replace("on_exit", "watch_config = false\non_exit");
        self.write(&unwatched);
        until("one listener", || property("StatusText") == "1 listener in the kernel, 3 downstreams");
        self.write(&unwatched.replace("weight", "wait"));
        let (reloaded, said) = attempt("systemctl", "reload udp-fanout");
        assert!(!reloaded, "{said}");
        until("the reason", || journal().contains("wait"));
        assert_eq!(property("StatusText"), "1 listener in the kernel, 3 downstreams");
        // The daemon itself refuses the file too.
        run("systemctl", "kill --signal=HUP --kill-who=main udp-fanout");
        until("a refusal", || property("StatusText").contains("1 problem") && property("StatusText").contains("wait"));
        self.exchange(100);
        self.write(&self.config("keep").to_toml());
        run("systemctl", "reload udp-fanout");
        until("no problem", || !property("StatusText").contains("problem"));
        assert_eq!(property("ActiveState"), "active");
    }

    /// Through all restarts and kills, each datagram arrives once and is counted.
    fn it_keeps_forwarding(&self) {
        let (before, _) = self.counted();
        let collectors = Collectors::start(&self.lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&self.lab).unwrap().patience(LIMIT);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let traffic = scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    sender.send(20, &collectors).unwrap();
                    // Leaves some time of the two emulated CPUs to everything else.
                    thread::sleep(PACE);
                }
            });
            for turn in ["restart", "kill", "upgrade", "restart", "hang", "kill", "restart"] {
                self.another_takes_over(turn);
            }
            done.store(true, Ordering::SeqCst);
            traffic.join().unwrap();
        });
        let sent = sender.sent();
        let report = collectors.finish(&[&sender]).unwrap();
        let Report { lost, duplicated, .. } = report;
        say(&format!(
            "{sent} datagrams through restarts, kills, a hang and an upgrade: {lost} lost, {duplicated} twice"
        ));
        assert!(report.is_complete() && report.duplicated == 0, "{report}\n{}", journal());
        assert_eq!(self.counted(), (before + sent, before + sent), "{}", journal());
    }

    fn another_takes_over(&self, turn: &str) {
        let (process, filter) = (property("MainPID"), self.filter());
        // At most five starts a minute: systemd gives up otherwise.
        run("systemctl", "reset-failed udp-fanout");
        match turn {
            "restart" => drop(run("systemctl", "restart udp-fanout")),
            "upgrade" => drop(self.install()),
            _ => {
                // A stopped process does not notify the watchdog.
                let signal = if turn == "hang" { "STOP" } else { "KILL" };
                run("systemctl", &format!("kill --signal={signal} udp-fanout"));
                until("started again", || property("MainPID") != process && property("ActiveState") == "active");
            }
        }
        assert_eq!(property("ActiveState"), "active", "after {turn}: {}", journal());
        assert_ne!(property("MainPID"), process);
        assert_ne!(self.filter(), filter, "another program");
        assert_eq!(pinned_programs().len(), 1);
    }

    /// When the daemon is stopped, the program forwards until the next daemon takes over, which may run as another
    /// account.
    fn it_forwards_while_stopped(&self) {
        let (before, _) = self.counted();
        run("systemctl", "stop udp-fanout");
        assert_eq!(property("ActiveState"), "inactive");
        self.exchange(100);
        run("chown", &format!("-R {OTHER_UID}:{OTHER_UID} {PINS}"));
        run("systemctl", "start udp-fanout");
        assert_eq!(self.counted(), (before + 100, before + 100), "{}", journal());
        let [program] = pinned_programs().try_into().unwrap();
        assert_ne!(fs::metadata(program).unwrap().uid(), OTHER_UID);
    }

    /// Pins may be removed while the service runs without them, and it can pin again later.
    fn it_pins_again(&self) {
        let user = DaemonConfig { head: "on_exit = \"keep\"".into(), ..DaemonConfig::for_lab(&self.lab, "userspace") };
        self.write(&user.to_toml());
        run("systemctl", "reload udp-fanout");
        until("userspace mode only", || property("StatusText") == "1 listener in userspace, 3 downstreams");
        assert_eq!((self.filter(), pinned_programs().len()), (None, 0));
        run("udp-fanout", "detach --all");
        self.write(&self.config("keep").to_toml());
        run("systemctl", "reload udp-fanout");
        until("tc_ebpf mode", || property("StatusText") == "1 listener in the kernel, 3 downstreams");
        assert_eq!(pinned_programs().len(), 1, "{}", journal());
        self.exchange(100);
    }

    /// With `on_exit = "detach"`, nothing remains.
    fn it_ends(&self) {
        run("systemctl", "stop udp-fanout");
        let said = run("udp-fanout", "detach --all");
        assert!(said.contains("eth0: removed the TC filter") && said.contains(PINS), "{said}");
        assert_eq!((self.filter(), Path::new(PINS).exists()), (None, false));
        run("systemctl", "start udp-fanout");
        self.exchange(100);
    }

    /// With the documented drop-in, it pins in another directory.
    fn it_pins_elsewhere(&self) {
        run("systemctl", "stop udp-fanout");
        run("udp-fanout", "detach --all");
        let (_, lines) = include_str!("../../docs/OPERATIONS.md").split_once("```ini\n").unwrap();
        let drop_in = "/etc/systemd/system/udp-fanout.service.d";
        fs::create_dir_all(drop_in).unwrap();
        fs::write(format!("{drop_in}/override.conf"), lines.split_once("```").unwrap().0).unwrap();
        run("systemctl", "daemon-reload");
        let elsewhere = "/sys/fs/bpf/edge";
        let head = format!("pin_path = \"{elsewhere}\"\non_exit");
        self.write(&self.config("keep").to_toml().replace("on_exit", &head));
        run("systemctl", "start udp-fanout");
        assert_eq!((fs::read_dir(elsewhere).unwrap().count(), Path::new(PINS).exists()), (1, false));
        run("systemctl", "stop udp-fanout");
        self.exchange(100);
    }

    /// Removing the package removes everything but the configuration; purging removes that too.
    fn it_is_removed_and_purged(&self) {
        dpkg("--remove udp-fanout");
        assert_eq!((self.filter(), Path::new("/sys/fs/bpf/edge").exists()), (None, false));
        dpkg("--purge udp-fanout");
        let unit = "/usr/lib/systemd/system/udp-fanout.service";
        for gone in [PINS, CONFIG, "/run/udp-fanout", unit, "/etc/systemd/system/udp-fanout.service.d"] {
            assert!(!Path::new(gone).exists(), "{gone}");
        }
        assert_eq!(property("LoadState"), "not-found");
    }

    /// Without a BPF file system, it runs if the configuration asks for no pins.
    fn it_starts_without_a_bpf_file_system(&self) {
        run("umount", "/sys/fs/bpf");
        self.write(&self.config("detach").to_toml());
        self.install();
        assert_eq!(property("ActiveState"), "active", "{}", journal());
        self.exchange(100);
        self.write(&self.config("keep").to_toml());
        run("systemctl", "reload udp-fanout");
        until("a refusal", || property("StatusText").contains("there is no BPF file system; mount one"));
        run("mount", "-t bpf bpf /sys/fs/bpf");
        run("systemctl", "restart udp-fanout");
        assert_eq!(pinned_programs().len(), 1);
        self.exchange(100);
        dpkg("--purge udp-fanout");
        assert_eq!((self.filter(), Path::new(PINS).exists()), (None, false));
    }
}

#[test]
#[ignore = "installs the package and starts its service, which is for the machine of make test-systemd"]
fn netns_the_packaged_service_keeps_forwarding_under_systemd() {
    let machine = Machine::new();
    machine.it_starts_sandboxed();
    machine.features_work_in_the_sandbox();
    machine.it_reloads();
    say("started and reloaded");
    machine.it_keeps_forwarding();
    machine.it_forwards_while_stopped();
    machine.it_pins_again();
    machine.it_ends();
    machine.it_pins_elsewhere();
    machine.it_is_removed_and_purged();
    say("stopped, taken over from another account, detached, started again, purged");
    machine.it_starts_without_a_bpf_file_system();
}
