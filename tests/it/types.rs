//! The oracle of types: what a sink gets for a value of any type is what PostgreSQL's `to_jsonb`
//! gives for it. PostgreSQL itself compares the two, as `jsonb`, so that numbers are equal by value.
//!
//! Rows are random; `WALRACE_ORACLE_ROWS` says how many of each family (300 where nothing is said).

use std::{fs, time::Duration};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::kit::{Cluster, Server, source_toml, wait_for};

/// Types that belong together, in one table.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    /// Before the table.
    setup: &'static str,
    pub(crate) columns: &'static [Column],
}

/// A column of a family's table.
pub(crate) struct Column {
    pub(crate) ty: &'static str,
    /// Values at the borders of the type, as SQL.
    pub(crate) edges: &'static [&'static str],
    /// Another value for each row, as SQL over the number `i` of the row.
    pub(crate) random: &'static str,
}

const fn column(ty: &'static str, edges: &'static [&'static str], random: &'static str) -> Column {
    Column { ty, edges, random }
}

/// Any character but NUL, among them quotes, backslashes, braces and commas.
const TEXT: &str = "(select coalesce(string_agg(
    substr(e'abc \\\\\"\\'{},()[]:\\n\\t\\r\\x01é漢🙂NULLnull', 1 + (random() * 34)::int, 1), ''), '')
    from generate_series(1, (i * 7) % 12 + (random() * 3)::int))";

pub(crate) const FAMILIES: &[Family] = &[
    Family {
        name: "numbers",
        setup: "",
        columns: &[
            column("int2", &["-32768", "32767"], "((random() - 0.5) * 65534)::int2"),
            column("int4", &["-2147483648", "2147483647"], "((random() - 0.5) * 4e9)::int4"),
            column(
                "int8",
                &["-9223372036854775808", "9223372036854775807", "9007199254740993"],
                "((random() - 0.5) * 1.8e19)::int8",
            ),
            column(
                "numeric",
                &[
                    "'NaN'",
                    "'Infinity'",
                    "'-Infinity'",
                    "'-0.00'",
                    "'1e-1000'",
                    "repeat('9', 1000)::numeric",
                    "('0.' || repeat('1', 1000))::numeric",
                ],
                "((random() - 0.5)::numeric * 10::numeric ^ ((random() * 60)::int - 30))",
            ),
            column("numeric(10, 2)", &["'12345678.90'"], "((random() - 0.5) * 1e7)::numeric"),
            column(
                "float4",
                &["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "'1e-45'", "'3.4028235e38'"],
                "((random() - 0.5) * 10 ^ ((random() * 60)::int - 30))::float4",
            ),
            column(
                "float8",
                &["'NaN'", "'Infinity'", "'-0'", "'5e-324'", "'1.7976931348623157e308'"],
                "(random() - 0.5) * 10 ^ ((random() * 600)::int - 300)",
            ),
            column(
                "money",
                &["'-92233720368547758.08'"],
                "((random() - 0.5) * 1e6)::numeric::money",
            ),
            column("bool", &["true", "false"], "random() < 0.5"),
            column("oid", &["0", "4294967295"], "(random() * 4e9)::int8::oid"),
        ],
    },
    Family {
        name: "texts",
        setup: "",
        columns: &[
            column("text", &["''", "'NULL'", "'{}'", "e'\\x7f'", "repeat('x', 100000)"], TEXT),
            column("varchar(40)", &["''"], TEXT),
            column("char(50)", &["''", "' a '"], TEXT),
            column("name", &["''", "repeat('é', 31)"], TEXT),
            column("\"char\"", &["''", "'a'"], "chr(33 + i % 90)::\"char\""),
            column(
                "bytea",
                &["''", "'\\x00ff5c27'", "decode(repeat('00', 5000), 'hex')"],
                "decode(md5(i::text), 'hex')",
            ),
            column("uuid", &["'00000000-0000-0000-0000-000000000000'"], "gen_random_uuid()"),
            column("bit(5)", &["B'00000'"], "(i % 32)::bit(5)"),
            column("varbit", &["''"], "(i::bit(20))::varbit"),
            column("tsvector", &["''", "to_tsvector('a ''b'' c\\d')"], "to_tsvector(md5(i::text))"),
            column("tsquery", &["'a & !b'"], "to_tsquery('a' || i || ' | b')"),
            column("pg_lsn", &["'0/0'", "'FFFFFFFF/FFFFFFFF'"], "('0/' || to_hex(i))::pg_lsn"),
            column("jsonpath", &["'$.a[*] ? (@ > 1)'"], "'$.a'"),
        ],
    },
    Family {
        name: "times",
        setup: "",
        columns: &[
            column(
                "date",
                &[
                    "'infinity'",
                    "'-infinity'",
                    "'4713-01-01 BC'",
                    "'5874897-12-31'",
                    "'0044-03-15 BC'",
                ],
                "date '2000-01-01' + ((random() - 0.5) * 1e6)::int",
            ),
            column(
                "time",
                &["'00:00'", "'24:00:00'", "'23:59:59.999999'"],
                "(random() * 86399 * interval '1 s')::time",
            ),
            column(
                "timetz",
                &["'24:00:00+15:59'", "'00:00-15:59'", "'12:00:00.5+05:30:15'"],
                "((random() * 86399 * interval '1 s')::time::text || '+0' || i % 10)::timetz",
            ),
            column(
                "timestamp",
                &["'infinity'", "'-infinity'", "'4713-01-01 BC'", "'294276-12-31 23:59:59.999999'"],
                "timestamp '2000-01-01' + (random() - 0.5) * interval '8000 years'",
            ),
            column(
                "timestamptz",
                &[
                    "'infinity'",
                    "'-infinity'",
                    "'4713-01-01 BC'",
                    "'0001-01-01 00:00:00 BC'",
                    "'2000-01-01 00:00:00.000001+15:59'",
                    "'2000-01-01 00:00-15:59'",
                ],
                "timestamptz '2000-01-01' + (random() - 0.5) * interval '8000 years'",
            ),
            column(
                "interval",
                &["'0'", "'-178000000 years'", "'1 mon -1 day 00:00:00.000001'"],
                "(random() - 0.5) * interval '10 years 3 mons 2 days 01:02:03.000004'",
            ),
        ],
    },
    Family {
        name: "documents",
        setup: "",
        columns: &[
            column(
                "jsonb",
                &["'null'", "'{}'", "'[]'", "'\"\"'", "'{\"\": {\"a\": [1, 2.50, 1e400]}}'"],
                "jsonb_build_object('a', i, 'b', md5(i::text), 'c', jsonb_build_array(random(), null))",
            ),
            column(
                "json",
                &[
                    "'null'",
                    "' { \"b\" : 1 , \"a\" : [ ] } '",
                    "'{\"a\": 1, \"a\": 2}'",
                    "'\"\\u00e9\\ud83d\\ude42 \\/ \\n\"'",
                    "e'[1,\\n\\t 2]'",
                    "'-0.0e-5'",
                ],
                "('{\"k' || i || '\" :  [' || random() || ' , \"x y\"]}')::json",
            ),
        ],
    },
    Family {
        name: "places",
        setup: "",
        columns: &[
            column(
                "inet",
                &["'0.0.0.0/0'", "'::1'", "'fe80::1/64'"],
                "('10.0.' || i % 256 || '.1')::inet",
            ),
            column("cidr", &["'::/0'"], "('10.' || i % 256 || '.0.0/16')::cidr"),
            column("macaddr", &["'00:00:00:00:00:00'"], "'08:00:2b:01:02:03'"),
            column("macaddr8", &["'ff:ff:ff:ff:ff:ff:ff:ff'"], "'08:00:2b:01:02:03:04:05'"),
            column("point", &["'(0,-0)'", "'(1e300,NaN)'"], "point(random(), i)"),
            column("line", &["'{1,-1,0}'"], "line(point(0, 0), point(i, 1))"),
            column("lseg", &[], "lseg(point(0, 0), point(i, random()))"),
            column("box", &[], "box(point(0, 0), point(i, random()))"),
            column("path", &["'((0,0),(1,1))'", "'[(0,0),(1,1)]'"], "'[(0,0),(1,2)]'"),
            column("polygon", &["'((0,0),(1,1),(1,0))'"], "polygon(box(point(0, 0), point(i, 1)))"),
            column("circle", &["'<(0,0),0>'"], "circle(point(i, 0), random())"),
        ],
    },
    Family {
        name: "ranges",
        setup: "create type span as range (subtype = float8)",
        columns: &[
            column("int4range", &["'empty'", "'(,)'", "'[1,1]'"], "int4range(i, i + 5)"),
            column("numrange", &["'empty'", "'[-Infinity,NaN)'"], "numrange(i, i + 0.5, '[]')"),
            column(
                "tsrange",
                &["'[,infinity)'"],
                "tsrange('2000-01-01', timestamp '2000-01-01' + i * interval '1 min')",
            ),
            column(
                "tstzrange",
                &["'empty'"],
                "tstzrange('2000-01-01', timestamptz '2000-01-01' + i * interval '1 s', '(]')",
            ),
            column("daterange", &["'(,)'"], "daterange('2000-01-01', date '2000-01-02' + i)"),
            column(
                "int8multirange",
                &["'{}'", "'{(,)}'"],
                "int8multirange(int8range(i, i + 1), int8range(i + 5, i + 9))",
            ),
            column(
                "datemultirange",
                &["'{}'"],
                "datemultirange(daterange('2000-01-01', date '2000-01-02' + i))",
            ),
            column("span", &["'empty'"], "span(random(), 1 + random())"),
        ],
    },
    Family {
        name: "made",
        setup: "create type mood as enum ('ok', 'it''s', 'a \"b\"', 'x,y', '');
                create domain positive as int check (value > 0);
                create domain few as int[] check (cardinality(value) < 5);
                create type inner_row as (n numeric, t text);
                create type outer_row as (a int, \"b c\" inner_row, d inner_row[], e mood)",
        columns: &[
            column("mood", &["''", "'it''s'", "'a \"b\"'"], "(enum_range(null::mood))[1 + i % 5]"),
            column("positive", &["1"], "1 + i"),
            column("few", &["'{}'", "'{NULL,1}'"], "array[i, null]"),
            column(
                "inner_row",
                &["row(null, null)", "row(1.50, '')"],
                "row(random(), md5(i::text))::inner_row",
            ),
            column(
                "outer_row",
                &[
                    "row(null, null, null, null)",
                    "row(1, row('NaN', e'q\"\\\\(),'), array[row(1, null)::inner_row, null], '')",
                ],
                "row(i, row(random(), md5(i::text))::inner_row, array[row(i, 'x y')::inner_row], 'ok')::outer_row",
            ),
            column(
                "mood[]",
                &["'{}'", "array['', 'x,y', null]::mood[]"],
                "array[(enum_range(null::mood))[1 + i % 5]]",
            ),
            column("outer_row[]", &["'{}'"], "array[row(i, null, null, 'it''s')::outer_row, null]"),
        ],
    },
    Family {
        name: "arrays",
        setup: "",
        columns: &[
            column(
                "int4[]",
                &[
                    "'{}'",
                    "'{NULL}'",
                    "'{{1,2},{3,NULL}}'",
                    "'[2:3]={1,2}'",
                    "'[-1:0][5:6]={{1,2},{3,4}}'",
                ],
                "array[i, null, -i]",
            ),
            column("int8[]", &["'{{{1}}}'"], "array[[i], [-i]]"),
            column(
                "text[]",
                &["'{}'", "'{\"\"}'", "'{\"NULL\",NULL}'", "array[e'a\"\\\\b', '{}', ' x ', ',']"],
                "array['v' || i, null, '', 'a b', 'c,d', md5(i::text)]",
            ),
            column("numeric[]", &["'{NaN,Infinity,-1.50}'"], "array[random()::numeric, i]"),
            column("float8[]", &["'{NaN,-Infinity,1e300}'"], "array[random(), -i]"),
            column("bool[]", &["'{t,f,NULL}'"], "array[i % 2 = 0]"),
            column(
                "timestamptz[]",
                &["'{infinity,\"0044-03-15 00:00:00+00 BC\"}'"],
                "array[timestamptz '2000-01-01' + i * interval '1 s']",
            ),
            column("date[]", &["'{infinity}'"], "array[date '2000-01-01' + i]"),
            column(
                "jsonb[]",
                &["array['{\"a\": [1]}', null]::jsonb[]"],
                "array[jsonb_build_object('k', i)]",
            ),
            column(
                "json[]",
                &["array['{ \"a\" : 1 }']::json[]"],
                "array[json_build_object('k', i)]",
            ),
            column("bytea[]", &["array['\\x00'::bytea]"], "array[decode(md5(i::text), 'hex')]"),
            column("uuid[]", &["'{}'"], "array[gen_random_uuid(), null]"),
            column(
                "box[]",
                &["'{}'"],
                "array[box(point(0, 0), point(i, 1)), box(point(1, 2), point(3, 4))]",
            ),
            column("int4range[]", &["'{empty,\"[1,2)\"}'"], "array[int4range(i, i + 3)]"),
            column("varchar(5)[]", &["'{abc,NULL}'"], "array[(i % 1000)::varchar(5)]"),
            column("interval[]", &["'{1 day,-1 mons}'"], "array[i * interval '1 s']"),
            column("inet[]", &["'{::1}'"], "array[('10.0.0.' || i % 256)::inet]"),
            column("int2vector", &["'1 2 3'"], "(i % 99 || ' 7')::int2vector"),
            column("oidvector", &["'1 4294967295'"], "'1 2'"),
        ],
    },
];

/// One change as the sink has it.
#[derive(Deserialize)]
struct Line {
    source_table: String,
    after: Option<Box<RawValue>>,
}

fn rows() -> usize {
    std::env::var("WALRACE_ORACLE_ROWS").map_or(300, |count| count.parse().expect("a number"))
}

/// Makes the table of a family, without rows.
pub(crate) async fn create(cluster: &Cluster, family: &Family) {
    if !family.setup.is_empty() {
        cluster.sql(family.setup).await;
    }
    let columns = family.columns.iter().enumerate();
    let columns = columns.map(|(i, column)| format!(", c{i} {}", column.ty)).collect::<String>();
    cluster.sql(&format!("create table {} (id bigserial primary key{columns})", family.name)).await;
}

/// Inserts each edge with nulls around it, and the random rows.
async fn fill(cluster: &Cluster, family: &Family, rows: usize) {
    let mut statements = String::from("select setseed(0.5);");
    for (i, column) in family.columns.iter().enumerate() {
        for edge in column.edges {
            statements += &format!("insert into {} (c{i}) values ({edge});", family.name);
        }
    }
    let values: Vec<_> = family.columns.iter().map(|column| column.random).collect();
    let names: Vec<_> = (0..family.columns.len()).map(|i| format!("c{i}")).collect();
    statements += &format!(
        "insert into {} ({}) select {} from generate_series(1, {rows}) i",
        family.name,
        names.join(", "),
        values.join(", ")
    );
    cluster.sql(&statements).await;
}

/// Loads what the sink has of a family beside its table, and has PostgreSQL compare the two.
async fn compare(cluster: &Cluster, family: &Family, lines: &[Line]) {
    let session = cluster.connect().await;
    session.batch_execute("create temp table got (id bigint, row jsonb)").await.unwrap();
    let own: Vec<&str> = lines
        .iter()
        .filter(|line| line.source_table == family.name)
        .map(|line| line.after.as_deref().expect("a new row").get())
        .collect();
    for chunk in own.chunks(1_000) {
        let load = "insert into got select (row ->> 'id')::bigint, row
                    from (select unnest($1::text[])::jsonb as row) rows";
        session.execute(load, &[&chunk]).await.unwrap();
    }
    let table = family.name;
    let sql = format!(
        "select key, t.row -> key as theirs, got.row -> key as ours
         from (select id, to_jsonb({table}) as row from {table}) t
         left join got using (id)
         cross join lateral jsonb_object_keys(t.row) as key
         where t.row -> key is distinct from got.row -> key limit 10"
    );
    let wrong = session.json_rows(&sql).await;
    assert!(wrong.is_empty(), "{table}: {wrong:#?}");
    let counts = format!("select (select count(*) from {table}), (select count(*) from got)");
    let counts = session.query_one(&counts, &[]).await.unwrap();
    assert_eq!(counts.get::<_, i64>(0), counts.get::<_, i64>(1), "rows of {table}");
}

#[tokio::test]
async fn values_of_every_type_are_what_postgres_makes_of_them() {
    let cluster = Cluster::start().await;
    for family in FAMILIES {
        create(&cluster, family).await;
    }
    let source = source_toml("app", &cluster.unix_url());
    let mut server =
        Server::new(&format!("{source}\n[sink.out]\nkind = \"file\"\npath = \"out.jsonl\"\n"));
    server.start_ready().await;
    for family in FAMILIES {
        fill(&cluster, family, rows()).await;
    }
    let edges = |family: &Family| family.columns.iter().map(|c| c.edges.len()).sum::<usize>();
    let expected: usize = FAMILIES.iter().map(|family| edges(family) + rows()).sum();
    let all = async || {
        let delivered = server.metric("walrace_sink_delivered_changes_total", &["out"]).await?;
        (delivered >= expected as f64).then_some(())
    };
    wait_for(Duration::from_secs(300), all, || server.log_tail()).await;
    let text = fs::read_to_string(server.path("out.jsonl")).unwrap();
    assert_eq!(text.lines().count(), expected);
    let lines: Vec<Line> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    for family in FAMILIES {
        compare(&cluster, family, &lines).await;
    }
    assert!(server.stop().await.success());
}
