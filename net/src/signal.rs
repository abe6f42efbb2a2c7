//! Waking a core that sleeps, and only then.
//!
//! A core that runs out of work announces that it is about to sleep, looks once more, and sleeps on an eventfd. Whoever
//! puts work in front of it looks at the announcement afterwards. One of the two always sees the other (Dekker's
//! argument, with a sequentially consistent fence on each side), so no wake-up is lost, and a busy core costs its peers
//! one load instead of a system call.
//!
//! ```text
//!   sleeper                              waker
//!   asleep = true                        put work into the queue
//!   fence                                fence
//!   work there?  yes: asleep = false     asleep?  yes: asleep = false, write eventfd
//!                no:  read eventfd                no:  nothing to do
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// The wake-up of one core. Shared by everybody who may put work in front of it.
#[derive(Debug)]
pub struct Signal {
    asleep: AtomicBool,
    inbox: AtomicBool,
    eventfd: OwnedFd,
}

impl Signal {
    /// A signal that writes to `eventfd`; the core reads it.
    pub fn new(eventfd: OwnedFd) -> Signal {
        Signal { asleep: AtomicBool::new(false), inbox: AtomicBool::new(false), eventfd }
    }

    /// The core is about to sleep. It must look for work after this and before it sleeps.
    pub fn announce_sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The core is awake, or found work after announcing.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Work was put in front of the core: wake it if it sleeps. Returns whether a system call was made.
    #[inline]
    pub fn wake(&self) -> bool {
        fence(Ordering::SeqCst);
        if !self.asleep.load(Ordering::Relaxed) || !self.asleep.swap(false, Ordering::SeqCst) {
            return false;
        }
        // A full counter (EAGAIN) means that a wake-up is pending already; nothing else can fail on an eventfd we own.
        let _ = rustix::io::write(self.eventfd.as_fd(), &1u64.to_ne_bytes());
        true
    }

    /// A foreign thread left a message in the core's queue: note it, and wake the core if it sleeps.
    pub fn post(&self) {
        self.inbox.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether messages of foreign threads may be waiting; does not clear the note.
    #[inline]
    pub fn has_post(&self) -> bool {
        self.inbox.load(Ordering::Relaxed)
    }

    /// Takes the note: the caller drains the queue after this.
    #[inline]
    pub fn take_post(&self) -> bool {
        self.has_post() && self.inbox.swap(false, Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn signal() -> (Signal, OwnedFd) {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let reader = fd.try_clone().unwrap();
        (Signal::new(fd), reader)
    }

    fn pending(fd: &OwnedFd) -> bool {
        rustix::io::read(fd, &mut [0u8; 8]).is_ok()
    }

    #[test]
    fn a_core_that_is_awake_costs_no_system_call() {
        let (signal, fd) = signal();
        assert!(!signal.wake());
        assert!(!pending(&fd));
    }

    #[test]
    fn a_sleeper_is_woken_once() {
        let (signal, fd) = signal();
        signal.announce_sleep();
        assert!(signal.wake());
        assert!(!signal.wake(), "the first waker took the announcement");
        assert!(pending(&fd));
    }

    /// Two threads run the protocol against each other; a lost wake-up would leave the sleeper waiting for ever.
    #[test]
    fn no_wake_up_is_lost() {
        use std::sync::atomic::AtomicU64;
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        let reader = fd.try_clone().unwrap();
        let signal = Signal::new(fd);
        let queue = AtomicU64::new(0);
        const ROUNDS: u64 = 20_000;
        std::thread::scope(|s| {
            s.spawn(|| {
                for round in 0..ROUNDS {
                    while queue.load(Ordering::Relaxed) != round {
                        std::hint::spin_loop();
                    }
                    queue.store(round + 1, Ordering::Relaxed);
                    signal.wake();
                    while queue.load(Ordering::Relaxed) == round + 1 && round + 1 < ROUNDS {
                        std::thread::yield_now();
                        if queue.load(Ordering::Relaxed) == round + 1 {
                            break;
                        }
                    }
                }
            });
            let mut seen = 0;
            while seen < ROUNDS {
                signal.announce_sleep();
                let now = queue.load(Ordering::Relaxed);
                if now != seen {
                    signal.awake();
                    seen = now;
                } else {
                    rustix::io::read(&reader, &mut [0u8; 8]).unwrap();
                }
            }
        });
    }
}
