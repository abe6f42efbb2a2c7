//! Streams over the keys of a node, page by page in hash order.
//!
//! A page is fetched by one call to the core that owns the cursor's shard; the cursor is a position in hash space, so
//! growth between two pages neither loses nor repeats a key (see [`gridkv_engine::table`]).

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_lite::Stream;
use gridkv_engine::hash::KeyHash;

use crate::cores::CoreHandle;
use crate::{Error, GridKv};

/// Keys that one page looks at.
const PAGE_KEYS: usize = 256;

struct Page {
    pairs: VecDeque<(Bytes, Bytes)>,
    next: Option<KeyHash>,
}

type Fetch = Pin<Box<dyn Future<Output = Result<Page, Error>> + Send>>;

/// All pairs under a prefix; made by [`GridKv::scan`].
///
/// A stream for any runtime. After an error it ends.
pub struct Scan {
    db: GridKv,
    prefix: Bytes,
    values: bool,
    core: usize,
    from: Option<KeyHash>,
    page: VecDeque<(Bytes, Bytes)>,
    fetch: Option<Fetch>,
}

impl std::fmt::Debug for Scan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scan").field("prefix", &self.prefix).field("core", &self.core).finish_non_exhaustive()
    }
}

impl Scan {
    pub(crate) fn new(db: GridKv, prefix: &[u8]) -> Scan {
        Scan {
            db,
            prefix: Bytes::copy_from_slice(prefix),
            values: true,
            core: 0,
            from: Some(KeyHash(0)),
            page: VecDeque::new(),
            fetch: None,
        }
    }

    fn fetch(&self, from: KeyHash) -> Fetch {
        let (db, prefix, core, values) = (self.db.clone(), self.prefix.clone(), self.core, self.values);
        Box::pin(async move { db.call(core, move |core| page(core, from, &prefix, values)).await })
    }
}

fn page(core: &CoreHandle, from: KeyHash, prefix: &[u8], values: bool) -> Page {
    let mut pairs = VecDeque::new();
    let next = core.scan_page(from, PAGE_KEYS, |key, value| {
        if key.starts_with(prefix) {
            let value = if values { Bytes::copy_from_slice(value) } else { Bytes::new() };
            pairs.push_back((Bytes::copy_from_slice(key), value));
        }
    });
    Page { pairs, next }
}

impl Stream for Scan {
    type Item = Result<(Bytes, Bytes), Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pair) = self.page.pop_front() {
                return Poll::Ready(Some(Ok(pair)));
            }
            let Some(from) = self.from else {
                self.core += 1;
                if self.core >= self.db.cores() {
                    self.core = self.db.cores();
                    return Poll::Ready(None);
                }
                self.from = Some(KeyHash(0));
                continue;
            };
            if self.fetch.is_none() {
                self.fetch = Some(self.fetch(from));
            }
            let page = ready!(self.fetch.as_mut().expect("set above").as_mut().poll(cx));
            self.fetch = None;
            match page {
                Ok(page) => {
                    self.page = page.pairs;
                    self.from = page.next;
                }
                Err(error) => {
                    self.from = None;
                    self.core = self.db.cores();
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }
}

/// All keys under a prefix; made by [`GridKv::scan_keys`]. Values are not copied.
#[derive(Debug)]
pub struct ScanKeys(Scan);

impl ScanKeys {
    pub(crate) fn new(db: GridKv, prefix: &[u8]) -> ScanKeys {
        let mut scan = Scan::new(db, prefix);
        scan.values = false;
        ScanKeys(scan)
    }
}

impl Stream for ScanKeys {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(cx).map(|item| item.map(|pair| pair.map(|(key, _)| key)))
    }
}
