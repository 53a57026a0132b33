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
use crate::channel::{Channel, is_sealed, read_whole, sealed};
use crate::compile::{self, MAX_COMPONENT, MAX_REPORT, Report, Word};
use crate::link;
use crate::manifest::{self, Manifest};
use crate::plan::{self, Plan};

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

/// Starts the graph of the seed, or an empty one if there is none or it is not good: the appliance then answers 404 to
/// everything and says why on its console.
pub(super) async fn from_seed(control: &Control, seed: Option<OwnedFd>, workers: usize) -> anyhow::Result<()> {
    let outcome = match &seed {
        None => Err(anyhow::anyhow!(NO_GRAPH)),
        Some(seed) => planned(control, seed, workers).await,
    };
    let (plan, artefacts) = match outcome {
        Ok(planned) => planned,
        Err(e) => {
            let words = format!("{e:#}");
            control.say(&words).await;
            control.words.borrow_mut().push(words);
            (Plan { generation: 1, workers: count(workers), branes: Vec::new() }, Vec::new())
        }
    };
    start(control, plan, &artefacts).await
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

async fn planned(control: &Control, seed: &OwnedFd, workers: usize) -> anyhow::Result<(Plan, Vec<(String, OwnedFd)>)> {
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
    let compiled = compile_all(control, seed, &manifest).await?;
    let mut wrong = Vec::new();
    let mut branes = Vec::new();
    for (name, brane) in manifest.brane {
        let Some(compiled) = compiled.get(&brane.image) else { continue };
        let refused = link::refused(&compiled.report.imports, &[]);
        wrong.extend(refused.iter().map(|refusal| format!("{name} {refusal}")));
        if !compiled.report.exports.iter().any(|e| e.split('@').next() == Some(HANDLER)) {
            wrong.push(format!("{name} does not export {HANDLER}, so no request could be given to it"));
        }
        let Some(needs) = compiled.report.needs else {
            wrong.push(format!("{name}: its component imports or exports modules, so its needs cannot be known"));
            continue;
        };
        if needs.initial_memory > brane.limits.mem_max.0 {
            let (needed, most) = (needs.initial_memory, brane.limits.mem_max.0);
            wrong.push(format!("{name} starts with {needed} bytes of memory, but limits.mem_max is {most}"));
        }
        branes.push(plan::Brane {
            path: brane.ingress.path.unwrap_or_else(|| format!("/{name}")),
            host: brane.ingress.host.map(|h| h.to_ascii_lowercase()),
            image: brane.image,
            digest: compiled.digest.clone(),
            artefact: artefact_name(&compiled.digest),
            needs,
            replicas: brane.replicas,
            mem_max: brane.limits.mem_max.0,
            deadline: brane.limits.deadline.0,
            body_max: brane.limits.body_max.0,
            name,
        });
    }
    if !wrong.is_empty() {
        return Err(listed(GRAPH, &wrong));
    }
    let mut artefacts: Vec<_> = compiled.into_values().map(|c| (artefact_name(&c.digest), c.artefact)).collect();
    artefacts.sort_by(|a, b| a.0.cmp(&b.0));
    artefacts.dedup_by(|a, b| a.0 == b.0);
    Ok((Plan { generation: 1, workers: count(workers), branes }, artefacts))
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

/// Compiles each image once, by its name and by its content.
async fn compile_all(
    control: &Control,
    seed: &OwnedFd,
    manifest: &Manifest,
) -> anyhow::Result<HashMap<String, Compiled>> {
    let images: BTreeSet<&str> = manifest.brane.values().map(|brane| brane.image.as_str()).collect();
    let mut all = HashMap::with_capacity(images.len());
    let mut working = futures_util::stream::iter(images)
        .map(async |image| {
            let name = manifest::file_name(image).with_context(|| format!("{image:?} is no file"))?;
            let bytes = read(seed, name, MAX_COMPONENT).with_context(|| format!("reading {name}"))?;
            let compiled = compiled(control, name, &bytes).await.with_context(|| format!("compiling {name}"))?;
            Ok::<_, anyhow::Error>((image.to_owned(), compiled))
        })
        .buffer_unordered(MAX_COMPILERS);
    while let Some(done) = working.next().await {
        let (image, compiled) = done?;
        all.insert(image, compiled);
    }
    Ok(all)
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
