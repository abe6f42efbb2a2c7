//! A small network of this machine's own, which can be split: a namespace for each node, with two devices.
//!
//! ```text
//!   this process ── clients' bridge ──┬────────┬────────┬── … every node, always
//!                                   node 0   node 1   node 2
//!                   peers' bridge ────┴────────┴────────┘
//!                   island ─────────  nobody; a split moves the peers' devices of one side here
//! ```
//!
//! What is sent between the sides vanishes without a word, as behind a broken switch: hardware addresses are fixed, so that
//! nobody learns by asking for them that the other side is gone. Clients reach both sides.
//!
//! Needs root and `ip` of iproute2. All names hold the number of this process; everything is removed when [`Network`] is
//! dropped. Whoever kills this process outright finds it in `ip netns list` and `ip link`.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use crate::child::find;
use crate::failure::Failure;
use crate::nodes::Place;
use crate::pin;

const CLIENT_PORT: u16 = 7379;
const PEER_PORT: u16 = 7380;

/// See the head of the file.
#[derive(Debug)]
pub(super) struct Network {
    pid: u32,
    nodes: usize,
}

impl Network {
    /// Makes a network for that many nodes.
    pub(super) fn new(nodes: usize) -> Result<Network, Failure> {
        if !rustix::process::geteuid().is_root() {
            return Err(Failure::Usage("network namespaces can be made by root only; run it with sudo".into()));
        }
        find("ip")?;
        // From here on whatever was made goes with it, even if the rest cannot be made.
        let network = Network { pid: std::process::id(), nodes };
        for bridge in ["c", "p", "i"] {
            let bridge = network.device(bridge);
            ip(&format!("link add {bridge} type bridge stp_state 0"))?;
            ip(&format!("link set {bridge} up"))?;
        }
        ip(&format!("addr add {}/24 dev {}", network.address(18, 1), network.device("c")))?;
        for node in 0..nodes {
            network.add(node)?;
        }
        Ok(network)
    }

    fn add(&self, node: usize) -> Result<(), Failure> {
        let space = self.space(node);
        ip(&format!("netns add {space}"))?;
        ip(&format!("-n {space} link set lo up"))?;
        for (kind, net) in [("c", 18), ("p", 19)] {
            let device = self.device(&format!("{kind}{node}"));
            ip(&format!("link add {device} type veth peer name {kind}0 netns {space}"))?;
            ip(&format!("link set {device} master {} up", self.device(kind)))?;
            ip(&format!("-n {space} link set {kind}0 address {}", hardware(net, node)))?;
            ip(&format!("-n {space} addr add {}/24 dev {kind}0", self.address(net, 10 + node)))?;
            ip(&format!("-n {space} link set {kind}0 up"))?;
        }
        for other in (0..self.nodes).filter(|&other| other != node) {
            let (address, hardware) = (self.address(19, 10 + other), hardware(19, other));
            ip(&format!("-n {space} neigh add {address} lladdr {hardware} nud permanent dev p0"))?;
        }
        Ok(())
    }

    /// Where the nodes run.
    pub(super) fn places(&self) -> Result<Vec<Place>, Failure> {
        let cpus = pin::allowed()?;
        let place = |node: usize| Place {
            before: ["ip", "netns", "exec", &self.space(node)].map(str::to_owned).to_vec(),
            client: SocketAddr::from((self.address(18, 10 + node), CLIENT_PORT)),
            peer: SocketAddr::from((self.address(19, 10 + node), PEER_PORT)),
            cores: pin::turn(&cpus, node, 1),
        };
        Ok((0..self.nodes).map(place).collect())
    }

    /// Cuts these nodes off from the others; among each other they are connected.
    pub(super) fn split(&self, side: &[usize]) -> Result<(), Failure> {
        self.move_to("i", side)
    }

    /// Undoes a split.
    pub(super) fn heal(&self, side: &[usize]) -> Result<(), Failure> {
        self.move_to("p", side)
    }

    fn move_to(&self, bridge: &str, side: &[usize]) -> Result<(), Failure> {
        let bridge = self.device(bridge);
        side.iter().try_for_each(|node| ip(&format!("link set {} master {bridge}", self.device(&format!("p{node}")))))
    }

    /// A device's name holds 15 characters.
    fn device(&self, what: &str) -> String {
        format!("gkv{}{what}", self.pid)
    }

    fn space(&self, node: usize) -> String {
        format!("gridkv-chaos-{}-{node}", self.pid)
    }

    /// In the networks that are set apart for measurements, 198.18 and 198.19.
    fn address(&self, net: u8, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(198, net, self.pid as u8, host as u8)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // What is not there any more, or never was, cannot be removed; the rest is.
        for node in 0..self.nodes {
            let _ = ip(&format!("netns del {}", self.space(node)));
            for kind in ["c", "p"] {
                let device = self.device(&format!("{kind}{node}"));
                // It goes with its namespace, but not at once.
                if fs::exists(format!("/sys/class/net/{device}")).unwrap_or(false) {
                    let _ = ip(&format!("link del {device}"));
                }
            }
        }
        for bridge in ["c", "p", "i"] {
            let _ = ip(&format!("link del {}", self.device(bridge)));
        }
    }
}

fn hardware(net: u8, node: usize) -> String {
    format!("02:00:00:{net:02x}:00:{:02x}", 10 + node)
}

fn ip(line: &str) -> Result<(), Failure> {
    let failed = |what: String| Failure::Program { program: format!("ip {line}"), what };
    let output = Command::new("ip").args(line.split_whitespace()).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}
