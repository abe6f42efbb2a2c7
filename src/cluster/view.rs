//! What can be told about the cluster, and asked of this node's copies: for `CLUSTER`, for the admin tool, for applications; and
//! whether this node is ready.
//!
//! **Ready** is for who restarts nodes one after the other and looks at `/readyz` in between: the next one may stop when this one holds
//! what it should. Once said it stays said, whatever is filled later. It must not wait for what may never come, so after a
//! minute only a filling that goes on keeps a node from it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use gridkv_cluster::ids::NodeNo;
use gridkv_cluster::map::{Map, Placement};
use gridkv_cluster::repair::SweepStats;
use gridkv_cluster::shards::ShardStats;
use gridkv_engine::hash::ShardId;

use super::plane;
use crate::cores::CoreRc;
use crate::server::gather::{each_core, on_core};

/// The cluster as one node sees it.
#[derive(Clone, Debug)]
pub struct ClusterView {
    /// The number of this node's present life; 0 before it is admitted.
    pub me: NodeNo,
    /// The map that this node has adopted.
    pub map: Arc<Map>,
    /// Nodes that can be reached, this one included.
    pub alive: BTreeSet<NodeNo>,
    /// Who plans changes of the map, as far as this node sees.
    pub leader: Option<NodeNo>,
    /// This node has to think that it is cut off.
    pub isolated: bool,
    /// This node's clock differs from those of most others by more than is allowed: it coordinates no writes.
    pub quarantined: bool,
    /// By how many milliseconds this node's clock differs from the one of the others that differs most.
    pub clock_offset_ms: u64,
    /// The node's directory could not be written: it does not vote any more.
    pub disk_failed: bool,
    /// Counters of each core's machines.
    pub cores: Vec<ShardStats>,
}

/// How long a member waits for copies that nobody can give it, or that the others lack.
const READY_PATIENCE: Duration = Duration::from_secs(60);

/// What decides whether a node is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Readiness {
    /// Copies that the map gives to this node.
    held: usize,
    /// Of these, those that do not count yet.
    filling: usize,
    /// Shards of the cluster with fewer complete copies in reach than there should be.
    degraded: usize,
    /// The node ran before. Then the map gave it its copies back when it was admitted; a new one gets them bit by bit.
    returned: bool,
    /// Copies that its cores are filling, those left out whose sources cannot be reached.
    going_on: u64,
    member_for: Duration,
}

impl Readiness {
    fn is_ready(self) -> bool {
        let whole = self.filling == 0 && (self.returned && self.held > 0 || self.degraded == 0);
        whole || self.member_for >= READY_PATIENCE && self.going_on == 0
    }
}

fn readiness(view: &ClusterView, member_for: Duration, going_on: u64) -> Option<Readiness> {
    let member = view.map.member(view.me)?;
    let count = |of: &dyn Fn(&Placement) -> bool| view.map.placements.iter().filter(|placement| of(placement)).count();
    Some(Readiness {
        held: count(&|placement| placement.names(view.me)),
        filling: count(&|placement| placement.is_filling(view.me)),
        degraded: crate::server::shard_counts(view).degraded,
        returned: member.seat != member.no,
        going_on,
        member_for,
    })
}

/// Whether this node is ready; who finds that it is writes it down for the rest of the node's life.
pub(crate) async fn look_whether_ready(core: &CoreRc) -> bool {
    let filling = |core: &CoreRc| core.member.borrow().as_ref().map(|member| member.stats().fill);
    let going_on = each_core(core, filling).await.into_iter().flatten().map(|fill| fill.filling - fill.blocked).sum();
    let seen = on_core(core, 0, |core| Some((plane::facts(core)?, plane::member_for(core)?))).await.flatten();
    let ready = seen.and_then(|(view, member_for)| readiness(&view, member_for, going_on));
    let ready = ready.is_some_and(Readiness::is_ready);
    if ready {
        core.topology.set_ready();
    }
    ready
}

/// Has this core compare its copies of all shards, or of one, with all others of them. `false`: it does so already.
pub(crate) fn repair_now(core: &CoreRc, only: Option<u16>) -> bool {
    let began = match &mut *core.member.borrow_mut() {
        Some(member) => {
            let (now, state) = (member.now(), &mut *core.state.borrow_mut());
            member.shards.repair_now(now, &mut state.store, only.map(ShardId), &mut member.out)
        }
        None => false,
    };
    core.kick();
    began
}

/// How far this node is with [`repair_now`], or how it ended.
pub(crate) async fn sweep(core: &CoreRc) -> SweepStats {
    let of = |core: &CoreRc| core.member.borrow().as_ref().map(|member| member.shards.sweep());
    let cores = each_core(core, of).await;
    cores.into_iter().flatten().fold(SweepStats::default(), |sum, core| SweepStats {
        running: sum.running || core.running,
        only: sum.only.or(core.only),
        shards: sum.shards + core.shards,
        done: sum.done + core.done,
        differed: sum.differed + core.differed,
        incomplete: sum.incomplete + core.incomplete,
        sent: sum.sent + core.sent,
        received: sum.received + core.received,
        bytes: sum.bytes + core.bytes,
    })
}

#[cfg(test)]
mod tests {
    use gridkv_cluster::map::Replica;

    use super::*;
    use crate::server::cluster_view_of_three;

    fn soon(view: &ClusterView) -> bool {
        readiness(view, Duration::ZERO, 0).is_some_and(Readiness::is_ready)
    }

    #[test]
    fn a_node_is_ready_when_none_of_its_copies_is_being_filled() {
        let mut view = cluster_view_of_three();
        assert!(soon(&view), "all copies are there");
        let me = view.me;
        assert!(!soon(&ClusterView { me: NodeNo(0), ..view.clone() }), "not a member");
        // It returns under another number, and the map gives it its copies back.
        let map = Arc::make_mut(&mut view.map);
        map.members.iter_mut().filter(|member| member.no == me).for_each(|member| member.seat = NodeNo(77));
        let slot = |replica: &Replica| replica.node == me;
        for placement in &mut map.placements {
            placement.replicas.iter_mut().filter(|replica| slot(replica)).for_each(|replica| replica.filling = true);
        }
        assert!(!soon(&view));
        let map = Arc::make_mut(&mut view.map);
        for placement in &mut map.placements {
            placement.replicas.iter_mut().for_each(|replica| replica.filling = false);
        }
        // That a third node is away is none of its business.
        view.alive.retain(|no| no.0 <= 2 || *no == me);
        assert!(soon(&view));
    }

    #[test]
    fn a_new_node_waits_until_no_shard_lacks_a_copy() {
        let mut view = cluster_view_of_three();
        let me = view.me;
        let map = Arc::make_mut(&mut view.map);
        map.placements.iter_mut().for_each(|placement| placement.replicas.retain(|replica| replica.node != me));
        assert!(!soon(&view), "two copies where three could be");
        Arc::make_mut(&mut view.map).quorums.n = 2;
        assert!(soon(&view), "there is nothing for it to hold");
    }

    #[test]
    fn nothing_that_may_never_come_is_waited_for_longer_than_a_minute() {
        let stuck = Readiness {
            held: 32,
            filling: 32,
            degraded: 32,
            returned: true,
            going_on: 0,
            member_for: READY_PATIENCE - Duration::from_millis(1),
        };
        assert!(!stuck.is_ready(), "sources are not linked at once");
        assert!(Readiness { member_for: READY_PATIENCE, ..stuck }.is_ready(), "they cannot be reached");
        let slow = Readiness { going_on: 1, member_for: Duration::from_secs(3600), ..stuck };
        assert!(!slow.is_ready(), "a filling that goes on is waited for");
        let unwanted = Readiness { held: 0, filling: 0, returned: false, ..stuck };
        assert!(!unwanted.is_ready() && Readiness { member_for: READY_PATIENCE, ..unwanted }.is_ready());
    }
}
