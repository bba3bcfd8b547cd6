//! One chunk: a range of blocks, read in a short transaction of its own.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::place::Place;
use crate::{
    change::Row,
    error::{Error, Result},
};

/// Rows are gathered in pieces of memory of this size, which they share.
const PIECE_BYTES: usize = 1 << 20;

/// What was read of a chunk.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) rows: Vec<Row>,
    /// Bytes of the rows.
    pub(super) bytes: usize,
    /// Where the last row lies.
    pub(super) last: Option<Place>,
    piece: BytesMut,
}

impl Rows {
    /// Takes the body of a `DataRow` whose first column is the row's place.
    pub(super) fn push(&mut self, mut body: &[u8]) -> Result<()> {
        let short = |_| Error::retry("the server sent a row that ends early");
        let columns = body.try_get_u16().map_err(short)?;
        let length = usize::try_from(body.try_get_i32().map_err(short)?).unwrap_or(0);
        let place = body.get(..length).and_then(|text| std::str::from_utf8(text).ok());
        let place: Place = place.unwrap_or_default().parse()?;
        body.advance(length);
        let row = self.tuple(columns.saturating_sub(1), body)?;
        self.bytes += row.as_bytes().len();
        self.rows.push(row);
        self.last = Some(place);
        Ok(())
    }

    /// Lays the columns out as pgoutput does.
    fn tuple(&mut self, columns: u16, mut body: &[u8]) -> Result<Row> {
        let short = || Error::retry("the server sent a row that ends early");
        let bytes_max = body.len() + usize::from(columns) + 2;
        if self.piece.capacity() - self.piece.len() < bytes_max {
            self.piece = BytesMut::with_capacity(bytes_max.max(PIECE_BYTES));
        }
        self.piece.put_u16(columns);
        for _ in 0..columns {
            let length = body.try_get_i32().map_err(|_| short())?;
            let Ok(bytes) = usize::try_from(length) else {
                self.piece.put_u8(b'n');
                continue;
            };
            let (text, rest) = body.split_at_checked(bytes).ok_or_else(short)?;
            self.piece.put_u8(b't');
            self.piece.put_i32(length);
            self.piece.put_slice(text);
            body = rest;
        }
        let bytes: Bytes = self.piece.split().freeze();
        Row::new(bytes)
    }
}

/// How many blocks the next chunk reads, so that it comes to the size and the time that it should.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) bytes: usize,
    pub(super) time: std::time::Duration,
    blocks: u32,
}

impl Pace {
    /// Begins small: nothing is known of the table.
    pub(super) fn new(bytes: usize, time: std::time::Duration) -> Self {
        Self { bytes, time, blocks: 32 }
    }

    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Learns from a chunk of so many blocks, bytes and time.
    pub(super) fn learn(&mut self, blocks: u32, bytes: usize, time: std::time::Duration) {
        let share = |part: f64, whole: f64| if part > 0.0 { whole / part } else { f64::INFINITY };
        #[expect(clippy::cast_precision_loss, reason = "a rough guess")]
        let by_bytes = share(bytes as f64, self.bytes as f64);
        let by_time = share(time.as_secs_f64(), self.time.as_secs_f64());
        let factor = by_bytes.min(by_time).clamp(0.05, 4.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        let next = (f64::from(blocks) * factor) as u32;
        self.blocks = next.clamp(1, BLOCKS_MAX);
    }
}

/// However empty a table is: its blocks take time too.
const BLOCKS_MAX: u32 = 1 << 16;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::change::Value;

    fn data_row(columns: &[Option<&str>]) -> Vec<u8> {
        let mut body = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
        for column in columns {
            match column {
                None => body.extend((-1_i32).to_be_bytes()),
                Some(text) => {
                    body.extend(i32::try_from(text.len()).unwrap().to_be_bytes());
                    body.extend(text.as_bytes());
                }
            }
        }
        body
    }

    #[test]
    fn a_row_comes_out_as_pgoutput_would_have_sent_it() {
        let mut rows = Rows::default();
        rows.push(&data_row(&[Some("(3,7)"), Some("42"), None, Some("")])).unwrap();
        let expected = [Value::Text(b"42"), Value::Null, Value::Text(b"")];
        assert_eq!(rows.rows, [Row::from_values(expected)]);
        assert_eq!(rows.last, Some(Place { block: 3, row: 7 }));
        assert!(rows.push(&data_row(&[Some("(3,7)"), Some("42")])[..9]).is_err());
    }

    #[test]
    fn chunks_grow_while_they_are_small_and_quick_and_shrink_when_they_are_not() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(1000, second);
        pace.learn(32, 100, second / 100);
        assert_eq!(pace.blocks(), 128, "at most four times as much");
        pace.learn(128, 2000, second / 2);
        assert_eq!(pace.blocks(), 64);
        pace.learn(64, 100, second * 4);
        assert_eq!(pace.blocks(), 16);
        pace.learn(16, 0, Duration::ZERO);
        assert_eq!(pace.blocks(), 64);
    }
}
