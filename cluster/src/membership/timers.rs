//! The timers that the gossip library asks for: one slot for each thing that can be waited for.
//!
//! The library hands out timers freely and later ignores those that are stale. Here a newer timer takes the slot of the older one,
//! so their number is bounded by the number of members, whatever peers make the library do. Timers that fall due together, as
//! after a pause, come out by deadline and then in the order that the library wants: an indirect probe before
//! the end of its round.

use std::collections::{BTreeMap, BTreeSet};

use foca::Timer;
use gridkv_engine::Millis;

use super::identity::Identity;
use crate::ids::NodeId;

/// What is waited for, in the order in which the library wants timers of one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    Indirect,
    Probe,
    Suspect(NodeId),
    Announce,
    Gossip,
    Remove(NodeId),
    AnnounceDown,
}

fn slot(timer: &Timer<Identity>) -> Slot {
    match timer {
        Timer::SendIndirectProbe { .. } => Slot::Indirect,
        Timer::ProbeRandomMember(_) => Slot::Probe,
        Timer::ChangeSuspectToDown { member_id, .. } => Slot::Suspect(member_id.id),
        Timer::PeriodicAnnounce(_) => Slot::Announce,
        Timer::PeriodicGossip(_) => Slot::Gossip,
        Timer::RemoveDown(member) => Slot::Remove(member.id),
        Timer::PeriodicAnnounceDown(_) => Slot::AnnounceDown,
    }
}

/// See the head of the file.
#[derive(Debug, Default)]
pub(super) struct Timers {
    slots: BTreeMap<Slot, (Millis, Timer<Identity>)>,
    order: BTreeSet<(Millis, Slot)>,
}

impl Timers {
    /// Wakes at `at`, instead of whatever was waited for in its slot. A suspicion is not prolonged by being uttered again.
    pub(super) fn submit(&mut self, at: Millis, timer: Timer<Identity>) {
        let slot = slot(&timer);
        if let Some((earlier, known)) = self.slots.get(&slot) {
            if matches!(slot, Slot::Suspect(_)) && *known == timer && *earlier <= at {
                return;
            }
            self.order.remove(&(*earlier, slot));
        }
        self.order.insert((at, slot));
        self.slots.insert(slot, (at, timer));
    }

    /// When the first one is due.
    pub(super) fn next(&self) -> Option<Millis> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes the first one that is due.
    pub(super) fn due(&mut self, now: Millis) -> Option<Timer<Identity>> {
        let first = *self.order.first().filter(|(at, _)| *at <= now)?;
        self.order.remove(&first);
        self.slots.remove(&first.1).map(|(_, timer)| timer)
    }

    /// Moves all of them, as if time had stood still.
    pub(super) fn postpone(&mut self, by: Millis) {
        self.order.clear();
        for (slot, (at, _)) in &mut self.slots {
            *at += by;
            self.order.insert((*at, *slot));
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Timers::default();
    }

    pub(super) fn invariants(&self, members: usize) {
        assert!(self.slots.len() <= 5 + 2 * members, "{} timers for {members} members", self.slots.len());
        assert!(self.order.iter().all(|(at, slot)| self.slots.get(slot).is_some_and(|(known, _)| known == at)));
        assert_eq!(self.order.len(), self.slots.len());
    }
}
