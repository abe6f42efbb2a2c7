//! What it costs that one CPU reads what another has written: the machine's part of every hop between cores.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::stage::{Outcome, Seen, Stage, Task};
use crate::failure::Failure;

/// Cache lines of a message: some 4 KiB, as half of a group of 64 reads with values of 100 bytes.
const LINES: usize = 64;
/// Words of a line.
const WORDS: usize = 8;

/// Two cache lines, of which one is fetched with the other on some CPUs.
#[derive(Default)]
#[repr(align(128))]
struct Alone(AtomicU64);

/// A message that one side writes and the other reads, again and again.
struct Board {
    words: Vec<AtomicU64>,
    written: Alone,
    read: Alone,
    has_writer: AtomicBool,
}

pub(super) fn line(stage: &Stage) -> Result<Outcome, Failure> {
    let board = Board {
        words: (0..LINES * WORDS).map(|_| AtomicU64::default()).collect(),
        written: Alone::default(),
        read: Alone::default(),
        has_writer: AtomicBool::new(false),
    };
    let cpus: Vec<Option<usize>> = stage.cpus.iter().copied().map(Some).take(2).collect();
    stage.on_threads(&cpus, |task| {
        Ok(if board.has_writer.swap(true, Ordering::Relaxed) { board.read(task) } else { board.write(task) })
    })
}

impl Board {
    fn write(&self, mut task: Task) -> Seen {
        let mut seen = Seen::default();
        for message in 1.. {
            self.words.iter().for_each(|word| word.store(message, Ordering::Relaxed));
            self.written.0.store(message, Ordering::Release);
            (0..LINES).for_each(|_| seen.written());
            if !wait(&self.read, message, &mut task) {
                break;
            }
        }
        seen
    }

    fn read(&self, mut task: Task) -> Seen {
        let mut seen = Seen::default();
        for message in 1.. {
            if !wait(&self.written, message, &mut task) {
                break;
            }
            let sum = self.words.iter().fold(0, |sum: u64, word| sum.wrapping_add(word.load(Ordering::Relaxed)));
            self.read.0.store(message, Ordering::Release);
            (0..LINES).for_each(|_| seen.sum(Some(sum)));
        }
        seen
    }
}

/// Waits until the other side has come that far; false when the loops are to end.
fn wait(other: &Alone, message: u64, task: &mut Task) -> bool {
    while other.0.load(Ordering::Acquire) < message {
        if task.stopped() {
            return false;
        }
        std::hint::spin_loop();
    }
    true
}
