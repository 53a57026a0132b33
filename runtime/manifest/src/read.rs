//! From TOML with spans to the model, collecting everything that is wrong on the way.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use toml::Spanned as Toml;
use toml::de::{DeTable, DeValue};

use crate::allow::Host;
use crate::diagnostic::{Diagnostic, Severity};
use crate::grammar::{self, Integer, Key, List, Only, Section, Text, Words};
use crate::model::{Brane, Capability, Deterministic, Grant, Ingress, KEYS, Lifecycle, Limits, Manifest, Spanned};
use crate::{MAX_BYTES, tier};

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
    section: &'static Section,
    /// How it is called in messages: `[brane.fetch.limits]`.
    name: String,
    span: Range<usize>,
}

impl<'t> Table<'t> {
    fn new(section: &'static Section, name: String, span: Range<usize>, table: &'t DeTable<'t>) -> Self {
        let entry = |(key, value): (&'t Toml<_>, &'t Toml<DeValue<'t>>)| {
            let key: &'t Toml<std::borrow::Cow<'t, str>> = key;
            (key.get_ref().as_ref(), key.span(), value)
        };
        Self { entries: table.iter().map(entry).collect(), section, name, span }
    }

    /// Takes a key that may be there.
    fn take<F>(&mut self, key: &Key<F>) -> Option<At<'t>> {
        let at = self.entries.iter().position(|(name, ..)| *name == key.name)?;
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
            unknown.help = Some(did_you_mean(name, &self.section.names()));
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

    fn table<'t>(
        &mut self,
        section: &'static Section,
        name: String,
        value: &'t Toml<DeValue<'t>>,
        help: &str,
    ) -> Option<Table<'t>> {
        match value.get_ref() {
            DeValue::Table(table) => Some(Table::new(section, name, value.span(), table)),
            _ => {
                self.expected("a table", value, help);
                None
            }
        }
    }

    fn integer(&mut self, key: &Key<Integer>, value: &Toml<DeValue<'_>>) -> Option<u64> {
        let (what, range) = (key.name, &key.form.range);
        let help = format!("{what} is a whole number from {} to {}", range.start(), range.end());
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

    fn text<T>(&mut self, form: &Text<T>, value: &Toml<DeValue<'_>>) -> Option<T> {
        let examples: Vec<String> = form.examples.iter().map(|example| format!("\"{example}\"")).collect();
        let what = form.what;
        let text = self.string(value, &format!("write {what} in quotes, as in {}", examples.join(" or ")))?;
        match (form.read)(text) {
            Ok(read) => Some(read),
            Err(help) => {
                self.error(value.span(), format!("\"{text}\" is not {what}"), format!("not {what}"), help);
                None
            }
        }
    }

    fn word<T: Copy>(&mut self, key: &Key<Words<T>>, value: &Toml<DeValue<'_>>) -> Option<T> {
        let (what, words) = (key.name, key.form.words);
        let known: Vec<&str> = words.iter().map(|(word, ..)| *word).collect();
        let text = self.string(value, &format!("{what} is one of {}", quoted(&known)))?;
        let found = words.iter().find(|(word, ..)| *word == text).map(|(_, value, _)| *value);
        if found.is_none() {
            let help = did_you_mean(text, &known);
            self.error(value.span(), format!("\"{text}\" is no {what}"), format!("one of {}", quoted(&known)), help);
        }
        found
    }

    fn list<T>(&mut self, List(form): &List<T>, value: &Toml<DeValue<'_>>) -> Vec<T> {
        let DeValue::Array(array) = value.get_ref() else {
            self.expected("a list", value, "write a list of strings: [\"…\", \"…\"]");
            return Vec::new();
        };
        let (what, mut all) = (form.what, Vec::new());
        for item in array {
            let Some(text) = self.string(item, &format!("{what} is a string")) else { continue };
            match (form.read)(text) {
                Ok(read) => all.push(read),
                Err(help) => self.error(item.span(), format!("\"{text}\" is not {what}"), "not allowed here", help),
            }
        }
        all
    }

    // ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────

    fn manifest(&mut self, document: &DeTable<'_>) -> Manifest {
        let whole = 0..self.source.len();
        let mut root = Table::new(&grammar::FILE, "the file".into(), whole, document);
        let mut branes = Vec::new();
        if let Some((_, value)) = root.take(&grammar::BRANE)
            && let Some(mut table) =
                self.table(&grammar::ALL, "[brane]".into(), value, "branes are tables: [brane.fetch]")
        {
            let fallback = table.take(&grammar::ALL_EXECUTION).and_then(|(_, value)| self.default_execution(value));
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
        let mut table = self.table(&grammar::DEFAULT_EXECUTION, "[brane.execution]".into(), value, help)?;
        let deterministic = table
            .take(&grammar::ALL_DETERMINISTIC)
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
        if let Err(help) = (grammar::BRANE.form.name.read)(name) {
            self.error(span.clone(), format!("`{name}` cannot be a brane's name"), "not a name", help);
        }
        let mut table = self.table(
            grammar::BRANE.form.each,
            format!("[brane.{name}]"),
            value,
            "a brane is a table: [brane.fetch]",
        )?;
        if let Some((_, value)) = table.take(&grammar::SUBSTRATE) {
            self.only(&grammar::SUBSTRATE, value, "this is gaia: remove the line, or write \"gaia\"");
        }
        if let Some((_, value)) = table.take(&grammar::TIER) {
            self.only(&grammar::TIER, value, "Standard (WASM) is the only tier of this substrate: \"standard\"");
        }
        let image = match table.take(&grammar::IMAGE) {
            Some((_, value)) => {
                self.string(value, "an image is a name in the store, or a file: \"file:./x.wasm\"").and_then(|text| {
                    let image = (grammar::IMAGE.form.read)(text);
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
        let replicas = table.take(&grammar::REPLICAS).and_then(|(_, value)| self.integer(&grammar::REPLICAS, value));
        let ingress = self.ingress(name, &span, table.take(&grammar::INGRESS));
        let capability = table.take(&grammar::CAPABILITY);
        let grants = capability.as_ref().map_or_else(|| span.clone(), |(key, _)| key.clone());
        let capabilities = capability.map(|(_, value)| self.capabilities(name, value)).unwrap_or_default();
        let limits = self.limits(name, &span, table.take(&grammar::LIMITS).as_ref());
        let (lifecycle, own) = self.execution(name, table.take(&grammar::EXECUTION).as_ref());
        table.end(self);
        Some(Brane {
            name: Spanned { value: name.to_owned(), span },
            image: image?,
            replicas: u32::try_from(replicas.unwrap_or(grammar::REPLICAS.form.default)).unwrap_or(u32::MAX),
            ingress,
            capabilities,
            grants,
            limits,
            lifecycle,
            deterministic: own.or(fallback),
        })
    }

    fn only(&mut self, key: &Key<Only>, value: &Toml<DeValue<'_>>, help: &str) {
        let (what, Only(word)) = (key.name, &key.form);
        match self.string(value, help) {
            Some(text) if text != *word => {
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
        let Some(mut table) = self.table(
            grammar::INGRESS.form.0,
            format!("[brane.{name}.ingress]"),
            value,
            "ingress = { host = \"…\", path = \"/…\" }",
        ) else {
            return ingress;
        };
        if let Some((_, value)) = table.take(&grammar::HOST) {
            ingress.host = self.text(&grammar::HOST.form, value);
            ingress.span = value.span();
        }
        if let Some((_, value)) = table.take(&grammar::PATH)
            && let Some(path) = self.text(&grammar::PATH.form, value)
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
            mem_max: Spanned { value: grammar::MEM_MAX.form.default, span: at.clone() },
            deadline: grammar::DEADLINE.form.default,
            body_max: grammar::BODY_MAX.form.default,
        };
        let Some((_, value)) = entry else { return limits };
        let Some(mut table) = self.table(
            grammar::LIMITS.form.0,
            format!("[brane.{name}.limits]"),
            value,
            "limits = { mem_max = \"64 MiB\" }",
        ) else {
            return limits;
        };
        if let Some((_, value)) = table.take(&grammar::CPU_QUOTA) {
            limits.cpu_quota = self.quota(value).map(|quota| Spanned { value: quota, span: value.span() });
        }
        if let Some((_, value)) = table.take(&grammar::MEM_MAX)
            && let Some(size) = self.text(&grammar::MEM_MAX.form.text, value)
        {
            if !grammar::MEM_MAX.form.range.contains(&size) {
                self.error(
                    value.span(),
                    "mem_max is out of range",
                    "not in range",
                    "from 64 KiB, one page, to 4 GiB, all that 32 bits can address",
                );
            }
            limits.mem_max = Spanned { value: size, span: value.span() };
        }
        if let Some((_, value)) = table.take(&grammar::DEADLINE)
            && let Some(deadline) = self.text(&grammar::DEADLINE.form.text, value)
        {
            if !grammar::DEADLINE.form.range.contains(&deadline) {
                self.error(value.span(), "deadline is out of range", "not in range", "more than 0 and at most 5m");
            }
            limits.deadline = deadline;
        }
        if let Some((_, value)) = table.take(&grammar::BODY_MAX)
            && let Some(size) = self.text(&grammar::BODY_MAX.form.text, value)
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
        let Some(mut table) = self.table(
            grammar::EXECUTION.form.0,
            format!("[brane.{name}.execution]"),
            value,
            "execution = { lifecycle = \"pooled\" }",
        ) else {
            return (Lifecycle::default(), None);
        };
        let lifecycle = table.take(&grammar::LIFECYCLE).and_then(|(_, value)| self.word(&grammar::LIFECYCLE, value));
        let title = format!("[brane.{name}.execution.deterministic]");
        let deterministic =
            table.take(&grammar::ITS_DETERMINISTIC).and_then(|(_, value)| self.deterministic(&title, value));
        table.end(self);
        (lifecycle.unwrap_or_default(), deterministic)
    }

    fn deterministic(&mut self, title: &str, value: &Toml<DeValue<'_>>) -> Option<Deterministic> {
        let mut table = self.table(
            &grammar::DETERMINISTIC,
            title.to_owned(),
            value,
            "opt in by naming the table, with or without seed = 42",
        )?;
        let seed = table.take(&grammar::SEED).and_then(|(_, value)| self.integer(&grammar::SEED, value));
        table.end(self);
        Some(Deterministic { seed: seed.unwrap_or(grammar::SEED.form.default) })
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
        let help = "capabilities are a table: \"clock\" = { resolution = \"ms\" }";
        let Some(mut table) =
            self.table(grammar::CAPABILITY.form.0, format!("[brane.{brane}.capability]"), value, help)
        else {
            return Vec::new();
        };
        let mut all = Vec::new();
        for (key, span, value) in std::mem::take(&mut table.entries) {
            let title = format!("capability \"{key}\" of [brane.{brane}]");
            let capability = match key {
                k if k == grammar::NET_HTTP.name => {
                    self.allowlist(&grammar::NET_HTTP, &grammar::SITE_LIST, title, value).map(Capability::Http)
                }
                k if k == grammar::NET_DNS.name => {
                    self.allowlist(&grammar::NET_DNS, &grammar::HOST_LIST, title, value).map(Capability::Dns)
                }
                k if k == grammar::NET_TCP.name => {
                    self.allowlist(&grammar::NET_TCP, &grammar::TCP_LIST, title, value).map(Capability::Tcp)
                }
                k if k == grammar::NET_UDP.name => {
                    self.allowlist(&grammar::NET_UDP, &grammar::UDP_LIST, title, value).map(Capability::Udp)
                }
                k if k == grammar::FS_TMP.name => self.tmp(title, value),
                k if k == grammar::CLOCK.name => self.clock(title, value),
                k if k == grammar::RANDOM.name => {
                    self.table(grammar::RANDOM.form.0, title, value, "\"random\" = {}").map(|table| {
                        table.end(self);
                        Capability::Random
                    })
                }
                k if k == grammar::ENV.name => self.env(&title, value),
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
        capability: &Key<grammar::Table>,
        key: &Key<List<T>>,
        title: String,
        value: &Toml<DeValue<'_>>,
    ) -> Option<Vec<T>> {
        let mut table = self.table(capability.form.0, title, value, "{ allowlist = [\"…\"] }")?;
        let list = match table.take(key) {
            Some((_, value)) => Some(self.list(&key.form, value)),
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
        let mut table = self.table(grammar::FS_TMP.form.0, title, value, "\"fs.tmp\" = { quota = \"256 MiB\" }")?;
        let quota = match table.take(&grammar::QUOTA) {
            Some((_, value)) => self.text(&grammar::QUOTA.form, value),
            None => {
                let message = format!("{} has no quota", table.name);
                self.error(table.span.clone(), message, "no `quota`", "say how much it may hold: quota = \"256 MiB\"");
                None
            }
        };
        let lifetime = table.take(&grammar::LIFETIME).and_then(|(_, value)| self.word(&grammar::LIFETIME, value));
        table.end(self);
        Some(Capability::Tmp { quota: quota?, lifetime: lifetime.unwrap_or_default() })
    }

    fn clock(&mut self, title: String, value: &Toml<DeValue<'_>>) -> Option<Capability> {
        let mut table = self.table(grammar::CLOCK.form.0, title, value, "\"clock\" = { resolution = \"ms\" }")?;
        let resolution = match table.take(&grammar::RESOLUTION) {
            Some((_, value)) => self.word(&grammar::RESOLUTION, value),
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
        let mut table = self.table(grammar::ENV.form.0, title.to_owned(), value, help)?;
        let mut vars = BTreeMap::new();
        match table.take(&grammar::VARS).map(|(_, value)| (value, value.get_ref())) {
            Some((_, DeValue::Table(inner))) => {
                for (name, value) in inner {
                    match (grammar::VARS.form.0.read)(name.get_ref()) {
                        Err(help) => {
                            let message = format!("\"{}\" is not {}", name.get_ref(), grammar::VARS.form.0.what);
                            self.error(name.span(), message, "not a name", help);
                        }
                        Ok(name) => {
                            let text = self.string(value, "a variable's value is a string");
                            vars.extend(text.map(|text| (name, text.to_owned())));
                        }
                    }
                }
            }
            Some((value, _)) => self.expected("a table", value, help),
            None => {}
        }
        let secrets =
            table.take(&grammar::SECRETS).map(|(_, value)| (value.span(), self.list(&grammar::SECRETS.form, value)));
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
