//! The ring over the loopback interface, against plain blocking sockets of the standard library.
//!
//! Every test drives the ring through [`World`], which checks the order of events that the contract promises, and waits
//! for conditions with one generous deadline.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);
/// Output beyond which a connection of the echo stops reading.
const HIGH_WATER: usize = 64 << 10;

#[derive(Default)]
struct Peer {
    out: Vec<u8>,
    paused: bool,
    eof: bool,
    over_limit: bool,
    received: usize,
}

/// An echo with back-pressure, and a witness to the order of events.
struct World {
    ring: Ring,
    peers: BTreeMap<ConnId, Peer>,
    /// Connections that were closed, with their errors.
    closed: Vec<(ConnId, Option<io::Error>)>,
    opened: usize,
    most_queued: usize,
    /// False: data is only counted.
    echo: bool,
}

impl World {
    fn new(config: RingConfig) -> (World, SocketAddr) {
        let mut ring = Ring::new(config).unwrap();
        let (_, addr) = ring.listen("127.0.0.1:0".parse().unwrap(), 1024).unwrap();
        (World::over(ring), addr)
    }

    fn over(ring: Ring) -> World {
        World { ring, peers: BTreeMap::new(), closed: Vec::new(), opened: 0, most_queued: 0, echo: true }
    }

    fn turn(&mut self) {
        let World { ring, peers, closed, opened, most_queued, echo } = self;
        ring.turn(&mut |port, event| match event {
            Event::Accepted { conn, over_limit, .. } => {
                *opened += 1;
                assert!(peers.insert(conn, Peer { over_limit, ..Peer::default() }).is_none(), "accepted once");
                if over_limit {
                    port.send(conn, b"full".to_vec()).unwrap();
                    port.finish(conn);
                }
            }
            Event::Connected { conn } => {
                assert!(peers.contains_key(&conn), "connect gave the id out");
            }
            Event::Data { conn, bytes } => {
                let peer = peers.get_mut(&conn).expect("no data before the connection or after its end");
                assert!(!bytes.is_empty() && !peer.eof && !peer.over_limit);
                peer.received += bytes.len();
                if *echo {
                    peer.out.extend_from_slice(bytes);
                    *most_queued = peer.out.len().max(*most_queued);
                    if peer.out.len() >= HIGH_WATER && !peer.paused {
                        peer.paused = true;
                        port.pause_reads(conn);
                    }
                    pump(port, conn, peer, Vec::new());
                }
            }
            Event::Sent { conn, buf } => {
                assert!(buf.is_empty() && buf.capacity() > 0, "the buffer comes back empty and reusable");
                let peer = peers.get_mut(&conn).expect("no send before the connection or after its end");
                pump(port, conn, peer, buf);
            }
            Event::Eof { conn } => {
                let peer = peers.get_mut(&conn).expect("no end before the connection or after its end");
                assert!(!peer.eof, "the peer ends its side once");
                peer.eof = true;
                pump(port, conn, peer, Vec::new());
            }
            Event::Closed { conn, error } => {
                peers.remove(&conn).expect("closed once, and only what was open");
                closed.push((conn, error));
            }
            Event::Detached { .. } | Event::Readable { .. } => unreachable!("nothing was detached or watched"),
        })
        .unwrap();
    }

    fn connect(&mut self, addr: SocketAddr) -> ConnId {
        let conn = self.ring.connect(addr).unwrap();
        self.opened += 1;
        assert!(self.peers.insert(conn, Peer::default()).is_none());
        conn
    }

    fn until(&mut self, mut done: impl FnMut(&World) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.turn();
            if done(self) {
                return;
            }
            assert!(Instant::now() < deadline, "waited too long: {:?}, {} peers", self.ring, self.peers.len());
            self.ring.wait(Some(Duration::from_millis(5))).unwrap();
        }
    }

    fn join<T>(&mut self, thread: JoinHandle<T>) -> T {
        self.until(|_| thread.is_finished());
        thread.join().unwrap()
    }
}

fn pump(port: &mut RingPort<'_>, conn: ConnId, peer: &mut Peer, spare: Vec<u8>) {
    if port.is_sending(conn) {
        return;
    }
    if !peer.out.is_empty() {
        port.send(conn, std::mem::replace(&mut peer.out, spare)).unwrap();
        if std::mem::take(&mut peer.paused) {
            port.resume_reads(conn);
        }
    } else if peer.eof {
        port.close(conn);
    }
}

fn small() -> RingConfig {
    RingConfig { entries: 64, buffers: 16, buffer_len: 4096, max_connections: 1000 }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }
}

fn client(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Writes from a second thread, so that neither side waits for the other to read.
fn round_trip(stream: &TcpStream, bytes: &[u8]) -> Vec<u8> {
    let mut back = vec![0; bytes.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| (&*stream).write_all(bytes).unwrap());
        (&*stream).read_exact(&mut back).unwrap();
    });
    back
}

#[test]
fn what_is_sent_comes_back_at_any_size() {
    let (mut world, addr) = World::new(small());
    let clients = (0..4).map(|seed| {
        std::thread::spawn(move || {
            let mut random = Random(seed + 1);
            let stream = client(addr);
            for _ in 0..30 {
                let below = [10, 5000, 300_000][random.below(3) as usize];
                let len = 1 + random.below(below) as usize;
                let bytes = random.bytes(len);
                assert!(round_trip(&stream, &bytes) == bytes, "echo differs");
            }
        })
    });
    for thread in clients.collect::<Vec<_>>() {
        world.join(thread);
    }
    world.until(|world| world.closed.len() == 4);
    assert!(world.closed.iter().all(|(_, error)| error.is_none()));
}

#[test]
fn a_client_that_ends_its_side_after_pipelining_gets_all_its_replies() {
    let (mut world, addr) = World::new(small());
    let thread = std::thread::spawn(move || {
        let bytes = Random(7).bytes(3 << 20);
        let mut stream = client(addr);
        let mut back = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (&stream).write_all(&bytes).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            (&stream).read_to_end(&mut back).unwrap();
        });
        assert!(back == bytes, "{} of {} bytes came back", back.len(), bytes.len());
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    });
    world.join(thread);
    world.until(|world| world.closed.len() == 1);
}

#[test]
fn a_peer_that_resets_is_closed_once_with_its_error() {
    let (mut world, addr) = World::new(small());
    let thread = std::thread::spawn(move || {
        let mut stream = client(addr);
        // Unread replies and no linger: closing resets.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        stream.write_all(&[1; 100_000]).unwrap();
        stream.read_exact(&mut [0]).unwrap();
    });
    world.join(thread);
    world.until(|world| world.closed.len() == 1);
    let error = world.closed[0].1.as_ref().expect("a reset is an error");
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    assert_eq!(world.ring.connections(), 0);
}

#[test]
fn a_peer_that_resets_before_it_is_accepted_is_never_seen() {
    let (mut world, addr) = World::new(small());
    let stream = client(addr);
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    world.until(|world| world.ring.counters().dropped == 1);
    assert_eq!((world.opened, world.ring.connections()), (0, 0));
}

#[test]
fn a_client_that_never_reads_costs_bounded_memory_and_loses_nothing() {
    let (mut world, addr) = World::new(small());
    let total: usize = 40 << 20;
    let stream = client(addr);
    let mut writer = stream.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        let block: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
        for _ in 0..total / block.len() {
            writer.write_all(&block).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    // The echo stops reading once a send makes no headway: nothing moves any more, and not all was received.
    let mut last = (0, Instant::now());
    world.until(|world| {
        let received = world.peers.values().map(|peer| peer.received).sum();
        if received != last.0 {
            last = (received, Instant::now());
        }
        received > 0 && last.1.elapsed() > Duration::from_millis(300)
    });
    assert!(last.0 < total && !thread.is_finished());
    let arrivals_after_pause = 16 * 4096;
    assert!(world.most_queued <= HIGH_WATER + arrivals_after_pause, "{}", world.most_queued);

    let reader = std::thread::spawn(move || {
        let mut stream = stream;
        let (mut seen, mut buf) = (0usize, vec![0; 1 << 16]);
        loop {
            let n = stream.read(&mut buf).unwrap();
            if n == 0 {
                return seen;
            }
            assert!(buf[..n].iter().enumerate().all(|(i, &b)| b == ((seen + i) % (1 << 20) % 251) as u8));
            seen += n;
        }
    });
    assert_eq!(world.join(reader), total);
    world.join(thread);
    world.until(|world| world.closed.len() == 1);
}

#[test]
fn a_paused_connection_gets_nothing_until_resumed() {
    let (mut world, addr) = World::new(small());
    world.echo = false;
    let mut stream = client(addr);
    world.until(|world| world.peers.len() == 1);
    let conn = *world.peers.keys().next().unwrap();
    world.ring.pause_reads(conn);
    world.ring.pause_reads(conn);
    world.until(|world| !world.ring.has_work());
    stream.write_all(b"later").unwrap();
    // Traffic of another connection shows that time has passed for this one, too.
    let other = client(addr);
    let thread = std::thread::spawn(move || (&other).write_all(b"now").unwrap());
    world.join(thread);
    world.until(|world| world.peers.values().any(|peer| peer.received == 3) || world.closed.len() == 1);
    assert_eq!(world.peers[&conn].received, 0);
    world.ring.resume_reads(conn);
    world.ring.pause_reads(conn);
    world.ring.resume_reads(conn);
    world.until(|world| world.peers[&conn].received == 5);
}

#[test]
fn an_id_of_an_ended_connection_touches_nothing() {
    let (mut world, addr) = World::new(small());
    drop(client(addr));
    world.until(|world| world.closed.len() == 1);
    let stale = world.closed[0].0;
    let stream = client(addr);
    world.until(|world| world.peers.len() == 1);
    let fresh = *world.peers.keys().next().unwrap();
    assert_eq!(stale.index(), fresh.index(), "the place is used again");
    assert_eq!(world.ring.send(stale, b"x".to_vec()), Err(b"x".to_vec()));
    assert!(!world.ring.is_sending(stale));
    world.ring.pause_reads(stale);
    world.ring.finish(stale);
    world.ring.close(stale);
    world.ring.close(ConnId::from_bits(u64::MAX));
    let thread = std::thread::spawn(move || assert_eq!(round_trip(&stream, b"hello"), b"hello"));
    world.join(thread);
}

#[test]
fn connections_come_and_go_by_the_thousand() {
    let (mut world, addr) = World::new(small());
    let clients = (0..4).map(|_| {
        std::thread::spawn(move || {
            for round in 0..300u32 {
                let mut stream = client(addr);
                match round % 3 {
                    0 => {}
                    1 => stream.write_all(b"bye").unwrap(),
                    _ => assert_eq!(round_trip(&stream, b"ping"), b"ping"),
                }
            }
        })
    });
    for thread in clients.collect::<Vec<_>>() {
        world.join(thread);
    }
    world.until(|world| world.ring.connections() == 0 && world.closed.len() == 1200);
    assert!(world.peers.is_empty());
    assert_eq!((world.opened, world.ring.counters().accepted), (1200, 1200));
}

#[test]
fn two_small_buffers_serve_twenty_connections() {
    let (mut world, addr) = World::new(RingConfig { buffers: 2, buffer_len: 512, ..small() });
    let clients = (0..20u64).map(|seed| {
        std::thread::spawn(move || {
            let bytes = Random(seed + 1).bytes(50_000);
            assert!(round_trip(&client(addr), &bytes) == bytes);
        })
    });
    for thread in clients.collect::<Vec<_>>() {
        world.join(thread);
    }
    assert!(world.ring.counters().no_buffers > 0);
}

#[test]
fn a_tiny_submission_queue_only_costs_system_calls() {
    let (mut world, addr) = World::new(RingConfig { entries: 1, ..small() });
    let clients = (0..30u64).map(|seed| {
        std::thread::spawn(move || {
            let bytes = Random(seed + 1).bytes(20_000);
            assert!(round_trip(&client(addr), &bytes) == bytes);
        })
    });
    for thread in clients.collect::<Vec<_>>() {
        world.join(thread);
    }
    world.until(|world| world.closed.len() == 30);
}

#[test]
fn beyond_the_limit_a_client_is_told_and_a_freed_place_serves_again() {
    let (mut world, addr) = World::new(RingConfig { max_connections: 2, ..small() });
    let first = client(addr);
    let second = client(addr);
    world.until(|world| world.peers.len() == 2);
    let thread = std::thread::spawn(move || {
        let mut text = String::new();
        client(addr).read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(world.join(thread), "full");
    world.until(|world| world.closed.len() == 1);
    assert!(matches!(world.ring.connect(addr), Err(RingError::TooManyConnections { limit: 2 })));
    drop(first);
    world.until(|world| world.closed.len() == 2);
    let third = client(addr);
    let thread = std::thread::spawn(move || (round_trip(&second, b"2"), round_trip(&third, b"3")));
    assert_eq!(world.join(thread), (b"2".to_vec(), b"3".to_vec()));
}

#[test]
fn one_ring_talks_to_itself_both_ways() {
    for addr in ["127.0.0.1:0", "[::1]:0"] {
        let mut ring = Ring::new(small()).unwrap();
        let Ok((_, addr)) = ring.listen(addr.parse().unwrap(), 16) else {
            assert_eq!(addr, "[::1]:0", "a machine may lack IPv6");
            continue;
        };
        let mut world = World::over(ring);
        world.echo = false;
        let conn = world.connect(addr);
        assert_eq!(world.ring.send(conn, b"early".to_vec()), Err(b"early".to_vec()), "not yet connected");
        world.until(|world| world.peers.len() == 2 && !world.ring.has_work());
        world.ring.send(conn, b"hello".to_vec()).unwrap();
        assert_eq!(world.ring.send(conn, b"again".to_vec()), Err(b"again".to_vec()), "one at a time");
        world.until(|world| world.peers.values().any(|peer| peer.received == 5));
        world.ring.close(conn);
        world.until(|world| world.closed.len() == 2);
    }
}

#[test]
fn a_refused_connection_says_so() {
    let mut ring = Ring::new(small()).unwrap();
    let (listener, addr) = ring.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
    let mut world = World::over(ring);
    let open = client(addr);
    world.until(|world| world.peers.len() == 1);
    world.ring.unlisten(listener);
    world.ring.unlisten(listener);
    world.until(|world| !world.ring.has_work());
    let conn = world.connect(addr);
    world.until(|world| world.closed.len() == 1);
    let (closed, error) = &world.closed[0];
    assert_eq!(*closed, conn);
    assert_eq!(error.as_ref().unwrap().kind(), ErrorKind::ConnectionRefused);
    // Who was connected before stays.
    let thread = std::thread::spawn(move || round_trip(&open, b"still here"));
    assert_eq!(world.join(thread), b"still here");
}

#[test]
fn finishing_sends_the_rest_and_closing_abandons_it() {
    let (mut world, addr) = World::new(small());
    world.echo = false;
    let reader = client(addr);
    world.until(|world| world.peers.len() == 1);
    let first = *world.peers.keys().next().unwrap();
    let deaf = client(addr);
    world.until(|world| world.peers.len() == 2);
    let second = *world.peers.keys().find(|conn| **conn != first).unwrap();
    for conn in [first, second] {
        world.ring.send(conn, vec![b'z'; 20 << 20]).unwrap();
    }
    world.ring.finish(first);
    world.ring.finish(second);
    assert_eq!(world.ring.send(first, b"more".to_vec()), Err(b"more".to_vec()), "nothing follows a finish");
    let thread = std::thread::spawn(move || {
        let mut all = Vec::new();
        (&reader).read_to_end(&mut all).unwrap();
        all.len()
    });
    assert_eq!(world.join(thread), 20 << 20);
    world.until(|world| world.closed.len() == 1);
    assert!(world.ring.is_sending(second), "who does not read keeps its connection until it is closed");
    world.ring.close(second);
    world.until(|world| world.closed.len() == 2);
    assert!(world.closed.iter().all(|(_, error)| error.is_none()));
    drop(deaf);
}

#[test]
fn a_sleeper_is_woken_and_an_awake_one_left_alone() {
    let (mut world, addr) = World::new(small());
    world.until(|world| !world.ring.has_work());
    let readable = |world: &World, millis: i64| {
        let timeout = Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 };
        poll(&mut [PollFd::new(&world.ring.wake_fd(), PollFlags::IN)], Some(&timeout)).unwrap() == 1
    };
    let deadline = Instant::now() + DEADLINE;
    let mut stream = client(addr);
    while !world.ring.has_work() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(!readable(&world, 0), "wake-ups are off, and shared memory tells");
    world.until(|world| world.peers.len() == 1 && !world.ring.has_work());

    world.ring.set_wakeups(true);
    assert!(!world.ring.has_work() && !readable(&world, 0));
    stream.write_all(b"wake up").unwrap();
    assert!(readable(&world, 20_000), "the eventfd is written");
    assert!(world.ring.has_work());
    world.ring.set_wakeups(false);
    world.until(|world| world.peers.values().all(|peer| peer.received == 7));
}

#[test]
fn an_idle_turn_makes_no_system_call() {
    let (mut world, addr) = World::new(small());
    let _stream = client(addr);
    world.until(|world| world.peers.len() == 1 && !world.ring.has_work());
    let before = world.ring.counters();
    for _ in 0..1000 {
        world.turn();
    }
    assert_eq!(world.ring.counters(), before);
}

#[test]
fn a_panicking_handler_leaves_the_ring_whole() {
    let (mut world, addr) = World::new(RingConfig { buffers: 2, ..small() });
    world.echo = false;
    let mut stream = client(addr);
    world.until(|world| world.peers.len() == 1);
    // More panics than there are buffers: each must have gone back.
    for _ in 0..5 {
        stream.write_all(b"boom").unwrap();
        let deadline = Instant::now() + DEADLINE;
        let mut boomed = false;
        while !boomed {
            assert!(Instant::now() < deadline);
            world.ring.wait(Some(Duration::from_millis(5))).unwrap();
            boomed = catch_unwind(AssertUnwindSafe(|| {
                world.ring.turn(&mut |_, _| std::panic::resume_unwind(Box::new("boom"))).unwrap();
            }))
            .is_err();
        }
    }
    world.echo = true;
    let thread = std::thread::spawn(move || round_trip(&stream, b"fine"));
    assert_eq!(world.join(thread), b"fine");
}

#[test]
fn a_dropped_ring_ends_what_is_under_way() {
    let (mut world, addr) = World::new(small());
    world.echo = false;
    let streams: Vec<_> = (0..20).map(|_| client(addr)).collect();
    world.until(|world| world.peers.len() == 20);
    for (at, conn) in world.peers.keys().copied().collect::<Vec<_>>().into_iter().enumerate() {
        if at % 2 == 0 {
            world.ring.send(conn, vec![1; 8 << 20]).unwrap();
        }
    }
    // Unroutable for most; connecting or refused, both must end.
    if let Ok(conn) = world.ring.connect("192.0.2.1:9".parse().unwrap()) {
        world.peers.insert(conn, Peer::default());
    }
    world.turn();
    assert!(world.ring.drain(), "the kernel lets go of everything");
    drop(world);
    for mut stream in streams {
        // What was on its way arrives, then the end, orderly or not.
        let mut buf = vec![0; 1 << 16];
        while stream.read(&mut buf).is_ok_and(|n| n > 0) {}
    }
    assert!(TcpStream::connect(addr).is_err(), "nobody listens any more");
}

#[test]
fn whatever_the_owner_does_each_connection_is_closed_once() {
    let (mut world, addr) = World::new(RingConfig { entries: 8, buffers: 4, buffer_len: 256, max_connections: 100 });
    let clients: Vec<_> = (0..8u64)
        .map(|seed| {
            std::thread::spawn(move || {
                let mut random = Random(seed * 77 + 1);
                for _ in 0..40 {
                    let Ok(mut stream) = TcpStream::connect(addr) else { continue };
                    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
                    // The owner may hang up at any moment, so every error is fine here.
                    let len = random.below(20_000) as usize;
                    let _ = stream.write_all(&random.bytes(len));
                    if random.below(2) == 0 {
                        let _ = stream.shutdown(Shutdown::Write);
                    }
                    let _ = stream.read(&mut [0; 4096]);
                    if random.below(4) == 0 {
                        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                    }
                }
            })
        })
        .collect();
    let mut random = Random(42);
    while !clients.iter().all(JoinHandle::is_finished) {
        world.turn();
        let conns: Vec<_> = world.peers.keys().copied().collect();
        for conn in conns {
            match random.below(60) {
                0 => world.ring.close(conn),
                1 => world.ring.finish(conn),
                2..10 => world.ring.pause_reads(conn),
                10..30 => world.ring.resume_reads(conn),
                30..33 => drop(world.ring.send(conn, vec![3; 100_000])),
                _ => {}
            }
        }
        world.ring.wait(Some(Duration::from_millis(1))).unwrap();
    }
    for conn in world.peers.keys().copied().collect::<Vec<_>>() {
        world.ring.close(conn);
    }
    world.until(|world| world.ring.connections() == 0 && !world.ring.has_work());
    assert_eq!(world.closed.len(), world.opened);
    assert!(world.peers.is_empty());
}

#[test]
fn nonsense_is_refused_before_the_kernel_sees_it() {
    for config in [
        RingConfig { entries: 0, ..small() },
        RingConfig { buffers: 3, ..small() },
        RingConfig { buffer_len: 0, ..small() },
        RingConfig { max_connections: 0, ..small() },
        RingConfig { buffers: 1 << 15, buffer_len: 1 << 20, ..small() },
    ] {
        assert!(matches!(Ring::new(config), Err(RingError::Config(_))));
    }
}

/// Turns `ring` until `done`, which sees every event.
fn turn_until(ring: &mut Ring, mut done: impl FnMut(&mut RingPort<'_>, Event<'_>) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    let mut over = false;
    while !over {
        ring.turn(&mut |port, event| over |= done(port, event)).unwrap();
        assert!(Instant::now() < deadline, "waited too long: {ring:?}");
        ring.wait(Some(Duration::from_millis(5))).unwrap();
    }
}

#[test]
fn a_connection_moves_to_another_ring_and_goes_on() {
    let (mut first, mut second) = (Ring::new(small()).unwrap(), Ring::new(small()).unwrap());
    let (_, addr) = first.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
    let mut client = TcpStream::connect(addr).unwrap();
    client.write_all(b"hello").unwrap();
    let (mut moved, mut seen) = (None, Vec::new());
    turn_until(&mut first, |port, event| match event {
        Event::Data { conn, bytes } => {
            seen.extend_from_slice(bytes);
            port.send(conn, b"wait".to_vec()).unwrap();
            port.detach(conn);
            assert!(port.send(conn, b"more".to_vec()).is_err(), "it is leaving");
            false
        }
        Event::Detached { fd, .. } => {
            moved = Some(fd);
            true
        }
        Event::Closed { .. } => panic!("detached, not closed"),
        _ => false,
    });
    assert_eq!((seen.as_slice(), first.connections()), (&b"hello"[..], 0));
    drop(first);

    client.write_all(b"again").unwrap();
    let conn = second.port().adopt(moved.unwrap()).unwrap();
    turn_until(&mut second, |port, event| match event {
        Event::Data { conn: from, bytes } => {
            assert_eq!((from, bytes), (conn, &b"again"[..]));
            port.send(conn, b"here".to_vec()).unwrap();
            false
        }
        Event::Sent { .. } => true,
        other => panic!("{other:?}"),
    });
    let mut answer = [0; 8];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"waithere");
}

#[test]
fn a_connection_that_breaks_while_it_is_detached_is_closed() {
    let mut ring = Ring::new(small()).unwrap();
    let (_, addr) = ring.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
    let _client = TcpStream::connect(addr).unwrap();
    turn_until(&mut ring, |port, event| match event {
        Event::Accepted { conn, .. } => {
            // More than the kernel takes at once, to a peer that never reads: the send stays under way.
            port.send(conn, vec![0; 64 << 20]).unwrap();
            port.detach(conn);
            port.close(conn);
            false
        }
        Event::Closed { .. } => true,
        other => panic!("{other:?}"),
    });
    assert_eq!(ring.connections(), 0);
}

#[test]
fn a_watched_socket_is_reported_until_it_is_read_empty() {
    let mut ring = Ring::new(small()).unwrap();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let watch = ring.watch(socket.try_clone().unwrap().into());
    let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for n in 0..3u8 {
        sender.send_to(&[n], socket.local_addr().unwrap()).unwrap();
    }
    let mut got = Vec::new();
    turn_until(&mut ring, |_, event| {
        assert!(matches!(event, Event::Readable { watch: w } if w == watch));
        let mut byte = [0];
        // One at a time: what is left is reported again.
        if socket.recv(&mut byte).is_ok() {
            got.push(byte[0]);
        }
        got.len() == 3
    });
    assert_eq!(got, [0, 1, 2]);
    ring.unwatch(watch);
    assert!(ring.drain(), "the kernel lets go of the poll");
}

#[test]
fn clients_do_not_take_the_places_of_peers() {
    let mut ring = Ring::new(RingConfig { max_connections: 1, ..small() }).unwrap();
    let (clients, addr) = ring.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
    let (peers, peer_addr) = ring.listen_for_peers("127.0.0.1:0".parse().unwrap(), 16).unwrap();
    let _streams = [TcpStream::connect(addr).unwrap(), TcpStream::connect(addr).unwrap()];
    let mut over = Vec::new();
    turn_until(&mut ring, |_, event| {
        let Event::Accepted { listener, over_limit, .. } = event else { panic!("{event:?}") };
        assert_eq!(listener, clients);
        over.push(over_limit);
        over.len() == 2
    });
    assert_eq!(over, [false, true]);
    let _stream = TcpStream::connect(peer_addr).unwrap();
    turn_until(
        &mut ring,
        |_, event| matches!(event, Event::Accepted { listener, over_limit: false, .. } if listener == peers),
    );
    assert!(matches!(ring.connect(addr), Err(RingError::TooManyConnections { limit: 1 })));
    assert!(ring.port().connect_peer(peer_addr).is_ok());
}
