//! Our filter among others on the same interface: theirs stay unchanged, ours is found again, and there is one daemon
//! per interface.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use anyhow::Context;
use libbpf_rs::{TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHookBuilder, libbpf_sys};
use nix::sys::signal::Signal;

use super::counters::{PacketCounts, binary, bpftool, check_counters, filters, start};
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::traffic::bind;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// A foreign TC program that passes every packet to the next filter.
pub struct Other {
    program: OwnedFd,
    link: Option<OwnedFd>,
}

impl Other {
    pub fn load(name: &CStr) -> Other {
        // r0 = TC_ACT_UNSPEC; exit
        let instruction = |code: u32, imm| libbpf_sys::bpf_insn { code: code as u8, imm, ..Default::default() };
        let instructions = [
            instruction(libbpf_sys::BPF_ALU64 | libbpf_sys::BPF_MOV | libbpf_sys::BPF_K, -1),
            instruction(libbpf_sys::BPF_JMP | libbpf_sys::BPF_EXIT, 0),
        ];
        // SAFETY: name, licence and instructions are valid for the whole call; libbpf accepts null for options.
        let fd = unsafe {
            libbpf_sys::bpf_prog_load(
                libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
                name.as_ptr(),
                c"GPL".as_ptr(),
                instructions.as_ptr(),
                instructions.len() as libbpf_sys::size_t,
                std::ptr::null_mut(),
            )
        };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        Other { program: unsafe { OwnedFd::from_raw_fd(fd) }, link: None }
    }

    /// Attaches it as the last TCX program, until it is dropped.
    pub fn attach_tcx(&mut self, namespace: &Namespace, device: &str, hook: libbpf_sys::bpf_attach_type) {
        let index = i32::try_from(namespace.link(device).unwrap().index).unwrap();
        let program = self.program.as_raw_fd();
        let attach = || {
            // SAFETY: takes numbers; libbpf accepts null for options.
            let fd = unsafe { libbpf_sys::bpf_link_create(program, index, hook, std::ptr::null()) };
            anyhow::ensure!(fd >= 0, "cannot attach: {}", io::Error::from_raw_os_error(-fd));
            // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        self.link = Some(namespace.run(attach).unwrap());
    }

    pub fn attach(&self, namespace: &Namespace, hook: TcAttachPoint, (priority, handle): (u32, u32)) {
        let index = i32::try_from(namespace.link(INGRESS).unwrap().index).unwrap();
        // Silences the message of libbpf about an existing clsact.
        libbpf_rs::set_print(None);
        let attached = namespace.run(|| {
            let mut builder = TcHookBuilder::new(self.program.as_fd());
            let mut hook = builder.ifindex(index).handle(handle).priority(priority).hook(hook);
            hook.create().context("cannot make a clsact")?;
            hook.attach().map(drop).context("cannot attach")
        });
        attached.unwrap();
    }

    /// The number of its runs while `_stats` is held.
    fn runs(&self, _stats: &Stats) -> u64 {
        let id = libbpf_rs::Program::id_from_fd(self.program.as_fd()).unwrap().to_string();
        bpftool(&["prog", "show", "id", &id])["run_cnt"].as_u64().unwrap_or(0)
    }
}

/// Enables the kernel's run counters of BPF programs while it is held.
struct Stats {
    _handle: OwnedFd,
}

impl Stats {
    fn enable() -> Stats {
        // SAFETY: takes a number, touches no memory of ours.
        let fd = unsafe { libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        Stats { _handle: unsafe { OwnedFd::from_raw_fd(fd) } }
    }
}

/// Sends `count` datagrams to the listener. Each receiver must get the same share.
pub fn exchange(lab: &Lab, count: u64) {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(count, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_perfect(), "{report}");
    assert_eq!(report.counts(), vec![count / lab.sites.len() as u64; lab.sites.len()], "{report}");
}

/// The only filter of the daemon among these.
fn ours(filters: &[String]) -> &str {
    let mut ours = filters.iter().filter(|line| line.contains("udp_fanout"));
    let line = ours.next().expect("our filter is there");
    assert_eq!(ours.next(), None, "only once: {filters:?}");
    assert!(line.starts_with("filter protocol all pref 49152 bpf chain 0 handle 0x7566 udp_fanout"), "{line}");
    assert!(line.contains(" direct-action "), "{line}");
    line
}

/// What `bpftool map dump name STATS` prints: every map of that name on this machine.
fn dump_by_name() -> String {
    loop {
        let mut command = Command::new("bpftool");
        let output =
            command.args(["map", "dump", "name", "STATS"]).output().expect("bpftool runs (Debian package bpftool)");
        let complaint = String::from_utf8_lossy(&output.stderr);
        // A foreign map was removed while bpftool listed all maps.
        if complaint.contains("can't get map by id") {
            continue;
        }
        assert!(output.status.success(), "{complaint}");
        return String::from_utf8_lossy(&output.stdout).into_owned();
    }
}

#[test]
fn netns_the_guides_commands_show_filter_and_counters() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::Pod]).build().unwrap();
    let _daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    exchange(&lab, 7_203);
    let shown = lab.gateway.tc("filter show dev eth0 ingress").unwrap();
    assert!(shown.contains("filter protocol all pref 49152 bpf") && shown.contains(" udp_fanout"), "{shown}");
    let dumped = dump_by_name();
    for field in ["pkts_received", "pkts_forwarded"] {
        assert!(dumped.contains(&format!("\"{field}\": 7203")), "{dumped}");
    }
    for field in ["pkts_dropped", "pkts_passed", "bytes_received", "bytes_forwarded"] {
        assert!(dumped.contains(&format!("\"{field}\": ")), "{dumped}");
    }
}

#[test]
fn netns_filters_of_others_survive_start_stop_kill_and_restart() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let [first, last, outgoing] = [c"other_first", c"other_last", c"other_out"].map(Other::load);
    first.attach(&lab.gateway, TC_INGRESS, (10, 1));
    last.attach(&lab.gateway, TC_INGRESS, (50_000, 1));
    outgoing.attach(&lab.gateway, TC_EGRESS, (10, 1));
    let theirs = filters(&lab.gateway, INGRESS);
    let outwards = || lab.gateway.tc(&format!("filter show dev {INGRESS} egress")).unwrap();
    let theirs_outwards = outwards();
    assert_eq!((theirs.len(), theirs_outwards.contains("other_out")), (2, true), "{theirs:?}");
    let without_ours = || -> Vec<String> {
        filters(&lab.gateway, INGRESS).into_iter().filter(|line| !line.contains("udp_fanout")).collect()
    };

    let config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    let daemon = start(&lab, &config);
    let before = ours(&filters(&lab.gateway, INGRESS)).to_owned();
    assert_eq!(without_ours(), theirs);
    let stats = Stats::enable();
    exchange(&lab, 400);
    // Foreign packets, such as ARP, have run both; the listener's datagrams have not reached the last filter.
    let (runs, rest) = (first.runs(&stats), last.runs(&stats));
    assert!(runs >= 400 && rest <= runs - 400, "{runs} packets came in, {rest} of them reached the last filter");
    // Foreign traffic does reach it.
    let stranger = bind(&lab.gateway, "10.0.0.1:7".parse().unwrap()).unwrap();
    let sender = bind(&lab.sender, "10.0.0.2:0".parse().unwrap()).unwrap();
    for _ in 0..10 {
        sender.send_to(b"for somebody else", "10.0.0.1:7").unwrap();
        stranger.recv(&mut [0; 32]).unwrap();
    }
    assert!(last.runs(&stats) >= rest + 10);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);

    // A killed daemon leaves its filter, which forwards until the next daemon replaces it.
    daemon.signal(Signal::SIGKILL).unwrap();
    let mut daemon = daemon;
    daemon.wait().unwrap();
    assert_eq!(ours(&filters(&lab.gateway, INGRESS)), before);
    exchange(&lab, 400);
    let daemon = start(&lab, &config);
    assert_ne!(ours(&filters(&lab.gateway, INGRESS)), before);
    assert_eq!(without_ours(), theirs);
    exchange(&lab, 400);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);

    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
    assert_eq!(filters(&lab.gateway, INGRESS), theirs);
    assert_eq!(outwards(), theirs_outwards);
    assert!(lab.gateway.tc(&format!("qdisc show dev {INGRESS}")).unwrap().contains("clsact"));
}

#[test]
fn netns_what_a_killed_daemon_has_left_is_removed_by_one_that_does_not_take_its_place() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    for interfaces in [None, Some("out1")] {
        let mut killed = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        killed.signal(Signal::SIGKILL).unwrap();
        killed.wait().unwrap();
        ours(&filters(&lab.gateway, INGRESS));

        // Without the kernel program, and with it on another interface. In both cases the socket forwards everything.
        let mut config = DaemonConfig::for_lab(&lab, if interfaces.is_some() { "tc_ebpf" } else { "userspace" });
        config.listeners[0].interface = interfaces.map(str::to_owned);
        let mut daemon = start(&lab, &config);
        let removed = "removed the TC filter of a udp-fanout that died interface=\"eth0\"";
        daemon.wait_for_logged(removed).unwrap();
        assert!(filters(&lab.gateway, INGRESS).is_empty());
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(400, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        check_counters(&daemon, &lab.gateway, interfaces.map(|_| PacketCounts::NOTHING), PacketCounts::forwarded(400));
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_a_second_daemon_on_an_interface_is_refused() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    let daemon = start(&lab, &config);
    let before = filters(&lab.gateway, INGRESS);
    let mut second = config.clone();
    second.listeners[0].bind = "10.0.0.1:5515".into();
    second.metrics = None;
    let mut second = Daemon::spawn(&lab.gateway, binary(), &second.to_toml()).unwrap();
    let status = second.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    let refusal =
        "interface eth0 is already served by another udp-fanout; stop it, or put all listeners into one configuration";
    assert!(second.log().lines().any(|line| line.contains("ERROR") && line.contains(refusal)), "{}", second.log());
    assert_eq!(filters(&lab.gateway, INGRESS), before);
    exchange(&lab, 400);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);
}

#[test]
fn netns_a_filter_of_others_in_our_place_is_not_replaced() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    Other::load(c"other_ours").attach(&lab.gateway, TC_INGRESS, (49_152, 0x7566));
    let before = filters(&lab.gateway, INGRESS);
    let config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    let mut daemon = Daemon::spawn(&lab.gateway, binary(), &config.to_toml()).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    let refusal = "interface eth0: the filter at pref 49152 handle 0x7566 is another program's (other_ours); remove it";
    assert!(daemon.log().contains(refusal), "{}", daemon.log());
    assert_eq!(filters(&lab.gateway, INGRESS), before);
}

#[test]
fn netns_a_filter_taken_off_is_put_back() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let mut daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    lab.gateway.tc(&format!("qdisc del dev {INGRESS} clsact")).unwrap();
    // Until the daemon notices, the socket forwards.
    exchange(&lab, 200);
    daemon.wait_for_line("the TC filter has been removed by another program; attaching it again").unwrap();
    daemon.wait_for_line("attached TC eBPF program to ingress interface=\"eth0\"").unwrap();
    ours(&filters(&lab.gateway, INGRESS));
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    sender.send(200, &collectors).unwrap();
    assert!(collectors.finish(&[&sender]).unwrap().is_perfect());
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(200)), PacketCounts::forwarded(200));
}
