//! `CLUSTER`, as clients of Redis Cluster expect it.
//!
//! Such a client asks which node has which of 16 384 slots and sends each request there. Here every node serves every key
//! and finds the replicas itself, by another hash; so slots only spread the clients:
//!
//! ```text
//!   slot   0 ........ 5460 | 5461 ..... 10922 | 10923 ..... 16383      alive and not draining, by number,
//!          node 1          | node 2           | node 4                 one range each
//! ```
//!
//! A client whose picture is old is served all the same: nothing is ever answered with `MOVED` or `ASK`. Two nodes may show
//! different pictures for as long as they disagree about who is alive.
//!
//! | Redis | here |
//! |---|---|
//! | node id | the 32 digits of the node's id and 8 of the cluster's |
//! | master | every node; there are no replicas to list, since copies are made by shard |
//! | epoch | of the map |
//! | cluster bus port | the port for peers |
//! | `cluster_state:fail` | the node is cut off, or no shard at all has its quorums |
//!
//! All but the counting of keys are functions of a [`ClusterView`]. Not here: `CLUSTER GRIDKV` (`admin`).

use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::Range;

use gridkv_cluster::ids::NodeId;
use gridkv_cluster::map::{Map, Member, Placement, Standing};
use gridkv_cluster::quorum::{self, Level, Quorums, Tally};
use gridkv_engine::hash::{KeyHash, hash_tag};
use gridkv_engine::reply::Reply;

use super::gather::on_core;
use super::{Outcome, Refused, admin, integer};
use crate::cluster::ClusterView;
use crate::cores::CoreRc;

/// Slots of Redis Cluster.
const SLOTS: u16 = 16384;

/// Keys that are looked at between two turns of a core while those of a slot are counted.
const STEP: usize = 500;

const DISABLED: &str = "ERR This instance has cluster support disabled";
const JOINING: &str = "CLUSTERDOWN this node has not been admitted to its cluster yet";

/// `CLUSTER subcommand …`; `sub` is its name.
pub(super) async fn answer(core: &CoreRc, sub: &str, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let view = of(core).await?;
    match sub {
        "info" => out.verbatim(&info(&view)),
        "nodes" => out.verbatim(&nodes(&view)),
        "slots" => slots(&view, out),
        "shards" => shards(&view, out),
        "myid" | "myshardid" => out.bulk(my_id(&view).ok_or(JOINING)?.as_bytes()),
        "links" => out.array(0),
        "keyslot" => out.integer(i64::from(slot_of(args[2]))),
        "countkeysinslot" => {
            let slot = parse_slot(args[2])?;
            out.integer(in_slot(core, slot, 0).await?.0);
        }
        "getkeysinslot" => {
            let slot = parse_slot(args[2])?;
            let wanted = usize::try_from(integer(args[3])?).map_err(|_| "ERR Invalid number of keys")?;
            let keys = if wanted == 0 { Vec::new() } else { in_slot(core, slot, wanted).await?.1 };
            out.array(keys.len());
            keys.iter().for_each(|key| out.bulk(key));
        }
        "gridkv" => admin::answer(core, &view, &args[2..], out).await?,
        name => return Err(format!("ERR CLUSTER {name} is not served by this node").into()),
    }
    Ok(())
}

/// What this node sees of its cluster.
async fn of(core: &CoreRc) -> Result<ClusterView, Refused> {
    if !core.state.borrow().settings.facts.in_cluster {
        return Err(DISABLED.into());
    }
    crate::cluster::view(core).await.ok_or(JOINING.into())
}

/// The slot of a key: that of its hash tag, where it has one.
fn slot_of(key: &[u8]) -> u16 {
    crc16(hash_tag(key).unwrap_or(key)) % SLOTS
}

/// CRC16 as Redis Cluster has it: polynomial 0x1021, from 0, nothing reflected (XMODEM).
fn crc16(bytes: &[u8]) -> u16 {
    const TABLE: [u16; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            let (mut crc, mut bit) = ((at as u16) << 8, 0);
            while bit < 8 {
                crc = if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 };
                bit += 1;
            }
            table[at] = crc;
            at += 1;
        }
        table
    };
    bytes.iter().fold(0, |crc, &byte| crc << 8 ^ TABLE[usize::from((crc >> 8) as u8 ^ byte)])
}

fn parse_slot(arg: &[u8]) -> Result<u16, Refused> {
    let slot = integer(arg).ok().and_then(|slot| u16::try_from(slot).ok());
    slot.filter(|&slot| slot < SLOTS).ok_or("ERR Invalid or out of range slot".into())
}

/// How many keys of a slot have a copy on this node, and up to `wanted` of them; all are counted only when none is wanted.
async fn in_slot(core: &CoreRc, slot: u16, wanted: usize) -> Result<(i64, Vec<Vec<u8>>), Refused> {
    let (mut count, mut keys) = (0, Vec::new());
    for to in 0..core.topology.cores() {
        let mut from = Some(KeyHash(0));
        while let Some(at) = from {
            let room = wanted - keys.len();
            let look = move |core: &CoreRc| {
                let state = &mut *core.state.borrow_mut();
                let (mut count, mut found) = (0, Vec::new());
                let next = state.store.scan(at, STEP, state.now, &mut |entry| {
                    if slot_of(entry.key) == slot {
                        count += 1;
                        if found.len() < room {
                            found.push(entry.key.to_vec());
                        }
                    }
                });
                (next, count, found)
            };
            let (next, more, found) = on_core(core, to, look).await.ok_or("ERR this node is stopping")?;
            count += more;
            keys.extend(found);
            if wanted > 0 && keys.len() == wanted {
                return Ok((count, keys));
            }
            from = next;
            // The own core answers at once: let it serve others between two steps.
            futures_lite::future::yield_now().await;
        }
    }
    Ok((count, keys))
}

/// How Redis would call a node.
pub(super) fn node_id(map: &Map, id: NodeId) -> String {
    format!("{id}{:08x}", map.cluster as u32)
}

fn my_id(view: &ClusterView) -> Option<String> {
    view.map.member(view.me).map(|member| node_id(&view.map, member.about.id))
}

/// Where clients reach a node: the address that it serves them at, and where that is none in particular the one that its
/// peers reach it at.
fn client_ip(member: &Member) -> IpAddr {
    let ip = member.about.client.ip();
    if ip.is_unspecified() { member.about.peer.ip() } else { ip }
}

/// Each member that clients should use, with its slots. Nobody only where nobody serves clients.
fn owners(view: &ClusterView) -> Vec<(&Member, Range<u16>)> {
    let serves = |member: &&Member| view.alive.contains(&member.no) && member.about.client.port() != 0;
    let alive: Vec<&Member> = view.map.present().filter(serves).collect();
    let staying: Vec<&Member> = alive.iter().filter(|member| member.standing == Standing::Up).copied().collect();
    let chosen = if staying.is_empty() { alive } else { staying };
    let count = chosen.len();
    let bound = move |at: usize| (usize::from(SLOTS) * at / count) as u16;
    chosen.into_iter().enumerate().map(|(at, member)| (member, bound(at)..bound(at + 1))).collect()
}

/// Whether a quorum can answer, as far as this node sees: for reads, for writes.
pub(super) fn quorums_of(placement: &Placement, view: &ClusterView) -> (bool, bool) {
    let reached = |of: fn(&Placement, Quorums, Level) -> Tally| {
        let mut tally = of(placement, view.map.quorums, Level::Quorum);
        tally.counted().into_iter().filter(|node| !view.alive.contains(node)).for_each(|node| tally.fail(node));
        tally.standing() != quorum::Standing::Impossible
    };
    (reached(Tally::of_read), reached(Tally::of_write))
}

fn is_failing(view: &ClusterView) -> bool {
    let serves = |placement: &Placement| quorums_of(placement, view) == (true, true);
    view.isolated || view.me.0 == 0 || !view.map.placements.iter().any(serves)
}

/// `CLUSTER INFO`.
fn info(view: &ClusterView) -> String {
    let owners = owners(view);
    let assigned = if owners.is_empty() { 0 } else { SLOTS };
    let failing = is_failing(view);
    let mut text = String::new();
    let mut line = |name: &str, value: u64| write!(text, "{name}:{value}\r\n").expect("a String takes everything");
    line("cluster_slots_assigned", assigned.into());
    line("cluster_slots_ok", if failing { 0 } else { assigned.into() });
    line("cluster_slots_pfail", 0);
    line("cluster_slots_fail", if failing { assigned.into() } else { 0 });
    line("cluster_known_nodes", view.map.present().count() as u64);
    line("cluster_size", owners.len() as u64);
    line("cluster_current_epoch", view.map.epoch);
    line("cluster_my_epoch", view.map.epoch);
    format!("cluster_state:{}\r\n{text}", if failing { "fail" } else { "ok" })
}

/// `CLUSTER NODES`.
fn nodes(view: &ClusterView) -> String {
    let owners = owners(view);
    let mut text = String::new();
    for member in view.map.present() {
        let (alive, me) = (view.alive.contains(&member.no), member.no == view.me);
        let (client, peer) = (member.about.client.port(), member.about.peer.port());
        let flags = match (me, alive) {
            (true, _) => "myself,master",
            (false, true) => "master",
            (false, false) => "master,fail",
        };
        let link = if me || alive { "connected" } else { "disconnected" };
        let id = node_id(&view.map, member.about.id);
        let ip = client_ip(member);
        let mut line = format!("{id} {ip}:{client}@{peer} {flags} - 0 0 {} {link}", view.map.epoch);
        if let Some((_, slots)) = owners.iter().find(|(owner, _)| owner.no == member.no) {
            line += &format!(" {}-{}", slots.start, slots.end - 1);
        }
        text += &line;
        text.push('\n');
    }
    text
}

/// `CLUSTER SLOTS`.
fn slots(view: &ClusterView, out: &mut dyn Reply) {
    let owners = owners(view);
    out.array(owners.len());
    for (member, slots) in owners {
        out.array(3);
        out.integer(slots.start.into());
        out.integer(i64::from(slots.end) - 1);
        out.array(4);
        out.bulk(client_ip(member).to_string().as_bytes());
        out.integer(member.about.client.port().into());
        out.bulk(node_id(&view.map, member.about.id).as_bytes());
        out.array(0);
    }
}

/// `CLUSTER SHARDS`: every node is one of Redis's shards, those that have no slots too.
fn shards(view: &ClusterView, out: &mut dyn Reply) {
    let owners = owners(view);
    out.array(view.map.present().count());
    for member in view.map.present() {
        out.map(2);
        out.bulk(b"slots");
        match owners.iter().find(|(owner, _)| owner.no == member.no) {
            Some((_, slots)) => {
                out.array(2);
                out.integer(slots.start.into());
                out.integer(i64::from(slots.end) - 1);
            }
            None => out.array(0),
        }
        out.bulk(b"nodes");
        out.array(1);
        out.map(7);
        let ip = client_ip(member).to_string();
        let health = if view.alive.contains(&member.no) { "online" } else { "fail" };
        for (name, value) in [
            ("id", node_id(&view.map, member.about.id).as_str()),
            ("ip", &ip),
            ("endpoint", &ip),
            ("role", "master"),
            ("health", health),
        ] {
            out.bulk(name.as_bytes());
            out.bulk(value.as_bytes());
        }
        for (name, value) in [("port", member.about.client.port().into()), ("replication-offset", 0)] {
            out.bulk(name.as_bytes());
            out.integer(value);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use gridkv_cluster::ids::NodeNo;
    use gridkv_cluster::map::{Candidate, Change, Step, Transition};
    use gridkv_net::resp::{Protocol, Writer};

    use super::*;

    pub(crate) fn candidate(n: u16) -> Candidate {
        Candidate {
            id: NodeId(u128::from(n)),
            boot: 1,
            peer: SocketAddr::from(([10, 0, 0, n as u8], 7380)),
            client: SocketAddr::from(([10, 0, 0, n as u8], 7379)),
            cores: 2,
            zone: format!("zone \"{n}\""),
            weight: 100,
        }
    }

    /// The same step of every shard.
    pub(crate) fn step_all(map: &Map, transition: Transition) -> Map {
        let step =
            |(shard, placement): (usize, &Placement)| Step { shard: shard as u16, epoch: placement.epoch, transition };
        map.apply(&Change::Steps(map.placements.iter().enumerate().map(step).collect())).unwrap()
    }

    /// A cluster of three, every shard on all of them, seen by the second.
    pub(crate) fn three() -> ClusterView {
        let quorums = Quorums { n: 3, w: 2, r: 2 };
        let mut map = Map::create(0xabcd_0000_0001, 5, 32, quorums, candidate(1));
        for n in 2..=3 {
            map = map.apply(&Change::Admit(candidate(n))).unwrap();
            let begin = Transition::Begin { joining: Some(NodeNo(n)), leaving: None };
            map = [begin, Transition::ReadNew, Transition::Finish].into_iter().fold(map, |map, t| step_all(&map, t));
        }
        ClusterView {
            me: NodeNo(2),
            map: Arc::new(map),
            alive: (1..=3).map(NodeNo).collect(),
            leader: Some(NodeNo(1)),
            isolated: false,
            quarantined: false,
            clock_offset_ms: 0,
            disk_failed: false,
            cores: Vec::new(),
        }
    }

    fn after(view: &ClusterView, change: Change) -> ClusterView {
        ClusterView { map: Arc::new(view.map.apply(&change).unwrap()), ..view.clone() }
    }

    fn ranges(view: &ClusterView) -> Vec<(u16, u16, u16)> {
        owners(view).into_iter().map(|(member, slots)| (member.no.0, slots.start, slots.end - 1)).collect()
    }

    #[test]
    fn slots_of_keys_are_those_of_redis() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(slot_of(b"foo"), 12182);
        assert_eq!(slot_of(b""), 0);
        assert_eq!(slot_of(b"{foo}bar"), 12182);
        assert_eq!(slot_of(b"a{foo}{bar}"), 12182);
        assert_eq!(slot_of(b"{}foo"), crc16(b"{}foo") % SLOTS, "an empty tag is no tag");
        assert!(parse_slot(b"16384").is_err() && parse_slot(b"-1").is_err() && parse_slot(b"x").is_err());
        assert_eq!(parse_slot(b"16383"), Ok(16383));
    }

    #[test]
    fn slots_are_spread_over_those_who_live_and_stay() {
        let view = three();
        assert_eq!(ranges(&view), [(1, 0, 5460), (2, 5461, 10921), (3, 10922, 16383)]);
        let one_away = ClusterView { alive: [NodeNo(2), NodeNo(3)].into(), ..view.clone() };
        assert_eq!(ranges(&one_away), [(2, 0, 8191), (3, 8192, 16383)]);
        let draining = after(&view, Change::Drain(NodeNo(3), true));
        assert_eq!(ranges(&draining), [(1, 0, 8191), (2, 8192, 16383)]);
        let lost = after(&view, Change::Lose(NodeNo(1)));
        assert_eq!(ranges(&lost), [(2, 0, 8191), (3, 8192, 16383)], "lost, whoever still hears of it");
        // All of them draining is an odd wish; clients must go somewhere.
        let all = (1..=3).fold(view.clone(), |view, n| after(&view, Change::Drain(NodeNo(n), true)));
        assert_eq!(ranges(&all), ranges(&view));
        let deaf = Candidate { client: "0.0.0.0:0".parse().unwrap(), ..candidate(4) };
        assert_eq!(ranges(&after(&view, Change::Admit(deaf))), ranges(&view), "it serves no clients");
    }

    #[test]
    fn nodes_and_their_slots_are_told_in_the_words_of_redis() {
        let view = ClusterView { alive: [NodeNo(1), NodeNo(2)].into(), ..three() };
        let epoch = view.map.epoch;
        let id = |n: u16| format!("{n:032x}00000001");
        let expected = format!(
            "{} 10.0.0.1:7379@7380 master - 0 0 {epoch} connected 0-8191\n\
             {} 10.0.0.2:7379@7380 myself,master - 0 0 {epoch} connected 8192-16383\n\
             {} 10.0.0.3:7379@7380 master,fail - 0 0 {epoch} disconnected\n",
            id(1),
            id(2),
            id(3)
        );
        assert_eq!(nodes(&view), expected);
        assert_eq!(my_id(&view), Some(id(2)));
        let mut bytes = Vec::new();
        slots(&view, &mut Writer::new(Protocol::Resp2, &mut bytes));
        let text = String::from_utf8(bytes).unwrap();
        let first = format!("*2\r\n*3\r\n:0\r\n:8191\r\n*4\r\n$8\r\n10.0.0.1\r\n:7379\r\n$40\r\n{}\r\n*0\r\n", id(1));
        assert!(text.starts_with(&first), "{text}");
        let mut bytes = Vec::new();
        shards(&view, &mut Writer::new(Protocol::Resp2, &mut bytes));
        let text = String::from_utf8(bytes).unwrap();
        assert!(
            text.starts_with("*3\r\n*4\r\n$5\r\nslots\r\n*2\r\n:0\r\n:8191\r\n$5\r\nnodes\r\n*1\r\n*14\r\n"),
            "{text}"
        );
        assert!(text.contains("$5\r\nslots\r\n*0\r\n") && text.contains("$6\r\nhealth\r\n$4\r\nfail\r\n"), "{text}");
    }

    #[test]
    fn a_node_that_listens_everywhere_is_reached_where_its_peers_reach_it() {
        let everywhere = Candidate { client: "0.0.0.0:7379".parse().unwrap(), ..candidate(4) };
        let view = after(&three(), Change::Admit(everywhere));
        let member = view.map.member(NodeNo(4)).unwrap();
        assert_eq!(client_ip(member), member.about.peer.ip());
    }

    #[test]
    fn the_cluster_has_failed_when_nothing_can_be_done() {
        let field = |view: &ClusterView, line: &str| info(view).split("\r\n").any(|found| found == line);
        let view = three();
        for line in ["cluster_state:ok", "cluster_slots_assigned:16384", "cluster_slots_ok:16384", "cluster_size:3"] {
            assert!(field(&view, line), "{line}");
        }
        let one_away = ClusterView { alive: [NodeNo(2), NodeNo(3)].into(), ..view.clone() };
        assert!(field(&one_away, "cluster_state:ok") && field(&one_away, "cluster_known_nodes:3"));
        let two_away = ClusterView { alive: [NodeNo(2)].into(), ..view.clone() };
        assert!(field(&two_away, "cluster_state:fail") && field(&two_away, "cluster_slots_fail:16384"));
        assert_eq!(quorums_of(&view.map.placements[0], &two_away), (false, false));
        assert!(field(&ClusterView { isolated: true, ..view }, "cluster_state:fail"));
    }
}
