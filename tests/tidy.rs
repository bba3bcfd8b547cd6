//! The rules of the tree that a compiler does not hold: who may use whom, how large things grow,
//! and that what is named exists.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails at once")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const SRC_ENTRIES_MAX: usize = 22;
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;

/// The bottom of the tree, which everything may use.
const WORDS: &[&str] =
    &["error", "change", "schema", "config", "disk", "sqlite", "tls", "failpoint", "metrics"];

/// Which rooms of `src` a room may use beside itself; `WORDS` stands for all of those. A room that
/// is not listed is at the top, and may use every other, but then none of the listed may use it.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("failpoint", &[]),
    ("disk", &["error", "failpoint"]),
    ("sqlite", &["error"]),
    ("tls", &["error"]),
    ("schema", &["error"]),
    ("change", &["error", "schema"]),
    ("config", &["error", "change", "schema"]),
    ("source", &["WORDS"]),
    ("journal", &["WORDS"]),
    ("format", &["WORDS"]),
    ("transform", &["WORDS", "format"]),
    ("sink", &["WORDS", "format"]),
    ("catalog", &["WORDS", "sink"]),
    ("parking", &["WORDS", "catalog", "journal"]),
    ("pipeline", &["WORDS", "source", "journal", "transform", "sink", "catalog", "parking"]),
    ("job", &["WORDS", "journal", "transform", "sink", "catalog", "parking", "pipeline"]),
    (
        "runtime",
        &[
            "WORDS",
            "source",
            "journal",
            "transform",
            "format",
            "sink",
            "catalog",
            "parking",
            "pipeline",
            "job",
        ],
    ),
    ("metrics", &["WORDS", "runtime", "catalog", "sink"]),
];

#[test]
fn each_room_uses_only_what_lies_below_it() {
    let mut problems = Vec::new();
    for file in files("rs").into_iter().filter(|file| file.starts_with("src")) {
        let room = file.iter().nth(1).unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        let Some(below) = layer(&room) else { continue };
        for used in rooms_used(&without_tests(&read(&file))) {
            if used != room && !below.contains(used.as_str()) {
                problems.push(format!("{}: `{room}` may not use `{used}`", file.display()));
            }
        }
    }
    none(&problems);
}

#[test]
fn the_check_of_layers_sees_each_way_to_name_a_room() {
    let code = "use crate::{\n    change::{Batch, Change},\n    error::Result,\n};\n\
                // crate::sink in a comment\nfn f() -> crate::journal::Offset {}\n";
    let rooms: Vec<String> = rooms_used(code).into_iter().collect();
    assert_eq!(rooms, ["change", "error", "journal"]);
    assert!(!layer("journal").unwrap().contains("sink"));
    assert!(layer("sink").unwrap().contains("format"));
}

#[test]
fn the_root_of_src_can_be_read_at_a_glance() {
    let entries = fs::read_dir(root().join("src")).unwrap().count();
    assert!(entries <= SRC_ENTRIES_MAX, "src has {entries} entries, more than {SRC_ENTRIES_MAX}");
}

#[test]
fn files_functions_and_lines_stay_small() {
    let mut problems = Vec::new();
    for file in files("rs") {
        let text = read(&file);
        let code = if file.ends_with("tests.rs") { String::new() } else { without_tests(&text) };
        let lines = code.lines().count();
        if lines > FILE_LINES_MAX {
            problems.push(format!("{}: {lines} lines without its tests", file.display()));
        }
        for (name, line, lines) in functions(&code) {
            if lines > FUNCTION_LINES_MAX {
                problems.push(format!("{}:{line}: `{name}` has {lines} lines", file.display()));
            }
        }
        if file.starts_with("tests") {
            continue; // what rustfmt leaves longer there is SQL and JSON
        }
        for (number, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX && !line.contains("://") {
                problems.push(format!("{}:{}: {columns} columns", file.display(), number + 1));
            }
        }
    }
    none(&problems);
}

#[test]
fn the_length_of_a_function_is_that_of_its_body() {
    let code = [
        "impl A {\n    pub(crate) async fn long(\n        a: u8,\n    ) -> u8 {\n",
        "        a\n\n        // why\n        + 1\n    }\n}\nfn short() {}\n",
    ]
    .concat();
    assert_eq!(functions(&code), [("long".into(), 2, 2), ("short".into(), 11, 0)]);
}

#[test]
fn every_link_to_a_file_leads_to_one() {
    let mut problems = Vec::new();
    for file in files("md") {
        let folder = file.parent().unwrap();
        for link in links(&read(&file)) {
            let target = link.split('#').next().unwrap();
            let outside = link.contains("://") || link.starts_with("mailto:") || target.is_empty();
            let from = if target.starts_with('/') { Path::new("") } else { folder };
            let path = root().join(from).join(target.trim_start_matches('/'));
            if !outside && !path.exists() {
                problems.push(format!("{}: no file `{target}`", file.display()));
            }
            let Some((page, heading)) = link.split_once('#').filter(|_| !link.contains("://"))
            else {
                continue;
            };
            let page = if page.is_empty() { file.clone() } else { normal(folder, page) };
            if page.extension().is_some_and(|extension| extension == "md")
                && root().join(&page).exists()
                && !headings(&read(&page)).contains(heading)
            {
                problems.push(format!("{}: no heading `{link}`", file.display()));
            }
        }
    }
    none(&problems);
}

#[test]
fn each_page_is_found_from_the_index_and_each_sink_from_both_lists() {
    let linked = |page: &str| -> BTreeSet<PathBuf> {
        let folder = Path::new(page).parent().unwrap();
        links(&read(Path::new(page))).iter().map(|link| normal(folder, link)).collect()
    };
    let index = linked("docs/README.md");
    let lists = [&linked("README.md"), &linked("docs/guarantees.md")];
    let mut problems = Vec::new();
    for page in files("md").into_iter().filter(|page| page.starts_with("docs")) {
        let alone = page.ends_with("README.md") || page.starts_with("docs/adr");
        let found = if page.starts_with("docs/sinks") { &lists[..] } else { &[&index] };
        if !alone && !found.iter().all(|links| links.contains(&page)) {
            problems.push(format!("{}: not linked where it is looked for", page.display()));
        }
    }
    none(&problems);
}

/// What links call the headings of a page: in lower case, without marks, with dashes for blanks.
fn headings(text: &str) -> BTreeSet<String> {
    let mut fenced = false;
    let mut found = BTreeSet::new();
    for line in text.lines() {
        fenced ^= line.starts_with("```");
        if let Some(heading) = line.strip_prefix('#').filter(|_| !fenced) {
            let heading = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            found.insert(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
        }
    }
    found
}

/// Where a link of a page in `folder` leads, from the root.
fn normal(folder: &Path, link: &str) -> PathBuf {
    let mut path = folder.to_owned();
    for part in link.split('#').next().unwrap().split('/') {
        if part == ".." { _ = path.pop() } else { path.push(part) }
    }
    path
}

#[test]
fn no_page_says_exactly_once_because_that_needs_a_boundary() {
    let mut problems = Vec::new();
    for file in files("md") {
        for (number, line) in read(&file).lines().enumerate() {
            let line = line.to_lowercase().replace('-', " ");
            if line.contains("exactly once") {
                problems.push(format!("{}:{}", file.display(), number + 1));
            }
        }
    }
    none(&problems);
}

#[test]
fn links_are_found_outside_of_code_only() {
    let text = "[a](one.md) and ![b](two.png#x)\n`[c](no.md)`\n\
                ```\n[d](no.md)\n```\n[e](three)";
    assert_eq!(links(text), ["one.md", "two.png#x", "three"]);
}

#[test]
fn nothing_is_left_for_later_and_no_path_of_one_machine_is_named() {
    // Written in halves, or this file would find itself.
    let unfinished = [["to", "do!("], ["unimple", "mented!("], ["FIX", "ME"], ["X", "XX"]];
    let machine = [["/wo", "rk/"], ["/ro", "ot/"], ["/Us", "ers/"]];
    let mut problems = Vec::new();
    for kind in ["rs", "md", "toml", "sh", "py", "yml", "yaml", "run", "Makefile"] {
        for file in files(kind) {
            for (number, line) in read(&file).lines().enumerate() {
                let found = unfinished.iter().chain(&machine).map(|halves| halves.concat());
                for word in found.filter(|word| contains_word(line, word)) {
                    problems.push(format!("{}:{}: `{word}`", file.display(), number + 1));
                }
            }
        }
    }
    none(&problems);
}

#[test]
fn each_row_of_the_coverage_names_tests_that_exist() {
    let path = Path::new("docs/coverage.md");
    if !root().join(path).exists() {
        return;
    }
    let tests: BTreeSet<String> =
        files("rs").iter().flat_map(|file| functions(&read(file))).map(|(name, ..)| name).collect();
    let mut problems = Vec::new();
    let mut rows = 0;
    for line in read(path).lines() {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        if cells.len() < 2 || cells[0].parse::<u32>().is_err() {
            continue;
        }
        rows += 1;
        let names = cells[cells.len() - 1].split([',', ' ']).map(|name| name.trim_matches('`'));
        let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
        if names.is_empty() {
            problems.push(format!("row {} names no test", cells[0]));
        }
        for name in names {
            let function = name.rsplit("::").next().unwrap();
            if !tests.contains(function) {
                problems.push(format!("row {}: no test `{name}`", cells[0]));
            }
        }
    }
    assert!(rows > 0, "{} has no row", path.display());
    none(&problems);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &Path) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

fn none(problems: &[String]) {
    assert!(problems.is_empty(), "\n  {}", problems.join("\n  "));
}

/// The files of the project whose name or extension is `kind`, relative to its root.
fn files(kind: &str) -> Vec<PathBuf> {
    const NOT_OURS: [&str; 5] = [".git", "target", "node_modules", "dist", "walrace-data"];
    let mut found = Vec::new();
    let mut folders = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            if entry.file_type().unwrap().is_dir() {
                if !NOT_OURS.contains(&name.as_str()) {
                    folders.push(path);
                }
            } else if name == kind || path.extension().is_some_and(|extension| extension == kind) {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// The code before the module of tests at the end of a file.
fn without_tests(text: &str) -> String {
    let tests = ["#[cfg(test)]\nmod ", "#[cfg(all(test"];
    let cut = tests.iter().filter_map(|tests| text.find(&format!("\n{tests}"))).min();
    text[..cut.map_or(text.len(), |at| at + 1)].to_owned()
}

fn layer(room: &str) -> Option<BTreeSet<&'static str>> {
    let (_, below) = LAYERS.iter().find(|(name, _)| *name == room)?;
    let mut rooms: BTreeSet<&str> = below.iter().copied().collect();
    if rooms.remove("WORDS") {
        rooms.extend(WORDS);
    }
    Some(rooms)
}

/// The rooms named by `crate::room` and `crate::{room, ...}`.
fn rooms_used(code: &str) -> BTreeSet<String> {
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    let code: String = code.lines().filter(is_code).flat_map(|line| [line, "\n"]).collect();
    let mut rooms = BTreeSet::new();
    for (at, pattern) in code.match_indices("crate::") {
        let rest = &code[at + pattern.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            rooms.insert(identifier(rest));
            continue;
        };
        let mut depth = 0;
        let mut expects_name = true;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => expects_name = true,
                c if c.is_alphabetic() && depth == 0 && expects_name => {
                    rooms.insert(identifier(&group[at..]));
                    expects_name = false;
                }
                _ => {}
            }
        }
    }
    // A macro or a type at the root of the crate begins with another letter, or is no room.
    rooms.into_iter().filter(|room| exists_in_src(room)).collect()
}

fn exists_in_src(room: &str) -> bool {
    let known = LAYERS.iter().any(|(name, _)| *name == room);
    let src = root().join("src");
    known || src.join(room).is_dir() || src.join(format!("{room}.rs")).is_file()
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Name, line and length of each function: the lines of its body that are code, as clippy counts.
/// It stands on rustfmt: a body ends at the first `}` as far to the right as its `fn` line begins.
fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some(at) = code.find("fn ") else { continue };
        let qualifiers = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe"];
        if !code[..at].split_whitespace().all(|word| qualifiers.contains(&word)) {
            continue;
        }
        let name = identifier(&code[at + 3..]);
        let end = format!("{}}}", &line[..line.len() - code.len()]);
        let one_line = line.ends_with('}') || line.ends_with(';');
        let rest = if one_line { &[][..] } else { &lines[number + 1..] };
        let body = rest.iter().take_while(|line| **line != end).skip_while(|line| {
            !code.ends_with('{') && !line.trim_start().starts_with(')') && !line.ends_with('{')
        });
        let head = usize::from(!code.ends_with('{') && !one_line);
        let counts = |line: &&&str| {
            let line = line.trim_start();
            !line.is_empty() && !line.starts_with("//")
        };
        found.push((name, number + 1, body.filter(counts).count().saturating_sub(head)));
    }
    found
}

/// The targets of `[text](target)` outside of code.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if fenced {
            continue;
        }
        let prose: String = line.split('`').step_by(2).collect();
        for (at, _) in prose.match_indices("](") {
            let target = prose[at + 2..].split([')', ' ']).next().unwrap_or_default();
            found.push(target.to_owned());
        }
    }
    found
}

/// Whether a line has the text, and not only as a part of a longer word.
fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '.');
        !joins(before) && (word.ends_with(['/', '(', '!']) || !joins(after))
    })
}
