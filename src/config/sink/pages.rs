//! The lists of sinks in README.md and docs/guarantees.md are made of the pages in docs/sinks: each
//! page says in a comment below its title where it stands.

use std::{fmt::Write, fs, path::Path};

/// The rows of the README's table, in their order.
const GROUPS: [&str; 5] =
    ["logs and queues", "HTTP", "databases and search", "files", "live and caches"];

/// What a guarantee begins with, the strongest first.
const STRENGTHS: [&str; 3] = ["each change", "the last state", "at least once"];

const BEGIN: &str = "<!-- sinks: made of the pages in docs/sinks -->\n";
const END: &str = "<!-- /sinks -->\n";

/// What a page says about its sink.
struct Page {
    kind: String,
    group: String,
    /// Follows the sink's name in the README.
    note: String,
    mechanism: String,
    holds: String,
}

impl Page {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let (_, head) = text.split_once("\n<!-- in README.md and docs/guarantees.md\n").unwrap();
        let (head, _) = head.split_once("\n-->\n").unwrap();
        let find = |name: &str| {
            let value = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.map(str::to_owned)
        };
        let line = |name| find(name).unwrap_or_else(|| panic!("{}: no `{name}`", path.display()));
        Self {
            kind: path.file_stem().unwrap().to_str().unwrap().to_owned(),
            group: line("group"),
            note: find("note").unwrap_or_default(),
            mechanism: line("mechanism"),
            holds: line("holds"),
        }
    }

    fn strength(&self) -> usize {
        let found = STRENGTHS.iter().position(|begin| self.holds.starts_with(begin));
        found.unwrap_or_else(|| panic!("{}: `holds` begins with none of {STRENGTHS:?}", self.kind))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<Page> {
    let folder = fs::read_dir(root().join("docs/sinks")).unwrap();
    let mut pages: Vec<_> = folder.map(|entry| Page::read(&entry.unwrap().path())).collect();
    pages.sort_by(|a, b| a.kind.cmp(&b.kind));
    pages
}

/// Compares what stands between the two marks with what the pages say, or writes it.
fn check(path: &str, table: &str) {
    let text = fs::read_to_string(root().join(path)).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let made = format!("{before}{BEGIN}\n{table}\n{END}{after}");
    if std::env::var_os("WALRACE_GENERATE").is_some() {
        fs::write(root().join(path), made).unwrap();
    } else {
        assert!(made == text, "{path} is behind docs/sinks: test with WALRACE_GENERATE=1");
    }
}

#[test]
fn the_readme_lists_every_sink() {
    let pages = pages();
    let mut table = "| sinks | pages |\n|---|---|\n".to_owned();
    let mut listed = 0;
    for group in GROUPS {
        let own = pages.iter().filter(|page| page.group == group);
        let links: Vec<_> = own
            .map(|Page { kind, note, .. }| format!("[`{kind}`](docs/sinks/{kind}.md) {note}"))
            .map(|link| link.trim_end().to_owned())
            .collect();
        listed += links.len();
        writeln!(table, "| {group} | {} |", links.join(" · ")).unwrap();
    }
    assert_eq!(listed, pages.len(), "a page is of none of {GROUPS:?}");
    check("README.md", &table);
}

#[test]
fn the_guarantees_name_every_sink_the_strongest_first() {
    let mut pages = pages();
    pages.sort_by_key(Page::strength);
    let mut table = "| sink | mechanism | what holds after any crash |\n|---|---|---|\n".to_owned();
    for Page { kind, mechanism, holds, .. } in &pages {
        writeln!(table, "| [`{kind}`](sinks/{kind}.md) | {mechanism} | {holds} |").unwrap();
    }
    check("docs/guarantees.md", &table);
}
