//! How a record looks to a person: the lines of `gaia logs`.
//!
//! ```
//! use gaia_runtime::log::{Event, text::line};
//! use std::time::Duration;
//! let event = Event::End { cold: Duration::from_micros(1100), exec: Duration::from_millis(42), ready: true, text: "".into() };
//! let time = Duration::from_millis(1_777_642_867_121);
//! assert_eq!(line(time, "fetch.034", &event), "Ω 13:41:07.121 fetch.034 END cold=1.1ms exec=42ms pooled✓");
//! ```

use std::fmt::Write as _;
use std::time::Duration;

use super::{Event, Stream};

/// One line without its break: the time of day in UTC, whose record it is, and what happened.
///
/// What others wrote stands at the end and has its control characters escaped, so that no line can be taken for another
/// and no terminal obeys a guest.
#[must_use]
pub fn line(time: Duration, whose: &str, event: &Event<'_>) -> String {
    let mut line = format!("Ω {} {whose} ", clock(time));
    let mut tail = |kind: &str, text: &str| {
        line.push_str(kind);
        if !text.is_empty() {
            line.push(' ');
            escape(&mut line, text);
        }
    };
    match event {
        Event::Log { stream, text } => tail(if *stream == Stream::Out { "LOG out" } else { "LOG err" }, text),
        Event::Request { text, bytes, dur } => {
            tail("REQ", text);
            let _ = write!(line, " bytes={} dur={}", thousands(*bytes), short(*dur));
        }
        Event::Response { status, cpu, text } => tail(&format!("RES {status} cpu={}", short(*cpu)), text),
        Event::End { cold, exec, ready, text } => {
            let ready = if *ready { " pooled✓" } else { "" };
            tail(&format!("END cold={} exec={}{ready}", fine(*cold), short(*exec)), text);
        }
        Event::Deny { text } => tail("DENY", text),
        Event::Trap { text } => tail("TRAP", text),
        Event::Kill { text } => tail("KILL", text),
        Event::Fault { text } => tail("FAULT", text),
        Event::Audit { text } => tail("AUDIT", text),
        Event::Lost { records } => tail("LOST", &format!("{} records", thousands(*records))),
    }
    line
}

/// The time of day in UTC: `13:41:07.118`
#[must_use]
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{:03}", seconds % 60, time.subsec_millis())
}

/// `12,422`
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `340µs`, `42ms`, `12.4s`
fn short(d: Duration) -> String {
    match d.as_micros() {
        micros @ 0..1000 => format!("{micros}µs"),
        1000..10_000_000 => format!("{}ms", d.as_millis()),
        _ => format!("{:.1}s", d.as_secs_f64()),
    }
}

/// The same with a digit more where it matters: `7µs`, `1.1ms`, `42ms`
fn fine(d: Duration) -> String {
    match d.as_micros() {
        1000..10_000 => format!("{:.1}ms", d.as_secs_f64() * 1000.0),
        _ => short(d),
    }
}

fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '\t' => out.push_str("\\t"),
            c if c.is_control() || is_invisible(c) => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
}

/// Characters that break lines or turn the order of what is shown around, beside the control characters (Unicode,
/// `Bidi_Control` and the separators of lines and paragraphs).
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIME: Duration = Duration::from_millis(1_777_642_867_118);

    #[test]
    fn the_lines_are_those_of_the_product_page() {
        let ms = Duration::from_millis;
        let request = Event::Request { text: "api.openalex.org/works".into(), bytes: 12_422, dur: ms(42) };
        let response = Event::Response { status: 200, cpu: ms(8), text: "".into() };
        assert_eq!(
            line(TIME, "fetch.034", &request),
            "Ω 13:41:07.118 fetch.034 REQ api.openalex.org/works bytes=12,422 dur=42ms"
        );
        assert_eq!(line(TIME, "fetch.034", &response), "Ω 13:41:07.118 fetch.034 RES 200 cpu=8ms");
    }

    #[test]
    fn durations_and_numbers_are_short() {
        let micros = Duration::from_micros;
        assert_eq!(
            [7, 999, 1000, 9_999_999, 12_400_000].map(|n| short(micros(n))),
            ["7µs", "999µs", "1ms", "9999ms", "12.4s"]
        );
        assert_eq!([7, 1100, 10_000].map(|n| fine(micros(n))), ["7µs", "1.1ms", "10ms"]);
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn a_guest_moves_no_cursor_and_breaks_no_line() {
        let text = "\x1b[2J\nΩ 13:41:07.118 other.001 END\u{202e}".into();
        let shown = line(TIME, "evil.001", &Event::Log { stream: Stream::Out, text });
        assert_eq!(shown, "Ω 13:41:07.118 evil.001 LOG out \\u{1b}[2J\\u{a}Ω 13:41:07.118 other.001 END\\u{202e}");
    }

    proptest! {
        #[test]
        fn any_record_is_one_line(text in ".{0,80}", time in any::<u64>()) {
            let shown = line(Duration::from_nanos(time), "a.001", &Event::Deny { text: text.into() });
            prop_assert!(!shown.chars().any(char::is_control));
        }
    }
}
