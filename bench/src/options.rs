//! Options that several commands share.

use std::path::PathBuf;

use crate::data::{Keys, Values};
use crate::distribution::Sizes;
use crate::failure::Failure;
use crate::requests::{Protocol, Requests};
use crate::units;

/// How long keys and values are.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SizeArgs {
    /// Length of keys: 16, 10-40 (evenly), or mix:16@9,64@1 (with weights)
    #[arg(long, default_value = "16", value_name = "BYTES")]
    pub(crate) key_size: Sizes,
    /// Length of values, in the same words
    #[arg(long, default_value = "64", value_name = "BYTES")]
    pub(crate) value_size: Sizes,
}

/// Where our node, its rivals and the generator run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PlaceArgs {
    /// Our node [default: gridkv-node beside this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) node: Option<PathBuf>,
    /// Cores of the server
    #[arg(long, default_value = "0", value_parser = cores, value_name = "CPULIST")]
    pub(crate) server_core: Cores,
    /// Cores of the generator, one thread each
    #[arg(long, default_value = "1", value_parser = cores, value_name = "CPULIST")]
    pub(crate) client_core: Cores,
}

/// What keys and values look like.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DataArgs {
    /// Keys in the table, such as 100k or 1m
    #[arg(long, default_value = "100k", value_parser = units::number, value_name = "COUNT")]
    pub(crate) keys: u64,
    #[command(flatten)]
    pub(crate) sizes: SizeArgs,
}

impl SizeArgs {
    /// Bytes of `keys` keys and their values, about.
    pub(crate) fn bytes(&self, keys: u64) -> f64 {
        keys as f64 * (self.key_size.mean() + self.value_size.mean())
    }
}

impl DataArgs {
    /// Templates for up to `highest` keys.
    pub(crate) fn requests(&self, protocol: Protocol, highest: u64) -> Result<Requests, Failure> {
        if self.keys == 0 {
            return Err(Failure::Usage("a load needs at least one key".into()));
        }
        let keys = Keys::new(self.sizes.key_size.clone(), highest).map_err(Failure::Usage)?;
        Ok(Requests::new(protocol, keys, Values::new(self.sizes.value_size.clone())))
    }
}

/// How many hands the generator has.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct HandArgs {
    /// Connections of all threads together
    #[arg(long, short, default_value = "50", value_parser = count, value_name = "COUNT")]
    pub(crate) connections: usize,
    /// Threads of the generator; each drives its share of the connections and polls without a rest
    #[arg(long, short, default_value = "1", value_parser = count, value_name = "COUNT")]
    pub(crate) threads: usize,
}

/// A number that is not 0.
pub(crate) fn count(text: &str) -> Result<usize, String> {
    match units::number(text)? {
        0 => Err("must be above 0".into()),
        number => usize::try_from(number).map_err(|_| format!("'{text}' is out of range")),
    }
}

/// A list of cores, as one value.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cores(pub(crate) Vec<usize>);

/// Reads a list of cores.
pub(crate) fn cores(text: &str) -> Result<Cores, String> {
    units::core_list(text).map(Cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_above_nothing() {
        assert_eq!(count("10k"), Ok(10_000));
        assert!(count("0").is_err() && count("x").is_err());
        assert_eq!(cores("0-1").unwrap().0, [0, 1]);
    }
}
