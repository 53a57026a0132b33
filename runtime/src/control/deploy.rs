//! From a manifest to a serving generation: parse → resolve → compile → link stage → plan → start.
//!
//! Any failure before the start leaves everything as it was, and says where it lies.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use gaia_init::supervise::MAX_COMPILERS;
use gaia_init::wire::FromControl;
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use super::Control;
use super::init::Found;
use crate::channel::{Channel, is_sealed, read_whole, sealed};
use crate::compile::{self, MAX_COMPONENT, MAX_REPORT, Report, Word};
use crate::manifest::{self, Manifest};
use crate::plan::{self, Plan};
use crate::{engine, link};

/// The graph's name in the seed.
const GRAPH: &str = "graph.zgraph.toml";
/// What an appliance says that was given none.
const NO_GRAPH: &str = "no graph: every request is answered 404 until one is deployed";
/// What a component must export to be served.
const HANDLER: &str = "wasi:http/incoming-handler";

/// A compiled component.
struct Compiled {
    digest: String,
    report: Report,
    artefact: OwnedFd,
}

/// Starts the graph of the seed, or an empty one if there is none or it does not come up: the appliance then answers 404
/// to everything and says why on its console.
pub(super) async fn from_seed(control: &Control, seed: Option<OwnedFd>, found: &Found) -> anyhow::Result<()> {
    let workers = count(found.workers);
    let mut generation = found.newest + 1;
    let planned = match &seed {
        Some(seed) => planned(control, seed, workers, generation).await,
        None => Err(anyhow::anyhow!(NO_GRAPH)),
    };
    let started = match planned {
        Ok((plan, artefacts)) => {
            // Numbers are not used twice, whatever becomes of them.
            generation += 1;
            start(control, plan, &artefacts).await
        }
        Err(e) => Err(e),
    };
    if let Err(e) = started {
        let words = format!("{e:#}");
        control.say(&words).await;
        control.words.borrow_mut().push(words);
        start(control, Plan { generation, workers, branes: Vec::new() }, &[]).await?;
    }
    Ok(())
}

fn count(workers: usize) -> u32 {
    u32::try_from(workers).unwrap_or(u32::MAX).max(1)
}

/// Hands the generation's files to init and has it started.
async fn start(control: &Control, plan: Plan, artefacts: &[(String, OwnedFd)]) -> anyhow::Result<()> {
    let generation = plan.generation;
    let file = sealed(plan::FILE, &serde_json::to_vec(&plan)?)?;
    control.init.tell(&FromControl::File { generation, name: plan::FILE.into() }, &[file.as_fd()]).await;
    for (name, artefact) in artefacts {
        control.init.tell(&FromControl::File { generation, name: name.clone() }, &[artefact.as_fd()]).await;
    }
    control.init.start(generation).await.with_context(|| format!("generation {generation}"))?;
    *control.plan.borrow_mut() = Some(Rc::new(plan));
    Ok(())
}

async fn planned(
    control: &Control,
    seed: &OwnedFd,
    workers: u32,
    generation: u32,
) -> anyhow::Result<(Plan, Vec<(String, OwnedFd)>)> {
    let text = match read(seed, GRAPH, manifest::MAX_BYTES) {
        Err(e) if e.kind() == ErrorKind::NotFound => anyhow::bail!(NO_GRAPH),
        other => other.with_context(|| format!("reading {GRAPH}"))?,
    };
    let text = String::from_utf8(text).with_context(|| format!("{GRAPH} is not UTF-8"))?;
    let manifest = manifest::parse(&text).map_err(|wrong| listed(GRAPH, &wrong))?;
    for warning in manifest.warnings() {
        control.say(&format!("{GRAPH}: warning: {warning}")).await;
        control.words.borrow_mut().push(warning);
    }
    let (compiled, mut wrong) = compile_all(control, seed, &manifest).await;
    let mut branes = Vec::new();
    for (name, brane) in manifest.brane {
        let Some(compiled) = compiled.get(&brane.image) else { continue };
        match brane_of(name, brane, compiled) {
            Ok(brane) => branes.push(brane),
            Err(reasons) => wrong.extend(reasons),
        }
    }
    let memories: u64 = branes.iter().map(|b| u64::from(b.slots(workers)) * u64::from(b.needs.memories.max(1))).sum();
    if memories > engine::MEMORIES_PER_WORKER {
        let most = engine::MEMORIES_PER_WORKER;
        wrong.push(format!("{memories} instances in each worker, but the address space holds {most}: fewer replicas"));
    }
    if !wrong.is_empty() {
        return Err(listed(GRAPH, &wrong));
    }
    let mut artefacts: Vec<_> = compiled.into_values().map(|c| (artefact_name(&c.digest), c.artefact)).collect();
    artefacts.sort_by(|a, b| a.0.cmp(&b.0));
    artefacts.dedup_by(|a, b| a.0 == b.0);
    Ok((Plan { generation, workers, branes }, artefacts))
}

/// The link stage for one brane: what it becomes in the plan, or all reasons why it cannot.
fn brane_of(name: String, brane: manifest::Brane, compiled: &Compiled) -> Result<plan::Brane, Vec<String>> {
    let report = &compiled.report;
    let mut wrong: Vec<String> = link::refused(&report.imports, &[]).iter().map(|r| format!("{name} {r}")).collect();
    if let (true, Some(reason)) = (wrong.is_empty(), &report.unlinked) {
        wrong.push(format!("{name} cannot be linked: {reason}"));
    }
    if !report.exports.iter().any(|e| e.split('@').next() == Some(HANDLER)) {
        wrong.push(format!("{name} does not export {HANDLER}, so no request could be given to it"));
    }
    let most = brane.limits.mem_max.0;
    match report.needs {
        None => wrong.push(format!("{name}: its component imports or exports modules, so its needs cannot be known")),
        Some(needs) if needs.initial_memory > most => {
            let needed = needs.initial_memory;
            wrong.push(format!("{name} starts with {needed} bytes of memory, but limits.mem_max is {most}"));
        }
        Some(_) => {}
    }
    let (true, Some(needs)) = (wrong.is_empty(), report.needs) else { return Err(wrong) };
    Ok(plan::Brane {
        path: brane.ingress.path.unwrap_or_else(|| format!("/{name}")),
        host: brane.ingress.host.map(|h| h.to_ascii_lowercase()),
        image: brane.image,
        digest: compiled.digest.clone(),
        artefact: artefact_name(&compiled.digest),
        needs,
        replicas: brane.replicas,
        mem_max: most,
        deadline: brane.limits.deadline.0,
        body_max: brane.limits.body_max.0,
        name,
    })
}

fn artefact_name(digest: &str) -> String {
    format!("artefact-{}", digest.get(..32).unwrap_or(digest))
}

fn listed(what: &str, wrong: &[String]) -> anyhow::Error {
    let mut words =
        format!("{what}: {} error{}, nothing is changed", wrong.len(), if wrong.len() == 1 { "" } else { "s" });
    for w in wrong {
        let _ = write!(words, "\n{w}");
    }
    anyhow::anyhow!(words)
}

/// Compiles each image once. Returns what became of them by name, and what went wrong with the others.
async fn compile_all(
    control: &Control,
    seed: &OwnedFd,
    manifest: &Manifest,
) -> (HashMap<String, Compiled>, Vec<String>) {
    let images: BTreeSet<&str> = manifest.brane.values().map(|brane| brane.image.as_str()).collect();
    let mut all = HashMap::with_capacity(images.len());
    let mut wrong = Vec::new();
    let mut working = futures_util::stream::iter(images)
        .map(async |image| {
            let name = manifest::file_name(image).with_context(|| format!("{image:?} is no file"));
            let outcome = match name {
                Ok(name) => compiled_file(control, seed, name).await,
                Err(e) => Err(e),
            };
            (image.to_owned(), outcome)
        })
        .buffer_unordered(MAX_COMPILERS);
    while let Some((image, outcome)) = working.next().await {
        match outcome {
            Ok(compiled) => drop(all.insert(image, compiled)),
            Err(e) => wrong.push(format!("{e:#}")),
        }
    }
    (all, wrong)
}

async fn compiled_file(control: &Control, seed: &OwnedFd, name: &str) -> anyhow::Result<Compiled> {
    let bytes = read(seed, name, MAX_COMPONENT).with_context(|| format!("reading {name}"))?;
    compiled(control, name, &bytes).await.with_context(|| format!("compiling {name}"))
}

async fn compiled(control: &Control, name: &str, component: &[u8]) -> anyhow::Result<Compiled> {
    let digest = Sha256::digest(component).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let compiler = Channel::new(control.init.compiler(control.ticket()).await?)?;
    let file = sealed(name, component)?;
    compiler.send(&Word::Compile, &[file.as_fd()]).await?;
    let (Word::Done, files) = compiler.receive::<Word>().await.context("the compiler ended without an answer")? else {
        anyhow::bail!("the compiler did not answer");
    };
    let mut files = files.into_iter();
    let report = read_whole(files.next().context("the compiler sent no report")?, MAX_REPORT)?;
    let report: Report = serde_json::from_slice(&report).context("the compiler's report")?;
    if let Some(error) = &report.error {
        anyhow::bail!("{error}");
    }
    let artefact = files.next().context("the compiler sent no artefact")?;
    anyhow::ensure!(is_sealed(&artefact), "the compiler sent an artefact that could still change");
    let size = rustix::fs::fstat(&artefact)?.st_size.cast_unsigned();
    anyhow::ensure!(
        size <= compile::MAX_ARTEFACT,
        "the artefact has {size} bytes, at most {} are taken",
        compile::MAX_ARTEFACT
    );
    Ok(Compiled { digest, report, artefact })
}

/// Reads a file of the seed by its plain name.
fn read(seed: &OwnedFd, name: &str, most: u64) -> std::io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    read_whole(rustix::fs::openat(seed, name, flags, Mode::empty())?, most)
}
