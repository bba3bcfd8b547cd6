//! A consumer that only keeps up: of an `http_pull` sink, or of a bare server with the same routes.
//!
//! `consume ADDRESS PATH BATCH COUNT CONNECTIONS` fetches from `PATH/receive`, takes the ids out of
//! each reply and posts them to `PATH/ack`, over connections that stay open, until COUNT messages
//! are acknowledged. It prints messages a second, from the end of the first reply on.
//! `bench/sinks.py` compiles it with rustc alone.

use std::{
    env,
    error::Error,
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const ID: &[u8] = b"\"ack_id\":\"";
const ID_BYTES: usize = 36;

/// What the connections have done together.
struct Work {
    count: usize,
    done: AtomicUsize,
    /// When the first reply came, and how many messages it had.
    first: Mutex<Option<(Instant, usize)>>,
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [address, path, batch, count, connections] = arguments.as_slice() else {
        return Err("usage: consume ADDRESS PATH BATCH COUNT CONNECTIONS".into());
    };
    let work =
        Work { count: count.parse()?, done: AtomicUsize::new(0), first: Mutex::new(None) };
    let receive = format!(
        "GET {path}/receive?batch_size={batch}&wait_for=500 HTTP/1.1\r\nhost: {address}\r\n\r\n"
    );
    let ack = format!(
        "POST {path}/ack HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    );
    thread::scope(|scope| {
        let consumers: Vec<_> = (0..connections.parse()?)
            .map(|_| scope.spawn(|| work.consume(address, receive.as_bytes(), &ack)))
            .collect();
        consumers.into_iter().try_for_each(|one| one.join().map_err(|_| "a thread failed")?)
    })?;
    let (began, had) = work.first.into_inner()?.ok_or("nothing came")?;
    let rate = (work.done.into_inner() - had) as f64 / began.elapsed().as_secs_f64();
    println!("{rate:.0}");
    Ok(())
}

impl Work {
    fn consume(&self, address: &str, receive: &[u8], ack: &str) -> Outcome<()> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        let mut connection = Connection { socket, buffer: Vec::new() };
        while self.done.load(Ordering::SeqCst) < self.count {
            let body = connection.ask(receive)?;
            let ids = ids_of(body);
            if ids.is_empty() {
                continue;
            }
            self.first
                .lock()
                .map_err(|_| "a thread failed")?
                .get_or_insert_with(|| (Instant::now(), ids.len()));
            let body = format!("{{\"ack_ids\":[\"{}\"]}}", ids.join("\",\""));
            let count = ids.len();
            let request = format!("{ack}content-length: {}\r\n\r\n{body}", body.len());
            connection.ask(request.as_bytes())?;
            self.done.fetch_add(count, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// Jumps from id to id: a real consumer does more with its messages.
fn ids_of(body: &[u8]) -> Vec<&str> {
    let mut ids = Vec::new();
    let mut rest = body;
    while let Some(at) = rest.iter().position(|byte| *byte == b'"') {
        rest = &rest[at..];
        match rest.strip_prefix(ID).and_then(|rest| rest.get(..ID_BYTES)) {
            Some(id) => {
                ids.extend(std::str::from_utf8(id));
                rest = &rest[ID.len() + ID_BYTES..];
            }
            None => rest = &rest[1..],
        }
    }
    ids
}

/// An HTTP/1.1 connection that stays open.
struct Connection {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// One request and the body of its reply, which must be a success with a known length.
    fn ask(&mut self, request: &[u8]) -> Outcome<&[u8]> {
        self.socket.write_all(request)?;
        let mut filled = 0;
        let (start, end) = loop {
            if self.buffer.len() < filled + (64 << 10) {
                self.buffer.resize(2 * filled + (256 << 10), 0);
            }
            match self.socket.read(&mut self.buffer[filled..])? {
                0 => return Err("the server closed the connection".into()),
                read => filled += read,
            }
            if let Some(place) = body_of(&self.buffer[..filled])?
                && place.1 <= filled
            {
                break place;
            }
        };
        Ok(&self.buffer[start..end])
    }
}

/// Where the body begins and ends, once the head is there.
fn body_of(reply: &[u8]) -> Outcome<Option<(usize, usize)>> {
    let head = &reply[..reply.len().min(4096)];
    let Some(start) = head.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&reply[..start])?.to_ascii_lowercase();
    if !head.starts_with("http/1.1 200") {
        return Err(head.into());
    }
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.ok_or("a reply without its length")?.trim().parse()?;
    Ok(Some((start + 4, start + 4 + length)))
}
