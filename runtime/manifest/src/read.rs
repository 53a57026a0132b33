//! From TOML with spans to the model, collecting everything that is wrong on the way.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;
use std::ops::Range;
use std::time::Duration;

use toml::Spanned as Toml;
use toml::de::{DeTable, DeValue};

use crate::allow::{Endpoint, Host, Site};
use crate::diagnostic::{Diagnostic, Severity};
use crate::model::{
    Brane, Capability, Deterministic, Grant, Image, Ingress, KEYS, Lifecycle, Lifetime, Limits, Manifest, Resolution,
    Spanned,
};
use crate::{MAX_BYTES, tier, units};

const MAX_REPLICAS: u64 = 100_000;
const MAX_DEADLINE: Duration = Duration::from_mins(5);
/// What a 32-bit address can name.
const MAX_MEMORY: u64 = 4 << 30;
/// One page of WebAssembly.
const MIN_MEMORY: u64 = 64 << 10;
const DEFAULT_MEMORY: u64 = 64 << 20;
const DEFAULT_BODY: u64 = 8 << 20;
const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);

/// Parses a manifest.
///
/// # Errors
/// Everything that is wrong with it, in the order of the file; never empty, and each span lies inside the source.
pub fn parse(source: &str) -> Result<Manifest, Vec<Diagnostic>> {
    if source.len() > MAX_BYTES {
        let size = format!("the manifest has {} bytes, at most {MAX_BYTES} are read", source.len());
        return Err(vec![Diagnostic::error(0..0, size, "").help("split it into several graphs")]);
    }
    let text = tier::read(source);
    let (document, errors) = DeTable::parse_recoverable(&text);
    let mut reader = Reader { source, wrong: Vec::new() };
    let manifest = reader.manifest(document.get_ref());
    let syntax: Vec<Diagnostic> = errors.iter().map(|error| not_toml(error, source)).collect();
    // Behind a place that is no TOML, tables may have been taken for others: what is said about them may be false.
    let broken = syntax.iter().filter(|d| d.message != DUPLICATE).map(|d| d.span.start).min();
    reader.wrong.retain(|d| broken.is_none_or(|at| d.span.start < at));
    reader.wrong.extend(syntax);
    if reader.wrong.iter().any(|d| d.severity == Severity::Error) {
        for diagnostic in &mut reader.wrong {
            diagnostic.span = inside(&diagnostic.span, source);
            if let Some((span, _)) = &mut diagnostic.other {
                *span = inside(span, source);
            }
        }
        reader.wrong.sort_by_key(|d| (d.span.start, d.span.end));
        reader.wrong.dedup();
        return Err(reader.wrong);
    }
    Ok(manifest)
}

/// What the TOML parser says of a key that stands twice.
const DUPLICATE: &str = "duplicate key";

/// An error of TOML itself, in the form of all others.
fn not_toml(error: &toml::de::Error, source: &str) -> Diagnostic {
    let span = inside(&error.span().unwrap_or(0..0), source);
    if error.message() == DUPLICATE {
        let key = source.get(span.clone()).unwrap_or_default().to_owned();
        return Diagnostic::error(span, DUPLICATE, "stands here again")
            .help(format!("a key stands once in a table: remove one `{key}`"));
    }
    let help = "a manifest is TOML: tables in brackets, strings in quotes, as in [brane.fetch] and image = \"omega/cloud-fetch:2.4.1\"";
    Diagnostic::error(span, error.message(), "not TOML from here").help(help)
}

/// The span, moved into the source, onto the borders of characters, and over the whole of a key that was read as another.
fn inside(span: &Range<usize>, source: &str) -> Range<usize> {
    let start = source.floor_char_boundary(span.start);
    let end = source.ceil_char_boundary(span.end).max(start);
    let written =
        source.get(start..).is_some_and(|rest| end == start + "tier".len() && rest.starts_with(tier::WRITTEN));
    start..if written { start + tier::WRITTEN.len() } else { end }
}

/// A key's place and its value.
type At<'t> = (Range<usize>, &'t Toml<DeValue<'t>>);

struct Reader<'s> {
    source: &'s str,
    wrong: Vec<Diagnostic>,
}

/// A table that is being read: what is not taken in the end is unknown.
struct Table<'t> {
    entries: Vec<(&'t str, Range<usize>, &'t Toml<DeValue<'t>>)>,
    known: Vec<&'static str>,
    /// How it is called in messages: `[brane.fetch.limits]`.
    name: String,
    span: Range<usize>,
}

impl<'t> Table<'t> {
    fn new(name: String, span: Range<usize>, table: &'t DeTable<'t>) -> Self {
        let entry = |(key, value): (&'t Toml<_>, &'t Toml<DeValue<'t>>)| {
            let key: &'t Toml<std::borrow::Cow<'t, str>> = key;
            (key.get_ref().as_ref(), key.span(), value)
        };
        Self { entries: table.iter().map(entry).collect(), known: Vec::new(), name, span }
    }

    /// Takes a key that may be there.
    fn take(&mut self, key: &'static str) -> Option<(Range<usize>, &'t Toml<DeValue<'t>>)> {
        self.known.push(key);
        let at = self.entries.iter().position(|(name, ..)| *name == key)?;
        let (_, span, value) = self.entries.swap_remove(at);
        Some((span, value))
    }

    /// Ends the reading: what is left is unknown.
    fn end(self, reader: &mut Reader<'_>) {
        for (name, span, _) in &self.entries {
            let mut unknown = Diagnostic::error(
                span.clone(),
                format!("unknown key `{name}` in {}", self.name),
                "not a key of this table",
            );
            unknown.help = Some(did_you_mean(name, &self.known));
            reader.wrong.push(unknown);
        }
    }
}

fn did_you_mean(name: &str, known: &[&str]) -> String {
    let near = known.iter().map(|k| (strsim::damerau_levenshtein(name, k), *k)).min();
    match near {
        Some((distance, key)) if distance <= 2.max(key.len() / 3) => format!("did you mean `{key}`?"),
        _ => format!("known here: {}", quoted(known)),
    }
}

fn quoted(words: &[&str]) -> String {
    let mut sorted = words.to_vec();
    sorted.sort_unstable();
    sorted.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(", ")
}

impl Reader<'_> {
    fn error(
        &mut self,
        span: Range<usize>,
        message: impl Into<String>,
        label: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.wrong.push(Diagnostic::error(span, message, label).help(help));
    }

    fn expected(&mut self, what: &str, found: &Toml<DeValue<'_>>, help: &str) {
        let kind = found.get_ref().type_str();
        self.error(found.span(), format!("expected {what}, found {kind}"), format!("{kind}, not {what}"), help);
    }

    fn string<'t>(&mut self, value: &'t Toml<DeValue<'t>>, help: &str) -> Option<&'t str> {
        let text = value.get_ref().as_str();
        if text.is_none() {
            self.expected("a string", value, help);
        }
        text
    }

    fn table<'t>(&mut self, name: String, value: &'t Toml<DeValue<'t>>, help: &str) -> Option<Table<'t>> {
        match value.get_ref() {
            DeValue::Table(table) => Some(Table::new(name, value.span(), table)),
            _ => {
                self.expected("a table", value, help);
                None
            }
        }
    }

    fn integer(&mut self, value: &Toml<DeValue<'_>>, range: Range<u64>, what: &str) -> Option<u64> {
        let help = format!("{what} is a whole number from {} to {}", range.start, range.end - 1);
        let DeValue::Integer(number) = value.get_ref() else {
            self.expected("a whole number", value, &help);
            return None;
        };
        let parsed = u64::from_str_radix(number.as_str(), number.radix()).ok().filter(|n| range.contains(n));
        if parsed.is_none() {
            self.error(value.span(), format!("{what} is out of range"), "not in range", help);
        }
        parsed
    }

    fn measured<T>(
        &mut self,
        value: &Toml<DeValue<'_>>,
        read: fn(&str) -> Result<T, String>,
        what: &str,
        example: &str,
    ) -> Option<T> {
        let text = self.string(value, &format!("write a {what} in quotes, as in {example}"))?;
        match read(text) {
            Ok(read) => Some(read),
            Err(help) => {
                self.error(value.span(), format!("\"{text}\" is not a {what}"), format!("not a {what}"), help);
                None
            }
        }
    }

    fn word<T: Copy>(&mut self, value: &Toml<DeValue<'_>>, what: &str, words: &[(&'static str, T)]) -> Option<T> {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let text = self.string(value, &format!("{what} is one of {}", quoted(&known)))?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let help = did_you_mean(text, &known);
            self.error(value.span(), format!("\"{text}\" is no {what}"), format!("one of {}", quoted(&known)), help);
        }
        found
    }

    fn list<T>(&mut self, value: &Toml<DeValue<'_>>, what: &str, read: fn(&str) -> Result<T, String>) -> Vec<T> {
        let DeValue::Array(array) = value.get_ref() else {
            self.expected("a list", value, "write a list of strings: [\"…\", \"…\"]");
            return Vec::new();
        };
        let mut all = Vec::new();
        for item in array {
            let Some(text) = self.string(item, &format!("{what} is a string")) else { continue };
            match read(text) {
                Ok(read) => all.push(read),
                Err(help) => self.error(item.span(), format!("\"{text}\" is not {what}"), "not allowed here", help),
            }
        }
        all
    }

    // ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────

    fn manifest(&mut self, document: &DeTable<'_>) -> Manifest {
        let whole = 0..self.source.len();
        let mut root = Table::new("the file".into(), whole, document);
        let mut branes = Vec::new();
        if let Some((_, value)) = root.take("brane")
            && let Some(mut table) = self.table("[brane]".into(), value, "branes are tables: [brane.fetch]")
        {
            let fallback = table.take("execution").and_then(|(_, value)| self.default_execution(value));
            for (name, span, value) in std::mem::take(&mut table.entries) {
                branes.extend(self.brane(name, span, value, fallback));
            }
        }
        root.end(self);
        branes.sort_by_key(|b: &Brane| b.name.span.start);
        self.routes(&branes);
        Manifest { branes }
    }

    fn default_execution(&mut self, value: &Toml<DeValue<'_>>) -> Option<Deterministic> {
        let help =
            "[brane.execution.deterministic] sets the default for every brane of the file; a brane needs another name";
        let mut table = self.table("[brane.execution]".into(), value, help)?;
        let deterministic = table
            .take("deterministic")
            .and_then(|(_, value)| self.deterministic("[brane.execution.deterministic]", value));
        for (name, span, _) in std::mem::take(&mut table.entries) {
            self.error(span, format!("`{name}` cannot stand in [brane.execution]"), "only `deterministic` can", help);
        }
        deterministic
    }

    fn brane(
        &mut self,
        name: &str,
        span: Range<usize>,
        value: &Toml<DeValue<'_>>,
        fallback: Option<Deterministic>,
    ) -> Option<Brane> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name.is_empty() || name.len() > 48 || !name.bytes().all(plain) {
            self.error(
                span.clone(),
                format!("`{name}` cannot be a brane's name"),
                "not a name",
                "1 to 48 of a-z, 0-9 and -",
            );
        }
        let mut table = self.table(format!("[brane.{name}]"), value, "a brane is a table: [brane.fetch]")?;
        if let Some((_, value)) = table.take("substrate") {
            self.only(value, "gaia", "substrate", "this is gaia: remove the line, or write \"gaia\"");
        }
        if let Some((_, value)) = table.take("tier") {
            self.only(value, "standard", "tier", "Standard (WASM) is the only tier of this substrate: \"standard\"");
        }
        let image = match table.take("image") {
            Some((_, value)) => {
                self.string(value, "an image is a name in the store, or a file: \"file:./x.wasm\"").and_then(|text| {
                    let image = image(text);
                    if let Err(help) = &image {
                        self.error(value.span(), format!("\"{text}\" is not an image"), "not an image", help.clone());
                    }
                    Some(Spanned { value: image.ok()?, span: value.span() })
                })
            }
            None => {
                let help = "say what it runs: image = \"omega/cloud-fetch:2.4.1\", or image = \"file:./x.wasm\"";
                self.error(span.clone(), format!("[brane.{name}] has no image"), "no `image` in this brane", help);
                None
            }
        };
        let replicas =
            table.take("replicas").and_then(|(_, value)| self.integer(value, 1..MAX_REPLICAS + 1, "replicas"));
        let ingress = self.ingress(name, &span, table.take("ingress"));
        let capability = table.take("capability");
        let grants = capability.as_ref().map_or_else(|| span.clone(), |(key, _)| key.clone());
        let capabilities = capability.map(|(_, value)| self.capabilities(name, value)).unwrap_or_default();
        let limits = self.limits(name, &span, table.take("limits").as_ref());
        let (lifecycle, own) = self.execution(name, table.take("execution").as_ref());
        table.end(self);
        Some(Brane {
            name: Spanned { value: name.to_owned(), span },
            image: image?,
            replicas: replicas.and_then(|r| u32::try_from(r).ok()).unwrap_or(1),
            ingress,
            capabilities,
            grants,
            limits,
            lifecycle,
            deterministic: own.or(fallback),
        })
    }

    fn only(&mut self, value: &Toml<DeValue<'_>>, word: &str, what: &str, help: &str) {
        match self.string(value, help) {
            Some(text) if text != word => {
                self.error(
                    value.span(),
                    format!("\"{text}\" is not a {what} of this appliance"),
                    format!("only \"{word}\""),
                    help,
                );
            }
            _ => {}
        }
    }

    fn ingress(&mut self, name: &str, at: &Range<usize>, entry: Option<At<'_>>) -> Ingress {
        let mut ingress = Ingress { host: None, path: format!("/{name}"), span: at.clone() };
        let Some((span, value)) = entry else { return ingress };
        ingress.span = span;
        let Some(mut table) =
            self.table(format!("[brane.{name}.ingress]"), value, "ingress = { host = \"…\", path = \"/…\" }")
        else {
            return ingress;
        };
        if let Some((_, value)) = table.take("host") {
            ingress.host = self.measured(value, Host::parse, "host", "\"fetch.example.org\" or \"*.example.org\"");
            ingress.span = value.span();
        }
        if let Some((_, value)) = table.take("path")
            && let Some(path) = self.measured(value, path, "path", "\"/fetch\"")
        {
            ingress.path = path;
            ingress.span = value.span();
        }
        table.end(self);
        ingress
    }

    fn limits(&mut self, name: &str, at: &Range<usize>, entry: Option<&At<'_>>) -> Limits {
        let mut limits = Limits {
            cpu_quota: None,
            mem_max: Spanned { value: DEFAULT_MEMORY, span: at.clone() },
            deadline: DEFAULT_DEADLINE,
            body_max: DEFAULT_BODY,
        };
        let Some((_, value)) = entry else { return limits };
        let Some(mut table) = self.table(format!("[brane.{name}.limits]"), value, "limits = { mem_max = \"64 MiB\" }")
        else {
            return limits;
        };
        if let Some((_, value)) = table.take("cpu_quota") {
            limits.cpu_quota = self.quota(value).map(|quota| Spanned { value: quota, span: value.span() });
        }
        if let Some((_, value)) = table.take("mem_max")
            && let Some(size) = self.measured(value, units::size, "size", "\"64 MiB\"")
        {
            if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) {
                self.error(
                    value.span(),
                    "mem_max is out of range",
                    "not in range",
                    "from 64 KiB, one page, to 4 GiB, all that 32 bits can address",
                );
            }
            limits.mem_max = Spanned { value: size, span: value.span() };
        }
        if let Some((_, value)) = table.take("deadline")
            && let Some(deadline) = self.measured(value, units::duration, "duration", "\"8s\"")
        {
            if deadline.is_zero() || deadline > MAX_DEADLINE {
                self.error(value.span(), "deadline is out of range", "not in range", "more than 0 and at most 5m");
            }
            limits.deadline = deadline;
        }
        if let Some((_, value)) = table.take("body_max")
            && let Some(size) = self.measured(value, units::size, "size", "\"8 MiB\"")
        {
            limits.body_max = size;
        }
        table.end(self);
        limits
    }

    fn quota(&mut self, value: &Toml<DeValue<'_>>) -> Option<f64> {
        let help = "cpu_quota is the part of one core that a replica may use: more than 0, at most 1, as in 0.5";
        let number: Option<f64> = match value.get_ref() {
            DeValue::Float(float) => float.as_str().parse().ok(),
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str().parse().ok(),
            _ => {
                self.expected("a number", value, help);
                return None;
            }
        };
        let number = number.filter(|n| *n > 0.0 && *n <= 1.0);
        if number.is_none() {
            self.error(value.span(), "cpu_quota is out of range", "not in range", help);
        }
        number
    }

    fn execution(&mut self, name: &str, entry: Option<&At<'_>>) -> (Lifecycle, Option<Deterministic>) {
        let Some((_, value)) = entry else { return (Lifecycle::default(), None) };
        let Some(mut table) =
            self.table(format!("[brane.{name}.execution]"), value, "execution = { lifecycle = \"pooled\" }")
        else {
            return (Lifecycle::default(), None);
        };
        let words = [("ephemeral", Lifecycle::Ephemeral), ("pooled", Lifecycle::Pooled), ("pinned", Lifecycle::Pinned)];
        let lifecycle = table.take("lifecycle").and_then(|(_, value)| self.word(value, "lifecycle", &words));
        let title = format!("[brane.{name}.execution.deterministic]");
        let deterministic = table.take("deterministic").and_then(|(_, value)| self.deterministic(&title, value));
        table.end(self);
        (lifecycle.unwrap_or_default(), deterministic)
    }

    fn deterministic(&mut self, title: &str, value: &Toml<DeValue<'_>>) -> Option<Deterministic> {
        let mut table = self.table(title.to_owned(), value, "opt in by naming the table, with or without seed = 42")?;
        let seed = table.take("seed").and_then(|(_, value)| self.integer(value, 0..i64::MAX.cast_unsigned(), "seed"));
        table.end(self);
        Some(Deterministic { seed: seed.unwrap_or(0) })
    }

    /// Two branes for the same requests: only one of them could ever get any.
    fn routes(&mut self, branes: &[Brane]) {
        let mut taken: BTreeMap<(Option<Host>, String), &Brane> = BTreeMap::new();
        for brane in branes {
            let path = brane.ingress.path.trim_end_matches('/').to_owned();
            match taken.entry((brane.ingress.host.clone(), path)) {
                Entry::Vacant(free) => drop(free.insert(brane)),
                Entry::Occupied(first) => {
                    let other = first.get();
                    let message = format!(
                        "[brane.{}] and [brane.{}] have the same host and path",
                        other.name.value, brane.name.value
                    );
                    let diagnostic = Diagnostic::error(brane.ingress.span.clone(), message, "the same again")
                        .with(other.ingress.span.clone(), "first here")
                        .help("give one of them another host or path in its ingress");
                    self.wrong.push(diagnostic);
                }
            }
        }
    }

    // ── capabilities ─────────────────────────────────────────────────────────────────────────────────────────────

    fn capabilities(&mut self, brane: &str, value: &Toml<DeValue<'_>>) -> Vec<Grant> {
        let Some(mut table) = self.table(
            format!("[brane.{brane}.capability]"),
            value,
            "capabilities are a table: \"clock\" = { resolution = \"ms\" }",
        ) else {
            return Vec::new();
        };
        let mut all = Vec::new();
        for (key, span, value) in std::mem::take(&mut table.entries) {
            let title = format!("capability \"{key}\" of [brane.{brane}]");
            let capability = match key {
                "net.http" => self
                    .allowlist(title, value, "an entry such as \"api.example.org\"", Site::parse)
                    .map(Capability::Http),
                "net.dns" => {
                    self.allowlist(title, value, "a host such as \"example.org\"", Host::parse).map(Capability::Dns)
                }
                "net.tcp" => self
                    .allowlist(title, value, "an endpoint such as \"db.example.org:5432\"", Endpoint::parse)
                    .map(Capability::Tcp),
                "net.udp" => self
                    .allowlist(title, value, "an endpoint such as \"ntp.example.org:123\"", Endpoint::parse)
                    .map(Capability::Udp),
                "fs.tmp" => self.tmp(title, value),
                "clock" => self.clock(title, value),
                "random" => self.table(title, value, "\"random\" = {}").map(|table| {
                    table.end(self);
                    Capability::Random
                }),
                "env" => self.env(&title, value),
                unknown => {
                    let dotted = value
                        .get_ref()
                        .as_table()
                        .and_then(|t| t.keys().next())
                        .map(|k| format!("{unknown}.{}", k.get_ref()));
                    let help = match dotted.filter(|d| KEYS.contains(&d.as_str())) {
                        Some(dotted) => format!("put the key in quotes: \"{dotted}\" = {{ … }}"),
                        None => did_you_mean(unknown, KEYS),
                    };
                    self.error(span.clone(), format!("there is no capability \"{unknown}\""), "unknown", help);
                    None
                }
            };
            all.extend(capability.map(|capability| Grant { capability, span }));
        }
        all.sort_by_key(|grant| grant.span.start);
        all
    }

    fn allowlist<T>(
        &mut self,
        title: String,
        value: &Toml<DeValue<'_>>,
        what: &str,
        read: fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let mut table = self.table(title, value, "{ allowlist = [\"…\"] }")?;
        let list = match table.take("allowlist") {
            Some((_, value)) => Some(self.list(value, what, read)),
            None => {
                let message = format!("{} has no allowlist", table.name);
                self.error(
                    table.span.clone(),
                    message,
                    "no `allowlist`",
                    "name what may be reached; allowlist = [] links it and denies everything",
                );
                None
            }
        };
        table.end(self);
        list
    }

    fn tmp(&mut self, title: String, value: &Toml<DeValue<'_>>) -> Option<Capability> {
        let mut table = self.table(title, value, "\"fs.tmp\" = { quota = \"256 MiB\" }")?;
        let quota = match table.take("quota") {
            Some((_, value)) => self.measured(value, units::size, "size", "\"256 MiB\""),
            None => {
                let message = format!("{} has no quota", table.name);
                self.error(table.span.clone(), message, "no `quota`", "say how much it may hold: quota = \"256 MiB\"");
                None
            }
        };
        let words = [("request", Lifetime::Request), ("instance", Lifetime::Instance)];
        let lifetime = table.take("lifetime").and_then(|(_, value)| self.word(value, "lifetime", &words));
        table.end(self);
        Some(Capability::Tmp { quota: quota?, lifetime: lifetime.unwrap_or_default() })
    }

    fn clock(&mut self, title: String, value: &Toml<DeValue<'_>>) -> Option<Capability> {
        let mut table = self.table(title, value, "\"clock\" = { resolution = \"ms\" }")?;
        let words = [
            ("s", Resolution::Seconds),
            ("ms", Resolution::Milliseconds),
            ("us", Resolution::Microseconds),
            ("ns", Resolution::Nanoseconds),
        ];
        let resolution = match table.take("resolution") {
            Some((_, value)) => self.word(value, "resolution", &words),
            None => {
                let message = format!("{} has no resolution", table.name);
                self.error(
                    table.span.clone(),
                    message,
                    "no `resolution`",
                    "say how fine the time may be: resolution = \"ms\"",
                );
                None
            }
        };
        table.end(self);
        resolution.map(Capability::Clock)
    }

    fn env(&mut self, title: &str, value: &Toml<DeValue<'_>>) -> Option<Capability> {
        let help = "\"env\" = { vars = { MODE = \"fast\" }, secrets = [\"API_KEY\"] }";
        let mut table = self.table(title.to_owned(), value, help)?;
        let mut vars = BTreeMap::new();
        if let Some((_, value)) = table.take("vars")
            && let Some(mut inner) = self.table(format!("vars of {title}"), value, help)
        {
            for (name, span, value) in std::mem::take(&mut inner.entries) {
                if let Err(help) = variable(name) {
                    self.error(span, format!("\"{name}\" is not a variable's name"), "not a name", help);
                } else if let Some(text) = self.string(value, "a variable's value is a string") {
                    vars.insert(name.to_owned(), text.to_owned());
                }
            }
        }
        let secrets =
            table.take("secrets").map(|(_, value)| (value.span(), self.list(value, "a variable's name", variable)));
        table.end(self);
        let (span, secrets) = secrets.unwrap_or_default();
        for name in secrets.iter().filter(|name| vars.contains_key(*name)) {
            self.error(
                span.clone(),
                format!("\"{name}\" is a variable and a secret"),
                "also in `vars`",
                "keep it in one of them",
            );
        }
        Some(Capability::Env { vars, secrets })
    }
}

fn variable(name: &str) -> Result<String, String> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    let good = first && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') && name.len() <= 255;
    good.then(|| name.to_owned())
        .ok_or_else(|| "letters, digits and underscores, no digit in front, as in \"API_KEY\"".to_owned())
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
    let registry = first.rsplit_once(':').is_some_and(|(host, port)| segment(host) && port.parse::<u16>().is_ok())
        && repository.contains('/');
    if !(segment(first) || registry) || !segments.all(segment) {
        return Err("a name of lower-case letters and digits with / between its parts, as in \"omega/cloud-fetch:2.4.1\"; a file is \"file:./x.wasm\"".into());
    }
    Ok(Image::Name { repository: repository.to_owned(), tag: tag.map(str::to_owned), digest })
}
