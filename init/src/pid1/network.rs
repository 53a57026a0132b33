//! The appliance's own addresses, set over rtnetlink.
//!
//! Messages are built here rather than by a crate: four kinds of request are all that is needed, and PID 1 stays small.
//! Layouts: Linux, `include/uapi/linux/{netlink,rtnetlink,if_link,if_addr}.h`.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use gaia_init::settings::{Network, Prefix};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::report::Failure;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// A static address needs no duplicate detection, which would keep it unusable for a second.
const IFA_F_NODAD: u32 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;

/// Brings up the loopback and the network interface with the addresses and gateways of the settings. What cannot be set
/// keeps nothing else from being set.
pub(crate) fn up(network: &Network) -> Result<String, Failure> {
    let route = Route::open()?;
    let mut wrong: Vec<String> = Vec::new();
    let mut note = |what: String, outcome: Result<(), Errno>| match outcome {
        Ok(()) => true,
        Err(e) => {
            wrong.push(format!("{what}: {e}"));
            false
        }
    };
    note("lo: up".into(), route.link(index("lo")?, IFF_UP));
    if network.address.is_empty() && network.interface.is_none() {
        return Ok("no address is configured: [network] address = [\"10.0.2.15/24\"] in gaia.toml".into());
    }
    let name = match &network.interface {
        Some(name) => name.clone(),
        None => first_ethernet()?,
    };
    let interface = index(&name)?;
    note(format!("{name}: up"), route.link(interface, IFF_UP));
    let mut said = name;
    for Prefix { address, length } in &network.address {
        let prefix = Prefix { address: *address, length: *length };
        if note(format!("{address}/{length}"), route.add_address(interface, prefix)) {
            let _ = write!(said, " {address}/{length}");
        }
    }
    for gateway in &network.gateway {
        if note(format!("gateway {gateway}"), route.add_gateway(interface, *gateway)) {
            let _ = write!(said, " via {gateway}");
        }
    }
    if wrong.is_empty() { Ok(said) } else { Err(format!("{}; what is there: {said}", wrong.join("; ")).into()) }
}

/// How long the kernel has to tell the devices what being down changes: it does that in work of its own, which waits on this
/// processor and which nothing here can wait for.
const SETTLES: Duration = Duration::from_millis(100);

/// Takes every interface but the loopback down, near the end of the machine: the kernel stops the devices then, and whatever it
/// still had to send of its own accord, a router solicitation for one, would go into a queue that is gone. What cannot be
/// taken down is left: the machine ends all the same.
pub(crate) fn down() {
    let Ok(route) = Route::open() else { return };
    for interface in interfaces().iter().filter(|name| *name != "lo").filter_map(|name| index(name).ok()) {
        let _ = route.link(interface, 0);
    }
    std::thread::sleep(SETTLES);
}

fn index(name: &str) -> Result<u32, Failure> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))
        .map_err(|_| format!("there is no interface {name}; there are: {}", interfaces().join(", ")))?;
    Ok(text.trim().parse()?)
}

fn interfaces() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The first interface, by name, that is Ethernet (`ARPHRD_ETHER`, 1) and has hardware behind it.
fn first_ethernet() -> Result<String, Failure> {
    let path = |name: &str, what| format!("/sys/class/net/{name}/{what}");
    let is = |name: &String| {
        fs::read_to_string(path(name, "type")).is_ok_and(|t| t.trim() == "1")
            && fs::exists(path(name, "device")).unwrap_or(false)
    };
    interfaces().into_iter().find(is).ok_or_else(|| {
        format!(
            "no Ethernet interface was found among {}; its driver may not be in this kernel",
            interfaces().join(", ")
        )
        .into()
    })
}

/// A netlink request under construction: header, family header, attributes, all aligned to four bytes.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16, family_header: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(family_header);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        // Values here are addresses and numbers: at most 16 bytes.
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn bytes(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

struct Route(OwnedFd);

impl Route {
    fn open() -> Result<Self, Failure> {
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Brings an interface up with [`IFF_UP`], takes it down with 0.
    fn link(&self, interface: u32, flags: u32) -> Result<(), Errno> {
        // struct ifinfomsg: family, padding, type, index, flags, mask of flags to change.
        let mut header = vec![0_u8; 4];
        header.extend(interface.to_ne_bytes());
        header.extend(flags.to_ne_bytes());
        header.extend(IFF_UP.to_ne_bytes());
        self.ask(Request::new(RTM_NEWLINK, 0, &header))
    }

    fn add_address(&self, interface: u32, prefix: Prefix) -> Result<(), Errno> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        let mut header = vec![family(prefix.address), prefix.length, 0, RT_SCOPE_UNIVERSE];
        header.extend(interface.to_ne_bytes());
        let address = octets(prefix.address);
        let request = Request::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attribute(IFA_LOCAL, &address)
            .attribute(IFA_ADDRESS, &address)
            .attribute(IFA_FLAGS, &IFA_F_NODAD.to_ne_bytes());
        self.ask(request)
    }

    fn add_gateway(&self, interface: u32, gateway: IpAddr) -> Result<(), Errno> {
        // struct rtmsg: family, destination bits, source bits, type of service, table, protocol, scope, type, flags.
        let header =
            [family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0, 0, 0, 0];
        let request = Request::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attribute(RTA_GATEWAY, &octets(gateway))
            .attribute(RTA_OIF, &interface.to_ne_bytes());
        self.ask(request)
    }

    /// Sends the request and waits for the kernel's answer, which comes at once.
    fn ask(&self, request: Request) -> Result<(), Errno> {
        rustix::net::send(&self.0, &request.bytes(), SendFlags::empty())?;
        let mut answer = [0_u8; 1024];
        let (length, _) = rustix::net::recv(&self.0, &mut answer, RecvFlags::empty())?;
        acknowledged(&answer[..length])
    }
}

/// Reads `struct nlmsgerr`: after the header of 16 bytes a negative error number, or 0 for success.
fn acknowledged(answer: &[u8]) -> Result<(), Errno> {
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw_os_error(code.saturating_neg())),
        _ => Err(Errno::BADMSG),
    }
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    u8::try_from(family.as_raw()).unwrap_or(0)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let bytes = Request::new(RTM_NEWADDR, NLM_F_CREATE, &[2, 24, 0, 0, 1, 0, 0, 0])
            .attribute(IFA_LOCAL, &[10, 0, 2])
            .bytes();
        assert_eq!(bytes.len(), 16 + 8 + 8, "the attribute of three bytes is padded to eight");
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 32);
        assert_eq!(u16::from_ne_bytes(bytes[24..26].try_into().unwrap()), 7, "its own length is not padded");
        assert_eq!(bytes[31], 0);
    }

    #[test]
    fn errors_come_back_as_themselves() {
        let mut answer = vec![0_u8; 36];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert_eq!(acknowledged(&answer), Ok(()));
        answer[16..20].copy_from_slice(&(-17_i32).to_ne_bytes());
        assert_eq!(acknowledged(&answer), Err(Errno::EXIST));
        assert_eq!(acknowledged(&answer[..10]), Err(Errno::BADMSG));
    }

    proptest! {
        #[test]
        fn any_answer_is_read(answer in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = acknowledged(&answer);
        }
    }
}
