//! What a node keeps on disk: who it is, what it promised as a voter, and the last map.
//!
//! ```text
//!   <dir>/LOCK       held as long as the node lives; names the process
//!   <dir>/identity   id = <32 hex digits>, boot = <number of the last life>
//!   <dir>/voter.a    the voter's two slots, written in turn (gridkv_cluster::register::slots)
//!   <dir>/voter.b
//!   <dir>/map        the map adopted last, behind a checksum
//! ```
//!
//! - **Lives are numbered upwards.** The number of a life is durable before the life begins, and greater than every one before,
//!   whatever the clock says, also than one that the map names: two lives never share one.
//! - **A vote is never forgotten silently.** Where promises may be lost (both slots are bad, a slot or the identity is gone)
//!   the node does not start. Giving the vote up is for a person to decide.
//! - **The map is a cache.** A bad one costs a question to the peers, nothing else.
//! - **First the disk, then the answer.** A completion given to [`DiskThread::voter`] runs when all states given before it, and
//!   its own, are durable. After the first failed write none runs ever again, because a state that failed to reach the disk
//!   cannot be told from one that did: the voter is silent until the node starts anew.
//!
//! Data is not here: a life that ends forgets what it held, and gets it back from the other replicas.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use gridkv_cluster::control::Remembered;
use gridkv_cluster::ids::NodeId;
use gridkv_cluster::map::Map;
use gridkv_cluster::register::slots::{self, Slot};
use gridkv_cluster::register::{MAX_VALUE, State};
use gridkv_engine::Millis;
use rustix::fs::{FlockOperation, flock};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, StartError};

const LOCK: &str = "LOCK";
const IDENTITY: &str = "identity";
const MAP: &str = "map";
/// An identity is two short lines.
const MAX_IDENTITY: usize = 4096;
/// In front of a map: what it is, and the checksum of the rest.
const MAP_MAGIC: &[u8; 8] = b"GRIDMAP1";
const MAP_HEADER: usize = 16;
/// Writes that may wait for the disk. They come one per message of a proposer, of which there are few.
const QUEUE: usize = 64;

fn slot_name(slot: Slot) -> &'static str {
    match slot {
        Slot::A => "voter.a",
        Slot::B => "voter.b",
    }
}

/// What a node starts its life with.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Who it is, in all its lives.
    pub(crate) id: NodeId,
    /// Which life begins.
    pub(crate) boot: u64,
    /// What it knows of the lives before.
    pub(crate) remembered: Remembered,
    /// Writes what must not be forgotten.
    pub(crate) disk: DiskThread,
}

/// The files of a node.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    /// Of the newest slot; 0 before the first write.
    generation: u64,
}

impl Directory {
    /// Begins a life in `dir`, made if it is missing; without one, a life of a new node that keeps nothing. `random` becomes
    /// the id of a new node. Blocks until the new life is durable; nothing may be sent before.
    ///
    /// # Errors
    /// [`StartError::Directory`], with the path and what to do.
    pub(crate) fn open(dir: Option<&Path>, wall_ms: Millis, random: u128) -> Result<Opened, Error> {
        let Some(dir) = dir else {
            let (id, remembered) = (NodeId(random), Remembered::default());
            return Ok(Opened { id, boot: wall_ms, remembered, disk: DiskThread::without_directory() });
        };
        make(dir).map_err(|error| failed(dir, "cannot be made", &error))?;
        let lock = lock(&dir.join(LOCK))?;
        let mut directory = Directory { path: dir.to_owned(), generation: 0 };

        let known = directory.read_identity()?;
        let voter = directory.read_voter(known.is_some())?;
        let remembered = Remembered { map: directory.read_map(), voter };
        let (id, boot) = match known {
            Some((id, last)) => {
                // A life that was given up goes on under another number, without a start.
                let named = remembered.known().and_then(|map| map.life_of(id).map(|life| life.about.boot));
                let last = last.max(named.unwrap_or(0));
                let next = last.checked_add(1).ok_or_else(|| directory.damaged_identity())?;
                (id, next.max(wall_ms))
            }
            None => (NodeId(random), wall_ms),
        };
        directory.write_identity(id, boot)?;

        let disk =
            DiskThread::start(directory, lock).map_err(|error| Error::os("starting the disk's thread", error))?;
        Ok(Opened { id, boot, remembered, disk })
    }

    fn read_identity(&self) -> Result<Option<(NodeId, u64)>, Error> {
        let path = self.path.join(IDENTITY);
        match read_bounded(&path, MAX_IDENTITY) {
            Ok(bytes) => match str::from_utf8(&bytes).ok().and_then(parse_identity) {
                Some(identity) => Ok(Some(identity)),
                None => Err(self.damaged_identity()),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(&path, "cannot be read", &error)),
        }
    }

    fn damaged_identity(&self) -> Error {
        refusal(
            &self.path.join(IDENTITY),
            "is damaged: it does not say `id = <32 hex digits>` and `boot = <number>`",
            "restore the file from a backup, with a `boot` that is no smaller than the last; to start as a new node, which \
             gives up the vote of the old one, remove the directory",
        )
    }

    fn write_identity(&self, id: NodeId, boot: u64) -> Result<(), Error> {
        self.replace(IDENTITY, format!("id = {id}\nboot = {boot}\n").as_bytes())
            .map_err(|error| failed(&self.path.join(IDENTITY), "cannot be written", &error))
    }

    /// The voter's state. Both slots are made before there is an identity, so later a missing one is a lost one.
    fn read_voter(&mut self, has_identity: bool) -> Result<State, Error> {
        let mut found = [Vec::new(), Vec::new()];
        for (slot, bytes) in [Slot::A, Slot::B].into_iter().zip(&mut found) {
            let path = self.path.join(slot_name(slot));
            if !has_identity {
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(&path)
                    .map_err(|error| failed(&path, "cannot be made", &error))?;
            }
            *bytes = match read_bounded(&path, slots::MAX_SLOT) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Err(refusal(&path, "is missing: what this node promised as a voter may be lost", GIVE_UP));
                }
                Err(error) => return Err(failed(&path, "cannot be read", &error)),
            };
        }
        let [a, b] = &found;
        if !has_identity {
            if found.iter().flatten().any(|&byte| byte != 0) {
                return Err(refusal(
                    &self.path.join(IDENTITY),
                    "is missing, but the promises of a voter are there: they belong to another node",
                    GIVE_UP,
                ));
            }
            sync_directory(&self.path).map_err(|error| failed(&self.path, "cannot be synced", &error))?;
            return Ok(State::default());
        }
        let recovered = slots::recover(a, b)
            .map_err(|error| refusal(&self.path.join(slot_name(Slot::A)), &format!("and voter.b: {error}"), GIVE_UP))?;
        let Some(recovered) = recovered else { return Ok(State::default()) };
        // What was read may never have reached the disk, if the life that wrote it was killed or failed to sync it. The next
        // write goes over the other slot, so this one has to be safe before.
        self.generation = recovered.generation;
        let slot = Slot::of(recovered.generation);
        self.put_slot(slot, &slots::encode_slot(recovered.generation, &recovered.state))
            .map_err(|error| failed(&self.path.join(slot_name(slot)), "cannot be written", &error))?;
        Ok(recovered.state)
    }

    /// Makes a state durable, over the older slot.
    fn write_voter(&mut self, state: &[u8]) -> io::Result<()> {
        let state = slots::decode_state(state).expect("the acceptor encodes its own state");
        let generation = self.generation + 1;
        self.put_slot(Slot::of(generation), &slots::encode_slot(generation, &state))?;
        self.generation = generation;
        Ok(())
    }

    /// The file must be there: if somebody took it away, what is written to it would be lost.
    fn put_slot(&self, slot: Slot, bytes: &[u8]) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.path.join(slot_name(slot)))?;
        file.write_all_at(bytes, 0)?;
        file.sync_data()
    }

    fn read_map(&self) -> Option<Map> {
        let path = self.path.join(MAP);
        let map = match read_bounded(&path, MAP_HEADER + MAX_VALUE) {
            Ok(bytes) => decode_map(&bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => Err(error.to_string()),
        };
        let warn = |why: &String| tracing::warn!(path = %path.display(), why, "the saved map is ignored");
        map.inspect_err(warn).ok()
    }

    fn write_map(&self, map: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(MAP_HEADER + map.len());
        bytes.extend_from_slice(MAP_MAGIC);
        bytes.extend_from_slice(&xxh3_64(map).to_le_bytes());
        bytes.extend_from_slice(map);
        self.replace(MAP, &bytes)
    }

    /// Replaces a file durably: whatever happens, the old content is there or the new.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = self.path.join(format!("{name}.new"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, self.path.join(name))?;
        sync_directory(&self.path)
    }
}

const GIVE_UP: &str = "this node must not vote under its identity any more, for it could contradict itself; restore the file \
                       only if nothing was written since, otherwise remove the directory: the node starts as a new one, and \
                       the cluster replaces the vote of the old one";

/// What becomes of an answer that waits for the disk.
type Done = Box<dyn FnOnce() + Send>;

enum Job {
    Voter(Option<Vec<u8>>, Done),
    Map(Vec<u8>),
}

/// Writes to a node's directory on a thread of its own, so that no core waits for a disk. Dropping it writes what is queued
/// and lets the directory go.
#[derive(Debug)]
pub(crate) struct DiskThread {
    /// None without a directory, where everything is done at once.
    thread: Option<Running>,
    /// The voter's newest state, if its write was not taken. Nobody was told of it; whoever is answered next relies on it.
    owed: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Running {
    jobs: flume::Sender<Job>,
    failed: Arc<AtomicBool>,
    handle: JoinHandle<()>,
    /// Let go after the thread has ended.
    _lock: File,
}

impl DiskThread {
    /// For a node that keeps nothing.
    fn without_directory() -> DiskThread {
        DiskThread { thread: None, owed: None }
    }

    fn start(directory: Directory, lock: File) -> io::Result<DiskThread> {
        let (jobs, queue) = flume::bounded(QUEUE);
        let failed = Arc::new(AtomicBool::new(false));
        let flag = failed.clone();
        let handle =
            thread::Builder::new().name("gridkv-disk".into()).spawn(move || write(directory, &queue, &flag))?;
        Ok(DiskThread { thread: Some(Running { jobs, failed, handle, _lock: lock }), owed: None })
    }

    /// Makes the voter's `state` durable, if it changed, and all states before it; then runs `done`, on the disk's thread, or
    /// here and now if there is no directory. Never waits: where the queue is full, and after a failure, `done` is dropped.
    pub(crate) fn voter(&mut self, state: Option<Vec<u8>>, done: impl FnOnce() + Send + 'static) {
        let Some(Running { jobs, .. }) = &self.thread else { return done() };
        let state = state.or_else(|| self.owed.take());
        if let Err(flume::TrySendError::Full(Job::Voter(Some(state), _))) =
            jobs.try_send(Job::Voter(state, Box::new(done)))
        {
            self.owed = Some(state);
        } else {
            self.owed = None;
        }
    }

    /// Keeps a map instead of the last. Never waits: where the queue is full, the next map is kept.
    pub(crate) fn map(&self, map: Vec<u8>) {
        if let Some(Running { jobs, .. }) = &self.thread {
            // The map is a cache.
            let _ = jobs.try_send(Job::Map(map));
        }
    }

    /// Whether a write of the voter failed, so that it is silent until the node starts anew.
    pub(crate) fn failed(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|running| running.failed.load(Ordering::Acquire) || running.handle.is_finished())
    }
}

impl Drop for DiskThread {
    fn drop(&mut self) {
        let Some(Running { jobs, handle, _lock, .. }) = self.thread.take() else { return };
        drop(jobs);
        if handle.join().is_err() {
            tracing::error!("the disk's thread panicked");
        }
    }
}

/// The disk's thread: takes all that is queued, makes the newest state durable, which contains those before it, and then says
/// so to all who wait.
fn write(mut directory: Directory, queue: &flume::Receiver<Job>, failed: &AtomicBool) {
    let mut map_failed = false;
    while let Ok(first) = queue.recv() {
        let (mut state, mut map, mut waiting) = (None, None, Vec::new());
        for job in std::iter::once(first).chain(queue.try_iter().take(QUEUE - 1)) {
            match job {
                Job::Voter(newer, done) => {
                    state = newer.or(state);
                    waiting.push(done);
                }
                Job::Map(newer) => map = Some(newer),
            }
        }
        if let Some(state) = state
            && let Err(error) = directory.write_voter(&state)
        {
            failed.store(true, Ordering::Release);
            let path = directory.path.join(slot_name(Slot::of(directory.generation + 1)));
            let (path, hint) = (path.display(), advice(&error));
            tracing::error!(%path, %error, hint, "cannot be written: this node votes no more until it is started anew");
            return;
        }
        for done in waiting {
            done();
        }
        if let Some(map) = map {
            let result = directory.write_map(&map);
            if let Err(error) = &result
                && !map_failed
            {
                let path = directory.path.join(MAP);
                tracing::warn!(path = %path.display(), %error, hint = advice(error), "the map cannot be saved");
            }
            map_failed = result.is_err();
        }
    }
}

/// Makes a directory, and the way to it, durably.
fn make(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let missing: Vec<&Path> =
        dir.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    for made in missing {
        match made.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent)?,
            _ => sync_directory(Path::new("."))?,
        }
    }
    Ok(())
}

/// Takes the directory for this process. The kernel lets it go when the process ends, however it ends.
fn lock(path: &Path) -> Result<File, Error> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = opened.map_err(|error| failed(path, "cannot be opened", &error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            // Only to name it; the lock says that there is one.
            let _ = file.take(32).read_to_string(&mut holder);
            let holder = holder.trim();
            let known = !holder.is_empty() && holder.bytes().all(|byte| byte.is_ascii_digit());
            let who = if known { format!("process {holder}") } else { "another process".into() };
            return Err(refusal(
                path,
                &format!("is held by {who}: another node runs in this directory"),
                "stop that node, or give this one a directory of its own",
            ));
        }
        Err(error) => return Err(failed(path, "cannot be locked", &error.into())),
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(|error| failed(path, "cannot be written", &error))?;
    Ok(file)
}

fn parse_identity(text: &str) -> Option<(NodeId, u64)> {
    let (mut id, mut boot) = (None, None);
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let (name, value) = line.split_once('=')?;
        match name.trim() {
            "id" => id = Some(value.trim().parse().ok()?),
            "boot" => boot = Some(value.trim().parse().ok()?),
            _ => return None,
        }
    }
    Some((id?, boot?))
}

fn decode_map(bytes: &[u8]) -> Result<Map, String> {
    let (header, map) = bytes.split_at_checked(MAP_HEADER).ok_or("it is too short")?;
    let sum = header.strip_prefix(MAP_MAGIC).ok_or("it is not a map of this version")?;
    if sum != xxh3_64(map).to_le_bytes() {
        return Err("its checksum is wrong".into());
    }
    Map::decode(map)
}

/// The content of a file, which may have `most` bytes.
fn read_bounded(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("it has more than {most} bytes")));
    }
    Ok(bytes)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn refusal(path: &Path, problem: &str, hint: &str) -> Error {
    StartError::Directory { path: path.to_owned(), problem: problem.into(), hint: hint.into() }.into()
}

fn failed(path: &Path, what: &str, error: &io::Error) -> Error {
    refusal(path, &format!("{what}: {error}"), advice(error))
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied => {
            "the user that runs the node must own the directory and all in it, and may need to search the ones above it"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space, or move the directory to a larger disk while the node is stopped; 50 MiB are plenty"
        }
        ErrorKind::ReadOnlyFilesystem => "the file system is mounted read-only; name a directory that can be written",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            "a file is where the directory should be; name a directory, which is made if it is missing"
        }
        ErrorKind::IsADirectory => "a directory is where a file of the node should be; remove it",
        ErrorKind::InvalidData => "the node does not write such a file; if the directory is the right one, restore it",
        ErrorKind::Unsupported => "the file system cannot do this; use a directory on a local disk",
        _ => "look into the system's log for errors of the disk, and use a directory on a local file system",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use gridkv_cluster::map::Candidate;
    use gridkv_cluster::quorum::Quorums;
    use gridkv_cluster::register::Ballot;

    use super::*;

    /// A place for a directory, gone at the end of the test.
    struct Place(PathBuf);

    impl Place {
        fn new() -> Place {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!("gridkv-directory-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            Place(std::env::temp_dir().join(name))
        }

        fn open(&self, wall_ms: Millis, random: u128) -> Result<Opened, Error> {
            Directory::open(Some(&self.0), wall_ms, random)
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        fn recover(&self) -> State {
            recover_in(&self.0)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn recover_in(dir: &Path) -> State {
        let [a, b] = [Slot::A, Slot::B].map(|slot| fs::read(dir.join(slot_name(slot))).unwrap());
        slots::recover(&a, &b).unwrap().map_or_else(State::default, |recovered| recovered.state)
    }

    fn state(counter: u64) -> State {
        let ballot = Ballot { counter, ..Ballot::default() };
        State { promised: ballot, accepted: Some((ballot, vec![counter as u8; 100])) }
    }

    fn write_states(disk: &mut DiskThread, counters: impl IntoIterator<Item = u64>) {
        for counter in counters {
            let (told, heard) = flume::bounded(1);
            disk.voter(Some(slots::encode_state(&state(counter))), move || told.send(()).unwrap());
            heard.recv().unwrap();
        }
    }

    fn map(cluster: u64) -> Map {
        let about = Candidate {
            id: NodeId(1),
            boot: 1,
            peer: "127.0.0.1:7380".parse().unwrap(),
            client: "127.0.0.1:7379".parse().unwrap(),
            cores: 1,
            zone: String::new(),
            weight: 100,
        };
        Map::create(cluster, 7, 32, Quorums { n: 3, w: 2, r: 2 }, about)
    }

    fn why(result: Result<Opened, Error>) -> (String, String) {
        let error = result.expect_err("it opened");
        let hint = error.hint().expect("a hint").into_owned();
        (error.to_string(), hint)
    }

    #[test]
    fn a_restarted_node_is_the_same_and_its_lives_are_numbered_upwards() {
        let place = Place::new();
        let first = place.open(1000, 0xA1).unwrap();
        assert_eq!((first.id, first.boot), (NodeId(0xA1), 1000));
        assert_eq!(first.remembered.voter, State::default());
        assert!(first.remembered.map.is_none());
        drop(first);
        for (wall_ms, boot) in [(5000, 5000), (5000, 5001), (10, 5002), (0, 5003)] {
            let next = place.open(wall_ms, 0xB2).unwrap();
            assert_eq!((next.id, next.boot), (NodeId(0xA1), boot), "the clock said {wall_ms}");
            let saved = fs::read_to_string(place.file(IDENTITY)).unwrap();
            assert_eq!(saved, format!("id = {:032x}\nboot = {boot}\n", 0xA1));
        }
    }

    /// A life that was given up came back under a number of its own, from a clock that was ahead; then the process ended. What follows
    /// that number has to be on disk too, or two starts in a row would be one life.
    #[test]
    fn a_number_above_the_one_in_the_map_is_on_disk_before_the_life_begins() {
        let place = Place::new();
        drop(place.open(5, 1).unwrap());
        let mut named = map(1);
        named.members[0].about.boot = 9_000;
        let opened = place.open(6, 1).unwrap();
        opened.disk.map(named.encode());
        drop(opened);
        for boot in [9_001, 9_002] {
            assert_eq!(place.open(7, 1).unwrap().boot, boot);
            assert_eq!(fs::read_to_string(place.file(IDENTITY)).unwrap(), format!("id = {:032x}\nboot = {boot}\n", 1));
        }
    }

    #[test]
    fn a_directory_is_private_and_made_with_the_way_to_it() {
        use std::os::unix::fs::PermissionsExt;
        let place = Place::new();
        let inner = place.file("some/where");
        drop(Directory::open(Some(&inner), 1, 1).unwrap());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&inner), 0o700);
        for name in [LOCK, IDENTITY, "voter.a", "voter.b"] {
            assert_eq!(mode(&inner.join(name)) & 0o077, 0, "{name}");
        }
    }

    #[test]
    fn two_nodes_never_share_a_directory() {
        let place = Place::new();
        let first = place.open(1, 1).unwrap();
        let (error, hint) = why(place.open(2, 2));
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains(place.file(LOCK).to_str().unwrap()), "{error}");
        assert!(hint.contains("stop that node"), "{hint}");
        assert_eq!(fs::read_to_string(place.file(IDENTITY)).unwrap(), format!("id = {:032x}\nboot = 1\n", 1));
        drop(first);
        assert_eq!(place.open(2, 2).unwrap().id, NodeId(1));
    }

    #[test]
    fn without_a_directory_every_start_is_a_new_node() {
        let mut opened = Directory::open(None, 77, 5).unwrap();
        assert_eq!((opened.id, opened.boot), (NodeId(5), 77));
        let (told, heard) = flume::bounded(1);
        opened.disk.voter(Some(slots::encode_state(&state(1))), move || told.send(()).unwrap());
        assert!(heard.try_recv().is_ok(), "done at once");
        opened.disk.map(map(1).encode());
        assert!(!opened.disk.failed());
    }

    #[test]
    fn promises_and_the_map_survive_a_restart() {
        let place = Place::new();
        for life in 0..4 {
            let mut opened = place.open(life, 1).unwrap();
            if life > 0 {
                assert_eq!(opened.remembered.voter, state(3 * life), "life {life}");
                assert_eq!(opened.remembered.map, Some(map(life)), "life {life}");
            }
            write_states(&mut opened.disk, 3 * life + 1..=3 * life + 3);
            opened.disk.map(map(life + 100).encode());
            opened.disk.map(map(life + 1).encode());
        }
    }

    #[test]
    fn an_answer_leaves_after_its_promise_is_on_disk_and_in_order() {
        let place = Place::new();
        let mut opened = place.open(1, 1).unwrap();
        let (told, heard) = flume::unbounded();
        for counter in 1..=40 {
            let (told, dir) = (told.clone(), place.0.clone());
            // Every third answer promises nothing new.
            let new = (counter % 3 != 0).then(|| slots::encode_state(&state(counter)));
            let promised = if new.is_some() { counter } else { counter - 1 };
            opened.disk.voter(new, move || {
                let on_disk = recover_in(&dir).promised.counter;
                told.send((counter, on_disk >= promised)).unwrap();
            });
        }
        drop(opened);
        drop(told);
        assert_eq!(heard.into_iter().collect::<Vec<_>>(), (1..=40).map(|n| (n, true)).collect::<Vec<_>>());
        assert_eq!(place.recover(), state(40));
    }

    #[test]
    fn a_state_that_found_no_place_is_written_before_the_next_answer() {
        let place = Place::new();
        let mut opened = place.open(1, 1).unwrap();
        // The disk is busy: its thread waits inside of a completion.
        let (go, wait) = flume::bounded::<()>(0);
        let (busy, is_busy) = flume::bounded(1);
        opened.disk.voter(None, move || {
            busy.send(()).unwrap();
            let _ = wait.recv();
        });
        is_busy.recv().unwrap();
        for _ in 0..QUEUE {
            opened.disk.voter(None, || {});
        }
        opened.disk.voter(Some(slots::encode_state(&state(9))), || panic!("there was no place for it"));
        opened.disk.voter(None, || panic!("there was no place for it"));
        drop(go);
        // A repeated question, answered from memory: nothing new, as far as the voter knows.
        let (told, heard) = flume::bounded(1);
        while opened.disk.owed.is_some() {
            let (told, dir) = (told.clone(), place.0.clone());
            opened.disk.voter(None, move || told.send(recover_in(&dir)).unwrap());
            thread::yield_now();
        }
        drop(told);
        assert_eq!(heard.recv(), Ok(state(9)));
    }

    #[test]
    fn after_a_failed_write_the_voter_is_silent() {
        let place = Place::new();
        let mut opened = place.open(1, 1).unwrap();
        write_states(&mut opened.disk, 1..=2);
        fs::remove_file(place.file("voter.b")).unwrap();
        fs::create_dir(place.file("voter.b")).unwrap();
        let (told, heard) = flume::unbounded();
        let ask = |disk: &mut DiskThread, counter: u64, new: bool| {
            let told = told.clone();
            let new = new.then(|| slots::encode_state(&state(counter)));
            disk.voter(new, move || told.send(counter).unwrap());
        };
        ask(&mut opened.disk, 3, true);
        while !opened.disk.failed() {
            thread::yield_now();
        }
        // Although the disk is well again: nobody can say what it holds.
        fs::remove_dir(place.file("voter.b")).unwrap();
        fs::write(place.file("voter.b"), slots::encode_slot(1, &state(1))).unwrap();
        ask(&mut opened.disk, 3, false);
        ask(&mut opened.disk, 4, true);
        assert!(why(place.open(2, 2)).0.contains("is held by"), "a silent node still has its directory");
        drop(opened);
        drop(told);
        assert_eq!(heard.recv(), Err(flume::RecvError::Disconnected), "somebody was answered");
        assert_eq!(place.open(2, 2).unwrap().remembered.voter, state(2));
        fs::remove_file(place.file("voter.b")).unwrap();
        fs::create_dir(place.file("voter.b")).unwrap();
        let (error, hint) = why(place.open(3, 3));
        assert!(error.contains("voter.b") && hint.contains("remove it"), "{error} {hint}");
    }

    #[test]
    fn a_torn_slot_costs_nothing_that_was_told_and_two_cost_the_vote() {
        let place = Place::new();
        write_states(&mut place.open(1, 1).unwrap().disk, 1..=4);
        let tear = |name: &str| {
            let bytes = fs::read(place.file(name)).unwrap();
            fs::write(place.file(name), &bytes[..bytes.len() / 2]).unwrap();
        };
        tear("voter.a");
        let mut opened = place.open(2, 2).unwrap();
        assert_eq!(opened.remembered.voter, state(3));
        write_states(&mut opened.disk, [7]);
        drop(opened);
        assert_eq!(place.recover(), state(7));
        tear("voter.a");
        tear("voter.b");
        let (error, hint) = why(place.open(3, 3));
        assert!(error.contains("damaged in both slots"), "{error}");
        assert!(hint.contains("must not vote") && hint.contains("remove the directory"), "{hint}");
        fs::remove_file(place.file("voter.a")).unwrap();
        assert!(why(place.open(3, 3)).0.contains("is missing"));
    }

    #[test]
    fn promises_are_not_taken_over_by_another_identity() {
        let place = Place::new();
        write_states(&mut place.open(1, 1).unwrap().disk, 1..=2);
        fs::write(place.file(IDENTITY), "id = 1\n").unwrap();
        assert!(why(place.open(2, 2)).0.contains("is damaged"));
        fs::write(place.file(IDENTITY), format!("id = {:032x}\nboot = {}\n", 1, u64::MAX)).unwrap();
        assert!(why(place.open(2, 2)).0.contains("is damaged"), "there is no life after the last");
        fs::remove_file(place.file(IDENTITY)).unwrap();
        assert!(why(place.open(2, 2)).0.contains("belong to another node"));
    }

    #[test]
    fn a_damaged_map_is_ignored() {
        let place = Place::new();
        place.open(1, 1).unwrap().disk.map(map(1).encode());
        let whole = fs::read(place.file(MAP)).unwrap();
        for at in [0, 9, MAP_HEADER + 3, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(place.file(MAP), &bytes).unwrap();
            assert_eq!(place.open(1, 1).unwrap().remembered.map, None, "flipped at {at}");
            fs::write(place.file(MAP), &whole[..at]).unwrap();
            assert_eq!(place.open(1, 1).unwrap().remembered.map, None, "cut at {at}");
        }
        fs::write(place.file(MAP), &whole).unwrap();
        assert_eq!(place.open(1, 1).unwrap().remembered.map, Some(map(1)));
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let place = Place::new();
        fs::write(&place.0, "").unwrap();
        let (error, hint) = why(place.open(1, 1));
        fs::remove_file(&place.0).unwrap();
        assert!(error.contains(place.0.to_str().unwrap()) && hint.contains("name a directory"), "{error} {hint}");
        fs::create_dir_all(place.file(IDENTITY)).unwrap();
        let (error, hint) = why(place.open(1, 1));
        assert!(error.contains(place.file(IDENTITY).to_str().unwrap()) && hint.contains("remove it"), "{error} {hint}");
    }
}
