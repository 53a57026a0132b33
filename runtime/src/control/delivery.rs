//! What operators bring: components into the store, graphs to serve, the way back.
//!
//! ```text
//! push     bytes ─▶ store, durable ─▶ name
//! deploy   manifest ─▶ planned ─▶ shown and agreed to ─▶ history, durable ─▶ a generation that serves ─▶ current, durable ─▶ answer
//! ```
//!
//! One change at a time. Until the generation serves, the old one does, and nothing has changed; when power fails or control ends in
//! between, it is the old graph or the new one. What has been answered is on the disk. Whoever asked may go away: a change goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::StreamExt as _;

use gaia_store::{Digest, Graph, NewGraph, Reference};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Either, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::api::{Answer, Outcome, failed, json};
use super::caller::Caller;
use super::deploy::{self, Asked, Planned};
use super::pull::Reach;
use super::report::{Deploy, Deployed, Done, GraphEntry, Graphs, PlanReport, Pushed, Reason, Rollback, Step};
use super::vault::Vault;
use super::{Control, change};
use crate::plan;

/// The longest request for a deploy, in bytes: a manifest, each byte of which JSON may write in two, and images.
const MAX_DEPLOY: usize = 4 << 20;
/// How long the next piece of a body may take.
const PIECE_WITHIN: Duration = Duration::from_secs(30);
/// What is gathered before the disk is asked to take it, in bytes.
const PIECE: usize = 1 << 20;
/// Generations that may be there at a time, the one that serves among them: the others finish what is inside.
const GENERATIONS: usize = 6;
/// How long a deploy waits for one of them to end.
const ROOM_WITHIN: Duration = Duration::from_mins(1);
/// For how long after it a deploy is taken back by itself if its workers keep dying, and how many deaths that is.
const TRIAL: Duration = Duration::from_mins(1);
const DEATHS: u32 = 3;
/// What is said where there is no store.
pub(super) const NO_STORE: &str = "there is no data disk to keep anything on, so nothing can be pushed or deployed";

/// What was deployed last, while it may still have to be taken back.
pub(super) struct Trial {
    graph: u64,
    generation: u32,
    since: Instant,
    deaths: u32,
}

impl Trial {
    /// The same graph serves as another generation.
    pub(super) fn goes_on_as(&mut self, generation: u32) {
        self.generation = generation;
    }
}

// Components.

/// `POST /v1/components?name=REFERENCE&digest=sha256:…`: takes a component.
pub(super) async fn push(control: &Control, caller: &Caller, request: Request<Incoming>) -> Answer {
    let Some(vault) = &control.vault else { return failed(StatusCode::CONFLICT, NO_STORE) };
    let (mut name, mut expected) = (None, None);
    for part in request.uri().query().unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
        let understood = match part.split_once('=') {
            Some(("name", text)) => {
                text.parse::<Reference>().map(|parsed| name = Some(parsed)).map_err(|e| e.to_string())
            }
            Some(("digest", text)) => {
                text.parse::<Digest>().map(|parsed| expected = Some(parsed)).map_err(|e| e.to_string())
            }
            _ => Err("name=REFERENCE or digest=sha256:… is known".to_owned()),
        };
        if let Err(why) = understood {
            return failed(StatusCode::BAD_REQUEST, &format!("{part:?}: {why}"));
        }
    }
    match take(vault, request.into_body(), expected, name.map(|name| name.as_str().to_owned())).await {
        Err(e) => failed(StatusCode::UNPROCESSABLE_ENTITY, &format!("{e:#}")),
        Ok(pushed) => {
            let named = pushed.name.as_ref().map(|name| format!(" as {name}")).unwrap_or_default();
            let words = format!("{}, {} bytes{named}", pushed.digest, pushed.bytes);
            control.note(&format!("{caller}: pushed {words}"));
            let mut answer = json(StatusCode::OK, &pushed);
            answer.extensions_mut().insert(Outcome(words));
            answer
        }
    }
}

async fn take(
    vault: &Vault,
    mut body: Incoming,
    expected: Option<Digest>,
    name: Option<String>,
) -> anyhow::Result<Pushed> {
    let mut upload = vault.with(gaia_store::Store::upload).await?;
    let mut gathered = Vec::new();
    loop {
        let frame = tokio::time::timeout(PIECE_WITHIN, body.frame());
        let frame = frame.await.ok().with_context(|| format!("nothing came for {PIECE_WITHIN:?}"))?;
        let over = frame.is_none();
        if let Some(data) = frame.transpose()?.and_then(|frame| frame.into_data().ok()) {
            gathered.extend_from_slice(&data);
        }
        if gathered.len() >= PIECE || (over && !gathered.is_empty()) {
            let piece = std::mem::take(&mut gathered);
            upload = vault.with(move |_| upload.append(&piece).map(|()| upload)).await?;
        }
        if over {
            break;
        }
    }
    let bytes = upload.bytes();
    anyhow::ensure!(bytes > 0, "a component has some bytes, and none came");
    let digest = vault.with(move |_| upload.finish(expected)).await?;
    vault.came(digest);
    if let Some(name) = name.clone() {
        vault.with(move |store| store.set_name(&name, digest)).await?;
    }
    Ok(Pushed { digest, bytes, name })
}

/// `GET /v1/components/sha256:…`: whether a component is in the store.
pub(super) fn has(control: &Control, digest: &str) -> Answer {
    let Some(vault) = &control.vault else { return failed(StatusCode::CONFLICT, NO_STORE) };
    match digest.parse::<Digest>() {
        Err(e) => failed(StatusCode::BAD_REQUEST, &e.to_string()),
        Ok(digest) if vault.store().has(&digest) => {
            // Whoever asks is about to name it.
            vault.came(digest);
            json(StatusCode::OK, &Done { done: format!("{digest} is there") })
        }
        Ok(digest) => failed(StatusCode::NOT_FOUND, &format!("{digest} is not in the store")),
    }
}

/// `GET /v1/graphs`
pub(super) fn graphs(control: &Control) -> Answer {
    let Some(vault) = &control.vault else { return failed(StatusCode::CONFLICT, NO_STORE) };
    let current = vault.store().current_number();
    let entry = |graph: std::sync::Arc<Graph>| GraphEntry {
        number: graph.number,
        current: Some(graph.number) == current,
        previous: graph.previous,
        file: graph.file.clone(),
        by: graph.by.clone(),
        at_ns: graph.at_ns,
        outcome: graph.outcome.clone(),
        images: graph.images.clone(),
    };
    json(StatusCode::OK, &Graphs { graphs: vault.store().graphs().into_iter().map(entry).collect() })
}

// Graphs.

/// `POST /v1/plan` and `POST /v1/deploy`, of which the first shows only.
pub(super) async fn deploy(control: Rc<Control>, caller: Rc<Caller>, request: Request<Incoming>, swap: bool) -> Answer {
    let asked: Deploy = match read(request, MAX_DEPLOY, true).await {
        Ok(asked) => asked,
        Err(answer) => return *answer,
    };
    let change = if swap { "deploy" } else { "" };
    told(Rc::clone(&control), caller, change.to_owned(), async move |caller: &Caller, tell: &Tell| {
        deployed(&control, caller, asked, swap, tell).await
    })
}

/// `POST /v1/rollback`: the graph before the current one, as it was.
pub(super) async fn rollback(control: Rc<Control>, caller: Rc<Caller>, request: Request<Incoming>) -> Answer {
    let asked: Rollback = match read(request, MAX_DEPLOY, true).await {
        Ok(asked) => asked,
        Err(answer) => return *answer,
    };
    told(Rc::clone(&control), caller, "rollback".to_owned(), async move |caller: &Caller, tell: &Tell| {
        let _changing = control.changing.try_lock().map_err(|_| Unchanged::busy())?;
        let began = Instant::now();
        let (from, to) = before_current(&control)?;
        tell.doing(&format!("planning graph {}, which served before graph {from}", to.number));
        let planned = deploy::planned(&control, &Asked { needs_secrets: true, ..Asked::again(&to) }).await?;
        let plan = report(&control, &planned, began);
        agree(&plan, asked.ends_states)?;
        let generation = swapped(&control, planned, &to, tell).await?;
        note(&control, from, format!("{caller} went back to graph {}", to.number)).await;
        Ok(Step::Done(Deployed { graph: to.number, generation, plan, millis: millis(began) }))
    })
}

/// What stands in the way of a change that is right in itself.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub(super) struct Unchanged {
    reason: Reason,
    error: String,
}

impl Unchanged {
    fn new(reason: Reason, error: impl Into<String>) -> Self {
        Self { reason, error: error.into() }
    }

    pub(super) fn busy() -> Self {
        Self::new(Reason::Busy, "somebody else is changing what serves just now")
    }
}

/// The last step of a change that failed.
fn failure(error: &anyhow::Error) -> Step {
    match error.downcast_ref::<Unchanged>() {
        Some(Unchanged { reason, error }) => Step::Unchanged { reason: *reason, error: error.clone() },
        None => Step::Failed(format!("{error:#}")),
    }
}

/// Tells whoever asked how far it is.
pub(super) struct Tell(UnboundedSender<Step>);

impl Tell {
    pub(super) fn doing(&self, what: &str) {
        // Whoever asked may be gone.
        let _ = self.0.send(Step::Doing(what.to_owned()));
    }
}

/// Does something that takes a while, in a task that goes on if whoever asked goes away, and answers with its steps. It leaves a line in
/// the log, if it has a name for that.
pub(super) fn told(
    control: Rc<Control>,
    caller: Rc<Caller>,
    change: String,
    work: impl AsyncFnOnce(&Caller, &Tell) -> anyhow::Result<Step> + 'static,
) -> Answer {
    let (sender, steps) = unbounded_channel();
    tokio::task::spawn_local(async move {
        let tell = Tell(sender);
        let last = work(&caller, &tell).await.unwrap_or_else(|e| failure(&e));
        if !change.is_empty() {
            let outcome = match &last {
                Step::Done(done) => format!("graph {} serves as generation {}", done.graph, done.generation),
                Step::Secret(done) => done.generation.map_or_else(
                    || "done".to_owned(),
                    |generation| format!("generation {generation} serves with that"),
                ),
                Step::Failed(why) | Step::Unchanged { error: why, .. } => {
                    why.lines().next().unwrap_or_default().to_owned()
                }
                Step::Doing(_) | Step::Plan(_) => String::new(),
            };
            control.audit(&caller, &change, &outcome).await;
        }
        let _ = tell.0.send(last);
    });
    let lines = futures_util::stream::unfold(steps, async |mut steps| {
        let line = serde_json::to_vec(&steps.recv().await?).unwrap_or_default();
        let line = Bytes::from([line.as_slice(), b"\n"].concat());
        Some((Ok::<_, Infallible>(Frame::data(line)), steps))
    });
    let mut answer = Response::new(Either::Right(StreamBody::new(lines.boxed_local())));
    answer.extensions_mut().insert(Outcome("begun".to_owned()));
    answer
}

/// Reads a request of at most so many bytes. What is wrong with it is quoted, if it may be.
pub(super) async fn read<T: DeserializeOwned>(
    request: Request<Incoming>,
    most: usize,
    quoted: bool,
) -> Result<T, Box<Answer>> {
    let refused = |status, words: String| Box::new(failed(status, &words));
    let body = Limited::new(request.into_body(), most).collect();
    let body = match tokio::time::timeout(PIECE_WITHIN, body).await {
        Err(_) => {
            return Err(refused(StatusCode::REQUEST_TIMEOUT, format!("not all of it came within {PIECE_WITHIN:?}")));
        }
        Ok(Err(e)) => return Err(refused(StatusCode::PAYLOAD_TOO_LARGE, format!("{e}; at most {most} bytes"))),
        Ok(Ok(body)) => body.to_bytes(),
    };
    serde_json::from_slice(&body).map_err(|e| {
        let why = if quoted { e.to_string() } else { format!("line {}, column {}", e.line(), e.column()) };
        refused(StatusCode::BAD_REQUEST, format!("not such a request: {why}"))
    })
}

async fn deployed(
    control: &Rc<Control>,
    caller: &Caller,
    asked: Deploy,
    swap: bool,
    tell: &Tell,
) -> anyhow::Result<Step> {
    let began = Instant::now();
    let vault = control.vault.as_ref().context(NO_STORE)?;
    let _changing = if swap { Some(control.changing.try_lock().map_err(|_| Unchanged::busy())?) } else { None };
    for (image, digest) in &asked.images {
        anyhow::ensure!(vault.store().has(digest), "{image}: {digest} is not in the store: push it first");
        vault.came(*digest);
    }
    tell.doing("reading the manifest and its components");
    let shown = if asked.file.is_empty() { "the manifest" } else { &asked.file };
    let (text, reach) = (asked.manifest.clone(), Reach::Tags);
    let of = Asked { shown, text, images: Some(&asked.images), needs_secrets: true, reach, tell: Some(tell) };
    let planned = deploy::planned(control, &of).await?;
    let plan = report(control, &planned, began);
    if !swap {
        return Ok(Step::Plan(Box::new(plan)));
    }
    if asked.plan.as_ref().is_some_and(|agreed| *agreed != plan.id) {
        let error = "what would change is not what was shown any more";
        return Err(Unchanged::new(Reason::NotShown, error).into());
    }
    agree(&plan, asked.ends_states)?;
    let at_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
    let new = NewGraph {
        manifest: asked.manifest,
        file: asked.file,
        images: planned.images.clone(),
        by: caller.to_string(),
        at_ns: u64::try_from(at_ns).unwrap_or(u64::MAX),
    };
    let number = vault.with(move |store| store.append_graph(new)).await?;
    let graph = vault.store().graph(number).context("the history has lost it")?;
    let generation = match swapped(control, planned, &graph, tell).await {
        Ok(generation) => generation,
        Err(e) => {
            note(control, number, format!("never served: {e:#}")).await;
            return Err(e);
        }
    };
    if let Err(e) = vault.collect().await {
        control.say(&format!("store: what nothing needs any more could not be removed: {e:#}")).await;
    }
    Ok(Step::Done(Deployed { graph: number, generation, plan, millis: millis(began) }))
}

/// What would change, and the word that stands for it.
fn report(control: &Control, planned: &Planned, began: Instant) -> PlanReport {
    let serving = control.plan.borrow();
    let against = control.current_number();
    let serves = serving.as_ref().map(|plan| plan.generation);
    // Secrets may be among it, so a word that tells nothing of them.
    let id = serde_json::to_vec(&(serves, &planned.plan)).map(|all| control.key.word(&all)).unwrap_or_default();
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    PlanReport {
        id: id.get(..16).unwrap_or_default().to_owned(),
        against,
        memory: super::api::memory(&meminfo).total_kib << 10,
        warnings: planned.warnings.iter().map(|(shown, _)| shown.clone()).collect(),
        compiled: planned.compiled,
        micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        ..change::between(serving.as_deref(), &planned.plan)
    }
}

/// # Errors
/// That it would end states which nobody has given up.
pub(super) fn agree(plan: &PlanReport, ends_states: bool) -> anyhow::Result<()> {
    if plan.ends.is_empty() || ends_states {
        return Ok(());
    }
    Err(Unchanged::new(Reason::NotAgreed, format!("it {}", plan.ends.join("; it "))).into())
}

/// Has a graph of the history serve, and makes it the current one.
async fn swapped(control: &Rc<Control>, mut planned: Planned, graph: &Graph, tell: &Tell) -> anyhow::Result<u32> {
    let vault = control.vault.as_ref().context(NO_STORE)?;
    let number = graph.number;
    // So that a control which finds it serving knows what is current, should this one not come to keep that.
    planned.plan.graph = Some(number);
    // The same graph again, under a new number perhaps: nothing needs to be started for that.
    if !planned.changes_nothing(control) {
        room(control, tell).await?;
        tell.doing("starting its workers");
        planned.plan.trial = Some(plan::Trial { since_ns: since_boot(), restarts: restarts(control).await? });
        deploy::start(control, planned).await?;
    }
    let kept = vault.with(move |store| store.set_current(number)).await;
    kept.with_context(|| {
        format!("graph {number} serves, but that could not be kept: a restart serves the one before")
    })?;
    let generation = control.plan.borrow().as_ref().map_or(0, |plan| plan.generation);
    *control.trial.borrow_mut() = Some(Trial { graph: number, generation, since: Instant::now(), deaths: 0 });
    Ok(generation)
}

/// Makes the graph that serves the current one: a control before this one may have ended between the two. Whoever asked for it has
/// no answer then, and it serves, so it is what is kept.
pub(super) async fn settled(control: &Control) -> anyhow::Result<()> {
    let Some(vault) = &control.vault else { return Ok(()) };
    let Some(serves) = control.plan.borrow().as_ref().and_then(|plan| plan.graph) else { return Ok(()) };
    let current = control.current_number();
    if current == Some(serves) {
        return Ok(());
    }
    // The same graph under another number is started for nobody, and serves all the same.
    if let Some(current) = vault.store().current()
        && let Ok(planned) = deploy::planned(control, &Asked::again(&current)).await
        && planned.changes_nothing(control)
    {
        return Ok(());
    }
    vault.with(move |store| store.set_current(serves)).await?;
    let before = current.map_or_else(|| "none".to_owned(), |current| current.to_string());
    control.say(&format!("graph {serves} serves and is the current one now; kept as that was {before}")).await;
    Ok(())
}

/// Waits until there are few enough generations for another.
pub(super) async fn room(control: &Control, tell: &Tell) -> anyhow::Result<()> {
    let until = Instant::now() + ROOM_WITHIN;
    let mut said = false;
    loop {
        let there: BTreeSet<u32> =
            control.workers.borrow().iter().filter(|w| w.runs.core().is_some()).map(|w| w.generation).collect();
        if there.len() < GENERATIONS {
            return Ok(());
        }
        let old = there.len() - 1;
        if !std::mem::replace(&mut said, true) {
            tell.doing(&format!("waiting for one of {old} older generations to finish what is inside"));
        }
        anyhow::ensure!(Instant::now() < until, "{old} older generations still finish what is inside: try again later");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn before_current(control: &Control) -> anyhow::Result<(u64, std::sync::Arc<Graph>)> {
    let store = control.vault.as_ref().context(NO_STORE)?.store();
    let from = store.current_number().context("no graph has been deployed, so there is no way back from it")?;
    let to = store.previous_of_current();
    Ok((from, to.with_context(|| format!("there is no graph before graph {from}, or it is not kept any more"))?))
}

/// Keeps what became of a graph. That it cannot be kept is no reason to stop.
async fn note(control: &Control, graph: u64, outcome: String) {
    let Some(vault) = &control.vault else { return };
    if let Err(e) = vault.with(move |store| store.note(graph, &outcome)).await {
        control.say(&format!("store: what became of graph {graph} could not be noted: {e:#}")).await;
    }
}

pub(super) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

// What does not stay up.

/// A worker or keeper of this generation has died. If that goes on just after a deploy, the graph before it serves again.
pub(super) fn died(control: &Rc<Control>, generation: u32, name: &str, cause: &str) {
    counted(control, generation, 1, &format!("the last was {name}, which {cause}"));
}

/// Goes on with the trial of what serves, if it is on one: the control before this one may have ended meanwhile. Who died since the
/// deploy, init knows, whether there was a control or not.
pub(super) async fn resumed(control: &Rc<Control>) -> anyhow::Result<()> {
    let serves = control.plan.borrow().clone();
    let Some((plan, trial)) = serves.as_ref().and_then(|plan| Some((plan, plan.trial.as_ref()?))) else {
        return Ok(());
    };
    let Some(graph) = plan.graph.filter(|graph| control.current_number() == Some(*graph)) else { return Ok(()) };
    let age = Duration::from_nanos(since_boot().saturating_sub(trial.since_ns));
    let Some(since) = Instant::now().checked_sub(age).filter(|_| age < TRIAL) else { return Ok(()) };
    let died = restarts(control).await?.into_iter().map(|(role, now)| {
        let then = trial.restarts.get(&role).copied().unwrap_or(0);
        now.saturating_sub(then)
    });
    let died = died.sum();
    *control.trial.borrow_mut() = Some(Trial { graph, generation: plan.generation, since, deaths: 0 });
    counted(control, plan.generation, died, "the last while control was away");
    Ok(())
}

/// How often each worker and keeper has been started again.
async fn restarts(control: &Control) -> anyhow::Result<BTreeMap<String, u32>> {
    let mut all = BTreeMap::new();
    let roles = control.init.roles().await?.into_iter();
    // One that drains beside its successor counts with it.
    for role in roles.filter(|role| role.name.starts_with("worker@") || role.name.starts_with("keeper@")) {
        let most = all.entry(role.name).or_insert(0);
        *most = role.restarts.max(*most);
    }
    Ok(all)
}

/// In ns.
fn since_boot() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.cast_unsigned().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec.cast_unsigned())
}

/// So many more have died.
fn counted(control: &Rc<Control>, generation: u32, deaths: u32, last: &str) {
    let graph = {
        let mut trial = control.trial.borrow_mut();
        let Some(on) = trial.as_mut().filter(|on| on.generation == generation && on.since.elapsed() < TRIAL) else {
            return;
        };
        on.deaths += deaths;
        if on.deaths < DEATHS {
            return;
        }
        trial.take().map_or(0, |on| on.graph)
    };
    let why = format!("taken back by itself: {DEATHS} of its processes died within {TRIAL:?}, {last}");
    let control = Rc::clone(control);
    tokio::task::spawn_local(async move {
        // Should this control end before it is done, the reason is kept already.
        note(&control, graph, format!("graph {graph} is to be {why}")).await;
        let outcome = taken_back(&control, graph).await;
        let outcome = match outcome {
            Ok(to) => format!("graph {graph} is {why}; graph {to} serves again"),
            Err(e) => format!("graph {graph} is not {why}: {e:#}"),
        };
        note(&control, graph, outcome.clone()).await;
        control.note(&outcome);
        control.words.borrow_mut().push(outcome.clone());
        control.say(&outcome).await;
    });
}

async fn taken_back(control: &Rc<Control>, graph: u64) -> anyhow::Result<u64> {
    let _changing = control.changing.lock().await;
    let (from, to) = before_current(control)?;
    anyhow::ensure!(from == graph, "graph {from} has been deployed since");
    let mut planned = deploy::planned(control, &Asked::again(&to)).await?;
    let number = to.number;
    planned.plan.graph = Some(number);
    deploy::start(control, planned).await?;
    control.vault.as_ref().context(NO_STORE)?.with(move |store| store.set_current(number)).await?;
    Ok(number)
}
