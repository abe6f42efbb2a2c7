//! Commands beside the data: any arguments, on one store whose invariants are checked after each.
//!
//! Commands are read as a client sends them, in words or as arrays. The console checks the contract of a command:
//! exactly one reply, complete, counted where a merge counts. Two words are the target's own: `!wait N` lets N
//! milliseconds pass, `!sweep N` looks for expired keys.
#![no_main]

use gridkv_engine::command::testing::Console;
use gridkv_engine::command::{number, resolve};
use gridkv_engine::hash::{Keyspace, ShardCount};
use gridkv_engine::store::StoreConfig;
use gridkv_fuzz::{is_large, split};
use gridkv_net::resp::{Decoder, Limits, Parsed};
use libfuzzer_sys::fuzz_target;

fn run(console: &mut Console, args: &[&[u8]]) {
    match args {
        [b"!wait", millis] => console.now += number::parse_i64(millis).unwrap_or(0).clamp(0, 1 << 40) as u64,
        [b"!sweep", budget] => {
            console.store.sweep(console.now, number::parse_i64(budget).unwrap_or(1).clamp(1, 100) as usize);
            console.store.invariants();
        }
        args if is_large(args) => {}
        args => {
            if resolve(args).is_ok_and(|spec| spec.run.is_some()) {
                console.run_args(args);
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let (mut schedule, mut bytes) = split(input);
    let chosen = schedule.below(8);
    let keyspace = Keyspace { seed: 7, shards: ShardCount::MIN };
    let mut console = Console::with(StoreConfig {
        keyspace,
        owned: 0..ShardCount::MIN.get(),
        max_memory: if chosen & 1 == 1 { 8 << 10 } else { 0 },
        keep_tombstones: chosen & 2 == 2,
        change_log_entries: 8,
        ..StoreConfig::default()
    });
    let (mut decoder, mut spans) = (Decoder::new(), Vec::new());
    while let Ok(parsed) = decoder.parse(bytes, &Limits::default(), &mut spans) {
        let consumed = match parsed {
            Parsed::Incomplete { .. } => break,
            Parsed::Nothing { consumed } => consumed,
            Parsed::Command { consumed } => {
                run(&mut console, &spans.iter().map(|span| span.of(bytes)).collect::<Vec<_>>());
                consumed
            }
            Parsed::Line { consumed } => {
                run(&mut console, &spans.iter().map(|span| span.of(decoder.line())).collect::<Vec<_>>());
                consumed
            }
        };
        bytes = &bytes[consumed..];
    }
});
