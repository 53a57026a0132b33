//! `net.http`: requests to the sites that are named.

use gaia_manifest::Capability as Grant;
use wasmtime_wasi_http::p2::bindings::http::outgoing_handler;
use wasmtime_wasi_http::{WasiHttp, WasiHttpView as _};

use super::Capability;
use crate::link::Interface;
use crate::worker::host::Host;

/// See the module.
pub(super) struct Http;

const OUTGOING: Interface = Interface {
    name: "wasi:http/outgoing-handler",
    add: |linker| outgoing_handler::add_to_linker::<Host, WasiHttp>(linker, Host::http),
};

impl Capability for Http {
    fn key(&self) -> &'static str {
        "net.http"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[OUTGOING]
    }

    fn smallest(&self) -> &'static str {
        "\"net.http\" = { allowlist = [] }"
    }

    fn missing(&self, _: &Grant) -> Option<&'static str> {
        Some("every request is refused")
    }
}
