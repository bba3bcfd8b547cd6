//! Where a row lies in its table: `ctid`
//! (<https://www.postgresql.org/docs/current/ddl-system-columns.html>).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A row's block and its number within it, from 1; number 0 lies before the block's first row.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Place {
    /// The block, from 0.
    pub block: u32,
    /// The row's number within it.
    pub row: u16,
}

impl Place {
    /// Before all rows of a block.
    pub fn before(block: u32) -> Self {
        Self { block, row: 0 }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({},{})", self.block, self.row)
    }
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(')'));
        let numbers = numbers.and_then(|numbers| numbers.split_once(','));
        numbers
            .and_then(|(block, row)| {
                Some(Self { block: block.parse().ok()?, row: row.parse().ok()? })
            })
            .ok_or_else(|| Error::data(format!("`{text}` is no place of a row such as (12,3)")))
    }
}

impl TryFrom<String> for Place {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_the_server_writes_it() {
        let place: Place = "(4294967294,291)".parse().unwrap();
        assert_eq!(place, Place { block: 4_294_967_294, row: 291 });
        assert_eq!(place.to_string(), "(4294967294,291)");
        assert!("(1)".parse::<Place>().is_err());
        assert!(Place::before(3) > Place { block: 2, row: 9 });
    }
}
