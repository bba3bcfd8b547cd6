//! Types that users and extensions make.

use super::{Column, Family, builtin::text, column};

pub(super) const FAMILIES: &[Family] = &[
    Family { name: "made", setup: MAKE, nested: true, columns: MADE },
    Family { name: "extended", setup: SPECIAL, nested: true, columns: EXTENDED },
];

/// `leaf` has lost a column, `place` is a table, which has lost one too, and `spot` is a type as an
/// extension brings it: a base type with a text form of its own, and `;` between elements.
const MAKE: &str = r#"create type mood as enum ('ok', 'it''s', 'a "b"', 'x,y', '', '{}', 'NULL', 'é 漢🙂', e'back\\slash');
    create type "Odd ""type""" as enum ('a', 'b c');
    create domain positive as int check (value > 0);
    create domain more_positive as positive check (value < 1000000);
    create domain few as int[] check (cardinality(value) < 9);
    create domain precise as numeric(20, 5);
    create type leaf as (gone int, n numeric, t text, also_gone text, at timestamptz);
    alter type leaf drop attribute gone;
    alter type leaf drop attribute also_gone;
    create domain checked_leaf as leaf check ((value).n is null or (value).n <> 7);
    create type branch as (a int, "b ""c" leaf, d leaf[], e mood, f few, g jsonb, h int4range, i bytea, j precise[]);
    create type tree as (x branch, y branch[], z checked_leaf, m mood[], d date, b boolean);
    create type one as (x text);
    create type nothing as ();
    create table place (id int, gone text, name text, tags text[], made_up int generated always as (id + 1) stored);
    alter table place drop column gone;
    create type spot;
    create function spot_in(cstring) returns spot language internal immutable strict as 'textin';
    create function spot_out(spot) returns cstring language internal immutable strict as 'textout';
    create type spot (input = spot_in, output = spot_out, like = text, delimiter = ';');
    create function any_text(i int) returns text language sql volatile as $f$
        select coalesce(string_agg(chr((array[1, 9, 10, 32, 34, 39, 40, 41, 44, 59, 92, 123, 125, 233, 128578, 78])[1 + floor(random() * 16)::int]), ''), '')
        from generate_series(1, i % 9 + floor(random() * 3)::int) $f$;
    create function any_leaf(i int) returns leaf language sql volatile as $f$
        select case when i % 11 = 0 then null else row((random() * 100)::numeric, any_text(i),
            case when i % 3 > 0 then timestamptz '2000-01-01' + random() * interval '20 years' end)::leaf end $f$;
    create function any_branch(i int) returns branch language sql volatile as $f$
        select row(i, any_leaf(i), array[any_leaf(i + 1), null, any_leaf(i + 2)], (enum_range(null::mood))[1 + i % 9],
            array[i, null]::few, jsonb_build_object(any_text(i), any_text(i + 1)), int4range(i, i + 3),
            decode(md5(random()::text), 'hex'), array[random()::precise, null])::branch $f$"#;

const MADE: &[Column] = &[
    column(
        "mood",
        &["''", "'it''s'", "'a \"b\"'", "'x,y'", "'NULL'", "e'back\\\\slash'"],
        "(enum_range(null::mood))[1 + i % 9]",
    ),
    column("\"Odd \"\"type\"\"\"", &["'a'"], "(array['a', 'b c'])[1 + i % 2]"),
    column("positive", &["1"], "1 + i"),
    column("more_positive", &["1"], "1 + i"),
    column("few", &["'{}'", "'{NULL,1}'", "'[0:1]={5,6}'", "'{{1,2},{3,4}}'"], "array[i, null]"),
    column("precise", &["'NaN'", "0"], "random()"),
    column(
        "leaf",
        &["row(null, null, null)", "row(1.50, '', 'infinity')", "row('NaN', 'NULL', null)"],
        "any_leaf(i)",
    ),
    column("checked_leaf", &["row(null, '()', null)"], "any_leaf(i)"),
    column(
        "branch",
        &[
            "row(null, null, null, null, null, null, null, null, null)",
            "row(1, row('NaN', e'q\"\\\\(),', null), array[row(1, null, null)::leaf, null], '',
                 '[0:0]={NULL}', '{\"a\": \"\\\"\"}', 'empty', '\\x5c', '{}')",
        ],
        "any_branch(i)",
    ),
    column(
        "tree",
        &["row(null, '{}', null, '{}', null, null)"],
        "row(any_branch(i), array[any_branch(i + 1), null], any_leaf(i), array['x,y', null, '']::mood[],
             date '2000-01-01' + i, i % 2 = 0)",
    ),
    column("one", &["row(null)", "row('')", "row('\"')", "row(e'\\\\')", "row(' ')"], concat!("row(", text!("i"), ")")),
    column("nothing", &["row()"], "row()"),
    column(
        "place",
        &["row(null, null, null, null)", "row(1, 'a b', '{NULL,\"NULL\"}', 2)"],
        "row(i, any_text(i), array[any_text(i + 1), any_text(i + 2)], i + 1)",
    ),
    column("spot", &["''", "'SRID=4326;POINT(1 2)'", "'NULL'", "'a;b\"c\\d{}'"], text!("i")),
];

/// Beside the extensions' own setup, which the columns name.
const SPECIAL: &str = "create type labelled as (tags hstore, place ltree, mail citext)";

const EXTENDED: &[Column] = &[
    column(
        "hstore",
        &[
            "''",
            "'a=>1,b=>NULL,\"c d\"=>\"\"'",
            "'\"\"=>\"NULL\"'",
            "hstore(e'q\"\\\\=>', e',\"\\n')",
        ],
        concat!(
            "hstore(array['a', 'b'], array[",
            text!("i"),
            ", null]) || hstore(",
            text!("i"),
            ", ",
            text!("i"),
            ")"
        ),
    )
    .of("hstore"),
    column("ltree", &["''", "'a.b_c.1'"], "('a' || i || '.b')").of("ltree"),
    column("lquery", &["'*.a|b@*.!c*{1,2}'"], "('a' || i || '.*{2}')").of("ltree"),
    column("ltxtquery", &["'a & b@ | !c'"], "('a' || i || ' & b')").of("ltree"),
    column("citext", &["''", "'NULL'", "'MiXed'"], text!("i")).of("citext"),
    column("cube", &["'(0)'", "'(1,2,3),(4,5,6)'"], "cube(array[random(), i], array[i, random()])")
        .of("cube"),
    column("seg", &["'1'", "'<1.50 .. ~2.000'", "'3 .. '"], "(i || ' .. ' || i + 1)").of("seg"),
    column("isbn", &["'0-393-04002-X'"], "'0-14-044793-8'").of("isn"),
    column("ean13", &["'9780393040029'"], "'9780140447934'").of("isn"),
    column("query_int", &["'1&(2|!3)'"], "(i || '|5')").of("intarray"),
    column("lo", &["0"], "i::oid").of("lo"),
    column(
        "labelled",
        &["row('a=>\"b \\\" c\"', 'x.y', 'NULL')", "row(null, null, null)"],
        concat!("row(hstore('k', ", text!("i"), "), 'a.b', ", text!("i"), ")"),
    )
    .of("hstore"),
];
