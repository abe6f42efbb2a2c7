//! What one seed draws: how large the world is, how bad its network, and every fault with its time.
//!
//! All of it is data, so a run can be repeated with less of it: that is how a failure is made smaller. Each seed draws first
//! *which* kinds of trouble exist and then how strong they are: a run in which everything happens hides what a run with
//! one kind of trouble shows (Groce et al., "Swarm Testing", ISSTA 2012).

use gridkv_engine::Millis;

use super::random::Random;
use crate::quorum::Quorums;

/// The stream that decides who decides on the map.
const PLANES: u64 = 11;
/// The stream that decides how soon is purged.
const PURGES: u64 = 13;
/// The stream that decides how long it is quiet before the last look.
const QUIET: u64 = 14;
/// The stream that decides how much of a shard is sent at a time.
const PAGES: u64 = 15;
/// The stream that decides how much memory there is.
const MEMORY: u64 = 16;
/// Time in which a cluster is founded and has grown to its first size, mostly.
const FOUNDING_MS: Millis = 8_000;

/// Who decides on the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// One holder, which is told who is alive.
    Authority,
    /// The control planes of all nodes.
    Planes,
}

/// Times of the control planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gossip {
    /// Until the next member is probed.
    pub probe_ms: Millis,
    /// How long a suspect may object.
    pub suspect_ms: Millis,
    /// How often lists are exchanged.
    pub exchange_ms: Millis,
    /// Mean time of a write to a node's disk.
    pub disk_us: u64,
}

/// A kind of trouble, without its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A process dies and forgets; a new life starts after `down_ms`.
    Kill {
        /// Which node.
        node: usize,
        /// Until the next life.
        down_ms: Millis,
    },
    /// A machine is replaced: its process dies, and its successor at the same address has an empty directory.
    Replace {
        /// Which node.
        node: usize,
        /// Until the successor starts.
        down_ms: Millis,
    },
    /// A node dies that takes part in a move right now, if one does.
    KillMover {
        /// Which of them.
        pick: usize,
        /// Until the next life.
        down_ms: Millis,
    },
    /// A process stands still.
    Pause {
        /// Which node.
        node: usize,
        /// For how long.
        ms: Millis,
    },
    /// Each message to a node takes longer.
    Slow {
        /// Which node.
        node: usize,
        /// By how much.
        extra_ms: Millis,
        /// For how long.
        ms: Millis,
    },
    /// Some directed links carry nothing.
    Partition {
        /// Links cut, from and to.
        cut: Vec<(usize, usize)>,
        /// Nodes that the map's authority cannot reach meanwhile.
        far: Vec<usize>,
        /// For how long.
        ms: Millis,
    },
    /// A directed link holds back everything until it is over.
    Clog {
        /// From.
        from: usize,
        /// To.
        to: usize,
        /// For how long.
        ms: Millis,
    },
    /// A clock is set.
    Clock {
        /// Whose.
        node: usize,
        /// To so many milliseconds beside the true time.
        offset_ms: i64,
    },
    /// A new node comes.
    Join,
    /// A node is to be emptied; it goes when it holds nothing.
    Drain {
        /// Which.
        node: usize,
    },
}

impl Kind {
    /// A short name, for counts.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Kill { .. } => "kill",
            Kind::Replace { .. } => "machine replaced",
            Kind::KillMover { .. } => "kill in a move",
            Kind::Pause { .. } => "pause",
            Kind::Slow { .. } => "slow",
            Kind::Partition { .. } => "partition",
            Kind::Clog { .. } => "clog",
            Kind::Clock { .. } => "clock",
            Kind::Join => "join",
            Kind::Drain { .. } => "drain",
        }
    }
}

/// A fault and its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Milliseconds from the start.
    pub at: Millis,
    /// What happens.
    pub kind: Kind,
}

/// Everything a run depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The seed of all that is not written here: each delay, each loss, each operation.
    pub seed: u64,
    /// Simulated seconds until everything is healed.
    pub seconds: u64,
    /// Nodes at the start.
    pub nodes: usize,
    /// Nodes at any time, at most.
    pub max_nodes: usize,
    /// Cores of each.
    pub cores: usize,
    /// Copies and quorums.
    pub quorums: Quorums,
    /// Shards.
    pub shards: u16,
    /// Keys that are written and read.
    pub keys: u64,
    /// Keys that are only counted up.
    pub counters: u64,
    /// Clients.
    pub clients: usize,
    /// Mean time between the operations of a client.
    pub think_ms: Millis,
    /// Value bytes besides its number, at most.
    pub value_bytes: usize,
    /// Messages lost, of 1,000.
    pub loss: u64,
    /// Messages delivered twice, of 1,000.
    pub duplicates: u64,
    /// Mean delay of a message.
    pub delay_us: u64,
    /// Whether messages of one link overtake each other.
    pub reorder: bool,
    /// Who is cut off from one is still said to be alive when others reach it.
    pub indirect: bool,
    /// Time until somebody's end or return is noticed.
    pub detect_ms: (Millis, Millis),
    /// Time until a node hears of a new map, at most.
    pub map_ms: Millis,
    /// How long an operation may take.
    pub timeout_ms: Millis,
    /// When the silent are asked again.
    pub again_ms: Millis,
    /// Operations of a core at once.
    pub operations: usize,
    /// Bytes of hints of a core.
    pub hint_bytes: usize,
    /// Entries of a change log.
    pub change_log: usize,
    /// Shards that a core fills at once.
    pub fill_streams: usize,
    /// Bytes per second that it takes for filling.
    pub fill_bytes: u64,
    /// Clocks lie within this of the true time.
    pub skew_ms: i64,
    /// A node may be far off.
    pub outlier: bool,
    /// A life that is away for so long is given up.
    pub replace_after_ms: Millis,
    /// Shards on the move at once.
    pub moves_at_once: usize,
    /// Tombstones may go after this time, and this is the pause after each round of that.
    pub purge_ms: (Millis, Millis),
    /// Entries that are sent, compared or written of a shard at a time; 0: as many as in a node.
    pub page: usize,
    /// Bytes that the store of each core may take above what it takes empty; 0: no limit.
    pub memory: u64,
    /// How long nobody asks anything, when all is at rest, before everything is read for the last time.
    pub quiet_ms: Millis,
    /// Who decides on the map.
    pub control: Control,
    /// How the control planes do it.
    pub gossip: Gossip,
    /// What goes wrong, by time.
    pub faults: Vec<Fault>,
}

impl Options {
    /// What that seed draws.
    pub fn draw(seed: u64, seconds: u64) -> Options {
        let options = Options::draw_with_authority(seed, seconds);
        // From a stream of its own, so that the worlds with an authority do not depend on it.
        match Random::new(seed, PLANES).chance(500) {
            true => options.with_planes(),
            false => options,
        }
    }

    /// The same world with an authority in place of control planes.
    #[must_use]
    pub fn with_authority(self) -> Options {
        Options::draw_with_authority(self.seed, self.seconds)
    }

    fn draw_with_authority(seed: u64, seconds: u64) -> Options {
        let r = &mut Random::new(seed, 1);
        let quorums = *r.pick(&[
            Quorums { n: 3, w: 2, r: 2 },
            Quorums { n: 3, w: 2, r: 2 },
            Quorums { n: 3, w: 2, r: 2 },
            Quorums { n: 3, w: 2, r: 3 },
            Quorums { n: 3, w: 3, r: 1 },
            Quorums { n: 2, w: 1, r: 2 },
            Quorums { n: 5, w: 3, r: 3 },
        ]);
        let few = usize::from(quorums.n);
        let nodes = if r.chance(100) { 2 } else { (few + r.below(3) as usize).min(6) };
        let bad = |r: &mut Random, permille| r.chance(permille);
        let mut options = Options {
            seed,
            seconds,
            nodes,
            max_nodes: nodes + r.below(3) as usize,
            cores: 1 + r.below(2) as usize,
            quorums,
            shards: 32,
            keys: *r.pick(&[1, 4, 12, 50]),
            counters: r.within(1, 3),
            clients: r.within(3, 10) as usize,
            think_ms: r.within(2, 60),
            value_bytes: *r.pick(&[0, 8, 100, 100, 4000]),
            loss: if bad(r, 500) { r.within(1, 300).min(r.within(1, 300)) } else { 0 },
            duplicates: if bad(r, 500) { r.within(1, 300) } else { 0 },
            delay_us: *r.pick(&[200, 1000, 5000, 30_000, 100_000]),
            reorder: r.chance(500),
            indirect: r.chance(500),
            detect_ms: (r.within(200, 1000), r.within(1000, 5000)),
            map_ms: *r.pick(&[5, 100, 2000]),
            timeout_ms: *r.pick(&[300, 1000, 1000, 3000]),
            again_ms: *r.pick(&[50, 100, 200]),
            operations: *r.pick(&[4, 16, 1000]),
            hint_bytes: *r.pick(&[0, 400, 4000, 1 << 20]),
            change_log: *r.pick(&[1, 4, 16, 64]),
            fill_streams: *r.pick(&[1, 1, 4]),
            fill_bytes: *r.pick(&[20_000, 200_000, 100 << 20]),
            // Any two clocks that are right differ by less than [`crate::control::clocks::AGREED_MS`].
            skew_ms: *r.pick(&[0, 20, 190]),
            outlier: r.chance(100),
            replace_after_ms: *r.pick(&[8_000, 15_000, 30_000]),
            moves_at_once: *r.pick(&[1, 8, 64]),
            purge_ms: *Random::new(seed, PURGES).pick(&[(60_500, 60_000), (20_500, 5_000), (5_500, 1_000)]),
            quiet_ms: *Random::new(seed, QUIET).pick(&[0, 0, 5_000, 10_000, 30_000, 130_000]),
            page: Random::new(seed, PAGES).below(9).saturating_sub(5) as usize,
            memory: 0,
            control: Control::Authority,
            gossip: Gossip { probe_ms: 500, suspect_ms: 2000, exchange_ms: 5000, disk_us: 1000 },
            faults: Vec::new(),
        };
        if quorums.w == 1 {
            // Where one copy is enough for an answer, giving up a node gives up data.
            options.replace_after_ms = 3_600_000;
        }
        let m = &mut Random::new(seed, MEMORY);
        if m.chance(100) {
            let all = (options.keys + options.counters) * (options.value_bytes as u64 / 2 + 100);
            options.memory = all * m.within(10, 90) / 100 / options.cores as u64;
            // What was refused by a full replica, and is stored when it comes a second time, was sent once.
            options.duplicates = 0;
        }
        options.faults = faults(r, &options);
        options
    }

    /// The same world with control planes in place of the authority.
    #[must_use]
    pub fn with_planes(mut self) -> Options {
        if self.control == Control::Planes {
            return self;
        }
        let r = &mut Random::new(self.seed, PLANES + 1);
        self.control = Control::Planes;
        self.gossip = Gossip {
            probe_ms: *r.pick(&[200, 300, 500]),
            suspect_ms: *r.pick(&[600, 1000, 2000]),
            exchange_ms: *r.pick(&[1000, 2000, 5000]),
            disk_us: *r.pick(&[100, 2000, 20_000]),
        };
        self.moves_at_once = self.moves_at_once.max(4);
        // The cluster is founded first. Some worlds have faults from the beginning.
        let grace = if r.chance(300) { 0 } else { FOUNDING_MS.min(self.seconds * 250) };
        let end = self.seconds * 1000;
        for fault in &mut self.faults {
            fault.at = grace + fault.at * (end - grace) / end;
            if let Kind::Kill { node, down_ms } = fault.kind
                && r.chance(200)
            {
                fault.kind = Kind::Replace { node, down_ms };
            }
        }
        self
    }

    /// The same world in which nothing goes wrong.
    pub fn calm(seed: u64, seconds: u64) -> Options {
        Options {
            loss: 0,
            duplicates: 0,
            delay_us: 500,
            outlier: false,
            faults: Vec::new(),
            operations: 1000,
            timeout_ms: 1000,
            ..Options::draw(seed, seconds)
        }
    }

    /// Whether a clock is so far ahead that its node keeps versions which no other replica takes. Such a world is asked for
    /// safety only: nobody can make these replicas equal before their time has come.
    pub fn is_poisoned(&self) -> bool {
        self.ahead_ms() > 500
    }

    /// Whether clocks are further apart than two nodes' may be. Then an orderer may write below what the one before it has left
    /// behind without an acknowledgement, until its node has noticed its clock: counters prove nothing.
    pub fn clocks_are_apart(&self) -> bool {
        self.is_poisoned() || self.offsets().any(|offset| offset < -500)
    }

    /// How far ahead of the true time any clock ever is, at most.
    pub fn ahead_ms(&self) -> Millis {
        self.offsets().chain([self.skew_ms]).max().unwrap_or(0).max(0) as Millis
    }

    /// By how much clocks are set off.
    fn offsets(&self) -> impl Iterator<Item = i64> + '_ {
        self.faults.iter().filter_map(|fault| match fault.kind {
            Kind::Clock { offset_ms, .. } => Some(offset_ms),
            _ => None,
        })
    }
}

fn faults(r: &mut Random, options: &Options) -> Vec<Fault> {
    type Draw = fn(&mut Random, &Options) -> Kind;
    let kinds: [(u64, Draw); 9] = [
        (700, |r, o| Kind::Kill { node: node(r, o), down_ms: r.within(100, 12_000) }),
        (400, |r, _| Kind::KillMover { pick: r.below(8) as usize, down_ms: r.within(100, 12_000) }),
        (500, |r, o| Kind::Pause {
            node: node(r, o),
            ms: if r.chance(100) { r.within(10_000, 60_000) } else { r.within(50, 8_000) },
        }),
        (400, |r, o| Kind::Slow { node: node(r, o), extra_ms: r.within(5, 500), ms: r.within(500, 10_000) }),
        (700, partition),
        (500, |r, o| Kind::Clog { from: node(r, o), to: node(r, o), ms: r.within(100, 5_000) }),
        (400, |r, o| Kind::Clock { node: node(r, o), offset_ms: r.signed(-o.skew_ms, o.skew_ms) }),
        (500, |_, _| Kind::Join),
        (400, |r, o| Kind::Drain { node: node(r, o) }),
    ];
    let mut drawn: Vec<Draw> =
        kinds.iter().filter(|(permille, _)| r.chance(*permille)).map(|(_, draw)| *draw).collect();
    if drawn.len() < 3 {
        // Joins and drains alone find their limits soon, and then nothing happens.
        drawn.extend([kinds[0].1, kinds[4].1, kinds[5].1]);
    }
    let end = options.seconds * 1000;
    let count = r.within(36, 64);
    let mut faults: Vec<Fault> = (0..count)
        .map(|_| {
            let draw = *r.pick(&drawn);
            Fault { at: r.within(500, end.saturating_sub(500).max(500)), kind: draw(r, options) }
        })
        .collect();
    if options.outlier {
        let (node, at) = (node(r, options), r.within(500, end / 2));
        let offset_ms = *r.pick(&[-3_600_000, -10_000, 10_000, 3_600_000]);
        faults.push(Fault { at, kind: Kind::Clock { node, offset_ms } });
    }
    faults.sort_by_key(|fault| fault.at);
    faults
}

fn node(r: &mut Random, options: &Options) -> usize {
    r.below(options.max_nodes as u64) as usize
}

fn partition(r: &mut Random, o: &Options) -> Kind {
    let all = o.max_nodes;
    let mut cut = Vec::new();
    let both = |cut: &mut Vec<(usize, usize)>, a: usize, b: usize| cut.extend([(a, b), (b, a)]);
    let mut far = Vec::new();
    match r.below(5) {
        // One node alone.
        0 => {
            let one = node(r, o);
            (0..all).filter(|&other| other != one).for_each(|other| both(&mut cut, one, other));
            far.push(one);
        }
        // One node hears nobody, or nobody hears it.
        1 => {
            let (one, deaf) = (node(r, o), r.chance(500));
            let others = (0..all).filter(|&other| other != one);
            others.for_each(|other| cut.push(if deaf { (other, one) } else { (one, other) }));
        }
        // Two halves.
        2 => {
            let side: Vec<bool> = (0..all).map(|_| r.chance(500)).collect();
            for a in 0..all {
                (0..all).filter(|&b| side[a] && !side[b]).for_each(|b| both(&mut cut, a, b));
            }
            far = (0..all).filter(|&a| side[a]).collect();
        }
        // Two halves with one node that reaches both.
        3 => {
            let bridge = node(r, o);
            let side: Vec<bool> = (0..all).map(|_| r.chance(500)).collect();
            for a in (0..all).filter(|&a| a != bridge) {
                (0..all).filter(|&b| b != bridge && side[a] && !side[b]).for_each(|b| both(&mut cut, a, b));
            }
        }
        // One link, one way.
        _ => cut.push((node(r, o), node(r, o))),
    }
    if r.chance(400) {
        far.clear();
    }
    let most = o.replace_after_ms.saturating_sub(5_500).max(1_000);
    Kind::Partition { cut, far, ms: r.within(100, 15_000).min(most) }
}
