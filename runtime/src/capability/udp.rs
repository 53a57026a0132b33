//! `net.udp`: datagrams.

use gaia_manifest::Capability as Grant;
use wasmtime::component::Resource;
use wasmtime_wasi::p2::bindings::sockets::network::IpAddressFamily;
use wasmtime_wasi::p2::bindings::sockets::{udp, udp_create_socket};
use wasmtime_wasi::p2::{SocketResult, UdpSocket};
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsCtxView, WasiSocketsView as _};

use super::sockets::{Endpoints, INSTANCE_NETWORK, NETWORK, View};
use super::{Capability, Granted};
use crate::link::Interface;
use crate::worker::host::{Host, Means};

/// See the module.
pub(super) struct Udp;

const UDP: Interface = Interface {
    name: "wasi:sockets/udp",
    add: |linker| udp::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};
const CREATE: Interface = Interface {
    name: "wasi:sockets/udp-create-socket",
    add: |linker| udp_create_socket::add_to_linker::<Host, Endpoints>(linker, Host::reach),
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

    fn configure(&self, grant: &Grant, granted: &mut Granted, _: &Means) {
        if let Grant::Udp(endpoints) = grant {
            granted.reach.udp = Some(endpoints.as_slice().into());
        }
    }
}

impl udp_create_socket::Host for View<'_> {
    async fn create_udp_socket(&mut self, family: IpAddressFamily) -> SocketResult<Resource<UdpSocket>> {
        let mut one = self.one_socket()?.allow_udp(true).build();
        let mut sockets = WasiSocketsCtxView { ctx: one.sockets(), table: self.table };
        sockets.create_udp_socket(family).await
    }
}
