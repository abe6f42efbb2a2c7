//! Links over the loopback interface: with each other, and with a raw peer that does as it likes.
//!
//! Time is what the test says it is; a test waits for what it expects, with one generous deadline of the real clock.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::*;
use crate::ring::RingConfig;

const DEADLINE: Duration = Duration::from_secs(30);

/// An owner that writes down what it is told.
#[derive(Default)]
struct Owner {
    /// Refuses everybody with this text.
    refuse: Option<String>,
    echo: bool,
    handed: Vec<HandOver>,
    events: Vec<LinkEvent>,
    frames: Vec<Vec<u8>>,
}

impl Peers for Owner {
    fn judge(&mut self, _: &Hello, _: SocketAddr) -> Result<(), String> {
        self.refuse.clone().map_or(Ok(()), Err)
    }

    fn hand_over(&mut self, handed: HandOver) {
        self.handed.push(handed);
    }

    fn on_link(&mut self, _: &mut Links, event: LinkEvent) {
        self.events.push(event);
    }

    fn on_frame(&mut self, links: &mut Links, link: LinkId, body: &[u8]) {
        assert!(body.as_ptr().addr().is_multiple_of(ALIGN) && links.is_up(link));
        self.frames.push(body.to_vec());
        if self.echo {
            links.send(link, Priority::Answer, &[body]).unwrap();
        }
    }
}

struct Core {
    ring: Ring,
    links: Links,
    owner: Owner,
}

impl Core {
    fn new(node: u128, core: u16) -> Core {
        Core::with(LinkConfig { seed: node as u64, ..LinkConfig::default() }, node, core)
    }

    fn with(config: LinkConfig, node: u128, core: u16) -> Core {
        let ring = RingConfig { entries: 64, buffers: 16, buffer_len: 4096, max_connections: 1 };
        Core { ring: Ring::new(ring).unwrap(), links: Links::new(config, me(node), core), owner: Owner::default() }
    }

    fn listening(node: u128) -> (Core, SocketAddr) {
        let mut core = Core::new(node, 0);
        let addr = core.listen();
        (core, addr)
    }

    fn listen(&mut self) -> SocketAddr {
        self.links.listen(&mut self.ring, "127.0.0.1:0".parse().unwrap()).unwrap()
    }

    fn turn(&mut self, now: u64) {
        let Core { ring, links, owner } = self;
        ring.turn(&mut |port, event| {
            assert!(links.owns(&event), "nothing else is in this ring");
            links.on_event(now, port, event, owner);
        })
        .unwrap();
        if links.next_deadline().is_some_and(|at| at <= now) {
            links.on_deadline(now, &mut ring.port(), owner);
        }
        links.flush(now, &mut ring.port(), owner);
        links.invariants();
    }

    fn event(&self, is: impl Fn(&LinkEvent) -> bool) -> bool {
        self.owner.events.iter().any(is)
    }

    fn up(&self) -> Option<LinkId> {
        self.owner.events.iter().find_map(|event| match event {
            LinkEvent::Up { link, .. } => Some(*link),
            _ => None,
        })
    }

    /// Turns until `done`, while time stands at `now`.
    fn until(&mut self, now: u64, mut done: impl FnMut(&mut Core) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(self) {
            assert!(Instant::now() < deadline, "waited too long: {:?}", self.owner.events);
            self.turn(now);
            self.ring.wait(Some(Duration::from_millis(1))).unwrap();
        }
    }
}

/// Turns two cores until `done`, while time stands at `now`.
fn both(now: u64, a: &mut Core, b: &mut Core, mut done: impl FnMut(&mut Core, &mut Core) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done(a, b) {
        assert!(Instant::now() < deadline, "waited too long: {:?} {:?}", a.owner.events, b.owner.events);
        a.turn(now);
        b.turn(now);
    }
}

fn me(node: u128) -> Identity {
    let peer = "127.0.0.1:7000".parse().unwrap();
    Identity { cluster: 5, number: node as u16, node, boot: 1, shards: 64, cores: 2, peer }
}

fn frame(writer: &mut FrameWriter, kind: Kind, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    writer.push(&mut out, kind, &[body]);
    out
}

/// Numbers the frames behind a greeting.
fn second_writer() -> FrameWriter {
    let mut writer = FrameWriter::default();
    writer.push(&mut Vec::new(), Kind::Hello, &[]);
    writer
}

fn hello(core: u16) -> Vec<u8> {
    frame(&mut FrameWriter::default(), Kind::Hello, &Hello { from: me(9), core }.encode())
}

fn welcome() -> Vec<u8> {
    frame(&mut FrameWriter::default(), Kind::Welcome, &Hello { from: me(9), core: 0 }.encode())
}

/// A raw connection to a listener of links.
fn raw(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Accepts the connection of `core`'s dialer and takes its Hello, raw.
fn accept(listener: &TcpListener, core: &mut Core, now: u64) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    core.until(now, |_| {
        accepted = match listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        };
        accepted.is_some()
    });
    let mut stream = accepted.unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut got = vec![0; frame_len(HELLO_LEN)];
    let mut at = 0;
    core.until(now, |_| {
        at += stream.read(&mut got[at..]).unwrap_or(0);
        at == got.len()
    });
    assert_eq!(got, frame(&mut FrameWriter::default(), Kind::Hello, &Hello { from: core.links.me, core: 0 }.encode()));
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Whether the other side has ended the connection, after what it had to say.
fn ended(stream: &mut TcpStream, said: &mut Vec<u8>) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut buf = [0; 4096];
    loop {
        match stream.read(&mut buf) {
            Ok(0) => return true,
            Ok(n) => said.extend_from_slice(&buf[..n]),
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}

fn text_of_refusal(said: &[u8]) -> String {
    let mut bytes = said;
    let mut reader = FrameReader::new(REFUSE_LEN);
    let (kind, body) = reader.next(&mut bytes).unwrap().unwrap();
    assert_eq!(kind, Kind::Refuse);
    String::from_utf8(body.to_vec()).unwrap()
}

const SIZES: [usize; 7] = [0, 1, 15, 16, 17, 70 << 10, 1 << 20];

fn bodies() -> Vec<Vec<u8>> {
    SIZES.iter().map(|&len| (0..len).map(|at| (at * 31 + len) as u8).collect()).collect()
}

#[test]
fn a_dialled_link_comes_up_on_both_sides_and_carries_messages_both_ways() {
    let (mut server, addr) = Core::listening(1);
    let mut client = Core::new(2, 1);
    server.owner.echo = true;
    let link = client.links.dial(addr, 0);
    assert_eq!(client.links.dial(addr, 0), link, "one link for one core of one node");
    assert_eq!(client.links.send(link, Priority::Answer, &[b"early"]), Err(SendError::Down));
    both(0, &mut client, &mut server, |client, server| client.up().is_some() && server.up().is_some());
    assert_eq!(client.owner.events, [LinkEvent::Up { link, peer: me(1), dialled: true }]);
    let accepted = server.up().unwrap();
    assert_eq!(server.owner.events, [LinkEvent::Up { link: accepted, peer: me(2), dialled: false }]);

    for body in &bodies() {
        let (left, right) = body.split_at(body.len() / 3);
        client.links.send(link, Priority::Answer, &[left, right]).unwrap();
    }
    both(0, &mut client, &mut server, |client, _| client.owner.frames.len() == SIZES.len());
    assert!(client.owner.frames == bodies() && server.owner.frames == bodies());
    let sum = SIZES.iter().sum::<usize>() as u64;
    let counters = client.links.counters();
    assert_eq!((counters.frames_in, counters.bytes_in, counters.bytes_out), (SIZES.len() as u64, sum, sum));
}

#[test]
fn everything_sent_in_a_turn_leaves_with_one_send() {
    let (mut server, addr) = Core::listening(1);
    let mut client = Core::new(2, 0);
    let link = client.links.dial(addr, 0);
    both(0, &mut client, &mut server, |client, server| client.up().is_some() && server.up().is_some());
    both(0, &mut client, &mut server, |client, server| !client.ring.has_work() && !server.ring.has_work());
    for _ in 0..100 {
        client.links.send(link, Priority::Answer, &[b"message"]).unwrap();
    }
    let before = client.ring.counters().completions;
    both(0, &mut client, &mut server, |_, server| server.owner.frames.len() == 100);
    assert_eq!(client.ring.counters().completions - before, 1);
}

#[test]
fn a_link_to_another_core_is_handed_over_and_goes_on_there() {
    let (mut first, addr) = Core::listening(1);
    let mut second = Core::new(1, 1);
    let mut client = Core::new(2, 0);
    second.owner.echo = true;
    let link = client.links.dial(addr, 1);
    both(0, &mut client, &mut first, |_, first| !first.owner.handed.is_empty());
    let handed = first.owner.handed.pop().unwrap();
    assert_eq!((handed.hello.core, handed.hello.from), (1, me(2)));
    assert_eq!((first.links.live(), first.ring.connections()), (0, 0), "core 0 has nothing to do with it any more");
    second.links.adopt(0, &mut second.ring.port(), handed, &mut second.owner);
    drop(first);
    both(0, &mut client, &mut second, |client, _| client.up().is_some());
    for body in &bodies() {
        client.links.send(link, Priority::Answer, &[body]).unwrap();
    }
    both(0, &mut client, &mut second, |client, _| client.owner.frames.len() == SIZES.len());
    assert!(client.owner.frames == bodies());
}

#[test]
fn a_refusal_reaches_the_dialer_in_words() {
    let (mut server, addr) = Core::listening(1);
    let mut client = Core::new(2, 0);
    server.owner.refuse = Some("unknown here".into());
    let (judged, no_core) = (client.links.dial(addr, 0), client.links.dial(addr, 2));
    both(0, &mut client, &mut server, |client, _| client.owner.events.len() == 2);
    let refused = |link, text: &str| LinkEvent::Failed { link, reason: Reason::Refused(text.into()) };
    assert!(client.owner.events.contains(&refused(judged, "unknown here")));
    assert!(client.owner.events.contains(&refused(no_core, "no core 2 among the 2 here")));
    assert_eq!((client.links.counters().refused, server.links.counters().turned_away), (2, 2));
    both(0, &mut client, &mut server, |client, server| client.ring.connections() + server.ring.connections() == 0);
}

#[test]
fn another_version_is_told_so() {
    let (mut server, addr) = Core::listening(1);
    let mut stream = raw(addr);
    let mut body = Hello { from: me(9), core: 0 }.encode();
    body[8] = 77;
    stream.write_all(&frame(&mut FrameWriter::default(), Kind::Hello, &body[..70])).unwrap();
    let mut said = Vec::new();
    server.until(0, |_| ended(&mut stream, &mut said));
    assert_eq!(text_of_refusal(&said), "protocol version 77 meets version 1");
}

#[test]
fn a_dialer_does_not_take_a_node_of_another_cluster() {
    let (mut server, addr) = Core::listening(1);
    let mut client = Core::new(2, 0);
    server.links.set_identity(Identity { cluster: 6, ..me(1) });
    let link = client.links.dial(addr, 0);
    both(0, &mut client, &mut server, |client, _| !client.owner.events.is_empty());
    let text = "cluster 0000000000000006 meets cluster 0000000000000005";
    assert_eq!(client.owner.events, [LinkEvent::Failed { link, reason: Reason::TurnedAway(text.into()) }]);
    both(0, &mut client, &mut server, |_, server| server.event(|e| matches!(e, LinkEvent::Down { .. })));
}

#[test]
fn messages_arrive_in_order_however_the_bytes_are_split() {
    let (mut server, addr) = Core::listening(1);
    let writer = std::thread::spawn(move || {
        let mut stream = raw(addr);
        for byte in hello(0) {
            stream.write_all(&[byte]).unwrap();
        }
        let mut answer = vec![0; frame_len(HELLO_LEN)];
        stream.read_exact(&mut answer).unwrap();
        let mut frames = second_writer();
        for body in bodies() {
            let bytes = frame(&mut frames, Kind::Message, &body);
            // Byte by byte at first, then in pieces that fit nothing.
            let (slowly, rest) = bytes.split_at(bytes.len().min(200));
            slowly.iter().for_each(|byte| stream.write_all(&[*byte]).unwrap());
            rest.chunks(4099).for_each(|chunk| stream.write_all(chunk).unwrap());
        }
        stream
    });
    server.until(0, |server| server.owner.frames.len() == SIZES.len());
    assert!(server.owner.frames == bodies());
    drop(writer.join().unwrap());
    server.until(0, |server| server.event(|e| matches!(e, LinkEvent::Down { reason: Reason::Closed, .. })));
    assert_eq!(server.links.live(), 0);
}

#[test]
fn a_link_whose_peer_does_not_read_becomes_full_and_empties_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = LinkConfig { max_queued_bytes: 256 << 10, max_queued_frames: 1000, ..LinkConfig::default() };
    let control = config.control_bytes;
    let mut client = Core::with(config, 2, 0);
    let link = client.links.dial(listener.local_addr().unwrap(), 0);
    let mut stream = accept(&listener, &mut client, 0);
    stream.write_all(&welcome()).unwrap();
    client.until(0, |client| client.up().is_some());

    // The kernel takes a few megabytes, then nothing more.
    let body = vec![7; 64 << 10];
    let mut sent = 0;
    let mut full_turns = 0;
    client.until(0, |client| {
        match client.links.send(link, Priority::Answer, &[&body]) {
            Ok(()) => (sent, full_turns) = (sent + 1, 0),
            Err(error) => {
                assert_eq!(error, SendError::Full);
                full_turns += 1;
            }
        }
        full_turns == 50
    });
    let queued = client.links.views().next().unwrap().queued_bytes;
    assert!((256 << 10..(256 << 10) + frame_len(body.len())).contains(&queued), "{queued}");
    let mut reserve = 0;
    while client.links.send(link, Priority::Control, &[&body]).is_ok() {
        reserve += 1;
    }
    assert!((control / (65 << 10)..=1 + control / (64 << 10)).contains(&reserve), "{reserve}");
    assert_eq!(client.links.send(link, Priority::Answer, &[&vec![0; (65 << 20) + 1]]), Err(SendError::TooLong));

    let reader = std::thread::spawn(move || {
        let mut all = vec![0; (sent + reserve) * frame_len(64 << 10)];
        stream.read_exact(&mut all).unwrap();
        stream
    });
    client.until(0, |_| reader.is_finished());
    let _stream = reader.join().unwrap();
    client.until(0, |client| client.links.views().next().unwrap().queued_bytes == 0);
    client.links.send(link, Priority::Answer, &[&body]).unwrap();

    // Small messages are bounded by their number, those that matter less by a part of it. One is queued already.
    let mut queued = 1;
    for (priority, most) in [
        (Priority::Background, 500),
        (Priority::Request, 750),
        (Priority::Answer, 1000),
        (Priority::Control, 1000 + 1000 / 8 + 1),
    ] {
        while client.links.send(link, priority, &[b""]).is_ok() {
            queued += 1;
        }
        assert_eq!(queued, most, "{priority:?}");
    }
}

#[test]
fn a_closed_link_is_dialled_again_and_begins_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Core::new(2, 0);
    let link = client.links.dial(listener.local_addr().unwrap(), 0);
    let mut now = 0;
    for round in 1..4 {
        let mut stream = accept(&listener, &mut client, now);
        stream.write_all(&welcome()).unwrap();
        client.until(now, |client| client.links.is_up(link));
        client.links.send(link, Priority::Answer, &[&[round]]).unwrap();
        client.links.flush(now, &mut client.ring.port(), &mut client.owner);
        client.until(now, |client| !client.ring.has_work());
        let mut got = vec![0; frame_len(1)];
        client.turn(now);
        stream.read_exact(&mut got).unwrap();
        assert_eq!(got, frame(&mut second_writer(), Kind::Message, &[round]));
        drop(stream);
        client.until(now, |client| !client.links.is_up(link));
        assert_eq!(client.owner.events.last(), Some(&LinkEvent::Down { link, reason: Reason::Closed }));
        assert_eq!(client.links.send(link, Priority::Answer, &[b"lost"]), Err(SendError::Down));
        assert_eq!(client.links.counters().dialled, u64::from(round), "not before the pause is over");
        now = client.links.next_deadline().unwrap();
    }
}

#[test]
fn the_pauses_between_dials_grow_to_a_bound() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut client = Core::new(2, 0);
    client.links.dial(addr, 0);
    let (mut now, mut pauses) = (1000, Vec::new());
    for round in 1..12 {
        client.until(now, |client| client.owner.events.len() == round);
        let next = client.links.next_deadline().unwrap();
        client.turn(next - 1);
        assert_eq!(client.links.counters().dialled, round as u64);
        pauses.push(next - now);
        now = next;
    }
    assert!((25..=50).contains(&pauses[0]) && (50..=100).contains(&pauses[1]), "{pauses:?}");
    assert!(pauses[8..].iter().all(|pause| (1000..=2000).contains(pause)), "{pauses:?}");
    assert!(client.event(|e| matches!(e, LinkEvent::Failed { reason: Reason::Broken(_), .. })));
}

#[test]
fn who_breaks_the_format_is_cut_off() {
    let (mut server, addr) = Core::listening(1);
    let first = |kind, body: &[u8]| frame(&mut FrameWriter::default(), kind, body);
    let with = |mut first: Vec<u8>, more: &[u8]| {
        first.extend_from_slice(more);
        first
    };
    let second = |kind, body: &[u8]| frame(&mut second_writer(), kind, body);
    let cases = [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), FrameError::Head),
        (first(Kind::Hello, &[0; HELLO_LEN]), FrameError::Body(Kind::Hello)),
        (first(Kind::Message, b"hi"), FrameError::NotNow(Kind::Message)),
        (first(Kind::Welcome, &[0; HELLO_LEN]), FrameError::NotNow(Kind::Welcome)),
        (first(Kind::Hello, &[0; 5000]), FrameError::TooLong { len: 5000, max: REFUSE_LEN }),
        (with(hello(0), &second(Kind::Message, b"too early")), FrameError::Early),
        (with(hello(1), &second(Kind::Message, b"too early")), FrameError::Early),
    ];
    for (at, (bytes, error)) in cases.into_iter().enumerate() {
        let mut stream = raw(addr);
        stream.write_all(&bytes).unwrap();
        let mut said = Vec::new();
        server.until(0, |_| ended(&mut stream, &mut said));
        let Some(LinkEvent::TurnedAway { reason, .. }) = server.owner.events.pop() else { panic!("turned away") };
        assert_eq!((reason, said.len()), (Reason::Format(error), 0));
        assert_eq!((server.links.counters().malformed, server.links.live()), (at as u64 + 1, 0));
    }

    let mut stream = raw(addr);
    stream.write_all(&hello(0)).unwrap();
    server.until(0, |server| server.up().is_some());
    let link = server.up().unwrap();
    stream.write_all(&second(Kind::Message, &vec![0; (64 << 20) + (256 << 10) + 1])[..ALIGN]).unwrap();
    server.until(0, |_| ended(&mut stream, &mut Vec::new()));
    let (len, max) = ((64 << 20) + (256 << 10) + 1, (64 << 20) + (256 << 10));
    let reason = Reason::Format(FrameError::TooLong { len, max });
    assert_eq!(server.owner.events.last(), Some(&LinkEvent::Down { link, reason }));
}

/// Turns both until all that was sent has arrived.
fn calm(now: u64, a: &mut Core, b: &mut Core) {
    both(now, a, b, |a, b| {
        let (ours, theirs) = (a.ring.counters(), b.ring.counters());
        let idle = |core: &Core| !core.ring.has_work() && !core.links.has_work();
        idle(a) && idle(b) && ours.sent == theirs.received && theirs.sent == ours.received
    });
}

#[test]
fn an_idle_link_is_kept_alive_and_a_silent_one_is_ended() {
    let (mut server, addr) = Core::listening(1);
    let mut client = Core::new(2, 0);
    let link = client.links.dial(addr, 0);
    let mut now = 1_000_000;
    both(now, &mut client, &mut server, |client, server| client.up().is_some() && server.up().is_some());
    calm(now, &mut client, &mut server);
    let before = server.ring.counters().received;
    for _ in 0..60 {
        now += 500;
        client.turn(now);
        server.turn(now);
        calm(now, &mut client, &mut server);
    }
    assert_eq!((client.owner.events.len(), server.owner.events.len()), (1, 1), "thirty seconds without a message");
    let pings = (server.ring.counters().received - before) / ALIGN as u64;
    assert!((15..=30).contains(&pings), "{pings}");

    // This core did not run for an hour. That says nothing about the peer.
    now += 3_600_000;
    client.turn(now);
    assert!(client.links.is_up(link));
    calm(now, &mut client, &mut server);
    assert!(client.links.is_up(link));

    // Now the peer does not.
    let since = now;
    while client.links.is_up(link) {
        now += 100;
        client.turn(now);
        assert!(now < since + 10_000);
    }
    assert!((3000..=4000).contains(&(now - since)), "{}", now - since);
    assert_eq!(client.owner.events.last(), Some(&LinkEvent::Down { link, reason: Reason::Silent }));
    assert_eq!(client.links.counters().silent, 1);
}

#[test]
fn a_greeting_that_does_not_come_is_not_waited_for() {
    let (mut server, addr) = Core::listening(1);
    let mut stream = raw(addr);
    // All but the last byte: every byte of a slow Hello is heard, and does not help.
    stream.write_all(&hello(0)[..90]).unwrap();
    server.until(10, |server| server.ring.counters().received == 90);
    server.turn(3009);
    assert_eq!(server.owner.events, []);
    server.until(3010, |_| ended(&mut stream, &mut Vec::new()));
    assert!(matches!(server.owner.events[..], [LinkEvent::TurnedAway { reason: Reason::TooSlow, .. }]));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Core::new(2, 0);
    let link = client.links.dial(listener.local_addr().unwrap(), 0);
    let _stream = accept(&listener, &mut client, 0);
    client.until(3000, |client| !client.owner.events.is_empty());
    assert_eq!(client.owner.events, [LinkEvent::Failed { link, reason: Reason::TooSlow }]);
}

#[test]
fn strangers_are_bounded() {
    let mut server = Core::with(LinkConfig { max_waiting: 2, ..LinkConfig::default() }, 1, 0);
    let addr = server.listen();
    let mut streams = [raw(addr), raw(addr), raw(addr)];
    server.until(0, |server| server.links.counters().accepted == 3);
    assert_eq!((server.links.live(), server.links.counters().turned_away), (2, 1));
    server.until(0, |_| ended(&mut streams[2], &mut Vec::new()));
    // One that says who it is makes room.
    streams[0].write_all(&hello(0)).unwrap();
    server.until(0, |server| server.up().is_some());
    let mut fourth = raw(addr);
    fourth.write_all(&hello(0)).unwrap();
    server.until(0, |server| server.links.counters().ups == 2);
}

#[test]
fn a_link_that_is_hung_up_ends_quietly_here_and_is_seen_there() {
    let (mut server, addr) = Core::listening(1);
    let mut client = Core::new(2, 0);
    let link = client.links.dial(addr, 0);
    both(0, &mut client, &mut server, |client, server| client.up().is_some() && server.up().is_some());
    client.links.send(link, Priority::Answer, &[b"dropped"]).unwrap();
    client.links.hang_up(link);
    client.links.hang_up(link);
    assert_eq!(
        (client.links.send(link, Priority::Answer, &[b""]), client.links.is_up(link)),
        (Err(SendError::Down), false)
    );
    both(0, &mut client, &mut server, |client, server| {
        client.ring.connections() == 0 && server.event(|e| matches!(e, LinkEvent::Down { reason: Reason::Closed, .. }))
    });
    assert_eq!((client.owner.events.len(), client.links.live(), server.owner.frames.len()), (1, 0, 0));
    assert_ne!(client.links.dial(addr, 0), link);
}

/// Messages may end links while more messages of the same bytes are waiting to be looked at.
#[test]
fn an_owner_may_hang_up_while_it_reads() {
    struct Hasty(Owner);
    impl Peers for Hasty {
        fn judge(&mut self, hello: &Hello, from: SocketAddr) -> Result<(), String> {
            self.0.judge(hello, from)
        }
        fn hand_over(&mut self, handed: HandOver) {
            self.0.hand_over(handed);
        }
        fn on_link(&mut self, links: &mut Links, event: LinkEvent) {
            self.0.on_link(links, event);
        }
        fn on_frame(&mut self, links: &mut Links, link: LinkId, body: &[u8]) {
            self.0.on_frame(links, link, body);
            links.hang_up(link);
        }
    }
    let Core { mut ring, mut links, owner } = Core::new(1, 0);
    let addr = links.listen(&mut ring, "127.0.0.1:0".parse().unwrap()).unwrap();
    let mut hasty = Hasty(owner);
    let writer = std::thread::spawn(move || {
        let mut stream = raw(addr);
        stream.write_all(&hello(0)).unwrap();
        stream.read_exact(&mut vec![0; frame_len(HELLO_LEN)]).unwrap();
        let (mut out, mut frames) = (Vec::new(), second_writer());
        (0..10).for_each(|n| frames.push(&mut out, Kind::Message, &[&[n]]));
        stream.write_all(&out).unwrap();
        let _ = stream.read(&mut [0]);
    });
    let deadline = Instant::now() + DEADLINE;
    while !writer.is_finished() {
        assert!(Instant::now() < deadline);
        ring.turn(&mut |port, event| links.on_event(0, port, event, &mut hasty)).unwrap();
        links.flush(0, &mut ring.port(), &mut hasty);
        ring.wait(Some(Duration::from_millis(1))).unwrap();
    }
    writer.join().unwrap();
    assert_eq!(hasty.0.frames, [[0]]);
}

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Checks that links go up and down by turns, and that the messages of one life of a link come in order without a gap.
#[derive(Default)]
struct Witness {
    /// Links that stand, with the number of the next message.
    up: BTreeMap<LinkId, u32>,
    messages: usize,
}

impl Peers for Witness {
    fn judge(&mut self, _: &Hello, _: SocketAddr) -> Result<(), String> {
        Ok(())
    }

    fn hand_over(&mut self, _: HandOver) {
        unreachable!("all links are for core 0");
    }

    fn on_link(&mut self, _: &mut Links, event: LinkEvent) {
        match event {
            LinkEvent::Up { link, .. } => assert!(self.up.insert(link, 0).is_none(), "up twice"),
            LinkEvent::Down { link, .. } => assert!(self.up.remove(&link).is_some(), "down without up"),
            LinkEvent::Failed { link, .. } => assert!(!self.up.contains_key(&link)),
            LinkEvent::TurnedAway { reason, .. } => assert!(!matches!(reason, Reason::Format(_)), "{reason}"),
        }
    }

    fn on_frame(&mut self, _: &mut Links, link: LinkId, body: &[u8]) {
        let next = self.up.get_mut(&link).expect("messages come while a link stands");
        assert_eq!(body[..4], next.to_le_bytes());
        *next += 1;
        self.messages += 1;
    }
}

#[test]
fn whatever_the_owners_do_messages_keep_their_order_and_nothing_is_left_over() {
    struct Node {
        ring: Ring,
        links: Links,
        seen: Witness,
        /// Dialled links that stand, with the number of the next message to be sent.
        sent: BTreeMap<LinkId, (u64, u32)>,
        addr: SocketAddr,
    }
    impl Node {
        fn turn(&mut self, now: u64) {
            let Node { ring, links, seen, .. } = self;
            ring.turn(&mut |port, event| links.on_event(now, port, event, seen)).unwrap();
            links.on_deadline(now, &mut ring.port(), seen);
            links.flush(now, &mut ring.port(), seen);
            links.invariants();
        }
    }
    let mut nodes: Vec<_> = (1..4)
        .map(|node| {
            let Core { mut ring, mut links, .. } = Core::new(node, 0);
            let addr = links.listen(&mut ring, "127.0.0.1:0".parse().unwrap()).unwrap();
            Node { ring, links, seen: Witness::default(), sent: BTreeMap::new(), addr }
        })
        .collect();
    let addrs: Vec<_> = nodes.iter().map(|node| node.addr).collect();
    let (mut random, mut now) = (Random(7), 0);
    let deadline = Instant::now() + DEADLINE;
    let mut steps = 0;
    while steps < 3000 || nodes.iter().map(|node| node.seen.messages).sum::<usize>() < 2000 {
        assert!(Instant::now() < deadline, "{:?}", nodes.iter().map(|node| &node.links).collect::<Vec<_>>());
        steps += 1;
        let at = random.below(nodes.len());
        let node = &mut nodes[at];
        let links: Vec<_> = node.links.views().collect();
        match random.below(100) {
            0..10 => drop(node.links.dial(addrs[random.below(3)], 0)),
            10..12 if !links.is_empty() => {
                let link = links[random.below(links.len())].link;
                node.links.hang_up(link);
                node.seen.up.remove(&link);
            }
            12..80 => {
                for view in links.iter().filter(|view| view.peer.is_some() && view.dialled.is_some()) {
                    // A link that went down and up again begins anew.
                    let life = node.links.get(view.link).unwrap().conn.unwrap().to_bits();
                    let next = node.sent.entry(view.link).or_insert((life, 0));
                    if next.0 != life {
                        *next = (life, 0);
                    }
                    let mut body = vec![0; 4 + random.below(20_000)];
                    body[..4].copy_from_slice(&next.1.to_le_bytes());
                    next.1 += u32::from(node.links.send(view.link, Priority::Answer, &[&body]).is_ok());
                }
            }
            80..83 => now += random.below(600) as u64,
            _ => {}
        }
        nodes.iter_mut().for_each(|node| node.turn(now));
    }
    for node in &mut nodes {
        let links: Vec<_> = node.links.views().map(|view| view.link).collect();
        links.into_iter().for_each(|link| node.links.hang_up(link));
        node.seen.up.clear();
    }
    while nodes.iter().any(|node| node.ring.connections() > 0 || node.links.live() > 0) {
        assert!(Instant::now() < deadline, "connections are left over");
        for node in &mut nodes {
            node.turn(now);
            let accepted: Vec<_> = node.links.views().map(|view| view.link).collect();
            accepted.into_iter().for_each(|link| node.links.hang_up(link));
            node.seen.up.clear();
        }
    }
    assert!(nodes.iter().all(|node| node.links.conns.iter().all(Option::is_none)), "the tables are empty");
}
