//! Finds out by single requests why the endpoints of a Service cannot be followed; for `udp-fanout doctor`.

use std::sync::Arc;

use http::Request;
use kube::Client;

use super::super::messages;
use super::super::service_key::ServiceKey;
use super::super::status::{ErrorKind, WatchCounters};
use super::super::wire::SERVICE_NAME_LABEL;
use super::super::{DiscoverySettings, DiscoveryTimeouts};
use super::client;
use super::connection_state::ConnectionState;
use super::credentials::Credentials;
use super::failure::WatchFailure;
use super::queries::{self, SliceApiVersion};

/// Lists the Service's slices and opens a watch.
///
/// # Errors
/// The cause and the fix, in one line.
pub(super) async fn diagnose(settings: &DiscoverySettings, namespace: &str, service: &str) -> Result<(), String> {
    let credentials = Credentials::find(settings.kubeconfig.as_deref());
    let config = credentials.load().await.map_err(|error| format!("{error:#}"))?;
    let key = ServiceKey::new(namespace, service);
    let client = connect(&config, settings.limits, &key)?;
    let version = match queries::served_version(&client).await {
        Ok(version) => version.unwrap_or(SliceApiVersion::V1),
        Err(failure) => return Err(unreachable_message(&failure)),
    };
    let version = if version == SliceApiVersion::V1 { "v1" } else { "v1beta1" };
    let slices = format!(
        "/apis/discovery.k8s.io/{version}/namespaces/{namespace}/endpointslices?labelSelector={SERVICE_NAME_LABEL}%3D{service}"
    );
    let list = get(&client, &format!("{slices}&limit=1")).await;
    let watch = match &list {
        Ok(list) => {
            let version = list["metadata"]["resourceVersion"].as_str().unwrap_or("0");
            open_watch(&client, &format!("{slices}&watch=true&resourceVersion={version}&timeoutSeconds=1")).await
        }
        Err(_) => Ok(()),
    };
    match (list, watch) {
        (Ok(list), Ok(())) if list["items"].as_array().is_none_or(Vec::is_empty) => {
            Err(queries::explain_no_slices(client, key).await.0)
        }
        (Ok(_), Ok(())) => Ok(()),
        (Err(error), _) | (_, Err(error)) => {
            let failure = WatchFailure::of_request(&error);
            if failure.kind == ErrorKind::Forbidden {
                let there = queries::namespace_presence(&client, &key).await;
                return Err(messages::slices_forbidden(&key, &failure.text, there, settings.config.as_deref()));
            }
            Err(unreachable_message(&failure))
        }
    }
}

fn connect(config: &kube::Config, limits: DiscoveryTimeouts, key: &ServiceKey) -> Result<Client, String> {
    let connection = Arc::new(ConnectionState::new(key.clone(), Arc::new(WatchCounters::default())));
    client::connect(config, limits, connection).map_err(|error| format!("{error:#}"))
}

async fn get(client: &Client, path: &str) -> kube::Result<serde_json::Value> {
    let request = Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError)?;
    client.request(request).await
}

/// Opens a watch and closes it as soon as the server has accepted it.
async fn open_watch(client: &Client, path: &str) -> kube::Result<()> {
    let request = Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError)?;
    client.request_stream(request).await.map(drop)
}

fn unreachable_message(failure: &WatchFailure) -> String {
    let fix = match failure.kind {
        ErrorKind::Unauthorized => "check the service account's token, or the kubeconfig's credentials",
        ErrorKind::Tls => "check the certificate authority of the service account or kubeconfig",
        ErrorKind::NotServed => "use Kubernetes 1.19 or later",
        _ => "check that the API server runs, and that this host can reach it",
    };
    format!("request to the API server failed: {}; {fix}", failure.text)
}
