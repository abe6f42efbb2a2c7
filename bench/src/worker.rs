//! One thread of load: a socket ring, its share of the connections, and a loop that does not sleep while a run lasts, unless told to.
//!
//! ```text
//!   turn ──► replies: popped off in_flight, latency noted ──► connections with room are ready
//!     ▲                                                                    │
//!     └── one send per ready connection ◄── requests copied from templates ◄┘
//! ```
//!
//! Closed loop: a connection sends `pipeline` requests at once and the next batch when all are answered. So what is in
//! flight is known, and batches do not decay into single requests. Open loop: requests become due by a schedule whatever
//! the server does; those due are spread over the connections with room, `pipeline` at most on each, and their latency
//! counts from when they were due.
//!
//! A run ends when all that was sent is answered. Closed loops limited by time note nothing after their end. Open loops
//! note everything that was due, for the late are what they look for; what is still missing after a grace is counted as
//! an error.
//!
//! No allocation per operation: queues and send buffers reach their size within the first rounds and stay.
//!
//! Not here: threads, their number and their progress (`fleet`).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gridkv_net::ring::{ConnId, Event, Ring, RingConfig};

use crate::distribution::KeyChooser;
use crate::failure::Failure;
use crate::interrupt;
use crate::pace::{Arrivals, Schedule};
use crate::random::Random;
use crate::replies::{Replies, Reply};
use crate::report::Report;
use crate::requests::{Protocol, Requests, command};
use crate::workload::{Kind, Mix};

/// How long connecting may take, and how long a server may owe replies without sending any.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
const REPLY_PATIENCE: Duration = Duration::from_secs(30);
/// How long after the end an open loop waits for what was due, at least; a long run waits as long again as it took.
const GRACE: Duration = Duration::from_secs(5);
/// The longest sleep: then the end is looked for, and an interrupt.
const REST: Duration = Duration::from_millis(20);

/// What all threads of a load share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Never empty; connections go to them in turn.
    pub(crate) addrs: Vec<SocketAddr>,
    pub(crate) protocol: Protocol,
    pub(crate) requests: Requests,
    pub(crate) password: Option<String>,
    /// Compare each value read with what was written.
    pub(crate) check: bool,
    /// Sleep while there is nothing to do; open loops poll in any case.
    pub(crate) sleeps: bool,
    /// Keys that exist before the first insert.
    pub(crate) keys: u64,
    /// One beyond the highest key written so far.
    pub(crate) newest: AtomicU64,
}

/// Operations done by one thread in the current run; read by the one who shows progress.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Done(pub(crate) AtomicU64);

/// When a run ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    Time(Duration),
    /// Operations of this thread.
    Count(u64),
}

/// One run of one thread.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) mix: Mix,
    pub(crate) chooser: KeyChooser,
    pub(crate) pipeline: usize,
    /// Requests per second of this thread; `None` is a closed loop.
    pub(crate) rate: Option<(f64, Arrivals)>,
    pub(crate) limit: Limit,
    pub(crate) random: Random,
    /// Requests that all threads together may have in flight: the last so many inserts may not be answered yet, so reads
    /// leave them out.
    pub(crate) window: u64,
}

/// What was asked, in the order of asking.
#[derive(Clone, Copy, Debug)]
struct Asked {
    what: What,
    key: u64,
    /// When it was sent or, in an open loop, due.
    since: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    /// A whole operation.
    Op(Kind),
    /// The SET of a read-modify-write; its GET is `Op(Kind::Rmw)`.
    RmwSet,
    /// The password.
    Auth,
}

/// Operations that ended at the same moment and began at the same one: noted at once.
#[derive(Clone, Copy, Debug)]
struct Streak {
    kind: Kind,
    since: u64,
    count: u64,
}

#[derive(Debug)]
struct Conn {
    id: ConnId,
    addr: SocketAddr,
    replies: Replies,
    in_flight: VecDeque<Asked>,
    /// Keys whose GET was answered and whose SET is next, with the operation's beginning.
    followups: VecDeque<(u64, u64)>,
    buf: Vec<u8>,
    sending: bool,
    queued: bool,
    connected: bool,
}

impl Conn {
    fn room(&self, pipeline: usize) -> usize {
        pipeline.saturating_sub(self.in_flight.len())
    }
}

/// A thread's connections and what it does with them. Lives on that thread.
pub(crate) struct Worker {
    ring: Ring,
    state: State,
}

/// All but the ring, which lends itself out during a turn.
struct State {
    shared: Arc<Shared>,
    done: Arc<Done>,
    clock: Instant,
    conns: Vec<Conn>,
    /// Connections that may send.
    ready: VecDeque<u32>,
    /// Requests that are due and not yet sent, oldest first; open loop only.
    due: VecDeque<u64>,
    in_flight: usize,
    followups: usize,
    connected: usize,
    job: Job,
    /// Operations that may still be begun.
    left: u64,
    /// New operations are begun.
    issuing: bool,
    /// Answers are noted.
    noting: bool,
    /// Operations ended, errors included.
    ended: u64,
    last_reply: u64,
    report: Report,
    failure: Option<Failure>,
}

fn ns(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

impl Worker {
    /// Makes these of the load's connections and says the password. Ends when all stand.
    pub(crate) fn connect(shared: Arc<Shared>, done: Arc<Done>, which: Range<usize>) -> Result<Worker, Failure> {
        let connections = which.len();
        let idle = Job {
            mix: Mix::only(Kind::Get),
            chooser: KeyChooser::Uniform { count: 1 },
            pipeline: 1,
            rate: None,
            limit: Limit::Count(0),
            random: Random::new(0, 0),
            window: 0,
        };
        let mut ring = Ring::new(RingConfig { max_connections: connections.max(1) as u32, ..RingConfig::default() })?;
        let mut conns = Vec::with_capacity(connections);
        for (expected, number) in which.enumerate() {
            let addr = shared.addrs[number % shared.addrs.len()];
            let id = ring.connect(addr)?;
            assert_eq!(id.index(), expected, "a fresh ring gives its places in order");
            let replies = Replies::new(shared.protocol, shared.check);
            conns.push(Conn {
                id,
                addr,
                replies,
                in_flight: VecDeque::new(),
                followups: VecDeque::new(),
                buf: Vec::new(),
                sending: false,
                queued: false,
                connected: false,
            });
        }
        let state = State {
            shared,
            done,
            clock: Instant::now(),
            conns,
            ready: VecDeque::new(),
            due: VecDeque::new(),
            in_flight: 0,
            followups: 0,
            connected: 0,
            job: idle,
            left: 0,
            issuing: false,
            noting: false,
            ended: 0,
            last_reply: 0,
            report: Report::new(),
            failure: None,
        };
        let mut worker = Worker { ring, state };
        worker.wait_until("accept all connections", |state| state.connected == connections)?;
        if let Some(password) = worker.state.shared.password.clone() {
            let now = worker.state.now();
            for index in 0..connections {
                command(&[b"AUTH", password.as_bytes()], &mut worker.state.conns[index].buf);
                worker.state.asked(index, What::Auth, 0, now);
                worker.state.send(&mut worker.ring, index)?;
            }
            worker.wait_until("answer AUTH", |state| state.in_flight == 0)?;
        }
        Ok(worker)
    }

    fn turn(&mut self) -> Result<usize, Failure> {
        let state = &mut self.state;
        let handled =
            self.ring.turn(&mut |_, event| state.on_event(event)).map_err(Failure::io("a turn of the ring"))?;
        match self.state.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(handled),
        }
    }

    fn wait_until(&mut self, what: &'static str, done: impl Fn(&State) -> bool) -> Result<(), Failure> {
        let start = Instant::now();
        while !done(&self.state) {
            if self.turn()? == 0 {
                self.ring.wait(Some(Duration::from_millis(50))).map_err(Failure::io("waiting for the ring"))?;
            }
            if start.elapsed() > CONNECT_PATIENCE || interrupt::requested() {
                let seconds = start.elapsed().as_secs();
                return Err(Failure::Slow { addr: self.state.silent(), what, seconds });
            }
        }
        Ok(())
    }

    /// Runs a job to its end, or until somebody asks for the end of everything.
    pub(crate) fn run(&mut self, job: Job) -> Result<Report, Failure> {
        let start = self.state.begin(job);
        let end = match self.state.job.limit {
            Limit::Time(length) => start + ns(length),
            Limit::Count(_) => u64::MAX,
        };
        let (open, grace) = match self.state.job.rate {
            Some(_) => (true, end.saturating_add(ns(GRACE).max(end.saturating_sub(start)))),
            None => (false, u64::MAX),
        };
        let mut schedule = self.state.job.rate.map(|(rate, arrivals)| {
            let random = Random::new(self.state.job.random.next(), 1);
            Schedule::new(rate, arrivals, start, random)
        });
        let mut before = start;
        let mut idle = 0;
        let mut noted_until = start;
        loop {
            let handled = self.turn()?;
            let state = &mut self.state;
            let now = state.now();
            let since_before = now - before;
            state.report.own_pause = state.report.own_pause.max(Duration::from_nanos(since_before));
            before = now;
            if now >= end && state.issuing && !open {
                state.issuing = false;
                state.noting = false;
                noted_until = now;
            }
            if let Some(schedule) = &mut schedule
                && state.issuing
            {
                state.take_due(schedule, now.min(end.saturating_sub(1)));
                if schedule.next_due() >= end {
                    state.issuing = false;
                }
            }
            let nothing_to_send =
                if open { state.due.is_empty() && state.followups == 0 } else { state.ready.is_empty() };
            match (nothing_to_send, open) {
                (false, true) => state.flush_open(&mut self.ring)?,
                (false, false) => state.flush_closed(&mut self.ring, now)?,
                (true, _) if handled == 0 => idle += since_before,
                (true, _) => {}
            }
            state.done.0.store(state.ended, Ordering::Relaxed);
            if state.left == 0 {
                state.issuing = false;
            }
            let rests = state.shared.sleeps && !open && nothing_to_send && handled == 0;
            if !state.issuing && state.in_flight == 0 && state.followups == 0 && state.due.is_empty() {
                break;
            }
            if interrupt::requested() {
                break;
            }
            if state.in_flight > 0 && now.saturating_sub(state.last_reply) > ns(REPLY_PATIENCE) {
                let seconds = REPLY_PATIENCE.as_secs();
                return Err(Failure::Slow { addr: state.silent(), what: "answer", seconds });
            }
            if rests {
                self.ring.wait(Some(REST)).map_err(Failure::io("waiting for the ring"))?;
                idle += self.state.now() - before;
                before = self.state.now();
                continue;
            }
            if now > grace {
                let missing = (state.in_flight + state.followups + state.due.len()) as u64;
                state.report.errors_by("UNANSWERED".into(), missing);
                break;
            }
        }
        let state = &mut self.state;
        if noted_until == start {
            // Everything was noted: the run lasted until its last reply.
            noted_until = if open && end != u64::MAX { end.max(state.last_reply) } else { state.last_reply };
        }
        let elapsed = Duration::from_nanos(noted_until.saturating_sub(start));
        let mut report = std::mem::replace(&mut state.report, Report::new());
        report.elapsed = elapsed;
        report.busy = 1.0 - idle as f64 / before.saturating_sub(start).max(1) as f64;
        report.rate = report.operations() as f64 / elapsed.as_secs_f64().max(1e-9);
        Ok(report)
    }
}

impl State {
    #[inline]
    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// Prepares a job; returns when it begins.
    fn begin(&mut self, job: Job) -> u64 {
        self.left = match job.limit {
            Limit::Time(_) => u64::MAX,
            Limit::Count(count) => count,
        };
        self.job = job;
        (self.issuing, self.noting, self.ended) = (self.left > 0, true, 0);
        self.report = Report::new();
        self.due.clear();
        self.done.0.store(0, Ordering::Relaxed);
        for index in 0..self.conns.len() {
            self.make_ready(index);
        }
        let start = self.now();
        self.last_reply = start;
        start
    }

    fn on_event(&mut self, event: Event<'_>) {
        match event {
            Event::Connected { conn } => {
                self.connected += 1;
                self.conns[conn.index()].connected = true;
            }
            Event::Data { conn, bytes } => self.on_data(conn.index(), bytes),
            Event::Sent { conn, buf } => {
                let conn_state = &mut self.conns[conn.index()];
                conn_state.buf = buf;
                conn_state.sending = false;
                self.make_ready(conn.index());
            }
            Event::Eof { conn } => {
                let addr = self.conns[conn.index()].addr;
                self.fail(Failure::HungUp { addr, reason: "it ended the connection".into() });
            }
            Event::Closed { conn, error } => {
                let addr = self.conns[conn.index()].addr;
                let error = error.unwrap_or_else(|| std::io::ErrorKind::ConnectionAborted.into());
                self.fail(match self.conns[conn.index()].connected {
                    true => Failure::HungUp { addr, reason: error.to_string() },
                    false => Failure::Connect { addr, source: error },
                });
            }
            _ => {}
        }
    }

    /// Who owes something.
    fn silent(&self) -> SocketAddr {
        let owes = |conn: &&Conn| !conn.connected || !conn.in_flight.is_empty();
        self.conns.iter().find(owes).map_or(self.shared.addrs[0], |conn| conn.addr)
    }

    /// The first failure is the one told; later ones follow from it.
    fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
    }

    fn on_data(&mut self, index: usize, bytes: &[u8]) {
        let now = self.now();
        let pause = Duration::from_nanos(now - self.last_reply.min(now));
        self.last_reply = now;
        if self.noting {
            self.report.longest_pause = self.report.longest_pause.max(pause);
        }
        let Conn { replies, in_flight, followups, .. } = &mut self.conns[index];
        let mut streak = Streak { kind: Kind::Get, since: 0, count: 0 };
        let mut unasked = false;
        let mut refused = None;
        let (report, noting, shared) = (&mut self.report, self.noting, &*self.shared);
        let (mut answered, mut ended, mut followed) = (0, 0, 0);
        let fed = replies.feed(bytes, &mut |reply| {
            let Some(asked) = in_flight.pop_front() else {
                // Servers with too many clients say so before they are asked anything.
                match reply {
                    Reply::Error(text) => refused = Some(String::from_utf8_lossy(text).into_owned()),
                    _ => unasked = true,
                }
                return;
            };
            answered += 1;
            let mut reads = false;
            let kind = match asked.what {
                What::Auth => {
                    if let Reply::Error(text) = reply {
                        refused.get_or_insert_with(|| String::from_utf8_lossy(text).into_owned());
                    }
                    return;
                }
                What::Op(kind) => {
                    reads = matches!(kind, Kind::Get | Kind::Rmw);
                    kind
                }
                What::RmwSet => Kind::Rmw,
            };
            match reply {
                Reply::Error(text) => {
                    ended += 1;
                    if noting {
                        report.error(text);
                    }
                    return;
                }
                Reply::Nil if reads && noting => report.misses += 1,
                Reply::Bulk(body) if reads && shared.check && noting => {
                    report.wrong += u64::from(body != shared.requests.expected(asked.key));
                }
                _ => {}
            }
            if asked.what == What::Op(Kind::Rmw) {
                followups.push_back((asked.key, asked.since));
                followed += 1;
                return;
            }
            ended += 1;
            if streak.kind == kind && streak.since == asked.since {
                streak.count += 1;
                return;
            }
            if noting && streak.count > 0 {
                report.record(streak.kind, now.saturating_sub(streak.since), streak.count);
            }
            streak = Streak { kind, since: asked.since, count: 1 };
        });
        if noting && streak.count > 0 {
            report.record(streak.kind, now.saturating_sub(streak.since), streak.count);
        }
        self.in_flight -= answered;
        self.followups += followed;
        self.ended += ended;
        let addr = self.conns[index].addr;
        if let Err(malformed) = fed {
            self.fail(Failure::Malformed { addr, what: format!("{:?}", malformed.0) });
        }
        if unasked {
            self.fail(Failure::Malformed { addr, what: "a reply that nothing had asked for".into() });
        }
        if let Some(reply) = refused {
            self.fail(Failure::Refused { addr, reply });
        }
        self.make_ready(index);
    }

    /// Queues the connection if it may send something now.
    fn make_ready(&mut self, index: usize) {
        let open = self.job.rate.is_some();
        let conn = &mut self.conns[index];
        let room = match open {
            true => conn.in_flight.len() < self.job.pipeline,
            false => conn.in_flight.is_empty(),
        };
        if room && !conn.sending && !conn.queued && (self.issuing || !conn.followups.is_empty() || open) {
            conn.queued = true;
            self.ready.push_back(index as u32);
        }
    }

    fn asked(&mut self, index: usize, what: What, key: u64, since: u64) {
        self.conns[index].in_flight.push_back(Asked { what, key, since });
        self.in_flight += 1;
    }

    /// Notes what became due, as much of it as could be sent.
    fn take_due(&mut self, schedule: &mut Schedule, now: u64) {
        let most = self.conns.len() * self.job.pipeline;
        while self.due.len() < most && self.left > 0 {
            let Some(due) = schedule.take(now) else { break };
            self.due.push_back(due);
            self.left -= 1;
        }
    }

    /// A batch for each connection whose last one is answered.
    fn flush_closed(&mut self, ring: &mut Ring, now: u64) -> Result<(), Failure> {
        while let Some(index) = self.ready.pop_front() {
            let index = index as usize;
            self.conns[index].queued = false;
            if self.conns[index].sending || !self.conns[index].in_flight.is_empty() {
                continue;
            }
            self.follow_up(index);
            if self.issuing {
                for _ in 0..self.conns[index].room(self.job.pipeline) {
                    if self.left == 0 {
                        break;
                    }
                    self.left -= 1;
                    self.issue(index, now);
                }
            }
            self.send(ring, index)?;
        }
        Ok(())
    }

    /// What is due, spread over the connections with room.
    fn flush_open(&mut self, ring: &mut Ring) -> Result<(), Failure> {
        let mut candidates = self.ready.len();
        while candidates > 0 && (!self.due.is_empty() || self.followups > 0) {
            let share = self.due.len().div_ceil(candidates);
            candidates -= 1;
            let index = self.ready.pop_front().expect("as many as were counted") as usize;
            let conn = &mut self.conns[index];
            conn.queued = false;
            if conn.sending {
                continue;
            }
            self.follow_up(index);
            for _ in 0..self.conns[index].room(self.job.pipeline).min(share) {
                let Some(due) = self.due.pop_front() else { break };
                self.issue(index, due);
            }
            if self.conns[index].buf.is_empty() {
                self.make_ready(index);
            }
            self.send(ring, index)?;
        }
        Ok(())
    }

    /// Writes the SETs of read-modify-writes whose GET is answered.
    fn follow_up(&mut self, index: usize) {
        while let Some((key, since)) = self.conns[index].followups.pop_front() {
            self.followups -= 1;
            self.shared.requests.set(key, &mut self.conns[index].buf);
            self.asked(index, What::RmwSet, key, since);
        }
    }

    /// Writes one new operation.
    #[inline]
    fn issue(&mut self, index: usize, since: u64) {
        let kind = self.job.mix.next(&mut self.job.random);
        let requests = &self.shared.requests;
        let buf = &mut self.conns[index].buf;
        let newest = &self.shared.newest;
        let key = match kind {
            Kind::Insert => newest.fetch_add(1, Ordering::Relaxed),
            _ => {
                let answered = newest.load(Ordering::Relaxed).saturating_sub(self.job.window).max(self.shared.keys);
                self.job.chooser.next(&mut self.job.random, answered)
            }
        };
        match kind {
            Kind::Get | Kind::Rmw => requests.get(key, buf),
            Kind::Set | Kind::Insert => requests.set(key, buf),
            Kind::Del => requests.del(key, buf),
        }
        self.asked(index, What::Op(kind), key, since);
    }

    /// Sends what was written for a connection, if anything was.
    fn send(&mut self, ring: &mut Ring, index: usize) -> Result<(), Failure> {
        let conn = &mut self.conns[index];
        if conn.buf.is_empty() {
            return Ok(());
        }
        if self.in_flight == conn.in_flight.len() {
            // Nothing was owed before this: a pause of the server begins here at the earliest.
            self.last_reply = self.clock.elapsed().as_nanos() as u64;
        }
        conn.sending = true;
        match ring.send(conn.id, std::mem::take(&mut conn.buf)) {
            Ok(()) => Ok(()),
            Err(_) => Err(Failure::HungUp { addr: conn.addr, reason: "it is gone".into() }),
        }
    }
}
