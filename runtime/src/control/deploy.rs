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
use bytes::Bytes;
use futures_util::StreamExt as _;
use gaia_init::supervise::MAX_COMPILERS;
use gaia_init::wire::FromControl;
use gaia_manifest::{Brane, Capability, Diagnostic, Image, Lifecycle, Manifest, Severity};
use gaia_store::{Digest, Graph};
use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use super::Control;
use super::artefact::{self, Artefact, Key};
use super::delivery::Tell;
use super::pull::{self, Behind, Reach};
use super::stamp::Stamp;
use super::vault::Vault;
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
/// The same while one of them is empty: it is most often because what is to be written there has not come yet.
const EMPTY_FOR: Duration = Duration::from_secs(1);

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
    pub(super) fn roots(&self) -> anyhow::Result<String> {
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
    pub(super) fn secrets(&self) -> anyhow::Result<Secrets> {
        let Some(path) = &self.secrets else { return Ok(Secrets::default()) };
        let file = rustix::fs::openat(&self.folder, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let file = file.with_context(|| format!("reading the secrets {path}"))?;
        let others = rustix::fs::fstat(&file)?.st_mode & 0o077;
        anyhow::ensure!(others == 0, "others than its owner may use the secrets {path}: chmod 600 {path}");
        let bytes = read_whole(file, secrets::MAX_BYTES).with_context(|| format!("reading the secrets {path}"))?;
        let text = String::from_utf8(bytes).ok().with_context(|| format!("the secrets {path} are not UTF-8"))?;
        Secrets::parse(&text).map_err(|wrong| anyhow::anyhow!("the secrets {path}: {wrong}"))
    }

    /// What the files are like.
    fn stamps(&self, images: &[String]) -> Vec<Option<Stamp>> {
        let all = [&self.graph].into_iter().chain(&self.roots).chain(&self.secrets).chain(images);
        all.map(|path| Stamp::of(&self.folder, path)).collect()
    }

    /// The files that the graph names, as far as it can be read.
    fn images(&self) -> Vec<String> {
        let text = self.read(&self.graph, gaia_manifest::MAX_BYTES as u64).ok();
        let manifest = text.and_then(|text| gaia_manifest::parse(&String::from_utf8(text).ok()?).ok());
        let images = manifest.into_iter().flat_map(|m| m.branes).map(|brane| brane.image.value);
        images.filter_map(|image| if let Image::File(path) = image { Some(path) } else { None }).collect()
    }
}

/// Starts the graph: the one that was deployed last, or the one before it if that does not come up, or the source's. If there
/// is none or it does not come up either, the appliance starts an empty one, answers 404 to everything and says why on its console.
pub(super) async fn first(control: &Rc<Control>) -> anyhow::Result<()> {
    let source = control.source.as_ref();
    let stored = control.vault.as_ref().map(Vault::store);
    let stored = stored.map(|store| [store.current(), store.previous_of_current()]).into_iter().flatten().flatten();
    let (mut any, mut behind) = (false, None);
    for graph in stored {
        any = true;
        match again(control, &graph).await {
            Ok(()) => {
                pull::catch_up(control, behind);
                return Ok(());
            }
            Err(e) => words(control, format!("graph {}: {e:#}", graph.number)).await,
        }
        behind = behind.or_else(|| Behind::of(control, &graph));
    }
    if !any {
        let started = match source {
            Some(source) => of_source(control, source).await,
            None => Err(anyhow::anyhow!(NO_GRAPH)),
        };
        let Err(e) = started else { return Ok(()) };
        words(control, format!("{e:#}")).await;
        if source.is_some_and(|source| source.failure == Failure::End) {
            control.init.tell(&FromControl::PowerOff, &[]).await;
            return Ok(());
        }
        let text =
            source.filter(|source| source.seed).and_then(|source| Asked::of(source).ok()).map(|asked| asked.text);
        behind = text.and_then(|text| Behind::of_seed(control, &text));
    }
    let plan = Plan { workers: control.workers_asked(), ..Plan::default() };
    start(control, Planned { plan, ..Planned::default() }).await?;
    pull::catch_up(control, behind);
    Ok(())
}

/// Says what went wrong, and keeps it for the status.
async fn words(control: &Control, words: String) {
    control.say(&words).await;
    control.words.borrow_mut().push(words);
}

/// Starts a graph of the store's history as it was, with what is there.
async fn again(control: &Control, graph: &Graph) -> anyhow::Result<()> {
    let planned = planned(control, &Asked { reach: Reach::Nobody, ..Asked::again(graph) }).await?;
    planned.warn(control).await;
    start(control, planned).await
}

async fn of_source(control: &Control, source: &Source) -> anyhow::Result<()> {
    // The appliance does not wait for a network; whoever runs a graph here does.
    let reach = if source.seed { Reach::Nobody } else { Reach::Lacking };
    let planned = planned(control, &Asked { reach, ..Asked::of(source)? }).await?;
    planned.warn(control).await;
    start(control, planned).await
}

/// What the source's graph would serve, with what it lacks.
///
/// # Errors
/// As [`planned`].
pub(super) async fn planned_of_source(control: &Control) -> anyhow::Result<Planned> {
    planned(control, &Asked::of(control.source.as_ref().context(NO_GRAPH)?)?).await
}

/// The certificates of an authority that a registry's operator names. Beside the graph on the appliance.
///
/// # Errors
/// If they cannot be read.
pub(super) fn root(control: &Control, path: &str) -> anyhow::Result<String> {
    let bytes = match &control.source {
        Some(source) => source.read(path, MAX_ROOTS)?,
        None => read_whole(std::fs::File::open(path)?.into(), MAX_ROOTS)?,
    };
    String::from_utf8(bytes).ok().context("it is not PEM")
}

/// What the files were like when they were last looked at.
pub(super) struct Seen {
    images: Vec<String>,
    stamps: Vec<Option<Stamp>>,
}

impl Seen {
    pub(super) fn now(source: &Source) -> Self {
        let images = source.images();
        Self { stamps: source.stamps(&images), images }
    }
}

/// Deploys the graph again whenever it or one of its components changes, for ever.
pub(super) async fn watch(control: &Control, source: &Source, mut seen: Seen) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let mut now = source.stamps(&seen.images);
        if now == seen.stamps {
            continue;
        }
        loop {
            let one_is_empty = now.iter().flatten().any(|stamp| stamp.is_empty());
            tokio::time::sleep(if one_is_empty { EMPTY_FOR } else { STILL_FOR }).await;
            let again = source.stamps(&seen.images);
            if std::mem::replace(&mut now, again) == now {
                break;
            }
        }
        // From before the reading: what changes meanwhile is seen next time.
        seen = Seen::now(source);
        let outcome = async {
            let planned = planned(control, &Asked::of(source)?).await?;
            planned.warn(control).await;
            if planned.changes_nothing(control) {
                control.say(&format!("{}: nothing has changed", source.shown)).await;
                return Ok(());
            }
            start(control, planned).await
        };
        if let Err(e) = outcome.await {
            control.say(&format!("{e:#}")).await;
        }
    }
}

/// Hands the generation's files to init and has it started, under a number that no other had, whatever becomes of it.
pub(super) async fn start(control: &Control, planned: Planned) -> anyhow::Result<()> {
    let Planned { mut plan, keepers, artefacts, .. } = planned;
    let generation = control.newest.get() + 1;
    control.newest.set(generation);
    plan.generation = generation;
    let ended = control.plan.borrow().as_ref().map(|serving| ended_states(serving, &plan));
    for line in ended.into_iter().flatten() {
        control.say(&format!("generation {generation} {line}")).await;
    }
    let file = told(&plan)?;
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
        let (name, file) = (brane.name.clone(), told(&plan)?);
        let keepers = FromControl::Keepers { generation, name, replicas, identity };
        control.init.tell(&keepers, &[file.as_fd(), artefact.file.as_fd()]).await;
    }
    let plan = Rc::new(plan);
    // Before its workers are there: they may have something to say before they are ready.
    control.plans.borrow_mut().insert(generation, Rc::clone(&plan));
    control.init.start(generation).await.with_context(|| format!("generation {generation}"))?;
    // What is not needed any more need not be kept to compile it less often.
    control.compiled.borrow_mut().retain(|of, _| needs(&plan, of));
    control.forget_plans();
    if !plan.branes.is_empty() {
        // From now on it would be untrue in the status.
        control.words.borrow_mut().retain(|words| words != NO_GRAPH);
    }
    Ok(())
}

/// A plan as workers and keepers read it. Secrets are in it: what it is written from is overwritten.
fn told(plan: &Plan) -> anyhow::Result<OwnedFd> {
    let text = Zeroizing::new(serde_json::to_vec(plan)?);
    let (length, most) = (text.len(), plan::MAX_BYTES);
    anyhow::ensure!(
        length as u64 <= most,
        "the plan has {length} bytes, at most {most}: fewer branes or smaller secrets"
    );
    Ok(sealed(plan::FILE, &text)?)
}

/// Whether a generation runs the machine code of this component for this reservation.
fn needs(plan: &Plan, (digest, reservation): &(String, u64)) -> bool {
    plan.branes.iter().any(|brane| brane.digest == *digest && brane.reservation == *reservation)
}

/// A generation that could be started. It has its number when it is.
#[derive(Default)]
pub(super) struct Planned {
    pub(super) plan: Plan,
    keepers: Vec<Keepers>,
    artefacts: Vec<Artefact>,
    /// What was resolved to what, of those images that are in the store.
    pub(super) images: BTreeMap<String, Digest>,
    /// What is to be said about it: as a person reads it, and in one line.
    pub(super) warnings: Vec<(String, String)>,
    /// How many images were compiled for it, and not found.
    pub(super) compiled: usize,
}

impl Planned {
    async fn warn(&self, control: &Control) {
        for (shown, message) in &self.warnings {
            control.say(shown).await;
            control.words.borrow_mut().push(message.clone());
        }
    }

    /// Whether it is what serves already.
    pub(super) fn changes_nothing(&self, control: &Control) -> bool {
        let serving = control.plan.borrow();
        serving.as_ref().is_some_and(|s| s.branes == self.plan.branes && s.roots == self.plan.roots)
    }
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
        let roots = if sends { roots.to_owned() } else { String::new() };
        let plan = Plan { branes: vec![alone], roots, ..Plan::default() };
        let identity = key.word(&serde_json::to_vec(&plan)?);
        Ok(Self { replicas: brane.replicas, identity, plan: Plan { workers, ..plan } })
    }
}

/// What a generation in the place of another ends: the states of pinned instances, and why.
pub(super) fn ended_states(serving: &Plan, next: &Plan) -> Vec<String> {
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

/// A graph that is asked for.
pub(super) struct Asked<'a> {
    /// How its file is called where something is said about it.
    pub(super) shown: &'a str,
    /// The manifest.
    pub(super) text: String,
    /// What its images are, in the store; where there is no such list, files are beside the source's manifest.
    pub(super) images: Option<&'a BTreeMap<String, Digest>>,
    /// A secret without a value is an error. Where nobody is there to be told, the rest serves all the same.
    pub(super) needs_secrets: bool,
    /// For what registries are asked.
    pub(super) reach: Reach,
    /// Who hears how far it is.
    pub(super) tell: Option<&'a Tell>,
}

impl<'a> Asked<'a> {
    /// A graph of the store's history, as it was.
    pub(super) fn again(graph: &'a Graph) -> Self {
        let (text, reach) = (graph.manifest.clone(), Reach::Lacking);
        Self { shown: &graph.file, text, images: Some(&graph.images), needs_secrets: false, reach, tell: None }
    }

    fn of(source: &'a Source) -> anyhow::Result<Self> {
        let name = source.shown.as_str();
        let text = match source.read(&source.graph, gaia_manifest::MAX_BYTES as u64) {
            Err(e) if e.kind() == ErrorKind::NotFound && source.seed => anyhow::bail!(NO_GRAPH),
            other => other.with_context(|| format!("reading {name}"))?,
        };
        let text = String::from_utf8(text).with_context(|| format!("{name} is not UTF-8"))?;
        Ok(Self { shown: name, text, images: None, needs_secrets: true, reach: Reach::Lacking, tell: None })
    }

    /// Tells what is being done: whoever asked, or the console.
    pub(super) async fn doing(&self, control: &Control, words: &str) {
        match self.tell {
            Some(tell) => tell.doing(words),
            None => control.say(words).await,
        }
    }

    /// Tells whoever asked how far it is.
    pub(super) fn told(&self, words: &str) {
        self.tell.into_iter().for_each(|tell| tell.doing(words));
    }
}

/// Where the bytes of an image are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whereabouts {
    /// Beside the source's manifest.
    File(String),
    /// In the store.
    Stored(Digest),
    /// In memory, where there is no store: they were pulled just now.
    Came(Digest, Bytes),
}

/// Why an image is not to be had, and what to do.
#[derive(Debug)]
pub(super) struct Missing {
    message: String,
    help: String,
}

impl Missing {
    pub(super) fn new(message: impl Into<String>, help: &str) -> Self {
        Self { message: message.into(), help: help.to_owned() }
    }

    fn at(self, brane: &Brane) -> Diagnostic {
        let said = Diagnostic::error(brane.image.span.clone(), self.message, "this image");
        if self.help.is_empty() { said } else { said.help(self.help) }
    }
}

async fn find(control: &Control, asked: &Asked<'_>, image: &Image) -> Result<Whereabouts, Missing> {
    let name = image.to_string();
    if let Some(digest) = asked.images.and_then(|images| images.get(&name)) {
        return Ok(Whereabouts::Stored(*digest));
    }
    match image {
        Image::File(path) if asked.images.is_none() => Ok(Whereabouts::File(path.clone())),
        Image::File(_) => {
            Err(Missing::new(format!("\"{name}\" did not come with the manifest"), "gaia deploy sends such files"))
        }
        Image::Name { .. } => pull::found(control, asked, &name).await,
    }
}

/// Says what serves once a graph does: nothing is changed by that.
///
/// # Errors
/// All that is wrong with it, each with its place in the manifest.
pub(super) async fn planned(control: &Control, asked: &Asked<'_>) -> anyhow::Result<Planned> {
    let (name, text, workers) = (asked.shown, asked.text.as_str(), control.workers_asked());
    let manifest = gaia_manifest::parse(text).map_err(|wrong| refused(name, text, &wrong))?;
    let mut said = review::unsupported(&manifest);
    let (compiled, failed, fresh) = compile_all(control, asked, &manifest, workers).await;
    // What serves and what was asked for last are kept at hand, however many are asked for and not started.
    control.compiled.borrow_mut().retain(|of, _| {
        let serves = control.plan.borrow().as_ref().is_some_and(|plan| needs(plan, of));
        serves || compiled.values().any(|artefact| (&artefact.digest, artefact.reservation) == (&of.0, of.1))
    });
    // Components and machine code are verified when they are read.
    control.say_findings().await;
    said.extend(failed);
    let source = control.source.as_ref();
    let named = manifest.branes.iter().flat_map(|brane| {
        let names = brane.capabilities.iter().flat_map(|grant| secret_names(&grant.capability));
        names.map(|name| (brane.name.value.clone(), name.clone()))
    });
    let secrets = super::secrets::values(control, named.collect()).await?;
    let (mut branes, mut pinned, mut images) = (Vec::new(), Vec::new(), BTreeMap::new());
    for brane in &manifest.branes {
        let image = brane.image.value.to_string();
        let of = (image.clone(), reservation(brane, workers));
        let Some(compiled) = compiled.get(&of) else { continue };
        if let Ok(digest) = format!("sha256:{}", compiled.digest).parse() {
            images.insert(image, digest);
        }
        said.extend(review::of(brane, &compiled.report));
        let (found, missing) = secrets_of(brane, &secrets, asked.needs_secrets, control.vault.is_some());
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
        return Err(refused(name, text, &said));
    }
    let warnings = said.iter().map(|warning| (warning.render(name, text, false), warning.message.clone())).collect();
    let mut artefacts: Vec<_> = compiled.into_values().collect();
    artefacts.sort_by_key(Artefact::name);
    artefacts.dedup_by_key(|artefact| artefact.name());
    let sends = |brane: &plan::Brane| brane.grants.iter().any(|grant| matches!(grant, Capability::Http(_)));
    let roots = source.filter(|_| branes.iter().any(sends)).map(Source::roots).transpose()?.unwrap_or_default();
    let mut keepers = Vec::new();
    for (brane, _) in branes.iter_mut().zip(pinned).filter(|(_, pinned)| *pinned) {
        let of_it = Keepers::of(&control.key, brane, workers, &roots)?;
        // Workers pass its requests on, and need nothing of what it may do.
        brane.secrets.clear();
        brane.keeper = Some(of_it.identity.clone());
        keepers.push(of_it);
    }
    let plan = Plan { workers, branes, roots, ..Plan::default() };
    Ok(Planned { plan, keepers, artefacts, images, warnings, compiled: fresh })
}

/// The secrets that a grant names.
fn secret_names(grant: &Capability) -> &[String] {
    if let Capability::Env { secrets, .. } = grant { secrets } else { &[] }
}

/// The values of the secrets that a brane's `env` names, and what is to be said about those without one.
fn secrets_of(brane: &Brane, known: &Secrets, needed: bool, kept: bool) -> (Vec<(String, Secret)>, Vec<Diagnostic>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    let of = &brane.name.value;
    for grant in &brane.capabilities {
        for name in secret_names(&grant.capability) {
            if let Some(secret) = known.of(of, name) {
                found.push((name.clone(), secret.clone()));
                continue;
            }
            let said = if needed {
                Diagnostic::error(
                    grant.span.clone(),
                    format!("{of} needs a value for the secret \"{name}\""),
                    "has no value",
                )
            } else {
                let message = format!("{of} serves without the secret \"{name}\", which has no value");
                Diagnostic::warning(grant.span.clone(), message, "has no value")
            };
            missing.push(said.help(if kept {
                format!("gaia secret set {of} {name}")
            } else {
                format!("gaia run --secrets FILE, and in it [{of}] with {name} = \"…\"; or --data FOLDER and gaia secret set {of} {name}")
            }));
        }
    }
    (found, missing)
}

/// What serves, with other values of secrets: the same components and grants, whatever has become of the manifest's files.
///
/// # Errors
/// If a component is neither in memory nor in the store.
pub(super) async fn with_secrets(control: &Control, serving: &Plan, known: &Secrets) -> anyhow::Result<Planned> {
    let mut plan = serving.clone();
    let (mut keepers, mut artefacts) = (Vec::new(), Vec::new());
    for brane in &mut plan.branes {
        let of: Digest = format!("sha256:{}", brane.digest).parse().ok().context("its component has no digest")?;
        let stored = async || {
            let vault = control.vault.as_ref().context("there is no store")?;
            vault.with(move |store| store.component(&of)).await.map(Bytes::from)
        };
        let (artefact, _) = compiled(control, &brane.digest, brane.reservation, stored)
            .await
            .with_context(|| format!("{}: its component is needed once more", brane.name))?;
        artefacts.push(artefact);
        let names = brane.grants.iter().flat_map(secret_names);
        let given = names.filter_map(|name| Some((name.clone(), known.of(&brane.name, name)?.clone())));
        brane.secrets = given.collect();
        if brane.keeper.take().is_some() {
            let of_it = Keepers::of(&control.key, brane, plan.workers, &plan.roots)?;
            brane.secrets.clear();
            brane.keeper = Some(of_it.identity.clone());
            keepers.push(of_it);
        }
    }
    artefacts.sort_by_key(Artefact::name);
    artefacts.dedup_by_key(|artefact| artefact.name());
    Ok(Planned { plan, keepers, artefacts, ..Planned::default() })
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

/// What became of each image and reservation, what is to be said of the others, and how many were compiled anew.
type Compiled = (HashMap<(String, u64), Artefact>, Vec<Diagnostic>, usize);

/// Has each image once for each reservation, compiled if it is not there already.
async fn compile_all(control: &Control, asked: &Asked<'_>, manifest: &Manifest, workers: u32) -> Compiled {
    // Each image is looked for once, whoever has it.
    let mut images: BTreeMap<String, &Brane> = BTreeMap::new();
    for brane in &manifest.branes {
        images.entry(brane.image.value.to_string()).or_insert(brane);
    }
    let (mut places, mut wrong, mut fresh) = (HashMap::with_capacity(images.len()), Vec::new(), 0);
    let mut looking = futures_util::stream::iter(images)
        .map(async |(image, brane)| (image, brane, find(control, asked, &brane.image.value).await))
        .buffer_unordered(MAX_COMPILERS);
    while let Some((image, brane, place)) = looking.next().await {
        match place {
            Ok(place) => drop(places.insert(image, place)),
            Err(missing) => wrong.push(missing.at(brane)),
        }
    }
    drop(looking);
    let all = manifest.branes.iter().map(|b| ((b.image.value.to_string(), reservation(b, workers)), b));
    let all: BTreeMap<(String, u64), &Brane> = all.filter(|((image, _), _)| places.contains_key(image)).collect();
    let mut compiled = HashMap::with_capacity(all.len());
    let (images, mut done) = (all.len(), 0);
    let mut working = futures_util::stream::iter(all)
        .map(async |((image, reservation), brane)| {
            let place = places.get(&image).cloned();
            let outcome = artefact_of(control, asked, &brane.image.value, place, reservation).await;
            ((image, reservation), brane, outcome)
        })
        .buffer_unordered(MAX_COMPILERS);
    while let Some((of, brane, outcome)) = working.next().await {
        done += 1;
        asked.told(&format!("compiling: {done} of {images} components are ready"));
        match outcome {
            Ok((artefact, is_fresh)) => {
                fresh += usize::from(is_fresh);
                compiled.insert(of, artefact);
            }
            Err(e) => wrong.push(Diagnostic::error(brane.image.span.clone(), format!("{e:#}"), "this image")),
        }
    }
    drop(working);
    (compiled, wrong, fresh)
}

/// An image's artefact, and whether it was compiled anew.
async fn artefact_of(
    control: &Control,
    asked: &Asked<'_>,
    image: &Image,
    place: Option<Whereabouts>,
    reservation: u64,
) -> anyhow::Result<(Artefact, bool)> {
    match place.context("it was not found")? {
        Whereabouts::File(path) => {
            let source = control.source.as_ref().context("there is no folder to read files from")?;
            let bytes = source.component(&path)?;
            let digest = Digest::of(&bytes).hex();
            let compiled = compiled(control, &digest, reservation, async || Ok(bytes.into()));
            compiled.await.with_context(|| format!("compiling {path}"))
        }
        Whereabouts::Came(digest, bytes) => {
            let (digest, bytes) = (digest.hex(), async || Ok(bytes));
            compiled(control, &digest, reservation, bytes).await.with_context(|| format!("compiling {image}"))
        }
        Whereabouts::Stored(digest) => {
            let read = async || {
                let vault = control.vault.as_ref().context("there is no store")?;
                match vault.with(move |store| store.component(&digest)).await {
                    Err(lost) if asked.reach != Reach::Nobody && pull::is_lost(&lost) => {
                        pull::again(control, asked, image, digest).await.map_err(|e| e.context(lost))
                    }
                    read => read.map(Bytes::from),
                }
            };
            compiled(control, &digest.hex(), reservation, read).await.with_context(|| format!("compiling {image}"))
        }
    }
}

/// Machine code of a component for a reservation, and whether it was compiled anew: what serves, what the store has, or what a
/// compiler makes of its bytes.
async fn compiled(
    control: &Control,
    digest: &str,
    reservation: u64,
    component: impl AsyncFnOnce() -> anyhow::Result<Bytes>,
) -> anyhow::Result<(Artefact, bool)> {
    let of = (digest.to_owned(), reservation);
    if let Some(artefact) = control.compiled.borrow().get(&of) {
        return Ok((artefact.try_clone()?, false));
    }
    if let Some(vault) = &control.vault
        && let Some(artefact) = vault.artefact(&control.key, digest, reservation).await
    {
        control.compiled.borrow_mut().insert(of, artefact.try_clone()?);
        return Ok((artefact, false));
    }
    let component = component().await?;
    let compiler = Channel::new(control.init.compiler(control.ticket()).await?)?;
    let file = sealed("component", &component)?;
    drop(component);
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
    if let Some(vault) = &control.vault
        && let Err(e) = vault.keep_artefact(&artefact).await
    {
        control.say(&format!("machine code is not kept, and will be made again after a restart: {e:#}")).await;
    }
    control.compiled.borrow_mut().insert(of, artefact.try_clone()?);
    Ok((artefact, true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaia_manifest::Resolution;

    fn key() -> Key {
        Key::from_bytes(&Key::chance().unwrap())
    }

    fn counter() -> plan::Brane {
        plan::Brane {
            name: "counter".into(),
            image: "file:./counter.wasm".into(),
            digest: "d1".into(),
            artefact: "artefact-d1".into(),
            reservation: engine::WHOLE,
            needs: plan::Needs {
                memories: 1,
                initial_memory: 1 << 17,
                data_end: 70_000,
                tables: 1,
                table_elements: 1,
                longest_name: 9,
            },
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
        Plan { generation: 1, workers: 2, branes: vec![brane], ..Plan::default() }
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
