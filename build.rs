//! Compiles the TC program and generates its skeleton; records the git revision.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use libbpf_cargo::SkeletonBuilder;

const SOURCE: &str = "bpf/fanout.bpf.c";

fn main() -> Result<()> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").context("OUT_DIR is not set: run through cargo")?);
    // Not env!(), which would be the place where this program was built: a checkout may have been moved since.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set: run through cargo")?;
    let vmlinux = Path::new(&package).join("vmlinux");
    SkeletonBuilder::new()
        .source(SOURCE)
        .clang_args([
            "-I".into(),
            vmlinux.into_os_string(),
            "-Wall".into(),
            "-Werror".into(),
            // Instructions on 32 bits, which kernels have since 5.1: fewer of them are needed.
            "-mcpu=v3".into(),
            "-Wno-unused-function".into(),
        ])
        .build_and_generate(out.join("fanout.skel.rs"))
        .with_context(|| format!("cannot compile {SOURCE}: clang is needed (on Debian: `make deps`)"))?;
    for directory in ["bpf", "vmlinux"] {
        println!("cargo:rerun-if-changed={directory}");
    }
    println!("cargo:rustc-env=UDP_FANOUT_REVISION={}", revision());
    Ok(())
}

/// The commit that is being built, or what the packager says, or `unknown` outside a git checkout.
fn revision() -> String {
    println!("cargo:rerun-if-env-changed=UDP_FANOUT_REVISION");
    for path in [".git/HEAD", ".git/logs/HEAD"] {
        if Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    if let Ok(revision) = std::env::var("UDP_FANOUT_REVISION") {
        return revision;
    }
    let git = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    match git {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}
