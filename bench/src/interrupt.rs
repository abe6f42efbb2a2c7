//! Ctrl-C (and a polite kill): the first asks every loop to end and tell what it has, the second ends the process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Listens from now on. A process that may not set handlers runs on without.
pub(crate) fn install() {
    let asked = ASKED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        // In this order: the second signal finds the flag set by the first.
        let _ = flag::register_conditional_shutdown(signal, 130, Arc::clone(asked));
        let _ = flag::register(signal, Arc::clone(asked));
    }
}

/// Whether somebody wants this to end.
#[inline]
pub(crate) fn requested() -> bool {
    ASKED.get().is_some_and(|asked| asked.load(Ordering::Relaxed))
}
