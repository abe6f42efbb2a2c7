//! `gridkv-bench`: load for key-value servers, ours and others, and figures that can be repeated.
//!
//! | command | measures |
//! |---|---|
//! | `resp` | one server that speaks RESP or memcached's text protocol |
//! | `echo` | nothing: it is a server without a table, the most that sockets on this machine allow |
//! | `compare` | our node beside other servers, the same load in turn, round after round |
//! | `growth` | pauses while a table grows to ten times its keys |
//! | `embed` | the engine inside this process, beside concurrent maps |
//! | `scale` | the same over numbers of cores, with a fit of the scalability law |
//! | `memory` | what an entry costs beyond its key and value |
//! | `cluster` | quorum operations of a cluster on this machine, by its facade and by RESP |
//! | `chaos` | nothing: it breaks clusters of real processes and checks what they promise |
//!
//! Each command is a module with its `Args` and a `run`; a new one adds a line to [`Command`] and one to [`main`].
//! A run that gives no figure ends with a [`failure::Failure`] on standard error and exit code 1; one that was interrupted
//! tells what it has and ends with 130, as shells expect.

#![forbid(unsafe_code)]

mod chaos;
mod child;
mod cluster;
mod compare;
mod data;
mod distribution;
mod echo;
#[cfg(feature = "embedded")]
mod embed;
mod failure;
mod fleet;
mod growth;
mod interrupt;
mod latency;
mod link;
#[cfg(feature = "embedded")]
mod memory;
mod nodes;
mod options;
mod pace;
mod pin;
#[cfg(feature = "embedded")]
mod plot;
mod progress;
mod random;
mod replies;
mod report;
mod requests;
mod resp;
#[cfg(feature = "embedded")]
mod scale;
mod table;
mod units;
#[cfg(feature = "embedded")]
mod usl;
mod worker;
mod workload;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Load for key-value servers, GridKV and others, and figures that can be repeated.
#[derive(Debug, Parser)]
#[command(name = "gridkv-bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Resp(resp::Args),
    Echo(echo::Args),
    Compare(compare::Args),
    Growth(growth::Args),
    Cluster(cluster::Args),
    Chaos(chaos::Args),
    #[cfg(feature = "embedded")]
    Embed(embed::Args),
    #[cfg(feature = "embedded")]
    Scale(scale::Args),
    #[cfg(feature = "embedded")]
    Memory(memory::Args),
    #[cfg(feature = "embedded")]
    #[command(name = memory::CHILD, hide = true)]
    MemoryChild(memory::ChildArgs),
}

fn main() -> ExitCode {
    interrupt::install();
    let outcome = match Cli::parse().command {
        Command::Resp(args) => resp::run(args),
        Command::Echo(args) => echo::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Growth(args) => growth::run(args),
        Command::Cluster(args) => cluster::run(args),
        Command::Chaos(args) => chaos::run(args),
        #[cfg(feature = "embedded")]
        Command::Embed(args) => embed::run(args),
        #[cfg(feature = "embedded")]
        Command::Scale(args) => scale::run(args),
        #[cfg(feature = "embedded")]
        Command::Memory(args) => memory::run(args),
        #[cfg(feature = "embedded")]
        Command::MemoryChild(args) => memory::run_child(args),
    };
    match outcome {
        Ok(()) if interrupt::requested() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("gridkv-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}
