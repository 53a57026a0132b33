//! The listening sockets. The supervisor opens them once and keeps them, whoever dies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

/// Connections that wait in one socket's queue while its worker is away. The kernel caps it at
/// `net.core.somaxconn`, which init raises to the same figure.
pub const BACKLOG: i32 = 4096;

/// Connections that wait for control. What is more is not answered, and tries again: whoever floods the port holds nothing else.
pub const CONTROL_BACKLOG: i32 = 64;
/// What the name of a socket on which operators reach control begins with: `control-tls-v4`.
pub const CONTROL_PREFIX: &str = "control-tls-";

/// What the name of a socket on which control answers with metrics begins with: `metrics-v4`.
pub const METRICS_PREFIX: &str = "metrics-";

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1 or HTTP/2, plain.
    Http,
    /// The same over TLS.
    Https,
}

impl Protocol {
    /// The word for it in a listener's name.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// That of the listener with this name.
    ///
    /// ```
    /// use gaia_init::listeners::Protocol;
    /// assert_eq!(Protocol::of("https-443-v6"), Some(Protocol::Https));
    /// assert_eq!(Protocol::of("httpsomething-443-v6"), None);
    /// ```
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let word = name.split_once('-')?.0;
        [Self::Http, Self::Https].into_iter().find(|protocol| protocol.word() == word)
    }
}

/// One listening socket of one worker core.
#[derive(Debug)]
pub struct Listener {
    /// Its name as the worker sees it: `http-8080-v4`, `https-443-v6`.
    pub name: String,
    /// The core whose worker accepts on it.
    pub core: usize,
    /// The socket itself.
    pub socket: OwnedFd,
}

/// What could be opened, and what not.
#[derive(Debug, Default)]
pub struct Opened {
    /// The sockets.
    pub listeners: Vec<Listener>,
    /// Why others are missing: the first error of each address.
    pub errors: Vec<Error>,
    /// Whether this kernel has no IPv6: then there are no sockets for it, which is no error.
    pub only_v4: bool,
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

/// All addresses of both families, for each port.
#[must_use]
pub fn everywhere(protocol: Protocol, ports: &[u16]) -> Vec<(Protocol, SocketAddr)> {
    let both = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    ports.iter().flat_map(|port| both.map(|ip| (protocol, SocketAddr::new(ip, *port)))).collect()
}

/// Opens one `SO_REUSEPORT` socket per address and worker core.
///
/// The order of the sockets within a port's reuseport group is that of `cores`. One that cannot be had does not keep
/// the others from being opened.
#[must_use]
pub fn open(addresses: &[(Protocol, SocketAddr)], cores: &[usize]) -> Opened {
    let mut opened = Opened::default();
    for (protocol, address) in addresses {
        for core in cores {
            match listen(*address) {
                Ok(socket) => {
                    let family = if address.is_ipv4() { "v4" } else { "v6" };
                    let name = format!("{}-{}-{family}", protocol.word(), address.port());
                    opened.listeners.push(Listener { name, core: *core, socket });
                }
                Err(e) if address.is_ipv6() && e.source == rustix::io::Errno::AFNOSUPPORT => opened.only_v4 = true,
                Err(e) if opened.errors.iter().any(|other| other.address == e.address) => {}
                Err(e) => opened.errors.push(e),
            }
        }
    }
    opened
}

/// Opens the sockets on which operators reach control, of both families, with their names.
///
/// An operator's connection may be silent for as long as nothing happens, so the kernel asks whether its peer is still
/// there. Those who are accepted inherit it: control may set nothing of the kind.
#[must_use]
pub fn open_control(port: u16) -> (Vec<(String, OwnedFd)>, Vec<Error>) {
    open_for_control(CONTROL_PREFIX, port)
}

/// Opens the sockets on which control answers with metrics, of both families, with their names.
#[must_use]
pub fn open_metrics(port: u16) -> (Vec<(String, OwnedFd)>, Vec<Error>) {
    open_for_control(METRICS_PREFIX, port)
}

fn open_for_control(prefix: &str, port: u16) -> (Vec<(String, OwnedFd)>, Vec<Error>) {
    let (mut sockets, mut errors) = (Vec::new(), Vec::new());
    for (address, family) in [(IpAddr::V4(Ipv4Addr::UNSPECIFIED), "v4"), (IpAddr::V6(Ipv6Addr::UNSPECIFIED), "v6")] {
        let address = SocketAddr::new(address, port);
        let socket = listen_with(address, CONTROL_BACKLOG).and_then(|socket| {
            let at = |step| move |source| Error { address, step, source };
            sockopt::set_socket_keepalive(&socket, true).map_err(at("SO_KEEPALIVE"))?;
            sockopt::set_tcp_keepidle(&socket, Duration::from_secs(30)).map_err(at("TCP_KEEPIDLE"))?;
            sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(10)).map_err(at("TCP_KEEPINTVL"))?;
            sockopt::set_tcp_keepcnt(&socket, 3).map_err(at("TCP_KEEPCNT"))?;
            // Milliseconds: who takes nothing of what is sent is gone as well.
            sockopt::set_tcp_user_timeout(&socket, 60_000).map_err(at("TCP_USER_TIMEOUT"))?;
            sockopt::set_tcp_nodelay(&socket, true).map_err(at("TCP_NODELAY"))?;
            Ok(socket)
        });
        match socket {
            Ok(socket) => sockets.push((format!("{prefix}{family}"), socket)),
            Err(e) if address.is_ipv6() && e.source == rustix::io::Errno::AFNOSUPPORT => {}
            Err(e) => errors.push(e),
        }
    }
    (sockets, errors)
}

/// Has the socket listen again, should one of those who share it have shut it down, which takes it out of every
/// connection's reach until then (Linux, `inet_shutdown`). To one that listens it does nothing.
///
/// # Errors
/// What the kernel said.
pub fn listen_again(listener: &Listener) -> Result<(), rustix::io::Errno> {
    rustix::net::listen(&listener.socket, BACKLOG)
}

fn listen(address: SocketAddr) -> Result<OwnedFd, Error> {
    listen_with(address, BACKLOG)
}

fn listen_with(address: SocketAddr, backlog: i32) -> Result<OwnedFd, Error> {
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
    rustix::net::listen(&socket, backlog).map_err(at("listen"))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_socket_per_core_and_family() {
        // Port 0 would give each its own; take one that is free just now.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let Opened { listeners: all, errors, only_v4 } = open(&everywhere(Protocol::Http, &[port]), &[0, 1]);
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(all.len(), if only_v4 { 2 } else { 4 });
        assert_eq!(all.iter().filter(|l| l.core == 1).count(), all.len() / 2);
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    }

    #[test]
    fn a_taken_port_is_named_once_and_keeps_no_other_from_being_opened() {
        let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let taken = (taken.local_addr().unwrap().port(), taken);
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let opened = open(&everywhere(Protocol::Http, &[taken.0, free]), &[0, 1]);
        let [error] = opened.errors.as_slice() else { panic!("{opened:?}") };
        assert_eq!(error.step, "bind");
        assert!(error.to_string().contains(&taken.0.to_string()));
        assert!(opened.listeners.iter().any(|l| l.name == format!("http-{free}-v4")));
    }

    #[test]
    fn operators_have_a_socket_of_each_family_whose_silence_ends() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (sockets, errors) = open_control(port);
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(sockets[0].0, "control-tls-v4");
        let _client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let accepted = rustix::net::accept(&sockets[0].1).unwrap();
        assert!(sockopt::socket_keepalive(&accepted).unwrap() && sockopt::tcp_nodelay(&accepted).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&accepted).unwrap(), 60_000);
        assert_eq!(sockopt::tcp_keepidle(&accepted).unwrap(), Duration::from_secs(30));
    }

    #[test]
    fn a_socket_that_was_shut_down_listens_again_on_its_port() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let opened = open(&everywhere(Protocol::Http, &[port]), &[0]);
        let v4 = &opened.listeners[0];
        rustix::net::shutdown(&v4.socket, rustix::net::Shutdown::Both).unwrap();
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
        listen_again(v4).unwrap();
        listen_again(v4).unwrap();
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    }
}
