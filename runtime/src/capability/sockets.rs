//! What `net.dns`, `net.tcp` and `net.udp` link alike: the network as a thing to name. By itself it reaches nothing.

use wasmtime_wasi::p2::bindings::sockets::{instance_network, network};
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsView as _};

use crate::link::Interface;
use crate::worker::host::Host;

pub(super) const NETWORK: Interface = Interface {
    name: "wasi:sockets/network",
    add: |linker| network::add_to_linker::<Host, WasiSockets>(linker, &network::LinkOptions::default(), Host::sockets),
};
pub(super) const INSTANCE_NETWORK: Interface = Interface {
    name: "wasi:sockets/instance-network",
    add: |linker| instance_network::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};
