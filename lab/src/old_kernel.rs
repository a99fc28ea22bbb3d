//! A daemon that finds a kernel before 5.8: without `bpf_redirect_neigh`, ring buffers and TCX.

#![allow(clippy::expect_used, reason = "only tests use this, and a panic is how a test fails")]

use std::process::Command;
use std::sync::LazyLock;
use std::{env, fs, process};

/// The words to put before the daemon's command line: see `old_kernel.c`.
///
/// # Panics
/// When the library cannot be compiled, which takes clang, as the daemon's build does.
#[must_use]
pub fn old_kernel() -> [&'static str; 2] {
    static PRELOAD: LazyLock<String> = LazyLock::new(compile);
    ["env", PRELOAD.as_str()]
}

/// The library's place, as `env` takes it. It is shared by all test processes of a build, and outlives them.
fn compile() -> String {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/old_kernel.c");
    let program = env::current_exe().expect("a process has a program");
    let library = program.with_file_name("libold_kernel.so");
    // Under another name first: other processes may be about to load it.
    let unfinished = program.with_file_name(format!("libold_kernel.{}.so", process::id()));
    let mut clang = Command::new("clang");
    clang.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&unfinished).args([source, "-ldl"]);
    let output = clang.output().expect("clang runs (Debian package clang)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&unfinished, &library).expect("the library can be renamed");
    format!("LD_PRELOAD={}", library.display())
}
