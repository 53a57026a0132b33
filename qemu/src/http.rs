//! Just enough HTTP/1.1 to see whether a server answers 200.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// Gets `path` from a port of this host and returns the status, once the head of the answer is whole.
pub(crate) fn get(port: u16, path: &str, limit: Duration) -> Result<u16> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, limit).context("no connection")?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let host = format!("127.0.0.1:{port}");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: gaia-qemu\r\nConnection: close\r\n\r\n")?;
    let mut head = BufReader::new(stream.take(64 << 10));
    let mut line = String::new();
    head.read_line(&mut line).context("no answer")?;
    let status = status(&line).with_context(|| format!("no HTTP answer, but {:?}", line.trim_end()))?;
    while !line.trim_end().is_empty() {
        line.clear();
        if head.read_line(&mut line).context("an answer that breaks off")? == 0 {
            bail!("an answer that breaks off");
        }
    }
    Ok(status)
}

fn status(line: &str) -> Option<u16> {
    line.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    fn answered(answer: &'static str) -> Result<u16> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
            let request = lines.next().unwrap();
            assert!(lines.any(|line| line.is_empty()));
            stream.write_all(answer.as_bytes()).unwrap();
            request
        });
        let status = get(port, "/hello", Duration::from_secs(5));
        assert_eq!(server.join().unwrap(), "GET /hello HTTP/1.1");
        status
    }

    #[test]
    fn status_of_a_whole_head() {
        assert_eq!(answered("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").unwrap(), 200);
        assert_eq!(answered("HTTP/1.0 503\r\n\r\n").unwrap(), 503);
        assert!(answered("").is_err());
        assert!(answered("SSH-2.0-x\r\n\r\n").unwrap_err().to_string().contains("SSH"));
        assert!(answered("HTTP/1.1 200 OK\r\ncontent-").is_err());
    }
}
