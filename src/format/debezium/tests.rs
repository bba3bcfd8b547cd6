use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::{
    form::{Form, Unfit},
    number::Decimal,
};
use crate::{
    format::time,
    schema::{Type, TypeKind},
};

fn written(oid: u32, modifier: i32, text: &str) -> Result<Json, Unfit> {
    let mut out = Vec::new();
    Form::of(&Type::base(oid, modifier)).write(&mut out, text.as_bytes(), true)?;
    Ok(serde_json::from_slice(&out).unwrap())
}

#[test]
fn a_value_beyond_what_its_type_holds_is_refused_and_never_guessed() {
    for (oid, text) in [
        (1700, "NaN"),
        (1700, "-Infinity"),
        (1700, ""),
        (23, "x"),
        (1082, "2026-13-01"),
        (1082, "2026-1x-01"),
        (1114, "294276-12-31 23:59:59.999999"),
        (1184, "2026-04-06 09:14:22+02"),
        (1186, "P1Y"),
        (17, "\\x0"),
        (1560, "102"),
        (600, "(Infinity,0)"),
        (1007, "{{1,2},{3,x}}"),
    ] {
        assert_eq!(written(oid, -1, text), Err(Unfit::Value), "{oid} {text}");
    }
}

#[test]
fn times_are_numbers_by_the_calendar_of_postgres() {
    assert_eq!(time::date("1970-01-01"), Some(0));
    assert_eq!(time::date("2000-02-29"), Some(11_016));
    assert_eq!(time::date("0001-01-01"), Some(-719_162));
    assert_eq!(time::date("0001-12-31 BC"), Some(-719_163));
    assert_eq!(time::date("5874897-12-31"), Some(2_145_042_905));
    assert_eq!(written(1083, 3, "24:00:00"), Ok(json!(86_400_000)));
    assert_eq!(written(1114, 3, "1969-12-31 23:59:59.999"), Ok(json!(-1)));
    assert_eq!(written(1266, -1, "00:30:00+05:45"), Ok(json!("18:45:00Z")));
    assert_eq!(
        written(1184, 3, "12026-04-06 09:14:22.1+00"),
        Ok(json!("+12026-04-06T09:14:22.100Z"))
    );
    assert_eq!(written(1186, -1, "1 mon -1 days"), Ok(json!(2_543_400_000_000_i64)));
}

#[test]
fn arrays_of_several_dimensions_have_no_schema() {
    let form = Form::of(&Type::base(1007, -1));
    let mut out = Vec::new();
    assert_eq!(form.write(&mut out, b"{{1,2},{3,4}}", false), Err(Unfit::Value));
    assert_eq!(written(1007, -1, "{{1,2},{3,4}}"), Ok(json!([[1, 2], [3, 4]])));
}

#[test]
fn a_domain_and_an_array_pass_their_scale_on() {
    let scaled = Type::base(1700, (6 << 16 | 2) + 4);
    let domain = Type {
        kind: TypeKind::Domain { base: Box::new(scaled.clone()) },
        ..Type::base(70_000, -1)
    };
    assert_eq!(Form::of(&domain), Form::Decimal { scale: 2, precision: 6 });
    let element = Box::new(Type::base(1700, -1));
    let array = Type {
        kind: TypeKind::Array { element, delimiter: ',' },
        ..Type::base(1231, scaled.modifier)
    };
    let element = Box::new(Form::Decimal { scale: 2, precision: 6 });
    assert_eq!(Form::of(&array), Form::Array { element, delimiter: b',' });
}

fn unscaled(text: &str) -> (Vec<u8>, i32) {
    let decimal = Decimal::parse(text.as_bytes()).unwrap();
    (decimal.unscaled(), decimal.scale)
}

#[test]
fn a_decimal_is_the_fewest_bytes_of_twos_complement() {
    assert_eq!(unscaled("0"), (vec![0], 0));
    assert_eq!(unscaled("127"), (vec![127], 0));
    assert_eq!(unscaled("128"), (vec![0, 128], 0));
    assert_eq!(unscaled("-128"), (vec![128], 0));
    assert_eq!(unscaled("-129"), (vec![255, 127], 0));
    assert_eq!(unscaled("-0.00"), (vec![0], 2));
    let mut negative_scale = Decimal::parse(b"12300").unwrap();
    assert_eq!(negative_scale.rescale(-2), Some(()));
    assert_eq!(negative_scale.unscaled(), [123]);
    assert_eq!(Decimal::parse(b"1.5").unwrap().rescale(0), None);
}

proptest! {
    #[test]
    fn any_decimal_survives(number in any::<i128>(), zeros in 0_usize..60) {
        let (bytes, _) = unscaled(&number.to_string());
        let fill = if bytes[0] & 0x80 == 0 { 0 } else { 0xFF };
        let mut wide = [fill; 16];
        wide[16 - bytes.len()..].copy_from_slice(&bytes);
        prop_assert_eq!(i128::from_be_bytes(wide), number);
        // Long numbers go another way: their low digits are zeros, so they divide evenly.
        let small = i64::try_from(number >> 64).unwrap();
        let (long, _) = unscaled(&format!("{small}{}", "0".repeat(zeros)));
        prop_assert_eq!(long, product(small, zeros));
    }

    #[test]
    fn any_text_of_any_type_is_valid_json_or_refused(
        text in prop_oneof![any::<String>(), r#"[\[\]{}(),"\\ 0-9a-eNULxBC:;.+=>-]{0,24}"#],
        oid in prop::sample::select(vec![
            16, 17, 20, 23, 25, 114, 600, 700, 701, 790, 1082, 1083, 1114, 1184, 1186, 1266, 1560,
            1562, 1700, 2950, 1007, 1009, 1231, 1185, 1001,
        ])
    ) {
        for (name, oid) in [("", oid), ("hstore", 70_000)] {
            let ty = Type { name: name.into(), ..Type::base(oid, -1) };
            let mut out = Vec::new();
            if Form::of(&ty).write(&mut out, text.as_bytes(), true).is_ok() {
                let json = std::str::from_utf8(&out).unwrap();
                prop_assert!(!json.contains(['\n', '\r']));
                prop_assert!(serde_json::from_str::<Json>(json).is_ok(), "{}", json);
            }
        }
    }
}

/// `small` times a power of ten, by schoolbook over bytes.
fn product(small: i64, zeros: usize) -> Vec<u8> {
    let mut bytes = small.to_be_bytes().to_vec();
    for _ in 0..zeros {
        let fill = if bytes[0] & 0x80 == 0 { 0 } else { 0xFF };
        bytes.insert(0, fill);
        let mut carry = 0_u32;
        for byte in bytes.iter_mut().rev() {
            let sum = u32::from(*byte) * 10 + carry;
            *byte = sum.to_le_bytes()[0];
            carry = sum >> 8;
        }
    }
    while bytes.len() > 1 && matches!((bytes[0], bytes[1] & 0x80), (0, 0) | (0xFF, 0x80)) {
        bytes.remove(0);
    }
    bytes
}
