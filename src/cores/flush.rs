//! Whether the node may be emptied: all of its cores, or none.
//!
//! FLUSHALL runs on every core by itself, and each core learns by itself that other nodes hold copies. So the node as a whole
//! decides before the first core is emptied, and a map that shares shards waits for what was decided before:
//!
//! ```text
//!   who empties                            core 0, with a map that shares shards
//!   counts a part per core                 says that shards are shared
//!   then looks whether they are shared     then looks whether parts are under way
//!     yes: takes the parts back, refuses     yes: the cores get the map when the last part has ended
//!     no: every core does its part           no: the cores get it now
//! ```
//!
//! Of two that meet at least one sees the other. Parts always end: cores run them between any two requests. Nothing new begins
//! once shards are shared, so a map waits for a turn or two.
//!
//! Not here: what emptying does (the engine), and maps (`cluster`).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use gridkv_engine::command::{Merge, Route, Spec};

/// Whether a command empties the node.
#[inline]
pub(crate) fn empties(spec: &Spec) -> bool {
    spec.route == Route::Every(Merge::Ok) && matches!(spec.name, "flushall" | "flushdb")
}

/// What the cores of a node know of its emptying.
#[derive(Debug)]
pub(crate) struct Flushes {
    /// Other nodes hold copies, or it is not known yet that none do.
    shared: AtomicBool,
    /// Cores that have still to be emptied.
    parts: AtomicUsize,
}

impl Flushes {
    /// Of a node that has no map yet.
    pub(crate) fn new(clustered: bool) -> Flushes {
        Flushes { shared: AtomicBool::new(clustered), parts: AtomicUsize::new(0) }
    }

    /// Whether so many cores may be emptied now. Then each of them calls [`Flushes::part`].
    pub(crate) fn begin(&self, cores: usize) -> bool {
        self.parts.fetch_add(cores, Ordering::SeqCst);
        let alone = !self.shared.load(Ordering::SeqCst);
        if !alone {
            self.parts.fetch_sub(cores, Ordering::SeqCst);
        }
        alone
    }

    /// A core does its part, which has ended when this is dropped.
    pub(crate) fn part(&self) -> Part<'_> {
        Part(self)
    }

    /// Nothing is emptied from now on. False while something that began before is under way.
    pub(crate) fn share(&self) -> bool {
        self.shared.store(true, Ordering::SeqCst);
        self.parts.load(Ordering::SeqCst) == 0
    }

    /// Whether other nodes hold copies, or it is not known yet that none do.
    #[inline]
    pub(crate) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::SeqCst)
    }

    /// Every core has its shards for itself.
    pub(crate) fn unshare(&self) {
        self.shared.store(false, Ordering::SeqCst);
    }
}

/// A core's part of an emptying.
#[derive(Debug)]
pub(crate) struct Part<'a>(&'a Flushes);

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.0.parts.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_waits_for_what_began_before_and_nothing_begins_after() {
        let flushes = Flushes::new(false);
        assert!(flushes.begin(2));
        let first = flushes.part();
        assert!(!flushes.share(), "two cores are not empty yet");
        assert!(!flushes.begin(2), "no core may share its shards half way");
        drop(first);
        assert!(!flushes.share());
        drop(flushes.part());
        assert!(flushes.share());
        assert!(!flushes.begin(1));
        flushes.unshare();
        assert!(flushes.begin(1));
    }

    #[test]
    fn who_empties_and_who_shares_never_both_go_on() {
        use std::sync::Barrier;
        for _ in 0..2000 {
            let (flushes, start) = (Flushes::new(false), Barrier::new(2));
            let (emptied, shared) = std::thread::scope(|scope| {
                let emptying = scope.spawn(|| {
                    start.wait();
                    flushes.begin(2)
                });
                start.wait();
                let shared = flushes.share();
                (emptying.join().unwrap(), shared)
            });
            assert!(!(emptied && shared));
            assert_eq!(flushes.share(), !emptied);
        }
    }

    #[test]
    fn a_node_that_knows_no_map_is_not_emptied() {
        assert!(!Flushes::new(true).begin(1));
    }
}
