//! What help and manual page say beyond the options: once, for both.

use std::fmt::Write;

/// What the program is, in one line.
pub(super) const ABOUT: &str = "Hand each UDP datagram that arrives at this host to one of several receivers";

/// The forms of the command line, one a line; clap's own would show neither which options go with which command nor
/// that `run` may be left out.
pub(super) const USAGE: &str = "\
udp-fanout [run] [-c FILE] [-l LEVEL] [--log-format FORMAT] [--kubeconfig FILE] [--status-socket PATH]
       udp-fanout check [-c FILE]
       udp-fanout rbac [-c FILE] [--service-account NAME] [--service-account-namespace NAMESPACE]
       udp-fanout status [-c FILE] [--socket PATH] [--json] [--watch] [--interval SECS]
       udp-fanout trace [-c FILE] [--socket PATH] [--listener NAME] [--source CIDR] [-n N] [--json]
       udp-fanout doctor [-c FILE] [--sender IP]... [--kubeconfig FILE] [--json]
       udp-fanout detach [-c FILE] [--all] [--pin-path PATH] [--force]
       udp-fanout detach [-c FILE] [--interface NAME]... [--pin-path PATH] [--force]
       udp-fanout demo [--mode MODE] [--count N]
       udp-fanout completions SHELL
       udp-fanout man";

/// What the program does: paragraphs, unwrapped.
pub(super) const DESCRIPTION: [&str; 4] = [
    "udp-fanout takes the UDP datagrams that arrive at a port of this host and hands each of them to one of the \
     receivers behind it, keeping the sender's source address. It tracks no connections, so a single busy sender \
     spreads over all receivers. Receivers come from the configuration file or from Kubernetes EndpointSlices.",
    "In mode tc_ebpf a TC program in the kernel forwards them, before they reach any socket; that takes root, or the \
     capabilities BPF, NET_ADMIN, PERFMON and SYS_ADMIN. In mode userspace sockets and threads do, which takes no \
     privilege for ports from 1024 up. Mode auto takes the first where it can, else the second, and logs why.",
    "It stays in the foreground and logs to standard error, as systemd and container runtimes like it.",
    "If no command is named, it runs the daemon.",
];

/// A part of the manual that explains some terms.
pub(super) struct Section {
    pub(super) title: &'static str,
    /// Term and explanation.
    pub(super) entries: &'static [(&'static str, &'static str)],
}

/// The parts after the options.
pub(super) const SECTIONS: [Section; 5] = [
    Section {
        title: "Examples",
        entries: &[
            ("udp-fanout", "Run on /etc/udp-fanout/config.toml."),
            ("udp-fanout -c ./syslog.toml -l debug", "Run on another file and log more."),
            ("udp-fanout check -c ./syslog.toml", "Find out whether a file is right before restarting with it."),
            ("udp-fanout rbac -c ./syslog.toml | kubectl apply -f -", "Allow what a file needs in the cluster."),
            ("udp-fanout status", "See what the running daemon is doing, and what is wrong."),
            ("udp-fanout status --watch", "The same, every second."),
            ("udp-fanout trace --source 10.0.0.7 -n 10", "See what becomes of the next ten datagrams of one sender."),
            ("udp-fanout doctor", "Find out why datagrams do not arrive."),
            ("sudo udp-fanout demo", "See it work, in network namespaces of its own."),
            ("udp-fanout detach", "Remove what a daemon with on_exit = \"keep\" has left, for good."),
            ("RUST_LOG=info,udp_fanout::datapath=trace udp-fanout", "Log everything about one part, little of others."),
            ("udp-fanout completions bash > /etc/bash_completion.d/udp-fanout", "Install completions."),
            ("curl http://127.0.0.1:9090/metrics", "Read the counters, if the configuration enables metrics there."),
        ],
    },
    Section {
        title: "Files",
        entries: &[
            ("/etc/udp-fanout/config.toml", "The configuration, unless --config names another."),
            (
                "/sys/fs/bpf/udp-fanout",
                "Where the TC program is kept under on_exit = \"keep\", unless pin_path says otherwise.",
            ),
            (
                "/run/udp-fanout/status.sock",
                "Where the daemon answers `udp-fanout status` and `trace`, unless told otherwise.",
            ),
        ],
    },
    Section {
        title: "Environment",
        entries: &[
            ("RUST_LOG", "What to log, as comma-separated [TARGET=]LEVEL; wins over --log-level."),
            ("NO_COLOR", "If not empty, no colours even on a terminal."),
            (
                "KUBECONFIG",
                "Where the API server of Kubernetes is, outside of a pod; asked only if a listener follows Services.",
            ),
            ("NODE_NAME", "This node's name in Kubernetes, for listeners that prefer receivers by where they run."),
            ("JOURNAL_STREAM", "Set by systemd: the journal has the time of each line already, so text omits it."),
        ],
    },
    Section {
        title: "Signals",
        entries: &[(
            "SIGTERM, SIGINT",
            "Take the TC program off the interfaces (or leave it in force, with on_exit = \"keep\"), forward what has been \
             taken in, and exit with 0.",
        )],
    },
    Section {
        title: "Exit status",
        entries: &[
            (
                "0",
                "Stopped by a signal; or the configuration checked is right; or the daemon has told its status, or \
                the doctor has found no problem.",
            ),
            ("1", "Something is wrong, and one line on standard error says what, where, and how to put it right."),
            ("2", "The command line is wrong."),
        ],
    },
];

/// The description for `--help`.
pub(super) fn long_about() -> String {
    DESCRIPTION.join("\n\n")
}

/// The sections for `--help`.
pub(super) fn sections_as_text() -> String {
    let mut text = String::new();
    for Section { title, entries } in &SECTIONS {
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
