//! The API over the network: TLS 1.3 in which both sides show raw ed25519 keys (RFC 7250). Who does not have a listed key does
//! not come past the handshake.
//!
//! ```text
//! socket ─▶ paced accept ─▶ handshake: a place among few, five seconds ─▶ conversation: a place, a pace ─▶ api
//!                             └─ oldest gives way to the newest            └─ 429, 503
//! ```
//!
//! Nothing here grows with how often somebody tries: the kernel's queue, the handshakes, the conversations and the lines about
//! refusals each have their bound. The workers that serve branes are other processes and know nothing of it.

use std::cell::{Cell, RefCell};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use gaia_init::key::PublicKey;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::caller::Caller;
use super::{Control, api};
use crate::key::{self, Key};
use crate::worker::linger::Lingering;

/// A handshake must be over within this, a refusal included.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// How long who was refused may take to read why.
const LINGER: Duration = Duration::from_secs(1);
/// Handshakes at a time.
const HANDSHAKES: usize = 64;
/// And from one network: an address, or 64 bits of one of IPv6.
const HANDSHAKES_OF_ONE: usize = 16;
/// Connections that are accepted at once, and each second from then on. A handshake costs control about a fifth of a
/// millisecond, which may be a worker's core.
const ARRIVALS: (u32, u32) = (64, 100);
/// Conversations at a time, of all operators.
const CONVERSATIONS: usize = 64;
/// And of one.
const CONVERSATIONS_OF_ONE: usize = 8;
/// Requests of one operator at once, and each second from then on.
const REQUESTS: (u32, u32) = (100, 50);
/// Lines about refusals at once, and each second from then on.
const REFUSALS: (u32, u32) = (20, 1);
/// When it is said how many refusals had no line.
const SUM_AFTER: Duration = Duration::from_secs(10);

/// So much at once, so much each second from then on.
#[derive(Debug)]
pub(super) struct Pace {
    most: f64,
    each_second: f64,
    left: f64,
    at: Instant,
}

impl Pace {
    pub(super) fn new((most, each_second): (u32, u32), now: Instant) -> Self {
        Self { most: most.into(), each_second: each_second.into(), left: most.into(), at: now }
    }

    /// Takes one, or says how long it is until there is one.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * self.each_second).min(self.most);
        self.at = self.at.max(now);
        if self.left >= 1.0 {
            self.left -= 1.0;
            return Ok(());
        }
        // Never nothing, however little is missing.
        Err(Duration::from_secs_f64((1.0 - self.left) / self.each_second).max(Duration::from_nanos(1)))
    }
}

/// What was refused and not told yet.
#[derive(Debug)]
pub(super) struct Refusals {
    pace: Pace,
    untold: u64,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { pace: Pace::new(REFUSALS, Instant::now()), untold: 0 }
    }
}

impl Control {
    /// Leaves a line about a refusal in the log and on the console, unless there were many just now: then they are counted.
    pub(super) async fn refused(self: &Rc<Self>, what: &str) {
        let told = {
            let mut refusals = self.refusals.borrow_mut();
            let told = refusals.pace.take(Instant::now()).is_ok();
            refusals.untold += u64::from(!told);
            if !told && refusals.untold == 1 {
                tokio::task::spawn_local(Rc::clone(self).sum_up_refusals());
            }
            told
        };
        if told {
            let line = format!("refused {what}");
            self.note(&line);
            self.say(&line).await;
        }
    }

    async fn sum_up_refusals(self: Rc<Self>) {
        tokio::time::sleep(SUM_AFTER).await;
        let untold = std::mem::take(&mut self.refusals.borrow_mut().untold);
        let line = format!("refused {untold} more in {} s", SUM_AFTER.as_secs());
        self.note(&line);
        self.say(&line).await;
    }
}

/// The operators that the supervisor names: `name=key`, parted by spaces. What is neither is passed over: whoever wrote it was
/// told.
#[must_use]
pub fn operators_of(variable: &str) -> Vec<(String, PublicKey)> {
    let one = |word: &str| {
        let (name, key) = word.split_once('=')?;
        Some((name.to_owned(), key.parse().ok()?))
    };
    variable.split(' ').filter_map(one).collect()
}

/// One who may operate.
#[derive(Debug)]
struct Operator {
    name: String,
    key: PublicKey,
    requests: RefCell<Pace>,
    /// Conversations that are open.
    open: Cell<usize>,
}

/// An operator's conversation: it has a place while this is there.
#[derive(Debug)]
pub(super) struct Visit {
    operator: Rc<Operator>,
    all: Rc<Cell<usize>>,
    /// There was no place for it.
    over: Option<String>,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.operator.open.set(self.operator.open.get() - 1);
        self.all.set(self.all.get() - 1);
    }
}

impl Visit {
    fn new(operator: &Rc<Operator>, all: &Rc<Cell<usize>>) -> Self {
        operator.open.set(operator.open.get() + 1);
        all.set(all.get() + 1);
        let over = if operator.open.get() > CONVERSATIONS_OF_ONE {
            Some(format!("{} has {CONVERSATIONS_OF_ONE} conversations already", operator.name))
        } else {
            (all.get() > CONVERSATIONS).then(|| format!("there are {CONVERSATIONS} conversations already"))
        };
        Self { operator: Rc::clone(operator), all: Rc::clone(all), over }
    }

    /// Why a request cannot be taken just now.
    pub(super) fn too_much(&self) -> Option<String> {
        let faster = |_| format!("more than {} requests a second", REQUESTS.1);
        self.over.clone().or_else(|| self.operator.requests.borrow_mut().take(Instant::now()).err().map(faster))
    }
}

/// A handshake that goes on. Who drops it ends it.
#[derive(Debug)]
struct Handshake {
    number: u64,
    network: IpAddr,
    _goes_on: oneshot::Sender<()>,
}

/// Why somebody did not come in.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("no handshake within {} s", HANDSHAKE_WITHIN.as_secs())]
    Slow,
    #[error("its handshake gave way to newer ones")]
    GaveWay,
    #[error("it went away during the handshake")]
    Left,
    #[error("key {0} is not an operator's")]
    Stranger(PublicKey),
    #[error("it does not have the key {0} that it shows: {1}")]
    Impostor(PublicKey, String),
    #[error("no TLS 1.3 with a raw key: {0}")]
    NoHandshake(String),
}

/// The door for operators.
#[derive(Debug)]
pub(super) struct Remote {
    shown: Arc<CertifiedKey>,
    operators: Vec<Rc<Operator>>,
    listed: Arc<[PublicKey]>,
    /// The oldest first.
    handshakes: RefCell<Vec<Handshake>>,
    numbers: Cell<u64>,
    arrivals: RefCell<Pace>,
    conversations: Rc<Cell<usize>>,
}

impl Remote {
    pub(super) fn new(key: &Key, operators: Vec<(String, PublicKey)>) -> Result<Self, rustls::Error> {
        let now = Instant::now();
        let operator = |(name, key)| {
            Rc::new(Operator { name, key, requests: RefCell::new(Pace::new(REQUESTS, now)), open: Cell::default() })
        };
        let operators: Vec<_> = operators.into_iter().map(operator).collect();
        Ok(Self {
            shown: key.shown()?,
            listed: operators.iter().map(|operator| operator.key).collect(),
            operators,
            handshakes: RefCell::default(),
            numbers: Cell::default(),
            arrivals: RefCell::new(Pace::new(ARRIVALS, now)),
            conversations: Rc::default(),
        })
    }

    /// Takes a place for a handshake; the oldest of the same network, or of all, gives way if there is none.
    fn begin(&self, from: IpAddr) -> (u64, oneshot::Receiver<()>) {
        let network = network(from);
        let number = self.numbers.replace(self.numbers.get() + 1);
        let (goes_on, ended) = oneshot::channel();
        let mut all = self.handshakes.borrow_mut();
        let oldest_there = all.iter().position(|handshake| handshake.network == network);
        let there = all.iter().filter(|handshake| handshake.network == network).count();
        if there >= HANDSHAKES_OF_ONE
            && let Some(at) = oldest_there
        {
            all.remove(at);
        } else if all.len() >= HANDSHAKES {
            all.remove(0);
        }
        all.push(Handshake { number, network, _goes_on: goes_on });
        (number, ended)
    }

    fn end(&self, number: u64) {
        self.handshakes.borrow_mut().retain(|handshake| handshake.number != number);
    }

    /// TLS for one connection: what it shows is remembered there, also if it is refused.
    fn config(&self, claimed: Arc<OnceLock<PublicKey>>) -> Result<ServerConfig, rustls::Error> {
        let verifier = Arc::new(Listed { listed: Arc::clone(&self.listed), claimed });
        let resolver = Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::clone(&self.shown)));
        let mut config = ServerConfig::builder_with_provider(key::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![key::ALPN.to_vec()];
        // No session is taken up again, and nothing is taken before the handshake is over: nothing can be played again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    async fn handshake(&self, stream: TcpStream) -> Result<(TlsStream<Lingering>, Rc<Operator>), Refused> {
        let claimed = Arc::new(OnceLock::new());
        let config = self.config(Arc::clone(&claimed)).map_err(|e| Refused::NoHandshake(e.to_string()))?;
        let stream = Lingering::new(stream, Rc::default());
        let accepted = TlsAcceptor::from(Arc::new(config)).accept(stream).into_fallible().await;
        let claimed = claimed.get().copied();
        let operator = claimed.and_then(|key| self.operators.iter().find(|operator| operator.key == key));
        match (accepted, claimed, operator) {
            (Ok(stream), _, Some(operator)) => Ok((stream, Rc::clone(operator))),
            // Its alert is out. If this end closed with something unread, a reset would overtake it.
            (Err((error, mut stream)), claimed, operator) => {
                let _ = timeout(LINGER, async {
                    stream.shutdown().await?;
                    tokio::io::copy(&mut stream.take(64 * 1024), &mut tokio::io::sink()).await
                })
                .await;
                Err(match (claimed, operator) {
                    (Some(key), None) => Refused::Stranger(key),
                    (Some(key), Some(_)) => Refused::Impostor(key, error.to_string()),
                    // As one does who only looks at this appliance's key.
                    (None, _) if has_left(&error) => Refused::Left,
                    (None, _) => Refused::NoHandshake(error.to_string()),
                })
            }
            (Ok(_), _, None) => Err(Refused::NoHandshake("no key".to_owned())),
        }
    }

    /// A handshake in its place and its time.
    async fn admit(&self, stream: TcpStream, from: IpAddr) -> Result<(TlsStream<Lingering>, Visit), Refused> {
        let (number, ended) = self.begin(from);
        let outcome = tokio::select! {
            biased;
            outcome = timeout(HANDSHAKE_WITHIN, self.handshake(stream)) => outcome.unwrap_or(Err(Refused::Slow)),
            _ = ended => Err(Refused::GaveWay),
        };
        self.end(number);
        outcome.map(|(stream, operator)| (stream, Visit::new(&operator, &self.conversations)))
    }

    /// Waits until the next connection may be accepted.
    async fn paced(&self) {
        loop {
            let taken = self.arrivals.borrow_mut().take(Instant::now());
            match taken {
                Ok(()) => return,
                Err(wait) => tokio::time::sleep(wait).await,
            }
        }
    }
}

/// Serves operators on these sockets until the process ends.
pub(super) async fn serve(control: Rc<Control>, sockets: Vec<(String, OwnedFd)>, operators: Vec<(String, PublicKey)>) {
    let names: Vec<String> = operators.iter().map(|(name, _)| name.clone()).collect();
    let opened = Remote::new(&control.device, operators).map_err(std::io::Error::other).and_then(|remote| {
        let listen = |(_, socket): (String, OwnedFd)| {
            let listener = std::net::TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        Ok((Rc::new(remote), sockets.into_iter().map(listen).collect::<std::io::Result<Vec<_>>>()?))
    });
    let (remote, listeners) = match opened {
        Ok(opened) => opened,
        Err(e) => return control.say(&format!("no operators: {e}")).await,
    };
    let port = listeners.first().and_then(|listener| listener.local_addr().ok()).map_or(0, |at| at.port());
    control.say(&format!("key {}", control.device.public())).await;
    control.say(&format!("answers {} on port {port}", names.join(", "))).await;
    for listener in listeners {
        tokio::task::spawn_local(accept(Rc::clone(&control), Rc::clone(&remote), listener));
    }
}

async fn accept(control: Rc<Control>, remote: Rc<Remote>, listener: TcpListener) {
    loop {
        remote.paced().await;
        match listener.accept().await {
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            Ok((stream, from)) => {
                tokio::task::spawn_local(meet(Rc::clone(&control), Rc::clone(&remote), stream, from));
            }
        }
    }
}

async fn meet(control: Rc<Control>, remote: Rc<Remote>, stream: TcpStream, from: SocketAddr) {
    let (stream, visit) = match remote.admit(stream, from.ip()).await {
        Ok(admitted) => admitted,
        Err(why) => return control.refused(&format!("{}: {why}", from.ip())).await,
    };
    let caller = Rc::new(Caller::Operator { name: visit.operator.name.clone(), from });
    let ended = api::converse(Rc::clone(&control), Rc::clone(&caller), Some(Rc::new(visit)), stream).await;
    if let Err(e) = ended
        && (e.is_parse() || e.is_timeout())
    {
        control.refused(&format!("{caller}: {e}")).await;
    }
}

/// What is counted together: an address, or the 64 bits of one of IPv6 that name a network.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
    }
}

/// Whether it was the other side that ended a handshake.
fn has_left(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|e| e.downcast_ref());
    matches!(inner, Some(rustls::Error::AlertReceived(_)))
        || matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset)
}

/// Takes the keys that are listed, and remembers what was shown.
#[derive(Debug)]
struct Listed {
    listed: Arc<[PublicKey]>,
    claimed: Arc<OnceLock<PublicKey>>,
}

impl ClientCertVerifier for Listed {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let shown = key::of_peer(shown, more)?;
        let _ = self.claimed.set(shown);
        if self.listed.contains(&shown) {
            return Ok(ClientCertVerified::assertion());
        }
        // As an alert: `access_denied`.
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        key::check_signature(message, shown, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        key::SCHEMES.to_vec()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
