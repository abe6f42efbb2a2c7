//! Data that is kept on disk: nodes that are killed, stopped, torn and damaged, and started again in the same directory.
//!
//! What a client was answered is what must be there afterwards. A kill takes nothing that was answered, whatever `fsync` is, as
//! the operating system lives on; what only a power failure does is for the tests of the engine, which cut files.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use gridkv::config::Fsync;
use gridkv::{Error, GridKv};
use support::resp::{Client, Reply, encode};
use support::{Node, Refusal, cpus, refused, until};

const SHARDS: &str = "32";

/// A directory of its own, gone at the end of the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Directory(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("kept-{}-{count}", std::process::id())))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path that can be printed")
    }

    /// Starts a node here, on so many cores or fewer where the machine has fewer.
    fn start(&self, cores: usize, fsync: &str) -> Node {
        let cores = cores.min(cpus()).to_string();
        let flags = ["--backend", "file", "--dir", self.path(), "--shards", SHARDS];
        Node::start(&[&flags[..], &["--cores", &cores, "--fsync", fsync]].concat())
    }

    /// What a node said that must refuse to start here.
    fn refused(&self, flags: &[&str]) -> Refusal {
        let here = ["--backend", "file", "--dir", self.path(), "--peer-listen", "none", "--cores", "1"];
        let refusal = refused(&[&here[..], &["--listen", "127.0.0.1:0", "--http", "none"], flags].concat());
        assert_eq!(refusal.status.code(), Some(1), "{}", refusal.output);
        refusal
    }

    /// The names of all files of the data, in order.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.join("data")).expect("there is data");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("a folder can be listed").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The newest of the files that end so.
    fn newest(&self, kind: &str) -> PathBuf {
        let name = self.names().into_iter().rfind(|name| name.ends_with(kind));
        self.0.join("data").join(name.unwrap_or_else(|| panic!("no {kind} in {:?}", self.names())))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

fn stop(mut node: Node) {
    node.signal(libc::SIGTERM);
    assert!(node.wait().success(), "{}", node.output());
}

fn kill(node: &mut Node) {
    node.signal(libc::SIGKILL);
    assert!(!node.wait().success());
}

fn metric(node: &Node, name: &str) -> u64 {
    let (_, page) = node.http_get("/metrics").expect("the node answers");
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {page}")).parse().expect("a number")
}

/// Waits until everything that was appended is on disk.
fn until_synced(node: &Node) {
    until("the log is on disk", || {
        let written = metric(node, "gridkv_log_written_bytes_total");
        (metric(node, "gridkv_log_synced_bytes_total") == written).then_some(())
    });
}

/// Has every core take a snapshot, and waits for all of them.
fn snapshot(node: &Node) {
    let cores = metric(node, "gridkv_cores");
    let done = metric(node, "gridkv_snapshots_total") + cores;
    let mut client = node.connect();
    until("a snapshot begins", || {
        let begun = client.call(&["BGSAVE"]);
        (begun == Reply::Simple("Background saving started".into())).then_some(())
    });
    until("every core has taken a snapshot", || (metric(node, "gridkv_snapshots_total") >= done).then_some(()));
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is past 1970").as_millis() as u64
}

fn words(words: &[&[u8]]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.to_vec()).collect()
}

/// What a key has: its value, and when it expires in unix milliseconds, or -1. Nothing when there is no such key.
type Held = Option<(Vec<u8>, i64)>;

/// Of every key that somebody wrote: what it had when a write was answered last, and then what each write that was not yet answered
/// makes of it, in order.
type Known = BTreeMap<Vec<u8>, Vec<Held>>;

/// What the node has under these keys, in order.
fn held<'a>(client: &mut Client, keys: impl Iterator<Item = &'a Vec<u8>>) -> Vec<Held> {
    let keys: Vec<&Vec<u8>> = keys.collect();
    let mut held = Vec::new();
    for keys in keys.chunks(100) {
        let commands = keys.iter().flat_map(|key| [words(&[b"GET", key]), words(&[b"PEXPIRETIME", key])]);
        let replies = client.pipeline(&commands.collect::<Vec<_>>());
        held.extend(replies.chunks(2).map(|replies| match &replies[0] {
            Reply::Bulk(value) => Some((value.clone(), replies[1].integer())),
            other => {
                assert_eq!((other, replies[1].integer()), (&Reply::Null, -2));
                None
            }
        }));
    }
    held
}

/// Numbers that look like dice.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// A write: its bytes, the lines that answer it, and what it makes of which keys.
struct Order {
    bytes: Vec<u8>,
    answer: String,
    makes: Vec<(Vec<u8>, Held)>,
}

/// A client that writes under keys of its own and remembers what must be there.
struct Writer {
    number: usize,
    dice: Dice,
    written: u64,
    known: Known,
}

impl Writer {
    fn new(number: usize) -> Writer {
        Writer { number, dice: Dice(0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1)), written: 0, known: Known::new() }
    }

    /// Writes until nobody answers any more; counts answers.
    fn write(&mut self, node: std::net::SocketAddr, answered: &AtomicU64) {
        let stream = TcpStream::connect(node).expect("the node listens");
        stream.set_read_timeout(Some(support::PATIENCE)).expect("an option of a socket");
        let mut stream = BufReader::new(stream);
        loop {
            let orders: Vec<Order> = (0..=self.dice.below(24)).map(|_| self.order()).collect();
            let bytes: Vec<u8> = orders.iter().flat_map(|order| order.bytes.clone()).collect();
            // What is not taken is not answered either.
            let _ = stream.get_mut().write_all(&bytes);
            for order in orders {
                for expected in order.answer.lines() {
                    let mut line = String::new();
                    // A killed node ends in the middle of a line, or with a reset.
                    if stream.read_line(&mut line).is_err() || !line.ends_with("\r\n") {
                        let _ = stream.get_ref().shutdown(Shutdown::Both);
                        return;
                    }
                    assert_eq!(line.trim_end(), expected, "{}", String::from_utf8_lossy(&order.bytes));
                }
                for (key, _) in &order.makes {
                    self.known.get_mut(key).expect("it was written").remove(0);
                }
                answered.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A value that is like no other.
    fn value(&mut self) -> Vec<u8> {
        self.written += 1;
        let mut value = format!("{}/{}/", self.number, self.written).into_bytes();
        let longest = if self.dice.below(20) == 0 { 20_000 } else { 200 };
        value.resize(value.len() + self.dice.below(longest) as usize, b'x');
        value
    }

    /// The next write, which is noted as not yet answered.
    fn order(&mut self) -> Order {
        let (w, i) = (self.number, self.dice.below(12));
        let order = match self.dice.below(10) {
            0..=5 => self.string(format!("string:{w}:{i}").into_bytes()),
            6..=7 => self.counter(format!("counter:{w}:{i}").into_bytes()),
            _ => self.pair(format!("{{pair:{w}:{i}}}")),
        };
        for (key, held) in &order.makes {
            self.known.entry(key.clone()).or_insert_with(|| vec![None]).push(held.clone());
        }
        order
    }

    /// What is there when all that was sent is done.
    fn last(&self, key: &[u8]) -> Held {
        self.known.get(key).and_then(|states| states.last().cloned()).flatten()
    }

    fn string(&mut self, key: Vec<u8>) -> Order {
        let was = self.last(&key);
        let (value, expires) = was.clone().unwrap_or((Vec::new(), -1));
        let new = self.value();
        let (bytes, answer, held) = match self.dice.below(8) {
            0 => (encode(&[&b"DEL"[..], &key]), u8::from(was.is_some()).into(), None),
            1 if value.len() < 50_000 => {
                let whole = [value, new.clone()].concat();
                (encode(&[b"APPEND", &key[..], &new]), whole.len(), Some((whole, expires)))
            }
            2 => {
                let at = self.dice.below(value.len() as u64 + 20) as usize;
                let mut whole = value;
                whole.resize(whole.len().max(at + new.len()), 0);
                whole[at..at + new.len()].copy_from_slice(&new);
                let bytes = encode(&[b"SETRANGE", &key[..], at.to_string().as_bytes(), &new]);
                (bytes, whole.len(), Some((whole, expires)))
            }
            3 => {
                let at = (now() + (1 << 32) + self.written) as i64;
                let bytes = encode(&[b"PEXPIREAT", &key[..], at.to_string().as_bytes()]);
                (bytes, u8::from(was.is_some()).into(), was.map(|(value, _)| (value, at)))
            }
            4 => {
                let bytes = encode(&[b"PERSIST", &key[..]]);
                (bytes, u8::from(expires >= 0).into(), was.map(|(value, _)| (value, -1)))
            }
            _ => {
                let bytes = encode(&[b"SET", &key[..], &new]);
                return Order { bytes, answer: "+OK".into(), makes: vec![(key, Some((new, -1)))] };
            }
        };
        Order { bytes, answer: format!(":{answer}"), makes: vec![(key, held)] }
    }

    fn counter(&mut self, key: Vec<u8>) -> Order {
        let (was, by) = (self.last(&key), self.dice.below(1000) as i64 - 300);
        let was: i64 = was.map_or(0, |(value, _)| String::from_utf8(value).unwrap().parse().expect("a number"));
        let is = (was + by).to_string();
        let bytes = encode(&[b"INCRBY", &key[..], by.to_string().as_bytes()]);
        Order { bytes, answer: format!(":{is}"), makes: vec![(key, Some((is.into_bytes(), -1)))] }
    }

    fn pair(&mut self, tag: String) -> Order {
        let value = self.value();
        let keys = ["a", "b"].map(|end| format!("{tag}{end}").into_bytes());
        let sets = keys.iter().map(|key| encode(&[b"SET", &key[..], &value]));
        let commands = [encode(&["MULTI"])].into_iter().chain(sets).chain([encode(&["EXEC"])]);
        Order {
            bytes: commands.collect::<Vec<_>>().concat(),
            answer: "+OK\n+QUEUED\n+QUEUED\n*2\n+OK\n+OK".into(),
            makes: keys.into_iter().map(|key| (key, Some((value.clone(), -1)))).collect(),
        }
    }

    /// Asserts that the node has what was answered, and of what was not a beginning; goes on from there.
    fn check(&mut self, client: &mut Client) {
        let found = held(client, self.known.keys());
        for ((key, states), found) in self.known.iter_mut().zip(found) {
            let shown = String::from_utf8_lossy(key);
            let short = |held: &Held| {
                let held =
                    held.as_ref().map(|(value, at)| (value.len(), String::from_utf8_lossy(value).into_owned(), *at));
                held.map(|(len, text, at)| format!("{len} bytes {:.30} until {at}", text))
            };
            assert!(
                states.contains(&found),
                "{shown}: there is {:?}; answered was {:?}, sent {:?}",
                short(&found),
                short(&states[0]),
                states[1..].iter().map(short).collect::<Vec<_>>()
            );
            *states = vec![found];
        }
        for (key, states) in self.known.iter().filter(|(key, _)| key.ends_with(b"}a")) {
            let other = [&key[..key.len() - 1], b"b"].concat();
            assert_eq!(Some(states), self.known.get(&other), "half a transaction: {}", String::from_utf8_lossy(key));
        }
    }
}

/// Starts a node, checks that it has what earlier ones answered, lets the writers write, and kills it in the middle of that, when
/// so many writes were answered. `meanwhile` is called again and again until then.
fn storm(node: &mut Node, writers: &mut [Writer], enough: u64, mut meanwhile: impl FnMut(&Node)) {
    check(node, writers);
    let answered = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let running: Vec<_> = writers
            .iter_mut()
            .map(|writer| {
                let (address, answered) = (node.resp, &answered);
                scope.spawn(move || writer.write(address, answered))
            })
            .collect();
        until("enough writes were answered", || {
            meanwhile(node);
            // A writer that is through has found a wrong answer; joining it says which.
            let done = answered.load(Ordering::Relaxed) >= enough || running.iter().any(|writer| writer.is_finished());
            done.then_some(())
        });
        kill(node);
    });
    assert!(answered.into_inner() >= enough);
}

fn check(node: &Node, writers: &mut [Writer]) {
    let mut client = node.connect();
    let mut keys = 0;
    for writer in writers {
        writer.check(&mut client);
        keys += writer.known.values().filter(|states| states[0].is_some()).count();
    }
    assert_eq!(client.call(&["DBSIZE"]).integer(), keys as i64, "keys that nobody wrote, or that were deleted");
}

#[test]
fn a_kill_under_load_takes_nothing_that_was_answered() {
    let directory = Directory::new();
    let mut writers: Vec<Writer> = (0..4).map(Writer::new).collect();
    for (round, fsync) in ["always", "100ms", "never", "always", "never", "100ms"].into_iter().enumerate() {
        let mut node = directory.start(1 + round % 2, fsync);
        storm(&mut node, &mut writers, 700 + 400 * round as u64, |_| {});
    }
    let node = directory.start(1, "never");
    check(&node, &mut writers);
    stop(node);
    check(&directory.start(2, "never"), &mut writers);
}

#[test]
fn a_kill_while_snapshots_are_taken_takes_nothing_either() {
    let directory = Directory::new();
    let mut writers: Vec<Writer> = (10..14).map(Writer::new).collect();
    // Nobody writes these again: after the first snapshots only snapshots have them.
    let held = Some((vec![b'.'; 500], -1));
    writers[0].known = (0..4000).map(|n| (format!("ballast:{n}").into_bytes(), vec![held.clone()])).collect();
    let ballast: Vec<_> = writers[0].known.keys().map(|key| words(&[b"SET", key, &[b'.'; 500]])).collect();
    let mut node = directory.start(1, "never");
    assert!(node.connect().pipeline(&ballast).iter().all(|reply| *reply == Reply::ok()));
    for (round, fsync) in ["100ms", "always", "never", "100ms"].into_iter().enumerate() {
        let mut client = node.connect();
        storm(&mut node, &mut writers, 1000 + 500 * round as u64, |_| {
            let said = client.call(&["BGSAVE"]);
            let under_way = said == Reply::Error("ERR Background save already in progress".into());
            assert!(under_way || said == Reply::Simple("Background saving started".into()), "{said:?}");
        });
        node = directory.start(1 + (round + 1) % 2, fsync);
    }
    check(&node, &mut writers);
    kill(&mut node);

    let node = directory.start(2, "never");
    snapshot(&node);
    let (cores, names) = (metric(&node, "gridkv_cores") as usize, directory.names());
    let of = |kind: &str| names.iter().filter(|name| name.ends_with(kind)).count();
    assert_eq!((of(".snapshot"), of(".log"), names.len()), (cores, cores, 2 * cores + 2), "{names:?}");
    assert!(names.contains(&"LOCK".into()) && names.contains(&"layout".into()), "{names:?}");
    assert!(metric(&node, "gridkv_log_since_snapshot_bytes") < 10_000);
    check(&node, &mut writers);
    stop(node);
    check(&directory.start(1, "always"), &mut writers);
}

#[test]
fn what_was_answered_is_synced_if_it_is_to_be() {
    let directory = Directory::new();
    let node = directory.start(2, "always");
    let mut client = node.connect();
    let mut written = 0;
    // More than is held in memory at a time is appended in the middle of a turn.
    for len in [1, 100_000, 5 << 20, 3, 9 << 20] {
        for key in ["a", "b", "c", "d"] {
            assert_eq!(client.call(&[&b"SET"[..], key.as_bytes(), &vec![b'v'; len]]), Reply::ok());
            written += len as u64;
            let synced = metric(&node, "gridkv_log_synced_bytes_total");
            assert!(synced >= written, "{synced} bytes are on disk, {written} were answered, the last of them {len}");
        }
    }
    stop(node);
}

/// A core that had little to read once served clients while others still read: `/readyz` was right for it alone.
#[test]
fn a_node_is_ready_when_all_its_cores_have_read() {
    let directory = Directory::new();
    let node = directory.start(2, "never");
    // All in one shard.
    for n in 0..12 {
        assert_eq!(node.connect().call(&["SET", &format!("{{one}}{n}"), &"x".repeat(4 << 20)]), Reply::ok());
    }
    let cores = metric(&node, "gridkv_cores") as usize;
    stop(node);
    let node = directory.start(2, "never");
    let output = node.output();
    let read = output.lines().filter(|line| line.contains("data was read from disk")).count();
    assert_eq!(read, cores, "{output}");
}

#[test]
fn a_node_that_was_stopped_goes_on_where_it_was() {
    let directory = Directory::new();
    let node = directory.start(2, "never");
    let mut client = node.connect();
    let later = now() + 1_000_000_000;
    for n in 0..300 {
        let (key, value) = (format!("key:{n}"), format!("value:{n}"));
        assert_eq!(client.call(&["SET", &key, &value]), Reply::ok());
    }
    let at = later.to_string();
    assert_eq!(client.call(&["PEXPIREAT", "key:1", &at]), Reply::Integer(1));
    assert_eq!(client.call(&["SET", "big", &"x".repeat(3 << 20)]), Reply::ok());
    assert_eq!(client.call(&["SET", "short", "x", "PX", "3000"]), Reply::ok());
    let short = client.call(&["PEXPIRETIME", "short"]).integer() as u64;
    assert_eq!(client.call(&["DEL", "key:0"]), Reply::Integer(1));
    stop(node);
    until("the entry has expired, and nobody was there to see it", || (now() > short).then_some(()));

    let mut node = directory.start(1, "never");
    let mut client = node.connect();
    for (key, held) in [
        ("key:0", None),
        ("short", None),
        ("key:1", Some((b"value:1".to_vec(), later as i64))),
        ("key:299", Some((b"value:299".to_vec(), -1))),
        ("big", Some((vec![b'x'; 3 << 20], -1))),
    ] {
        assert!(self::held(&mut client, [key.as_bytes().to_vec()].iter()) == [held], "{key}");
    }
    // Reading the expired one has removed it.
    assert_eq!(client.call(&["DBSIZE"]), Reply::Integer(300));
    assert_eq!(client.call(&["FLUSHALL"]), Reply::ok());
    assert_eq!(client.call(&["SET", "key:2", "new"]), Reply::ok());
    kill(&mut node);

    let node = directory.start(2, "never");
    let mut client = node.connect();
    assert_eq!(client.call(&["GET", "key:2"]), Reply::bulk("new"));
    assert_eq!(client.call(&["DBSIZE"]), Reply::Integer(1));
    assert_eq!(client.call(&["FLUSHALL"]), Reply::ok());
    stop(node);
    let node = directory.start(1, "never");
    assert_eq!(node.connect().call(&["DBSIZE"]), Reply::Integer(0));
}

/// Changes a byte of a file where a text stands in it.
fn spoil(path: &Path, text: &[u8]) {
    let mut bytes = fs::read(path).expect("the file is there");
    let at = bytes.windows(text.len()).position(|window| window == text).expect("the text is in the file");
    bytes[at] ^= 0x20;
    fs::write(path, bytes).expect("the file can be written");
}

#[test]
fn a_damaged_file_is_named_and_what_was_torn_is_cut_off() {
    let directory = Directory::new();
    let mut node = directory.start(1, "100ms");
    let mut client = node.connect();
    assert_eq!(client.call(&["SET", "first", "held by the log"]), Reply::ok());
    until_synced(&node);
    assert_eq!(client.call(&["SET", "second", "written after that"]), Reply::ok());
    kill(&mut node);

    let log = directory.newest(".log");
    spoil(&log, b"held by the log");
    let refusal = directory.refused(&["--shards", SHARDS]).output;
    let said = refusal.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{refusal}"));
    assert!(said.contains(log.to_str().unwrap()) && said.contains("is damaged at byte "), "{refusal}");
    assert!(refusal.contains("hint: ") && refusal.contains("backup"), "{refusal}");
    // That it was read has changed nothing.
    spoil(&log, b"Held by the log");

    // Nothing says that the end was on disk, so it may be missing. Two cores find that at the same time: one of them once cut the file
    // while the other read it, which then saw a disk that failed.
    let bytes = fs::read(&log).expect("the file is there");
    for _ in 0..12 {
        for name in directory.names().iter().filter(|name| name.ends_with(".log")) {
            fs::remove_file(log.with_file_name(name)).expect("the file can be removed");
        }
        fs::write(&log, &bytes[..bytes.len() - 3]).expect("the file can be written");
        let mut node = directory.start(2, "100ms");
        let found = held(&mut node.connect(), [b"first".to_vec(), b"second".to_vec()].iter());
        assert_eq!(found, [Some((b"held by the log".to_vec(), -1)), None]);
        let (said, name) = (node.output(), log.file_name().unwrap().to_str().unwrap());
        let warned = |line: &str| line.contains("WARN") && line.contains("is cut off") && line.contains(name);
        assert!(said.lines().any(warned), "{said}");
        kill(&mut node);
    }
    let node = directory.start(2, "100ms");
    let mut client = node.connect();
    assert_eq!(client.call(&["SET", "second", "written again"]), Reply::ok());
    snapshot(&node);
    stop(node);

    let node = directory.start(1, "100ms");
    assert!(!node.output().contains("is cut off"), "{}", node.output());
    let mut client = node.connect();
    assert_eq!(client.call(&["GET", "second"]), Reply::bulk("written again"));
    snapshot(&node);
    assert_eq!(client.call(&["SET", "third", "written last"]), Reply::ok());
    stop(node);
    // A log that was closed is whole to its end.
    let log = directory.newest(".log");
    spoil(&log, b"written last");
    let refusal = directory.refused(&["--shards", SHARDS]).output;
    assert!(refusal.contains(" is damaged at byte ") && refusal.contains(log.to_str().unwrap()), "{refusal}");
    spoil(&log, b"Written last");
    // Of a snapshot nothing may be missing.
    let snapshot = directory.newest(".snapshot");
    spoil(&snapshot, b"written again");
    let refusal = directory.refused(&["--shards", SHARDS]).output;
    assert!(refusal.contains("error: ") && refusal.contains(snapshot.to_str().unwrap()), "{refusal}");
}

#[test]
fn a_directory_is_of_one_node_and_of_one_layout() {
    let directory = Directory::new();
    let node = directory.start(1, "never");
    assert_eq!(node.connect().call(&["SET", "key", "value"]), Reply::ok());
    let refusal = directory.refused(&["--shards", SHARDS]).output;
    assert!(refusal.contains("is in use by another process"), "{refusal}");
    assert!(refusal.contains("hint: stop the other node, or give this one another directory"), "{refusal}");
    assert_eq!(node.connect().call(&["GET", "key"]), Reply::bulk("value"));
    stop(node);

    for (flags, said) in [
        (&["--shards", "64"][..], "it was made with 32 shards, not 64"),
        (&["--shards", SHARDS, "--hash-seed", "5"], "it was made with the hash seed "),
    ] {
        let refusal = directory.refused(flags).output;
        assert!(refusal.contains("error: ") && refusal.contains(said), "{refusal}");
        assert!(refusal.contains("layout") && refusal.contains("hint: start with the settings"), "{refusal}");
    }
    let node = directory.start(1, "never");
    assert_eq!(node.connect().call(&["GET", "key"]), Reply::bulk("value"));
}

#[test]
fn an_embedded_node_is_kept_too() {
    let directory = Directory::new();
    let start = |cores: usize| {
        let cores = cores.min(cpus()).to_string();
        GridKv::builder().cores(&cores).unwrap().data(&directory.0, Fsync::Always).start()
    };
    let db = start(2).unwrap();
    let blocking = db.blocking();
    for n in 0..50 {
        blocking.set(format!("set:{n}"), n.to_string()).unwrap();
    }
    blocking.set_many(&(0..50).map(|n| (format!("many:{n}"), n.to_string())).collect::<Vec<_>>()).unwrap();
    for core in 0..db.cores() {
        let written = blocking.on_core(core, move |core| async move {
            let own: Vec<String> = (0..100).map(|n| format!("core:{n}")).filter(|key| core.owns(key)).collect();
            for key in &own {
                core.write(key, key).unwrap();
            }
            own.len()
        });
        assert!(written.unwrap() > 0);
    }
    assert!(blocking.delete("set:7").unwrap());
    match start(1) {
        Err(Error::Start(error)) => assert!(error.to_string().contains("in use"), "{error}"),
        other => panic!("{other:?}"),
    }
    blocking.close().unwrap();

    let db = start(1).unwrap();
    let blocking = db.blocking();
    for n in 0..50 {
        let expected = (n != 7).then(|| n.to_string());
        assert_eq!(blocking.get(format!("set:{n}")).unwrap().as_deref(), expected.as_ref().map(|text| text.as_bytes()));
        assert_eq!(blocking.get(format!("many:{n}")).unwrap().as_deref(), Some(n.to_string().as_bytes()));
    }
    for key in (0..100).map(|n| format!("core:{n}")) {
        assert_eq!(blocking.get(&key).unwrap().as_deref(), Some(key.as_bytes()));
    }
    blocking.close().unwrap();
}

/// The snapshot is given up, and the directory and the address are free again for the next node of the same process.
#[test]
fn a_node_is_closed_while_a_snapshot_is_taken() {
    let directory = Directory::new();
    let start = || {
        let any = "127.0.0.1:0".parse().unwrap();
        let fsync = Fsync::Every(std::time::Duration::from_secs(1));
        GridKv::builder().cores("1").unwrap().data(&directory.0, fsync).listen(any).start()
    };
    let mut given_up = false;
    for round in 0..20 {
        let db = start().unwrap();
        let blocking = db.blocking();
        let entries: Vec<_> = (0..3000).map(|n| (format!("{round}:{n}"), [b'v'; 1000])).collect();
        blocking.set_many(&entries).unwrap();
        let mut client = Client::connect(db.resp_addr().unwrap());
        // An error says that one is being taken already.
        client.call(&["BGSAVE"]);
        blocking.close().unwrap();
        drop(db);
        let snapshots = fs::read_dir(&directory.0).unwrap().map(|entry| entry.unwrap().path());
        let mut snapshots = snapshots.filter(|path| path.extension().is_some_and(|kind| kind == "snapshot"));
        given_up |= snapshots.next().is_none();
    }
    assert!(given_up, "each snapshot was through before the node was closed");
    let db = start().unwrap();
    assert_eq!(db.blocking().get("19:2999").unwrap().as_deref(), Some(&[b'v'; 1000][..]));
    assert_eq!(db.blocking().get("0:0").unwrap().as_deref(), Some(&[b'v'; 1000][..]));
    db.blocking().close().unwrap();
}
