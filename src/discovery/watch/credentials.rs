//! Where the API server is and who we are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
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
        let options = KubeConfigOptions::default();
        match self {
            Credentials::File(path) => {
                let what = || format!("cannot use the kubeconfig {}", path.display());
                let file = Kubeconfig::read_from(path).with_context(what)?;
                Config::from_custom_kubeconfig(file, &options).await.with_context(what)
            }
            Credentials::Pod => Config::incluster().context(
                "cannot use the pod's service account: check that the pod's automountServiceAccountToken is not false",
            ),
            Credentials::User => Config::from_kubeconfig(&options).await.context(
                "Kubernetes discovery finds no API server: this is no pod (KUBERNETES_SERVICE_HOST is not set) and \
                 neither KUBECONFIG nor ~/.kube/config is usable; name one with --kubeconfig FILE",
            ),
        }
    }
}
