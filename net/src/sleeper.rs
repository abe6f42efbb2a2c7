//! How a core sleeps: on the eventfds that those write who may wake it, read through the executor.
//!
//! A core's turn loop is a task of a glommio executor. When it has nothing to do it awaits [`Sleeper::sleep`], the
//! executor finds no runnable task and parks in the kernel. Three things end the sleep: a sibling or a foreign thread
//! ([`crate::signal::Signal`] writes its eventfd), a socket (the kernel writes the ring's), or another task of the same
//! executor ([`Sleeper::kick`], no system call).
//!
//! The reads stay under way across sleeps: glommio offers no cancellation that would be cheaper than leaving them.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use glommio::io::BufferedFile;

type Reading = Pin<Box<dyn Future<Output = ()>>>;

struct Place {
    file: Rc<BufferedFile>,
    reading: Option<Reading>,
}

/// The sleeping place of one core. Lives on the core's executor.
pub struct Sleeper {
    places: RefCell<Vec<Place>>,
    kicked: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Sleeper {
    /// Sleeps on `eventfds`, all made in blocking mode. Must be called inside the core's executor.
    pub fn new(eventfds: Vec<OwnedFd>) -> Sleeper {
        let places = eventfds
            .into_iter()
            .map(|eventfd| {
                // SAFETY: the descriptor was owned and is given up here, so the file is its only owner; it stays open
                // until the file is dropped. An eventfd is read with plain reads of eight bytes, whatever the offset.
                let file = unsafe { BufferedFile::from_raw_fd(eventfd.into_raw_fd()) };
                Place { file: Rc::new(file), reading: None }
            })
            .collect();
        Sleeper { places: RefCell::new(places), kicked: Cell::new(false), waker: RefCell::new(None) }
    }

    /// Ends the current or the next sleep. For tasks of the same executor.
    pub fn kick(&self) {
        if !self.kicked.replace(true)
            && let Some(waker) = self.waker.borrow_mut().take()
        {
            waker.wake();
        }
    }

    /// Sleeps until an eventfd is written or [`Sleeper::kick`] is called. May end early.
    pub async fn sleep(&self) {
        Sleep { place: self }.await;
    }
}

struct Sleep<'a> {
    place: &'a Sleeper,
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let place = self.place;
        if place.kicked.replace(false) {
            return Poll::Ready(());
        }
        let mut woken = false;
        for Place { file, reading } in place.places.borrow_mut().iter_mut() {
            let future = reading.get_or_insert_with(|| {
                let file = file.clone();
                Box::pin(async move {
                    // A failing read would end every sleep at once: the core then polls, which is correct and loud in `top`.
                    let _ = file.read_at(0, 8).await;
                })
            });
            if future.as_mut().poll(cx).is_ready() {
                *reading = None;
                woken = true;
            }
        }
        if woken {
            return Poll::Ready(());
        }
        *place.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl std::fmt::Debug for Sleeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sleeper").field("kicked", &self.kicked.get()).finish_non_exhaustive()
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
