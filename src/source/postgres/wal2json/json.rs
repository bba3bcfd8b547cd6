//! A cursor over JSON that keeps what the server wrote: numbers as their digits, and text as bytes,
//! because the plugin copies the content of a logical message, which may be any bytes, into it.

use std::borrow::Cow;

use crate::error::{Error, Result};

/// Values inside one another; the plugin writes four.
const DEPTH_MAX: u32 = 32;

/// A value that holds no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scalar<'a> {
    Null,
    Bool(bool),
    /// The digits as they stand.
    Number(&'a [u8]),
    Text(Cow<'a, [u8]>),
}

/// What is left of the input.
#[derive(Clone, Debug)]
pub(super) struct Json<'a> {
    rest: &'a [u8],
    depth: u32,
}

impl<'a> Json<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, depth: 0 }
    }

    /// Visits the members of an object; `visit` takes the value of each.
    pub(super) fn object(
        &mut self,
        mut visit: impl FnMut(&str, &mut Self) -> Result<()>,
    ) -> Result<()> {
        self.expect(b'{')?;
        self.deepen()?;
        if !self.skip_byte(b'}') {
            loop {
                let name = self.string()?;
                self.expect(b':')?;
                // No name that is looked for has other characters.
                visit(std::str::from_utf8(&name).unwrap_or_default(), self)?;
                if !self.skip_byte(b',') {
                    break;
                }
            }
            self.expect(b'}')?;
        }
        self.depth -= 1;
        Ok(())
    }

    /// Visits the elements of an array; `visit` takes each.
    pub(super) fn array(&mut self, mut visit: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        self.expect(b'[')?;
        self.deepen()?;
        if !self.skip_byte(b']') {
            loop {
                visit(self)?;
                if !self.skip_byte(b',') {
                    break;
                }
            }
            self.expect(b']')?;
        }
        self.depth -= 1;
        Ok(())
    }

    /// The next value, which must hold no other.
    pub(super) fn scalar(&mut self) -> Result<Scalar<'a>> {
        match self.peek() {
            Some(b'"') => Ok(Scalar::Text(self.string()?)),
            Some(b'n') => self.word(b"null", Scalar::Null),
            Some(b't') => self.word(b"true", Scalar::Bool(true)),
            Some(b'f') => self.word(b"false", Scalar::Bool(false)),
            Some(b'-' | b'0'..=b'9') => Ok(Scalar::Number(self.number())),
            _ => Err(self.broken("a value")),
        }
    }

    /// A text of characters.
    pub(super) fn text(&mut self) -> Result<Cow<'a, str>> {
        let text = match self.string()? {
            Cow::Borrowed(bytes) => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
            Cow::Owned(bytes) => String::from_utf8(bytes).ok().map(Cow::Owned),
        };
        text.ok_or_else(|| Error::data("a name in a line of wal2json is not UTF-8"))
    }

    /// Passes over the next value.
    pub(super) fn skip(&mut self) -> Result<()> {
        match self.peek() {
            Some(b'{') => self.object(|_, input| input.skip()),
            Some(b'[') => self.array(Self::skip),
            _ => self.scalar().map(|_| ()),
        }
    }

    /// That nothing is left.
    pub(super) fn end(&mut self) -> Result<()> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.broken("the end")),
        }
    }

    /// The next byte that is no white space, which stays.
    pub(super) fn peek(&mut self) -> Option<u8> {
        let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        while let Some((first, rest)) = self.rest.split_first() {
            if !blank(first) {
                return Some(*first);
            }
            self.rest = rest;
        }
        None
    }

    fn deepen(&mut self) -> Result<()> {
        self.depth += 1;
        match self.depth <= DEPTH_MAX {
            true => Ok(()),
            false => Err(self.broken("less depth")),
        }
    }

    fn skip_byte(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        if found {
            self.advance(1);
        }
        found
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        match self.skip_byte(byte) {
            true => Ok(()),
            false => Err(self.broken(&format!("`{}`", byte.escape_ascii()))),
        }
    }

    fn advance(&mut self, count: usize) {
        self.rest = self.rest.get(count..).unwrap_or_default();
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at_checked(count).unwrap_or((self.rest, &[]));
        self.rest = rest;
        taken
    }

    fn word(&mut self, word: &[u8], value: Scalar<'a>) -> Result<Scalar<'a>> {
        match self.rest.starts_with(word) {
            true => {
                self.advance(word.len());
                Ok(value)
            }
            false => Err(self.broken("a value")),
        }
    }

    fn number(&mut self) -> &'a [u8] {
        let digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
        let length = self.rest.iter().position(|byte| !digit(byte)).unwrap_or(self.rest.len());
        self.take(length)
    }

    fn string(&mut self) -> Result<Cow<'a, [u8]>> {
        self.expect(b'"')?;
        let mut whole: Vec<u8> = Vec::new();
        loop {
            let found = memchr::memchr2(b'"', b'\\', self.rest);
            let part = self.take(found.ok_or_else(|| self.broken("the end of a text"))?);
            let quote = self.rest.first() == Some(&b'"');
            self.advance(1);
            match quote {
                true if whole.is_empty() => return Ok(Cow::Borrowed(part)),
                true => {
                    whole.extend_from_slice(part);
                    return Ok(Cow::Owned(whole));
                }
                false => {
                    whole.extend_from_slice(part);
                    self.escape(&mut whole)?;
                }
            }
        }
    }

    /// What stands behind a backslash.
    fn escape(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let byte = match self.take(1).first() {
            Some(byte @ (b'"' | b'\\' | b'/')) => *byte,
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'u') => {
                let character = self.character()?;
                out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(self.broken("an escape")),
        };
        out.push(byte);
        Ok(())
    }

    fn character(&mut self) -> Result<char> {
        let first = self.unit()?;
        let code = match first {
            0xD800..=0xDBFF => {
                let second = match self.take(2) {
                    b"\\u" => self.unit()?,
                    _ => 0,
                };
                match second {
                    0xDC00..=0xDFFF => 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00),
                    _ => return Err(self.broken("the second half of a character")),
                }
            }
            code => code,
        };
        char::from_u32(code).ok_or_else(|| self.broken("a character"))
    }

    fn unit(&mut self) -> Result<u32> {
        let digits = self.take(4);
        let text = std::str::from_utf8(digits).ok().filter(|text| text.len() == 4);
        text.filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .and_then(|text| u32::from_str_radix(text, 16).ok())
            .ok_or_else(|| self.broken("four hexadecimal digits"))
    }

    /// Says how much is left, but nothing of what it is: it may be anybody's data.
    fn broken(&self, wanted: &str) -> Error {
        let left = self.rest.len();
        Error::data(format!("a line of wal2json lacks {wanted}, {left} bytes before its end"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scalar(text: &str) -> Result<Scalar<'_>> {
        let mut input = Json::new(text.as_bytes());
        let value = input.scalar()?;
        input.end().map(|()| value)
    }

    #[test]
    fn numbers_keep_their_digits() {
        for digits in ["0", "-0", "1.500", "9007199254740993", "1e-45", "-1.7976931348623157e+308"]
        {
            assert_eq!(scalar(digits).unwrap(), Scalar::Number(digits.as_bytes()));
        }
    }

    #[test]
    fn escapes_are_undone_and_other_bytes_stay() {
        let text = scalar(r#""a\"\\\/\b\f\n\r\t\u00e9\ud83d\ude42""#).unwrap();
        assert_eq!(text, Scalar::Text("a\"\\/\u{8}\u{c}\n\r\té🙂".as_bytes().into()));
        let mut input = Json::new(b"\"\xff\x00\"");
        assert_eq!(input.scalar().unwrap(), Scalar::Text(b"\xff\x00".as_slice().into()));
        for broken in [r#""\ud83d""#, r#""\u12g4""#, r#""\x""#, r#"""#, "nul", "", "[1]"] {
            assert!(scalar(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn a_deep_value_is_refused_before_the_stack_ends() {
        let deep = "[".repeat(1_000_000);
        assert!(Json::new(deep.as_bytes()).skip().is_err());
    }

    proptest! {
        #[test]
        fn any_text_comes_back_from_what_serde_writes(text in any::<String>()) {
            let written = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(scalar(&written).unwrap(), Scalar::Text(text.as_bytes().into()));
        }

        #[test]
        fn a_document_is_passed_over_to_its_end(depth in 0..9u32, text in any::<String>()) {
            let mut document = serde_json::json!(text);
            for level in 0..depth {
                document = serde_json::json!({ "a": [document, level, null, true], "b": {} });
            }
            let text = document.to_string();
            let mut input = Json::new(text.as_bytes());
            input.skip().unwrap();
            prop_assert!(input.end().is_ok());
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Json::new(&bytes).skip();
        }
    }
}
