//! What files hold: the seal at their end, and the index files as JSON.
//!
//! Every file but the components, which are their own names, ends with a line of its digest. That covers the file's place,
//! too: a file that is found under another's name is as wrong as one whose bits have flipped.
//!
//! ```text
//! {"number":7,"previous":6,…}\n
//! sha256:…64 digits…\n           over "gaia-store graphs/7\n" and all that is before the line
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::disk::Dir;
use crate::reference::Reference;

/// The form that this version writes, and the newest that it reads.
pub const VERSION: u32 = 1;
/// The bytes of a seal: line end, `sha256:`, 64 digits, line end.
pub(crate) const SEAL: usize = 1 + 7 + 64 + 1;
/// The longest small file, in bytes: a graph with the longest manifest and images, each byte of which JSON writes in six.
pub(crate) const SMALL_MAX: u64 = 16 << 20;
/// The largest number of a graph: the largest that every reader of JSON takes for what it is.
pub(crate) const NUMBER_MAX: u64 = (1 << 53) - 1;

/// A graph in the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// Counts up from 1, in the order in which graphs were appended.
    pub number: u64,
    /// What was current when it was appended.
    pub previous: Option<u64>,
    /// The manifest's text.
    pub manifest: String,
    /// The manifest's file name, for messages.
    pub file: String,
    /// Images, as the manifest calls them, and what they were resolved to.
    pub images: BTreeMap<String, Digest>,
    /// Who deployed it.
    pub by: String,
    /// When it was deployed, in ns since 1970.
    pub at_ns: u64,
    /// What became of it, if somebody noted that.
    pub outcome: Option<String>,
    /// Which change of what is current made it so last, counted from 1; none, if it never was. If both copies of `current` are lost,
    /// this says what they said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_current: Option<u64>,
}

/// The file `current`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Current {
    pub(crate) number: u64,
    /// That graph's previous one: known even if the graph itself is lost.
    pub(crate) previous: Option<u64>,
}

/// The file `format`. Later versions may add to it, but its place and seal stay, so that an earlier one knows that it is late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Format {
    pub(crate) version: u32,
}

/// The names, as the file `names` has them.
pub(crate) type Names = BTreeMap<String, Digest>;

/// A hash that has seen the place of a file already.
pub(crate) fn hash_of_place(dir: Dir, name: &str) -> Sha256 {
    let place = match dir {
        Dir::Root => format!("gaia-store {name}\n"),
        below => format!("gaia-store {}/{name}\n", below.name()),
    };
    Sha256::new_with_prefix(place)
}

/// The line that closes a file with this hash.
pub(crate) fn seal_of(hash: Sha256) -> [u8; SEAL] {
    let mut seal = [b'\n'; SEAL];
    let digest = Digest::finished(hash).to_string();
    for (to, from) in seal.iter_mut().skip(1).zip(digest.bytes()) {
        *to = from;
    }
    seal
}

/// A whole file: the body and its seal.
pub(crate) fn sealed(dir: Dir, name: &str, body: &[u8]) -> Vec<u8> {
    let mut hash = hash_of_place(dir, name);
    hash.update(body);
    [body, &seal_of(hash)].concat()
}

/// The body of a whole file, if the seal is right.
pub(crate) fn unsealed<'a>(dir: Dir, name: &str, file: &'a [u8]) -> Result<&'a [u8], String> {
    let (body, seal) = file.split_last_chunk::<SEAL>().ok_or("it is too short")?;
    let mut hash = hash_of_place(dir, name);
    hash.update(body);
    if seal_of(hash) == *seal { Ok(body) } else { Err("its contents are not what was written".to_owned()) }
}

/// As JSON, sealed.
pub(crate) fn sealed_json<T: Serialize>(dir: Dir, name: &str, value: &T) -> Result<Vec<u8>, String> {
    serde_json::to_vec(value).map(|body| sealed(dir, name, &body)).map_err(|e| e.to_string())
}

fn json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|e| format!("it cannot be read: {e}"))
}

/// The body of `format`.
pub(crate) fn format(body: &[u8]) -> Result<Format, String> {
    json(body)
}

/// The body of `names`.
pub(crate) fn names(body: &[u8]) -> Result<Names, String> {
    let names: Names = json(body)?;
    match names.keys().find(|name| name.parse::<Reference>().is_err()) {
        Some(name) => Err(format!("{name:?} is no name")),
        None => Ok(names),
    }
}

/// The body of `current`.
pub(crate) fn current(body: &[u8]) -> Result<Current, String> {
    let current: Current = json(body)?;
    follows(current.number, current.previous)?;
    Ok(current)
}

/// The body of `graphs/<number>`.
pub(crate) fn graph(number: u64, body: &[u8]) -> Result<Graph, String> {
    let graph: Graph = json(body)?;
    if graph.number != number {
        return Err(format!("it says that it is graph {}", graph.number));
    }
    follows(number, graph.previous)?;
    match graph.made_current {
        Some(change) if !(1..=NUMBER_MAX).contains(&change) => Err(format!("there is no change {change}")),
        _ => Ok(graph),
    }
}

/// The number in the name of a graph's file.
pub(crate) fn graph_number(name: &str) -> Option<u64> {
    name.parse().ok().filter(|number: &u64| (1..=NUMBER_MAX).contains(number) && number.to_string() == name)
}

fn follows(number: u64, previous: Option<u64>) -> Result<(), String> {
    match previous {
        _ if !(1..=NUMBER_MAX).contains(&number) => Err(format!("there is no graph {number}")),
        Some(previous) if previous == 0 || previous >= number => Err(format!("{previous} is not before {number}")),
        _ => Ok(()),
    }
}
