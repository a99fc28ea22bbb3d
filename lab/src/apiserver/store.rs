//! The objects, their versions and their history.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// The kinds of objects that are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `discovery.k8s.io/v1` or `v1beta1`.
    EndpointSlice,
    /// `v1`.
    Service,
    /// `v1`; belongs to no namespace.
    Namespace,
    /// `v1`; belongs to no namespace.
    Node,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 4] = [Kind::EndpointSlice, Kind::Service, Kind::Namespace, Kind::Node];

    /// The plural used in paths and rules.
    pub fn resource(self) -> &'static str {
        match self {
            Kind::EndpointSlice => "endpointslices",
            Kind::Service => "services",
            Kind::Namespace => "namespaces",
            Kind::Node => "nodes",
        }
    }

    /// The API group; empty for the core group.
    pub fn group(self) -> &'static str {
        if self == Kind::EndpointSlice { "discovery.k8s.io" } else { "" }
    }

    /// The `kind` of objects.
    pub fn name(self) -> &'static str {
        match self {
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Service => "Service",
            Kind::Namespace => "Namespace",
            Kind::Node => "Node",
        }
    }

    /// Whether objects belong to a namespace.
    pub fn namespaced(self) -> bool {
        matches!(self, Kind::EndpointSlice | Kind::Service)
    }
}

/// A change of one object.
#[derive(Debug, Clone)]
pub struct Change {
    pub version: u64,
    pub kind: Kind,
    pub before: Option<Value>,
    /// None for a deletion; `before` then has the version of the deletion.
    pub after: Option<Value>,
}

/// Sent on all watches at the test's request.
#[derive(Debug, Clone)]
pub enum Signal {
    /// All changes up to this version have been sent.
    Bookmark(u64),
    End,
    Line(String),
}

/// An entry of the log that watches read.
#[derive(Debug, Clone)]
pub enum Entry {
    Change(Change),
    Signal(Signal),
}

#[derive(Default)]
pub struct Store {
    version: u64,
    objects: BTreeMap<(Kind, String, String), Value>,
    log: Vec<Entry>,
    /// Changes up to this version have been compacted.
    compacted: u64,
    /// The remaining items of paginated lists, by token.
    pages: BTreeMap<u64, (u64, Vec<Value>)>,
    page_tokens: u64,
}

impl Store {
    pub fn version(&self) -> u64 {
        self.version
    }

    fn next(&mut self) -> u64 {
        // Versions are opaque and have gaps: other objects of a cluster change as well.
        self.version += 3;
        self.version
    }

    pub fn apply(&mut self, kind: Kind, mut object: Value) {
        let version = self.next();
        let meta = &mut object["metadata"];
        meta["resourceVersion"] = json!(version.to_string());
        let name = meta["name"].as_str().expect("a name").to_owned();
        let namespace =
            if kind.namespaced() { meta["namespace"].as_str().expect("a namespace") } else { "" }.to_owned();
        meta["uid"] = json!(format!("uid-{namespace}-{name}"));
        let before = self.objects.insert((kind, namespace, name), object.clone());
        self.log.push(Entry::Change(Change { version, kind, before, after: Some(object) }));
    }

    pub fn delete(&mut self, kind: Kind, namespace: &str, name: &str) {
        let mut before = self.objects.remove(&(kind, namespace.to_owned(), name.to_owned())).expect("it exists");
        let version = self.next();
        before["metadata"]["resourceVersion"] = json!(version.to_string());
        self.log.push(Entry::Change(Change { version, kind, before: Some(before), after: None }));
    }

    pub fn signal(&mut self, signal: Signal) {
        self.log.push(Entry::Signal(signal));
    }

    pub fn compact(&mut self) {
        self.compacted = self.version;
        self.pages.clear();
    }

    pub fn rewind(&mut self) {
        self.version = 1;
        self.compacted = 0;
        self.pages.clear();
        self.log.clear();
        for object in self.objects.values_mut() {
            object["metadata"]["resourceVersion"] = json!("1");
        }
    }

    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(kind, namespace.to_owned(), name.to_owned()))
    }

    pub fn list(&self, kind: Kind, namespace: Option<&str>) -> Vec<&Value> {
        let within = |ns: &str| namespace.is_none_or(|wanted| wanted == ns);
        self.objects.iter().filter(|((k, ns, _), _)| *k == kind && within(ns)).map(|(_, object)| object).collect()
    }

    /// Stores the remaining items of a list and returns their token.
    pub fn keep_page(&mut self, version: u64, rest: Vec<Value>) -> String {
        self.page_tokens += 1;
        self.pages.insert(self.page_tokens, (version, rest));
        format!("page-{}", self.page_tokens)
    }

    /// Takes the remaining items of a list; none if they have been compacted.
    pub fn take_page(&mut self, token: &str) -> Option<(u64, Vec<Value>)> {
        self.pages.remove(&token.strip_prefix("page-")?.parse().ok()?)
    }

    /// Index in the log at which a watch from this version starts; none if the version is too old.
    pub fn position(&self, version: u64) -> Option<usize> {
        if version < self.compacted {
            return None;
        }
        let newer = |entry: &Entry| matches!(entry, Entry::Change(change) if change.version > version);
        // Signals apply only to watches that are open when they are sent.
        Some(self.log.iter().position(newer).unwrap_or(self.log.len()))
    }

    pub fn log(&self) -> &[Entry] {
        &self.log
    }
}
