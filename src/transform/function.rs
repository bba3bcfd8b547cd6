//! Functions in Luau (<https://luau.org>), each in a sandbox of its own with limits of time and
//! memory. What a function leaves alone keeps its exact text.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use mlua::{Lua, LuaOptions, LuaSerdeExt, StdLib, Table as LuaTable, Value as LuaValue, VmState};
use serde_json::{Map, Value as Json};

use super::{
    edit::{Cell, Edit, Layouts, RowEdit},
    expression::metadata,
    view::{Columns, Side, View},
};
use crate::{
    change::{Before, Change, Value},
    config,
    error::{Class, Classify, Error, Result},
};

/// Whole numbers beyond this are strings in Luau, whose numbers are doubles.
const EXACT_MAX: u64 = 1 << 53;
/// To load the source may take this long at least: it happens at the start and after a failure, and
/// a machine that is busy just then is no mistake in the rule.
const LOAD_TIME: Duration = Duration::from_secs(5);
/// What could reach out of the sandbox, or make a replay differ.
const REMOVED: [&str; 7] =
    ["print", "require", "loadstring", "collectgarbage", "getfenv", "setfenv", "newproxy"];

/// A compiled function.
pub(super) struct Function {
    /// The rule that it stands for, such as `transform[1].function`.
    rule: String,
    source: String,
    time_max: Duration,
    bytes_max: usize,
    /// `None` after a failure: the next call begins with a new one.
    state: Option<State>,
    layouts: Layouts,
}

struct State {
    lua: Lua,
    transform: mlua::Function,
    clock: Clock,
}

/// When the call that runs has to end.
#[derive(Clone)]
struct Clock {
    base: Instant,
    deadline_us: Arc<AtomicU64>,
    limit_ms: Arc<AtomicU64>,
}

impl Clock {
    fn start(&self, limit: Duration) {
        self.limit_ms.store(micros(limit) / 1000, Ordering::Relaxed);
        self.deadline_us.store(micros(self.base.elapsed() + limit), Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        micros(self.base.elapsed()) > self.deadline_us.load(Ordering::Relaxed)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("rule", &self.rule).finish_non_exhaustive()
    }
}

impl Function {
    /// Compiles the function of a step; a mistake is an error of class `Config` with its line.
    pub(super) fn new(rule: &str, step: &config::Step) -> Result<Self> {
        let (source, rule) = match (&step.function, &step.function_file) {
            (Some(source), _) => (source.clone(), format!("{rule}.function")),
            (None, Some(path)) => {
                let source = std::fs::read_to_string(path).class(Class::Config, || {
                    format!("`{rule}.function_file`: cannot read {}", path.display())
                })?;
                (source, path.display().to_string())
            }
            (None, None) => (String::new(), rule.to_owned()),
        };
        let mut function = Self {
            rule,
            source,
            time_max: Duration::from_millis(step.function_ms_max),
            bytes_max: step.function_bytes_max,
            state: None,
            layouts: Layouts::default(),
        };
        function.state = Some(function.start()?);
        Ok(function)
    }

    /// The rule that it stands for.
    pub(super) fn rule(&self) -> &str {
        &self.rule
    }

    /// What the function makes of a change.
    pub(super) fn apply(&mut self, change: &Change, columns: &Columns) -> Result<Vec<Change>> {
        let state = match self.state.take() {
            Some(state) => state,
            None => self.start()?,
        };
        state.clock.start(self.time_max);
        let replies = match self.call(&state, &View::new(change, columns)) {
            Ok(replies) => replies,
            Err(error) => {
                let rule = &self.rule;
                return Err(Error::data(format!("{rule} fails: {}", first_line(&error))));
            }
        };
        self.state = Some(state);
        let mut parts = Vec::with_capacity(replies.len());
        for reply in replies {
            let mut part = change.clone();
            self.take(reply, &mut part, columns)?;
            parts.push(part);
        }
        Ok(parts)
    }

    fn start(&self) -> Result<State> {
        let (deadline_us, limit_ms) = (Arc::default(), Arc::default());
        let clock = Clock { base: Instant::now(), deadline_us, limit_ms };
        clock.start(self.time_max.max(LOAD_TIME));
        let made = self.load(&clock).map_err(|error| {
            Error::config(format!("`{}` does not compile: {}", self.rule, first_line(&error)))
                .remedy("docs/transforms.md shows what a function looks like")
        });
        let (lua, transform) = made?;
        Ok(State { lua, transform, clock })
    }

    fn load(&self, clock: &Clock) -> mlua::Result<(Lua, mlua::Function)> {
        let libraries = StdLib::TABLE
            | StdLib::STRING
            | StdLib::UTF8
            | StdLib::BIT
            | StdLib::MATH
            | StdLib::BUFFER;
        let lua = Lua::new_with(libraries, LuaOptions::default())?;
        let globals = lua.globals();
        for name in REMOVED {
            globals.raw_set(name, LuaValue::Nil)?;
        }
        let math: LuaTable = globals.get("math")?;
        math.raw_set("random", LuaValue::Nil)?;
        math.raw_set("randomseed", LuaValue::Nil)?;
        globals.raw_set("null", lua.null())?;
        lua.sandbox(true)?;
        lua.set_memory_limit(self.bytes_max)?;
        let watch = clock.clone();
        lua.set_interrupt(move |_| match watch.is_over() {
            false => Ok(VmState::Continue),
            true => {
                let limit = watch.limit_ms.load(Ordering::Relaxed);
                Err(mlua::Error::runtime(format!("it takes longer than {limit} ms")))
            }
        });
        lua.load(&self.source).set_name(format!("={}", self.rule)).exec()?;
        let globals = lua.globals();
        let transform = match globals.get::<LuaValue>("transform")? {
            LuaValue::Function(transform) => transform,
            _ => return Err(mlua::Error::runtime("it defines no `function transform(change)`")),
        };
        globals.set_readonly(true);
        Ok((lua, transform))
    }

    fn call(&self, state: &State, view: &View<'_>) -> mlua::Result<Vec<Reply>> {
        let lua = &state.lua;
        let given = give(lua, view)?;
        let returned: LuaValue = state.transform.call(given)?;
        let returned = match returned {
            LuaValue::Nil | LuaValue::Boolean(false) => return Ok(Vec::new()),
            LuaValue::Table(table) => table,
            other => {
                let kind = other.type_name();
                let what =
                    format!("it returns a {kind}: a change, a list of changes or nil is wanted");
                return Err(mlua::Error::runtime(what));
            }
        };
        if returned.raw_len() == 0 && returned.contains_key("op")? {
            return Ok(vec![reply(lua, &returned, view)?]);
        }
        let changes = returned.sequence_values::<LuaTable>();
        changes.map(|change| reply(lua, &change?, view)).collect()
    }

    /// Writes what came back into a copy of the change.
    fn take(&mut self, reply: Reply, part: &mut Change, columns: &Columns) -> Result<()> {
        let view = View::new(part, columns);
        if view.has_row() {
            let edit = self.edit(&reply, &view)?;
            if !edit.is_nothing() {
                self.layouts.apply(part, columns, &edit)?;
            }
        }
        let old = part.shaped.as_deref();
        let same = old.map_or_else(
            || reply.route.is_none() && reply.key.is_none() && reply.headers.is_empty(),
            |old| old.route == reply.route && old.key == reply.key && old.headers == reply.headers,
        );
        if !same || reply.payload.is_some() {
            let shaped = part.shaped_mut();
            (shaped.route, shaped.key, shaped.headers) = (reply.route, reply.key, reply.headers);
            shaped.payload = reply.payload.or(shaped.payload.take());
        }
        Ok(())
    }

    fn edit(&self, reply: &Reply, view: &View<'_>) -> Result<Edit> {
        let Some(record) = &reply.record else {
            let rule = &self.rule;
            return Err(Error::data(format!("{rule} returns a change without its record")).remedy(
                "return nil to leave the change out; set columns to nil to take them away",
            ));
        };
        let names = |members: &Map<String, Json>| {
            let added = members.keys().filter(|name| !view.has_column(name));
            added.cloned().collect::<Vec<_>>()
        };
        let mut added = names(record);
        let two_rows = view.change().after.is_some() && view.change().before.row().is_some();
        let before = reply.before.as_ref().filter(|_| two_rows);
        if let Some(before) = before {
            added.extend(names(before));
        }
        added.sort();
        added.dedup();
        let record = row_edit(view, Side::Record, record, &added);
        let before = before.map(|before| row_edit(view, Side::Before, before, &added));
        Ok(Edit { added, record, before })
    }
}

/// Compares what came back with what was given, column by column.
fn row_edit(view: &View<'_>, side: Side, back: &Map<String, Json>, added: &[String]) -> RowEdit {
    let mut edit = RowEdit::same(view.width(), added.len());
    let mut known = vec![false; view.width()];
    view.values(side, |index, value| {
        if let Some(known) = known.get_mut(index) {
            *known = true;
        }
        let given = seen(view, index, value);
        let cell = match (given, back.get(view.name(index))) {
            (Some(Json::Null), None) => Cell::Same,
            (None, _) => Cell::Same, // bytes that are not UTF-8 were not given
            (Some(_), None) => Cell::Gone,
            (Some(given), Some(back)) if is_same(&given, back) => Cell::Same,
            (_, Some(back)) => Cell::New(back.clone()),
        };
        if let Some(place) = edit.cells.get_mut(index) {
            *place = cell;
        }
    });
    for (index, known) in known.into_iter().enumerate() {
        if let (false, Some(back)) = (known, back.get(view.name(index)))
            && let Some(place) = edit.cells.get_mut(index)
        {
            *place = Cell::New(back.clone());
        }
    }
    for (place, name) in edit.added.iter_mut().zip(added) {
        *place = back.get(name).cloned();
    }
    if side == Side::Record {
        edit.added.iter_mut().for_each(|value| *value = Some(value.take().unwrap_or_default()));
    }
    edit
}

/// What a function returned for one change.
#[derive(Debug)]
struct Reply {
    record: Option<Map<String, Json>>,
    before: Option<Map<String, Json>>,
    route: Option<String>,
    key: Option<String>,
    headers: Vec<(String, String)>,
    payload: Option<Bytes>,
}

/// The change as a table.
fn give(lua: &Lua, view: &View<'_>) -> mlua::Result<LuaTable> {
    let change = view.change();
    let given = lua.create_table()?;
    given.raw_set("op", change.op.word())?;
    if let Some(table) = &change.table {
        given.raw_set("table", table.name.as_str())?;
        given.raw_set("schema", table.schema.as_str())?;
    }
    if view.has_row() {
        given.raw_set("record", give_row(lua, view, Side::Record)?)?;
        given.raw_set("changes", give_row(lua, view, Side::Changed)?)?;
    }
    if !matches!(change.before, Before::Nothing) {
        given.raw_set("before", give_row(lua, view, Side::Before)?)?;
    }
    let metadata = lua.to_value(&metadata(change))?;
    if let LuaValue::Table(metadata) = &metadata {
        // beyond what a double holds, one day
        metadata.raw_set("commit_lsn", change.transaction.commit_lsn.0.to_string())?;
    }
    given.raw_set("metadata", metadata)?;
    if let Some(message) = &change.message {
        let made = lua.create_table()?;
        made.raw_set("prefix", message.prefix.as_str())?;
        made.raw_set("content", lua.create_string(&message.content)?)?;
        given.raw_set("message", made)?;
    }
    let shaped = change.shaped.as_deref();
    given.raw_set("route", shaped.and_then(|shaped| shaped.route.as_deref()))?;
    given.raw_set("key", shaped.and_then(|shaped| shaped.key.as_deref()))?;
    let headers = lua.create_table()?;
    for (name, value) in shaped.map_or(&[][..], |shaped| &shaped.headers) {
        headers.raw_set(name.as_str(), value.as_str())?;
    }
    given.raw_set("headers", headers)?;
    Ok(given)
}

/// A row as a table: NULL is nil, and so is what was not sent.
fn give_row(lua: &Lua, view: &View<'_>, side: Side) -> mlua::Result<LuaTable> {
    let row = lua.create_table()?;
    let mut result = Ok(());
    view.values(side, |index, value| {
        let Some(json) = seen(view, index, value).filter(|json| !json.is_null()) else { return };
        let set = lua.to_value(&json).and_then(|value| row.raw_set(view.name(index), value));
        if let (Ok(()), Err(error)) = (&result, set) {
            result = Err(error);
        }
    });
    result.map(|()| row)
}

/// A value as Luau sees it: whole numbers that a double does not hold are strings.
fn seen(view: &View<'_>, index: usize, value: Value<'_>) -> Option<Json> {
    match view.json(index, value)? {
        Json::Number(n) if n.as_i64().is_some_and(|n| n.unsigned_abs() > EXACT_MAX) => {
            Some(Json::String(n.to_string()))
        }
        json => Some(json),
    }
}

/// Whether Luau could not tell the two apart.
fn is_same(left: &Json, right: &Json) -> bool {
    match (left, right) {
        (Json::Number(left), Json::Number(right)) => left.as_f64() == right.as_f64(),
        (Json::Array(left), Json::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(l, r)| is_same(l, r))
        }
        (Json::Object(left), Json::Object(right)) => {
            let same = |(name, value)| right.get(name).is_some_and(|other| is_same(value, other));
            left.len() == right.len() && left.iter().all(same)
        }
        (left, right) => left == right,
    }
}

fn reply(lua: &Lua, returned: &LuaTable, view: &View<'_>) -> mlua::Result<Reply> {
    let change = view.change();
    let names = change.table.as_ref().map(|table| (table.name.as_str(), table.schema.as_str()));
    for (field, was) in [
        ("op", Some(change.op.word())),
        ("table", names.map(|names| names.0)),
        ("schema", names.map(|names| names.1)),
    ] {
        let is: Option<String> = returned.get(field)?;
        if is.as_deref() != was {
            let what = format!("it changes `{field}`, which stays as it is; `route` may change");
            return Err(mlua::Error::runtime(what));
        }
    }
    let row = |field: &str| -> mlua::Result<Option<Map<String, Json>>> {
        match returned.get::<LuaValue>(field)? {
            LuaValue::Nil => Ok(None),
            value => match lua.from_value::<Json>(value)? {
                Json::Object(members) => Ok(Some(members)),
                _ => Err(mlua::Error::runtime(format!("`{field}` is no table of columns"))),
            },
        }
    };
    let text = |field: &str| -> mlua::Result<Option<String>> { returned.get(field) };
    let mut headers = Vec::new();
    if let Some(table) = returned.get::<Option<LuaTable>>("headers")? {
        for pair in table.pairs::<String, LuaValue>() {
            let (name, value) = pair?;
            let value = match value {
                LuaValue::Boolean(is) => is.to_string(),
                value => value.to_string()?,
            };
            headers.push((name, value));
        }
        headers.sort();
    }
    let payload = match returned.get::<LuaValue>("payload")? {
        LuaValue::Nil => None,
        LuaValue::String(text) => Some(Bytes::copy_from_slice(&text.as_bytes())),
        value => Some(Bytes::from(lua.from_value::<Json>(value)?.to_string())),
    };
    Ok(Reply {
        record: row("record")?,
        before: row("before")?,
        route: text("route")?,
        key: text("key")?,
        headers,
        payload,
    })
}

/// Without the trace of calls, and without the name of the kind of error.
fn first_line(error: &mlua::Error) -> String {
    let text = match error {
        mlua::Error::CallbackError { cause, .. } => return first_line(cause),
        mlua::Error::RuntimeError(text) => text.clone(),
        mlua::Error::SyntaxError { message, .. } => message.clone(),
        mlua::Error::MemoryError(_) => "it takes more memory than it may".to_owned(),
        other => other.to_string(),
    };
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("runtime error: ").unwrap_or(line).to_owned()
}
