//! `udp-fanout rbac`: the Roles and bindings that discovery needs, as YAML. Pure text.
//!
//! Names and labels are those of `k8s/rbac.yaml`, so that applying one after the other changes the same objects.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::{DiscoveryRequest, Locality};

/// The name of the daemon's service account in the shipped manifests, and of its namespace.
pub const DEFAULT_ACCOUNT: &str = "udp-fanout";
/// The name of each Role and RoleBinding.
const NAME: &str = "udp-fanout";
/// The name of the ClusterRole and its binding.
const NODE_ROLE: &str = "udp-fanout-nodes";

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
/// nodes, because each pod of a `DaemonSet` runs on another one.
#[must_use]
pub fn manifests(requests: &[DiscoveryRequest], account: &ServiceAccount) -> String {
    let mut services: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for service in requests.iter().flat_map(|request| &request.services) {
        let namespace = service.namespace.as_deref().unwrap_or(&account.namespace);
        services.entry(namespace).or_default().insert(&service.service);
    }
    let mut text = String::new();
    for (namespace, names) in &services {
        role(&mut text, namespace, names);
        binding(&mut text, Some(namespace), account);
    }
    if requests.iter().any(|request| request.locality == Locality::PreferZone) {
        head(&mut text, "ClusterRole", NODE_ROLE, None);
        text += "rules:\n  - apiGroups: [\"\"]\n    resources: [nodes]\n    verbs: [get]\n";
        binding(&mut text, None, account);
    }
    text
}

fn head(text: &mut String, kind: &str, name: &str, namespace: Option<&str>) {
    // Writing to a String cannot fail, here and below.
    let _ = write!(text, "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: {kind}\nmetadata:\n  name: {name}\n");
    if let Some(namespace) = namespace {
        let _ = writeln!(text, "  namespace: {}", scalar(namespace));
    }
    text.push_str("  labels:\n    app.kubernetes.io/name: udp-fanout\n");
}

fn role(text: &mut String, namespace: &str, services: &BTreeSet<&str>) {
    head(text, "Role", NAME, Some(namespace));
    let names: Vec<String> = services.iter().map(|name| scalar(name)).collect();
    let _ = write!(
        text,
        "rules:\n  - apiGroups: [discovery.k8s.io]\n    resources: [endpointslices]\n    verbs: [list, watch]\n  - \
         apiGroups: [\"\"]\n    resources: [services]\n    resourceNames: [{}]\n    verbs: [get]\n",
        names.join(", ")
    );
}

fn binding(text: &mut String, namespace: Option<&str>, account: &ServiceAccount) {
    let (kind, name) = if namespace.is_some() { ("Role", NAME) } else { ("ClusterRole", NODE_ROLE) };
    head(text, &format!("{kind}Binding"), name, namespace);
    let _ = write!(
        text,
        "roleRef:\n  apiGroup: rbac.authorization.k8s.io\n  kind: {kind}\n  name: {name}\nsubjects:\n  - kind: \
         ServiceAccount\n    name: {}\n    namespace: {}\n",
        scalar(&account.name),
        scalar(&account.namespace)
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
        let expected = |namespace: &str, services: &str| {
            format!(
                "---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: udp-fanout
  namespace: {namespace}
  labels:
    app.kubernetes.io/name: udp-fanout
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
  name: udp-fanout
  namespace: {namespace}
  labels:
    app.kubernetes.io/name: udp-fanout
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: udp-fanout
subjects:
  - kind: ServiceAccount
    name: fan
    namespace: edge
"
            )
        };
        let all = expected("\"123\"", "\"on\"") + &expected("edge", "own") + &expected("logging", "loki, vector");
        assert_eq!(manifests(&requests, &account), all);
        assert_eq!(manifests(&[], &account), "");
    }

    #[test]
    fn the_zone_takes_a_right_to_read_nodes() {
        let text = manifests(&[request(Locality::PreferZone, &[(Some("a"), "b")])], &ServiceAccount::default());
        assert_eq!(text.matches("kind: ClusterRole\n").count(), 2, "{text}");
        assert!(text.contains("kind: ClusterRoleBinding\nmetadata:\n  name: udp-fanout-nodes\n  labels:"), "{text}");
        assert!(text.contains("    resources: [nodes]\n    verbs: [get]\n"), "{text}");
        for locality in [Locality::Cluster, Locality::PreferNode, Locality::Node] {
            assert!(
                !manifests(&[request(locality, &[(Some("a"), "b")])], &ServiceAccount::default()).contains("Cluster")
            );
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
