//! The links between nodes: what arrives, when, and how often.
//!
//! A message that is let onto a cut link is lost; one that is under way when a link is cut arrives. A clogged link holds
//! everything back. Without reordering, messages of one directed link arrive in the order in which they were sent.
//!
//! One promise that links keep in every world, because TCP keeps it: a request to an orderer is not delivered twice.

use std::collections::BTreeMap;

use super::options::Options;
use super::random::Random;

/// Counters of a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkStats {
    /// Messages sent.
    pub sent: u64,
    /// Lost by chance or at a cut.
    pub lost: u64,
    /// Delivered twice.
    pub duplicated: u64,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Network {
    random: Random,
    loss: u64,
    duplicates: u64,
    delay_us: u64,
    reorder: bool,
    /// How many faults cut a directed link now.
    cut: BTreeMap<(usize, usize), u32>,
    /// Until when a directed link is clogged.
    clogged: BTreeMap<(usize, usize), u64>,
    /// By which time messages to a node take longer, and until when.
    slow: BTreeMap<usize, (u64, u64)>,
    /// The last arrival on a directed link.
    last: BTreeMap<(usize, usize), u64>,
    /// Counters.
    pub stats: NetworkStats,
}

impl Network {
    /// The network of a world.
    pub fn new(options: &Options) -> Network {
        Network {
            random: Random::new(options.seed, 2),
            loss: options.loss,
            duplicates: options.duplicates,
            delay_us: options.delay_us,
            reorder: options.reorder,
            cut: BTreeMap::new(),
            clogged: BTreeMap::new(),
            slow: BTreeMap::new(),
            last: BTreeMap::new(),
            stats: NetworkStats::default(),
        }
    }

    /// Cuts links.
    pub fn cut(&mut self, links: &[(usize, usize)]) {
        links.iter().for_each(|&link| *self.cut.entry(link).or_default() += 1);
    }

    /// Mends links that were cut.
    pub fn mend(&mut self, links: &[(usize, usize)]) {
        for link in links {
            if let Some(cuts) = self.cut.get_mut(link) {
                *cuts = cuts.saturating_sub(1);
            }
        }
    }

    /// Holds back what goes over a link until then.
    pub fn clog(&mut self, from: usize, to: usize, until: u64) {
        let at = self.clogged.entry((from, to)).or_default();
        *at = until.max(*at);
    }

    /// Makes messages to a node take longer until then.
    pub fn slow(&mut self, node: usize, extra_us: u64, until: u64) {
        self.slow.insert(node, (extra_us, until));
    }

    /// From now on nothing goes wrong any more.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.clogged.clear();
        self.slow.clear();
        (self.loss, self.duplicates) = (0, 0);
        self.delay_us = self.delay_us.min(5_000);
    }

    /// Whether messages get from one to the other.
    pub fn is_open(&self, from: usize, to: usize) -> bool {
        self.cut.get(&(from, to)).is_none_or(|&cuts| cuts == 0)
    }

    /// The times at which a message arrives: none, one or two.
    pub fn arrivals(&mut self, now: u64, from: usize, to: usize, once: bool) -> [Option<u64>; 2] {
        self.stats.sent += 1;
        if !self.is_open(from, to) || self.random.chance(self.loss) {
            self.stats.lost += 1;
            return [None; 2];
        }
        let first = self.arrival(now, from, to);
        let second = (!once && self.random.chance(self.duplicates)).then(|| self.arrival(now, from, to));
        self.stats.duplicated += u64::from(second.is_some());
        [Some(first), second]
    }

    fn arrival(&mut self, now: u64, from: usize, to: usize) -> u64 {
        let mut at = now + 50 + self.random.exponential(self.delay_us);
        if let Some(&until) = self.clogged.get(&(from, to)) {
            at = at.max(until);
        }
        if let Some(&(extra, until)) = self.slow.get(&to)
            && now < until
        {
            at += extra;
        }
        if !self.reorder {
            let last = self.last.entry((from, to)).or_default();
            at = at.max(*last);
            *last = at;
        }
        at
    }
}
