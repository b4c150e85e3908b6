//! Guest loaders and firmware tables: everything that is in guest memory before the first instruction runs.
//!
//! A machine asks [`MemoryLayout`] where RAM goes, describes itself in a [`Platform`], has [`write_tables`] put ACPI, MP and
//! SMBIOS tables below 1 MiB, and has [`load`] put the kernel, its parameters and its initial RAM disk in place. What comes
//! back is an [`EntryState`], which brings vCPU 0 to the kernel's entry point on any engine.
//!
//! Kernels and RAM disks are files that a user may have got from anywhere: nothing in them is trusted.
#![forbid(unsafe_code)]

mod acpi;
mod entry;
mod error;
mod image;
pub mod layout;
mod linux;
mod loader;
mod mptable;
pub mod platform;
mod pvh;
mod smbios;
mod tables;
#[cfg(test)]
mod testing;

pub use entry::{BOOT_CS, BOOT_DS, BOOT_TSS, EntryMode, EntryState, mtrr_msrs};
pub use error::LoadError;
pub use image::Image;
pub use layout::{E820Entry, E820Kind, LayoutError, MemoryLayout};
pub use loader::{KernelFormat, KernelRequest, detect, load};
pub use platform::Platform;
pub use tables::{ACPI_BASE, MP_TABLE_BASE, SMBIOS_BASE, Tables, TablesError, write_tables};

#[cfg(test)]
mod tables_tests;

#[cfg(test)]
mod loader_tests;
