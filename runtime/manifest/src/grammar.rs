//! Every table of a manifest and every key of it, once: its name, what it is for, and which values it takes. The reader
//! takes keys from here, and [`schema`] prints the same for editors.
//!
//! A pattern says again what a function reads, because an editor knows nothing but patterns; a test of their own holds the
//! two against each other. Where a pattern would have to say too much (that a size fits its key, that an address of IPv6
//! is one) it is wider than the function.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::allow::{Endpoint, Host, Site, port};
use crate::model::{Image, Lifecycle, Lifetime, Resolution};
use crate::units;

/// A key of a table.
pub(crate) struct Key<F: 'static> {
    pub(crate) name: &'static str,
    about: &'static str,
    must: bool,
    pub(crate) form: F,
}

impl<F> Key<F> {
    const fn may(name: &'static str, about: &'static str, form: F) -> Self {
        Self { name, about, must: false, form }
    }
    const fn must(name: &'static str, about: &'static str, form: F) -> Self {
        Self { name, about, must: true, form }
    }
}

/// A table, all of whose keys are known.
pub(crate) struct Section {
    about: &'static str,
    keys: &'static [&'static dyn Known],
}

impl Section {
    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.keys.iter().map(|key| key.name()).collect()
    }
}

/// A key, whatever values it takes.
pub(crate) trait Known: Sync {
    fn name(&self) -> &'static str;
    fn must(&self) -> bool;
    fn schema(&self) -> Value;
}

impl<F: Form + Sync> Known for Key<F> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn must(&self) -> bool {
        self.must
    }
    fn schema(&self) -> Value {
        let mut schema = self.form.schema();
        schema["description"] = described(self.about);
        schema
    }
}

/// Which values a key takes.
pub(crate) trait Form {
    fn schema(&self) -> Value;
}

/// A string of a certain form.
pub(crate) struct Text<T: 'static> {
    /// With its article: "a size".
    pub(crate) what: &'static str,
    pub(crate) examples: &'static [&'static str],
    /// As JSON Schema wants it. Its dialect is that of ECMA-262 without what the crate `regex` lacks too.
    pattern: Pattern,
    pub(crate) read: fn(&str) -> Result<T, String>,
}

/// A pattern for the whole of a text, from its parts.
type Pattern = fn() -> String;

impl<T> Form for Text<T> {
    fn schema(&self) -> Value {
        json!({ "type": "string", "pattern": (self.pattern)(), "examples": self.examples })
    }
}

/// A list of such strings.
pub(crate) struct List<T: 'static>(pub(crate) Text<T>);

impl<T> Form for List<T> {
    fn schema(&self) -> Value {
        json!({ "type": "array", "items": self.0.schema() })
    }
}

/// A size or a duration between two others.
pub(crate) struct Measure<T: 'static> {
    pub(crate) text: Text<T>,
    pub(crate) range: RangeInclusive<T>,
    pub(crate) default: T,
    /// The default as a manifest writes it.
    written: &'static str,
}

impl<T> Form for Measure<T> {
    fn schema(&self) -> Value {
        let mut schema = self.text.schema();
        schema["default"] = json!(self.written);
        schema
    }
}

/// A whole number.
pub(crate) struct Integer {
    pub(crate) range: RangeInclusive<u64>,
    pub(crate) default: u64,
}

impl Form for Integer {
    fn schema(&self) -> Value {
        json!({ "type": "integer", "minimum": self.range.start(), "maximum": self.range.end(), "default": self.default })
    }
}

/// A part of one: more than 0, at most 1.
pub(crate) struct Share;

impl Form for Share {
    fn schema(&self) -> Value {
        json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1, "examples": [0.5] })
    }
}

/// The only word that there is.
pub(crate) struct Only(pub(crate) &'static str);

impl Form for Only {
    fn schema(&self) -> Value {
        json!({ "type": "string", "enum": [self.0], "default": self.0 })
    }
}

/// One of some words: each with its meaning and its value.
pub(crate) struct Words<T: 'static> {
    pub(crate) words: &'static [(&'static str, T, &'static str)],
    default: Option<&'static str>,
}

impl<T> Form for Words<T> {
    fn schema(&self) -> Value {
        let words: Vec<&str> = self.words.iter().map(|(word, ..)| *word).collect();
        let meanings: Vec<&str> = self.words.iter().map(|(.., meaning)| *meaning).collect();
        // What Taplo shows beside each word.
        let mut schema = json!({ "type": "string", "enum": words, "x-taplo": { "docs": { "enumValues": meanings } } });
        if let Some(default) = self.default {
            schema["default"] = json!(default);
        }
        schema
    }
}

/// A table.
pub(crate) struct Table(pub(crate) &'static Section);

impl Form for Table {
    fn schema(&self) -> Value {
        table(self.0)
    }
}

/// The capabilities, or the tier in the seed's spelling.
pub(crate) struct TableOrTier(pub(crate) &'static Section);

impl Form for TableOrTier {
    fn schema(&self) -> Value {
        let mut tier = TIER.schema();
        tier["description"] = json!("The tier, in its other spelling: `tier` is the better one.");
        json!({ "anyOf": [table(self.0), tier] })
    }
}

/// A table of branes, each under the name it is given, and of what holds for all of them.
pub(crate) struct Branes {
    pub(crate) of_all: &'static Section,
    pub(crate) name: Text<()>,
    pub(crate) each: &'static Section,
}

impl Form for Branes {
    fn schema(&self) -> Value {
        let mut schema = table(self.of_all);
        schema["propertyNames"] = json!({ "pattern": (self.name.pattern)() });
        schema["additionalProperties"] = table(self.each);
        schema
    }
}

/// A table of variables and their values.
pub(crate) struct Variables(pub(crate) Text<String>);

impl Form for Variables {
    fn schema(&self) -> Value {
        json!({
            "type": "object",
            "propertyNames": { "pattern": (self.0.pattern)() },
            "additionalProperties": { "type": "string" },
        })
    }
}

/// The JSON Schema (draft 7) of a manifest, for editors: what [`parse`](crate::parse) takes, as far as a schema can say it.
///
/// ```
/// assert!(gaia_manifest::schema().contains("\"cpu_quota\""));
/// ```
#[must_use]
pub fn schema() -> String {
    let mut schema = table(&FILE);
    schema["$schema"] = json!("http://json-schema.org/draft-07/schema#");
    schema["$comment"] = json!("Printed from runtime/manifest/src/grammar.rs: do not edit.");
    schema["title"] = json!("A manifest of Gaia: *.zgraph.toml");
    format!("{schema:#}\n")
}

fn table(section: &Section) -> Value {
    let properties: Map<String, Value> = section.keys.iter().map(|k| (k.name().to_owned(), k.schema())).collect();
    let required: Vec<&str> = section.keys.iter().filter(|k| k.must()).map(|k| k.name()).collect();
    let mut schema = json!({
        "type": "object",
        "description": described(section.about),
        "properties": properties,
        "additionalProperties": false,
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

/// The lines of a doc comment as one text.
fn described(about: &str) -> Value {
    json!(about.trim())
}

/// Declares tables with their keys: `NAME: may|must FORM = "key", …;`. What the comments say is what an editor shows.
macro_rules! tables {
    ($($(#[doc = $about:literal])+ $table:ident {
        $($(#[doc = $doc:literal])+ $key:ident: $presence:ident $form:ty = $name:literal, $value:expr;)*
    })+) => { $(
        $($(#[doc = $doc])+ pub(crate) const $key: Key<$form> = Key::$presence($name, concat!($($doc),+), $value);)*
        $(#[doc = $about])+ pub(crate) const $table: Section =
            Section { about: concat!($($about),+), keys: &[$(&$key as &dyn Known),*] };
    )+ };
}

tables! {
    /// What runs, and all that it may do.
    FILE {
        /// The branes, each a table under its name: `[brane.fetch]`.
        BRANE: may Branes = "brane", Branes { of_all: &ALL, name: BRANE_NAME, each: &ONE };
    }

    /// The branes, each a table under its name: `[brane.fetch]`. The name `execution` is taken by the default of all.
    ALL {
        /// The default for every brane of the file: `[brane.execution.deterministic]`.
        ALL_EXECUTION: may Table = "execution", Table(&DEFAULT_EXECUTION);
    }

    /// The default for every brane of the file: `[brane.execution.deterministic]`.
    DEFAULT_EXECUTION {
        /// Every brane's runs can be repeated, byte for byte.
        ALL_DETERMINISTIC: may Table = "deterministic", Table(&DETERMINISTIC);
    }

    /// One brane: an image, which requests are its, what it is granted, and what it may use.
    ONE {
        /// What it is made for; this is gaia.
        SUBSTRATE: may Only = "substrate", Only("gaia");
        /// Standard (WASM), the only tier of this substrate.
        TIER: may Only = "tier", Only("standard");
        /// What it runs: a name in the store, `omega/cloud-fetch:2.4.1`, with `@sha256:…` to pin it; or a file beside or below
        /// the manifest, `file:./cloud-fetch.wasm`.
        IMAGE: must Text<Image> = "image", IMAGE_TEXT;
        /// Instances on the whole appliance, which is how many requests it serves at once; more of them wait.
        REPLICAS: may Integer = "replicas", Integer { range: 1..=100_000, default: 1 };
        /// Which requests are its: any host and the path `/<name>`, if not said.
        INGRESS: may Table = "ingress", Table(&INGRESS_KEYS);
        /// What it is granted. What is not named here is not there for it.
        CAPABILITY: may TableOrTier = "capability", TableOrTier(&CAPABILITIES);
        /// What it may use.
        LIMITS: may Table = "limits", Table(&LIMITS_KEYS);
        /// How its instances live.
        EXECUTION: may Table = "execution", Table(&EXECUTION_KEYS);
    }

    /// Which requests are a brane's.
    INGRESS_KEYS {
        /// The host: `fetch.example.org`; or every host under one, but not it itself: `*.example.org`. Any host, if not said.
        HOST: may Text<Host> = "host", Text {
            what: "a host", examples: &["fetch.example.org", "*.example.org"], pattern: host_pattern, read: Host::parse,
        };
        /// The path, and all paths under it. The longest of all branes wins, on segment boundaries. `/<name>`, if not said.
        PATH: may Text<String> = "path", Text {
            what: "a path", examples: &["/fetch"], pattern: path_pattern, read: path,
        };
    }

    /// What a brane is granted. What is not named here is not there for it.
    CAPABILITIES {
        /// Requests over HTTP to these sites. The list may be empty: then everything is denied.
        NET_HTTP: may Table = "net.http", Table(&SITES);
        /// The addresses of these hosts.
        NET_DNS: may Table = "net.dns", Table(&HOSTS);
        /// Connections to these endpoints.
        NET_TCP: may Table = "net.tcp", Table(&TCP_ENDPOINTS);
        /// Datagrams to these endpoints.
        NET_UDP: may Table = "net.udp", Table(&UDP_ENDPOINTS);
        /// A file system in memory, at `/tmp`.
        FS_TMP: may Table = "fs.tmp", Table(&TMP);
        /// The time.
        CLOCK: may Table = "clock", Table(&CLOCK_KEYS);
        /// Good randomness.
        RANDOM: may Table = "random", Table(&RANDOM_KEYS);
        /// An environment.
        ENV: may Table = "env", Table(&ENV_KEYS);
    }

    /// Requests over HTTP.
    SITES {
        /// Where they may go: `api.example.org`, `*.example.org` (every host under it, not it itself),
        /// `https://api.example.org:8443`. Port 443 for https and 80 for http, if not said.
        SITE_LIST: must List<Site> = "allowlist", List(Text {
            what: "an entry such as \"api.example.org\"",
            examples: &["api.example.org", "*.example.org", "https://api.example.org:8443"],
            pattern: site_pattern,
            read: Site::parse,
        });
    }

    /// The addresses of hosts.
    HOSTS {
        /// The hosts: `example.org`, or `*.example.org` (every host under it, not it itself).
        HOST_LIST: must List<Host> = "allowlist", List(Text {
            what: "a host such as \"example.org\"",
            examples: &["example.org", "*.example.org"],
            pattern: host_pattern,
            read: Host::parse,
        });
    }

    /// Connections over TCP.
    TCP_ENDPOINTS {
        /// The endpoints, each a host and a port: `db.example.org:5432`.
        TCP_LIST: must List<Endpoint> = "allowlist", List(Text {
            what: "an endpoint such as \"db.example.org:5432\"",
            examples: &["db.example.org:5432"],
            pattern: endpoint_pattern,
            read: Endpoint::parse,
        });
    }

    /// Datagrams over UDP.
    UDP_ENDPOINTS {
        /// The endpoints, each a host and a port: `ntp.example.org:123`.
        UDP_LIST: must List<Endpoint> = "allowlist", List(Text {
            what: "an endpoint such as \"ntp.example.org:123\"",
            examples: &["ntp.example.org:123"],
            pattern: endpoint_pattern,
            read: Endpoint::parse,
        });
    }

    /// A file system in memory.
    TMP {
        /// How much it may hold; not a part of `mem_max`.
        QUOTA: must Text<u64> = "quota", Text { what: "a size", examples: &["256 MiB"], pattern: size_pattern, read: units::size };
        /// When it is emptied.
        LIFETIME: may Words<Lifetime> = "lifetime", Words {
            words: &[
                ("request", Lifetime::Request, "With the request."),
                ("instance", Lifetime::Instance, "With the instance."),
            ],
            default: Some("request"),
        };
    }

    /// The time.
    CLOCK_KEYS {
        /// What readings and timers are rounded to.
        RESOLUTION: must Words<Resolution> = "resolution", Words {
            words: &[
                ("s", Resolution::Seconds, "A second."),
                ("ms", Resolution::Milliseconds, "A millisecond."),
                ("us", Resolution::Microseconds, "A microsecond."),
                ("ns", Resolution::Nanoseconds, "A nanosecond: not rounded."),
            ],
            default: None,
        };
    }

    /// Good randomness: `{}`, it has no options.
    RANDOM_KEYS {}

    /// An environment.
    ENV_KEYS {
        /// Variables and their values.
        VARS: may Variables = "vars", Variables(VARIABLE);
        /// Variables whose values are kept on the device. A name is here or in `vars`, not in both.
        SECRETS: may List<String> = "secrets", List(VARIABLE);
    }

    /// What a brane may use.
    LIMITS_KEYS {
        /// The part of one core that a replica may use, over any 100 ms: more than 0, at most 1. No limit, if not said.
        CPU_QUOTA: may Share = "cpu_quota", Share;
        /// All memories and tables of an instance, and what the host holds for it: from 64 KiB to 4 GiB.
        MEM_MAX: may Measure<u64> = "mem_max", Measure {
            text: Text { what: "a size", examples: &["64 MiB"], pattern: size_pattern, read: units::size },
            // From one page of WebAssembly to what a 32-bit address can name.
            range: 64 << 10..=4 << 30,
            default: 64 << 20,
            written: "64 MiB",
        };
        /// Wall time for a request, from the first byte of its head to the last of the answer: more than 0, at most 5m.
        DEADLINE: may Measure<Duration> = "deadline", Measure {
            text: Text { what: "a duration", examples: &["8s"], pattern: duration_pattern, read: units::duration },
            range: Duration::from_nanos(1)..=Duration::from_mins(5),
            default: Duration::from_secs(30),
            written: "30s",
        };
        /// The body of a request.
        BODY_MAX: may Measure<u64> = "body_max", Measure {
            text: Text { what: "a size", examples: &["8 MiB"], pattern: size_pattern, read: units::size },
            range: 0..=u64::MAX,
            default: 8 << 20,
            written: "8 MiB",
        };
    }

    /// How a brane's instances live.
    EXECUTION_KEYS {
        /// How long an instance lives.
        LIFECYCLE: may Words<Lifecycle> = "lifecycle", Words {
            words: &[
                ("ephemeral", Lifecycle::Ephemeral, "One request; made when it arrives."),
                ("pooled", Lifecycle::Pooled, "One request; ready before it arrives."),
                ("pinned", Lifecycle::Pinned, "All requests, one at a time; keeps its state."),
            ],
            default: Some("pooled"),
        };
        /// Its runs can be repeated, byte for byte.
        ITS_DETERMINISTIC: may Table = "deterministic", Table(&DETERMINISTIC);
    }

    /// Runs that can be repeated, byte for byte. Opt in by naming the table.
    DETERMINISTIC {
        /// The seed of the one source of randomness.
        SEED: may Integer = "seed", Integer { range: 0..=i64::MAX.cast_unsigned() - 1, default: 0 };
    }
}

const BRANE_NAME: Text<()> =
    Text { what: "a brane's name", examples: &["fetch"], pattern: || "^[a-z0-9-]{1,48}$".into(), read: brane_name };

const VARIABLE: Text<String> = Text {
    what: "a variable's name",
    examples: &["API_KEY"],
    pattern: || "^[A-Za-z_][A-Za-z0-9_]{0,254}$".into(),
    read: variable,
};

const IMAGE_TEXT: Text<Image> = Text {
    what: "an image",
    examples: &["file:./cloud-fetch.wasm", "omega/cloud-fetch:2.4.1"],
    pattern: image_pattern,
    read: image,
};

// ── texts: what is read, and beside it the pattern of it ─────────────────────────────────────────────────────────────

fn size_pattern() -> String {
    r"^[ \t]*[0-9]+[ \t]*(B|kB|MB|GB|KiB|MiB|GiB)[ \t]*$".into()
}

fn duration_pattern() -> String {
    r"^[ \t]*[0-9]+[ \t]*(ns|us|ms|s|m|h)[ \t]*$".into()
}

/// A name whose last label is not a number: that would be an address.
const NAME: &str = r"([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*([A-Za-z_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?|[0-9]{1,62}[A-Za-z_]|[0-9]{1,61}[A-Za-z_-]([A-Za-z0-9_-]{0,60}[A-Za-z0-9_]))\.?";
const IPV4: &str = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(\.(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])){3}";
/// All that can stand in one, and two colons.
const IPV6: &str = r"[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*";
const PORT: &str = r":0*(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})";

fn host_pattern() -> String {
    format!(r"^((\*\.)?{NAME}|{IPV4}|{IPV6}|\[({IPV4}|{IPV6})\])$")
}

fn site_pattern() -> String {
    format!(r"^(https?://)?(((\*\.)?{NAME}|{IPV4}|\[({IPV4}|{IPV6})\])({PORT})?|{IPV6})$")
}

fn endpoint_pattern() -> String {
    format!(r"^((\*\.)?{NAME}|{IPV4}|\[({IPV4}|{IPV6})\]){PORT}$")
}

/// Whether this can be a brane's name.
///
/// # Errors
/// What names are made of.
pub fn brane_name(name: &str) -> Result<(), String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let good = (1..=48).contains(&name.len()) && name.bytes().all(plain);
    good.then_some(()).ok_or_else(|| "1 to 48 of a-z, 0-9 and -".to_owned())
}

/// Whether this can be the name of a variable, and then the name.
///
/// # Errors
/// What names are made of.
pub fn variable(name: &str) -> Result<String, String> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    let good = first && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') && name.len() <= 255;
    good.then(|| name.to_owned())
        .ok_or_else(|| "letters, digits and underscores, no digit in front, as in \"API_KEY\"".to_owned())
}

fn path_pattern() -> String {
    // No segment is empty, `.` or `..`; the last may be missing.
    let (any, first) = ("[A-Za-z0-9._~!$&'()*+,;=:@%-]", "[A-Za-z0-9_~!$&'()*+,;=:@%-]");
    let segment = format!(r"(\.?{first}{any}*|\.\.{any}+)");
    format!("^/({segment}(/{segment})*/?)?$")
}

fn path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err("a path begins with /, as in \"/fetch\"".into());
    }
    let unreserved = |b: u8| b.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@%".contains(&b);
    if let Some(bad) = text.chars().find(|c| !c.is_ascii() || !unreserved(u8::try_from(*c).unwrap_or(b' '))) {
        let mut help = "a request's path never has this: ".to_owned();
        let _ = write!(help, "{bad:?}");
        return Err(help);
    }
    if text.contains("//") || text.split('/').any(|s| s == "." || s == "..") {
        return Err("no empty segment, no . and no ..".into());
    }
    Ok(text.to_owned())
}

fn image_pattern() -> String {
    let segment = r"([^/.\x00][^/\x00]*|\.([^/.\x00][^/\x00]*)?|\.\.[^/\x00]+)";
    let part = "[a-z0-9._-]+";
    let name = format!("({part}({PORT})?/)?{part}(/{part})*");
    format!("^(file:{segment}(/{segment})*|{name}(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?)$")
}

fn image(text: &str) -> Result<Image, String> {
    if let Some(path) = text.strip_prefix("file:") {
        let plain = path.strip_prefix("./").unwrap_or(path);
        let good = !plain.is_empty()
            && !path.starts_with('/')
            && !path.contains('\0')
            && plain.split('/').all(|s| !s.is_empty() && s != "..");
        return good
            .then(|| Image::File(path.to_owned()))
            .ok_or_else(|| "a file beside or below the manifest: \"file:./x.wasm\"".to_owned());
    }
    let (rest, digest) = match text.split_once('@') {
        None => (text, None),
        Some((rest, digest)) => {
            let hex = digest
                .strip_prefix("sha256:")
                .filter(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
            (rest, Some(hex.ok_or("a digest is @sha256: and 64 hexadecimal digits in lower case")?.to_owned()))
        }
    };
    // A colon behind the last slash parts the tag; one before it is a registry's port.
    let slash = rest.rfind('/').map_or(0, |i| i + 1);
    let (repository, tag) = match rest.get(slash..).and_then(|last| last.split_once(':')) {
        Some((last, tag)) => (rest.get(..slash + last.len()).unwrap_or_default(), Some(tag)),
        None => (rest, None),
    };
    let tag_byte = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    if tag.is_some_and(|t| t.is_empty() || t.len() > 128 || !t.bytes().all(tag_byte) || t.starts_with(['.', '-'])) {
        return Err("a tag has letters, digits, _, . and -, as in \"omega/cloud-fetch:2.4.1\"".into());
    }
    let segment = |s: &str| {
        !s.is_empty() && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
    };
    let mut segments = repository.split('/');
    let first = segments.next().unwrap_or_default();
    let registry = first.rsplit_once(':').is_some_and(|(host, number)| segment(host) && port(number).is_some())
        && repository.contains('/');
    if !(segment(first) || registry) || !segments.all(segment) {
        return Err("a name of lower-case letters and digits with / between its parts, as in \"omega/cloud-fetch:2.4.1\"; a file is \"file:./x.wasm\"".into());
    }
    Ok(Image::Name { repository: repository.to_owned(), tag: tag.map(str::to_owned), digest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::KEYS;

    #[test]
    fn what_is_not_said_is_what_the_schema_says_it_is() {
        for key in [&MEM_MAX, &BODY_MAX] {
            assert_eq!((key.form.text.read)(key.form.written), Ok(key.form.default), "{}", key.name);
        }
        assert_eq!((DEADLINE.form.text.read)(DEADLINE.form.written), Ok(DEADLINE.form.default));
        let named =
            |word: Option<&str>| LIFECYCLE.form.words.iter().find(|(w, ..)| Some(*w) == word).map(|(_, v, _)| *v);
        assert_eq!(named(LIFECYCLE.form.default), Some(Lifecycle::default()));
        let named =
            |word: Option<&str>| LIFETIME.form.words.iter().find(|(w, ..)| Some(*w) == word).map(|(_, v, _)| *v);
        assert_eq!(named(LIFETIME.form.default), Some(Lifetime::default()));
    }

    #[test]
    fn the_capabilities_are_those_of_the_model() {
        let mut names = CAPABILITIES.names();
        names.sort_unstable();
        assert_eq!(names, KEYS);
    }
}
