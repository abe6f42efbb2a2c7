//! How many bytes conversations may move: a token bucket in the machine's time, whose rate gives way to other work.
//!
//! The rate of filling is controlled by delay, as in LEDBAT (RFC 6817). Each question that moves data is timed, from sending
//! to its answer; the least of the last half minute is what the path to that peer takes when nobody waits. An answer that
//! takes more than [`TARGET_MS`] longer met a queue: for the network, for the source's processor, or for this one. Clients'
//! operations wait in the same queues, so the rate is cut by a third. While answers are quick it grows, the faster the longer
//! none was slow: a busy cluster is seldom probed, and an idle one filled at full speed within a second.
//!
//! ```text
//!   rate  ─── quick: × e^(t²/2), t seconds since the last slow answer, at most × e⁴ per second ──▶ most
//!         ◀── slow, asked again, or refused as busy: × ⅔, once per round trip and 20 ms ────────── floor
//! ```
//!
//! It never falls below a floor, or copies would be missing for as long as there is work. A path that becomes longer for good
//! is known as such after half a minute.
//!
//! A question takes a page's worth of tokens when it is asked, not only when the answer is here: otherwise all streams would
//! ask in the moment in which there is one token.
//!
//! Repair and purge have a fixed rate: they move what differs, at a fifth of what filling may, and how soon copies are equal
//! again is promised.

use std::collections::BTreeMap;

use gridkv_engine::Millis;

use crate::ids::NodeNo;
use crate::replica::ANSWER_BYTES;

/// How much longer than the shortest an answer may take: about what a client's operation takes under load, so that what it
/// waits behind a page at most doubles it. Less would be lost in the milliseconds in which time is counted.
const TARGET_MS: Millis = 2;
/// The least adaptive rate: a gigabyte in eight minutes, and one page in 31 ms.
const FLOOR: u64 = 2 << 20;
/// The rate at the beginning: four cuts from the floor, and two thirds of a second from 100 MiB.
const START: u64 = 8 << 20;
/// The rate is cut once in that time.
const CUT_MS: Millis = 20;
/// Since the last slow answer: as long as that, growth becomes faster.
const CALM_MS: Millis = 4000;
/// The time between two answers for which the rate grows, at most: it was not tried for longer than that.
const STEP_MS: Millis = 50;
/// A rate that nobody had to wait for in that time is not tried either, and does not grow.
const TRIED_MS: Millis = 100;
/// After that time without questions what was learnt is old: it begins anew, and no faster than at first.
const IDLE_MS: Millis = 2000;
/// Round trips are remembered once or twice as long as that.
const WINDOW_MS: Millis = 15_000;
/// What a bucket holds at most, in milliseconds of its rate, unless a page is more. Deadlines are looked at every five.
const BURST_MS: i64 = 8;
/// What a question takes in advance, and at most in milliseconds of the least rate: others wait for as long, though it may
/// come back at once.
const PAGE: i64 = ANSWER_BYTES as i64;
const PAGE_MS: i64 = 32;

/// The shortest round trip to a peer, of the present window and the one before.
#[derive(Clone, Copy, Debug)]
struct Base {
    since: Millis,
    before: Millis,
    present: Millis,
}

impl Base {
    fn is_known(&self, now: Millis) -> bool {
        now < self.since + 2 * WINDOW_MS
    }
}

/// Bytes that may be moved, shared by the conversations of one kind.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes per second: the present rate, and its bounds.
    rate: u64,
    floor: u64,
    most: u64,
    /// What a question takes in advance.
    page: i64,
    tokens: i64,
    /// When it was looked at last.
    at: Millis,
    bases: BTreeMap<NodeNo, Base>,
    /// When a question had to wait.
    waited: Option<Millis>,
    /// When an answer came last, when one was slow, when the rate was cut.
    answered: Millis,
    slow: Option<Millis>,
    cut: Option<Millis>,
}

impl Bucket {
    /// One with a fixed rate.
    pub(crate) fn new(bytes_per_second: u64) -> Bucket {
        let most = bytes_per_second.clamp(1000, 1 << 40);
        let mut bucket = Bucket {
            rate: most,
            floor: most,
            most,
            page: 0,
            tokens: 0,
            at: 0,
            bases: BTreeMap::new(),
            waited: None,
            answered: 0,
            slow: None,
            cut: None,
        };
        bucket.fill_up();
        bucket
    }

    /// One that gives way, with a rate up to that one.
    pub(crate) fn yielding(most: u64) -> Bucket {
        let mut bucket = Bucket::new(most);
        bucket.floor = FLOOR.min(bucket.most);
        bucket.rate = START.min(bucket.most);
        bucket.fill_up();
        bucket
    }

    fn fill_up(&mut self) {
        self.page = PAGE.min((self.floor / 1000) as i64 * PAGE_MS);
        self.tokens = self.burst();
    }

    /// Bytes per second that it gives now.
    pub(crate) fn rate(&self) -> u64 {
        self.rate
    }

    fn per_ms(&self) -> i64 {
        (self.rate / 1000) as i64
    }

    fn burst(&self) -> i64 {
        (self.per_ms() * BURST_MS).max(self.page)
    }

    /// Whether something may be asked now.
    pub(crate) fn ready(&mut self, now: Millis) -> bool {
        if now >= self.ready_at() + IDLE_MS && self.floor < self.most {
            self.rate = self.rate.min(START.min(self.most));
            self.slow = None;
        }
        let passed = now.saturating_sub(self.at).min(1 << 20) as i64;
        self.at = self.at.max(now);
        self.tokens = (self.tokens + passed * self.per_ms()).min(self.burst());
        if self.tokens <= 0 {
            self.waited = Some(now);
        }
        self.tokens > 0
    }

    /// When there is something in it again.
    pub(crate) fn ready_at(&self) -> Millis {
        self.at + (self.tokens.min(0).unsigned_abs() / self.per_ms() as u64) + 1
    }

    /// A question is asked: what it moves is taken when it is known, and a page until then. A lost answer's page stays taken.
    pub(crate) fn asked(&mut self) {
        self.tokens -= self.page;
    }

    /// Bytes that came or are sent.
    pub(crate) fn spend(&mut self, bytes: usize) {
        self.tokens -= bytes as i64;
    }

    /// The answer to a question that was asked at `asked`.
    pub(crate) fn answered(&mut self, now: Millis, peer: NodeNo, asked: Millis) {
        self.tokens = (self.tokens + self.page).min(self.burst());
        if self.floor == self.most {
            return;
        }
        let took = now.saturating_sub(asked);
        let tried = now.saturating_sub(self.answered).min(STEP_MS);
        self.answered = now;
        if took > self.base(now, peer, took) + TARGET_MS {
            self.on_slow(now, asked);
        } else if self.waited.is_some_and(|at| now <= at + TRIED_MS) {
            let calm = self.slow.map_or(CALM_MS, |at| now.saturating_sub(at).min(CALM_MS));
            self.rate = (self.rate + self.rate * calm * tried / 1_000_000).min(self.most);
        }
    }

    /// A question that was asked at `asked` met a queue, was refused for having too much to do, or was not answered.
    pub(crate) fn on_slow(&mut self, now: Millis, asked: Millis) {
        self.slow = Some(now);
        // What was asked before the last cut says nothing about the rate since.
        if self.cut.is_none_or(|cut| asked >= cut && now >= cut + CUT_MS) {
            self.cut = Some(now);
            self.rate = (self.rate - self.rate / 3).max(self.floor);
            self.tokens = self.tokens.min(self.burst());
        }
    }

    /// The shortest round trip to a peer, this one included.
    fn base(&mut self, now: Millis, peer: NodeNo, took: Millis) -> Millis {
        if !self.bases.contains_key(&peer) {
            // Peers come and go, and few are sources at a time.
            self.bases.retain(|_, base| base.is_known(now));
        }
        let base = self.bases.entry(peer).or_insert(Base { since: now, before: took, present: took });
        if now >= base.since + WINDOW_MS {
            let before = if base.is_known(now) { base.present } else { took };
            *base = Base { since: now, before, present: took };
        }
        base.present = base.present.min(took);
        base.present.min(base.before)
    }

    /// Whether what it holds is within its bounds.
    pub(crate) fn invariants(&self) {
        assert!((self.floor..=self.most).contains(&self.rate), "the rate is within its bounds");
        assert!(self.tokens <= self.burst(), "no more is saved than a burst");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const MOST: u64 = 100 << 20;
    const PEER: NodeNo = NodeNo(7);

    /// Moves pages in four streams for a while, each answered after `took`; how many bytes came.
    fn run(bucket: &mut Bucket, now: &mut Millis, ms: Millis, peer: NodeNo, took: impl Fn(u64) -> Millis) -> u64 {
        let end = *now + ms;
        let mut under_way: Vec<(Millis, Millis)> = Vec::new();
        let mut bytes = 0;
        while *now < end {
            for (asked, _) in under_way.extract_if(.., |(_, back)| *back <= *now).collect::<Vec<_>>() {
                bucket.spend(ANSWER_BYTES);
                bucket.answered(*now, peer, asked);
                bytes += ANSWER_BYTES as u64;
            }
            while under_way.len() < 4 && bucket.ready(*now) {
                bucket.asked();
                under_way.push((*now, *now + took(bucket.rate())));
            }
            bucket.invariants();
            *now += 1;
        }
        bytes
    }

    #[test]
    fn with_quick_answers_the_rate_climbs_to_the_maximum() {
        let (mut bucket, mut now) = (Bucket::yielding(MOST), 5000);
        assert!(bucket.rate() < MOST / 8);
        run(&mut bucket, &mut now, 1000, PEER, |_| 1);
        assert_eq!(bucket.rate(), MOST);
        let bytes = run(&mut bucket, &mut now, 1000, PEER, |_| 1);
        assert!((MOST * 9 / 10..MOST * 11 / 10).contains(&bytes), "{bytes}");
        // After a pause it does not go on at a rate that was right some time ago.
        now += 60_000;
        assert!(bucket.ready(now) && bucket.rate() < MOST / 8);
    }

    #[test]
    fn with_slow_answers_it_falls_to_the_floor_and_comes_back() {
        let (mut bucket, mut now) = (Bucket::yielding(MOST), 5000);
        run(&mut bucket, &mut now, 2000, PEER, |_| 1);
        run(&mut bucket, &mut now, 600, PEER, |_| 6);
        assert_eq!(bucket.rate(), FLOOR);
        let bytes = run(&mut bucket, &mut now, 4000, PEER, |_| 6);
        assert_eq!(bucket.rate(), FLOOR);
        assert!((FLOOR * 3..FLOOR * 5).contains(&bytes), "it goes on, slowly: {bytes}");
        run(&mut bucket, &mut now, 5000, PEER, |_| 1);
        assert_eq!(bucket.rate(), MOST);
    }

    #[test]
    fn it_stays_about_where_answers_become_slow() {
        const KNEE: u64 = 20 << 20;
        let (mut bucket, mut now) = (Bucket::yielding(MOST), 5000);
        let (asked, slow) = (Cell::new(0), Cell::new(0));
        let took = |rate: u64| {
            asked.set(asked.get() + 1);
            slow.set(slow.get() + u64::from(rate > KNEE));
            if rate > KNEE { 9 } else { 1 }
        };
        run(&mut bucket, &mut now, 3000, PEER, took);
        asked.set(0);
        slow.set(0);
        let bytes = run(&mut bucket, &mut now, 10_000, PEER, took);
        assert!((KNEE * 10 / 2..KNEE * 10 * 11 / 10).contains(&bytes), "{bytes}");
        assert!(slow.get() > 0 && slow.get() * 50 < asked.get(), "{slow:?} of {asked:?}: it tries more, but seldom");
    }

    #[test]
    fn one_round_trip_cuts_once_and_a_lost_question_counts() {
        let mut bucket = Bucket::yielding(MOST);
        (0..4).for_each(|_| bucket.on_slow(1000, 990));
        bucket.on_slow(1050, 999);
        assert_eq!(bucket.rate(), START - START / 3);
        bucket.on_slow(2001, 1001);
        assert!(bucket.rate() < START / 2);
    }

    #[test]
    fn a_path_that_became_longer_for_good_does_not_starve_it() {
        let (mut bucket, mut now) = (Bucket::yielding(MOST), 5000);
        run(&mut bucket, &mut now, 2000, PEER, |_| 1);
        run(&mut bucket, &mut now, 10_000, PEER, |_| 30);
        assert_eq!(bucket.rate(), FLOOR);
        run(&mut bucket, &mut now, 2 * WINDOW_MS, PEER, |_| 30);
        // Four pages in 30 ms are all that these streams can move: the rate follows what is used.
        assert!(bucket.rate() > 3 * FLOOR, "{}", bucket.rate());
        // And it is each peer's own.
        run(&mut bucket, &mut now, 2000, NodeNo(8), |_| 1);
        let before = bucket.rate();
        run(&mut bucket, &mut now, 100, PEER, |_| 30);
        assert_eq!(bucket.rate(), before);
    }

    #[test]
    fn a_fixed_rate_stays_and_a_small_one_is_its_own_floor() {
        let (mut bucket, mut now) = (Bucket::new(MOST), 5000);
        run(&mut bucket, &mut now, 1000, PEER, |rate| rate / MOST * 20);
        bucket.on_slow(now, now);
        assert_eq!(bucket.rate(), MOST);
        let mut small = Bucket::yielding(50_000);
        small.on_slow(now, now);
        assert_eq!(small.rate(), 50_000);
    }
}
