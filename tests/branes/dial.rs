//! Says something over a socket and answers what came back, with the sockets of the standard library.
//!
//! ```text
//! GET /dial?to=127.0.0.1:7&say=hello              over TCP
//! GET /dial?to=echo.example:7&say=hello&over=udp  as one datagram
//! GET /dial?over=listen                           tries to be a server, on a port of the kernel's choice
//! 200 hello
//! 502 connect: PermissionDenied                   where it ended, and how
//! ```

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket};

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// The longest answer it reads, in bytes.
const MOST: usize = 64 * 1024;

struct Dial;

/// Says what to do when a step failed.
fn at(step: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{step}: {:?}", error.kind())
}

fn tcp(to: &str, say: &str) -> Result<Vec<u8>, String> {
    let mut stream = TcpStream::connect(to).map_err(at("connect"))?;
    stream.write_all(say.as_bytes()).map_err(at("write"))?;
    stream.shutdown(Shutdown::Write).map_err(at("shutdown"))?;
    let mut answer = Vec::new();
    stream.take(MOST as u64).read_to_end(&mut answer).map_err(at("read"))?;
    Ok(answer)
}

fn udp(to: &str, say: &str) -> Result<Vec<u8>, String> {
    let to = to.to_socket_addrs().map_err(at("look-up"))?.next().ok_or("look-up: nothing")?;
    let own = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(own).map_err(at("bind"))?;
    socket.send_to(say.as_bytes(), to).map_err(at("send"))?;
    let mut answer = vec![0; MOST];
    let (length, _) = socket.recv_from(&mut answer).map_err(at("receive"))?;
    answer.truncate(length);
    Ok(answer)
}

fn listen() -> Result<Vec<u8>, String> {
    let listener = TcpListener::bind("0.0.0.0:0").map_err(at("listen"))?;
    Ok(format!("{:?}", listener.local_addr().map_err(at("address"))?).into_bytes())
}

impl Guest for Dial {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let value = |key| gaia_branes::query(&request, key).unwrap_or_default();
        let (to, say) = (value("to"), value("say"));
        let answer = match value("over").as_str() {
            "udp" => udp(&to, &say),
            "listen" => listen(),
            _ => tcp(&to, &say),
        };
        match answer {
            Ok(bytes) => gaia_branes::answer_with(out, 200, "application/octet-stream", &bytes),
            Err(why) => gaia_branes::answer(out, 502, &(why + "\n")),
        }
    }
}

wasip2::http::proxy::export!(Dial);
