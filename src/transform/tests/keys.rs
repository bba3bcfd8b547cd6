//! The keys that rules give, beside those of the rows.

use std::sync::Arc;

use super::{change, compile, message, row, shape, table, update};
use crate::{
    change::{Before, Change, Keys, Op},
    schema::{Identity, Table},
};

const EVENTS: &str = "[outbox]\ntable = \"public.outbox\"\nkey_column = \"aggregate_id\"\n\
                      headers_column = \"headers\"\nmessage_prefix = \"outbox.\"\n";

/// An event of the outbox: id, aggregate and headers.
fn event(texts: [&str; 3]) -> Change {
    let columns = [("id", 20), ("aggregate_id", 25), ("headers", 3802), ("payload", 114)];
    let outbox = table("outbox", &columns, Identity::Default);
    let [id, aggregate, headers] = texts;
    change(&outbox, Op::Insert, Before::Nothing, Some(row(&[id, aggregate, headers, "{}"])))
}

#[test]
fn events_and_messages_of_an_aggregate_share_a_key_and_those_without_one_do_not() {
    let keys = |change: Change| shape(EVENTS, change).unwrap().remove(0).keys();
    let (one, two) = (keys(event(["1", "a", "{}"])), keys(event(["2", "a", "{}"])));
    assert!(one.meets(&two) && !one.meets(&keys(event(["3", "b", "{}"]))));
    assert!(one.meets(&keys(message("outbox.orders#a", "1"))));
    assert!(!one.meets(&keys(message("outbox.orders#b", "1"))));
    assert!(one.meets(&event(["1", "z", "{}"]).keys()), "the row's own key counts too");
    assert!(!keys(event(["4", "NULL", "{}"])).meets(&keys(event(["5", "NULL", "{}"]))));
    let bytes = one.to_bytes();
    assert_eq!(Keys::from_bytes(one.room, &bytes), one);
}

#[test]
fn an_outbox_without_a_key_of_its_own_goes_by_the_aggregate_alone() {
    let columns = [("id", 20), ("aggregate_id", 25), ("headers", 3802), ("payload", 114)];
    let mut outbox = Table::clone(&table("outbox", &columns, Identity::Nothing));
    outbox.columns.iter_mut().for_each(|c| (c.primary_key, c.identity) = (false, false));
    let outbox = Arc::new(outbox);
    let of = |aggregate| {
        let after = Some(row(&["1", aggregate, "{}", "{}"]));
        shape(EVENTS, change(&outbox, Op::Insert, Before::Nothing, after)).unwrap().remove(0).keys()
    };
    assert!(of("a").meets(&of("a")) && !of("a").meets(&of("b")));
}

#[test]
fn a_change_on_which_a_rule_fails_has_the_keys_that_the_others_tell() {
    let mut rules = compile(EVENTS).unwrap();
    let bad = event(["1", "a", "[]"]);
    assert!(rules.shape(bad.clone()).is_err());
    let good = shape(EVENTS, event(["2", "a", "{}"])).unwrap().remove(0);
    assert!(rules.keys_despite(&bad).meets(&good.keys()));
    let text = r#"
        message_key = "record.tenant"
        mask_key = "0123456789abcdef"
        transform = [{ set = { x = "1 / (record.id - 1)" } }, { mask = { tenant = "hash" } }]
    "#;
    let mut rules = compile(text).unwrap();
    assert!(rules.shape(update()).is_err());
    let passing = text.replace("record.id - 1", "record.id");
    let good = shape(&passing, update()).unwrap().remove(0);
    assert_eq!(rules.keys_despite(&update()), good.keys());
}

#[test]
fn a_step_that_alters_the_key_keeps_the_order_of_the_old_one_too() {
    let keys = |rules: &str| shape(rules, update()).unwrap().remove(0).keys();
    for rules in [
        "mask_key = \"0123456789abcdef\"\ntransform = [{ mask = { id = \"hash\" } }]",
        "transform = [{ set = { id = \"record.id + 7\" } }]",
        "transform = [{ drop = [\"id\"] }]",
        "message_key = \"record.tenant\"",
    ] {
        assert!(keys(rules).meets(&update().keys()) && !keys(rules).is_whole(), "{rules}");
    }
    let untouched = shape("transform = [{ drop = [\"email\"] }]", update()).unwrap().remove(0);
    assert_eq!(untouched.shaped, None, "nothing is kept where the key is as it was");
}
