//! What each key may hold, taken from the JSON Schema of the structs, which comes from their types
//! and docs: the one list of keys behind the checks, the environment and the reference.

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// Further names of kinds, as serde knows them too.
const ALIASES: &[(&str, &str)] = &[("sequin_stream", "http_pull"), ("elasticsearch", "opensearch")];

/// What a value may be.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Shape {
    /// Known keys.
    Record(Record),
    /// Any keys, all of one shape.
    Map(Box<Shape>),
    /// Any text.
    Text,
    /// A text that is never shown.
    Secret,
    /// A whole number, at least this.
    Integer { min: i64 },
    /// True or false.
    Boolean,
    /// One of some words.
    Choice(Vec<Word>),
    /// Any number of one shape.
    List(Box<Shape>),
    /// A text, or a list of texts.
    Texts,
    /// `start`, `now`, an offset, a time or a token.
    From,
}

/// A table with known keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Record {
    /// Keys that it has in any case.
    pub(super) fields: Vec<Field>,
    /// What `kind` may be, and the keys that each kind adds.
    pub(super) kinds: Vec<Kind>,
}

/// One of the kinds of a record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Kind {
    pub(super) word: Word,
    pub(super) fields: Vec<Field>,
}

/// A word and what it means.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Word {
    pub(super) name: String,
    pub(super) doc: String,
}

/// A key of a record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) doc: String,
    pub(super) required: bool,
    /// Null: none.
    pub(super) default: Value,
    /// Null: none.
    pub(super) example: Value,
    pub(super) shape: Shape,
}

impl Record {
    /// The kind of this name.
    pub(super) fn kind(&self, name: &str) -> Option<&Kind> {
        let same =
            |kind: &&Kind| kind.word.name == name || ALIASES.contains(&(name, &kind.word.name));
        self.kinds.iter().find(same)
    }

    /// Every key that it can have, of whatever kind; `kind` itself is not among them.
    pub(super) fn all_fields(&self) -> impl Iterator<Item = &Field> {
        self.fields.iter().chain(self.kinds.iter().flat_map(|kind| &kind.fields))
    }
}

impl Shape {
    /// What it wants, for "wants ..., not X".
    pub(super) fn noun(&self) -> &'static str {
        match self {
            Shape::Record(_) | Shape::Map(_) => "a table",
            Shape::Text | Shape::Secret | Shape::Choice(_) => "a text in quotes",
            Shape::Integer { .. } => "a whole number",
            Shape::Boolean => "true or false",
            Shape::List(_) => "a list in brackets",
            Shape::Texts => "a text in quotes or a list in brackets",
            Shape::From => "a text in quotes or an offset",
        }
    }
}

/// The record that the struct `T` describes.
pub(super) fn record_of<T: JsonSchema>() -> Record {
    let schema = schemars::schema_for!(T).to_value();
    Schema { root: &schema }.record(&schema)
}

struct Schema<'a> {
    root: &'a Value,
}

impl Schema<'_> {
    fn record(&self, schema: &Value) -> Record {
        let kinds = items(schema, "oneOf").map(|kind| Kind {
            word: Word { name: kind_name(kind).unwrap_or_default(), doc: doc(kind) },
            fields: self.fields(kind),
        });
        Record { fields: self.fields(schema), kinds: kinds.collect() }
    }

    /// The keys of one object: the required ones first, else by name.
    fn fields(&self, schema: &Value) -> Vec<Field> {
        let none = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
        let required = |name: &str| items(schema, "required").any(|item| item == name);
        let mut fields: Vec<Field> = properties
            .iter()
            .filter(|(_, property)| property.get("const").is_none())
            .map(|(name, property)| Field {
                name: name.clone(),
                doc: doc(property),
                required: required(name),
                default: property.get("default").cloned().unwrap_or_default(),
                example: items(property, "examples").next().cloned().unwrap_or_default(),
                shape: self.shape(property),
            })
            .collect();
        fields.sort_by_key(|field| !field.required);
        fields
    }

    fn shape(&self, schema: &Value) -> Shape {
        let is_null = |schema: &&Value| schema.get("type").is_some_and(|t| t == "null");
        let mut present = items(schema, "anyOf").filter(|schema| !is_null(schema));
        if let Some(first) = present.next() {
            return if present.next().is_some() { Shape::Texts } else { self.shape(first) };
        }
        if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
            let pointer = name.trim_start_matches('#');
            return self.root.pointer(pointer).map_or(Shape::Text, |schema| self.shape(schema));
        }
        if items(schema, "oneOf").next().is_some_and(|item| item.get("const").is_some()) {
            return Shape::Choice(items(schema, "oneOf").map(word).collect());
        }
        if schema.get("properties").is_some() || schema.get("oneOf").is_some() {
            return Shape::Record(self.record(schema));
        }
        if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
            return Shape::Map(Box::new(self.shape(values)));
        }
        if let Some(items) = schema.get("items") {
            return Shape::List(Box::new(self.shape(items)));
        }
        scalar(schema)
    }
}

fn scalar(schema: &Value) -> Shape {
    let single = schema.get("type").into_iter();
    let types: Vec<&str> = single.chain(items(schema, "type")).filter_map(Value::as_str).collect();
    match (types.contains(&"string"), types.contains(&"integer"), types.contains(&"boolean")) {
        (true, true, _) => Shape::From,
        (_, true, _) => {
            Shape::Integer { min: schema.get("minimum").and_then(Value::as_i64).unwrap_or(0) }
        }
        (_, _, true) => Shape::Boolean,
        _ if schema.get("format").is_some_and(|format| format == "password") => Shape::Secret,
        _ => Shape::Text,
    }
}

fn items<'a>(schema: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    schema.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn word(schema: &Value) -> Word {
    let name = schema.get("const").and_then(Value::as_str).unwrap_or_default();
    Word { name: name.to_owned(), doc: doc(schema) }
}

fn kind_name(schema: &Value) -> Option<String> {
    Some(schema.pointer("/properties/kind/const")?.as_str()?.to_owned())
}

fn doc(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
