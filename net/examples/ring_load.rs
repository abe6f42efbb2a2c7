//! The least load generator: closed loops of pipelined GETs or SETs of fixed length, on one ring.
//!
//! ```text
//! ring_load [--to 127.0.0.1:7777] [--core 1] [--test get|set] [--connections 50] [--pipeline 1] [--keys 100000]
//!           [--value 64] [--seconds 2] [--no-load]
//! ```
//!
//! Prints operations per second. Replies are counted by their length, so each must be the expected one; `--no-load` skips
//! writing the keys first (an echo server needs none). The real tool is `gridkv-bench`.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use gridkv_net::ring::{ConnId, Event, Ring, RingConfig, RingPort};

const WARM_UP: Duration = Duration::from_millis(300);

struct Load {
    set: bool,
    keys: u64,
    pipeline: usize,
    value: Vec<u8>,
    reply: usize,
    random: u64,
    done: u64,
    conns: Vec<Conn>,
}

#[derive(Default)]
struct Conn {
    received: usize,
    buf: Vec<u8>,
    /// The batch was answered before its buffer came back.
    due: bool,
}

impl Load {
    fn batch(&mut self, mut buf: Vec<u8>) -> Vec<u8> {
        for _ in 0..self.pipeline {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            request(&mut buf, self.set, self.random % self.keys, &self.value);
        }
        buf
    }

    fn on_event(&mut self, port: &mut RingPort<'_>, event: Event<'_>) {
        match event {
            Event::Connected { conn } => {
                if self.conns.len() <= conn.index() {
                    self.conns.resize_with(conn.index() + 1, Conn::default);
                }
                self.start(port, conn);
            }
            Event::Data { conn, bytes } => {
                let want = self.reply * self.pipeline;
                let state = &mut self.conns[conn.index()];
                state.received += bytes.len();
                assert!(state.received <= want, "longer replies than expected: {:?}", String::from_utf8_lossy(bytes));
                if state.received == want {
                    state.received = 0;
                    self.done += self.pipeline as u64;
                    if port.is_sending(conn) {
                        self.conns[conn.index()].due = true;
                    } else {
                        self.start(port, conn);
                    }
                }
            }
            Event::Sent { conn, buf } => {
                let state = &mut self.conns[conn.index()];
                state.buf = buf;
                if std::mem::take(&mut state.due) {
                    self.start(port, conn);
                }
            }
            Event::Eof { .. } => panic!("the server hung up"),
            Event::Closed { error, .. } => panic!("the connection broke: {error:?}"),
            _ => {}
        }
    }

    fn start(&mut self, port: &mut RingPort<'_>, conn: ConnId) {
        let buf = std::mem::take(&mut self.conns[conn.index()].buf);
        let batch = self.batch(buf);
        port.send(conn, batch).expect("the last batch was answered, so it was sent");
    }
}

fn request(buf: &mut Vec<u8>, set: bool, key: u64, value: &[u8]) {
    buf.extend_from_slice(if set { b"*3\r\n$3\r\nSET\r\n$16\r\nkey:" } else { b"*2\r\n$3\r\nGET\r\n$16\r\nkey:" });
    let mut digits = [b'0'; 12];
    let mut rest = key;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    buf.extend_from_slice(&digits);
    buf.extend_from_slice(b"\r\n");
    if set {
        write!(buf, "${}\r\n", value.len()).expect("a Vec takes all");
        buf.extend_from_slice(value);
        buf.extend_from_slice(b"\r\n");
    }
}

fn fill(to: SocketAddr, keys: u64, value: &[u8]) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    for from in (0..keys).step_by(1000) {
        let mut buf = Vec::new();
        let upto = keys.min(from + 1000);
        (from..upto).for_each(|key| request(&mut buf, true, key, value));
        stream.write_all(&buf)?;
        let mut replies = vec![0; 5 * (upto - from) as usize];
        stream.read_exact(&mut replies)?;
        assert!(replies.starts_with(b"+OK\r\n"), "{}", String::from_utf8_lossy(&replies));
    }
    Ok(())
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
    let to: SocketAddr = arg("--to").unwrap_or_else(|| "127.0.0.1:7777".into()).parse().expect("an address");
    let set = arg("--test").is_some_and(|test| test == "set");
    let value = vec![b'x'; number("--value", 64) as usize];
    let keys = number("--keys", 100_000);
    if !args.iter().any(|a| a == "--no-load") {
        fill(to, keys, &value)?;
    }
    let reply = if set { 5 } else { format!("${}\r\n", value.len()).len() + value.len() + 2 };
    let pipeline = number("--pipeline", 1) as usize;
    let mut load =
        Load { set, keys, pipeline, value, reply, random: 0x9e37_79b9_7f4a_7c15, done: 0, conns: Vec::new() };

    let mut ring = Ring::new(RingConfig::default()).map_err(io::Error::other)?;
    for _ in 0..number("--connections", 50) {
        ring.connect(to).map_err(io::Error::other)?;
    }
    let length = Duration::from_secs(number("--seconds", 2));
    let mut start = Instant::now();
    let mut warm = false;
    loop {
        for _ in 0..64 {
            ring.turn(&mut |port, event| load.on_event(port, event))?;
        }
        let elapsed = start.elapsed();
        if !warm && elapsed >= WARM_UP {
            (warm, load.done, start) = (true, 0, Instant::now());
        } else if warm && elapsed >= length {
            println!("{:.0}", load.done as f64 / elapsed.as_secs_f64());
            if args.iter().any(|a| a == "--counters") {
                eprintln!("{:?}", ring.counters());
            }
            return Ok(());
        }
    }
}
