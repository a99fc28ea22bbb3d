//! Finds the API server and the daemon's credentials: kubeconfig or service account.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::failure::join_causes;

/// The source of the API server's address, its certificate authority and the daemon's token. It is read again for each new
/// client, so rotated credentials are found after the server rejects the old ones.
#[derive(Debug)]
pub(super) enum Credentials {
    /// The kubeconfig given by the operator.
    File(PathBuf),
    /// The service account of the daemon's pod.
    Pod,
    /// The file that `KUBECONFIG` names, else `~/.kube/config`.
    User,
}

impl Credentials {
    pub(super) fn find(kubeconfig: Option<&Path>) -> Credentials {
        match kubeconfig {
            Some(path) => Credentials::File(path.to_owned()),
            // The kubelet sets it in every pod.
            None if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() => Credentials::Pod,
            None => Credentials::User,
        }
    }

    /// # Errors
    /// If the files cannot be read or are invalid.
    pub(super) async fn load(&self) -> Result<Config> {
        match self {
            Credentials::File(path) => {
                let what = || format!("cannot use the kubeconfig {}", path.display());
                let file = Kubeconfig::read_from(path).map_err(|error| anyhow!(join_causes(&error)));
                from_file(file.with_context(what)?).await.with_context(what)
            }
            Credentials::Pod => Config::incluster().context(
                "cannot use the pod's service account: check that the pod's automountServiceAccountToken is not false",
            ),
            Credentials::User => {
                let what = "Kubernetes discovery finds no API server: the daemon does not run in a pod (KUBERNETES_SERVICE_HOST is not \
                            set) and neither KUBECONFIG nor ~/.kube/config is usable; name one with --kubeconfig FILE";
                let file = Kubeconfig::read().map_err(|error| anyhow!(join_causes(&error)));
                from_file(file.context(what)?).await.context(what)
            }
        }
    }
}

async fn from_file(file: Kubeconfig) -> Result<Config> {
    let proxied = file.clusters.iter().any(|named| {
        let proxy = named.cluster.as_ref().and_then(|cluster| cluster.proxy_url.as_ref());
        proxy.is_some_and(|proxy| !proxy.is_empty())
    });
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    if let Some(proxy) = config.proxy_url.take() {
        ensure!(
            !proxied,
            "its proxy-url {proxy} is not supported; remove proxy-url, and let this host reach the API server directly"
        );
        // The proxy comes from HTTPS_PROXY in the environment, which is for hosts outside the cluster.
    }
    Ok(config)
}
