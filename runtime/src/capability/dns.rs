//! `net.dns`: addresses of the names that are listed, without those that nobody may connect to.

use std::future::Future as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use gaia_egress::address;
use gaia_egress::resolve::{self, Resolve};
use gaia_egress::site::{self, Denied};
use gaia_manifest::{Capability as Grant, Host as Name};
use wasmtime::component::Resource;
use wasmtime_wasi::p2::bindings::sockets::ip_name_lookup::{self, ResolveAddressStream};
use wasmtime_wasi::p2::bindings::sockets::network::{ErrorCode, IpAddress, Network};
use wasmtime_wasi::p2::{DynPollable, Pollable, SocketResult, subscribe};
use wasmtime_wasi::runtime::{AbortOnDropJoinHandle, spawn};

use super::sockets::{Endpoints, INSTANCE_NETWORK, NETWORK, View};
use super::{Capability, Granted, Instance};
use crate::link::Interface;
use crate::worker::host::{Host, Means};

/// See the module.
pub(super) struct Dns;

const LOOKUP: Interface = Interface {
    name: "wasi:sockets/ip-name-lookup",
    add: |linker| ip_name_lookup::add_to_linker::<Host, Endpoints>(linker, Host::reach),
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

    fn configure(&self, grant: &Grant, granted: &mut Granted, _: &Means) {
        if let (Grant::Dns(names), Some(resolver)) = (grant, granted.names.clone()) {
            granted.reach.dns = Some(Arc::new(Listed { names: names.clone(), resolver }));
        }
    }
}

/// The names a brane may look up, and who answers.
pub(super) struct Listed {
    names: Vec<Name>,
    resolver: Arc<dyn Resolve>,
}

impl Listed {
    /// The addresses of a name that an instance may have. Whatever was found is remembered for its sockets.
    async fn look_up(&self, name: &str, instance: &Instance) -> Result<Vec<IpAddr>, ErrorCode> {
        let all = self.resolver.resolve(name).await.map_err(|e| code_of(&e))?;
        instance.seen().record(name, &all);
        let mut denied = None;
        let mut addresses = Vec::with_capacity(all.len());
        for address in all {
            match address::refused(address) {
                Some(reason) if !self.names.iter().any(|listed| listed.covers(&address.to_string())) => {
                    denied.get_or_insert(Denied::Address { host: name.to_owned(), address, reason });
                }
                _ => addresses.push(address),
            }
        }
        match denied {
            Some(denied) if addresses.is_empty() => {
                instance.deny("net.dns", denied);
                Err(ErrorCode::AccessDenied)
            }
            _ => Ok(addresses),
        }
    }
}

fn code_of(error: &resolve::Error) -> ErrorCode {
    match error {
        resolve::Error::NotFound => ErrorCode::NameUnresolvable,
        resolve::Error::Name => ErrorCode::InvalidArgument,
        resolve::Error::NoServer => ErrorCode::PermanentResolverFailure,
        _ => ErrorCode::TemporaryResolverFailure,
    }
}

/// A look-up, under the handle that the bindings call a `ResolveAddressStream`.
enum LookUp {
    Asking(AbortOnDropJoinHandle<Result<Vec<IpAddr>, ErrorCode>>),
    Over(Result<std::vec::IntoIter<IpAddr>, ErrorCode>),
}

#[wasmtime_wasi::async_trait]
impl Pollable for LookUp {
    async fn ready(&mut self) {
        if let Self::Asking(asking) = self {
            let found = asking.await;
            *self = Self::Over(found.map(Vec::into_iter));
        }
    }
}

/// What is an address already, in the notations that `wasi:sockets` knows: it reveals nothing, and nobody is asked.
fn literal(name: &str) -> Option<IpAddr> {
    let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    let v4 = || name.parse::<Ipv4Addr>().ok().map(IpAddr::from);
    v4().or_else(|| bare.parse::<Ipv6Addr>().ok().map(IpAddr::from))
}

fn ours(handle: &Resource<ResolveAddressStream>) -> Resource<LookUp> {
    if handle.owned() { Resource::new_own(handle.rep()) } else { Resource::new_borrow(handle.rep()) }
}

impl ip_name_lookup::Host for View<'_> {
    fn resolve_addresses(
        &mut self,
        network: Resource<Network>,
        name: String,
    ) -> SocketResult<Resource<ResolveAddressStream>> {
        self.table.get(&network)?;
        let look_up = if let Some(address) = literal(&name) {
            LookUp::Over(Ok(vec![address].into_iter()))
        } else {
            let listed = self.reach.dns.as_ref().ok_or(ErrorCode::AccessDenied)?;
            let name = site::name(&listed.names, &name).map_err(|denied| {
                let listed = matches!(denied, Denied::NotListed(_));
                self.instance.deny("net.dns", denied);
                if listed { ErrorCode::AccessDenied } else { ErrorCode::InvalidArgument }
            })?;
            let (listed, instance) = (Arc::clone(listed), Arc::clone(self.instance));
            LookUp::Asking(spawn(async move { listed.look_up(&name, &instance).await }))
        };
        Ok(Resource::new_own(self.table.push(look_up)?.rep()))
    }
}

impl ip_name_lookup::HostResolveAddressStream for View<'_> {
    fn resolve_next_address(&mut self, handle: Resource<ResolveAddressStream>) -> SocketResult<Option<IpAddress>> {
        let look_up = self.table.get_mut(&ours(&handle))?;
        if let LookUp::Asking(asking) = look_up {
            match Pin::new(asking).poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => return Err(ErrorCode::WouldBlock.into()),
                Poll::Ready(found) => *look_up = LookUp::Over(found.map(Vec::into_iter)),
            }
        }
        match look_up {
            LookUp::Asking(_) => Err(ErrorCode::WouldBlock.into()),
            LookUp::Over(Ok(addresses)) => Ok(addresses.next().map(Into::into)),
            LookUp::Over(Err(code)) => Err((*code).into()),
        }
    }

    fn subscribe(&mut self, handle: Resource<ResolveAddressStream>) -> wasmtime::Result<Resource<DynPollable>> {
        subscribe(self.table, ours(&handle))
    }

    fn drop(&mut self, handle: Resource<ResolveAddressStream>) -> wasmtime::Result<()> {
        self.table.delete(ours(&handle))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_its_own_answer_in_its_plain_notation_only() {
        assert_eq!(literal("127.0.0.1"), Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(literal("[::1]"), literal("::1"));
        for name in ["127.1", "0x7f.1", "[127.0.0.1]", "a.example", "", "[", "fe80::1%eth0"] {
            assert_eq!(literal(name), None, "{name}");
        }
    }
}
