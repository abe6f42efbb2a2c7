//! Histories that are right, and the same ones made wrong: a checker that accepts everything would not be noticed otherwise.
//!
//! A right history comes from one store that does one operation at a time, somewhere between its call and its end. A wrong one is a
//! right one with one lie in it; each lie breaks a known rule.

use gridkv_engine::hlc::{Hlc, Version};

use super::history::{Asked, Came, EPOCH_MS, History, Op, Rule, Seen};
use super::random::Random;

/// A history that keeps every promise.
pub fn good(seed: u64) -> History {
    let r = &mut Random::new(seed, 11);
    let mut stored: Vec<Option<Seen>> = vec![None; 3];
    let mut counter = 0;
    let mut ops = Vec::new();
    let mut at = 1_000_000;
    for value in 1..=r.within(60, 160) {
        at += r.within(1_000, 40_000);
        // The operation happens at `at`; its call and its end lie around it and overlap those of others.
        let (call, end) = (at - r.below(60_000), at + r.below(60_000));
        let now = EPOCH_MS + at / 1000;
        let key = r.below(3);
        let is_counter = r.chance(200);
        let version = Version { hlc: Hlc::new(now, value as u16), node: 1 };
        let place = &mut stored[key as usize];
        if place.is_some_and(|seen| seen.expires_at != 0 && seen.expires_at <= now) {
            *place = None;
        }
        let fate = r.below(10);
        let (asked, came) = match r.below(10) {
            _ if is_counter && r.chance(500) => {
                let seen = Seen { value: counter, version, expires_at: 0 };
                (Asked::Get, Came::Found((counter > 0).then_some(seen)))
            }
            _ if is_counter && fate == 0 => (Asked::Count, Came::Failed),
            _ if is_counter => {
                counter += 1;
                (Asked::Count, if fate == 1 { Came::Unknown } else { Came::Counted(counter) })
            }
            0..4 => {
                let expires_at = if r.chance(200) { now + r.within(70, 400) } else { 0 };
                let applied = Seen { value, version, expires_at };
                let came = match fate {
                    0 => Came::Failed,
                    1 => Came::Unknown,
                    _ => Came::Written(version),
                };
                if came != Came::Failed && (came != Came::Unknown || r.chance(500)) {
                    *place = Some(applied);
                }
                (Asked::Set { value, expires_at }, came)
            }
            4 => {
                let was = place.take().is_some();
                (Asked::Delete, Came::Deleted(was))
            }
            5 if fate > 5 => {
                *place = None;
                (Asked::Erase, Came::Written(version))
            }
            _ => (Asked::Get, Came::Found(*place)),
        };
        let key = if is_counter { 0 } else { key };
        // What is read is served at the moment it happens, by a clock that is right.
        ops.push(Op { client: 0, node: 0, key, is_counter, asked, quorum: true, call, end, wall: now, came });
    }
    // In the end everything is read once more, by nobody disturbed.
    let call = at + 2_000_000;
    let wall = EPOCH_MS + call / 1000;
    for key in 0..3 {
        let found = stored[key as usize].filter(|seen| seen.expires_at == 0 || seen.expires_at > wall);
        let came = Came::Found(found);
        let end = call + 10;
        ops.push(Op {
            client: 0,
            node: 0,
            key,
            is_counter: false,
            asked: Asked::Get,
            quorum: true,
            call,
            end,
            wall,
            came,
        });
    }
    let seen = Seen { value: counter, version: Version::ZERO, expires_at: 0 };
    let came = Came::Found((counter > 0).then_some(seen));
    let op = Op {
        client: 0,
        node: 0,
        key: 0,
        is_counter: true,
        asked: Asked::Get,
        quorum: true,
        call,
        end: call + 10,
        wall,
        came,
    };
    ops.push(op);
    History { ops, ahead_ms: 0, reads_are_monotonic: true, sane_ahead_ms: Some(0) }
}

/// One lie in a history. `None` when it gives no occasion for that lie; else the rules of which one must catch it.
pub fn spoil(history: &mut History, lie: u64, r: &mut Random) -> Option<&'static [Rule]> {
    let ops = &mut history.ops;
    let last = ops.iter().map(|op| op.end).max()?;
    let of = |ops: &[Op], fits: &dyn Fn(&Op) -> bool, r: &mut Random| {
        let found: Vec<usize> = (0..ops.len()).filter(|&at| fits(&ops[at])).collect();
        (!found.is_empty()).then(|| *r.pick(&found))
    };
    let read = |key, is_counter, came| Op {
        client: 9,
        node: 0,
        key,
        is_counter,
        asked: Asked::Get,
        quorum: true,
        call: last + 1_000,
        end: last + 2_000,
        wall: EPOCH_MS,
        came,
    };
    let written = |op: &Op| matches!((op.asked, op.came), (Asked::Set { expires_at: 0, .. }, Came::Written(_)));
    let seen_of = |op: &Op| match (op.asked, op.came) {
        (Asked::Set { value, expires_at }, Came::Written(version)) => Some(Seen { value, version, expires_at }),
        _ => None,
    };
    match lie {
        // An acknowledged write is gone: a newer one was there, an older one is read.
        0 => {
            let old = of(ops, &written, r)?;
            let (key, end, seen) = (ops[old].key, ops[old].end, seen_of(&ops[old])?);
            ops.iter().find(|op| op.key == key && !op.is_counter && op.call > end && written(op))?;
            ops.push(read(key, false, Came::Found(Some(seen))));
            Some(&[Rule::Durability, Rule::Monotonic, Rule::Resurrection])
        }
        // It is gone without a trace.
        1 => {
            let at = of(ops, &written, r)?;
            let (key, call) = (ops[at].key, ops[at].call);
            let may_remove = |op: &Op| {
                let removes = !matches!(op.asked, Asked::Get | Asked::Set { expires_at: 0, .. });
                op.key == key && !op.is_counter && removes && op.end >= call && op.came != Came::Failed
            };
            if ops.iter().any(may_remove) {
                return None;
            }
            ops.push(read(key, false, Came::Found(None)));
            Some(&[Rule::Durability, Rule::Monotonic])
        }
        // What failed is seen.
        2 => {
            let at = of(ops, &|op| op.came == Came::Failed && matches!(op.asked, Asked::Set { .. }), r)?;
            let Asked::Set { value, .. } = ops[at].asked else { return None };
            let version = Version { hlc: Hlc::at(EPOCH_MS + last / 1000), node: 7 };
            let key = ops[at].key;
            ops.push(read(key, false, Came::Found(Some(Seen { value, version, expires_at: 0 }))));
            Some(&[Rule::FailedNeverSeen])
        }
        // A deleted value is back.
        3 => {
            let at = of(ops, &|op| op.came == Came::Deleted(true), r)?;
            let (key, call) = (ops[at].key, ops[at].call);
            let before = |op: &&Op| op.key == key && !op.is_counter && op.end < call && written(op);
            let seen = seen_of(ops.iter().rev().find(before)?)?;
            ops.push(read(key, false, Came::Found(Some(seen))));
            Some(&[Rule::Resurrection, Rule::Durability, Rule::Monotonic])
        }
        // Two counts return the same, or one is lost.
        4 => {
            let at = of(ops, &|op| matches!(op.came, Came::Counted(_)), r)?;
            let op = Op { call: last + 1, end: last + 9, ..ops[at] };
            ops.push(op);
            Some(&[Rule::Counters])
        }
        5 => {
            let at = of(ops, &|op| matches!(op.came, Came::Counted(n) if n > 0), r)?;
            let Came::Counted(n) = ops[at].came else { return None };
            let seen = Seen { value: n - 1, version: Version::ZERO, expires_at: 0 };
            ops.push(read(0, true, Came::Found((n > 1).then_some(seen))));
            Some(&[Rule::Counters])
        }
        // Counts that nobody asked for.
        6 => {
            let seen = Seen { value: 1 + ops.len() as u64, version: Version::ZERO, expires_at: 0 };
            ops.push(read(0, true, Came::Found(Some(seen))));
            Some(&[Rule::Counters])
        }
        // Served after its time.
        7 => {
            let at = of(ops, &|op| matches!(op.came, Came::Found(Some(seen)) if seen.expires_at != 0), r)?;
            let Came::Found(Some(seen)) = ops[at].came else { return None };
            ops[at].wall = seen.expires_at + r.below(100);
            Some(&[Rule::Expiry])
        }
        // One value under two versions, or a value that nobody wrote, or of another key.
        8 => {
            let at = of(ops, &written, r)?;
            let seen = seen_of(&ops[at])?;
            let version = Version { hlc: Hlc(seen.version.hlc.0 + 1), ..seen.version };
            let key = ops[at].key;
            ops.push(read(key, false, Came::Found(Some(Seen { version, ..seen }))));
            Some(&[Rule::OneVersion])
        }
        9 => {
            let at = of(ops, &written, r)?;
            let (key, seen) = (ops[at].key, seen_of(&ops[at])?);
            let wrong = if r.chance(500) { (key, Seen { value: 1 << 40, ..seen }) } else { ((key + 1) % 3, seen) };
            ops.push(read(wrong.0, false, Came::Found(Some(wrong.1))));
            Some(&[Rule::OneVersion])
        }
        // What was read as gone is back: the delete had no answer, and nobody wrote it again.
        11 => {
            let at = of(
                ops,
                &|op| {
                    op.end == last
                        && !op.is_counter
                        && matches!(op.came, Came::Found(Some(seen)) if seen.expires_at == 0)
                },
                r,
            )?;
            let (key, back) = (ops[at].key, ops[at].came);
            let delete =
                Op { asked: Asked::Delete, call: last + 100, end: last + 200, ..read(key, false, Came::Unknown) };
            let later = Op { call: last + 3_000, end: last + 4_000, ..read(key, false, back) };
            let gone = read(key, false, Came::Found(None));
            ops.extend([delete, gone, later]);
            Some(&[Rule::Resurrection])
        }
        // Acknowledged with a version of next hour.
        _ => {
            let at = of(ops, &written, r)?;
            let version = Version { hlc: Hlc::at(EPOCH_MS + last / 1000 + 3_600_000), node: 1 };
            ops[at].came = Came::Written(version);
            Some(&[Rule::Future, Rule::OneVersion])
        }
    }
}

/// Kinds of lies.
pub const LIES: u64 = 12;

/// How many of `count` wrong histories are accepted, or rejected for a reason that has nothing to do with the lie; and
/// how many right ones are rejected.
pub fn blind_spots(count: u64) -> Vec<String> {
    let mut found = Vec::new();
    let (mut wrong, mut seed) = (0, 0);
    while wrong < count {
        seed += 1;
        let mut history = good(seed);
        if let Err(violation) = history.check() {
            found.push(format!("a right history, {seed}, is rejected: {violation}"));
        }
        let r = &mut Random::new(seed, 12);
        let lie = seed % LIES;
        let Some(rules) = spoil(&mut history, lie, r) else { continue };
        wrong += 1;
        match history.check() {
            Err(violation) if rules.contains(&violation.rule) => {}
            other => found.push(format!("lie {lie} in history {seed}: {other:?}")),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    /// The checkers take what is right and find each kind of lie.
    #[test]
    fn a_thousand_wrong_histories_are_rejected() {
        let found = super::blind_spots(1_000);
        assert!(found.is_empty(), "{} of them: {:#?}", found.len(), &found[..found.len().min(5)]);
    }
}
