//! What can go wrong before bytes flow, said so that an operator knows what to change.
//!
//! Every variant leaves the ring as it was: nothing was half done. Errors of one connection are not here; they arrive
//! as [`super::Event::Closed`].

use std::io;
use std::net::SocketAddr;

/// A ring could not be made, or a socket not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The kernel refuses io_uring to this process. Start it where io_uring is allowed.
    #[error("io_uring is forbidden here: {why} ({source})")]
    Forbidden {
        /// Which switch is likely off, and how to turn it on.
        why: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel lacks what the ring is built on. Needs Linux 6.1 or newer.
    #[error("this kernel ({release}) is too old for the socket ring: it needs Linux 6.1 or newer ({source})")]
    TooOld {
        /// The kernel's own name for itself.
        release: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel would not give the ring its memory.
    #[error(
        "the socket ring got no memory for {what} ({source}); raise the locked-memory limit (`ulimit -l`, now {memlock}) \
         or the container's memory limit, or ask for fewer buffers"
    )]
    Memory {
        /// What the memory was for.
        what: &'static str,
        /// The limit on locked memory in words.
        memlock: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Setting the ring up failed for another reason.
    #[error("the socket ring could not {what} ({source})")]
    Setup {
        /// The step that failed.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else listens there. Choose another port or stop the other process.
    #[error("address {addr} is already in use")]
    AddressInUse {
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// The address could not be listened on.
    #[error("cannot listen on {addr} ({source})")]
    Listen {
        /// The address that was asked for.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// No socket for an outgoing connection. Errors of connecting itself arrive as [`super::Event::Closed`].
    #[error("no socket to connect to {addr} ({source})")]
    Socket {
        /// The address that was to be reached.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The ring holds as many connections as it was configured for.
    #[error("the ring holds its {limit} connections already")]
    TooManyConnections {
        /// The configured bound.
        limit: u32,
    },
    /// The configuration makes no sense.
    #[error("ring configuration: {0}")]
    Config(&'static str),
}

/// Turns the answer of `io_uring_setup` into advice.
pub(super) fn setup_error(source: io::Error) -> RingError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => RingError::Forbidden { why: forbidden_why(), source },
        Some(libc::ENOSYS) => RingError::Forbidden {
            why:
                "the kernel was built without it, or a seccomp filter hides it; containers need a profile that allows \
                  io_uring_setup, io_uring_enter and io_uring_register"
                    .into(),
            source,
        },
        Some(libc::EINVAL) => RingError::TooOld { release: release(), source },
        Some(libc::ENOMEM) => RingError::Memory { what: "its queues", memlock: memlock(), source },
        _ => RingError::Setup { what: "be created", source },
    }
}

fn forbidden_why() -> String {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    match disabled.trim() {
        "2" => "kernel.io_uring_disabled is 2; allow it with `sysctl kernel.io_uring_disabled=0`".into(),
        "1" => {
            "kernel.io_uring_disabled is 1, so only members of kernel.io_uring_group may use it; join that group or \
                `sysctl kernel.io_uring_disabled=0`"
                .into()
        }
        _ => "a seccomp filter or security module refuses it; containers need a profile that allows io_uring_setup, \
              io_uring_enter and io_uring_register (for Docker: `--security-opt seccomp=unconfined` or an own profile)"
            .into(),
    }
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

pub(super) fn memlock() -> String {
    match rustix::process::getrlimit(rustix::process::Resource::Memlock).current {
        Some(bytes) => format!("{} KiB", bytes / 1024),
        None => "unlimited".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_becomes_advice() {
        let text = |errno| setup_error(io::Error::from_raw_os_error(errno)).to_string();
        assert!(text(libc::EPERM).starts_with("io_uring is forbidden here: "));
        assert!(text(libc::ENOSYS).contains("seccomp"));
        assert!(text(libc::EINVAL).contains("Linux 6.1"));
        assert!(text(libc::ENOMEM).contains("ulimit -l"));
    }
}
