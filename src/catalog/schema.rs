//! The history of schemas: which version of each table's descriptor began where.
//!
//! It follows from the journal alone: going through the changes in their order, a version begins
//! with the first change whose descriptor differs from that of the one before it of the same table.
//! What was found and how far the journal was gone through are written down together, so a crash
//! between any two steps neither loses a version nor makes one up; what comes after is gone through
//! again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use sqlx::{Row, sqlite::SqliteRow};
use uuid::Uuid;

use super::{By, Catalog, failed};
use crate::{
    change::{Change, Lsn, Op, Position, Timestamp},
    error::Result,
    schema::{Table, differences},
    sqlite::{integer, unsigned},
};

/// How the beginning of a version is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Known {
    /// The stream carried it from this change on.
    Observed,
    /// The oldest change that was left carried it already.
    ObservedLater,
}

impl Known {
    /// As the catalog has it.
    pub fn word(self) -> &'static str {
        match self {
            Known::Observed => "observed",
            Known::ObservedLater => "observed_later",
        }
    }
}

/// One version of a table's descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// From 1, for each name of a table.
    pub number: u32,
    /// The descriptor.
    pub table: Arc<Table>,
    /// The offset of the first change that carries it.
    pub offset: u64,
    /// The position of that change.
    pub position: Position,
    /// When that was committed.
    pub at: Timestamp,
    /// How this is known.
    pub known: Known,
}

/// Descriptors that are known to be of the newest version of their table.
const POINTERS_MAX: usize = 4096;

/// Finds where versions begin in changes that are shown to it in their order.
#[derive(Debug, Default)]
pub struct Tracker {
    newest: HashMap<String, (u32, Arc<Table>)>,
    /// By address; each is kept alive, so that no other comes to lie there.
    pointers: HashMap<usize, Arc<Table>>,
    last: Option<Arc<Table>>,
}

impl Tracker {
    /// Goes on from what is known.
    pub fn new(versions: &[Version]) -> Self {
        let mut tracker = Self::default();
        for version in versions {
            let newest = (version.number, Arc::clone(&version.table));
            tracker.newest.insert(version.table.full_name(), newest);
        }
        tracker
    }

    /// Whether changes with this descriptor begin nothing.
    pub fn knows(&self, table: &Table) -> bool {
        let newest = self.newest.get(&table.full_name());
        newest.is_some_and(|(_, newest)| differences(newest, table).is_empty())
    }

    /// The version that begins with this change, where one does. Rows of a backfill carry what the
    /// table is like when they are read, which the stream comes to later: they begin a version only
    /// of a table that has none.
    pub fn see(&mut self, change: &Change, timeline: u32) -> Option<Version> {
        let table = change.table.as_ref()?;
        if self.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, table)) {
            return None;
        }
        let pointer = Arc::as_ptr(table) as usize;
        if !self.pointers.contains_key(&pointer) {
            let version = self.meet(change, table, timeline);
            if version.is_some() {
                self.last = None;
                return version;
            }
            if change.op == Op::Read {
                return None;
            }
            if self.pointers.len() >= POINTERS_MAX {
                self.pointers.clear();
            }
            self.pointers.insert(pointer, Arc::clone(table));
        }
        self.last = Some(Arc::clone(table));
        None
    }

    fn meet(&mut self, change: &Change, table: &Arc<Table>, timeline: u32) -> Option<Version> {
        let name = table.full_name();
        let before = self.newest.get(&name);
        let same = before.is_some_and(|(_, newest)| differences(newest, table).is_empty());
        if same || before.is_some() && change.op == Op::Read {
            return None;
        }
        let number = before.map_or(1, |(number, _)| number + 1);
        self.newest.insert(name, (number, Arc::clone(table)));
        self.pointers.clear();
        Some(Version {
            number,
            table: Arc::clone(table),
            offset: change.offset,
            position: change.position(timeline),
            at: change.transaction.commit_time,
            known: Known::Observed,
        })
    }
}

impl Catalog {
    /// Every version of every table of a source, by name and number.
    pub async fn schema_versions(&self, source: &str, lineage: Uuid) -> Result<Vec<Version>> {
        let failed = |error| failed("read the schemas of", source, error);
        let rows = sqlx::query(
            "SELECT version, offset, timeline, lsn, position, at, known, descriptor
             FROM schema_version WHERE source = ? AND lineage = ?
             ORDER BY schema_name, table_name, version",
        )
        .bind(source)
        .bind(lineage.to_string())
        .fetch_all(&self.pool)
        .await
        .map_err(failed)?;
        rows.iter().map(version).collect::<sqlx::Result<_>>().map_err(failed)
    }

    /// Up to which offset the journal of a source has been gone through.
    pub async fn schema_scanned(&self, source: &str, lineage: Uuid) -> Result<u64> {
        let failed = |error| failed("read the schemas of", source, error);
        let row = sqlx::query("SELECT to_offset FROM schema_scan WHERE source = ? AND lineage = ?")
            .bind(source)
            .bind(lineage.to_string())
            .fetch_optional(&self.pool)
            .await
            .map_err(failed)?;
        row.map_or(Ok(0), |row| row.try_get(0).map(unsigned)).map_err(failed)
    }

    /// Writes down, both or neither, the versions that were found and how far the journal was gone
    /// through.
    pub async fn record_schemas(
        &self,
        (source, lineage): (&str, Uuid),
        versions: &[Version],
        scanned: u64,
    ) -> Result<()> {
        let failed = |error| failed("write down the schemas of", source, error);
        let lineage = lineage.to_string();
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        for version in versions {
            let table = &version.table;
            sqlx::query(
                "INSERT OR REPLACE INTO schema_version (source, lineage, schema_name, table_name,
                     version, offset, timeline, lsn, position, at, known, descriptor)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )
            .bind(source)
            .bind(&lineage)
            .bind(&table.schema)
            .bind(&table.name)
            .bind(version.number)
            .bind(integer(version.offset))
            .bind(version.position.timeline)
            .bind(integer(version.position.lsn.0))
            .bind(version.position.index)
            .bind(version.at.0)
            .bind(version.known.word())
            .bind(serde_json::to_string(&**table).unwrap_or_default())
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        }
        sqlx::query("INSERT OR REPLACE INTO schema_scan VALUES (?, ?, ?)")
            .bind(source)
            .bind(&lineage)
            .bind(integer(scanned))
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    /// Forgets what was found at or after `end`: the journal that is there ends before it, because
    /// an older one was put back.
    pub async fn forget_schemas(&self, (source, lineage): (&str, Uuid), end: u64) -> Result<()> {
        let failed = |error| failed("put back the schemas of", source, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        for sql in [
            "DELETE FROM schema_version WHERE offset >= ?3 AND source = ?1 AND lineage = ?2",
            "UPDATE schema_scan SET to_offset = ?3
             WHERE to_offset > ?3 AND source = ?1 AND lineage = ?2",
        ] {
            sqlx::query(sql)
                .bind(source)
                .bind(lineage.to_string())
                .bind(integer(end))
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)
    }

    /// The digests of descriptors of a source that somebody accepted, with who and why, by table.
    pub async fn accepted_schemas(
        &self,
        source: &str,
    ) -> Result<BTreeMap<(String, String), String>> {
        let failed = |error| failed("read what was accepted of", source, error);
        let rows =
            sqlx::query("SELECT table_name, digest, by FROM schema_accepted WHERE source = ?")
                .bind(source)
                .fetch_all(&self.pool)
                .await
                .map_err(failed)?;
        let pair = |row: &SqliteRow| Ok(((row.try_get(0)?, row.try_get(1)?), row.try_get(2)?));
        rows.iter().map(pair).collect::<sqlx::Result<_>>().map_err(failed)
    }

    /// Accepts a descriptor of a table, whatever it breaks; written down with who and why.
    pub async fn accept_schema(&self, source: &str, table: &Table, by: &By) -> Result<()> {
        let name = table.full_name();
        let failed = |error| failed("accept a schema of", &name, error);
        let detail = serde_json::json!({"table": name, "why": by.why}).to_string();
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        sqlx::query("INSERT OR REPLACE INTO schema_accepted VALUES (?, ?, ?, ?, ?)")
            .bind(source)
            .bind(&name)
            .bind(table.digest())
            .bind(by.to_string())
            .bind(Timestamp::now().0)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        let event = (by.who.as_str(), "accept_schema", source, detail.as_str());
        super::insert_event(&mut transaction, event).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }
}

fn version(row: &SqliteRow) -> sqlx::Result<Version> {
    let descriptor: String = row.try_get("descriptor")?;
    let table: Table =
        serde_json::from_str(&descriptor).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    let later = row.try_get::<String, _>("known")? == Known::ObservedLater.word();
    Ok(Version {
        number: row.try_get("version")?,
        table: Arc::new(table),
        offset: unsigned(row.try_get("offset")?),
        position: Position {
            timeline: row.try_get("timeline")?,
            lsn: Lsn(unsigned(row.try_get("lsn")?)),
            index: row.try_get("position")?,
        },
        at: Timestamp(row.try_get("at")?),
        known: if later { Known::ObservedLater } else { Known::Observed },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        change::{Before, Row, Transaction},
        schema::{Column, Identity, Type},
    };

    fn table(columns: &[&str]) -> Arc<Table> {
        let column = |name: &&str| Column {
            name: (*name).to_owned(),
            ty: Type { name: "text".into(), ..Type::base(25, -1) },
            primary_key: *name == "id",
            identity: *name == "id",
            nullable: None,
        };
        let columns = columns.iter().map(column).collect();
        let (schema, name) = ("public".into(), "t".into());
        Arc::new(Table { oid: 1, schema, name, identity: Identity::Default, columns })
    }

    fn change(offset: u64, op: Op, table: &Arc<Table>) -> Change {
        Change {
            offset,
            op,
            index: 0,
            closes_transaction: true,
            transaction: Transaction::default(),
            table: Some(Arc::clone(table)),
            before: Before::Nothing,
            after: Some(Row::from_values([])),
            message: None,
            shaped: None,
            backfill: None,
        }
    }

    #[test]
    fn a_version_begins_where_the_descriptor_differs_also_where_an_old_one_comes_back() {
        let (one, two) = (table(&["id"]), table(&["id", "a"]));
        let again = table(&["id"]);
        let mut tracker = Tracker::default();
        let begins: Vec<_> = [&one, &one, &two, &two, &again, &one, &again]
            .into_iter()
            .zip(0..)
            .filter_map(|(table, offset)| tracker.see(&change(offset, Op::Insert, table), 1))
            .map(|version| (version.number, version.offset))
            .collect();
        assert_eq!(begins, [(1, 0), (2, 2), (3, 4)]);
        assert!(tracker.knows(&one) && !tracker.knows(&two));
    }

    #[test]
    fn rows_of_a_backfill_begin_a_version_only_of_a_table_that_has_none() {
        let (one, two) = (table(&["id"]), table(&["id", "a"]));
        let mut tracker = Tracker::default();
        assert!(tracker.see(&change(0, Op::Read, &one), 1).is_some());
        assert!(tracker.see(&change(1, Op::Insert, &one), 1).is_none());
        assert!(tracker.see(&change(2, Op::Read, &two), 1).is_none());
        assert!(tracker.see(&change(3, Op::Insert, &one), 1).is_none());
        assert!(tracker.see(&change(4, Op::Insert, &two), 1).is_some());
    }

    #[tokio::test]
    async fn what_was_found_survives_and_what_lies_beyond_the_journal_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).await.unwrap();
        let (lineage, mut tracker) = (Uuid::new_v4(), Tracker::default());
        let versions: Vec<_> = [(0, table(&["id"])), (7, table(&["id", "a"]))]
            .iter()
            .filter_map(|(offset, table)| tracker.see(&change(*offset, Op::Insert, table), 1))
            .collect();
        catalog.record_schemas(("app", lineage), &versions, 9).await.unwrap();
        assert_eq!(catalog.schema_versions("app", lineage).await.unwrap(), versions);
        assert_eq!(catalog.schema_scanned("app", lineage).await.unwrap(), 9);
        assert!(catalog.schema_versions("app", Uuid::new_v4()).await.unwrap().is_empty());
        catalog.forget_schemas(("app", lineage), 7).await.unwrap();
        assert_eq!(catalog.schema_versions("app", lineage).await.unwrap(), versions[..1]);
        assert_eq!(catalog.schema_scanned("app", lineage).await.unwrap(), 7);
    }
}
