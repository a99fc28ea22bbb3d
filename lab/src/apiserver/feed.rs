//! A response body that is written incrementally.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::Shared;

/// The reading end; hyper sends each piece as a chunk of its own.
pub struct Feed(Receiver<Bytes>);

/// The writing end.
pub struct Pen {
    sender: Sender<Bytes>,
    shared: Arc<Shared>,
}

pub fn feed(shared: &Arc<Shared>) -> (Pen, Feed) {
    let (sender, receiver) = channel(1);
    (Pen { sender, shared: shared.clone() }, Feed(receiver))
}

impl Pen {
    /// Writes bytes, in pieces and with pauses if the test has set that. False if the client has disconnected.
    pub async fn write(&self, bytes: Vec<u8>) -> bool {
        self.wait_unfrozen().await;
        let drip = self.shared.lock().drip;
        let Some((size, pause)) = drip else {
            return self.sender.send(bytes.into()).await.is_ok();
        };
        for piece in bytes.chunks(size) {
            if self.sender.send(Bytes::copy_from_slice(piece)).await.is_err() {
                return false;
            }
            tokio::time::sleep(pause).await;
            self.wait_unfrozen().await;
        }
        true
    }

    /// Waits while the server is frozen.
    pub async fn wait_unfrozen(&self) {
        let mut version = self.shared.version.subscribe();
        while self.shared.lock().frozen {
            version.changed().await.unwrap();
        }
    }

    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

impl Body for Feed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}
