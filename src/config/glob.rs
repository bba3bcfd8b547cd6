//! Globs over `schema.table`: `*` is any run of characters, `?` any one; a leading `!` takes away.

/// A list of globs that chooses tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Globs {
    chosen: Vec<String>,
    taken_away: Vec<String>,
}

impl Globs {
    /// Sorts the globs; their order does not matter.
    pub fn new(globs: &[String]) -> Self {
        let mut sorted = Self::default();
        for glob in globs {
            match glob.strip_prefix('!') {
                Some(glob) => sorted.taken_away.push(glob.to_owned()),
                None => sorted.chosen.push(glob.clone()),
            }
        }
        sorted
    }

    /// Whether the table is chosen: by some glob, or because none chooses at all, and taken away by
    /// none.
    pub fn choose(&self, schema: &str, table: &str) -> bool {
        let name = format!("{schema}.{table}");
        let any = |globs: &[String]| globs.iter().any(|glob| matches(glob, &name));
        (self.chosen.is_empty() || any(&self.chosen)) && !any(&self.taken_away)
    }

    /// Whether some glob with `!` takes the table away.
    pub fn takes_away(&self, schema: &str, table: &str) -> bool {
        let name = format!("{schema}.{table}");
        self.taken_away.iter().any(|glob| matches(glob, &name))
    }
}

/// Whether a name is one that a glob means. Goes back to the last `*` alone, so that the time is
/// bounded by the product of the lengths.
pub(crate) fn matches(glob: &str, name: &str) -> bool {
    let (mut glob, mut name) = (glob.chars(), name.chars());
    let mut last_star = None;
    loop {
        let at_name = name.clone();
        match (glob.next(), name.next()) {
            (None, None) => return true,
            (Some('*'), _) => {
                last_star = Some((glob.clone(), at_name.clone()));
                name = at_name;
            }
            (Some('?'), Some(_)) => {}
            (Some(wanted), Some(found)) if wanted == found => {}
            _ => {
                let Some((after_star, mut from)) = last_star.take() else { return false };
                if from.next().is_none() {
                    return false;
                }
                (glob, name) = (after_star.clone(), from.clone());
                last_star = Some((after_star, from));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chosen(globs: &[&str], schema: &str, table: &str) -> bool {
        let globs: Vec<String> = globs.iter().map(|&glob| glob.into()).collect();
        Globs::new(&globs).choose(schema, table)
    }

    #[test]
    fn globs_choose_and_take_away() {
        assert!(chosen(&[], "public", "orders"));
        assert!(chosen(&["public.*"], "public", "orders"));
        assert!(!chosen(&["public.*"], "audit", "orders"));
        assert!(chosen(&["*.orders"], "a", "orders"));
        assert!(!chosen(&["public.*", "!public.audit_*"], "public", "audit_log"));
        assert!(!chosen(&["!public.audit_*", "public.*"], "public", "audit_log"));
        assert!(chosen(&["!public.audit_*"], "public", "orders"));
        assert!(chosen(&["public.part_?"], "public", "part_ä"));
        assert!(!chosen(&["public.part_?"], "public", "part_10"));
        assert!(!chosen(&["public.order"], "public", "orders"));
        assert!(chosen(&["*"], "any", "thing"));
        assert!(!chosen(&["public.*x"], "public", "y"));
    }

    /// The definition, without any thought of speed.
    fn naive(glob: &[char], name: &[char]) -> bool {
        match (glob.split_first(), name.split_first()) {
            (None, None) => true,
            (Some(('*', rest)), None) => naive(rest, name),
            (Some(('*', rest)), Some((_, after))) => naive(rest, name) || naive(glob, after),
            (Some(('?', rest)), Some((_, after))) => naive(rest, after),
            (Some((wanted, rest)), Some((found, after))) => wanted == found && naive(rest, after),
            _ => false,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn matching_is_as_defined(glob in "[ab*?]{0,7}", name in "[abä]{0,8}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(matches(&glob, &name), naive(&chars(&glob), &chars(&name)));
        }
    }
}
