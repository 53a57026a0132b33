//! Operators over the network: who is listed is served, and who is not does not come in.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use gaia_init::key::PublicKey;
use gaia_tests::{ANSWER_WITHIN, Appliance, BOOT_WITHIN, SETTINGS, Setup, out};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};

use crate::logs::goes_on_with_the_next_control;

const SIGKILL: i32 = 9;
/// What a connection to the appliance is at its other end: QEMU's user network.
pub(crate) const FROM: &str = "10.0.2.2";

/// Somebody with a key, and what `gaia` keeps of theirs.
pub(crate) struct Person {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) key: PublicKey,
}

impl Person {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let made = gaia(&folder, &["key"]);
        assert!(made.status.success(), "{}", said(&made));
        let key: PublicKey = String::from_utf8(made.stdout).unwrap().trim().parse().unwrap();
        let again = gaia(&folder, &["key", "--json"]);
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&again.stdout).unwrap()["key"], key.to_string());
        Self { folder, key }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("gaia").join(name)
    }

    pub(crate) fn on(&self, port: u16, arguments: &[&str]) -> Output {
        let on = format!("127.0.0.1:{port}");
        gaia(&self.folder, &[&["--on", &on], arguments].concat())
    }

    /// What the command prints; it must end well.
    pub(crate) fn does(&self, port: u16, arguments: &[&str]) -> String {
        let output = self.on(port, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What the command complains of; it must not end well.
    pub(crate) fn fails(&self, port: u16, arguments: &[&str]) -> String {
        let output = self.on(port, arguments);
        assert!(!output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    /// The exit status of the command.
    fn status(&self, port: u16, arguments: &[&str]) -> Option<i32> {
        self.on(port, arguments).status.code()
    }

    pub(crate) fn shown(&self) -> Arc<CertifiedKey> {
        let pem = std::fs::read(self.file("key")).unwrap();
        let key =
            rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from_pem_slice(&pem).unwrap()).unwrap();
        let shown = key.public_key().unwrap().to_vec();
        Arc::new(CertifiedKey::new(vec![CertificateDer::from(shown)], key))
    }
}

fn command(folder: &tempfile::TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(out("bin/gaia"));
    command.args(arguments).env("XDG_CONFIG_HOME", folder.path()).env_remove("GAIA_ON").env_remove("GAIA_API");
    command.env("USER", "ann").stdin(Stdio::null());
    command
}

fn gaia(folder: &tempfile::TempDir, arguments: &[&str]) -> Output {
    command(folder, arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// An appliance that is operated by `ann`, and the key that stands on its console.
pub(crate) fn operated_by(ann: &Person) -> (Appliance, PublicKey) {
    started_for(ann, Setup::default())
}

/// The same with more to it.
pub(crate) fn started_for(ann: &Person, setup: Setup) -> (Appliance, PublicKey) {
    started_with(ann, setup, "")
}

/// The same with more in its settings.
pub(crate) fn started_with(ann: &Person, setup: Setup, more: &str) -> (Appliance, PublicKey) {
    let settings = format!("{SETTINGS}\n{more}\n[operators]\nann = \"{}\"\n", ann.key);
    let appliance = Appliance::start(&setup.settings(settings)).unwrap();
    let line = appliance.line("control: key ed25519:", BOOT_WITHIN).unwrap();
    let key = line.split(' ').find(|word| word.starts_with("ed25519:")).unwrap().parse().unwrap();
    appliance.line("control: answers ann on port 7250", ANSWER_WITHIN).unwrap();
    appliance.line("gaia: serving generation", BOOT_WITHIN).unwrap();
    (appliance, key)
}

/// Would miss: an operator who is not served, a stranger who is, an appliance that is trusted without a word, or one whose key
/// has changed and who is asked all the same; a change that nobody can be asked about.
#[test]
fn who_is_listed_operates_and_who_is_not_does_not() {
    let (ann, stranger) = (Person::new(), Person::new());
    let (appliance, key) = operated_by(&ann);
    let port = appliance.control_port().unwrap();

    // Not known, and nobody is there to be asked.
    assert_eq!(ann.status(port, &["status"]), Some(4));
    let told = ann.fails(port, &["status"]);
    assert!(told.contains(&format!("trust {key}")), "{told}");
    assert!(!ann.file("known_hosts").exists());
    let told = ann.fails(port, &["--accept-key", &stranger.key.to_string(), "status"]);
    assert!(told.contains(&format!("shows the key {key}, and not {}", stranger.key)), "{told}");
    assert!(!ann.file("known_hosts").exists());

    ann.does(port, &["--accept-key", &key.to_string(), "status"]);
    let known = format!("127.0.0.1:{port} {key}\n");
    assert_eq!(std::fs::read_to_string(ann.file("known_hosts")).unwrap(), known);
    let status: serde_json::Value = serde_json::from_str(&ann.does(port, &["status", "--json"])).unwrap();
    assert_eq!(status["key"], key.to_string());
    assert!(ann.does(port, &["status"]).contains(&format!("key      {key}")));
    assert!(ann.does(port, &["ps"]).contains("file:./hello.wasm"));
    appliance.serves_hello().unwrap();
    std::fs::write(ann.file("hosts.toml"), format!("lab = {{ address = \"127.0.0.1\", port = {port} }}\n")).unwrap();
    let logs = gaia(&ann.folder, &["--on", "lab", "logs"]);
    assert!(String::from_utf8_lossy(&logs.stdout).contains(" RES 200 "), "{}", said(&logs));

    // Another control of the same boot is the same device.
    let pid = appliance.pid("control").unwrap();
    appliance.kill(pid, SIGKILL).unwrap();
    appliance.line(&format!("control: key {key}"), ANSWER_WITHIN).unwrap();
    appliance.until(ANSWER_WITHIN, |a| a.pid("control"), |now| *now != pid).unwrap();
    ann.does(port, &["ps"]);

    // A stranger learns what to do about it, and the console learns of the stranger.
    stranger.does(port, &["trust", &key.to_string()]);
    for command in [["status"].as_slice(), &["logs"], &["poweroff", "--yes"]] {
        let told = stranger.fails(port, command);
        assert!(told.contains("[operators]\n") && told.contains(&stranger.key.to_string()), "{command:?}: {told}");
        let line = format!("control: refused {FROM}: key {} is not an operator's", stranger.key);
        appliance.line(&line, ANSWER_WITHIN).unwrap();
    }
    assert_eq!(stranger.status(port, &["--json", "ps"]), Some(4));
    let told = stranger.fails(port, &["trust", &stranger.key.to_string()]);
    assert!(told.contains("known_hosts:1: "), "{told}");

    // The same place with another key.
    std::fs::write(ann.file("known_hosts"), format!("# mine\n127.0.0.1:{port} {}\n", stranger.key)).unwrap();
    let told = ann.fails(port, &["status"]);
    assert!(told.contains("has changed") && told.contains("known_hosts:2 says"), "{told}");
    assert!(told.contains(&key.to_string()) && told.contains(&stranger.key.to_string()), "{told}");
    std::fs::write(ann.file("known_hosts"), &known).unwrap();

    // Changes have their maker's name, also those that are none.
    let mut tls = Tls::to(port, Some(ann.shown()));
    assert!(tls.answer("POST /v1/nonsense HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").contains(" 404 "));
    appliance.line(&format!("control: ann from {FROM}:"), ANSWER_WITHIN).unwrap();
    let logs = ann.does(port, &["logs"]);
    assert!(logs.contains(" gaia AUDIT ann from ") && logs.contains(": POST /v1/nonsense: 404: "), "{logs}");
    // Nobody is there to be asked.
    let told = ann.fails(port, &["poweroff"]);
    assert!(told.contains("nothing is changed") && told.contains("--yes"), "{told}");
    assert!(ann.does(port, &["poweroff", "--yes"]).contains("the appliance switches off"));
    let line = appliance.line(": POST /v1/poweroff: 202", ANSWER_WITHIN).unwrap();
    assert!(line.contains("control: ann from "), "{line}");
    assert!(appliance.machine().wait_exit(Duration::from_mins(1)).unwrap().success());
}

/// Would miss: a log that is followed over the network only until control ends, or told twice there.
#[test]
fn who_follows_over_the_network_goes_on_with_the_next_control() {
    let ann = Person::new();
    let (appliance, key) = operated_by(&ann);
    let port = appliance.control_port().unwrap();
    ann.does(port, &["trust", &key.to_string()]);
    let kill = || {
        let pid = appliance.pid("control").unwrap();
        appliance.kill(pid, SIGKILL).unwrap();
        // Else a question may still reach the one that ends.
        appliance.until(ANSWER_WITHIN, |a| a.pid("control"), |now| *now != pid).unwrap();
    };
    let answers = |count: usize| {
        let asked = |_: &Appliance| Ok(ann.does(port, &["--json", "logs", "--brane", "hello", "--kind", "RES"]));
        let all = appliance.until(ANSWER_WITHIN, asked, |lines| lines.lines().count() >= count).unwrap();
        all.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let follow = command(&ann.folder, &["--on", &format!("127.0.0.1:{port}"), "--json", "logs"]);
    let get = || assert_eq!(appliance.get("/hello").unwrap().status, 200);
    goes_on_with_the_next_control(follow, &get, &kill, &answers);
    appliance.power_off().unwrap();
}

/// Would miss: a port that is open although nobody is listed.
#[test]
fn without_operators_nobody_is_answered() {
    let appliance = Appliance::boot(&Setup::default().production()).unwrap();
    let person = Person::new();
    let told = person.fails(appliance.control_port().unwrap(), &["status"]);
    assert!(!told.contains("ed25519:"), "{told}");
    let shown = appliance.power_off().unwrap();
    assert!(shown.contains("none are listed"), "{shown}");
    assert!(!shown.contains("control: key"), "{shown}");
}

/// A connection whose every byte is the test's to send.
pub(crate) struct Tls(StreamOwned<ClientConnection, TcpStream>);

impl Tls {
    pub(crate) fn try_to(
        port: u16,
        own: Option<Arc<CertifiedKey>>,
        version: &'static rustls::SupportedProtocolVersion,
    ) -> std::io::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
        let raw = version.version == rustls::ProtocolVersion::TLSv1_3;
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone { raw }));
        let mut config = match own {
            Some(key) => builder.with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key))),
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        let mut connection =
            ClientConnection::new(Arc::new(config), ServerName::try_from("appliance").unwrap()).unwrap();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        while connection.is_handshaking() {
            connection.complete_io(&mut stream)?;
        }
        Ok(Self(StreamOwned::new(connection, stream)))
    }

    pub(crate) fn to(port: u16, own: Option<Arc<CertifiedKey>>) -> Self {
        Self::try_to(port, own, &rustls::version::TLS13).unwrap()
    }

    /// Sends this and nothing more, and reads until the other side ends it, or is silent after it has answered.
    pub(crate) fn answer(&mut self, text: &str) -> String {
        // Whoever refuses early may close while the rest is on its way.
        let _ = self.0.write_all(text.as_bytes()).and_then(|()| self.0.flush());
        let (mut all, mut some) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = self.0.read(&mut some) {
            all.extend_from_slice(&some[..n]);
            let whole = text.ends_with("\r\n\r\n") && text.matches("HTTP/1.1\r\n").count() == 1;
            if whole && all.ends_with(b"}") {
                break;
            }
        }
        String::from_utf8(all).unwrap()
    }
}

/// Takes any server.
#[derive(Debug)]
struct Anyone {
    raw: bool,
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
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
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        self.raw
    }
}
