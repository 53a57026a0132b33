//! The listening sockets. The supervisor opens them once and keeps them, whoever dies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

/// Connections that wait in one socket's queue while its worker is away. The kernel caps it at
/// `net.core.somaxconn`, which init raises to the same figure.
pub const BACKLOG: i32 = 4096;

/// One listening socket of one worker core.
#[derive(Debug)]
pub struct Listener {
    /// Its name as the worker sees it: `http-8080-v4`.
    pub name: String,
    /// The core whose worker accepts on it.
    pub core: usize,
    /// The socket itself.
    pub socket: OwnedFd,
}

/// A listening socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("listening on {address}: {step}: {source}")]
pub struct Error {
    /// Where.
    pub address: SocketAddr,
    /// Which call failed.
    pub step: &'static str,
    /// What the kernel said.
    pub source: rustix::io::Errno,
}

/// Opens one `SO_REUSEPORT` socket per port, worker core and address family (IPv4 and IPv6 on all addresses).
///
/// The order of the sockets within a port's reuseport group is that of `cores`.
///
/// # Errors
/// [`Error`] names the address and the call. Sockets opened before it are closed.
pub fn open(ports: &[u16], cores: &[usize]) -> Result<Vec<Listener>, Error> {
    let mut all = Vec::with_capacity(ports.len() * cores.len() * 2);
    for port in ports {
        for core in cores {
            for (family, ip) in [("v4", IpAddr::V4(Ipv4Addr::UNSPECIFIED)), ("v6", IpAddr::V6(Ipv6Addr::UNSPECIFIED))] {
                let socket = listen(SocketAddr::new(ip, *port))?;
                all.push(Listener { name: format!("http-{port}-{family}"), core: *core, socket });
            }
        }
    }
    Ok(all)
}

fn listen(address: SocketAddr) -> Result<OwnedFd, Error> {
    let at = |step| move |source| Error { address, step, source };
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP)).map_err(at("socket"))?;
    if address.is_ipv6() {
        // Its own socket per family, so that a client's address is never an IPv4-mapped one.
        sockopt::set_ipv6_v6only(&socket, true).map_err(at("IPV6_V6ONLY"))?;
    }
    sockopt::set_socket_reuseaddr(&socket, true).map_err(at("SO_REUSEADDR"))?;
    sockopt::set_socket_reuseport(&socket, true).map_err(at("SO_REUSEPORT"))?;
    rustix::net::bind(&socket, &address).map_err(at("bind"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(at("listen"))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_socket_per_core_and_family() {
        // Port 0 would give each its own; take one that is free just now.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let all = open(&[port], &[0, 1]).unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!(all.iter().filter(|l| l.core == 1).count(), 2);
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    }

    #[test]
    fn a_taken_port_is_named() {
        let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let error = open(&[taken.local_addr().unwrap().port()], &[0]).unwrap_err();
        assert_eq!(error.step, "bind");
        assert!(error.to_string().contains(&taken.local_addr().unwrap().port().to_string()));
    }
}
