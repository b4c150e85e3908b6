//! Disks of a virtual machine, from the controller's request down to the host's file.
//!
//! ```text
//! controller ──Request──► Disk ──► (throttle) ──► at once, or an I/O thread ──► Image (raw, qcow2, RAM …)
//!      ▲                                                      │
//!      └───────────────────── done(result) ◄──────────────────┘
//! ```
//!
//! A controller knows [`Disk`] and [`Request`] only. A [`Disk`] checks what is asked, counts and times it, and decides what happens
//! when the host fails ([`ErrorPolicy`]). An [`Image`] is contents in some format; its methods block.
//!
//! What a disk promises: a request whose `done` got `Ok` has happened; after a flush, and after a write with `fua`, the contents
//! survive the host's losing power, as far as the host's own storage keeps its word.

pub mod disk;
pub mod error;
pub mod image;
mod lock;
pub mod open;
pub mod options;
mod pool;
pub mod request;
mod ring;
pub mod stats;
#[cfg(test)]
mod testing;
pub mod throttle;

pub use disk::{Disk, DiskInfo, TroubleSink};
pub use error::{IoError, OpenError};
pub use image::{Image, Snapshot, SnapshotChange};
pub use open::open_image;
pub use options::{CacheMode, DiskOptions, ErrorPolicy, Format, Secret, SectorSize, Source};
pub use request::{Buffers, Operation, Request, Span};
pub use stats::{DiskStats, Histogram};
pub use throttle::{Limit, Limits, Rate};
