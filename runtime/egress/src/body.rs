//! A request's body on its way out and an answer's on its way in, frame by frame: nothing is gathered.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use tokio::sync::Notify;
use tokio::time::{Sleep, timeout};

use crate::error::{Error, on_a_line};
use crate::head;
use crate::pool::Lease;

/// A guest's body, held to the length it declared.
pub(crate) struct Outgoing {
    inner: UnsyncBoxBody<Bytes, Error>,
    /// Taken from `inner` before the head went out.
    first: Option<Frame<Bytes>>,
    declared: Option<u64>,
    sent: u64,
    fate: Fate,
}

/// What became of a body that a connection has: nothing yet, dropped after its last byte was sent, or broken off.
/// HTTP/2 does not tell the one who waits for the answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fate(Arc<Progress>);

#[derive(Debug, Default)]
struct Progress {
    /// Bytes that the connection has taken.
    taken: AtomicU64,
    over: OnceLock<Result<(), Error>>,
    told: Notify,
}

impl Fate {
    /// Whether the connection has sent all it will of it.
    pub(crate) fn is_over(&self) -> bool {
        self.0.over.get().is_some()
    }

    /// Why it broke off.
    pub(crate) fn error(&self) -> Option<Error> {
        self.0.over.get().and_then(|fate| fate.clone().err())
    }

    fn set(&self, fate: Result<(), Error>) {
        let _ = self.0.over.set(fate);
        self.0.told.notify_one();
    }

    /// Waits until it is over; whether it was, before it stood still for so long.
    pub(crate) async fn comes_to_an_end(&self, stall: Duration) -> bool {
        let mut before = None;
        while !self.is_over() {
            let taken = self.0.taken.load(Ordering::Relaxed);
            if before == Some(taken) {
                return false;
            }
            before = Some(taken);
            let _ = timeout(stall, self.0.told.notified()).await;
        }
        true
    }
}

impl Outgoing {
    /// # Errors
    /// [`Error::RequestBodySize`] if the body already knows that it has another length than it declares.
    pub(crate) fn new<B>(body: B, declared: Option<u64>) -> Result<Self, Error>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::fmt::Display,
    {
        if let (Some(declared), Some(exact)) = (declared, body.size_hint().exact())
            && declared != exact
        {
            return Err(Error::RequestBodySize(declared));
        }
        let inner = UnsyncBoxBody::new(body.map_err(|e| Error::RequestBody(on_a_line(e))));
        Ok(Self { inner, first: None, declared, sent: 0, fate: Fate::default() })
    }

    /// What will have become of it.
    pub(crate) fn fate(&self) -> Fate {
        self.fate.clone()
    }

    /// Whether there is no telling yet if it is empty.
    pub(crate) fn is_open(&self) -> bool {
        self.declared.is_none() && self.size_hint().exact().is_none()
    }

    /// Waits for its beginning; whether there is one.
    ///
    /// # Errors
    /// If it broke off.
    pub(crate) async fn begins(&mut self) -> Result<bool, Error> {
        self.first = self.inner.frame().await.transpose()?;
        Ok(self.first.is_some())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.fate.set(Ok(()));
    }
}

impl Outgoing {
    fn broken(&self, error: Error) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        self.fate.set(Err(error.clone()));
        Poll::Ready(Some(Err(error)))
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let mut frame = match self.first.take() {
            Some(frame) => Some(frame),
            None => match std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Ok(frame)) => Some(frame),
                Some(Err(error)) => return self.broken(error),
                None => None,
            },
        };
        let more = frame.as_ref().and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
        self.sent = self.sent.saturating_add(more);
        self.fate.0.taken.store(self.sent, Ordering::Relaxed);
        if let Some(trailers) = frame.as_mut().and_then(Frame::trailers_mut) {
            head::strip_trailers(trailers);
        }
        if let Some(declared) = self.declared {
            // Trailers, like the end, come after everything.
            let over = !frame.as_ref().is_some_and(Frame::is_data);
            if self.sent > declared || (over && self.sent < declared) {
                return self.broken(Error::RequestBodySize(declared));
            }
        }
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        let whole = self.declared.is_none_or(|declared| declared == self.sent);
        whole && self.first.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match (self.declared, &self.first) {
            (Some(declared), _) => SizeHint::with_exact(declared.saturating_sub(self.sent)),
            (None, None) => self.inner.size_hint(),
            (None, Some(_)) => SizeHint::default(),
        }
    }
}

/// An answer's body. Dropped before its end, it takes the connection with it, or its stream under HTTP/2.
#[derive(Debug)]
pub struct Incoming {
    inner: hyper::body::Incoming,
    /// The longest pause between frames, counted only while somebody waits for one.
    pause: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
    lease: Option<Lease>,
    ended: bool,
}

impl Incoming {
    pub(crate) fn new(inner: hyper::body::Incoming, pause: Duration, lease: Lease) -> Self {
        let mut body = Self { inner, pause, waiting: None, lease: Some(lease), ended: false };
        if body.inner.is_end_stream() {
            body.end();
        }
        body
    }

    /// Gives the connection back.
    fn end(&mut self) {
        self.ended = true;
        if let Some(lease) = self.lease.take() {
            lease.give_back();
        }
    }

    fn fail(&mut self, error: Error) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        self.ended = true;
        if let Some(lease) = self.lease.take() {
            lease.give_up();
        }
        Poll::Ready(Some(Err(error)))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.abandon();
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.waiting = None;
                if this.inner.is_end_stream() {
                    this.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => this.fail(Error::http(&error, true)),
            Poll::Ready(None) => {
                this.end();
                Poll::Ready(None)
            }
            Poll::Pending => {
                let pause = this.pause;
                let waiting = this.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
                match waiting.as_mut().poll(cx) {
                    Poll::Ready(()) => this.fail(Error::BetweenBytesTimeout),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.ended { SizeHint::with_exact(0) } else { self.inner.size_hint() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{Full, StreamBody};
    use proptest::prelude::*;

    fn pieces(sizes: &[usize]) -> impl Body<Data = Bytes, Error = std::io::Error> + Send + use<> {
        let frames: Vec<_> = sizes.iter().map(|n| Ok(Frame::data(Bytes::from(vec![b'x'; *n])))).collect();
        StreamBody::new(futures_util::stream::iter(frames))
    }

    #[test]
    fn a_body_that_knows_better_is_refused_at_once() {
        let body = || Full::new(Bytes::from_static(b"12345"));
        assert!(Outgoing::new(body(), Some(5)).is_ok());
        assert_eq!(Outgoing::new(body(), Some(4)).err(), Some(Error::RequestBodySize(4)));
        assert_eq!(Outgoing::new(body(), Some(6)).err(), Some(Error::RequestBodySize(6)));
    }

    proptest! {
        #[test]
        fn a_body_has_the_length_it_declares_or_breaks_off(
            sizes in proptest::collection::vec(0_usize..50, 0..6),
            declared in 0_u64..200,
            peek: bool,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let total: usize = sizes.iter().sum();
            for declared in [Some(declared), Some(total as u64), None] {
                let mut body = Outgoing::new(pieces(&sizes), declared).unwrap();
                if peek {
                    prop_assert_eq!(runtime.block_on(body.begins()), Ok(!sizes.is_empty()));
                }
                let got = runtime.block_on(body.collect()).map(|all| all.to_bytes().len());
                match declared {
                    Some(declared) if declared != total as u64 => {
                        prop_assert_eq!(got, Err(Error::RequestBodySize(declared)));
                    }
                    _ => prop_assert_eq!(got, Ok(total)),
                }
            }
        }
    }
}
