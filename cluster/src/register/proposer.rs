//! Who wants the value changed, or wants to know it.
//!
//! One operation at a time. Each attempt has a ballot of its own and two phases; what hinders an attempt (a higher ballot,
//! silence) ends it, and the next one follows after a random pause that doubles, so that two proposers get out of
//! each other's way. Messages are not repeated within an attempt.
//!
//! ```text
//!   Preparing ──quorum──▶ newest value known to be chosen? ──yes──▶ change: Accepting{next} ──quorum──▶ done
//!       │ ▲                      │ no, or it is to be read: then done
//!       │ └── chosen ◀── Accepting{that value}                          │
//!       │                        │                                      │
//!       └──── refused, silence ──┴────────▶ Resting ──▶ Preparing ◀─────┘
//! ```
//!
//! Who is to vote on a value for the first time is prepared too, before anybody is asked to accept it, and accepts it before the others
//! are asked. Otherwise a value could be accepted by few, and be neither chosen nor given up, because those who were to vote were
//! gone already.
//!
//! A value is known to be chosen when somebody who knew said so ([`Proposer::learn`]), when majorities have it accepted at
//! one and the same ballot, or when majorities accepted it for this proposer.
//!
//! Invariants: a ballot carries one value; an operation that ends as [`Outcome::Unavailable`] or [`Outcome::Refused`] has changed
//! nothing and never will.

use std::collections::BTreeMap;

use gridkv_engine::Millis;

#[cfg(test)]
use super::Plant;
use super::{Ballot, Config, Head, MAX_VALUE, RegisterMessage, Rules};
use crate::ids::{NodeNo, Now};
use crate::planted::{Bug, Planted};

/// How long an attempt may take. A round trip and a write to disk are some milliseconds.
const ATTEMPT_MS: Millis = 500;
/// The shortest pause after an attempt that failed.
const PAUSE_MIN_MS: Millis = 5;
/// The first pause is below this; the bound doubles with each attempt.
const PAUSE_MAX_MS: Millis = 50;
/// How often the bound doubles.
const DOUBLINGS: u32 = 4;

/// What a proposer wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output<R> {
    /// To be sent to a voter, which may be on this node.
    Send {
        /// The voter.
        to: NodeNo,
        /// What to send.
        message: RegisterMessage,
    },
    /// This value is chosen. Values come in the order of their epochs.
    Learned(Vec<u8>),
    /// The operation is over.
    Done(Outcome<R>),
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<R> {
    /// The value with the change, or the value that was read, is chosen.
    Chosen(Vec<u8>),
    /// The change does not apply to the newest chosen value. Nothing has changed.
    Refused(R),
    /// `apply` made something that may not follow: a wrong epoch, voters without a common group, too many bytes. Nothing has
    /// changed.
    Illegal,
    /// The register was to be created and has a value.
    Exists(Vec<u8>),
    /// Not enough voters answered in time. Nothing has changed, nor will it.
    Unavailable,
    /// A value with the change may be chosen, or may still become it, or the chain has gone beyond it. Read, then decide anew.
    Unknown,
}

/// An operation is under way. It goes on; the new one was not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a change of the map is under way")]
pub struct Busy;

#[derive(Debug)]
enum Task<C> {
    Create(Vec<u8>),
    Read,
    Change(C),
}

#[derive(Debug)]
struct Operation<C> {
    task: Task<C>,
    deadline: Millis,
    /// A value with the change that voters were asked to accept and that may still become chosen.
    open: Option<(u64, Vec<u8>)>,
    attempts: u32,
}

/// A value with what the rules say of it.
#[derive(Clone, Debug)]
struct Known {
    value: Vec<u8>,
    head: Head,
}

#[derive(Debug)]
enum Phase {
    Idle,
    /// Until the next attempt.
    Resting(Millis),
    Preparing(Preparing),
    Accepting(Accepting),
}

#[derive(Debug)]
struct Preparing {
    until: Millis,
    /// Whose majorities are needed: the voters of `newest`, or of what was known at the start.
    config: Config,
    /// Who was asked, in order.
    asked: Vec<NodeNo>,
    /// Who promised, and the ballot of what it holds.
    promised: BTreeMap<NodeNo, Ballot>,
    refused: Vec<NodeNo>,
    /// Of the highest ballot shown so far.
    newest: Option<(Ballot, Known)>,
    /// The next value, and the voters of the one before, once that is known: it waits for the promises of its own voters.
    next: Option<(Known, Config)>,
}

#[derive(Debug)]
struct Accepting {
    until: Millis,
    value: Known,
    /// The voters of the value, and of the value before where this one is new.
    configs: Vec<Config>,
    /// Who is asked when those who are to vote have accepted it.
    later: Vec<NodeNo>,
    accepted: Vec<NodeNo>,
    refused: Vec<NodeNo>,
    /// It was found, not made: the operation's own work comes after it.
    found: bool,
}

/// The proposer of one node.
#[derive(Debug)]
pub struct Proposer<R: Rules> {
    rules: R,
    node: NodeNo,
    life: u64,
    random: u64,
    /// Ballots that were seen are at most this.
    highest: u64,
    /// Of the present attempt.
    ballot: Ballot,
    /// The newest value known.
    known: Option<Known>,
    /// Whether `known` is chosen; otherwise it only says whom to ask first.
    certain: bool,
    operation: Option<Operation<R::Change>>,
    phase: Phase,
    pub(crate) planted: Planted,
    #[cfg(test)]
    pub(super) plant: Option<Plant>,
}

/// Whether `node` answers true for a majority of each group of a configuration.
fn is_quorum(config: &Config, said: impl Fn(NodeNo) -> bool) -> bool {
    config.groups().all(|group| group.iter().filter(|&&node| said(node)).count() > group.len() / 2)
}

impl<R: Rules> Proposer<R> {
    /// A proposer for one life of a node; see [`Ballot::life`]. `hint` is any value that a voter has accepted, such as this node's own after a
    /// restart: its voters are asked first. `seed` is for the pauses.
    pub fn new(rules: R, node: NodeNo, life: u64, seed: u64, hint: Option<&[u8]>) -> Proposer<R> {
        let known = hint.and_then(|value| read(&rules, value.to_vec()));
        Proposer {
            rules,
            node,
            life,
            random: seed,
            highest: 0,
            ballot: Ballot::default(),
            known,
            certain: false,
            operation: None,
            phase: Phase::Idle,
            planted: Planted::default(),
            #[cfg(test)]
            plant: None,
        }
    }

    /// The seat of this node, when the map has given it one. Ballots of one life never repeat, so it may change at any time.
    pub fn set_node(&mut self, node: NodeNo) {
        self.node = node;
    }

    /// The newest value known to be chosen.
    pub fn chosen(&self) -> Option<&[u8]> {
        self.known.as_ref().filter(|_| self.certain).map(|known| known.value.as_slice())
    }

    /// Whether an operation is under way.
    pub fn is_busy(&self) -> bool {
        self.operation.is_some()
    }

    /// A value that is known to be chosen, as told by another node. Older ones and bytes that are no value are passed over.
    pub fn learn(&mut self, value: &[u8]) {
        if let Some(value) = read(&self.rules, value.to_vec()) {
            self.note_chosen(value);
        }
    }

    /// Creates the register with its first value, whose voters are asked. For the one node that creates a cluster.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn create(
        &mut self,
        now: Now,
        first: Vec<u8>,
        patience: Millis,
        out: &mut Vec<Output<R::Refusal>>,
    ) -> Result<(), Busy> {
        self.begin(now, Task::Create(first), patience, out)
    }

    /// Changes the value. The outcome comes within `patience`.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn propose(
        &mut self,
        now: Now,
        change: R::Change,
        patience: Millis,
        out: &mut Vec<Output<R::Refusal>>,
    ) -> Result<(), Busy> {
        self.begin(now, Task::Change(change), patience, out)
    }

    /// Reads the newest value that was chosen before now.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn read(&mut self, now: Now, patience: Millis, out: &mut Vec<Output<R::Refusal>>) -> Result<(), Busy> {
        self.begin(now, Task::Read, patience, out)
    }

    fn begin(
        &mut self,
        now: Now,
        task: Task<R::Change>,
        patience: Millis,
        out: &mut Vec<Output<R::Refusal>>,
    ) -> Result<(), Busy> {
        if self.is_busy() {
            return Err(Busy);
        }
        self.operation = Some(Operation { task, deadline: now.mono + patience, open: None, attempts: 0 });
        self.attempt(now, out);
        Ok(())
    }

    /// When [`Proposer::on_deadline`] is to be called.
    pub fn next_deadline(&self) -> Option<Millis> {
        let operation = self.operation.as_ref()?;
        let phase = match &self.phase {
            Phase::Idle => return None,
            Phase::Resting(until) => *until,
            Phase::Preparing(preparing) => preparing.until,
            Phase::Accepting(accepting) => accepting.until,
        };
        Some(phase.min(operation.deadline))
    }

    /// Gives up the operation or the attempt whose time is over, or ends a pause.
    pub fn on_deadline(&mut self, now: Now, out: &mut Vec<Output<R::Refusal>>) {
        let Some(operation) = &self.operation else { return };
        if now.mono >= operation.deadline {
            self.give_up(out);
        } else if self.next_deadline().is_some_and(|at| now.mono >= at) {
            self.attempt(now, out);
        }
        self.check();
    }

    /// A voter's answer.
    pub fn on_message(&mut self, now: Now, from: NodeNo, message: RegisterMessage, out: &mut Vec<Output<R::Refusal>>) {
        match message {
            RegisterMessage::Promise { ballot, accepted } => self.on_promise(now, from, ballot, accepted, out),
            RegisterMessage::Accepted { ballot } => self.on_accepted(now, from, ballot, out),
            RegisterMessage::Refused { ballot, promised } => self.on_refused(now, from, ballot, promised),
            RegisterMessage::Prepare { .. } | RegisterMessage::Accept { .. } => {}
        }
        self.check();
    }

    /// A new ballot, and the voters of the newest configuration known are asked.
    fn attempt(&mut self, now: Now, out: &mut Vec<Output<R::Refusal>>) {
        let Some(operation) = &mut self.operation else { return };
        if now.mono >= operation.deadline {
            // Answers that waited while this process stood still have led here.
            return self.give_up(out);
        }
        operation.attempts += 1;
        let config = match (&self.known, &operation.task) {
            (Some(known), _) => known.head.config.clone(),
            (None, Task::Create(first)) => match self.rules.head(first).filter(|head| head.config.is_sound()) {
                Some(head) if first.len() <= MAX_VALUE => head.config,
                _ => return self.finish(Outcome::Illegal, out),
            },
            // Nobody to ask.
            (None, _) => return self.finish(Outcome::Unavailable, out),
        };
        self.highest = self.highest.saturating_add(1);
        self.ballot = Ballot { counter: self.highest, node: self.node, life: self.life };
        let mut preparing = Preparing {
            until: now.mono + ATTEMPT_MS,
            config: Config::default(),
            asked: Vec::new(),
            promised: BTreeMap::new(),
            refused: Vec::new(),
            newest: None,
            next: None,
        };
        preparing.ask(config, self.ballot, out);
        self.phase = Phase::Preparing(preparing);
    }

    fn on_promise(
        &mut self,
        now: Now,
        from: NodeNo,
        ballot: Ballot,
        accepted: Option<(Ballot, Vec<u8>)>,
        out: &mut Vec<Output<R::Refusal>>,
    ) {
        if self.operation.as_ref().is_some_and(|operation| now.mono >= operation.deadline) {
            // It waited while this process stood still: what was right to propose then may be wrong now.
            return self.give_up(out);
        }
        let Phase::Preparing(preparing) = &mut self.phase else { return };
        if ballot != self.ballot || !preparing.asked.contains(&from) || preparing.promised.contains_key(&from) {
            return;
        }
        let mut shown = Ballot::default();
        // What those hold who did not vote so far was never chosen, or long ago.
        if let Some((at, value)) = accepted.filter(|_| preparing.next.is_none()) {
            // A voter that shows what is no value has promised nothing that could be used.
            let Some(value) = read(&self.rules, value).filter(|_| at < ballot) else { return };
            shown = at;
            let keeps_first = planted!(self, TakesAnyValue) && preparing.newest.is_some();
            if preparing.newest.as_ref().is_none_or(|(newest, _)| at > *newest) && !keeps_first {
                if !planted!(self, StaysWithOldVoters) && value.head.config != preparing.config {
                    preparing.ask(value.head.config.clone(), ballot, out);
                }
                preparing.newest = Some((at, value));
            }
        }
        preparing.promised.insert(from, shown);
        if self.is_reached() {
            self.on_prepared(now, out);
        } else {
            self.give_way(now);
        }
    }

    /// Enough promises: the newest value is what to go on from.
    fn on_prepared(&mut self, now: Now, out: &mut Vec<Output<R::Refusal>>) {
        let Phase::Preparing(mut preparing) = std::mem::replace(&mut self.phase, Phase::Idle) else { return };
        if let Some((next, before)) = preparing.next {
            return self.accept_own(now, next, vec![before], out);
        }
        let Some((at, newest)) = preparing.newest.take() else {
            let first = match self.operation.as_ref().map(|operation| &operation.task) {
                Some(Task::Create(first)) if !self.certain => read(&self.rules, first.clone()),
                _ => None,
            };
            return match first {
                Some(first) => self.accept_own(now, first, Vec::new(), out),
                // The voters know less than this node does: too many of them have lost their files.
                None => self.rest(now),
            };
        };
        let known = self.known.as_ref().filter(|_| self.certain);
        let is_known = known.is_some_and(|known| known.value == newest.value);
        if !is_known && known.is_some_and(|known| known.head.epoch >= newest.head.epoch) {
            // Shown before what is known was chosen, at a higher ballot than this one.
            return self.rest(now);
        }
        let same = |node: NodeNo| preparing.promised.get(&node) == Some(&at);
        let blind = planted!(self, BuildsOnUnchosen);
        let reads = matches!(&self.operation, Some(Operation { task: Task::Read, .. }));
        let blind_read = reads && planted!(self, ReadsUnchosen);
        // A read writes what it finds, at its own ballot: what others proposed before it is overruled by that, for ever.
        let is_chosen = is_known || self.quorum(&newest.head.config, same);
        if blind || blind_read || is_chosen && !reads {
            self.learned(newest, out);
            self.on_newest(now, Some(preparing), out);
        } else {
            let configs = vec![newest.head.config.clone()];
            self.accept(now, newest, configs, true, out);
        }
    }

    /// `known` is chosen and is the newest value as of the beginning of this attempt, or was chosen by it. `prepared`: the promises
    /// of the attempt, whose ballot has carried no value yet.
    fn on_newest(&mut self, now: Now, prepared: Option<Preparing>, out: &mut Vec<Output<R::Refusal>>) {
        let known = self.known.clone().expect("the newest value has just been noted");
        let again = planted!(self, AppliesAgain);
        let Some(operation) = &mut self.operation else { return };
        if let Some((epoch, value)) = operation.open.take().filter(|_| !again) {
            if epoch < known.head.epoch {
                operation.open = Some((epoch, value));
                return self.finish(Outcome::Unknown, out);
            }
            if epoch == known.head.epoch {
                if value == known.value {
                    return self.finish(Outcome::Chosen(value), out);
                }
                // Another value has its place in the chain: it can't become chosen any more.
            } else {
                operation.open = Some((epoch, value));
            }
        }
        match &operation.task {
            Task::Read => self.finish(Outcome::Chosen(known.value), out),
            Task::Create(_) => self.finish(Outcome::Exists(known.value), out),
            Task::Change(change) => {
                let Some(preparing) = prepared else { return self.attempt(now, out) };
                let next = match self.rules.apply(&known.value, change) {
                    Err(refusal) => return self.finish(Outcome::Refused(refusal), out),
                    Ok(next) => read(&self.rules, next),
                };
                let follows = |next: &Known| {
                    next.head.epoch == known.head.epoch + 1 && next.head.config.may_follow(&known.head.config)
                };
                match next.filter(follows) {
                    Some(next) => self.prepare_next(now, preparing, next, known.head.config, out),
                    None => self.finish(Outcome::Illegal, out),
                }
            }
        }
    }

    /// Has the voters of the next value promise as well, those who have not.
    fn prepare_next(
        &mut self,
        now: Now,
        mut preparing: Preparing,
        next: Known,
        before: Config,
        out: &mut Vec<Output<R::Refusal>>,
    ) {
        preparing.ask(next.head.config.clone(), self.ballot, out);
        preparing.next = Some((next, before));
        self.phase = Phase::Preparing(preparing);
        if self.is_reached() {
            self.on_prepared(now, out);
        } else {
            self.give_way(now);
        }
    }

    fn accept_own(&mut self, now: Now, next: Known, mut configs: Vec<Config>, out: &mut Vec<Output<R::Refusal>>) {
        if let Some(operation) = &mut self.operation {
            operation.open = Some((next.head.epoch, next.value.clone()));
        }
        configs.push(next.head.config.clone());
        if planted!(self, AcceptsByNextOnly) && !next.head.config.next.is_empty() {
            configs = vec![Config { voters: next.head.config.next.clone(), next: Vec::new() }];
        }
        self.accept(now, next, configs, false, out);
    }

    fn accept(&mut self, now: Now, value: Known, configs: Vec<Config>, found: bool, out: &mut Vec<Output<R::Refusal>>) {
        let next = &value.head.config.next;
        let (mut asked, mut later) = (Vec::new(), Vec::new());
        for &node in configs.iter().flat_map(Config::groups).flatten() {
            let list = if next.is_empty() || next.contains(&node) { &mut asked } else { &mut later };
            if !list.contains(&node) {
                list.push(node);
            }
        }
        self.ask_to_accept(asked, &value.value, out);
        let until = now.mono + ATTEMPT_MS;
        let (accepted, refused) = (Vec::new(), Vec::new());
        self.phase = Phase::Accepting(Accepting { until, value, configs, later, accepted, refused, found });
    }

    fn ask_to_accept(&self, nodes: Vec<NodeNo>, value: &[u8], out: &mut Vec<Output<R::Refusal>>) {
        for to in nodes {
            let message = RegisterMessage::Accept { ballot: self.ballot, value: value.to_vec() };
            out.push(Output::Send { to, message });
        }
    }

    fn on_accepted(&mut self, now: Now, from: NodeNo, ballot: Ballot, out: &mut Vec<Output<R::Refusal>>) {
        let Phase::Accepting(accepting) = &mut self.phase else { return };
        let asked = accepting.configs.iter().flat_map(Config::groups).any(|group| group.contains(&from));
        if ballot != self.ballot || !asked || accepting.accepted.contains(&from) {
            return;
        }
        accepting.accepted.push(from);
        let next = &accepting.value.head.config.next;
        let willing = next.iter().filter(|node| accepting.accepted.contains(node)).count();
        if !accepting.later.is_empty() && willing > next.len() / 2 {
            let (later, value) = (std::mem::take(&mut accepting.later), accepting.value.value.clone());
            self.ask_to_accept(later, &value, out);
        }
        if !self.is_reached() {
            return;
        }
        let Phase::Accepting(accepting) = std::mem::replace(&mut self.phase, Phase::Idle) else { return };
        let value = accepting.value.value.clone();
        self.learned(accepting.value, out);
        if accepting.found {
            self.on_newest(now, None, out);
        } else {
            self.finish(Outcome::Chosen(value), out);
        }
    }

    fn on_refused(&mut self, now: Now, from: NodeNo, ballot: Ballot, promised: Ballot) {
        self.highest = self.highest.max(promised.counter);
        let (asked, refused) = match &mut self.phase {
            Phase::Preparing(preparing) => (preparing.asked.contains(&from), &mut preparing.refused),
            Phase::Accepting(accepting) => {
                let mut groups = accepting.configs.iter().flat_map(Config::groups);
                (groups.any(|group| group.contains(&from)), &mut accepting.refused)
            }
            Phase::Idle | Phase::Resting(_) => return,
        };
        if ballot == self.ballot && asked && !refused.contains(&from) {
            refused.push(from);
            self.give_way(now);
        }
    }

    /// Whether the phase has the answers it needs.
    fn is_reached(&self) -> bool {
        match &self.phase {
            Phase::Preparing(preparing) => {
                self.quorum(&preparing.config, |node| preparing.promised.contains_key(&node))
            }
            Phase::Accepting(accepting) => {
                accepting.configs.iter().all(|config| self.quorum(config, |node| accepting.accepted.contains(&node)))
            }
            Phase::Idle | Phase::Resting(_) => false,
        }
    }

    /// Ends the attempt if so many have refused that it can't succeed.
    fn give_way(&mut self, now: Now) {
        let hopeful = match &self.phase {
            Phase::Preparing(preparing) => self.quorum(&preparing.config, |node| !preparing.refused.contains(&node)),
            Phase::Accepting(accepting) => {
                accepting.configs.iter().all(|config| self.quorum(config, |node| !accepting.refused.contains(&node)))
            }
            Phase::Idle | Phase::Resting(_) => true,
        };
        if !hopeful {
            self.rest(now);
        }
    }

    /// A pause before the next attempt: at random, so that two who hinder each other part.
    fn rest(&mut self, now: Now) {
        let attempts = self.operation.as_ref().map_or(0, |operation| operation.attempts);
        let bound = PAUSE_MAX_MS << attempts.saturating_sub(1).min(DOUBLINGS);
        // SplitMix64.
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut random = self.random;
        random = (random ^ (random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        random = (random ^ (random >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        random ^= random >> 31;
        self.phase = Phase::Resting(now.mono + PAUSE_MIN_MS + random % (bound - PAUSE_MIN_MS + 1));
    }

    fn quorum(&self, config: &Config, said: impl Fn(NodeNo) -> bool) -> bool {
        if planted!(self, MajorityOfUnion) || self.planted.has(Bug::JointUnion) {
            let mut all: Vec<NodeNo> = config.groups().flatten().copied().collect();
            all.sort_unstable();
            all.dedup();
            return is_quorum(&Config { voters: all, next: Vec::new() }, said);
        }
        is_quorum(config, said)
    }

    fn learned(&mut self, value: Known, out: &mut Vec<Output<R::Refusal>>) {
        let bytes = value.value.clone();
        if self.note_chosen(value) {
            out.push(Output::Learned(bytes));
        }
    }

    fn note_chosen(&mut self, value: Known) -> bool {
        let newer = !self.certain || self.known.as_ref().is_none_or(|known| value.head.epoch > known.head.epoch);
        if newer {
            (self.known, self.certain) = (Some(value), true);
        }
        newer
    }

    /// The time of the operation is over.
    fn give_up(&mut self, out: &mut Vec<Output<R::Refusal>>) {
        let is_open = self.operation.as_ref().is_some_and(|operation| operation.open.is_some());
        self.finish(if is_open { Outcome::Unknown } else { Outcome::Unavailable }, out);
    }

    fn finish(&mut self, outcome: Outcome<R::Refusal>, out: &mut Vec<Output<R::Refusal>>) {
        (self.operation, self.phase) = (None, Phase::Idle);
        out.push(Output::Done(outcome));
    }

    fn check(&self) {
        if cfg!(debug_assertions) {
            self.invariants();
        }
    }

    /// What always holds.
    pub fn invariants(&self) {
        assert_eq!(self.operation.is_none(), matches!(self.phase, Phase::Idle), "an operation is always in a phase");
        assert!(self.ballot.counter <= self.highest, "the next ballot is higher");
        assert!(!self.certain || self.known.is_some(), "what is certain is known");
    }
}

impl Preparing {
    /// Goes on with another configuration: whoever was not asked yet is asked.
    fn ask<R>(&mut self, config: Config, ballot: Ballot, out: &mut Vec<Output<R>>) {
        for &node in config.groups().flatten() {
            if !self.asked.contains(&node) {
                self.asked.push(node);
                out.push(Output::Send { to: node, message: RegisterMessage::Prepare { ballot } });
            }
        }
        self.config = config;
    }
}

/// Bytes as a value, if they are one that can be worked with.
fn read<R: Rules>(rules: &R, value: Vec<u8>) -> Option<Known> {
    let head = rules.head(&value)?;
    (value.len() <= MAX_VALUE && head.config.is_sound()).then_some(Known { value, head })
}
