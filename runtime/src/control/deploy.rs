//! From a manifest to a serving generation: parse → resolve → compile → link stage → plan → start.
//!
//! Any failure before the start leaves everything as it was, and says where it lies.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use gaia_init::supervise::MAX_COMPILERS;
use gaia_init::wire::FromControl;
use gaia_manifest::{Brane, Diagnostic, Image, Manifest, Severity};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use super::Control;
use super::init::Found;
use crate::channel::{Channel, is_sealed, read_whole, sealed};
use crate::compile::{self, MAX_COMPONENT, MAX_REPORT, Report, Word};
use crate::plan::{self, Plan};
use crate::{engine, review};

/// The graph's name in the seed.
const GRAPH: &str = "graph.zgraph.toml";
/// What an appliance says that was given none.
const NO_GRAPH: &str = "no graph: every request is answered 404 until one is deployed";

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
    let text = match read(seed, GRAPH, gaia_manifest::MAX_BYTES as u64) {
        Err(e) if e.kind() == ErrorKind::NotFound => anyhow::bail!(NO_GRAPH),
        other => other.with_context(|| format!("reading {GRAPH}"))?,
    };
    let text = String::from_utf8(text).with_context(|| format!("{GRAPH} is not UTF-8"))?;
    let manifest = gaia_manifest::parse(&text).map_err(|wrong| refused(&text, &wrong))?;
    let mut said = review::unsupported(&manifest);
    let (compiled, failed) = compile_all(control, seed, &manifest).await;
    said.extend(failed);
    let mut branes = Vec::new();
    for brane in &manifest.branes {
        let Some(compiled) = compiled.get(&brane.image.value.to_string()) else { continue };
        said.extend(review::of(brane, &compiled.report));
        branes.extend(compiled.report.needs.map(|needs| planned_brane(brane, compiled, needs)));
    }
    let memories: u64 = branes.iter().map(|b| u64::from(b.slots(workers)) * u64::from(b.needs.memories.max(1))).sum();
    if memories > engine::MEMORIES_PER_WORKER {
        let most = engine::MEMORIES_PER_WORKER;
        let message = format!("{memories} instances in each worker, but the address space holds {most}");
        said.push(Diagnostic::error(0..0, message, "all of it together").help("fewer replicas"));
    }
    said.sort_by_key(|d| d.span.start);
    if said.iter().any(|d| d.severity == Severity::Error) {
        return Err(refused(&text, &said));
    }
    for warning in &said {
        control.say(&warning.render(GRAPH, &text, false)).await;
        control.words.borrow_mut().push(warning.message.clone());
    }
    let mut artefacts: Vec<_> = compiled.into_values().map(|c| (artefact_name(&c.digest), c.artefact)).collect();
    artefacts.sort_by(|a, b| a.0.cmp(&b.0));
    artefacts.dedup_by(|a, b| a.0 == b.0);
    Ok((Plan { generation, workers, branes }, artefacts))
}

fn planned_brane(brane: &Brane, compiled: &Compiled, needs: plan::Needs) -> plan::Brane {
    plan::Brane {
        name: brane.name.value.clone(),
        image: brane.image.value.to_string(),
        digest: compiled.digest.clone(),
        artefact: artefact_name(&compiled.digest),
        needs,
        host: brane.ingress.host.as_ref().map(ToString::to_string),
        path: brane.ingress.path.clone(),
        replicas: brane.replicas,
        mem_max: brane.limits.mem_max.value,
        deadline: brane.limits.deadline,
        body_max: brane.limits.body_max,
    }
}

fn artefact_name(digest: &str) -> String {
    format!("artefact-{}", digest.get(..32).unwrap_or(digest))
}

/// All that is to be said about a graph that is refused.
fn refused(source: &str, said: &[Diagnostic]) -> anyhow::Error {
    let errors = said.iter().filter(|d| d.severity == Severity::Error).count();
    let mut words = format!("{GRAPH}: {errors} error{}, nothing is changed", if errors == 1 { "" } else { "s" });
    for diagnostic in said {
        let _ = write!(words, "\n{}", diagnostic.render(GRAPH, source, false));
    }
    anyhow::anyhow!(words)
}

/// Compiles each image once. Returns what became of them by image, and what went wrong with the others.
async fn compile_all(
    control: &Control,
    seed: &OwnedFd,
    manifest: &Manifest,
) -> (HashMap<String, Compiled>, Vec<Diagnostic>) {
    let files = manifest.branes.iter().filter_map(|brane| match &brane.image.value {
        Image::File(path) => Some((path.as_str(), brane)),
        Image::Name { .. } => None,
    });
    let files: BTreeMap<&str, &Brane> = files.collect();
    let mut all = HashMap::with_capacity(files.len());
    let mut wrong = Vec::new();
    let mut working = futures_util::stream::iter(files)
        .map(async |(path, brane)| (brane, compiled_file(control, seed, path.strip_prefix("./").unwrap_or(path)).await))
        .buffer_unordered(MAX_COMPILERS);
    while let Some((brane, outcome)) = working.next().await {
        match outcome {
            Ok(compiled) => drop(all.insert(brane.image.value.to_string(), compiled)),
            Err(e) => wrong.push(Diagnostic::error(brane.image.span.clone(), format!("{e:#}"), "this image")),
        }
    }
    (all, wrong)
}

async fn compiled_file(control: &Control, seed: &OwnedFd, name: &str) -> anyhow::Result<Compiled> {
    // The seed is flat, and a name cannot lead out of it.
    anyhow::ensure!(!name.contains('/'), "{name}: the seed has no folders; put it beside the graph");
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
