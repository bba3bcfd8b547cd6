//! Columns that rules name and no table has.

use super::{super::Transform, ORDERS, change, compile, row, table};
use crate::{
    change::{Before, Op},
    schema::Identity,
};

#[test]
fn a_column_that_a_step_names_is_told_where_no_table_has_it_or_one_has_it_no_more() {
    let rules = "transform = [{ mask = { emial = \"redact\", phone = \"redact\" } }]";
    let mut rules = compile(rules).unwrap();
    let told = |rules: &mut Transform| -> Vec<String> {
        rules.take_news().iter().map(ToString::to_string).collect()
    };
    let of = |name: &str, columns: &[(&str, u32)]| {
        let table = table(name, columns, Identity::Default);
        change(&table, Op::Insert, Before::Nothing, Some(row(&["1", "x"])))
    };
    for _ in 0..3 {
        rules.shape(of("orders", ORDERS)).unwrap_or_default();
    }
    let said = "transform[0].mask names the column `emial`, which public.orders does not have; \
                it has `email`";
    assert_eq!(told(&mut rules), [said]);
    rules.shape(of("other", &[("id", 20), ("v", 25)])).unwrap();
    let said = "transform[0].mask names the column `emial`, which public.other does not have";
    assert_eq!(told(&mut rules), [said], "orders has the other name");
    rules.shape(of("orders", &[("id", 20), ("telephone", 25)])).unwrap();
    let said = "transform[0].mask names the column `phone`, which public.orders does not have";
    assert_eq!(told(&mut rules), [said], "it had it before");
    assert_eq!(rules.count_unmatched(), 1);
    assert!(rules.unmatched()[0].bares);
}

#[test]
fn names_are_looked_for_in_the_table_as_the_steps_before_leave_it() {
    let check = |rules: &str| {
        let mut rules = compile(rules).unwrap();
        rules.meet(&table("orders", ORDERS, Identity::Full), &[Op::Insert, Op::Delete]).unwrap();
        rules.unmatched().into_iter().map(|it| (it.rule, it.column)).collect::<Vec<_>>()
    };
    let steps = "transform = [{ rename = { email = \"mail\" } }, { set = { total = \"1\" } },
                 { drop = [\"mail\", \"total\"] }, { columns = [\"email\", \"id\"] }]";
    assert_eq!(check(steps), [("transform[3].columns".to_owned(), "email".to_owned())]);
    let behind = "transform = [{ function = \"function transform(c) return c end\" },
                  { drop = [\"made_up\"] }]";
    let mut rules = compile(behind).unwrap();
    rules.meet(&table("orders", ORDERS, Identity::Full), &[Op::Insert]).unwrap();
    assert_eq!(rules.unmatched(), [], "only the function knows");
}
