//! The simulator.
pub mod forged;
pub mod history;
pub mod network;
pub mod options;
pub mod random;
