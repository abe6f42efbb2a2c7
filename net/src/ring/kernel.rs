//! The few calls into io_uring that the ring needs, with its queues.
//!
//! Contract: [`Kernel::enter`] is the only system call of a turn. With deferred task work the kernel posts completions
//! only inside an enter that asks for events, so nothing happens behind the ring's back between two turns; a flag in
//! shared memory says when such work waits ([`Kernel::has_news`]).
//!
//! Entries pushed while the submission queue is full go to a backlog in order, so a push never fails. Its length is
//! bounded by the operations that all connections can have at once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, cqueue, squeue, types};
use rustix::event::{EventfdFlags, eventfd};

use super::error::{RingError, memlock, setup_error};

/// `IORING_REGISTER_RING_FDS` and its inverse: the crate keeps the resulting index private to a short-lived value.
const REGISTER_RING_FDS: libc::c_uint = 20;
const UNREGISTER_RING_FDS: libc::c_uint = 21;

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct RsrcUpdate {
    offset: u32,
    resv: u32,
    data: u64,
}

/// Queues shared with the kernel.
pub(super) struct Kernel {
    uring: IoUring,
    /// The ring's index among the thread's registered rings, which spares a descriptor lookup per enter.
    registered: Option<u32>,
    wake: OwnedFd,
    /// Pushed to the submission queue and not yet taken by the kernel.
    unsubmitted: u32,
    backlog: VecDeque<squeue::Entry>,
}

impl Kernel {
    pub(super) fn new(entries: u32) -> Result<Kernel, RingError> {
        let build = |no_sqarray: bool| {
            let mut builder = IoUring::builder();
            builder
                .dontfork()
                .setup_clamp()
                .setup_cqsize(entries.saturating_mul(4).next_power_of_two())
                .setup_submit_all()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag();
            if no_sqarray {
                builder.setup_no_sqarray();
            }
            builder.build(entries)
        };
        // Without the index array (Linux 6.6) there is one cache line less to write; older kernels refuse the flag.
        let uring = build(true).or_else(|_| build(false)).map_err(setup_error)?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(setup_error(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| RingError::Setup { what: "make its eventfd", source: errno.into() })?;
        uring
            .submitter()
            .register_eventfd(wake.as_raw_fd())
            .map_err(|source| RingError::Setup { what: "register its eventfd", source })?;
        let mut kernel = Kernel { uring, registered: None, wake, unsubmitted: 0, backlog: VecDeque::new() };
        kernel.set_wakeups(false);
        kernel.registered = kernel.register_self();
        Ok(kernel)
    }

    /// Lends the buffers of group 0.
    ///
    /// # Safety
    ///
    /// The entries at `addr` must stay valid until [`Kernel::unregister_buffers`] or the end of the ring.
    pub(super) unsafe fn register_buffers(&self, addr: u64, count: u16) -> Result<(), RingError> {
        // SAFETY: passed on to the caller.
        unsafe { self.uring.submitter().register_buf_ring_with_flags(addr, count, 0, 0) }.map_err(|source| match source
            .raw_os_error()
        {
            Some(libc::ENOMEM) => RingError::Memory { what: "its receive buffers", memlock: memlock(), source },
            Some(libc::EINVAL) => setup_error(source),
            _ => RingError::Setup { what: "register its receive buffers", source },
        })
    }

    pub(super) fn unregister_buffers(&self) -> bool {
        self.uring.submitter().unregister_buf_ring(0).is_ok()
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Whether the kernel writes the eventfd when something happens.
    pub(super) fn set_wakeups(&mut self, on: bool) {
        let completions = self.uring.completion();
        if on {
            completions.enable_eventfd();
            // The kernel raises its flag, then looks whether to signal; we allow the signal, then look at the flag. With
            // a full fence on each side at least one of the two sees the other.
            fence(Ordering::SeqCst);
        } else {
            completions.disable_eventfd();
        }
    }

    /// Something waits for an enter or to be reaped. Reads shared memory only.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        // SAFETY: queue views exist only inside methods of `Kernel`, none of which calls this one while holding any; a
        // shared view that is only read publishes the indices that are published already.
        let (submissions, completions) = unsafe { (self.uring.submission_shared(), self.uring.completion_shared()) };
        self.unsubmitted > 0 || !completions.is_empty() || submissions.taskrun() || submissions.cq_overflow()
    }

    /// An enter would achieve something.
    #[inline]
    pub(super) fn wants_enter(&self) -> bool {
        // SAFETY: as in `has_news`.
        let submissions = unsafe { self.uring.submission_shared() };
        self.unsubmitted > 0 || submissions.taskrun() || submissions.cq_overflow()
    }

    /// Queues an operation. It reaches the kernel with the next enter.
    ///
    /// # Safety
    ///
    /// Everything that `entry` points to must stay valid and in place until its last completion.
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: passed on to the caller.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                self.unsubmitted += 1;
                return;
            }
        }
        self.push_slowly(entry);
    }

    #[cold]
    fn push_slowly(&mut self, entry: squeue::Entry) {
        self.backlog.push_back(entry);
        // Best effort: what the kernel does not take now, the next enter hands over.
        let _ = self.submit(0, EnterFlags::empty(), None);
        self.refill();
    }

    fn refill(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: the entry came through `push`, whose caller answers for it.
            if unsafe { self.uring.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
            self.unsubmitted += 1;
        }
    }

    /// Hands over what is queued and lets the kernel post what is done. Never blocks.
    #[inline]
    pub(super) fn enter(&mut self) -> io::Result<()> {
        let entered = self.submit(0, EnterFlags::GETEVENTS, None);
        if !self.backlog.is_empty() {
            self.refill();
        }
        entered
    }

    /// As [`Kernel::enter`], but waits for a completion or the end of `timeout`.
    pub(super) fn enter_and_wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.refill();
        let entered = self.submit(1, EnterFlags::GETEVENTS, timeout);
        self.refill();
        entered
    }

    fn submit(&mut self, want: u32, flags: EnterFlags, timeout: Option<Duration>) -> io::Result<()> {
        let (fd, mut flags) = match self.registered {
            Some(index) => (index as RawFd, flags | EnterFlags::REGISTERED_RING),
            None => (self.uring.as_raw_fd(), flags),
        };
        let timespec = timeout.map(types::Timespec::from);
        let mut args = types::SubmitArgs::new();
        let (arg, size) = match &timespec {
            Some(timespec) => {
                args = args.timespec(timespec);
                flags |= EnterFlags::EXT_ARG;
                ((&raw const args).cast::<libc::c_void>(), size_of::<types::SubmitArgs<'_, '_>>())
            }
            None => (std::ptr::null(), 0),
        };
        // SAFETY: the descriptor (or the index, together with its flag) is our ring's; `arg` is null, or points to the
        // extended argument that EXT_ARG announces, alive with its timespec until the call returns. What the queued
        // entries point to is vouched for by the callers of `push`.
        let taken =
            unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, self.unsubmitted, want, flags.bits(), arg, size) };
        if taken >= 0 {
            self.unsubmitted -= (taken as u32).min(self.unsubmitted);
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Interrupted, out of time, or short of memory or of room for completions: reap, then try again.
            Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => {
                // A wait that ends so has submitted all the same.
                self.unsubmitted = self.uring.submission().len() as u32;
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// Completions to reap.
    #[inline]
    pub(super) fn reapable(&mut self) -> usize {
        self.uring.completion().len()
    }

    /// Takes one completion.
    #[inline]
    pub(super) fn reap(&mut self) -> Option<cqueue::Entry> {
        self.uring.completion().next()
    }

    fn register_self(&self) -> Option<u32> {
        let mut update = RsrcUpdate { offset: u32::MAX, resv: 0, data: self.uring.as_raw_fd() as u64 };
        // SAFETY: one valid update of our own open ring; the kernel writes the index into it before the call returns.
        let done = unsafe {
            libc::syscall(libc::SYS_io_uring_register, self.uring.as_raw_fd(), REGISTER_RING_FDS, &raw mut update, 1)
        };
        (done == 1).then_some(update.offset)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Some(offset) = self.registered {
            // Else the thread's table would keep the ring alive.
            let update = RsrcUpdate { offset, resv: 0, data: 0 };
            // SAFETY: one valid update that names our own index; the kernel only reads it.
            unsafe {
                libc::syscall(
                    libc::SYS_io_uring_register,
                    self.uring.as_raw_fd(),
                    UNREGISTER_RING_FDS,
                    &raw const update,
                    1,
                );
            }
        }
    }
}
