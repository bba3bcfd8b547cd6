//! A table and its copy, and the SQL that reads either in the same words.
//!
//! Values are compared by the text that their types print, under the same settings on both sides;
//! where the target's type is another, the source's text is read by that type first, as the sink
//! has the target do.

use std::{fmt::Write, sync::Arc};

use crate::{
    schema::Table,
    sink::{Mapped, MappedColumn},
    source::postgres::Compared,
    transform::Projected,
};

/// Types whose order is the same on every server, whatever its collations.
const ORDERED: [&str; 11] = [
    "smallint",
    "integer",
    "bigint",
    "oid",
    "numeric",
    "uuid",
    "date",
    "timestamp without time zone",
    "timestamp with time zone",
    "bytea",
    "boolean",
];

/// The texts of a key's values.
pub(super) type Key = Vec<String>;

/// A table and its copy.
pub(super) struct Pair {
    /// The source's table.
    pub(super) table: Arc<Table>,
    /// The table as the rules leave it.
    pub(super) projected: Projected,
    pub(super) mapped: Mapped,
    pub(super) source: Rows,
    pub(super) target: Rows,
    /// The columns that are compared, by the names that they have in the target.
    pub(super) names: Vec<String>,
    /// The columns of the source that are not: masked, generated, or not in the target.
    pub(super) left_out: Vec<String>,
    /// The names of the key's columns.
    pub(super) key: Vec<String>,
    /// Both sides sort the key equally.
    pub(super) is_ordered: bool,
    /// An estimate.
    pub(super) rows: u64,
}

/// How the rows of one side are read.
pub(super) struct Rows {
    from: String,
    key: Vec<Part>,
    /// Expressions over a row `t`.
    columns: Vec<String>,
}

/// A column of the key.
struct Part {
    name: String,
    ty: String,
}

/// The keys after `after`, up to and with `upto`; `None` is without end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) after: Option<Key>,
    pub(super) upto: Option<Key>,
}

/// `text` as a literal.
pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The text that the type of a value prints. `is null` would be true of a row of nulls.
fn text_of(value: &str) -> String {
    format!("case num_nulls({value}) when 0 then format('%s', {value}) end")
}

impl Pair {
    /// A pair of what was found; `is_known` tells which types of the target the source has too.
    /// `None` where a column of the key is masked.
    pub(super) fn new(
        compared: Compared,
        projected: Projected,
        mapped: Mapped,
        is_known: impl Fn(&str) -> bool,
    ) -> Option<Self> {
        let Compared { table, types, from, rows, .. } = compared;
        let (mut names, mut places) = (Vec::new(), Vec::new());
        let mut source = Rows { from, key: Vec::new(), columns: Vec::new() };
        let mut target = Rows { from: mapped.name.clone(), key: Vec::new(), columns: Vec::new() };
        let mut is_ordered = true;
        let mut key = Vec::new();
        for (at, column) in mapped.columns.iter().enumerate() {
            let is_key = mapped.key.contains(&at);
            let origin = projected.origins.get(column.place)?;
            if origin.masked {
                if is_key {
                    return None;
                }
                continue;
            }
            let (own, ty) = (table.columns.get(origin.column)?, types.get(origin.column)?);
            let renamed = &projected.table.columns.get(column.place)?.name;
            source.columns.push(as_target(&own.name, ty, column, &is_known));
            target.columns.push(format!("t.{}", column.name));
            names.push(renamed.clone());
            places.push(origin.column);
            if is_key {
                source.key.push(Part { name: quoted(&own.name), ty: ty.clone() });
                target.key.push(Part { name: column.name.clone(), ty: column.ty.clone() });
                key.push(renamed.clone());
                is_ordered &= *ty == column.ty && ORDERED.contains(&ty.as_str());
            }
        }
        let left = table.columns.iter().enumerate().filter(|(at, _)| !places.contains(at));
        let left_out = left.map(|(_, column)| column.name.clone()).collect();
        let whole = !key.is_empty() && key.len() == mapped.key.len();
        let pair = Self {
            table,
            projected,
            mapped,
            source,
            target,
            names,
            left_out,
            key,
            is_ordered,
            rows,
        };
        whole.then_some(pair)
    }
}

/// The value of a column of the source as the target's column has it.
fn as_target(
    name: &str,
    ty: &str,
    column: &MappedColumn,
    is_known: impl Fn(&str) -> bool,
) -> String {
    let value = format!("t.{}", quoted(name));
    match ty != column.ty && is_known(&column.ty) {
        true => format!("({})::{}", text_of(&value), column.ty),
        false => value,
    }
}

impl Rows {
    /// Count and hash of the rows of a range.
    pub(super) fn hash(&self, range: &Range) -> String {
        format!(
            "select count(*), coalesce(sum({}), 0) from (select {} as h from {} t where {} \
             offset 0) s",
            number("h"),
            self.digest(),
            self.from,
            self.within(range)
        )
    }

    /// The key of the row number `count` of a range, if it has as many.
    pub(super) fn bound(&self, range: &Range, count: u64) -> String {
        format!(
            "select {} from {} t where {} order by {} offset {} limit 1",
            self.key_texts(),
            self.from,
            self.within(range),
            self.key_names(),
            count.saturating_sub(1)
        )
    }

    /// The keys of each row of a range whose number is a multiple of `step`.
    pub(super) fn split(&self, range: &Range, step: u64) -> String {
        let names = self.key.iter().map(|part| format!("t.{}", part.name));
        let names = names.collect::<Vec<_>>().join(", ");
        format!(
            "select {} from (select {names}, row_number() over (order by {}) as place from {} t \
             where {}) t where t.place % {step} = 0 order by t.place",
            self.key_texts(),
            self.key_names(),
            self.from,
            self.within(range)
        )
    }

    /// Key and hash of each row of a range.
    pub(super) fn list(&self, range: &Range) -> String {
        let (key, digest, within) = (self.key_texts(), self.digest(), self.within(range));
        format!("select {key}, {digest} from {} t where {within}", self.from)
    }

    /// Whether one key sorts before another, or equals it; of keys that sort equally everywhere.
    pub(super) fn is_before(&self, first: &Key, second: &Key) -> String {
        format!("select {} <= {}", self.literals(first), self.literals(second))
    }

    /// The tables that the rows are in, and how many blocks each has.
    pub(super) fn parts(&self) -> String {
        let name = literal(self.from.trim_start_matches("only "));
        format!(
            "select format('%I.%I', n.nspname, c.relname),
                 pg_relation_size(c.oid) / current_setting('block_size')::bigint
             from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where c.relkind <> 'p' and (c.oid = {name}::regclass
                 or c.oid in (select relid from pg_partition_tree({name}::regclass)))"
        )
    }

    /// Count and hash of each bucket of keys, `bits` of the key's own hash, in a run of blocks.
    pub(super) fn buckets(&self, blocks: &Blocks, bits: u32) -> String {
        format!(
            "select b, count(*), sum({}) from (select {} as b, {} as h from {} offset 0) s \
             group by b",
            number("h"),
            self.bucket(bits),
            self.digest(),
            blocks.sql()
        )
    }

    /// Key and hash of each row of some buckets, in a run of blocks.
    pub(super) fn list_buckets(&self, blocks: &Blocks, bits: u32, chosen: &[i64]) -> String {
        let chosen = chosen.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        format!(
            "select {}, {} from {} and {} in ({chosen})",
            self.key_texts(),
            self.digest(),
            blocks.sql(),
            self.bucket(bits)
        )
    }

    /// For each key its number, the version of the row that has it and a hash of each column; of a
    /// key that is not there the version is null.
    pub(super) fn look_up(&self, keys: &[Key]) -> String {
        let digest = |value: &String| {
            format!(", case num_nulls({value}) when 0 then md5(format('%s', {value})) end")
        };
        self.join(keys, &self.columns.iter().map(digest).collect::<String>())
    }

    /// As [`look_up`](Self::look_up), with the texts of the columns `named` in place of hashes.
    pub(super) fn texts(&self, keys: &[Key], named: &[String]) -> String {
        let text = |name: &String| format!(", {}", text_of(&format!("t.{}", quoted(name))));
        self.join(keys, &named.iter().map(text).collect::<String>())
    }

    fn join(&self, keys: &[Key], columns: &str) -> String {
        let mut arrays = Vec::new();
        let mut same = Vec::new();
        let mut names = String::new();
        for (at, part) in self.key.iter().enumerate() {
            let values = keys.iter().map(|key| key.get(at).map_or("", String::as_str));
            let values = values.map(literal).collect::<Vec<_>>().join(",");
            arrays.push(format!("array[{values}]::text[]"));
            same.push(format!("t.{} = u.k{at}::{}", part.name, part.ty));
            let _ = write!(names, "k{at}, ");
        }
        format!(
            "select u.n, t.tableoid::text || t.ctid::text || t.xmin::text{columns} \
             from unnest({}) with ordinality u({names}n) left join {} t on {} order by u.n",
            arrays.join(", "),
            self.from,
            same.join(" and ")
        )
    }

    fn digest(&self) -> String {
        format!("md5(row({})::text)", self.columns.join(", "))
    }

    fn bucket(&self, bits: u32) -> String {
        let names = self.key.iter().map(|part| format!("t.{}", part.name));
        let names = names.collect::<Vec<_>>().join(", ");
        format!("({} >> {})", number(&format!("md5(row({names})::text)")), 64 - bits)
    }

    fn key_texts(&self) -> String {
        let text = |part: &Part| format!("format('%s', t.{})", part.name);
        self.key.iter().map(text).collect::<Vec<_>>().join(", ")
    }

    fn key_names(&self) -> String {
        let name = |part: &Part| format!("t.{}", part.name);
        self.key.iter().map(name).collect::<Vec<_>>().join(", ")
    }

    fn literals(&self, key: &Key) -> String {
        let value = |(part, text): (&Part, &String)| format!("{}::{}", literal(text), part.ty);
        format!("({})", self.key.iter().zip(key).map(value).collect::<Vec<_>>().join(", "))
    }

    fn within(&self, range: &Range) -> String {
        let mut text = "true".to_owned();
        for (sign, key) in [(">", &range.after), ("<=", &range.upto)] {
            if let Some(key) = key {
                let _ = write!(text, " and ({}) {sign} {}", self.key_names(), self.literals(key));
            }
        }
        text
    }
}

/// The first 64 bits of a hash in hexadecimal digits, as a number.
fn number(hash: &str) -> String {
    format!("('x' || substr({hash}, 1, 16))::bit(64)::bigint")
}

/// A run of blocks of one table, so that no statement reads a large one whole.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub(super) table: String,
    pub(super) first: u64,
    /// `None`: to the end, which may move.
    pub(super) end: Option<u64>,
}

impl Blocks {
    fn sql(&self) -> String {
        let end = self.end.map(|end| format!(" and t.ctid < '({end},0)'::tid"));
        let end = end.unwrap_or_default();
        format!("only {} t where t.ctid >= '({},0)'::tid{end}", self.table, self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Rows {
        let part = |name: &str, ty: &str| Part { name: quoted(name), ty: ty.into() };
        Rows {
            from: "only \"s\".\"t\"".into(),
            key: vec![part("a", "integer"), part("b\"", "uuid")],
            columns: vec!["t.\"a\"".into(), "t.\"c\"".into()],
        }
    }

    #[test]
    fn a_range_has_its_upper_bound_and_not_its_lower_one() {
        let range = Range { after: Some(vec!["1".into(), "x'".into()]), upto: None };
        assert_eq!(
            rows().within(&range),
            "true and (t.\"a\", t.\"b\"\"\") > ('1'::integer, 'x'''::uuid)"
        );
        let range = Range { after: None, upto: Some(vec!["1".into(), "x".into()]) };
        assert!(rows().within(&range).contains(") <= ("));
        assert_eq!(rows().within(&Range::default()), "true");
    }

    #[test]
    fn the_last_run_of_blocks_has_no_end() {
        let blocks = Blocks { table: "s.t".into(), first: 8, end: None };
        assert_eq!(blocks.sql(), "only s.t t where t.ctid >= '(8,0)'::tid");
        let blocks = Blocks { end: Some(16), ..blocks };
        assert!(blocks.sql().ends_with(" and t.ctid < '(16,0)'::tid"));
    }
}
