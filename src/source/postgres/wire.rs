//! A blocking PostgreSQL client: the connection, its frames, and the simple query protocol
//! (<https://www.postgresql.org/docs/current/protocol-flow.html>).
//!
//! It blocks on a thread of its own because a reader that sleeps for a fraction of a millisecond is
//! below the grain of tokio's timers (docs/adr/0003-replication-client.md).

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use rustls::{ClientConnection, StreamOwned};

use super::{
    auth,
    failure::{Failure, ServerError},
    tls,
    url::{Host, Target},
};
use crate::{
    error::{Class, Classify, Error, Result},
    tls::Mode,
};

/// A statement that takes longer than this has lost its server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Unacknowledged data for this long breaks the connection, whatever keepalive says.
const USER_TIMEOUT_MS: u32 = 30_000;
/// What is read at once where many rows come.
const ROWS_BUFFER_BYTES: usize = 256 << 10;
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Plain statements.
    Sql,
    /// A walsender of the database: replication commands, and plain statements too.
    Replication,
}

/// One row of text values; `None` is NULL.
pub(super) type TextRow = Vec<Option<String>>;

/// An open, authenticated connection.
pub(super) struct Client {
    stream: Stream,
    frames: Frames,
}

impl Client {
    /// Connects, negotiates TLS, authenticates and sets the session up.
    pub(super) fn connect(target: &Target, purpose: Purpose) -> Result<Self> {
        Self::try_connect(target, purpose, target.tls.mode)
            .or_else(|failure| {
                // `prefer`: what TLS or a pg_hba line for TLS refuses, plain text may do.
                let plain = target.tls.mode == Mode::Prefer
                    && matches!(target.host, Host::Tcp(_))
                    && (failure.code() == "28000" || matches!(failure, Failure::Tls(_)));
                match plain {
                    true => Self::try_connect(target, purpose, Mode::Disable),
                    false => Err(failure),
                }
            })
            .map_err(|failure| {
                Error::from(failure).context(format!(
                    "while connecting to {} as {}",
                    target.address(),
                    target.user
                ))
            })
    }

    fn try_connect(
        target: &Target,
        purpose: Purpose,
        mode: Mode,
    ) -> std::result::Result<Self, Failure> {
        let socket = Socket::connect(target)?;
        socket.set_timeouts(Some(target.connect_timeout))?;
        let stream = match mode {
            Mode::Disable => Stream::Plain(socket),
            _ => negotiate(socket, target)?,
        };
        let mut client = Self { stream, frames: Frames::new(8 << 10) };
        auth::start(&mut client, target, purpose)?;
        client.stream.socket().set_timeouts(Some(ANSWER_TIMEOUT))?;
        Ok(client)
    }

    /// Runs one statement, or several separated by `;`, and returns the rows of all.
    pub(super) fn query(&mut self, sql: &str) -> std::result::Result<Vec<TextRow>, Failure> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.send(&out)?;
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            let (tag, body) = self.receive()?;
            match tag {
                b'D' => rows.push(parse_row(&body)?),
                b'E' => refused = Some(ServerError::parse(&body)),
                b'Z' => break,
                _ => {}
            }
        }
        match refused {
            Some(error) => Err(Failure::Server(error)),
            None => Ok(rows),
        }
    }

    /// Runs one statement and hands over its rows as they come, each as the body of a `DataRow`.
    /// `take` says whether it wants more; what it does not want is received and dropped. After an
    /// error of `take` the connection is of no use any more.
    pub(super) fn each_row(
        &mut self,
        sql: &str,
        take: &mut dyn FnMut(&[u8]) -> Result<bool>,
    ) -> std::result::Result<(), Failure> {
        self.frames.enlarge(ROWS_BUFFER_BYTES);
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.send(&out)?;
        let (mut refused, mut wants) = (None, true);
        loop {
            let (tag, body) = self.receive()?;
            match tag {
                b'D' if wants => wants = take(&body)?,
                b'E' => refused = Some(ServerError::parse(&body)),
                b'Z' => break,
                _ => {}
            }
        }
        match refused {
            Some(error) => Err(Failure::Server(error)),
            None => Ok(()),
        }
    }

    /// Runs a statement whose first column of the first row is the answer.
    pub(super) fn value(&mut self, sql: &str) -> std::result::Result<Option<String>, Failure> {
        Ok(self.query(sql)?.into_iter().next().and_then(|row| row.into_iter().next().flatten()))
    }

    /// Begins a replication stream, and gives up the client for the bare connection.
    pub(super) fn start_copy(
        mut self,
        sql: &str,
    ) -> std::result::Result<(Stream, Frames), Failure> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        self.send(&out)?;
        loop {
            let (tag, body) = self.receive()?;
            match tag {
                b'W' => return Ok((self.stream, self.frames)),
                b'E' => return Err(Failure::Server(ServerError::parse(&body))),
                b'Z' => return Err(unexpected(tag).into()),
                _ => {}
            }
        }
    }

    /// Sends bytes that are whole messages.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// The next message that is not a notice: its tag and its body.
    pub(super) fn receive(&mut self) -> std::result::Result<(u8, Bytes), Failure> {
        loop {
            while let Some((tag, body)) = self.frames.next()? {
                match tag {
                    b'N' | b'S' | b'A' => {}
                    _ => return Ok((tag, body)),
                }
            }
            if self.frames.fill(&mut self.stream)? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }

    /// The server's certificate, where the connection is encrypted.
    pub(super) fn server_certificate(&self) -> Option<Vec<u8>> {
        match &self.stream {
            Stream::Plain(_) => None,
            Stream::Tls(tls) => {
                tls.conn.peer_certificates().and_then(|chain| chain.first()).map(|c| c.to_vec())
            }
        }
    }

    /// Whether the connection is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }
}

/// A message that this protocol state does not have.
pub(super) fn unexpected(tag: u8) -> Error {
    Error::retry(format!("the server sent an unexpected message of type `{}`", tag.escape_ascii()))
}

fn negotiate(mut socket: Socket, target: &Target) -> std::result::Result<Stream, Failure> {
    let Host::Tcp(host) = &target.host else { return Ok(Stream::Plain(socket)) };
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request)?;
    // One byte exactly: what follows it is the handshake, and never read as plain text.
    let mut answer = [0];
    socket.read_exact(&mut answer)?;
    match (answer, target.tls.mode) {
        ([b'S'], _) => {
            let mut stream = tls::wrap(socket, host, &target.tls)?;
            stream.conn.complete_io(&mut stream.sock).map_err(Failure::Tls)?;
            Ok(Stream::Tls(Box::new(stream)))
        }
        ([b'N'], Mode::Prefer) => Ok(Stream::Plain(socket)),
        ([b'N'], _) => Err(Error::config("the server does not offer TLS")
            .remedy("set ssl = on at the server, or sslmode=disable in the source's url")
            .into()),
        _ => Err(unexpected(b'E').into()),
    }
}

fn parse_row(mut body: &[u8]) -> Result<TextRow> {
    let short = || Error::retry("the server sent a row that ends early");
    let count = body.try_get_u16().map_err(|_| short())?;
    let mut row = Vec::with_capacity(count.into());
    for _ in 0..count {
        let length = body.try_get_i32().map_err(|_| short())?;
        match usize::try_from(length) {
            Err(_) => row.push(None),
            Ok(length) => {
                let (text, rest) = body.split_at_checked(length).ok_or_else(short)?;
                row.push(Some(String::from_utf8_lossy(text).into_owned()));
                body = rest;
            }
        }
    }
    Ok(row)
}

/// Received bytes, cut into messages. It keeps what it has across a timeout, so none is lost.
pub(super) struct Frames {
    /// All of it is initialised; only the first `filled` bytes are received.
    buffer: BytesMut,
    filled: usize,
    capacity: usize,
}

impl Frames {
    /// A buffer that grows only for a message that is longer than `capacity` bytes.
    pub(super) fn new(capacity: usize) -> Self {
        Self { buffer: BytesMut::zeroed(capacity), filled: 0, capacity }
    }

    /// Makes later buffers this large.
    pub(super) fn enlarge(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    /// Reads once; 0 is the end of the stream.
    pub(super) fn fill(&mut self, stream: &mut impl Read) -> io::Result<usize> {
        self.make_room();
        let room = self.buffer.get_mut(self.filled..).unwrap_or_default();
        loop {
            match stream.read(room) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(read) => {
                    self.filled += read;
                    return Ok(read);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The length of a message whose end has not arrived, and its beginning. No memory is taken for
    /// the rest before the next `fill`.
    pub(super) fn unfinished(&self) -> Option<(usize, &[u8])> {
        let received = self.buffer.get(..self.filled)?;
        let length = message_length(received).ok()??;
        (length > received.len()).then_some((length, received))
    }

    /// Cuts off all whole messages at once.
    pub(super) fn take_whole(&mut self) -> Result<Bytes> {
        let received = self.buffer.get(..self.filled).unwrap_or_default();
        let mut end = 0;
        while let Some(length) = message_length(received.get(end..).unwrap_or_default())? {
            if end + length > received.len() {
                break;
            }
            end += length;
        }
        Ok(self.cut(end))
    }

    /// Cuts off the first message, if it is whole: its tag and its body.
    pub(super) fn next(&mut self) -> Result<Option<(u8, Bytes)>> {
        let received = self.buffer.get(..self.filled).unwrap_or_default();
        match message_length(received)? {
            Some(length) if length <= self.filled => {
                let mut message = self.cut(length);
                let tag = message.first().copied().unwrap_or_default();
                message.advance(5);
                Ok(Some((tag, message)))
            }
            _ => Ok(None),
        }
    }

    fn cut(&mut self, length: usize) -> Bytes {
        self.filled -= length;
        self.buffer.split_to(length).freeze()
    }

    /// Begins a new buffer when the rest of this one is too small to be worth a system call, or
    /// for the message whose beginning is here.
    fn make_room(&mut self) {
        let received = self.buffer.get(..self.filled).unwrap_or_default();
        let whole = message_length(received).ok().flatten().unwrap_or(0);
        let room = self.buffer.len() - self.filled;
        if whole <= self.buffer.len() && room > self.capacity / 4 {
            return;
        }
        let mut fresh =
            BytesMut::zeroed(whole.max(self.filled).max(self.capacity * 7 / 8) + self.capacity / 8);
        if let Some(head) = fresh.get_mut(..received.len()) {
            head.copy_from_slice(received);
        }
        self.buffer = fresh;
    }
}

/// The length of the message at the head with its tag; `None` where even that has not arrived.
fn message_length(bytes: &[u8]) -> Result<Option<usize>> {
    let Some((_, rest)) = bytes.split_first() else { return Ok(None) };
    let Some(length) = rest.first_chunk::<4>() else { return Ok(None) };
    // PostgreSQL's own limit of a message is 1 GiB.
    match u32::from_be_bytes(*length) {
        length @ 4..=0x4000_0000 => Ok(Some(length as usize + 1)),
        length => Err(Error::retry(format!("the server sent a message of {length} bytes"))),
    }
}

/// A connection, in plain text or encrypted.
pub(super) enum Stream {
    Plain(Socket),
    Tls(Box<StreamOwned<ClientConnection, Socket>>),
}

impl Stream {
    /// The socket below.
    pub(super) fn socket(&self) -> &Socket {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(tls) => &tls.sock,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.read(bytes),
            Stream::Tls(tls) => tls.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.write(bytes),
            Stream::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(socket) => socket.flush(),
            Stream::Tls(tls) => tls.flush(),
        }
    }
}

/// A connected socket.
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn connect(target: &Target) -> Result<Self> {
        match &target.host {
            Host::Unix(_) => {
                let stream = UnixStream::connect(target.address())
                    .class(Class::Retry, || "cannot connect to the unix socket")?;
                Ok(Socket::Unix(stream))
            }
            Host::Tcp(host) => {
                let stream = connect_tcp(host, target)?;
                // Where the system refuses one of these, it is not worth a connection.
                let _ = stream.set_nodelay(true);
                let _ = keep_alive(&stream);
                Ok(Socket::Tcp(stream))
            }
        }
    }

    /// Bounds each read and write.
    pub(super) fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
            Socket::Tcp(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
        }
    }

    /// Bounds each read.
    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(stream) => stream.set_read_timeout(timeout),
            Socket::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    /// Whether it is a TCP connection.
    pub(super) fn is_tcp(&self) -> bool {
        matches!(self, Socket::Tcp(_))
    }

    /// A second handle, with which another thread may end a read.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        match self {
            Socket::Unix(stream) => stream.try_clone().map(Socket::Unix),
            Socket::Tcp(stream) => stream.try_clone().map(Socket::Tcp),
        }
    }

    /// Closes the connection, whatever handles there are; what was written is still sent.
    pub(super) fn close(&self) {
        let _ = match self {
            Socket::Unix(stream) => stream.shutdown(Shutdown::Both),
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    /// Ends the reads of this socket, in every handle.
    pub(super) fn end_reads(&self) {
        let _ = match self {
            Socket::Unix(stream) => stream.shutdown(Shutdown::Read),
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Read),
        };
    }
}

fn connect_tcp(host: &str, target: &Target) -> Result<TcpStream> {
    let addresses = (host, target.port)
        .to_socket_addrs()
        .class(Class::Retry, || format!("cannot resolve the host `{host}`"))?;
    let mut last = Error::retry(format!("the host `{host}` has no address"));
    for address in addresses {
        match TcpStream::connect_timeout(&address, target.connect_timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Error::retry(format!("cannot reach {address}")).caused_by(error),
        }
    }
    Err(last)
}

fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    #[cfg(target_os = "linux")]
    sockopt::set_tcp_user_timeout(stream, USER_TIMEOUT_MS)?;
    Ok(())
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => stream.read(bytes),
            Socket::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => stream.write(bytes),
            Socket::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
