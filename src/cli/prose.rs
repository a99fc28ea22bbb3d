//! Text of `--help` and the manual page beyond the options.

use std::fmt::Write;

/// What the program does, in one line.
pub(super) const ABOUT: &str = "Hand each UDP datagram that arrives at this host to one of several receivers";

/// The usage, one command per line. The one that clap generates shows neither the commands' options nor that `run` is
/// optional.
pub(super) const USAGE: &str = "\
udp-fanout [run] [-c FILE] [-l LEVEL] [--log-format FORMAT] [--kubeconfig FILE] [--status-socket PATH]
       udp-fanout check [-c FILE]
       udp-fanout rbac [-c FILE] [--service-account NAME] [--service-account-namespace NAMESPACE] [--name NAME]
       udp-fanout status [-c FILE] [--socket PATH] [--json] [--watch] [--interval SECS]
       udp-fanout status [-c FILE] [--socket PATH] --check
       udp-fanout trace [-c FILE] [--socket PATH] [--listener NAME] [--source CIDR] [-n N] [--json]
       udp-fanout doctor [-c FILE] [--sender IP]... [--kubeconfig FILE] [--json]
       udp-fanout detach [-c FILE] [--all] [--pin-path PATH] [--force]
       udp-fanout detach [-c FILE] [--interface NAME]... [--pin-path PATH] [--force]
       udp-fanout demo [--mode MODE] [--count N]
       udp-fanout completions SHELL
       udp-fanout man
       udp-fanout schema";

/// What the program does, one paragraph each.
pub(super) const DESCRIPTION: [&str; 4] = [
    "udp-fanout receives UDP datagrams at a port of this host and sends each of them to one of several receivers, keeping \
     the sender's source address. It tracks no connections, so even a single busy sender is spread over all receivers. \
     Receivers come from the configuration file, from DNS or from Kubernetes EndpointSlices.",
    "In mode tc_ebpf, a TC program in the kernel forwards the datagrams before they reach any socket. This needs root, or \
     the capabilities BPF, NET_ADMIN and PERFMON. In mode userspace, sockets and threads forward them, which needs no \
     privilege for ports from 1024 up. Mode auto selects tc_ebpf if this host supports it, else userspace, and logs why.",
    "The daemon stays in the foreground and logs to standard error, as systemd and container runtimes expect.",
    "Without a command, udp-fanout runs the daemon.",
];

/// A section that explains terms.
pub(super) struct HelpSection {
    pub(super) title: &'static str,
    /// Term and explanation.
    pub(super) entries: &'static [(&'static str, &'static str)],
}

/// The sections after the options.
pub(super) const SECTIONS: [HelpSection; 5] = [
    HelpSection {
        title: "Examples",
        entries: &[
            ("udp-fanout", "Run with /etc/udp-fanout/config.toml."),
            ("udp-fanout -c ./syslog.toml -l debug", "Run with another file and log more."),
            ("udp-fanout check -c ./syslog.toml", "Check a file before a reload or restart."),
            (
                "udp-fanout rbac -c ./syslog.toml | kubectl apply -f -",
                "Grant the permissions that a file needs in the cluster.",
            ),
            ("udp-fanout status", "Show what the running daemon does, and present problems."),
            ("udp-fanout status --watch", "Update that every second."),
            ("udp-fanout trace --source 10.0.0.7 -n 10", "Show where the next ten datagrams of one sender go."),
            ("udp-fanout doctor", "Find out why datagrams do not arrive."),
            ("sudo udp-fanout demo", "See it work, in network namespaces of its own."),
            ("udp-fanout detach", "Remove the TC program that a daemon with on_exit = \"keep\" has left."),
            ("RUST_LOG=info,udp_fanout::datapath=trace udp-fanout", "Log one module in detail."),
            ("udp-fanout completions bash > /etc/bash_completion.d/udp-fanout", "Install completions."),
            ("curl http://127.0.0.1:9090/metrics", "Read the metrics, if the configuration enables them there."),
            (
                "curl --unix-socket /run/udp-fanout/status.sock http://localhost/status",
                "Read the status as JSON from the status socket, which speaks HTTP.",
            ),
        ],
    },
    HelpSection {
        title: "Files",
        entries: &[
            ("/etc/udp-fanout/config.toml", "The configuration file, unless --config names another."),
            ("/sys/fs/bpf/udp-fanout", "Pins of the TC program with on_exit = \"keep\"; pin_path changes it."),
            (
                "/run/udp-fanout/status.sock",
                "The status socket, for `udp-fanout status` and `trace`; status_socket changes it.",
            ),
        ],
    },
    HelpSection {
        title: "Environment",
        entries: &[
            ("RUST_LOG", "What to log, as comma-separated [TARGET=]LEVEL; takes precedence over --log-level."),
            ("NO_COLOR", "If set and not empty, output has no colours."),
            (
                "KUBECONFIG",
                "kubeconfig file for the Kubernetes API, outside a pod; used only if a listener follows Services.",
            ),
            (
                "NODE_NAME",
                "This node's name in Kubernetes, for listeners that prefer receivers on their node or in their zone.",
            ),
            (
                "JOURNAL_STREAM",
                "Set by systemd: text lines begin with the priority instead of the time, which the journal has.",
            ),
        ],
    },
    HelpSection {
        title: "Signals",
        entries: &[
            (
                "SIGHUP",
                "Read the configuration file again and put it in force, as a whole; if that is impossible, log why and keep \
                 the present configuration.",
            ),
            (
                "SIGTERM, SIGINT",
                "Detach the TC program from the interfaces (with on_exit = \"keep\", leave it in force), forward the datagrams \
                 that were received, and exit with 0.",
            ),
        ],
    },
    HelpSection {
        title: "Exit status",
        entries: &[
            ("0", "The daemon was stopped by a signal, or the command succeeded; doctor and demo found no problem."),
            ("1", "Something is wrong; one line on standard error says what, where, and how to fix it."),
            ("2", "The command line is wrong."),
            ("78", "The daemon's configuration file does not exist."),
        ],
    },
];

/// The description in `--help`.
pub(super) fn long_about() -> String {
    DESCRIPTION.join("\n\n")
}

/// The sections in `--help`.
pub(super) fn sections_as_text() -> String {
    let mut text = String::new();
    for HelpSection { title, entries } in &SECTIONS {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{title}:");
        for (term, explanation) in *entries {
            let _ = writeln!(text, "  {term}\n          {explanation}");
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text
}
