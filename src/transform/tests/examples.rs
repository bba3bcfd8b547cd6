//! The examples of the documentation.

use super::{example, shape, shown};

/// A page in which each block of JSON after one of TOML is what those rules make of the example.
fn proved(page: &str, seen: &mut usize) -> String {
    let mut proved = String::new();
    let (mut block, mut rules) = (None, None);
    for line in page.lines() {
        match (line.strip_prefix("```"), &mut block) {
            (Some(language), None) => {
                block = Some((language == "json" && rules.is_some(), String::new()));
                if language == "toml" {
                    rules = None;
                }
            }
            (Some(_), Some((told, text))) => {
                if *told {
                    *seen += 1;
                    let rules: String = rules.take().unwrap();
                    for change in shape(&rules, example(&rules)).unwrap() {
                        proved.push_str(&format!("{}\n", shown(&change)));
                    }
                } else {
                    rules = Some(std::mem::take(text));
                }
                block = None;
            }
            (None, Some((told, text))) => {
                text.push_str(&format!("{line}\n"));
                if *told {
                    continue;
                }
            }
            (None, None) => rules = rules.filter(|_| line.is_empty()),
        }
        proved.push_str(&format!("{line}\n"));
    }
    proved
}

#[test]
fn every_example_of_the_docs_does_what_the_docs_say() {
    let mut seen = 0;
    for name in ["docs/transforms.md", "docs/outbox.md"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let page = std::fs::read_to_string(&path).unwrap();
        let proved = proved(&page, &mut seen);
        if std::env::var_os("WALRACE_GENERATE").is_some() {
            std::fs::write(&path, &proved).unwrap();
        }
        for (number, (says, does)) in page.lines().zip(proved.lines()).enumerate() {
            assert_eq!(says, does, "{name}:{}", number + 1);
        }
        assert_eq!(page.len(), proved.len(), "{name}");
    }
    assert!(seen >= 12, "only {seen} examples");
}
