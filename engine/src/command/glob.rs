//! Patterns of `KEYS`, `SCAN … MATCH`, `CONFIG GET` and `COMMAND LIST`: Redis's, byte by byte.
//!
//! `*` any bytes, `?` one byte, `[a-c]` one of a set (`[^…]` one not of it), `\x` the byte x itself. What is malformed
//! matches as in Redis: a set that is never closed ends with the pattern, a last `\` stands for itself. Unlike there, `**`
//! matches the empty text, as `*` does.
//!
//! Each piece but `*` takes exactly one byte, so after a mismatch only the latest `*` can be given one byte more; that
//! bounds the work by the product of the lengths, whatever the pattern.

/// Whether all of `text` matches.
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut pos) = (0, 0);
    // The piece behind the latest `*`, and where in the text it was tried last.
    let mut retry = None;
    loop {
        if pattern.get(at) == Some(&b'*') {
            at += 1;
            if at == pattern.len() {
                return true;
            }
            retry = Some((at, pos));
            continue;
        }
        if pos == text.len() {
            // More text cannot come: giving a `*` more would only leave less.
            return at == pattern.len();
        }
        if at < pattern.len()
            && let Some(next) = piece(pattern, at, text[pos])
        {
            at = next;
            pos += 1;
            continue;
        }
        let Some((behind, tried)) = retry else { return false };
        (at, pos) = (behind, tried + 1);
        retry = Some((behind, pos));
    }
}

/// Matches one byte with the piece that begins at `at`; where the next piece begins.
#[inline]
fn piece(pattern: &[u8], at: usize, byte: u8) -> Option<usize> {
    match pattern[at] {
        b'?' => Some(at + 1),
        b'[' => {
            let (found, next) = set(pattern, at + 1, byte);
            found.then_some(next)
        }
        b'\\' if at + 1 < pattern.len() => (pattern[at + 1] == byte).then_some(at + 2),
        own => (own == byte).then_some(at + 1),
    }
}

/// Whether the set that begins at `at`, behind its bracket, has the byte; where the set ends.
fn set(pattern: &[u8], mut at: usize, byte: u8) -> (bool, usize) {
    let negated = pattern.get(at) == Some(&b'^');
    at += usize::from(negated);
    let mut found = false;
    loop {
        match pattern[at..] {
            [] => break,
            [b'\\', own, ..] => {
                found |= own == byte;
                at += 2;
            }
            [b']', ..] => {
                at += 1;
                break;
            }
            [a, b'-', b, ..] => {
                found |= (a.min(b)..=a.max(b)).contains(&byte);
                at += 3;
            }
            [own, ..] => {
                found |= own == byte;
                at += 1;
            }
        }
    }
    (found != negated, at)
}

/// The bytes that every match begins with, as far as they can be read off; the whole pattern if it has nothing special.
pub fn literal_prefix(pattern: &[u8]) -> &[u8] {
    let len = pattern.iter().position(|byte| b"*?[\\".contains(byte)).unwrap_or(pattern.len());
    &pattern[..len]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match_as_in_redis() {
        let yes: [(&str, &str); 25] = [
            ("", ""),
            ("*", ""),
            ("**", ""),
            ("*", "anything"),
            ("a*", "a"),
            ("h?llo", "hallo"),
            ("h*llo", "heeeello"),
            ("h[ae]llo", "hello"),
            ("h[^e]llo", "hallo"),
            ("h[a-b]llo", "hbllo"),
            ("h[b-a]llo", "hallo"),
            ("[a-]", "a"),
            ("[a-]", "]"),
            ("[a-]", "^"),
            ("[\\]]", "]"),
            ("[\\-a]", "-"),
            ("[ab", "b"),
            ("[^", "x"),
            ("\\*", "*"),
            ("a\\", "a\\"),
            ("**a**", "ba"),
            ("*ab*ab*", "xabyabz"),
            ("*?", "ab"),
            ("*[0-9]x", "a1x"),
            ("a*b", "ab"),
        ];
        for (pattern, text) in yes {
            assert!(matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
        let no: [(&str, &str); 14] = [
            ("", "a"),
            ("a", ""),
            ("?", ""),
            ("*?", ""),
            ("h?llo", "hllo"),
            ("h[^e]llo", "hello"),
            ("[]a]", "a"),
            ("[", "["),
            ("[ab", "["),
            ("\\a", "\\a"),
            ("A", "a"),
            ("*ab", "abc"),
            ("a*b*c", "abab"),
            ("*a?", "ba"),
        ];
        for (pattern, text) in no {
            assert!(!matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
    }

    #[test]
    fn many_stars_stay_cheap() {
        let pattern = b"a*".repeat(500);
        let pattern = [&pattern[..], b"b"].concat();
        assert!(!matches(&pattern, &b"a".repeat(5_000)));
    }

    #[test]
    fn the_prefix_ends_at_the_first_special_byte() {
        for (pattern, prefix) in
            [("", ""), ("user:*", "user:"), ("a?b", "a"), ("x[12]", "x"), ("q\\*", "q"), ("k", "k")]
        {
            assert_eq!(literal_prefix(pattern.as_bytes()), prefix.as_bytes());
        }
    }

    /// Tries everything a `*` may take.
    fn naive(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern.first(), text.first()) {
            (None, None) => true,
            (Some(b'*'), _) => (0..=text.len()).any(|taken| naive(&pattern[1..], &text[taken..])),
            (Some(_), Some(&byte)) => piece(pattern, 0, byte).is_some_and(|next| naive(&pattern[next..], &text[1..])),
            _ => false,
        }
    }

    fn bytes_of(alphabet: &'static [u8], up_to: usize) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(proptest::sample::select(alphabet), 0..up_to)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 2000 }))]

        #[test]
        fn backtracking_to_the_latest_star_finds_what_trying_everything_finds(
            pattern in bytes_of(b"ab**?[]^-\\c", 12),
            text in bytes_of(b"abc]-^", 12),
        ) {
            prop_assert_eq!(matches(&pattern, &text), naive(&pattern, &text));
            if matches(&pattern, &text) {
                prop_assert!(text.starts_with(literal_prefix(&pattern)));
            }
        }
    }
}
