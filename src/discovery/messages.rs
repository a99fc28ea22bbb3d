//! Log lines for the operator: the likely cause and the command that removes it. Pure text; [`aggregator`](super::aggregator)
//! and `watch` decide when a line is logged.

use std::collections::BTreeSet;
use std::path::Path;

use super::rbac::DEFAULT_ACCOUNT;
use super::service_key::ServiceKey;
use super::slices::{EndpointRules, SelectionStats};
use super::wire::SERVICE_NAME_LABEL;
use super::{Family, Locality, Terminating};

/// The name of the Role and RoleBinding that a suggested `kubectl create` makes. It differs from the name in the manifests, so
/// that the command never fails because an object with other rules exists.
const ROLE: &str = "udp-fanout-endpointslices";
const NODE_ROLE: &str = "udp-fanout-node-zone";

/// Whether an object exists, as far as a GET tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It exists.
    Exists,
    /// It does not.
    Missing,
    /// RBAC denies the GET.
    Hidden,
    /// The API server did not answer.
    Unknown,
}

/// The API server denied access to the EndpointSlices. `message` is its reply, which names the user; `config` is the path of the
/// configuration file.
#[must_use]
pub fn slices_forbidden(key: &ServiceKey, message: &str, namespace: Presence, config: Option<&Path>) -> String {
    let ns = &key.namespace;
    let location = match namespace {
        Presence::Missing => return format!("EndpointSlice not found: {}", missing_namespace(key)),
        Presence::Exists => format!("in namespace {ns:?}"),
        Presence::Hidden | Presence::Unknown => format!("in namespace {ns:?} (if that namespace exists)"),
    };
    let user = user(message);
    let who = user.unwrap_or("the daemon's account");
    let fix = print_and_apply(user, config).unwrap_or_else(|| {
        format!(
            "kubectl create role {ROLE} --verb=list,watch --resource=endpointslices.discovery.k8s.io -n {ns} && kubectl \
             create rolebinding {ROLE} --role={ROLE} {} -n {ns}",
            subject(user)
        )
    });
    format!(
        "EndpointSlice not found: {who} may not list and watch endpointslices {location}; missing rule: apiGroups \
         [\"discovery.k8s.io\"], resources [\"endpointslices\"], verbs [\"list\", \"watch\"]; fix: {fix}"
    )
}

/// RBAC denies reading the Node object, so the zone is unknown.
#[must_use]
pub fn zone_forbidden(node: &str, message: &str, config: Option<&Path>) -> String {
    let user = user(message);
    let who = user.unwrap_or("the daemon's account");
    let fix = print_and_apply(user, config).unwrap_or_else(|| {
        format!(
            "kubectl create clusterrole {NODE_ROLE} --verb=get --resource=nodes && kubectl create clusterrolebinding \
             {NODE_ROLE} --clusterrole={NODE_ROLE} {}",
            subject(user)
        )
    });
    zone_unknown(&format!(
        "{who} may not get node {node:?}; missing rule: apiGroups [\"\"], resources [\"nodes\"], verbs [\"get\"]; fix: {fix}"
    ))
}

/// The zone is unknown because of `why`.
#[must_use]
pub fn zone_unknown(why: &str) -> String {
    format!(
        "locality = \"prefer_zone\" treats all endpoints alike until an endpoint on this node shows the zone: {why}"
    )
}

/// The command that grants a service account everything the configuration needs. None for other kinds of users.
fn print_and_apply(user: Option<&str>, config: Option<&Path>) -> Option<String> {
    let (namespace, name) = user?.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    let config = shell_word(&config?.to_string_lossy());
    let mut command = format!("udp-fanout rbac --config {config}");
    if name != DEFAULT_ACCOUNT {
        command += &format!(" --service-account {name}");
    }
    if namespace != DEFAULT_ACCOUNT {
        command += &format!(" --service-account-namespace {namespace}");
    }
    Some(command + " | kubectl apply -f -")
}

/// Quotes `text` for a POSIX shell where necessary.
fn shell_word(text: &str) -> String {
    if !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c)) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// The user named in a message like `endpointslices… is forbidden: User "x" cannot list resource …`.
fn user(message: &str) -> Option<&str> {
    message.split_once("User \"")?.1.split_once('"').map(|(user, _)| user).filter(|user| !user.is_empty())
}

/// The option of `kubectl create rolebinding` that names the user.
fn subject(user: Option<&str>) -> String {
    let account = user.and_then(|user| user.strip_prefix("system:serviceaccount:"));
    match (account, user) {
        (Some(account), _) => format!("--serviceaccount={account}"),
        (None, Some(user)) => format!("--user={user}"),
        (None, None) => "--serviceaccount=NAMESPACE:NAME".to_owned(),
    }
}

fn missing_namespace(key: &ServiceKey) -> String {
    format!("namespace {:?} does not exist; check `namespace` in the configuration", key.namespace)
}

/// The Service has no EndpointSlices: its list is empty.
#[must_use]
pub fn no_slices(key: &ServiceKey, namespace: Presence, service: Presence) -> String {
    let ServiceKey { namespace: ns, service: name } = key;
    let cause = match (namespace, service) {
        (Presence::Missing, _) => missing_namespace(key),
        (_, Presence::Missing) => format!(
            "service {name:?} does not exist in namespace {ns:?}; check `service` in the configuration, or create a \
             headless Service for the receivers"
        ),
        (_, Presence::Exists) => format!(
            "service {ns}/{name} exists but has no EndpointSlices; check that it has a selector, or label its own \
             slices {SERVICE_NAME_LABEL}={name}"
        ),
        (_, hidden) => {
            let why =
                if hidden == Presence::Hidden { "RBAC denies reading them" } else { "the API server did not answer" };
            format!(
                "no slice in namespace {ns:?} has the label {SERVICE_NAME_LABEL}={name}; the daemon cannot check whether \
                 namespace and service exist, because {why}; check: kubectl get service {name} -n {ns}"
            )
        }
    };
    format!("EndpointSlice not found: {cause}; waiting for it to appear")
}

/// Why a listener has no downstreams; the most likely cause comes first.
#[must_use]
pub fn no_endpoints(rules: &EndpointRules, stats: &SelectionStats, node: Option<&str>) -> String {
    if stats.slices == 0 {
        return "EndpointSlice not found: no slices for its services".to_owned();
    }
    let mut causes = Vec::new();
    if stats.other_nodes_only {
        let node = node.unwrap_or("(unknown)");
        causes.push(format!("locality = {:?} and no usable endpoint is on node {node:?}", rules.locality.name()));
    } else if stats.endpoints > 0 {
        causes.push(none_ready(rules, stats));
    }
    if stats.without_port > 0 {
        causes.push(missing_port(stats));
    }
    if stats.other_family > 0 {
        let other = if rules.family == Family::V4 { Family::V6 } else { Family::V4 };
        causes.push(format!(
            "{} endpoints have only {other} addresses and the listener is {}",
            stats.other_family, rules.family
        ));
    }
    if stats.invalid_addresses > 0 {
        causes.push(format!("{} endpoints have no usable unicast address", stats.invalid_addresses));
    }
    causes.extend(stats.unsupported_types.iter().map(|name| unsupported_type(name)));
    if causes.is_empty() {
        causes.push("the services have no pods: check their selectors and the number of replicas".to_owned());
    }
    causes.join("; ")
}

fn none_ready(rules: &EndpointRules, stats: &SelectionStats) -> String {
    let SelectionStats { endpoints, terminating, .. } = stats;
    if *terminating > 0 && rules.terminating == Terminating::Never {
        format!("none of {endpoints} endpoints is ready, {terminating} are terminating and terminating = \"never\"")
    } else {
        format!("none of {endpoints} endpoints is ready: check the pods' readiness probes")
    }
}

fn missing_port(stats: &SelectionStats) -> String {
    let quoted = |names: &BTreeSet<String>| names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>();
    let known = quoted(&stats.available_ports);
    let known = if known.is_empty() { "unnamed or no ports".to_owned() } else { known.join(", ") };
    format!("the slices have no port {}, only {known}: check `port`", quoted(&stats.missing_ports).join(" or "))
}

/// The slices' addresses are no IP addresses.
#[must_use]
pub fn unsupported_type(name: &str) -> String {
    format!("slices with addressType {name} are ignored: datagrams need IP addresses")
}

/// The named Service port has a protocol other than UDP.
#[must_use]
pub fn port_not_udp(port: &str) -> String {
    format!("the Service port {port} is not UDP; the listener sends datagrams to it anyway: check `port`")
}

/// The configured port number is none of the UDP ports of the Service's endpoints, which are `listed` by number and name.
#[must_use]
pub fn port_mismatch(key: &ServiceKey, configured: u16, listed: &BTreeSet<(u16, String)>) -> String {
    let all = listed
        .iter()
        .map(|(number, name)| if name.is_empty() { number.to_string() } else { format!("{number} (named {name:?})") });
    let fix = match listed.first() {
        Some((_, name)) if !name.is_empty() => format!("set `port = {name:?}`"),
        Some((number, _)) => {
            format!("name the Service's port and set `port = \"name\"`, or set `port = {number}`")
        }
        None => "check `port`".to_owned(),
    };
    format!(
        "the endpoints of {key} have no UDP port {configured}, only {}, so datagrams sent to port {configured} are probably \
         lost; `port` is the container's port, not the Service's: {fix}",
        all.collect::<Vec<_>>().join(", ")
    )
}

/// `locality` needs the node's name, which is unknown.
#[must_use]
pub fn node_name_unknown(locality: Locality) -> String {
    format!(
        "locality = {:?} treats all endpoints alike because the node's name is unknown; set the environment variable \
         NODE_NAME, in a DaemonSet by the downward API (fieldPath: spec.nodeName)",
        locality.name()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(user: &str) -> String {
        format!(
            "endpointslices.discovery.k8s.io is forbidden: User \"{user}\" cannot list resource \"endpointslices\" in API \
             group \"discovery.k8s.io\" in the namespace \"logging\""
        )
    }

    #[test]
    fn the_command_names_what_differs_from_the_manifests() {
        let key = ServiceKey::new("logging", "vector");
        let fix = |user: &str, config: &str| {
            let text = slices_forbidden(&key, &refusal(user), Presence::Exists, Some(Path::new(config)));
            let fix = text.split_once("; fix: ").unwrap().1;
            fix.to_owned()
        };
        let account = "system:serviceaccount:udp-fanout:udp-fanout";
        assert_eq!(fix(account, "/etc/u.toml"), "udp-fanout rbac --config /etc/u.toml | kubectl apply -f -");
        assert_eq!(
            fix("system:serviceaccount:edge:fan", "/a b's"),
            "udp-fanout rbac --config '/a b'\\''s' --service-account fan --service-account-namespace edge | kubectl \
             apply -f -"
        );
        let by_hand = fix("admin", "/etc/u.toml");
        assert!(
            by_hand.contains("--verb=list,watch --resource=endpointslices.discovery.k8s.io -n logging"),
            "{by_hand}"
        );
        assert!(by_hand.ends_with("--role=udp-fanout-endpointslices --user=admin -n logging"), "{by_hand}");
        let zone = zone_forbidden("n1", &refusal(account), Some(Path::new("c.toml")));
        assert!(zone.ends_with("fix: udp-fanout rbac --config c.toml | kubectl apply -f -"), "{zone}");
        let zone = zone_forbidden("n1", &refusal("admin"), Some(Path::new("c.toml")));
        assert!(zone.ends_with("--clusterrole=udp-fanout-node-zone --user=admin"), "{zone}");
    }
}
