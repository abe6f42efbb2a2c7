//! What one core of a GridKV node owns. Pure: no clock, no thread, no socket, no randomness; `now` is an argument.

pub mod hash;
pub mod hlc;
pub mod record;
mod table;

/// Unix time in milliseconds.
pub type Millis = u64;
