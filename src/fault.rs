//! Faults on demand, for the test that a panicking request hurts nobody else. Compiled into test builds only.

/// An argument that makes the request panic in the middle of being served.
pub(crate) const PANIC: &[u8] = b"\0gridkv: panic here\0";

/// Panics when one of the arguments says so.
pub(crate) fn maybe_panic(args: &[&[u8]]) {
    assert!(!args.contains(&PANIC), "a fault was injected");
}
