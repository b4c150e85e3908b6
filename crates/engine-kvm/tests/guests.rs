//! Small guests on the host's KVM: what each interface of the engine does as the guest sees it.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use engine::memory::create_region;
use engine::{Doorbell, DoorbellAddress, Exit, IrqTarget, MpState, MsiMessage, Vcpu, VcpuState};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use x86::bits::rflags;
use x86::regs::Gpr;
use x86::{Exception, Vector, msr};

/// Registers of the LAPIC page (SDM 3A table 11-1).
const LAPIC: u64 = 0xfee0_0000;
const LAPIC_EOI: u64 = LAPIC + 0xb0;
const LAPIC_SPURIOUS: u64 = LAPIC + 0xf0;
const LAPIC_ICR_LOW: u64 = LAPIC + 0x300;
const LAPIC_ICR_HIGH: u64 = LAPIC + 0x310;
const LAPIC_TIMER: u64 = LAPIC + 0x320;
const LAPIC_INITIAL_COUNT: u64 = LAPIC + 0x380;
const LAPIC_DIVIDE: u64 = LAPIC + 0x3e0;
/// IOAPIC window (82093AA §3.1).
const IOAPIC_SELECT: u64 = 0xfec0_0000;
const IOAPIC_DATA: u64 = 0xfec0_0010;

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn done(a: &mut CodeAssembler, value: i32) {
    a.mov(al, value).unwrap();
    a.out(i32::from(DONE_PORT), al).unwrap();
}

fn ready(a: &mut CodeAssembler) {
    a.out(i32::from(READY_PORT), al).unwrap();
}

fn store(a: &mut CodeAssembler, address: u64, value: u32) {
    a.mov(dword_ptr(address), value).unwrap();
}

/// Enables the LAPIC in software.
fn enable_lapic(a: &mut CodeAssembler) {
    store(a, LAPIC_SPURIOUS, 0x1ff);
}

/// Waits with interrupts enabled, for ever.
fn wait(a: &mut CodeAssembler) {
    a.sti().unwrap();
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.hlt().unwrap();
    a.jmp(again).unwrap();
}

/// Programs the first 8259 for vectors from 20H, with only `line` open.
fn open_pic_line(a: &mut CodeAssembler, line: u32) {
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, !(1u32 << line) & 0xff)] {
        a.mov(al, value as i32).unwrap();
        a.out(port, al).unwrap();
    }
}

/// Installs a handler for `vector` that acknowledges at the LAPIC and says `value`.
fn lapic_handler(machine: &Machine, vector: u8, value: i32) {
    machine.handle(vector);
    machine.assemble(HANDLER, |a| {
        store(a, LAPIC_EOI, 0);
        done(a, value);
    });
}

#[test]
fn ports_of_every_width() {
    let Some(machine) = Machine::new(1) else { return };
    machine.board.inputs.lock().unwrap().extend([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]);
    machine.assemble(CODE, |a| {
        a.mov(eax, 0x8765_4321u32).unwrap();
        a.out(0x10, al).unwrap();
        a.out(0x11, ax).unwrap();
        a.out(0x12, eax).unwrap();
        a.mov(dx, 0x1234).unwrap();
        a.in_(al, dx).unwrap();
        a.mov(byte_ptr(DATA), al).unwrap();
        a.in_(ax, dx).unwrap();
        a.mov(word_ptr(DATA + 1), ax).unwrap();
        a.in_(eax, dx).unwrap();
        a.mov(dword_ptr(DATA + 3), eax).unwrap();
        done(a, 1);
    });
    let mut vcpu = machine.vcpu();
    assert_eq!(run_to_done(&machine, &mut *vcpu), 1);
    assert_eq!(machine.read(DATA, 7), [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]);
    assert_eq!(
        machine.board.accesses()[..6],
        [
            Access::PortWrite(0x10, vec![0x21]),
            Access::PortWrite(0x11, vec![0x21, 0x43]),
            Access::PortWrite(0x12, vec![0x21, 0x43, 0x65, 0x87]),
            Access::PortRead(0x1234, 1),
            Access::PortRead(0x1234, 2),
            Access::PortRead(0x1234, 4),
        ]
    );
    let stats = vcpu.kicker().stats();
    let handled = stats.iter().find(|(name, _)| name == "in/out handled in userspace");
    assert_eq!(handled.map(|(_, count)| *count), Some(7));
}

#[test]
fn string_accesses_arrive_element_by_element() {
    let Some(machine) = Machine::new(1) else { return };
    machine.write(DATA, &[1, 2, 3, 4, 5, 6]);
    machine.board.inputs.lock().unwrap().extend([9, 8, 7, 6]);
    machine.assemble(CODE, |a| {
        a.cld().unwrap();
        a.mov(esi, DATA as u32).unwrap();
        a.mov(ecx, 2).unwrap();
        a.mov(edx, 0x3f8).unwrap();
        a.rep().outsb().unwrap();
        a.mov(ecx, 2).unwrap();
        a.rep().outsw().unwrap();
        a.mov(edi, DATA as u32 + 0x100).unwrap();
        a.mov(ecx, 4).unwrap();
        a.rep().insb().unwrap();
        done(a, 1);
    });
    run_to_done(&machine, &mut *machine.vcpu());
    let mut expected = vec![
        Access::PortWrite(0x3f8, vec![1]),
        Access::PortWrite(0x3f8, vec![2]),
        Access::PortWrite(0x3f8, vec![3, 4]),
        Access::PortWrite(0x3f8, vec![5, 6]),
    ];
    expected.extend(vec![Access::PortRead(0x3f8, 1); 4]);
    assert_eq!(machine.board.accesses()[..8], expected);
    assert_eq!(machine.read(DATA + 0x100, 5), [9, 8, 7, 6, 0]);
}

#[test]
fn device_memory() {
    let Some(machine) = Machine::new(1) else { return };
    machine.board.inputs.lock().unwrap().extend([0xef, 0xbe, 0xad, 0xde, 0x5a]);
    machine.assemble(CODE, |a| {
        a.mov(eax, dword_ptr(DEVICE)).unwrap();
        a.mov(dword_ptr(DATA), eax).unwrap();
        a.mov(al, byte_ptr(DEVICE + 5)).unwrap();
        a.mov(byte_ptr(DATA + 4), al).unwrap();
        a.mov(word_ptr(DEVICE + 8), 0x1234).unwrap();
        store(a, DEVICE + 12, 0x0102_0304);
        done(a, 1);
    });
    run_to_done(&machine, &mut *machine.vcpu());
    assert_eq!(machine.read(DATA, 5), [0xef, 0xbe, 0xad, 0xde, 0x5a]);
    assert_eq!(
        machine.board.accesses()[..4],
        [
            Access::MmioRead(DEVICE, 4),
            Access::MmioRead(DEVICE + 5, 1),
            Access::MmioWrite(DEVICE + 8, vec![0x34, 0x12]),
            Access::MmioWrite(DEVICE + 12, vec![4, 3, 2, 1]),
        ]
    );
}

#[test]
fn a_line_interrupts_through_the_8259() {
    let Some(machine) = Machine::new(1) else { return };
    machine.handle(0x25);
    machine.assemble(HANDLER, |a| {
        a.mov(al, 0x20).unwrap();
        a.out(0x20, al).unwrap();
        done(a, 5);
    });
    machine.assemble(CODE, |a| {
        open_pic_line(a, 5);
        ready(a);
        wait(a);
    });
    let vm = machine.vm.clone();
    machine.board.when_ready(move || vm.set_irq_line(5, true).unwrap());
    assert_eq!(run_to_done(&machine, &mut *machine.vcpu()), 5);
    assert!(machine.vm.set_irq_line(24, true).is_err());
    let chips = machine.vm.chips().unwrap();
    assert_eq!((chips.pic_master.vector_base, chips.pic_master.imr), (0x20, 0xdf));
    assert_eq!(chips.pic_master.lines & 1 << 5, 1 << 5);
}

#[test]
fn messages_reach_the_lapic() {
    let Some(machine) = Machine::new(1) else { return };
    lapic_handler(&machine, 0x42, 6);
    machine.assemble(CODE, |a| {
        enable_lapic(a);
        ready(a);
        wait(a);
    });
    let vm = machine.vm.clone();
    machine.board.when_ready(move || vm.send_msi(MsiMessage { address: LAPIC, data: 0x42 }).unwrap());
    assert_eq!(run_to_done(&machine, &mut *machine.vcpu()), 6);
}

#[test]
fn an_event_raises_a_message() {
    let Some(machine) = Machine::new(1) else { return };
    lapic_handler(&machine, 0x43, 7);
    machine.assemble(CODE, |a| {
        enable_lapic(a);
        ready(a);
        wait(a);
    });
    let event = Arc::new(eventfd());
    let target = IrqTarget::Msi(MsiMessage { address: LAPIC, data: 0x43 });
    assert!(machine.vm.connect_irq_event(&event, target).unwrap());
    machine.board.when_ready({
        let event = event.clone();
        move || event.write(1).unwrap()
    });
    assert_eq!(run_to_done(&machine, &mut *machine.vcpu()), 7);
    machine.vm.disconnect_irq_event(&event, target).unwrap();
    assert!(machine.vm.disconnect_irq_event(&event, target).is_err(), "it was connected once");
}

#[test]
fn an_event_pulses_a_line() {
    let Some(machine) = Machine::new(1) else { return };
    machine.handle(0x23);
    machine.assemble(HANDLER, |a| done(a, 8));
    machine.assemble(CODE, |a| {
        open_pic_line(a, 3);
        ready(a);
        wait(a);
    });
    let event = Arc::new(eventfd());
    assert!(machine.vm.connect_irq_event(&event, IrqTarget::Line(3)).unwrap());
    machine.board.when_ready({
        let event = event.clone();
        move || event.write(1).unwrap()
    });
    assert_eq!(run_to_done(&machine, &mut *machine.vcpu()), 8);
    machine.vm.disconnect_irq_event(&event, IrqTarget::Line(3)).unwrap();
}

#[test]
fn the_lapic_timer_fires() {
    let Some(machine) = Machine::new(1) else { return };
    lapic_handler(&machine, 0x44, 9);
    machine.assemble(CODE, |a| {
        enable_lapic(a);
        store(a, LAPIC_DIVIDE, 0xb);
        store(a, LAPIC_TIMER, 0x44);
        store(a, LAPIC_INITIAL_COUNT, 100_000);
        wait(a);
    });
    assert_eq!(run_to_done(&machine, &mut *machine.vcpu()), 9);
}

#[test]
fn the_8254_ticks_at_ioapic_input_2() {
    let Some(machine) = Machine::new(1) else { return };
    machine.handle(0x45);
    // More than one tick: KVM has to hear each being acknowledged. The handler does not return, since a KVM that
    // emulates does not know IRET in protected mode.
    machine.assemble(HANDLER, |a| {
        let mut more = a.create_label();
        a.inc(dword_ptr(DATA)).unwrap();
        a.cmp(dword_ptr(DATA), 5).unwrap();
        a.jb(more).unwrap();
        done(a, 10);
        a.set_label(&mut more).unwrap();
        store(a, LAPIC_EOI, 0);
        wait(a);
    });
    machine.assemble(CODE, |a| {
        enable_lapic(a);
        store(a, IOAPIC_SELECT, 0x14);
        store(a, IOAPIC_DATA, 0x45);
        store(a, IOAPIC_SELECT, 0x15);
        store(a, IOAPIC_DATA, 0);
        // The same line reaches the first 8259: close it there. Channel 0, both bytes, rate generator, 2 ms.
        for (port, value) in [(0x21, 0xff), (0x43, 0x34), (0x40, 0x52), (0x40, 0x09)] {
            a.mov(al, value).unwrap();
            a.out(port, al).unwrap();
        }
        wait(a);
    });
    assert_eq!(run_to_done(&machine, &mut *machine.vcpu()), 10);
    let chips = machine.vm.chips().unwrap();
    assert_eq!(chips.ioapic.redirection[2] & 0xff, 0x45);
    let channel = chips.pit.channels[0];
    assert_eq!((channel.count, channel.mode, channel.access, channel.gate), (0x952, 2, 3, true));
}

#[test]
fn a_second_processor_starts_by_init_and_sipi() {
    let Some(machine) = Machine::new(2) else { return };
    machine.assemble_as(16, AP_CODE, |a| {
        a.mov(ax, 0).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(byte_ptr(DATA), 0x77).unwrap();
        done(a, 2);
        a.hlt().unwrap();
    });
    machine.assemble(CODE, |a| {
        enable_lapic(a);
        store(a, LAPIC_ICR_HIGH, 1 << 24);
        store(a, LAPIC_ICR_LOW, 0x4500);
        store(a, LAPIC_ICR_HIGH, 1 << 24);
        store(a, LAPIC_ICR_LOW, 0x4600 | (AP_CODE >> 12) as u32);
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        a.cmp(byte_ptr(DATA), 0x77).unwrap();
        a.jne(again).unwrap();
        done(a, 1);
    });
    let mut first = machine.vcpu();
    let mut second = machine.fresh_vcpu(1);
    assert_eq!(second.state().unwrap().mp_state, MpState::WaitForSipi);
    let second = std::thread::spawn(move || {
        let _deadline = Deadline::on(&*second);
        let exit = second.run().unwrap();
        (exit, second.state().unwrap())
    });
    let _deadline = Deadline::on(&*first);
    assert_eq!(first.run().unwrap(), Exit::Kicked);
    let (exit, state) = second.join().unwrap();
    assert_eq!(exit, Exit::Kicked);
    assert_eq!((state.segments.cs.selector, state.segments.cs.base), (0x200, AP_CODE));
    let mut done = machine.board.written(DONE_PORT);
    done.sort_unstable();
    assert_eq!(done, [1, 2]);
}

/// Runs `code` until another thread kicks, and checks that it can go on afterwards.
fn kick_out_of(code: impl FnOnce(&mut CodeAssembler)) {
    let Some(machine) = Machine::new(1) else { return };
    machine.assemble(CODE, code);
    let mut vcpu = machine.vcpu();
    let _deadline = Deadline::on(&*vcpu);
    for _ in 0..3 {
        let kicker = vcpu.kicker();
        let thread = std::thread::spawn(move || {
            // Sometimes before the guest runs, sometimes within: neither may be lost.
            std::thread::sleep(Duration::from_millis(5));
            kicker.kick();
        });
        assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        thread.join().unwrap();
    }
}

#[test]
fn a_kick_ends_a_busy_loop() {
    kick_out_of(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.jmp(again).unwrap();
    });
}

#[test]
fn a_kick_ends_a_halt() {
    kick_out_of(wait);
}

#[test]
fn a_kick_before_the_run_is_kept() {
    let Some(machine) = Machine::new(1) else { return };
    machine.assemble(CODE, |a| {
        done(a, 1);
        a.hlt().unwrap();
    });
    let mut vcpu = machine.vcpu();
    vcpu.kicker().kick();
    vcpu.kicker().kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(machine.board.accesses(), [], "not an instruction was executed");
    assert_eq!(vcpu.state().unwrap().regs.rip, CODE);
    assert_eq!(run_to_done(&machine, &mut *vcpu), 1);
}

#[test]
fn a_kick_reaches_a_processor_that_waits_for_init() {
    let Some(machine) = Machine::new(2) else { return };
    let _first = machine.vcpu();
    let mut second = machine.fresh_vcpu(1);
    let kicker = second.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        kicker.kick();
    });
    let _deadline = Deadline::on(&*second);
    assert_eq!(second.run().unwrap(), Exit::Kicked);
    thread.join().unwrap();
}

#[test]
fn a_fault_without_a_handler_is_a_triple_fault() {
    let Some(machine) = Machine::new(1) else { return };
    machine.assemble(CODE, |a| a.ud2().unwrap());
    let mut vcpu = machine.fresh_vcpu(0);
    let mut state = vcpu.state().unwrap();
    protected_mode(&mut state);
    state.segments.idt.limit = 0;
    vcpu.set_state(&state).unwrap();
    let _deadline = Deadline::on(&*vcpu);
    assert_eq!(vcpu.run().unwrap(), Exit::TripleFault);
}

#[test]
fn a_machine_that_halts_for_good_says_so() {
    // The second processor is never started.
    let Some(machine) = Machine::new(2) else { return };
    machine.assemble(CODE, |a| {
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    let mut first = machine.vcpu();
    let mut second = machine.fresh_vcpu(1);
    let (to_first, to_second) = (first.kicker(), second.kicker());
    let other = std::thread::spawn(move || {
        let _deadline = Deadline::on(&*second);
        let exit = second.run().unwrap();
        to_first.kick();
        exit
    });
    let _deadline = Deadline::on(&*first);
    let exit = first.run().unwrap();
    to_second.kick();
    let mut exits = [exit, other.join().unwrap()];
    exits.sort_by_key(|exit| *exit == Exit::Kicked);
    assert_eq!(exits, [Exit::AllHalted, Exit::Kicked]);
}

#[test]
fn a_machine_that_waits_for_an_interrupt_has_not_halted() {
    let Some(machine) = Machine::new(1) else { return };
    machine.assemble(CODE, wait);
    let mut vcpu = machine.vcpu();
    let kicker = vcpu.kicker();
    let thread = std::thread::spawn(move || {
        // Long enough for the halt watch to have looked more than once.
        std::thread::sleep(Duration::from_millis(2500));
        kicker.kick();
    });
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(vcpu.state().unwrap().mp_state, MpState::Halted);
    thread.join().unwrap();
}

#[test]
fn an_nmi_wakes_a_processor_with_interrupts_off() {
    let Some(machine) = Machine::new(1) else { return };
    machine.handle(2);
    machine.assemble(HANDLER, |a| done(a, 11));
    machine.assemble(CODE, |a| {
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    let mut vcpu = machine.vcpu();
    vcpu.inject_nmi().unwrap();
    assert_eq!(run_to_done(&machine, &mut *vcpu), 11);
    assert!(vcpu.state().unwrap().events.nmi_masked, "until IRET");
}

#[test]
fn written_pages_are_logged() {
    let Some(machine) = Machine::new(1) else { return };
    machine.assemble(CODE, |a| {
        store(a, 0x5000, 1);
        done(a, 1);
        store(a, 0x6000, 1);
        store(a, 0x7ffc, 1);
        done(a, 2);
    });
    let mut vcpu = machine.vcpu();
    assert!(machine.vm.take_dirty_log(0).is_err(), "the log is off");
    run_to_done(&machine, &mut *vcpu);
    machine.vm.set_dirty_log(0, true).unwrap();
    run_to_done(&machine, &mut *vcpu);
    assert_eq!(machine.vm.take_dirty_log(0).unwrap(), [1 << 6 | 1 << 7]);
    assert_eq!(machine.vm.take_dirty_log(0).unwrap(), [0]);
    machine.vm.set_dirty_log(0, false).unwrap();
    assert!(machine.vm.take_dirty_log(9).is_err(), "no such slot");
}

#[test]
fn doorbells_ring_without_leaving_the_kernel() {
    let Some(machine) = Machine::new(1) else { return };
    machine.assemble(CODE, |a| {
        a.mov(ax, 7).unwrap();
        a.out(0x60, ax).unwrap();
        store(a, DEVICE, 1);
        store(a, DEVICE, 2);
        a.mov(word_ptr(DEVICE + 0x10), 5).unwrap();
        store(a, DEVICE + 0x10, 5);
        a.mov(byte_ptr(DEVICE + 0x20), 5).unwrap();
        done(a, 1);
    });
    let bell = |address, len, value| (Doorbell { address, len, value }, eventfd());
    let bells = [
        bell(DoorbellAddress::Port(0x60), 2, None),
        bell(DoorbellAddress::Mmio(DEVICE), 4, Some(2)),
        bell(DoorbellAddress::Mmio(DEVICE + 0x10), 2, None),
        bell(DoorbellAddress::Mmio(DEVICE + 0x20), 0, None),
    ];
    for (doorbell, event) in &bells {
        assert!(machine.vm.connect_doorbell(*doorbell, event).unwrap());
    }
    let mut vcpu = machine.vcpu();
    run_to_done(&machine, &mut *vcpu);
    let rung: Vec<u64> = bells.iter().map(|(_, event)| event.read().unwrap_or(0)).collect();
    assert_eq!(rung, [1, 1, 1, 1]);
    assert_eq!(
        machine.board.accesses()[..2],
        [Access::MmioWrite(DEVICE, vec![1, 0, 0, 0]), Access::MmioWrite(DEVICE + 0x10, vec![5, 0, 0, 0])],
        "another value, another width"
    );
    for (doorbell, event) in &bells {
        machine.vm.disconnect_doorbell(*doorbell, event).unwrap();
        assert!(machine.vm.disconnect_doorbell(*doorbell, event).is_err());
    }
}

#[test]
fn read_only_memory_is_read_and_its_writes_are_the_boards() {
    const ROM: u64 = 0xf_0000;
    let Some(machine) = Machine::new(1) else { return };
    let rom = create_region("rom", ROM, 0x1000).unwrap();
    rom.write_slice(&[0xaa, 0xbb], MemoryRegionAddress(0)).unwrap();
    machine.vm.map_memory(1, rom.clone(), false).unwrap();
    assert!(machine.vm.map_memory(1, rom.clone(), false).is_err(), "the slot is taken");
    machine.assemble(CODE, |a| {
        a.mov(ax, word_ptr(ROM)).unwrap();
        a.mov(word_ptr(DATA), ax).unwrap();
        a.mov(byte_ptr(ROM + 1), 0x55).unwrap();
        done(a, 1);
        a.mov(al, byte_ptr(ROM)).unwrap();
        done(a, 2);
    });
    let mut vcpu = machine.vcpu();
    run_to_done(&machine, &mut *vcpu);
    assert_eq!(machine.read(DATA, 2), [0xaa, 0xbb]);
    assert_eq!(machine.board.accesses()[0], Access::MmioWrite(ROM + 1, vec![0x55]));
    let mut bytes = [0; 2];
    rom.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
    assert_eq!(bytes, [0xaa, 0xbb]);
    // Without the mapping the same address is a device's.
    machine.vm.unmap_memory(1).unwrap();
    assert!(machine.vm.unmap_memory(1).is_err());
    run_to_done(&machine, &mut *vcpu);
    assert!(machine.board.accesses().contains(&Access::MmioRead(ROM, 1)));
}

/// State without what passes by itself.
fn timeless(mut state: VcpuState) -> VcpuState {
    const CURRENT_COUNT: usize = 0x39;
    state.msrs.retain(|(index, _)| !matches!(*index, msr::TSC | msr::TSC_ADJUST) && *index < 0x4b56_4d00);
    state.msrs.sort_unstable();
    state.lapic.registers[CURRENT_COUNT] = 0;
    state
}

#[test]
fn a_saved_machine_goes_on_in_another() {
    let Some(machine) = Machine::new(1) else { return };
    lapic_handler(&machine, 0x46, 3);
    machine.assemble(CODE, |a| {
        enable_lapic(a);
        open_pic_line(a, 1);
        a.mov(ebx, 0x1357_9bdfu32).unwrap();
        // An MSR and a debug register to find again.
        a.mov(ecx, msr::SYSENTER_EIP).unwrap();
        a.mov(eax, 0x1234_5678u32).unwrap();
        a.mov(edx, 0).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 0x3000u32).unwrap();
        a.mov(dr0, eax).unwrap();
        a.cli().unwrap();
        done(a, 1);
        // Continues in the second machine; the message that waits there comes with STI.
        a.mov(dword_ptr(DATA), ebx).unwrap();
        a.rdmsr().unwrap();
        a.mov(dword_ptr(DATA + 4), eax).unwrap();
        a.mov(eax, dr0).unwrap();
        a.mov(dword_ptr(DATA + 8), eax).unwrap();
        wait(a);
    });
    let mut vcpu = machine.vcpu();
    assert_eq!(run_to_done(&machine, &mut *vcpu), 1);
    machine.vm.send_msi(MsiMessage { address: LAPIC, data: 0x46 }).unwrap();
    let saved = vcpu.state().unwrap();
    let chips = machine.vm.chips().unwrap();
    assert_eq!(saved.msr(msr::SYSENTER_EIP), Some(0x1234_5678));
    assert_eq!(saved.lapic.registers[0x22] & 1 << 6, 1 << 6, "vector 46H waits in the IRR");

    let Some(other) = Machine::new(1) else { return };
    machine.copy_memory_to(&other);
    let mut restored = other.fresh_vcpu(0);
    other.vm.set_chips(&chips).unwrap();
    restored.set_state(&saved).unwrap();
    assert_eq!(timeless(restored.state().unwrap()), timeless(saved));
    let mut loaded = other.vm.chips().unwrap();
    for (channel, original) in loaded.pit.channels.iter_mut().zip(chips.pit.channels) {
        channel.elapsed_ns = original.elapsed_ns;
    }
    assert_eq!(loaded, chips);
    assert_eq!(run_to_done(&other, &mut *restored), 3);
    let data: Vec<u32> = other.read(DATA, 12).chunks(4).map(number).collect();
    assert_eq!(data, [0x1357_9bdf, 0x1234_5678, 0x3000]);
}

#[test]
fn a_snapshot_carries_what_was_added_to_the_tsc() {
    let Some(first) = Machine::new(1) else { return };
    first.assemble(CODE, |a| {
        a.mov(ecx, msr::TSC_ADJUST).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(eax, 0x1234_5678).unwrap();
        a.wrmsr().unwrap();
        done(a, 1);
        a.mov(ecx, msr::TSC_ADJUST).unwrap();
        a.rdmsr().unwrap();
        a.mov(dx, u32::from(DONE_PORT)).unwrap();
        a.out(dx, eax).unwrap();
        a.hlt().unwrap();
    });
    let mut vcpu = first.vcpu();
    if vcpu.state().unwrap().msr(msr::TSC_ADJUST).is_none() {
        println!("skipped: this KVM has no TSC_ADJUST");
        return;
    }
    assert_eq!(run_to_done(&first, &mut *vcpu), 1);
    let saved = vcpu.state().unwrap();
    assert_eq!(saved.msr(msr::TSC_ADJUST), Some(0x1234_5678));
    let second = Machine::new(1).unwrap();
    first.copy_memory_to(&second);
    let mut vcpu = second.vcpu();
    vcpu.set_state(&saved).unwrap();
    assert_eq!(run_to_done(&second, &mut *vcpu), 0x1234_5678);
}

/// An MSR that neither KVM nor any processor knows.
const NO_MSR: u32 = 0x1234;

#[test]
fn unknown_msrs_fault_unless_the_machine_is_lenient() {
    for strict in [true, false] {
        let Some(machine) = Machine::with(1, strict) else { return };
        machine.handle(13);
        machine.assemble(HANDLER, |a| {
            done(a, 13);
            a.hlt().unwrap();
        });
        machine.assemble(CODE, |a| {
            a.mov(ecx, NO_MSR).unwrap();
            a.mov(eax, 0x55).unwrap();
            a.mov(edx, 0x66).unwrap();
            a.wrmsr().unwrap();
            a.rdmsr().unwrap();
            a.or(eax, edx).unwrap();
            a.mov(dx, u32::from(DONE_PORT)).unwrap();
            a.out(dx, eax).unwrap();
            // A register that exists is checked all the same.
            a.mov(ecx, msr::EFER).unwrap();
            a.mov(edx, 0).unwrap();
            a.mov(eax, 2).unwrap();
            a.wrmsr().unwrap();
            done(a, 1);
        });
        let mut vcpu = machine.vcpu();
        if !strict {
            assert_eq!(run_to_done(&machine, &mut *vcpu), 0, "reads as zero");
        }
        assert_eq!(run_to_done(&machine, &mut *vcpu), 13, "strict: {strict}");
    }
}

#[test]
fn a_reset_state_loads() {
    let Some(machine) = Machine::new(2) else { return };
    let mut first = machine.fresh_vcpu(0);
    let mut second = machine.fresh_vcpu(1);
    first.set_state(&VcpuState::reset(0)).unwrap();
    second.set_state(&VcpuState::reset(1)).unwrap();
    let state = first.state().unwrap();
    assert_eq!(
        (state.segments.cs.base, state.regs.rip, state.mp_state),
        (0xffff_0000, 0xfff0, MpState::Running)
    );
    assert_eq!(second.state().unwrap().mp_state, MpState::WaitForSipi);
    assert_eq!(second.state().unwrap().lapic.registers[2] >> 24, 1);
}

#[test]
fn a_pending_exception_is_delivered() {
    let Some(machine) = Machine::new(1) else { return };
    machine.handle(13);
    machine.assemble(HANDLER, |a| {
        a.pop(ebx).unwrap();
        done(a, 12);
    });
    machine.assemble(CODE, |a| done(a, 1));
    let mut vcpu = machine.vcpu();
    let mut state = vcpu.state().unwrap();
    state.events.exception = Some(Exception::with_code(Vector::GeneralProtection, 0x18));
    vcpu.set_state(&state).unwrap();
    assert_eq!(vcpu.state().unwrap().events.exception, state.events.exception);
    assert_eq!(run_to_done(&machine, &mut *vcpu), 12);
    assert_eq!(vcpu.state().unwrap().regs.gpr[Gpr::Rbx as usize], 0x18);
}

#[test]
fn a_halted_processor_stays_halted() {
    let Some(machine) = Machine::new(1) else { return };
    lapic_handler(&machine, 0x47, 13);
    machine.assemble(CODE, |a| {
        enable_lapic(a);
        ready(a);
        wait(a);
    });
    let mut vcpu = machine.vcpu();
    let kicker = vcpu.kicker();
    machine.board.when_ready(move || kicker.kick());
    let _deadline = Deadline::on(&*vcpu);
    // The kick comes before the HLT; a few more let the guest take the steps to it, however slow its host is.
    let patience = Instant::now() + Duration::from_secs(60);
    let saved = loop {
        assert!(Instant::now() < patience, "the guest never halts");
        assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
        let state = vcpu.state().unwrap();
        if state.mp_state == MpState::Halted {
            break state;
        }
        let kicker = vcpu.kicker();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1));
            kicker.kick();
        });
    };
    assert_ne!(saved.regs.rflags & rflags::IF, 0);

    let Some(other) = Machine::new(1) else { return };
    machine.copy_memory_to(&other);
    let mut restored = other.fresh_vcpu(0);
    restored.set_state(&saved).unwrap();
    other.vm.send_msi(MsiMessage { address: LAPIC, data: 0x47 }).unwrap();
    assert_eq!(run_to_done(&other, &mut *restored), 13);
}

#[test]
fn states_that_cannot_be_are_refused() {
    let Some(machine) = Machine::new(1) else { return };
    let mut vcpu = machine.vcpu();
    let good = vcpu.state().unwrap();
    let refused = |vcpu: &mut dyn Vcpu, change: fn(&mut VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        vcpu.set_state(&state).unwrap_err().to_string()
    };
    assert!(refused(&mut *vcpu, |s| s.xsave.truncate(100)).contains("100 bytes"));
    assert!(refused(&mut *vcpu, |s| s.lapic.registers.truncate(3)).contains("the state has 3"));
    assert!(refused(&mut *vcpu, |s| s.control.xcr0 = 1 << 62).contains("XSAVE components"));
    assert!(refused(&mut *vcpu, |s| s.set_msr(0x7777, 1)).contains("0x7777"));
    vcpu.set_state(&good).unwrap();
}

#[test]
fn vector_registers_survive_a_move() {
    if !kvm_is_fit() {
        return;
    }
    let Some(machine) = Machine::new(1) else { return };
    machine.write(DATA, &[0x5a; 32]);
    machine.assemble(CODE, |a| {
        a.vmovdqu(ymm3, ymmword_ptr(DATA)).unwrap();
        done(a, 1);
        a.vmovdqu(ymmword_ptr(DATA + 64), ymm3).unwrap();
        done(a, 2);
    });
    let with_avx = |state: &mut VcpuState| {
        protected_mode(state);
        state.control.cr4 |= x86::bits::cr4::OSFXSR | x86::bits::cr4::OSXSAVE;
        state.control.xcr0 = 7;
    };
    let mut vcpu = machine.fresh_vcpu(0);
    let mut state = vcpu.state().unwrap();
    with_avx(&mut state);
    vcpu.set_state(&state).unwrap();
    run_to_done(&machine, &mut *vcpu);
    let saved = vcpu.state().unwrap();
    assert_eq!(saved.xsave[160 + 3 * 16..160 + 4 * 16], [0x5a; 16]);
    assert_eq!(saved.xsave[576 + 3 * 16..576 + 4 * 16], [0x5a; 16]);

    let Some(other) = Machine::new(1) else { return };
    machine.copy_memory_to(&other);
    let mut restored = other.fresh_vcpu(0);
    restored.set_state(&saved).unwrap();
    run_to_done(&other, &mut *restored);
    assert_eq!(other.read(DATA + 64, 32), [0x5a; 32]);
}
