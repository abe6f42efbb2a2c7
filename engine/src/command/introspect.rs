//! What commands say about themselves: the answers of COMMAND and of `… HELP`, read off the table.
//!
//! Shapes are those of Redis 7.0, which clients use to find the keys of a command they do not know. What Redis tells in
//! prose is our own, and DOCS names no arguments. What a command does to its keys is the one thing that the table's rows do
//! not have; it is in `accesses`, below.

use super::{Flags, Merge, Route, Spec, all, glob, lookup};
use crate::reply::Reply;

const SYNTAX: &str = "ERR syntax error";

/// Names that one COMMAND INFO or DOCS may ask about: a name costs some hundred times its length in the reply.
const MOST_NAMES: usize = 1024;

/// Answers COMMAND or its subcommand `spec`; `args` are all arguments, name first, their number checked.
///
/// # Panics
/// When `spec` is another command's row.
pub fn answer(spec: &Spec, args: &[&[u8]], out: &mut dyn Reply) {
    match spec.name {
        "command" => describe_all(out),
        "command|count" => out.integer(all().count() as i64),
        "command|list" => list(&args[2..], out),
        "command|info" if args.len() == 2 => describe_all(out),
        "command|info" | "command|docs" if args.len() - 2 > MOST_NAMES => {
            out.error("ERR too many command names at once; ask for all, or in parts");
        }
        "command|info" => {
            out.array(args.len() - 2);
            for name in &args[2..] {
                match find(name) {
                    Some(found) => describe(found, out),
                    None => out.null(),
                }
            }
        }
        "command|docs" if args.len() == 2 => {
            out.map(all().count());
            all().for_each(|spec| document(spec, out));
        }
        "command|docs" => {
            let found: Vec<_> = args[2..].iter().filter_map(|name| find(name)).collect();
            out.map(found.len());
            found.into_iter().for_each(|spec| document(spec, out));
        }
        "command|getkeys" => keys(&args[2..], false, out),
        "command|getkeysandflags" => keys(&args[2..], true, out),
        "command|help" => help("command", out),
        other => unreachable!("{other} is no row of COMMAND"),
    }
}

/// Answers `HELP` of a container: its subcommands, each with a hint at its arguments and a line about it.
///
/// # Panics
/// When there is no such container in the table.
pub fn help(container: &str, out: &mut dyn Reply) {
    let spec = lookup(container.as_bytes()).filter(|spec| spec.is_container()).expect("a container of the table");
    let alone = spec.accepts(1);
    out.array(1 + 2 * (usize::from(alone) + spec.subcommands().len()));
    out.simple(&format!("{} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:", container.to_ascii_uppercase()));
    if alone {
        out.simple("(no subcommand)");
        out.simple(&format!("    {}", spec.summary));
    }
    for sub in spec.subcommands() {
        let mut usage = sub.last_name().to_ascii_uppercase();
        let least = usize::from(sub.arity.unsigned_abs());
        for at in 2..least {
            usage.push_str(if sub.keys(least).any(|key| key == at) { " <key>" } else { " <arg>" });
        }
        if sub.arity < 0 {
            usage.push_str(" [<arg> ...]");
        }
        out.simple(&usage);
        out.simple(&format!("    {}", sub.summary));
    }
}

/// The command or subcommand (`client|id`) of that name.
fn find(name: &[u8]) -> Option<&'static Spec> {
    let mut parts = name.splitn(2, |&byte| byte == b'|');
    let spec = lookup(parts.next()?)?;
    match parts.next() {
        Some(sub) => spec.subcommand(sub),
        None => Some(spec),
    }
}

fn list(filter: &[&[u8]], out: &mut dyn Reply) {
    let rows = all().flat_map(|spec| std::iter::once(spec).chain(spec.subcommands()));
    let names: Vec<&str> = match filter {
        [] => rows.map(|spec| spec.name).collect(),
        [by, kind, value] if by.eq_ignore_ascii_case(b"filterby") => {
            let value = value.to_ascii_lowercase();
            if kind.eq_ignore_ascii_case(b"module") {
                Vec::new()
            } else if kind.eq_ignore_ascii_case(b"aclcat") {
                let has = |spec: &&Spec| spec.categories.names().any(|name| name.as_bytes() == value);
                rows.filter(has).map(|spec| spec.name).collect()
            } else if kind.eq_ignore_ascii_case(b"pattern") {
                rows.map(|spec| spec.name).filter(|name| glob::matches(&value, name.as_bytes())).collect()
            } else {
                return out.error(SYNTAX);
            }
        }
        _ => return out.error(SYNTAX),
    };
    out.array(names.len());
    names.iter().for_each(|name| out.bulk(name.as_bytes()));
}

fn describe_all(out: &mut dyn Reply) {
    out.array(all().count());
    all().for_each(|spec| describe(spec, out));
}

/// The ten parts of an element of COMMAND INFO.
fn describe(spec: &Spec, out: &mut dyn Reply) {
    out.array(10);
    out.bulk(spec.name.as_bytes());
    out.integer(i64::from(spec.arity));
    words(spec.flags.names(), out);
    out.integer(i64::from(spec.first_key));
    out.integer(i64::from(spec.last_key));
    out.integer(i64::from(spec.step));
    out.set(spec.categories.names().count());
    spec.categories.names().for_each(|name| out.simple(&format!("@{name}")));
    let tips = tips(spec.route);
    out.set(tips.len());
    tips.iter().for_each(|tip| out.bulk(tip.as_bytes()));
    let specs = key_specs(spec);
    out.set(specs.len());
    specs.iter().for_each(|keys| keys.tell(out));
    if spec.is_container() {
        out.array(spec.subcommands().len());
        spec.subcommands().iter().for_each(|sub| describe(sub, out));
    } else {
        out.set(0);
    }
}

/// A pair of COMMAND DOCS: name, facts.
fn document(spec: &Spec, out: &mut dyn Reply) {
    out.bulk(spec.name.as_bytes());
    out.map(4 + usize::from(spec.is_container()));
    for (field, text) in
        [("summary", spec.summary), ("since", spec.since), ("group", spec.group), ("complexity", spec.complexity)]
    {
        out.bulk(field.as_bytes());
        out.bulk(text.as_bytes());
    }
    if spec.is_container() {
        out.bulk(b"subcommands");
        out.map(spec.subcommands().len());
        spec.subcommands().iter().for_each(|sub| document(sub, out));
    }
}

fn words(words: impl Iterator<Item = &'static str> + Clone, out: &mut dyn Reply) {
    out.set(words.clone().count());
    words.for_each(|word| out.simple(word));
}

/// How a client that knows several nodes may cut a command up, and put the replies together.
fn tips(route: Route) -> &'static [&'static str] {
    match route {
        Route::Split(Merge::Sum) => &["request_policy:multi_shard", "response_policy:agg_sum"],
        Route::Split(Merge::Ok) => &["request_policy:multi_shard", "response_policy:all_succeeded"],
        Route::Split(_) => &["request_policy:multi_shard"],
        Route::Every(Merge::Sum) => &["request_policy:all_shards", "response_policy:agg_sum"],
        Route::Every(Merge::Ok) => &["request_policy:all_shards", "response_policy:all_succeeded"],
        Route::Every(_) => &["request_policy:all_shards", "nondeterministic_output_order"],
        Route::Session | Route::Key | Route::Shard | Route::Node => &[],
    }
}

/// Keys of a command that are treated alike: where they are among the arguments, and what is done to them.
#[derive(Clone, Copy, Debug)]
struct KeySpec {
    first: i16,
    /// Counted from `first`, or, when negative, from the end of the arguments.
    last: i16,
    step: i16,
    access: &'static str,
}

impl KeySpec {
    fn tell(self, out: &mut dyn Reply) {
        out.map(3);
        out.bulk(b"flags");
        words(self.access.split(' '), out);
        out.bulk(b"begin_search");
        located(out, "index", &[("index", self.first)]);
        out.bulk(b"find_keys");
        located(out, "range", &[("lastkey", self.last), ("keystep", self.step), ("limit", 0)]);
    }
}

fn located(out: &mut dyn Reply, kind: &str, fields: &[(&str, i16)]) {
    out.map(2);
    out.bulk(b"type");
    out.bulk(kind.as_bytes());
    out.bulk(b"spec");
    out.map(fields.len());
    for (name, value) in fields {
        out.bulk(name.as_bytes());
        out.integer(i64::from(*value));
    }
}

fn key_specs(spec: &Spec) -> Vec<KeySpec> {
    if spec.first_key == 0 {
        return Vec::new();
    }
    match accesses(spec) {
        [access] => {
            let last = if spec.last_key < 0 { spec.last_key } else { spec.last_key - spec.first_key };
            vec![KeySpec { first: spec.first_key, last, step: spec.step, access }]
        }
        each => {
            (spec.first_key..).zip(each).map(|(first, access)| KeySpec { first, last: 0, step: 1, access }).collect()
        }
    }
}

/// What is done to the keys, in Redis's words: to all of them, or to each in turn.
///
/// `RO`, `RW`, `OW` (overwritten unread), `RM` (removed unread) are about the whole entry; then follows what the client
/// sees of the value, or what becomes of it.
fn accesses(spec: &Spec) -> &'static [&'static str] {
    match spec.name {
        "rename" => &["RW access delete", "OW update"],
        "renamenx" => &["RW access delete", "OW insert"],
        "copy" => &["RO access", "OW update"],
        "del" | "unlink" => &["RM delete"],
        "getdel" => &["RW access delete"],
        "setnx" | "msetnx" => &["OW insert"],
        "setex" | "psetex" | "mset" => &["OW update"],
        "append" => &["RW insert"],
        "setrange" | "expire" | "pexpire" | "expireat" | "pexpireat" | "persist" => &["RW update"],
        "set" => &["RW access update variable_flags"],
        "exists" | "touch" | "type" | "strlen" | "watch" => &["RO"],
        name if name.contains('|') => &["RO"],
        _ if spec.flags.contains(Flags::WRITE) => &["RW access update"],
        _ => &["RO access"],
    }
}

/// The keys of a command line, and, if asked, what is done to them.
fn keys(line: &[&[u8]], flags: bool, out: &mut dyn Reply) {
    let spec = match lookup(line[0]) {
        Some(spec) if spec.is_container() && line.len() > 1 => spec.subcommand(line[1]),
        found => found,
    };
    let Some(spec) = spec else { return out.error("ERR Invalid command specified") };
    if spec.first_key == 0 {
        return out.error("ERR The command has no key arguments");
    }
    if !spec.accepts(line.len()) {
        return out.error("ERR Invalid number of arguments specified for command");
    }
    let accesses = match spec.name {
        "set" if line[3..].iter().any(|option| option.eq_ignore_ascii_case(b"get")) => &["RW access update"],
        "set" => &["OW update"],
        _ => accesses(spec),
    };
    out.array(spec.keys(line.len()).count());
    for (nth, at) in spec.keys(line.len()).enumerate() {
        if flags {
            out.array(2);
        }
        out.bulk(line[at]);
        if flags {
            words(accesses[nth.min(accesses.len() - 1)].split(' '), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Transcript;
    use super::super::{count, resolve};
    use super::*;

    fn run(line: &str) -> String {
        let args: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        let spec = resolve(&args).unwrap();
        let mut out = Transcript::default();
        answer(spec, &args, &mut out);
        out.finish()
    }

    #[test]
    fn info_has_the_shape_that_clients_read() {
        assert_eq!(
            run("command info get nope MGET|x"),
            r#"[["get", (integer) 2, ~readonly, fast~, (integer) 1, (integer) 1, (integer) 1, ~@read, @string, @fast~, "#
                .to_owned()
                + r#"~~, ~{"flags": ~RO, access~, "begin_search": {"type": "index", "spec": {"index": (integer) 1}}, "#
                + r#""find_keys": {"type": "range", "spec": {"lastkey": (integer) 0, "keystep": (integer) 1, "#
                + r#""limit": (integer) 0}}}~, ~~], (nil), (nil)]"#
        );
        let rename = run("command info rename");
        assert!(
            rename
                .contains(r#"~RW, access, delete~, "begin_search": {"type": "index", "spec": {"index": (integer) 1}"#)
        );
        assert!(rename.contains(r#"~OW, update~, "begin_search": {"type": "index", "spec": {"index": (integer) 2}"#));
        let mset = run("command info mset");
        assert!(mset.contains(r#""lastkey": (integer) -1, "keystep": (integer) 2"#), "{mset}");
        assert!(mset.contains(r#"~"request_policy:multi_shard", "response_policy:all_succeeded"~"#), "{mset}");
        assert!(run("command info object").contains(r#"["object|encoding", (integer) 3, ~readonly~, (integer) 2"#));
        assert!(run("command info OBJECT|ENCODING").starts_with(r#"[["object|encoding", (integer) 3"#));
    }

    #[test]
    fn everything_is_described_once() {
        let number = all().count();
        assert_eq!(run("command count"), format!("(integer) {number}"));
        assert_eq!(run("command").matches("(integer)").count(), run("command info").matches("(integer)").count());
        assert_eq!(run("command list").matches('"').count(), 2 * count());
        assert_eq!(run("command docs").matches(r#""summary": "#).count(), count());
        assert_eq!(run("command docs get nope").matches(r#""summary": "#).count(), 1);
        assert_eq!(run("command docs nope"), "{}");
        let docs = run("command docs object|freq");
        assert!(docs.starts_with(r#"{"object|freq": {"summary": "Refused"#), "{docs}");
    }

    #[test]
    fn lists_are_filtered() {
        assert_eq!(run("command list FILTERBY aclcat Bitmap"), r#"["setbit", "getbit", "bitcount", "bitpos"]"#);
        assert_eq!(run("command list filterby pattern MEMORY|[d-h]*"), r#"["memory|doctor", "memory|help"]"#);
        for nothing in ["aclcat nope", "aclcat @bitmap", "module nope", "pattern nope*"] {
            assert_eq!(run(&format!("command list filterby {nothing}")), "[]");
        }
        for wrong in ["filterby", "filterby foo bar", "by pattern x", "filterby pattern"] {
            assert_eq!(run(&format!("command list {wrong}")), "ERR syntax error");
        }
    }

    #[test]
    fn keys_are_found_in_a_command_line() {
        for (line, keys) in [
            ("get a", r#"["a"]"#),
            ("mset a 1 b 2", r#"["a", "b"]"#),
            ("MGET a b c", r#"["a", "b", "c"]"#),
            ("object encoding x", r#"["x"]"#),
            ("lcs a b len", r#"["a", "b"]"#),
            ("nope a", "ERR Invalid command specified"),
            ("object nope a", "ERR Invalid command specified"),
            ("ping a", "ERR The command has no key arguments"),
            ("config get a", "ERR The command has no key arguments"),
            ("get a b", "ERR Invalid number of arguments specified for command"),
        ] {
            assert_eq!(run(&format!("command getkeys {line}")), keys, "{line}");
        }
        for (line, keys) in [
            ("set a b", r#"[["a", ~OW, update~]]"#),
            ("set a get GET", r#"[["a", ~RW, access, update~]]"#),
            ("set a get", r#"[["a", ~OW, update~]]"#),
            ("rename a b", r#"[["a", ~RW, access, delete~], ["b", ~OW, update~]]"#),
            ("del a b", r#"[["a", ~RM, delete~], ["b", ~RM, delete~]]"#),
            ("nope a", "ERR Invalid command specified"),
        ] {
            assert_eq!(run(&format!("command getkeysandflags {line}")), keys, "{line}");
        }
    }

    #[test]
    fn help_names_every_subcommand_of_every_container() {
        for spec in all().filter(|spec| spec.is_container()) {
            let mut out = Transcript::default();
            help(spec.name, &mut out);
            let text = out.finish();
            let head = spec.name.to_ascii_uppercase() + " <subcommand> [<arg> [value] [opt] ...]. Subcommands are:, ";
            assert!(text.starts_with(&format!("[{head}")), "{text}");
            for sub in spec.subcommands() {
                assert!(text.contains(&format!(", {}", sub.last_name().to_ascii_uppercase())), "{text}");
                assert!(text.contains(sub.summary), "{text}");
            }
            assert!(text.ends_with("HELP,     Prints this help.]"), "{text}");
        }
        let memory = {
            let mut out = Transcript::default();
            help("memory", &mut out);
            out.finish()
        };
        assert!(memory.contains("USAGE <key> [<arg> ...],     Bytes that"), "{memory}");
    }
}
