//! Kubernetes objects from files, kustomizations and the chart.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

pub const CHART: &str = "deploy/helm/udp-fanout";

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A program of `scripts/tools.sh`, in each of its versions, oldest first.
pub fn tool(tool: &str, program: &str) -> Vec<PathBuf> {
    let script = repository().join("scripts/tools.sh");
    let output = Command::new(script).args(["--bin", tool]).output().unwrap();
    let directories = String::from_utf8(output.stdout).unwrap();
    let programs: Vec<PathBuf> = directories.lines().map(|line| Path::new(line).join(program)).collect();
    assert!(!programs.is_empty(), "scripts/tools.sh knows no {tool}");
    for program in &programs {
        assert!(program.exists(), "{} is missing: `scripts/deps.sh test` installs it", program.display());
    }
    programs
}

/// The command's standard output. Panics if it fails or prints to standard error.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && complaints.is_empty(), "{command:?}: {complaints}{text}");
    text
}

/// The documents of a YAML text.
pub fn objects(text: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    all.into_iter().filter(|object| !object.is_null()).collect()
}

/// Every file with objects in `k8s/`, by its path.
pub fn plain() -> Vec<(String, String)> {
    let entries = fs::read_dir(repository().join("k8s")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<String> = names.filter(|name| name.ends_with(".yaml") && name != "kustomization.yaml").collect();
    files.sort();
    let path = |name: String| format!("k8s/{name}");
    files.into_iter().map(path).map(|path| (path.clone(), read(&path))).collect()
}

/// `kubectl kustomize` of the directory.
pub fn kustomize(directory: &Path) -> String {
    let kubectl = &tool("helm-and-kubectl", "kubectl")[0];
    run(Command::new(kubectl).arg("kustomize").arg(directory))
}

/// A user's overlay: `k8s/` with these of its components, and an image from a registry.
pub fn overlay(components: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    // kustomize knows relative paths only, and the temporary directory may be reached through links.
    let from = fs::canonicalize(directory.path()).unwrap();
    let up = "../".repeat(from.components().count() - 1);
    let k8s = format!("{up}{}", repository().join("k8s").to_str().unwrap().trim_start_matches('/'));
    let mut text = format!("resources:\n  - {k8s}\nimages:\n  - name: udp-fanout\n    newName: registry.example/fan\n");
    if !components.is_empty() {
        text += "components:\n";
        components.iter().for_each(|name| text += &format!("  - {k8s}/components/{name}\n"));
    }
    fs::write(from.join("kustomization.yaml"), text).unwrap();
    kustomize(&from)
}

/// The names of the components of `k8s/`.
pub fn components() -> Vec<String> {
    let entries = fs::read_dir(repository().join("k8s/components")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub fn helm() -> Command {
    // Helm searches its home directory for plugins and caches; there are none.
    let mut command = Command::new(&tool("helm-and-kubectl", "helm")[0]);
    command.current_dir(repository()).env("HELM_CONFIG_HOME", "/nonexistent").env("HELM_DATA_HOME", "/nonexistent");
    command
}

/// The chart as `helm install udp-fanout --namespace udp-fanout` renders it for this version of Kubernetes.
pub fn chart(values: Option<&str>, kubernetes: &str) -> String {
    let mut command = helm();
    command.args(["template", "udp-fanout", CHART, "--namespace", "udp-fanout", "--kube-version", kubernetes]);
    if let Some(values) = values {
        command.args(["--values", &format!("{CHART}/ci/{values}")]);
    }
    run(&mut command)
}

/// What `udp-fanout rbac` prints for the configuration of a ConfigMap, for this service account.
pub fn rbac(objects: &[Value], account: &str) -> String {
    let map = objects.iter().find(|object| object["kind"] == "ConfigMap" && object["metadata"]["name"] == "udp-fanout");
    let (name, text) = map.unwrap()["data"].as_object().unwrap().iter().next().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join(name);
    fs::write(&file, text.as_str().unwrap()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_udp-fanout"));
    // The manifests and the chart name their Roles so, whatever the account.
    run(command.args(["rbac", "--name", "udp-fanout", "--service-account", account, "--config"]).arg(file))
}

/// The files of values for which the chart is tested, besides its defaults.
pub fn values() -> Vec<String> {
    let entries = fs::read_dir(repository().join(CHART).join("ci")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All sets of objects, by their names in messages.
pub fn everything(kubernetes: &str) -> Vec<(String, String)> {
    let mut all = plain();
    all.push(("kubectl kustomize k8s".into(), kustomize(&repository().join("k8s"))));
    let components = components();
    for name in &components {
        all.push((format!("the component {name}"), overlay(&[name])));
    }
    let names: Vec<&str> = components.iter().map(String::as_str).collect();
    all.push(("all components".into(), overlay(&names)));
    all.push(("the chart".into(), chart(None, kubernetes)));
    for values in values() {
        let text = chart(Some(&values), kubernetes);
        let objects = objects(&text);
        let followed = objects.iter().any(|object| object["kind"] == "Role");
        all.push((format!("the chart with {values}"), text));
        if followed {
            all.push((format!("udp-fanout rbac, for {values}"), rbac(&objects, "fanout")));
        }
    }
    all
}

/// The only object of this kind.
pub fn only<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    let first = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "more than one {kind}");
    first
}
