//! Several connections to one target, each with the changes of its own keys.
//!
//! A batch is cut at each barrier: a change that concerns a whole table that has a key. Between two
//! barriers the lanes write at the same time, and changes that keys link, be it over others, are in
//! one lane; the batch is done when all lanes are, so that nothing of the next one overtakes it.

use std::collections::HashMap;

use futures_util::future::join_all;
use tokio::time::Instant;

use crate::{
    change::{Batch, Change, Key, Keys, Op, Room},
    error::{Class, Error, Result},
    sink::{Capabilities, Outcome, Progress, Sink, Verdict, Written},
};

/// The open connections of one sink: at least one.
pub struct Lanes<'a>(&'a mut [Box<dyn Sink>]);

impl<'a> Lanes<'a> {
    /// Writes through all of `sinks`, of which there is at least one.
    pub fn new(sinks: &'a mut [Box<dyn Sink>]) -> Self {
        Self(sinks)
    }

    fn first(&self) -> Option<&dyn Sink> {
        self.0.first().map(|sink| &**sink)
    }

    fn first_mut(&mut self) -> Result<&mut Box<dyn Sink>> {
        self.0.first_mut().ok_or_else(|| Error::bug("a sink without a lane"))
    }

    /// What the target guarantees and allows.
    pub fn capabilities(&self) -> Capabilities {
        self.first().map_or_else(Capabilities::default, Sink::capabilities)
    }

    /// When the slowest wants the next batch.
    pub fn not_before(&self) -> Option<Instant> {
        self.0.iter().filter_map(|sink| sink.not_before()).max()
    }

    /// When what was taken and is not durable should be.
    pub fn flush_at(&self) -> Option<Instant> {
        self.first()?.flush_at()
    }

    /// Writes a batch that only carries progress.
    pub async fn write_nothing(&mut self, progress: &Progress) -> Result<Written> {
        self.first_mut()?.write(&Batch::default(), progress).await
    }

    /// Writes a batch in the order of its keys.
    pub async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        if self.0.len() < 2 || batch.changes.len() < 2 {
            return self.first_mut()?.write(batch, progress).await;
        }
        let mut outcomes: Vec<Outcome> = batch.changes.iter().map(|_| Outcome::Unknown).collect();
        for group in groups(&batch.changes, self.0.len()) {
            let done = self.write_group(&batch.changes, &group, progress).await?;
            let stopped = done.iter().any(|(_, outcome)| !matches!(outcome, Outcome::Durable));
            for (index, outcome) in done {
                if let Some(place) = outcomes.get_mut(index) {
                    *place = outcome;
                }
            }
            if stopped {
                return Ok(Written::Each(outcomes));
            }
        }
        Ok(Written::All)
    }

    /// Waits until the target tells what became of changes that it took before.
    pub async fn told(&mut self) {
        match self.0.first_mut() {
            Some(sink) => sink.told().await,
            None => std::future::pending().await,
        }
    }

    /// What the target tells of changes that it took before.
    pub async fn verdicts(&mut self, hold: bool) -> Result<Vec<(u64, Verdict)>> {
        self.first_mut()?.verdicts(hold).await
    }

    /// Lets the target follow its verdicts.
    pub async fn settle(&mut self, told: &[(u64, Verdict)]) -> Result<()> {
        self.first_mut()?.settle(told).await
    }

    /// Lets go of every connection.
    pub async fn close(&mut self) -> Result<()> {
        for sink in self.0.iter_mut() {
            sink.close().await?;
        }
        Ok(())
    }

    /// Writes what each lane has of a group at the same time. An outage of one lane leaves its
    /// changes unknown where another lane got something done.
    async fn write_group(
        &mut self,
        changes: &[Change],
        group: &[Vec<usize>],
        progress: &Progress,
    ) -> Result<Vec<(usize, Outcome)>> {
        let busy = self.0.iter_mut().zip(group).filter(|(_, lane)| !lane.is_empty());
        let writes = busy.map(|(sink, lane)| async move {
            let own = lane.iter().filter_map(|&index| changes.get(index).cloned()).collect();
            (lane, sink.write(&Batch { changes: own, position: None }, progress).await)
        });
        let (mut outcomes, mut failure) = (Vec::new(), None);
        for (lane, written) in join_all(writes).await {
            match of_each(written, lane.len()) {
                Ok(each) => outcomes.extend(lane.iter().copied().zip(each)),
                Err(error) if matches!(error.class(), Class::Retry | Class::Data) => {
                    outcomes.extend(lane.iter().map(|index| (*index, Outcome::Unknown)));
                    failure = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        let durable = outcomes.iter().any(|(_, outcome)| !matches!(outcome, Outcome::Unknown));
        match failure {
            Some(error) if !durable => Err(error),
            _ => Ok(outcomes),
        }
    }
}

fn of_each(written: Result<Written>, count: usize) -> Result<Vec<Outcome>> {
    match written? {
        Written::All => Ok((0..count).map(|_| Outcome::Durable).collect()),
        Written::Each(outcomes) => Ok(outcomes),
        Written::Until(_) => Err(Error::bug("a lane that does not say what is durable")),
    }
}

/// Runs between barriers: for each the indexes of the changes of every lane, in order.
fn groups(changes: &[Change], lanes: usize) -> Vec<Vec<Vec<usize>>> {
    let mut groups = Vec::new();
    let mut group = Group::default();
    for (index, change) in changes.iter().enumerate() {
        let keys = change.keys();
        let barrier = keys.is_whole() && change.op == Op::Truncate;
        if barrier || !group.takes(&keys) {
            groups.extend(std::mem::take(&mut group).into_lanes(lanes));
        }
        group.add(index, keys);
        if barrier {
            groups.extend(std::mem::take(&mut group).into_lanes(lanes));
        }
    }
    groups.extend(group.into_lanes(lanes));
    groups
}

/// Changes without a barrier between them, and which of them belong together.
#[derive(Default)]
struct Group {
    members: Vec<Member>,
    /// The last member that has each key.
    last: HashMap<Key, usize>,
    /// Whether the changes of a table are about all of it: a table without a key is one key.
    whole: HashMap<Room, bool>,
}

struct Member {
    index: usize,
    /// An earlier member that it belongs to; itself for the first.
    with: usize,
    key: Key,
}

impl Group {
    /// Whether the change is of the same sort as the others of its table: rows, or the whole.
    fn takes(&self, keys: &Keys) -> bool {
        self.whole.get(&keys.room).is_none_or(|whole| *whole == keys.is_whole())
    }

    fn add(&mut self, index: usize, keys: Keys) {
        self.whole.insert(keys.room, keys.is_whole());
        let own = self.members.len();
        let whole = keys.is_whole().then(|| keys.room.into());
        let all: Vec<Key> = keys.rows.iter().copied().chain(whole).chain(keys.named).collect();
        let key = all.first().copied().unwrap_or_default();
        self.members.push(Member { index, with: own, key });
        for key in all {
            if let Some(other) = self.last.insert(key, own) {
                self.join(other, own);
            }
        }
    }

    /// The first of the members that belong together with this one.
    fn first(&self, mut member: usize) -> usize {
        while let Some(found) = self.members.get(member).filter(|found| found.with != member) {
            member = found.with;
        }
        member
    }

    fn join(&mut self, one: usize, other: usize) {
        let (one, other) = (self.first(one), self.first(other));
        let (early, late) = (one.min(other), one.max(other));
        if let Some(late) = self.members.get_mut(late) {
            late.with = early;
        }
    }

    /// The indexes of each lane; nothing where there is no member.
    fn into_lanes(self, count: usize) -> Option<Vec<Vec<usize>>> {
        if self.members.is_empty() {
            return None;
        }
        let divisor = u128::try_from(count).unwrap_or(1).max(1);
        let mut lanes = vec![Vec::new(); count];
        for (member, Member { index, .. }) in self.members.iter().enumerate() {
            let key = self.members.get(self.first(member)).map_or(0, |first| first.key);
            let lane = usize::try_from(key % divisor).unwrap_or(0);
            if let Some(lane) = lanes.get_mut(lane) {
                lane.push(*index);
            }
        }
        Some(lanes)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::{
        change::{Before, Row, Shaped, Transaction, Value},
        schema::{Column, Identity, Table, Type},
    };

    /// A target that lets others go first so often before each change, as a schedule says.
    struct Scheduled {
        arrived: Arc<Mutex<Vec<(u64, Keys)>>>,
        turns: Vec<u8>,
        at: usize,
    }

    #[async_trait]
    impl Sink for Scheduled {
        fn capabilities(&self) -> Capabilities {
            Capabilities { lanes: true, ..Capabilities::default() }
        }

        async fn open(&mut self) -> Result<Option<Progress>> {
            Ok(None)
        }

        async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
            for change in &batch.changes {
                self.at += 1;
                for _ in 0..self.turns[self.at % self.turns.len()] {
                    tokio::task::yield_now().await;
                }
                self.arrived.lock().unwrap().push((change.offset, change.keys()));
            }
            Ok(Written::All)
        }

        async fn close(&mut self) -> Result<()> {
            Ok(())
        }
    }

    fn table(name: &str, keyed: bool) -> Arc<Table> {
        let id = Column {
            name: "id".into(),
            ty: Type::base(23, -1),
            primary_key: keyed,
            identity: true,
            nullable: None,
        };
        let (schema, name) = ("public".to_owned(), name.to_owned());
        Arc::new(Table { oid: 1, schema, name, identity: Identity::Full, columns: vec![id] })
    }

    /// Inserts, changes of the key and truncates of a few keys in three tables, one without a key;
    /// some have a key that rules gave them.
    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let tables = [table("a", true), table("b", true), table("bare", false)];
        let one = (0..3usize, 0..6u8, 0..6u8, 0..10u8, prop::option::of(0..9u8));
        prop::collection::vec(one, 2..60).prop_map(move |picks| {
            type Pick = (usize, u8, u8, u8, Option<u8>);
            let change = |(offset, (table, id, other, kind, key)): (usize, Pick)| {
                let row = |id: u8| Row::from_values([Value::Text(id.to_string().as_bytes())]);
                let key = key.map(|key| key.to_string());
                let shaped = key.map(|key| Shaped { key: Some(key), ..Shaped::default() });
                let (op, before, after) = match kind {
                    0 => (Op::Truncate, Before::Nothing, None),
                    1..=3 => (Op::Update, Before::Full(row(other)), Some(row(id))),
                    _ => (Op::Insert, Before::Nothing, Some(row(id))),
                };
                Change {
                    offset: offset as u64,
                    op,
                    index: 0,
                    closes_transaction: true,
                    transaction: Transaction::default(),
                    table: Some(Arc::clone(&tables[table])),
                    before,
                    after,
                    message: None,
                    shaped: shaped.map(Box::new),
                    backfill: None,
                }
            };
            picks.into_iter().enumerate().map(change).collect()
        })
    }

    proptest! {
        #[test]
        fn every_schedule_keeps_the_order_of_each_key(
            changes in changes(),
            lanes in 1..6usize,
            turns in prop::collection::vec(prop::collection::vec(0..6u8, 1..9), 6),
        ) {
            let arrived = Arc::new(Mutex::new(Vec::new()));
            let mut sinks: Vec<Box<dyn Sink>> = turns.into_iter().take(lanes).map(|turns| {
                let arrived = Arc::clone(&arrived);
                Box::new(Scheduled { arrived, turns, at: 0 }) as Box<dyn Sink>
            }).collect();
            let batch = Batch { changes, position: None };
            let progress = Progress { lineage: Uuid::nil(), epoch: 1, cursor: 99, retry_seq: 0 };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let written = runtime.block_on(Lanes::new(&mut sinks).write(&batch, &progress));
            prop_assert!(matches!(written, Ok(Written::All)));
            let arrived = arrived.lock().unwrap();
            prop_assert_eq!(arrived.len(), batch.changes.len());
            for (at, (first, keys)) in arrived.iter().enumerate() {
                for (second, others) in &arrived[at + 1..] {
                    let ordered = !keys.meets(others) || first < second;
                    prop_assert!(ordered, "{first} before {second}");
                }
            }
        }
    }

    #[test]
    fn a_key_that_rules_gave_keeps_its_changes_in_one_lane_and_is_no_barrier() {
        let keyed = table("a", true);
        let change = |offset: u64| Change {
            offset,
            op: Op::Insert,
            index: 0,
            closes_transaction: true,
            transaction: Transaction::default(),
            table: Some(Arc::clone(&keyed)),
            before: Before::Nothing,
            after: Some(Row::from_values([Value::Text(offset.to_string().as_bytes())])),
            message: None,
            backfill: None,
            shaped: Some(Box::new(Shaped {
                key: Some((offset % 20).to_string()),
                ..Shaped::default()
            })),
        };
        let changes: Vec<Change> = (0..100).map(change).collect();
        let groups = groups(&changes, 4);
        assert_eq!(groups.len(), 1);
        assert!(groups[0].iter().all(|lane| lane.len() >= 5), "{groups:?}");
        for key in 0..20 {
            let of_key = |lane: &&Vec<usize>| lane.iter().any(|index| index % 20 == key);
            assert_eq!(groups[0].iter().filter(of_key).count(), 1, "{groups:?}");
        }
    }

    #[test]
    fn keys_spread_over_the_lanes_and_barriers_stand_alone() {
        let keyed = table("a", true);
        let change = |offset: u64, id: Option<u64>| Change {
            offset,
            op: if id.is_some() { Op::Insert } else { Op::Truncate },
            index: 0,
            closes_transaction: true,
            transaction: Transaction::default(),
            table: Some(Arc::clone(&keyed)),
            before: Before::Nothing,
            after: id.map(|id| Row::from_values([Value::Text(id.to_string().as_bytes())])),
            message: None,
            shaped: None,
            backfill: None,
        };
        let mut changes: Vec<Change> = (0..100).map(|id| change(id, Some(id))).collect();
        changes.push(change(100, None));
        changes.push(change(101, Some(1)));
        let groups = groups(&changes, 4);
        assert_eq!(groups.len(), 3);
        assert!(groups[0].iter().all(|lane| lane.len() > 10), "{:?}", groups[0]);
        assert_eq!(groups[1].concat(), [100]);
        assert_eq!(groups[2].concat(), [101]);
    }
}
