//! Running requests on the data of this core.
//!
//! The one place where a frame meets the [`Store`]. Each request runs under `catch_unwind`: a panic answers that request
//! with an error, is logged and counted, and the batch goes on. Whatever the panicking request had already put into the
//! reply batch is taken back, so a reply is whole or an error.

use std::panic::{AssertUnwindSafe, catch_unwind};

use gridkv_engine::Millis;
use gridkv_engine::command::{self, CommandId, Context, Flags, Route, Spec};
use gridkv_engine::hash::KeyHash;
use gridkv_engine::reply::Reply;
use gridkv_engine::store::Store;
use gridkv_net::frame::{Batch, Frame, FrameError, Frames, GroupKey, Head, Kind, Mark, Status};
use gridkv_net::resp::{Protocol, Writer};
use gridkv_net::session::transaction::version_bytes;

use super::flush::{self, Flushes};
use crate::metrics::{CoreMetrics, Watch};

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
    /// `None` for a scratch store: it is no part of what the node holds, and who runs a command there counts it. Only the
    /// commands within a transaction are counted where they run: if they write, by the node that orders the shard.
    pub(crate) flushes: Option<&'a Flushes>,
}

/// Buffers kept between requests.
#[derive(Default)]
pub(crate) struct Scratch {
    resp: Vec<u8>,
}

/// Answers the requests of `requests` in `replies`, in order, from `mark` on. When the replies reach `stop_at` bytes, where the
/// first request is that was left.
pub(crate) fn batch(
    serving: &mut Serving<'_>,
    requests: &Batch,
    mark: Mark,
    stop_at: usize,
    replies: &mut Batch,
) -> Option<Mark> {
    let mut args = Vec::new();
    let mut frames = Frames::from(requests.bytes(), mark.at).peekable();
    let mut keys_done = mark.keys;
    let mut window = Vec::with_capacity(requests.len().min(AHEAD));
    let whole = "batches inside a node are written by Batch, which writes whole frames";
    while let Some(first) = frames.next() {
        let first = first.expect(whole);
        if first.kind == Kind::Group {
            if let Some(keys) = group(serving, &first, keys_done, stop_at, replies) {
                return Some(Mark { at: first.at(), keys });
            }
            keys_done = 0;
            continue;
        }
        // The misses of a window's keys overlap: first their buckets are asked for, then their entries, then they are served.
        window.clear();
        let mut next = Some(first);
        while let Some(frame) = next {
            serving.store.prefetch_place(KeyHash(frame.head.hash));
            window.push(frame);
            let more = |frame: &_| window.len() < AHEAD && !matches!(frame, Ok(Frame { kind: Kind::Group, .. }));
            next = frames.next_if(more).map(|frame| frame.expect(whole));
        }
        if window.len() > 1 {
            window.iter().for_each(|frame| serving.store.prefetch_entry(KeyHash(frame.head.hash)));
        }
        for frame in &window {
            if replies.bytes().len() >= stop_at {
                return Some(Mark { at: frame.at(), keys: 0 });
            }
            guarded(serving, frame, &mut args, replies);
        }
    }
    None
}

/// Frames, or keys of a group, looked at before the first of them is served.
const AHEAD: usize = 32;

/// Reads the keys of a group behind the first `done`. When the replies reach `stop_at` bytes, how many are done.
fn group(
    serving: &mut Serving<'_>,
    frame: &Frame<'_>,
    mut done: usize,
    stop_at: usize,
    replies: &mut Batch,
) -> Option<usize> {
    let mut keys = frame.keys(done).map(|key| key.expect("groups are made inside a node"));
    let mut window = [GroupKey { hash: 0, index: 0, bytes: b"" }; AHEAD];
    loop {
        let mut known = 0;
        for (place, key) in window.iter_mut().zip(&mut keys) {
            serving.store.prefetch_place(KeyHash(key.hash));
            *place = key;
            known += 1;
        }
        if known == 0 {
            return None;
        }
        window[..known].iter().for_each(|key| serving.store.prefetch_entry(KeyHash(key.hash)));
        let mut rest = &window[..known];
        while !rest.is_empty() {
            if replies.bytes().len() >= stop_at {
                return Some(done);
            }
            let before = rest.len();
            let watch = serving.metrics.is_next_due(serving.metrics.get_id()).then(Watch::sample);
            let read = catch_unwind(AssertUnwindSafe(|| {
                while let [key, behind @ ..] = rest
                    && replies.bytes().len() < stop_at
                {
                    let value = serving.store.value(KeyHash(key.hash), key.bytes, serving.now);
                    replies.push_value(&frame.head, key.index, value);
                    rest = behind;
                }
            }));
            if read.is_err()
                && let [key, behind @ ..] = rest
            {
                serving.metrics.panics += 1;
                let head = Head { index: key.index, ..frame.head };
                replies.push_reply(&head, Status::Error, 0, PANIC_REPLY.as_bytes());
                rest = behind;
                serving.metrics.record_failed(serving.metrics.get_id());
            }
            let read = before - rest.len();
            serving.metrics.record_gets(read as u64);
            if let Some(watch) = watch {
                serving.metrics.record_time(serving.metrics.get_id(), &watch, read as u64);
            }
            done += read;
        }
    }
}

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
            if let Some(id) = command_of(frame.kind, &frame.head, serving.metrics).filter(|_| serving.flushes.is_some())
            {
                serving.metrics.record_failed(id);
            }
            // A reply is pushed in one call after the work is done, so a panic left none.
            replies.push_reply(&frame.head, Status::Error, 0, PANIC_REPLY.as_bytes());
        }
    }
}

/// The command that a request counts as.
pub(crate) fn command_of(kind: Kind, head: &Head, metrics: &CoreMetrics) -> Option<CommandId> {
    match kind {
        Kind::Get => Some(metrics.get_id()),
        Kind::Set => Some(metrics.set_id()),
        Kind::Delete => Some(metrics.delete_id()),
        Kind::Command => Some(CommandId(head.spec)),
        Kind::Exec => Some(metrics.exec_id()),
        Kind::Version | Kind::Group | Kind::Reply => None,
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
            let watch = serving.metrics.record_gets(1).then(Watch::sample);
            match serving.store.value(KeyHash(head.hash), frame.payload, now) {
                Some(value) => replies.push_reply(head, Status::Value, 0, value),
                None => replies.push_reply(head, Status::Nil, 0, b""),
            }
            stop(serving.metrics, CoreMetrics::get_id, watch);
        }
        Kind::Set => {
            let (key, value) = frame.key_value()?;
            let watch = serving.metrics.record_sets(1).then(Watch::sample);
            match serving.store.set(KeyHash(head.hash), key, value, head.aux as Millis, now) {
                Ok(_) => replies.push_reply(head, Status::Done, 0, b""),
                Err(error) => failed(serving.metrics, CoreMetrics::set_id, replies, head, &error.to_string()),
            }
            stop(serving.metrics, CoreMetrics::set_id, watch);
        }
        Kind::Delete => {
            let watch = serving.metrics.record_deletes(1).then(Watch::sample);
            match serving.store.delete(KeyHash(head.hash), frame.payload, now) {
                Ok(deleted) => replies.push_reply(head, Status::Integer, i64::from(deleted), b""),
                Err(error) => failed(serving.metrics, CoreMetrics::delete_id, replies, head, &error.to_string()),
            }
            stop(serving.metrics, CoreMetrics::delete_id, watch);
        }
        Kind::Command => {
            let args = frame.args(args)?;
            let Some(spec) = command::by_id(CommandId(head.spec)) else {
                push_error(replies, head, "ERR unknown command number");
                return Ok(());
            };
            let _part = serving.flushes.filter(|_| flush::empties(spec)).map(Flushes::part);
            let counts = serving.flushes.is_some();
            let due = counts && serving.metrics.record_command(spec, 1);
            let watch = if counts && is_heavy(spec, args) { Some(Watch::each()) } else { due.then(Watch::sample) };
            if head.flag == NATIVE {
                let mut reply = NativeReply::default();
                run(serving.store, now, spec, args, &mut reply);
                replies.push_reply(head, reply.status, reply.aux, &reply.bytes);
                if counts && reply.status == Status::Error {
                    serving.metrics.record_end(spec.id, &reply.bytes);
                }
            } else {
                let mut resp = std::mem::take(&mut serving.scratch.resp);
                resp.clear();
                let mut writer = Writer::new(Protocol::from_flag(head.flag), &mut resp);
                let aux = run(serving.store, now, spec, args, &mut writer);
                replies.push_reply(head, Status::Encoded, aux, &resp);
                if counts && let Some(text) = resp.strip_prefix(b"-") {
                    serving.metrics.record_end(spec.id, text);
                }
                serving.scratch.resp = resp;
            }
            stop(serving.metrics, |_| spec.id, watch);
        }
        Kind::Exec => {
            let watch = serving.flushes.map(|_| Watch::each());
            if let Err(error) = super::transaction::serve(serving, frame, replies) {
                push_error(replies, head, &format!("ERR {error}"));
            }
            if let Some(watch) = watch {
                let id = serving.metrics.exec_id();
                serving.metrics.record_took(id, watch.elapsed());
            }
        }
        Kind::Version => match serving.store.version(KeyHash(head.hash), frame.payload, now) {
            Some(version) => replies.push_reply(head, Status::Value, 0, &version_bytes(version)),
            None => replies.push_reply(head, Status::Nil, 0, b""),
        },
        Kind::Group => push_error(replies, head, "ERR a group came as a single request"),
        Kind::Reply => push_error(replies, head, "ERR a reply came in the lane of requests"),
    }
    Ok(())
}

/// The request that is timed, if it is, is over.
#[inline]
fn stop(metrics: &mut CoreMetrics, of: impl FnOnce(&CoreMetrics) -> CommandId, watch: Option<Watch>) {
    if let Some(watch) = watch {
        let id = of(metrics);
        metrics.record_time(id, &watch, 1);
    }
}

#[cold]
fn failed(
    metrics: &mut CoreMetrics,
    of: impl FnOnce(&CoreMetrics) -> CommandId,
    replies: &mut Batch,
    head: &Head,
    text: &str,
) {
    let id = of(metrics);
    metrics.record_end(id, text.as_bytes());
    push_error(replies, head, text);
}

fn push_error(replies: &mut Batch, head: &Head, text: &str) {
    replies.push_reply(head, Status::Error, 0, text.as_bytes());
}

/// Arguments of this size make a command slow enough to be worth timing.
const LARGE: usize = 64 << 10;

/// Whether a command may take so much longer than reading the clock that it is timed each time: what takes long on large values
/// that are there already, however short it is itself, and what is long itself.
#[inline]
pub(super) fn is_heavy(spec: &Spec, args: &[&[u8]]) -> bool {
    let on_large = || spec.first_key == 0 || spec.flags.contains(Flags::READONLY) || spec.route == Route::Shard;
    !spec.flags.contains(Flags::FAST) && (args.len() > 8 || on_large()) || args.iter().any(|arg| arg.len() > LARGE)
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

#[cfg(test)]
mod tests {
    use super::*;
    use gridkv_engine::backend::{DEFAULT_BACKEND, Registry};
    use gridkv_engine::store::StoreConfig;
    use proptest::prelude::*;

    const NOW: Millis = 1_800_000_000_000;

    fn store() -> Store {
        let config = StoreConfig::default();
        let backend = Registry::default().make(DEFAULT_BACKEND, &config.backend()).unwrap();
        let mut store = Store::new(config, backend);
        for number in 0..40 {
            let key = format!("key:{number}");
            store.set(store.locate(key.as_bytes()), key.as_bytes(), &vec![b'v'; number * 7], 0, NOW).unwrap();
        }
        store
    }

    /// Which request got what: the answers of a batch, whatever frames they came in.
    fn answers(replies: &Batch) -> Vec<(u32, u32, Option<Vec<u8>>)> {
        let mut answers = Vec::new();
        for frame in replies.frames().map(Result::unwrap) {
            let (slot, index, payload) = (frame.head.slot, frame.head.index, frame.payload);
            match frame.status() {
                Status::Values => answers.extend(
                    frame
                        .values()
                        .map(Result::unwrap)
                        .map(|(index, place)| (slot, index, place.map(|place| payload[place].to_vec()))),
                ),
                Status::Nil => answers.push((slot, index, None)),
                _ => answers.push((slot, index, Some(payload.to_vec()))),
            }
        }
        answers
    }

    #[test]
    fn what_may_take_long_is_timed_each_time() {
        let heavy = |words: &[&[u8]]| is_heavy(command::resolve(words).unwrap(), words);
        for line in ["LCS a b", "BITCOUNT k", "GETRANGE k 0 -1", "COPY a b", "RENAME a b", "KEYS *"] {
            assert!(heavy(&line.split(' ').map(str::as_bytes).collect::<Vec<_>>()), "{line}");
        }
        for line in
            ["GET k", "SET k v EX 9", "SETEX k 9 v", "INCR k", "DEL k", "MGET a b", "MSET a 1 b 2", "GETBIT k 7"]
        {
            assert!(!heavy(&line.split(' ').map(str::as_bytes).collect::<Vec<_>>()), "{line}");
        }
        assert!(heavy(&[b"SET", b"k", &[b'v'; LARGE + 1], b"XX"]));
        assert!(heavy(&[&b"DEL"[..]; 9]));
    }

    proptest! {
        /// Single reads and groups, of keys that exist or not, served in pieces or in one go, or flattened from where a piece
        /// ended: each request is answered once, in order, and alike.
        #[test]
        fn wherever_serving_stops_it_goes_on_with_the_next_key(
            asks in proptest::collection::vec((0u32..3, 0u32..50, any::<bool>()), 1..150),
            stops in proptest::collection::vec(1usize..3000, 0..10),
        ) {
            let mut store = store();
            let (mut metrics, mut scratch) = (CoreMetrics::default(), Scratch::default());
            let mut serving = Serving { store: &mut store, metrics: &mut metrics, scratch: &mut scratch, now: NOW, flushes: None };
            let mut requests = Batch::new();
            let mut expected = Vec::new();
            for (at, &(slot, number, grouped)) in asks.iter().enumerate() {
                let (key, index) = (format!("key:{number}"), at as u32);
                let hash = serving.store.locate(key.as_bytes());
                let head = Head { hash: hash.0, slot, index, ..Head::default() };
                match grouped {
                    true => requests.push_key(&head, key.as_bytes()),
                    false => requests.push(head, Kind::Get, &[key.as_bytes()]),
                }
                expected.push((slot, index, (number < 40).then(|| vec![b'v'; number as usize * 7])));
            }
            prop_assert_eq!(requests.len(), asks.len());

            let (mut seen, mut mark) = (Vec::new(), Some(Mark::default()));
            for stop_at in stops {
                let Some(from) = mark else { break };
                let mut replies = Batch::new();
                mark = batch(&mut serving, &requests, from, stop_at, &mut replies);
                prop_assert!(!replies.is_empty(), "a piece does something");
                seen.extend(answers(&replies));
            }
            if let Some(from) = mark {
                let flat = requests.flat(from);
                prop_assert!(flat.frames().all(|frame| frame.unwrap().kind == Kind::Get));
                let mut replies = Batch::new();
                prop_assert_eq!(batch(&mut serving, &flat, Mark::default(), usize::MAX, &mut replies), None);
                seen.extend(answers(&replies));
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
