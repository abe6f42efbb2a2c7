//! One connection of a client that waits for each reply: small, blocking, with a deadline for everything.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::replies::{Replies, Reply};
use crate::requests::Protocol;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_millis(500);

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// OK, or anything else that is none of the others.
    Done,
    Number(i64),
    Value(Vec<u8>),
    Nothing,
    Error(String),
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Link {
    stream: TcpStream,
    replies: Replies,
    request: Vec<u8>,
}

impl Link {
    /// Connects; each reply may take `patience`.
    pub(crate) fn connect(addr: SocketAddr, patience: Duration) -> io::Result<Link> {
        let stream = TcpStream::connect_timeout(&addr, CONNECT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Link { stream, replies: Replies::new(Protocol::Resp, true), request: Vec::new() })
    }

    /// Sends a command and waits for its reply. After an error the connection is of no more use.
    pub(crate) fn call(&mut self, words: &[&[u8]]) -> io::Result<Answer> {
        self.send(words)?;
        let mut bytes = [0; 16 << 10];
        let mut answer = None;
        while answer.is_none() {
            let len = self.stream.read(&mut bytes)?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut take = |reply: Reply<'_>| {
                answer = Some(match reply {
                    Reply::Simple | Reply::Aggregate | Reply::Scalar => Answer::Done,
                    Reply::Integer(digits) => match std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok())
                    {
                        Some(number) => Answer::Number(number),
                        None => Answer::Done,
                    },
                    Reply::Bulk(body) => Answer::Value(body.to_vec()),
                    Reply::Nil => Answer::Nothing,
                    Reply::Error(text) => Answer::Error(String::from_utf8_lossy(text).into_owned()),
                });
            };
            self.replies.feed(&bytes[..len], &mut take).map_err(|malformed| io::Error::other(malformed.0))?;
        }
        Ok(answer.expect("the loop ends with one"))
    }

    /// Sends a command that answers with an array, and returns how many elements it has. The connection ends with it.
    pub(crate) fn count(mut self, words: &[&[u8]]) -> io::Result<u64> {
        self.send(words)?;
        let mut line = String::new();
        BufReader::new(self.stream).read_line(&mut line)?;
        let count = line.trim_end().strip_prefix('*').and_then(|count| count.parse().ok());
        count.ok_or_else(|| io::Error::other(line))
    }

    fn send(&mut self, words: &[&[u8]]) -> io::Result<()> {
        self.request.clear();
        write!(self.request, "*{}\r\n", words.len())?;
        for word in words {
            write!(self.request, "${}\r\n", word.len())?;
            self.request.extend_from_slice(word);
            self.request.extend_from_slice(b"\r\n");
        }
        self.stream.write_all(&self.request)
    }
}
