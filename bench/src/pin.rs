//! Cores: which there are, who gets which, and binding threads and programs to them.
//!
//! A program inherits the cores of the thread that starts it, so pinning one needs no tool and nothing between fork and
//! exec: the starting thread moves, starts it, and moves back.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::failure::Failure;

/// The cores that this process may use, ascending.
pub(crate) fn allowed() -> Result<Vec<usize>, Failure> {
    let set = sched_getaffinity(None).map_err(|error| Failure::io("asking for this process's cores")(error.into()))?;
    Ok((0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

/// The cores of one of several nodes that get `each` of `all` in turn, the first ones again after the last.
pub(crate) fn turn(all: &[usize], node: usize, each: usize) -> Vec<usize> {
    let mut cores: Vec<usize> = (0..each.min(all.len())).map(|at| all[(node * each + at) % all.len()]).collect();
    cores.sort_unstable();
    cores
}

/// Exactly these, in the words of a node's `--cores`.
pub(crate) fn words(cores: &[usize]) -> String {
    format!("@{}", cores.iter().map(usize::to_string).collect::<Vec<_>>().join(","))
}

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
    fn nodes_take_cores_in_turn() {
        let of = |each| (0..3).map(|node| words(&turn(&[2, 3, 5], node, each))).collect::<Vec<_>>();
        assert_eq!(of(1), ["@2", "@3", "@5"]);
        assert_eq!(of(2), ["@2,3", "@2,5", "@3,5"]);
        assert_eq!(of(4), ["@2,3,5"; 3]);
    }

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
