//! Reloads of the program without privileges: in userspace mode, with
//! receivers from a cluster.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use udp_fanout_lab::apiserver::{ApiServer, Kind};
use udp_fanout_lab::cluster::{ready, slice};

use crate::loopback::own_address;

/// The timeout of every wait. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(20);

struct Running {
    child: Child,
    log: BufReader<ChildStderr>,
    config: PathBuf,
}

impl Running {
    fn start(directory: &Path, config: &str, kubeconfig: &Path) -> Running {
        let path = directory.join("config.toml");
        fs::write(&path, config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_udp-fanout"));
        command.args(["run", "--config"]).arg(&path).env("KUBECONFIG", kubeconfig).env("NO_COLOR", "1");
        let mut child = command.env_remove("RUST_LOG").stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Running { child, log, config: path }
    }

    fn read_log_until(&mut self, needle: &str) {
        let mut seen = String::new();
        loop {
            let start = seen.len();
            assert!(self.log.read_line(&mut seen).unwrap() > 0, "ended without {needle:?}:\n{seen}");
            if seen[start..].contains(needle) {
                return;
            }
        }
    }

    fn reload(&mut self, config: &str) {
        let new = self.config.with_extension("new");
        fs::write(&new, config).unwrap();
        fs::rename(&new, &self.config).unwrap();
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGHUP).unwrap();
        self.read_log_until("configuration reloaded");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends numbered datagrams and returns which of the receivers got them. Each must arrive once.
fn who_gets(from: &UdpSocket, to: SocketAddr, receivers: &[UdpSocket]) -> Vec<usize> {
    let mut counts = vec![0; receivers.len()];
    for number in 0..30u8 {
        from.send_to(&[number], to).unwrap();
        let mut seen = BTreeSet::new();
        let guard = std::time::Instant::now() + LIMIT;
        while seen.is_empty() {
            assert!(std::time::Instant::now() < guard, "datagram {number} is lost");
            for (receiver, count) in receivers.iter().zip(&mut counts) {
                let mut byte = [0];
                while receiver.recv(&mut byte).is_ok() {
                    assert!(byte == [number] && seen.insert(number), "datagram {byte:?} is here again");
                    *count += 1;
                }
            }
        }
    }
    counts
}

#[test]
fn a_listener_that_follows_another_service_is_never_without_receivers() {
    let server = ApiServer::start();
    let addresses: [Ipv4Addr; 3] = std::array::from_fn(|_| own_address());
    let receivers = addresses.map(|address| UdpSocket::bind((address, 5514)).unwrap());
    receivers.iter().for_each(|receiver| receiver.set_nonblocking(true).unwrap());
    let pod = |n: usize| ready(&addresses[n - 1].to_string());
    server.apply(Kind::EndpointSlice, slice("logging", "old", "old-a", [pod(1)]));
    server.apply(Kind::EndpointSlice, slice("logging", "new", "new-a", [pod(2)]));
    let listener = SocketAddr::from((own_address(), 5514));
    let config = |source: &str| {
        format!(
            "watch_config = false\n[[listeners]]\nname = \"a\"\nbind = \"{listener}\"\nmode = \"userspace\"\n{source}\n"
        )
    };
    let service =
        |name: &str| config(&format!("kubernetes = {{ namespace = \"logging\", service = \"{name}\", port = 5514 }}"));
    let fixed = config(&format!("downstream = [{{ address = \"{}:5514\" }}]", addresses[2]));
    let directory = tempfile::tempdir().unwrap();
    let mut running = Running::start(directory.path(), &fixed, &server.kubeconfig());
    running.read_log_until("updated userspace downstream set");
    let sender = UdpSocket::bind((own_address(), 0)).unwrap();
    assert_eq!(who_gets(&sender, listener, &receivers), [0, 0, 30]);

    // From static receivers to a Service, while the API server does not reply.
    server.freeze(true);
    running.reload(&service("old"));
    assert_eq!(who_gets(&sender, listener, &receivers), [0, 0, 30], "those so far, until there are others");
    server.freeze(false);
    running.read_log_until("updated userspace downstream set");
    assert_eq!(who_gets(&sender, listener, &receivers), [30, 0, 0]);
    running.reload(&service("new"));
    running.read_log_until("updated userspace downstream set");
    assert_eq!(who_gets(&sender, listener, &receivers), [0, 30, 0]);
    // Only the Service in use is watched.
    server.wait_for_watches(1);
    running.reload(&fixed);
    assert_eq!(who_gets(&sender, listener, &receivers), [0, 0, 30]);
    server.wait_for_watches(0);
    // Changes of the Service no longer affect the listener.
    server.apply(Kind::EndpointSlice, slice("logging", "new", "new-a", [pod(1)]));
    assert_eq!(who_gets(&sender, listener, &receivers), [0, 0, 30]);
}
