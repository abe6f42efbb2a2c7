//! Latencies: HDR histograms of nanoseconds, three significant digits, up to one minute.

use hdrhistogram::Histogram;
use serde::Serialize;

const LONGEST_NS: u64 = 60_000_000_000;

/// Latencies of one kind of operation.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    histogram: Histogram<u64>,
}

/// What is told about them, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) mean_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) p9999_us: f64,
    pub(crate) max_us: f64,
}

impl Latencies {
    pub(crate) fn new() -> Latencies {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("the bounds are valid");
        Latencies { histogram }
    }

    /// Notes `count` operations that took `ns` each; beyond a minute counts as a minute.
    #[inline]
    pub(crate) fn record(&mut self, ns: u64, count: u64) {
        self.histogram.saturating_record_n(ns.max(1), count);
    }

    pub(crate) fn add(&mut self, other: &Latencies) {
        self.histogram.add(&other.histogram).expect("all histograms have the same bounds");
    }

    pub(crate) fn count(&self) -> u64 {
        self.histogram.len()
    }

    pub(crate) fn at_us(&self, quantile: f64) -> f64 {
        self.histogram.value_at_quantile(quantile) as f64 / 1e3
    }

    pub(crate) fn max_us(&self) -> f64 {
        self.histogram.max() as f64 / 1e3
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        Percentiles {
            mean_us: self.histogram.mean() / 1e3,
            p50_us: self.at_us(0.5),
            p90_us: self.at_us(0.9),
            p99_us: self.at_us(0.99),
            p999_us: self.at_us(0.999),
            p9999_us: self.at_us(0.9999),
            max_us: self.max_us(),
        }
    }
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies::new()
    }
}

/// The middle of some figures (the mean of the two middle ones), 0 for none.
pub(crate) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The least and the greatest of some figures.
pub(crate) fn spread(figures: &[f64]) -> (f64, f64) {
    figures.iter().fold((f64::INFINITY, 0.0), |(low, high), &x| (x.min(low), x.max(high)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_ramp() {
        let mut latencies = Latencies::new();
        (1..=1000).for_each(|us| latencies.record(us * 1000, 1));
        let p = latencies.percentiles();
        assert!((p.p50_us / 500.0 - 1.0).abs() < 0.01 && (p.p99_us / 990.0 - 1.0).abs() < 0.01);
        assert!((p.max_us / 1000.0 - 1.0).abs() < 0.01 && latencies.count() == 1000);
        latencies.record(u64::MAX, 2);
        assert!(latencies.max_us() >= 60e6 * 0.99);
    }

    #[test]
    fn middle_figures() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(spread(&[2.0, 1.0, 3.0]), (1.0, 3.0));
    }
}
