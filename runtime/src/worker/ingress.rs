//! The ingress: accepting, and one connection from its first byte to its end.
//!
//! ```text
//! plain port ──────────────────┬─ HTTP/1.1 ── the first bytes are HTTP/2's preface ──┐
//! TLS port ── handshake, ALPN ─┤  "http/1.1" or nothing                              ├─ HTTP/2
//!                              └─ "h2" ──────────────────────────────────────────────┘
//! ```
//!
//! Which protocol a plain connection speaks is seen in the bytes that HTTP/1.1 reads anyway: to it, HTTP/2 costs nothing.
//!
//! In HTTP/2 each stream is a task of its own, and ends with what it serves: a broken answer resets its stream, and the
//! connection goes on. Guests read and write through the stream's windows, so who does not read is not written to; how
//! much one connection can make the worker hold is bounded by the constants below.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Method, StatusCode, header};
use http_body_util::{Either, Full};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::server::TlsStream;

use super::linger::Lingering;
use super::{Phase, Worker, serve, tls};
use crate::statistics::While;

/// A connection must send a request's whole head within this, and may be idle between requests for as long.
const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// How long a connection that is idle when the worker drains may take to ask once more.
const ONE_MORE_WITHIN: Duration = Duration::from_secs(2);
/// What an HTTP/2 connection that has not asked for anything yet may take then, before it is told to go elsewhere.
const FIRST_HEAD_WITHIN: Duration = Duration::from_millis(100);
/// What a connection whose TLS handshake is not over may take then: the client is asked at least once more.
const HANDSHAKE_WHEN_DRAINING: Duration = Duration::from_secs(1);
/// What may be buffered of a connection, and be in the list of a request's headers, in bytes; a longer head is answered 431.
const CONNECTION_BUFFER: usize = 32 * 1024;
const HEADER_LIST: u32 = 32 * 1024;
/// Connections at a time: with their buffers full they take 256 MiB, and of bodies that wait for guests a stream's window for
/// each request that is inside. More connections wait in the sockets' queues.
pub(super) const CONNECTIONS: usize = 8192;
/// How long a client may leave an answer unread.
const UNREAD_FOR: Duration = Duration::from_secs(30);

/// Streams that an HTTP/2 connection may have open: what browsers expect at least is 100 (RFC 9113, section 6.5.2).
const STREAMS: u32 = 128;
/// What a client may send of one request's body before the guest has read it, and of all of a connection's, in bytes.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 512 * 1024;
/// What is kept of one answer that the client has no window for, in bytes.
const SEND_BUFFER: usize = 64 * 1024;
/// Streams that may be reset before they were looked at, and that may be ended for the client's errors. A connection with
/// more ends with `ENHANCE_YOUR_CALM`.
const RESET_UNSEEN: usize = 20;
const RESET_FOR_ERRORS: usize = 128;
/// How often a client is asked whether it is there, and how long it has to say so.
const PING_EVERY: Duration = Duration::from_secs(20);
const PONG_WITHIN: Duration = Duration::from_secs(20);
/// How much longer than its request's deadline a stream lasts: what the guest said by then may still be on its way.
const AFTER_DEADLINE: Duration = Duration::from_secs(1);

/// What a client says first in HTTP/2, as far as no request in HTTP/1.1 can begin with it (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n";

/// Accepts on one socket until the worker drains, no more than there are places for.
pub(super) async fn accept(
    worker: Rc<Worker>,
    listener: TcpListener,
    secure: bool,
    places: Arc<Semaphore>,
    mut phase: watch::Receiver<Phase>,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            _ = phase.wait_for(|p| *p == Phase::Draining) => return,
            accepted = one_more(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, peer, place)) => {
                let counters = &worker.statistics;
                worker.means.turns.something_was_done();
                counters.worker.accepted.fetch_add(1, Relaxed);
                let open = While::counted(counters, |page| &page.worker.open);
                let fresh = While::counted(counters, |page| &page.worker.fresh);
                let connection = serve::Connection {
                    worker: Rc::clone(&worker),
                    peer,
                    secure,
                    fresh: RefCell::new(Some(fresh)),
                    broken: Rc::default(),
                    until: Cell::default(),
                    at_work: Cell::default(),
                    last: Cell::default(),
                    idle_since: Cell::new(std::time::Instant::now()),
                };
                let phase = phase.clone();
                tokio::task::spawn_local(async move {
                    serve_connection(Rc::new(connection), stream, phase).await;
                    drop((open, place));
                });
            }
            // Out of descriptors or memory: those in use come back as requests end.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn one_more(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, place))
}

/// Serves one connection to its end, or to the end of its current requests when the worker drains.
async fn serve_connection(connection: Rc<serve::Connection>, stream: TcpStream, mut phase: watch::Receiver<Phase>) {
    let _ = stream.set_nodelay(true);
    // A client that takes nothing for so long is gone, even if its machine still answers (tcp(7)).
    let unread_for = u32::try_from(UNREAD_FOR.as_millis()).unwrap_or(u32::MAX);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, unread_for);
    let stream = Lingering::new(stream, Rc::clone(&connection.broken));
    let (stream, agreed) = if connection.secure {
        // In a box, as HTTP/2: what most connections never are should not make each of them larger.
        let Some(stream) = Box::pin(secured(&connection, stream, &mut phase)).await else { return };
        let agreed = stream.get_ref().1.alpn_protocol() == Some(tls::H2);
        (Stream::secured(stream), agreed)
    } else {
        (Stream::plain(stream), false)
    };
    let stream = if agreed { Some(stream) } else { http1(&connection, stream, &mut phase).await };
    if let Some(stream) = stream {
        Box::pin(http2(connection, stream, &mut phase)).await;
    }
}

/// Makes TLS of a connection; nothing if that fails, of which the client knows as much as it may.
async fn secured(
    connection: &serve::Connection,
    stream: Lingering,
    phase: &mut watch::Receiver<Phase>,
) -> Option<TlsStream<Lingering>> {
    let turns = &connection.worker.means.turns;
    let mut handshake = pin!(connection.worker.tls.handshake(stream));
    tokio::select! {
        biased;
        secured = turns.before_others(handshake.as_mut()) => return secured,
        _ = phase.wait_for(|p| *p == Phase::Draining) => {}
    }
    timeout(HANDSHAKE_WHEN_DRAINING, turns.before_others(handshake)).await.ok().flatten()
}

/// Serves HTTP/1.1. Gives the stream back if the client speaks HTTP/2 instead, from its first byte on.
async fn http1(
    connection: &Rc<serve::Connection>,
    stream: Stream,
    phase: &mut watch::Receiver<Phase>,
) -> Option<Stream> {
    let served = Rc::clone(connection);
    let service = service_fn(move |request| serve::serve(Rc::clone(&served), request));
    let mut http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(CONNECTION_BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    let turns = &connection.worker.means.turns;
    // What goes wrong on a connection is the client's to know: it sees it end.
    let draining = tokio::select! {
        biased;
        _ = turns.before_others(Pin::new(&mut http)) => false,
        _ = phase.wait_for(|p| *p == Phase::Draining) => true,
    };
    if draining {
        // The next request may be on its way: it gets a moment, and its answer says that it is the last. To close at once would
        // lose it, and the client could not know whether it was served. The same holds behind an answer that is on its way: its
        // head may not have said so. One that has, hyper ends the connection behind by itself.
        connection.last.set(true);
        connection.idle_since.set(std::time::Instant::now());
        loop {
            let idle = connection.idle_for();
            if idle.is_some_and(|idle| idle >= ONE_MORE_WITHIN) {
                Pin::new(&mut http).graceful_shutdown();
                let _ = turns.before_others(Pin::new(&mut http)).await;
                break;
            }
            let within = ONE_MORE_WITHIN.saturating_sub(idle.unwrap_or_default());
            if timeout(within, turns.before_others(Pin::new(&mut http))).await.is_ok() {
                break;
            }
        }
    }
    let mut stream = http.into_parts().io.into_inner();
    stream.begins_anew().then_some(stream)
}

/// Serves HTTP/2: until the client ends it, or nobody has asked for anything in a while, or the worker drains. Then it says
/// so, and what was asked for by then is answered.
async fn http2(connection: Rc<serve::Connection>, mut stream: Stream, phase: &mut watch::Receiver<Phase>) {
    stream.talks();
    let streams = Streams(Rc::new(Load {
        worker: Rc::clone(&connection.worker),
        streams: Cell::new(0),
        since: Cell::new(Instant::now()),
        next: RefCell::default(),
    }));
    let (of, load) = (Rc::clone(&connection), Rc::clone(&streams.0));
    let service = service_fn(move |request| {
        let stream = Rc::new(of.stream((Instant::now() + UNREAD_FOR).into_std()));
        load.next.replace(Some(Rc::clone(&stream)));
        let is_head = request.method() == Method::HEAD;
        let served = serve::serve(stream, request);
        async move { served.await.map(|answer| without_forbidden_body(answer, is_head)) }
    });
    let http = http2::Builder::new(streams.clone())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST)
        .max_pending_accept_reset_streams(RESET_UNSEEN)
        .max_local_error_reset_streams(RESET_FOR_ERRORS)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WITHIN)
        .serve_connection(TokioIo::new(stream), service);
    let turns = &connection.worker.means.turns;
    let mut http = pin!(http);
    let is_fresh = || connection.fresh.borrow().is_some();
    let draining = tokio::select! {
        biased;
        _ = turns.before_others(http.as_mut()) => return,
        _ = phase.wait_for(|p| *p == Phase::Draining) => true,
        () = streams.0.none_for(HEAD_WITHIN) => false,
    };
    if draining && is_fresh() {
        // Accepted, and its first request may be on its way.
        if timeout(FIRST_HEAD_WITHIN, turns.before_others(http.as_mut())).await.is_ok() {
            return;
        }
    }
    // It says that it goes and still takes whatever is on its way; which stream was the last it says when the client has answered a
    // ping, so a round trip later, and then it ends (RFC 9113, section 6.8). To end before that would lose a request that the client
    // sent before it knew.
    http.as_mut().graceful_shutdown();
    if is_fresh() {
        // Of one that has not asked for anything there may be no answer to the ping either: it has as long as one in HTTP/1.1.
        let ended = timeout(ONE_MORE_WITHIN, turns.before_others(http.as_mut())).await.is_ok();
        if ended || is_fresh() {
            return;
        }
    }
    // One that gives no answer has the time that any has to read its last one.
    streams.0.since.set(Instant::now());
    tokio::select! {
        biased;
        _ = turns.before_others(http) => {}
        () = streams.0.none_for(UNREAD_FOR) => {}
    }
}

/// The answer, without a body where there must be none. In HTTP/1.1 hyper sees to that, in HTTP/2 it does not.
fn without_forbidden_body(mut answer: serve::Answer, is_head: bool) -> serve::Answer {
    let status = answer.status();
    if status == StatusCode::NO_CONTENT {
        answer.headers_mut().remove(header::CONTENT_LENGTH);
    }
    if is_head || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status) {
        return answer.map(|_| Either::Left(Full::default()));
    }
    answer
}

/// What an HTTP/2 connection has open.
struct Load {
    worker: Rc<Worker>,
    streams: Cell<usize>,
    /// When the last stream ended.
    since: Cell<Instant>,
    /// The one whose task is about to be started: hyper asks for its answer and starts its task in one go.
    next: RefCell<Option<Rc<serve::Connection>>>,
}

impl Load {
    /// Waits until there has been no stream for so long.
    async fn none_for(&self, time: Duration) {
        loop {
            let now = Instant::now();
            let at = if self.streams.get() > 0 { now + time } else { self.since.get() + time };
            if at <= now {
                return;
            }
            sleep_until(at).await;
        }
    }
}

/// Starts the tasks of an HTTP/2 connection's streams.
#[derive(Clone)]
struct Streams(Rc<Load>);

impl<F: Future + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, work: F) {
        let load = Rc::clone(&self.0);
        let Some(stream) = load.next.take() else { return };
        load.streams.set(load.streams.get() + 1);
        let counted = Counted(load);
        tokio::task::spawn_local(async move {
            let turns = &counted.0.worker.means.turns;
            let end = |stream: &serve::Connection| {
                stream.until.get().map_or_else(Instant::now, Instant::from_std) + AFTER_DEADLINE
            };
            let mut work = pin!(work);
            let mut late = pin!(sleep_until(end(&stream)));
            // Dropped, it resets the stream: hyper looks at an answer's deadline only while the client has room for more.
            poll_fn(|cx| {
                turns.something_was_done();
                if work.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                // Known as soon as the request is routed.
                let end = end(&stream);
                if late.deadline() != end {
                    late.as_mut().reset(end);
                }
                late.as_mut().poll(cx)
            })
            .await;
        });
    }
}

/// One of the open streams.
struct Counted(Rc<Load>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.since.set(Instant::now());
    }
}

/// A connection's bytes.
struct Stream {
    transport: Transport,
    first: First,
}

enum Transport {
    Plain(Lingering),
    Secured(Box<TlsStream<Lingering>>),
}

/// What is known of a connection's first bytes.
enum First {
    /// So many have come, and they are the preface's.
    Unknown(usize),
    /// They are no preface, or nobody asks.
    Known,
    /// The preface, and what came with it. Nothing is read or written any more.
    Preface(Vec<u8>),
    /// The same, of which so much has been read again.
    Again(Vec<u8>, usize),
}

impl Stream {
    fn plain(stream: Lingering) -> Self {
        Self { transport: Transport::Plain(stream), first: First::Unknown(0) }
    }

    fn secured(stream: TlsStream<Lingering>) -> Self {
        Self { transport: Transport::Secured(Box::new(stream)), first: First::Known }
    }

    /// From here on the client may send something after its last request.
    fn talks(&mut self) {
        match &mut self.transport {
            Transport::Plain(stream) => stream.talks(),
            Transport::Secured(stream) => stream.get_mut().0.talks(),
        }
    }

    /// Whether HTTP/2 was asked for; then reading begins at the first byte again.
    fn begins_anew(&mut self) -> bool {
        match std::mem::replace(&mut self.first, First::Known) {
            First::Preface(bytes) => {
                self.first = First::Again(bytes, 0);
                true
            }
            _ => false,
        }
    }

    /// Reads while all that has come so far could be the preface.
    fn read_first(&mut self, mut came: usize, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let start = buf.filled().len();
        loop {
            if buf.remaining() <= PREFACE.len() {
                // No reader has so little room.
                self.first = First::Known;
                return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
            }
            buf.put_slice(&PREFACE[..came]);
            let read = self.transport.poll_read(cx, buf);
            let seen = &buf.filled()[start..];
            let alike = seen.len().min(PREFACE.len());
            match read {
                Poll::Pending => {
                    buf.set_filled(start);
                    return Poll::Pending;
                }
                Poll::Ready(Ok(())) if seen.len() > came && seen[..alike] == PREFACE[..alike] => {
                    if alike == PREFACE.len() {
                        self.first = First::Preface(seen.to_vec());
                        buf.set_filled(start);
                        return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
                    }
                    came = alike;
                    self.first = First::Unknown(came);
                    buf.set_filled(start);
                }
                // Anything else, an end or an error.
                other @ Poll::Ready(_) => {
                    self.first = First::Known;
                    return other;
                }
            }
        }
    }
}

impl Transport {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Secured(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match &mut this.first {
            First::Known => this.transport.poll_read(cx, buf),
            First::Unknown(came) => {
                let came = *came;
                this.read_first(came, cx, buf)
            }
            First::Preface(_) => Poll::Ready(Err(io::ErrorKind::Unsupported.into())),
            First::Again(bytes, read) => {
                let rest = &bytes[*read..];
                let piece = &rest[..rest.len().min(buf.remaining())];
                buf.put_slice(piece);
                *read += piece.len();
                if *read == bytes.len() {
                    this.first = First::Known;
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Secured(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        all: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, all),
            Transport::Secured(stream) => Pin::new(stream).poll_write_vectored(cx, all),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Secured(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Secured(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if matches!(self.first, First::Preface(_)) {
            // The end of HTTP/1.1 here is not the end of the connection.
            return Poll::Ready(Ok(()));
        }
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            // TLS would say that this is the proper end.
            Transport::Secured(stream) if stream.get_ref().0.is_broken() => Poll::Ready(Ok(())),
            Transport::Secured(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// What a reader gets of bytes that come in these pieces, and whether HTTP/2 was found.
    async fn read(pieces: Vec<Vec<u8>>) -> (Vec<u8>, bool) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.set_nodelay(true).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = Stream::plain(Lingering::new(stream, Rc::default()));
        let sent = async move {
            for piece in pieces {
                client.write_all(&piece).await.unwrap();
                // So that they come one by one, mostly.
                tokio::task::yield_now().await;
            }
        };
        let read = async {
            let (mut all, mut found) = (Vec::new(), false);
            loop {
                match stream.read_buf(&mut all).await {
                    Ok(0) => return (all, found),
                    Ok(_) => {}
                    Err(e) => {
                        assert_eq!(e.kind(), io::ErrorKind::Unsupported);
                        assert!(all.is_empty(), "nothing was given away before it was known");
                        stream.shutdown().await.unwrap();
                        found = stream.begins_anew();
                        assert!(found);
                    }
                }
            }
        };
        let ((), read) = tokio::join!(sent, read);
        read
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the pieces: nothing is lost, and what begins with the preface is HTTP/2.
        #[test]
        fn every_byte_is_read_and_the_preface_is_seen(
            begin in 0..=PREFACE.len(),
            rest in proptest::collection::vec(any::<u8>(), 0..40),
            cuts in proptest::collection::vec(1..20_usize, 0..8),
        ) {
            let whole = [&PREFACE[..begin], &rest].concat();
            let (mut pieces, mut left) = (Vec::new(), whole.as_slice());
            for cut in cuts {
                let (piece, after) = left.split_at(cut.min(left.len()));
                pieces.push(piece.to_vec());
                left = after;
            }
            pieces.push(left.to_vec());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (read, found) = runtime.block_on(read(pieces));
            prop_assert_eq!(&read, &whole);
            prop_assert_eq!(found, whole.starts_with(PREFACE));
        }
    }

    #[tokio::test]
    async fn http_1_is_read_as_it_comes() {
        for head in ["GET / HTTP/1.1\r\n\r\n", "PROPFIND / HTTP/1.1\r\n\r\n", "PRI * HTTP/1.1\r\n\r\n", "P"] {
            assert_eq!(read(vec![head.into()]).await, (head.as_bytes().to_vec(), false));
        }
    }
}
