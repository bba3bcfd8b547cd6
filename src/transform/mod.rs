//! What a sink's rules make of changes, between the journal and the sink: pure, no I/O.
//!
//! ```text
//!   Filter ─► where ─► outbox ─┬─ event ──────────────────────────────────────► sink
//!                              └─ other ─► steps, in order ─► route, key, headers ─► sink
//! ```
//!
//! A change that the rules reshape is a change still: a table of its own and rows that fit it, so
//! that formats and sinks see no difference.

mod edit;
mod expression;
mod filter;
mod function;
mod outbox;
mod plain;
mod projected;
mod scope;
mod step;
#[cfg(test)]
mod tests;
mod unmatched;
mod view;

use std::sync::Arc;

pub use filter::Filter;
pub use projected::{Origin, Projected};
pub use unmatched::Unmatched;

use self::{
    expression::Expression,
    outbox::{Outbox, Sorted},
    plain::Plain,
    step::Step,
    unmatched::Name,
    view::{ByTable, Columns, View},
};
use crate::{
    change::{Change, Keys, Op},
    config,
    error::{Result, ResultExt},
    schema::Table,
};

/// The rules of one sink beyond its [`Filter`].
#[derive(Debug)]
pub struct Transform {
    sink: String,
    condition: Option<Expression>,
    outbox: Option<Outbox>,
    steps: Vec<Step>,
    message: MessageRules,
    columns: ByTable<(), Arc<Columns>>,
}

/// What is decided about the message of a change, once its rows are as they will be.
#[derive(Debug, Default)]
struct MessageRules {
    route: Option<Expression>,
    key: Option<Expression>,
    headers: Vec<(String, Expression)>,
}

/// What became of one change.
#[derive(Debug)]
pub enum Shape {
    /// A rule left it out: its name.
    LeftOut(String),
    /// Itself, or the parts that it was exploded into, in order.
    Passed(Vec<Change>),
}

impl Transform {
    /// Compiles the rules of the sink `name`. A mistake in one is an error of class `Config` that
    /// names rule, line and column.
    pub fn new(name: &str, sink: &config::Sink) -> Result<Self> {
        Self::compile(name, &sink.rules).context(|| format!("sink {name}"))
    }

    fn compile(name: &str, rules: &config::Rules) -> Result<Self> {
        let expression = |rule: &str, text: &Option<String>| {
            text.as_ref().map(|text| Expression::compile(rule, text)).transpose()
        };
        let header = |(name, text): (&String, &String)| {
            Ok((name.clone(), Expression::compile(&format!("message_headers.{name}"), text)?))
        };
        Ok(Self {
            sink: name.to_owned(),
            condition: expression("where", &rules.condition)?,
            outbox: rules.outbox.as_ref().map(Outbox::new),
            steps: steps(rules)?,
            message: MessageRules {
                route: expression("route", &rules.route)?,
                key: expression("message_key", &rules.message_key)?,
                headers: rules.message_headers.iter().map(header).collect::<Result<_>>()?,
            },
            columns: ByTable::default(),
        })
    }

    /// Whether every change passes as it is.
    pub fn is_plain(&self) -> bool {
        let shapes = !self.steps.is_empty() || self.outbox.is_some();
        self.condition.is_none() && !shapes && self.message.is_empty()
    }

    /// What becomes of one change: nothing where a rule leaves it out, itself, or the parts that
    /// it explodes into, numbered. An error, of class `Data`, makes a dead letter of the change.
    pub fn shape(&mut self, change: Change) -> Result<Vec<Change>> {
        match self.explain(change)? {
            Shape::LeftOut(_) => Ok(Vec::new()),
            Shape::Passed(changes) => Ok(changes),
        }
    }

    /// As [`Self::shape`], with the name of the rule that leaves a change out.
    pub fn explain(&mut self, change: Change) -> Result<Shape> {
        if self.is_plain() {
            return Ok(Shape::Passed(vec![change]));
        }
        self.run(change).context(|| format!("by the rules of sink {}", self.sink))
    }

    /// Whether a sink is to get anything of the change, be it a dead letter: a rule that fails
    /// leaves nothing out.
    pub fn wants(&mut self, change: &Change) -> bool {
        self.is_plain() || !matches!(self.explain(change.clone()), Ok(Shape::LeftOut(_)))
    }

    /// Shows the rules a table as the source has it, whose changes have these operations. An error
    /// is a rule that would stop the sink or fail for every change of it.
    pub fn meet(&mut self, table: &Arc<Table>, operations: &[Op]) -> Result<()> {
        if let Some(outbox) = &mut self.outbox
            && outbox.meet(table)?
        {
            return Ok(());
        }
        for op in operations {
            let mut table = Some(Arc::clone(table));
            for step in &mut self.steps {
                match (&table, step.plain_mut()) {
                    (Some(known), _) => table = step.meet(known, *op)?,
                    (None, Some(plain)) => plain.doubt(),
                    (None, None) => {}
                }
            }
        }
        Ok(())
    }

    /// What is to be told of columns that steps name and tables do not have, since it was last
    /// told: each name once for each table.
    pub fn take_news(&mut self) -> Vec<Unmatched> {
        let plain = self.steps.iter_mut().filter_map(Step::plain_mut);
        plain.flat_map(Plain::take_news).collect()
    }

    /// The columns that steps name and that none of the tables has which they met, if any.
    pub fn unmatched(&self) -> Vec<Unmatched> {
        self.names().filter_map(Name::unmatched).collect()
    }

    /// How many of them met a table and let values through that were to be hidden or taken away.
    pub fn count_unmatched(&self) -> usize {
        self.names().filter(|name| name.bares()).count()
    }

    fn names(&self) -> impl Iterator<Item = &Name> {
        self.steps.iter().filter_map(Step::plain).flat_map(Plain::names)
    }

    /// The keys that a change keeps its order by where a rule fails on it: its own, and those that
    /// its messages would have as far as the other rules tell.
    pub fn keys_despite(&mut self, change: &Change) -> Keys {
        let mut parts = self.parts_despite(change).into_iter();
        let mut keys = parts.next().map_or_else(|| change.keys(), |part| part.keys());
        parts.for_each(|part| keys.join(part.keys()));
        keys
    }

    fn parts_despite(&mut self, change: &Change) -> Vec<Change> {
        if let Some(event) = self.outbox.as_mut().and_then(|outbox| outbox.keyed(change)) {
            return vec![event];
        }
        let mut parts = vec![change.clone()];
        for step in &mut self.steps {
            match step.apply(parts.clone(), &mut self.columns) {
                Ok(made) if !made.is_empty() => parts = made,
                _ => {}
            }
        }
        for part in &mut parts {
            if let Ok(Some(key)) = self.message.key_of(part, &mut self.columns) {
                part.shaped_mut().key.get_or_insert(key);
            }
            part.keep_keys_of(change);
        }
        parts
    }

    fn run(&mut self, change: Change) -> Result<Shape> {
        if let Some(condition) = &self.condition {
            let columns = columns_of(&mut self.columns, &change)?;
            if !condition.holds(&View::new(&change, &columns))? {
                return Ok(Shape::LeftOut(condition.rule().to_owned()));
            }
        }
        let change = match &mut self.outbox {
            None => change,
            Some(outbox) => match outbox.sort(change)? {
                Sorted::Event(event) => return Ok(Shape::Passed(vec![event])),
                Sorted::Nothing => return Ok(Shape::LeftOut("outbox".to_owned())),
                Sorted::Other(change) => change,
            },
        };
        let source = change.clone();
        let mut parts = vec![change];
        for step in &mut self.steps {
            parts = step.apply(parts, &mut self.columns)?;
            if parts.is_empty() {
                return Ok(Shape::LeftOut(step.rule().to_owned()));
            }
        }
        let last = parts.len() - 1;
        for (number, part) in parts.iter_mut().enumerate() {
            self.message.apply(part, &mut self.columns)?;
            part.keep_keys_of(&source);
            part.closes_transaction = source.closes_transaction && number == last;
            if last > 0 {
                part.shaped_mut().part = u32::try_from(number).unwrap_or(u32::MAX);
            }
        }
        Ok(Shape::Passed(parts))
    }
}

impl MessageRules {
    fn is_empty(&self) -> bool {
        self.route.is_none() && self.key.is_none() && self.headers.is_empty()
    }

    /// The key that the expression gives; `None` where there is no expression, or no row to read.
    fn key_of(
        &self,
        change: &Change,
        columns: &mut ByTable<(), Arc<Columns>>,
    ) -> Result<Option<String>> {
        let (Some(expression), Some(_)) = (&self.key, change.key_row()) else { return Ok(None) };
        let columns = columns_of(columns, change)?;
        expression.text(&View::new(change, &columns))
    }

    /// Decides what no function has decided yet. A change without a row keeps the sink's own where
    /// an expression needs one.
    fn apply(&self, change: &mut Change, columns: &mut ByTable<(), Arc<Columns>>) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let columns = columns_of(columns, change)?;
        let view = View::new(change, &columns);
        let text = |expression: &Expression| match expression.text(&view) {
            Err(_) if !view.has_row() => Ok(None),
            text => text,
        };
        let optional = |expression: &Option<Expression>| match expression {
            Some(expression) => text(expression),
            None => Ok(None),
        };
        let (route, key) = (optional(&self.route)?, optional(&self.key)?);
        let mut headers = Vec::with_capacity(self.headers.len());
        for (name, expression) in &self.headers {
            if let Some(value) = text(expression)? {
                headers.push((name.clone(), value));
            }
        }
        if route.is_none() && key.is_none() && headers.is_empty() {
            return Ok(());
        }
        let shaped = change.shaped_mut();
        shaped.route = shaped.route.take().or(route);
        shaped.key = shaped.key.take().or(key);
        headers.retain(|(name, _)| !shaped.headers.iter().any(|(other, _)| other == name));
        shaped.headers.extend(headers);
        Ok(())
    }
}

/// The steps; adjacent ones that only choose, rename and hide columns are one.
fn steps(rules: &config::Rules) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    let mut run = Plain::new(rules.mask_key.as_ref(), false);
    for (index, step) in rules.transform.iter().enumerate() {
        let rule = format!("transform[{index}]");
        if run.add(&rule, step).context(|| rule.clone())? {
            continue;
        }
        if !run.is_empty() {
            steps.push(Step::Plain(run));
        }
        run = Plain::new(rules.mask_key.as_ref(), true);
        steps.push(Step::new(&rule, step)?);
    }
    if !run.is_empty() {
        steps.push(Step::Plain(run));
    }
    Ok(steps)
}

/// The columns of the change's table; none for a message.
fn columns_of(columns: &mut ByTable<(), Arc<Columns>>, change: &Change) -> Result<Arc<Columns>> {
    match &change.table {
        Some(table) => columns.get(table, (), || Ok(Arc::new(Columns::of(table)))),
        None => Ok(Arc::default()),
    }
}
