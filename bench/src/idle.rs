//! What a guest that does nothing costs.

use std::time::Instant;

use guest::{Error, Running};
use serde::Serialize;

/// How long the guest is watched.
const SECONDS: u32 = 10;
/// A mapping of at least this size is the guest's memory (the suite's guests have 2 GiB).
const GUEST_MEMORY_KIB: u64 = 512 << 10;

/// See the fields.
#[derive(Clone, Debug, Serialize)]
pub struct Idle {
    /// Processor time in percent of one processor.
    pub processor_percent: f64,
    /// Memory in use beyond the guest's own and beyond generated code.
    pub memory_mib: f64,
    /// Memory in use for generated code and what is stored with it: mappings that can be executed and are not of a file.
    pub code_mib: f64,
}

/// Watches a guest that awaits commands.
///
/// # Errors
///
/// If the machine does not answer.
pub fn measure(running: &mut Running) -> Result<Idle, Error> {
    // What the workloads left behind has come to rest after a second.
    running.command("sleep 1")?;
    let (before, started) = (running.processor_time()?, Instant::now());
    running.command(&format!("sleep {SECONDS}"))?;
    let (after, elapsed) = (running.processor_time()?, started.elapsed());
    let processor_percent = 100.0 * (after - before).as_secs_f64() / elapsed.as_secs_f64();
    let (memory_mib, code_mib) = memory(running.pid());
    Ok(Idle { processor_percent, memory_mib, code_mib })
}

/// One mapping of a process.
#[derive(Default)]
struct Mapping {
    executable: bool,
    /// That of a file, or of a memfd.
    inode: u64,
    of_a_file: bool,
    size_kib: u64,
    resident_kib: u64,
}

/// The mappings as proc(5) tells them: a line "ADDRESSES PERMISSIONS OFFSET DEVICE INODE [PATH]", then lines "NAME: VALUE".
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let kib = || words.get(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        match (words.first(), all.last_mut()) {
            (Some(&"Size:"), Some(mapping)) => mapping.size_kib = kib(),
            (Some(&"Rss:"), Some(mapping)) => mapping.resident_kib = kib(),
            (Some(first), _) if !first.ends_with(':') => {
                let path = words.get(5).copied().unwrap_or_default();
                all.push(Mapping {
                    executable: words.get(1).is_some_and(|permissions| permissions.contains('x')),
                    inode: words.get(4).and_then(|word| word.parse().ok()).unwrap_or(0),
                    of_a_file: path.starts_with('[') || path.starts_with('/') && !path.starts_with("/memfd:"),
                    ..Mapping::default()
                });
            }
            _ => {}
        }
    }
    all
}

/// Resident MiB beyond the guest's memory and generated code, and of generated code. Code that is mapped twice, to be
/// written and to be executed, is the same memory: the mapping counts through which more of it was used.
fn memory(pid: u32) -> (f64, f64) {
    let all = mappings(&std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default());
    let is_code = |mapping: &&Mapping| mapping.executable && !mapping.of_a_file;
    let code_inodes: Vec<_> =
        all.iter().filter(is_code).map(|m| m.inode).filter(|inode| *inode != 0).collect();
    let resident = |code: &Mapping| {
        let is_same = |m: &&Mapping| code.inode != 0 && m.inode == code.inode;
        all.iter().filter(is_same).map(|m| m.resident_kib).fold(code.resident_kib, u64::max)
    };
    let code_kib: u64 = all.iter().filter(is_code).map(resident).sum();
    let other_kib: u64 = all
        .iter()
        .filter(|m| !is_code(m) && m.size_kib < GUEST_MEMORY_KIB && !code_inodes.contains(&m.inode))
        .map(|m| m.resident_kib)
        .sum();
    (other_kib as f64 / 1024.0, code_kib as f64 / 1024.0)
}
