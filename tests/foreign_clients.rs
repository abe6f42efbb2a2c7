//! Redis clients that we did not write, against a node of ours: they are the judge of "it just works".
//!
//! Every test starts one node, or a cluster of three, and hands its port to a program: pytest with redis-py, Node.js with
//! node-redis and ioredis, Go with go-redis, redis-cli, redis-benchmark. The programs are not part of a Rust toolchain, so
//! these tests are ignored by a plain `cargo test`; `scripts/test` installs the programs and runs them.
//!
//! The `redis` crate needs nothing installed and has `redis_crate.rs`; Redis's own test-suite is a step of
//! `scripts/test` (`tests/redis-suite/run.py`).

mod support;

use std::io::Write;
use std::process::{Command, Output, Stdio};

use support::{Cluster, Node, root};

/// Runs a program to its end; a failure shows all that it printed.
fn run(command: &mut Command) -> String {
    let output =
        command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}; scripts/test installs it"));
    checked(command, output)
}

fn checked(command: &Command, output: Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} ended with {}:\n{text}", output.status);
    text
}

/// Runs the redis-py tests against the node and says how they went.
fn redis_py(node: &Node) {
    let text = run(Command::new(root().join(".venv/bin/python"))
        .args(["-m", "pytest", "--ignore", "test_cluster.py"])
        .current_dir(root().join("tests/clients/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("GRIDKV_PORT", node.resp.port().to_string()));
    let summary = text.lines().last().unwrap_or_default();
    println!("redis-py: {summary}");
    assert!(!summary.contains("skipped"), "every test is meant for GridKV: {summary}");
}

#[test]
#[ignore = "needs Python and redis-py, which scripts/test installs"]
fn redis_py_on_one_core() {
    redis_py(&Node::with_cores(1));
}

#[test]
#[ignore = "needs Python and redis-py, which scripts/test installs"]
fn redis_py_on_two_cores() {
    redis_py(&Node::with_cores(2));
}

#[test]
#[ignore = "needs Node.js and its clients, which scripts/test installs"]
fn node_redis_and_ioredis() {
    let node = Node::with_cores(2);
    let text = run(Command::new("node")
        .args(["--test", "clients.test.js"])
        .current_dir(root().join("tests/clients/node"))
        .env("GRIDKV_PORT", node.resp.port().to_string()));
    println!("Node.js clients: {}", node_counts(&text));
}

/// How many tests passed and failed.
fn node_counts(text: &str) -> String {
    let counts: Vec<&str> = text.lines().filter(|line| line.contains("pass ") || line.contains("fail ")).collect();
    counts.join(", ")
}

/// The clients of Redis Cluster: each asks a node for the slots and then speaks to all three.
#[test]
#[ignore = "needs Python and redis-py, which scripts/test installs"]
fn redis_py_in_a_cluster() {
    let mut cluster = Cluster::of_three();
    let text = run(Command::new(root().join(".venv/bin/python"))
        .args(["-m", "pytest", "test_cluster.py"])
        .current_dir(root().join("tests/clients/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("GRIDKV_PORT", cluster.nodes[0].resp.port().to_string())
        .env("GRIDKV_PORTS", cluster.ports()));
    let summary = text.lines().last().unwrap_or_default();
    println!("redis-py in a cluster: {summary}");
    assert!(summary.contains("passed") && !summary.contains("skipped"), "{text}");
    cluster.nodes.iter_mut().for_each(Node::assert_well);
}

#[test]
#[ignore = "needs Node.js and its clients, which scripts/test installs"]
fn node_redis_and_ioredis_in_a_cluster() {
    let mut cluster = Cluster::of_three();
    let text = run(Command::new("node")
        .args(["--test", "cluster.test.js"])
        .current_dir(root().join("tests/clients/node"))
        .env("GRIDKV_PORTS", cluster.ports()));
    println!("Node.js clients in a cluster: {}", node_counts(&text));
    cluster.nodes.iter_mut().for_each(Node::assert_well);
}

/// Runs one of the go-redis tests; nothing may be skipped, and it is run anew each time.
fn go_redis(test: &str, variable: &str, value: &str) {
    let text = run(Command::new("go")
        .args(["test", "-count=1", "-v", "-run", test])
        .current_dir(root().join("tests/clients/go"))
        .env(variable, value));
    println!("go-redis: {} passed", text.matches("--- PASS").count());
    assert!(text.contains(&format!("--- PASS: {test}")) && !text.contains("SKIP"), "{text}");
}

#[test]
#[ignore = "needs Go and go-redis, which scripts/test installs"]
fn go_redis_on_two_cores() {
    let node = Node::with_cores(2);
    go_redis("TestOneNode", "GRIDKV_PORT", &node.resp.port().to_string());
}

#[test]
#[ignore = "needs Go and go-redis, which scripts/test installs"]
fn go_redis_in_a_cluster() {
    let mut cluster = Cluster::of_three();
    go_redis("TestCluster", "GRIDKV_PORTS", &cluster.ports());
    cluster.nodes.iter_mut().for_each(Node::assert_well);
}

#[test]
#[ignore = "needs redis-cli, which scripts/test installs"]
fn redis_cli_in_a_cluster() {
    let cluster = Cluster::of_three();
    // With `-c` it would follow redirections; there must be none to follow.
    for (n, node) in cluster.nodes.iter().enumerate() {
        assert_eq!(run(redis_cli(node).args(["-c", "set", &format!("cli:{n}"), "v"])), "OK\n");
    }
    for node in &cluster.nodes {
        assert_eq!(run(redis_cli(node).args(["mget", "cli:0", "cli:1", "cli:2"])), "v\nv\nv\n");
        assert!(run(redis_cli(node).args(["cluster", "info"])).contains("cluster_size:3"));
    }
}

fn redis_cli(node: &Node) -> Command {
    let mut command = Command::new("redis-cli");
    command.args(["-p", &node.resp.port().to_string()]);
    command
}

#[test]
#[ignore = "needs redis-cli, which scripts/test installs"]
fn redis_cli_in_both_protocols() {
    let node = Node::with_cores(2);
    for protocol in ["-2", "-3"] {
        assert_eq!(run(redis_cli(&node).args([protocol, "set", "greeting", "hello there"])), "OK\n");
        assert_eq!(run(redis_cli(&node).args([protocol, "get", "greeting"])), "hello there\n");
        assert_eq!(run(redis_cli(&node).args([protocol, "incr", &format!("n{protocol}")])), "1\n");
        assert!(run(redis_cli(&node).args([protocol, "info", "server"])).contains("redis_version:"));
        assert!(run(redis_cli(&node).args([protocol, "command", "docs", "get"])).contains("summary"));
        assert!(run(redis_cli(&node).args([protocol, "nosuch"])).starts_with("ERR unknown command 'nosuch'"));
    }
}

#[test]
#[ignore = "needs redis-cli, which scripts/test installs"]
fn redis_cli_walks_and_loads_in_bulk() {
    let node = Node::with_cores(2);

    // `--pipe` sends commands without reading replies, then asks with ECHO whether all arrived.
    let mut load = redis_cli(&node);
    load.arg("--pipe").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = load.spawn().expect("redis-cli runs; scripts/test installs it");
    let mut input = child.stdin.take().expect("a pipe");
    for n in 0..20_000 {
        input
            .write_all(&support::resp::encode(&["SET".into(), format!("key:{n}"), format!("{n:x>200}")]))
            .expect("it reads");
    }
    drop(input);
    let text = checked(&load, child.wait_with_output().expect("redis-cli ends"));
    assert!(text.contains("errors: 0, replies: 20000"), "{text}");

    let names = run(redis_cli(&node).args(["--scan", "--pattern", "key:*"]));
    assert_eq!(names.lines().count(), 20_000);
    let text = run(redis_cli(&node).arg("--bigkeys"));
    assert!(text.contains("20000 strings with"), "{text}");
    let text = run(redis_cli(&node).arg("--memkeys"));
    assert!(text.contains("20000"), "{text}");
}

#[test]
#[ignore = "needs redis-benchmark, which scripts/test installs"]
fn redis_benchmark() {
    let node = Node::with_cores(2);
    let port = node.resp.port().to_string();
    for options in [
        &["-c", "20"][..],
        &["-c", "50", "-P", "16"],
        &["-c", "20", "-P", "64", "-r", "10000", "-d", "300"],
        &["--threads", "2", "-3"],
    ] {
        let mut command = Command::new("redis-benchmark");
        command.args(["-p", &port, "-n", "20000", "--csv", "-t", "ping,set,get,incr,mset"]).args(options);
        let text = run(&mut command);
        for test in ["\"SET\"", "\"GET\"", "\"INCR\"", "\"MSET (10 keys)\"", "\"PING_MBULK\""] {
            assert!(text.contains(test), "no line for {test} in\n{text}");
        }
        assert!(!text.contains("ERR"), "{text}");
    }
}

/// One core and one client that waits for each reply: the core goes to sleep between any two requests, more often than a
/// task of its executor may have wakers.
#[test]
#[ignore = "needs redis-benchmark, which scripts/test installs"]
fn redis_benchmark_one_request_at_a_time() {
    let mut node = Node::with_cores(1);
    let mut command = Command::new("redis-benchmark");
    command.args(["-p", &node.resp.port().to_string(), "-n", "40000", "--csv", "-t", "get", "-c", "1"]);
    let text = run(&mut command);
    assert!(text.contains("\"GET\""), "{text}");
    node.assert_well();
}
