//! The decoder of RESP: however the bytes are cut, the commands are the same, or the error is.
//!
//! Also: what is consumed and where arguments lie stays inside the input, limits are kept, and
//! `Incomplete { need }` is true: with fewer bytes there is nothing new.
#![no_main]

use gridkv_fuzz::split;
use gridkv_net::resp::{Decoder, Limits, Parsed, ProtocolError, Short};
use libfuzzer_sys::fuzz_target;

const TINY: Limits = Limits { max_args: 8, max_bulk: 40, max_line: 24 };

type Commands = (Vec<Vec<Vec<u8>>>, Option<ProtocolError>, usize);

/// Reads commands until bytes end or are refused. `next` says how many more bytes arrive; 0 = all.
fn read(bytes: &[u8], limits: &Limits, mut next: impl FnMut() -> usize) -> Commands {
    let (mut decoder, mut spans) = (Decoder::new(), Vec::new());
    let (mut begin, mut end, mut needed) = (0, 0, 0);
    let mut commands = Vec::new();
    loop {
        let input = &bytes[begin..end];
        let short = decoder.short(input, limits);
        let parsed = match decoder.parse(input, limits, &mut spans) {
            Ok(parsed) => {
                if let Some(Short { key, value, consumed }) = short {
                    assert_eq!(parsed, Parsed::Command { consumed });
                    assert_eq!(spans[1..], [Some(key), value].into_iter().flatten().collect::<Vec<_>>());
                }
                parsed
            }
            Err(error) => {
                assert!(input.len() >= needed, "an error came before the {needed} bytes that were needed");
                return (commands, Some(error), begin);
            }
        };
        let consumed = match parsed {
            Parsed::Incomplete { need } => {
                assert!(need > input.len());
                needed = needed.max(need);
                if end == bytes.len() {
                    return (commands, None, begin);
                }
                end = match next() {
                    0 => bytes.len(),
                    more => (end + more).min(bytes.len()),
                };
                continue;
            }
            Parsed::Nothing { consumed } => consumed,
            Parsed::Command { consumed } => {
                assert!((1..=limits.max_args as usize).contains(&spans.len()));
                assert!(spans.iter().all(|span| span.len <= limits.max_bulk));
                commands.push(spans.iter().map(|span| span.of(&input[..consumed]).to_vec()).collect::<Vec<_>>());
                consumed
            }
            Parsed::Line { consumed } => {
                assert!(!spans.is_empty() && consumed <= limits.max_line as usize + 1);
                commands.push(spans.iter().map(|span| span.of(decoder.line()).to_vec()).collect());
                consumed
            }
        };
        assert!(0 < consumed && consumed <= input.len() && input.len() >= needed);
        begin += consumed;
        needed = 0;
    }
}

fuzz_target!(|input: &[u8]| {
    let (mut schedule, bytes) = split(input);
    let limits = [TINY, Limits::STRANGER, Limits::default()][schedule.below(3)];
    let whole = read(bytes, &limits, || 0);
    assert_eq!(read(bytes, &limits, || 1), whole, "byte by byte");
    assert_eq!(read(bytes, &limits, || schedule.below(40)), whole, "in pieces");
});
