//! What is told about rules that cannot be.

use super::{compile, refused};

#[test]
fn a_mistake_is_placed_and_explained() {
    let check = |rules: &str, told: &str| {
        let said = refused(rules);
        assert!(said.contains(told), "{said}\n  lacks {told}");
    };
    check(r#"where = "record.total >""#, "sink s: `where`, line 1, column 15: ");
    check(r#"where = "total > 100""#, "line 1, column 1: there is no variable `total`");
    check(r#"where = "total > 100""#, "columns are record.total");
    check(
        "where = \"\"\"op == 'insert'\n  && recrod.x == 1\"\"\"",
        "line 2, column 6: there is no variable `recrod`",
    );
    check(r#"route = "uper(record.a)""#, "`route`, line 1, column 5: there is no function `uper`");
    check(r#"transform = [{ set = { a = "1 +" } }]"#, "`transform[0].set.a`, line 1");
    check(r#"message_headers = { x = "y" }"#, "`message_headers.x`, line 1, column 1");
    check(
        r#"transform = [{ function = "function transform(c)\n  retrn c\nend" }]"#,
        "transform[0].function:2:",
    );
    check(
        r#"transform = [{ function = "local x = 1" }]"#,
        "it defines no `function transform(change)`",
    );
    check(r#"transform = [{ function_file = "/nowhere.luau" }]"#, "cannot read /nowhere.luau");
    for known in [
        "[1, 2].exists(x, x > record.id)",
        "size(record.a) > 0 && record.a.startsWith('x') && has(record.b)",
        "record.email.lowerAscii().split('@')[1] == 'x' || record['odd name'] == 1",
        "math.greatest(1, 2) == 2 && base64.encode(b'x') != '' && type(record.a) == string",
        "timestamp(record.at) > timestamp('2026-01-01T00:00:00Z')",
        "double(metadata.commit_lsn) > 1.0 && message.prefix == 'x' && changes.a == before.a",
        "op in ['insert', 'update'] ? true : schema == table",
        "record.items.map(i, i.qty).all(q, q > 0) && record.items.filter(i, i.s != '').size() > 0",
    ] {
        if let Err(error) = compile(&format!("where = '''{known}'''")) {
            panic!("{known}: {error}");
        }
    }
}
