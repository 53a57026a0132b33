//! What one instance has on the host's side: its store's data.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use wasmtime::ResourceLimiter;
use wasmtime::component::{HasData, ResourceTable};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi::random::WasiRandomCtx;
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView};

use crate::statistics::Statistics;

/// The data of one instance's store.
pub struct Host {
    wasi: WasiCtx,
    http: WasiHttpCtx,
    table: ResourceTable,
    egress: NoEgress,
    /// Its memory, bounded.
    pub memory: Memory,
}

/// Marks the `wasi:io` interfaces, which need the table of resources alone.
pub struct Io;

impl HasData for Io {
    type Data<'a> = &'a mut ResourceTable;
}

impl Host {
    /// The host's side of a fresh instance with `mem_max` bytes to grow into.
    #[must_use]
    pub fn new(mem_max: u64, statistics: &Arc<Statistics>) -> Self {
        let output = Output(Arc::clone(statistics));
        let wasi = WasiCtxBuilder::new().stdout(output.clone()).stderr(output).build();
        let memory = Memory { used: 0, most: usize::try_from(mem_max).unwrap_or(usize::MAX) };
        Self { wasi, http: WasiHttpCtx::new(), table: ResourceTable::new(), egress: NoEgress, memory }
    }

    /// The table of resources.
    pub fn table(&mut self) -> &mut ResourceTable {
        &mut self.table
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
        WasiHttpCtxView { hooks: &mut self.egress, table: &mut self.table, ctx: &mut self.http }
    }
}

/// Bounds all memories and tables of an instance together: the runtime's own limiter looks at each alone.
#[derive(Debug)]
pub struct Memory {
    used: usize,
    most: usize,
}

/// Bytes of one table element on the host.
const ELEMENT: usize = size_of::<usize>();

impl Memory {
    fn grow(&mut self, current: usize, desired: usize) -> bool {
        match self.used.checked_add(desired.saturating_sub(current)) {
            Some(used) if used <= self.most => {
                self.used = used;
                true
            }
            _ => false,
        }
    }
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(self.grow(current, desired))
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(self.grow(current.saturating_mul(ELEMENT), desired.saturating_mul(ELEMENT)))
    }
}

/// No brane may send requests yet: `wasi:http/outgoing-handler` is not linked, and this stands behind it.
struct NoEgress;

type Sending = Box<dyn Future<Output = Result<(), Error>> + Send>;

impl WasiHttpHooks for NoEgress {
    fn send_request(
        &mut self,
        _: http::Request<WasiBody>,
        _: Option<RequestOptions>,
        _: Sending,
    ) -> Box<dyn Future<Output = Result<(http::Response<WasiBody>, Sending), Error>> + Send> {
        Box::new(std::future::ready(Err(Error::HttpRequestDenied)))
    }
}

/// A guest's stdout and stderr. Bytes are counted and, until there is a log to write them to, dropped.
#[derive(Clone)]
struct Output(Arc<Statistics>);

/// What a guest may write at a time, in bytes.
const CHUNK: usize = 64 * 1024;

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
        self.0.worker.output.fetch_add(bytes.len() as u64, Ordering::Relaxed);
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

    #[test]
    fn memories_and_tables_count_together() {
        let mut memory = Memory { used: 0, most: 3 << 16 };
        assert!(memory.memory_growing(0, 2 << 16, None).unwrap());
        assert!(memory.memory_growing(0, 1 << 16, None).unwrap(), "a second memory fits exactly");
        assert!(!memory.table_growing(0, 1, None).unwrap(), "a table of one element does not");
        assert!(!memory.memory_growing(2 << 16, usize::MAX, None).unwrap());
    }

    proptest! {
        #[test]
        fn no_sequence_of_growths_passes_the_bound(steps in proptest::collection::vec((0_usize..1 << 20, any::<bool>()), 0..50)) {
            let mut memory = Memory { used: 0, most: 1 << 20 };
            let (mut linear, mut table) = (0, 0);
            for (step, is_table) in steps {
                if is_table {
                    if memory.table_growing(table, table + step, None).unwrap() { table += step; }
                } else if memory.memory_growing(linear, linear + step, None).unwrap() {
                    linear += step;
                }
                prop_assert!(linear + table * ELEMENT <= 1 << 20);
            }
        }
    }
}
