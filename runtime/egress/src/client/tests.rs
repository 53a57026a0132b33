//! Against servers on the loopback, which every list here has to name literally: there is no other way to it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;
use http::{HeaderMap, Version, header};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::service::service_fn;
use hyper_util::rt::TokioExecutor;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

type ServerBody = UnsyncBoxBody<Bytes, Infallible>;

/// Names with the answers they give, one look-up after the other; the last stays.
#[derive(Default)]
struct Names {
    answers: Mutex<HashMap<String, Vec<Vec<IpAddr>>>>,
    asked: AtomicUsize,
}

impl Names {
    fn of(all: &[(&str, &[&[&str]])]) -> Arc<Self> {
        let parse = |a: &&[&str]| a.iter().map(|a| a.parse().unwrap()).collect::<Vec<IpAddr>>();
        let answers = all.iter().map(|(name, a)| ((*name).to_owned(), a.iter().map(parse).collect())).collect();
        Arc::new(Self { answers: Mutex::new(answers), asked: AtomicUsize::new(0) })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Resolve for Names {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, resolve::Error>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut answers = self.answers.lock().unwrap();
        let answer = answers.get_mut(name).map(|all| if all.len() > 1 { all.remove(0) } else { all[0].clone() });
        Box::pin(std::future::ready(answer.ok_or(resolve::Error::NotFound)))
    }
}

/// What a server was sent.
#[derive(Debug, Clone)]
struct Seen {
    version: Version,
    uri: String,
    headers: HeaderMap,
}

#[derive(Default)]
struct Log {
    connections: AtomicUsize,
    closed: AtomicUsize,
    seen: Mutex<Vec<Seen>>,
    produced: AtomicU64,
    read: AtomicU64,
    names: Mutex<Vec<Option<String>>>,
}

/// A server that does what the path says.
struct Server {
    address: SocketAddr,
    log: Arc<Log>,
    /// In PEM, of the authority that signed its certificate.
    root: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Speaks {
    Clear,
    Http1,
    Http2,
    Tls12,
}

impl Server {
    async fn start(speaks: Speaks, names: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (root, config) = certificate(speaks, names);
        let log = Arc::new(Log::default());
        let kept = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (log, config) = (Arc::clone(&kept), Arc::clone(&config));
                log.connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    serve(stream, speaks, config, &log).await;
                    log.closed.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        Self { address, log, root }
    }

    fn port(&self) -> u16 {
        self.address.port()
    }

    fn connections(&self) -> usize {
        self.log.connections.load(Ordering::Relaxed)
    }

    fn last(&self) -> Seen {
        self.log.seen.lock().unwrap().last().unwrap().clone()
    }

    /// The name and the literal address, both with the port.
    fn sites(&self, name: &str) -> Vec<Site> {
        sites(&[&format!("{name}:{}", self.port()), &format!("127.0.0.1:{}", self.port())])
    }
}

fn sites(all: &[&str]) -> Vec<Site> {
    all.iter().map(|s| Site::parse(s).unwrap()).collect()
}

fn certificate(speaks: Speaks, names: &[&str]) -> (String, Arc<ServerConfig>) {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = authority.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    let versions: &[_] = match speaks {
        Speaks::Tls12 => &[&rustls::version::TLS12],
        _ => &[&rustls::version::TLS13, &rustls::version::TLS12],
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    if speaks == Speaks::Http2 {
        config.alpn_protocols = vec![b"h2".to_vec()];
    }
    (root.pem(), Arc::new(config))
}

async fn serve(stream: TcpStream, speaks: Speaks, config: Arc<ServerConfig>, log: &Arc<Log>) {
    let for_service = Arc::clone(log);
    let service = service_fn(move |request| answer(request, Arc::clone(&for_service)));
    let http1 = hyper::server::conn::http1::Builder::new();
    if speaks == Speaks::Clear {
        let _ = http1.serve_connection(TokioIo::new(stream), service).await;
        return;
    }
    let Ok(stream) = TlsAcceptor::from(config).accept(stream).await else { return };
    log.names.lock().unwrap().push(stream.get_ref().1.server_name().map(str::to_owned));
    let io = TokioIo::new(stream);
    let _ = match speaks {
        Speaks::Http2 => {
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder.serve_connection(io, service).await
        }
        _ => http1.serve_connection(io, service).await,
    };
}

async fn answer(request: Request<hyper::body::Incoming>, log: Arc<Log>) -> Result<Response<ServerBody>, Infallible> {
    let (version, headers) = (request.version(), request.headers().clone());
    let uri = request.uri().to_string();
    log.seen.lock().unwrap().push(Seen { version, uri, headers });
    if request.method() == Method::HEAD {
        let response = Response::builder().header(header::CONTENT_LENGTH, "5");
        return Ok(response.body(Empty::new().boxed_unsync()).unwrap());
    }
    let full = |text: &'static str| Full::new(Bytes::from_static(text.as_bytes())).boxed_unsync();
    let path = request.uri().path().to_owned();
    let mut response = Response::new(match path.as_str() {
        "/never" => return std::future::pending().await,
        "/stall" => {
            let first = stream::iter([Ok(Frame::data(Bytes::from_static(b"x")))]);
            StreamBody::new(futures_util::StreamExt::chain(first, stream::pending())).boxed_unsync()
        }
        "/endless" => {
            let piece = Bytes::from(vec![0; 16 * 1024]);
            let pieces = stream::repeat_with(move || {
                log.produced.fetch_add(piece.len() as u64, Ordering::Relaxed);
                Ok(Frame::data(piece.clone()))
            });
            StreamBody::new(pieces).boxed_unsync()
        }
        "/echo" => {
            let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            Full::new(body).boxed_unsync()
        }
        "/empty" => Empty::new().boxed_unsync(),
        "/early" => {
            // Answers, and keeps the request's body without reading it.
            tokio::spawn(async move {
                let _body = request.into_body();
                std::future::pending::<()>().await;
            });
            full("early")
        }
        "/early-and-reads" => {
            tokio::spawn(async move {
                let mut body = request.into_body();
                tokio::time::sleep(Duration::from_millis(50)).await;
                while let Some(Ok(frame)) = body.frame().await {
                    log.read.fetch_add(frame.data_ref().map_or(0, |d| d.len() as u64), Ordering::Relaxed);
                }
            });
            full("early")
        }
        _ => full("hello"),
    });
    match path.as_str() {
        "/redirect" => {
            *response.status_mut() = StatusCode::FOUND;
            let location = "http://169.254.169.254/latest/meta-data".parse().unwrap();
            response.headers_mut().insert(header::LOCATION, location);
        }
        "/large" => {
            response.headers_mut().insert("x-large", "a".repeat(40_000).parse().unwrap());
        }
        "/many" => (0..200).for_each(|n| {
            let name = header::HeaderName::try_from(format!("x-{n}")).unwrap();
            response.headers_mut().insert(name, header::HeaderValue::from_static("1"));
        }),
        "/close" => {
            response.headers_mut().insert(header::CONNECTION, "close".parse().unwrap());
        }
        _ => {}
    }
    Ok(response)
}

/// A server that reads a request's head and says what it is told to.
async fn raw(answers: &'static [&'static str]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    address
}

fn egress(names: &Arc<Names>, root: &str, sites: Vec<Site>) -> Egress {
    with_bounds(names, root, sites, Bounds::default())
}

fn with_bounds(names: &Arc<Names>, root: &str, sites: Vec<Site>, bounds: Bounds) -> Egress {
    let resolver: Arc<dyn Resolve> = Arc::<Names>::clone(names);
    Egress::new(&Shared::new(resolver, roots(root).unwrap(), 100, 50).unwrap(), sites, bounds)
}

fn short() -> Timeouts {
    let limit = Duration::from_secs(20);
    Timeouts { connect: limit, first_byte: limit, between_bytes: limit }
}

fn get(uri: &str) -> Request<Empty<Bytes>> {
    Request::get(uri).body(Empty::new()).unwrap()
}

async fn text(response: Response<Incoming>) -> Result<String, Error> {
    Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().into()).unwrap())
}

async fn fetch(egress: &Egress, uri: &str) -> Result<String, Error> {
    text(egress.send(get(uri), short()).await?).await
}

/// Waits until something is so, which it is soon if all is well.
async fn until(what: &str, so: impl Fn() -> bool) {
    let waiting = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(Duration::from_secs(20), waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

const LOOPBACK: &[&[&str]] = &[&["127.0.0.1"]];

#[tokio::test]
async fn what_a_name_stands_for_is_filtered() {
    let server = Server::start(Speaks::Clear, &[]).await;
    for (addresses, refused) in [
        (&["127.0.0.1"][..], Some("loopback")),
        (&["::1"], Some("loopback")),
        (&["0.0.0.0"], Some("unspecified")),
        (&["10.1.2.3", "192.168.0.1"], Some("private")),
        (&["169.254.169.254"], Some("link-local")),
        (&["fd00:ec2::254"], Some("unique local")),
        (&["100.64.0.1"], Some("carrier-grade NAT")),
        (&["::ffff:127.0.0.1"], Some("IPv4-mapped")),
        (&["64:ff9b::7f00:1"], Some("an embedded IPv4 address")),
        (&["64:ff9b::a9fe:a9fe"], Some("an embedded IPv4 address")),
        (&["2002:7f00:1::1"], Some("an embedded IPv4 address")),
        (&["224.0.0.1"], Some("multicast")),
        (&["203.0.113.1"], Some("documentation")),
    ] {
        let names = Names::of(&[("api.example", &[addresses])]);
        let uri = format!("http://api.example:{}/", server.port());
        let egress = egress(&names, "", sites(&[&format!("api.example:{}", server.port())]));
        let error = fetch(&egress, &uri).await.unwrap_err();
        assert_eq!(error.code(), "HTTP-request-denied", "{addresses:?}: {error}");
        assert!(error.to_string().ends_with(refused.unwrap()), "{addresses:?}: {error}");
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn a_name_that_is_not_listed_is_not_even_asked_for() {
    let names = Names::of(&[("api.example", LOOPBACK)]);
    let egress = egress(&names, "", sites(&["https://api.example", "*.api.example"]));
    for uri in ["http://api.example/", "https://api.example:444/", "https://xn--api-.example/", "https://10.0.0.1/"] {
        assert_eq!(fetch(&egress, uri).await.unwrap_err().code(), "HTTP-request-denied", "{uri}");
    }
    assert_eq!(names.asked(), 0);
}

#[tokio::test]
async fn only_a_literal_entry_opens_an_address_that_is_refused() {
    let server = Server::start(Speaks::Clear, &[]).await;
    let port = server.port();
    let names = Names::of(&[("api.example", LOOPBACK), ("other.example", LOOPBACK)]);
    for (list, uri, reached) in [
        (&[format!("127.0.0.1:{port}")][..], format!("http://127.0.0.1:{port}/"), true),
        (&[format!("127.0.0.1:{port}")], format!("http://api.example:{port}/"), false),
        (&[format!("api.example:{port}")], format!("http://127.0.0.1:{port}/"), false),
        (&[format!("api.example:{port}")], format!("http://api.example:{port}/"), false),
        (&[format!("api.example:{port}"), format!("127.0.0.1:{port}")], format!("http://api.example:{port}/"), true),
        (&[format!("api.example:{port}"), format!("127.0.0.1:{port}")], format!("http://other.example:{port}/"), false),
        (&[format!("api.example:{port}"), "127.0.0.1".into()], format!("http://api.example:{port}/"), false),
        (
            &[format!("api.example:{port}"), format!("https://127.0.0.1:{port}")],
            format!("http://api.example:{port}/"),
            false,
        ),
        (&[format!("api.example:{port}"), format!("127.0.0.2:{port}")], format!("http://api.example:{port}/"), false),
        (&[format!("127.0.0.1:{port}")], format!("http://[::ffff:127.0.0.1]:{port}/"), false),
        (&[format!("127.0.0.1:{port}")], format!("http://2130706433:{port}/"), false),
        (&[format!("127.0.0.1:{port}")], format!("http://0x7f.1:{port}/"), false),
        (&[format!("127.0.0.1:{port}")], format!("http://user@127.0.0.1:{port}/"), false),
    ] {
        let list: Vec<&str> = list.iter().map(String::as_str).collect();
        let got = fetch(&egress(&names, "", sites(&list)), &uri).await;
        match got {
            Ok(text) => assert!(reached && text == "hello", "{list:?} {uri}"),
            Err(error) => assert!(!reached && error.code() == "HTTP-request-denied", "{list:?} {uri}: {error}"),
        }
    }
}

#[tokio::test]
async fn an_address_of_ipv6_is_reached_by_its_literal_entry() {
    // Where the loopback has no IPv6 there is nothing to reach.
    let Ok(listener) = TcpListener::bind("[::1]:0").await else { return };
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(|request| answer(request, Arc::default()));
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    });
    let egress = egress(&Names::of(&[]), "", sites(&[&address.to_string()]));
    assert_eq!(fetch(&egress, &format!("http://[0:0::1]:{}/", address.port())).await.unwrap(), "hello");
}

#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_used() {
    let server = Server::start(Speaks::Clear, &[]).await;
    // Each look-up gives another answer, as a name does whose owner means harm.
    let names = Names::of(&[("api.example", &[&["127.0.0.1"], &["169.254.169.254"], &["10.0.0.1", "127.0.0.1"]])]);
    let bounds = Bounds { kept: 0, ..Bounds::default() };
    let egress = with_bounds(&names, "", server.sites("api.example"), bounds);
    let uri = format!("http://api.example:{}/", server.port());
    assert_eq!(fetch(&egress, &uri).await.unwrap(), "hello");
    assert_eq!(names.asked(), 1, "one look-up for a connection");
    assert!(matches!(fetch(&egress, &uri).await, Err(Error::Denied(Denied::Address { .. }))));
    assert_eq!(fetch(&egress, &uri).await.unwrap(), "hello", "of several, one that may be used");
    assert_eq!((names.asked(), server.connections()), (3, 2));
}

#[tokio::test]
async fn the_next_address_is_tried_when_one_does_not_answer() {
    let server = Server::start(Speaks::Clear, &[]).await;
    let port = server.port();
    let names = Names::of(&[("api.example", &[&["127.0.0.2", "127.0.0.1"]]), ("down.example", &[&["127.0.0.2"]])]);
    let list = ["*.example", "127.0.0.1", "127.0.0.2", "down.example"].map(|s| format!("{s}:{port}"));
    let egress = egress(&names, "", sites(&list.each_ref().map(String::as_str)));
    let down = fetch(&egress, &format!("http://down.example:{port}/")).await.unwrap_err();
    assert_eq!((down.code(), &down), ("connection-refused", &Error::Connect(io::ErrorKind::ConnectionRefused)));
    assert_eq!(fetch(&egress, &format!("http://api.example:{port}/")).await.unwrap(), "hello");
    let unknown = fetch(&egress, &format!("http://unknown.example:{port}/")).await.unwrap_err();
    assert_eq!(unknown.code(), "DNS-error");
}

#[tokio::test]
async fn a_redirect_is_an_answer_like_others() {
    let server = Server::start(Speaks::Clear, &[]).await;
    let names = Names::of(&[("api.example", LOOPBACK)]);
    let egress = egress(&names, "", server.sites("api.example"));
    let response = egress.send(get(&format!("http://api.example:{}/redirect", server.port())), short()).await.unwrap();
    assert_eq!(response.status(), 302);
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    assert_eq!(fetch(&egress, &location).await.unwrap_err().code(), "HTTP-request-denied", "the next hop is checked");
    assert_eq!(server.log.seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn the_host_is_the_addresss_under_both_versions() {
    for speaks in [Speaks::Clear, Speaks::Http1, Speaks::Http2, Speaks::Tls12] {
        let server = Server::start(speaks, &["api.example"]).await;
        let port = server.port();
        let names = Names::of(&[("api.example", LOOPBACK)]);
        let egress = egress(&names, &server.root, server.sites("api.example"));
        let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
        let request = Request::post(format!("{scheme}://API.example.:{port}/echo?q=1"))
            .header("host", "evil.example")
            .header("connection", "upgrade, x")
            .header("upgrade", "websocket")
            .header("transfer-encoding", "identity")
            .header("proxy-authorization", "x")
            .header("x-own", "1")
            .body(Full::new(Bytes::from_static(b"body")))
            .unwrap();
        let response = egress.send(request, short()).await.unwrap();
        assert_eq!(text(response).await.unwrap(), "body");
        let seen = server.last();
        match speaks {
            Speaks::Http2 => {
                assert_eq!(seen.version, Version::HTTP_2);
                assert_eq!(seen.uri, format!("https://api.example:{port}/echo?q=1"));
                assert!(!seen.headers.contains_key("host"));
            }
            _ => {
                assert_eq!(seen.version, Version::HTTP_11);
                assert_eq!(seen.uri, "/echo?q=1", "never in absolute form");
                let hosts: Vec<_> = seen.headers.get_all("host").iter().collect();
                assert_eq!(hosts, [&format!("api.example:{port}")]);
            }
        }
        assert_eq!(seen.headers["x-own"], "1");
        for gone in ["connection", "upgrade", "transfer-encoding", "proxy-authorization"] {
            assert!(!seen.headers.contains_key(gone), "{gone}");
        }
        if speaks != Speaks::Clear {
            assert_eq!(*server.log.names.lock().unwrap(), [Some("api.example".to_owned())], "SNI");
        }
    }
}

#[tokio::test]
async fn a_certificate_must_be_of_the_host_and_of_a_trusted_authority() {
    let server = Server::start(Speaks::Http1, &["api.example", "127.0.0.1"]).await;
    let port = server.port();
    let names = Names::of(&[("api.example", LOOPBACK), ("other.example", LOOPBACK)]);
    let list = format!("*.example:{port} 127.0.0.1:{port}");
    let list = || sites(&list.split(' ').collect::<Vec<_>>());
    let trusting = egress(&names, &server.root, list());
    assert_eq!(fetch(&trusting, &format!("https://api.example:{port}/")).await.unwrap(), "hello");
    assert_eq!(fetch(&trusting, &format!("https://127.0.0.1:{port}/")).await.unwrap(), "hello", "an address in it");
    assert_eq!(*server.log.names.lock().unwrap(), [Some("api.example".to_owned()), None], "addresses are no SNI");
    let other = fetch(&trusting, &format!("https://other.example:{port}/")).await.unwrap_err();
    assert_eq!(other.code(), "TLS-certificate-error", "{other}");
    let strict = egress(&names, "", list());
    let unknown = fetch(&strict, &format!("https://api.example:{port}/")).await.unwrap_err();
    assert_eq!(unknown.code(), "TLS-certificate-error", "{unknown}");
}

#[tokio::test]
async fn what_is_no_tls_is_said_so() {
    let address = raw(&["HTTP/1.1 400 Bad Request\r\n\r\n", "\u{15}\u{3}\u{3}\0\u{2}\u{2}\u{28}"]).await;
    let list = || sites(&[&format!("127.0.0.1:{}", address.port())]);
    let egress = egress(&Names::of(&[]), "", list());
    let uri = format!("https://127.0.0.1:{}/", address.port());
    assert_eq!(fetch(&egress, &uri).await.unwrap_err().code(), "TLS-protocol-error");
    let alert = fetch(&egress, &uri).await.unwrap_err();
    assert_eq!(alert, Error::TlsAlert { id: 40, name: "HandshakeFailure".into() });
}

#[test]
fn configured_authorities_are_read_or_told_why_not() {
    let built_in = roots("").unwrap().len();
    assert!(built_in > 100);
    let (root, _) = certificate(Speaks::Http1, &[]);
    assert_eq!(roots(&format!("# ours\n{root}\n{root}")).unwrap().len(), built_in + 2);
    assert_eq!(roots("no certificate").unwrap_err(), RootsError::Empty);
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(roots(&format!("{root}{broken}")), Err(RootsError::Certificate(2, _))));
    assert!(matches!(roots("-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----"), Err(RootsError::Pem(1, _))));
}

#[tokio::test]
async fn a_connection_is_used_again_by_its_brane_alone() {
    for speaks in [Speaks::Clear, Speaks::Http1, Speaks::Http2] {
        let server = Server::start(speaks, &["api.example"]).await;
        let names = Names::of(&[("api.example", LOOPBACK)]);
        let resolver: Arc<dyn Resolve> = Arc::<Names>::clone(&names);
        let shared = Shared::new(resolver, roots(&server.root).unwrap(), 100, 50).unwrap();
        let [one, other] = [(); 2].map(|()| Egress::new(&shared, server.sites("api.example"), Bounds::default()));
        let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
        let uri = |path: &str| format!("{scheme}://api.example:{}{path}", server.port());
        for path in ["/", "/empty", "/", "/redirect", "/"] {
            fetch(&one, &uri(path)).await.unwrap();
        }
        let head = Request::head(uri("/")).body(Empty::<Bytes>::new()).unwrap();
        assert_eq!(text(one.send(head, short()).await.unwrap()).await.unwrap(), "", "HEAD");
        fetch(&one, &uri("/")).await.unwrap();
        assert_eq!((server.connections(), names.asked(), one.kept()), (1, 1, 1));
        fetch(&other, &uri("/")).await.unwrap();
        assert_eq!((server.connections(), other.kept()), (2, 1), "another brane has its own");
        if speaks != Speaks::Http2 {
            fetch(&other, &uri("/close")).await.unwrap();
            until("a server that closes is taken at its word", || other.open() == 0).await;
        }
        let closed = server.log.closed.load(Ordering::Relaxed);
        drop(one);
        until("the brane's connections are closed", || server.log.closed.load(Ordering::Relaxed) > closed).await;
    }
}

#[tokio::test]
async fn connections_of_http2_are_shared_up_to_a_number_of_streams() {
    let server = Server::start(Speaks::Http2, &["api.example"]).await;
    let names = Names::of(&[("api.example", LOOPBACK)]);
    let egress = egress(&names, &server.root, server.sites("api.example"));
    let uri = |path: &str| format!("https://api.example:{}{path}", server.port());
    fetch(&egress, &uri("/")).await.unwrap();
    let mut unread = Vec::new();
    for _ in 0..STREAMS {
        unread.push(egress.send(get(&uri("/endless")), short()).await.unwrap());
    }
    assert_eq!(server.connections(), 1);
    fetch(&egress, &uri("/")).await.unwrap();
    assert_eq!(server.connections(), 2, "one more gets a connection that unread answers cannot stop");
    for response in &mut unread {
        let frame = response.body_mut().frame().await.unwrap().unwrap();
        assert!(!frame.into_data().unwrap().is_empty());
    }
    drop(unread);
    fetch(&egress, &uri("/")).await.unwrap();
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn what_is_kept_is_bounded_in_number_and_time() {
    let server = Server::start(Speaks::Clear, &[]).await;
    let names = Names::of(&[("a.example", LOOPBACK), ("b.example", LOOPBACK), ("c.example", LOOPBACK)]);
    let resolver: Arc<dyn Resolve> = Arc::<Names>::clone(&names);
    let shared = Shared::new(resolver, roots("").unwrap(), 100, 3).unwrap();
    let bounds = Bounds { kept: 2, kept_for: Duration::from_secs(1), ..Bounds::default() };
    let [one, other] = [(); 2].map(|()| Egress::new(&shared, server.sites("*.example"), bounds));
    let uri = |host: &str| format!("http://{host}.example:{}/", server.port());
    for host in ["a", "b", "c"] {
        fetch(&one, &uri(host)).await.unwrap();
    }
    assert_eq!(one.kept(), 2, "the brane's bound");
    fetch(&one, &uri("b")).await.unwrap();
    assert_eq!(server.connections(), 3, "the longest idle went, the others are used");
    fetch(&other, &uri("a")).await.unwrap();
    fetch(&other, &uri("b")).await.unwrap();
    assert_eq!((one.kept(), other.kept()), (2, 1), "the worker's bound");
    until("none is kept", || one.kept() + other.kept() == 0).await;
    until("all are closed", || server.log.closed.load(Ordering::Relaxed) == server.connections()).await;
    assert_eq!((one.open(), other.open()), (0, 0));
}

#[tokio::test]
async fn a_brane_has_no_more_connections_than_it_may() {
    let server = Server::start(Speaks::Clear, &[]).await;
    let names = Names::of(&[("a.example", LOOPBACK), ("b.example", LOOPBACK)]);
    let bounds = Bounds { connections: 2, ..Bounds::default() };
    let egress = with_bounds(&names, "", server.sites("*.example"), bounds);
    let uri = |host: &str, path: &str| format!("http://{host}.example:{}{path}", server.port());
    let first = egress.send(get(&uri("a", "/stall")), short()).await.unwrap();
    fetch(&egress, &uri("b", "/")).await.unwrap();
    assert_eq!((egress.open(), egress.kept()), (2, 1));
    let second = egress.send(get(&uri("a", "/stall")), short()).await.unwrap();
    assert_eq!((egress.open(), egress.kept()), (2, 0), "an idle one makes way");
    assert_eq!(fetch(&egress, &uri("a", "/")).await, Err(Error::ConnectionLimit));
    drop((first, second));
    until("answers that nobody wants end their connections", || egress.open() == 0).await;
    fetch(&egress, &uri("a", "/")).await.unwrap();
}

#[tokio::test]
async fn waiting_ends() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for speaks in [Speaks::Clear, Speaks::Http2] {
        let server = Server::start(speaks, &["127.0.0.1"]).await;
        let list = [server.port(), silent.local_addr().unwrap().port()].map(|p| format!("127.0.0.1:{p}"));
        let egress = egress(&Names::of(&[]), &server.root, sites(&list.each_ref().map(String::as_str)));
        let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
        let uri = |path: &str| format!("{scheme}://127.0.0.1:{}{path}", server.port());
        let soon = Duration::from_millis(50);
        let late = Timeouts { connect: soon, ..short() };
        let silent = format!("https://{}/", silent.local_addr().unwrap());
        let error = egress.send(get(&silent), late).await.unwrap_err();
        assert_eq!((error.code(), &error), ("connection-timeout", &Error::ConnectTimeout), "TLS counts");
        let late = Timeouts { first_byte: soon, ..short() };
        let error = egress.send(get(&uri("/never")), late).await.unwrap_err();
        assert_eq!((error.code(), &error), ("HTTP-response-timeout", &Error::FirstByteTimeout));
        let late = Timeouts { between_bytes: soon, ..short() };
        let error = text(egress.send(get(&uri("/stall")), late).await.unwrap()).await.unwrap_err();
        assert_eq!((error.code(), &error), ("connection-read-timeout", &Error::BetweenBytesTimeout));
        until("nothing is left open", || egress.open() == 0).await;
        let longest = Duration::MAX;
        let longest = Timeouts { connect: longest, first_byte: longest, between_bytes: longest };
        assert_eq!(text(egress.send(get(&uri("/")), longest).await.unwrap()).await.unwrap(), "hello");
    }
}

#[tokio::test]
async fn an_answer_that_nobody_reads_is_not_gathered() {
    for (speaks, most) in [(Speaks::Clear, u64::MAX), (Speaks::Http2, u64::from(WINDOW) * 2)] {
        let server = Server::start(speaks, &["127.0.0.1"]).await;
        let list = sites(&[&format!("127.0.0.1:{}", server.port())]);
        let egress = egress(&Names::of(&[]), &server.root, list);
        let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
        let uri = format!("{scheme}://127.0.0.1:{}/endless", server.port());
        let mut response = egress.send(get(&uri), short()).await.unwrap();
        // The server writes until nobody takes more: the sockets' buffers, and what the client may hold.
        let produced = || server.log.produced.load(Ordering::Relaxed);
        let mut before = 0;
        timeout(Duration::from_secs(20), async {
            while produced() != before {
                before = produced();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
        .await
        .expect("the server is stopped");
        assert!(produced() < most.min(32 << 20), "{}", produced());
        // Pieces are no larger than the buffers, and reading lets the server go on.
        let mut got = 0;
        while got <= before {
            let piece = response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap();
            assert!(piece.len() <= BUFFER, "{}", piece.len());
            got += piece.len() as u64;
        }
    }
}

#[tokio::test]
async fn a_request_that_the_server_does_not_read_is_not_gathered() {
    for speaks in [Speaks::Clear, Speaks::Http2] {
        let server = Server::start(speaks, &["127.0.0.1"]).await;
        let bounds = Bounds { kept_for: Duration::from_millis(100), ..Bounds::default() };
        let list = sites(&[&format!("127.0.0.1:{}", server.port())]);
        let egress = with_bounds(&Names::of(&[]), &server.root, list, bounds);
        let taken = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&taken);
        let pieces = stream::repeat_with(move || {
            count.fetch_add(16 * 1024, Ordering::Relaxed);
            Ok::<_, Infallible>(Frame::data(Bytes::from(vec![0; 16 * 1024])))
        });
        let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
        let request = Request::post(format!("{scheme}://127.0.0.1:{}/never", server.port()));
        let sending = tokio::spawn(egress.send(request.body(StreamBody::new(pieces)).unwrap(), short()));
        until("the body has begun", || taken.load(Ordering::Relaxed) > 0).await;
        let mut before = 0;
        while taken.load(Ordering::Relaxed) != before {
            before = taken.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(before < 32 << 20, "{before}");
        assert_eq!(egress.open(), 1);
        sending.abort();
        until("whoever gives up takes the connection with it", || egress.open() == 0).await;
        until("and its body", || Arc::strong_count(&taken) == 1).await;
    }
}

#[tokio::test]
async fn an_early_answer_does_not_cut_off_the_request() {
    early(Speaks::Clear).await;
    early(Speaks::Http2).await;
}

async fn early(speaks: Speaks) {
    // The second is more than all buffers on the way hold.
    const READ: u64 = 8 << 20;
    const UNREAD: u64 = 64 << 20;
    let server = Server::start(speaks, &["127.0.0.1"]).await;
    let list = sites(&[&format!("127.0.0.1:{}", server.port())]);
    let bounds = Bounds { stall: Duration::from_secs(1), ..Bounds::default() };
    let egress = with_bounds(&Names::of(&[]), &server.root, list, bounds);
    let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
    let uri = |path: &str| format!("{scheme}://127.0.0.1:{}{path}", server.port());
    let post = |path: &str, size: u64, taken: Arc<AtomicU64>| {
        let pieces = (0..size / (16 * 1024)).map(move |_| {
            taken.fetch_add(16 * 1024, Ordering::Relaxed);
            Ok::<_, Infallible>(Frame::data(Bytes::from(vec![0; 16 * 1024])))
        });
        let request = Request::post(uri(path)).body(StreamBody::new(stream::iter(pieces))).unwrap();
        egress.send(request, short())
    };
    let taken = Arc::new(AtomicU64::new(0));
    let answer = post("/early-and-reads", READ, Arc::clone(&taken)).await.unwrap();
    assert_eq!(text(answer).await.unwrap(), "early");
    until("all of the request arrives", || server.log.read.load(Ordering::Relaxed) == READ).await;
    until("its connection is free", || Arc::strong_count(&taken) == 1).await;
    assert_eq!((egress.open(), egress.kept()), (1, 1));
    // One that is never read holds its place until it is given up, and then nobody is sent there.
    let taken = Arc::new(AtomicU64::new(0));
    assert_eq!(text(post("/early", UNREAD, Arc::clone(&taken)).await.unwrap()).await.unwrap(), "early");
    until("it is given up", || Arc::strong_count(&taken) == 1).await;
    assert!(taken.load(Ordering::Relaxed) < UNREAD);
    until("with its connection", || egress.open() == 0).await;
    assert_eq!((egress.kept(), server.connections()), (0, 1));
    assert_eq!(fetch(&egress, &uri("/")).await.unwrap(), "hello");
    // So is one whose answer nobody wants.
    let taken = Arc::new(AtomicU64::new(0));
    drop(post("/early", UNREAD, Arc::clone(&taken)).await.unwrap());
    until("it is given up at once", || Arc::strong_count(&taken) == 1 && egress.open() == 0).await;
}

#[tokio::test]
async fn a_server_that_stops_reading_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bounds = Bounds { stall: Duration::from_millis(200), ..Bounds::default() };
    let egress = with_bounds(&Names::of(&[]), "", sites(&[&address.to_string()]), bounds);
    let pieces = stream::repeat_with(|| Ok::<_, Infallible>(Frame::data(Bytes::from(vec![0; 16 * 1024]))));
    let request = Request::post(format!("http://{address}/")).body(StreamBody::new(pieces)).unwrap();
    let error = egress.send(request, short()).await.unwrap_err();
    assert_eq!((error.code(), &error), ("connection-write-timeout", &Error::WriteTimeout));
    until("its connection is gone", || egress.open() == 0).await;
}

#[tokio::test]
async fn heads_are_bounded() {
    for speaks in [Speaks::Clear, Speaks::Http2] {
        let server = Server::start(speaks, &["127.0.0.1"]).await;
        let egress = egress(&Names::of(&[]), &server.root, sites(&[&format!("127.0.0.1:{}", server.port())]));
        let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
        let uri = |path: &str| format!("{scheme}://127.0.0.1:{}{path}", server.port());
        let error = fetch(&egress, &uri("/large")).await.unwrap_err();
        if speaks == Speaks::Http2 {
            // h2 resets the stream and does not say for what.
            assert_eq!(error.code(), "HTTP-protocol-error", "{error}");
        } else {
            assert_eq!(error.code(), "HTTP-response-header-section-size", "{error}");
            let error = fetch(&egress, &uri("/many")).await.unwrap_err();
            assert_eq!(error.code(), "HTTP-response-header-section-size", "{error}");
        }
    }
}

#[tokio::test]
async fn what_is_no_http_is_said_so() {
    for (answer, code) in [
        (&["HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"], "HTTP-upgrade-failed"),
        (&["SSH-2.0-OpenSSH_9.9\r\n"], "HTTP-protocol-error"),
        (&["HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"], "HTTP-protocol-error"),
        (&["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"], "HTTP-response-incomplete"),
        (&["HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc"], "HTTP-response-incomplete"),
        (&["HTTP/1.1 200"], "connection-terminated"),
        (&[""], "connection-terminated"),
    ] {
        let address = raw(answer).await;
        let egress = egress(&Names::of(&[]), "", sites(&[&address.to_string()]));
        let error = fetch(&egress, &format!("http://{address}/")).await.expect_err(answer[0]);
        assert_eq!(error.code(), code, "{answer:?}: {error}");
    }
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn an_answer_slipped_in_behind_another_is_nobodys() {
    const TWO: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    let address = raw(&[TWO, OK]).await;
    let egress = egress(&Names::of(&[]), "", sites(&[&address.to_string()]));
    let uri = format!("http://{address}/");
    assert_eq!(fetch(&egress, &uri).await.unwrap(), "ok");
    assert_eq!(fetch(&egress, &uri).await.unwrap(), "ok");
}

#[tokio::test]
async fn a_kept_connection_that_has_closed_meanwhile_costs_no_request() {
    let address = raw(&[OK, OK]).await;
    let egress = egress(&Names::of(&[]), "", sites(&[&address.to_string()]));
    for _ in 0..2 {
        let body = Full::new(Bytes::from_static(b"once"));
        let request = Request::post(format!("http://{address}/")).body(body).unwrap();
        assert_eq!(text(egress.send(request, short()).await.unwrap()).await.unwrap(), "ok");
    }
}

#[tokio::test]
async fn bodies_have_the_length_they_declare() {
    for speaks in [Speaks::Clear, Speaks::Http2] {
        let server = Server::start(speaks, &["127.0.0.1"]).await;
        let egress = egress(&Names::of(&[]), &server.root, sites(&[&format!("127.0.0.1:{}", server.port())]));
        let scheme = if speaks == Speaks::Clear { "http" } else { "https" };
        let uri = format!("{scheme}://127.0.0.1:{}/echo", server.port());
        let post = |method: &str, length: Option<&str>, pieces: &[&'static str]| {
            let frames: Vec<_> =
                pieces.iter().map(|p| Ok::<_, Infallible>(Frame::data(Bytes::from_static(p.as_bytes())))).collect();
            let request = Request::builder().method(method).uri(&uri);
            let request = length.into_iter().fold(request, |r, length| r.header("content-length", length));
            egress.send(request.body(StreamBody::new(stream::iter(frames))).unwrap(), short())
        };
        for (method, length, pieces, wanted) in [
            ("POST", None, &["ab", "cd"][..], Ok("abcd")),
            ("POST", Some("4"), &["ab", "cd"], Ok("abcd")),
            ("POST", None, &[], Ok("")),
            ("GET", None, &[], Ok("")),
            ("GET", None, &["ab", "cd"], Ok("abcd")),
            ("PUT", Some("5"), &["ab", "cd"], Err(Error::RequestBodySize(5))),
            ("PUT", Some("3"), &["ab", "cd"], Err(Error::RequestBodySize(3))),
            ("PUT", Some("x"), &["ab", "cd"], Err(Error::ContentLength)),
        ] {
            let got = match post(method, length, pieces).await {
                Ok(response) => text(response).await,
                Err(error) => Err(error),
            };
            assert_eq!(got, wanted.map(str::to_owned), "{method} {length:?} {pieces:?} {}", speaks == Speaks::Http2);
        }
        let seen = server.log.seen.lock().unwrap();
        let empty_get = seen.iter().find(|s| !s.headers.contains_key("content-length")).is_some();
        assert!(empty_get);
    }
}

#[tokio::test]
async fn a_guest_that_breaks_its_body_off_is_told_so() {
    let server = Server::start(Speaks::Clear, &[]).await;
    let egress = egress(&Names::of(&[]), "", sites(&[&format!("127.0.0.1:{}", server.port())]));
    let frames = [Ok(Frame::data(Bytes::from_static(b"a"))), Err(io::Error::other("dropped"))];
    let request = Request::post(format!("http://127.0.0.1:{}/echo", server.port()));
    let error = egress.send(request.body(StreamBody::new(stream::iter(frames))).unwrap(), short()).await.unwrap_err();
    assert_eq!(error, Error::RequestBody("dropped".into()));
}

#[tokio::test]
async fn a_tunnel_is_refused() {
    let egress = egress(&Names::of(&[]), "", sites(&["127.0.0.1:1"]));
    let request = Request::builder().method("CONNECT").uri("http://127.0.0.1:1/").body(Empty::new()).unwrap();
    let error = egress.send(request, short()).await.unwrap_err();
    assert_eq!((error.code(), error.to_string().as_str()), ("HTTP-request-denied", "method \"CONNECT\""));
}

#[test]
fn what_is_given_to_the_worker_can_move_between_threads() {
    fn sends(_: &impl Send) {}
    let egress = egress(&Names::of(&[]), "", vec![]);
    sends(&egress);
    sends(&egress.send(get("http://example.org"), Timeouts::default()));
}
