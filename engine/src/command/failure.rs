//! Why a command was refused, in Redis's words.
//!
//! Commands check arguments with `?`; [`or_error`] turns what fails into the one reply. A body must not have replied
//! when it fails.

use std::fmt;

use super::Context;
use crate::store::StoreError;

/// Why a command was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The whole text with its prefix.
    Text(&'static str),
    /// An expiry that is not positive, or beyond what milliseconds can say, for the named command.
    ExpireTime(&'static str),
    /// An option that the command does not know, where Redis names it.
    Option(Box<str>),
    /// The store said no.
    Store(StoreError),
    /// The store said no after some of the keys had been written.
    Partly(StoreError),
}

impl Failure {
    /// An option that is unknown, incomplete, or at odds with another.
    pub(super) const SYNTAX: Failure = Failure::Text("ERR syntax error");
    /// A number that is none.
    pub(super) const NOT_AN_INTEGER: Failure = Failure::Text("ERR value is not an integer or out of range");
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure::Store(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Text(text) => f.write_str(text),
            Failure::ExpireTime(command) => write!(f, "ERR invalid expire time in '{command}' command"),
            Failure::Option(option) => write!(f, "ERR Unsupported option {option}"),
            Failure::Store(error) => error.fmt(f),
            // The words in which a session tells it of several cores.
            Failure::Partly(error) => write!(
                f,
                "UNKNOWN part of the keys was written: read to find out which; the others were refused with {error}"
            ),
        }
    }
}

/// Runs a command's body; its failure is the reply.
#[inline]
pub(super) fn or_error<'a>(ctx: &mut Context<'a>, body: impl FnOnce(&mut Context<'a>) -> Result<(), Failure>) {
    if let Err(failure) = body(ctx) {
        refuse(ctx, &failure);
    }
}

#[cold]
fn refuse(ctx: &mut Context<'_>, failure: &Failure) {
    ctx.out.error(&failure.to_string());
}
