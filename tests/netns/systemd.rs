//! The service of the Debian package under a real systemd: confined as it is, it starts, forwards in both modes, follows its
//! configuration, and keeps forwarding through restarts, kills and upgrades, until it is told not to.
//!
//! Installs the package of `make deb` on the machine it runs on. `make test-systemd` gives it one of its own, an emulated one,
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
/// How long anything may take. Machines are emulated, and nothing waits that long otherwise.
const LIMIT: Duration = Duration::from_secs(120);
/// How often something is asked for that is waited for.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Between one group of datagrams and the next, while they are sent without end.
const PACE: Duration = Duration::from_millis(10);
/// An account that is nobody's, as the service's may have been once.
const ANOTHER: u32 = 61_999;

/// The machine, the package on it, and the network around it.
struct Machine {
    lab: Lab,
}

/// What a command prints. Fails unless it succeeds.
fn run(program: &str, arguments: &str) -> String {
    let (succeeded, said) = attempt(program, arguments);
    assert!(succeeded, "{program} {arguments}: {said}\n{}", journal());
    said
}

/// Whether it succeeds, and what it prints on both outputs.
fn attempt(program: &str, arguments: &str) -> (bool, String) {
    let mut command = Command::new(program);
    let output = command.args(arguments.split_whitespace()).stdin(Stdio::null()).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), said)
}

/// Without what other packages do then, such as to index manual pages.
fn dpkg(arguments: &str) -> String {
    run("dpkg", &format!("--no-triggers {arguments}"))
}

fn journal() -> String {
    attempt("journalctl", "--no-pager --output=cat --lines=100 --unit=udp-fanout").1
}

/// Tells `scripts/test-kernels.sh`.
fn say(what: &str) {
    // Past the harness, which keeps to itself what a test prints, and has begun a line.
    io::stdout().write_all(format!("\n@@say {what}\n").as_bytes()).unwrap();
}

fn property(name: &str) -> String {
    run("systemctl", &format!("show --value --property={name} udp-fanout")).trim().to_owned()
}

/// Waits for it, and fails with what the service has said if it does not come.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "never happened: {what}\n{}", journal());
        // To ask costs the emulated machine much.
        thread::sleep(ASK_AGAIN);
    }
}

/// The programs that are kept.
fn kept() -> Vec<PathBuf> {
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
        assert!(own, "this installs a package and starts services; let it do that elsewhere: make test-systemd");
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

    /// Sends so many datagrams to the listener, all of which must arrive, once.
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

    /// What the kernel datapath has counted of the lab's listener: received and forwarded.
    fn counted(&self) -> (u64, u64) {
        let page = self.metrics();
        let labels = [("listener", "lab"), ("mode", "tc_ebpf")];
        let sum = |what: &str| page.sum(&format!("udp_fanout_packets_{what}_total"), &labels);
        (sum("received"), sum("forwarded"))
    }

    /// Installed with a configuration, it is started and enabled, with all that the kernel program takes and little else.
    fn it_starts_confined(&self) {
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
        let [program] = kept().try_into().unwrap();
        assert_eq!((fs::metadata(PINS).unwrap().uid(), fs::metadata(program).unwrap().uid()), (user, user));

        let (below, security) = attempt("systemd-analyze", "security --no-pager --threshold=20 udp-fanout.service");
        let overall = security.lines().last().unwrap_or_default();
        say(&format!("installed and running. {}", overall.trim_start_matches("→ ")));
        assert!(below, "{security}");
    }

    /// What it needs beside the kernel program is there: pings, names, low ports, its status, the watchdog.
    fn nothing_is_missing(&self) {
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
        // Followed without being told.
        self.write(&low.to_toml());
        let well = "2 listeners (1 in the kernel, 1 in userspace), 4 downstreams";
        until("two listeners and no complaint", || property("StatusText") == well);
        let answered = [("protocol", "icmp"), ("result", "answered")];
        until("pings that are answered", || self.metrics().sum("udp_fanout_health_probes_total", &answered) >= 4);
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
        until("a fed watchdog", || property("WatchdogTimestampMonotonic") != fed);
        let log = journal();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }

    /// A reload changes what is new, and nothing if that is wrong.
    fn it_reloads(&self) {
        let unwatched = self.config("keep").to_toml().replace("on_exit", "watch_config = false\non_exit");
        self.write(&unwatched);
        until("one listener", || property("StatusText") == "1 listener in the kernel, 3 downstreams");
        self.write(&unwatched.replace("weight", "wait"));
        let (reloaded, said) = attempt("systemctl", "reload udp-fanout");
        assert!(!reloaded, "{said}");
        until("the reason", || journal().contains("wait"));
        assert_eq!(property("StatusText"), "1 listener in the kernel, 3 downstreams");
        // The daemon itself refuses the file as well.
        run("systemctl", "kill --signal=HUP --kill-who=main udp-fanout");
        until("a refusal", || property("StatusText").contains("1 problem") && property("StatusText").contains("wait"));
        self.exchange(100);
        self.write(&self.config("keep").to_toml());
        run("systemctl", "reload udp-fanout");
        until("no problem", || !property("StatusText").contains("problem"));
        assert_eq!(property("ActiveState"), "active");
    }

    /// Whatever becomes of the daemon, each of the datagrams arrives, once, and is counted.
    fn it_keeps_forwarding(&self) {
        let (before, _) = self.counted();
        let collectors = Collectors::start(&self.lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&self.lab).unwrap().patience(LIMIT);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let traffic = scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    sender.send(20, &collectors).unwrap();
                    // Not all that there is of two emulated CPUs, or everything else takes ever so long.
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
        // Not more than five starts a minute, or else it gives up.
        run("systemctl", "reset-failed udp-fanout");
        match turn {
            "restart" => drop(run("systemctl", "restart udp-fanout")),
            "upgrade" => drop(self.install()),
            _ => {
                // Whoever hangs does not feed the watchdog.
                let signal = if turn == "hang" { "STOP" } else { "KILL" };
                run("systemctl", &format!("kill --signal={signal} udp-fanout"));
                until("started again", || property("MainPID") != process && property("ActiveState") == "active");
            }
        }
        assert_eq!(property("ActiveState"), "active", "after {turn}: {}", journal());
        assert_ne!(property("MainPID"), process);
        assert_ne!(self.filter(), filter, "another program");
        assert_eq!(kept().len(), 1);
    }

    /// Stopped, it forwards, until the next one takes over, which may be of another account.
    fn it_forwards_while_stopped(&self) {
        let (before, _) = self.counted();
        run("systemctl", "stop udp-fanout");
        assert_eq!(property("ActiveState"), "inactive");
        self.exchange(100);
        run("chown", &format!("-R {ANOTHER}:{ANOTHER} {PINS}"));
        run("systemctl", "start udp-fanout");
        assert_eq!(self.counted(), (before + 100, before + 100), "{}", journal());
        let [program] = kept().try_into().unwrap();
        assert_ne!(fs::metadata(program).unwrap().uid(), ANOTHER);
    }

    /// What it keeps may be taken away while it does without, and it can keep things again.
    fn it_keeps_again(&self) {
        let user = DaemonConfig { head: "on_exit = \"keep\"".into(), ..DaemonConfig::for_lab(&self.lab, "userspace") };
        self.write(&user.to_toml());
        run("systemctl", "reload udp-fanout");
        until("sockets alone", || property("StatusText") == "1 listener in userspace, 3 downstreams");
        assert_eq!((self.filter(), kept().len()), (None, 0));
        run("udp-fanout", "detach --all");
        self.write(&self.config("keep").to_toml());
        run("systemctl", "reload udp-fanout");
        until("the kernel", || property("StatusText") == "1 listener in the kernel, 3 downstreams");
        assert_eq!(kept().len(), 1, "{}", journal());
        self.exchange(100);
    }

    /// Told to, it ends for good.
    fn it_ends(&self) {
        run("systemctl", "stop udp-fanout");
        let said = run("udp-fanout", "detach --all");
        assert!(said.contains("eth0: removed the TC filter") && said.contains(PINS), "{said}");
        assert_eq!((self.filter(), Path::new(PINS).exists()), (None, false));
        run("systemctl", "start udp-fanout");
        self.exchange(100);
    }

    /// With the lines that the documentation has for it, it keeps what it keeps in another place.
    fn it_keeps_elsewhere(&self) {
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

    /// Removed, it takes all with it, and purged, even what it was configured with.
    fn it_goes(&self) {
        dpkg("--remove udp-fanout");
        assert_eq!((self.filter(), Path::new("/sys/fs/bpf/edge").exists()), (None, false));
        dpkg("--purge udp-fanout");
        let unit = "/usr/lib/systemd/system/udp-fanout.service";
        for gone in [PINS, CONFIG, "/run/udp-fanout", unit, "/etc/systemd/system/udp-fanout.service.d"] {
            assert!(!Path::new(gone).exists(), "{gone}");
        }
        assert_eq!(property("LoadState"), "not-found");
    }

    /// Where nothing can be kept, it does without, if that is what it is told.
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
        assert_eq!(kept().len(), 1);
        self.exchange(100);
        dpkg("--purge udp-fanout");
        assert_eq!((self.filter(), Path::new(PINS).exists()), (None, false));
    }
}

#[test]
#[ignore = "installs the package and starts its service, which is for the machine of make test-systemd"]
fn netns_the_packaged_service_keeps_forwarding_under_systemd() {
    let machine = Machine::new();
    machine.it_starts_confined();
    machine.nothing_is_missing();
    machine.it_reloads();
    say("started and reloaded");
    machine.it_keeps_forwarding();
    machine.it_forwards_while_stopped();
    machine.it_keeps_again();
    machine.it_ends();
    machine.it_keeps_elsewhere();
    machine.it_goes();
    say("stopped, taken over from another account, detached, started again, purged");
    machine.it_starts_without_a_bpf_file_system();
}
