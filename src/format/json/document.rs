//! The text of `json` and `jsonb`.

/// `jsonb` text comes from PostgreSQL's own printer: one line, valid.
pub(super) fn write_jsonb(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let text = simdutf8::basic::from_utf8(text).ok()?.as_bytes();
    if text.is_empty() || text.iter().any(|&byte| byte < 0x20) {
        return None;
    }
    out.extend_from_slice(text);
    Some(())
}

/// `json` text is as its writer typed it: it may hold raw newlines between tokens.
pub(super) fn write_json(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let text = simdutf8::basic::from_utf8(text).ok()?;
    serde_json::from_str::<serde::de::IgnoredAny>(text).ok()?;
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        if byte == b'"' {
            let length = string_length(rest)?;
            let (string, after) = rest.split_at_checked(length)?;
            out.extend_from_slice(string);
            rest = after;
            continue;
        }
        if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
            out.push(byte);
        }
        rest = after;
    }
    Some(())
}

/// Bytes of the JSON string at the head of `text`, with its quotes. `None` for half a surrogate
/// pair: PostgreSQL's `json` lets it pass, but strict readers refuse the whole line.
fn string_length(text: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        match *text.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' if text.get(at + 1) == Some(&b'u') => {
                at += 6;
                match code_unit(text, at - 6)? {
                    0xD800..=0xDBFF => {
                        let low = code_unit(text, at)?;
                        (0xDC00..=0xDFFF).contains(&low).then_some(())?;
                        at += 6;
                    }
                    0xDC00..=0xDFFF => return None,
                    _ => {}
                }
            }
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// The code unit of an escape such as `\u00e9` at `at`.
fn code_unit(text: &[u8], at: usize) -> Option<u16> {
    let digits = text.get(at..at + 6)?.strip_prefix(b"\\u")?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}
