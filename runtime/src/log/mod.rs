//! The log: what branes say and what becomes of their requests, as binary records in each worker's shared memory.
//!
//! A worker writes and never waits; whoever reads does the formatting. One ring for all branes of a worker, and a share
//! of it for each, so that no brane can take the place of another's lines:
//!
//! ```text
//!  worker                        shared memory (statistics page)             control
//!  Log::write ──▶ │ record │ record │ continuation │ … 8192 slots │ ──▶ Reader::next ──▶ history, followers
//!                  ▲ head: worker's                 ▲ tail: control's
//! ```
//!
//! - A record takes one slot of 128 bytes; text that does not fit into it goes on in the slots behind it.
//! - A brane may have as many slots unread as are free (the dynamic threshold of shared-memory switches): alone it gets
//!   half of the ring, and however many flood it, there is room for the next.
//! - What a guest can repeat within a request ([`Event::is_bounded`]) has an allowance besides, per brane and worker:
//!   [`BURST`] slots at once, [`RATE`] each second.
//! - What finds no room is dropped and counted. The brane is heard again when there is room for some more, and first it is
//!   told how many records are missing.

pub mod text;
pub mod time;

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU64, fence};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::statistics::{Account, MAX_BRANES, Statistics};

/// Slots of a ring.
pub const SLOTS: usize = 8192;
/// Words of a slot.
const WORDS: usize = 16;
/// Words before the text of a record.
const HEAD: usize = 5;
/// Bytes of text in a record's first slot.
const FIRST: usize = (WORDS - HEAD) * 8;
/// Bytes of text in each slot behind it.
const MORE: usize = WORDS * 8;
/// The longest text of a record, in bytes; what is longer is cut, or goes into the next record.
pub const MAX_TEXT: usize = 4096;
/// Slots a brane may fill at once with what it can repeat.
pub const BURST: u64 = 4096;
/// And each second from then on: as much as two thousand short lines.
pub const RATE: u64 = 2048;
/// What must have come together, of allowance or of room in the ring, before one who used it up is heard again: lines, and
/// what is lost between them, then come in blocks.
const RESUME: u64 = RATE / 4;

/// The ring, as it lies in shared memory.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Ring {
    /// Slots written since the beginning; the worker's.
    head: AtomicU64,
    /// Slots whose reading the worker has noticed; the worker's.
    noticed: AtomicU64,
    _worker: [AtomicU64; 6],
    /// Slots read since the beginning; the reader's.
    tail: AtomicU64,
    /// 1 while the reader wants to be woken; set by the reader, cleared by the worker.
    asleep: AtomicU64,
    _reader: [AtomicU64; 6],
    slots: [[AtomicU64; WORDS]; SLOTS],
}

/// A standard stream of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// Something that happened. Texts have at most [`MAX_TEXT`] bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Event<'a> {
    /// A line that the guest wrote; text that was not UTF-8 has replacement characters.
    #[serde(rename = "LOG")]
    Log {
        /// Where to.
        stream: Stream,
        /// Without its line break.
        text: Cow<'a, str>,
    },
    /// An outgoing request and its answer.
    #[serde(rename = "REQ")]
    Request {
        /// Host and path.
        text: Cow<'a, str>,
        /// Bytes of the answer's body.
        bytes: u64,
        /// From the request's head to the end of the answer.
        #[serde(rename = "dur_ns", with = "nanos")]
        dur: Duration,
    },
    /// The answer given to a client.
    #[serde(rename = "RES")]
    Response {
        /// Its status.
        status: u16,
        /// Processor time of the guest.
        #[serde(rename = "cpu_ns", with = "nanos")]
        cpu: Duration,
        /// Why the runtime gave it, if it was not the guest.
        text: Cow<'a, str>,
    },
    /// An instance is gone.
    #[serde(rename = "END")]
    End {
        /// From dispatch to the guest's first instruction.
        #[serde(rename = "cold_ns", with = "nanos")]
        cold: Duration,
        /// Wall time in the guest.
        #[serde(rename = "exec_ns", with = "nanos")]
        exec: Duration,
        /// Whether an instance was ready before the request was there.
        ready: bool,
        /// Why, if it did not end by itself.
        text: Cow<'a, str>,
    },
    /// Something that was not granted.
    #[serde(rename = "DENY")]
    Deny {
        /// What.
        text: Cow<'a, str>,
    },
    /// The guest trapped.
    #[serde(rename = "TRAP")]
    Trap {
        /// Why.
        text: Cow<'a, str>,
    },
    /// The runtime ended the guest.
    #[serde(rename = "KILL")]
    Kill {
        /// Why.
        text: Cow<'a, str>,
    },
    /// The runtime could not do its part.
    #[serde(rename = "FAULT")]
    Fault {
        /// Why.
        text: Cow<'a, str>,
    },
    /// Somebody changed something through control's API, or was refused there.
    #[serde(rename = "AUDIT")]
    Audit {
        /// Who, what, and what came of it.
        text: Cow<'a, str>,
    },
    /// Records before this one that are not there.
    #[serde(rename = "LOST")]
    Lost {
        /// How many.
        records: u64,
    },
}

/// What a line is about: its name stands in each line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// [`Event::Request`]
    Request,
    /// [`Event::Response`]
    Response,
    /// [`Event::End`]
    End,
    /// [`Event::Log`]
    Log,
    /// [`Event::Deny`]
    Deny,
    /// [`Event::Trap`]
    Trap,
    /// [`Event::Kill`]
    Kill,
    /// [`Event::Fault`]
    Fault,
    /// [`Event::Audit`]
    Audit,
    /// [`Event::Lost`]
    Lost,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Request,
        Self::Response,
        Self::End,
        Self::Log,
        Self::Deny,
        Self::Trap,
        Self::Kill,
        Self::Fault,
        Self::Audit,
        Self::Lost,
    ];

    /// As it stands in a line: `REQ`
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "REQ",
            Self::Response => "RES",
            Self::End => "END",
            Self::Log => "LOG",
            Self::Deny => "DENY",
            Self::Trap => "TRAP",
            Self::Kill => "KILL",
            Self::Fault => "FAULT",
            Self::Audit => "AUDIT",
            Self::Lost => "LOST",
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    /// Reads its name, in capitals or not.
    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name);
        let found = Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(text));
        found.ok_or_else(|| match nearest(&text.to_ascii_uppercase(), names) {
            Some(near) => format!("did you mean {near}? The kinds of lines are {}", names.join(", ")),
            None => format!("the kinds of lines are {}", names.join(", ")),
        })
    }
}

/// The known word that is most like one that is not known: it begins with the same three letters, or differs in few.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |known: &'a str| (strsim::damerau_levenshtein(word, known), known);
    let (distance, near) = known.into_iter().map(distance).min()?;
    let begins = near.get(..3).is_some_and(|three| word.starts_with(three));
    (distance <= 1.max(near.len() / 3) || begins).then_some(near)
}

impl<'a> Event<'a> {
    /// Which kind it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Log { .. } => Kind::Log,
            Self::Request { .. } => Kind::Request,
            Self::Response { .. } => Kind::Response,
            Self::End { .. } => Kind::End,
            Self::Deny { .. } => Kind::Deny,
            Self::Trap { .. } => Kind::Trap,
            Self::Kill { .. } => Kind::Kill,
            Self::Fault { .. } => Kind::Fault,
            Self::Audit { .. } => Kind::Audit,
            Self::Lost { .. } => Kind::Lost,
        }
    }

    /// Whether a guest can repeat it as often as it likes within one request.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        matches!(self, Self::Log { .. } | Self::Request { .. } | Self::Deny { .. })
    }

    /// Kind, status or flags, two numbers, text.
    fn parts(&self) -> (u8, u16, [u64; 2], &str) {
        let nanos = |d: &Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        match self {
            Self::Log { stream, text } => (1, u16::from(*stream == Stream::Err), [0, 0], text),
            Self::Request { text, bytes, dur } => (2, 0, [*bytes, nanos(dur)], text),
            Self::Response { status, cpu, text } => (3, *status, [nanos(cpu), 0], text),
            Self::End { cold, exec, ready, text } => (4, u16::from(*ready), [nanos(cold), nanos(exec)], text),
            Self::Deny { text } => (5, 0, [0, 0], text),
            Self::Trap { text } => (6, 0, [0, 0], text),
            Self::Kill { text } => (7, 0, [0, 0], text),
            Self::Fault { text } => (8, 0, [0, 0], text),
            Self::Lost { records } => (9, 0, [*records, 0], ""),
            Self::Audit { text } => (10, 0, [0, 0], text),
        }
    }

    fn of(kind: u8, status: u16, [a, b]: [u64; 2], text: Cow<'a, str>) -> Option<Self> {
        let (one, other) = (Duration::from_nanos(a), Duration::from_nanos(b));
        Some(match kind {
            1 => Self::Log { stream: if status == 0 { Stream::Out } else { Stream::Err }, text },
            2 => Self::Request { text, bytes: a, dur: other },
            3 => Self::Response { status, cpu: one, text },
            4 => Self::End { cold: one, exec: other, ready: status != 0, text },
            5 => Self::Deny { text },
            6 => Self::Trap { text },
            7 => Self::Kill { text },
            8 => Self::Fault { text },
            9 => Self::Lost { records: a },
            10 => Self::Audit { text },
            _ => return None,
        })
    }
}

/// A duration as a number of nanoseconds.
mod nanos {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(d: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_nanos)
    }
}

/// Whose record it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The worker itself.
    Worker,
    /// A brane, by its index in the plan; its instance's serial number, 0 for none.
    Brane(usize, u64),
}

/// A record as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When, since the Unix epoch.
    pub time: Duration,
    /// Whose.
    pub subject: Subject,
    /// What.
    pub event: Event<'static>,
}

/// A brane's index that stands for the worker itself.
const NOBODY: u16 = u16::MAX;
const _: () = assert!(MAX_BRANES < NOBODY as usize);

/// The writing end. Everything in it lies in shared memory, so any number of instances can hold it.
pub struct Log {
    page: Arc<Statistics>,
    reader: tokio::sync::Notify,
    is_silent: bool,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

impl Log {
    /// The log of the worker whose page this is. There must be one writer to a page.
    #[must_use]
    pub fn new(page: Arc<Statistics>) -> Self {
        Self { page, reader: tokio::sync::Notify::new(), is_silent: false }
    }

    /// The same, but nothing is written to it: for whoever measures what that costs.
    #[must_use]
    pub fn silent(page: Arc<Statistics>) -> Self {
        Self { is_silent: true, ..Self::new(page) }
    }

    /// The page it is in.
    #[must_use]
    pub fn page(&self) -> &Statistics {
        &self.page
    }

    /// Writes a record, or counts it as dropped. Never waits and never allocates.
    pub fn write(&self, subject: Subject, event: &Event<'_>) {
        if self.is_silent {
            return;
        }
        let account = self.account(subject);
        let lost = account.dropped.load(Relaxed) - account.told.load(Relaxed);
        let (_, _, _, text) = event.parts();
        let room = if event.is_bounded() { RESUME } else { 0 };
        let written = (!event.is_bounded() || allowance(account, slots_of(text.len()) as u64, monotonic_ms()))
            && (lost == 0 || self.put(subject, account, &Event::Lost { records: lost }, room))
            && {
                account.told.fetch_add(lost, Relaxed);
                self.put(subject, account, event, 0)
            };
        if !written {
            account.dropped.fetch_add(1, Relaxed);
        }
        if self.page.log.asleep.load(Relaxed) == 1 && self.page.log.asleep.swap(0, SeqCst) == 1 {
            self.reader.notify_one();
        }
    }

    /// Waits until a reader that sleeps is to be woken.
    pub async fn reader_is_wanted(&self) {
        self.reader.notified().await;
    }

    fn account(&self, subject: Subject) -> &Account {
        let own = &self.page.worker.log;
        match subject {
            Subject::Worker => own,
            Subject::Brane(index, _) => self.page.branes.get(index).map_or(own, |brane| &brane.log),
        }
    }

    /// Takes back the slots that have been read since, from those whose they were.
    fn notice(&self) -> u64 {
        let ring = &self.page.log;
        let head = ring.head.load(Relaxed);
        let mut noticed = ring.noticed.load(Relaxed);
        // What the reader says is taken for what it can be.
        let tail = ring.tail.load(Acquire).min(head);
        while noticed < tail {
            let [_, _, packed, ..] = ring.slot(noticed);
            let (_, _, brane, length) = unpacked(packed.load(Relaxed));
            let slots = slots_of(length) as u64;
            let unread = &self.account(subject(brane, 0)).unread;
            unread.store(unread.load(Relaxed).saturating_sub(slots), Relaxed);
            noticed += slots;
        }
        ring.noticed.store(noticed, Relaxed);
        noticed
    }

    /// Puts a record into the ring if there is room for it and for `more` slots behind it.
    fn put(&self, subject: Subject, account: &Account, event: &Event<'_>, more: u64) -> bool {
        let ring = &self.page.log;
        let (kind, status, numbers, text) = event.parts();
        let text = &text.as_bytes()[..text.floor_char_boundary(MAX_TEXT)];
        let wanted = slots_of(text.len()) as u64;
        let head = ring.head.load(Relaxed);
        let unread = account.unread.load(Relaxed);
        let free = (SLOTS as u64).saturating_sub(head.saturating_sub(self.notice()));
        if unread + wanted + more > free.saturating_sub(wanted) {
            return false;
        }
        let (brane, serial) = match subject {
            Subject::Worker => (NOBODY, 0),
            Subject::Brane(index, serial) => (u16::try_from(index).unwrap_or(NOBODY), serial),
        };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
        let packed = u64::from(kind) | u64::from(status) << 16 | u64::from(brane) << 32 | u64::from(length) << 48;
        for (word, value) in ring.slot(head).iter().zip([time, serial, packed, numbers[0], numbers[1]]) {
            word.store(value, Relaxed);
        }
        let (first, rest) = text.split_at(text.len().min(FIRST));
        store(&ring.slot(head)[HEAD..], first);
        for (at, piece) in (head + 1..).zip(rest.chunks(MORE)) {
            store(ring.slot(at), piece);
        }
        account.unread.store(account.unread.load(Relaxed) + wanted, Relaxed);
        ring.head.store(head + wanted, Release);
        // Against the reader's: either it sees the new head, or this sees that it sleeps.
        fence(SeqCst);
        true
    }
}

impl Ring {
    fn slot(&self, at: u64) -> &[AtomicU64; WORDS] {
        // Never out of bounds: the remainder is less than the number of slots.
        &self.slots[usize::try_from(at % SLOTS as u64).unwrap_or(0)]
    }
}

fn slots_of(text: usize) -> usize {
    1 + text.min(MAX_TEXT).saturating_sub(FIRST).div_ceil(MORE)
}

fn subject(brane: u16, serial: u64) -> Subject {
    if brane == NOBODY { Subject::Worker } else { Subject::Brane(brane.into(), serial) }
}

#[expect(clippy::cast_possible_truncation, reason = "each takes the bits that are its own")]
fn unpacked(packed: u64) -> (u8, u16, u16, usize) {
    (packed as u8, (packed >> 16) as u16, (packed >> 32) as u16, (packed >> 48) as usize)
}

fn store(words: &[AtomicU64], bytes: &[u8]) {
    for (word, piece) in words.iter().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..piece.len()].copy_from_slice(piece);
        word.store(u64::from_ne_bytes(whole), Relaxed);
    }
}

#[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "it wraps, and only differences count")]
fn monotonic_ms() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec as u32).wrapping_mul(1000).wrapping_add(now.tv_nsec as u32 / 1_000_000)
}

/// Takes `slots` from an allowance that is filled up by [`RATE`] each second, to at most [`BURST`]. One that was used up
/// gives nothing until there are [`RESUME`]: lines and what is lost between them then come in blocks.
fn allowance(account: &Account, slots: u64, now_ms: u32) -> bool {
    const USED_UP: u64 = 1 << 63;
    let packed = account.allowance.load(Relaxed);
    let (left, then) = match packed {
        0 => (BURST * 1000, now_ms),
        _ => ((packed & !USED_UP) >> 32, u32::try_from(packed & u64::from(u32::MAX)).unwrap_or(0)),
    };
    // A slot each second is a thousandth of a slot each millisecond.
    let left = (left + RATE * u64::from(now_ms.wrapping_sub(then))).min(BURST * 1000);
    let wanted = if packed & USED_UP == 0 { slots } else { slots.max(RESUME) };
    let enough = left >= wanted * 1000;
    let (left, used_up) = if enough { (left - slots * 1000, 0) } else { (left, USED_UP) };
    account.allowance.store(used_up | left << 32 | u64::from(now_ms), Relaxed);
    enough
}

/// The reading end: one for each worker, in control.
///
/// It trusts nothing it finds: a worker that has been taken over can write what it likes there. What cannot be a record
/// ends the batch and is skipped, with what is behind it.
#[derive(Debug)]
pub struct Reader<'a> {
    ring: &'a Ring,
}

impl<'a> Reader<'a> {
    /// The one reader of this page's log.
    #[must_use]
    pub fn new(page: &'a Statistics) -> Self {
        Self { ring: &page.log }
    }

    /// Asks the worker to say when there is something to read. Whether nothing is there yet, so that there is a point in
    /// waiting for it.
    #[must_use]
    pub fn may_sleep(&self) -> bool {
        self.ring.asleep.store(1, SeqCst);
        fence(SeqCst);
        self.ring.head.load(Acquire) == self.ring.tail.load(Relaxed)
    }
}

impl Iterator for Reader<'_> {
    type Item = Record;

    /// Takes the next record; `None` if there is none now.
    fn next(&mut self) -> Option<Record> {
        let tail = self.ring.tail.load(Relaxed);
        let head = self.ring.head.load(Acquire);
        if head == tail {
            return None;
        }
        let slot: [u64; WORDS] = std::array::from_fn(|i| self.ring.slot(tail)[i].load(Relaxed));
        let [time, serial, packed, a, b, ..] = slot;
        let (kind, status, brane, length) = unpacked(packed);
        let slots = slots_of(length) as u64;
        let there = head.wrapping_sub(tail);
        if length > MAX_TEXT || slots > there || there > SLOTS as u64 {
            self.ring.tail.store(head, Release);
            return None;
        }
        let mut bytes = Vec::with_capacity(length + MORE);
        bytes.extend(slot[HEAD..].iter().flat_map(|word| word.to_ne_bytes()));
        for at in tail + 1..tail + slots {
            bytes.extend(self.ring.slot(at).iter().flat_map(|word| word.load(Relaxed).to_ne_bytes()));
        }
        bytes.truncate(length);
        let text = String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
        // Only now may the worker write over it.
        self.ring.tail.store(tail + slots, Release);
        let event = Event::of(kind, status, [a, b], text.into()).unwrap_or(Event::Lost { records: 1 });
        Some(Record { time: Duration::from_nanos(time), subject: subject(brane, serial), event })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(text: impl Into<Cow<'static, str>>) -> Event<'static> {
        Event::Log { stream: Stream::Out, text: text.into() }
    }

    fn kill(text: impl Into<Cow<'static, str>>) -> Event<'static> {
        Event::Kill { text: text.into() }
    }

    #[test]
    fn a_kind_is_known_by_its_name() {
        for kind in Kind::ALL {
            assert_eq!((kind.name().parse(), kind.name().to_lowercase().parse()), (Ok(kind), Ok(kind)));
        }
        for (wrong, meant) in
            [("ress", "RES"), ("DENIED", "DENY"), ("trpa", "TRAP"), ("Requests", "REQ"), ("audits", "AUDIT")]
        {
            let error = wrong.parse::<Kind>().unwrap_err();
            assert!(error.starts_with(&format!("did you mean {meant}? ")), "{wrong}: {error}");
        }
        assert!("nonsense".parse::<Kind>().unwrap_err().starts_with("the kinds of lines are REQ, "));
    }

    #[test]
    fn a_kind_is_what_json_says_it_is() {
        let page = [Event::Lost { records: 1 }, kill("x"), line("x"), Event::Audit { text: "x".into() }];
        for event in page {
            assert_eq!(serde_json::to_value(&event).unwrap()["kind"], event.kind().name());
        }
    }

    #[test]
    fn what_is_written_is_read_in_order() {
        let page = Statistics::page();
        let (log, mut reader) = (Log::new(Arc::clone(&page)), Reader::new(&page));
        let ms = Duration::from_millis;
        let all = [
            line(""),
            line("x".repeat(FIRST)),
            line("x".repeat(FIRST + 1)),
            Event::Log { stream: Stream::Err, text: "é".repeat(MAX_TEXT / 2).into() },
            Event::Request { text: "api.openalex.org/works".into(), bytes: 12_422, dur: ms(42) },
            Event::Response { status: 200, cpu: ms(8), text: "".into() },
            Event::End { cold: ms(1), exec: ms(42), ready: true, text: "client gone".into() },
            Event::Deny { text: "d".into() },
            Event::Trap { text: "t".into() },
            kill("deadline"),
            Event::Fault { text: "f".into() },
        ];
        for event in &all {
            log.write(Subject::Brane(3, 34), event);
        }
        log.write(Subject::Worker, &all[0]);
        for event in all.iter().cloned() {
            let record = reader.next().unwrap();
            assert_eq!((record.subject, record.event), (Subject::Brane(3, 34), event));
            assert!(record.time > Duration::from_hours(24 * 365 * 50), "since 1970");
        }
        assert_eq!(reader.next().unwrap().subject, Subject::Worker);
        assert_eq!(reader.next(), None);
    }

    #[test]
    fn a_flood_leaves_room_for_others_and_its_drops_are_told() {
        let page = Statistics::page();
        let (log, mut reader) = (Log::new(Arc::clone(&page)), Reader::new(&page));
        for n in 0..10 * SLOTS {
            log.write(Subject::Brane(0, 1), &kill(n.to_string()));
        }
        for brane in 1..10 {
            log.write(Subject::Brane(brane, 1), &kill("mine"));
        }
        let mut read: Vec<Record> = reader.by_ref().collect();
        let others = read.iter().filter(|r| !matches!(r.subject, Subject::Brane(0, _))).count();
        assert_eq!(others, 9, "every line of the others is there");
        let kept = read.len() - others;
        assert!((SLOTS / 2 - 2..=SLOTS / 2).contains(&kept), "{kept} of {SLOTS}");
        log.write(Subject::Brane(0, 1), &kill("last"));
        read = reader.by_ref().collect();
        let lost = (10 * SLOTS - kept) as u64;
        assert_eq!(
            read.iter().map(|r| r.event.clone()).collect::<Vec<_>>(),
            [Event::Lost { records: lost }, kill("last")]
        );
    }

    #[test]
    fn what_a_guest_can_repeat_has_an_allowance_that_fills_up_again() {
        let account = Account::default();
        let mut taken = 0;
        while allowance(&account, 1, 5) {
            taken += 1;
        }
        assert_eq!(taken, BURST);
        assert!(!allowance(&account, 1, 5));
        assert!(!allowance(&account, 1, 5 + 200), "a few would do, but it was used up");
        assert!(allowance(&account, 1, 5 + 250));
        assert!(allowance(&account, RESUME - 1, 5 + 250));
        assert!(!allowance(&account, 1, 5 + 250));
        let later = 5 + 250 + 1_000_000;
        assert!(allowance(&account, BURST, later), "and never more than a burst");
        assert!(!allowance(&account, 1, later));
        let wrapped = Account::default();
        assert!(allowance(&wrapped, BURST, u32::MAX));
        assert!(!allowance(&wrapped, 1, u32::MAX));
        assert!(allowance(&wrapped, RATE, 999), "a second later, past the clock's end");
    }

    #[test]
    fn a_reader_that_sleeps_is_woken_by_the_next_record() {
        let page = Statistics::page();
        let log = Log::new(Arc::clone(&page));
        let mut reader = Reader::new(&page);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            assert!(reader.may_sleep());
            log.write(Subject::Worker, &line("one"));
            tokio::time::timeout(Duration::from_secs(5), log.reader_is_wanted()).await.unwrap();
            assert!(!reader.may_sleep());
            assert!(reader.next().is_some());
        });
    }

    #[test]
    fn a_page_that_was_tampered_with_is_read_to_an_end() {
        let page = Statistics::page();
        let mut reader = Reader::new(&page);
        page.log.head.store(u64::MAX, Relaxed);
        assert_eq!(reader.next(), None);
        page.log.slots[0][2].store(u64::MAX, Relaxed);
        page.log.tail.store(0, Relaxed);
        page.log.head.store(5, Relaxed);
        assert_eq!(reader.next(), None);
        assert_eq!(page.log.tail.load(Relaxed), 5, "skipped");
        let log = Log::new(Arc::clone(&page));
        page.log.tail.store(u64::MAX, Relaxed);
        log.write(Subject::Brane(MAX_BRANES + 7, 1), &line("what the reader claims cannot be"));
    }

    proptest! {
        #[test]
        fn what_is_read_was_written_in_that_order(turns in proptest::collection::vec((0_usize..3, "\\PC{0,60}", 1_usize..80, any::<bool>()), 1..400)) {
            let page = Statistics::page();
            let (log, mut reader) = (Log::new(Arc::clone(&page)), Reader::new(&page));
            let mut written = std::collections::VecDeque::new();
            for (brane, text, times, reads) in turns {
                let text: String = text.repeat(times).chars().take(MAX_TEXT / 4).collect();
                log.write(Subject::Brane(brane, 1), &kill(text.clone()));
                written.push_back((brane, text));
                while reads && let Some(record) = reader.next() {
                    let (Subject::Brane(brane, _), Event::Kill { text }) = (record.subject, record.event) else { continue };
                    // What was dropped on the way is passed over.
                    let found = std::iter::from_fn(|| written.pop_front()).any(|next| next == (brane, text.to_string()));
                    prop_assert!(found, "read what was not written, or twice, or in another order");
                }
            }
        }

        #[test]
        fn any_content_is_read_to_an_end(words in proptest::collection::vec(any::<u64>(), 0..200), head in 0_u64..9000) {
            let page = Statistics::page();
            for (at, word) in words.iter().enumerate() { page.log.slots[at / WORDS][at % WORDS].store(*word, Relaxed); }
            page.log.head.store(head, Relaxed);
            let mut reader = Reader::new(&page);
            let mut read = 0;
            while reader.next().is_some() { read += 1; }
            prop_assert!(read <= SLOTS);
        }
    }
}
