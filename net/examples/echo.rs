//! An echo server on one ring: the least that a server on this machine can do, so the most that GridKV can reach.
//!
//! ```text
//! echo [--listen 127.0.0.1:7777] [--core 0] [--reply 36:71] [--spin 50] [--seconds 0]
//! ```
//!
//! `--reply Q:R` answers every Q bytes received with R bytes shaped as a RESP bulk string, so that a server that answers
//! GETs of fixed length can be measured against it. `--spin` microseconds without work go by before the thread sleeps.

use std::io;
use std::time::{Duration, Instant};

use gridkv_net::ring::{ConnId, Event, Ring, RingConfig, RingPort, probe_port};

#[derive(Default)]
struct Conn {
    id: Option<ConnId>,
    /// Bytes to send next.
    out: Vec<u8>,
    /// The buffer that a send brought back.
    spare: Vec<u8>,
    /// Bytes of an unfinished request, in `--reply` mode.
    partial: usize,
    queued: bool,
    eof: bool,
}

struct Echo {
    conns: Vec<Conn>,
    /// Connections with something to send after this turn.
    dirty: Vec<ConnId>,
    reply: Option<(usize, Vec<u8>)>,
}

impl Echo {
    fn on_event(&mut self, port: &mut RingPort<'_>, event: Event<'_>) {
        match event {
            Event::Accepted { conn, over_limit, .. } => {
                if over_limit {
                    return port.close(conn);
                }
                if self.conns.len() <= conn.index() {
                    self.conns.resize_with(conn.index() + 1, Conn::default);
                }
                self.conns[conn.index()] = Conn { id: Some(conn), ..Conn::default() };
            }
            Event::Data { conn, bytes } => {
                let state = &mut self.conns[conn.index()];
                match &self.reply {
                    None => state.out.extend_from_slice(bytes),
                    Some((request, reply)) => {
                        state.partial += bytes.len();
                        while state.partial >= *request {
                            state.partial -= *request;
                            state.out.extend_from_slice(reply);
                        }
                    }
                }
                self.mark(conn);
            }
            Event::Sent { conn, buf } => {
                let state = &mut self.conns[conn.index()];
                state.spare = buf;
                if !state.out.is_empty() || state.eof {
                    self.mark(conn);
                }
            }
            Event::Eof { conn } => {
                self.conns[conn.index()].eof = true;
                self.mark(conn);
            }
            Event::Closed { conn, .. } => self.conns[conn.index()].id = None,
            _ => {}
        }
    }

    fn mark(&mut self, conn: ConnId) {
        let state = &mut self.conns[conn.index()];
        if !state.queued {
            state.queued = true;
            self.dirty.push(conn);
        }
    }

    fn flush(&mut self, ring: &mut Ring) {
        for conn in self.dirty.drain(..) {
            let state = &mut self.conns[conn.index()];
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

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let arg = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1).cloned());
    let number = |name: &str, default: u64| arg(name).map_or(default, |a| a.parse().expect("a number"));

    if let Some(core) = arg("--core") {
        let mut set = rustix::thread::CpuSet::new();
        set.set(core.parse().expect("a core number"));
        rustix::thread::sched_setaffinity(None, &set)?;
    }
    let reply = arg("--reply").map(|shape| {
        let (request, reply) = shape.split_once(':').expect("--reply REQUEST:REPLY");
        let (request, reply): (usize, usize) = (request.parse().expect("bytes"), reply.parse().expect("bytes"));
        let mut bytes = b"$64\r\n".to_vec();
        bytes.resize(reply - 2, b'x');
        bytes.extend_from_slice(b"\r\n");
        (request, bytes)
    });
    let spin = Duration::from_micros(number("--spin", 50));
    let seconds = number("--seconds", 0);
    let config = RingConfig {
        buffers: number("--buffers", 256) as u16,
        buffer_len: number("--buffer-len", 16 << 10) as u32,
        ..RingConfig::default()
    };

    let mut ring = Ring::new(config).map_err(io::Error::other)?;
    let addr = arg("--listen").unwrap_or_else(|| "127.0.0.1:7777".into()).parse().expect("an address");
    let addr = probe_port(addr).map_err(io::Error::other)?;
    let (_, addr) = ring.listen(addr, 1024).map_err(io::Error::other)?;
    println!("echo on {addr}");

    let mut echo = Echo { conns: Vec::new(), dirty: Vec::new(), reply };
    let start = Instant::now();
    let mut idle_since = start;
    loop {
        let handled = ring.turn(&mut |port, event| echo.on_event(port, event))?;
        echo.flush(&mut ring);
        if handled > 0 || ring.has_work() {
            idle_since = Instant::now();
            continue;
        }
        if idle_since.elapsed() >= spin {
            ring.wait(Some(Duration::from_secs(1)))?;
            idle_since = Instant::now();
        }
        if seconds > 0 && start.elapsed().as_secs() >= seconds {
            println!("{:?}", ring.counters());
            return Ok(());
        }
        std::hint::spin_loop();
    }
}
