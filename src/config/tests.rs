//! The configuration as users meet it: files in, configurations or one good message out.

use std::{fmt::Write, path::PathBuf};

use proptest::prelude::*;

use super::*;
use crate::{
    change::{Op, Timestamp},
    error::Class,
};

const SOURCE: &str = "[source.app]\nkind = \"postgres\"\nurl = \"postgres://u:hunter2@h/d\"\n";

/// Byte for byte the block of the seed.
const CDC: &str = r#"[cdc]
# Emitter type: "queue" | "webhook" | "file" | "custom"
emitter = "queue"

# Queue capacity (in-memory, backpressure applied)
queue_capacity = 65536

# Dead letter queue path
dlq_path = "/var/lib/weftkit/cdc-dlq"

# Schema filter (empty = capture all)
schemas = ["public"]

# Batch size for queue emitter
batch_size = 100"#;

fn environment(variables: &[(&str, &str)]) -> Environment {
    Environment::of(variables.iter().copied())
}

fn parse(text: &str, variables: &[(&str, &str)]) -> Config {
    Config::parse_in(text, "walrace.toml", &environment(variables)).unwrap()
}

fn refused(text: &str, variables: &[(&str, &str)]) -> String {
    let error = Config::parse_in(text, "walrace.toml", &environment(variables)).unwrap_err();
    assert_eq!(error.class(), Class::Config);
    assert!(!error.to_string().contains("hunter2"), "{error}");
    format!("{}\n  help: {}\n", error.summary(), error.remedy_text().unwrap_or("-"))
}

fn postgres(config: &Config) -> &Postgres {
    let Source::Postgres(postgres) = config.source.values().next().unwrap();
    postgres
}

#[test]
fn the_example_of_the_readme_loads() {
    let text = r#"
data_dir = "walrace-data"            # journals, spool, catalog; one directory to back up or delete

[source.app]
kind = "postgres"
url = "postgres://walrace:${PGPASSWORD}@localhost:5432/app"
tables = ["public.*", "!public.audit_*"]

[sink.lake]
kind = "file"
path = "changes.jsonl"
"#;
    let config = parse(text, &[("PGPASSWORD", "p@ss")]);
    assert_eq!(postgres(&config).url.expose(), "postgres://walrace:p%40ss@localhost:5432/app");
    assert_eq!(postgres(&config).tables, ["public.*", "!public.audit_*"]);
    let lake = &config.sink["lake"];
    assert_eq!(lake, &Sink::of(SinkKind::File(File::to("changes.jsonl"))));
    assert_eq!(config.source_of(lake), "app");
    assert_eq!(config.dead_letters(), PathBuf::from("walrace-data/dead-letters"));
    assert_eq!(config.http, Http::default());
}

#[test]
fn the_brokers_of_kafka_are_one_text_or_a_list() {
    let brokers = |text: &str| {
        let sink = format!("[sink.events]\nkind = \"kafka\"\nbrokers = {text}");
        let text = format!("{SOURCE}{sink}");
        let SinkKind::Kafka(kafka) = parse(&text, &[("PORT", "9092")]).sink["events"].kind.clone()
        else {
            panic!("another kind")
        };
        kafka.brokers
    };
    let list = brokers("[\"a:9092\", \"b:${PORT}\"]");
    assert_eq!(list, Brokers::List(vec!["a:9092".into(), "b:9092".into()]));
    assert_eq!(brokers("\"a:9092,b:9092\""), Brokers::Text("a:9092,b:9092".into()));
}

/// A name, a faulty file and its environment.
type Fault = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

/// The snapshot shows what the user reads of each.
const FAULTS: &[Fault] = &[
    ("top-level key", "datadir = \"x\"", &[]),
    ("section key", "[http]\nlissten = \"x\"", &[]),
    ("sink key", "[sink.lake]\nkind = \"file\"\npth = \"x\"", &[]),
    ("source key", "[source.a]\nkind = \"postgres\"\nurll = \"x\"", &[]),
    ("cdc key", "[cdc]\nqueue_capacty = 1", &[]),
    ("key of another kind", "[sink.x]\nkind = \"stdout\"\nrotate_ms_max = 1", &[]),
    ("key far from any", "[http]\nzzzzzz = 1", &[]),
    ("unknown kind", "[sink.lake]\nkind = \"fil\"", &[]),
    ("no kind", "[sink.lake]\npath = \"x\"", &[]),
    ("missing key", "[sink.lake]\nkind = \"file\"", &[]),
    ("missing key, inline", "sink = { lake = { kind = \"file\" } }", &[]),
    ("text for a number", "[sink.x]\nkind = \"stdout\"\nbatch_changes_max = \"many\"", &[]),
    ("number for a text", "data_dir = 1", &[]),
    ("table for a text", "[data_dir]\n", &[]),
    ("text for a table", "http = \"x\"", &[]),
    ("float for a number", "[journal]\nbytes_max = 1.5", &[]),
    ("number too large", "[journal]\nbytes_max = 99999999999999999999", &[]),
    ("negative number", "[journal]\nbytes_max = -1", &[]),
    ("text for a list", "[sink.x]\nkind = \"stdout\"\ntables = \"public.*\"", &[]),
    ("number in a list", "[sink.x]\nkind = \"stdout\"\ntables = [\"a.*\", 1]", &[]),
    ("bad word", "[sink.x]\nkind = \"stdout\"\nformat = \"nativ\"", &[]),
    ("bad word in a list", "[sink.x]\nkind = \"stdout\"\noperations = [\"upsert\"]", &[]),
    ("bad start", "[sink.x]\nkind = \"stdout\"\nfrom = \"strat\"", &[]),
    ("not TOML", "data_dir = \n", &[]),
    ("key twice", "data_dir = \"a\"\ndata_dir = \"b\"", &[]),
    ("column counts characters", "log = { \"größe\" = 1, x = 2 }", &[]),
    ("variable not set", "data_dir = \"${DATA}\"", &[]),
    ("open reference", "data_dir = \"${DATA\"", &[]),
    ("missing file", "data_dir = \"${file:/does/not/exist}\"", &[]),
    ("foreign word", "[log]\nformat = \"${F}\"", &[("F", "hunter2")]),
    ("foreign number", "[journal]\nbytes_max = \"${F}\"", &[("F", "hunter2")]),
    ("override of wrong type", "", &[("WALRACE_JOURNAL_BYTES_MAX", "hunter2")]),
    ("override too small", "", &[("WALRACE_CDC_BATCH_SIZE", "0")]),
    ("override mistyped", "", &[("WALRACE_HTP_LISTEN", "x")]),
    ("no source", "", &[]),
    ("cdc without source", CDC, &[]),
    ("cdc emitter", "[cdc]\nemitter = \"kafka\"", &[]),
    ("cdc capacity 0", "[cdc]\nqueue_capacity = 0", &[]),
    ("cdc batch negative", "[cdc]\nbatch_size = -1", &[]),
    ("cdc webhook", "[cdc]\nemitter = \"webhook\"", &[]),
    ("two homes for dead letters", "dlq_path = \"/a\"\n[cdc]\ndlq_path = \"/b\"", &[]),
    ("cdc twice", "[cdc]\n[sink.cdc]\nkind = \"stdout\"", &[]),
];

#[test]
fn a_fault_in_the_file_is_placed_explained_and_mended() {
    let mut shown = String::new();
    for (name, text, variables) in FAULTS {
        write!(shown, "# {name}\n{}\n", refused(text, variables)).unwrap();
    }
    insta::assert_snapshot!(shown);
}

/// The same, each after a good source.
const CROSS_FAULTS: &[(&str, &str)] = &[
    ("no such source", "[sink.x]\nkind = \"stdout\"\nsource = \"ap\""),
    ("sink name", "[sink.\"Big Lake\"]\nkind = \"stdout\""),
    ("path as a name", "[sink.\"..\"]\nkind = \"stdout\""),
    ("batch of 0", "[sink.x]\nkind = \"stdout\"\nbatch_changes_max = 0"),
    ("retry bounds", "[sink.x]\nkind = \"stdout\"\nretry_ms_min = 9\nretry_ms_max = 5"),
    ("glob without schema", "[sink.x]\nkind = \"stdout\"\ntables = [\"*\", \"orders\"]"),
    ("empty glob", "[sink.x]\nkind = \"stdout\"\ntables = [\"!\"]"),
    ("web scheme", "[sink.x]\nkind = \"webhook\"\nurl = \"ftp://u:hunter2@h/\""),
    ("web address", "[sink.x]\nkind = \"custom\"\nurl = \"hunter2\""),
    (
        "header name",
        "[sink.x]\nkind = \"webhook\"\nurl = \"http://h\"\nheaders = { \"a b\" = \"c\" }",
    ),
    (
        "header value",
        "[sink.x]\nkind = \"webhook\"\nurl = \"http://h\"\nheaders.a = \"hunter2\\n\"",
    ),
    (
        "one file for two",
        "[sink.a]\nkind = \"file\"\npath = \"./x\"\n[sink.b]\nkind = \"file\"\npath = \"x\"",
    ),
    ("no file", "[sink.a]\nkind = \"file\"\npath = \"\""),
    ("listen", "[http]\nlisten = \"7376\""),
    ("journal too small", "[journal]\nbytes_max = 1000"),
    ("log level", "[log]\nlevel = \"walrace=loud\""),
    ("slot name", "[source.b]\nkind = \"postgres\"\nurl = \"postgres://h\"\nslot = \"My-Slot\""),
    ("other database", "[source.b]\nkind = \"postgres\"\nurl = \"mysql://u:hunter2@h/d\""),
    ("open password", "[source.b]\nkind = \"postgres\"\nurl = \"postgres://u:hunter2#@h/d\""),
    (
        "source needed",
        "[source.b]\nkind = \"postgres\"\nurl = \"postgres://h\"\n[sink.x]\nkind = \"stdout\"",
    ),
    (
        "one slot for two",
        "slot = \"s\"\n[source.b]\nkind = \"postgres\"\nurl = \"postgres://u:hunter2@h/d\"\nslot = \"s\"",
    ),
];

#[test]
fn a_fault_between_keys_is_placed_explained_and_mended() {
    let mut shown = String::new();
    for (name, text) in CROSS_FAULTS {
        write!(shown, "# {name}\n{}\n", refused(&format!("{SOURCE}{text}"), &[])).unwrap();
    }
    insta::assert_snapshot!(shown);
}

#[test]
fn the_cdc_block_of_the_seed_loads_byte_for_byte() {
    let config = parse(CDC, &[("DATABASE_URL", "postgres://h/d")]);
    assert_eq!(config.dead_letters(), PathBuf::from("/var/lib/weftkit/cdc-dlq"));
    let sink = &config.sink["cdc"];
    assert_eq!(sink.schemas, ["public"]);
    assert_eq!(sink.batch_changes_max, 100);
    assert_eq!(sink.kind, SinkKind::Queue(Queue { capacity: 65_536 }));
    assert_eq!(config.source_of(sink), "app");
    assert_eq!(config.cdc, None);
    let defaults = parse("[cdc]", &[("DATABASE_URL", "postgres://h/d")]);
    assert_eq!(defaults, config, "the defaults are the seed's values");
}

#[test]
fn each_emitter_makes_its_sink() {
    let kind = |keys: &str| {
        let config = parse(&format!("{SOURCE}[cdc]\nschemas = []\n{keys}"), &[]);
        assert!(config.sink["cdc"].schemas.is_empty());
        config.sink["cdc"].kind.clone()
    };
    let url = Secret::new("http://h/x");
    assert_eq!(kind("emitter = \"queue\""), SinkKind::Queue(Queue::default()));
    assert_eq!(kind("emitter = \"file\""), SinkKind::File(File::to("walrace-data/cdc.jsonl")));
    assert_eq!(
        kind("emitter = \"webhook\"\nwebhook_url = \"http://h/x\""),
        SinkKind::Webhook(Webhook::to(url.clone()))
    );
    assert_eq!(
        kind("emitter = \"custom\"\ncustom_url = \"http://h/x\""),
        SinkKind::Custom(Custom::to(url))
    );
}

#[test]
fn the_environment_overrides_every_kind_of_key() {
    let text = format!("{SOURCE}[sink.big-lake]\nkind = \"webhook\"\nurl = \"http://h\"\n[cdc]");
    let config = parse(
        &text,
        &[
            ("WALRACE_CONFIG", "elsewhere.toml"),
            ("WALRACE_DATA_DIR", "/d${X}"),
            ("WALRACE_HTTP_LISTEN", "0.0.0.0:1"),
            ("WALRACE_SOURCE_APP_URL", "postgres://other"),
            ("WALRACE_SOURCE_APP_TABLES", "a.*, !a.b"),
            ("WALRACE_SOURCE_APP_CREATE", "false"),
            ("WALRACE_SINK_BIG_LAKE_HEADERS", "x-a=1,x-b=2"),
            ("WALRACE_SINK_BIG_LAKE_OPERATIONS", "insert,delete"),
            ("WALRACE_SINK_BIG_LAKE_FROM", "42"),
            ("WALRACE_SINK_NEW_KIND", "stdout"),
            ("WALRACE_CDC_BATCH_SIZE", "7"),
            ("WALRACE_PORT_7376_TCP", "tcp://10.0.0.1:7376"),
        ],
    );
    assert_eq!(config.data_dir, PathBuf::from("/d${X}"), "a value from outside is taken as it is");
    assert_eq!(config.http.listen, "0.0.0.0:1");
    assert_eq!(postgres(&config).url.expose(), "postgres://other");
    assert_eq!(postgres(&config).tables, ["a.*", "!a.b"]);
    assert!(!postgres(&config).create);
    let lake = &config.sink["big-lake"];
    assert_eq!(lake.operations, [Op::Insert, Op::Delete]);
    assert_eq!(lake.from, From::Offset(42));
    let SinkKind::Webhook(webhook) = &lake.kind else { panic!("{lake:?}") };
    assert_eq!(webhook.headers["x-b"], Secret::new("2"));
    assert_eq!(config.sink["new"].kind, SinkKind::Stdout(Stdout::default()));
    assert_eq!(config.sink["cdc"].batch_changes_max, 7);
}

#[test]
fn a_database_url_makes_a_source_only_where_none_is_written() {
    let variables = [("DATABASE_URL", "postgres://other"), ("TABLES_FILTER", "a.*,b.*")];
    let alone = parse("", &variables);
    assert_eq!(postgres(&alone).url.expose(), "postgres://other");
    assert_eq!(postgres(&alone).tables, ["a.*", "b.*"]);
    let beside = parse(SOURCE, &variables);
    assert_eq!(postgres(&beside).url.expose(), "postgres://u:hunter2@h/d");
    assert_eq!(postgres(&beside).tables, ["a.*", "b.*"]);
    let two = format!("{SOURCE}[source.b]\nkind = \"postgres\"\nurl = \"postgres://h\"\n");
    assert!(refused(&two, &variables).contains("WALRACE_SOURCE_APP_TABLES"));
}

#[test]
fn a_missing_file_names_the_command_that_writes_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none.toml");
    let named = environment(&[("WALRACE_CONFIG", path.to_str().unwrap())]);
    let error = Config::load_in(None, &named).unwrap_err();
    assert!(error.summary().contains("none.toml"), "{error}");
    assert!(error.remedy_text().unwrap().contains("walrace init URL"), "{error}");
    std::fs::write(&path, SOURCE).unwrap();
    assert_eq!(Config::load_in(None, &named).unwrap(), parse(SOURCE, &[]));
    assert_eq!(Config::load_in(Some(&path), &environment(&[])).unwrap(), parse(SOURCE, &[]));
}

#[test]
fn directories_are_created_and_an_unwritable_one_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = Config { data_dir: directory.path().join("a/b"), ..parse(SOURCE, &[]) };
    config.create_directories().unwrap();
    assert!(config.dead_letters().is_dir());
    std::fs::write(directory.path().join("file"), "").unwrap();
    config.dlq_path = Some(directory.path().join("file/dlq"));
    let error = config.create_directories().unwrap_err().to_string();
    assert!(error.contains("file/dlq (`dlq_path`)"), "{error}");
}

#[test]
fn a_shown_configuration_has_defaults_and_no_secret() {
    let text = format!(
        "{SOURCE}[sink.hook]\nkind = \"webhook\"\nurl = \"https://h/a?k=hunter2\"\n\
         hmac_secret = \"hunter2\"\nheaders = {{ authorization = \"hunter2\" }}"
    );
    let shown = parse(&text, &[]).to_toml().unwrap();
    assert!(!shown.contains("hunter2") && !format!("{:?}", parse(&text, &[])).contains("hunter2"));
    insta::assert_snapshot!(shown);
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just("${A}".to_owned()), "[ -~]{1,12}", "[a-z$#{}é\\n\"']{1,8}"]
}

fn path() -> impl Strategy<Value = PathBuf> {
    text().prop_map(|text| PathBuf::from(format!("d/{text}x")))
}

fn from() -> impl Strategy<Value = From> {
    prop_oneof![
        Just(From::Start),
        Just(From::Now),
        (0..1_u64 << 53).prop_map(From::Offset),
        (0..4_000_000_000_000_000_i64).prop_map(|time| From::Time(Timestamp(time))),
        "[a-z]{20,40}".prop_map(From::Token),
    ]
}

fn kind() -> impl Strategy<Value = SinkKind> {
    let url = "[a-z]{1,8}".prop_map(|host| Secret::new(format!("http://{host}/x")));
    prop_oneof![
        Just(SinkKind::Stdout(Stdout::default())),
        path().prop_map(|path| SinkKind::File(File::to(path))),
        (1..1_000_usize).prop_map(|capacity| SinkKind::Queue(Queue { capacity })),
        url.clone().prop_map(|url| SinkKind::Webhook(Webhook::to(url))),
        url.prop_map(|url| SinkKind::Custom(Custom::to(url))),
    ]
}

prop_compose! {
    fn sink()(kind in kind(), from in from(), schemas in prop::collection::vec(text(), 0..3),
              reads in any::<bool>(), ops in prop::sample::subsequence(&Op::ALL[..], 0..6),
              batch in 1..10_000_usize) -> Sink {
        Sink { from, schemas, reads, operations: ops, batch_changes_max: batch,
               ..Sink::of(kind) }
    }
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*", keys in "[\\[\\]a-z.=\"\n0-9${}:é -]*") {
        let _ = Config::parse_in(&text, "t", &environment(&[]));
        let _ = Config::parse_in(&keys, "t", &environment(&[]));
        let _ = Config::parse_in(&format!("{SOURCE}tables = [{keys:?}]"), "t", &environment(&[]));
    }

    #[test]
    fn arbitrary_variables_never_panic(key in "[A-Z_]{0,30}", value in "\\PC*") {
        let key = format!("WALRACE_{key}");
        let _ = Config::parse_in(SOURCE, "t", &environment(&[(&key, &value)]));
    }

    #[test]
    fn a_shown_configuration_reads_back(data_dir in path(), sink in sink(), age in 0..1_u64 << 60) {
        let mut config = parse(SOURCE, &[]);
        config.data_dir = data_dir;
        config.journal.age_ms_max = age;
        config.sink.insert("x".into(), sink);
        let shown = config.to_toml().unwrap();
        let mut read = parse(&shown, &[]);
        prop_assert_eq!(read.to_toml().unwrap(), shown);
        read.source.clone_from(&config.source); // its password was masked
        prop_assert_eq!(read, config);
    }
}

#[test]
fn what_consumers_pull_is_not_open_to_a_network_without_tokens() {
    let sink = |listen: &str| {
        format!("{SOURCE}[sink.a]\nkind = \"http_pull\"\n[http]\nlisten = \"{listen}\"\n")
    };
    for listen in ["127.0.0.1:7376", "[::1]:0", "localhost:80", ""] {
        parse(&sink(listen), &[]);
    }
    for listen in ["0.0.0.0:7376", "[::]:7376", "10.0.0.1:7376", "db.internal:7376"] {
        let message = refused(&sink(listen), &[]);
        assert!(message.contains("`http.listen`") && message.contains("api_tokens"), "{message}");
        let token = "\n[[api_tokens]]\nname = \"a\"\ntoken = \"${TOKEN}\"\n";
        let config = parse(&(sink(listen) + token), &[("TOKEN", "t0ken")]);
        assert_eq!(config.api_tokens[0].token.expose(), "t0ken");
        assert!(!format!("{config:?}").contains("t0ken"));
    }
    let empty = format!("{SOURCE}\n[[api_tokens]]\nname = \"a\"\ntoken = \"\"\n");
    assert!(refused(&empty, &[]).contains("`api_tokens[0].token` is empty"));
}

#[test]
fn sequins_name_for_the_pull_sink_is_known() {
    let text = format!("{SOURCE}[sink.a]\nkind = \"sequin_stream\"\nack_wait_ms = 700\n");
    let SinkKind::HttpPull(pull) = &parse(&text, &[]).sink["a"].kind.clone() else { panic!() };
    assert_eq!((pull.ack_wait_ms, pull.message), (700, Format::Sequin));
}
