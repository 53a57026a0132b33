//! What a process holds, and whether that grows: of figures taken at equal times while the same work goes on.
//!
//! A leak grows for as long as the work goes on. A pool that fills, an allocator that keeps its highest mark, a neighbour who uses the
//! machine: these make a step, or go up and down. So what is looked at first is left out (the warm-up), the rest is cut into quarters, and
//! medians are held against each other, over which a few odd figures have no power.

use std::fmt;

use anyhow::{Context as _, Result};

use crate::workstation::kib;

/// What a process holds at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Held {
    /// KiB of memory that are its own, and its share of what it shares (`Pss`).
    pub memory: f64,
    /// KiB of page tables.
    pub tables: f64,
    /// Open descriptors.
    pub files: f64,
    /// Mappings.
    pub mappings: f64,
    /// Threads.
    pub threads: f64,
}

impl Held {
    /// By this process of this machine.
    ///
    /// # Errors
    /// If there is none, or it is not ours to be looked into.
    #[expect(clippy::cast_precision_loss, reason = "far from 2^52")]
    pub fn by(pid: i64) -> Result<Self> {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
        let rollup = read("smaps_rollup")?;
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next()?.parse().ok());
        let names =
            |folder: &str| Ok::<_, std::io::Error>(std::fs::read_dir(format!("/proc/{pid}/{folder}"))?.count() as f64);
        Ok(Self {
            memory: pss.context("no Pss")?,
            tables: kib(pid, "VmPTE")? as f64,
            files: names("fd")?,
            mappings: read("maps")?.lines().count() as f64,
            threads: names("task")?,
        })
    }
}

/// Of several processes together.
impl std::ops::AddAssign for Held {
    fn add_assign(&mut self, other: Self) {
        self.memory += other.memory;
        self.tables += other.tables;
        self.files += other.files;
        self.mappings += other.mappings;
        self.threads += other.threads;
    }
}

/// What may come on top without being growth: the larger of the two.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    /// In the unit of the figures.
    pub least: f64,
    /// A part of what there was.
    pub part: f64,
}

/// What became of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// The medians of the quarters after the warm-up.
    pub quarters: [f64; 4],
    /// What may come on top.
    pub allowed: f64,
    /// Whether it grows.
    pub grows: bool,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, second, third, last] = self.quarters;
        let word = if self.grows { "GROWS" } else { "stays" };
        write!(
            f,
            "{word} {first:.1} → {second:.1} → {third:.1} → {last:.1}, {:+.1} of {:.1}",
            last - first,
            self.allowed
        )
    }
}

/// The first part of the figures is the warm-up.
const WARM_UP: usize = 5;
/// Figures that it takes to judge.
pub const LEAST: usize = 20;
/// A step this many times larger than what is allowed is growth, too.
const STEP: f64 = 3.0;

/// Whether a series grows: by more than is allowed from the first quarter after the warm-up to the last, and in each of the steps between
/// them by a tenth of that at least; or by very much.
///
/// # Panics
/// If there are fewer than [`LEAST`] figures.
#[must_use]
pub fn judge(figures: &[f64], allowance: Allowance) -> Verdict {
    assert!(figures.len() >= LEAST, "{} figures", figures.len());
    let warm = &figures[figures.len() / WARM_UP..];
    let quarters = [0, 1, 2, 3].map(|n| median(&warm[n * warm.len() / 4..(n + 1) * warm.len() / 4]));
    let allowed = allowance.least.max(allowance.part * quarters[0]);
    let growth = quarters[3] - quarters[0];
    let steady = quarters.windows(2).all(|two| two[1] - two[0] > growth / 10.0);
    Verdict { quarters, allowed, grows: growth > allowed && steady || growth > STEP * allowed }
}

/// The middle one.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEN: Allowance = Allowance { least: 10.0, part: 0.0 };

    fn judged(of: impl Fn(f64) -> f64) -> Verdict {
        judge(&(0..100).map(|n| of(f64::from(n))).collect::<Vec<_>>(), TEN)
    }

    #[test]
    fn a_leak_is_told_from_all_that_is_none() {
        assert!(judged(|n| 100.0 + n / 5.0).grows, "one each time");
        assert!(judged(|n| 100.0 + (n / 10.0).floor() * 3.0).grows, "some at each deploy");
        assert!(judged(|n| 100.0 + n / 5.0 + if n % 7.0 == 0.0 { 500.0 } else { 0.0 }).grows, "beside spikes");
        assert!(judged(|n| if n < 50.0 { 100.0 } else { 131.0 }).grows, "a step that is too large for anything else");
        assert!(!judged(|_| 100.0).grows);
        assert!(!judged(|n| 100.0 + n / 10.0).grows, "less than what is allowed");
        assert!(!judged(|n| 100.0 + (n * 4.0).min(60.0)).grows, "a pool that fills while it warms up");
        assert!(!judged(|n| if n < 50.0 { 100.0 } else { 120.0 }).grows, "one new highest mark");
        assert!(!judged(|n| 100.0 + (n % 20.0) * 3.0).grows, "what is collected now and then");
        assert!(!judged(|n| if n > 90.0 { 150.0 } else { 100.0 }).grows, "the machine is busy towards the end");
        assert!(!judged(|n| 200.0 - n).grows, "less and less");
        let part = Allowance { least: 1.0, part: 0.5 };
        assert!(!judge(&[100.0, 120.0].repeat(20), part).grows);
    }

    proptest! {
        #[test]
        fn noise_alone_is_no_growth(noise in proptest::collection::vec(-5.0..5.0_f64, LEAST..200)) {
            let figures: Vec<f64> = noise.iter().map(|n| 100.0 + n).collect();
            prop_assert!(!judge(&figures, TEN).grows);
        }

        #[test]
        fn a_leak_of_four_times_the_allowance_is_found_in_noise(noise in proptest::collection::vec(-1.25..1.25_f64, LEAST..200)) {
            let each = 40.0 / f64::from(u32::try_from(noise.len()).unwrap());
            let mut leaked = 100.0;
            let one = |noise: &f64| {
                leaked += each;
                leaked + noise
            };
            let figures: Vec<f64> = noise.iter().map(one).collect();
            let verdict = judge(&figures, TEN);
            prop_assert!(verdict.grows, "{verdict}");
        }
    }

    /// With what a process really holds, read as from any other.
    #[test]
    fn what_is_held_each_time_is_found_and_what_is_given_back_is_not() {
        let pid = i64::from(std::process::id());
        let taken = |keep: bool| {
            let (mut files, mut memory) = (Vec::new(), Vec::new());
            let mut all = Vec::new();
            for _ in 0..60 {
                files.push(std::fs::File::open("/dev/null").unwrap());
                memory.push(std::hint::black_box(vec![1_u8; 512 << 10]));
                if !keep {
                    (files, memory) = (Vec::new(), Vec::new());
                }
                all.push(Held::by(pid).unwrap());
            }
            let judged = |of: fn(&Held) -> f64, least| {
                judge(&all.iter().map(of).collect::<Vec<_>>(), Allowance { least, part: 0.1 })
            };
            [judged(|held| held.files, 8.0), judged(|held| held.memory, 4096.0)]
                .map(|verdict| (verdict.grows, verdict.to_string()))
        };
        for keep in [true, false] {
            for (grows, said) in taken(keep) {
                assert_eq!(grows, keep, "{said}");
            }
        }
    }
}
