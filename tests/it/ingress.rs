//! HTTP/2 and TLS on the way in: by `gaia run`, which needs no virtual machine, and once on the appliance.

use std::future::{Future, poll_fn};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream as Plain};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use gaia_tests::workstation::{Folder, Run};
use gaia_tests::{ANSWER_WITHIN, Appliance, SECURE_PORT, Setup, http as plain};
use h2::client::SendRequest;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use rustix::process::{Pid, Signal};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const WITHIN: Duration = Duration::from_secs(20);

const GRAPH: &str = r#"
[brane.hello]
image = "file:./hello.wasm"
replicas = 8

[brane.counter]
image = "file:./counter.wasm"
replicas = 8

[brane.mirror]
image = "file:./mirror.wasm"
replicas = 8
limits = { deadline = "30s" }

[brane.faulty]
image = "file:./faulty.wasm"
replicas = 8
limits = { deadline = "2s" }

[brane.wait]
image = "file:./wait.wasm"
replicas = 8
limits = { deadline = "90s" }
[brane.wait.capability]
"clock" = { resolution = "ms" }

[brane.late]
image = "file:./wait.wasm"
replicas = 8
limits = { deadline = "500ms" }
[brane.late.capability]
"clock" = { resolution = "ms" }
"#;

pub(crate) fn block<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work)
}

/// One HTTP/2 connection, and how it ends.
pub(crate) struct Client {
    requests: SendRequest<Bytes>,
    over: JoinHandle<Result<(), h2::Error>>,
}

impl Client {
    pub(crate) async fn of(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let mut builder = h2::client::Builder::new();
        // Room for all streams together, so that it is each stream's own that runs out; and no more streams than a server
        // must take before it has said how many it does.
        builder.initial_connection_window_size(1 << 20).initial_max_send_streams(100);
        let (requests, connection) = builder.handshake(stream).await.unwrap();
        Self { requests, over: tokio::spawn(connection) }
    }

    pub(crate) async fn connect(port: u16) -> Self {
        Self::of(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap()).await
    }

    async fn ask(&self, request: Request<()>, end: bool) -> (h2::client::ResponseFuture, SendStream<Bytes>) {
        let mut requests = self.requests.clone().ready().await.unwrap();
        requests.send_request(request, end).unwrap()
    }

    /// One request without a body, and its whole answer.
    pub(crate) async fn get(&self, path: &str) -> Result<Answer, h2::Error> {
        let (answer, _) = self.ask(get(path), true).await;
        whole(timeout(WITHIN, answer).await.unwrap()?).await
    }
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://appliance{path}")).version(Version::HTTP_2).body(()).unwrap()
}

fn post(path: &str) -> Request<()> {
    Request::post(format!("http://appliance{path}")).version(Version::HTTP_2).body(()).unwrap()
}

pub(crate) struct Answer {
    status: StatusCode,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

async fn whole(answer: Response<RecvStream>) -> Result<Answer, h2::Error> {
    let (head, mut stream) = answer.into_parts();
    let mut body = Vec::new();
    while let Some(piece) = timeout(WITHIN, stream.data()).await.unwrap() {
        let piece = piece?;
        stream.flow_control().release_capacity(piece.len())?;
        body.extend_from_slice(&piece);
    }
    Ok(Answer { status: head.status, body, trailers: timeout(WITHIN, stream.trailers()).await.unwrap()? })
}

/// Would miss: answers that are mixed up between streams, or an instance that serves two of them.
#[test]
fn many_streams_of_one_connection_are_each_answered_right() {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    block(async {
        let client = Client::connect(run.port).await;
        let all = join_all((0..400).map(async |n| {
            let path = match n % 4 {
                0 => "/hello".to_owned(),
                1 => "/counter".to_owned(),
                2 => format!("/mirror/{n}?q={n}"),
                _ => format!("/nothing/{n}"),
            };
            (n, client.get(&path).await.unwrap())
        }));
        for (n, answer) in all.await {
            let wanted = match n % 4 {
                0 => (200, "hello\n".to_owned()),
                1 => (200, "count 1\n".to_owned()),
                2 => {
                    let path = format!("/mirror/{n}?q={n}");
                    let from = "for=127.0.0.1;proto=http";
                    let text = format!("scheme http\nauthority appliance\npath {path}\nforwarded {from}\ncookie \n");
                    (200, text)
                }
                _ => (404, "no brane is served here\n".to_owned()),
            };
            assert_eq!((answer.status.as_u16(), answer.text()), wanted, "{n}");
        }
        drop(client.requests);
        timeout(WITHIN, client.over).await.unwrap().unwrap().unwrap();
    });
    // HTTP/1.1 is spoken on the same port.
    assert_eq!(run.get("/hello").unwrap().text(), "hello\n");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a broken answer that looks whole, or that takes its connection's other streams with it.
#[test]
fn a_broken_answer_resets_its_stream_and_no_other() {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    block(async {
        let client = Client::connect(run.port).await;
        let other = client.get("/wait?sleep_ms=2000&trickle_ms=10");
        let broken = async {
            let half = client.get("/faulty?how=half").await.err().unwrap();
            assert!(half.is_reset() && half.is_remote(), "{half}");
            assert_eq!(half.reason(), Some(Reason::INTERNAL_ERROR));
            // Its deadline passes in the middle.
            let late = client.get("/late?sleep_ms=60000&trickle_ms=10").await.err().unwrap();
            assert!(late.is_reset() && late.is_remote(), "{late}");
            // Nobody reads it, and the client goes on granting the others room.
            let began = Instant::now();
            let (unread, _) = client.ask(get("/faulty?how=stream"), true).await;
            let mut unread = unread.await.unwrap().into_body();
            let end = loop {
                match timeout(WITHIN, unread.data()).await.unwrap() {
                    Some(Ok(_)) => {}
                    Some(Err(e)) => break e,
                    None => panic!("an answer without an end has ended"),
                }
            };
            assert!(end.is_reset() && end.is_remote(), "{end}");
            let took = began.elapsed();
            assert!(took > Duration::from_millis(1900) && took < Duration::from_secs(6), "{took:?}");
        };
        let (other, ()) = tokio::join!(other, broken);
        assert_eq!(other.unwrap().body.len(), 200);
        assert_eq!(client.get("/hello").await.unwrap().text(), "hello\n", "the connection goes on");
    });
    let gone = |run: &Run| {
        let ps = run.ask("ps").unwrap();
        ps["branes"].as_array().unwrap().iter().all(|b| b["busy"] == 0 && b["waiting"] == 0)
    };
    let deadline = Instant::now() + WITHIN;
    while !gone(&run) {
        assert!(Instant::now() < deadline, "an instance is left");
    }
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: an answer that is buffered for a client that does not read, a request that is buffered for a guest that does
/// not, or trailers that are lost.
#[test]
fn bodies_stream_both_ways_and_wait_for_whoever_is_slower() {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    let sent: Vec<u8> = (0..4_000_000_u32).map(|n| n.to_le_bytes()[(n % 3) as usize]).collect();
    block(async {
        let client = Client::connect(run.port).await;
        let (answer, mut body) = client.ask(post("/mirror"), false).await;
        let mut left = Bytes::from(sent.clone());
        // As much as is taken while nobody reads the answer.
        while !left.is_empty() {
            body.reserve_capacity(left.len().min(16_384));
            match timeout(Duration::from_secs(1), poll_fn(|cx| body.poll_capacity(cx))).await {
                Ok(room) => body.send_data(left.split_to(room.unwrap().unwrap().min(left.len())), false).unwrap(),
                Err(_) => break,
            }
        }
        let taken = sent.len() - left.len();
        println!("{taken} bytes were taken before the answer was read");
        assert!((65_536..600_000).contains(&taken), "{taken} of {} bytes were taken", sent.len());
        // Another stream is served meanwhile.
        assert_eq!(client.get("/hello").await.unwrap().text(), "hello\n");
        let rest = async {
            while !left.is_empty() {
                body.reserve_capacity(left.len().min(16_384));
                let room = timeout(WITHIN, poll_fn(|cx| body.poll_capacity(cx))).await.unwrap().unwrap().unwrap();
                body.send_data(left.split_to(room.min(left.len())), false).unwrap();
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", "42".parse().unwrap());
            body.send_trailers(trailers).unwrap();
        };
        let read = async { whole(answer.await.unwrap()).await.unwrap() };
        let ((), read) = tokio::join!(rest, read);
        assert_eq!(read.status, 200);
        assert!(read.body == sent, "{} bytes came back, or others", read.body.len());
        assert_eq!(read.trailers.unwrap()["x-sum"], "42");
    });
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a deploy that cuts off what an HTTP/2 client has under way, or that a client is not told of.
#[test]
fn a_draining_worker_says_so_and_answers_what_is_under_way() {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&["--watch"]).unwrap().serving().unwrap();
    block(async {
        let client = Client::connect(run.port).await;
        assert_eq!(client.get("/hello").await.unwrap().text(), "hello\n");
        let (answer, _) = client.ask(get("/wait?sleep_ms=4000&trickle_ms=10"), true).await;
        let answer = answer.await.unwrap();
        folder.write(&GRAPH.replace("brane.counter", "brane.other")).unwrap();
        let read = tokio::spawn(whole(answer));
        // Requests are taken until the old worker has said that it goes, and none after that is lost without a word.
        let refused = loop {
            match client.requests.clone().ready().await {
                Err(e) => break e,
                Ok(mut requests) => match requests.send_request(get("/hello"), true) {
                    Err(e) => break e,
                    Ok((answer, _)) => match answer.await {
                        Ok(answer) => assert_eq!(whole(answer).await.unwrap().text(), "hello\n"),
                        Err(e) => break e,
                    },
                },
            }
        };
        assert!(!read.is_finished(), "the answer under way was over before the connection was");
        println!("refused: {refused}");
        assert!(refused.is_go_away() && refused.reason() == Some(Reason::NO_ERROR), "{refused:?}");
        assert_eq!(read.await.unwrap().unwrap().body.len(), 400);
        timeout(WITHIN, client.over).await.unwrap().unwrap().unwrap();
        let again = Client::connect(run.port).await;
        assert_eq!(again.get("/other").await.unwrap().text(), "count 1\n");
    });
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a request that goes to one brane by its authority and is shown to it as another's, a client that names
/// itself, or a head without bounds.
#[test]
fn what_a_head_says_is_checked_and_bounded() {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    block(async {
        let client = Client::connect(run.port).await;
        let ask = async |request: Request<()>| {
            let (answer, _) = client.ask(request, true).await;
            whole(timeout(WITHIN, answer).await.unwrap()?).await
        };
        let with = |name: &str, value: &str| {
            let mut request = get("/mirror");
            request.headers_mut().append(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
            request
        };
        assert_eq!(ask(with("host", "other.example")).await.unwrap().status, 400);
        assert_eq!(ask(with("host", "APPLIANCE")).await.unwrap().status, 200);
        let mut forged = with("forwarded", "for=10.0.0.1;proto=https");
        forged.headers_mut().append("cookie", "a=1".parse().unwrap());
        forged.headers_mut().append("cookie", "b=2".parse().unwrap());
        let told = ask(forged).await.unwrap().text();
        assert!(told.contains("\nforwarded for=127.0.0.1;proto=http\ncookie a=1; b=2\n"), "{told}");
        let connect = Request::builder().method(Method::CONNECT).uri("appliance:80").version(Version::HTTP_2);
        assert_eq!(ask(connect.body(()).unwrap()).await.unwrap().status, 501);
        assert_eq!(ask(with("x", &"x".repeat(20_000))).await.unwrap().status, 200);
        assert_eq!(ask(with("x", &"x".repeat(40_000))).await.unwrap().status, 431);
        assert_eq!(client.get("/hello").await.unwrap().text(), "hello\n", "the connection goes on");
        // A guest that writes a body where there must be none: it is not sent, and the connection is none the worse.
        let mut head = get("/hello");
        *head.method_mut() = Method::HEAD;
        let (answer, _) = client.ask(head, true).await;
        let answer = timeout(WITHIN, answer).await.unwrap().unwrap();
        assert_eq!((answer.status().as_u16(), answer.headers()["content-length"].to_str().unwrap()), (200, "6"));
        assert!(whole(answer).await.unwrap().body.is_empty());
        for status in [204, 304] {
            let answer = client.get(&format!("/mirror?status={status}")).await.unwrap();
            assert_eq!((answer.status.as_u16(), answer.body.len()), (status, 0));
        }
        // Far beyond, nobody reads on to be polite.
        let flood = Client::connect(run.port).await;
        let (answer, _) = flood.ask(with("x", &"x".repeat(1_000_000)), true).await;
        match timeout(WITHIN, answer).await.unwrap() {
            Ok(answer) => assert_eq!(answer.status(), 431),
            Err(e) => assert!(e.is_go_away() || e.is_reset() || e.is_io(), "{e}"),
        }
        // Bodies, announced and not.
        let (answer, mut body) = client.ask(post("/hello"), false).await;
        body.send_data(Bytes::from(vec![b'x'; 1000]), true).unwrap();
        assert_eq!(whole(answer.await.unwrap()).await.unwrap().status, 200);
        let mut announced = post("/hello");
        announced.headers_mut().insert("content-length", "1000000000".parse().unwrap());
        let (answer, _body) = client.ask(announced, false).await;
        assert_eq!(answer.await.unwrap().status(), 413);
    });
    // A connection's own headers mean nothing in HTTP/2 (RFC 9113, section 8.2.2).
    let mut stream = raw(run.port);
    let upgrade = [&head("/hello"), &[0x00, 7][..], b"upgrade", &[9], b"websocket"].concat();
    let upgrade = frame(HEADERS, END_STREAM_AND_HEADERS, 1, &upgrade);
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), &upgrade].concat()).unwrap();
    let reset = loop {
        match next_frame(&mut stream).unwrap() {
            (RST_STREAM, payload) => break u32::from_be_bytes(payload.try_into().unwrap()),
            (kind, _) => assert_ne!(kind, HEADERS, "it was answered"),
        }
    };
    assert_eq!(reset, u32::from(Reason::PROTOCOL_ERROR));
    let upgrade = "GET /hello HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade, close\r\n\r\n";
    assert_eq!(plain::raw(run.port, upgrade.as_bytes(), WITHIN).unwrap().status, 501);
    assert!(run.interrupt().unwrap().success());
}

/// Frames as they are on the wire (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GO_AWAY: u8 = 7;
const END_STREAM_AND_HEADERS: u8 = 0x5;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// `GET http://a` and this path, of less than 127 bytes, in HPACK without a table of its own (RFC 7541, appendix A).
fn head(path: &str) -> Vec<u8> {
    let length = u8::try_from(path.len()).unwrap();
    [&[0x82, 0x86, 0x04, length], path.as_bytes(), &[0x01, 1, b'a']].concat()
}

/// The next frame's kind and payload.
fn next_frame(stream: &mut Plain) -> std::io::Result<(u8, Vec<u8>)> {
    let mut begin = [0; 9];
    stream.read_exact(&mut begin)?;
    let mut payload = vec![0; usize::from(begin[0]) << 16 | usize::from(begin[1]) << 8 | usize::from(begin[2])];
    stream.read_exact(&mut payload)?;
    Ok((begin[3], payload))
}

fn raw(port: u16) -> Plain {
    let stream = Plain::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap();
    stream.set_read_timeout(Some(Duration::from_mins(2))).unwrap();
    stream
}

/// Would miss: a client that begins requests and takes them back, for ever and for nothing; or that others pay for it.
#[test]
fn a_flood_of_resets_ends_its_connection_and_harms_nobody() {
    let folder = Folder::with(GRAPH).unwrap();
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let flood = || {
        let mut stream = raw(run.port);
        let mut all = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
        for stream in (1..40_000).step_by(2) {
            all.extend(frame(HEADERS, END_STREAM_AND_HEADERS, stream, &head("/wait?sleep_ms=60000")));
            all.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
        }
        // It may be closed before all is sent.
        let _ = stream.write_all(&all);
        loop {
            match next_frame(&mut stream) {
                Ok((GO_AWAY, payload)) => return Some(u32::from_be_bytes(payload[4..8].try_into().unwrap())),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    };
    block(async {
        let client = Client::connect(run.port).await;
        assert_eq!(client.get("/hello").await.unwrap().text(), "hello\n");
        std::thread::scope(|scope| {
            let floods: Vec<_> = (0..8).map(|_| scope.spawn(flood)).collect();
            let mut calm = 0;
            for flood in floods {
                // The word may be lost, because the rest of the flood was not read; the end is not.
                let said = flood.join().unwrap();
                assert!(said.is_none() || said == Some(u32::from(Reason::ENHANCE_YOUR_CALM)), "{said:?}");
                calm += u32::from(said.is_some());
            }
            println!("{calm} of 8 floods were told why");
        });
        assert_eq!(client.get("/hello").await.unwrap().text(), "hello\n", "another connection goes on");
    });
    let ps = run.ask("ps").unwrap();
    let wait = ps["branes"].as_array().unwrap().iter().find(|b| b["name"] == "wait").unwrap().clone();
    println!("{wait}");
    assert!(wait["requests"].as_u64().unwrap() < 8 * 1000, "of 160,000 that were begun: {wait}");
    assert_eq!((&wait["busy"], &wait["waiting"]), (&0.into(), &0.into()), "nothing is left of them: {wait}");
    assert!(run.interrupt().unwrap().success());
}

/// A certificate for this name and its key, as files, and what a client trusts then.
pub(crate) fn certify(folder: &Path, name: &str) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let write = |file: &str, text: &str| {
        let new = folder.join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::rename(&new, folder.join(file)).unwrap();
    };
    write("site.key", &made.signing_key.serialize_pem());
    write("site.pem", &made.cert.pem());
    CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).unwrap()
}

/// A TLS connection that offers these protocols.
pub(crate) async fn secured(
    port: u16,
    trusted: &CertificateDer<'static>,
    name: &'static str,
    protocols: &[&[u8]],
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name).unwrap(), stream).await
}

pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) const BOTH: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// One `GET` over HTTP/1.1, all that comes until the connection ends properly.
pub(crate) async fn get_1(mut stream: TlsStream<TcpStream>, path: &str) -> std::io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    timeout(WITHIN, stream.read_to_string(&mut answer)).await.unwrap()?;
    Ok(answer)
}

/// Would miss: a client that is not served in the protocol it asked for, a guest that takes TLS for plain, or a certificate
/// that is taken over only by a restart, or though it is wrong.
#[test]
fn tls_is_served_by_alpn_and_its_certificate_may_change() {
    let folder = Folder::with(GRAPH).unwrap();
    let first = certify(folder.path(), "a.example");
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let options = ["--tls-listen", &listen, "--certificate", "site.pem", "--key", "site.key"];
    let run = folder.run(&options).unwrap().serving().unwrap();
    block(async {
        let a = "a.example";
        for versions in [BOTH, &[&rustls::version::TLS12]] {
            let stream = secured(port, &first, a, &[b"h2", b"http/1.1"], versions).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            let client = Client::of(stream).await;
            let told = client.get("/mirror/x").await.unwrap().text();
            assert!(
                told.starts_with("scheme https\n") && told.contains("\nforwarded for=127.0.0.1;proto=https\n"),
                "{told}"
            );
            let broken = client.get("/faulty?how=half").await.err().unwrap();
            assert!(broken.is_reset(), "{broken}");
            assert_eq!(client.get("/hello").await.unwrap().text(), "hello\n");
            for (offered, agreed) in [(&[&b"http/1.1"[..]][..], Some(&b"http/1.1"[..])), (&[], None)] {
                let stream = secured(port, &first, a, offered, versions).await.unwrap();
                assert_eq!(stream.get_ref().1.alpn_protocol(), agreed);
                let told = get_1(stream, "/mirror/x").await.unwrap();
                assert!(
                    told.starts_with("HTTP/1.1 200 ") && told.contains("scheme https\nauthority a.example\n"),
                    "{told}"
                );
            }
        }
        assert!(secured(port, &first, a, &[b"spdy/1"], BOTH).await.is_err(), "a protocol that nobody speaks");
        let broken = get_1(secured(port, &first, a, &[], BOTH).await.unwrap(), "/faulty?how=half").await;
        println!("half an answer: {broken:?}");
        assert!(broken.is_err(), "half an answer ended as a whole one does");
        // Without TLS, nothing: an alert at most.
        let answer = plain::exchange(port, b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n", WITHIN);
        assert!(answer.as_ref().map_or(true, |bytes| !bytes.starts_with(b"HTTP")), "{answer:?}");

        // A new key alone belongs to nothing: it is refused, and nothing changes.
        let old = Client::of(secured(port, &first, a, &[b"h2"], BOTH).await.unwrap()).await;
        let kept = std::fs::read(folder.path().join("site.pem")).unwrap();
        let second = certify(folder.path(), "b.example");
        let new = std::fs::read(folder.path().join("site.pem")).unwrap();
        std::fs::write(folder.path().join("site.pem"), kept).unwrap();
        run.error.line("is not that of the certificate").unwrap();
        run.error.line("; the certificate stays as it was").unwrap();
        assert!(get_1(secured(port, &first, a, &[], BOTH).await.unwrap(), "/hello").await.unwrap().contains("hello\n"));
        // Then its certificate: new connections have it, the old one goes on.
        std::fs::write(folder.path().join("site.pem"), new).unwrap();
        let served =
            |lines: &[String]| lines.iter().filter(|l| l.contains("served from now on, SHA-256 ")).count() == 2;
        run.error.until(WITHIN, served).unwrap();
        let deadline = Instant::now() + WITHIN;
        let stream = loop {
            match secured(port, &second, "b.example", &[b"h2"], BOTH).await {
                Ok(stream) => break stream,
                Err(e) => assert!(Instant::now() < deadline, "{e}"),
            }
        };
        assert_eq!(Client::of(stream).await.get("/hello").await.unwrap().text(), "hello\n");
        assert_eq!(old.get("/hello").await.unwrap().text(), "hello\n", "a connection stays what it was");

        // Who is started again has it as well: control, and the workers.
        let pids = |name: &str| -> Vec<i32> {
            let status = run.ask("status").unwrap();
            let roles = status["roles"].as_array().unwrap().iter();
            let roles = roles.filter(|role| role["name"].as_str().unwrap().starts_with(name) && role["pid"] != 0);
            roles.map(|role| i32::try_from(role["pid"].as_i64().unwrap()).unwrap()).collect()
        };
        let kill = |pids: Vec<i32>| {
            for pid in pids {
                rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
            }
        };
        kill(pids("control"));
        run.error.line("took over generation 1").unwrap();
        kill(pids("worker@"));
        let deadline = Instant::now() + WITHIN;
        loop {
            match secured(port, &second, "b.example", &[], BOTH).await {
                Ok(stream) => {
                    // It may be one that was accepted by a worker which is being killed.
                    if get_1(stream, "/hello").await.is_ok_and(|answer| answer.contains("hello\n")) {
                        break;
                    }
                }
                Err(e) => assert!(Instant::now() < deadline, "{e}"),
            }
            tokio::task::yield_now().await;
        }
    });
    assert!(run.error.all().iter().all(|line| !line.contains("BEGIN")), "no key in what is said");
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: a key that is served with though it fits nothing, or that others may read; options that make no sense.
#[test]
fn a_certificate_that_cannot_be_served_with_is_refused_at_the_start() {
    let folder = Folder::with(GRAPH).unwrap();
    certify(folder.path(), "a.example");
    std::fs::rename(folder.path().join("site.key"), folder.path().join("other.key")).unwrap();
    certify(folder.path(), "a.example");
    std::fs::copy(folder.path().join("site.key"), folder.path().join("open.key")).unwrap();
    std::fs::set_permissions(folder.path().join("open.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let listen = format!("127.0.0.1:{}", free_port());
    for (certificate, key, code, words) in [
        ("site.pem", "other.key", 1, "other.key is not that of the certificate "),
        ("site.pem", "open.key", 1, "chmod 600 "),
        ("site.key", "site.key", 1, "site.key: no certificate in it"),
        ("site.pem", "g.zgraph.toml", 1, "chmod 600 "),
        ("site.pem", "missing.key", 1, "missing.key: No such file"),
    ] {
        let options = ["--tls-listen", &listen, "--certificate", certificate, "--key", key];
        let mut run = folder.run(&options).unwrap();
        assert_eq!(run.end().unwrap().code(), Some(code), "{certificate} {key}");
        let said = run.error.all().join("\n");
        assert!(said.contains(words), "{certificate} {key}: {said}");
        assert!(!said.contains("serving generation"), "{said}");
    }
    let mut run = folder.run(&["--tls-listen", &listen]).unwrap();
    assert_eq!(run.end().unwrap().code(), Some(2), "without a certificate");
}

/// How long until the other end closes; and what it said last in HTTP/2, if that was its end.
fn until_closed(mut stream: Plain) -> (Duration, Option<u32>) {
    let began = Instant::now();
    let mut reason = None;
    while let Ok((kind, payload)) = next_frame(&mut stream) {
        if kind == GO_AWAY {
            reason = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
    }
    (began.elapsed(), reason)
}

/// Would miss: connections that hold a place for ever, by saying nothing, half of something, or nothing any more.
#[test]
fn a_connection_that_stands_still_is_ended() {
    let folder = Folder::with(GRAPH).unwrap();
    certify(folder.path(), "a.example");
    let tls = free_port();
    let listen = format!("127.0.0.1:{tls}");
    let options = ["--tls-listen", &listen, "--certificate", "site.pem", "--key", "site.key"];
    let run = folder.run(&options).unwrap().serving().unwrap();
    let begun = |bytes: &[&[u8]]| {
        let mut stream = raw(run.port);
        stream.write_all(&bytes.concat()).unwrap();
        stream
    };
    let settings = frame(SETTINGS, 0, 0, &[]);
    let ask = |path: &str| frame(HEADERS, END_STREAM_AND_HEADERS, 1, &head(path));
    std::thread::scope(|scope| {
        let closed = |stream: Plain| scope.spawn(|| until_closed(stream));
        let waits = [
            ("a handshake that does not begin", closed(raw(tls)), 9..12),
            ("half a preface", closed(begun(&[&PREFACE[..10]])), 29..33),
            ("the first half of a preface that is seen as one", closed(begun(&[&PREFACE[..18]])), 29..33),
            ("no request", closed(begun(&[PREFACE, &settings])), 29..33),
            ("half a head", closed(begun(&[PREFACE, &settings, &ask("/hello")[..12]])), 29..33),
            ("no more requests, and pings unanswered", closed(begun(&[PREFACE, &settings, &ask("/hello")])), 29..45),
            (
                "a stream, and pings unanswered",
                closed(begun(&[PREFACE, &settings, &ask("/wait?sleep_ms=80000")])),
                39..45,
            ),
        ];
        for (what, closed, within) in waits {
            let (took, reason) = closed.join().unwrap();
            println!("{what}: {took:?} {reason:?}");
            assert!(within.contains(&took.as_secs()), "{what}: {took:?}");
        }
    });
    // Who answers pings and has a stream is no idler.
    block(async {
        let client = Client::connect(run.port).await;
        let answer = client.get("/wait?sleep_ms=1000").await.unwrap();
        assert_eq!(answer.text(), "waited 1000 ms\n");
    });
    assert!(run.interrupt().unwrap().success());
}

/// Would miss: settings that the appliance does not follow, a key that control cannot read there, or calls of TLS that the
/// seal does not know.
#[test]
fn the_appliance_serves_http_2_and_tls_as_its_settings_say() {
    let made = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let trusted = CertificateDer::from_pem_slice(made.cert.pem().as_bytes()).unwrap();
    let ports = format!("[ingress]\nhttps = [{SECURE_PORT}]\ncertificate = \"site.pem\"\nkey = \"site.key\"\n");
    let settings = gaia_tests::SETTINGS.replace("[ingress]\n", &ports);
    assert!(settings.contains(&ports), "the example's settings have no [ingress]");
    let graph = "[brane.mirror]\nimage = \"file:./mirror.wasm\"\n";
    let setup = Setup::default().graph(graph).settings(settings).file("site.pem", made.cert.pem());
    let served = setup.clone().file("site.key", made.signing_key.serialize_pem());
    let appliance = Appliance::start(&served).unwrap();
    appliance.line("certificate site.pem: served from now on, SHA-256 ", ANSWER_WITHIN).unwrap();
    appliance.line("gaia: serving generation 1", gaia_tests::BOOT_WITHIN).unwrap();
    block(async {
        let client = Client::connect(appliance.port().unwrap()).await;
        assert!(client.get("/mirror").await.unwrap().text().starts_with("scheme http\n"));
        for _ in 0..4 {
            let stream =
                secured(appliance.secure_port().unwrap(), &trusted, "a.example", &[b"h2"], BOTH).await.unwrap();
            let told = Client::of(stream).await.get("/mirror").await.unwrap().text();
            assert!(told.starts_with("scheme https\n") && told.contains(";proto=https\n"), "{told}");
        }
    });
    let shown = appliance.power_off().unwrap();
    assert!(!shown.contains("PRIVATE"), "{shown}");

    // Without its key: it says so, and what needs none is served.
    let appliance = Appliance::start(&setup).unwrap();
    appliance.line("reading the key site.key: ", ANSWER_WITHIN).unwrap();
    appliance.line("gaia: serving generation 1", gaia_tests::BOOT_WITHIN).unwrap();
    assert_eq!(appliance.get("/mirror").unwrap().status, 200);
    let refused = block(secured(appliance.secure_port().unwrap(), &trusted, "a.example", &[], BOTH));
    assert!(refused.is_err(), "TLS without a key");
    appliance.power_off().unwrap();
}
