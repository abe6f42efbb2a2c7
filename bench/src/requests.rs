//! Requests as bytes, made from templates: what is the same in every request is copied, only key and value are written.
//!
//! ```text
//!   RESP        *2\r\n$3\r\nGET\r\n$16\r\n│key│\r\n         *3\r\n$3\r\nSET\r\n$16\r\n│key│\r\n$64\r\n│value│\r\n
//!   memcached   get │key│\r\n                               set │key│ 0 0 64\r\n│value│\r\n
//! ```
//!
//! When all keys have one length the part before the key holds it; otherwise lengths are written each time.

use std::fmt;
use std::str::FromStr;

use crate::data::{Keys, Values};

/// What the server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Resp,
    /// The text protocol of memcached, get, set and delete only.
    Memcached,
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Protocol, String> {
        match text {
            "resp" => Ok(Protocol::Resp),
            "memcached" => Ok(Protocol::Memcached),
            _ => Err("expected resp or memcached".into()),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Resp => "resp",
            Protocol::Memcached => "memcached",
        })
    }
}

/// Writes requests of one load.
#[derive(Clone, Debug)]
pub(crate) struct Requests {
    protocol: Protocol,
    keys: Keys,
    values: Values,
    get: Verb,
    set: Verb,
    del: Verb,
    /// What stands between key and value of a SET, if all values have one length.
    before_value: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
struct Verb {
    /// What precedes the length of the key.
    start: &'static [u8],
    /// What precedes the key itself, its length included, if all keys have one.
    before_key: Option<Vec<u8>>,
}

impl Verb {
    fn new(protocol: Protocol, start: &'static [u8], keys: &Keys) -> Verb {
        let before_key = keys.fixed_len().map(|len| {
            let mut bytes = start.to_vec();
            if protocol == Protocol::Resp {
                push_length(&mut bytes, len);
            }
            bytes
        });
        Verb { start, before_key }
    }
}

impl Requests {
    pub(crate) fn new(protocol: Protocol, keys: Keys, values: Values) -> Requests {
        let (get, set, del): (&[u8], &[u8], &[u8]) = match protocol {
            Protocol::Resp => (b"*2\r\n$3\r\nGET\r\n", b"*3\r\n$3\r\nSET\r\n", b"*2\r\n$3\r\nDEL\r\n"),
            Protocol::Memcached => (b"get ", b"set ", b"delete "),
        };
        let before_value = values.fixed_len().map(|len| {
            let mut bytes = Vec::new();
            push_before_value(protocol, &mut bytes, len);
            bytes
        });
        Requests {
            get: Verb::new(protocol, get, &keys),
            set: Verb::new(protocol, set, &keys),
            del: Verb::new(protocol, del, &keys),
            protocol,
            keys,
            values,
            before_value,
        }
    }

    #[inline]
    pub(crate) fn get(&self, key: u64, out: &mut Vec<u8>) {
        self.push_key(&self.get, key, out);
        out.extend_from_slice(b"\r\n");
    }

    #[inline]
    pub(crate) fn del(&self, key: u64, out: &mut Vec<u8>) {
        self.push_key(&self.del, key, out);
        out.extend_from_slice(b"\r\n");
    }

    #[inline]
    pub(crate) fn set(&self, key: u64, out: &mut Vec<u8>) {
        self.push_key(&self.set, key, out);
        let value = self.values.of(key);
        match &self.before_value {
            Some(bytes) => out.extend_from_slice(bytes),
            None => push_before_value(self.protocol, out, value.len()),
        }
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }

    /// The value that a GET of `key` must return.
    #[inline]
    pub(crate) fn expected(&self, key: u64) -> &[u8] {
        self.values.of(key)
    }

    #[inline]
    fn push_key(&self, verb: &Verb, key: u64, out: &mut Vec<u8>) {
        let len = self.keys.len(key);
        match &verb.before_key {
            Some(bytes) => out.extend_from_slice(bytes),
            None => {
                out.extend_from_slice(verb.start);
                if self.protocol == Protocol::Resp {
                    push_length(out, len);
                }
            }
        }
        let at = out.len();
        if len == 16 {
            out.extend_from_slice(&[0; 16]);
        } else {
            out.resize(at + len, 0);
        }
        self.keys.write(key, &mut out[at..]);
    }
}

fn push_length(out: &mut Vec<u8>, len: usize) {
    out.push(b'$');
    out.extend_from_slice(itoa::Buffer::new().format(len).as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn push_before_value(protocol: Protocol, out: &mut Vec<u8>, len: usize) {
    match protocol {
        Protocol::Resp => {
            out.extend_from_slice(b"\r\n");
            push_length(out, len);
        }
        Protocol::Memcached => {
            out.extend_from_slice(b" 0 0 ");
            out.extend_from_slice(itoa::Buffer::new().format(len).as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// A command of any words, in RESP.
pub(crate) fn command(words: &[&[u8]], out: &mut Vec<u8>) {
    out.push(b'*');
    out.extend_from_slice(itoa::Buffer::new().format(words.len()).as_bytes());
    out.extend_from_slice(b"\r\n");
    for word in words {
        push_length(out, word.len());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(protocol: Protocol, keys: &str, values: &str, write: impl Fn(&Requests, &mut Vec<u8>)) -> String {
        let keys = Keys::new(keys.parse().unwrap(), 1000).unwrap();
        let requests = Requests::new(protocol, keys, Values::new(values.parse().unwrap()));
        let mut out = Vec::new();
        write(&requests, &mut out);
        let value = String::from_utf8(requests.expected(7).to_vec()).unwrap();
        String::from_utf8(out).unwrap().replace(&value, "VALUE")
    }

    #[test]
    fn requests_of_each_protocol() {
        use Protocol::{Memcached, Resp};
        let get = written(Resp, "16", "64", |r, out| r.get(7, out));
        assert_eq!(get, "*2\r\n$3\r\nGET\r\n$16\r\nkey:000000000007\r\n");
        let set = written(Resp, "8", "64", |r, out| r.set(7, out));
        assert_eq!(set, "*3\r\n$3\r\nSET\r\n$8\r\n00000007\r\n$64\r\nVALUE\r\n");
        assert_eq!(written(Resp, "4", "64", |r, out| r.del(7, out)), "*2\r\n$3\r\nDEL\r\n$4\r\n0007\r\n");
        assert_eq!(written(Memcached, "4", "64", |r, out| r.get(7, out)), "get 0007\r\n");
        assert_eq!(written(Memcached, "4", "64", |r, out| r.set(7, out)), "set 0007 0 0 64\r\nVALUE\r\n");
    }

    #[test]
    fn lengths_that_vary_are_written_each_time() {
        let keys = Keys::new("8-30".parse().unwrap(), 1000).unwrap();
        let values = Values::new("5-300".parse().unwrap());
        let requests = Requests::new(Protocol::Resp, keys.clone(), values.clone());
        for key in 0..200 {
            let mut out = Vec::new();
            requests.set(key, &mut out);
            let mut text = vec![0; keys.len(key)];
            keys.write(key, &mut text);
            let mut expected = Vec::new();
            command(&[b"SET", &text, values.of(key)], &mut expected);
            assert_eq!(out, expected);
        }
    }
}
