//! Work that can wait: active expiry, freeing what FLUSHALL dropped, clients that are silent for too long, snapshots. In a
//! task queue with few shares.
//!
//! A slice looks at a bounded number of entries and yields; the executor gives this queue a small part of the core when
//! there is foreground work and all of it when there is none.

use std::time::Duration;

use glommio::{Latency, Shares};

use super::{CoreRc, keep};
use crate::handle::unix_ms;

/// Pause between two sweeps when the last one found nothing to do.
const REST: Duration = Duration::from_millis(100);
/// Entries that one slice looks at: far below half a millisecond, even with a cache miss each.
const SLICE_ENTRIES: usize = 512;
/// Shares of the background queue; the queue of turns and application tasks has 1000.
const SHARES: usize = 50;

/// Starts the background task of a core; it ends with the core.
pub(crate) fn start(core: &CoreRc) {
    let queue = glommio::executor().create_task_queue(Shares::Static(SHARES), Latency::NotImportant, "background");
    let core = std::rc::Rc::downgrade(core);
    glommio::spawn_local_into(
        async move {
            loop {
                glommio::timer::sleep(REST).await;
                let Some(awake) = core.upgrade() else { return };
                close_idle_clients(&awake);
                drop(awake);
                loop {
                    let Some(core) = core.upgrade() else { return };
                    if core.stopping.get() {
                        return;
                    }
                    keep::attend(&core, queue);
                    {
                        let state = &mut *core.state.borrow_mut();
                        let freeing = state.store.reclaim(SLICE_ENTRIES);
                        let active_expire = state.settings.active_expire;
                        let sweeping = active_expire && state.store.sweep(unix_ms(), SLICE_ENTRIES).more;
                        if !freeing && !sweeping {
                            break;
                        }
                    }
                    drop(core);
                    futures_lite::future::yield_now().await;
                }
            }
        },
        queue,
    )
    .expect("the queue was made just now")
    .detach();
}

fn close_idle_clients(core: &CoreRc) {
    let timeout = core.state.borrow().settings.timeout;
    let patience = (timeout > 0).then(|| timeout.saturating_mul(1000));
    if let Some(connections) = &mut *core.connections.borrow_mut()
        && connections.kill_idle(unix_ms(), patience)
    {
        core.kick();
    }
}
