//! Commands about the node: those whose route in the table is [`Route::Node`](gridkv_engine::command::Route::Node).
//!
//! ```text
//!   session ──answer(core, caller, spec, args)──▶ one reply, as bytes
//!                        │
//!                        └─ each_core ─▶ code that runs on every core, and brings back copies
//! ```
//!
//! An answer is made by a task of the caller's core. It may await other cores and timers and holds nothing meanwhile;
//! the session goes on with other connections. Everything but the gathering sees only values and is tested as such.
//!
//! | file | decides |
//! |---|---|
//! | `settings` | what may change while the node runs, and how all cores agree on it |
//! | `gather` | how a task asks other cores |
//! | `config` | `CONFIG` |
//! | `info` | `INFO` |
//! | `clients` | `CLIENT LIST`, `INFO`, `KILL` |
//! | `slow` | `SLOWLOG`, `LATENCY`; `slowlog` and `latency` hold what they show |
//! | `memory` | `MEMORY` |
//! | `keys` | `SCAN`, `RANDOMKEY` |
//! | `debug` | `DEBUG` |
//! | `cluster` | `CLUSTER`, as clients of Redis Cluster expect it |
//! | `admin` | `CLUSTER GRIDKV`: the cluster for whoever runs it |

mod admin;
pub(crate) mod clients;
mod cluster;
mod config;
mod debug;
pub(crate) mod gather;
mod info;
mod keys;
pub(crate) mod latency;
mod memory;
mod saving;
pub(crate) mod settings;
mod slow;
pub(crate) mod slowlog;

use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gridkv_engine::command::Spec;
use gridkv_engine::command::number::parse_i64;
use gridkv_engine::reply::Reply;
use gridkv_net::resp::{Protocol, Writer};

pub(crate) use admin::shard_counts;
#[cfg(test)]
pub(crate) use cluster::tests::three as cluster_view_of_three;
pub(crate) use slow::{Notes, note_later};

use crate::cluster::requests::level_of;
use crate::cores::CoreRc;

/// The longest that `WAIT` and `DEBUG SLEEP` let their client wait, whatever it asks for: a bound on forgotten tasks.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

const SYNTAX: &str = "ERR syntax error";
const NOT_A_NUMBER: &str = "ERR value is not an integer or out of range";

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// As `CLIENT ID` shows it.
    pub(crate) client: u64,
    pub(crate) protocol: Protocol,
    /// How many replicas its requests ask for, as a head of a frame has it.
    pub(crate) level: u32,
}

/// Why a command is refused: the whole error line. Nothing was changed and nothing of a reply was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused(Cow<'static, str>);

impl From<&'static str> for Refused {
    fn from(text: &'static str) -> Refused {
        Refused(text.into())
    }
}

impl From<String> for Refused {
    fn from(text: String) -> Refused {
        Refused(text.into())
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a command wrote its reply.
type Outcome = Result<(), Refused>;

/// Answers a command of the node: the bytes of exactly one reply in the caller's protocol. It is counted
/// here, at its end, when it is known whether it is a call; what took long is noted.
pub(crate) async fn answer(core: CoreRc, caller: Caller, spec: &'static Spec, args: Vec<Vec<u8>>) -> Vec<u8> {
    let mut out = Vec::new();
    let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
    let started = Instant::now();
    if let Err(refused) = dispatch(&core, &caller, spec, &args, &mut out).await {
        debug_assert!(out.is_empty(), "a refused command has written nothing");
        Writer::new(caller.protocol, &mut out).error(&refused.0);
    }
    let took = started.elapsed();
    let is_slow = {
        let state = &mut *core.state.borrow_mut();
        state.metrics.record_call(spec.id, took, out.strip_prefix(b"-"));
        state.settings.is_slow(took)
    };
    if is_slow {
        let (addr, name) = clients::names(&core, caller.client);
        core.state.borrow_mut().notes().note(spec, took, &args, &addr, &name);
    }
    out
}

async fn dispatch(core: &CoreRc, caller: &Caller, spec: &'static Spec, args: &[&[u8]], out: &mut Vec<u8>) -> Outcome {
    if spec.name == "debug" {
        return debug::debug(core, caller.protocol, args, out).await;
    }
    let out = &mut Writer::new(caller.protocol, out);
    match spec.name {
        "info" => info::info(core, args, out).await,
        "config|get" => config::get(core, args, out),
        "config|set" => config::set(core, args, out).await,
        "config|resetstat" => config::reset_statistics(core, out).await,
        "config|rewrite" => Err("ERR The server is running without a config file".into()),
        "client|list" => clients::list(core, caller, args, out).await,
        "client|info" => clients::info(core, caller, args, out).await,
        "client|kill" => clients::kill(core, caller, args, out).await,
        "slowlog|get" => slow::get(core, args, out).await,
        "slowlog|len" => slow::len(core, out).await,
        "slowlog|reset" => slow::reset(core, out).await,
        "latency|doctor" => slow::doctor(core, out).await,
        "latency|graph" => slow::graph(core, args, out).await,
        "latency|histogram" => slow::histogram(core, args, out).await,
        "latency|history" => slow::history(core, args, out).await,
        "latency|latest" => slow::latest(core, out).await,
        "latency|reset" => slow::reset_latency(core, args, out).await,
        "memory|stats" => memory::stats(core, out).await,
        "memory|doctor" => memory::doctor(core, out).await,
        "memory|purge" => memory::purge(out),
        "scan" => keys::scan(core, args, out).await,
        "randomkey" => keys::random(core, out).await,
        "bgsave" | "bgrewriteaof" => saving::begin(core, spec, args, out).await,
        "lastsave" => saving::last(core, out).await,
        "role" => role(out),
        "time" => time(out),
        "wait" => wait(core, caller, args, out).await,
        "shutdown" => shutdown(core, args),
        name if name.starts_with("cluster|") => cluster::answer(core, &name["cluster|".len()..], args, out).await,
        name => Err(format!("ERR '{name}' is not served by this node").into()),
    }
}

/// `ROLE`: a master without replicas.
fn role(out: &mut dyn Reply) -> Outcome {
    out.array(3);
    out.bulk(b"master");
    out.integer(0);
    out.array(0);
    Ok(())
}

/// `TIME`.
fn time(out: &mut dyn Reply) -> Outcome {
    let now = unix_us();
    out.array(2);
    out.bulk((now / 1_000_000).to_string().as_bytes());
    out.bulk((now % 1_000_000).to_string().as_bytes());
    Ok(())
}

/// `WAIT numreplicas timeout`. A write is on as many replicas as its level asks for when it is acknowledged: of these all but one
/// are others. Who wants more waits for its timeout and learns of those.
async fn wait(core: &CoreRc, caller: &Caller, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let replicas = integer(args[1])?;
    let timeout = integer(args[2]).map_err(|_| "ERR timeout is not an integer or out of range")?;
    let timeout = u64::try_from(timeout).map_err(|_| "ERR timeout is negative")?;
    let level = level_of(caller.level);
    let others = core.member.borrow().as_ref().map_or(0, |member| member.written_to(level) as i64 - 1);
    if replicas > others {
        // A timeout of 0 means for ever.
        let asked = if timeout == 0 { LONGEST_WAIT } else { Duration::from_millis(timeout) };
        glommio::timer::sleep(asked.min(LONGEST_WAIT)).await;
    }
    out.integer(others);
    Ok(())
}

/// `SHUTDOWN`. A node that keeps its data on disk saves always, whatever is said; one that does not refuses to save, unless it is forced.
fn shutdown(core: &CoreRc, args: &[&[u8]]) -> Outcome {
    let known = ["nosave", "save", "now", "force", "abort"];
    let (mut asked, rest) = ([false; 5], &args[1..]);
    for arg in rest {
        let option = known.iter().position(|option| word(arg, option)).ok_or(SYNTAX)?;
        asked[option] = true;
    }
    let [nosave, save, _, force, abort] = asked;
    if (nosave && save) || (abort && rest.len() > 1) {
        return Err(SYNTAX.into());
    }
    if abort {
        return Err("ERR No shutdown in progress.".into());
    }
    let keeps = core.state.borrow().kept.is_some();
    if save && !force && !keeps {
        return Err("ERR this node keeps no files and cannot save: use SHUTDOWN NOSAVE".into());
    }
    // As in Redis, the reply is the end of the connection.
    core.topology.stop();
    Ok(())
}

/// Lines of help as Redis sends them.
fn help(lines: &[&str], out: &mut dyn Reply) {
    out.array(lines.len());
    for line in lines {
        out.simple(line);
    }
}

/// Whether an argument is that word, in any case.
fn word(arg: &[u8], word: &str) -> bool {
    arg.eq_ignore_ascii_case(word.as_bytes())
}

fn integer(arg: &[u8]) -> Result<i64, Refused> {
    parse_i64(arg).ok_or(NOT_A_NUMBER.into())
}

/// Wall clock in unix microseconds.
fn unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use futures_lite::future::block_on;
    use gridkv_engine::command;

    use super::*;
    use crate::GridKv;

    fn ask(db: &GridKv, core: usize, line: &str) -> String {
        let args: Vec<Vec<u8>> = line.split(' ').map(|word| word.as_bytes().to_vec()).collect();
        let words: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
        let spec = command::resolve(&words).unwrap_or_else(|refusal| panic!("{refusal}"));
        let answered = db.on_core(core, move |handle| async move {
            let caller = Caller { client: 1, protocol: Protocol::Resp2, level: 0 };
            answer(handle.core().clone(), caller, spec, args).await
        });
        String::from_utf8(block_on(answered).expect("the node runs")).expect("the replies asked for are text")
    }

    /// The bulk strings of a reply, in order.
    fn bulks(reply: &str) -> Vec<&str> {
        let lines: Vec<&str> = reply.split("\r\n").collect();
        lines.windows(2).filter(|pair| pair[0].starts_with('$')).map(|pair| pair[1]).collect()
    }

    #[test]
    fn all_cores_are_asked_and_agree() {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2));
        let db = GridKv::builder().cores(&cpus.to_string()).unwrap().start().unwrap();
        let last = db.cores() - 1;
        let keys: Vec<String> = (0..300).map(|number| format!("key:{number}")).collect();
        for key in &keys {
            db.blocking().set(key, "v").unwrap();
        }

        // A busy machine makes any command slow; below, none is to be kept.
        let change = "CONFIG SET maxmemory 64mb slowlog-max-len 3 slowlog-log-slower-than 100000000";
        assert_eq!(ask(&db, 0, change), "+OK\r\n");
        assert_eq!(bulks(&ask(&db, last, "config get maxmemory")), ["maxmemory", "67108864"]);
        let stats = block_on(db.stats()).unwrap();
        assert!(stats.cores.iter().all(|core| core.max_memory == (64 << 20) / db.cores() as u64));
        assert!(ask(&db, last, "config set maxmemory 1 port 1").starts_with("-ERR CONFIG SET failed"));
        assert_eq!(bulks(&ask(&db, 0, "config get maxmemory")), ["maxmemory", "67108864"]);

        for core in [0, last] {
            let (mut cursor, mut found) = ("0".to_owned(), Vec::new());
            loop {
                let reply = ask(&db, core, &format!("SCAN {cursor} COUNT 7"));
                let parts = bulks(&reply);
                found.extend(parts[1..].iter().map(|key| (*key).to_owned()));
                cursor = parts[0].to_owned();
                if cursor == "0" {
                    break;
                }
            }
            found.sort();
            let mut expected = keys.clone();
            expected.sort();
            assert_eq!(found, expected, "each key once, asked from core {core}");
        }
        let random = ask(&db, last, "RANDOMKEY");
        assert!(keys.iter().any(|key| bulks(&random) == [key]), "{random}");

        let info = ask(&db, last, "INFO keyspace");
        assert!(info.contains("db0:keys=300,expires=0"), "{info}");
        assert!(ask(&db, 0, "DEBUG OBJECT key:1").starts_with("+Value at:0x0 refcount:1 "));
        assert_eq!(ask(&db, last, "debug object nothing"), "-ERR no such key\r\n");
        assert_eq!(ask(&db, 0, "SLOWLOG LEN"), ":0\r\n");
        assert_eq!(ask(&db, 0, "WAIT 0 0"), ":0\r\n");
        assert!(ask(&db, 0, "CLUSTER NODES").starts_with("-ERR This instance has cluster support disabled"));
        assert_eq!(ask(&db, 0, "ROLE"), "*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n");
        assert_eq!(ask(&db, 0, "SHUTDOWN ABORT"), "-ERR No shutdown in progress.\r\n");
        assert!(ask(&db, 0, "SHUTDOWN SAVE").starts_with("-ERR this node keeps no files"));
        block_on(db.close()).unwrap();
    }
}
