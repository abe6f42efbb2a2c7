//! A cluster of real processes: what one acknowledged the others know, whoever dies; a side that is too small says so.
//!
//! Longer and under load: `gridkv-bench chaos`.

mod support;

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use support::resp::{Client, Reply};
use support::{Node, until};

const SHARDS: &str = "32";
const KEYS: usize = 300;

/// A node's place: what it keeps when it is killed.
struct Place {
    peer: String,
    dir: PathBuf,
}

impl Place {
    fn new() -> Place {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("cluster-{pid}-{count}"));
        std::fs::create_dir_all(&dir).expect("a directory in target/tmp");
        // An address that only this process uses, and a port that the kernel gives to no client: it is free when a node returns.
        let peer = format!("127.{}.{}.{}:7380", 1 + (pid >> 8 & 0x3f), pid & 0xff, count + 1);
        Place { peer, dir }
    }

    fn start(&self, seeds: &[&Place]) -> Node {
        let dir = self.dir.to_str().expect("a plain path");
        let mut flags = vec!["--cores", "1", "--shards", SHARDS, "--peer-listen", &self.peer, "--dir", dir];
        seeds.iter().for_each(|seed| flags.extend(["--seed", &seed.peer]));
        Node::start(&flags)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It stays when something still writes into it, and does no harm there.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Three nodes whose shards have all their copies.
fn three() -> ([Place; 3], [Node; 3]) {
    let places = [Place::new(), Place::new(), Place::new()];
    let first = places[0].start(&[]);
    let second = places[1].start(&[&places[0]]);
    let third = places[2].start(&[&places[0], &places[1]]);
    let nodes = [first, second, third];
    nodes.iter().for_each(|node| whole(node, 3));
    (places, nodes)
}

fn status(node: &Node) -> Option<Value> {
    match node.connect().call(&["CLUSTER", "GRIDKV", "STATUS"]) {
        Reply::Bulk(json) => Some(serde_json::from_slice(&json).expect("the status is JSON")),
        _ => None,
    }
}

/// Copies that a node holds, and those of them that are being filled.
fn copies(node: &Node) -> (u64, u64) {
    let members = node.connect().call(&["CLUSTER", "GRIDKV", "MEMBERS"]);
    let members: Vec<Value> = serde_json::from_slice(members.bytes()).expect("a list of members");
    let me = members.iter().find(|member| member["me"] == true).expect("it is one of them");
    (me["shards"].as_u64().expect("a number"), me["filling"].as_u64().expect("a number"))
}

/// Waits until a node sees so many nodes, and all copies that they should hold.
fn whole(node: &Node, count: usize) {
    until("every shard has its copies", || {
        let status = status(node)?;
        let all = status["members"]["alive"] == count && status["members"]["present"] == count;
        let none = |what: &str| status["shards"][what] == 0;
        (all && none("degraded") && none("filling") && none("moving")).then_some(())
    });
}

fn set(client: &mut Client, key: usize, value: &str) {
    assert_eq!(client.call(&["SET", &format!("key:{key}"), value]), Reply::ok());
}

fn assert_holds(node: &Node, value: &str) {
    let mut client = node.connect();
    for key in 0..KEYS {
        assert_eq!(client.call(&["GET", &format!("key:{key}")]), Reply::bulk(value), "key:{key}");
    }
}

#[test]
fn clients_are_told_the_address_that_is_advertised() {
    let place = Place::new();
    let node = Node::start(&["--peer-listen", &place.peer, "--advertise-client", "192.0.2.7:7000"]);
    let slots = until("the node knows its slots", || {
        let slots = node.connect().call(&["CLUSTER", "SLOTS"]);
        (!slots.elements().is_empty()).then_some(slots)
    });
    let address = slots.elements()[0].elements()[2].elements();
    assert_eq!((address[0].bytes(), address[1].integer()), (&b"192.0.2.7"[..], 7000));
}

#[test]
fn what_was_acknowledged_outlives_each_node_in_turn() {
    let (places, mut nodes) = three();
    for victim in 0..3 {
        let value = format!("round {victim}");
        let survivor = (victim + 1) % 3;
        let mut client = nodes[victim].connect();
        (0..KEYS / 2).for_each(|key| set(&mut client, key, &value));
        nodes[victim].signal(libc::SIGKILL);
        nodes[victim].wait();
        // Two of three are enough, as soon as they know that the third is gone.
        let mut client = nodes[survivor].connect();
        for key in KEYS / 2..KEYS {
            until("a quorum acknowledges", || {
                (client.call(&["SET", &format!("key:{key}"), &value]) == Reply::ok()).then_some(())
            });
        }
        assert_holds(&nodes[survivor], &value);
        let seeds: Vec<&Place> = (0..3).filter(|&at| at != victim).map(|at| &places[at]).collect();
        nodes[victim] = places[victim].start(&seeds);
        assert_eq!(copies(&nodes[victim]), (32, 0), "when it is ready its copies are complete");
        nodes.iter().for_each(|node| whole(node, 3));
        nodes.iter().for_each(|node| assert_holds(node, &value));
    }
}

#[test]
fn a_node_without_a_quorum_says_so() {
    let (_places, mut nodes) = three();
    let mut client = nodes[0].connect();
    set(&mut client, 1, "before");
    for node in &mut nodes[1..] {
        node.signal(libc::SIGKILL);
        node.wait();
    }
    for command in [&["SET", "key:1", "after"][..], &["GET", "key:1"], &["DEL", "key:1"], &["INCR", "n"]] {
        until("it is refused", || {
            let reply = client.call(command);
            assert!(reply.is_error(), "acknowledged by one of three: {command:?} {reply:?}");
            let Reply::Error(text) = reply else { unreachable!("it is an error") };
            (text.starts_with("CLUSTERDOWN") || text.starts_with("TRYAGAIN")).then_some(())
        });
    }
}

/// Before the others have noticed.
#[test]
fn a_command_whose_orderer_stands_still_says_so() {
    let (_places, nodes) = three();
    let mut client = nodes[0].connect();
    let counts: Vec<Vec<Vec<u8>>> = (0..64).map(|n| vec![b"INCR".to_vec(), format!("n:{n}").into_bytes()]).collect();
    nodes[1].signal(libc::SIGSTOP);
    let replies = client.pipeline(&counts);
    nodes[1].signal(libc::SIGCONT);
    let (failed, counted): (Vec<_>, Vec<_>) = replies.into_iter().partition(Reply::is_error);
    assert!(counted.len() > 16 && counted.iter().all(|reply| reply.integer() == 1), "two of three stand: {counted:?}");
    let of_orderer =
        |reply: &Reply| matches!(reply, Reply::Error(text) if text.starts_with("UNKNOWN the orderer of the shard"));
    assert!(!failed.is_empty() && failed.iter().all(of_orderer), "{failed:?}");
}

#[test]
fn a_write_is_newer_than_what_another_node_acknowledged_before() {
    let (_places, nodes) = three();
    let mut clients = nodes.each_ref().map(Node::connect);
    for round in 0..300 {
        for (at, client) in clients.iter_mut().enumerate() {
            set(client, round, &format!("{round} by {at}"));
        }
        let found = clients[round % 3].call(&["GET", &format!("key:{round}")]);
        assert_eq!(found, Reply::bulk(format!("{round} by 2")));
    }
}

#[test]
fn what_was_deleted_stays_deleted_when_a_node_returns() {
    let (places, mut nodes) = three();
    let mut client = nodes[0].connect();
    (0..KEYS).for_each(|key| set(&mut client, key, "x"));
    nodes[2].signal(libc::SIGKILL);
    nodes[2].wait();
    for key in 0..KEYS {
        until("a quorum deletes", || (!client.call(&["DEL", &format!("key:{key}")]).is_error()).then_some(()));
    }
    nodes[2] = places[2].start(&[&places[0]]);
    nodes.iter().for_each(|node| whole(node, 3));
    for node in &nodes {
        let mut client = node.connect();
        for key in 0..KEYS {
            assert_eq!(client.call(&["EXISTS", &format!("key:{key}")]), Reply::Integer(0), "key:{key}");
        }
    }
}

#[test]
fn what_is_written_at_any_of_five_nodes_is_read_at_every_other() {
    let mut places: Vec<Place> = Vec::new();
    let mut nodes: Vec<Node> = Vec::new();
    for _ in 0..5 {
        let place = Place::new();
        nodes.push(place.start(&places.iter().take(2).collect::<Vec<_>>()));
        places.push(place);
    }
    nodes.iter().for_each(|node| whole(node, 5));
    let mut clients: Vec<Client> = nodes.iter().map(Node::connect).collect();
    for key in 0..KEYS {
        set(&mut clients[key % 5], key, &key.to_string());
    }
    for (at, client) in clients.iter_mut().enumerate() {
        for key in 0..KEYS {
            let found = client.call(&["GET", &format!("key:{key}")]);
            assert_eq!(found, Reply::bulk(key.to_string()), "key:{key} of node {} at node {at}", key % 5);
        }
    }
    // And deleted at any other: nobody has it any more.
    for key in 0..KEYS {
        assert_eq!(clients[(key + 3) % 5].call(&["DEL", &format!("key:{key}")]), Reply::Integer(1), "key:{key}");
    }
    for client in &mut clients {
        for key in 0..KEYS {
            assert_eq!(client.call(&["EXISTS", &format!("key:{key}")]), Reply::Integer(0), "key:{key}");
        }
    }
}

#[test]
fn a_node_that_joins_answers_for_all_keys() {
    let (places, nodes) = three();
    let mut client = nodes[0].connect();
    (0..KEYS).for_each(|key| set(&mut client, key, "x"));
    let place = Place::new();
    let fourth = place.start(&[&places[0], &places[1]]);
    // While copies still move to it, and when all are there.
    assert_holds(&fourth, "x");
    whole(&fourth, 4);
    assert_holds(&fourth, "x");
    let mut client = fourth.connect();
    (0..KEYS).for_each(|key| set(&mut client, key, "y"));
    nodes.iter().for_each(|node| assert_holds(node, "y"));
}

#[test]
fn a_node_says_of_itself_that_it_is_one_of_a_cluster_or_stands_alone() {
    let place = Place::new();
    for (node, mode, enabled) in [(place.start(&[]), "cluster", 1), (Node::start(&[]), "standalone", 0)] {
        let mut client = node.connect();
        let Reply::Array(fields) = client.call(&["HELLO", "2"]) else { panic!("HELLO answers with fields") };
        let at = fields.iter().position(|field| *field == Reply::bulk("mode")).expect("it tells its mode");
        assert_eq!(fields[at + 1], Reply::bulk(mode));
        let Reply::Bulk(info) = client.call(&["INFO"]) else { panic!("INFO answers with a text") };
        let info = String::from_utf8(info).expect("INFO is a text");
        for line in [format!("redis_mode:{mode}\r\n"), format!("cluster_enabled:{enabled}\r\n")] {
            assert!(info.contains(&line), "{line} {info}");
        }
        assert_eq!(client.call(&["CLUSTER", "INFO"]).is_error(), enabled == 0);
    }
}

#[test]
fn a_second_process_with_the_directory_of_a_node_gives_up_and_the_node_goes_on() {
    let (places, mut nodes) = three();
    let copy = Place::new();
    for entry in std::fs::read_dir(&places[1].dir).expect("the directory of a node") {
        let entry = entry.expect("an entry of it");
        std::fs::copy(entry.path(), copy.dir.join(entry.file_name())).expect("a copy");
    }
    let dir = copy.dir.to_str().expect("a plain path");
    let flags = ["--listen", "127.0.0.1:0", "--http", "none", "--cores", "1", "--shards", SHARDS, "--dir", dir];
    let refusal = support::refused(&[&flags[..], &["--peer-listen", &copy.peer, "--seed", &places[0].peer]].concat());
    assert!(!refusal.status.success());
    assert!(refusal.output.contains("another process with this node's id"), "{}", refusal.output);
    assert!(refusal.output.contains(&places[1].peer), "{}", refusal.output);
    nodes.iter_mut().for_each(Node::assert_well);
    nodes.iter().for_each(|node| whole(node, 3));
}

/// What `gridkv-node admin` prints, with what it is asked.
fn admin(node: &Node, words: &[&str]) -> String {
    let mut command = support::node_command(&["admin", "--node", &node.resp.to_string()]);
    let output = command.args(words).output().expect("gridkv-node runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?} {said}");
    assert!(!said.contains('\r'), "progress is for terminals");
    String::from_utf8(output.stdout).expect("it prints text")
}

#[test]
fn an_operator_has_copies_compared_and_sees_the_end() {
    let (_places, mut nodes) = three();
    let mut client = nodes[0].connect();
    (0..KEYS).for_each(|key| set(&mut client, key, "x"));
    // Whatever number a node has, and whoever's turn it is.
    for node in &nodes {
        let end: Value = serde_json::from_str(&admin(node, &["repair", "--json"])).expect("JSON");
        assert_eq!((&end["running"], &end["shards"], &end["done"]), (&false.into(), &32.into(), &32.into()), "{end}");
        assert_eq!(end["incomplete"], 0, "{end}");
    }
    assert!(
        admin(&nodes[1], &["repair", "--shard", "7"]).starts_with("shards compared: 1, different: 0; entries sent: 0")
    );
    assert!(client.call(&["CLUSTER", "GRIDKV", "REPAIR", "32"]).is_error());
    nodes[2].signal(libc::SIGKILL);
    nodes[2].wait();
    let end: Value = until("it says what it could not compare", || {
        let end: Value = serde_json::from_str(&admin(&nodes[0], &["repair", "--json"])).expect("JSON");
        (end["incomplete"] == 32).then_some(end)
    });
    assert_eq!(end["done"], 32, "{end}");
}

#[test]
fn a_node_that_waits_for_its_cluster_can_be_stopped() {
    let place = Place::new();
    let flags = ["--listen", "127.0.0.1:0", "--http", "none", "--peer-listen", &place.peer, "--seed", "127.0.0.1:1"];
    let mut child =
        support::node_command(&flags).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    // A start that listens for peers listens for signals, too.
    let peer: std::net::SocketAddr = place.peer.parse().expect("an address");
    until("it listens for peers", || std::net::TcpStream::connect(peer).ok());
    let killed = std::process::Command::new("kill").arg(child.id().to_string()).status().expect("kill runs");
    assert!(killed.success());
    // Had it waited for its cluster to the end, it would have failed.
    assert!(child.wait().expect("our own child").success());
}
