//! Whether readers of one version of a table can read the changes of another.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Difference, Table, Type, TypeKind, difference::differences};

/// Which readers a new version of a table must not break.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// None: every change of a table passes.
    #[default]
    None,
    /// Readers that know the new version can read the changes of the one before: columns may be
    /// dropped, added ones may be null, types may only become wider.
    Backward,
    /// Readers that know the version before can read the changes of the new one: columns may be
    /// added, only those that may be null may be dropped, types may only become narrower.
    Forward,
    /// Both.
    Full,
}

impl Mode {
    /// As the configuration has it.
    pub fn word(self) -> &'static str {
        match self {
            Mode::None => "none",
            Mode::Backward => "backward",
            Mode::Forward => "forward",
            Mode::Full => "full",
        }
    }
}

/// Why `after` is not compatible with `before`; empty where it is. What is not known (whether an
/// added column may be null, where the stream was behind) is taken for compatible.
pub fn breaks(mode: Mode, before: &Table, after: &Table) -> Vec<String> {
    let backward = matches!(mode, Mode::Backward | Mode::Full);
    let forward = matches!(mode, Mode::Forward | Mode::Full);
    let mut found = Vec::new();
    if !backward && !forward {
        return found;
    }
    for difference in differences(before, after) {
        let types = |column: &str| Some((&before.column(column)?.ty, &after.column(column)?.ty));
        let harm = match &difference {
            Difference::Added { maybe_was: Some(_), .. } | Difference::Key { .. } => true,
            Difference::Added { nullable, .. } => backward && *nullable == Some(false),
            Difference::Dropped { nullable, .. } => forward && *nullable == Some(false),
            Difference::Nullable { nullable, .. } => {
                if *nullable {
                    forward
                } else {
                    backward
                }
            }
            Difference::Retyped { column, .. } => types(column).is_none_or(|(old, new)| {
                backward && !widens(old, new) || forward && !widens(new, old)
            }),
            Difference::Identity { .. } | Difference::Recreated => false,
        };
        if harm {
            found.push(difference.to_string());
        }
    }
    found
}

const SMALLINT: u32 = 21;
const INTEGER: u32 = 23;
const BIGINT: u32 = 20;
const REAL: u32 = 700;
const DOUBLE: u32 = 701;
const NUMERIC: u32 = 1700;
const TEXT: u32 = 25;
const VARCHAR: u32 = 1043;

/// Whether each value of `narrow` is one of `wide`, in the same form.
fn widens(narrow: &Type, wide: &Type) -> bool {
    match (&narrow.kind, &wide.kind) {
        (TypeKind::Array { element: narrow, .. }, TypeKind::Array { element: wide, .. }) => {
            return widens(narrow, wide);
        }
        (TypeKind::Domain { base }, _) => return narrow == wide || widens(base, wide),
        (TypeKind::Base, TypeKind::Base) => {}
        (narrow_kind, wide_kind) => return narrow.oid == wide.oid && narrow_kind == wide_kind,
    }
    match (narrow.oid, wide.oid) {
        (SMALLINT, INTEGER | BIGINT) | (INTEGER, BIGINT) | (REAL, DOUBLE) => true,
        (SMALLINT | INTEGER | BIGINT, NUMERIC) => wide.modifier < 0,
        (VARCHAR, TEXT) => true,
        (TEXT, VARCHAR) => wide.modifier < 0,
        (VARCHAR, VARCHAR) => wide.modifier < 0 || (0..=wide.modifier).contains(&narrow.modifier),
        (NUMERIC, NUMERIC) => wider_numeric(narrow.modifier, wide.modifier),
        (same, other) => same == other && narrow.modifier == wide.modifier,
    }
}

/// Whether there is room before and behind the point (`numeric(precision, scale)`).
fn wider_numeric(narrow: i32, wide: i32) -> bool {
    let parts = |modifier: i32| {
        let packed = modifier - 4;
        let (precision, scale) = (packed >> 16 & 0xffff, ((packed & 0x7ff) ^ 1024) - 1024);
        (precision - scale, scale)
    };
    if wide < 0 || narrow < 0 {
        return wide < 0;
    }
    let (narrow, wide) = (parts(narrow), parts(wide));
    narrow.0 <= wide.0 && narrow.1 <= wide.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{Column, Identity};

    fn ty(text: &str) -> Type {
        let (oid, modifier) = match text {
            "smallint" => (SMALLINT, -1),
            "integer" => (INTEGER, -1),
            "bigint" => (BIGINT, -1),
            "numeric" => (NUMERIC, -1),
            "numeric(8,2)" => (NUMERIC, (8 << 16 | 2) + 4),
            "numeric(9,3)" => (NUMERIC, (9 << 16 | 3) + 4),
            "numeric(9,4)" => (NUMERIC, (9 << 16 | 4) + 4),
            "varchar(10)" => (VARCHAR, 14),
            "varchar(20)" => (VARCHAR, 24),
            _ => (TEXT, -1),
        };
        Type { oid, modifier, name: text.into(), kind: TypeKind::Base }
    }

    /// Columns as `name type`, with `!` behind those that are never null; `id` is the key.
    fn table(columns: &[&str]) -> Table {
        let column = |text: &&str| {
            let (name, rest) = text.split_once(' ').unwrap();
            Column {
                name: name.into(),
                ty: ty(rest.trim_end_matches('!')),
                primary_key: name == "id",
                identity: name == "id",
                nullable: Some(!rest.ends_with('!')),
            }
        };
        Table {
            oid: 1,
            schema: "public".into(),
            name: "t".into(),
            identity: Identity::Default,
            columns: columns.iter().map(column).collect(),
        }
    }

    /// Whether it is compatible backward, forward, and both.
    fn passes(before: &[&str], after: &[&str]) -> (bool, bool, bool) {
        let ok = |mode| breaks(mode, &table(before), &table(after)).is_empty();
        assert!(ok(Mode::None));
        (ok(Mode::Backward), ok(Mode::Forward), ok(Mode::Full))
    }

    #[test]
    fn each_kind_of_change_breaks_whom_the_table_of_the_documentation_says() {
        let id = "id bigint!";
        type Case<'a> = (&'a [&'a str], &'a [&'a str], (bool, bool, bool));
        let cases: [Case<'_>; 12] = [
            (&[id], &[id, "a text"], (true, true, true)),
            (&[id], &[id, "a text!"], (false, true, false)),
            (&[id, "a text"], &[id], (true, true, true)),
            (&[id, "a text!"], &[id], (true, false, false)),
            (&[id, "a text"], &[id, "a text!"], (false, true, false)),
            (&[id, "a text!"], &[id, "a text"], (true, false, false)),
            (&[id, "a integer"], &[id, "a bigint"], (true, false, false)),
            (&[id, "a bigint"], &[id, "a integer"], (false, true, false)),
            (&[id, "a integer"], &[id, "a text"], (false, false, false)),
            (&[id, "a text"], &[id, "b text"], (false, false, false)), // may be a rename
            (&[id, "a integer"], &["no bigint!", "a integer"], (false, false, false)),
            (&[id, "a text"], &["a text", id], (true, true, true)),
        ];
        for (before, after, expected) in cases {
            assert_eq!(passes(before, after), expected, "{before:?} to {after:?}");
        }
    }

    #[test]
    fn a_type_is_wider_where_it_has_each_value_in_the_same_form() {
        for (narrow, wide) in [
            ("smallint", "integer"),
            ("integer", "numeric"),
            ("numeric(8,2)", "numeric(9,3)"),
            ("numeric(9,4)", "numeric"),
            ("varchar(10)", "varchar(20)"),
            ("varchar(20)", "text"),
        ] {
            assert!(widens(&ty(narrow), &ty(wide)), "{narrow} to {wide}");
            assert!(!widens(&ty(wide), &ty(narrow)), "{wide} to {narrow}");
        }
        assert!(!widens(&ty("integer"), &ty("numeric(8,2)")));
        assert!(!widens(&ty("numeric(8,2)"), &ty("numeric(9,4)")));
    }
}
