//! Accepts connections and carries out the test's orders.

use std::convert::Infallible;
use std::sync::Arc;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use super::Shared;
use super::answer::answer;

/// Notified when an order has been carried out.
pub struct Done(pub std::sync::mpsc::Sender<()>);

pub enum Order {
    Cut(Done),
    Stop(Done),
    Listen(Done),
    Tls(Arc<ServerConfig>, Done),
}

pub fn run(
    listener: std::net::TcpListener,
    tls: Arc<ServerConfig>,
    shared: Arc<Shared>,
    orders: UnboundedReceiver<Order>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(accept(listener, tls, shared, orders));
    runtime.shutdown_background();
}

async fn accept(
    listener: std::net::TcpListener,
    tls: Arc<ServerConfig>,
    shared: Arc<Shared>,
    mut orders: UnboundedReceiver<Order>,
) {
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut listener = Some(TcpListener::from_std(listener).unwrap());
    let mut acceptor = TlsAcceptor::from(tls);
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await.unwrap().0,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                None => return,
                Some(Order::Cut(Done(done))) => {
                    connections.shutdown().await;
                    done.send(()).unwrap();
                }
                Some(Order::Stop(Done(done))) => {
                    listener = None;
                    connections.shutdown().await;
                    done.send(()).unwrap();
                }
                Some(Order::Listen(Done(done))) => {
                    listener = Some(TcpListener::bind(address).await.unwrap());
                    done.send(()).unwrap();
                }
                Some(Order::Tls(tls, Done(done))) => {
                    acceptor = TlsAcceptor::from(tls);
                    done.send(()).unwrap();
                }
            },
            stream = accepted => {
                stream.set_nodelay(true).unwrap();
                let (acceptor, shared) = (acceptor.clone(), shared.clone());
                connections.spawn(async move {
                    // A client that rejects the certificate or is disconnected is no failure of the test.
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = service_fn(|request| {
                        let shared = shared.clone();
                        async move { Ok::<_, Infallible>(answer(&shared, &request).await) }
                    });
                    let mut http = http1::Builder::new();
                    let _ = http.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}
