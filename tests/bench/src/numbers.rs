//! What is made of measurements: percentiles, medians, ratios.

/// Latencies of one run, in nanoseconds, ascending.
#[derive(Debug, Clone, Default)]
pub struct Sorted(Vec<u64>);

impl Sorted {
    /// Sorts them.
    #[must_use]
    pub fn new(mut nanos: Vec<u64>) -> Self {
        nanos.sort_unstable();
        Self(nanos)
    }

    /// The value that so many percent are not above (nearest rank), in microseconds; `None` of nothing.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil() as usize;
        let at = rank.clamp(1, self.0.len().max(1)) - 1;
        self.0.get(at).map(|nanos| *nanos as f64 / 1000.0)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// The middle one, or the mean of the middle two; `None` of nothing.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut all: Vec<f64> = values.into_iter().collect();
    all.sort_by(f64::total_cmp);
    let upper = *all.get(all.len() / 2)?;
    let lower = if all.len().is_multiple_of(2) { all[all.len() / 2 - 1] } else { upper };
    Some(f64::midpoint(lower, upper))
}

/// The median of the ratios of each round: what disturbs the machine for a while disturbs both. `None` without a round
/// that both have.
#[must_use]
pub fn ratio(of: &[f64], to: &[f64]) -> Option<f64> {
    median(of.iter().zip(to).filter(|(_, to)| **to > 0.0).map(|(of, to)| of / to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let hundred = Sorted::new((1..=100).rev().map(|n| n * 1000).collect());
        assert_eq!(hundred.len(), 100);
        for (percent, wanted) in [(0.0, 1.0), (1.0, 1.0), (50.0, 50.0), (99.0, 99.0), (99.9, 100.0), (100.0, 100.0)] {
            assert_eq!(hundred.percentile(percent), Some(wanted), "{percent}");
        }
        assert_eq!(Sorted::new(vec![7]).percentile(50.0), Some(0.007));
        assert_eq!(Sorted::default().percentile(50.0), None);
    }

    #[test]
    fn a_median_ignores_one_that_is_far_off() {
        assert_eq!(median([3.0, 1.0, 1e9]), Some(3.0));
        assert_eq!(median([4.0, 2.0]), Some(3.0));
        assert_eq!(median([]), None);
    }

    #[test]
    fn a_ratio_compares_within_a_round() {
        // The machine was twice as slow in the last two rounds, for both.
        assert_eq!(ratio(&[50.0, 25.0, 25.0], &[100.0, 50.0, 50.0]), Some(0.5));
        assert_eq!(ratio(&[1.0], &[0.0]), None);
        assert_eq!(ratio(&[], &[1.0]), None);
    }
}
