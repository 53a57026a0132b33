//! The store against a model: while the power fails, the disk fails or is full, and files are damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use rustix::io::Errno;

use crate::disk::{Dir, Disk};
use crate::exercise;
use crate::form;
use crate::simulated::{Chance, Fault, Lie, Simulated};
use crate::state::{COPY, TEMPORARY, taken};
use crate::{ArtefactKey, Digest, Error, Finding, Graph, Limits, NewGraph, Outcome, Store, Subject, VERSION};

const ROOM: u64 = 1 << 30;

fn limits() -> Limits {
    Limits { graphs: 4, names: 100, bytes: ROOM, ..Limits::default() }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

/// Components: around the sizes of blocks, without zeros, one of them empty.
const SIZES: [usize; 6] = [1, 700, 4096, 5000, 9000, 0];

fn component(k: usize) -> Vec<u8> {
    let mut chance = Chance(k as u64);
    (0..SIZES[k]).map(|_| u8::try_from(chance.below(255) + 1).unwrap()).collect()
}

fn digest(k: usize) -> Digest {
    Digest::of(&component(k))
}

fn key(k: usize, settings: usize) -> ArtefactKey {
    ArtefactKey { component: digest(k), settings: format!("settings-{settings}") }
}

fn artefact(k: usize, settings: usize, version: u8) -> Vec<u8> {
    [vec![version; SIZES[k] + 1], vec![u8::try_from(settings).unwrap(); 5000]].concat()
}

fn name(n: usize) -> String {
    format!("omega/x:{n}")
}

fn record(r: usize) -> String {
    format!("record-{r}")
}

/// What can be done with a store. Numbers are of components, names, and so on; of graphs and their images, of those that are there.
#[derive(Debug, Clone)]
enum Op {
    Upload(usize),
    Dropped(usize),
    SetName(usize, usize),
    RemoveName(usize),
    Append(Vec<usize>, u8),
    SetCurrent(usize),
    Note(usize, u8),
    Artefact(usize, usize, u8),
    Record(usize, u8),
    RemoveRecord(usize),
    Collect(Option<usize>),
    Read(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let k = || 0..SIZES.len();
    prop_oneof![
        4 => k().prop_map(Op::Upload),
        1 => k().prop_map(Op::Dropped),
        3 => (0..3_usize, k()).prop_map(|(n, k)| Op::SetName(n, k)),
        1 => (0..3_usize).prop_map(Op::RemoveName),
        4 => (proptest::collection::vec(0..60_usize, 0..3), any::<u8>()).prop_map(|(ks, by)| Op::Append(ks, by)),
        3 => (0..60_usize).prop_map(Op::SetCurrent),
        1 => (0..60_usize, any::<u8>()).prop_map(|(graph, what)| Op::Note(graph, what)),
        1 => (k(), 0..2_usize, any::<u8>()).prop_map(|(k, settings, version)| Op::Artefact(k, settings, version)),
        1 => (0..2_usize, any::<u8>()).prop_map(|(r, value)| Op::Record(r, value)),
        1 => (0..2_usize).prop_map(Op::RemoveRecord),
        2 => proptest::option::of(k()).prop_map(Op::Collect),
        1 => k().prop_map(Op::Read),
    ]
}

/// What a store holds.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    /// And their bytes.
    components: BTreeMap<usize, usize>,
    names: BTreeMap<usize, usize>,
    graphs: BTreeMap<u64, Graph>,
    current: BTreeMap<(), u64>,
    artefacts: BTreeMap<(usize, usize), u8>,
    records: BTreeMap<usize, u8>,
}

impl Model {
    fn images(&self, ks: &[usize]) -> BTreeMap<String, Digest> {
        let there: Vec<usize> = self.components.keys().copied().collect();
        let some = if there.is_empty() { &[] } else { ks };
        some.iter().map(|k| there[k % there.len()]).map(|k| (format!("file:./{k}.wasm"), digest(k))).collect()
    }

    fn pick(&self, graph: usize) -> u64 {
        let numbers: Vec<u64> = self.graphs.keys().copied().collect();
        // One that is not there, if there is none.
        if numbers.is_empty() { 1 } else { numbers[graph % numbers.len()] }
    }

    fn new_graph(&self, ks: &[usize], by: u8) -> NewGraph {
        let manifest = format!("[brane.x]\nimage = \"{}\"\n", "\u{1}é\"".repeat(usize::from(by) * 9));
        NewGraph { manifest, file: "x.zgraph.toml".into(), images: self.images(ks), by: by.to_string(), at_ns: 1 << 62 }
    }

    /// After it; `None` if it is refused.
    fn after(&self, op: &Op) -> Option<Self> {
        let mut model = self.clone();
        match op {
            Op::Upload(k) => drop(model.components.insert(*k, SIZES[*k])),
            Op::Dropped(_) => {}
            Op::SetName(n, k) => {
                self.components.get(k)?;
                model.names.insert(*n, *k);
            }
            Op::RemoveName(n) => drop(model.names.remove(n)),
            Op::Append(ks, by) => {
                let last = self.graphs.keys().chain(self.current.values()).max().copied().unwrap_or(0);
                let NewGraph { manifest, file, images, by, at_ns } = self.new_graph(ks, *by);
                let (number, previous) = (last + 1, self.current.get(&()).copied());
                let graph =
                    Graph { number, previous, manifest, file, images, by, at_ns, outcome: None, made_current: None };
                model.graphs.insert(number, graph);
                let before_current = previous.and_then(|current| self.graphs[&current].previous);
                while model.graphs.len() > limits().graphs {
                    let kept = [Some(number), previous, before_current];
                    let oldest = *model.graphs.keys().find(|number| !kept.contains(&Some(**number))).unwrap();
                    model.graphs.remove(&oldest);
                }
            }
            Op::SetCurrent(graph) => {
                let number = self.pick(*graph);
                self.graphs.get(&number)?;
                model.current.insert((), number);
            }
            Op::Note(graph, what) => {
                model.graphs.get_mut(&self.pick(*graph))?.outcome = Some(format!("outcome {what}"));
            }
            Op::Artefact(k, settings, version) => drop(model.artefacts.insert((*k, *settings), *version)),
            Op::Record(r, value) => drop(model.records.insert(*r, *value)),
            Op::RemoveRecord(r) => drop(model.records.remove(r)),
            Op::Collect(keep) => {
                let graphs = self.graphs.values().flat_map(|graph| graph.images.values().copied());
                let names = self.names.values().map(|k| digest(*k));
                let referred: BTreeSet<Digest> = graphs.chain(names).chain(keep.map(digest)).collect();
                model.components.retain(|k, _| referred.contains(&digest(*k)));
                model.artefacts.retain(|(k, _), _| referred.contains(&digest(*k)));
            }
            Op::Read(k) => drop(self.components.get(k)?),
        }
        Some(model)
    }

    /// Does it to the store.
    fn run(&self, store: &Store, op: &Op) -> Result<(), Error> {
        match op {
            Op::Upload(k) | Op::Dropped(k) => {
                let mut upload = store.upload()?;
                for piece in component(*k).chunks(3000) {
                    upload.append(piece)?;
                }
                if matches!(op, Op::Upload(_)) {
                    assert_eq!(upload.finish(Some(digest(*k)))?, digest(*k));
                }
                Ok(())
            }
            Op::SetName(n, k) => store.set_name(&name(*n), digest(*k)),
            Op::RemoveName(n) => store.remove_name(&name(*n)).map(drop),
            Op::Append(ks, by) => store.append_graph(self.new_graph(ks, *by)).map(drop),
            Op::SetCurrent(graph) => store.set_current(self.pick(*graph)),
            Op::Note(graph, what) => store.note(self.pick(*graph), &format!("outcome {what}")),
            Op::Artefact(k, s, version) => store.put_artefact(&key(*k, *s), artefact(*k, *s, *version).as_slice()),
            Op::Record(r, value) => store.set_record(&record(*r), &[*value; 100]),
            Op::RemoveRecord(r) => store.remove_record(&record(*r)).map(drop),
            Op::Collect(keep) => store.collect(&keep.iter().map(|k| digest(*k)).collect()).map(drop),
            Op::Read(k) => store.component(&digest(*k)).map(|bytes| assert_eq!(bytes, component(*k))),
        }
    }

    /// What a store holds; words if any of it is not intact.
    fn of(store: &Store) -> Result<Self, String> {
        let text = |e: Error| e.to_string();
        let mut model = Self::default();
        for k in 0..SIZES.len() {
            if store.has(&digest(k)) {
                let bytes = store.component(&digest(k)).map_err(text)?;
                ensure(bytes == component(k), || format!("component {k} is another"))?;
                model.components.insert(k, bytes.len());
            }
            for settings in 0..2 {
                if let Some(bytes) = store.artefact(&key(k, settings)).map_err(text)? {
                    ensure(bytes == artefact(k, settings, bytes[0]), || format!("artefact {k} is another"))?;
                    model.artefacts.insert((k, settings), bytes[0]);
                }
            }
        }
        for (name, digest_of_it) in store.names() {
            let n = name.strip_prefix("omega/x:").and_then(|n| n.parse().ok()).ok_or("another name")?;
            let k = (0..SIZES.len()).find(|k| digest(*k) == digest_of_it).ok_or("another digest")?;
            ensure(model.components.contains_key(&k), || format!("{name} refers to nothing"))?;
            model.names.insert(n, k);
        }
        for graph in store.graphs() {
            let missing = graph.images.values().find(|image| !store.has(image));
            ensure(missing.is_none(), || format!("graph {} refers to nothing", graph.number))?;
            // What it says of itself is tried by losing `current`.
            model.graphs.insert(graph.number, Graph { made_current: None, ..Graph::clone(&graph) });
        }
        if let Some(number) = store.current_number() {
            ensure(store.current().is_some_and(|graph| graph.number == number), || "the current graph is lost".into())?;
            model.current.insert((), number);
        }
        for r in 0..2 {
            if let Some(bytes) = store.record(&record(r)).map_err(text)? {
                ensure(bytes == [bytes[0]; 100], || format!("record {r} is another"))?;
                model.records.insert(r, bytes[0]);
            }
        }
        let wrong = store.findings();
        ensure(wrong.is_empty(), || format!("found on reading: {wrong:?}"))?;
        Ok(model)
    }

    /// Whether each thing is as it was before or as it is to be after.
    fn is_between(&self, before: &Self, after: &Self) -> Result<(), String> {
        between(&before.components, &self.components, &after.components)?;
        between(&before.names, &self.names, &after.names)?;
        between(&before.graphs, &self.graphs, &after.graphs)?;
        between(&before.current, &self.current, &after.current)?;
        between(&before.artefacts, &self.artefacts, &after.artefacts)?;
        between(&before.records, &self.records, &after.records)
    }
}

fn between<K: Ord + std::fmt::Debug, V: PartialEq + std::fmt::Debug>(
    before: &BTreeMap<K, V>,
    found: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
) -> Result<(), String> {
    for key in before.keys().chain(found.keys()).chain(after.keys()) {
        let value = found.get(key);
        ensure(value == before.get(key) || value == after.get(key), || {
            format!("{key:?} is {value:?}, was {:?}, is to be {:?}", before.get(key), after.get(key))
        })?;
    }
    Ok(())
}

fn ensure(holds: bool, why: impl Fn() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

fn open(disk: &Simulated) -> Result<(Store, Vec<Finding>), Error> {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    Store::on(disk, limits())
}

/// No temporary file is left, and what the store counts is what is there.
fn is_tidy(disk: &Simulated, store: &Store) -> Result<(), String> {
    let files = disk.files();
    let left = files.keys().find(|(_, name)| name.ends_with(TEMPORARY));
    ensure(left.is_none(), || format!("{left:?} is left"))?;
    let (counted, there) = (store.usage().map_err(|e| e.to_string())?.bytes, files.values());
    let there: u64 = there.map(|bytes| taken(bytes.len() as u64)).sum();
    ensure(counted == there, || format!("counted {counted} bytes, and there are {there}"))
}

/// Does all of it, and then holds the store against the model.
fn all_of(disk: &Simulated, store: &Store, mut model: Model, ops: &[Op]) -> Result<Model, String> {
    for op in ops {
        let after = model.after(op);
        let result = model.run(store, op);
        ensure(result.is_ok() == after.is_some(), || format!("{op:?}: {result:?}"))?;
        model = after.unwrap_or(model);
    }
    let found = Model::of(store)?;
    ensure(found == model, || format!("{found:?} is not {model:?}"))?;
    is_tidy(disk, store)?;
    Ok(model)
}

/// Opens what has survived, while the power may fail again, and holds it against what was before and after.
fn recovers(survivor: &Simulated, before: &Model, after: &Model, ops: &[Op], seed: u64) -> Result<(), String> {
    survivor.fails_after(Chance(seed).below(16), Fault::Cut, seed);
    let opened = open(survivor);
    let last = if survivor.is_off() {
        survivor.survivor(seed ^ 1)
    } else {
        let (_, wrong) = opened.map_err(|e| e.to_string())?;
        ensure(wrong.is_empty(), || format!("found on opening: {wrong:?}"))?;
        survivor.same()
    };
    let (store, wrong) = open(&last).map_err(|e| e.to_string())?;
    ensure(wrong.is_empty(), || format!("found on opening again: {wrong:?}"))?;
    is_tidy(&last, &store)?;
    let found = Model::of(&store)?;
    found.is_between(before, after)?;
    // It goes on as a store does.
    all_of(&last, &store, found, ops).map(drop)
}

/// Cuts the power at this call.
fn cut_once(ops: &[Op], call: u64, seed: u64, lie: Option<Lie>) -> Result<(), String> {
    let disk = Simulated::new(ROOM).lying(lie);
    disk.fails_after(call, Fault::Cut, seed);
    let (mut before, mut after) = (Model::default(), Model::default());
    if let Ok((store, _)) = open(&disk) {
        for op in ops {
            let next = before.after(op);
            let refused = next.is_none();
            after = next.unwrap_or_else(|| before.clone());
            let result = before.run(&store, op);
            if disk.is_off() {
                if result.is_ok() {
                    // Acknowledged is what is new. That an old graph is gone is not.
                    let kept = before.graphs.clone();
                    before = after.clone();
                    for (number, graph) in kept {
                        before.graphs.entry(number).or_insert(graph);
                    }
                }
                break;
            }
            ensure(result.is_err() == refused, || format!("{op:?}: {result:?}"))?;
            before = after.clone();
        }
    }
    recovers(&disk.survivor(seed), &before, &after, ops, seed)
        .map_err(|why| format!("cut at call {call} with seed {seed}: {why}"))
}

/// Cuts the power at each call, and says how many there were.
fn cut_everywhere(ops: &[Op], seed: u64, lie: Option<Lie>) -> Result<u64, String> {
    let disk = Simulated::new(ROOM).lying(lie);
    let (store, _) = open(&disk).map_err(|e| e.to_string())?;
    all_of(&disk, &store, Model::default(), ops)?;
    let calls = disk.calls();
    for call in 0..=calls {
        for again in 0..3 {
            cut_once(ops, call, seed.wrapping_add(call * 3 + again), lie)?;
        }
    }
    Ok(calls)
}

/// Some of everything.
fn a_bit_of_everything() -> Vec<Op> {
    vec![
        Op::Upload(0),
        Op::Upload(3),
        Op::SetName(0, 3),
        Op::Append(vec![0], 1),
        Op::SetCurrent(0),
        Op::Artefact(0, 0, 9),
        Op::Record(0, 7),
        Op::SetName(0, 0),
        Op::Collect(None),
        Op::Upload(4),
        Op::Record(0, 8),
        Op::Note(0, 3),
        Op::RemoveName(0),
        Op::RemoveRecord(0),
    ]
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn whenever_the_power_fails_what_was_acknowledged_is_there(
        ops in proptest::collection::vec(op(), 1..16),
        seed in any::<u64>(),
    ) {
        let held = cut_everywhere(&ops, seed, None);
        prop_assert!(held.is_ok(), "{}", held.unwrap_err());
    }

    /// A call fails, and the store goes on or stops; then the power fails.
    #[test]
    fn whichever_call_fails_nothing_is_half_done(
        ops in proptest::collection::vec(op(), 1..16),
        seed in any::<u64>(),
        full in any::<bool>(),
    ) {
        let counted = Simulated::new(ROOM);
        let (store, _) = open(&counted).unwrap();
        let begins = counted.calls();
        all_of(&counted, &store, Model::default(), &ops).unwrap();
        for call in 0..counted.calls() - begins {
            let held = fail_once(&ops, call, seed.wrapping_add(call), if full { Errno::NOSPC } else { Errno::IO });
            prop_assert!(held.is_ok(), "call {} fails: {}", call, held.unwrap_err());
        }
    }

    #[test]
    fn on_a_disk_that_fills_up_nothing_partial_is_left(
        ops in proptest::collection::vec(op(), 1..30),
        blocks in 10..60_u64,
        own in any::<bool>(),
    ) {
        let disk = Simulated::new(if own { ROOM } else { blocks * 4096 });
        let limits = Limits { bytes: if own { blocks * 4096 } else { ROOM }, ..limits() };
        let opened = Store::on(Arc::new(disk.clone()), limits);
        if let Ok((store, _)) = opened {
            let mut model = Model::default();
            for op in &ops {
                let result = model.run(&store, op);
                match model.after(op) {
                    _ if matches!(result, Err(Error::Full { .. })) => {}
                    Some(after) => {
                        prop_assert!(result.is_ok(), "{:?}: {:?}", op, result);
                        model = after;
                    }
                    None => prop_assert!(result.is_err(), "{:?}", op),
                }
                prop_assert_eq!(Model::of(&store), Ok(model.clone()));
                prop_assert_eq!(is_tidy(&disk, &store), Ok(()));
                prop_assert!(!own || store.usage().unwrap().bytes <= limits.bytes);
            }
            drop(store);
            disk.limit(ROOM);
            let (store, wrong) = open(&disk).unwrap();
            prop_assert!(wrong.is_empty(), "{:?}", wrong);
            prop_assert_eq!(Model::of(&store), Ok(model));
        } else {
            prop_assert!(matches!(opened, Err(Error::Full { .. })), "{:?}", opened.err());
        }
    }

    /// One file is damaged: of what is kept twice nothing is lost; of what is not, that alone is, by name.
    #[test]
    fn one_damaged_file_costs_itself_at_most(
        ops in proptest::collection::vec(op(), 8..30),
        which in any::<Index>(),
        how in 0..6,
        at in any::<Index>(),
    ) {
        let disk = Simulated::new(ROOM);
        let (store, _) = open(&disk).unwrap();
        let model = all_of(&disk, &store, Model::default(), &ops).unwrap();
        drop(store);
        let files = disk.files();
        let places: Vec<&(Dir, String)> = files.keys().collect();
        let (dir, file) = *which.get(&places);
        let mut bytes = files[&(*dir, file.clone())].clone();
        let damaged = match how {
            0 => None,
            1 => Some(Vec::new()),
            2 => Some(files[*at.get(&places)].clone()),
            _ if bytes.is_empty() => Some(vec![0]),
            3 => Some(bytes[..at.index(bytes.len())].to_vec()),
            4 => Some([&*bytes, b"\0"].concat()),
            _ => {
                bytes[at.index(files[&(*dir, file.clone())].len())] ^= 1 << at.index(8);
                Some(bytes)
            }
        };
        let same = damaged.as_ref() == files.get(&(*dir, file.clone()));
        disk.put(*dir, file, damaged.clone());
        let damaged_disk = disk.same();
        let (store, wrong) = open(&disk).unwrap();
        let others = |wrong: &[Finding], subject: &Subject| wrong.iter().any(|finding| finding.subject != *subject);
        match dir {
            _ if same => prop_assert_eq!(Model::of(&store), Ok(model)),
            Dir::Components => {
                let digest = Digest::from_hex(file).unwrap();
                let k = (0..SIZES.len()).find(|k| component(*k) == files[&(*dir, file.clone())]).unwrap();
                match store.component(&digest) {
                    Err(Error::Missing { .. }) => prop_assert!(damaged.is_none()),
                    Err(Error::Corrupt { .. }) => {
                        prop_assert!(damaged.is_some());
                        let quarantined = store.findings().pop().unwrap().quarantined.unwrap();
                        let now = disk.files();
                        prop_assert_eq!(now.get(&(Dir::Quarantine, quarantined)), damaged.as_ref());
                    }
                    other => prop_assert!(false, "{:?}", other),
                }
                prop_assert!(!store.has(&digest));
                prop_assert!(!others(&wrong, &Subject::Component(digest)), "{:?}", wrong);
                // Refetched, it is as if nothing had been.
                let _ = store.findings();
                model.run(&store, &Op::Upload(k)).unwrap();
                prop_assert_eq!(Model::of(&store), Ok(model));
            }
            Dir::Artefacts => {
                let mut model = model;
                let key = ArtefactKey::of_file(file).unwrap();
                let gone = *model.artefacts.keys().find(|(k, s)| super::tests::key(*k, *s) == key).unwrap();
                prop_assert_eq!(store.artefact(&key).unwrap(), None);
                let found = store.findings();
                prop_assert_eq!(found.len(), usize::from(damaged.is_some()));
                prop_assert!(!others(&found, &Subject::Artefact(key)) && wrong.is_empty());
                model.artefacts.remove(&gone);
                prop_assert_eq!(Model::of(&store), Ok(model));
            }
            _ => {
                prop_assert_eq!(Model::of(&store), Ok(model.clone()));
                // A copy that is missing is no more than what a power failure leaves.
                let silent = damaged.is_none() && file.ends_with(COPY);
                prop_assert_eq!(wrong.len(), usize::from(!silent), "{:?}", wrong);
                prop_assert!(wrong.iter().all(|finding| finding.outcome == Outcome::Restored), "{:?}", wrong);
                // And it is mended.
                drop(store);
                let (_, again) = open(&disk).unwrap();
                prop_assert!(again.is_empty(), "{:?}", again);
                let now = disk.files();
                prop_assert!(files.iter().all(|(place, bytes)| now.get(place) == Some(bytes)));
                // Also if the power fails meanwhile.
                for call in 0..30 {
                    let cut = damaged_disk.same();
                    cut.fails_after(call, Fault::Cut, call);
                    let _ = open(&cut);
                    let survivor = cut.survivor(call);
                    let (store, wrong) = open(&survivor).unwrap();
                    prop_assert!(wrong.iter().all(|finding| finding.outcome == Outcome::Restored), "{:?}", wrong);
                    prop_assert_eq!(Model::of(&store), Ok(model.clone()));
                    prop_assert_eq!(is_tidy(&survivor, &store), Ok(()));
                }
            }
        }
    }

    /// Which graph is current is known from the graphs, too, also after the power has failed in whatever changed that.
    #[test]
    fn with_both_copies_of_current_lost_the_same_graph_is_current(
        ops in proptest::collection::vec(op(), 1..30),
        damaged in any::<bool>(),
        call in any::<Index>(),
        seed in any::<u64>(),
    ) {
        let lost = |disk: &Simulated| {
            for name in ["current", "current.copy"] {
                disk.put(Dir::Root, name, damaged.then(|| b"damaged".to_vec()));
            }
        };
        let disk = Simulated::new(ROOM);
        let (store, _) = open(&disk).unwrap();
        let model = all_of(&disk, &store, Model::default(), &ops).unwrap();
        drop(store);
        let calls = disk.calls();
        lost(&disk);
        let (store, wrong) = open(&disk).unwrap();
        prop_assert_eq!(store.current_number(), model.current.get(&()).copied());
        prop_assert_eq!(wrong.iter().any(|f| f.outcome == Outcome::Recovered), !model.current.is_empty());
        prop_assert_eq!(Model::of(&store), Ok(model));
        drop(store);
        prop_assert_eq!(open(&disk).unwrap().1, vec![]);

        let cut = Simulated::new(ROOM);
        cut.fails_after(u64::try_from(call.index(usize::try_from(calls).unwrap())).unwrap(), Fault::Cut, seed);
        if let Ok((store, _)) = open(&cut) {
            let mut model = Model::default();
            for op in &ops {
                let next = model.after(op);
                let _ = model.run(&store, op);
                model = next.unwrap_or(model);
            }
        }
        let survivor = cut.survivor(seed);
        let current = open(&survivor).unwrap().0.current_number();
        lost(&survivor);
        prop_assert_eq!(open(&survivor).unwrap().0.current_number(), current);
    }

    /// Whatever is in the files: it opens or says why, nothing panics, and what it opened works.
    #[test]
    fn a_store_of_foreign_bytes_opens(
        files in proptest::collection::vec(
            (any::<Index>(), any::<bool>(), prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                "\\{\"(version|number|a)\":[0-9]{1,20}(,\"previous\":[0-9]{1,3})?\\}".prop_map(String::into_bytes),
                "\\{\"omega/x:[0-9]\":\"sha256:[0-9a-f]{63,64}\"\\}".prop_map(String::into_bytes),
                Just(br#"{"number":7,"previous":3,"manifest":"","file":"","images":{},"by":"","at_ns":0,"outcome":null}"#.to_vec()),
            ]),
            0..12,
        ),
    ) {
        const PLACES: [(Dir, &str); 16] = [
            (Dir::Root, "format"),
            (Dir::Root, "format.copy"),
            (Dir::Root, "names"),
            (Dir::Root, "names.copy"),
            (Dir::Root, "current"),
            (Dir::Root, "current.copy"),
            (Dir::Root, "lost+found"),
            (Dir::Graphs, "7"),
            (Dir::Graphs, "7.copy"),
            (Dir::Graphs, "9007199254740991"),
            (Dir::Graphs, "18446744073709551615"),
            (Dir::Records, "record-1"),
            (Dir::Records, "..copy"),
            (Dir::Components, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (Dir::Artefacts, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855-x"),
            (Dir::Quarantine, "18446744073709551615-x"),
        ];
        let disk = Simulated::new(ROOM);
        for (place, seal, bytes) in files {
            let (dir, name) = *place.get(&PLACES);
            let single = name.strip_suffix(COPY).unwrap_or(name);
            disk.put(dir, name, Some(if seal { form::sealed(dir, single, &bytes) } else { bytes }));
        }
        match open(&disk) {
            Ok((store, _)) => {
                let empty = Digest::of(b"");
                let _ = store.component(&empty);
                let _ = store.artefact(&ArtefactKey { component: empty, settings: "x".into() });
                let _ = store.record("record-1");
                prop_assert!(Model::default().run(&store, &Op::Upload(2)).is_ok());
                prop_assert!(store.set_name("omega/x:9", digest(2)).is_ok());
                if let Ok(number) = store.append_graph(NewGraph::default()) {
                    prop_assert!(store.set_current(number).is_ok());
                }
                prop_assert!(store.collect(&BTreeSet::new()).is_ok());
                drop(store);
                let (store, _) = open(&disk).unwrap();
                prop_assert_eq!(store.component(&digest(2)).unwrap(), component(2));
            }
            Err(e) => prop_assert!(matches!(e, Error::Newer { .. }), "{:?}", e),
        }
    }

    #[test]
    fn any_bytes_are_read_as_any_file_or_refused(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        text in "(\\{|\\}|\"|:|,|[0-9]|number|previous|version|sha256:[0-9a-f]{64}|omega/x|\\[|\\]){0,12}",
    ) {
        exercise::files(&bytes);
        exercise::files(text.as_bytes());
    }

    #[test]
    fn a_seal_is_of_these_bytes_in_this_place(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        at in any::<Index>(),
        bit in 0..8,
    ) {
        let mut file = form::sealed(Dir::Graphs, "7", &bytes);
        prop_assert_eq!(form::unsealed(Dir::Graphs, "7", &file), Ok(&*bytes));
        prop_assert!(form::unsealed(Dir::Graphs, "8", &file).is_err());
        prop_assert!(form::unsealed(Dir::Records, "7", &file).is_err());
        prop_assert!(form::unsealed(Dir::Graphs, "7", &file[..at.index(file.len())]).is_err());
        let at = at.index(file.len());
        file[at] ^= 1_u8 << bit;
        prop_assert!(form::unsealed(Dir::Graphs, "7", &file).is_err());
    }
}

/// One call fails with this error.
fn fail_once(ops: &[Op], call: u64, seed: u64, errno: Errno) -> Result<(), String> {
    let disk = Simulated::new(ROOM);
    let (store, _) = open(&disk).map_err(|e| e.to_string())?;
    disk.fails_after(call, Fault::Error(errno), seed);
    let (mut before, mut after) = (Model::default(), Model::default());
    for op in ops {
        let failed_before = disk.has_failed();
        let next = before.after(op);
        let refused = next.is_none();
        after = next.unwrap_or_else(|| before.clone());
        let result = before.run(&store, op);
        if store.state().settled().is_err() {
            // What this one left is open. Nothing is changed from here on, and everything can be read.
            let again = store.set_record("record-0", b"");
            ensure(matches!(again, Err(Error::Unsettled(_))), || format!("{again:?}"))?;
            Model::of(&store)?.is_between(&before, &after)?;
            break;
        }
        let hit = disk.has_failed() && !failed_before;
        match result {
            // Not done at all, or what failed was not needed.
            Err(Error::Full { .. } | Error::Io { .. }) if hit => after = before.clone(),
            result => ensure(result.is_err() == refused, || format!("{op:?}: {result:?}"))?,
        }
        let found = Model::of(&store)?;
        ensure(found == after, || format!("{op:?} leaves {found:?}, and not {after:?}"))?;
        before = after.clone();
    }
    drop(store);
    recovers(&disk.survivor(seed), &before, &after, ops, seed)
}

/// Would miss, if it passed wrongly: that what was half removed looks as if it had been lost.
#[test]
fn what_is_removed_is_gone_or_there_whenever_the_power_fails() {
    let appended = (0..6).map(|by| Op::Append(vec![], by));
    let ops: Vec<Op> = [Op::Record(0, 1), Op::RemoveRecord(0), Op::Record(1, 2)].into_iter().chain(appended).collect();
    for seed in 0..32 {
        cut_everywhere(&ops, seed << 32, None).unwrap();
    }
}

#[test]
fn a_disk_that_does_not_keep_its_promises_is_found_out() {
    let ops = a_bit_of_everything();
    let calls = (0..4).map(|seed| cut_everywhere(&ops, seed, None).unwrap()).max().unwrap();
    assert!(calls > 100, "{calls}");
    for lie in [Lie::File, Lie::Directory, Lie::Rename] {
        let found = (0..4).filter(|seed| cut_everywhere(&ops, *seed, Some(lie)).is_err()).count();
        assert_eq!(found, 4, "{lie:?}");
    }
}

/// What is lost if both copies are, and that the rest goes on.
#[test]
fn what_is_damaged_twice_is_named_and_the_rest_serves() {
    let disk = Simulated::new(ROOM);
    let (store, _) = open(&disk).unwrap();
    let ops = [
        Op::Upload(0),
        Op::SetName(0, 0),
        Op::Append(vec![0], 1),
        Op::SetCurrent(0),
        Op::Append(vec![0], 2),
        Op::Record(0, 1),
    ];
    let model = all_of(&disk, &store, Model::default(), &ops).unwrap();
    store.set_current(2).unwrap();
    drop(store);
    let damaged = |dir, name: &str| {
        let disk = disk.same();
        disk.put(dir, name, Some(b"damaged".to_vec()));
        disk.put(dir, &format!("{name}{COPY}"), Some(b"damaged, too".to_vec()));
        let (store, wrong) = open(&disk).unwrap();
        let (lost, told): (Vec<_>, Vec<_>) = wrong.iter().partition(|finding| finding.outcome == Outcome::Lost);
        assert_eq!(lost.len(), 2, "{wrong:?}");
        assert!(lost.iter().all(|finding| finding.quarantined.is_some()));
        assert!(lost.iter().all(|finding| finding.to_string().contains("quarantine/")));
        let told: Vec<String> = told.into_iter().map(ToString::to_string).collect();
        let recovered =
            "current: both copies are lost; graph 2 was the last to be, and is again (recovered from the history)";
        assert_eq!(told, if name == "current" { vec![recovered] } else { Vec::new() });
        assert_eq!(store.usage().unwrap().quarantined, 2);
        assert_eq!(store.component(&digest(0)).unwrap(), component(0));
        drop(store);
        let (store, again) = open(&disk).unwrap();
        (store, wrong[0].subject.clone(), again)
    };

    let (store, subject, again) = damaged(Dir::Root, "names");
    assert_eq!((subject, store.names().len(), again), (Subject::Names, 0, vec![]));
    assert_eq!(store.current().unwrap().number, 2);

    let (store, subject, again) = damaged(Dir::Root, "current");
    assert_eq!((subject, again), (Subject::Current, vec![]));
    assert_eq!((store.current_number(), store.previous_of_current().unwrap().number), (Some(2), 1));

    let (store, subject, again) = damaged(Dir::Graphs, "2");
    assert_eq!(subject, Subject::Graph(2));
    assert_eq!(again.iter().map(|finding| &finding.subject).collect::<Vec<_>>(), [&Subject::Graph(2)]);
    assert_eq!((store.current(), store.current_number()), (None, Some(2)));
    assert_eq!(store.previous_of_current().unwrap().number, 1);
    assert_eq!(store.append_graph(NewGraph::default()).unwrap(), 3, "a number is given once");

    let (store, subject, again) = damaged(Dir::Records, "record-0");
    assert_eq!((subject, store.record("record-0").unwrap(), again), (Subject::Record("record-0".into()), None, vec![]));

    let (store, subject, again) = damaged(Dir::Root, "format");
    assert_eq!((subject, again), (Subject::Format, vec![]));
    assert_eq!(store.names().len(), model.names.len());
}

#[test]
fn a_missing_component_is_named_when_the_store_is_opened_and_when_it_is_read() {
    let disk = Simulated::new(ROOM);
    let (store, _) = open(&disk).unwrap();
    all_of(&disk, &store, Model::default(), &[Op::Upload(0), Op::SetName(0, 0)]).unwrap();
    disk.put(Dir::Components, &digest(0).hex(), None);
    assert!(matches!(store.component(&digest(0)), Err(Error::Missing { .. })));
    assert_eq!(store.findings()[0].subject, Subject::Component(digest(0)));
    assert!(!store.has(&digest(0)));
    drop(store);
    let (store, wrong) = open(&disk).unwrap();
    assert_eq!(wrong.len(), 1);
    assert_eq!(wrong[0].subject, Subject::Component(digest(0)));
    assert!(wrong[0].why.contains("omega/x:0"), "{}", wrong[0]);
    assert_eq!(store.resolve("omega/x:0"), Some(digest(0)), "known, so that it can be fetched again");
}

/// Would miss, if it passed wrongly: that an appliance which went back a version destroys what the newer one wrote.
#[test]
fn a_newer_format_is_refused_and_nothing_is_changed() {
    let disk = Simulated::new(ROOM);
    let newer = form::sealed(Dir::Root, "format", br#"{"version":2,"also":"this"}"#);
    disk.put(Dir::Root, "format", Some(b"damaged".to_vec()));
    disk.put(Dir::Root, "format.copy", Some(newer));
    disk.put(Dir::Root, "names.new", Some(b"half".to_vec()));
    disk.put(Dir::Components, "strange", Some(b"new here".to_vec()));
    let (before, calls) = (disk.files(), disk.calls());
    assert!(matches!(open(&disk), Err(Error::Newer { found: 2, known: VERSION })));
    assert_eq!((disk.files(), disk.calls()), (before, calls));
}

/// Would miss, if it passed wrongly: that a version cannot read what earlier ones wrote.
#[test]
fn what_version_1_wrote_is_read() {
    let disk = Simulated::new(ROOM);
    let none = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let put = |dir, name: &str, body: &str, seal: &str| {
        disk.put(dir, name, Some(format!("{body}\nsha256:{seal}\n").into_bytes()));
    };
    disk.put(Dir::Components, &none[7..], Some(Vec::new()));
    let seals = [
        "cc8c21c6413820923e1c51b0bddf8b9aa0347845b23ef49825b88f6fbe4dffee",
        "ff936ebdbe6dc366bfc1609b36653d8e42a657fb7a49ec97a6943901d9da302c",
        "fa4a79ae3253d5e354749ca777a80338fd02f0eec76b0825a93c285f791db9ff",
        "654eba8adb520d373a09d4d7472d46302f4fe83d489f718f3dc2d9361df9daf0",
        "d11e904fb07099675834289c93af5a084fb1f5c5f718d5d5befbd2adc55df6ae",
        "fa106ce3ee48141d38ae08e9f16de9dc9950577275c06c55cf86a564ef1dd428",
    ];
    put(Dir::Root, "format", r#"{"version":1}"#, seals[0]);
    put(Dir::Root, "names", &format!(r#"{{"omega/none:1":"{none}"}}"#), seals[1]);
    put(Dir::Root, "current", r#"{"number":7,"previous":6}"#, seals[2]);
    let graph = format!(
        r#"{{"number":7,"previous":6,"manifest":"[brane.x]","file":"x.zgraph.toml","images":{{"omega/none:1":"{none}"}},"by":"me","at_ns":1,"outcome":"served"}}"#
    );
    put(Dir::Graphs, "7", &graph, seals[3]);
    put(Dir::Records, "device-key", "secret", seals[4]);
    put(Dir::Artefacts, &format!("{}-x", &none[7..]), "code", seals[5]);
    let (store, wrong) = open(&disk).unwrap();
    assert_eq!(wrong, []);
    let digest: Digest = none.parse().unwrap();
    assert_eq!(store.names(), [("omega/none:1".to_owned(), digest)]);
    let graph = store.current().unwrap();
    assert_eq!((graph.number, graph.previous, graph.outcome.as_deref()), (7, Some(6), Some("served")));
    assert_eq!((graph.images["omega/none:1"], graph.at_ns), (digest, 1));
    assert_eq!(store.record("device-key").unwrap().unwrap(), b"secret");
    let key = ArtefactKey { component: digest, settings: "x".into() };
    assert_eq!(store.artefact(&key).unwrap().unwrap(), b"code");
}

#[test]
fn a_disk_that_can_only_be_read_is_served_from() {
    let disk = Simulated::new(ROOM);
    let (store, _) = open(&disk).unwrap();
    let model = all_of(&disk, &store, Model::default(), &a_bit_of_everything()).unwrap();
    drop(store);
    disk.put(Dir::Root, "names.copy", Some(b"damaged".to_vec()));
    disk.put(Dir::Graphs, "1.new", Some(b"half".to_vec()));
    disk.read_only();
    let (store, wrong) = open(&disk).unwrap();
    assert!(wrong.iter().any(|finding| finding.subject == Subject::Names), "{wrong:?}");
    assert_eq!(Model::of(&store), Ok(model));
    assert!(store.upload().is_err() && store.set_record("x", b"").is_err());
}

/// Would miss, if it passed wrongly: that the device's key is thrown away because too many files were open.
#[test]
fn what_a_process_cannot_open_is_not_taken_for_damaged() {
    let disk = Simulated::new(ROOM);
    let (store, _) = open(&disk).unwrap();
    let model = all_of(&disk, &store, Model::default(), &a_bit_of_everything()[..12]).unwrap();
    for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS] {
        disk.refuses_to_open(Some(errno));
        assert!(matches!(store.record("record-0"), Err(Error::Io { .. })));
        assert!(matches!(store.component(&digest(0)), Err(Error::Io { .. })));
        assert!(matches!(store.artefact(&key(0, 0)), Err(Error::Io { .. })));
        assert!(matches!(open(&disk), Err(Error::Io { .. })));
        disk.refuses_to_open(None);
        assert_eq!(Model::of(&store).as_ref(), Ok(&model));
    }
}

#[test]
fn everything_has_its_bounds() {
    let limits = Limits { component_bytes: 10, artefact_bytes: 10, names: 2, ..limits() };
    let disk = Simulated::new(ROOM);
    let (store, _) = Store::on(Arc::new(disk.clone()), limits).unwrap();
    let mut upload = store.upload().unwrap();
    upload.append(&[0; 10]).unwrap();
    assert!(matches!(upload.append(&[0]), Err(Error::TooLarge { limit: 10, .. })));
    assert!(upload.append(&[]).is_err(), "nothing follows what was refused");
    assert!(upload.finish(None).is_err());
    let mut upload = store.upload().unwrap();
    upload.append(&[1; 10]).unwrap();
    assert!(matches!(upload.finish(Some(digest(1))), Err(Error::Differs { .. })));
    assert_eq!(is_tidy(&disk, &store), Ok(()));

    let mut upload = store.upload().unwrap();
    upload.append(&[1; 10]).unwrap();
    let ten = upload.finish(None).unwrap();
    let key = ArtefactKey { component: ten, settings: "x".into() };
    assert!(matches!(store.put_artefact(&key, [0; 11].as_slice()), Err(Error::TooLarge { .. })));
    store.put_artefact(&key, [0; 10].as_slice()).unwrap();
    assert_eq!(store.artefact(&key).unwrap().unwrap(), [0; 10]);
    let bad = ArtefactKey { component: ten, settings: "../x".into() };
    assert!(matches!(store.put_artefact(&bad, [].as_slice()), Err(Error::Word(_))));

    store.set_name("a", ten).unwrap();
    store.set_name("b", ten).unwrap();
    assert!(matches!(store.set_name("c", ten), Err(Error::TooMany { limit: 2, .. })));
    store.set_name("b", ten).unwrap();
    assert!(matches!(store.set_name("../b", ten), Err(Error::Name { .. })));
    assert!(matches!(store.set_name("d", digest(1)), Err(Error::Missing { .. })));

    let large = NewGraph { manifest: "x".repeat((1 << 20) + 1), ..NewGraph::default() };
    assert!(matches!(store.append_graph(large), Err(Error::TooLarge { .. })));
    let large = NewGraph { manifest: "\u{1}".repeat(1 << 20), ..NewGraph::default() };
    let number = store.append_graph(large).unwrap();
    store.note(number, &"é".repeat(1000)).unwrap();
    assert_eq!(store.graph(number).unwrap().outcome.as_ref().unwrap().len(), 1024);
    assert!(matches!(store.set_current(9), Err(Error::NoGraph(9))));
    assert!(matches!(
        store.append_graph(NewGraph { images: [("x".into(), digest(1))].into(), ..NewGraph::default() }),
        Err(Error::Missing { .. })
    ));

    assert!(matches!(store.set_record("x", &vec![0; 69_633]), Err(Error::TooLarge { .. })));
    assert!(matches!(store.set_record("x.copy", b""), Err(Error::Word(_))));
    for r in 0..256 {
        store.set_record(&record(r), b"").unwrap();
    }
    assert!(matches!(store.set_record("one-more", b""), Err(Error::TooMany { limit: 256, .. })));
    assert_eq!(store.record("record-9").unwrap().unwrap(), b"");
    drop(store);
    let (store, wrong) = Store::on(Arc::new(disk), limits).unwrap();
    assert_eq!((wrong, store.graph(number).unwrap().manifest.len()), (vec![], 1 << 20));
}

#[test]
fn the_quarantine_keeps_the_newest_within_its_bounds() {
    let limits = Limits { quarantine_files: 3, quarantine_bytes: 4 * 4096, ..limits() };
    let disk = Simulated::new(ROOM);
    let (store, _) = Store::on(Arc::new(disk.clone()), limits).unwrap();
    let mut newest = Vec::new();
    for k in [0, 1, 2, 3, 4] {
        Model::default().run(&store, &Op::Upload(k)).unwrap();
        disk.put(Dir::Components, &digest(k).hex(), Some(vec![0; SIZES[k]]));
        assert!(matches!(store.component(&digest(k)), Err(Error::Corrupt { .. })));
        newest.push(store.findings().pop().unwrap().quarantined.unwrap());
    }
    // 9000 bytes are three blocks, 5000 two: of the last two there is room for one.
    let held: Vec<String> =
        disk.files().into_keys().filter(|(dir, _)| *dir == Dir::Quarantine).map(|(_, n)| n).collect();
    assert_eq!(held, [newest[4].clone()]);
}

#[test]
fn full_components_leave_room_to_go_back_to_another_graph() {
    let disk = Simulated::new(ROOM);
    let limits = Limits { bytes: 4 << 20, ..limits() };
    let (store, _) = Store::on(Arc::new(disk.clone()), limits).unwrap();
    store.append_graph(NewGraph::default()).unwrap();
    store.append_graph(NewGraph::default()).unwrap();
    let mut upload = store.upload().unwrap();
    let piece = vec![1; 65536];
    let full = (0..).find_map(|_| upload.append(&piece).err()).unwrap();
    assert!(matches!(full, Error::Full { needed: 65536, free } if free < 65536), "{full}");
    assert!(store.usage().unwrap().bytes > 3 << 20, "promised while the upload is there");
    store.set_current(1).unwrap();
    store.note(2, "no room").unwrap();
    drop(upload);
    assert_eq!(is_tidy(&disk, &store), Ok(()));
}

// On a real disk.

fn directory() -> (tempfile::TempDir, OwnedFd) {
    let directory = tempfile::tempdir().unwrap();
    let open = File::open(directory.path()).unwrap().into();
    (directory, open)
}

#[test]
fn a_real_directory_behaves_as_the_simulated_one() {
    let (path, open) = directory();
    std::fs::create_dir(path.path().join("lost+found")).unwrap();
    std::fs::write(path.path().join("other"), "of somebody else").unwrap();
    let (store, wrong) = Store::open(&open, limits()).unwrap();
    assert_eq!(wrong, []);
    let mut model = Model::default();
    for op in a_bit_of_everything() {
        let next = model.after(&op);
        assert_eq!(model.run(&store, &op).is_ok(), next.is_some(), "{op:?}");
        model = next.unwrap_or(model);
        assert_eq!(Model::of(&store).as_ref(), Ok(&model));
    }
    drop(store);
    std::fs::write(path.path().join("components/7.new"), "half").unwrap();
    std::fs::write(path.path().join("graphs/notes"), "?").unwrap();
    symlink("../other", path.path().join("components").join(digest(5).hex())).unwrap();
    let (store, wrong) = Store::open(&open, limits()).unwrap();
    let foreign: Vec<String> = wrong.iter().map(ToString::to_string).collect();
    assert_eq!(foreign.len(), 2, "{foreign:?}");
    assert!(foreign.iter().any(|line| line.starts_with("file graphs/notes: ")), "{foreign:?}");
    assert!(matches!(store.component(&digest(5)), Err(Error::Corrupt { .. })), "links are not followed");
    let _ = store.findings();
    assert_eq!(Model::of(&store).as_ref(), Ok(&model));
    assert_eq!(std::fs::read(path.path().join("other")).unwrap(), b"of somebody else");

    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(path.path().join("records")), mode(path.path().join("names"))), (0o700, 0o600));
    store.set_record("device-key", b"secret").unwrap();
    assert_eq!(mode(path.path().join("records/device-key.copy")), 0o600);
    let mut upload = store.upload().unwrap();
    upload.append(b"half").unwrap();
    drop(upload);
    let left = std::fs::read_dir(path.path().join("components")).unwrap();
    assert!(left.flatten().all(|entry| !entry.file_name().to_string_lossy().ends_with(TEMPORARY)));
}

#[test]
fn a_store_has_one_opener() {
    let (path, open) = directory();
    let (store, _) = Store::open(&open, limits()).unwrap();
    assert!(matches!(Store::open(&open, limits()), Err(Error::InUse)), "through the descriptor that was handed down");
    let other = File::open(path.path()).unwrap();
    assert!(matches!(Store::open(&other, limits()), Err(Error::InUse)));
    let upload = store.upload().unwrap();
    drop(store);
    assert!(matches!(Store::open(&other, limits()), Err(Error::InUse)), "an upload is under way");
    drop(upload);
    Store::open(&other, limits()).unwrap();
}

#[test]
fn threads_share_a_store() {
    let (_path, open) = directory();
    let (store, _) = Store::open(&open, limits()).unwrap();
    std::thread::scope(|scope| {
        for k in 0..SIZES.len() {
            let store = &store;
            scope.spawn(move || {
                for turn in 0..5 {
                    let kept: BTreeSet<Digest> = (0..SIZES.len()).map(digest).collect();
                    Model::default().run(store, &Op::Upload(k)).unwrap();
                    store.set_name(&format!("omega/t{k}:{turn}"), digest(k)).unwrap();
                    assert_eq!(store.component(&digest(k)).unwrap(), component(k));
                    store.put_artefact(&key(k, 0), artefact(k, 0, 1).as_slice()).unwrap();
                    store.collect(&kept).unwrap();
                }
            });
        }
    });
    assert_eq!((store.names().len(), store.usage().unwrap().artefacts), (30, 6));
    assert_eq!(store.findings(), []);
}

#[test]
fn a_record_that_means_nothing_is_set_aside_with_its_copy_and_the_others_stay() {
    let disk = Simulated::new(ROOM);
    let (store, _) = open(&disk).unwrap();
    for name in ["secret-b", "secret-a", "device-key"] {
        store.set_record(name, name.as_bytes()).unwrap();
    }
    assert_eq!(store.records("secret-"), ["secret-a", "secret-b"]);
    store.set_record_aside("secret-a", "it does not open").unwrap();
    let told: Vec<String> = store.findings().iter().map(ToString::to_string).collect();
    assert!(told.len() == 2 && told.iter().all(|line| line.starts_with("record secret-a: it does not open (lost; ")));
    assert_eq!((store.records("secret-"), store.usage().unwrap().quarantined), (vec!["secret-b".to_owned()], 2));
    assert_eq!(store.record("secret-a").unwrap(), None);
    assert!(store.set_record_aside("secret-a", "again").is_ok() && store.findings().is_empty());
    drop(store);
    let (store, wrong) = open(&disk).unwrap();
    assert!(wrong.is_empty() && store.record("secret-a").unwrap().is_none(), "{wrong:?}");
    assert_eq!(store.record("secret-b").unwrap().as_deref(), Some(&b"secret-b"[..]));
}
