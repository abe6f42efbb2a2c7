//! A timer that is always set, so that an executor which parks with work at hand is soon awake again.
//!
//! glommio 0.9 arms its preemption timer, then looks at it once more before it runs the first task queue
//! (`LocalExecutor::run_task_queues`). A thread that loses its CPU in between for longer than that timer finds it expired,
//! runs nothing, takes "nothing ran" for "nothing to run", consumes the timer's completion, which wakes nobody, and parks.
//! Nothing but a timer or an I/O event ends that, and there need be none: under load whole cores stood still for good.
//! Outliers of milliseconds in requests to an idle core have the same cause.
//!
//! So the preemption timer is longer than needed for its own purpose ([`super::launch`]), which makes the accident rare,
//! and the task here keeps timers pending, which ends it. One timer would not do: it may be the very task that was
//! runnable when the executor parked. There are three, of different lengths, this file's two and the background's.

use std::time::Duration;

use futures_lite::future::poll_once;
use glommio::timer::Timer;

use super::CoreRc;
use crate::handle::unix_ms;

/// How long a core stands still at most, in all likelihood, while it has tasks to run.
const BUSY: Duration = Duration::from_millis(5);
/// The same while it sleeps and nothing but a message can wake it.
const IDLE: Duration = Duration::from_millis(100);
/// The last resort.
const LONG: Duration = Duration::from_secs(1);

/// Starts the watch of a core; it ends with the core.
pub(crate) fn start(core: &CoreRc) {
    let core = std::rc::Rc::downgrade(core);
    glommio::spawn_local(async move {
        let mut long = Timer::new(LONG);
        loop {
            if poll_once(&mut long).await.is_some() {
                long = Timer::new(LONG);
                let _ = poll_once(&mut long).await;
            }
            let Some(awake) = core.upgrade() else { return };
            if awake.stopping.get() {
                return;
            }
            // Turns rest while tasks work on this core's data alone, and these need the time.
            awake.state.borrow_mut().now = unix_ms();
            let wait = if awake.asleep.get() && awake.tasks.get() == 0 { IDLE } else { BUSY };
            drop(awake);
            Timer::new(wait).await;
        }
    })
    .detach();
}
