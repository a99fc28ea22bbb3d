//! The program among TCX programs: before or after others, removed with its daemon, and moved between hooks without
//! losing a datagram or processing one twice.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use libbpf_rs::{TC_INGRESS, TcHookBuilder, libbpf_sys};
use nix::sys::signal::Signal;
use udp_fanout::testing::host::programs::{self, Hook};

use super::counters::{PacketCounts, binary, check_counters, filters, start};
use super::filters::{Other, exchange};
use super::packets::widen_ingress;
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::daemon::Surroundings;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender, old_kernel};

const TCX: &str = "attach = \"tcx\"";

fn lab() -> Lab {
    Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap()
}

fn config(lab: &Lab, head: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, "tc_ebpf");
    config.head = format!("watch_config = false\n{head}");
    config
}

/// IDs of the ingress TCX programs, in the order they run.
fn chain_ids(lab: &Lab) -> Vec<u32> {
    let index = lab.gateway.link(INGRESS).unwrap().index;
    lab.gateway.run(|| Ok(programs::list(index, Hook::TcxIngress)?)).unwrap()
}

fn chain(lab: &Lab) -> Vec<String> {
    chain_ids(lab).into_iter().map(|id| programs::name(id).unwrap()).collect()
}

fn attach_other(lab: &Lab, name: &std::ffi::CStr) -> Other {
    let mut other = Other::load(name);
    other.attach_tcx(&lab.gateway, INGRESS, libbpf_sys::BPF_TCX_INGRESS);
    other
}

fn preceding_programs(daemon: &Daemon, lab: &Lab) -> u64 {
    daemon.metrics(&lab.gateway).unwrap().sum("udp_fanout_programs_ahead", &[("interface", INGRESS)])
}

#[test]
fn netns_a_tcx_program_delivers_and_goes_with_the_daemon_however_that_ends() {
    let lab = lab();
    for killed in [false, true] {
        for attach in [TCX, "attach = \"auto\""] {
            let mut daemon = start(&lab, &config(&lab, attach));
            assert_eq!(chain(&lab), ["udp_fanout"]);
            assert!(filters(&lab.gateway, INGRESS).is_empty());
            exchange(&lab, 400);
            check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);
            if killed {
                daemon.signal(Signal::SIGKILL).unwrap();
                daemon.wait().unwrap();
            } else {
                let (status, _, log) = daemon.stop().unwrap();
                assert!(status.success(), "{log}");
            }
            assert!(chain(&lab).is_empty());
        }
    }
}

#[test]
fn netns_where_the_kernel_has_no_tcx_a_filter_serves_or_the_start_says_so() {
    let lab = lab();
    let old = old_kernel();
    let daemon = Daemon::start_behind(&lab.gateway, &old, binary(), &config(&lab, "attach = \"auto\"")).unwrap();
    assert_eq!((chain(&lab).len(), filters(&lab.gateway, INGRESS).len()), (0, 1));
    exchange(&lab, 400);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);
    daemon.stop().unwrap();

    let text = config(&lab, TCX).to_toml();
    let mut refused = Daemon::spawn_behind(&lab.gateway, &old, binary(), &text, &Surroundings::default()).unwrap();
    assert_eq!(refused.wait().unwrap().code(), Some(1));
    assert!(refused.log().contains("attach = \"tcx\" needs Linux 6.6"), "{}", refused.log());
    assert!(filters(&lab.gateway, INGRESS).is_empty());
}

#[test]
fn netns_a_tcx_program_is_where_it_is_wanted_and_says_who_is_before_it() {
    let lab = lab();
    let _other = attach_other(&lab, c"other_tcx");
    let mut daemon = start(&lab, &config(&lab, TCX));
    assert_eq!(chain(&lab), ["udp_fanout", "other_tcx"]);
    assert_eq!(preceding_programs(&daemon, &lab), 0);
    exchange(&lab, 200);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(200)), PacketCounts::NOTHING);

    let warning = "interface eth0: the TCX program other_tcx (program ";
    assert!(!daemon.log().contains(warning));
    daemon.reload(&config(&lab, "attach = \"tcx\"\ntcx_order = \"last\"").to_toml()).unwrap();
    assert_eq!(chain(&lab), ["other_tcx", "udp_fanout"]);
    assert!(filters(&lab.gateway, INGRESS).is_empty());
    daemon.wait_for_logged(warning).unwrap();
    assert_eq!(preceding_programs(&daemon, &lab), 1);
    exchange(&lab, 200);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);
    // And back. A hook holds a program only once, so it is detached for a moment.
    daemon.reload(&config(&lab, TCX).to_toml()).unwrap();
    assert_eq!((chain(&lab), preceding_programs(&daemon, &lab)), (vec!["udp_fanout".into(), "other_tcx".into()], 0));
}

#[test]
fn netns_who_comes_before_our_filter_is_warned_of_whenever_it_comes() {
    let lab = lab();
    let _first = attach_other(&lab, c"other_tcx");
    let filter = Other::load(c"other_first");
    filter.attach(&lab.gateway, TC_INGRESS, (10, 1));
    let mut daemon = start(&lab, &config(&lab, ""));
    daemon.wait_for_logged("interface eth0: the TCX program other_tcx (program ").unwrap();
    daemon.wait_for_logged("interface eth0: the filter other_first (bpf) at pref 10 sees packets before").unwrap();
    assert_eq!(preceding_programs(&daemon, &lab), 2);
    let _later = attach_other(&lab, c"other_later");
    // The daemon lists other programs every few seconds.
    daemon.wait_for_logged("interface eth0: the TCX program other_later (program ").unwrap();
    assert_eq!(preceding_programs(&daemon, &lab), 3);
    exchange(&lab, 200);
}

#[test]
fn netns_a_filter_left_by_a_killed_daemon_goes_when_a_tcx_program_takes_its_place() {
    let lab = lab();
    let mut killed = start(&lab, &config(&lab, ""));
    killed.signal(Signal::SIGKILL).unwrap();
    killed.wait().unwrap();
    assert_eq!(filters(&lab.gateway, INGRESS).len(), 1);
    let daemon = start(&lab, &config(&lab, TCX));
    assert!(filters(&lab.gateway, INGRESS).is_empty());
    exchange(&lab, 400);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);
}

#[test]
fn netns_a_tcx_program_taken_off_is_put_back() {
    let lab = lab();
    let mut daemon = start(&lab, &config(&lab, TCX));
    let links = super::counters::bpftool(&["link", "list"]);
    let [ours] = chain_ids(&lab)[..] else { panic!("one program") };
    let link = links.as_array().unwrap().iter().find(|link| link["prog_id"] == ours).unwrap();
    super::counters::bpftool(&["link", "detach", "id", &link["id"].to_string()]);
    assert!(chain(&lab).is_empty());
    exchange(&lab, 200);
    daemon.wait_for_line("removed by another program; attaching it again").unwrap();
    daemon.wait_for_line("attached TC eBPF program to ingress").unwrap();
    assert_eq!(chain(&lab), ["udp_fanout"]);
    exchange(&lab, 200);
}

/// While the program is on both hooks, the second one sees what the first passes to the stack.
#[test]
fn netns_on_both_hooks_each_datagram_is_taken_once() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::GatewayHost]).build().unwrap();
    widen_ingress(&lab, 9_000);
    let daemon = start(&lab, &config(&lab, TCX));
    let index = i32::try_from(lab.gateway.link(INGRESS).unwrap().index).unwrap();
    // SAFETY: takes a number, touches no memory of ours.
    let fd = unsafe { libbpf_sys::bpf_prog_get_fd_by_id(chain_ids(&lab)[0]) };
    assert!(fd >= 0);
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    libbpf_rs::set_print(None);
    let attach = || {
        let mut builder = TcHookBuilder::new(program.as_fd());
        let mut hook = builder.ifindex(index).handle(0x7566).priority(49_152).hook(TC_INGRESS);
        hook.create()?;
        hook.attach()?;
        Ok(())
    };
    lab.gateway.run(attach).unwrap();
    exchange(&lab, 300);
    // Longer than the egress MTU, and longer than the ingress MTU: passed to the stack, whole and in fragments.
    // No more of them in flight than the socket's buffer holds.
    for (bytes, window) in [(2_000, 6), (20_000, 2)] {
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap().payload(bytes).window(window);
        sender.send(30, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
    }
    let page = daemon.metrics(&lab.gateway).unwrap();
    assert_eq!(page.sum("udp_fanout_fragments_stray_total", &[]), 0);
    let kernel = PacketCounts { received: 360, forwarded: 320, dropped: 0, passed: 40 };
    check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(40));
}

#[test]
fn netns_from_hook_to_hook_nothing_is_lost_or_taken_twice() {
    let places = [Place::OtherInterface, Place::Pod, Place::GatewayHost];
    let lab = Lab::builder().receivers(places).build().unwrap();
    let _other = attach_other(&lab, c"other_tcx");
    let mut daemon = start(&lab, &config(&lab, ""));
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                sender.send(600, &collectors).unwrap();
            }
        });
        let attachments = [
            TCX,
            "attach = \"tcx\"\ntcx_order = \"last\"",
            "attach = \"clsact\"",
            "tcx_order = \"last\"\nattach = \"auto\"",
            "",
        ];
        for head in attachments.iter().cycle().take(20) {
            daemon.reload(&config(&lab, head).to_toml()).unwrap();
        }
        done.store(true, Ordering::SeqCst);
        traffic.join().unwrap();
    });
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_perfect(), "{report}");
    assert_eq!(report.counts(), vec![sender.sent() / 3; 3], "{report}");
    // The kernel program forwards all of it, at one hook or the other.
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(sender.sent())), PacketCounts::NOTHING);
}
