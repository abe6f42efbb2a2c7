//! Commands as data: one table says what exists, how many arguments it takes, where its keys are, where it runs.
//!
//! ```text
//!   args ──▶ resolve ──▶ &Spec ──▶ route ──▶ Session, Node             answered above this crate
//!              │                        └──▶ Key, Shard, Split, Every   spec.run(Context) beside the data
//!              └──▶ Refusal: unknown, wrong number of arguments, works on another type
//! ```
//!
//! The same rows give dispatch, error texts and the answers of `COMMAND` ([`introspect`]), so they cannot disagree.
//! Contract of a [`Run`]: it gets arguments whose number was checked, checks the rest of them before it changes
//! anything, and pushes exactly one reply. It sees the keys of its arguments only, all owned by this store.
//!
//! Not here: bytes of the protocol, transactions, authentication, which core owns what.

mod bits;
mod expire;
mod failure;
mod find;
mod flags;
pub mod glob;
pub mod introspect;
mod keys;
pub mod number;
pub mod scan;
mod string;
mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::fmt;

use crate::Millis;
use crate::reply::Reply;
use crate::store::Store;

pub use find::lookup;
pub use flags::{Categories, Flags};

/// Place of a command in the table: small, dense, the same in every build of one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CommandId(pub u16);

/// How the parts of a command that ran in several places become one reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// The sum of integers.
    Sum,
    /// `OK` when all said so, else the first error.
    Ok,
    /// An array of the parts' replies, in the order of the keys.
    Array,
    /// One array of all elements: a part writes its elements without a header and counts them in [`Context::aux`].
    Concat,
}

/// Where a command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// In the session of the connection.
    Session,
    /// On the owner of its one key.
    Key,
    /// On the owner of the shard that all its keys share; otherwise it is refused with `CROSSSLOT`.
    Shard,
    /// The owner of some of its keys runs it on those; the parts become one reply.
    Split(Merge),
    /// On every core; [`Spec::run`] is one core's part.
    Every(Merge),
    /// By the node: needs several cores, or knows more than one store.
    Node,
}

/// Executes a command on the core that owns its keys.
pub type Run = fn(&mut Context<'_>);

/// What a command works with.
pub struct Context<'a> {
    /// The data of this core.
    pub store: &'a mut Store,
    /// The command's name, then its arguments; their number fits [`Spec::arity`].
    pub args: &'a [&'a [u8]],
    /// Unix milliseconds.
    pub now: Millis,
    /// Takes the reply.
    pub out: &'a mut dyn Reply,
    /// A number for the merge of parts: elements written, for [`Merge::Concat`]; the value replied, for [`Merge::Sum`].
    pub aux: i64,
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("args", &self.args.len()).field("now", &self.now).finish_non_exhaustive()
    }
}

/// A row of the table: a command, or a subcommand (`client|id`).
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Its place in the table.
    pub id: CommandId,
    /// Lower case; subcommands with their container: `client|id`.
    pub name: &'static str,
    /// Number of arguments with the name: exactly that many, or, when negative, at least.
    pub arity: i16,
    /// Redis's command flags.
    pub flags: Flags,
    /// ACL categories.
    pub categories: Categories,
    /// Index of the first key among the arguments; 0 = no keys.
    pub first_key: i16,
    /// Index of the last key; negative counts from the end.
    pub last_key: i16,
    /// Distance between keys.
    pub step: i16,
    /// Where it runs.
    pub route: Route,
    /// How it runs beside the data; `None` when it does not.
    pub run: Option<Run>,
    /// One line for people.
    pub summary: &'static str,
    /// The version of Redis that had it first.
    pub since: &'static str,
    /// Redis's group of commands.
    pub group: &'static str,
    /// Cost.
    pub complexity: &'static str,
    subcommands: (u16, u16),
}

impl Spec {
    /// Whether it has subcommands, which are then the second argument.
    #[inline]
    pub fn is_container(&self) -> bool {
        self.subcommands.0 != self.subcommands.1
    }

    /// Its subcommands.
    pub fn subcommands(&self) -> &'static [Spec] {
        &table::SPECS[usize::from(self.subcommands.0)..usize::from(self.subcommands.1)]
    }

    /// The subcommand of that name, in any case.
    pub fn subcommand(&self, name: &[u8]) -> Option<&'static Spec> {
        self.subcommands().iter().find(|spec| spec.last_name().as_bytes().eq_ignore_ascii_case(name))
    }

    /// The name without its container: `id` of `client|id`.
    pub fn last_name(&self) -> &'static str {
        self.name.rsplit('|').next().unwrap_or(self.name)
    }

    /// Whether that many arguments, name included, are right in number.
    #[inline]
    pub fn accepts(&self, args: usize) -> bool {
        if self.arity >= 0 { args == self.arity as usize } else { args >= -self.arity as usize }
    }

    /// Indices of the keys among `args` arguments.
    #[inline]
    pub fn keys(&self, args: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let last = if self.last_key < 0 {
            (args as isize + self.last_key as isize).max(0) as usize
        } else {
            (self.last_key as usize).min(args.saturating_sub(1))
        };
        let first = if self.first_key == 0 { last + 1 } else { self.first_key as usize };
        (first..last + 1).step_by(self.step.max(1) as usize)
    }
}

/// All commands without their subcommands, in the order of the table.
pub fn all() -> impl Iterator<Item = &'static Spec> {
    table::SPECS.iter().filter(|spec| !spec.name.contains('|'))
}

/// Rows of the table, subcommands included: ids are below this.
pub const fn count() -> usize {
    table::SPECS.len()
}

/// The row with that id.
#[inline]
pub fn by_id(id: CommandId) -> Option<&'static Spec> {
    table::SPECS.get(usize::from(id.0))
}

/// The command or subcommand that `args` (name first, not empty) call, the number of arguments checked.
///
/// # Errors
/// A [`Refusal`], to be sent as an error.
#[inline]
pub fn resolve(args: &[&[u8]]) -> Result<&'static Spec, Refusal> {
    let Some(mut spec) = lookup(args[0]) else { return Err(Refusal::unknown(args)) };
    if spec.is_container() && args.len() > 1 {
        match spec.subcommand(args[1]) {
            Some(sub) => spec = sub,
            None => return Err(Refusal::unknown_subcommand(spec, args[1])),
        }
    }
    if spec.accepts(args.len()) { Ok(spec) } else { Err(Refusal::arity(spec)) }
}

/// Why a request calls no command: the error text, in Redis's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    text: Box<str>,
    command: Option<CommandId>,
}

impl Refusal {
    /// The text with its prefix.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The command that was called wrongly; `None` when there is none of that name.
    pub fn command(&self) -> Option<CommandId> {
        self.command
    }

    fn nameless(text: String) -> Refusal {
        Refusal { text: text.into(), command: None }
    }

    /// Neither one of ours nor one of another type: names it and the beginning of its arguments.
    #[cold]
    fn unknown(args: &[&[u8]]) -> Refusal {
        const SHOWN: usize = 128;
        if let Some(name) = table::OTHER_TYPES.iter().find(|name| name.as_bytes().eq_ignore_ascii_case(args[0])) {
            return Refusal::nameless(format!(
                "ERR GridKV holds byte strings only; '{name}' works on another type and is not supported"
            ));
        }
        let mut shown = String::new();
        for arg in &args[1..] {
            if shown.len() >= SHOWN {
                break;
            }
            let room = SHOWN - shown.len();
            shown.push('\'');
            shown.push_str(&one_line(&arg[..arg.len().min(room)]));
            shown.push_str("' ");
        }
        let name = one_line(&args[0][..args[0].len().min(SHOWN)]);
        Refusal::nameless(format!("ERR unknown command '{name}', with args beginning with: {shown}"))
    }

    #[cold]
    fn unknown_subcommand(spec: &Spec, name: &[u8]) -> Refusal {
        let name = one_line(&name[..name.len().min(128)]);
        let container = spec.name.to_ascii_uppercase();
        Refusal::nameless(format!("ERR unknown subcommand '{name}'. Try {container} HELP."))
    }

    /// Of the wrong number of arguments for `spec`.
    #[cold]
    pub fn arity(spec: &Spec) -> Refusal {
        let text = format!("ERR wrong number of arguments for '{}' command", spec.name);
        Refusal { text: text.into(), command: Some(spec.id) }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refusal {}

/// What a client sent, fit for an error line.
fn one_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c == '\r' || c == '\n' { ' ' } else { c }).collect()
}
