//! What can be told about the cluster: for `CLUSTER`, for the admin tool, for applications.

use std::collections::BTreeSet;
use std::sync::Arc;

use gridkv_cluster::ids::NodeNo;
use gridkv_cluster::map::Map;
use gridkv_cluster::shards::ShardStats;

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
    /// The node's directory could not be written: it does not vote any more.
    pub disk_failed: bool,
    /// Counters of each core's machines.
    pub cores: Vec<ShardStats>,
}
