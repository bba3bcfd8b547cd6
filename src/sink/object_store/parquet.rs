//! Changes of one table as a Parquet file: a column for each of the table's, and what is known of
//! the change itself.

use std::sync::Arc;

use ::parquet::{
    basic::{Compression, LogicalType, Repetition, TimeUnit, Type as Physical, ZstdLevel},
    column::writer::ColumnWriter,
    data_type::ByteArray,
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::types::Type,
};
use bytes::Bytes;

use crate::{
    change::{Before, Change, Row, Value},
    error::{Class, Classify, Error, Result},
    schema::{Column, Table, TypeKind},
};

/// What is known of a change beside its row.
const META: [(&str, Kind); 8] = [
    ("_op", Kind::Text),
    ("_offset", Kind::Long),
    ("_index", Kind::Int),
    ("_lsn", Kind::Text),
    ("_commit_time", Kind::Time),
    ("_unchanged", Kind::Text),
    ("_prefix", Kind::Text),
    ("_content", Kind::Binary),
];

/// A column's type in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bool,
    Int,
    Long,
    Float,
    Double,
    Text,
    Binary,
    Time,
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
enum Cell {
    Null,
    Bool(bool),
    Int(i32),
    Long(i64),
    Float(f32),
    Double(f64),
    Bytes(Bytes),
}

/// A change, ready to be written.
#[derive(Debug)]
pub(super) struct Line(Vec<Cell>);

/// The rows of one file.
#[derive(Debug)]
pub(super) struct Rows {
    table: Option<Arc<Table>>,
    lines: Vec<Line>,
}

impl Line {
    /// The values of a change: of its new row, else of what is known of the old one.
    pub(super) fn new(change: &Change) -> Result<Self> {
        let mut cells = Vec::new();
        let mut unchanged = Vec::new();
        if let Some(table) = &change.table {
            for (index, column) in table.columns.iter().enumerate() {
                let value =
                    change.key_row().map_or(Some(Value::Null), |row| value(change, row, index));
                if value.is_none() {
                    unchanged.push(&column.name);
                }
                cells.push(cell(table, column, value)?);
            }
        }
        let text = |text: String| Cell::Bytes(Bytes::from(text));
        let message = change.message.as_deref();
        let index = i32::try_from(change.index);
        let offset = i64::try_from(change.offset);
        let (Ok(index), Ok(offset)) = (index, offset) else {
            return Err(Error::data(format!("offset {} has no column for it", change.offset)));
        };
        let unchanged = match unchanged.is_empty() {
            true => Cell::Null,
            false => text(serde_json::json!(unchanged).to_string()),
        };
        cells.extend([
            text(change.op.letter().to_string()),
            Cell::Long(offset),
            Cell::Int(index),
            text(change.transaction.commit_lsn.to_string()),
            Cell::Long(change.transaction.commit_time.0),
            unchanged,
            message.map_or(Cell::Null, |message| text(message.prefix.clone())),
            message.map_or(Cell::Null, |message| Cell::Bytes(message.content.clone())),
        ]);
        Ok(Self(cells))
    }

    /// Bytes that it takes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        let of = |cell: &Cell| match cell {
            Cell::Bytes(bytes) => size_of::<Cell>() + bytes.len(),
            _ => size_of::<Cell>(),
        };
        self.0.iter().map(of).sum()
    }
}

impl Rows {
    pub(super) fn of(table: Option<Arc<Table>>) -> Self {
        Self { table, lines: Vec::new() }
    }

    pub(super) fn push(&mut self, line: Line) {
        self.lines.push(line);
    }

    /// The file, with one row group.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        self.write().class(Class::Bug, || "cannot write a Parquet file")
    }

    fn write(&self) -> ::parquet::errors::Result<Vec<u8>> {
        let columns = self.columns();
        let fields = columns.iter().map(|(name, kind)| field(name, *kind).map(Arc::new));
        let fields = fields.collect::<::parquet::errors::Result<Vec<_>>>()?;
        let schema = Type::group_type_builder("change").with_fields(fields).build()?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_created_by(concat!("walrace ", env!("CARGO_PKG_VERSION")).into())
            .build();
        let mut out = Vec::new();
        let mut file = SerializedFileWriter::new(&mut out, Arc::new(schema), Arc::new(properties))?;
        let mut group = file.next_row_group()?;
        let mut index = 0;
        while let Some(mut column) = group.next_column()? {
            self.write_column(index, column.untyped())?;
            column.close()?;
            index += 1;
        }
        group.close()?;
        file.close()?;
        Ok(out)
    }

    fn write_column(
        &self,
        index: usize,
        writer: &mut ColumnWriter,
    ) -> ::parquet::errors::Result<usize> {
        let cells = || self.lines.iter().filter_map(|line| line.0.get(index));
        let levels: Vec<i16> = cells().map(|cell| i16::from(*cell != Cell::Null)).collect();
        let levels = Some(&levels[..]);
        macro_rules! values {
            ($kind:ident) => {
                cells()
                    .filter_map(|cell| if let Cell::$kind(v) = cell { Some(*v) } else { None })
                    .collect::<Vec<_>>()
            };
        }
        match writer {
            ColumnWriter::BoolColumnWriter(w) => w.write_batch(&values!(Bool), levels, None),
            ColumnWriter::Int32ColumnWriter(w) => w.write_batch(&values!(Int), levels, None),
            ColumnWriter::Int64ColumnWriter(w) => w.write_batch(&values!(Long), levels, None),
            ColumnWriter::FloatColumnWriter(w) => w.write_batch(&values!(Float), levels, None),
            ColumnWriter::DoubleColumnWriter(w) => w.write_batch(&values!(Double), levels, None),
            ColumnWriter::ByteArrayColumnWriter(w) => {
                let bytes = |cell: &Cell| match cell {
                    Cell::Bytes(bytes) => Some(ByteArray::from(bytes.clone())),
                    _ => None,
                };
                w.write_batch(&cells().filter_map(bytes).collect::<Vec<_>>(), levels, None)
            }
            _ => Err(::parquet::errors::ParquetError::General("a column of another type".into())),
        }
    }

    /// The table's columns, then ours; one that has the name of a column gets a `_` more.
    fn columns(&self) -> Vec<(String, Kind)> {
        let of_table = self.table.iter().flat_map(|table| &table.columns);
        let mut columns: Vec<_> =
            of_table.map(|column| (column.name.clone(), kind(&column.ty))).collect();
        for (name, kind) in META {
            let mut name = name.to_owned();
            while columns.iter().any(|(taken, _)| *taken == name) {
                name.push('_');
            }
            columns.push((name, kind));
        }
        columns
    }
}

fn field(name: &str, kind: Kind) -> ::parquet::errors::Result<Type> {
    let (physical, logical) = match kind {
        Kind::Bool => (Physical::BOOLEAN, None),
        Kind::Int => (Physical::INT32, None),
        Kind::Long => (Physical::INT64, None),
        Kind::Float => (Physical::FLOAT, None),
        Kind::Double => (Physical::DOUBLE, None),
        Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
        Kind::Binary => (Physical::BYTE_ARRAY, None),
        Kind::Time => (Physical::INT64, Some(LogicalType::timestamp(true, TimeUnit::MICROS))),
    };
    Type::primitive_type_builder(name, physical)
        .with_repetition(Repetition::OPTIONAL)
        .with_logical_type(logical)
        .build()
}

/// Whole numbers, booleans and floats as such, everything else as PostgreSQL's text.
fn kind(ty: &crate::schema::Type) -> Kind {
    match (&ty.kind, ty.oid) {
        (TypeKind::Domain { base }, _) => kind(base),
        (TypeKind::Base, 16) => Kind::Bool,
        (TypeKind::Base, 21 | 23) => Kind::Int,
        (TypeKind::Base, 20) => Kind::Long,
        (TypeKind::Base, 700) => Kind::Float,
        (TypeKind::Base, 701) => Kind::Double,
        _ => Kind::Text,
    }
}

/// `None`: it was not sent, and the old row does not have it either.
fn value<'a>(change: &'a Change, row: &'a Row, index: usize) -> Option<Value<'a>> {
    let known = |value: &Value| *value != Value::Unchanged;
    let old = || {
        let identity = |table: &Arc<Table>| table.columns.get(index).map(|c| c.identity);
        let is_identity = change.table.as_ref().and_then(identity).unwrap_or(false);
        match &change.before {
            Before::Nothing => None,
            Before::Full(row) => row.value(index),
            Before::Key(row) => row.value(index).filter(|_| is_identity),
        }
    };
    row.value(index).filter(known).or_else(|| old().filter(known))
}

fn cell(table: &Table, column: &Column, value: Option<Value>) -> Result<Cell> {
    let Some(Value::Text(text)) = value else { return Ok(Cell::Null) };
    let wrong = |what: &str| Error::data(format!("column `{}` of {table} {what}", column.name));
    let text = std::str::from_utf8(text).map_err(|_| wrong("holds bytes that are not UTF-8"))?;
    let parsed = match kind(&column.ty) {
        Kind::Bool => Some(Cell::Bool(text == "t")),
        Kind::Int => text.parse().ok().map(Cell::Int),
        Kind::Long | Kind::Time => text.parse().ok().map(Cell::Long),
        Kind::Float => text.parse().ok().map(Cell::Float),
        Kind::Double => text.parse().ok().map(Cell::Double),
        Kind::Text | Kind::Binary => Some(Cell::Bytes(Bytes::copy_from_slice(text.as_bytes()))),
    };
    parsed.ok_or_else(|| wrong("holds a text that is no number"))
}
