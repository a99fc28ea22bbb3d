//! DNS with real programs: dnsperf queries the listener, and three unbound servers reply directly to it,
//! bypassing the daemon. Clients accept replies only from the address that they queried, so the servers reply with the
//! listener's source address, by the rule in `docs/DEPLOYMENT.md`.
//!
//! Needs Debian's packages unbound and dnsperf.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use udp_fanout_lab::Site;
use udp_fanout_lab::sockets::{udp_count, until, waiting_at};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Namespace, Place};

const PORT: u16 = 53;
const QUERIES: u64 = 6000;
/// How long a program waits for a reply that will come.
const PATIENCE: Duration = Duration::from_secs(20);

/// One unbound, ended when dropped. Each replies with another address for every name below `test`.
struct Server<'a> {
    child: Child,
    site: &'a Site,
    namespace: &'a Namespace,
    config: PathBuf,
    answer: Ipv4Addr,
}

impl<'a> Server<'a> {
    fn start(lab: &'a Lab, site: &'a Site, answer: Ipv4Addr, directory: &Path) -> Server<'a> {
        let (namespace, config) = (lab.namespace_of(site), directory.join(format!("{}.conf", site.name)));
        let (own, name) = (directory.display(), &site.name);
        let text = format!(
            "server:\n directory: \"{own}\"\n pidfile: \"{own}/{name}.pid\"\n chroot: \"\"\n username: \"\"\n \
             use-syslog: no\n interface: {}\n port: {PORT}\n do-ip6: no\n do-tcp: no\n num-threads: 1\n \
             module-config: \"iterator\"\n access-control: 0.0.0.0/0 allow\n local-zone: \"test.\" redirect\n \
             local-data: \"test. A {answer}\"\nremote-control:\n control-enable: yes\n \
             control-interface: \"{own}/{name}.sock\"\n control-use-cert: no\n",
            site.address.ip()
        );
        fs::write(&config, text).unwrap();
        let log = directory.join(format!("{name}.log"));
        let mut command = namespace.command("unbound");
        command.arg("-d").arg("-c").arg(&config).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(File::create(&log).unwrap()).spawn();
        let mut server =
            Server { child: child.expect("cannot run unbound; install its package"), site, namespace, config, answer };
        until("unbound listens", || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "{}", fs::read_to_string(&log).unwrap());
            waiting_at(namespace, PORT).is_some()
        });
        server
    }

    /// Queries that it has replied to.
    fn answered(&self) -> u64 {
        let output = Command::new("unbound-control").arg("-c").arg(&self.config).arg("stats_noreset").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let count = text.lines().find_map(|line| line.strip_prefix("total.num.queries="));
        count.unwrap_or_else(|| panic!("{output:?}")).parse().unwrap()
    }

    /// Loads the documented rule, with the addresses of this network.
    fn answer_as(&self, listener: SocketAddr) {
        let mut rule = documented("nft");
        let (listener, own) = (listener.ip(), self.site.address.ip());
        for (name, here) in [
            ("LISTENER", listener.to_string()),
            ("RECEIVER", own.to_string()),
            ("GATEWAYS", format!("{{ {listener} }}")),
        ] {
            let start = format!("define {name} = ");
            let documented = rule.lines().find(|line| line.starts_with(&start)).expect(name).to_owned();
            rule = rule.replace(&documented, &format!("{start}{here}"));
        }
        nft(self.namespace, &rule);
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        // Fails if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Loads rules.
fn nft(namespace: &Namespace, rules: &str) {
    let mut command = namespace.command("nft");
    let mut child = command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Makes the clients' host refuse replies from another address than the queried one. dnsperf does not check that: its
/// sockets are not connected.
fn reject_other_sources(namespace: &Namespace, listener: SocketAddr) {
    let (ip, port) = (listener.ip(), listener.port());
    let rule = format!("udp sport {port} ip saddr != {ip} drop");
    nft(namespace, &format!("table ip t {{\n chain c {{\n type filter hook input priority 0\n {rule}\n }}\n}}\n"));
}

/// The one block of this kind in the section about replies.
fn documented(kind: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/DEPLOYMENT.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once("\n### Replies\n").expect("no section Replies");
    let section = section.split("\n## ").next().unwrap().split("\n### ").next().unwrap();
    let opening = format!("```{kind}\n");
    let mut blocks = section.split(&opening).skip(1);
    let block = blocks.next().unwrap_or_else(|| panic!("no {kind}")).split("```").next().unwrap();
    assert!(blocks.next().is_none(), "{kind} more than once");
    block.to_owned()
}

/// Applies the documented settings for a gateway that replies pass through, on one of its interfaces.
fn allow_replies_through(gateway: &Namespace, device: &str) {
    let command = documented("bash").replace("DEVICE", device);
    let settings: Vec<_> = command.split_whitespace().filter_map(|word| word.split_once('=')).collect();
    assert!(settings.len() >= 3, "{command}");
    settings.iter().for_each(|(key, value)| gateway.sysctl(key, value).unwrap());
}

/// Sends one query, from a socket that accepts replies from anywhere or only from its destination. Returns the reply
/// and its source.
fn query(from: &Namespace, whom: SocketAddr, insist: bool) -> (SocketAddr, Ipv4Addr) {
    let mut query = vec![0x75, 0x66, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(b"\x03ask\x04test\x00\x00\x01\x00\x01");
    let answer = from.run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        if insist {
            socket.connect(whom)?;
            socket.send(&query)?;
        } else {
            socket.send_to(&query, whom)?;
        }
        let mut answer = [0; 512];
        let (length, who) = socket.recv_from(&mut answer)?;
        let address: [u8; 4] = answer[length - 4..length].try_into()?;
        Ok((who, address.into()))
    });
    answer.unwrap()
}

/// The report of dnsperf after this many queries: completed, lost, and replied to without error.
fn dnsperf(lab: &Lab, listener: SocketAddr, queries: u64, timeout: Duration) -> [u64; 3] {
    let names = (0..queries).fold(String::new(), |mut names, number| {
        writeln!(names, "q{number}.test A").unwrap();
        names
    });
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(names.as_bytes()).unwrap();
    let mut command = lab.sender.command("dnsperf");
    command.args(["-s", &listener.ip().to_string(), "-p", &listener.port().to_string(), "-d"]).arg(file.path());
    // Few enough at a time that no socket's buffer overflows.
    command.args(["-n", "1", "-c", "4", "-T", "1", "-q", "20", "-l", "120", "-t", &timeout.as_secs().to_string()]);
    let output = command.stdin(Stdio::null()).output().expect("cannot run dnsperf; install its package");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let count = |name: &str| {
        let mut after = text.split_once(name).map_or("0", |(_, after)| after).split_whitespace();
        after.next().unwrap().parse().unwrap()
    };
    assert_eq!(count("Queries sent:"), queries, "{text}");
    ["Queries completed:", "Queries lost:", "NOERROR"].map(count)
}

/// Datagrams handed to each downstream so far, once that is `total`.
fn forwarded(lab: &Lab, daemon: &Daemon, mode: &str, total: u64) -> Vec<u64> {
    until("all is forwarded", || {
        let metrics = daemon.metrics(&lab.gateway).unwrap();
        metrics.sum("udp_fanout_packets_forwarded_total", &[("mode", mode)]) == total
    });
    let metrics = daemon.metrics(&lab.gateway).unwrap();
    let of =
        |site: &Site| metrics.sum("udp_fanout_downstream_packets_total", &[("endpoint", &site.address.to_string())]);
    lab.sites.iter().map(of).collect()
}

/// Runs the clients, first without the rule on the servers, then with it.
fn replies_go_directly_back(mode: &str, settings: &str) {
    // Two reply past the gateway, one through it, as a pod on its node must.
    let places = [Place::SameInterface, Place::SameInterface, Place::Pod];
    let lab = Lab::builder().receivers(places).port(PORT).rp_filter(0).build().unwrap();
    allow_replies_through(&lab.gateway, "pod3");
    let directory = TempDir::new().unwrap();
    let start = |(site, n)| Server::start(&lab, site, Ipv4Addr::new(192, 0, 2, n), directory.path());
    let servers: Vec<Server> = lab.sites.iter().zip(1..).map(start).collect();
    let listener = SocketAddr::new(lab.listener().ip(), PORT);
    let mut config = DaemonConfig::for_lab(&lab, mode).extra("protocol = \"dns\"").settings(settings);
    config.listeners[0].bind = listener.to_string();
    let daemon = Daemon::start(&lab.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), &config).unwrap();

    // Without the rule, a reply has its server's address, and a client that checks the source never gets one.
    let (who, what) = query(&lab.sender, listener, false);
    assert!(servers.iter().any(|server| (server.site.address, server.answer) == (who, what)), "{mode}: {who} {what}");
    reject_other_sources(&lab.sender, listener);
    assert_eq!(dnsperf(&lab, listener, 6, Duration::from_secs(1)), [0, 6, 0], "{mode}");

    servers.iter().for_each(|server| server.answer_as(listener));
    assert_eq!(query(&lab.sender, listener, true).0, listener, "{mode}");
    // Queries from the gateway to a server itself, such as health checks, still get replies from that server.
    for server in &servers {
        assert_eq!(query(&lab.gateway, server.site.address, true), (server.site.address, server.answer), "{mode}");
    }
    let asked = 1 + 6 + 1;
    let before = forwarded(&lab, &daemon, mode, asked);
    let answered = || servers.iter().map(Server::answered).collect::<Vec<_>>();
    // Besides forwarded queries, each has replied to the gateway.
    until("all is replied to", || answered().iter().sum::<u64>() == asked + 3);
    let (answered_before, received) = (answered(), udp_count(&lab.gateway, "InDatagrams"));

    assert_eq!(dnsperf(&lab, listener, QUERIES, PATIENCE), [QUERIES, 0, QUERIES], "{mode}");
    let since = |now: Vec<u64>, before: &[u64]| now.iter().zip(before).map(|(a, b)| a - b).collect::<Vec<_>>();
    let each = since(forwarded(&lab, &daemon, mode, asked + QUERIES), &before);
    assert_eq!(since(answered(), &answered_before), each, "{mode}");
    assert_eq!(each.iter().sum::<u64>(), QUERIES, "{mode}");
    // Each CPU or worker has its own round robin, so counts differ by at most one for each.
    let turns = fs::read_to_string("/proc/cpuinfo").unwrap().matches("processor\t").count() as u64;
    assert!(each.iter().max().unwrap() - each.iter().min().unwrap() <= turns, "{mode}: {each:?}");
    // Sockets of the daemon's host received no reply. The kernel program passes no query to them either.
    let queries = if mode == "userspace" { QUERIES } else { 0 };
    assert_eq!(udp_count(&lab.gateway, "InDatagrams") - received, queries, "{mode}");
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
}

#[test]
fn netns_replies_go_directly_back_past_the_kernel_program() {
    replies_go_directly_back("tc_ebpf", "");
}

#[test]
fn netns_replies_go_directly_back_past_the_workers() {
    replies_go_directly_back("userspace", "preserve_source = true");
}
