//! Sizes and durations as a manifest writes them.

use std::time::Duration;

/// Parses a size: a whole number and a unit, `64 MiB`. Returns bytes.
///
/// # Errors
/// What to write instead.
///
/// ```
/// assert_eq!(gaia_manifest::units::size("64 MiB"), Ok(64 << 20));
/// assert!(gaia_manifest::units::size("64").is_err());
/// ```
pub fn size(text: &str) -> Result<u64, String> {
    let factor = |unit: &str| {
        Some(match unit {
            "B" => 1,
            "kB" => 1000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return None,
        })
    };
    number_and_unit(text)
        .and_then(|(number, unit)| number.checked_mul(factor(unit)?))
        .ok_or_else(|| "write a whole number and one of B, kB, MB, GB, KiB, MiB, GiB, as in \"64 MiB\"".to_owned())
}

/// Parses a duration: a whole number and a unit, `8s`.
///
/// # Errors
/// What to write instead.
///
/// ```
/// use std::time::Duration;
/// assert_eq!(gaia_manifest::units::duration("250 ms"), Ok(Duration::from_millis(250)));
/// ```
pub fn duration(text: &str) -> Result<Duration, String> {
    let nanos = |unit: &str| {
        Some(match unit {
            "ns" => 1,
            "us" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        })
    };
    number_and_unit(text)
        .and_then(|(number, unit)| number.checked_mul(nanos(unit)?))
        .map(Duration::from_nanos)
        .ok_or_else(|| "write a whole number and one of ns, us, ms, s, m, h, as in \"8s\"".to_owned())
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let blank = [' ', '\t'];
    let text = text.trim_matches(blank);
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start_matches(blank)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_text_is_a_size_or_told_why_not(text in "\\PC{0,20}|[0-9]{0,25} ?[a-zA-Z]{0,4}") {
            let _ = size(&text);
            let _ = duration(&text);
        }

        #[test]
        fn kibibytes_are_what_they_say(n in 0_u64..1 << 40) {
            prop_assert_eq!(size(&format!("{n} KiB")), Ok(n << 10));
            prop_assert_eq!(size(&format!("{n}KiB")), Ok(n << 10));
        }
    }
}
