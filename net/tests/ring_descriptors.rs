//! A listener outlives a process that runs out of descriptors. A process of its own: the limit is the process's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use gridkv_net::ring::{Event, Ring, RingConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Greets whom it accepts, and drops who leaves.
fn turn(ring: &mut Ring, accepted: &mut usize) {
    ring.turn(&mut |port, event| match event {
        Event::Accepted { conn, .. } => {
            *accepted += 1;
            port.send(conn, b"hello".to_vec()).unwrap();
        }
        Event::Eof { conn } => port.close(conn),
        _ => {}
    })
    .unwrap();
}

fn open_descriptors() -> u64 {
    std::fs::read_dir("/proc/self/fd").unwrap().count() as u64
}

#[test]
fn without_descriptors_accepting_rests_and_then_goes_on() {
    let mut ring = Ring::new(RingConfig::default()).unwrap();
    let (_, addr): (_, SocketAddr) = ring.listen("127.0.0.1:0".parse().unwrap(), 64).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut accepted = 0;
    // The clients' descriptors are made first; accepting then finds none left.
    let waiting: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let usual = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(open_descriptors() + 2), ..usual }).unwrap();
    while ring.counters().accept_errors < 3 {
        assert!(Instant::now() < deadline, "{ring:?}");
        turn(&mut ring, &mut accepted);
        ring.wait(Some(Duration::from_millis(10))).unwrap();
    }
    // Three failures with a rest of 100 ms after each of the first two: it neither spun nor gave up.
    assert!(ring.counters().enters < 1000, "{ring:?}");
    assert!(accepted < 8);
    setrlimit(Resource::Nofile, usual).unwrap();
    while accepted < 8 {
        assert!(Instant::now() < deadline, "{ring:?}");
        turn(&mut ring, &mut accepted);
        ring.wait(Some(Duration::from_millis(10))).unwrap();
    }
    turn(&mut ring, &mut accepted);
    for mut stream in waiting {
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
        stream.write_all(b"x").unwrap();
    }
}
