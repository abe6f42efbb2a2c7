//! The control plane of a simulated node, and the disk that outlives its process.
//!
//! The plane is the real one; the disk is a queue. What is written is durable in its order and after its time, and a process
//! that ends loses what was not durable yet. A voter's answer leaves when the disk has what was given to it before.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use gridkv_engine::Millis;

use super::options::Options;
use crate::control::{self, Control, Output, Remembered, Settings, Start};
use crate::ids::{NodeId, NodeNo};
use crate::map::{Candidate, Map, NORMAL_WEIGHT};
use crate::planted::{Bug, Planted};
use crate::quorum::Quorums;
use crate::register::{self, slots};
use crate::{membership, planner};

/// A running control plane with what its driver keeps.
#[derive(Debug)]
pub struct Plane {
    /// The machine.
    pub control: Control,
    /// What it wants done.
    pub out: Output,
    /// Messages to this very node.
    pub own: VecDeque<Vec<u8>>,
    /// The epoch that the cores are to adopt, and how many have not.
    pub adopting: Option<(u64, usize)>,
    /// The earliest timer that is set.
    pub armed: u64,
    /// The map that was looked at last.
    pub looked: u64,
    /// When what was posted last to each core arrives.
    pub posted: Vec<u64>,
}

/// A step of the disk.
#[derive(Debug)]
pub enum Job {
    /// A voter's state and the answer that waits for it.
    Voter(control::Disk),
    /// The map adopted last.
    Map(Arc<Map>),
}

/// What a node's directory holds.
#[derive(Debug)]
pub struct Disk {
    /// Who the node is.
    pub id: NodeId,
    /// The number of the last life, as its cluster knows it.
    pub boot: u64,
    /// The last map.
    pub map: Option<Arc<Map>>,
    /// The voter's state.
    pub voter: register::State,
    /// What is not durable yet.
    pub queue: VecDeque<Job>,
    /// When the last of it will be.
    pub done_at: u64,
}

impl Disk {
    /// The empty directory of a new node.
    pub fn new(id: NodeId) -> Disk {
        let voter = register::State::default();
        Disk { id, boot: 0, map: None, voter, queue: VecDeque::new(), done_at: 0 }
    }

    /// The process has ended.
    pub fn forget_unwritten(&mut self) {
        self.queue.clear();
        self.done_at = 0;
    }

    /// The oldest step is durable.
    pub fn write(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        match self.queue.pop_front()? {
            Job::Map(map) => {
                self.map = Some(map);
                None
            }
            Job::Voter(control::Disk { voter, then }) => {
                if let Some(bytes) = voter {
                    self.voter = slots::decode_state(&bytes).expect("a voter writes what it can read");
                }
                then
            }
        }
    }

    /// What the next life starts with.
    fn remembered(&self, planted: Planted) -> Remembered {
        let map = self.map.as_ref().map(|map| (**map).clone());
        let voter = if planted.has(Bug::VoterForgets) { register::State::default() } else { self.voter.clone() };
        Remembered { map, voter }
    }
}

/// The peer address of a node.
pub fn address(index: usize) -> SocketAddr {
    let host = (index as u16 + 1).to_be_bytes();
    ([10, 0, host[0], host[1]], 7380).into()
}

/// The node at a peer address.
pub fn index_of(address: SocketAddr) -> Option<usize> {
    match address {
        SocketAddr::V4(v4) => {
            let [_, _, high, low] = v4.ip().octets();
            usize::from(u16::from_be_bytes([high, low])).checked_sub(1)
        }
        SocketAddr::V6(_) => None,
    }
}

/// The map of a node that knows none.
pub fn no_map(options: &Options) -> Arc<Map> {
    let nobody = candidate(NodeId(0), 0, 0, 1);
    let mut map = Map::create(0, options.seed, options.shards, Quorums { n: 1, w: 1, r: 1 }, nobody);
    map.epoch = 0;
    map.placements.iter_mut().for_each(|placement| placement.epoch = 0);
    Arc::new(map)
}

fn candidate(id: NodeId, boot: u64, index: usize, cores: usize) -> Candidate {
    let peer = address(index);
    let client = SocketAddr::new(peer.ip(), 7379);
    Candidate { id, boot, peer, client, cores: cores as u16, zone: String::new(), weight: NORMAL_WEIGHT }
}

impl Plane {
    /// The control plane of a process that starts, on what its disk holds, and asks these nodes first.
    pub fn start(
        options: &Options,
        disk: &mut Disk,
        index: usize,
        seeds: &[usize],
        wall: Millis,
        planted: Planted,
        seed: u64,
    ) -> Plane {
        disk.boot = match planted.has(Bug::SameLife) && disk.boot > 0 {
            true => disk.boot,
            false => wall.max(disk.boot + 1),
        };
        let quorums = options.quorums;
        let start = match disk.id == NodeId(1) {
            true => Start::Found { cluster: options.seed.max(1), seed: options.seed, shards: options.shards, quorums },
            false => Start::Join(seeds.iter().copied().map(address).collect()),
        };
        let gossip = &options.gossip;
        let settings = Settings {
            start,
            shards: options.shards,
            about: candidate(disk.id, disk.boot, index, options.cores),
            membership: membership::Settings {
                probe_period: gossip.probe_ms,
                probe_rtt: gossip.probe_ms * 2 / 5,
                suspect: gossip.suspect_ms,
                announce_down: gossip.exchange_ms,
                exchange: gossip.exchange_ms,
                ..membership::Settings::default()
            },
            planner: planner::Settings {
                replace_after_ms: options.replace_after_ms,
                moves_at_once: options.moves_at_once,
            },
        };
        let mut control = Control::new(settings, disk.remembered(planted), seed);
        control.plant(planted);
        Plane {
            control,
            out: Output::default(),
            own: VecDeque::new(),
            adopting: None,
            armed: u64::MAX,
            looked: 0,
            posted: vec![0; options.cores],
        }
    }

    /// The number of its life, 0 when it has none.
    pub fn me(&self) -> NodeNo {
        self.control.me()
    }
}
