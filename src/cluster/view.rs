//! What can be told about the cluster, and asked of this node's copies: for `CLUSTER`, for the admin tool, for applications.

use std::collections::BTreeSet;
use std::sync::Arc;

use gridkv_cluster::ids::NodeNo;
use gridkv_cluster::map::Map;
use gridkv_cluster::repair::SweepStats;
use gridkv_cluster::shards::ShardStats;
use gridkv_engine::hash::ShardId;

use crate::cores::CoreRc;

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
    let cores = crate::server::gather::each_core(core, of).await;
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
