//! Parses requests and answers them as kube-apiserver does.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};

use super::auth::{authenticate, check, status};
use super::feed::{Feed, Pen, feed};
use super::store::{Change, Entry, Kind, Signal};
use super::{Seen, Shared, State};

/// Query parameters of the list and watch verbs.
const PARAMETERS: &[&str] = &[
    "labelSelector",
    "fieldSelector",
    "limit",
    "continue",
    "resourceVersion",
    "resourceVersionMatch",
    "watch",
    "timeoutSeconds",
    "allowWatchBookmarks",
    "sendInitialEvents",
    "pretty",
];

/// The object or collection that an API path names.
struct Target {
    kind: Kind,
    /// API version, such as `v1`.
    version: String,
    namespace: Option<String>,
    name: Option<String>,
}

pub async fn answer(shared: &Arc<Shared>, request: &Request<Incoming>) -> Response<Feed> {
    let (pen, body) = feed(shared);
    pen.wait_unfrozen().await;
    let path = request.uri().path().to_owned();
    let query = decode(request.uri().query().unwrap_or_default());
    let token = request.headers().get(AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
    let result = shared.change(|state| {
        let result = if request.method() == Method::GET {
            decide(state, &path, &query, token.as_deref())
        } else {
            Err((405, status(405, "MethodNotAllowed", "this server is read-only", Value::Null)))
        };
        let code = match &result {
            Ok(_) => 200,
            Err((code, _)) => *code,
        };
        state.seen.push(Seen { path: path.clone(), query: query.clone(), code });
        result
    });
    match result {
        Ok(Reply::Object(object)) => reply(200, "application/json", pen, body, object.to_string().into_bytes()),
        Ok(Reply::Watch(watch)) => {
            shared.change(|state| state.watches += 1);
            let shared = shared.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = watch.run(&pen, &shared) => {}
                    () = pen.closed() => {}
                }
                shared.change(|state| state.watches -= 1);
            });
            Response::builder().status(200).header(CONTENT_TYPE, "application/json").body(body).unwrap()
        }
        // kube-apiserver answers unknown paths in plain text.
        Err((404, Value::Null)) => reply(404, "text/plain; charset=utf-8", pen, body, b"404 page not found\n".to_vec()),
        Err((code, object)) => reply(code, "application/json", pen, body, object.to_string().into_bytes()),
    }
}

fn reply(code: u16, content_type: &str, pen: Pen, body: Feed, bytes: Vec<u8>) -> Response<Feed> {
    tokio::spawn(async move { pen.write(bytes).await });
    Response::builder().status(code).header(CONTENT_TYPE, content_type).body(body).unwrap()
}

fn decode(query: &str) -> Vec<(String, String)> {
    let text = |part: &str| {
        let mut bytes = Vec::new();
        let mut rest = part.bytes();
        while let Some(byte) = rest.next() {
            match byte {
                b'%' => {
                    let hex: String = rest.by_ref().take(2).map(char::from).collect();
                    bytes.push(u8::from_str_radix(&hex, 16).unwrap());
                }
                b'+' => bytes.push(b' '),
                other => bytes.push(other),
            }
        }
        String::from_utf8(bytes).unwrap()
    };
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(key, value)| (text(key), text(value))).collect()
}

enum Reply {
    Object(Value),
    Watch(Watch),
}

type Refusal = (u16, Value);

fn decide(state: &mut State, path: &str, query: &[(String, String)], token: Option<&str>) -> Result<Reply, Refusal> {
    if !state.canned.is_empty() {
        return Err(state.canned.remove(0));
    }
    authenticate(state, token)?;
    if let Some(found) = api_discovery(state, path) {
        return found.map(Reply::Object);
    }
    let target = parse(state, path).ok_or((404, Value::Null))?;
    let get = |key: &str| query.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    let watch = get("watch").is_some_and(|value| value == "true" || value == "1");
    let verb = match (&target.name, watch) {
        (Some(_), _) => "get",
        (None, true) => "watch",
        (None, false) => "list",
    };
    // RBAC rules within a namespace apply to the namespace object itself.
    let scope = if target.kind == Kind::Namespace { target.name.as_deref() } else { target.namespace.as_deref() };
    check(state, token, verb, target.kind, scope, target.name.as_deref())?;
    if let Some(name) = &target.name {
        let namespace = target.namespace.as_deref().unwrap_or_default();
        return match state.store.get(target.kind, namespace, name) {
            Some(object) => Ok(Reply::Object(to_version(object, &target, true))),
            None => Err((
                404,
                status(404, "NotFound", &format!("{} {name:?} not found", target.kind.resource()), Value::Null),
            )),
        };
    }
    if let Some((key, _)) = query.iter().find(|(key, _)| !PARAMETERS.contains(&key.as_str())) {
        state.violations.push(format!("{path}: unknown query parameter {key:?}"));
    }
    let selector = get("labelSelector").unwrap_or_default().to_owned();
    if watch { open_watch(state, target, selector, &get) } else { list(state, &target, &selector, &get) }
}

fn bad_request(state: &mut State, message: &str) -> Refusal {
    state.violations.push(message.to_owned());
    (400, status(400, "BadRequest", message, Value::Null))
}

/// API discovery: `/apis/` and `/apis/discovery.k8s.io`. None for any other path.
fn api_discovery(state: &State, path: &str) -> Option<Result<Value, Refusal>> {
    let versions =
        |version: &String| json!({"groupVersion": format!("discovery.k8s.io/{version}"), "version": version});
    let served: Vec<Value> = state.versions.iter().map(versions).collect();
    let group = json!({"name": "discovery.k8s.io", "versions": served, "preferredVersion": served.first()});
    let part = path.strip_prefix("/apis")?;
    match part.split('/').collect::<Vec<_>>().as_slice() {
        [""] => Some(Ok(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}))),
        ["", "discovery.k8s.io"] if served.is_empty() => Some(Err((404, Value::Null))),
        ["", "discovery.k8s.io"] => {
            let mut group = group;
            group["kind"] = json!("APIGroup");
            group["apiVersion"] = json!("v1");
            Some(Ok(group))
        }
        _ => None,
    }
}

fn parse(state: &State, path: &str) -> Option<Target> {
    let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    let (group, version, rest) = match parts.as_slice() {
        ["api", "v1", rest @ ..] => ("", "v1", rest),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return None,
    };
    if !group.is_empty() && !state.versions.iter().any(|served| served == version) {
        return None;
    }
    let (namespace, resource, name) = match rest {
        ["namespaces", name] if group.is_empty() => (None, "namespaces", Some(*name)),
        ["namespaces", namespace, resource] => (Some(*namespace), *resource, None),
        ["namespaces", namespace, resource, name] => (Some(*namespace), *resource, Some(*name)),
        [resource] => (None, *resource, None),
        [resource, name] => (None, *resource, Some(*name)),
        _ => return None,
    };
    let kind = Kind::ALL.into_iter().find(|kind| kind.resource() == resource && kind.group() == group)?;
    Some(Target {
        kind,
        version: version.to_owned(),
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
    })
}

/// Converts an object to the requested version. The items of a list have neither kind nor version.
fn to_version(object: &Value, target: &Target, alone: bool) -> Value {
    let mut object = object.clone();
    if target.kind == Kind::EndpointSlice && target.version == "v1beta1" {
        for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
            to_v1beta1(endpoint);
        }
    }
    if alone {
        let group = target.kind.group();
        let version = if group.is_empty() { target.version.clone() } else { format!("{group}/{}", target.version) };
        object["apiVersion"] = json!(version);
        object["kind"] = json!(target.kind.name());
    }
    object
}

/// Converts an endpoint: v1beta1 has node and zone in topology labels.
fn to_v1beta1(endpoint: &mut Value) {
    let fields = endpoint.as_object_mut().unwrap();
    let mut topology = serde_json::Map::new();
    if let Some(zone) = fields.remove("zone") {
        topology.insert("topology.kubernetes.io/zone".to_owned(), zone);
    }
    if let Some(node) = fields.remove("nodeName") {
        topology.insert("kubernetes.io/hostname".to_owned(), node);
    }
    if !topology.is_empty() {
        fields.insert("topology".to_owned(), topology.into());
    }
}

fn matches(selector: &str, object: &Value) -> bool {
    selector.split(',').filter(|term| !term.is_empty()).all(|term| {
        let (key, value) = term.split_once('=').expect("this server supports only the selector key=value");
        object["metadata"]["labels"][key] == value.trim_start_matches('=')
    })
}

fn within(target: &Target, object: &Value) -> bool {
    target.namespace.as_deref().is_none_or(|namespace| object["metadata"]["namespace"] == namespace)
}

fn list<'q>(
    state: &mut State,
    target: &Target,
    selector: &str,
    get: &impl Fn(&str) -> Option<&'q str>,
) -> Result<Reply, Refusal> {
    let (version, mut items) = if let Some(token) = get("continue") {
        if get("resourceVersion").is_some() {
            return Err(bad_request(state, "resourceVersion is not allowed with continue"));
        }
        let Some(page) = state.store.take_page(token) else {
            let message = "The provided continue parameter is too old to display a consistent list result.";
            return Err((410, status(410, "Expired", message, Value::Null)));
        };
        page
    } else {
        if get("resourceVersionMatch").is_some() && get("resourceVersion").is_none() {
            return Err(bad_request(state, "resourceVersionMatch is forbidden unless resourceVersion is provided"));
        }
        let objects = state.store.list(target.kind, target.namespace.as_deref());
        let chosen = objects.into_iter().filter(|object| matches(selector, object)).cloned().collect();
        (state.store.version(), chosen)
    };
    let limit = get("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
    let mut meta = json!({"resourceVersion": version.to_string()});
    if items.len() > limit {
        let rest = items.split_off(limit);
        meta["remainingItemCount"] = json!(rest.len());
        meta["continue"] = json!(state.store.keep_page(version, rest));
    }
    let items: Vec<Value> = items.iter().map(|item| to_version(item, target, false)).collect();
    let group = target.kind.group();
    let api = if group.is_empty() { target.version.clone() } else { format!("{group}/{}", target.version) };
    Ok(Reply::Object(json!({
        "kind": format!("{}List", target.kind.name()), "apiVersion": api, "metadata": meta, "items": items,
    })))
}

/// An open watch.
struct Watch {
    target: Target,
    selector: String,
    bookmarks: bool,
    timeout: std::time::Duration,
    /// Send only changes newer than this version.
    since: u64,
    /// Index of the next entry in the log.
    position: usize,
    /// Index in the log from which signals apply.
    signals_from: usize,
    /// The version has been compacted: the watch gets 410 immediately.
    too_old: bool,
}

fn open_watch<'q>(
    state: &mut State,
    target: Target,
    selector: String,
    get: &impl Fn(&str) -> Option<&'q str>,
) -> Result<Reply, Refusal> {
    let Some(Ok(since)) = get("resourceVersion").map(str::parse::<u64>) else {
        return Err(bad_request(state, "a watch needs a resourceVersion"));
    };
    let seconds = get("timeoutSeconds").map_or(1800, |seconds| seconds.parse().unwrap());
    let position = state.store.position(since);
    let end = state.store.log().len();
    Ok(Reply::Watch(Watch {
        target,
        selector,
        bookmarks: get("allowWatchBookmarks") == Some("true"),
        timeout: std::time::Duration::from_secs(seconds),
        since,
        position: position.unwrap_or(end),
        signals_from: end,
        too_old: position.is_none(),
    }))
}

impl Watch {
    async fn run(mut self, pen: &Pen, shared: &Shared) {
        if shared.lock().hang_up {
            return;
        }
        if self.too_old {
            let message = format!("too old resource version: {}", self.since);
            let gone = status(410, "Expired", &message, Value::Null);
            pen.write(format!("{{\"type\":\"ERROR\",\"object\":{gone}}}\n").into_bytes()).await;
            return;
        }
        let timeout = self.timeout;
        let _ = tokio::time::timeout(timeout, self.stream(pen, shared)).await;
    }

    async fn stream(&mut self, pen: &Pen, shared: &Shared) {
        let mut changed = shared.version.subscribe();
        loop {
            let entries = {
                let state = shared.lock();
                let log = state.store.log();
                if self.position > log.len() {
                    return;
                }
                log[self.position..].to_vec()
            };
            for entry in entries {
                let line = match entry {
                    Entry::Change(change) => self.event(&change),
                    Entry::Signal(_) if self.position < self.signals_from => None,
                    Entry::Signal(Signal::End) => return,
                    Entry::Signal(Signal::Line(line)) => Some(line),
                    Entry::Signal(Signal::Bookmark(version)) => self.bookmarks.then(|| self.bookmark(version)),
                };
                self.position += 1;
                if let Some(line) = line
                    && !pen.write(format!("{line}\n").into_bytes()).await
                {
                    return;
                }
            }
            let more = shared.lock().store.log().len() > self.position;
            if !more {
                changed.changed().await.unwrap();
            }
        }
    }

    fn event(&self, change: &Change) -> Option<String> {
        if change.kind != self.target.kind || change.version <= self.since {
            return None;
        }
        let seen = |object: &&Value| within(&self.target, object) && matches(&self.selector, object);
        let (kind, object) = match (change.before.as_ref().filter(seen), change.after.as_ref().filter(seen)) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", after.clone()),
            (Some(_), Some(after)) => ("MODIFIED", after.clone()),
            (Some(before), None) => {
                let mut before = before.clone();
                before["metadata"]["resourceVersion"] = json!(change.version.to_string());
                ("DELETED", before)
            }
        };
        // Formatted by hand, because kube-apiserver writes the type first.
        Some(format!(r#"{{"type":"{kind}","object":{}}}"#, to_version(&object, &self.target, true)))
    }

    fn bookmark(&self, version: u64) -> String {
        let empty = json!({"metadata": {"resourceVersion": version.to_string(), "creationTimestamp": null}});
        format!(r#"{{"type":"BOOKMARK","object":{}}}"#, to_version(&empty, &self.target, true))
    }
}
