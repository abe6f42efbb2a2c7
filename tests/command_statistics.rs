//! What a node tells of each command: `INFO commandstats`, `LATENCY HISTOGRAM`, the metrics page, and what CONFIG RESETSTAT leaves.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use gridkv::GridKv;

const PATIENCE: Duration = Duration::from_secs(60);

fn node() -> GridKv {
    node_of(1)
}

fn node_of(cores: usize) -> GridKv {
    let any = "127.0.0.1:0".parse().unwrap();
    GridKv::builder().cores(&cores.to_string()).unwrap().shards(32).unwrap().listen(any).http(any).start().unwrap()
}

/// A client that sends words and reads whole replies, as the lines they consist of.
struct Client {
    to: TcpStream,
    from: BufReader<TcpStream>,
}

impl Client {
    fn of(db: &GridKv) -> Client {
        let to = TcpStream::connect(db.resp_addr().expect("it listens")).unwrap();
        to.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { from: BufReader::new(to.try_clone().unwrap()), to }
    }

    fn ask(&mut self, command: &str) -> Vec<String> {
        let words: Vec<&str> = command.split(' ').collect();
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.to.write_all(request.as_bytes()).unwrap();
        self.reply()
    }

    fn reply(&mut self) -> Vec<String> {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        let line = line.trim_end().to_owned();
        let count = || line[1..].parse::<i64>().unwrap_or_else(|_| panic!("no number in {line}"));
        match &line[..1] {
            "*" => (0..count()).flat_map(|_| self.reply()).collect(),
            "$" => {
                let mut bytes = vec![0; usize::try_from(count()).unwrap_or(0)];
                self.from.read_exact(&mut bytes).unwrap();
                if count() >= 0 {
                    self.from.read_line(&mut String::new()).unwrap();
                }
                vec![String::from_utf8(bytes).unwrap()]
            }
            _ => vec![line],
        }
    }

    /// The numbers of a command by name; nothing when INFO does not show it.
    fn stat(&mut self, command: &str) -> Option<Stat> {
        let info = self.ask("INFO commandstats").remove(0);
        let line = info.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:")))?;
        let field = |name: &str| {
            let field = line.split(',').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
            field.and_then(|number| number.parse::<f64>().ok()).unwrap_or_else(|| panic!("no {name} in {line}"))
        };
        let [calls, rejected, failed] = ["calls", "rejected_calls", "failed_calls"].map(|name| field(name) as u64);
        Some(Stat { fates: (calls, rejected, failed), usec: field("usec"), usec_per_call: field("usec_per_call") })
    }

    fn fates(&mut self, command: &str) -> (u64, u64, u64) {
        self.stat(command).map_or((0, 0, 0), |stat| stat.fates)
    }
}

#[derive(Debug)]
struct Stat {
    /// Calls, rejected and failed.
    fates: (u64, u64, u64),
    usec: f64,
    usec_per_call: f64,
}

fn metrics(db: &GridKv) -> String {
    let mut stream = TcpStream::connect(db.http_addr().expect("it has a page")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}

/// As Redis's own suite has it: what is refused before it runs is no call, what runs and answers with an error is one that failed.
#[test]
fn rejected_and_failed_calls_are_told_apart_and_forgotten_by_resetstat() {
    let db = node();
    let mut c = Client::of(&db);
    for command in
        ["SET k", "GET k x", "SET k v", "INCR k", "INCR n", "SELECT x", "AUTH p", "NOSUCH k", "CONFIG NOSUCH"]
    {
        c.ask(command);
    }
    assert_eq!(c.fates("set"), (1, 1, 0), "the wrong number of arguments");
    assert_eq!(c.fates("get"), (0, 1, 0), "shown though it never ran");
    assert_eq!(c.fates("incr"), (2, 0, 1), "no integer");
    assert_eq!((c.fates("select"), c.fates("auth")), ((1, 0, 1), (1, 0, 1)), "the session's own");
    assert_eq!(c.fates("nosuch"), (0, 0, 0));

    assert!(c.ask("MGET a b c d e f")[0].starts_with("-CROSSSLOT") || c.fates("mget") == (1, 0, 0));
    let apart = (0..64).position(|number| c.ask(&format!("RENAME a b{number}"))[0].starts_with("-CROSSSLOT"));
    let together = apart.expect("64 keys are in more than one shard") as u64;
    assert_eq!(c.fates("rename"), (together, 1, together), "a key that is not there; keys that lie apart");
    assert_eq!(c.ask("CONFIG SET port 1")[0].split(' ').next(), Some("-ERR"));
    assert_eq!(c.fates("config|set"), (1, 0, 1), "a command of the node");

    for command in ["MULTI", "SET", "EXEC", "MULTI", "INCR k", "PING", "SELECT x", "EXEC"] {
        c.ask(command);
    }
    assert_eq!((c.fates("set"), c.fates("exec")), ((1, 2, 0), (2, 0, 1)), "EXECABORT is a failed EXEC");
    assert_eq!((c.fates("incr"), c.fates("select")), ((3, 0, 2), (2, 0, 2)), "inside a transaction");

    c.ask("CONFIG SET maxmemory 1");
    assert!(c.ask("SET k v2")[0].starts_with("-OOM") && c.ask("SETEX k 9 v2")[0].starts_with("-OOM"));
    assert_eq!((c.fates("set"), c.fates("setex")), ((1, 3, 0), (0, 1, 0)));
    c.ask("CONFIG SET maxmemory 0");

    let page = metrics(&db);
    for line in [
        "gridkv_commands_rejected_total{command=\"set\"} 3",
        "gridkv_core_commands_failed_total{core=\"0\",command=\"incr\"} 2",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is missing in\n{page}");
    }

    c.ask("CONFIG SET requirepass p");
    let mut stranger = Client::of(&db);
    assert!(stranger.ask("GET k")[0].starts_with("-NOAUTH"));
    assert_eq!(c.fates("get"), (0, 2, 0));

    c.ask("CONFIG RESETSTAT");
    let seen = c.ask("LATENCY HISTOGRAM");
    let info = c.ask("INFO commandstats").remove(0);
    let names: Vec<&str> = info.lines().filter_map(|line| line.strip_prefix("cmdstat_")?.split(':').next()).collect();
    assert_eq!(names, ["config|resetstat", "latency|histogram"], "what shows them is no call before it ends: {info}");
    assert_eq!(seen[0], "config|resetstat");
    assert!(!metrics(&db).contains("command=\"set\""));
}

/// Whichever core runs it: that of the connection or another one.
#[test]
fn a_transaction_without_room_is_a_failed_exec_on_every_core() {
    const KEYS: u64 = 64;
    let db = node_of(std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2)));
    let mut c = Client::of(&db);
    for key in 0..KEYS {
        c.ask(&format!("SET k{key} v"));
    }
    c.ask("CONFIG SET maxmemory 64");
    for key in 0..KEYS {
        c.ask("MULTI");
        c.ask(&format!("SET k{key} v"));
        assert!(c.ask("EXEC")[0].starts_with("-EXECABORT"));
    }
    assert_eq!((c.fates("exec"), c.fates("set")), ((KEYS, 0, KEYS), (KEYS, 0, 0)));
}

/// As in Redis: what EXEC runs is in the slow log, EXEC is not.
#[test]
fn commands_of_a_transaction_are_in_the_slow_log() {
    let db = node();
    let mut c = Client::of(&db);
    c.ask("CONFIG SET slowlog-log-slower-than 0");
    c.ask("SLOWLOG RESET");
    for command in ["MULTI", "SET within v", "INCR within", "EXEC"] {
        c.ask(command);
    }
    let found = c.ask("SLOWLOG GET -1");
    let has = |word: &str| found.iter().filter(|line| line.eq_ignore_ascii_case(word)).count();
    assert_eq!((has("within"), has("set"), has("incr"), has("exec")), (2, 1, 1, 0), "{found:?}");
}

/// What was called a few times was timed each time; of many calls some are, for all: the sums agree, and only rise.
#[test]
fn times_are_those_of_all_calls() {
    let db = node();
    let mut c = Client::of(&db);
    let value = "v".repeat(1 << 20);
    for _ in 0..5 {
        c.ask(&format!("SETRANGE big 0 {value}"));
    }
    for command in ["PING", "INFO", "GET k", "SET k v", "WATCH k", "UNWATCH"] {
        c.ask(command);
    }
    let slow = c.stat("setrange").expect("it ran");
    assert_eq!(slow.fates, (5, 0, 0));
    assert!(slow.usec >= 5.0, "megabytes are copied: {slow:?}");
    assert!((slow.usec_per_call - slow.usec / 5.0).abs() <= 0.3, "{slow:?}");
    assert!(c.stat("info").expect("it ran").usec > 0.0);

    let (mut before, mut total) = (0.0, 0);
    for round in 0..8 {
        let calls = 300 << round;
        let pipeline = "GET k\r\n".repeat(calls);
        let mut writer = c.to.try_clone().unwrap();
        let sending = std::thread::spawn(move || writer.write_all(pipeline.as_bytes()).unwrap());
        for _ in 0..calls {
            c.reply();
        }
        sending.join().unwrap();
        total += calls as u64;
        let get = c.stat("get").expect("it ran");
        assert_eq!(get.fates, (total + 1, 0, 0));
        assert!(get.usec >= before, "time never goes back: {get:?}");
        before = get.usec;
        let histogram = c.ask("LATENCY HISTOGRAM get");
        let numbers: Vec<u64> = histogram[4..].iter().map(|number| number[1..].parse().unwrap()).collect();
        let classes: Vec<(u64, u64)> = numbers.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        assert_eq!((&*histogram[0], &*histogram[2]), ("get", &*format!(":{}", total + 1)));
        assert!(classes.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{classes:?}");
        assert!(classes.iter().all(|(usec, _)| usec.is_power_of_two()), "{classes:?}");
        assert_eq!(classes.last().expect("some were timed").1, total + 1, "the last class has all calls");
    }
    assert!(before > 0.0);

    let page = metrics(&db);
    let seconds = |command: &str| -> f64 {
        let name = format!("gridkv_commands_duration_seconds_total{{command=\"{command}\"}} ");
        let found = page.lines().find_map(|line| line.strip_prefix(&name));
        found.unwrap_or_else(|| panic!("no {name} in\n{page}")).parse().unwrap()
    };
    assert!(seconds("setrange") * 1e6 >= slow.usec && seconds("get") * 1e6 >= before);
}
