//! Entries that are written once before anything happens and read once when all is over.
//!
//! They give the copies a weight, so that filling one takes time, and they lie still: what is lost on the way is found
//! missing, as nobody writes it again. A value says which entry it belongs to, so a wrong one is told from the right one.
//! How many of their copies there are is counted where they lie, by `KEYS`, which tells what a node holds itself: a quorum
//! read would not miss one of three copies.
//!
//! Not here: what clients do meanwhile ([`super::load`]).

use std::time::Duration;

use super::Verdict;
use crate::failure::Failure;
use crate::link::{Answer, Link};
use crate::nodes::Nodes;
use crate::options::count;
use crate::units;

const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take until all copies of the entries are there.
/// Two cycles of repair and more: the comparison that is asked for leaves alone what was written within the last two seconds.
const COPIED: Duration = Duration::from_secs(150);
/// Keys that are written with one command.
const TOGETHER: u64 = 50;
/// Bytes of an entry beside its key and value: its hash, version, expiry and lengths.
const HEAD: u64 = 48;
/// Entries that are told in words.
const TOLD: usize = 10;

/// What is there from the beginning.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Entries {
    /// Entries that are there from the beginning
    #[arg(long = "entries", default_value = "50k", value_parser = units::number, value_name = "COUNT")]
    count: u64,
    /// Bytes of each of their values
    #[arg(long = "entry-size", default_value = "1000", value_parser = count, value_name = "BYTES")]
    size: usize,
}

/// What was read at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Read {
    /// Not found.
    gone: u64,
    /// Another value, or a strange answer.
    wrong: u64,
    /// No answer, or an error.
    failed: u64,
    /// Some of these in words.
    told: Vec<String>,
}

impl Entries {
    /// Bytes of all of them as one copy holds them.
    pub(super) fn bytes(&self) -> u64 {
        self.count * (self.size as u64 + HEAD + key(0).len() as u64)
    }

    /// Writes them.
    pub(super) fn write(&self, nodes: &Nodes) -> Result<(), Failure> {
        let addr = nodes.clients()[0];
        let failed = |source| Failure::Connect { addr, source };
        let mut link = Link::connect(addr, ANSWER).map_err(failed)?;
        for from in (0..self.count).step_by(TOGETHER as usize) {
            let numbers = from..(from + TOGETHER).min(self.count);
            let pairs: Vec<_> = numbers.map(|number| (key(number), value(number, self.size))).collect();
            let mut words: Vec<&[u8]> = vec![b"MSET"];
            pairs.iter().for_each(|(key, value)| words.extend([key.as_slice(), value]));
            if let Answer::Error(reply) = link.call(&words).map_err(failed)? {
                return Err(Failure::Refused { addr, reply });
            }
        }
        // An acknowledged write is on a quorum; a copy that has missed it, since its map was older, is repaired now and not
        // in the middle of what is to be judged.
        for at in nodes.live() {
            nodes.wait(COPIED, at, "does not compare its copies", || nodes.ask(at, "REPAIR"))?;
        }
        nodes.wait(COPIED, 0, "does not see the copies of all entries", || {
            let (held, wanted) = self.copies(nodes)?;
            (held >= wanted).then_some(())
        })?;
        eprintln!("{} entries of {}", self.count, units::bytes(self.size as f64));
        Ok(())
    }

    /// How many copies of them the nodes that run hold, and how many there should be.
    pub(super) fn copies(&self, nodes: &Nodes) -> Option<(u64, u64)> {
        let live = nodes.live();
        let replicas = nodes.ask(*live.first()?, "STATUS")?["replicas"].as_u64()?.min(live.len() as u64);
        let held: Option<Vec<u64>> = live.iter().map(|&at| nodes.keys(at, "entry:*")).collect();
        Some((held?.iter().sum(), replicas * self.count))
    }

    /// Reads them all, from the nodes that run in turn, and judges what was found.
    pub(super) fn check(&self, nodes: &Nodes, verdict: &mut Verdict) -> Result<(), Failure> {
        let mut links = Vec::new();
        for at in nodes.live() {
            let addr = nodes.clients()[at];
            let link = Link::connect(addr, ANSWER).map_err(|source| Failure::Connect { addr, source })?;
            links.push((at, link));
        }
        let (mut read, count) = (Read::default(), links.len() as u64);
        for number in 0..self.count {
            let (at, link) = &mut links[(number % count) as usize];
            read.note(*at, number, self.size, link.call(&[b"GET", &key(number)]));
        }
        read.judge(self.count, verdict);
        Ok(())
    }
}

impl Read {
    fn note(&mut self, node: usize, number: u64, size: usize, answer: std::io::Result<Answer>) {
        let (counted, what) = match answer {
            Ok(Answer::Value(bytes)) if bytes == value(number, size) => return,
            Ok(Answer::Value(bytes)) => {
                (&mut self.wrong, format!("another value: {}", String::from_utf8_lossy(&bytes[..bytes.len().min(20)])))
            }
            Ok(Answer::Nothing) => (&mut self.gone, "nothing".into()),
            Ok(Answer::Error(text)) => (&mut self.failed, text),
            Ok(strange) => (&mut self.wrong, format!("{strange:?}")),
            Err(error) => (&mut self.failed, error.to_string()),
        };
        *counted += 1;
        if self.told.len() < TOLD {
            self.told.push(format!("{} at node {node}: {what}", String::from_utf8_lossy(&key(number))));
        }
    }

    fn judge(self, of: u64, verdict: &mut Verdict) {
        let Read { gone, wrong, failed, told } = self;
        let figure = format!("of {of} {gone} are gone, {wrong} are others, {failed} could not be read");
        verdict.check("entries are the same", gone + wrong + failed == 0, figure);
        verdict.told.extend(told);
    }
}

fn key(number: u64) -> Vec<u8> {
    format!("entry:{number:012}").into_bytes()
}

/// A value that says its number at both ends, if there is room.
fn value(number: u64, size: usize) -> Vec<u8> {
    let name = number.to_string();
    let mut value = format!("{name:v<size$}").into_bytes();
    if size >= 2 * name.len() {
        value[size - name.len()..].copy_from_slice(name.as_bytes());
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_say_whose_they_are() {
        assert_eq!(value(12, 8), b"12vvvv12");
        assert_eq!(value(12, 3), b"12v");
        assert_ne!(value(1, 3), value(11, 3));
    }

    #[test]
    fn only_the_same_value_is_right() {
        let judged = |answer| {
            let (mut read, mut verdict) = (Read::default(), Verdict::default());
            read.note(2, 7, 9, answer);
            read.judge(5, &mut verdict);
            (verdict.is_good(), verdict.bars[0].2.clone(), verdict.told)
        };
        let right = judged(Ok(Answer::Value(value(7, 9))));
        assert_eq!(right, (true, "of 5 0 are gone, 0 are others, 0 could not be read".into(), vec![]));
        let (good, figure, told) = judged(Ok(Answer::Value(value(8, 9))));
        assert_eq!((good, figure), (false, "of 5 0 are gone, 1 are others, 0 could not be read".into()));
        assert_eq!(told, ["entry:000000000007 at node 2: another value: 8vvvvvvv8"]);
        assert!(!judged(Ok(Answer::Nothing)).0);
        assert!(!judged(Ok(Answer::Error("CLUSTERDOWN".into()))).0);
        assert!(!judged(Err(std::io::ErrorKind::UnexpectedEof.into())).0);
    }
}
