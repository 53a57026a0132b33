//! The log on its way to a syslog collector: one connection, over TLS if it is named so, and a place in the history.
//!
//! ```text
//! history ──▶ Follower ──▶ at most one piece of messages ──▶ TCP or TLS ──▶ collector
//!    ▲ nothing waits for it: what it is too slow for is let go, counted, and told to the collector as LOST
//! ```
//!
//! Syslog has no acknowledgement: a piece that was handed to the kernel counts as sent. The piece on whose way the connection broke is
//! sent again on the next one, so a message may come twice; its `seq` tells.

use std::cell::RefCell;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gaia_egress::resolve::Resolve;
use gaia_init::collector::Collector;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::log::{Follower, History, PIECE, Query};
use super::{Control, deploy, report, syslog};

/// How long things may take.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// One address's connection, and its handshake.
    connect: Duration,
    /// Until the collector takes some more.
    write: Duration,
    /// Before the first new attempt; then twice as long each time.
    first_wait: Duration,
    /// And at most so long.
    longest_wait: Duration,
}

const TIMES: Times = Times {
    connect: Duration::from_secs(10),
    write: Duration::from_secs(30),
    first_wait: Duration::from_millis(500),
    longest_wait: Duration::from_mins(1),
};

/// The collector that the supervisor names. What is none is passed over: whoever wrote it was told.
pub(super) fn collector() -> Option<Collector> {
    std::env::var("GAIA_LOG_EXPORT").ok()?.parse().ok()
}

/// Sends the log until the process ends.
pub(super) async fn run(control: Rc<Control>, collector: Collector) {
    *control.exported.borrow_mut() = Some(state(&collector));
    let roots = control.source.as_ref().map(deploy::Source::roots).transpose().map(Option::unwrap_or_default);
    let tls = match roots.and_then(|roots| connector(&collector, &roots)) {
        Ok(tls) => tls,
        Err(e) => {
            let error = format!("{e:#}");
            control.say(&format!("the log does not go to {collector}: {error}")).await;
            change(&control.exported, |seen| seen.error = Some(error));
            return;
        }
    };
    let sender = Sender { collector, tls, names: &*control.names, times: TIMES, seen: &control.exported };
    sender.send_all(&control.log, async |words: String| control.say(&words).await).await;
}

/// Nothing sent yet.
fn state(collector: &Collector) -> report::Export {
    report::Export { to: collector.to_string(), connected: false, sent: 0, missed: 0, error: None }
}

/// What speaks TLS with it, if it is to be spoken: with the authorities of the outgoing requests.
fn connector(collector: &Collector, roots: &str) -> anyhow::Result<Option<TlsConnector>> {
    if !collector.tls {
        return Ok(None);
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_root_certificates(gaia_egress::roots(roots)?)
        .with_no_client_auth();
    Ok(Some(TlsConnector::from(Arc::new(config))))
}

fn change(seen: &RefCell<Option<report::Export>>, how: impl FnOnce(&mut report::Export)) {
    if let Some(seen) = seen.borrow_mut().as_mut() {
        how(seen);
    }
}

/// What a connection goes over.
trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// Messages on their way: whole ones, which are begun anew with each connection.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    messages: u64,
}

struct Sender<'a> {
    collector: Collector,
    tls: Option<TlsConnector>,
    names: &'a dyn Resolve,
    times: Times,
    seen: &'a RefCell<Option<report::Export>>,
}

impl Sender<'_> {
    /// Connects, sends, and connects again, for ever. Says when it begins to go well, and why it does not.
    async fn send_all(&self, history: &History, say: impl AsyncFn(String)) {
        let mut follower = Follower::new(history, Query::default());
        let (mut pending, mut wait, mut said) = (Pending::default(), self.times.first_wait, None);
        loop {
            let error = match self.connect().await {
                Err(error) => error,
                Ok((stream, host)) => {
                    let began = Instant::now();
                    change(self.seen, |seen| (seen.connected, seen.error) = (true, None));
                    say(format!("the log goes to {}", self.collector)).await;
                    let error = self.send(history, &mut follower, &mut pending, stream, &host).await;
                    change(self.seen, |seen| seen.connected = false);
                    said = None;
                    // One that closes at once is not asked more and more often.
                    if began.elapsed() >= self.times.longest_wait {
                        wait = self.times.first_wait;
                    }
                    error.to_string()
                }
            };
            if said.as_ref() != Some(&error) {
                say(format!("the log does not go to {}: {error}; tried again and again", self.collector)).await;
                said = Some(error.clone());
            }
            change(self.seen, |seen| seen.error = Some(error));
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(self.times.longest_wait);
        }
    }

    /// A connection, and how this appliance is called in what is sent over it.
    async fn connect(&self) -> Result<(Box<dyn Stream>, String), String> {
        let Collector { host, port, .. } = &self.collector;
        let addresses = match self.collector.address() {
            Some(address) => vec![address],
            None => self.names.resolve(host).await.map_err(|e| e.to_string())?,
        };
        let mut error = "its name has no address".to_owned();
        for address in addresses {
            match timeout(self.times.connect, self.connect_to(address, *port)).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(e)) => error = format!("{address}: {e}"),
                Err(_) => error = format!("{address}: no answer within {} s", self.times.connect.as_secs()),
            }
        }
        Err(error)
    }

    async fn connect_to(&self, address: IpAddr, port: u16) -> io::Result<(Box<dyn Stream>, String)> {
        let stream = TcpStream::connect((address, port)).await?;
        // One that is gone is noticed: the kernel alone would try for a quarter of an hour. One that is slow has been left
        // before, and what the kernel still has for it may yet arrive.
        let most = u32::try_from(4 * self.times.write.as_millis()).unwrap_or(u32::MAX);
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, most);
        let host = host(&rustix::system::uname().nodename().to_string_lossy(), stream.local_addr()?.ip());
        let Some(tls) = &self.tls else { return Ok((Box::new(stream), host)) };
        let name = ServerName::try_from(self.collector.host.clone()).map_err(io::Error::other)?;
        Ok((Box::new(tls.connect(name, stream).await?), host))
    }

    /// Sends until that goes wrong; why it did.
    async fn send(
        &self,
        history: &History,
        follower: &mut Follower,
        pending: &mut Pending,
        stream: Box<dyn Stream>,
        host: &str,
    ) -> io::Error {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let closed = async {
            // A collector has nothing to say. That it reads its end is how it is noticed that it has gone.
            let mut dropped = [0; 512];
            loop {
                match reader.read(&mut dropped).await {
                    Ok(0) => return io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"),
                    Ok(_) => {}
                    Err(e) => return e,
                }
            }
        };
        let sending = async {
            loop {
                if pending.messages == 0 {
                    *pending = history.until(|| messages(history, follower, host)).await;
                    change(self.seen, |seen| seen.missed = follower.missed);
                }
                if let Err(e) = self.write(&mut writer, &pending.bytes).await {
                    return e;
                }
                change(self.seen, |seen| seen.sent += pending.messages);
                *pending = Pending::default();
            }
        };
        tokio::select! {
            biased;
            error = closed => error,
            error = sending => error,
        }
    }

    async fn write(&self, to: &mut (impl AsyncWrite + Unpin), mut bytes: &[u8]) -> io::Result<()> {
        let slow = || {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it has taken nothing for {} s", self.times.write.as_secs()),
            )
        };
        while !bytes.is_empty() {
            let written = timeout(self.times.write, to.write(bytes)).await.map_err(|_| slow())??;
            bytes = bytes.get(written..).filter(|_| written > 0).ok_or(io::ErrorKind::WriteZero)?;
        }
        timeout(self.times.write, to.flush()).await.map_err(|_| slow())?
    }
}

/// The next messages, about one piece of them; `None` if there are none.
fn messages(history: &History, follower: &mut Follower, host: &str) -> Option<Pending> {
    let mut next = Pending::default();
    follower.read(history, |line| {
        syslog::write(&mut next.bytes, line, host);
        next.messages += 1;
        next.bytes.len() < PIECE
    });
    (next.messages > 0).then_some(next)
}

/// How the appliance is called: by its name, if it has one, or by the address it speaks from (RFC 5424 6.2.4).
fn host(name: &str, address: IpAddr) -> String {
    if matches!(name, "" | "(none)" | "localhost") { address.to_string() } else { name.to_owned() }
}

#[cfg(test)]
mod tests;
