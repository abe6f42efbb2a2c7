//! `memory`: what an entry costs beyond its key and value.
//!
//! Each size runs in a process of its own (this program again, with a hidden command), so that what an earlier one left
//! in the allocator is in no figure. *Grown* is the resident memory of that process after loading less before; overhead
//! is grown less keys and values, over entries. It includes everything: tables, free space in them and in the allocator,
//! the change log. Beside it stands the node's own account, which its memory limit goes by.
//!
//! Redis is measured in the same way: a fresh server without persistence, its resident memory before and after, its own
//! account `used_memory`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use gridkv::GridKv;
use serde::{Deserialize, Serialize};

use crate::data::{Keys, Values};
use crate::distribution::Sizes;
use crate::embed::core_set;
use crate::failure::Failure;
use crate::interrupt;
use crate::requests::{Protocol, Requests, command};
use crate::table::Table;
use crate::units;

/// The hidden command that one size runs as.
pub(crate) const CHILD: &str = "memory-child";
const KEY: u64 = 16;
/// Writes between two looks at the other work of a core, and requests sent to a server at once.
const BATCH: u64 = 1000;
/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(10);

/// Measure the memory that an entry costs beyond its key and value.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Numbers of entries, one run each
    #[arg(long, default_value = "1m,2m,10m", value_delimiter = ',', value_parser = units::number)]
    entries: Vec<u64>,
    /// Bytes of a value; keys have 16
    #[arg(long, default_value_t = 64, value_name = "BYTES")]
    value_size: u32,
    /// Cores of the node
    #[arg(long, default_value = "1", value_parser = core_set)]
    cores: String,
    /// Measure another server as well
    #[arg(long, value_enum)]
    against: Vec<Rival>,
    /// The program of redis-server
    #[arg(long, default_value = "redis-server", value_name = "PROGRAM")]
    redis_server: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// One size, in a process of its own.
#[derive(Debug, clap::Args)]
pub(crate) struct ChildArgs {
    #[arg(long)]
    entries: u64,
    #[arg(long)]
    value_size: u32,
    #[arg(long)]
    cores: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rival {
    Redis,
}

/// Bytes around a load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Measured {
    resident_before: u64,
    resident_after: u64,
    /// What the store itself says it uses, after less before.
    account: u64,
}

#[derive(Debug, Serialize)]
struct Row {
    store: &'static str,
    entries: u64,
    #[serde(flatten)]
    measured: Measured,
    overhead_per_entry: f64,
    accounted_overhead_per_entry: f64,
}

impl Row {
    fn new(store: &'static str, entries: u64, value_size: u32, measured: Measured) -> Row {
        let payload = (entries * (KEY + u64::from(value_size))) as f64;
        let over = |bytes: u64| (bytes as f64 - payload) / entries as f64;
        let grown = measured.resident_after.saturating_sub(measured.resident_before);
        let accounted_overhead_per_entry = over(measured.account);
        Row { store, entries, measured, overhead_per_entry: over(grown), accounted_overhead_per_entry }
    }
}

/// Measures and prints.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    if args.entries.contains(&0) {
        return Err(Failure::Usage("there must be an entry".into()));
    }
    let mut rows = Vec::new();
    for &entries in &args.entries {
        if !interrupt::requested() {
            rows.push(Row::new("gridkv", entries, args.value_size, in_child(&args, entries)?));
        }
        if args.against.contains(&Rival::Redis) && !interrupt::requested() {
            rows.push(Row::new("redis", entries, args.value_size, in_redis(&args, entries)?));
        }
    }
    if args.json {
        let document = serde_json::json!({
            "command": "memory", "key_size": KEY, "value_size": args.value_size, "cores": args.cores, "rows": rows,
        });
        println!("{document:#}");
        return Ok(());
    }
    println!("keys of {KEY} bytes, values of {}; a process of its own for each line\n", args.value_size);
    let mut table =
        Table::new(["store", "entries", "before", "after", "overhead/entry", "own account", "overhead/entry"]);
    for row in &rows {
        table.row([
            row.store.to_owned(),
            units::count(row.entries as f64),
            units::bytes(row.measured.resident_before as f64),
            units::bytes(row.measured.resident_after as f64),
            format!("{:.1} B", row.overhead_per_entry),
            units::bytes(row.measured.account as f64),
            format!("{:.1} B", row.accounted_overhead_per_entry),
        ]);
    }
    print!("{table}");
    Ok(())
}

fn in_child(args: &Args, entries: u64) -> Result<Measured, Failure> {
    let program = std::env::current_exe().map_err(Failure::io("finding this program"))?;
    let failed = |what: String| Failure::Program { program: format!("{} {CHILD}", program.display()), what };
    let (entries, value_size) = (entries.to_string(), args.value_size.to_string());
    let output = Command::new(&program)
        .args([CHILD, "--entries", &entries, "--value-size", &value_size, "--cores", &args.cores])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(format!("ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(format!("said something else than figures: {error}")))
}

/// The hidden command: loads a node and says what that took, as JSON.
pub(crate) fn run_child(args: ChildArgs) -> Result<(), Failure> {
    let measured = load(&args)?;
    println!("{}", serde_json::to_string(&measured).expect("figures are JSON"));
    Ok(())
}

fn load(args: &ChildArgs) -> Result<Measured, Failure> {
    let entries = args.entries;
    let keys = Keys::new(Sizes::Fixed(KEY as u32), entries).map_err(Failure::Usage)?;
    let values = Values::new(Sizes::Fixed(args.value_size));
    let db = GridKv::builder().cores(&args.cores)?.start()?;
    let account = || Ok::<u64, Failure>(futures_lite::future::block_on(db.stats())?.total().store.memory_bytes);
    let accounted_before = account()?;
    let resident_before = resident("self")?;
    let written = db.blocking().on_each_core(move |core| async move {
        let (mut key, mut written) = ([0; KEY as usize], 0u64);
        for number in 0..entries {
            keys.write(number, &mut key);
            if core.owns(key) {
                core.write(key, values.of(number))?;
                written += 1;
            }
            if number % BATCH == 0 {
                core.yield_now().await;
            }
        }
        Ok::<u64, gridkv::Error>(written)
    })?;
    let written = written.into_iter().sum::<Result<u64, gridkv::Error>>()?;
    assert_eq!(written, entries, "each key has one owner");
    let resident_after = resident("self")?;
    let measured = Measured { resident_before, resident_after, account: account()?.saturating_sub(accounted_before) };
    db.blocking().close()?;
    Ok(measured)
}

/// A server that ends with this value.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn in_redis(args: &Args, entries: u64) -> Result<Measured, Failure> {
    let program = args.redis_server.display().to_string();
    let failed = |what: String| Failure::Program { program: program.clone(), what };
    let socket = std::env::temp_dir().join(format!("gridkv-bench-{}.sock", std::process::id()));
    let child = Command::new(&args.redis_server)
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let mut server = Server { child, socket };
    let mut client = connect(&mut server).map_err(&failed)?;
    let pid = server.child.id().to_string();

    let keys = Keys::new(Sizes::Fixed(KEY as u32), entries).map_err(Failure::Usage)?;
    let requests = Requests::new(Protocol::Resp, keys, Values::new(Sizes::Fixed(args.value_size)));
    let talk = |error: std::io::Error| failed(format!("the connection: {error}"));
    let accounted_before = used_memory(&mut client).map_err(talk)?;
    let resident_before = resident(&pid)?;
    let (mut out, mut replies) = (Vec::new(), Vec::new());
    for from in (0..entries).step_by(BATCH as usize) {
        let to = (from + BATCH).min(entries);
        out.clear();
        (from..to).for_each(|key| requests.set(key, &mut out));
        client.write_all(&out).map_err(talk)?;
        replies.resize((to - from) as usize * OK.len(), 0);
        client.read_exact(&mut replies).map_err(talk)?;
        if let Some(reply) = replies.chunks(OK.len()).find(|&reply| reply != OK) {
            return Err(failed(format!("answered a SET with {}", String::from_utf8_lossy(reply))));
        }
    }
    let account = used_memory(&mut client).map_err(talk)?.saturating_sub(accounted_before);
    Ok(Measured { resident_before, resident_after: resident(&pid)?, account })
}

const OK: &[u8] = b"+OK\r\n";

fn connect(server: &mut Server) -> Result<UnixStream, String> {
    let until = Instant::now() + START;
    loop {
        match UnixStream::connect(&server.socket) {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() >= until => return Err(format!("does not listen: {error}")),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
        if let Ok(Some(status)) = server.child.try_wait() {
            return Err(format!("ended with {status} before it listened"));
        }
    }
}

/// What `INFO memory` says about all that the server allocated.
fn used_memory(client: &mut UnixStream) -> std::io::Result<u64> {
    let mut out = Vec::new();
    command(&[b"INFO", b"memory"], &mut out);
    client.write_all(&out)?;
    let mut header = Vec::new();
    while !header.ends_with(b"\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        header.extend(byte);
    }
    let wrong = |what: &[u8]| std::io::Error::other(format!("INFO said {}", String::from_utf8_lossy(what)));
    let length = line(&String::from_utf8_lossy(&header), "$").ok_or_else(|| wrong(&header))?;
    let mut text = vec![0; length as usize + 2];
    client.read_exact(&mut text)?;
    line(&String::from_utf8_lossy(&text), "used_memory:").ok_or_else(|| wrong(&text))
}

/// The number that follows `name` at the begin of a line.
fn line(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Resident bytes of a process, exactly: the sum over its mappings, not the counters that lag behind.
fn resident(process: &str) -> Result<u64, Failure> {
    let path = Path::new("/proc").join(process).join("smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(Failure::io(format!("reading {}", path.display())))?;
    line(&text, "Rss:").map(|kib| kib * 1024).ok_or_else(|| {
        let source = std::io::Error::other("there is no line Rss");
        Failure::Io { doing: format!("reading {}", path.display()), source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overhead_is_what_goes_beyond_keys_and_values() {
        let measured = Measured { resident_before: 1000, resident_after: 1000 + 10 * 100, account: 10 * 90 };
        let row = Row::new("x", 10, 64, measured);
        assert_eq!((row.overhead_per_entry, row.accounted_overhead_per_entry), (20.0, 10.0));
    }

    #[test]
    fn resident_memory_of_this_process_is_read() {
        // Other tests of this process take and give back memory meanwhile, so only its order of magnitude is known.
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(resident("self").unwrap() >= 64 << 20);
        drop(block);
        assert_eq!(line("a: 1 kB\nRss:    12 kB\n", "Rss:"), Some(12));
        assert!(resident("no-process").is_err());
    }

    #[test]
    fn a_load_grows_the_account_by_at_least_its_payload() {
        let measured = load(&ChildArgs { entries: 20_000, value_size: 64, cores: "1".into() }).unwrap();
        assert!(measured.account >= 20_000 * 80, "{measured:?}");
    }
}
