//! Configuration files (`-k`; bhyve(8)): one `variable=value` per line, blank lines and lines that start with `#`
//! ignored. [`Tree::dump`] writes this form.

use crate::error::TreeError;
use crate::tree::Tree;

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file could not be read.
    #[error("cannot read the configuration file {file}: {source}")]
    Read {
        /// Its path.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A line is not an assignment.
    #[error("{file}:{line}: {problem}")]
    Line {
        /// The file's path.
        file: String,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: AssignmentError,
    },
}

/// Text that is no `variable=value`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignmentError {
    /// There is no equals sign.
    #[error("'{text}' is not of the form variable=value")]
    NoEquals {
        /// The text.
        text: String,
    },
    /// The variable cannot be set.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Sets one `variable=value`.
pub fn assign(tree: &mut Tree, text: &str) -> Result<(), AssignmentError> {
    let (path, value) =
        text.split_once('=').ok_or_else(|| AssignmentError::NoEquals { text: text.to_owned() })?;
    Ok(tree.set(path, value)?)
}

/// Sets every variable of a configuration file's `text`; `file` is its name in errors.
pub fn load(tree: &mut Tree, file: &str, text: &str) -> Result<(), FileError> {
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        assign(tree, line).map_err(|problem| FileError::Line {
            file: file.to_owned(),
            line: index + 1,
            problem,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines() {
        let mut tree = Tree::new();
        load(&mut tree, "f", "# web server\nname=web\n\n  \ncpus=2\r\nsystem.sku=a b = c \nname=web2")
            .unwrap();
        assert_eq!(tree.dump(), "cpus=2\nname=web2\nsystem.sku=a b = c \n");
    }

    #[test]
    fn errors_name_file_and_line() {
        let text = |text: &str| load(&mut Tree::new(), "/etc/g.conf", text).unwrap_err().to_string();
        assert_eq!(text("a=1\n\nb\n"), "/etc/g.conf:3: 'b' is not of the form variable=value");
        assert_eq!(
            text("cpus = 2"),
            "/etc/g.conf:1: 'cpus ' is not a variable name: a name has no spaces or control characters"
        );
        assert_eq!(text("#\ncpus="), "/etc/g.conf:2: cpus is given no value");
        assert_eq!(text("a=1\na.b=2"), "/etc/g.conf:2: a.b cannot be set because a has a value");
    }

    proptest! {
        #[test]
        fn a_dump_reads_back(lines in prop::collection::vec(("[a-z0-9_*-]{1,3}(\\.[a-z0-9]{1,2}){0,3}", "\\PC{1,12}"), 0..40)) {
            let mut tree = Tree::new();
            for (path, value) in &lines {
                let _ = tree.set(path, value.as_str());
            }
            let mut again = Tree::new();
            load(&mut again, "dump", &tree.dump()).unwrap();
            prop_assert_eq!(again, tree);
        }
    }
}
