//! Guest RAM: checked against the host, allocated, mapped.

use std::fs;
use std::io;
use std::sync::Arc;

use boot::MemoryLayout;
use config::settings::MemorySettings;
use engine::memory::{create_region, join_regions};
use engine::{GuestMemory, GuestRegion};
use vm_memory::GuestMemoryRegion;

use crate::MachineError;

/// Checks that the host could hold the RAM of `layout` at all.
///
/// # Errors
/// It has less memory and swap than that.
pub(crate) fn check_host(layout: &MemoryLayout) -> Result<(), MachineError> {
    let asked = layout.total_bytes();
    match host_memory() {
        Some(host) if asked > host => Err(MachineError::TooMuchMemory { asked, host }),
        _ => Ok(()),
    }
}

/// Allocates the RAM of `layout`, one region for each range. The host gives pages when the guest touches them; with
/// `wired` (`-S`) all at once, locked. Unless asked for (`-C`), guest memory stays out of core files.
///
/// # Errors
/// The host refuses the mapping or the locking.
pub(crate) fn allocate(
    layout: &MemoryLayout,
    settings: &MemorySettings,
) -> Result<(GuestMemory, Vec<Arc<GuestRegion>>), MachineError> {
    let asked = layout.total_bytes();
    let refused = |source| MachineError::Memory { asked, source };
    let mut regions = Vec::new();
    for range in layout.ram_ranges() {
        let region = create_region("guest-ram", range.start, range.end - range.start).map_err(refused)?;
        if !settings.in_core {
            leave_out_of_core(&region).map_err(refused)?;
        }
        if settings.wired {
            wire(&region).map_err(|source| MachineError::Wire { asked, source })?;
        }
        regions.push(region);
    }
    Ok((join_regions(regions.clone()).map_err(refused)?, regions))
}

/// Keeps a region out of core files.
fn leave_out_of_core(region: &GuestRegion) -> io::Result<()> {
    // SAFETY: the range is the region's own mapping; the advice changes nothing but core files.
    match unsafe { libc::madvise(region.as_ptr().cast(), mapped_bytes(region)?, libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mapped_bytes(region: &GuestRegion) -> io::Result<usize> {
    usize::try_from(region.len()).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))
}

/// Locks a region in the host's memory.
fn wire(region: &GuestRegion) -> io::Result<()> {
    // SAFETY: the range is the region's own mapping, which lives as long as the region.
    match unsafe { libc::mlock(region.as_ptr().cast(), mapped_bytes(region)?) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the host could give at most: RAM and swap, in bytes (proc(5), `meminfo`).
fn host_memory() -> Option<u64> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    field("MemTotal:")?.checked_add(field("SwapTotal:").unwrap_or(0))
}

/// `bytes` for people: in the largest unit that leaves at least one of it.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match UNITS.iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => {
            let tenths = (u128::from(bytes) * 10) >> shift;
            match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                tenth => format!("{}.{tenth} {unit}", tenths / 10),
            }
        }
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_ram_and_swap() {
        let text = "MemTotal:       24000000 kB\nMemFree:  1 kB\nSwapTotal:       1000 kB\n";
        assert_eq!(parse_meminfo(text), Some(24_001_000 * 1024));
        assert_eq!(parse_meminfo("MemTotal: 5 kB\n"), Some(5 * 1024));
        assert_eq!(parse_meminfo("nonsense"), None);
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(human(100 << 40), "100 TiB");
        assert_eq!(human((23 << 30) + (1 << 29)), "23.5 GiB");
        assert_eq!(human(4096), "4 KiB");
        assert_eq!(human(7), "7 bytes");
    }

    #[test]
    fn more_than_the_host_has_is_refused_before_it_is_tried() {
        let layout = MemoryLayout::new(100 << 40).unwrap();
        let error = check_host(&layout).unwrap_err().to_string();
        assert!(error.contains("100 TiB") && error.contains("this host has"), "{error}");
    }

    #[test]
    fn regions_are_where_the_layout_says() {
        let settings = MemorySettings { size_bytes: 0, wired: false, in_core: false };
        let layout = MemoryLayout::new((3 << 30) + (1 << 20)).unwrap();
        let (_, regions) = allocate(&layout, &settings).unwrap();
        let places: Vec<_> = regions.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(places, [(0, 3 << 30), (4 << 30, 1 << 20)]);
    }
}
