//! `gridkv-bench`: load for key-value servers, ours and others, and figures that can be repeated.
//!
//! | command | measures |
//! |---|---|
//! | `resp` | one server that speaks RESP or memcached's text protocol |
//! | `echo` | nothing: it is a server without a table, the most that sockets on this machine allow |
//! | `compare` | our node beside other servers, the same load in turn, round after round |
//! | `growth` | pauses while a table grows to ten times its keys |
//!
//! Each command is a module with its `Args` and a `run`; a new one adds a line to [`Command`] and one to [`main`].
//! A run that gives no figure ends with a [`failure::Failure`] on standard error and exit code 1; one that was interrupted
//! tells what it has and ends with 130, as shells expect.

#![forbid(unsafe_code)]

mod child;
mod compare;
mod data;
mod distribution;
mod echo;
mod failure;
mod fleet;
mod growth;
mod interrupt;
mod latency;
mod options;
mod pace;
mod pin;
mod progress;
mod random;
mod replies;
mod report;
mod requests;
mod resp;
mod table;
mod units;
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
}

fn main() -> ExitCode {
    interrupt::install();
    let outcome = match Cli::parse().command {
        Command::Resp(args) => resp::run(args),
        Command::Echo(args) => echo::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Growth(args) => growth::run(args),
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
