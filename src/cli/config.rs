//! `walrace config`: what is in force, and what there is to set.

use std::process::ExitCode;

use clap::Subcommand;

use super::{Global, print};
use crate::{
    config::Config,
    error::{Class, Classify, Result},
};

/// The commands of `walrace config`.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Command {
    /// Print the configuration in force: file, environment and defaults, with secrets masked
    #[command(after_help = "Example: WALRACE_HTTP_LISTEN= walrace -c prod.toml config show")]
    Show,
    /// Print the JSON Schema of the file, for editors
    #[command(after_help = "Example: walrace config schema > walrace.schema.json")]
    Schema,
    /// Print every key with its meaning and default, as a commented file
    #[command(after_help = "Example: walrace config reference | less")]
    Reference {
        /// As Markdown
        #[arg(long)]
        markdown: bool,
    },
}

/// Runs one of them.
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    print(&output(command, global)?)?;
    Ok(ExitCode::SUCCESS)
}

fn output(command: Command, global: &Global) -> Result<String> {
    match command {
        Command::Show => global.load()?.to_toml(),
        Command::Schema => {
            let text = serde_json::to_string_pretty(&Config::schema());
            Ok(text.class(Class::Bug, || "cannot write the schema as JSON")? + "\n")
        }
        Command::Reference { markdown: true } => Ok(Config::reference_markdown()),
        Command::Reference { markdown: false } => Ok(Config::reference()),
    }
}
