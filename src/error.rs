//! One error type whose class says what the runtime does about it.

use std::fmt;

/// `Result` with Walrace's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the runtime does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Wait with backoff, then try again: the peer is down, slow or busy.
    Retry,
    /// Stop this part and say how to mend it: a person must change something.
    Config,
    /// This one change cannot be delivered as it is.
    Data,
    /// Stop and never guess: what is stored contradicts itself.
    Damaged,
    /// An invariant of ours does not hold.
    Bug,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Retry => "retry",
            Class::Config => "config",
            Class::Data => "data",
            Class::Damaged => "damaged",
            Class::Bug => "bug",
        })
    }
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What happened, to which object, why, and what mends it.
///
/// `Display` prints the whole chain on one line: the outermost context first, then the cause, then
/// the remedy. It is logged once, where it is handled.
#[derive(Debug)]
pub struct Error(Box<Detail>);

#[derive(Debug)]
struct Detail {
    class: Class,
    message: String,
    context: Vec<String>,
    cause: Option<Cause>,
    remedy: Option<String>,
}

impl Error {
    /// An error of `class`; `message` is lower case, names the object and has no full stop.
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        Self(Box::new(Detail {
            class,
            message: message.into(),
            context: Vec::new(),
            cause: None,
            remedy: None,
        }))
    }

    /// An error that time may heal.
    pub fn retry(message: impl Into<String>) -> Self {
        Self::new(Class::Retry, message)
    }

    /// An error that a person must mend.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Class::Config, message)
    }

    /// An error of one change.
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Class::Data, message)
    }

    /// Stored bytes that contradict themselves.
    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(Class::Damaged, message)
    }

    /// An invariant of ours that does not hold.
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Class::Bug, message)
    }

    /// Keeps the error that caused this one.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<Cause>) -> Self {
        self.0.cause = Some(cause.into());
        self
    }

    /// Adds what was being done ("while decoding a tuple of public.orders").
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Self {
        self.0.context.push(context.into());
        self
    }

    /// Adds the command, SQL or setting that mends it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// What the runtime does about it.
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// The command, SQL or setting that mends it, where one is known.
    pub fn remedy_text(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// The chain without the remedy, for places that show the remedy on a line of its own.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for context in self.0.context.iter().rev() {
            text.push_str(context);
            text.push_str(": ");
        }
        text.push_str(&self.0.message);
        let mut cause = self.0.cause.as_ref().map(|c| &**c as &(dyn std::error::Error + 'static));
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary())?;
        match &self.0.remedy {
            Some(remedy) => write!(f, " ({remedy})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        None // Display already prints the whole chain; a second printing would repeat it
    }
}

/// Adds context, and a class where the error is foreign, to a `Result`.
pub trait ResultExt<T> {
    /// Adds what was being done; built only when there is an error.
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| error.context(context()))
    }
}

/// Gives a class and a message to an error of another library.
pub trait Classify<T> {
    /// Turns the error into one of `class`, with the original as its cause.
    fn class<C: Into<String>>(self, class: Class, message: impl FnOnce() -> C) -> Result<T>;
}

impl<T, E: Into<Cause>> Classify<T> for std::result::Result<T, E> {
    fn class<C: Into<String>>(self, class: Class, message: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|cause| Error::new(class, message()).caused_by(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reads_as_one_line_from_the_outside_in() {
        let cause = std::io::Error::other("disk on fire");
        let error = Error::retry("cannot write journal/app/0001.segment")
            .caused_by(cause)
            .context("while appending 3 changes")
            .remedy("free space on the volume of data_dir");
        assert_eq!(
            error.to_string(),
            "while appending 3 changes: cannot write journal/app/0001.segment: disk on fire \
             (free space on the volume of data_dir)"
        );
        assert_eq!(error.class(), Class::Retry);
    }
}
