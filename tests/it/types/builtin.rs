//! The types that every PostgreSQL has.

use super::{Column, Family, column};

/// Any text without NUL: control characters, quotes, backslashes, braces, blanks, every plane of
/// Unicode and the letters of NULL. The argument is an integer of the row that it is made for.
macro_rules! text {
    ($row:literal) => {
        concat!(
            "(select coalesce(string_agg(chr((array[1, 8, 9, 10, 11, 12, 13, 27, 31, 32, 34, 38, 39,
               40, 41, 44, 47, 48, 58, 59, 61, 91, 92, 93, 123, 125, 127, 128, 159, 233, 769, 8232,
               8233, 28450, 55295, 57344, 65279, 65535, 128578, 1114111, 78, 85, 76, 76, 110, 117,
               108, 108])[1 + floor(random() * 48)::int]), ''), '')
             from generate_series(1, ",
            $row,
            " * 7 % 12 + floor(random() * 4)::int))"
        )
    };
}
pub(super) use text;

macro_rules! bounds {
    () => {
        "(array['[]', '[)', '(]', '()'])[1 + i % 4]"
    };
}

pub(super) const FAMILIES: &[Family] = &[
    Family { name: "numbers", setup: DECIMALS, nested: true, columns: NUMBERS },
    Family { name: "texts", setup: "", nested: true, columns: TEXTS },
    Family { name: "bytes", setup: "", nested: true, columns: BYTES },
    Family { name: "times", setup: "", nested: true, columns: TIMES },
    Family { name: "documents", setup: ANY_JSON, nested: true, columns: DOCUMENTS },
    Family { name: "networks", setup: "", nested: true, columns: NETWORKS },
    Family { name: "shapes", setup: "", nested: true, columns: SHAPES },
    Family { name: "searches", setup: "", nested: true, columns: SEARCHES },
    Family { name: "ranges", setup: SPANS, nested: true, columns: RANGES },
    Family { name: "systems", setup: "", nested: true, columns: SYSTEMS },
    Family { name: "arrays", setup: "", nested: false, columns: ARRAYS },
];

const DECIMALS: &str = "create function any_decimal() returns numeric language sql volatile as $$
    select ((array['', '-'])[1 + floor(random() * 2)::int]
         || (select string_agg(translate(md5(random()::text), 'abcdef', '012345'), '')
             from generate_series(1, 1 + floor(random() * random() * 31)::int))
         || (array['', '.'])[1 + floor(random() * 2)::int]
         || repeat('0', floor(random() * 20)::int)
         || translate(md5(random()::text), 'abcdef', '012345'))::numeric $$";

const NUMBERS: &[Column] = &[
    column("int2", &["-32768", "32767", "0"], "(random() - 0.5) * 65534"),
    column("int4", &["-2147483648", "2147483647"], "(random() - 0.5) * 4e9"),
    column(
        "int8",
        &["-9223372036854775808", "9223372036854775807", "9007199254740993", "-9007199254740993"],
        "(random() - 0.5) * 1.8e19",
    ),
    column(
        "numeric",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "'-0.00'",
            "'1e-1000'",
            "'1e1000'",
            "repeat('9', 1000)",
            "'0.' || repeat('1', 1000)",
            "'-' || repeat('12345', 200) || '.' || repeat('67890', 200)",
        ],
        "any_decimal()",
    ),
    column("numeric(10, 2)", &["'12345678.90'", "'NaN'", "0"], "(random() - 0.5) * 1e7"),
    column("numeric(5, -3)", &["99999000", "'-1000'"], "(random() - 0.5) * 1e7").since(15),
    column("numeric(3, 5)", &["0.00999"], "random() * 0.0099").since(15),
    column(
        "float4",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "'-0'",
            "'1e-45'",
            "'1.1754942e-38'",
            "'3.4028235e38'",
            "'16777217'",
        ],
        "(array[-0.1, 0.1])[1 + i % 2] * (1 + random()) * 10 ^ (random() * 80 - 42)",
    ),
    column(
        "float8",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "'-0'",
            "'5e-324'",
            "'2.225073858507201e-308'",
            "'1.7976931348623157e308'",
            "'0.1'",
            "'9007199254740993'",
            "'1e15'",
            "'1e16'",
        ],
        "(array[-0.1, 0.1])[1 + i % 2] * (1 + random()) * 10 ^ (random() * 625 - 317)",
    ),
    column(
        "money",
        &["'-92233720368547758.08'", "'92233720368547758.07'", "0"],
        "((random() - 0.5) * 1e6)::numeric",
    ),
    column("bool", &["true", "false"], "random() < 0.5"),
];

const TEXTS: &[Column] = &[
    column(
        "text",
        &[
            "''",
            "'NULL'",
            "'null'",
            "'{}'",
            "'()'",
            "'\"'",
            "e'\\\\'",
            "e'\\x7f\\u0080\\u009f'",
            "' '",
            "e'\\n'",
            "repeat('x', 20000)",
            "repeat(e'\\\\\"', 3000)",
        ],
        text!("i"),
    ),
    column("varchar", &["''"], text!("i")),
    column("varchar(40)", &["''", "repeat('漢', 40)"], text!("i")),
    column("char(50)", &["''", "' a '", "repeat('🙂', 50)"], text!("i")),
    column("bpchar", &["''", "'a   '", "'   '"], text!("i")),
    column("name", &["''", "repeat('é', 31)", "'a b\"c'"], text!("i")),
    column("\"char\"", &["''", "'a'", "'\"'", "'{'"], "chr(1 + i % 127)"),
    column("uuid", &["'00000000-0000-0000-0000-000000000000'"], "md5(random()::text)"),
    column(
        "xml",
        &["'<a/>'", "''", "'<a b=\"c\">&lt;é&#10;</a>'", "'x <b/> y'"],
        "xmlelement(name e, xmlattributes(i as n), md5(random()::text) || '<\"&')",
    ),
    column("refcursor", &["''", "'a b'"], text!("i")),
];

const BYTES: &[Column] = &[
    column(
        "bytea",
        &[
            "''",
            "'\\x00'",
            "'\\x00ff5c27'",
            "'\\xc328'",
            "'\\x5c78'",
            "decode(repeat('00', 5000), 'hex')",
        ],
        "decode(repeat(md5(random()::text), i % 4) || md5(random()::text), 'hex')",
    ),
    column("bit", &["B'0'", "B'1'"], "(i % 2)::bit"),
    column("bit(5)", &["B'00000'", "B'11111'"], "(i % 32)::bit(5)"),
    column("bit(64)", &["B'0'::bit(64)"], "(random() * 9e18)::int8::bit(64)"),
    column(
        "varbit",
        &["''", "B'1'"],
        "substr((random() * 1e9)::int4::bit(32)::text, 1, i % 33)::bit varying",
    ),
    column("varbit(7)", &["''", "B'1111111'"], "substr(i::bit(20)::text, 14, i % 8)::bit varying"),
];

const TIMES: &[Column] = &[
    column(
        "date",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 BC'",
            "'5874897-12-31'",
            "'0044-03-15 BC'",
            "'0001-12-31 BC'",
            "'0001-01-01'",
            "'9999-12-31'",
            "'10000-01-01'",
            "'2000-02-29'",
        ],
        "date '4713-01-01 BC' + case i % 3 when 0 then (random() * 2147483000)::int
                                           else (random() * 3e6)::int end",
    ),
    column(
        "time",
        &["'00:00'", "'24:00:00'", "'23:59:59.999999'", "'12:00:00.100000'"],
        "time '00:00' + (random() * 86399e6)::int8 * interval '1 us'",
    ),
    column("time(0)", &["'24:00'"], "time '00:00' + (random() * 86399)::int * interval '1 s'"),
    column(
        "timetz",
        &[
            "'24:00:00+15:59'",
            "'00:00-15:59'",
            "'00:00:00.000001+15:59:59'",
            "'12:00:00.5+05:30:15'",
            "'24:00:00-15:59:59'",
        ],
        "format('%s%s%s:%s', time '00:00' + (random() * 86399e6)::int8 * interval '1 us',
            (array['+', '-'])[1 + i % 2], lpad((i % 16)::text, 2, '0'),
            lpad(floor(random() * 60)::text, 2, '0'))",
    ),
    column(
        "timestamp",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 BC'",
            "'0044-03-15 12:00:00.5 BC'",
            "'0001-01-01'",
            "'9999-12-31 23:59:59.999999'",
            "'10000-01-01'",
            "'294276-12-31 23:59:59.999999'",
            "'1970-01-01'",
        ],
        "date_trunc((array['microseconds', 'milliseconds', 'second', 'day'])[1 + i % 4],
            case i % 3 when 0 then timestamp '4713-01-01 BC' + random() * interval '298000 years'
            else timestamp '1900-01-01' + random() * interval '200 years' end)",
    ),
    column(
        "timestamp(3)",
        &["'infinity'"],
        "timestamp '2000-01-01' + random() * interval '9 years'",
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
            "'294276-12-31 23:59:59.999999'",
            "'10000-01-01'",
        ],
        "date_trunc((array['microseconds', 'milliseconds', 'second', 'day'])[1 + i % 4],
            case i % 3 when 0 then timestamptz '4713-01-01 BC' + random() * interval '298000 years'
            else timestamptz '1900-01-01' + random() * interval '200 years' end)",
    ),
    column(
        "timestamptz(0)",
        &["'-infinity'"],
        "timestamptz '2000-01-01' + random() * interval '9 years'",
    ),
    column(
        "interval",
        &[
            "'0'",
            "'-178000000 years'",
            "'178000000 years'",
            "'1 mon -1 day 00:00:00.000001'",
            "'1 year 2 mons 3 days 04:05:06.789'",
            "'-1 year -2 mons +3 days -04:05:06'",
            "'-00:00:00.000001'",
            "'2147483647 days'",
            "'1 year'",
            "'-1 days'",
            "'2000000000:00:54.775807'",
        ],
        "make_interval(
            years => (random() * 40 - 20)::int * floor(random() * 2)::int,
            months => (random() * 24 - 12)::int * floor(random() * 2)::int,
            days => (random() * 400 - 200)::int * floor(random() * 2)::int,
            hours => (random() * 80 - 40)::int * floor(random() * 2)::int,
            mins => (random() * 200 - 100)::int,
            secs => (random() * 200 - 100) * floor(random() * 2))",
    )
    .later(17, &["'infinity'", "'-infinity'"]),
    column("interval year to month", &["'1-2'"], "make_interval(months => i - 100)"),
    column("interval second(3)", &["'-0.001'"], "make_interval(secs => random() * 100 - 50)"),
];

/// Random documents, with white space, repeated keys and every escape; but none that `jsonb` does
/// not take.
const ANY_JSON: &str = r##"create function any_json(depth int) returns text language plpgsql volatile as $f$
declare
    made text := '';
    blank text := (array['', '', ' ', '  ', e'\n', e'\t', e'\r\n '])[1 + floor(random() * 7)::int];
    kind int := floor(random() * case when depth > 0 then 9 else 6 end)::int;
begin
    case
    when kind = 0 then made := (array['null', 'true', 'false'])[1 + floor(random() * 3)::int];
    when kind = 1 then made := (array['0', '-0', '-0.0e-5', '1E+5', '1e400', '-1.50', '1e-300', '12345678901234567890.5',
        '0.1e1', repeat('9', 500)])[1 + floor(random() * 10)::int];
    when kind = 2 then made := (random() * 1e6)::int::text;
    when kind < 6 then
        for n in 0 .. floor(random() * 3)::int loop
            made := made || (array['', 'a b', '\u00e9', '\u0001', '\ud83d\ude42', '\"', '\\', '\/', '\b\f\n\r\t', '{}',
                '[1, 2]', 'é漢🙂', ' : ,  ', '\u2028', e'\u2028', e'\x7f', '\\u0041', 'null'])[1 + floor(random() * 18)::int];
        end loop;
        made := '"' || made || '"';
    when kind = 6 then
        for n in 1 .. floor(random() * 4)::int loop
            made := made || case when n > 1 then ',' else '' end || any_json(depth - 1);
        end loop;
        made := '[' || blank || made || ']';
    else
        for n in 1 .. floor(random() * 4)::int loop
            made := made || case when n > 1 then ',' else '' end || blank || (array['""', '"a"', '"a"', '"b c"', '"\u0061"',
                '"\"\\"', '"é"'])[1 + floor(random() * 7)::int] || blank || ':' || any_json(depth - 1);
        end loop;
        made := '{' || blank || made || '}';
    end case;
    return blank || made || blank;
end $f$"##;

const DOCUMENTS: &[Column] = &[
    column(
        "jsonb",
        &[
            "'null'",
            "'{}'",
            "'[]'",
            "'\"\"'",
            "'1.50'",
            "'-0'",
            "'{\"\": {\"a\": [1, 2.50, 1e400]}}'",
            "'\"\\u0001\\u001f\\u007f\\u2028 \\\" \\\\ \\/\"'",
            "'1e10000'",
            "repeat('[', 1000) || repeat(']', 1000)",
            "repeat('{\"a\":', 500) || '1' || repeat('}', 500)",
            "to_json(repeat('x', 10000))",
        ],
        "any_json(3)",
    ),
    column(
        "json",
        &[
            "'null'",
            "' { \"b\" : 1 , \"a\" : [ ] } '",
            "'{\"a\": 1, \"a\": 2, \"a\": {\"a\": 3, \"a\": 4}}'",
            "'\"\\u00e9\\ud83d\\ude42 \\/ \\n \\u0001\"'",
            "e'[1,\\n\\t 2]'",
            "e'\\r\\n \"x\" \\r\\n'",
            "'-0.0e-5'",
            "'1e10000'",
            "repeat('9', 10000)",
            "repeat('[ ', 1000) || repeat(' ]', 1000)",
            "repeat('{\"a\" : ', 500) || '1' || repeat('}', 500)",
        ],
        "any_json(3)",
    ),
    column(
        "jsonpath",
        &["'$'", "'$.a[*] ? (@ > 1)'", "'strict $.\"a b\\\"\".**{2 to 3}'"],
        "'$.k' || i",
    ),
];

const NETWORKS: &[Column] = &[
    column(
        "inet",
        &["'0.0.0.0/0'", "'255.255.255.255'", "'::'", "'::1'", "'fe80::1/64'", "'::ffff:1.2.3.4'"],
        "case i % 2 when 0 then format('%s.%s.0.%s/%s', i % 256, floor(random() * 256), i % 7, i % 33)
            else format('2001:%s::%s/%s', to_hex(i % 65536), to_hex((random() * 65535)::int), i % 129) end",
    ),
    column(
        "cidr",
        &["'::/0'", "'0.0.0.0/0'", "'10.0.0.0/8'"],
        "network(format('2001:%s::%s/%s', to_hex(i % 65536), to_hex((random() * 65535)::int), i % 129)::inet)",
    ),
    column("macaddr", &["'00:00:00:00:00:00'"], "substr(md5(random()::text), 1, 12)"),
    column("macaddr8", &["'ff:ff:ff:ff:ff:ff:ff:ff'"], "substr(md5(random()::text), 1, 16)"),
];

const SHAPES: &[Column] = &[
    column(
        "point",
        &["'(0,-0)'", "'(1e300,NaN)'", "'(Infinity,-Infinity)'"],
        "point(random() - 0.5, i / 3.0)",
    ),
    column("line", &["'{1,-1,0}'", "'{0,1,0}'"], "line(point(0, 0), point(i, random()))"),
    column("lseg", &["'[(0,0),(0,0)]'"], "lseg(point(0, random()), point(i, random()))"),
    column("box", &["'(0,0),(0,0)'"], "box(point(-random(), 0), point(i, random()))"),
    column(
        "path",
        &["'((0,0),(1,1))'", "'[(0,0),(1,1)]'", "'((0,0))'"],
        "format('%s(0,0),(%s,%s)%s', (array['[', '('])[1 + i % 2], i, random(), (array[']', ')'])[1 + i % 2])",
    ),
    column(
        "polygon",
        &["'((0,0),(1,1),(1,0))'"],
        "polygon(3 + i % 5, circle(point(random(), i), 1 + random()))",
    ),
    column(
        "circle",
        &["'<(0,0),0>'", "'<(1,2),Infinity>'"],
        "circle(point(i, -random()), random())",
    ),
];

const SEARCHES: &[Column] = &[
    column(
        "tsvector",
        &[
            "''",
            "to_tsvector('simple', 'a ''b'' c\\d')",
            "'''it''''s'' ''a b'':1A,2B,16383'",
            "'e\\\\f'",
        ],
        "array_to_tsvector(array[md5(random()::text), 'a''b', e'c\\\\d', ' '])",
    ),
    column(
        "tsquery",
        &["''", "'a & !b'", "'a <-> b | c:*A'", "'''it''''s'' <2> ''x y'':BD'"],
        "format('(a%s | ''b c'') & !d:*', i)",
    ),
];

const SPANS: &str = "create type span as range (subtype = float8);
    create type texts_range as range (subtype = text, collation = \"C\");
    create domain some_days as daterange check (not isempty(value))";

const RANGES: &[Column] = &[
    column(
        "int4range",
        &["'empty'", "'(,)'", "'[1,1]'", "'[,5]'"],
        concat!("int4range(i, i + 5, ", bounds!(), ")"),
    ),
    column(
        "int8range",
        &["'empty'", "'[-9223372036854775808,)'"],
        concat!("int8range(-i, i, ", bounds!(), ")"),
    ),
    column(
        "numrange",
        &["'empty'", "'[-Infinity,NaN)'", "'[0,0]'"],
        concat!("numrange(random()::numeric, nullif(i % 5, 0) + 1.5, ", bounds!(), ")"),
    ),
    column(
        "tsrange",
        &["'[,infinity)'", "'[\"0044-03-15 00:00:00 BC\",)'"],
        concat!(
            "tsrange('2000-01-01', timestamp '2000-01-01' + i * random() * interval '1 h', ",
            bounds!(),
            ")"
        ),
    ),
    column(
        "tstzrange",
        &["'empty'", "'[-infinity,\"2000-01-01 00:00:00-15:59\"]'"],
        concat!(
            "tstzrange('2000-01-01', timestamptz '2000-01-01' + i * random() * interval '1 s', ",
            bounds!(),
            ")"
        ),
    ),
    column(
        "daterange",
        &["'(,)'", "'[0044-03-15 BC,infinity]'"],
        concat!("daterange('2000-01-01', date '2000-01-02' + i, ", bounds!(), ")"),
    ),
    column(
        "int4multirange",
        &["'{}'", "'{(,)}'"],
        "int4multirange(int4range(i, i + 1), int4range(i + 5, i + 9))",
    ),
    column("int8multirange", &["'{}'", "'{(,1),[5,)}'"], "int8multirange(int8range(-i, i))"),
    column(
        "nummultirange",
        &["'{}'"],
        "nummultirange(numrange(random()::numeric, 1.5), numrange(2, i + 2, '[]'))",
    ),
    column(
        "tsmultirange",
        &["'{}'"],
        "tsmultirange(tsrange('2000-01-01', timestamp '2000-01-01' + i * interval '1 h'))",
    ),
    column(
        "tstzmultirange",
        &["'{}'", "'{[,infinity]}'"],
        "tstzmultirange(tstzrange('2000-01-01', timestamptz '2000-01-01' + i * interval '1 h'), tstzrange('1999-01-01', '1999-01-02'))",
    ),
    column(
        "datemultirange",
        &["'{}'"],
        "datemultirange(daterange('2000-01-01', date '2000-01-02' + i))",
    ),
    column(
        "span",
        &["'empty'", "'[NaN,NaN]'"],
        concat!("span(random(), 1 + random(), ", bounds!(), ")"),
    ),
    column("span_multirange", &["'{}'"], "format('{[%s,%s)}', random(), i + 1)").since(14),
    column(
        "texts_range",
        &["'[\"\",\"a b\"]'", "'[\"a,b\",\"c\"\"\\\\d\")'"],
        concat!("texts_range('', 'x' || ", text!("i"), ", ", bounds!(), ")"),
    ),
    column("some_days", &["'(,)'"], "daterange('2000-01-01', date '2000-01-02' + i)"),
];

const SYSTEMS: &[Column] = &[
    column("oid", &["0", "4294967295"], "(random() * 4e9)::int8"),
    column("xid", &["'0'", "'4294967295'"], "((random() * 4e9)::int8)::text"),
    column("xid8", &["'0'", "'18446744073709551615'"], "((random() * 9e18)::int8)::text"),
    column("cid", &["'4294967295'"], "((random() * 4e9)::int8)::text"),
    column("tid", &["'(0,0)'", "'(4294967295,65535)'"], "format('(%s,%s)', i, i % 65536)"),
    column(
        "pg_lsn",
        &["'0/0'", "'FFFFFFFF/FFFFFFFF'"],
        "format('%s/%s', to_hex(i), to_hex((random() * 2e9)::int))",
    ),
    column("txid_snapshot", &["'1:1:'"], "format('%s:%s:%s', i, i + 9, i + 3)"),
    column("pg_snapshot", &["'1:9:2,3,8'"], "format('%s:%s:', i, i + 9)"),
    column(
        "regclass",
        &["'pg_class'", "0", "4294967295"],
        "(array['pg_type', 'information_schema.tables'])[1 + i % 2]",
    ),
    column(
        "regtype",
        &["'int4'", "0", "'timestamp with time zone'"],
        "(array['text[]', '\"char\"'])[1 + i % 2]",
    ),
    column("regproc", &["'now'", "0"], "'pg_catalog.textcat'"),
    column("regprocedure", &["'abs(int4)'", "0"], "'length(text)'"),
    column("regoper", &["0"], "'pg_catalog.||/'"),
    column("regoperator", &["'+(int4,int4)'", "0"], "'-(NONE,int8)'"),
    column("regnamespace", &["'pg_catalog'", "0"], "'public'"),
    column("regrole", &["'postgres'", "0"], "'pg_monitor'"),
    column("regcollation", &["'\"C\"'", "0"], "'\"POSIX\"'"),
    column("regconfig", &["'simple'", "0"], "'english'"),
    column("regdictionary", &["'simple'", "0"], "'english_stem'"),
    column(
        "aclitem",
        &["'postgres=arwdDxt/postgres'", "'=r/postgres'"],
        "'pg_monitor=r*/postgres'",
    ),
];

/// What only arrays have, and the two vectors, which are arrays of another text.
const ARRAYS: &[Column] = &[
    column(
        "int4[]",
        &[
            "'{}'",
            "'{NULL}'",
            "'{{1,2},{3,NULL}}'",
            "'[2:3]={1,2}'",
            "'[0:1][2:3]={{1,2},{3,4}}'",
            "'[-1:0][5:6]={{1,2},{3,4}}'",
            "'{{{{{{1},{2}}}}}}'",
            "'[1:1][-2:-1][3:4]={{{1,1},{2,NULL}}}'",
        ],
        "format('[%s:%s][%s:%s]={{%s,%s},{NULL,%s}}', -i, 1 - i, i % 3, i % 3 + 1, i, i, i)",
    ),
    column("int2[]", &["'[0:0]={5}'"], "array[i % 100, null]"),
    column(
        "text[]",
        &[
            "'{}'",
            "'{\"\"}'",
            "'{\"NULL\",NULL,\"null\",nUlL}'",
            "array[e'a\"\\\\b', '{}', ' x ', ',', e'\\n', e'\\\\', '\"', '}', '{']",
            "'[5:6]={\"[1:2]=\",\"={}\"}'",
        ],
        concat!(
            "(select array_agg(case when random() < 0.2 then null else ",
            text!("k"),
            " end) from generate_series(1, i % 6) k)"
        ),
    ),
    column(
        "varchar(5)[][]",
        &["'{{a,b},{c,NULL}}'"],
        "array[[(i % 1000)::text, ''], ['NULL', null]]",
    ),
    column(
        "box[]",
        &["'{(1,1),(0,0);(3,4),(1,2)}'", "'[0:1]={NULL;(3,4),(1,2)}'"],
        "array[box(point(0, 0), point(i, 1))]",
    ),
    column("int2vector", &["'1 2 3'", "''"], "i % 99 || ' -7'"),
    column("oidvector", &["'1 4294967295'", "''"], "'1 2'"),
    column(
        "int2vector[]",
        &["array_fill('1 2'::int2vector, array[2])"],
        "array_fill('3'::int2vector, array[1 + i % 3])",
    ),
];
