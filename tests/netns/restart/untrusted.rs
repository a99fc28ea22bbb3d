//! Other accounts on the host: the files that they create at the pin path, and the locks they hold, do no harm.

use std::fs::{self, File, Permissions};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::symlinkat;
use udp_fanout_lab::{Daemon, INGRESS, Lab, Pins};

use super::{binary, end, exchange, filter, lab, run, start};

/// The user ID of `nobody`, an account without privileges.
const NOBODY: u32 = 65_534;

/// Runs `work` on a thread of an account without privileges.
fn as_unprivileged<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            // The C library's function would change the account of all threads.
            // SAFETY: takes numbers, and changes only the credentials of this thread, which then ends.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) }, 0);
            work()
        });
        inside.join().unwrap()
    })
}

/// The parent of the pin directory, in which every account may create files, as in a BPF file system of mode 1777.
fn open_to_all(pins: &Pins) -> File {
    let around = pins.path().parent().unwrap().to_owned();
    fs::set_permissions(&around, Permissions::from_mode(0o1777)).unwrap();
    File::open(around).unwrap()
}

/// A directory of root's with a file in it.
fn victim() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("precious");
    fs::write(&file, "").unwrap();
    (directory, file)
}

/// The log of a daemon that refuses to start.
fn refusal(lab: &Lab, pins: &Pins) -> String {
    let start = Instant::now();
    let mut daemon = Daemon::spawn(&lab.gateway, binary(), &pins.config(lab, "keep").to_toml()).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(filter(lab), None);
    daemon.log().to_owned()
}

fn detach(lab: &Lab, pins: &Pins) -> (bool, String) {
    let output = run(lab, &["detach"], pins);
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

#[test]
fn netns_links_in_a_directory_of_another_account_are_not_followed() {
    let (lab, pins, (directory, precious)) = (lab(), Pins::new(), victim());
    let around = open_to_all(&pins);
    as_unprivileged(|| {
        mkdirat(&around, "pins", Mode::S_IRWXU).unwrap();
        symlinkat(directory.path(), &around, "pins/4711").unwrap();
    });
    let mut daemon = start(&lab, &pins.config(&lab, "detach"));
    let warning = daemon.wait_for_logged("ignored the pins of earlier daemons").unwrap();
    let found = "is neither root's nor this account's, uid 0 (owner uid 65534, mode 0700)";
    assert!(warning.contains("WARN") && warning.contains(found) && warning.contains("-o mode=0700"), "{warning}");
    exchange(&lab, 300);
    end(daemon, Signal::SIGTERM);
    assert!(precious.exists());

    let log = refusal(&lab, &pins);
    assert!(log.contains("ERROR") && log.contains(&format!("{} {found}", pins.path().display())), "{log}");
    assert!(precious.exists(), "{log}");

    // detach, which root runs, takes directories of any account, as the service's is one.
    let (_, said) = detach(&lab, &pins);
    assert!(precious.exists(), "{said}");
}

#[test]
fn netns_detach_removes_only_what_a_daemon_makes() {
    let (lab, pins, (_directory, precious)) = (lab(), Pins::new(), victim());
    let ours = Pins::new();
    let mut config = ours.config(&lab, "keep");
    config.head += "attach = \"tcx\"\n";
    // Its program is attached by a pinned link, in a directory that only root can enter.
    let daemon = start(&lab, &config);
    let pinned = ours.programs()[0].join(format!("link-{}", lab.gateway.link(INGRESS).unwrap().index));
    assert!(pinned.exists());
    let around = open_to_all(&pins);
    as_unprivileged(|| {
        mkdirat(&around, "pins", Mode::S_IRWXU).unwrap();
        mkdirat(&around, "pins/4711", Mode::S_IRWXU).unwrap();
        symlinkat(&precious, &around, "pins/4711/program").unwrap();
        symlinkat(&pinned, &around, "pins/4711/link-99").unwrap();
        symlinkat(&precious, &around, "pins/4711/mine").unwrap();
    });
    let output = run(&lab, &["detach", "--force"], &pins);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("link-99") && said.contains("it is a link"), "{said}");
    assert!(precious.exists() && pinned.exists());
    exchange(&lab, 300);

    fs::remove_file(pins.path().join("4711/link-99")).unwrap();
    let output = run(&lab, &["detach", "--force"], &pins);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("udp-fanout has not made mine"), "{said}");
    assert!(!pins.path().join("4711/program").is_symlink() && precious.exists());
    exchange(&lab, 300);
    end(daemon, Signal::SIGTERM);
}

#[test]
fn netns_untrusted_places_for_pins_are_refused_with_owner_mode_and_fix() {
    let (lab, pins, (directory, _)) = (lab(), Pins::new(), victim());
    let path = pins.path();
    let around = open_to_all(&pins);
    let refused = |parts: &[&str]| {
        let log = refusal(&lab, &pins);
        let error = format!("ERROR cannot pin the TC program in {}: ", path.display());
        assert!(log.contains(&error) && parts.iter().all(|part| log.contains(part)), "{parts:?}: {log}");
    };
    as_unprivileged(|| symlinkat(directory.path(), &around, "pins").unwrap());
    refused(&["is a symbolic link (owner uid 65534, mode 0777); remove it (`rm ", "mode=0700"]);
    let (removed, said) = detach(&lab, &pins);
    assert!(!removed && said.contains("is a symbolic link"), "{said}");
    fs::remove_file(&path).unwrap();

    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o770)).unwrap();
    refused(&["other accounts may write to ", "(owner uid 0, mode 0770); type `chmod go-w "]);
    fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
    chown(&path, Some(NOBODY), None).unwrap();
    refused(&["(owner uid 65534, mode 0700)", "or `chown 0 "]);
    chown(&path, Some(0), None).unwrap();

    // Without the sticky bit, others could replace the directory.
    fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o777)).unwrap();
    refused(&["other accounts may replace what is in ", "(owner uid 0, mode 0777)", "mode=0700"]);
    fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o1777)).unwrap();
    end(start(&lab, &pins.config(&lab, "keep")), Signal::SIGTERM);
    assert_eq!(pins.programs().len(), 1);

    // Only directories are opened: a FIFO would block.
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let output = lab.gateway.command(binary()).arg("detach").arg("--pin-path").arg(&fifo).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("is no directory (owner uid 0, mode 0700)"), "{said}");
}

#[test]
fn netns_a_lock_held_by_another_process_ends_the_start_with_its_pid() {
    let (lab, pins) = (lab(), Pins::new());
    fs::create_dir(pins.path()).unwrap();
    // As with a manually created directory: every account may open and lock it.
    fs::set_permissions(pins.path(), Permissions::from_mode(0o755)).unwrap();
    let around = open_to_all(&pins);
    let held = as_unprivileged(|| {
        let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
        let directory = File::from(nix::fcntl::openat(around.as_fd(), "pins", flags, Mode::empty()).unwrap());
        directory.lock().unwrap();
        directory
    });
    let expected = format!(
        "cannot lock {} within 3 s: the process {} holds it; end that process",
        pins.path().display(),
        std::process::id()
    );
    let log = refusal(&lab, &pins);
    assert!(log.contains("ERROR") && log.contains(&expected), "{log}");
    let (removed, said) = detach(&lab, &pins);
    assert!(!removed && said.contains(&expected), "{said}");
    drop(held);
    end(start(&lab, &pins.config(&lab, "keep")), Signal::SIGTERM);
    assert_eq!(pins.programs().len(), 1);
}

/// Binds the socket name that claims the lab's ingress.
fn bind_claim(lab: &Lab) -> UnixDatagram {
    let index = lab.gateway.link(INGRESS).unwrap().index;
    let address = SocketAddr::from_abstract_name(format!("udp-fanout/tc/{index}")).unwrap();
    lab.gateway.run(|| Ok(UnixDatagram::bind_addr(&address)?)).unwrap()
}

#[test]
fn netns_a_process_without_privileges_cannot_claim_an_interface() {
    let index = |lab: &Lab| lab.gateway.link(INGRESS).unwrap().index;
    // As another account; and as root, but without the capability, as in a pod of the host network.
    for stranger in [true, false] {
        let (lab, pins) = (lab(), Pins::new());
        let name = format!("udp-fanout/tc/{}", index(&lab));
        let bind = || {
            let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
            let forced = setsockopt(&socket, sockopt::RcvBufForce, &(1 << 29));
            assert_eq!(forced.is_err(), stranger, "{forced:?}");
            socket
        };
        let squatter = lab.gateway.run(|| Ok(if stranger { as_unprivileged(bind) } else { bind() })).unwrap();
        let mut daemon = start(&lab, &pins.config(&lab, "keep"));
        let warning = daemon.wait_for_logged("ignored a process without CAP_NET_ADMIN").unwrap();
        let uid = if stranger { NOBODY } else { 0 };
        assert!(warning.contains(&format!("(uid {uid}) that has bound @{name}, ")), "{warning}");
        exchange(&lab, 300);

        // The daemon's own claim is still valid.
        let elsewhere = Pins::new();
        let mut second = elsewhere.config(&lab, "keep");
        second.metrics = None;
        second.listeners[0].bind = "10.0.0.1:5515".into();
        let second_is_refused = || {
            let mut second = Daemon::spawn(&lab.gateway, binary(), &second.to_toml()).unwrap();
            assert_eq!(second.wait().unwrap().code(), Some(1));
            let log = second.log();
            assert!(log.contains("interface eth0 is already served by another udp-fanout"), "{log}");
        };
        second_is_refused();
        let (removed, said) = detach(&lab, &pins);
        assert!(!removed && said.contains("a udp-fanout daemon is running and serves eth0"), "{said}");
        // Even when the name has become free and another process binds it.
        drop(squatter);
        second_is_refused();

        // It prevents neither a restart, which takes over, nor `detach`.
        let squatter = lab.gateway.run(|| Ok(if stranger { as_unprivileged(bind) } else { bind() })).unwrap();
        end(daemon, Signal::SIGTERM);
        let mut daemon = start(&lab, &pins.config(&lab, "keep"));
        daemon.wait_for_logged("counters go on").unwrap();
        end(daemon, Signal::SIGTERM);
        let (removed, said) = detach(&lab, &pins);
        assert!(removed && said.starts_with("eth0: removed the TC filter"), "{said}");
        drop(squatter);
    }
}

#[test]
fn netns_a_daemon_of_the_version_before_excludes_and_is_excluded() {
    let (lab, pins) = (lab(), Pins::new());
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("udp-fanout");
    fs::copy(Path::new("/bin/sleep"), &program).unwrap();
    // The stand-in has such a daemon's socket and capabilities, and nothing else.
    let mut command: Command = lab.gateway.command(&program);
    let mut old = command.arg("600").stdin(Stdio::from(std::os::fd::OwnedFd::from(bind_claim(&lab)))).spawn().unwrap();
    drop(command);
    let log = refusal(&lab, &pins);
    assert!(log.contains("interface eth0 is already served by another udp-fanout"), "{log}");
    let (removed, said) = detach(&lab, &pins);
    assert!(!removed && said.contains("a udp-fanout daemon is running and serves eth0"), "{said}");
    old.kill().unwrap();
    old.wait().unwrap();

    let daemon = start(&lab, &pins.config(&lab, "detach"));
    let name = format!("udp-fanout/tc/{}", lab.gateway.link(INGRESS).unwrap().index);
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let refused = lab.gateway.run(|| Ok(UnixDatagram::bind_addr(&address)?)).unwrap_err();
    assert!(format!("{refused:#}").contains("in use"), "{refused:#}");
    end(daemon, Signal::SIGTERM);
}

#[test]
fn netns_links_in_our_own_directory_are_not_followed_either() {
    let (lab, pins, (directory, precious)) = (lab(), Pins::new(), victim());
    fs::create_dir(pins.path()).unwrap();
    symlink(directory.path(), pins.path().join("4711")).unwrap();
    let mut daemon = start(&lab, &pins.config(&lab, "keep"));
    daemon.wait_for_logged("ignored what is not a directory of pins").unwrap();
    end(daemon, Signal::SIGTERM);
    assert!(precious.exists());
}
