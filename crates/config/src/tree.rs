//! The configuration tree (bhyve_config(5), "DESCRIPTION" and "VARIABLE VALUES").
//!
//! A variable has a dotted path (`pci.0.3.0.path`) and a string value. Only leaves have values; a path is either a
//! leaf or an inner node, never both. The tree keeps what it was given, references (`%(name)`) included; they are
//! resolved when a value is read, so that the order in which variables are set does not matter.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Bound, RangeInclusive};
use std::str::FromStr;

use crate::error::{SettingError, TreeError};
use crate::expand::{ExpandError, expand};
use crate::value::{ValueError, parse_bool, parse_integer, parse_size};

/// The most segments a path may have; bhyve's own deepest variable has seven.
const MAX_DEPTH: usize = 32;

/// One name of a path. Names that are numbers sort by their value, before all others, so that slot 2 stands before
/// slot 10 wherever the tree is listed.
#[derive(Clone, PartialEq, Eq)]
struct Segment(String);

impl Segment {
    /// The digits without leading zeros, if the name is a number.
    fn digits(&self) -> Option<&str> {
        let numeric = !self.0.is_empty() && self.0.bytes().all(|b| b.is_ascii_digit());
        numeric.then(|| self.0.trim_start_matches('0'))
    }
}

impl Ord for Segment {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self.digits(), other.digits()) {
            (Some(a), Some(b)) => {
                a.len().cmp(&b.len()).then_with(|| a.cmp(b)).then_with(|| self.0.cmp(&other.0))
            }
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => self.0.cmp(&other.0),
        }
    }
}

impl PartialOrd for Segment {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

type Path = Vec<Segment>;

/// Splits a path, checking that it can be written in a file, dumped and referred to.
fn split(path: &str) -> Result<Path, TreeError> {
    let bad = |reason| TreeError::BadPath { path: path.to_owned(), reason };
    if path.is_empty() {
        return Err(bad("it is empty"));
    }
    if path.starts_with('#') {
        return Err(bad("a name does not start with '#', which starts a comment"));
    }
    let segments: Path = path.split('.').map(|s| Segment(s.to_owned())).collect();
    if segments.len() > MAX_DEPTH {
        return Err(bad("it has too many parts"));
    }
    for segment in &segments {
        if segment.0.is_empty() {
            return Err(bad("a part between dots is empty"));
        }
        if segment.0.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(bad("a name has no spaces or control characters"));
        }
        if segment.0.contains(['=', '(', ')', '%']) {
            return Err(bad("a name has none of the characters = ( ) %"));
        }
    }
    Ok(segments)
}

fn join(path: &[Segment]) -> String {
    let names: Vec<&str> = path.iter().map(|s| s.0.as_str()).collect();
    names.join(".")
}

/// All variables of one virtual machine.
///
/// ```
/// let mut tree = config::Tree::new();
/// tree.set("name", "web").unwrap();
/// tree.set("pci.0.3.0.path", "/vm/%(name).img").unwrap();
/// assert_eq!(tree.get("pci.0.3.0.path").unwrap().as_deref(), Some("/vm/web.img"));
/// assert_eq!(tree.dump(), "name=web\npci.0.3.0.path=/vm/%(name).img\n");
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Tree {
    leaves: BTreeMap<Path, String>,
}

impl Tree {
    /// A tree without variables.
    pub fn new() -> Self {
        Self::default()
    }

    /// The variables that bhyve sets before it reads its command line.
    pub fn with_defaults() -> Self {
        let mut tree = Self::new();
        for (path, value) in DEFAULTS {
            tree.set(path, *value).expect("the default variables are well-formed");
        }
        tree
    }

    /// Sets a variable, replacing its earlier value.
    pub fn set(&mut self, path: &str, value: impl Into<String>) -> Result<(), TreeError> {
        let segments = split(path)?;
        let value = value.into();
        if value.is_empty() {
            return Err(TreeError::EmptyValue { path: path.to_owned() });
        }
        if value.contains(['\n', '\r', '\0']) {
            return Err(TreeError::NotOneLine { path: path.to_owned() });
        }
        if self.is_node_at(&segments) {
            return Err(TreeError::IsNode { path: path.to_owned() });
        }
        for length in 1..segments.len() {
            if self.leaves.contains_key(&segments[..length]) {
                return Err(TreeError::IsLeaf { path: path.to_owned(), leaf: join(&segments[..length]) });
            }
        }
        self.leaves.insert(segments, value);
        Ok(())
    }

    /// Sets a variable to `true` or `false`.
    pub fn set_bool(&mut self, path: &str, value: bool) -> Result<(), TreeError> {
        self.set(path, if value { "true" } else { "false" })
    }

    /// Sets a variable unless it has a value already.
    pub fn set_if_unset(&mut self, path: &str, value: impl Into<String>) -> Result<(), TreeError> {
        if self.raw(path).is_some() { Ok(()) } else { self.set(path, value) }
    }

    /// Removes a variable, or a node with everything below it. Returns how many variables went.
    pub fn remove(&mut self, path: &str) -> usize {
        let Ok(segments) = split(path) else { return 0 };
        let before = self.leaves.len();
        self.leaves.retain(|leaf, _| !leaf.starts_with(&segments));
        before - self.leaves.len()
    }

    /// The value as it was set, references unresolved. `None` for unset variables and for nodes.
    pub fn raw(&self, path: &str) -> Option<&str> {
        self.leaves.get(&split(path).ok()?).map(String::as_str)
    }

    /// The value with every `%(var)` replaced by that variable's value.
    pub fn get(&self, path: &str) -> Result<Option<String>, ExpandError> {
        match self.raw(path) {
            Some(_) => expand(self, path).map(Some),
            None => Ok(None),
        }
    }

    /// Whether `path` is an inner node, that is, whether variables are below it.
    pub fn is_node(&self, path: &str) -> bool {
        split(path).is_ok_and(|segments| self.is_node_at(&segments))
    }

    /// The names directly below `path` (the empty path is the root), numbers first and in their order.
    pub fn children(&self, path: &str) -> Vec<String> {
        let prefix = match path {
            "" => Path::new(),
            _ => match split(path) {
                Ok(segments) => segments,
                Err(_) => return Vec::new(),
            },
        };
        let mut names: Vec<String> = Vec::new();
        for leaf in self.below(&prefix) {
            let name = &leaf[prefix.len()].0;
            if names.last() != Some(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// A view of the variables below `path`, with typed access. The node may be empty.
    pub fn node(&self, path: &str) -> Node<'_> {
        Node { tree: self, path: path.to_owned() }
    }

    /// A view of the whole tree, with typed access.
    pub fn root(&self) -> Node<'_> {
        self.node("")
    }

    /// All variables with their unresolved values, in the order of [`Tree::dump`].
    pub fn iter(&self) -> impl Iterator<Item = (String, &str)> {
        self.leaves.iter().map(|(path, value)| (join(path), value.as_str()))
    }

    /// What `-o config.dump=1` prints: one `path=value` per line, ordered by path, references unresolved.
    /// [`crate::file::load`] reads it back to the same tree.
    pub fn dump(&self) -> String {
        self.iter().map(|(path, value)| format!("{path}={value}\n")).collect()
    }

    fn below<'a>(&'a self, prefix: &'a [Segment]) -> impl Iterator<Item = &'a Path> {
        self.leaves
            .range::<[Segment], _>((Bound::Excluded(prefix), Bound::Unbounded))
            .map(|(leaf, _)| leaf)
            .take_while(move |leaf| leaf.starts_with(prefix))
    }

    fn is_node_at(&self, path: &[Segment]) -> bool {
        self.below(path).next().is_some()
    }
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Set before the command line is read, on x86 (bhyve_config(5), "GLOBAL SETTINGS").
const DEFAULTS: &[(&str, &str)] = &[
    ("acpi_tables", "false"),
    ("acpi_tables_in_memory", "true"),
    ("lpc.fwcfg", "bhyve"),
    ("memory.size", "256M"),
    ("x86.strictmsr", "true"),
];

/// The variables below one path, as a device sees its own configuration: names are relative, errors name the full
/// variable.
#[derive(Clone, Debug)]
pub struct Node<'a> {
    tree: &'a Tree,
    path: String,
}

impl<'a> Node<'a> {
    /// The node's own path; empty for the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The full path of a variable below this node.
    pub fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The node below this one.
    pub fn node(&self, name: &str) -> Node<'a> {
        Node { tree: self.tree, path: self.path_of(name) }
    }

    /// The names directly below, numbers first and in their order.
    pub fn children(&self) -> Vec<String> {
        self.tree.children(&self.path)
    }

    /// Whether anything is set below this node.
    pub fn is_empty(&self) -> bool {
        self.children().is_empty()
    }

    /// A value, references resolved.
    pub fn string(&self, name: &str) -> Result<Option<String>, SettingError> {
        Ok(self.tree.get(&self.path_of(name))?)
    }

    /// A value, references resolved, or `default` where it is unset.
    pub fn string_or(&self, name: &str, default: &str) -> Result<String, SettingError> {
        Ok(self.string(name)?.unwrap_or_else(|| default.to_owned()))
    }

    /// A value that must be there.
    pub fn required(&self, name: &str) -> Result<String, SettingError> {
        self.string(name)?.ok_or_else(|| SettingError::Missing { variable: self.path_of(name) })
    }

    /// A boolean, or `default` where it is unset.
    pub fn boolean(&self, name: &str, default: bool) -> Result<bool, SettingError> {
        Ok(self.convert(name, parse_bool)?.unwrap_or(default))
    }

    /// An integer within `range`.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, SettingError> {
        self.convert(name, |text| {
            let value = parse_integer(text)?;
            if range.contains(&value) {
                Ok(value)
            } else {
                Err(ValueError::OutOfRange { value: text.to_owned(), min: *range.start(), max: *range.end() })
            }
        })
    }

    /// A number of bytes, with an optional suffix as in expand_number(3).
    pub fn size(&self, name: &str) -> Result<Option<u64>, SettingError> {
        self.convert(name, parse_size)
    }

    /// A value of any type that reads itself from text.
    pub fn parsed<T: FromStr<Err = ValueError>>(&self, name: &str) -> Result<Option<T>, SettingError> {
        self.convert(name, str::parse)
    }

    /// A value through a conversion; its error is told with the variable's name.
    pub fn convert<T>(
        &self,
        name: &str,
        convert: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<Option<T>, SettingError> {
        match self.string(name)? {
            None => Ok(None),
            Some(text) => convert(&text)
                .map(Some)
                .map_err(|problem| SettingError::Invalid { variable: self.path_of(name), problem }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(lines: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::new();
        for (path, value) in lines {
            tree.set(path, *value).unwrap();
        }
        tree
    }

    #[test]
    fn numbers_order_by_value() {
        let tree = tree(&[
            ("pci.0.10.0.device", "lpc"),
            ("pci.0.2.0.device", "nvme"),
            ("pci.0.2.0.port.x", "1"),
            ("name", "g"),
            ("pci.0.2.1.device", "hda"),
        ]);
        assert_eq!(
            tree.dump(),
            "name=g\npci.0.2.0.device=nvme\npci.0.2.0.port.x=1\npci.0.2.1.device=hda\npci.0.10.0.device=lpc\n"
        );
        assert_eq!(tree.children("pci.0"), ["2", "10"]);
        assert_eq!(tree.children(""), ["name", "pci"]);
        assert_eq!(tree.children("pci.0.2.0"), ["device", "port"]);
        assert_eq!(tree.children("pci.0.1"), Vec::<String>::new());
        assert_eq!(tree.children("name"), Vec::<String>::new());
    }

    #[test]
    fn names_that_share_a_prefix_are_apart() {
        let tree = tree(&[("a.b", "1"), ("a-x", "2"), ("ab.c", "3"), ("01", "4"), ("1", "5")]);
        assert_eq!(tree.children("a"), ["b"]);
        assert_eq!(tree.children(""), ["01", "1", "a", "a-x", "ab"]);
        assert!(tree.is_node("a") && !tree.is_node("a.b") && !tree.is_node("a-x"));
    }

    #[test]
    fn leaf_and_node_exclude_each_other() {
        let mut tree = tree(&[("lpc.com1.path", "stdio"), ("cpus", "2")]);
        assert_eq!(tree.set("lpc.com1", "x"), Err(TreeError::IsNode { path: "lpc.com1".into() }));
        assert_eq!(
            tree.set("cpus.a.b", "x"),
            Err(TreeError::IsLeaf { path: "cpus.a.b".into(), leaf: "cpus".into() })
        );
        tree.set("cpus", "4").unwrap();
        assert_eq!(tree.raw("cpus"), Some("4"));
        assert_eq!(tree.raw("lpc.com1"), None);
    }

    #[test]
    fn remove_takes_a_leaf_or_a_subtree() {
        let mut tree = tree(&[("a.b.c", "1"), ("a.b.d", "2"), ("a.bb", "3")]);
        assert_eq!(tree.remove("a.b"), 2);
        assert_eq!(tree.remove("a.b"), 0);
        assert_eq!(tree.dump(), "a.bb=3\n");
        assert_eq!(tree.remove("a.bb"), 1);
        assert_eq!(tree, Tree::new());
    }

    #[test]
    fn paths_and_values_that_could_not_be_dumped_are_refused() {
        let deep = ["a"; MAX_DEPTH + 1].join(".");
        for path in ["", ".", "a.", ".a", "a..b", "a b", "#a", "a=b", "a.%(b)", "a\tb", &deep] {
            assert!(matches!(Tree::new().set(path, "x"), Err(TreeError::BadPath { .. })), "{path}");
        }
        assert_eq!(Tree::new().set("a", ""), Err(TreeError::EmptyValue { path: "a".into() }));
        assert_eq!(Tree::new().set("a", "x\ny"), Err(TreeError::NotOneLine { path: "a".into() }));
    }

    #[test]
    fn typed_access_names_the_variable() {
        let tree = tree(&[
            ("pci.0.29.0.w", "0x500"),
            ("pci.0.29.0.h", "1080p"),
            ("pci.0.29.0.wait", "ON"),
            ("pci.0.29.0.rfb", "%(ip):5900"),
        ]);
        let fbuf = tree.node("pci.0.29.0");
        assert_eq!(fbuf.integer("w", 640..=1920).unwrap(), Some(1280));
        assert_eq!(fbuf.integer("absent", 0..=1).unwrap(), None);
        assert_eq!(
            fbuf.integer("w", 1..=100).unwrap_err().to_string(),
            "pci.0.29.0.w: '0x500' is out of range: from 1 to 100"
        );
        assert!(fbuf.boolean("wait", false).unwrap());
        assert!(fbuf.boolean("absent", true).unwrap());
        assert!(fbuf.integer("h", 0..=9999).unwrap_err().to_string().starts_with("pci.0.29.0.h: '1080p'"));
        assert_eq!(
            fbuf.string("rfb").unwrap_err().to_string(),
            "pci.0.29.0.rfb: the variable 'ip' that it refers to is not set"
        );
        assert_eq!(
            fbuf.required("password").unwrap_err().to_string(),
            "the variable pci.0.29.0.password is not set"
        );
    }
}
