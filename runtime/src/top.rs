//! `gaia top`: the appliance and its branes, once a second, until a key ends it.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use gaia_prompt::keys::Key;
use gaia_prompt::row::fitting;
use gaia_prompt::screen::Screen;
use gaia_prompt::terminal::{Event, Terminal};
use serde::Serialize;

use crate::client::{Client, Error, seconds};
use crate::control::report::{self, Given, Ps, Status};

/// How often it looks.
const EVERY: Duration = Duration::from_secs(1);
/// What an answer may take: a key is not heard meanwhile.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
/// Rows of a terminal of 80 columns that are taken by what is no brane.
const HEAD: usize = 6;

/// What was there at one moment.
struct Sample {
    at: Instant,
    status: Status,
    ps: Ps,
}

impl Sample {
    fn take(client: &Client) -> Result<Self, Error> {
        let status = client.status()?;
        Ok(Self { at: Instant::now(), status, ps: client.ps()? })
    }
}

/// What there was between two moments. Shares are of 1; rates are per second, and not there at the first moment.
#[derive(Debug, Default, Serialize)]
struct Picture {
    version: String,
    uptime_s: f64,
    generation: Option<u32>,
    memory_used_kib: u64,
    memory_total_kib: u64,
    requests: Option<f64>,
    lost: u64,
    cores: Vec<Load>,
    branes: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Load {
    core: usize,
    share: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    requests: Option<f64>,
    busy: u64,
    ready: u64,
    waiting: u64,
    traps: u64,
    late: u64,
    killed: u64,
    throttled_ms: Option<f64>,
}

/// Shows it until q or Ctrl-C; without a terminal, until nobody reads.
///
/// # Errors
/// [`Error`], if the first look fails; later ones are shown, and it goes on.
pub fn watch(client: &Client, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let client = client.within(PATIENCE);
    let mut terminal = Terminal::of_stdio();
    let _keys = terminal.as_ref().map(Terminal::keys).transpose().map_err(Error::Output)?;
    let plain = json || terminal.as_ref().is_none_or(Terminal::plain);
    let mut screen = Screen::new(plain);
    let mut before = Sample::take(&client)?;
    let mut shown = picture(None, &before);
    let mut wrong: Option<String> = None;
    if plain && !json && terminal.is_some() {
        out.write_all(ENDS.as_bytes()).map_err(Error::Output)?;
    }
    loop {
        let size = terminal.as_ref().map_or((usize::MAX, usize::MAX), |terminal| {
            let (width, height) = terminal.size();
            (width, if plain { usize::MAX } else { height })
        });
        let mut bytes = Vec::new();
        match (&wrong, json) {
            (None, true) => {
                bytes = serde_json::to_vec(&shown).unwrap_or_default();
                bytes.push(b'\n');
            }
            (None, false) => screen.paint(&mut bytes, &rows(&shown, size.1, !plain), size),
            (Some(why), true) => {
                bytes.extend_from_slice(format!("{}\n", serde_json::json!({ "error": why })).as_bytes());
            }
            (Some(why), false) => screen.paint(&mut bytes, &[why.clone(), ENDS.trim_end().to_owned()], size),
        }
        match out.write_all(&bytes).and_then(|()| out.flush()) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(Error::Output)?,
        }
        if ended(terminal.as_mut(), &mut screen).map_err(Error::Output)? {
            return Ok(());
        }
        match Sample::take(&client) {
            Ok(now) => {
                shown = picture(Some(&before), &now);
                (before, wrong) = (now, None);
            }
            Err(e) => wrong = Some(e.to_string()),
        }
    }
}

/// How it is ended.
pub const ENDS: &str = "q or Ctrl-C ends it\n";

/// Waits for the next look. Whether it is over.
pub(crate) fn ended(terminal: Option<&mut Terminal>, screen: &mut Screen) -> io::Result<bool> {
    let until = Instant::now() + EVERY;
    let Some(terminal) = terminal else {
        std::thread::sleep(EVERY);
        return Ok(false);
    };
    loop {
        match terminal.wait(Some(until.saturating_duration_since(Instant::now())))? {
            Event::Key(Key::Char('q' | 'Q') | Key::Control('c')) | Event::End => return Ok(true),
            Event::Key(Key::Control('l')) => {
                screen.forget();
                return Ok(false);
            }
            Event::Written => screen.forget(),
            Event::Key(_) => {}
            Event::Late => return Ok(false),
        }
    }
}

fn picture(before: Option<&Sample>, now: &Sample) -> Picture {
    let elapsed = before.map(|before| (now.at - before.at).as_secs_f64().max(0.001));
    #[expect(clippy::cast_precision_loss, reason = "nobody reads sixteen digits of a rate")]
    let rate = |old: Option<u64>, new: u64| Some(new.saturating_sub(old?) as f64 / elapsed?);
    let status = &now.status;
    let row = |brane: &report::Brane| {
        let old = before.and_then(|b| b.ps.branes.iter().find(|b| b.name == brane.name));
        Row {
            name: brane.name.clone(),
            requests: rate(old.map(|b| b.requests), brane.requests),
            busy: brane.busy,
            ready: brane.ready,
            waiting: brane.waiting,
            traps: brane.traps,
            late: brane.late,
            killed: brane.killed,
            throttled_ms: rate(old.map(|b| b.throttled_ns), brane.throttled_ns).map(|ns| ns / 1e6),
        }
    };
    Picture {
        version: status.version.clone(),
        uptime_s: status.uptime_s,
        generation: status.generation,
        memory_used_kib: status.memory.total_kib.saturating_sub(status.memory.available_kib),
        memory_total_kib: status.memory.total_kib,
        requests: rate(before.map(|b| b.status.requests), status.requests),
        lost: status.lost,
        cores: status
            .cores
            .as_ref()
            .map(|now| loads(before.and_then(|b| b.status.cores.as_ref()), now))
            .unwrap_or_default(),
        branes: now.ps.branes.iter().map(row).collect(),
    }
}

fn loads(before: Option<&Given>, now: &Given) -> Vec<Load> {
    let load = |core: &gaia_init::given::Core| {
        let old = before.and_then(|b| b.cores.iter().find(|c| c.core == core.core));
        let of = |old: u64, new: u64| f64::from(u32::try_from(new.saturating_sub(old)).unwrap_or(u32::MAX));
        let share = old.map(|old| (of(old.busy, core.busy), of(old.idle, core.idle)));
        Load { core: core.core, share: share.filter(|(busy, idle)| busy + idle > 0.0).map(|(b, i)| b / (b + i)) }
    };
    now.cores.iter().map(load).collect()
}

/// Where not all branes have room, those with the most to do.
fn rows(picture: &Picture, height: usize, keys: bool) -> Vec<String> {
    let serves = picture.generation.map_or_else(|| "nothing yet".to_owned(), |g| format!("generation {g}"));
    let up = seconds(picture.uptime_s);
    let ends = if keys { "    q ends it" } else { "" };
    let mut out =
        vec![format!("gaia {} · up {up} · serves {serves} · {} branes{ends}", picture.version, picture.branes.len())];
    let (used, total) = (picture.memory_used_kib / 1024, picture.memory_total_kib / 1024);
    out.push(format!(
        "memory   {used} of {total} MiB    requests {}/s    lost {}",
        short(picture.requests),
        picture.lost
    ));
    let mut cores = String::from("load    ");
    for Load { core, share } in &picture.cores {
        let share = share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0));
        let _ = write!(cores, " core {core} {share:>4} ");
    }
    out.push(cores);
    out.push(String::new());
    out.push(format!(
        "{:<18} {:>6} {:>5} {:>6} {:>8} {:>6} {:>5} {:>7} {:>9}",
        "BRANE", "REQ/S", "BUSY", "READY", "WAITING", "TRAPS", "LATE", "KILLED", "THROTTLED"
    ));
    let room = height.saturating_sub(HEAD + 1).max(1);
    let mut shown: Vec<(usize, &Row)> = picture.branes.iter().enumerate().collect();
    if shown.len() > room {
        let busy = |row: &Row| {
            row.requests.unwrap_or(0.0) + f64::from(u32::try_from(row.waiting + row.busy).unwrap_or(u32::MAX))
        };
        shown.sort_by(|(_, a), (_, b)| busy(b).total_cmp(&busy(a)));
        shown.truncate(room - 1);
        shown.sort_by_key(|(at, _)| *at);
    }
    for (_, row) in &shown {
        let throttled = row.throttled_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0}ms/s"));
        out.push(format!(
            "{:<18} {:>6} {:>5} {:>6} {:>8} {:>6} {:>5} {:>7} {throttled:>9}",
            fitting(&row.name, 18),
            short(row.requests),
            row.busy,
            row.ready,
            row.waiting,
            row.traps,
            row.late,
            row.killed
        ));
    }
    if shown.len() < picture.branes.len() {
        out.push(format!("and {} more, which have less to do", picture.branes.len() - shown.len()));
    }
    out
}

/// `-`, `0`, `4.2`, `812`, `14.1k`
fn short(rate: Option<f64>) -> String {
    match rate {
        None => "-".into(),
        Some(0.0) => "0".into(),
        Some(n @ ..10.0) => format!("{n:.1}"),
        Some(n @ ..10_000.0) => format!("{n:.0}"),
        Some(n) => format!("{:.1}k", n / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: u32) -> Row {
        let name = format!("brane-{n}");
        let (requests, waiting, traps) = (Some(f64::from(n)), 1, u64::from(n));
        Row { name, requests, busy: 1, ready: 3, waiting, traps, late: 0, killed: 0, throttled_ms: Some(12.4) }
    }

    #[test]
    fn it_fits_a_serial_terminal_and_shows_who_has_the_most_to_do() {
        let picture = Picture {
            version: "0.1.0".into(),
            uptime_s: 9e6,
            generation: Some(12),
            memory_used_kib: 61 << 10,
            memory_total_kib: 512 << 10,
            requests: Some(14_130.0),
            cores: vec![Load { core: 1, share: Some(0.618) }, Load { core: 2, share: None }],
            branes: (0..50).map(row).collect(),
            ..Picture::default()
        };
        let rows = rows(&picture, 24, true);
        assert!(rows.len() < 24 && rows.iter().all(|row| row.chars().count() < 80), "{rows:#?}");
        assert_eq!(rows[1], "memory   61 of 512 MiB    requests 14.1k/s    lost 0");
        assert_eq!(rows[2], "load     core 1  62%  core 2    - ");
        assert!(rows[5].starts_with("brane-34 ") && rows[5].ends_with(" 12ms/s"), "{rows:#?}");
        assert_eq!(rows.last().unwrap(), "and 34 more, which have less to do");
    }

    #[test]
    fn the_load_of_a_core_is_of_the_time_between() {
        let given = |busy, idle| Given {
            cores: vec![gaia_init::given::Core { core: 1, busy, idle, ..Default::default() }],
            ..Given::default()
        };
        let share = |before: Option<&Given>, now: &Given| loads(before, now)[0].share;
        assert_eq!(share(None, &given(10, 90)), None);
        assert_eq!(share(Some(&given(10, 90)), &given(40, 160)), Some(0.3));
        assert_eq!(share(Some(&given(10, 90)), &given(10, 90)), None);
    }

    #[test]
    fn rates_are_short() {
        let of = [None, Some(0.0), Some(4.24), Some(812.4), Some(14_130.0)].map(short);
        assert_eq!(of, ["-", "0", "4.2", "812", "14.1k"]);
    }
}
