//! `gaia.toml`: the device's own settings.
//!
//! A file that does not parse never bricks the device: [`parse`] returns the error as text for the console, and
//! the caller goes on with [`Settings::default`].

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::Deserialize;

use crate::collector::Collector;
use crate::key::PublicKey;
use crate::registries::{Access, Host, Registries, Registry, shown};

/// The largest `gaia.toml` that is read, in bytes.
pub const MAX_BYTES: u64 = 64 * 1024;
/// The most ports for requests: each is two sockets for every worker core, all of which have names in one variable.
pub const MAX_PORTS: usize = 16;
/// The most operators: control is told of all of them in one variable, and looks through them at each handshake.
pub const MAX_OPERATORS: usize = 64;

/// Everything `gaia.toml` can say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// `[network]`
    pub network: Network,
    /// `[ingress]`
    pub ingress: Ingress,
    /// `[egress]`
    pub egress: Egress,
    /// `[workers]`
    pub workers: Workers,
    /// `[console]`
    pub console: Console,
    /// `[control]`
    pub control: Control,
    /// `[logs]`
    pub logs: Logs,
    /// `[metrics]`
    pub metrics: Metrics,
    /// `[operators]`: who may operate the appliance over the network, by a name for the log; nobody unless listed.
    pub operators: BTreeMap<Operator, PublicKey>,
    /// `[registry]`: which registries manifests may name.
    pub registry: Registry,
    /// `[registries]`: those that are known, and as whom they are asked.
    pub registries: BTreeMap<Host, Access>,
}

impl Settings {
    /// What it says about registries.
    #[must_use]
    pub fn all_registries(&self) -> Registries {
        Registries { registry: self.registry.clone(), registries: self.registries.clone() }
    }
}

/// The network of the appliance itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// The interface's name; by default the first Ethernet interface there is.
    pub interface: Option<String>,
    /// Static addresses with their prefix lengths; IPv4 and IPv6.
    pub address: Vec<Prefix>,
    /// Default gateways, at most one per family.
    pub gateway: Vec<IpAddr>,
    /// Name servers, asked in this order.
    pub dns: Vec<IpAddr>,
}

/// Where the appliance listens for requests.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ingress {
    /// TCP ports for plain HTTP; with those of `https` at most [`MAX_PORTS`].
    pub http: Vec<u16>,
    /// TCP ports for HTTP over TLS; they need a certificate and its key.
    pub https: Vec<u16>,
    /// The file beside the graph with the certificate of the appliance's names and those that lead to its authority, in PEM.
    pub certificate: Option<String>,
    /// The file beside the graph with the certificate's private key, in PEM.
    pub key: Option<String>,
}

impl Default for Ingress {
    fn default() -> Self {
        Self { http: vec![80], https: Vec::new(), certificate: None, key: None }
    }
}

impl Ingress {
    /// What is wrong with it.
    fn check(&self) -> Result<(), String> {
        for (key, ports) in [("http", &self.http), ("https", &self.https)] {
            if ports.contains(&0) {
                return Err(format!(
                    "ingress.{key}: 0 is not a port; name one from 1 to 65535, or leave the list empty"
                ));
            }
        }
        if self.http.len() + self.https.len() > MAX_PORTS {
            return Err(format!("ingress.http and ingress.https: at most {MAX_PORTS} ports together"));
        }
        if let Some(port) = self.https.iter().find(|port| self.http.contains(port)) {
            return Err(format!("ingress.https: port {port} is in ingress.http already"));
        }
        if !self.https.is_empty() && (self.certificate.is_none() || self.key.is_none()) {
            return Err("ingress.https: TLS needs ingress.certificate and ingress.key, the names of two files beside \
                        the graph"
                .to_owned());
        }
        for (key, file) in [("certificate", &self.certificate), ("key", &self.key)] {
            if let Some(name) = file.as_ref().filter(|name| !is_beside_the_graph(name)) {
                return Err(format!("ingress.{key}: {name:?} is not the name of a file beside the graph"));
            }
        }
        Ok(())
    }
}

/// What branes' requests to the outside need.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Egress {
    /// Files beside the graph with certificates, in PEM, of authorities that are trusted besides the usual ones.
    pub roots: Vec<String>,
}

/// The workers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// How transparent huge pages are given out.
    pub huge_pages: HugePages,
}

/// The policy for transparent huge pages, in the kernel's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Only where the runtime asks for them.
    #[default]
    Madvise,
    /// Wherever they fit.
    Always,
    /// Not at all.
    Never,
}

impl HugePages {
    /// The word that `/sys/kernel/mm/transparent_hugepage/enabled` takes.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Madvise => "madvise",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

/// The serial console.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Console {
    /// What it lets a person at the line do.
    pub mode: ConsoleMode,
    /// What is at the other end of the line.
    pub terminal: Terminal,
}

/// What is at the other end of a serial line, which cannot be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Terminal {
    /// A terminal, or a program that is one: it obeys the sequences that move the cursor and erase.
    #[default]
    Vt100,
    /// Something that prints characters, and knows a backspace.
    Dumb,
}

impl Terminal {
    /// Its name, as `TERM` has it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Vt100 => "vt100",
            Self::Dumb => "dumb",
        }
    }
}

/// What the serial console is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleMode {
    /// A prompt that takes every command.
    #[default]
    Operate,
    /// A prompt that only shows.
    Observe,
    /// The boot report and the appliance's events; no prompt.
    Off,
}

impl ConsoleMode {
    /// The word for it in `gaia.toml`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Operate => "operate",
            Self::Observe => "observe",
            Self::Off => "off",
        }
    }
}

/// Where control answers operators over the network, if any are listed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// The TCP port, on all addresses.
    pub port: u16,
}

/// What becomes of the log besides being kept.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Logs {
    /// The collector to which control sends every line; none unless it is named.
    pub export: Option<Collector>,
}

/// The port on which control answers operators, if `gaia.toml` does not say another: the number of the RFC by which both
/// sides show their keys, and nobody's at IANA.
pub const CONTROL_PORT: u16 = 7250;

impl Default for Control {
    fn default() -> Self {
        Self { port: CONTROL_PORT }
    }
}

/// Where control answers with metrics in the clear, if it does.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// The TCP port, on all addresses; none, unless it is named.
    pub port: Option<u16>,
    /// Networks from which they may be asked for; from everywhere, if none is named. At most [`MAX_NETWORKS`].
    pub allow: Vec<Prefix>,
}

/// The most networks that may ask for metrics: control is told of all of them in one variable.
pub const MAX_NETWORKS: usize = 64;

/// What is wrong with where metrics are.
fn check_metrics(settings: &Settings) -> Result<(), String> {
    let Settings { metrics, ingress, control, operators, .. } = settings;
    if metrics.allow.len() > MAX_NETWORKS {
        return Err(format!("metrics.allow: at most {MAX_NETWORKS} networks"));
    }
    let Some(port) = metrics.port else {
        let meant = metrics.allow.is_empty();
        return if meant { Ok(()) } else { Err("metrics.allow: there is no metrics.port".to_owned()) };
    };
    if port == 0 {
        return Err("metrics.port: 0 is not a port; name one from 1 to 65535, or leave it away to have none".to_owned());
    }
    if ingress.http.contains(&port) || ingress.https.contains(&port) {
        return Err(format!("metrics.port: port {port} is one of the ingress's; name another: [metrics] port = 9464"));
    }
    if !operators.is_empty() && control.port == port {
        return Err(format!("metrics.port: port {port} is the operators'; name another: [metrics] port = 9464"));
    }
    Ok(())
}

/// An operator's name: 1 to 32 of the letters, digits, `.`, `-` and `_` of ASCII. It stands in the log.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Operator(String);

impl TryFrom<String> for Operator {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let usual = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
        if (1..=32).contains(&name.len()) && name.bytes().all(usual) {
            return Ok(Self(name));
        }
        Err(format!(
            "{:?} cannot be an operator's name: 1 to 32 letters, digits, '.', '-' and '_'",
            name.chars().take(64).collect::<String>()
        ))
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is wrong with who operates and where.
fn check_operators(settings: &Settings) -> Result<(), String> {
    let Settings { control: Control { port }, operators, ingress, .. } = settings;
    if *port == 0 {
        return Err("control.port: 0 is not a port; name one from 1 to 65535, or leave it away for 7250".to_owned());
    }
    if operators.len() > MAX_OPERATORS {
        return Err(format!("operators: at most {MAX_OPERATORS}"));
    }
    let mut names: BTreeMap<&PublicKey, &Operator> = BTreeMap::new();
    for (name, key) in operators {
        if let Some(other) = names.insert(key, name) {
            return Err(format!("operators.{name}: the key is that of {other} already; each operator has its own"));
        }
    }
    if !operators.is_empty() && (ingress.http.contains(port) || ingress.https.contains(port)) {
        return Err(format!("control.port: port {port} is one of the ingress's; name another: [control] port = 7250"));
    }
    Ok(())
}

/// An address with the length of its network's prefix: `10.0.2.15/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Prefix {
    /// The address.
    pub address: IpAddr,
    /// Leading bits that name the network: 0 to 32 or 128.
    pub length: u8,
}

impl Prefix {
    /// Whether an address is of this network.
    #[must_use]
    pub fn covers(&self, address: IpAddr) -> bool {
        let same = |a: u128, b: u128, bits: u32| bits == 0 || (a ^ b) >> (128 - bits) == 0;
        match (self.address, address) {
            (IpAddr::V4(net), IpAddr::V4(one)) => {
                same(u128::from(net.to_bits()) << 96, u128::from(one.to_bits()) << 96, self.length.into())
            }
            (IpAddr::V6(net), IpAddr::V6(one)) => same(net.to_bits(), one.to_bits(), self.length.into()),
            _ => false,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not an address with a prefix length, such as \"10.0.2.15/24\"");
        let (address, length) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length: u8 = length.parse().map_err(|_| wrong())?;
        if length > most {
            return Err(format!("\"{text}\": a prefix of this family has at most {most} bits"));
        }
        Ok(Self { address, length })
    }
}

impl TryFrom<String> for Prefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Parses `gaia.toml`.
///
/// # Errors
/// A text for the console that shows line, column and what is wrong there.
///
/// ```
/// let settings = gaia_init::settings::parse("[ingress]\nhttp = [8080]\n").unwrap();
/// assert_eq!(settings.ingress.http, [8080]);
/// let error = gaia_init::settings::parse("[ingres]\n").unwrap_err();
/// assert!(error.contains("line 1, column 2") && error.contains("ingres"), "{error}");
/// ```
pub fn parse(text: &str) -> Result<Settings, String> {
    let settings: Settings = toml::from_str(text).map_err(|e| shown(&e))?;
    for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        if settings.network.gateway.iter().filter(|g| family(g)).count() > 1 {
            return Err("network.gateway: at most one gateway per address family".to_owned());
        }
    }
    settings.ingress.check()?;
    check_operators(&settings)?;
    check_metrics(&settings)?;
    if let Some(name) = settings.egress.roots.iter().find(|name| !is_beside_the_graph(name)) {
        return Err(format!("egress.roots: {name:?} is not the name of a file beside the graph"));
    }
    settings.all_registries().check()?;
    let roots = settings.registries.iter().filter_map(|(host, access)| Some((host, access.root.as_ref()?)));
    if let Some((host, name)) = roots.into_iter().find(|(_, name)| !is_beside_the_graph(name)) {
        return Err(format!("registries.\"{host}\".root: {name:?} is not the name of a file beside the graph"));
    }
    Ok(settings)
}

/// Whether it can be the name of a file in the seed, which has no folders.
fn is_beside_the_graph(name: &str) -> bool {
    !name.is_empty() && !name.contains('/') && !name.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    #[test]
    fn a_whole_file() {
        let s = parse(
            "[network]\naddress = [\"10.0.2.15/24\", \"fec0::15/64\"]\ngateway = [\"10.0.2.2\", \"fec0::2\"]\n\
             [workers]\nhuge_pages = \"never\"\n[console]\nmode = \"observe\"\nterminal = \"dumb\"\n[egress]\nroots = [\"my-ca.pem\"]\n",
        )
        .unwrap();
        assert_eq!(s.egress.roots, ["my-ca.pem"]);
        assert_eq!(s.network.address.len(), 2);
        assert_eq!(s.logs.export, None, "nobody, unless named");
        let logs = parse("[logs]\nexport = \"syslog+tls://logs.example.org\"\n").unwrap().logs;
        assert_eq!(logs.export.unwrap().port, 6514);
        assert_eq!(s.workers.huge_pages, HugePages::Never);
        assert_eq!((s.console.mode, s.console.terminal), (ConsoleMode::Observe, Terminal::Dumb));
        assert_eq!(s.ingress.http, [80], "what is not named keeps its default");
        assert_eq!((s.control.port, s.operators.len()), (7250, 0), "nobody, unless listed");
        let s = parse(
            "[control]\nport = 9000\n[operators]\nann = \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"\n",
        );
        let s = s.unwrap();
        let ann = s.operators.iter().next().unwrap();
        assert_eq!((s.control.port, ann.0.to_string().as_str(), ann.1.0[0]), (9000, "ann", 0xd7));
        let s =
            parse("[metrics]\nport = 9464\nallow = [\"192.0.2.0/24\", \"2001:db8::/32\", \"0.0.0.0/0\"]\n").unwrap();
        assert_eq!((s.metrics.port, s.metrics.allow[1].to_string().as_str()), (Some(9464), "2001:db8::/32"));
        for (address, covers) in [
            ("192.0.2.255", [true, false, true]),
            ("192.0.3.0", [false, false, true]),
            ("2001:db8:ffff::1", [false, true, false]),
        ] {
            let of: Vec<bool> = s.metrics.allow.iter().map(|p| p.covers(address.parse().unwrap())).collect();
            assert_eq!(of, covers, "{address}");
        }
        let s = parse("[ingress]\nhttps = [443, 8443]\ncertificate = \"site.pem\"\nkey = \"site.key\"\n").unwrap();
        assert_eq!((s.ingress.https.as_slice(), s.ingress.http.as_slice()), (&[443, 8443][..], &[80][..]));
        assert_eq!((s.ingress.certificate.as_deref(), s.ingress.key.as_deref()), (Some("site.pem"), Some("site.key")));
    }

    #[test]
    fn errors_say_where_and_what() {
        for (text, wanted) in [
            ("[network]\naddress = [\"10.0.2.15\"]", "line 2"),
            ("[network]\naddress = [\"10.0.2.15/33\"]", "at most 32"),
            ("[console]\nmode = \"shell\"", "operate"),
            ("[console]\nterminal = \"xterm\"", "vt100"),
            ("[network]\ngateway = [\"1.1.1.1\", \"2.2.2.2\"]", "at most one"),
            ("[ingress]\nhttp = [0]", "not a port"),
            ("[ingress]\nhttp = 80 90", "line 2"),
            ("[egress]\nroots = [\"certificates/my-ca.pem\"]", "beside the graph"),
            ("[egress]\nroots = [\"\"]", "beside the graph"),
            ("[egress]\nroots = [\"a.pem\\nb.pem\"]", "beside the graph"),
            ("[ingress]\nhttp = [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", "at most 16"),
            ("[ingress]\nhttp = [1,2,3,4,5,6,7,8]\nhttps = [11,12,13,14,15,16,17,18,19]", "at most 16"),
            ("[ingress]\nhttps = [443]", "ingress.certificate"),
            ("[ingress]\nhttps = [443]\ncertificate = \"a.pem\"", "ingress.key"),
            ("[ingress]\nhttps = [0]\ncertificate = \"a.pem\"\nkey = \"a.key\"", "ingress.https: 0"),
            ("[ingress]\nhttps = [80]\ncertificate = \"a.pem\"\nkey = \"a.key\"", "port 80"),
            ("[ingress]\nhttps = [443]\ncertificate = \"a.pem\"\nkey = \"/etc/a.key\"", "beside the graph"),
            ("[ingress]\ncertificate = \"a\\nb\"", "beside the graph"),
            ("[logs]\nexport = \"udp://loghost\"", "syslog+tls and syslog+tcp"),
            ("[logs]\nexport = \"udp://loghost\"", "line 2, column 10"),
            ("[control]\nport = 0", "not a port"),
            (
                "[control]\nport = 80\n[operators]\nann = \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"",
                "port 80",
            ),
            ("[metrics]\nport = 0", "not a port"),
            ("[metrics]\nport = 80", "port 80"),
            ("[metrics]\nallow = [\"10.0.0.0/8\"]", "no metrics.port"),
            ("[metrics]\nport = 9464\nallow = [\"10.0.0.1\"]", "line 3"),
            (
                "[metrics]\nport = 7250\n[operators]\nann = \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"",
                "is the operators'",
            ),
            ("[operators]\nann = \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHUR\"", "line 2, column 7"),
            ("[operators]\nann = \"ssh-ed25519 AAAA\"", "gaia key"),
            ("[operators]\n\"a b\" = \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"", "operator's name"),
            (
                "[operators]\na = \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"\nb = \"ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"",
                "that of a already",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(wanted), "{text:?} gave {error:?}, which lacks {wanted:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn no_toml_like_text_panics(text in "(\\[(network|ingress|workers|console)\\]\n|(address|http|mode|gateway|dns) = (\\[?[\"0-9a-f:./,]{0,20}\\]?)\n){0,6}") {
            let _ = parse(&text);
        }
    }
}
