//! A session over cores made of plain stores, whose answers come when the test lets them come.

use std::collections::VecDeque;

use gridkv_engine::backend::{BackendConfig, DEFAULT_BACKEND, Registry};
use gridkv_engine::command::Context;
use gridkv_engine::hash::ShardCount;
use gridkv_engine::store::{Store, StoreConfig};
use proptest::prelude::*;

use super::transaction::{Step, Transaction, version_bytes};
use super::*;
use crate::frame::Status;

const NOW: u64 = 1_700_000_000_000;

enum Sent {
    Get(Vec<u8>),
    Set(Vec<u8>, Vec<u8>),
    Version(Vec<u8>),
    Command(&'static Spec, Vec<Vec<u8>>, Protocol),
    Exec(Vec<u8>, Protocol),
    Node,
}

/// Cores of which this session lives on the first.
struct Cores {
    keyspace: Keyspace,
    stores: Vec<Store>,
    limits: Limits,
    /// Requests under way to each core; those of the node are with the own core.
    lanes: Vec<VecDeque<(KeyHash, u32, u32, Sent)>>,
    room: usize,
    password: Option<&'static [u8]>,
}

fn limits() -> Limits {
    Limits {
        wire: WireLimits { max_bulk: 1 << 16, ..WireLimits::default() },
        max_key: 1000,
        query_buffer: 1 << 20,
        output_high_water: 1 << 16,
        max_pending: 64,
        multi_queue: 16,
    }
}

impl Cores {
    fn new(cores: usize) -> Cores {
        let keyspace = Keyspace { seed: 7, shards: ShardCount::new(32).unwrap() };
        let store = |core: usize| {
            let cut = |i: usize| (i * 32 / cores) as u16;
            let config = StoreConfig { keyspace, owned: cut(core)..cut(core + 1), ..StoreConfig::default() };
            let backend = BackendConfig { keyspace, owned: config.owned.clone() };
            Store::new(config, Registry::default().make(DEFAULT_BACKEND, &backend).unwrap())
        };
        Cores {
            keyspace,
            stores: (0..cores).map(store).collect(),
            limits: limits(),
            lanes: (0..cores).map(|_| VecDeque::new()).collect(),
            room: 8,
            password: None,
        }
    }

    fn run_on(&mut self, core: usize, spec: &Spec, args: &[&[u8]], protocol: Protocol, out: &mut Vec<u8>) -> i64 {
        let mut writer = Writer::new(protocol, out);
        let mut context = Context { store: &mut self.stores[core], args, now: NOW, out: &mut writer, aux: 0 };
        (spec.run.expect("a command of the data"))(&mut context);
        context.aux
    }

    fn exec_on(&mut self, core: usize, packed: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        let mut transaction = Transaction::new(packed);
        let store = &mut self.stores[core];
        if !transaction.watched(|hash, key, version| store.version(hash, key, NOW) == version).unwrap() {
            return Writer::new(protocol, out).null_array();
        }
        let steps = transaction.steps().unwrap();
        Writer::new(protocol, out).array(steps as usize);
        let mut args = Vec::new();
        for _ in 0..steps {
            match transaction.step(&mut args).unwrap() {
                Step::Raw(reply) => out.extend_from_slice(reply),
                Step::Command(spec) => {
                    self.run_on(core, spec, &args, protocol, out);
                }
            }
        }
    }

    /// Serves the oldest request to a core.
    fn serve(&mut self, core: usize, session: &mut Session, out: &mut Vec<u8>) -> bool {
        let Some((hash, slot, index, sent)) = self.lanes[core].pop_front() else { return false };
        let mut bytes = Vec::new();
        let (mut status, mut aux) = (Status::Encoded, 0);
        match sent {
            Sent::Get(key) => match self.stores[core].get(hash, &key, NOW) {
                Some(entry) => {
                    bytes.extend_from_slice(entry.value);
                    status = Status::Value;
                }
                None => status = Status::Nil,
            },
            Sent::Set(key, value) => {
                self.stores[core].set(hash, &key, &value, 0, NOW).unwrap();
                status = Status::Done;
            }
            Sent::Version(key) => match self.stores[core].version(hash, &key, NOW) {
                Some(version) => {
                    bytes.extend_from_slice(&version_bytes(version));
                    status = Status::Value;
                }
                None => status = Status::Nil,
            },
            Sent::Command(spec, args, protocol) => {
                let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
                aux = self.run_on(core, spec, &args, protocol, &mut bytes);
            }
            Sent::Exec(packed, protocol) => self.exec_on(core, &packed, protocol, &mut bytes),
            Sent::Node => bytes.extend_from_slice(b"+node\r\n"),
        }
        session.answer(slot, index, &Answer { status, aux, bytes: &bytes }, self, out);
        true
    }

    /// Serves everything, cores chosen by `order`, and lets the session go on.
    fn settle(&mut self, session: &mut Session, out: &mut Vec<u8>, order: &mut impl FnMut() -> usize) {
        loop {
            let busy: Vec<usize> = (0..self.lanes.len()).filter(|&core| !self.lanes[core].is_empty()).collect();
            if busy.is_empty() {
                let before = (out.len(), session.input_bytes());
                if !session.is_stalled() {
                    return;
                }
                session.resume(self, out);
                let idle = self.lanes.iter().all(VecDeque::is_empty);
                assert!(!idle || before != (out.len(), session.input_bytes()) || !session.is_stalled(), "stuck");
                continue;
            }
            self.serve(busy[order() % busy.len()], session, out);
            if order() % 3 == 0 {
                session.resume(self, out);
            }
        }
    }
}

impl Backplane for Cores {
    fn keyspace(&self) -> Keyspace {
        self.keyspace
    }
    fn here(&self) -> CoreId {
        CoreId(0)
    }
    fn cores(&self) -> usize {
        self.stores.len()
    }
    fn owner(&self, hash: KeyHash) -> CoreId {
        let shard = self.keyspace.shard(hash).0;
        CoreId(self.stores.iter().position(|store| store.owned().contains(&shard)).unwrap() as u16)
    }
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn get(&mut self, hash: KeyHash, key: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        let mut writer = Writer::new(protocol, out);
        match self.stores[0].get(hash, key, NOW) {
            Some(entry) => writer.bulk(entry.value),
            None => writer.null(),
        }
    }
    fn set(&mut self, hash: KeyHash, key: &[u8], value: &[u8], out: &mut Vec<u8>) {
        self.stores[0].set(hash, key, value, 0, NOW).unwrap();
        out.extend_from_slice(b"+OK\r\n");
    }
    fn run(&mut self, spec: &'static Spec, args: &[&[u8]], protocol: Protocol, out: &mut Vec<u8>) -> i64 {
        self.run_on(0, spec, args, protocol, out)
    }
    fn exec(&mut self, transaction: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        self.exec_on(0, transaction, protocol, out);
    }
    fn version(&mut self, hash: KeyHash, key: &[u8]) -> Option<Version> {
        self.stores[0].version(hash, key, NOW)
    }
    fn has_room(&self, to: CoreId) -> bool {
        self.lanes[to.index()].len() < self.room
    }
    fn send(&mut self, to: CoreId, hash: KeyHash, slot: u32, index: u32, request: Request<'_>) {
        let own = |args: &[&[u8]]| args.iter().map(|arg| arg.to_vec()).collect();
        let sent = match request {
            Request::Get(key) => Sent::Get(key.to_vec()),
            Request::Set(key, value) => Sent::Set(key.to_vec(), value.to_vec()),
            Request::Version(key) => Sent::Version(key.to_vec()),
            Request::Command(spec, args, protocol) => Sent::Command(spec, own(args), protocol),
            Request::Exec(packed, protocol) => Sent::Exec(packed.to_vec(), protocol),
        };
        self.lanes[to.index()].push_back((hash, slot, index, sent));
    }
    fn node(&mut self, slot: u32, _: &Client, _: &'static Spec, _: &[&[u8]]) {
        assert!(self.lanes.iter().all(VecDeque::is_empty), "a command of the node waits for those before it");
        self.lanes[0].push_back((KeyHash(0), slot, 0, Sent::Node));
    }
    fn login(&mut self, user: &[u8], password: &[u8]) -> Login {
        match self.password {
            None => Login::NotNeeded,
            Some(known) if user == b"default" && known == password => Login::Welcome,
            Some(_) => Login::Refused,
        }
    }
    fn needs_password(&self) -> bool {
        self.password.is_some()
    }
    fn count(&mut self, _: &'static Spec) {}
    fn count_error(&mut self, _: &[u8]) {}
}

/// Lines of words, sent as arrays.
fn encode(script: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split(' ').collect();
        bytes.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            bytes.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
        }
    }
    bytes
}

/// What a client reads who sends `bytes` in pieces to a node of that many cores.
fn talk(cores: &mut Cores, bytes: &[u8], pieces: usize, seed: u64) -> String {
    let mut session = Session::new(1, cores.needs_password());
    let mut out = Vec::new();
    let mut state = seed;
    let mut order = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    for piece in bytes.chunks(bytes.len().div_ceil(pieces).max(1)) {
        session.feed(piece, cores, &mut out);
        if order() % 2 == 0 {
            cores.settle(&mut session, &mut out, &mut order);
        }
    }
    cores.settle(&mut session, &mut out, &mut order);
    assert_eq!(session.input_bytes(), 0, "all was read: {}", String::from_utf8_lossy(&out));
    assert!(!session.is_waiting());
    String::from_utf8(out).unwrap().replace("\r\n", " ")
}

fn ask(script: &str) -> String {
    talk(&mut Cores::new(3), &encode(script), 1, 1)
}

#[test]
fn replies_come_in_order_whatever_core_answers() {
    let script = "SET a 1\nSET b 2\nSET c 3\nGET c\nMGET a b c x\nDEL a x b\nEXISTS a b c c\nPING\nDBSIZE\nMSET d 4 e 5\nMGET e d";
    let expected = "+OK +OK +OK $1 3 *4 $1 1 $1 2 $1 3 $-1 :2 :2 +PONG :1 +OK *2 $1 5 $1 4 ";
    for cores in [1, 2, 3, 5] {
        for seed in 0..20 {
            assert_eq!(talk(&mut Cores::new(cores), &encode(script), 1 + seed as usize, seed), expected);
        }
    }
}

#[test]
fn a_command_of_the_node_waits_for_those_before_and_holds_those_behind() {
    assert_eq!(ask("SET a 1\nSET b 2\nSET c 3\nTIME\nGET a\nGET b"), "+OK +OK +OK +node $1 1 $1 2 ");
}

#[test]
fn transactions() {
    for (script, expected) in [
        ("MULTI\nSET k 1\nINCR k\nPING\nEXEC", "+OK +QUEUED +QUEUED +QUEUED *3 +OK :2 +PONG "),
        ("MULTI\nSET a 1\nSET b 2\nSET c 3\nMGET a b c\nEXEC\nGET b", 
         "+OK +QUEUED +QUEUED +QUEUED +QUEUED *4 +OK +OK +OK *3 $1 1 $1 2 $1 3 $1 2 "),
        ("WATCH k\nSET k 2\nMULTI\nGET k\nEXEC", "+OK +OK +OK +QUEUED *-1 "),
        ("WATCH k\nMULTI\nGET k\nEXEC\nMULTI\nPING\nEXEC", "+OK +OK +QUEUED *1 $-1 +OK +QUEUED *1 +PONG "),
        ("WATCH k j\nUNWATCH\nSET k 2\nMULTI\nGET k\nEXEC", "+OK +OK +OK +OK +QUEUED *1 $1 2 "),
        ("MULTI\nNOSUCH\nSET k 1\nEXEC\nGET k",
         "+OK -ERR unknown command 'NOSUCH', with args beginning with:  +QUEUED -EXECABORT Transaction discarded \
          because of previous errors. $-1 "),
        ("MULTI\nMULTI\nSET k 1\nDISCARD\nGET k", "+OK -ERR MULTI calls can not be nested +QUEUED +OK $-1 "),
        ("EXEC\nDISCARD", "-ERR EXEC without MULTI -ERR DISCARD without MULTI "),
        ("MULTI\nTIME\nEXEC", "+OK +QUEUED *1 +node "),
        ("MULTI\nEXEC", "+OK *0 "),
    ] {
        assert_eq!(ask(script), expected, "{script}");
    }
    let crossed = ask("WATCH a b c d e\nMULTI\nSET a 1\nEXEC\nGET a");
    assert!(crossed.contains("-CROSSSLOT") && crossed.ends_with("$-1 "), "{crossed}");
    assert!(ask("RENAME a b\nRENAME b c\nRENAME c d").contains("-CROSSSLOT"));
    assert_eq!(ask("SET {t}a 1\nRENAME {t}a {t}b\nGET {t}b"), "+OK +OK $1 1 ");
}

#[test]
fn a_strangers_requests_are_small_and_refused() {
    let mut cores = Cores::new(2);
    cores.password = Some(b"sesame");
    let said = talk(&mut cores, &encode("GET a\nAUTH wrong\nAUTH sesame\nGET a"), 1, 1);
    let refused = "-WRONGPASS invalid username-password pair or user is disabled.";
    assert_eq!(said, format!("-NOAUTH Authentication required. {refused} +OK $-1 "));
    let said = talk(&mut cores, &encode("HELLO 3 AUTH default sesame SETNAME me\nCLIENT GETNAME\nGET a"), 1, 1);
    assert!(said.starts_with("%7 $6 server") && said.ends_with("$2 me _ "), "{said}");
    let mut session = Session::new(1, true);
    let mut out = Vec::new();
    session.feed(b"*1000000\r\n", &mut cores, &mut out);
    assert!(session.is_finished() && out.starts_with(b"-ERR Protocol error"));
}

#[test]
fn replies_can_be_turned_off() {
    let script = "CLIENT REPLY OFF\nSET a 1\nSET b 2\nMGET a b\nGET c\nNOSUCH\nCLIENT REPLY ON\nCLIENT REPLY SKIP\nGET b\nGET a";
    assert_eq!(ask(script), "+OK $1 1 ");
}

#[test]
fn a_client_that_does_not_read_stops_being_read() {
    let mut cores = Cores::new(2);
    let mut session = Session::new(1, false);
    let mut out = Vec::new();
    session.feed(&encode(&format!("SET k {}", "v".repeat(1000))), &mut cores, &mut out);
    while cores.serve(1, &mut session, &mut out) {}
    out.clear();
    let requests = encode("GET k").repeat(1000);
    session.feed(&requests, &mut cores, &mut out);
    let mut peak = 0;
    let mut received = 0;
    while session.is_stalled() || session.is_waiting() {
        while cores.serve(1, &mut session, &mut out) {}
        peak = peak.max(out.len());
        received += out.len();
        out.clear();
        session.resume(&mut cores, &mut out);
    }
    received += out.len();
    assert_eq!(received, 1000 * (b"$1000\r\n".len() + 1002));
    assert!(peak < 2 * cores.limits.output_high_water + 64 * 1010, "peak {peak}");
}

#[test]
fn bounds_have_their_own_errors() {
    let long = "k".repeat(1001);
    assert_eq!(ask(&format!("GET {long}\nSET {long} v\nDEL {long}\nPING")),
        "-ERR key is longer than 1000 bytes -ERR key is longer than 1000 bytes -ERR key is longer than 1000 bytes +PONG ");
    let queued = ask(&format!("MULTI\n{}EXEC", "GET k\n".repeat(17)));
    assert!(queued.contains("-ERR a transaction may queue 16 commands") && queued.contains("-EXECABORT"), "{queued}");
    let mut cores = Cores::new(1);
    let mut session = Session::new(1, false);
    let mut out = Vec::new();
    session.feed(b"*2\r\n$3\r\nGET\r\n$100000\r\n", &mut cores, &mut out);
    assert_eq!(out, b"-ERR Protocol error: invalid bulk length\r\n");
    assert!(session.is_finished());
}

#[test]
fn quit_answers_and_reads_no_further() {
    let mut cores = Cores::new(2);
    let mut session = Session::new(1, false);
    let mut out = Vec::new();
    session.feed(&encode("SET a 1\nSET b 1\nSET c 1\nQUIT\nGET a"), &mut cores, &mut out);
    assert!(session.is_waiting() && !session.is_finished());
    while cores.serve(1, &mut session, &mut out) {}
    assert!(session.is_finished());
    assert_eq!(out, b"+OK\r\n+OK\r\n+OK\r\n+OK\r\n");
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![Just("a".to_owned()), Just("b".to_owned()), Just("{a}c".to_owned()), "[d-h]", "[0-9]{1,2}"]
}

fn line() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "GET", "SET", "MGET", "MSET", "DEL", "EXISTS", "INCR", "APPEND", "MULTI", "EXEC", "DISCARD", "WATCH", "UNWATCH",
        "PING", "DBSIZE", "RENAME", "MSETNX", "TIME", "GETSET", "STRLEN", "NOSUCH", "HELLO", "FLUSHALL",
    ]);
    (name, prop::collection::vec(word(), 0..5)).prop_map(|(name, words)| {
        let words = if name == "HELLO" || name == "FLUSHALL" { Vec::new() } else { words };
        std::iter::once(name.to_owned()).chain(words).collect::<Vec<_>>().join(" ")
    })
}

proptest! {
    /// One core, or several that answer in any order: the client reads the same.
    #[test]
    fn the_number_of_cores_is_invisible(
        lines in prop::collection::vec(line(), 1..60),
        pieces in 1usize..40,
        seed in any::<u64>(),
    ) {
        let bytes = encode(&lines.join("\n"));
        let alone = talk(&mut Cores::new(1), &bytes, 1, 0);
        let shared = talk(&mut Cores::new(4), &bytes, pieces, seed);
        prop_assert_eq!(alone, shared);
    }
}
