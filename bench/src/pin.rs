//! Binding threads and programs to cores.
//!
//! A program inherits the cores of the thread that starts it, so pinning one needs no tool and nothing between fork and
//! exec: the starting thread moves, starts it, and moves back.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::failure::Failure;

/// Binds the calling thread to `cores`.
pub(crate) fn this_thread(cores: &[usize]) -> Result<(), Failure> {
    if let Some(core) = cores.iter().find(|&&core| core >= CpuSet::MAX_CPU) {
        return Err(Failure::Usage(format!("there is no core {core}")));
    }
    let mut set = CpuSet::new();
    cores.iter().for_each(|&core| set.set(core));
    sched_setaffinity(None, &set).map_err(|error| Failure::io(format!("binding to core {cores:?}"))(error.into()))
}

/// Runs `start` while the calling thread is bound to `cores`, then gives it back what it had.
pub(crate) fn while_on<T>(cores: &[usize], start: impl FnOnce() -> T) -> Result<T, Failure> {
    let before =
        sched_getaffinity(None).map_err(|error| Failure::io("asking for this thread's cores")(error.into()))?;
    this_thread(cores)?;
    let started = start();
    sched_setaffinity(None, &before).map_err(|error| Failure::io("going back to all cores")(error.into()))?;
    Ok(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gets_its_cores_back() {
        let before = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|&core| before.is_set(core)).unwrap();
        let inside = while_on(&[first], || sched_getaffinity(None).unwrap()).unwrap();
        assert!(inside.is_set(first) && inside.count() == 1);
        assert!(sched_getaffinity(None).unwrap() == before);
        assert!(this_thread(&[CpuSet::MAX_CPU]).is_err());
    }
}
