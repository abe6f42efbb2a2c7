//! A session over [`testing::Cores`]: what a client reads, whatever core answers when.

use proptest::prelude::*;

use super::testing::Cores;
use super::*;

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
fn a_pipeline_reads_as_if_its_commands_ran_one_after_the_other() {
    let script = "SET k 1\nINCR k\nGET k\nSET k 9\nMGET k x\nDEL k\nGET k\nMSET k 3 x 4\nMULTI\nINCR k\nEXEC\nMGET k x\n\
                  MULTI\nINCR x\nGET x\nSET y 1\nSET z 1\nSET w 1\nEXEC\nDBSIZE";
    let expected = "+OK :2 $1 2 +OK *2 $1 9 $-1 :1 $-1 +OK +OK +QUEUED *1 :4 *2 $1 4 $1 4 \
                    +OK +QUEUED +QUEUED +QUEUED +QUEUED +QUEUED *5 :5 $1 5 +OK +OK +OK :5 ";
    for seed in 0..200 {
        let mut cores = Cores::new(1 + seed as usize % 3);
        cores.overtaking = Some(seed);
        assert_eq!(talk(&mut cores, &encode(script), 1 + seed as usize % 5, seed), expected);
    }
}

#[test]
fn transactions() {
    for (script, expected) in [
        ("MULTI\nSET k 1\nINCR k\nPING\nEXEC", "+OK +QUEUED +QUEUED +QUEUED *3 +OK :2 +PONG "),
        (
            "MULTI\nSET a 1\nSET b 2\nSET c 3\nMGET a b c\nEXEC\nGET b",
            "+OK +QUEUED +QUEUED +QUEUED +QUEUED *4 +OK +OK +OK *3 $1 1 $1 2 $1 3 $1 2 ",
        ),
        ("WATCH k\nSET k 2\nMULTI\nGET k\nEXEC", "+OK +OK +OK +QUEUED *-1 "),
        ("WATCH k\nMULTI\nGET k\nEXEC\nMULTI\nPING\nEXEC", "+OK +OK +QUEUED *1 $-1 +OK +QUEUED *1 +PONG "),
        ("WATCH k j\nUNWATCH\nSET k 2\nMULTI\nGET k\nEXEC", "+OK +OK +OK +OK +QUEUED *1 $1 2 "),
        (
            "MULTI\nNOSUCH\nSET k 1\nEXEC\nGET k",
            "+OK -ERR unknown command 'NOSUCH', with args beginning with:  +QUEUED -EXECABORT Transaction discarded \
          because of previous errors. $-1 ",
        ),
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
fn a_write_of_which_a_part_was_refused_is_not_called_refused() {
    let mut cores = Cores::new(2);
    cores.refuses = |args| args[0] != b"GET" && args.contains(&&b"no"[..]);
    let core = |key: &str| cores.owner(cores.keyspace().locate(key.as_bytes()));
    let yes = ["a", "b", "c", "d", "e", "f"].into_iter().find(|key| core(key) != core("no")).expect("half of them");
    let said = talk(&mut cores, &encode(&format!("MSET {yes} 1 no 2\nDEL no {yes}\nDEL no {yes}")), 1, 1);
    let part = "-UNKNOWN part of the keys was written: read to find out which; the others were refused with ERR refused by \
                the test ";
    assert_eq!(said, format!("{part}{part}-ERR refused by the test "));
    assert_eq!(
        talk(&mut cores, &encode(&format!("MGET no {yes}\nMSET no 1 no 2")), 1, 1),
        "-ERR refused by the test ".repeat(2)
    );
}

#[test]
fn what_may_not_run_on_all_cores_runs_on_none() {
    let mut cores = Cores::new(3);
    cores.whole = Err("ERR shared");
    let script = encode("SET a 1\nSET b 2\nSET c 3\nFLUSHALL\nDBSIZE\nMULTI\nFLUSHDB\nEXEC\nDBSIZE");
    assert_eq!(talk(&mut cores, &script, 1, 1), "+OK +OK +OK -ERR shared :3 +OK +QUEUED *1 -ERR shared :3 ");
    cores.whole = Ok(());
    assert_eq!(talk(&mut cores, &encode("FLUSHALL\nDBSIZE"), 1, 1), "+OK :0 ");
}

#[test]
fn a_key_that_cannot_be_read_is_not_watched() {
    let mut cores = Cores::new(2);
    cores.hides = |key| key.ends_with(b"no");
    let far = |tag: &&str| cores.owner(cores.keyspace().locate(tag.as_bytes())) != cores.here();
    let tag = ["a", "b", "c", "d", "e", "f"].into_iter().find(far).expect("half of them");
    let script = |line: &str| encode(&line.replace('~', &format!("{{{tag}}}")));
    for seed in 0..8 {
        // One of the keys could have been watched: neither is, and the transaction is bound by nothing.
        let said = talk(&mut cores, &script("WATCH ~1 ~no\nSET ~1 x\nMULTI\nGET ~1\nEXEC"), 1, seed);
        assert_eq!(said, "-CLUSTERDOWN hidden by the test +OK +OK +QUEUED *1 $1 x ");
        // What was watched before is watched still.
        let said = talk(&mut cores, &script("WATCH ~1\nWATCH ~no ~2\nSET ~1 x\nMULTI\nGET ~1\nEXEC"), 1, seed);
        assert_eq!(said, "+OK -CLUSTERDOWN hidden by the test +OK +OK +QUEUED *-1 ");
    }
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
    let script =
        "CLIENT REPLY OFF\nSET a 1\nSET b 2\nMGET a b\nGET c\nNOSUCH\nCLIENT REPLY ON\nCLIENT REPLY SKIP\nGET b\nGET a";
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
    assert_eq!(
        ask(&format!("GET {long}\nSET {long} v\nDEL {long}\nPING")),
        "-ERR key is longer than 1000 bytes -ERR key is longer than 1000 bytes -ERR key is longer than 1000 bytes +PONG "
    );
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
        "GET", "SET", "MGET", "MSET", "DEL", "EXISTS", "INCR", "APPEND", "MULTI", "EXEC", "DISCARD", "WATCH",
        "UNWATCH", "PING", "DBSIZE", "RENAME", "MSETNX", "TIME", "GETSET", "STRLEN", "NOSUCH", "HELLO", "FLUSHALL",
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

    /// Cores that serve what they are sent in any order: the client reads the same.
    #[test]
    fn no_command_is_overtaken_by_one_that_depends_on_it(
        lines in prop::collection::vec(line(), 1..60),
        pieces in 1usize..40,
        seed in any::<u64>(),
        cores in 1usize..4,
    ) {
        let bytes = encode(&lines.join("\n"));
        let alone = talk(&mut Cores::new(1), &bytes, 1, 0);
        let mut cores = Cores::new(cores);
        cores.overtaking = Some(seed);
        prop_assert_eq!(alone, talk(&mut cores, &bytes, pieces, seed));
    }
}
