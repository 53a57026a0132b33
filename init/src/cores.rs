//! Which core does what.

use std::fmt;

/// The machine's cores, divided between housekeeping (init, control, compile, ticks, interrupts) and workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cores {
    /// Kernel numbers of the cores that do everything but run branes.
    pub housekeeping: Vec<usize>,
    /// Kernel numbers of the cores that run one worker each, in ascending order; never empty.
    pub workers: Vec<usize>,
}

impl Cores {
    /// Divides `online` cores: the first keeps house and the others work. With one or two cores
    /// everything shares: each core has a worker and housekeeping runs on any of them.
    ///
    /// ```
    /// use gaia_init::cores::Cores;
    /// let four = Cores::divide(&[0, 1, 2, 3]);
    /// assert_eq!((four.housekeeping, four.workers), (vec![0], vec![1, 2, 3]));
    /// assert!(Cores::divide(&[0, 1]).shared());
    /// ```
    #[must_use]
    pub fn divide(online: &[usize]) -> Self {
        match online {
            [] => Self { housekeeping: vec![0], workers: vec![0] },
            [_] | [_, _] => Self { housekeeping: online.to_vec(), workers: online.to_vec() },
            [first, rest @ ..] => Self { housekeeping: vec![*first], workers: rest.to_vec() },
        }
    }

    /// Whether workers and housekeeping run on the same cores.
    #[must_use]
    pub fn shared(&self) -> bool {
        self.housekeeping.iter().any(|core| self.workers.contains(core))
    }

    /// The core whose worker accepts on `core`'s sockets while `core`'s own worker is away, or `None` when
    /// there is only one worker. It is the one before `core` in a ring, so each worker stands in for one other.
    #[must_use]
    pub fn stand_in(&self, core: usize) -> Option<usize> {
        let n = self.workers.len();
        let i = self.workers.iter().position(|c| *c == core)?;
        (n > 1).then(|| self.workers[(i + n - 1) % n])
    }

    /// The worker core on which the keeper of this slot runs: in turn, each its own number of keepers. `None` where all share,
    /// because there the kernel moves it to where there is time.
    #[must_use]
    pub fn of_keeper(&self, slot: usize) -> Option<usize> {
        (!self.shared() && !self.workers.is_empty()).then(|| self.workers[slot % self.workers.len()])
    }

    /// The core for which `core`'s worker stands in: the inverse of [`Self::stand_in`].
    #[must_use]
    pub fn stands_in_for(&self, core: usize) -> Option<usize> {
        let n = self.workers.len();
        let i = self.workers.iter().position(|c| *c == core)?;
        (n > 1).then(|| self.workers[(i + 1) % n])
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.shared() {
            write!(f, "workers on {}, housekeeping shares them", list(&self.workers))
        } else {
            write!(f, "housekeeping on {}, workers on {}", list(&self.housekeeping), list(&self.workers))
        }
    }
}

/// Writes core numbers in the kernel's list format, neighbours as ranges: `0-3,5`.
#[must_use]
pub fn list(cores: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for core in cores {
        match parts.last_mut() {
            Some((_, last)) if *core == *last + 1 => *last = *core,
            _ => parts.push((*core, *core)),
        }
    }
    let part = |(from, to)| if from == to { format!("{from}") } else { format!("{from}-{to}") };
    parts.into_iter().map(part).collect::<Vec<_>>().join(",")
}

/// Parses the kernel's list format (`0-3,5`), as in `/sys/devices/system/cpu/online`.
///
/// Returns `None` for anything else, including a range that runs backwards or reaches beyond 8,191.
#[must_use]
pub fn parse_list(text: &str) -> Option<Vec<usize>> {
    const MAX: usize = 8191;
    let mut cores = Vec::new();
    for part in text.trim().split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
        if from > to || to > MAX {
            return None;
        }
        cores.extend(from..=to);
    }
    Some(cores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_and_two_cores_share() {
        assert!(Cores::divide(&[0]).shared());
        assert_eq!(Cores::divide(&[0, 1]).workers, [0, 1]);
        assert!(!Cores::divide(&[0, 1, 2]).shared());
    }

    #[test]
    fn a_lone_worker_has_no_stand_in() {
        assert_eq!(Cores::divide(&[0]).stand_in(0), None);
        assert_eq!(Cores::divide(&[0, 1]).stand_in(0), Some(1));
        assert_eq!(Cores::divide(&[0, 1, 2, 3]).stand_in(1), Some(3));
        assert_eq!(Cores::divide(&[0, 1, 2, 3]).stand_in(0), None, "housekeeping has no worker");
    }

    #[test]
    fn keepers_are_divided_among_the_worker_cores() {
        let cores = Cores::divide(&[0, 1, 2]);
        assert_eq!([0, 1, 2, 3].map(|slot| cores.of_keeper(slot)), [1, 2, 1, 2].map(Some));
        assert_eq!(Cores::divide(&[0, 1]).of_keeper(0), None);
    }

    #[test]
    fn neighbours_are_written_as_ranges() {
        assert_eq!(list(&[]), "");
        assert_eq!(list(&[1, 2, 3, 5, 7, 8]), "1-3,5,7-8");
    }

    #[test]
    fn lists_parse() {
        assert_eq!(parse_list("0-3,5\n"), Some(vec![0, 1, 2, 3, 5]));
        assert_eq!(parse_list("3-1"), None);
        assert_eq!(parse_list(""), None);
        assert_eq!(parse_list("0-99999999999"), None);
    }

    proptest! {
        #[test]
        fn stand_in_and_its_inverse_agree(n in 1_usize..64) {
            let cores = Cores::divide(&(0..n).collect::<Vec<_>>());
            for core in &cores.workers {
                if let Some(other) = cores.stand_in(*core) {
                    prop_assert_ne!(other, *core);
                    prop_assert_eq!(cores.stands_in_for(other), Some(*core));
                }
            }
        }

        #[test]
        fn any_text_is_a_list_or_none(text in "\\PC{0,40}") {
            let _ = parse_list(&text);
        }
    }
}
