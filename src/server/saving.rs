//! `BGSAVE`, `BGREWRITEAOF`, `LASTSAVE`: snapshots, where data is kept on disk.
//!
//! Redis has two kinds of files and a command for each; here a snapshot is both, so the two commands do the same.

use gridkv_engine::command::Spec;
use gridkv_engine::reply::Reply;

use super::Outcome;
use super::gather::each_core;
use crate::cores::CoreRc;

const NOT_KEPT: &str = "ERR this node keeps nothing on disk: its backend is not 'file'";
const UNDER_WAY: &str = "ERR Background save already in progress";

/// `BGSAVE [SCHEDULE]` and `BGREWRITEAOF`: every core takes a snapshot, from now on and in the background.
pub(crate) async fn begin(core: &CoreRc, spec: &Spec, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    match &args[1..] {
        [] => {}
        [word] if word.eq_ignore_ascii_case(b"schedule") => {}
        _ => return Err("ERR syntax error".into()),
    }
    let begun = each_core(core, |core| core.state.borrow_mut().kept.as_mut().map(|kept| kept.want_snapshot())).await;
    if begun.iter().any(Option::is_none) {
        return Err(NOT_KEPT.into());
    }
    if !begun.contains(&Some(true)) {
        return Err(UNDER_WAY.into());
    }
    out.simple(match spec.name {
        "bgsave" => "Background saving started",
        _ => "Background append only file rewriting started",
    });
    Ok(())
}

/// `LASTSAVE`: when every core had a snapshot last.
pub(crate) async fn last(core: &CoreRc, out: &mut dyn Reply) -> Outcome {
    let cores = each_core(core, |core| core.metrics().disk).await;
    if cores.iter().any(|disk| !disk.kept) {
        return Err(NOT_KEPT.into());
    }
    let oldest = cores.iter().map(|disk| disk.last_snapshot).min().unwrap_or_default();
    out.integer((oldest / 1000) as i64);
    Ok(())
}
