//! Against collectors on the loopback, in one process: what they are sent, and what becomes of those that are slow, gone or
//! somebody else.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::control::report::Line;
use crate::log::Event;

const QUICK: Times = Times {
    connect: Duration::from_secs(5),
    write: Duration::from_millis(300),
    first_wait: Duration::from_millis(5),
    longest_wait: Duration::from_millis(20),
};
/// What any of it may take on a busy machine.
const WITHIN: Duration = Duration::from_mins(1);

/// No name has an address.
struct Nobody;

impl Resolve for Nobody {
    fn resolve<'a>(
        &'a self,
        _: &'a str,
    ) -> futures_util::future::BoxFuture<'a, Result<Vec<IpAddr>, gaia_egress::resolve::Error>> {
        Box::pin(std::future::ready(Err(gaia_egress::resolve::Error::NotFound)))
    }
}

/// All names are this machine's.
struct Here;

impl Resolve for Here {
    fn resolve<'a>(
        &'a self,
        _: &'a str,
    ) -> futures_util::future::BoxFuture<'a, Result<Vec<IpAddr>, gaia_egress::resolve::Error>> {
        Box::pin(std::future::ready(Ok(vec![[127, 0, 0, 1].into()])))
    }
}

fn say(history: &History, brane: &str, text: &str, share: usize) {
    let event = Event::Kill { text: text.to_owned().into() };
    history.push(Line { seq: 0, time_ns: 1, core: None, brane: Some(brane.into()), instance: None, event }, share);
}

struct Test {
    history: History,
    seen: RefCell<Option<report::Export>>,
    said: RefCell<Vec<String>>,
}

impl Test {
    /// Sends to this collector while `test` goes on.
    async fn run<T>(
        collector: &str,
        roots: &str,
        names: &dyn Resolve,
        test: impl AsyncFnOnce(&Self) -> T,
    ) -> (T, Vec<String>) {
        let collector: Collector = collector.parse().unwrap();
        let seen = RefCell::new(Some(state(&collector)));
        let own = Self { history: History::default(), seen, said: RefCell::default() };
        let tls = connector(&collector, roots).unwrap();
        let sender = Sender { collector, tls, names, times: QUICK, seen: &own.seen };
        let sending = sender.send_all(&own.history, async |words| own.said.borrow_mut().push(words));
        let outcome = tokio::select! {
            () = sending => unreachable!(),
            outcome = timeout(WITHIN, test(&own)) => outcome.unwrap(),
        };
        let said = own.said.take();
        (outcome, said)
    }

    fn state(&self) -> report::Export {
        self.seen.borrow().clone().unwrap()
    }

    async fn until_said(&self, words: &str) {
        while !self.said.borrow().iter().any(|said| said.contains(words)) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn until(&self, wanted: impl Fn(&report::Export) -> bool) -> report::Export {
        while !wanted(&self.state()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.state()
    }
}

/// The texts of so many messages.
async fn texts(from: &mut (impl AsyncRead + Unpin), count: usize) -> Vec<String> {
    let mut all = Vec::new();
    while all.len() < count {
        let mut length = 0;
        loop {
            match from.read_u8().await.unwrap() {
                b' ' => break,
                digit => length = length * 10 + usize::from(digit - b'0'),
            }
        }
        let mut message = vec![0; length];
        from.read_exact(&mut message).await.unwrap();
        let message = String::from_utf8(message).unwrap();
        let (_, text) = message.split_once("] ").unwrap();
        all.push(text.to_owned());
    }
    all
}

fn on_loopback<T>(test: impl AsyncFnOnce(TcpListener) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { test(TcpListener::bind("127.0.0.1:0").await.unwrap()).await })
}

fn url(scheme: &str, host: &str, listener: &TcpListener) -> String {
    format!("{scheme}://{host}:{}", listener.local_addr().unwrap().port())
}

#[test]
fn each_line_arrives_in_its_order() {
    on_loopback(async |listener| {
        let (read, said) = Test::run(&url("syslog+tcp", "127.0.0.1", &listener), "", &Nobody, async |own| {
            say(&own.history, "a", "one", 1 << 20);
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut read = texts(&mut stream, 1).await;
            say(&own.history, "b", "two", 1 << 20);
            say(&own.history, "a", "three", 1 << 20);
            read.extend(texts(&mut stream, 2).await);
            let state = own.until(|seen| seen.sent == 3).await;
            assert_eq!((state.connected, state.missed, state.error), (true, 0, None));
            read
        })
        .await;
        assert_eq!(read, ["KILL one", "KILL two", "KILL three"]);
        assert_eq!(said.len(), 1, "{said:?}");
    });
}

#[test]
fn a_collector_that_was_away_is_told_what_it_missed() {
    on_loopback(async |listener| {
        let ((), said) = Test::run(&url("syslog+tcp", "localhost", &listener), "", &Here, async |own| {
            let (mut stream, _) = listener.accept().await.unwrap();
            say(&own.history, "a", "first", 1 << 14);
            assert_eq!(texts(&mut stream, 1).await, ["KILL first"]);
            own.until(|seen| seen.sent == 1).await;
            // The next connection waits in the listener's queue, and nobody reads from it.
            drop(stream);
            own.until_said("it closed the connection").await;
            for n in 0..20_000 {
                say(&own.history, "a", &format!("{n} {}", "x".repeat(100)), 1 << 14);
            }
            say(&own.history, "b", "quiet", 1 << 14);
            let (mut stream, _) = listener.accept().await.unwrap();
            let (mut read, mut lost) = (0, 0);
            loop {
                let text = texts(&mut stream, 1).await.remove(0);
                if text == "KILL quiet" {
                    break;
                }
                match text.strip_prefix("LOST ") {
                    Some(lines) => lost += lines.split(' ').next().unwrap().replace(',', "").parse::<u64>().unwrap(),
                    None => read += 1,
                }
            }
            assert!(read > 0 && lost > 10_000 && read + lost == 20_000, "{read} and {lost}");
            assert_eq!(own.until(|seen| seen.missed > 0).await.missed, lost);
        })
        .await;
        assert!(said.iter().any(|words| words.contains("it closed the connection")), "{said:?}");
    });
}

#[test]
fn a_collector_that_stops_reading_is_left_and_the_rest_is_sent_again() {
    on_loopback(async |listener| {
        let ((), said) = Test::run(&url("syslog+tcp", "127.0.0.1", &listener), "", &Nobody, async |own| {
            let (mut stream, _) = listener.accept().await.unwrap();
            let text = "y".repeat(4000);
            // More than both kernels' buffers take, and not more than is kept.
            for n in 0..3000 {
                say(&own.history, "a", &format!("{n} {text}"), 64 << 20);
            }
            own.until_said("does not go").await;
            let mut taken = Vec::new();
            let _ = stream.read_to_end(&mut taken).await;
            // The last of them is not whole.
            let whole = taken.windows(5).filter(|bytes| bytes == b"KILL ").count() / 2;
            let (mut again, _) = listener.accept().await.unwrap();
            let next = texts(&mut again, 20).await;
            let number = |text: &String| text.split(' ').nth(1).unwrap().parse::<usize>().unwrap();
            let first = number(&next[0]);
            assert!(
                first > 0 && first + 2 * PIECE / text.len() > whole,
                "a piece at most comes again: {first} after {whole}"
            );
            assert!(next.iter().map(number).eq(first..first + 20), "{first} and on");
        })
        .await;
        assert!(said.iter().any(|words| words.contains("does not go")), "{said:?}");
    });
}

/// The authority in PEM, and what a server shows under this name.
fn certificate(name: &str) -> (String, TlsAcceptor) {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = authority.self_signed(&authority_key).unwrap();
    let (issuer, key) = (Issuer::new(authority, authority_key), KeyPair::generate().unwrap());
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    (root.pem(), TlsAcceptor::from(Arc::new(config)))
}

#[test]
fn over_tls_the_collector_shows_that_it_is_the_one() {
    let (root, acceptor) = certificate("logs.example");
    on_loopback(async |listener| {
        let collector = url("syslog+tls", "logs.example", &listener);
        Test::run(&collector, &root, &Here, async |own| {
            say(&own.history, "a", "secret", 1 << 20);
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            assert_eq!(stream.get_ref().1.server_name(), Some("logs.example"));
            assert_eq!(texts(&mut stream, 1).await, ["KILL secret"]);
        })
        .await;
        // Another name, another authority, none at all: nothing is said to any of them.
        let (other_root, _) = certificate("logs.example");
        let other_name = url("syslog+tls", "other.example", &listener);
        for (collector, root, why) in
            [(&other_name, &root, "not valid for name"), (&collector, &other_root, "BadSignature")]
        {
            Test::run(collector, root, &Here, async |own| {
                say(&own.history, "a", "secret", 1 << 20);
                let (stream, _) = listener.accept().await.unwrap();
                assert!(acceptor.accept(stream).await.is_err());
                let state = own.until(|seen| seen.error.is_some()).await;
                assert!(state.error.as_ref().unwrap().contains(why), "{state:?}");
                assert_eq!((state.sent, state.connected), (0, false));
            })
            .await;
        }
    });
}

#[test]
fn one_that_is_not_there_is_tried_again_and_said_once() {
    on_loopback(async |listener| {
        let collector = url("syslog+tcp", "127.0.0.1", &listener);
        let address = listener.local_addr().unwrap();
        drop(listener);
        let ((), said) = Test::run(&collector, "", &Nobody, async |own| {
            say(&own.history, "a", "one", 1 << 20);
            own.until(|seen| seen.error.is_some()).await;
            let listener = TcpListener::bind(address).await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_eq!(texts(&mut stream, 1).await, ["KILL one"], "what was said meanwhile is kept for it");
        })
        .await;
        assert_eq!(said.iter().filter(|words| words.contains("does not go")).count(), 1, "{said:?}");
        let ((), said) = Test::run("syslog+tcp://nowhere.example", "", &Nobody, async |own| {
            own.until(|seen| seen.error.is_some()).await;
        })
        .await;
        assert!(said[0].contains("the name has no address"), "{said:?}");
    });
}

#[test]
fn an_appliance_without_a_name_is_called_by_its_address() {
    let address = [192, 0, 2, 7].into();
    assert_eq!(host("(none)", address), "192.0.2.7");
    assert_eq!(host("gaia-1", address), "gaia-1");
}
