//! The kernel refuses any one call to `bpf`: a new configuration is applied whole or not at all, and one that is too
//! large for the maps changes nothing.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::{Pins, config, counted, lab, start_behind, wait_until_counted};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Sender};

/// An strace that makes system calls of a running daemon fail, or kills it at one. Detaches when dropped.
pub struct Tracer {
    strace: Child,
    directory: TempDir,
}

impl Tracer {
    /// Injects a fault, such as `bpf:error=ENOMEM:when=3`, counted from now on.
    pub fn attach(daemon: &Daemon, fault: &str) -> Tracer {
        let (call, _) = fault.split_once(':').unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("strace");
        command.args(["-e", &format!("trace={call}"), "-e", &format!("inject={fault}"), "-o"]);
        command.arg(directory.path().join("trace")).arg("-p").arg(daemon.pid().to_string()).stderr(Stdio::piped());
        let mut strace = command.spawn().expect("strace runs (Debian package strace)");
        let mut said = String::new();
        let mut stderr = BufReader::new(strace.stderr.take().unwrap());
        stderr.read_line(&mut said).unwrap();
        assert!(said.contains("attached"), "{said}");
        // Its final output is read, so that it does not block.
        std::thread::spawn(move || stderr.read_to_string(&mut said));
        Tracer { strace, directory }
    }

    /// Detaches from the daemon. True if a call has failed.
    pub fn finish(mut self) -> bool {
        self.end();
        fs::read_to_string(self.directory.path().join("trace")).unwrap().contains("(INJECTED)")
    }

    fn end(&mut self) {
        if self.strace.try_wait().unwrap().is_none() {
            let _ = kill(Pid::from_raw(self.strace.id().cast_signed()), Signal::SIGINT);
            let _ = self.strace.wait();
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.end();
    }
}

/// A configuration, and how many of 40 datagrams each receiver gets under it.
type Shares = (DaemonConfig, [u64; 2]);

/// The usual one; and one with another policy, one receiver fewer, an admission rule and a second listener.
fn small_and_large(lab: &Lab) -> (Shares, Shares) {
    let small = config(lab, "tc_ebpf");
    let mut large = small.clone();
    let mut second = large.listeners[0].clone();
    (second.name, second.bind) = ("second".into(), "10.0.0.1:9125".into());
    large.listeners[0].downstreams.pop();
    large.listeners[0].extra = "policy = \"hash\"\nsources.allow = \"10.0.0.0/24\"".into();
    large.listeners.push(second);
    ((small, [20, 20]), (large, [40, 0]))
}

/// How many of 40 datagrams each receiver gets. All must arrive.
fn shares(lab: &Lab) -> Vec<u64> {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(40, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete() && report.duplicated == 0, "{report}");
    report.counts()
}

/// Reloads from one configuration to the other until each call has been refused once. Returns how often the new
/// configuration was refused.
fn refuse_each_call(lab: &Lab, before: &Shares, after: &Shares) -> u32 {
    let mut daemon = start_behind(lab, &[], &before.0);
    let (mut refused, mut sent) = (0, 0);
    for nth in 1.. {
        daemon.write_config(&after.0.to_toml()).unwrap();
        let tracer = Tracer::attach(&daemon, &format!("bpf:error=ENOMEM:when={nth}"));
        daemon.signal(Signal::SIGHUP).unwrap();
        let outcome = daemon.wait_for_line("reloaded").unwrap();
        let failed = tracer.finish();
        let followed = !outcome.contains("configuration not reloaded");
        assert!(followed || failed, "call {nth}: {}", daemon.log());
        refused += u32::from(!followed);
        let mut expect = |daemon: &mut Daemon, shares_expected: [u64; 2]| {
            // The daemon reverts what it had applied before it does anything else, such as reply.
            let (received, forwarded, _) = counted(lab);
            assert_eq!((received, forwarded), (sent, sent), "call {nth}: {}", daemon.log());
            assert_eq!(shares(lab), shares_expected, "call {nth}: {}", daemon.log());
            sent += 40;
        };
        expect(&mut daemon, if followed { after.1 } else { before.1 });
        // The failed attempt does not affect the next ones.
        daemon.reload(&after.0.to_toml()).unwrap();
        expect(&mut daemon, after.1);
        daemon.reload(&before.0.to_toml()).unwrap();
        expect(&mut daemon, before.1);
        if !failed {
            break;
        }
    }
    assert!(daemon.stop().unwrap().0.success());
    refused
}

#[test]
fn netns_whatever_the_kernel_refuses_a_configuration_is_followed_whole_or_not_at_all() {
    let lab = lab();
    let (small, large) = small_and_large(&lab);
    let refused = [refuse_each_call(&lab, &small, &large), refuse_each_call(&lab, &large, &small)];
    assert!(refused.iter().all(|refused| *refused >= 3), "{refused:?}");
}

#[test]
fn netns_what_does_not_fit_the_maps_changes_nothing() {
    let lab = lab();
    let limits = "[limits]\nmax_downstreams = 3\n";
    let small = config(&lab, "tc_ebpf");
    let mut daemon = Daemon::spawn(&lab.gateway, super::binary(), &(small.to_toml() + limits)).unwrap();
    daemon.wait_for_line("serving metrics").unwrap();
    assert_eq!(shares(&lab), [20, 20]);
    let mut large = small.clone();
    for last in 20..40 {
        large.listeners[0].downstreams.push((format!("r{last}"), format!("10.0.11.{last}:514").parse().unwrap(), 1));
    }
    daemon.write_config(&(large.to_toml() + limits)).unwrap();
    daemon.signal(Signal::SIGHUP).unwrap();
    daemon.wait_for_line("configuration not reloaded").unwrap();
    let log = daemon.log().to_owned();
    assert!(log.contains("max_downstreams"), "{log}");
    assert_eq!(shares(&lab), [20, 20]);
    wait_until_counted(&lab, 80);
    assert!(daemon.stop().unwrap().0.success());
}

/// Downstreams change so often that their IDs are reused, and their counters move to another map. The
/// daemon is killed at each of these calls; the next one knows all counts.
#[test]
fn netns_killed_while_it_settles_what_numbers_have_counted_it_loses_and_doubles_nothing() {
    let (lab, pins) = (lab(), Pins::new());
    let limits = "[limits]\nmax_downstreams = 2\n";
    let with = |sample: f64| {
        let mut config = pins.config(&lab, "keep");
        config.listeners[0].samples =
            config.listeners[0].downstreams.iter().map(|(n, ..)| (n.clone(), sample)).collect();
        config.listeners[0].extra = "policy = \"replicate\"".into();
        config.to_toml() + limits
    };
    let mut sent = 0;
    let mut killed = 0;
    for nth in 1.. {
        let mut daemon = Daemon::spawn(&lab.gateway, super::binary(), &with(1.0)).unwrap();
        daemon.wait_for_line("serving metrics").unwrap();
        if sent > 0 {
            daemon.wait_for_logged("counters go on").unwrap();
        }
        assert_eq!(counted_copies(&lab), (sent, 2 * sent), "call {nth}: {}", daemon.log());
        // Three times two IDs, of four in all.
        let mut ended = false;
        for turn in 0..3 {
            copies(&lab);
            sent += 20;
            daemon.write_config(&with(if turn % 2 == 0 { 0.999_999_999 } else { 1.0 })).unwrap();
            let tracer = (turn == 2).then(|| Tracer::attach(&daemon, &format!("bpf:signal=SIGKILL:when={nth}")));
            daemon.signal(Signal::SIGHUP).unwrap();
            ended = daemon.wait_for_line("configuration reloaded").is_err();
            drop(tracer);
        }
        if !ended {
            daemon.signal(Signal::SIGKILL).unwrap();
        }
        daemon.wait().unwrap();
        killed += u32::from(ended);
        if !ended {
            break;
        }
    }
    assert!(killed > 5, "only {killed}");
}

/// Sends some datagrams, of which each receiver gets a copy.
fn copies(lab: &Lab) {
    let collectors = Collectors::start(lab, Expect::EachOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(20, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{report}");
}

/// Datagrams received, and copies forwarded.
fn counted_copies(lab: &Lab) -> (u64, u64) {
    let (received, _, copies) = counted(lab);
    (received, copies)
}
