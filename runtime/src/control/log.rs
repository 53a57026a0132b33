//! Control's part of the log: it empties the workers' rings and keeps what was said last, for whoever asks.
//!
//! Each brane has its share of what is kept, so that one that floods pushes out its own lines and nobody else's. Who
//! follows has a place in the history and no queue: if it does not read, it misses lines and is told how many, for each brane
//! that it asked for. Lines are numbered, so whoever was cut off goes on where it was.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::Stream;
use hyper::body::Frame;
use tokio::sync::Notify;

use super::report::Line;
use super::{Control, Runs, Worker};
use crate::log::{Event, Kind, Reader, Record, Subject, nearest};

/// What is kept in all, in bytes as [`cost`] counts them.
const KEPT: usize = 8 << 20;
/// What each brane may keep, however many there are.
const LEAST: usize = 16 << 10;
/// How long control waits between two looks into a ring that is written to: so many milliseconds a ring must last.
const PAUSE: Duration = Duration::from_millis(5);
/// How long control waits for the names of a worker's branes. Then their lines have none.
const NAMES_WITHIN: Duration = Duration::from_secs(10);
/// Records taken from one ring before others have their turn.
const BATCH: usize = 512;
/// What one piece of an answer may have, in bytes.
pub(super) const PIECE: usize = 64 << 10;
/// How often who follows is sent something, if only an empty line: each end sees then that the other is gone.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// Empties a worker's ring until the worker is gone, and then once more.
pub(super) async fn read(control: Rc<Control>, worker: Rc<Worker>) {
    let mut reader = Reader::new(&worker.statistics);
    control.names_branes_of(&worker).await;
    loop {
        let last = worker.gone.get();
        loop {
            let batch = reader.by_ref().take(BATCH);
            if batch.map(|record| control.keep(&worker, record)).count() < BATCH {
                break;
            }
            tokio::task::yield_now().await;
        }
        if last {
            return;
        }
        if reader.may_sleep() {
            worker.records.notified().await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl Control {
    /// Records that a worker's ring had no room for.
    pub(super) fn dropped(&self, worker: &Worker) -> u64 {
        // Only the rows in use: to read one of the others would have the kernel find memory for it.
        let branes = match &worker.runs {
            Runs::Branes { .. } => self.plans.borrow().get(&worker.generation).map_or(0, |p| p.branes.len()),
            Runs::Kept { .. } => 1,
        };
        let accounts = worker.statistics.branes.iter().take(branes).map(|brane| &brane.log);
        accounts.chain([&worker.statistics.worker.log]).map(|account| account.dropped.load(Relaxed)).sum()
    }

    /// Waits until the names of a worker's branes are known: a control that was started again is told of its workers before it
    /// has read what they run. Of generations that are being drained it is not told.
    async fn names_branes_of(&self, worker: &Worker) {
        let known = || {
            let told = self.plan.borrow().is_some() || self.plans.borrow().contains_key(&worker.generation);
            told || worker.runs.core().is_none()
        };
        let waiting = async {
            while !known() {
                tokio::time::sleep(PAUSE).await;
            }
        };
        let _ = tokio::time::timeout(NAMES_WITHIN, waiting).await;
    }

    fn keep(&self, worker: &Worker, record: Record) {
        let plans = self.plans.borrow();
        let plan = plans.get(&worker.generation);
        let (brane, serial) = match (record.subject, &worker.runs) {
            (Subject::Worker, _) => (None, 0),
            (Subject::Brane(_, serial), Runs::Kept { name, .. }) => (Some(name.clone()), serial),
            (Subject::Brane(index, serial), Runs::Branes { .. }) => {
                (plan.and_then(|p| p.branes.get(index)).map(|b| b.name.clone()), serial)
            }
        };
        let instance = brane.as_ref().filter(|_| serial > 0).map(|name| format!("{name}.{serial:03}"));
        let time_ns = u64::try_from(record.time.as_nanos()).unwrap_or(u64::MAX);
        let core = worker.runs.core();
        self.push(
            Line { seq: 0, time_ns, core, brane, instance, event: record.event },
            plan.map_or(0, |p| p.branes.len()),
        );
    }

    /// A keeper's process ended as it should not, and with it what the instance knew.
    pub(super) fn keeper_ended(&self, name: &str, replica: u32, cause: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let (brane, instance) = (Some(name.to_owned()), Some(format!("{name}.{replica:03}")));
        let event = Event::Fault { text: format!("its keeper {cause}: its state is gone").into() };
        let branes = self.plan.borrow().as_ref().map_or(0, |p| p.branes.len());
        self.push(Line { seq: 0, time_ns, core: None, brane, instance, event }, branes);
    }

    pub(super) fn push(&self, line: Line, branes: usize) {
        self.log.push(line, (KEPT / (branes + 1)).max(LEAST));
    }
}

/// What was said last.
#[derive(Debug)]
pub struct History {
    /// Another for each control that was started.
    id: u64,
    /// By number, with each line's place among those of its brane.
    lines: RefCell<BTreeMap<u64, (u64, Rc<Line>)>>,
    /// Of each brane, the numbers of its lines and what they cost.
    shares: RefCell<HashMap<Option<String>, Share>>,
    cost: Cell<usize>,
    next: Cell<u64>,
    came: Notify,
}

impl Default for History {
    fn default() -> Self {
        // No two controls of one appliance begin in the same nanosecond.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            id: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            lines: RefCell::default(),
            shares: RefCell::default(),
            cost: Cell::default(),
            next: Cell::default(),
            came: Notify::default(),
        }
    }
}

#[derive(Debug, Default)]
struct Share {
    /// Lines that it has ever had.
    said: u64,
    /// The numbers of those that are kept.
    numbers: VecDeque<u64>,
    cost: usize,
}

impl Share {
    /// How many of its lines come before that number.
    fn before(&self, number: u64) -> u64 {
        let later = self.numbers.len() - self.numbers.partition_point(|of_it| *of_it < number);
        self.said - later as u64
    }
}

/// What a line costs: its text, and about as much as keeping it takes.
fn cost(line: &Line) -> usize {
    let text = match &line.event {
        Event::Log { text, .. }
        | Event::Request { text, .. }
        | Event::Response { text, .. }
        | Event::End { text, .. }
        | Event::Deny { text }
        | Event::Trap { text }
        | Event::Kill { text }
        | Event::Fault { text }
        | Event::Audit { text } => text.len(),
        Event::Lost { .. } => 0,
    };
    size_of::<Line>() + 128 + text
}

impl History {
    /// Keeps a line, and lets go of its brane's oldest beyond its share.
    pub(super) fn push(&self, mut line: Line, share: usize) {
        let number = self.next.replace(self.next.get() + 1);
        line.seq = number;
        let mut lines = self.lines.borrow_mut();
        let mut shares = self.shares.borrow_mut();
        // Nearly always it is there, and its name need not be copied.
        if !shares.contains_key(&line.brane) {
            shares.insert(line.brane.clone(), Share::default());
        }
        let Some(own) = shares.get_mut(&line.brane) else { return };
        own.numbers.push_back(number);
        own.cost += cost(&line);
        self.cost.set(self.cost.get() + cost(&line));
        lines.insert(number, (own.said, Rc::new(line)));
        own.said += 1;
        let mut drop_oldest = |own: &mut Share| {
            if let Some((_, line)) = own.numbers.pop_front().and_then(|oldest| lines.remove(&oldest)) {
                own.cost -= cost(&line);
                self.cost.set(self.cost.get() - cost(&line));
            }
        };
        while own.cost > share {
            drop_oldest(own);
        }
        // Branes that are no longer there keep their lines while there is room: they are those that were silent longest.
        while self.cost.get() > 2 * KEPT
            && let Some((brane, silent)) = shares.iter_mut().min_by_key(|(_, share)| share.numbers.back().copied())
        {
            drop_oldest(silent);
            if silent.numbers.is_empty() {
                let brane = brane.clone();
                shares.remove(&brane);
            }
        }
        self.came.notify_waiters();
    }

    /// Waits until `look` finds something. What comes from when it looks is not missed.
    pub(super) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            let mut came = std::pin::pin!(self.came.notified());
            came.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            came.await;
        }
    }
}

/// A place in the log: in which history, and before which of its lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Another for each control that was started.
    pub history: u64,
    /// The number of the next line.
    pub number: u64,
}

impl Place {
    /// The field in an answer's head that has the place of its first line.
    pub const FIELD: &'static str = "gaia-log";

    /// Reads it as it is written.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (history, number) = text.split_once('.')?;
        Some(Self { history: history.parse().ok()?, number: number.parse().ok()? })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.history, self.number)
    }
}

/// Which lines are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query {
    /// Of these branes, or of all if there is none.
    pub branes: Vec<String>,
    /// Of these instances, `fetch.034`, or of all.
    pub instances: Vec<String>,
    /// Of these kinds, or of all. Losses are told whatever was asked for: they may be of it.
    pub kinds: Vec<Kind>,
    /// Not older than this, in nanoseconds since the Unix epoch.
    pub since_ns: u64,
    /// Nor younger than this.
    pub until_ns: Option<u64>,
    /// So many of those that are there, the last.
    pub lines: Option<usize>,
    /// Go on with what comes.
    pub follow: bool,
    /// Go on from here, where an answer broke off; then `lines` counts for nothing.
    pub from: Option<Place>,
}

/// The brane of an instance, and the instance as the log writes it: `fetch.34` is `fetch.034`.
///
/// # Errors
/// What to write instead.
pub fn instance(text: &str) -> Result<(String, String), String> {
    let parts = text.rsplit_once('.').filter(|(brane, serial)| !brane.is_empty() && serial.len() <= 20);
    let digits = |serial: &str| serial.bytes().all(|b| b.is_ascii_digit()).then(|| serial.parse().ok())?;
    let found = parts.and_then(|(brane, serial)| Some((brane, digits(serial)?)));
    let (brane, serial): (&str, u64) = found.ok_or("an instance's name, such as fetch.034")?;
    Ok((brane.to_owned(), format!("{brane}.{serial:03}")))
}

impl Query {
    /// Reads `brane=fetch&kind=REQ&since_ns=1&follow=true`, as its `Display` writes it.
    ///
    /// # Errors
    /// The part that is none of these, and what may stand there.
    pub fn parse(query: &str) -> Result<Self, String> {
        let mut all = Self::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let wrong = |what: &str| format!("{key}={value:.80}: {what}");
            let number = || value.parse().map_err(|_| wrong("a number"));
            match &*key {
                "brane" => all.branes.push(value.into_owned()),
                "instance" => all.instances.push(instance(&value).map_err(|what| wrong(&what))?.1),
                "kind" => all.kinds.push(value.parse().map_err(|what: String| wrong(&what))?),
                "since_ns" => all.since_ns = number()?,
                "until_ns" => all.until_ns = Some(number()?),
                "lines" => all.lines = Some(value.parse().map_err(|_| wrong("a number"))?),
                "follow" => all.follow = value.parse().map_err(|_| wrong("true or false"))?,
                "from" => all.from = Some(Place::parse(&value).ok_or_else(|| wrong("a place, HISTORY.NUMBER"))?),
                _ => return Err(wrong("brane, instance, kind, since_ns, until_ns, lines, follow or from")),
            }
        }
        Ok(all)
    }

    /// Whether lines of this brane are among those that are asked for.
    fn wants_of(&self, brane: Option<&str>) -> bool {
        let of_instance = |instance: &String| instance.rsplit_once('.').map(|(of, _)| of) == brane;
        (self.branes.is_empty() || self.branes.iter().any(|name| Some(name.as_str()) == brane))
            && (self.instances.is_empty() || self.instances.iter().any(of_instance))
    }

    fn wants(&self, line: &Line) -> bool {
        let lost = line.event.kind() == Kind::Lost;
        line.time_ns >= self.since_ns
            && self.until_ns.is_none_or(|until| line.time_ns <= until)
            && self.wants_of(line.brane.as_deref())
            && (lost || self.instances.is_empty() || line.instance.as_ref().is_some_and(|i| self.instances.contains(i)))
            && (lost || self.kinds.is_empty() || self.kinds.contains(&line.event.kind()))
    }

    /// A brane that is asked for and is not known, and the one that may be meant.
    fn unknown(&self, known: &[String]) -> Option<String> {
        let of_instances =
            self.instances.iter().filter_map(|instance| instance.rsplit_once('.')).map(|(brane, _)| brane);
        let mut asked = self.branes.iter().map(String::as_str).chain(of_instances);
        let unknown = asked.find(|asked| !known.iter().any(|known| known == asked))?;
        Some(match (nearest(unknown, known.iter().map(String::as_str)), known) {
            (Some(near), _) => format!("there is no brane {unknown:?}; did you mean {near:?}?"),
            (None, []) => format!("there is no brane {unknown:?}, nor any other"),
            (None, known) => {
                let some: Vec<_> = known.iter().take(10).map(String::as_str).collect();
                let more = if known.len() > some.len() { ", …" } else { "" };
                format!("there is no brane {unknown:?}; there are {}{more}", some.join(", "))
            }
        })
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(self.branes.iter().map(|name| ("brane", name)));
        query.extend_pairs(self.instances.iter().map(|name| ("instance", name)));
        query.extend_pairs(self.kinds.iter().map(|kind| ("kind", kind.name())));
        query.append_pair("since_ns", &self.since_ns.to_string());
        query.extend_pairs(self.until_ns.iter().map(|ns| ("until_ns", ns.to_string())));
        query.extend_pairs(self.lines.iter().map(|lines| ("lines", lines.to_string())));
        query.append_pair("follow", if self.follow { "true" } else { "false" });
        query.extend_pairs(self.from.iter().map(|place| ("from", place.to_string())));
        f.write_str(&query.finish())
    }
}

impl Control {
    /// Why a query cannot be answered: it asks for a brane that there is not, and of which nothing is kept either.
    pub(super) fn unknown_brane(&self, query: &Query) -> Option<String> {
        // Who goes on may be here before this control knows what serves.
        if query.from.is_some() {
            return None;
        }
        let serving =
            self.plan.borrow().iter().flat_map(|plan| &plan.branes).map(|b| b.name.clone()).collect::<Vec<_>>();
        let kept: Vec<String> = self.log.shares.borrow().keys().flatten().cloned().collect();
        let mut known = [serving, kept].concat();
        known.sort();
        known.dedup();
        query.unknown(&known)
    }
}

/// One who reads the history: a place in it, and what it was told of each brane so far.
#[derive(Debug)]
pub(super) struct Follower {
    query: Query,
    at: u64,
    /// How many lines of each brane it has passed. What it finds beyond that was let go before it came to it.
    passed: HashMap<Option<String>, u64>,
    /// Lines that it was too slow for.
    pub(super) missed: u64,
}

impl Follower {
    /// Lines that were let go before it asks are not missed.
    pub(super) fn new(history: &History, query: Query) -> Self {
        let lines = history.lines.borrow();
        let first = lines.keys().next().copied().unwrap_or(history.next.get());
        let at = match (query.from, query.lines) {
            (Some(place), _) if place.history == history.id => place.number.min(history.next.get()),
            (None, Some(0)) => history.next.get(),
            (None, Some(most)) => {
                let wanted = |(_, line): &&(u64, Rc<Line>)| query.wants(line) && line.event.kind() != Kind::Lost;
                lines.values().rev().filter(wanted).take(most).last().map_or(history.next.get(), |(_, line)| line.seq)
            }
            // All of another history is new: what its control had read, the one before it had not.
            _ => first,
        };
        let passed = history.shares.borrow().iter().map(|(brane, share)| (brane.clone(), share.before(at))).collect();
        drop(lines);
        Self { query, at, passed, missed: 0 }
    }

    fn place(&self, history: &History) -> Place {
        Place { history: history.id, number: self.at }
    }

    /// Gives the next lines, until `take` says that it has enough or there are no more.
    pub(super) fn read(&mut self, history: &History, mut take: impl FnMut(&Line) -> bool) {
        for (number, (nth, line)) in history.lines.borrow().range(self.at..) {
            self.at = number + 1;
            if !self.query.wants_of(line.brane.as_deref()) {
                continue;
            }
            let passed = match self.passed.get_mut(&line.brane) {
                Some(passed) => std::mem::replace(passed, nth + 1),
                None => self.passed.insert(line.brane.clone(), nth + 1).unwrap_or(0),
            };
            let records = nth.saturating_sub(passed);
            let mut goes_on = true;
            if records > 0 {
                self.missed += records;
                let seq = number.saturating_sub(1);
                let event = Event::Lost { records };
                goes_on = take(&Line { seq, core: None, instance: None, event, ..Line::clone(line) });
            }
            if self.query.wants(line) {
                goes_on &= take(line);
            }
            if !goes_on {
                return;
            }
        }
        self.at = self.at.max(history.next.get());
    }

    /// The next lines as JSON, one a line.
    fn piece(&mut self, history: &History) -> Vec<u8> {
        let mut piece = Vec::new();
        self.read(history, |line| {
            // To a vector nothing can fail, and a line is a map with words for keys.
            let _ = serde_json::to_writer(&mut piece, line);
            piece.push(b'\n');
            piece.len() < PIECE
        });
        piece
    }
}

/// The place of the first line that is asked for, and the lines, as JSON, one a line.
pub(super) fn lines(
    control: Rc<Control>,
    query: Query,
) -> (Place, impl Stream<Item = Result<Frame<Bytes>, Infallible>>) {
    let follower = Follower::new(&control.log, query);
    let place = follower.place(&control.log);
    let lines = futures_util::stream::unfold((control, follower), |(control, mut follower)| async move {
        let piece = next_piece(&control.log, &mut follower).await?;
        Some((Ok(Frame::data(piece)), (control, follower)))
    });
    (place, lines)
}

/// Waits for something to answer with; `None` when there is no more to come.
async fn next_piece(history: &History, follower: &mut Follower) -> Option<Bytes> {
    let follow = follower.query.follow;
    let mut look = || {
        let piece = follower.piece(history);
        (!piece.is_empty()).then(|| Bytes::from(piece))
    };
    if !follow {
        return look();
    }
    let waited = tokio::time::timeout(SIGN_OF_LIFE, history.until(look)).await;
    Some(waited.unwrap_or(Bytes::from_static(b"\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(brane: &str, text: &str) -> Line {
        let event = Event::Kill { text: text.to_owned().into() };
        Line { seq: 0, time_ns: 1, core: Some(0), brane: Some(brane.into()), instance: None, event }
    }

    fn of(brane: &str) -> Query {
        Query { branes: vec![brane.into()], ..Query::default() }
    }

    /// What a follower reads, without the numbers.
    fn read(history: &History, follower: &mut Follower) -> Vec<Line> {
        let mut all = Vec::new();
        follower.read(history, |line| {
            all.push(Line { seq: 0, ..line.clone() });
            true
        });
        all
    }

    fn read_all(history: &History, query: Query) -> Vec<Line> {
        read(history, &mut Follower::new(history, query))
    }

    #[test]
    fn a_flood_pushes_out_its_own_lines_alone() {
        let history = History::default();
        let mut since_the_beginning = Follower::new(&history, Query::default());
        history.push(said("quiet", "first"), LEAST);
        for n in 0..10_000 {
            history.push(said("loud", &n.to_string()), LEAST);
        }
        assert_eq!(read_all(&history, of("quiet")), [said("quiet", "first")]);
        let loud = read_all(&history, of("loud"));
        assert_eq!(loud.last(), Some(&said("loud", "9999")));
        assert!(loud.len() > 10 && loud.len() < LEAST / size_of::<Line>(), "{}", loud.len());
        assert!(history.cost.get() < 2 * LEAST);
        let all = read(&history, &mut since_the_beginning);
        let lost = |line: &Line| matches!(line.event, Event::Lost { .. });
        assert_eq!(all[0], said("quiet", "first"));
        assert!(all.iter().all(|line| !lost(line) || line.brane.as_deref() == Some("loud")), "the loss is its own");
        assert_eq!(since_the_beginning.missed, 10_000 - loud.len() as u64);
    }

    #[test]
    fn what_is_kept_of_branes_that_came_and_went_is_bounded() {
        let history = History::default();
        for brane in 0..3000 {
            for n in 0..40 {
                history.push(said(&format!("brane-{brane}"), &format!("{n} {}", "x".repeat(300))), LEAST);
            }
        }
        assert!(history.cost.get() <= 2 * KEPT);
        assert!(history.shares.borrow().len() < 2000);
        assert!(read_all(&history, of("brane-2999")).len() > 10, "the last is there");
        let sum: usize = history.shares.borrow().values().map(|share| share.cost).sum();
        assert_eq!(sum, history.cost.get());
    }

    #[test]
    fn who_follows_too_slowly_is_told_what_it_missed_of_what_it_asked_for() {
        let history = History::default();
        history.push(said("a", "0"), LEAST);
        let (mut slow, mut other) = (Follower::new(&history, of("a")), Follower::new(&history, of("b")));
        assert_eq!(read(&history, &mut slow), [said("a", "0")]);
        for n in 1..5000 {
            history.push(said("a", &n.to_string()), LEAST);
        }
        history.push(said("b", "one"), LEAST);
        let lines = read(&history, &mut slow);
        let Event::Lost { records } = lines[0].event else { panic!("{:?}", lines[0]) };
        assert_eq!(lines[1], said("a", &(1 + records).to_string()));
        assert_eq!((slow.missed, lines[0].brane.as_deref()), (records, Some("a")));
        assert_eq!(read(&history, &mut other), [said("b", "one")], "what others lost is nothing to it");
        assert_eq!(read(&history, &mut slow), []);
    }

    #[test]
    fn who_was_cut_off_goes_on_where_it_was() {
        let history = History::default();
        let mut first = Follower::new(&history, Query::default());
        for n in 0..10 {
            history.push(said("a", &n.to_string()), KEPT);
        }
        let mut taken = Vec::new();
        first.read(&history, |line| {
            taken.push(line.seq);
            taken.len() < 4
        });
        assert_eq!(taken, [0, 1, 2, 3]);
        let place = Place { history: history.id, number: taken[3] + 1 };
        let again = Query { from: Some(place), lines: Some(1), ..Query::default() };
        let rest = read_all(&history, again.clone());
        assert_eq!(rest.first(), Some(&said("a", "4")));
        assert_eq!(rest.len(), 6);
        // Another control has read other lines from the rings: none of them was told before.
        let other = History { id: history.id + 1, ..History::default() };
        other.push(said("a", "new"), KEPT);
        assert_eq!(read_all(&other, again), [said("a", "new")]);
        let ahead = Query { from: Some(Place { history: history.id, number: u64::MAX }), ..Query::default() };
        assert_eq!(read_all(&history, ahead), []);
    }

    #[test]
    fn the_last_lines_are_those_that_match() {
        let history = History::default();
        for n in 0..10 {
            history.push(said("a", &n.to_string()), KEPT);
            history.push(said("b", &n.to_string()), KEPT);
        }
        let last = |brane: &str, lines| read_all(&history, Query { lines: Some(lines), ..of(brane) });
        assert_eq!(last("a", 2), [said("a", "8"), said("a", "9")]);
        assert_eq!(last("a", 0), []);
        assert_eq!(last("b", 100).len(), 10);
        assert_eq!(last("c", 3), []);
    }

    #[test]
    fn a_query_says_which_lines() {
        let query = Query::parse("brane=fetch&since_ns=7&follow=true&kind=req&kind=DENY&until_ns=9").unwrap();
        let kinds = vec![Kind::Request, Kind::Deny];
        let wanted = Query { since_ns: 7, until_ns: Some(9), follow: true, kinds, ..of("fetch") };
        assert_eq!(query, wanted);
        let deny = |time_ns| Line { time_ns, event: Event::Deny { text: "".into() }, ..said("fetch", "") };
        assert!(!query.wants(&deny(6)) && query.wants(&deny(7)) && query.wants(&deny(9)) && !query.wants(&deny(10)));
        assert!(!query.wants(&Line { time_ns: 8, ..said("fetch", "another kind") }));
        assert!(query.wants(&Line { event: Event::Lost { records: 1 }, ..deny(8) }), "it may have been one of them");
        assert_eq!(Query::parse(""), Ok(Query::default()));
        for wrong in
            ["brane=a&nonsense", "kind=x", "lines=-1", "from=1", "instance=fetch", "instance=fetch.x", "follow=1"]
        {
            assert!(Query::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_instance_is_known_by_its_number() {
        let query = Query::parse("instance=fetch.34").unwrap();
        let of =
            |brane: &str, instance: Option<&str>| Line { instance: instance.map(str::to_owned), ..said(brane, "") };
        assert!(query.wants(&of("fetch", Some("fetch.034"))) && !query.wants(&of("fetch", Some("fetch.035"))));
        assert!(!query.wants(&of("fetch", None)) && !query.wants(&of("other", Some("other.034"))));
        assert!(query.wants(&Line { event: Event::Lost { records: 1 }, ..of("fetch", None) }));
        assert_eq!(instance("a.b.1").unwrap(), ("a.b".into(), "a.b.001".into()));
    }

    #[test]
    fn a_brane_that_is_not_there_is_told() {
        let known = ["fetch".to_owned(), "hello".to_owned()];
        assert_eq!(of("fetch").unknown(&known), None);
        assert_eq!(of("fecth").unknown(&known).unwrap(), "there is no brane \"fecth\"; did you mean \"fetch\"?");
        assert_eq!(of("x").unknown(&known).unwrap(), "there is no brane \"x\"; there are fetch, hello");
        assert!(of("x").unknown(&[]).unwrap().contains("nor any other"));
        let by_instance = Query::parse("instance=helo.001").unwrap();
        assert!(by_instance.unknown(&known).unwrap().contains("\"hello\""));
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused(text in "\\PC{0,60}") {
            if let Ok(query) = Query::parse(&text) {
                prop_assert_eq!(Query::parse(&query.to_string()).unwrap(), query);
            }
        }

        #[test]
        fn a_query_is_read_as_it_is_written(
            branes in proptest::collection::vec("\\PC{0,20}", 0..3),
            serials in proptest::collection::vec(any::<u64>(), 0..3),
            kinds in proptest::sample::subsequence(Kind::ALL.to_vec(), 0..10),
            numbers in any::<(u64, Option<u64>, Option<usize>, bool)>(),
            from in any::<Option<(u64, u64)>>()
        ) {
            let instances = serials.iter().map(|serial| format!("a.{serial:03}")).collect();
            let (since_ns, until_ns, lines, follow) = numbers;
            let from = from.map(|(history, number)| Place { history, number });
            let query = Query { branes, instances, kinds, since_ns, until_ns, lines, follow, from };
            prop_assert_eq!(Query::parse(&query.to_string()).unwrap(), query);
        }

        /// However lines come and are read, each of those asked for is read once and in order, or counted as missed.
        #[test]
        fn each_line_is_read_or_missed(turns in proptest::collection::vec((0_usize..3, 1_usize..60, 0_usize..40), 1..60)) {
            let history = History::default();
            let wanted = Query { branes: vec!["0".into(), "1".into()], ..Query::default() };
            let mut follower = Follower::new(&history, wanted);
            let (mut pushed, mut read, mut told, mut last) = (0, 0, 0, None);
            for (brane, times, takes) in turns.into_iter().chain([(0, 1, usize::MAX), (1, 1, usize::MAX)]) {
                for _ in 0..times {
                    history.push(said(&brane.to_string(), "x"), 4096);
                    pushed += u64::from(brane < 2);
                }
                let (mut left, mut wrong) = (takes, false);
                if takes > 0 {
                    follower.read(&history, |line| {
                        match line.event {
                            Event::Lost { records } => told += records,
                            _ => {
                                wrong |= last.is_some_and(|last| line.seq <= last) || line.brane.as_deref() == Some("2");
                                (read, last) = (read + 1, Some(line.seq));
                            }
                        }
                        left = left.saturating_sub(1);
                        left > 1
                    });
                }
                prop_assert!(!wrong);
            }
            prop_assert_eq!(told, follower.missed);
            prop_assert_eq!(read + told, pushed);
        }
    }
}
