//! What branes reach outside, and what not, through `gaia run`: servers on the loopback and a name server, all of them
//! in this process. These need no virtual machine.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gaia_tests::http;
use gaia_tests::workstation::{Folder, Run};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;

/// A page as `OpenAlex` sends it.
pub(crate) const PAGE: &str = r#"{"meta":{"count":7},"results":[{"id":"W1","title":"one"}]}"#;
/// What a log line may take.
const LINE_WITHIN: Duration = Duration::from_secs(30);

/// A server on the loopback, and how many connections it has had.
pub(crate) struct Server {
    pub(crate) port: u16,
    connections: Arc<AtomicUsize>,
}

/// Serves each connection with `serve`, in a thread of its own, until the tests end.
fn server(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Server {
    server_at("127.0.0.1:0", serve)
}

fn server_at(address: &str, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    let connections = Arc::new(AtomicUsize::new(0));
    let (count, serve) = (Arc::clone(&connections), Arc::new(serve));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            count.fetch_add(1, Relaxed);
            let serve = Arc::clone(&serve);
            std::thread::spawn(move || serve(stream));
        }
    });
    Server { port, connections }
}

/// Reads a request's head.
fn head(stream: &mut impl std::io::Read) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// An answer after which the connection ends: nothing of it is kept for the next request.
pub(crate) fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

/// A server that answers every request with this.
pub(crate) fn web(answer: String) -> Server {
    server(move |mut stream| {
        head(&mut stream);
        let _ = stream.write_all(answer.as_bytes());
    })
}

/// Answers of a name server, one look-up after the other; the last stays.
type Zone = HashMap<&'static str, &'static [&'static [&'static str]]>;

/// A name server; where it is. None of its answers may be remembered.
fn names(zone: &[(&'static str, &'static [&'static [&'static str]])]) -> String {
    names_at("127.0.0.1:0", zone)
}

pub(crate) fn names_at(address: &str, zone: &[(&'static str, &'static [&'static [&'static str]])]) -> String {
    let zone: Zone = zone.iter().copied().collect();
    let mut asked = HashMap::new();
    let socket = UdpSocket::bind(address).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let mut query = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            let _ = socket.send_to(&reply(&query[..length], &zone, &mut asked), from);
        }
    });
    address
}

/// The reply to a query for `A` or `AAAA` (RFC 1035 4.1). What was asked how often decides which answer it gives.
fn reply(query: &[u8], zone: &Zone, asked: &mut HashMap<Vec<u8>, usize>) -> Vec<u8> {
    let mut labels = Vec::new();
    let mut at = 12;
    while query[at] > 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8(query[at + 1..end].to_vec()).unwrap());
        at = end;
    }
    let question = &query[12..at + 5];
    let is_v6 = query[at + 2] == 28;
    let times = asked.entry(question.to_vec()).or_default();
    let answers = zone.get(labels.join(".").as_str());
    let rcode = if answers.is_some() { 0 } else { 3 };
    let answer = answers.map_or(&[][..], |all| all[(*times).min(all.len() - 1)]);
    *times += 1;
    let all: Vec<IpAddr> =
        answer.iter().map(|a| a.parse().unwrap()).filter(|a: &IpAddr| a.is_ipv6() == is_v6).collect();
    let count = u8::try_from(all.len()).unwrap();
    let mut reply = [&query[..2], &[0x81, 0x80 | rcode, 0, 1, 0, count, 0, 0, 0, 0], question].concat();
    for address in all {
        let octets = match address {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        };
        // The name of the question, its type, class IN, time to live 0.
        reply.extend([0xc0, 12, 0, query[at + 2], 0, 1, 0, 0, 0, 0, 0, u8::try_from(octets.len()).unwrap()]);
        reply.extend(octets);
    }
    reply
}

/// A brane that fetches, with this allowlist.
pub(crate) fn fetching(name: &str, allowlist: &[&str]) -> String {
    format!(
        "[brane.{name}]\nimage = \"file:./cloud-fetch.wasm\"\nlimits = {{ deadline = \"20s\" }}\n\
         [brane.{name}.capability]\n\"net.http\" = {{ allowlist = {allowlist:?} }}\n\n"
    )
}

pub(crate) fn encoded(text: &str) -> String {
    text.bytes().map(|b| if b.is_ascii_alphanumeric() { char::from(b).into() } else { format!("%{b:02X}") }).collect()
}

/// Has a brane fetch an address: status and body of its answer.
fn fetch(run: &Run, brane: &str, url: &str) -> (u16, String) {
    let answer = run.get(&format!("/{brane}?url={}", encoded(url))).unwrap();
    (answer.status, answer.text())
}

/// Waits for a log line of this brane that has all the words.
fn logged(run: &Run, brane: &str, words: &[&str]) {
    let whose = format!(" {brane}.");
    let there = |line: &String| line.contains(&whose) && words.iter().all(|word| line.contains(word));
    let waited = run.output.until(LINE_WITHIN, |lines| lines.iter().any(there));
    assert!(waited.is_ok(), "no line of {brane} with {words:?}: {waited:?}");
}

fn denied(run: &Run, brane: &str, url: &str, words: &str) {
    let (status, body) = fetch(run, brane, url);
    assert_eq!(status, 502, "{url}: {body}");
    assert!(body.contains("HTTP-request-denied"), "{url}: {body}");
    logged(run, brane, &[" DENY net.http ", words]);
}

/// Would miss: requests that never leave, answers that are cut, a line without the answer's size.
#[test]
fn a_request_that_is_granted_is_answered_and_logged() {
    let titles = "a title ".repeat(512 * 1024);
    let large = format!(r#"{{"meta":{{"count":7}},"results":[{{"id":"W1","title":"{titles}"}}]}}"#);
    let (small, large_length) = (web(answer("200 OK", PAGE)), large.len());
    let large = web(answer("200 OK", &large));
    let sites = [format!("127.0.0.1:{}", small.port), format!("http://127.0.0.1:{}", large.port)];
    let folder = Folder::with(&fetching("fetch", &[&sites[0], &sites[1]])).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    let url = format!("http://127.0.0.1:{}/works?per-page=3&secret=1", small.port);
    let (status, body) = fetch(&run, "fetch", &url);
    assert_eq!(status, 200, "{body}");
    assert!(body.contains(r#""count":7,"works":[{"id":"W1","title":"one"}]"#), "{body}");
    let line = format!(" REQ 127.0.0.1:{}/works bytes={} dur=", small.port, PAGE.len());
    logged(&run, "fetch", &[&line]);
    // Of an answer that came through nobody says that its client was gone, though it closes the connection then; nor of one that
    // is all head.
    let head = format!("HEAD /fetch?url={} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", encoded(&url));
    http::exchange(run.port, head.as_bytes(), LINE_WITHIN).unwrap();
    let ends = |lines: &[String]| lines.iter().filter(|line| line.contains(" END ")).count();
    run.output.until(LINE_WITHIN, |lines| ends(lines) == 2).unwrap();
    assert!(run.output.all().iter().all(|line| !line.contains("gone")), "{:#?}", run.output.all());
    let (status, body) = fetch(&run, "fetch", &format!("http://127.0.0.1:{}/large", large.port));
    assert_eq!((status, body.len() > titles.len()), (200, true), "four megabytes come through whole");
    let digits = large_length.to_string();
    let with_commas = format!("{},{},{}", &digits[..1], &digits[1..4], &digits[4..]);
    logged(&run, "fetch", &[&format!("/large bytes={with_commas} dur=")]);
    assert!(!run.output.all().iter().any(|line| line.contains("secret")), "no query is in the log");
    // What does not come to an answer has its line as well.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    folder.write(&fetching("fetch", &[&format!("127.0.0.1:{gone}")])).unwrap();
    let again = folder.run(&[]).unwrap().serving().unwrap();
    let (status, body) = fetch(&again, "fetch", &format!("http://127.0.0.1:{gone}/"));
    assert_eq!(status, 502);
    assert!(body.contains("connection-refused"), "{body}");
    logged(&again, "fetch", &[&format!(" REQ 127.0.0.1:{gone}/ connection-refused bytes=0 dur=")]);
}

/// Would miss: any way around the allowlist that a guest's text, or a name's owner, may try.
#[test]
fn what_is_not_granted_is_refused_and_said() {
    let (listed, other) = (web(answer("200 OK", PAGE)), web(answer("200 OK", PAGE)));
    let (port, else_port) = (listed.port, other.port);
    let dns = names(&[
        ("loopback.example", &[&["127.0.0.1"]]),
        ("loopback6.example", &[&["::1"]]),
        ("private.example", &[&["10.0.0.1", "192.168.1.1"]]),
        ("metadata.example", &[&["169.254.169.254"]]),
        ("mapped.example", &[&["::ffff:127.0.0.1"]]),
        ("known.example", &[&["127.0.0.1"]]),
    ]);
    let graph = [
        fetching("fetch", &[&format!("http://127.0.0.1:{port}")]),
        fetching("named", &[&format!("*.example:{port}")]),
        fetching("both", &[&format!("known.example:{port}"), &format!("127.0.0.1:{port}")]),
        fetching("none", &[]),
    ];
    let folder = Folder::with(&graph.concat()).unwrap();
    let run = folder.run(&["--dns", &dns]).unwrap().serving().unwrap();
    let cases = [
        ("fetch", format!("http://127.0.0.1:{else_port}/"), format!("http://127.0.0.1:{else_port} is not on the")),
        ("fetch", format!("https://127.0.0.1:{port}/"), format!("https://127.0.0.1:{port} is not on the")),
        ("fetch", "http://127.0.0.1/".into(), "http://127.0.0.1 is not on the".into()),
        ("fetch", format!("http://localhost:{port}/"), format!("http://localhost:{port} is not on the")),
        ("fetch", format!("http://127.0.0.1.evil.example:{port}/"), "evil.example".into()),
        ("fetch", format!("http://user:pass@127.0.0.1:{port}/"), format!("\"127.0.0.1:{port}\": a user before the")),
        ("fetch", format!("http://127.0.0.1:{port}@evil.example/"), "\"evil.example\": a user before the".into()),
        ("fetch", format!("http://2130706433:{port}/"), "\"2130706433\": an IPv4 address as four decimal".into()),
        ("fetch", format!("http://0x7f.1:{port}/"), "\"0x7f.1\": an IPv4 address as four decimal".into()),
        ("fetch", format!("http://0177.0.0.1:{port}/"), "\"0177.0.0.1\": an IPv4 address as four".into()),
        ("fetch", format!("http://127.1:{port}/"), "\"127.1\": an IPv4 address as four decimal".into()),
        ("fetch", format!("http://[::ffff:127.0.0.1]:{port}/"), format!(":{port} is not on the allowlist")),
        ("fetch", format!("http://xn--bcher-kva.example:{port}/"), "xn--bcher-kva.example".into()),
        ("named", format!("http://loopback.example:{port}/"), "loopback.example is at 127.0.0.1: loopback".into()),
        ("named", format!("http://loopback6.example:{port}/"), "loopback6.example is at ::1: loopback".into()),
        ("named", format!("http://private.example:{port}/"), "private.example is at 10.0.0.1: private".into()),
        ("named", format!("http://metadata.example:{port}/"), "at 169.254.169.254: link-local".into()),
        ("named", format!("http://mapped.example:{port}/"), "is at ::ffff:127.0.0.1: IPv4-mapped".into()),
        ("named", format!("http://example:{port}/"), format!("http://example:{port} is not on the")),
        ("none", format!("http://127.0.0.1:{port}/"), format!("http://127.0.0.1:{port} is not on the")),
    ];
    for (brane, url, words) in &cases {
        denied(&run, brane, url, words);
    }
    // These do not even come to be a request.
    for url in [format!("http://b\u{fc}cher.example:{port}/"), format!("http://[fe80::1%25eth0]:{port}/")] {
        let (status, body) = fetch(&run, "named", &url);
        assert!(status == 400 || body.contains("HTTP-request-denied"), "{url}: {status} {body}");
    }
    assert!(!run.output.all().iter().any(|line| line.contains("pass")), "no password is in the log");
    let of = |server: &Server| server.connections.load(Relaxed);
    assert_eq!((of(&listed), of(&other)), (0, 0), "nobody was connected to");
    let (status, body) = fetch(&run, "both", &format!("http://known.example:{port}/"));
    assert_eq!(status, 200, "an address that is listed besides may be behind a name: {body}");
    let (status, body) = fetch(&run, "named", &format!("http://unknown.example:{port}/"));
    assert_eq!(status, 502);
    assert!(body.contains("DNS-error"), "{body}");
    logged(&run, "named", &[&format!(" REQ unknown.example:{port}/ DNS-error bytes=0")]);
}

/// Would miss: an address that was checked once and for all, and redirects that are followed behind the guest's back.
#[test]
fn each_connection_and_each_hop_is_checked_anew() {
    let (page, other) = (web(answer("200 OK", PAGE)), web(answer("200 OK", PAGE)));
    let location = format!("302 Found\r\nLocation: http://127.0.0.1:{}/", other.port);
    let redirecting = web(answer(&location, ""));
    let dns = names(&[("moving.example", &[&["127.0.0.1"], &["10.0.0.1"]])]);
    let listed = [
        format!("moving.example:{}", page.port),
        format!("127.0.0.1:{}", page.port),
        format!("127.0.0.1:{}", redirecting.port),
    ];
    let folder = Folder::with(&fetching("fetch", &[&listed[0], &listed[1], &listed[2]])).unwrap();
    let run = folder.run(&["--dns", &dns]).unwrap().serving().unwrap();
    let moving = format!("http://moving.example:{}/", page.port);
    assert_eq!(fetch(&run, "fetch", &moving).0, 200);
    denied(&run, "fetch", &moving, "moving.example is at 10.0.0.1: private");
    assert_eq!(page.connections.load(Relaxed), 1);
    let (status, body) = fetch(&run, "fetch", &format!("http://127.0.0.1:{}/", redirecting.port));
    assert!(status == 502 && body.contains("the answer has status 302"), "{body}");
    denied(&run, "fetch", &format!("http://127.0.0.1:{}/", other.port), "is not on the allowlist");
    assert_eq!(other.connections.load(Relaxed), 0);
}

/// A certificate authority: its certificate in PEM, and a server that shows one of its certificates for these names.
fn secure(names: &[&str]) -> (String, Server) {
    secure_at("127.0.0.1:0", names, |_| PAGE.to_owned())
}

/// The same at this address, with a page for each request's head.
pub(crate) fn secure_at(
    address: &str,
    names: &[&str],
    page: impl Fn(&str) -> String + Send + Sync + 'static,
) -> (String, Server) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    let config = Arc::new(config);
    let server = server_at(address, move |stream| {
        let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
        let mut stream = rustls::StreamOwned::new(connection, stream);
        let head = head(&mut stream);
        if head.is_empty() {
            return;
        }
        let _ = stream.write_all(answer("200 OK", &page(&head)).as_bytes());
        stream.conn.send_close_notify();
        let _ = stream.flush();
    });
    (authority, server)
}

/// Would miss: TLS that trusts anyone, roots that are not read, and a root that is none and passes for one.
#[test]
fn a_root_of_ones_own_is_trusted_where_it_is_named_and_only_there() {
    let (authority, server) = secure(&["api.example"]);
    let dns = names(&[("api.example", &[&["127.0.0.1"]]), ("other.example", &[&["127.0.0.1"]])]);
    let listed = format!("*.example:{}", server.port);
    let folder = Folder::with(&fetching("fetch", &[&listed, &format!("127.0.0.1:{}", server.port)])).unwrap();
    std::fs::write(folder.path().join("my-ca.pem"), authority).unwrap();
    std::fs::write(folder.path().join("bad.pem"), "no certificate\n").unwrap();
    let url = format!("https://api.example:{}/works", server.port);

    let run = folder.run(&["--dns", &dns, "--root", "my-ca.pem"]).unwrap().serving().unwrap();
    let (status, body) = fetch(&run, "fetch", &url);
    assert_eq!(status, 200, "{body}");
    logged(&run, "fetch", &[&format!(" REQ api.example:{}/works bytes={}", server.port, PAGE.len())]);
    let (status, body) = fetch(&run, "fetch", &format!("https://other.example:{}/", server.port));
    assert!(status == 502 && body.contains("TlsCertificateError"), "a certificate for another name: {body}");

    let run = folder.run(&["--dns", &dns]).unwrap().serving().unwrap();
    let (status, body) = fetch(&run, "fetch", &url);
    assert!(status == 502 && body.contains("TlsCertificateError"), "{status} {body}");
    logged(&run, "fetch", &[" REQ api.example:", "/works TLS-certificate-error bytes=0"]);

    let mut run = folder.run(&["--root", "bad.pem"]).unwrap();
    assert_eq!(run.end().unwrap().code(), Some(1), "it never served");
    run.error.line("bad.pem: no certificate: the text has no line").unwrap();
    let mut run = folder.run(&["--root", "absent.pem"]).unwrap();
    assert_eq!(run.end().unwrap().code(), Some(2));
    run.error.line("absent.pem: No such file").unwrap();
}

/// Would miss: a guest that outlives its deadline because it waits for somebody else.
#[test]
fn an_upstream_that_never_answers_ends_with_the_deadline() {
    let silent = Arc::new(Mutex::new(Vec::new()));
    let held = Arc::clone(&silent);
    let slow = server(move |stream| held.lock().unwrap().push(stream));
    let graph = fetching("fetch", &[&format!("127.0.0.1:{}", slow.port)]).replace("20s", "1s");
    let folder = Folder::with(&graph).unwrap();
    let run = folder.run(&[]).unwrap().serving().unwrap();
    let began = Instant::now();
    assert_eq!(fetch(&run, "fetch", &format!("http://127.0.0.1:{}/slow", slow.port)).0, 504);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    logged(&run, "fetch", &[" KILL deadline of 1s"]);
    logged(&run, "fetch", &["/slow given-up bytes=0 dur="]);
    // And its connection is gone with it.
    let mut stream = silent.lock().unwrap().pop().unwrap();
    stream.set_read_timeout(Some(LINE_WITHIN)).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(String::from_utf8(rest).unwrap().starts_with("GET /slow HTTP/1.1\r\n"));
}

/// Would miss: a guest that goes on for nobody, and a line that does not say why it ended.
#[test]
fn a_client_that_hangs_up_is_said_to_be_gone() {
    let (asked, told) = std::sync::mpsc::channel();
    let slow = server(move |stream| asked.send(stream).unwrap());
    let graph = fetching("fetch", &[&format!("127.0.0.1:{}", slow.port)]);
    let run = Folder::with(&graph).unwrap().run(&[]).unwrap().serving().unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", run.port)).unwrap();
    let url = encoded(&format!("http://127.0.0.1:{}/slow", slow.port));
    client.write_all(format!("GET /fetch?url={url} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
    let _upstream = told.recv_timeout(LINE_WITHIN).unwrap();
    drop(client);
    logged(&run, "fetch", &[" END ", "pooled✓ the client was gone"]);
}

/// Would miss: names that are looked up without a grant, addresses that no guest may know, a resolver of the machine's,
/// and a control whose end takes the look-ups with it.
#[test]
fn names_are_looked_up_where_they_are_granted() {
    let dns = names(&[
        ("one.example", &[&["9.9.9.9", "2620:fe::fe"]]),
        ("mixed.example", &[&["10.0.0.1", "9.9.9.9"]]),
        ("inside.example", &[&["127.0.0.1", "fd00::1"]]),
    ]);
    let graph = "[brane.lookup]\nimage = \"file:./lookup.wasm\"\n[brane.lookup.capability]\n\
                 \"net.dns\" = { allowlist = [\"*.example\"] }\n";
    let folder = Folder::with(graph).unwrap();
    let run = folder.run(&["--dns", &dns]).unwrap().serving().unwrap();
    let look_up = |name: &str| {
        let answer = run.get(&format!("/lookup?name={}", encoded(name))).unwrap();
        (answer.status, answer.text())
    };
    assert_eq!(look_up("one.example"), (200, "9.9.9.9\n2620:fe::fe\n".into()));
    assert_eq!(look_up("ONE.Example."), (200, "9.9.9.9\n2620:fe::fe\n".into()));
    assert_eq!(look_up("mixed.example"), (200, "9.9.9.9\n".into()), "what is inside is left out");
    assert_eq!(look_up("127.0.0.1"), (200, "127.0.0.1\n".into()), "an address is its own answer");
    assert_eq!(look_up("none.example"), (502, "name-unresolvable\n".into()));
    for (name, code, words) in [
        ("inside.example", "access-denied", "inside.example is at 127.0.0.1: loopback"),
        ("example", "access-denied", "example is not on the allowlist"),
        ("localhost", "access-denied", "localhost is not on the allowlist"),
        ("0x7f.1", "invalid-argument", "\"0x7f.1\": an IPv4 address as four decimal numbers only"),
    ] {
        assert_eq!(look_up(name), (502, format!("{code}\n")), "{name}");
        logged(&run, "lookup", &[" DENY net.dns ", words]);
    }
    // Whoever is control answers: the workers live on without the one they asked before.
    let roles = run.ask("status").unwrap()["roles"].clone();
    let control = roles.as_array().unwrap().iter().find(|role| role["name"] == "control").unwrap()["pid"].as_i64();
    let pid = rustix::process::Pid::from_raw(i32::try_from(control.unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(look_up("one.example"), (200, "9.9.9.9\n2620:fe::fe\n".into()), "it waits for the next control");
    run.error.line("took over generation 1").unwrap();

    let run = folder.run(&["--dns", "127.0.0.1:1"]).unwrap().serving().unwrap();
    let answer = run.get("/lookup?name=one.example").unwrap();
    assert_eq!(answer.text(), "temporary-resolver-failure\n", "this machine's own name servers are not asked");
}

/// A graph with one brane that dials, with these lists for TCP, UDP and names.
fn dialling(tcp: &[&str], udp: &[&str], dns: &[&str]) -> String {
    format!(
        "[brane.dial]\nimage = \"file:./dial.wasm\"\nlimits = {{ deadline = \"20s\" }}\n[brane.dial.capability]\n\
         \"clock\" = {{ resolution = \"ms\" }}\n\"fs.tmp\" = {{ quota = \"0 B\" }}\n\
         \"net.tcp\" = {{ allowlist = {tcp:?} }}\n\"net.udp\" = {{ allowlist = {udp:?} }}\n\
         \"net.dns\" = {{ allowlist = {dns:?} }}\n"
    )
}

/// Would miss: sockets that lead anywhere, or nowhere, or that listen.
#[test]
fn sockets_lead_to_what_is_granted_and_nowhere_else() {
    let echo = server(|mut stream| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = stream.write_all(&all);
    });
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (tcp, udp) = (echo.port, datagrams.local_addr().unwrap().port());
    let heard = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&heard);
    std::thread::spawn(move || {
        let mut bytes = [0; 1500];
        while let Ok((length, from)) = datagrams.recv_from(&mut bytes) {
            count.fetch_add(1, Relaxed);
            let _ = datagrams.send_to(&bytes[..length], from);
        }
    });
    let dns = names(&[("echo.example", &[&["127.0.0.1"]]), ("public.example", &[&["203.0.113.1"]])]);
    let at = |port: u16| format!("{}:{port}", Ipv4Addr::LOCALHOST);
    let name = format!("echo.example:{tcp}");
    let graph = dialling(&[&at(tcp)], &[&at(udp)], &[]);
    let folder = Folder::with(&graph).unwrap();
    let run = folder.run(&["--dns", &dns]).unwrap().serving().unwrap();
    let dial = |run: &Run, query: &str| {
        let answer = run.get(&format!("/dial?{query}")).unwrap();
        (answer.status, answer.text())
    };
    assert_eq!(dial(&run, &format!("say=hello&to={}", at(tcp))), (200, "hello".into()));
    assert_eq!(dial(&run, &format!("over=udp&say=hello&to={}", at(udp))), (200, "hello".into()));
    let connections = (echo.connections.load(Relaxed), heard.load(Relaxed));
    for (query, step, words) in [
        (format!("to={}", at(udp)), "connect", format!("net.tcp {} is not on the allowlist", at(udp))),
        (format!("to=127.0.0.2:{tcp}"), "connect", format!("net.tcp 127.0.0.2:{tcp} is not on the allowlist")),
        (format!("to=[::1]:{tcp}"), "connect", format!("net.tcp [::1]:{tcp} is not on the allowlist")),
        (format!("over=udp&to={}", at(tcp)), "send", format!("net.udp {} is not on the allowlist", at(tcp))),
        ("over=listen".into(), "listen", "net.tcp 0.0.0.0:".into()),
        (format!("to={name}"), "connect", "net.dns echo.example is not on the allowlist".into()),
    ] {
        let (status, body) = dial(&run, &query);
        assert!(status == 502 && body.starts_with(step), "{query}: {status} {body}");
        logged(&run, "dial", &[" DENY ", &words]);
    }
    assert_eq!((echo.connections.load(Relaxed), heard.load(Relaxed)), connections, "nobody heard of it");

    // By name: the address must be listed too, because it is inside.
    folder.write(&dialling(&[&name, &at(tcp)], &[], &["echo.example", "127.0.0.1"])).unwrap();
    let run = folder.run(&["--dns", &dns]).unwrap().serving().unwrap();
    assert_eq!(dial(&run, &format!("say=hello&to={name}")), (200, "hello".into()));
    folder.write(&dialling(&[&name], &[], &["echo.example", "127.0.0.1"])).unwrap();
    let run = folder.run(&["--dns", &dns]).unwrap().serving().unwrap();
    let (status, body) = dial(&run, &format!("say=hello&to={name}"));
    assert!(status == 502 && body.starts_with("connect"), "{body}");
    logged(&run, "dial", &[" DENY net.tcp echo.example is at 127.0.0.1: loopback"]);
}

/// Would miss: a trace that ends in a brane, one that goes on where none came or where a stranger has made it up, and a guest that is
/// shown what is no trace.
#[test]
fn a_trace_goes_on_through_a_brane_to_what_it_asks() {
    const CAME: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let heads = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&heads);
    let site = server(move |mut stream| {
        kept.lock().unwrap().push(head(&mut stream).to_ascii_lowercase());
        let _ = stream.write_all(answer("200 OK", PAGE).as_bytes());
    });
    let pinned = fetching("kept", &[&format!("127.0.0.1:{}", site.port)])
        + "[brane.kept.execution]\nlifecycle = \"pinned\"\n[brane.mirror]\nimage = \"file:./mirror.wasm\"\n";
    let graph = fetching("fetch", &[&format!("127.0.0.1:{}", site.port)]) + &pinned;
    let folder = Folder::with(&graph).unwrap();
    let run = folder.run(&["--workers", "1"]).unwrap().serving().unwrap();
    let get = |path: &str, more: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{more}\r\n");
        let answer = gaia_tests::http::raw(run.port, request.as_bytes(), LINE_WITHIN).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.text()
    };
    // What the site was shown about a trace when this brane was asked.
    let shown = |brane: &str, more: &str| {
        get(&format!("/{brane}?url={}", encoded(&format!("http://127.0.0.1:{}/", site.port))), more);
        let head = heads.lock().unwrap().pop().unwrap();
        let field = |name: &str| head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned));
        (field("traceparent"), field("tracestate"))
    };
    for brane in ["fetch", "kept"] {
        let trace =
            |flags: &str| format!("Traceparent: {}-{flags}\r\nTracestate: a=1\r\ntracestate: b=2\r\n", &CAME[..52]);
        let (first, state) = shown(brane, &trace("01"));
        let first = first.unwrap();
        assert!(
            first.starts_with(&CAME[..36]) && first.ends_with("-01") && first != CAME && first.len() == 55,
            "{first}"
        );
        assert_eq!(state.as_deref(), Some("a=1,b=2"));
        let second = shown(brane, &trace("00")).0.unwrap();
        assert!(
            second.starts_with(&CAME[..36]) && second.ends_with("-00") && second[36..52] != first[36..52],
            "{second}"
        );
        assert_eq!(shown(brane, ""), (None, None), "{brane}");
        assert_eq!(shown(brane, "traceparent: 00-nonsense\r\ntracestate: a=1\r\n"), (None, None));
    }
    let told = get("/mirror", &format!("traceparent: {CAME}\r\ntracestate: a=1\r\n"));
    assert!(told.contains(&format!("\ntraceparent {CAME}\ntracestate a=1\n")), "{told}");
    for more in ["traceparent: nonsense\r\ntracestate: a=1\r\n", "tracestate: a=1\r\n"] {
        let told = get("/mirror", more);
        assert!(!told.contains("traceparent") && !told.contains("tracestate"), "{told}");
    }
    let told = get("/mirror", &format!("traceparent: {CAME}\r\ntracestate: A=1\r\n"));
    assert!(told.contains("traceparent") && !told.contains("tracestate"), "{told}");
}
