//! How a core sleeps: on the eventfds that those write who may wake it, read through the executor.
//!
//! A core's turn loop is a task of a glommio executor. When it has nothing to do it awaits [`Sleeper::sleep`], the
//! executor finds no runnable task and parks in the kernel. Three things end the sleep: a sibling or a foreign thread
//! ([`crate::signal::Signal`] writes its eventfd), a socket (the kernel writes the ring's), or another task of the same
//! executor ([`Sleeper::kick`], no system call).
//!
//! Each eventfd has a task that reads it over and over and kicks. The sleep itself must not await the reads: a read that
//! stays under way across sleeps would get one more clone of the sleeper's waker with each, which glommio 0.9 keeps all,
//! and a task that has 32767 of them panics.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use glommio::io::BufferedFile;

/// What the tasks that may end a sleep share with it.
#[derive(Default)]
struct Kick {
    kicked: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Kick {
    fn kick(&self) {
        if !self.kicked.replace(true)
            && let Some(waker) = self.waker.borrow_mut().take()
        {
            waker.wake();
        }
    }
}

/// Pause after a read that failed.
const REST: Duration = Duration::from_millis(1);

/// The sleeping place of one core. Lives on the core's executor.
pub struct Sleeper {
    kick: Rc<Kick>,
}

impl Sleeper {
    /// Sleeps on `eventfds`, all made in blocking mode. Must be called inside the core's executor.
    pub fn new(eventfds: Vec<OwnedFd>) -> Sleeper {
        let kick = Rc::new(Kick::default());
        for eventfd in eventfds {
            // SAFETY: the descriptor was owned and is given up here, so the file is its only owner; it stays open
            // until the file is dropped. An eventfd is read with plain reads of eight bytes, whatever the offset.
            let file = unsafe { BufferedFile::from_raw_fd(eventfd.into_raw_fd()) };
            let sleeper = Rc::downgrade(&kick);
            glommio::spawn_local(async move {
                loop {
                    // A failing read ends every sleep soon: the core then polls, which is correct and loud in `top`.
                    if file.read_at(0, 8).await.is_err() {
                        glommio::timer::sleep(REST).await;
                    }
                    let Some(kick) = sleeper.upgrade() else { return };
                    kick.kick();
                }
            })
            .detach();
        }
        Sleeper { kick }
    }

    /// Ends the current or the next sleep. For tasks of the same executor.
    pub fn kick(&self) {
        self.kick.kick();
    }

    /// Sleeps until an eventfd is written or [`Sleeper::kick`] is called. May end early.
    pub async fn sleep(&self) {
        Sleep { kick: &self.kick }.await;
    }
}

struct Sleep<'a> {
    kick: &'a Kick,
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.kick.kicked.replace(false) {
            return Poll::Ready(());
        }
        *self.kick.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl std::fmt::Debug for Sleeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sleeper").field("kicked", &self.kick.kicked.get()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signal::Signal;
    use glommio::{LocalExecutorBuilder, Placement};
    use rustix::event::{EventfdFlags, eventfd};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_parked_core_is_woken_by_a_signal_and_by_a_kick() {
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        let signal = Arc::new(Signal::new(fd.try_clone().unwrap()));
        let waker = signal.clone();
        let done = Arc::new(AtomicBool::new(false));
        let finished = done.clone();
        let core = LocalExecutorBuilder::new(Placement::Unbound)
            .io_memory(64 << 10)
            .spawn(move || async move {
                let sleeper = Rc::new(Sleeper::new(vec![fd]));
                for _ in 0..100 {
                    signal.announce_sleep();
                    sleeper.sleep().await;
                    signal.awake();
                }
                // More often than a task of glommio may have wakers; the eventfd is not written in the meantime.
                for _ in 0..40_000 {
                    let kicker = sleeper.clone();
                    glommio::spawn_local(async move {
                        glommio::executor().yield_task_queue_now().await;
                        kicker.kick();
                    })
                    .detach();
                    sleeper.sleep().await;
                }
                let kicker = sleeper.clone();
                glommio::spawn_local(async move { kicker.kick() }).detach();
                sleeper.sleep().await;
                done.store(true, Ordering::Release);
            })
            .unwrap();
        while !finished.load(Ordering::Acquire) {
            waker.wake();
            std::thread::yield_now();
        }
        core.join().unwrap();
    }
}
