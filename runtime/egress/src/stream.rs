//! A connection's bytes, in the clear or through TLS, that cannot stand still for ever.
//!
//! Reading is bounded by whoever waits for an answer. Nobody waits for writing: a server that never reads would hold a
//! request's bytes, and a connection, after everybody has gone. So each write has a time to make progress in.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio_rustls::client::TlsStream;

enum Inner {
    Clear(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection to a server.
pub(crate) struct Stream {
    inner: Inner,
    /// How long a write may make no progress.
    stall: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    pub(crate) fn clear(stream: TcpStream, stall: Duration) -> Self {
        Self { inner: Inner::Clear(stream), stall, stalled: None }
    }

    pub(crate) fn tls(stream: TlsStream<TcpStream>, stall: Duration) -> Self {
        Self { inner: Inner::Tls(Box::new(stream)), stall, stalled: None }
    }

    /// Whether TLS' handshake chose HTTP/2.
    pub(crate) fn is_http2(&self) -> bool {
        match &self.inner {
            Inner::Clear(_) => false,
            Inner::Tls(stream) => stream.get_ref().1.alpn_protocol() == Some(b"h2"),
        }
    }

    /// Lets a write pass, or the clock run while it is pending.
    fn moving<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.stalled = None;
            return polled;
        }
        let stall = self.stall;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall)));
        stalled.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Inner::Clear(stream) => Pin::new(stream).poll_read(cx, buf),
            Inner::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = match &mut self.inner {
            Inner::Clear(stream) => Pin::new(stream).poll_write(cx, bytes),
            Inner::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        };
        self.moving(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        all: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = match &mut self.inner {
            Inner::Clear(stream) => Pin::new(stream).poll_write_vectored(cx, all),
            Inner::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, all),
        };
        self.moving(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.inner {
            Inner::Clear(stream) => stream.is_write_vectored(),
            Inner::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.inner {
            Inner::Clear(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_flush(cx),
        };
        self.moving(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.inner {
            Inner::Clear(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        };
        self.moving(cx, polled)
    }
}
