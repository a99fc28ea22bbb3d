use std::time::Duration;

use super::*;
use crate::logging::{LogFormat, LogLevel, LogOptions};

fn parsed(line: &str) -> Invocation {
    try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn refused(line: &str) -> clap::Error {
    match try_parse_from(line.split(' ')) {
        Ok(invocation) => panic!("{line}: {invocation:?}"),
        Err(error) => error,
    }
}

fn default_config() -> std::path::PathBuf {
    DEFAULT_CONFIG.into()
}

fn help(flag: &str) -> String {
    refused(&format!("udp-fanout {flag}")).to_string()
}

#[test]
fn the_definitions_are_sound() {
    command().debug_assert();
}

fn check(cases: &[(&str, Invocation)]) {
    for (line, expected) in cases {
        assert_eq!(parsed(line), *expected, "{line}");
    }
}

#[test]
fn command_lines_mean_what_they_say() {
    let run = |config: &str, level, format| Invocation::Run {
        config: config.into(),
        log: LogOptions { level, format },
        kubeconfig: None,
        status_socket: None,
    };
    let kubeconfig = |file: &str| Invocation::Run {
        config: default_config(),
        log: LogOptions { level: LogLevel::Info, format: LogFormat::Text },
        kubeconfig: Some(file.into()),
        status_socket: None,
    };
    let default = "/etc/udp-fanout/config.toml";
    check(&[
        ("udp-fanout", run(default, LogLevel::Info, LogFormat::Text)),
        ("udp-fanout run", run(default, LogLevel::Info, LogFormat::Text)),
        ("udp-fanout -c a.toml", run("a.toml", LogLevel::Info, LogFormat::Text)),
        ("udp-fanout --config a.toml", run("a.toml", LogLevel::Info, LogFormat::Text)),
        ("udp-fanout --config=a.toml", run("a.toml", LogLevel::Info, LogFormat::Text)),
        ("udp-fanout -c a.toml run", run("a.toml", LogLevel::Info, LogFormat::Text)),
        ("udp-fanout run -c a.toml", run("a.toml", LogLevel::Info, LogFormat::Text)),
        ("udp-fanout -c run", run("run", LogLevel::Info, LogFormat::Text)),
        ("udp-fanout -l debug", run(default, LogLevel::Debug, LogFormat::Text)),
        ("udp-fanout --log-level TRACE", run(default, LogLevel::Trace, LogFormat::Text)),
        ("udp-fanout --log-format json", run(default, LogLevel::Info, LogFormat::Json)),
        ("udp-fanout -l off -c a run --log-format json", run("a", LogLevel::Off, LogFormat::Json)),
        ("udp-fanout --log-format text run -l warn -c b", run("b", LogLevel::Warn, LogFormat::Text)),
        ("udp-fanout --kubeconfig k", kubeconfig("k")),
        ("udp-fanout --kubeconfig k run", kubeconfig("k")),
        ("udp-fanout run --kubeconfig=k", kubeconfig("k")),
    ]);
}

#[test]
fn questions_mean_what_they_say() {
    let rbac = |config: &str, account: &str, namespace: &str| Invocation::Rbac {
        config: config.into(),
        account: account.into(),
        namespace: namespace.into(),
        name: None,
    };
    let named = Invocation::Rbac {
        config: "a".into(),
        account: "udp-fanout".into(),
        namespace: "udp-fanout".into(),
        name: Some("second".into()),
    };
    let status = |config: Option<&str>, socket: Option<&str>, json, watch, interval| Invocation::Status {
        config: config.map(Into::into),
        socket: socket.map(Into::into),
        json,
        watch,
        interval: Duration::from_millis(interval),
    };
    let default = "/etc/udp-fanout/config.toml";
    check(&[
        ("udp-fanout check", Invocation::Check { config: default.into() }),
        ("udp-fanout check --config a.yaml", Invocation::Check { config: "a.yaml".into() }),
        ("udp-fanout -c a.yaml check", Invocation::Check { config: "a.yaml".into() }),
        ("udp-fanout rbac", rbac(default, "udp-fanout", "udp-fanout")),
        ("udp-fanout -c a rbac --service-account b", rbac("a", "b", "udp-fanout")),
        ("udp-fanout rbac -c a --service-account-namespace b", rbac("a", "udp-fanout", "b")),
        ("udp-fanout rbac -c a --name second", named),
        ("udp-fanout status", status(None, None, false, false, 1_000)),
        ("udp-fanout -c a status --json", status(Some("a"), None, true, false, 1_000)),
        ("udp-fanout status --socket s -w --interval 0.5", status(None, Some("s"), false, true, 500)),
        (
            "udp-fanout -c a status --check --socket s",
            Invocation::StatusCheck { config: Some("a".into()), socket: Some("s".into()) },
        ),
        (
            "udp-fanout doctor -c a --sender 10.0.0.2 --sender ::1 --json --kubeconfig k",
            Invocation::Doctor(DoctorOptions {
                config: "a".into(),
                senders: vec!["10.0.0.2".parse().unwrap(), "::1".parse().unwrap()],
                kubeconfig: Some("k".into()),
                json: true,
            }),
        ),
        ("udp-fanout demo", Invocation::Demo(DemoOptions { mode: Mode::TcEbpf, count: 30_000 })),
        (
            "udp-fanout demo --mode userspace --count 12",
            Invocation::Demo(DemoOptions { mode: Mode::Userspace, count: 12 }),
        ),
        ("udp-fanout completions zsh", Invocation::Completions(Shell::Zsh)),
        ("udp-fanout man", Invocation::Man),
        ("udp-fanout schema", Invocation::Schema),
    ]);
}

#[test]
fn options_of_commands_that_look_at_the_kernel_mean_what_they_say() {
    check(&[
        (
            "udp-fanout -c a trace --listener l --source 10.0.0.0/8 --count 3 --json",
            Invocation::Trace {
                config: Some("a".into()),
                socket: None,
                listener: Some("l".into()),
                source: Some("10.0.0.0/8".into()),
                count: Some(3),
                json: true,
            },
        ),
        (
            "udp-fanout detach --pin-path p -i eth0 --interface eth1 --force",
            Invocation::Detach(DetachOptions {
                pin_path: "p".into(),
                interfaces: vec!["eth0".into(), "eth1".into()],
                all: false,
                force: true,
            }),
        ),
    ]);
}

#[test]
fn mistakes_are_refused_with_what_is_wrong() {
    let cases = [
        ("udp-fanout -l verbose", ["'verbose'", "--log-level", "off, error, warn, info, debug, trace"]),
        ("udp-fanout --log-format xml", ["'xml'", "--log-format", "text, json"]),
        ("udp-fanout chek", ["'chek'", "similar", "'check'"]),
        ("udp-fanout --confg a", ["'--confg'", "similar", "'--config'"]),
        ("udp-fanout -c", ["--config <FILE>", "value", "none was supplied"]),
        ("udp-fanout -c a -c b", ["'--config <FILE>'", "cannot be used", "multiple times"]),
        ("udp-fanout -c a run -c b", ["'--config <FILE>'", "cannot be used", "multiple times"]),
        ("udp-fanout -l info run -l info", ["'--log-level <LEVEL>'", "cannot be used", "multiple times"]),
        ("udp-fanout -c a check -c b", ["'--config <FILE>'", "cannot be used", "multiple times"]),
        ("udp-fanout -l info check", ["'--log-level <LEVEL>'", "cannot be used", "'check'"]),
        ("udp-fanout demo --mode auto", ["'auto'", "--mode", "tc_ebpf, userspace"]),
        ("udp-fanout demo --count 0", ["'0'", "--count", "1..=100000000"]),
        ("udp-fanout -c a demo", ["'--config <FILE>'", "cannot be used", "'demo'"]),
        ("udp-fanout --kubeconfig k check", ["'--kubeconfig <FILE>'", "cannot be used", "'check'"]),
        ("udp-fanout --kubeconfig k run --kubeconfig k", ["'--kubeconfig <FILE>'", "cannot", "multiple times"]),
        ("udp-fanout --log-format json rbac", ["'--log-format <FORMAT>'", "cannot be used", "'rbac'"]),
        ("udp-fanout check -l info", ["'-l'", "unexpected", "argument"]),
        ("udp-fanout -c a man", ["'--config <FILE>'", "cannot be used", "'man'"]),
        ("udp-fanout --log-format json completions bash", ["'--log-format <FORMAT>'", "cannot", "'completions'"]),
        ("udp-fanout status --interval 0", ["'--interval <SECS>'", "0.1", "3600"]),
        ("udp-fanout -l info status", ["'--log-level <LEVEL>'", "cannot be used", "'status'"]),
        ("udp-fanout --status-socket s status", ["'--status-socket <PATH>'", "cannot be used", "'status'"]),
        ("udp-fanout doctor --sender x", ["'x'", "--sender <IP>", "invalid IP address"]),
        ("udp-fanout completions", ["<SHELL>", "required", "not provided"]),
        ("udp-fanout completions dos", ["'dos'", "bash", "zsh"]),
        ("udp-fanout run a.toml", ["'a.toml'", "unexpected", "argument"]),
    ];
    for (line, words) in cases {
        let error = refused(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "{line}: no {word:?} in\n{text}");
        }
    }
}

#[test]
fn every_form_of_the_usage_is_accepted() {
    let forms = prose::USAGE.lines().map(str::trim);
    for form in forms.clone() {
        let with_options = form
            .replace(['[', ']'], "")
            .replace("LEVEL", "warn")
            .replace("FORMAT", "json")
            .replace("SECS", "2")
            .replace("CIDR", "10.0.0.0/8")
            .replace("-n N", "-n 3")
            .replace("--count N", "--count 3")
            .replace("--mode MODE", "--mode userspace")
            .replace("NAME...", "eth0")
            .replace("IP...", "10.0.0.2");
        parsed(&with_options.replace("SHELL", "bash"));
    }
    for sub in command().get_subcommands() {
        let mut forms = forms.clone().map(|form| form.replace(['[', ']'], ""));
        let start = format!("udp-fanout {}", sub.get_name());
        assert!(forms.any(|form| form.starts_with(&start)), "{start}");
        let forms: Vec<&str> = prose::USAGE.lines().map(str::trim).filter(|form| form.starts_with(&start)).collect();
        for option in sub.get_arguments().filter(|option| !option.is_positional() && option.get_id() != "help") {
            let long = option.get_long().map(|long| format!("--{long}"));
            let short = option.get_short().map(|short| format!("-{short} "));
            let shown = |form: &&str| [&long, &short].into_iter().flatten().any(|name| form.contains(name.as_str()));
            assert!(sub.get_name() == "run" || forms.iter().any(shown), "{start} has no {long:?}");
        }
    }
}

#[test]
fn examples_in_the_help_are_accepted() {
    let examples = prose::SECTIONS.iter().find(|section| section.title == "Examples").expect("examples");
    let of_ours = examples.entries.iter().filter_map(|(line, _)| Some(&line[line.find("udp-fanout")?..]));
    let mut seen = 0;
    for line in of_ours.filter(|line| !line.contains("://")) {
        let command = line.split(" >").next().and_then(|command| command.split(" |").next());
        parsed(command.expect("a command"));
        seen += 1;
    }
    assert!(seen >= 5);
}

#[test]
fn help_names_every_command_option_and_section() {
    for text in [help("-h"), help("--help")] {
        for sub in command().get_subcommands() {
            assert!(text.contains(&format!("\n  {} ", sub.get_name())), "{}", sub.get_name());
        }
        for option in ["-c, --config <FILE>", "-l, --log-level <LEVEL>", "--log-format <FORMAT>", "-V, --version"] {
            assert!(text.contains(option), "{option}");
        }
        assert!(text.contains(DEFAULT_CONFIG), "the default in the help differs from the default");
        assert!(text.contains("udp-fanout [run] [-c FILE]"));
    }
    let long = help("--help");
    for section in prose::SECTIONS {
        assert!(long.contains(&format!("\n{}:\n", section.title)), "{}", section.title);
    }
    assert!(long.contains("SIGHUP") && long.contains("SIGTERM") && long.contains("RUST_LOG"));
}

#[test]
fn defaults_named_in_the_help_are_the_defaults() {
    let text = help("--help");
    let Invocation::Run { log, .. } = parsed("udp-fanout") else { panic!("run is the default") };
    assert_eq!(log, LogOptions { level: LogLevel::Info, format: LogFormat::Text });
    assert!(text.contains("[default: info]") && text.contains("[default: text]"));
}

#[test]
fn version_has_the_revision() {
    let expected = format!("udp-fanout {} ({})\n", version::PACKAGE, version::REVISION);
    assert_eq!(help("--version"), expected);
    assert_eq!(help("-V"), expected);
    assert!(!version::REVISION.is_empty());
}

#[test]
fn every_shell_has_completions() {
    use clap::ValueEnum;
    for shell in Shell::value_variants() {
        let script = String::from_utf8(completions(*shell)).expect("UTF-8");
        for word in ["udp-fanout", "check", "log-level", "log-format"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
}

#[test]
fn the_manual_page_has_every_command_option_and_section() {
    let page = String::from_utf8(man().expect("a page")).expect("UTF-8");
    assert!(page.contains("\n.TH udp-fanout 8 "), "{page}");
    let plain = page.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "");
    for sub in command().get_subcommands() {
        assert!(plain.contains(&format!("\n.SS {}\n", sub.get_name())), "{}", sub.get_name());
        assert!(plain.contains(&sub.get_about().expect("a description").to_string()), "{}", sub.get_name());
    }
    for text in ["-c, --config", "-l, --log-level", "--log-format", DEFAULT_CONFIG, "udp-fanout check [-c FILE]"] {
        assert!(plain.contains(text), "{text}");
    }
    for title in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS", "EXAMPLES", "SIGNALS", "\"EXIT STATUS\""] {
        assert_eq!(page.matches(&format!("\n.SH {title}\n")).count(), 1, "{title}");
    }
    assert_eq!(page.matches(".ds Aq").count(), 2, "an apostrophe is defined once, for either case");
    // Privileges and signals as they are.
    assert!(plain.contains("the capabilities BPF, NET_ADMIN and PERFMON") && !plain.contains("SYS_ADMIN"), "{plain}");
    for signal in ["SIGHUP", "SIGTERM, SIGINT"] {
        assert!(page.contains(&format!("\n\\fB{signal}\\fR\n")), "{signal}: {page}");
    }
}
