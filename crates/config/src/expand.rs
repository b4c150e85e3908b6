//! References between variables (bhyve_config(5), "VARIABLE VALUES").
//!
//! `%(var)` stands for the value of `var`, in which references are resolved in turn. `%%` stands for a percent sign;
//! so does `\%`, which bhyve's own parser takes. A percent sign before anything else stands for itself, because
//! values such as `rfb=[fe80::1%em0]:5900` need no escaping in bhyve either.

use crate::tree::Tree;

/// The most bytes that a value may grow to; a few variables that each mention the next one twice would otherwise
/// fill the memory.
const MAX_EXPANDED_LEN: usize = 1 << 20;

/// The longest chain of variables that refer to one another.
const MAX_CHAIN: usize = 64;

/// A reference that cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    /// `%(var)` names a variable that has no value.
    #[error("{variable}: the variable '{reference}' that it refers to is not set")]
    Missing {
        /// The variable whose value contains the reference.
        variable: String,
        /// The variable that it names.
        reference: String,
    },
    /// The value leads back to itself.
    #[error("{variable}: the value refers to itself: {}", .chain.join(" -> "))]
    Loop {
        /// The variable that was read.
        variable: String,
        /// The way round, from the first variable to its second occurrence.
        chain: Vec<String>,
    },
    /// `%(` without `)`, or nothing between them.
    #[error("{variable}: '{value}' has an incomplete reference; write %(variable), or %% for a percent sign")]
    Incomplete {
        /// The variable whose value it is.
        variable: String,
        /// The value.
        value: String,
    },
    /// Variables refer to variables, too many in a row.
    #[error("{variable}: more than {MAX_CHAIN} variables refer to one another in a row")]
    TooDeep {
        /// The variable that was read.
        variable: String,
    },
    /// The resolved value is beyond all use.
    #[error("{variable}: the value grows beyond {MAX_EXPANDED_LEN} bytes when its references are resolved")]
    TooLong {
        /// The variable that was read.
        variable: String,
    },
}

/// The value of the leaf `path` with all references resolved.
pub(crate) fn expand(tree: &Tree, path: &str) -> Result<String, ExpandError> {
    let mut out = String::new();
    let mut chain = vec![path.to_owned()];
    append(tree, &mut chain, &mut out)?;
    Ok(out)
}

/// Appends the value of the last variable of `chain`, which has a value.
fn append(tree: &Tree, chain: &mut Vec<String>, out: &mut String) -> Result<(), ExpandError> {
    let variable = chain.last().cloned().unwrap_or_default();
    let value = tree.raw(&variable).unwrap_or_default();
    let mut rest = value;
    while let Some(at) = rest.find(['%', '\\']) {
        push(out, &rest[..at], &chain[0])?;
        let (special, tail) = rest[at..].split_at(1);
        if let Some(after) = tail.strip_prefix('%') {
            push(out, "%", &chain[0])?;
            rest = after;
        } else if special == "%" && tail.starts_with('(') {
            let (reference, after) = match tail[1..].split_once(')') {
                Some((reference, after)) if !reference.is_empty() => (reference, after),
                _ => return Err(ExpandError::Incomplete { variable, value: value.to_owned() }),
            };
            if tree.raw(reference).is_none() {
                return Err(ExpandError::Missing { variable, reference: reference.to_owned() });
            }
            let looping = chain.iter().any(|seen| seen == reference);
            chain.push(reference.to_owned());
            if looping {
                return Err(ExpandError::Loop { variable: chain[0].clone(), chain: chain.clone() });
            }
            if chain.len() > MAX_CHAIN {
                return Err(ExpandError::TooDeep { variable: chain[0].clone() });
            }
            append(tree, chain, out)?;
            chain.pop();
            rest = after;
        } else {
            push(out, special, &chain[0])?;
            rest = tail;
        }
    }
    push(out, rest, &chain[0])
}

fn push(out: &mut String, text: &str, variable: &str) -> Result<(), ExpandError> {
    if out.len() + text.len() > MAX_EXPANDED_LEN {
        return Err(ExpandError::TooLong { variable: variable.to_owned() });
    }
    out.push_str(text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[(&str, &str)], path: &str) -> Result<String, ExpandError> {
        let mut tree = Tree::new();
        for (path, value) in lines {
            tree.set(path, *value).unwrap();
        }
        tree.get(path).map(Option::unwrap)
    }

    #[test]
    fn values() {
        let with = |value: &str| {
            read(&[("v", value), ("name", "g1"), ("pool", "tank/%(name)"), ("pct", "%%(x)")], "v")
        };
        for (value, expected) in [
            ("plain", "plain"),
            ("/dev/zvol/%(name)", "/dev/zvol/g1"),
            ("%(pool)/%(name)-%(pool)", "tank/g1/g1-tank/g1"),
            ("100%%", "100%"),
            ("%%(name)", "%(name)"),
            ("%%%(name)", "%g1"),
            ("%%%%", "%%"),
            (r"\%(name)", "%(name)"),
            (r"C:\dir\%(name)", r"C:\dir%(name)"),
            (r"a\b\", r"a\b\"),
            ("%(pct)", "%(x)"),
            ("[fe80::1%em0]:5900", "[fe80::1%em0]:5900"),
            ("50%", "50%"),
            ("è%(name)日", "èg1日"),
        ] {
            assert_eq!(with(value).as_deref(), Ok(expected), "{value}");
        }
    }

    #[test]
    fn errors_say_where() {
        let text = |lines: &[(&str, &str)]| read(lines, "a").unwrap_err().to_string();
        assert_eq!(text(&[("a", "x%(b.c)")]), "a: the variable 'b.c' that it refers to is not set");
        assert_eq!(text(&[("a", "%(b)"), ("b", "%(c)")]), "b: the variable 'c' that it refers to is not set");
        assert_eq!(text(&[("a", "%(b)"), ("b.c", "1")]), "a: the variable 'b' that it refers to is not set");
        assert_eq!(text(&[("a", "%(a)")]), "a: the value refers to itself: a -> a");
        assert_eq!(
            text(&[("a", "%(b)"), ("b", "-%(c)"), ("c", "%(b)")]),
            "a: the value refers to itself: a -> b -> c -> b"
        );
        for value in ["%(", "%()", "x%(b", "%(b"] {
            assert!(text(&[("a", value), ("b", "1")]).contains("incomplete reference"), "{value}");
        }
    }

    #[test]
    fn growth_is_bounded() {
        let mut tree = Tree::new();
        for i in 0..40 {
            tree.set(&format!("v{i}"), format!("%(v{n})%(v{n})", n = i + 1)).unwrap();
        }
        tree.set("v40", "x").unwrap();
        assert_eq!(tree.get("v0"), Err(ExpandError::TooLong { variable: "v0".into() }));
        assert_eq!(tree.get("v30").unwrap().unwrap().len(), 1024);
    }

    #[test]
    fn a_long_chain_is_no_stack_overflow() {
        let mut tree = Tree::new();
        for i in 0..20_000 {
            tree.set(&format!("v{i}"), format!("%(v{})", i + 1)).unwrap();
        }
        tree.set("v20000", "end").unwrap();
        assert!(matches!(tree.get("v0"), Err(ExpandError::TooDeep { .. })));
    }
}
