//! Against servers that lie, loop, trickle and send elsewhere: each is one clear error, after a bounded number of requests
//! and bytes. Passing wrongly, it would miss a registry that fills the store, drains the memory or learns a password.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, stream};
use gaia_egress::resolve::{self, Resolve};
use gaia_registry::{Credentials, Digest, Error, Host, Pulled, Reference, Registry, Settings, Why};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Answer = Response<Body>;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

struct Seen {
    method: Method,
    path: String,
    headers: HeaderMap,
}

impl Seen {
    fn authorization(&self) -> Option<&str> {
        self.headers.get("authorization").map(|value| value.to_str().unwrap())
    }
}

/// A server on the loopback that answers as the test says.
struct Liar {
    port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Liar {
    async fn start(answer: impl Fn(&Request<Bytes>, u16) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (log, answer) = (Arc::clone(&seen), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                    async move {
                        let (parts, body) = request.into_parts();
                        let body = body.collect().await?.to_bytes();
                        let path = parts.uri.to_string();
                        log.lock().unwrap().push(Seen {
                            method: parts.method.clone(),
                            path,
                            headers: parts.headers.clone(),
                        });
                        Ok::<_, hyper::Error>(answer(&Request::from_parts(parts, body), port))
                    }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { port, seen }
    }

    fn host(&self) -> Host {
        Host::parse(&format!("127.0.0.1:{}", self.port)).unwrap()
    }

    fn settings(&self) -> Settings {
        Settings::default().with_plain_http(self.host()).with_default(self.host())
    }

    fn requests(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

struct Names(HashMap<&'static str, IpAddr>);

impl Resolve for Names {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, resolve::Error>> {
        let found = self.0.get(name).map(|address| vec![*address]).ok_or(resolve::Error::NotFound);
        Box::pin(std::future::ready(found))
    }
}

fn registry(settings: Settings) -> Registry {
    let loopback = "127.0.0.1".parse().unwrap();
    let metadata = "169.254.169.254".parse().unwrap();
    let names = Names(HashMap::from([("storage.test", loopback), ("inside.test", metadata)]));
    Registry::new(settings, Arc::new(names)).unwrap()
}

async fn pull(settings: Settings, reference: &str) -> (Result<Pulled, Error>, Vec<u8>) {
    let mut bytes = Vec::new();
    let sink = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    let pulled = registry(settings).pull(&Reference::parse(reference).unwrap(), 1 << 20, sink, |_| ()).await;
    (pulled, bytes)
}

/// The error of a pull, which must have been asked for.
async fn refusal(settings: Settings) -> Why {
    let (pulled, _) = pull(settings, "omega/fetch:1").await;
    let error = pulled.expect_err("a lie was believed");
    println!("{error}");
    error.why
}

fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(Full::new(body.into()).boxed_unsync()).unwrap()
}

/// Zeros without an end.
fn endless(pause: Duration, headers: &[(&str, &str)]) -> Answer {
    let frames = stream::repeat(()).then(move |()| async move {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        Ok(Frame::data(Bytes::from_static(&[b' '; 4096])))
    });
    answer(200, headers, "").map(|_| StreamBody::new(frames).boxed_unsync())
}

const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0 what is in it does not matter here";

fn manifest(digest: Digest, size: usize) -> String {
    let layer = format!(r#"{{"mediaType":"application/wasm","digest":"{digest}","size":{size}}}"#);
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"x/y","digest":"{digest}","size":1}},"layers":[{layer}]}}"#
    )
}

fn good_manifest() -> String {
    manifest(Digest::of(COMPONENT), COMPONENT.len())
}

fn is_blob(request: &Request<Bytes>) -> bool {
    request.uri().path().contains("/blobs/")
}

fn typed(media_type: &str, body: impl Into<Bytes>) -> Answer {
    answer(200, &[("content-type", media_type)], body)
}

#[tokio::test]
async fn an_honest_registry_is_believed() {
    let liar = Liar::start(|request, _| match request.uri().path() {
        "/v2/omega/fetch/manifests/1" => typed(MANIFEST, good_manifest()),
        path if path == format!("/v2/omega/fetch/blobs/{}", Digest::of(COMPONENT)) => answer(200, &[], COMPONENT),
        _ => answer(404, &[], ""),
    })
    .await;
    let (pulled, bytes) = pull(liar.settings(), "omega/fetch:1").await;
    let pulled = pulled.unwrap();
    assert_eq!(bytes, COMPONENT);
    assert_eq!((pulled.component, pulled.size), (Digest::of(COMPONENT), COMPONENT.len() as u64));
    assert_eq!(pulled.manifest, Digest::of(good_manifest().as_bytes()));
    assert_eq!(liar.requests(), 2);
}

#[tokio::test]
async fn a_component_is_no_other_no_longer_and_no_shorter_one() {
    let other = vec![b'x'; COMPONENT.len()];
    let liar =
        Liar::start(
            move |request, _| {
                if is_blob(request) { answer(200, &[], other.clone()) } else { typed(MANIFEST, good_manifest()) }
            },
        );
    assert!(matches!(refusal(liar.await.settings()).await, Why::Digest { what: "the component", .. }));

    for lie in [&COMPONENT[1..], &[COMPONENT, b"!"].concat()] {
        let lie = lie.to_vec();
        let liar = Liar::start(move |request, _| {
            if is_blob(request) { answer(200, &[], lie.clone()) } else { typed(MANIFEST, good_manifest()) }
        });
        assert!(matches!(refusal(liar.await.settings()).await, Why::Size { .. }));
    }

    let liar = Liar::start(|request, _| {
        if is_blob(request) {
            endless(Duration::ZERO, &[])
        } else {
            typed(MANIFEST, manifest(Digest::of(b""), 100_000))
        }
    })
    .await;
    let (pulled, bytes) = pull(liar.settings(), "omega/fetch:1").await;
    assert!(matches!(pulled.unwrap_err().why, Why::Size { announced: 100_000, .. }));
    assert!(bytes.len() <= 100_000, "{} bytes were stored", bytes.len());

    let liar = Liar::start(|request, _| {
        if is_blob(request) {
            answer(200, &[("content-encoding", "gzip")], COMPONENT)
        } else {
            typed(MANIFEST, good_manifest())
        }
    });
    assert!(matches!(refusal(liar.await.settings()).await, Why::Coding { .. }));
}

#[tokio::test]
async fn what_is_too_large_is_not_asked_for() {
    let liar = Liar::start(|_, _| typed(MANIFEST, manifest(Digest::of(b""), (1 << 20) + 1))).await;
    let why = refusal(liar.settings()).await;
    assert!(matches!(why, Why::TooLarge { what: "a component", size: 1_048_577, limit: 1_048_576 }));
    assert_eq!(liar.requests(), 1);
}

#[tokio::test]
async fn a_manifest_is_not_read_without_an_end() {
    let liar = Liar::start(|_, _| endless(Duration::ZERO, &[("content-type", MANIFEST)])).await;
    assert!(matches!(refusal(liar.settings()).await, Why::TooLarge { what: "the manifest", .. }));
    let liar = Liar::start(|_, _| typed(MANIFEST, vec![b' '; 2 << 20])).await;
    assert!(matches!(refusal(liar.settings()).await, Why::TooLarge { size: 2_097_152, .. }));
}

#[tokio::test]
async fn a_manifest_has_the_digest_that_it_was_asked_for_or_named_with() {
    let liar = Liar::start(|_, _| typed(MANIFEST, good_manifest())).await;
    let pinned = format!("omega/fetch@{}", Digest::of(b"another"));
    let (pulled, _) = pull(liar.settings(), &pinned).await;
    assert!(matches!(pulled.unwrap_err().why, Why::Digest { what: "the manifest", .. }));

    let named = Digest::of(b"another").to_string();
    let liar = Liar::start(move |_, _| {
        answer(200, &[("content-type", MANIFEST), ("docker-content-digest", &named)], good_manifest())
    });
    assert!(matches!(refusal(liar.await.settings()).await, Why::Digest { what: "the manifest", .. }));
}

#[tokio::test]
async fn a_pin_may_be_the_components_own_digest() {
    let honest = |request: &Request<Bytes>, _: u16| match request.uri().path() {
        "/v2/omega/fetch/manifests/1" => typed(MANIFEST, good_manifest()),
        _ if is_blob(request) => answer(200, &[], COMPONENT),
        _ => answer(404, &[], ""),
    };
    let liar = Liar::start(honest).await;
    let (pulled, bytes) = pull(liar.settings(), &format!("omega/fetch:1@{}", Digest::of(COMPONENT))).await;
    assert_eq!((pulled.unwrap().component, bytes.as_slice()), (Digest::of(COMPONENT), COMPONENT));
    let (pulled, bytes) = pull(liar.settings(), &format!("omega/fetch:1@{}", Digest::of(b"another"))).await;
    let error = pulled.unwrap_err();
    assert!(error.to_string().contains("neither the manifest nor the component"), "{error}");
    assert!(bytes.is_empty());
}

#[tokio::test]
async fn of_an_index_the_manifest_for_wasm_is_pulled_and_no_other_index() {
    let index = |digest: Digest, size: usize| {
        let entry = |arch: &str, os: &str, digest: Digest| {
            format!(
                r#"{{"mediaType":"{MANIFEST}","digest":"{digest}","size":{size},"platform":{{"architecture":"{arch}","os":"{os}"}}}}"#
            )
        };
        let entries = [entry("amd64", "linux", Digest::of(b"")), entry("wasm", "wasip2", digest)].join(",");
        format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{entries}]}}"#)
    };
    let inner = good_manifest();
    let outer = index(Digest::of(inner.as_bytes()), inner.len());
    let wanted = Digest::of(outer.as_bytes());
    let liar = Liar::start(move |request, _| match request.uri().path() {
        "/v2/omega/fetch/manifests/1" => typed(INDEX, outer.clone()),
        _ if is_blob(request) => answer(200, &[], COMPONENT),
        _ => typed(MANIFEST, inner.clone()),
    });
    let (pulled, bytes) = pull(liar.await.settings(), "omega/fetch:1").await;
    assert_eq!((pulled.unwrap().manifest, bytes.as_slice()), (wanted, COMPONENT));

    // The entry says how large its manifest is, and which.
    let inner = good_manifest();
    for (digest, size) in
        [(Digest::of(b""), inner.len()), (Digest::of(inner.as_bytes()), 10), (Digest::of(inner.as_bytes()), 9999)]
    {
        let (outer, inner) = (index(digest, size), inner.clone());
        let liar = Liar::start(move |request, _| match request.uri().path() {
            "/v2/omega/fetch/manifests/1" => typed(INDEX, outer.clone()),
            _ => typed(MANIFEST, inner.clone()),
        });
        let why = refusal(liar.await.settings()).await;
        assert!(matches!(why, Why::Digest { .. } | Why::Size { .. } | Why::TooLarge { .. }), "{why}");
    }

    let inner = index(Digest::of(b""), 2);
    let outer = index(Digest::of(inner.as_bytes()), inner.len());
    let liar = Liar::start(move |request, _| match request.uri().path() {
        "/v2/omega/fetch/manifests/1" => typed(INDEX, outer.clone()),
        _ => typed(INDEX, inner.clone()),
    });
    assert!(matches!(refusal(liar.await.settings()).await, Why::Manifest(_)));
}

#[tokio::test]
async fn a_redirect_leads_to_no_neighbour_and_goes_on_for_a_few_steps_only() {
    for to in [
        "http://elsewhere.test/x",
        "https://10.0.0.1/x",
        "https://[::1]/x",
        "https://169.254.169.254/latest/meta-data",
        "https://inside.test/x",
        "https://storage.test/x",
        "ftp://elsewhere.test/x",
        "//elsewhere.test/x",
        "file:///etc/passwd",
        "",
    ] {
        let liar = Liar::start(move |request, _| {
            if is_blob(request) { answer(307, &[("location", to)], "") } else { typed(MANIFEST, good_manifest()) }
        });
        let why = refusal(liar.await.settings()).await;
        let refused = matches!(&why, Why::Redirect { .. } | Why::Http { error: gaia_egress::Error::Denied(_), .. });
        assert!(refused, "{to}: {why}");
    }
    let liar = Liar::start(|request, _| answer(302, &[("location", &format!("{}/x", request.uri().path()))], "")).await;
    assert!(matches!(refusal(liar.settings()).await, Why::Redirect { .. }));
    assert_eq!(liar.requests(), 4);
}

#[tokio::test]
async fn a_storage_service_of_the_operators_gets_no_credentials() {
    let storage = Liar::start(|_, _| answer(200, &[], COMPONENT)).await;
    let port = storage.port;
    let liar = Liar::start(move |request, _| {
        if request.headers().get("authorization").is_none() {
            return answer(401, &[("www-authenticate", "Basic realm=\"x\"")], "");
        }
        let to = format!("http://storage.test:{port}/blob?signature=1");
        if is_blob(request) { answer(307, &[("location", &to)], "") } else { typed(MANIFEST, good_manifest()) }
    })
    .await;
    let password = Credentials::Password { user: "u".into(), password: "p".into() };
    let settings = liar.settings().with_credentials(liar.host(), password);
    let storage_host = Host::parse(&format!("storage.test:{port}")).unwrap();
    let (pulled, bytes) = pull(settings.with_plain_http(storage_host), "omega/fetch:1").await;
    pulled.unwrap();
    assert_eq!(bytes, COMPONENT);
    let seen = storage.seen.lock().unwrap();
    assert_eq!((seen.len(), seen[0].path.as_str()), (1, "/blob?signature=1"));
    assert_eq!(
        (seen[0].authorization(), &seen[0].headers["host"]),
        (None, &format!("storage.test:{port}").parse().unwrap())
    );
}

fn bearer(port: u16) -> String {
    format!(
        r#"Bearer realm="http://127.0.0.1:{port}/token?a=b",service="the registry",scope="repository:omega/fetch:pull""#
    )
}

#[tokio::test]
async fn a_token_is_fetched_with_the_password_and_shown_to_the_registry() {
    let liar = Liar::start(|request, port| {
        let authorization = request.headers().get("authorization").map(|value| value.to_str().unwrap());
        match (request.uri().path(), authorization) {
            ("/token", Some("Basic dTpw")) => answer(200, &[], r#"{"token":"t1"}"#),
            ("/token", _) => answer(401, &[], ""),
            (_, Some("Bearer t1")) if is_blob(request) => answer(200, &[], COMPONENT),
            (_, Some("Bearer t1")) => typed(MANIFEST, good_manifest()),
            _ => answer(401, &[("www-authenticate", &bearer(port))], r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#),
        }
    })
    .await;
    let password = |password: &str| Credentials::Password { user: "u".into(), password: password.into() };
    let (pulled, bytes) = pull(liar.settings().with_credentials(liar.host(), password("p")), "omega/fetch:1").await;
    pulled.unwrap();
    assert_eq!(bytes, COMPONENT);
    {
        let seen = liar.seen.lock().unwrap();
        let paths: Vec<&str> = seen.iter().map(|seen| seen.path.as_str()).collect();
        assert_eq!(paths[1], "/token?a=b&service=the+registry&scope=repository%3Aomega%2Ffetch%3Apull");
        assert_eq!(paths.len(), 4, "the token serves for both requests: {paths:?}");
    }
    assert!(matches!(
        refusal(liar.settings().with_credentials(liar.host(), password("wrong"))).await,
        Why::CredentialsRefused(_, StatusCode::UNAUTHORIZED)
    ));
    assert!(matches!(refusal(liar.settings()).await, Why::CredentialsMissing(_, StatusCode::UNAUTHORIZED)));
    // A token of the operator's own asks no service.
    let before = liar.requests();
    let settings = liar.settings().with_credentials(liar.host(), Credentials::Token("t1".into()));
    pull(settings, "omega/fetch:1").await.0.unwrap();
    assert_eq!(liar.requests() - before, 3);
}

#[tokio::test]
async fn tokens_that_are_never_good_enough_end_at_once() {
    for (challenge, credentials) in [("Bearer", true), ("Bearer", false), ("Basic", true), ("Basic", false)] {
        let liar = Liar::start(move |request, port| match request.uri().path() {
            "/token" => answer(200, &[], r#"{"token":"again"}"#),
            _ if challenge == "Basic" => answer(401, &[("www-authenticate", "Basic realm=\"x\"")], ""),
            _ => answer(401, &[("www-authenticate", &bearer(port))], ""),
        })
        .await;
        let mut settings = liar.settings();
        if credentials {
            let password = Credentials::Password { user: "u".into(), password: "p".into() };
            settings = settings.with_credentials(liar.host(), password);
        }
        let why = refusal(settings).await;
        assert!(matches!(why, Why::CredentialsRefused(..) | Why::CredentialsMissing(..)), "{why}");
        assert!(liar.requests() <= 3, "{} requests", liar.requests());
    }
}

#[tokio::test]
async fn a_token_service_is_no_way_out_either() {
    // Whether the registry's own server is the service, what it answers.
    for (realm, status, body) in [
        ("http://elsewhere.test/token", 0, ""),
        ("https://inside.test/token", 0, ""),
        ("https://169.254.169.254/token", 0, ""),
        ("not an address", 0, ""),
        ("/token", 302, ""),
        ("/token", 500, ""),
        ("/token", 200, "{}"),
        ("/token", 200, r#"{"token":"a\r\nhost: b"}"#),
        ("/token", 299, ""),
    ] {
        let liar = Liar::start(move |request, _| match (request.uri().path(), status) {
            ("/token", 299) => endless(Duration::ZERO, &[]),
            ("/token", _) => answer(status, &[("location", "/v2/")], body),
            _ => answer(401, &[("www-authenticate", &format!("Bearer realm=\"{realm}\""))], ""),
        })
        .await;
        let password = Credentials::Password { user: "u".into(), password: "p".into() };
        let why = refusal(liar.settings().with_credentials(liar.host(), password)).await;
        let expected = matches!(
            why,
            Why::Challenge { .. }
                | Why::Token { .. }
                | Why::Status { .. }
                | Why::TooLarge { what: "a token", .. }
                | Why::Http { error: gaia_egress::Error::Denied(_), .. }
        );
        assert!(expected, "{realm} {status}: {why}");
        assert!(liar.requests() <= 2);
    }
}

#[tokio::test]
async fn a_registry_has_its_time_and_no_more() {
    let slow: [fn(&Request<Bytes>) -> Answer; 3] = [
        |_| endless(Duration::from_millis(20), &[("content-type", MANIFEST)]),
        |_| answer(200, &[], "").map(|_| StreamBody::new(stream::pending()).boxed_unsync()),
        |request| {
            if is_blob(request) {
                endless(Duration::from_millis(20), &[])
            } else {
                typed(MANIFEST, manifest(Digest::of(b""), 1 << 20))
            }
        },
    ];
    for slow in slow {
        let liar = Liar::start(move |request, _| slow(request)).await;
        let within = Duration::from_millis(400);
        assert!(matches!(refusal(liar.settings().with_time(within)).await, Why::Time(time) if time == within));
    }
}

#[tokio::test]
async fn what_is_no_answer_is_told_with_the_registrys_words() {
    for (status, wanted) in [
        (404, "has no such manifest (404), saying \"MANIFEST_UNKNOWN: no\\nsuch\""),
        (403, "forbids it (403), saying"),
        (429, "answered 429 Too Many Requests to a request for manifest"),
        (204, "answered 204 No Content"),
        (500, "answered 500"),
    ] {
        let body = if status == 204 { "" } else { r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no\nsuch"}]}"# };
        let liar = Liar::start(move |_, _| answer(status, &[], body)).await;
        let error = pull(liar.settings(), "omega/fetch:1").await.0.unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
        assert!(error.starts_with(&format!("pull 127.0.0.1:{}/omega/fetch:1: ", liar.port)), "{error}");
    }
    let error = pull(Settings::default(), "omega/fetch:1").await.0.unwrap_err();
    assert!(matches!(error.why, Why::NoRegistry), "{error}");
    let error = pull(Settings::default(), "nowhere.test/fetch:1").await.0.unwrap_err();
    assert!(matches!(error.why, Why::Http { error: gaia_egress::Error::Dns(_), .. }), "{error}");
}

#[tokio::test]
async fn a_store_that_is_full_ends_the_pull() {
    let liar =
        Liar::start(
            |request, _| if is_blob(request) { answer(200, &[], COMPONENT) } else { typed(MANIFEST, good_manifest()) },
        )
        .await;
    let full = |_: &[u8]| Err(io::ErrorKind::StorageFull.into());
    let pulled =
        registry(liar.settings()).pull(&Reference::parse("omega/fetch:1").unwrap(), 1 << 20, full, |_| ()).await;
    assert!(matches!(pulled.unwrap_err().why, Why::Sink(error) if error.kind() == io::ErrorKind::StorageFull));
}

// --- Pushing -----------------------------------------------------------------------------------------------------

/// A component of so many bytes.
fn component(size: usize) -> Bytes {
    let mut bytes = wat::parse_str("(component)").unwrap();
    // A custom section: its identifier, its size in five bytes, the length of its name, its name, what is in it.
    let content = size - bytes.len() - 6;
    bytes.push(0);
    bytes.extend((0..5).map(|i| u8::try_from(content >> (7 * i) & 0x7f).unwrap() | if i < 4 { 0x80 } else { 0 }));
    bytes.extend([1, b'x']);
    bytes.resize(size, b'.');
    bytes.into()
}

async fn push(settings: Settings, wasm: Bytes) -> Result<Digest, Error> {
    registry(settings).push(&Reference::parse("omega/fetch:1").unwrap(), wasm, &BTreeMap::new(), |_| ()).await
}

/// Takes what is pushed, bodies up to a size, and its `Location`s are below this.
fn taking(most: usize, base: &'static str) -> impl Fn(&Request<Bytes>, u16) -> Answer + Send + Sync {
    move |request, _| match *request.method() {
        Method::HEAD => answer(404, &[], ""),
        _ if request.body().len() > most => answer(413, &[], ""),
        Method::POST | Method::PATCH => {
            answer(202, &[("location", &format!("{base}/v2/omega/fetch/blobs/uploads/7?s=1"))], "")
        }
        Method::PUT => answer(201, &[], ""),
        _ => answer(405, &[], ""),
    }
}

#[tokio::test]
async fn what_is_too_large_for_one_request_goes_in_pieces() {
    let size = (9 << 20) + 1;
    let liar = Liar::start(taking(4 << 20, "")).await;
    push(liar.settings(), component(size)).await.unwrap();
    let seen = liar.seen.lock().unwrap();
    let ranges: Vec<&str> = seen.iter().filter_map(|s| s.headers.get("content-range")?.to_str().ok()).collect();
    assert_eq!(ranges, ["0-4194303", "4194304-8388607", "8388608-9437184"]);
    let last = seen.iter().rfind(|seen| seen.path.contains("digest=")).unwrap();
    let digest = Digest::of(&component(size));
    assert_eq!(last.path, format!("/v2/omega/fetch/blobs/uploads/7?s=1&digest={digest}"));
    assert_eq!((&last.method, &last.headers["content-length"]), (&Method::PUT, &"0".parse().unwrap()));
}

#[tokio::test]
async fn an_upload_goes_where_a_request_may_go_and_without_credentials_elsewhere() {
    for base in ["http://elsewhere.test", "https://10.0.0.1", "ftp://x"] {
        let liar = Liar::start(taking(1 << 20, base)).await;
        let error = push(liar.settings(), component(100)).await.unwrap_err();
        let refused =
            matches!(&error.why, Why::Redirect { .. } | Why::Http { error: gaia_egress::Error::Denied(_), .. });
        assert!(refused, "{error}");
        assert!(error.to_string().starts_with("push 127.0.0.1:"), "{error}");
    }
}

#[tokio::test]
async fn a_push_that_is_not_taken_says_so() {
    for (method, status) in [
        (Method::POST, 401),
        (Method::POST, 403),
        (Method::POST, 307),
        (Method::PUT, 400),
        (Method::PUT, 401),
        (Method::HEAD, 500),
    ] {
        let refused = method.clone();
        let take = taking(1 << 20, "");
        let liar = Liar::start(move |request, port| {
            if *request.method() == refused {
                answer(status, &[("www-authenticate", "Basic realm=\"x\""), ("location", "/x")], "")
            } else {
                take(request, port)
            }
        })
        .await;
        let password = Credentials::Password { user: "u".into(), password: "p".into() };
        let error = push(liar.settings().with_credentials(liar.host(), password), component(100)).await.unwrap_err();
        println!("{error}");
        assert!(error.to_string().contains(&status.to_string()), "{error}");
        assert!(liar.requests() < 10);
    }
    // Too large, in whatever pieces.
    let liar = Liar::start(taking(1 << 10, "")).await;
    let error = push(liar.settings(), component(5 << 20)).await.unwrap_err();
    assert!(matches!(error.why, Why::Status { status: StatusCode::PAYLOAD_TOO_LARGE, .. }), "{error}");

    let error = push(liar.settings(), Bytes::from_static(b"\0asm\x01\0\0\0")).await.unwrap_err();
    assert!(matches!(error.why, Why::NotAComponent(_)), "{error}");
    let pinned = Reference::parse(&format!("omega/fetch@{}", Digest::of(b""))).unwrap();
    let error = registry(liar.settings()).push(&pinned, component(100), &BTreeMap::new(), |_| ()).await.unwrap_err();
    assert!(matches!(error.why, Why::PushPinned), "{error}");
}
