//! The resume token: where a subscriber is, as text that means nothing to it.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use uuid::Uuid;

use super::{cut::Cut, cut::Flaw};
use crate::{
    change::{Lsn, Position},
    error::{Error, Result},
};

const VERSION: u8 = 1;

/// A place in the history of one source: version, lineage, position, offset and a checksum, as
/// base64url. It outlives the journal: the position still says where it was in the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The source's history that it counts in.
    pub lineage: Uuid,
    /// Where the source was.
    pub position: Position,
    /// The offset of the change that comes next.
    pub offset: u64,
}

impl Token {
    /// A token that resumes with the change at `offset`.
    pub fn new(lineage: Uuid, position: Position, offset: u64) -> Self {
        Self { lineage, position, offset }
    }

    /// Reads a token; one that is malformed is an error of class `Data`.
    pub fn parse(text: &str) -> Result<Self> {
        let malformed = || {
            Error::data(format!("`{text}` is not a resume token"))
                .remedy("use a token exactly as it was given, or start without one")
        };
        let bytes = URL_SAFE_NO_PAD.decode(text.trim()).map_err(|_| malformed())?;
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or_else(malformed)?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(malformed());
        }
        match body.first() {
            Some(&VERSION) => read(body).map_err(|_| malformed()),
            _ => Err(Error::data(format!("resume token `{text}` is of a newer walrace"))),
        }
    }
}

fn read(body: &[u8]) -> Result<Token, Flaw> {
    let mut cut = Cut(body);
    cut.u8()?;
    let lineage = Uuid::from_bytes(cut.array()?);
    let position = Position { timeline: cut.u32()?, lsn: Lsn(cut.u64()?), index: cut.u32()? };
    let offset = cut.u64()?;
    if cut.is_empty() { Ok(Token { lineage, position, offset }) } else { Err("too long".into()) }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(self.lineage.as_bytes());
        bytes.extend_from_slice(&self.position.timeline.to_le_bytes());
        bytes.extend_from_slice(&self.position.lsn.0.to_le_bytes());
        bytes.extend_from_slice(&self.position.index.to_le_bytes());
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        f.write_str(&URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Token {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;

    fn token() -> Token {
        let position = Position { timeline: 2, lsn: Lsn(0x16_B374_D848), index: 7 };
        Token::new(Uuid::from_u128(0x1234), position, 42)
    }

    #[test]
    fn a_token_comes_back_as_it_was_given() {
        let text = token().to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token());
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
    }

    #[test]
    fn the_text_of_version_1_stays_readable() {
        let text = "AQAAAAAAAAAAAAAAAAAAEjQCAAAASNh0sxYAAAAHAAAAKgAAAAAAAABHh1Gj";
        assert_eq!(token().to_string(), text);
    }

    #[test]
    fn every_altered_letter_is_noticed() {
        let text = token().to_string();
        for place in 0..text.len() {
            let mut altered = text.clone().into_bytes();
            altered[place] = if altered[place] == b'A' { b'B' } else { b'A' };
            let altered = String::from_utf8(altered).unwrap();
            // The unused low bits of the last letter are refused by the decoder.
            assert_eq!(Token::parse(&altered).unwrap_err().class(), Class::Data, "{altered}");
        }
        assert!(Token::parse("").is_err());
        assert!(Token::parse(&text[..text.len() - 1]).is_err());
    }
}
