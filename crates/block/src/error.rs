//! What can go wrong when a disk is opened and when it is used.

use std::io;
use std::path::PathBuf;

/// Why a request failed, as far as a controller has to tell the guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// Beyond the end of the disk, or not whole sectors.
    #[error("the range is not on the disk")]
    OutOfRange,
    /// The disk cannot be written.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The buffers are not guest memory, or not as long as the request.
    #[error("the buffers of the request are not valid")]
    Buffers,
    /// The image cannot do that.
    #[error("the image does not support this operation")]
    Unsupported,
    /// The host has no space left (ENOSPC, EDQUOT).
    #[error("no space left on the host")]
    NoSpace,
    /// The controller has given it up.
    #[error("the request was given up")]
    Aborted,
    /// The host failed otherwise.
    #[error("{0}")]
    Host(String),
}

impl From<io::Error> for IoError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => IoError::NoSpace,
            io::ErrorKind::Unsupported => IoError::Unsupported,
            io::ErrorKind::ReadOnlyFilesystem => IoError::ReadOnly,
            _ => IoError::Host(error.to_string()),
        }
    }
}

/// Why a disk could not be opened. Each is one line that names the image and the way out.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refuses to open it.
    #[error("disk image {path}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// There is no such file.
    #[error("disk image {path} does not exist; make one, for example with truncate -s 10G {path}")]
    Missing {
        /// Which.
        path: PathBuf,
    },
    /// The host does not let us read it.
    #[error(
        "disk image {path} cannot be read: {source}; give this user the right to, or run as one that has it"
    )]
    NotReadable {
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The page cache cannot be passed by.
    #[error(
        "disk image {path} is on a file system that cannot pass by the host's cache (O_DIRECT); leave out nocache and direct"
    )]
    NoDirect {
        /// Which.
        path: PathBuf,
    },
    /// Something that an image refers to could not be opened.
    #[error("disk image {path} needs another: {source}")]
    Reference {
        /// Which.
        path: PathBuf,
        /// What went wrong with the other.
        source: Box<OpenError>,
    },
    /// Neither a file nor a block device.
    #[error("disk image {path} is {what}, not a file or a block device; give the path of one")]
    Kind {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Nothing in it.
    #[error("disk image {path} is empty; give it a size, for example with truncate -s 10G {path}")]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// The host does not let us write it.
    #[error(
        "disk image {path} cannot be written: {source}; make it writable, or attach it with the option ro"
    )]
    NotWritable {
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A part of a sector at the end.
    #[error(
        "disk image {path} has {size} bytes, which is not a multiple of the sector size {sector}; round it up with truncate -s %{sector} {path}"
    )]
    PartSector {
        /// Which.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// Logical sector size.
        sector: u32,
    },
    /// Somebody else uses it.
    #[error(
        "disk image {path} is in use{by}; two writers would destroy it: end the other, or attach it with the option ro to both"
    )]
    Locked {
        /// Which.
        path: PathBuf,
        /// " (pid N)" where that is known.
        by: String,
    },
    /// The contents are not what the format says.
    #[error("disk image {path} is not a valid {format} image: {reason}")]
    Format {
        /// Which.
        path: PathBuf,
        /// Which format.
        format: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Something about the image that this build cannot do.
    #[error("disk image {path}: {reason}")]
    Unsupported {
        /// Which.
        path: PathBuf,
        /// What is not supported and what to do.
        reason: String,
    },
    /// An I/O thread could not be started.
    #[error("starting an I/O thread for disk image {path}: {source}")]
    Thread {
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}
