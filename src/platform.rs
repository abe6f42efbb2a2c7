//! Whether this machine can run the node, asked before anything starts, so that a refusal explains itself.
//!
//! Checked in the order in which an operator would meet them: kernel, io_uring, locked memory, cores, open files, ports.
//! Limits that the process may raise by itself are raised. What each core does later relies on this and reports only
//! what nobody could know here.
//!
//! Reads the machine and decides nothing else: [`CoreSet::choose`] decides about cores, and the judgements below are
//! functions of the values that were read.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;

use gridkv_net::ring::{Ring, RingConfig, probe_port};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::Error;
use crate::config::{Config, format_ranges, parse_ranges};
use crate::cores::connections::MOST_PAGES;
use crate::error::StartError;

#[cfg(doc)]
use crate::config::CoreSet;

/// Locked memory without which an executor refuses to start.
const LOCKED_MEMORY: u64 = 512 << 10;
/// Open files of the process beside clients and cores: standard streams, the loader, a log.
const FILES_OF_PROCESS: u64 = 32;
/// Open files of a core: the executor's three rings and their eventfds, the socket ring, signals, two listeners.
const FILES_PER_CORE: u64 = 24;
/// The oldest kernel that has all that the socket ring uses.
const KERNEL: (u32, u32) = (6, 1);

/// Checks the machine against the configuration, raises what limits may be raised, and chooses the CPUs, one per core.
///
/// `limits.max_connections` is lowered, with a warning, where the limit on open files allows no more.
///
/// # Errors
/// [`Error::Start`]: the first thing that is missing, and how to get it.
pub(crate) fn prepare(config: &mut Config) -> Result<Vec<usize>, Error> {
    let uname = rustix::system::uname();
    check_kernel(&uname.release().to_string_lossy())?;
    check_io_uring()?;
    let locked = raise(Resource::Memlock, LOCKED_MEMORY);
    if locked < LOCKED_MEMORY {
        return Err(StartError::LockedMemory { limit: locked, needed: LOCKED_MEMORY }.into());
    }

    let (online, allowed) = cpus()?;
    let cpus = config.cores.choose(&online, &allowed)?;
    let shards = u32::from(config.shards.get());
    if cpus.len() > shards as usize {
        return Err(StartError::TooFewShards { cores: cpus.len(), shards }.into());
    }
    if let Some(quota) = cpu_quota()
        && quota < cpus.len() as f64
    {
        tracing::warn!(
            cores = cpus.len(),
            quota,
            "the control group grants less CPU time than the chosen cores can use, so cores will be throttled; choose \
             fewer cores"
        );
    }

    let serves = config.listen.is_some() || config.http.is_some();
    let wanted = if serves { u64::from(config.limits.max_connections) } else { 0 };
    let own = FILES_OF_PROCESS + FILES_PER_CORE * cpus.len() as u64;
    let pages = if config.http.is_some() { u64::from(MOST_PAGES) } else { 0 };
    let files = raise(Resource::Nofile, own + pages + wanted);
    // HTTP has places of its own, unless the limit leaves next to nothing.
    let of_clients = files.saturating_sub(pages).max(files.min(own + 1));
    let connections = connections_within(of_clients, own, cpus.len(), wanted)?;
    if connections < wanted {
        tracing::warn!(
            max_connections = wanted,
            open_files = files,
            "the limit on open files allows {connections} connections only; raise it (`ulimit -n {}`) for all of them",
            own + pages + wanted
        );
        config.limits.max_connections = connections as u32;
    }
    Ok(cpus)
}

/// Makes sure that the address can be listened on and that nobody else does; port 0 becomes a free one.
///
/// # Errors
/// [`StartError::AddressInUse`], [`StartError::Listen`].
pub(crate) fn probe(addr: SocketAddr) -> Result<SocketAddr, Error> {
    probe_port(addr).map_err(Error::from)
}

/// A seed that nobody can guess.
pub(crate) fn random_seed() -> u64 {
    RandomState::new().hash_one("gridkv")
}

fn check_kernel(release: &str) -> Result<(), StartError> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < KERNEL { Err(StartError::KernelTooOld { release: release.to_owned() }) } else { Ok(()) }
}

/// Makes a small socket ring and lets it go: the only question that seccomp, sysctl and kernel all answer.
fn check_io_uring() -> Result<(), Error> {
    let config = RingConfig { entries: 8, buffers: 2, buffer_len: 4096, max_connections: 1 };
    Ring::new(config).map(drop).map_err(Error::from)
}

/// The CPUs that are switched on, and those of them that this process may use, both ascending.
fn cpus() -> Result<(Vec<usize>, Vec<usize>), Error> {
    let mask = sched_getaffinity(None).map_err(|e| Error::os("reading the CPU affinity mask", e.into()))?;
    let allowed: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| mask.is_set(cpu)).collect();
    // Where /sys is hidden, the mask is all that is known.
    let online = fs::read_to_string("/sys/devices/system/cpu/online")
        .ok()
        .and_then(|list| parse_ranges(list.trim()).ok())
        .unwrap_or_else(|| allowed.clone());
    let allowed: Vec<usize> = allowed.into_iter().filter(|cpu| online.contains(cpu)).collect();
    tracing::debug!(online = format_ranges(&online), allowed = format_ranges(&allowed), "cores of this machine");
    Ok((online, allowed))
}

/// CPUs' worth of time that the control group grants, if it limits them.
fn cpu_quota() -> Option<f64> {
    quota_of(&fs::read_to_string("/sys/fs/cgroup/cpu.max").ok()?)
}

/// Reads `200000 100000` (two CPUs) or `max 100000` (no limit).
fn quota_of(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (period > 0.0).then(|| quota / period)
}

/// Raises a soft limit to `wanted`, or as far as the hard limit allows; returns what holds then.
fn raise(resource: Resource, wanted: u64) -> u64 {
    let limit = getrlimit(resource);
    let (soft, hard) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    if soft >= wanted {
        return soft;
    }
    let reachable = wanted.min(hard);
    let raised =
        reachable > soft && setrlimit(resource, Rlimit { current: Some(reachable), maximum: limit.maximum }).is_ok();
    if raised { reachable } else { soft }
}

/// How many of the `wanted` connections a limit on open files leaves room for, after the node's `own`.
fn connections_within(files: u64, own: u64, cores: usize, wanted: u64) -> Result<u64, StartError> {
    let room = files.saturating_sub(own);
    if files < own || (room == 0 && wanted > 0) {
        return Err(StartError::OpenFiles { limit: files, needed: own + wanted.min(1), cores });
    }
    Ok(room.min(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        for release in ["6.1.0", "6.10.3-generic", "6.1", "7.0.0-rc1", "10.2"] {
            assert_eq!(check_kernel(release), Ok(()), "{release}");
        }
        for release in ["6.0.9", "5.15.0-105-generic", "4.19", "", "unknown"] {
            assert_eq!(check_kernel(release), Err(StartError::KernelTooOld { release: release.into() }));
        }
    }

    #[test]
    fn open_files_bound_the_connections() {
        assert_eq!(connections_within(20_000, 80, 2, 10_000), Ok(10_000));
        assert_eq!(connections_within(1024, 80, 2, 10_000), Ok(944));
        assert_eq!(connections_within(80, 80, 2, 0), Ok(0));
        for files in [80, 79, 0] {
            let needed = 81;
            let refused = connections_within(files, 80, 2, 10_000);
            assert_eq!(refused, Err(StartError::OpenFiles { limit: files, needed, cores: 2 }));
        }
    }

    #[test]
    fn a_quota_is_a_number_of_cpus() {
        assert_eq!(quota_of("200000 100000\n"), Some(2.0));
        assert_eq!(quota_of("50000 100000"), Some(0.5));
        assert_eq!(quota_of("max 100000\n"), None);
        assert_eq!(quota_of("1 0"), None);
        assert_eq!(quota_of(""), None);
    }

    #[test]
    fn this_machine_has_cores_and_seeds_differ() {
        let (online, allowed) = cpus().unwrap();
        assert!(!allowed.is_empty() && allowed.iter().all(|cpu| online.contains(cpu)));
        assert_ne!(random_seed(), random_seed());
    }

    #[test]
    fn a_soft_limit_is_raised_to_what_was_asked_or_to_the_hard_one() {
        let limit = getrlimit(Resource::Nofile);
        let hard = limit.maximum.unwrap_or(u64::MAX);
        let soft = limit.current.unwrap_or(u64::MAX);
        assert_eq!(raise(Resource::Nofile, 1), soft, "never lowered");
        let wanted = (soft + 1).min(hard);
        assert!(raise(Resource::Nofile, wanted) >= wanted.min(hard));
    }
}
