//! Opens an image as its options say.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use memory::GuestMemory;

use crate::image::raw::RawImage;
use crate::{Disk, DiskOptions, Image, OpenError, Source, TroubleSink};

impl Disk {
    /// Opens a disk.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(
        options: DiskOptions,
        memory: GuestMemory,
        trouble: Arc<dyn TroubleSink>,
    ) -> Result<Disk, OpenError> {
        let failed = |source| OpenError::Open { path: options.path(), source };
        let image: Box<dyn Image> = match &options.source {
            Source::Ram(bytes) => Box::new(RawImage::in_memory(*bytes).map_err(failed)?),
            Source::Path(path) => {
                let direct = if options.cache.direct() { libc::O_DIRECT } else { 0 };
                let file = OpenOptions::new()
                    .read(true)
                    .write(!options.read_only)
                    .custom_flags(direct)
                    .open(path)
                    .map_err(failed)?;
                Box::new(RawImage::new(file, options.cache).map_err(failed)?)
            }
        };
        Disk::new(image, memory, options, trouble)
    }
}
