//! The voter: what it has promised and what it has accepted.
//!
//! It never proposes and never learns what is chosen. Its two answers are kept for ever: after a promise it accepts
//! nothing below that ballot, and the value it accepted last is shown to every later proposer. Both must hold through
//! a restart, so an [`Answer`] that says `persist` may leave only after [`Acceptor::encode_state`] is on disk. If writing
//! fails the voter must fall silent: what it has in memory is then ahead of what it will remember.
//!
//! Invariant: nothing was accepted above the promise.

#[cfg(test)]
use super::Plant;
use super::{Ballot, MAX_VALUE, RegisterMessage, slots};

/// What a voter must not forget.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The highest ballot promised.
    pub promised: Ballot,
    /// The value accepted last, with its ballot.
    pub accepted: Option<(Ballot, Vec<u8>)>,
}

/// What a voter answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Answer {
    /// To whoever asked.
    pub reply: RegisterMessage,
    /// The state has changed: it must be on disk before the reply leaves.
    pub persist: bool,
}

/// One voter.
#[derive(Debug, Default)]
pub struct Acceptor {
    state: State,
    #[cfg(test)]
    pub(super) plant: Option<Plant>,
}

impl Acceptor {
    /// A voter with what it remembers; the default state if it has never voted.
    pub fn new(state: State) -> Acceptor {
        Acceptor {
            state,
            #[cfg(test)]
            plant: None,
        }
    }

    /// What it has promised and accepted.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What has to be on disk, as bytes for [`slots::encode_slot`]'s payload.
    pub fn encode_state(&self) -> Vec<u8> {
        slots::encode_state(&self.state)
    }

    /// Answers a message of a proposer; nothing for other messages.
    pub fn on_message(&mut self, message: RegisterMessage) -> Option<Answer> {
        match message {
            RegisterMessage::Prepare { ballot } => Some(self.on_prepare(ballot)),
            RegisterMessage::Accept { ballot, value } => Some(self.on_accept(ballot, value)),
            _ => None,
        }
    }

    /// Promises a ballot that is not below an earlier promise. Asked again it says so again.
    pub fn on_prepare(&mut self, ballot: Ballot) -> Answer {
        if ballot < self.state.promised {
            return self.refuse(ballot);
        }
        let persist = ballot > self.state.promised;
        self.state.promised = ballot;
        Answer { reply: RegisterMessage::Promise { ballot, accepted: self.state.accepted.clone() }, persist }
    }

    /// Accepts a value whose ballot is not below the promise.
    pub fn on_accept(&mut self, ballot: Ballot, value: Vec<u8>) -> Answer {
        let careless = planted!(self, AcceptsBelowPromise);
        if (ballot < self.state.promised && !careless) || value.len() > MAX_VALUE {
            return self.refuse(ballot);
        }
        let known = match &self.state.accepted {
            // A ballot carries one value. Should two ever have one ballot, the second value is not taken for the first.
            Some((accepted, held)) if *accepted == ballot && *held != value => return self.refuse(ballot),
            Some((accepted, _)) => *accepted == ballot,
            None => false,
        };
        if !known {
            self.state.promised = self.state.promised.max(ballot);
            self.state.accepted = Some((ballot, value));
        }
        self.invariants();
        Answer { reply: RegisterMessage::Accepted { ballot }, persist: !known }
    }

    fn refuse(&self, ballot: Ballot) -> Answer {
        let reply = RegisterMessage::Refused { ballot, promised: self.state.promised };
        Answer { reply, persist: false }
    }

    /// What always holds.
    pub fn invariants(&self) {
        if let Some((ballot, value)) = &self.state.accepted {
            assert!(*ballot <= self.state.promised, "nothing is accepted above the promise");
            assert!(value.len() <= MAX_VALUE, "a value is bounded");
        }
    }
}
