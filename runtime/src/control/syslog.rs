//! A line of the log as a syslog message (RFC 5424), with its length before it (RFC 6587 3.4.1, RFC 5425 4.3).
//!
//! ```text
//! 217 <134>1 2026-05-01T13:41:07.118000Z gaia-1 gaia fetch.034 REQ [gaia@32473 kind="REQ" seq="7" brane="fetch" …] REQ api.…
//! │    │                                 │      │    │         └ MSGID: the kind                                   └ as people read it
//! │    └ facility and severity           │      │    └ PROCID: the instance, the brane, or gaia
//! └ bytes of all that follows            └ HOST └ APP-NAME
//! ```

use std::fmt::Write as _;

use super::report::Line;
use crate::log::text::message;
use crate::log::time::rfc3339;
use crate::log::{Event, Stream};

/// The longest message, in bytes: what receivers should take at least (RFC 5425 4.3.1).
pub(super) const LONGEST: usize = 8192;
/// The structured data's name. The number is the one that RFC 5612 sets aside for those who have none.
const ID: &str = "gaia@32473";
/// `local0`, and `log audit` (RFC 5424 6.2.1).
const LOCAL: u8 = 16;
const AUDIT: u8 = 13;

/// Facility and severity, as one number: errors are the runtime's and the guests', warnings what was kept from happening.
fn priority(event: &Event<'_>) -> u8 {
    let (error, warning, notice, information) = (3, 4, 5, 6);
    let (facility, severity) = match event {
        Event::Trap { .. } | Event::Fault { .. } => (LOCAL, error),
        Event::Deny { .. } | Event::Kill { .. } | Event::Lost { .. } | Event::Response { status: 500.., .. } => {
            (LOCAL, warning)
        }
        Event::Log { stream: Stream::Err, .. } => (LOCAL, notice),
        Event::Audit { .. } => (AUDIT, notice),
        Event::Log { .. } | Event::Request { .. } | Event::Response { .. } | Event::End { .. } => (LOCAL, information),
    };
    facility * 8 + severity
}

/// Appends a message with its length before it.
pub(super) fn write(to: &mut Vec<u8>, line: &Line, host: &str) {
    let mut text = String::with_capacity(256);
    let (time, kind) = (rfc3339(line.time_ns), line.event.kind().name());
    let _ = write!(text, "<{}>1 {time} ", priority(&line.event));
    field(&mut text, host, 255);
    text.push_str(" gaia ");
    field(&mut text, line.whose(), 128);
    let _ = write!(text, " {kind} [{ID}");
    let mut give = |name: &str, value: &str| {
        let _ = write!(text, " {name}=\"");
        for c in value.chars() {
            if matches!(c, '"' | '\\' | ']') {
                text.push('\\');
            }
            // A value may have any character. Receivers are happier without those that are none to see.
            text.push(if c.is_control() { '?' } else { c });
        }
        text.push('"');
    };
    give("kind", kind);
    give("seq", &line.seq.to_string());
    let mut number = |name: &str, value: u128| give(name, &value.to_string());
    match &line.event {
        Event::Request { bytes, dur, .. } => {
            number("bytes", u128::from(*bytes));
            number("dur_ns", dur.as_nanos());
        }
        Event::Response { status, cpu, .. } => {
            number("status", u128::from(*status));
            number("cpu_ns", cpu.as_nanos());
        }
        Event::End { cold, exec, ready, .. } => {
            number("cold_ns", cold.as_nanos());
            number("exec_ns", exec.as_nanos());
            give("ready", if *ready { "true" } else { "false" });
        }
        Event::Lost { records } => number("records", u128::from(*records)),
        Event::Log { stream, .. } => give("stream", if *stream == Stream::Out { "out" } else { "err" }),
        Event::Deny { .. } | Event::Trap { .. } | Event::Kill { .. } | Event::Fault { .. } | Event::Audit { .. } => {}
    }
    for (name, value) in [("brane", &line.brane), ("instance", &line.instance)] {
        if let Some(value) = value {
            // Names have 48 characters at most. Nothing here grows with what somebody wrote.
            let end = value.char_indices().nth(128).map_or(value.len(), |(end, _)| end);
            give(name, &value[..end]);
        }
    }
    if let Some(core) = line.core {
        give("core", &core.to_string());
    }
    text.push_str("] ");
    let message = message(&line.event);
    if !message.is_ascii() {
        // Says that what follows is UTF-8 (RFC 5424 6.4).
        text.push('\u{feff}');
    }
    text.push_str(&message);
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST - 3));
        text.push_str("...");
    }
    to.extend_from_slice(text.len().to_string().as_bytes());
    to.push(b' ');
    to.extend_from_slice(text.as_bytes());
}

/// A field of the head: visible characters of ASCII, at least one.
fn field(to: &mut String, text: &str, most: usize) {
    let visible = text.chars().take(most).map(|c| if c.is_ascii_graphic() { c } else { '_' });
    let before = to.len();
    to.extend(visible);
    if to.len() == before {
        to.push('-');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::time::Duration;

    /// A message as RFC 5424 has it, read by its grammar alone.
    #[derive(Debug, PartialEq)]
    struct Read {
        priority: u8,
        head: Vec<String>,
        data: BTreeMap<String, String>,
        message: String,
    }

    fn read(bytes: &[u8]) -> Read {
        let space = bytes.iter().position(|b| *b == b' ').unwrap();
        let length: usize = std::str::from_utf8(&bytes[..space]).unwrap().parse().unwrap();
        let text = std::str::from_utf8(&bytes[space + 1..]).unwrap();
        assert_eq!(text.len(), length, "octets are counted");
        let (priority, rest) = text.strip_prefix('<').unwrap().split_once(">1 ").unwrap();
        let mut parts = rest.splitn(6, ' ');
        let head: Vec<String> = parts.by_ref().take(5).map(str::to_owned).collect();
        for (part, most) in head.iter().zip([32, 255, 48, 128, 32]) {
            assert!((1..=most).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_graphic()), "{part:?}");
        }
        let mut rest = parts.next().unwrap().strip_prefix("[gaia@32473").unwrap().chars();
        let mut data = BTreeMap::new();
        loop {
            match rest.next().unwrap() {
                ']' => break,
                ' ' => {}
                other => panic!("{other:?}"),
            }
            let name: String = rest.by_ref().take_while(|c| *c != '=').collect();
            assert!((1..=32).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic()), "{name:?}");
            assert_eq!(rest.next(), Some('"'));
            let mut value = String::new();
            loop {
                match rest.next().unwrap() {
                    '"' => break,
                    '\\' => {
                        let escaped = rest.next().unwrap();
                        assert!("\"\\]".contains(escaped), "{escaped:?}");
                        value.push(escaped);
                    }
                    ']' => panic!("a bracket that is not escaped"),
                    c => value.push(c),
                }
            }
            assert!(data.insert(name, value).is_none(), "each once");
        }
        let message = rest.as_str().strip_prefix(' ').unwrap();
        let plain = message.strip_prefix('\u{feff}');
        assert_eq!(plain.is_none(), message.is_ascii(), "the mark says that it is UTF-8");
        let message = plain.unwrap_or(message).to_owned();
        Read { priority: priority.parse().unwrap(), head, data, message }
    }

    fn written(line: &Line) -> Read {
        let mut bytes = Vec::new();
        write(&mut bytes, line, "gaia-1");
        read(&bytes)
    }

    fn line(event: Event<'static>) -> Line {
        let (brane, instance) = (Some("fetch".to_owned()), Some("fetch.034".to_owned()));
        Line { seq: 7, time_ns: 1_777_642_867_118_000_000, core: Some(1), brane, instance, event }
    }

    #[test]
    fn a_request_is_a_message_with_its_figures() {
        let ms = Duration::from_millis;
        let event = Event::Request { text: "api.openalex.org/works".into(), bytes: 12_422, dur: ms(42) };
        let mut bytes = Vec::new();
        write(&mut bytes, &line(event.clone()), "gaia-1");
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            "217 <134>1 2026-05-01T13:41:07.118000Z gaia-1 gaia fetch.034 REQ [gaia@32473 kind=\"REQ\" seq=\"7\" bytes=\"12422\" \
             dur_ns=\"42000000\" brane=\"fetch\" instance=\"fetch.034\" core=\"1\"] REQ api.openalex.org/works bytes=12,422 dur=42ms"
        );
        let read = written(&line(event));
        assert_eq!(read.head, ["2026-05-01T13:41:07.118000Z", "gaia-1", "gaia", "fetch.034", "REQ"]);
    }

    #[test]
    fn how_grave_it_is_follows_from_its_kind() {
        let text = || "x".into();
        for (event, wanted) in [
            (Event::Log { stream: Stream::Out, text: text() }, 16 * 8 + 6),
            (Event::Log { stream: Stream::Err, text: text() }, 16 * 8 + 5),
            (Event::Response { status: 200, cpu: Duration::ZERO, text: text() }, 16 * 8 + 6),
            (Event::Response { status: 503, cpu: Duration::ZERO, text: text() }, 16 * 8 + 4),
            (Event::Deny { text: text() }, 16 * 8 + 4),
            (Event::Kill { text: text() }, 16 * 8 + 4),
            (Event::Lost { records: 1 }, 16 * 8 + 4),
            (Event::Trap { text: text() }, 16 * 8 + 3),
            (Event::Fault { text: text() }, 16 * 8 + 3),
            (Event::Audit { text: text() }, 13 * 8 + 5),
        ] {
            let kind = event.kind().name();
            let read = written(&line(event));
            assert_eq!((read.priority, read.data["kind"].as_str()), (wanted, kind));
        }
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let read = written(&line(Event::Log { stream: Stream::Out, text: "\x1bé".repeat(1300).into() }));
        assert!(read.message.ends_with("..."));
        let mut bytes = Vec::new();
        write(&mut bytes, &line(Event::Deny { text: "\x1b".repeat(4096).into() }), "h");
        assert!((LONGEST - 8..LONGEST + 8).contains(&bytes.len()), "{}", bytes.len());
    }

    proptest! {
        #[test]
        fn any_line_is_a_message(
            kind in 0..10, text in ".{0,200}|\\PC{0,200}", numbers in any::<[u64; 2]>(), status in any::<u16>(), ready in any::<bool>(),
            time_ns in any::<u64>(), seq in any::<u64>(), core in any::<Option<usize>>(),
            brane in proptest::option::of(".{0,60}|[\\]\\\\\"=]{0,20}"), serial in proptest::option::of(any::<u64>()), host in ".{0,300}"
        ) {
            let [one, other] = numbers;
            let (short, long) = (Duration::from_nanos(one), Duration::from_nanos(other));
            let cow: std::borrow::Cow<'static, str> = text.clone().into();
            let event = match kind {
                0 => Event::Log { stream: if ready { Stream::Out } else { Stream::Err }, text: cow },
                1 => Event::Request { text: cow, bytes: one, dur: long },
                2 => Event::Response { status, cpu: short, text: cow },
                3 => Event::End { cold: short, exec: long, ready, text: cow },
                4 => Event::Deny { text: cow },
                5 => Event::Trap { text: cow },
                6 => Event::Kill { text: cow },
                7 => Event::Fault { text: cow },
                8 => Event::Audit { text: cow },
                _ => Event::Lost { records: one },
            };
            let instance = serial.zip(brane.as_ref()).map(|(serial, brane)| format!("{brane}.{serial:03}"));
            let line = Line { seq, time_ns, core, brane: brane.clone(), instance, event };
            let mut bytes = Vec::new();
            write(&mut bytes, &line, &host);
            prop_assert!(bytes.len() <= LONGEST + 5);
            prop_assert!(!std::str::from_utf8(&bytes).unwrap().chars().any(char::is_control));
            let read = read(&bytes);
            prop_assert_eq!(&read.data["seq"], &seq.to_string());
            prop_assert_eq!(&read.head[4], line.event.kind().name());
            let visible = |text: &String| text.chars().map(|c| if c.is_control() { '?' } else { c }).collect::<String>();
            prop_assert_eq!(read.data.get("brane").cloned(), brane.as_ref().map(visible));
            let whole = message(&line.event);
            prop_assert!(read.message == whole || read.message.ends_with("..."));
        }

        #[test]
        fn messages_that_follow_each_other_are_told_apart(texts in proptest::collection::vec(".{0,50}", 0..20)) {
            let mut bytes = Vec::new();
            for text in &texts { write(&mut bytes, &line(Event::Deny { text: text.clone().into() }), "h"); }
            let (mut rest, mut count) = (bytes.as_slice(), 0);
            while !rest.is_empty() {
                let space = rest.iter().position(|b| *b == b' ').unwrap();
                let length: usize = std::str::from_utf8(&rest[..space]).unwrap().parse().unwrap();
                let (one, others) = rest.split_at(space + 1 + length);
                read(one);
                (rest, count) = (others, count + 1);
            }
            prop_assert_eq!(count, texts.len());
        }
    }
}
