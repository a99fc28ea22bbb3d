//! `icmp`, in network namespaces, through ping sockets and through raw ones.

use std::fs;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use caps::{CapSet, Capability};
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};
use udp_fanout::testing::health::model::{HealthState, ProbeOutcome};
use udp_fanout::testing::health::probers::icmp::{IcmpSocketKind, open};
use udp_fanout::testing::health::settings::{HealthSettings, ProbeKind, ProbeProtocol};

use udp_fanout_lab::Namespace;
use udp_fanout_lab::netns::{End, connect};
use udp_fanout_lab::{in_new_netns, ip};
use udp_fanout_testkit::probing::{Bench, ended, settings, state, watch};

fn address(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), 5514)
}

/// By which kind of socket a thread may send pings.
#[derive(Debug, Clone, Copy, PartialEq)]
enum PingSocket {
    Ping,
    Raw,
    Neither,
}

impl PingSocket {
    const WORKING: [PingSocket; 2] = [PingSocket::Ping, PingSocket::Raw];

    fn set(self) {
        let groups = if self == PingSocket::Ping { "0 2147483647" } else { "1 0" };
        fs::write("/proc/sys/net/ipv4/ping_group_range", groups).unwrap();
        if self != PingSocket::Raw {
            caps::drop(None, CapSet::Effective, Capability::CAP_NET_RAW).unwrap();
        }
        for v6 in [false, true] {
            let access = open(v6).ok().map(|(_, access)| access);
            match self {
                PingSocket::Ping => assert_eq!(access, Some(IcmpSocketKind::Ping)),
                PingSocket::Raw => assert!(matches!(access, Some(IcmpSocketKind::Raw { .. })), "{access:?}"),
                PingSocket::Neither => assert_eq!(access, None),
            }
        }
    }
}

fn nft(rule: &str) {
    let output = Command::new("nft").args(rule.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "nft {rule}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn netns_two_thousand_targets_are_probed_through_one_socket() {
    for permit in PingSocket::WORKING {
        in_new_netns(|| {
            permit.set();
            let downstreams: Vec<SocketAddr> =
                (0..2000).map(|n: u16| SocketAddr::from(([127, 7, (n >> 8) as u8, n as u8], 514))).collect();
            let mut bench = Bench::new();
            let mut settings = settings(ProbeProtocol::Icmp);
            settings.probe.interval = Duration::from_secs(1);
            settings.probe.timeout = Duration::from_secs(1);
            bench.set(&[watch(&downstreams, &settings)]);
            bench.until("all two thousand are healthy", |health| {
                health.downstreams().all(|seen| seen.status.state == HealthState::Healthy)
            });
            assert_eq!(bench.health.open_sockets(), 1);
            assert_eq!(bench.health.downstreams().count(), 2000);
            let tally = bench.health.probe_stats().of(ProbeKind::Icmp);
            println!("{permit:?}: {:?}, {:?} on average", tally.outcomes().collect::<Vec<_>>(), {
                tally.round_trips.sum() / u32::try_from(tally.round_trips.count()).unwrap()
            });
        });
    }
}

#[test]
fn netns_both_families_and_addresses_written_in_the_other() {
    for permit in PingSocket::WORKING {
        in_new_netns(|| {
            permit.set();
            let downstreams = ["127.0.0.1", "::1", "::ffff:127.0.0.9"].map(address);
            let mut bench = Bench::probing(&downstreams, ProbeProtocol::Icmp);
            for downstream in downstreams {
                bench.until_healthy(downstream);
            }
            assert_eq!(bench.health.open_sockets(), 2);
        });
    }
}

#[test]
fn netns_without_permission_nothing_is_concluded_and_the_remedy_is_named() {
    in_new_netns(|| {
        PingSocket::Neither.set();
        let downstream = address("127.0.0.1");
        let mut bench = Bench::probing(&[downstream], ProbeProtocol::Icmp);
        bench.until("a local error is reported", |health| health.local_errors().count() > 0);
        let (kind, reason) =
            bench.health.local_errors().next().map(|(kind, reason)| (kind, reason.to_owned())).unwrap();
        assert_eq!(kind, ProbeKind::Icmp);
        for words in
            ["net.ipv4.ping_group_range, which is \"1 0\"", "CAP_NET_RAW, which is missing", "\"0 2147483647\""]
        {
            assert!(reason.contains(words), "{reason}");
        }
        assert!(!reason.contains('\n'));
        bench.until_probed(5);
        assert_eq!(state(&bench.health, downstream), HealthState::Unknown);
        assert_eq!(bench.health.take_change(), None);
        // The remedy works without a restart.
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        bench.until_healthy(downstream);
    });
}

#[test]
fn netns_what_this_hosts_own_firewall_refuses_says_nothing_of_the_receiver() {
    in_new_netns(|| {
        PingSocket::Ping.set();
        let downstream = address("127.0.0.1");
        let mut bench = Bench::probing(&[downstream], ProbeProtocol::Icmp);
        bench.until_healthy(downstream);
        nft("add table inet t");
        nft("add chain inet t out { type filter hook output priority 0 ; }");
        nft("add rule inet t out icmp type echo-request drop");
        bench.until("a local error is reported", |health| health.local_errors().count() > 0);
        let reason = bench.health.local_errors().next().unwrap().1.to_owned();
        assert!(reason.contains("a packet filter on this host rejects probes"), "{reason}");
        bench.until_probed(5);
        let tally = bench.health.probe_stats().of(ProbeKind::Icmp);
        assert!(ended(tally, ProbeOutcome::NotSent) > 0);
        assert_eq!(ended(tally, ProbeOutcome::Unreachable) + ended(tally, ProbeOutcome::Refused), 0);
    });
}

#[test]
fn netns_no_route_is_known_at_once_and_a_blackhole_too() {
    for permit in PingSocket::WORKING {
        in_new_netns(|| {
            permit.set();
            ip("link add eth0 type veth peer name eth1");
            ip("link set eth0 up");
            ip("addr add 10.0.0.1/24 dev eth0");
            for (route, reason) in [("blackhole", "no usable route"), ("prohibit", "prohibited by a route")] {
                ip(&format!("route add {route} 10.9.0.0/16"));
                let mut bench = Bench::probing(&[address("10.9.0.1")], ProbeProtocol::Icmp);
                let found = bench.until_unhealthy(address("10.9.0.1"));
                assert!(found.starts_with(reason), "{found}");
                ip("route del 10.9.0.0/16");
            }
            let downstreams = ["10.8.0.1", "fd00::1"].map(address);
            let mut bench = Bench::probing(&downstreams, ProbeProtocol::Icmp);
            for downstream in downstreams {
                assert_eq!(bench.until_unhealthy(downstream), "network unreachable: no route");
            }
            assert_eq!(ended(bench.health.probe_stats().of(ProbeKind::Icmp), ProbeOutcome::NoAnswer), 0);
        });
    }
}

/// A prober, a router and a receiver, in a row.
struct Path {
    prober: Namespace,
    router: Namespace,
    receiver: Namespace,
}

impl Path {
    fn build() -> Path {
        let create = |label| Namespace::create(label).unwrap();
        let path = Path { prober: create("prober"), router: create("router"), receiver: create("receiver") };
        connect(
            End { namespace: &path.prober, device: "eth0", addresses: "10.0.0.1/24" },
            End { namespace: &path.router, device: "west", addresses: "10.0.0.254/24" },
        )
        .unwrap();
        connect(
            End { namespace: &path.router, device: "east", addresses: "10.0.1.254/24" },
            End { namespace: &path.receiver, device: "eth0", addresses: "10.0.1.2/24" },
        )
        .unwrap();
        path.prober.ip_batch("addr add fd00::1/64 dev eth0 nodad\nroute add default via 10.0.0.254\n").unwrap();
        path.router.ip_batch("addr add fd00::fe/64 dev west nodad\naddr add fd01::fe/64 dev east nodad\n").unwrap();
        path.prober.ip("-6 route add default via fd00::fe").unwrap();
        path.receiver.ip_batch("addr add fd01::2/64 dev eth0 nodad\nroute add default via 10.0.1.254\n").unwrap();
        path.receiver.ip("-6 route add default via fd01::fe").unwrap();
        path.router.sysctl("net.ipv4.ip_forward", "1").unwrap();
        path.router.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
        // Every error is reported, even after many others.
        path.router.sysctl("net.ipv4.icmp_ratelimit", "0").unwrap();
        path.router.sysctl("net.ipv6.icmp.ratelimit", "0").unwrap();
        path
    }
}

const RECEIVER: [&str; 2] = ["10.0.1.2", "fd01::2"];

#[test]
fn netns_a_receiver_behind_a_router_dies_in_every_way_and_comes_back() {
    for permit in PingSocket::WORKING {
        let path = Path::build();
        let [v4, v6] = RECEIVER.map(address);
        path.prober
            .run(|| {
                permit.set();
                let mut bench = Bench::probing(&[v4, v6], ProbeProtocol::Icmp);
                let healthy = |bench: &mut Bench| [v4, v6].map(|downstream| drop(bench.until_healthy(downstream)));
                healthy(&mut bench);

                // A firewall that drops without an error.
                for rule in
                    ["add table inet t", "add chain inet t in { type filter hook input priority 0 ; policy drop ; }"]
                {
                    path.receiver.tool("nft", rule)?;
                }
                for downstream in [v4, v6] {
                    assert_eq!(bench.until_unhealthy(downstream), "no answer within 300ms");
                }
                path.receiver.tool("nft", "flush ruleset")?;
                healthy(&mut bench);

                // The host is gone: no ARP reply for its address, and eventually the router reports it.
                path.receiver.ip("link set eth0 down")?;
                for downstream in [v4, v6] {
                    bench.until_unhealthy(downstream);
                }
                path.receiver.ip("link set eth0 up")?;
                path.receiver
                    .ip_batch("addr replace fd01::2/64 dev eth0 nodad\nroute replace default via 10.0.1.254\n")?;
                path.receiver.ip("-6 route replace default via fd01::fe")?;
                healthy(&mut bench);

                // The router has no route, and reports it.
                path.router.ip("addr del 10.0.1.254/24 dev east")?;
                path.router.ip("-6 route add unreachable fd01::2/128")?;
                assert_eq!(bench.until_unhealthy(v4), "network unreachable, says 10.0.0.254");
                assert_eq!(bench.until_unhealthy(v6), "network unreachable, says fd00::fe");
                path.router.ip("addr add 10.0.1.254/24 dev east")?;
                path.router.ip("-6 route del unreachable fd01::2/128")?;
                healthy(&mut bench);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn netns_a_hint_has_a_target_probed_before_its_turn() {
    in_new_netns(|| {
        PingSocket::Ping.set();
        let downstream = address("127.0.0.1");
        let mut bench = Bench::new();
        // The next regular round would come after the test's timeout.
        let mut settings: HealthSettings = settings(ProbeProtocol::Icmp);
        settings.probe.interval = Duration::from_secs(3600);
        bench.set(&[watch(&[downstream], &settings)]);
        bench.recheck(downstream.ip());
        bench.until_healthy(downstream);
    });
}

/// Replies to echo requests in place of the kernel, with a defect.
struct EchoResponder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A defect of the reply.
#[derive(Debug, Clone, Copy, PartialEq)]
enum ReplyDefect {
    Nonce,
    Sequence,
    Truncated,
    Type,
    Source,
    None,
}

impl EchoResponder {
    /// Must be called in the receiver's namespace, whose kernel must not reply itself, by a thread that may open raw
    /// sockets.
    fn sockets(defect: ReplyDefect, of: Ipv4Addr) -> (Socket, Socket) {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(IpProtocol::ICMPV4)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let answering = Socket::new(Domain::IPV4, Type::RAW, Some(IpProtocol::ICMPV4)).unwrap();
        let source = if defect == ReplyDefect::Source { Ipv4Addr::new(10, 0, 0, 2) } else { of };
        answering.bind(&SocketAddr::new(source.into(), 0).into()).unwrap();
        (socket, answering)
    }

    fn spawn(defect: ReplyDefect, of: Ipv4Addr, (socket, answering): (Socket, Socket)) -> EchoResponder {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [MaybeUninit::new(0u8); 2048];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                // SAFETY: the buffer was initialised when it was made.
                let packet: Vec<u8> = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect();
                // Every raw socket sees every request; an IP header without options is 20 bytes, destination last.
                let Some((header, message)) = packet.split_at_checked(20) else { continue };
                if header[16..] != of.octets() || message[0] != 8 {
                    continue;
                }
                let mut message = message.to_vec();
                message[0] = 0;
                match defect {
                    ReplyDefect::Nonce => message[10] ^= 1,
                    ReplyDefect::Sequence => message[7] ^= 1,
                    ReplyDefect::Truncated => message.truncate(12),
                    ReplyDefect::Type => message[0] = 14,
                    ReplyDefect::Source | ReplyDefect::None => {}
                }
                message[2..4].fill(0);
                let sum = checksum(&message).to_be_bytes();
                message[2..4].copy_from_slice(&sum);
                answering.send_to(&message, &from).unwrap();
            }
        });
        EchoResponder { stop, thread: Some(thread) }
    }
}

impl Drop for EchoResponder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().expect("the responder has panicked");
    }
}

fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum = words.sum::<u32>();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[test]
fn netns_replies_that_are_not_to_the_probe_or_not_from_the_target_are_ignored() {
    for permit in PingSocket::WORKING {
        let (prober, receiver) = (Namespace::create("prober").unwrap(), Namespace::create("receiver").unwrap());
        connect(
            End { namespace: &prober, device: "eth0", addresses: "10.0.0.1/24" },
            End { namespace: &receiver, device: "eth0", addresses: "10.0.0.2/24" },
        )
        .unwrap();
        receiver.sysctl("net.ipv4.icmp_echo_ignore_all", "1").unwrap();
        let lies = [
            ReplyDefect::Nonce,
            ReplyDefect::Sequence,
            ReplyDefect::Truncated,
            ReplyDefect::Type,
            ReplyDefect::Source,
            ReplyDefect::None,
        ];
        let addresses: Vec<Ipv4Addr> = (10..).take(lies.len()).map(|n| Ipv4Addr::new(10, 0, 0, n)).collect();
        for address in &addresses {
            receiver.ip(&format!("addr add {address}/24 dev eth0")).unwrap();
        }
        let impostors: Vec<EchoResponder> = std::iter::zip(lies, &addresses)
            .map(|(defect, &of)| {
                receiver.run(|| Ok(EchoResponder::spawn(defect, of, EchoResponder::sockets(defect, of)))).unwrap()
            })
            .collect();
        let downstreams: Vec<SocketAddr> = addresses.iter().map(|&of| SocketAddr::new(of.into(), 514)).collect();
        prober
            .run(|| {
                permit.set();
                let (honest, liars) = downstreams.split_last().unwrap();
                let mut bench = Bench::probing(liars, ProbeProtocol::Icmp);
                for liar in liars {
                    assert_eq!(bench.until_unhealthy(*liar), "no answer within 300ms", "{liar}");
                }
                bench.until_probed(15);
                assert_eq!(ended(bench.health.probe_stats().of(ProbeKind::Icmp), ProbeOutcome::Answered), 0);
                bench.set(&[watch(&downstreams, &settings(ProbeProtocol::Icmp))]);
                bench.until_healthy(*honest);
                Ok(())
            })
            .unwrap();
        drop(impostors);
    }
}
