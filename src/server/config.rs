//! `CONFIG`: reading parameters, changing them on all cores, setting statistics to zero.
//!
//! A `CONFIG SET` of several parameters makes all changes or none: they are checked together before any core hears of
//! one. There is no configuration file that this process writes, so `REWRITE` is refused.

use gridkv_engine::command::glob;
use gridkv_engine::reply::Reply;

use super::gather::each_core;
use super::settings::{self, Change, PARAMETERS, Parameter, Settings};
use super::{Outcome, Refused};
use crate::cores::CoreRc;

/// `CONFIG GET pattern …`.
pub(crate) fn get(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let state = core.state.borrow();
    let found = matching(&args[2..]);
    out.map(found.len());
    for parameter in found {
        out.bulk(parameter.name.as_bytes());
        out.bulk((parameter.get)(&state.settings).as_bytes());
    }
    Ok(())
}

/// The parameters that match one of the patterns, each once.
fn matching(patterns: &[&[u8]]) -> Vec<&'static Parameter> {
    let patterns: Vec<Vec<u8>> = patterns.iter().map(|pattern| pattern.to_ascii_lowercase()).collect();
    let matches = |name: &str| patterns.iter().any(|pattern| glob::matches(pattern, name.as_bytes()));
    PARAMETERS.iter().filter(|parameter| matches(parameter.name)).collect()
}

/// `CONFIG SET name value …`.
pub(crate) async fn set(core: &CoreRc, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let (changes, serial) = {
        let settings = &core.state.borrow().settings;
        (changes(settings, &args[2..])?, settings.facts.next_serial())
    };
    each_core(core, move |core| {
        let state = &mut *core.state.borrow_mut();
        state.settings.apply(serial, &changes);
        state.store.set_max_memory(state.settings.max_memory_of_core());
    })
    .await;
    out.ok();
    Ok(())
}

/// The changes that the arguments ask for, found to be possible together.
fn changes(settings: &Settings, args: &[&[u8]]) -> Result<Vec<Change>, Refused> {
    let (pairs, odd) = args.as_chunks::<2>();
    if !odd.is_empty() {
        return Err("ERR wrong number of arguments for 'config|set' command".into());
    }
    let failed = |name: &str, why: &str| -> Refused {
        format!("ERR CONFIG SET failed (possibly related to argument '{name}') - {why}").into()
    };
    let mut changes: Vec<Change> = Vec::with_capacity(pairs.len());
    for [name, value] in pairs {
        let Some(place) = settings::find(name) else {
            let name = String::from_utf8_lossy(name);
            return Err(format!("ERR Unknown option or number of arguments for CONFIG SET - '{name}'").into());
        };
        let name = PARAMETERS[place].name;
        if changes.iter().any(|(known, _)| *known == place) {
            return Err(failed(name, "duplicate parameter"));
        }
        let value = std::str::from_utf8(value).map_err(|_| failed(name, "argument is not UTF-8 text"))?;
        changes.push((place, value.to_owned()));
    }
    settings.check(&changes).map_err(|(name, why)| failed(name, &why))?;
    Ok(changes)
}

/// `CONFIG RESETSTAT`. It is itself the first call of the new count: calls are counted when they end.
pub(crate) async fn reset_statistics(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    each_core(core, |core| {
        let state = &mut *core.state.borrow_mut();
        state.metrics.reset();
        state.store.reset_stats();
    })
    .await;
    out.ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::settings::tests::settings;

    fn asked(line: &str) -> Result<usize, String> {
        let args: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        changes(&settings(), &args).map(|changes| changes.len()).map_err(|error| error.to_string())
    }

    #[test]
    fn all_changes_are_made_or_none() {
        assert_eq!(asked("maxmemory 100mb slowlog-max-len 7"), Ok(2));
        for (line, error) in [
            ("maxmemory 1 no-such 2", "ERR Unknown option or number of arguments for CONFIG SET - 'no-such'"),
            ("maxmemory", "ERR wrong number of arguments for 'config|set' command"),
            (
                "timeout 5 PORT 1",
                "ERR CONFIG SET failed (possibly related to argument 'port') - can't set immutable config",
            ),
            (
                "maxmemory 1 MaxMemory 2",
                "ERR CONFIG SET failed (possibly related to argument 'maxmemory') - duplicate parameter",
            ),
            (
                "timeout 5 maxmemory bla",
                "ERR CONFIG SET failed (possibly related to argument 'maxmemory') - argument must be a memory value",
            ),
        ] {
            assert_eq!(asked(line), Err(error.to_owned()), "{line}");
        }
    }

    #[test]
    fn several_patterns_find_each_parameter_once() {
        let names = |patterns: &[&[u8]]| matching(patterns).iter().map(|p| p.name).collect::<Vec<_>>();
        assert_eq!(names(&[b"maxmemory", b"MAX*", b"port"]), ["maxclients", "maxmemory", "maxmemory-policy", "port"]);
        assert_eq!(names(&[b"*"]).len(), PARAMETERS.len());
        assert!(names(&[b"no-such"]).is_empty());
    }
}
