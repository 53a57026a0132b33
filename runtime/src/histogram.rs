//! Log-linear histograms, as HDR histograms are: every value is told with a relative error of at most 1/128 (0.8 %), from
//! nanoseconds to hours and from bytes to terabytes, in memory of a fixed size.
//!
//! ```text
//! value   0 1 2 … 63 │ 64 65 … 127 │ 128 130 … 254 │ 256 260 … 508 │ …     each octave in 64 buckets of equal width
//! bucket  0 1 2 … 63 │ 64 65 … 127 │ 128 129 … 191 │ 192 193 … 255 │ … 2367
//! ```
//!
//! [`Histogram`] lies in shared memory: its one writer adds with plain loads and stores, and never allocates. [`Counts`] is what
//! a reader makes of it: merged over processes, taken apart over time, asked for quantiles.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets of an octave: from a power of two to the next.
const OCTAVE: u64 = 1 << BITS;
const BITS: u32 = 6;
/// Values from 2 to the power of this on are counted as the largest value below: 73 minutes in nanoseconds, 4 TiB in bytes.
const MOST: u32 = 42;
/// Buckets in all.
pub const BUCKETS: usize = ((MOST - BITS + 1) as usize) << BITS;
/// Words of a histogram in shared memory.
pub const WORDS: usize = HEAD + BUCKETS;
/// Words before the buckets.
const HEAD: usize = 8;

/// Adds to a counter that nobody else writes to.
pub(crate) fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}

/// A duration as it is counted: in nanoseconds.
#[must_use]
pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The bucket of a value.
#[must_use]
pub fn bucket(value: u64) -> usize {
    let value = value.min((1 << MOST) - 1);
    // Below twice an octave's buckets each value has one of its own.
    let shift = value.max(1).ilog2().saturating_sub(BITS);
    usize::try_from(u64::from(shift) * OCTAVE + (value >> shift)).unwrap_or(BUCKETS - 1).min(BUCKETS - 1)
}

/// The least value of a bucket, and how many values it has.
#[must_use]
pub fn values(bucket: usize) -> (u64, u64) {
    let bucket = bucket.min(BUCKETS - 1) as u64;
    let shift = (bucket >> BITS).saturating_sub(1);
    ((bucket - shift * OCTAVE) << shift, 1 << shift)
}

/// The value that stands for all of a bucket: the one in its middle.
fn middle(bucket: usize) -> u64 {
    let (least, width) = values(bucket);
    least + width / 2
}

/// A histogram in shared memory. There must be one writer to it.
#[repr(C)]
#[derive(Debug)]
pub struct Histogram {
    /// Of all values. It may wrap, after centuries.
    sum: AtomicU64,
    max: AtomicU64,
    reserved: [AtomicU64; HEAD - 2],
    buckets: [AtomicU64; BUCKETS],
}

const _: () = assert!(size_of::<Histogram>() == WORDS * 8);

impl Histogram {
    /// Counts a value.
    pub fn record(&self, value: u64) {
        add(&self.buckets[bucket(value)], 1);
        add(&self.sum, value);
        if value > self.max.load(Relaxed) {
            self.max.store(value, Relaxed);
        }
    }
}

/// What was counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// The buckets that are not empty.
    buckets: BTreeMap<u16, u64>,
    /// Of all values.
    pub sum: u64,
    /// The largest value, exactly.
    pub max: u64,
}

impl Counts {
    /// Reads a histogram's words as they lie in shared memory, whatever they are.
    #[must_use]
    pub fn of(words: &[u64]) -> Self {
        let word = |at: usize| words.get(at).copied().unwrap_or(0);
        let buckets = words.iter().skip(HEAD).take(BUCKETS).enumerate().filter(|(_, count)| **count > 0);
        let buckets = buckets.filter_map(|(at, count)| Some((u16::try_from(at).ok()?, *count)));
        Self { buckets: buckets.collect(), sum: word(0), max: word(1) }
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Self) {
        for (bucket, count) in &other.buckets {
            let own = self.buckets.entry(*bucket).or_default();
            *own = own.saturating_add(*count);
        }
        self.sum = self.sum.wrapping_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// What has been counted since it was `before`. Of that the maximum is known as well as any other value.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let left = |(bucket, count): (&u16, &u64)| {
            let left = count.saturating_sub(before.buckets.get(bucket).copied().unwrap_or(0));
            (left > 0).then_some((*bucket, left))
        };
        let buckets: BTreeMap<u16, u64> = self.buckets.iter().filter_map(left).collect();
        let max = buckets.last_key_value().map_or(0, |(bucket, _)| middle((*bucket).into()).min(self.max));
        Self { buckets, sum: self.sum.wrapping_sub(before.sum), max }
    }

    /// How many values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.values().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// How many are at most as large as each of these bounds, which grow. All that are have been counted; of those that are larger by
    /// less than a 64th, some.
    #[must_use]
    pub fn up_to(&self, bounds: &[u64]) -> Vec<u64> {
        let (mut left, mut seen) = (self.buckets.iter().peekable(), 0_u64);
        let each = |bound: &u64| {
            while let Some((_, count)) = left.next_if(|(at, _)| values((**at).into()).0 <= *bound) {
                seen = seen.saturating_add(*count);
            }
            seen
        };
        bounds.iter().map(each).collect()
    }

    /// The value below or at which this part of all values lies, within 0.8 %; nothing, if there are none.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<u64> {
        let all = self.count();
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let wanted = ((all as f64 * part).ceil() as u64).clamp(1, all.max(1));
        let mut seen = 0_u64;
        let found = self.buckets.iter().find(|(_, count)| {
            seen = seen.saturating_add(**count);
            seen >= wanted
        });
        found.map(|(bucket, _)| middle((*bucket).into()).min(self.max))
    }

    /// The buckets that are not empty: the least value of each, and how many there are.
    #[must_use]
    pub fn buckets(&self) -> Vec<(u64, u64)> {
        self.buckets.iter().map(|(bucket, count)| (values((*bucket).into()).0, *count)).collect()
    }

    fn of_buckets(sum: u64, max: u64, all: Vec<(u64, u64)>) -> Self {
        let mut counts = Self { buckets: BTreeMap::new(), sum, max };
        for (value, count) in all {
            let own = counts.buckets.entry(u16::try_from(bucket(value)).unwrap_or(0)).or_default();
            *own = own.saturating_add(count);
        }
        counts.buckets.retain(|_, count| *count > 0);
        counts
    }
}

/// A distribution as it is told: durations in nanoseconds, sizes in bytes, quantiles within 0.8 %.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Told", into = "Told")]
pub struct Distribution(pub Counts);

/// How it is written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Told {
    /// How many values.
    count: u64,
    sum: u64,
    max: u64,
    p50: Option<u64>,
    p90: Option<u64>,
    p99: Option<u64>,
    p999: Option<u64>,
    /// The least value of each bucket that is not empty, and how many it has.
    buckets: Vec<(u64, u64)>,
}

impl From<Distribution> for Told {
    fn from(Distribution(of): Distribution) -> Self {
        let [p50, p90, p99, p999] = [0.5, 0.9, 0.99, 0.999].map(|part| of.quantile(part));
        Self { count: of.count(), sum: of.sum, max: of.max, p50, p90, p99, p999, buckets: of.buckets() }
    }
}

impl From<Told> for Distribution {
    fn from(told: Told) -> Self {
        Self(Counts::of_buckets(told.sum, told.max, told.buckets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics;
    use proptest::prelude::*;

    /// A histogram with these values, as a reader has it.
    fn counts(values: &[u64]) -> Counts {
        let file = statistics::Statistics::file();
        let profiles = statistics::Profiles::map(&file, 1).unwrap();
        for value in values {
            profiles.of(0).unwrap().exec.record(*value);
        }
        let [_, exec, _, _] = statistics::distributions(&file, 0);
        exec
    }

    fn any_value() -> impl Strategy<Value = u64> {
        (0_u32..44).prop_flat_map(|bits| 0_u64..1 << bits)
    }

    #[test]
    fn buckets_follow_one_another_without_a_gap() {
        let mut next = 0;
        for at in 0..BUCKETS {
            let (least, width) = values(at);
            assert_eq!(least, next, "bucket {at}");
            assert_eq!((bucket(least), bucket(least + width - 1)), (at, at));
            next = least + width;
        }
        assert_eq!(next, 1 << MOST);
        assert_eq!((bucket(u64::MAX), bucket(0)), (BUCKETS - 1, 0));
    }

    #[test]
    fn nothing_has_no_quantiles() {
        assert_eq!(Counts::default().quantile(0.5), None);
        assert_eq!(counts(&[0]).quantile(0.99), Some(0));
    }

    proptest! {
        #[test]
        fn a_value_is_told_within_a_128th(value in 0_u64..1 << MOST) {
            let told = middle(bucket(value));
            prop_assert!(told.abs_diff(value) * 128 <= value, "{value} told as {told}");
        }

        #[test]
        fn a_quantile_is_that_of_the_values_within_a_128th(
            mut all in proptest::collection::vec(any_value(), 1..300),
            part in prop_oneof![Just(0.5), Just(0.9), Just(0.99), Just(0.999), 0.0..=1.0]
        ) {
            let counts = counts(&all);
            all.sort_unstable();
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let rank = ((all.len() as f64 * part).ceil() as usize).clamp(1, all.len());
            let exact = all[rank - 1].min((1 << MOST) - 1);
            let told = counts.quantile(part).unwrap();
            prop_assert!(told.abs_diff(exact) * 128 <= exact, "{exact} told as {told}");
            prop_assert_eq!(counts.max, all[all.len() - 1]);
            prop_assert_eq!(counts.count(), all.len() as u64);
        }

        #[test]
        fn all_up_to_a_bound_are_counted_and_few_above_it(
            all in proptest::collection::vec(any_value(), 0..100),
            bounds in proptest::collection::btree_set(any_value(), 0..20)
        ) {
            let bounds: Vec<u64> = bounds.into_iter().collect();
            let counts = counts(&all);
            for (bound, told) in bounds.iter().zip(counts.up_to(&bounds)) {
                let up_to = |bound: u64| all.iter().filter(|value| (**value).min((1 << MOST) - 1) <= bound).count() as u64;
                prop_assert!((up_to(*bound)..=up_to(bound + bound / 64)).contains(&told), "{told} up to {bound}");
            }
            prop_assert_eq!(counts.up_to(&[u64::MAX]), [all.len() as u64]);
        }

        #[test]
        fn merged_is_as_if_one_had_counted_all(one in proptest::collection::vec(any_value(), 0..60), other in proptest::collection::vec(any_value(), 0..60)) {
            let mut merged = counts(&one);
            merged.merge(&counts(&other));
            prop_assert_eq!(&merged, &counts(&[one.clone(), other.clone()].concat()));
            let later = merged.since(&counts(&one));
            prop_assert_eq!(later.buckets(), counts(&other).buckets());
            prop_assert_eq!(later.sum, other.iter().sum::<u64>());
        }

        #[test]
        fn what_is_told_is_what_was_counted(all in proptest::collection::vec(any_value(), 0..60)) {
            let told = Distribution(counts(&all));
            let text = serde_json::to_string(&told).unwrap();
            prop_assert_eq!(serde_json::from_str::<Distribution>(&text).unwrap(), told);
        }

        #[test]
        fn any_words_are_read(words in proptest::collection::vec(any::<u64>(), 0..WORDS + 9)) {
            let mut counts = Counts::of(&words);
            counts.merge(&counts.clone());
            let _ = (counts.count(), counts.quantile(0.99), counts.since(&Counts::of(&words[words.len() / 2..])));
        }
    }
}
