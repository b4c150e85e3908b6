//! What can go wrong while a guest is loaded, in words that say what to do.

use std::io;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be opened.
    #[error("cannot open {name}: {source}; check the path and its permissions")]
    Open {
        /// The path.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{name} is not a file that can be loaded (a regular file or a block device is needed)")]
    NotAFile {
        /// The path.
        name: String,
    },
    /// Reading failed.
    #[error("cannot read {name}: {source}")]
    Read {
        /// The path.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The file ends too early.
    #[error("{name} is truncated: it has {have} bytes and needs {need}; copy or download it again")]
    Truncated {
        /// The path.
        name: String,
        /// Its length in bytes.
        have: u64,
        /// The length that its contents call for.
        need: u64,
    },
    /// The file is not a kernel that can be loaded.
    #[error(
        "{name} is {found}; a kernel must be a Linux bzImage or an ELF image with a PVH entry point{hint}"
    )]
    UnknownFormat {
        /// The path.
        name: String,
        /// What it seems to be.
        found: &'static str,
        /// What the user may want instead; empty or starting with punctuation.
        hint: &'static str,
    },
    /// The file has the right signature and impossible contents.
    #[error("{name} is damaged or not meant for this machine: {what}")]
    Corrupt {
        /// The path.
        name: String,
        /// Which field, and what is wrong with it.
        what: String,
    },
    /// The kernel does not fit in guest memory.
    #[error(
        "{name} needs memory up to {need_mib} MiB below the 3 GiB boundary and the virtual machine has {have_mib} MiB there; \
         give it more (-m)"
    )]
    KernelTooLarge {
        /// The path.
        name: String,
        /// End of what the kernel needs, in MiB.
        need_mib: u64,
        /// End of low RAM, in MiB.
        have_mib: u64,
    },
    /// The initial RAM disk does not fit.
    #[error(
        "initial RAM disk {name} ({len} bytes) does not fit between the kernel's end at {floor:#x} and {ceiling:#x}; \
         give the virtual machine more memory (-m) or use a smaller one"
    )]
    InitrdTooLarge {
        /// The path.
        name: String,
        /// Its length in bytes.
        len: u64,
        /// First address that is free.
        floor: u64,
        /// First address that is not free any more.
        ceiling: u64,
    },
    /// The initial RAM disk has no contents.
    #[error("initial RAM disk {name} is empty")]
    EmptyInitrd {
        /// The path.
        name: String,
    },
    /// The command line is longer than the kernel reads.
    #[error("the kernel command line has {len} bytes; {name} takes at most {max}")]
    CommandLineTooLong {
        /// The path of the kernel.
        name: String,
        /// Length in bytes.
        len: usize,
        /// The limit in bytes, without the terminating NUL.
        max: usize,
    },
    /// The command line cannot be passed as a C string.
    #[error("the kernel command line contains a NUL byte at position {0}")]
    CommandLineNul(usize),
    /// An address that should be RAM is not.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}
