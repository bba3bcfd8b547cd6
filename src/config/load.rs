//! From a file and the environment to a configuration that is checked.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    Config, Rules, cdc,
    document::{self, Place, Places, Table},
    environment::{self, Environment},
    interpolate::escape,
    read::{At, Reader},
    shape, validate,
};
use crate::error::{Class, Classify, Error, Result};

/// Where the configuration is when nobody says so.
const FILE: &str = "walrace.toml";

impl Config {
    /// Parses and checks; `origin` names the file in errors. Variables of this process fill in
    /// `${...}` and override keys.
    pub fn parse(text: &str, origin: &str) -> Result<Self> {
        Self::parse_in(text, origin, &Environment::process())
    }

    /// Parses and checks in a given environment.
    pub fn parse_in(text: &str, origin: &str, environment: &Environment) -> Result<Self> {
        Self::read(document::parse(text, origin)?, origin, environment)
    }

    /// Loads `path`, else what `WALRACE_CONFIG` names, else `walrace.toml` here. The file may be
    /// missing where the environment describes a source.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        Self::load_in(path, &Environment::process())
    }

    /// Loads in a given environment.
    pub fn load_in(path: Option<&Path>, environment: &Environment) -> Result<Self> {
        let named = path.map(Path::to_path_buf);
        let named = named.or_else(|| environment.get("WALRACE_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or_else(|| PathBuf::from(FILE));
        let origin = path.display().to_string();
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse_in(&text, &origin, environment),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if named.is_none() && environment.stands_alone() {
                    return Self::read(Table::new(), "the environment", environment);
                }
                Err(Error::config(format!("there is no configuration at {origin}"))
                    .remedy("write one with `walrace init URL`, or name another with `-c FILE`"))
            }
            Err(error) => Err(error).class(Class::Config, || format!("cannot read {origin}")),
        }
    }

    /// Creates `data_dir` and the directory of dead letters, and proves that both can be written.
    pub fn create_directories(&self) -> Result<()> {
        for (key, path) in [("data_dir", self.data_dir.clone()), ("dlq_path", self.dead_letters())]
        {
            let created = fs::create_dir_all(&path);
            created.and_then(|()| tempfile::tempfile_in(&path).map(drop)).map_err(|error| {
                Error::config(format!("cannot write in {} (`{key}`)", path.display()))
                    .caused_by(error)
                    .remedy("create it for this user, or name another directory")
            })?;
        }
        Ok(())
    }

    /// The configuration as TOML, with every default and with secrets masked.
    pub fn to_toml(&self) -> Result<String> {
        let failed = || "cannot write the configuration as TOML";
        let mut value = toml::Value::try_from(self).class(Class::Config, failed)?;
        escape_texts(&mut value);
        toml::to_string(&value).class(Class::Config, failed)
    }

    fn read(mut document: Table, origin: &str, environment: &Environment) -> Result<Self> {
        let shape = shape::record_of::<Self>();
        environment::apply(&mut document, &shape, environment)?;
        let mut reader = Reader { environment, places: Places::new(origin) };
        let whole = Place::Whole(origin.into());
        let table = reader.record(document, &shape, At { path: "", place: &whole })?;
        let mut config = Self::deserialize(table)
            // its message is not shown: it may quote a value
            .map_err(|_| Error::bug(format!("{origin}: passes the checks, but does not load")))?;
        cdc::expand(&mut config, &reader.places)?;
        validate::check(&config, &reader.places)?;
        Ok(config)
    }
}

impl Rules {
    /// Loads rules alone, to be tried in place of those of a sink.
    pub fn load(path: &Path) -> Result<Self> {
        let origin = path.display().to_string();
        let text =
            fs::read_to_string(path).class(Class::Config, || format!("cannot read {origin}"))?;
        let environment = Environment::process();
        let mut reader = Reader { environment: &environment, places: Places::new(&origin) };
        let whole = Place::Whole(origin.as_str().into());
        let document = document::parse(&text, &origin)?;
        let at = At { path: "", place: &whole };
        let table = reader.record(document, &shape::record_of::<Self>(), at)?;
        let rules = Self::deserialize(table)
            .map_err(|_| Error::bug(format!("{origin}: passes the checks, but does not load")))?;
        match rules.problem() {
            None => Ok(rules),
            Some(problem) => {
                let what = format!("`{}` {}", problem.path, problem.what);
                Err(reader.places.error(&problem.path, &what).remedy(problem.remedy))
            }
        }
    }
}

fn escape_texts(value: &mut toml::Value) {
    match value {
        toml::Value::String(text) => *text = escape(text),
        toml::Value::Array(items) => items.iter_mut().for_each(escape_texts),
        toml::Value::Table(table) => table.iter_mut().for_each(|(_, value)| escape_texts(value)),
        _ => {}
    }
}
