//! Who is copying, as a node's map tells it, and who may die meanwhile.
//!
//! What is acknowledged is on `w` copies, so of each shard `w − 1` may be away or incomplete at a time; of more it is lost
//! by promise (docs/CONSISTENCY.md). A target that is being filled is away already and may always die; a source only where that
//! leaves enough: with three copies and `w` 2 while a shard moves, with five and `w` 3 also while a lost copy is
//! made again.
//!
//! Not here: killing anybody ([`super::kill`]).

use std::collections::BTreeSet;

use serde_json::Value;

/// Of one shard, by the numbers of lives.
#[derive(Clone, Debug)]
struct Shard {
    replicas: Vec<u64>,
    filling: Vec<u64>,
    /// Who replaces whom, where the new copies are read already.
    moved: Option<(u64, Option<u64>)>,
}

/// What a node's map says about copies.
#[derive(Clone, Debug)]
pub(super) struct Fills {
    shards: Vec<Shard>,
    /// Lives that can be reached.
    alive: BTreeSet<u64>,
    write_quorum: usize,
}

impl Fills {
    /// From what a node answers to `SHARDS`, `MEMBERS` and `STATUS`.
    pub(super) fn of(shards: &Value, members: &Value, status: &Value) -> Option<Fills> {
        let numbers = |list: &Value| list.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<_>>>();
        let shard = |shard: &Value| {
            let joining = shard["joining"].as_u64().filter(|_| shard["stage"] == "read new");
            let moved = joining.map(|joining| (joining, shard["leaving"].as_u64()));
            Some(Shard { replicas: numbers(&shard["replicas"])?, filling: numbers(&shard["filling"])?, moved })
        };
        let here = |member: &&Value| member["alive"] == true && member["standing"] != "lost";
        Some(Fills {
            shards: shards.as_array()?.iter().map(shard).collect::<Option<_>>()?,
            alive: members.as_array()?.iter().filter(here).filter_map(|member| member["no"].as_u64()).collect(),
            write_quorum: status["write_quorum"].as_u64()? as usize,
        })
    }

    /// Whether a life is being filled.
    pub(super) fn fills(&self, target: u64) -> bool {
        self.shards.iter().any(|shard| shard.filling.contains(&target))
    }

    /// Whether a life has a complete copy of a shard of which `target` is making one.
    pub(super) fn is_source(&self, life: u64, target: u64) -> bool {
        let has = |shard: &&Shard| shard.replicas.contains(&life) && !shard.filling.contains(&life);
        self.shards.iter().filter(has).any(|shard| shard.filling.contains(&target))
    }

    /// Whether everything that was acknowledged outlives this life.
    pub(super) fn may_die(&self, life: u64) -> bool {
        self.shards.iter().all(|shard| {
            let bears = |set: &[u64]| {
                let is_away = |no: &u64| *no == life || shard.filling.contains(no) || !self.alive.contains(no);
                !set.contains(&life) || set.iter().filter(|no| is_away(no)).count() < self.write_quorum
            };
            let new: Option<Vec<u64>> = shard.moved.map(|(joining, leaving)| {
                let stays = shard.replicas.iter().copied().filter(|no| Some(*no) != leaving && *no != joining);
                stays.chain([joining]).collect()
            });
            bears(&shard.replicas) && new.is_none_or(|new| bears(&new))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fills(shards: Value, alive: &[u64], write_quorum: u64) -> Fills {
        let member = |no| json!({"no": no, "standing": "up", "alive": alive.contains(&no)});
        let mut members: Vec<Value> = (1..=6).map(member).collect();
        members.push(json!({"no": 9, "standing": "lost", "alive": true}));
        Fills::of(&shards, &json!(members), &json!({"write_quorum": write_quorum})).unwrap()
    }

    fn shard(replicas: &[u64], filling: &[u64]) -> Value {
        json!({"replicas": replicas, "filling": filling, "stage": "normal", "joining": null, "leaving": null})
    }

    #[test]
    fn sources_have_what_a_target_lacks() {
        let fills = fills(json!([shard(&[1, 2, 3], &[3]), shard(&[3, 4, 5], &[])]), &[1, 2, 3, 4, 5], 2);
        assert!(fills.fills(3) && !fills.fills(1));
        assert!(fills.is_source(1, 3) && fills.is_source(2, 3));
        assert!(!fills.is_source(4, 3) && !fills.is_source(3, 3));
    }

    #[test]
    fn a_target_may_die_and_a_source_where_enough_is_left() {
        let of = |replicas: &[u64], w| fills(json!([shard(replicas, &[3])]), &[1, 2, 3, 4, 5], w);
        let three = of(&[1, 2, 3], 2);
        assert!(three.may_die(3) && three.may_die(4));
        assert!(!three.may_die(1), "what 1 and 3 had acknowledged is on 2 only if 1 has not died");
        assert!(of(&[1, 2, 3, 4, 5], 3).may_die(1));
        let away = fills(json!([shard(&[1, 2, 3, 4, 5], &[3])]), &[1, 2, 3, 4], 3);
        assert!(!away.may_die(1), "5 is away already");
        let over = fills(json!([shard(&[1, 2, 9], &[])]), &[1, 2, 3], 2);
        assert!(!over.may_die(1), "9 is over");
    }

    #[test]
    fn in_a_move_both_sets_count_once_the_new_one_is_read() {
        let moves = |stage: &str, filling: &[u64], alive: &[u64]| {
            let shard = json!({"replicas": [1, 2, 3], "filling": filling, "stage": stage, "joining": 4, "leaving": 1});
            fills(json!([shard]), alive, 2)
        };
        let fill = moves("write both", &[4], &[1, 2, 3, 4]);
        assert!(fill.may_die(2) && fill.may_die(4) && fill.is_source(2, 4));
        assert!(moves("read new", &[], &[1, 2, 3, 4]).may_die(2));
        assert!(!moves("read new", &[], &[1, 2, 3]).may_die(2), "of 2, 3 and 4 one would be left");
        assert!(moves("read new", &[], &[2, 3, 4]).may_die(4), "1 does not count for the new set");
        assert!(!moves("read new", &[], &[2, 3, 4]).may_die(2), "nor has it left the old one");
    }
}
