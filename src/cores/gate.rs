//! What may leave a core: nothing that speaks of changes which its log does not have on disk.
//!
//! A core that writes a log does not wait for the disk. It notes how far the log must be safe before what it says may
//! leave, goes on, and lets go what waited once a sync has passed.
//!
//! ```text
//!                        safe             noted
//!   positions ────────────┼─────────────────┼───▶      noted <= safe: the gate is open
//!       what waits for    │ what waits for  │          else it is shut, and all that is said
//!       these has left    │ these is held   │          from now on waits for `noted`
//! ```
//!
//! Contract: what waits leaves in the order in which it was said, never before its position is safe, and all of it once
//! that is. Answers wait whether they changed something or not: they may show what others changed.
//!
//! Pure. Not here: the log and its syncing; the replies to siblings, which the mesh holds by the same positions.

use std::collections::VecDeque;

/// How far the log of a core must be on disk before what the core says may leave, and how far it is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gate {
    noted: u64,
    safe: u64,
}

impl Gate {
    /// A gate that never shuts, whatever is noted: of a core that promises nothing about disks.
    pub(crate) const fn open() -> Gate {
        Gate { noted: 0, safe: u64::MAX }
    }

    /// Nothing leaves any more.
    pub(crate) fn close(&mut self) {
        (self.noted, self.safe) = (u64::MAX, 0);
    }

    /// What all that was said up to now waits for.
    #[inline]
    pub(crate) fn position(&self) -> u64 {
        self.noted
    }

    /// Up to where the log is safe.
    #[inline]
    pub(crate) fn safe(&self) -> u64 {
        self.safe
    }

    /// Whether what waits for `position` may leave.
    #[inline]
    pub(crate) fn passes(&self, position: u64) -> bool {
        position <= self.safe
    }

    /// Whether what is said now may leave at once.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.passes(self.noted)
    }

    /// Whether it may ever be shut.
    #[inline]
    pub(crate) fn may_shut(&self) -> bool {
        self.safe != u64::MAX
    }

    /// From now on what is said waits for `position`. An earlier one than before changes nothing.
    pub(crate) fn note(&mut self, position: u64) {
        self.noted = self.noted.max(position);
    }

    /// The log is on disk up to `position`. An earlier one than before changes nothing.
    pub(crate) fn release(&mut self, position: u64) {
        self.safe = self.safe.max(position);
    }
}

/// Which parts of a connection's output wait for what. The bytes are not here: `end`s count from the first that has not left.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Positions and ends both grow.
    parts: VecDeque<Part>,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    position: u64,
    end: usize,
}

impl Held {
    /// Whether nothing waits.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Of `len` bytes of output, those that are not sealed yet wait for `position`.
    pub(crate) fn seal(&mut self, position: u64, len: usize) {
        match self.parts.back_mut() {
            Some(last) if last.end >= len => {}
            Some(last) if last.position >= position => last.end = len,
            _ if len == 0 => {}
            _ => self.parts.push_back(Part { position, end: len }),
        }
    }

    /// How many bytes may leave.
    pub(crate) fn passing(&self, gate: &Gate) -> usize {
        let passing = self.parts.partition_point(|part| gate.passes(part.position));
        passing.checked_sub(1).map_or(0, |last| self.parts[last].end)
    }

    /// Whether some bytes may leave.
    #[inline]
    pub(crate) fn passes(&self, gate: &Gate) -> bool {
        self.parts.front().is_some_and(|part| gate.passes(part.position))
    }

    /// That many bytes have left.
    pub(crate) fn sent(&mut self, bytes: usize) {
        while self.parts.front().is_some_and(|part| part.end <= bytes) {
            self.parts.pop_front();
        }
        self.parts.iter_mut().for_each(|part| part.end -= bytes);
    }
}

/// Things that leave one by one, in order.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    /// Said in this turn: what they wait for is known at its end.
    fresh: Vec<T>,
    sealed: VecDeque<(u64, T)>,
}

impl<T> Default for Queue<T> {
    fn default() -> Queue<T> {
        Queue { fresh: Vec::new(), sealed: VecDeque::new() }
    }
}

impl<T> Queue<T> {
    /// Adds one that waits for what the next [`Queue::seal`] says.
    pub(crate) fn push(&mut self, item: T) {
        self.fresh.push(item);
    }

    /// Those added since the last call wait for `position`.
    #[inline]
    pub(crate) fn seal(&mut self, position: u64) {
        self.sealed.extend(self.fresh.drain(..).map(|item| (position, item)));
    }

    /// The next one, if it may leave.
    #[inline]
    pub(crate) fn pop(&mut self, gate: &Gate) -> Option<T> {
        let (position, _) = self.sealed.front()?;
        if !gate.passes(*position) {
            return None;
        }
        self.sealed.pop_front().map(|(_, item)| item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_gate_is_shut_from_a_note_until_its_release() {
        let mut gate = Gate::default();
        assert!(gate.is_open() && gate.may_shut());
        gate.note(10);
        assert!(!gate.is_open() && !gate.passes(gate.position()) && gate.passes(0));
        gate.release(9);
        assert!(!gate.is_open() && gate.passes(9));
        gate.release(10);
        assert!(gate.is_open());
        // Neither goes back.
        gate.note(5);
        gate.release(5);
        assert_eq!((gate.position(), gate.safe()), (10, 10));
    }

    #[test]
    fn a_gate_that_promises_nothing_never_shuts() {
        let mut gate = Gate::open();
        gate.note(u64::MAX);
        assert!(gate.is_open() && !gate.may_shut());
    }

    #[test]
    fn output_of_one_position_is_one_part() {
        let mut held = Held::default();
        for len in [0, 3, 3, 7] {
            held.seal(5, len);
        }
        held.seal(6, 7);
        assert_eq!(held.parts.len(), 1);
        held.seal(6, 8);
        assert_eq!(held.parts.len(), 2);
        let mut gate = Gate::default();
        gate.release(5);
        assert_eq!(held.passing(&gate), 7);
        held.sent(7);
        assert_eq!((held.passing(&gate), held.parts.len(), held.parts[0].end), (0, 1, 1));
    }

    #[test]
    fn things_wait_for_the_end_of_their_turn_and_keep_their_order() {
        let (mut gate, mut queue) = (Gate::default(), Queue::default());
        queue.push('a');
        // The gate is open, but what the turn has changed is not yet noted.
        assert_eq!(queue.pop(&gate), None);
        gate.note(1);
        queue.seal(gate.position());
        queue.push('b');
        queue.push('c');
        gate.note(2);
        queue.seal(gate.position());
        assert_eq!(queue.pop(&gate), None);
        gate.release(1);
        assert_eq!((queue.pop(&gate), queue.pop(&gate)), (Some('a'), None));
        gate.release(2);
        assert_eq!((queue.pop(&gate), queue.pop(&gate), queue.pop(&gate)), (Some('b'), Some('c'), None));
    }

    /// What happens to a connection's output, in the shape in which a core's turns do it.
    #[derive(Clone, Debug)]
    enum Step {
        /// A turn: so many bytes are said, the log grows by so much, output is flushed, and the kernel may still be busy.
        Turn { says: usize, logs: u64, busy: bool },
        /// A sync of a part of what the log has, in percent, passes.
        Sync(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0usize..20, 0u64..3, any::<bool>()).prop_map(|(says, logs, busy)| Step::Turn { says, logs, busy }),
            1 => (0u64..=100).prop_map(Step::Sync),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// The model keeps for every byte what it waits for. What leaves is a prefix, as long as it may be, never before
        /// its position is safe, and everything in the end.
        #[test]
        fn output_leaves_in_order_when_it_is_safe_and_as_soon(steps in proptest::collection::vec(step(), 1..60)) {
            let (mut gate, mut held) = (Gate::default(), Held::default());
            // The output: each byte is its number, with the position that it waits for.
            let (mut out, mut waits_for, mut said, mut left) = (Vec::new(), VecDeque::new(), 0usize, 0usize);
            let last = [Step::Sync(100), Step::Turn { says: 0, logs: 0, busy: false }];
            for step in steps.into_iter().chain(last) {
                match step {
                    Step::Sync(percent) => gate.release(gate.safe() + (gate.position() - gate.safe()) * percent / 100),
                    Step::Turn { says, logs, busy } => {
                        out.extend(said..said + says);
                        said += says;
                        gate.note(gate.position() + logs);
                        waits_for.extend(std::iter::repeat_n(gate.position(), says));
                        held.seal(gate.position(), out.len());
                        if busy {
                            continue;
                        }
                        let passing = held.passing(&gate);
                        let safe = waits_for.iter().take_while(|&&position| position <= gate.safe()).count();
                        prop_assert_eq!(passing, safe);
                        prop_assert_eq!(held.passes(&gate), safe > 0);
                        for byte in out.drain(..passing) {
                            prop_assert_eq!(byte, left);
                            left += 1;
                        }
                        waits_for.drain(..passing);
                        held.sent(passing);
                        prop_assert_eq!(held.is_empty(), out.is_empty());
                    }
                }
            }
            prop_assert_eq!(left, said);
            prop_assert!(held.is_empty());
        }
    }
}
