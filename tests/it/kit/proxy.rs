//! A TCP connection that slows, stalls and breaks.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

/// What the proxy does to its connections now.
#[derive(Clone, Copy, Debug, Default)]
struct Rules {
    /// Each piece of data waits this long.
    delay: Duration,
    /// Nothing passes, nothing is read, nothing is closed: a network that swallows packets.
    stalled: bool,
    /// New connections are closed at once.
    refusing: bool,
    /// Connections made before the last cut are closed.
    cuts: u64,
}

/// Forwards a port of its own to a server, and harms what passes as a test asks.
#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    rules: watch::Sender<Rules>,
    passed: Arc<AtomicU64>,
    cut_at: Arc<AtomicU64>,
    _server: JoinSet<()>,
}

impl Proxy {
    /// Forwards to `port` of this machine.
    pub(crate) async fn to(port: u16) -> Self {
        let target = SocketAddr::from(([127, 0, 0, 1], port));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let own = listener.local_addr().expect("its address").port();
        let (rules, watched) = watch::channel(Rules::default());
        let link = Link {
            rules: watched,
            cutter: rules.clone(),
            passed: Arc::new(AtomicU64::new(0)),
            cut_at: Arc::new(AtomicU64::new(u64::MAX)),
        };
        let (passed, cut_at) = (Arc::clone(&link.passed), Arc::clone(&link.cut_at));
        let mut server = JoinSet::new();
        server.spawn(accept(listener, target, link));
        Self { port: own, rules, passed, cut_at, _server: server }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Bytes that went from the server to the client.
    pub(crate) fn bytes_passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }

    /// Breaks every connection; new ones are let through.
    pub(crate) fn cut(&self) {
        self.rules.send_modify(|rules| rules.cuts += 1);
    }

    /// Breaks every connection once so many more bytes have come from the server.
    pub(crate) fn cut_after_bytes(&self, bytes: u64) {
        self.cut_at.store(self.bytes_passed() + bytes, Ordering::SeqCst);
    }

    /// Breaks every connection and closes new ones at once, or lets them through again.
    pub(crate) fn refuse(&self, refusing: bool) {
        self.rules.send_modify(|rules| {
            rules.refusing = refusing;
            rules.cuts += u64::from(refusing);
        });
    }

    /// Lets nothing pass and closes nothing, or lets it pass again.
    pub(crate) fn stall(&self, stalled: bool) {
        self.rules.send_modify(|rules| rules.stalled = stalled);
    }

    /// Each piece of data waits this long, in both directions.
    pub(crate) fn delay(&self, delay: Duration) {
        self.rules.send_modify(|rules| rules.delay = delay);
    }
}

/// What a connection shares with its proxy.
#[derive(Clone, Debug)]
struct Link {
    rules: watch::Receiver<Rules>,
    cutter: watch::Sender<Rules>,
    passed: Arc<AtomicU64>,
    cut_at: Arc<AtomicU64>,
}

async fn accept(listener: TcpListener, target: SocketAddr, link: Link) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        if !link.rules.borrow().refusing {
            connections.spawn(connect(client, target, link.clone()));
        }
    }
}

async fn connect(client: TcpStream, target: SocketAddr, link: Link) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let mut rules = link.rules.clone();
    let cuts = rules.borrow().cuts;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // Whichever direction ends first, or a cut, drops both sockets.
    tokio::select! {
        _ = pump(from_client, to_server, link.clone(), Direction::Up) => {}
        _ = pump(from_server, to_client, link, Direction::Down) => {}
        _ = rules.wait_for(|rules| rules.cuts != cuts) => {}
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut link: Link,
    direction: Direction,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let _ = link.rules.wait_for(|rules| !rules.stalled).await;
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let _ = link.rules.wait_for(|rules| !rules.stalled).await;
        let delay = link.rules.borrow().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if direction == Direction::Up {
            to.write_all(&buffer[..read]).await?;
            continue;
        }
        let left = link.cut_at.load(Ordering::SeqCst) - link.passed.load(Ordering::SeqCst);
        let allowed = read.min(usize::try_from(left).unwrap_or(usize::MAX));
        to.write_all(&buffer[..allowed]).await?;
        link.passed.fetch_add(allowed as u64, Ordering::SeqCst);
        if allowed < read {
            link.cut_at.store(u64::MAX, Ordering::SeqCst);
            link.cutter.send_modify(|rules| rules.cuts += 1);
            return Ok(());
        }
    }
}
