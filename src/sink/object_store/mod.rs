//! Objects in a bucket or a local folder, each change in one of them whatever crashes. [`ledger`]
//! says how.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::Instant;

use self::{
    bucket::Bucket,
    ledger::{Content, Ledger},
    name::{End, Naming},
    parquet::{Line, Rows},
};
use super::{Capabilities, Carries, Context, Progress, Sink, With, Written};
use crate::{
    change::{Batch, Change},
    config::{self, Layout, ObjectCompression},
    error::{Class, Classify, Error, Result},
    format::Encoder,
    schema::Table,
};

mod bucket;
mod ledger;
mod name;
mod parquet;

/// The `object_store` sink.
pub(super) struct ObjectStore {
    encoder: Encoder,
    naming: Naming,
    layout: Layout,
    compression: ObjectCompression,
    roll_bytes_max: usize,
    roll: Duration,
    bucket: Bucket,
    ledger: Ledger,
    waiting: Waiting,
    context: Context,
}

/// Changes that are taken and not durable yet.
#[derive(Debug, Default)]
struct Waiting {
    groups: HashMap<Key, Group>,
    bytes: usize,
    since: Option<Instant>,
    /// Every change below it is durable.
    floor: u64,
    /// The progress that comes with the last of them.
    taken: Option<Progress>,
}

/// What shares an object: changes of one name and, where it has columns, one version of a table.
type Key = (String, Option<Arc<Table>>);

#[derive(Debug)]
struct Group {
    first: u64,
    last: u64,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Lines(Vec<u8>),
    Rows(Rows),
}

/// One change, ready for its group.
enum Piece {
    Line(Vec<u8>),
    Row(Line),
}

impl ObjectStore {
    pub(super) fn new(options: &config::ObjectStore, with: With) -> Result<Self> {
        let With { name, format, context, .. } = with;
        if options.layout == Layout::Parquet {
            with.refuse_types()?;
        }
        Ok(Self {
            encoder: with.encoder(format)?,
            naming: Naming::new(&options.name, &context.names)?,
            layout: options.layout,
            compression: options.compression,
            roll_bytes_max: options.roll_bytes_max,
            roll: Duration::from_millis(options.roll_ms_max),
            bucket: Bucket::new(options)?,
            ledger: Ledger::new(name),
            waiting: Waiting::default(),
            context: context.clone(),
        })
    }

    /// The changes in their form. One that has none refuses the batch as a whole, before anything
    /// of it is taken, so that it is split until the change stands alone.
    fn shape(&mut self, changes: &[Change]) -> Result<Vec<(Key, u64, Piece)>> {
        let mut pieces = Vec::with_capacity(changes.len());
        for change in changes {
            let stem = self.naming.stem(change)?;
            match self.layout {
                Layout::JsonLines => {
                    let mut line = Vec::new();
                    if self.encoder.encode(change, &mut line)? {
                        line.push(b'\n');
                        pieces.push(((stem, None), change.offset, Piece::Line(line)));
                    }
                }
                Layout::Parquet => {
                    let line = Piece::Row(Line::new(change)?);
                    pieces.push(((stem, change.table.clone()), change.offset, line));
                }
            }
        }
        Ok(pieces)
    }

    /// Progress only grows; a new epoch begins anew.
    fn check_forward(&self, batch: &Batch, progress: &Progress) -> Result<()> {
        let Some(known) = self.waiting.taken.or(self.ledger.progress()) else { return Ok(()) };
        let (old, new) = ((known.epoch, known.retry_seq), (progress.epoch, progress.retry_seq));
        let again = !batch.changes.is_empty() && new == old && progress.cursor <= known.cursor;
        if new.0 < old.0 || again {
            let name = self.bucket.name();
            return Err(Error::retry(format!(
                "{name} already has offset {} of epoch {}: another walrace writes it",
                known.cursor, known.epoch
            )));
        }
        Ok(())
    }

    fn is_due(&self, batch: &Batch, progress: &Progress) -> bool {
        let retried = self.ledger.progress().map_or(0, |known| known.retry_seq);
        batch.changes.is_empty()
            || retried != progress.retry_seq
            || self.waiting.bytes >= self.roll_bytes_max
            || self.waiting.since.is_some_and(|since| since.elapsed() >= self.roll)
    }

    async fn flush(&mut self, progress: Progress) -> Result<Written> {
        let known = self.waiting.taken.or(self.ledger.progress());
        let progress = match known.filter(|known| known.epoch == progress.epoch) {
            Some(known) => Progress { cursor: progress.cursor.max(known.cursor), ..progress },
            None => progress,
        };
        let number = self.ledger.next()?;
        // Gone if this is cancelled or fails: then it is opened again, and all of them come again.
        let waiting = std::mem::take(&mut self.waiting);
        let (ext, compression) = (self.extension(), self.compression);
        self.ledger.hold();
        let contents = tokio::task::spawn_blocking(move || {
            contents(waiting.groups, (number, ext), compression)
        });
        let contents =
            contents.await.class(Class::Bug, || "a task of the object store failed")??;
        self.ledger.commit(&self.bucket, (number, progress), contents).await?;
        Ok(Written::Until(progress.cursor))
    }

    fn extension(&self) -> &'static str {
        match (self.layout, self.compression) {
            (Layout::Parquet, _) => "parquet",
            (Layout::JsonLines, ObjectCompression::None) => "jsonl",
            (Layout::JsonLines, ObjectCompression::Zstd) => "jsonl.zst",
        }
    }
}

impl Waiting {
    fn take(&mut self, pieces: Vec<(Key, u64, Piece)>, durable: u64) {
        if self.since.is_none()
            && let Some(first) = pieces.iter().map(|(_, offset, _)| *offset).min()
        {
            self.since = Some(Instant::now());
            self.floor = durable.max(first);
        }
        for (key, offset, piece) in pieces {
            let table = key.1.clone();
            let group = self.groups.entry(key).or_insert_with(|| Group {
                first: offset,
                last: offset,
                body: match &piece {
                    Piece::Line(_) => Body::Lines(Vec::new()),
                    Piece::Row(_) => Body::Rows(Rows::of(table)),
                },
            });
            group.first = group.first.min(offset);
            group.last = group.last.max(offset);
            match (&mut group.body, piece) {
                (Body::Lines(lines), Piece::Line(line)) => {
                    self.bytes += line.len();
                    lines.extend_from_slice(&line);
                }
                (Body::Rows(rows), Piece::Row(line)) => {
                    self.bytes += line.bytes();
                    rows.push(line);
                }
                // A sink has one layout.
                _ => {}
            }
        }
    }
}

/// The objects of a flush. Blocks for as long as the compression takes.
fn contents(
    groups: HashMap<Key, Group>,
    (flush, ext): (u64, &str),
    compression: ObjectCompression,
) -> Result<Vec<Content>> {
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by(|(left, a), (right, b)| (&left.0, a.first).cmp(&(&right.0, b.first)));
    let mut taken = HashSet::new();
    let mut contents = Vec::with_capacity(groups.len());
    for ((stem, _), Group { first, last, body }) in groups {
        let mut end = End { first, last, flush, ext, again: 0 };
        while !taken.insert(end.name(&stem)) {
            end.again += 1;
        }
        let bytes = match body {
            Body::Lines(lines) if compression == ObjectCompression::None => lines,
            Body::Lines(lines) => zstd::encode_all(&lines[..], zstd::DEFAULT_COMPRESSION_LEVEL)
                .class(Class::Bug, || "cannot compress lines")?,
            Body::Rows(rows) => rows.encode()?,
        };
        contents.push(Content { name: end.name(&stem), bytes: bytes.into() });
    }
    Ok(contents)
}

#[async_trait]
impl Sink for ObjectStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: true,
            carries: Carries::Text,
            routes: true,
            ..Capabilities::default()
        }
    }

    fn flush_at(&self) -> Option<Instant> {
        self.waiting.since.map(|since| since + self.roll)
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.waiting = Waiting::default();
        self.bucket.connect(true)?;
        self.ledger.open(&self.bucket).await
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        self.ledger.next()?;
        // What progress says is there is there.
        if self.waiting.taken.is_none() && self.ledger.progress() == Some(*progress) {
            return Ok(Written::All);
        }
        self.check_forward(batch, progress)?;
        let pieces = self.shape(&batch.changes)?;
        let filtered = batch.changes.len() - pieces.len();
        let known = self.ledger.progress().filter(|known| known.epoch == progress.epoch);
        self.waiting.take(pieces, known.map_or(0, |known| known.cursor));
        let due = self.is_due(batch, progress);
        if !batch.changes.is_empty() {
            self.waiting.taken = Some(*progress);
        }
        let written = match (due, self.waiting.since) {
            (false, Some(_)) => Written::Until(self.waiting.floor),
            // Nothing but what the format has no message for.
            (false, None) => Written::Until(progress.cursor),
            (true, _) => match self.flush(*progress).await? {
                Written::Until(cursor) if cursor == progress.cursor => Written::All,
                more => more,
            },
        };
        self.context.count_filtered(filtered as u64);
        Ok(written)
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        match self.bucket.connect(false)? {
            true => self.ledger.peek(&self.bucket).await,
            false => Ok(None),
        }
    }

    async fn close(&mut self) -> Result<()> {
        if let (Some(progress), Ok(_)) = (self.waiting.taken, self.ledger.next()) {
            self.flush(progress).await?;
        }
        Ok(())
    }
}
