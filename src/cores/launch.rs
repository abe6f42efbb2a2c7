//! Starting and joining the executors of a node.
//!
//! Every core reports over a channel that it is ready or why not; a node starts with all its cores or not at all.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use glommio::{ExecutorJoinHandle, LocalExecutorBuilder, Placement};
use gridkv_engine::backend::Backend;
use gridkv_engine::disk::{Place, Restored};
use gridkv_engine::store::{Store, StoreConfig};
use gridkv_net::mesh::{CoreId, Mesh};
use gridkv_net::peer::{Identity, Links};
use gridkv_net::signal::Signal;
use gridkv_net::sleeper::Sleeper;

use super::connections::Connections;
use super::gate::{Gate, Queue};
use super::keep::Kept;
use super::serve::Scratch;
use super::waiters::Waiters;
use super::{Core, State, background, watch};
use crate::cluster::plane::Opening;
use crate::config::Config;
use crate::handle::unix_ms;
use crate::metrics::CoreMetrics;
use crate::node::{Alive, Clients};
use crate::server::latency::Monitor;
use crate::server::settings::{Facts, Settings};
use crate::server::slowlog::Slowlog;
use crate::topology::{Message, Topology};
use crate::{Error, cluster};

/// Memory that an executor registers for its own file operations; it counts against the locked-memory limit.
const IO_MEMORY: usize = 64 << 10;
/// Submission entries of an executor's rings; its own work is timers and one eventfd.
const RING_DEPTH: usize = 64;
/// How long the turn loop may keep the executor from its timers and background queue. Longer than these need: see
/// [`super::watch`].
const PREEMPT: Duration = Duration::from_millis(4);

/// Everything one core starts with.
pub(crate) struct Seat {
    pub(crate) id: CoreId,
    pub(crate) cpu: usize,
    pub(crate) topology: Arc<Topology>,
    pub(crate) inbox: flume::Receiver<Message>,
    pub(crate) signal: Arc<Signal>,
    pub(crate) eventfd: OwnedFd,
    pub(crate) mesh: Mesh,
    pub(crate) store: StoreConfig,
    pub(crate) config: Arc<Config>,
    pub(crate) resp: Option<SocketAddr>,
    pub(crate) http: Option<SocketAddr>,
    pub(crate) clients: Arc<Clients>,
    pub(crate) facts: Arc<Facts>,
    pub(crate) cluster: Option<ClusterSeat>,
    /// Where the node's data is kept, if it is.
    pub(crate) place: Option<Arc<Place>>,
}

/// A core's place in a cluster.
pub(crate) struct ClusterSeat {
    pub(crate) identity: Identity,
    /// Where other nodes connect.
    pub(crate) peer: SocketAddr,
    /// The control plane, for core 0.
    pub(crate) opening: Option<Opening>,
}

/// Starts the executor of a core. `ready` gets its verdict; `alive` is dropped when the core ends.
pub(crate) fn start(
    seat: Seat,
    ready: flume::Sender<Result<(), Error>>,
    alive: Alive,
) -> Result<ExecutorJoinHandle<()>, Error> {
    let (id, cpu) = (seat.id, seat.cpu);
    LocalExecutorBuilder::new(Placement::Fixed(cpu))
        .name(&format!("{}-{}", seat.config.thread_name, id.0))
        .io_memory(IO_MEMORY)
        .ring_depth(RING_DEPTH)
        .preempt_timer(PREEMPT)
        .spawn(move || async move {
            super::ON_CORE.set(true);
            let _alive = alive;
            match build(seat) {
                Ok(core) => {
                    background::start(&core);
                    watch::start(&core);
                    if core.clustered {
                        cluster::start_timer(&core);
                    }
                    let _ = ready.send(Ok(()));
                    drop(ready);
                    core.clone().run().await;
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })
        .map_err(|error| Error::executor(id.index(), cpu, &error.to_string()))
}

/// Reads what the node kept of the core's shards.
fn open_kept(seat: &Seat, place: &Arc<Place>, store: &mut Store) -> Result<Kept, Error> {
    let Some(config) = &seat.config.data else { unreachable!("a place is where the configuration says") };
    let (signal, began) = (seat.signal.clone(), Instant::now());
    let (kept, restored) = Kept::open(place, config, store, move || signal.post())?;
    let core = seat.id.0;
    for (path, bytes) in &restored.torn {
        tracing::warn!(
            core,
            ?path,
            bytes,
            "the end of a log was not written whole, and is cut off: power failed, or the disk was full"
        );
    }
    let Restored { files, bytes, records, .. } = restored;
    let keys = store.stats().keys;
    tracing::info!(core, files, bytes, records, keys, took = ?began.elapsed(), "data was read from disk");
    Ok(kept)
}

fn build(mut seat: Seat) -> Result<Rc<Core>, Error> {
    let backend: Box<dyn Backend> = seat.config.new_backend(&seat.store)?;
    let mut store = Store::new(seat.store.clone(), backend);
    let kept = seat.place.take().map(|place| open_kept(&seat, &place, &mut store)).transpose()?;
    let mut eventfds = vec![seat.eventfd.try_clone().map_err(|e| Error::os("duplicating an eventfd", e))?];
    let mut connections = match (seat.resp, seat.http) {
        (None, None) if seat.cluster.is_none() => None,
        _ => {
            let connections = Connections::open(&seat)?;
            eventfds.push(connections.wake_fd()?);
            Some(connections)
        }
    };
    let (mut member, mut plane) = (None, None);
    if let (Some(place), Some(connections), Some(config)) =
        (seat.cluster.take(), &mut connections, &seat.config.cluster)
    {
        let core = seat.id.index();
        let links = Links::new(cluster::link_config(core), place.identity, seat.id.0);
        let opened = connections.open_links(links, (core == 0).then_some(place.peer))?;
        member = Some(cluster::Member::new(&seat, config, place.identity)?);
        if let (Some(opening), Some((_, gossip))) = (place.opening, opened) {
            plane = Some(cluster::plane::Plane::new(opening, gossip));
        }
    }
    let clustered = member.is_some();
    Ok(Rc::new(Core {
        id: seat.id,
        state: RefCell::new(State {
            store,
            mesh: seat.mesh,
            gate: if kept.is_some() { Gate::default() } else { Gate::open() },
            kept,
            foreign: Queue::default(),
            waiters: Waiters::new(),
            metrics: CoreMetrics::new(),
            scratch: Scratch::default(),
            unfinished: (0..seat.topology.cores()).map(|_| None).collect(),
            now: unix_ms(),
            settings: Settings::new(&seat.config, seat.facts),
            slowlog: Slowlog::new(seat.id.index(), seat.topology.cores()),
            latency: Monitor::default(),
            solo: !clustered,
            flushes: seat.topology.flushes.clone(),
        }),
        member: RefCell::new(member),
        plane: RefCell::new(plane),
        clustered,
        ticked: Cell::new(false),
        connections: RefCell::new(connections),
        topology: seat.topology,
        inbox: seat.inbox,
        signal: seat.signal,
        sleeper: Sleeper::new(eventfds),
        asleep: Cell::new(false),
        tasks: Cell::new(0),
        stopping: Cell::new(false),
        spin: seat.config.spin,
    }))
}
