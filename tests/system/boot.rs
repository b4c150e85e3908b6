//! Debian's kernels boot, see the machine that was asked for, and end it in each of the ways there are.

use std::collections::BTreeSet;

use guest::{Ended, Error, Kernel, Machine, Report, Vmm};

use crate::status;
use crate::{assert_size, assert_status};

/// What a kernel's complaint has to mention for it to be about the firmware's tables or the chips that they describe.
const FIRMWARE_WORDS: [&str; 12] =
    ["ACPI", "Firmware", "BIOS", "MADT", "FADT", "DSDT", "MCFG", "HPET", "DMI", "SMBIOS", "APIC", "PCI"];

/// The demo's guest on a board, with its kernel's messages.
fn demo_on(vmm: Vmm) -> Result<Ended, Error> {
    Machine::new("demo").on(vmm).show(&["dmesg", "acpi", "interrupts"]).run()
}

/// What the kernel says about firmware and chips. Every report of it, also of a host that was too busy to run the
/// guest's processors for seconds, names the machine; that line is no complaint.
fn firmware_complaints(ended: &Ended) -> BTreeSet<String> {
    Report::new(&ended.console)
        .complaints()
        .into_iter()
        .filter(|line| !line.starts_with("Hardware name: "))
        .filter(|line| FIRMWARE_WORDS.iter().any(|word| line.contains(word)))
        .map(str::to_owned)
        .collect()
}

/// The demo: two processors, 512 MiB, a power-off; and nothing that the kernel complains about in our firmware's
/// tables that it does not complain about on QEMU's q35.
#[test]
fn cloud_kernel_boots_without_complaint() -> Result<(), Error> {
    let ours = demo_on(Vmm::Bhyve)?;
    assert_status(&ours, status::POWEROFF);
    let report = Report::new(&ours.console);
    assert_size(&report, 2, 512);
    let tables: BTreeSet<&str> =
        report.section("acpi").iter().flat_map(|line| line.split_whitespace()).collect();
    for table in ["APIC", "DSDT", "FACP", "HPET", "MCFG"] {
        assert!(tables.contains(table), "the guest has no ACPI table {table}: {tables:?}");
    }

    let peer = demo_on(Vmm::Qemu)?;
    assert!(Report::new(&peer.console).section("dmesg").len() > 100, "QEMU's guest booted: {}", peer.console);
    let complaints = firmware_complaints(&ours);
    let known = firmware_complaints(&peer);
    let new: Vec<_> = complaints.difference(&known).collect();
    assert!(new.is_empty(), "the kernel complains about our board, not about q35: {new:#?}");
    Ok(())
}

/// Four processors in two sockets, memory up to the PCI hole, a reboot.
#[test]
fn sockets_and_cores_are_what_was_asked_for() -> Result<(), Error> {
    let ended = Machine::new("topology")
        .cpus("4,sockets=2,cores=2")
        .memory("3G")
        .show(&["cpuinfo"])
        .end(guest::End::Reboot)
        .run()?;
    assert_status(&ended, status::REBOOT);
    let report = Report::new(&ended.console);
    assert_size(&report, 4, 3 << 10);
    assert_eq!(report.cpuinfo("physical id"), ["0", "0", "1", "1"]);
    assert_eq!(report.cpuinfo("core id"), ["0", "1", "0", "1"]);
    assert_eq!(report.cpuinfo("cpu cores"), ["2"; 4]);
    assert_eq!(report.cpuinfo("siblings"), ["2"; 4]);
    Ok(())
}

/// Memory on both sides of the PCI hole, four processors without words about sockets, a halt.
#[test]
fn memory_above_the_hole_is_seen() -> Result<(), Error> {
    let ended = Machine::new("large").cpus("4").memory("6G").show(&["iomem"]).end(guest::End::Halt).run()?;
    assert_status(&ended, status::HALT);
    let report = Report::new(&ended.console);
    assert_size(&report, 4, 6 << 10);
    let above = report.section("iomem").into_iter().any(|line| {
        line.ends_with("System RAM")
            && line.split('-').next().is_some_and(|start| start.trim() == "100000000")
    });
    assert!(above, "RAM continues at 4 GiB: {:#?}", report.section("iomem"));
    Ok(())
}

/// One processor; the guest resets by a triple fault.
#[test]
fn a_triple_fault_is_told_apart() -> Result<(), Error> {
    let ended = Machine::new("triple").cpus("1").end(guest::End::TripleFault).run()?;
    assert_status(&ended, status::TRIPLE_FAULT);
    assert_size(&Report::new(&ended.console), 1, 512);
    Ok(())
}

/// The interpreter and the translator do the same in every block of a boot and the power-off after it. (The kernel's tests
/// of its ciphers would take as long again.)
#[test]
fn interpreter_and_translator_agree() -> Result<(), Error> {
    let machine = Machine::new("lockstep")
        .cpus("1")
        .memory("256M")
        .words("cryptomgr.notests")
        .options(&["--engine", "soft", "-o", "soft.translate=check"])
        .end(guest::End::Wait);
    let mut running = machine.start()?;
    running.wait_for("apiary: waiting")?;
    let stats = guest::program("bhyvectl", &[&format!("--vm={}", machine.name()), "--get-stats"]);
    let stats = String::from_utf8_lossy(&stats.stdout).into_owned();
    let count = |name: &str| {
        let line = stats.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok())
            .unwrap_or_else(|| panic!("no {name}: {stats}"))
    };
    let (both, once) = (count("instructions compared"), count("instructions run once"));
    assert!(both > 100_000_000 && once < both / 100, "{both} instructions compared, {once} run once");
    running.signal(rustix::process::Signal::TERM)?;
    assert_status(&running.wait()?, status::POWEROFF);
    Ok(())
}

/// Debian's kernel for everything, which probes for far more hardware.
#[test]
fn generic_kernel_boots() -> Result<(), Error> {
    let ended = Machine::new("generic").kernel(Kernel::Generic).run()?;
    assert_status(&ended, status::POWEROFF);
    assert_size(&Report::new(&ended.console), 2, 512);
    Ok(())
}

/// A kernel some years newer.
#[test]
fn backports_kernel_boots() -> Result<(), Error> {
    let ended = Machine::new("backports").kernel(Kernel::Backports).run()?;
    assert_status(&ended, status::POWEROFF);
    assert_size(&Report::new(&ended.console), 2, 512);
    Ok(())
}
