//! `MEMORY STATS`, `DOCTOR`, `PURGE`: what data takes, beside what the process takes.

use gridkv_engine::reply::Reply;

use super::Outcome;
use super::gather::each_core;
use super::info::{Process, human};
use crate::cores::CoreRc;
use crate::metrics::CoreMetrics;

/// What `MEMORY` looks at.
struct Memory {
    total: CoreMetrics,
    process: Process,
    cores: usize,
}

async fn look(core: &CoreRc) -> Memory {
    let parts = each_core(core, |core| core.metrics()).await;
    let mut total = CoreMetrics::new();
    parts.iter().for_each(|part| total.add(part));
    Memory { total, process: Process::read(), cores: parts.len() }
}

/// `MEMORY STATS`.
pub(crate) async fn stats(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    write(&look(core).await, out);
    Ok(())
}

fn write(memory: &Memory, out: &mut dyn Reply) {
    let data = memory.total.store.memory_bytes;
    let keys = memory.total.store.keys;
    let numbers = [
        ("peak.allocated", memory.process.rss_peak_bytes),
        ("total.allocated", data),
        ("clients.normal", memory.total.output_bytes),
        ("keys.count", keys),
        ("keys.bytes-per-key", data.checked_div(keys).unwrap_or(0)),
        ("dataset.bytes", data),
        ("process.rss", memory.process.rss_bytes),
        ("maxmemory", memory.total.max_memory),
        ("cores", memory.cores as u64),
    ];
    out.map(numbers.len() + 1);
    for (name, value) in numbers {
        out.bulk(name.as_bytes());
        out.integer(value as i64);
    }
    out.bulk(b"fragmentation");
    out.double(memory.process.rss_bytes as f64 / data.max(1) as f64);
}

/// `MEMORY DOCTOR`.
pub(crate) async fn doctor(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    out.verbatim(&diagnosis(&look(core).await));
    Ok(())
}

/// Above this part of the limit, in percent, writes will soon be refused.
const NEARLY_FULL: u64 = 90;

fn diagnosis(memory: &Memory) -> String {
    let (data, limit) = (memory.total.store.memory_bytes, memory.total.max_memory);
    let mut text = format!("Data takes {} in {} keys; ", human(data), memory.total.store.keys);
    text += &format!(
        "the process {}, at most {} so far.\n",
        human(memory.process.rss_bytes),
        human(memory.process.rss_peak_bytes)
    );
    text += &match limit {
        0 => "There is no limit (maxmemory 0): when the machine is full, the system ends the process.\n".to_owned(),
        _ if memory.total.store.refused > 0 => {
            format!(
                "Of the limit of {} {} % are in use, and {} writes were refused. Delete keys, let them expire, or \
                     raise maxmemory.\n",
                human(limit),
                data * 100 / limit,
                memory.total.store.refused
            )
        }
        _ if data >= limit / 100 * NEARLY_FULL => {
            format!(
                "Of the limit of {} {} % are in use: writes will soon be refused.\n",
                human(limit),
                data * 100 / limit
            )
        }
        _ => format!("Of the limit of {} {} % are in use.\n", human(limit), data * 100 / limit),
    };
    text
}

/// `MEMORY PURGE`: the allocator returns memory by itself, so there is nothing to ask for.
pub(crate) fn purge(out: &mut dyn Reply) -> Outcome {
    out.ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gridkv_engine::store::StoreStats;
    use gridkv_net::resp::{Protocol, Writer};

    fn memory(used: u64, limit: u64, refused: u64) -> Memory {
        let mut total = CoreMetrics::new();
        total.store = StoreStats { memory_bytes: used, keys: 4, refused, ..StoreStats::default() };
        total.max_memory = limit;
        Memory { total, process: Process { rss_bytes: 300, ..Process::default() }, cores: 2 }
    }

    #[test]
    fn the_doctor_speaks_of_the_limit_that_hurts() {
        for (memory, words) in [
            (memory(100, 0, 0), "There is no limit"),
            (memory(1 << 20, 4 << 20, 0), "Of the limit of 4.00M 25 % are in use.\n"),
            (memory(95 << 20, 100 << 20, 0), "will soon be refused"),
            (memory(50 << 20, 100 << 20, 3), "3 writes were refused"),
        ] {
            let text = diagnosis(&memory);
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn numbers_come_in_pairs() {
        let mut out = Vec::new();
        write(&memory(100, 0, 0), &mut Writer::new(Protocol::Resp3, &mut out));
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("%10\r\n"), "{text}");
        assert!(text.contains("$18\r\nkeys.bytes-per-key\r\n:25\r\n"), "{text}");
        assert!(text.ends_with("$13\r\nfragmentation\r\n,3\r\n"), "{text}");
    }
}
