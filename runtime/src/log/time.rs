//! Moments, as RFC 3339 writes them and as `--since` and `--until` take them.

use std::time::Duration;

use toml::value::{Datetime, Offset, Time};

const DAY: u64 = 86_400;

/// A moment in UTC, with microseconds: `2026-05-01T13:41:07.118000Z`
#[must_use]
pub fn rfc3339(time_ns: u64) -> String {
    let time = Duration::from_nanos(time_ns);
    let seconds = time.as_secs();
    let (year, month, day) = date(seconds / DAY);
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    let micros = time.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{:02}.{micros:06}Z", seconds % 60)
}

/// When, as a person says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// So long ago.
    Ago(Duration),
    /// So long after 1970 began.
    At(Duration),
    /// When it was last so late in the day, in UTC: as the log's lines have it.
    Clock(Duration),
}

impl Moment {
    /// Reads `30s`, `2026-05-01T13:41:07Z`, or the time of day as it stands in the log, `13:41:07.118`.
    ///
    /// # Errors
    /// What to write instead.
    ///
    /// ```
    /// use gaia_runtime::log::time::{Moment, rfc3339};
    /// use std::time::Duration;
    /// let moment = Moment::parse("2026-05-01T15:41:07.118+02:00").unwrap();
    /// assert_eq!(rfc3339(moment.ns(Duration::ZERO)), "2026-05-01T13:41:07.118000Z");
    /// assert_eq!(Moment::parse("30s").unwrap().ns(Duration::from_secs(100)), 70_000_000_000);
    /// ```
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(ago) = gaia_manifest::units::duration(text) {
            return Ok(Self::Ago(ago));
        }
        let wrong =
            || "a duration, such as 30s, 5m or 2h, or a time, such as 2026-05-01T13:41:07Z or 13:41:07".to_owned();
        let read: Datetime = text.parse().map_err(|_| wrong())?;
        match (read.date, read.time, read.offset) {
            (Some(date), Some(time), Some(offset)) => {
                let minutes = match offset {
                    Offset::Z => 0,
                    Offset::Custom { minutes } => i64::from(minutes),
                };
                let day = i64::try_from(DAY).unwrap_or(i64::MAX);
                let seconds = days(date.year.into(), date.month.into(), date.day.into()) * day - minutes * 60;
                let midnight = u64::try_from(seconds).map_err(|_| "not before 1970".to_owned())?;
                Ok(Self::At(Duration::from_secs(midnight) + of_day(time)))
            }
            (None, Some(time), None) => Ok(Self::Clock(of_day(time))),
            (Some(_), Some(_), None) => Err(format!("in which zone? In UTC it is {text}Z")),
            _ => Err(wrong()),
        }
    }

    /// Nanoseconds since 1970 began, if it is `now`.
    #[must_use]
    pub fn ns(self, now: Duration) -> u64 {
        let since_1970 = match self {
            Self::Ago(ago) => now.saturating_sub(ago),
            Self::At(time) => time,
            Self::Clock(time) => {
                let today = Duration::from_secs(now.as_secs() / DAY * DAY) + time;
                if today <= now { today } else { today.saturating_sub(Duration::from_secs(DAY)) }
            }
        };
        u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
    }
}

fn of_day(time: Time) -> Duration {
    let (hour, minute) = (u64::from(time.hour), u64::from(time.minute));
    let seconds = hour * 3600 + minute * 60 + u64::from(time.second.unwrap_or(0));
    Duration::new(seconds, time.nanosecond.unwrap_or(0))
}

/// Days from 1970 to a date of the Gregorian calendar. Years begin in March, so that a leap day is the last of its year; 400 of
/// them have 146,097 days.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    // From the first of March of the year 0, by the rule of leap years.
    let since_0 = 365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year;
    since_0 - 719_468
}

/// Year, month and day, so many days after the first of 1970: [`days`] the other way round.
fn date(since_1970: u64) -> (u64, u64, u64) {
    let since_0 = since_1970 + 719_468;
    let (era, day) = (since_0 / 146_097, since_0 % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn moments_are_those_of_the_calendar() {
        for (seconds, wanted) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_777_642_867, "2026-05-01T13:41:07.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(rfc3339(seconds * 1_000_000_000), wanted);
        }
    }

    #[test]
    fn a_time_of_day_is_the_last_one() {
        let now = Duration::from_secs(1_777_642_867);
        let at = |text: &str| rfc3339(Moment::parse(text).unwrap().ns(now));
        assert_eq!(at("13:41:07"), "2026-05-01T13:41:07.000000Z");
        assert_eq!(at("13:41:07.5"), "2026-04-30T13:41:07.500000Z");
        assert_eq!(at("2026-05-01T00:00:00-01:30"), "2026-05-01T01:30:00.000000Z");
        assert_eq!(at("2026-05-01 13:41:07z"), "2026-05-01T13:41:07.000000Z");
        assert_eq!(at("1h"), "2026-05-01T12:41:07.000000Z");
    }

    #[test]
    fn what_is_no_moment_is_told_what_one_is() {
        assert!(Moment::parse("2026-05-01T13:41:07").unwrap_err().contains("2026-05-01T13:41:07Z"));
        for wrong in ["", "yesterday", "2026-05-01", "2026-02-30T00:00:00Z", "25:00:00", "30"] {
            assert!(Moment::parse(wrong).unwrap_err().contains("30s"), "{wrong}");
        }
        assert!(Moment::parse("1969-12-31T23:59:59Z").unwrap_err().contains("1970"));
    }

    proptest! {
        #[test]
        fn a_moment_is_read_as_it_is_written(micros in 0..u64::MAX / 1000) {
            let read = Moment::parse(&rfc3339(micros * 1000)).unwrap();
            prop_assert_eq!(read.ns(Duration::ZERO), micros * 1000);
        }

        #[test]
        fn a_later_moment_has_a_later_date(day in 0_u64..200_000) {
            prop_assert!(date(day) < date(day + 1));
            let (year, month, day_of_month) = date(day);
            let back = days(year.cast_signed(), month.cast_signed(), day_of_month.cast_signed());
            prop_assert_eq!(back, day.cast_signed());
        }

        #[test]
        fn any_text_is_a_moment_or_is_told_why_not(text in "\\PC{0,30}|[0-9TZ:. +-]{0,30}", now in any::<u64>()) {
            if let Ok(moment) = Moment::parse(&text) {
                let _ = moment.ns(Duration::from_nanos(now));
            }
        }
    }
}
