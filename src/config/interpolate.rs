//! `${NAME}`, `${NAME:-default}` and `${file:/path}` inside texts; `$${` is a plain `${`.

use std::{fs, io::Read};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use super::environment::Environment;

/// Far more than any secret; a mistaken path must not fill the memory.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What may stand in the user and password part of a URL as it is (RFC 3986, unreserved).
const LOGIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A text after replacement.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Filled {
    pub(super) text: String,
    /// Whether anything came from outside the file.
    pub(super) foreign: bool,
}

/// Why a reference cannot be replaced, and what mends it. Neither shows a value.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) what: String,
    pub(super) remedy: String,
}

/// Replaces every reference of `template`.
pub(super) fn fill(template: &str, environment: &Environment) -> Result<Filled, Refusal> {
    let mut filled = Filled { text: String::with_capacity(template.len()), foreign: false };
    let mut rest = template;
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        let from = from.strip_prefix("${").unwrap_or_default();
        if let Some(before) = before.strip_suffix('$') {
            filled.text.push_str(before);
            filled.text.push_str("${");
            rest = from;
            continue;
        }
        filled.text.push_str(before);
        let Some((reference, after)) = from.split_once('}') else {
            return Err(refusal("`${` without `}`", "close it, or write `$${` for a plain `${`"));
        };
        let value = resolve(reference, environment)?;
        if is_login(&filled.text, after) {
            push_encoded(&mut filled.text, &value);
        } else {
            filled.text.push_str(&value);
        }
        filled.foreign = true;
        rest = after;
    }
    filled.text.push_str(rest);
    Ok(filled)
}

/// The inverse for a text that holds no reference.
pub(crate) fn escape(text: &str) -> String {
    text.replace("${", "$${")
}

fn resolve(reference: &str, environment: &Environment) -> Result<String, Refusal> {
    if let Some(path) = reference.strip_prefix("file:") {
        return read_file(path);
    }
    let (name, default) = match reference.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (reference, None),
    };
    let first_is_digit = name.starts_with(|c: char| c.is_ascii_digit());
    if name.is_empty()
        || first_is_digit
        || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    {
        return Err(refusal(
            "what stands in `${...}` is neither a variable nor `file:` and a path",
            "write `${NAME}`, `${NAME:-default}` or `${file:/path}`; `$${` is a plain `${`",
        ));
    }
    match (environment.get(name), default) {
        (Some(value), None) => Ok(value.to_owned()),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value.to_owned()),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(refusal(
            &format!("environment variable {name} is not set"),
            &format!("export {name}, or write `${{{name}:-default}}`"),
        )),
    }
}

fn read_file(path: &str) -> Result<String, Refusal> {
    let cannot = |why: &str| {
        refusal(&format!("cannot read {path}: {why}"), "create the file, and let this user read it")
    };
    let file = fs::File::open(path).map_err(|error| cannot(&error.to_string()))?;
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    let bytes = read.map_err(|error| cannot(&error.to_string()))?;
    if bytes as u64 > FILE_BYTES_MAX {
        return Err(cannot("it is longer than 64 KiB"));
    }
    let trimmed = text.strip_suffix('\n').unwrap_or(&text);
    Ok(trimmed.strip_suffix('\r').unwrap_or(trimmed).to_owned())
}

/// Whether a reference between `before` and `after` stands in the user or password of a URL.
fn is_login(before: &str, after: &str) -> bool {
    let authority = before.split_once("://").map(|(_, authority)| authority);
    authority.is_some_and(|text| !text.contains(['/', '?', '#', '@'])) && after.contains('@')
}

/// Encodes what a URL cannot hold. What is percent-encoded already stays as it is.
fn push_encoded(text: &mut String, value: &str) {
    let mut rest = value;
    while let Some(at) = rest.find('%') {
        let (before, from) = rest.split_at(at);
        text.extend(percent_encode(before.as_bytes(), LOGIN));
        let encoded = from.get(1..3).is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
        text.push_str(if encoded { "%" } else { "%25" });
        rest = from.get(1..).unwrap_or_default();
    }
    text.extend(percent_encode(rest.as_bytes(), LOGIN));
}

fn refusal(what: &str, remedy: &str) -> Refusal {
    Refusal { what: what.to_owned(), remedy: remedy.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(template: &str) -> String {
        let variables = [("A", "alpha"), ("EMPTY", ""), ("PW", "p@ss/w#rd%"), ("ENC", "a%23b")];
        let environment = Environment::of(variables);
        fill(template, &environment).map_or_else(|refusal| refusal.what, |filled| filled.text)
    }

    #[test]
    fn references_are_replaced_and_escapes_are_not() {
        assert_eq!(filled("x${A}y${A}"), "xalphayalpha");
        assert_eq!(filled("${NONE:-d}${EMPTY:-e}${A:-f}[${EMPTY}]"), "dealpha[]");
        assert_eq!(filled("$${A} $A $"), "${A} $A $");
        assert_eq!(filled("${NONE}"), "environment variable NONE is not set");
        assert_eq!(filled("${A"), "`${` without `}`");
        assert!(filled("${}").starts_with("what stands in"));
        assert!(filled("${a b}").starts_with("what stands in"));
    }

    #[test]
    fn a_password_is_encoded_in_the_login_of_a_url_and_nowhere_else() {
        assert_eq!(filled("postgres://u:${PW}@h/${A}"), "postgres://u:p%40ss%2Fw%23rd%25@h/alpha");
        assert_eq!(filled("postgres://u:${ENC}@h/d"), "postgres://u:a%23b@h/d");
        assert_eq!(filled("https://h/p?t=${PW}@"), "https://h/p?t=p@ss/w#rd%@");
        assert_eq!(filled("${PW}"), "p@ss/w#rd%");
    }

    #[test]
    fn a_file_loses_its_last_line_break_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        fs::write(&path, "two\nlines\r\n").unwrap();
        assert_eq!(filled(&format!("${{file:{}}}", path.display())), "two\nlines");
        fs::write(&path, vec![b'x'; 70_000]).unwrap();
        assert!(filled(&format!("${{file:{}}}", path.display())).ends_with("longer than 64 KiB"));
        assert!(filled("${file:/does/not/exist}").starts_with("cannot read /does/not/exist: "));
    }
}
