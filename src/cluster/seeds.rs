//! Where the seeds are: names are looked up until the node is a member, since what has no address now may have one in a second.
//!
//! The first look is before the cores start. Later ones run on a thread of their own, one at a time, for a lookup may take as long as a
//! name server likes; core 0 only sees whether one has ended. They are a second apart at first and half a minute
//! at most. A seed that cannot be looked up keeps the addresses that it had.
//!
//! Nothing is looked up where all seeds are addresses, nor by a member.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};

use gridkv_engine::Millis;

/// How long after a lookup the next one begins, at first and at most.
const FIRST_MS: Millis = 1000;
const MOST_MS: Millis = 30_000;

/// What a lookup says of each seed, in their order.
type Answers = Vec<Result<Vec<SocketAddr>, String>>;

/// How seeds are looked up; it may take its time.
type Resolve = fn(&[String]) -> Answers;

/// The seeds of a node, by name and by address.
#[derive(Debug)]
pub(crate) struct Seeds {
    names: Vec<String>,
    known: BTreeMap<usize, Vec<SocketAddr>>,
    resolve: Resolve,
    /// The lookup that is under way.
    answers: Option<flume::Receiver<Answers>>,
    /// When the next one begins, and how long after it the one behind.
    next: Option<Millis>,
    pause: Millis,
}

/// Asks the system.
fn ask_system(names: &[String]) -> Answers {
    let ask = |name: &String| name.to_socket_addrs().map(Iterator::collect).map_err(|error| error.to_string());
    names.iter().map(ask).collect()
}

impl Seeds {
    /// The seeds of a node that starts: looked up once, now.
    pub(crate) fn look_up(names: &[String]) -> Seeds {
        Seeds::with(names, ask_system)
    }

    fn with(names: &[String], resolve: Resolve) -> Seeds {
        let (known, answers, next) = (BTreeMap::new(), None, None);
        let mut seeds = Seeds { names: names.to_vec(), known, resolve, answers, next, pause: FIRST_MS };
        if !names.is_empty() {
            seeds.learn((seeds.resolve)(names));
        }
        seeds
    }

    /// What is known, without repetitions.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        let mut all: Vec<SocketAddr> = Vec::new();
        for addr in self.known.values().flatten() {
            if !all.contains(addr) {
                all.push(*addr);
            }
        }
        all
    }

    /// Whether a lookup could ever tell anything new.
    fn has_names(&self) -> bool {
        self.names.iter().any(|name| name.parse::<SocketAddr>().is_err())
    }

    fn learn(&mut self, answers: Answers) {
        for (at, answer) in answers.into_iter().enumerate() {
            let name = &self.names[at];
            match answer {
                Ok(found) if !found.is_empty() => {
                    self.known.insert(at, found);
                }
                answer => {
                    let why = answer.err().unwrap_or_else(|| "it has no address".to_owned());
                    let kept = self.known.contains_key(&at);
                    tracing::warn!(
                        seed = name,
                        why,
                        kept,
                        "a seed cannot be looked up; it is tried again until this node is a member"
                    );
                }
            }
        }
        if self.known.is_empty() {
            tracing::warn!("no seed has an address so far: this node asks nobody, and looks them up again");
        }
    }

    /// Goes on with looking up, while `wanted`. Returns the addresses when there are others than before.
    pub(crate) fn turn(&mut self, now: Millis, wanted: bool) -> Option<Vec<SocketAddr>> {
        if let Some(answers) = &self.answers {
            let answers = match answers.try_recv() {
                Ok(answers) => answers,
                Err(flume::TryRecvError::Empty) => return None,
                // The thread is gone without an answer.
                Err(flume::TryRecvError::Disconnected) => Vec::new(),
            };
            self.answers = None;
            let before = self.addresses();
            self.learn(answers);
            let after = self.addresses();
            if after != before {
                tracing::info!(addresses = ?after, "the seeds have new addresses");
                return Some(after);
            }
            return None;
        }
        if !wanted || !self.has_names() {
            (self.next, self.pause) = (None, FIRST_MS);
            return None;
        }
        match self.next {
            None => self.next = Some(now + self.pause),
            Some(next) if next <= now => {
                self.pause = (2 * self.pause).min(MOST_MS);
                self.next = Some(now + self.pause);
                self.answers = self.begin();
            }
            Some(_) => {}
        }
        None
    }

    /// Looks the names up on a thread of their own. `None` when there is none to be had; the next turn tries again.
    fn begin(&self) -> Option<flume::Receiver<Answers>> {
        let (to, answers) = flume::bounded(1);
        let (names, resolve) = (self.names.clone(), self.resolve);
        let work = move || drop(to.send(resolve(&names)));
        let thread = std::thread::Builder::new().name("gridkv-seeds".to_owned()).spawn(work);
        thread.inspect_err(|error| tracing::warn!(%error, "no thread to look up the seeds")).ok().map(|_| answers)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Turns until the lookup that is under way has ended.
    fn end(seeds: &mut Seeds, now: Millis) -> Option<Vec<SocketAddr>> {
        loop {
            let found = seeds.turn(now, true);
            if seeds.answers.is_none() {
                return found;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_name_is_looked_up_until_it_has_an_address_and_keeps_the_one_it_had() {
        static LOOKS: AtomicUsize = AtomicUsize::new(0);
        let resolve: Resolve = |names| {
            assert_eq!(names.len(), 2);
            let none = || Err("no such name".to_owned());
            match LOOKS.fetch_add(1, Ordering::SeqCst) {
                0 => vec![none(), none()],
                1 => vec![Ok(vec![addr("10.0.0.1:1")]), none()],
                _ => vec![none(), Ok(vec![addr("10.0.0.2:2"), addr("10.0.0.1:1")])],
            }
        };
        let mut seeds = Seeds::with(&names(&["one:1", "two:2"]), resolve);
        assert!(seeds.addresses().is_empty());
        assert_eq!(seeds.turn(100, true), None);
        assert_eq!((seeds.turn(1099, true), seeds.answers.is_some()), (None, false), "not before its time");
        assert_eq!((seeds.turn(1100, true), seeds.answers.is_some()), (None, true));
        assert_eq!(end(&mut seeds, 1100), Some(vec![addr("10.0.0.1:1")]));
        assert_eq!((seeds.turn(3099, true), seeds.answers.is_some()), (None, false), "twice as long");
        assert_eq!((seeds.turn(3100, true), seeds.answers.is_some()), (None, true));
        assert_eq!(end(&mut seeds, 3100), Some(vec![addr("10.0.0.1:1"), addr("10.0.0.2:2")]));
        assert_eq!((seeds.turn(7100, true), seeds.answers.is_some()), (None, true));
        assert_eq!(end(&mut seeds, 7100), None, "nothing new");
        // A member asks nobody; one that is expelled begins anew.
        assert_eq!(seeds.turn(1_000_000, false), None);
        assert_eq!((seeds.turn(1_000_001, true), seeds.answers.is_some()), (None, false));
        assert_eq!((seeds.turn(1_001_001, true), seeds.answers.is_some()), (None, true));
    }

    #[test]
    fn lookups_are_half_a_minute_apart_at_most_and_an_end_without_an_answer_is_none() {
        let mut seeds = Seeds::with(&names(&["one:1"]), |_| vec![Err("no".to_owned())]);
        seeds.resolve = |_| panic!("on purpose: the name server's library has a fault");
        let (mut now, mut pauses) = (0, Vec::new());
        for _ in 0..8 {
            seeds.turn(now, true);
            pauses.push(seeds.next.unwrap() - now);
            now = seeds.next.unwrap();
            seeds.turn(now, true);
            assert_eq!(end(&mut seeds, now), None);
        }
        assert_eq!((pauses[0], *pauses.last().unwrap()), (1000, 30_000));
    }

    #[test]
    fn addresses_are_not_looked_up_again() {
        let mut seeds = Seeds::look_up(&names(&["10.0.0.1:7380", "[::1]:1"]));
        assert_eq!(seeds.addresses(), [addr("10.0.0.1:7380"), addr("[::1]:1")]);
        for now in [0, 100_000] {
            assert_eq!((seeds.turn(now, true), seeds.answers.is_some()), (None, false));
        }
    }
}
