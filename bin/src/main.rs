//! `gridkv-node`: one node as a process, which serves RESP clients and a page of metrics.
//!
//! The process is a thin shell around the crate `gridkv`: it reads the settings (`settings`), starts the log (`logging`),
//! starts the node and waits for its end. What the node is told and what it does is decided elsewhere. `gridkv-node admin`
//! asks a node that runs (`admin`).
//!
//! ```text
//!   exit code 0   after SIGTERM, SIGINT or SHUTDOWN, when every core has ended
//!             1   it refused to start or an order was refused, or a core panicked: `error: …` and `hint: …` say why
//!             2   the command line was not understood
//!       128 + n   signal n came a second time while it was stopping
//! ```

#![forbid(unsafe_code)]

mod admin;
mod logging;
mod settings;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};

use futures_lite::future::block_on;
use gridkv::config::format_size;
use gridkv::{Builder, Error, GridKv};
use settings::{Order, Refusal, Settings};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the main thread waits for.
enum End {
    /// The node has started, or refuses to.
    Started(Box<Result<GridKv, Error>>),
    /// Somebody sent this signal.
    Signal(i32),
    /// The node stopped by itself: a client's `SHUTDOWN`, a core that panicked, or it could not go on.
    Stopped,
}

fn main() -> ExitCode {
    let outcome = match settings::from_process() {
        Ok(Order::Print(text)) => {
            print!("{text}");
            Ok(())
        }
        Ok(Order::Admin(request)) => admin::run(&request).map(|text| print!("{text}")),
        Ok(Order::Run(settings)) => run(*settings),
        Err(refusal) => Err(refusal),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            eprintln!("error: {refusal}");
            if let Some(hint) = refusal.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(settings: Settings) -> Result<(), Refusal> {
    logging::start(&settings.log_level, settings.log_format);
    let (sender, ends) = mpsc::channel();
    // Before the cores start, so that a signal during the start is not lost.
    watch_signals(sender.clone()).map_err(|error| Refusal::new(format!("cannot listen for signals: {error}")))?;
    let config = settings.config;
    let (backend, shards, limit) = (config.backend.clone(), config.shards.get(), config.max_memory);
    // A node may wait for its cluster for a minute; a signal ends that, and nothing is lost since it serves nobody yet.
    let starter = sender.clone();
    std::thread::spawn(move || {
        let started = catch_unwind(AssertUnwindSafe(|| Builder::from_config(config).start()));
        drop(starter.send(End::Started(Box::new(started.unwrap_or(Err(Error::Panicked))))));
    });
    let db = match ends.recv().expect("the thread that watches signals holds a sender for ever") {
        End::Started(started) => (*started).map_err(Refusal::from)?,
        End::Signal(signal) => {
            tracing::info!(signal = name_of(signal), "stopped before the node had started");
            return Ok(());
        }
        End::Stopped => unreachable!("nobody watches for it yet"),
    };
    announce(&db, &backend, shards, limit);

    let watched = db.clone();
    std::thread::spawn(move || {
        block_on(watched.closed());
        // Nobody listens any more when a signal came first.
        let _ = sender.send(End::Stopped);
    });
    match ends.recv().expect("the thread that watches signals holds a sender for ever") {
        End::Signal(signal) => tracing::info!(signal = name_of(signal), "stopping"),
        End::Started(_) => unreachable!("it has started"),
        End::Stopped => tracing::info!("stopping: a client said SHUTDOWN, or the node could not go on"),
    }
    block_on(db.close()).map_err(|error| match error {
        Error::Panicked => Refusal::new("a core ended with a panic; the log has the place"),
        other => other.into(),
    })?;
    tracing::info!("stopped");
    Ok(())
}

/// Reports the first signal on the channel; the second one ends the process at once, whatever hangs.
fn watch_signals(sender: mpsc::Sender<End>) -> std::io::Result<()> {
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // In this order: the first signal finds the flag down and raises it, the next one finds it up.
        flag::register_conditional_shutdown(signal, 128 + signal, stopping.clone())?;
        flag::register(signal, stopping.clone())?;
    }
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            let _ = sender.send(End::Signal(signal));
        }
    })?;
    Ok(())
}

fn name_of(signal: i32) -> &'static str {
    if signal == SIGINT { "SIGINT" } else { "SIGTERM" }
}

/// The one line that says what runs here.
fn announce(db: &GridKv, backend: &str, shards: u16, limit: u64) {
    let address = |addr: Option<std::net::SocketAddr>| addr.map_or("none".to_owned(), |addr| addr.to_string());
    let ready = match db.resp_addr() {
        Some(addr) if addr.ip().is_loopback() || addr.ip().is_unspecified() => {
            format!("ready: redis-cli -p {}", addr.port())
        }
        Some(addr) => format!("ready: redis-cli -h {} -p {}", addr.ip(), addr.port()),
        None => "ready, serving no RESP clients".to_owned(),
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        cores = db.cores(),
        shards,
        backend,
        listen = address(db.resp_addr()),
        http = address(db.http_addr()),
        peers = address(db.peer_addr()),
        maxmemory = if limit == 0 { "no limit".to_owned() } else { format_size(limit) },
        "{ready}"
    );
}
