//! Control's part of the log: it empties the workers' rings and keeps what was said last, for whoever asks.
//!
//! Each brane has its share of what is kept, so that one that floods pushes out its own lines and nobody else's. Who
//! follows has a place in the history and no queue: if it does not read, it misses lines and is told how many.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::Stream;
use hyper::body::Frame;
use tokio::sync::Notify;

use super::report::Line;
use super::{Control, Runs, Worker};
use crate::log::{Event, Reader, Record, Subject};

/// What is kept in all, in bytes as [`cost`] counts them.
const KEPT: usize = 8 << 20;
/// What each brane may keep, however many there are.
const LEAST: usize = 16 << 10;
/// How long control waits between two looks into a ring that is written to: so many milliseconds a ring must last.
const PAUSE: Duration = Duration::from_millis(5);
/// Records taken from one ring before others have their turn.
const BATCH: usize = 512;
/// What one piece of an answer may have, in bytes.
const PIECE: usize = 64 << 10;

/// Empties a worker's ring until the worker is gone, and then once more.
pub(super) async fn read(control: Rc<Control>, worker: Rc<Worker>) {
    let mut reader = Reader::new(&worker.statistics);
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
        self.push(Line { time_ns, core, brane, instance, event: record.event }, plan.map_or(0, |p| p.branes.len()));
    }

    /// A keeper's process ended as it should not, and with it what the instance knew.
    pub(super) fn keeper_ended(&self, name: &str, replica: u32, cause: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let (brane, instance) = (Some(name.to_owned()), Some(format!("{name}.{replica:03}")));
        let event = Event::Fault { text: format!("its keeper {cause}: its state is gone").into() };
        let branes = self.plan.borrow().as_ref().map_or(0, |p| p.branes.len());
        self.push(Line { time_ns, core: None, brane, instance, event }, branes);
    }

    pub(super) fn push(&self, line: Line, branes: usize) {
        self.log.push(line, (KEPT / (branes + 1)).max(LEAST));
    }
}

/// What was said last.
#[derive(Debug, Default)]
pub struct History {
    lines: RefCell<BTreeMap<u64, Rc<Line>>>,
    /// Of each brane, the numbers of its lines and what they cost.
    shares: RefCell<HashMap<Option<String>, Share>>,
    cost: Cell<usize>,
    next: Cell<u64>,
    came: Notify,
}

#[derive(Debug, Default)]
struct Share {
    numbers: VecDeque<u64>,
    cost: usize,
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
    fn push(&self, line: Line, share: usize) {
        let number = self.next.replace(self.next.get() + 1);
        let mut lines = self.lines.borrow_mut();
        let mut shares = self.shares.borrow_mut();
        let own = shares.entry(line.brane.clone()).or_default();
        own.numbers.push_back(number);
        own.cost += cost(&line);
        self.cost.set(self.cost.get() + cost(&line));
        lines.insert(number, Rc::new(line));
        let mut drop_oldest = |own: &mut Share| {
            if let Some(line) = own.numbers.pop_front().and_then(|oldest| lines.remove(&oldest)) {
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
}

/// Which lines are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query {
    /// Of this brane alone.
    pub brane: Option<String>,
    /// Not older than this, in nanoseconds since the Unix epoch.
    pub since_ns: u64,
    /// Go on with what comes.
    pub follow: bool,
}

impl Query {
    /// Reads `brane=fetch&since_ns=1&follow=true`, as the client writes it: each part once, names and numbers alone.
    ///
    /// # Errors
    /// The part that is none of these.
    pub fn parse(query: &str) -> Result<Self, String> {
        let mut all = Self::default();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("brane", name)) => all.brane = Some(name.to_owned()),
                Some(("since_ns", number)) => all.since_ns = number.parse().map_err(|_| part.to_owned())?,
                Some(("follow", "true")) => all.follow = true,
                _ => return Err(part.to_owned()),
            }
        }
        Ok(all)
    }

    fn wants(&self, line: &Line) -> bool {
        line.time_ns >= self.since_ns && self.brane.as_ref().is_none_or(|name| line.brane.as_ref() == Some(name))
    }
}

/// The lines that are asked for, as JSON, one a line.
pub(super) fn lines(control: Rc<Control>, query: Query) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
    // What is there is not late: nothing before the first line is missed.
    let first = control.log.lines.borrow().keys().next().copied().unwrap_or(control.log.next.get());
    let caught_up = control.log.next.get();
    futures_util::stream::unfold((control, query, first), move |(control, query, mut at)| async move {
        let piece = next_piece(&control.log, &query, &mut at, caught_up).await?;
        Some((Ok(Frame::data(piece)), (control, query, at)))
    })
}

/// Waits for something to answer with; `None` when there is no more to come.
async fn next_piece(history: &History, query: &Query, at: &mut u64, caught_up: u64) -> Option<Bytes> {
    loop {
        let mut came = std::pin::pin!(history.came.notified());
        // From here on a line that comes is noticed.
        came.as_mut().enable();
        let (piece, next) = piece(history, query, *at, caught_up);
        *at = next;
        if !piece.is_empty() {
            return Some(piece.into());
        }
        if !query.follow {
            return None;
        }
        came.await;
    }
}

/// The next lines from number `at` on, and the number behind them.
fn piece(history: &History, query: &Query, at: u64, caught_up: u64) -> (Vec<u8>, u64) {
    let (mut piece, mut expected) = (Vec::new(), at);
    for (number, line) in history.lines.borrow().range(at..) {
        // Lines that were let go before anyone asked are not missed.
        let missed = number - expected.max(caught_up).min(*number);
        expected = number + 1;
        if missed > 0 {
            let event = Event::Lost { records: missed };
            write(&mut piece, &Line { brane: None, instance: None, event, ..Line::clone(line) });
        }
        if query.wants(line) {
            write(&mut piece, line);
        }
        if piece.len() >= PIECE {
            return (piece, expected);
        }
    }
    (piece, history.next.get())
}

fn write(piece: &mut Vec<u8>, line: &Line) {
    piece.extend(serde_json::to_vec(line).unwrap_or_default());
    piece.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(brane: &str, text: &str) -> Line {
        let event = Event::Kill { text: text.to_owned().into() };
        Line { time_ns: 1, core: Some(0), brane: Some(brane.into()), instance: None, event }
    }

    fn read(history: &History, query: &Query, at: u64, caught_up: u64) -> Vec<Line> {
        let (piece, _) = piece(history, query, at, caught_up);
        piece.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()).collect()
    }

    #[test]
    fn a_flood_pushes_out_its_own_lines_alone() {
        let history = History::default();
        history.push(said("quiet", "first"), LEAST);
        for n in 0..10_000 {
            history.push(said("loud", &n.to_string()), LEAST);
        }
        let of = |brane: &str| Query { brane: Some(brane.into()), ..Query::default() };
        assert_eq!(read(&history, &of("quiet"), 0, 10_001), [said("quiet", "first")]);
        let loud = read(&history, &of("loud"), 0, 10_001);
        assert_eq!(loud.last(), Some(&said("loud", "9999")));
        assert!(loud.len() > 10 && loud.len() < LEAST / size_of::<Line>(), "{}", loud.len());
        assert!(history.cost.get() < 2 * LEAST);
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
        let last = Query { brane: Some("brane-2999".into()), ..Query::default() };
        assert!(read(&history, &last, 0, u64::MAX).len() > 10, "the last is there");
        let sum: usize = history.shares.borrow().values().map(|share| share.cost).sum();
        assert_eq!(sum, history.cost.get());
    }

    #[test]
    fn who_follows_too_slowly_is_told_what_it_missed() {
        let history = History::default();
        history.push(said("a", "0"), LEAST);
        for n in 1..5000 {
            history.push(said("a", &n.to_string()), LEAST);
        }
        // It had read up to number 1 when the rest came.
        let lines = read(&history, &Query::default(), 1, 1);
        let Event::Lost { records } = lines[0].event else { panic!("{:?}", lines[0]) };
        assert_eq!(lines[1], said("a", &(1 + records).to_string()));
    }

    #[test]
    fn a_query_says_which_lines() {
        let query = Query::parse("brane=fetch&since_ns=7&follow=true").unwrap();
        assert_eq!(query, Query { brane: Some("fetch".into()), since_ns: 7, follow: true });
        assert!(!query.wants(&said("fetch", "too old")));
        assert_eq!(Query::parse(""), Ok(Query::default()));
        assert!(Query::parse("brane=a&nonsense").is_err());
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused(text in "\\PC{0,60}") {
            let _ = Query::parse(&text);
        }
    }
}
