//! Sends a guest's request to a site that its brane may speak to, and gives back the answer as it arrives.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use gaia_manifest::{Scheme, Site};
use http::{Method, Request, Response, StatusCode};
use http_body::Body;
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::address;
use crate::body::{Incoming, Outgoing};
use crate::error::Error;
use crate::head::{self, Head};
use crate::pool::{Keep, Lease, Permit, Pool, STREAMS, Sender, Single, Tasks};
use crate::resolve::{self, MAX_ADDRESSES, Resolve};
use crate::site::{self, Denied, Origin, Peer};
use crate::stream::Stream;

/// The largest head of an answer, in bytes: twice what servers accept of a client.
const MAX_HEAD: usize = 32 * 1024;
/// Fields in an answer's head.
const MAX_FIELDS: usize = 128;
/// What HTTP/1.1 holds of an answer that nobody reads, in bytes.
const BUFFER: usize = 64 * 1024;
/// What HTTP/2 holds of an answer that nobody reads, in bytes: enough for 13 MB/s at 10 ms, 2.6 MB/s at 50 ms.
const WINDOW: u32 = 128 * 1024;
/// What HTTP/2 holds of all of a connection's answers.
#[expect(clippy::cast_possible_truncation, reason = "eight")]
const ALL_WINDOWS: u32 = WINDOW * STREAMS as u32;
/// What HTTP/2 holds of a request's body that the server does not take yet, in bytes.
const SEND_BUFFER: usize = 64 * 1024;
/// A kept connection that has not settled within this after its last exchange is not used.
const SETTLED_WITHIN: Duration = Duration::from_millis(100);
/// How long an address that says nothing has before the next is tried: time for one repetition (RFC 6298).
const NEXT_AFTER: Duration = Duration::from_secs(2);
/// TLS sessions a brane can take up again.
const SESSIONS: usize = 32;
/// Kept connections are not looked at more often.
const SHORTEST: Duration = Duration::from_millis(10);
/// No wait is longer, whatever a guest asks for.
const LONGEST: Duration = Duration::from_hours(24);

/// How long the steps of an exchange may take: `wasi:http`'s `request-options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Resolving, connecting and TLS, together.
    pub connect: Duration,
    /// From sending the request to the head of the answer.
    pub first_byte: Duration,
    /// Between two pieces of the answer's body.
    pub between_bytes: Duration,
}

impl Default for Timeouts {
    /// Ten seconds to connect, a minute for the rest. A brane's deadline is usually shorter.
    fn default() -> Self {
        let minute = Duration::from_mins(1);
        Self { connect: Duration::from_secs(10), first_byte: minute, between_bytes: minute }
    }
}

/// What a brane may have open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Connections of the brane at a time, kept ones too. One more is [`Error::ConnectionLimit`].
    pub connections: usize,
    /// Connections that are kept for the brane's next request; those that HTTP/2 shares count always.
    pub kept: usize,
    /// How long one is kept.
    pub kept_for: Duration,
    /// How long a server may leave a request's bytes unread.
    pub stall: Duration,
}

impl Default for Bounds {
    /// 64 connections, 16 of them kept, for half a minute; half a minute without progress. A connection holds at most
    /// about 250 KiB under HTTP/1.1, TLS' buffers included, and 1.6 MiB under HTTP/2, with eight answers unread and eight
    /// requests stuck.
    fn default() -> Self {
        let half_a_minute = Duration::from_secs(30);
        Self { connections: 64, kept: 16, kept_for: half_a_minute, stall: half_a_minute }
    }
}

/// A certificate that was configured cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RootsError {
    /// The text is not PEM.
    #[error("certificate {0}: not PEM: {1}")]
    Pem(usize, String),
    /// There is no certificate in it.
    #[error("no certificate: the text has no line \"-----BEGIN CERTIFICATE-----\"")]
    Empty,
    /// One is no authority's certificate.
    #[error("certificate {0}: {1}")]
    Certificate(usize, String),
}

/// The authorities of webpki-roots (Mozilla's list), and those in `extra`, in PEM, which may be empty.
///
/// # Errors
/// With the number of the certificate, counted from one.
pub fn roots(extra: &str) -> Result<RootCertStore, RootsError> {
    let mut store = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let mut count = 0;
    for certificate in CertificateDer::pem_slice_iter(extra.as_bytes()) {
        count += 1;
        let certificate = certificate.map_err(|e| RootsError::Pem(count, e.to_string()))?;
        store.add(certificate).map_err(|e| RootsError::Certificate(count, e.to_string()))?;
    }
    if count == 0 && !extra.trim().is_empty() {
        return Err(RootsError::Empty);
    }
    Ok(store)
}

/// What the branes of a worker have in common: who resolves names, who is trusted, how much there is of all.
pub struct Shared {
    resolver: Arc<dyn Resolve>,
    tls: ClientConfig,
    kept: Arc<AtomicUsize>,
    most_kept: usize,
    connections: Arc<Semaphore>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("kept", &self.kept)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// For a worker that may have so many connections to the outside at a time, and keep so many of them for branes'
    /// next requests.
    ///
    /// # Errors
    /// If TLS has no version to speak, which is a fault of the build.
    pub fn new(
        resolver: Arc<dyn Resolve>,
        roots: RootCertStore,
        connections: usize,
        kept: usize,
    ) -> Result<Arc<Self>, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|e| Error::TlsProtocol(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let connections = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
        Ok(Arc::new(Self { resolver, tls, kept: Arc::default(), most_kept: kept, connections }))
    }

    /// The same connections, trust and bounds, but names are resolved by another: by a brane's own share of the look-ups.
    #[must_use]
    pub fn resolving(&self, resolver: Arc<dyn Resolve>) -> Arc<Self> {
        Arc::new(Self {
            resolver,
            tls: self.tls.clone(),
            kept: Arc::clone(&self.kept),
            most_kept: self.most_kept,
            connections: Arc::clone(&self.connections),
        })
    }
}

/// `net.http` of one brane: its allowlist and its connections, which no other brane ever uses. Dropping it closes the
/// idle ones; exchanges that are under way end by themselves.
#[derive(Debug)]
pub struct Egress {
    brane: Arc<Brane>,
}

pub(crate) struct Brane {
    shared: Arc<Shared>,
    sites: Vec<Site>,
    tls: TlsConnector,
    connections: Arc<Semaphore>,
    pub(crate) bounds: Bounds,
    pool: Mutex<Pool>,
}

impl fmt::Debug for Brane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Brane").field("sites", &self.sites).field("kept", &self.pool().len()).finish_non_exhaustive()
    }
}

/// A connection to send one request on, and whether it was opened for that.
struct Connection {
    sender: Sender,
    fresh: bool,
}

impl Egress {
    /// For a brane that may speak to these sites.
    #[must_use]
    pub fn new(shared: &Arc<Shared>, sites: Vec<Site>, mut bounds: Bounds) -> Self {
        bounds.connections = bounds.connections.min(Semaphore::MAX_PERMITS);
        bounds.stall = bounds.stall.min(LONGEST);
        let mut tls = shared.tls.clone();
        // A session ticket is as good as a connection for telling who somebody is: each brane has its own.
        tls.resumption = Resumption::in_memory_sessions(SESSIONS);
        let keep =
            Keep { brane: bounds.kept, worker: shared.most_kept, within: bounds.kept_for.clamp(SHORTEST, LONGEST) };
        let brane = Brane {
            shared: Arc::clone(shared),
            sites,
            tls: TlsConnector::from(Arc::new(tls)),
            connections: Arc::new(Semaphore::new(bounds.connections)),
            bounds,
            pool: Mutex::new(Pool::new(keep, Arc::clone(&shared.kept))),
        };
        Self { brane: Arc::new(brane) }
    }

    /// Sends a request and waits for the head of its answer.
    ///
    /// The address is checked against the allowlist on each call. The guest's `Host`, hop-by-hop fields, `Expect` and
    /// proxies' fields are dropped; `Content-Length` is enforced. Redirects are answers like others. Dropping the
    /// future ends the exchange. Must be called inside a tokio runtime, with I/O and time.
    ///
    /// # Errors
    /// [`Error`]. A request is sent again only if it is certain that no byte of it had been, on a kept connection that
    /// had closed meanwhile.
    pub fn send<B>(
        &self,
        request: Request<B>,
        timeouts: Timeouts,
    ) -> impl Future<Output = Result<Response<Incoming>, Error>> + Send + use<B>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: fmt::Display,
    {
        let brane = Arc::clone(&self.brane);
        async move { brane.send(request, timeouts).await }
    }

    /// Connections that are open at the moment, kept ones too.
    #[must_use]
    pub fn open(&self) -> usize {
        self.brane.bounds.connections - self.brane.connections.available_permits()
    }

    /// Connections that are kept at the moment.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.brane.pool().len()
    }
}

impl Brane {
    pub(crate) fn pool(&self) -> MutexGuard<'_, Pool> {
        // Nothing panics while it is held, and its content is whole between any two statements.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that what is kept goes when it is old.
    pub(crate) fn sweep_later(self: &Arc<Self>) {
        let mut pool = self.pool();
        if pool.swept {
            return;
        }
        let Some(mut due) = pool.sweep(Instant::now()) else { return };
        pool.swept = true;
        let brane = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep_until(due).await;
                let Some(brane) = brane.upgrade() else { return };
                let mut pool = brane.pool();
                match pool.sweep(Instant::now()) {
                    Some(next) => due = next,
                    None => {
                        pool.swept = false;
                        return;
                    }
                }
            }
        });
    }

    async fn send<B>(self: Arc<Self>, request: Request<B>, timeouts: Timeouts) -> Result<Response<Incoming>, Error>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: fmt::Display,
    {
        let (parts, body) = request.into_parts();
        let origin = Origin::of(&parts.uri)?;
        site::entry(&self.sites, &origin)?;
        let head = Head::of(parts)?;
        let mut body = Outgoing::new(body, head.length)?;
        // hyper would drop such a body of these two methods, and HTTP/1.1 cannot say later that there is one.
        let may_be_empty = body.is_open() && matches!(head.method, Method::GET | Method::HEAD);
        let chunked = may_be_empty && body.begins().await?;
        if may_be_empty && !chunked {
            body = Outgoing::new(http_body_util::Empty::new(), None)?;
        }
        loop {
            let connecting = timeout(timeouts.connect.min(LONGEST), self.connection(&origin));
            let Connection { sender, fresh } = connecting.await.map_err(|_| Error::ConnectTimeout)??;
            let sending = self.exchange(&head, &origin, chunked, body, sender, timeouts);
            match sending.await {
                Ok(response) => return Ok(response),
                Err((_, Some(unsent))) if !fresh => body = unsent,
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// Sends on one connection; the body comes back if nothing was sent.
    async fn exchange(
        self: &Arc<Self>,
        head: &Head,
        origin: &Origin,
        chunked: bool,
        body: Outgoing,
        sender: Sender,
        timeouts: Timeouts,
    ) -> Result<Response<Incoming>, (Error, Option<Outgoing>)> {
        let first_byte = timeouts.first_byte.min(LONGEST);
        let fate = body.fate();
        let (answer, lease) = match sender {
            Sender::Http1(mut single) => {
                let request = head.http1(origin, chunked, body).map_err(|e| (e, None))?;
                let answer = timeout(first_byte, single.sender.try_send_request(request)).await;
                let (brane, origin, fate) = (Arc::downgrade(self), origin.clone(), fate.clone());
                (answer, Lease::Http1 { brane, origin, single, fate })
            }
            Sender::Http2(mut stream) => {
                let request = head.http2(origin, body).map_err(|e| (e, None))?;
                let answer = timeout(first_byte, stream.sender.try_send_request(request)).await;
                (answer, Lease::Http2 { brane: Arc::downgrade(self), stream, fate: fate.clone() })
            }
        };
        let response = match answer {
            Ok(Ok(response)) => response,
            Ok(Err(mut error)) => {
                lease.give_up();
                let unsent = error.take_message().map(Request::into_body);
                let error = fate.error().unwrap_or_else(|| Error::http(&error.into_error(), false));
                return Err((error, unsent));
            }
            Err(_) => {
                lease.give_up();
                return Err((Error::FirstByteTimeout, None));
            }
        };
        let (mut parts, body) = response.into_parts();
        if parts.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err((Error::Upgrade, None));
        }
        head::strip(&mut parts);
        let body = Incoming::new(body, timeouts.between_bytes.min(LONGEST), lease);
        Ok(Response::from_parts(parts, body))
    }

    /// A kept connection, or a fresh one.
    async fn connection(self: &Arc<Self>, origin: &Origin) -> Result<Connection, Error> {
        loop {
            let kept = self.pool().take(origin);
            match kept {
                None => return Ok(Connection { sender: self.dial(origin).await?, fresh: true }),
                Some(Sender::Http1(mut single)) => {
                    if matches!(timeout(SETTLED_WITHIN, single.sender.ready()).await, Ok(Ok(()))) {
                        return Ok(Connection { sender: Sender::Http1(single), fresh: false });
                    }
                }
                Some(Sender::Http2(mut stream)) => match stream.sender.ready().await {
                    Ok(()) => return Ok(Connection { sender: Sender::Http2(stream), fresh: false }),
                    Err(_) => self.pool().forget(stream.id),
                },
            }
        }
    }

    /// Resolves once, and connects to one of the addresses that were found and may be used.
    async fn dial(self: &Arc<Self>, origin: &Origin) -> Result<Sender, Error> {
        let (life, tasks) = Tasks::new(self.permit().await?);
        let stream = connect(&self.addresses(origin).await?).await?;
        let stream = match origin.scheme() {
            Scheme::Http => Stream::clear(stream, self.bounds.stall),
            Scheme::Https => {
                let name = match origin.host() {
                    Peer::Name(name) => ServerName::try_from(name.clone())
                        .map_err(|_| Error::TlsCertificate(format!("{name} is no name of a certificate")))?,
                    Peer::Address(address) => ServerName::from(*address),
                };
                Stream::tls(self.tls.connect(name, stream).await.map_err(|e| Error::tls(&e))?, self.bounds.stall)
            }
        };
        let http2 = stream.is_http2();
        let io = TokioIo::new(stream);
        if !http2 {
            let (sender, connection) = http1::Builder::new()
                .max_buf_size(BUFFER)
                .max_header_size(MAX_HEAD)
                .max_headers(MAX_FIELDS)
                .handshake(io)
                .await
                .map_err(|e| Error::http(&e, false))?;
            tasks.execute(connection);
            return Ok(Sender::Http1(Single { sender, opened: Instant::now(), _life: life }));
        }
        let (sender, connection) = http2::Builder::new(tasks.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(ALL_WINDOWS)
            .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
            .max_send_buf_size(SEND_BUFFER)
            .handshake(io)
            .await
            .map_err(|e| Error::http(&e, false))?;
        tasks.execute(connection);
        let stream = self.pool().share(origin, sender, life).ok_or(Error::ConnectionLimit)?;
        self.sweep_later();
        Ok(Sender::Http2(stream))
    }

    /// A place for one more connection. If there is none, an idle connection of this brane makes way.
    async fn permit(&self) -> Result<Permit, Error> {
        let brane = self.place(&self.connections).await?;
        Ok(Permit { _brane: brane, _worker: self.place(&self.shared.connections).await? })
    }

    async fn place(&self, places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Error> {
        if let Ok(place) = Arc::clone(places).try_acquire_owned() {
            return Ok(place);
        }
        if !self.pool().evict() {
            return Err(Error::ConnectionLimit);
        }
        // Its task closes it next.
        Arc::clone(places).acquire_owned().await.map_err(|_| Error::ConnectionLimit)
    }

    /// Where an origin may be reached. An address in the request itself is covered by an entry that is that address,
    /// or the request would not have come here. An address that a name stands for is used if it is not refused, or if
    /// the allowlist also has it literally, for this scheme and port.
    async fn addresses(&self, origin: &Origin) -> Result<Vec<SocketAddr>, Error> {
        let name = match origin.host() {
            Peer::Address(address) => return Ok(vec![SocketAddr::new(*address, origin.port())]),
            Peer::Name(name) => name,
        };
        let mut denied = None;
        let mut addresses = Vec::new();
        for address in self.shared.resolver.resolve(name).await?.into_iter().take(MAX_ADDRESSES) {
            let listed = |site: &Site| site.covers(origin.scheme(), &Peer::Address(address).listed(), origin.port());
            match address::refused(address) {
                Some(reason) if !self.sites.iter().any(listed) => {
                    denied.get_or_insert(Denied::Address { host: name.clone(), address, reason });
                }
                _ => addresses.push(SocketAddr::new(address, origin.port())),
            }
        }
        match denied {
            _ if !addresses.is_empty() => Ok(addresses),
            Some(denied) => Err(denied.into()),
            None => Err(resolve::Error::NotFound.into()),
        }
    }
}

/// Tries one address after the other. The time in which all must be done is the caller's.
async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, Error> {
    let mut last = Error::Connect(io::ErrorKind::AddrNotAvailable);
    for (i, address) in addresses.iter().enumerate() {
        let connecting = TcpStream::connect(*address);
        let connected = if i + 1 == addresses.len() {
            connecting.await
        } else {
            timeout(NEXT_AFTER, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        };
        match connected {
            Ok(stream) => {
                // Requests are written whole; what is left over must not wait for an acknowledgement.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Err(error) => last = Error::Connect(error.kind()),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests;
