//! From a manifest to a serving generation: parse → resolve → compile → link stage → plan → start.
//!
//! Any failure before the start leaves everything as it was, and says where it lies.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use gaia_init::supervise::MAX_COMPILERS;
use gaia_init::wire::FromControl;
use gaia_manifest::{Brane, Capability, Diagnostic, Image, Lifecycle, Manifest, Severity};
use rustix::fs::{AtFlags, Mode, OFlags};
use sha2::{Digest as _, Sha256};

use super::Control;
use super::artefact::{self, Artefact, Key};
use super::init::Found;
use crate::channel::{Channel, read_whole, sealed};
use crate::compile::{MAX_COMPONENT, MAX_REPORT, Report, Word};
use crate::plan::{self, Plan};
use crate::secrets::{self, Secret, Secrets};
use crate::{engine, review};

/// The largest file of extra roots, in bytes, and all of them together: Mozilla's whole list is 220 KiB.
const MAX_ROOTS: u64 = 1 << 20;
/// The graph's name in the seed.
const GRAPH: &str = "graph.zgraph.toml";
/// What an appliance says that was given none.
const NO_GRAPH: &str = "no graph: every request is answered 404 until one is deployed";
/// How often watched files are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long they must be still: whoever writes one may not be done.
const STILL_FOR: Duration = Duration::from_millis(100);

/// Where the graph and its components are.
pub(super) struct Source {
    folder: OwnedFd,
    /// The graph's file there.
    graph: String,
    /// How the graph is called where something is said about it.
    shown: String,
    /// It is the seed of the appliance.
    seed: bool,
    /// Files with certificates of authorities that requests to the outside trust besides.
    roots: Vec<String>,
    /// The file with the values of secrets.
    secrets: Option<String>,
    /// What a graph that does not come up means.
    failure: Failure,
    /// Deploy again when a file changes.
    pub(super) watch: bool,
}

/// What a graph that does not come up means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// Nothing but that is served until another is deployed: the appliance.
    Empty,
    /// The end: `gaia run`.
    End,
}

impl Source {
    /// The seed of the appliance, or the folder of the manifest that `gaia run` was told.
    pub(super) fn from_environment(folder: OwnedFd) -> Self {
        let watch = std::env::var_os("GAIA_WATCH").is_some();
        let roots: Vec<String> = std::env::var("GAIA_ROOTS").unwrap_or_default().lines().map(str::to_owned).collect();
        let secrets = std::env::var("GAIA_SECRETS").ok();
        match std::env::var("GAIA_GRAPH") {
            Err(_) => {
                let (graph, shown) = (GRAPH.into(), GRAPH.into());
                Self { folder, graph, shown, seed: true, roots, secrets, failure: Failure::Empty, watch }
            }
            Ok(shown) => {
                let graph = Path::new(&shown).file_name().map_or(shown.clone(), |n| n.to_string_lossy().into_owned());
                let failure = if watch { Failure::Empty } else { Failure::End };
                Self { folder, graph, shown, seed: false, roots, secrets, failure, watch }
            }
        }
    }

    /// Whether nothing is served if what is needed for it is not there: `gaia run`.
    pub(super) fn ends_when_it_fails(&self) -> bool {
        self.failure == Failure::End
    }

    /// Reads a component. The seed is flat, and a name cannot lead out of it; on a workstation it may lie anywhere.
    fn component(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        let out_of_it = self.seed && path.strip_prefix("./").unwrap_or(path).contains('/');
        anyhow::ensure!(!out_of_it, "{path}: the seed has no folders; put it beside the graph");
        self.read(path, MAX_COMPONENT).with_context(|| format!("reading {path}"))
    }

    fn read(&self, path: &str, most: u64) -> std::io::Result<Vec<u8>> {
        let follow = if self.seed { OFlags::NOFOLLOW } else { OFlags::empty() };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | follow;
        read_whole(rustix::fs::openat(&self.folder, path, flags, Mode::empty())?, most)
    }

    /// The certificates of all extra roots, in PEM, each file checked by itself.
    fn roots(&self) -> anyhow::Result<String> {
        let mut all = String::new();
        for path in &self.roots {
            let bytes = self.read(path, MAX_ROOTS).with_context(|| format!("reading the root {path}"))?;
            let text = String::from_utf8(bytes).ok().with_context(|| format!("the root {path} is not PEM"))?;
            gaia_egress::roots(&text).with_context(|| format!("the root {path}"))?;
            anyhow::ensure!(!text.trim().is_empty(), "the root {path} is empty");
            all.push_str(&text);
            all.push('\n');
        }
        anyhow::ensure!(all.len() as u64 <= MAX_ROOTS, "the roots have more than {MAX_ROOTS} bytes together");
        Ok(all)
    }

    /// The values of secrets. A file that others can read is refused, so that it does not stay that way.
    fn secrets(&self) -> anyhow::Result<Secrets> {
        let Some(path) = &self.secrets else { return Ok(Secrets::default()) };
        let file = rustix::fs::openat(&self.folder, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let file = file.with_context(|| format!("reading the secrets {path}"))?;
        let others = rustix::fs::fstat(&file)?.st_mode & 0o077;
        anyhow::ensure!(others == 0, "others than its owner may use the secrets {path}: chmod 600 {path}");
        let bytes = read_whole(file, secrets::MAX_BYTES).with_context(|| format!("reading the secrets {path}"))?;
        let text = String::from_utf8(bytes).ok().with_context(|| format!("the secrets {path} are not UTF-8"))?;
        Secrets::parse(&text).map_err(|wrong| anyhow::anyhow!("the secrets {path}: {wrong}"))
    }

    /// What changes when somebody writes to a file or puts another in its place.
    fn stamps(&self, images: &[String]) -> Vec<Option<[i128; 4]>> {
        let stamp = |path: &String| {
            let stat = rustix::fs::statat(&self.folder, path, AtFlags::empty()).ok()?;
            Some([stat.st_ino.into(), stat.st_size.into(), stat.st_mtime.into(), stat.st_mtime_nsec.into()])
        };
        [&self.graph].into_iter().chain(&self.roots).chain(&self.secrets).chain(images).map(stamp).collect()
    }

    /// The files that the graph names, as far as it can be read.
    fn images(&self) -> Vec<String> {
        let text = self.read(&self.graph, gaia_manifest::MAX_BYTES as u64).ok();
        let manifest = text.and_then(|text| gaia_manifest::parse(&String::from_utf8(text).ok()?).ok());
        let images = manifest.into_iter().flat_map(|m| m.branes).map(|brane| brane.image.value);
        images.filter_map(|image| if let Image::File(path) = image { Some(path) } else { None }).collect()
    }
}

/// Starts the graph. If there is none or it does not come up, the appliance starts an empty one, answers 404 to everything
/// and says why on its console.
pub(super) async fn first(control: &Control, source: Option<&Source>, found: &Found) -> anyhow::Result<()> {
    let workers = count(found.workers);
    let mut generation = found.newest + 1;
    let planned = match source {
        Some(source) => planned(control, source, workers, generation).await,
        None => Err(anyhow::anyhow!(NO_GRAPH)),
    };
    let started = match planned {
        Ok(planned) => {
            // Numbers are not used twice, whatever becomes of them.
            generation += 1;
            start(control, planned).await
        }
        Err(e) => Err(e),
    };
    let Err(e) = started else { return Ok(()) };
    let words = format!("{e:#}");
    control.say(&words).await;
    control.words.borrow_mut().push(words);
    if source.is_some_and(|source| source.failure == Failure::End) {
        control.init.tell(&FromControl::PowerOff, &[]).await;
        return Ok(());
    }
    let plan = Plan { generation, workers, branes: Vec::new(), roots: String::new() };
    start(control, Planned { plan, keepers: Vec::new(), artefacts: Vec::new() }).await
}

/// What the files were like when they were last looked at.
pub(super) struct Seen {
    images: Vec<String>,
    stamps: Vec<Option<[i128; 4]>>,
}

impl Seen {
    pub(super) fn now(source: &Source) -> Self {
        let images = source.images();
        Self { stamps: source.stamps(&images), images }
    }
}

/// Deploys the graph again whenever it or one of its components changes, for ever.
pub(super) async fn watch(control: &Control, source: &Source, mut seen: Seen, found: &Found) {
    let workers = count(found.workers);
    let newest = control.plan.borrow().as_ref().map_or(found.newest, |p| p.generation);
    let mut generation = newest.max(found.newest) + 1;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let mut now = source.stamps(&seen.images);
        if now == seen.stamps {
            continue;
        }
        loop {
            tokio::time::sleep(STILL_FOR).await;
            let again = source.stamps(&seen.images);
            if std::mem::replace(&mut now, again) == now {
                break;
            }
        }
        // From before the reading: what changes meanwhile is seen next time.
        seen = Seen::now(source);
        let serving = control.plan.borrow().clone();
        let outcome = match planned(control, source, workers, generation).await {
            Ok(Planned { plan, .. }) if serving.is_some_and(|s| s.branes == plan.branes && s.roots == plan.roots) => {
                control.say(&format!("{}: nothing has changed", source.shown)).await;
                continue;
            }
            Ok(planned) => {
                generation += 1;
                start(control, planned).await
            }
            Err(e) => Err(e),
        };
        if let Err(e) = outcome {
            control.say(&format!("{e:#}")).await;
        }
    }
}

fn count(workers: usize) -> u32 {
    u32::try_from(workers).unwrap_or(u32::MAX).max(1)
}

/// Hands the generation's files to init and has it started.
async fn start(control: &Control, planned: Planned) -> anyhow::Result<()> {
    let Planned { plan, keepers, artefacts } = planned;
    let generation = plan.generation;
    let ended = control.plan.borrow().as_ref().map(|serving| ended_states(serving, &plan));
    for line in ended.into_iter().flatten() {
        control.say(&format!("generation {generation} {line}")).await;
    }
    let file = sealed(plan::FILE, &serde_json::to_vec(&plan)?)?;
    control.init.tell(&FromControl::File { generation, name: plan::FILE.into() }, &[file.as_fd()]).await;
    let origins = sealed(artefact::ORIGINS, &artefact::origins(&artefacts)?)?;
    control.init.tell(&FromControl::File { generation, name: artefact::ORIGINS.into() }, &[origins.as_fd()]).await;
    for artefact in &artefacts {
        let name = artefact.name();
        control.init.tell(&FromControl::File { generation, name }, &[artefact.file.as_fd()]).await;
    }
    for Keepers { replicas, identity, plan } in keepers {
        let Some(brane) = plan.branes.first() else { continue };
        let artefact = artefacts.iter().find(|artefact| artefact.name() == brane.artefact);
        let artefact = artefact.with_context(|| format!("{}: there is no artefact of it", brane.name))?;
        let (name, file) = (brane.name.clone(), sealed(plan::FILE, &serde_json::to_vec(&plan)?)?);
        let keepers = FromControl::Keepers { generation, name, replicas, identity };
        control.init.tell(&keepers, &[file.as_fd(), artefact.file.as_fd()]).await;
    }
    let plan = Rc::new(plan);
    // Before its workers are there: they may have something to say before they are ready.
    control.plans.borrow_mut().insert(generation, Rc::clone(&plan));
    control.init.start(generation).await.with_context(|| format!("generation {generation}"))?;
    // What is not needed any more need not be kept to compile it less often.
    let needed = |(digest, reservation): &(String, u64)| {
        plan.branes.iter().any(|brane| brane.digest == *digest && brane.reservation == *reservation)
    };
    control.compiled.borrow_mut().retain(|of, _| needed(of));
    *control.plan.borrow_mut() = Some(plan);
    control.forget_plans();
    Ok(())
}

/// A generation that could be started.
struct Planned {
    plan: Plan,
    keepers: Vec<Keepers>,
    artefacts: Vec<Artefact>,
}

/// What the keepers of one pinned brane are told.
struct Keepers {
    replicas: u32,
    identity: String,
    plan: Plan,
}

impl Keepers {
    /// Those of this brane. Whatever makes it what it is goes into its identity: not how its requests come to it, and not
    /// how many there are.
    fn of(key: &Key, brane: &plan::Brane, workers: u32, roots: &str) -> anyhow::Result<Self> {
        let sends = brane.grants.iter().any(|grant| matches!(grant, Capability::Http(_)));
        let alone = plan::Brane { image: String::new(), host: None, path: "/".into(), replicas: 1, ..brane.clone() };
        let plan = Plan {
            generation: 0,
            workers: 0,
            branes: vec![alone],
            roots: if sends { roots.to_owned() } else { String::new() },
        };
        let identity = key.word(&serde_json::to_vec(&plan)?);
        Ok(Self { replicas: brane.replicas, identity, plan: Plan { workers, ..plan } })
    }
}

/// What a generation in the place of another ends: the states of pinned instances, and why.
fn ended_states(serving: &Plan, next: &Plan) -> Vec<String> {
    let ended = |before: &plan::Brane| {
        let identity = before.keeper.as_ref()?;
        let (first, why) = match next.branes.iter().find(|brane| brane.name == before.name) {
            None => (1, "it is not there any more"),
            Some(after) => match &after.keeper {
                None => (1, "it is not pinned any more"),
                Some(same) if same == identity => (after.replicas + 1, "there are fewer replicas"),
                Some(_) if after.digest != before.digest => (1, "its image changes"),
                Some(_) if after.grants != before.grants => (1, "its grants change"),
                Some(_) if limits(after) != limits(before) => (1, "its limits change"),
                Some(_) => (1, "its secrets or the roots change"),
            },
        };
        let name = &before.name;
        match (first, before.replicas) {
            (first, last) if first > last => None,
            (first, last) if first == last => Some(format!("ends the state of {name}.{first:03}: {why}")),
            (first, last) => Some(format!("ends the states of {name}.{first:03} to {name}.{last:03}: {why}")),
        }
    };
    serving.branes.iter().filter_map(ended).collect()
}

fn limits(brane: &plan::Brane) -> (u64, Option<f64>, Duration, u64) {
    (brane.mem_max, brane.cpu_quota, brane.deadline, brane.body_max)
}

async fn planned(control: &Control, source: &Source, workers: u32, generation: u32) -> anyhow::Result<Planned> {
    let name = source.shown.as_str();
    let text = match source.read(&source.graph, gaia_manifest::MAX_BYTES as u64) {
        Err(e) if e.kind() == ErrorKind::NotFound && source.seed => anyhow::bail!(NO_GRAPH),
        other => other.with_context(|| format!("reading {name}"))?,
    };
    let text = String::from_utf8(text).with_context(|| format!("{name} is not UTF-8"))?;
    let manifest = gaia_manifest::parse(&text).map_err(|wrong| refused(name, &text, &wrong))?;
    let mut said = review::unsupported(&manifest);
    let (compiled, failed) = compile_all(control, source, &manifest, workers).await;
    said.extend(failed);
    let secrets = source.secrets()?;
    let (mut branes, mut pinned) = (Vec::new(), Vec::new());
    for brane in &manifest.branes {
        let of = (brane.image.value.to_string(), reservation(brane, workers));
        let Some(compiled) = compiled.get(&of) else { continue };
        said.extend(review::of(brane, &compiled.report));
        let (found, missing) = secrets_of(brane, &secrets);
        said.extend(missing);
        let planned = compiled.report.needs.map(|needs| planned_brane(brane, compiled, needs, found));
        pinned.extend(planned.is_some().then_some(brane.lifecycle == Lifecycle::Pinned));
        branes.extend(planned);
    }
    let here = branes.iter().zip(&pinned).filter(|(_, pinned)| !**pinned).map(|(brane, _)| brane);
    let reserved: u64 = here.map(|b| b.address_space(workers)).sum();
    if reserved > engine::ADDRESS_SPACE {
        let (reserved, most) = (reserved >> 30, engine::ADDRESS_SPACE >> 30);
        let message =
            format!("the instances of a worker reserve {reserved} GiB of its address space, which has {most}");
        said.push(Diagnostic::error(0..0, message, "all of it together").help("fewer replicas"));
    }
    said.sort_by_key(|d| d.span.start);
    if said.iter().any(|d| d.severity == Severity::Error) {
        return Err(refused(name, &text, &said));
    }
    for warning in &said {
        control.say(&warning.render(name, &text, false)).await;
        control.words.borrow_mut().push(warning.message.clone());
    }
    let mut artefacts: Vec<_> = compiled.into_values().collect();
    artefacts.sort_by_key(Artefact::name);
    artefacts.dedup_by_key(|artefact| artefact.name());
    let sends = |brane: &plan::Brane| brane.grants.iter().any(|grant| matches!(grant, Capability::Http(_)));
    let roots = if branes.iter().any(sends) { source.roots()? } else { String::new() };
    let mut keepers = Vec::new();
    for (brane, _) in branes.iter_mut().zip(pinned).filter(|(_, pinned)| *pinned) {
        let of_it = Keepers::of(&control.key, brane, workers, &roots)?;
        // Workers pass its requests on, and need nothing of what it may do.
        brane.secrets.clear();
        brane.keeper = Some(of_it.identity.clone());
        keepers.push(of_it);
    }
    Ok(Planned { plan: Plan { generation, workers, branes, roots }, keepers, artefacts })
}

/// The values of the secrets that a brane's `env` names, and what is to be said about those without one.
fn secrets_of(brane: &Brane, known: &Secrets) -> (Vec<(String, Secret)>, Vec<Diagnostic>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for grant in &brane.capabilities {
        let Capability::Env { secrets, .. } = &grant.capability else { continue };
        for name in secrets {
            match known.of(&brane.name.value, name) {
                Some(secret) => found.push((name.clone(), secret.clone())),
                None => {
                    let message = format!("{} needs a value for the secret \"{name}\"", brane.name.value);
                    let help = format!("gaia run --secrets FILE, and in it [{}] with {name} = \"…\"", brane.name.value);
                    missing.push(Diagnostic::error(grant.span.clone(), message, "has no value").help(help));
                }
            }
        }
    }
    (found, missing)
}

fn planned_brane(
    brane: &Brane,
    compiled: &Artefact,
    needs: plan::Needs,
    secrets: Vec<(String, Secret)>,
) -> plan::Brane {
    plan::Brane {
        name: brane.name.value.clone(),
        image: brane.image.value.to_string(),
        digest: compiled.digest.clone(),
        artefact: compiled.name(),
        reservation: compiled.reservation,
        needs,
        host: brane.ingress.host.as_ref().map(ToString::to_string),
        path: brane.ingress.path.clone(),
        secrets,
        grants: brane.capabilities.iter().map(|grant| grant.capability.clone()).collect(),
        lifecycle: brane.lifecycle,
        replicas: brane.replicas,
        keeper: None,
        mem_max: brane.limits.mem_max.value,
        cpu_quota: brane.limits.cpu_quota.as_ref().map(|quota| quota.value),
        deadline: brane.limits.deadline,
        body_max: brane.limits.body_max,
    }
}

/// All that is to be said about a graph that is refused.
fn refused(name: &str, source: &str, said: &[Diagnostic]) -> anyhow::Error {
    let errors = said.iter().filter(|d| d.severity == Severity::Error).count();
    let mut words = format!("{name}: {errors} error{}, nothing is changed", if errors == 1 { "" } else { "s" });
    for diagnostic in said {
        let _ = write!(words, "\n{}", diagnostic.render(name, source, false));
    }
    anyhow::anyhow!(words)
}

/// What is reserved for each memory of a brane, in bytes. A pinned one has a process for each instance.
fn reservation(brane: &Brane, workers: u32) -> u64 {
    if brane.lifecycle == Lifecycle::Pinned {
        return engine::WHOLE;
    }
    engine::reservation(plan::slots(brane.replicas, workers), brane.limits.mem_max.value)
}

/// Compiles each image once for each reservation. Returns what became of them, and what went wrong with the others.
async fn compile_all(
    control: &Control,
    source: &Source,
    manifest: &Manifest,
    workers: u32,
) -> (HashMap<(String, u64), Artefact>, Vec<Diagnostic>) {
    let files = manifest.branes.iter().filter_map(|brane| match &brane.image.value {
        Image::File(path) => Some(((path.as_str(), reservation(brane, workers)), brane)),
        Image::Name { .. } => None,
    });
    let files: BTreeMap<(&str, u64), &Brane> = files.collect();
    let mut all = HashMap::with_capacity(files.len());
    let mut wrong = Vec::new();
    let mut working = futures_util::stream::iter(files)
        .map(async |((path, of), brane)| (of, brane, compiled_file(control, source, path, of).await))
        .buffer_unordered(MAX_COMPILERS);
    while let Some((of, brane, outcome)) = working.next().await {
        match outcome {
            Ok(compiled) => drop(all.insert((brane.image.value.to_string(), of), compiled)),
            Err(e) => wrong.push(Diagnostic::error(brane.image.span.clone(), format!("{e:#}"), "this image")),
        }
    }
    (all, wrong)
}

async fn compiled_file(control: &Control, source: &Source, path: &str, reservation: u64) -> anyhow::Result<Artefact> {
    let bytes = source.component(path)?;
    compiled(control, &bytes, reservation).await.with_context(|| format!("compiling {path}"))
}

async fn compiled(control: &Control, component: &[u8], reservation: u64) -> anyhow::Result<Artefact> {
    let digest = Sha256::digest(component).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let of = (digest, reservation);
    if let Some(artefact) = control.compiled.borrow().get(&of) {
        return Ok(artefact.try_clone()?);
    }
    let compiler = Channel::new(control.init.compiler(control.ticket()).await?)?;
    let file = sealed("component", component)?;
    compiler.send(&Word::Compile { reservation }, &[file.as_fd()]).await?;
    let (Word::Done, files) = compiler.receive::<Word>().await.context("the compiler ended without an answer")? else {
        anyhow::bail!("the compiler did not answer");
    };
    let mut files = files.into_iter();
    let report = read_whole(files.next().context("the compiler sent no report")?, MAX_REPORT)?;
    let report: Report = serde_json::from_slice(&report).context("the compiler's report")?;
    if let Some(error) = &report.error {
        anyhow::bail!("{error}");
    }
    let file = files.next().context("the compiler sent no artefact")?;
    let artefact = control.key.vouch(&of.0, reservation, report, file).context("the compiler sent an artefact that")?;
    control.compiled.borrow_mut().insert(of, artefact.try_clone()?);
    Ok(artefact)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaia_manifest::Resolution;

    fn key() -> Key {
        use rustix::fs::MemfdFlags;
        Key::of(rustix::fs::memfd_create("key", MemfdFlags::ALLOW_SEALING).unwrap()).unwrap()
    }

    fn counter() -> plan::Brane {
        plan::Brane {
            name: "counter".into(),
            image: "file:./counter.wasm".into(),
            digest: "d1".into(),
            artefact: "artefact-d1".into(),
            reservation: engine::WHOLE,
            needs: plan::Needs { memories: 1, initial_memory: 1 << 17, tables: 1, table_elements: 1 },
            host: None,
            path: "/counter".into(),
            grants: vec![Capability::Random],
            secrets: vec![("KEY".into(), serde_json::from_str("\"a\"").unwrap())],
            lifecycle: Lifecycle::Pinned,
            replicas: 2,
            keeper: None,
            mem_max: 1 << 20,
            cpu_quota: None,
            deadline: Duration::from_secs(1),
            body_max: 1,
        }
    }

    /// As control plans it.
    fn planned(key: &Key, mut brane: plan::Brane, roots: &str) -> Plan {
        brane.keeper = Some(Keepers::of(key, &brane, 2, roots).unwrap().identity);
        brane.secrets.clear();
        Plan { generation: 1, workers: 2, branes: vec![brane], roots: String::new() }
    }

    type Change = fn(&mut plan::Brane);

    #[test]
    fn what_a_brane_is_ends_its_state_and_how_it_is_reached_does_not() {
        let key = key();
        let before = planned(&key, counter(), "");
        let ended = |change: Change| {
            let mut brane = counter();
            change(&mut brane);
            ended_states(&before, &planned(&key, brane, ""))
        };
        let same: [Change; 5] = [
            |_| {},
            |b| b.path = "/other".into(),
            |b| b.host = Some("a.example".into()),
            |b| b.image = "file:./copy.wasm".into(),
            |b| b.replicas = 3,
        ];
        for (n, change) in same.into_iter().enumerate() {
            assert_eq!(ended(change), [] as [&str; 0], "{n}");
        }
        let all: [(Change, &str); 10] = [
            (|b| b.digest = "d2".into(), "its image changes"),
            (|b| b.grants.push(Capability::Clock(Resolution::Seconds)), "its grants change"),
            (|b| b.grants.clear(), "its grants change"),
            (|b| b.mem_max += 1, "its limits change"),
            (|b| b.cpu_quota = Some(0.5), "its limits change"),
            (|b| b.deadline *= 2, "its limits change"),
            (|b| b.body_max += 1, "its limits change"),
            (|b| b.secrets.clear(), "its secrets or the roots change"),
            (|b| b.secrets[0].1 = serde_json::from_str("\"b\"").unwrap(), "its secrets or the roots change"),
            (|b| b.name = "other".into(), "it is not there any more"),
        ];
        for (change, why) in all {
            assert_eq!(ended(change), [format!("ends the states of counter.001 to counter.002: {why}")]);
        }
        assert_eq!(ended(|b| b.replicas = 1), ["ends the state of counter.002: there are fewer replicas"]);
        let mut pooled = planned(&key, counter(), "");
        pooled.branes[0].keeper = None;
        let why = "ends the states of counter.001 to counter.002: it is not pinned any more";
        assert_eq!(ended_states(&before, &pooled), [why]);
        assert_eq!(ended_states(&pooled, &before), [] as [&str; 0]);
    }

    #[test]
    fn roots_are_part_of_what_sends_requests_and_an_identity_tells_nobody_the_secret() {
        let key = key();
        let of = |brane: &plan::Brane, roots| Keepers::of(&key, brane, 2, roots).unwrap();
        assert_eq!(of(&counter(), "").identity, of(&counter(), "root").identity);
        let sends = plan::Brane { grants: vec![Capability::Http(Vec::new())], ..counter() };
        assert_ne!(of(&sends, "").identity, of(&sends, "root").identity);
        let told = of(&sends, "root");
        assert_eq!((told.plan.roots.as_str(), told.plan.branes[0].replicas), ("root", 1));
        assert_eq!(told.plan.branes[0].secrets, sends.secrets);
        assert_ne!(told.identity, Keepers::of(&self::key(), &sends, 2, "root").unwrap().identity, "another appliance");
    }
}
