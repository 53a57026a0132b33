//! Over loopback, in one process: who comes in, who does not, and what is bounded.

use std::future::Future;

use proptest::prelude::*;
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConfig};

use super::*;
use crate::remote::{Folder, Host, Remote as Operating, Untrusted};

fn on_loopback<T>(test: impl AsyncFnOnce(TcpListener) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async { test(TcpListener::bind("127.0.0.1:0").await.unwrap()).await })
}

/// A door for `ann`, the keys of the device and of `ann`.
fn door() -> (Rc<Remote>, Key, Key) {
    let (device, ann) = (Key::make().unwrap(), Key::make().unwrap());
    let remote = Remote::new(&device, vec![("ann".to_owned(), ann.public())]).unwrap();
    (Rc::new(remote), device, ann)
}

/// A folder of an operator who has this key and trusts this appliance.
fn operator(own: &Key, host: &Host, trusted: Option<PublicKey>) -> (tempfile::TempDir, Folder) {
    let kept = tempfile::tempdir().unwrap();
    let folder = Folder::new(kept.path().to_owned());
    let path = kept.path().join("key");
    std::fs::write(&path, own.pem()).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    if let Some(key) = trusted {
        folder.trust(host, key).unwrap();
    }
    (kept, folder)
}

fn host_of(listener: &TcpListener) -> Host {
    Host::parse(&listener.local_addr().unwrap().to_string()).unwrap()
}

async fn admitted(remote: &Remote, listener: &TcpListener) -> Result<(TlsStream<Lingering>, Visit), Refused> {
    let (stream, from) = listener.accept().await.unwrap();
    remote.admit(stream, from.ip()).await
}

/// What somebody with a TLS client of their own is answered: nothing, or the alert.
async fn alert(listener: &TcpListener, config: ClientConfig) -> Option<AlertDescription> {
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let name = ServerName::try_from("appliance").unwrap();
    let ended = match tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await {
        Ok(mut stream) => stream.read_u8().await.map(drop),
        Err(e) => Err(e),
    };
    let error = ended.err()?;
    match error.get_ref()?.downcast_ref()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        other => panic!("{other}"),
    }
}

/// A client that takes any server.
#[derive(Debug)]
struct Anyone {
    raw: bool,
}

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        key::SCHEMES.to_vec()
    }

    fn requires_raw_public_keys(&self) -> bool {
        self.raw
    }
}

fn client(
    raw: bool,
    own: Option<Arc<CertifiedKey>>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(key::provider()).with_protocol_versions(versions).unwrap();
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone { raw }));
    let mut config = match own {
        Some(key) => builder.with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key))),
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config
}

const TLS13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
const TLS12: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12];

#[test]
fn an_operator_comes_in_by_name_and_a_stranger_is_told_what_to_do() {
    on_loopback(async |listener| {
        let (remote, device, ann) = door();
        let host = host_of(&listener);
        let (_kept, folder) = operator(&ann, &host, Some(device.public()));
        let operating = Operating::reach(&folder, host.clone(), None, |_, _| panic!("it is known")).unwrap();
        let (met, connected) = tokio::join!(admitted(&remote, &listener), operating.connect(&folder));
        let (mut server, visit) = met.unwrap();
        let mut stream = connected.unwrap();
        assert_eq!(visit.operator.name, "ann");
        let said = async {
            stream.write_all(b"hello").await.unwrap();
            stream.flush().await.unwrap();
        };
        let mut heard = [0; 5];
        let ((), read) = tokio::join!(said, server.read_exact(&mut heard));
        read.unwrap();
        assert_eq!(&heard, b"hello");
        assert_eq!(server.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        assert_eq!(server.get_ref().1.alpn_protocol(), Some(key::ALPN));
        assert!(remote.handshakes.borrow().is_empty());

        let stranger = Key::make().unwrap();
        let (_kept, folder) = operator(&stranger, &host, Some(device.public()));
        let operating = Operating::reach(&folder, host, None, |_, _| panic!("it is known")).unwrap();
        let asking = async {
            let mut stream = operating.connect(&folder).await.unwrap();
            stream.write_all(&[b'x'; 9000]).await.unwrap();
            let error = stream.read_u8().await.unwrap_err();
            operating.explained(&error).unwrap().to_string()
        };
        let (met, told) = tokio::join!(admitted(&remote, &listener), asking);
        let refused = met.map(drop).unwrap_err();
        assert!(matches!(refused, Refused::Stranger(key) if key == stranger.public()), "{refused}");
        assert!(told.contains("[operators]\n") && told.contains(&stranger.public().to_string()), "{told}");
    });
}

#[test]
fn nobody_comes_in_without_a_listed_key_of_their_own() {
    on_loopback(async |listener| {
        let (remote, _, ann) = door();
        let refused = async |config: ClientConfig| {
            let (met, alert) = tokio::join!(admitted(&remote, &listener), alert(&listener, config));
            (met.map(drop).unwrap_err().to_string(), alert)
        };
        let stranger = Key::make().unwrap();
        let (why, alert) = refused(client(true, Some(stranger.shown().unwrap()), TLS13)).await;
        assert_eq!(why, format!("key {} is not an operator's", stranger.public()));
        assert_eq!(alert, Some(AlertDescription::AccessDenied));
        let (why, alert) = refused(client(true, None, TLS13)).await;
        assert_eq!(alert, Some(AlertDescription::HandshakeFailure), "without a key: {why}");
        let (why, alert) = refused(client(false, None, TLS13)).await;
        assert_eq!(alert, Some(AlertDescription::HandshakeFailure), "who wants a certificate: {why}");
        let (why, alert) = refused(client(false, None, TLS12)).await;
        assert_eq!(alert, Some(AlertDescription::ProtocolVersion), "TLS 1.2: {why}");
        // The listed key, signed for by another.
        let key = rustls::crypto::ring::sign::any_eddsa_type(&pkcs8(&stranger)).unwrap();
        let forged = Arc::new(CertifiedKey::new(ann.shown().unwrap().cert.clone(), key));
        let (why, alert) = refused(client(true, Some(forged), TLS13)).await;
        assert!(why.starts_with(&format!("it does not have the key {}", ann.public())), "{why}");
        assert!(alert.is_some());
        assert_eq!(remote.conversations.get(), 0);
    });
}

fn pkcs8(key: &Key) -> rustls::pki_types::PrivatePkcs8KeyDer<'static> {
    use rustls::pki_types::pem::PemObject as _;
    rustls::pki_types::PrivatePkcs8KeyDer::from_pem_slice(key.pem().as_bytes()).unwrap()
}

#[test]
fn a_conversation_that_is_played_again_is_not_heard() {
    on_loopback(async |listener| {
        let (remote, device, ann) = door();
        // Between the two, somebody who writes down what the operator sends.
        let between = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = host_of(&between);
        let (_kept, folder) = operator(&ann, &host, Some(device.public()));
        let operating = Operating::reach(&folder, host, None, |_, _| false).unwrap();
        let written_down = async {
            let (client, _) = between.accept().await.unwrap();
            let server = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            tokio::task::spawn_local(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
            let (mut all, mut some) = (Vec::new(), [0; 4096]);
            while let Ok(n @ 1..) = from_client.read(&mut some).await {
                all.extend_from_slice(&some[..n]);
                to_server.write_all(&some[..n]).await.unwrap();
            }
            all
        };
        let asking = async {
            let mut stream = operating.connect(&folder).await.unwrap();
            stream.write_all(b"POST /v1/poweroff HTTP/1.1\r\n\r\n").await.unwrap();
            stream.shutdown().await.unwrap();
        };
        let (bytes, (), met) = tokio::join!(written_down, asking, admitted(&remote, &listener));
        assert!(met.is_ok() && bytes.len() > 300, "{}", bytes.len());
        let again = async {
            let mut stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
        };
        let (met, ()) = tokio::join!(admitted(&remote, &listener), again);
        assert!(matches!(met.map(drop).unwrap_err(), Refused::NoHandshake(_)), "what was written down came in");
    });
}

#[test]
fn an_appliance_with_another_key_is_an_error_with_file_and_line() {
    on_loopback(async |listener| {
        let (remote, device, ann) = door();
        let host = host_of(&listener);
        let before = Key::make().unwrap().public();
        let (kept, folder) = operator(&ann, &host, Some(before));
        let operating = Operating::reach(&folder, host.clone(), None, |_, _| panic!("it is known")).unwrap();
        let (met, connected) = tokio::join!(admitted(&remote, &listener), operating.connect(&folder));
        assert!(met.is_err());
        let error = connected.unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(Untrusted::Changed { line: 1, .. })), "{error}");
        let error = error.to_string();
        assert!(error.contains(&format!("{}:1", kept.path().join("known_hosts").display())), "{error}");
        assert!(error.contains(&device.public().to_string()) && error.contains(&before.to_string()), "{error}");
    });
}

#[test]
fn an_appliance_that_is_not_known_is_asked_for_its_key_and_not_told_who_asks() {
    on_loopback(async |listener| {
        let (remote, device, ann) = door();
        let host = host_of(&listener);
        let (kept, folder) = operator(&ann, &host, None);
        let reached = async |accepted: Option<PublicKey>, says: bool| {
            let (folder, host) = (folder.clone(), host.clone());
            let reach = move || Operating::reach(&folder, host, accepted, |_, _| says).map(drop);
            let (met, reached) = tokio::join!(admitted(&remote, &listener), tokio::task::spawn_blocking(reach));
            let refused = met.map(drop).unwrap_err();
            assert!(matches!(refused, Refused::Left), "{refused}");
            reached.unwrap()
        };
        let known_hosts = kept.path().join("known_hosts");
        let error = reached(None, false).await.unwrap_err();
        assert!(
            matches!(error.downcast_ref(), Some(Untrusted::Unknown { shown, .. }) if *shown == device.public()),
            "{error}"
        );
        let error = reached(Some(ann.public()), true).await.unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(Untrusted::Another { .. })), "{error}");
        assert!(!known_hosts.exists());
        reached(Some(device.public()), false).await.unwrap();
        let line = format!("{host} {}\n", device.public());
        assert_eq!(std::fs::read_to_string(&known_hosts).unwrap(), line);
        std::fs::remove_file(&known_hosts).unwrap();
        reached(None, true).await.unwrap();
        assert_eq!(std::fs::read_to_string(&known_hosts).unwrap(), line);
    });
}

/// Until `future` is done, `remote` admits whoever comes, and counts its handshakes.
async fn while_open<T>(
    remote: &Rc<Remote>,
    listener: TcpListener,
    future: impl Future<Output = T>,
) -> (T, usize, usize) {
    let (most, admitted) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let (remote, counted, let_in) = (Rc::clone(remote), Rc::clone(&most), Rc::clone(&admitted));
    let door = tokio::task::spawn_local(async move {
        loop {
            let (stream, from) = listener.accept().await.unwrap();
            let (remote, most, admitted) = (Rc::clone(&remote), Rc::clone(&counted), Rc::clone(&let_in));
            tokio::task::spawn_local(async move {
                let met = remote.admit(stream, from.ip());
                most.set(most.get().max(remote.handshakes.borrow().len()));
                if let Ok((mut stream, visit)) = met.await {
                    admitted.set(admitted.get() + 1);
                    let _ = stream.read_u8().await;
                    drop(visit);
                }
            });
        }
    });
    let done = future.await;
    door.abort();
    (done, most.get(), admitted.get())
}

#[test]
fn a_crowd_that_says_nothing_has_its_bound_and_an_operator_still_comes_in() {
    on_loopback(async |listener| {
        let (remote, device, ann) = door();
        let (at, host) = (listener.local_addr().unwrap(), host_of(&listener));
        let (_kept, folder) = operator(&ann, &host, Some(device.public()));
        let operating = Operating::reach(&folder, host, None, |_, _| panic!("it is known")).unwrap();
        let crowd = async {
            let mut silent = Vec::new();
            for _ in 0..400 {
                silent.push(TcpStream::connect(at).await.unwrap());
                tokio::task::yield_now().await;
            }
            let stream = operating.connect(&folder).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            // The oldest were told to go.
            let gone = timeout(Duration::from_secs(1), silent[0].read_u8()).await.unwrap();
            assert!(gone.is_err());
            // The newest have five seconds.
            let began = Instant::now();
            let _ = silent[399].read_u8().await;
            assert!((3..8).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
            drop(stream);
        };
        let ((), most, admitted) = while_open(&remote, listener, crowd).await;
        assert!(most <= HANDSHAKES_OF_ONE, "{most} handshakes at a time");
        assert_eq!(admitted, 1);
        assert!(remote.handshakes.borrow().is_empty());
    });
}

#[test]
fn places_are_divided_among_networks_and_the_oldest_gives_way() {
    let (remote, ..) = door();
    let of = |n: u32| IpAddr::V4((0x0a00_0000 + n).into());
    let (first, mut first_ended) = remote.begin(of(0));
    let mut others = Vec::new();
    for n in 1..1000 {
        others.push(remote.begin(of(n)));
        assert!(remote.handshakes.borrow().len() <= HANDSHAKES);
    }
    assert!(first_ended.try_recv().is_err_and(|e| e == oneshot::error::TryRecvError::Closed));
    remote.end(first);
    let there: Vec<_> =
        others.iter_mut().map(|(_, ended)| ended.try_recv() == Err(oneshot::error::TryRecvError::Empty)).collect();
    assert_eq!(there.iter().filter(|there| **there).count(), HANDSHAKES);
    assert!(there[999 - HANDSHAKES..].iter().all(|there| *there), "the newest are there");
    for (number, _) in &others {
        remote.end(*number);
    }
    assert!(remote.handshakes.borrow().is_empty());
    let (a, b, c) = ("2001:db8:0:1::1", "2001:db8:0:1:ffff::9", "2001:db8:0:2::1");
    let [a, b, c] = [a, b, c].map(|text| network(text.parse().unwrap()));
    assert!(a == b && a != c);
}

#[test]
fn an_operator_has_so_many_conversations_and_so_many_requests() {
    let (remote, ..) = door();
    let ann = &remote.operators[0];
    let mut visits: Vec<_> = (0..CONVERSATIONS_OF_ONE).map(|_| Visit::new(ann, &remote.conversations)).collect();
    assert!(visits.iter().all(|visit| visit.too_much().is_none()));
    let over = Visit::new(ann, &remote.conversations);
    assert!(over.too_much().unwrap().contains("ann has 8 conversations"));
    drop(over);
    visits.clear();
    assert_eq!((ann.open.get(), remote.conversations.get()), (0, 0));
    let visit = Visit::new(ann, &remote.conversations);
    let taken = (0..1000).filter(|_| visit.too_much().is_none()).count();
    assert!((90..120).contains(&taken), "{taken}");
    assert!(visit.too_much().unwrap().contains("requests a second"));
}

#[test]
fn operators_are_read_as_they_are_handed_over() {
    let (one, other) = (Key::make().unwrap().public(), Key::make().unwrap().public());
    let read = operators_of(&format!("ann={one} nonsense bob={other} eve=ed25519:x"));
    assert_eq!(read, [("ann".to_owned(), one), ("bob".to_owned(), other)]);
    assert!(operators_of("").is_empty());
}

proptest! {
    #[test]
    fn a_pace_never_gives_more_than_its_bound(steps in proptest::collection::vec(0..500_u64, 1..200), most in 1..20_u32, each in 1..50_u32) {
        let start = Instant::now();
        let mut pace = Pace::new((most, each), start);
        let (mut now, mut taken) = (start, 0_u32);
        for step in steps {
            now += Duration::from_millis(step);
            match pace.take(now) {
                Ok(()) => taken += 1,
                Err(wait) => prop_assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1)),
            }
            let bound = f64::from(most) + (now - start).as_secs_f64() * f64::from(each);
            prop_assert!(f64::from(taken) <= bound + 1e-6);
        }
    }
}
