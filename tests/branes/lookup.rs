//! Looks a name up: `name`, and answers its addresses, one in a line.
//!
//! ```text
//! GET /lookup?name=example.org    200 192.0.2.1\n2001:db8::1\n
//! GET /lookup?name=evil.example   502 access-denied
//! ```

use std::net::{Ipv4Addr, Ipv6Addr};

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::ip_name_lookup::resolve_addresses;
use wasip2::sockets::network::{ErrorCode, IpAddress};

struct Lookup;

/// The addresses of `name`, in the order in which the host gives them.
fn addresses(name: &str) -> Result<Vec<String>, ErrorCode> {
    let found = resolve_addresses(&instance_network(), name)?;
    let ready = found.subscribe();
    let mut all = Vec::new();
    loop {
        match found.resolve_next_address() {
            Ok(Some(IpAddress::Ipv4(v4))) => all.push(Ipv4Addr::from(<[u8; 4]>::from(v4)).to_string()),
            Ok(Some(IpAddress::Ipv6(v6))) => all.push(Ipv6Addr::from(<[u16; 8]>::from(v6)).to_string()),
            Ok(None) => return Ok(all),
            Err(ErrorCode::WouldBlock) => ready.block(),
            Err(code) => return Err(code),
        }
    }
}

impl Guest for Lookup {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let name = gaia_branes::query(&request, "name").unwrap_or_default();
        match addresses(&name) {
            Ok(all) => gaia_branes::answer(out, 200, &(all.join("\n") + "\n")),
            Err(code) => gaia_branes::answer(out, 502, &format!("{}\n", code.name())),
        }
    }
}

wasip2::http::proxy::export!(Lookup);
