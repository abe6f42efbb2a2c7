//! Asking other cores of the node, from a task of one of them.
//!
//! The question is code that travels through the other core's inbox and runs there between two turns, so it sees that
//! core's state as nobody else touches it; all cores work at the same time. The asker awaits and blocks nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};

use futures_channel::oneshot;

use crate::cores::CoreRc;
use crate::topology::Message;

/// Runs `f` on every core and collects the answers in the order of the cores. A core that is gone, because the node
/// stops, is left out.
pub(crate) async fn each_core<T: Send + 'static>(
    core: &CoreRc,
    f: impl Fn(&CoreRc) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let mut pending = Vec::with_capacity(core.topology.cores());
    for to in (0..core.topology.cores()).filter(|&to| to != core.id.index()) {
        let f = f.clone();
        pending.push(ask(core, to, move |core| f(core)).await);
    }
    let mut own = Some(f(core));
    let mut answers = Vec::with_capacity(core.topology.cores());
    for answer in pending {
        if answers.len() == core.id.index() {
            answers.extend(own.take());
        }
        answers.extend(answer.await.ok());
    }
    answers.extend(own);
    answers
}

/// Runs `f` on core `to`, which may be the own one; `None` when that core is gone.
pub(crate) async fn on_core<T: Send + 'static>(
    core: &CoreRc,
    to: usize,
    f: impl FnOnce(&CoreRc) -> T + Send + 'static,
) -> Option<T> {
    if to == core.id.index() {
        return Some(f(core));
    }
    ask(core, to, f).await.await.ok()
}

async fn ask<T: Send + 'static>(
    core: &CoreRc,
    to: usize,
    f: impl FnOnce(&CoreRc) -> T + Send + 'static,
) -> oneshot::Receiver<T> {
    let (answer, receiver) = oneshot::channel();
    let run = move |core: &CoreRc| {
        // A panic ends this question and not the core: the asker sees that no answer came.
        match catch_unwind(AssertUnwindSafe(|| f(core))) {
            // Nobody waits any more when the asking task was dropped.
            Ok(found) => drop(answer.send(found)),
            Err(_) => core.state.borrow_mut().metrics.panics += 1,
        }
    };
    core.topology.links[to].send(Message::Run(Box::new(run))).await;
    receiver
}
