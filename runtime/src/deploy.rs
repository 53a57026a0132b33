//! `gaia push` and `deploy`: the operator's side, where files are. What a manifest names is sent, the plan is shown and agreed to, and the
//! appliance does the rest.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::bail;
use bytes::Bytes;
use gaia_manifest::Image;
use gaia_store::{Digest, Reference};
use serde::Serialize;

use crate::client::Client;
use crate::compile::MAX_COMPONENT;
use crate::control::change::{counts, size};
use crate::control::report::{BraneChange, Change, Deploy, Deployed, Graphs, PlanReport, Pushed, Step};
use crate::failure::{Failure, Kind};
use crate::{operate, registries};

/// What brings files to an appliance.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Command {
    /// Put a component into the appliance's store, under a name; or into a registry, if the name begins with one
    Push {
        /// The name, as in omega/cloud-fetch:2.4.1 or registry.example/omega/cloud-fetch:2.4.1
        name: Name,
        /// The component
        file: PathBuf,
        /// As whom a registry is asked: the tables `registry` and `registries` of gaia.toml, or docker's config.json; if not said, registries.toml beside your key, then docker's
        #[arg(long, value_name = "FILE")]
        registries: Option<PathBuf>,
    },
    /// Serve this graph: show what changes, grants first, then swap without losing a request
    Deploy {
        /// The manifest; files that its images name are sent, too
        file: PathBuf,
        /// Show what would change, and change nothing
        #[arg(long)]
        dry_run: bool,
        /// Agree beforehand to whatever is asked about: that states of pinned instances end
        #[arg(long, short)]
        yes: bool,
    },
}

/// What a component is pushed as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// In an appliance's store.
    Stored(Reference),
    /// In a registry.
    Remote(gaia_registry::Reference),
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let remote = gaia_registry::Reference::parse(text);
        match remote {
            Ok(remote) if !remote.is_local() => Ok(Self::Remote(remote)),
            // What it is not in the store says more of a name that would be there.
            Ok(_) => text.parse().map(Self::Stored).map_err(|e: gaia_store::NotAReference| e.to_string()),
            Err(e) => Err(e.to_string()),
        }
    }
}

impl Command {
    /// Whether it is about a registry, which this machine asks itself: no appliance is needed for that.
    #[must_use]
    pub fn is_without_appliance(&self) -> bool {
        matches!(self, Self::Push { name: Name::Remote(_), .. })
    }
}

/// Runs a command: what it has to show on `out`, how far it is on standard error.
///
/// # Errors
/// What went wrong, and what to do. Nothing has changed then, unless it says so.
pub fn run(command: &Command, client: &Client, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        Command::Push { name: Name::Remote(name), file, registries } => {
            let component = component(file).map_err(|e| Failure { kind: Kind::Usage, ..e })?;
            let pushed = registries::push(name, component, registries.as_deref(), doing)?;
            show(out, json, &pushed, pushed_there_text)
        }
        Command::Push { name: Name::Stored(name), file, .. } => {
            let component = component(file).map_err(|e| Failure { kind: Kind::Usage, ..e })?;
            client.progress().doing(&format!("sending {}", file.display()));
            let pushed = client.push(Some(name), component)?;
            show(out, json, &pushed, pushed_text)
        }
        Command::Deploy { file, dry_run, yes } => deploy(client, file, *dry_run, *yes, json, out),
    }
}

fn deploy(
    client: &Client,
    file: &Path,
    dry_run: bool,
    yes: bool,
    json: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let shown = file.display();
    let manifest = std::fs::read_to_string(file).map_err(|e| Failure::unreadable(file, &e))?;
    let parsed = gaia_manifest::parse(&manifest).map_err(|wrong| {
        let mut words = format!("{shown}: {} errors, nothing is changed", wrong.len());
        for diagnostic in wrong {
            let _ = write!(words, "\n{}", diagnostic.render(&shown.to_string(), &manifest, io::stderr().is_terminal()));
        }
        anyhow::anyhow!(words)
    })?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut images = BTreeMap::new();
    for brane in &parsed.branes {
        let Image::File(path) = &brane.image.value else { continue };
        let image = brane.image.value.to_string();
        if let Entry::Vacant(free) = images.entry(image) {
            free.insert(sent(client, &folder.join(path))?);
        }
    }
    let mut asked = Deploy { manifest, file: shown.to_string(), images, plan: None, ends_states: yes };
    let Step::Plan(plan) = client.change("/v1/plan", &asked, doing)? else { bail!("the appliance sent no plan") };
    if dry_run {
        return show(out, json, &*plan, plan_text);
    }
    if !json {
        out.write_all(plan_text(&plan).as_bytes())?;
        out.flush()?;
    }
    if !plan.ends.is_empty() {
        operate::agreed(yes, &format!("it {}", plan.ends.join("; it ")), json)?;
        client.progress().again();
        asked.ends_states = true;
    }
    let (compiled, micros) = (plan.compiled, plan.micros);
    // What was shown is what is agreed to.
    asked.plan = Some(plan.id);
    let Step::Done(mut done) = client.change("/v1/deploy", &asked, doing)? else {
        bail!("the appliance did not say what came of it")
    };
    // It was planned twice, and compiled the first time.
    done.plan.compiled += compiled;
    done.plan.micros += micros;
    show(out, json, &done, deployed_text)
}

/// Sends a component if the appliance does not have it.
fn sent(client: &Client, path: &Path) -> anyhow::Result<Digest> {
    let component = component(path)?;
    let digest = Digest::of(&component);
    if !client.has(&digest)? {
        let words = format!("sending {}", path.display());
        client.progress().doing(&words);
        if !client.progress().cares() {
            doing(&words);
        }
        client.push(None, component)?;
    }
    Ok(digest)
}

fn component(path: &Path) -> Result<Bytes, Failure> {
    let shown = path.display();
    let wrong = |error: String| Failure::new(Kind::Failed, error);
    let unreadable = |e: io::Error| wrong(format!("{shown}: {e}"));
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > MAX_COMPONENT {
        return Err(wrong(format!("{shown} has {size} bytes, at most {MAX_COMPONENT} are taken")));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    if !bytes.starts_with(b"\0asm") {
        let help = "a component is built with the target wasm32-wasip2, for example";
        return Err(wrong(format!("{shown} is no WebAssembly")).help(help));
    }
    Ok(bytes.into())
}

/// How far it is, for whoever watches.
pub(crate) fn doing(words: &str) {
    if io::stderr().is_terminal() {
        let _ = writeln!(io::stderr(), "· {words}");
    }
}

fn show<T: Serialize>(out: &mut dyn Write, json: bool, value: &T, text: fn(&T) -> String) -> anyhow::Result<()> {
    let shown = if json { serde_json::to_string(value)? + "\n" } else { text(value) };
    Ok(out.write_all(shown.as_bytes())?)
}

fn pushed_text(pushed: &Pushed) -> String {
    let name = pushed.name.as_deref().map(|name| format!("{name} → ")).unwrap_or_default();
    format!("✓ {name}{} · {} bytes\n", pushed.digest, pushed.bytes)
}

fn pushed_there_text(pushed: &registries::Pushed) -> String {
    let registries::Pushed { name, manifest, digest, bytes } = pushed;
    format!("✓ {name}@{manifest}\n  component {digest} · {bytes} bytes\n")
}

/// What a deploy or a way back has come to, as a person reads it.
#[must_use]
pub fn deployed_text(done: &Deployed) -> String {
    format!("✓ graph {} serves · generation {} · {} ms\n", done.graph, done.generation, done.millis)
}

/// A plan as a person reads it: what widens first.
#[must_use]
pub fn plan_text(plan: &PlanReport) -> String {
    let mut out = String::new();
    let against = plan.against.map_or_else(|| "what serves".to_owned(), |graph| format!("graph {graph}"));
    let [added, changed, removed, same] = counts(&plan.branes);
    let _ =
        writeln!(out, "plan against {against}: {added} new, {changed} changed, {removed} removed, {same} as they are");
    let wider = plan.branes.iter().flat_map(|b| b.grants.iter().map(move |g| (b, g)));
    for (brane, grant) in wider.filter(|(_, grant)| grant.widens == Some(true)) {
        let _ = writeln!(out, "! {:<14} is granted {}", brane.name, grant.text);
    }
    for brane in plan.branes.iter().filter(|b| b.change != Change::Same) {
        let _ = write!(out, "{}", brane_text(brane));
    }
    for end in &plan.ends {
        let _ = writeln!(out, "! {end}");
    }
    if plan.sandbox_before.as_ref() != Some(&plan.sandbox) {
        let before = plan.sandbox_before.as_ref().map(|before| format!(" (before: {before})")).unwrap_or_default();
        let _ = writeln!(out, "sandbox          {}{before}", plan.sandbox);
    }
    let _ = writeln!(
        out,
        "memory           at most {} for all instances, taken when touched; the machine has {}",
        size(plan.declared),
        size(plan.memory >> 20 << 20)
    );
    for warning in &plan.warnings {
        let _ = writeln!(out, "{}", warning.trim_end());
    }
    out
}

fn brane_text(brane: &BraneChange) -> String {
    let short = |digest: &str| digest.get(..12).unwrap_or(digest).to_owned();
    let mut out = String::new();
    let (mark, words) = match brane.change {
        Change::Added => ('+', format!("{} @{}", brane.image, short(&brane.digest))),
        Change::Removed => ('-', "is removed".to_owned()),
        Change::Changed | Change::Same => ('~', String::new()),
    };
    let mut lines: Vec<String> = (!words.is_empty()).then_some(words).into_iter().collect();
    if let Some(before) = &brane.digest_before {
        lines.push(format!("component @{} → @{}", short(before), short(&brane.digest)));
    }
    lines.extend(brane.others.iter().cloned());
    // What widens stands above, marked.
    for grant in brane.grants.iter().filter(|g| g.widens != Some(true) && brane.change != Change::Removed) {
        let word = if grant.widens.is_some() { "is granted" } else { "is not granted any more:" };
        lines.push(format!("{word} {}", grant.text));
    }
    for line in lines {
        let _ = writeln!(out, "{mark} {:<14} {line}", brane.name);
    }
    out
}

/// The history as a person reads it.
#[must_use]
pub fn graphs_text(graphs: &Graphs) -> String {
    let mut out = format!("{:<2}{:>5}  {:<30} {:<24} {}\n", "", "GRAPH", "DEPLOYED", "BY", "MANIFEST");
    for graph in &graphs.graphs {
        let mark = if graph.current { "●" } else { "" };
        let at = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_nanos(graph.at_ns));
        let _ = writeln!(out, "{mark:<2}{:>5}  {at:<30} {:<24} {}", graph.number, graph.by, graph.file);
        if let Some(outcome) = &graph.outcome {
            let _ = writeln!(out, "{:<9}{outcome}", "");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::GrantChange;

    #[test]
    fn what_widens_is_shown_first_and_marked() {
        let grant = |text: &str, widens| GrantChange { text: text.into(), widens };
        let fetch = BraneChange {
            name: "fetch".into(),
            change: Change::Changed,
            image: "file:./f.wasm".into(),
            digest: "b".repeat(64),
            digest_before: Some("a".repeat(64)),
            grants: vec![grant("net.http *.example", Some(true)), grant("net.http a.example", None)],
            others: vec!["replicas 4 → 8".into()],
        };
        let gone = BraneChange { name: "old".into(), change: Change::Removed, digest_before: None, ..fetch.clone() };
        let plan = PlanReport {
            against: Some(3),
            branes: vec![fetch, gone],
            ends: vec!["ends the state of counter.001: its image changes".into()],
            sandbox: "workers connect by TCP to port 443".into(),
            sandbox_before: Some("workers make no socket".into()),
            declared: 1 << 30,
            memory: 512 << 20,
            ..PlanReport::default()
        };
        let text = plan_text(&plan);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "plan against graph 3: 0 new, 1 changed, 1 removed, 0 as they are");
        assert_eq!(lines[1], "! fetch          is granted net.http *.example");
        assert!(lines.contains(&"~ fetch          component @aaaaaaaaaaaa → @bbbbbbbbbbbb"), "{text}");
        assert!(lines.contains(&"~ fetch          is not granted any more: net.http a.example"), "{text}");
        assert!(lines.contains(&"- old            is removed"), "{text}");
        assert!(lines.contains(&"! ends the state of counter.001: its image changes"), "{text}");
        assert!(text.contains("workers connect by TCP to port 443 (before: workers make no socket)"), "{text}");
    }

    #[test]
    fn what_begins_with_a_registry_goes_there() {
        for text in ["registry.example/omega/x:1", "localhost:5000/x", "10.0.2.2:5000/omega/x:2"] {
            assert!(matches!(text.parse(), Ok(Name::Remote(_))), "{text}");
        }
        for text in ["omega/x:1", "x", "hello.wasm:1"] {
            assert!(matches!(text.parse(), Ok(Name::Stored(_))), "{text}");
        }
        for text in ["", "Omega/x", "registry.example/", "https://registry.example/x"] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_component_is_not_sent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.wasm");
        std::fs::write(&path, "text").unwrap();
        assert!(component(&path).unwrap_err().error.ends_with("is no WebAssembly"));
        assert!(component(&folder.path().join("none")).is_err());
    }
}
