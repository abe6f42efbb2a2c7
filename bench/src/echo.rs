//! `gridkv-bench echo`: a server without a table. It reads every command and answers with the same bytes, so its rate is
//! what the sockets of this machine and this generator allow; a real server comes below it.
//!
//! | command | reply |
//! |---|---|
//! | GET | a value of `--reply-size` bytes |
//! | any other | `+OK` |
//!
//! A command is decoded as the node decodes it. One thread, one ring: after 50 µs without work it sleeps.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gridkv_net::resp::{Decoder, Limits, Parsed, Span};
use gridkv_net::ring::{ConnId, Event, Ring, RingConfig, RingPort, probe_port};

use crate::failure::Failure;
use crate::interrupt;
use crate::pin;
use crate::units;

/// How long to look for work before sleeping, and how long to sleep before looking whether to stop.
const SPIN: Duration = Duration::from_micros(50);
const SLEEP: Duration = Duration::from_millis(100);
/// Replies that may wait for a client that does not read; it is hung up on beyond that.
const MOST_OWED: usize = 256 << 20;

/// Serve constant replies: the limit of the machine
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen
    #[arg(long, short, default_value = "127.0.0.1:7777", value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Length of the value that answers a GET
    #[arg(long, default_value = "64", value_parser = units::bytes_of, value_name = "BYTES")]
    reply_size: u64,
    /// The core to run on
    #[arg(long, value_name = "CORE")]
    core: Option<usize>,
}

struct Conn {
    id: Option<ConnId>,
    decoder: Decoder,
    /// The decoder's: the arguments found so far.
    spans: Vec<Span>,
    /// The beginning of a command that is not whole.
    held: Vec<u8>,
    out: Vec<u8>,
    spare: Vec<u8>,
    queued: bool,
    eof: bool,
}

impl Conn {
    fn new(id: ConnId) -> Conn {
        Conn {
            id: Some(id),
            decoder: Decoder::new(),
            spans: Vec::new(),
            held: Vec::new(),
            out: Vec::new(),
            spare: Vec::new(),
            queued: false,
            eof: false,
        }
    }

    /// Answers each whole command; false when what came can be none.
    fn take(&mut self, bytes: &[u8], value: &[u8]) -> bool {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            return match self.answer(bytes, value) {
                Some(used) => {
                    self.held.extend_from_slice(&bytes[used..]);
                    true
                }
                None => false,
            };
        }
        let mut all = held;
        all.extend_from_slice(bytes);
        let Some(used) = self.answer(&all, value) else { return false };
        all.drain(..used);
        self.held = all;
        true
    }

    /// Answers what is whole at the front of `input`; returns its length.
    fn answer(&mut self, input: &[u8], value: &[u8]) -> Option<usize> {
        let limits = Limits::default();
        let mut at = 0;
        loop {
            match self.decoder.parse(&input[at..], &limits, &mut self.spans) {
                Ok(Parsed::Command { consumed }) => {
                    let gets =
                        self.spans.first().is_some_and(|name| name.of(&input[at..]).eq_ignore_ascii_case(b"GET"));
                    self.out.extend_from_slice(if gets { value } else { b"+OK\r\n" });
                    at += consumed;
                }
                Ok(Parsed::Line { consumed }) => {
                    let gets = self
                        .spans
                        .first()
                        .is_some_and(|name| name.of(self.decoder.line()).eq_ignore_ascii_case(b"GET"));
                    self.out.extend_from_slice(if gets { value } else { b"+OK\r\n" });
                    at += consumed;
                }
                Ok(Parsed::Nothing { consumed }) => at += consumed,
                Ok(Parsed::Incomplete { .. }) => return Some(at),
                Err(_) => return None,
            }
        }
    }
}

/// The server, on the thread that made it.
pub(crate) struct Echo {
    ring: Ring,
    addr: SocketAddr,
    state: State,
}

struct State {
    conns: Vec<Option<Conn>>,
    /// Connections with something to send after this turn.
    dirty: Vec<ConnId>,
    value: Vec<u8>,
}

impl Echo {
    pub(crate) fn listen(addr: SocketAddr, reply_size: usize) -> Result<Echo, Failure> {
        let mut ring = Ring::new(RingConfig::default())?;
        let (_, addr) = ring.listen(probe_port(addr)?, 1024)?;
        let mut value = format!("${reply_size}\r\n").into_bytes();
        value.resize(value.len() + reply_size, b'x');
        value.extend_from_slice(b"\r\n");
        Ok(Echo { ring, addr, state: State { conns: Vec::new(), dirty: Vec::new(), value } })
    }

    /// Where it listens, port 0 resolved.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until told to stop.
    pub(crate) fn serve(&mut self, stop: &AtomicBool) -> Result<(), Failure> {
        let mut idle_since = Instant::now();
        while !stop.load(Ordering::Relaxed) && !interrupt::requested() {
            let handled = self
                .ring
                .turn(&mut |port, event| self.state.on_event(port, event))
                .map_err(Failure::io("a turn of the ring"))?;
            self.state.flush(&mut self.ring);
            if handled > 0 || self.ring.has_work() {
                idle_since = Instant::now();
            } else if idle_since.elapsed() >= SPIN {
                self.ring.wait(Some(SLEEP)).map_err(Failure::io("waiting for the ring"))?;
                idle_since = Instant::now();
            } else {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }
}

impl State {
    fn on_event(&mut self, port: &mut RingPort<'_>, event: Event<'_>) {
        match event {
            Event::Accepted { conn, over_limit: true, .. } => port.close(conn),
            Event::Accepted { conn, .. } => {
                if self.conns.len() <= conn.index() {
                    self.conns.resize_with(conn.index() + 1, || None);
                }
                self.conns[conn.index()] = Some(Conn::new(conn));
            }
            Event::Data { conn, bytes } => {
                let Some(state) = self.conns.get_mut(conn.index()).and_then(Option::as_mut) else { return };
                if !state.take(bytes, &self.value) || state.out.len() > MOST_OWED {
                    return port.close(conn);
                }
                self.mark(conn);
            }
            Event::Sent { conn, buf } => {
                let Some(state) = self.conns.get_mut(conn.index()).and_then(Option::as_mut) else { return };
                state.spare = buf;
                if !state.out.is_empty() || state.eof {
                    self.mark(conn);
                }
            }
            Event::Eof { conn } => {
                let Some(state) = self.conns.get_mut(conn.index()).and_then(Option::as_mut) else { return };
                state.eof = true;
                self.mark(conn);
            }
            Event::Closed { conn, .. } => {
                if let Some(place) = self.conns.get_mut(conn.index()) {
                    *place = None;
                }
            }
            _ => {}
        }
    }

    fn mark(&mut self, conn: ConnId) {
        if let Some(state) = self.conns[conn.index()].as_mut()
            && !std::mem::replace(&mut state.queued, true)
        {
            self.dirty.push(conn);
        }
    }

    fn flush(&mut self, ring: &mut Ring) {
        for conn in self.dirty.drain(..) {
            let Some(state) = self.conns[conn.index()].as_mut() else { continue };
            state.queued = false;
            if state.id != Some(conn) || ring.is_sending(conn) {
                continue;
            }
            if state.out.is_empty() {
                if state.eof {
                    ring.close(conn);
                }
                continue;
            }
            let next = std::mem::take(&mut state.spare);
            if let Err(back) = ring.send(conn, std::mem::replace(&mut state.out, next)) {
                state.spare = back;
            }
        }
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    if let Some(core) = args.core {
        pin::this_thread(&[core])?;
    }
    let mut echo = Echo::listen(args.listen, args.reply_size as usize)?;
    println!("echo on {}", echo.addr());
    echo.serve(&AtomicBool::new(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_answered_however_they_are_cut() {
        let commands = b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n*3\r\n$3\r\nSET\r\n$1\r\na\r\n$2\r\nbb\r\nPING\r\nget a\r\n";
        for piece in 1..commands.len() {
            let mut conn = Conn::new(ConnId::from_bits(0));
            for bytes in commands.chunks(piece) {
                assert!(conn.take(bytes, b"$1\r\nx\r\n"));
            }
            assert_eq!(conn.out, b"$1\r\nx\r\n+OK\r\n+OK\r\n$1\r\nx\r\n", "in pieces of {piece}");
        }
        assert!(!Conn::new(ConnId::from_bits(0)).take(b"*x\r\n", b""));
    }
}
