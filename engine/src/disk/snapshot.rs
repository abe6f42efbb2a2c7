//! Taking a snapshot: the core walks its shards in slices, a thread of its own writes them.
//!
//! ```text
//!   core                                thread
//!                                       syncs the log, makes the next one and the snapshot
//!   Step::Switch: appends there now
//!   Step::Walk: a slice of entries ───▶ a frame
//!   ...
//!   the last one ─────────────────────▶ syncs the new log, ends and syncs the snapshot, gives it its name,
//!                                       removes what it stands for
//!   Step::Done
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, TrySendError, channel, sync_channel};
use std::thread::JoinHandle;

use super::log::{Log, Open, Shared};
use super::names::{Kind, Name};
use super::{DiskError, HEAD, Place};
use crate::hash::{KeyHash, ShardId};
use crate::hlc::Hlc;
use crate::journal::{Change, FRAME_HEAD, Frame};
use crate::store::Store;

/// Bytes of a slice that are aimed at.
const SLICE_BYTES: usize = 256 << 10;
/// Entries of a slice, at most: far below half a millisecond.
const SLICE_ENTRIES: usize = 512;
/// Slices that wait for the thread.
const SLICES: usize = 8;
/// Bytes after which what was written of the snapshot is synced, so that the disk is never far behind.
const SYNC_BYTES: u64 = 32 << 20;

/// A snapshot that is being taken. Dropped before it is done, it is given up.
#[derive(Debug)]
pub struct Snapshot {
    slices: Option<SyncSender<Slice>>,
    said: Receiver<Said>,
    thread: Option<JoinHandle<()>>,
    /// Where the walk is; `None` before the switch.
    at: Option<(ShardId, KeyHash)>,
    /// Entries of the next slice.
    limit: usize,
    entries: u64,
    /// Bytes of logs that it stands for.
    covers: u64,
    /// What the thread had no room for.
    waiting: Option<Slice>,
}

/// What a call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more to do now.
    More,
    /// The disk is to do something first: call again a little later.
    Wait,
    /// The snapshot has its name, and so many bytes.
    Done(u64),
}

#[derive(Debug)]
enum Slice {
    Records(Vec<u8>, Hlc),
    Last { entries: u64, hlc: Hlc, log: Arc<File> },
}

#[derive(Debug)]
enum Said {
    Begun(Box<Open>),
    Done(u64),
    Failed(DiskError),
}

impl Snapshot {
    pub(super) fn start(place: Arc<Place>, log: Name, old: Arc<File>, shared: Arc<Shared>) -> io::Result<Snapshot> {
        let (slices, todo) = sync_channel(SLICES);
        let (says, said) = channel();
        let thread = std::thread::Builder::new().name(format!("gridkv-snap-{}", log.first));
        let thread = thread.spawn(move || {
            let end = match write(&place, log, &|log| sync(&place, &shared, log), &old, &todo, &says) {
                Ok(Some(bytes)) => Said::Done(bytes),
                Ok(None) => return,
                Err(error) => Said::Failed(error),
            };
            let _ = says.send(end);
        })?;
        let (slices, thread) = (Some(slices), Some(thread));
        Ok(Snapshot { slices, said, thread, at: None, limit: 1, entries: 0, covers: 0, waiting: None })
    }

    /// Does a slice of the work. `log` and `store` are the core's.
    ///
    /// # Errors
    /// The snapshot has failed and is to be dropped; the log goes on.
    pub fn step(&mut self, log: &mut Log, store: &mut Store) -> Result<Step, DiskError> {
        match self.said.try_recv() {
            Ok(Said::Begun(next)) => {
                self.covers = log.stats.since_snapshot;
                log.switch(*next, store.last_hlc());
                let first = ShardId(store.owned().start);
                self.at = Some((first, store.keyspace().first_hash(first)));
                return Ok(Step::More);
            }
            Ok(Said::Done(bytes)) => {
                (log.stats.snapshots, log.stats.snapshot_bytes) = (log.stats.snapshots + 1, bytes);
                log.stats.since_snapshot -= self.covers;
                return Ok(Step::Done(bytes));
            }
            Ok(Said::Failed(error)) => {
                log.stats.failed_snapshots += 1;
                return Err(error);
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => {
                log.stats.failed_snapshots += 1;
                let why = io::Error::other("the thread that writes it has ended");
                return Err(DiskError::io("taking a snapshot in", log.place().dir())(why));
            }
        }
        if let Some(slice) = self.waiting.take() {
            return Ok(self.send(slice));
        }
        let (Some((shard, from)), Some(_)) = (self.at, &self.slices) else { return Ok(Step::Wait) };
        if shard.0 == store.owned().end {
            let last = Slice::Last { entries: self.entries, hlc: store.last_hlc(), log: log.file() };
            return Ok(self.send(last));
        }
        let mut records = Vec::with_capacity(SLICE_BYTES);
        let mut entries = 0;
        let next = store.snapshot(shard, from, self.limit, &mut |entry| {
            Change::Put { key: entry.key, value: entry.value, meta: entry.meta() }.write(&mut records);
            entries += 1;
        });
        self.entries += entries;
        self.limit = match records.len() {
            much if much > SLICE_BYTES => (self.limit / 2).max(1),
            little if little < SLICE_BYTES / 4 => (self.limit * 2).min(SLICE_ENTRIES),
            _ => self.limit,
        };
        let behind = ShardId(shard.0 + 1);
        self.at = Some(match next {
            Some(next) => (shard, next),
            None if behind.0 == store.owned().end => (behind, KeyHash(0)),
            None => (behind, store.keyspace().first_hash(behind)),
        });
        if records.is_empty() {
            return Ok(Step::More);
        }
        Ok(self.send(Slice::Records(records, store.last_hlc())))
    }

    fn send(&mut self, slice: Slice) -> Step {
        let Some(slices) = &self.slices else { return Step::Wait };
        let is_last = matches!(slice, Slice::Last { .. });
        match slices.try_send(slice) {
            Ok(()) if is_last => {
                self.slices = None;
                Step::Wait
            }
            // Whoever has ended has said why, or the next call finds that it has not.
            Ok(()) | Err(TrySendError::Disconnected(_)) => Step::More,
            Err(TrySendError::Full(slice)) => {
                self.waiting = Some(slice);
                Step::Wait
            }
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.slices = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Syncs a file of the log.
type Sync<'a> = dyn Fn(&File) -> Result<(), DiskError> + 'a;

fn sync(place: &Place, shared: &Shared, log: &File) -> Result<(), DiskError> {
    shared.sync(log).map_err(DiskError::io("syncing the log in", place.dir()))
}

/// Writes a snapshot, and all that goes with it; its bytes. `None` when it was given up.
fn write(
    place: &Place,
    log: Name,
    sync: &Sync<'_>,
    old: &File,
    todo: &Receiver<Slice>,
    says: &Sender<Said>,
) -> Result<Option<u64>, DiskError> {
    // What the new log follows is on disk, but for what is appended in the next moment.
    sync(old)?;
    let _ = says.send(Said::Begun(Box::new(Open::create(place, log)?)));
    let name = Name { kind: Kind::Snapshot, ..log };
    let written = write_entries(place, &name, sync, old, todo);
    if !matches!(written, Ok(Some(_))) {
        let _ = std::fs::remove_file(place.dir().join(name.unfinished()));
    }
    written
}

fn write_entries(
    place: &Place,
    name: &Name,
    sync: &Sync<'_>,
    old: &File,
    todo: &Receiver<Slice>,
) -> Result<Option<u64>, DiskError> {
    let (mut file, salt) = place.begin(name)?;
    let path = place.dir().join(name.unfinished());
    let (mut position, mut synced) = (HEAD as u64, 0);
    let mut append = |records: &[u8], hlc| -> io::Result<u64> {
        let frame = Frame::new(records, position, 0, hlc, salt);
        file.write_all(&frame.to_bytes())?;
        file.write_all(records)?;
        position += (FRAME_HEAD + records.len()) as u64;
        if position - synced > SYNC_BYTES {
            file.sync_data()?;
            synced = position;
        }
        Ok(position)
    };
    for slice in todo {
        match slice {
            Slice::Records(records, hlc) => {
                append(&records, hlc).map_err(DiskError::io("writing", &path))?;
            }
            Slice::Last { entries, hlc, log } => {
                // Entries may be newer than the log's begin: it is on disk before they count.
                sync(old).and_then(|()| sync(&log))?;
                let mut end = Vec::new();
                Change::End { entries }.write(&mut end);
                let bytes = append(&end, hlc).map_err(DiskError::io("writing", &path))?;
                place.finish(&file, name)?;
                place.remove_obsolete()?;
                return Ok(Some(bytes));
            }
        }
    }
    Ok(None)
}
