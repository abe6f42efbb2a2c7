//! Running requests on the data of this core.
//!
//! The one place where a frame meets the [`Store`]. Each request runs under `catch_unwind`: a panic answers that request
//! with an error, is logged and counted, and the batch goes on. Whatever the panicking request had already put into the
//! reply batch is taken back, so a reply is whole or an error.

use std::panic::{AssertUnwindSafe, catch_unwind};

use gridkv_engine::Millis;
use gridkv_engine::command::{self, Context, Spec};
use gridkv_engine::hash::KeyHash;
use gridkv_engine::reply::Reply;
use gridkv_engine::store::Store;
use gridkv_net::frame::{Batch, Frame, FrameError, Frames, Head, Kind, Status};
use gridkv_net::resp::{Protocol, Writer};
use gridkv_net::session::transaction::version_bytes;

use super::flush::{self, Flushes};
use crate::metrics::CoreMetrics;

/// The dialect of a `Command` frame that wants a [`Status`] and bytes instead of RESP.
pub(crate) const NATIVE: u8 = 0;

/// What a request that panicked is told.
pub(crate) const PANIC_REPLY: &str = "ERR internal error: this request panicked and was abandoned; the node goes on";

/// What serving needs of a core; borrowed apart so that the reply batch can be a lane of the mesh.
pub(crate) struct Serving<'a> {
    pub(crate) store: &'a mut Store,
    pub(crate) metrics: &'a mut CoreMetrics,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) now: Millis,
    /// `None` for a scratch store: it is no part of what the node holds.
    pub(crate) flushes: Option<&'a Flushes>,
}

/// Buffers kept between requests.
#[derive(Default)]
pub(crate) struct Scratch {
    resp: Vec<u8>,
}

/// Answers the requests of `requests` in `replies`, in order, from offset `from` on. When the replies reach `stop_at`
/// bytes, the offset of the first request that was left.
pub(crate) fn batch(
    serving: &mut Serving<'_>,
    requests: &Batch,
    from: usize,
    stop_at: usize,
    replies: &mut Batch,
) -> Option<usize> {
    let mut args = Vec::new();
    let mut frames = Frames::from(requests.bytes(), from);
    let mut window = Vec::with_capacity(requests.len().min(AHEAD));
    loop {
        // The misses of a window's keys overlap: first their buckets are asked for, then their entries, then they are served.
        window.clear();
        for frame in frames.by_ref().take(AHEAD) {
            let frame = frame.expect("batches inside a node are written by Batch, which writes whole frames");
            serving.store.prefetch_place(KeyHash(frame.head.hash));
            window.push(frame);
        }
        if window.is_empty() {
            return None;
        }
        if window.len() > 1 {
            window.iter().for_each(|frame| serving.store.prefetch_entry(KeyHash(frame.head.hash)));
        }
        for frame in &window {
            if replies.bytes().len() >= stop_at {
                return Some(frame.at());
            }
            guarded(serving, frame, &mut args, replies);
        }
    }
}

/// Frames looked at before the first of them is served.
const AHEAD: usize = 32;

/// Answers one request, whatever happens.
#[inline]
pub(crate) fn guarded<'f>(serving: &mut Serving<'_>, frame: &Frame<'f>, args: &mut Vec<&'f [u8]>, replies: &mut Batch) {
    match catch_unwind(AssertUnwindSafe(|| one(serving, frame, args, replies))) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            let text = format!("ERR malformed request: {error}");
            replies.push_reply(&frame.head, Status::Error, 0, text.as_bytes());
        }
        Err(_) => {
            serving.metrics.panics += 1;
            // A reply is pushed in one call after the work is done, so a panic left none.
            replies.push_reply(&frame.head, Status::Error, 0, PANIC_REPLY.as_bytes());
        }
    }
}

#[inline]
fn one<'f>(
    serving: &mut Serving<'_>,
    frame: &Frame<'f>,
    args: &mut Vec<&'f [u8]>,
    replies: &mut Batch,
) -> Result<(), FrameError> {
    let head = &frame.head;
    let now = serving.now;
    match frame.kind {
        Kind::Get => {
            serving.metrics.record_gets(1);
            match serving.store.value(KeyHash(head.hash), frame.payload, now) {
                Some(value) => replies.push_reply(head, Status::Value, 0, value),
                None => replies.push_reply(head, Status::Nil, 0, b""),
            }
        }
        Kind::Set => {
            serving.metrics.record_sets(1);
            let (key, value) = frame.key_value()?;
            match serving.store.set(KeyHash(head.hash), key, value, head.aux as Millis, now) {
                Ok(_) => replies.push_reply(head, Status::Done, 0, b""),
                Err(error) => push_error(replies, head, &error.to_string()),
            }
        }
        Kind::Delete => {
            serving.metrics.record_deletes(1);
            match serving.store.delete(KeyHash(head.hash), frame.payload, now) {
                Ok(deleted) => replies.push_reply(head, Status::Integer, i64::from(deleted), b""),
                Err(error) => push_error(replies, head, &error.to_string()),
            }
        }
        Kind::Command => {
            let args = frame.args(args)?;
            let Some(spec) = command::by_id(command::CommandId(head.spec)) else {
                push_error(replies, head, "ERR unknown command number");
                return Ok(());
            };
            let _part = serving.flushes.filter(|_| flush::empties(spec)).map(Flushes::part);
            serving.metrics.record_command(spec, 1);
            if head.flag == NATIVE {
                let mut reply = NativeReply::default();
                run(serving.store, now, spec, args, &mut reply);
                replies.push_reply(head, reply.status, reply.aux, &reply.bytes);
            } else {
                let mut resp = std::mem::take(&mut serving.scratch.resp);
                resp.clear();
                let mut writer = Writer::new(Protocol::from_flag(head.flag), &mut resp);
                let aux = run(serving.store, now, spec, args, &mut writer);
                replies.push_reply(head, Status::Encoded, aux, &resp);
                serving.scratch.resp = resp;
            }
        }
        Kind::Exec => {
            if let Err(error) = super::transaction::serve(serving, frame, replies) {
                push_error(replies, head, &format!("ERR {error}"));
            }
        }
        Kind::Version => match serving.store.version(KeyHash(head.hash), frame.payload, now) {
            Some(version) => replies.push_reply(head, Status::Value, 0, &version_bytes(version)),
            None => replies.push_reply(head, Status::Nil, 0, b""),
        },
        Kind::Reply => push_error(replies, head, "ERR a reply came in the lane of requests"),
    }
    Ok(())
}

fn push_error(replies: &mut Batch, head: &Head, text: &str) {
    replies.push_reply(head, Status::Error, 0, text.as_bytes());
}

/// Runs one command of the table; returns what it left in [`Context::aux`].
#[inline]
pub(crate) fn run(store: &mut Store, now: Millis, spec: &Spec, args: &[&[u8]], out: &mut dyn Reply) -> i64 {
    #[cfg(feature = "fault-injection")]
    crate::fault::maybe_panic(args);
    let Some(run) = spec.run else {
        out.error("ERR this command does not run on a core");
        return 0;
    };
    let mut context = Context { store, args, now, out, aux: 0 };
    run(&mut context);
    context.aux
}

/// Collects the reply of a command as a status, a number and bytes, for callers that are not RESP clients.
#[derive(Debug)]
pub(crate) struct NativeReply {
    pub(crate) status: Status,
    pub(crate) aux: i64,
    pub(crate) bytes: Vec<u8>,
}

impl Default for NativeReply {
    fn default() -> NativeReply {
        NativeReply { status: Status::Nil, aux: 0, bytes: Vec::new() }
    }
}

impl NativeReply {
    fn put(&mut self, status: Status, aux: i64, bytes: &[u8]) {
        self.status = status;
        self.aux = aux;
        self.bytes.clear();
        self.bytes.extend_from_slice(bytes);
    }
}

/// The facade uses commands that reply one scalar; of an array only the last element would remain.
impl Reply for NativeReply {
    fn simple(&mut self, _: &str) {
        self.put(Status::Done, 0, b"");
    }
    fn error(&mut self, text: &str) {
        self.put(Status::Error, 0, text.as_bytes());
    }
    fn integer(&mut self, value: i64) {
        self.put(Status::Integer, value, b"");
    }
    fn bulk(&mut self, value: &[u8]) {
        self.put(Status::Value, 0, value);
    }
    fn null(&mut self) {
        self.put(Status::Nil, 0, b"");
    }
    fn null_array(&mut self) {
        self.null();
    }
    fn array(&mut self, _: usize) {}
    fn map(&mut self, _: usize) {}
    fn set(&mut self, _: usize) {}
    fn double(&mut self, value: f64) {
        self.put(Status::Value, 0, value.to_string().as_bytes());
    }
    fn boolean(&mut self, value: bool) {
        self.put(Status::Integer, i64::from(value), b"");
    }
    fn verbatim(&mut self, text: &str) {
        self.put(Status::Value, 0, text.as_bytes());
    }
}
