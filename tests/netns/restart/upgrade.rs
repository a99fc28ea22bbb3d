//! An upgrade from a daemon whose pins have version 2, the last one before the maps were renamed.
//!
//! `tests/data/pins_v2.bpf.o.gz` is the program of that daemon. The test does what the daemon did with it: it fills the
//! maps, pins them under their old names, attaches the filter, and ends. Layouts are written out here, because later
//! versions of the crate may change them.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use libbpf_rs::{MapCore, MapFlags, MapHandle, Object, ObjectBuilder, Program, TC_INGRESS, TcHookBuilder};
use udp_fanout_lab::{Collectors, Expect, INGRESS, Lab, Pins, Place, Sender};

use super::{counted, exchange, filter, start};

/// The maps of version 2 that were pinned, by their names.
const PINNED: [&str; 11] = [
    "STATS",
    "DROPS",
    "COPY_DROPS",
    "DOWNSTREAM_STAT",
    "FRAGMENT_STAT",
    "downstreams",
    "names",
    "owners",
    "ledger",
    ".data.lease",
    "about",
];

/// Datagrams that an even earlier program had forwarded to the first receiver, according to the map `ledger`.
const EARLIER: u64 = 100;

const LISTENERS: u32 = 4;
const DROP_REASONS: u32 = 7;

fn map(object: &Object, name: &str) -> MapHandle {
    let map = object.maps().find(|map| map.name() == name).unwrap_or_else(|| panic!("there is no map {name}"));
    MapHandle::try_from(&map).unwrap()
}

fn load() -> Object {
    let packed = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/pins_v2.bpf.o.gz");
    let mut gzip = Command::new("gzip").args(["-dc", packed]).stdout(Stdio::piped()).spawn().unwrap();
    let mut bytes = Vec::new();
    gzip.stdout.take().unwrap().read_to_end(&mut bytes).unwrap();
    assert!(gzip.wait().unwrap().success());
    let mut builder = ObjectBuilder::default();
    let mut object = builder.name("fanout_bpf").unwrap().open_memory(&bytes).unwrap();
    for mut map in object.maps_mut() {
        let entries = match map.name().to_str().unwrap() {
            "listener_states" | "STATS" | "names" => LISTENERS,
            "DROPS" | "COPY_DROPS" => LISTENERS * DROP_REASONS,
            "drop_log" => LISTENERS * DROP_REASONS * 2,
            "table_slots" | "downstreams" | "DOWNSTREAM_STAT" | "owners" | "sources" | "buckets" | "ledger" => 64,
            _ => continue,
        };
        map.set_max_entries(entries).unwrap();
    }
    object.load().unwrap()
}

fn address_words(address: SocketAddr) -> Vec<u8> {
    let IpAddr::V4(v4) = address.ip() else { panic!("{address} is not an IPv4 address") };
    v4.to_ipv6_mapped().octets().to_vec()
}

/// `struct listener_key`, and the beginning of `struct ledger_key`: address, port, scope or kind.
fn key(address: SocketAddr, scope: u16) -> Vec<u8> {
    [address_words(address), address.port().to_be_bytes().to_vec(), scope.to_ne_bytes().to_vec()].concat()
}

/// `struct downstream`: no link and no next hop, for the kernel knows both (ip_forward=1).
fn downstream(address: SocketAddr) -> Vec<u8> {
    let mut entry = [address_words(address), vec![0; 16], address.port().to_be_bytes().to_vec()].concat();
    entry.extend([2, libc::AF_INET as u8]); // DELIVER_NEIGHBOUR, next_hop_family
    entry.extend([0, 1500, 0, u32::MAX].map(u32::to_ne_bytes).concat()); // ifindex, mtu, flags, sample
    entry.extend([0; 12]); // macs
    entry
}

/// Fills the maps for the lab's listener and its receivers, in turn.
fn fill(object: &Object, lab: &Lab) {
    let update = |name: &str, key: &[u8], value: &[u8]| map(object, name).update(key, value, MapFlags::ANY).unwrap();
    for (id, site) in (0u32..).zip(&lab.sites) {
        update("downstreams", &id.to_ne_bytes(), &downstream(site.address));
        update("table_slots", &id.to_ne_bytes(), &id.to_ne_bytes());
        update("owners", &id.to_ne_bytes(), &1u32.to_ne_bytes());
    }
    // struct listener_state: the table's offset and length in one word; round robin, the smallest MTU, no rules.
    let mut state = (lab.sites.len() as u64).to_ne_bytes().to_vec();
    state.extend([0u32, 1500].map(u32::to_ne_bytes).concat());
    state.resize(56, 0);
    update("listener_states", &0u32.to_ne_bytes(), &state);
    update("listeners", &key(lab.listener(), 0), &[0; 8]);
    update("listeners", &key(SocketAddr::new(lab.listener().ip(), 0), 1), &[0; 8]);
    // struct first_look: LOOK_FURTHER everywhere.
    let mut look = [0; 32];
    look[18] = 2;
    (0u32..1024).for_each(|place| update("first_look", &place.to_ne_bytes(), &look));
    let mut name = b"lab".to_vec();
    name.resize(64, 0);
    update("names", &0u32.to_ne_bytes(), &name);
    let counted = |words: &[u64]| {
        let mut entry: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        entry.resize(18 * 8, 0);
        entry
    };
    let listener = [key(SocketAddr::from(([0, 0, 0, 0], 0)), 0)[16..].to_vec(), vec![0; 4]].concat();
    update("ledger", &[vec![0; 16], listener].concat(), &counted(&[EARLIER, 0, EARLIER * 20, EARLIER * 20]));
    let inherited = [key(lab.sites[0].address, 3), vec![0; 4]].concat();
    update("ledger", &inherited, &counted(&[EARLIER, EARLIER * 20]));
    // struct pins_about: version, one earlier program, the network namespace.
    let namespace = fs::metadata("/proc/thread-self/ns/net").unwrap();
    let mut about = [2u32, 1].map(u32::to_ne_bytes).concat();
    about.extend([namespace.dev(), namespace.ino()].map(u64::to_ne_bytes).concat());
    about.resize(24 + 64 * 4, 0);
    update("about", &0u32.to_ne_bytes(), &about);
}

/// Leaves what the old daemon left: its pins and its filter.
fn leave_version_2(lab: &Lab, pins: &Path) {
    let link = lab.gateway.link(INGRESS).unwrap().index;
    let work = || {
        let object = load();
        fill(&object, lab);
        let program = object.progs_mut().find(|program| program.name() == "udp_fanout").unwrap();
        let id = Program::id_from_fd(program.as_fd()).unwrap();
        let directory = pins.join(id.to_string());
        fs::create_dir_all(&directory).unwrap();
        for name in PINNED {
            let pin = name.strip_prefix(".data.").unwrap_or(name);
            map(&object, name).pin(directory.join(pin)).unwrap();
        }
        let mut program = program;
        program.pin(directory.join("program")).unwrap();
        let mut hook = TcHookBuilder::new(program.as_fd());
        let mut hook = hook.ifindex(link as i32).replace(true).handle(0x7566).priority(49_152).hook(TC_INGRESS);
        hook.create().unwrap().attach().unwrap();
        Ok(())
    };
    lab.gateway.run(work).unwrap();
}

#[test]
fn netns_an_upgrade_from_pins_of_version_2_loses_no_datagram_and_no_counter() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::Pod]).ip_forward(true);
    let (lab, pins) = (lab.build().unwrap(), Pins::new());
    let config = pins.config(&lab, "keep");
    leave_version_2(&lab, &pins.path());
    let old = filter(&lab).expect("the old filter is there");
    exchange(&lab, 300);

    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    sender.send(200, &collectors).unwrap();
    let done = AtomicBool::new(false);
    let (mut daemon, sender) = thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                sender.send(200, &collectors).unwrap();
            }
            sender
        });
        let mut daemon = start(&lab, &config);
        daemon.wait_for_logged("took over from an earlier daemon's TC program, counters go on").unwrap();
        assert_ne!(filter(&lab), Some(old), "the new program has taken over");
        assert_eq!(pins.programs().len(), 1);
        done.store(true, Ordering::SeqCst);
        (daemon, traffic.join().unwrap())
    });
    let sent = sender.sent() + 300 + EARLIER;
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete() && report.duplicated == 0, "{report}");
    assert_eq!(counted(&lab, &daemon), (sent, sent, sent));
    let log = daemon.log().to_owned();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}
