//! `gridkv-node admin`: asks a running node about its cluster, and gives it orders.
//!
//! It speaks RESP with the node as any client does (`CLUSTER GRIDKV …`) and waits for the answer: what an order means and
//! whether it may be given is decided there. Answers are JSON; here they become tables, or with `--json` stay as they are.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Value, json};

use crate::settings::Refusal;

/// How long a node may take to accept a connection, and to answer.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// The longest answer that is taken: far more than all shards and members of the largest cluster need.
const MAX_ANSWER: usize = 64 << 20;

/// The word that takes its time: it is begun, and then asked about.
const REPAIR: &str = "repair";
const PROGRESS: Duration = Duration::from_millis(200);

/// The words: each with what it needs, if anything, and what is said about it.
const WORDS: [(&str, Option<&str>, &str); 8] = [
    ("status", None, "How the cluster is, as the node sees it"),
    ("members", None, "The nodes, and what each holds"),
    ("shards", None, "Who holds which shard"),
    ("drain", Some("ID"), "Have a member's shards moved away, to stop it afterwards"),
    ("undrain", Some("ID"), "Let shards come back to it"),
    ("remove", Some("ID"), "Go on without a member that will not come back, or that was drained"),
    (REPAIR, None, "Have the node compare its copies with all others now, and wait until they are equal"),
    ("accept-loss", Some("SHARD"), "Let shards without a quorum serve with what is left; a number, or `all`"),
];

/// What the tool was asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    node: String,
    password: Option<String>,
    json: bool,
    word: String,
    about: Option<String>,
}

/// The command line below `admin`.
pub(crate) fn command() -> Command {
    let option = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help).global(true)
    };
    let command = Command::new("admin")
        .about("Asks a running node about its cluster, or gives it orders")
        .subcommand_required(true)
        .disable_help_subcommand(true)
        .arg(
            option("node", "HOST:PORT", "The node to ask, where it serves Redis clients")
                .default_value("127.0.0.1:7379")
                .env("GRIDKV_NODE"),
        )
        .arg(option("password", "PASSWORD", "Its password").env("GRIDKV_PASSWORD").hide_env_values(true))
        .arg(option("json", "", "Print the answer as JSON").action(ArgAction::SetTrue));
    WORDS.iter().fold(command, |command, &(word, about, help)| {
        let sub = Command::new(word).about(help);
        command.subcommand(match about {
            Some(name) => sub.arg(Arg::new("about").value_name(name).required(true)),
            None if word == REPAIR => sub.arg(
                Arg::new("about").long("shard").value_name("N").help("Only this shard, of which the node has a copy"),
            ),
            None => sub,
        })
    })
}

/// What the command line below `admin` asks for.
pub(crate) fn request(matches: &ArgMatches) -> Request {
    let (word, below) = matches.subcommand().expect("clap demands one");
    let text = |name: &str| below.get_one::<String>(name).cloned();
    Request {
        node: text("node").expect("it has a default"),
        password: text("password"),
        json: below.get_flag("json"),
        word: word.to_owned(),
        about: below.try_get_one::<String>("about").ok().flatten().cloned(),
    }
}

/// Does it; what is to be printed.
///
/// # Errors
/// Why it was not done, in words: the node's, or about the connection.
pub(crate) fn run(request: &Request) -> Result<String, Refusal> {
    let failed = |doing: &str, error: io::Error| {
        Refusal::new(format!("{doing} {}: {error}", request.node))
            .with_hint("is the node running? --node names where it serves Redis clients")
    };
    let stream = connect(&request.node).map_err(|error| failed("cannot connect to", error))?;
    let mut node = BufReader::new(stream);
    let mut ask = |words: &[&str]| -> Result<Answer, Refusal> {
        send(node.get_mut(), words).and_then(|()| receive(&mut node)).map_err(|error| failed("no answer from", error))
    };
    let refused = |text: String| {
        let hint = match () {
            () if text.starts_with("NOAUTH") => "give the password with --password or GRIDKV_PASSWORD",
            () if text.contains("cluster support disabled") => "the node runs with `--peer-listen none`",
            () if text.contains("unknown command") => "what listens there is no GridKV node",
            () => return Refusal::new(text.trim_start_matches("ERR ").to_owned()),
        };
        Refusal::new(text.trim_start_matches("ERR ").to_owned()).with_hint(hint)
    };
    if let Some(password) = &request.password
        && let Answer::Error(text) = ask(&["AUTH", password])?
    {
        return Err(refused(text));
    }
    let mut words = vec!["CLUSTER", "GRIDKV", &request.word];
    words.extend(request.about.as_deref());
    let mut answer = ask(&words)?;
    if request.word == REPAIR {
        let mut shown = Progress::default();
        while let Answer::Text(text) = &answer {
            let value: Value = serde_json::from_str(text).unwrap_or_default();
            shown.show(&value);
            if value["running"] != Value::Bool(true) {
                break;
            }
            std::thread::sleep(PROGRESS);
            answer = ask(&["CLUSTER", "GRIDKV", "REPAIR-STATUS"])?;
        }
    }
    match answer {
        Answer::Error(text) => Err(refused(text)),
        Answer::Text(text) if request.json => Ok(text + "\n"),
        Answer::Text(text) => {
            let value = serde_json::from_str(&text)
                .map_err(|error| Refusal::new(format!("{} sent no JSON: {error}", request.node)))?;
            Ok(match request.word.as_str() {
                "status" => status(&value),
                "members" => members(&value),
                REPAIR => repaired(&value),
                _ => shards(&value),
            })
        }
        Answer::Status(_) if request.json => Ok(json!({ "ok": true }).to_string() + "\n"),
        Answer::Status(_) => Ok("done\n".to_owned()),
        Answer::Number(count) if request.json => Ok(json!({ "ok": true, "shards": count }).to_string() + "\n"),
        Answer::Number(count) => Ok(format!("done: {count} shards serve with what is left\n")),
    }
}

/// A reply, of the kinds that a node gives to these commands.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Status(String),
    Error(String),
    Number(i64),
    Text(String),
}

fn connect(node: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    for addr in node.to_socket_addrs()? {
        match TcpStream::connect_timeout(&addr, CONNECT_PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
                stream.set_write_timeout(Some(ANSWER_PATIENCE))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn send(stream: &mut impl Write, words: &[&str]) -> io::Result<()> {
    let mut bytes = format!("*{}\r\n", words.len());
    words.iter().for_each(|word| bytes += &format!("${}\r\n{word}\r\n", word.len()));
    stream.write_all(bytes.as_bytes())
}

fn receive(stream: &mut impl BufRead) -> io::Result<Answer> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("it does not speak RESP: {what:?}"));
    let mut line = String::new();
    stream.by_ref().take(1 << 16).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let rest = line.strip_suffix("\r\n").and_then(|line| line.get(1..)).ok_or_else(|| wrong(&line))?;
    Ok(match line.as_bytes()[0] {
        b'+' => Answer::Status(rest.to_owned()),
        b'-' => Answer::Error(rest.to_owned()),
        b':' => Answer::Number(rest.parse().map_err(|_| wrong(&line))?),
        b'$' => {
            let len: usize = rest.parse().ok().filter(|&len| len <= MAX_ANSWER).ok_or_else(|| wrong(&line))?;
            let mut bytes = Vec::new();
            stream.by_ref().take(len as u64 + 2).read_to_end(&mut bytes)?;
            if bytes.len() < len + 2 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes.truncate(len);
            Answer::Text(String::from_utf8(bytes).map_err(|_| wrong("no text"))?)
        }
        _ => return Err(wrong(&line)),
    })
}

/// A value for people: texts without quotes, lists with commas, nothing as `-`.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "-".to_owned(),
        // What another node says of itself is not trusted with the terminal.
        Value::String(text) => text.chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
        Value::Null => "-".to_owned(),
        Value::Array(list) if list.is_empty() => "-".to_owned(),
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(","),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        other => other.to_string(),
    }
}

/// Rows under each other, the first one the heads; each column as wide as it must be.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn heads(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// What a node says of itself alone, and what is wrong with it.
fn this_node(value: &Value) -> String {
    let mut text =
        format!("{}, its clock up to {} ms from another", plain(&value["me"]), plain(&value["clock_offset_ms"]));
    let faults = [
        ("isolated", "sees no majority of the voters"),
        ("quarantined", "writes nothing: its clock is wrong"),
        ("disk_failed", "does not vote: its directory cannot be written"),
    ];
    for (_, fault) in faults.iter().filter(|(key, _)| value[*key] == Value::Bool(true)) {
        text += &format!("; {fault}");
    }
    text
}

fn status(value: &Value) -> String {
    let at = |path: &str| plain(value.pointer(path).unwrap_or(&Value::Null));
    let rows = [
        ("state", at("/state")),
        ("cluster", at("/cluster")),
        ("epoch", at("/epoch")),
        ("this node", this_node(value)),
        ("leader", at("/leader")),
        ("voters", at("/voters")),
        (
            "members",
            format!("{}, {} alive, {} draining", at("/members/present"), at("/members/alive"), at("/members/draining")),
        ),
        ("copies", format!("{}, {} to write, {} to read", at("/replicas"), at("/write_quorum"), at("/read_quorum"))),
        (
            "shards",
            format!(
                "{}, {} degraded, {} blocked, {} at risk, {} filling, {} moving",
                at("/shards/total"),
                at("/shards/degraded"),
                at("/shards/blocked"),
                at("/shards/at_risk"),
                at("/shards/filling"),
                at("/shards/moving")
            ),
        ),
        ("losses accepted", at("/shards/losses")),
        (
            "operations here",
            format!(
                "{}, {} failed, {} unknown, {} under way; {} refused for another map",
                at("/here/operations"),
                at("/here/failed"),
                at("/here/unknown"),
                at("/here/under_way"),
                at("/here/refused_epoch")
            ),
        ),
        (
            "repaired here",
            format!(
                "{} by reads, {} by comparing; {} hints wait",
                at("/here/read_repairs"),
                at("/here/differences_repaired"),
                at("/here/hints")
            ),
        ),
    ];
    table(&rows.map(|(name, value)| vec![name.to_owned(), value]))
}

/// How far a repair is: one line that is written over, where somebody watches.
#[derive(Default)]
struct Progress {
    written: bool,
}

impl Progress {
    fn show(&mut self, value: &Value) {
        if !io::stderr().is_terminal() {
            return;
        }
        if value["running"] == Value::Bool(true) {
            eprint!("\r{} of {} shards compared, {} differed", value["done"], value["shards"], value["differed"]);
            self.written = true;
        } else if std::mem::take(&mut self.written) {
            eprint!("\r\x1b[K");
        }
    }
}

fn repaired(value: &Value) -> String {
    let at = |name: &str| plain(&value[name]);
    let mut text = format!(
        "shards compared: {}, different: {}; entries sent: {}, received: {}\n",
        at("done"),
        at("differed"),
        at("sent"),
        at("received")
    );
    if value["incomplete"] != 0 {
        text += &format!(
            "of them not with every copy, or still different: {}; a copy is away, being filled or too busy\n",
            at("incomplete")
        );
    }
    text
}

fn members(value: &Value) -> String {
    let mut rows = vec![heads(&[
        "NO", "ID", "STATE", "ROLES", "CLIENTS", "PEERS", "ZONE", "WEIGHT", "CORES", "SHARDS", "FILLING", "ORDERS",
    ])];
    for member in value.as_array().into_iter().flatten() {
        let yes = |key: &str| member[key] == Value::Bool(true);
        let standing = plain(&member["standing"]);
        let state = match (yes("alive"), standing.as_str()) {
            (_, "lost") => "lost".to_owned(),
            (true, _) => standing,
            (false, "up") => "away".to_owned(),
            (false, _) => format!("{standing}, away"),
        };
        let roles: Vec<&str> = [("me", "this"), ("leader", "leader"), ("voter", "voter")]
            .iter()
            .filter(|(key, _)| yes(key))
            .map(|(_, role)| *role)
            .collect();
        let mut row = vec![plain(&member["no"]), plain(&member["id"]), state];
        row.push(if roles.is_empty() { "-".to_owned() } else { roles.join(",") });
        let more = ["client", "peer", "zone", "weight", "cores", "shards", "filling", "orders"];
        row.extend(more.iter().map(|key| plain(&member[*key])));
        rows.push(row);
    }
    table(&rows)
}

fn shards(value: &Value) -> String {
    let keys = ["shard", "epoch", "stage", "replicas", "filling", "joining", "leaving", "orderer", "serving", "losses"];
    let mut head = heads(&keys.map(str::to_ascii_uppercase).each_ref().map(String::as_str));
    head.push("STATE".to_owned());
    let mut rows = vec![head];
    for shard in value.as_array().into_iter().flatten() {
        let yes = |key: &str| shard[key] == Value::Bool(true);
        let mut row: Vec<String> = keys.iter().map(|key| plain(&shard[*key])).collect();
        let state = match (yes("readable"), yes("writable")) {
            (true, true) => "ok",
            (true, false) => "no writes",
            (false, true) => "no reads",
            (false, false) => "blocked",
        };
        row.push(state.to_owned());
        rows.push(row);
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(words: &[&str]) -> Result<Request, clap::Error> {
        command().try_get_matches_from([&["admin"], words].concat()).map(|matches| request(&matches))
    }

    #[test]
    fn options_stand_before_or_behind_the_word() {
        command().debug_assert();
        let request = asked(&["--node", "a:1", "drain", "3", "--json", "--password", "x"]).unwrap();
        let expected = Request {
            node: "a:1".into(),
            password: Some("x".into()),
            json: true,
            word: "drain".into(),
            about: Some("3".into()),
        };
        assert_eq!(request, expected);
        assert_eq!(asked(&["status", "--node", "b:2"]).unwrap().node, "b:2");
        assert!(asked(&[]).is_err() && asked(&["drain"]).is_err() && asked(&["status", "3"]).is_err());
    }

    #[test]
    fn a_repair_is_of_all_shards_or_of_one() {
        assert_eq!(asked(&["repair"]).unwrap().about, None);
        assert_eq!(asked(&["repair", "--shard", "7", "--json"]).unwrap().about.as_deref(), Some("7"));
        assert!(asked(&["repair", "7"]).is_err() && asked(&["status", "--shard", "7"]).is_err());
        let mut end = json!({"done": 32, "differed": 1, "incomplete": 0, "sent": 5, "received": 6});
        assert_eq!(repaired(&end), "shards compared: 32, different: 1; entries sent: 5, received: 6\n");
        end["incomplete"] = json!(2);
        assert!(repaired(&end).lines().nth(1).unwrap().contains("different: 2; a copy"));
    }

    #[test]
    fn replies_are_read_and_nonsense_is_refused() {
        let read = |mut bytes: &[u8]| receive(&mut bytes);
        assert_eq!(read(b"+OK\r\n").unwrap(), Answer::Status("OK".into()));
        assert_eq!(read(b"-ERR no\r\n").unwrap(), Answer::Error("ERR no".into()));
        assert_eq!(read(b":12\r\n").unwrap(), Answer::Number(12));
        assert_eq!(read(b"$4\r\n\r\n{}\r\n").unwrap(), Answer::Text("\r\n{}".into()));
        for bytes in [&b""[..], b"+OK", b"$5\r\n{}\r\n", b"$-1\r\n", b"$99999999999\r\n", b"HTTP/1.1 400\r\n", b"\r\n"]
        {
            assert!(read(bytes).is_err(), "{bytes:?}");
        }
        let mut bytes = Vec::new();
        send(&mut bytes, &["CLUSTER", "ümlaut"]).unwrap();
        assert_eq!(bytes, "*2\r\n$7\r\nCLUSTER\r\n$7\r\nümlaut\r\n".as_bytes());
    }

    #[test]
    fn tables_are_aligned_and_plain() {
        let text = members(&json!([
            {"no": 1, "id": "00ff", "standing": "up", "alive": true, "me": true, "voter": true, "client": "10.0.0.1:7379",
             "zone": "", "shards": 256},
            {"no": 12, "id": "11ff", "standing": "draining", "alive": false, "client": "10.0.0.12:7379",
             "zone": "a\u{1b}[2J", "shards": 7},
        ]));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("1   00ff  up              this,voter  10.0.0.1:7379   -  "), "{text}");
        assert!(lines[2].starts_with("12  11ff  draining, away  -           10.0.0.12:7379  -  "), "{text}");
        assert!(lines[2].contains("a?[2J") && text.is_ascii() && !text.contains('\u{1b}'), "{text}");
        let text = shards(&json!([
            {"shard": 0, "replicas": [1, 2, 3], "filling": [], "joining": null, "readable": true, "writable": false}
        ]));
        assert!(text.lines().nth(1).unwrap().ends_with("no writes") && text.contains("1,2,3"), "{text}");
        let text = status(&json!({"state": "ok", "members": {"present": 3, "alive": 2, "draining": 0}}));
        assert!(text.contains("state            ok\n") && text.contains("3, 2 alive, 0 draining\n"), "{text}");
        let mut sick = json!({"me": 2, "clock_offset_ms": 900, "isolated": false, "shards": {"at_risk": 7}});
        assert!(status(&sick).contains("2, its clock up to 900 ms from another\n"), "{}", status(&sick));
        (sick["quarantined"], sick["disk_failed"]) = (true.into(), true.into());
        let text = status(&sick);
        assert!(text.contains("another; writes nothing: its clock is wrong; does not vote: its directory"), "{text}");
        assert!(text.contains(" 7 at risk,"), "{text}");
    }
}
