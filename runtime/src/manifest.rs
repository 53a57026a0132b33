//! The manifest, `*.zgraph.toml`: what runs, and all that it may do.
//!
//! This is the part of the grammar that the runtime can honour today. What it cannot honour yet is refused by name or
//! warned about, never silently taken: a limit that is written down and not enforced is worse than none.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use serde::Deserialize;

/// The largest manifest, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;
/// The most replicas of one brane.
pub const MAX_REPLICAS: u32 = 100_000;

/// A parsed manifest.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The branes by name.
    #[serde(default)]
    pub brane: BTreeMap<String, Brane>,
}

/// One brane.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Brane {
    /// Must be `gaia`.
    #[serde(default)]
    pub substrate: Option<String>,
    /// Must be `standard`.
    #[serde(default)]
    pub tier: Option<String>,
    /// `file:./x.wasm`, relative to the manifest.
    pub image: String,
    /// Instances on the whole appliance.
    #[serde(default = "one")]
    pub replicas: u32,
    /// Where its requests come from.
    #[serde(default)]
    pub ingress: Ingress,
    /// What it is granted, by key.
    #[serde(default)]
    pub capability: BTreeMap<String, toml::Value>,
    /// Its limits.
    #[serde(default)]
    pub limits: Limits,
    /// How it is run.
    #[serde(default)]
    pub execution: Execution,
}

/// `[brane.<name>.ingress]`
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ingress {
    /// Exact host; any if absent.
    #[serde(default)]
    pub host: Option<String>,
    /// Path prefix; `/<name>` if absent.
    #[serde(default)]
    pub path: Option<String>,
}

/// `[brane.<name>.limits]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Of one core, per replica.
    pub cpu_quota: Option<f64>,
    /// Bytes of memories and tables of one instance.
    pub mem_max: Size,
    /// Wall time for a request.
    pub deadline: Time,
    /// Bytes of a request's body.
    pub body_max: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_quota: None,
            mem_max: Size(64 << 20),
            deadline: Time(Duration::from_secs(30)),
            body_max: Size(8 << 20),
        }
    }
}

/// `[brane.<name>.execution]`
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Execution {
    /// How long an instance lives.
    #[serde(default)]
    pub lifecycle: Option<Lifecycle>,
}

/// How long an instance lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lifecycle {
    /// One request; made when it arrives.
    Ephemeral,
    /// One request; ready before it arrives.
    Pooled,
    /// All requests.
    Pinned,
}

fn one() -> u32 {
    1
}

/// A number of bytes: `64 MiB`, `10 kB`, `512 B`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

/// A duration: `8s`, `250 ms`, `1m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Time(pub Duration);

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start()))
}

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let factor = |unit| {
            Some(match unit {
                "B" => 1,
                "kB" => 1000,
                "MB" => 1_000_000,
                "GB" => 1_000_000_000,
                "KiB" => 1 << 10,
                "MiB" => 1 << 20,
                "GiB" => 1 << 30,
                _ => return None,
            })
        };
        number_and_unit(&text)
            .and_then(|(n, unit)| n.checked_mul(factor(unit)?))
            .map(Self)
            .ok_or_else(|| format!("\"{text}\" is not a size such as \"64 MiB\"; units: B, kB, MB, GB, KiB, MiB, GiB"))
    }
}

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let nanos = |unit| {
            Some(match unit {
                "ns" => 1,
                "us" => 1_000,
                "ms" => 1_000_000,
                "s" => 1_000_000_000,
                "m" => 60_000_000_000,
                "h" => 3_600_000_000_000,
                _ => return None,
            })
        };
        number_and_unit(&text)
            .and_then(|(n, unit)| n.checked_mul(nanos(unit)?))
            .map(|n| Self(Duration::from_nanos(n)))
            .ok_or_else(|| format!("\"{text}\" is not a duration such as \"8s\"; units: ns, us, ms, s, m, h"))
    }
}

/// The longest deadline a brane may have.
pub const MAX_DEADLINE: Duration = Duration::from_mins(5);
/// The most memory one instance may have: what a 32-bit address can name.
pub const MAX_MEMORY: u64 = 4 << 30;

/// Parses a manifest and checks what the types cannot say.
///
/// # Errors
/// All that is wrong, one text each. Syntax errors come with line, column and the line itself; a file with one has no
/// others, because nothing after it can be trusted.
///
/// ```
/// let manifest = gaia_runtime::manifest::parse("[brane.hello]\nimage = \"file:./hello.wasm\"\n").unwrap();
/// assert_eq!(manifest.brane["hello"].replicas, 1);
/// ```
pub fn parse(text: &str) -> Result<Manifest, Vec<String>> {
    let manifest: Manifest = toml::from_str(text).map_err(|e| vec![e.to_string().trim_end().to_owned()])?;
    let mut wrong = Vec::new();
    let mut routes = BTreeMap::new();
    for (name, brane) in &manifest.brane {
        let mut say = |what: String| wrong.push(format!("[brane.{name}]: {what}"));
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name == "execution" {
            say("\"execution\" cannot be a brane's name: [brane.execution] sets defaults for every brane".into());
        } else if name.is_empty() || name.len() > 48 || !name.bytes().all(plain) {
            say("a brane's name has 1 to 48 of a-z, 0-9 and -".into());
        }
        if brane.substrate.as_deref().is_some_and(|s| s != "gaia") {
            say(format!(
                "substrate = {:?}: this is gaia; remove the line or write \"gaia\"",
                brane.substrate.as_deref().unwrap_or_default()
            ));
        }
        if brane.tier.as_deref().is_some_and(|t| t != "standard") {
            say(format!(
                "tier = {:?}: the only tier of this substrate is \"standard\"",
                brane.tier.as_deref().unwrap_or_default()
            ));
        }
        if file_name(&brane.image).is_none() {
            say(format!(
                "image = {:?}: this version takes \"file:./NAME.wasm\", a file beside the manifest",
                brane.image
            ));
        }
        if !(1..=MAX_REPLICAS).contains(&brane.replicas) {
            say(format!("replicas = {}: from 1 to {MAX_REPLICAS}", brane.replicas));
        }
        if let Some(path) = &brane.ingress.path
            && !path_prefix(path)
        {
            say(format!("ingress.path = {path:?}: a path begins with / and has no query, as in \"/fetch\""));
        }
        match brane.ingress.host.as_deref() {
            Some(host) if host.contains('*') => say("ingress.host: this version takes exact hosts only".into()),
            Some(host) if !host_name(host) => {
                say(format!(
                    "ingress.host = {host:?}: a host alone, as in \"fetch.example.org\": no scheme, user or port"
                ));
            }
            _ => {}
        }
        let host = brane.ingress.host.as_deref().unwrap_or_default().to_ascii_lowercase();
        let path = brane.ingress.path.clone().unwrap_or_else(|| format!("/{name}"));
        match routes.entry((host, path.trim_end_matches('/').to_owned())) {
            Entry::Occupied(other) => {
                let other: &&str = other.get();
                say(format!("has the same host and path as [brane.{other}]: only one can be served"));
            }
            Entry::Vacant(free) => {
                free.insert(name.as_str());
            }
        }
        for key in brane.capability.keys() {
            if crate::link::KEYS.iter().any(|(k, _)| k == key) || key == "env" {
                say(format!("capability \"{key}\": this version cannot grant it yet"));
            } else {
                say(format!("capability \"{key}\": there is no such key"));
            }
        }
        if brane.limits.deadline.0.is_zero() || brane.limits.deadline.0 > MAX_DEADLINE {
            say(format!("limits.deadline: more than 0 and at most {} s", MAX_DEADLINE.as_secs()));
        }
        if brane.limits.mem_max.0 == 0 || brane.limits.mem_max.0 > MAX_MEMORY {
            say("limits.mem_max: more than 0 and at most 4 GiB".into());
        }
        if brane.limits.cpu_quota.is_some_and(|q| !(q > 0.0 && q <= 1.0)) {
            say("limits.cpu_quota: more than 0 and at most 1, the part of one core a replica may use".into());
        }
        if brane.execution.lifecycle == Some(Lifecycle::Pinned) {
            say("execution.lifecycle = \"pinned\": this version cannot keep an instance between requests yet".into());
        }
    }
    if manifest.brane.len() > crate::plan::MAX_BRANES {
        wrong.push(format!("{} branes: at most {} fit in one graph", manifest.brane.len(), crate::plan::MAX_BRANES));
    }
    if wrong.is_empty() { Ok(manifest) } else { Err(wrong) }
}

impl Manifest {
    /// What the manifest asks for and this version does not do: one text each.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (name, brane) in &self.brane {
            let mut say = |what: &str| all.push(format!("[brane.{name}]: {what}"));
            if brane.limits.cpu_quota.is_some() {
                say("limits.cpu_quota is not enforced by this version");
            }
            if brane.execution.lifecycle == Some(Lifecycle::Pooled) {
                say(
                    "execution.lifecycle: this version makes each instance when its request arrives, as \"ephemeral\" says",
                );
            }
        }
        all
    }
}

/// Whether a request's host could ever be this.
fn host_name(host: &str) -> bool {
    host.parse::<http::uri::Authority>().is_ok_and(|a| a.host() == host && a.port().is_none())
}

/// Whether a request's path could ever begin with this.
fn path_prefix(path: &str) -> bool {
    let plain = |p: http::uri::PathAndQuery| p.as_str() == path && p.query().is_none();
    path.starts_with('/') && !path.contains('#') && path.parse().is_ok_and(plain)
}

/// The name of the file that `image = "file:./NAME"` means: one plain name, so that it cannot leave the directory.
#[must_use]
pub fn file_name(image: &str) -> Option<&str> {
    let name = image.strip_prefix("file:")?;
    let name = name.strip_prefix("./").unwrap_or(name);
    let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']) && name.len() <= 255;
    plain.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_said_has_its_default() {
        let m = parse("[brane.hello]\nimage = \"file:./hello.wasm\"\n").unwrap();
        let b = &m.brane["hello"];
        assert_eq!((b.limits.mem_max, b.execution.lifecycle), (Size(64 << 20), None));
    }

    #[test]
    fn every_error_of_a_file_comes_in_one_run() {
        let wrong = parse(
            "[brane.A]\nimage = \"x\"\nreplicas = 0\n[brane.b]\nimage = \"file:./b.wasm\"\nsubstrate = \"aws\"\n\
             [brane.b.capability]\n\"net.http\" = { allowlist = [] }\n\"net.htpp\" = {}\n",
        )
        .unwrap_err();
        assert_eq!(wrong.len(), 6, "{wrong:#?}");
        assert!(wrong.iter().any(|w| w.contains("[brane.b]") && w.contains("\"aws\"")));
    }

    #[test]
    fn syntax_errors_show_their_place() {
        let wrong = parse("[brane.a]\nimage = \"file:./a.wasm\"\nimage = \"file:./b.wasm\"\n").unwrap_err();
        assert!(wrong[0].contains("line 3"), "{wrong:?}");
        let wrong = parse("[brane.a]\nimage = \"file:./a.wasm\"\nreplica = 3\n").unwrap_err();
        assert!(wrong[0].contains("line 3") && wrong[0].contains("replicas"), "{wrong:?}");
        let wrong = parse("[brane.a]\nimage = \"file:./a.wasm\"\nlimits = { mem_max = \"64 MB/s\" }\n").unwrap_err();
        assert!(wrong[0].contains("line 3") && wrong[0].contains("64 MiB"), "{wrong:?}");
    }

    #[test]
    fn a_limit_that_is_not_enforced_is_said_so() {
        let m = parse("[brane.a]\nimage = \"file:./a.wasm\"\nlimits = { cpu_quota = 0.5 }\nexecution = { lifecycle = \"pooled\" }\n").unwrap();
        assert_eq!(m.warnings().len(), 2);
    }

    #[test]
    fn a_route_that_no_request_could_take_is_refused() {
        for ingress in [
            "host = \"example.org:8080\"",
            "host = \"\"",
            "host = \"http://x\"",
            "host = \"a@b\"",
            "path = \"fetch\"",
            "path = \"/a?b\"",
            "path = \"/a#b\"",
            "path = \"/a b\"",
        ] {
            let text = format!("[brane.a]\nimage = \"file:./a.wasm\"\ningress = {{ {ingress} }}\n");
            assert_eq!(parse(&text).unwrap_err().len(), 1, "{ingress}");
        }
        let twice = "[brane.a]\nimage = \"file:./a.wasm\"\n[brane.b]\nimage = \"file:./a.wasm\"\ningress = { path = \"/a/\" }\n";
        assert!(parse(twice).unwrap_err()[0].contains("same host and path as [brane.a]"));
    }

    #[test]
    fn an_image_cannot_leave_its_directory() {
        assert_eq!(file_name("file:./a.wasm"), Some("a.wasm"));
        for image in ["file:../a.wasm", "file:/etc/passwd", "file:./a/b.wasm", "file:", "omega/x:1", "file:./.."] {
            assert_eq!(file_name(image), None, "{image}");
        }
    }

    #[test]
    fn the_examples_parse_or_say_why_not() {
        let all = include_str!("../../examples/all.zgraph.toml");
        assert_eq!(parse(all).unwrap().brane.len(), 6);
        assert!(parse(include_str!("../../examples/hello.zgraph.toml")).is_ok());
        let fetch = parse(include_str!("../../examples/fetch.zgraph.toml")).unwrap_err();
        assert!(fetch.iter().all(|w| w.contains("cannot grant it yet")), "{fetch:?}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,300}") {
            let _ = parse(&text);
        }

        #[test]
        fn no_manifest_like_text_panics(
            text in "(\\[brane\\.[a-z]{1,3}(\\.limits|\\.ingress|\\.capability)?\\]\n|(image|replicas|mem_max|deadline|path) = [\"0-9a-zA-Z :./]{0,20}\n){0,8}"
        ) {
            let _ = parse(&text);
        }

        #[test]
        fn sizes_and_durations_do_not_overflow(n: u64, unit in "[kKMG]?i?B|[num]?s|[mh]") {
            let _ = Size::try_from(format!("{n} {unit}"));
            let _ = Time::try_from(format!("{n}{unit}"));
        }
    }
}
