//! What a session sees of its core: data, lanes to siblings, tasks for commands of the whole node.
//!
//! Each request runs under `catch_unwind`: what it had written is taken back, and its reply is an error.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use gridkv_engine::command::{Flags, Spec};
use gridkv_engine::hash::{KeyHash, Keyspace};
use gridkv_engine::hlc::Version;
use gridkv_engine::reply::Reply;
use gridkv_net::frame::{Head, Kind};
use gridkv_net::mesh::CoreId;
use gridkv_net::resp::{Protocol, Writer};
use gridkv_net::ring::ConnId;
use gridkv_net::session::{Backplane, Client, Limits, Login, Request};

use super::connections::Peer;
use super::flush::empties;
use super::{CoreRc, State, serve, transaction};
use crate::cluster::{self, Member, NO_FLUSH};
use crate::server::{self, Caller};

/// Arguments of this size make a command slow enough to be worth timing.
const LARGE: usize = 64 << 10;
/// With a slow-log threshold below this many microseconds every command is timed.
const FINE_THRESHOLD_US: u128 = 1000;

/// A core, lent to one session for one call.
pub(super) struct Plane<'a> {
    pub(super) core: &'a CoreRc,
    pub(super) state: &'a mut State,
    pub(super) limits: &'a Limits,
    pub(super) conn: ConnId,
    pub(super) peer: &'a Peer,
    /// How many replicas requests of this call ask for.
    pub(super) level: u32,
}

impl Plane<'_> {
    /// Runs `work`, which writes one reply; counts it if it is an error, replaces it if it panics.
    #[inline]
    fn guarded<T>(&mut self, out: &mut Vec<u8>, work: impl FnOnce(&mut State, &mut Vec<u8>) -> T) -> Option<T> {
        let before = out.len();
        let result = catch_unwind(AssertUnwindSafe(|| work(self.state, out)));
        match result {
            Ok(result) => {
                if out.get(before) == Some(&b'-') {
                    self.state.metrics.record_error(out[before + 1..].trim_ascii_end());
                }
                Some(result)
            }
            Err(_) => {
                out.truncate(before);
                self.state.metrics.panics += 1;
                self.state.metrics.record_error(serve::PANIC_REPLY.as_bytes());
                Writer::new(Protocol::Resp2, out).error(serve::PANIC_REPLY);
                None
            }
        }
    }

    /// Begins a request for data of this core that other nodes hold too.
    fn replicated(&mut self, mut head: Head, request: Request<'_>) {
        cluster::begin_here(self.core, self.state, |batch| match request {
            Request::Get(key) => batch.push(head, Kind::Get, &[key]),
            Request::Set(key, value) => {
                head.a = key.len() as u32;
                batch.push(head, Kind::Set, &[key, value]);
            }
            Request::Version(key) => batch.push(head, Kind::Version, &[key]),
            Request::Command(spec, args, protocol) => {
                (head.spec, head.flag) = (spec.id.0, protocol.flag());
                batch.push_command(head, args);
            }
            Request::Exec(packed, protocol) => {
                head.flag = protocol.flag();
                batch.push(head, Kind::Exec, &[packed]);
            }
        });
    }

    /// Whether a command may be slow enough to be timed: the clock costs as much as a short command.
    #[inline]
    fn worth_timing(&self, spec: &Spec, args: &[&[u8]]) -> bool {
        let settings = &self.state.settings;
        let thresholds = [settings.slowlog_threshold, settings.latency_threshold];
        let Some(threshold) = thresholds.into_iter().flatten().min() else { return false };
        threshold.as_micros() < FINE_THRESHOLD_US
            || !spec.flags.contains(Flags::FAST) && (args.len() > 8 || spec.first_key == 0)
            || args.iter().any(|arg| arg.len() > LARGE)
    }
}

impl Backplane for Plane<'_> {
    #[inline]
    fn keyspace(&self) -> Keyspace {
        self.core.topology.keyspace()
    }

    #[inline]
    fn here(&self) -> CoreId {
        self.core.id
    }

    #[inline]
    fn cores(&self) -> usize {
        self.core.topology.cores()
    }

    #[inline]
    fn owner(&self, hash: KeyHash) -> CoreId {
        self.core.topology.owner_of(hash)
    }

    #[inline]
    fn runs(&self, core: CoreId) -> bool {
        core == self.core.id && self.state.solo
    }

    // What a sibling was sent before the node stopped being alone is not seen here: that is over within a turn.
    #[inline]
    fn may_overtake(&self) -> bool {
        self.core.topology.flushes.is_shared()
    }

    fn in_cluster(&self) -> bool {
        self.state.settings.facts.in_cluster
    }

    #[inline]
    fn limits(&self) -> &Limits {
        self.limits
    }

    #[inline]
    fn prefetch_place(&self, hash: KeyHash) {
        self.state.store.prefetch_place(hash);
    }

    #[inline]
    fn prefetch_entry(&self, hash: KeyHash) {
        self.state.store.prefetch_entry(hash);
    }

    #[inline]
    fn get(&mut self, hash: KeyHash, key: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        self.guarded(out, |state, out| {
            state.metrics.record_gets(1);
            let mut writer = Writer::new(protocol, out);
            match state.store.value(hash, key, state.now) {
                Some(value) => writer.bulk(value),
                None => writer.null(),
            }
        });
    }

    #[inline]
    fn set(&mut self, hash: KeyHash, key: &[u8], value: &[u8], out: &mut Vec<u8>) {
        self.guarded(out, |state, out| {
            state.metrics.record_sets(1);
            match state.store.set(hash, key, value, 0, state.now) {
                Ok(_) => out.extend_from_slice(b"+OK\r\n"),
                Err(error) => Writer::new(Protocol::Resp2, out).error(&error.to_string()),
            }
        });
    }

    fn begin_every(&mut self, spec: &'static Spec) -> Result<(), &'static str> {
        let may = !empties(spec) || self.core.topology.flushes.begin(self.cores());
        if may { Ok(()) } else { Err(NO_FLUSH) }
    }

    fn run(&mut self, spec: &'static Spec, args: &[&[u8]], protocol: Protocol, out: &mut Vec<u8>) -> i64 {
        let core = self.core;
        let _part = empties(spec).then(|| core.topology.flushes.part());
        if !self.state.solo && empties(spec) {
            Writer::new(protocol, out).error(NO_FLUSH);
            return 0;
        }
        self.state.metrics.record_command(spec, 1);
        let started = self.worth_timing(spec, args).then(Instant::now);
        let aux = self.guarded(out, |state, out| {
            serve::run(&mut state.store, state.now, spec, args, &mut Writer::new(protocol, out))
        });
        if let Some(started) = started {
            let took = started.elapsed();
            if self.state.settings.is_slow(took) {
                server::note(self.state, spec, took, args, &self.peer.addr.to_string(), &self.peer.name);
            }
        }
        aux.unwrap_or_default()
    }

    fn exec(&mut self, packed: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        self.guarded(out, |state, out| {
            if transaction::run(&mut state.store, &mut state.metrics, state.now, packed, protocol, out).is_err() {
                unreachable!("the session packed it");
            }
        });
    }

    fn version(&mut self, hash: KeyHash, key: &[u8]) -> Option<Version> {
        self.state.store.version(hash, key, self.state.now)
    }

    fn set_level(&mut self, level: u32) {
        self.level = level;
    }

    #[inline]
    fn has_room(&self, to: CoreId) -> bool {
        if to == self.core.id {
            return self.core.member.borrow().as_ref().is_some_and(Member::has_room);
        }
        self.state.mesh.has_room(to)
    }

    #[inline]
    fn send(&mut self, to: CoreId, hash: KeyHash, slot: u32, index: u32, request: Request<'_>) {
        let mut head =
            Head { conn: self.conn.to_bits(), hash: hash.0, slot, index, level: self.level, ..Head::default() };
        if to == self.core.id {
            return self.replicated(head, request);
        }
        let mesh = &mut self.state.mesh;
        match request {
            Request::Get(key) => mesh.request(to, head, Kind::Get, &[key]),
            Request::Set(key, value) => {
                head.a = key.len() as u32;
                mesh.request(to, head, Kind::Set, &[key, value])
            }
            Request::Version(key) => return mesh.request_beyond(to, head, Kind::Version, &[key]),
            Request::Command(spec, args, protocol) => {
                head.spec = spec.id.0;
                head.flag = protocol.flag();
                mesh.command(to, head, args)
            }
            Request::Exec(packed, protocol) => {
                head.flag = protocol.flag();
                mesh.request(to, head, Kind::Exec, &[packed])
            }
        }
        .expect("the session asked whether there is room");
    }

    fn node(&mut self, slot: u32, client: &Client, spec: &'static Spec, args: &[&[u8]]) {
        self.state.metrics.record_command(spec, 1);
        let caller = Caller { client: client.id, protocol: client.protocol, level: self.level };
        let args = args.iter().map(|arg| arg.to_vec()).collect();
        let answer = server::answer(self.core.clone(), caller, spec, args);
        super::connections::answer_later(self.core, self.conn, slot, answer);
    }

    fn login(&mut self, user: &[u8], password: &[u8]) -> Login {
        let Some(secret) = &self.state.settings.requirepass else {
            return if user == b"default" { Login::NotNeeded } else { Login::Refused };
        };
        // The password is compared even for an unknown user, so that the time says nothing.
        let right = secret.matches(password);
        if right && user == b"default" { Login::Welcome } else { Login::Refused }
    }

    fn needs_password(&self) -> bool {
        self.state.settings.requirepass.is_some()
    }

    fn count(&mut self, spec: &'static Spec, args: &[&[u8]]) {
        self.state.metrics.record_command(spec, 1);
        // Such a command takes no time; it is noted when everything is to be noted.
        if self.state.settings.is_slow(Duration::ZERO) {
            let (addr, name) = (self.peer.addr.to_string(), self.peer.name.clone());
            server::note(self.state, spec, Duration::ZERO, args, &addr, &name);
        }
    }

    fn count_error(&mut self, text: &[u8]) {
        self.state.metrics.record_error(text.trim_ascii_end());
    }
}
