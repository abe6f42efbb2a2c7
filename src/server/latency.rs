//! The latency monitor of one core: the worst command of each second in which one was too slow, by event.
//!
//! Events are Redis's for commands: `command`, and `fast-command` for those that the table calls fast. Bounded to
//! [`MAX_SAMPLES`] seconds per event, as in Redis.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::time::Duration;

use gridkv_engine::Millis;

/// Seconds remembered of an event.
const MAX_SAMPLES: usize = 160;
/// Width of the longest bar of [`graph`].
const BAR: u64 = 40;

/// What can be slow.
pub(crate) const EVENTS: [&str; 2] = ["command", "fast-command"];

/// The worst of one second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Unix seconds.
    pub(crate) at: u64,
    pub(crate) ms: u64,
}

/// The samples of one event, oldest first, and the worst since the last reset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Series {
    pub(crate) samples: VecDeque<Sample>,
    pub(crate) worst_ms: u64,
}

impl Series {
    fn record(&mut self, sample: Sample) {
        self.worst_ms = self.worst_ms.max(sample.ms);
        match self.samples.back_mut() {
            Some(last) if last.at == sample.at => last.ms = last.ms.max(sample.ms),
            _ => self.samples.push_back(sample),
        }
        if self.samples.len() > MAX_SAMPLES {
            self.samples.pop_front();
        }
    }
}

/// The samples of one core.
#[derive(Clone, Debug, Default)]
pub(crate) struct Monitor {
    series: [Series; EVENTS.len()],
}

impl Monitor {
    /// A command was too slow.
    pub(crate) fn record(&mut self, now: Millis, took: Duration, fast: bool) {
        self.series[usize::from(fast)].record(Sample { at: now / 1000, ms: took.as_millis() as u64 });
    }

    /// A copy of the samples, by event.
    pub(crate) fn series(&self) -> [Series; EVENTS.len()] {
        self.series.clone()
    }

    /// Forgets the samples of one event; whether there were any.
    pub(crate) fn reset(&mut self, event: usize) -> bool {
        !std::mem::take(&mut self.series[event]).samples.is_empty()
    }
}

/// The place of an event in [`EVENTS`], its name in any case.
pub(crate) fn find(name: &[u8]) -> Option<usize> {
    EVENTS.iter().position(|event| event.as_bytes().eq_ignore_ascii_case(name))
}

/// One event over all cores: the worst of each second, oldest first.
pub(crate) fn merge<'a>(cores: impl Iterator<Item = &'a Series>) -> Series {
    let mut seconds = BTreeMap::new();
    let mut merged = Series::default();
    for series in cores {
        merged.worst_ms = merged.worst_ms.max(series.worst_ms);
        for sample in &series.samples {
            let worst = seconds.entry(sample.at).or_insert(0);
            *worst = sample.ms.max(*worst);
        }
    }
    let skipped = seconds.len().saturating_sub(MAX_SAMPLES);
    merged.samples = seconds.into_iter().skip(skipped).map(|(at, ms)| Sample { at, ms }).collect();
    merged
}

/// Samples as a picture: a line each, newest last.
pub(crate) fn graph(event: &str, series: &Series, now: Millis) -> String {
    let most = series.samples.iter().map(|sample| sample.ms).max().unwrap_or(0).max(1);
    let least = series.samples.iter().map(|sample| sample.ms).min().unwrap_or(0);
    let mut text = format!("{event} - high {most} ms, low {least} ms (all time high {} ms)\n", series.worst_ms);
    text += &"-".repeat(80);
    text.push('\n');
    for sample in &series.samples {
        let bar = "#".repeat((sample.ms * BAR / most).max(1) as usize);
        let ago = (now / 1000).saturating_sub(sample.at);
        writeln!(text, "{ago:>8}s ago {:>8} ms {bar}", sample.ms).expect("a String takes everything");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_keeps_its_worst_and_cores_are_merged() {
        let (mut here, mut there) = (Monitor::default(), Monitor::default());
        for (monitor, now, ms) in [(0, 1_000, 300), (0, 1_900, 200), (1, 1_500, 400), (0, 3_000, 50)] {
            let monitor = if monitor == 0 { &mut here } else { &mut there };
            monitor.record(now, Duration::from_millis(ms), false);
        }
        assert_eq!(here.series()[0].samples, [Sample { at: 1, ms: 300 }, Sample { at: 3, ms: 50 }]);
        let merged = merge([&here.series()[0], &there.series()[0]].into_iter());
        assert_eq!(merged.samples, [Sample { at: 1, ms: 400 }, Sample { at: 3, ms: 50 }]);
        assert_eq!(merged.worst_ms, 400);
        assert!(graph("command", &merged, 5_000).contains("all time high 400 ms"));
        assert!(here.reset(0) && !here.reset(0) && !here.reset(1));
    }

    #[test]
    fn memory_is_bounded() {
        let mut monitor = Monitor::default();
        for second in 0..1000 {
            monitor.record(second * 1000, Duration::from_millis(1), true);
        }
        assert_eq!(monitor.series()[1].samples.len(), MAX_SAMPLES);
        assert_eq!(monitor.series()[1].samples.back().unwrap().at, 999);
    }
}
