//! The load: HTTP/1.1 over connections that stay open, one request at a time on each, from one thread on one core.
//!
//! Closed loop (a connection asks again as soon as it has its answer) for throughput; or at a fixed rate, where a latency
//! counts from when the request was due, not from when there was a connection for it.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{Timespec, epoll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// What is read at a time, in bytes.
const READ: usize = 64 * 1024;
/// The longest answer, in bytes.
const MOST: usize = 1 << 20;
/// Connections from one address: an address has some 28,000 ports to come from.
const FROM_ONE_ADDRESS: usize = 20_000;
/// How long a server may be silent before the run is given up.
const SILENT: Duration = Duration::from_secs(20);

/// The longest that a look which finds nothing takes; what is longer, another had the core.
const LOOK: Duration = Duration::from_micros(20);

/// A request, and where to.
#[derive(Debug, Clone)]
pub struct Request {
    /// The server.
    pub to: SocketAddr,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The body that answers must have; any if `None`.
    pub wanted: Option<Vec<u8>>,
}

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Connections.
    pub connections: usize,
    /// How long before anything counts.
    pub warm: Duration,
    /// How long it counts.
    pub measured: Duration,
    /// Requests a second on all connections together; as many as there can be, if not said.
    pub rate: Option<f64>,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Right answers while it counted.
    pub answers: u64,
    /// All answers, those before and after it counted and wrong ones included.
    pub all: u64,
    /// Answers that were wrong: another status than 200, or another body.
    pub wrong: u64,
    /// How long it counted, in seconds.
    pub seconds: f64,
    /// Of each right answer, in nanoseconds.
    pub latencies: Vec<u64>,
    /// The part of the time in which the load itself had something to do.
    pub busy: f64,
}

/// An answer that is there as a whole.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its body, with any chunks joined.
    pub body: Vec<u8>,
}

/// Reads an answer; `None` while it is not there as a whole.
///
/// # Errors
/// If it is none that can be understood.
pub fn answer(bytes: &[u8]) -> Result<Option<Answer>> {
    let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let body = &bytes[head + 4..];
    let head = std::str::from_utf8(&bytes[..head])?;
    let status = head.get(9..12).context("no status")?.parse()?;
    let header = |name: &str| {
        head.split("\r\n").skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    };
    if let Some(length) = header("content-length") {
        let body = body.get(..length.parse()?);
        return Ok(body.map(|body| Answer { status, body: body.to_vec() }));
    }
    ensure!(header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")), "no length");
    Ok(joined(body)?.map(|body| Answer { status, body }))
}

/// The chunks' contents, once the last is there; trailers are taken for none.
fn joined(mut chunks: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        let Some(end) = chunks.windows(2).position(|two| two == b"\r\n") else { return Ok(None) };
        let size = std::str::from_utf8(&chunks[..end])?.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).context("no chunk's size")?;
        let Some(chunk) = chunks.get(end + 2..end + 2 + size + 2) else { return Ok(None) };
        if size == 0 {
            return Ok(Some(body));
        }
        body.extend_from_slice(&chunk[..size]);
        chunks = &chunks[end + 2 + size + 2..];
    }
}

/// Asks once, on a connection of its own.
///
/// # Errors
/// If there is no connection, or no whole answer within 20 seconds.
pub fn once(request: &Request) -> Result<Answer> {
    let mut stream = TcpStream::connect(request.to)?;
    stream.set_read_timeout(Some(SILENT))?;
    stream.set_nodelay(true)?;
    stream.write_all(&request.bytes)?;
    let (mut all, mut piece) = (Vec::new(), vec![0; READ]);
    loop {
        let read = stream.read(&mut piece)?;
        ensure!(read > 0, "the connection ended after {} bytes", all.len());
        all.extend_from_slice(&piece[..read]);
        if let Some(answer) = answer(&all)? {
            return Ok(answer);
        }
    }
}

struct Connection {
    stream: TcpStream,
    /// What has been read of the answer.
    read: Vec<u8>,
    /// What has been written of the request; all of it while it waits for the answer.
    written: usize,
    /// Since when it waits; `None` while it does not.
    since: Option<Instant>,
}

/// Connections and what watches them.
pub struct Connections {
    request: Request,
    all: Vec<Connection>,
    epoll: std::os::fd::OwnedFd,
    events: Vec<epoll::Event>,
    piece: Vec<u8>,
}

/// What became of a connection's answer.
enum Read {
    /// It is not whole yet.
    Part,
    /// It is the one that was wanted.
    Right,
    /// It is another.
    Wrong,
}

impl Connections {
    /// Opens so many.
    ///
    /// # Errors
    /// If one cannot be opened: how many could.
    pub fn open(request: &Request, number: usize) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut all = Vec::with_capacity(number);
        for at in 0..number {
            let stream = connected(request.to, at).with_context(|| format!("the connection after {at}"))?;
            let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
            epoll::add(&epoll, &stream, epoll::EventData::new_u64(at as u64), flags)?;
            all.push(Connection { stream, read: Vec::new(), written: 0, since: None });
        }
        Ok(Self { request: request.clone(), all, epoll, events: Vec::with_capacity(256), piece: vec![0; READ] })
    }

    fn ask(&mut self, at: usize, since: Instant) -> Result<()> {
        let connection = &mut self.all[at];
        connection.written = 0;
        connection.since = Some(since);
        self.write(at)
    }

    /// Writes what is left of the request, as far as there is room.
    fn write(&mut self, at: usize) -> Result<()> {
        let connection = &mut self.all[at];
        while connection.since.is_some() && connection.written < self.request.bytes.len() {
            match connection.stream.write(&self.request.bytes[connection.written..]) {
                Ok(written) => connection.written += written,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e).context("writing a request"),
            }
        }
        Ok(())
    }

    /// Reads what there is.
    fn read(&mut self, at: usize) -> Result<Read> {
        let connection = &mut self.all[at];
        loop {
            match connection.stream.read(&mut self.piece) {
                Ok(0) => bail!("the server closed a connection after {} bytes of an answer", connection.read.len()),
                Ok(read) => {
                    // Mostly it is all there at once, and needs no keeping.
                    let whole = if connection.read.is_empty() {
                        let whole = answer(&self.piece[..read])?;
                        if whole.is_none() {
                            connection.read.extend_from_slice(&self.piece[..read]);
                        }
                        whole
                    } else {
                        connection.read.extend_from_slice(&self.piece[..read]);
                        answer(&connection.read)?
                    };
                    ensure!(connection.read.len() <= MOST, "an answer of more than {MOST} bytes");
                    if let Some(answer) = whole {
                        connection.read.clear();
                        let wanted = self.request.wanted.as_ref().is_none_or(|wanted| *wanted == answer.body);
                        return Ok(if answer.status == 200 && wanted { Read::Right } else { Read::Wrong });
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Read::Part),
                Err(e) => return Err(e).context("reading an answer"),
            }
        }
    }

    /// Waits until a connection has something to say, and calls `answered` with each that has its answer, since when it
    /// waited, and whether the answer is right.
    fn wait(&mut self, within: Duration, mut answered: impl FnMut(usize, Instant, bool)) -> Result<bool> {
        let timeout = Timespec { tv_sec: within.as_secs().cast_signed(), tv_nsec: within.subsec_nanos().into() };
        self.events.clear();
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&timeout))?;
        let events = std::mem::take(&mut self.events);
        for event in &events {
            let (at, flags) = (event.data.u64() as usize, event.flags);
            if flags.contains(epoll::EventFlags::OUT) {
                self.write(at)?;
            }
            if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR)
                && let Some(since) = self.all[at].since
            {
                match self.read(at)? {
                    Read::Part => {}
                    read => {
                        self.all[at].since = None;
                        answered(at, since, matches!(read, Read::Right));
                    }
                }
            }
        }
        let some = !events.is_empty();
        self.events = events;
        Ok(some)
    }

    /// Runs a load. It never sleeps: a server on the same machine would pay for waking it, the slower it is the more often, and one
    /// whose clients are elsewhere does not.
    ///
    /// # Errors
    /// If a connection breaks or the server is silent.
    pub fn run(&mut self, load: Load) -> Result<Outcome> {
        let begun = Instant::now();
        let (counts, ends) = (begun + load.warm, begun + load.warm + load.measured);
        let mut outcome = Outcome::default();
        let mut free: Vec<usize> = (0..self.all.len()).collect();
        let step = load.rate.map(|rate| Duration::from_secs_f64(1.0 / rate));
        let (mut due, mut heard, mut idle) = (begun, begun, Duration::ZERO);
        loop {
            let now = Instant::now();
            if now >= ends {
                break;
            }
            ensure!(now < heard + SILENT, "no answer for {} s", SILENT.as_secs());
            if let Some(step) = step {
                while due <= now
                    && let Some(at) = free.pop()
                {
                    self.ask(at, due)?;
                    due += step;
                }
            } else {
                while let Some(at) = free.pop() {
                    self.ask(at, Instant::now())?;
                }
            }
            let looks = Instant::now();
            let some = self.wait(Duration::ZERO, |at, since, right| {
                let now = Instant::now();
                free.push(at);
                outcome.all += 1;
                if now >= counts && now < ends {
                    if right {
                        outcome.answers += 1;
                        outcome.latencies.push(u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX));
                    } else {
                        outcome.wrong += 1;
                    }
                }
            })?;
            if some {
                heard = Instant::now();
            } else {
                if looks >= counts {
                    idle += looks.elapsed().min(LOOK);
                }
                // Whatever of the server runs on this core has its turn at once.
                std::thread::yield_now();
            }
        }
        outcome.seconds = load.measured.as_secs_f64();
        outcome.busy = 1.0 - (idle.as_secs_f64() / outcome.seconds).min(1.0);
        // What is still on its way is waited for: the next run must not meet it.
        let until = Instant::now() + SILENT;
        while free.len() < self.all.len() {
            ensure!(Instant::now() < until, "{} answers never came", self.all.len() - free.len());
            self.wait(Duration::from_millis(100), |at, _, _| {
                free.push(at);
                outcome.all += 1;
            })?;
        }
        Ok(outcome)
    }

    /// Sends one request on each connection.
    ///
    /// # Errors
    /// If a connection breaks.
    pub fn ask_all(&mut self) -> Result<()> {
        (0..self.all.len()).try_for_each(|at| self.ask(at, Instant::now()))
    }

    /// Waits for the answers to [`Self::ask_all`], for at most so long; how many were right and wrong.
    ///
    /// # Errors
    /// If a connection breaks.
    pub fn hear_all(&mut self, within: Duration) -> Result<(usize, usize)> {
        let (until, mut right, mut wrong) = (Instant::now() + within, 0, 0);
        while right + wrong < self.all.len() && Instant::now() < until {
            self.wait(Duration::from_millis(100), |_, _, good| if good { right += 1 } else { wrong += 1 })?;
        }
        Ok((right, wrong))
    }
}

/// The `number`th connection to a server: after every 20,000 from another address of this machine.
fn connected(to: SocketAddr, number: usize) -> Result<TcpStream> {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let last = u8::try_from(2 + number / FROM_ONE_ADDRESS)?;
    rustix::net::bind(&socket, &SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)), 0))?;
    // Bounds connecting as well (socket(7)).
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(Duration::from_secs(2)))?;
    rustix::net::connect(&socket, &to)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn whole(status: u16, body: &[u8]) -> Answer {
        Answer { status, body: body.to_vec() }
    }

    #[test]
    fn an_answer_is_whole_only_with_its_last_byte() {
        let by_length = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        let by_chunks =
            b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n";
        for (bytes, status) in [(&by_length[..], 200), (&by_chunks[..], 404)] {
            for end in 0..bytes.len() {
                assert_eq!(answer(&bytes[..end]).unwrap(), None, "{end}");
            }
            assert_eq!(answer(bytes).unwrap(), Some(whole(status, b"hello")));
        }
        assert_eq!(answer(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n").unwrap(), Some(whole(204, b"")));
        assert!(answer(b"HTTP/1.1 200 OK\r\n\r\n").is_err(), "an end that is not told");
        assert!(answer(b"nothing that is HTTP\r\n\r\n").is_err());
    }

    /// Answers each request on each connection; every tenth wrongly.
    fn server(delay: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || {
                    let mut buffer = [0; 1024];
                    for number in 1_u32.. {
                        let Ok(1..) = stream.read(&mut buffer) else { return };
                        std::thread::sleep(delay);
                        let status = if number.is_multiple_of(10) { "500 No" } else { "200 OK" };
                        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nok");
                        if stream.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn request(to: SocketAddr) -> Request {
        Request { to, bytes: b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(), wanted: Some(b"ok".to_vec()) }
    }

    #[test]
    fn wrong_answers_are_told_from_right_ones_and_no_latency_is_shorter_than_the_server_takes() {
        let delay = Duration::from_millis(2);
        let request = request(server(delay));
        let load =
            Load { connections: 4, warm: Duration::from_millis(50), measured: Duration::from_millis(400), rate: None };
        let mut connections = Connections::open(&request, load.connections).unwrap();
        let outcome = connections.run(load).unwrap();
        assert!(outcome.answers > 20 && outcome.wrong > 0, "{outcome:?}");
        assert!(outcome.wrong < outcome.answers / 4, "{outcome:?}");
        assert!(outcome.latencies.iter().all(|nanos| u128::from(*nanos) >= delay.as_nanos()));
        assert_eq!(outcome.latencies.len() as u64, outcome.answers);
        let other = Request { wanted: Some(b"no".to_vec()), ..request };
        assert_eq!(Connections::open(&other, 1).unwrap().run(load).unwrap().answers, 0, "another body is wrong");
    }

    #[test]
    fn at_a_rate_that_is_too_high_the_wait_for_a_connection_counts() {
        let request = request(server(Duration::from_millis(2)));
        // One connection answers 500 a second at most; asked for 2,000, the last is due a long time before it is sent.
        let load =
            Load { connections: 1, warm: Duration::ZERO, measured: Duration::from_millis(300), rate: Some(2000.0) };
        let outcome = Connections::open(&request, 1).unwrap().run(load).unwrap();
        let longest = outcome.latencies.iter().max().unwrap();
        assert!(*longest > 50_000_000, "{longest}");
        let slow = Load { rate: Some(100.0), ..load };
        let outcome = Connections::open(&request, 1).unwrap().run(slow).unwrap();
        assert!((10..=31).contains(&(outcome.answers + outcome.wrong)), "{outcome:?}");
    }

    #[test]
    fn all_that_were_asked_at_once_are_heard() {
        let mut connections = Connections::open(&request(server(Duration::from_millis(20))), 8).unwrap();
        connections.ask_all().unwrap();
        assert_eq!(connections.hear_all(Duration::from_secs(5)).unwrap(), (8, 0));
    }
}
