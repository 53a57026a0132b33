//! `gaia profile`: how long and how large the work of branes is, where their processor time goes, and what it costs.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use gaia_prompt::screen::Screen;
use gaia_prompt::terminal::Terminal;
use serde::Serialize;

use crate::client::{Client, Error};
use crate::control::profile::Whose;
use crate::control::report::{Profile, Rate, Samples, Work};
use crate::histogram::{Counts, Distribution};
use crate::log::text::{clock, thousands};
use crate::{flame, pprof, top};

/// Over how long it tells.
const WATCHED: usize = 10;

/// What is shown of whom.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is an option")]
pub struct Options {
    /// Of this brane alone
    #[arg(long, conflicts_with = "instance")]
    pub brane: Option<String>,
    /// Of this pinned instance alone: counter.001
    #[arg(long)]
    pub instance: Option<String>,
    /// The median
    #[arg(long)]
    pub p50: bool,
    /// What nine of ten do not exceed
    #[arg(long)]
    pub p90: bool,
    /// What 99 of 100 do not exceed
    #[arg(long)]
    pub p99: bool,
    /// What 999 of 1000 do not exceed
    #[arg(long)]
    pub p999: bool,
    /// The largest
    #[arg(long)]
    pub max: bool,
    /// Errors and cost, too: as without any of these
    #[arg(long)]
    pub all: bool,
    /// What a core costs an hour: says what a million requests cost
    #[arg(long, value_name = "MONEY")]
    pub price: Option<Price>,
    /// Of what happens from now on, for so long: 10s
    #[arg(long, value_name = "DURATION", value_parser = gaia_manifest::units::duration)]
    pub during: Option<Duration>,
    /// Show the last ten seconds, once a second, until q or ^C
    #[arg(long, conflicts_with_all = ["during", "flame", "pprof"])]
    pub watch: bool,
    /// Write a flame graph of where processor time goes
    #[arg(long, value_name = "OUT.svg")]
    pub flame: Option<PathBuf>,
    /// Write the same for pprof
    #[arg(long, value_name = "OUT.pb.gz")]
    pub pprof: Option<PathBuf>,
}

/// What a core costs an hour, in millionths of whatever money it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price(u64);

impl Price {
    #[expect(clippy::cast_precision_loss, reason = "money that an hour of a core costs")]
    fn money(self) -> f64 {
        self.0 as f64 / 1e6
    }
}

impl std::str::FromStr for Price {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "not a price from 0 to 1000000, such as 0.04";
        let money: f64 = text.parse().map_err(|_| WRONG)?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in this range it is exact")]
        if (0.0..=1e6).contains(&money) { Ok(Self((money * 1e6).round() as u64)) } else { Err(WRONG) }
    }
}

impl Options {
    fn whose(&self) -> Result<Whose, Error> {
        let (whose, name) = match (&self.brane, &self.instance) {
            (_, Some(name)) => (Whose::Instance(name.clone()), name),
            (Some(name), _) => (Whose::Brane(name.clone()), name),
            (None, None) => return Ok(Whose::All),
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(Error::Missing(format!("there is nothing with the name {name:?}: gaia ps lists branes")));
        }
        Ok(whose)
    }

    /// The rows, and whether all else is shown.
    fn rows(&self) -> (Vec<(&'static str, f64)>, bool) {
        let all = [
            (self.p50, "P50", 0.5),
            (self.p90, "P90", 0.9),
            (self.p99, "P99", 0.99),
            (self.p999, "P999", 0.999),
            (self.max, "MAX", 1.0),
        ];
        let rows: Vec<_> = all.iter().filter(|(wanted, ..)| *wanted).map(|(_, name, part)| (*name, *part)).collect();
        if rows.is_empty() { (vec![("P50", 0.5), ("P99", 0.99)], true) } else { (rows, self.all) }
    }
}

/// Runs the command: what it shows on `out`.
///
/// # Errors
/// [`Error`], with what to do about it.
pub fn run(options: &Options, client: &Client, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let whose = options.whose()?;
    if options.watch {
        return watch(options, &whose, client, json, out);
    }
    if options.flame.is_some() || options.pprof.is_some() {
        return write_stacks(options, &whose, client, json, out);
    }
    let profile = match options.during {
        None => client.profile(&whose)?,
        Some(during) => {
            let before = client.profile(&whose)?;
            std::thread::sleep(during);
            since(&client.profile(&whose)?, &before)
        }
    };
    out.write_all(shown(&profile, options, json).as_bytes()).map_err(Error::Output)
}

/// What came between two looks.
fn since(now: &Profile, before: &Profile) -> Profile {
    let of = |work: &Work| {
        let then = before.branes.iter().find(|then| then.name == work.name);
        then.map_or_else(|| work.clone(), |then| work.since(then))
    };
    Profile { branes: now.branes.iter().map(of).collect(), ..now.clone() }
}

fn shown(profile: &Profile, options: &Options, json: bool) -> String {
    if json {
        return serde_json::to_string(profile).unwrap_or_default() + "\n";
    }
    let is_one = options.brane.is_some() || options.instance.is_some();
    let block =
        |work: &Work| if is_one { table(work, options) } else { format!("{}\n{}", work.name, table(work, options)) };
    let blocks: Vec<String> = profile.branes.iter().map(block).collect();
    if blocks.is_empty() { "no brane serves\n".into() } else { blocks.join("\n") }
}

/// A column: its name, what is in it, and how that is written.
type Column<'a> = (&'static str, &'a Distribution, fn(u64) -> String);

/// The table of one brane.
#[must_use]
pub fn table(work: &Work, options: &Options) -> String {
    let (rows, rest) = options.rows();
    let columns: [Column<'_>; 4] =
        [("cold", &work.cold, fine), ("exec", &work.exec, short), ("cpu", &work.cpu, short), ("mem", &work.mem, size)];
    let mut lines: Vec<String> = [""].into_iter().chain(rows.iter().map(|(name, _)| *name)).map(Into::into).collect();
    let mut width = lines.iter().map(String::len).max().map_or(6, |longest| (longest + 2).max(6));
    for (name, of, text) in columns {
        let value = |part: f64| of.0.quantile(part).map_or_else(|| "-".into(), text);
        let exactly = |part: f64| {
            if part < 1.0 {
                value(part)
            } else if of.0.count() > 0 {
                text(of.0.max)
            } else {
                "-".into()
            }
        };
        let cells: Vec<String> =
            [name.to_owned()].into_iter().chain(rows.iter().map(|(_, part)| exactly(*part))).collect();
        for (line, cell) in lines.iter_mut().zip(&cells) {
            let _ = write!(line, "{}{cell}", " ".repeat(width - line.chars().count()));
        }
        let longest = cells.iter().map(|cell| cell.chars().count()).max().unwrap_or(0);
        width += (name.len() + 4).max(longest + 2);
    }
    let mut out = lines.join("\n") + "\n";
    let _ = writeln!(out, "RPS   {}", rate(&work.rate));
    if rest {
        let _ = writeln!(out, "ERR   {}", errors(work));
        let _ = writeln!(out, "CPU   {}", core_seconds(&work.cpu.0, work.throttled_ns));
    }
    if let Some(price) = options.price.map(Price::money) {
        let _ = writeln!(out, "COST  {}", cost(&work.cpu.0, price));
    }
    out
}

/// `1.41 K (steady)`
fn rate(rate: &Rate) -> String {
    format!("{} ({})", quantity(rate.per_second), rate.trend.word())
}

/// Three digits and a letter: `1.41 K`, `42.3`, `0`
fn quantity(number: f64) -> String {
    let (number, letter) = match number {
        0.0..999.5 => (number, ""),
        999.5..999_500.0 => (number / 1e3, " K"),
        999_500.0..999_500_000.0 => (number / 1e6, " M"),
        _ => (number / 1e9, " G"),
    };
    let digits = match number {
        0.0 => 0,
        0.0..9.995 => 2,
        9.995..99.95 => 1,
        _ => 0,
    };
    format!("{number:.digits$}{letter}")
}

/// `12 of 61,034 requests (0.02 %): 3 traps, 2 missed deadlines, 7 refused, 0 killed`
fn errors(work: &Work) -> String {
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    let part = if work.requests > 0 { work.failed as f64 / work.requests as f64 * 100.0 } else { 0.0 };
    format!(
        "{} of {} requests ({part:.2} %): {} traps, {} missed deadlines, {} refused, {} killed",
        thousands(work.failed),
        thousands(work.requests),
        thousands(work.traps),
        thousands(work.late),
        thousands(work.refused),
        thousands(work.killed)
    )
}

/// Core-seconds of a million requests.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn of_a_million(cpu: &Counts) -> Option<f64> {
    let requests = cpu.count();
    (requests > 0).then(|| cpu.sum as f64 / 1e9 / requests as f64 * 1e6)
}

fn core_seconds(cpu: &Counts, throttled_ns: u64) -> String {
    let seconds = of_a_million(cpu).map_or_else(|| "-".into(), quantity);
    format!("{seconds} core-seconds per million requests, throttled for {}", short(throttled_ns))
}

fn cost(cpu: &Counts, price: f64) -> String {
    let money = of_a_million(cpu).map_or_else(|| "-".into(), |seconds| format!("{:.4}", seconds / 3600.0 * price));
    format!("{money} per million requests, at {price} per core-hour")
}

/// A duration with two digits at least: `0.3µs`, `340µs`, `1.0ms`, `42ms`, `12.4s`
fn fine(nanos: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let (number, unit) = match nanos {
        0..999_500 => (nanos as f64 / 1e3, "µs"),
        999_500..999_500_000 => (nanos as f64 / 1e6, "ms"),
        _ => (nanos as f64 / 1e9, "s"),
    };
    let digits = usize::from(number < 9.95 || unit == "s");
    format!("{number:.digits$}{unit}")
}

/// The same, and whole numbers without a point: `8ms`
fn short(nanos: u64) -> String {
    fine(nanos).replace(".0", "")
}

/// `192KiB`, `1.5MiB`, `18MiB`
fn size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let (number, unit) = match bytes {
        0..0x10_0000 => (bytes as f64 / 1024.0, "KiB"),
        0x10_0000..0x4000_0000 => (bytes as f64 / f64::from(1 << 20), "MiB"),
        _ => (bytes as f64 / f64::from(1 << 30), "GiB"),
    };
    let digits = usize::from(number < 9.95);
    format!("{number:.digits$}{unit}").replace(".0", "")
}

/// What was written where.
#[derive(Debug, Serialize)]
struct Wrote {
    files: Vec<PathBuf>,
    samples: u64,
    cpu_ns: u64,
    deeper: u64,
    shortened: u64,
}

fn write_stacks(
    options: &Options,
    whose: &Whose,
    client: &Client,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let mut samples = client.stacks(whose)?;
    if let Some(during) = options.during {
        std::thread::sleep(during);
        let now = client.stacks(whose)?;
        samples = sampled_since(&now, &samples);
    }
    let sum = |of: fn(&crate::stacks::Stacks) -> u64| {
        samples.branes.iter().fold(0_u64, |sum, brane| sum.saturating_add(of(&brane.stacks)))
    };
    let ticks = sum(crate::stacks::Stacks::ticks);
    let mut files = Vec::new();
    let mut write = |path: &PathBuf, bytes: &[u8]| {
        let written = std::fs::write(path, bytes);
        files.push(path.clone());
        written.map_err(|e| Error::Output(io::Error::new(e.kind(), format!("{}: {e}", path.display()))))
    };
    if let Some(path) = &options.flame {
        let of = options.instance.as_ref().or(options.brane.as_ref()).map_or("all branes", String::as_str);
        write(path, flame::svg(&samples, &format!("gaia profile: processor time of {of}")).as_bytes())?;
    }
    if let Some(path) = &options.pprof {
        let during = options.during.map_or(0, crate::histogram::nanos);
        write(path, &pprof::gzip(&pprof::profile(&samples, during)))?;
    }
    let outcome = Wrote {
        files,
        samples: ticks,
        cpu_ns: ticks.saturating_mul(samples.tick_ns),
        deeper: sum(|stacks| stacks.deeper),
        shortened: sum(|stacks| stacks.shortened),
    };
    let text = if json { serde_json::to_string(&outcome).unwrap_or_default() + "\n" } else { outcome.text() };
    out.write_all(text.as_bytes()).map_err(Error::Output)
}

fn sampled_since(now: &Samples, before: &Samples) -> Samples {
    let mut left = now.clone();
    for brane in &mut left.branes {
        if let Some(then) = before.branes.iter().find(|then| then.name == brane.name) {
            brane.stacks = brane.stacks.since(&then.stacks);
        }
    }
    left
}

impl Wrote {
    fn text(&self) -> String {
        let mut out = String::new();
        for file in &self.files {
            let (samples, cpu) = (thousands(self.samples), short(self.cpu_ns));
            let _ = writeln!(out, "✓ wrote {} · {samples} samples of {cpu} of processor time", file.display());
        }
        if self.deeper > 0 {
            let _ = writeln!(out, "  {} samples were deeper than what is followed", thousands(self.deeper));
        }
        if self.shortened > 0 {
            let _ = writeln!(
                out,
                "  {} samples count for a caller: there was no room for more functions",
                thousands(self.shortened)
            );
        }
        if self.samples == 0 {
            out.push_str("  no sample: a guest is seen when it runs while a tick of 5 ms comes\n");
        }
        out
    }
}

/// Shows the last seconds again and again.
fn watch(options: &Options, whose: &Whose, client: &Client, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let client = client.within(top::PATIENCE);
    let mut looks = VecDeque::from([client.profile(whose)?]);
    let mut terminal = if json { None } else { Terminal::of_stdio() };
    let _keys = terminal.as_ref().map(Terminal::keys).transpose().map_err(Error::Output)?;
    let mut screen = Screen::new(terminal.as_ref().is_none_or(Terminal::plain));
    loop {
        if top::ended(terminal.as_mut(), &mut screen).map_err(Error::Output)? {
            return Ok(());
        }
        let now = client.profile(whose)?;
        let last = looks.front().map_or_else(|| now.clone(), |before| since(&now, before));
        let text = shown(&last, options, json);
        let mut bytes = Vec::new();
        if json {
            bytes.extend_from_slice(text.as_bytes());
        } else {
            let head = format!("Ω {} the last {} s", clock(Duration::from_nanos(now.time_ns)), looks.len());
            let rows: Vec<String> = std::iter::once(head).chain(text.lines().map(str::to_owned)).collect();
            let size = match &terminal {
                Some(terminal) if !terminal.plain() => terminal.size(),
                _ => (usize::MAX, usize::MAX),
            };
            screen.paint(&mut bytes, &rows, size);
        }
        match out.write_all(&bytes).and_then(|()| out.flush()) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.map_err(Error::Output)?,
        }
        looks.push_back(now);
        if looks.len() > WATCHED {
            looks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::Trend;
    use clap::Parser as _;
    use proptest::prelude::*;

    #[derive(Debug, clap::Parser)]
    #[command(no_binary_name = true)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Options {
        Line::try_parse_from(line.split(' ').filter(|word| !word.is_empty())).unwrap().options
    }

    /// A distribution of 99 of these and one of those.
    fn of(most: u64, one: u64) -> Distribution {
        let told =
            serde_json::json!({ "count": 100, "sum": most * 99 + one, "max": one, "buckets": [[most, 98], [one, 2]] });
        serde_json::from_value(told).unwrap()
    }

    fn fetch() -> Work {
        Work {
            name: "fetch".into(),
            requests: 61_034,
            failed: 12,
            traps: 3,
            late: 2,
            refused: 7,
            throttled_ns: 1_200_000_000,
            rate: Rate { per_second: 1412.3, trend: Trend::Steady, windows: vec![1412.0; 5] },
            cold: of(1_000_000, 1_400_000),
            exec: of(42_000_000, 210_000_000),
            cpu: of(8_000_000, 63_000_000),
            mem: of(18 << 20, 42 << 20),
            ..Work::default()
        }
    }

    #[test]
    fn the_table_is_that_of_the_product_page() {
        let wanted = "      cold    exec    cpu    mem\nP50   1.0ms   42ms    8ms    18MiB\nP99   1.4ms   210ms   63ms   42MiB\nRPS   1.41 K (steady)\n";
        assert_eq!(table(&fetch(), &options("--brane fetch --p50 --p99")), wanted);
        let more = table(&fetch(), &options("--brane fetch --price 0.04"));
        let rest = more.strip_prefix(wanted).unwrap();
        assert_eq!(
            rest,
            "ERR   12 of 61,034 requests (0.02 %): 3 traps, 2 missed deadlines, 7 refused, 0 killed\n\
             CPU   8.55 K core-seconds per million requests, throttled for 1.2s\n\
             COST  0.0950 per million requests, at 0.04 per core-hour\n"
        );
        assert_eq!(table(&fetch(), &options("--p50 --p99 --all")), table(&fetch(), &options("")));
    }

    #[test]
    fn all_rows_can_be_had_and_longer_ones_find_room() {
        let mut work = fetch();
        work.exec = of(42_000_000, 1_234_567_000_000);
        let text = table(&work, &options("--p50 --p90 --p99 --p999 --max"));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 7);
        assert!(lines[4].starts_with("P999  1.4ms"), "{text}");
        assert_eq!(lines[5].split_whitespace().collect::<Vec<_>>(), ["MAX", "1.4ms", "1234.6s", "63ms", "42MiB"]);
        let nothing = table(&Work::default(), &options("--p50"));
        assert_eq!(nothing, "      cold    exec    cpu    mem\nP50   -       -       -      -\nRPS   0 (new)\n");
    }

    #[test]
    fn figures_are_short() {
        assert_eq!(
            [300, 7_000, 340_000, 999_600, 1_049_000, 42_000_000].map(fine),
            ["0.3µs", "7.0µs", "340µs", "1.0ms", "1.0ms", "42ms"]
        );
        assert_eq!([8_000_000, 1_900_000, 999_999_999, 0].map(short), ["8ms", "1.9ms", "1s", "0µs"]);
        assert_eq!(
            [131_072, 1 << 20, 3 << 19, 18 << 20, 5 << 30].map(size),
            ["128KiB", "1MiB", "1.5MiB", "18MiB", "5GiB"]
        );
        assert_eq!(
            [0.0, 0.4, 42.31, 999.7, 1412.0, 31_400.0, 1e6].map(quantity),
            ["0", "0.40", "42.3", "1.00 K", "1.41 K", "31.4 K", "1.00 M"]
        );
    }

    #[test]
    fn what_came_between_two_looks_is_told() {
        let mut before = Profile { time_ns: 1, window_s: 10, branes: vec![fetch()] };
        let mut now = before.clone();
        now.branes[0].requests += 5;
        now.branes.push(Work { name: "new".into(), requests: 3, ..Work::default() });
        before.branes[0].failed = 2;
        let last = since(&now, &before);
        assert_eq!((last.branes[0].requests, last.branes[0].failed, last.branes[1].requests), (5, 10, 3));
        assert_eq!(last.branes[0].exec.0.count(), 0);
    }

    proptest! {
        #[test]
        fn any_figures_are_columns_of_one_table(values in proptest::collection::vec(any::<u64>(), 8), per_second in 0.0_f64..1e12) {
            let of = |at: usize| Distribution(serde_json::from_value::<Distribution>(serde_json::json!({ "count": 1, "sum": values[at], "max": values[at], "buckets": [[values[at], 1]] })).unwrap().0);
            let work = Work { cold: of(0), exec: of(1), cpu: of(2), mem: of(3), throttled_ns: values[4], rate: Rate { per_second, ..Rate::default() }, ..Work::default() };
            let text = table(&work, &options("--p50 --p99"));
            let lines: Vec<&str> = text.lines().collect();
            prop_assert_eq!(lines.len(), 4);
            for line in &lines[..3] {
                prop_assert!(line.split_whitespace().count() >= 4, "{}", text);
            }
        }
    }
}
