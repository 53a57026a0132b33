//! W3C Trace Context (Recommendation, 2021): the trace that a request belongs to goes on through a brane.
//!
//! A request's `traceparent` and `tracestate` reach the guest as they came, if they are formed as the standard has it; what is not
//! is dropped there. Where the guest sends a request of its own and says nothing, the runtime adds a `traceparent` of the same trace, with a
//! parent of the runtime's own making, and the same `tracestate`. None is made where none came: who traces decides where traces begin.

use http::{HeaderMap, HeaderName, HeaderValue};
use ring::rand::{SecureRandom as _, SystemRandom};

/// Whose trace, whose call.
pub const PARENT: HeaderName = HeaderName::from_static("traceparent");
/// What tracing systems carry along.
pub const STATE: HeaderName = HeaderName::from_static("tracestate");
/// Letters of a `traceparent` of version 00: `00-` trace `-` parent `-` flags (section 3.2.2).
const LENGTH: usize = 55;
/// Members of a `tracestate` at most (section 3.3.1.1).
const MEMBERS: usize = 32;
/// The flag that whoever called may have recorded it (section 3.2.2.5.1).
const SAMPLED: u8 = 1;

/// A trace that a request belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// In lower-case hexadecimal, not all zeros.
    id: [u8; 32],
    sampled: bool,
    state: Option<HeaderValue>,
}

/// Leaves of a request's headers about traces those that are formed as they should be: `tracestate` means nothing without
/// `traceparent` (section 4.3).
pub fn check(headers: &mut HeaderMap) {
    if !headers.contains_key(&PARENT) {
        headers.remove(&STATE);
        return;
    }
    let mut all = headers.get_all(&PARENT).iter();
    let is_one = all.next().is_some_and(|value| parent(value.as_bytes()).is_some()) && all.next().is_none();
    if !is_one {
        headers.remove(&PARENT);
        headers.remove(&STATE);
    } else if !is_state(headers.get_all(&STATE).iter().map(HeaderValue::as_bytes)) {
        headers.remove(&STATE);
    }
}

/// The trace and the flags of a `traceparent`. Of later versions what this one knows is read (section 3.2.3).
fn parent(value: &[u8]) -> Option<([u8; 32], u8)> {
    let is_hex = |bytes: &[u8]| bytes.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b));
    let known = value.get(..LENGTH)?;
    let parts: Vec<&[u8]> = known.split(|b| *b == b'-').collect();
    let [version, trace, parent, flags] = parts.as_slice() else { return None };
    let lengths = (version.len(), trace.len(), parent.len(), flags.len()) == (2, 32, 16, 2);
    if !lengths || !parts.iter().all(|part| is_hex(part)) || *version == b"ff" {
        return None;
    }
    let ends = value.len() == LENGTH || (*version != b"00" && value.get(LENGTH) == Some(&b'-'));
    let is_nothing = |part: &[u8]| part.iter().all(|b| *b == b'0');
    if !ends || is_nothing(trace) || is_nothing(parent) {
        return None;
    }
    let flags = u8::from_str_radix(std::str::from_utf8(flags).ok()?, 16).ok()?;
    Some(((*trace).try_into().ok()?, flags))
}

/// Whether these are one `tracestate`, in as many pieces as it came (section 3.3.1).
fn is_state<'a>(values: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut keys: Vec<&[u8]> = Vec::new();
    for member in values.flat_map(|value| value.split(|b| *b == b',')) {
        let member = member.trim_ascii();
        if member.is_empty() {
            continue;
        }
        let Some(at) = member.iter().position(|b| *b == b'=') else { return false };
        let (key, value) = (&member[..at], &member[at + 1..]);
        let letter = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let key_is_one = key.len() <= 256
            && key.first().is_some_and(letter)
            && key.iter().all(|b| letter(b) || b"_-*/@".contains(b));
        let value_is_one = (1..=256).contains(&value.len())
            && value.iter().all(|b| (b' '..=b'~').contains(b) && *b != b'=')
            && !value.ends_with(b" ");
        if !key_is_one || !value_is_one || keys.contains(&key) || keys.len() == MEMBERS {
            return false;
        }
        keys.push(key);
    }
    true
}

impl Trace {
    /// That of a request whose headers were [checked](check), if it belongs to one.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let (id, flags) = parent(headers.get(&PARENT)?.as_bytes())?;
        let states: Vec<&[u8]> = headers.get_all(&STATE).iter().map(HeaderValue::as_bytes).collect();
        let state = (!states.is_empty()).then(|| HeaderValue::from_bytes(&states.join(b",".as_slice())).ok()).flatten();
        Some(Self { id, sampled: flags & SAMPLED != 0, state })
    }

    /// Has a request of the guest's belong to it, unless the guest has said what it belongs to. Without chance there is no
    /// parent to be made, and nothing is added.
    pub fn go_on(&self, headers: &mut HeaderMap) {
        if headers.contains_key(&PARENT) {
            return;
        }
        let mut span = [0; 8];
        if SystemRandom::new().fill(&mut span).is_err() || span == [0; 8] {
            return;
        }
        let mut text = [b"00-".as_slice(), &self.id, b"-"].concat();
        for byte in span {
            text.extend([byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)]));
        }
        text.extend_from_slice(if self.sampled { b"-01" } else { b"-00" });
        let Ok(value) = HeaderValue::from_bytes(&text) else { return };
        headers.insert(PARENT, value);
        if let Some(state) = self.state.as_ref().filter(|_| !headers.contains_key(&STATE)) {
            headers.insert(STATE, state.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The standard's own example, section 3.2.3.
    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(all: &[(&HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in all {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn left(all: &[(&HeaderName, &str)]) -> (usize, usize) {
        let mut headers = headers(all);
        check(&mut headers);
        (headers.get_all(&PARENT).iter().count(), headers.get_all(&STATE).iter().count())
    }

    #[test]
    fn what_is_not_formed_as_the_standard_has_it_is_dropped() {
        for good in [
            EXAMPLE,
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-will-be-like",
        ] {
            assert_eq!(left(&[(&PARENT, good), (&STATE, "a=1")]), (1, 1), "{good}");
        }
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 ",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473600f067aa0ba902b7--01",
        ] {
            let value = HeaderValue::from_bytes(bad.as_bytes()).unwrap();
            let mut headers = headers(&[(&STATE, "a=1")]);
            headers.insert(PARENT, value);
            check(&mut headers);
            assert!(headers.is_empty(), "{bad:?}");
        }
        assert_eq!(left(&[(&PARENT, EXAMPLE), (&PARENT, EXAMPLE)]), (0, 0), "two parents");
        assert_eq!(left(&[(&STATE, "a=1")]), (0, 0), "a state of nothing");
        for state in ["a=1,b@c=2 3", "a=1,,b=2", "rojo=00f067aa0ba902b7 , congo=t61rcWkgMzE"] {
            assert_eq!(left(&[(&PARENT, EXAMPLE), (&STATE, state)]), (1, 1), "{state}");
        }
        let many = (0..33).map(|n| format!("k{n}=1")).collect::<Vec<_>>().join(",");
        for state in ["a", "A=1", "=1", "a=", "a=1=2", "a=1,a=2", many.as_str()] {
            assert_eq!(left(&[(&PARENT, EXAMPLE), (&STATE, state)]), (1, 0), "{state}");
        }
    }

    #[test]
    fn a_request_of_the_guests_goes_on_with_the_trace_under_a_parent_of_its_own() {
        let came = headers(&[(&PARENT, EXAMPLE), (&STATE, "a=1"), (&STATE, "b=2")]);
        let trace = Trace::of(&came).unwrap();
        let (mut first, mut second) = (HeaderMap::new(), HeaderMap::new());
        trace.go_on(&mut first);
        trace.go_on(&mut second);
        let text = |headers: &HeaderMap| headers[&PARENT].to_str().unwrap().to_owned();
        assert!(text(&first).starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && text(&first).ends_with("-01"));
        assert!(text(&first) != text(&second) && text(&first) != EXAMPLE);
        assert_eq!(first[&STATE], "a=1,b=2");
        assert_eq!(Trace::of(&first).unwrap().id, trace.id);
        // What the guest has said counts.
        let mut own = headers(&[(&PARENT, "its own")]);
        trace.go_on(&mut own);
        assert_eq!((own[&PARENT].to_str().unwrap(), own.contains_key(&STATE)), ("its own", false));
        let mut own = headers(&[(&STATE, "own=1")]);
        trace.go_on(&mut own);
        assert_eq!((own.contains_key(&PARENT), own[&STATE].to_str().unwrap()), (true, "own=1"));
        let unsampled = headers(&[(&PARENT, &EXAMPLE.replace("-01", "-00"))]);
        let mut sent = HeaderMap::new();
        Trace::of(&unsampled).unwrap().go_on(&mut sent);
        assert!(text(&sent).ends_with("-00") && !sent.contains_key(&STATE));
        assert_eq!(Trace::of(&HeaderMap::new()), None);
    }

    proptest! {
        #[test]
        fn any_headers_are_checked_once_and_for_all(parent in "([0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}-?|[ -~]{0,60})", state in "([a-z]{0,2}=?[0-9]{0,2},?){0,5}|[ -~]{0,40}") {
            let mut all = headers(&[(&PARENT, &parent), (&STATE, &state)]);
            check(&mut all);
            let once = all.clone();
            check(&mut all);
            prop_assert_eq!(&once, &all);
            prop_assert_eq!(Trace::of(&all).is_some(), all.contains_key(&PARENT));
            if let Some(trace) = Trace::of(&all) {
                let mut sent = HeaderMap::new();
                trace.go_on(&mut sent);
                let before = sent.clone();
                check(&mut sent);
                prop_assert_eq!(before, sent, "what is sent is formed well");
            }
        }
    }
}
