//! Kubernetes objects as the control plane writes them, for tests.

use serde_json::{Value, json};

/// The label by which slices belong to a Service.
pub const LABEL: &str = "kubernetes.io/service-name";

/// A slice of IPv4 endpoints with one unnamed UDP port, 5514.
pub fn slice(namespace: &str, service: &str, name: &str, endpoints: impl IntoIterator<Item = Value>) -> Value {
    json!({
        "metadata": {
            "namespace": namespace,
            "name": name,
            "generateName": format!("{service}-"),
            "labels": {LABEL: service, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
            "creationTimestamp": "2024-05-01T12:00:00Z",
        },
        "addressType": "IPv4",
        "endpoints": endpoints.into_iter().collect::<Vec<_>>(),
        "ports": [{"name": "", "protocol": "UDP", "port": 5514}],
    })
}

/// The slice that the controller writes for a Service without pods.
pub fn placeholder(namespace: &str, service: &str, name: &str) -> Value {
    let mut slice = slice(namespace, service, name, []);
    slice["endpoints"] = Value::Null;
    slice["ports"] = Value::Null;
    slice
}

/// A ready endpoint.
pub fn ready(address: &str) -> Value {
    endpoint(address, true, true, false)
}

/// An endpoint that is not ready.
pub fn unready(address: &str) -> Value {
    endpoint(address, false, false, false)
}

/// A terminating endpoint that is still serving.
pub fn leaving(address: &str) -> Value {
    endpoint(address, false, true, true)
}

fn endpoint(address: &str, ready: bool, serving: bool, terminating: bool) -> Value {
    json!({
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "targetRef": {"kind": "Pod", "name": format!("pod-{}", address.replace(['.', ':'], "-"))},
    })
}

/// Sets the node and zone of an endpoint.
pub fn at(mut endpoint: Value, node: &str, zone: &str) -> Value {
    endpoint["nodeName"] = json!(node);
    endpoint["zone"] = json!(zone);
    endpoint
}

/// A headless Service.
pub fn service(namespace: &str, name: &str) -> Value {
    json!({"metadata": {"namespace": namespace, "name": name}, "spec": {"clusterIP": "None"}})
}

/// A namespace.
pub fn namespace(name: &str) -> Value {
    json!({"metadata": {"name": name}})
}

/// A node in a zone.
pub fn node(name: &str, zone: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}})
}

/// Address of endpoint number n: 10.x.y.z.
pub fn nth(n: usize) -> String {
    format!("10.{}.{}.{}", 1 + n / 62_500, n / 250 % 250, 1 + n % 250)
}

/// Slices of 100 endpoints, as the controller makes them, for pods numbered `from` up to `to`.
pub fn slices_of(namespace: &str, service: &str, from: usize, to: usize) -> Vec<Value> {
    let numbers: Vec<usize> = (from..to).collect();
    let chunks = numbers.chunks(100).enumerate();
    chunks
        .map(|(i, chunk)| {
            slice(namespace, service, &format!("{service}-{i:04}"), chunk.iter().map(|&n| ready(&nth(n))))
        })
        .collect()
}
