//! Frames between cores and nodes, and packed transactions: arbitrary bytes are read or refused, never believed.
//!
//! What was read and is written again is read as the same, and `Exec` payloads are walked as their executor would.
#![no_main]

use gridkv_net::frame::{Batch, Frame, Frames, HEAD_LEN, Kind};
use gridkv_net::session::transaction::{Step, Transaction};
use libfuzzer_sys::fuzz_target;

/// Steps read from a transaction.
fn transaction(bytes: &[u8]) -> Option<u32> {
    let mut transaction = Transaction::new(bytes);
    let mut keys = 0;
    transaction
        .watched(|_, key, _| {
            keys += key.len();
            true
        })
        .ok()?;
    assert!(keys <= bytes.len());
    let steps = transaction.steps().ok()?;
    let mut args = Vec::new();
    for _ in 0..steps {
        match transaction.step(&mut args).ok()? {
            Step::Raw(reply) => assert!(reply.len() <= bytes.len()),
            Step::Command(spec) => {
                assert!(!args.is_empty() && args.iter().map(|arg| arg.len()).sum::<usize>() <= bytes.len());
                assert!(spec.keys(args.len()).all(|at| at < args.len()) || !spec.accepts(args.len()));
            }
        }
    }
    Some(steps)
}

fn same(one: &Frame<'_>, other: &Frame<'_>) {
    assert_eq!((one.kind, one.head, one.payload), (other.kind, other.head, other.payload));
}

fn frames(bytes: &[u8]) {
    let (mut copy, mut read, mut end) = (Batch::new(), Vec::new(), 0);
    let mut args = Vec::new();
    for frame in Frames::new(bytes) {
        let Ok(frame) = frame else { break };
        assert!(frame.payload_at >= end + HEAD_LEN && frame.payload_at + frame.payload.len() <= bytes.len());
        end = frame.payload_at + frame.payload.len();
        let _ = frame.status();
        if let Ok((key, value)) = frame.key_value() {
            assert_eq!(key.len() + value.len(), frame.payload.len());
        }
        if frame.kind == Kind::Exec {
            transaction(frame.payload);
        }
        let keys: usize = frame.keys(0).map_while(Result::ok).map(|key| key.bytes.len()).sum();
        assert!(keys <= frame.payload.len());
        for (_, place) in frame.values().map_while(Result::ok) {
            assert!(place.is_none_or(|place| place.end <= frame.payload.len()));
        }
        match frame.args(&mut args) {
            Ok(args) if frame.kind == Kind::Command => copy.push_command(frame.head, args),
            _ => copy.push(frame.head, frame.kind, &[frame.payload]),
        }
        read.push(frame);
    }
    assert_eq!(copy.len(), read.len());
    for (one, other) in read.iter().zip(copy.frames()) {
        same(one, &other.expect("we wrote it"));
    }
}

fuzz_target!(|input: &[u8]| {
    transaction(input);
    // Batches begin at a multiple of eight. At other places the bytes must be refused, or read all the same.
    let mut placed = Vec::with_capacity(input.len() + 8);
    for shift in 0..8 {
        placed.clear();
        placed.resize(shift, 0);
        placed.extend_from_slice(input);
        frames(&placed[shift..]);
    }
});
