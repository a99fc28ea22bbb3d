//! The Debian package: its content, and the effects of install, upgrade, removal and purge. dpkg works on a
//! directory as the root of a system (`dpkg --root`), without privileges and without changes to the host.
//! The maintainer scripts find that directory in `DPKG_ROOT`, Debian's own `deb-systemd-helper` as well; systemctl and
//! deb-systemd-invoke are stand-ins that record their arguments.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_udp-fanout");
const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

/// The package, made from the tested binary, and a later version of it with another example configuration.
struct Packages {
    _directory: TempDir,
    first: PathBuf,
    later: PathBuf,
}

static PACKAGES: LazyLock<Packages> = LazyLock::new(|| {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(format!("{REPOSITORY}/scripts/deb.sh"));
    command.env("BIN", BINARY).env("OUT", directory.path());
    let first = PathBuf::from(run(command.env("DPKG_DEB_COMPRESSOR_TYPE", "none")).trim_end());

    let files = directory.path().join("files");
    run(Command::new("dpkg-deb").arg("--raw-extract").args([&first, &files]));
    edit(&files.join("DEBIAN/control"), |control| control.replace("\nVersion: ", "\nVersion: 9:"));
    edit(&files.join("etc/udp-fanout/config.toml.example"), |example| example + "# later\n");
    let later = directory.path().join("later.deb");
    run(Command::new("dpkg-deb").args(["-Znone", "--root-owner-group", "--build"]).args([&files, &later]));
    Packages { _directory: directory, first, later }
});

fn edit(path: &Path, change: impl FnOnce(String) -> String) {
    fs::write(path, change(fs::read_to_string(path).unwrap())).unwrap();
}

/// Its standard output. Fails unless it succeeds.
fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

fn inside(package: &Path, file: &str) -> Vec<u8> {
    let script = r#"dpkg-deb --fsys-tarfile "$0" | tar --extract --to-stdout ".$1""#;
    let output = Command::new("sh").args(["-c", script]).arg(package).arg(file).output().unwrap();
    assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A system with nothing but systemd.
struct System {
    directory: TempDir,
}

impl System {
    fn new() -> System {
        let directory = tempfile::tempdir().unwrap();
        for made in ["stand-ins", "root/run/systemd/system", "root/var/lib/dpkg/info", "root/var/lib/dpkg/updates"] {
            fs::create_dir_all(directory.path().join(made)).unwrap();
        }
        let system = System { directory };
        fs::write(system.path("/var/lib/dpkg/status"), "").unwrap();
        for program in ["systemctl", "deb-systemd-invoke"] {
            let path = system.directory.path().join("stand-ins").join(program);
            fs::write(&path, "#!/bin/sh\necho \"${0##*/} $*\" >>\"${0%/*}/asked\"\n").unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        }
        system
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.directory.path().join("root").join(absolute.trim_start_matches('/'))
    }

    fn read(&self, absolute: &str) -> String {
        fs::read_to_string(self.path(absolute)).unwrap()
    }

    fn write(&self, absolute: &str, text: &str) {
        fs::create_dir_all(self.path(absolute).parent().unwrap()).unwrap();
        fs::write(self.path(absolute), text).unwrap();
    }

    /// Runs dpkg and returns both outputs. Prompts are answered as by unattended upgrades.
    fn dpkg(&self, arguments: &[&str]) -> String {
        let (stand_ins, path) = (self.directory.path().join("stand-ins"), std::env::var("PATH").unwrap());
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec dpkg "$@" 2>&1"#, "dpkg"]).arg(format!("--root={}", self.path("/").display()));
        // The host has the packages that this one depends on.
        command.args([
            "--force-not-root",
            "--force-script-chrootless",
            "--force-depends",
            "--force-confdef",
            "--force-confold",
        ]);
        command.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", stand_ins.display())).env("LC_ALL", "C.UTF-8");
        run(command.args(arguments))
    }

    fn install(&self, package: &Path) -> String {
        self.dpkg(&["--install", package.to_str().unwrap()])
    }

    /// The calls of systemd's tools since the last call of this function.
    fn asked(&self) -> Vec<String> {
        let asked = self.directory.path().join("stand-ins/asked");
        let text = fs::read_to_string(&asked).unwrap_or_default();
        fs::write(asked, "").unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn is_enabled(&self) -> bool {
        self.path(ENABLED).is_symlink()
    }

    /// All files with our name, except dpkg's own records.
    fn ours(&self) -> Vec<String> {
        let all = run(Command::new("find").arg(".").current_dir(self.path("/")));
        let ours = all.lines().filter(|path| path.contains("udp-fanout") && !path.starts_with("./var/lib/dpkg/"));
        ours.map(str::to_owned).collect()
    }
}

const CONFIG: &str = "/etc/udp-fanout/config.toml";
const EXAMPLE: &str = "/etc/udp-fanout/config.toml.example";
const ENABLED: &str = "/etc/systemd/system/multi-user.target.wants/udp-fanout.service";
const RELOAD: &str = "systemctl --system daemon-reload";
const GOOD: &str =
    "[[listeners]]\nname = \"mine\"\nbind = \"127.0.0.1:5514\"\ndownstream = [{ address = \"127.0.0.1:5515\" }]\n";

#[test]
fn the_package_holds_what_make_install_installs_where_debian_wants_it() {
    let package = &PACKAGES.first;
    let listing = run(Command::new("dpkg-deb").arg("--contents").arg(package));
    let mut files = Vec::new();
    for line in listing.lines() {
        let [mode, owner, .., path] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
        assert_eq!(owner, "root/root", "{line}");
        if mode.starts_with('-') {
            assert_eq!(mode, if path == "./usr/bin/udp-fanout" { "-rwxr-xr-x" } else { "-rw-r--r--" }, "{line}");
            files.push(path.to_owned());
        } else {
            assert_eq!(mode, "drwxr-xr-x", "{line}");
        }
    }
    let doc = "./usr/share/doc/udp-fanout";
    let mut expected = vec![
        "./etc/udp-fanout/config.toml.example".to_owned(),
        "./usr/bin/udp-fanout".to_owned(),
        "./usr/lib/systemd/system/udp-fanout.service".to_owned(),
        "./usr/share/bash-completion/completions/udp-fanout".to_owned(),
        "./usr/share/fish/vendor_completions.d/udp-fanout.fish".to_owned(),
        "./usr/share/lintian/overrides/udp-fanout".to_owned(),
        "./usr/share/man/man8/udp-fanout.8.gz".to_owned(),
        "./usr/share/zsh/vendor-completions/_udp-fanout".to_owned(),
    ];
    expected.extend(["changelog.gz", "changelog.Debian.gz", "copyright"].map(|name| format!("{doc}/{name}")));
    for entry in fs::read_dir(format!("{REPOSITORY}/config")).unwrap() {
        expected.push(format!("{doc}/examples/{}", entry.unwrap().file_name().to_str().unwrap()));
    }
    expected.sort();
    files.sort();
    assert_eq!(files, expected);
    let unit = String::from_utf8(inside(package, "/usr/lib/systemd/system/udp-fanout.service")).unwrap();
    assert!(unit.contains("\nExecStart=/usr/bin/udp-fanout run "), "{unit}");
    // The directory that it creates for the service account's pins is the one in the example.
    assert!(unit.contains("'mkdir -p -m 700 /sys/fs/bpf/udp-fanout && "), "{unit}");
    let example = String::from_utf8(inside(package, EXAMPLE)).unwrap();
    assert!(example.contains("\non_exit = \"keep\"\n") && !example.contains("pin_path"), "{example}");
    let copyright = String::from_utf8(inside(package, "/usr/share/doc/udp-fanout/copyright")).unwrap();
    for text in ["Permission is hereby", "Redistribution and use", "libelf"] {
        assert!(copyright.contains(text), "{copyright}");
    }
}

#[test]
fn the_package_says_what_it_is_and_what_it_needs() {
    let field =
        |name| run(Command::new("dpkg-deb").arg("--field").arg(&PACKAGES.first).arg(name)).trim_end().to_owned();
    assert_eq!(field("Package"), "udp-fanout");
    assert_eq!(field("Version"), format!("{}-1", env!("CARGO_PKG_VERSION").replace('-', "~")));
    assert_eq!(field("Architecture"), run(Command::new("dpkg").arg("--print-architecture")).trim_end());
    // The C library and its unwinder, and nothing else, as README.md says.
    let depends = field("Depends");
    let mut names: Vec<_> = depends.split(", ").map(|one| one.split(' ').next().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["libc6", "libgcc-s1"], "{depends}");
    assert!(depends.contains("libc6 (>= 2."), "{depends}");
    let info = run(Command::new("dpkg-deb").args(["--info"]).arg(&PACKAGES.first).arg("conffiles"));
    assert_eq!(info, format!("{EXAMPLE}\n"));
}

/// `deploy/debian/lintian-overrides` gives the reason for each intended violation.
#[test]
fn lintian_finds_no_fault_with_the_package() {
    let mut command = Command::new("lintian");
    // Tests skip compression to save time.
    let uncompressed = "uses-no-compression-for-control-tarball,uses-no-compression-for-data-tarball";
    command.args(["--fail-on", "error,warning", "--suppress-tags", uncompressed]).arg(&PACKAGES.first);
    assert_eq!(run(&mut command), "");
}

#[test]
fn without_a_configuration_it_is_installed_but_neither_enabled_nor_started() {
    let system = System::new();
    let said = system.install(&PACKAGES.first);
    assert!(said.contains(&format!("there is no {}", system.path(CONFIG).display())), "{said}");
    assert!(said.contains("systemctl enable --now udp-fanout"), "{said}");
    assert_eq!(system.asked(), [RELOAD]);
    assert!(!system.is_enabled());
    assert!(!system.path(CONFIG).exists());
    run(Command::new(system.path("/usr/bin/udp-fanout")).arg("--version"));

    // An upgrade does not enable a service that the administrator has not enabled.
    system.write(CONFIG, GOOD);
    system.install(&PACKAGES.later);
    assert!(!system.is_enabled());
}

#[test]
fn an_upgrade_restarts_it_and_leaves_every_configuration_alone() {
    let system = System::new();
    system.write(CONFIG, GOOD);
    system.install(&PACKAGES.first);
    assert!(system.is_enabled());
    assert_eq!(system.asked(), [RELOAD, "deb-systemd-invoke start udp-fanout.service"]);

    let (mine, example) = (format!("{GOOD}# mine\n"), "# my example\n");
    system.write(CONFIG, &mine);
    system.write(EXAMPLE, example);
    system.install(&PACKAGES.later);
    // Not stopped before: it runs until it is replaced.
    assert_eq!(system.asked(), [RELOAD, "deb-systemd-invoke restart udp-fanout.service"]);
    assert_eq!((system.read(CONFIG), system.read(EXAMPLE)), (mine, example.to_owned()));
    assert!(system.is_enabled());

    fs::remove_file(system.path(ENABLED)).unwrap();
    system.install(&PACKAGES.first);
    assert!(!system.is_enabled(), "a service that the administrator has disabled stays disabled");
}

#[test]
fn a_daemon_is_not_stopped_for_a_version_that_rejects_its_configuration() {
    let system = System::new();
    system.write(CONFIG, GOOD);
    system.install(&PACKAGES.first);
    system.asked();
    system.write(CONFIG, &GOOD.replace("bind", "bund"));
    let said = system.install(&PACKAGES.later);
    assert_eq!(system.asked(), [RELOAD]);
    assert!(said.contains("not restarted, because this version rejects the configuration"), "{said}");
    assert!(said.contains("bund"), "{said}");
}

#[test]
fn removing_stops_it_and_purging_leaves_nothing() {
    let system = System::new();
    system.write(CONFIG, GOOD);
    system.install(&PACKAGES.first);
    system.write("/run/udp-fanout/status.sock", "");
    system.write("/sys/fs/bpf/udp-fanout/1/program", "");
    system.write("/etc/systemd/system/udp-fanout.service.d/override.conf", "");
    system.asked();

    system.dpkg(&["--remove", "udp-fanout"]);
    assert_eq!(system.asked(), ["deb-systemd-invoke stop udp-fanout.service", RELOAD]);
    assert_eq!(system.read(CONFIG), GOOD);
    assert!(!system.path("/usr/bin/udp-fanout").exists());

    system.dpkg(&["--purge", "udp-fanout"]);
    assert_eq!(system.ours(), [""; 0]);
    assert_eq!(system.dpkg(&["--audit"]), "");
}

#[test]
fn nothing_is_asked_of_systemd_where_it_does_not_run() {
    let system = System::new();
    fs::remove_dir_all(system.path("/run/systemd")).unwrap();
    system.write(CONFIG, GOOD);
    system.install(&PACKAGES.first);
    assert!(system.is_enabled(), "for when it does");
    system.install(&PACKAGES.later);
    system.dpkg(&["--purge", "udp-fanout"]);
    assert_eq!(system.asked(), [""; 0]);
    assert_eq!(system.ours(), [""; 0]);
}

#[test]
fn systemd_finds_no_fault_with_the_unit() {
    run(&mut Command::new(format!("{REPOSITORY}/scripts/units.sh")));
}
