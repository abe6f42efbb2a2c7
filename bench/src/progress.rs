//! A line on standard error that says how far a long phase is; nothing when standard error is no terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::units;

const WIDTH: usize = 24;
const EVERY: Duration = Duration::from_millis(100);

/// Whether to show progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    shown: bool,
}

impl Progress {
    /// On a terminal, or when asked for (then each state is a line of its own if there is no terminal).
    pub(crate) fn new(asked: bool) -> Progress {
        Progress { shown: asked || std::io::stderr().is_terminal() }
    }

    /// Always, or never when quiet is wished for.
    pub(crate) fn unless(quiet: bool) -> Progress {
        Progress { shown: !quiet }
    }

    /// Begins a phase.
    pub(crate) fn phase(&self, label: impl Into<String>) -> Phase {
        let terminal = std::io::stderr().is_terminal();
        let now = Instant::now();
        Phase {
            shown: self.shown,
            terminal,
            label: label.into(),
            drawn: None,
            rate_from: (now, 0),
            every: if terminal { EVERY } else { Duration::from_secs(1) },
        }
    }
}

/// One phase being shown; its line vanishes with it.
#[derive(Debug)]
pub(crate) struct Phase {
    shown: bool,
    terminal: bool,
    label: String,
    drawn: Option<Instant>,
    /// Where the live rate is counted from.
    rate_from: (Instant, u64),
    every: Duration,
}

impl Phase {
    /// Draws, if it is time to: the share done (0 to 1), and operations so far.
    pub(crate) fn show(&mut self, share: f64, operations: u64) {
        if !self.shown || self.drawn.is_some_and(|at| at.elapsed() < self.every) {
            return;
        }
        let now = Instant::now();
        let (from, before) = self.rate_from;
        let seconds = now.duration_since(from).as_secs_f64();
        let rate = if operations > before && seconds > 0.0 {
            units::rate(operations.saturating_sub(before) as f64 / seconds)
        } else {
            String::new()
        };
        self.rate_from = (now, operations);
        self.drawn = Some(now);
        let share = share.clamp(0.0, 1.0);
        let full = (share * WIDTH as f64) as usize;
        let line = format!(
            "{:<34} {}{} {:>3.0} %  {rate}",
            self.label,
            "█".repeat(full),
            "░".repeat(WIDTH - full),
            share * 100.0
        );
        let mut err = std::io::stderr().lock();
        let _ = if self.terminal { write!(err, "\r\x1b[2K{line}") } else { writeln!(err, "{line}") };
        let _ = err.flush();
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        if self.shown && self.terminal && self.drawn.is_some() {
            let mut err = std::io::stderr().lock();
            let _ = write!(err, "\r\x1b[2K");
            let _ = err.flush();
        }
    }
}
