//! `docs/DEPLOYMENT.md` against the project: its commands are tried as far as possible without a cluster,
//! its log messages are the program's, its files and metrics exist.

use std::fs;
use std::path::Path;
use std::process::Command;

use udp_fanout::testing::metrics::names;

use super::render::{CHART, helm, kustomize, read, repository, run, tool};

fn guide() -> String {
    read("docs/DEPLOYMENT.md")
}

/// The bodies of its fenced blocks of this language.
fn blocks(text: &str, kind: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() == format!("```{kind}") {
            blocks
                .push(lines.by_ref().take_while(|line| line.trim() != "```").map(|line| format!("{line}\n")).collect());
        }
    }
    assert!(!blocks.is_empty(), "no {kind}");
    blocks
}

/// The commands of its shell blocks, whole lines, without comments.
fn commands() -> Vec<String> {
    let text = blocks(&guide(), "bash").concat().replace("\\\n", " ");
    let code = |line: &str| {
        let code = if line.starts_with('#') { "" } else { line.split(" # ").next().unwrap_or_default() };
        code.trim().to_owned()
    };
    text.lines().map(code).filter(|line| !line.is_empty()).collect()
}

/// The commands of a pipeline, as words. Quoted words may contain blanks and pipes.
fn words(line: &str) -> Vec<Vec<String>> {
    let (mut parts, mut word, mut quote) = (vec![Vec::new()], String::new(), None);
    for c in line.chars().chain([' ']) {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            ('"' | '\'', None) => quote = Some(c),
            (' ', None) => {
                let done = std::mem::take(&mut word);
                match done.as_str() {
                    "" | "&" => {}
                    "|" => parts.push(Vec::new()),
                    _ => parts.last_mut().unwrap().push(done),
                }
            }
            (c, _) => word.push(c),
        }
    }
    parts
}

/// All commands that run this program.
fn of(program: &str) -> Vec<Vec<String>> {
    let all = commands();
    let found: Vec<Vec<String>> = all
        .iter()
        .flat_map(|line| words(line))
        .filter(|part| part.first().is_some_and(|word| word == program))
        .collect();
    assert!(!found.is_empty(), "no {program}");
    found
}

/// The project's source text, with string literals of several lines joined.
fn sources() -> String {
    fn down(directory: &Path, text: &mut String) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                down(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = fs::read_to_string(&path).unwrap();
                let mut joined = source.split("\\\n").map(str::trim_start);
                text.extend(joined.next());
                joined.for_each(|part| text.push_str(part));
            }
        }
    }
    let mut text = String::new();
    down(&repository().join("src"), &mut text);
    text
}

#[test]
fn it_covers_what_the_users_guide_covers() {
    let text = guide();
    let headings: Vec<&str> =
        text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches(['#', ' '])).collect();
    for heading in [
        "Prerequisites",
        "Permissions",
        "Quick deploy",
        "Step 1",
        "Step 2",
        "Step 3",
        "Step 4",
        "Step 5",
        "Configuration",
        "Listener modes",
        "Health checks",
        "Metrics",
        "Receivers with fixed addresses",
        "Production checklist",
        "Performance",
        "Security",
        "High availability",
        "Monitoring",
        "Troubleshooting",
        "Pods get no datagrams",
        "Datagrams are dropped",
        "It is slow",
        "Messages",
        "Examples",
        "Vector",
        "Several tenants",
        "An address for the whole cluster: MetalLB",
        "Bare metal",
        "Uninstalling",
    ] {
        assert!(headings.iter().any(|there| there.starts_with(heading)), "{heading}: {headings:#?}");
    }
    for platform in ["k3s", "kind load", "minikube", "docker push"] {
        assert!(text.contains(platform), "{platform}");
    }
}

#[test]
fn what_it_searches_the_log_for_is_logged() {
    let sources = sources();
    let mut searched = 0;
    for command in of("grep") {
        let pattern = &command[1];
        if pattern.starts_with("udp_fanout_") {
            continue;
        }
        // `endpoints=` is a field, which has its name in the source.
        let found = match pattern.strip_suffix('=') {
            Some(field) => sources.contains(&format!("{field},")) || sources.contains(&format!("{field} =")),
            None => sources.lines().any(|line| in_order(line, &mut pattern.split(".*"))),
        };
        assert!(found, "{pattern}");
        searched += 1;
    }
    assert!(searched >= 6, "{searched}");
}

fn in_order<'a>(line: &str, parts: &mut impl Iterator<Item = &'a str>) -> bool {
    parts.try_fold(line, |rest, part| rest.split_once(part).map(|(_, rest)| rest)).is_some()
}

#[test]
fn every_message_it_explains_is_the_programs() {
    let (sources, text) = (sources(), guide());
    let table = text.lines().skip_while(|line| !line.starts_with("| In the log |")).skip(2);
    let rows: Vec<&str> = table.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() >= 12);
    for row in rows {
        let message = row.split('`').nth(1).unwrap();
        for part in message.split('…') {
            // Code may insert parts of the message.
            let part = part.replace("/sys/kernel/btf/vmlinux", "{KERNEL_BTF}").replace("CAP_BPF ", "{capability} ");
            assert!(sources.contains(part.trim()), "{message}: {part:?}");
        }
    }
}

#[test]
fn every_metric_it_names_is_exported() {
    let text = guide();
    let starts = text.match_indices("udp_fanout_").map(|(at, _)| &text[at..]);
    let names: Vec<&str> =
        starts.map(|rest| rest.split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap()).collect();
    assert!(names.len() >= 8);
    for name in names {
        assert!(names::ALL.iter().any(|metric| metric.name == name), "{name}");
    }
}

#[test]
fn kubectl_understands_every_command() {
    let kubectl = &tool("helm-and-kubectl", "kubectl")[0];
    let all = of("kubectl");
    assert!(all.len() >= 30, "{}", all.len());
    for command in &all {
        let mut child = Command::new(kubectl);
        // No real cluster may be contacted, whatever the host's configuration: a valid command ends in a refused
        // connection.
        child.current_dir(repository()).env("KUBECONFIG", "/dev/null").env("HOME", "/nonexistent");
        child
            .arg("--server=http://127.0.0.1:1")
            .args(&command[1..])
            .stdin(fs::File::open(repository().join("k8s/rbac.yaml")).unwrap());
        let output = child.output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && log.contains("127.0.0.1:1"), "{command:?}: {log}");
        for unwanted in ["unknown", "no such file", "does not exist", "Usage:", "invalid"] {
            assert!(!log.contains(unwanted), "{command:?}: {log}");
        }
    }
    // Their objects are those of the manifests, with the container and the tools of the image.
    let image = read("Dockerfile");
    for command in all.iter().filter(|command| command.iter().any(|word| word.starts_with("daemonset/"))) {
        assert!(command.contains(&"daemonset/udp-fanout".to_owned()), "{command:?}");
        let namespace = command.iter().position(|word| word == "-n").map(|at| command[at + 1].as_str());
        assert_eq!(namespace, Some("udp-fanout"), "{command:?}");
        if let Some(at) = command.iter().position(|word| word == "--") {
            let package = match command[at + 1].as_str() {
                "ip" | "tc" => "iproute2",
                "uname" => "debian",
                other => other,
            };
            assert!(image.contains(package), "{command:?}");
        }
    }
}

#[test]
fn every_file_in_a_command_is_there() {
    let mut seen = 0;
    for word in commands().iter().flat_map(|line| words(line)).flatten() {
        if ["k8s", "config/", "deploy/", "docs/"].iter().any(|start| word.starts_with(start)) {
            assert!(repository().join(&word).exists(), "{word}");
            seen += 1;
        }
    }
    assert!(seen >= 10);
}

#[test]
fn helm_makes_what_its_command_says() {
    let command = of("helm").into_iter().find(|command| command.contains(&"upgrade".to_owned())).unwrap();
    let skipped = ["upgrade", "--install", "--create-namespace", "--values", "my-values.yaml"];
    let kept = command[1..].iter().filter(|word| !skipped.contains(&word.as_str()));
    let directory = tempfile::tempdir().unwrap();
    let values = directory.path().join("values.yaml");
    let text = guide();
    let snippet = blocks(&text, "yaml").into_iter().find(|block| block.starts_with("config:\n")).unwrap();
    fs::write(&values, snippet).unwrap();
    let rendered = run(helm().arg("template").args(kept).arg("--values").arg(&values));
    assert!(
        rendered.contains("yourregistry/udp-fanout:v0.1.0") && rendered.contains("node-role.kubernetes.io/ingress")
    );
    assert!(text.contains(&format!("`{CHART}/values.yaml`")));
}

#[test]
fn the_kustomization_builds() {
    let snippet = blocks(&guide(), "yaml").into_iter().find(|block| block.starts_with("resources:\n")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    // Beside the project, as in the snippet.
    let own = directory.path().join("own");
    fs::create_dir(&own).unwrap();
    let copy = directory.path().join("udp-fanout");
    fs::create_dir(&copy).unwrap();
    run(Command::new("cp").arg("--recursive").arg(repository().join("k8s")).arg(&copy));
    fs::write(own.join("kustomization.yaml"), snippet).unwrap();
    let rendered = kustomize(&own);
    assert_eq!(rendered.matches("image: yourregistry/udp-fanout:v0.1.0").count(), 2, "{rendered}");
    assert!(rendered.contains("- SYS_ADMIN") && rendered.contains("localhostProfile: udp-fanout.json"));
}

#[test]
fn make_has_every_target_and_variable() {
    let makefile = read("Makefile");
    for command in of("make") {
        for word in &command[1..] {
            match word.split_once('=') {
                Some((variable, _)) => assert!(makefile.contains(&format!("\n{variable} ")), "{word}"),
                None => {
                    let start = format!("{word}:");
                    let target = makefile.lines().find(|line| line.starts_with(&start));
                    assert!(target.is_some_and(|line| line.contains("## ")), "{word}");
                }
            }
        }
    }
}

#[test]
fn udp_fanout_understands_every_command() {
    let program = env!("CARGO_BIN_EXE_udp-fanout");
    let inside = of("kubectl").into_iter().filter_map(|command| {
        let at = command.iter().position(|word| word == "--")?;
        (command[at + 1] == "udp-fanout").then(|| command[at + 1..].to_vec())
    });
    let image = of("docker").into_iter().filter_map(|command| {
        let at = command.iter().position(|word| word == "udp-fanout:latest").filter(|_| command[1] == "run")?;
        Some(command[at..].to_vec())
    });
    let mut all: Vec<Vec<String>> = of("udp-fanout").into_iter().chain(inside).chain(image).collect();
    all.push("udp-fanout check --config FILE".split(' ').map(str::to_owned).collect());
    all.push("udp-fanout run --kubeconfig FILE --log-format=json".split(' ').map(str::to_owned).collect());
    for command in &all {
        let help = run(Command::new(program).arg(&command[1]).arg("--help"));
        for option in command.iter().filter(|word| word.starts_with("--")) {
            let option = option.split('=').next().unwrap();
            assert!(help.contains(option), "{command:?}: {help}");
        }
    }
    let tenants =
        run(Command::new(program).current_dir(repository()).args(["rbac", "--config", "config/multi-tenant.toml"]));
    for namespace in ["tenant-a", "tenant-b", "tenant-c"] {
        assert!(tenants.contains(&format!("namespace: {namespace}\n")), "{tenants}");
    }
}
