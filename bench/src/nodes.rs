//! Nodes of one cluster as processes: started, killed, started again, stopped for a while, asked what they see.
//!
//! - Each has a directory below one folder, which holds its log too, and fixed ports outside of those that the kernel gives
//!   to clients, so that a killed node finds its ports free.
//! - All are killed when [`Nodes`] is dropped, by a panic too; when this process is killed outright, by the kernel (where
//!   `setpriv` is installed). That ends those that are stopped, too.
//! - Every wait has a deadline, and ends early when somebody presses Ctrl-C.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::child::{find, ours};
use crate::failure::Failure;
use crate::link::{Answer, Link};
use crate::{interrupt, pin};

/// Where the ports of nodes begin: for clients, for peers.
const CLIENT_PORTS: u16 = 7010;
const PEER_PORTS: u16 = 7110;
/// How long a node may take until it answers, and one question.
const START_PATIENCE: Duration = Duration::from_secs(60);
const ASK_PATIENCE: Duration = Duration::from_secs(1);
/// How long a node may take to list its keys.
const COUNT_PATIENCE: Duration = Duration::from_secs(30);
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How much of a log is shown.
const TAIL: u64 = 2000;

/// Where a node runs.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// What stands before its command line.
    pub(crate) before: Vec<String>,
    pub(crate) client: SocketAddr,
    pub(crate) peer: SocketAddr,
    /// Its cores.
    pub(crate) cores: Vec<usize>,
}

/// Places on the loopback device, on an address that only this process uses; `each` cores for each node.
pub(crate) fn loopback(count: usize, each: usize) -> Result<Vec<Place>, Failure> {
    let (pid, cpus) = (std::process::id(), pin::allowed()?);
    let ip = Ipv4Addr::new(127, 1 + (pid >> 16 & 0x3f) as u8, (pid >> 8) as u8, pid as u8);
    let place = |at: usize| Place {
        before: Vec::new(),
        client: SocketAddr::from((ip, CLIENT_PORTS + at as u16)),
        peer: SocketAddr::from((ip, PEER_PORTS + at as u16)),
        cores: pin::turn(&cpus, at, each),
    };
    Ok((0..count).map(place).collect())
}

/// What all nodes have in common.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct NodeArgs {
    /// Our node's program
    #[arg(long, value_name = "PATH", help_heading = "Nodes")]
    node: Option<PathBuf>,
    /// Where the nodes' directories and logs lie; they are removed at the end unless something went wrong
    #[arg(long, value_name = "PATH", help_heading = "Nodes")]
    folder: Option<PathBuf>,
    /// What the nodes write into their logs
    #[arg(long, default_value = "info", value_name = "LEVEL", help_heading = "Nodes")]
    log_level: String,
    /// Shards of the cluster
    #[arg(long, default_value = "256", value_name = "COUNT", help_heading = "Nodes")]
    shards: u32,
}

impl NodeArgs {
    /// Shards of the cluster.
    pub(crate) fn shards(&self) -> u32 {
        self.shards
    }
}

/// What a node says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Health {
    pub(crate) present: u64,
    pub(crate) alive: u64,
    pub(crate) degraded: u64,
    pub(crate) filling: u64,
    pub(crate) moving: u64,
    pub(crate) isolated: bool,
    pub(crate) cluster: u64,
    pub(crate) epoch: u64,
}

impl Health {
    /// Whether every shard has all its copies, on `count` nodes that can all be reached.
    pub(crate) fn is_whole(&self, count: usize) -> bool {
        let count = count as u64;
        (self.present, self.alive) == (count, count)
            && self.degraded + self.filling + self.moving == 0
            && !self.isolated
    }
}

/// The processes.
#[derive(Debug)]
pub(crate) struct Nodes {
    args: NodeArgs,
    /// Of all nodes, beside those that follow from the arguments.
    flags: Vec<String>,
    program: PathBuf,
    folder: PathBuf,
    places: Vec<Place>,
    running: Vec<Option<Child>>,
    keep: bool,
}

impl Nodes {
    /// Prepares nodes at `places`; none runs yet.
    pub(crate) fn new(args: &NodeArgs, places: Vec<Place>) -> Result<Nodes, Failure> {
        let program = ours(args.node.as_deref())?;
        let unnamed = || std::env::temp_dir().join(format!("gridkv-nodes-{}", std::process::id()));
        let folder = args.folder.clone().unwrap_or_else(unnamed);
        fs::create_dir_all(&folder).map_err(Failure::io(format!("making {}", folder.display())))?;
        if folder.join("node-0").exists() {
            // They would wait for the cluster that they were of.
            let what = format!("--folder: {} holds nodes of another run", folder.display());
            return Err(Failure::Usage(what));
        }
        let running = places.iter().map(|_| None).collect();
        Ok(Nodes { args: args.clone(), flags: Vec::new(), program, folder, places, running, keep: false })
    }

    /// Gives a setting to all nodes that are started from now on.
    pub(crate) fn set(&mut self, flag: &str, value: impl ToString) {
        self.flags.extend([flag.to_owned(), value.to_string()]);
    }

    pub(crate) fn count(&self) -> usize {
        self.places.len()
    }

    /// Where clients reach each node.
    pub(crate) fn clients(&self) -> Vec<SocketAddr> {
        self.places.iter().map(|place| place.client).collect()
    }

    /// Keeps the directories and logs when this is dropped, and says where.
    pub(crate) fn keep_logs(&mut self) {
        self.keep = true;
        eprintln!("gridkv-bench: logs are kept in {}", self.folder.display());
    }

    /// The numbers of those that run.
    pub(crate) fn live(&self) -> Vec<usize> {
        (0..self.running.len()).filter(|&at| self.running[at].is_some()).collect()
    }

    /// Starts a node, with `seeds` to ask, and waits until it answers.
    pub(crate) fn start(&mut self, at: usize, seeds: &[usize]) -> Result<(), Failure> {
        let place = &self.places[at];
        // A process that was killed is gone before its sockets are: the kernel takes its rings apart later.
        self.wait(START_PATIENCE, at, "does not find its ports free", || {
            (is_free(place.client) && is_free(place.peer)).then_some(())
        })?;
        let dir = self.folder.join(format!("node-{at}"));
        fs::create_dir_all(&dir).map_err(Failure::io(format!("making {}", dir.display())))?;
        let log = self.log(at);
        let said = File::options().create(true).append(true).open(&log);
        let said = said.map_err(Failure::io(format!("opening {}", log.display())))?;
        let twice = said.try_clone().map_err(Failure::io("sharing a node's log"))?;
        let mut line: Vec<String> = Vec::new();
        if let Ok(setpriv) = find("setpriv") {
            line.push(setpriv.display().to_string());
            line.extend(["--pdeathsig", "KILL", "--"].map(str::to_owned));
        }
        line.extend(place.before.iter().cloned());
        line.push(self.program.display().to_string());
        for (flag, value) in [
            ("--listen", place.client.to_string()),
            ("--http", "none".to_owned()),
            ("--peer-listen", place.peer.to_string()),
            ("--cores", pin::words(&place.cores)),
            ("--shards", self.args.shards.to_string()),
            ("--dir", dir.display().to_string()),
            ("--log-level", self.args.log_level.clone()),
        ] {
            line.extend([flag.to_owned(), value]);
        }
        line.extend(self.flags.iter().cloned());
        for &seed in seeds {
            line.extend(["--seed".to_owned(), self.places[seed].peer.to_string()]);
        }
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null()).stdout(said).stderr(twice).process_group(0);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GRIDKV_")) {
            command.env_remove(name);
        }
        let child = command.spawn().map_err(|error| self.failed(at, &error.to_string()))?;
        self.running[at] = Some(child);
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            if matches!(self.call(at, &[b"PING"]), Some(Answer::Done)) {
                return Ok(());
            }
            if let Some(Ok(Some(status))) = self.running[at].as_mut().map(Child::try_wait) {
                return Err(self.failed(at, &format!("ended at once ({status})")));
            }
            self.pause(deadline, at, "did not answer in time")?;
        }
    }

    /// Founds a cluster of the nodes from the first to `count`, one after the other.
    pub(crate) fn found(&mut self, count: usize, patience: Duration) -> Result<(), Failure> {
        for at in 0..count {
            let seeds: &[usize] = if at == 0 { &[] } else { &[0] };
            self.start(at, seeds)?;
        }
        self.wait_until_whole(patience).map(drop)
    }

    /// Ends a node as a crash would.
    pub(crate) fn kill(&mut self, at: usize) {
        if let Some(mut child) = self.running[at].take() {
            // It may be gone already; there is nobody left to tell.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops a node where it is, as a machine that stands still would: connections to it stay, and are taken, and what is
    /// sent waits for it.
    pub(crate) fn stop(&self, at: usize) -> Result<(), Failure> {
        self.signal(at, Signal::STOP)
    }

    /// Lets a node that was stopped go on.
    pub(crate) fn go_on(&self, at: usize) -> Result<(), Failure> {
        self.signal(at, Signal::CONT)
    }

    fn signal(&self, at: usize, signal: Signal) -> Result<(), Failure> {
        // As long as nobody has waited for it, its number is its own.
        let child = self.running[at].as_ref().ok_or_else(|| self.failed(at, "does not run"))?;
        kill_process(Pid::from_child(child), signal)
            .map_err(|error| self.failed(at, &format!("could not be sent {signal:?}: {error}")))
    }

    /// Whether all that were started still run.
    pub(crate) fn check(&mut self) -> Result<(), Failure> {
        for at in 0..self.running.len() {
            if let Some(Ok(Some(status))) = self.running[at].as_mut().map(Child::try_wait) {
                return Err(self.failed(at, &format!("ended by itself ({status})")));
            }
        }
        Ok(())
    }

    /// Asks one node something.
    pub(crate) fn call(&self, at: usize, words: &[&[u8]]) -> Option<Answer> {
        Link::connect(self.places[at].client, ASK_PATIENCE).ok()?.call(words).ok()
    }

    /// How many keys like `pattern` a node holds in its own copies.
    pub(crate) fn keys(&self, at: usize, pattern: &str) -> Option<u64> {
        let link = Link::connect(self.places[at].client, COUNT_PATIENCE).ok()?;
        link.count(&[b"KEYS", pattern.as_bytes()]).ok()
    }

    /// Asks one node for `CLUSTER GRIDKV what`.
    pub(crate) fn ask(&self, at: usize, what: &str) -> Option<Value> {
        match self.call(at, &[b"CLUSTER", b"GRIDKV", what.as_bytes()])? {
            Answer::Value(body) => serde_json::from_slice(&body).ok(),
            _ => None,
        }
    }

    /// What a node sees.
    pub(crate) fn health(&self, at: usize) -> Option<Health> {
        let status = self.ask(at, "STATUS")?;
        Some(Health {
            present: status["members"]["present"].as_u64()?,
            alive: status["members"]["alive"].as_u64()?,
            degraded: status["shards"]["degraded"].as_u64()?,
            filling: status["shards"]["filling"].as_u64()?,
            moving: status["shards"]["moving"].as_u64()?,
            isolated: status["isolated"].as_bool()?,
            cluster: u64::from_str_radix(status["cluster"].as_str()?, 16).ok()?,
            epoch: status["epoch"].as_u64()?,
        })
    }

    /// The number of a node's present life, as node `asked` sees it, and whether it can be reached.
    pub(crate) fn life(&self, asked: usize, of: usize) -> Option<(u64, bool)> {
        let peer = self.places[of].peer.to_string();
        let members = self.ask(asked, "MEMBERS")?;
        let mut lives =
            members.as_array()?.iter().filter(|member| member["peer"] == peer && member["standing"] != "lost");
        let member = lives.next_back()?;
        Some((member["no"].as_u64()?, member["alive"].as_bool()?))
    }

    /// Waits until every node that runs sees every shard with all its copies; returns how long it took.
    pub(crate) fn wait_until_whole(&mut self, patience: Duration) -> Result<Duration, Failure> {
        let start = Instant::now();
        let live = self.live();
        for &at in &live {
            loop {
                let health = self.health(at);
                if health.is_some_and(|health| health.is_whole(live.len())) {
                    break;
                }
                self.check()?;
                self.pause(start + patience, at, &format!("does not see a whole cluster; it says {health:?}"))?;
            }
        }
        Ok(start.elapsed())
    }

    /// Waits until all nodes that run see each other and have the same map; `what` is said about node `at` when it takes too
    /// long.
    pub(crate) fn wait_until_one_cluster(&self, patience: Duration, at: usize, what: &str) -> Result<(), Failure> {
        let live = self.live();
        let count = live.len() as u64;
        self.wait(patience, at, what, || {
            let views: Option<Vec<_>> = live.iter().map(|&at| self.health(at)).collect();
            let views = views?;
            let same = views.iter().all(|view| (view.cluster, view.epoch) == (views[0].cluster, views[0].epoch));
            let reached = views.iter().all(|view| (view.alive, view.present) == (count, count) && !view.isolated);
            (same && reached).then_some(())
        })
    }

    /// Sleeps a little, unless it is time to give up with `what`.
    fn pause(&self, deadline: Instant, at: usize, what: &str) -> Result<(), Failure> {
        if interrupt::requested() {
            return Err(Failure::Usage("interrupted".into()));
        }
        if Instant::now() > deadline {
            return Err(self.failed(at, what));
        }
        std::thread::sleep(ASK_EVERY);
        Ok(())
    }

    /// Waits until `condition` gives something; `what` is said about node `at` when it takes too long.
    pub(crate) fn wait<T>(
        &self,
        patience: Duration,
        at: usize,
        what: &str,
        mut condition: impl FnMut() -> Option<T>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(value) = condition() {
                return Ok(value);
            }
            self.pause(deadline, at, what)?;
        }
    }

    fn log(&self, at: usize) -> PathBuf {
        self.folder.join(format!("node-{at}.log"))
    }

    fn failed(&self, at: usize, what: &str) -> Failure {
        let tail = || {
            let mut log = File::open(self.log(at)).ok()?;
            let len = log.seek(SeekFrom::End(0)).ok()?;
            log.seek(SeekFrom::Start(len.saturating_sub(TAIL))).ok()?;
            let mut bytes = Vec::new();
            log.read_to_end(&mut bytes).ok()?;
            Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
        };
        let what = format!("{what}; the end of its log:\n{}", tail().unwrap_or_default());
        Failure::Program { program: format!("node {at}"), what }
    }
}

/// Whether nobody listens there. Of an address in another network nothing is known here, and nothing said against it.
///
/// It does not listen itself: a client that tries the port meanwhile would be let in, and a node would find it taken.
fn is_free(addr: SocketAddr) -> bool {
    let bound = || {
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        net::sockopt::set_socket_reuseaddr(&socket, true)?;
        net::bind(&socket, &addr)
    };
    let in_use = |error: std::io::Error| error.kind() == std::io::ErrorKind::AddrInUse;
    bound() != Err(Errno::ADDRINUSE) && !UdpSocket::bind(addr).is_err_and(in_use)
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for at in 0..self.running.len() {
            self.kill(at);
        }
        if !self.keep && !std::thread::panicking() {
            // What cannot be removed stays; the run itself is done.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A process that does nothing, as the only node.
    fn idle() -> Nodes {
        let child = Command::new("sleep").arg("600").stdin(Stdio::null()).process_group(0).spawn();
        Nodes {
            args: NodeArgs { node: None, folder: None, log_level: "info".into(), shards: 1 },
            flags: Vec::new(),
            program: "sleep".into(),
            folder: std::env::temp_dir().join(format!("gridkv-nodes-test-{}", std::process::id())),
            places: Vec::new(),
            running: vec![Some(child.expect("there is a program that sleeps"))],
            keep: false,
        }
    }

    /// Waits until the kernel says that the process is in one of these states; `-` if there is none.
    fn wait_for_state(pid: u32, wanted: &str) {
        let state = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit(')').next()?.trim_start().chars().next()
        };
        let deadline = Instant::now() + START_PATIENCE;
        while !wanted.contains(state().unwrap_or('-')) {
            assert!(Instant::now() < deadline, "{:?}, not one of {wanted}", state());
            std::thread::sleep(ASK_EVERY);
        }
    }

    #[test]
    fn a_node_is_stopped_and_goes_on() {
        let nodes = idle();
        let pid = nodes.running[0].as_ref().expect("it runs").id();
        nodes.stop(0).unwrap();
        wait_for_state(pid, "T");
        nodes.go_on(0).unwrap();
        wait_for_state(pid, "SR");
    }

    #[test]
    fn a_stopped_node_does_not_outlive_us() {
        let nodes = idle();
        let pid = nodes.running[0].as_ref().expect("it runs").id();
        nodes.stop(0).unwrap();
        wait_for_state(pid, "T");
        drop(nodes);
        wait_for_state(pid, "-");
    }

    #[test]
    fn a_port_is_free_when_nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        assert!(!is_free(addr));
        drop(listener);
        assert!(is_free(addr));
        assert!(is_free("192.0.2.1:7010".parse().unwrap()), "it is not ours to ask for");
    }

    #[test]
    fn who_does_not_run_cannot_be_stopped() {
        let mut nodes = idle();
        nodes.kill(0);
        assert!(nodes.stop(0).unwrap_err().to_string().contains("does not run"));
    }
}
