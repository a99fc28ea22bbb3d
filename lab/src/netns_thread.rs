//! A network namespace for one test: it belongs to a thread, has no name, and the kernel removes it when the thread ends.

use std::panic;
use std::process::Command;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a new thread in a new network namespace. Its only interface is `lo`, which is up.
///
/// # Panics
/// When `test` panics, or when the namespace cannot be created, which needs root.
#[expect(clippy::expect_used, reason = "a test fails by panicking, its helpers too")]
pub fn in_new_netns<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let name = thread::current().name().unwrap_or("netns").to_owned();
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name(name)
            .spawn_scoped(scope, || {
                match unshare(CloneFlags::CLONE_NEWNET) {
                    Ok(()) => {}
                    Err(Errno::EPERM) => panic!("this test creates network namespaces: run it as root"),
                    Err(errno) => panic!("cannot create a network namespace: {errno}"),
                }
                ip("link set lo up");
                test()
            })
            .expect("cannot start a thread");
        handle.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

/// Runs `ip` in the namespace of the calling thread and returns its output.
///
/// # Panics
/// When `ip` is missing or fails.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("cannot run `ip {arguments}` (package iproute2): {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`ip {arguments}` failed: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
