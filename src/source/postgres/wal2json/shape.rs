//! The columns of a table as its lines have them. Where the catalog disagrees, it is ahead of the
//! stream, and the line is right.

use super::{
    super::pgoutput::{Relation, RelationColumn},
    facts::Attribute,
    line::{Cell, RowChange},
};
use crate::{
    change::{Before, Op, Row, Value},
    schema::Identity,
};

/// Types of a fixed length: no value of theirs is ever left out as a large one.
const FIXED: [u32; 19] =
    [16, 18, 19, 20, 21, 23, 26, 600, 700, 701, 790, 829, 1082, 1083, 1114, 1184, 1186, 1266, 2950];

/// A table as the last line that told something new had it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// As it is captured: its own, or that of the root that it is a partition of.
    pub(super) relation: Relation,
    /// Whether the lines bear the captured table's own name.
    pub(super) own: bool,
    /// Beside each column of `relation`.
    details: Vec<Detail>,
    /// Columns that lines have and that are not captured.
    generated: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Detail {
    number: u16,
    toastable: bool,
}

/// How a line agrees with a [`Shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// It says nothing new.
    Whole,
    /// It lacks columns: large values that were left alone, or columns that are gone.
    Partial,
    /// It is of another table version.
    Not,
}

/// What a shape is made of.
#[derive(Debug)]
pub(super) struct Sources<'a> {
    /// The captured table without its columns; where the catalog has none, of oid 0.
    pub(super) relation: Relation,
    pub(super) own: bool,
    /// The captured table's columns now; `None` where the catalog has it no more.
    pub(super) attributes: Option<&'a [Attribute]>,
    /// The shape of the lines before this one.
    pub(super) previous: Option<&'a Shape>,
}

impl Shape {
    /// The shape of the table when `line` was written; without a line, as the catalog has it.
    pub(super) fn new(sources: Sources<'_>, line: Option<&RowChange<'_>>) -> Self {
        let generated = match sources.attributes {
            Some(all) => all.iter().filter(|a| a.generated).map(|a| a.name.clone()).collect(),
            None => sources.previous.map(|shape| shape.generated.clone()).unwrap_or_default(),
        };
        let base = base(&sources);
        let mut shape =
            Self { relation: sources.relation, own: sources.own, details: Vec::new(), generated };
        let columns = match line {
            Some(line) => shape.merge(line, &base, sources.previous),
            None => base,
        };
        for column in columns {
            shape.details.push(Detail { number: column.number, toastable: column.toastable });
            shape.relation.columns.push(RelationColumn {
                key: column.key,
                name: column.name,
                type_oid: column.type_oid,
                modifier: column.modifier,
            });
        }
        if let Some(line) = line {
            shape.settle_identity(line, sources.attributes.is_some());
        }
        shape
    }

    /// Whether `line` is of this version of the table.
    pub(super) fn fit(&self, line: &RowChange<'_>) -> Fit {
        let mut found = 0;
        for cell in self.captured(&line.columns) {
            let known = self.column(&cell.name);
            let other = |oid: u32| known.is_none_or(|column| column.type_oid != oid);
            if known.is_none() || cell.type_oid.is_some_and(other) {
                return Fit::Not;
            }
            found += 1;
        }
        if line.op != Op::Insert && self.own && !self.identifies(line) {
            return Fit::Not;
        }
        let lacks = |(column, detail): (&RelationColumn, &Detail)| {
            !detail.toastable && !line.columns.iter().any(|cell| cell.name == column.name)
        };
        match line.op {
            Op::Delete => Fit::Whole,
            _ if found == self.relation.columns.len() => Fit::Whole,
            Op::Insert => Fit::Not,
            _ if self.relation.columns.iter().zip(&self.details).any(lacks) => Fit::Not,
            _ => Fit::Partial,
        }
    }

    /// The old and the new row of a line that fits.
    pub(super) fn rows(&self, line: &RowChange<'_>) -> (Before, Option<Row>) {
        let after = (line.op != Op::Delete).then(|| self.row(&line.columns, Value::Unchanged));
        let Some(identity) = &line.identity else { return (Before::Nothing, after) };
        let before = match self.relation.identity {
            Identity::Full => Before::Full(self.row(identity, Value::Null)),
            // The plugin repeats a key that did not change.
            _ if line.op == Op::Update && !changed(identity, &line.columns) => Before::Nothing,
            _ => Before::Key(self.row(identity, Value::Null)),
        };
        (before, after)
    }

    fn row(&self, cells: &[Cell<'_>], missing: Value<'static>) -> Row {
        let mut next = 0;
        Row::from_values(self.relation.columns.iter().map(|column| {
            // They are in the same order but for partitions that were attached.
            let at = match cells.get(next) {
                Some(cell) if cell.name == column.name => Some(next),
                _ => cells.iter().position(|cell| cell.name == column.name),
            };
            next = at.map_or(next, |at| at + 1);
            match at.and_then(|at| cells.get(at)).map(|cell| &cell.value) {
                Some(Some(text)) => Value::Text(text),
                Some(None) => Value::Null,
                None => missing,
            }
        }))
    }

    fn column(&self, name: &str) -> Option<&RelationColumn> {
        self.relation.columns.iter().find(|column| column.name == name)
    }

    fn captured<'a, 'b>(&'a self, cells: &'a [Cell<'b>]) -> impl Iterator<Item = &'a Cell<'b>> {
        cells.iter().filter(|cell| !self.generated.iter().any(|name| *name == cell.name))
    }

    /// Whether the columns of the line's identity are the key.
    fn identifies(&self, line: &RowChange<'_>) -> bool {
        let identity = line.identity.as_deref().unwrap_or_default();
        let has = |cells: &[Cell<'_>], name: &str| cells.iter().any(|cell| cell.name == name);
        // A large key that was left alone is in neither list.
        let left = |name: &str| line.op == Op::Update && !has(&line.columns, name);
        let mut keys = self.relation.columns.iter().filter(|column| column.key);
        keys.all(|column| has(identity, &column.name) || left(&column.name))
            && self
                .captured(identity)
                .all(|cell| self.column(&cell.name).is_some_and(|column| column.key))
    }

    /// The columns of the line, and those that it may have left out, in the table's order.
    fn merge(
        &self,
        line: &RowChange<'_>,
        base: &[Attribute],
        previous: Option<&Self>,
    ) -> Vec<Attribute> {
        let identity = line.identity.as_deref().unwrap_or_default();
        let mut columns: Vec<Attribute> = Vec::with_capacity(base.len());
        for cell in self.captured(&line.columns).chain(self.captured(identity)) {
            if !columns.iter().any(|column| column.name == cell.name) {
                columns.push(self.attribute(cell, base));
            }
        }
        let left_out = |column: &&Attribute| match line.op {
            Op::Insert => false,
            Op::Update => column.toastable,
            _ => true,
        };
        // What the lines before this one had not, the table had not: it was added since.
        let had =
            |column: &&Attribute| previous.is_none_or(|shape| shape.column(&column.name).is_some());
        for column in base.iter().filter(left_out).filter(had) {
            let listed = |listed: &Attribute| {
                listed.name == column.name || (self.own && listed.number == column.number)
            };
            if !columns.iter().any(listed) {
                columns.push(column.clone());
            }
        }
        if self.own {
            columns.sort_by_key(|column| column.number);
        } else {
            let place = |name: &str| base.iter().position(|column| column.name == name);
            columns.sort_by_key(|column| place(&column.name).unwrap_or(usize::MAX));
        }
        columns
    }

    /// A column as the line has it, explained by what is known of it otherwise.
    fn attribute(&self, cell: &Cell<'_>, base: &[Attribute]) -> Attribute {
        let by_name = base.iter().find(|column| column.name == cell.name);
        let renamed =
            || base.iter().find(|column| self.own && Some(column.number) == cell.position);
        let known = by_name.or_else(renamed);
        let type_oid = cell.type_oid.or(known.map(|column| column.type_oid)).unwrap_or(TEXT);
        let same = known.filter(|column| column.type_oid == type_oid);
        Attribute {
            number: cell.position.or(known.map(|column| column.number)).unwrap_or(u16::MAX),
            name: cell.name.clone().into_owned(),
            type_oid,
            modifier: same.map_or(-1, |column| column.modifier),
            generated: false,
            toastable: same.map_or(!FIXED.contains(&type_oid), |column| column.toastable),
            key: known.is_some_and(|column| column.key),
        }
    }

    /// Believes the line where its identity is another than the catalog's.
    fn settle_identity(&mut self, line: &RowChange<'_>, in_catalog: bool) {
        let primary = line.primary_key.as_deref().unwrap_or_default();
        if line.op == Op::Insert {
            if !in_catalog && !self.relation.columns.iter().any(|column| column.key) {
                self.set_key(Identity::Default, |name| primary.iter().any(|key| key == name));
            }
            return;
        }
        if !self.own || self.identifies(line) {
            return;
        }
        let identity = line.identity.as_deref().unwrap_or_default();
        let listed = |name: &str| identity.iter().any(|cell| cell.name == name);
        let is_primary = primary.len() == identity.len() && primary.iter().all(|name| listed(name));
        let is_whole = match line.op {
            Op::Update => line.columns.iter().all(|cell| listed(&cell.name)),
            _ => self.relation.identity == Identity::Full,
        };
        match (is_primary, is_whole) {
            (true, _) => self.set_key(Identity::Default, listed),
            (false, true) => {
                self.keep(listed);
                self.set_key(Identity::Full, |_| true);
            }
            (false, false) => self.set_key(Identity::Index, listed),
        }
    }

    fn set_key(&mut self, identity: Identity, is_key: impl Fn(&str) -> bool) {
        self.relation.identity = identity;
        for column in &mut self.relation.columns {
            column.key = is_key(&column.name);
        }
    }

    fn keep(&mut self, wanted: impl Fn(&str) -> bool) {
        let columns = std::mem::take(&mut self.relation.columns);
        let pairs = columns.into_iter().zip(std::mem::take(&mut self.details));
        (self.relation.columns, self.details) =
            pairs.filter(|(column, _)| wanted(&column.name)).unzip();
    }
}

/// The type of a column of which nothing is known.
const TEXT: u32 = 25;

/// The columns that are captured, as far as they are known without a line.
fn base(sources: &Sources<'_>) -> Vec<Attribute> {
    let Some(attributes) = sources.attributes else {
        let Some(previous) = sources.previous else { return Vec::new() };
        let pairs = previous.relation.columns.iter().zip(&previous.details);
        return pairs
            .map(|(column, detail)| Attribute {
                number: detail.number,
                name: column.name.clone(),
                type_oid: column.type_oid,
                modifier: column.modifier,
                generated: false,
                toastable: detail.toastable,
                key: column.key,
            })
            .collect();
    };
    attributes.iter().filter(|attribute| !attribute.generated).cloned().collect()
}

/// Whether a value of the identity is another in the new row.
fn changed(identity: &[Cell<'_>], columns: &[Cell<'_>]) -> bool {
    identity.iter().any(|old| {
        let new = columns.iter().find(|new| new.name == old.name);
        new.is_some_and(|new| new.value != old.value)
    })
}

#[cfg(test)]
mod tests {
    use super::{super::line, *};

    fn attribute(number: u16, name: &str, type_oid: u32) -> Attribute {
        Attribute {
            number,
            name: name.into(),
            type_oid,
            modifier: 7,
            generated: name == "made",
            toastable: type_oid == 25,
            key: number == 1,
        }
    }

    /// `t (id int primary key, a text, made int generated always as …, c text)`, as it is now.
    fn now() -> Vec<Attribute> {
        [(1, "id", 23), (2, "a", 25), (3, "made", 23), (4, "c", 25)]
            .map(|(number, name, oid)| attribute(number, name, oid))
            .to_vec()
    }

    fn parse(line: &str) -> RowChange<'_> {
        match line::parse(line.as_bytes()).unwrap().pop() {
            Some(line::Event::Row(row)) => row,
            other => panic!("{other:?}"),
        }
    }

    fn line(action: &str, columns: &[(u16, &str, u32)], identity: &[&str]) -> String {
        let column = |(position, name, oid): &(u16, &str, u32)| {
            format!(r#"{{"name":"{name}","typeoid":{oid},"value":"1","position":{position}}}"#)
        };
        let columns: Vec<_> = columns.iter().map(column).collect();
        let cell = |name: &&str| format!(r#"{{"name":"{name}","typeoid":23,"value":"1"}}"#);
        let cells: Vec<_> = identity.iter().map(cell).collect();
        format!(
            r#"{{"action":"{action}","schema":"s","table":"t","columns":[{}],"identity":[{}]}}"#,
            columns.join(","),
            cells.join(",")
        )
    }

    fn shape(attributes: Option<&[Attribute]>, previous: Option<&Shape>, line: &str) -> Shape {
        let relation = Relation {
            oid: 9,
            schema: "s".into(),
            name: "t".into(),
            identity: Identity::Default,
            columns: Vec::new(),
        };
        let sources = Sources { relation, own: true, attributes, previous };
        Shape::new(sources, Some(&parse(line)))
    }

    fn columns(shape: &Shape) -> Vec<(&str, i32, bool)> {
        let all = shape.relation.columns.iter();
        all.map(|column| (column.name.as_str(), column.modifier, column.key)).collect()
    }

    #[test]
    fn a_column_that_was_renamed_since_has_the_name_of_the_line() {
        let insert =
            line("I", &[(1, "id", 23), (2, "old", 25), (3, "made", 23), (4, "c", 25)], &[]);
        let found = shape(Some(&now()), None, &insert);
        assert_eq!(columns(&found), [("id", 7, true), ("old", 7, false), ("c", 7, false)]);
        assert_eq!(found.fit(&parse(&insert)), Fit::Whole);
    }

    #[test]
    fn what_an_update_leaves_out_is_unchanged_only_where_it_can_be() {
        let update = line("U", &[(1, "id", 23), (3, "made", 23)], &["id"]);
        let found = shape(Some(&now()), None, &update);
        assert_eq!(found.fit(&parse(&update)), Fit::Partial);
        let (before, after) = found.rows(&parse(&update));
        assert_eq!(before, Before::Nothing);
        let values: Vec<_> = after.as_ref().unwrap().values().collect();
        assert_eq!(values, [Value::Text(b"1"), Value::Unchanged, Value::Unchanged]);
        // The lines before had no `c`: it was added since.
        let insert = line("I", &[(1, "id", 23), (2, "a", 25)], &[]);
        let earlier = shape(Some(&now()), None, &insert);
        let found = shape(Some(&now()), Some(&earlier), &update);
        assert_eq!(columns(&found), [("id", 7, true), ("a", 7, false)]);
        let shorter = line("I", &[(1, "id", 23)], &[]);
        assert_eq!(earlier.fit(&parse(&shorter)), Fit::Not);
    }

    #[test]
    fn the_identity_of_the_line_is_believed() {
        let all = [(1, "id", 23), (2, "a", 25), (4, "c", 25)];
        let full = line("U", &all, &["id", "a", "c"]);
        let found = shape(Some(&now()), None, &full);
        assert_eq!(found.relation.identity, Identity::Full);
        assert!(matches!(found.rows(&parse(&full)).0, Before::Full(_)));
        let index = line("U", &all, &["c"]);
        let found = shape(Some(&now()), None, &index);
        assert_eq!(found.relation.identity, Identity::Index);
        assert_eq!(columns(&found), [("id", 7, false), ("a", 7, false), ("c", 7, true)]);
        let usual = line("D", &[], &["id"]);
        let found = shape(Some(&now()), None, &usual);
        assert_eq!(found.relation.identity, Identity::Default);
        assert_eq!(columns(&found).len(), 3, "a delete names its key alone");
    }

    #[test]
    fn a_table_that_is_gone_is_what_its_lines_say() {
        let update = line("U", &[(1, "id", 23), (2, "a", 25)], &["id"]);
        let found = shape(None, None, &update);
        assert_eq!(columns(&found), [("id", -1, true), ("a", -1, false)]);
        let shorter = line("U", &[(1, "id", 23)], &["id"]);
        assert_eq!(found.fit(&parse(&shorter)), Fit::Partial, "a large text may be left out");
        let (_, after) = found.rows(&parse(&shorter));
        assert_eq!(after.unwrap().value(1), Some(Value::Unchanged));
    }
}
