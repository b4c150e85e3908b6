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
    /// Memory in use for generated code: mappings that can be executed and are not of a file.
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

/// Resident MiB beyond the guest's, and of generated code; proc(5), smaps.
fn memory(pid: u32) -> (f64, f64) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let (mut other_kib, mut code_kib) = (0, 0);
    let (mut executable, mut size_kib) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let kib = second.parse::<u64>().unwrap_or(0);
        match first {
            "Size:" => size_kib = kib,
            "Rss:" if size_kib >= GUEST_MEMORY_KIB => {}
            "Rss:" if executable => code_kib += kib,
            "Rss:" => other_kib += kib,
            // ADDRESSES PERMISSIONS OFFSET DEVICE INODE [PATH]
            _ if first.contains('-') && !first.ends_with(':') => {
                let path = words.nth(3).unwrap_or_default();
                let of_a_file = path.starts_with('/') && !path.starts_with("/memfd:");
                executable = second.contains('x') && !of_a_file && !path.starts_with('[');
            }
            _ => {}
        }
    }
    (other_kib as f64 / 1024.0, code_kib as f64 / 1024.0)
}
