//! NetFlow v9 with real programs: softflowd exports, three nfcapd collect. A collector can read a record only if the
//! exporter's template has arrived before it, so the count shows whether templates and records stay together.
//!
//! Needs Debian's packages softflowd and nfdump.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use udp_fanout_lab::sockets::{until, waiting_at};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Namespace, Place, sockets};

const EXPORTERS: u8 = 6;
const FLOWS: u16 = 600;

/// A capture of `FLOWS` datagrams, each a flow of its own.
fn capture() -> Vec<u8> {
    let mut file = Vec::new();
    // Microseconds, version 2.4, Ethernet.
    [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65_535, 1u32].iter().for_each(|word| file.extend(word.to_le_bytes()));
    for port in 10_000..10_000 + FLOWS {
        let packet = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64)
            .udp(port, 53);
        let mut frame = Vec::new();
        packet.write(&mut frame, &[b'x'; 20]).unwrap();
        let length = frame.len() as u32;
        [1_700_000_000, 0, length, length].iter().for_each(|word| file.extend(word.to_le_bytes()));
        file.extend(frame);
    }
    file
}

/// One nfcapd, ended when dropped.
struct Collector(Child);

impl Collector {
    fn start(namespace: &Namespace, address: SocketAddr, directory: &Path) -> Collector {
        let mut command = namespace.command("nfcapd");
        command.arg("-w").arg(directory).args(["-b", &address.ip().to_string(), "-p", &address.port().to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let collector = Collector(child.expect("cannot run nfcapd; install the package nfdump"));
        until("nfcapd listens", || waiting_at(namespace, address.port()).is_some());
        collector
    }

    /// Makes it write its records to the file.
    fn stop(mut self) {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM).unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        // Fails if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Exports the capture once from each of several addresses. Returns the number of datagrams.
fn export(lab: &Lab, directory: &Path) -> u64 {
    let (file, before) = (directory.join("flows.pcap"), sockets::udp_count(&lab.sender, "OutDatagrams"));
    fs::write(&file, capture()).unwrap();
    for exporter in 1..=EXPORTERS {
        let source = Ipv4Addr::new(10, 9, 0, exporter);
        lab.sender.ip(&format!("route replace 10.0.0.0/24 dev eth0 src {source}")).unwrap();
        let mut command = lab.sender.command("softflowd");
        command.args(["-d", "-v", "9", "-c", "none", "-n", &lab.listener().to_string()]).arg("-r").arg(&file);
        command.arg("-p").arg(directory.join("softflowd.pid"));
        let output = command.stdin(Stdio::null()).output().expect("cannot run softflowd; install its package");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    sockets::udp_count(&lab.sender, "OutDatagrams") - before
}

/// Sends all exporters' records through the daemon. Returns how many each collector could read.
fn records(lab: &Lab, mode: &str, extra: &str) -> Vec<usize> {
    let directory = TempDir::new().unwrap();
    let daemon = Daemon::start(
        &lab.gateway,
        Path::new(env!("CARGO_BIN_EXE_udp-fanout")),
        &DaemonConfig::for_lab(lab, mode).extra(extra),
    );
    let daemon = daemon.unwrap();
    let places: Vec<_> = lab.sites.iter().map(|site| (site, directory.path().join(&site.name))).collect();
    let start = |(site, flows): &(&udp_fanout_lab::Site, std::path::PathBuf)| {
        fs::create_dir(flows).unwrap();
        Collector::start(lab.namespace_of(site), site.address, flows)
    };
    let collectors: Vec<Collector> = places.iter().map(start).collect();
    let exported = export(lab, directory.path());
    until("all is forwarded", || {
        let metrics = daemon.metrics(&lab.gateway).unwrap();
        metrics.sum("udp_fanout_packets_forwarded_total", &[("mode", mode)]) == exported
    });
    for (site, _) in &places {
        until("nfcapd has read everything", || waiting_at(lab.namespace_of(site), site.address.port()) == Some(0));
    }
    collectors.into_iter().for_each(Collector::stop);
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
    let read = |(_, flows): &(_, std::path::PathBuf)| {
        // One line with the source port for each record; words if there are none.
        let output = Command::new("nfdump").arg("-R").arg(flows).args(["-q", "-o", "fmt:%sp"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.trim().parse::<u16>().is_ok()).count()
    };
    places.iter().map(read).collect()
}

#[test]
fn netns_no_record_comes_without_its_template() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::BehindRouter]).build().unwrap();
    lab.sender.ip("route add local 10.9.0.0/16 dev lo").unwrap();
    lab.gateway.ip("route add 10.9.0.0/16 via 10.0.0.2").unwrap();
    let all = usize::from(EXPORTERS) * usize::from(FLOWS);
    for mode in ["tc_ebpf", "userspace"] {
        let sticky = records(&lab, mode, "protocol = \"netflow\"");
        assert_eq!(sticky.iter().sum::<usize>(), all, "{mode}: {sticky:?}");
        assert!(sticky.iter().filter(|&&count| count > 0).count() > 1, "{mode}: {sticky:?}");
        assert!(sticky.iter().all(|count| count.is_multiple_of(FLOWS.into())), "{mode}: {sticky:?}");
        // The reason for the warning about this combination.
        let parted = records(&lab, mode, "protocol = \"netflow\"\npolicy = \"round_robin\"");
        assert!(parted.iter().sum::<usize>() < all, "{mode}: {parted:?}");
    }
}
