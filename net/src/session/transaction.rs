//! A transaction as bytes: what EXEC hands to the core that owns its shard.
//!
//! ```text
//!   u16 watched │ each: u64 hash, u64 hlc, u16 node, u8 exists, u32 len, key
//!   u32 steps   │ each: u16 command, u32 args, each: u32 len, bytes     or     u16 = RAW, u32 len, reply
//! ```
//!
//! All integers little endian. A raw step is a reply that the session has already made (PING and the like). Reading checks
//! every length; nothing is reserved for an announced number.

use gridkv_engine::command::{self, CommandId, Spec};
use gridkv_engine::hash::KeyHash;
use gridkv_engine::hlc::{Hlc, Version};

const RAW: u16 = u16::MAX;

/// A key under WATCH, and what was there.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    pub(super) key: Vec<u8>,
    pub(super) hash: KeyHash,
    pub(super) version: Option<Version>,
}

/// A version as the bytes of a reply.
pub fn version_bytes(version: Version) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&version.hlc.0.to_le_bytes());
    bytes[8..].copy_from_slice(&version.node.to_le_bytes());
    bytes
}

/// The version of such bytes.
pub(super) fn version_of(bytes: &[u8]) -> Option<Version> {
    let (hlc, node) = bytes.split_first_chunk::<8>()?;
    Some(Version { hlc: Hlc(u64::from_le_bytes(*hlc)), node: u16::from_le_bytes(node.try_into().ok()?) })
}

/// Writes a transaction.
#[derive(Debug)]
pub(super) struct Packer {
    bytes: Vec<u8>,
}

impl Packer {
    pub(super) fn new(watched: &[Watched], steps: usize) -> Packer {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&(watched.len() as u16).to_le_bytes());
        for key in watched {
            bytes.extend_from_slice(&key.hash.0.to_le_bytes());
            bytes.extend_from_slice(&version_bytes(key.version.unwrap_or_default()));
            bytes.push(key.version.is_some().into());
            push(&mut bytes, &key.key);
        }
        bytes.extend_from_slice(&(steps as u32).to_le_bytes());
        Packer { bytes }
    }

    pub(super) fn command(&mut self, spec: &Spec, args: &[Vec<u8>]) {
        self.bytes.extend_from_slice(&spec.id.0.to_le_bytes());
        self.bytes.extend_from_slice(&(args.len() as u32).to_le_bytes());
        for arg in args {
            push(&mut self.bytes, arg);
        }
    }

    pub(super) fn raw(&mut self, reply: &[u8]) {
        self.bytes.extend_from_slice(&RAW.to_le_bytes());
        push(&mut self.bytes, reply);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

fn push(bytes: &mut Vec<u8>, part: &[u8]) {
    bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
    bytes.extend_from_slice(part);
}

/// Bytes that are no transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a packed transaction is cut short or names an unknown command")]
pub struct Malformed;

/// One step of a transaction.
#[derive(Debug)]
pub enum Step<'a> {
    /// A command to run; its arguments are in the vector that was given.
    Command(&'static Spec),
    /// A reply to copy.
    Raw(&'a [u8]),
}

/// Reads a transaction: first all of [`Transaction::watched`], then [`Transaction::steps`]. A clone reads on from the same
/// place.
#[derive(Clone, Debug)]
pub struct Transaction<'a> {
    rest: &'a [u8],
}

impl<'a> Transaction<'a> {
    /// The beginning of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Transaction<'a> {
        Transaction { rest: bytes }
    }

    /// Calls `check(hash, key, version)` for every watched key; whether it held for all.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn watched(
        &mut self,
        mut check: impl FnMut(KeyHash, &'a [u8], Option<Version>) -> bool,
    ) -> Result<bool, Malformed> {
        let mut held = true;
        for _ in 0..u16::from_le_bytes(self.take()?) {
            let hash = KeyHash(u64::from_le_bytes(self.take()?));
            let version = version_of(&self.take::<10>()?).ok_or(Malformed)?;
            let [exists] = self.take()?;
            let key = self.bytes()?;
            held &= check(hash, key, (exists != 0).then_some(version));
        }
        Ok(held)
    }

    /// Number of steps; comes behind the watched keys.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn steps(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    /// The next step, the arguments of a command in `args` (cleared first).
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn step(&mut self, args: &mut Vec<&'a [u8]>) -> Result<Step<'a>, Malformed> {
        args.clear();
        let id = u16::from_le_bytes(self.take()?);
        if id == RAW {
            return Ok(Step::Raw(self.bytes()?));
        }
        let spec = command::by_id(CommandId(id)).ok_or(Malformed)?;
        for _ in 0..u32::from_le_bytes(self.take()?) {
            args.push(self.bytes()?);
        }
        if args.is_empty() { Err(Malformed) } else { Ok(Step::Command(spec)) }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (chunk, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed)?;
        self.rest = rest;
        Ok(*chunk)
    }

    fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let len = u32::from_le_bytes(self.take()?) as usize;
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(Malformed)?;
        self.rest = rest;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_packed_is_read_back_and_every_cut_is_noticed() {
        let version = Version { hlc: Hlc(77), node: 3 };
        let watched = [
            Watched { key: b"a".to_vec(), hash: KeyHash(1), version: Some(version) },
            Watched { key: b"b".to_vec(), hash: KeyHash(2), version: None },
        ];
        let get = command::lookup(b"get").unwrap();
        let mut packer = Packer::new(&watched, 2);
        packer.command(get, &[b"GET".to_vec(), b"a".to_vec()]);
        packer.raw(b"+PONG\r\n");
        let bytes = packer.into_bytes();
        let read = |bytes: &[u8]| -> Result<(), Malformed> {
            let mut args = Vec::new();
            let mut transaction = Transaction::new(bytes);
            let mut seen = Vec::new();
            transaction.watched(|hash, key, version| {
                seen.push((hash, key.to_vec(), version));
                true
            })?;
            assert_eq!(seen, [(KeyHash(1), b"a".to_vec(), Some(version)), (KeyHash(2), b"b".to_vec(), None)]);
            assert_eq!(transaction.steps()?, 2);
            assert!(matches!(transaction.step(&mut args)?, Step::Command(spec) if spec.name == "get"));
            assert_eq!(args, [&b"GET"[..], b"a"]);
            assert!(matches!(transaction.step(&mut args)?, Step::Raw(b"+PONG\r\n")));
            Ok(())
        };
        assert_eq!(read(&bytes), Ok(()));
        for cut in bytes.len() - 20..bytes.len() {
            assert_eq!(read(&bytes[..cut]), Err(Malformed), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut args = Vec::new();
            let mut transaction = Transaction::new(&bytes);
            if transaction.watched(|_, _, _| true).is_ok() && transaction.steps().is_ok() {
                while transaction.step(&mut args).is_ok() {}
            }
        }
    }
}
