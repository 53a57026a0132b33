//! Control's part of profiles: it adds up what workers and keepers count, the living and those that have ended, and keeps the
//! request counts of the last seconds.
//!
//! What a worker's page says is read by position and never trusted: see [`crate::histogram::Counts::of`] and [`Stacks::of`].

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::api::{Answer, failed, json};
use super::{Control, Runs, Worker};
use crate::histogram::{Distribution, nanos};
use crate::stacks::{Gathered, Stacks};
use crate::statistics::{self, MAX_BRANES};
use crate::worker::turns::TICK;

/// How long the windows are whose rates are compared.
const WINDOW: usize = 2;
/// How many of them there are.
const WINDOWS: usize = 5;
/// Nodes of stacks that are kept of all that has ended, together.
const ENDED_NODES: usize = 65_536;

/// `GET /v1/profile`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// When, in nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Seconds over which rates are told.
    pub window_s: u64,
    /// The branes, in the graph's order; or the one that was asked for, or its one instance.
    pub branes: Vec<Work>,
}

/// What a brane, or one of its pinned instances, has had to do. Numbers only grow while this control lives, whatever is
/// deployed or started again meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Its name.
    pub name: String,
    /// Requests: of a brane those that were routed to it, of an instance those whose work has ended.
    pub requests: u64,
    /// Answers of 500 and above, its own and the runtime's.
    pub failed: u64,
    /// Traps.
    pub traps: u64,
    /// Missed deadlines.
    pub late: u64,
    /// Refused because no instance became free.
    pub refused: u64,
    /// Ended because of memory.
    pub killed: u64,
    /// Instances that were given a request.
    pub instances: u64,
    /// Records of it that the log had no room for.
    pub dropped: u64,
    /// Nanoseconds that its instances waited for their quota of the core.
    pub throttled_ns: u64,
    /// How often it is asked.
    pub rate: Rate,
    /// From dispatch to the guest's first instruction, in nanoseconds; of pinned instances, their starts.
    pub cold: Distribution,
    /// Wall time in the guest, in nanoseconds.
    pub exec: Distribution,
    /// Processor time in the guest, in nanoseconds.
    pub cpu: Distribution,
    /// What an instance held at the end of its request as `mem_max` counts it, in bytes.
    pub mem: Distribution,
}

impl Work {
    /// What came since it was `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let of = |now: &Distribution, then: &Distribution| Distribution(now.0.since(&then.0));
        Self {
            name: self.name.clone(),
            requests: self.requests.saturating_sub(before.requests),
            failed: self.failed.saturating_sub(before.failed),
            traps: self.traps.saturating_sub(before.traps),
            late: self.late.saturating_sub(before.late),
            refused: self.refused.saturating_sub(before.refused),
            killed: self.killed.saturating_sub(before.killed),
            instances: self.instances.saturating_sub(before.instances),
            dropped: self.dropped.saturating_sub(before.dropped),
            throttled_ns: self.throttled_ns.saturating_sub(before.throttled_ns),
            rate: self.rate.clone(),
            cold: of(&self.cold, &before.cold),
            exec: of(&self.exec, &before.exec),
            cpu: of(&self.cpu, &before.cpu),
            mem: of(&self.mem, &before.mem),
        }
    }
}

/// Requests each second, over the last windows that are known.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Over all of them.
    pub per_second: f64,
    /// What they are doing.
    pub trend: Trend,
    /// Of each window of two seconds, the oldest first; up to five.
    pub windows: Vec<f64>,
}

/// How the last windows compare: see [`Trend::of`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trend {
    /// Too few windows are known.
    #[default]
    New,
    /// There was no request.
    Idle,
    /// All agree.
    Steady,
    /// They grow.
    Rising,
    /// They shrink.
    Falling,
    /// None of these.
    Bursty,
}

impl Trend {
    /// Of requests in windows of so many seconds each. They agree where none is farther from their mean than a tenth, or than chance
    /// makes it: two standard deviations of requests that come independently. They grow where the last is larger than the first by more
    /// than that, and none is smaller than the one before by as much.
    #[must_use]
    pub fn of(rates: &[f64], seconds: f64) -> Self {
        if rates.len() < 3 {
            return Self::New;
        }
        #[expect(clippy::cast_precision_loss, reason = "there are five")]
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        if mean <= 0.0 {
            return Self::Idle;
        }
        let apart = (mean / 10.0).max(2.0 * (mean * seconds).sqrt() / seconds);
        let (first, last) = (rates[0], rates[rates.len() - 1]);
        if rates.iter().all(|rate| (rate - mean).abs() <= apart) {
            Self::Steady
        } else if last - first > apart && rates.windows(2).all(|pair| pair[1] - pair[0] > -apart) {
            Self::Rising
        } else if first - last > apart && rates.windows(2).all(|pair| pair[0] - pair[1] > -apart) {
            Self::Falling
        } else {
            Self::Bursty
        }
    }

    /// As it stands behind a rate.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Idle => "idle",
            Self::Steady => "steady",
            Self::Rising => "rising",
            Self::Falling => "falling",
            Self::Bursty => "bursty",
        }
    }
}

/// `GET /v1/profile/stacks`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    /// When, in nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// What a tick is, in nanoseconds.
    pub tick_ns: u64,
    /// The branes, as in [`Profile`].
    pub branes: Vec<Sampled>,
}

/// The samples of one brane, or of one pinned instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sampled {
    /// Its name.
    pub name: String,
    /// Where it was when ticks came.
    pub stacks: Stacks,
}

/// Whose profile is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Whose {
    /// All branes'.
    #[default]
    All,
    /// This brane's.
    Brane(String),
    /// This pinned instance's: `counter.001`.
    Instance(String),
}

impl Whose {
    /// Reads `brane=fetch` or `instance=counter.001`, or nothing.
    ///
    /// # Errors
    /// What is none of these.
    pub fn parse(query: &str) -> Result<Self, String> {
        match query.split_once('=') {
            None if query.is_empty() => Ok(Self::All),
            Some(("brane", name)) if !name.contains('&') => Ok(Self::Brane(name.to_owned())),
            Some(("instance", name)) if !name.contains('&') => Ok(Self::Instance(name.to_owned())),
            _ => Err(query.to_owned()),
        }
    }

    /// As the client writes it.
    #[must_use]
    pub fn query(&self) -> String {
        match self {
            Self::All => String::new(),
            Self::Brane(name) => format!("?brane={name}"),
            Self::Instance(name) => format!("?instance={name}"),
        }
    }
}

/// What processes have counted that have ended, and how many requests there were in the last seconds: by the names of branes, and
/// of pinned instances, which have a dot.
#[derive(Debug, Default)]
pub(super) struct Profiles {
    ended: RefCell<BTreeMap<String, Ended>>,
    /// The newest last.
    recent: RefCell<BTreeMap<String, VecDeque<(Instant, u64)>>>,
}

#[derive(Debug, Default)]
struct Ended {
    work: Work,
    stacks: Gathered,
}

fn instance_name(brane: &str, replica: u32) -> String {
    format!("{brane}.{replica:03}")
}

impl Worker {
    /// Adds what this process has counted of the brane in this row of its page.
    fn add_to(&self, work: &mut Work, row: usize) {
        let Some(counted) = self.statistics.branes.get(row) else { return };
        let counts = [
            (&mut work.requests, &counted.requests),
            (&mut work.failed, &counted.failed),
            (&mut work.traps, &counted.traps),
            (&mut work.late, &counted.late),
            (&mut work.refused, &counted.refused),
            (&mut work.killed, &counted.killed),
            (&mut work.instances, &counted.instances),
            (&mut work.dropped, &counted.log.dropped),
            (&mut work.throttled_ns, &counted.throttled_ns),
        ];
        for (sum, count) in counts {
            *sum = sum.saturating_add(count.load(Relaxed));
        }
        // Where there never was an instance there is nothing to read.
        if counted.instances.load(Relaxed) > 0 {
            let counts = statistics::distributions(&self.page, row);
            for (own, counts) in [&mut work.cold, &mut work.exec, &mut work.cpu, &mut work.mem].into_iter().zip(counts)
            {
                own.0.merge(&counts);
            }
        }
    }

    /// The rows of its page that are in use, and whose they are: to read one of the others would have the kernel find memory for it.
    pub(super) fn rows(&self, control: &Control) -> Vec<(usize, String)> {
        match &self.runs {
            Runs::Kept { name, .. } => vec![(0, name.clone())],
            Runs::Branes { .. } => {
                let plans = control.plans.borrow();
                let branes = plans.get(&self.generation).into_iter().flat_map(|plan| &plan.branes);
                branes.take(MAX_BRANES).enumerate().map(|(row, brane)| (row, brane.name.clone())).collect()
            }
        }
    }

    /// The instance that it keeps.
    fn instance(&self) -> Option<String> {
        match &self.runs {
            Runs::Kept { name, replica, .. } => Some(instance_name(name, *replica)),
            Runs::Branes { .. } => None,
        }
    }
}

impl Control {
    /// A process has ended: what it has counted is kept.
    pub(super) fn profile_ended(&self, worker: &Worker) {
        let rows = worker.rows(self);
        let most = (ENDED_NODES / rows.len().max(1)).max(64);
        let mut ended = self.profiles.ended.borrow_mut();
        let also = worker.instance().map(|name| (0, name));
        for (row, name) in rows.into_iter().chain(also) {
            let own = ended.entry(name).or_default();
            worker.add_to(&mut own.work, row);
            own.stacks.merge(&statistics::sampled(&worker.page, row), most);
        }
        // Names of branes that are there no more, for as long as there is room.
        if ended.len() > 2 * MAX_BRANES {
            let plan = self.plan.borrow();
            let serves = |name: &str| plan.iter().flat_map(|plan| &plan.branes).any(|brane| brane.name == name);
            ended.retain(|name, _| serves(name.split('.').next().unwrap_or(name)));
        }
    }

    /// Notes how many requests there have been until now. Called once a second.
    pub(super) fn note_requests(&self) {
        let now = Instant::now();
        let mut totals = BTreeMap::<String, u64>::new();
        for worker in self.workers.borrow().iter() {
            for (row, name) in worker.rows(self) {
                let routed = worker.statistics.branes.get(row).map_or(0, |row| row.requests.load(Relaxed));
                *totals.entry(name).or_default() += routed;
            }
            if let Some(name) = worker.instance() {
                *totals.entry(name).or_default() += statistics::finished(&worker.page, 0);
            }
        }
        let ended = self.profiles.ended.borrow();
        let mut recent = self.profiles.recent.borrow_mut();
        recent.retain(|name, _| totals.contains_key(name));
        for (name, total) in totals {
            let before = ended
                .get(&name)
                .map_or(0, |ended| if name.contains('.') { ended.work.exec.0.count() } else { ended.work.requests });
            let all = recent.entry(name).or_default();
            all.push_back((now, total.saturating_add(before)));
            if all.len() > WINDOW * WINDOWS + 1 {
                all.pop_front();
            }
        }
    }

    fn rate(&self, name: &str) -> Rate {
        let recent = self.profiles.recent.borrow();
        let Some(all) = recent.get(name) else { return Rate::default() };
        let all: Vec<(Instant, u64)> = all.iter().copied().collect();
        // Windows end with the newest.
        let ends: Vec<(Instant, u64)> = all.into_iter().rev().step_by(WINDOW).collect();
        #[expect(clippy::cast_precision_loss, reason = "requests of some seconds")]
        let between = |newer: &(Instant, u64), older: &(Instant, u64)| {
            let seconds = newer.0.duration_since(older.0).as_secs_f64();
            if seconds > 0.0 { newer.1.saturating_sub(older.1) as f64 / seconds } else { 0.0 }
        };
        let windows: Vec<f64> = ends.windows(2).rev().map(|pair| between(&pair[0], &pair[1])).collect();
        let per_second = ends.first().zip(ends.last()).map_or(0.0, |(newest, oldest)| between(newest, oldest));
        #[expect(clippy::cast_precision_loss, reason = "two")]
        let trend = Trend::of(&windows, WINDOW as f64);
        Rate { per_second, trend, windows }
    }

    /// The names that are asked for; or why there is none.
    fn names_of(&self, query: &str) -> Result<Vec<String>, (StatusCode, String)> {
        let whose = Whose::parse(query)
            .map_err(|part| (StatusCode::BAD_REQUEST, format!("{part:?}: brane=NAME or instance=NAME")))?;
        let plan = self.plan.borrow();
        let branes = || plan.iter().flat_map(|plan| &plan.branes);
        match whose {
            Whose::All => Ok(branes().map(|brane| brane.name.clone()).collect()),
            Whose::Brane(name) if branes().any(|brane| brane.name == name) => Ok(vec![name]),
            Whose::Brane(name) => {
                let all: Vec<&str> = branes().map(|brane| brane.name.as_str()).take(20).collect();
                let all = if all.is_empty() { "nothing serves".into() } else { all.join(", ") };
                Err((StatusCode::NOT_FOUND, format!("there is no brane {name:?}: {all}")))
            }
            Whose::Instance(name) => {
                if self.workers.borrow().iter().any(|worker| worker.instance().as_ref() == Some(&name)) {
                    return Ok(vec![name]);
                }
                let words = "its brane is not pinned, or it is not there: of an instance that serves one request, the log tells all";
                Err((StatusCode::NOT_FOUND, format!("there is no profile of {name:?}: {words}")))
            }
        }
    }

    /// Calls `each` with the processes that have to do with this name, and the row in the page of each.
    fn each_with(&self, name: &str, mut each: impl FnMut(&Worker, usize)) {
        for worker in self.workers.borrow().iter() {
            let row = if name.contains('.') {
                (worker.instance().as_deref() == Some(name)).then_some(0)
            } else {
                match &worker.runs {
                    Runs::Kept { name: of, .. } => (of == name).then_some(0),
                    Runs::Branes { .. } => {
                        let plans = self.plans.borrow();
                        let plan = plans.get(&worker.generation);
                        plan.and_then(|plan| plan.branes.iter().position(|brane| brane.name == name))
                    }
                }
            };
            if let Some(row) = row {
                each(worker, row);
            }
        }
    }

    /// What this brane or pinned instance has had to do.
    pub(super) fn work(&self, name: &str) -> Work {
        let mut work = self.profiles.ended.borrow().get(name).map(|ended| ended.work.clone()).unwrap_or_default();
        self.each_with(name, |worker, row| worker.add_to(&mut work, row));
        if name.contains('.') {
            work.requests = work.exec.0.count();
        }
        Work { name: name.to_owned(), rate: self.rate(name), ..work }
    }

    /// `GET /v1/profile`
    pub(super) fn profile(&self, query: &str) -> Answer {
        match self.names_of(query) {
            Ok(names) => {
                let branes = names.iter().map(|name| self.work(name)).collect();
                let window_s = (WINDOW * WINDOWS) as u64;
                json(StatusCode::OK, &Profile { time_ns: now_ns(), window_s, branes })
            }
            Err((status, why)) => failed(status, &why),
        }
    }

    /// `GET /v1/profile/stacks`
    pub(super) fn stacks(&self, query: &str) -> Answer {
        match self.names_of(query) {
            Ok(names) => {
                let sampled = |name: String| {
                    let ended = self.profiles.ended.borrow();
                    let mut all = ended.get(&name).map(|ended| ended.stacks.clone()).unwrap_or_default();
                    self.each_with(&name, |worker, row| {
                        if worker.statistics.branes.get(row).is_some_and(|row| row.instances.load(Relaxed) > 0) {
                            all.merge(&statistics::sampled(&worker.page, row), usize::MAX);
                        }
                    });
                    Sampled { name, stacks: all.stacks }
                };
                let branes = names.into_iter().map(sampled).collect();
                json(StatusCode::OK, &Samples { time_ns: now_ns(), tick_ns: nanos(TICK), branes })
            }
            Err((status, why)) => failed(status, &why),
        }
    }
}

fn now_ns() -> u64 {
    let now: Duration = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    nanos(now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_windows_tell_the_trend() {
        for (rates, trend) in [
            (&[1410.0, 1400.0, 1450.0, 1380.0, 1405.0][..], Trend::Steady),
            (&[100.0, 150.0, 200.0, 250.0, 300.0], Trend::Rising),
            (&[300.0, 250.0, 200.0, 210.0, 100.0], Trend::Falling),
            (&[10.0, 5000.0, 10.0, 4000.0, 10.0], Trend::Bursty),
            (&[0.0; 5], Trend::Idle),
            (&[5.0, 5.0], Trend::New),
            (&[], Trend::New),
            // Three, five and four requests.
            (&[1.5, 2.5, 2.0, 2.0, 1.5], Trend::Steady),
        ] {
            assert_eq!(Trend::of(rates, 2.0), trend, "{rates:?}");
        }
    }

    #[test]
    fn a_query_says_whose_profile() {
        for whose in [Whose::All, Whose::Brane("fetch".into()), Whose::Instance("counter.001".into())] {
            assert_eq!(Whose::parse(whose.query().trim_start_matches('?')), Ok(whose));
        }
        assert!(Whose::parse("brane=a&instance=b").is_err() && Whose::parse("nonsense").is_err());
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused(text in "\\PC{0,60}") {
            let _ = Whose::parse(&text);
        }

        #[test]
        fn what_is_within_a_tenth_is_steady(mean in 1.0_f64..1e6, parts in proptest::collection::vec(-0.04_f64..0.04, 3..6)) {
            let rates: Vec<f64> = parts.iter().map(|part| mean * (1.0 + part)).collect();
            prop_assert_eq!(Trend::of(&rates, 2.0), Trend::Steady);
        }
    }
}
