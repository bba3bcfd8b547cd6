//! `walrace man`: the manual pages, made from the same definitions as `--help`.

use std::{fs, path::PathBuf, process::ExitCode};

use clap::CommandFactory;

use super::{Cli, print};
use crate::error::{Class, Classify, Result};

/// The arguments of `walrace man`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example: walrace man ~/.local/share/man/man1 && man walrace")]
pub struct Args {
    /// Created if absent
    pub directory: PathBuf,
}

/// Writes one page for each command.
pub async fn run(args: Args) -> Result<ExitCode> {
    let place = args.directory.display();
    let failed = || format!("cannot write manual pages into {place}");
    fs::create_dir_all(&args.directory).class(Class::Config, failed)?;
    clap_mangen::generate_to(Cli::command(), &args.directory).class(Class::Config, failed)?;
    print(&format!("manual pages are in {place}\n"))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_command_has_a_page() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("man1");
        run(Args { directory: path.clone() }).await.unwrap();
        let page = fs::read_to_string(path.join("walrace.1")).unwrap();
        assert!(page.contains("durable journal"), "{page}");
        for command in Cli::command().get_subcommands() {
            assert!(path.join(format!("walrace-{}.1", command.get_name())).is_file());
        }
    }

    #[tokio::test]
    async fn a_directory_that_cannot_be_written_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = run(Args { directory: file.path().join("man1") }).await.unwrap_err();
        assert!(error.to_string().contains("man1"), "{error}");
    }
}
