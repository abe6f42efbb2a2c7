//! The answers of grouped reads, without a copy per value.
//!
//! A reply batch from a core holds all values that core owned, end to end. [`Values`] keeps those buffers and, for each
//! key asked for, where its value lies; a value handed out is a counted reference into them.

use bytes::Bytes;

use crate::Error;

/// Where one answer lies.
#[derive(Clone, Copy, Debug)]
enum Span {
    Missing,
    At { part: u32, at: usize, len: usize },
    Failed(u32),
}

/// One answer per key, in the order the keys were given.
#[derive(Debug, Default)]
pub struct Values {
    parts: Vec<Bytes>,
    spans: Vec<Span>,
    errors: Vec<Error>,
}

impl Values {
    pub(crate) fn missing(keys: usize) -> Values {
        Values { parts: Vec::new(), spans: vec![Span::Missing; keys], errors: Vec::new() }
    }

    /// Adds a buffer; the returned number names it in [`Values::place`].
    pub(crate) fn add_part(&mut self, part: Bytes) -> u32 {
        self.parts.push(part);
        self.parts.len() as u32 - 1
    }

    pub(crate) fn place(&mut self, key: usize, part: u32, at: usize, len: usize) {
        self.spans[key] = Span::At { part, at, len };
    }

    pub(crate) fn fail(&mut self, key: usize, error: Error) {
        self.errors.push(error);
        self.spans[key] = Span::Failed(self.errors.len() as u32 - 1);
    }

    /// Number of keys that were asked for.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether no key was asked for.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The value of the key at that position, borrowed; `None` when there is none or its read failed.
    ///
    /// # Panics
    /// When `index` is not less than [`Values::len`].
    #[inline]
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        match self.spans[index] {
            Span::At { part, at, len } => Some(&self.parts[part as usize][at..at + len]),
            Span::Missing | Span::Failed(_) => None,
        }
    }

    /// The answer for the key at that position; the value shares the buffer it arrived in.
    ///
    /// # Errors
    /// The error of that key alone; others are not affected.
    ///
    /// # Panics
    /// When `index` is not less than [`Values::len`].
    pub fn result(&self, index: usize) -> Result<Option<Bytes>, Error> {
        match self.spans[index] {
            Span::At { part, at, len } => Ok(Some(self.parts[part as usize].slice(at..at + len))),
            Span::Missing => Ok(None),
            Span::Failed(error) => Err(self.errors[error as usize].clone()),
        }
    }

    /// All answers in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Result<Option<Bytes>, Error>> + '_ {
        (0..self.len()).map(|i| self.result(i))
    }

    /// How many keys had a value.
    pub fn found(&self) -> usize {
        self.spans.iter().filter(|s| matches!(s, Span::At { .. })).count()
    }
}
