//! Any text is a manifest or told why not: no panic, every place lies in the text, and every message can be shown.

#![no_main]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a panic is what a fuzz target reports with")]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::OnceLock;

use gaia_manifest::{Capability, Endpoint, Host, Manifest, Site};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use serde_json::Value;

fuzz_target!(|source: &str| {
    let read = gaia_manifest::tier::read(source);
    assert_eq!(read.len(), source.len(), "the tier's other spelling moved something");
    match gaia_manifest::parse(source) {
        Ok(manifest) => accepted(&manifest, source),
        Err(wrong) => {
            assert!(!wrong.is_empty(), "refused without a reason");
            for (n, diagnostic) in wrong.iter().enumerate() {
                inside(&diagnostic.span, source);
                if let Some((span, _)) = &diagnostic.other {
                    inside(span, source);
                }
                let (line, column) = diagnostic.line_and_column(source);
                // Most of the time goes into these texts, so only the first ones are made, one of them with colours.
                if n < 3 {
                    let text = diagnostic.render("x.zgraph.toml", source, n == 0);
                    assert!(text.contains("x.zgraph.toml"), "no file is named: {text}");
                }
                assert!(line >= 1 && column >= 1);
            }
        }
    }
});

/// What later stages rely on: their own messages use these places, and what was read prints as it would be read again.
fn accepted(manifest: &Manifest, source: &str) {
    for brane in &manifest.branes {
        for span in
            [&brane.name.span, &brane.image.span, &brane.ingress.span, &brane.grants, &brane.limits.mem_max.span]
        {
            inside(span, source);
        }
        if let Some(quota) = &brane.limits.cpu_quota {
            inside(&quota.span, source);
            assert!(quota.value > 0.0 && quota.value <= 1.0, "cpu_quota {}", quota.value);
        }
        assert!(brane.replicas >= 1, "no replica");
        assert!(brane.ingress.path.starts_with('/'), "path {}", brane.ingress.path);
        if let Some(host) = &brane.ingress.host {
            assert_eq!(Host::parse(&host.to_string()).as_ref(), Ok(host));
        }
        for grant in &brane.capabilities {
            inside(&grant.span, source);
            match &grant.capability {
                Capability::Http(sites) => {
                    for site in sites {
                        assert_eq!(Site::parse(&site.to_string()).as_ref(), Ok(site));
                    }
                }
                Capability::Dns(hosts) => {
                    for host in hosts {
                        assert_eq!(Host::parse(&host.to_string()).as_ref(), Ok(host));
                    }
                }
                Capability::Tcp(ends) | Capability::Udp(ends) => {
                    for end in ends {
                        assert_eq!(Endpoint::parse(&end.to_string()).as_ref(), Ok(end));
                    }
                }
                Capability::Tmp { .. } | Capability::Clock(_) | Capability::Random | Capability::Env { .. } => {}
            }
        }
    }
}

fn inside(span: &Range<usize>, source: &str) {
    assert!(source.get(span.clone()).is_some(), "{span:?} is not a place in {} bytes", source.len());
}

// One change of four is to bytes, the others are to words and lines: bytes alone seldom make one valid table of another.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let text = std::str::from_utf8(&data[..size]).ok().filter(|_| !seed.is_multiple_of(4));
    match text.and_then(|text| changed(text, Chance(seed | 1))).filter(|text| (1..=max_size).contains(&text.len())) {
        Some(text) => {
            data[..text.len()].copy_from_slice(text.as_bytes());
            text.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});

/// Numbers by chance, the same ones for the same seed.
struct Chance(u32);

impl Chance {
    /// One below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        // Xorshift (Marsaglia, 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0 as usize % end
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.below(all.len().max(1)))
    }
}

/// The text with a word for another, or a line more, less or elsewhere.
fn changed(text: &str, mut chance: Chance) -> Option<String> {
    let vocabulary = VOCABULARY.get_or_init(Vocabulary::new);
    let mut lines: Vec<&str> = text.lines().collect();
    let at = chance.below(lines.len() + 1);
    match chance.below(6) {
        0 => lines.insert(at, chance.of(&vocabulary.lines)?),
        1 => drop((at < lines.len()).then(|| lines.remove(at))),
        2 => {
            let line = *chance.of(&lines)?;
            lines.insert(at, line);
        }
        _ => {
            let plain = |c: char| c.is_ascii_alphanumeric() || "_.-/:*@".contains(c);
            let words: Vec<&str> = text.split(|c| !plain(c)).map(str::trim).filter(|word| !word.is_empty()).collect();
            let old = *chance.of(&words)?;
            let start = old.as_ptr() as usize - text.as_ptr() as usize;
            let (before, behind) = (text.get(..start)?, text.get(start + old.len()..)?);
            return Some(format!("{before}{}{behind}", chance.of(&vocabulary.words)?));
        }
    }
    Some(lines.join("\n"))
}

/// What the grammar knows: its words, and lines that are right in some table.
struct Vocabulary {
    words: Vec<String>,
    lines: Vec<String>,
}

static VOCABULARY: OnceLock<Vocabulary> = OnceLock::new();

impl Vocabulary {
    fn new() -> Self {
        let schema: Value = serde_json::from_str(&gaia_manifest::schema()).unwrap();
        let (mut words, mut lines) = (BTreeSet::new(), BTreeSet::new());
        let brane = &schema["properties"]["brane"]["additionalProperties"];
        // Numbers and units at the edges, which no example shows.
        words.extend(["0", "1", "2", "100000", "B", "kB", "GiB", "ns", "m", "h", "-1", "0.5"].map(str::to_owned));
        lines.insert("[brane.a]".to_owned());
        collect(brane, "brane.a", &mut words, &mut lines);
        Self { words: words.into_iter().collect(), lines: lines.into_iter().collect() }
    }
}

/// Adds the table's keys and values, and returns lines of a table each, as they stand inside of another.
fn collect(schema: &Value, header: &str, words: &mut BTreeSet<String>, lines: &mut BTreeSet<String>) -> Vec<String> {
    let table = schema["anyOf"].get(0).unwrap_or(schema);
    let mut all = Vec::new();
    for (key, schema) in table["properties"].as_object().into_iter().flatten() {
        words.insert(key.clone());
        let name = if key.contains('.') { format!("\"{key}\"") } else { key.clone() };
        let values: Vec<String> = match schema["items"].as_object() {
            Some(_) => texts(&schema["items"], words).map(|text| format!("[{text}]")).collect(),
            None if schema["type"] == "object" || schema["anyOf"].is_array() => {
                let inner = collect(schema, &format!("{header}.{name}"), words, lines);
                lines.insert(format!("[{header}.{name}]"));
                // One of each key in the one that has all.
                let mut keys = BTreeSet::new();
                let once: Vec<&str> =
                    inner.iter().map(String::as_str).filter(|line| keys.insert(line.split(" = ").next())).collect();
                let whole = format!("{{ {} }}", once.join(", "));
                inner.iter().map(|line| format!("{{ {line} }}")).chain([whole]).collect()
            }
            None => texts(schema, words).chain(["0", "1", "0.5"].map(str::to_owned)).collect(),
        };
        all.extend(values.iter().map(|value| format!("{name} = {value}")));
    }
    lines.extend(all.iter().cloned());
    all
}

/// The texts that a schema names, in quotes.
fn texts(schema: &Value, words: &mut BTreeSet<String>) -> impl Iterator<Item = String> {
    let named = ["enum", "examples"].map(|key| schema[key].as_array().cloned().unwrap_or_default()).concat();
    let texts: Vec<String> = named.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    words.extend(texts.iter().flat_map(|text| text.split(' ')).map(str::to_owned));
    texts.into_iter().map(|text| format!("\"{text}\""))
}
