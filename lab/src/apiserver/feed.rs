//! A response body that is written bit by bit.

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
    /// Writes, in pieces and with pauses if the server drips. False if the client is gone.
    pub async fn write(&self, bytes: Vec<u8>) -> bool {
        self.thaw().await;
        let drip = self.shared.lock().drip;
        let Some((size, pause)) = drip else {
            return self.sender.send(bytes.into()).await.is_ok();
        };
        for piece in bytes.chunks(size) {
            if self.sender.send(Bytes::copy_from_slice(piece)).await.is_err() {
                return false;
            }
            tokio::time::sleep(pause).await;
            self.thaw().await;
        }
        true
    }

    /// Waits while the server is frozen.
    pub async fn thaw(&self) {
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
