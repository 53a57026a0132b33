//! A TCP stream that closes without cutting off its last answer, and with a reset when an answer broke off.
//!
//! When a server closes a socket that still has unread bytes, the kernel resets the connection, and the reset can
//! overtake the answer: a client whose request was refused for its size would never learn why. So, when there are
//! unread bytes at the end, the stream is shut for writing and read for a bounded while. In HTTP/2 there may be some at any time: a
//! client makes room for the rest of an answer while it reads, and that must not cut the answer off.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// What is read and dropped at most, in bytes.
const MOST: usize = 16 << 20;
/// For how long at most; of one that goes on talking, since it last did.
const WITHIN: Duration = Duration::from_secs(2);

/// A stream and, while it closes, how much longer.
pub struct Lingering {
    stream: TcpStream,
    /// Set when the connection is to end with a reset.
    broken: Rc<Cell<bool>>,
    /// The other end may send something after its last request.
    talks: bool,
    closing: Option<(usize, Pin<Box<Sleep>>)>,
    shut: bool,
}

impl Lingering {
    /// Takes over an accepted stream.
    #[must_use]
    pub fn new(stream: TcpStream, broken: Rc<Cell<bool>>) -> Self {
        Self { stream, broken, talks: false, closing: None, shut: false }
    }

    /// From here on the other end may send something after its last request, as in HTTP/2.
    pub fn talks(&mut self) {
        self.talks = true;
    }

    /// Whether it is to end with a reset.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        if self.broken.get() {
            // Zero seconds: closing then sends a reset instead of an end (socket(7)). If it fails, it ends as usual.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Lingering {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        all: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, all)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.broken.get() {
            return Poll::Ready(Ok(()));
        }
        if !self.shut {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.shut = true;
            let mut first = [0; 4096];
            let talks = self.talks;
            let is_more = match self.stream.try_read(&mut first) {
                Ok(n) => n > 0,
                Err(e) => talks && e.kind() == io::ErrorKind::WouldBlock,
            };
            if !is_more {
                // Nothing is there, or the client has closed too: the usual end of a connection.
                return Poll::Ready(Ok(()));
            }
            self.closing = Some((MOST, Box::pin(tokio::time::sleep(WITHIN))));
        }
        let this = &mut *self;
        let talks = this.talks;
        let Some((left, until)) = &mut this.closing else { return Poll::Ready(Ok(())) };
        let mut dropped = [0; 16 * 1024];
        while until.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut dropped);
            let read = match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer)) {
                Ok(()) => buffer.filled().len(),
                Err(_) => 0,
            };
            match left.checked_sub(read) {
                Some(rest) if read > 0 => {
                    *left = rest;
                    if talks {
                        until.as_mut().reset(tokio::time::Instant::now() + WITHIN);
                    }
                }
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// A client that sends more than is read must still get the answer.
    #[tokio::test]
    async fn a_broken_answer_ends_with_a_reset() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let broken = Rc::new(Cell::new(false));
        let mut server = Lingering::new(stream, Rc::clone(&broken));
        server.write_all(b"part").await.unwrap();
        let mut part = [0; 4];
        client.read_exact(&mut part).await.unwrap();
        broken.set(true);
        server.shutdown().await.unwrap();
        drop(server);
        assert_eq!(client.read(&mut part).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    /// Would miss: an answer whose rest is lost when the client makes room for it.
    #[tokio::test]
    async fn the_rest_of_an_answer_arrives_although_the_client_goes_on_talking() {
        const BYTES: usize = 400_000;
        for talks in [true, false] {
            let (mut client, mut server) = pair().await;
            if talks {
                server.talks();
            }
            // More than the client's side takes before it reads.
            server.write_all(&vec![b'x'; BYTES]).await.unwrap();
            let close = async move {
                server.shutdown().await.unwrap();
                drop(server);
            };
            let read = async {
                // In HTTP/1.1 the server is gone by now.
                tokio::time::sleep(Duration::from_millis(50)).await;
                let mut all = 0;
                let mut piece = [0; 16 * 1024];
                while let Ok(read @ 1..) = client.read(&mut piece).await {
                    all += read;
                    let _ = client.write_all(b"more").await;
                }
                drop(client);
                all
            };
            let ((), read) = tokio::join!(close, read);
            assert_eq!(read == BYTES, talks, "{read} of {BYTES} bytes");
        }
    }

    async fn pair() -> (TcpStream, Lingering) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        (client, Lingering::new(stream, Rc::default()))
    }

    /// Would miss: a connection of somebody silent that is held for ever because a byte was left unread.
    #[tokio::test]
    async fn it_waits_no_longer_than_it_may() {
        let (mut client, mut server) = pair().await;
        client.write_all(b"xy").await.unwrap();
        server.read_u8().await.unwrap();
        let began = std::time::Instant::now();
        server.shutdown().await.unwrap();
        assert!(began.elapsed() + Duration::from_millis(50) >= WITHIN, "{:?}", began.elapsed());
        assert!(began.elapsed() < 10 * WITHIN, "{:?}", began.elapsed());
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "it was told the end at once");
    }

    #[tokio::test]
    async fn where_all_was_read_it_does_not_wait() {
        let (mut client, mut server) = pair().await;
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        let began = std::time::Instant::now();
        server.shutdown().await.unwrap();
        assert!(began.elapsed() < WITHIN, "{:?}", began.elapsed());
    }

    /// Would miss: somebody who sends without end and is read without end.
    #[tokio::test]
    async fn it_reads_no_more_than_it_may() {
        let (mut client, mut server) = pair().await;
        let sending = async {
            let (piece, mut sent) = (vec![b'x'; 64 * 1024], 0);
            while let Ok(more) = client.write(&piece).await {
                sent += more;
            }
            sent
        };
        let closing = async {
            server.read_u8().await.unwrap();
            server.shutdown().await.unwrap();
            drop(server);
        };
        let (sent, ()) = tokio::join!(sending, closing);
        // Beyond what was read there is what both kernels hold.
        assert!(sent < MOST + (32 << 20), "{sent}");
    }

    #[tokio::test]
    async fn the_last_answer_arrives_although_the_request_was_not_read() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        client.write_all(&vec![b'x'; 300_000]).await.unwrap();
        let mut server = Lingering::new(stream, Rc::default());
        let mut some = [0; 10];
        server.read_exact(&mut some).await.unwrap();
        server.write_all(b"no").await.unwrap();
        let mut answer = Vec::new();
        let read = async {
            client.read_to_end(&mut answer).await.unwrap();
            drop(client);
        };
        let (closed, ()) = tokio::join!(server.shutdown(), read);
        closed.unwrap();
        assert_eq!(answer, b"no");
    }
}
