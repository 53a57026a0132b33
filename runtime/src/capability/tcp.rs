//! `net.tcp`: connections.

use gaia_manifest::Capability as Grant;
use wasmtime::component::Resource;
use wasmtime_wasi::p2::bindings::sockets::network::IpAddressFamily;
use wasmtime_wasi::p2::bindings::sockets::{tcp, tcp_create_socket};
use wasmtime_wasi::p2::{SocketResult, TcpSocket};
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsCtxView, WasiSocketsView as _};

use super::sockets::{Endpoints, INSTANCE_NETWORK, NETWORK, View};
use super::{Capability, Granted};
use crate::link::Interface;
use crate::worker::host::{Host, Means};

/// See the module.
pub(super) struct Tcp;

const TCP: Interface = Interface {
    name: "wasi:sockets/tcp",
    add: |linker| tcp::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};
const CREATE: Interface = Interface {
    name: "wasi:sockets/tcp-create-socket",
    add: |linker| tcp_create_socket::add_to_linker::<Host, Endpoints>(linker, Host::reach),
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

    fn configure(&self, grant: &Grant, granted: &mut Granted, _: &Means) {
        if let Grant::Tcp(endpoints) = grant {
            granted.reach.tcp = Some(endpoints.as_slice().into());
        }
    }
}

impl tcp_create_socket::Host for View<'_> {
    fn create_tcp_socket(&mut self, family: IpAddressFamily) -> SocketResult<Resource<TcpSocket>> {
        let mut one = self.one_socket()?.allow_tcp(true).build();
        let mut sockets = WasiSocketsCtxView { ctx: one.sockets(), table: self.table };
        sockets.create_tcp_socket(family)
    }
}
