//! The cases on the node. One function per case; the loops differ in their operation only.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::block_on;
use gridkv::engine::backend::{DEFAULT_BACKEND, Registry};
use gridkv::engine::store::{Store, StoreConfig};
use gridkv::{CoreHandle, Error, GridKv};

use super::stage::{BLOCK, Outcome, Seen, Stage, Task, touch};
use crate::failure::Failure;
use crate::latency::Latencies;

/// Operations under way per core in the uniform cases.
const TASKS: usize = 64;
/// Operations after which a task lets others run even if none of them had to wait.
const TURN: u64 = 256;
/// Threads outside of the node.
const FOREIGN: usize = 2;
/// Long enough for a core to give up polling and sleep.
const PAUSE: Duration = Duration::from_millis(1);
/// The bare store's clock: any time will do.
const NOW: u64 = 1_800_000_000_000;

pub(crate) fn generator(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.beside_the_data(), |core, mut task| async move {
        let mut seen = Seen::default();
        while !task.stopped() {
            for key in task.walk.block(BLOCK) {
                seen.value(Some(black_box(key)));
            }
            core.yield_now().await;
        }
        Ok(seen)
    })
}

pub(crate) fn local_get(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.beside_the_data(), |core, mut task| async move {
        let mut seen = Seen::default();
        while !task.stopped() {
            for key in task.walk.block(BLOCK) {
                seen.sum(core.read(key, touch)?);
            }
            core.yield_now().await;
        }
        Ok(seen)
    })
}

pub(crate) fn local_get_many(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.beside_the_data(), |core, mut task| async move {
        let mut seen = Seen::default();
        while !task.stopped() {
            core.read_many(task.walk.block(BLOCK), |_, value| seen.value(value))?;
            core.yield_now().await;
        }
        Ok(seen)
    })
}

pub(crate) fn local_set(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.beside_the_data(), |core, mut task| async move {
        let mut seen = Seen::default();
        while !task.stopped() {
            for key in task.walk.block(BLOCK) {
                core.write(key, &task.value)?;
                seen.written();
            }
            core.yield_now().await;
        }
        Ok(seen)
    })
}

pub(crate) fn bare_get(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.beside_the_data(), |core, mut task| async move {
        let (mut store, mut seen) = (bare_store(&core, &mut task).await?, Seen::default());
        while !task.stopped() {
            for key in task.walk.block(BLOCK) {
                seen.value(store.value(store.locate(key), key, NOW));
            }
            core.yield_now().await;
        }
        Ok(seen)
    })
}

pub(crate) fn bare_set(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.beside_the_data(), |core, mut task| async move {
        let (mut store, mut seen) = (bare_store(&core, &mut task).await?, Seen::default());
        while !task.stopped() {
            for key in task.walk.block(BLOCK) {
                store.set(store.locate(key), key, &task.value, 0, NOW)?;
                seen.written();
            }
            core.yield_now().await;
        }
        Ok(seen)
    })
}

pub(crate) fn uniform_get(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.everywhere(TASKS), |core, mut task| async move {
        let mut seen = Seen::default();
        while !task.stopped() {
            seen.value(core.get(task.walk.next()).await?.as_deref());
            if seen.done % TURN == 0 {
                core.yield_now().await;
            }
        }
        Ok(seen)
    })
}

pub(crate) fn uniform_set(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.everywhere(TASKS), |core, mut task| async move {
        let mut seen = Seen::default();
        while !task.stopped() {
            core.set(task.walk.next(), &task.value).await?;
            seen.written();
            if seen.done % TURN == 0 {
                core.yield_now().await;
            }
        }
        Ok(seen)
    })
}

pub(crate) fn uniform_get_many_64(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.everywhere(1), |core, task| get_many(core, task, 64))
}

pub(crate) fn uniform_get_many_256(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.everywhere(1), |core, task| get_many(core, task, 256))
}

pub(crate) fn hop(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_cores(stage.across(), |core, mut task| async move {
        let (mut seen, mut latencies) = (Seen::default(), Latencies::new());
        while !task.stopped() {
            let start = Instant::now();
            seen.value(core.get(task.walk.next()).await?.as_deref());
            latencies.record(start.elapsed().as_nanos() as u64, 1);
        }
        seen.latencies = Some(latencies);
        Ok(seen)
    })
}

pub(crate) fn foreign_get(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_threads(&[None], |task| foreign(&stage.db, task, None))
}

pub(crate) fn foreign_get_idle(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_threads(&[None], |task| foreign(&stage.db, task, Some(PAUSE)))
}

pub(crate) fn foreign_get_without_spin(stage: &Stage) -> Result<Outcome, Failure> {
    let db = stage.node_without_spin()?;
    let outcome = stage.on_threads(&[None], |task| foreign(&db, task, None))?;
    db.blocking().close()?;
    Ok(outcome)
}

pub(crate) fn foreign_get_many(stage: &Stage) -> Result<Outcome, Failure> {
    stage.on_threads(&[None; FOREIGN], |mut task| {
        let (db, mut seen) = (stage.db.blocking(), Seen::default());
        while !task.stopped() {
            let values = db.get_many(task.walk.block(64))?;
            (0..values.len()).for_each(|i| seen.value(values.get(i)));
        }
        Ok(seen)
    })
}

async fn get_many(core: CoreHandle, mut task: Task, size: usize) -> Result<Seen, Error> {
    let (mut seen, mut turn) = (Seen::default(), 0);
    while !task.stopped() {
        let values = core.get_many(task.walk.block(size)).await?;
        (0..values.len()).for_each(|i| seen.value(values.get(i)));
        if seen.done - turn >= TURN {
            turn = seen.done;
            core.yield_now().await;
        }
    }
    Ok(seen)
}

fn foreign(db: &GridKv, mut task: Task, pause: Option<Duration>) -> Result<Seen, Error> {
    let (mut seen, mut latencies) = (Seen::default(), Latencies::new());
    while !task.stopped() {
        if let Some(pause) = pause {
            thread::sleep(pause);
        }
        let start = Instant::now();
        seen.value(block_on(db.get(task.walk.next()))?.as_deref());
        latencies.record(start.elapsed().as_nanos() as u64, 1);
    }
    seen.latencies = Some(latencies);
    Ok(seen)
}

/// A store with the task's keys, made as a node makes its own.
async fn bare_store(core: &CoreHandle, task: &mut Task) -> Result<Store, Error> {
    let config = StoreConfig::default();
    let backend = Registry::default().make(DEFAULT_BACKEND, &config.backend()).expect("the default backend is known");
    let mut store = Store::new(config, backend);
    let keys = task.walk.keys();
    for some in keys.chunks(BLOCK) {
        for key in some {
            store.set(store.locate(key), key, &task.value, 0, NOW)?;
        }
        core.yield_now().await;
    }
    Ok(store)
}
