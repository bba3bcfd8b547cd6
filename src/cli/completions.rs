//! `walrace completions`: what a shell needs to complete commands and options.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, print};
use crate::error::Result;

/// The arguments of `walrace completions`.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bash  walrace completions bash > ~/.local/share/bash-completion/completions/walrace
  zsh   walrace completions zsh > \"${fpath[1]}/_walrace\"
  fish  walrace completions fish > ~/.config/fish/completions/walrace.fish")]
pub struct Args {
    /// The shell
    pub shell: Shell,
}

/// Prints them.
pub async fn run(args: Args) -> Result<ExitCode> {
    print(&script(args.shell))?;
    Ok(ExitCode::SUCCESS)
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "walrace", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn each_shell_learns_every_command() {
        for shell in Shell::value_variants() {
            let script = script(*shell);
            for command in Cli::command().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
            }
        }
    }
}
