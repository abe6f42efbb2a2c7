//! What happened, as a number for comparing runs and as a drawing for reading them.

use std::collections::VecDeque;
use std::fmt::Write;

/// Width of a node's column.
const COLUMN: usize = 22;

/// See the head of the file.
#[derive(Debug, Default)]
pub struct Trace {
    hash: u64,
    /// Events hashed.
    pub events: u64,
    entries: VecDeque<(u64, usize, String)>,
    is_kept: bool,
    only: Option<u16>,
    shown: usize,
    until: u64,
}

impl Trace {
    /// One that only counts.
    pub fn new() -> Trace {
        Trace::default()
    }

    /// One that keeps the last `shown` events up to that time, of one shard only if there is one.
    pub fn kept(until: u64, only: Option<u16>, shown: usize) -> Trace {
        Trace { is_kept: true, until, only, shown, ..Trace::default() }
    }

    /// Something has happened; the numbers say what.
    pub fn hash(&mut self, words: &[u64]) {
        self.events += 1;
        for word in words {
            let mixed = (self.hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.hash = mixed ^ mixed >> 29;
        }
    }

    /// The number that equal runs share.
    pub fn sum(&self) -> u64 {
        self.hash
    }

    /// Notes an event for the drawing.
    pub fn note(&mut self, at: u64, node: usize, shard: Option<u16>, text: impl FnOnce() -> String) {
        if !self.is_kept || at > self.until || self.only.is_some() && shard.is_some() && shard != self.only {
            return;
        }
        if self.entries.len() >= self.shown {
            self.entries.pop_front();
        }
        self.entries.push_back((at, node, text()));
    }

    /// The shard that alone is drawn.
    pub fn only(&self) -> Option<u16> {
        self.only
    }

    /// A line per event, a column per node, time downwards.
    pub fn drawing(&self) -> String {
        let nodes =
            self.entries.iter().filter(|(_, node, _)| *node < 100).map(|(_, node, _)| node + 1).max().unwrap_or(0);
        let mut text = String::from("      time ms");
        for node in 0..nodes {
            let _ = write!(text, " | {:<COLUMN$}", format!("node {node}"));
        }
        text.push('\n');
        for (at, node, what) in &self.entries {
            let _ = write!(text, "{:>9}.{:03}", at / 1000, at % 1000);
            if *node >= nodes {
                let _ = writeln!(text, " | {what}");
                continue;
            }
            let _ = write!(text, "{}", format!(" | {:COLUMN$}", "").repeat(*node));
            let _ = writeln!(text, " | {what}");
        }
        text
    }
}
