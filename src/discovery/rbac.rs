//! `udp-fanout rbac`: the Roles and bindings that discovery needs, as YAML. Pure text.
//!
//! Names and labels are those of `k8s/rbac.yaml`, so that applying one after the other changes the same objects. Each
//! installation has names of its own, so that a second one does not take over the bindings of the first.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::{DiscoveryRequest, Locality};

/// The name of the daemon's service account in the shipped manifests, and of its namespace.
pub const DEFAULT_ACCOUNT: &str = "udp-fanout";
const NAME_LABEL: &str = "app.kubernetes.io/name";
/// Tells installations apart. Its value is an installation's name.
const INSTANCE_LABEL: &str = "app.kubernetes.io/instance";
/// Longest name of an installation, in bytes: it is a label's value, which has at most 63 (Kubernetes, labels and selectors).
const MAX_NAME: usize = 63;

/// The service account that gets the rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// The account's name.
    pub name: String,
    /// The account's namespace, and the default namespace of Services.
    pub namespace: String,
}

impl Default for ServiceAccount {
    fn default() -> ServiceAccount {
        ServiceAccount { name: DEFAULT_ACCOUNT.to_owned(), namespace: DEFAULT_ACCOUNT.to_owned() }
    }
}

/// Who gets the rights, and the name that its Roles have in the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    account: ServiceAccount,
    /// The name of each Role and RoleBinding; the ClusterRole's has `-nodes` appended.
    name: String,
}

impl Installation {
    /// Names the Roles `name`, or after the account: `udp-fanout` for the account of the shipped manifests, else
    /// `udp-fanout-NAMESPACE-ACCOUNT`.
    ///
    /// # Errors
    /// If the name is not valid in Kubernetes, or too long.
    pub fn new(account: ServiceAccount, name: Option<&str>) -> Result<Installation> {
        let name = match name {
            Some(name) => name.to_owned(),
            None if account == ServiceAccount::default() => DEFAULT_ACCOUNT.to_owned(),
            None => format!("{DEFAULT_ACCOUNT}-{}-{}", account.namespace, account.name),
        };
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if name.len() > MAX_NAME || !name.chars().all(fits) || !ends(name.chars().next()) || !ends(name.chars().last())
        {
            bail!(
                "--name: {name:?} cannot name a Role; use 1 to {MAX_NAME} of a-z 0-9 - . and a letter or digit at both ends"
            );
        }
        Ok(Installation { account, name })
    }

    fn node_role(&self) -> String {
        format!("{}-nodes", self.name)
    }
}

impl ServiceAccount {
    /// Checks both names.
    ///
    /// # Errors
    /// If a name is not valid in Kubernetes.
    pub fn new(name: &str, namespace: &str) -> Result<ServiceAccount> {
        let label = |text: &str| {
            let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            (1..=63).contains(&text.len()) && text.chars().all(fits) && !text.starts_with('-') && !text.ends_with('-')
        };
        // Names of service accounts may contain dots, those of namespaces may not.
        if name.len() > 253 || !name.split('.').all(label) {
            bail!("--service-account: {name:?} is not a service account's name; use a-z 0-9 - and single dots");
        }
        if !label(namespace) {
            bail!("--service-account-namespace: {namespace:?} is not a namespace's name; use 1 to 63 of a-z 0-9 -");
        }
        Ok(ServiceAccount { name: name.to_owned(), namespace: namespace.to_owned() })
    }
}

/// The Roles and bindings that these requests need, as YAML documents; empty if there are no requests.
///
/// Each namespace gets a Role to list and watch EndpointSlices, and to get the Services by name: that tells a missing Service from
/// one without endpoints. If a listener has `prefer_zone`, a `ClusterRole` allows reading Nodes, where the zone is. It covers all
/// nodes, because each pod of a `DaemonSet` runs on another one. A comment says how to find the Roles of an earlier
/// configuration in other namespaces, which applying these does not remove.
#[must_use]
pub fn manifests(requests: &[DiscoveryRequest], installation: &Installation) -> String {
    let mut services: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for service in requests.iter().flat_map(|request| &request.services) {
        let namespace = service.namespace.as_deref().unwrap_or(&installation.account.namespace);
        services.entry(namespace).or_default().insert(&service.service);
    }
    let mut text = String::new();
    if !services.is_empty() {
        let namespaces: Vec<&str> = services.keys().copied().collect();
        text = leftovers(&namespaces, &installation.name);
    }
    for (namespace, names) in &services {
        role(&mut text, namespace, names, installation);
        binding(&mut text, Some(namespace), installation);
    }
    if requests.iter().any(|request| request.locality == Locality::PreferZone) {
        head(&mut text, "ClusterRole", &installation.node_role(), None, installation);
        text += "rules:\n  - apiGroups: [\"\"]\n    resources: [nodes]\n    verbs: [get]\n";
        binding(&mut text, None, installation);
    }
    text
}

/// A comment on Roles that an earlier configuration of this installation needed.
fn leftovers(namespaces: &[&str], name: &str) -> String {
    format!(
        "# Permissions of the installation {name:?} in {}. Roles that an earlier configuration needed elsewhere stay; to list them \
         all:\n#   kubectl get roles,rolebindings,clusterroles,clusterrolebindings -A -l {NAME_LABEL}=udp-fanout,{INSTANCE_LABEL}={name}\n",
        namespaces.join(", ")
    )
}

fn head(text: &mut String, kind: &str, name: &str, namespace: Option<&str>, installation: &Installation) {
    // Writing to a String cannot fail, here and below.
    let _ = write!(
        text,
        "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}\nmetadata:\n  name: {}\n",
        scalar(name)
    );
    if let Some(namespace) = namespace {
        let _ = writeln!(text, "  namespace: {}", scalar(namespace));
    }
    let _ =
        write!(text, "  labels:\n    {NAME_LABEL}: udp-fanout\n    {INSTANCE_LABEL}: {}\n", scalar(&installation.name));
}

fn role(text: &mut String, namespace: &str, services: &BTreeSet<&str>, installation: &Installation) {
    head(text, "Role", &installation.name, Some(namespace), installation);
    let names: Vec<String> = services.iter().map(|name| scalar(name)).collect();
    let _ = write!(
        text,
        "rules:\n  - apiGroups: [discovery.k8s.io]\n    resources: [endpointslices]\n    verbs: [list, watch]\n  - \
         apiGroups: [\"\"]\n    resources: [services]\n    resourceNames: [{}]\n    verbs: [get]\n",
        names.join(", ")
    );
}

fn binding(text: &mut String, namespace: Option<&str>, installation: &Installation) {
    let (kind, name) = if namespace.is_some() {
        ("Role", installation.name.clone())
    } else {
        ("ClusterRole", installation.node_role())
    };
    head(text, &format!("{kind}Binding"), &name, namespace, installation);
    let _ = write!(
        text,
        "roleRef:\n  apiGroup: rbac.authorization.k8s.io\n  kind: {kind}\n  name: {}\nsubjects:\n  - kind: \
         ServiceAccount\n    name: {}\n    namespace: {}\n",
        scalar(&name),
        scalar(&installation.account.name),
        scalar(&installation.account.namespace)
    );
}

/// A name as a YAML scalar, quoted if YAML would read it as a boolean, null or number.
fn scalar(name: &str) -> String {
    let word = ["true", "false", "yes", "no", "on", "off", "y", "n", "null"].contains(&name);
    if word || name.starts_with(|c: char| c.is_ascii_digit()) { format!("\"{name}\"") } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::{Family, PortRef, ServiceRef, Terminating};
    use super::*;
    use crate::model::ListenerId;

    fn request(locality: Locality, services: &[(Option<&str>, &str)]) -> DiscoveryRequest {
        let service = |(namespace, service): &(Option<&str>, &str)| ServiceRef {
            namespace: namespace.map(str::to_owned),
            service: (*service).to_owned(),
            port: PortRef::Number(1),
        };
        DiscoveryRequest {
            listener: ListenerId(0),
            services: services.iter().map(service).collect(),
            family: Family::V4,
            locality,
            terminating: Terminating::Fallback,
        }
    }

    #[test]
    fn each_namespace_has_one_role_and_its_binding() {
        let requests = [
            request(Locality::PreferNode, &[(Some("logging"), "vector"), (Some("123"), "on")]),
            request(Locality::Cluster, &[(None, "own"), (Some("logging"), "loki"), (Some("logging"), "vector")]),
        ];
        let account = ServiceAccount { name: "fan".to_owned(), namespace: "edge".to_owned() };
        let installation = Installation::new(account, Some("second")).unwrap();
        let expected = |namespace: &str, services: &str| {
            format!(
                "---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: second
  namespace: {namespace}
  labels:
    app.kubernetes.io/name: udp-fanout
    app.kubernetes.io/instance: second
rules:
  - apiGroups: [discovery.k8s.io]
    resources: [endpointslices]
    verbs: [list, watch]
  - apiGroups: [\"\"]
    resources: [services]
    resourceNames: [{services}]
    verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: second
  namespace: {namespace}
  labels:
    app.kubernetes.io/name: udp-fanout
    app.kubernetes.io/instance: second
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: second
subjects:
  - kind: ServiceAccount
    name: fan
    namespace: edge
"
            )
        };
        let comment = "# Permissions of the installation \"second\" in 123, edge, logging. Roles that an earlier configuration \
                       needed elsewhere stay; to list them all:\n#   kubectl get \
                       roles,rolebindings,clusterroles,clusterrolebindings -A -l \
                       app.kubernetes.io/name=udp-fanout,app.kubernetes.io/instance=second\n";
        let all = comment.to_owned()
            + &expected("\"123\"", "\"on\"")
            + &expected("edge", "own")
            + &expected("logging", "loki, vector");
        assert_eq!(manifests(&requests, &installation), all);
        assert_eq!(manifests(&[], &installation), "");
    }

    /// The installation of the shipped manifests.
    fn shipped() -> Installation {
        Installation::new(ServiceAccount::default(), None).unwrap()
    }

    #[test]
    fn each_installation_has_names_of_its_own() {
        assert_eq!(shipped().name, "udp-fanout");
        let second = ServiceAccount::new("fan", "edge").unwrap();
        assert_eq!(Installation::new(second.clone(), None).unwrap().name, "udp-fanout-edge-fan");
        let long = "a".repeat(64);
        for name in ["", "A", "-a", "a.", "a b", &long] {
            assert!(Installation::new(second.clone(), Some(name)).is_err(), "{name:?}");
        }
        let long = ServiceAccount::new(&"a".repeat(60), "edge").unwrap();
        assert!(Installation::new(long, None).unwrap_err().to_string().starts_with("--name: "));
    }

    #[test]
    fn the_zone_takes_a_right_to_read_nodes() {
        let text = manifests(&[request(Locality::PreferZone, &[(Some("a"), "b")])], &shipped());
        assert_eq!(text.matches("kind: ClusterRole\n").count(), 2, "{text}");
        assert!(text.contains("kind: ClusterRoleBinding\nmetadata:\n  name: udp-fanout-nodes\n  labels:"), "{text}");
        assert!(text.contains("    resources: [nodes]\n    verbs: [get]\n"), "{text}");
        for locality in [Locality::Cluster, Locality::PreferNode, Locality::Node] {
            assert!(!manifests(&[request(locality, &[(Some("a"), "b")])], &shipped()).contains("Cluster"));
        }
    }

    #[test]
    fn what_cannot_be_a_name_is_refused() {
        assert_eq!(ServiceAccount::new("udp-fanout", "udp-fanout").unwrap(), ServiceAccount::default());
        assert!(ServiceAccount::new("a.b-c", "a").is_ok());
        for (name, namespace) in
            [("", "a"), ("a..b", "a"), ("A", "a"), ("a", ""), ("a", "a.b"), ("a: b", "a"), ("a", "-a")]
        {
            assert!(ServiceAccount::new(name, namespace).is_err(), "{name:?} {namespace:?}");
        }
    }
}
