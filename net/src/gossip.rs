//! The datagrams between nodes: one UDP socket, read when the ring says so, written at once.
//!
//! A node sends and receives about ten packets a second, so this is an ordinary non-blocking socket. The ring only
//! watches it ([`Ring::watch`]), which wakes a sleeping core.
//!
//! Contract: nothing here is fatal. A datagram that cannot be sent is lost like one that the network loses, and counted. A
//! turn takes a bounded number of datagrams; for the rest the ring reports again. One longer than [`MAX_DATAGRAM`] is no
//! gossip and is dropped.
//!
//! Not here: what the datagrams say (the crate `cluster`).

use std::io;
use std::net::{SocketAddr, UdpSocket};

use crate::ring::{Event, Ring, RingError, WatchId};

/// The longest datagram taken or sent.
pub const MAX_DATAGRAM: usize = 1500;
/// Datagrams that one turn takes.
const PER_TURN: usize = 64;

/// What a gossip socket has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GossipCounters {
    /// Datagrams received.
    pub received: u64,
    /// Datagrams dropped because they were too long.
    pub too_long: u64,
    /// Failed receives.
    pub receive_errors: u64,
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that were not sent.
    pub send_errors: u64,
}

/// The gossip socket of a node, on one core.
#[derive(Debug)]
pub struct Gossip {
    socket: UdpSocket,
    watch: WatchId,
    buf: Box<[u8; MAX_DATAGRAM + 1]>,
    counters: GossipCounters,
}

impl Gossip {
    /// Binds `addr` and has `ring` watch it.
    pub fn open(ring: &mut Ring, addr: SocketAddr) -> Result<Gossip, RingError> {
        let bound = || {
            let socket = UdpSocket::bind(addr)?;
            socket.set_nonblocking(true)?;
            let watched = socket.try_clone()?;
            Ok((socket, watched))
        };
        let (socket, watched) = bound().map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => RingError::AddressInUse { addr },
            _ => RingError::Listen { addr, source },
        })?;
        let watch = ring.watch(watched.into());
        Ok(Gossip { socket, watch, buf: Box::new([0; MAX_DATAGRAM + 1]), counters: GossipCounters::default() })
    }

    /// Where datagrams arrive, port 0 resolved.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Whether [`Gossip::receive`] is due.
    pub fn owns(&self, event: &Event<'_>) -> bool {
        matches!(event, Event::Readable { watch } if *watch == self.watch)
    }

    /// Gives what has arrived, or the first part of it, to `on`.
    pub fn receive(&mut self, mut on: impl FnMut(SocketAddr, &[u8])) {
        for _ in 0..PER_TURN {
            match self.socket.recv_from(&mut self.buf[..]) {
                Ok((len, _)) if len > MAX_DATAGRAM => self.counters.too_long += 1,
                Ok((len, from)) => {
                    self.counters.received += 1;
                    on(from, &self.buf[..len]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.counters.receive_errors += 1,
            }
        }
    }

    /// Sends one datagram, or counts that it could not.
    pub fn send(&mut self, to: SocketAddr, bytes: &[u8]) {
        if bytes.len() <= MAX_DATAGRAM && self.socket.send_to(bytes, to).is_ok_and(|sent| sent == bytes.len()) {
            self.counters.sent += 1;
        } else {
            self.counters.send_errors += 1;
        }
    }

    /// What the socket has done so far.
    pub fn counters(&self) -> GossipCounters {
        self.counters
    }

    /// Stops watching. The socket closes with this.
    pub fn close(self, ring: &mut Ring) {
        ring.unwatch(self.watch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::RingConfig;
    use std::time::{Duration, Instant};

    #[test]
    fn datagrams_arrive_through_the_ring_and_oversized_ones_do_not() {
        let mut ring = Ring::new(RingConfig { entries: 64, buffers: 16, ..RingConfig::default() }).unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let mut here = Gossip::open(&mut ring, any).unwrap();
        let mut there = Gossip::open(&mut ring, any).unwrap();
        let (to, from) = (here.local_addr().unwrap(), there.local_addr().unwrap());
        let stranger = UdpSocket::bind(any).unwrap();
        stranger.send_to(&[0; MAX_DATAGRAM + 100], to).unwrap();
        let most = PER_TURN + 10;
        for n in 0..most {
            there.send(to, &[n as u8; 100]);
        }
        there.send(to, &[7; MAX_DATAGRAM]);
        // Neither is fatal.
        there.send(to, &[0; MAX_DATAGRAM + 1]);
        there.send("[::1]:1".parse().unwrap(), b"an address of the other family");
        assert_eq!((there.counters().sent, there.counters().send_errors), (most as u64 + 1, 2));

        let (mut got, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
        while got.len() <= most {
            assert!(Instant::now() < deadline, "{:?}", here.counters());
            ring.wait(Some(Duration::from_millis(5))).unwrap();
            ring.turn(&mut |_, event| {
                if here.owns(&event) {
                    here.receive(|sender, bytes| got.push((sender, bytes.to_vec())));
                }
            })
            .unwrap();
        }
        assert!(got.iter().all(|(sender, _)| *sender == from));
        assert!((0..most).all(|n| got[n].1 == [n as u8; 100]) && got[most].1.len() == MAX_DATAGRAM);
        assert_eq!((here.counters().received, here.counters().too_long), (most as u64 + 1, 1));
        here.close(&mut ring);
        there.close(&mut ring);
    }
}
