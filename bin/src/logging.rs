//! Where the node's own words go: one line per event on standard error, as text or as JSON.
//!
//! Promises that a panic of any thread is in the log, in the log's format, with its place. It decides nothing about what
//! is worth a line; that is up to whoever writes it.

use std::io::IsTerminal;
use std::str::FromStr;

use gridkv::ConfigError;
use tracing_subscriber::EnvFilter;

/// The shape of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people; in colour on a terminal.
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for Format {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Format, ConfigError> {
        match text {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            other => Err(ConfigError::new("log_format", format!("{other:?} is no format of the log"))
                .with_hint("write `text` or `json`")),
        }
    }
}

/// What is logged: a level, or a level for each part of the program (`info,gridkv=debug`).
///
/// # Errors
/// What is wrong with the text. A lone word that is no level is refused: the filter would take it for a part's name.
pub(crate) fn check_level(text: &str) -> Result<String, ConfigError> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let plain = text.split(',').all(|part| part.contains('=') || LEVELS.contains(&part.trim()));
    if plain && EnvFilter::try_new(text).is_ok() {
        return Ok(text.to_owned());
    }
    Err(ConfigError::new("log_level", format!("{text:?} is no level"))
        .with_hint(format!("write one of {}, or one for each part such as `info,gridkv=debug`", LEVELS.join(", "))))
}

/// Starts logging; called once, before any other thread exists.
pub(crate) fn start(level: &str, format: Format) {
    let filter = EnvFilter::new(level);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        Format::Text => log.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
        Format::Json => log.json().flatten_event(true).init(),
    }
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let message = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a text");
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(thread = thread.name().unwrap_or("?"), place, "panicked: {message}");
        default(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_a_word_or_a_word_for_each_part() {
        for text in ["info", "off", "warn,gridkv=debug", "gridkv_net=trace"] {
            assert_eq!(check_level(text).unwrap(), text);
        }
        for text in ["", "loud", "info,loud", "gridkv=loud"] {
            assert_eq!(check_level(text).expect_err(text).setting, "log_level");
        }
    }
}
