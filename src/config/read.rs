//! Checks a document against the shape of the configuration, key by key, and fills in references:
//! what passes here deserializes.

use toml::{Table as Toml, Value};

use super::{
    document::{Content, Node, Place, Places, Table},
    environment::Environment,
    from::From,
    interpolate::fill,
    shape::{Field, Record, Shape, Word},
};
use crate::error::{Error, Result};

/// More names than this are not listed in a hint.
const LISTED_MAX: usize = 14;

/// Reads documents in one environment, and remembers where each key was written.
pub(super) struct Reader<'a> {
    pub(super) environment: &'a Environment,
    pub(super) places: Places,
}

impl Reader<'_> {
    /// Reads the keys of a record; `path` is empty for the whole document.
    pub(super) fn record(&mut self, table: Table, record: &Record, at: At<'_>) -> Result<Toml> {
        let mut read = Toml::new();
        let mut table = table;
        let kind_fields = if record.kinds.is_empty() {
            &[]
        } else {
            let (kind, fields) = self.kind(table.remove("kind"), record, at)?;
            read.insert("kind".into(), Value::String(kind));
            fields
        };
        let known = || record.fields.iter().chain(kind_fields);
        for (key, (place, node)) in table {
            let path = at.join(&key);
            let Some(field) = known().find(|field| field.name == key) else {
                return Err(unknown(&path, &key, &place, (record, kind_fields)));
            };
            self.places.insert(&path, node.place.clone());
            let value = self.value(node, &field.shape, At { path: &path, place: &place })?;
            read.insert(key, value);
        }
        match known().find(|field| field.required && !read.contains_key(&field.name)) {
            Some(field) => Err(missing(at, field)),
            None => Ok(read),
        }
    }

    fn kind<'r>(
        &self,
        entry: Option<(Place, Node)>,
        record: &'r Record,
        at: At<'_>,
    ) -> Result<(String, &'r [Field])> {
        let words: Vec<&Word> = record.kinds.iter().map(|kind| &kind.word).collect();
        let path = at.join("kind");
        let Some((_, node)) = entry else {
            let error = at.place.error(&format!("`{path}` is missing"));
            return Err(error.remedy(format!("one of: {}", names(&words))));
        };
        let (text, foreign) = self.text(&node, &Shape::Text, &path)?;
        match record.kind(&text) {
            Some(kind) => Ok((text, &kind.fields)),
            None => Err(no_choice(&node.place, &path, (&text, foreign), &words)),
        }
    }

    fn value(&mut self, node: Node, shape: &Shape, at: At<'_>) -> Result<Value> {
        let path = at.path;
        match shape {
            Shape::Record(record) => {
                let table = table(node, shape, path)?;
                Ok(Value::Table(self.record(table, record, at)?))
            }
            Shape::Map(shape) => self.map(node, shape, path),
            Shape::List(shape) => self.list(node, shape, path),
            Shape::Texts if matches!(node.content, Content::List(_)) => {
                self.list(node, &Shape::Text, path)
            }
            Shape::Text | Shape::Texts | Shape::Secret => {
                Ok(Value::String(self.text(&node, shape, path)?.0))
            }
            Shape::Choice(words) => {
                let (text, foreign) = self.text(&node, shape, path)?;
                if words.iter().any(|word| word.name == text) {
                    return Ok(Value::String(text));
                }
                let words: Vec<&Word> = words.iter().collect();
                Err(no_choice(&node.place, path, (&text, foreign), &words))
            }
            Shape::Integer { min } => self.integer(&node, *min, path).map(Value::Integer),
            Shape::Boolean => self.boolean(&node, path).map(Value::Boolean),
            Shape::From => self.from(&node, path),
        }
    }

    fn map(&mut self, node: Node, shape: &Shape, path: &str) -> Result<Value> {
        let node = self.split(node, path, |text, place| {
            let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
            let pairs = pairs.map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (key.trim().to_owned(), (place.clone(), foreign(value.trim(), place)))
            });
            Content::Table(pairs.collect())
        })?;
        let map = Shape::Map(Box::new(Shape::Text));
        let mut read = Toml::new();
        for (key, (place, node)) in table(node, &map, path)? {
            let path = format!("{path}.{key}");
            self.places.insert(&path, place.clone());
            let value = self.value(node, shape, At { path: &path, place: &place })?;
            read.insert(key, value);
        }
        Ok(Value::Table(read))
    }

    fn list(&mut self, node: Node, shape: &Shape, path: &str) -> Result<Value> {
        let node = self.split(node, path, |text, place| {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Content::List(items.map(|item| foreign(item, place)).collect())
        })?;
        let Content::List(items) = node.content else {
            let list = Shape::List(Box::new(Shape::Text));
            return Err(mismatch(&node, &list, path));
        };
        let mut read = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let (path, place) = (format!("{path}[{index}]"), item.place.clone());
            self.places.insert(&path, place.clone());
            read.push(self.value(item, shape, At { path: &path, place: &place })?);
        }
        Ok(Value::Array(read))
    }

    /// Splits a text from outside the file where a list or a table is wanted.
    fn split(
        &self,
        node: Node,
        path: &str,
        parse: impl Fn(&str, &Place) -> Content,
    ) -> Result<Node> {
        match self.foreign(&node, path)? {
            Some(text) => Ok(Node { content: parse(&text, &node.place), ..node }),
            None => Ok(node),
        }
    }

    /// The text where it came, at least in part, from outside the file.
    fn foreign(&self, node: &Node, path: &str) -> Result<Option<String>> {
        match &node.content {
            Content::Text(_) | Content::Foreign(_) => {
                let (text, foreign) = self.text(node, &Shape::Text, path)?;
                Ok(foreign.then_some(text))
            }
            _ => Ok(None),
        }
    }

    fn text(&self, node: &Node, shape: &Shape, path: &str) -> Result<(String, bool)> {
        match &node.content {
            Content::Foreign(text) => Ok((text.clone(), true)),
            Content::Text(template) => {
                let filled = fill(template, self.environment).map_err(|refusal| {
                    let what = format!("`{path}`: {}", refusal.what);
                    node.place.error(&what).remedy(refusal.remedy)
                })?;
                Ok((filled.text, filled.foreign))
            }
            _ => Err(mismatch(node, shape, path)),
        }
    }

    fn integer(&self, node: &Node, min: i64, path: &str) -> Result<i64> {
        let shape = Shape::Integer { min };
        let (number, shown) = match (&node.content, self.foreign(node, path)?) {
            (Content::Integer(number), _) => (*number, format!(", not {number}")),
            (_, Some(text)) => {
                let number = text.trim().parse().map_err(|_| mismatch(node, &shape, path))?;
                (number, String::new())
            }
            _ => return Err(mismatch(node, &shape, path)),
        };
        if number < min {
            let what = format!("`{path}` must be at least {min}{shown}");
            return Err(node.place.error(&what));
        }
        Ok(number)
    }

    fn boolean(&self, node: &Node, path: &str) -> Result<bool> {
        match (&node.content, self.foreign(node, path)?.as_deref()) {
            (Content::Boolean(boolean), _) => Ok(*boolean),
            (_, Some("true" | "1" | "yes" | "on")) => Ok(true),
            (_, Some("false" | "0" | "no" | "off")) => Ok(false),
            _ => Err(mismatch(node, &Shape::Boolean, path)),
        }
    }

    fn from(&self, node: &Node, path: &str) -> Result<Value> {
        if let Content::Integer(_) = node.content {
            return self.integer(node, 0, path).map(Value::Integer);
        }
        let (text, _) = self.text(node, &Shape::From, path)?;
        let from: From = text.parse().map_err(|error: Error| {
            let located = node.place.error(&format!("`{path}` is {}", error.summary()));
            located.remedy(error.remedy_text().unwrap_or_default())
        })?;
        Ok(Value::String(from.to_string()))
    }
}

/// The key path that is read, and where its key was written.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) path: &'a str,
    pub(super) place: &'a Place,
}

impl At<'_> {
    fn join(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// The name that `word` was probably meant to be: at most `distance_max` letters away.
pub(crate) fn nearest<'a>(
    word: &str,
    names: impl Iterator<Item = &'a str>,
    distance_max: usize,
) -> Option<&'a str> {
    names
        .map(|name| (strsim::damerau_levenshtein(word, name), name))
        .filter(|(distance, _)| *distance <= distance_max)
        .min()
        .map(|(_, name)| name)
}

/// "did you mean ...", else the names that there are.
pub(super) fn hint(word: &str, names: &[&str]) -> String {
    let near = nearest(word, names.iter().copied(), (word.chars().count() / 3).max(1));
    let begins = || names.iter().copied().find(|n| word.len() >= 3 && n.starts_with(word));
    match near.or_else(begins) {
        Some(name) => format!("did you mean `{name}`?"),
        None if names.len() <= LISTED_MAX => format!("one of: {}", names.join(", ")),
        None => "`walrace config reference` lists every key".into(),
    }
}

fn foreign(text: &str, place: &Place) -> Node {
    Node { place: place.clone(), content: Content::Foreign(text.to_owned()) }
}

fn table(node: Node, shape: &Shape, path: &str) -> Result<Table> {
    match node.content {
        Content::Table(table) => Ok(table),
        _ => Err(mismatch(&node, shape, path)),
    }
}

fn names(words: &[&Word]) -> String {
    words.iter().map(|word| word.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn unknown(path: &str, key: &str, place: &Place, known: (&Record, &[Field])) -> Error {
    let (record, kind_fields) = known;
    let error = place.error(&format!("unknown key `{path}`"));
    let of_kind = record.kinds.iter().find(|kind| kind.fields.iter().any(|f| f.name == key));
    if let Some(kind) = of_kind {
        return error.remedy(format!("`{key}` is a key of kind = \"{}\"", kind.word.name));
    }
    let fields = record.fields.iter().chain(kind_fields).map(|field| field.name.as_str());
    let kind = (!record.kinds.is_empty()).then_some("kind");
    error.remedy(hint(key, &fields.chain(kind).collect::<Vec<_>>()))
}

fn missing(at: At<'_>, field: &Field) -> Error {
    let error = at.place.error(&format!("`{}` is missing", at.join(&field.name)));
    match field.example.as_str() {
        Some(example) => error.remedy(format!("add {} = \"{example}\"", field.name)),
        None => error.remedy(field.doc.clone()),
    }
}

fn no_choice(place: &Place, path: &str, value: (&str, bool), words: &[&Word]) -> Error {
    let (text, foreign) = value;
    if foreign {
        let what = format!("`{path}` has a value that it cannot have");
        return place.error(&what).remedy(format!("one of: {}", names(words)));
    }
    let listed: Vec<&str> = words.iter().map(|word| word.name.as_str()).collect();
    let near = nearest(text, listed.iter().copied(), (text.chars().count() / 3).max(1));
    let guess = near.map_or_else(String::new, |name| format!("did you mean `{name}`? "));
    let what = format!("`{path}` cannot be {text:?}");
    place.error(&what).remedy(format!("{guess}one of: {}", names(words)))
}

fn mismatch(node: &Node, shape: &Shape, path: &str) -> Error {
    let what = format!("`{path}` wants {}, not {}", shape.noun(), node.content.noun());
    let error = node.place.error(&what);
    match (shape, &node.content) {
        (Shape::Integer { .. } | Shape::Boolean, Content::Text(_)) => {
            error.remedy("write it without quotes")
        }
        (Shape::Text | Shape::Secret, Content::Integer(_) | Content::Boolean(_)) => {
            error.remedy("put it in quotes")
        }
        (Shape::List(_), Content::Text(_)) => error.remedy("put it in brackets: [\"...\"]"),
        _ => error,
    }
}
