//! The table: every command, once.
//!
//! A row reads: name, arity, flags, (first key, last key, step), extra ACL categories, route, how it runs, group, since
//! which Redis, cost, summary. Subcommands follow their container as `container|name`. Flags that hold for a whole
//! family are Redis's, so that clients which plan by `COMMAND` plan right.

use super::Merge::{Array, Concat, Ok as AllOk, Sum};
use super::Route::{Every, Key, Node, Session, Shard, Split};
use super::{Categories, CommandId, Flags, Route, Run, Spec, bits, expire, keys, string};

macro_rules! commands {
    ($($name:literal $arity:literal $flags:literal ($first:literal $last:literal $step:literal) $categories:literal
       $route:expr, $run:expr; $group:literal $since:literal $cost:literal $summary:literal)*) => {
        [$(row($name, $arity, $flags, ($first, $last, $step), $categories, $route, $run,
               [$group, $since, $cost, $summary])),*]
    };
}

#[expect(clippy::too_many_arguments, reason = "one per column of the table")]
const fn row(
    name: &'static str,
    arity: i16,
    flags: &'static str,
    keys: (i16, i16, i16),
    categories: &'static str,
    route: Route,
    run: Option<Run>,
    [group, since, complexity, summary]: [&'static str; 4],
) -> Spec {
    let flags = Flags::of(flags);
    Spec {
        id: CommandId(0),
        name,
        arity,
        flags,
        categories: Categories::of(categories, flags, group),
        first_key: keys.0,
        last_key: keys.1,
        step: keys.2,
        route,
        run,
        summary,
        since,
        group,
        complexity,
        subcommands: (0, 0),
    }
}

/// Whether `name` is a subcommand of `container`.
const fn belongs(name: &[u8], container: &[u8]) -> bool {
    if name.len() <= container.len() || name[container.len()] != b'|' {
        return false;
    }
    let mut at = 0;
    while at < container.len() {
        if name[at] != container[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// Gives rows their ids and containers their subcommands.
const fn number<const N: usize>(mut rows: [Spec; N]) -> [Spec; N] {
    let mut at = 0;
    while at < N {
        rows[at].id = CommandId(at as u16);
        let mut end = at + 1;
        while end < N && belongs(rows[end].name.as_bytes(), rows[at].name.as_bytes()) {
            end += 1;
        }
        rows[at].subcommands = (at as u16 + 1, end as u16);
        at += 1;
    }
    rows
}

pub(super) static SPECS: [Spec; ROWS.len()] = number(ROWS);

#[rustfmt::skip]
const ROWS: [Spec; 138] = commands! {
    // Connection.
    "ping" -1 "fast" (0 0 0) "connection" Session, None; "connection" "1.0.0" "O(1)" "Answers PONG, or what it was sent."
    "echo" 2 "loading stale fast" (0 0 0) "connection" Session, None; "connection" "1.0.0" "O(1)" "Answers what it was sent."
    "hello" -1 "noscript loading stale fast no_auth allow_busy" (0 0 0) "connection" Session, None; "connection" "6.0.0" "O(1)" "Chooses the protocol version, and may authenticate and name the connection."
    "auth" -2 "noscript loading stale fast no_auth allow_busy" (0 0 0) "connection" Session, None; "connection" "1.0.0" "O(1)" "Authenticates the connection."
    "quit" -1 "noscript loading stale fast no_auth allow_busy" (0 0 0) "connection" Session, None; "connection" "1.0.0" "O(1)" "Closes the connection after the replies to earlier requests."
    "reset" 1 "noscript loading stale fast no_auth allow_busy" (0 0 0) "connection" Session, None; "connection" "6.2.0" "O(1)" "Puts the connection back to how it was when it was opened."
    "select" 2 "loading stale fast" (0 0 0) "connection" Session, None; "connection" "1.0.0" "O(1)" "Chooses the database; there is one, 0."
    "asking" 1 "fast" (0 0 0) "connection" Session, None; "cluster" "3.0.0" "O(1)" "Accepted for cluster clients; changes nothing."
    "readonly" 1 "loading stale fast" (0 0 0) "connection" Session, None; "cluster" "3.0.0" "O(1)" "Accepted for cluster clients; changes nothing."
    "readwrite" 1 "loading stale fast" (0 0 0) "connection" Session, None; "cluster" "3.0.0" "O(1)" "Accepted for cluster clients; changes nothing."
    "cluster" -2 "" (0 0 0) "" Node, None; "cluster" "3.0.0" "Depends on the subcommand." "Container of the commands about the cluster."
    "cluster|countkeysinslot" 3 "stale" (0 0 0) "" Node, None; "cluster" "3.0.0" "O(N) with N keys of the node" "How many keys of a slot have a copy on this node."
    "cluster|getkeysinslot" 4 "stale" (0 0 0) "" Node, None; "cluster" "3.0.0" "O(N) with N keys of the node" "Keys of a slot that have a copy on this node."
    "cluster|gridkv" -3 "admin noscript stale" (0 0 0) "" Node, None; "cluster" "7.2.0" "O(N) with N members and shards" "STATUS, MEMBERS, SHARDS as JSON; DRAIN, UNDRAIN, REMOVE a member; REPAIR of copies and REPAIR-STATUS; ACCEPT-LOSS of shards."
    "cluster|info" 2 "stale" (0 0 0) "" Node, None; "cluster" "3.0.0" "O(1)" "The state of the cluster as this node sees it."
    "cluster|keyslot" 3 "stale" (0 0 0) "" Node, None; "cluster" "3.0.0" "O(N) with the length of the key" "The slot of a key."
    "cluster|links" 2 "stale" (0 0 0) "" Node, None; "cluster" "7.0.0" "O(1)" "No links: nodes are not joined as those of Redis Cluster."
    "cluster|myid" 2 "stale" (0 0 0) "" Node, None; "cluster" "3.0.0" "O(1)" "The id of this node."
    "cluster|myshardid" 2 "stale" (0 0 0) "" Node, None; "cluster" "7.2.0" "O(1)" "The id of this node, each being a shard in the sense of Redis."
    "cluster|nodes" 2 "stale" (0 0 0) "" Node, None; "cluster" "3.0.0" "O(N) with N nodes" "The nodes and their slots."
    "cluster|shards" 2 "loading stale" (0 0 0) "" Node, None; "cluster" "7.0.0" "O(N) with N nodes" "The nodes and their slots, by shards in the sense of Redis."
    "cluster|slots" 2 "loading stale" (0 0 0) "" Node, None; "cluster" "3.0.0" "O(N) with N nodes" "Which node clients should ask for which slots."
    "cluster|help" 2 "loading stale" (0 0 0) "" Session, None; "cluster" "5.0.0" "O(1)" "Prints this help."
    "client" -2 "" (0 0 0) "" Session, None; "connection" "2.4.0" "Depends on the subcommand." "Container of the commands about connections."
    "client|id" 2 "noscript loading stale" (0 0 0) "connection" Session, None; "connection" "5.0.0" "O(1)" "The id of this connection."
    "client|getname" 2 "noscript loading stale" (0 0 0) "connection" Session, None; "connection" "2.6.9" "O(1)" "The name of this connection."
    "client|setname" 3 "noscript loading stale" (0 0 0) "connection" Session, None; "connection" "2.6.9" "O(1)" "Names this connection."
    "client|setinfo" 4 "noscript loading stale" (0 0 0) "connection" Session, None; "connection" "7.2.0" "O(1)" "Tells the name and version of the client's library."
    "client|reply" 3 "noscript loading stale" (0 0 0) "connection" Session, None; "connection" "3.2.0" "O(1)" "Turns replies on, off, or off for the next command."
    "client|no-evict" 3 "admin noscript loading stale" (0 0 0) "connection" Session, None; "connection" "7.0.0" "O(1)" "Asks that this connection not be closed to save memory."
    "client|no-touch" 3 "noscript loading stale" (0 0 0) "connection" Session, None; "connection" "7.2.0" "O(1)" "Asks that this connection's reads not count as uses of keys."
    "client|consistency" -2 "noscript loading stale" (0 0 0) "connection" Session, None; "connection" "7.2.0" "O(1)" "How many replicas answer this connection: one, quorum, all, default."
    "client|list" -2 "admin noscript loading stale" (0 0 0) "connection" Node, None; "connection" "2.4.0" "O(N) with N connections" "Lists connections."
    "client|info" 2 "noscript loading stale" (0 0 0) "connection" Node, None; "connection" "6.2.0" "O(1)" "Describes this connection."
    "client|kill" -3 "admin noscript loading stale" (0 0 0) "connection" Node, None; "connection" "2.4.0" "O(N) with N connections" "Closes connections."
    "client|help" 2 "loading stale" (0 0 0) "connection" Session, None; "connection" "5.0.0" "O(1)" "Prints this help."

    // Transactions.
    "multi" 1 "noscript loading stale fast allow_busy" (0 0 0) "" Session, None; "transactions" "1.2.0" "O(1)" "Begins a transaction: commands that follow are queued."
    "exec" 1 "noscript loading stale skip_slowlog" (0 0 0) "" Session, None; "transactions" "1.2.0" "Depends on the queued commands." "Runs the queued commands, unless a watched key was changed."
    "discard" 1 "noscript loading stale fast allow_busy" (0 0 0) "" Session, None; "transactions" "2.0.0" "O(N) with N queued commands" "Drops the transaction."
    "watch" -2 "noscript loading stale fast allow_busy" (1 -1 1) "" Session, None; "transactions" "2.2.0" "O(1) for each key" "Calls the next transaction off if one of the keys is changed before."
    "unwatch" 1 "noscript loading stale fast allow_busy" (0 0 0) "" Session, None; "transactions" "2.2.0" "O(1)" "Forgets the watched keys."

    // Server.
    "command" -1 "loading stale" (0 0 0) "connection" Session, None; "server" "2.8.13" "O(N) with N commands" "Describes all commands."
    "command|count" 2 "loading stale" (0 0 0) "connection" Session, None; "server" "2.8.13" "O(1)" "How many commands there are."
    "command|docs" -2 "loading stale" (0 0 0) "connection" Session, None; "server" "7.0.0" "O(N) with N commands asked about" "Explains commands to people."
    "command|getkeys" -4 "loading stale" (0 0 0) "connection" Session, None; "server" "2.8.13" "O(N) with N arguments" "Which arguments of a command line are keys."
    "command|getkeysandflags" -4 "loading stale" (0 0 0) "connection" Session, None; "server" "7.0.0" "O(N) with N arguments" "Which arguments of a command line are keys, and what is done to them."
    "command|info" -2 "loading stale" (0 0 0) "connection" Session, None; "server" "2.8.13" "O(N) with N commands asked about" "Describes commands."
    "command|list" -2 "loading stale" (0 0 0) "connection" Session, None; "server" "7.0.0" "O(N) with N commands" "Names of all commands, or of some."
    "command|help" 2 "loading stale" (0 0 0) "connection" Session, None; "server" "5.0.0" "O(1)" "Prints this help."
    "config" -2 "" (0 0 0) "" Node, None; "server" "2.0.0" "Depends on the subcommand." "Container of the commands about the configuration."
    "config|get" -3 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.0.0" "O(N) with N parameters" "Values of the parameters that match the patterns."
    "config|set" -4 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.0.0" "O(N) with N parameters" "Changes parameters while the node runs."
    "config|resetstat" 2 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.0.0" "O(1)" "Sets statistics to zero."
    "config|rewrite" 2 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.8.0" "O(1)" "Would write the configuration file; refused here."
    "config|help" 2 "loading stale" (0 0 0) "" Session, None; "server" "5.0.0" "O(1)" "Prints this help."
    "info" -1 "loading stale" (0 0 0) "dangerous" Node, None; "server" "1.0.0" "O(1)" "Facts and statistics of the node."
    "bgrewriteaof" 1 "admin noscript" (0 0 0) "" Node, None; "server" "1.0.0" "O(1)" "Has each core take a snapshot, which makes its log short."
    "bgsave" -1 "admin noscript" (0 0 0) "" Node, None; "server" "1.0.0" "O(1)" "Has each core take a snapshot, which makes its log short."
    "lastsave" 1 "loading stale fast" (0 0 0) "admin dangerous" Node, None; "server" "1.0.0" "O(1)" "Unix time of the last snapshot, or of the start."
    "time" 1 "loading stale fast" (0 0 0) "" Node, None; "server" "2.6.0" "O(1)" "Unix time in seconds and microseconds."
    "role" 1 "noscript loading stale fast" (0 0 0) "admin dangerous" Node, None; "server" "2.8.12" "O(1)" "The role of this node in replication."
    "wait" 3 "noscript" (0 0 0) "connection" Node, None; "generic" "3.0.0" "O(1)" "Waits until replicas have this connection's writes."
    "slowlog" -2 "" (0 0 0) "" Node, None; "server" "2.2.12" "Depends on the subcommand." "Container of the commands about slow requests."
    "slowlog|get" -2 "admin loading stale" (0 0 0) "" Node, None; "server" "2.2.12" "O(N) with N entries" "The latest slow requests."
    "slowlog|len" 2 "admin loading stale" (0 0 0) "" Node, None; "server" "2.2.12" "O(1)" "How many slow requests are kept."
    "slowlog|reset" 2 "admin loading stale" (0 0 0) "" Node, None; "server" "2.2.12" "O(N) with N entries" "Forgets slow requests."
    "slowlog|help" 2 "loading stale" (0 0 0) "" Session, None; "server" "6.2.0" "O(1)" "Prints this help."
    "latency" -2 "" (0 0 0) "" Node, None; "server" "2.8.13" "Depends on the subcommand." "Container of the commands about latency."
    "latency|doctor" 2 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.8.13" "O(1)" "Latency in words."
    "latency|graph" 3 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.8.13" "O(1)" "Latency of an event as a picture."
    "latency|histogram" -2 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "7.0.0" "O(N) with N commands" "How long commands took."
    "latency|history" 3 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.8.13" "O(1)" "Samples of an event's latency."
    "latency|latest" 2 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.8.13" "O(1)" "The latest sample of each event."
    "latency|reset" -2 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "2.8.13" "O(1)" "Forgets samples."
    "latency|help" 2 "loading stale" (0 0 0) "" Session, None; "server" "2.8.13" "O(1)" "Prints this help."
    "memory" -2 "" (0 0 0) "" Node, None; "server" "4.0.0" "Depends on the subcommand." "Container of the commands about memory."
    "memory|usage" -3 "readonly" (2 2 1) "" Key, Some(keys::memory_usage); "server" "4.0.0" "O(1)" "Bytes that a key and its value take."
    "memory|stats" 2 "" (0 0 0) "" Node, None; "server" "4.0.0" "O(1)" "How memory is used."
    "memory|doctor" 2 "" (0 0 0) "" Node, None; "server" "4.0.0" "O(1)" "Memory in words."
    "memory|purge" 2 "" (0 0 0) "" Node, None; "server" "4.0.0" "O(1)" "Asks the allocator to return memory."
    "memory|help" 2 "loading stale" (0 0 0) "" Session, None; "server" "4.0.0" "O(1)" "Prints this help."
    "debug" -2 "admin noscript loading stale" (0 0 0) "" Node, None; "server" "1.0.0" "Depends on the subcommand." "For tests of clients; only what does no harm."
    "shutdown" -1 "admin noscript loading stale no_multi allow_busy" (0 0 0) "" Node, None; "server" "1.0.0" "O(1)" "Stops the node."
    "dbsize" 1 "readonly fast" (0 0 0) "keyspace" Every(Sum), Some(keys::dbsize); "server" "1.0.0" "O(1)" "Number of keys."
    "flushdb" -1 "write" (0 0 0) "keyspace dangerous" Every(AllOk), Some(keys::flush); "server" "1.0.0" "O(N) with N keys" "Removes all keys."
    "flushall" -1 "write" (0 0 0) "keyspace dangerous" Every(AllOk), Some(keys::flush); "server" "1.0.0" "O(N) with N keys" "Removes all keys."

    // Strings.
    "get" 2 "readonly fast" (1 1 1) "" Key, Some(string::get); "string" "1.0.0" "O(1)" "The value of a key."
    "set" -3 "write denyoom" (1 1 1) "" Key, Some(string::set); "string" "1.0.0" "O(1)" "Sets a key, with conditions and a time to live if asked."
    "setnx" 3 "write denyoom fast" (1 1 1) "" Key, Some(string::setnx); "string" "1.0.0" "O(1)" "Sets a key that does not exist."
    "setex" 4 "write denyoom" (1 1 1) "" Key, Some(string::setex); "string" "2.0.0" "O(1)" "Sets a key with a time to live in seconds."
    "psetex" 4 "write denyoom" (1 1 1) "" Key, Some(string::psetex); "string" "2.6.0" "O(1)" "Sets a key with a time to live in milliseconds."
    "getset" 3 "write denyoom fast" (1 1 1) "" Key, Some(string::getset); "string" "1.0.0" "O(1)" "Sets a key and answers its old value."
    "getdel" 2 "write fast" (1 1 1) "" Key, Some(string::getdel); "string" "6.2.0" "O(1)" "Deletes a key and answers its value."
    "getex" -2 "write fast" (1 1 1) "" Key, Some(string::getex); "string" "6.2.0" "O(1)" "The value of a key, its time to live changed."
    "mget" -2 "readonly fast" (1 -1 1) "" Split(Array), Some(string::mget); "string" "1.0.0" "O(N) with N keys" "Values of keys."
    "mset" -3 "write denyoom" (1 -1 2) "" Split(AllOk), Some(string::mset); "string" "1.0.1" "O(N) with N keys" "Sets keys, each for itself."
    "msetnx" -3 "write denyoom" (1 -1 2) "" Shard, Some(string::msetnx); "string" "1.0.1" "O(N) with N keys" "Sets keys if none of them exists; they must share a shard."
    "append" 3 "write denyoom fast" (1 1 1) "" Key, Some(string::append); "string" "2.0.0" "O(N) with the length of the value" "Adds to the end of a value."
    "strlen" 2 "readonly fast" (1 1 1) "" Key, Some(string::strlen); "string" "2.2.0" "O(1)" "Length of a value."
    "getrange" 4 "readonly" (1 1 1) "" Key, Some(string::getrange); "string" "2.4.0" "O(N) with the length of the range" "Part of a value."
    "setrange" 4 "write denyoom" (1 1 1) "" Key, Some(string::setrange); "string" "2.2.0" "O(N) with the length of the part; of the value when it grows" "Overwrites part of a value, which grows with zeros as needed."
    "substr" 4 "readonly" (1 1 1) "" Key, Some(string::getrange); "string" "1.0.0" "O(N) with the length of the range" "Part of a value; the old name of GETRANGE."
    "incr" 2 "write denyoom fast" (1 1 1) "" Key, Some(string::incr); "string" "1.0.0" "O(1)" "Adds one to a number."
    "decr" 2 "write denyoom fast" (1 1 1) "" Key, Some(string::decr); "string" "1.0.0" "O(1)" "Takes one from a number."
    "incrby" 3 "write denyoom fast" (1 1 1) "" Key, Some(string::incrby); "string" "1.0.0" "O(1)" "Adds to a number."
    "decrby" 3 "write denyoom fast" (1 1 1) "" Key, Some(string::decrby); "string" "1.0.0" "O(1)" "Takes from a number."
    "incrbyfloat" 3 "write denyoom fast" (1 1 1) "" Key, Some(string::incrbyfloat); "string" "2.6.0" "O(1)" "Adds to a floating-point number."
    "setbit" 4 "write denyoom" (1 1 1) "" Key, Some(bits::setbit); "bitmap" "2.2.0" "O(1); O(N) when the value grows" "Sets or clears a bit and answers what it was."
    "getbit" 3 "readonly fast" (1 1 1) "" Key, Some(bits::getbit); "bitmap" "2.2.0" "O(1)" "A bit of a value."
    "bitcount" -2 "readonly" (1 1 1) "" Key, Some(bits::bitcount); "bitmap" "2.6.0" "O(N) with the length of the range" "Counts bits that are set."
    "bitpos" -3 "readonly" (1 1 1) "" Key, Some(bits::bitpos); "bitmap" "2.8.7" "O(N) with the length of the range" "Where the first bit is that is set, or clear."
    "lcs" -3 "readonly" (1 2 1) "" Shard, Some(string::lcs); "string" "7.0.0" "O(N*M) with the lengths of the values" "Longest common subsequence of two values; the keys must share a shard."

    // Keys.
    "del" -2 "write" (1 -1 1) "keyspace" Split(Sum), Some(keys::del); "generic" "1.0.0" "O(N) with N keys" "Deletes keys."
    "unlink" -2 "write fast" (1 -1 1) "keyspace" Split(Sum), Some(keys::del); "generic" "4.0.0" "O(N) with N keys" "Deletes keys; the same as DEL."
    "exists" -2 "readonly fast" (1 -1 1) "keyspace" Split(Sum), Some(keys::exists); "generic" "1.0.0" "O(N) with N keys" "How many of the keys exist."
    "touch" -2 "readonly fast" (1 -1 1) "keyspace" Split(Sum), Some(keys::exists); "generic" "3.2.1" "O(N) with N keys" "How many of the keys exist; counts as a use of them."
    "type" 2 "readonly fast" (1 1 1) "keyspace" Key, Some(keys::kind); "generic" "1.0.0" "O(1)" "The type of a value: string, or none."
    "rename" 3 "write" (1 2 1) "keyspace" Shard, Some(keys::rename); "generic" "1.0.0" "O(N) with the length of the value" "Gives a value another key, in the same shard."
    "renamenx" 3 "write fast" (1 2 1) "keyspace" Shard, Some(keys::renamenx); "generic" "1.0.0" "O(N) with the length of the value" "Gives a value another key that does not exist, in the same shard."
    "copy" -3 "write denyoom" (1 2 1) "keyspace" Shard, Some(keys::copy); "generic" "6.2.0" "O(N) with the length of the value" "Copies a value to another key in the same shard."
    "randomkey" 1 "readonly" (0 0 0) "keyspace" Node, None; "generic" "1.0.0" "O(1)" "Some key."
    "keys" 2 "readonly" (0 0 0) "keyspace dangerous" Every(Concat), Some(keys::keys); "generic" "1.0.0" "O(N) with N keys" "All keys that match a pattern."
    "scan" -2 "readonly" (0 0 0) "keyspace" Node, None; "generic" "2.8.0" "O(1) for a step; O(N) with N keys for all" "Keys, step by step."
    "expire" -3 "write fast" (1 1 1) "keyspace" Key, Some(expire::expire); "generic" "1.0.0" "O(1)" "Sets a key's time to live in seconds."
    "pexpire" -3 "write fast" (1 1 1) "keyspace" Key, Some(expire::pexpire); "generic" "2.6.0" "O(1)" "Sets a key's time to live in milliseconds."
    "expireat" -3 "write fast" (1 1 1) "keyspace" Key, Some(expire::expireat); "generic" "1.2.0" "O(1)" "Sets when a key expires, in Unix seconds."
    "pexpireat" -3 "write fast" (1 1 1) "keyspace" Key, Some(expire::pexpireat); "generic" "2.6.0" "O(1)" "Sets when a key expires, in Unix milliseconds."
    "ttl" 2 "readonly fast" (1 1 1) "keyspace" Key, Some(expire::ttl); "generic" "1.0.0" "O(1)" "Seconds that a key has left."
    "pttl" 2 "readonly fast" (1 1 1) "keyspace" Key, Some(expire::pttl); "generic" "2.6.0" "O(1)" "Milliseconds that a key has left."
    "expiretime" 2 "readonly fast" (1 1 1) "keyspace" Key, Some(expire::expiretime); "generic" "7.0.0" "O(1)" "When a key expires, in Unix seconds."
    "pexpiretime" 2 "readonly fast" (1 1 1) "keyspace" Key, Some(expire::pexpiretime); "generic" "7.0.0" "O(1)" "When a key expires, in Unix milliseconds."
    "persist" 2 "write fast" (1 1 1) "keyspace" Key, Some(expire::persist); "generic" "2.2.0" "O(1)" "Takes a key's time to live away."
    "object" -2 "" (0 0 0) "" Session, None; "generic" "2.2.3" "Depends on the subcommand." "Container of the commands about how values are kept."
    "object|encoding" 3 "readonly" (2 2 1) "keyspace" Key, Some(keys::object_encoding); "generic" "2.2.3" "O(1)" "How Redis would encode the value."
    "object|refcount" 3 "readonly" (2 2 1) "keyspace" Key, Some(keys::object_refcount); "generic" "2.2.3" "O(1)" "Always 1: values are not shared."
    "object|idletime" 3 "readonly" (2 2 1) "keyspace" Key, Some(keys::object_idletime); "generic" "2.2.3" "O(1)" "Seconds since the last write of the value; reads are not tracked."
    "object|freq" 3 "readonly" (2 2 1) "keyspace" Key, Some(keys::object_freq); "generic" "4.0.0" "O(1)" "Refused: uses are not counted per key."
    "object|help" 2 "loading stale" (0 0 0) "keyspace" Session, None; "generic" "6.2.0" "O(1)" "Prints this help."
};

/// Commands of Redis that work on lists, hashes, sets, sorted sets, streams, positions and estimates.
#[rustfmt::skip]
pub(super) static OTHER_TYPES: &[&str] = &[
    "blmove", "blmpop", "blpop", "brpop", "brpoplpush", "lindex", "linsert", "llen", "lmove", "lmpop", "lpop", "lpos",
    "lpush", "lpushx", "lrange", "lrem", "lset", "ltrim", "rpop", "rpoplpush", "rpush", "rpushx",
    "hdel", "hexists", "hexpire", "hget", "hgetall", "hincrby", "hincrbyfloat", "hkeys", "hlen", "hmget", "hmset",
    "hrandfield", "hscan", "hset", "hsetnx", "hstrlen", "httl", "hvals",
    "sadd", "scard", "sdiff", "sdiffstore", "sinter", "sintercard", "sinterstore", "sismember", "smembers",
    "smismember", "smove", "spop", "srandmember", "srem", "sscan", "sunion", "sunionstore",
    "bzmpop", "bzpopmax", "bzpopmin", "zadd", "zcard", "zcount", "zdiff", "zdiffstore", "zincrby", "zinter",
    "zintercard", "zinterstore", "zlexcount", "zmpop", "zmscore", "zpopmax", "zpopmin", "zrandmember", "zrange",
    "zrangebylex", "zrangebyscore", "zrangestore", "zrank", "zrem", "zremrangebylex", "zremrangebyrank",
    "zremrangebyscore", "zrevrange", "zrevrangebylex", "zrevrangebyscore", "zrevrank", "zscan", "zscore", "zunion",
    "zunionstore",
    "xack", "xadd", "xautoclaim", "xclaim", "xdel", "xgroup", "xinfo", "xlen", "xpending", "xrange", "xread",
    "xreadgroup", "xrevrange", "xsetid", "xtrim",
    "geoadd", "geodist", "geohash", "geopos", "georadius", "georadius_ro", "georadiusbymember",
    "georadiusbymember_ro", "geosearch", "geosearchstore", "pfadd", "pfcount", "pfdebug", "pfmerge", "sort", "sort_ro",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sound() {
        let mut names: Vec<_> = SPECS.iter().map(|spec| spec.name).chain(OTHER_TYPES.iter().copied()).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "a name is there twice");
        for (at, spec) in SPECS.iter().enumerate() {
            assert_eq!(usize::from(spec.id.0), at);
            assert_eq!(spec.name, spec.name.to_ascii_lowercase());
            assert!(spec.summary.ends_with('.') && !spec.complexity.is_empty(), "{}", spec.name);
            let has_keys = spec.first_key != 0;
            match spec.route {
                Route::Key | Route::Shard | Route::Split(_) => {
                    assert!(has_keys && spec.run.is_some(), "{}", spec.name)
                }
                Route::Every(_) => assert!(!has_keys && spec.run.is_some(), "{}", spec.name),
                Route::Session | Route::Node => assert!(spec.run.is_none(), "{}", spec.name),
            }
            let writes = spec.flags.contains(Flags::WRITE);
            assert!(!(writes && spec.flags.contains(Flags::READONLY)), "{}", spec.name);
            if spec.name.contains('|') {
                let container = SPECS.iter().find(|s| spec.name.starts_with(&format!("{}|", s.name)));
                assert!(container.is_some_and(|c| c.subcommands().iter().any(|s| s.id == spec.id)), "{}", spec.name);
            }
        }
    }
}
