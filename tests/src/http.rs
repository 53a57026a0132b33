//! Just enough of an HTTP client to know exactly what became of one request: whole answer, or which failure.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// A whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its head, as it came.
    pub head: String,
    /// Its body, chunks put together.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends bytes on a connection of their own and reads the first answer, which must be whole when the connection ends.
///
/// # Errors
/// If the connection fails, or ends before a whole answer.
pub fn raw(port: u16, request: &[u8], within: Duration) -> io::Result<Answer> {
    let bytes = exchange(port, request, within)?;
    let broken = || format!("an answer that breaks off after {} bytes", bytes.len());
    parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, broken()))
}

/// Sends bytes on a connection of their own and reads what comes until the connection ends.
///
/// # Errors
/// If the connection fails before anything came.
pub fn exchange(port: u16, request: &[u8], within: Duration) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), within)?;
    stream.set_read_timeout(Some(within))?;
    stream.set_write_timeout(Some(within))?;
    // A server that refuses early may close while the rest is still being sent: its answer counts.
    let sent = stream.write_all(request);
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    if bytes.is_empty() {
        sent.and(read.map(drop))?;
    }
    Ok(bytes)
}

/// One `GET` on a connection of its own.
///
/// # Errors
/// As [`raw`].
pub fn get(port: u16, path: &str, within: Duration) -> io::Result<Answer> {
    raw(port, format!("GET {path} HTTP/1.1\r\nHost: appliance\r\nConnection: close\r\n\r\n").as_bytes(), within)
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8(bytes[..end].to_vec()).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let lower = head.to_ascii_lowercase();
    let field = |name: &str| lower.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':').map(str::trim));
    let rest = &bytes[end + 4..];
    let body = if field("transfer-encoding") == Some("chunked") {
        unchunked(rest)?
    } else if let Some(length) = field("content-length") {
        rest.get(..length.parse().ok()?)?.to_vec()
    } else {
        rest.to_vec()
    };
    Some(Answer { status, head, body })
}

fn unchunked(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|w| w == b"\r\n")?;
        let size = std::str::from_utf8(&bytes[..line]).ok()?.split(';').next()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        let chunk = bytes.get(line + 2..)?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(chunk.get(..size)?);
        bytes = chunk.get(size + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_answer_is_told_from_a_broken_one() {
        let whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        assert_eq!(parse(whole).unwrap().body, b"abc");
        assert!(parse(&whole[..whole.len() - 7]).is_none());
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc").is_none());
        assert_eq!(parse(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").unwrap().status, 404);
    }
}
