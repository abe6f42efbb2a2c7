//! One client connection: bytes in, replies out, in order. Pure: sockets, data and cores are behind [`Backplane`].
//!
//! ```text
//!   bytes ─▶ decoder ─▶ command ─┬─▶ here: run at once, reply appended
//!                                ├─▶ another core: a frame, and a slot that waits for its answer
//!                                ├─▶ several cores: one frame each, and a slot that gathers the parts
//!                                └─▶ the node: a task; reading goes on when it has answered
//! ```
//!
//! Promises:
//!
//! - One reply per request, in the order of the requests, however many cores answer (`replies`).
//! - Commands of one connection reach each core in the order in which they were sent. Where that is not enough (a command
//!   for the whole node, WATCH) reading pauses until everything before has been answered. Where requests may overtake each
//!   other ([`Backplane::may_overtake`]) a command waits for those before it that touch its keys (`claims`).
//! - Nothing grows without bound. With too much output unread, too many answers outstanding or a sibling's lane
//!   full, [`Session::feed`] keeps what it has not looked at and [`Session::is_stalled`] says so: stop reading the socket,
//!   and call [`Session::resume`] when something has moved.
//!
//! Not here: what commands do (the engine), sockets ([`crate::ring`]), and what the commands of the node answer.

mod claims;
mod commands;
mod exec;
mod replies;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod transaction;

use std::collections::VecDeque;

use gridkv_engine::command::{self, CommandId, Flags, Merge, Route, Spec};
use gridkv_engine::hash::{KeyHash, Keyspace};
use gridkv_engine::hlc::Version;
use gridkv_engine::reply::Reply;

use crate::frame::Status;
use crate::mesh::CoreId;
use crate::resp::{Decoder, Limits as WireLimits, Parsed, Protocol, Short, Span, Writer};

pub use replies::{Answer, PART_WRITTEN};

use claims::{Claims, Touch};
use replies::{Gathering, Loudness, Replies};
use transaction::Watched;

/// What a connection may cost. Each bound has its own error, or stops the reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of one command: arguments, bytes per argument, bytes of a line.
    pub wire: WireLimits,
    /// Bytes of a key; beyond it the command is refused.
    pub max_key: usize,
    /// Bytes of requests not yet looked at; beyond it the connection is closed.
    pub query_buffer: usize,
    /// Bytes of replies not yet taken; beyond it reading stops.
    pub output_high_water: usize,
    /// Answers outstanding; beyond it reading stops.
    pub max_pending: usize,
    /// Commands queued by MULTI; beyond it the command is refused.
    pub multi_queue: usize,
}

/// A request to the core that owns its data.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Read a key: answered by a value or nil.
    Get(&'a [u8]),
    /// Write a key, for ever: answered by done.
    Set(&'a [u8], &'a [u8]),
    /// The version of a key: answered by [`transaction::version_bytes`] or nil.
    Version(&'a [u8]),
    /// Run a command: answered by a reply in that protocol.
    Command(&'static Spec, &'a [&'a [u8]], Protocol),
    /// Run a [`transaction`]: answered by a reply in that protocol.
    Exec(&'a [u8], Protocol),
}

/// What became of a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Login {
    /// It is right.
    Welcome,
    /// It is wrong, or there is no such user.
    Refused,
    /// None is asked for.
    NotNeeded,
}

/// What a session needs from the core it lives on.
pub trait Backplane {
    /// How keys map to shards.
    fn keyspace(&self) -> Keyspace;
    /// The core of this session.
    fn here(&self) -> CoreId;
    /// Number of cores.
    fn cores(&self) -> usize;
    /// The core that owns a hash.
    fn owner(&self, hash: KeyHash) -> CoreId;
    /// Whether requests to that core are function calls: it is this one, and its data is not shared with other nodes. To any
    /// other, this one included, they are sent.
    #[inline]
    fn runs(&self, core: CoreId) -> bool {
        core == self.here()
    }
    /// Whether a request may be done before one that was sent to the same core earlier: it is when other nodes share the data.
    /// SETs of one key never are.
    #[inline]
    fn may_overtake(&self) -> bool {
        false
    }
    /// Whether the node takes part in a cluster: its clients are told.
    fn in_cluster(&self) -> bool {
        false
    }
    /// Bounds.
    fn limits(&self) -> &Limits;

    /// A hint: a key of that hash is used soon. The hash may be another core's.
    fn prefetch_place(&self, hash: KeyHash);
    /// The second half of the hint, a while later.
    fn prefetch_entry(&self, hash: KeyHash);

    /// Reads a key of this core and writes the reply.
    fn get(&mut self, hash: KeyHash, key: &[u8], protocol: Protocol, out: &mut Vec<u8>);
    /// Writes a key of this core and writes the reply.
    fn set(&mut self, hash: KeyHash, key: &[u8], value: &[u8], out: &mut Vec<u8>);
    /// Runs a command on this core's data and writes the reply; returns what it left in the context's `aux`.
    fn run(&mut self, spec: &'static Spec, args: &[&[u8]], protocol: Protocol, out: &mut Vec<u8>) -> i64;
    /// Whether a command of [`Route::Every`] may run; else what the client is told, and no core does anything. When it may,
    /// every core is given its part.
    ///
    /// # Errors
    /// The text of the refusal, with its prefix.
    fn begin_every(&mut self, _spec: &'static Spec) -> Result<(), &'static str> {
        Ok(())
    }
    /// Runs a [`transaction`] on this core's data and writes the reply.
    fn exec(&mut self, transaction: &[u8], protocol: Protocol, out: &mut Vec<u8>);
    /// Version of a key of this core.
    fn version(&mut self, hash: KeyHash, key: &[u8]) -> Option<Version>;

    /// How many replicas the requests of this call ask for; see [`Client::level`].
    fn set_level(&mut self, _level: u32) {}
    /// Whether a request to that core would be taken.
    fn has_room(&self, to: CoreId) -> bool;
    /// Sends a request to another core that has room. Its answer comes to [`Session::answer`] with the same numbers.
    fn send(&mut self, to: CoreId, hash: KeyHash, slot: u32, index: u32, request: Request<'_>);
    /// Starts a command of [`Route::Node`]. Its reply comes to [`Session::answer`].
    fn node(&mut self, slot: u32, client: &Client, spec: &'static Spec, args: &[&[u8]]);

    /// Judges a password.
    fn login(&mut self, user: &[u8], password: &[u8]) -> Login;
    /// Whether clients must give a password.
    fn needs_password(&self) -> bool;
    /// A command begins that the session itself answers.
    fn begin(&mut self, _spec: &'static Spec) {}
    /// Counts a command that the session itself has answered.
    fn count(&mut self, spec: &'static Spec, args: &[&[u8]]);
    /// Counts an error reply, given as its text with prefix.
    fn count_error(&mut self, blame: Blame, text: &[u8]);
}

/// The command that an error reply is counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// It was refused and has not run.
    Refused(CommandId),
    /// The session has run it.
    Failed(CommandId),
    /// None, or whoever ran it has counted it.
    Counted,
}

/// What is known of a client.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// Its number in this process, from 1.
    pub id: u64,
    /// The protocol it speaks.
    pub protocol: Protocol,
    /// The name it gave itself.
    pub name: String,
    /// The library it uses.
    pub lib_name: String,
    /// The library's version.
    pub lib_ver: String,
    /// CLIENT NO-EVICT was asked for.
    pub no_evict: bool,
    /// CLIENT NO-TOUCH was asked for.
    pub no_touch: bool,
    /// CLIENT CONSISTENCY: how many replicas must answer; goes into [`crate::frame::Head::level`].
    pub level: u32,
    /// The last command.
    pub last: Option<CommandId>,
    /// Commands so far.
    pub commands: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReplyMode {
    On,
    Off,
    /// The next command is answered silently.
    SkipNext,
}

/// A command kept for EXEC.
#[derive(Debug)]
struct Queued {
    spec: &'static Spec,
    args: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Multi {
    queue: Vec<Queued>,
    bytes: usize,
    /// A command was refused: EXEC will refuse them all.
    broken: bool,
}

/// A WATCH that waits for versions.
#[derive(Debug)]
struct Watching {
    slot: u32,
    /// Versions that have not come.
    missing: u32,
    /// Keys that were watched before it.
    known: usize,
    /// Why the version of a key could not be read, the first time.
    failed: Option<Vec<u8>>,
}

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Answered, or on its way.
    Done,
    /// Nothing happened: try again later.
    Later,
}

/// A GET or SET that was read and waits for its key to come into the cache.
#[derive(Clone, Copy, Debug)]
struct Ahead {
    hash: KeyHash,
    /// Where its command begins in the input.
    start: usize,
    key: Span,
    /// `None` for a GET.
    value: Option<Span>,
}

impl Ahead {
    /// The command at `start`; its key's place in the table is on its way into the cache.
    #[inline(always)]
    fn new(input: &[u8], start: usize, key: Span, value: Option<Span>, back: &impl Backplane) -> Ahead {
        let hash = back.keyspace().locate(key.of(&input[start..]));
        back.prefetch_place(hash);
        Ahead { hash, start, key, value }
    }
}

/// Commands read before the first of them runs.
const AHEAD: usize = 32;

/// Commands on the fast path, found once.
#[derive(Clone, Copy, Debug)]
struct Hot {
    get: CommandId,
    set: CommandId,
}

/// A connection's state.
#[derive(Debug)]
pub struct Session {
    client: Client,
    hot: Hot,
    decoder: Decoder,
    spans: Vec<Span>,
    ahead: Vec<Ahead>,
    /// Bytes received and not yet understood; valid from `input_at` on.
    input: Vec<u8>,
    input_at: usize,
    replies: Replies,
    /// Keys of requests that are under way and may be overtaken.
    claims: Claims,
    /// Answers that may be outstanding now: grows with small answers, shrinks with large ones.
    window: usize,
    authenticated: bool,
    reply_mode: ReplyMode,
    /// Whose error it is when there is one.
    blame: Blame,
    multi: Option<Multi>,
    watched: Vec<Watched>,
    /// A WATCH whose versions are under way.
    watching: Option<Watching>,
    /// Commands of an EXEC that run one after the other.
    running: VecDeque<Queued>,
    /// The slot that must be answered before reading goes on.
    barrier: Option<u32>,
    stalled: bool,
    closing: bool,
    /// Authenticated, no transaction, replies on: GET and SET take the short way.
    plain: bool,
}

impl Session {
    /// A new connection.
    pub fn new(id: u64, needs_password: bool) -> Session {
        let find = |name: &[u8]| command::lookup(name).expect("it is in the table").id;
        Session {
            client: Client { id, ..Client::default() },
            hot: Hot { get: find(b"get"), set: find(b"set") },
            decoder: Decoder::new(),
            spans: Vec::new(),
            ahead: Vec::new(),
            input: Vec::new(),
            input_at: 0,
            replies: Replies::default(),
            claims: Claims::default(),
            window: FIRST_WINDOW,
            authenticated: !needs_password,
            reply_mode: ReplyMode::On,
            blame: Blame::Counted,
            multi: None,
            watched: Vec::new(),
            watching: None,
            running: VecDeque::new(),
            barrier: None,
            stalled: false,
            closing: false,
            plain: !needs_password,
        }
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Commands queued by MULTI, if it is on.
    pub fn queued(&self) -> Option<usize> {
        self.multi.as_ref().map(|multi| multi.queue.len())
    }

    /// Keys under WATCH.
    pub fn watched(&self) -> usize {
        self.watched.len()
    }

    /// Bytes of requests that wait here.
    pub fn input_bytes(&self) -> usize {
        self.input.len() - self.input_at
    }

    /// Bytes of replies that wait for others.
    pub fn parked_bytes(&self) -> usize {
        self.replies.parked()
    }

    /// Whether answers are outstanding.
    pub fn is_waiting(&self) -> bool {
        self.replies.open() > 0
    }

    /// Whether CLIENT REPLY OFF is on.
    pub fn is_silent(&self) -> bool {
        self.reply_mode == ReplyMode::Off
    }

    /// Whether the socket should not be read now; see [`Session::resume`].
    #[inline]
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Whether nothing more will come: close when the output is sent.
    #[inline]
    pub fn is_finished(&self) -> bool {
        self.closing && self.replies.open() == 0
    }

    /// Reads no further; what is on its way is still answered.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Takes received bytes. Replies are appended to `out`, which may still hold earlier ones.
    #[inline]
    pub fn feed(&mut self, bytes: &[u8], back: &mut impl Backplane, out: &mut Vec<u8>) {
        back.set_level(self.client.level);
        if self.input.is_empty() && !self.stalled {
            let consumed = self.advance(bytes, back, out);
            if consumed < bytes.len() && !self.closing {
                self.keep(&bytes[consumed..], back, out);
            }
        } else if !self.closing {
            self.keep(bytes, back, out);
            self.resume(back, out);
        }
    }

    /// Goes on after a stall.
    pub fn resume(&mut self, back: &mut impl Backplane, out: &mut Vec<u8>) {
        back.set_level(self.client.level);
        let input = std::mem::take(&mut self.input);
        let consumed = self.advance(&input[self.input_at..], back, out);
        self.input = input;
        self.input_at += consumed;
        if self.input_at == self.input.len() || self.closing {
            self.input_at = 0;
            self.input.clear();
            if self.input.capacity() > 64 << 10 {
                self.input = Vec::new();
            }
        } else if self.input_at > self.input.len() / 2 {
            self.input.drain(..self.input_at);
            self.input_at = 0;
        }
    }

    fn keep(&mut self, bytes: &[u8], back: &mut impl Backplane, out: &mut Vec<u8>) {
        if self.input_bytes() + bytes.len() > back.limits().query_buffer {
            self.error("ERR Protocol error: the query buffer is full", back, out);
            self.closing = true;
            return;
        }
        self.input.extend_from_slice(bytes);
    }

    /// Takes the answer to a request that was sent away, and goes on if it was waited for.
    #[inline]
    pub fn answer(&mut self, slot: u32, index: u32, answer: &Answer<'_>, back: &mut impl Backplane, out: &mut Vec<u8>) {
        back.set_level(self.client.level);
        if answer.bytes.len() <= SMALL_ANSWER {
            self.window = (self.window + 1).min(back.limits().max_pending);
        } else {
            self.window = (back.limits().output_high_water / answer.bytes.len()).clamp(1, self.window);
        }
        if answer.is_error() {
            back.count_error(Blame::Counted, answer.bytes.strip_prefix(b"-").unwrap_or(answer.bytes));
        }
        let whole = match &mut self.watching {
            Some(watching) if watching.slot == slot => {
                if answer.is_error() {
                    watching.failed.get_or_insert_with(|| answer.bytes.to_vec());
                } else if let Some(key) = self.watched.get_mut(index as usize) {
                    key.version = transaction::version_of(answer.bytes);
                }
                watching.missing -= 1;
                if watching.missing > 0 {
                    return;
                }
                let Watching { known, failed, .. } = self.watching.take().expect("it is seen above");
                let status = if failed.is_some() { Status::Error } else { Status::Done };
                if failed.is_some() {
                    // A key of which nothing is known cannot be watched, and half a WATCH is none.
                    self.watched.truncate(known);
                }
                self.replies.answer(slot, 0, &Answer { status, aux: 0, bytes: &failed.unwrap_or_default() }, out)
            }
            _ => self.replies.answer(slot, index, answer, out),
        };
        if whole {
            self.claims.release(slot);
            if self.barrier == Some(slot) {
                self.barrier = None;
            }
        }
    }

    /// Reads commands until input, patience or room ends. Returns the bytes consumed.
    ///
    /// GETs and SETs are read ahead: their keys' places in the table are asked for while the next ones are parsed, so that the
    /// misses of the cache overlap. Everything else waits until those read ahead have run.
    fn advance(&mut self, input: &[u8], back: &mut impl Backplane, out: &mut Vec<u8>) -> usize {
        let mut spans = std::mem::take(&mut self.spans);
        let mut ahead = std::mem::take(&mut self.ahead);
        let mut at = 0;
        self.stalled = false;
        loop {
            if self.closing {
                break;
            }
            if ahead.is_empty() {
                if !self.may_go_on(back, out) {
                    self.stalled = true;
                    break;
                }
                if !self.running.is_empty() {
                    if self.run_queued(back, out) == Step::Later {
                        self.stalled = true;
                        break;
                    }
                    continue;
                }
            }
            if self.plain {
                at = self.read_ahead(&mut ahead, input, at, back);
                if ahead.len() == AHEAD {
                    if let Some(start) = self.run_ahead(&mut ahead, input, back, out) {
                        at = start;
                        break;
                    }
                    continue;
                }
            }
            let wire = if self.authenticated { back.limits().wire } else { WireLimits::STRANGER };
            let parsed = self.decoder.parse(&input[at..], &wire, &mut spans);
            if let Ok(Parsed::Command { consumed }) = parsed
                && let Some((key, value)) = self.hot(&spans, &input[at..])
            {
                ahead.push(Ahead::new(input, at, key, value, back));
                at += consumed;
                continue;
            }
            if !ahead.is_empty() {
                if let Some(start) = self.run_ahead(&mut ahead, input, back, out) {
                    at = start;
                    break;
                }
                if !self.may_go_on(back, out) && !matches!(parsed, Ok(Parsed::Incomplete { .. })) {
                    self.decoder.reset();
                    self.stalled = true;
                    break;
                }
            }
            let step = match parsed {
                Ok(Parsed::Command { consumed }) => {
                    let step = self.dispatch(&spans, &input[at..], back, out);
                    at += if step == Step::Done { consumed } else { 0 };
                    step
                }
                Ok(Parsed::Line { consumed }) => {
                    let line = self.decoder.line().to_vec();
                    let step = self.dispatch(&spans, &line, back, out);
                    at += if step == Step::Done { consumed } else { 0 };
                    step
                }
                Ok(Parsed::Nothing { consumed }) => {
                    at += consumed;
                    Step::Done
                }
                Ok(Parsed::Incomplete { .. }) => break,
                Err(error) => {
                    self.error(&error.to_string(), back, out);
                    self.closing = true;
                    break;
                }
            };
            if step == Step::Later {
                self.stalled = true;
                break;
            }
        }
        ahead.clear();
        self.spans = spans;
        self.ahead = ahead;
        at
    }

    /// Whether another command may run now.
    #[inline]
    fn may_go_on(&self, back: &impl Backplane, out: &[u8]) -> bool {
        let limits = back.limits();
        self.barrier.is_none()
            && out.len() + self.replies.parked() <= limits.output_high_water
            && self.replies.open() < self.window.min(limits.max_pending)
    }

    /// Reads GETs and SETs as long as they come in their usual form and there is room for them. Where the first other command begins.
    #[inline(never)]
    fn read_ahead(&self, ahead: &mut Vec<Ahead>, input: &[u8], mut at: usize, back: &impl Backplane) -> usize {
        let limits = &back.limits().wire;
        while ahead.len() < AHEAD
            && let Some(Short { key, value, consumed }) = self.decoder.short(&input[at..], limits)
        {
            ahead.push(Ahead::new(input, at, key, value, back));
            at += consumed;
        }
        at
    }

    /// Key and value of a GET or SET in another form, such as one that came in pieces.
    fn hot(&self, spans: &[Span], bytes: &[u8]) -> Option<(Span, Option<Span>)> {
        match *spans {
            [name, key] if self.plain && name.len == 3 && is(name.of(bytes), b"get") => Some((key, None)),
            [name, key, value] if self.plain && name.len == 3 && is(name.of(bytes), b"set") => Some((key, Some(value))),
            _ => None,
        }
    }

    /// Runs what was read ahead. When one cannot run now, where it begins: reading goes on from there later.
    #[inline]
    fn run_ahead(
        &mut self,
        ahead: &mut Vec<Ahead>,
        input: &[u8],
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Option<usize> {
        if ahead.len() > 1 {
            ahead.iter().for_each(|hot| back.prefetch_entry(hot.hash));
        }
        for (at, hot) in ahead.iter().enumerate() {
            let bytes = &input[hot.start..];
            let step = if at > 0 && !self.may_go_on(back, out) {
                Step::Later
            } else if let Some(value) = hot.value {
                self.set(hot.hash, hot.key.of(bytes), value.of(bytes), back, out)
            } else {
                self.get(hot.hash, hot.key.of(bytes), back, out)
            };
            if step == Step::Later {
                // What the decoder may know of a later command is of no use any more.
                self.decoder.reset();
                self.stalled = true;
                return Some(hot.start);
            }
        }
        ahead.clear();
        None
    }

    #[inline]
    fn dispatch(&mut self, spans: &[Span], bytes: &[u8], back: &mut impl Backplane, out: &mut Vec<u8>) -> Step {
        if spans.len() <= 8 {
            let mut args: [&[u8]; 8] = [b""; 8];
            for (arg, span) in args.iter_mut().zip(spans) {
                *arg = span.of(bytes);
            }
            self.command(&args[..spans.len()], back, out)
        } else {
            let args: Vec<&[u8]> = spans.iter().map(|span| span.of(bytes)).collect();
            self.command(&args, back, out)
        }
    }

    #[inline]
    fn get(&mut self, hash: KeyHash, key: &[u8], back: &mut impl Backplane, out: &mut Vec<u8>) -> Step {
        let owner = back.owner(hash);
        let protocol = self.client.protocol;
        if key.len() > back.limits().max_key {
            self.blame = Blame::Refused(self.hot.get);
            self.key_too_long(back, out);
        } else if self.claims.forbid(hash, Touch::Read) {
            return Step::Later;
        } else if back.runs(owner) {
            self.replies.write(out, |out| back.get(hash, key, protocol, out));
        } else if back.has_room(owner) {
            let slot = self.replies.wait(protocol, Loudness::Heard);
            self.claim(slot, [hash], Touch::Read, back);
            back.send(owner, hash, slot, 0, Request::Get(key));
        } else {
            return Step::Later;
        }
        self.client.last = Some(self.hot.get);
        self.client.commands += 1;
        Step::Done
    }

    #[inline]
    fn set(&mut self, hash: KeyHash, key: &[u8], value: &[u8], back: &mut impl Backplane, out: &mut Vec<u8>) -> Step {
        let owner = back.owner(hash);
        if key.len() > back.limits().max_key {
            self.blame = Blame::Refused(self.hot.set);
            self.key_too_long(back, out);
        } else if self.claims.forbid(hash, Touch::Blind) {
            return Step::Later;
        } else if back.runs(owner) {
            self.replies.write(out, |out| back.set(hash, key, value, out));
        } else if back.has_room(owner) {
            let slot = self.replies.wait(self.client.protocol, Loudness::Heard);
            self.claim(slot, [hash], Touch::Blind, back);
            back.send(owner, hash, slot, 0, Request::Set(key, value));
        } else {
            return Step::Later;
        }
        self.client.last = Some(self.hot.set);
        self.client.commands += 1;
        Step::Done
    }

    /// Any command, as it came from the client.
    fn command(&mut self, args: &[&[u8]], back: &mut impl Backplane, out: &mut Vec<u8>) -> Step {
        let loudness = match self.reply_mode {
            ReplyMode::On => Loudness::Heard,
            ReplyMode::Off | ReplyMode::SkipNext => Loudness::Quiet,
        };
        let skipping = self.reply_mode == ReplyMode::SkipNext;
        let spec = match command::resolve(args) {
            Ok(spec) => spec,
            Err(refusal) => {
                self.blame = refusal.command().map_or(Blame::Counted, Blame::Refused);
                self.refuse(refusal.text(), loudness, back, out);
                self.after_skip(skipping);
                return Step::Done;
            }
        };
        self.blame = Blame::Refused(spec.id);
        let step = self.checked(spec, args, loudness, back, out);
        if step == Step::Done {
            self.client.last = Some(spec.id);
            self.client.commands += 1;
            self.after_skip(skipping);
        }
        step
    }

    fn after_skip(&mut self, skipping: bool) {
        if skipping && self.reply_mode == ReplyMode::SkipNext {
            self.reply_mode = ReplyMode::On;
            self.update_plain();
        }
    }

    fn checked(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Step {
        if !self.authenticated && !spec.flags.contains(Flags::NO_AUTH) {
            self.refuse("NOAUTH Authentication required.", loudness, back, out);
            return Step::Done;
        }
        let max_key = back.limits().max_key;
        if spec.first_key != 0 && spec.keys(args.len()).any(|at| args[at].len() > max_key) {
            self.break_multi();
            self.key_too_long(back, out);
            return Step::Done;
        }
        if self.multi.is_some() && !commands::runs_inside_multi(spec) {
            if spec.flags.contains(Flags::NO_MULTI) {
                self.refuse("ERR Command not allowed inside a transaction", loudness, back, out);
            } else {
                self.queue(spec, args, loudness, back, out);
            }
            return Step::Done;
        }
        self.route(spec, args, loudness, back, out)
    }

    /// Sends a command where it runs.
    fn route(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Step {
        match spec.route {
            Route::Session => self.own(spec, args, loudness, back, out),
            Route::Key => {
                let key = args[usize::try_from(spec.first_key).unwrap_or(1)];
                let hash = back.keyspace().locate(key);
                self.one(spec, args, hash, loudness, back, out)
            }
            Route::Shard => {
                let keyspace = back.keyspace();
                let mut hashes = spec.keys(args.len()).map(|at| keyspace.locate(args[at]));
                let Some(first) = hashes.next() else {
                    self.refuse(command::Refusal::arity(spec).text(), loudness, back, out);
                    return Step::Done;
                };
                if hashes.any(|hash| keyspace.shard(hash) != keyspace.shard(first)) {
                    self.refuse(CROSS_SLOT, loudness, back, out);
                    return Step::Done;
                }
                self.one(spec, args, first, loudness, back, out)
            }
            Route::Split(merge) => self.split(spec, args, merge, loudness, back, out),
            Route::Every(merge) => self.every(spec, args, merge, loudness, back, out),
            Route::Node => {
                if self.replies.open() > 0 {
                    return Step::Later;
                }
                let slot = self.replies.wait(self.client.protocol, loudness);
                self.barrier = Some(slot);
                back.node(slot, &self.client, spec, args);
                Step::Done
            }
        }
    }

    /// A command whose keys all live in one shard.
    fn one(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        hash: KeyHash,
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Step {
        let owner = back.owner(hash);
        let protocol = self.client.protocol;
        let (touch, keyspace) = (touch_of(spec), back.keyspace());
        if self.are_claimed(hashes_of(spec, args, keyspace), touch) {
            return Step::Later;
        } else if back.runs(owner) {
            self.reply(loudness, out, |out| back.run(spec, args, protocol, out));
        } else if back.has_room(owner) {
            let slot = self.replies.wait(protocol, loudness);
            self.claim(slot, hashes_of(spec, args, keyspace), touch, back);
            back.send(owner, hash, slot, 0, Request::Command(spec, args, protocol));
        } else {
            return Step::Later;
        }
        Step::Done
    }

    /// A command of independent keys: each core gets those it owns, in one request.
    fn split(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        merge: Merge,
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Step {
        let step = spec.step.max(1) as usize;
        if !(args.len() - 1).is_multiple_of(step) {
            self.refuse(command::Refusal::arity(spec).text(), loudness, back, out);
            return Step::Done;
        }
        let keyspace = back.keyspace();
        let owners = spec.keys(args.len()).map(|at| back.owner(keyspace.locate(args[at])));
        let first = args[1];
        let mut others = owners.clone();
        let owner = others.next().expect("the number of arguments was checked");
        if others.all(|other| other == owner) {
            return self.one(spec, args, keyspace.locate(first), loudness, back, out);
        }
        let mut order: Vec<u16> = owners.map(|core| core.0).collect();
        let mut involved = vec![0u32; back.cores()];
        order.iter().for_each(|&core| involved[usize::from(core)] += 1);
        let here = back.here();
        let cores = || (0..involved.len()).filter(|&core| involved[core] > 0).map(|core| CoreId(core as u16));
        let touch = touch_of(spec);
        if self.are_claimed(hashes_of(spec, args, keyspace), touch)
            || !cores().all(|core| back.runs(core) || back.has_room(core))
        {
            return Step::Later;
        }
        let mut parts: Vec<Vec<&[u8]>> = involved.iter().map(|&n| Vec::with_capacity(1 + n as usize * step)).collect();
        cores().for_each(|core| parts[core.index()].push(args[0]));
        for (&core, words) in order.iter().zip(args[1..].chunks(step)) {
            parts[usize::from(core)].extend_from_slice(words);
        }
        if merge != Merge::Array {
            order = Vec::new();
        }
        let writes = spec.flags.contains(Flags::WRITE);
        let mut gathering = Gathering::new(merge, cores().count() as u32, back.cores(), order, writes);
        let own = involved[here.index()] > 0 && back.runs(here);
        if own {
            self.run_part(&mut gathering, spec, &parts[here.index()], back);
        }
        let protocol = self.client.protocol;
        let slot = self.replies.gather(gathering, protocol, loudness);
        self.claim(slot, hashes_of(spec, args, keyspace), touch, back);
        for core in cores().filter(|&core| core != here || !own) {
            let part = &parts[core.index()];
            let hash = keyspace.locate(part[1]);
            back.send(core, hash, slot, u32::from(core.0), Request::Command(spec, part, protocol));
        }
        Step::Done
    }

    /// A command that runs on all cores.
    fn every(
        &mut self,
        spec: &'static Spec,
        args: &[&[u8]],
        merge: Merge,
        loudness: Loudness,
        back: &mut impl Backplane,
        out: &mut Vec<u8>,
    ) -> Step {
        let here = back.here();
        let others = (0..back.cores() as u16).map(CoreId).filter(|&core| core != here);
        if back.may_overtake() && self.replies.open() > 0 {
            return Step::Later;
        }
        if !others.clone().all(|core| back.has_room(core)) {
            return Step::Later;
        }
        if let Err(text) = back.begin_every(spec) {
            self.refuse(text, loudness, back, out);
            return Step::Done;
        }
        let protocol = self.client.protocol;
        let writes = spec.flags.contains(Flags::WRITE);
        let mut gathering = Gathering::new(merge, back.cores() as u32, back.cores(), Vec::new(), writes);
        self.run_part(&mut gathering, spec, args, back);
        if back.cores() == 1 {
            self.reply(loudness, out, |out| gathering.finish(protocol, out));
            return Step::Done;
        }
        let slot = self.replies.gather(gathering, protocol, loudness);
        if back.may_overtake() {
            self.barrier = Some(slot);
        }
        for core in others {
            back.send(core, KeyHash(0), slot, u32::from(core.0), Request::Command(spec, args, protocol));
        }
        Step::Done
    }

    /// Whether a request under way has to be answered before one that touches these keys may go.
    #[inline]
    fn are_claimed(&self, mut keys: impl Iterator<Item = KeyHash>, touch: Touch) -> bool {
        !self.claims.is_empty() && keys.any(|key| self.claims.forbid(key, touch))
    }

    /// The request of that slot is about to go.
    #[inline]
    fn claim(&mut self, slot: u32, keys: impl IntoIterator<Item = KeyHash>, touch: Touch, back: &impl Backplane) {
        if back.may_overtake() {
            self.claims.hold(slot, keys, touch);
        }
    }

    /// This core's part of a command.
    fn run_part(&mut self, gathering: &mut Gathering, spec: &'static Spec, args: &[&[u8]], back: &mut impl Backplane) {
        let mut bytes = Vec::new();
        let aux = back.run(spec, args, self.client.protocol, &mut bytes);
        let answer = Answer { status: Status::Encoded, aux, bytes: &bytes };
        gathering.add(back.here().index(), &answer);
    }

    /// Writes a reply that is known now.
    #[inline]
    fn reply<T>(&mut self, loudness: Loudness, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        match loudness {
            Loudness::Heard => self.replies.write(out, write),
            Loudness::Quiet => self.replies.drop_reply(write),
        }
    }

    /// Answers with an error; inside MULTI it also breaks the transaction.
    #[cold]
    fn refuse(&mut self, text: &str, loudness: Loudness, back: &mut impl Backplane, out: &mut Vec<u8>) {
        self.break_multi();
        back.count_error(self.blame, text.as_bytes());
        let protocol = self.client.protocol;
        self.reply(loudness, out, |out| Writer::new(protocol, out).error(text));
    }

    #[cold]
    fn error(&mut self, text: &str, back: &mut impl Backplane, out: &mut Vec<u8>) {
        self.blame = Blame::Counted;
        self.refuse(text, Loudness::Heard, back, out);
    }

    #[cold]
    fn key_too_long(&mut self, back: &mut impl Backplane, out: &mut Vec<u8>) {
        let text = format!("ERR key is longer than {} bytes", back.limits().max_key);
        let loudness = if self.reply_mode == ReplyMode::On { Loudness::Heard } else { Loudness::Quiet };
        self.refuse(&text, loudness, back, out);
    }

    fn break_multi(&mut self) {
        if let Some(multi) = &mut self.multi {
            multi.broken = true;
        }
    }

    fn update_plain(&mut self) {
        self.plain = self.authenticated && self.multi.is_none() && self.reply_mode == ReplyMode::On;
    }
}

/// The hashes of the keys that a command names.
fn hashes_of(spec: &'static Spec, args: &[&[u8]], keyspace: Keyspace) -> impl Iterator<Item = KeyHash> {
    spec.keys(args.len()).map(move |at| keyspace.locate(args[at]))
}

/// What a command does with its keys.
fn touch_of(spec: &Spec) -> Touch {
    if spec.flags.contains(Flags::WRITE) { Touch::Write } else { Touch::Read }
}

/// Answers that may be outstanding before one has come, and the size up to which an answer is small. A client that asks
/// other cores for large values is thereby kept to about [`Limits::output_high_water`] of them at once.
const FIRST_WINDOW: usize = 16;
const SMALL_ANSWER: usize = 4 << 10;

/// Redis Cluster's words, and how to get out of it.
const CROSS_SLOT: &str = "CROSSSLOT Keys in request don't hash to the same slot; \
     give them a common hash tag, as in {user:7}:name and {user:7}:mail, to keep them in one shard";

/// Whether a name of three letters is `name` (lower case), in any case.
#[inline]
fn is(bytes: &[u8], name: &[u8; 3]) -> bool {
    bytes[0] | 0x20 == name[0] && bytes[1] | 0x20 == name[1] && bytes[2] | 0x20 == name[2]
}
