//! Running a transaction on the core that owns its shard: nothing comes between its commands.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use gridkv_engine::Millis;
use gridkv_engine::command::{Flags, Spec};
use gridkv_engine::reply::Reply;
use gridkv_engine::store::{Store, StoreError};
use gridkv_net::frame::{Batch, Frame, Status};
use gridkv_net::resp::{Protocol, Writer};
use gridkv_net::session::transaction::{Malformed, Step, Transaction};

use super::serve::{self, Serving};
use crate::metrics::{CoreMetrics, Watch};

/// Who wants to know how long commands take, besides the numbers by command.
pub(super) struct Seen<'a> {
    /// Every command is timed.
    pub(super) each: bool,
    /// Is told of each command that was timed.
    pub(super) note: &'a mut Note<'a>,
}

/// A command, how long it took, and its arguments with its name.
type Note<'a> = dyn FnMut(&Spec, Duration, &[&[u8]]) + 'a;

/// Answers an `Exec` frame.
pub(super) fn serve(serving: &mut Serving<'_>, frame: &Frame<'_>, replies: &mut Batch) -> Result<(), Malformed> {
    let mut out = Vec::new();
    let protocol = Protocol::from_flag(frame.head.flag);
    run(serving.store, serving.metrics, serving.now, frame.payload, protocol, None, &mut out)?;
    replies.push_reply(&frame.head, Status::Encoded, 0, &out);
    if serving.flushes.is_some()
        && let Some(text) = out.strip_prefix(b"-")
    {
        // As a session's own core does: the session, which counts the text, has counted the call.
        let id = serving.metrics.exec_id();
        serving.metrics.record_end(id, text);
    }
    Ok(())
}

/// Runs a packed transaction and writes EXEC's reply: nothing but a null when a watched key has changed, and an error
/// when a command of it may take memory and there is none left. Both are known before the first command runs.
///
/// A command that panics is answered with an error; those behind it run, as after any other error.
pub(super) fn run(
    store: &mut Store,
    metrics: &mut CoreMetrics,
    now: Millis,
    packed: &[u8],
    protocol: Protocol,
    mut seen: Option<Seen<'_>>,
    out: &mut Vec<u8>,
) -> Result<(), Malformed> {
    let mut transaction = Transaction::new(packed);
    if !transaction.watched(|hash, key, version| store.version(hash, key, now) == version)? {
        Writer::new(protocol, out).null_array();
        return Ok(());
    }
    let full = if store.is_disk_full() { Some(StoreError::DiskFull) } else { None };
    let full = full.or_else(|| store.is_full().then_some(StoreError::OutOfMemory));
    if let Some(why) = full
        && takes_memory(transaction.clone())?
    {
        let text = format!("EXECABORT Transaction discarded because of: {why}");
        Writer::new(protocol, out).error(&text);
        return Ok(());
    }
    let steps = transaction.steps()?;
    Writer::new(protocol, out).array(steps as usize);
    let mut args = Vec::new();
    for _ in 0..steps {
        match transaction.step(&mut args)? {
            Step::Raw(reply) => out.extend_from_slice(reply),
            Step::Command(spec) => {
                let due = metrics.record_command(spec, 1);
                let each = seen.as_ref().is_some_and(|seen| seen.each) || serve::is_heavy(spec, &args);
                let watch = if each { Some(Watch::each()) } else { due.then(Watch::sample) };
                let before = out.len();
                let done = catch_unwind(AssertUnwindSafe(|| {
                    serve::run(store, now, spec, &args, &mut Writer::new(protocol, out))
                }));
                if done.is_err() {
                    out.truncate(before);
                    metrics.panics += 1;
                    Writer::new(protocol, out).error(serve::PANIC_REPLY);
                }
                if out.get(before) == Some(&b'-') {
                    let text = out[before + 1..].trim_ascii_end();
                    metrics.record_error(text);
                    metrics.record_end(spec.id, text);
                }
                if let Some(watch) = watch {
                    let took = metrics.record_time(spec.id, &watch, 1);
                    if let Some(seen) = &mut seen {
                        (seen.note)(spec, took, &args);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Whether one of the steps to come is refused by a store that is full.
fn takes_memory(mut transaction: Transaction<'_>) -> Result<bool, Malformed> {
    let mut args = Vec::new();
    for _ in 0..transaction.steps()? {
        if let Step::Command(spec) = transaction.step(&mut args)?
            && spec.flags.contains(Flags::DENYOOM)
        {
            return Ok(true);
        }
    }
    Ok(false)
}
