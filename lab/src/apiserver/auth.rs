//! Authentication and authorisation.

use serde_json::{Value, json};

use super::State;
use super::USER;
use super::store::Kind;

/// An RBAC rule.
#[derive(Debug, Clone)]
pub struct Rule {
    verbs: Vec<String>,
    resource: String,
    /// None: every namespace.
    namespace: Option<String>,
    /// None: objects of any name.
    names: Option<Vec<String>>,
}

impl Rule {
    /// Allows these verbs on a resource, in every namespace and for every name.
    pub fn new(verbs: &[&str], resource: &str) -> Rule {
        Rule {
            verbs: verbs.iter().map(|&verb| verb.to_owned()).collect(),
            resource: resource.to_owned(),
            namespace: None,
            names: None,
        }
    }

    /// Restricts it to a namespace.
    pub fn within(self, namespace: &str) -> Rule {
        Rule { namespace: Some(namespace.to_owned()), ..self }
    }

    /// Restricts it to objects of these names.
    pub fn named(self, names: &[String]) -> Rule {
        Rule { names: Some(names.to_vec()), ..self }
    }

    fn allows(&self, verb: &str, resource: &str, namespace: Option<&str>, name: Option<&str>) -> bool {
        self.verbs.iter().any(|v| v == verb)
            && self.resource == resource
            && (self.namespace.is_none() || self.namespace.as_deref() == namespace)
            && self.names.as_ref().is_none_or(|names| names.iter().any(|n| Some(n.as_str()) == name))
    }
}

/// Authenticates a request and checks it against the RBAC rules.
pub fn check(
    state: &State,
    authorization: Option<&str>,
    verb: &str,
    kind: Kind,
    namespace: Option<&str>,
    name: Option<&str>,
) -> Result<(), (u16, Value)> {
    authenticate(state, authorization)?;
    let resource = kind.resource();
    if state.rules.iter().any(|rule| rule.allows(verb, resource, namespace, name)) {
        return Ok(());
    }
    let group = kind.group();
    let qualified = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
    let subject = name.map_or(qualified.clone(), |name| format!("{qualified} {name:?}"));
    let place = namespace.map_or("at the cluster scope".to_owned(), |ns| format!("in the namespace {ns:?}"));
    let message = format!(
        "{subject} is forbidden: User {USER:?} cannot {verb} resource {resource:?} in API group {group:?} {place}"
    );
    let mut details = json!({"group": group, "kind": resource});
    if let Some(name) = name {
        details["name"] = json!(name);
    }
    Err((403, status(403, "Forbidden", &message, details)))
}

pub fn authenticate(state: &State, authorization: Option<&str>) -> Result<(), (u16, Value)> {
    let token = authorization.and_then(|value| value.strip_prefix("Bearer "));
    if token.is_some_and(|token| state.tokens.iter().any(|known| known == token)) {
        return Ok(());
    }
    Err((401, status(401, "Unauthorized", "Unauthorized", Value::Null)))
}

/// The `Status` object of an error response.
pub fn status(code: u16, reason: &str, message: &str, details: Value) -> Value {
    let mut status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    if !details.is_null() {
        status["details"] = details;
    }
    status
}
