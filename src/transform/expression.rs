//! CEL expressions over a change (<https://github.com/google/cel-spec>), compiled once; what an
//! expression does not name is not even looked at.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{Arc, LazyLock},
};

use cel::{
    Context, Env, ExecutionError, IdedExpr, Program, Value as Cel,
    common::ast::{EntryExpr, Expr, LiteralValue},
    extensions,
    objects::{Key, Map},
};
use serde_json::Value as Json;

use super::view::{Side, View};
use crate::{
    change::{Change, Op},
    error::{Error, Result},
};

const VARIABLES: [&str; 8] =
    ["record", "before", "changes", "op", "table", "schema", "metadata", "message"];
/// Names of types, which an expression may compare with.
const TYPES: [&str; 12] = [
    "bool",
    "bytes",
    "double",
    "duration",
    "dyn",
    "int",
    "list",
    "map",
    "null_type",
    "string",
    "timestamp",
    "uint",
];
/// More significant digits than this a double cannot hold.
const DOUBLE_DIGITS: usize = 15;

/// The functions of CEL and of its extensions for strings, lists, mathematics and base64.
static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    // A conflict of names would only leave an extension out, and is seen by the tests.
    let _ = env.add_extension(extensions::strings);
    let _ = env.add_extension(extensions::lists);
    let _ = env.add_extension(extensions::math);
    let _ = env.add_extension(extensions::encoders);
    Arc::new(env)
});

/// An expression and what it reads.
pub(super) struct Expression {
    program: Program,
    /// The rule that it stands for, such as `transform[0].set.total`.
    rule: String,
    reads: Reads,
}

/// Which variables an expression names, and which columns of those that are rows.
#[derive(Debug, Default)]
struct Reads {
    variables: BTreeSet<String>,
    record: Columns,
    before: Columns,
}

/// Columns that an expression names.
#[derive(Debug)]
enum Columns {
    Named(BTreeSet<String>),
    All,
}

impl Default for Columns {
    fn default() -> Self {
        Self::Named(BTreeSet::new())
    }
}

impl Columns {
    fn add(&mut self, name: &str) {
        if let Self::Named(names) = self {
            names.insert(name.to_owned());
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Named(names) => names.contains(name),
            Self::All => true,
        }
    }
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expression").field("rule", &self.rule).field("reads", &self.reads).finish()
    }
}

impl Expression {
    /// Compiles the expression of a rule; a mistake is an error of class `Config` with line and
    /// column.
    pub(super) fn compile(rule: &str, text: &str) -> Result<Self> {
        let program = ENV.compile(text).map_err(|errors| {
            let (place, message) = errors
                .errors
                .first()
                .map_or((None, String::new()), |error| (Some(error.pos), error.msg.clone()));
            let (line, column) = place.unwrap_or_default();
            let at =
                Place { line: line.max(1).unsigned_abs(), column: column.max(1).unsigned_abs() };
            mistake(rule, at, &message)
        })?;
        let mut walk =
            Walk { rule, text, program: &program, bound: Vec::new(), reads: Reads::default() };
        walk.expression(program.expression())?;
        let reads = walk.reads;
        Ok(Self { program, rule: rule.to_owned(), reads })
    }

    /// The rule that it stands for.
    pub(super) fn rule(&self) -> &str {
        &self.rule
    }

    /// Its value for a change; `record` is the row that `side` names.
    pub(super) fn evaluate(&self, view: &View<'_>, side: Side) -> Result<Cel, Failure> {
        let mut context = Context::with_env(Arc::clone(&ENV));
        for name in &self.reads.variables {
            context.add_variable_from_value(name.as_str(), self.variable(name, view, side));
        }
        self.program.execute(&context).map_err(|error| Failure { error, side })
    }

    /// The same as JSON.
    pub(super) fn json(&self, view: &View<'_>, side: Side) -> Result<Json> {
        let value = self.evaluate(view, side).map_err(|failure| self.explain(failure, view))?;
        value.json().map_err(|_| {
            let got = value.type_of();
            Error::data(format!("{} gives a {got}, which no column can hold", self.rule))
        })
    }

    /// The same as text; `None` for null.
    pub(super) fn text(&self, view: &View<'_>) -> Result<Option<String>> {
        match self.json(view, Side::Record)? {
            Json::Null => Ok(None),
            Json::String(text) => Ok(Some(text)),
            Json::Array(_) | Json::Object(_) => {
                Err(Error::data(format!("{} gives no text", self.rule))
                    .remedy("a string, a number or a boolean is wanted"))
            }
            scalar => Ok(Some(scalar.to_string())),
        }
    }

    /// Whether it is true; an expression that needs a row says nothing about a change without one.
    pub(super) fn holds(&self, view: &View<'_>) -> Result<bool> {
        match self.evaluate(view, Side::Record) {
            Ok(Cel::Bool(holds)) => Ok(holds),
            Ok(value) => Err(Error::data(format!(
                "{} gives a {} where true or false is wanted",
                self.rule,
                value.type_of()
            ))),
            Err(Failure { error: ExecutionError::NoSuchKey(_), .. }) if !view.has_row() => Ok(true),
            Err(failure) => Err(self.explain(failure, view)),
        }
    }

    fn variable(&self, name: &str, view: &View<'_>, side: Side) -> Cel {
        let change = view.change();
        match name {
            "record" => row(view, side, &self.reads.record),
            "before" => row(view, Side::Before, &self.reads.before),
            "changes" => changes(view),
            "op" => Cel::from(change.op.word()),
            "table" => Cel::from(change.table.as_ref().map_or("", |table| table.name.as_str())),
            "schema" => Cel::from(change.table.as_ref().map_or("", |table| table.schema.as_str())),
            "metadata" => from_json(metadata(change)),
            _ => from_json(message(change)),
        }
    }

    /// The error of class `Data` of a failed evaluation: names and types, but no value of the row.
    pub(super) fn explain(&self, failure: Failure, view: &View<'_>) -> Error {
        let rule = &self.rule;
        let of = |value: &Cel| value.type_of().to_string();
        let (what, remedy) = match failure.error {
            ExecutionError::NoSuchKey(name) => return self.lacks(&name, failure.side, view),
            ExecutionError::NoSuchOverload(error) => {
                let null =
                    error.argument_types().iter().any(|ty| ty == "null_type" || ty == "null");
                let remedy = if null {
                    "guard what may be null: `record.x != null && record.x > 1`"
                } else {
                    "convert one side: double(record.x), int(record.x), string(record.x)"
                };
                (error.to_string(), remedy)
            }
            ExecutionError::ValuesNotComparable(left, right) => {
                let what = format!("a {} cannot be compared with a {}", of(&left), of(&right));
                (what, "guard what may be null, or convert one side")
            }
            ExecutionError::UnsupportedBinaryOperator(operator, left, right) => {
                let what = format!("`{operator}` does not take {} and {}", of(&left), of(&right));
                (what, "convert one side: double(record.x), int(record.x), string(record.x)")
            }
            ExecutionError::Overflow(operator, ..) => (format!("`{operator}` overflows"), ""),
            ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => {
                ("division by zero".to_owned(), "")
            }
            ExecutionError::IndexOutOfBounds(_) => ("index out of bounds".to_owned(), ""),
            ExecutionError::FunctionError { function, .. } => {
                (format!("`{function}` does not take the value that it got"), "")
            }
            ExecutionError::UnexpectedType { got, want } => {
                (format!("a {got} where a {want} is wanted"), "")
            }
            ExecutionError::UndeclaredReference(name) => (format!("there is no `{name}`"), ""),
            _ => ("it does not fit the types of the values".to_owned(), ""),
        };
        let error = Error::data(format!("{rule} fails: {what}"));
        if remedy.is_empty() { error } else { error.remedy(remedy) }
    }

    fn lacks(&self, name: &str, side: Side, view: &View<'_>) -> Error {
        let rule = &self.rule;
        if !view.has_row() {
            let word = view.change().op.word();
            return Error::data(format!("{rule} reads `{name}`, but a {word} has no row"))
                .remedy("name the operations of the step, or guard with `op`");
        }
        let table = view.change().table.as_ref().map(|table| table.full_name()).unwrap_or_default();
        if !self.reads.record.has(name) && !self.reads.before.has(name) {
            return Error::data(format!("{rule} reads `{name}`, which is not there"))
                .remedy("guard it: has(record.column.name)");
        }
        if view.is_unchanged(side, name) {
            return Error::data(format!(
                "{rule} reads `{name}` of {table}, a large value that the update left alone and \
                 that PostgreSQL did not send"
            ))
            .remedy(full(&table));
        }
        if view.has_column(name) {
            return Error::data(format!(
                "{rule} reads `{name}` of {table}, which the old row of this {} does not carry",
                view.change().op.word()
            ))
            .remedy(format!("{}, or guard it: has(record.{name})", full(&table)));
        }
        Error::data(format!("{rule} reads `{name}`, but {table} has no such column"))
            .remedy("limit the step to the tables that have it, or guard it with has(...)")
    }
}

fn full(table: &str) -> String {
    format!("ALTER TABLE {table} REPLICA IDENTITY FULL")
}

/// Why an evaluation ended without a value.
#[derive(Debug)]
pub(super) struct Failure {
    error: ExecutionError,
    side: Side,
}

/// Line and column, from 1.
struct Place {
    line: usize,
    column: usize,
}

fn mistake(rule: &str, Place { line, column }: Place, what: &str) -> Error {
    let what = what.trim().trim_start_matches("Syntax error: ");
    Error::config(format!("`{rule}`, line {line}, column {column}: {what}"))
        .remedy("docs/transforms.md has the variables and functions of expressions")
}

fn row(view: &View<'_>, side: Side, wanted: &Columns) -> Cel {
    let mut members = HashMap::new();
    view.each(side, |name, value| {
        if wanted.has(name) {
            members.insert(Key::String(Arc::clone(name)), value());
        }
    });
    Cel::Map(Map { map: Arc::new(members) })
}

/// The old values of the columns that an update changed, as far as they are known.
fn changes(view: &View<'_>) -> Cel {
    let mut members = HashMap::new();
    if view.change().op == Op::Update {
        view.each(Side::Changed, |name, value| {
            members.insert(Key::String(Arc::clone(name)), value());
        });
    }
    Cel::Map(Map { map: Arc::new(members) })
}

/// Where a change stands in the source's history.
pub(super) fn metadata(change: &Change) -> Json {
    serde_json::json!({
        "commit_timestamp": change.transaction.commit_time.to_string(),
        "commit_lsn": change.transaction.commit_lsn.0,
        "commit_idx": change.index,
        "tx_id": change.transaction.xid,
    })
}

/// A logical message; empty for any other change.
pub(super) fn message(change: &Change) -> Json {
    match &change.message {
        None => Json::Object(serde_json::Map::new()),
        Some(message) => serde_json::json!({
            "prefix": message.prefix,
            "content": std::str::from_utf8(&message.content).ok(),
        }),
    }
}

/// JSON as CEL sees it: whole numbers are `int`, other numbers `double`.
pub(super) fn from_json(json: Json) -> Cel {
    match json {
        Json::Null => Cel::Null,
        Json::Bool(is) => Cel::Bool(is),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Cel::Int(whole),
            (None, Some(whole)) => Cel::UInt(whole),
            _ => Cel::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Cel::String(Arc::new(text)),
        Json::Array(items) => Cel::List(Arc::new(items.into_iter().map(from_json).collect())),
        Json::Object(members) => {
            let member = |(name, value)| (Key::String(Arc::new(name)), from_json(value));
            Cel::Map(Map { map: Arc::new(members.into_iter().map(member).collect()) })
        }
    }
}

/// A `numeric`: a double where that holds every digit, else its text.
pub(super) fn from_numeric(text: &str) -> Cel {
    let (mantissa, _) = text.split_once(['e', 'E']).unwrap_or((text, ""));
    let digits = mantissa.trim_start_matches(['-', '0', '.']);
    let digits = if digits.contains('.') || mantissa.trim_start_matches('-').starts_with("0.") {
        digits.trim_end_matches('0')
    } else {
        digits
    };
    let count = digits.bytes().filter(u8::is_ascii_digit).count();
    match text.parse::<f64>() {
        Ok(number) if count <= DOUBLE_DIGITS && number.is_finite() => Cel::Float(number),
        _ => Cel::from(text),
    }
}

/// Collects what an expression reads, and refuses names that nothing has.
struct Walk<'a> {
    rule: &'a str,
    text: &'a str,
    program: &'a Program,
    /// Variables of macros such as `exists`.
    bound: Vec<String>,
    reads: Reads,
}

impl Walk<'_> {
    fn expression(&mut self, node: &IdedExpr) -> Result<()> {
        match &node.expr {
            Expr::Ident(name) => self.name(name, node),
            Expr::Select(select) => match self.row_of(&select.operand) {
                Some(row) => {
                    self.column(&row, &select.field);
                    Ok(())
                }
                None => self.expression(&select.operand),
            },
            Expr::Call(call) => self.call(node, call),
            Expr::List(list) => list.elements.iter().try_for_each(|item| self.expression(item)),
            Expr::Map(map) => map.entries.iter().try_for_each(|entry| self.entry(&entry.expr)),
            Expr::Struct(it) => it.entries.iter().try_for_each(|entry| self.entry(&entry.expr)),
            Expr::Comprehension(it) => {
                self.expression(&it.iter_range)?;
                self.expression(&it.accu_init)?;
                let bound = self.bound.len();
                self.bound.extend([it.iter_var.clone(), it.accu_var.clone()]);
                self.bound.extend(it.iter_var2.clone());
                for part in [&it.loop_cond, &it.loop_step, &it.result] {
                    self.expression(part)?;
                }
                self.bound.truncate(bound);
                Ok(())
            }
            Expr::Literal(_) | Expr::Unspecified => Ok(()),
        }
    }

    fn entry(&mut self, entry: &EntryExpr) -> Result<()> {
        match entry {
            EntryExpr::StructField(field) => self.expression(&field.value),
            EntryExpr::MapEntry(entry) => {
                self.expression(&entry.key)?;
                self.expression(&entry.value)
            }
        }
    }

    fn call(&mut self, node: &IdedExpr, call: &cel::common::ast::CallExpr) -> Result<()> {
        if let ("_[_]", [operand, index]) = (call.func_name.as_str(), call.args.as_slice())
            && let Some(row) = self.row_of(operand)
            && let Expr::Literal(LiteralValue::String(name)) = &index.expr
        {
            self.column(&row, name.inner());
            return Ok(());
        }
        let qualified = call.target.as_ref().and_then(|target| match &target.expr {
            Expr::Ident(space) => Some(format!("{space}.{}", call.func_name)),
            _ => None,
        });
        let in_space = qualified.is_some_and(|name| is_function(&name));
        if !in_space {
            let named = call.func_name.starts_with(|c: char| c.is_ascii_alphabetic());
            if named && !is_function(&call.func_name) {
                return Err(
                    self.refuse(node, &format!("there is no function `{}`", call.func_name))
                );
            }
            if let Some(target) = &call.target {
                self.expression(target)?;
            }
        }
        call.args.iter().try_for_each(|argument| self.expression(argument))
    }

    /// `record` or `before`, where the node is just that.
    fn row_of(&self, node: &IdedExpr) -> Option<String> {
        match &node.expr {
            Expr::Ident(name) if matches!(name.as_str(), "record" | "before") => {
                (!self.bound.contains(name)).then(|| name.clone())
            }
            _ => None,
        }
    }

    fn column(&mut self, row: &str, column: &str) {
        self.reads.variables.insert(row.to_owned());
        let columns = if row == "record" { &mut self.reads.record } else { &mut self.reads.before };
        columns.add(column);
    }

    fn name(&mut self, name: &str, node: &IdedExpr) -> Result<()> {
        if name.starts_with('@') || self.bound.iter().any(|bound| bound == name) {
            return Ok(());
        }
        if VARIABLES.contains(&name) {
            self.reads.variables.insert(name.to_owned());
            match name {
                "record" => self.reads.record = Columns::All,
                "before" => self.reads.before = Columns::All,
                _ => {}
            }
            return Ok(());
        }
        if TYPES.contains(&name) {
            return Ok(());
        }
        let what = format!("there is no variable `{name}`");
        Err(self.refuse(node, &what).remedy(format!(
            "columns are record.{name} and before.{name}; the variables are {}",
            VARIABLES.join(", ")
        )))
    }

    fn refuse(&self, node: &IdedExpr, what: &str) -> Error {
        let start = self.program.source_info().offset_for(node.id).map_or(0, |(start, _)| start);
        let before = self.text.get(..start as usize).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        mistake(self.rule, Place { line, column }, what)
    }
}

/// Whether the library has a function or method of this name: it does not let us add one.
fn is_function(name: &str) -> bool {
    Context::with_env(Arc::clone(&ENV)).add_function(name, || true).is_err()
}
