//! One connection as the ring sees it: a place in a table, and the operations that the kernel holds for it.
//!
//! ```text
//!              accept ─┐                        ┌── close, finish, error
//!   Free ──────────────┼──▶ Open ───────────────┴──▶ Closing ──▶ Free, next generation
//!        └─ connect ─▶ Connecting ──▶ Open            │
//!                                                     └ left when recv, send and connect are all back: only then is
//!                                                       the descriptor closed and the send buffer freed
//!
//!   receive:   Idle ──arm──▶ Armed ──pause──▶ Cancelling
//!               ▲              │                  │
//!               └──────────────┴──────────────────┘   a completion without "more" ends it
//! ```
//!
//! A detached connection ends the same way, but its descriptor goes to the owner instead of being closed.
//!
//! Contract: an id names one life of one place. After the place is freed its generation moves on, so ids and late
//! completions of an earlier life match nothing. A place is never freed while the kernel holds an operation for it.
//!
//! Pure: what is to be asked of the kernel is decided in `super`, which alone talks to it.

use std::fmt;
use std::os::fd::OwnedFd;

use socket2::SockAddr;

/// Places that an id can name.
pub(super) const MAX_PLACES: u32 = 1 << 24;

/// One life of one connection. Copyable; an id whose connection is gone is harmless everywhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(u64);

impl ConnId {
    pub(super) fn new(index: u32, generation: u32) -> ConnId {
        debug_assert!(index < MAX_PLACES);
        ConnId(u64::from(generation) << 24 | u64::from(index))
    }

    /// A small number that no other live connection of the ring has: an index for the owner's own table. It is used
    /// again after [`super::Event::Closed`].
    #[inline]
    pub fn index(self) -> usize {
        (self.0 & u64::from(MAX_PLACES - 1)) as usize
    }

    pub(super) fn generation(self) -> u32 {
        (self.0 >> 24) as u32
    }

    /// The id as a number below 2^56, unique over the life of the ring (until 2^32 lives of one place).
    #[inline]
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// The inverse of [`ConnId::to_bits`]. A number that never was an id names nothing.
    #[inline]
    pub fn from_bits(bits: u64) -> ConnId {
        ConnId(bits & ((1 << 56) - 1))
    }
}

impl fmt::Debug for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conn {}.{}", self.index(), self.generation())
    }
}

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Free,
    Connecting,
    Open,
    Closing,
}

/// Whose bound a connection counts against, so that neither kind can take the places of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Client,
    Peer,
}

/// The multishot receive of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recv {
    /// The kernel holds none.
    Idle,
    /// The kernel holds one.
    Armed,
    /// The kernel holds one and was asked to end it.
    Cancelling,
}

/// A place of the table.
pub(super) struct Conn {
    pub(super) generation: u32,
    pub(super) phase: Phase,
    pub(super) class: Class,
    pub(super) recv: Recv,
    /// The owner wants data.
    pub(super) reading: bool,
    /// The peer has ended its side: nothing more will be received.
    pub(super) eof: bool,
    /// The kernel holds a send of `buf[sent..]`.
    pub(super) sending: bool,
    /// Close when the send under way is done.
    pub(super) finishing: bool,
    /// Why the connection is being closed, 0 for no error.
    pub(super) errno: i32,
    pub(super) fd: Option<OwnedFd>,
    /// The owner wants the descriptor once the kernel holds nothing of this place.
    pub(super) detaching: bool,
    /// The descriptor on its way to the owner.
    pub(super) detached: Option<OwnedFd>,
    /// Bytes that the kernel reads while `sending`: neither moved nor freed until the send is back.
    pub(super) buf: Vec<u8>,
    pub(super) sent: usize,
    /// The address that the kernel may read while connecting.
    pub(super) target: Option<Box<SockAddr>>,
}

impl Conn {
    fn vacant() -> Conn {
        Conn {
            generation: 1,
            phase: Phase::Free,
            class: Class::Client,
            recv: Recv::Idle,
            reading: false,
            eof: false,
            sending: false,
            finishing: false,
            errno: 0,
            fd: None,
            detaching: false,
            detached: None,
            buf: Vec::new(),
            sent: 0,
            target: None,
        }
    }

    /// The kernel holds an operation that refers to this place.
    pub(super) fn busy(&self) -> bool {
        self.recv != Recv::Idle || self.sending || self.target.is_some()
    }

    /// A receive is to be armed.
    pub(super) fn wants_recv(&self) -> bool {
        self.phase == Phase::Open && self.recv == Recv::Idle && self.reading && !self.eof && !self.detaching
    }

    /// A send may begin.
    pub(super) fn may_send(&self) -> bool {
        self.phase == Phase::Open && !self.sending && !self.finishing && !self.detaching
    }

    pub(super) fn invariants(&self) {
        if self.phase == Phase::Free {
            assert!(!self.busy() && self.fd.is_none() && self.buf.is_empty(), "a free place holds nothing");
        }
        assert!(!self.sending || self.sent < self.buf.len(), "a send under way has bytes left");
        assert!(self.target.is_some() || self.phase != Phase::Connecting, "connecting is an operation under way");
        assert!(!self.finishing || self.sending || self.phase == Phase::Closing, "finishing waits for a send");
    }
}

/// The table of connections.
pub(super) struct Places {
    places: Vec<Conn>,
    free: Vec<u32>,
    /// Places in use by [`Class::Peer`].
    peers: usize,
}

impl Places {
    pub(super) fn new() -> Places {
        Places { places: Vec::new(), free: Vec::new(), peers: 0 }
    }

    /// Places in use.
    pub(super) fn live(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Places in use by one class.
    pub(super) fn live_of(&self, class: Class) -> usize {
        match class {
            Class::Client => self.live() - self.peers,
            Class::Peer => self.peers,
        }
    }

    /// Takes a place for a new life. The caller bounds their number.
    pub(super) fn take(&mut self, fd: OwnedFd, phase: Phase, class: Class) -> ConnId {
        let index = self.free.pop().unwrap_or_else(|| {
            let index = self.places.len() as u32;
            assert!(index < MAX_PLACES, "the ring bounds its connections below what an id can name");
            self.places.push(Conn::vacant());
            index
        });
        let conn = &mut self.places[index as usize];
        conn.fd = Some(fd);
        conn.phase = phase;
        conn.class = class;
        self.peers += usize::from(class == Class::Peer);
        conn.reading = true;
        ConnId::new(index, conn.generation)
    }

    /// The place that `id` names, while that life lasts (closing included).
    #[inline]
    pub(super) fn get(&self, id: ConnId) -> Option<&Conn> {
        self.places.get(id.index()).filter(|conn| conn.generation == id.generation() && conn.phase != Phase::Free)
    }

    /// See [`Places::get`].
    #[inline]
    pub(super) fn get_mut(&mut self, id: ConnId) -> Option<&mut Conn> {
        self.places.get_mut(id.index()).filter(|conn| conn.generation == id.generation() && conn.phase != Phase::Free)
    }

    /// Ends the life that `id` names. The kernel must hold nothing of it.
    pub(super) fn release(&mut self, id: ConnId) {
        let conn = self.get_mut(id).expect("only a live place is released");
        assert!(!conn.busy(), "a place is released when the kernel is done with it");
        let (generation, class) = (conn.generation.wrapping_add(1), conn.class);
        *conn = Conn { generation, ..Conn::vacant() };
        self.peers -= usize::from(class == Class::Peer);
        self.free.push(id.index() as u32);
    }

    /// Forgets the memory that the kernel may still use.
    pub(super) fn leak(&mut self) {
        for conn in &mut self.places {
            std::mem::forget(std::mem::take(&mut conn.buf));
            std::mem::forget(conn.target.take());
        }
    }

    /// The ids of all lives.
    pub(super) fn ids(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.places
            .iter()
            .enumerate()
            .filter(|(_, conn)| conn.phase != Phase::Free)
            .map(|(index, conn)| ConnId::new(index as u32, conn.generation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn fd() -> OwnedFd {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn an_id_of_an_earlier_life_names_nothing() {
        let mut places = Places::new();
        let first = places.take(fd(), Phase::Open, Class::Client);
        assert_eq!(places.live(), 1);
        places.release(first);
        let second = places.take(fd(), Phase::Open, Class::Client);
        assert_eq!(first.index(), second.index());
        assert!(places.get(first).is_none() && places.get(second).is_some());
        assert_eq!(ConnId::from_bits(second.to_bits()), second);
        assert_eq!(places.ids().collect::<Vec<_>>(), [second]);
    }

    #[test]
    fn classes_are_counted_apart() {
        let mut places = Places::new();
        let peer = places.take(fd(), Phase::Open, Class::Peer);
        places.take(fd(), Phase::Open, Class::Client);
        assert_eq!((places.live_of(Class::Peer), places.live_of(Class::Client)), (1, 1));
        places.release(peer);
        places.take(fd(), Phase::Open, Class::Client);
        assert_eq!((places.live_of(Class::Peer), places.live_of(Class::Client)), (0, 2));
    }

    #[test]
    #[should_panic(expected = "when the kernel is done with it")]
    fn a_place_with_an_operation_under_way_is_not_released() {
        let mut places = Places::new();
        let id = places.take(fd(), Phase::Open, Class::Client);
        places.get_mut(id).unwrap().recv = Recv::Armed;
        places.release(id);
    }
}
