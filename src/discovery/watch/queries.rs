//! Single requests to the API server: the served version of EndpointSlices, why a Service has none, the zone of this node.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::Request;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIGroup;
use kube::Client;
use serde::Deserialize;
use tokio::sync::mpsc::UnboundedSender;

use super::super::DiscoverySettings;
use super::super::aggregator::WatchEvent;
use super::super::messages::{self, Presence};
use super::super::service_key::ServiceKey;
use super::super::status::WatchCounters;
use super::super::wire::{GROUP, ZONE_LABEL};
use super::backoff::{Backoff, FORBIDDEN_ATTEMPTS};
use super::client;
use super::connection_state::ConnectionState;
use super::credentials::Credentials;
use super::failure::{WatchFailure, text_of};

/// The name of [`ZONE_LABEL`] before Kubernetes 1.17. Nodes from that time may have only this one.
const OLD_ZONE_LABEL: &str = "failure-domain.beta.kubernetes.io/zone";

/// A version of the EndpointSlice API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SliceApiVersion {
    V1,
    V1Beta1,
}

/// The best served version. None if RBAC denies the request, which is unusual: the cluster role `system:discovery` allows it to
/// every authenticated user.
pub(super) async fn served_version(client: &Client) -> Result<Option<SliceApiVersion>, WatchFailure> {
    let group: APIGroup = match get(client, &format!("/apis/{GROUP}")).await {
        Ok(group) => group,
        Err(kube::Error::Api(status)) if status.code == 403 => return Ok(None),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            return Err(WatchFailure::not_served(format!(
                "the API server does not serve {GROUP}: Kubernetes 1.19 or later is needed"
            )));
        }
        Err(error) => return Err(WatchFailure::of_request(&error)),
    };
    let serves = |version: &str| group.versions.iter().any(|served| served.version == version);
    if serves("v1") {
        Ok(Some(SliceApiVersion::V1))
    } else if serves("v1beta1") {
        Ok(Some(SliceApiVersion::V1Beta1))
    } else {
        let served: Vec<&str> = group.versions.iter().map(|served| served.version.as_str()).collect();
        Err(WatchFailure::not_served(format!(
            "the API server serves {GROUP} only as {}; this daemon needs v1 or v1beta1",
            served.join(", ")
        )))
    }
}

/// Why a Service has no slices, as far as RBAC allows finding out. The flag is false if the API server did not answer.
pub(super) async fn explain_no_slices(client: Client, key: ServiceKey) -> (String, bool) {
    let service = presence(&client, &format!("/api/v1/namespaces/{}/services/{}", key.namespace, key.service)).await;
    let namespace = match service {
        Presence::Exists => Presence::Exists,
        _ => namespace_presence(&client, &key).await,
    };
    let answered = service != Presence::Unknown && namespace != Presence::Unknown;
    (messages::no_slices(&key, namespace, service), answered)
}

pub(super) async fn namespace_presence(client: &Client, key: &ServiceKey) -> Presence {
    presence(client, &format!("/api/v1/namespaces/{}", key.namespace)).await
}

async fn presence(client: &Client, path: &str) -> Presence {
    match get::<ApiObject>(client, path).await {
        Ok(_) => Presence::Exists,
        Err(kube::Error::Api(status)) if status.code == 404 => Presence::Missing,
        Err(kube::Error::Api(status)) if status.code == 403 => Presence::Hidden,
        Err(_) => Presence::Unknown,
    }
}

/// Reports the zone of this node, retrying until the API server answers; reports an unknown zone meanwhile. Logs each cause that
/// the operator can fix, such as a missing RBAC rule, once.
pub(super) async fn find_zone(
    node: String,
    credentials: Arc<Credentials>,
    settings: DiscoverySettings,
    events: UnboundedSender<WatchEvent>,
) {
    let backoff = Backoff::new(settings.limits.backoff_min, settings.limits.backoff_max);
    let mut reported = None;
    let mut denied = 0;
    for failures in 1.. {
        let (zone, done) = match read_zone(&node, &credentials, &settings).await {
            Ok(zone) => (Some(zone), true),
            Err(ZoneError { why, code }) => {
                denied = if code == Some(403) { denied + 1 } else { 0 };
                // An API server that starts denies everything until it has read its rules.
                let code = code.filter(|_| denied == 0 || denied >= FORBIDDEN_ATTEMPTS);
                match code {
                    None => tracing::debug!("cannot read node {node:?} yet: {why}"),
                    Some(_) if reported == code => {}
                    Some(_) => tracing::warn!("{why}"),
                }
                reported = code.or(reported);
                // A missing label or rule can be added at any time, so the task retries.
                (None, code == Some(200))
            }
        };
        if events.send(WatchEvent::Zone(zone.map(Arc::from))).is_err() || done {
            return;
        }
        tokio::time::sleep(backoff.wait(failures)).await;
    }
}

/// Why the zone is unknown.
struct ZoneError {
    why: String,
    /// The HTTP status of the API server's reply; none if there was no reply about the node.
    code: Option<u16>,
}

async fn read_zone(node: &str, credentials: &Credentials, settings: &DiscoverySettings) -> Result<String, ZoneError> {
    let connection = Arc::new(ConnectionState::new(ServiceKey::new("", ""), Arc::new(WatchCounters::default())));
    let answer = async {
        let client = client::connect(&credentials.load().await?, settings.limits, connection)?;
        anyhow::Ok(get::<ApiObject>(&client, &format!("/api/v1/nodes/{node}")).await)
    };
    let (why, code) = match answer.await {
        Ok(Ok(object)) => {
            let labels = &object.metadata.labels;
            let zone = labels.get(ZONE_LABEL).or_else(|| labels.get(OLD_ZONE_LABEL)).filter(|zone| !zone.is_empty());
            match zone {
                Some(zone) => return Ok(zone.clone()),
                None => (messages::zone_unknown(&format!("node {node:?} has no label {ZONE_LABEL}")), Some(200)),
            }
        }
        Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
            (messages::zone_forbidden(node, &status.message, settings.config.as_deref()), Some(403))
        }
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => {
            (messages::zone_unknown(&format!("there is no node {node:?}; check NODE_NAME")), Some(404))
        }
        Ok(Err(error)) => (text_of(&error), None),
        Err(error) => (format!("{error:#}"), None),
    };
    Err(ZoneError { why, code })
}

/// The part of an object that the queries need.
#[derive(Debug, Deserialize)]
struct ApiObject {
    #[serde(default)]
    metadata: ApiMetadata,
}

#[derive(Debug, Default, Deserialize)]
struct ApiMetadata {
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

async fn get<T: serde::de::DeserializeOwned>(client: &Client, path: &str) -> kube::Result<T> {
    let request = Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError)?;
    client.request(request).await
}
