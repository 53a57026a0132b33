//! From a name to its addresses: the question a worker asks, and the stub resolver with which control answers it.
//!
//! The stub knows the name servers it was given and nothing else. It asks for both families at once, over UDP from a
//! fresh port for each question, and again over TCP when an answer does not fit. A server follows aliases itself; only
//! those in its answer count. What it says is believed: the servers belong to the operator, and TLS is what proves to
//! whom a connection leads.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use domain::base::iana::{Class, Rcode};
use domain::base::name::FlattenInto as _;
use domain::base::{Message, MessageBuilder, Name, Rtype};
use domain::rdata::{A, Aaaa, Cname};
use futures_util::future::{BoxFuture, Either, select};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::site::Peer;

/// Addresses of a name that are looked at; more are dropped.
pub const MAX_ADDRESSES: usize = 16;
/// Aliases that are followed from a name to its addresses; servers themselves stop at 11 or before.
const ALIASES: usize = 12;
/// How long a server has for one question.
const TRY: Duration = Duration::from_secs(2);
/// How often each server is asked.
const ROUNDS: usize = 2;
/// Name servers that are asked, in their order.
const SERVERS: usize = 3;
/// How long a look-up takes at most, waiting for its turn included.
const IN_ALL: Duration = Duration::from_secs(10);
/// How long the second family's addresses are waited for once the first family's are there: RFC 8305 3 has 50 ms, which
/// is short for two questions that are sent one after the other.
const SECOND_FAMILY: Duration = Duration::from_millis(200);
/// Look-ups at a time; more wait. Each has two sockets; no brane may have more than eight open in each worker.
const AT_A_TIME: usize = 512;
/// What a server may send in one datagram, in bytes: what passes everywhere unfragmented (DNS Flag Day 2020).
const DATAGRAM: u16 = 1232;
/// Datagrams that are not the answer, on a port where only the server's arrive, before it is given up.
const STRAYS: usize = 16;
/// How long an answer is remembered at most, whatever its own time to live.
const REMEMBERED: Duration = Duration::from_mins(5);
/// Answers that are remembered.
const ANSWERS: usize = 1024;

/// Why there are no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such name, or it has no address.
    #[error("the name has no address")]
    NotFound,
    /// No server answered in time.
    #[error("no name server answered in time")]
    Timeout,
    /// The server could not or would not say; its response code as the registry writes it.
    #[error("the name server answered {0}")]
    Refused(String),
    /// The server could not be asked.
    #[error("the name server cannot be asked: {0}")]
    Unreachable(io::ErrorKind),
    /// What the server said is no answer.
    #[error("the name server's answer is malformed")]
    Malformed,
    /// No server is configured.
    #[error("no name server is configured")]
    NoServer,
    /// It is no host name.
    #[error("not a host name")]
    Name,
}

impl Error {
    /// What `wasi:http`'s `DNS-error` has as `rcode`, if a server gave one.
    #[must_use]
    pub fn rcode(&self) -> Option<&str> {
        match self {
            Self::NotFound => Some("NXDOMAIN"),
            Self::Refused(code) => Some(code),
            _ => None,
        }
    }
}

/// Resolves names.
pub trait Resolve: Send + Sync {
    /// The addresses of a host name, best first, at most [`MAX_ADDRESSES`], unfiltered.
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, Error>>;
}

/// Which addresses are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `A` records.
    V4,
    /// `AAAA` records.
    V6,
}

impl Family {
    fn rtype(self) -> Rtype {
        match self {
            Self::V4 => Rtype::A,
            Self::V6 => Rtype::AAAA,
        }
    }
}

/// A server's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// At least one, at most [`MAX_ADDRESSES`].
    pub addresses: Vec<IpAddr>,
    /// The least of the records that lead to them.
    pub ttl: Duration,
}

/// A stub resolver over the name servers it is given.
#[derive(Debug)]
pub struct Stub {
    servers: Vec<SocketAddr>,
    cache: Mutex<Cache>,
    turns: Semaphore,
}

impl Stub {
    /// Asks these servers, the first three of them, in their order.
    #[must_use]
    pub fn new(mut servers: Vec<SocketAddr>) -> Self {
        servers.truncate(SERVERS);
        Self { servers, cache: Mutex::default(), turns: Semaphore::new(AT_A_TIME) }
    }

    async fn look_up(&self, text: &str) -> Result<Vec<IpAddr>, Error> {
        let text = match Peer::parse(text).map_err(|_| Error::Name)? {
            Peer::Address(address) => return Ok(vec![address]),
            Peer::Name(name) => name,
        };
        let name: Name<Vec<u8>> = Name::vec_from_str(&text).map_err(|_| Error::Name)?;
        if let Some(known) = self.cache().get(&text, Instant::now()) {
            return Ok(known);
        }
        let asking = async {
            let _turn = self.turns.acquire().await.map_err(|_| Error::Timeout)?;
            self.both(&name).await
        };
        let answer = timeout(IN_ALL, asking).await.map_err(|_| Error::Timeout)??;
        let now = Instant::now();
        self.cache().put(text, &answer, now);
        Ok(answer.addresses)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of both families, IPv4 first: an appliance has that more often than IPv6.
    async fn both(&self, name: &Name<Vec<u8>>) -> Result<Answer, Error> {
        let (v4, v6) = (pin!(self.ask(name, Family::V4)), pin!(self.ask(name, Family::V6)));
        let (v4, v6) = match select(v4, v6).await {
            Either::Left((v4, v6)) => {
                let v6 = if v4.is_ok() { timeout(SECOND_FAMILY, v6).await } else { Ok(v6.await) };
                (v4, v6.unwrap_or(Err(Error::Timeout)))
            }
            Either::Right((v6, v4)) => {
                let v4 = if v6.is_ok() { timeout(SECOND_FAMILY, v4).await } else { Ok(v4.await) };
                (v4.unwrap_or(Err(Error::Timeout)), v6)
            }
        };
        match (v4, v6) {
            (Ok(mut v4), Ok(v6)) => {
                // Both families have a say: a server that is generous with one does not hide the other.
                v4.addresses.truncate(MAX_ADDRESSES - v6.addresses.len().min(MAX_ADDRESSES / 2));
                v4.addresses.extend(v6.addresses);
                v4.addresses.truncate(MAX_ADDRESSES);
                Ok(Answer { ttl: v4.ttl.min(v6.ttl), ..v4 })
            }
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(Error::NotFound), Err(why)) | (Err(why), Err(_)) => Err(why),
        }
    }

    async fn ask(&self, name: &Name<Vec<u8>>, family: Family) -> Result<Answer, Error> {
        let mut last = Error::NoServer;
        for server in std::iter::repeat_n(&self.servers, ROUNDS).flatten() {
            match timeout(TRY, exchange(*server, name, family)).await {
                Ok(Ok(answer)) => return Ok(answer),
                // That is an answer too.
                Ok(Err(Error::NotFound)) => return Err(Error::NotFound),
                Ok(Err(why)) => last = why,
                Err(_) => last = Error::Timeout,
            }
        }
        Err(last)
    }
}

impl Resolve for Stub {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, Error>> {
        Box::pin(self.look_up(name))
    }
}

/// One question to one server, over UDP and, if the answer does not fit, over TCP.
async fn exchange(server: SocketAddr, name: &Name<Vec<u8>>, family: Family) -> Result<Answer, Error> {
    let unreachable = |e: io::Error| Error::Unreachable(e.kind());
    let query = query(name, family)?;
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Port 0: the kernel picks one at random, and connected, it takes datagrams from the server alone.
    let socket = UdpSocket::bind(any).await.map_err(unreachable)?;
    socket.connect(server).await.map_err(unreachable)?;
    socket.send(query.as_slice()).await.map_err(unreachable)?;
    let mut buffer = [0; DATAGRAM as usize];
    for _ in 0..STRAYS {
        let length = socket.recv(&mut buffer).await.map_err(unreachable)?;
        let bytes = buffer.get(..length).unwrap_or_default();
        match Message::from_slice(bytes) {
            Ok(message) if message.is_answer(&query) => {
                return if message.header().tc() {
                    over_tcp(server, &query, family).await
                } else {
                    read(bytes, family)
                };
            }
            _ => {}
        }
    }
    Err(Error::Malformed)
}

/// The same question over TCP (RFC 7766): two bytes of length before each message.
async fn over_tcp(server: SocketAddr, query: &Message<Vec<u8>>, family: Family) -> Result<Answer, Error> {
    let unreachable = |e: io::Error| Error::Unreachable(e.kind());
    let mut stream = TcpStream::connect(server).await.map_err(unreachable)?;
    let length = u16::try_from(query.as_slice().len()).map_err(|_| Error::Name)?;
    let framed = [&length.to_be_bytes(), query.as_slice()].concat();
    stream.write_all(&framed).await.map_err(unreachable)?;
    let mut bytes = vec![0; usize::from(stream.read_u16().await.map_err(unreachable)?)];
    stream.read_exact(&mut bytes).await.map_err(unreachable)?;
    let message = Message::from_slice(&bytes).map_err(|_| Error::Malformed)?;
    if message.is_answer(query) { read(&bytes, family) } else { Err(Error::Malformed) }
}

fn query(name: &Name<Vec<u8>>, family: Family) -> Result<Message<Vec<u8>>, Error> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(|_| Error::Unreachable(io::ErrorKind::Other))?;
    let mut message = MessageBuilder::new_vec();
    message.header_mut().set_id(u16::from_ne_bytes(id));
    message.header_mut().set_rd(true);
    let mut message = message.question();
    message.push((name, family.rtype())).map_err(|_| Error::Name)?;
    let mut message = message.additional();
    let sized = message.opt(|opt| {
        opt.set_udp_payload_size(DATAGRAM);
        Ok(())
    });
    sized.map_err(|_| Error::Name)?;
    Ok(message.into_message())
}

/// Reads an answer: the addresses of the name that was asked for, or of the one its aliases lead to.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Refused`] or [`Error::Malformed`].
pub fn read(bytes: &[u8], family: Family) -> Result<Answer, Error> {
    let message = Message::from_slice(bytes).map_err(|_| Error::Malformed)?;
    match message.header().rcode() {
        Rcode::NOERROR => {}
        Rcode::NXDOMAIN => return Err(Error::NotFound),
        other => return Err(Error::Refused(other.to_string())),
    }
    let question = message.sole_question().map_err(|_| Error::Malformed)?;
    let mut name: Name<Vec<u8>> = question.into_qname().try_flatten_into().map_err(|_| Error::Malformed)?;
    let mut ttl = Duration::MAX;
    for _ in 0..=ALIASES {
        let records = message.answer().map_err(|_| Error::Malformed)?;
        let mut addresses = Vec::new();
        let mut add = |owner_is_it: bool, seconds: u32, address: IpAddr| {
            if owner_is_it && addresses.len() < MAX_ADDRESSES {
                ttl = ttl.min(Duration::from_secs(seconds.into()));
                addresses.push(address);
            }
        };
        for record in records {
            let record = record.map_err(|_| Error::Malformed)?;
            if record.class() != Class::IN || record.rtype() != family.rtype() {
                continue;
            }
            let (owner_is_it, seconds) = (record.owner() == name, record.ttl().as_secs());
            let address = match family {
                Family::V4 => record.to_record::<A>().map(|r| r.map(|r| r.data().addr().into())),
                Family::V6 => record.to_record::<Aaaa>().map(|r| r.map(|r| r.data().addr().into())),
            };
            add(owner_is_it, seconds, address.ok().flatten().ok_or(Error::Malformed)?);
        }
        if !addresses.is_empty() {
            return Ok(Answer { addresses, ttl });
        }
        let alias = records.limit_to_in::<Cname<_>>().filter_map(Result::ok).find(|r| *r.owner() == name);
        let alias = alias.ok_or(Error::NotFound)?;
        ttl = ttl.min(Duration::from_secs(alias.ttl().as_secs().into()));
        name = alias.into_data().into_cname().try_flatten_into().map_err(|_| Error::Malformed)?;
    }
    Err(Error::Malformed)
}

/// Answers that still hold.
#[derive(Debug, Default)]
struct Cache {
    answers: HashMap<String, (Instant, Vec<IpAddr>)>,
}

impl Cache {
    fn get(&self, name: &str, now: Instant) -> Option<Vec<IpAddr>> {
        self.answers.get(name).filter(|(until, _)| *until > now).map(|(_, addresses)| addresses.clone())
    }

    fn put(&mut self, name: String, answer: &Answer, now: Instant) {
        let ttl = answer.ttl.min(REMEMBERED);
        if ttl.is_zero() {
            return;
        }
        if self.answers.len() >= ANSWERS && !self.answers.contains_key(&name) {
            self.answers.retain(|_, (until, _)| *until > now);
            if self.answers.len() >= ANSWERS {
                let soonest = self.answers.iter().min_by_key(|(_, (until, _))| *until).map(|(name, _)| name.clone());
                soonest.and_then(|name| self.answers.remove(&name));
            }
        }
        self.answers.insert(name, (now + ttl, answer.addresses.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::base::Ttl;
    use domain::base::message_builder::AnswerBuilder;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::net::TcpListener;

    type Reply = AnswerBuilder<Vec<u8>>;

    fn name(text: &str) -> Name<Vec<u8>> {
        Name::vec_from_str(text).unwrap()
    }

    fn address(reply: &mut Reply, owner: &str, ttl: u32, address: &str) {
        let ttl = Ttl::from_secs(ttl);
        match address.parse().unwrap() {
            IpAddr::V4(a) => reply.push((name(owner), Class::IN, ttl, A::new(a))).unwrap(),
            IpAddr::V6(a) => reply.push((name(owner), Class::IN, ttl, Aaaa::new(a))).unwrap(),
        }
    }

    fn alias(reply: &mut Reply, owner: &str, ttl: u32, target: &str) {
        reply.push((name(owner), Class::IN, Ttl::from_secs(ttl), Cname::new(name(target)))).unwrap();
    }

    /// What the server in these tests says; `None` if nothing.
    fn reply(query: &[u8], over_udp: bool) -> Option<Vec<Vec<u8>>> {
        let query = Message::from_slice(query).unwrap();
        let question = query.sole_question().unwrap();
        let asked = question.qname().to_string();
        let v4 = question.qtype() == Rtype::A;
        let code = match asked.as_str() {
            "gone.example" => Rcode::NXDOMAIN,
            "refused.example" => Rcode::REFUSED,
            "broken.example" => Rcode::SERVFAIL,
            _ => Rcode::NOERROR,
        };
        let mut r = MessageBuilder::new_vec().start_answer(query, code).unwrap();
        match (asked.as_str(), v4) {
            ("two.example" | "TWO.example" | "half.example" | "stray.example" | "lasting.example", true) => {
                address(&mut r, &asked, 60, "9.9.9.9");
            }
            ("fleeting.example", true) => address(&mut r, &asked, 0, "9.9.9.9"),
            ("two.example", false) => address(&mut r, &asked, 30, "2620:fe::fe"),
            ("half.example", false) | ("silent.example", _) => return None,
            ("alias.example", true) => {
                // Not in their order, and with records that are nobody's business.
                address(&mut r, "c.example", 9, "9.9.9.9");
                address(&mut r, "other.example", 1, "10.0.0.1");
                alias(&mut r, "b.example", 7, "c.example");
                alias(&mut r, "Alias.Example", 8, "b.example");
            }
            ("loop.example", _) => {
                alias(&mut r, "loop.example", 9, "pool.example");
                alias(&mut r, "pool.example", 9, "loop.example");
            }
            ("dangling.example", _) => alias(&mut r, "dangling.example", 9, "nowhere.example"),
            ("other-owner.example", _) => address(&mut r, "another.example", 60, "9.9.9.9"),
            ("big.example", true) if over_udp => r.header_mut().set_tc(true),
            ("big.example", true) => (0..200).for_each(|n| address(&mut r, &asked, 60, &format!("9.9.9.{n}"))),
            _ => {}
        }
        let answer = r.finish();
        let mut all = Vec::new();
        if asked == "stray.example" {
            let mut stray = answer.clone();
            stray[0] ^= 1;
            all.extend([b"?".to_vec(), stray, answer.clone()]);
            // A record of another name, under the right number.
            let mut other = MessageBuilder::new_vec();
            other.header_mut().set_id(query.header().id());
            other.header_mut().set_qr(true);
            let mut other = other.question();
            other.push((name("evil.example"), Rtype::A)).unwrap();
            let mut other = other.answer();
            address(&mut other, "stray.example", 60, "10.0.0.1");
            all.insert(0, other.finish());
        } else {
            all.push(answer);
        }
        Some(all)
    }

    /// Runs one on a port of its own; counts its questions.
    async fn server() -> (SocketAddr, Arc<AtomicUsize>) {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            // The same port can be somebody else's over TCP.
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((n, from)) = udp.recv_from(&mut buffer).await {
                count.fetch_add(1, Ordering::Relaxed);
                for answer in reply(&buffer[..n], true).into_iter().flatten() {
                    udp.send_to(&answer, from).await.unwrap();
                }
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                let mut query = vec![0; stream.read_u16().await.unwrap().into()];
                stream.read_exact(&mut query).await.unwrap();
                for answer in reply(&query, false).into_iter().flatten() {
                    stream.write_u16(answer.len().try_into().unwrap()).await.unwrap();
                    stream.write_all(&answer).await.unwrap();
                }
            }
        });
        (address, asked)
    }

    #[expect(clippy::unnecessary_wraps, reason = "as look-ups return them")]
    fn ips(all: &[&str]) -> Result<Vec<IpAddr>, Error> {
        Ok(all.iter().map(|a| a.parse().unwrap()).collect())
    }

    #[tokio::test]
    async fn names_are_resolved_or_there_is_a_reason() {
        let (address, _) = server().await;
        let stub = Stub::new(vec![address]);
        for (name, wanted) in [
            ("two.example", ips(&["9.9.9.9", "2620:fe::fe"])),
            ("two.example.", ips(&["9.9.9.9", "2620:fe::fe"])),
            ("TWO.example", ips(&["9.9.9.9", "2620:fe::fe"])),
            ("half.example", ips(&["9.9.9.9"])),
            ("alias.example", ips(&["9.9.9.9"])),
            ("stray.example", ips(&["9.9.9.9"])),
            ("gone.example", Err(Error::NotFound)),
            ("empty.example", Err(Error::NotFound)),
            ("dangling.example", Err(Error::NotFound)),
            ("other-owner.example", Err(Error::NotFound)),
            ("loop.example", Err(Error::Malformed)),
            ("refused.example", Err(Error::Refused("REFUSED".into()))),
            ("broken.example", Err(Error::Refused("SERVFAIL".into()))),
            ("not a name", Err(Error::Name)),
            ("", Err(Error::Name)),
        ] {
            assert_eq!(stub.resolve(name).await, wanted, "{name}");
        }
        let big = stub.resolve("big.example").await.unwrap();
        assert_eq!(big.len(), MAX_ADDRESSES, "asked again over TCP, and bounded");
    }

    #[tokio::test]
    async fn an_address_is_never_asked_for() {
        let (address, asked) = server().await;
        let stub = Stub::new(vec![address]);
        for text in ["127.0.0.1", "[::1]", "10.0.0.1"] {
            assert_eq!(stub.resolve(text).await, ips(&[text.trim_matches(['[', ']'])]));
        }
        for text in ["0x7f.1", "2130706433", "127.1"] {
            assert_eq!(stub.resolve(text).await, Err(Error::Name));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn the_next_server_is_asked_when_one_is_down_or_will_not_say() {
        let (address, _) = server().await;
        // Port 1 is nobody's.
        let unused = "127.0.0.1:1".parse().unwrap();
        let stub = Stub::new(vec![unused, address]);
        assert_eq!(stub.resolve("two.example").await, ips(&["9.9.9.9", "2620:fe::fe"]));
        let stub = Stub::new(vec![unused]);
        let refused = Err(Error::Unreachable(io::ErrorKind::ConnectionRefused));
        assert_eq!(stub.resolve("two.example").await, refused);
        assert_eq!(Stub::new(vec![]).resolve("two.example").await, Err(Error::NoServer));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_says_nothing_is_given_up() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let stub = Stub::new(vec![silent.local_addr().unwrap(); 9]);
        let before = Instant::now();
        assert_eq!(stub.resolve("two.example").await, Err(Error::Timeout));
        assert!(before.elapsed() <= IN_ALL);
    }

    #[tokio::test]
    async fn an_answer_is_remembered_as_long_as_it_says() {
        let (address, asked) = server().await;
        let stub = Stub::new(vec![address]);
        stub.resolve("lasting.example").await.unwrap();
        stub.resolve("lasting.example").await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 2, "once for each family");
        stub.resolve("fleeting.example").await.unwrap();
        stub.resolve("fleeting.example").await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 6, "no time to live, no memory");
    }

    #[test]
    fn memory_is_bounded_in_time_and_in_number() {
        let now = Instant::now();
        let answer = |seconds| Answer { addresses: vec![[9, 9, 9, 9].into()], ttl: Duration::from_secs(seconds) };
        let mut cache = Cache::default();
        cache.put("week.example".into(), &answer(7 * 24 * 3600), now);
        cache.put("second.example".into(), &answer(1), now);
        assert!(cache.get("week.example", now + Duration::from_secs(299)).is_some());
        assert!(cache.get("week.example", now + Duration::from_mins(5)).is_none());
        assert!(cache.get("second.example", now + Duration::from_secs(1)).is_none());
        for n in 0..3000 {
            cache.put(format!("n{n}.example"), &answer(100), now);
            assert!(cache.answers.len() <= ANSWERS);
        }
        assert!(cache.get("second.example", now).is_none(), "what ends soonest makes way");
        assert!(cache.get("week.example", now).is_some());
    }

    #[test]
    fn the_time_to_live_is_the_least_on_the_way() {
        let query = query(&name("alias.example"), Family::V4).unwrap();
        let bytes = reply(query.as_slice(), true).unwrap().remove(0);
        assert_eq!(read(&bytes, Family::V4).unwrap().ttl, Duration::from_secs(7));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            crate::fuzz::answer(&bytes);
        }

        #[test]
        fn a_damaged_answer_is_read_or_refused(
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut: prop::sample::Index,
        ) {
            for asked in ["alias.example", "two.example", "loop.example"] {
                let query = query(&name(asked), Family::V4).unwrap();
                let mut bytes = reply(query.as_slice(), true).unwrap().remove(0);
                for (at, value) in &flips {
                    let at = at.index(bytes.len());
                    bytes[at] = *value;
                }
                crate::fuzz::answer(&bytes);
                bytes.truncate(cut.index(bytes.len()));
                crate::fuzz::answer(&bytes);
            }
        }
    }
}
