//! Random transactions of several sessions, with savepoints, rollbacks, messages and changes of
//! tables, in any interleaving.

use fastrand::Rng;

use super::{Pair, run};
use crate::kit::Session;

const SESSIONS: usize = 4;
const STEPS: usize = 120;
const LOCKS: &str = "select count(*) from pg_locks where mode = 'AccessExclusiveLock'";

/// One session and what it may do next. Each writes to tables of its own, so that none waits for
/// another.
struct Writer {
    session: Session,
    number: usize,
    open: bool,
    savepoints: Vec<u32>,
    next: u32,
    prepared: Vec<String>,
}

impl Writer {
    fn step(&mut self, rng: &mut Rng) -> String {
        let Self { number, next, .. } = *self;
        self.next += 1_000;
        let rows = [1, 5, 150, 600][rng.usize(..4)];
        let body = ["'small'", "repeat(md5(i::text), 8)", "null"][rng.usize(..3)];
        let table = format!("t{number}");
        match rng.u32(..100) {
            0..30 => format!(
                "insert into {table} (id, body) select i, {body} from generate_series({next}, {next} + {rows}) i"
            ),
            30..38 => format!("update {table} set body = 'changed' where id % 5 = {}", rows % 5),
            38..42 => format!("update {table} set id = -id where id % 31 = {}", rows % 31),
            42..48 => format!("delete from {table} where id % 7 = {}", rows % 7),
            48..51 => format!("truncate {table}"),
            51..54 => format!(
                "insert into big{number} select i, repeat(md5(i::text), 3000) from generate_series({next}, {next} + 3) i"
            ),
            54..57 => format!("update big{number} set id = -id"),
            57..61 => {
                format!("select pg_logical_emit_message(true, 'inside', repeat('x', {rows} * 100))")
            }
            61..63 => "select pg_logical_emit_message(false, 'free', 'y')".into(),
            63..66 => format!("alter table {table} add c{next} int default {rows}"),
            66..76 => {
                self.savepoints.push(next);
                format!("savepoint s{next}")
            }
            76..84 => self.pop(rng, "rollback to"),
            84..88 => self.pop(rng, "release"),
            88..94 => self.end("commit"),
            94..97 => self.end("rollback"),
            _ => {
                let name = format!("p{number}_{next}");
                self.prepared.push(name.clone());
                self.end(&format!("prepare transaction '{name}'"))
            }
        }
    }

    fn pop(&mut self, rng: &mut Rng, verb: &str) -> String {
        if self.savepoints.is_empty() {
            return "select 1".into();
        }
        let at = rng.usize(..self.savepoints.len());
        let name = self.savepoints[at];
        self.savepoints.truncate(if verb == "release" { at } else { at + 1 });
        format!("{verb} savepoint s{name}")
    }

    fn end(&mut self, how: &str) -> String {
        self.open = false;
        self.savepoints.clear();
        how.to_owned()
    }

    async fn go(&mut self, rng: &mut Rng) {
        if !self.open {
            // What is prepared holds its locks, so it ends before the session writes again.
            for name in self.prepared.drain(..) {
                let how = if rng.bool() { "commit" } else { "rollback" };
                run(&self.session, &format!("{how} prepared '{name}'")).await;
            }
            self.open = true;
            run(&self.session, "begin").await;
        }
        let statement = self.step(rng);
        run(&self.session, &statement).await;
    }
}

#[tokio::test]
async fn random_transactions_give_the_same_changes_whether_they_are_streamed_or_not() {
    let seed = std::env::var("WALRACE_STREAM_SEED").ok().and_then(|text| text.parse().ok());
    let rounds = if seed.is_some() { 1 } else { 6 };
    let schema: Vec<_> = (0..SESSIONS)
        .map(|n| {
            let identity = ["default", "full"][n % 2];
            let parts = match n {
                2 => format!(
                    "partition by hash (id);
                     create table t{n}a partition of t{n} for values with (modulus 2, remainder 0);
                     create table t{n}b partition of t{n} for values with (modulus 2, remainder 1)"
                ),
                _ => String::new(),
            };
            format!(
                "create table t{n} (id int primary key, body text) {parts};
                 create table big{n} (id int primary key, body text);
                 alter table big{n} alter body set storage external;
                 alter table t{n} replica identity {identity};
                 alter table big{n} replica identity {identity}"
            )
        })
        .collect();
    let mut pair = Pair::begin("max_prepared_transactions = 20", &schema.join(";")).await;
    let (mut all, mut reconnects) = (0, 0);
    for round in 0..rounds {
        let seed = seed.unwrap_or(round + 1);
        println!("WALRACE_STREAM_SEED={seed}");
        let mut rng = Rng::with_seed(seed);
        let mut writers = Vec::new();
        for number in 0..SESSIONS {
            let session = pair.cluster.connect().await;
            let next = (round as u32 + 1) * 1_000_000;
            let (open, savepoints, prepared) = (false, Vec::new(), Vec::new());
            writers.push(Writer { session, number, open, savepoints, next, prepared });
        }
        let mut since = 0;
        for _ in 0..STEPS {
            let at = rng.usize(..SESSIONS);
            writers[at].go(&mut rng).await;
            since += 1;
            // In the middle of whatever is open, which the server then sends again. A table that
            // somebody changes holds up the look at what is published.
            if since >= 25 && pair.cluster.value(LOCKS).await == 0 {
                since = 0;
                reconnects += 1;
                all += pair.same().await.len();
                pair.reconnect().await;
            }
        }
        for writer in &mut writers {
            if writer.open {
                run(&writer.session, "commit").await;
            }
            for name in writer.prepared.drain(..) {
                run(&writer.session, &format!("commit prepared '{name}'")).await;
            }
        }
        all += pair.same().await.len();
    }
    let streamed = pair.streamed_count().await;
    println!(
        "{all} changes, {streamed} transactions were sent while they were open, {reconnects} times \
         over a new connection"
    );
    assert!(all > 1_000 && streamed > 0 && (reconnects > 0 || rounds == 1));
}
