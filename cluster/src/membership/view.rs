//! What the rest of the node sees of membership: one line per node, and events where lines change.
//!
//! The gossip library tells of changes as they happen, but a restart that is noticed before the death shows there as a mere
//! change of name. So the lines are drawn anew from its whole table each second, and compared: a greater boot is the
//! death of one life and the birth of another, whatever the table went through in between.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use foca::{Member, State as Swim};
use gridkv_engine::Millis;

use super::Output;
use super::identity::Identity;
use crate::ids::{NodeId, NodeNo};

/// How a member fares, as far as this node knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It answers.
    Alive,
    /// It does not answer somebody, and may still object.
    Suspect,
    /// It did not object in time.
    Down,
    /// It said that it leaves.
    Left,
}

impl State {
    /// Whether it counts as being there: a suspect does, until its time is over.
    pub fn is_up(self) -> bool {
        matches!(self, State::Alive | State::Suspect)
    }
}

/// One line of the view: the latest life of another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberView {
    /// The node.
    pub id: NodeId,
    /// Its latest life.
    pub boot: u64,
    /// Its number in the map, 0 before it is admitted.
    pub no: NodeNo,
    /// Where its gossip and its peer links are.
    pub peer: SocketAddr,
    /// How it fares.
    pub state: State,
    /// Since when, in `mono` of this node; between alive and suspect it goes on.
    pub since: Millis,
    bump: u16,
    /// When lives before this one were over at the latest.
    before: Option<Millis>,
}

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A life of a node is there, for the first time or again.
    Up {
        /// The node.
        id: NodeId,
        /// Which life.
        boot: u64,
        /// Its number in the map, 0 before it is admitted.
        no: NodeNo,
        /// Where its peer links are.
        peer: SocketAddr,
    },
    /// A life of a node cannot be reached, or is over.
    Down {
        /// The node.
        id: NodeId,
        /// Which life.
        boot: u64,
    },
    /// A node has left on purpose.
    Left {
        /// The node.
        id: NodeId,
        /// Which life.
        boot: u64,
    },
    /// The same life goes on under another name: it has another number or address, or was wrongly held for dead.
    Renamed {
        /// The node.
        id: NodeId,
        /// Which life.
        boot: u64,
        /// Its number in the map, 0 before it is admitted.
        no: NodeNo,
        /// Where its peer links are.
        peer: SocketAddr,
    },
    /// Whether this node has to think that it is the one cut off: more than half of the map was lost at once.
    Isolated(bool),
    /// Another process uses our id, or we did with a greater boot: this process must end, or start under `boot + 1`.
    DuplicateId {
        /// The life that others know.
        boot: u64,
    },
    /// The others hold us for dead and all names of this life are used up: this process must start anew.
    Expelled,
}

/// See the head of the file.
#[derive(Debug, Default)]
pub(super) struct View {
    lines: BTreeMap<NodeId, MemberView>,
    /// Nodes of the map, without us.
    map: BTreeSet<NodeId>,
    /// Whether we are in the map.
    in_map: bool,
    isolated: bool,
}

fn state(member: &Member<Identity>) -> State {
    match member.state() {
        Swim::Alive => State::Alive,
        Swim::Suspect => State::Suspect,
        Swim::Down if member.id().left() => State::Left,
        Swim::Down => State::Down,
    }
}

impl View {
    pub(super) fn members(&self) -> impl Iterator<Item = &MemberView> {
        self.lines.values()
    }

    pub(super) fn get(&self, id: NodeId) -> Option<&MemberView> {
        self.lines.get(&id)
    }

    pub(super) fn isolated(&self) -> bool {
        self.isolated
    }

    /// Since when a life is known to be over or out of reach.
    pub(super) fn down_since(&self, id: NodeId, boot: u64) -> Option<Millis> {
        let line = self.lines.get(&id)?;
        match boot.cmp(&line.boot) {
            std::cmp::Ordering::Less => line.before,
            std::cmp::Ordering::Equal => Some(line.since).filter(|_| !line.state.is_up()),
            std::cmp::Ordering::Greater => None,
        }
    }

    /// Sets which nodes are in the map.
    pub(super) fn map(&mut self, us: NodeId, nodes: impl Iterator<Item = NodeId>) {
        self.map = nodes.collect();
        self.in_map = self.map.remove(&us);
    }

    /// Draws all lines anew and tells what has changed.
    pub(super) fn read<'a>(
        &mut self,
        now: Millis,
        us: NodeId,
        table: impl Iterator<Item = &'a Member<Identity>>,
        out: &mut Output,
    ) {
        let mut old = std::mem::take(&mut self.lines);
        // By id, so that the order of events does not depend on that of the table.
        let table: BTreeMap<NodeId, &Member<Identity>> =
            table.filter(|member| member.id().id != us).map(|member| (member.id().id, member)).collect();
        for (id, member) in table {
            let Identity { boot, bump, no, peer, .. } = *member.id();
            let state = state(member);
            let mut line = MemberView { id, boot, no, peer, state, since: now, bump, before: None };
            match old.remove(&id) {
                Some(known) if known.boot == boot => {
                    line.before = known.before;
                    let renamed = (known.bump, known.no, known.peer) != (bump, no, peer);
                    match (known.state.is_up(), state.is_up()) {
                        (true, true) => {
                            line.since = known.since;
                            if renamed {
                                out.event(Event::Renamed { id, boot, no, peer });
                            }
                        }
                        (true, false) => over(&line, out),
                        (false, true) => out.event(Event::Up { id, boot, no, peer }),
                        (false, false) => line.since = known.since,
                    }
                }
                Some(known) => {
                    line.before = Some(if known.state.is_up() { now } else { known.since });
                    if known.state.is_up() {
                        out.event(Event::Down { id, boot: known.boot });
                    }
                    if state.is_up() {
                        out.event(Event::Up { id, boot, no, peer });
                    }
                }
                None if state.is_up() => out.event(Event::Up { id, boot, no, peer }),
                None => {}
            }
            self.lines.insert(id, line);
        }
        // Forgotten members were down for long; if not, they are now.
        for gone in old.into_values().filter(|line| line.state.is_up()) {
            out.event(Event::Down { id: gone.id, boot: gone.boot });
        }
    }

    /// Whether losses since `window` took what we see below half of the map; over when half of it is back.
    pub(super) fn guard(&mut self, now: Millis, window: Millis, out: &mut Output) {
        let mut up = usize::from(self.in_map);
        let mut lost = 0;
        for line in self.lines.values().filter(|line| self.map.contains(&line.id)) {
            up += usize::from(line.state.is_up());
            lost += usize::from(line.state == State::Down && line.since + window >= now);
        }
        let all = self.map.len() + usize::from(self.in_map);
        let below = up * 2 < all;
        let isolated = below && (self.isolated || (up + lost) * 2 >= all);
        if isolated != self.isolated {
            self.isolated = isolated;
            out.event(Event::Isolated(isolated));
        }
    }

    pub(super) fn invariants(&self, us: NodeId) {
        assert!(!self.lines.contains_key(&us), "we are not one of the others");
        assert!(
            self.lines.iter().all(|(id, line)| *id == line.id && (line.state != State::Left) | line.is_last_name())
        );
    }
}

impl MemberView {
    fn is_last_name(&self) -> bool {
        self.bump == super::identity::LEFT
    }
}

fn over(line: &MemberView, out: &mut Output) {
    let (id, boot) = (line.id, line.boot);
    out.event(if line.state == State::Left { Event::Left { id, boot } } else { Event::Down { id, boot } });
}
