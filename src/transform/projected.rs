//! What the steps make of every row of a table, where they do nothing but choose, rename and hide
//! columns: for those who compare a table with its copy.

use std::sync::Arc;

use super::{Transform, step::Step};
use crate::{
    change::Op,
    error::{Error, Result},
    schema::Table,
};

/// A table as the steps leave it, whatever the operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projected {
    /// The table with the columns that are left.
    pub table: Arc<Table>,
    /// For each of them its place in the table as it was.
    pub origins: Vec<Origin>,
}

/// Where the value of a column comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The place of the column in the table as it was.
    pub column: usize,
    /// The value is hidden.
    pub masked: bool,
}

impl Transform {
    /// The table as these rules leave it. An error, of class `Config`, names the rule by which a
    /// row of the target is more than chosen columns of one row of the source.
    pub fn projected(&mut self, table: &Arc<Table>) -> Result<Projected> {
        let refused = |rule: &str| {
            Err(Error::config(format!("{table} cannot be compared: `{rule}` reshapes its rows"))
                .remedy(
                    "tables that are only chosen, and columns that are chosen, renamed and \
                         masked, can be compared; choose others with --table",
                ))
        };
        if self.condition.is_some() {
            return refused("where");
        }
        if self.message.route.is_some() {
            return refused("route");
        }
        if self.outbox.is_some() {
            return refused("outbox");
        }
        let inserted = match self.projected_for(table, Op::Insert)? {
            Ok(projected) => projected,
            Err(rule) => return refused(&rule),
        };
        for op in [Op::Update, Op::Delete] {
            match self.projected_for(table, op)? {
                Ok(projected) if projected == inserted => {}
                Ok(_) => return refused("transform.operations"),
                Err(rule) => return refused(&rule),
            }
        }
        Ok(inserted)
    }

    /// The name of a rule stands in the way where it does more.
    fn projected_for(
        &mut self,
        table: &Arc<Table>,
        op: Op,
    ) -> Result<std::result::Result<Projected, String>> {
        let whole = |column| Origin { column, masked: false };
        let mut origins: Vec<Origin> = (0..table.columns.len()).map(whole).collect();
        let mut table = Arc::clone(table);
        for step in &mut self.steps {
            let Step::Plain(plain) = step else {
                match step.covers(&table, op) {
                    true => return Ok(Err(step.rule().to_owned())),
                    false => continue,
                }
            };
            let (made, from) = plain.origins(&table, op)?;
            let origin = |&(column, masked): &(usize, bool)| {
                origins
                    .get(column)
                    .map(|origin| Origin { column: origin.column, masked: origin.masked || masked })
            };
            origins = from.iter().filter_map(origin).collect();
            table = made;
        }
        Ok(Ok(Projected { table, origins }))
    }
}
