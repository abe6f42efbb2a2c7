//! What the fuzz targets share: how an input is read.
//!
//! ```text
//!   3 1 4 1 5 9\n          the schedule: read byte by byte, from its beginning again when it ends
//!   SET a 1\nGET a\n...    the rest: what the target is about
//! ```
//!
//! So seeds are text that people can write, and the fuzzer changes the schedule as it changes the rest.

/// Small numbers that an input chose.
#[derive(Debug)]
pub struct Schedule<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Cuts an input into its schedule and the rest.
pub fn split(input: &[u8]) -> (Schedule<'_>, &[u8]) {
    let end = input.iter().position(|&byte| byte == b'\n');
    let (bytes, rest) = end.map_or((input, &[][..]), |end| (&input[..end], &input[end + 1..]));
    (Schedule { bytes, at: 0 }, rest)
}

impl Schedule<'_> {
    /// The next number, below `end`, which is at most 256. Printable bytes give many of them too.
    pub fn below(&mut self, end: usize) -> usize {
        let Some(&byte) = self.bytes.get(self.at) else { return 0 };
        self.at = (self.at + 1) % self.bytes.len();
        usize::from(byte) % end
    }
}

/// Whether a command asks for a value that is large although its input is small: the targets leave those out, because
/// zeroing half a gigabyte finds nothing and takes all the time.
pub fn is_large(args: &[&[u8]]) -> bool {
    const MOST: i64 = 4096;
    let offset = match args {
        [name, _, offset, _] if name.eq_ignore_ascii_case(b"setrange") => offset,
        [name, _, offset, _] if name.eq_ignore_ascii_case(b"setbit") => offset,
        _ => return false,
    };
    gridkv_engine::command::number::parse_i64(offset).is_some_and(|offset| offset > MOST)
}
