//! Starts real nodes for the black-box tests and talks to them over a socket.
//!
//! A test here sees what a user sees: a process, its exit code, its log, a port. Nothing reaches inside.
//!
//! - [`Node`] owns one `gridkv-node` process. It is ready when the constructor returns, and gone when the
//!   value is dropped, whatever the test did. When the test fails, the node's output is printed.
//! - [`Cluster`] owns three of them that hold every key three times.
//! - [`resp`] is a RESP client of our own, so small that it can send what a well-behaved client never would.
//! - [`until`] waits for a condition; no test waits for an amount of time.
//!
//! The binary is `$GRIDKV_NODE` if set (`scripts/test` sets it), otherwise the one that cargo builds with
//! the profile that this test was built with.

#![allow(unreachable_pub, dead_code, reason = "every test binary has a copy and uses its own part of it")]

pub mod resp;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up. Generous: it is reached only when something is broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives a value; panics with `what` when that takes longer than [`PATIENCE`].
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "still not so after {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The node's binary; built first when nobody said where it is.
pub fn node_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(given) = std::env::var_os("GRIDKV_NODE") {
            return PathBuf::from(given);
        }
        let test = std::env::current_exe().expect("a running test has a path");
        let profile = test.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "gridkv-node"]).current_dir(root());
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "gridkv-node does not build");
        profile.join("gridkv-node")
    })
}

/// An address of this machine that nobody listens on at the moment, and that was not given to anybody of this process before.
pub fn free_address() -> SocketAddr {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    until("a port that nobody has", || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        GIVEN.lock().expect("nobody panics with it").insert(address.port()).then_some(address)
    })
}

/// The same for a node's peers, which use one port for TCP and UDP.
pub fn free_peer_address() -> SocketAddr {
    until("a port that is free for TCP and UDP", || {
        let address = free_address();
        UdpSocket::bind(address).is_ok().then_some(address)
    })
}

/// How many CPUs this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// A command line for `gridkv-node` with an environment that says nothing about GridKV.
pub fn node_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(node_binary());
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("GRIDKV_") {
            command.env_remove(name);
        }
    }
    command
}

/// What a node that was expected to refuse to start said and did.
pub struct Refusal {
    pub status: ExitStatus,
    pub output: String,
}

/// Runs `gridkv-node` to its end, which must come by itself.
pub fn refused(arguments: &[&str]) -> Refusal {
    let (log, path) = log_file();
    let mut child = node_command(arguments)
        .stdout(log.try_clone().expect("a file handle"))
        .stderr(log)
        .spawn()
        .expect("gridkv-node starts");
    let status = wait_for_exit(&mut child, &format!("gridkv-node {arguments:?} ends by itself"));
    Refusal { status, output: std::fs::read_to_string(path).expect("the log can be read") }
}

fn wait_for_exit(child: &mut Child, what: &str) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().expect("our own child can be waited for") {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("still not so after {PATIENCE:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn log_file() -> (File, PathBuf) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("node-{}-{count}.log", std::process::id()));
    (File::create(&path).expect("a log file in target/tmp"), path)
}

/// A running node.
pub struct Node {
    child: Child,
    ended: bool,
    pub resp: SocketAddr,
    pub http: SocketAddr,
    log: PathBuf,
}

impl Node {
    /// A node with the given flags beside its addresses; ready to serve when this returns. It stands alone, unless the flags
    /// name a `--peer-listen`.
    pub fn start(flags: &[&str]) -> Node {
        let (resp, http) = (free_address(), free_address());
        let (log, path) = log_file();
        let alone: &[&str] = if flags.contains(&"--peer-listen") { &[] } else { &["--peer-listen", "none"] };
        let child = node_command(&["--listen", &resp.to_string(), "--http", &http.to_string()])
            .args(alone)
            .args(flags)
            .stdout(log.try_clone().expect("a file handle"))
            .stderr(log)
            .spawn()
            .expect("gridkv-node starts");
        let mut node = Node { child, ended: false, resp, http, log: path };
        until("the node says that it is ready", || {
            if let Some(status) = node.child.try_wait().expect("our own child can be waited for") {
                node.ended = true;
                panic!("the node ended with {status} before it was ready");
            }
            (node.http_get("/readyz")?.0 == 200).then_some(())
        });
        node
    }

    /// A node on so many cores, or fewer where the machine has fewer.
    pub fn with_cores(cores: usize) -> Node {
        Node::start(&["--cores", &cores.min(cpus()).to_string()])
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A new RESP connection.
    pub fn connect(&self) -> resp::Client {
        resp::Client::connect(self.resp)
    }

    /// Status and body of a page of the node's HTTP port, or nothing when nobody answers.
    pub fn http_get(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect_timeout(&self.http, Duration::from_secs(5)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split_whitespace().nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }

    /// What the node has written to its standard output and error so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Resident memory of the process in bytes, as the kernel counts it.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the node runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS in /proc/<pid>/status");
        let kib: u64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
        kib * 1024
    }

    /// How many file descriptors the node has open.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the node runs").count()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill takes no pointers; the pid is that of a child which we have not yet waited for, so it cannot
        // have been given to another process.
        let done = unsafe { libc::kill(self.pid() as i32, signal) };
        assert_eq!(done, 0, "a signal can be sent to our own child");
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait_for_exit(&mut self.child, "the node ends");
        self.ended = true;
        status
    }

    /// Asserts that the process is alive and serves new connections.
    pub fn assert_well(&mut self) {
        if let Some(status) = self.child.try_wait().expect("our own child can be waited for") {
            self.ended = true;
            panic!("the node died: {status}");
        }
        let mut client = self.connect();
        assert_eq!(client.call(&["PING"]), resp::Reply::Simple("PONG".into()));
    }
}

/// Nodes that hold every key three times over. Gone when dropped, with their directories.
pub struct Cluster {
    pub nodes: Vec<Node>,
    directories: PathBuf,
}

impl Cluster {
    /// Three nodes of one core each; when this returns, every shard has three whole copies and every node knows it.
    pub fn of_three() -> Cluster {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directories =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("cluster-{}-{count}", std::process::id()));
        let mut cluster = Cluster { nodes: Vec::new(), directories };
        let mut founder: Option<String> = None;
        for n in 0..3 {
            let peer = free_peer_address().to_string();
            let directory = cluster.directories.join(n.to_string());
            std::fs::create_dir_all(&directory).expect("a directory in target/tmp");
            let directory = directory.to_str().expect("a path that can be printed");
            let mut flags = vec!["--cores", "1", "--shards", "32", "--peer-listen", &peer, "--dir", directory];
            if let Some(founder) = &founder {
                flags.extend(["--seed", founder]);
            }
            cluster.nodes.push(Node::start(&flags));
            founder.get_or_insert(peer);
        }
        for node in &cluster.nodes {
            let mut client = node.connect();
            until("three copies of every shard", || {
                let info = client.call(&["CLUSTER", "INFO"]);
                let ok = info.bytes().starts_with(b"cluster_state:ok\r\n");
                let status = client.call(&["CLUSTER", "GRIDKV", "STATUS"]);
                let status: serde_json::Value = serde_json::from_slice(status.bytes()).expect("JSON");
                let whole = status["shards"]["degraded"] == 0 && status["shards"]["moving"] == 0;
                (ok && whole && status["members"]["alive"] == 3).then_some(())
            });
        }
        cluster
    }

    /// Where a node serves clients, for programs that are told so by their environment.
    pub fn ports(&self) -> String {
        self.nodes.iter().map(|node| node.resp.port().to_string()).collect::<Vec<_>>().join(",")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.clear();
        let _ = std::fs::remove_dir_all(&self.directories);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- output of the node on {} ---\n{}--- end of output ---", self.resp, self.output());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}
