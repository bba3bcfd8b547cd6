//! A consumer that only keeps up: of an `http_pull` sink, of a bare server with the same routes, or
//! of a consumer group of Redis.
//!
//! `consume http|redis ADDRESS PATH BATCH COUNT CONNECTIONS` fetches batches, takes the ids out of
//! each reply and acknowledges them, over connections that stay open, until COUNT messages are
//! acknowledged. PATH is `/api/.../NAME` (`GET PATH/receive`, `POST PATH/ack`), or a stream with a
//! group `bench` (`XREADGROUP`, `XACK`). It prints messages a second, from the end of the first
//! reply to the last acknowledgement. `bench/sinks.py` compiles it with rustc alone.

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
    /// When the last acknowledgement was answered: other connections may wait for messages then.
    last: Mutex<Instant>,
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [protocol, address, path, batch, count, connections] = arguments.as_slice() else {
        return Err("usage: consume http|redis ADDRESS PATH BATCH COUNT CONNECTIONS".into());
    };
    let work = Work {
        count: count.parse()?,
        done: AtomicUsize::new(0),
        first: Mutex::new(None),
        last: Mutex::new(Instant::now()),
    };
    let words = match protocol.as_str() {
        "http" => Words::of_http(address, path, batch),
        "redis" => Words::of_redis(path, batch),
        _ => return Err("the first word is http or redis".into()),
    };
    thread::scope(|scope| {
        let consumers: Vec<_> = (0..connections.parse()?)
            .map(|_| scope.spawn(|| work.consume(address, &words)))
            .collect();
        consumers.into_iter().try_for_each(|one| one.join().map_err(|_| "a thread failed")?)
    })?;
    let (began, had) = work.first.into_inner()?.ok_or("nothing came")?;
    let took = work.last.into_inner()?.duration_since(began);
    let rate = (work.done.into_inner() - had) as f64 / took.as_secs_f64();
    println!("{rate:.0}");
    Ok(())
}

/// What is said to a server, and how its replies are read.
struct Words {
    receive: String,
    ack: Box<dyn Fn(&[&str]) -> String + Send + Sync>,
    /// Where the body of a reply begins and ends, once all of it is there.
    body: fn(&[u8]) -> Outcome<Option<(usize, usize)>>,
    ids: fn(&[u8]) -> Vec<&str>,
}

impl Words {
    fn of_http(address: &str, path: &str, batch: &str) -> Self {
        let receive = format!(
            "GET {path}/receive?batch_size={batch}&wait_for=500 HTTP/1.1\r\nhost: {address}\r\n\r\n"
        );
        let head = format!(
            "POST {path}/ack HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
        );
        let ack = move |ids: &[&str]| {
            let body = format!("{{\"ack_ids\":[\"{}\"]}}", ids.join("\",\""));
            format!("{head}content-length: {}\r\n\r\n{body}", body.len())
        };
        Self { receive, ack: Box::new(ack), body: body_of, ids: ids_of }
    }

    fn of_redis(stream: &str, batch: &str) -> Self {
        let receive = format!("XREADGROUP GROUP bench one COUNT {batch} STREAMS {stream} >\r\n");
        let stream = stream.to_owned();
        let ack = move |ids: &[&str]| {
            let count = 3 + ids.len();
            let words = ["XACK", &stream, "bench"].into_iter().chain(ids.iter().copied());
            let words = words.map(|word| format!("${}\r\n{word}\r\n", word.len()));
            format!("*{count}\r\n") + &words.collect::<String>()
        };
        Self { receive, ack: Box::new(ack), body: end_of_resp, ids: ids_of_entries }
    }
}

impl Work {
    fn consume(&self, address: &str, words: &Words) -> Outcome<()> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        let mut connection = Connection { socket, buffer: Vec::new(), body: words.body };
        while self.done.load(Ordering::SeqCst) < self.count {
            let body = connection.ask(words.receive.as_bytes())?;
            let ids = (words.ids)(body);
            if ids.is_empty() {
                continue;
            }
            self.first
                .lock()
                .map_err(|_| "a thread failed")?
                .get_or_insert_with(|| (Instant::now(), ids.len()));
            let (count, request) = (ids.len(), (words.ack)(&ids));
            connection.ask(request.as_bytes())?;
            self.done.fetch_add(count, Ordering::SeqCst);
            *self.last.lock().map_err(|_| "a thread failed")? = Instant::now();
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

/// A connection that stays open.
struct Connection {
    socket: TcpStream,
    buffer: Vec<u8>,
    body: fn(&[u8]) -> Outcome<Option<(usize, usize)>>,
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
            if let Some(place) = (self.body)(&self.buffer[..filled])?
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

/// The end of a reply of Redis, once it is there.
fn end_of_resp(reply: &[u8]) -> Outcome<Option<(usize, usize)>> {
    if reply.starts_with(b"-") {
        return Err(String::from_utf8_lossy(reply).into());
    }
    let (mut at, mut left) = (0, 1);
    while left > 0 {
        let Some((kind, number, next)) = line(reply, at) else { return Ok(None) };
        (at, left) = match kind {
            b'*' => (next, left - 1 + number.max(0)),
            b'$' if number >= 0 => (next + number as usize + 2, left - 1),
            _ => (next, left - 1),
        };
        if at > reply.len() {
            return Ok(None);
        }
    }
    Ok(Some((0, at)))
}

/// The ids of one stream's entries of one field each: the first of each three texts.
fn ids_of_entries(reply: &[u8]) -> Vec<&str> {
    let (mut at, mut texts) = (0, Vec::new());
    while let Some((kind, number, next)) = line(reply, at) {
        at = next;
        if kind == b'$' && number >= 0 {
            texts.push(&reply[next..next + number as usize]);
            at += number as usize + 2;
        }
    }
    let ids = texts.iter().skip(1).step_by(3); // the name of the stream comes first
    ids.filter_map(|id| std::str::from_utf8(id).ok()).collect()
}

/// `*3`, `$15` or `:1000` at a place, and where the next line begins.
fn line(reply: &[u8], at: usize) -> Option<(u8, i64, usize)> {
    let (kind, rest) = reply.get(at..)?.split_first()?;
    let end = rest.windows(2).position(|two| two == b"\r\n")?;
    let number = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
    Some((*kind, number, at + 1 + end + 2))
}
