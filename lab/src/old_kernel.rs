//! Simulates a kernel older than 5.8 for the daemon: without `bpf_redirect_neigh`, ring buffers and TCX.

#![allow(clippy::expect_used, reason = "only tests use this, and a panic is how a test fails")]

use std::process::Command;
use std::sync::LazyLock;
use std::{env, fs, process};

/// The wrapper command for the daemon's command line: see `old_kernel.c`.
///
/// # Panics
/// When the library cannot be compiled, which needs clang, as the daemon's build does.
#[must_use]
pub fn old_kernel() -> [&'static str; 2] {
    static PRELOAD: LazyLock<String> = LazyLock::new(compile);
    ["env", PRELOAD.as_str()]
}

/// The library as an `LD_PRELOAD` assignment for `env`. All test processes of a build share the file, which outlives them.
fn compile() -> String {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/old_kernel.c");
    let program = env::current_exe().expect("a process has a program");
    let library = program.with_file_name("libold_kernel.so");
    // Under a temporary name first: other processes may load the library at any time.
    let unfinished = program.with_file_name(format!("libold_kernel.{}.so", process::id()));
    let mut clang = Command::new("clang");
    clang.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&unfinished).args([source, "-ldl"]);
    let output = clang.output().expect("clang runs (Debian package clang)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&unfinished, &library).expect("the library can be renamed");
    format!("LD_PRELOAD={}", library.display())
}
