//! What a run measured: counts, latencies and errors per kind of operation, added up over threads.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::latency::{Latencies, Percentiles};
use crate::table::Table;
use crate::units;
use crate::workload::Kind;

/// The most different beginnings of errors that are told apart.
const MAX_PREFIXES: usize = 64;

/// Everything that one run, or one thread of it, measured.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// One per kind, in the order of [`Kind::ALL`].
    latencies: [Latencies; Kind::ALL.len()],
    /// How often each error came, by its first word.
    pub(crate) errors: BTreeMap<String, u64>,
    /// Reads that found nothing.
    pub(crate) misses: u64,
    /// Reads whose value was not that of the key, when values are checked.
    pub(crate) wrong: u64,
    /// Operations per second, over all threads.
    pub(crate) rate: f64,
    /// From the first request to the end.
    pub(crate) elapsed: Duration,
    /// The longest time in which no reply came though some were owed.
    pub(crate) longest_pause: Duration,
    /// The longest time in which the generator itself did not look: what it says about pauses is no better than this.
    pub(crate) own_pause: Duration,
    /// The share of time in which the generator had something to do, that of its busiest thread. Near 1 it is the
    /// generator that is measured, not the server.
    pub(crate) busy: f64,
}

/// A report as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    operations: u64,
    per_second: f64,
    seconds: f64,
    kinds: BTreeMap<&'static str, KindFigures>,
    errors: BTreeMap<String, u64>,
    misses: u64,
    wrong_values: u64,
    longest_pause_us: f64,
    generator_pause_us: f64,
    generator_busy: f64,
}

#[derive(Debug, Serialize)]
struct KindFigures {
    operations: u64,
    #[serde(flatten)]
    latency: Percentiles,
}

impl Report {
    pub(crate) fn new() -> Report {
        Report {
            latencies: std::array::from_fn(|_| Latencies::new()),
            errors: BTreeMap::new(),
            misses: 0,
            wrong: 0,
            rate: 0.0,
            elapsed: Duration::ZERO,
            longest_pause: Duration::ZERO,
            own_pause: Duration::ZERO,
            busy: 0.0,
        }
    }

    /// Notes `count` operations of a kind that took `ns` each.
    #[inline]
    pub(crate) fn record(&mut self, kind: Kind, ns: u64, count: u64) {
        self.latencies[kind as usize].record(ns, count);
    }

    /// Notes an error reply by its first word.
    pub(crate) fn error(&mut self, text: &[u8]) {
        self.errors_by(prefix(text), 1);
    }

    /// Notes `count` errors under one name.
    pub(crate) fn errors_by(&mut self, prefix: String, count: u64) {
        let known = self.errors.len() < MAX_PREFIXES || self.errors.contains_key(&prefix);
        *self.errors.entry(if known { prefix } else { "(others)".into() }).or_default() += count;
    }

    /// Adds what another thread measured meanwhile.
    pub(crate) fn add(&mut self, other: &Report) {
        for (mine, theirs) in self.latencies.iter_mut().zip(&other.latencies) {
            mine.add(theirs);
        }
        for (prefix, count) in &other.errors {
            self.errors_by(prefix.clone(), *count);
        }
        self.misses += other.misses;
        self.wrong += other.wrong;
        self.rate += other.rate;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.longest_pause = self.longest_pause.max(other.longest_pause);
        self.own_pause = self.own_pause.max(other.own_pause);
        self.busy = self.busy.max(other.busy);
    }

    /// Operations answered without an error.
    pub(crate) fn operations(&self) -> u64 {
        self.latencies.iter().map(Latencies::count).sum()
    }

    pub(crate) fn of(&self, kind: Kind) -> &Latencies {
        &self.latencies[kind as usize]
    }

    /// Latencies of all kinds together.
    pub(crate) fn all(&self) -> Latencies {
        let mut all = Latencies::new();
        self.latencies.iter().for_each(|l| all.add(l));
        all
    }

    pub(crate) fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }

    fn kinds(&self) -> impl Iterator<Item = (Kind, &Latencies)> {
        Kind::ALL.into_iter().map(|kind| (kind, self.of(kind))).filter(|(_, l)| l.count() > 0)
    }

    pub(crate) fn figures(&self) -> Figures {
        let kinds = self
            .kinds()
            .map(|(kind, l)| (kind.name(), KindFigures { operations: l.count(), latency: l.percentiles() }))
            .collect();
        Figures {
            operations: self.operations(),
            per_second: self.rate,
            seconds: self.elapsed.as_secs_f64(),
            kinds,
            errors: self.errors.clone(),
            misses: self.misses,
            wrong_values: self.wrong,
            longest_pause_us: self.longest_pause.as_secs_f64() * 1e6,
            generator_pause_us: self.own_pause.as_secs_f64() * 1e6,
            generator_busy: self.busy,
        }
    }

    /// A table for people, and below it what went wrong, if anything did.
    pub(crate) fn text(&self) -> String {
        let mut table = Table::new(["operation", "count", "rate", "mean", "p50", "p90", "p99", "p99.9", "max"]);
        let operations = self.operations();
        let share = |count: u64| self.rate * count as f64 / operations.max(1) as f64;
        let mut row = |name: &str, latencies: &Latencies| {
            let p = latencies.percentiles();
            let figures = [p.mean_us, p.p50_us, p.p90_us, p.p99_us, p.p999_us, p.max_us].map(units::latency);
            let counts = [name.to_owned(), latencies.count().to_string(), units::rate(share(latencies.count()))];
            table.row(counts.into_iter().chain(figures));
        };
        self.kinds().for_each(|(kind, latencies)| row(kind.name(), latencies));
        if self.kinds().count() != 1 {
            row("all", &self.all());
        }
        let mut text = table.to_string();
        let pause = self.longest_pause.as_secs_f64() * 1e6;
        let own = self.own_pause.as_secs_f64() * 1e6;
        text += &format!(
            "\n{:.2} s; longest wait for any reply {}; generator busy {:.0} %, it stood still for up to {}\n",
            self.elapsed.as_secs_f64(),
            units::latency(pause),
            self.busy * 100.0,
            units::latency(own)
        );
        if self.misses > 0 {
            text += &format!("{} reads found no value\n", self.misses);
        }
        if self.wrong > 0 {
            text += &format!("{} reads returned a WRONG value\n", self.wrong);
        }
        for (prefix, count) in &self.errors {
            text += &format!("{count} operations ended with {prefix}\n");
        }
        text
    }
}

/// The first word of an error: what kind it is.
fn prefix(text: &[u8]) -> String {
    let word = text.split(|b| b.is_ascii_whitespace()).next().unwrap_or_default();
    match word {
        b"" => "(an error without text)".into(),
        word => String::from_utf8_lossy(&word[..word.len().min(40)]).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_counted_by_their_first_word() {
        let mut report = Report::new();
        for text in [&b"OOM command not allowed"[..], b"ERR one", b"ERR two", b""] {
            report.error(text);
        }
        let seen: Vec<_> = report.errors.iter().map(|(prefix, count)| (prefix.as_str(), *count)).collect();
        assert_eq!(seen, [("(an error without text)", 1), ("ERR", 2), ("OOM", 1)]);
        for i in 0..1000 {
            report.error(format!("E{i}").as_bytes());
        }
        assert!(report.errors.len() <= MAX_PREFIXES + 1);
        assert_eq!(report.error_count(), 1004);
    }

    #[test]
    fn threads_add_up() {
        let part = |kind, count, rate| {
            let mut report = Report::new();
            report.record(kind, 1000, count);
            (report.rate, report.misses, report.elapsed) = (rate, 1, Duration::from_secs(count));
            report.error(b"ERR x");
            report
        };
        let mut sum = Report::new();
        sum.add(&part(Kind::Get, 3, 10.0));
        sum.add(&part(Kind::Set, 4, 20.0));
        assert_eq!((sum.operations(), sum.of(Kind::Set).count(), sum.misses), (7, 4, 2));
        assert_eq!((sum.rate, sum.elapsed, sum.error_count()), (30.0, Duration::from_secs(4), 2));
        let text = sum.text();
        assert!(text.contains("get") && text.contains("all") && text.contains("2 operations ended with ERR"), "{text}");
        let json = serde_json::to_value(sum.figures()).unwrap();
        assert_eq!(json["kinds"]["get"]["operations"], 3);
        assert!(json["kinds"]["get"]["p99_us"].is_number());
    }
}
