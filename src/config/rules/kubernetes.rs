//! The rules about `listeners[].kubernetes`.

use super::super::KubernetesSource;
use super::super::document::KeyPath;
use super::super::file::{FileKubernetes, FileService};
use super::super::problem::quoted;
use super::{RuleChecker, values};
use crate::discovery::{PortRef, ServiceRef};

impl RuleChecker<'_> {
    /// The Services of a listener, each with its namespace and port. Every mistake is reported, not only the first.
    pub(super) fn kubernetes(&mut self, at: &KeyPath, source: &FileKubernetes) -> Option<KubernetesSource> {
        let namespace = self.namespace(&at.then("namespace"), source.namespace.as_deref());
        let port = self.port(&at.then("port"), source.port.as_ref());
        let services = match (&source.service, &source.services) {
            (Some(_), Some(_)) => {
                self.fault(&at.then("services"), "`service` is set too; move its name into `services`, and remove it");
                None
            }
            (None, None) => {
                let example = self.document.notation.assignment("service", "\"vector-aggregators\"");
                self.fault(&at.then("service"), format!("missing; add it, for example {example}"));
                if source.port.is_none() {
                    self.missing_port(at);
                }
                None
            }
            (Some(name), None) => {
                let at_name = at.then("service");
                let name = self.check(&at_name, values::kubernetes_name(name, "a Service").map(str::to_owned));
                self.complete(at, vec![name.map(|name| (name, None, None))], namespace?, port?)
            }
            (None, Some(list)) => {
                let named = self.services(&at.then("services"), list)?;
                self.complete(at, named, namespace?, port?)
            }
        };
        let services = services?;
        self.distinct_services(&at.then("services"), &services)?;
        Some(KubernetesSource { services, locality: source.locality, terminating: source.terminating })
    }

    /// The list's Services, each with its own settings; none for one with a mistake.
    fn services(&mut self, at: &KeyPath, list: &[FileService]) -> Option<Vec<Option<Named>>> {
        if list.is_empty() {
            self.fault(at, "an empty list; name a Service, for example [\"vector-aggregators\"]");
            return None;
        }
        let one = |(index, service): (usize, &FileService)| {
            let at = at.then(index);
            let at_name = if matches!(service, FileService::Name(_)) { at.clone() } else { at.then("service") };
            let table = service.table();
            let name = self.check(&at_name, values::kubernetes_name(&table.service, "a Service").map(str::to_owned));
            let namespace = self.namespace(&at.then("namespace"), table.namespace.as_deref());
            let port = self.port(&at.then("port"), table.port.as_ref());
            Some((name?, namespace?, port?))
        };
        Some(list.iter().enumerate().map(one).collect())
    }

    /// Adds the common namespace and port to Services without their own.
    fn complete(
        &mut self,
        at: &KeyPath,
        named: Vec<Option<Named>>,
        common_namespace: Option<String>,
        common_port: Option<PortRef>,
    ) -> Option<Vec<ServiceRef>> {
        if common_port.is_none() && named.iter().flatten().any(|(_, _, port)| port.is_none()) {
            self.missing_port(at);
        }
        let complete = |(service, namespace, port): Named| {
            let namespace = namespace.or_else(|| common_namespace.clone());
            Some(ServiceRef { namespace, service, port: port.or_else(|| common_port.clone())? })
        };
        named.into_iter().map(|named| named.and_then(complete)).collect()
    }

    fn missing_port(&mut self, at: &KeyPath) {
        let example = self.document.notation.assignment("port", "5514");
        self.fault(&at.then("port"), format!("missing; add it, for example {example}"));
    }

    fn namespace(&mut self, at: &KeyPath, name: Option<&str>) -> Option<Option<String>> {
        let Some(name) = name else { return Some(None) };
        self.check(at, values::kubernetes_name(name, "a namespace")).map(|name| Some(name.to_owned()))
    }

    fn port(&mut self, at: &KeyPath, port: Option<&PortRef>) -> Option<Option<PortRef>> {
        if let Some(PortRef::Name(name)) = port {
            self.check(at, values::port_name(name))?;
        }
        Some(port.cloned())
    }

    /// Refuses the same Service and port twice.
    fn distinct_services(&mut self, at: &KeyPath, services: &[ServiceRef]) -> Option<()> {
        for (index, service) in services.iter().enumerate() {
            if let Some(first) = services[..index].iter().position(|other| other == service) {
                let name = quoted(&service.service);
                self.fault(&at.then(index), format!("{name} with this port is already services[{first}]; remove one"));
                return None;
            }
        }
        Some(())
    }
}

/// A Service's name, and its own namespace and port, if given.
type Named = (String, Option<String>, Option<PortRef>);
