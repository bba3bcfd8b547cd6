//! Where this machine has the programs of a PostgreSQL server.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::getuid;

use crate::error::{Error, Result};

/// The oldest server that Walrace captures.
const MAJOR_MIN: u32 = 14;

/// Folders of the packages of distributions, one folder a version; `*` stands for it.
const PACKAGES: [(&str, &str); 3] = [
    ("/usr/lib/postgresql", "bin"), // Debian, Ubuntu
    ("/usr", "bin"),                // Red Hat: /usr/pgsql-17/bin
    ("/opt/homebrew/opt", "bin"),   // macOS: postgresql@17
];

/// A server that is installed.
#[derive(Debug)]
pub(super) struct Found {
    /// The folder with `postgres` and `initdb`.
    pub(super) bin: PathBuf,
    /// Such as `15.7`.
    pub(super) version: String,
}

/// `WALRACE_PG_BIN`, else the first of the usual places that has a server which Walrace captures.
pub(super) fn find() -> Result<Found> {
    if let Some(bin) = env::var_os("WALRACE_PG_BIN").filter(|bin| !bin.is_empty()) {
        let bin = std::path::absolute(&bin).unwrap_or_else(|_| bin.into());
        return probe(&bin).ok_or_else(|| {
            let bin = bin.display();
            Error::config(format!("WALRACE_PG_BIN names {bin}, where no PostgreSQL server runs"))
                .remedy("let it name the folder that holds `postgres` and `initdb`, 14 or newer")
        });
    }
    candidates().iter().find_map(|bin| probe(bin)).ok_or_else(|| {
        Error::config("there is no PostgreSQL server (14 or newer) on this machine").remedy(
            "`make demo` installs one; or apt-get install postgresql; or let WALRACE_PG_BIN name \
             the folder that holds `postgres` and `initdb`",
        )
    })
}

fn candidates() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    let config = Command::new("pg_config").arg("--bindir").output();
    if let Ok(output) = config {
        folders.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    for (folder, bin) in PACKAGES {
        folders.extend(newest_first(Path::new(folder)).into_iter().map(|path| path.join(bin)));
    }
    folders.extend(newest_first(&cache()).into_iter().map(|path| path.join("bin")));
    folders
}

/// Where scripts/environment.sh says that the scripts keep what they install.
fn cache() -> PathBuf {
    let variable = |name| env::var_os(name).map(PathBuf::from);
    variable("WALRACE_CACHE").unwrap_or_else(|| {
        if getuid().is_root() {
            return PathBuf::from("/var/cache/walrace");
        }
        let home = || variable("HOME").unwrap_or_default().join(".cache");
        variable("XDG_CACHE_HOME").unwrap_or_else(home).join("walrace")
    })
}

/// The folders below `parent` that are named after a version, the newest first.
fn newest_first(parent: &Path) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            Some((major_of_folder(path.file_name()?.to_str()?)?, path))
        })
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, path)| path).collect()
}

/// `15`, `postgres-18`, `pgsql-17`, `postgresql@16`.
fn major_of_folder(name: &str) -> Option<u32> {
    let number = ["postgresql@", "postgres-", "pgsql-", ""]
        .into_iter()
        .find_map(|prefix| name.strip_prefix(prefix))?;
    number.parse().ok()
}

/// The server in `bin`, if it is one that Walrace captures.
fn probe(bin: &Path) -> Option<Found> {
    let postgres = bin.join("postgres");
    if !bin.is_absolute() || !postgres.is_file() || !bin.join("initdb").is_file() {
        return None;
    }
    let output = Command::new(postgres).arg("--version").output().ok()?;
    let version = version_of(&String::from_utf8_lossy(&output.stdout))?;
    Some(Found { bin: bin.to_owned(), version })
}

/// The version in `postgres (PostgreSQL) 15.7 (Debian 15.7-0)`, if it is new enough.
fn version_of(text: &str) -> Option<String> {
    let version = text.split_once(") ")?.1.split_whitespace().next()?;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    (digits.parse::<u32>().ok()? >= MAJOR_MIN).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_too_old_is_passed_over() {
        let line = "postgres (PostgreSQL) 15.7 (Debian 15.7-0+deb12u1)\n";
        assert_eq!(version_of(line).as_deref(), Some("15.7"));
        assert_eq!(version_of("postgres (PostgreSQL) 18beta1").as_deref(), Some("18beta1"));
        assert_eq!(version_of("postgres (PostgreSQL) 13.22"), None);
        assert_eq!(version_of("command not found"), None);
    }

    #[test]
    fn the_newest_of_several_versions_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["9", "18", "postgres-17", "tools", "15.old"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let names = newest_first(folder.path());
        let names: Vec<_> = names.iter().map(|path| path.file_name().unwrap()).collect();
        assert_eq!(names, ["18", "postgres-17", "9"]);
    }
}
