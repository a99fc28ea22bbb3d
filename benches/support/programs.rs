//! BPF programs that only benchmarks use: compiled when a benchmark starts, and loaded.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::{Object, ObjectBuilder};

/// Compiles a program and loads it. The path is relative to the project's directory and ends in `.bpf.c`.
///
/// # Errors
/// With the error output of the compiler or the verifier.
pub fn load(source: &Path) -> Result<Object> {
    let opened = ObjectBuilder::default().open_memory(&compile(source)?)?;
    opened.load().with_context(|| format!("cannot load {}: this needs root", source.display()))
}

/// Compiles a program and returns the contents of its object file.
///
/// # Errors
/// With the error output of the compiler.
pub fn compile(source: &Path) -> Result<Vec<u8>> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = tempfile::tempdir()?;
    let object = directory.path().join("program.o");
    let include = |name: &str| ["-I".into(), project.join(name).into_os_string()];
    SkeletonBuilder::new()
        .source(project.join(source))
        .obj(&object)
        .clang_args(include("vmlinux").into_iter().chain(include("bpf")).chain([
            // The default comes from a variable that cargo sets only for build scripts.
            format!("-D__TARGET_ARCH_{}", if cfg!(target_arch = "aarch64") { "arm64" } else { "x86" }).into(),
            "-Wall".into(),
        ]))
        .build()
        .with_context(|| format!("cannot compile {}: clang is needed (on Debian: `make deps`)", source.display()))?;
    Ok(std::fs::read(&object)?)
}
