//! What the tests of this crate share.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};

use memory::GuestMemory;
use vm_memory::VolatileSlice;

use crate::{Buffers, Disk, DiskOptions, Image, IoError, OpenError, Operation, Request, Source, TroubleSink};

/// A directory in memory where there is one: flushes take no time there.
pub fn scratch() -> tempfile::TempDir {
    let place = Path::new("/dev/shm");
    if place.is_dir() { tempfile::tempdir_in(place).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// Runs one of QEMU's tools; returns what it printed. `None` if it failed.
pub fn try_tool(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(text) } else { Err(format!("{text}{errors}")) }
}

/// Runs one of QEMU's tools, which must succeed.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    try_tool(program, arguments).unwrap_or_else(|errors| panic!("{program} {arguments:?}: {errors}"))
}

/// Has qemu-io do things with an image. It must find what `read -P` expects.
pub fn qemu_io(format: &str, path: &Path, commands: &[&str]) {
    let mut arguments = vec!["-f", format];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(path.to_str().unwrap());
    let output = tool("qemu-io", &arguments);
    assert!(!output.contains("failed"), "{output}");
}

/// Whether QEMU's tools are here; says so if not.
pub fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("qemu-img is not installed: nothing is tested");
    }
    found
}

/// qemu-img check finds nothing.
pub fn check(path: &Path) {
    let output = tool("qemu-img", &["check", path.to_str().unwrap()]);
    assert!(output.contains("No errors were found"), "{output}");
}

/// Reads from an image.
pub fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image.read(offset, &[VolatileSlice::from(&mut bytes[..])]).unwrap();
    bytes
}

/// Writes to an image.
pub fn write(image: &dyn Image, offset: u64, bytes: &[u8]) {
    image.write(offset, &[VolatileSlice::from(&mut bytes.to_vec()[..])], false).unwrap();
}

/// Guest memory of a mebibyte at 0.
pub fn guest_memory() -> GuestMemory {
    memory::join_regions(vec![memory::create_region("ram", 0, 1 << 20).unwrap()]).unwrap()
}

/// Notes the troubles that it is told of.
#[derive(Default)]
pub struct Troubles(Mutex<Vec<IoError>>, Condvar);

impl Troubles {
    /// Waits until there are as many.
    pub fn wait(&self, count: usize) -> Vec<IoError> {
        let troubles = self.0.lock().unwrap();
        self.1.wait_while(troubles, |troubles| troubles.len() < count).unwrap().clone()
    }
}

impl TroubleSink for Troubles {
    fn trouble(&self, _disk: &str, error: &IoError) {
        self.0.lock().unwrap().push(error.clone());
        self.1.notify_all();
    }
}

/// The options for an image, with failures told to whoever asks.
pub fn options(path: &Path) -> DiskOptions {
    DiskOptions {
        read_errors: crate::ErrorPolicy::Report,
        write_errors: crate::ErrorPolicy::Report,
        ..DiskOptions::new(Source::Path(path.to_owned()))
    }
}

/// Opens a disk.
pub fn open(options: DiskOptions) -> Result<Disk, OpenError> {
    Disk::open(options, guest_memory(), Arc::new(Troubles::default()))
}

/// Does a request with a buffer of the host and waits for its end.
pub fn request(
    disk: &Disk,
    operation: Operation,
    offset: u64,
    len: u64,
    bytes: Vec<u8>,
) -> Result<Vec<u8>, IoError> {
    let (done, ended) = channel();
    let buffers = if bytes.is_empty() { Buffers::NONE } else { Buffers::Host(bytes) };
    disk.submit(Request {
        operation,
        offset,
        len,
        buffers,
        done: Box::new(move |result| done.send(result).unwrap()),
    });
    ended.recv().unwrap()
}

/// Writes to a disk and waits.
pub fn disk_write(disk: &Disk, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
    request(disk, Operation::Write { fua: false }, offset, bytes.len() as u64, bytes.to_vec()).map(|_| ())
}

/// Reads from a disk and waits.
pub fn disk_read(disk: &Disk, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
    request(disk, Operation::Read, offset, len as u64, vec![0xee; len])
}
