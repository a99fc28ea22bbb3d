//! Follows the EndpointSlices of one Service for as long as a listener needs it.
//!
//! kube's watcher does the protocol: list in pages, watch with bookmarks from the list's version, resume from the last
//! version seen when the connection ends, list again on 410. This task keeps the slices, decides after each failure whether
//! resuming is enough, waits, and logs each kind of failure once. Only the server changes the slices: an event changes one, a
//! complete list replaces all, a failure changes none.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use k8s_openapi::api::discovery::v1;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use rand::RngExt;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::UnboundedSender;

use super::super::aggregator::WatchEvent;
use super::super::messages::{self, Presence};
use super::super::service_key::ServiceKey;
use super::super::slices::Slice;
use super::super::status::{ErrorKind, WatchCounters};
use super::super::wire::{ApiSlice, BetaEndpointSlice, SERVICE_NAME_LABEL};
use super::super::{DiscoverySettings, DiscoveryTimeouts};
use super::client;
use super::connection_state::ConnectionState;
use super::credentials::Credentials;
use super::failure::{Recovery, WatchFailure};
use super::queries::{self, SliceApiVersion};

/// Slices by object name.
type SlicesByName = BTreeMap<String, Arc<Slice>>;

/// The watch of one Service.
pub(super) struct ServiceWatch {
    key: ServiceKey,
    limits: DiscoveryTimeouts,
    /// The path of the configuration file, for the commands that log lines suggest.
    config: Option<PathBuf>,
    credentials: Arc<Credentials>,
    connection: Arc<ConnectionState>,
    events: UnboundedSender<WatchEvent>,
    slices: SlicesByName,
    /// The list being received.
    incoming: SlicesByName,
    /// True after the first complete list.
    listed: bool,
    /// The logged cause of there being no slices.
    absence: Option<String>,
    /// The version to try next if RBAC denies querying it.
    fallback_version: SliceApiVersion,
}

impl ServiceWatch {
    pub(super) fn new(
        key: ServiceKey,
        settings: &DiscoverySettings,
        credentials: Arc<Credentials>,
        counters: Arc<WatchCounters>,
        events: UnboundedSender<WatchEvent>,
    ) -> ServiceWatch {
        ServiceWatch {
            connection: Arc::new(ConnectionState::new(key.clone(), counters)),
            key,
            limits: settings.limits,
            config: settings.config.clone(),
            credentials,
            events,
            slices: SlicesByName::new(),
            incoming: SlicesByName::new(),
            listed: false,
            absence: None,
            fallback_version: SliceApiVersion::V1,
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            if let Err(failure) = self.connect_and_follow().await {
                self.recover_from(&failure, None).await;
            }
        }
    }

    /// Returns when credentials or API version must be read again.
    async fn connect_and_follow(&mut self) -> Result<(), WatchFailure> {
        let config = self.credentials.load().await.map_err(|error| WatchFailure::before_connection(&error))?;
        let client = client::connect(&config, self.limits, self.connection.clone())
            .map_err(|error| WatchFailure::before_connection(&error))?;
        let version = queries::served_version(&client).await?;
        tracing::debug!("following the endpoints of {} with {:?}", self.key, version);
        match version.unwrap_or(self.fallback_version) {
            SliceApiVersion::V1 => self.follow::<v1::EndpointSlice>(&client).await,
            SliceApiVersion::V1Beta1 => self.follow::<BetaEndpointSlice>(&client).await,
        }
        if version.is_none() {
            self.fallback_version = if self.fallback_version == SliceApiVersion::V1 {
                SliceApiVersion::V1Beta1
            } else {
                SliceApiVersion::V1
            };
        }
        Ok(())
    }

    async fn follow<K>(&mut self, client: &Client)
    where
        K: ApiSlice + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    {
        loop {
            let failure = self.list_and_watch::<K>(client).await;
            self.recover_from(&failure, Some(client)).await;
            if failure.recovery == Recovery::Reconnect {
                return;
            }
        }
    }

    /// Runs one watcher until a failure needs a new one, with a new list.
    async fn list_and_watch<K>(&mut self, client: &Client) -> WatchFailure
    where
        K: ApiSlice + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    {
        let api: Api<K> = Api::namespaced(client.clone(), &self.key.namespace);
        let selector = format!("{SERVICE_NAME_LABEL}={}", self.key.service);
        let config = watcher::Config::default().labels(&selector).timeout(self.watch_seconds());
        let mut events = pin!(watcher(api, config));
        let mut explanation: Option<BoxFuture<'static, (String, bool)>> = None;
        loop {
            let explained = async {
                match explanation.as_mut() {
                    Some(lookup) => lookup.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        self.apply_event(event);
                        if !self.slices.is_empty() {
                            explanation = None;
                            self.absence = None;
                        } else if self.listed && explanation.is_none() {
                            explanation = Some(self.explain(client));
                        }
                    }
                    Some(Err(error)) => {
                        let failure = WatchFailure::of_watcher(&error, self.connection.stalls());
                        if failure.recovery != Recovery::Resume {
                            return failure;
                        }
                        self.recover_from(&failure, Some(client)).await;
                    }
                    None => return WatchFailure::not_served("the watcher ended".to_owned()),
                },
                (text, answered) = explained => {
                    if self.absence.is_none() || (answered && self.absence.as_ref() != Some(&text)) {
                        tracing::warn!("{text}");
                        let _ = self.events.send(WatchEvent::Absent(self.key.clone(), text.clone()));
                        self.absence = Some(text);
                    }
                    explanation = Some(self.explain(client));
                }
            }
        }
    }

    /// Finds out why there are no slices: at once the first time, then again and again, since a Service or namespace that appears
    /// without slices causes no event.
    fn explain(&self, client: &Client) -> BoxFuture<'static, (String, bool)> {
        let lookup = queries::explain_no_slices(client.clone(), self.key.clone());
        let delay = if self.absence.is_some() { self.limits.request_timeout } else { Duration::ZERO };
        async move {
            tokio::time::sleep(delay).await;
            lookup.await
        }
        .boxed()
    }

    fn apply_event<K: ApiSlice>(&mut self, event: Event<K>) {
        match event {
            Event::Init => self.incoming.clear(),
            Event::InitApply(object) => {
                self.incoming.insert(object.name_any(), Arc::new(object.to_slice()));
            }
            Event::InitDone => {
                self.slices = std::mem::take(&mut self.incoming);
                self.connection.list_completed();
                self.publish();
            }
            Event::Apply(object) => {
                self.connection.confirm_watch();
                self.slices.insert(object.name_any(), Arc::new(object.to_slice()));
                self.publish();
            }
            Event::Delete(object) => {
                self.connection.confirm_watch();
                self.slices.remove(&object.name_any());
                self.publish();
            }
        }
    }

    fn publish(&mut self) {
        self.listed = true;
        // The receiver is gone only while the thread ends.
        let _ = self.events.send(WatchEvent::Slices(self.key.clone(), self.slices.values().cloned().collect()));
    }

    /// Counts the failure, logs its kind once, and waits for the backoff.
    async fn recover_from(&self, failure: &WatchFailure, client: Option<&Client>) {
        let wait = self.connection.record_failure(failure.kind, failure.retry_after, &self.limits);
        let _ = self.events.send(WatchEvent::Failed(self.key.clone()));
        match failure.kind {
            // Normal operation: a quiet watch is renewed, or its version has become too old.
            ErrorKind::Stalled | ErrorKind::Expired => {
                tracing::debug!("restarting the watch of the endpoints of {}: {}", self.key, failure.text);
            }
            kind if self.connection.is_first_of_outage(kind) => self.report_failure(failure, client).await,
            _ => tracing::debug!("still cannot follow the endpoints of {}: {}", self.key, failure.text),
        }
        tracing::debug!("next attempt to follow the endpoints of {} in {} ms", self.key, wait.as_millis());
        tokio::time::sleep(wait).await;
    }

    async fn report_failure(&self, failure: &WatchFailure, client: Option<&Client>) {
        let kept = if self.listed { "the last known endpoints stay in use" } else { "none are known yet" };
        if failure.kind == ErrorKind::Forbidden {
            let namespace = match client {
                Some(client) => queries::namespace_presence(client, &self.key).await,
                None => Presence::Unknown,
            };
            tracing::warn!(
                "{}; {kept}",
                messages::slices_forbidden(&self.key, &failure.text, namespace, self.config.as_deref())
            );
            return;
        }
        tracing::warn!("cannot follow the endpoints of {}: {}; {kept}; retrying", self.key, failure.text);
    }

    /// The length of the next watch in seconds; random, so that nodes started together do not renew together.
    fn watch_seconds(&self) -> u32 {
        let most = u32::try_from(self.limits.watch_timeout.as_secs()).unwrap_or(u32::MAX).max(1);
        rand::rng().random_range(most - most / 5..=most)
    }
}
