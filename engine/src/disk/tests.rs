//! Stores that are kept, killed, torn, damaged and started again, against what they held.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::Millis;
use crate::backend::{FILE_BACKEND, Registry};
use crate::hash::{KeyHash, ShardId};
use crate::record::Meta;
use crate::store::{Store, StoreConfig};

const SHARDS: u16 = 32;
const NOW: Millis = 1_700_000_000_000;

/// A directory of its own, gone at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Scratch(std::env::temp_dir().join(format!("gridkv-disk-{}-{count}", std::process::id())))
    }

    /// Paths of the files of a kind, in the order of their names.
    fn files(&self, kind: &str) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|extension| extension == kind));
        files.sort();
        files
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Core {
    store: Store,
    log: Rc<RefCell<Log>>,
    restored: Restored,
    snapshot: Option<Snapshot>,
}

type Held = BTreeMap<Vec<u8>, (Vec<u8>, Meta)>;

impl Core {
    fn open(place: &Arc<Place>, owned: Range<u16>) -> Result<Core, DiskError> {
        let config = StoreConfig { keyspace: place.keyspace(), owned, ..StoreConfig::default() };
        let backend = Registry::default().make(FILE_BACKEND, &config.backend()).unwrap();
        let mut store = Store::new(config, backend);
        let (log, restored) = Log::open(place, &mut store, || {})?;
        store.invariants();
        let log = Rc::new(RefCell::new(log));
        let spilled = log.clone();
        store.journal().unwrap().keep_with(move |records| spilled.borrow_mut().append(records, crate::hlc::Hlc::ZERO));
        Ok(Core { store, log, restored, snapshot: None })
    }

    /// The end of a turn.
    fn keep(&mut self) {
        let hlc = self.store.last_hlc();
        self.store.journal().unwrap().take(|records| self.log.borrow_mut().append(records, hlc));
        assert_eq!(self.log.borrow().failure(), None);
    }

    fn step(&mut self) -> Option<Step> {
        let step = self.snapshot.as_mut()?.step(&mut self.log.borrow_mut(), &mut self.store).unwrap();
        if matches!(step, Step::Done(_)) {
            self.snapshot = None;
        }
        Some(step)
    }

    fn begin_snapshot(&mut self) {
        self.snapshot = Some(self.log.borrow().snapshot().unwrap());
    }

    fn finish_snapshot(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Some(step) = self.step() {
            self.keep();
            assert!(Instant::now() < deadline, "the snapshot does not end");
            if step == Step::Wait {
                std::thread::yield_now();
            }
        }
    }
}

/// A node of several cores.
struct Node {
    cores: Vec<Core>,
}

impl Node {
    fn open(dir: &Scratch, cores: u16) -> Result<Node, DiskError> {
        let shards = ShardCount::new(SHARDS.into()).unwrap();
        let place = Arc::new(Place::open(&dir.0, shards, None, 99)?);
        let bounds = |core| core * SHARDS / cores;
        let cores = (0..cores).map(|core| Core::open(&place, bounds(core)..bounds(core + 1)));
        Ok(Node { cores: cores.collect::<Result<_, _>>()? })
    }

    fn core(&mut self, key: &[u8]) -> (&mut Core, KeyHash) {
        let hash = self.cores[0].store.locate(key);
        (self.cores.iter_mut().find(|core| core.store.owns(hash)).unwrap(), hash)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) {
        let (core, hash) = self.core(key);
        core.store.set(hash, key, value, 0, NOW).unwrap();
    }

    fn keep(&mut self) {
        self.cores.iter_mut().for_each(Core::keep);
    }

    fn held(&mut self) -> Held {
        let mut held = Held::new();
        for core in &mut self.cores {
            for shard in core.store.owned().map(ShardId) {
                core.store.snapshot(shard, KeyHash(0), usize::MAX, &mut |entry| {
                    held.insert(entry.key.to_vec(), (entry.value.to_vec(), entry.meta()));
                });
            }
        }
        held
    }

    fn sync(&mut self) {
        self.cores.iter().for_each(|core| core.log.borrow_mut().sync_now().unwrap());
    }
}

#[derive(Clone, Debug)]
enum Act {
    Set(u8, u8, bool),
    Delete(u8),
    Edit(u8, u8, u8),
    Expire(u8, u32),
    Sweep,
    Clear,
    Keep,
    Sync,
    Snapshot(u8),
    Step(u8),
    /// The process is killed and started with so many cores.
    Restart(u16),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        20 => (any::<u8>(), any::<u8>(), any::<bool>()).prop_map(|(k, n, e)| Act::Set(k, n, e)),
        6 => any::<u8>().prop_map(Act::Delete),
        6 => (any::<u8>(), 0u8..60, 0u8..60).prop_map(|(k, at, n)| Act::Edit(k, at, n)),
        4 => (any::<u8>(), 1u32..100).prop_map(|(k, ms)| Act::Expire(k, ms)),
        2 => Just(Act::Sweep),
        1 => Just(Act::Clear),
        8 => Just(Act::Keep),
        1 => Just(Act::Sync),
        2 => any::<u8>().prop_map(Act::Snapshot),
        12 => any::<u8>().prop_map(Act::Step),
        1 => (1u16..4).prop_map(Act::Restart),
    ]
}

/// What a killed process leaves is what it held at the end of its last turn, whatever it was doing.
fn play(acts: &[Act]) {
    let dir = Scratch::new();
    let mut node = Node::open(&dir, 2).unwrap();
    let mut now = NOW;
    for act in acts {
        now += 3;
        let key = |k: u8| format!("key:{k}").into_bytes();
        match *act {
            Act::Set(k, n, expires) => {
                let (core, hash) = node.core(&key(k));
                let expires_at = if expires { now + 50 } else { 0 };
                core.store.set(hash, &key(k), &vec![n; n.into()], expires_at, now).unwrap();
            }
            Act::Delete(k) => {
                let (core, hash) = node.core(&key(k));
                core.store.delete(hash, &key(k), now).unwrap();
            }
            Act::Edit(k, at, n) => {
                let (core, hash) = node.core(&key(k));
                let part = at.into()..usize::from(at) + usize::from(n);
                core.store.edit(hash, &key(k), part, now, &mut |part| part.fill(n)).unwrap();
            }
            Act::Expire(k, ms) => {
                let (core, hash) = node.core(&key(k));
                core.store.set_expiry(hash, &key(k), now + Millis::from(ms), now).unwrap();
            }
            Act::Sweep => node.cores.iter_mut().for_each(|core| while core.store.sweep(now, 64).more {}),
            Act::Clear => node.cores[0].store.clear(now).unwrap(),
            Act::Keep => node.keep(),
            Act::Sync => node.sync(),
            Act::Snapshot(core) => {
                let at = usize::from(core) % node.cores.len();
                node.cores[at].finish_snapshot();
                node.cores[at].begin_snapshot();
            }
            Act::Step(core) => {
                let at = usize::from(core) % node.cores.len();
                node.cores[at].step();
            }
            Act::Restart(cores) => {
                node.keep();
                let held = node.held();
                drop(node);
                node = Node::open(&dir, cores).unwrap();
                assert!(node.held() == held, "started again with {cores} cores");
            }
        }
    }
    node.keep();
    node.cores.iter_mut().for_each(Core::finish_snapshot);
    let held = node.held();
    drop(node);
    let mut node = Node::open(&dir, 3).unwrap();
    assert!(node.held() == held);
    // A snapshot of every core leaves nothing of what was before.
    for core in &mut node.cores {
        core.begin_snapshot();
        core.finish_snapshot();
    }
    drop(node);
    let left = dir.files("log").len() + dir.files("snapshot").len();
    assert_eq!((left, dir.files("new").len()), (6, 0), "{:?}", fs::read_dir(&dir.0).unwrap().collect::<Vec<_>>());
    let mut node = Node::open(&dir, 1).unwrap();
    assert!(node.held() == held);
    assert_eq!(node.cores[0].restored.torn, []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_killed_process_leaves_what_it_held(acts in prop::collection::vec(act(), 1..120)) {
        play(&acts);
    }

    /// Power fails: what was synced is there, and of what followed a prefix. Whatever the disk made of the rest.
    #[test]
    fn a_power_failure_leaves_all_that_was_synced(
        turns in prop::collection::vec((any::<u8>(), 1u8..80), 2..40), synced: prop::sample::Index,
        cut: prop::sample::Index, zeros: bool,
    ) {
        let dir = Scratch::new();
        let mut node = Node::open(&dir, 1).unwrap();
        let synced = synced.index(turns.len());
        let mut states = vec![Held::new()];
        let mut lengths = Vec::new();
        let path = dir.files("log").pop().unwrap();
        for (at, (key, len)) in turns.iter().enumerate() {
            node.set(&[*key], &vec![at as u8; (*len).into()]);
            node.keep();
            states.push(node.held());
            lengths.push(fs::metadata(&path).unwrap().len());
            if at == synced {
                node.sync();
            }
        }
        drop(node);
        // The end is missing, or some of it is: then what follows has reached the disk before it.
        let mut bytes = fs::read(&path).unwrap();
        let first = lengths[synced] as usize;
        let cut = first + cut.index(bytes.len() - first + 1);
        if zeros {
            let to = (cut + 60).min(bytes.len());
            bytes[cut..to].fill(0);
        } else {
            bytes.truncate(cut);
        }
        let untouched = bytes == fs::read(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        // What a later frame says of being synced is only so when it was.
        let says_more = turns.len() - 1 > synced && zeros;
        match Node::open(&dir, 1) {
            Ok(mut node) => {
                let held = node.held();
                let kept = states.iter().rposition(|state| *state == held).expect("it is a state that there was");
                prop_assert!(kept > synced, "{kept} of {} turns, synced after {synced}", turns.len());
                prop_assert_eq!(untouched, kept == turns.len() && node.cores[0].restored.torn.is_empty());
                drop(node);
                // It is cut off for good.
                let mut node = Node::open(&dir, 1).unwrap();
                prop_assert!(node.held() == held && node.cores[0].restored.torn.is_empty());
            }
            Err(error) => prop_assert!(false, "{error} ({says_more})"),
        }
    }
}

/// Some entries in a log that was synced, with a frame behind that says so.
fn kept(dir: &Scratch) -> (PathBuf, usize) {
    let mut node = Node::open(dir, 1).unwrap();
    for n in 0..20u8 {
        node.set(&[n], &[n; 50]);
        node.keep();
    }
    node.sync();
    let path = dir.files("log").pop().unwrap();
    let synced = fs::metadata(&path).unwrap().len() as usize;
    node.set(b"last", b"one");
    node.keep();
    (path, synced)
}

#[test]
fn what_was_synced_and_cannot_be_read_is_damage() {
    let dir = Scratch::new();
    let (path, synced) = kept(&dir);
    let whole = fs::read(&path).unwrap();
    for at in (0..synced).step_by(61) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        let error = Node::open(&dir, 1).err().unwrap_or_else(|| panic!("byte {at} was wrong"));
        let DiskError::Damaged { path: named, position, .. } = &error else { panic!("{error}") };
        assert!(*named == path && *position <= at as u64 && (at < HEAD || at as u64 - position < 200), "{at}: {error}");
        assert!(error.hint().contains("backup"));
        assert_eq!(fs::read(&path).unwrap(), bytes, "nothing is touched");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(Node::open(&dir, 1).unwrap().held().len(), 21);
}

#[test]
fn files_that_are_missing_mixed_up_or_of_another_directory_are_noticed() {
    let dir = Scratch::new();
    let (path, _) = kept(&dir);
    let mut node = Node::open(&dir, 1).unwrap();
    let held = node.held();
    // A snapshot that is not finished leaves two logs, of which the second goes on where the first ends.
    node.cores[0].begin_snapshot();
    let deadline = Instant::now() + Duration::from_secs(30);
    while node.cores[0].step() != Some(Step::More) {
        assert!(Instant::now() < deadline, "no new log");
        std::thread::yield_now();
    }
    drop(node);
    let logs = dir.files("log");
    assert_eq!((logs.len(), dir.files("snapshot").len()), (3, 0));
    assert!(Node::open(&dir, 2).unwrap().held() == held);

    let away = dir.0.join("away");
    fs::rename(&logs[1], &away).unwrap();
    assert!(matches!(Node::open(&dir, 1), Err(DiskError::Damaged { path, .. }) if path == logs[2]));
    fs::rename(&path, &logs[1]).unwrap();
    assert!(matches!(Node::open(&dir, 1), Err(DiskError::Damaged { path, position: 0, .. }) if path == logs[1]));
    fs::rename(&logs[1], &path).unwrap();
    fs::rename(&away, &logs[1]).unwrap();
    assert!(Node::open(&dir, 1).unwrap().held() == held);

    let other = Scratch::new();
    let shards = ShardCount::new(SHARDS.into()).unwrap();
    drop(Place::open(&other.0, shards, Some(7), 0).unwrap());
    fs::copy(&path, other.0.join(path.file_name().unwrap())).unwrap();
    assert!(matches!(Node::open(&other, 1), Err(DiskError::Damaged { position: 0, .. })));
}

#[test]
fn a_directory_belongs_to_one_process_and_keeps_its_layout() {
    let dir = Scratch::new();
    let shards = |n| ShardCount::new(n).unwrap();
    let place = Place::open(&dir.0, shards(64), Some(5), 6).unwrap();
    assert!(matches!(Place::open(&dir.0, shards(64), None, 6), Err(DiskError::Locked(_))));
    drop(place);
    assert_eq!(Place::open(&dir.0, shards(64), None, 6).unwrap().keyspace().seed, 5);
    for wrong in [Place::open(&dir.0, shards(32), None, 6), Place::open(&dir.0, shards(64), Some(6), 6)] {
        assert!(matches!(wrong, Err(DiskError::Layout { .. })), "{wrong:?}");
    }
    fs::write(dir.0.join("layout"), "format = 2\nseed = 5\nshards = 64\n").unwrap();
    let error = Place::open(&dir.0, shards(64), None, 6).unwrap_err();
    assert!(error.to_string().contains("format is 2"), "{error}");
}

#[test]
fn a_snapshot_that_is_damaged_or_cut_is_refused() {
    let dir = Scratch::new();
    let mut node = Node::open(&dir, 1).unwrap();
    for n in 0..2000u16 {
        node.set(&n.to_le_bytes(), &[7; 40]);
    }
    node.keep();
    node.cores[0].begin_snapshot();
    node.cores[0].finish_snapshot();
    let stats = node.cores[0].log.borrow().stats();
    assert_eq!((stats.snapshots, stats.failed_snapshots), (1, 0));
    drop(node);
    let path = dir.files("snapshot").pop().unwrap();
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.len() as u64, stats.snapshot_bytes);
    for wrong in [&whole[..whole.len() - 1], &whole[..whole.len() - 60], &[&whole[..], b"x"].concat()] {
        fs::write(&path, wrong).unwrap();
        assert!(matches!(Node::open(&dir, 1), Err(DiskError::Damaged { .. })), "{} bytes", wrong.len());
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(Node::open(&dir, 1).unwrap().held().len(), 2000);
}

#[test]
fn what_was_not_finished_is_removed_and_the_clock_goes_on() {
    let dir = Scratch::new();
    let mut node = Node::open(&dir, 1).unwrap();
    let (core, hash) = node.core(b"k");
    let ahead = core.store.set(hash, b"k", b"v", 0, NOW + 1_000_000).unwrap();
    core.store.delete(hash, b"k", NOW).unwrap();
    core.keep();
    drop(node);
    let unfinished = dir.0.join("000001-000001-00000-00032.snapshot.new");
    fs::write(&unfinished, b"half").unwrap();
    let mut node = Node::open(&dir, 1).unwrap();
    assert!(!unfinished.exists() && node.held().is_empty());
    // The entry is gone, its time is not: what comes now is newer.
    let (core, hash) = node.core(b"k");
    assert!(core.store.set(hash, b"k", b"w", 0, NOW).unwrap() > ahead);
}

#[test]
fn starts_in_which_nothing_is_written_leave_nothing() {
    let dir = Scratch::new();
    let mut node = Node::open(&dir, 2).unwrap();
    node.set(b"k", b"v");
    node.keep();
    node.cores.iter().for_each(|core| core.log.borrow_mut().close(crate::hlc::Hlc::ZERO).unwrap());
    drop(node);
    for cores in 1..4 {
        assert_eq!(Node::open(&dir, cores).unwrap().held().len(), 1);
        assert_eq!(dir.files("log").len(), 1);
    }
    let (log, whole) = (dir.files("log").remove(0), fs::read(dir.files("log").remove(0)).unwrap());
    let mut bytes = whole.clone();
    bytes[HEAD] ^= 1;
    fs::write(&log, &bytes).unwrap();
    for _ in 0..3 {
        assert!(matches!(Node::open(&dir, 3), Err(DiskError::Damaged { .. })));
        assert_eq!(dir.files("log").len(), 1);
    }
    fs::write(&log, &whole).unwrap();
    assert_eq!(Node::open(&dir, 1).unwrap().held().len(), 1);
}

/// What one turn writes is much: it goes to the log on the way.
#[test]
fn a_turn_of_many_bytes_does_not_pile_up() {
    let dir = Scratch::new();
    let mut node = Node::open(&dir, 1).unwrap();
    let value = vec![b'v'; 1 << 20];
    for n in 0..10u8 {
        node.set(&[n], &value);
    }
    assert!(node.cores[0].log.borrow().written() > 8 << 20);
    node.keep();
    let held = node.held();
    drop(node);
    assert!(Node::open(&dir, 1).unwrap().held() == held);
}
