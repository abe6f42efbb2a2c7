//! The same random commands for a node with one core, a node with two, and a model: all three must agree.
//!
//! What a client is told may not depend on how many cores share the work, on how the commands are grouped
//! into packets, or on how the tables behind them have grown. So a seeded generator writes commands, a model of some hundred
//! lines (a sorted map, nothing clever) says what the reply must be, and every node has to say the same.
//!
//! Time is kept out: expiries are set to absolute times that are decades away or long past. The order in which SCAN and
//! KEYS list keys is the node's business and is sorted away. A failure prints the seed; run it again with
//! `GRIDKV_SEED=<seed> cargo test --test model`.

mod support;

use std::collections::BTreeMap;

use support::Node;
use support::resp::{Client, Reply};

/// Commands per seed. Batches of up to 60 share a packet.
const COMMANDS: usize = 6_000;
const SEEDS: [u64; 4] = [1, 2, 3, 0x9e37_79b9_7f4a_7c15];

/// A small generator of our own (splitmix64), so that a seed means the same for ever.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as u64) as i64
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

/// A time far ahead, in milliseconds, and one long past.
const FUTURE_MS: i64 = 4_000_000_000_000;
const PAST_MS: i64 = 1_000_000_000_000;

#[derive(Clone, Default, PartialEq)]
struct Held {
    value: Vec<u8>,
    expires_at: Option<i64>,
}

/// What the keys hold, and what Redis's documentation says each command does to them.
#[derive(Default)]
struct Model {
    held: BTreeMap<Vec<u8>, Held>,
}

fn error(text: &str) -> Reply {
    Reply::Error(format!("ERR {text}"))
}

fn not_an_integer() -> Reply {
    error("value is not an integer or out of range")
}

/// Redis's rule for a number in a string: what printing the number would give, and nothing else.
fn number(bytes: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(bytes).ok()?;
    let value: i64 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

/// Start and end of a range as slice bounds, or nothing when it is empty. Both ends are clamped to the string,
/// so two ends before its beginning both mean its first byte.
fn clamped(start: i64, end: i64, length: usize) -> Option<(usize, usize)> {
    let length = length as i64;
    let start = if start < 0 { (length + start).max(0) } else { start };
    let end = if end < 0 { (length + end).max(0) } else { end }.min(length - 1);
    (length > 0 && start <= end).then_some((start as usize, end as usize))
}

/// As [`clamped`], but a range that is written backwards from the end is empty: all commands except BITPOS.
fn range(start: i64, end: i64, length: usize) -> Option<(usize, usize)> {
    let backwards = start < 0 && end < 0 && start > end;
    if backwards { None } else { clamped(start, end, length) }
}

impl Model {
    fn value(&self, key: &[u8]) -> &[u8] {
        self.held.get(key).map_or(&[], |held| &held.value)
    }

    fn get(&self, key: &[u8]) -> Reply {
        self.held.get(key).map_or(Reply::Null, |held| Reply::bulk(&held.value))
    }

    fn set(&mut self, key: &[u8], value: &[u8], expires_at: Option<i64>) {
        self.held.insert(key.to_vec(), Held { value: value.to_vec(), expires_at });
    }

    fn expire(&mut self, key: &[u8], at: i64, condition: Option<&str>) -> Reply {
        let Some(held) = self.held.get_mut(key) else { return Reply::Integer(0) };
        let allowed = match (condition, held.expires_at) {
            (None, _) => true,
            (Some("NX"), old) => old.is_none(),
            (Some("XX"), old) => old.is_some(),
            (Some("GT"), old) => old.is_some_and(|old| at > old),
            (Some("LT"), old) => old.is_none_or(|old| at < old),
            (Some(other), _) => panic!("the generator wrote {other}"),
        };
        if !allowed {
            return Reply::Integer(0);
        }
        if at <= PAST_MS {
            self.held.remove(key);
        } else {
            held.expires_at = Some(at);
        }
        Reply::Integer(1)
    }

    fn increment(&mut self, key: &[u8], by: i64) -> Reply {
        let held = self.held.get(key).cloned().unwrap_or(Held { value: b"0".to_vec(), expires_at: None });
        let Some(old) = number(&held.value) else { return not_an_integer() };
        let Some(new) = old.checked_add(by) else { return error("increment or decrement would overflow") };
        self.set(key, new.to_string().as_bytes(), held.expires_at);
        Reply::Integer(new)
    }

    fn bits(value: &[u8], from: usize, to: usize) -> impl Iterator<Item = bool> + '_ {
        (from..=to).map(|bit| value[bit / 8] >> (7 - bit % 8) & 1 == 1)
    }

    /// The reply that one command must get. EXEC is put together by the caller.
    fn apply(&mut self, words: &[Vec<u8>]) -> Reply {
        let text: Vec<&str> = words.iter().map(|word| std::str::from_utf8(word).unwrap_or("")).collect();
        let key = words.get(1).map_or(&b""[..], |word| word.as_slice());
        let integer = |index: usize| text[index].parse::<i64>().expect("the generator writes integers here");
        match text[0] {
            "SET" => {
                let old = self.get(key);
                let options = &text[3..];
                let has = |name: &str| options.contains(&name);
                let blocked = has("NX") && self.held.contains_key(key) || has("XX") && !self.held.contains_key(key);
                if !blocked {
                    let expires_at = if has("KEEPTTL") {
                        self.held.get(key).and_then(|held| held.expires_at)
                    } else {
                        options.iter().position(|option| *option == "PXAT").map(|at| integer(at + 4))
                    };
                    self.set(key, &words[2], expires_at);
                }
                match (has("GET"), blocked) {
                    (true, _) => old,
                    (false, true) => Reply::Null,
                    (false, false) => Reply::ok(),
                }
            }
            "GET" => self.get(key),
            "GETSET" => {
                let old = self.get(key);
                self.set(key, &words[2], None);
                old
            }
            "GETDEL" => {
                let old = self.get(key);
                self.held.remove(key);
                old
            }
            "GETEX" => {
                if let Some(held) = self.held.get_mut(key) {
                    match text.get(2) {
                        Some(&"PERSIST") => held.expires_at = None,
                        Some(&"PXAT") => held.expires_at = Some(integer(3)),
                        _ => {}
                    }
                }
                self.get(key)
            }
            "SETNX" => {
                let absent = !self.held.contains_key(key);
                if absent {
                    self.set(key, &words[2], None);
                }
                Reply::Integer(absent.into())
            }
            "MGET" => Reply::Array(words[1..].iter().map(|key| self.get(key)).collect()),
            "MSET" => {
                for pair in words[1..].chunks(2) {
                    self.set(&pair[0], &pair[1], None);
                }
                Reply::ok()
            }
            "MSETNX" => {
                let free = words[1..].chunks(2).all(|pair| !self.held.contains_key(&pair[0]));
                for pair in words[1..].chunks(2).filter(|_| free) {
                    self.set(&pair[0], &pair[1], None);
                }
                Reply::Integer(free.into())
            }
            "APPEND" => {
                let held = self.held.entry(key.to_vec()).or_default();
                held.value.extend_from_slice(&words[2]);
                Reply::Integer(held.value.len() as i64)
            }
            "STRLEN" => Reply::Integer(self.value(key).len() as i64),
            "GETRANGE" => {
                let value = self.value(key);
                let found = range(integer(2), integer(3), value.len());
                Reply::bulk(found.map_or(&[][..], |(start, end)| &value[start..=end]))
            }
            "SETRANGE" => {
                let (offset, patch) = (integer(2) as usize, &words[3]);
                if patch.is_empty() {
                    return Reply::Integer(self.value(key).len() as i64);
                }
                let held = self.held.entry(key.to_vec()).or_default();
                if held.value.len() < offset + patch.len() {
                    held.value.resize(offset + patch.len(), 0);
                }
                held.value[offset..offset + patch.len()].copy_from_slice(patch);
                Reply::Integer(held.value.len() as i64)
            }
            "INCR" => self.increment(key, 1),
            "DECR" => self.increment(key, -1),
            "INCRBY" => self.increment(key, integer(2)),
            "DECRBY" => self.increment(key, -integer(2)),
            "SETBIT" => {
                let (offset, on) = (integer(2) as usize, integer(3) == 1);
                let held = self.held.entry(key.to_vec()).or_default();
                if held.value.len() <= offset / 8 {
                    held.value.resize(offset / 8 + 1, 0);
                }
                let (byte, mask) = (&mut held.value[offset / 8], 0x80_u8 >> (offset % 8));
                let old = *byte & mask != 0;
                *byte = if on { *byte | mask } else { *byte & !mask };
                Reply::Integer(old.into())
            }
            "GETBIT" => {
                let offset = integer(2) as usize;
                let byte = self.value(key).get(offset / 8).copied().unwrap_or(0);
                Reply::Integer((byte >> (7 - offset % 8) & 1).into())
            }
            "BITCOUNT" => {
                let value = self.value(key);
                let by_bit = text.get(4) == Some(&"BIT");
                let (start, end) = if text.len() > 2 { (integer(2), integer(3)) } else { (0, -1) };
                let found = range(start, end, if by_bit { value.len() * 8 } else { value.len() });
                let count = found.map_or(0, |(start, end)| {
                    let (from, to) = if by_bit { (start, end) } else { (start * 8, end * 8 + 7) };
                    Model::bits(value, from, to).filter(|on| *on).count()
                });
                Reply::Integer(count as i64)
            }
            "BITPOS" => {
                let value = self.value(key);
                let wanted = integer(2) == 1;
                if !self.held.contains_key(key) {
                    return Reply::Integer(if wanted { -1 } else { 0 });
                }
                let (start, end) =
                    (if text.len() > 3 { integer(3) } else { 0 }, if text.len() > 4 { integer(4) } else { -1 });
                let Some((start, end)) = clamped(start, end, value.len()) else { return Reply::Integer(-1) };
                match Model::bits(value, start * 8, end * 8 + 7).position(|on| on == wanted) {
                    Some(at) => Reply::Integer((start * 8 + at) as i64),
                    // A string is thought to go on with zeros, unless an end was given.
                    None if !wanted && text.len() <= 4 => Reply::Integer((end as i64 + 1) * 8),
                    None => Reply::Integer(-1),
                }
            }
            "DEL" | "UNLINK" => {
                Reply::Integer(words[1..].iter().filter(|key| self.held.remove(key.as_slice()).is_some()).count() as i64)
            }
            "EXISTS" | "TOUCH" => {
                Reply::Integer(words[1..].iter().filter(|key| self.held.contains_key(key.as_slice())).count() as i64)
            }
            "TYPE" => Reply::Simple(if self.held.contains_key(key) { "string" } else { "none" }.into()),
            "PEXPIREAT" => self.expire(key, integer(2), text.get(3).copied()),
            "PEXPIRETIME" => Reply::Integer(self.held.get(key).map_or(-2, |held| held.expires_at.unwrap_or(-1))),
            "PERSIST" => {
                Reply::Integer(self.held.get_mut(key).is_some_and(|held| held.expires_at.take().is_some()).into())
            }
            "RENAME" | "RENAMENX" => {
                let plain = text[0] == "RENAME";
                let Some(held) = self.held.get(key).cloned() else { return error("no such key") };
                if !plain && self.held.contains_key(&words[2]) {
                    return Reply::Integer(0);
                }
                self.held.remove(key);
                self.held.insert(words[2].clone(), held);
                if plain { Reply::ok() } else { Reply::Integer(1) }
            }
            "COPY" => {
                let Some(held) = self.held.get(key).cloned() else { return Reply::Integer(0) };
                if text.get(3) != Some(&"REPLACE") && self.held.contains_key(&words[2]) {
                    return Reply::Integer(0);
                }
                self.held.insert(words[2].clone(), held);
                Reply::Integer(1)
            }
            "DBSIZE" => Reply::Integer(self.held.len() as i64),
            "KEYS" => Reply::Array(self.held.keys().map(Reply::bulk).collect()),
            "ECHO" => Reply::bulk(&words[1]),
            "FLUSHALL" => {
                self.held.clear();
                Reply::ok()
            }
            other => panic!("the generator wrote {other}, which the model does not know"),
        }
    }
}

fn key(chance: &mut Chance) -> Vec<u8> {
    match chance.below(10) {
        0..7 => format!("key:{}", chance.below(120)).into_bytes(),
        _ => format!("{{tag{}}}:{}", chance.below(3), chance.below(6)).into_bytes(),
    }
}

/// A key of the shard that the tag names.
fn tagged(chance: &mut Chance, tag: u64) -> Vec<u8> {
    format!("{{tag{tag}}}:{}", chance.below(6)).into_bytes()
}

fn value(chance: &mut Chance) -> Vec<u8> {
    match chance.below(12) {
        0..4 => chance.between(-50, 1000).to_string().into_bytes(),
        4 => i64::MAX.to_string().into_bytes(),
        5 => Vec::new(),
        6 => (0..chance.below(3000)).map(|_| chance.next() as u8).collect(),
        7 => b"\r\n$-1\r\n".to_vec(),
        _ => (0..chance.below(40)).map(|_| chance.next() as u8).collect(),
    }
}

fn expiry(chance: &mut Chance) -> Vec<u8> {
    (FUTURE_MS + chance.between(0, 20) * 1000).to_string().into_bytes()
}

/// One command. With a tag, all its keys are in the tag's shard.
fn command(chance: &mut Chance, tag: Option<u64>) -> Vec<Vec<u8>> {
    let a_key = |chance: &mut Chance| match tag {
        Some(tag) => tagged(chance, tag),
        None => key(chance),
    };
    let mut words: Vec<Vec<u8>> = Vec::new();
    let name = *chance.pick(&[
        "SET",
        "SET",
        "SET",
        "SET",
        "GET",
        "GET",
        "GET",
        "GETSET",
        "GETDEL",
        "GETEX",
        "SETNX",
        "MGET",
        "MSET",
        "MSETNX",
        "APPEND",
        "STRLEN",
        "GETRANGE",
        "SETRANGE",
        "INCR",
        "DECR",
        "INCRBY",
        "DECRBY",
        "SETBIT",
        "GETBIT",
        "BITCOUNT",
        "BITPOS",
        "DEL",
        "UNLINK",
        "EXISTS",
        "TOUCH",
        "TYPE",
        "PEXPIREAT",
        "PEXPIRETIME",
        "PERSIST",
        "RENAME",
        "RENAMENX",
        "COPY",
        "ECHO",
    ]);
    words.push(name.into());
    match name {
        "SET" => {
            words.extend([a_key(chance), value(chance)]);
            match chance.below(8) {
                0 => words.push("NX".into()),
                1 => words.push("XX".into()),
                2 => words.extend(["XX".into(), "KEEPTTL".into()]),
                3 => words.extend(["PXAT".into(), expiry(chance)]),
                4 => words.push("GET".into()),
                5 => words.extend(["GET".into(), "XX".into(), "PXAT".into(), expiry(chance)]),
                _ => {}
            }
        }
        "GET" | "GETDEL" | "STRLEN" | "INCR" | "DECR" | "TYPE" | "PEXPIRETIME" | "PERSIST" => words.push(a_key(chance)),
        "GETSET" | "SETNX" | "APPEND" => words.extend([a_key(chance), value(chance)]),
        "ECHO" => words.push(value(chance)),
        "GETEX" => {
            words.push(a_key(chance));
            match chance.below(3) {
                0 => words.push("PERSIST".into()),
                1 => words.extend(["PXAT".into(), expiry(chance)]),
                _ => {}
            }
        }
        "MGET" | "DEL" | "UNLINK" | "EXISTS" | "TOUCH" => {
            let most = if matches!(name, "DEL" | "UNLINK") { 3 } else { 12 };
            for _ in 0..=chance.below(most) {
                words.push(a_key(chance));
            }
        }
        "MSET" => {
            for _ in 0..=chance.below(8) {
                words.extend([a_key(chance), value(chance)]);
            }
        }
        "MSETNX" => {
            let tag = tag.unwrap_or_else(|| chance.below(3));
            for _ in 0..=chance.below(3) {
                words.extend([tagged(chance, tag), value(chance)]);
            }
        }
        "GETRANGE" => words.extend([
            a_key(chance),
            chance.between(-40, 40).to_string().into(),
            chance.between(-40, 40).to_string().into(),
        ]),
        "SETRANGE" => words.extend([a_key(chance), chance.between(0, 60).to_string().into(), value(chance)]),
        "INCRBY" | "DECRBY" => words.extend([a_key(chance), chance.between(-1000, 1000).to_string().into()]),
        "SETBIT" => {
            words.extend([a_key(chance), chance.between(0, 400).to_string().into(), chance.below(2).to_string().into()])
        }
        "GETBIT" => words.extend([a_key(chance), chance.between(0, 400).to_string().into()]),
        "BITCOUNT" => {
            words.push(a_key(chance));
            if chance.below(2) == 0 {
                words.extend([chance.between(-40, 40).to_string().into(), chance.between(-40, 40).to_string().into()]);
                if chance.below(2) == 0 {
                    words.push("BIT".into());
                }
            }
        }
        "BITPOS" => {
            words.extend([a_key(chance), chance.below(2).to_string().into()]);
            for _ in 0..chance.below(3) {
                words.push(chance.between(-40, 40).to_string().into());
            }
        }
        "PEXPIREAT" => {
            let at = if chance.below(6) == 0 { PAST_MS.to_string().into() } else { expiry(chance) };
            words.extend([a_key(chance), at]);
            if chance.below(2) == 0 {
                words.push((*chance.pick(&["NX", "XX", "GT", "LT"])).into());
            }
        }
        "RENAME" | "RENAMENX" | "COPY" => {
            let tag = tag.unwrap_or_else(|| chance.below(3));
            let from = tagged(chance, tag);
            let mut to = tagged(chance, tag);
            while to == from {
                to = tagged(chance, tag);
            }
            words.extend([from, to]);
            if name == "COPY" && chance.below(2) == 0 {
                words.push("REPLACE".into());
            }
        }
        other => panic!("no arguments for {other}"),
    }
    words
}

/// A batch of commands and the replies that they must get.
fn batch(chance: &mut Chance, model: &mut Model) -> (Vec<Vec<Vec<u8>>>, Vec<Reply>) {
    let (mut commands, mut expected) = (Vec::new(), Vec::new());
    let mut add = |words: Vec<Vec<u8>>, reply: Reply| {
        commands.push(words);
        expected.push(reply);
    };
    for _ in 0..=chance.below(60) {
        match chance.below(60) {
            0 => {
                // A transaction: everything in it concerns one shard.
                let tag = chance.below(3);
                add(vec!["MULTI".into()], Reply::ok());
                let mut replies = Vec::new();
                for _ in 0..=chance.below(8) {
                    let words = command(chance, Some(tag));
                    replies.push(model.apply(&words));
                    add(words, Reply::Simple("QUEUED".into()));
                }
                add(vec!["EXEC".into()], Reply::Array(replies));
            }
            1 => {
                add(vec!["MULTI".into()], Reply::ok());
                add(command(chance, None), Reply::Simple("QUEUED".into()));
                add(vec!["DISCARD".into()], Reply::ok());
            }
            2 => {
                let words = vec!["DBSIZE".into()];
                let reply = model.apply(&words);
                add(words, reply);
            }
            3 => {
                let words = vec!["KEYS".into(), "*".into()];
                let reply = model.apply(&words);
                add(words, reply);
            }
            4 if chance.below(40) == 0 => {
                let words = vec!["FLUSHALL".into()];
                let reply = model.apply(&words);
                add(words, reply);
            }
            _ => {
                let words = command(chance, None);
                let reply = model.apply(&words);
                add(words, reply);
            }
        }
    }
    (commands, expected)
}

fn sorted(reply: Reply) -> Reply {
    let mut keys: Vec<Vec<u8>> = reply.elements().iter().map(|key| key.bytes().to_vec()).collect();
    keys.sort();
    Reply::Array(keys.into_iter().map(Reply::Bulk).collect())
}

/// Every key, by SCAN with steps of a random size. Nothing changes meanwhile, so nothing may come twice.
fn scanned(client: &mut Client, chance: &mut Chance) -> Reply {
    let mut keys = Vec::new();
    let mut cursor = b"0".to_vec();
    loop {
        let reply = client.call(&[b"SCAN".as_slice(), &cursor, b"COUNT", chance.between(1, 40).to_string().as_bytes()]);
        keys.extend(reply.elements()[1].elements().to_vec());
        cursor = reply.elements()[0].bytes().to_vec();
        if cursor == b"0" {
            return sorted(Reply::Array(keys));
        }
    }
}

fn show(words: &[Vec<u8>]) -> String {
    words.iter().map(|word| word.escape_ascii().to_string()).collect::<Vec<_>>().join(" ")
}

fn agree(seed: u64, nodes: &[(&str, Node)]) {
    let mut chance = Chance(seed);
    let mut model = Model::default();
    let mut clients: Vec<(&str, Client)> = nodes.iter().map(|(name, node)| (*name, node.connect())).collect();
    for (_, client) in &mut clients {
        assert_eq!(client.call(&["FLUSHALL"]), Reply::ok());
    }
    let mut done = 0;
    while done < COMMANDS {
        let (commands, expected) = batch(&mut chance, &mut model);
        for (name, client) in &mut clients {
            let replies = client.pipeline(&commands);
            for (index, (reply, expected)) in replies.into_iter().zip(&expected).enumerate() {
                let reply = if commands[index][0] == b"KEYS" { sorted(reply) } else { reply };
                assert!(
                    reply == *expected,
                    "seed {seed}, {name}, command {}: {}\n  the model says {expected:?}\n  the node says  {reply:?}\n  before it: {}",
                    done + index,
                    show(&commands[index]),
                    commands[index.saturating_sub(4)..index]
                        .iter()
                        .map(|words| show(words))
                        .collect::<Vec<_>>()
                        .join(" | "),
                );
            }
        }
        done += commands.len();
    }
    let all = model.apply(&["KEYS".into(), "*".into()]);
    for (name, client) in &mut clients {
        assert_eq!(scanned(client, &mut chance), all, "seed {seed}, {name}: SCAN at the end");
    }
}

/// One core, two cores and the model give the same reply to every command.
#[test]
fn one_core_two_cores_and_the_model_agree() {
    let nodes = [("one core", Node::with_cores(1)), ("two cores", Node::with_cores(2))];
    let seeds = match std::env::var("GRIDKV_SEED") {
        Ok(seed) => vec![seed.parse().expect("GRIDKV_SEED is a number")],
        Err(_) => SEEDS.to_vec(),
    };
    for seed in seeds {
        println!("seed {seed}");
        agree(seed, &nodes);
    }
}

/// The same with the simpler storage backend and with other shard counts.
#[test]
fn backends_and_shard_counts_do_not_show() {
    let nodes = [
        ("backend memory", Node::start(&["--backend", "memory", "--cores", "1"])),
        ("32 shards", Node::start(&["--shards", "32"])),
        ("16384 shards", Node::start(&["--shards", "16384"])),
    ];
    for seed in [11, 12] {
        println!("seed {seed}");
        agree(seed, &nodes);
    }
}

/// Several clients at once, each with keys of its own: nobody sees another's replies, and each agrees with its own model.
#[test]
fn clients_side_by_side_do_not_mix() {
    let node = Node::with_cores(2);
    std::thread::scope(|scope| {
        for worker in 0..6_u64 {
            let node = &node;
            scope.spawn(move || {
                let mut chance = Chance(100 + worker);
                let mut model = Model::default();
                let mut client = node.connect();
                for _ in 0..60 {
                    let mut commands = Vec::new();
                    let mut expected = Vec::new();
                    for _ in 0..=chance.below(80) {
                        let mut words = command(&mut chance, Some(worker % 3));
                        for word in words.iter_mut().skip(1).filter(|word| word.starts_with(b"{tag")) {
                            word.extend_from_slice(format!("/{worker}").as_bytes());
                        }
                        expected.push(model.apply(&words));
                        commands.push(words);
                    }
                    assert_eq!(client.pipeline(&commands), expected, "worker {worker}");
                }
            });
        }
    });
}

/// The model is right about Redis: point it at a redis-server with `GRIDKV_REDIS=127.0.0.1:6379`.
#[test]
#[ignore = "for checking the model itself against a redis-server"]
fn the_model_agrees_with_redis() {
    let address = std::env::var("GRIDKV_REDIS").expect("GRIDKV_REDIS names a redis-server that may be emptied");
    let mut client = Client::connect(address.parse().expect("host:port"));
    for seed in 1..30 {
        let mut chance = Chance(seed);
        let mut model = Model::default();
        assert_eq!(client.call(&["FLUSHALL"]), Reply::ok());
        for _ in 0..200 {
            let (commands, expected) = batch(&mut chance, &mut model);
            for (index, (reply, expected)) in client.pipeline(&commands).into_iter().zip(&expected).enumerate() {
                let reply = if commands[index][0] == b"KEYS" { sorted(reply) } else { reply };
                assert!(
                    reply == *expected,
                    "seed {seed}: {}\n  the model says {expected:?}\n  Redis says     {reply:?}",
                    show(&commands[index])
                );
            }
        }
    }
}
