//! The oracle of types: what a sink gets for a value of any type is what PostgreSQL's `to_jsonb`
//! gives for it. PostgreSQL itself compares the two, as `jsonb`, so that numbers are equal by value.
//!
//! `WALRACE_ORACLE_ROWS` says how many random rows each table gets (300 where nothing is said), and
//! `WALRACE_ORACLE_SEED` from which seed, -1 to 1.

use std::{collections::BTreeSet, fs, time::Duration};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::kit::{Cluster, Server, source_toml, wait_for};

mod builtin;
mod differences;
mod made;

/// Types that belong together, in one table.
struct Family {
    name: &'static str,
    /// Before the table.
    setup: &'static str,
    /// Whether arrays and a row type of these types have a table too.
    nested: bool,
    columns: &'static [Column],
}

/// A column of a family's table.
#[derive(Clone, Copy)]
struct Column {
    ty: &'static str,
    /// Values at the borders of the type, as SQL.
    edges: &'static [&'static str],
    /// Another value for each row, as SQL over the number `i` of the row.
    random: &'static str,
    /// The first major version that has the type.
    since: u32,
    /// Further borders since a major version.
    later: (u32, &'static [&'static str]),
    /// The extension that it comes from.
    extension: &'static str,
}

const fn column(ty: &'static str, edges: &'static [&'static str], random: &'static str) -> Column {
    Column { ty, edges, random, since: 0, later: (0, &[]), extension: "" }
}

impl Column {
    const fn since(self, major: u32) -> Self {
        Self { since: major, ..self }
    }

    const fn later(self, major: u32, edges: &'static [&'static str]) -> Self {
        Self { later: (major, edges), ..self }
    }

    const fn of(self, extension: &'static str) -> Self {
        Self { extension, ..self }
    }

    /// Every border that the server knows, as a value of the type.
    fn edges(&self, server: &Facts) -> Vec<String> {
        let later = if server.major >= self.later.0 { self.later.1 } else { &[] };
        self.edges.iter().chain(later).map(|edge| format!("({edge})::{}", self.ty)).collect()
    }

    /// A random value, now and then a border or NULL.
    fn any(&self, server: &Facts) -> String {
        let edges = self.edges(server);
        let cases = edges.iter().enumerate();
        let cases = cases.map(|(n, edge)| format!("when {n} then {edge} ")).collect::<String>();
        let (ty, last, sides) = (self.ty, edges.len(), (edges.len() + 1) * 8);
        format!(
            "case floor(random() * {sides})::int {cases}when {last} then null::{ty} \
             else ({})::{ty} end",
            self.random
        )
    }
}

/// Sessions print in every other way than the documented one, unless they say so themselves.
const ODD_SESSIONS: &str = "alter role postgres set intervalstyle = 'sql_standard';
    alter role postgres set datestyle = 'SQL, DMY';
    alter database postgres set timezone = 'Asia/Kathmandu';
    alter database postgres set bytea_output = 'escape';
    alter database postgres set extra_float_digits = -5";
const PLAIN_SESSION: &str = "set intervalstyle = 'postgres'; set datestyle = 'ISO';
    set timezone = 'UTC'; set bytea_output = 'hex'; set extra_float_digits = 1";

/// What the server is and has.
struct Facts {
    major: u32,
    extensions: BTreeSet<String>,
    xml: bool,
}

impl Facts {
    async fn of(cluster: &Cluster) -> Self {
        let session = cluster.connect().await;
        let number = session.query_one("show server_version_num", &[]).await.unwrap();
        let rows = session.query("select name::text from pg_available_extensions", &[]).await;
        Self {
            major: number.get::<_, &str>(0).parse::<u32>().unwrap() / 10_000,
            extensions: rows.unwrap().iter().map(|row| row.get(0)).collect(),
            xml: session.batch_execute("select xml '<a/>'").await.is_ok(),
        }
    }

    /// Whether the server can have such a column. The one place that leaves any out.
    fn have(&self, column: &Column) -> bool {
        let missing = match column {
            _ if self.major < column.since => format!("PostgreSQL {}", column.since),
            _ if !column.extension.is_empty() && !self.extensions.contains(column.extension) => {
                format!("the extension {}", column.extension)
            }
            _ if column.ty == "xml" && !self.xml => "a server built with libxml".to_owned(),
            _ => return true,
        };
        println!("skipped: {} needs {missing}", column.ty);
        false
    }
}

/// A table of the oracle, with all that fills it.
pub(crate) struct Table {
    pub(crate) name: String,
    setup: String,
    /// Type, borders, random value.
    pub(crate) columns: Vec<(String, Vec<String>, String)>,
}

/// Creates a table for each family of built-in types that the server has.
pub(crate) async fn create_builtin(cluster: &Cluster) -> Vec<Table> {
    let facts = Facts::of(cluster).await;
    let mut tables = Vec::new();
    for family in builtin::FAMILIES {
        let had = family.columns.iter().copied().filter(|column| facts.have(column));
        let table = Table::plain(family, &had.collect::<Vec<_>>(), &facts);
        table.create(cluster).await;
        tables.push(table);
    }
    tables
}

impl Table {
    /// The family's types themselves.
    fn plain(family: &Family, columns: &[Column], server: &Facts) -> Self {
        let extensions: BTreeSet<_> = columns.iter().map(|column| column.extension).collect();
        let create = |name: &&str| format!("create extension if not exists {name};");
        let extensions = extensions.iter().filter(|name| !name.is_empty()).map(create);
        let make =
            |column: &Column| (column.ty.to_owned(), column.edges(server), column.any(server));
        Self {
            name: family.name.to_owned(),
            setup: extensions.collect::<String>() + family.setup,
            columns: columns.iter().map(make).collect(),
        }
    }

    /// Arrays of the family's types, a row type that holds them all, and an array of it.
    fn nested(family: &Family, columns: &[Column], server: &Facts) -> Self {
        let name = family.name;
        let mut nested: Vec<_> = columns.iter().map(|column| arrays(column, server)).collect();
        let fields = columns.iter().enumerate();
        let fields = fields.map(|(n, column)| format!("\"f {n}\" {}", column.ty));
        let fields = fields.collect::<Vec<_>>().join(", ");
        let nulls = vec!["null"; columns.len()].join(", ");
        let any = || columns.iter().map(|column| column.any(server)).collect::<Vec<_>>().join(", ");
        let ty = format!("all_{name}");
        nested.push((
            ty.clone(),
            vec![format!("row({nulls})::{ty}")],
            format!("row({})::{ty}", any()),
        ));
        let many = format!("array[row({})::{ty}, null, row({})::{ty}]", any(), any());
        nested.push((format!("{ty}[]"), vec![format!("array[row({nulls})::{ty}]")], many));
        Self {
            name: format!("{name}_nested"),
            setup: format!("create type {ty} as ({fields})"),
            columns: nested,
        }
    }

    /// How many rows hold one border each.
    fn edges(&self) -> usize {
        self.columns.iter().map(|(_, edges, _)| edges.len()).sum()
    }

    async fn create(&self, cluster: &Cluster) {
        if !self.setup.is_empty() {
            cluster.sql(&self.setup).await;
        }
        let columns = self.columns.iter().enumerate();
        let columns = columns.map(|(n, (ty, _, _))| format!(", c{n} {ty}")).collect::<String>();
        let create = format!("create table {} (id bigserial primary key{columns})", self.name);
        cluster.sql(&create).await;
    }

    /// Inserts each border with nulls around it, and the random rows.
    async fn fill(&self, cluster: &Cluster) {
        let mut statements = format!("select setseed({});", seed());
        for (n, (_, edges, _)) in self.columns.iter().enumerate() {
            for edge in edges {
                statements += &format!("insert into {} (c{n}) values ({edge});", self.name);
            }
        }
        let values: Vec<_> = self.columns.iter().map(|(_, _, any)| any.as_str()).collect();
        let names: Vec<_> = (0..values.len()).map(|n| format!("c{n}")).collect();
        statements += &format!(
            "insert into {} ({}) select {} from generate_series(1, {}) i",
            self.name,
            names.join(", "),
            values.join(", "),
            rows()
        );
        cluster.sql(&statements).await;
    }
}

/// An array type, with arrays of one and two dimensions and of bounds of their own.
fn arrays(column: &Column, server: &Facts) -> (String, Vec<String>, String) {
    let (ty, any) = (column.ty, column.any(server));
    let mut edges = vec![format!("'{{}}'::{ty}[]"), format!("array[null::{ty}]")];
    edges.extend(
        column.edges(server).iter().map(|edge| format!("array[{edge}, null::{ty}, {edge}]")),
    );
    let random = format!(
        "case i % 4 when 0 then array[[{any}, null::{ty}], [{any}, {any}]] \
         when 1 then array_fill({any}, array[1, 2, 1], array[i % 7 - 3, 0, i]) \
         else array[{any}, {any}, {any}] end"
    );
    (format!("{ty}[]"), edges, random)
}

/// Lines of each table that a strict parser reads too; the server, which is faster, reads all.
const STRICT_LINES: usize = 1_000;

/// One change as the sink has it.
#[derive(Deserialize)]
struct Line {
    source_table: String,
    after: Option<Box<RawValue>>,
}

fn rows() -> usize {
    std::env::var("WALRACE_ORACLE_ROWS").map_or(300, |count| count.parse().expect("a number"))
}

fn seed() -> f64 {
    std::env::var("WALRACE_ORACLE_SEED").map_or(0.5, |seed| seed.parse().expect("from -1 to 1"))
}

/// Loads what the sink has of a table beside it, and has PostgreSQL compare the two.
async fn compare(cluster: &Cluster, table: &str, text: &str) {
    let session = cluster.connect().await;
    session.batch_execute(PLAIN_SESSION).await.unwrap();
    session.batch_execute("create temp table got (id bigint, row jsonb)").await.unwrap();
    let head = format!("{{\"source_table\":\"{table}\",");
    let own: Vec<&str> = text.lines().filter(|line| line.starts_with(&head)).collect();
    for line in own.iter().take(STRICT_LINES) {
        let line: Line = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!((line.source_table.as_str(), line.after.is_some()), (table, true));
    }
    for chunk in own.chunks(1_000) {
        let load = "insert into got select (row ->> 'id')::bigint, row
                    from (select unnest($1::text[])::jsonb -> 'after' as row) rows";
        session.execute(load, &[&chunk]).await.unwrap();
    }
    let sql = format!(
        "select key, t.row -> key as theirs, got.row -> key as ours
         from (select id, to_jsonb({table}) as row from {table}) t
         left join got using (id)
         cross join lateral jsonb_object_keys(t.row) as key
         where t.row is distinct from got.row and t.row -> key is distinct from got.row -> key
         limit 10"
    );
    let wrong = session.json_rows(&sql).await;
    assert!(wrong.is_empty(), "{table}, seed {}: {wrong:#?}", seed());
    let counts = format!(
        "select (select count(*) from {table}), (select count(*) from got),
                (select count(*) from {table} join got using (id)
                 where to_jsonb({table}) is distinct from got.row)"
    );
    let counts = session.query_one(&counts, &[]).await.unwrap();
    assert_eq!(counts.get::<_, i64>(0), counts.get::<_, i64>(1), "rows of {table}");
    assert_eq!(counts.get::<_, i64>(2), 0, "rows of {table} with other keys");
}

/// A server whose one sink is a file, once it runs.
async fn deliver(cluster: &Cluster, types: &str) -> Server {
    let source = source_toml("app", &cluster.unix_url());
    let sink = format!("[sink.out]\nkind = \"file\"\npath = \"out.jsonl\"\n{types}");
    let mut server = Server::new(&format!("{source}\n{sink}"));
    server.start_ready().await;
    server
}

/// The lines of the sink's file, once it has so many.
async fn delivered(server: &Server, changes: usize) -> String {
    let all = async || {
        let delivered = server.metric("walrace_sink_delivered_changes_total", &["out"]).await?;
        (delivered >= changes as f64).then_some(())
    };
    wait_for(Duration::from_secs(480), all, || server.log_tail()).await;
    let text = fs::read_to_string(server.path("out.jsonl")).unwrap();
    assert_eq!(text.lines().count(), changes);
    text
}

#[tokio::test]
async fn values_of_every_type_are_what_postgres_makes_of_them() {
    let cluster = Cluster::start().await;
    let facts = Facts::of(&cluster).await;
    cluster.sql(ODD_SESSIONS).await;
    let mut tables = Vec::new();
    for family in builtin::FAMILIES.iter().chain(made::FAMILIES) {
        let had = family.columns.iter().copied().filter(|column| facts.have(column));
        let had: Vec<Column> = had.collect();
        let plain = Table::plain(family, &had, &facts);
        let nested = family.nested.then(|| Table::nested(family, &had, &facts));
        for table in [Some(plain), nested].into_iter().flatten() {
            table.create(&cluster).await;
            tables.push(table);
        }
    }
    let mut server = deliver(&cluster, "").await;
    for table in &tables {
        table.fill(&cluster).await;
    }
    let changes = tables.iter().map(|table| table.edges() + rows()).sum();
    let text = delivered(&server, changes).await;
    for table in &tables {
        compare(&cluster, &table.name, &text).await;
    }
    let columns: usize = tables.iter().map(|table| table.columns.len()).sum();
    println!("{changes} rows of {} tables with {columns} columns are equal", tables.len());
    assert!(server.stop().await.success());
}
