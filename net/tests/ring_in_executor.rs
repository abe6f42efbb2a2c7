//! The ring as a core drives it: a task of an executor that must never block, asleep on the ring's eventfd between
//! requests. A lost wake-up would hang the client, whose read has a deadline.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::channel;
use std::time::Duration;

use glommio::{LocalExecutorBuilder, Placement};
use gridkv_net::ring::{Event, Ring, RingConfig};
use gridkv_net::sleeper::Sleeper;

#[test]
fn a_sleeping_core_is_woken_by_each_request() {
    let (tell, told) = channel::<SocketAddr>();
    let core = LocalExecutorBuilder::new(Placement::Unbound)
        .io_memory(64 << 10)
        .spawn(move || async move {
            let mut ring = Ring::new(RingConfig::default()).unwrap();
            let (_, addr) = ring.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
            tell.send(addr).unwrap();
            let sleeper = Sleeper::new(vec![ring.wake_fd().try_clone_to_owned().unwrap()]);
            let (mut open, mut served, mut slept) = (true, 0, 0);
            while open || ring.has_work() {
                ring.turn(&mut |port, event| match event {
                    Event::Data { conn, bytes } => {
                        served += bytes.len();
                        port.send(conn, bytes.to_vec()).unwrap();
                    }
                    Event::Eof { conn } => port.close(conn),
                    Event::Closed { .. } => open = false,
                    _ => {}
                })
                .unwrap();
                if ring.has_work() {
                    continue;
                }
                // No spinning: sleep whenever there is nothing to do.
                ring.set_wakeups(true);
                if open && !ring.has_work() {
                    slept += 1;
                    sleeper.sleep().await;
                }
                ring.set_wakeups(false);
            }
            (served, slept)
        })
        .unwrap();
    let mut client = TcpStream::connect(told.recv().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    for round in 0..500u16 {
        client.write_all(&round.to_le_bytes()).unwrap();
        let mut back = [0; 2];
        client.read_exact(&mut back).expect("the core woke up");
        assert_eq!(u16::from_le_bytes(back), round);
    }
    drop(client);
    let (served, slept) = core.join().unwrap();
    assert_eq!(served, 1000);
    assert!(slept > 0);
}
