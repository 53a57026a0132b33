//! An appliance over the network, as an operator's command reaches it: whom it is asked for, whether it is the one it was
//! before, and who asks.
//!
//! | file in `${XDG_CONFIG_HOME:-~/.config}/gaia` | what it holds |
//! |---|---|
//! | `key`         | the operator's own key, in PEM; its owner's alone |
//! | `known_hosts` | the appliances that were trusted: `192.0.2.7:7250 ed25519:…`, one a line |
//! | `hosts.toml`  | short names: `lab = { address = "192.0.2.7", port = 7250 }` |

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use gaia_init::key::PublicKey;
use gaia_init::settings::CONTROL_PORT;
use gaia_manifest::Diagnostic;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use toml::Spanned;

use crate::failure::{Failure, Kind};
use crate::key::{self, Key};

/// Connecting and the handshake must be over within this.
const WITHIN: Duration = Duration::from_secs(10);
/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The file of short names.
const HOSTS: &str = "hosts.toml";

/// Where an operator's files are.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// This folder.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// As the environment says.
    ///
    /// # Errors
    /// If it names no home.
    pub fn from_environment() -> anyhow::Result<Self> {
        // Not absolute means not set (XDG Base Directory Specification).
        let of = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let config = of("XDG_CONFIG_HOME").or_else(|| Some(of("HOME")?.join(".config")));
        Ok(Self(config.context("there is no home for your key: set HOME or XDG_CONFIG_HOME")?.join("gaia")))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The operator's key, and the file it is in if it was made just now.
    ///
    /// # Errors
    /// If there is a file that is none, or that others may read, or none can be written.
    pub fn key(&self) -> anyhow::Result<(Key, Option<PathBuf>)> {
        let path = self.path("key");
        if let Some(key) = read_key(&path)? {
            return Ok((key, None));
        }
        let made = Key::make()?;
        self.make()?;
        // Whole or not at all, and not in the place of one that another process has just made.
        let draft =
            self.path(&format!("key.{:08x}", u128::from_le_bytes(std::array::from_fn(|at| made.public().0[at]))));
        let written = File::options().write(true).create_new(true).mode(0o600).open(&draft).and_then(|mut file| {
            file.write_all(made.pem().as_bytes())?;
            file.sync_all()
        });
        let placed = written.and_then(|()| std::fs::hard_link(&draft, &path));
        let _ = std::fs::remove_file(&draft);
        match placed {
            Ok(()) => Ok((made, Some(path))),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                Ok((read_key(&path)?.with_context(|| format!("{} came and went", path.display()))?, None))
            }
            Err(e) => Err(e).with_context(|| format!("writing {}", path.display())),
        }
    }

    fn make(&self) -> anyhow::Result<()> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.with_context(|| self.0.display().to_string())
    }

    /// The appliances that were trusted.
    ///
    /// # Errors
    /// If the file cannot be read, or one of its lines is none.
    pub fn known(&self) -> anyhow::Result<Known> {
        let path = self.path("known_hosts");
        let text = read(&path)?.unwrap_or_default();
        let lines = parse_known(&text)
            .map_err(|(line, why)| Failure::new(Kind::Usage, format!("{}:{line}: {why}", path.display())))?;
        Ok(Known { path, lines })
    }

    /// From now on this appliance is the one with this key.
    ///
    /// # Errors
    /// If it is known with another already, or the file cannot be written.
    pub fn trust(&self, host: &Host, key: PublicKey) -> anyhow::Result<()> {
        let known = self.known()?;
        if let Some(line) = known.lines.iter().find(|line| line.host == host.to_string()) {
            if line.key != key {
                let at = format!("{}:{}", known.path.display(), line.number);
                let error = format!("{at}: {host} is known with the key {}", line.key);
                let help = "if it was set up anew, and its console shows the other key, remove that line first";
                return Err(Failure::new(Kind::Untrusted, error).help(help).into());
            }
            return Ok(());
        }
        self.make()?;
        let path = &known.path;
        let mut file = OpenOptions::new();
        let mut file = file.read(true).append(true).create(true).mode(0o600).open(path);
        let mut text = String::new();
        let written = file.as_mut().map_err(|e| std::io::Error::from(e.kind())).and_then(|file| {
            file.take(MAX_FILE).read_to_string(&mut text)?;
            // The last line may lack its end. In one piece, so that two at a time do not mix.
            let start = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
            file.write_all(format!("{start}{host} {key}\n").as_bytes())?;
            file.sync_all()
        });
        written.with_context(|| format!("writing {}", path.display()))
    }

    /// The appliance that `HOST[:PORT]` or a short name means.
    ///
    /// # Errors
    /// If it is neither, or the file of short names is wrong.
    pub fn host(&self, text: &str) -> anyhow::Result<Host> {
        match self.names()?.remove(text) {
            Some(named) => Ok(named),
            None => Ok(Host::parse(text).map_err(|e| {
                let help = format!("a short name is one in {}: `gaia hosts` lists them", self.path(HOSTS).display());
                Failure::new(Kind::Usage, e.to_string()).help(help)
            })?),
        }
    }

    /// The short names.
    ///
    /// # Errors
    /// All that is wrong with their file, each with its line and column.
    pub fn names(&self) -> anyhow::Result<BTreeMap<String, Host>> {
        let path = self.path(HOSTS);
        let Some(text) = read(&path)? else { return Ok(BTreeMap::new()) };
        parse_names(&text).map_err(|wrong| {
            let file = path.display().to_string();
            let all: Vec<String> = wrong.iter().map(|one| one.render(&file, &text, false)).collect();
            Failure::new(Kind::Usage, format!("{file} is wrong:\n{}", all.join("\n"))).into()
        })
    }

    /// All appliances that have a short name or were trusted.
    ///
    /// # Errors
    /// If one of the two files is wrong.
    pub fn all(&self) -> anyhow::Result<Hosts> {
        let known = self.known()?.lines;
        let key = |address: &str| known.iter().find(|line| line.host == address).map(|line| line.key);
        let named = self.names()?.into_iter().map(|(name, host)| {
            let address = host.to_string();
            HostEntry { name: Some(name), key: key(&address), address }
        });
        let mut hosts: Vec<_> = named.collect();
        let others = known.iter().filter(|line| hosts.iter().all(|host| host.address != line.host));
        let other = |line: &KnownLine| HostEntry { name: None, address: line.host.clone(), key: Some(line.key) };
        let others: Vec<_> = others.map(other).collect();
        hosts.extend(others);
        Ok(Hosts { hosts })
    }

    /// An appliance that was trusted, if this operator has a key: found without a word over the network, and nothing is made for it.
    #[must_use]
    pub fn trusted(&self, text: &str) -> Option<Remote> {
        let host = self.host(text).ok()?;
        let pinned = self.known().ok()?.lines.into_iter().find(|line| line.host == host.to_string())?.key;
        Some(Remote { host, own: read_key(&self.path("key")).ok()??, pinned })
    }
}

/// `gaia hosts`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hosts {
    /// Those with a short name first.
    pub hosts: Vec<HostEntry>,
}

/// An appliance that an operator's files name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostEntry {
    /// Its short name, if it has one.
    pub name: Option<String>,
    /// `HOST:PORT`
    pub address: String,
    /// The key that it has to show; none, if it was not trusted yet.
    pub key: Option<PublicKey>,
}

impl Hosts {
    /// As a person reads them.
    #[must_use]
    pub fn text(&self) -> String {
        if self.hosts.is_empty() {
            return "no appliance is known yet: gaia --on HOST status, or a short name in hosts.toml\n".to_owned();
        }
        let mut out = format!("{:<16} {:<32} {}\n", "NAME", "ADDRESS", "KEY");
        for host in &self.hosts {
            let key = host.key.map_or_else(|| "not trusted yet".to_owned(), |key| key.to_string());
            let _ = writeln!(out, "{:<16} {:<32} {key}", host.name.as_deref().unwrap_or("-"), host.address);
        }
        out
    }
}

/// Reads short names: `lab = { address = "192.0.2.7", port = 7250 }`. All that is wrong comes at once.
fn parse_names(text: &str) -> Result<BTreeMap<String, Host>, Vec<Diagnostic>> {
    let form = "NAME = { address = \"HOST\" }, or with port = 7250";
    let names: BTreeMap<String, Named> = toml::from_str(text).map_err(|e| {
        let span = e.span().filter(|span| text.get(span.clone()).is_some()).unwrap_or(0..0);
        vec![Diagnostic::error(span, e.message(), "here").help(form)]
    })?;
    let (mut hosts, mut wrong) = (BTreeMap::new(), Vec::new());
    for (name, Named { address, port }) in names {
        match Host::parse(address.get_ref()) {
            Ok(host) => drop(hosts.insert(name, Host { port: port.map_or(host.port, Port::get), ..host })),
            Err(e) => wrong.push(Diagnostic::error(address.span(), e.to_string(), "this address").help(form)),
        }
    }
    if wrong.is_empty() { Ok(hosts) } else { Err(wrong) }
}

fn read(path: &Path) -> anyhow::Result<Option<String>> {
    let mut text = String::new();
    match File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

fn read_key(path: &Path) -> anyhow::Result<Option<Key>> {
    let Some(pem) = read(path)? else { return Ok(None) };
    let shown = path.display();
    let others = std::fs::metadata(path).with_context(|| shown.to_string())?.mode() & 0o077;
    ensure!(others == 0, "others than its owner may use the key {shown}: chmod 600 {shown}");
    Ok(Some(Key::of_pem(pem.as_bytes()).with_context(|| shown.to_string())?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    address: Spanned<String>,
    port: Option<Port>,
}

type Port = std::num::NonZeroU16;

/// Where an appliance's control is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    name: String,
    port: u16,
}

impl Host {
    /// Reads `lab.example.org`, `192.0.2.7:7250`, `fe80::1` or `[::1]:7250`.
    ///
    /// # Errors
    /// That it is none of these.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let wrong = || format!("{text:?} is no appliance: HOST, HOST:PORT or [ADDRESS]:PORT");
        if let Ok(address) = text.parse::<Ipv6Addr>() {
            return Ok(Self { name: address.to_string(), port: CONTROL_PORT });
        }
        let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((address, rest)) => {
                let address: Ipv6Addr = address.parse().ok().with_context(wrong)?;
                let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').with_context(wrong)?) };
                (address.to_string(), port)
            }
            None => match text.split_once(':') {
                Some((name, port)) => (name.to_ascii_lowercase(), Some(port)),
                None => (text.to_ascii_lowercase(), None),
            },
        };
        let usual = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
        let is_name = !name.is_empty() && name.len() <= 253 && name.bytes().all(usual);
        if !is_name && name.parse::<IpAddr>().is_err() {
            bail!(wrong());
        }
        let digits = |port: &&str| port.bytes().all(|b| b.is_ascii_digit());
        let port = match port {
            None => CONTROL_PORT,
            Some(port) => port.parse().ok().filter(|n| *n != 0 && digits(&port)).with_context(wrong)?,
        };
        Ok(Self { name, port })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') {
            return write!(f, "[{}]:{}", self.name, self.port);
        }
        write!(f, "{}:{}", self.name, self.port)
    }
}

/// One line of the known appliances.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownLine {
    number: usize,
    host: String,
    key: PublicKey,
}

/// The appliances that were trusted, and the file in which they are.
#[derive(Debug)]
pub struct Known {
    path: PathBuf,
    lines: Vec<KnownLine>,
}

/// Reads `HOST:PORT KEY`, one a line; lines that are empty or begin with `#` are passed over. The error is the number of the
/// line that is none, and why.
fn parse_known(text: &str) -> Result<Vec<KnownLine>, (usize, String)> {
    let mut lines: Vec<KnownLine> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let [host, key] = words[..] else { return Err((number, "not \"HOST:PORT ed25519:…\"".to_owned())) };
        let host = Host::parse(host).map_err(|e| (number, e.to_string()))?.to_string();
        let key = key.parse().map_err(|e: gaia_init::key::NoKey| (number, e.to_string()))?;
        if let Some(other) = lines.iter().find(|line| line.host == host) {
            return Err((number, format!("{host} is in line {} already", other.number)));
        }
        lines.push(KnownLine { number, host, key });
    }
    Ok(lines)
}

/// Why an appliance cannot be trusted.
#[derive(Debug)]
#[non_exhaustive]
pub enum Untrusted {
    /// It shows another key than before.
    Changed {
        /// Which appliance.
        host: Host,
        /// The key that it shows.
        shown: PublicKey,
        /// The file of the known appliances.
        file: PathBuf,
        /// The line there.
        line: usize,
        /// The key that it had before.
        known: PublicKey,
    },
    /// Nobody has said yet that it is the one it says it is.
    Unknown {
        /// Which appliance.
        host: Host,
        /// The key that it shows.
        shown: PublicKey,
    },
    /// It shows another key than the one that would be taken.
    Another {
        /// Which appliance.
        host: Host,
        /// The key that it shows.
        shown: PublicKey,
        /// The one that would be taken.
        wanted: PublicKey,
    },
}

impl Untrusted {
    /// What it is about, and what to do.
    #[must_use]
    pub fn failure(&self) -> Failure {
        let (error, help) = match self {
            Self::Changed { host, shown, file, line, known } => (
                format!("the key of {host} has changed: it shows {shown}, and {}:{line} says {known}", file.display()),
                "somebody may stand between you and it. If it was set up anew, hold the new key against the one on its console, and remove \
                 that line"
                    .to_owned(),
            ),
            Self::Unknown { host, shown } => (
                format!("{host} is not known, and shows the key {shown}"),
                format!("hold it against the one on its console. If it is the same: gaia --on {host} trust {shown}"),
            ),
            Self::Another { host, shown, wanted } => (
                format!("{host} shows the key {shown}, and not {wanted}"),
                "it is another appliance than you think, or one stands between you and it: its console shows its key".to_owned(),
            ),
        };
        Failure::new(Kind::Untrusted, error).help(help)
    }
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.failure().fmt(f)
    }
}

impl std::error::Error for Untrusted {}

/// An appliance over the network that is trusted, and who asks it.
#[derive(Debug, Clone)]
pub struct Remote {
    host: Host,
    own: Key,
    pinned: PublicKey,
}

impl Remote {
    /// Finds out whether it is known. If not, it is asked for its key, and taken if that is `accepted` or if `ask` says so.
    ///
    /// # Errors
    /// If it is not trusted in the end ([`Untrusted`]), does not answer, or the operator's files are wrong.
    pub fn reach(
        folder: &Folder,
        host: Host,
        accepted: Option<PublicKey>,
        ask: impl FnOnce(&Host, PublicKey) -> bool,
    ) -> anyhow::Result<Self> {
        let (own, _) = folder.key()?;
        let known = folder.known()?;
        if let Some(line) = known.lines.iter().find(|line| line.host == host.to_string()) {
            if let Some(shown) = accepted.filter(|accepted| *accepted != line.key) {
                let at = format!("{}:{}", known.path.display(), line.number);
                let error = format!("{host} is known with the key {}, and would be taken with {shown}: {at}", line.key);
                let help = "leave --accept-key away, or remove that line if its console shows the other key";
                return Err(Failure::new(Kind::Untrusted, error).help(help).into());
            }
            // Whether it still shows it is seen with each connection.
            return Ok(Self { host, own, pinned: line.key });
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shown = runtime.block_on(shown_by(&host))?;
        match accepted {
            Some(wanted) if wanted != shown => return Err(Untrusted::Another { host, shown, wanted }.into()),
            Some(_) => {}
            None if ask(&host, shown) => {}
            None => return Err(Untrusted::Unknown { host, shown }.into()),
        }
        folder.trust(&host, shown)?;
        Ok(Self { host, own, pinned: shown })
    }

    /// Which it is.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// A conversation with it. That this end is no operator shows only in what is read from it: [`Remote::explained`].
    ///
    /// # Errors
    /// If it does not answer, or is not the one it was.
    pub async fn connect(&self, folder: &Folder) -> anyhow::Result<TlsStream<TcpStream>> {
        let shown = Arc::new(OnceLock::new());
        let verifier = Pinned { pinned: Some(self.pinned), shown: Arc::clone(&shown) };
        let own = Arc::new(AlwaysResolvesClientRawPublicKeys::new(self.own.shown()?));
        let mut config = builder(verifier)?.with_client_cert_resolver(own);
        prepare(&mut config);
        dial(&self.host, config).await.map_err(|e| match shown.get().copied() {
            Some(shown) if shown != self.pinned => match folder.known() {
                Ok(Known { path: file, lines }) => {
                    let line = lines.iter().find(|line| line.host == self.host.to_string()).map_or(0, |l| l.number);
                    Untrusted::Changed { host: self.host.clone(), shown, file, line, known: self.pinned }.into()
                }
                Err(e) => e,
            },
            _ => e,
        })
    }

    /// What to do, if this is how a conversation broke off with one who is no operator.
    #[must_use]
    pub fn explained(&self, error: &(dyn std::error::Error + 'static)) -> Option<Failure> {
        let alert = alert_in(error)?;
        let (host, key) = (&self.host, self.own.public());
        match alert {
            AlertDescription::AccessDenied | AlertDescription::CertificateRequired => {
                let usual = |c: &char| c.is_ascii_alphanumeric() || ".-_".contains(*c);
                let name: String = std::env::var("USER").unwrap_or_default().chars().filter(usual).take(32).collect();
                let name = if name.is_empty() { "me" } else { &name };
                let error = format!("{host} does not list your key as an operator's");
                let help = format!(
                    "to be one, add it to the appliance's gaia.toml, and start it again:\n\n[operators]\n{name} = \"{key}\"\n"
                );
                Some(Failure::new(Kind::Untrusted, error).help(help))
            }
            alert => Some(Failure::new(Kind::Failed, format!("{host} ended the conversation: {alert:?}"))),
        }
    }
}

/// The alert with which the other side ended TLS, if that is what an error comes from.
fn alert_in(error: &(dyn std::error::Error + 'static)) -> Option<AlertDescription> {
    let mut next = Some(error);
    while let Some(error) = next {
        let inner = error.downcast_ref::<std::io::Error>().and_then(|e| e.get_ref());
        let tls = inner.and_then(|e| e.downcast_ref()).or_else(|| error.downcast_ref::<rustls::Error>());
        if let Some(rustls::Error::AlertReceived(alert)) = tls {
            return Some(*alert);
        }
        next = error.source();
    }
    None
}

/// The key that an appliance shows. Whether it has it, only a conversation tells; it is not told who asks.
async fn shown_by(host: &Host) -> anyhow::Result<PublicKey> {
    let shown = Arc::new(OnceLock::new());
    let verifier = Pinned { pinned: None, shown: Arc::clone(&shown) };
    // An appliance speaks with nobody who has no key at all. None is shown: the handshake ends before that.
    let nobody = Arc::new(AlwaysResolvesClientRawPublicKeys::new(Key::make()?.shown()?));
    let mut config = builder(verifier)?.with_client_cert_resolver(nobody);
    prepare(&mut config);
    let dialled = dial(host, config).await;
    match (shown.get(), dialled) {
        (Some(shown), _) => Ok(*shown),
        (None, Err(e)) => Err(e),
        (None, Ok(_)) => Err(unreachable(format!("{host} shows no key")).into()),
    }
}

fn builder(
    verifier: Pinned,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(key::provider());
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?.dangerous();
    Ok(builder.with_custom_certificate_verifier(Arc::new(verifier)))
}

fn prepare(config: &mut ClientConfig) {
    config.alpn_protocols = vec![key::ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
}

async fn dial(host: &Host, config: ClientConfig) -> anyhow::Result<TlsStream<TcpStream>> {
    let dialling = async {
        let addresses = tokio::net::lookup_host((host.name.as_str(), host.port)).await.map_err(|e| {
            let help = "is it spelt right? `gaia hosts` lists the short names; HOST may be an address, too";
            unreachable(format!("no address is found for {:?}: {e}", host.name)).help(help)
        })?;
        let addresses: Vec<_> = addresses.collect();
        let stream = TcpStream::connect(addresses.as_slice()).await.map_err(|e| not_connected(host, &e))?;
        let _ = stream.set_nodelay(true);
        // The name stands for nothing: the key is who it is.
        let name = ServerName::try_from("appliance")?;
        let connecting = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        connecting.map_err(|e| {
            let help = "what answers there is no appliance's control: it is on port 7250, or on the one that `control.port` in gaia.toml says";
            anyhow::Error::from(unreachable(format!("{host} does not speak as an appliance does: {e}")).help(help))
        })
    };
    let slow = || {
        let help = "is the appliance up, and is this its address? A packet filter in between may be silent, too";
        unreachable(format!("{host} does not answer within {} s", WITHIN.as_secs())).help(help)
    };
    timeout(WITHIN, dialling).await.map_err(|_| slow())?
}

fn unreachable(error: String) -> Failure {
    Failure::new(Kind::Unreachable, error)
}

fn not_connected(host: &Host, error: &std::io::Error) -> Failure {
    let (what, help) = match error.kind() {
        ErrorKind::ConnectionRefused => (
            format!("nobody listens on {host}"),
            "is the appliance up? Its port for operators is closed unless its gaia.toml lists one under [operators], and is 7250 unless \
             control.port says another",
        ),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            (format!("there is no way to {host}: {error}"), "is the appliance up, and is this its address?")
        }
        _ => (format!("{host}: {error}"), "is the appliance up?"),
    };
    unreachable(what).help(help)
}

/// Takes the key that is pinned, or none, and remembers what was shown.
#[derive(Debug)]
struct Pinned {
    pinned: Option<PublicKey>,
    shown: Arc<OnceLock<PublicKey>>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let shown = key::of_peer(shown, more)?;
        let _ = self.shown.set(shown);
        if self.pinned == Some(shown) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        key::check_signature(message, shown, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        key::SCHEMES.to_vec()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn folder() -> (tempfile::TempDir, Folder) {
        let folder = tempfile::tempdir().unwrap();
        let gaia = Folder::new(folder.path().join("config/gaia"));
        (folder, gaia)
    }

    #[test]
    fn an_operators_key_is_made_once_and_is_its_owners_alone() {
        let (_kept, folder) = folder();
        let (made, path) = folder.key().unwrap();
        let path = path.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        let (again, none) = folder.key().unwrap();
        assert_eq!((again.public(), none), (made.public(), None));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft is left");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(folder.key().unwrap_err().to_string().contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "no key").unwrap();
        assert!(folder.key().is_err(), "what is there is not overwritten");
    }

    #[test]
    fn many_at_once_make_one_key() {
        let (_kept, folder) = folder();
        let keys: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| folder.key())).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let made = keys.iter().flatten().filter(|(_, made)| made.is_some()).count();
        let keys: Vec<_> = keys.into_iter().map(|key| key.unwrap().0.public()).collect();
        assert!(made == 1 && keys.iter().all(|key| *key == keys[0]), "{keys:?}");
    }

    #[test]
    fn an_appliance_is_pinned_once() {
        let (_kept, folder) = folder();
        let (one, other) = (Key::make().unwrap().public(), Key::make().unwrap().public());
        let (lab, attic) = (Host::parse("LAB").unwrap(), Host::parse("[::1]:9").unwrap());
        folder.trust(&lab, one).unwrap();
        folder.trust(&lab, one).unwrap();
        let path = folder.path("known_hosts");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("lab:7250 {one}\n"));
        // Written by hand, without an end.
        std::fs::write(&path, format!("# mine\n\n{}", text.trim_end())).unwrap();
        folder.trust(&attic, other).unwrap();
        let error = folder.trust(&lab, other).unwrap_err().to_string();
        assert!(error.contains("known_hosts:3: ") && error.contains(&one.to_string()), "{error}");
        let known = folder.known().unwrap();
        assert_eq!(known.lines.len(), 2);
        assert_eq!(known.lines[1], KnownLine { number: 4, host: "[::1]:9".into(), key: other });
    }

    #[test]
    fn short_names_lead_to_appliances() {
        let (_kept, folder) = folder();
        folder.make().unwrap();
        std::fs::write(
            folder.path("hosts.toml"),
            "lab = { address = \"192.0.2.7\" }\nattic = { address = \"fe80::1\", port = 9 }\n",
        )
        .unwrap();
        let host = |text| folder.host(text).unwrap().to_string();
        assert_eq!(host("lab"), "192.0.2.7:7250");
        assert_eq!(host("attic"), "[fe80::1]:9");
        assert_eq!(host("else:8"), "else:8");
        std::fs::write(folder.path("hosts.toml"), "lab = { adress = \"192.0.2.7\" }\n").unwrap();
        let error = folder.host("lab").unwrap_err().to_string();
        assert!(error.contains("hosts.toml:1:9") && error.contains("adress"), "{error}");
        std::fs::write(
            folder.path("hosts.toml"),
            "# mine\nlab = { address = \"a b\" }\nb = { address = \"c\", port = 1 }\nc = { address = \"\" }\n",
        )
        .unwrap();
        let error = folder.host("b").unwrap_err().to_string();
        assert!(error.contains("hosts.toml:2:19") && error.contains("hosts.toml:4:17"), "{error}");
        std::fs::write(folder.path("hosts.toml"), "lab = { address = \"a\", port = 0 }\n").unwrap();
        assert!(folder.host("lab").unwrap_err().to_string().contains("hosts.toml:1:31"));
    }

    #[test]
    fn all_that_an_operators_files_name_is_listed_once() {
        let (_kept, folder) = folder();
        assert!(folder.all().unwrap().text().starts_with("no appliance is known yet"));
        folder.make().unwrap();
        std::fs::write(folder.path("hosts.toml"), "lab = { address = \"LAB\" }\nattic = { address = \"::1\" }\n")
            .unwrap();
        let (one, other) = (Key::make().unwrap().public(), Key::make().unwrap().public());
        folder.trust(&Host::parse("lab").unwrap(), one).unwrap();
        folder.trust(&Host::parse("192.0.2.7:9").unwrap(), other).unwrap();
        let entry = |name: Option<&str>, address: &str, key| HostEntry {
            name: name.map(str::to_owned),
            address: address.into(),
            key,
        };
        let all = folder.all().unwrap();
        assert_eq!(
            all.hosts,
            [
                entry(Some("attic"), "[::1]:7250", None),
                entry(Some("lab"), "lab:7250", Some(one)),
                entry(None, "192.0.2.7:9", Some(other))
            ]
        );
        assert!(
            all.text().contains("attic            [::1]:7250                       not trusted yet\n"),
            "{}",
            all.text()
        );
        assert!(folder.trusted("lab").is_none(), "there is no key to show, and none is made");
        assert!(!folder.path("key").exists());
        folder.key().unwrap();
        assert_eq!(folder.trusted("lab").unwrap().pinned, one);
        assert!(folder.trusted("attic").is_none());
    }

    #[test]
    fn what_is_no_host_is_told_so() {
        for text in [
            "",
            ":",
            "a:",
            "a:0",
            "a:x",
            "a:+1",
            "a b",
            "[::1",
            "[::1]x",
            "[x]:1",
            "a:65536",
            "ä",
            "a/b",
            "[1.2.3.4]:1",
        ] {
            assert!(Host::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let key = Key::make().unwrap().public();
        let wrong = |text: &str| parse_known(text).unwrap_err();
        assert_eq!(wrong("\n\nlab").0, 3);
        assert_eq!(wrong(&format!("lab {key}\nlab:7250 {key}")).0, 2);
        assert!(wrong("lab ed25519:short").1.contains("gaia key"));
        assert_eq!(wrong(&format!("lab {key} extra")).0, 1);
    }

    proptest! {
        #[test]
        fn a_host_is_read_as_it_is_written(text in "\\PC{0,40}|[a-z0-9.-]{1,20}(:[0-9]{1,6})?|\\[[0-9a-f:]{2,20}\\](:[0-9]{1,6})?") {
            if let Ok(host) = Host::parse(&text) {
                prop_assert_eq!(Host::parse(&host.to_string()).unwrap(), host);
            }
        }

        #[test]
        fn short_names_are_read_as_they_are_written(
            all in proptest::collection::btree_map("[a-z][a-z0-9-]{0,8}", ("[a-z0-9]{1,12}|[0-9a-f]{1,4}::[0-9a-f]{1,4}", proptest::option::of(1..=u16::MAX)), 0..8)
        ) {
            let line = |(name, (address, port)): (&String, &(String, Option<u16>))| {
                let port = port.map(|port| format!(", port = {port}")).unwrap_or_default();
                format!("{name} = {{ address = \"{address}\"{port} }}\n")
            };
            let text: String = all.iter().map(line).collect();
            let wanted = all.iter().map(|(name, (address, port))| {
                let host = Host::parse(address).unwrap();
                (name.clone(), Host { port: port.unwrap_or(host.port), ..host })
            });
            prop_assert_eq!(parse_names(&text).unwrap(), wanted.collect::<BTreeMap<_, _>>());
        }

        #[test]
        fn any_text_is_short_names_or_is_told_where_not(
            text in "(\\PC{0,30}\n|[a-z]{1,3} = \\{ address = \"\\PC{0,9}\"(, port = -?[0-9]{1,6})? \\}\r?\n){0,5}"
        ) {
            if let Err(wrong) = parse_names(&text) {
                prop_assert!(!wrong.is_empty());
                for one in wrong {
                    let (line, column) = one.line_and_column(&text);
                    prop_assert!(line <= text.matches('\n').count() + 1 && column > 0);
                    prop_assert!(one.render("hosts.toml", &text, false).contains("hosts.toml:"));
                }
            }
        }

        #[test]
        fn known_appliances_are_read_as_they_are_written(
            all in proptest::collection::btree_map("[a-z]{1,8}", any::<[u8; 32]>(), 0..8),
            noise in "(#[^\n]{0,20}|[ \t]{0,5})"
        ) {
            let line = |(host, key): (&String, &[u8; 32])| format!("{noise}\n{host}:1 {}\n", PublicKey(*key));
            let text: String = all.iter().map(line).collect();
            let read = parse_known(&text).unwrap();
            let wanted: Vec<_> = all.iter().map(|(host, key)| (format!("{host}:1"), PublicKey(*key))).collect();
            prop_assert_eq!(read.into_iter().map(|line| (line.host, line.key)).collect::<Vec<_>>(), wanted);
        }

        #[test]
        fn any_text_is_known_appliances_or_is_told_why_not(text in "(\\PC{0,30}\n|lab ed25519:[A-Za-z0-9_-]{43}\n){0,5}") {
            if let Err((line, why)) = parse_known(&text) {
                prop_assert!(line <= text.lines().count() && !why.is_empty());
            }
        }
    }
}
