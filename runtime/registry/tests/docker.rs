//! Against a registry that is one: Debian's `docker-registry`, started here on the loopback. Passing wrongly, it would miss
//! that what is pushed cannot be pulled, by us or by whoever else speaks to registries.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use gaia_egress::resolve::{self, Resolve};
use gaia_registry::{Credentials, Digest, Error, Host, Progress, Pulled, Reference, Registry, Settings, Why};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// How long the registry may take to listen.
const READY: Duration = Duration::from_mins(1);
/// User `omega`, password `hunter2`, in the form of htpasswd(1).
const HTPASSWD: &str = "omega:$2y$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n";

/// A registry of its own for a test; dropped, it is killed and what it stored goes.
struct Docker {
    child: Child,
    port: u16,
    _files: TempDir,
}

impl Docker {
    /// With more lines for the sections `http` and `auth`, which may name files.
    fn start(files: &[(&str, &str)], http: &str, auth: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let at = |text: &str| text.replace("DIR", directory.path().to_str().unwrap());
        for (name, content) in files {
            fs::write(directory.path().join(name), content).unwrap();
        }
        // Between choosing a port and listening on it somebody else may take it.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let config = format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
                 storage: {{filesystem: {{rootdirectory: DIR/store}}}}\n\
                 http:\n  addr: 127.0.0.1:{port}\n  secret: none\n{http}{auth}"
            );
            fs::write(directory.path().join("config.yml"), at(&config)).unwrap();
            if let Some(child) = serve(directory.path(), port) {
                return Self { child, port, _files: directory };
            }
        }
        panic!("docker-registry does not start: {}", fs::read_to_string(directory.path().join("log")).unwrap());
    }

    fn plain() -> Self {
        Self::start(&[], "", "")
    }

    fn host(&self) -> Host {
        Host::parse(&format!("127.0.0.1:{}", self.port)).unwrap()
    }

    fn settings(&self) -> Settings {
        Settings::default().with_plain_http(self.host()).with_default(self.host())
    }

    /// A request as it is written here, for what the client would not do.
    fn raw(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(READY)).unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head, answer[end + 4..].to_vec())
    }

    fn put_blob(&self, repository: &str, bytes: &[u8]) {
        let (status, head, _) = self.raw("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"");
        assert_eq!(status, 202, "{head}");
        let location = head.lines().find_map(|l| l.split_once("Location: ")).unwrap().1;
        let path = &location[location.find("/v2/").unwrap()..];
        let (status, head, _) = self.raw("PUT", &format!("{path}&digest={}", Digest::of(bytes)), "", bytes);
        assert_eq!(status, 201, "{head}");
    }

    fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, manifest: &str) {
        let headers = format!("content-type: {media_type}\r\n");
        let path = format!("/v2/{repository}/manifests/{tag}");
        let (status, head, body) = self.raw("PUT", &path, &headers, manifest.as_bytes());
        assert_eq!(status, 201, "{head} {}", String::from_utf8_lossy(&body));
    }
}

fn serve(directory: &Path, port: u16) -> Option<Child> {
    let log = || Stdio::from(File::options().create(true).append(true).open(directory.join("log")).unwrap());
    let started = Command::new("docker-registry")
        .arg("serve")
        .arg(directory.join("config.yml"))
        .env_clear()
        .env("OTEL_TRACES_EXPORTER", "none")
        .stdin(Stdio::null())
        .stdout(log())
        .stderr(log())
        .spawn();
    let mut child = started.expect("docker-registry is not installed: make setup");
    let until = Instant::now() + READY;
    while Instant::now() < until {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Some(child);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
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
    let names = Names(HashMap::from([("registry.test", "127.0.0.1".parse().unwrap())]));
    Registry::new(settings, Arc::new(names)).unwrap()
}

async fn pull(settings: Settings, reference: &str) -> Result<(Pulled, Vec<u8>), Error> {
    let (mut bytes, mut last) = (Vec::new(), Progress { done: 0, total: 0 });
    let sink = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    let reference = Reference::parse(reference).unwrap();
    let pulled = registry(settings).pull(&reference, 64 << 20, sink, |progress| last = progress).await?;
    assert_eq!(last, Progress { done: pulled.size, total: pulled.size });
    assert_eq!((pulled.size, pulled.component), (bytes.len() as u64, Digest::of(&bytes)));
    Ok((pulled, bytes))
}

async fn push(settings: Settings, reference: &str, wasm: &Bytes) -> Result<Digest, Error> {
    let annotations = BTreeMap::from([("org.opencontainers.image.version".to_owned(), "2.4.1".to_owned())]);
    let mut told = Vec::new();
    let reference = Reference::parse(reference).unwrap();
    let digest = registry(settings).push(&reference, wasm.clone(), &annotations, |p| told.push(p)).await?;
    let total = wasm.len() as u64;
    assert_eq!(told.last(), Some(&Progress { done: total, total }));
    assert!(told.is_sorted_by_key(|progress| progress.done), "{told:?}");
    Ok(digest)
}

/// A component of so many bytes, no two pages of it the same.
fn component(size: usize) -> Bytes {
    let mut bytes = wat::parse_str(r#"(component (import "wasi:clocks/wall-clock@0.2.0" (instance)))"#).unwrap();
    // A custom section: its identifier, its size in five bytes, the length of its name, its name, what is in it.
    let content = size - bytes.len() - 6;
    bytes.push(0);
    bytes.extend((0..5).map(|i| u8::try_from(content >> (7 * i) & 0x7f).unwrap() | if i < 4 { 0x80 } else { 0 }));
    bytes.extend([1, b'x']);
    let rest = u32::try_from(size - bytes.len()).unwrap();
    bytes.extend((0..rest).map(|i| i.wrapping_mul(0x9e37_79b9).to_be_bytes()[0]));
    bytes.into()
}

#[tokio::test]
async fn what_is_pushed_comes_back_by_tag_and_by_digest() {
    let docker = Docker::plain();
    let wasm = component((3 << 20) + 17);
    let manifest = push(docker.settings(), "omega/cloud-fetch:2.4.1", &wasm).await.unwrap();
    assert_eq!(push(docker.settings(), "omega/cloud-fetch:2.4.1", &wasm).await.unwrap(), manifest, "again");
    let port = docker.port;
    let own = Digest::of(&wasm);
    for reference in [
        "omega/cloud-fetch:2.4.1".to_owned(),
        format!("127.0.0.1:{port}/omega/cloud-fetch:2.4.1"),
        format!("127.0.0.1:{port}/omega/cloud-fetch@{manifest}"),
        format!("omega/cloud-fetch:another@{manifest}"),
        format!("omega/cloud-fetch:2.4.1@{own}"),
    ] {
        let (pulled, bytes) = pull(docker.settings(), &reference).await.unwrap();
        let name = Reference::parse(&reference).unwrap();
        let none = |_: &[u8]| panic!("it is here already");
        let held = |digest: &Digest| *digest == pulled.component;
        let again = registry(docker.settings()).pull_unless(&name, 64 << 20, held, none, |_| ()).await.unwrap();
        assert_eq!(again, pulled);
        assert!(bytes == wasm, "{reference}: other bytes");
        assert_eq!((pulled.manifest, pulled.component), (manifest, own), "{reference}");
        assert_eq!(pulled.media_type, "application/wasm");
    }
    push(docker.settings(), "fetch", &wasm).await.unwrap();
    pull(docker.settings(), "fetch:latest").await.unwrap();

    for (reference, what) in [
        ("omega/cloud-fetch:2.4.2".to_owned(), "MANIFEST_UNKNOWN"),
        ("omega/other:1".to_owned(), "no such manifest"),
        (format!("omega/cloud-fetch@{own}"), "there has to be a tag"),
        (format!("omega/cloud-fetch:2.4.1@{}", Digest::of(b"")), "neither the manifest nor the component"),
    ] {
        let error = pull(docker.settings(), &reference).await.unwrap_err().to_string();
        println!("{error}");
        assert!(error.contains(what), "{error}");
    }
}

#[tokio::test]
async fn what_is_pushed_has_the_layout_of_wasm_artefacts() {
    let docker = Docker::plain();
    let wasm = component(1000);
    push(docker.settings(), "omega/fetch:1", &wasm).await.unwrap();
    let json = |path: &str| -> serde_json::Value {
        let (status, _, body) = docker.raw("GET", path, "accept: application/vnd.oci.image.manifest.v1+json\r\n", b"");
        assert_eq!(status, 200);
        serde_json::from_slice(&body).unwrap()
    };
    let manifest = json("/v2/omega/fetch/manifests/1");
    assert_eq!(manifest["mediaType"], "application/vnd.oci.image.manifest.v1+json");
    assert_eq!(manifest["config"]["mediaType"], "application/vnd.wasm.config.v0+json");
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["layers"][0]["mediaType"], "application/wasm");
    assert_eq!(manifest["annotations"]["org.opencontainers.image.version"], "2.4.1");
    let config = json(&format!("/v2/omega/fetch/blobs/{}", manifest["config"]["digest"].as_str().unwrap()));
    assert_eq!((&config["architecture"], &config["os"]), (&"wasm".into(), &"wasip2".into()));
    assert_eq!(config["component"]["imports"], serde_json::json!(["wasi:clocks/wall-clock@0.2.0"]));
    assert_eq!(config["layerDigests"], serde_json::json!([Digest::of(&wasm).to_string()]));
}

#[tokio::test]
async fn a_component_is_uploaded_in_pieces_too() {
    let docker = Docker::plain();
    let wasm = component((1 << 20) + 1);
    push(docker.settings().with_chunks_of(300_000), "omega/fetch:1", &wasm).await.unwrap();
    assert!(pull(docker.settings(), "omega/fetch:1").await.unwrap().1 == wasm);
}

#[tokio::test]
async fn a_registry_with_passwords_takes_the_right_one_only() {
    let auth = "auth: {htpasswd: {realm: test, path: DIR/htpasswd}}\n";
    let docker = Docker::start(&[("htpasswd", HTPASSWD)], "", auth);
    let wasm = component(100_000);
    let with = |user: &str, password: &str| {
        let password = Credentials::Password { user: user.into(), password: password.into() };
        docker.settings().with_credentials(docker.host(), password)
    };
    push(with("omega", "hunter2"), "omega/fetch:1", &wasm).await.unwrap();
    assert!(pull(with("omega", "hunter2"), "omega/fetch:1").await.unwrap().1 == wasm);
    for (user, password) in [("omega", "hunter3"), ("alpha", "hunter2"), ("", "")] {
        let error = pull(with(user, password), "omega/fetch:1").await.unwrap_err();
        assert!(matches!(error.why, Why::CredentialsRefused(..)), "{error}");
        assert!(!error.to_string().contains("hunter"), "{error}");
        let error = push(with(user, password), "omega/fetch:2", &wasm).await.unwrap_err();
        assert!(matches!(error.why, Why::CredentialsRefused(..)), "{error}");
    }
    let error = pull(docker.settings(), "omega/fetch:1").await.unwrap_err();
    println!("{error}");
    assert!(matches!(error.why, Why::CredentialsMissing(..)), "{error}");
    let error = push(docker.settings(), "omega/fetch:1", &wasm).await.unwrap_err();
    assert!(matches!(error.why, Why::CredentialsMissing(..)), "{error}");
    // Those of another registry are not shown to this one.
    let other = Credentials::Password { user: "omega".into(), password: "hunter2".into() };
    let settings = docker.settings().with_credentials(Host::parse("registry.test").unwrap(), other);
    let error = pull(settings, "omega/fetch:1").await.unwrap_err();
    assert!(matches!(error.why, Why::CredentialsMissing(..)), "{error}");
    let token = docker.settings().with_credentials(docker.host(), Credentials::Token("hunter2".into()));
    let error = pull(token, "omega/fetch:1").await.unwrap_err();
    assert!(matches!(error.why, Why::Challenge { .. }), "{error}");
}

#[tokio::test]
async fn a_registry_with_tls_is_found_by_the_resolver_and_known_by_its_certificate() {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["registry.test".into()]).unwrap().signed_by(&key, &issuer).unwrap();
    let files = [("cert.pem", certificate.pem()), ("key.pem", key.serialize_pem())];
    let files = [("cert.pem", files[0].1.as_str()), ("key.pem", files[1].1.as_str())];
    let docker = Docker::start(&files, "  tls: {certificate: DIR/cert.pem, key: DIR/key.pem}\n", "");
    let wasm = component((1 << 20) + 1);
    let name = format!("registry.test:{}/omega/fetch:1", docker.port);

    // Its address is the loopback: a registry may be anywhere.
    let settings = Settings::default().with_roots(root);
    let manifest = push(settings.clone(), &name, &wasm).await.unwrap();
    let (pulled, bytes) = pull(settings.clone(), &name).await.unwrap();
    assert!(bytes == wasm);
    assert_eq!(pulled.manifest, manifest);

    let error = pull(Settings::default(), &name).await.unwrap_err().to_string();
    assert!(error.contains("certificate") && error.contains("] root"), "{error}");
    let address = format!("127.0.0.1:{}/omega/fetch:1", docker.port);
    let error = pull(settings, &address).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    let error = pull(docker.settings(), &address).await.unwrap_err().to_string();
    assert!(error.contains("answered 400"), "{error}");

    let plain = Docker::plain();
    let error =
        pull(Settings::default(), &format!("127.0.0.1:{}/omega/fetch:1", plain.port)).await.unwrap_err().to_string();
    assert!(error.contains("without TLS"), "{error}");
}

#[tokio::test]
async fn what_other_tools_push_is_pulled() {
    let docker = Docker::plain();
    let wasm = component(5000);
    docker.put_blob("omega/fetch", &wasm);
    docker.put_blob("omega/fetch", b"{}");
    let (component, empty, size) = (Digest::of(&wasm), Digest::of(b"{}"), wasm.len());
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    for (tag, text) in fixtures(component, empty, size) {
        docker.put_manifest("omega/fetch", tag, manifest, &text);
        let (pulled, bytes) = pull(docker.settings(), &format!("omega/fetch:{tag}")).await.unwrap();
        assert!(bytes == wasm, "{tag}");
        assert_eq!(pulled.manifest, Digest::of(text.as_bytes()), "{tag}");
    }

    // What `docker buildx` and `oras manifest index` make of several: the registry keeps an index of them.
    let inner = &fixtures(component, empty, size)[0].1;
    let (digest, length) = (Digest::of(inner.as_bytes()), inner.len());
    let index_type = "application/vnd.oci.image.index.v1+json";
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{index_type}","manifests":[{{"mediaType":"{manifest}","digest":"{digest}","size":{length},"platform":{{"architecture":"wasm","os":"wasip2"}}}}]}}"#
    );
    docker.put_manifest("omega/fetch", "index", index_type, &index);
    let (pulled, bytes) = pull(docker.settings(), "omega/fetch:index").await.unwrap();
    assert!(bytes == wasm);
    assert_eq!(pulled.manifest, Digest::of(index.as_bytes()));

    // A container image, and an application of several components.
    let layer = |media_type| format!(r#"{{"mediaType":"{media_type}","digest":"{component}","size":{size}}}"#);
    let (tar, content) =
        (layer("application/vnd.oci.image.layer.v1.tar+gzip"), layer("application/vnd.wasm.content.layer.v1+wasm"));
    for (tag, layers, why) in [
        ("container", tar.clone(), "no WebAssembly in it, only \"application/vnd.oci.image.layer.v1.tar+gzip\""),
        ("application", format!("{content},{content},{tar}"), "2 layers of WebAssembly"),
    ] {
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{manifest}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{empty}","size":2}},"layers":[{layers}]}}"#
        );
        docker.put_manifest("omega/fetch", tag, manifest, &text);
        let error = pull(docker.settings(), &format!("omega/fetch:{tag}")).await.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

/// Manifests as other tools write them, with a name for each.
fn fixtures(component: Digest, empty: Digest, size: usize) -> Vec<(&'static str, String)> {
    let oci = "application/vnd.oci.image.manifest.v1+json";
    let own = |config: &str, layer: &str, more: &str| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{oci}","config":{{"mediaType":"{config}","digest":"{empty}","size":2}},"layers":[{{"mediaType":"{layer}","digest":"{component}","size":{size}}}{more}]}}"#
        )
    };
    let locked =
        format!(r#",{{"mediaType":"application/vnd.fermyon.spin.application.v1+config","digest":"{empty}","size":2}}"#);
    vec![
        // wkg, and wash since it writes so, by oci-wasm 0.6.
        ("wkg", own("application/vnd.wasm.config.v0+json", "application/wasm", "")),
        // wash before that.
        (
            "wash",
            own(
                "application/vnd.wasmcloud.actor.archive.config",
                "application/vnd.module.wasm.content.layer.v1+wasm",
                "",
            ),
        ),
        // wasm-to-oci.
        ("wasm-to-oci", own("application/vnd.wasm.config.v1+json", "application/vnd.wasm.content.layer.v1+wasm", "")),
        // spin registry push, an application of one component: the second layer is the locked application.
        (
            "spin",
            own("application/vnd.oci.image.config.v1+json", "application/vnd.wasm.content.layer.v1+wasm", &locked),
        ),
        // runwasi's oci-tar-builder.
        (
            "runwasi",
            own(
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
                "",
            ),
        ),
        // oras-py 0.2.43, `hello.wasm:application/wasm`, as it stood in the registry.
        (
            "oras",
            format!(
                r#"{{"schemaVersion": 2, "mediaType": "{oci}", "config": {{"mediaType": "application/vnd.unknown.config.v1+json", "size": 2, "digest": "{empty}"}}, "layers": [{{"mediaType": "application/wasm", "size": {size}, "digest": "{component}", "annotations": {{"org.opencontainers.image.title": "hello.wasm"}}}}], "annotations": {{}}}}"#
            ),
        ),
    ]
}
