//! Opening a disk: from what was asked for to an [`Image`] that is checked and locked.
//!
//! - The path must be a file or a block device, readable, and writable unless the disk is read-only.
//! - The format is the one given. If none is given, it is looked for in the first bytes; what looks like nothing is raw, and is kept
//!   so (`image::probe`).
//! - A backing file whose format the image does not record is opened only if it is raw: that it looks like something else may be
//!   the doing of a guest that owned it as a raw disk.
//! - Every file is locked so that QEMU respects it too (`lock`): backing files against writing.
//! - What an image refers to by a relative path is next to it. A chain that comes back to itself, or is longer than
//!   `MAX_CHAIN`, is refused. An image that comes from somebody else can name any file of the host; look at it with
//!   `qemu-img info --backing-chain` before using it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memory::GuestMemory;

use crate::image::luks::LuksImage;
use crate::image::nbd::NbdImage;
use crate::image::probe::{Guarded, PROBED_BYTES, probe};
use crate::image::qcow2::Qcow2Image;
use crate::image::raw::{RawImage, is_in_memory};
use crate::image::vhdx::VhdxImage;
use crate::image::vmdk::VmdkImage;
use crate::lock::{LockError, Purpose, lock};
use crate::{CacheMode, Disk, DiskOptions, Format, Image, OpenError, Secret, Source, TroubleSink};

/// Images in a chain of backing files at most. Each read may have to go through all of them.
const MAX_CHAIN: usize = 64;

impl Disk {
    /// Opens a disk. `memory` is what the buffers of its requests are in; `trouble` is told of requests that wait for help.
    ///
    /// # Errors
    /// One line that says what was asked for, what is wrong and what to do.
    pub fn open(
        options: DiskOptions,
        memory: GuestMemory,
        trouble: Arc<dyn TroubleSink>,
    ) -> Result<Disk, OpenError> {
        let image = open_image(&options)?;
        Disk::new(image, memory, options, trouble)
    }
}

/// Opens the image of a disk, without the disk: for tools.
///
/// # Errors
/// As [`Disk::open`].
pub fn open_image(options: &DiskOptions) -> Result<Box<dyn Image>, OpenError> {
    match &options.source {
        Source::Path(path) => Opening::new(options.cache).image(
            path,
            options.format,
            !options.read_only,
            options.secret.as_ref(),
        ),
        Source::Ram(bytes) => {
            let image = RawImage::in_memory(*bytes);
            Ok(Box::new(image.map_err(|source| OpenError::Open { path: options.path(), source })?))
        }
        Source::Nbd(url) => Ok(Box::new(NbdImage::open(url, !options.read_only)?)),
    }
}

fn unsupported<T>(path: &Path, reason: impl Into<String>) -> Result<T, OpenError> {
    Err(OpenError::Unsupported { path: path.to_owned(), reason: reason.into() })
}

/// A name that an image gives for another file.
#[derive(Clone, Copy)]
pub(crate) struct Reference<'a> {
    /// As it stands in the image.
    pub name: &'a str,
    /// The image that it stands in.
    pub of: &'a Path,
}

impl Reference<'_> {
    /// The path it means: relative to the directory of the image.
    fn path(&self) -> Result<PathBuf, OpenError> {
        let name = self.name.strip_prefix("file:").unwrap_or(self.name);
        if name.starts_with("json:") || name.contains("://") && !Path::new(name).is_absolute() {
            let reason =
                format!("refers to {name}, which is not a path; change that with qemu-img rebase -u");
            return unsupported(self.of, reason);
        }
        Ok(self.of.parent().unwrap_or(Path::new("")).join(name))
    }

    fn context<T>(&self, result: Result<T, OpenError>) -> Result<T, OpenError> {
        result.map_err(|source| OpenError::Reference { path: self.of.to_owned(), source: Box::new(source) })
    }
}

/// One disk being opened, with all that it refers to.
pub(crate) struct Opening {
    cache: CacheMode,
    /// Devices and inodes of the images from the top down to where we are.
    chain: Vec<(u64, u64)>,
}

impl Opening {
    pub fn new(cache: CacheMode) -> Self {
        Opening { cache, chain: Vec::new() }
    }

    /// Opens an image and what it refers to.
    fn image(
        &mut self,
        path: &Path,
        format: Option<Format>,
        writable: bool,
        secret: Option<&Secret>,
    ) -> Result<Box<dyn Image>, OpenError> {
        let mut file = self.file(path, writable)?;
        let found = first_sector(&file, path)?;
        let given = format.is_some();
        let format = format.or(found).unwrap_or(Format::Raw);
        let purpose = match (writable, format) {
            (false, _) => Purpose::Read,
            (true, Format::Raw | Format::Luks) => Purpose::Write,
            (true, _) => Purpose::WriteFormat,
        };
        self.enter(&file, path)?;
        take_lock(&mut file, path, purpose)?;
        let image: Box<dyn Image> = match format {
            Format::Raw if given || !writable => Box::new(file),
            Format::Raw => Box::new(Guarded(file)),
            Format::Qcow2 => Box::new(Qcow2Image::open(file, path, writable, self)?),
            Format::Luks => Box::new(LuksImage::open(file, path, secret)?),
            Format::Vmdk => Box::new(VmdkImage::open(file, path, writable, self)?),
            Format::Vhdx => Box::new(VhdxImage::open(file, path, writable, self)?),
        };
        self.chain.pop();
        let size = image.size();
        let of_format = !matches!(format, Format::Raw | Format::Luks);
        if self.chain.is_empty() && of_format && (size == 0 || !size.is_multiple_of(512)) {
            let reason = format!(
                "has a disk of {size} bytes, which is not whole sectors; give it a size with qemu-img resize"
            );
            return unsupported(path, reason);
        }
        Ok(image)
    }

    /// Notes that what is opened from here on is below this file.
    fn enter(&mut self, file: &RawImage, path: &Path) -> Result<(), OpenError> {
        let of_host = |source| OpenError::Open { path: path.to_owned(), source };
        let about = file.file().metadata().map_err(of_host)?;
        let id = (about.dev(), about.ino());
        if self.chain.contains(&id) {
            return unsupported(
                path,
                "is its own backing file, over others perhaps; set it right with qemu-img rebase -u",
            );
        }
        if self.chain.len() >= MAX_CHAIN {
            let reason = format!(
                "is the end of a chain of more than {MAX_CHAIN} images; shorten it with qemu-img commit or rebase"
            );
            return unsupported(path, reason);
        }
        self.chain.push(id);
        Ok(())
    }

    /// Opens the backing file of an image, for reading. `format` is what the image says of it.
    pub fn backing(
        &mut self,
        reference: Reference<'_>,
        format: Option<&str>,
    ) -> Result<Arc<dyn Image>, OpenError> {
        let path = reference.path()?;
        let format = match format {
            // "file" is what old versions of QEMU wrote for raw ones.
            Some("file" | "host_device") => Format::Raw,
            Some(name) => match Format::from_name(name) {
                Some(format) => format,
                None => {
                    let reason = format!("its backing file is of the format {name}, which is not known");
                    return unsupported(reference.of, reason);
                }
            },
            None => {
                let file = reference.context(self.file(&path, false))?;
                match reference.context(first_sector(&file, &path))? {
                    None => Format::Raw,
                    Some(format) => {
                        let (name, of) = (format.name(), reference.of.display());
                        let reason = format!(
                            "does not record the format of its backing file {0}, which looks like {name}; if it is, \
                             record it with qemu-img rebase -u -F {name} -b {1} {of}",
                            path.display(),
                            reference.name
                        );
                        return unsupported(reference.of, reason);
                    }
                }
            }
        };
        reference.context(self.image(&path, Some(format), false, None)).map(Arc::from)
    }

    /// Opens a file that an image refers to, only to look at it.
    pub fn look_at(&self, reference: Reference<'_>) -> Result<RawImage, OpenError> {
        reference.context(self.file(&reference.path()?, false))
    }

    /// Opens a file with contents of an image.
    pub fn data_file(&mut self, reference: Reference<'_>, writable: bool) -> Result<RawImage, OpenError> {
        let path = reference.path()?;
        let mut file = reference.context(self.file(&path, writable))?;
        let purpose = if writable { Purpose::WriteFormat } else { Purpose::Read };
        reference.context(take_lock(&mut file, &path, purpose))?;
        Ok(file)
    }

    /// Opens a file or block device.
    fn file(&self, path: &Path, writable: bool) -> Result<RawImage, OpenError> {
        let error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => OpenError::Missing { path: path.to_owned() },
            io::ErrorKind::PermissionDenied => OpenError::NotReadable { path: path.to_owned(), source },
            _ => OpenError::Open { path: path.to_owned(), source },
        };
        // Looked at before it is opened: opening a FIFO would wait for somebody.
        let about = fs::metadata(path).map_err(error)?;
        let kind = about.file_type();
        let what = [
            (kind.is_dir(), "a directory"),
            (kind.is_fifo(), "a FIFO"),
            (kind.is_socket(), "a socket"),
            (kind.is_char_device(), "a character device"),
        ];
        if let Some((_, what)) = what.into_iter().find(|(is, _)| *is) {
            return Err(OpenError::Kind { path: path.to_owned(), what });
        }
        let open = |writable: bool, flags: i32| {
            File::options().read(true).write(writable).custom_flags(flags).open(path)
        };
        let direct = if self.cache.direct() { libc::O_DIRECT } else { 0 };
        let mut cache = self.cache;
        let mut opened = open(writable, direct);
        if opened.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) && direct != 0 {
            opened = open(writable, 0);
            match &opened {
                Ok(file) if is_in_memory(file).map_err(error)? => {
                    tracing::info!(
                        "disk image {}: is in the host's memory, where no cache can be passed by",
                        path.display()
                    );
                    cache = if cache.writethrough() { CacheMode::Writethrough } else { CacheMode::Writeback };
                }
                Ok(_) => return Err(OpenError::NoDirect { path: path.to_owned() }),
                Err(_) => {}
            }
        }
        let file = match opened {
            Ok(file) => file,
            Err(source) if writable && open(false, 0).is_ok() => {
                return Err(OpenError::NotWritable { path: path.to_owned(), source });
            }
            Err(source) => return Err(error(source)),
        };
        RawImage::new(file, cache).map_err(error)
    }
}

/// The format that a file seems to have.
fn first_sector(file: &RawImage, path: &Path) -> Result<Option<Format>, OpenError> {
    let mut sector = [0; PROBED_BYTES];
    let read = file.read_bytes(0, &mut sector);
    read.map_err(|source| OpenError::Open { path: path.to_owned(), source })?;
    Ok(probe(&sector))
}

fn take_lock(file: &mut RawImage, path: &Path, purpose: Purpose) -> Result<(), OpenError> {
    file.unlock_at_end();
    lock(file.file(), purpose).map_err(|error| match error {
        LockError::InUse(by) => OpenError::Locked { path: path.to_owned(), by },
        LockError::Host(source) => OpenError::Open { path: path.to_owned(), source },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::IoError;
    use crate::testing::{disk_read, disk_write, have_qemu, open, options, tool, try_tool};

    /// What opening says, which is one line that names the image.
    fn refusal(options: DiskOptions) -> String {
        let path = options.path().display().to_string();
        let Err(error) = open(options) else { panic!("{path} was opened") };
        let line = error.to_string();
        assert!(line.contains(&path) && !line.contains('\n'), "{line}");
        line
    }

    fn file(directory: &tempfile::TempDir, name: &str, len: usize) -> PathBuf {
        let path = directory.path().join(name);
        fs::write(&path, vec![0; len]).unwrap();
        path
    }

    #[test]
    fn paths_that_are_no_disk_images() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let says = |path: &Path, what: &str| {
            let line = refusal(options(path));
            assert!(line.contains(what), "{line}");
        };
        says(&at("none"), "does not exist; make one");
        says(directory.path(), "is a directory, not a file");
        says(Path::new("/dev/null"), "is a character device");
        let _socket = UnixListener::bind(at("socket")).unwrap();
        says(&at("socket"), "is a socket");
        assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        says(&at("fifo"), "is a FIFO");
        says(&file(&directory, "empty", 0), "is empty; give it a size");
        says(&file(&directory, "part", 1000), "not a multiple of the sector size 512; round it up");
        says(&file(&directory, "a", 512).join("b"), "a directory");
        for format in [Format::Qcow2, Format::Vmdk, Format::Vhdx] {
            let path = file(&directory, "zeros", 4096);
            let line = refusal(DiskOptions { format: Some(format), ..options(&path) });
            assert!(line.contains(&format!("is not a valid {} image", format.name())), "{line}");
        }
    }

    #[test]
    fn images_of_no_size() {
        if !have_qemu() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "0"]);
        assert!(refusal(options(&path)).contains("qemu-img resize"));
    }

    /// root may open everything, so the file is made so that nobody may write it, where that works.
    #[test]
    fn files_that_may_not_be_written_or_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(&directory, "image", 4096);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        if rustix::process::geteuid().is_root() {
            // A file that is being run cannot be written (ETXTBSY).
            let path = directory.path().join("program");
            fs::copy("/bin/sleep", &path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            let mut child = Command::new(&path).arg("60").spawn().unwrap();
            let line = refusal(DiskOptions { format: Some(Format::Raw), ..options(&path) });
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(line.contains("cannot be written") && line.contains("option ro"), "{line}");
            return;
        }
        assert!(refusal(options(&path)).contains("cannot be written"));
        open(DiskOptions { read_only: true, ..options(&path) }).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        assert!(refusal(options(&path)).contains("cannot be read"));
    }

    #[test]
    fn a_guest_cannot_make_its_raw_disk_another_format() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(&directory, "image", 65536);
        let mut header = vec![0; 4096];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        let disk = open(options(&path)).unwrap();
        assert_eq!(disk_write(&disk, 0, &header), Err(IoError::Unsupported));
        assert_eq!(disk_write(&disk, 0, &header[..512]), Err(IoError::Unsupported));
        disk_write(&disk, 512, &header).unwrap();
        disk_write(&disk, 0, &[1; 4096]).unwrap();
        assert_eq!(disk_read(&disk, 0, 4096).unwrap(), [1; 4096]);
        assert_eq!(disk_read(&disk, 4096, 512).unwrap(), [0; 512], "nothing was written by the refused one");
        drop(disk);
        let disk = open(DiskOptions { format: Some(Format::Raw), ..options(&path) }).unwrap();
        disk_write(&disk, 0, &header).unwrap();
        drop(disk);
        let line = refusal(options(&path));
        assert!(line.contains("not a valid qcow2 image"), "found again by its first bytes: {line}");
    }

    #[test]
    fn every_cache_mode_on_every_kind_of_file_system() {
        for place in ["/tmp", "/dev/shm"] {
            let directory = tempfile::tempdir_in(place).unwrap();
            for cache in
                [CacheMode::Writeback, CacheMode::None, CacheMode::Writethrough, CacheMode::DirectSync]
            {
                let path = file(&directory, "image", 65536);
                let disk = open(DiskOptions { cache, ..options(&path) }).unwrap();
                disk_write(&disk, 512, &[3; 1024]).unwrap();
                assert_eq!(
                    disk_read(&disk, 0, 2048).unwrap(),
                    [[0; 512], [3; 512], [3; 512], [0; 512]].concat()
                );
                drop(disk);
                assert_eq!(fs::read(&path).unwrap()[512..1536], [3; 1024]);
            }
        }
    }

    #[test]
    fn two_disks_on_one_image() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(&directory, "image", 65536);
        let first = open(options(&path)).unwrap();
        assert!(refusal(options(&path)).contains(&format!("in use (pid {}", std::process::id())));
        assert!(refusal(DiskOptions { read_only: true, ..options(&path) }).contains("in use"));
        drop(first);
        let reading = || open(DiskOptions { read_only: true, ..options(&path) }).unwrap();
        let readers = [reading(), reading()];
        assert!(refusal(options(&path)).contains("in use"));
        drop(readers);
        open(options(&path)).unwrap();
    }

    /// QEMU refuses what we have, and we what QEMU has.
    #[test]
    fn qemu_and_we_respect_each_other() {
        if !have_qemu() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        for format in ["raw", "qcow2"] {
            let path = directory.path().join(format);
            let name = path.to_str().unwrap();
            tool("qemu-img", &["create", "-q", "-f", format, name, "1M"]);
            let read = |flag: &str| try_tool("qemu-io", &[flag, "-f", format, "-c", "read 0 512", name]);
            let format = Format::from_name(format);
            let with = |read_only| DiskOptions { format, read_only, ..options(&path) };
            let disk = open(with(false)).unwrap();
            assert!(read("-n").is_err_and(|e| e.contains("lock")), "qemu writes what we write");
            if format == Some(Format::Qcow2) {
                // Of raw images qemu-io does not mind that others write them.
                assert!(read("-r").is_err_and(|e| e.contains("lock")), "qemu reads what we write");
            }
            drop(disk);
            let disk = open(with(true)).unwrap();
            read("-r").unwrap();
            assert!(read("-n").is_err_and(|e| e.contains("lock")), "qemu writes what we read");
            drop(disk);
            // An open qemu-io has it until its input ends.
            let mut qemu = Command::new("qemu-io")
                .args(["-f", format.unwrap().name(), name])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // Its prompt says that the image is open.
            let mut prompt = [0; 8];
            std::io::Read::read_exact(qemu.stdout.as_mut().unwrap(), &mut prompt).unwrap();
            let line = refusal(with(false));
            assert!(line.contains(&format!("pid {}, qemu-io", qemu.id())), "{line}");
            assert!(refusal(with(true)).contains("in use"));
            drop(qemu.stdin.take());
            qemu.wait().unwrap();
            open(with(false)).unwrap();
        }
    }
}
