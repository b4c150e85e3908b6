//! Interrupts from devices and processors to LAPICs.

use super::*;

#[test]
fn fixed_interrupts_by_priority() {
    let board = Board::new(1);
    let chips = &board.chips;
    board.told();
    for vector in [0x41, 0x61, 0x45] {
        assert!(chips.send_msi(MsiMessage { address: 0xfee0_0000, data: vector }));
    }
    // Only the first one made a difference to whether there is an interrupt.
    assert_eq!(board.told(), [0]);
    assert!(chips.has_interrupt(0));
    assert_eq!(chips.peek(0), Some(0x61));
    assert_eq!(chips.acknowledge(0), Some(0x61));
    assert_eq!(board.lapic_read(0, register::ISR + 3), 1 << 1);
    assert_eq!(board.lapic_read(0, register::PPR), 0x60);
    // The others wait behind its priority class.
    assert!(!chips.has_interrupt(0));
    assert_eq!(chips.acknowledge(0), None);
    board.eoi(0);
    assert!(chips.has_interrupt(0));
    assert_eq!(board.told(), [0]);
    assert_eq!(chips.acknowledge(0), Some(0x45));
    // Same class: 41h waits, too.
    assert!(!chips.has_interrupt(0));
    board.eoi(0);
    assert_eq!(chips.acknowledge(0), Some(0x41));
    board.eoi(0);
    assert!(!chips.has_interrupt(0));
    assert_eq!(board.lapic_read(0, register::PPR), 0);
    // An EOI with nothing in service does nothing.
    board.eoi(0);
}

#[test]
fn task_priority_holds_interrupts_back() {
    let board = Board::new(1);
    let chips = &board.chips;
    chips.set_tpr(0, 5);
    assert_eq!(board.lapic_read(0, register::TPR), 0x50);
    chips.send_msi(MsiMessage { address: 0xfee0_0000, data: 0x5f });
    assert!(!chips.has_interrupt(0));
    board.told();
    chips.set_tpr(0, 4);
    assert_eq!(board.told(), [0]);
    assert!(chips.has_interrupt(0));
    board.lapic(0, register::TPR, 0x5a);
    assert_eq!(chips.tpr(0), 5);
    assert!(!chips.has_interrupt(0));
    assert_eq!(board.lapic_read(0, register::PPR), 0x5a);
    chips.set_tpr(0, 0);
    assert_eq!(chips.acknowledge(0), Some(0x5f));
}

#[test]
fn ioapic_level_interrupt_comes_back_until_the_device_is_served() {
    let board = Board::new(2);
    let chips = &board.chips;
    // Input 20, level, vector 55h, to vCPU 1.
    board.redirect(20, 0x0100_0000_0000_8055);
    board.told();
    chips.set_irq_line(20, true);
    assert_eq!(board.told(), [1]);
    assert_eq!(chips.acknowledge(1), Some(0x55));
    assert_eq!(board.lapic_read(1, register::TMR + 2), 1 << 21);
    board.told();
    board.eoi(1);
    assert_eq!(board.told(), [1]);
    assert_eq!(chips.acknowledge(1), Some(0x55));
    chips.set_irq_line(20, false);
    board.eoi(1);
    assert!(!chips.has_interrupt(1));
    assert!(!chips.has_interrupt(0));
    // As an edge, the same vector clears the TMR bit and the EOI is nobody else's business.
    chips.send_msi(MsiMessage { address: 0xfee0_1000, data: 0x55 });
    assert_eq!(board.lapic_read(1, register::TMR + 2), 0);
}

#[test]
fn directed_eoi_suppresses_the_broadcast() {
    let board = Board::with(ChipsConfig { directed_eoi: true, ..ChipsConfig::new(1) });
    let chips = &board.chips;
    assert_eq!(board.lapic_read(0, register::VERSION), 0x0105_0014);
    board.lapic(0, register::SVR, 0x11ff);
    assert_eq!(board.lapic_read(0, register::SVR), 0x11ff);
    board.redirect(20, 0x8055);
    chips.set_irq_line(20, true);
    assert_eq!(chips.acknowledge(0), Some(0x55));
    board.eoi(0);
    assert!(!chips.has_interrupt(0));
    chips.mmio_write(0, IOAPIC_BASE + 0x40, &0x55u32.to_le_bytes());
    assert_eq!(chips.acknowledge(0), Some(0x55));
    // Without the feature the bit cannot be set.
    let board = Board::new(1);
    assert_eq!(board.lapic_read(0, register::VERSION), 0x0005_0014);
    board.lapic(0, register::SVR, 0x11ff);
    assert_eq!(board.lapic_read(0, register::SVR), 0x1ff);
}

#[test]
fn ipi_shorthands_and_destinations() {
    let board = Board::new(4);
    let chips = &board.chips;
    let pending = || (0..4).map(|vcpu| chips.acknowledge(vcpu)).collect::<Vec<_>>();
    let settle = || (0..4).for_each(|vcpu| board.eoi(vcpu));
    for (destination, low, expected) in [
        (0u8, 0x000c_4041, [0, 1, 1, 1]), // all but self
        (0, 0x0008_4041, [1, 1, 1, 1]),   // all
        (0, 0x0004_4041, [1, 0, 0, 0]),   // self
        (2, 0x0000_4041, [0, 0, 1, 0]),   // physical
        (0xff, 0x0000_4041, [1, 1, 1, 1]),
        (0b1010, 0x0000_4841, [0, 1, 0, 1]), // logical, flat
        (9, 0x0000_4041, [0, 0, 0, 0]),      // nobody
    ] {
        board.told();
        board.ipi(0, destination, low);
        let expected_vcpus: Vec<u32> = (0..4).filter(|vcpu| expected[*vcpu as usize] == 1).collect();
        assert_eq!(board.told(), expected_vcpus, "ICR {low:#x}");
        assert_eq!(pending(), expected.map(|hit| (hit == 1).then_some(0x41)), "ICR {low:#x}");
        settle();
    }
    // Cluster model: cluster 1 has vCPUs 2 and 3.
    for (vcpu, logical) in [(0, 0x01u32), (1, 0x02), (2, 0x11), (3, 0x12)] {
        board.lapic(vcpu, register::DFR, 0x0fff_ffff);
        board.lapic(vcpu, register::LDR, logical << 24);
    }
    board.ipi(0, 0x13, 0x4841);
    assert_eq!(pending(), [None, None, Some(0x41), Some(0x41)]);
}

#[test]
fn x2apic_destinations() {
    let board = Board::x2apic(20);
    let chips = &board.chips;
    let send =
        |destination: u64, low: u64| chips.write_msr(0, X2APIC + register::ICR_LOW, destination << 32 | low);
    let hit = || {
        (0..20)
            .filter(|vcpu| {
                let taken = chips.acknowledge(*vcpu).is_some();
                chips.write_msr(*vcpu, X2APIC + register::EOI, 0).unwrap();
                taken
            })
            .collect::<Vec<u32>>()
    };
    assert_eq!(chips.read_msr(18, X2APIC + register::LDR), Ok(0x0001_0004));
    assert_eq!(chips.read_msr(18, X2APIC + register::ID), Ok(18));
    send(0x0001_0005, 0x841).unwrap();
    assert_eq!(hit(), [16, 18]);
    send(0x0000_8001, 0x841).unwrap();
    assert_eq!(hit(), [0, 15]);
    send(19, 0x41).unwrap();
    assert_eq!(hit(), [19]);
    send(0xff, 0x41).unwrap();
    assert!(hit().is_empty());
    send(0xffff_ffff, 0x41).unwrap();
    assert_eq!(hit().len(), 20);
    send(0, 0xc_0041).unwrap();
    assert_eq!(hit().len(), 19);
    chips.write_msr(7, X2APIC + register::SELF_IPI, 0x42).unwrap();
    assert_eq!(hit(), [7]);
    // Devices reach the low IDs, and everyone.
    assert!(chips.send_msi(MsiMessage { address: 0xfee0_5000, data: 0x43 }));
    assert_eq!(hit(), [5]);
    assert!(chips.send_msi(MsiMessage { address: 0xfeef_f000, data: 0x43 }));
    assert_eq!(hit().len(), 20);
    // The page is gone, the ICR reads back whole.
    assert!(!chips.mmio_read(0, 0xfee0_0020, &mut [0; 4]));
    assert_eq!(chips.read_msr(0, X2APIC + register::ICR_LOW), Ok(0xc_0041));
}

#[test]
fn apic_ids_need_not_be_vcpu_numbers() {
    let board = Board::new(4);
    let chips = &board.chips;
    // Two sockets of three cores would number so.
    for (vcpu, id) in [(0, 0), (1, 1), (2, 2), (3, 4)] {
        chips.set_apic_id(vcpu, id);
    }
    assert_eq!(board.lapic_read(3, register::ID), 4 << 24);
    assert!(chips.send_msi(MsiMessage { address: 0xfee0_4000, data: 0x41 }));
    assert_eq!(chips.acknowledge(3), Some(0x41));
    assert!(!chips.send_msi(MsiMessage { address: 0xfee0_3000, data: 0x41 }));
    // Shorthands go by who sends.
    board.ipi(3, 0, 0xc_4042);
    assert!(!chips.has_interrupt(3));
    board.eoi(3);
    board.ipi(3, 0, 0x4_4042);
    assert_eq!(chips.acknowledge(3), Some(0x42));
}

#[test]
fn cpuid_says_what_the_lapic_can_do() {
    use x86::cpuid::{CpuidResult, CpuidTable};
    let board = Board::with(ChipsConfig::new(2));
    let mut table = CpuidTable::new();
    table.set(1, None, CpuidResult { ebx: 6 << 24, ..CpuidResult::default() });
    table.set(0x8000_0008, None, CpuidResult { eax: 0x3028, ..CpuidResult::default() });
    board.chips.set_cpuid(1, &table);
    assert_eq!(board.lapic_read(1, register::ID), 6 << 24);
    assert!(board.chips.write_msr(1, msr::APIC_BASE, 0xfee0_0c00).is_err());
    assert!(board.chips.write_msr(1, msr::APIC_BASE, 0xfee0_0800 | 1 << 40).is_err());
    table.update(1, |leaf| leaf.ecx = 1 << 21);
    board.chips.set_cpuid(1, &table);
    assert!(board.chips.write_msr(1, msr::APIC_BASE, 0xfee0_0c00).is_ok());
}

#[test]
fn lowest_priority_goes_to_the_least_busy_and_takes_turns() {
    let board = Board::new(4);
    let chips = &board.chips;
    let lowest = MsiMessage { address: 0xfeef_f00c, data: 0x0141 };
    chips.set_tpr(0, 3);
    chips.set_tpr(1, 2);
    chips.set_tpr(2, 3);
    board.lapic(3, register::SVR, 0xff);
    chips.send_msi(lowest);
    assert_eq!(chips.acknowledge(1), Some(0x41));
    // Now vCPU 1 is busy with class 4.
    chips.send_msi(lowest);
    assert!(chips.has_interrupt(0) ^ chips.has_interrupt(2));
    let first = if chips.has_interrupt(0) { 0 } else { 2 };
    assert_eq!(chips.acknowledge(first), Some(0x41));
    chips.send_msi(lowest);
    assert_eq!(chips.acknowledge(2 - first), Some(0x41));
    for vcpu in 0..4 {
        board.eoi(vcpu);
        chips.set_tpr(vcpu, 0);
    }
    // Among equals everyone gets some.
    let mut hits = [0; 4];
    for _ in 0..40 {
        chips.send_msi(lowest);
        for vcpu in 0..4u32 {
            if chips.acknowledge(vcpu).is_some() {
                hits[vcpu as usize] += 1;
                board.eoi(vcpu);
            }
        }
    }
    assert_eq!(hits[3], 0, "a disabled LAPIC takes no part");
    assert_eq!(hits.iter().sum::<i32>(), 40);
    assert!(hits[..3].iter().all(|hits| *hits >= 8), "{hits:?}");
}

#[test]
fn init_and_startup() {
    let board = Board::new(2);
    let chips = &board.chips;
    board.lapic(1, register::LVT_TIMER, 0x40);
    // A start-up IPI before the INIT is void afterwards.
    board.ipi(0, 1, 0x4605);
    board.told();
    board.ipi(0, 1, 0xc500);
    assert_eq!(board.told(), [1]);
    assert!(chips.has_signals(1));
    assert_eq!(chips.take_signals(1), Signals { init: true, ..Signals::default() });
    // A de-assertion is none.
    board.ipi(0, 1, 0x8500);
    assert!(!chips.has_signals(1));
    chips.init_lapic(1);
    assert_eq!(board.lapic_read(1, register::SVR), 0xff);
    assert_eq!(board.lapic_read(1, register::LVT_TIMER), 0x1_0000);
    assert_eq!(board.lapic_read(1, register::ID), 1 << 24);
    assert_eq!(chips.apic_base(1), 0xfee0_0800);
    // The first of two start-up IPIs is the one.
    board.ipi(0, 1, 0x469a);
    board.ipi(0, 1, 0x469b);
    assert_eq!(chips.take_signals(1), Signals { startup: Some(0x9a), ..Signals::default() });
    assert_eq!(chips.take_signals(1), Signals::default());
    // INIT and start-up both wait for a thread that has not looked yet.
    board.ipi(0, 1, 0xc500);
    board.ipi(0, 1, 0x4610);
    board.ipi(0, 1, 0x4400);
    assert_eq!(chips.take_signals(1), Signals { nmi: true, init: true, startup: Some(0x10) });
    // INIT works on a LAPIC that software has disabled, fixed interrupts do not.
    board.ipi(0, 1, 0x4041);
    assert!(!chips.has_interrupt(1));
    board.ipi(0, 1, 0xc500);
    assert!(chips.take_signals(1).init);
    // But nothing reaches one that is off.
    chips.write_msr(1, msr::APIC_BASE, 0xfee0_0000).unwrap();
    board.ipi(0, 1, 0xc500);
    assert!(!chips.has_signals(1));
    chips.inject_nmi(1);
    assert!(chips.take_signals(1).nmi);
}

#[test]
fn local_sources() {
    let board = Board::new(1);
    let chips = &board.chips;
    chips.pulse_local(0, LocalInterrupt::Lint1);
    assert!(!chips.has_signals(0));
    board.lapic(0, register::LVT_LINT1, 0x400);
    board.told();
    chips.pulse_local(0, LocalInterrupt::Lint1);
    assert_eq!(board.told(), [0]);
    assert_eq!(chips.take_signals(0), Signals { nmi: true, ..Signals::default() });
    board.lapic(0, register::LVT_PERFORMANCE, 0x61);
    chips.pulse_local(0, LocalInterrupt::Performance);
    assert_eq!(chips.acknowledge(0), Some(0x61));
    board.eoi(0);
    board.lapic(0, register::LVT_THERMAL, 0x500);
    chips.pulse_local(0, LocalInterrupt::Thermal);
    assert!(chips.take_signals(0).init);
}

#[test]
fn software_enable() {
    let board = Board::new(1);
    let chips = &board.chips;
    board.lapic(0, register::LVT_TIMER, 0x40);
    chips.send_msi(MsiMessage { address: 0xfee0_0000, data: 0x41 });
    board.lapic(0, register::SVR, 0xff);
    // What is in stays in, nothing new gets in, every LVT entry is masked and stays so.
    assert!(chips.has_interrupt(0));
    assert!(!chips.send_msi(MsiMessage { address: 0xfee0_0000, data: 0x61 }));
    assert_eq!(chips.acknowledge(0), Some(0x41));
    assert_eq!(board.lapic_read(0, register::LVT_TIMER), 0x1_0040);
    board.lapic(0, register::LVT_TIMER, 0x42);
    assert_eq!(board.lapic_read(0, register::LVT_TIMER), 0x1_0042);
    board.lapic(0, register::SVR, 0x1ff);
    assert_eq!(board.lapic_read(0, register::LVT_TIMER), 0x1_0042);
}
