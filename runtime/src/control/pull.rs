//! Components from registries: when one is asked, what the store remembers of where a component came from, and how what was
//! lost is fetched again.
//!
//! ```text
//! deploy     a tag ─▶ its registry, each time · a digest that is here ─▶ nobody
//! rollback   nobody, unless a component is lost
//! start      nobody; what it lacks is fetched in the background, and then served
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use gaia_manifest::Image;
use gaia_registry::{Progress, Reference};
use gaia_store::{Digest, Graph, RECORD_MAX, Store};
use serde::{Deserialize, Serialize};

use super::Control;
use super::deploy::{self, Asked, Missing, Whereabouts};
use super::vault::Vault;
use crate::compile::MAX_COMPONENT;
use crate::registries::Paced;

/// Records of where components came from: one for each first digit of a component's digest.
const RECORDS: [&str; 16] = [
    "origins-0",
    "origins-1",
    "origins-2",
    "origins-3",
    "origins-4",
    "origins-5",
    "origins-6",
    "origins-7",
    "origins-8",
    "origins-9",
    "origins-a",
    "origins-b",
    "origins-c",
    "origins-d",
    "origins-e",
    "origins-f",
];
/// Names that are remembered of one component.
const NAMES: usize = 8;
/// How long after a start, and after an attempt that failed, what it lacks is fetched again; the last goes on.
const PAUSES: [Duration; 5] =
    [Duration::ZERO, Duration::from_secs(10), Duration::from_mins(1), Duration::from_mins(3), Duration::from_mins(10)];

/// For what registries are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// For nothing: a start does not wait for a network.
    Nobody,
    /// For what the store does not have.
    Lacking,
    /// For what a tag stands for, too: a deploy.
    Tags,
}

// What is remembered.

/// A name that a component came by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Name {
    /// `registry.example/omega/cloud-fetch:2.4.1@sha256:…`, with the digest of the manifest there.
    from: String,
    /// Larger than those of all names before it.
    at: u64,
}

/// Where components came from.
#[derive(Debug, Default)]
struct Origins(BTreeMap<Digest, Vec<Name>>);

impl Origins {
    /// Of what was kept; what cannot be read is forgotten, and costs that a component cannot be fetched again.
    fn of(records: impl Iterator<Item = Vec<u8>>) -> Self {
        let read = |record: Vec<u8>| serde_json::from_slice::<BTreeMap<Digest, Vec<Name>>>(&record).ok();
        Self(records.filter_map(read).flatten().collect())
    }

    /// Where in the records a component is.
    fn place(component: &Digest) -> usize {
        component.hex().chars().next().and_then(|digit| digit.to_digit(16)).map_or(0, |digit| digit as usize)
    }

    /// The newest name of a component.
    fn newest(&self, component: &Digest) -> Option<&Name> {
        self.0.get(component)?.iter().max_by_key(|name| name.at)
    }

    /// What this name, without a digest, stood for when it was asked for last, and the name with its digest.
    fn known_as(&self, name: &str) -> Option<(Digest, &str)> {
        let all = self.0.iter().flat_map(|(component, names)| names.iter().map(move |name| (component, name)));
        let same = all.filter(|(_, known)| known.from.rsplit_once('@').is_some_and(|(text, _)| text == name));
        same.max_by_key(|(_, known)| known.at).map(|(component, known)| (*component, known.from.as_str()))
    }

    /// The component of a manifest.
    fn of_manifest(&self, manifest: &str) -> Option<Digest> {
        let is = |name: &Name| name.from.rsplit_once('@').is_some_and(|(_, digest)| digest == manifest);
        self.0.iter().find(|(_, names)| names.iter().any(is)).map(|(component, _)| *component)
    }

    /// A component came by this name, its digest included. Whether that is new.
    fn came(&mut self, component: Digest, from: &str) -> bool {
        let name = from.rsplit_once('@').map_or(from, |(name, _)| name);
        if self.known_as(name) == Some((component, from)) {
            return false;
        }
        let at = self.0.values().flatten().map(|name| name.at).max().unwrap_or(0).saturating_add(1);
        let names = self.0.entry(component).or_default();
        names.retain(|known| known.from != from);
        names.push(Name { from: from.to_owned(), at });
        let more = names.len().saturating_sub(NAMES);
        names.drain(..more);
        true
    }

    /// One of the records, without what is not needed, and without the oldest if it would be too long.
    fn record(&mut self, place: usize, is_needed: impl Fn(&Digest) -> bool) -> Vec<u8> {
        self.0.retain(|component, _| Self::place(component) != place || is_needed(component));
        loop {
            let mine: BTreeMap<&Digest, &Vec<Name>> = self.0.iter().filter(|(c, _)| Self::place(c) == place).collect();
            let record = serde_json::to_vec(&mine).unwrap_or_default();
            let newest = |names: &[Name]| names.iter().map(|name| name.at).max();
            let oldest = mine.iter().min_by_key(|(_, names)| newest(names)).map(|(component, _)| **component);
            match oldest {
                Some(oldest) if record.len() > RECORD_MAX => self.0.remove(&oldest),
                _ => return record,
            };
        }
    }
}

/// The same, shared with the threads that wait for the disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Remembered {
    origins: Arc<Mutex<Origins>>,
    /// Held by whoever writes them.
    writing: Arc<Mutex<()>>,
}

impl Remembered {
    /// What the store remembers.
    pub(super) fn of(store: &Store) -> Self {
        let records = RECORDS.iter().filter_map(|name| store.record(name).ok().flatten());
        Self { origins: Arc::new(Mutex::new(Origins::of(records))), writing: Arc::default() }
    }

    fn origins(&self) -> MutexGuard<'_, Origins> {
        self.origins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn origin(&self, component: &Digest) -> Option<Reference> {
        self.origins().newest(component).and_then(|name| Reference::parse(&name.from).ok())
    }

    fn known_as(&self, reference: &Reference) -> Option<(Digest, String)> {
        self.origins().known_as(&reference.to_string()).map(|(component, from)| (component, from.to_owned()))
    }

    fn of_manifest(&self, manifest: gaia_registry::Digest) -> Option<Digest> {
        self.origins().of_manifest(&manifest.to_string())
    }

    /// Keeps that a component came by this name.
    ///
    /// # Errors
    /// The disk's.
    async fn keep(&self, vault: &Vault, component: Digest, from: String) -> anyhow::Result<()> {
        let remembered = self.clone();
        vault
            .with(move |store| {
                let _writing = remembered.writing.lock().unwrap_or_else(PoisonError::into_inner);
                if !remembered.origins().came(component, &from) {
                    return Ok(());
                }
                // What was lost is needed as long as a graph or a name has it.
                let graphs = store.graphs();
                let graphs = graphs.iter().flat_map(|graph| graph.images.values().copied());
                let named = store.names().into_iter().map(|(_, digest)| digest);
                let referred: BTreeSet<Digest> = graphs.chain(named).collect();
                let place = Origins::place(&component);
                let record =
                    remembered.origins().record(place, |digest| store.has(digest) || referred.contains(digest));
                store.set_record(RECORDS[place], &record)
            })
            .await
    }
}

// What is asked for.

/// Where the component of an image that is a name is: in the store, or pulled into it just now.
///
/// # Errors
/// Why it is not to be had, and what to do.
pub(super) async fn found(control: &Control, asked: &Asked<'_>, name: &str) -> Result<Whereabouts, Missing> {
    const PUSH: &str =
        "put it there: gaia push NAME FILE.wasm; or name a file beside the manifest: image = \"file:./x.wasm\"";
    let reference = Reference::parse(name).map_err(|e| Missing::new(format!("\"{name}\": {e}"), ""))?;
    let pin: Option<Digest> = reference.digest().and_then(|digest| digest.to_string().parse().ok());
    let here = |digest: &Digest| control.vault.as_ref().is_some_and(|vault| vault.store().has(digest));
    let mut other = None;
    if let Some(vault) = &control.vault {
        // What is pinned is that, whatever the name stands for by now and whoever has it.
        let manifest = reference.digest().and_then(|digest| vault.remembered.of_manifest(digest));
        if let Some(digest) = [pin, manifest].into_iter().flatten().find(here) {
            vault.came(digest);
            return Ok(Whereabouts::Stored(digest));
        }
        if reference.is_local() {
            let key = name.split('@').next().unwrap_or(name);
            match vault.store().resolve(key) {
                Some(digest) if pin.is_none() => {
                    // Then a graph could not be kept that has it.
                    if !here(&digest) && asked.reach == Reach::Tags {
                        let image = name_of(&reference);
                        let again = again(control, asked, &image, digest).await;
                        again.map_err(|e| Missing::new(format!("\"{name}\": {e:#}"), PUSH))?;
                    }
                    return Ok(Whereabouts::Stored(digest));
                }
                resolved => other = resolved.map(|digest| (key.to_owned(), digest)),
            }
        }
    }
    let Some(host) = reference.host().or(control.registries.default_host()) else {
        return Err(match (other, &control.vault) {
            (Some((key, digest)), _) => Missing::new(format!("\"{key}\" is {digest} in the store"), PUSH),
            (None, Some(_)) => Missing::new(format!("\"{name}\" is not in the store"), PUSH),
            (None, None) => Missing::new(format!("there is no store to find \"{name}\" in"), PUSH),
        });
    };
    let remote = reference.at(host.clone());
    let known = control.vault.as_ref().and_then(|vault| vault.remembered.known_as(&remote));
    let known = known.filter(|(digest, _)| here(digest));
    if let (Some((digest, _)), Reach::Nobody | Reach::Lacking) = (&known, asked.reach) {
        return Ok(Whereabouts::Stored(*digest));
    }
    if !control.registries.may(host) {
        let help = format!(
            "list it: [registries.\"{host}\"] in gaia.toml, or --registry {host} of gaia run; all public ones: [registry] any = true"
        );
        return Err(Missing::new(
            format!("\"{name}\" is in the registry {host}, which the operator has not named"),
            &help,
        ));
    }
    if asked.reach == Reach::Nobody {
        let words = format!("\"{name}\" is not in the store yet, and a start waits for no registry");
        return Err(Missing::new(words, "it is asked in the background"));
    }
    match pulled(control, asked, &remote, None).await {
        Ok(Pulled { digest, bytes: Some(bytes) }) if control.vault.is_none() => Ok(Whereabouts::Came(digest, bytes)),
        Ok(Pulled { digest, .. }) => Ok(Whereabouts::Stored(digest)),
        Err(e) => {
            let help =
                known.map(|(_, from)| format!("to go on with what the store has of it, pin that: image = \"{from}\""));
            Err(Missing::new(format!("{e:#}"), &help.unwrap_or_default()))
        }
    }
}

/// A name as a manifest has it.
fn name_of(reference: &Reference) -> Image {
    let repository = match reference.host() {
        Some(host) => format!("{host}/{}", reference.repository()),
        None => reference.repository().to_owned(),
    };
    Image::Name { repository, tag: reference.tag().map(str::to_owned), digest: None }
}

/// What a pull has come to.
struct Pulled {
    digest: Digest,
    /// Its bytes, unless it was here already.
    bytes: Option<Bytes>,
}

/// Asks a registry for a component and, unless it is here, fetches it into the store. If one is `expected`, it is fetched in any
/// case, and no other is taken.
async fn pulled(
    control: &Control,
    asked: &Asked<'_>,
    remote: &Reference,
    expected: Option<Digest>,
) -> anyhow::Result<Pulled> {
    let host = remote.host().context("a name without a registry")?;
    let root = |path: &str| deploy::root(control, path);
    let registry = control.registries.registry(host, Arc::<gaia_egress::resolve::Stub>::clone(&control.names), root)?;
    asked.doing(control, &format!("asking {host} for {remote}")).await;
    let held = |component: &gaia_registry::Digest| {
        let digest = component.to_string().parse::<Digest>();
        let vault = control.vault.as_ref().filter(|_| expected.is_none());
        digest.ok().zip(vault).is_some_and(|(digest, vault)| {
            // First, or it could be collected meanwhile.
            vault.came(digest);
            vault.store().has(&digest)
        })
    };
    let (mut bytes, mut paced) = (Vec::new(), Paced::new());
    let sink = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    let progress = |progress: Progress| {
        if let Some(words) = paced.words("pulling", remote, progress) {
            asked.told(&words);
        }
    };
    let pulled = registry.pull_unless(remote, MAX_COMPONENT, held, sink, progress).await?;
    let digest: Digest = pulled.component.to_string().parse()?;
    if let Some(expected) = expected {
        anyhow::ensure!(digest == expected, "{remote} is {digest} there, and not {expected}");
    }
    let from = format!("{}@{}", remote.to_string().split('@').next().unwrap_or_default(), pulled.manifest);
    let bytes = (!bytes.is_empty()).then(|| Bytes::from(bytes));
    if let Some(vault) = &control.vault {
        if let Some(bytes) = bytes.clone() {
            vault.came(digest);
            vault.put(bytes, digest).await?;
        }
        if let Err(e) = vault.remembered.keep(vault, digest, from.clone()).await {
            control.say(&format!("store: where {digest} came from could not be kept: {e:#}")).await;
        }
    }
    if let Some(bytes) = &bytes {
        control.note(&format!("pulled {from}: {digest}, {} bytes", bytes.len()));
    }
    Ok(Pulled { digest, bytes })
}

/// Whether a component is not in the store, or not any more.
pub(super) fn is_lost(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<gaia_store::Error>();
    matches!(error, Some(gaia_store::Error::Missing { .. } | gaia_store::Error::Corrupt { .. }))
}

/// Where a component can be fetched again: where it came from, or where its name leads to.
fn source_of(control: &Control, image: &Image, digest: Digest) -> Option<Reference> {
    let origin = control.vault.as_ref().and_then(|vault| vault.remembered.origin(&digest));
    let named = || {
        let Image::Name { .. } = image else { return None };
        let reference = Reference::parse(&image.to_string()).ok()?;
        let remote = reference.at(reference.host().or(control.registries.default_host())?.clone());
        // A tag may have moved on; what is wanted is this.
        let pinned = if remote.digest().is_some() { remote.to_string() } else { format!("{remote}@{digest}") };
        Reference::parse(&pinned).ok()
    };
    let may = |reference: &Reference| reference.host().is_some_and(|host| control.registries.may(host));
    origin.filter(may).or_else(|| named().filter(may))
}

/// Fetches a component again that was lost.
///
/// # Errors
/// That no registry is known that has it, or why it does not come.
pub(super) async fn again(
    control: &Control,
    asked: &Asked<'_>,
    image: &Image,
    digest: Digest,
) -> anyhow::Result<Bytes> {
    let source = source_of(control, image, digest);
    let source = source.with_context(|| format!("{digest} is lost, and came from no registry that is known"))?;
    let pulled = pulled(control, asked, &source, Some(digest)).await;
    let pulled = pulled.with_context(|| format!("{digest} is lost"))?;
    control.say(&format!("store: {digest} was lost, and is fetched again from {source}")).await;
    pulled.bytes.context("it has no bytes")
}

// After a start.

/// A graph that a start could not serve for want of components.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behind {
    /// The current one of the history.
    Graph(u64),
    /// That of the seed.
    Seed,
}

impl Behind {
    /// Whether it is for want of components that a registry may have.
    pub(super) fn of(control: &Control, graph: &Graph) -> Option<Self> {
        let vault = control.vault.as_ref()?;
        let current = vault.store().current_number() == Some(graph.number);
        let manifest = gaia_manifest::parse(&graph.manifest).ok()?;
        let lost = |image: &Image| {
            let digest = graph.images.get(&image.to_string());
            digest.is_some_and(|d| !vault.store().has(d) && source_of(control, image, *d).is_some())
        };
        let behind = current && manifest.branes.iter().any(|brane| lost(&brane.image.value));
        behind.then_some(Self::Graph(graph.number))
    }

    /// The same of the seed's graph.
    pub(super) fn of_seed(control: &Control, text: &str) -> Option<Self> {
        let manifest = gaia_manifest::parse(text).ok()?;
        let remote = |image: &Image| {
            let Image::Name { .. } = image else { return false };
            let reference = Reference::parse(&image.to_string()).ok();
            let host = reference.as_ref().and_then(|r| r.host().or(control.registries.default_host()).cloned());
            host.is_some_and(|host| control.registries.may(&host))
        };
        manifest.branes.iter().any(|brane| remote(&brane.image.value)).then_some(Self::Seed)
    }
}

impl std::fmt::Display for Behind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Graph(number) => write!(f, "graph {number}"),
            Self::Seed => f.write_str("the seed's graph"),
        }
    }
}

/// Fetches in the background what a start lacked, if it lacked something, and serves the graph then, unless another has been
/// deployed meanwhile.
pub(super) fn catch_up(control: &Rc<Control>, behind: Option<Behind>) {
    let Some(behind) = behind else { return };
    let control = Rc::clone(control);
    let since = control.newest.get();
    tokio::task::spawn_local(async move {
        let mut said = String::new();
        let last = PAUSES.last().copied().unwrap_or_default();
        for pause in PAUSES.into_iter().chain(std::iter::repeat(last)) {
            tokio::time::sleep(pause).await;
            match caught_up(&control, behind, since).await {
                Ok(true) => {
                    let words = format!("{behind} serves: what it lacked has been fetched");
                    control.note(&words);
                    return control.say(&words).await;
                }
                Ok(false) => return,
                Err(e) => {
                    let words = format!("{behind} does not serve yet, and that is tried again: {e:#}");
                    if words != said {
                        control.say(&words).await;
                        said = words;
                    }
                }
            }
        }
    });
}

async fn caught_up(control: &Rc<Control>, behind: Behind, since: u32) -> anyhow::Result<bool> {
    let graph = match behind {
        Behind::Graph(number) => {
            let graph = control.vault.as_ref().and_then(|vault| vault.store().graph(number));
            Some(graph.context("the history has lost it")?)
        }
        Behind::Seed => None,
    };
    if control.newest.get() != since {
        return Ok(false);
    }
    let mut planned = match &graph {
        Some(graph) => deploy::planned(control, &Asked::again(graph)).await?,
        None => deploy::planned_of_source(control).await?,
    };
    let _changing = control.changing.lock().await;
    if control.newest.get() != since {
        return Ok(false);
    }
    planned.plan.graph = graph.map(|graph| graph.number);
    deploy::start(control, planned).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(of: u64) -> Digest {
        Digest::of(&of.to_le_bytes())
    }

    fn from(name: &str, manifest: u64) -> String {
        format!("registry.example/omega/{name}@{}", digest(manifest))
    }

    #[test]
    fn a_tag_stands_for_what_came_last_and_a_manifest_for_ever() {
        let mut origins = Origins::default();
        assert!(origins.came(digest(1), &from("x:1", 11)));
        assert!(!origins.came(digest(1), &from("x:1", 11)), "it is known");
        assert!(origins.came(digest(2), &from("x:1", 12)), "the tag has moved on");
        assert_eq!(origins.known_as("registry.example/omega/x:1").unwrap().0, digest(2));
        assert_eq!(origins.of_manifest(&digest(11).to_string()), Some(digest(1)));
        assert_eq!(origins.newest(&digest(1)).unwrap().from, from("x:1", 11));
        assert!(origins.came(digest(1), &from("x:1", 11)), "the tag has moved back");
        assert_eq!(origins.known_as("registry.example/omega/x:1").unwrap().0, digest(1));
        assert_eq!(origins.known_as("registry.example/omega/x"), None);
        for n in 0..20 {
            origins.came(digest(1), &from(&format!("x:a{n}"), 11));
        }
        assert_eq!(origins.0[&digest(1)].len(), NAMES);
    }

    #[test]
    fn a_record_is_bounded_and_keeps_what_is_needed_and_newest() {
        let mut origins = Origins::default();
        let all: Vec<Digest> = (0..20_000).map(digest).filter(|d| Origins::place(d) == 3).collect();
        for (n, component) in all.iter().enumerate() {
            origins.came(*component, &from("x:1", n as u64));
        }
        let record = origins.record(3, |component| *component != all[all.len() - 1]);
        assert!(record.len() <= RECORD_MAX && record.len() > RECORD_MAX / 2, "{}", record.len());
        let again = Origins::of([record].into_iter());
        assert!(!again.0.contains_key(&all[all.len() - 1]) && !again.0.contains_key(&all[0]));
        assert!(again.0.contains_key(&all[all.len() - 2]));
    }

    proptest! {
        #[test]
        fn any_record_is_read_or_forgotten(text in "\\{(\"sha256:[0-9a-f]{64}\": ?\\[(\\{\"from\": ?\"\\PC{0,20}\", ?\"at\": ?[0-9]{1,21}\\},?){0,2}\\],?){0,2}\\}|\\PC{0,40}") {
            let mut origins = Origins::of([text.into_bytes()].into_iter());
            origins.came(digest(1), &from("x:1", 1));
            prop_assert_eq!(origins.known_as("registry.example/omega/x:1").unwrap().0, digest(1));
        }
    }
}
