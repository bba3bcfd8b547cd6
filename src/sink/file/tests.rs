//! The file sink over a real directory, and over a disk that stops at every operation in turn and
//! forgets what was not synced.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use super::*;
use crate::{
    disk::{Disk, DiskFile, RealDisk},
    error::Error,
    sink::testing::{batch, context, not_utf8, progress, with},
};

fn sink(disk: &Arc<dyn Disk>, path: &Path, rotate_bytes_max: u64) -> File {
    let options = config::File { path: path.to_owned(), rotate_bytes_max, rotate_ms_max: 0 };
    let context = Context { disk: Arc::clone(disk), ..context() };
    File::new(&options, with(&context)).unwrap()
}

fn real(directory: &tempfile::TempDir) -> (File, PathBuf) {
    let path = directory.path().join("changes.jsonl");
    (sink(&RealDisk::shared(), &path, 0), path)
}

fn offsets(text: &[u8]) -> Vec<u64> {
    let text = std::str::from_utf8(text).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "torn: {text}");
    let line = |line| serde_json::from_str::<serde_json::Value>(line).unwrap();
    text.lines().map(|text| line(text)["offset"].as_u64().unwrap()).collect()
}

fn names(directory: &tempfile::TempDir) -> Vec<String> {
    let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    RealDisk.list(directory.path()).unwrap().into_iter().map(name).collect()
}

async fn written(sink: &mut File, range: std::ops::Range<u64>) -> Result<()> {
    match sink.write(&batch(range.clone()), &progress(range.end)).await? {
        Written::All => Ok(()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn lines_and_progress_come_back_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (mut first, path) = real(&directory);
    assert_eq!(first.open().await.unwrap(), None);
    written(&mut first, 0..5).await.unwrap();
    written(&mut first, 5..6).await.unwrap();
    drop(first);
    let (mut second, _) = real(&directory);
    assert_eq!(second.open().await.unwrap(), Some(progress(6)));
    written(&mut second, 6..8).await.unwrap();
    second.close().await.unwrap();
    assert_eq!(offsets(&fs::read(&path).unwrap()), (0..8).collect::<Vec<_>>());
}

#[tokio::test]
async fn progress_moves_without_lines_and_never_goes_back() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    sink.open().await.unwrap();
    written(&mut sink, 0..2).await.unwrap();
    sink.write(&Batch::default(), &progress(9)).await.unwrap();
    assert_eq!(sink.open().await.unwrap(), Some(progress(9)));
    let error = written(&mut sink, 2..4).await.unwrap_err();
    assert_eq!(error.class(), Class::Damaged, "{error}");
    let rewound = Progress { epoch: 2, ..progress(2) };
    sink.open().await.unwrap();
    sink.write(&batch(0..2), &rewound).await.unwrap();
    assert_eq!(sink.open().await.unwrap(), Some(rewound));
    let zombie = sink.write(&batch(9..10), &progress(10)).await.unwrap_err();
    assert_eq!(zombie.class(), Class::Damaged, "{zombie}");
    assert_eq!(offsets(&fs::read(&path).unwrap()), [0, 1, 0, 1]);
}

#[tokio::test]
async fn what_was_written_and_never_finished_is_cut_on_open() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    sink.open().await.unwrap();
    written(&mut sink, 0..3).await.unwrap();
    let whole = fs::read(&path).unwrap();
    for tail in [b"{\"half".as_slice(), b"{\"offset\":3}\n", b"\n", &[0; 5000]] {
        fs::write(&path, [&whole, tail].concat()).unwrap();
        assert_eq!(sink.open().await.unwrap(), Some(progress(3)));
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}

#[tokio::test]
async fn a_change_that_has_no_json_form_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    sink.open().await.unwrap();
    let mut bad = batch(0..3);
    bad.changes.insert(1, not_utf8(1));
    let error = sink.write(&bad, &progress(3)).await.unwrap_err();
    assert_eq!(error.class(), Class::Data, "{error}");
    written(&mut sink, 0..1).await.unwrap();
    assert_eq!(offsets(&fs::read(&path).unwrap()), [0]);
}

#[tokio::test]
async fn a_file_that_is_not_what_was_written_is_damaged_and_says_how() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    sink.open().await.unwrap();
    written(&mut sink, 0..3).await.unwrap();
    let whole = fs::read(&path).unwrap();
    let mut edited = whole.clone();
    *edited.last_mut().unwrap() = b' ';
    let short = &whole[..whole.len() - 1];
    let cases: [(Option<&[u8]>, String); 3] = [
        (Some(short), format!("has {} bytes, but {} were written", short.len(), whole.len())),
        (Some(&edited), "was replaced or edited".into()),
        (None, "is missing".into()),
    ];
    for (content, message) in cases {
        match content {
            Some(content) => fs::write(&path, content).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let error = sink.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Damaged);
        assert!(error.to_string().contains(&message), "{error}");
        assert!(error.remedy_text().unwrap().contains("changes.jsonl.walrace"), "{error}");
        let closed = written(&mut sink, 3..4).await.unwrap_err();
        assert_eq!(closed.class(), Class::Damaged, "{closed}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(sink.open().await.unwrap(), Some(progress(3)));
}

#[tokio::test]
async fn a_foreign_file_is_never_touched() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    fs::write(&path, "mine\n").unwrap();
    let error = sink.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config);
    assert!(error.to_string().contains("was not written by Walrace (move it away"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine\n");
    assert_eq!(names(&directory), ["changes.jsonl"]);
}

#[tokio::test]
async fn a_torn_state_leaves_the_one_before_it() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    sink.open().await.unwrap();
    for end in 1..4 {
        written(&mut sink, end - 1..end).await.unwrap();
    }
    drop(sink);
    let sidecar = directory.path().join("changes.jsonl.walrace");
    let (data, states) = (fs::read(&path).unwrap(), fs::read(&sidecar).unwrap());
    assert_eq!(states.len(), 4096);
    for byte in (0..4096).step_by(7) {
        let mut torn = states.clone();
        torn[byte] ^= 0x55;
        fs::write(&sidecar, &torn).unwrap();
        fs::write(&path, &data).unwrap();
        let (mut sink, _) = real(&directory);
        let found = sink.open().await.unwrap().unwrap().cursor;
        assert!(found == 3 || found == 2, "byte {byte}: {found}");
        assert_eq!(offsets(&fs::read(&path).unwrap()), (0..found).collect::<Vec<_>>());
    }
    fs::write(&sidecar, vec![0; 4096]).unwrap();
    fs::write(&path, &data).unwrap();
    let error = real(&directory).0.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Damaged, "{error}");
}

#[tokio::test]
async fn rotated_files_carry_their_offsets_and_never_replace_another() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("changes.jsonl");
    let mut sink = sink(&RealDisk::shared(), &path, 700);
    sink.open().await.unwrap();
    for end in 1..=5 {
        written(&mut sink, end - 1..end).await.unwrap();
    }
    let first = "changes.00000000000000000000-00000000000000000001.jsonl";
    let second = "changes.00000000000000000002-00000000000000000003.jsonl";
    assert_eq!(names(&directory), [first, second, "changes.jsonl", "changes.jsonl.walrace"]);
    assert_eq!(offsets(&fs::read(&path).unwrap()), [4]);
    assert_eq!(offsets(&fs::read(directory.path().join(second)).unwrap()), [2, 3]);
    for (cursor, epoch) in [(1, 2), (2, 2), (3, 2)] {
        let progress = Progress { epoch, ..progress(cursor) };
        sink.write(&batch(cursor - 1..cursor), &progress).await.unwrap();
    }
    sink.write(&batch(0..1), &Progress { epoch: 3, ..progress(1) }).await.unwrap();
    let mut all = 0;
    for name in names(&directory).iter().filter(|name| name.ends_with(".jsonl")) {
        all += offsets(&fs::read(directory.path().join(name)).unwrap()).len();
    }
    assert_eq!(all, 9, "{:?}", names(&directory));
}

#[tokio::test]
async fn an_old_file_is_rotated_by_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let options = config::File { path, rotate_bytes_max: 0, rotate_ms_max: 1 };
    let mut sink = File::new(&options, with(&context())).unwrap();
    sink.open().await.unwrap();
    written(&mut sink, 0..2).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    written(&mut sink, 2..3).await.unwrap();
    let rotated = "log.00000000000000000000-00000000000000000001";
    assert_eq!(names(&directory), ["log", rotated, "log.walrace"]);
}

#[tokio::test]
async fn a_large_batch_arrives_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    sink.open().await.unwrap();
    written(&mut sink, 0..12_000).await.unwrap();
    let data = fs::read(&path).unwrap();
    assert!(data.len() > 3 << 20);
    assert_eq!(offsets(&data), (0..12_000).collect::<Vec<_>>());
    assert_eq!(sink.open().await.unwrap(), Some(progress(12_000)));
}

/// A disk in memory that stops at a chosen operation, as a machine does that loses its power.
#[derive(Clone, Debug, Default)]
struct Fragile(Arc<Mutex<Memory>>);

#[derive(Clone, Debug, Default)]
struct Memory {
    /// Content and what of it was synced, by number.
    files: Vec<(Vec<u8>, Vec<u8>)>,
    /// Names as they are, and as they were when the directory was last synced.
    names: BTreeMap<PathBuf, usize>,
    synced_names: BTreeMap<PathBuf, usize>,
    /// Operations until the power fails.
    left: Option<usize>,
    operations: usize,
    fault: Option<Fault>,
    ignore_syncs_of: Option<Ignored>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Full,
    Sync,
}

/// A sync that a mistake in the code would leave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ignored {
    Data,
    Sidecar,
    Directory,
}

/// What a power failure leaves of the bytes and names that were not synced.
#[derive(Clone, Copy, Debug)]
enum Loss {
    All,
    Nothing,
    NamesOnly,
    ContentOnly,
    HalfOfContent,
    /// Only the process dies: nothing is lost, and nothing becomes durable by it.
    Process,
}

impl Fragile {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap()
    }

    fn shared(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    fn step(&self) -> io::Result<MutexGuard<'_, Memory>> {
        let mut memory = self.lock();
        memory.operations += 1;
        match &mut memory.left {
            Some(0) => return Err(io::Error::other("the power is off")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(memory)
    }

    fn fail_power(&self, loss: Loss) {
        let mut memory = self.lock();
        memory.left = None;
        if matches!(loss, Loss::Process) {
            return;
        }
        if matches!(loss, Loss::All | Loss::NamesOnly) {
            memory.names = memory.synced_names.clone();
        }
        for (content, synced) in &mut memory.files {
            match loss {
                Loss::All | Loss::ContentOnly => *content = synced.clone(),
                Loss::HalfOfContent => {
                    content.truncate(content.len().div_ceil(2).max(synced.len()));
                    let kept = synced.len().div_ceil(2).min(content.len());
                    let from = synced.len().min(content.len());
                    content[kept..from].copy_from_slice(&synced[kept..from]);
                }
                Loss::Nothing | Loss::NamesOnly | Loss::Process => {}
            }
            *synced = content.clone();
        }
        memory.synced_names = memory.names.clone();
    }

    fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let memory = self.lock();
        memory.names.get(path).map(|&number| memory.files[number].0.clone())
    }

    /// Every line on the disk, in the order of the files.
    fn lines(&self) -> Vec<u64> {
        let names: Vec<_> = self.lock().names.keys().cloned().collect();
        let data = |path: &&PathBuf| path.extension().is_some_and(|end| end == "jsonl");
        names.iter().filter(data).flat_map(|path| offsets(&self.read(path).unwrap())).collect()
    }
}

#[derive(Debug)]
struct FragileFile(Fragile, usize, PathBuf);

impl Disk for Fragile {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut memory = self.step()?;
        if memory.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = memory.files.len();
        memory.files.push((Vec::new(), Vec::new()));
        memory.names.insert(path.into(), number);
        Ok(Box::new(FragileFile(self.clone(), number, path.into())))
    }

    fn open(&self, path: &Path, _write: bool) -> io::Result<Box<dyn DiskFile>> {
        let number = *self.step()?.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(FragileFile(self.clone(), number, path.into())))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut memory = self.step()?;
        assert!(!memory.names.contains_key(to), "{} would be lost", to.display());
        let number = memory.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        memory.names.insert(to.into(), number);
        Ok(())
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        unreachable!("the file sink removes nothing")
    }

    fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _directory: &Path) -> io::Result<()> {
        let mut memory = self.step()?;
        if memory.ignore_syncs_of != Some(Ignored::Directory) {
            memory.synced_names = memory.names.clone();
        }
        Ok(())
    }

    fn list(&self, _directory: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.step()?.names.keys().cloned().collect())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

impl DiskFile for FragileFile {
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut memory = self.0.step()?;
        let full = memory.fault == Some(Fault::Full);
        let bytes = if full { &bytes[..bytes.len() / 2] } else { bytes };
        let content = &mut memory.files[self.1].0;
        let at = usize::try_from(at).unwrap();
        content.resize(content.len().max(at + bytes.len()), 0);
        content[at..at + bytes.len()].copy_from_slice(bytes);
        if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let memory = self.0.step()?;
        let content = &memory.files[self.1].0;
        let rest = content.get(usize::try_from(at).unwrap()..).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.step()?.files[self.1].0.len() as u64)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.step()?.files[self.1].0.resize(usize::try_from(length).unwrap(), 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut memory = self.0.step()?;
        if memory.fault == Some(Fault::Sync) {
            return Err(io::Error::other("the disk is on fire"));
        }
        let sidecar = self.2.extension().is_some_and(|end| end == "walrace");
        let kind = if sidecar { Ignored::Sidecar } else { Ignored::Data };
        if memory.ignore_syncs_of != Some(kind) {
            memory.files[self.1].1 = memory.files[self.1].0.clone();
        }
        Ok(())
    }
}

const CHANGES: u64 = 13;

/// Delivers everything from what the sink says it has, `step` changes at a time.
async fn deliver(disk: &Arc<dyn Disk>, step: u64) -> Result<()> {
    let mut sink = sink(disk, Path::new("/d/changes.jsonl"), 1400);
    let mut cursor = sink.open().await?.map_or(0, |progress| progress.cursor);
    while cursor < CHANGES {
        let end = (cursor + step).min(CHANGES);
        written(&mut sink, cursor..end).await?;
        cursor = end;
    }
    Ok(())
}

/// Stops the machine at every operation of a delivery with rotations, then at every operation of
/// the recovery, and returns what is wrong at the end, if anything.
async fn crash_everywhere(
    (loss, then): (Loss, Loss),
    ignored: Option<Ignored>,
) -> Result<usize, String> {
    let mut crashes = 0;
    for first in 0.. {
        let disk = Fragile::default();
        disk.lock().left = Some(first);
        disk.lock().ignore_syncs_of = ignored;
        if deliver(&disk.shared(), 2).await.is_ok() {
            return Ok(crashes);
        }
        disk.fail_power(loss);
        let after_crash = disk.lock().clone();
        for second in (0..12).map(Some).chain([None]) {
            let disk = Fragile(Arc::new(Mutex::new(after_crash.clone())));
            disk.lock().left = second;
            let mut found = deliver(&disk.shared(), 3).await;
            if found.is_err() && second.is_some() {
                disk.fail_power(then);
                found = deliver(&disk.shared(), 3).await;
            }
            let at = format!("{loss:?} at {first}, then {then:?} at {second:?}");
            found.map_err(|error: Error| format!("{at}: {error}"))?;
            disk.fail_power(Loss::All);
            let lines = disk.lines();
            if lines != (0..CHANGES).collect::<Vec<_>>() {
                return Err(format!("{at}: {lines:?}"));
            }
            crashes += 1;
        }
    }
    unreachable!("the loop ends with a delivery that is not stopped")
}

const LOSSES: [(Loss, Loss); 9] = [
    (Loss::All, Loss::All),
    (Loss::Nothing, Loss::Nothing),
    (Loss::NamesOnly, Loss::NamesOnly),
    (Loss::ContentOnly, Loss::ContentOnly),
    (Loss::HalfOfContent, Loss::HalfOfContent),
    (Loss::Process, Loss::All),
    (Loss::Process, Loss::NamesOnly),
    (Loss::Process, Loss::ContentOnly),
    (Loss::Process, Loss::HalfOfContent),
];

#[tokio::test]
async fn a_crash_at_any_operation_leaves_each_change_once() {
    for loss in LOSSES {
        let crashes = crash_everywhere(loss, None).await.unwrap_or_else(|wrong| panic!("{wrong}"));
        assert!(crashes > 500, "{loss:?}: only {crashes}");
    }
}

#[tokio::test]
async fn leaving_out_any_kind_of_sync_is_noticed() {
    for ignored in [Ignored::Data, Ignored::Sidecar, Ignored::Directory] {
        let mut noticed = false;
        for loss in LOSSES {
            noticed |= crash_everywhere(loss, Some(ignored)).await.is_err();
        }
        assert!(noticed, "{ignored:?} could be left out");
    }
}

#[tokio::test]
async fn a_cancelled_write_is_done_whole_or_not_at_all_before_the_next_call() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sink, path) = real(&directory);
    let mut cursor = sink.open().await.unwrap().map_or(0, |progress| progress.cursor);
    for round in 0..60 {
        let (changes, to) = (batch(cursor..cursor + 50), progress(cursor + 50));
        let patience = Duration::from_micros(round % 20 * 50);
        let _ = tokio::time::timeout(patience, sink.write(&changes, &to)).await;
        match round % 3 {
            0 => cursor = sink.open().await.unwrap().map_or(0, |progress| progress.cursor),
            1 => {
                drop(sink);
                sink = real(&directory).0;
                cursor = sink.open().await.unwrap().map_or(0, |progress| progress.cursor);
            }
            _ => {
                assert!(matches!(sink.write(&changes, &to).await, Ok(Written::All)));
                cursor += 50;
            }
        }
        let found = offsets(&fs::read(&path).unwrap());
        assert!(found.into_iter().eq(0..cursor), "round {round}, cursor {cursor}");
    }
}

#[test]
fn a_write_that_was_cancelled_before_it_began_never_begins() {
    let one_thread = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    one_thread.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let (mut sink, path) = real(&directory);
        sink.open().await.unwrap();
        let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
        let busy = tokio::task::spawn_blocking(move || held.recv());
        let (changes, to) = (batch(0..5), progress(5));
        let patience = Duration::from_millis(1);
        assert!(tokio::time::timeout(patience, sink.write(&changes, &to)).await.is_err());
        // The open is called, and waits for the thread, before the write can get it.
        let (opened, ()) = tokio::join!(sink.open(), async { release.send(()).unwrap() });
        assert_eq!(opened.unwrap(), None);
        busy.await.unwrap().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    });
}

#[tokio::test]
async fn a_full_disk_is_waited_for_and_the_file_is_cut_back() {
    let disk = Fragile::default();
    let path = Path::new("/d/changes.jsonl");
    let mut sink = sink(&disk.shared(), path, 0);
    sink.open().await.unwrap();
    written(&mut sink, 0..2).await.unwrap();
    let before = disk.read(path);
    disk.lock().fault = Some(Fault::Full);
    for _ in 0..3 {
        let error = written(&mut sink, 2..4).await.unwrap_err();
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains("/d/changes.jsonl"), "{error}");
        assert_eq!(disk.read(path), before);
        sink.open().await.unwrap();
    }
    disk.lock().fault = None;
    written(&mut sink, 2..4).await.unwrap();
    assert_eq!(offsets(&disk.read(path).unwrap()), [0, 1, 2, 3]);
}

#[tokio::test]
async fn a_failed_sync_is_never_taken_for_a_success() {
    let disk = Fragile::default();
    let path = Path::new("/d/changes.jsonl");
    let mut sink = sink(&disk.shared(), path, 0);
    sink.open().await.unwrap();
    written(&mut sink, 0..2).await.unwrap();
    disk.lock().fault = Some(Fault::Sync);
    let error = written(&mut sink, 2..4).await.unwrap_err();
    assert_eq!(error.class(), Class::Damaged, "{error}");
    disk.lock().fault = None;
    // The next sync would succeed, but what it says about the bytes before it is worth nothing.
    let error = written(&mut sink, 2..4).await.unwrap_err();
    assert_eq!(error.class(), Class::Damaged, "{error}");
    assert_eq!(sink.open().await.unwrap(), Some(progress(2)));
    written(&mut sink, 2..4).await.unwrap();
    assert_eq!(offsets(&disk.read(path).unwrap()), [0, 1, 2, 3]);
}
