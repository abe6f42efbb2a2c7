//! How a command answers, with no word about bytes on a wire.
//!
//! A command pushes the parts of exactly one reply, in order; a composite announces its length first and its parts
//! follow. The wire's encoder (RESP2, RESP3) is an implementation elsewhere; tests record the parts; the merge of a
//! command that ran on several cores drops them and reads [`crate::command::Context::aux`].
//!
//! Implementations must not fail: what cannot be sent is the connection's problem, later.

/// Receiver of one reply.
pub trait Reply {
    /// A status, such as `OK`.
    fn simple(&mut self, text: &str);
    /// An error: the whole text with its prefix (`ERR …`, `OOM …`), one line.
    fn error(&mut self, text: &str);
    /// A number.
    fn integer(&mut self, value: i64);
    /// A byte string.
    fn bulk(&mut self, value: &[u8]);
    /// Nothing, where a byte string would be.
    fn null(&mut self);
    /// Nothing, where an array would be (an EXEC that was called off).
    fn null_array(&mut self);
    /// `len` parts follow.
    fn array(&mut self, len: usize);
    /// `len` pairs follow: key, value, key, value.
    fn map(&mut self, len: usize);
    /// `len` distinct parts follow.
    fn set(&mut self, len: usize);
    /// A floating-point number; in RESP2 a byte string.
    fn double(&mut self, value: f64);
    /// Yes or no; in RESP2 1 or 0.
    fn boolean(&mut self, value: bool);
    /// Text meant for people; in RESP2 a byte string.
    fn verbatim(&mut self, text: &str);

    /// The status `OK`.
    fn ok(&mut self) {
        self.simple("OK");
    }
}

/// A reply that nobody reads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Discard;

impl Reply for Discard {
    fn simple(&mut self, _: &str) {}
    fn error(&mut self, _: &str) {}
    fn integer(&mut self, _: i64) {}
    fn bulk(&mut self, _: &[u8]) {}
    fn null(&mut self) {}
    fn null_array(&mut self) {}
    fn array(&mut self, _: usize) {}
    fn map(&mut self, _: usize) {}
    fn set(&mut self, _: usize) {}
    fn double(&mut self, _: f64) {}
    fn boolean(&mut self, _: bool) {}
    fn verbatim(&mut self, _: &str) {}
}
