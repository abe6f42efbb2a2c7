//! The backend `file` on disk: one append log per core, and snapshots that make logs short.
//!
//! ```text
//!   <dir>/LOCK        held as long as the node lives
//!   <dir>/layout      format, seed of the key hash, number of shards: of all other files
//!   <dir>/*.log       what changed, in frames (crate::journal), appended at the end of each turn of a core
//!   <dir>/*.snapshot  all entries of a core's shards; stands for every older file of these shards
//!   <dir>/*.new       not finished; removed at the next start
//! ```
//!
//! This is an edge: it blocks, and it has threads. A core's own part is [`Log::append`], a write into the page cache, so what a
//! killed process has answered survives it. Syncing and snapshots run on threads of their own; who may answer only what survives
//! a power failure, too, waits for [`Log::synced`].
//!
//! **A snapshot** is walked in slices between the core's turns, while entries change. A new log is begun before the first slice.
//! Since records are absolute, snapshot and new log together give what there was at any moment after the snapshot's end. Only
//! when the log up to there is on disk, and the snapshot too, it gets its name, and what it stands for is removed.
//!
//! **Starting** reads, for each shard, the newest snapshot and the logs from there on. Each start appends to new files. The number of
//! cores may change: every core reads all files that have some of its shards.
//!
//! **What cannot be read** at the end of a log was being written when power failed: it is cut off, and what was there was
//! never promised. Anywhere else it is damage: the node does not start, and says which file it is. See [`crate::journal`].
//!
//! Promises, after the process was killed: all that was answered. After a power failure: all that was synced, and of what
//! followed a prefix per core.

mod log;
mod names;
mod read;
mod snapshot;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

pub use self::log::{Log, LogStats};
pub use self::read::Restored;
pub use self::snapshot::{Snapshot, Step};

use self::names::{Kind, Name, Newest};
use crate::hash::{Keyspace, ShardCount};

/// Number of the format of all files.
const FORMAT: u32 = 1;
/// Bytes in front of a file's first frame.
const HEAD: usize = 64;
const LOG_MAGIC: [u8; 8] = *b"GRIDKV L";
const SNAPSHOT_MAGIC: [u8; 8] = *b"GRIDKV S";

/// Why data on disk cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The operating system refused something.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Another process uses the directory.
    #[error("{} is in use by another process", .0.display())]
    Locked(PathBuf),
    /// The directory was made with other settings, or by another version.
    #[error("{}: {why}", path.display())]
    Layout {
        /// The file that says so.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// A file holds something else than was written.
    #[error("{} is damaged at byte {position}: {why}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Where.
        position: u64,
        /// What is wrong there.
        why: String,
    },
}

impl DiskError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
        let path = path.to_owned();
        move |source| DiskError::Io { what, path, source }
    }

    fn damaged(path: &Path, position: u64, why: impl Into<String>) -> DiskError {
        DiskError::Damaged { path: path.to_owned(), position, why: why.into() }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            DiskError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                "let the user that runs the node read and write there".into()
            }
            DiskError::Io { source, .. } if source.kind() == ErrorKind::StorageFull => {
                "make room on that disk and start again; nothing that was kept is lost".into()
            }
            DiskError::Io { .. } => "see to the disk and start again".into(),
            DiskError::Locked(_) => "stop the other node, or give this one another directory".into(),
            DiskError::Layout { .. } => "start with the settings that the directory was made with, or in an empty one".into(),
            DiskError::Damaged { .. } => {
                "restore the directory from a backup; or move this file and the later ones of its start and shards away, and start without \
                 what they hold"
                    .into()
            }
        }
    }
}

/// A directory that a node keeps its data in.
#[derive(Debug)]
pub struct Place {
    dir: PathBuf,
    keyspace: Keyspace,
    start: u32,
    /// Held by the core that shortens a file: others may be reading it.
    shortening: Mutex<()>,
    /// Held, and let go by the kernel however the process ends.
    _lock: File,
}

impl Place {
    /// Takes a directory, made if it is missing, for a node with so many shards. `seed` is that of the key hash if it is to be a
    /// certain one; a new directory without gets `random`.
    ///
    /// # Errors
    /// [`DiskError`]: it is in use, was made with other settings, or cannot be read and written.
    pub fn open(dir: &Path, shards: ShardCount, seed: Option<u64>, random: u64) -> Result<Place, DiskError> {
        fs::create_dir_all(dir).map_err(DiskError::io("making", dir))?;
        let lock_path = dir.join("LOCK");
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(DiskError::io("opening", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(DiskError::Locked(dir.to_owned())),
            Err(fs::TryLockError::Error(error)) => return Err(DiskError::io("locking", &lock_path)(error)),
        }
        let path = dir.join("layout");
        let keyspace = match fs::read_to_string(&path) {
            Ok(text) => layout(&path, &text, shards, seed)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let keyspace = Keyspace { seed: seed.unwrap_or(random), shards };
                let text = format!("format = {FORMAT}\nseed = {}\nshards = {}\n", keyspace.seed, shards.get());
                let unfinished = dir.join("layout.new");
                fs::write(&unfinished, text).map_err(DiskError::io("writing", &unfinished))?;
                let file = File::open(&unfinished).map_err(DiskError::io("opening", &unfinished))?;
                file.sync_all().map_err(DiskError::io("syncing", &unfinished))?;
                fs::rename(&unfinished, &path).map_err(DiskError::io("renaming", &unfinished))?;
                keyspace
            }
            Err(error) => return Err(DiskError::io("reading", &path)(error)),
        };
        let mut place = Place { dir: dir.to_owned(), keyspace, start: 0, shortening: Mutex::default(), _lock: lock };
        place.start = place.names()?.iter().map(|name| name.start).max().unwrap_or(0) + 1;
        place.remove_unfinished()?;
        place.sync()?;
        Ok(place)
    }

    /// How keys map to shards in all files.
    pub fn keyspace(&self) -> Keyspace {
        self.keyspace
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All files that have data, in the order of their names.
    fn names(&self) -> Result<Vec<Name>, DiskError> {
        let read = || fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
        let found = read().map_err(DiskError::io("reading", &self.dir))?;
        let mut names: Vec<_> = found.iter().filter_map(|name| Name::parse(name.to_str()?)).collect();
        names.sort();
        Ok(names)
    }

    fn remove_unfinished(&self) -> Result<(), DiskError> {
        let entries = fs::read_dir(&self.dir).map_err(DiskError::io("reading", &self.dir))?;
        for entry in entries {
            let path = entry.map_err(DiskError::io("reading", &self.dir))?.path();
            let stem = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".new"));
            if stem.is_some_and(|stem| stem == "layout" || Name::parse(stem).is_some()) {
                fs::remove_file(&path).map_err(DiskError::io("removing", &path))?;
            }
        }
        Ok(())
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.dir.join(name.to_string())
    }

    /// What was renamed, made and removed is on disk.
    fn sync(&self) -> Result<(), DiskError> {
        let dir = File::open(&self.dir).map_err(DiskError::io("opening", &self.dir))?;
        dir.sync_all().map_err(DiskError::io("syncing", &self.dir))
    }

    /// Begins a file under the name it has until it is finished; the number its checksums are seeded with.
    fn begin(&self, name: &Name) -> Result<(File, u64), DiskError> {
        let path = self.dir.join(name.unfinished());
        let mut file = File::create(&path).map_err(DiskError::io("making", &path))?;
        let head = Head { name: *name, keyspace: self.keyspace };
        file.write_all(&head.to_bytes()).map_err(DiskError::io("writing", &path))?;
        Ok((file, head.salt()))
    }

    /// Syncs a file and gives it its name.
    fn finish(&self, file: &File, name: &Name) -> Result<(), DiskError> {
        let unfinished = self.dir.join(name.unfinished());
        file.sync_all().map_err(DiskError::io("syncing", &unfinished))?;
        fs::rename(&unfinished, self.path(name)).map_err(DiskError::io("renaming", &unfinished))?;
        self.sync()
    }

    /// Removes files that newer snapshots stand for; another core may do the same at the same time.
    fn remove_obsolete(&self) -> Result<(), DiskError> {
        let names = self.names()?;
        let newest = Newest::new(&names);
        for name in names.iter().filter(|name| newest.is_obsolete(name)) {
            let path = self.path(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(DiskError::io("removing", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// What a directory was made with.
fn layout(path: &Path, text: &str, shards: ShardCount, seed: Option<u64>) -> Result<Keyspace, DiskError> {
    let wrong = |why: String| DiskError::Layout { path: path.to_owned(), why };
    let number = |name: &str| -> Result<u64, DiskError> {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='));
        value
            .and_then(|value| value.trim().parse().ok())
            .ok_or_else(|| wrong(format!("it does not say what '{name}' is")))
    };
    let format = number("format")?;
    if format != u64::from(FORMAT) {
        return Err(wrong(format!("its format is {format}, and this version knows {FORMAT} only")));
    }
    let (of, found) = (number("shards")?, number("seed")?);
    if of != u64::from(shards.get()) {
        return Err(wrong(format!("it was made with {of} shards, not {}", shards.get())));
    }
    if let Some(seed) = seed.filter(|seed| *seed != found) {
        return Err(wrong(format!("it was made with the hash seed {found}, not {seed}")));
    }
    Ok(Keyspace { seed: found, shards })
}

/// How a file begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    name: Name,
    keyspace: Keyspace,
}

impl Head {
    /// What the file's frames are checked with: a frame of another file, or of another directory, is none of this one.
    fn salt(&self) -> u64 {
        xxh3_64(&self.to_bytes())
    }

    fn to_bytes(self) -> [u8; HEAD] {
        let Head { name, keyspace } = self;
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(if name.kind == Kind::Log { &LOG_MAGIC } else { &SNAPSHOT_MAGIC });
        head[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        head[12..16].copy_from_slice(&name.start.to_le_bytes());
        head[16..20].copy_from_slice(&name.number.to_le_bytes());
        head[20..22].copy_from_slice(&name.first.to_le_bytes());
        head[22..24].copy_from_slice(&name.end.to_le_bytes());
        head[24..26].copy_from_slice(&keyspace.shards.get().to_le_bytes());
        head[32..40].copy_from_slice(&keyspace.seed.to_le_bytes());
        let check = xxh3_64_with_seed(&head[..HEAD - 8], u64::from(FORMAT));
        head[HEAD - 8..].copy_from_slice(&check.to_le_bytes());
        head
    }
}
