//! A node to test sessions with: cores made of plain stores, in one process and one thread, whose answers come when the
//! test lets them come. Time stands still at [`NOW`]. What is sent to a core is copied, as the mesh does.
//!
//! Compiled for tests and, by the feature `testing`, for the fuzz targets; never into a node.

use std::collections::VecDeque;

use gridkv_engine::backend::{BackendConfig, DEFAULT_BACKEND, Registry};
use gridkv_engine::command::{Context, Flags, Spec};
use gridkv_engine::hash::{KeyHash, Keyspace, ShardCount};
use gridkv_engine::hlc::Version;
use gridkv_engine::reply::Reply;
use gridkv_engine::store::{Store, StoreConfig};

use super::transaction::{Step, Transaction, version_bytes};
use super::{Answer, Backplane, Blame, Client, Limits, Login, Request, Session};
use crate::frame::Status;
use crate::mesh::CoreId;
use crate::resp::{Limits as WireLimits, Protocol, Writer};

/// The time of all commands, in Unix milliseconds.
pub const NOW: u64 = 1_700_000_000_000;

#[derive(Debug)]
enum Sent {
    Get(Vec<u8>),
    Set(Vec<u8>, Vec<u8>),
    Version(Vec<u8>),
    Command(&'static Spec, Vec<Vec<u8>>, Protocol),
    Exec(Vec<u8>, Protocol),
    Node,
}

/// Cores of which the session lives on the first.
#[derive(Debug)]
pub struct Cores {
    keyspace: Keyspace,
    stores: Vec<Store>,
    /// Bounds of the session.
    pub limits: Limits,
    /// Requests under way to each core; those of the node are with the own core.
    lanes: Vec<VecDeque<(KeyHash, u32, u32, Sent)>>,
    /// Requests that a lane takes.
    pub room: usize,
    /// With a seed: a core serves what it was sent in any order, as one does whose data other nodes share.
    pub overtaking: Option<u64>,
    /// What clients must say first.
    pub password: Option<&'static [u8]>,
    /// Commands of the data for which this holds answer with an error, and do nothing.
    pub refuses: fn(&[&[u8]]) -> bool,
    /// What is told to who wants to run a command that writes on all cores.
    pub whole: Result<(), &'static str>,
    /// Keys for which this holds cannot be read for WATCH, on cores to which a request is sent.
    pub hides: fn(&[u8]) -> bool,
}

fn limits() -> Limits {
    Limits {
        wire: WireLimits { max_bulk: 1 << 16, ..WireLimits::default() },
        max_key: 1000,
        query_buffer: 1 << 20,
        output_high_water: 1 << 16,
        max_pending: 64,
        multi_queue: 16,
    }
}

impl Cores {
    /// So many cores, empty, that cut 32 shards into equal ranges.
    pub fn new(cores: usize) -> Cores {
        let keyspace = Keyspace { seed: 7, shards: ShardCount::new(32).unwrap() };
        let store = |core: usize| {
            let cut = |i: usize| (i * 32 / cores) as u16;
            let config = StoreConfig { keyspace, owned: cut(core)..cut(core + 1), ..StoreConfig::default() };
            let backend = BackendConfig { keyspace, owned: config.owned.clone() };
            Store::new(config, Registry::default().make(DEFAULT_BACKEND, &backend).unwrap())
        };
        Cores {
            keyspace,
            stores: (0..cores).map(store).collect(),
            limits: limits(),
            lanes: (0..cores).map(|_| VecDeque::new()).collect(),
            room: 8,
            overtaking: None,
            password: None,
            refuses: |_| false,
            whole: Ok(()),
            hides: |_| false,
        }
    }

    fn run_on(&mut self, core: usize, spec: &Spec, args: &[&[u8]], protocol: Protocol, out: &mut Vec<u8>) -> i64 {
        let mut writer = Writer::new(protocol, out);
        if (self.refuses)(args) {
            writer.error("ERR refused by the test");
            return 0;
        }
        let mut context = Context { store: &mut self.stores[core], args, now: NOW, out: &mut writer, aux: 0 };
        (spec.run.expect("a command of the data"))(&mut context);
        context.aux
    }

    fn exec_on(&mut self, core: usize, packed: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        let mut transaction = Transaction::new(packed);
        let store = &mut self.stores[core];
        if !transaction.watched(|hash, key, version| store.version(hash, key, NOW) == version).unwrap() {
            return Writer::new(protocol, out).null_array();
        }
        let steps = transaction.steps().unwrap();
        Writer::new(protocol, out).array(steps as usize);
        let mut args = Vec::new();
        for _ in 0..steps {
            match transaction.step(&mut args).unwrap() {
                Step::Raw(reply) => out.extend_from_slice(reply),
                Step::Command(spec) => {
                    self.run_on(core, spec, &args, protocol, out);
                }
            }
        }
    }

    /// The request that a core serves next: the oldest, or any but a SET behind one of the same key.
    fn next(&mut self, core: usize) -> Option<(KeyHash, u32, u32, Sent)> {
        let lane = &mut self.lanes[core];
        let Some(state) = &mut self.overtaking else { return lane.pop_front() };
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let mut at = (*state >> 33) as usize % lane.len().max(1);
        if let Some((hash, _, _, Sent::Set(..))) = lane.get(at) {
            at = lane
                .iter()
                .position(|(other, _, _, sent)| other == hash && matches!(sent, Sent::Set(..)))
                .unwrap_or(at);
        }
        lane.remove(at)
    }

    /// Serves a request to a core; whether there was one.
    pub fn serve(&mut self, core: usize, session: &mut Session, out: &mut Vec<u8>) -> bool {
        let Some((hash, slot, index, sent)) = self.next(core) else { return false };
        let mut bytes = Vec::new();
        let (mut status, mut aux) = (Status::Encoded, 0);
        match sent {
            Sent::Get(key) => match self.stores[core].get(hash, &key, NOW) {
                Some(entry) => {
                    bytes.extend_from_slice(entry.value);
                    status = Status::Value;
                }
                None => status = Status::Nil,
            },
            Sent::Set(key, value) => {
                self.stores[core].set(hash, &key, &value, 0, NOW).unwrap();
                status = Status::Done;
            }
            Sent::Version(key) if (self.hides)(&key) => {
                bytes.extend_from_slice(b"CLUSTERDOWN hidden by the test");
                status = Status::Error;
            }
            Sent::Version(key) => match self.stores[core].version(hash, &key, NOW) {
                Some(version) => {
                    bytes.extend_from_slice(&version_bytes(version));
                    status = Status::Value;
                }
                None => status = Status::Nil,
            },
            Sent::Command(spec, args, protocol) => {
                let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
                aux = self.run_on(core, spec, &args, protocol, &mut bytes);
            }
            Sent::Exec(packed, protocol) => self.exec_on(core, &packed, protocol, &mut bytes),
            Sent::Node => bytes.extend_from_slice(b"+node\r\n"),
        }
        session.answer(slot, index, &Answer { status, aux, bytes: &bytes }, self, out);
        true
    }

    /// Serves everything, cores chosen by `order`, and lets the session go on until it is done, or `out` must be taken.
    ///
    /// # Panics
    /// When the session waits for something that nothing will bring.
    pub fn settle(&mut self, session: &mut Session, out: &mut Vec<u8>, order: &mut impl FnMut() -> usize) {
        loop {
            let busy: Vec<usize> = (0..self.lanes.len()).filter(|&core| !self.lanes[core].is_empty()).collect();
            if busy.is_empty() {
                let before = (out.len(), session.input_bytes());
                if !session.is_stalled() || out.len() > self.limits.output_high_water {
                    return;
                }
                session.resume(self, out);
                let idle = self.lanes.iter().all(VecDeque::is_empty);
                assert!(!idle || before != (out.len(), session.input_bytes()) || !session.is_stalled(), "stuck");
                continue;
            }
            self.serve(busy[order() % busy.len()], session, out);
            if order().is_multiple_of(3) {
                session.resume(self, out);
            }
        }
    }
}

impl Backplane for Cores {
    fn keyspace(&self) -> Keyspace {
        self.keyspace
    }
    fn here(&self) -> CoreId {
        CoreId(0)
    }
    fn cores(&self) -> usize {
        self.stores.len()
    }
    fn owner(&self, hash: KeyHash) -> CoreId {
        let shard = self.keyspace.shard(hash).0;
        CoreId(self.stores.iter().position(|store| store.owned().contains(&shard)).unwrap() as u16)
    }
    fn runs(&self, core: CoreId) -> bool {
        core == CoreId(0) && self.overtaking.is_none()
    }
    fn may_overtake(&self) -> bool {
        self.overtaking.is_some()
    }
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn prefetch_place(&self, _: KeyHash) {}
    fn prefetch_entry(&self, _: KeyHash) {}
    fn get(&mut self, hash: KeyHash, key: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        let mut writer = Writer::new(protocol, out);
        match self.stores[0].get(hash, key, NOW) {
            Some(entry) => writer.bulk(entry.value),
            None => writer.null(),
        }
    }
    fn set(&mut self, hash: KeyHash, key: &[u8], value: &[u8], out: &mut Vec<u8>) {
        self.stores[0].set(hash, key, value, 0, NOW).unwrap();
        out.extend_from_slice(b"+OK\r\n");
    }
    fn run(&mut self, spec: &'static Spec, args: &[&[u8]], protocol: Protocol, out: &mut Vec<u8>) -> i64 {
        self.run_on(0, spec, args, protocol, out)
    }
    fn begin_every(&mut self, spec: &'static Spec) -> Result<(), &'static str> {
        if spec.flags.contains(Flags::WRITE) { self.whole } else { Ok(()) }
    }
    fn exec(&mut self, transaction: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        self.exec_on(0, transaction, protocol, out);
    }
    fn version(&mut self, hash: KeyHash, key: &[u8]) -> Option<Version> {
        self.stores[0].version(hash, key, NOW)
    }
    fn has_room(&self, to: CoreId) -> bool {
        self.lanes[to.index()].len() < self.room
    }
    fn send(&mut self, to: CoreId, hash: KeyHash, slot: u32, index: u32, request: Request<'_>) {
        let own = |args: &[&[u8]]| args.iter().map(|arg| arg.to_vec()).collect();
        let sent = match request {
            Request::Get(key) => Sent::Get(key.to_vec()),
            Request::Set(key, value) => Sent::Set(key.to_vec(), value.to_vec()),
            Request::Version(key) => Sent::Version(key.to_vec()),
            Request::Command(spec, args, protocol) => Sent::Command(spec, own(args), protocol),
            Request::Exec(packed, protocol) => Sent::Exec(packed.to_vec(), protocol),
        };
        let beyond = matches!(sent, Sent::Version(_));
        assert!(beyond || self.has_room(to), "the session asks whether there is room");
        self.lanes[to.index()].push_back((hash, slot, index, sent));
    }
    fn node(&mut self, slot: u32, _: &Client, _: &'static Spec, _: &[&[u8]]) {
        assert!(self.lanes.iter().all(VecDeque::is_empty), "a command of the node waits for those before it");
        self.lanes[0].push_back((KeyHash(0), slot, 0, Sent::Node));
    }
    fn login(&mut self, user: &[u8], password: &[u8]) -> Login {
        match self.password {
            None => Login::NotNeeded,
            Some(known) if user == b"default" && known == password => Login::Welcome,
            Some(_) => Login::Refused,
        }
    }
    fn needs_password(&self) -> bool {
        self.password.is_some()
    }
    fn count(&mut self, _: &'static Spec, _: &[&[u8]]) {}
    fn count_error(&mut self, _: Blame, _: &[u8]) {}
}
