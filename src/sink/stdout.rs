//! The terminal, for people, or a pipe, as JSON Lines.

use std::{
    io::{ErrorKind, IsTerminal, Write},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;

use super::{Capabilities, Carries, Context, Progress, Sink, With, Written};
use crate::{
    change::Batch,
    config::{self, StdoutStyle},
    error::{Class, Classify, Error, Result},
    format::Encoder,
};

type Out = Box<dyn Write + Send>;

/// The `stdout` sink.
pub(super) struct Stdout {
    encoder: Encoder,
    /// Locked only by blocking tasks: a pipe that nobody reads blocks for as long as it likes.
    out: Arc<Mutex<Out>>,
    buffer: Vec<u8>,
    context: Context,
}

impl Stdout {
    pub(super) fn new(options: &config::Stdout, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        if options.style == StdoutStyle::Pretty {
            with.refuse_types()?;
        }
        let stdout = std::io::stdout();
        let pretty = match options.style {
            StdoutStyle::Auto => stdout.is_terminal(),
            StdoutStyle::Pretty => true,
            StdoutStyle::Json => false,
        };
        let encoder = if pretty {
            // Knows NO_COLOR, CLICOLOR and terminals without colours.
            let colour = anstream::AutoStream::choice(&stdout) != anstream::ColorChoice::Never;
            Encoder::pretty(colour)
        } else {
            with.encoder(format)?
        };
        Ok(Self::to(Box::new(stdout), encoder, context))
    }

    fn to(out: Out, encoder: Encoder, context: &Context) -> Self {
        Self {
            encoder,
            out: Arc::new(Mutex::new(out)),
            buffer: Vec::new(),
            context: context.clone(),
        }
    }
}

#[async_trait]
impl Sink for Stdout {
    fn capabilities(&self) -> Capabilities {
        Capabilities { carries: Carries::Text, ..Capabilities::default() }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        self.buffer.clear();
        let mut filtered = 0;
        for change in &batch.changes {
            if self.encoder.encode(change, &mut self.buffer)? {
                self.buffer.push(b'\n');
            } else {
                filtered += 1;
            }
        }
        let out = Arc::clone(&self.out);
        let lines = std::mem::take(&mut self.buffer);
        let task = tokio::task::spawn_blocking(move || {
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            let written = out.write_all(&lines).and_then(|()| out.flush());
            (lines, written)
        });
        let (lines, written) =
            task.await.class(Class::Bug, || "a task of the stdout sink failed")?;
        self.buffer = lines;
        written.map_err(|cause| match cause.kind() {
            ErrorKind::BrokenPipe => Error::config("stdout was closed"),
            _ => Error::retry("cannot write to stdout").caused_by(cause),
        })?;
        self.context.count_filtered(filtered);
        Ok(Written::All)
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::config::Format;
    use crate::sink::testing::{batch, context, progress};

    #[tokio::test]
    async fn a_pipe_gets_one_json_object_a_line() {
        let (mut theirs, ours) = std::io::pipe().unwrap();
        let context = context();
        let encoder = Encoder::new(Format::Native, &context.names);
        let mut sink = Stdout::to(Box::new(ours), encoder, &context);
        assert!(matches!(sink.write(&batch(0..3), &progress(3)).await, Ok(Written::All)));
        drop(sink);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        let offsets = text.lines().map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["offset"].as_u64().unwrap()
        });
        assert!(offsets.eq(0..3), "{text}");
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_ends_the_sink_with_a_plain_word() {
        let (theirs, ours) = std::io::pipe().unwrap();
        drop(theirs);
        let mut sink = Stdout::to(Box::new(ours), Encoder::pretty(false), &context());
        let error = sink.write(&batch(0..3), &progress(3)).await.err().unwrap();
        assert_eq!(
            (error.class(), error.to_string().as_str()),
            (Class::Config, "stdout was closed")
        );
    }
}
