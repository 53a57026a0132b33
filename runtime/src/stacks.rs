//! Stack samples: where guests are when a tick comes. A worker keeps them as a tree of calls for each brane in shared memory;
//! whoever reads follows the nodes to their root.
//!
//! ```text
//! nodes   0 the root │ 1 handle, of 0 │ 2 spin, of 1 │ …      each: the node that called it, its name, ticks spent in itself
//! text    length, name │ length, name │ …
//! ```
//!
//! - A sample weighs a tick. It is taken when the tick came during the guest's own turn, so waiting is no part of it.
//! - No more than [`DEPTH`] frames, from the youngest; what is above them is one frame, `[deeper]`.
//! - When there is no room for a node or a name, the sample counts for the caller that is there, and is counted as shortened.
//! - Taking samples costs a brane a hundredth of its time at most: after one that took longer it has some ticks of rest, which the
//!   next sample weighs as well.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use wasmtime::{AsContext, FrameInfo, WasmBacktrace};

use crate::histogram::{add, nanos};
use crate::statistics::Profiles;
use crate::worker::turns::TICK;

/// The most frames of a sample.
pub const DEPTH: usize = 64;
/// What Wasmtime shall follow: one more, so that it is seen when there are more.
pub const FOLLOWED: NonZeroUsize = NonZeroUsize::new(DEPTH + 1).unwrap();
/// The longest name of a function in a component whose stacks are sampled, in bytes: Wasmtime copies the names of all frames each time.
pub const LONGEST_NAME: u64 = 4096;
/// What is kept of a name, in bytes.
const NAME: usize = 240;
/// Nodes of a brane in one worker.
pub const NODES: usize = 2048;
/// Words of a brane's names in one worker.
pub const TEXT: usize = 4096;
/// Words before the nodes.
const HEAD: usize = 8;
/// Words of a tree in shared memory.
pub const WORDS: usize = HEAD + 2 * NODES + TEXT;
/// A sample may take this part of a guest's time.
const COST: u64 = 100;
/// What is above the frames that are followed.
const DEEPER: &str = "[deeper]";

/// The tree of one brane's calls, in shared memory. There must be one writer to it.
#[repr(C)]
#[derive(Debug)]
pub struct Tree {
    /// Nodes in use, with the root.
    nodes: AtomicU64,
    /// Samples that were taken.
    samples: AtomicU64,
    /// Samples that had more than [`DEPTH`] frames.
    deeper: AtomicU64,
    /// Samples that count for a caller, because there was no more room.
    shortened: AtomicU64,
    /// What the samples took, in nanoseconds.
    took: AtomicU64,
    reserved: [AtomicU64; HEAD - 5],
    /// Of each node: the number of its caller and the place of its name, 32 bits each; and its ticks.
    calls: [[AtomicU64; 2]; NODES],
    text: [AtomicU64; TEXT],
}

const _: () = assert!(size_of::<Tree>() == WORDS * 8);

/// Takes the samples of one brane in one worker.
#[derive(Debug)]
pub struct Sampler {
    profiles: Arc<Profiles>,
    index: usize,
    /// Nodes in use, by their caller and their name's place.
    nodes: HashMap<(usize, usize), usize>,
    /// Places of names, by what a hash makes of module, number and name of a function: with keys that no guest knows.
    names: HashMap<u64, usize>,
    keys: RandomState,
    /// Words of text in use.
    text: usize,
    /// Ticks that no sample has been taken for.
    owed: u64,
    /// Ticks until the next sample may be taken.
    rest: u64,
}

impl Sampler {
    /// Of the brane with this place.
    #[must_use]
    pub fn new(profiles: Arc<Profiles>, index: usize) -> Self {
        Self {
            profiles,
            index,
            nodes: HashMap::new(),
            names: HashMap::new(),
            keys: RandomState::new(),
            text: 0,
            owed: 0,
            rest: 0,
        }
    }

    /// A tick has come while this guest had its turn, and here it is. It is one tick, too, if more have come since it was seen last: where
    /// others use the core that is time which the guest did not have.
    pub fn ticked(&mut self, store: impl AsContext) {
        self.owed += 1;
        self.rest = self.rest.saturating_sub(1);
        if self.rest > 0 {
            return;
        }
        let began = Instant::now();
        let trace = WasmBacktrace::force_capture(store);
        self.sample(trace.frames());
        // Its own time counts among the guest's, so it must not be more than a part of it.
        let took = nanos(began.elapsed());
        self.rest = took.saturating_mul(COST) / nanos(TICK);
        if let Some(profile) = self.profiles.of(self.index) {
            add(&profile.stacks.took, took);
        }
    }

    /// Counts a sample: its frames, the youngest first.
    fn sample(&mut self, frames: &[FrameInfo]) {
        let is_deeper = frames.len() > DEPTH;
        let frames = &frames[..frames.len().min(DEPTH)];
        let profiles = Arc::clone(&self.profiles);
        let Some(tree) = profiles.of(self.index).map(|profile| &profile.stacks) else { return };
        self.begun(tree);
        let mut place = Some(0);
        if is_deeper {
            add(&tree.deeper, 1);
            place = self.named(tree, self.keys.hash_one(DEEPER), || DEEPER.into()).and_then(|n| self.node(tree, 0, n));
        }
        let mut at = place.unwrap_or(0);
        for frame in frames.iter().rev() {
            let module = frame.module().name();
            let known = self.keys.hash_one((module, frame.func_index(), frame.func_name()));
            place = self.named(tree, known, || shown(module, frame.func_index(), frame.func_name()));
            place = place.and_then(|name| self.node(tree, at, name));
            match place {
                Some(node) => at = node,
                None => break,
            }
        }
        if place.is_none() {
            add(&tree.shortened, 1);
        }
        if let Some([_, ticks]) = tree.calls.get(at) {
            add(ticks, std::mem::take(&mut self.owed));
        }
        add(&tree.samples, 1);
    }

    /// Makes the root, if there is none.
    fn begun(&mut self, tree: &Tree) {
        if self.nodes.is_empty() {
            self.nodes.insert((usize::MAX, usize::MAX), 0);
            tree.nodes.store(1, Release);
        }
    }

    /// The node of a function where this one has called it; none, if there is no room for it.
    fn node(&mut self, tree: &Tree, caller: usize, name: usize) -> Option<usize> {
        if let Some(node) = self.nodes.get(&(caller, name)) {
            return Some(*node);
        }
        let node = self.nodes.len();
        let [call, _] = tree.calls.get(node)?;
        call.store((caller as u64) << 32 | name as u64, Relaxed);
        tree.nodes.store(node as u64 + 1, Release);
        self.nodes.insert((caller, name), node);
        Some(node)
    }

    /// The place of a name; none, if there is no room for it.
    fn named(&mut self, tree: &Tree, known: u64, name: impl FnOnce() -> String) -> Option<usize> {
        if let Some(place) = self.names.get(&known) {
            return Some(*place);
        }
        let name = name();
        let bytes = &name.as_bytes()[..name.floor_char_boundary(NAME)];
        let words = 1 + bytes.len().div_ceil(8);
        let place = self.text;
        let [length, text @ ..] = tree.text.get(place..place + words)? else { return None };
        length.store(bytes.len() as u64, Relaxed);
        for (word, piece) in text.iter().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..piece.len()].copy_from_slice(piece);
            word.store(u64::from_ne_bytes(whole), Relaxed);
        }
        self.text += words;
        self.names.insert(known, place);
        Some(place)
    }
}

/// A text that grows no further than what is kept of a name.
struct Short(String);

impl std::fmt::Write for Short {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = NAME.saturating_sub(self.0.len());
        self.0.push_str(&text[..text.floor_char_boundary(room)]);
        if text.len() > room { Err(std::fmt::Error) } else { Ok(()) }
    }
}

/// How a function is called: by its name in the component, as its language writes it, or by its module and number.
fn shown(module: Option<&str>, number: u32, name: Option<&str>) -> String {
    let mut text = Short(String::new());
    let _ = match name.filter(|name| !name.is_empty()) {
        Some(name) => match rustc_demangle::try_demangle(name) {
            // Without the hash at its end.
            Ok(name) => write!(text, "{name:#}"),
            Err(_) => text.write_str(name),
        },
        None => write!(text, "{:.200}[{number}]", module.unwrap_or("module")),
    };
    printable(&text.0)
}

/// A name without anything that moves a cursor, breaks a line or cannot be seen.
fn printable(name: &str) -> String {
    let seen = |c: &char| {
        !c.is_control()
            && !matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let name: String = name.chars().filter(seen).collect();
    if name.is_empty() { "[no name]".into() } else { name }
}

/// A function in a tree of calls, as it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The place of its caller in the list of nodes, which is before its own; none of a root.
    pub caller: Option<u32>,
    /// The place of its name in the list of names.
    pub name: u32,
    /// Ticks that were spent in itself.
    pub ticks: u64,
}

/// The samples of a brane. Numbers only grow.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stacks {
    /// Samples that were taken.
    pub samples: u64,
    /// Samples that had more frames than are followed: what is above these is `[deeper]`.
    pub deeper: u64,
    /// Samples that count for a caller, because there was no more room.
    pub shortened: u64,
    /// What the samples took, in nanoseconds: part of the guest's time.
    pub took_ns: u64,
    /// The functions' names.
    pub names: Vec<String>,
    /// The calls, callers first.
    pub nodes: Vec<Node>,
}

impl Stacks {
    /// Reads a tree's words as they lie in shared memory. Nothing that stands there is trusted: what cannot be is left out.
    #[must_use]
    pub fn of(words: &[u64]) -> Self {
        let word = |at: usize| words.get(at).copied().unwrap_or(0);
        let number = usize::try_from(word(0)).unwrap_or(NODES).min(NODES);
        let mut all =
            Self { samples: word(1), deeper: word(2), shortened: word(3), took_ns: word(4), ..Self::default() };
        let mut places = BTreeMap::new();
        let text = HEAD + 2 * NODES;
        // Of each node that is there, its place in the list. The root has none.
        let mut listed: Vec<Option<u32>> = vec![None; number];
        let root = word(HEAD + 1);
        for node in 1..number {
            let (call, ticks) = (word(HEAD + 2 * node), word(HEAD + 2 * node + 1));
            let caller = usize::try_from(call >> 32).unwrap_or(usize::MAX);
            let name = usize::try_from(call & u64::from(u32::MAX)).unwrap_or(usize::MAX);
            // Callers come first, so no way up is without an end.
            if caller >= node || name >= TEXT {
                continue;
            }
            let name = *places.entry(name).or_insert_with(|| {
                let length = usize::try_from(word(text + name)).unwrap_or(NAME).min(NAME);
                let bytes = words.iter().take(text + TEXT).skip(text + name + 1).take(length.div_ceil(8));
                let mut bytes: Vec<u8> = bytes.flat_map(|word| word.to_ne_bytes()).collect();
                bytes.truncate(length);
                all.names.push(printable(&String::from_utf8_lossy(&bytes)));
                all.names.len() - 1
            });
            let (Ok(name), Ok(place)) = (u32::try_from(name), u32::try_from(all.nodes.len())) else { continue };
            all.nodes.push(Node { caller: listed[caller], name, ticks });
            listed[node] = Some(place);
        }
        if root > 0 {
            // Samples with no frame that could be told.
            all.nodes.push(Node { caller: None, name: u32::try_from(all.names.len()).unwrap_or(0), ticks: root });
            all.names.push("[unknown]".into());
        }
        all
    }

    /// Ticks that were spent in each stack, its root first.
    #[must_use]
    pub fn folded(&self) -> BTreeMap<Vec<&str>, u64> {
        let mut ways: Vec<Vec<&str>> = Vec::with_capacity(self.nodes.len());
        let mut all = BTreeMap::new();
        for node in &self.nodes {
            let mut way = match node.caller {
                Some(caller) => ways.get(caller as usize).cloned().unwrap_or_default(),
                None => Vec::new(),
            };
            way.push(self.names.get(node.name as usize).map_or("[unknown]", String::as_str));
            // No appliance tells of more.
            way.truncate(DEPTH + 1);
            if node.ticks > 0 {
                let ticks: &mut u64 = all.entry(way.clone()).or_default();
                *ticks = ticks.saturating_add(node.ticks);
            }
            ways.push(way);
        }
        all
    }

    /// Ticks in all.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        self.nodes.iter().fold(0, |sum, node| sum.saturating_add(node.ticks))
    }

    /// What has been sampled since it was `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let then = before.folded();
        let mut all = Gathered::default();
        for (way, ticks) in self.folded() {
            let ticks = ticks.saturating_sub(then.get(&way).copied().unwrap_or(0));
            if ticks > 0 {
                all.add(&way, ticks, usize::MAX);
            }
        }
        all.stacks.samples = self.samples.saturating_sub(before.samples);
        all.stacks.deeper = self.deeper.saturating_sub(before.deeper);
        all.stacks.shortened = self.shortened.saturating_sub(before.shortened);
        all.stacks.took_ns = self.took_ns.saturating_sub(before.took_ns);
        all.stacks
    }
}

/// Puts trees together.
#[derive(Debug, Clone, Default)]
pub struct Gathered {
    /// What they are together.
    pub stacks: Stacks,
    names: HashMap<String, u32>,
    nodes: HashMap<(Option<u32>, u32), u32>,
}

/// Nodes of several workers' trees together, at most.
const MERGED: usize = 4 * NODES;

impl Gathered {
    /// Adds a tree. Beyond so many nodes, or as many as four workers have, samples count for their callers, and are told as shortened.
    pub fn merge(&mut self, other: &Stacks, most: usize) {
        for (way, ticks) in other.folded() {
            self.add(&way, ticks, most.min(MERGED));
        }
        self.stacks.samples = self.stacks.samples.saturating_add(other.samples);
        self.stacks.deeper = self.stacks.deeper.saturating_add(other.deeper);
        self.stacks.shortened = self.stacks.shortened.saturating_add(other.shortened);
        self.stacks.took_ns = self.stacks.took_ns.saturating_add(other.took_ns);
    }

    fn add(&mut self, way: &[&str], ticks: u64, most: usize) {
        let mut at = None;
        for name in way {
            match self.node(at, name, most) {
                Some(node) => at = Some(node),
                None => {
                    self.stacks.shortened = self.stacks.shortened.saturating_add(1);
                    break;
                }
            }
        }
        if let Some(node) = at.and_then(|at| self.stacks.nodes.get_mut(at as usize)) {
            node.ticks = node.ticks.saturating_add(ticks);
        }
    }

    fn node(&mut self, caller: Option<u32>, name: &str, most: usize) -> Option<u32> {
        let known = self.names.get(name).copied();
        if let Some(node) = known.and_then(|name| self.nodes.get(&(caller, name))) {
            return Some(*node);
        }
        // A root always has a place, so that no tick is lost. There are few.
        let is_full = self.stacks.nodes.len() >= most;
        if is_full && (caller.is_some() || self.stacks.nodes.len() >= 2 * MERGED) {
            return None;
        }
        let name = match known {
            Some(known) => known,
            None => {
                let next = u32::try_from(self.stacks.names.len()).ok()?;
                self.stacks.names.push(name.to_owned());
                self.names.insert(name.to_owned(), next);
                next
            }
        };
        let node = u32::try_from(self.stacks.nodes.len()).ok()?;
        self.stacks.nodes.push(Node { caller, name, ticks: 0 });
        self.nodes.insert((caller, name), node);
        Some(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::Statistics;
    use proptest::prelude::*;

    /// A sampler, and the page that it writes to.
    fn sampler() -> (Sampler, Arc<Profiles>) {
        let profiles = Statistics::profiles(1);
        (Sampler::new(Arc::clone(&profiles), 0), profiles)
    }

    /// Counts a sample as if its frames had these names, the root first.
    fn sample(sampler: &mut Sampler, names: &[String], ticks: u64) {
        let profiles = Arc::clone(&sampler.profiles);
        let tree = &profiles.of(0).unwrap().stacks;
        sampler.begun(tree);
        let mut at = 0;
        for name in names {
            let known = sampler.keys.hash_one(name);
            let Some(name) = sampler.named(tree, known, || shown(None, 7, Some(name))) else { break };
            let Some(node) = sampler.node(tree, at, name) else { break };
            at = node;
        }
        add(&tree.calls[at][1], ticks);
    }

    fn read(profiles: &Profiles) -> Stacks {
        let tree = &profiles.of(0).unwrap().stacks;
        let head =
            [&tree.nodes, &tree.samples, &tree.deeper, &tree.shortened, &tree.took].into_iter().chain(&tree.reserved);
        let words = head.chain(tree.calls.as_flattened()).chain(&tree.text);
        Stacks::of(&words.map(|word| word.load(Relaxed)).collect::<Vec<_>>())
    }

    #[test]
    fn functions_are_called_as_their_language_writes_them() {
        assert_eq!(shown(None, 3, Some("_ZN4burn4spin17h0123456789abcdefE")), "burn::spin");
        assert_eq!(shown(None, 3, Some("_RNvC4burn4spin")), "burn::spin");
        assert_eq!(shown(None, 3, Some("malloc")), "malloc");
        assert_eq!(shown(Some("adapter"), 3, None), "adapter[3]");
        assert_eq!(shown(None, 3, Some("")), "module[3]");
        assert_eq!(shown(None, 3, Some("a\x1b[2J\n\u{202e}b")), "a[2Jb");
        assert_eq!(shown(None, 3, Some("\u{200b}")), "[no name]");
        assert!(shown(None, 3, Some(&"é".repeat(5000))).len() <= NAME);
        assert!(shown(None, 3, Some(&format!("_ZN{}E", "3abc".repeat(5000)))).len() <= NAME);
    }

    #[test]
    fn what_has_no_room_counts_for_its_caller() {
        let (mut sampler, profiles) = sampler();
        for n in 0..3 * NODES {
            sample(&mut sampler, &["handle".into(), format!("f{n}")], 1);
        }
        let stacks = read(&profiles);
        assert_eq!(stacks.ticks(), 3 * NODES as u64, "every tick is there");
        assert!(stacks.folded()[&vec!["handle"]] > 0 && stacks.folded()[&vec!["handle", "f0"]] == 1);
        let mut gathered = Gathered::default();
        for n in 0..9 {
            let mut other = stacks.clone();
            other.names.iter_mut().for_each(|name| name.push_str(&n.to_string()));
            gathered.merge(&other, usize::MAX);
        }
        assert_eq!(gathered.stacks.ticks(), 27 * NODES as u64);
        assert!(gathered.stacks.nodes.len() <= MERGED + 9 && gathered.stacks.shortened > 0);
    }

    proptest! {
        #[test]
        fn what_was_sampled_is_read(all in proptest::collection::vec((proptest::collection::vec("[a-c]{1,2}", 1..6), 1_u64..9), 1..60)) {
            let (mut sampler, profiles) = sampler();
            let mut model: BTreeMap<Vec<&str>, u64> = BTreeMap::new();
            for (way, ticks) in &all {
                sample(&mut sampler, way, *ticks);
                *model.entry(way.iter().map(String::as_str).collect()).or_default() += ticks;
            }
            let stacks = read(&profiles);
            prop_assert_eq!(&stacks.folded(), &model);
            let mut twice = Gathered::default();
            twice.merge(&stacks, usize::MAX);
            twice.merge(&stacks, usize::MAX);
            let later = twice.stacks.since(&stacks);
            prop_assert_eq!(&later.folded(), &model);
        }

        #[test]
        fn any_words_are_read_to_an_end(mut words in proptest::collection::vec(any::<u64>(), 0..400), nodes in 0_u64..200, small: bool) {
            if small {
                // Numbers that could be some.
                for word in &mut words { *word = ((*word % 64) << 32) | (*word >> 58); }
            }
            if let Some(first) = words.first_mut() { *first = nodes; }
            words.resize(WORDS, 0);
            let stacks = Stacks::of(&words);
            prop_assert!(stacks.nodes.len() <= NODES);
            for (at, node) in stacks.nodes.iter().enumerate() {
                prop_assert!(node.caller.is_none_or(|caller| (caller as usize) < at) && (node.name as usize) < stacks.names.len());
            }
            prop_assert!(stacks.names.iter().all(|name| !name.is_empty() && !name.chars().any(char::is_control)));
            let _ = stacks.folded();
        }
    }
}
