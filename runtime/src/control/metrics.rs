//! What is counted, for whoever collects it: the text that Prometheus reads, and `OpenMetrics` (1.0) for who asks for that.
//!
//! `GET /metrics` of the API, and of a plain port of its own if `gaia.toml` opens one: whoever collects metrics speaks neither
//! raw keys nor has one. Nothing else is answered there.
//!
//! Each worker counts in its own page, and what it counted goes with it; so what ended workers counted is added up, of branes in
//! [the profile](super::profile) and of workers here, and a counter does not fall when a deploy has replaced them. There is a series for each brane of the graph that serves, at most
//! [`MAX_BRANES`](crate::plan::MAX_BRANES), and for no other.
//!
//! Distributions are those of the profile, told in buckets that are the same for all.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::{Display, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use gaia_init::settings::Prefix;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::profile::Work;
use super::remote::Pace;
use super::{Control, Worker, api};
use crate::histogram::{Counts, Distribution};
use crate::statistics::{self, OWN_STATUSES};

/// The one path of the port.
pub(super) const PATH: &str = "/metrics";
/// Conversations of the port at a time.
const CONNECTIONS: usize = 16;
/// Connections that are accepted at once, and each second from then on.
const ARRIVALS: (u32, u32) = (32, 16);
/// Answers at once, and each second from then on: the longest has some hundred thousand lines.
const ANSWERS: (u32, u32) = (20, 5);
/// How long a head may take, and a conversation in which nothing is asked.
const IDLE: Duration = Duration::from_secs(10);
/// How long a conversation may last in all, and how long what is being sent then may take.
const LASTS: (Duration, Duration) = (Duration::from_mins(1), Duration::from_secs(10));

/// What a family's samples are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Only grows.
    Counter,
    /// As it is now.
    Gauge,
    /// 1, and its labels say what there is to say.
    Info,
    /// How many were up to each of some bounds, how many there were, and their sum.
    Histogram,
}

/// What is counted of `T` and shown under one name.
struct Family<T> {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    /// In ns, shown in seconds.
    nanos: bool,
    of: fn(&T) -> u64,
}

const fn counter<T>(name: &'static str, help: &'static str, of: fn(&T) -> u64) -> Family<T> {
    Family { name, kind: Kind::Counter, help, nanos: false, of }
}

const fn gauge<T>(name: &'static str, help: &'static str, of: fn(&T) -> u64) -> Family<T> {
    Family { name, kind: Kind::Gauge, help, nanos: false, of }
}

/// What each brane has counted.
const BRANE: [Family<Work>; 8] = [
    counter("gaia_brane_requests", "Requests routed to the brane", |w| w.requests),
    counter("gaia_brane_instances", "Instances that were given a request", |w| w.instances),
    counter("gaia_brane_traps", "Instances that trapped", |w| w.traps),
    counter("gaia_brane_late", "Requests whose deadline passed", |w| w.late),
    counter("gaia_brane_refused", "Requests refused because none would become free in time", |w| w.refused),
    counter("gaia_brane_killed", "Instances ended for the memory that they had", |w| w.killed),
    Family {
        nanos: true,
        ..counter("gaia_brane_throttled_seconds", "Time that instances waited for their quota of a core", |w: &Work| {
            w.throttled_ns
        })
    },
    counter("gaia_brane_log_dropped", "Records of the brane that the log had no room for", |w| w.dropped),
];

/// How each brane is now.
const NOW: [Family<statistics::Brane>; 3] = [
    gauge("gaia_brane_busy", "Instances that serve now", |b| b.busy.load(Relaxed)),
    gauge("gaia_brane_waiting", "Requests that wait for an instance now", |b| b.waiting.load(Relaxed)),
    gauge("gaia_brane_ready", "Instances that are ready for a request", |b| b.ready.load(Relaxed)),
];

/// How something is distributed over the requests of a brane.
struct Spread {
    name: &'static str,
    help: &'static str,
    /// In ns, shown in seconds.
    nanos: bool,
    bounds: &'static [u64],
    of: fn(&Work) -> &Distribution,
}

/// Bounds of times, in ns: from 1 µs to 10 s.
const TIMES: [u64; 22] = {
    let (mut bounds, mut at, mut decade) = ([0; 22], 0, 1_000);
    while at < bounds.len() {
        bounds[at] = decade * [1, 2, 5][at % 3];
        at += 1;
        decade *= if at % 3 == 0 { 10 } else { 1 };
    }
    bounds
};

/// Bounds of memory, in bytes: from 64 KiB to 4 GiB, which is all that a guest can address.
const SIZES: [u64; 9] = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30, 4 << 30];

/// What is shown of each brane as a distribution.
const SPREADS: [Spread; 4] = [
    times("gaia_brane_cold_seconds", "Time from dispatch to the guest's first instruction", |w| &w.cold),
    times("gaia_brane_exec_seconds", "Time that a request was in the guest", |w| &w.exec),
    times("gaia_brane_cpu_seconds", "Processor time of a request in the guest", |w| &w.cpu),
    Spread {
        name: "gaia_brane_memory_bytes",
        help: "What an instance held at the end of its request",
        nanos: false,
        bounds: &SIZES,
        of: |w| &w.mem,
    },
];

const fn times(name: &'static str, help: &'static str, of: fn(&Work) -> &Distribution) -> Spread {
    Spread { name, help, nanos: true, bounds: &TIMES, of }
}

/// What is shown of all workers together.
const WORKER: [Family<statistics::Worker>; 7] = [
    counter("gaia_connections", "Connections accepted", |w| w.accepted.load(Relaxed)),
    gauge("gaia_connections_open", "Connections open now", |w| w.open.load(Relaxed)),
    counter("gaia_requests", "Requests whose head was read", |w| w.requests.load(Relaxed)),
    gauge("gaia_requests_inside", "Requests without a finished answer now", |w| w.inside.load(Relaxed)),
    counter("gaia_requests_without_route", "Requests that no brane is served at", |w| w.no_route.load(Relaxed)),
    counter("gaia_output_bytes", "Bytes that guests wrote to their standard output and error", |w| {
        w.output.load(Relaxed)
    }),
    counter("gaia_log_dropped", "Records of the workers themselves that the log had no room for", |w| {
        w.log.dropped.load(Relaxed)
    }),
];

/// What workers and keepers counted that are gone; of branes, the profile has it.
#[derive(Debug, Default)]
pub(super) struct Counted {
    workers: [u64; WORKER.len()],
    own: [u64; OWN_STATUSES.len()],
    /// Requests that ended with their worker.
    pub(super) lost: u64,
    /// Ends that were not in order, by kind of process: `worker`, `keeper`.
    ended: BTreeMap<&'static str, u64>,
}

impl Counted {
    /// Of a process that is there, or was until now.
    fn add(&mut self, worker: &Worker, kinds: &[Kind]) {
        if worker.runs.core().is_none() {
            return;
        }
        let page = &worker.statistics.worker;
        for (sum, family) in self.workers.iter_mut().zip(&WORKER).filter(|(_, family)| kinds.contains(&family.kind)) {
            *sum += (family.of)(page);
        }
        for (sum, own) in self.own.iter_mut().zip(&page.own) {
            *sum += own.load(Relaxed);
        }
    }

    /// A process has ended: what it counted stays, and what was there of it is gone.
    pub(super) fn ended(&mut self, worker: &Worker, in_order: bool) {
        self.add(worker, &[Kind::Counter]);
        let kind = if worker.runs.core().is_some() { "worker" } else { "keeper" };
        *self.ended.entry(kind).or_default() += u64::from(!in_order);
        let page = &worker.statistics.worker;
        // A request on its way on a fresh connection is lost to the client as well.
        self.lost += page.inside.load(Relaxed) + page.fresh.load(Relaxed);
    }
}

impl Control {
    /// Requests whose head was read, by the workers that are there and those that are gone.
    pub(super) fn requests(&self) -> u64 {
        let past = &self.counted.borrow().workers;
        let gone =
            WORKER.iter().zip(past).find(|(family, _)| family.name == "gaia_requests").map_or(0, |(_, sum)| *sum);
        gone + self.sum(|worker| &worker.statistics.worker.requests)
    }
}

/// The text as it grows.
struct Text {
    out: String,
    open_metrics: bool,
    /// The name of the last family's samples.
    name: String,
}

impl Text {
    fn new(open_metrics: bool) -> Self {
        Self { out: String::with_capacity(16 << 10), open_metrics, name: String::new() }
    }

    /// Begins a family: `OpenMetrics` calls it without what its samples have behind their name, and Prometheus with it.
    fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let (word, end) = match (kind, self.open_metrics) {
            (Kind::Counter, _) => ("counter", "_total"),
            (Kind::Gauge, _) => ("gauge", ""),
            (Kind::Histogram, _) => ("histogram", ""),
            (Kind::Info, true) => ("info", "_info"),
            (Kind::Info, false) => ("gauge", "_info"),
        };
        self.name = format!("{name}{end}");
        let called = if self.open_metrics { name } else { &self.name };
        let _ = writeln!(self.out, "# TYPE {called} {word}");
        let unit =
            ["seconds", "bytes"].into_iter().find(|unit| name.strip_suffix(unit).is_some_and(|n| n.ends_with('_')));
        if let Some(unit) = unit.filter(|_| self.open_metrics) {
            let _ = writeln!(self.out, "# UNIT {called} {unit}");
        }
        let _ = writeln!(self.out, "# HELP {called} {help}");
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.ending("", labels, value);
    }

    /// A sample whose name has an end that is not its family's.
    fn ending(&mut self, end: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.out, "{}{end}", self.name);
        for (at, (name, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.out, "{}{name}=\"{value}\"", if at == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.out, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// How a brane's values are distributed. Bounds are numbers with a point, as both forms read them.
    fn spread(&mut self, brane: &str, of: &Counts, spread: &Spread) {
        let shown = |value: u64| {
            #[expect(clippy::cast_precision_loss, reason = "bounds are short")]
            let value = if spread.nanos { Duration::from_nanos(value).as_secs_f64() } else { value as f64 };
            value
        };
        for (bound, count) in spread.bounds.iter().zip(of.up_to(spread.bounds)) {
            let bound = shown(*bound);
            let bound = if bound.fract() == 0.0 { format!("{bound:.1}") } else { bound.to_string() };
            self.ending("_bucket", &[("brane", brane), ("le", &bound)], count);
        }
        self.ending("_bucket", &[("brane", brane), ("le", "+Inf")], of.count());
        self.ending("_sum", &[("brane", brane)], shown(of.sum));
        self.ending("_count", &[("brane", brane)], of.count());
    }

    fn alone(&mut self, name: &str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(&[], value);
    }

    fn counted(&mut self, labels: &[(&str, &str)], nanos: bool, value: u64) {
        if nanos {
            self.sample(labels, Duration::from_nanos(value).as_secs_f64());
        } else {
            self.sample(labels, value);
        }
    }

    fn finished(mut self) -> String {
        if self.open_metrics {
            self.out.push_str("# EOF\n");
        }
        self.out
    }
}

/// All of it.
pub(super) async fn text(control: &Control, open_metrics: bool) -> String {
    // Init's list may be a moment late, and nobody waits for it without an end.
    let roles = timeout(IDLE, control.init.roles()).await.ok().and_then(Result::ok).unwrap_or_default();
    let mut now = Counted::default();
    let mut rows: BTreeMap<String, [u64; NOW.len()]> = BTreeMap::new();
    for worker in control.workers.borrow().iter() {
        now.add(worker, &[Kind::Counter, Kind::Gauge]);
        for (row, name) in worker.rows(control) {
            let sums = rows.entry(name).or_default();
            for (sum, family) in sums.iter_mut().zip(&NOW) {
                *sum += worker.statistics.branes.get(row).map_or(0, family.of);
            }
        }
    }
    let plan = control.plan.borrow().clone();
    let works: Vec<Work> = plan.iter().flat_map(|plan| &plan.branes).map(|brane| control.work(&brane.name)).collect();
    let past = control.counted.borrow();

    let mut text = Text::new(open_metrics);
    text.family("gaia_build", Kind::Info, "What runs");
    let uname = rustix::system::uname();
    text.sample(&[("version", env!("CARGO_PKG_VERSION")), ("kernel", &uname.release().to_string_lossy())], 1);
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let up = Duration::new(up.tv_sec.cast_unsigned(), u32::try_from(up.tv_nsec).unwrap_or(0));
    text.alone("gaia_uptime_seconds", Kind::Gauge, "Time since the machine began", up.as_secs_f64());
    let generation = plan.as_ref().map_or(0, |plan| plan.generation);
    text.alone("gaia_generation", Kind::Gauge, "The generation that serves, 0 if none does", generation);
    let graph = control.vault.as_ref().and_then(|vault| vault.store().current_number()).unwrap_or(0);
    text.alone("gaia_graph", Kind::Gauge, "The current graph's number in the history, 0 if none was deployed", graph);
    text.alone("gaia_branes", Kind::Gauge, "Branes that are served", plan.as_ref().map_or(0, |plan| plan.branes.len()));
    let memory = api::memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default());
    text.alone("gaia_memory_total_bytes", Kind::Gauge, "Memory that the kernel manages", memory.total_kib << 10);
    text.alone(
        "gaia_memory_available_bytes",
        Kind::Gauge,
        "Memory that could be given out",
        memory.available_kib << 10,
    );

    let mut kinds: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for role in &roles {
        let of = kinds.entry(role.name.split('@').next().unwrap_or_default()).or_default();
        of.0 += u64::from(role.pid > 0);
        of.1 += u64::from(role.restarts);
    }
    text.family("gaia_processes", Kind::Gauge, "Processes that are there, by role");
    for (role, (there, _)) in &kinds {
        text.sample(&[("role", role)], there);
    }
    text.family(
        "gaia_process_restarts",
        Kind::Gauge,
        "Times that the processes of a role which are there were started again",
    );
    for (role, (_, restarts)) in &kinds {
        text.sample(&[("role", role)], restarts);
    }
    text.family("gaia_processes_died", Kind::Counter, "Workers and keepers that ended as they should not");
    for kind in ["worker", "keeper"] {
        text.sample(&[("role", kind)], past.ended.get(kind).copied().unwrap_or(0));
    }
    text.alone("gaia_requests_lost", Kind::Counter, "Requests that ended with their worker", past.lost);

    for (at, family) in WORKER.iter().enumerate() {
        text.family(family.name, family.kind, family.help);
        text.counted(&[], family.nanos, now.workers[at] + past.workers[at]);
    }
    text.family("gaia_own_answers", Kind::Counter, "Answers that the runtime gave itself, by status");
    for (at, status) in OWN_STATUSES.iter().enumerate() {
        text.sample(&[("status", &status.to_string())], now.own[at] + past.own[at]);
    }
    text.family("gaia_brane_replicas", Kind::Gauge, "Instances that the brane may have");
    for brane in plan.iter().flat_map(|plan| &plan.branes) {
        text.sample(&[("brane", &brane.name)], brane.replicas);
    }
    for (at, family) in NOW.iter().enumerate() {
        text.family(family.name, family.kind, family.help);
        for work in &works {
            text.counted(&[("brane", &work.name)], family.nanos, rows.get(&work.name).map_or(0, |row| row[at]));
        }
    }
    for family in &BRANE {
        text.family(family.name, family.kind, family.help);
        for work in &works {
            text.counted(&[("brane", &work.name)], family.nanos, (family.of)(work));
        }
    }
    for spread in &SPREADS {
        text.family(spread.name, Kind::Histogram, spread.help);
        for work in &works {
            text.spread(&work.name, &(spread.of)(work).0, spread);
        }
    }
    text.finished()
}

/// Whether a request would rather have `OpenMetrics` (RFC 9110, section 12.5.1): what is not named is not wanted.
fn wants_open_metrics(headers: &HeaderMap) -> bool {
    let mut best = [0.0_f64; 2];
    for accept in headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()) {
        for one in accept.split(',') {
            let mut parts = one.split(';').map(str::trim);
            let at = match parts.next() {
                Some("application/openmetrics-text") => 0,
                Some("text/plain" | "text/*" | "*/*") => 1,
                _ => continue,
            };
            let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse().ok()).unwrap_or(1.0);
            best[at] = f64::max(best[at], weight);
        }
    }
    best[0] > 0.0 && best[0] >= best[1]
}

fn content_type(open_metrics: bool) -> HeaderValue {
    HeaderValue::from_static(if open_metrics {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        "text/plain; version=0.0.4; charset=utf-8"
    })
}

/// `GET /metrics`
pub(super) async fn answer(control: &Control, headers: &HeaderMap) -> Response<Full<Bytes>> {
    let open_metrics = wants_open_metrics(headers);
    let mut answer = Response::new(Full::new(Bytes::from(text(control, open_metrics).await)));
    answer.headers_mut().insert(header::CONTENT_TYPE, content_type(open_metrics));
    answer
}

// The port.

/// The networks that the supervisor names, parted by spaces; none of them is everybody. What is none is passed over: whoever wrote it
/// was told.
pub(super) fn allowed_of(variable: &str) -> Vec<Prefix> {
    variable.split(' ').filter_map(|word| word.parse().ok()).collect()
}

fn may_ask(allowed: &[Prefix], from: IpAddr) -> bool {
    allowed.is_empty() || allowed.iter().any(|prefix| prefix.covers(from))
}

/// Serves metrics and nothing else on these sockets, until the process ends.
pub(super) async fn serve(control: Rc<Control>, sockets: Vec<(String, OwnedFd)>, allowed: Vec<Prefix>) {
    let door = Rc::new(Door {
        allowed,
        places: Arc::new(Semaphore::new(CONNECTIONS)),
        arrivals: Pace::new(ARRIVALS, Instant::now()).into(),
        answers: Pace::new(ANSWERS, Instant::now()).into(),
    });
    for (name, socket) in sockets {
        let listener = std::net::TcpListener::from(socket);
        match listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)) {
            Ok(listener) => {
                let port = listener.local_addr().map_or(0, |at| at.port());
                control.note(&format!("metrics on port {port}"));
                tokio::task::spawn_local(Rc::clone(&door).accept(Rc::clone(&control), listener));
            }
            Err(e) => control.say(&format!("no metrics on {name}: {e}")).await,
        }
    }
}

/// The door for whoever collects metrics.
struct Door {
    allowed: Vec<Prefix>,
    places: Arc<Semaphore>,
    arrivals: std::cell::RefCell<Pace>,
    answers: std::cell::RefCell<Pace>,
}

impl Door {
    async fn accept(self: Rc<Self>, control: Rc<Control>, listener: TcpListener) {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
            let taken = self.arrivals.borrow_mut().take(Instant::now());
            if let Err(wait) = taken {
                tokio::time::sleep(wait).await;
            }
            match listener.accept().await {
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Ok((stream, from)) => {
                    let (door, control) = (Rc::clone(&self), Rc::clone(&control));
                    tokio::task::spawn_local(async move {
                        door.meet(control, stream, from).await;
                        drop(place);
                    });
                }
            }
        }
    }

    async fn meet(self: Rc<Self>, control: Rc<Control>, stream: TcpStream, from: SocketAddr) {
        if !may_ask(&self.allowed, from.ip()) {
            return control.refused(&format!("{} metrics: metrics.allow does not name it", from.ip())).await;
        }
        let service = hyper::service::service_fn(|request| {
            let (door, control) = (Rc::clone(&self), Rc::clone(&control));
            async move { Ok::<_, Infallible>(door.answer(&control, &request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(16 * 1024)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        if timeout(LASTS.0, connection.as_mut()).await.is_err() {
            connection.as_mut().graceful_shutdown();
            let _ = timeout(LASTS.1, connection).await;
        }
    }

    async fn answer(&self, control: &Control, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let refused = |status, words: &'static str| {
            let mut answer = Response::new(Full::new(Bytes::from_static(words.as_bytes())));
            *answer.status_mut() = status;
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            answer
        };
        if request.uri().path() != PATH {
            return refused(StatusCode::NOT_FOUND, "here is /metrics, and nothing else\n");
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return refused(StatusCode::METHOD_NOT_ALLOWED, "GET shows them\n");
        }
        if self.answers.borrow_mut().take(Instant::now()).is_err() {
            let mut answer = refused(StatusCode::TOO_MANY_REQUESTS, "more often than anybody needs\n");
            answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            return answer;
        }
        self::answer(control, request.headers()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_family_is_called_as_each_form_has_it() {
        let written = |open_metrics| {
            let mut text = Text::new(open_metrics);
            text.family("gaia_build", Kind::Info, "What runs");
            text.sample(&[("version", "1\"\\\n"), ("kernel", "6")], 1);
            text.family("gaia_x_seconds", Kind::Counter, "Time");
            text.counted(&[("brane", "fetch")], true, 1_500_000_000);
            text.alone("gaia_y", Kind::Gauge, "Some", 7);
            text.finished()
        };
        assert_eq!(
            written(true),
            "# TYPE gaia_build info\n# HELP gaia_build What runs\ngaia_build_info{version=\"1\\\"\\\\\\n\",kernel=\"6\"} 1\n\
             # TYPE gaia_x_seconds counter\n# UNIT gaia_x_seconds seconds\n# HELP gaia_x_seconds Time\n\
             gaia_x_seconds_total{brane=\"fetch\"} 1.5\n# TYPE gaia_y gauge\n# HELP gaia_y Some\ngaia_y 7\n# EOF\n"
        );
        assert_eq!(
            written(false),
            "# TYPE gaia_build_info gauge\n# HELP gaia_build_info What runs\n\
             gaia_build_info{version=\"1\\\"\\\\\\n\",kernel=\"6\"} 1\n\
             # TYPE gaia_x_seconds_total counter\n# HELP gaia_x_seconds_total Time\n\
             gaia_x_seconds_total{brane=\"fetch\"} 1.5\n# TYPE gaia_y gauge\n# HELP gaia_y Some\ngaia_y 7\n"
        );
    }

    #[test]
    fn a_distribution_is_told_by_bounds_its_sum_and_its_count() {
        assert_eq!((TIMES[0], TIMES[1], TIMES[2], TIMES[3], TIMES[21]), (1_000, 2_000, 5_000, 10_000, 10_000_000_000));
        let mut text = Text::new(false);
        let spread = Spread { bounds: &[1_000, 1_000_000_000], ..times("gaia_x_seconds", "Time", |w| &w.exec) };
        text.family(spread.name, Kind::Histogram, spread.help);
        let told = r#"{"count":4,"sum":3500000500,"max":3000000000,"buckets":[[500,1],[250000000,2],[3000000000,1]]}"#;
        let of: Distribution = serde_json::from_str(told).unwrap();
        text.spread("fetch", &of.0, &spread);
        assert_eq!(
            text.finished(),
            "# TYPE gaia_x_seconds histogram\n# HELP gaia_x_seconds Time\n\
             gaia_x_seconds_bucket{brane=\"fetch\",le=\"0.000001\"} 1\n\
             gaia_x_seconds_bucket{brane=\"fetch\",le=\"1.0\"} 3\n\
             gaia_x_seconds_bucket{brane=\"fetch\",le=\"+Inf\"} 4\n\
             gaia_x_seconds_sum{brane=\"fetch\"} 3.5000005\ngaia_x_seconds_count{brane=\"fetch\"} 4\n"
        );
    }

    #[test]
    fn names_are_those_that_promtool_has_nothing_against() {
        let all = BRANE.iter().map(|f| (f.name, f.help)).chain(NOW.iter().map(|f| (f.name, f.help)));
        let all = all.chain(WORKER.iter().map(|f| (f.name, f.help))).chain(SPREADS.iter().map(|s| (s.name, s.help)));
        let mut names: Vec<&str> = all.clone().map(|(name, _)| name).collect();
        for (name, help) in all {
            assert!(name.starts_with("gaia_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            assert!(
                !name.ends_with("_total") && !help.is_empty() && !help.ends_with('.'),
                "{name} is called so by the form"
            );
        }
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn open_metrics_is_for_who_would_rather_have_it() {
        let wants = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            wants_open_metrics(&headers)
        };
        // As Prometheus 2 and 3 ask.
        assert!(wants(
            "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
        ));
        assert!(wants("application/openmetrics-text; version=1.0.0"));
        for other in [
            "*/*",
            "text/plain",
            "application/openmetrics-text;q=0",
            "text/plain, application/openmetrics-text;q=0.5",
            "",
        ] {
            assert!(!wants(other), "{other}");
        }
        assert!(!wants_open_metrics(&HeaderMap::new()));
    }

    #[test]
    fn whoever_is_not_named_may_not_ask_where_anybody_is() {
        let allowed = allowed_of("192.0.2.0/24 2001:db8::/32 nonsense");
        for (from, may) in [("192.0.2.9", true), ("192.0.3.9", false), ("2001:db8:1::9", true), ("2001:db9::9", false)]
        {
            assert_eq!(may_ask(&allowed, from.parse().unwrap()), may, "{from}");
            assert!(may_ask(&[], from.parse().unwrap()));
        }
    }

    proptest! {
        #[test]
        fn any_accept_is_read(accept in "([a-z/*]{0,30}(;q=[0-9.]{0,4})?,?){0,5}") {
            let mut headers = HeaderMap::new();
            if let Ok(value) = accept.parse() {
                headers.insert(header::ACCEPT, value);
            }
            let _ = wants_open_metrics(&headers);
        }
    }
}
