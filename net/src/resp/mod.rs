//! RESP, Redis's wire protocol, in both versions.
//!
//! | file | decides |
//! |---|---|
//! | [`decode`] | where a command ends in the bytes received, and where its arguments lie |
//! | [`encode`] | how a reply looks in RESP2 and in RESP3 |
//!
//! Neither file knows a command, a connection or a limit of its own: limits come in as arguments.

pub mod decode;
pub mod encode;

pub use decode::{Decoder, Limits, Parsed, ProtocolError, Short, Span};
pub use encode::{Protocol, Writer};
