//! What `net.dns`, `net.tcp` and `net.udp` link alike: the network as a thing to name. By itself it reaches nothing.
//!
//! And what sockets ask before each use of an address: they lead out, to what is listed, from a port that the kernel
//! chooses. Each is made with a check of its own, which holds its place among the brane's sockets for as long as the
//! socket lives.

use std::net::SocketAddr;
use std::sync::Arc;

use gaia_egress::endpoint;
use gaia_egress::site::Denied;
use gaia_manifest::Endpoint;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmtime::component::{HasData, Resource, ResourceTable};
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::p2::bindings::sockets::instance_network;
use wasmtime_wasi::p2::bindings::sockets::network::{self, ErrorCode, Network};
use wasmtime_wasi::p2::{SocketError, SocketResult};
use wasmtime_wasi::sockets::{SocketAddrUse, WasiSockets, WasiSocketsView as _};

use super::{Instance, dns};
use crate::link::Interface;
use crate::worker::host::Host;

/// Sockets a brane may have at a time in a worker, which has 65,536 files for everything.
const SOCKETS: usize = 256;

pub(super) const NETWORK: Interface = Interface {
    name: "wasi:sockets/network",
    add: |linker| network::add_to_linker::<Host, WasiSockets>(linker, &network::LinkOptions::default(), Host::sockets),
};
pub(super) const INSTANCE_NETWORK: Interface = Interface {
    name: "wasi:sockets/instance-network",
    add: |linker| instance_network::add_to_linker::<Host, WasiSockets>(linker, Host::sockets),
};

/// What a brane's names and sockets lead to; nothing without a grant.
#[derive(Clone)]
pub struct Reach {
    /// The names it may look up.
    pub(super) dns: Option<Arc<dns::Listed>>,
    /// What it may connect to.
    pub(super) tcp: Option<Arc<[Endpoint]>>,
    /// Where it may send datagrams to.
    pub(super) udp: Option<Arc<[Endpoint]>>,
    places: Arc<Semaphore>,
}

impl Default for Reach {
    fn default() -> Self {
        Self { dns: None, tcp: None, udp: None, places: Arc::new(Semaphore::new(SOCKETS)) }
    }
}

/// Marks the interfaces that make something.
pub(super) struct Endpoints;

impl HasData for Endpoints {
    type Data<'a> = View<'a>;
}

/// What these interfaces need of an instance.
pub struct View<'a> {
    /// Its resources.
    pub table: &'a mut ResourceTable,
    /// What its brane may reach.
    pub reach: &'a Reach,
    /// The instance itself.
    pub instance: &'a Arc<Instance>,
}

impl View<'_> {
    /// The context for one more socket: wasmtime-wasi has the check in there, and each socket takes it along.
    pub(super) fn one_socket(&self) -> SocketResult<WasiCtxBuilder> {
        let place = Arc::clone(&self.reach.places).try_acquire_owned().map_err(|_| ErrorCode::NewSocketLimit)?;
        let check = Check {
            tcp: self.reach.tcp.clone(),
            udp: self.reach.udp.clone(),
            instance: Arc::clone(self.instance),
            _place: place,
        };
        let mut one = WasiCtxBuilder::new();
        one.socket_addr_check(move |address, purpose| Box::pin(std::future::ready(check.allow(address, purpose))));
        Ok(one)
    }
}

/// The interfaces' functions have the error of this one. The network itself is linked as it is.
impl network::Host for View<'_> {
    fn convert_error_code(&mut self, error: SocketError) -> wasmtime::Result<ErrorCode> {
        error.downcast()
    }

    fn network_error_code(&mut self, _: Resource<wasmtime::Error>) -> wasmtime::Result<Option<ErrorCode>> {
        Ok(None)
    }
}

impl network::HostNetwork for View<'_> {
    fn drop(&mut self, network: Resource<Network>) -> wasmtime::Result<()> {
        self.table.delete(network)?;
        Ok(())
    }
}

/// What one socket may do.
struct Check {
    tcp: Option<Arc<[Endpoint]>>,
    udp: Option<Arc<[Endpoint]>>,
    instance: Arc<Instance>,
    _place: OwnedSemaphorePermit,
}

impl Check {
    fn allow(&self, address: SocketAddr, purpose: SocketAddrUse) -> bool {
        match purpose {
            SocketAddrUse::TcpConnect => self.said("net.tcp", self.tcp.as_deref(), address),
            SocketAddrUse::UdpSend => self.said("net.udp", self.udp.as_deref(), address),
            // Datagrams of strangers are dropped without a word: the guest did not ask for them.
            SocketAddrUse::UdpReceive => self.leads_to(self.udp.as_deref(), address).is_ok(),
            SocketAddrUse::TcpBind => self.own("net.tcp", address),
            SocketAddrUse::UdpBind => self.own("net.udp", address),
            SocketAddrUse::TcpListen => {
                self.instance.deny("net.tcp", format_args!("{address}: sockets connect, they do not listen"));
                false
            }
            SocketAddrUse::TcpAccept => false,
        }
    }

    fn leads_to(&self, listed: Option<&[Endpoint]>, address: SocketAddr) -> Result<(), Denied> {
        endpoint::check(listed.unwrap_or_default(), &self.instance.seen(), address)
    }

    fn said(&self, key: &str, listed: Option<&[Endpoint]>, address: SocketAddr) -> bool {
        self.leads_to(listed, address).map_err(|denied| self.instance.deny(key, denied)).is_ok()
    }

    /// What a socket that leads out needs of its own: any address, any port.
    fn own(&self, key: &str, address: SocketAddr) -> bool {
        let any = address.ip().is_unspecified() && address.port() == 0;
        if !any {
            self.instance.deny(key, format_args!("{address}: a socket's own address is not the guest's to choose"));
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Event, Log, Reader, Subject};
    use crate::statistics::Statistics;

    #[test]
    fn sockets_lead_out_to_what_is_listed_and_each_refusal_but_a_strangers_is_told() {
        let page = Statistics::page();
        let instance = Arc::new(Instance::new(Arc::new(Log::new(Arc::clone(&page))), Subject::Brane(0, 1)));
        let listed = |entry: &str| Some(Arc::from([Endpoint::parse(entry).unwrap()]));
        let place = || Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let none = Check { tcp: None, udp: None, instance: Arc::clone(&instance), _place: place() };
        let both = Check { tcp: listed("10.0.0.1:1"), udp: listed("10.0.0.2:2"), instance, _place: place() };
        let mut reader = Reader::new(&page);
        for (purpose, address, allowed, told) in [
            (SocketAddrUse::TcpConnect, "10.0.0.1:1", true, None),
            (SocketAddrUse::TcpConnect, "10.0.0.2:2", false, Some("net.tcp 10.0.0.2:2 is not on")),
            (SocketAddrUse::UdpSend, "10.0.0.2:2", true, None),
            (SocketAddrUse::UdpSend, "10.0.0.1:1", false, Some("net.udp 10.0.0.1:1 is not on")),
            (SocketAddrUse::UdpReceive, "10.0.0.2:2", true, None),
            (SocketAddrUse::UdpReceive, "10.0.0.9:2", false, None),
            (SocketAddrUse::TcpBind, "0.0.0.0:0", true, None),
            (SocketAddrUse::UdpBind, "[::]:0", true, None),
            (SocketAddrUse::TcpBind, "0.0.0.0:80", false, Some("net.tcp 0.0.0.0:80: ")),
            (SocketAddrUse::UdpBind, "127.0.0.1:0", false, Some("net.udp 127.0.0.1:0: ")),
            (SocketAddrUse::TcpListen, "0.0.0.0:0", false, Some("net.tcp 0.0.0.0:0: ")),
            (SocketAddrUse::TcpAccept, "10.0.0.1:1", false, None),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(both.allow(address, purpose), allowed, "{purpose:?} {address}");
            let said = reader.next().map(|record| record.event);
            match (said, told) {
                (None, None) => {}
                (Some(Event::Deny { text }), Some(words)) => assert!(text.starts_with(words), "{text}"),
                (said, told) => panic!("{purpose:?} {address}: {said:?}, not {told:?}"),
            }
            let own = matches!(purpose, SocketAddrUse::TcpBind | SocketAddrUse::UdpBind) && allowed;
            assert_eq!(none.allow(address, purpose), own, "{purpose:?} {address}");
            while reader.next().is_some() {}
        }
    }

    #[test]
    fn a_socket_has_its_place_until_it_is_gone() {
        use wasmtime_wasi::p2::bindings::sockets::network::IpAddressFamily;
        use wasmtime_wasi::p2::bindings::sockets::tcp_create_socket::Host as _;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let (mut table, reach) = (ResourceTable::new(), Reach::default());
        let instance = Arc::new(Instance::new(Arc::new(Log::new(Statistics::page())), Subject::Worker));
        let mut view = View { table: &mut table, reach: &reach, instance: &instance };
        let mut all: Vec<_> = (0..SOCKETS).map(|_| view.create_tcp_socket(IpAddressFamily::Ipv4).unwrap()).collect();
        let error = view.create_tcp_socket(IpAddressFamily::Ipv4).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(ErrorCode::NewSocketLimit)));
        view.table.delete(all.pop().unwrap()).unwrap();
        assert!(view.create_tcp_socket(IpAddressFamily::Ipv6).is_ok());
        drop(table);
        assert_eq!(reach.places.available_permits(), SOCKETS);
    }
}
