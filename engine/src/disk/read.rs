//! Reading a directory when a core starts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use memchr::memmem;

use super::names::{Age, Kind, Name, Newest};
use super::{DiskError, HEAD, Head, Place};
use crate::hash::Keyspace;
use crate::hlc::Hlc;
use crate::journal::{Change, Changes, FRAME_HEAD, FRAME_MAGIC, Frame};
use crate::store::Store;

/// Bytes read at once.
const BUFFER: usize = 1 << 20;

/// What a core found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Files that were read.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of these, bytes of logs: what a snapshot would save the next start.
    pub log_bytes: u64,
    /// Records that were taken.
    pub records: u64,
    /// Logs whose end had not reached the disk, and was cut off; and how much that was.
    pub torn: Vec<(PathBuf, u64)>,
}

/// Reads what the directory has of a store's shards, into the store, which is empty.
pub(super) fn read(place: &Place, store: &mut Store) -> Result<Restored, DiskError> {
    let names = place.names()?;
    let mut reading = Reading {
        place,
        newest: Newest::new(&names),
        store,
        hlc: Hlc::ZERO,
        lengths: BTreeMap::new(),
        restored: Restored::default(),
    };
    for name in &names {
        reading.file(name)?;
    }
    let Reading { hlc, restored, .. } = reading;
    store.restored(hlc);
    Ok(restored)
}

struct Reading<'a> {
    place: &'a Place,
    newest: Newest<'a>,
    store: &'a mut Store,
    hlc: Hlc,
    /// Where the last change of each log ends that was read. An empty frame that a start put behind it does not count: the log that goes on
    /// from there does not know of it.
    lengths: BTreeMap<(Age, u16), u64>,
    restored: Restored,
}

impl Reading<'_> {
    fn file(&mut self, name: &Name) -> Result<(), DiskError> {
        let owned = self.store.owned();
        let wanted: Range<u16> = owned.start.max(name.first)..owned.end.min(name.end);
        let wanted: Vec<u16> = wanted.filter(|shard| self.newest.counts(name, *shard)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut frames = Frames::open(self.place, name)?;
        let path = frames.path.clone();
        let (mut entries, mut end) = (0, None);
        let mut is_first = true;
        let (mut vouched, mut closed) = (HEAD as u64, false);
        self.lengths.insert((name.age(), name.first), HEAD as u64);
        while let Some((frame, records)) = frames.next()? {
            self.hlc = self.hlc.max(frame.hlc);
            vouched = vouched.max(frame.synced);
            closed = frame.len == 0 && frame.synced == frame.position;
            let end_of_frame = frame.position + FRAME_HEAD as u64 + u64::from(frame.len);
            let damaged = |why: String| DiskError::damaged(&path, frame.position, why);
            for change in Changes::new(records) {
                let change = change.map_err(|error| damaged(error.to_string()))?;
                if let Change::After { length } = change
                    && is_first
                    && !self.newest.has_base(name)
                    && !self.follows(name, length, &path)?
                {
                    // What came before it is gone, and so is this.
                    return self.settle(&frames, HEAD as u64, HEAD as u64);
                }
                if let Change::End { entries } = change {
                    end = Some(entries);
                }
                is_first = false;
                self.lengths.insert((name.age(), name.first), end_of_frame);
                entries += u64::from(matches!(change, Change::Put { .. }));
                if wanted.binary_search(&shard_of(self.place.keyspace, &change)).is_ok() {
                    self.store.restore(change).map_err(|error| damaged(format!("a record was not taken: {error}")))?;
                    self.restored.records += 1;
                }
            }
        }
        self.restored.files += 1;
        self.restored.bytes += frames.position;
        if name.kind == Kind::Log {
            self.restored.log_bytes += frames.position;
            if closed && frames.position == frames.len {
                return Ok(());
            }
            return self.settle(&frames, vouched, frames.position);
        }
        if frames.position < frames.len || end != Some(entries) {
            return Err(DiskError::damaged(&path, frames.position, "it is not whole, though it has got its name"));
        }
        Ok(())
    }

    /// Whether a log that goes on where one of that length was left finds it.
    fn follows(&self, name: &Name, length: u64, path: &Path) -> Result<bool, DiskError> {
        let before = name.number.checked_sub(1).map(|number| ((name.start, number), name.first));
        match before.and_then(|before| self.lengths.get(&before)) {
            Some(found) => Ok(*found >= length),
            None => Err(DiskError::damaged(path, HEAD as u64, "the log before it is missing")),
        }
    }

    /// Has on disk what was read of a log, which ends at `to`, and says so at its end.
    ///
    /// What follows is cut off, if it may be missing by right. A process that was killed left what it wrote last to the operating system, and
    /// after a sync that failed memory has what the disk has not: so what nobody vouches for, from `vouched` on, is written
    /// again where it is. Then an empty frame says that all of it is on disk. Cores that have shards of the same log come one after
    /// the other, and the first does it.
    fn settle(&mut self, frames: &Frames, vouched: u64, to: u64) -> Result<(), DiskError> {
        let _one = self.place.shortening.lock().unwrap_or_else(PoisonError::into_inner);
        let len = frames.file.get_ref().metadata().map_err(DiskError::io("reading", &frames.path))?.len();
        let file = File::options().read(true).write(true).open(&frames.path);
        let file = file.map_err(DiskError::io("opening", &frames.path))?;
        let end = Frame::new(&[], to, to, self.hlc, frames.salt);
        if len > to {
            if frames.is_closed(to, len)? {
                return Ok(());
            }
            if let Some(position) = frames.synced_beyond(to, len)? {
                let why =
                    format!("what is there cannot be read, though the frame at {position} says that it was on disk");
                return Err(DiskError::damaged(&frames.path, to, why));
            }
            file.set_len(to).map_err(DiskError::io("shortening", &frames.path))?;
            self.restored.torn.push((frames.path.clone(), len - to));
        }
        let again = || -> io::Result<()> {
            let mut bytes = vec![0; BUFFER];
            let mut at = vouched;
            while at < to {
                let here = &mut bytes[..(to - at).min(BUFFER as u64) as usize];
                file.read_exact_at(here, at)?;
                file.write_all_at(here, at)?;
                at += here.len() as u64;
            }
            file.sync_all()?;
            file.write_all_at(&end.to_bytes(), to)?;
            file.sync_data()
        };
        again().map_err(DiskError::io("syncing", &frames.path))
    }
}

/// The shard that a change is about; those that are about none belong to no store.
fn shard_of(keyspace: Keyspace, change: &Change<'_>) -> u16 {
    match change {
        Change::Put { key, .. } | Change::Meta { key, .. } | Change::Patch { key, .. } | Change::Remove { key } => {
            keyspace.shard(keyspace.locate(key)).0
        }
        Change::Clear { shard } => shard.0,
        Change::End { .. } | Change::After { .. } => u16::MAX,
    }
}

/// The frames of a file, up to the first that is not whole.
struct Frames {
    path: PathBuf,
    file: BufReader<File>,
    salt: u64,
    len: u64,
    /// Where the next frame begins.
    position: u64,
    records: Vec<u8>,
}

impl Frames {
    fn open(place: &Place, name: &Name) -> Result<Frames, DiskError> {
        let path = place.path(name);
        let file = File::open(&path).map_err(DiskError::io("opening", &path))?;
        let len = file.metadata().map_err(DiskError::io("reading", &path))?.len();
        let mut file = BufReader::with_capacity(BUFFER, file);
        let head = Head { name: *name, keyspace: place.keyspace };
        let mut found = [0; HEAD];
        // A file gets its name when its head is on disk.
        if len < HEAD as u64 {
            return Err(DiskError::damaged(&path, 0, "it has no head"));
        }
        file.read_exact(&mut found).map_err(DiskError::io("reading", &path))?;
        if found != head.to_bytes() {
            return Err(DiskError::damaged(
                &path,
                0,
                "its head is not the one that its name and its directory ask for",
            ));
        }
        Ok(Frames { path, file, salt: head.salt(), len, position: HEAD as u64, records: Vec::new() })
    }

    /// The next frame, unless there is none that is whole.
    fn next(&mut self) -> Result<Option<(Frame, &[u8])>, DiskError> {
        let left = self.len - self.position;
        if left < FRAME_HEAD as u64 {
            return Ok(None);
        }
        let mut head = [0; FRAME_HEAD];
        match self.file.read_exact(&mut head) {
            // Another core has cut off what was behind.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            read => read.map_err(DiskError::io("reading", &self.path))?,
        }
        let Some(frame) = Frame::from_bytes(&head, self.position) else { return Ok(None) };
        if u64::from(frame.len) > left - FRAME_HEAD as u64 {
            return Ok(None);
        }
        self.records.clear();
        let records = (&mut self.file).take(frame.len.into()).read_to_end(&mut self.records);
        records.map_err(DiskError::io("reading", &self.path))?;
        if !frame.covers(&self.records, self.salt) {
            return Ok(None);
        }
        self.position += FRAME_HEAD as u64 + u64::from(frame.len);
        Ok(Some((frame, &self.records)))
    }

    /// Whether a file of that length ends with a frame at `position` that says that all before it is on disk.
    fn is_closed(&self, position: u64, len: u64) -> Result<bool, DiskError> {
        if len != position + FRAME_HEAD as u64 {
            return Ok(false);
        }
        let mut head = [0; FRAME_HEAD];
        let read = self.file.get_ref().read_exact_at(&mut head, position);
        read.map_err(DiskError::io("reading", &self.path))?;
        let frame = Frame::from_bytes(&head, position);
        Ok(frame.is_some_and(|frame| frame.synced == position && frame.covers(&[], self.salt)))
    }

    /// Where a whole frame behind `position` begins, in a file of that length, which says that the file was on disk beyond `position`.
    fn synced_beyond(&self, position: u64, len: u64) -> Result<Option<u64>, DiskError> {
        let file = self.file.get_ref();
        let read_at =
            |bytes: &mut [u8], at| file.read_exact_at(bytes, at).map_err(DiskError::io("reading", &self.path));
        let finder = memmem::Finder::new(&FRAME_MAGIC);
        let mut window = vec![0; BUFFER];
        let mut at = position;
        while at + FRAME_HEAD as u64 <= len {
            let here = (len - at).min(BUFFER as u64) as usize;
            read_at(&mut window[..here], at)?;
            for found in finder.find_iter(&window[..here]) {
                let begin = at + found as u64;
                let mut head = [0; FRAME_HEAD];
                if begin + FRAME_HEAD as u64 > len {
                    break;
                }
                read_at(&mut head, begin)?;
                let Some(frame) = Frame::from_bytes(&head, begin).filter(|frame| frame.synced > position) else {
                    continue;
                };
                let from = begin + FRAME_HEAD as u64;
                if u64::from(frame.len) > len - from {
                    continue;
                }
                let mut records = vec![0; frame.len as usize];
                read_at(&mut records, from)?;
                if frame.covers(&records, self.salt) {
                    return Ok(Some(begin));
                }
            }
            // A magic may lie across the end of the window.
            at += (here - FRAME_MAGIC.len() + 1).max(1) as u64;
        }
        Ok(None)
    }
}
