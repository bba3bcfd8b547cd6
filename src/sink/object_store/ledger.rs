//! The ledger of a sink, `_walrace/<sink>/<number>.json` in the bucket, and how objects become
//! visible with it. It needs nothing but "write this object if it is not there yet".
//!
//! ```text
//! commit:  staged/… (nobody reads them) -> entry N+1, if it is not there -> is it the newest?
//!          -> each object under its own name, if it is not there -> delete staged/…
//! open:    newest entry N -> finish its objects from staged/… -> entry N+1, which is empty
//!          -> delete whatever else is staged
//! ```
//!
//! Writing an entry is the decision: before it none of its objects can be seen, after it all of
//! them will be, under names that stand in it, and the progress in it counts. So a change is in one
//! object, whatever crashes. The number is the fence: of two processes one gets the next number,
//! and the other one has to open again. A process that slept so long that its next number was
//! written and deleted meanwhile finds that its entry is not the newest, and stops before any
//! object of its own can be seen.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::bucket::Bucket;
use crate::{
    error::{Class, Classify, Error, Result},
    failpoint,
    sink::Progress,
};

/// Entries that are kept, for people.
const ENTRIES: u64 = 100;

/// One flush.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    progress: Option<Progress>,
    objects: Vec<Object>,
}

/// An object of a flush.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Object {
    /// Below the prefix.
    name: String,
    /// Where its bytes are until it is visible.
    staged: String,
}

/// Bytes that shall be seen under a name.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) name: String,
    pub(super) bytes: Bytes,
}

/// What was committed, as this process knows it.
#[derive(Debug)]
pub(super) struct Ledger {
    folder: String,
    /// The newest entry is ours and has this number; `None` until opened, and after a failure.
    number: Option<u64>,
    progress: Option<Progress>,
}

impl Ledger {
    pub(super) fn new(sink: &str) -> Self {
        Self { folder: format!("_walrace/{sink}"), number: None, progress: None }
    }

    /// The number of the next flush; an error where it is not open.
    pub(super) fn next(&self) -> Result<u64> {
        let number = self.number.ok_or_else(|| Error::retry("the object store is not open"))?;
        Ok(number + 1)
    }

    /// What the newest entry says.
    pub(super) fn progress(&self) -> Option<Progress> {
        self.progress
    }

    /// Reads the progress and changes nothing.
    pub(super) async fn peek(&self, bucket: &Bucket) -> Result<Option<Progress>> {
        Ok(match self.newest(bucket).await? {
            Some(number) => self.read(bucket, number).await?.progress,
            None => None,
        })
    }

    /// Finishes what was committed, takes the ledger over, and clears up.
    pub(super) async fn open(&mut self, bucket: &Bucket) -> Result<Option<Progress>> {
        self.number = None;
        let newest = self.newest(bucket).await?;
        let last = match newest {
            Some(number) => self.read(bucket, number).await?,
            None => Entry::default(),
        };
        for object in &last.objects {
            // What is staged is deleted only once the object can be seen.
            if let Some(bytes) = bucket.get(&object.staged).await? {
                publish(bucket, object, bytes).await?;
            }
        }
        failpoint::reach("object_store::finished");
        let number = newest.map_or(0, |number| number + 1);
        let claim = Entry { progress: last.progress, objects: Vec::new() };
        self.enter(bucket, number, &claim).await?;
        failpoint::reach("object_store::claimed");
        self.clear(bucket, number).await?;
        self.progress = last.progress;
        self.number = Some(number);
        Ok(self.progress)
    }

    /// Makes the contents visible and stores the progress, both or neither. After a failure, or
    /// when it is cancelled, it has to be opened again.
    pub(super) async fn commit(
        &mut self,
        bucket: &Bucket,
        (number, progress): (u64, Progress),
        contents: Vec<Content>,
    ) -> Result<()> {
        self.number = None;
        let staged = format!("{}/staged/{number:010}-{:016x}", self.folder, fastrand::u64(..));
        let mut objects = Vec::with_capacity(contents.len());
        for (index, content) in contents.iter().enumerate() {
            let object = Object { name: content.name.clone(), staged: format!("{staged}-{index}") };
            if !bucket.create(&object.staged, content.bytes.clone()).await? {
                return Err(Error::retry(format!("{} is there already", object.staged)));
            }
            objects.push(object);
        }
        failpoint::reach("object_store::staged");
        let entry = Entry { progress: Some(progress), objects };
        self.enter(bucket, number, &entry).await?;
        failpoint::reach("object_store::entered");
        for (object, content) in entry.objects.iter().zip(contents) {
            publish(bucket, object, content.bytes).await?;
        }
        failpoint::reach("object_store::published");
        if let Some(old) = number.checked_sub(ENTRIES) {
            bucket.delete(&self.entry_name(old)).await?;
        }
        self.progress = Some(progress);
        self.number = Some(number);
        Ok(())
    }

    /// Closes it until a commit is done, so that one which is cancelled has to be opened again.
    pub(super) fn hold(&mut self) {
        self.number = None;
    }

    /// Writes an entry, and makes sure that it is the next one and no forgotten number.
    async fn enter(&self, bucket: &Bucket, number: u64, entry: &Entry) -> Result<()> {
        let name = self.entry_name(number);
        let bytes = serde_json::to_vec(entry).class(Class::Bug, || "an entry has no JSON")?;
        let written = bucket.create(&name, bytes.into()).await?;
        if written && self.newest(bucket).await? == Some(number) {
            return Ok(());
        }
        if written {
            bucket.delete(&name).await?;
        }
        Err(Error::retry(format!("another walrace writes {} of {}", self.folder, bucket.name()))
            .remedy("give each sink a name or a prefix of its own"))
    }

    async fn newest(&self, bucket: &Bucket) -> Result<Option<u64>> {
        Ok(self.numbers(bucket).await?.into_iter().max())
    }

    async fn numbers(&self, bucket: &Bucket) -> Result<Vec<u64>> {
        let names = bucket.list(&self.folder).await?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect())
    }

    async fn read(&self, bucket: &Bucket, number: u64) -> Result<Entry> {
        let name = self.entry_name(number);
        let Some(bytes) = bucket.get(&name).await? else {
            return Err(Error::retry(format!("{name} of {} has just gone", bucket.name())));
        };
        serde_json::from_slice(&bytes)
            .class(Class::Damaged, || format!("{name} of {} is no entry of ours", bucket.name()))
    }

    /// Deletes what nobody can commit any more: whatever is staged for this number or below.
    async fn clear(&self, bucket: &Bucket, number: u64) -> Result<()> {
        let folder = format!("{}/staged", self.folder);
        for name in bucket.list(&folder).await? {
            let of = name.split('-').next().and_then(|text| text.parse::<u64>().ok());
            if of.is_some_and(|of| of <= number) {
                bucket.delete(&format!("{folder}/{name}")).await?;
            }
        }
        for old in self.numbers(bucket).await? {
            if old.saturating_add(ENTRIES) <= number {
                bucket.delete(&self.entry_name(old)).await?;
            }
        }
        Ok(())
    }

    fn entry_name(&self, number: u64) -> String {
        format!("{}/{number:010}.json", self.folder)
    }
}

/// One that is there already has the same bytes: it was published before a crash.
async fn publish(bucket: &Bucket, object: &Object, bytes: Bytes) -> Result<()> {
    let Object { name, staged } = object;
    if !bucket.create(name, bytes.clone()).await?
        && bucket.get(name).await?.is_some_and(|there| there != bytes)
    {
        return Err(Error::config(format!(
            "{name} of {} is there already, and somebody else's",
            bucket.name()
        ))
        .remedy("move it away, and give each sink a prefix of its own"));
    }
    failpoint::reach("object_store::object");
    bucket.delete(staged).await
}
