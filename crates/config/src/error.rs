//! What can be wrong with a tree and with the settings in it.

use crate::expand::ExpandError;
use crate::value::ValueError;

/// A variable that cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The path is not a dotted list of names.
    #[error("'{path}' is not a variable name: {reason}")]
    BadPath {
        /// The path as given.
        path: String,
        /// What about it is wrong.
        reason: &'static str,
    },
    /// Variables always have a value; one without is not set at all.
    #[error("{path} is given no value")]
    EmptyValue {
        /// The variable.
        path: String,
    },
    /// A value would not survive a configuration file, which is read line by line.
    #[error("the value of {path} contains a line break or a NUL byte")]
    NotOneLine {
        /// The variable.
        path: String,
    },
    /// Inner nodes have no value of their own.
    #[error("{path} has variables below it and cannot have a value itself")]
    IsNode {
        /// The inner node.
        path: String,
    },
    /// Something above the variable has a value already.
    #[error("{path} cannot be set because {leaf} has a value")]
    IsLeaf {
        /// The variable that was to be set.
        path: String,
        /// The leaf that stands in its way.
        leaf: String,
    },
}

/// A variable whose value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// The value is not of the variable's type or outside its range.
    #[error("{variable}: {problem}")]
    Invalid {
        /// Full path of the variable.
        variable: String,
        /// What is wrong with the value.
        problem: ValueError,
    },
    /// A variable that has no default was not set.
    #[error("the variable {variable} is not set")]
    Missing {
        /// Full path of the variable.
        variable: String,
    },
    /// A `%(var)` in the value leads nowhere.
    #[error(transparent)]
    Expand(#[from] ExpandError),
    /// Sockets, cores and threads do not make the number of processors.
    #[error(
        "the CPU topology does not add up: sockets={sockets} x cores={cores} x threads={threads} is {product}, not \
         cpus={cpus} (option -c N,sockets=N,cores=N,threads=N; each that is left out counts as 1)"
    )]
    #[allow(missing_docs)]
    Topology { cpus: u64, sockets: u64, cores: u64, threads: u64, product: u64 },
    /// More processors than the architecture's numbering has room for.
    #[error("{count} CPUs are more than the {max} that a virtual machine can have (option -c)")]
    TooManyCpus {
        /// What was asked for.
        count: u64,
        /// The most that is possible.
        max: u64,
    },
    /// `pci.B.S.F` with a part that is no number, or outside its range.
    #[error(
        "{variable}: {problem}; PCI devices are pci.BUS.SLOT.FUNCTION with bus 0-255, slot 0-31, function 0-7"
    )]
    PciAddress {
        /// The node.
        variable: String,
        /// What is wrong.
        problem: String,
    },
    /// A device model that does not exist.
    #[error("{variable}: unknown device '{device}'{suggestion}; known devices: {known}", suggestion = suggest(.suggestion))]
    UnknownDevice {
        /// The variable that names it.
        variable: String,
        /// The name.
        device: String,
        /// A known name that is spelt nearly so.
        suggestion: Option<&'static str>,
        /// All names.
        known: String,
    },
    /// The LPC bridge owns the fixed ISA ports: one of it, on bus 0.
    #[error("{variable}: {problem}")]
    Lpc {
        /// The node.
        variable: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A terminal or connection can serve one serial port only.
    #[error("{second}: {backend} is already used by {first}; give one of them another backend")]
    BackendTwice {
        /// The backend.
        backend: String,
        /// The variable that came first.
        first: String,
        /// The variable that wants it too.
        second: String,
    },
    /// A variable that means nothing without another.
    #[error("{variable} is set, but {needs} is not: {reason}")]
    Needs {
        /// The variable that is set.
        variable: &'static str,
        /// The variable that is not.
        needs: &'static str,
        /// Why.
        reason: &'static str,
    },
}

/// " (did you mean 'x'?)" or nothing, for use inside messages.
pub(crate) fn suggest(name: &Option<&'static str>) -> String {
    name.map(|name| format!(" (did you mean '{name}'?)")).unwrap_or_default()
}

/// The candidate that is spelt most nearly like `word`, if any is near at all.
pub(crate) fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    const LONGEST_WORD: usize = 40;
    if word.len() > LONGEST_WORD {
        return None;
    }
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 5)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance: insertions, deletions and replacements of one character.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_names() {
        let names = ["virtio-blk", "virtio-net", "nvme", "lpc"];
        assert_eq!(nearest("virtio-block", names), Some("virtio-blk"));
        assert_eq!(nearest("virtio_net", names), Some("virtio-net"));
        assert_eq!(nearest("lcp", ["lpc"]), None);
        assert_eq!(nearest("lp", names), Some("lpc"));
        assert_eq!(nearest("nosuch", names), None);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }
}
