//! `net.dns`: addresses of names.

use gaia_manifest::Capability as Grant;
use wasmtime_wasi::p2::bindings::sockets::ip_name_lookup;
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsView as _};

use super::Capability;
use super::sockets::{INSTANCE_NETWORK, NETWORK};
use crate::link::Interface;
use crate::worker::host::Host;

/// See the module.
pub(super) struct Dns;

const LOOKUP: Interface = Interface {
    name: "wasi:sockets/ip-name-lookup",
    add: |linker| ip_name_lookup::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};

impl Capability for Dns {
    fn key(&self) -> &'static str {
        "net.dns"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[NETWORK, INSTANCE_NETWORK, LOOKUP]
    }

    fn smallest(&self) -> &'static str {
        "\"net.dns\" = { allowlist = [] }"
    }

    fn missing(&self, _: &Grant) -> Option<&'static str> {
        Some("every name is refused")
    }
}
