//! The schema that editors lint with and the parser say the same, as far as a schema can: real files, every wrong manifest of
//! the parser's own tests, and documents made at random.
//!
//! A package of its own, because the validator switches on features of crates under Wasmtime, which would be compiled twice.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;

use gaia_manifest::Diagnostic;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::TestRunner;
use serde_json::Value as Json;
use toml::{Table, Value};

/// Whether a message is of a kind.
type Is = fn(&Diagnostic) -> bool;

/// What a schema cannot say: why, which of the parser's messages it is, and an example of it.
const NOT_OF_STRUCTURE: &[(&str, Is, &str)] = &[
    (
        "two branes are compared",
        |d| d.message.ends_with("have the same host and path"),
        "[brane.a]\nimage = \"x\"\n[brane.b]\nimage = \"x\"\ningress = { path = \"/a\" }",
    ),
    (
        "two lists of one table are compared",
        |d| d.message.ends_with("is a variable and a secret"),
        "[brane.a]\nimage = \"x\"\n[brane.a.capability]\nenv = { vars = { A = \"\" }, secrets = [\"A\"] }",
    ),
    (
        "a size or a duration is a text, and its number is out of the key's range",
        |d| ["mem_max is out of range", "deadline is out of range"].contains(&d.message.as_str()),
        "[brane.a]\nimage = \"x\"\nlimits = { mem_max = \"5 GiB\", deadline = \"6m\" }",
    ),
    (
        "a size or a duration is a text, and its number is larger than 64 bits",
        |d| {
            quoted(d).is_some_and(|(text, behind)| {
                let digits = text.bytes().filter(u8::is_ascii_digit).count();
                digits >= 7 && [" is not a size", " is not a duration"].contains(&behind)
            })
        },
        "[brane.a]\nimage = \"x\"\nlimits = { body_max = \"17179869184 GiB\", deadline = \"5124096h\" }",
    ),
    (
        "an address of IPv6 is counted",
        |d| quoted(d).is_some_and(|(text, _)| text.matches(':').count() >= 2),
        "[brane.a]\nimage = \"x\"\ningress = { host = \"1::2::3\" }",
    ),
    (
        "a host's length is that of all of its labels",
        |d| quoted(d).is_some_and(|(text, _)| text.len() > 63),
        "[brane.a]\nimage = \"x\"\ningress = { host = \"0000000000000000000000000000000000000000000000000000000000000-aa\" }",
    ),
    (
        "JSON has one kind of number: 2.0 is whole",
        |d| d.message == "expected a whole number, found float",
        "[brane.a]\nimage = \"x\"\nreplicas = 2.0",
    ),
    (
        "JSON has one kind of number: 0x1 is 1",
        |d| d.message == "expected a number, found integer",
        "[brane.a]\nimage = \"x\"\nlimits = { cpu_quota = 0x1 }",
    ),
    (
        "JSON has no dates: they are strings",
        |d| d.message == "expected a string, found datetime",
        "[brane.a]\nimage = 1979-05-27",
    ),
    (
        "the tier stands under both of its names",
        |d| d.message == "duplicate key",
        "[brane.a]\nimage = \"x\"\ntier = \"standard\"\ncapability = \"standard\"",
    ),
    (
        "the tier has its other name in a table's own lines only",
        |d| d.message == "expected a table, found string",
        "[brane]\na = { image = \"x\", capability = \"standard\" }",
    ),
];

/// The text that a message begins with, and what is said of it.
fn quoted(diagnostic: &Diagnostic) -> Option<(&str, &str)> {
    diagnostic.message.strip_prefix('"')?.rsplit_once('"')
}

/// Why the parser may refuse what the schema lets pass.
fn excuse(wrong: &[Diagnostic]) -> Option<&'static str> {
    let rule = |d: &Diagnostic| NOT_OF_STRUCTURE.iter().find(|(_, is, _)| is(d)).map(|(why, ..)| *why);
    // One fault of structure is enough for the schema to see it.
    wrong.iter().map(rule).collect::<Option<Vec<_>>>()?.first().copied()
}

fn validator() -> jsonschema::Validator {
    let schema: Json = serde_json::from_str(&gaia_manifest::schema()).unwrap();
    assert!(jsonschema::draft7::meta::is_valid(&schema));
    jsonschema::draft7::new(&schema).unwrap()
}

/// As TOML's tooling hands a document to a validator.
fn json(value: &Value) -> Json {
    match value {
        Value::String(text) => Json::from(text.as_str()),
        Value::Integer(number) => Json::from(*number),
        Value::Float(number) => Json::from(*number),
        Value::Boolean(truth) => Json::from(*truth),
        Value::Datetime(date) => Json::from(date.to_string()),
        Value::Array(items) => items.iter().map(json).collect(),
        Value::Table(table) => Json::Object(table.iter().map(|(key, value)| (key.clone(), json(value))).collect()),
    }
}

fn manifests(folder: &str) -> Vec<(String, String)> {
    // Relative to where cargo runs a test: its package.
    let mut all: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|path| path.to_string_lossy().ends_with(".zgraph.toml"));
    all.sort();
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().replace(".zgraph.toml", "");
    all.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// The example of docs/manifest.md.
fn documented() -> String {
    let page = fs::read_to_string("../../docs/manifest.md").unwrap();
    let (_, behind) = page.split_once("\n```toml\n[brane.").unwrap();
    format!("[brane.{}", behind.split_once("\n```").unwrap().0)
}

#[test]
fn what_is_right_is_right_for_editors_too() {
    let validator = validator();
    let mut all = manifests("../../examples");
    all.extend(manifests("../../runtime/manifest/tests/right"));
    all.push(("docs/manifest.md".into(), documented()));
    assert!(all.len() >= 4, "{} manifests", all.len());
    for (file, source) in all {
        assert!(gaia_manifest::parse(&source).is_ok(), "{file} is wrong itself");
        // The seed's own file is TOML only when its tier is under another name.
        let table: Table =
            toml::from_str(&source).or_else(|_| toml::from_str(&gaia_manifest::tier::read(&source))).unwrap();
        if let Err(wrong) = validator.validate(&json(&Value::Table(table))) {
            panic!("{file}: {wrong} at {}", wrong.instance_path());
        }
    }
}

#[test]
fn what_is_wrong_is_wrong_for_editors_too_unless_no_schema_could_know() {
    // Beside each, what it is that a schema cannot say.
    let unseen = [
        ("deadline-zero", "a duration is a text, and its number is out of the key's range"),
        ("duplicate-route", "two branes are compared"),
        ("duplicate-tier", "the tier stands under both of its names"),
        ("env-both", "two lists of one table are compared"),
        ("memory-too-small", "a size is a text, and its number is out of the key's range"),
    ];
    let validator = validator();
    let (mut refused, mut passed) = (0, Vec::new());
    for (file, source) in manifests("../../runtime/manifest/tests/wrong") {
        // What is no TOML never gets as far as a schema.
        let Ok(table) = toml::from_str::<Table>(&source) else { continue };
        if validator.is_valid(&json(&Value::Table(table))) {
            passed.push(file);
        } else {
            refused += 1;
        }
    }
    assert_eq!(passed, unseen.map(|(file, _)| file.to_owned()));
    assert!(refused >= 35, "{refused} are refused");
}

#[test]
fn what_no_schema_could_know_is_there() {
    let validator = validator();
    for (why, _, source) in NOT_OF_STRUCTURE {
        let wrong = gaia_manifest::parse(source).unwrap_err();
        assert_eq!(excuse(&wrong), Some(*why), "{wrong:#?}");
        assert!(validator.is_valid(&json(&Value::Table(toml::from_str(source).unwrap()))), "the schema knows: {why}");
    }
}

#[test]
fn the_documented_example_has_every_key() {
    fn walk(schema: &Json, document: Option<&Json>, at: &str, missing: &mut Vec<String>) {
        for schema in schema["anyOf"].as_array().into_iter().flatten() {
            walk(schema, document, at, missing);
        }
        for (key, schema) in schema["properties"].as_object().into_iter().flatten() {
            let (at, found) = (format!("{at}.{key}"), document.and_then(|d| d.get(key)));
            missing.extend(found.is_none().then(|| at.clone()));
            walk(schema, found, &at, missing);
        }
        // A table under any name: the first that is there.
        let free = &schema["additionalProperties"];
        walk_free(free, document, at, missing);
    }
    fn walk_free(schema: &Json, document: Option<&Json>, at: &str, missing: &mut Vec<String>) {
        if schema.is_object() {
            let first = document.and_then(Json::as_object).and_then(|table| table.values().next());
            walk(schema, first, &format!("{at}.*"), missing);
        }
    }
    let table: Table = toml::from_str(&documented()).unwrap();
    let schema = serde_json::from_str(&gaia_manifest::schema()).unwrap();
    let mut missing = Vec::new();
    walk(&schema, Some(&json(&Value::Table(table))), "", &mut missing);
    missing.retain(|key| !key.starts_with(".brane.execution"));
    assert!(missing.is_empty(), "docs/manifest.md does not show {missing:?}");
}

// ── documents at random ──────────────────────────────────────────────────────────────────────────────────────────────

fn text(pattern: &'static str) -> BoxedStrategy<Value> {
    pattern.prop_map(Value::String).boxed()
}

/// A table with some of these keys. Those marked are there in most tables.
fn some(keys: Vec<(&'static str, bool, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let entry = |(key, must, value): (&'static str, bool, BoxedStrategy<Value>)| {
        prop::option::weighted(if must { 0.99 } else { 0.3 }, value.prop_map(move |value| (key.to_owned(), value)))
    };
    keys.into_iter()
        .map(entry)
        .collect::<Vec<_>>()
        .prop_map(|entries| Value::Table(entries.into_iter().flatten().collect()))
        .boxed()
}

fn list(item: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    prop::collection::vec(item, 0..3).prop_map(Value::Array).boxed()
}

fn number(range: std::ops::RangeInclusive<i64>) -> BoxedStrategy<Value> {
    let (least, most) = range.clone().into_inner();
    prop_oneof![20 => range, 1 => Just(least), 1 => Just(most), 1 => Just(least - 1), 1 => Just(most + 1)]
        .prop_map(Value::Integer)
        .boxed()
}

/// Texts of a key: those that are right, and those that nearly are.
struct Texts(&'static str, &'static str);

const HOST: Texts = Texts(
    "(\\*\\.)?([a-zA-Z0-9_]([a-z0-9-]{0,3}[a-z0-9])?\\.){0,3}[a-z]{1,4}\\.?|10\\.0\\.[0-9]\\.1|(2001:db8)?::[0-9a-f]{1,4}|\\[::1\\]",
    "([a-z0-9-]{0,3}\\.){0,3}[a-z0-9-]{0,4}\\.?|[0-9]{1,3}(\\.[0-9]{1,3}){2,4}|\\[?::[0-9a-f]{0,5}\\]?|[0-9a-f:]{1,12}\
     |([a-z]{62,64}\\.){1,4}[a-z]{1,4}|[0-9]{61,63}[a-z-]{1,3}",
);
const SITE: Texts = Texts(
    "(https?://)?(\\*\\.)?([a-z0-9_]([a-z0-9-]{0,3}[a-z0-9])?\\.){0,2}[a-z]{1,4}\\.?(:[1-9][0-9]{0,3})?\
     |(https?://)?(10\\.[0-9]\\.0\\.1|\\[::[0-9a-f]{0,2}\\])(:[1-9][0-9]{0,3})?|(https?://)?::1",
    "(https?://|ftp://)?([a-z0-9-]{0,3}\\.){0,2}[a-z0-9-]{0,4}(:[0-9]{0,6})?(/|\\?)?|(https?://)?[0-9.]{3,9}(:[0-9]{1,2})?\
     |(https?://)?\\[?[0-9a-f:]{1,7}\\]?(:[0-9]{1,6})?",
);
const ENDPOINT: Texts = Texts(
    "((\\*\\.)?([a-z0-9]{1,4}\\.){0,2}[a-z][a-z0-9]{0,3}|10\\.0\\.0\\.1|\\[(::1|10\\.0\\.0\\.1)\\]):0?[1-9][0-9]{0,3}",
    "(tcp://)?([a-z0-9-]{0,3}\\.){0,2}[a-z0-9-]{0,4}(:[0-9]{0,6})?|::1(:[0-9]{1,2})?|\\[[0-9a-f:]{1,7}\\]:[0-9]{1,6}",
);
const SIZE: Texts = Texts(
    "[0-9]{1,3} ?MiB|[0-9]{3} ?(KiB|kB)|[34] GiB",
    " ?[0-9]{0,4} ?(B|kB|GB|MB|kb|KB)?|[0-9]{10,21} [KMG]iB|6553[5-7] B|409[67] MiB",
);
const DURATION: Texts =
    Texts("[1-9][0-9]{0,2} ?(ns|us|ms|s)|[1-5]m", " ?[0-9]{0,3} ?(ns|us|m|h|min)?|[0-9]{7,21} ?h|[56]m|300s|300001ms");
const IMAGE: Texts = Texts(
    "file:(\\./)?[a-zA-Z -]{1,4}(/[a-z.]{3})?|([a-z0-9._-]{1,4}(:[1-9][0-9]{0,3})?/)?[a-z0-9._-]{1,4}(:[a-zA-Z0-9_][a-zA-Z0-9.-]{0,4})?\
     (@sha256:[0-9a-f]{64})?",
    "file:[a-z./]{0,6}|[a-z0-9._-]{0,3}(:[0-9]{0,6})?/?[a-z0-9._/-]{0,6}(:[a-zA-Z0-9_.-]{0,4})?\
     |[a-z]{1,3}(:[a-z]{127,129}|@(sha256:)?[0-9a-f]{63,65})",
);
const PATH: Texts = Texts("/a|(/[a-z.%~]{0,2}[a-z]){0,3}/?|/", "/?([a-z.%?]{0,3}/){0,3}[a-z.]{0,3}");
const VARIABLE: Texts = Texts("[A-C]|[a-zA-Z_][a-zA-Z0-9_]{0,4}", "[a-zA-Z0-9_-]{0,3}|A{254,256}");

impl Texts {
    fn strings(&self) -> BoxedStrategy<String> {
        prop_oneof![12 => self.0, 1 => self.1].boxed()
    }

    fn values(&self) -> BoxedStrategy<Value> {
        self.strings().prop_map(Value::String).boxed()
    }
}

fn brane() -> BoxedStrategy<Value> {
    let allowed = |entry: &Texts| some(vec![("allowlist", true, list(entry.values()))]);
    let capability = some(vec![
        ("net.http", false, allowed(&SITE)),
        ("net.dns", false, allowed(&HOST)),
        ("net.tcp", false, allowed(&ENDPOINT)),
        ("net.udp", false, allowed(&ENDPOINT)),
        ("fs.tmp", false, some(vec![("quota", true, SIZE.values()), ("lifetime", false, text("request|instance"))])),
        ("clock", false, some(vec![("resolution", true, text("s|ms|us|ns"))])),
        ("random", false, some(vec![])),
        ("env", false, some(vec![("vars", false, variables()), ("secrets", false, list(VARIABLE.values()))])),
    ]);
    some(vec![
        ("substrate", false, text("gaia")),
        ("tier", false, text("standard")),
        ("image", true, IMAGE.values()),
        ("replicas", false, number(1..=100_000)),
        ("ingress", false, some(vec![("host", false, HOST.values()), ("path", false, PATH.values())])),
        ("capability", false, prop_oneof![4 => capability, 1 => text("standard")].boxed()),
        (
            "limits",
            false,
            some(vec![
                (
                    "cpu_quota",
                    false,
                    prop_oneof![9 => (0.0..1.05).prop_map(Value::Float), 1 => (-1_i64..3).prop_map(Value::Integer)]
                        .boxed(),
                ),
                ("mem_max", false, SIZE.values()),
                ("deadline", false, DURATION.values()),
                ("body_max", false, SIZE.values()),
            ]),
        ),
        (
            "execution",
            false,
            some(vec![
                ("lifecycle", false, text("ephemeral|pooled|pinned")),
                ("deterministic", false, deterministic()),
            ]),
        ),
    ])
}

fn variables() -> BoxedStrategy<Value> {
    let table = prop::collection::btree_map(VARIABLE.strings(), text("\\PC{0,3}"), 0..3);
    table.prop_map(|all| Value::Table(all.into_iter().collect())).boxed()
}

fn deterministic() -> BoxedStrategy<Value> {
    some(vec![("seed", false, number(0..=i64::MAX - 1))])
}

fn document() -> impl Strategy<Value = Value> {
    let branes = prop::collection::btree_map(
        Texts("[a-b]|[a-z0-9-]{1,6}", "[a-zA-Z_]{0,3}|[a-z]{47,49}").strings(),
        brane(),
        0..3,
    );
    let default = prop::option::weighted(0.2, some(vec![("deterministic", false, deterministic())]));
    (branes, default).prop_map(|(branes, default)| {
        let mut all: Table = branes.into_iter().collect();
        all.extend(default.map(|default| ("execution".to_owned(), default)));
        Value::Table(Table::from_iter([("brane".to_owned(), Value::Table(all))]))
    })
}

/// One fault.
#[derive(Debug, Clone)]
enum Fault {
    /// A key with another name.
    Rename(String),
    /// A key with a letter more, less or changed.
    Misspell(Index, char),
    /// No such key.
    Remove,
    /// Another value, of whichever type.
    Replace(Value),
    /// A text with a character more, less or changed, whichever the number says.
    Retype(Index, char, u8),
    /// A key that nobody knows beside the others.
    Add(String, Value),
}

fn fault() -> impl Strategy<Value = Fault> {
    let key = select(vec![
        "allowlist",
        "brane",
        "capability",
        "clock",
        "deterministic",
        "env",
        "execution",
        "host",
        "image",
        "limits",
        "mem_max",
        "net.tcp",
        "path",
        "quota",
        "replicas",
        "seed",
        "tier",
        "vars",
    ]);
    let other = prop_oneof![
        any::<i64>().prop_map(Value::Integer),
        (-2_i64..3).prop_map(Value::Integer),
        prop_oneof![Just(2.0), Just(1.0), -1e3..1e3].prop_map(Value::Float),
        any::<bool>().prop_map(Value::Boolean),
        text("[a-z]{0,4}|gaia|standard|64 MiB|8s|1979-05-27"),
        Just(Value::Datetime("1979-05-27".parse().unwrap())),
        list(text("[a-z]{1,3}")),
        list((0_i64..3).prop_map(Value::Integer).boxed()),
        Just(Value::Table(Table::new())),
        Just(Value::Table(Table::from_iter([("x".to_owned(), Value::Integer(1))]))),
    ];
    let letter = prop_oneof![select("./:*@%- _[]\0\n\"\\ A0é".chars().collect::<Vec<_>>()), any::<char>()];
    prop_oneof![
        key.clone().prop_map(|key| Fault::Rename(key.into())),
        (any::<Index>(), proptest::char::range('a', 'z')).prop_map(|(at, letter)| Fault::Misspell(at, letter)),
        Just(Fault::Remove),
        other.clone().prop_map(Fault::Replace),
        (any::<Index>(), letter, 0..3_u8).prop_map(|(at, letter, how)| Fault::Retype(at, letter, how)),
        (prop_oneof![key.prop_map(str::to_owned), "[a-z]{1,5}"], other).prop_map(|(key, value)| Fault::Add(key, value)),
    ]
}

/// All tables' keys in the document, as paths, and the items of lists, for a fault to be made there.
fn places(value: &Value, at: &[String], all: &mut Vec<Vec<String>>) {
    let entries: Vec<(String, &Value)> = match value {
        Value::Table(table) => table.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    for (key, value) in entries {
        let path = [at, &[key]].concat();
        places(value, &path, all);
        all.push(path);
    }
}

fn retyped(text: &str, at: Index, letter: char, how: u8) -> String {
    let mut letters: Vec<char> = text.chars().collect();
    let at = at.index(letters.len() + 1);
    match (how, letters.get_mut(at)) {
        (0, Some(there)) => *there = letter,
        (1, Some(_)) => drop(letters.remove(at)),
        _ => letters.insert(at, letter),
    }
    letters.into_iter().collect()
}

fn spoil(document: &mut Value, place: Index, fault: Fault) {
    let mut all = Vec::new();
    places(document, &[], &mut all);
    if all.is_empty() {
        return;
    }
    let path = &all[place.index(all.len())];
    let (last, before) = path.split_last().unwrap();
    let parent = before.iter().fold(document, |at, key| match at {
        Value::Array(items) => &mut items[key.parse::<usize>().unwrap()],
        at => at.get_mut(key.as_str()).unwrap(),
    });
    let table = match parent {
        Value::Table(table) => table,
        Value::Array(items) => {
            let item = &mut items[last.parse::<usize>().unwrap()];
            match (fault, item) {
                (Fault::Replace(value), item) => *item = value,
                (Fault::Retype(at, letter, how), Value::String(text)) => *text = retyped(text, at, letter, how),
                _ => {}
            }
            return;
        }
        _ => return,
    };
    match fault {
        Fault::Remove => drop(table.remove(last)),
        Fault::Replace(value) => drop(table.insert(last.clone(), value)),
        Fault::Add(key, value) => drop(table.insert(key, value)),
        Fault::Retype(at, letter, how) => {
            if let Some(Value::String(text)) = table.get_mut(last) {
                *text = retyped(text, at, letter, how);
            }
        }
        Fault::Rename(name) => {
            let value = table.remove(last).unwrap();
            table.insert(name, value);
        }
        Fault::Misspell(at, letter) => {
            let value = table.remove(last).unwrap();
            table.insert(retyped(last, at, letter, 0), value);
        }
    }
}

#[test]
fn parser_and_schema_agree() {
    const CASES: u32 = 20_000;
    let (validator, right) = (validator(), Cell::new(0));
    let faults = prop::collection::vec((any::<Index>(), fault()), 0..3);
    let mut runner = TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) });
    let outcome = runner.run(&(document(), faults), |(mut document, faults)| {
        for (place, fault) in faults {
            spoil(&mut document, place, fault);
        }
        let source = toml::to_string(&document).unwrap();
        let valid = validator.is_valid(&json(&document));
        match gaia_manifest::parse(&source) {
            Ok(_) => {
                prop_assert!(valid, "an editor refuses what is right:\n{}", source);
                right.set(right.get() + 1);
            }
            Err(wrong) if valid => {
                prop_assert!(excuse(&wrong).is_some(), "an editor lets pass what is wrong:\n{}\n{:#?}", source, wrong);
            }
            Err(_) => {}
        }
        Ok(())
    });
    outcome.unwrap_or_else(|why| panic!("{why}"));
    let right = right.get();
    assert!((CASES / 5..CASES / 5 * 4).contains(&right), "both sides are to be seen, and {right} of {CASES} are right");
}
