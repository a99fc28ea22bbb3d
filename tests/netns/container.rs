//! The daemon as the DaemonSet's container runs it: root with only the manifests' capabilities, no way to gain others,
//! and only the system calls of the shipped seccomp profile. These privileges must suffice for every feature.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender, Surroundings};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Kernel numbers of this architecture's system calls, as the C compiler knows them.
fn system_calls() -> BTreeMap<String, u32> {
    let output = Command::new("cc").args("-E -dM -include sys/syscall.h -x c /dev/null".split(' ')).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let numbers = text.lines().filter_map(|line| {
        let (name, number) = line.strip_prefix("#define __NR_")?.split_once(' ')?;
        Some((name.to_owned(), number.parse().ok()?))
    });
    numbers.collect()
}

/// Loads a classic BPF program into seccomp, as a container runtime does, and executes the rest of its command line.
const LAUNCHER: &str = r#"
import ctypes, os, struct, sys

numbers = [int(number) for number in sys.argv[1].split(",")]
LOAD, JUMP_IF_EQUAL, RETURN, ALLOW, ERRNO_EPERM = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
program = [(LOAD, 0, 0, 0)]
for number in numbers:
    program += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
program.append((RETURN, 0, 0, ERRNO_EPERM))
code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
buffer = ctypes.create_string_buffer(code)
header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(buffer)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
SET_SECCOMP, FILTER = 22, 2
if prctl(SET_SECCOMP, FILTER, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) != 0:
    raise OSError(ctypes.get_errno(), "seccomp")
os.execv(sys.argv[2], sys.argv[2:])
"#;

/// The command prefix that runs the rest of its line as in the container.
struct Container {
    words: Vec<String>,
    _directory: TempDir,
}

impl Container {
    /// Allows these capabilities and system calls.
    fn new(capabilities: &[String], names: &[String]) -> Container {
        let known = system_calls();
        // The profile is for more architectures and newer kernels than this one.
        let numbers: Vec<String> = names.iter().filter_map(|name| known.get(name)).map(u32::to_string).collect();
        assert!(numbers.len() > 150, "{numbers:?}");
        let directory = tempfile::tempdir().unwrap();
        let launcher = directory.path().join("launcher.py");
        fs::write(&launcher, LAUNCHER).unwrap();
        let bounding: String = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
        let mut words = vec!["setpriv".to_owned(), format!("--bounding-set=-all{bounding}")];
        words.extend(["--inh-caps=-all", "--no-new-privs", "python3"].map(str::to_owned));
        words.extend([launcher.to_str().unwrap().to_owned(), numbers.join(",")]);
        Container { words, _directory: directory }
    }

    /// The container of `k8s/`.
    fn shipped() -> Container {
        Container::new(&capabilities(), &allowed())
    }

    fn before(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }
}

/// The capabilities that the DaemonSet adds.
fn capabilities() -> Vec<String> {
    let text = fs::read_to_string(repository().join("k8s/daemonset.yaml")).unwrap();
    let all: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let daemonset = all.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let context = &daemonset["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    strings(&context["capabilities"]["add"])
}

/// The system calls that the profile allows.
fn allowed() -> Vec<String> {
    let path = repository().join("k8s/components/seccomp-localhost/udp-fanout.json");
    let profile: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    strings(&profile["syscalls"][0]["names"])
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
}

fn binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_udp-fanout"))
}

const HEALTH: &str = "\n[health]\nenabled = true\ninterval_secs = 0.6\ntimeout_secs = 0.5\nprotocol = \"icmp\"\n";

#[test]
fn netns_the_containers_privileges_are_enough_in_every_mode() {
    let container = Container::shipped();
    for mode in ["tc_ebpf", "userspace"] {
        let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface, Place::BehindRouter]).build().unwrap();
        // The receive buffer takes CAP_NET_ADMIN, the probes CAP_NET_RAW: no ping sockets for anyone here.
        lab.gateway.sysctl("net.ipv4.ping_group_range", "1 0").unwrap();
        let settings = "workers = 2\npin_cpus = true\nrecv_buf_size = 16777216";
        let config = DaemonConfig::for_lab(&lab, mode).settings(settings);
        let text = config.to_toml() + HEALTH;
        let mut daemon =
            Daemon::spawn_behind(&lab.gateway, &container.before(), &binary(), &text, &Surroundings::default())
                .unwrap();
        daemon.wait_for_logged("serving metrics").unwrap();
        let status = lab.gateway.tool("cat", &format!("/proc/{}/status", daemon.pid())).unwrap();
        for line in ["CapEff:\t000000c000003000", "CapBnd:\t000000c000003000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
            assert!(status.contains(line), "{line}:\n{status}");
        }
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(600, &collectors).unwrap();
        // A failed receiver is detected, so probes are sent and replies received.
        let receiver = lab.namespace_of(&lab.sites[1]);
        receiver.sysctl("net.ipv4.icmp_echo_ignore_all", "1").unwrap();
        daemon.wait_for_line("health check failed").unwrap();
        daemon.wait_for_line(&format!("updated {mode} downstream set listener_id=0 endpoints=2")).unwrap();
        sender.send(600, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        let counts = report.counts();
        assert_eq!(counts.iter().sum::<u64>(), 1_200, "{mode}: {report}");
        let (status, _, log) = daemon.stop().unwrap();
        assert!(status.success(), "{log}");
        for complaint in
            ["recv_buf_size", "cannot pin", "cannot send health probes", "Operation not permitted", "ERROR"]
        {
            assert!(!log.contains(complaint), "{complaint}: {log}");
        }
    }
}

#[test]
fn netns_a_profile_without_bpf_is_named_as_the_cause() {
    let names: Vec<String> = allowed().into_iter().filter(|name| name != "bpf").collect();
    let container = Container::new(&capabilities(), &names);
    let lab = Lab::builder().receiver(Place::Pod).build().unwrap();
    let text = DaemonConfig::for_lab(&lab, "tc_ebpf").to_toml();
    let mut daemon =
        Daemon::spawn_behind(&lab.gateway, &container.before(), &binary(), &text, &Surroundings::default()).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    let expected = "failed to attach TC program: permission denied: CAP_BPF is granted, but a seccomp filter seems to forbid \
                    bpf(2): allow it in the seccomp profile";
    assert!(daemon.log().contains(expected), "{}", daemon.log());
}

#[test]
fn netns_health_checks_by_icmp_take_net_raw() {
    let capabilities: Vec<String> = capabilities().into_iter().filter(|name| name != "NET_RAW").collect();
    let container = Container::new(&capabilities, &allowed());
    let lab = Lab::builder().receiver(Place::Pod).build().unwrap();
    lab.gateway.sysctl("net.ipv4.ping_group_range", "1 0").unwrap();
    let text = DaemonConfig::for_lab(&lab, "tc_ebpf").to_toml() + HEALTH;
    let mut daemon =
        Daemon::spawn_behind(&lab.gateway, &container.before(), &binary(), &text, &Surroundings::default()).unwrap();
    daemon.wait_for_logged("cannot send health probes").unwrap();
}
