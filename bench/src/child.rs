//! Servers that are started to be measured: found, given a port and cores, waited for, and ended whatever happens.
//!
//! - A server inherits the cores of the thread that starts it, its own threads included.
//! - It is ready when it answers a first command, not when it accepts a connection.
//! - It ends when its [`Server`] is dropped. If this process is killed outright, the kernel ends it (`setpriv
//!   --pdeathsig`, where that tool is installed).
//! - What it says goes to a file that has no name any more; the last lines are shown when it fails.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::interrupt;
use crate::pin;
use crate::requests::Protocol;

/// How long a server may take until it answers, how long one question may take, and how often it is asked.
const START_PATIENCE: Duration = Duration::from_secs(15);
const ASK_PATIENCE: Duration = Duration::from_millis(500);
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How much of what a failed server said is shown.
const TAIL: u64 = 2000;

/// How to start a server. `{port}`, `{port2}` and `{cores}` in the arguments are filled in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Recipe {
    /// What it is called in tables.
    pub(crate) name: String,
    pub(crate) protocol: Protocol,
    program: PathBuf,
    args: Vec<String>,
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

impl Recipe {
    /// Our node: the program given, or the one beside this program.
    pub(crate) fn ours(node: Option<&Path>) -> Result<Recipe, Failure> {
        let program = ours(node)?;
        let args =
            "--listen 127.0.0.1:{port} --http 127.0.0.1:{port2} --peer-listen none --cores @{cores} --log-level warn";
        Ok(Recipe { name: "gridkv".into(), protocol: Protocol::Resp, program, args: words(args) })
    }

    /// Another server by its name, or by its command line, which must hold `{port}`.
    pub(crate) fn other(word: &str, threads: usize) -> Result<Recipe, Failure> {
        match word {
            "redis" => {
                let mut args = words("--port {port} --bind 127.0.0.1 --appendonly no --protected-mode no --save");
                args.push(String::new());
                Ok(Recipe { name: word.into(), protocol: Protocol::Resp, program: find("redis-server")?, args })
            }
            "memcached" => {
                let mut args = words("-l 127.0.0.1 -p {port} -U 0 -m 8192 -c 4096 -t");
                args.push(threads.to_string());
                if rustix::process::getuid().is_root() {
                    // It refuses to run as root unless told so.
                    args.extend(words("-u root"));
                }
                Ok(Recipe { name: word.into(), protocol: Protocol::Memcached, program: find("memcached")?, args })
            }
            "echo" => {
                let program = env::current_exe().map_err(Failure::io("finding this program"))?;
                let args = words("echo --listen 127.0.0.1:{port}");
                Ok(Recipe { name: word.into(), protocol: Protocol::Resp, program, args })
            }
            command => {
                let mut args = shell_words(command).map_err(Failure::Usage)?;
                if !command.contains("{port}") {
                    return Err(Failure::Usage(format!(
                        "'{command}' is none of redis, memcached, echo; a command line must say where {{port}} goes"
                    )));
                }
                let program = find(&args.remove(0))?;
                let name = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                Ok(Recipe { name, protocol: Protocol::Resp, program, args })
            }
        }
    }

    fn filled(&self, port: u16, port2: u16, cores: &[usize]) -> Vec<String> {
        let cores = cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let fill = |arg: &String| {
            arg.replace("{port}", &port.to_string()).replace("{port2}", &port2.to_string()).replace("{cores}", &cores)
        };
        self.args.iter().map(fill).collect()
    }
}

/// Splits a list at commas outside of quotes.
pub(crate) fn split_list(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut quote = None;
    for c in text.chars() {
        match (c, quote) {
            (',', None) => parts.push(String::new()),
            (c, _) => {
                match quote {
                    Some(open) if open == c => quote = None,
                    None if c == '\'' || c == '"' => quote = Some(c),
                    _ => {}
                }
                parts.last_mut().expect("never empty").push(c);
            }
        }
    }
    parts.into_iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

/// Splits a command line at spaces outside of quotes; the quotes go. An empty word can be written as `''`.
fn shell_words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in text.chars() {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(format!("a quote in '{text}' has no end"));
    }
    words.extend(word);
    if words.is_empty() { Err("a command line without a command".into()) } else { Ok(words) }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Our node's program: the one given, or the one beside this program.
pub(crate) fn ours(node: Option<&Path>) -> Result<PathBuf, Failure> {
    let beside = || Some(env::current_exe().ok()?.with_file_name("gridkv-node"));
    let program = node.map(Path::to_path_buf).or_else(beside).unwrap_or_default();
    if is_program(&program) {
        return Ok(program);
    }
    let what =
        "there is no such program; build it with `cargo build --release -p gridkv-node`, or name it with --node PATH";
    Err(Failure::Program { program: program.display().to_string(), what: what.into() })
}

/// A program by its path, or by its name in PATH.
pub(crate) fn find(name: &str) -> Result<PathBuf, Failure> {
    let candidates: Vec<PathBuf> = match name.contains('/') {
        true => vec![name.into()],
        false => env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|folder| folder.join(name)).collect(),
    };
    candidates.into_iter().find(|path| is_program(path)).ok_or_else(|| Failure::Program {
        program: name.into(),
        what: "not found in PATH; install it, or leave it out of --against".into(),
    })
}

/// A port that nobody listened on a moment ago.
fn free_port() -> Result<u16, Failure> {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    bound.map(|addr| addr.port()).map_err(Failure::io("looking for a free port"))
}

/// A server that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    child: Child,
    said: File,
    name: String,
}

impl Server {
    /// Starts it on `cores`; returns when it answers.
    pub(crate) fn start(recipe: &Recipe, cores: &[usize]) -> Result<Server, Failure> {
        let (port, port2) = (free_port()?, free_port()?);
        let said = unnamed_file().map_err(Failure::io("making a file for what a server says"))?;
        let copy = || said.try_clone().map_err(Failure::io("sharing a server's file"));
        let mut command = match find("setpriv") {
            Ok(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL", "--"]).arg(&recipe.program);
                command
            }
            Err(_) => Command::new(&recipe.program),
        };
        command.args(recipe.filled(port, port2, cores)).current_dir(env::temp_dir());
        // A process group of its own: the terminal's Ctrl-C is for us, who end the server after we have told what it did.
        command.stdin(Stdio::null()).stdout(copy()?).stderr(copy()?).process_group(0);
        let child = pin::while_on(cores, || command.spawn())?.map_err(|error| Failure::Program {
            program: recipe.program.display().to_string(),
            what: error.to_string(),
        })?;
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut server = Server { addr, child, said, name: recipe.name.clone() };
        server.wait_until_it_answers(recipe.protocol)?;
        Ok(server)
    }

    fn wait_until_it_answers(&mut self, protocol: Protocol) -> Result<(), Failure> {
        let start = Instant::now();
        loop {
            if answers(self.addr, protocol) {
                return Ok(());
            }
            let failed = |what: String| Failure::Program { program: self.name.clone(), what };
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(failed(format!("ended at once ({status}){}", self.tail())));
            }
            if start.elapsed() > START_PATIENCE {
                let seconds = START_PATIENCE.as_secs();
                return Err(failed(format!("did not answer within {seconds} s{}", self.tail())));
            }
            if interrupt::requested() {
                return Err(failed("interrupted while it started".into()));
            }
            std::thread::sleep(ASK_EVERY);
        }
    }

    /// The last that it said.
    fn tail(&self) -> String {
        let mut said = &self.said;
        let read = |said: &mut &File| {
            let len = said.seek(SeekFrom::End(0))?;
            said.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
            let mut bytes = Vec::new();
            said.read_to_end(&mut bytes)?;
            io::Result::Ok(bytes)
        };
        match read(&mut said) {
            Ok(bytes) if !bytes.is_empty() => format!(":\n{}", String::from_utf8_lossy(&bytes).trim_end()),
            _ => String::new(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already; there is nobody left to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file that no folder lists.
fn unnamed_file() -> io::Result<File> {
    let mut number = 0;
    loop {
        let path = env::temp_dir().join(format!("gridkv-bench-{}-{number}", std::process::id()));
        match File::options().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => {
                fs::remove_file(path)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Whether a first command is answered, and not with "still loading".
fn answers(addr: SocketAddr, protocol: Protocol) -> bool {
    let question: &[u8] = match protocol {
        Protocol::Resp => b"*1\r\n$4\r\nPING\r\n",
        Protocol::Memcached => b"version\r\n",
    };
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&addr, ASK_PATIENCE)?;
        stream.set_read_timeout(Some(ASK_PATIENCE))?;
        stream.write_all(question)?;
        let mut answer = [0; 64];
        let len = stream.read(&mut answer)?;
        io::Result::Ok(len > 0 && !answer.starts_with(b"-LOADING"))
    };
    ask().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_command_lines_are_split() {
        assert_eq!(split_list("redis, echo,'a,b c' ,"), ["redis", "echo", "'a,b c'"]);
        assert_eq!(shell_words(r#"a  'b c' "" d"e f""#).unwrap(), ["a", "b c", "", "de f"]);
        assert!(shell_words("a 'b").is_err() && shell_words("  ").is_err());
    }

    #[test]
    fn a_recipe_gets_its_ports_and_cores() {
        let recipe = Recipe::other("/bin/sh -c 'listen {port} {port2} {cores}' ''", 1).unwrap();
        assert_eq!((recipe.name.as_str(), recipe.protocol), ("sh", Protocol::Resp));
        assert_eq!(recipe.filled(1, 2, &[3, 4]), ["-c", "listen 1 2 3,4", ""]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let text = |result: Result<Recipe, Failure>| result.unwrap_err().to_string();
        assert!(
            text(Recipe::ours(Some(Path::new("/nowhere/node")))).contains("/nowhere/node: there is no such program")
        );
        assert!(text(Recipe::other("no-such-server {port}", 1)).starts_with("no-such-server: not found in PATH"));
        assert!(text(Recipe::other("reids", 1)).contains("none of redis, memcached, echo"));
    }

    #[test]
    fn a_server_that_ends_at_once_is_quoted() {
        let recipe = Recipe::other("sh -c 'echo no luck with {port} >&2; exit 3'", 1).unwrap();
        let text = pin_free(&recipe).unwrap_err().to_string();
        assert!(text.contains("ended at once (exit status: 3)") && text.contains("no luck with"), "{text}");
    }

    /// Starts it on whatever cores this thread may use.
    fn pin_free(recipe: &Recipe) -> Result<Server, Failure> {
        Server::start(recipe, &pin::allowed().unwrap())
    }
}
