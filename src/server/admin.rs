//! `CLUSTER GRIDKV`: the cluster for whoever runs it. `gridkv-node admin` is its face.
//!
//! | | answers |
//! |---|---|
//! | `STATUS`, `MEMBERS`, `SHARDS` | one bulk string of JSON: what this node sees |
//! | `DRAIN id`, `UNDRAIN id` | `OK` when the map says so; the moves follow |
//! | `REMOVE id` | `OK`: the cluster goes on without that life of the node |
//! | `REPAIR`, `REPAIR shard` | JSON: this node compares its copies of the shards with all others, from now on |
//! | `REPAIR-STATUS` | JSON: how far that is, or how it ended |
//! | `ACCEPT-LOSS shard`, `ACCEPT-LOSS all` | how many shards serve again with what is left of them |
//!
//! An `id` is the number of a member, or the id of a node in 32 or 40 digits.
//!
//! **Orders that lose data are refused where they need not be given**: a member that holds copies and can be reached is
//! drained first; losses are accepted only of shards without a quorum, and only when their missing members were removed,
//! since until then they may come back with what is missed.
//!
//! Orders are thought out on this node's view and proposed to the register of the map, which takes them or not; a step of a
//! shard names the epoch it was thought out for.

use gridkv_cluster::control::watch::at_risk;
use gridkv_cluster::ids::{NodeId, NodeNo};
use gridkv_cluster::map::{Change, Map, Member, Placement, Stage, Standing, Step, Transition};
use gridkv_cluster::repair::SweepStats;
use gridkv_cluster::shards::ShardStats;
use gridkv_engine::reply::Reply;
use serde_json::{Value, json};

use super::cluster::{node_id, quorums_of};
use super::gather::each_core;
use super::{Outcome, Refused, word};
use crate::cluster::{self, ClusterView, view};
use crate::cores::CoreRc;

/// Steps in one proposal.
const STEPS: usize = 1024;

const USAGE: &str = "ERR wrong number of arguments or unknown word: CLUSTER GRIDKV STATUS | MEMBERS | SHARDS | DRAIN id | \
                     UNDRAIN id | REMOVE id | REPAIR [shard] | REPAIR-STATUS | ACCEPT-LOSS shard|all";

/// `CLUSTER GRIDKV word …`; `args` from that word on.
pub(super) async fn answer(core: &CoreRc, view: &ClusterView, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    match args {
        [what] if word(what, "status") => out.bulk(status(view).to_string().as_bytes()),
        [what] if word(what, "members") => out.bulk(members(view).to_string().as_bytes()),
        [what] if word(what, "shards") => out.bulk(shards(view).to_string().as_bytes()),
        [what, rest @ ..] if word(what, "repair") && rest.len() <= 1 => {
            let sweep = repair(core, view, rest.first().copied()).await?;
            out.bulk(swept(&sweep).to_string().as_bytes());
        }
        [what] if word(what, "repair-status") => {
            out.bulk(swept(&view::sweep(core).await).to_string().as_bytes());
        }
        [what, shards] if word(what, "accept-loss") => {
            let steps = accept_loss(view, shards)?;
            let count = steps.len();
            for (at, part) in steps.chunks(STEPS).enumerate() {
                let change = Change::Steps(part.to_vec());
                propose(core, change).await.map_err(|why| in_part(at * STEPS, count, why))?;
            }
            out.integer(count as i64);
        }
        [what, id] => {
            propose(core, order(view, what, id)?).await?;
            out.ok();
        }
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

/// Has this node compare its copies, of one shard or of all. Who asks for the same again is told how far it is.
async fn repair(core: &CoreRc, view: &ClusterView, shard: Option<&[u8]>) -> Result<SweepStats, Refused> {
    let only = shard.map(|shard| shard_here(view, shard)).transpose()?;
    let now = view::sweep(core).await;
    if now.running && now.only != only {
        let what = now.only.map_or("all shards".to_owned(), |shard| format!("shard {shard}"));
        return Err(format!("ERR this node is comparing {what} already: REPAIR-STATUS tells how far it is").into());
    }
    if !now.running {
        each_core(core, move |core| view::repair_now(core, only)).await;
    }
    Ok(view::sweep(core).await)
}

fn swept(sweep: &SweepStats) -> Value {
    json!({
        "running": sweep.running,
        "shard": sweep.only,
        "shards": sweep.shards,
        "done": sweep.done,
        "differed": sweep.differed,
        "incomplete": sweep.incomplete,
        "sent": sweep.sent,
        "received": sweep.received,
        "bytes": sweep.bytes,
    })
}

fn parse_shard(map: &Map, text: &[u8]) -> Option<u16> {
    let shard: u16 = std::str::from_utf8(text).ok()?.parse().ok()?;
    (usize::from(shard) < map.placements.len()).then_some(shard)
}

/// A shard of which this node has a copy.
fn shard_here(view: &ClusterView, text: &[u8]) -> Result<u16, Refused> {
    let map = &view.map;
    let shard = parse_shard(map, text).ok_or_else(|| format!("ERR a shard from 0 to {}", map.placements.len() - 1))?;
    let placement = &map.placements[usize::from(shard)];
    if placement.names(view.me) {
        return Ok(shard);
    }
    let holders: Vec<String> = placement.written().map(|no| no.to_string()).collect();
    Err(format!("ERR this node has no copy of shard {shard}: ask a member that has one, {}", holders.join(" or "))
        .into())
}

async fn propose(core: &CoreRc, change: Change) -> Result<(), Refused> {
    cluster::propose(core, change).await.map_err(|why| format!("ERR {why}").into())
}

/// What is told of an order of `all` changes when `done` of them were made before one was refused.
fn in_part(done: usize, all: usize, why: Refused) -> Refused {
    if done == 0 {
        return why;
    }
    let why = why.to_string();
    let why = why.trim_start_matches("ERR ").trim_end_matches("; nothing was changed");
    format!("ERR {done} of {all} shards were changed, the others not: {why}").into()
}

/// The member that `id` names, by the number of a life or the id of a node.
fn find<'a>(map: &'a Map, id: &[u8]) -> Result<&'a Member, Refused> {
    let text = String::from_utf8_lossy(id);
    let by_number = || map.members.iter().find(|member| member.no.to_string() == text);
    let by_node = || {
        let id: NodeId = text.get(..32)?.parse().ok()?;
        let named = text.len() == 32 || text.eq_ignore_ascii_case(&node_id(map, id));
        if named { map.life_of(id) } else { None }
    };
    let member = by_number().or_else(by_node).filter(|member| member.standing != Standing::Lost);
    member.ok_or_else(|| format!("ERR there is no member {text:?}; CLUSTER GRIDKV MEMBERS lists them").into())
}

/// The change that an order about a member asks for.
fn order(view: &ClusterView, what: &[u8], id: &[u8]) -> Result<Change, Refused> {
    let refuse = |why: String| Err(Refused::from(format!("ERR {why}")));
    if ![&b"drain"[..], b"undrain", b"remove"].iter().any(|known| known.eq_ignore_ascii_case(what)) {
        return Err(USAGE.into());
    }
    let member = find(&view.map, id)?;
    let no = member.no;
    let draining = member.standing == Standing::Draining;
    if word(what, "undrain") {
        return if draining { Ok(Change::Drain(no, false)) } else { refuse(format!("member {no} is not draining")) };
    }
    if word(what, "drain") {
        if draining {
            return refuse(format!("member {no} is draining already"));
        }
        let others = view.map.present().filter(|other| other.no != no && other.standing == Standing::Up).count();
        if others == 0 {
            return refuse(format!("member {no} is the last that is not draining: there is nobody to take its shards"));
        }
        return Ok(Change::Drain(no, true));
    }
    let held = view.map.placements.iter().filter(|placement| placement.names(no)).count();
    if view.alive.contains(&no) && held > 0 {
        return refuse(format!("member {no} is alive and holds copies of {held} shards: DRAIN it first, or stop it"));
    }
    if view.map.present().count() == 1 {
        return refuse(format!("member {no} is the only one"));
    }
    Ok(Change::Lose(no))
}

fn is_blocked(placement: &Placement, view: &ClusterView) -> bool {
    quorums_of(placement, view) != (true, true)
}

/// The steps that let shards without a quorum go on with what is left of them.
fn accept_loss(view: &ClusterView, which: &[u8]) -> Result<Vec<Step>, Refused> {
    let map = &view.map;
    let wanted = if word(which, "all") {
        0..map.placements.len()
    } else {
        let shard = parse_shard(map, which).map(usize::from);
        let shard = shard.ok_or_else(|| format!("ERR a shard from 0 to {}, or `all`", map.placements.len() - 1))?;
        shard..shard + 1
    };
    let blocked: Vec<usize> = wanted.filter(|&shard| is_blocked(&map.placements[shard], view)).collect();
    if blocked.is_empty() {
        return Err("ERR nothing is lost: these shards have their quorums".into());
    }
    let away = map.present().find(|member| {
        !view.alive.contains(&member.no) && blocked.iter().any(|&shard| map.placements[shard].names(member.no))
    });
    if let Some(member) = away {
        let no = member.no;
        return Err(format!("ERR member {no} may come back with what is missed: start it, or REMOVE {no} first").into());
    }
    let step = |shard: usize| Step {
        shard: shard as u16,
        epoch: map.placements[shard].epoch,
        transition: Transition::AcceptLoss,
    };
    Ok(blocked.into_iter().map(step).collect())
}

/// Copies of a shard that have everything and can be reached.
fn serving(placement: &Placement, view: &ClusterView) -> usize {
    placement.replicas.iter().filter(|replica| !replica.filling && view.alive.contains(&replica.node)).count()
}

/// How many shards are how, as a node sees them. All but `normal` may overlap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardCounts {
    pub(crate) total: usize,
    /// Not moving, and all copies complete and in reach.
    pub(crate) normal: usize,
    pub(crate) moving: usize,
    pub(crate) filling: usize,
    /// Fewer complete copies in reach than the cluster has room for.
    pub(crate) degraded: usize,
    /// No quorum for reads, or none for writes.
    pub(crate) blocked: usize,
    /// Times that data was given up for lost.
    pub(crate) losses: u64,
}

/// Counts the shards.
pub(crate) fn shard_counts(view: &ClusterView) -> ShardCounts {
    let map = &view.map;
    let copies = usize::from(map.quorums.n).min(map.present().count());
    let count = |of: &dyn Fn(&Placement) -> bool| map.placements.iter().filter(|placement| of(placement)).count();
    let is_filling = |placement: &Placement| placement.written().any(|node| placement.is_filling(node));
    let is_degraded = |placement: &Placement| serving(placement, view) < copies;
    let is_normal =
        |p: &Placement| p.stage == Stage::Normal && !is_filling(p) && !is_degraded(p) && !is_blocked(p, view);
    ShardCounts {
        total: map.placements.len(),
        normal: count(&is_normal),
        moving: count(&|placement| placement.stage != Stage::Normal),
        filling: count(&is_filling),
        degraded: count(&is_degraded),
        blocked: count(&|placement| is_blocked(placement, view)),
        losses: map.placements.iter().map(|placement| u64::from(placement.losses)).sum(),
    }
}

fn status(view: &ClusterView) -> Value {
    let map = &view.map;
    let shards = shard_counts(view);
    let present = map.present().count();
    let few = present < usize::from(map.quorums.n);
    let state = match () {
        () if view.me.0 == 0 => "joining",
        () if view.isolated => "isolated",
        () if view.quarantined => "wrong clock",
        () if shards.blocked > 0 => "blocked",
        () if shards.degraded > 0 => "degraded",
        // All is as well as it can be, and yet there are fewer copies than were asked for.
        () if few => "too few nodes",
        () => "ok",
    };
    let sum = |of: fn(&ShardStats) -> u64| view.cores.iter().map(of).sum::<u64>();
    json!({
        "state": state,
        "cluster": format!("{:016x}", map.cluster),
        "epoch": map.epoch,
        "me": number(view.me),
        "leader": view.leader.map(|leader| leader.0),
        "isolated": view.isolated,
        "quarantined": view.quarantined,
        "clock_offset_ms": view.clock_offset_ms,
        "disk_failed": view.disk_failed,
        "replicas": map.quorums.n,
        "write_quorum": map.quorums.w,
        "read_quorum": map.quorums.r,
        "members": {
            "present": present,
            "alive": map.present().filter(|member| view.alive.contains(&member.no)).count(),
            "draining": map.present().filter(|member| member.standing == Standing::Draining).count(),
        },
        "voters": map.voters.iter().map(|seat| seat.0).collect::<Vec<_>>(),
        "next_voters": map.next_voters.iter().map(|seat| seat.0).collect::<Vec<_>>(),
        "shards": {
            "total": shards.total,
            "degraded": shards.degraded,
            "blocked": shards.blocked,
            "at_risk": at_risk(map, &view.alive),
            "filling": shards.filling,
            "moving": shards.moving,
            "losses": shards.losses,
        },
        "here": {
            "operations": sum(|core| core.coordinator.begun),
            "under_way": sum(|core| core.coordinator.under_way),
            "unknown": sum(|core| core.coordinator.unknown),
            "failed": sum(|core| core.coordinator.failed),
            "read_repairs": sum(|core| core.coordinator.read_repairs),
            "refused_epoch": sum(|core| core.replica.refused_epoch),
            "hints": sum(|core| core.hints.waiting),
            "filling": sum(|core| core.fill.filling),
            "differences_repaired": sum(|core| core.repair.differences),
            "sent_bytes": sum(|core| core.replica.sent_bytes),
        },
    })
}

/// The number of a life; none before admission.
fn number(no: NodeNo) -> Option<u16> {
    (no.0 > 0).then_some(no.0)
}

fn members(view: &ClusterView) -> Value {
    let map = &view.map;
    let of = |member: &Member| {
        let (no, about) = (member.no, &member.about);
        let count = |of: &dyn Fn(&Placement) -> bool| map.placements.iter().filter(|placement| of(placement)).count();
        json!({
            "no": no.0,
            "id": about.id.to_string(),
            "redis_id": node_id(map, about.id),
            "boot": about.boot,
            "peer": about.peer.to_string(),
            "client": about.client.to_string(),
            "cores": about.cores,
            "zone": about.zone,
            "weight": about.weight,
            "standing": match member.standing {
                Standing::Up => "up",
                Standing::Draining => "draining",
                Standing::Lost => "lost",
            },
            "alive": view.alive.contains(&no),
            "me": no == view.me,
            "leader": view.leader == Some(no),
            "voter": map.voters.contains(&member.seat) || map.next_voters.contains(&member.seat),
            "shards": count(&|placement| placement.names(no)),
            "filling": count(&|placement| placement.is_filling(no)),
            "orders": count(&|placement| placement.orderer() == Some(no)),
        })
    };
    map.members.iter().map(of).collect()
}

fn shards(view: &ClusterView) -> Value {
    let of = |(shard, placement): (usize, &Placement)| {
        let (readable, writable) = quorums_of(placement, view);
        json!({
            "shard": shard,
            "epoch": placement.epoch,
            "stage": match placement.stage {
                Stage::Normal => "normal",
                Stage::WriteBoth => "write both",
                Stage::ReadNew => "read new",
            },
            "replicas": placement.replicas.iter().map(|replica| replica.node.0).collect::<Vec<_>>(),
            "filling": placement.written().filter(|&node| placement.is_filling(node)).map(|no| no.0).collect::<Vec<_>>(),
            "joining": placement.joining.map(|no| no.0),
            "leaving": placement.leaving.map(|no| no.0),
            "orderer": placement.orderer().map(|no| no.0),
            "serving": serving(placement, view),
            "readable": readable,
            "writable": writable,
            "losses": placement.losses,
        })
    };
    view.map.placements.iter().enumerate().map(of).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::server::cluster::tests::three;

    fn after(view: &ClusterView, change: Change) -> ClusterView {
        ClusterView { map: Arc::new(view.map.apply(&change).unwrap()), ..view.clone() }
    }

    fn alive(view: &ClusterView, alive: &[u16]) -> ClusterView {
        ClusterView { alive: alive.iter().copied().map(NodeNo).collect(), ..view.clone() }
    }

    fn refusal<T: std::fmt::Debug>(result: Result<T, Refused>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn members_are_named_by_number_or_by_id() {
        let view = three();
        let whole = format!("{}00000001", NodeId(3));
        for (id, no) in [("2", 2), (&whole[..32], 3), (&whole, 3)] {
            assert_eq!(find(&view.map, id.as_bytes()).unwrap().no, NodeNo(no), "{id}");
        }
        let other_cluster = format!("{}00000002", NodeId(3));
        for id in ["0", "4", "02", "+2", "", &whole[..31], &other_cluster, "ümläut-ümläut-ümläut-ümläut-ümläut"]
        {
            assert!(refusal(find(&view.map, id.as_bytes())).contains("no member"), "{id}");
        }
    }

    #[test]
    fn a_member_is_drained_before_it_goes_unless_it_is_gone() {
        let view = three();
        assert_eq!(order(&view, b"DRAIN", b"3"), Ok(Change::Drain(NodeNo(3), true)));
        assert!(refusal(order(&view, b"undrain", b"3")).contains("not draining"));
        assert!(refusal(order(&view, b"remove", b"3")).contains("holds copies of 32 shards"));
        assert!(refusal(order(&view, b"promote", b"3")).contains("ACCEPT-LOSS"));
        assert_eq!(order(&alive(&view, &[1, 2]), b"remove", b"3"), Ok(Change::Lose(NodeNo(3))));
        let draining = after(&view, Change::Drain(NodeNo(3), true));
        assert_eq!(order(&draining, b"undrain", b"3"), Ok(Change::Drain(NodeNo(3), false)));
        assert!(refusal(order(&draining, b"drain", b"3")).contains("already"));
        let last = after(&draining, Change::Drain(NodeNo(2), true));
        assert!(refusal(order(&last, b"drain", b"1")).contains("the last"));
    }

    #[test]
    fn losses_are_accepted_only_where_there_are_some() {
        let view = three();
        assert!(refusal(accept_loss(&view, b"all")).contains("nothing is lost"));
        let refused = |done| in_part(done, 3000, "ERR too few voters answer; nothing was changed".into()).to_string();
        assert_eq!(refused(0), "ERR too few voters answer; nothing was changed");
        assert_eq!(refused(2048), "ERR 2048 of 3000 shards were changed, the others not: too few voters answer");
        assert!(refusal(accept_loss(&alive(&view, &[1, 2]), b"5")).contains("nothing is lost"));
        for nonsense in ["32", "-1", "some"] {
            assert!(refusal(accept_loss(&view, nonsense.as_bytes())).contains("from 0 to 31"), "{nonsense}");
        }
        let two_away = alive(&view, &[2]);
        assert!(refusal(accept_loss(&two_away, b"all")).contains("member 1 may come back"));
        let removed = [1, 3].iter().fold(two_away, |view, &no| after(&view, Change::Lose(NodeNo(no))));
        assert_eq!(accept_loss(&removed, b"7").unwrap().len(), 1);
        let steps = accept_loss(&removed, b"ALL").unwrap();
        assert_eq!(steps.len(), 32);
        let accepted = after(&removed, Change::Steps(steps));
        assert!(!accepted.map.placements.iter().any(|placement| is_blocked(placement, &accepted)));
        assert_eq!(status(&accepted)["shards"]["losses"], 32);
    }

    #[test]
    fn copies_are_compared_where_there_is_one() {
        let view = three();
        assert_eq!(shard_here(&view, b"31"), Ok(31));
        assert!(refusal(shard_here(&view, b"32")).contains("from 0 to 31"));
        let mut elsewhere = (*view.map).clone();
        elsewhere.placements[4].replicas.retain(|replica| replica.node != view.me);
        let view = ClusterView { map: Arc::new(elsewhere), ..view };
        assert!(refusal(shard_here(&view, b"4")).ends_with("1 or 3"));
    }

    #[test]
    fn the_state_says_the_worst_of_it() {
        let view = three();
        let state = |view: &ClusterView| status(view)["state"].as_str().unwrap().to_owned();
        assert_eq!(state(&view), "ok");
        assert_eq!(state(&alive(&view, &[1, 2])), "degraded");
        assert_eq!(state(&alive(&view, &[2])), "blocked");
        assert_eq!(state(&ClusterView { isolated: true, ..view.clone() }), "isolated");
        assert_eq!(state(&ClusterView { quarantined: true, ..view.clone() }), "wrong clock");
        assert_eq!(state(&ClusterView { me: NodeNo(0), ..view.clone() }), "joining");
        assert_eq!(super::status(&alive(&view, &[2]))["shards"]["at_risk"], 32);
        let marked = super::status(&ClusterView { quarantined: true, disk_failed: true, ..view.clone() });
        assert_eq!((&marked["quarantined"], &marked["disk_failed"]), (&json!(true), &json!(true)));
        let status = status(&alive(&view, &[1, 2]));
        assert_eq!(status["members"], json!({"present": 3, "alive": 2, "draining": 0}));
        assert_eq!((&status["shards"]["degraded"], &status["shards"]["at_risk"]), (&json!(32), &json!(0)));
        assert_eq!(
            (&status["me"], &status["leader"], &status["cluster"]),
            (&json!(2), &json!(1), &json!("0000abcd00000001"))
        );
    }

    #[test]
    fn members_and_shards_are_told_one_by_one() {
        let view = alive(&three(), &[1, 2]);
        let members = members(&view);
        assert_eq!(members.as_array().unwrap().len(), 3);
        assert_eq!(
            (&members[2]["no"], &members[2]["alive"], &members[2]["shards"]),
            (&json!(3), &json!(false), &json!(32))
        );
        assert_eq!(members[1]["zone"], "zone \"2\"");
        assert_eq!((&members[0]["orders"], &members[0]["leader"]), (&json!(32), &json!(true)));
        let shards = shards(&view);
        assert_eq!(shards.as_array().unwrap().len(), 32);
        let shard = &shards[31];
        assert_eq!(
            (&shard["replicas"], &shard["filling"], &shard["stage"]),
            (&json!([1, 2, 3]), &json!([]), &json!("normal"))
        );
        assert_eq!(
            (&shard["serving"], &shard["readable"], &shard["writable"]),
            (&json!(2), &json!(true), &json!(true))
        );
    }
}
