//! What a core keeps on disk: its log in step with its turns, and a snapshot when the log has become long.
//!
//! At the end of each turn, before anything leaves the core, what has changed is appended to the log ([`Kept::keep`]): a process that is
//! killed then loses nothing that it has said. With `fsync = always` the [`Gate`] holds what the core says until a sync has
//! passed; else a task syncs in intervals, or nobody does.
//!
//! **When the disk fails** the node stops, and what it was about to say is not said: it cannot know what is on disk. A full disk is met
//! before that: below a reserve writes are refused, while deletes go on.
//!
//! Not here: files and formats ([`gridkv_engine::disk`]), and what waits at the gate.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use glommio::TaskQueueHandle;
use gridkv_engine::Millis;
use gridkv_engine::disk::{Log, Place, Restored, Snapshot, Step};
use gridkv_engine::hlc::Hlc;
use gridkv_engine::store::Store;

use super::gate::Gate;
use super::{Core, CoreRc};
use crate::Error;
use crate::config::{DataConfig, Fsync};
use crate::error::StartError;
use crate::handle::unix_ms;
use crate::metrics::OnDisk;
use crate::topology::Topology;

/// Bytes of logs below which no snapshot is taken: reading them takes a core less than a second.
const SHORT_LOG: u64 = 64 << 20;
/// Files that a start may have to read, more or less: each start adds one per core.
const FEW_FILES: u64 = 16;
/// Pause after a snapshot that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(60);
/// Pause when a snapshot waits for the disk.
const FOR_THE_DISK: Duration = Duration::from_millis(2);
/// Pause between two looks at the free space of the disk.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// Free bytes below which writes are refused. It is more than a second's writes, a few deletes, and the end of a snapshot take.
const RESERVE: u64 = 256 << 20;

const NOT_KEPT: &str = "its data cannot be kept on disk; the log has the error";

/// A core's data on disk.
pub(crate) struct Kept {
    log: Rc<RefCell<Log>>,
    fsync: Fsync,
    synced: Instant,
    looked: Instant,
    /// A snapshot was asked for.
    wanted: bool,
    not_before: Option<Instant>,
    snapshotting: bool,
    last_snapshot: Millis,
    last_failed: bool,
    /// The node is told once.
    failed: bool,
}

impl Kept {
    /// Reads the core's data into its store, which is empty, and begins to note what changes there.
    pub(super) fn open(
        place: &Arc<Place>,
        config: &DataConfig,
        store: &mut Store,
        wake: impl Fn() + Send + 'static,
    ) -> Result<(Kept, Restored), Error> {
        let (log, restored) = Log::open(place, store, wake)?;
        let log = Rc::new(RefCell::new(log));
        let spilled = log.clone();
        let Some(journal) = store.journal() else {
            let cause = "it notes nothing that could be kept on disk".to_owned();
            return Err(StartError::Backend { name: "of a node with a data directory".to_owned(), cause }.into());
        };
        // The end of the turn says what time it is.
        journal.keep_with(move |records| spilled.borrow_mut().append(records, Hlc::ZERO));
        let now = Instant::now();
        let kept = Kept {
            log,
            fsync: config.fsync,
            synced: now,
            looked: now,
            wanted: restored.files > FEW_FILES,
            not_before: None,
            snapshotting: false,
            last_snapshot: unix_ms(),
            last_failed: false,
            failed: false,
        };
        Ok((kept, restored))
    }

    /// Appends what has changed since the last call; says in the gate what waits for it, and how far the disk is.
    #[inline]
    pub(super) fn keep(&mut self, store: &mut Store, gate: &mut Gate, topology: &Topology) {
        let hlc = store.last_hlc();
        let Some(journal) = store.journal() else { return };
        // The log may have grown, or failed, in the middle of the turn, and nothing be left to append.
        if journal.is_empty() && gate.is_open() && self.fsync != Fsync::Always && !self.log.borrow().has_failed() {
            return;
        }
        let log = &mut *self.log.borrow_mut();
        journal.take(|records| log.append(records, hlc));
        if self.fsync == Fsync::Always {
            gate.note(log.written());
            gate.release(log.synced());
            log.sync();
        }
        if let Some(why) = log.failure() {
            gate.close();
            fail(&mut self.failed, &why, topology);
        }
    }

    /// The last call: all that was appended is on disk when it returns.
    pub(super) fn finish(&mut self, hlc: Hlc, gate: &mut Gate, topology: &Topology) {
        let log = &mut *self.log.borrow_mut();
        match log.close(hlc) {
            Ok(()) => gate.release(log.written()),
            Err(why) => {
                tracing::error!(why, "what was written last may not be on disk");
                topology.fail(NOT_KEPT);
            }
        }
    }

    /// Has a snapshot taken within moments; false if one is being taken.
    pub(crate) fn want_snapshot(&mut self) -> bool {
        let free = !self.wanted && !self.snapshotting;
        if free {
            (self.wanted, self.not_before) = (true, None);
        }
        free
    }

    /// Whether a snapshot is to be taken now.
    fn needs_snapshot(&self, memory: u64) -> bool {
        let long = || self.log.borrow().stats().since_snapshot >= SHORT_LOG.max(memory);
        self.not_before.is_none_or(|then| then <= Instant::now()) && (self.wanted || long())
    }

    /// What is known of it.
    pub(crate) fn stats(&self) -> OnDisk {
        OnDisk {
            kept: true,
            log: self.log.borrow().stats(),
            snapshotting: self.wanted || self.snapshotting,
            last_snapshot: self.last_snapshot,
            failed: self.last_failed,
        }
    }

    /// What is done now and then: syncing in intervals, looking whether the disk is full.
    fn attend(&mut self, store: &mut Store, gate: &mut Gate, topology: &Topology) {
        let failure = self.log.borrow().failure();
        if let Some(why) = failure {
            // A sync in the background has failed, and nothing was written since.
            gate.close();
            fail(&mut self.failed, &why, topology);
        }
        if let Fsync::Every(interval) = self.fsync
            && self.synced.elapsed() >= interval
        {
            self.synced = Instant::now();
            self.log.borrow_mut().sync();
        }
        if self.looked.elapsed() >= BETWEEN_LOOKS {
            self.looked = Instant::now();
            let dir = self.log.borrow().place().dir().to_owned();
            let free = rustix::fs::statvfs(&dir).map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
            let full = free < RESERVE;
            if full != store.is_disk_full() {
                store.set_disk_full(full);
                match full {
                    true => {
                        tracing::error!(?dir, free, "the disk is nearly full: writes are refused until there is room")
                    }
                    false => tracing::info!(?dir, free, "the disk has room again: writes are taken"),
                }
            }
        }
    }
}

/// Has the node stop, once.
#[cold]
fn fail(failed: &mut bool, why: &str, topology: &Topology) {
    if !std::mem::replace(failed, true) {
        tracing::error!(why, "what was written cannot be kept on disk");
        topology.fail(NOT_KEPT);
    }
}

impl Core {
    /// Appends to the log what has changed since the last call, and notes in the gate what waits for that and how far the log is
    /// on disk. Whatever lets something leave this core calls it before.
    #[inline]
    pub(super) fn keep(&self) {
        let state = &mut *self.state.borrow_mut();
        if let Some(kept) = &mut state.kept {
            kept.keep(&mut state.store, &mut state.gate, &self.topology);
        }
    }

    /// After the last turn: everything is on disk. A snapshot under way is given up first.
    pub(super) async fn finish_log(&self) {
        while self.state.borrow().kept.as_ref().is_some_and(|kept| kept.snapshotting) {
            glommio::timer::sleep(FOR_THE_DISK).await;
        }
        self.keep();
        let state = &mut *self.state.borrow_mut();
        if let Some(kept) = &mut state.kept {
            kept.finish(state.store.last_hlc(), &mut state.gate, &self.topology);
        }
        // The directory is let go, even if a task of the application keeps the core.
        state.kept = None;
        if let Some(journal) = state.store.journal() {
            journal.stop();
        }
    }
}

/// What the background task of a core does about its log. A snapshot that it begins is taken by a task of its own.
pub(super) fn attend(core: &CoreRc, queue: TaskQueueHandle) {
    core.keep();
    let state = &mut *core.state.borrow_mut();
    let memory = state.store.memory_bytes() as u64;
    let Some(kept) = &mut state.kept else { return };
    kept.attend(&mut state.store, &mut state.gate, &core.topology);
    if !kept.snapshotting && !state.store.is_disk_full() && kept.needs_snapshot(memory) && !core.stopping() {
        (kept.wanted, kept.snapshotting) = (false, true);
        glommio::spawn_local_into(run_snapshot(core.clone()), queue)
            .expect("the queue lives as long as the core")
            .detach();
    }
}

async fn run_snapshot(core: CoreRc) {
    // A task runs at once up to its first await, and its maker still borrows the core.
    futures_lite::future::yield_now().await;
    let began = Instant::now();
    let done = take_snapshot(&core).await;
    let state = &mut *core.state.borrow_mut();
    let Some(kept) = &mut state.kept else { return };
    kept.snapshotting = false;
    match done {
        Ok(Some(bytes)) => {
            (kept.last_snapshot, kept.last_failed) = (unix_ms(), false);
            tracing::info!(core = core.id.0, bytes, took = ?began.elapsed(), "a snapshot was taken");
        }
        Ok(None) => {}
        Err(why) => {
            (kept.wanted, kept.last_failed) = (true, true);
            kept.not_before = Some(Instant::now() + AFTER_FAILURE);
            tracing::error!(
                core = core.id.0,
                why,
                "no snapshot could be taken; the log grows on, and it is tried again"
            );
        }
    }
}

/// Takes a snapshot in slices; its bytes, or `None` when the core stops.
async fn take_snapshot(core: &CoreRc) -> Result<Option<u64>, String> {
    let start = |core: &CoreRc| -> Result<Option<Snapshot>, String> {
        let state = core.state.borrow();
        let kept = state.kept.as_ref();
        kept.map(|kept| kept.log.borrow().snapshot()).transpose().map_err(|error| error.to_string())
    };
    let Some(mut snapshot) = start(core)? else { return Ok(None) };
    while !core.stopping() {
        // A slice that was begun sees no change that is not in the log.
        core.keep();
        let step = {
            let state = &mut *core.state.borrow_mut();
            let Some(kept) = &mut state.kept else { return Ok(None) };
            if state.store.is_disk_full() {
                return Err("the disk is nearly full".to_owned());
            }
            let step = snapshot.step(&mut kept.log.borrow_mut(), &mut state.store);
            step.map_err(|error| error.to_string())?
        };
        match step {
            Step::More => futures_lite::future::yield_now().await,
            Step::Wait => glommio::timer::sleep(FOR_THE_DISK).await,
            Step::Done(bytes) => return Ok(Some(bytes)),
        }
    }
    Ok(None)
}
