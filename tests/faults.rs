//! A request that panics is answered with an error, counted, and hurts nothing else. The panic comes from a hook that
//! is compiled into test builds only.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use futures_lite::future::block_on;
use gridkv::GridKv;

/// The argument that makes a request panic; see `src/fault.rs`.
const PANIC: &[u8] = b"\0gridkv: panic here\0";

struct Client(TcpStream);

impl Client {
    fn connect(db: &GridKv) -> Client {
        let socket = TcpStream::connect(db.resp_addr().expect("the node listens")).expect("a connection");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a deadline");
        Client(socket)
    }

    fn send(&mut self, words: &[&[u8]]) {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        self.0.write_all(&bytes).expect("the node reads");
    }

    /// That many lines of replies.
    fn lines(&mut self, count: usize) -> Vec<String> {
        let mut lines = vec![String::new()];
        while lines.len() <= count {
            let mut byte = [0];
            self.0.read_exact(&mut byte).expect("the node answers");
            match byte[0] {
                b'\n' => lines.push(String::new()),
                b'\r' => {}
                other => lines.last_mut().expect("there is one").push(char::from(other)),
            }
        }
        lines.truncate(count);
        lines
    }
}

fn node() -> GridKv {
    GridKv::builder().cores("2").unwrap().listen("127.0.0.1:0".parse().unwrap()).start().unwrap()
}

#[test]
fn a_panicking_request_is_answered_and_its_neighbours_are_not_hurt() {
    let db = node();
    let (mut client, mut bystander) = (Client::connect(&db), Client::connect(&db));
    // Keys of both cores, so that the panic happens beside the session and at its sibling.
    for n in 0..16 {
        let (key, other) = (format!("key:{n}"), format!("other:{n}"));
        client.send(&[b"SET", other.as_bytes(), b"before"]);
        client.send(&[b"APPEND", key.as_bytes(), PANIC]);
        client.send(&[b"GET", other.as_bytes()]);
        client.send(&[b"EXISTS", key.as_bytes()]);
        let replies = client.lines(5);
        assert_eq!(replies[0], "+OK");
        assert!(replies[1].starts_with("-ERR internal error"), "{replies:?}");
        assert_eq!(replies[2..], ["$6", "before", ":0"]);
        bystander.send(&[b"PING"]);
        assert_eq!(bystander.lines(1), ["+PONG"]);
    }
    let stats = block_on(db.stats()).unwrap().total();
    assert_eq!(stats.panics, 16);
    block_on(db.close()).unwrap();
}

#[test]
fn a_panic_inside_a_transaction_is_that_commands_error() {
    let db = node();
    let mut client = Client::connect(&db);
    for n in 0..8 {
        let key = format!("key:{n}");
        client.send(&[b"MULTI"]);
        client.send(&[b"SET", key.as_bytes(), b"1"]);
        client.send(&[b"APPEND", key.as_bytes(), PANIC]);
        client.send(&[b"INCR", key.as_bytes()]);
        client.send(&[b"EXEC"]);
        let replies = client.lines(8);
        assert_eq!(replies[4..6], ["*3", "+OK"]);
        assert!(replies[6].starts_with("-ERR internal error"), "{replies:?}");
        assert_eq!(replies[7], ":2");
    }
    block_on(db.close()).unwrap();
}

#[test]
fn a_panic_in_application_code_is_that_tasks_error() {
    let db = node();
    block_on(async {
        let result = db.on_core(1, |_| async { panic!("on purpose") }).await;
        assert!(matches!(result, Err(gridkv::Error::Panicked)), "{result:?}");
        db.set("k", "v").await.unwrap();
        assert_eq!(db.get("k").await.unwrap().unwrap(), "v");
        db.close().await.unwrap();
    });
}
