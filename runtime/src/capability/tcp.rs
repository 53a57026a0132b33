//! `net.tcp`: connections.

use gaia_manifest::Capability as Grant;
use wasmtime_wasi::p2::bindings::sockets::{tcp, tcp_create_socket};
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsView as _};

use super::Capability;
use super::sockets::{INSTANCE_NETWORK, NETWORK};
use crate::link::Interface;
use crate::worker::host::Host;

/// See the module.
pub(super) struct Tcp;

const TCP: Interface = Interface {
    name: "wasi:sockets/tcp",
    add: |linker| tcp::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};
const CREATE: Interface = Interface {
    name: "wasi:sockets/tcp-create-socket",
    add: |linker| tcp_create_socket::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};

impl Capability for Tcp {
    fn key(&self) -> &'static str {
        "net.tcp"
    }

    fn interfaces(&self) -> &'static [Interface] {
        &[NETWORK, INSTANCE_NETWORK, TCP, CREATE]
    }

    fn smallest(&self) -> &'static str {
        "\"net.tcp\" = { allowlist = [] }"
    }

    fn missing(&self, _: &Grant) -> Option<&'static str> {
        Some("every connection is refused")
    }
}
