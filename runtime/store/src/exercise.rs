//! What a fuzzer makes of bytes: every form of file is read from them.
//!
//! Part of the library, though hidden, because a fuzz target is a crate of its own; no program carries it.

use crate::disk::Dir;
use crate::form;
use crate::{Digest, Reference};

/// Reads the bytes as each kind of file, as they are and behind a good seal.
///
/// # Panics
/// If what was read is not read the same when it is written again.
pub fn files(bytes: &[u8]) {
    for name in ["format", "names", "current"] {
        assert_eq!(form::unsealed(Dir::Root, name, &form::sealed(Dir::Root, name, bytes)), Ok(bytes));
        if let Ok(body) = form::unsealed(Dir::Root, name, bytes) {
            assert_eq!(form::sealed(Dir::Root, name, body), bytes);
        }
    }
    if let Ok(format) = form::format(bytes) {
        assert_eq!(serde_json::to_vec(&format).map(|again| form::format(&again)).ok(), Some(Ok(format)));
    }
    if let Ok(names) = form::names(bytes) {
        assert!(names.keys().all(|name| name.parse::<Reference>().is_ok_and(|read| read.as_str() == name)));
        assert_eq!(serde_json::to_vec(&names).map(|again| form::names(&again)).ok(), Some(Ok(names)));
    }
    if let Ok(current) = form::current(bytes) {
        assert!(current.previous.is_none_or(|previous| previous < current.number));
        assert_eq!(serde_json::to_vec(&current).map(|again| form::current(&again)).ok(), Some(Ok(current)));
    }
    if let Ok(graph) = form::graph(7, bytes) {
        assert!(graph.number == 7 && graph.previous.is_none_or(|previous| previous < 7));
        assert_eq!(serde_json::to_vec(&graph).map(|again| form::graph(7, &again)).ok(), Some(Ok(graph)));
    }
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(name) = text.parse::<Reference>() {
        assert_eq!(name.to_string(), text);
    }
    if let Some(number) = form::graph_number(text) {
        assert_eq!(number.to_string(), text);
    }
}
