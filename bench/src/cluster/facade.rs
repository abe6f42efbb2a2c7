//! Embedded nodes of one cluster in this process, and clients that are tasks over their handles.
//!
//! A client is a loop that awaits one operation after the other on one node's handle, as an application's task does. The
//! clients of a thread share a small executor, which sleeps when all of them wait.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use async_executor::LocalExecutor;
use bytes::Bytes;
use futures_lite::future::block_on;
use gridkv::cluster::ClusterView;
use gridkv::{Error, GridKv};

use super::{Args, Case, Quorums, WHOLE};
use crate::data::{Keys, Values};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::random::Random;
use crate::report::Report;
use crate::workload::Kind;
use crate::{interrupt, pin};

/// Keys that are written with one call before anything is measured.
const TOGETHER: u64 = 256;
/// How often is looked whether the cluster is whole, and how far a run is.
const LOOK: Duration = Duration::from_millis(20);

/// The nodes, and what is in them. They stop when this is dropped.
pub(super) struct Facade {
    nodes: Vec<GridKv>,
    data: Data,
    clients: usize,
    threads: usize,
    random: Random,
}

/// Keys, from 0 on, and their values.
struct Data {
    count: u64,
    keys: Keys,
    values: Values,
}

/// A key and its value.
type Pair<'a> = (Vec<u8>, &'a [u8]);

/// When a run began, and when it ends.
#[derive(Clone, Copy)]
struct Span {
    start: Instant,
    end: Instant,
}

impl Data {
    fn pair(&self, number: u64) -> Pair<'_> {
        let mut key = vec![0; self.keys.len(number)];
        self.keys.write(number, &mut key);
        (key, self.values.of(number))
    }
}

impl Facade {
    /// Starts the nodes, waits until the cluster is whole, and writes all keys.
    pub(super) fn start(args: &Args, quorums: Quorums) -> Result<Facade, Failure> {
        let (count, sizes) = (args.data.keys, &args.data.sizes);
        if count == 0 {
            return Err(Failure::Usage("a load needs at least one key".into()));
        }
        let keys = Keys::new(sizes.key_size.clone(), count).map_err(Failure::Usage)?;
        let data = Data { count, keys, values: Values::new(sizes.value_size.clone()) };
        let (cpus, any) = (pin::allowed()?, "127.0.0.1:0".parse().expect("an address"));
        let mut nodes: Vec<GridKv> = Vec::new();
        for at in 0..args.nodes {
            let seeds = nodes.first().and_then(GridKv::peer_addr).map(|addr| addr.to_string());
            let started = GridKv::builder()
                .cores(&pin::words(&pin::turn(&cpus, at, args.cores)))
                .and_then(|builder| builder.shards(args.each.shards()))
                .and_then(|builder| {
                    builder
                        .thread_name(&format!("node-{at}"))
                        .replicas(quorums.replicas, quorums.write_quorum, quorums.read_quorum)
                        .peer_listen(any)
                        .seeds(seeds)
                        .start()
                });
            nodes.push(started.map_err(|error| Failure::Program {
                program: format!("embedded node {at}"),
                what: format!("could not be started: {error}"),
            })?);
        }
        let facade = Facade {
            nodes,
            data,
            clients: args.clients,
            threads: args.threads.min(args.clients),
            random: Random::new(1, 0),
        };
        facade.wait_until_whole()?;
        facade.fill(args.progress())?;
        Ok(facade)
    }

    /// Waits until every node sees every shard with all its copies.
    fn wait_until_whole(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + WHOLE;
        for (at, node) in self.nodes.iter().enumerate() {
            loop {
                let view = block_on(node.cluster_status())?;
                if view.as_ref().is_some_and(|view| is_whole(view, self.nodes.len())) {
                    break;
                }
                if interrupt::requested() {
                    return Err(Failure::Usage("interrupted".into()));
                }
                if Instant::now() > deadline {
                    let alive = view.map_or(0, |view| view.alive.len());
                    return Err(Failure::Program {
                        program: format!("embedded node {at}"),
                        what: format!("does not see a whole cluster; of {} nodes it reaches {alive}", self.nodes.len()),
                    });
                }
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    fn fill(&self, progress: Progress) -> Result<(), Failure> {
        let mut phase = progress.phase(format!("writing {} keys", crate::units::count(self.data.count as f64)));
        let mut nodes = self.nodes.iter().cycle();
        for from in (0..self.data.count).step_by(TOGETHER as usize) {
            let numbers = from..(from + TOGETHER).min(self.data.count);
            let pairs: Vec<Pair<'_>> = numbers.map(|number| self.data.pair(number)).collect();
            let node = nodes.next().expect("there is a node").blocking();
            node.set_many(&pairs)?.into_iter().collect::<Result<(), Error>>()?;
            phase.show(from as f64 / self.data.count as f64, from);
            if interrupt::requested() {
                return Err(Failure::Usage("interrupted".into()));
            }
        }
        Ok(())
    }

    /// Runs all clients for so long, once the cluster is whole.
    pub(super) fn run(
        &mut self,
        case: &Case,
        label: String,
        length: Duration,
        progress: Progress,
    ) -> Result<Report, Failure> {
        self.wait_until_whole()?;
        let seed = self.random.next();
        let mut phase = progress.phase(label);
        let start = Instant::now();
        let span = Span { start, end: start + length };
        let facade = &*self;
        std::thread::scope(|scope| {
            let drive = |thread| {
                std::thread::Builder::new()
                    .name("clients".into())
                    .spawn_scoped(scope, move || facade.drive(case, seed, thread, span))
            };
            let threads: Vec<_> =
                (0..facade.threads).map(drive).collect::<Result<_, _>>().map_err(Failure::io("starting a thread"))?;
            while !threads.iter().all(|thread| thread.is_finished()) {
                phase.show(start.elapsed().as_secs_f64() / length.as_secs_f64().max(1e-9), 0);
                std::thread::sleep(LOOK);
            }
            let mut sum = Report::new();
            for thread in threads {
                sum.add(&thread.join().expect("a client does not panic")?);
            }
            Ok(sum)
        })
    }

    /// One thread's clients, until the end.
    fn drive(&self, case: &Case, seed: u64, thread: usize, span: Span) -> Result<Report, Failure> {
        let report = RefCell::new(Report::new());
        let executor = LocalExecutor::new();
        let clients: Vec<_> = (thread..self.clients)
            .step_by(self.threads)
            .map(|client| {
                executor.spawn(self.client(case, Random::new(seed, client as u64), client, span.end, &report))
            })
            .collect();
        block_on(executor.run(async {
            for client in clients {
                client.await?;
            }
            Ok::<_, Failure>(())
        }))?;
        drop(executor);
        let mut report = report.into_inner();
        report.elapsed = span.start.elapsed().min(span.end - span.start);
        report.rate = report.operations() as f64 / report.elapsed.as_secs_f64().max(1e-9);
        Ok(report)
    }

    async fn client(
        &self,
        case: &Case,
        mut random: Random,
        client: usize,
        end: Instant,
        report: &RefCell<Report>,
    ) -> Result<(), Failure> {
        let (db, data) = (&self.nodes[client % self.nodes.len()], &self.data);
        let mut group = Vec::with_capacity(case.together);
        loop {
            group.clear();
            group.extend((0..case.together).map(|_| data.pair(random.below(data.count))));
            let start = Instant::now();
            let seen = operation(db, case, &group).await?;
            let now = Instant::now();
            // What ends later is not of this run.
            if now >= end || interrupt::requested() {
                return Ok(());
            }
            seen.note(case.kind, now.duration_since(start), &mut report.borrow_mut());
        }
    }
}

/// One operation on a group of keys, or on one.
async fn operation(db: &GridKv, case: &Case, group: &[Pair<'_>]) -> Result<Seen, Failure> {
    let mut seen = Seen::default();
    match (case.kind, group) {
        (Kind::Get, [(key, value)]) => seen.read(db.get(key).await, value)?,
        (Kind::Get, _) => {
            let keys: Vec<&[u8]> = group.iter().map(|(key, _)| key.as_slice()).collect();
            match db.get_many(&keys).await {
                Ok(found) => found.iter().zip(group).try_for_each(|(found, (_, value))| seen.read(found, value))?,
                Err(error) => seen.failed(error)?,
            }
        }
        (_, [(key, value)]) => seen.written(db.set(key, value).await)?,
        _ => match db.set_many(group).await {
            Ok(written) => written.into_iter().try_for_each(|written| seen.written(written))?,
            Err(error) => seen.failed(error)?,
        },
    }
    Ok(seen)
}

/// What became of one operation.
#[derive(Debug, Default)]
struct Seen {
    done: u64,
    misses: u64,
    wrong: u64,
    errors: Vec<Error>,
}

impl Seen {
    fn read(&mut self, found: Result<Option<Bytes>, Error>, expected: &[u8]) -> Result<(), Failure> {
        match found {
            Ok(value) => {
                self.done += 1;
                self.misses += u64::from(value.is_none());
                self.wrong += u64::from(value.is_some_and(|value| value != expected));
                Ok(())
            }
            Err(error) => self.failed(error),
        }
    }

    fn written(&mut self, written: Result<(), Error>) -> Result<(), Failure> {
        match written {
            Ok(()) => self.done += 1,
            Err(error) => self.failed(error)?,
        }
        Ok(())
    }

    /// An operation that was refused is counted; a node that is gone ends everything.
    fn failed(&mut self, error: Error) -> Result<(), Failure> {
        if matches!(error, Error::Closed | Error::Failed(_)) {
            return Err(error.into());
        }
        self.errors.push(error);
        Ok(())
    }

    fn note(self, kind: Kind, time: Duration, report: &mut Report) {
        report.record(kind, time.as_nanos() as u64, self.done);
        report.misses += self.misses;
        report.wrong += self.wrong;
        self.errors.iter().for_each(|error| report.error(error.to_string().as_bytes()));
    }
}

/// Whether a node sees all nodes, and all copies of each shard that `nodes` nodes can have.
fn is_whole(view: &ClusterView, nodes: usize) -> bool {
    let map = &view.map;
    let copies = usize::from(map.quorums.n).min(nodes);
    let settled = map.placements.iter().all(|placement| {
        let moves = placement.joining.or(placement.leaving).is_some();
        !moves && placement.replicas.len() == copies && placement.replicas.iter().all(|replica| !replica.filling)
    });
    settled && !view.isolated && (map.present().count(), view.alive.len()) == (nodes, nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Way;

    #[test]
    fn two_nodes_are_filled_and_answer_every_case() {
        let args = crate::cluster::tests::args(
            "--ways facade --nodes 2 --clients 6 --threads 2 --keys 1000 --key-size 8-20 --value-size 1-300 --shards 32",
        );
        let mut facade = Facade::start(&args, args.quorums().unwrap()).unwrap();
        for node in &facade.nodes {
            let view = block_on(node.cluster_status()).unwrap().unwrap();
            assert_eq!((view.map.quorums.n, view.map.quorums.w, view.map.quorums.r), (2, 2, 2));
            assert!(is_whole(&view, 2) && !is_whole(&view, 3));
        }
        let pairs: Vec<Pair<'_>> = (0..1000).map(|number| facade.data.pair(number)).collect();
        let seen =
            block_on(operation(&facade.nodes[1], &Case { way: Way::Facade, kind: Kind::Get, together: 1000 }, &pairs));
        let seen = seen.unwrap();
        assert_eq!((seen.done, seen.misses, seen.wrong, seen.errors.len()), (1000, 0, 0, 0));
        drop(pairs);
        for case in args.cases() {
            let length = Duration::from_millis(300);
            let report = facade.run(&case, String::new(), length, Progress::unless(true)).unwrap();
            assert_eq!((report.misses, report.wrong, &report.errors), (0, 0, &Default::default()), "{case:?}");
            assert_eq!(report.operations() % case.together as u64, 0, "{case:?}");
            assert_eq!(report.of(case.kind).count(), report.operations());
        }
    }

    #[test]
    fn what_became_of_an_operation_is_noted() {
        let (mut seen, mut report) = (Seen::default(), Report::new());
        seen.read(Ok(Some(Bytes::from_static(b"right"))), b"right").unwrap();
        seen.read(Ok(Some(Bytes::from_static(b"wrong"))), b"right").unwrap();
        seen.read(Ok(None), b"right").unwrap();
        seen.read(Err(Error::Reply("CLUSTERDOWN of five".into())), b"right").unwrap();
        seen.written(Err(Error::OutOfMemory)).unwrap();
        assert!(seen.written(Err(Error::Closed)).is_err());
        seen.note(Kind::Get, Duration::from_micros(5), &mut report);
        assert_eq!((report.operations(), report.misses, report.wrong, report.error_count()), (3, 1, 1, 2));
        assert_eq!(report.errors["CLUSTERDOWN"], 1);
    }
}
