//! What a node bears: clients that lie, flood, stall or vanish, signals at bad moments, and a world that
//! does not let it start. In every case the node answers or refuses with one clear line, keeps its memory
//! bounded, and goes on serving everybody else.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::resp::{Client, Reply, encode};
use support::{Node, PATIENCE, refused, until};

const MIB: u64 = 1 << 20;

// ---- starting ----------------------------------------------------------------------------------------------------

/// A refusal is an exit code and a readable line, never a panic or a stack trace.
fn assert_plain(refusal: &support::Refusal, words: &[&str]) {
    assert!(!refusal.status.success(), "it should have refused:\n{}", refusal.output);
    let text = refusal.output.to_lowercase();
    for word in words {
        assert!(text.contains(&word.to_lowercase()), "no {word:?} in:\n{}", refusal.output);
    }
    assert!(!text.contains("panicked"), "{}", refusal.output);
    let lines = refusal.output.lines().filter(|line| !line.trim().is_empty()).count();
    assert!((1..=12).contains(&lines), "one error and a hint, not {lines} lines:\n{}", refusal.output);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let http = support::free_address().to_string();
    assert_plain(&refused(&["--listen", &address, "--http", &http, "--cores", "1"]), &[&address, "in use"]);
    assert_plain(&refused(&["--listen", &http, "--http", &address, "--cores", "1"]), &[&address, "in use"]);
}

#[test]
fn two_nodes_on_one_port_do_not_share_it_by_accident() {
    let node = Node::with_cores(1);
    let http = support::free_address().to_string();
    let refusal = refused(&["--listen", &node.resp.to_string(), "--http", &http, "--cores", "1"]);
    assert_plain(&refusal, &[&node.resp.to_string(), "in use"]);
}

#[test]
fn a_core_that_does_not_exist_is_named() {
    let (resp, http) = (support::free_address().to_string(), support::free_address().to_string());
    assert_plain(&refused(&["--listen", &resp, "--http", &http, "--cores", "0,1999"]), &["1999", "core"]);
}

#[test]
fn options_that_make_no_sense_are_named() {
    assert_plain(&refused(&["--shards", "100"]), &["100"]);
    assert_plain(&refused(&["--backend", "abacus"]), &["abacus"]);
    assert_plain(&refused(&["--maxmemory", "lots"]), &["lots"]);
    assert_plain(&refused(&["--listen", "not an address"]), &["not an address"]);
    assert_plain(&refused(&["--config", "/nonexistent/gridkv.toml"]), &["/nonexistent/gridkv.toml"]);
}

#[test]
fn a_configuration_file_with_an_unknown_word_is_refused() {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("unknown-word.toml");
    std::fs::write(&path, "lissten = \"127.0.0.1:1\"\n").expect("a file in target/tmp");
    assert_plain(&refused(&["--config", path.to_str().expect("a plain path")]), &["lissten"]);
    std::fs::write(&path, "listen = = 3\n").expect("a file in target/tmp");
    assert_plain(&refused(&["--config", path.to_str().expect("a plain path")]), &["unknown-word.toml"]);
}

// ---- stopping ----------------------------------------------------------------------------------------------------

#[test]
fn sigterm_and_sigint_stop_an_idle_node_with_success() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut node = Node::with_cores(2);
        let mut client = node.connect();
        assert_eq!(client.call(&["SET", "k", "v"]), Reply::ok());
        node.signal(signal);
        let status = node.wait();
        assert_eq!(status.code(), Some(0), "{status}:\n{}", node.output());
        assert_eq!(client.try_receive(), None, "the connection was closed");
    }
}

/// Clients in full flight when the signal arrives: each sees whole replies and then the end, and the node ends with 0.
#[test]
fn sigterm_under_load_cuts_no_reply_in_half() {
    let mut node = Node::with_cores(2);
    let replies = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for worker in 0..8 {
            let (replies, mut client) = (&replies, node.connect());
            scope.spawn(move || {
                for round in 0.. {
                    let batch: Vec<u8> = (0..32)
                        .flat_map(|n| encode(&["SET".into(), format!("k{worker}:{n}"), format!("{round:0>100}")]))
                        .collect();
                    if client.socket().write_all(&batch).is_err() {
                        return;
                    }
                    for _ in 0..32 {
                        match client.try_receive() {
                            Some(reply) => assert_eq!(reply, Reply::ok()),
                            None => return,
                        }
                        replies.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        until("the load flows", || (replies.load(Ordering::Relaxed) > 5_000).then_some(()));
        node.signal(libc::SIGTERM);
        let status = node.wait();
        assert_eq!(status.code(), Some(0), "{status}:\n{}", node.output());
    });
}

#[test]
fn shutdown_as_a_command_stops_the_node() {
    let mut node = Node::with_cores(2);
    let mut client = node.connect();
    client.send_raw(&encode(&["SHUTDOWN", "NOSAVE"]));
    assert_eq!(node.wait().code(), Some(0));
    assert_eq!(client.try_receive(), None);
}

// ---- malformed bytes ---------------------------------------------------------------------------------------------

/// What Redis answers to each of these, and then closes.
#[test]
fn protocol_errors_have_redis_texts() {
    let mut node = Node::with_cores(1);
    for (bytes, text) in [
        (&b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$2000000000\r\n"[..], "Protocol error: invalid bulk length"),
        (b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$-10\r\n", "Protocol error: invalid bulk length"),
        (b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\nfooz\r\n", "Protocol error: expected '$', got 'f'"),
        (b"*20000000000\r\n", "Protocol error: invalid multibulk length"),
        (b"*x\r\n", "Protocol error: invalid multibulk length"),
        (b"SET \"unbalanced\r\n", "Protocol error: unbalanced quotes in request"),
    ] {
        let mut client = node.connect();
        client.send_raw(bytes);
        assert_eq!(client.receive(), Reply::Error(format!("ERR {text}")), "{}", bytes.escape_ascii());
        assert_eq!(client.try_receive(), None, "closed after {}", bytes.escape_ascii());
    }
    node.assert_well();
}

#[test]
fn empty_requests_are_ignored() {
    let node = Node::with_cores(1);
    let mut client = node.connect();
    client.send_raw(b"\r\n\r\n*0\r\n*-1\r\n   \r\nPING\r\n");
    assert_eq!(client.receive(), Reply::Simple("PONG".into()));
}

/// A line without an end is cut off at a limit, long before memory matters.
#[test]
fn an_endless_line_is_cut_off() {
    let mut node = Node::with_cores(1);
    for first in [b'a', b'*', b'$'] {
        let mut client = node.connect();
        client.socket().set_write_timeout(Some(Duration::from_secs(20))).expect("an option of a socket");
        let line = vec![first; 64 * 1024];
        let started = Instant::now();
        let mut sent = 0_u64;
        while client.socket().write_all(&line).is_ok() {
            sent += line.len() as u64;
            assert!(sent < 512 * MIB && started.elapsed() < PATIENCE, "the node swallowed {sent} bytes of one line");
        }
        let said = String::from_utf8_lossy(&client.drain()).into_owned();
        assert!(said.is_empty() || said.starts_with("-ERR"), "{said}");
    }
    node.assert_well();
}

/// Random bytes, random cuts of good requests, good requests with one byte changed.
#[test]
fn noise_hurts_nobody() {
    let mut node = Node::with_cores(2);
    let mut state = 0x5eed_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let good: Vec<u8> = (0..20).flat_map(|n| encode(&["SET".to_owned(), format!("k{n}"), "v".repeat(n * 7)])).collect();
    for round in 0..400 {
        let mut bytes: Vec<u8> = match round % 3 {
            0 => (0..next() % 3000).map(|_| next() as u8).collect(),
            1 => good[..(next() as usize) % good.len()].to_vec(),
            _ => good.clone(),
        };
        if round % 3 == 2 {
            for _ in 0..=next() % 3 {
                let at = (next() as usize) % bytes.len();
                bytes[at] = next() as u8;
            }
        }
        let mut client = node.connect();
        // The node may close as soon as it has seen enough.
        let _ = client.socket().write_all(&bytes);
        let _ = client.socket().shutdown(Shutdown::Write);
        client.drain();
    }
    node.assert_well();
}

/// One byte per packet is slow, but not wrong.
#[test]
fn requests_may_come_byte_by_byte() {
    let node = Node::with_cores(2);
    let mut client = node.connect();
    for byte in encode(&["SET", "key", "a value\r\nwith a line break"]).into_iter().chain(*b"GET key\r\n") {
        client.send_raw(&[byte]);
    }
    assert_eq!(client.receive(), Reply::ok());
    assert_eq!(client.receive(), Reply::bulk("a value\r\nwith a line break"));
}

// ---- clients that flood, stall or vanish -------------------------------------------------------------------------

/// Asks for replies without ever reading one, until the node takes no more; returns how many were asked for.
fn ask_until_blocked(stream: &mut TcpStream, request: &[u8]) -> u64 {
    stream.set_nonblocking(true).expect("an option of a socket");
    let batch = request.repeat((64 * 1024 / request.len()).max(1));
    let mut sent = 0_u64;
    let mut stalled_since = Instant::now();
    while sent < 256 * MIB {
        match stream.write(&batch[(sent as usize) % request.len()..]) {
            Ok(0) => break,
            Ok(count) => {
                sent += count as u64;
                stalled_since = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if stalled_since.elapsed() > Duration::from_secs(2) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            // The node may also choose to close.
            Err(_) => break,
        }
    }
    sent / request.len() as u64
}

/// A client that never reads costs a bounded amount of memory: the node stops reading from it.
#[test]
fn a_client_that_never_reads_costs_bounded_memory() {
    let mut node = Node::with_cores(2);
    let mut client = node.connect();
    for n in 0..8 {
        assert_eq!(client.call(&[b"SET".as_slice(), format!("big{n}").as_bytes(), &vec![b'x'; 1 << 20]]), Reply::ok());
    }
    let before = node.resident_bytes();
    let mut lazy: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(node.resp).expect("a connection")).collect();
    let asked: u64 = lazy
        .iter_mut()
        .enumerate()
        .map(|(n, stream)| ask_until_blocked(stream, &encode(&["GET".to_owned(), format!("big{n}")])))
        .sum();
    let grown = node.resident_bytes().saturating_sub(before);
    println!("{asked} replies of 1 MiB were asked for and not read; the node grew by {} MiB", grown / MIB);
    assert!(asked > 1_000, "the node should take some requests before it stops: {asked}");
    assert!(grown < 512 * MIB, "grew by {} MiB for 8 clients that never read", grown / MIB);
    node.assert_well();
    drop(lazy);
    until("the memory of closed connections comes back", || (node.resident_bytes() < before + 256 * MIB).then_some(()));
}

/// A client that reads late gets everything, in order.
#[test]
fn a_client_that_reads_late_gets_every_reply_in_order() {
    const ASKED: usize = 4_000;
    let node = Node::with_cores(2);
    let mut client = node.connect();
    for n in 0..50 {
        assert_eq!(client.call(&["SET".to_owned(), format!("k{n}"), format!("{n:0>16384}")]), Reply::ok());
    }
    let mut sender = client.socket().try_clone().expect("a second handle");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for n in 0..ASKED {
                sender
                    .write_all(&encode(&["GET".to_owned(), format!("k{}", n % 50)]))
                    .expect("the node takes requests again");
            }
        });
        // Only now does the client start to read; most requests wait in the node or in the sockets.
        until("the other clients are served meanwhile", || {
            (node.connect().call(&["PING"]) == Reply::Simple("PONG".into())).then_some(())
        });
        for n in 0..ASKED {
            assert_eq!(client.receive(), Reply::bulk(format!("{:0>16384}", n % 50)), "reply {n}");
        }
    });
}

/// A huge pipeline in one go, over all cores, with replies read at the end.
#[test]
fn a_pipeline_of_a_hundred_thousand_is_answered_in_order() {
    const COUNT: usize = 100_000;
    let node = Node::with_cores(2);
    let mut client = node.connect();
    let mut sender = client.socket().try_clone().expect("a second handle");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let bytes: Vec<u8> =
                (0..COUNT).flat_map(|n| encode(&["INCRBY".to_owned(), format!("k{}", n % 997), "1".into()])).collect();
            sender.write_all(&bytes).expect("the node takes it");
        });
        for n in 0..COUNT {
            assert_eq!(client.receive(), Reply::Integer((n / 997) as i64 + 1), "reply {n}");
        }
    });
}

/// Lets this test process hold thousands of sockets.
fn raise_file_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a pointer to a whole rlimit that lives on this stack frame.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
    limit.rlim_cur
}

/// A client that does not read what it asked for can be closed all the same.
#[test]
fn a_client_that_never_reads_can_be_killed() {
    let mut node = Node::with_cores(2);
    let mut client = node.connect();
    assert_eq!(client.call(&[b"SET".as_slice(), b"big", &vec![b'x'; 1 << 20]]), Reply::ok());
    let mut lazy = node.connect();
    let id = lazy.call(&["CLIENT", "ID"]).integer();
    ask_until_blocked(&mut lazy.socket().try_clone().expect("a copy"), &encode(&["GET", "big"]));
    assert_eq!(client.call(&["CLIENT", "KILL", "ID", &id.to_string()]), Reply::Integer(1));
    until("the client is gone", || {
        let listed = String::from_utf8_lossy(client.call(&["CLIENT", "LIST"]).bytes()).into_owned();
        (!listed.lines().any(|line| line.starts_with(&format!("id={id} ")))).then_some(())
    });
    node.assert_well();
}

/// An HTTP client that asks and asks and never reads costs a bounded amount of memory.
#[test]
fn an_http_client_that_never_reads_costs_bounded_memory() {
    let mut node = Node::with_cores(1);
    let before = node.resident_bytes();
    let mut lazy = TcpStream::connect(node.http).expect("a connection");
    ask_until_blocked(&mut lazy, b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n");
    let grown = node.resident_bytes().saturating_sub(before);
    assert!(grown < 32 * MIB, "grew by {} MiB", grown / MIB);
    node.assert_well();
}

/// Thousands of connections at once, all of them served, and nothing left of them afterwards.
#[test]
fn thousands_of_connections_come_and_go() {
    let count = (raise_file_limit() / 2).min(3_000) as usize;
    let mut node = Node::with_cores(2);
    let idle = node.open_files();
    for round in 0..2 {
        let mut clients: Vec<Client> = (0..count).map(|_| node.connect()).collect();
        for (n, client) in clients.iter_mut().enumerate() {
            client.send_raw(&encode(&["SET".to_owned(), format!("k{n}"), format!("{round}")]));
        }
        for client in &mut clients {
            assert_eq!(client.receive(), Reply::ok());
        }
        drop(clients);
        until("the node has closed what its clients closed", || (node.open_files() <= idle + 20).then_some(()));
    }
    node.assert_well();
}

/// Connections that are opened and dropped at once, some in the middle of a request, some without reading the reply.
#[test]
fn connections_that_vanish_leak_nothing() {
    let mut node = Node::with_cores(2);
    let mut client = node.connect();
    assert_eq!(client.call(&[b"SET".as_slice(), b"big", &vec![0; 200_000]]), Reply::ok());
    let churn = |rounds: usize| {
        for n in 0..rounds {
            let mut stream = TcpStream::connect(node.resp).expect("a connection");
            let _ = match n % 4 {
                0 => Ok(()),
                1 => stream.write_all(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$100000\r\nonly a part"),
                2 => stream.write_all(&encode(&["GET", "big"]).repeat(20)),
                _ => stream.write_all(&encode(&["MGET", "a", "b", "big", "c", "d"])),
            };
        }
    };
    churn(1_000);
    let files = node.open_files();
    // The allocator keeps what a burst of vanishing connections needed at once, so a round may cost memory. A leak would cost
    // it in every round.
    let mut memory = node.resident_bytes();
    let settled = (0..10).any(|_| {
        churn(2_000);
        until("the files of vanished connections are closed", || (node.open_files() <= files + 20).then_some(()));
        let before = std::mem::replace(&mut memory, node.resident_bytes());
        memory < before + 16 * MIB
    });
    assert!(settled, "every one of ten rounds of 2000 vanishing connections cost 16 MiB or more");
    node.assert_well();
}

/// Half a request is no reason to keep others waiting, however many do it.
#[test]
fn half_requests_do_not_block_others() {
    let mut node = Node::with_cores(1);
    let stuck: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = TcpStream::connect(node.resp).expect("a connection");
            stream.write_all(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5000000\r\nabc").expect("the node takes it");
            stream
        })
        .collect();
    let mut client = node.connect();
    for n in 0..1_000 {
        assert_eq!(client.call(&["INCR", "n"]), Reply::Integer(n + 1));
    }
    // Announced bytes are not reserved before they come.
    assert!(node.resident_bytes() < 600 * MIB, "{} MiB", node.resident_bytes() / MIB);
    drop(stuck);
    node.assert_well();
}

// ---- limits ------------------------------------------------------------------------------------------------------

#[test]
fn connections_beyond_the_limit_are_told_so() {
    let node = Node::start(&["--cores", "1", "--max-connections", "10"]);
    let mut kept = Vec::new();
    let refusal = until("a connection is refused", || {
        let mut client = node.connect();
        client.send_raw(&encode(&["PING"]));
        match client.try_receive() {
            Some(Reply::Simple(_)) => {
                kept.push(client);
                assert!(kept.len() <= 10, "more than the limit were served");
                None
            }
            other => Some(other),
        }
    });
    assert_eq!(refusal, Some(Reply::Error("ERR max number of clients reached".into())));
    assert!(kept.len() >= 8, "only {} were served", kept.len());
    assert_eq!(node.http_get("/healthz").map(|(status, _)| status), Some(200), "a probe finds a healthy node");
    drop(kept);
    until("there is room again", || {
        let mut client = node.connect();
        client.send_raw(&encode(&["PING"]));
        (client.try_receive() == Some(Reply::Simple("PONG".into()))).then_some(())
    });
}

/// Idle connections of HTTP take no client's place, and make room for each other: a probe is served.
#[test]
fn connections_of_http_are_no_clients() {
    let node = Node::start(&["--cores", "1", "--max-connections", "10"]);
    let idle: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(node.http).expect("a connection")).collect();
    // So many at once may be more than there are places until the first ones are closed.
    until("a probe is served", || (node.http_get("/healthz")?.0 == 200).then_some(()));
    let mut clients: Vec<Client> = (0..10).map(|_| node.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.call(&["PING"]), Reply::Simple("PONG".into()));
    }
    // The one that was silent for longest is closed; the last one is not.
    let (mut first, mut last) = (&idle[0], TcpStream::connect(node.http).expect("a connection"));
    first.set_read_timeout(Some(Duration::from_secs(20))).expect("an option of a socket");
    assert_eq!(first.read(&mut [0]).expect("the end of the stream"), 0);
    last.write_all(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").expect("it is open");
    let mut text = String::new();
    last.read_to_string(&mut text).expect("an answer");
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
}

/// Beyond `maxmemory` writes are refused with Redis's text, reads and deletes go on, and room that is made is used.
#[test]
fn maxmemory_is_enforced() {
    let mut node = Node::start(
        &["--cores", "2", "--maxmemory", "32mb"]
            .map(|word| if word == "2" && support::cpus() < 2 { "1" } else { word }),
    );
    let mut client = node.connect();
    let value = vec![b'v'; 10_000];
    let mut refused = 0;
    let mut stored = Vec::new();
    for n in 0..10_000 {
        let key = format!("k{n}");
        match client.call(&[b"SET".as_slice(), key.as_bytes(), &value]) {
            Reply::Simple(_) => stored.push(key),
            Reply::Error(text) => {
                assert_eq!(text, "OOM command not allowed when used memory > 'maxmemory'.");
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    let bytes = stored.len() as u64 * 10_000;
    assert!(refused > 5_000 && (16 * MIB..=34 * MIB).contains(&bytes), "{} MiB stored, {refused} refused", bytes / MIB);
    assert!(node.resident_bytes() < 400 * MIB);
    for key in &stored {
        assert_eq!(client.call(&["STRLEN", key]), Reply::Integer(10_000));
    }
    for key in &stored {
        assert_eq!(client.call(&["DEL", key]), Reply::Integer(1));
    }
    until("room that was made can be used", || {
        (!client.call(&[b"SET".as_slice(), b"again", &value]).is_error()).then_some(())
    });
    node.assert_well();
}

#[test]
fn a_password_is_asked_for() {
    let node = Node::start(&["--cores", "1", "--requirepass", "open sesame"]);
    let mut client = node.connect();
    assert_eq!(client.call(&["GET", "k"]), Reply::Error("NOAUTH Authentication required.".into()));
    assert!(matches!(client.call(&["AUTH", "wrong"]), Reply::Error(text) if text.starts_with("WRONGPASS")));
    assert_eq!(client.call(&["AUTH", "open sesame"]), Reply::ok());
    assert_eq!(client.call(&["SET", "k", "v"]), Reply::ok());
    let mut client = node.connect();
    assert!(matches!(client.call(&["HELLO", "3", "AUTH", "default", "open sesame"]), Reply::Map(_)));
    assert_eq!(client.call(&["GET", "k"]), Reply::bulk("v"));
}

// ---- HTTP --------------------------------------------------------------------------------------------------------

#[test]
fn the_metrics_page_counts_what_was_done() {
    let node = Node::with_cores(2);
    let mut client = node.connect();
    for n in 0..100 {
        assert_eq!(client.call(&["SET".to_owned(), format!("k{n}"), "v".into()]), Reply::ok());
    }
    let (status, body) = node.http_get("/metrics").expect("an answer");
    assert_eq!(status, 200);
    assert!(body.contains("# TYPE") && body.contains("# HELP"), "{body}");
    assert!(body.lines().any(|line| line.starts_with("gridkv_") && !line.starts_with('#')), "{body}");
    assert_eq!(node.http_get("/healthz").expect("an answer").0, 200);
    assert_eq!(node.http_get("/nothing-here").expect("an answer").0, 404);
}

/// The HTTP port is as hard to hurt as the other one.
#[test]
fn noise_on_the_http_port_hurts_nobody() {
    let mut node = Node::with_cores(1);
    for bytes in [
        &b"\0\xff\r\n\r\n"[..],
        b"GET",
        b"GET /metrics",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        &[b'a'; 200_000],
    ] {
        let mut stream = TcpStream::connect(node.http).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("an option of a socket");
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let silent: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(node.http).expect("a connection")).collect();
    assert_eq!(node.http_get("/healthz").expect("an answer beside silent connections").0, 200);
    drop(silent);
    node.assert_well();
}

/// Raises a flag when it is dropped.
struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// While one client is served a flood, a second one gets its answers: no connection starves another.
#[test]
fn a_flood_does_not_starve_others() {
    let node = Node::with_cores(1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (stop, mut client) = (&stop, node.connect());
            scope.spawn(move || {
                let commands: Vec<Vec<Vec<u8>>> =
                    (0..1_000).map(|n| vec![b"GET".to_vec(), format!("k{n}").into_bytes()]).collect();
                while !stop.load(Ordering::Relaxed) {
                    client.pipeline(&commands);
                }
            });
        }
        // However this ends, the flood must end with it, or the scope would wait for ever.
        let _flood = Raise(&stop);
        let mut client = node.connect();
        let mut slowest = Duration::ZERO;
        for n in 0..500 {
            let asked = Instant::now();
            assert_eq!(client.call(&["INCR", "n"]), Reply::Integer(n + 1));
            slowest = slowest.max(asked.elapsed());
        }
        println!("slowest answer beside a flood: {slowest:?}");
        assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    });
}
