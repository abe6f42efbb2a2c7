//! `CLIENT LIST`, `CLIENT INFO`, `CLIENT KILL`: the connections of all cores, seen from one of them.
//!
//! A core copies what there is to see of its connections ([`ClientView`]); lines and filters work on the copies. Nothing
//! here touches a connection but [`kill`], which asks each core to close some of its own.

use std::fmt::Write as _;
use std::net::SocketAddr;

use gridkv_engine::Millis;
use gridkv_engine::command::{self, CommandId};
use gridkv_engine::reply::Reply;
use gridkv_net::resp::Protocol;

use super::gather::{each_core, on_core};
use super::{Caller, Outcome, Refused, SYNTAX, word};
use crate::cores::CoreRc;

/// The only user there is.
const USER: &str = "default";

/// One connection, as its core saw it when it was asked.
#[derive(Clone, Debug)]
pub(crate) struct ClientView {
    pub(crate) id: u64,
    pub(crate) addr: SocketAddr,
    pub(crate) laddr: SocketAddr,
    /// As `CLIENT SETNAME` set it; empty when it did not.
    pub(crate) name: String,
    pub(crate) created: Millis,
    pub(crate) last_active: Millis,
    /// The core that serves it.
    pub(crate) core: usize,
    /// Commands queued since `MULTI`; -1 outside of a transaction.
    pub(crate) multi: i64,
    /// Keys under `WATCH`.
    pub(crate) watching: usize,
    /// Bytes of requests that wait or are incomplete.
    pub(crate) input_bytes: usize,
    /// Bytes of replies that wait.
    pub(crate) output_bytes: usize,
    pub(crate) last_command: Option<CommandId>,
    pub(crate) protocol: Protocol,
    pub(crate) lib_name: String,
    pub(crate) lib_ver: String,
    pub(crate) no_evict: bool,
    pub(crate) no_touch: bool,
    /// Whether replies are turned off (`CLIENT REPLY`).
    pub(crate) reply_off: bool,
    pub(crate) total_commands: u64,
}

impl ClientView {
    /// The line of `CLIENT LIST`, in the order and words of Redis 7.2, ours behind.
    pub(crate) fn line(&self, now: Millis) -> String {
        let seconds = |since: Millis| now.saturating_sub(since) / 1000;
        let command = self.last_command.and_then(command::by_id).map_or("NULL", |spec| spec.name);
        let mut line = format!("id={} addr={} laddr={} fd=-1 name={}", self.id, self.addr, self.laddr, self.name);
        let rest = write!(
            line,
            " age={} idle={} flags={} db=0 sub=0 psub=0 ssub=0 multi={} qbuf={} qbuf-free=0 argv-mem=0 \
             multi-mem=0 rbs=0 rbp=0 obl={} oll=0 omem=0 tot-mem={} events=r cmd={command} user={USER} redir=-1 \
             resp={} lib-name={} lib-ver={} watch={} core={} tot-cmds={} reply={}",
            seconds(self.created),
            seconds(self.last_active),
            self.flags(),
            self.multi,
            self.input_bytes,
            self.output_bytes,
            self.input_bytes + self.output_bytes,
            self.protocol.flag(),
            self.lib_name,
            self.lib_ver,
            self.watching,
            self.core,
            self.total_commands,
            if self.reply_off { "off" } else { "on" },
        );
        rest.expect("a String takes everything");
        line
    }

    /// Redis's letters: `x` in a transaction, `e` not to be evicted, `T` not touching keys, `N` none of these.
    fn flags(&self) -> String {
        let letters = [(self.multi >= 0, 'x'), (self.no_evict, 'e'), (self.no_touch, 'T')];
        let flags: String = letters.iter().filter(|(on, _)| *on).map(|(_, letter)| *letter).collect();
        if flags.is_empty() { "N".to_owned() } else { flags }
    }
}

/// Which connections are meant; all conditions must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Filter {
    ids: Option<Vec<u64>>,
    addr: Option<String>,
    laddr: Option<String>,
    /// A type that no client of ours has: nobody is meant.
    none: bool,
    /// All but this one.
    not: Option<u64>,
    /// Connected for at least so many seconds.
    max_age: Option<u64>,
}

impl Filter {
    fn means(&self, view: &ClientView, now: Millis) -> bool {
        let same = |wanted: &Option<String>, addr: &SocketAddr| {
            wanted.as_ref().is_none_or(|wanted| *wanted == addr.to_string())
        };
        !self.none
            && self.not != Some(view.id)
            && self.ids.as_ref().is_none_or(|ids| ids.contains(&view.id))
            && same(&self.addr, &view.addr)
            && same(&self.laddr, &view.laddr)
            && self.max_age.is_none_or(|age| now.saturating_sub(view.created) / 1000 >= age)
    }

    /// Of `CLIENT LIST [TYPE type] [ID id …]`.
    fn of_list(args: &[&[u8]]) -> Result<Filter, Refused> {
        let mut filter = Filter::default();
        let mut rest = args;
        while let [option, value, more @ ..] = rest {
            if word(option, "type") {
                filter.of_type(value)?;
                rest = more;
            } else if word(option, "id") {
                let ids = rest[1..].iter().map(|id| client_id(id).ok_or("ERR Invalid client ID".into()));
                filter.ids = Some(ids.collect::<Result<_, Refused>>()?);
                rest = &[];
            } else {
                return Err(SYNTAX.into());
            }
        }
        if rest.is_empty() { Ok(filter) } else { Err(SYNTAX.into()) }
    }

    /// Of `CLIENT KILL option value …`, asked by client `me`.
    fn of_kill(args: &[&[u8]], me: u64) -> Result<Filter, Refused> {
        let mut filter = Filter { not: Some(me), ..Filter::default() };
        let (pairs, odd) = args.as_chunks::<2>();
        if !odd.is_empty() {
            return Err(SYNTAX.into());
        }
        for [option, value] in pairs {
            let text = || Some(String::from_utf8_lossy(value).into_owned());
            if word(option, "id") {
                let id = client_id(value).ok_or("ERR client-id should be greater than 0")?;
                filter.ids = Some(vec![id]);
            } else if word(option, "type") {
                filter.of_type(value)?;
            } else if word(option, "addr") {
                filter.addr = text();
            } else if word(option, "laddr") {
                filter.laddr = text();
            } else if word(option, "user") {
                if *value != USER.as_bytes() {
                    return Err(format!("ERR No such user '{}'", String::from_utf8_lossy(value)).into());
                }
            } else if word(option, "maxage") {
                let age = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                filter.max_age = Some(age.ok_or("ERR maxage is not an integer or out of range")?);
            } else if word(option, "skipme") && (word(value, "yes") || word(value, "no")) {
                filter.not = word(value, "yes").then_some(me);
            } else {
                return Err(SYNTAX.into());
            }
        }
        Ok(filter)
    }

    fn of_type(&mut self, name: &[u8]) -> Result<(), Refused> {
        let ours = word(name, "normal");
        let others = ["master", "replica", "slave", "pubsub"];
        if !ours && !others.iter().any(|other| word(name, other)) {
            return Err(format!("ERR Unknown client type '{}'", String::from_utf8_lossy(name)).into());
        }
        self.none |= !ours;
        Ok(())
    }
}

fn client_id(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok().filter(|id| *id > 0)
}

/// `CLIENT LIST`.
pub(crate) async fn list(core: &CoreRc, caller: &Caller, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let filter = Filter::of_list(&args[2..])?;
    let now = core.state.borrow().now;
    let mut views: Vec<ClientView> = each_core(core, views).await.into_iter().flatten().collect();
    views.retain(|view| filter.means(view, now));
    views.sort_by_key(|view| view.id);
    let mut text = String::new();
    for view in &mut views {
        under_way(view, caller, args);
        text += &view.line(now);
        text.push('\n');
    }
    out.verbatim(&text);
    Ok(())
}

/// `CLIENT INFO`.
pub(crate) async fn info(core: &CoreRc, caller: &Caller, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let now = core.state.borrow().now;
    let mut line = String::new();
    if let Some(mut view) = views(core).into_iter().find(|view| view.id == caller.client) {
        under_way(&mut view, caller, args);
        line = view.line(now);
        line.push('\n');
    }
    out.verbatim(&line);
    Ok(())
}

/// `CLIENT KILL`, in its old form (an address; `OK` or an error) and its new one (filters; how many).
pub(crate) async fn kill(core: &CoreRc, caller: &Caller, args: &[&[u8]], out: &mut dyn Reply) -> Outcome {
    let old_form = args.len() == 3;
    let filter = match args {
        [_, _, addr] => Filter { addr: Some(String::from_utf8_lossy(addr).into_owned()), ..Filter::default() },
        _ => Filter::of_kill(&args[2..], caller.client)?,
    };
    let now = core.state.borrow().now;
    // The caller's own connection comes last: whatever happens to it, the others are closed.
    let own_core = core.id.index();
    let mut killed = 0;
    for to in (0..core.topology.cores()).filter(|&to| to != own_core).chain([own_core]) {
        let filter = filter.clone();
        killed += on_core(core, to, move |core| close(core, &filter, now)).await.unwrap_or(0);
    }
    match (old_form, killed) {
        (true, 0) => return Err("ERR No such client".into()),
        (true, _) => out.ok(),
        (false, _) => out.integer(killed),
    }
    Ok(())
}

/// Closes the connections of this core that are meant.
fn close(core: &CoreRc, filter: &Filter, now: Millis) -> i64 {
    let meant = views(core).into_iter().filter(|view| filter.means(view, now));
    let mut connections = core.connections.borrow_mut();
    let Some(connections) = &mut *connections else { return 0 };
    let killed = meant.filter(|view| connections.kill(view.id)).count();
    core.kick();
    killed as i64
}

fn views(core: &CoreRc) -> Vec<ClientView> {
    core.connections.borrow().as_ref().map_or(Vec::new(), |connections| connections.views(core.id.index()))
}

/// Address and name of a client of this core; empty when it is gone.
pub(crate) fn names(core: &CoreRc, client: u64) -> (String, String) {
    let found = views(core).into_iter().find(|view| view.id == client);
    found.map_or_else(Default::default, |view| (view.addr.to_string(), view.name))
}

/// What the caller is doing at this moment belongs into its line, as in Redis: this command, and its bytes.
fn under_way(view: &mut ClientView, caller: &Caller, args: &[&[u8]]) {
    if view.id == caller.client {
        let digits = |number: usize| number.checked_ilog10().unwrap_or(0) as usize + 1;
        let header = 1 + digits(args.len()) + 2;
        let parts: usize = args.iter().map(|arg| 1 + digits(arg.len()) + 2 + arg.len() + 2).sum();
        view.input_bytes += header + parts;
        view.last_command = command::resolve(args).ok().map(|spec| spec.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(id: u64) -> ClientView {
        ClientView {
            id,
            addr: SocketAddr::from(([127, 0, 0, 1], 50_000 + id as u16)),
            laddr: SocketAddr::from(([127, 0, 0, 1], 7379)),
            name: String::new(),
            created: 1_000,
            last_active: 9_000,
            core: 1,
            multi: -1,
            watching: 0,
            input_bytes: 0,
            output_bytes: 0,
            last_command: command::lookup(b"get").map(|spec| spec.id),
            protocol: Protocol::Resp2,
            lib_name: "redis-py".to_owned(),
            lib_ver: "5.0".to_owned(),
            no_evict: false,
            no_touch: false,
            reply_off: false,
            total_commands: 3,
        }
    }

    fn me() -> Caller {
        Caller { client: 3, protocol: Protocol::Resp2, level: 0 }
    }

    #[test]
    fn a_line_reads_as_redis_writes_it() {
        assert_eq!(
            view(3).line(11_500),
            "id=3 addr=127.0.0.1:50003 laddr=127.0.0.1:7379 fd=-1 name= age=10 idle=2 flags=N db=0 sub=0 psub=0 ssub=0 \
             multi=-1 qbuf=0 qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 \
             events=r cmd=get user=default redir=-1 resp=2 lib-name=redis-py lib-ver=5.0 watch=0 core=1 tot-cmds=3 reply=on"
        );
        let busy = ClientView { multi: 2, no_evict: true, name: "worker".into(), ..view(4) };
        let line = busy.line(0);
        assert!(line.contains(" flags=xe ") && line.contains(" multi=2 ") && line.contains(" name=worker "), "{line}");
    }

    #[test]
    fn the_caller_is_shown_with_the_command_it_asks_with() {
        let mut own = view(3);
        under_way(&mut own, &me(), &[b"client", b"list"]);
        assert_eq!(own.input_bytes, b"*2\r\n$6\r\nclient\r\n$4\r\nlist\r\n".len());
        assert!(own.line(0).contains(" cmd=client|list "));
        let mut other = view(4);
        under_way(&mut other, &me(), &[b"client", b"list"]);
        assert_eq!(other.input_bytes, 0);
    }

    fn meant(filter: &Filter) -> Vec<u64> {
        (1..=5).filter(|id| filter.means(&view(*id), 11_000)).collect()
    }

    #[test]
    fn filters_of_kill_must_all_hold() {
        let kill = |line: &str| {
            let args: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
            Filter::of_kill(&args, 3).map(|filter| meant(&filter)).map_err(|error| error.to_string())
        };
        assert_eq!(kill("SKIPME yes"), Ok(vec![1, 2, 4, 5]));
        assert_eq!(kill("skipme no"), Ok(vec![1, 2, 3, 4, 5]));
        assert_eq!(kill("id 4"), Ok(vec![4]));
        assert_eq!(kill("id 3"), Ok(vec![]), "the caller is spared unless it says otherwise");
        assert_eq!(kill("addr 127.0.0.1:50002 type normal user default"), Ok(vec![2]));
        assert_eq!(kill("addr 127.0.0.1:50002 id 4"), Ok(vec![]));
        assert_eq!(kill("laddr 127.0.0.1:7379 maxage 10"), Ok(vec![1, 2, 4, 5]));
        assert_eq!(kill("maxage 11"), Ok(vec![]));
        assert_eq!(kill("type pubsub"), Ok(vec![]));
        for (line, error) in [
            ("id 10 wrong", "ERR syntax error"),
            ("id str", "ERR client-id should be greater than 0"),
            ("id 0", "ERR client-id should be greater than 0"),
            ("type wrong", "ERR Unknown client type 'wrong'"),
            ("user wrong", "ERR No such user 'wrong'"),
            ("skipme maybe", "ERR syntax error"),
        ] {
            assert_eq!(kill(line), Err(error.to_owned()), "{line}");
        }
    }

    #[test]
    fn lists_are_filtered_by_id_and_type() {
        let list = |line: &str| {
            let args: Vec<&[u8]> = line.split(' ').filter(|word| !word.is_empty()).map(str::as_bytes).collect();
            Filter::of_list(&args).map(|filter| meant(&filter)).map_err(|error| error.to_string())
        };
        assert_eq!(list(""), Ok(vec![1, 2, 3, 4, 5]));
        assert_eq!(list("id 3 5 9"), Ok(vec![3, 5]));
        assert_eq!(list("TYPE normal ID 1"), Ok(vec![1]));
        assert_eq!(list("type replica"), Ok(vec![]));
        assert_eq!(list("id"), Err("ERR syntax error".to_owned()));
        assert_eq!(list("id x"), Err("ERR Invalid client ID".to_owned()));
        assert_eq!(list("some thing"), Err("ERR syntax error".to_owned()));
    }
}
