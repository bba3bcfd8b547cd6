//! The names of objects: a template of the change's fields, its hour and its offsets.

use crate::{
    change::{Change, Timestamp},
    error::{Error, Result},
    format::{Names, Template},
};

/// What stands in a name in place of the braces of a field of ours, until it is filled in.
const MARK: char = '\u{1}';
const TIMES: [&str; 4] = ["yyyy", "mm", "dd", "hh"];
const ENDS: [&str; 4] = ["first", "last", "flush", "ext"];
const END: &str = "{first}-{last}-{flush}.{ext}";
/// Logical messages belong to no table.
const MESSAGES: &str = "messages/{prefix}/{yyyy}-{mm}-{dd}T{hh}/{first}-{last}-{flush}.{ext}";

/// Makes names.
#[derive(Debug)]
pub(super) struct Naming {
    template: Template,
    messages: Template,
    names: Names,
}

/// What is known of an object only when it is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct End<'a> {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) flush: u64,
    pub(super) ext: &'a str,
    /// Which one of several objects that had the same name otherwise.
    pub(super) again: usize,
}

impl Naming {
    pub(super) fn new(template: &str, names: &Names) -> Result<Self> {
        if !template.contains("{flush}") {
            return Err(Error::config(format!("`name` `{template}` has no `{{flush}}`"))
                .remedy(format!("end it with `{END}`: no two objects may have one name")));
        }
        let template = marked(template).parse()?;
        Ok(Self { template, messages: marked(MESSAGES).parse()?, names: names.clone() })
    }

    /// The name with marks for what is not known yet: changes with the same one share an object.
    pub(super) fn stem(&self, change: &Change) -> Result<String> {
        let mut stem = match (change.route(), &change.table) {
            (Some(route), _) => format!("{}/{}", route.trim_matches('/'), marked(END)),
            (None, None) => self.messages.render(change, &self.names)?,
            (None, Some(_)) => self.template.render(change, &self.names)?,
        };
        let time = hour(change.transaction.commit_time);
        for (field, value) in TIMES.iter().zip(time) {
            stem = stem.replace(&mark(field), &value);
        }
        if stem.trim_start_matches('/').starts_with("_walrace") {
            return Err(Error::data("an object's name may not begin with `_walrace`"));
        }
        Ok(stem)
    }
}

impl End<'_> {
    /// The whole name.
    pub(super) fn name(&self, stem: &str) -> String {
        let Self { first, last, flush, ext, again } = self;
        let again = if *again == 0 { String::new() } else { format!("-{again}") };
        stem.replace(&mark("first"), &format!("{first:020}"))
            .replace(&mark("last"), &format!("{last:020}"))
            .replace(&mark("flush"), &format!("{flush:010}{again}"))
            .replace(&mark("ext"), ext)
    }
}

fn mark(field: &str) -> String {
    format!("{MARK}{field}{MARK}")
}

fn marked(template: &str) -> String {
    let fields = TIMES.iter().chain(&ENDS);
    fields.fold(template.to_owned(), |text, field| {
        text.replace(&format!("{{{field}}}"), &mark(field))
    })
}

/// Year, month, day and hour in UTC.
fn hour(time: Timestamp) -> [String; 4] {
    let time = jiff::Timestamp::from_microsecond(time.0).unwrap_or_default();
    ["%Y", "%m", "%d", "%H"].map(|part| time.strftime(part).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing::batch;

    fn name(template: &str, change: &Change) -> String {
        let stem = Naming::new(template, &Names::default()).unwrap().stem(change).unwrap();
        End { first: 3, last: 17, flush: 2, ext: "jsonl", again: 0 }.name(&stem)
    }

    #[test]
    fn a_name_has_the_table_the_hour_and_the_offsets() {
        let mut change = batch(3..4).changes.remove(0);
        assert_eq!(
            name("{schema}.{table}/{yyyy}-{mm}-{dd}T{hh}/{first}-{last}-{flush}.{ext}", &change),
            "public.t/2026-04-06T09/00000000000000000003-00000000000000000017-0000000002.jsonl"
        );
        change.shaped_mut().route = Some("/here/".into());
        let routed = "here/00000000000000000003-00000000000000000017-0000000002.jsonl";
        assert_eq!(name("{table}{flush}", &change), routed);
        assert!(Naming::new("{table}/{first}", &Names::default()).is_err());
        assert!(Naming::new("{tabel}/{flush}", &Names::default()).is_err());
        let own = Naming::new("_walrace/{flush}", &Names::default()).unwrap();
        change.shaped = None;
        assert!(own.stem(&change).is_err());
    }
}
