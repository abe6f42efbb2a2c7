//! The voter's file: two slots that are written in turn, so that a torn write never takes both.
//!
//! ```text
//!   slot A: even generations        slot B: odd generations, the first is 1
//!
//!   0        8    12   16           24      32        32+length
//!   ┌────────┬────┬────┬────────────┬───────┬───────────┐
//!   │ magic  │ver │len │ generation │ xxh3  │ state     │      little endian; the checksum is over all the rest
//!   └────────┴────┴────┴────────────┴───────┴───────────┘
//!   state: promised ballot (18) │ 0, or 1 and accepted ballot (18) and value to the end
//! ```
//!
//! A voter writes generation g + 1 over the older slot, makes it durable, and only then answers. So if the newer slot is
//! broken nobody has heard of what it said, and the older one is the truth. That holds for torn writes, not for a disk that
//! spoils a slot long after: such a voter forgets its last answer, as with every voter that has one disk.
//!
//! Pure: bytes in, bytes out. Whether the file should be there at all is for the caller to know.

use xxhash_rust::xxh3::Xxh3;

use super::{Ballot, MAX_VALUE, State};
use crate::ids::NodeNo;

const MAGIC: &[u8; 8] = b"GRIDVOTE";
const VERSION: u32 = 1;
const HEADER: usize = 32;
const BALLOT: usize = 18;

/// Bytes of a slot, at most.
pub const MAX_SLOT: usize = HEADER + 2 * BALLOT + 1 + MAX_VALUE;

/// Which of the two slots a generation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Even generations.
    A,
    /// Odd generations.
    B,
}

impl Slot {
    /// The slot of a generation.
    pub fn of(generation: u64) -> Slot {
        if generation.is_multiple_of(2) { Slot::A } else { Slot::B }
    }
}

/// What a voter's file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Of the slot it was read from. The next write has one more.
    pub generation: u64,
    /// What the voter must not forget.
    pub state: State,
}

/// Neither slot can be read, and this is not a file that was never written in full: promises may be forgotten, so the
/// voter must not vote. The cluster replaces it as it replaces a dead one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the voter file is damaged in both slots: this voter must be replaced")]
pub struct Corrupt;

/// A slot, to be written where [`Slot::of`] says.
pub fn encode_slot(generation: u64, state: &State) -> Vec<u8> {
    let state = encode_state(state);
    let mut slot = Vec::with_capacity(HEADER + state.len());
    slot.extend_from_slice(MAGIC);
    slot.extend_from_slice(&VERSION.to_le_bytes());
    let length = u32::try_from(state.len()).expect("a state is bounded by MAX_VALUE");
    slot.extend_from_slice(&length.to_le_bytes());
    slot.extend_from_slice(&generation.to_le_bytes());
    slot.extend_from_slice(&checksum(&slot, &state).to_le_bytes());
    slot.extend_from_slice(&state);
    slot
}

/// What the two slots say. Each argument is what lies in the place of a slot: it may be longer, empty or all zeros.
/// Nothing if no write has ever been completed.
///
/// # Errors
/// [`Corrupt`].
pub fn recover(slot_a: &[u8], slot_b: &[u8]) -> Result<Option<Recovered>, Corrupt> {
    let read = |bytes, slot| decode_slot(bytes).filter(|found: &Recovered| Slot::of(found.generation) == slot);
    let is_empty = |bytes: &[u8]| bytes.iter().all(|&byte| byte == 0);
    match (read(slot_a, Slot::A), read(slot_b, Slot::B)) {
        (Some(a), Some(b)) => Ok(Some(if a.generation > b.generation { a } else { b })),
        (Some(one), None) | (None, Some(one)) => Ok(Some(one)),
        // The first write goes to slot B, the second to A: with A untouched there is no completed one to lose.
        (None, None) if is_empty(slot_a) => Ok(None),
        (None, None) => Err(Corrupt),
    }
}

fn checksum(header: &[u8], state: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(header);
    hasher.update(state);
    hasher.digest()
}

fn decode_slot(bytes: &[u8]) -> Option<Recovered> {
    let mut rest = bytes;
    let known = take(&mut rest, 8)? == MAGIC && u32_of(&mut rest)? == VERSION;
    let length = u32_of(&mut rest)? as usize;
    let generation = u64_of(&mut rest)?;
    let sum = u64_of(&mut rest)?;
    if !known || length > MAX_SLOT - HEADER {
        return None;
    }
    let state = take(&mut rest, length)?;
    (checksum(&bytes[..HEADER - 8], state) == sum).then_some(())?;
    Some(Recovered { generation, state: decode_state(state)? })
}

/// A state as bytes.
pub fn encode_state(state: &State) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(2 * BALLOT + 1 + state.accepted.as_ref().map_or(0, |(_, value)| value.len()));
    put_ballot(&mut bytes, state.promised);
    match &state.accepted {
        None => bytes.push(0),
        Some((ballot, value)) => {
            bytes.push(1);
            put_ballot(&mut bytes, *ballot);
            bytes.extend_from_slice(value);
        }
    }
    bytes
}

/// A state from its bytes; nothing if they are none.
pub fn decode_state(mut bytes: &[u8]) -> Option<State> {
    let promised = ballot_of(&mut bytes)?;
    let accepted = match (take(&mut bytes, 1)?, bytes.len()) {
        ([0], 0) => None,
        ([1], _) => Some((ballot_of(&mut bytes)?, bytes.to_vec())),
        _ => return None,
    };
    let sound = accepted.as_ref().is_none_or(|(ballot, value)| *ballot <= promised && value.len() <= MAX_VALUE);
    sound.then_some(State { promised, accepted })
}

fn put_ballot(bytes: &mut Vec<u8>, ballot: Ballot) {
    bytes.extend_from_slice(&ballot.counter.to_le_bytes());
    bytes.extend_from_slice(&ballot.node.0.to_le_bytes());
    bytes.extend_from_slice(&ballot.life.to_le_bytes());
}

fn ballot_of(rest: &mut &[u8]) -> Option<Ballot> {
    let counter = u64_of(rest)?;
    let node = NodeNo(u16::from_le_bytes(take(rest, 2)?.try_into().ok()?));
    Some(Ballot { counter, node, life: u64_of(rest)? })
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

fn u32_of(rest: &mut &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(take(rest, 4)?.try_into().ok()?))
}

fn u64_of(rest: &mut &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(take(rest, 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(counter: u64) -> State {
        let ballot = Ballot { counter, node: NodeNo(3), life: 7 };
        State { promised: ballot, accepted: Some((ballot, vec![counter as u8; 40])) }
    }

    #[test]
    fn the_newer_slot_counts() {
        let (a, b) = (encode_slot(4, &state(4)), encode_slot(5, &state(5)));
        assert_eq!(recover(&a, &b), Ok(Some(Recovered { generation: 5, state: state(5) })));
        let a = encode_slot(6, &State::default());
        assert_eq!(recover(&a, &b), Ok(Some(Recovered { generation: 6, state: State::default() })));
    }

    #[test]
    fn any_torn_or_flipped_slot_leaves_the_other() {
        let (a, b) = (encode_slot(4, &state(4)), encode_slot(5, &state(5)));
        let older = Ok(Some(Recovered { generation: 4, state: state(4) }));
        let former = encode_slot(3, &state(3));
        for at in 0..b.len() {
            assert_eq!(recover(&a, &b[..at]), older, "cut at {at}");
            let mut flipped = b.clone();
            flipped[at] ^= 0x10;
            assert_eq!(recover(&a, &flipped), older, "flipped at {at}");
            let torn: Vec<u8> = b[..at].iter().chain(&former[at..]).copied().collect();
            let found = recover(&a, &torn).expect("slot A is whole").expect("slot A is whole");
            assert_eq!(found.generation, 4, "torn at {at}");
        }
    }

    #[test]
    fn a_file_never_written_is_empty_and_a_lost_one_is_corrupt() {
        let (a, b) = (encode_slot(2, &state(2)), encode_slot(1, &state(1)));
        assert_eq!(recover(&[], &[]), Ok(None));
        assert_eq!(recover(&[0; 64], &b[..20]), Ok(None), "the first write was torn");
        assert_eq!(recover(&a[..20], &b[..20]), Err(Corrupt));
        assert_eq!(recover(&a[..20], &[]), Err(Corrupt));
        assert_eq!(recover(&b, &a), Err(Corrupt), "slots in each other's place");
    }

    #[test]
    fn a_slot_may_be_followed_by_what_was_there_before() {
        let mut b = encode_slot(1, &State::default());
        b.extend_from_slice(&[0xAB; 100]);
        assert_eq!(recover(&[], &b), Ok(Some(Recovered { generation: 1, state: State::default() })));
    }
}
