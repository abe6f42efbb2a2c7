//! Before the cores of a clustered node start: who it is, what it remembers, whom it asks.

use std::net::SocketAddr;
use std::time::Duration;

use gridkv_cluster::control::{Event, Start};
use gridkv_cluster::map::Candidate;
use gridkv_cluster::quorum::Quorums;
use gridkv_cluster::register::Ballot;
use gridkv_net::peer::Identity;

use super::directory::Directory;
use super::plane::{self, EVENTS, Opening};
use super::seeds::Seeds;
use crate::config::Config;
use crate::handle::unix_ms;
use crate::{ConfigError, Error, StartError, platform};

/// How long a node waits to be admitted before it gives up.
const ADMISSION: Duration = Duration::from_secs(60);

/// What the node starts its cores with, and what it waits for then.
pub(crate) struct Prepared {
    pub(crate) identity: Identity,
    pub(crate) peer: SocketAddr,
    pub(crate) opening: Opening,
    /// The seed of the key hash that the node remembers.
    pub(crate) seed: Option<u64>,
    pub(crate) verdict: flume::Receiver<Result<(), Error>>,
    pub(crate) events: flume::Receiver<Event>,
}

/// Reads the directory and puts together what the control plane needs.
///
/// # Errors
/// [`Error::Start`] and [`Error::Config`], each with what to do.
pub(crate) fn prepare(
    config: &Config,
    client: Option<SocketAddr>,
    cores: usize,
    seed: u64,
) -> Result<Option<Prepared>, Error> {
    let Some(cluster) = &config.cluster else { return Ok(None) };
    let random = u128::from(platform::random_seed()) << 64 | u128::from(platform::random_seed());
    let opened = Directory::open(cluster.dir.as_deref(), unix_ms(), random)?;
    let peer = platform::probe(cluster.peer_listen)?;
    let advertised = cluster.advertise.unwrap_or(peer);
    if advertised.ip().is_unspecified() {
        return Err(ConfigError::new("advertise", format!("other nodes cannot connect to {advertised}"))
            .with_hint("listen on an address of this machine, or name one with `advertise`")
            .into());
    }
    let shards = config.shards.get();
    let remembered = opened.remembered;
    let known = remembered.known();
    if known.is_none() && remembered.voter.promised != Ballot::default() && cluster.seeds.is_empty() {
        let text = "its directory holds a vote in a cluster that it does not remember, and it has no seeds".to_owned();
        let hint = "name nodes of that cluster with --seed, or give it another --dir".to_owned();
        return Err(StartError::Cluster { why: text, hint: Some(hint) }.into());
    }
    if let Some(map) = known.as_ref().filter(|map| map.placements.len() != usize::from(shards)) {
        let of_cluster = map.placements.len();
        let text = format!("its directory belongs to a cluster with {of_cluster} shards, not {shards}");
        let hint = format!("start it with --shards {of_cluster}, or give it another --dir");
        return Err(StartError::Cluster { why: text, hint: Some(hint) }.into());
    }
    let seeds = Seeds::look_up(&cluster.seeds);
    let start = if cluster.seeds.is_empty() {
        let quorums = Quorums { n: cluster.replicas, w: cluster.write_quorum, r: cluster.read_quorum };
        Start::Found { cluster: platform::random_seed().max(1), seed, shards, quorums }
    } else {
        Start::Join(seeds.addresses())
    };
    // Clients of other nodes are told this address; behind an advertised address it is on that host.
    let client = cluster.advertise_client.or(client).unwrap_or_else(|| SocketAddr::new(advertised.ip(), 0));
    let client = if client.ip().is_unspecified() { SocketAddr::new(advertised.ip(), client.port()) } else { client };
    let about = Candidate {
        id: opened.id,
        boot: opened.boot,
        peer: advertised,
        client,
        cores: cores as u16,
        zone: cluster.zone.clone(),
        weight: cluster.weight,
    };
    let identity = Identity {
        cluster: known.as_ref().map_or(0, |map| map.cluster),
        number: 0,
        node: opened.id.0,
        boot: opened.boot,
        shards,
        cores: cores as u16,
        peer: advertised,
    };
    let remembered_seed = known.map(|map| map.seed);
    let (verdict_to, verdict) = flume::bounded(4);
    let (events_to, events) = flume::bounded(EVENTS);
    let opening = Opening {
        settings: plane::settings(cluster, start, shards, about),
        seeds,
        remembered,
        disk: opened.disk,
        seed: platform::random_seed(),
        verdict: verdict_to,
        events: events_to,
    };
    Ok(Some(Prepared { identity, peer, opening, seed: remembered_seed, verdict, events }))
}

/// Waits until the node is a member of its cluster.
///
/// # Errors
/// [`StartError::Cluster`]: it is refused, or nobody answers.
pub(crate) fn admission(verdict: &flume::Receiver<Result<(), Error>>) -> Result<(), Error> {
    match verdict.recv_timeout(ADMISSION) {
        Ok(verdict) => verdict,
        Err(flume::RecvTimeoutError::Timeout) => {
            let why = format!(
                "nobody admitted it within {} s: no seed answers or has an address (see the log), or too few voters answer",
                ADMISSION.as_secs()
            );
            let hint = "the seeds must be peer addresses (--peer-listen) of running nodes of one cluster".to_owned();
            Err(StartError::Cluster { why, hint: Some(hint) }.into())
        }
        Err(flume::RecvTimeoutError::Disconnected) => {
            Err(StartError::Cluster { why: "the node stopped before it was admitted".into(), hint: None }.into())
        }
    }
}
