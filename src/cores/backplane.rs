//! What a session sees of its core: data, lanes to siblings, tasks for commands of the whole node.
//!
//! Each request runs under `catch_unwind`: what it had written is taken back, and its reply is an error.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use gridkv_engine::command::{self, CommandId, Spec};
use gridkv_engine::hash::{KeyHash, Keyspace};
use gridkv_engine::hlc::Version;
use gridkv_engine::reply::Reply;
use gridkv_net::frame::{Head, Kind};
use gridkv_net::mesh::CoreId;
use gridkv_net::resp::{Protocol, Writer};
use gridkv_net::ring::ConnId;
use gridkv_net::session::{Backplane, Blame, Client, Limits, Login, Request};

use super::connections::Peer;
use super::flush::empties;
use super::transaction::{self, Seen};
use super::{CoreRc, State, serve};
use crate::cluster::{self, Member, NO_FLUSH};
use crate::metrics::{CoreMetrics, Watch};
use crate::server::settings::Settings;
use crate::server::{self, Caller, Notes};

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
    /// Times what the session answers itself.
    pub(super) watch: Option<Watch>,
}

impl Plane<'_> {
    /// Runs `work`, which writes one reply; counts it if it is an error, for the command that `of` names, and replaces it if it
    /// panics.
    #[inline]
    fn guarded<T>(
        &mut self,
        out: &mut Vec<u8>,
        of: impl FnOnce(&CoreMetrics) -> CommandId,
        work: impl FnOnce(&mut State, &mut Vec<u8>) -> T,
    ) -> Option<T> {
        let before = out.len();
        let result = catch_unwind(AssertUnwindSafe(|| work(self.state, out)));
        let metrics = &mut self.state.metrics;
        if result.is_err() {
            out.truncate(before);
            metrics.panics += 1;
            Writer::new(Protocol::Resp2, out).error(serve::PANIC_REPLY);
        }
        if out.get(before) == Some(&b'-') {
            let text = out[before + 1..].trim_ascii_end();
            metrics.record_error(text);
            let id = of(metrics);
            metrics.record_end(id, text);
        }
        result.ok()
    }

    #[inline]
    fn read(&mut self, hash: KeyHash, key: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        self.guarded(out, CoreMetrics::get_id, |state, out| {
            let mut writer = Writer::new(protocol, out);
            match state.store.value(hash, key, state.now) {
                Some(value) => writer.bulk(value),
                None => writer.null(),
            }
        });
    }

    #[cold]
    #[inline(never)]
    fn read_timed(&mut self, hash: KeyHash, key: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        let watch = Watch::sample();
        self.read(hash, key, protocol, out);
        let metrics = &mut self.state.metrics;
        metrics.record_time(metrics.get_id(), &watch, 1);
    }

    #[inline]
    fn write(&mut self, hash: KeyHash, key: &[u8], value: &[u8], out: &mut Vec<u8>) {
        self.guarded(out, CoreMetrics::set_id, |state, out| match state.store.set(hash, key, value, 0, state.now) {
            Ok(_) => out.extend_from_slice(b"+OK\r\n"),
            Err(error) => Writer::new(Protocol::Resp2, out).error(&error.to_string()),
        });
    }

    #[cold]
    #[inline(never)]
    fn write_timed(&mut self, hash: KeyHash, key: &[u8], value: &[u8], out: &mut Vec<u8>) {
        let watch = Watch::sample();
        self.write(hash, key, value, out);
        let metrics = &mut self.state.metrics;
        metrics.record_time(metrics.set_id(), &watch, 1);
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

    /// Whether a command is timed each time it runs: it may be slow, or everything is to be seen.
    #[inline]
    fn is_timed(&self, spec: &Spec, args: &[&[u8]]) -> bool {
        is_fine(&self.state.settings) || serve::is_heavy(spec, args)
    }

    /// Remembers a command that took long.
    fn note(&mut self, spec: &'static Spec, took: Duration, args: &[&[u8]]) {
        if self.state.settings.is_slow(took) {
            self.state.notes().note(spec, took, args, &self.peer.addr, &self.peer.name);
        }
    }
}

/// Whether commands are to be seen that take less than most.
#[inline]
fn is_fine(settings: &Settings) -> bool {
    let thresholds = [settings.slowlog_threshold, settings.latency_threshold];
    let threshold = thresholds.into_iter().flatten().min();
    threshold.is_some_and(|least| least.as_micros() < FINE_THRESHOLD_US)
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
        if self.state.metrics.record_gets(1) {
            self.read_timed(hash, key, protocol, out)
        } else {
            self.read(hash, key, protocol, out)
        }
    }

    #[inline]
    fn set(&mut self, hash: KeyHash, key: &[u8], value: &[u8], out: &mut Vec<u8>) {
        if self.state.metrics.record_sets(1) {
            self.write_timed(hash, key, value, out)
        } else {
            self.write(hash, key, value, out)
        }
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
        let due = self.state.metrics.record_command(spec, 1);
        let watch = if self.is_timed(spec, args) { Some(Watch::each()) } else { due.then(Watch::sample) };
        let aux = self.guarded(
            out,
            |_| spec.id,
            |state, out| serve::run(&mut state.store, state.now, spec, args, &mut Writer::new(protocol, out)),
        );
        if let Some(watch) = watch {
            let took = self.state.metrics.record_time(spec.id, &watch, 1);
            self.note(spec, took, args);
        }
        aux.unwrap_or_default()
    }

    fn exec(&mut self, packed: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        let (started, peer) = (Instant::now(), self.peer);
        self.guarded(out, CoreMetrics::exec_id, |state, out| {
            let State { store, metrics, now, settings, slowlog, latency, .. } = state;
            let each = is_fine(settings);
            let mut notes = Notes { settings, now: *now, slowlog, latency };
            let mut note = |spec: &Spec, took, args: &[&[u8]]| notes.note(spec, took, args, &peer.addr, &peer.name);
            let seen = Some(Seen { each, note: &mut note });
            if transaction::run(store, metrics, *now, packed, protocol, seen, out).is_err() {
                unreachable!("the session packed it");
            }
        });
        let (id, took) = (self.state.metrics.exec_id(), started.elapsed());
        self.state.metrics.record_took(id, took);
        if let Some(spec) = command::by_id(id) {
            self.state.notes().sample(spec, took);
        }
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

    fn begin(&mut self, spec: &'static Spec) {
        self.watch = if self.is_timed(spec, &[]) {
            Some(Watch::each())
        } else {
            self.state.metrics.is_next_due(spec.id).then(Watch::sample)
        };
    }

    fn count(&mut self, spec: &'static Spec, args: &[&[u8]]) {
        self.state.metrics.record_command(spec, 1);
        if let Some(watch) = self.watch.take() {
            let took = self.state.metrics.record_time(spec.id, &watch, 1);
            self.note(spec, took, args);
        }
    }

    fn count_error(&mut self, blame: Blame, text: &[u8]) {
        let (text, metrics) = (text.trim_ascii_end(), &mut self.state.metrics);
        metrics.record_error(text);
        match blame {
            Blame::Refused(id) => metrics.record_rejected(id),
            Blame::Failed(id) => metrics.record_failed(id),
            Blame::Counted => {}
        }
    }
}
