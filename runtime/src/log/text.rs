//! How a record looks to a person: the lines of `gaia logs`.
//!
//! ```
//! use gaia_runtime::log::{Event, text::line};
//! use std::time::Duration;
//! let event = Event::End { cold: Duration::from_micros(1100), exec: Duration::from_millis(42), ready: true, text: "".into() };
//! let time = Duration::from_millis(1_777_642_867_121);
//! assert_eq!(line(time, "fetch.034", &event), "Ω 13:41:07.121 fetch.034 END cold=1.1ms exec=42ms pooled✓");
//! ```

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use super::{Event, Kind, Stream};

/// The longest host and path that a line shows, in characters. JSON has more of it.
const MAX_PATH: usize = 64;

/// One line without its break: the time of day in UTC, whose record it is, and what happened.
///
/// What others wrote stands at the end and has its control characters escaped, so that no line can be taken for another
/// and no terminal obeys a guest.
#[must_use]
pub fn line(time: Duration, whose: &str, event: &Event<'_>) -> String {
    format!("Ω {} {whose} {}", clock(time), message(event))
}

/// The same with its kind in a colour, for a terminal.
#[must_use]
pub fn coloured_line(time: Duration, whose: &str, event: &Event<'_>) -> String {
    let (kind, message) = (event.kind().name(), message(event));
    let rest = message.strip_prefix(kind).unwrap_or_default();
    format!("Ω {} {whose} \x1b[{}m{kind}\x1b[m{rest}", clock(time), colour(event))
}

/// What happened: the line without time and name.
#[must_use]
pub fn message(event: &Event<'_>) -> String {
    let mut message = event.kind().name().to_owned();
    let mut said = |text: &str| {
        if !text.is_empty() {
            message.push(' ');
            escape(&mut message, text);
        }
    };
    match event {
        Event::Log { stream, text } => {
            said(if *stream == Stream::Out { "out" } else { "err" });
            said(text);
        }
        Event::Request { text, bytes, dur } => {
            said(&shortened(text));
            let _ = write!(message, " bytes={} dur={}", thousands(*bytes), short(*dur));
        }
        Event::Response { status, cpu, text } => {
            said(&format!("{status} cpu={}", short(*cpu)));
            said(text);
        }
        Event::End { cold, exec, ready, text } => {
            said(&format!("cold={} exec={}{}", fine(*cold), short(*exec), if *ready { " pooled✓" } else { "" }));
            said(text);
        }
        Event::Deny { text }
        | Event::Trap { text }
        | Event::Kill { text }
        | Event::Fault { text }
        | Event::Audit { text } => said(text),
        Event::Lost { records: 1 } => said("1 record"),
        Event::Lost { records } => said(&format!("{} records", thousands(*records))),
    }
    message
}

/// The colour of its kind, as a terminal is told (ECMA-48, SGR): red is what failed, yellow what was kept from happening.
fn colour(event: &Event<'_>) -> &'static str {
    match event {
        Event::Response { status: 500.., .. } => "31",
        Event::Response { status: 400.., .. } => "33",
        _ => match event.kind() {
            Kind::Trap | Kind::Kill | Kind::Fault => "31",
            Kind::Deny | Kind::Lost => "33",
            Kind::Response => "32",
            Kind::Request => "36",
            Kind::Audit => "35",
            Kind::End => "2",
            Kind::Log => "1",
        },
    }
}

/// Host and path, the path cut behind a segment if it is long, and what stands behind them: `api.crossref.org/works/...`
fn shortened(text: &str) -> Cow<'_, str> {
    let end = text.find(' ').unwrap_or(text.len());
    let (path, rest) = text.split_at(end);
    let Some((most, _)) = path.char_indices().nth(MAX_PATH) else { return text.into() };
    let cut = path[..most].rfind('/').map_or(most, |slash| slash + 1);
    format!("{}...{rest}", &path[..cut]).into()
}

/// The time of day in UTC: `13:41:07.118`
#[must_use]
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{:03}", seconds % 60, time.subsec_millis())
}

/// `12,422`
#[must_use]
pub fn thousands(number: u64) -> String {
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

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// One of each kind, and what an operator sees of it.
    fn all() -> Vec<(Event<'static>, &'static str)> {
        let long = "api.crossref.org/works/10.1000%2Fan-identifier-that-is-longer-than-anybody-wants-to-read-in-a-line";
        vec![
            (
                Event::Request { text: "api.openalex.org/works".into(), bytes: 12_422, dur: ms(42) },
                "REQ api.openalex.org/works bytes=12,422 dur=42ms",
            ),
            (
                Event::Request { text: long.into(), bytes: 7, dur: ms(42) },
                "REQ api.crossref.org/works/... bytes=7 dur=42ms",
            ),
            (
                Event::Request { text: format!("{long} connection-timeout").into(), bytes: 0, dur: ms(10_000) },
                "REQ api.crossref.org/works/... connection-timeout bytes=0 dur=10.0s",
            ),
            (Event::Response { status: 200, cpu: ms(8), text: "".into() }, "RES 200 cpu=8ms"),
            (
                Event::Response { status: 404, cpu: ms(0), text: "no brane is served at a/b".into() },
                "RES 404 cpu=0µs no brane is served at a/b",
            ),
            (
                Event::End { cold: Duration::from_micros(1100), exec: ms(42), ready: true, text: "".into() },
                "END cold=1.1ms exec=42ms pooled✓",
            ),
            (
                Event::End {
                    cold: Duration::from_micros(35),
                    exec: ms(1),
                    ready: false,
                    text: "the client was gone".into(),
                },
                "END cold=35µs exec=1ms the client was gone",
            ),
            (Event::Log { stream: Stream::Out, text: "a line".into() }, "LOG out a line"),
            (Event::Log { stream: Stream::Err, text: "".into() }, "LOG err"),
            (Event::Deny { text: "net.http \"a\": not listed".into() }, "DENY net.http \"a\": not listed"),
            (Event::Trap { text: "wasm trap: unreachable".into() }, "TRAP wasm trap: unreachable"),
            (Event::Kill { text: "deadline of 8s".into() }, "KILL deadline of 8s"),
            (Event::Fault { text: "instantiate: no".into() }, "FAULT instantiate: no"),
            (
                Event::Audit { text: "the console: POST /v1/rollback: 200 OK".into() },
                "AUDIT the console: POST /v1/rollback: 200 OK",
            ),
            (Event::Lost { records: 1 }, "LOST 1 record"),
            (Event::Lost { records: 12_422 }, "LOST 12,422 records"),
        ]
    }

    #[test]
    fn the_lines_are_those_of_the_product_page() {
        for (event, wanted) in all() {
            assert_eq!(line(TIME, "fetch.034", &event), format!("Ω 13:41:07.118 fetch.034 {wanted}"));
        }
        let shown: std::collections::BTreeSet<Kind> = all().iter().map(|(event, _)| event.kind()).collect();
        assert_eq!(shown.len(), Kind::ALL.len(), "each kind is there");
    }

    #[test]
    fn a_colour_stands_around_the_kind_and_nowhere_else() {
        for (event, wanted) in all() {
            let shown = coloured_line(TIME, "fetch.034", &event);
            let (kind, rest) = wanted.split_at(event.kind().name().len());
            assert!(shown.ends_with(&format!("m{kind}\x1b[m{rest}")), "{shown:?}");
            assert_eq!(shown.matches('\x1b').count(), 2, "{shown:?}");
        }
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

        #[test]
        fn any_request_is_one_line_and_not_a_long_one(text in "\\PC{0,200}|[a-z./ é]{0,600}", bytes in any::<u64>()) {
            let shown = message(&Event::Request { text: text.clone().into(), bytes, dur: Duration::ZERO });
            prop_assert!(!shown.chars().any(char::is_control));
            let path = text.split(' ').next().unwrap().chars().count();
            prop_assert!(path <= MAX_PATH || shown.contains("... "), "{shown}");
        }
    }
}
