//! The log that a core appends to, and the thread that syncs it.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use super::names::{Kind, Name};
use super::read::{self, Restored};
use super::snapshot::Snapshot;
use super::{DiskError, HEAD, Place};
use crate::hlc::Hlc;
use crate::journal::{Change, FRAME_HEAD, Frame};
use crate::store::Store;

/// Counters of a core's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Bytes appended since the start.
    pub written: u64,
    /// Of these, bytes known to be on disk.
    pub synced: u64,
    /// Times that the log was synced.
    pub syncs: u64,
    /// Bytes of logs that the next start would read.
    pub since_snapshot: u64,
    /// Snapshots finished since the start, and those that failed.
    pub snapshots: u64,
    /// See `snapshots`.
    pub failed_snapshots: u64,
    /// Bytes of the last snapshot.
    pub snapshot_bytes: u64,
}

/// The log of one core.
#[derive(Debug)]
pub struct Log {
    place: Arc<Place>,
    file: Open,
    /// The one before it, whose end may not be on disk yet.
    last: Option<Arc<File>>,
    syncer: Syncer,
    /// Up to where syncing was asked for.
    asked: u64,
    failure: Option<String>,
    pub(super) stats: LogStats,
}

/// The file that is appended to.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) name: Name,
    pub(super) file: Arc<File>,
    pub(super) salt: u64,
    /// Bytes in it.
    position: u64,
    /// How much had been appended to the files before it. What is appended in all is at most this plus `position`.
    before: u64,
}

impl Open {
    /// A new log, under its name.
    pub(super) fn create(place: &Place, name: Name) -> Result<Open, DiskError> {
        let (file, salt) = place.begin(&name)?;
        place.finish(&file, &name)?;
        Ok(Open { name, file: Arc::new(file), salt, position: HEAD as u64, before: 0 })
    }

    fn append(&mut self, records: &[u8], synced: u64, hlc: Hlc) -> io::Result<u64> {
        // What is said to be on disk is a part of this file.
        let synced = synced.saturating_sub(self.before).saturating_add(HEAD as u64).min(self.position);
        let frame = Frame::new(records, self.position, synced, hlc, self.salt);
        write_both(&self.file, &frame.to_bytes(), records)?;
        let grown = (FRAME_HEAD + records.len()) as u64;
        self.position += grown;
        Ok(grown)
    }
}

/// Appends both parts, with one call to the system as a rule.
fn write_both(mut file: &File, head: &[u8], body: &[u8]) -> io::Result<()> {
    let written = loop {
        match file.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    file.write_all(head.get(written..).unwrap_or_default())?;
    file.write_all(&body[written.saturating_sub(head.len())..])
}

impl Log {
    /// Reads what the directory has of the store's shards into the store, which is empty, and begins a new log for them. What the store
    /// changes from now on is to be appended. `wake` is called, from another thread, when more is synced or syncing has failed.
    ///
    /// # Errors
    /// [`DiskError`]; the store is of no use then.
    pub fn open(
        place: &Arc<Place>,
        store: &mut Store,
        wake: impl Fn() + Send + 'static,
    ) -> Result<(Log, Restored), DiskError> {
        let restored = read::read(place, store)?;
        let owned = store.owned();
        let name = Name { start: place.start, number: 0, kind: Kind::Log, first: owned.start, end: owned.end };
        let file = Open::create(place, name)?;
        let stats = LogStats { since_snapshot: restored.log_bytes, ..LogStats::default() };
        let syncer = Syncer::start(owned.start, wake).map_err(DiskError::io("starting a thread for", place.dir()))?;
        let log = Log { place: place.clone(), file, last: None, syncer, asked: 0, failure: None, stats };
        Ok((log, restored))
    }

    /// Appends records as one frame: into the operating system's memory, so that they survive this process. After an error nothing is
    /// appended any more, as what the file ends with is not known.
    pub fn append(&mut self, records: &[u8], hlc: Hlc) {
        if self.failure.is_some() || records.is_empty() {
            return;
        }
        match self.file.append(records, self.synced(), hlc) {
            Ok(grown) => {
                self.stats.written += grown;
                self.stats.since_snapshot += grown;
            }
            Err(error) => self.failure = Some(format!("writing {}: {error}", self.path().display())),
        }
    }

    fn path(&self) -> PathBuf {
        self.place.path(&self.file.name)
    }

    /// Bytes that were appended.
    pub fn written(&self) -> u64 {
        self.stats.written
    }

    /// Bytes that are on disk, of those that were appended.
    pub fn synced(&self) -> u64 {
        self.syncer.shared.synced.load(Ordering::Acquire)
    }

    /// Has what was appended synced, unless that is under way: then this is to be called again when it has ended.
    pub fn sync(&mut self) {
        if self.asked > self.synced() || self.asked == self.stats.written || self.has_failed() {
            return;
        }
        self.asked = self.stats.written;
        self.stats.syncs += 1;
        self.syncer.ask(self.file.file.clone(), self.asked);
    }

    /// Syncs what was appended, here and now.
    ///
    /// # Errors
    /// What failed, now or before.
    pub fn sync_now(&mut self) -> Result<(), String> {
        let mut files = self.last.iter().chain([&self.file.file]);
        let synced = files.try_for_each(|file| self.syncer.shared.sync(file));
        debug_assert!(synced.is_ok() || self.has_failed());
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        self.syncer.shared.synced.fetch_max(self.stats.written, Ordering::AcqRel);
        Ok(())
    }

    /// The last call: syncs what was appended, and says so at the end of the file, so that what cannot be read of it later is known to be
    /// damaged.
    ///
    /// # Errors
    /// As [`Log::sync_now`].
    pub fn close(&mut self, hlc: Hlc) -> Result<(), String> {
        self.sync_now()?;
        if self.stats.written == 0 {
            return Ok(());
        }
        let end = self.file.append(&[], self.synced(), hlc);
        self.stats.written += end.map_err(|error| format!("writing {}: {error}", self.path().display()))?;
        self.sync_now()
    }

    /// Whether the log is of no use any more.
    #[inline]
    pub fn has_failed(&self) -> bool {
        self.failure.is_some() || self.syncer.shared.failure.get().is_some()
    }

    /// Why the log is of no use any more, if so. What was appended since the last sync may be lost.
    pub fn failure(&self) -> Option<String> {
        self.failure.clone().or_else(|| self.syncer.shared.failure.get().cloned())
    }

    /// Counters.
    pub fn stats(&self) -> LogStats {
        LogStats { synced: self.synced(), ..self.stats }
    }

    /// Where the node's data is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Begins a snapshot of the core's shards, on a thread of its own; see [`Snapshot`].
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn snapshot(&self) -> io::Result<Snapshot> {
        let number = self.file.name.number + 1;
        let name = Name { number, ..self.file.name };
        Snapshot::start(self.place.clone(), name, self.file.file.clone(), self.syncer.shared.clone())
    }

    /// The file that is appended to.
    pub(super) fn file(&self) -> Arc<File> {
        self.file.file.clone()
    }

    /// Goes on in a new file.
    pub(super) fn switch(&mut self, mut next: Open, hlc: Hlc) {
        next.before = self.stats.written;
        let old = std::mem::replace(&mut self.file, next);
        let mut records = Vec::new();
        Change::After { length: old.position }.write(&mut records);
        self.asked = self.stats.written;
        // First the old file, then what follows it in the new one. A sync that is under way has the old file only, and ends before.
        self.syncer.ask(old.file.clone(), self.stats.written);
        self.last = Some(old.file);
        self.append(&records, hlc);
    }
}

impl Drop for Log {
    /// A log in which nothing was written is taken away: a node that is started over and over, and refuses each time, must not
    /// leave one for each.
    fn drop(&mut self) {
        if self.stats.written == 0 {
            let _ = std::fs::remove_file(self.path());
        }
    }
}

/// A thread that syncs files. The operating system may take seconds for it.
#[derive(Debug)]
struct Syncer {
    jobs: Option<SyncSender<Job>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Job {
    file: Arc<File>,
    upto: u64,
}

/// What a core and the threads that sync its log know of it.
#[derive(Debug, Default)]
pub(super) struct Shared {
    synced: AtomicU64,
    failure: OnceLock<String>,
    /// Held while a file is synced: the operating system tells an error once, to whoever asks first.
    syncing: Mutex<()>,
}

impl Shared {
    /// Syncs a file of the log. An error ends the log: what failed to be synced may be lost, and a later sync that succeeds would not
    /// say so.
    pub(super) fn sync(&self, file: &File) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = self.failure.get() {
            return Err(io::Error::other(why.clone()));
        }
        file.sync_data().inspect_err(|error| {
            let _ = self.failure.set(format!("syncing the log: {error}"));
        })
    }
}

/// Jobs that wait: one sync, and those of switches, which are far apart.
const JOBS: usize = 4;

impl Syncer {
    fn start(core: u16, wake: impl Fn() + Send + 'static) -> io::Result<Syncer> {
        let shared = Arc::new(Shared::default());
        let (jobs, todo) = sync_channel(JOBS);
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name(format!("gridkv-sync-{core}"));
        let thread = thread.spawn(move || run(&todo, &theirs, &wake))?;
        Ok(Syncer { jobs: Some(jobs), shared, thread: Some(thread) })
    }

    fn ask(&self, file: Arc<File>, upto: u64) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(Job { file, upto });
        }
    }
}

fn run(todo: &Receiver<Job>, shared: &Shared, wake: &impl Fn()) {
    for Job { file, upto } in todo {
        if shared.sync(&file).is_err() {
            return wake();
        }
        shared.synced.fetch_max(upto, Ordering::AcqRel);
        wake();
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
