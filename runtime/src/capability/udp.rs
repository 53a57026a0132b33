//! `net.udp`: datagrams.

use gaia_manifest::Capability as Grant;
use wasmtime_wasi::p2::bindings::sockets::{udp, udp_create_socket};
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsView as _};

use super::Capability;
use super::sockets::{INSTANCE_NETWORK, NETWORK};
use crate::link::Interface;
use crate::worker::host::Host;

/// See the module.
pub(super) struct Udp;

const UDP: Interface = Interface {
    name: "wasi:sockets/udp",
    add: |linker| udp::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};
const CREATE: Interface = Interface {
    name: "wasi:sockets/udp-create-socket",
    add: |linker| udp_create_socket::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};

impl Capability for Udp {
    fn key(&self) -> &'static str {
        "net.udp"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[NETWORK, INSTANCE_NETWORK, UDP, CREATE]
    }

    fn smallest(&self) -> &'static str {
        "\"net.udp\" = { allowlist = [] }"
    }

    fn missing(&self, _: &Grant) -> Option<&'static str> {
        Some("every datagram is refused")
    }
}
