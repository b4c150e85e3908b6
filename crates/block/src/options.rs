//! How a disk is to be opened.

use std::fmt;
use std::path::PathBuf;

/// Where the contents are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file or block device of the host.
    Path(PathBuf),
    /// Memory of the host, this many bytes, gone when the machine ends.
    Ram(u64),
    /// A disk that an NBD server exports: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
    Nbd(String),
}

/// What the bytes of an image mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Nothing: they are the disk.
    Raw,
    /// QEMU's.
    Qcow2,
    /// VMware's: a descriptor with flat extents, or a sparse extent.
    Vmdk,
    /// Hyper-V's.
    Vhdx,
    /// An encrypted disk. Never found by its first bytes: a guest's own encrypted disk looks the same.
    Luks,
}

/// A passphrase. It is not told to anybody who prints it, and overwritten when it is dropped.
#[derive(Clone)]
pub struct Secret(zeroize::Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes the bytes of a passphrase.
    pub fn new(bytes: Vec<u8>) -> Self {
        Secret(bytes.into())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Format {
    /// What it is called on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
            Format::Luks => "luks",
        }
    }

    /// The format of this name.
    pub fn from_name(name: &str) -> Option<Format> {
        [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhdx, Format::Luks]
            .into_iter()
            .find(|format| format.name() == name)
    }
}

/// Logical and physical sector size in bytes, each a power of two from 512 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SectorSize {
    pub logical: u32,
    pub physical: u32,
}

/// What of the host's caches is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// The host's page cache; stable after a flush.
    #[default]
    Writeback,
    /// Past the host's page cache (O_DIRECT); stable after a flush.
    None,
    /// The host's page cache for reads; each write is stable when done.
    Writethrough,
    /// Past the page cache, and each write is stable when done.
    DirectSync,
}

impl CacheMode {
    /// Whether the page cache is passed by.
    pub fn direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::DirectSync)
    }

    /// Whether each write is stable when done, so that the guest need not flush.
    pub fn writethrough(self) -> bool {
        matches!(self, CacheMode::Writethrough | CacheMode::DirectSync)
    }
}

/// What happens when the host fails a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// The machine stops; when it goes on, the request is tried again.
    #[default]
    Stop,
    /// The guest is told.
    Report,
    /// The guest is told that all went well.
    Ignore,
}

/// How a disk is to be opened.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Its contents.
    pub source: Source,
    /// What the threads are called and errors are told of: `disk` and this, at most ten characters.
    pub name: String,
    /// Of an image at a path; looked for in its first bytes if not given ([`crate::open`]).
    pub format: Option<Format>,
    /// Opens an encrypted image.
    pub secret: Option<Secret>,
    /// May not be written.
    pub read_only: bool,
    /// The host's caches.
    pub cache: CacheMode,
    /// Discards give space back; otherwise they do nothing (`nodelete`).
    pub discard: bool,
    /// Sector sizes shown to the guest; what the image suggests if not given.
    pub sectors: Option<SectorSize>,
    /// For failed reads.
    pub read_errors: ErrorPolicy,
    /// For failed writes.
    pub write_errors: ErrorPolicy,
}

impl DiskOptions {
    /// The defaults of bhyve(8) for an image at a path.
    pub fn new(source: Source) -> Self {
        DiskOptions {
            source,
            name: "disk".into(),
            format: None,
            secret: None,
            read_only: false,
            cache: CacheMode::Writeback,
            discard: true,
            sectors: None,
            read_errors: ErrorPolicy::Stop,
            write_errors: ErrorPolicy::Stop,
        }
    }

    /// What error messages call it.
    pub(crate) fn path(&self) -> PathBuf {
        match &self.source {
            Source::Path(path) => path.clone(),
            Source::Ram(bytes) => PathBuf::from(format!("ram={bytes}")),
            Source::Nbd(url) => PathBuf::from(url),
        }
    }
}
