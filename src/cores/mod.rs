//! A core of the node: one pinned executor, its shards, its sockets, its end of the mesh.
//!
//! Everything a core owns is [`State`], touched by nobody else. Its turn loop is one task:
//!
//! ```text
//!   ┌─▶ 1  sockets      bytes arrive, sessions run what is local, append what is not to lanes
//!   │   2  replies      of siblings fill the slots that wait for them
//!   │   3  requests     of siblings are served, their replies appended to lanes
//!   │   4  inbox        requests of foreign threads are served
//!   │   5  keep         what has changed goes to the log, where there is one
//!   │   6  hand over    one batch per sibling and lane; output to sockets; answers to foreign threads
//!   └── 7  yield        other tasks run; with nothing to do for a while: sleep
//! ```
//!
//! What is handed over speaks of nothing that changed after 5. Replies leave as far as the log is on disk ([`gate`]); those that
//! have to wait for it are handed over in a later turn.
//!
//! Invariants: `State` is borrowed only inside a turn or inside one call of a [`CoreHandle`], never across an await.
//! Nothing here blocks but the executor's own sleep. A panic inside one request is answered as an error of that request.
//!
//! Not here: what a request does ([`serve`]), and what a connection is (`connections`).

pub(crate) mod background;
mod backplane;
pub(crate) mod connections;
pub(crate) mod flush;
pub(crate) mod gate;
mod handle;
pub(crate) mod keep;
pub(crate) mod launch;
pub(crate) mod serve;
pub(crate) mod transaction;
mod waiters;
pub(crate) mod watch;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use futures_lite::FutureExt;
use gridkv_engine::Millis;
use gridkv_engine::store::Store;
use gridkv_net::frame::{Batch, Mark};
use gridkv_net::mesh::{CoreId, Mesh, REPLIES_PER_TURN};
use gridkv_net::signal::Signal;
use gridkv_net::sleeper::Sleeper;

use flush::Flushes;
use gate::{Gate, Queue};
pub use handle::CoreHandle;
use keep::Kept;
use serve::{Scratch, Serving};
use waiters::Waiters;

use crate::handle::unix_ms;
use crate::metrics::CoreMetrics;
use crate::server::Notes;
use crate::server::latency::Monitor;
use crate::server::settings::Settings;
use crate::server::slowlog::Slowlog;
use crate::topology::{Message, ReplyTo, Topology};
use crate::{Error, cluster};

/// `Head::conn` of requests that a future of this core waits for; connections never have this number.
pub(crate) const LOCAL: u64 = u64::MAX;

/// Messages of foreign threads that one turn takes.
const INBOX_PER_TURN: usize = 256;
/// Room made for the replies to a foreign thread: frames, and bytes of each.
const MOST_ROOM: usize = 1024;
const EXPECTED_REPLY: usize = 64;
/// Batches of one sibling that one turn serves.
const BATCHES_PER_TURN: usize = 8;

/// Turns in which a node that stops tells the others.
const FAREWELL_TURNS: usize = 4;
/// Idle turns between two looks at the clock.
const IDLE_TURNS_PER_LOOK: u32 = 16;
/// Idle turns before other tasks of the core may run: what comes from siblings meanwhile is met sooner.
const IDLE_TURNS_PER_YIELD: u32 = 4;

/// What a core owns.
pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) mesh: Mesh,
    /// The core's data on disk, where it is kept.
    pub(crate) kept: Option<Kept>,
    /// What of all that this core says may leave now.
    pub(crate) gate: Gate,
    /// Replies to foreign threads that have not left.
    pub(crate) foreign: Queue<(Batch, ReplyTo)>,
    pub(crate) waiters: Waiters,
    pub(crate) metrics: CoreMetrics,
    pub(crate) scratch: Scratch,
    /// Per sibling: a batch that was served in part because its replies grew large, and where to go on.
    unfinished: Vec<Option<(Batch, Mark)>>,
    /// Wall clock in unix milliseconds, read once per turn.
    pub(crate) now: Millis,
    /// This core's copy of what may change while the node runs.
    pub(crate) settings: Settings,
    pub(crate) slowlog: Slowlog,
    pub(crate) latency: Monitor,
    /// No other node holds a copy of this core's shards: requests are function calls.
    pub(crate) solo: bool,
    /// The node's, here for who has no topology.
    pub(crate) flushes: Arc<Flushes>,
}

impl State {
    /// What serving a batch needs of this core.
    pub(crate) fn serving(&mut self) -> Serving<'_> {
        let State { store, metrics, scratch, now, flushes, .. } = self;
        Serving { store, metrics, scratch, now: *now, flushes: Some(flushes) }
    }

    /// Where what took long is kept.
    pub(crate) fn notes(&mut self) -> Notes<'_> {
        let State { settings, now, slowlog, latency, .. } = self;
        Notes { settings, now: *now, slowlog, latency }
    }

    fn has_work(&self) -> bool {
        let safe = self.gate.safe();
        let goes_on = |from: usize| !self.mesh.is_gated(CoreId(from as u16), safe);
        self.mesh.has_work(safe)
            || self.unfinished.iter().enumerate().any(|(from, begun)| begun.is_some() && goes_on(from))
    }
}

/// A core, shared by the tasks of its executor.
pub(crate) struct Core {
    pub(crate) id: CoreId,
    pub(crate) topology: Arc<Topology>,
    pub(crate) state: RefCell<State>,
    pub(crate) connections: RefCell<Option<connections::Connections>>,
    /// This core's part in the cluster; `None` when the node stands alone.
    pub(crate) member: RefCell<Option<cluster::Member>>,
    /// The control plane of the node, on core 0.
    pub(crate) plane: RefCell<Option<cluster::plane::Plane>>,
    /// Whether the node takes part in a cluster.
    pub(crate) clustered: bool,
    /// A timer has passed: the next turn looks at the clock.
    ticked: Cell<bool>,
    inbox: flume::Receiver<Message>,
    signal: Arc<Signal>,
    sleeper: Sleeper,
    asleep: Cell<bool>,
    /// Tasks of application code, and tasks that make answers.
    tasks: Cell<usize>,
    stopping: Cell<bool>,
    spin: Duration,
}

/// The shape in which tasks hold their core.
pub(crate) type CoreRc = Rc<Core>;

impl Core {
    /// Whether the core was told to stop.
    pub(crate) fn stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Has the next turn look at the clock.
    pub(crate) fn ticked(&self) {
        self.ticked.set(true);
    }

    /// Another task of this core left work for the turn loop.
    #[inline]
    pub(crate) fn kick(&self) {
        if self.asleep.get() {
            self.sleeper.kick();
        }
    }

    /// A copy of the counters, with the sizes of this moment filled in.
    pub(crate) fn metrics(&self) -> CoreMetrics {
        let state = self.state.borrow();
        let mut metrics = state.metrics.clone();
        metrics.store = state.store.stats();
        metrics.max_memory = state.store.max_memory();
        metrics.inbox_depth = self.inbox.len() as u64;
        metrics.lane_depth = state.mesh.in_flight();
        metrics.disk = state.kept.as_ref().map(Kept::stats).unwrap_or_default();
        metrics.output_bytes = self.connections.borrow().as_ref().map_or(0, |connections| connections.output_bytes());
        metrics
    }

    /// One turn. Returns whether there was anything to do.
    fn turn(self: &Rc<Self>, look_at_clock: bool) -> bool {
        let mut work = false;
        let look = look_at_clock | self.ticked.replace(false);
        if look {
            self.state.borrow_mut().now = unix_ms();
        }
        if let Some(connections) = &mut *self.connections.borrow_mut() {
            work |= connections.turn(self);
        }
        work |= self.take_replies();
        work |= self.serve_siblings();
        if self.signal.take_post() {
            self.stopping.set(self.topology.is_stopping());
            work |= self.serve_foreign();
        }
        if self.clustered {
            work |= cluster::turn(self, look);
        }
        if let Some(connections) = &mut *self.connections.borrow_mut() {
            work |= connections.resume(self);
        }
        self.keep();
        self.hand_over(look, work)
    }

    /// Lets go what the gate lets pass. Returns whether this turn, which had `work`, had any.
    fn hand_over(self: &Rc<Self>, look: bool, mut work: bool) -> bool {
        if let Some(connections) = &mut *self.connections.borrow_mut() {
            work |= connections.flush(self, look);
        }
        let state = &mut *self.state.borrow_mut();
        let gate = state.gate;
        state.foreign.seal(gate.position());
        while let Some((replies, to)) = state.foreign.pop(&gate) {
            work = true;
            to.send(replies);
        }
        let (batches, wakes) = state.mesh.hand_over(gate.position(), gate.safe());
        work |= batches > 0;
        state.metrics.record_turn(work, batches, wakes);
        work
    }

    /// After the last turn: lets go what the gate lets pass by now. What it still holds ends with the core.
    fn let_go(self: &Rc<Self>) {
        self.hand_over(false, false);
        if let Some(connections) = &mut *self.connections.borrow_mut() {
            connections.submit();
        }
    }

    fn take_replies(self: &Rc<Self>) -> bool {
        let mut any = false;
        loop {
            let Some((from, batch)) = self.state.borrow_mut().mesh.next_replies() else { return any };
            any = true;
            let mut connections = self.connections.borrow_mut();
            for frame in batch.frames() {
                let frame = frame.expect("batches inside a node are whole");
                if frame.head.conn == LOCAL {
                    self.state.borrow_mut().waiters.answer(&frame);
                } else if let Some(connections) = &mut *connections {
                    connections.answer(self, &frame);
                }
            }
            drop(connections);
            let state = &mut *self.state.borrow_mut();
            state.metrics.record_replies(from, batch.len());
            state.mesh.recycle(batch);
        }
    }

    /// Between two turns: serves siblings and hands over what waits for them. A turn can be far when many tasks run; without this
    /// two cores of busy tasks would wait for each other in turn.
    fn attend_siblings(&self) {
        self.serve_siblings();
        self.keep();
        let state = &mut *self.state.borrow_mut();
        let (batches, wakes) = state.mesh.hand_over(state.gate.position(), state.gate.safe());
        state.metrics.record_turn(true, batches, wakes);
    }

    fn serve_siblings(&self) -> bool {
        let mut any = false;
        let state = &mut *self.state.borrow_mut();
        for from in (0..self.topology.cores() as u16).map(CoreId).filter(|&c| c != self.id) {
            for _ in 0..BATCHES_PER_TURN {
                if state.mesh.waiting_replies(from) >= REPLIES_PER_TURN {
                    break;
                }
                let (requests, mark) = match state.unfinished[from.index()].take() {
                    Some(unfinished) => unfinished,
                    None => match state.mesh.next_requests(from) {
                        Some(requests) => {
                            state.metrics.record_served(requests.len());
                            (requests, Mark::default())
                        }
                        None => break,
                    },
                };
                any = true;
                if !state.solo {
                    let mut member = self.member.borrow_mut();
                    let member = member.as_mut().expect("a core that is not solo has a part in a cluster");
                    // A batch may have been begun when this core still had its shards for itself.
                    let requests = requests.flat(mark);
                    for frame in requests.frames() {
                        let frame = frame.expect("batches inside a node are whole");
                        member.begin(state, &frame, cluster::requests::Origin::Sibling(from));
                    }
                    state.mesh.recycle(requests);
                    continue;
                }
                // The open batch is taken out while it is written, so that the rest of the state can be borrowed.
                let mut replies = std::mem::take(state.mesh.replies(from));
                let left = serve::batch(&mut state.serving(), &requests, mark, REPLIES_PER_TURN, &mut replies);
                *state.mesh.replies(from) = replies;
                if let Some(mark) = left {
                    state.unfinished[from.index()] = Some((requests, mark));
                    break;
                }
                state.mesh.recycle(requests);
            }
        }
        any
    }

    fn serve_foreign(self: &Rc<Self>) -> bool {
        for taken in 0.. {
            if taken == INBOX_PER_TURN {
                // More may be waiting: look again next turn.
                self.signal.post();
                break;
            }
            let Ok(message) = self.inbox.try_recv() else { break };
            match message {
                Message::Requests(requests, reply) => {
                    let state = &mut *self.state.borrow_mut();
                    state.metrics.record_foreign(requests.len());
                    if !state.solo {
                        let mut member = self.member.borrow_mut();
                        let member = member.as_mut().expect("a core that is not solo has a part in a cluster");
                        member.begin_group(state, requests, reply);
                        continue;
                    }
                    let mut replies = state.mesh.spare();
                    replies.reserve(requests.len().min(MOST_ROOM), EXPECTED_REPLY);
                    serve::batch(&mut state.serving(), &requests, Mark::default(), usize::MAX, &mut replies);
                    state.mesh.recycle(requests);
                    if state.gate.may_shut() {
                        state.foreign.push((replies, reply));
                    } else {
                        reply.send(replies);
                    }
                }
                Message::Run(f) => f(self),
            }
        }
        true
    }

    /// Whether a turn would find something.
    fn has_work(&self) -> bool {
        self.signal.has_post()
            || self.ticked.get()
            || self.state.borrow().has_work()
            || self.connections.borrow_mut().as_mut().is_some_and(|c| c.has_work())
    }

    /// The turn loop, until the core is told to stop.
    async fn run(self: Rc<Self>) {
        let mut idle_turns = 0u32;
        let mut idle_since = Instant::now();
        while !self.stopping.get() {
            // A look at the clock costs as much as an idle turn, so idle ones take it now and then.
            if self.turn(idle_turns.is_multiple_of(IDLE_TURNS_PER_LOOK)) {
                idle_turns = 0;
            } else {
                if idle_turns == 0 {
                    idle_since = Instant::now();
                } else if idle_turns.is_multiple_of(IDLE_TURNS_PER_LOOK) && idle_since.elapsed() >= self.spin {
                    self.sleep().await;
                    idle_turns = 0;
                    continue;
                }
                idle_turns += 1;
                if !idle_turns.is_multiple_of(IDLE_TURNS_PER_YIELD) {
                    continue;
                }
            }
            futures_lite::future::yield_now().await;
        }
        if self.clustered && self.id.0 == 0 {
            // The others are told, as far as a few turns can.
            cluster::plane::leave(&self);
            for _ in 0..FAREWELL_TURNS {
                self.turn(true);
                futures_lite::future::yield_now().await;
            }
        }
        self.finish_log().await;
        self.let_go();
    }

    async fn sleep(&self) {
        self.signal.announce_sleep();
        if let Some(connections) = &mut *self.connections.borrow_mut() {
            connections.set_wakeups(true);
        }
        self.asleep.set(true);
        if !self.has_work() {
            self.state.borrow_mut().metrics.sleeps += 1;
            self.sleeper.sleep().await;
        }
        self.asleep.set(false);
        if let Some(connections) = &mut *self.connections.borrow_mut() {
            connections.set_wakeups(false);
        }
        self.signal.awake();
    }
}

thread_local! {
    static ON_CORE: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is a core of some node, which must not wait for cores.
pub(crate) fn on_core() -> bool {
    ON_CORE.get()
}

/// Counts a task of its core as long as it lives.
pub(crate) struct Counted(CoreRc);

impl Counted {
    pub(crate) fn new(core: &CoreRc) -> Counted {
        core.tasks.set(core.tasks.get() + 1);
        Counted(core.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.tasks.set(self.0.tasks.get() - 1);
    }
}

/// Spawns a task of application code on this core; a panic inside becomes [`Error::Panicked`] of that task alone.
pub(crate) fn spawn_guarded<T: 'static>(
    core: &CoreRc,
    work: impl Future<Output = T> + 'static,
    done: oneshot::Sender<Result<T, Error>>,
) {
    let counted = Counted::new(core);
    glommio::spawn_local(async move {
        let _counted = counted;
        let result = AssertUnwindSafe(work).catch_unwind().await.map_err(|_| Error::Panicked);
        let _ = done.send(result);
    })
    .detach();
}
