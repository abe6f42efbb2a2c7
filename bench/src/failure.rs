//! Why a measurement could not be made. Each text says what was tried, with whom, and what to change.

use std::io;
use std::net::SocketAddr;

use gridkv_net::ring::RingError;

/// A run that gave no figure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line asks for something impossible.
    #[error("{0}")]
    Usage(String),
    /// This machine gives the generator no socket ring.
    #[error("the generator's sockets: {0}")]
    Ring(#[from] RingError),
    /// Nobody answers.
    #[error("cannot connect to {addr}: {source}")]
    Connect { addr: SocketAddr, source: io::Error },
    /// Nobody answers in time.
    #[error("{addr} did not {what} within {seconds} s")]
    Slow { addr: SocketAddr, what: &'static str, seconds: u64 },
    /// The server refused to begin.
    #[error("{addr} refused: {reply}")]
    Refused { addr: SocketAddr, reply: String },
    /// The server hung up in the middle.
    #[error("{addr} closed a connection under load: {reason}")]
    HungUp { addr: SocketAddr, reason: String },
    /// What came is no reply.
    #[error("{addr} sent what is no reply: {what}")]
    Malformed { addr: SocketAddr, what: String },
    /// A program could not be run.
    #[error("{program}: {what}")]
    Program { program: String, what: String },
    /// The operating system refused something.
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    /// What was to be shown is not so.
    #[error("a promise was broken")]
    Broken,
    /// The embedded engine failed.
    #[cfg(feature = "embedded")]
    #[error("the embedded node: {0}")]
    Embedded(#[from] gridkv::Error),
}

impl Failure {
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Failure {
        // Turned into text only when it is needed: this is also said around what almost never fails.
        move |source| Failure::Io { doing: doing.into(), source }
    }
}
