//! Where the programs under test and the guests are.

use std::path::{Path, PathBuf};

/// The guests that `lab/guests` fetches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's kernel for virtual machines.
    Cloud,
    /// Debian's kernel for everything.
    Generic,
    /// The cloud kernel of the backports suite.
    Backports,
    /// The kernel of the Debian on a disk, by `lab/disk`; goes with [`Root::Disk`].
    Disk,
    /// memtest86+, which is loaded like a Linux kernel.
    Memtest,
}

/// The root file systems that Linux guests can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// busybox and little else, by `lab/initramfs`: what most tests want.
    Small,
    /// A Debian with tools, by `lab/debian`; takes 1 GiB of memory or more.
    Debian,
    /// The initramfs of a Debian on a disk, by `lab/disk`: it mounts what `root=` says.
    Disk,
}

/// The directories that the tests use.
#[derive(Clone, Debug)]
pub struct Places {
    programs: PathBuf,
    guests: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate stands in the work tree");
        let from =
            |variable: &str, default: PathBuf| std::env::var_os(variable).map_or(default, PathBuf::from);
        let target = from("CARGO_TARGET_DIR", top.join("target"));
        Self {
            programs: from("APIARY_BIN", target.join("release")),
            guests: from("APIARY_BUILD", top.join("build")).join("guests"),
        }
    }
}

impl Places {
    /// The path of one of our programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// The path of a guest's kernel image.
    pub fn kernel(&self, kernel: Kernel) -> PathBuf {
        self.guests.join(match kernel {
            Kernel::Cloud => "cloud/vmlinuz",
            Kernel::Generic => "generic/vmlinuz",
            Kernel::Backports => "backports/vmlinuz",
            Kernel::Disk => "disk/vmlinuz",
            Kernel::Memtest => "memtest/memtest.bin",
        })
    }

    /// A root file system, as the initramfs that Linux guests get.
    pub fn initramfs(&self, root: Root) -> PathBuf {
        self.guests.join(match root {
            Root::Small => "initramfs.cpio",
            Root::Debian => "debian/initramfs.cpio",
            Root::Disk => "disk/initrd.img",
        })
    }

    /// The Debian on a disk: a raw image, to be copied before it is used.
    pub fn debian_disk(&self) -> PathBuf {
        self.guests.join("disk/debian.raw")
    }

    /// The Debian guest's root file system as a directory.
    pub fn debian_root(&self) -> PathBuf {
        self.guests.join("debian/root")
    }
}

/// Runs one of our programs to its end and gives what it printed.
///
/// # Panics
///
/// If the program cannot be started, which in a test is a failure.
pub fn program(name: &str, arguments: &[&str]) -> std::process::Output {
    let path = Places::default().program(name);
    std::process::Command::new(&path)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error} (run `make build` first)", path.display()))
}
