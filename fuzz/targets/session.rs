//! A session: the number of cores, and whose answer comes first, is invisible to the client.
//!
//! The same bytes go to a node of one core and, in pieces and with answers in any order, to one of three. Both keep their
//! bounds and both say the same. Where a full query buffer ended one of them (which depends on what had to wait), it
//! must have said a beginning of what the other said.
#![no_main]

use gridkv_fuzz::{Schedule, is_large, split};
use gridkv_net::resp::Limits as WireLimits;
use gridkv_net::session::testing::Cores;
use gridkv_net::session::{Backplane, Limits, Session};
use libfuzzer_sys::fuzz_target;

const QUERY_BUFFER: usize = 600;
/// Replies that wait may exceed their bound by those that were asked for before it was reached; this is far more.
const MOST_PARKED: usize = 4 << 20;
const FULL: &[u8] = b"-ERR Protocol error: the query buffer is full\r\n";

fn cores(number: usize, password: bool) -> Cores {
    let mut cores = Cores::new(number);
    cores.limits = Limits {
        wire: WireLimits { max_args: 12, max_bulk: 300, max_line: 200 },
        max_key: 20,
        query_buffer: QUERY_BUFFER,
        output_high_water: 500,
        max_pending: 5,
        multi_queue: 6,
    };
    cores.room = 2;
    cores.password = password.then_some(b"sesame");
    cores.refuses = is_large;
    cores
}

fn check(session: &Session) {
    assert!(session.input_bytes() <= QUERY_BUFFER);
    assert!(session.parked_bytes() <= MOST_PARKED);
}

/// What the client reads. It takes replies as they come; `patient` ones do not write while the session is stalled.
fn talk(mut cores: Cores, bytes: &[u8], patient: bool, mut next: impl FnMut(usize) -> usize) -> Vec<u8> {
    let mut session = Session::new(1, cores.needs_password());
    let (mut said, mut out) = (Vec::new(), Vec::new());
    let mut rest = bytes;
    while !rest.is_empty() && !session.is_finished() {
        let (piece, tail) = rest.split_at((1 + next(64)).min(rest.len()));
        rest = tail;
        session.feed(piece, &mut cores, &mut out);
        check(&session);
        if next(4) == 0 && !out.is_empty() {
            said.append(&mut out);
        }
        let answers = next(3);
        for _ in 0..answers {
            cores.serve(next(3) % cores.cores(), &mut session, &mut out);
            check(&session);
        }
        if next(2) == 0 {
            session.resume(&mut cores, &mut out);
            check(&session);
        }
        while patient && session.is_stalled() {
            said.append(&mut out);
            cores.settle(&mut session, &mut out, &mut || next(256));
            check(&session);
        }
    }
    loop {
        said.append(&mut out);
        cores.settle(&mut session, &mut out, &mut || next(256));
        check(&session);
        if out.is_empty() {
            break;
        }
    }
    assert!(!session.is_waiting(), "all is answered");
    said
}

/// The replies before a session was ended by a full buffer, if it was.
fn before_full(said: &[u8]) -> Option<&[u8]> {
    said.strip_suffix(FULL)
}

fuzz_target!(|input: &[u8]| {
    let (mut schedule, bytes) = split(input);
    let chosen = schedule.below(8);
    let (password, patient) = (chosen & 1 == 1, chosen & 6 != 0);
    let next = |schedule: &mut Schedule<'_>, end| schedule.below(end);
    let alone = talk(cores(1, password), bytes, true, |_| 1);
    let shared = talk(cores(3, password), bytes, patient, |end| next(&mut schedule, end));
    let (one, three) = (before_full(&alone), before_full(&shared));
    match (one, three) {
        (None, None) => assert_eq!(text(&alone), text(&shared)),
        (one, three) => {
            let (one, three) = (one.unwrap_or(&alone), three.unwrap_or(&shared));
            assert!(one.starts_with(three) || three.starts_with(one), "{} or {}", text(one), text(three));
        }
    }
});

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}
