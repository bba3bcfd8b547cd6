//! A string for each row: a cache that follows the tables, and forgets what they forgot.

use ::redis::{Pipeline, cmd, pipe};
use async_trait::async_trait;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Server, VALUE_BYTES_MAX, check_size};
use crate::{
    change::{Batch, Before, Change, Op, Value},
    config::{self, Format, RedisOnDelete, RedisOnTruncate, RedisOnUpdate, RedisStringPayload},
    error::{Class, Classify, Error, Result},
    failpoint,
    format::{Encoder, Template},
    sink::{Capabilities, Carries, Context, Progress, Sink, With, Written},
};

/// Keys that one SCAN looks at, about.
const SCAN_KEYS: usize = 1_000;

const WHOLE_ROWS: &str = "let the table send whole old rows: \
                          ALTER TABLE ... REPLICA IDENTITY FULL";

/// The `redis_string` sink.
pub(in crate::sink) struct Strings {
    server: Server,
    encoder: Encoder,
    key: Template,
    /// What the keys of a table begin with, where a truncate deletes them.
    prefix: Option<Template>,
    payload: RedisStringPayload,
    ttl_ms: u64,
    on_update: RedisOnUpdate,
    on_delete: RedisOnDelete,
    context: Context,
}

/// What is done in order.
enum Step {
    Commands(Pipeline),
    /// Deletes the keys that begin so.
    DeleteAll(String),
}

/// The row in a native or Sequin message.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, alias = "record")]
    after: &'a RawValue,
}

impl Strings {
    pub(in crate::sink) fn new(options: &config::RedisString, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        let format = match (options.payload, format) {
            (RedisStringPayload::Message, format) => format,
            // Its values are written in Sequin's way, all others as `to_jsonb` does.
            (RedisStringPayload::Record, Format::Sequin) => Format::Sequin,
            (RedisStringPayload::Record, _) => Format::Native,
        };
        let prefix = match options.on_truncate {
            RedisOnTruncate::Ignore => None,
            RedisOnTruncate::Scan => Some(table_prefix(&options.key)?),
        };
        Ok(Self {
            server: Server::new(&options.url, options.tls_ca.as_ref(), options.timeout_ms)?,
            encoder: with.encoder(format)?,
            key: options.key.parse()?,
            prefix,
            payload: options.payload,
            ttl_ms: options.ttl_ms,
            on_update: options.on_update,
            on_delete: options.on_delete,
            context: context.clone(),
        })
    }

    fn plan(&mut self, changes: &[Change]) -> Result<(Vec<Step>, u64)> {
        let mut steps = Vec::new();
        let mut commands = pipe();
        let mut filtered = 0;
        for change in changes {
            let planned = match (change.op, &self.prefix) {
                (Op::Insert | Op::Update | Op::Read, _) => self.plan_row(change, &mut commands)?,
                (Op::Delete, _) => self.plan_delete(change, &mut commands)?,
                (Op::Truncate, Some(prefix)) => {
                    let prefix = prefix.render(change, &self.context.names)?;
                    steps.push(Step::Commands(std::mem::replace(&mut commands, pipe())));
                    steps.push(Step::DeleteAll(prefix));
                    true
                }
                (Op::Truncate, None) | (Op::Message, _) => false,
            };
            filtered += u64::from(!planned);
        }
        steps.push(Step::Commands(commands));
        Ok((steps, filtered))
    }

    fn plan_row(&mut self, change: &Change, commands: &mut Pipeline) -> Result<bool> {
        let value = match self.on_update {
            RedisOnUpdate::Delete => None,
            RedisOnUpdate::Set => match self.value(change)? {
                Some(value) => Some(value),
                None => return Ok(false),
            },
        };
        let key = self.key(change)?;
        if let Some(old) = self.old_key(change)
            && old != key
        {
            commands.cmd("DEL").arg(old);
        }
        match value {
            None => commands.cmd("DEL").arg(key),
            Some(value) if self.ttl_ms == 0 => commands.cmd("SET").arg(key).arg(value),
            Some(value) => commands.cmd("SET").arg(key).arg(value).arg("PX").arg(self.ttl_ms),
        };
        Ok(true)
    }

    fn plan_delete(&self, change: &Change, commands: &mut Pipeline) -> Result<bool> {
        if self.on_delete == RedisOnDelete::Ignore {
            return Ok(false);
        }
        commands.cmd("DEL").arg(self.key(change)?);
        Ok(true)
    }

    /// `None`: the format has no message for it.
    fn value(&mut self, change: &Change) -> Result<Option<Vec<u8>>> {
        let mut message = Vec::new();
        if !self.encoder.encode(change, &mut message)? {
            return Ok(None);
        }
        let shaped = change.shaped.as_ref().is_some_and(|shaped| shaped.payload.is_some());
        if self.payload == RedisStringPayload::Record && !shaped {
            check_whole(change)?;
            let Message { after } = serde_json::from_slice(&message)
                .class(Class::Bug, || "a message that cannot be read back")?;
            message = after.get().as_bytes().to_vec();
        }
        check_size("a value", message.len(), VALUE_BYTES_MAX)?;
        Ok(Some(message))
    }

    fn key(&self, change: &Change) -> Result<String> {
        match change.route() {
            Some(route) => Ok(route.to_owned()),
            None => {
                let key = self.key.render(change, &self.context.names);
                key.map_err(|error| if change.after.is_none() { whole_rows(error) } else { error })
            }
        }
    }

    /// The key of the row before an update, as far as the change tells it.
    fn old_key(&self, change: &Change) -> Option<String> {
        let is_known = change.op == Op::Update && change.before != Before::Nothing;
        if !is_known || change.route().is_some() {
            return None;
        }
        let old = Change { after: None, ..change.clone() };
        self.key.render(&old, &self.context.names).ok()
    }

    /// Deletes in rounds, so that neither side is busy with it for long.
    async fn delete_all(&mut self, prefix: &str) -> Result<()> {
        let pattern = format!("{}*", escape(prefix));
        let mut cursor = 0u64;
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(SCAN_KEYS);
            scan.arg("TYPE").arg("string"); // whatever else begins so is not of this sink
            let (next, keys): (u64, Vec<Vec<u8>>) = self.server.ask(&scan).await?;
            if !keys.is_empty() {
                let _: i64 = self.server.ask(cmd("DEL").arg(keys)).await?;
            }
            if next == 0 {
                return Ok(());
            }
            cursor = next;
        }
    }
}

#[async_trait]
impl Sink for Strings {
    fn capabilities(&self) -> Capabilities {
        let carries = match self.payload {
            RedisStringPayload::Message => Carries::Bytes,
            RedisStringPayload::Record => Carries::Headers, // whatever the format, it is another
        };
        Capabilities { state_target: true, carries, routes: true, ..Capabilities::default() }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.server.open().await?;
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        let (steps, filtered) = self.plan(&batch.changes)?;
        for step in steps {
            match step {
                Step::Commands(commands) => self.server.ask_all(&commands).await?,
                Step::DeleteAll(prefix) => self.delete_all(&prefix).await?,
            }
            failpoint::reach("redis::after_step");
        }
        self.context.count_filtered(filtered);
        Ok(Written::All)
    }

    async fn close(&mut self) -> Result<()> {
        self.server.close();
        Ok(())
    }
}

/// A row that lacks a value must not stand for the whole one.
fn check_whole(change: &Change) -> Result<()> {
    let (Some(table), Some(after)) = (&change.table, &change.after) else { return Ok(()) };
    for (column, (index, value)) in table.columns.iter().zip(after.values().enumerate()) {
        let sent = match &change.before {
            Before::Nothing => None,
            Before::Full(row) => row.value(index),
            Before::Key(row) => row.value(index).filter(|_| column.identity),
        };
        if value == Value::Unchanged && matches!(sent, None | Some(Value::Unchanged)) {
            let name = &column.name;
            let text = format!("the change does not carry {name} of {table}, which it left alone");
            return Err(whole_rows(Error::data(text)));
        }
    }
    Ok(())
}

fn whole_rows(error: Error) -> Error {
    error.remedy(WHOLE_ROWS)
}

/// What the keys of one table begin with: the template up to the first field of a row.
fn table_prefix(text: &str) -> Result<Template> {
    let prefix = text.get(..row_field(text)).unwrap_or_default();
    if !prefix.contains("{table}") || prefix.ends_with('}') {
        return Err(Error::config(format!(
            "`on_truncate` cannot tell the keys of a table by `{text}`"
        ))
        .remedy("begin `key` with {table} and a mark behind it, such as `{table}:{key}`"));
    }
    prefix.parse()
}

/// Where the first field stands that is not the same for all rows of a table.
fn row_field(text: &str) -> usize {
    let mut at = 0;
    while let Some(rest) = text.get(at..)
        && let Some(brace) = rest.find(['{', '}'])
    {
        let field = rest.get(brace..).unwrap_or_default();
        let of_table = ["{source}", "{database}", "{schema}", "{table}", "{{", "}}"];
        match of_table.into_iter().find(|name| field.starts_with(name)) {
            Some(name) => at += brace + name.len(),
            None => return at + brace,
        }
    }
    text.len()
}

/// Takes from the marks of a pattern their meaning.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + 8);
    for mark in text.chars() {
        if matches!(mark, '*' | '?' | '[' | ']' | '\\' | '^') {
            escaped.push('\\');
        }
        escaped.push(mark);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_of_a_table_ends_before_the_first_field_of_a_row() {
        let prefix = |text| table_prefix(text).map(|prefix| prefix.as_str().to_owned());
        assert_eq!(prefix("{table}:{key}").unwrap(), "{table}:");
        assert_eq!(prefix("a:{schema}.{table}/{record.id}/x").unwrap(), "a:{schema}.{table}/");
        assert_eq!(prefix("{{{table}}}:{key}").unwrap(), "{{{table}}}:");
        for text in ["{key}", "{table}{key}", "a:{record.id}:{table}:", "walrace"] {
            assert_eq!(prefix(text).unwrap_err().class(), Class::Config, "{text}");
        }
    }

    #[test]
    fn a_pattern_means_itself() {
        assert_eq!(escape("a*b?[c]\\^"), "a\\*b\\?\\[c\\]\\\\\\^");
        assert_eq!(escape("orders:"), "orders:");
    }
}
