//! The cluster on the metrics page: what this node sees of it, and what its cores' machines and links have done.
//!
//! As everywhere on that page, a number of the cores is there twice, as `gridkv_core_cluster_…` with a `core` label and
//! in sum as `gridkv_cluster_…`; what a node knows only once has the second name alone. Shards are counted as
//! `CLUSTER GRIDKV STATUS` counts them, by the same function; one that is moving may be degraded too.
//!
//! A node that stands alone, or that no cluster has admitted yet, shows none of this: a zero would say that all is well.

use gridkv_cluster::control::watch::at_risk;
use gridkv_cluster::membership;
use gridkv_cluster::shards::ShardStats;
use gridkv_net::gossip::GossipCounters;
use gridkv_net::peer::{LinkCounters, Priority};

use super::{ClusterView, plane};
use crate::cores::CoreRc;
use crate::metrics::{Kind, NodeMetrics, Number, Page, number, page};
use crate::server::gather::{each_core, on_core};
use crate::server::shard_counts;

/// What the machines and links of one core have counted.
#[derive(Clone, Copy, Debug, Default)]
struct CoreNumbers {
    machines: ShardStats,
    links: LinkCounters,
    unsent: u64,
}

/// What the membership of this node has counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gossiped {
    pub(crate) doubt: u64,
    pub(crate) suspects: u64,
    pub(crate) refused: membership::Refused,
    pub(crate) datagrams: GossipCounters,
}

/// The page of a node, with what is to be said of its cluster.
pub(crate) async fn render(core: &CoreRc, node: &NodeMetrics) -> String {
    let mut page = page(node);
    if core.member.borrow().is_some() {
        let cores = each_core(core, numbers).await;
        let seen = on_core(core, 0, |core| Some((plane::facts(core)?, plane::gossiped(core)?))).await.flatten();
        if let Some((view, gossiped)) = seen {
            write(&mut page, &view, &gossiped, &cores.into_iter().flatten().collect::<Vec<_>>());
        }
    }
    page.text()
}

fn numbers(core: &CoreRc) -> Option<CoreNumbers> {
    let (machines, unsent) = core.member.borrow().as_ref().map(|member| (member.stats(), member.unsent))?;
    let links = core.connections.borrow_mut().as_mut().and_then(|connections| Some(connections.links()?.counters()));
    Some(CoreNumbers { machines, links: links.unwrap_or_default(), unsent })
}

/// Every number of a core.
static NUMBERS: [Number<CoreNumbers>; 53] = [
    number!(Counter "cluster_operations_total" "Operations on replicated keys begun.", machines.coordinator.begun),
    number!(Gauge "cluster_operations_under_way" "Operations that wait for replicas.", machines.coordinator.under_way),
    number!(Counter "cluster_operations_unknown_total" "Writes that ended without knowing whether they were done.",
        machines.coordinator.unknown),
    number!(Counter "cluster_operations_failed_total" "Operations that failed, and certainly changed nothing.",
        machines.coordinator.failed),
    number!(Counter "cluster_operations_restarted_total" "Operations begun again because their shard had moved.",
        machines.coordinator.restarted),
    number!(Counter "cluster_operations_asked_again_total" "Operations that asked again because a replica was silent.",
        machines.coordinator.asked_again),
    number!(Counter "cluster_read_repairs_total" "Reads that met replicas of different versions.",
        machines.coordinator.read_repairs),
    number!(Counter "cluster_replica_writes_total" "Writes stored as a replica, or known already.",
        machines.replica.writes),
    number!(Counter "cluster_replica_reads_total" "Reads answered as a replica.", machines.replica.reads),
    number!(Counter "cluster_replica_refused_epoch_total" "Questions refused because the two nodes' maps differed.",
        machines.replica.refused_epoch),
    number!(Counter "cluster_replica_refused_total" "Questions refused for other reasons.", machines.replica.refused),
    number!(Counter "cluster_replica_sent_bytes_total" "Bytes of entries sent to replicas being filled or repaired.",
        machines.replica.sent_bytes),
    number!(Gauge "cluster_hints" "Writes kept for replicas that are away.", machines.hints.waiting),
    number!(Counter "cluster_hints_kept_total" "Writes that were kept for a replica that was away.",
        machines.hints.kept),
    number!(Counter "cluster_hints_delivered_total" "Kept writes that reached their replica.",
        machines.hints.delivered),
    number!(Counter "cluster_hints_dropped_total" "Kept writes given up: too old, no room, or the replica is gone.",
        machines.hints.dropped),
    number!(Gauge "cluster_fill_shards" "Shards that this node is to hold and has not completely.",
        machines.fill.filling),
    number!(Gauge "cluster_fill_blocked_shards" "Of these, shards whose sources cannot be reached.",
        machines.fill.blocked),
    number!(Counter "cluster_fill_completed_total" "Times that a shard became complete here.", machines.fill.filled),
    number!(Counter "cluster_fill_dropped_shards_total" "Shards freed because others hold them now.",
        machines.fill.dropped),
    number!(Counter "cluster_fill_entries_total" "Newer entries that came while shards were filled.",
        machines.fill.sync.pulled),
    number!(Counter "cluster_fill_bytes_total" "Bytes moved to fill shards.", machines.fill.sync.bytes),
    number!(Gauge "cluster_fill_rate_bytes" "Bytes per second that may be moved to fill shards: less while answers are slow.",
        machines.fill.rate),
    number!(Counter "cluster_fill_failed_total" "Conversations to fill a shard that failed.",
        machines.fill.sync.failed),
    number!(Counter "cluster_repair_cycles_total" "Rounds of repair through all pairs of copies.",
        machines.repair.cycles),
    number!(Gauge "cluster_repair_dirty" "Pairs of copies that wait to be compared out of turn.",
        machines.repair.dirty),
    number!(Counter "cluster_repair_comparisons_total" "Copies compared with a peer's.", machines.repair.sync.begun),
    number!(Counter "cluster_repair_equal_total" "Comparisons that found equal copies at once.",
        machines.repair.sync.equal),
    number!(Counter "cluster_repair_differences_total" "Entries that differed from a peer's.",
        machines.repair.differences),
    number!(Counter "cluster_repair_bytes_total" "Bytes moved to make copies equal.", machines.repair.sync.bytes),
    number!(Counter "cluster_repair_failed_total" "Comparisons that failed.", machines.repair.sync.failed),
    number!(Counter "cluster_purge_rounds_total" "Rounds begun to forget the deletes of a shard.",
        machines.purge.rounds),
    number!(Counter "cluster_purge_completed_total" "Rounds at whose end every replica has forgotten.",
        machines.purge.purged),
    number!(Counter "cluster_purge_failed_total" "Rounds given up.", machines.purge.failed),
    number!(Gauge "cluster_purge_blocked_shards" "Shards whose old deletes stay: a replica is away or not complete.",
        machines.purge.blocked),
    number!(Counter "cluster_unsent_total" "Messages about shards that no link took.", unsent),
    number!(Counter "cluster_links_dialled_total" "Connections to peers begun.", links.dialled),
    number!(Counter "cluster_links_accepted_total" "Connections of peers accepted.", links.accepted),
    number!(Counter "cluster_links_up_total" "Links to peers that came to stand.", links.ups),
    number!(Counter "cluster_links_down_total" "Links to peers that stood and went down.", links.downs),
    number!(Counter "cluster_links_silent_total" "Links ended because the peer was silent.", links.silent),
    number!(Counter "cluster_links_malformed_total" "Links ended for a breach of the format.", links.malformed),
    number!(Counter "cluster_links_refused_total" "Links that peers refused.", links.refused),
    number!(Counter "cluster_links_turned_away_total" "Strangers turned away.", links.turned_away),
    number!(Counter "cluster_received_messages_total" "Messages received from peers.", links.frames_in),
    number!(Counter "cluster_received_bytes_total" "Bytes of messages received from peers.", links.bytes_in),
    number!(Counter "cluster_sent_messages_total" "Messages to peers handed to links.", links.frames_out),
    number!(Counter "cluster_sent_bytes_total" "Bytes of messages to peers handed to links.", links.bytes_out),
    number!(Counter "cluster_sent_background_bytes_total" "Of these: questions of filling, repair and purging, and hints.",
        links.bytes_out_at[Priority::Background as usize]),
    number!(Counter "cluster_sent_request_bytes_total" "Of these: parts of clients' operations.",
        links.bytes_out_at[Priority::Request as usize]),
    number!(Counter "cluster_sent_answer_bytes_total" "Of these: answers to peers.",
        links.bytes_out_at[Priority::Answer as usize]),
    number!(Counter "cluster_sent_control_bytes_total" "Of these: the control plane's.",
        links.bytes_out_at[Priority::Control as usize]),
    number!(Counter "cluster_links_full_total" "Messages not taken because a link was full.", links.full),
];

fn write(page: &mut Page, view: &ClusterView, gossiped: &Gossiped, cores: &[CoreNumbers]) {
    use Kind::{Counter, Gauge};
    let shards = shard_counts(view);
    let present = view.map.present().count();
    let alive = view.map.present().filter(|member| view.alive.contains(&member.no)).count();
    let Gossiped { doubt, suspects, refused, datagrams } = *gossiped;
    let dropped =
        datagrams.too_long + refused.malformed + refused.version + refused.cluster + refused.full + refused.unusable;
    let once = [
        ("map_epoch", Gauge, "Version of the map that this node has adopted.", view.map.epoch),
        ("members", Gauge, "Members of the cluster.", present as u64),
        ("members_alive", Gauge, "Members that can be reached, this one included.", alive as u64),
        ("members_suspected", Gauge, "Members that did not answer and may still object.", suspects),
        ("isolated", Gauge, "1 while this node has to think that it is cut off.", view.isolated.into()),
        (
            "quarantined",
            Gauge,
            "1 while this node's clock is wrong and it coordinates no writes.",
            view.quarantined.into(),
        ),
        (
            "clock_offset_ms",
            Gauge,
            "By how much this node's clock differs from the one of the others that differs most.",
            view.clock_offset_ms,
        ),
        ("leader", Gauge, "1 on the node that plans changes of the map, as far as it sees.", leads(view).into()),
        (
            "disk_failed",
            Gauge,
            "1 once the node's directory could not be written: it votes no more.",
            view.disk_failed.into(),
        ),
        ("shards", Gauge, "Shards of the cluster.", shards.total as u64),
        ("shards_normal", Gauge, "Shards that are not moving and have all their copies.", shards.normal as u64),
        ("shards_moving", Gauge, "Shards that change their nodes.", shards.moving as u64),
        ("shards_filling", Gauge, "Shards of which some copy is not complete.", shards.filling as u64),
        ("shards_degraded", Gauge, "Shards with fewer copies in reach than there should be.", shards.degraded as u64),
        (
            "shards_blocked",
            Gauge,
            "Shards that cannot be read or not be written for want of copies.",
            shards.blocked as u64,
        ),
        (
            "shards_at_risk",
            Gauge,
            "Shards with fewer complete copies in reach than a write needs, or with only one of several.",
            at_risk(&view.map, &view.alive) as u64,
        ),
        ("losses_total", Counter, "Times that the data of a shard was given up for lost.", shards.losses),
        ("gossip_doubt", Gauge, "How much this node doubts itself, 0 to 8; others get more time to object.", doubt),
        ("gossip_received_total", Counter, "Datagrams received.", datagrams.received),
        ("gossip_sent_total", Counter, "Datagrams sent.", datagrams.sent),
        (
            "gossip_errors_total",
            Counter,
            "Sends and receives of datagrams that failed.",
            datagrams.send_errors + datagrams.receive_errors,
        ),
        ("gossip_dropped_total", Counter, "Datagrams received and not used.", dropped),
        (
            "gossip_elsewhere_total",
            Counter,
            "Datagrams from another address than their sender is known by.",
            refused.elsewhere,
        ),
    ];
    for (name, kind, help, value) in once {
        page.single(&format!("gridkv_cluster_{name}"), kind, help, value);
    }
    let mut total = CoreNumbers::default();
    for (number, core) in NUMBERS.iter().flat_map(|number| cores.iter().map(move |core| (number, core))) {
        (number.add)(&mut total, (number.get)(core));
    }
    page.numbers(&NUMBERS, cores, &total);
}

fn leads(view: &ClusterView) -> bool {
    view.leader == Some(view.me)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gridkv_cluster::ids::NodeNo;

    use super::*;
    use crate::metrics::tests::{node, parse_page, value};
    use crate::server::cluster_view_of_three;

    #[test]
    fn the_cluster_is_on_the_page() {
        let mut view = cluster_view_of_three();
        let map = Arc::make_mut(&mut view.map);
        // One copy of the first shard is not complete and another cannot be reached: one is left, where two are needed.
        map.placements[0].replicas[0].filling = true;
        map.placements[1].losses = 2;
        view.alive = [NodeNo(1), NodeNo(2)].into();
        let total = map.placements.len() as f64;
        let mut busy = CoreNumbers { unsent: 3, ..CoreNumbers::default() };
        busy.machines.coordinator.begun = 10;
        busy.machines.hints.waiting = 4;
        busy.links.full = 1;
        let gossiped = Gossiped {
            doubt: 2,
            suspects: 1,
            refused: membership::Refused { cluster: 5, elsewhere: 9, ..Default::default() },
            datagrams: GossipCounters { too_long: 1, received: 100, ..Default::default() },
        };
        let mut page = page(&node());
        write(&mut page, &view, &gossiped, &[busy, CoreNumbers::default(), busy]);
        let samples = parse_page(&page.text());
        let at = |name: &str| value(&samples, &format!("gridkv_cluster_{name}"), &[]);
        assert_eq!(at("map_epoch"), view.map.epoch as f64);
        assert_eq!([at("members"), at("members_alive"), at("members_suspected")], [3.0, 2.0, 1.0]);
        assert_eq!([at("shards"), at("shards_degraded"), at("shards_normal")], [total, total, 0.0]);
        assert_eq!([at("shards_blocked"), at("shards_filling"), at("shards_moving")], [1.0, 1.0, 0.0]);
        assert_eq!(at("shards_at_risk"), 1.0);
        assert_eq!(at("losses_total"), 2.0);
        assert_eq!([at("isolated"), at("disk_failed"), at("gossip_doubt")], [0.0, 0.0, 2.0]);
        assert_eq!(
            [at("gossip_dropped_total"), at("gossip_received_total"), at("gossip_elsewhere_total")],
            [6.0, 100.0, 9.0]
        );
        assert_eq!(
            [at("operations_total"), at("hints"), at("unsent_total"), at("links_full_total")],
            [20.0, 8.0, 6.0, 2.0]
        );
        let of = |core: &str| value(&samples, "gridkv_core_cluster_operations_total", &[("core", core)]);
        assert_eq!([of("0"), of("1"), of("2")], [10.0, 0.0, 10.0]);
    }

    #[test]
    fn all_is_well_where_all_copies_are() {
        let view = ClusterView {
            isolated: true,
            disk_failed: true,
            quarantined: true,
            clock_offset_ms: 900,
            ..cluster_view_of_three()
        };
        let mut page = page(&node());
        write(&mut page, &view, &Gossiped::default(), &[]);
        let samples = parse_page(&page.text());
        let at = |name: &str| value(&samples, &format!("gridkv_cluster_{name}"), &[]);
        assert_eq!(at("shards_normal"), view.map.placements.len() as f64);
        assert_eq!([at("shards_degraded"), at("shards_blocked"), at("shards_moving")], [0.0, 0.0, 0.0]);
        assert_eq!([at("isolated"), at("disk_failed"), at("losses_total")], [1.0, 1.0, 0.0]);
        assert_eq!([at("quarantined"), at("clock_offset_ms")], [1.0, 900.0]);
    }
}
