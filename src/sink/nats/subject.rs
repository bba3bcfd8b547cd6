//! Subjects: tokens between dots, without white space and without wildcards
//! (<https://docs.nats.io/nats-concepts/subjects>).

use crate::{
    error::{Error, Result},
    format::{Names, Template},
};

/// A server reads lines of 4096 bytes at most, with more than the subject in them.
const SUBJECT_BYTES_MAX: usize = 1024;
/// What belongs to the server and to its clients' replies.
const RESERVED: [&str; 3] = ["$JS.", "$SYS.", "_INBOX."];

/// Refuses a subject that the server would refuse, or take for something else.
pub(super) fn check(subject: &str) -> Result<()> {
    match fault(subject) {
        None => Ok(()),
        Some(why) => Err(Error::data(format!("{subject:?} is no subject: {why}"))),
    }
}

/// Refuses a template of which every subject would be refused.
pub(super) fn check_template(template: &Template) -> Result<()> {
    let text = template.as_str();
    let example = if template.is_constant() { text.to_owned() } else { with_stars(text, None) };
    let example = example.replace('*', "x");
    let wildcard = text.contains(['*', '>']).then_some("it has a wildcard");
    match wildcard.or_else(|| fault(&example)) {
        None => Ok(()),
        Some(why) => Err(Error::config(format!("`subject` {text:?} gives no subject: {why}"))
            .remedy("write tokens between dots, such as {source}.{schema}.{table}.{op}")),
    }
}

/// The subjects that a stream needs for every message of a template.
pub(super) fn of_stream(template: &Template, names: &Names) -> String {
    with_stars(template.as_str(), Some(names))
}

fn fault(subject: &str) -> Option<&'static str> {
    if subject.len() > SUBJECT_BYTES_MAX {
        return Some("it is longer than 1024 bytes");
    }
    if subject.split('.').any(str::is_empty) {
        return Some("it has an empty token");
    }
    if subject.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Some("it has white space");
    }
    if subject.contains(['*', '>']) {
        return Some("it has a wildcard");
    }
    let reserved = RESERVED.iter().any(|prefix| subject.starts_with(prefix));
    reserved.then_some("it belongs to the server")
}

/// The template with each token that has a field as `*`; names that are always the same are put in.
fn with_stars(text: &str, names: Option<&Names>) -> String {
    let mut known = text.replace("{{", "x").replace("}}", "x");
    if let Some(names) = names {
        let pairs = [("{source}", &names.source), ("{database}", &names.database)];
        for (field, name) in pairs {
            if fault(name).is_none() {
                known = known.replace(field, name);
            }
        }
    }
    let mut plain = String::new();
    let mut inside = false;
    for c in known.chars() {
        match c {
            '{' => {
                inside = true;
                plain.push('*');
            }
            '}' => inside = false,
            _ if inside => {}
            _ => plain.push(c),
        }
    }
    let star = |token: &str| if token.contains('*') { "*".to_owned() } else { token.to_owned() };
    plain.split('.').map(star).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;

    #[test]
    fn what_the_server_would_read_otherwise_is_refused() {
        for good in ["a", "app.public.t.insert", "$KV.bucket.key", "größe.ü"] {
            check(good).unwrap();
        }
        for bad in ["", "a b", "a..b", ".a", "a.", "a.*", "a.>", "a\tb", "$JS.API.INFO", "a\nb"] {
            assert_eq!(check(bad).unwrap_err().class(), Class::Data, "{bad:?}");
        }
        assert!(check(&"x".repeat(1025)).is_err());
    }

    #[test]
    fn a_template_that_never_gives_a_subject_is_refused_at_once() {
        for good in ["{source}.{schema}.{table}.{op}", "walrace.{record.tenant}", "fixed"] {
            check_template(&good.parse().unwrap()).unwrap();
        }
        for bad in ["a b", "{source}..{op}", "a.>", "{table}.*", "", "$JS.API.{table}"] {
            let error = check_template(&bad.parse().unwrap()).unwrap_err();
            assert_eq!(error.class(), Class::Config, "{bad:?}");
        }
    }

    #[test]
    fn a_stream_gets_a_star_for_each_token_that_varies() {
        let names = Names { source: "app".into(), database: "my db".into(), ..Names::default() };
        let stars = |text: &str| of_stream(&text.parse().unwrap(), &names);
        assert_eq!(stars("{source}.{schema}.{table}.{op}"), "app.*.*.*");
        assert_eq!(stars("x.{database}.{schema}-{record.a}.end"), "x.*.*.end");
        assert_eq!(stars("fixed"), "fixed");
    }
}
