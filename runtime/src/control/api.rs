//! The API: HTTP/1.1 and JSON, the same over a Unix socket and over the network. Who may connect to the one is the socket
//! file's business, to the other the keys'; from there on each request knows its [`Caller`].
//!
//! | method and path    | answer              |
//! |--------------------|---------------------|
//! | `GET /v1/status`   | [`report::Status`]  |
//! | `GET /v1/ps`       | [`report::Ps`]      |
//! | `GET /v1/logs`     | [`report::Line`], one a line; `?brane=fetch&kind=REQ&since_ns=0&follow=true`, all of [`log::Query`] |
//! | `GET /v1/profile`  | [`report::Profile`]; `?brane=fetch` or `?instance=counter.001` |
//! | `GET /v1/profile/stacks` | [`report::Samples`], likewise |
//! | `GET /v1/graphs`   | [`report::Graphs`]  |
//! | `GET /v1/components/DIGEST` | [`report::Done`], or 404 |
//! | `POST /v1/components` | [`report::Pushed`]; the body is the component, `?name=REFERENCE&digest=DIGEST` |
//! | `POST /v1/plan`    | [`report::Step`], one a line; the body is [`report::Deploy`], nothing is changed |
//! | `POST /v1/deploy`  | the same, and it serves |
//! | `POST /v1/rollback`| the same; the body is [`report::Rollback`] |
//! | `GET /v1/secrets`  | [`report::Secrets`], without values; `?brane=fetch` |
//! | `POST /v1/secrets` | [`report::Step`], one a line; the body is [`report::SetSecret`] |
//! | `POST /v1/secrets/remove` | the same; the body is [`report::RemoveSecret`] |
//! | `GET /metrics`     | what is counted: see `metrics` |
//! | `POST /v1/poweroff`| [`report::Done`]    |
//! | `POST /v1/reboot`  | [`report::Done`]    |
//!
//! Anything else is 404 or 405 with [`report::Failed`]. Whatever is not a `GET` is a change, and leaves a line in the log that
//! says who asked, for what, and what came of it.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::LocalBoxStream;
use gaia_init::wire::FromControl;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{Either, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::caller::Caller;
use super::delivery;
use super::log::{self, Place, Query};
use super::remote::Visit;
use super::report::{self, Done, Failed, Ps, Status};
use super::{Control, Runs, metrics, secrets};
use crate::client::SERVER;
use crate::statistics;

/// Conversations at a time.
const CONNECTIONS: usize = 16;
/// A conversation is over when nothing was asked for so long.
const IDLE: Duration = Duration::from_secs(10);

/// Before a component's digest.
const COMPONENTS: &str = "/v1/components/";

/// What goes out: one piece, or lines as they come.
pub(super) type Answer =
    Response<Either<Full<Bytes>, StreamBody<LocalBoxStream<'static, Result<Frame<Bytes>, Infallible>>>>>;

/// What came of a change, in an answer's extensions: for the log, where the status alone does not tell.
#[derive(Debug, Clone)]
pub(super) struct Outcome(pub(super) String);

/// Serves the API on the socket init opened, until the process ends.
pub(super) async fn serve(control: Rc<Control>, socket: OwnedFd) {
    let listener = std::os::unix::net::UnixListener::from(socket);
    let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
    let listener = match listener {
        Ok(listener) => listener,
        Err(e) => return control.say(&format!("no API: {e}")).await,
    };
    let places = std::sync::Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            Ok((stream, _)) => {
                let caller = Rc::new(Caller::Local { user: stream.peer_cred().ok().map(|who| who.uid()) });
                let control = Rc::clone(&control);
                tokio::task::spawn_local(async move {
                    let _ = converse(control, caller, None, stream).await;
                    drop(place);
                });
            }
        }
    }
}

/// Serves the API on one connection, until it ends. Who comes over the network has a bound on its requests.
///
/// # Errors
/// If what comes is no HTTP/1.1, or too slow.
pub(super) async fn converse(
    control: Rc<Control>,
    caller: Rc<Caller>,
    visit: Option<Rc<Visit>>,
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
) -> hyper::Result<()> {
    let service = hyper::service::service_fn(|request| {
        let (control, caller, visit) = (Rc::clone(&control), Rc::clone(&caller), visit.clone());
        async move {
            if let Some(why) = visit.and_then(|visit| visit.too_much()) {
                control.refused(&format!("{caller}: {why}")).await;
                let mut answer = failed(StatusCode::TOO_MANY_REQUESTS, &why);
                answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
                answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                return Ok(answer);
            }
            let mut answer = audited(control, caller, request).await;
            if let Ok(answer) = &mut answer {
                // So that one of another version knows why it does not understand.
                answer.headers_mut().insert(header::SERVER, HeaderValue::from_static(SERVER));
            }
            answer
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    connection.await
}

/// Answers, and leaves a line in the log if that was to change something.
async fn audited(control: Rc<Control>, caller: Rc<Caller>, request: Request<Incoming>) -> Result<Answer, Infallible> {
    let what = || format!("{:.16} {:.200}", request.method().as_str(), request.uri().path());
    let change = (!request.method().is_safe()).then(what);
    let answer = answer(Rc::clone(&control), Rc::clone(&caller), request).await;
    if let Some(what) = change {
        let status = answer.status();
        let outcome = answer.extensions().get().map(|Outcome(words)| format!("{}: {words}", status.as_u16()));
        control.audit(&caller, &what, &outcome.unwrap_or_else(|| status.to_string())).await;
    }
    Ok(answer)
}

/// The one place where a method and a path become what is done. Who asks for it may do all of it.
async fn answer(control: Rc<Control>, caller: Rc<Caller>, request: Request<Incoming>) -> Answer {
    control.init.catch_up(&control);
    match (request.method(), request.uri().path()) {
        (&Method::POST, "/v1/components") => return delivery::push(&control, &caller, request).await,
        (&Method::POST, "/v1/plan") => return delivery::deploy(control, caller, request, false).await,
        (&Method::POST, "/v1/deploy") => return delivery::deploy(control, caller, request, true).await,
        (&Method::POST, "/v1/rollback") => return delivery::rollback(control, caller, request).await,
        (&Method::POST, "/v1/secrets") => return secrets::set(control, caller, request).await,
        (&Method::POST, "/v1/secrets/remove") => return secrets::remove(control, caller, request).await,
        _ => {}
    }
    let known = |path: &str| {
        let exact = matches!(path, "/v1/status" | "/v1/ps" | "/v1/logs" | "/v1/graphs" | "/v1/poweroff" | "/v1/reboot")
            || matches!(path, "/v1/profile" | "/v1/profile/stacks");
        let changes = matches!(path, metrics::PATH | "/v1/components" | "/v1/plan" | "/v1/deploy" | "/v1/rollback")
            || matches!(path, "/v1/secrets" | "/v1/secrets/remove");
        exact || changes || path.starts_with(COMPONENTS)
    };
    // None of these takes a body. What is sent nevertheless is not read, and ends the connection.
    if known(request.uri().path()) && !request.body().is_end_stream() {
        return failed(StatusCode::PAYLOAD_TOO_LARGE, &format!("{} takes no body", request.uri().path()));
    }
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/v1/status") => match status(&control).await {
            Ok(status) => json(StatusCode::OK, &status),
            Err(e) => failed(StatusCode::SERVICE_UNAVAILABLE, &format!("init does not answer: {e}")),
        },
        (&Method::GET, "/v1/graphs") => delivery::graphs(&control),
        (&Method::GET, metrics::PATH) => metrics::answer(&control, request.headers()).await.map(Either::Left),
        (&Method::GET, "/v1/secrets") => secrets::list(&control, request.uri().query().unwrap_or_default()).await,
        (&Method::GET, path) if path.starts_with(COMPONENTS) => {
            delivery::has(&control, path.strip_prefix(COMPONENTS).unwrap_or_default())
        }
        (&Method::GET, "/v1/ps") => json(StatusCode::OK, &ps(&control).await),
        (&Method::GET, "/v1/profile") => control.profile(request.uri().query().unwrap_or_default()),
        (&Method::GET, "/v1/profile/stacks") => control.stacks(request.uri().query().unwrap_or_default()),
        (&Method::GET, "/v1/logs") => match Query::parse(request.uri().query().unwrap_or_default()) {
            Ok(query) => logs(control, query),
            Err(wrong) => failed(StatusCode::BAD_REQUEST, &wrong),
        },
        (&Method::POST, "/v1/poweroff") => end(&control, FromControl::PowerOff, "the appliance switches off").await,
        (&Method::POST, "/v1/reboot") => end(&control, FromControl::Reboot, "the appliance starts again").await,
        (_, path) if known(path) => failed(StatusCode::METHOD_NOT_ALLOWED, "GET shows, POST changes"),
        (_, path) => failed(StatusCode::NOT_FOUND, &format!("there is no {path:?} in version 1 of this API")),
    }
}

fn logs(control: Rc<Control>, query: Query) -> Answer {
    if let Some(unknown) = control.unknown_brane(&query) {
        return failed(StatusCode::NOT_FOUND, &unknown);
    }
    let (place, lines) = log::lines(control, query);
    let mut answer = Response::new(Either::Right(StreamBody::new(lines.boxed_local())));
    let place = HeaderValue::try_from(place.to_string());
    answer.headers_mut().extend(place.ok().map(|place| (HeaderName::from_static(Place::FIELD), place)));
    answer
}

pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut answer = Response::new(Either::Left(Full::new(Bytes::from(body))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

pub(super) fn failed(status: StatusCode, error: &str) -> Answer {
    let mut answer = json(status, &Failed { error: error.to_owned() });
    answer.extensions_mut().insert(Outcome(error.to_owned()));
    answer
}

async fn end(control: &Control, how: FromControl, words: &str) -> Answer {
    control.init.tell(&how, &[]).await;
    json(StatusCode::ACCEPTED, &Done { done: words.to_owned() })
}

async fn status(control: &Control) -> anyhow::Result<Status> {
    let (roles, cores) = tokio::join!(control.init.roles(), control.init.given());
    let mut roles = roles?;
    // Who started when says nothing: init first, then by name.
    roles.sort_by(|a, b| (a.name != "init", &a.name).cmp(&(b.name != "init", &b.name)));
    let worker = |w: &Rc<super::Worker>| {
        let counters = &w.statistics.worker;
        w.runs.core().map(|core| report::Worker {
            core,
            pid: w.pid,
            generation: w.generation,
            accepted: counters.accepted.load(Relaxed),
            open: counters.open.load(Relaxed),
            requests: counters.requests.load(Relaxed),
            inside: counters.inside.load(Relaxed),
            output_bytes: counters.output.load(Relaxed),
            dropped: control.dropped(w),
        })
    };
    let mut workers: Vec<_> = control.workers.borrow().iter().filter_map(worker).collect();
    workers.sort_by_key(|w| (w.generation, w.core));
    let plan = control.plan.borrow().clone();
    let uname = rustix::system::uname();
    let uptime = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Ok(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: format!("{} {}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy()),
        key: control.device.public().to_string(),
        uptime_s: Duration::new(uptime.tv_sec.cast_unsigned(), u32::try_from(uptime.tv_nsec).unwrap_or(0))
            .as_secs_f64(),
        generation: plan.as_ref().map(|p| p.generation),
        branes: plan.as_ref().map_or(0, |p| p.branes.len()),
        roles,
        requests: control.requests(),
        lost: control.counted.borrow().lost,
        workers,
        memory: memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        cores: cores.ok(),
        words: control.words.borrow().clone(),
        export: control.exported.borrow().clone(),
    })
}

/// Reads the two figures out of `/proc/meminfo`; what is not there is 0.
pub(super) fn memory(meminfo: &str) -> report::Memory {
    let value = |name: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    report::Memory { total_kib: value("MemTotal"), available_kib: value("MemAvailable") }
}

async fn ps(control: &Control) -> Ps {
    let plan = control.plan.borrow().clone();
    let (instances, silent) = control.instances().await;
    let branes = plan.iter().flat_map(|plan| plan.branes.iter().enumerate().map(move |(i, b)| (plan.generation, i, b)));
    let branes = branes.map(|(generation, index, brane)| {
        let workers = control.workers.borrow();
        let row = |w: &Rc<super::Worker>| match &w.runs {
            Runs::Branes { .. } => (w.generation == generation).then_some(index),
            // In its own page it is the only one.
            Runs::Kept { name, identity, .. } => {
                (*name == brane.name && Some(identity) == brane.keeper.as_ref()).then_some(0)
            }
        };
        let sum = |of: fn(&statistics::Brane) -> &AtomicU64| -> u64 {
            let rows = workers.iter().filter_map(|w| w.statistics.branes.get(row(w)?));
            rows.map(|row| of(row).load(Relaxed)).sum()
        };
        let made = sum(|b| &b.instances);
        report::Brane {
            name: brane.name.clone(),
            image: brane.image.clone(),
            digest: brane.digest.clone(),
            route: format!("{}{}", brane.host.as_deref().unwrap_or_default(), brane.path),
            replicas: brane.replicas,
            busy: sum(|b| &b.busy),
            ready: sum(|b| &b.ready),
            waiting: sum(|b| &b.waiting),
            requests: sum(|b| &b.requests),
            traps: sum(|b| &b.traps),
            late: sum(|b| &b.late),
            refused: sum(|b| &b.refused),
            killed: sum(|b| &b.killed),
            throttled_ns: sum(|b| &b.throttled_ns),
            cold_mean_ns: sum(|b| &b.cold_ns).checked_div(made).unwrap_or(0),
        }
    });
    Ps { branes: branes.collect(), instances, silent }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        let m = memory("MemTotal:         486312 kB\nMemFree:          1 kB\nMemAvailable:     440000 kB\n");
        assert_eq!((m.total_kib, m.available_kib), (486_312, 440_000));
    }

    proptest! {
        #[test]
        fn any_text_is_memory_or_zero(text in "\\PC{0,200}") {
            let _ = memory(&text);
        }
    }
}
