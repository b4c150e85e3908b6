//! Random accesses.

use proptest::prelude::*;

use super::*;

/// One access of a guest or a device.
#[derive(Clone, Debug)]
enum Poke {
    Out(u16, u8),
    In(u16),
    Write(u32, u64, Vec<u8>),
    Read(u32, u64, usize),
    WriteMsr(u32, u32, u64),
    ReadMsr(u32, u32),
    Line(u32, bool),
    Msi(u64, u32),
    Acknowledge(u32),
    Signals(u32),
    Tpr(u32, u8),
    Pass(u64),
    SaveAndLoad,
}

fn poke() -> impl Strategy<Value = Poke> {
    let port = prop::sample::select(vec![
        0x20u16, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x4d0, 0x4d1, 0x22,
    ]);
    let page = prop_oneof![
        (0u64..0x400).prop_map(|offset| 0xfee0_0000 + offset),
        (0u64..0x40).prop_map(|number| 0xfee0_0000 + number * 16),
        prop::sample::select(vec![IOAPIC_BASE, IOAPIC_BASE + 0x10, IOAPIC_BASE + 0x40, IOAPIC_BASE + 0xfff]),
    ];
    let index = prop_oneof![Just(msr::APIC_BASE), Just(msr::TSC_DEADLINE), X2APIC..X2APIC + 0x40];
    let value = prop_oneof![
        any::<u64>(),
        0u64..0x2_0000,
        prop::sample::select(vec![0xfee0_0800u64, 0xfee0_0c00, 0xfee0_0000])
    ];
    prop_oneof![
        (port.clone(), any::<u8>()).prop_map(|(port, value)| Poke::Out(port, value)),
        port.prop_map(Poke::In),
        (0u32..3, page.clone(), prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(vcpu, gpa, data)| Poke::Write(vcpu, gpa, data)),
        (0u32..3, page.clone(), 0u32..0x9_0000).prop_map(|(vcpu, gpa, value)| Poke::Write(
            vcpu,
            gpa,
            value.to_le_bytes().to_vec()
        )),
        (0u32..3, page, 0usize..17).prop_map(|(vcpu, gpa, len)| Poke::Read(vcpu, gpa, len)),
        (0u32..3, index.clone(), value).prop_map(|(vcpu, index, value)| Poke::WriteMsr(vcpu, index, value)),
        (0u32..3, index).prop_map(|(vcpu, index)| Poke::ReadMsr(vcpu, index)),
        (0u32..26, any::<bool>()).prop_map(|(gsi, level)| Poke::Line(gsi, level)),
        (0u64..0x10_0000, any::<u32>()).prop_map(|(low, data)| Poke::Msi(0xfee0_0000 + low, data)),
        (0u32..3).prop_map(Poke::Acknowledge),
        (0u32..3).prop_map(Poke::Signals),
        (0u32..3, 0u8..16).prop_map(|(vcpu, tpr)| Poke::Tpr(vcpu, tpr)),
        (0u64..100_000_000).prop_map(Poke::Pass),
        Just(Poke::SaveAndLoad),
    ]
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(pokes in prop::collection::vec(poke(), 1..300)) {
        let board = Board::new(3);
        let chips = &board.chips;
        for poke in pokes {
            match poke {
                Poke::Out(port, value) => board.out(port, value),
                Poke::In(port) => {
                    board.input(port);
                }
                Poke::Write(vcpu, gpa, data) => {
                    chips.mmio_write(vcpu, gpa, &data);
                }
                Poke::Read(vcpu, gpa, len) => {
                    chips.mmio_read(vcpu, gpa, &mut vec![0; len]);
                }
                Poke::WriteMsr(vcpu, index, value) => {
                    // A fault is a fine answer.
                    let _ = chips.write_msr(vcpu, index, value);
                }
                Poke::ReadMsr(vcpu, index) => {
                    let _ = chips.read_msr(vcpu, index);
                }
                Poke::Line(gsi, level) => chips.set_irq_line(gsi, level),
                Poke::Msi(address, data) => {
                    chips.send_msi(MsiMessage { address, data });
                }
                Poke::Acknowledge(vcpu) => {
                    let (has, peeked) = (chips.has_interrupt(vcpu), chips.peek(vcpu));
                    prop_assert_eq!(has, peeked.is_some());
                    prop_assert_eq!(chips.acknowledge(vcpu), peeked);
                }
                Poke::Signals(vcpu) => {
                    if chips.take_signals(vcpu).init {
                        chips.init_lapic(vcpu);
                    }
                }
                Poke::Tpr(vcpu, tpr) => chips.set_tpr(vcpu, tpr),
                Poke::Pass(ns) => {
                    let now_ns = board.time.now_ns() + ns;
                    if let Some(next) = board.advance(now_ns) {
                        prop_assert!(next > now_ns, "a timer is still due");
                    }
                }
                Poke::SaveAndLoad => {
                    let state = chips.chips();
                    chips.set_chips(&state);
                    prop_assert_eq!(chips.chips(), state);
                    for vcpu in 0..3 {
                        let (base, state) = (chips.apic_base(vcpu), chips.lapic_state(vcpu));
                        let deadline = chips.read_msr(vcpu, msr::TSC_DEADLINE).unwrap();
                        chips.set_lapic_state(vcpu, base, &state).unwrap();
                        chips.write_msr(vcpu, msr::TSC_DEADLINE, deadline).unwrap();
                        prop_assert_eq!(chips.lapic_state(vcpu), state);
                    }
                }
            }
            // What the words say is what the chips would give.
            for vcpu in 0..3 {
                prop_assert_eq!(chips.has_interrupt(vcpu), chips.peek(vcpu).is_some());
            }
        }
    }
}
