//! Where the API server is and who we are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};

/// Where to read the address of the API server, its certificate authority and our token from. They are read again for
/// each new client, so that whatever has been rotated is found when the old ones are refused.
#[derive(Debug)]
pub(super) enum Credentials {
    /// The file the operator named.
    File(PathBuf),
    /// The service account of the pod we run in.
    Pod,
    /// What `KUBECONFIG` names, else `~/.kube/config`.
    User,
}

impl Credentials {
    pub(super) fn find(kubeconfig: Option<&Path>) -> Credentials {
        match kubeconfig {
            Some(path) => Credentials::File(path.to_owned()),
            // Set by the kubelet in every pod, and by nothing else.
            None if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() => Credentials::Pod,
            None => Credentials::User,
        }
    }

    /// # Errors
    /// When the files cannot be read or make no sense.
    pub(super) async fn load(&self) -> Result<Config> {
        match self {
            Credentials::File(path) => {
                let what = || format!("cannot use the kubeconfig {}", path.display());
                from_file(Kubeconfig::read_from(path).with_context(what)?).await.with_context(what)
            }
            Credentials::Pod => Config::incluster().context(
                "cannot use the pod's service account: check that the pod's automountServiceAccountToken is not false",
            ),
            Credentials::User => {
                let what = "Kubernetes discovery finds no API server: this is no pod (KUBERNETES_SERVICE_HOST is not \
                            set) and neither KUBECONFIG nor ~/.kube/config is usable; name one with --kubeconfig FILE";
                from_file(Kubeconfig::read().context(what)?).await.context(what)
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
        ensure!(!proxied, "its proxy-url {proxy} is not supported: the API server must be reached directly");
        // It is the environment's HTTPS_PROXY, which is for the world outside.
    }
    Ok(config)
}
