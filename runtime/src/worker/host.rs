//! What one instance has on the host's side: its store's data.

use std::any::Any;
use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use gaia_manifest::Resolution;
use gaia_tmpfs::{Limits, Reaper, Tmp, Unlimited};
use http::HeaderMap;
use wasmtime::ResourceLimiter;
use wasmtime::component::{HasData, ResourceTable};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi::random::WasiRandomCtx;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::p2::bindings::http::types::{Method, Scheme};
use wasmtime_wasi_http::p2::types::{HostOutgoingRequest, HostOutgoingResponse};
use wasmtime_wasi_http::{FieldMap, WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use super::memory::{ALWAYS, Held, Pressure};
use super::turns::Turns;
use crate::capability::http::Requests;
use crate::capability::{Granted, Instance, Network, clock, sockets, tmp};
use crate::log::{Event, Log, MAX_TEXT, Stream, Subject};
use crate::plan::Plan;
use crate::statistics::Profiles;

/// Handles an instance may hold at a time, on the host's side and on its own.
pub const HANDLES: usize = 1024;
/// What one set of headers may take on the host, in bytes.
const HEADERS: usize = 64 * 1024;
/// What a guest may write to a body at a time, in bytes; the host holds up to two such pieces of each body.
pub const BODY_PIECE: usize = 64 * 1024;
/// What the host holds for an instance without charging it, in bytes: a request and its answer, with bodies on their way.
const FREE: usize = 1 << 20;
/// After so many calls about HTTP it is reckoned anew what the host holds. A request and its answer take about ten. Between two
/// reckonings a guest can have no more than so many times what a call may move.
const RECKONED_EACH: u32 = 16;
/// What a handle costs besides what it holds, in bytes: table entries on both sides, and the object behind it.
const HANDLE: usize = 256;
/// What a header costs besides its name and value: places in the map and, of each, an allocation (http, `HeaderMap`).
const HEADER: usize = 256;

/// What the host holds behind a handle, in bytes, as far as a guest decides how much that is. What comes from outside is
/// bounded where it comes in; files count against their quota.
fn held_behind(entry: &dyn Any) -> usize {
    let headers =
        |map: &FieldMap| map.iter().map(|(name, value)| HEADER + name.as_str().len() + value.len()).sum::<usize>();
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let body = |there: bool| if there { 2 * BODY_PIECE } else { 0 };
    let more = if let Some(fields) = entry.downcast_ref::<FieldMap>() {
        headers(fields)
    } else if let Some(response) = entry.downcast_ref::<HostOutgoingResponse>() {
        headers(&response.headers) + body(response.body.is_some())
    } else if let Some(request) = entry.downcast_ref::<HostOutgoingRequest>() {
        let method = if let Method::Other(method) = &request.method { method.len() } else { 0 };
        let scheme = if let Some(Scheme::Other(scheme)) = &request.scheme { scheme.len() } else { 0 };
        let target = text(&request.authority) + text(&request.path_with_query);
        headers(&request.headers) + body(request.body.is_some()) + method + scheme + target
    } else {
        0
    };
    HANDLE + more
}

/// The data of one instance's store.
pub struct Host {
    wasi: WasiCtx,
    http: WasiHttpCtx,
    table: ResourceTable,
    requests: Requests,
    /// What its names and sockets lead to.
    reach: sockets::Reach,
    instance: Arc<Instance>,
    /// What its clocks are rounded to, if it has any.
    step: Resolution,
    /// When it was made.
    since: Instant,
    /// Its file system, if it has one.
    files: Option<Files>,
    /// Calls about HTTP.
    calls: u32,
    /// Its memory, bounded.
    pub memory: Memory,
    /// The tick at which it lets others run for the first time. One before that only tells where it is.
    pub runs_until: u64,
}

/// An instance's file system and its files' clock.
struct Files {
    tmp: Tmp,
    clock: tmp::Clock,
}

/// What a worker has for all its branes.
pub struct Means {
    /// What instances' file systems held, on its way back to the kernel.
    pub reaper: Reaper,
    /// A task is at it.
    pub reaping: Cell<bool>,
    /// The way out, if a brane is granted one.
    pub network: Option<Network>,
    /// The order of guests' turns.
    pub turns: Turns,
    /// How much memory is left.
    pub pressure: Arc<Pressure>,
    /// What the slots of each brane may keep between requests, in bytes.
    pub kept_of_each: u64,
    /// Where it is counted how long and how large guests' work is; nothing where nobody wants to know.
    pub profiles: Option<Arc<Profiles>>,
}

/// Chunks of 64 KiB that a worker keeps, zeroed, for the next file system.
const SPARE_CHUNKS: usize = 16;

impl Default for Means {
    fn default() -> Self {
        let pressure = Arc::<Pressure>::default();
        let reaper = Reaper::new(Arc::<Pressure>::clone(&pressure), SPARE_CHUNKS);
        Self {
            reaper,
            reaping: Cell::new(false),
            turns: Turns::default(),
            pressure,
            network: None,
            kept_of_each: 0,
            profiles: None,
        }
    }
}

impl Means {
    /// For the branes of this plan, the slots of each of which may keep so many bytes.
    ///
    /// # Errors
    /// As [`Network::of`].
    pub fn of(plan: &Plan, kept_of_each: u64) -> anyhow::Result<Self> {
        Ok(Self { network: Network::of(plan)?, kept_of_each, ..Self::default() })
    }
}

/// Marks the `wasi:io` interfaces, which need the table of resources alone.
pub struct Io;

impl HasData for Io {
    type Data<'a> = &'a mut ResourceTable;
}

impl Host {
    /// The host's side of a fresh instance with `mem_max` bytes to grow into, whose lines are `subject`'s; what it is granted
    /// is told to `held`.
    #[must_use]
    pub fn new(
        mem_max: u64,
        granted: &Granted,
        means: &Means,
        log: &Arc<Log>,
        subject: Subject,
        held: Arc<Held>,
    ) -> Self {
        let voice = Arc::new(Voice { log: Arc::clone(log), subject, begun: Default::default() });
        let output = |stream| Output { voice: Arc::clone(&voice), stream };
        let instance = Arc::new(Instance::new(Arc::clone(log), subject));
        let wasi = granted.instance().stdout(output(Stream::Out)).stderr(output(Stream::Err)).build();
        let mut table = ResourceTable::new();
        table.set_max_capacity(HANDLES);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(HEADERS);
        let step = granted.clock.unwrap_or(Resolution::Seconds);
        let files = |limits| Files { tmp: Tmp::new(limits, &means.reaper), clock: tmp::clock(granted.clock) };
        Self {
            wasi,
            http,
            table,
            requests: Requests::new(granted.egress.clone(), Arc::clone(&instance)),
            reach: granted.reach.clone(),
            instance,
            step,
            since: Instant::now(),
            files: granted.tmp.map(files),
            calls: 0,
            memory: Memory::new(mem_max, held, Arc::clone(&means.pressure)),
            runs_until: 0,
        }
    }

    /// The table of resources.
    pub fn table(&mut self) -> &mut ResourceTable {
        &mut self.table
    }

    /// Its clocks; linked only where they are granted.
    pub fn clocks(&mut self) -> clock::View<'_> {
        clock::View { table: &mut self.table, step: self.step, since: self.since }
    }

    /// Its file system; linked only where one is granted.
    pub fn tmp(&mut self) -> tmp::TmpView<'_> {
        let nothing = || Files {
            tmp: Tmp::new(Limits::of_quota(0), &Reaper::new(Arc::new(Unlimited), 0)),
            clock: tmp::clock(None),
        };
        let Files { tmp, clock } = self.files.get_or_insert_with(nothing);
        // What the last call has changed.
        self.memory.held.files.store(tmp.held_bytes(), Ordering::Relaxed);
        tmp::TmpView { table: &mut self.table, tmp, clock }
    }

    /// Empties its file system: what a request leaves there.
    pub fn empty_files(&mut self) {
        if let Some(Files { tmp, clock }) = &self.files {
            tmp.clear(clock());
            self.memory.held.files.store(tmp.held_bytes(), Ordering::Relaxed);
        }
    }

    /// Its names and sockets; linked only where they are granted.
    pub fn reach(&mut self) -> sockets::View<'_> {
        sockets::View { table: &mut self.table, reach: &self.reach, instance: &self.instance }
    }

    /// A request with these headers is about to be served: what the guest sends meanwhile belongs to the same trace.
    pub fn begins(&mut self, headers: &HeaderMap) {
        self.requests.follow(headers);
    }

    /// Charges what the host holds. Beyond its bound an instance ends, at its next tick or when it wants another handle.
    fn reckon(&mut self) {
        let holds = self.table.iter_mut().map(|entry| held_behind(entry)).sum::<usize>();
        if !self.memory.charge(holds.saturating_sub(FREE)) {
            self.table.set_max_capacity(0);
        }
    }

    /// Sources of randomness; only the insecure ones are linked without a grant.
    pub fn random(&mut self) -> &mut WasiRandomCtx {
        self.wasi.random()
    }
}

impl WasiView for Host {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for Host {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        self.calls = self.calls.wrapping_add(1);
        if self.calls.is_multiple_of(RECKONED_EACH) {
            self.reckon();
        }
        WasiHttpCtxView { hooks: &mut self.requests, table: &mut self.table, ctx: &mut self.http }
    }
}

/// Bounds all memories and tables of an instance together: the runtime's own limiter looks at each alone.
///
/// Wasmtime asks first and may fail afterwards, on the pool's own limits. It then says so, but not only then: a failure
/// that was never asked about is told the same way. What is given back is therefore what was granted last, once.
#[derive(Debug)]
pub struct Memory {
    used: usize,
    most: usize,
    granted: usize,
    /// What the host holds, as far as that is charged.
    host: usize,
    /// Where others see what is used.
    held: Arc<Held>,
    pressure: Arc<Pressure>,
}

/// Bytes of one table element on the host.
const ELEMENT: usize = size_of::<usize>();

impl Memory {
    fn new(most: u64, held: Arc<Held>, pressure: Arc<Pressure>) -> Self {
        Self { used: 0, most: usize::try_from(most).unwrap_or(usize::MAX), granted: 0, host: 0, held, pressure }
    }

    /// `maximum` is what the module itself declares: beyond it Wasmtime refuses, so nothing may be counted.
    fn grow(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> bool {
        self.granted = 0;
        if maximum.is_some_and(|maximum| desired > maximum) {
            return false;
        }
        let more = desired.saturating_sub(current);
        // What it starts with it gets: a start that fails is a fault, a growth that is refused is not.
        let due = |used: usize| current == 0 || used <= ALWAYS || self.pressure.grant(more as u64);
        match self.used.checked_add(more) {
            Some(used) if used.saturating_add(self.host) <= self.most && due(used) => {
                (self.used, self.granted) = (used, more);
                self.tell();
                true
            }
            _ => false,
        }
    }

    fn failed(&mut self) {
        self.used -= std::mem::take(&mut self.granted);
        self.tell();
    }

    /// Charges what the host holds now; false, and the instance ends, if that is too much together.
    fn charge(&mut self, host: usize) -> bool {
        self.host = host;
        self.tell();
        let fits = self.used.saturating_add(host) <= self.most;
        if !fits {
            self.held.end_as_too_much();
        }
        fits
    }

    fn tell(&self) {
        self.held.memory.store(self.used.saturating_add(self.host) as u64, Ordering::Relaxed);
    }
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(self.grow(current, desired, maximum))
    }

    fn memory_grow_failed(&mut self, _: wasmtime::Error) -> wasmtime::Result<()> {
        self.failed();
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        let bytes = |elements: usize| elements.saturating_mul(ELEMENT);
        Ok(self.grow(bytes(current), bytes(desired), maximum.map(bytes)))
    }

    fn table_grow_failed(&mut self, _: wasmtime::Error) -> wasmtime::Result<()> {
        self.failed();
        Ok(())
    }
}

/// What an instance says on its two streams, line by line into the log.
struct Voice {
    log: Arc<Log>,
    subject: Subject,
    /// Of each stream, what has not ended in a line break yet. Empty until the guest writes.
    begun: [Mutex<Vec<u8>>; 2],
}

/// One of an instance's streams. It takes everything at once: what the log has no room for is counted there.
#[derive(Clone)]
struct Output {
    voice: Arc<Voice>,
    stream: Stream,
}

/// What a guest may write at a time, in bytes.
const CHUNK: usize = 64 * 1024;

impl Voice {
    fn say(&self, stream: Stream, mut bytes: &[u8]) {
        self.log.page().worker.output.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut begun = self.begun(stream);
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            self.extend(stream, &mut begun, &bytes[..end]);
            self.line(stream, &begun);
            begun.clear();
            bytes = &bytes[end + 1..];
        }
        self.extend(stream, &mut begun, bytes);
    }

    /// Adds to a line, and begins another where it gets longer than a record's text.
    fn extend(&self, stream: Stream, begun: &mut Vec<u8>, bytes: &[u8]) {
        let mut rest = bytes;
        while begun.len() + rest.len() > MAX_TEXT {
            let (piece, more) = rest.split_at(MAX_TEXT - begun.len());
            begun.extend_from_slice(piece);
            self.line(stream, begun);
            begun.clear();
            rest = more;
        }
        begun.extend_from_slice(rest);
    }

    fn line(&self, stream: Stream, bytes: &[u8]) {
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        self.log.write(self.subject, &Event::Log { stream, text: String::from_utf8_lossy(bytes) });
    }

    fn begun(&self, stream: Stream) -> MutexGuard<'_, Vec<u8>> {
        let [out, err] = &self.begun;
        let begun = if stream == Stream::Out { out } else { err };
        begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Voice {
    fn drop(&mut self) {
        for stream in [Stream::Out, Stream::Err] {
            let begun = std::mem::take(&mut *self.begun(stream));
            if !begun.is_empty() {
                self.line(stream, &begun);
            }
        }
    }
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Output {
    fn async_stream(&self) -> Box<dyn tokio::io::AsyncWrite + Send + Sync> {
        // Only WASI 0.3 asks for this one.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.voice.say(self.stream, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(CHUNK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn memory(most: u64) -> Memory {
        Memory::new(most, Arc::default(), Arc::default())
    }

    fn failure() -> wasmtime::Error {
        wasmtime::format_err!("no room in the pool")
    }

    #[test]
    fn memories_and_tables_count_together() {
        let mut memory = memory(3 << 16);
        assert!(memory.memory_growing(0, 2 << 16, None).unwrap());
        assert!(memory.memory_growing(0, 1 << 16, None).unwrap(), "a second memory fits exactly");
        assert!(!memory.table_growing(0, 1, None).unwrap(), "a table of one element does not");
        assert!(!memory.memory_growing(2 << 16, usize::MAX, None).unwrap());
    }

    #[test]
    fn what_was_granted_and_failed_is_given_back_once() {
        let mut memory = memory(1 << 20);
        assert!(memory.memory_growing(0, 1 << 19, None).unwrap());
        assert!(memory.memory_growing(1 << 19, 1 << 20, None).unwrap());
        memory.memory_grow_failed(failure()).unwrap();
        memory.memory_grow_failed(failure()).unwrap();
        assert_eq!(memory.used, 1 << 19);
        assert!(!memory.memory_growing(1 << 19, 1 << 20, Some(1 << 19)).unwrap(), "beyond the module's own maximum");
        memory.memory_grow_failed(failure()).unwrap();
        assert_eq!(memory.used, 1 << 19, "nothing was granted, nothing is given back");
    }

    #[test]
    fn what_the_host_holds_is_charged_beyond_what_is_free() {
        let mut memory = memory(1 << 20);
        assert!(memory.memory_growing(0, 1 << 19, None).unwrap());
        assert!(memory.charge(1 << 18));
        assert_eq!(memory.held.bytes(), 3 << 18);
        assert!(!memory.memory_growing(1 << 19, 1 << 20, None).unwrap(), "there is not so much left");
        assert!(memory.charge(0) && memory.memory_growing(1 << 19, 1 << 20, None).unwrap(), "let go, it can be had");
        assert!(!memory.held.is_too_much());
        assert!(!memory.charge(1) && memory.held.is_too_much());
    }

    proptest! {
        #[test]
        fn no_sequence_of_growths_passes_the_bound(steps in proptest::collection::vec((0_usize..1 << 20, any::<bool>(), any::<bool>()), 0..50)) {
            let mut memory = memory(1 << 20);
            let (mut linear, mut table) = (0, 0);
            for (step, is_table, fails) in steps {
                let (size, unit) = if is_table { (&mut table, ELEMENT) } else { (&mut linear, 1) };
                let asked = if is_table { memory.table_growing(*size, *size + step, None) } else { memory.memory_growing(*size, *size + step, None) };
                match (asked.unwrap(), fails) {
                    (true, true) => memory.memory_grow_failed(failure()).unwrap(),
                    (true, false) => *size += step,
                    (false, _) => prop_assert!(step * unit > 0),
                }
                prop_assert_eq!(memory.used, linear + table * ELEMENT);
                prop_assert!(memory.used <= 1 << 20);
            }
        }
    }
}
