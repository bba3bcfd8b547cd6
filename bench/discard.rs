//! The ceiling: a reader of the replication stream that keeps nothing.
//!
//! `discard HOST PORT DATABASE SLOT END_LSN PERIOD_US` reads once in a period, looks at the heads
//! of the messages to know where it is, throws everything away, and ends at END_LSN. HOST is the
//! folder of a unix socket or an address. What it gains on `pg_recvlogical` is what a reader of the
//! same socket can gain, but for chance: over TCP the sender's congestion window decides, and it
//! has been seen above the unix socket. `bench/run.py` compiles it with rustc alone.

use std::{
    env,
    error::Error,
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [host, port, database, slot, end, period] = arguments.as_slice() else {
        return Err("usage: discard HOST PORT DATABASE SLOT END_LSN PERIOD_US".into());
    };
    let end = parse_lsn(end)?;
    let period = Duration::from_micros(period.parse()?);
    if host.starts_with('/') {
        let socket = UnixStream::connect(format!("{host}/.s.PGSQL.{port}"))?;
        discard(socket, database, slot, end, period)
    } else {
        let socket = TcpStream::connect(format!("{host}:{port}"))?;
        socket.set_nodelay(true)?;
        discard(socket, database, slot, end, period)
    }
}

/// `pg_lsn` in its text form, such as `0/16B3748`.
fn parse_lsn(text: &str) -> Result<u64, Box<dyn Error>> {
    let (high, low) = text.split_once('/').ok_or("not an LSN")?;
    Ok(u64::from_str_radix(high, 16)? << 32 | u64::from_str_radix(low, 16)?)
}

fn discard(
    mut socket: impl Read + Write,
    database: &str,
    slot: &str,
    end: u64,
    period: Duration,
) -> Result<(), Box<dyn Error>> {
    let mut startup = 196_608u32.to_be_bytes().to_vec();
    for word in ["user", "postgres", "database", database, "replication", "database", ""] {
        startup.extend_from_slice(word.as_bytes());
        startup.push(0);
    }
    socket.write_all(&(startup.len() as u32 + 4).to_be_bytes())?;
    socket.write_all(&startup)?;
    let mut buffer = vec![0; 1 << 20];
    let (mut filled, mut streaming) = (0, false);
    loop {
        let begun = Instant::now();
        match socket.read(&mut buffer[filled..])? {
            0 => return Err("the server closed the connection".into()),
            read => filled += read,
        }
        let mut at = 0;
        while let Some(&[tag, a, b, c, d]) = buffer[at..filled].first_chunk() {
            let length = u32::from_be_bytes([a, b, c, d]) as usize + 1;
            let Some(body) = buffer[at..filled].get(5..length) else { break };
            match (tag, body) {
                (b'E', _) => return Err(String::from_utf8_lossy(body).into()),
                (b'Z', _) => start(&mut socket, slot)?,
                (b'W', _) => streaming = true,
                // XLogData begins with the LSN of its message, a keepalive with the server's end.
                (b'd', [b'w' | b'k', lsn @ ..]) => {
                    let lsn = lsn.first_chunk().ok_or("a short message")?;
                    if u64::from_be_bytes(*lsn) >= end {
                        return Ok(());
                    }
                }
                _ => {}
            }
            at += length;
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
        if streaming {
            thread::sleep(period.saturating_sub(begun.elapsed()));
        }
    }
}

fn start(socket: &mut impl Write, slot: &str) -> Result<(), Box<dyn Error>> {
    let sql = format!(
        "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0 \
         (proto_version '1', publication_names 'bench')\0"
    );
    socket.write_all(b"Q")?;
    socket.write_all(&(sql.len() as u32 + 4).to_be_bytes())?;
    Ok(socket.write_all(sql.as_bytes())?)
}
