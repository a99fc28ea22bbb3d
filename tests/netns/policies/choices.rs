//! Policies that choose one receiver: by hash, or by message. Both datapaths must make the same choice.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{MODES, forwarded, start, stop};
use udp_fanout_lab::traffic::bind;
use udp_fanout_lab::{DaemonConfig, Lab, Place};

/// Sending addresses, and sockets at each.
const ADDRESSES: u16 = 400;
const PORTS: u16 = 2;

/// A lab in which the sender may use any address of 10.9.0.0/16.
fn lab(places: &[Place]) -> Lab {
    let lab = Lab::builder().receivers(places.iter().copied()).build().unwrap();
    lab.sender.ip("route add local 10.9.0.0/16 dev lo").unwrap();
    lab.gateway.ip("route add 10.9.0.0/16 via 10.0.0.2").unwrap();
    lab
}

/// The senders: each address with each port, always the same ones.
fn senders(lab: &Lab) -> Vec<UdpSocket> {
    let socket = |address: u16, port: u16| {
        let ip = Ipv4Addr::new(10, 9, (address >> 8) as u8, address as u8);
        bind(&lab.sender, SocketAddr::new(IpAddr::V4(ip), 20_000 + port)).unwrap()
    };
    (1..=ADDRESSES).flat_map(|address| (0..PORTS).map(move |port| socket(address, port))).collect()
}

/// A socket in each receiver's namespace.
struct Receivers(Vec<UdpSocket>);

impl Receivers {
    fn new(lab: &Lab) -> Receivers {
        let sockets = lab.sites.iter().map(|site| bind(lab.namespace_of(site), site.address).unwrap());
        Receivers(sockets.inspect(|socket| socket.set_nonblocking(true).unwrap()).collect())
    }

    /// Waits for `count` datagrams. Returns each with its receiver's index.
    fn take(&self, count: usize) -> Vec<(usize, Vec<u8>)> {
        let mut taken = Vec::new();
        let mut buffer = [0; 2000];
        while taken.len() < count {
            let mut ready: Vec<PollFd> = self.0.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)).collect();
            let some = poll(&mut ready, PollTimeout::from(10_000u16)).unwrap();
            assert!(some > 0, "{} of {count} arrived, and then nothing for ten seconds", taken.len());
            for (index, socket) in self.0.iter().enumerate() {
                while let Ok(length) = socket.recv(&mut buffer) {
                    taken.push((index, buffer[..length].to_vec()));
                }
            }
        }
        assert_eq!(taken.len(), count, "more arrived than was sent");
        taken
    }
}

/// Runs the daemon, sends from every sender twice, and returns each sender's receiver. Fails if one has two.
fn choices(lab: &Lab, config: &DaemonConfig, senders: &[UdpSocket]) -> Vec<usize> {
    let daemon = start(lab, config);
    let receivers = Receivers::new(lab);
    let mut chosen = vec![None; senders.len()];
    for _ in 0..2 {
        // No more at once than one receiver's buffer holds.
        for (number, batch) in senders.chunks(50).enumerate() {
            for (index, sender) in batch.iter().enumerate() {
                let index = number * 50 + index;
                sender.send_to(&(index as u64).to_be_bytes(), lab.listener()).unwrap();
            }
            for (receiver, payload) in receivers.take(batch.len()) {
                let index = u64::from_be_bytes(payload.try_into().unwrap()) as usize;
                assert_eq!(*chosen[index].get_or_insert(receiver), receiver, "sender {index} has two receivers");
            }
        }
    }
    assert_eq!(forwarded(lab, &daemon, &config.listeners[0].mode), 2 * senders.len() as u64);
    stop(daemon);
    chosen.into_iter().map(Option::unwrap).collect()
}

fn shares(choices: &[usize], receivers: usize) -> Vec<usize> {
    (0..receivers).map(|receiver| choices.iter().filter(|&&choice| choice == receiver).count()).collect()
}

#[test]
fn netns_both_modes_hash_each_sender_to_the_same_receiver() {
    let lab = lab(&Place::ALL);
    let senders = senders(&lab);
    for hash_on in ["source_ip", "source", "flow"] {
        let policy = format!("policy = \"hash\"\nhash_on = \"{hash_on}\"");
        let [kernel, user] =
            MODES.map(|mode| choices(&lab, &DaemonConfig::for_lab(&lab, mode).extra(&policy), &senders));
        assert_eq!(kernel, user, "hash_on = {hash_on}");
        let together = kernel.chunks(PORTS.into()).filter(|ports| ports.iter().all(|one| *one == ports[0])).count();
        let all = usize::from(ADDRESSES);
        assert_eq!(together == all, hash_on == "source_ip", "{hash_on}: {together} of {all} addresses stay together");
        for share in shares(&kernel, 5) {
            let fair = senders.len() / 5;
            assert!(share.abs_diff(fair) < fair / 4, "{hash_on}: {:?}", shares(&kernel, 5));
        }
    }
}

#[test]
fn netns_when_a_receiver_goes_hardly_any_sender_moves_but_its_own() {
    let lab = lab(&Place::ALL);
    let senders = senders(&lab);
    for mode in MODES {
        let config = DaemonConfig::for_lab(&lab, mode).extra("policy = \"hash\"\nhash_on = \"source\"");
        let before = choices(&lab, &config, &senders);
        for gone in [0, 3] {
            let mut fewer = config.clone();
            fewer.listeners[0].downstreams.remove(gone);
            let after = choices(&lab, &fewer, &senders);
            assert!(!after.contains(&gone));
            let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
            // At most the fifth that must move, and 2%.
            assert!(moved * 100 <= senders.len() * 22, "{mode}: {moved} of {} moved", senders.len());
            let others = moved - shares(&before, 5)[gone];
            assert!(others * 100 <= senders.len() * 2, "{mode}: {others} moved needlessly");
        }
    }
}

#[test]
fn netns_weights_hold_for_hashed_senders() {
    let lab = lab(&[Place::OtherInterface, Place::Pod, Place::BehindRouter]);
    let senders = senders(&lab);
    let [kernel, user] = MODES.map(|mode| {
        let mut config = DaemonConfig::for_lab(&lab, mode).extra("policy = \"hash\"\nhash_on = \"source\"");
        for (downstream, weight) in config.listeners[0].downstreams.iter_mut().zip([5, 1, 2]) {
            downstream.2 = weight;
        }
        choices(&lab, &config, &senders)
    });
    assert_eq!(kernel, user);
    for (share, expected) in shares(&kernel, 3).into_iter().zip([500, 100, 200]) {
        assert!(share.abs_diff(expected) < 50, "{:?}", shares(&kernel, 3));
    }
}

/// A chunk as in Graylog's documentation.
fn chunk(id: u64, number: u8, of: u8) -> Vec<u8> {
    [&[0x1e, 0x0f][..], &id.to_be_bytes(), &[number, of], &[number; 100]].concat()
}

/// Sends chunked and whole messages in turn. Returns the receiver of each chunked one, and how many whole ones each
/// got.
fn gelf(lab: &Lab, mode: &str) -> (Vec<usize>, Vec<usize>) {
    let daemon = start(lab, &DaemonConfig::for_lab(lab, mode).extra("protocol = \"gelf\""));
    let receivers = Receivers::new(lab);
    let senders: Vec<UdpSocket> = (0..3).map(|_| bind(&lab.sender, (Lab::SENDER, 0).into()).unwrap()).collect();
    let (mut chunked, mut whole) = (Vec::new(), vec![0; lab.sites.len()]);
    for message in 0..120u64 {
        let id = message.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // From different sockets, and with other messages in between: only the ID can keep them together.
        for (number, sender) in (0..3).zip(&senders) {
            sender.send_to(&chunk(id, number, 3), lab.listener()).unwrap();
            sender.send_to(b"{\"version\":\"1.1\",\"host\":\"a\"}", lab.listener()).unwrap();
        }
        let (chunks, others): (Vec<_>, Vec<_>) =
            receivers.take(6).into_iter().partition(|(_, payload)| payload.starts_with(&[0x1e, 0x0f]));
        others.iter().for_each(|&(receiver, _)| whole[receiver] += 1);
        let mut numbers: Vec<u8> = chunks.iter().map(|(_, payload)| payload[10]).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2]);
        assert!(
            chunks.iter().all(|(receiver, _)| *receiver == chunks[0].0),
            "message {message} is split between receivers"
        );
        chunked.push(chunks[0].0);
    }
    assert_eq!(forwarded(lab, &daemon, mode), 720);
    stop(daemon);
    (chunked, whole)
}

#[test]
fn netns_chunks_of_a_message_meet_and_whole_messages_go_round() {
    let lab = lab(&[Place::OtherInterface, Place::Pod, Place::BehindRouter]);
    let [kernel, user] = MODES.map(|mode| gelf(&lab, mode));
    assert_eq!(kernel.0, user.0, "both modes make the same choice");
    assert!(shares(&user.0, 3).iter().all(|share| (25..=55).contains(share)), "{:?}", shares(&user.0, 3));
    assert_eq!(user.1, [120, 120, 120]);
    // Each CPU has its own round robin, which begins and ends anywhere.
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert!(kernel.1.iter().all(|&count| count.abs_diff(120) <= cpus), "{:?}", kernel.1);
}
