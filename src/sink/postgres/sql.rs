//! The statements that write to one table. Every value is passed as text and cast by the type of
//! the target's column, so that whatever the source printed is read by the target's own rules.
//!
//! A statement takes an array of texts for each value of a row, and writes as many rows as they
//! are long.

use super::table::Plan;

/// What a statement does; the numbers are places in [`Plan::columns`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Shape {
    /// New rows: every column.
    Insert,
    /// New rows, or new values of those that are there: every column.
    Upsert,
    /// New rows from a stream, by COPY: every column.
    Copy,
    /// New values of these columns in rows that are there: the key, then the columns.
    Patch(Vec<usize>),
    /// Rows go: the key.
    Delete,
    /// A row that stands where another is to move goes, if the other is there: the old key, then
    /// the new one.
    Clear,
    /// Rows get another key: the old key, then the new one.
    Rekey,
    /// One row that equals this one goes: every column.
    DeleteWhole,
    /// One row that equals this one gets new values: every column as it was, then as it is.
    UpdateWhole,
}

/// A name as SQL takes it.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

impl Shape {
    /// The columns whose values a row of the statement has, in order.
    pub(super) fn parameters(&self, plan: &Plan) -> Vec<usize> {
        let all = 0..plan.columns.len();
        match self {
            Shape::Insert | Shape::Upsert | Shape::DeleteWhole => all.collect(),
            Shape::Copy => Vec::new(),
            Shape::Delete => plan.key.clone(),
            Shape::Patch(set) => plan.key.iter().chain(set).copied().collect(),
            Shape::Clear | Shape::Rekey => plan.key.iter().chain(&plan.key).copied().collect(),
            Shape::UpdateWhole => all.clone().chain(all).collect(),
        }
    }

    /// The statement.
    pub(super) fn sql(&self, plan: &Plan) -> String {
        let table = &plan.name;
        let rows = rows(plan, &self.parameters(plan));
        let keys = plan.key.len();
        match self {
            Shape::Insert | Shape::Upsert => {
                let names = list(plan, 0..plan.columns.len());
                let values = listed(0..plan.columns.len(), |at| format!("s.v{at}"), ", ");
                let conflict = if *self == Shape::Upsert { on_conflict(plan) } else { "".into() };
                format!(
                    "insert into {table} as t ({names}) overriding system value \
                     select {values} from {rows} as s{conflict}"
                )
            }
            Shape::Copy => {
                format!("copy {table} ({}) from stdin", list(plan, 0..plan.columns.len()))
            }
            Shape::Patch(set) => by_key(plan, &rows, set),
            Shape::Rekey => by_key(plan, &rows, &plan.key),
            Shape::Delete => {
                format!("delete from {table} as t using {rows} as s where {}", equal(plan, "t", 0))
            }
            Shape::Clear => format!(
                "delete from {table} as t using {rows} as s where {} and not ({}) \
                 and exists (select from {table} as o where {})",
                equal(plan, "t", keys),
                equal(plan, "t", 0),
                equal(plan, "o", 0)
            ),
            Shape::DeleteWhole => {
                let one = one(plan, &rows, 0);
                format!(
                    "delete from {table} as t using {one} as s \
                     where t.tableoid = s.part and t.ctid = s.place"
                )
            }
            Shape::UpdateWhole => {
                let settable = (0..plan.columns.len()).filter(|&at| plan.is_settable(at));
                let set = settable.map(|at| (at, plan.columns.len() + at)).collect::<Vec<_>>();
                let (set, one) =
                    (assignments(plan, &set), one(plan, &rows, 2 * plan.columns.len()));
                format!(
                    "update {table} as t set {set} from {one} as s \
                     where t.tableoid = s.part and t.ctid = s.place"
                )
            }
        }
    }
}

/// New values of the columns `set` in the rows of a key.
fn by_key(plan: &Plan, rows: &str, set: &[usize]) -> String {
    let set = set.iter().enumerate().map(|(at, &column)| (column, plan.key.len() + at));
    let set = assignments(plan, &set.collect::<Vec<_>>());
    format!("update {} as t set {set} from {rows} as s where {}", plan.name, equal(plan, "t", 0))
}

/// The rows of the parameters, each value `v0`, `v1` and so on with its type. The type has no
/// length: an explicit cast to `varchar(3)` would cut a longer text in silence, where the
/// assignment to the column refuses it.
fn rows(plan: &Plan, parameters: &[usize]) -> String {
    let count = 0..parameters.len();
    let arrays = listed(count.clone(), |at| format!("${}::text[]", at + 1), ", ");
    let names = listed(count, |at| format!("v{at}"), ", ");
    let cast = |(at, &column): (usize, &usize)| {
        plan.columns.get(column).map(|column| format!("u.v{at}::{} as v{at}", column.ty))
    };
    let casts = parameters.iter().enumerate().filter_map(cast).collect::<Vec<_>>().join(", ");
    format!("(select {casts} from unnest({arrays}) as u({names}))")
}

fn on_conflict(plan: &Plan) -> String {
    let key = list(plan, plan.key.iter().copied());
    let set = (0..plan.columns.len())
        .filter(|at| plan.is_settable(*at) && !plan.key.contains(at))
        .filter_map(|at| plan.columns.get(at))
        .map(|column| format!("{0} = excluded.{0}", column.name))
        .collect::<Vec<_>>();
    match set.is_empty() {
        true => format!(" on conflict ({key}) do nothing"),
        false => format!(" on conflict ({key}) do update set {}", set.join(", ")),
    }
}

/// The place of one row that equals the values from `v0` on, and the first `handed` values.
fn one(plan: &Plan, rows: &str, handed: usize) -> String {
    let same = plan.columns.iter().enumerate().map(|(at, column)| {
        let text = if column.has_equality { "" } else { "::text" };
        format!("o.{}{text} is not distinct from s.v{at}{text}", column.name)
    });
    let same = same.collect::<Vec<_>>().join(" and ");
    let handed = listed(0..handed, |at| format!(", s.v{at}"), "");
    format!(
        "(select o.tableoid as part, o.ctid as place{handed} from {} as o, {rows} as s \
         where {same} limit 1)",
        plan.name
    )
}

/// The key of `row` is the one whose values begin at `from`.
fn equal(plan: &Plan, row: &str, from: usize) -> String {
    let names = plan.key.iter().filter_map(|&column| plan.columns.get(column));
    let pair = |(at, name): (usize, &str)| format!("{row}.{name} = s.v{}", from + at);
    names.map(|column| column.name.as_str()).enumerate().map(pair).collect::<Vec<_>>().join(" and ")
}

/// Columns with the places of their values.
fn assignments(plan: &Plan, set: &[(usize, usize)]) -> String {
    let pair = |&(column, value): &(usize, usize)| {
        plan.columns.get(column).map(|column| format!("{} = s.v{value}", column.name))
    };
    set.iter().filter_map(pair).collect::<Vec<_>>().join(", ")
}

fn list(plan: &Plan, columns: impl Iterator<Item = usize>) -> String {
    let names = columns.filter_map(|at| plan.columns.get(at));
    names.map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn listed(
    count: std::ops::Range<usize>,
    each: impl FnMut(usize) -> String,
    between: &str,
) -> String {
    count.map(each).collect::<Vec<_>>().join(between)
}
