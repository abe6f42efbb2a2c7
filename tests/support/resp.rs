//! A RESP client for tests: every byte that goes out can be chosen, every reply that comes in has a type.
//!
//! It is written apart from the server's decoder and encoder on purpose, so that a misreading of the
//! protocol there is not repeated here. It understands RESP2 and RESP3. What breaks the protocol panics.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::PATIENCE;

/// One reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Simple(String),
    /// The whole text, prefix included.
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Null,
    Array(Vec<Reply>),
    Map(Vec<(Reply, Reply)>),
    Set(Vec<Reply>),
    Push(Vec<Reply>),
    Double(f64),
    Boolean(bool),
    Verbatim(String),
}

impl Reply {
    pub fn ok() -> Reply {
        Reply::Simple("OK".into())
    }

    pub fn bulk(bytes: impl AsRef<[u8]>) -> Reply {
        Reply::Bulk(bytes.as_ref().to_vec())
    }

    pub fn is_error(&self) -> bool {
        matches!(self, Reply::Error(_))
    }

    /// The bytes of a text-like reply.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Reply::Bulk(bytes) => bytes,
            Reply::Simple(text) | Reply::Error(text) | Reply::Verbatim(text) => text.as_bytes(),
            other => panic!("expected text, got {other:?}"),
        }
    }

    /// The elements of an array.
    pub fn elements(&self) -> &[Reply] {
        match self {
            Reply::Array(elements) | Reply::Set(elements) | Reply::Push(elements) => elements,
            other => panic!("expected an array, got {other:?}"),
        }
    }

    pub fn integer(&self) -> i64 {
        match self {
            Reply::Integer(value) => *value,
            other => panic!("expected an integer, got {other:?}"),
        }
    }
}

/// The bytes of one command.
pub fn encode(words: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        let word = word.as_ref();
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// One connection.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)
            .unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
        stream.set_nodelay(true).expect("an option of a socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("an option of a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("an option of a socket");
        Client { stream: BufReader::new(stream) }
    }

    /// The socket itself, for tests that misbehave.
    pub fn socket(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).expect("the server takes what we send");
    }

    /// One command and its reply.
    pub fn call(&mut self, words: &[impl AsRef<[u8]>]) -> Reply {
        self.send_raw(&encode(words));
        self.receive()
    }

    /// Many commands at once, then all replies.
    pub fn pipeline(&mut self, commands: &[Vec<Vec<u8>>]) -> Vec<Reply> {
        let bytes: Vec<u8> = commands.iter().flat_map(|words| encode(words)).collect();
        self.send_raw(&bytes);
        commands.iter().map(|_| self.receive()).collect()
    }

    /// The next reply; panics when the connection ends first.
    pub fn receive(&mut self) -> Reply {
        self.try_receive().expect("a reply, and not the end of the connection")
    }

    /// The next reply, or nothing when the server has closed the connection.
    pub fn try_receive(&mut self) -> Option<Reply> {
        let line = self.line()?;
        let (kind, rest) = line.split_at(1);
        let length = || rest.parse::<i64>().unwrap_or_else(|_| panic!("no length in {line:?}"));
        Some(match kind {
            "+" => Reply::Simple(rest.into()),
            "-" => Reply::Error(rest.into()),
            ":" => Reply::Integer(rest.parse().unwrap_or_else(|_| panic!("no integer in {line:?}"))),
            "$" | "!" | "=" if length() < 0 => Reply::Null,
            "$" => Reply::Bulk(self.exactly(length() as usize)),
            "!" => Reply::Error(String::from_utf8(self.exactly(length() as usize)).expect("an error is text")),
            "=" => {
                let text = String::from_utf8(self.exactly(length() as usize)).expect("verbatim text is text");
                Reply::Verbatim(text[4..].into())
            }
            "*" if length() < 0 => Reply::Null,
            "*" => Reply::Array(self.many(length())),
            "~" => Reply::Set(self.many(length())),
            ">" => Reply::Push(self.many(length())),
            "%" => Reply::Map((0..length()).map(|_| (self.receive(), self.receive())).collect()),
            "_" => Reply::Null,
            "#" => Reply::Boolean(rest == "t"),
            "," => Reply::Double(match rest {
                "inf" => f64::INFINITY,
                "-inf" => f64::NEG_INFINITY,
                number => number.parse().unwrap_or_else(|_| panic!("no double in {line:?}")),
            }),
            "(" => Reply::Simple(rest.into()),
            _ => panic!("no RESP type starts like {line:?}"),
        })
    }

    /// Reads until the server closes; what came is returned.
    pub fn drain(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A reset is an end too: the server may close while unread bytes of ours are under way.
        let _ = self.stream.read_to_end(&mut bytes);
        bytes
    }

    fn many(&mut self, count: i64) -> Vec<Reply> {
        (0..count).map(|_| self.receive()).collect()
    }

    fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        match self.stream.read_until(b'\n', &mut line) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("no reply: {error}"),
        }
        assert!(line.ends_with(b"\r\n"), "a line of RESP ends with CR LF: {:?}", String::from_utf8_lossy(&line));
        line.truncate(line.len() - 2);
        Some(String::from_utf8(line).expect("a header line of RESP is text"))
    }

    fn exactly(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length + 2];
        self.stream.read_exact(&mut bytes).expect("the announced bytes");
        assert_eq!(&bytes[length..], b"\r\n", "a bulk string ends with CR LF");
        bytes.truncate(length);
        bytes
    }
}
