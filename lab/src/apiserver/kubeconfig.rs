//! The server's certificates, and the files that a client needs.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::cleanup::TempDirectory;

pub struct Files {
    directory: TempDirectory,
    tls: Arc<ServerConfig>,
}

impl Files {
    pub fn new(server: SocketAddr, token: &str) -> Files {
        let directory = TempDirectory::new().unwrap();
        let (authority, tls) = certificates();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("ca.crt"), authority).unwrap();
        std::fs::write(path("token"), token).unwrap();
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters:\n- name: test\n  cluster: {{server: \"https://{server}\", certificate-authority: ca.crt}}\n\
             users:\n- name: test\n  user: {{tokenFile: {}}}\n\
             contexts:\n- name: test\n  context: {{cluster: test, user: test, namespace: default}}\n",
            path("token").display()
        );
        std::fs::write(path("kubeconfig"), kubeconfig).unwrap();
        Files { directory, tls }
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    pub fn write_token(&self, token: &str) {
        std::fs::write(self.directory.path().join("token"), token).unwrap();
    }

    pub fn tls(&self) -> Arc<ServerConfig> {
        self.tls.clone()
    }

    pub fn rotate(&self) -> Arc<ServerConfig> {
        let (authority, tls) = certificates();
        std::fs::write(self.directory.path().join("ca.crt"), authority).unwrap();
        tls
    }
}

/// Generates an authority, in PEM, and a TLS configuration with a certificate by it.
fn certificates() -> (String, Arc<ServerConfig>) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, "kubernetes");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::IpAddress(IpAddr::from([127, 0, 0, 1]))];
    params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let tls =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    (authority.pem(), Arc::new(tls))
}
