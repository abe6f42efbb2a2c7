//! `SLOWLOG` and `LATENCY`: what took too long, over all cores.
//!
//! [`Notes`] is the way in: a session calls it for a command that [`Settings::is_slow`] may have found slow. What it keeps lies in
//! the core's own ring and monitor; the commands merge copies of them.
//!
//! Not seen by them on a core that has its data for itself: a plain GET or SET, and what waits for another core. Of a transaction
//! the slow log has the commands there, and not EXEC, as in Redis. On data that other nodes hold too every command of a client is
//! seen, EXEC as a whole, from its begin to its answer, the waiting for other nodes included; the core that coordinates it keeps it.
//!
//! `LATENCY HISTOGRAM` is about all calls, slow or not: `metrics/commands.rs` says which of them are timed.

use std::fmt::Display;
use std::time::Duration;

use gridkv_engine::Millis;
use gridkv_engine::command::{self, Flags, Spec};
use gridkv_engine::reply::Reply;

use super::gather::{each_core, on_core};
use super::latency::{self, EVENTS, Monitor, Series};
use super::settings::Settings;
use super::slowlog::{self, Slow, Slowlog};
use super::{Outcome, integer};
use crate::cluster::requests;
use crate::cores::{CoreRc, Counted};
use crate::metrics::{Called, CoreMetrics, NodeMetrics};

/// Entries that a plain `SLOWLOG GET` shows.
const SHOWN: usize = 10;

/// Where a core keeps what took long.
pub(crate) struct Notes<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) now: Millis,
    pub(crate) slowlog: &'a mut Slowlog,
    pub(crate) latency: &'a mut Monitor,
}

impl Notes<'_> {
    /// Remembers a command of a client if it took long. `args` begins with its name.
    pub(crate) fn note(&mut self, spec: &Spec, took: Duration, args: &[&[u8]], addr: &dyn Display, name: &str) {
        if self.settings.slowlog_threshold.is_some_and(|least| took >= least) {
            self.keep(took, slowlog::shown(args), &addr.to_string(), name);
        }
        self.sample(spec, took);
    }

    fn keep(&mut self, took: Duration, shown: Vec<Vec<u8>>, addr: &str, name: &str) {
        self.slowlog.record(self.now, took, shown, addr, name, self.settings.slowlog_len);
    }

    /// As [`Notes::note`], for the latency monitor only: of EXEC, whose commands are noted themselves.
    pub(crate) fn sample(&mut self, spec: &Spec, took: Duration) {
        if self.settings.latency_threshold.is_some_and(|least| took >= least) {
            self.latency.record(self.now, took, spec.flags.contains(Flags::FAST));
        }
    }
}

/// As [`Notes::note`], for a command on data that other nodes hold too, EXEC as well. Its client may be another core's, which is
/// asked who it is.
pub(crate) fn note_later(core: &CoreRc, slow: requests::Slow) {
    let core = core.clone();
    let counted = Counted::new(&core);
    glommio::spawn_local(async move {
        let _counted = counted;
        // A task runs at once up to its first await, and its maker still borrows the core.
        futures_lite::future::yield_now().await;
        let requests::Slow { core: of, conn, spec, took, shown } = slow;
        let of = of.unwrap_or(core.id).index();
        let who = on_core(&core, of, move |core| core.connections.borrow_mut().as_mut()?.who(conn)).await;
        let (addr, name) = who.flatten().unwrap_or_default();
        let state = &mut *core.state.borrow_mut();
        let mut notes = state.notes();
        if !shown.is_empty() {
            notes.keep(took, shown, &addr, &name);
        }
        notes.sample(spec, took);
    })
    .detach();
}

/// `SLOWLOG GET [count]`, newest first.
pub(crate) async fn get(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    const REFUSAL: &str = "ERR count should be greater than or equal to -1";
    if args.len() > 3 {
        return Err("ERR wrong number of arguments for 'slowlog|get' command".into());
    }
    let count = match args.get(2).map(|count| integer(count).map_err(|_| REFUSAL)).transpose()? {
        None => SHOWN,
        Some(-1) => usize::MAX,
        Some(count) => usize::try_from(count).map_err(|_| REFUSAL)?,
    };
    let most = count.min(core.state.borrow().settings.slowlog_len);
    let found: Vec<Vec<Slow>> = each_core(core, move |core| core.state.borrow().slowlog.newest(most)).await;
    let found = slowlog::merge(found, most);
    out.array(found.len());
    for entry in &found {
        entry.write(out);
    }
    Ok(())
}

/// `SLOWLOG LEN`: as many as `SLOWLOG GET -1` shows.
pub(crate) async fn len(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    let kept: usize = each_core(core, |core| core.state.borrow().slowlog.len()).await.into_iter().sum();
    out.integer(kept.min(core.state.borrow().settings.slowlog_len) as i64);
    Ok(())
}

/// `SLOWLOG RESET`.
pub(crate) async fn reset(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    each_core(core, |core| core.state.borrow_mut().slowlog.clear()).await;
    out.ok();
    Ok(())
}

/// The samples of each event, all cores together.
async fn merged(core: &CoreRc) -> [Series; EVENTS.len()] {
    let cores = each_core(core, |core| core.state.borrow().latency.series()).await;
    std::array::from_fn(|event| latency::merge(cores.iter().map(|series| &series[event])))
}

/// `LATENCY HISTORY event`.
pub(crate) async fn history(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let all = merged(core).await;
    let series = latency::find(args[2]).map(|event| &all[event]);
    out.array(series.map_or(0, |series| series.samples.len()));
    for sample in series.into_iter().flat_map(|series| &series.samples) {
        out.array(2);
        out.integer(sample.at as i64);
        out.integer(sample.ms as i64);
    }
    Ok(())
}

/// `LATENCY LATEST`: name, second, its worst and the worst of all, in milliseconds.
pub(crate) async fn latest(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    let all = merged(core).await;
    let latest = EVENTS.iter().zip(&all).filter_map(|(event, series)| Some((event, series, series.samples.back()?)));
    out.array(latest.clone().count());
    for (event, series, sample) in latest {
        out.array(4);
        out.bulk(event.as_bytes());
        out.integer(sample.at as i64);
        out.integer(sample.ms as i64);
        out.integer(series.worst_ms as i64);
    }
    Ok(())
}

/// `LATENCY RESET [event …]`: how many events had samples.
pub(crate) async fn reset_latency(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let wanted: Vec<usize> = match &args[2..] {
        [] => (0..EVENTS.len()).collect(),
        names => names.iter().filter_map(|name| latency::find(name)).collect(),
    };
    let events = wanted.clone();
    let cores = each_core(core, move |core| {
        let latency = &mut core.state.borrow_mut().latency;
        events.iter().map(|event| latency.reset(*event)).collect::<Vec<bool>>()
    })
    .await;
    let reset = (0..wanted.len()).filter(|place| cores.iter().any(|had| had[*place])).count();
    out.integer(reset as i64);
    Ok(())
}

/// `LATENCY GRAPH event`.
pub(crate) async fn graph(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let all = merged(core).await;
    let Some(event) = latency::find(args[2]).filter(|event| !all[*event].samples.is_empty()) else {
        let name = String::from_utf8_lossy(args[2]);
        return Err(format!("ERR No samples available for event '{name}'").into());
    };
    out.verbatim(&latency::graph(EVENTS[event], &all[event], core.state.borrow().now));
    Ok(())
}

/// `LATENCY DOCTOR`: what the monitor has seen, and where to look.
pub(crate) async fn doctor(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    let all = merged(core).await;
    let node = NodeMetrics {
        cores: each_core(core, |core| core.metrics()).await,
        uptime: core.state.borrow().settings.facts.started.elapsed(),
    };
    let (threshold, now) = {
        let state = core.state.borrow();
        (state.settings.latency_threshold, state.now)
    };
    out.verbatim(&diagnosis(threshold, &all, &node.total(), now));
    Ok(())
}

fn diagnosis(threshold: Option<Duration>, all: &[Series], total: &CoreMetrics, now: Millis) -> String {
    let micros = |quantile: f64| total.latency().value_at_quantile(quantile) / 1000;
    let mut text = format!(
        "Requests since the start: {}; half took up to {} us, 99 % up to {} us, the slowest {} us.\n",
        total.latency().len(),
        micros(0.5),
        micros(0.99),
        micros(1.0),
    );
    let Some(threshold) = threshold else {
        text +=
            "Single slow commands are not watched. CONFIG SET latency-monitor-threshold <milliseconds> begins to.\n";
        return text;
    };
    let seen: Vec<_> = EVENTS.iter().zip(all).filter(|(_, series)| !series.samples.is_empty()).collect();
    if seen.is_empty() {
        text += &format!("No command took {} ms or more.\n", threshold.as_millis());
        return text;
    }
    for (event, series) in seen {
        let latest = series.samples.back().map_or(now, |sample| sample.at * 1000);
        text += &format!(
            "{event}: {} seconds with a command of {} ms or more, the worst {} ms, the latest {} s ago.\n",
            series.samples.len(),
            threshold.as_millis(),
            series.worst_ms,
            now.saturating_sub(latest) / 1000,
        );
    }
    text += "SLOWLOG GET names the commands. KEYS, and values of many megabytes, are the usual causes; use SCAN, and \
             smaller values.\n";
    text
}

/// `LATENCY HISTOGRAM [command …]`: for each command its calls and, for each class of times that some fell into, how many took no
/// longer. A container stands for its subcommands; unknown names are skipped.
pub(crate) async fn histogram(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let mut total = CoreMetrics::new();
    for part in &each_core(core, |core| core.metrics()).await {
        total.add(part);
    }
    let mut found = called(&total, &args[2..]);
    found.retain(|(_, called)| called.calls > 0);
    out.map(found.len());
    for (spec, called) in found {
        out.bulk(spec.name.as_bytes());
        out.map(2);
        out.bulk(b"calls");
        out.integer(called.calls as i64);
        out.bulk(b"histogram_usec");
        let classes = spread(&called);
        out.map(classes.len());
        for (usec, calls) in classes {
            out.integer(usec as i64);
            out.integer(calls as i64);
        }
    }
    Ok(())
}

/// Microseconds and how many calls took no longer. The calls that nobody has timed yet are spread as those that were, so that the
/// last number is that of all calls.
fn spread(called: &Called<'_>) -> Vec<(u64, u64)> {
    let Some(times) = called.times else { return Vec::new() };
    let scaled = |calls: u64| u128::from(calls) * u128::from(called.calls) / u128::from(times.calls().max(1));
    times.classes().map(|(usec, calls)| (usec, scaled(calls) as u64)).collect()
}

/// Commands that were asked for, all or those named, each once.
fn called<'a>(total: &'a CoreMetrics, names: &[&[u8]]) -> Vec<(&'static Spec, Called<'a>)> {
    let wanted: Option<Vec<&'static Spec>> = (!names.is_empty()).then(|| {
        let specs = names.iter().filter_map(|name| named(name));
        specs.flat_map(|spec| std::iter::once(spec).chain(spec.subcommands())).collect()
    });
    let is_wanted = |spec: &Spec| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|one| one.id == spec.id));
    total.commands().filter(|(spec, _)| is_wanted(spec)).collect()
}

/// The command, or `container|subcommand`, of that name.
fn named(name: &[u8]) -> Option<&'static Spec> {
    let mut parts = name.split(|byte| *byte == b'|');
    let spec = command::lookup(parts.next()?)?;
    match (parts.next(), parts.next()) {
        (None, _) => Some(spec),
        (Some(sub), None) => spec.subcommand(sub),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_by_command_container_and_subcommand() {
        let mut total = CoreMetrics::new();
        for (name, calls) in [("get", 2), ("client|id", 1), ("client|list", 3)] {
            total.record_command(named(name.as_bytes()).unwrap(), calls);
        }
        let found = |names: &[&str]| {
            let names: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
            let mut found: Vec<_> =
                called(&total, &names).into_iter().map(|(spec, called)| (spec.name, called.calls)).collect();
            found.sort_unstable();
            found
        };
        assert_eq!(found(&[]), [("client|id", 1), ("client|list", 3), ("get", 2)]);
        assert_eq!(found(&["CLIENT"]), [("client|id", 1), ("client|list", 3)]);
        assert_eq!(found(&["client|id", "client|id", "nothing", "set"]), [("client|id", 1)]);
        assert!(named(b"get|x").is_none() && named(b"client|id|x").is_none());
    }

    #[test]
    fn the_doctor_says_whether_anything_is_watched() {
        let total = CoreMetrics::new();
        let mut monitor = Monitor::default();
        assert!(diagnosis(None, &monitor.series(), &total, 0).contains("latency-monitor-threshold"));
        let threshold = Some(Duration::from_millis(200));
        assert!(diagnosis(threshold, &monitor.series(), &total, 0).contains("No command took 200 ms"));
        monitor.record(5_000, Duration::from_millis(321), false);
        assert!(
            diagnosis(threshold, &monitor.series(), &total, 9_000).contains("the worst 321 ms, the latest 4 s ago")
        );
    }
}
