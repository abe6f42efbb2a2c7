//! A running node: starting its cores, stopping them, asking them all.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use glommio::ExecutorJoinHandle;
use gridkv_cluster::control::Event;
use gridkv_engine::disk::Place;
use gridkv_engine::hash::Keyspace;
use gridkv_engine::record::MAX_VALUE_LEN;
use gridkv_engine::store::StoreConfig;
use gridkv_net::mesh::Mesh;
use gridkv_net::signal::Signal;
use rustix::event::{EventfdFlags, eventfd};

use crate::cores::CoreHandle;
use crate::cores::launch::{self, ClusterSeat, Seat};
use crate::metrics::{CoreMetrics, NodeMetrics};
use crate::server::settings::Facts;
use crate::topology::{INBOX_MESSAGES, Link, Message, Topology, shards_of};
use crate::{Config, Error, GridKv, cluster, cores, platform};

/// Facts about clients that all cores share: touched when a connection comes or goes, never by a request.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    /// Connections of clients open on all cores, held against the limit.
    pub(crate) open: AtomicU64,
    /// Connections of HTTP, which have a limit of their own.
    pub(crate) pages: AtomicU64,
    /// The number of the next client, as `CLIENT ID` shows it.
    pub(crate) next_id: AtomicU64,
}

/// Held by the thread of a core while it runs. Whatever ends that thread, a panic of the loop too, ends the whole node: one
/// without some of its shards would leave their clients waiting for ever.
pub(crate) struct Alive {
    topology: Arc<Topology>,
    _alive: flume::Sender<()>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.topology.stop();
    }
}

/// What every handle of a node shares.
pub(crate) struct Running {
    pub(crate) topology: Arc<Topology>,
    pub(crate) resp_addr: Option<SocketAddr>,
    pub(crate) http_addr: Option<SocketAddr>,
    pub(crate) started: Instant,
    /// Where other nodes connect, in a cluster.
    pub(crate) peer_addr: Option<SocketAddr>,
    /// What happens in the cluster.
    pub(crate) events: Option<flume::Receiver<Event>>,
    /// Nothing is ever sent: it is disconnected once every core has ended.
    pub(crate) ended: flume::Receiver<()>,
    /// Taken by whoever joins first. A lock of the control path: no core ever touches it.
    threads: Mutex<Vec<ExecutorJoinHandle<()>>>,
}

impl Running {
    /// Waits until every core's thread has ended.
    pub(crate) fn join(&self) -> Result<(), Error> {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(|e| e.into_inner()));
        let mut result = Ok(());
        for thread in threads {
            if thread.join().is_err() {
                result = Err(Error::Panicked);
            }
        }
        match self.topology.failure() {
            Some(why) => result.and(Err(Error::Failed(why))),
            None => result,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.topology.stop();
        // The last handle may be dropped on a core (inside `on_core`), which cannot wait for itself.
        if !cores::on_core() {
            let _ = self.join();
        }
    }
}

/// Starts a node.
///
/// # Errors
/// [`Error::Start`]: what is missing and how to get it. Nothing keeps running.
pub(crate) fn start(mut config: Config) -> Result<GridKv, Error> {
    config.validate()?;
    if config.cluster.is_some() {
        // Also as long as nobody has joined: what others could not take would be in their way then.
        config.limits.max_value = config.limits.max_value.min(cluster::requests::MAX_VALUE);
    }
    let cpus = platform::prepare(&mut config)?;
    let resp = config.listen.map(platform::probe).transpose()?;
    let http = config.http.map(platform::probe).transpose()?;
    let seed = config.seed.unwrap_or_else(platform::random_seed);
    let data = config.data.as_ref();
    let place = data.map(|data| Place::open(&data.dir, config.shards, config.seed, seed)).transpose()?.map(Arc::new);
    let seed = place.as_ref().map_or(seed, |place| place.keyspace().seed);
    let mut cluster = cluster::start::prepare(&config, resp, cpus.len(), seed)?;
    let seed = cluster.as_ref().and_then(|cluster| cluster.seed).unwrap_or(seed);
    let keyspace = Keyspace { seed, shards: config.shards };
    let member = cluster.as_ref().map(|cluster| (cluster.identity, cluster.peer));
    let (verdict, events) = cluster.as_ref().map(|c| (c.verdict.clone(), c.events.clone())).unzip();
    let mut opening = cluster.take().map(|cluster| cluster.opening);

    let mut eventfds = Vec::new();
    let mut links = Vec::new();
    let mut inboxes = Vec::new();
    for _ in &cpus {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| Error::os("creating an eventfd", e.into()))?;
        let copy = fd.try_clone().map_err(|e| Error::os("duplicating an eventfd", e))?;
        let (sender, receiver) = flume::bounded(INBOX_MESSAGES);
        links.push(Link { inbox: sender, signal: Arc::new(Signal::new(copy)) });
        inboxes.push(receiver);
        eventfds.push(fd);
    }
    let signals: Vec<_> = links.iter().map(|link| link.signal.clone()).collect();
    let topology = Arc::new(Topology::new(keyspace, links.into_boxed_slice(), member.is_some()));
    let config = Arc::new(config);
    let clients = Arc::new(Clients::default());
    let facts = Arc::new(Facts::new(&config, resp, cpus.len()));
    let (ready, verdicts) = flume::bounded(cpus.len());
    let (alive, ended) = flume::bounded(0);
    let shards = u32::from(keyspace.shards.get());
    let mut running = Running {
        topology: topology.clone(),
        resp_addr: resp,
        http_addr: http,
        started: Instant::now(),
        peer_addr: member.map(|(_, peer)| peer),
        events,
        ended,
        threads: Mutex::new(Vec::new()),
    };

    let ends = Mesh::build(&signals).into_iter().zip(inboxes).zip(eventfds);
    for (core, ((mesh, inbox), eventfd)) in ends.enumerate() {
        let owned = shards_of(core, cpus.len(), shards);
        let seat = Seat {
            id: mesh.here(),
            cpu: cpus[core],
            topology: topology.clone(),
            inbox,
            signal: signals[core].clone(),
            eventfd,
            mesh,
            store: StoreConfig {
                keyspace,
                owned: owned.start as u16..owned.end as u16,
                node: 0,
                max_memory: config.max_memory / cpus.len() as u64,
                max_value: if config.cluster.is_some() { cluster::requests::MAX_VALUE } else { MAX_VALUE_LEN },
                change_log_entries: config.change_log_entries,
                keep_tombstones: false,
            },
            config: config.clone(),
            resp,
            http,
            clients: clients.clone(),
            facts: facts.clone(),
            cluster: member.map(|(identity, peer)| ClusterSeat { identity, peer, opening: opening.take() }),
            place: place.clone(),
        };
        let alive = Alive { topology: topology.clone(), _alive: alive.clone() };
        // On an error `running` is dropped, which stops and joins the cores started so far.
        let thread = launch::start(seat, ready.clone(), alive)?;
        running.threads.get_mut().unwrap_or_else(|e| e.into_inner()).push(thread);
    }
    drop((ready, alive));
    for _ in &cpus {
        match verdicts.recv() {
            Ok(verdict) => verdict?,
            Err(_) => {
                running.topology.stop();
                return Err(running.join().err().unwrap_or(Error::Panicked));
            }
        }
    }
    if let Some(verdict) = verdict {
        cluster::start::admission(&verdict)?;
    }
    if config.cluster.is_some() || config.data.is_some() {
        listen(&running)?;
    }
    Ok(GridKv::new(Arc::new(running)))
}

/// Lets clients come, on all cores: the node is a member of its cluster, and how keys are hashed will not change any more; or it has
/// read its data.
fn listen(running: &Running) -> Result<(), Error> {
    let (done, results) = flume::bounded(running.topology.cores());
    for link in &running.topology.links {
        let (done, resp, http) = (done.clone(), running.resp_addr, running.http_addr);
        let listen = move |core: &cores::CoreRc| {
            let listened = match &mut *core.connections.borrow_mut() {
                Some(connections) => connections.listen(resp, http),
                None => Ok(()),
            };
            let _ = done.send(listened);
        };
        if link.inbox.send(Message::Run(Box::new(listen))).is_ok() {
            link.signal.post();
        }
    }
    drop(done);
    for _ in &running.topology.links {
        results.recv().map_err(|_| Error::Panicked)??;
    }
    Ok(())
}

/// Counters of a node, gathered core by core; see [`GridKv::stats`].
pub type Stats = NodeMetrics;

pub(crate) async fn stats(db: &GridKv, running: &Running) -> Result<Stats, Error> {
    let mut cores: Vec<CoreMetrics> = Vec::with_capacity(db.cores());
    for core in 0..db.cores() {
        cores.push(db.call(core, CoreHandle::metrics).await?);
    }
    Ok(NodeMetrics { cores, uptime: running.started.elapsed() })
}
