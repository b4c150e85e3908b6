//! Modes, privileges, gates, tasks and traps as guests see them.

mod common;

use common::*;
use engine::{Exit, Vcpu};
use engine_soft::cpu::{Mode, seg};
use iced_x86::code_asm::*;
use x86::bits::{cr0, cr4, dr6, rflags};
use x86::{Exception, Segment, Vector};

/// A 16-byte gate of the long-mode IDT.
fn long_gate(bench: &Bench, vector: u64, offset: u64, attributes: u16, ist: u8) {
    let low = offset & 0xffff
        | 0x08 << 16
        | u64::from(ist) << 32
        | u64::from(attributes) << 40
        | (offset >> 16 & 0xffff) << 48;
    bench.set64(IDT + 16 * vector, low);
    bench.set64(IDT + 16 * vector + 8, offset >> 32);
}

/// An 8-byte gate.
fn gate(bench: &Bench, at: u64, selector: u16, offset: u32, attributes: u16, count: u8) {
    let offset = u64::from(offset);
    let low =
        offset & 0xffff | u64::from(selector) << 16 | u64::from(count) << 32 | u64::from(attributes) << 40;
    bench.set64(at, low | (offset >> 16) << 48);
}

#[test]
fn real_mode_interrupts_and_back() {
    let mut bench = Bench::new(1);
    let mut state = engine::VcpuState::reset(0);
    state.segments.cs = Segment::real_mode(0x1000, true);
    state.segments.ss = Segment::real_mode(0x2000, false);
    state.regs.rip = 0;
    state.regs.gpr[4] = 0x100;
    state.regs.rflags |= rflags::IF | rflags::CF;
    state.segments.idt.limit = 0x3ff;
    bench.set32(4 * 0x21, 0x3000_0010);
    bench.assemble(16, 0x10000, |a| {
        a.int(0x21)?;
        a.mov(bx, 1)
    });
    bench.assemble(16, 0x30010, |a| a.iret());
    bench.load(&state);
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.mode, cpu.segments[seg::CS].selector, cpu.user.rip), (Mode::Real, 0x3000, 0x10));
    assert_eq!(cpu.user.gpr[4], 0xfa);
    assert_eq!(cpu.rflags() & rflags::IF, 0);
    assert_eq!(bench.get32(0x200fa), 0x1000_0002, "return address");
    assert_eq!(bench.get32(0x200fe) as u16 & 0x201, 0x201, "flags");
    bench.cpu().step().unwrap();
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.user.gpr[3], cpu.user.gpr[4]), (1, 0x100));
    assert_eq!(cpu.rflags() & (rflags::IF | rflags::CF), rflags::IF | rflags::CF);
}

#[test]
fn real_to_protected_to_long() {
    let mut bench = Bench::new(1);
    bench.long_mode(0);
    bench.protected_mode();
    bench.set64(GDT + 0x28, descriptor(0, 0xf_ffff, 0xa09b));
    let mut state = engine::VcpuState::reset(0);
    state.segments.cs = Segment::real_mode(0, true);
    state.regs.rip = 0x5000;
    state.segments.gdt.base = GDT;
    bench.assemble(16, 0x5000, |a| {
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea])?; // JMP 08:00005100
        a.dd(&[0x5100])?;
        a.dw(&[0x08])
    });
    bench.assemble(32, 0x5100, |a| {
        a.mov(eax, (cr4::PAE) as u32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PML4 as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?; // JMP 28:00005200
        a.dd(&[0x5200])?;
        a.dw(&[0x28])
    });
    bench.assemble(64, 0x5200, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.hlt()
    });
    bench.load(&state);
    let mut modes = vec![bench.cpu().mode];
    for _ in 0..17 {
        bench.cpu().step().unwrap();
        let mode = bench.cpu().mode;
        if modes.last() != Some(&mode) {
            modes.push(mode);
        }
    }
    assert_eq!(modes, [Mode::Real, Mode::Protected, Mode::Compatibility, Mode::Long]);
    assert_eq!(bench.cpu().user.gpr[0], 0x1122_3344_5566_7788);
}

#[test]
fn segment_loads_are_checked() {
    let mut bench = Bench::new(1);
    let state = bench.protected_mode();
    bench.set64(GDT + 0x28, descriptor(0, 0xf_ffff, 0xc013)); // not present
    bench.set64(GDT + 0x30, descriptor(0, 0xf_ffff, 0xc099)); // execute-only code
    bench.set64(GDT + 0x38, descriptor(0, 0xfff, 0x4097)); // expand-down, limit FFFh, big
    let gp = |selector| Err(Exception::gp(selector));
    let with = |vector, selector| Err(Exception::with_code(vector, selector));
    let cases: [(usize, u16, Result<(), Exception>); 12] = [
        (seg::DS, 0x10, Ok(())),
        (seg::DS, 0x00, Ok(())),
        (seg::DS, 0x08, Ok(())),
        (seg::DS, 0x28, with(Vector::SegmentNotPresent, 0x28)),
        (seg::DS, 0x30, gp(0x30)),
        (seg::DS, 0x13, gp(0x10)),
        (seg::DS, 0x1f8, gp(0x1f8)),
        (seg::DS, 0x14, gp(0x14)),
        (seg::SS, 0x00, gp(0)),
        (seg::SS, 0x08, gp(0x08)),
        (seg::SS, 0x20, gp(0x20)),
        (seg::SS, 0x28, with(Vector::StackFault, 0x28)),
    ];
    for (index, selector, expected) in cases {
        bench.load(&state);
        let cpu = bench.cpu();
        let result = cpu.load_segment(index, selector).map_err(|_| cpu.fault);
        assert_eq!(result, expected, "register {index}, selector {selector:#x}");
    }
    // Expand-down: only offsets above the limit exist.
    bench.load(&state);
    assert!(bench.cpu().load_segment(seg::ES, 0x38).is_ok());
    bench.assemble(32, CODE, |a| {
        a.mov(eax, dword_ptr(0x1000).es())?;
        a.mov(eax, dword_ptr(0xffd).es())
    });
    assert_eq!(bench.cpu().step(), Ok(()));
    assert_eq!(bench.cpu().step(), Err(Exception::gp(0)));
    // Code cannot be written, a null segment not used.
    bench.assemble(32, CODE, |a| a.mov(dword_ptr(0x1000).cs(), eax));
    bench.load(&state);
    assert_eq!(bench.cpu().step(), Err(Exception::gp(0)));
}

/// TSS for 32-bit tests: stack of ring 0 at 10:30000.
fn tss32(bench: &Bench, state: &mut engine::VcpuState) {
    bench.set32(TSS + 4, 0x30000);
    bench.set32(TSS + 8, 0x10);
    bench.set64(GDT + 0x40, descriptor(TSS as u32, 0x67, 0x008b));
    state.segments.tr = Segment { selector: 0x40, attributes: 0x8b, limit: 0x67, base: TSS, unusable: false };
}

fn ring3(state: &mut engine::VcpuState) {
    state.segments.cs = flat(0x1b, 0xc0fb);
    let data = flat(0x23, 0xc0f3);
    state.segments.ss = data;
    state.segments.ds = data;
    state.segments.es = data;
}

#[test]
fn call_gate_inwards_and_return() {
    let mut bench = Bench::new(1);
    let mut state = bench.protected_mode();
    tss32(&bench, &mut state);
    ring3(&mut state);
    gate(&bench, GDT + 0x48, 0x08, 0x12000, 0xec, 2); // DPL 3, two parameters
    bench.assemble(32, CODE, |a| {
        a.push(0x1111)?;
        a.push(0x2222)?;
        a.db(&[0x9a])?; // CALL 4B:0
        a.dd(&[0])?;
        a.dw(&[0x4b])
    });
    bench.assemble(32, 0x12000, |a| a.db(&[0xca, 8, 0])); // RETF 8
    bench.load(&state);
    for _ in 0..3 {
        bench.cpu().step().unwrap();
    }
    let back = bench.cpu().user.gpr[4];
    assert_eq!((bench.cpu().cpl, bench.cpu().user.rip, back), (0, 0x12000, 0x30000 - 24));
    let frame: Vec<u32> = (0..6).map(|i| bench.get32(back + 4 * i)).collect();
    assert_eq!(frame, [CODE as u32 + 17, 0x1b, 0x2222, 0x1111, STACK as u32 - 8, 0x23]);
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.cpl, cpu.user.rip, cpu.user.gpr[4]), (3, CODE + 17, STACK));
    assert_eq!(cpu.segments[seg::SS].selector, 0x23);
}

#[test]
fn interrupt_from_ring_3_and_iret() {
    let mut bench = Bench::new(1);
    let mut state = bench.protected_mode();
    tss32(&bench, &mut state);
    ring3(&mut state);
    state.regs.rflags |= rflags::IF;
    gate(&bench, IDT + 8 * 0x80, 0x08, 0x12000, 0xee, 0);
    gate(&bench, IDT + 8 * 0x81, 0x08, 0x12000, 0x8e, 0);
    bench.assemble(32, CODE, |a| {
        a.int(0x80)?;
        a.int(0x81)
    });
    bench.assemble(32, 0x12000, |a| a.iretd());
    bench.load(&state);
    bench.cpu().step().unwrap();
    let top = bench.cpu().user.gpr[4];
    assert_eq!((bench.cpu().cpl, top), (0, 0x30000 - 20));
    assert_eq!(bench.cpu().rflags() & rflags::IF, 0);
    assert_eq!(
        [bench.get32(top), bench.get32(top + 4), bench.get32(top + 12), bench.get32(top + 16)],
        [CODE as u32 + 2, 0x1b, STACK as u32, 0x23]
    );
    bench.cpu().step().unwrap();
    assert_eq!((bench.cpu().cpl, bench.cpu().user.rip), (3, CODE + 2));
    assert_ne!(bench.cpu().rflags() & rflags::IF, 0);
    // A gate of ring 0 is not for INT n: #GP with the entry's number and the IDT bit.
    assert_eq!(bench.cpu().step(), Err(Exception::gp(0x81 << 3 | 2)));
}

#[test]
fn virtual_8086_and_out_of_it() {
    let mut bench = Bench::new(1);
    let mut state = bench.protected_mode();
    tss32(&bench, &mut state);
    let top = STACK - 36;
    for (index, value) in
        [0x0u32, 0x1100, (rflags::VM | rflags::IF | 2) as u32, 0x100, 0x1200, 0x1300, 0x1400, 0x1500, 0x1600]
            .into_iter()
            .enumerate()
    {
        bench.set32(top + 4 * index as u64, value);
    }
    state.regs.gpr[4] = top;
    gate(&bench, IDT + 8 * 13, 0x08, 0x12000, 0x8e, 0);
    bench.assemble(32, CODE, |a| a.iretd());
    bench.assemble(16, 0x11000, |a| {
        a.mov(ax, ds)?;
        a.int(0x21)
    });
    bench.load(&state);
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.mode, cpu.cpl, cpu.linear_ip(cpu.user.rip)), (Mode::Virtual8086, 3, 0x11000));
    bench.cpu().step().unwrap();
    assert_eq!(bench.cpu().user.gpr[0] as u16, 0x1400);
    // INT with IOPL 0 faults, and the fault leaves virtual-8086 mode.
    assert!(bench.cpu().execute().is_ok());
    let cpu = bench.cpu();
    assert_eq!((cpu.mode, cpu.cpl, cpu.user.rip), (Mode::Protected, 0, 0x12000));
    let top = cpu.user.gpr[4];
    assert_eq!(top, 0x30000 - 40);
    assert!(bench.cpu().segments[seg::DS].unusable);
    let frame: Vec<u32> = (0..10).map(|i| bench.get32(top + 4 * i)).collect();
    assert_eq!(frame[..3], [0, 2, 0x1100]);
    assert_ne!(frame[3] & rflags::VM as u32, 0);
    assert_eq!(frame[4..], [0x100, 0x1200, 0x1300, 0x1400, 0x1500, 0x1600]);
}

#[test]
fn a_task_calls_another_and_gets_control_back() {
    let mut bench = Bench::new(1);
    let mut state = bench.protected_mode();
    tss32(&bench, &mut state);
    const OTHER: u64 = 0x9000;
    bench.set64(GDT + 0x50, descriptor(OTHER as u32, 0x67, 0x0089));
    for (offset, value) in [
        (0x20, 0x13000),
        (0x24, 2),
        (0x28, 0xabcd),
        (0x38, 0x28000),
        (0x48, 0x10),
        (0x4c, 0x08),
        (0x50, 0x10),
        (0x54, 0x10),
        (0x58, 0),
        (0x5c, 0),
    ] {
        bench.set32(OTHER + offset, value);
    }
    bench.assemble(32, CODE, |a| {
        a.mov(eax, 0x55)?;
        a.db(&[0x9a])?; // CALL 50:0
        a.dd(&[0])?;
        a.dw(&[0x50])?;
        a.inc(eax)
    });
    bench.assemble(32, 0x13000, |a| a.iretd());
    bench.load(&state);
    bench.cpu().step().unwrap();
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.user.rip, cpu.user.gpr[0], cpu.user.gpr[4]), (0x13000, 0xabcd, 0x28000));
    assert_eq!(cpu.tr.selector, 0x50);
    assert_ne!(cpu.rflags() & rflags::NT, 0);
    assert_ne!(cpu.control.cr0 & cr0::TS, 0);
    assert_eq!(bench.get32(OTHER) as u16, 0x40, "back link");
    assert_eq!(bench.get64(GDT + 0x50) >> 40 & 0xf, 0xb, "busy");
    bench.cpu().step().unwrap();
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.user.gpr[0], cpu.user.gpr[4], cpu.tr.selector), (0x56, STACK, 0x40));
    assert_eq!(cpu.rflags() & rflags::NT, 0);
    assert_eq!(bench.get64(GDT + 0x50) >> 40 & 0xf, 0x9, "available again");
    // Calling a busy task (the own one) is refused.
    bench.assemble(32, CODE, |a| {
        a.db(&[0x9a])?;
        a.dd(&[0])?;
        a.dw(&[0x40])
    });
    bench.load(&state);
    assert_eq!(bench.cpu().step(), Err(Exception::gp(0x40)));
}

/// 64-bit user code with a kernel: GDT, TSS with stack and IST.
fn long_user(bench: &Bench) -> engine::VcpuState {
    let mut state = bench.long_mode(3);
    bench.set64(GDT + 0x08, descriptor(0, 0xf_ffff, 0xa09b));
    bench.set64(GDT + 0x18, descriptor(0, 0xf_ffff, 0xa0fb));
    bench.set64(GDT + 0x20, descriptor(0, 0xf_ffff, 0xc0f3));
    state.segments.cs = flat(0x1b, 0xa0fb);
    state.segments.ss = flat(0x23, 0xc0f3);
    bench.set64(TSS + 4, 0x30008);
    bench.set64(TSS + 0x24, 0x38000);
    state.segments.tr = Segment { selector: 0x40, attributes: 0x8b, limit: 0x67, base: TSS, unusable: false };
    state
}

#[test]
fn long_mode_interrupts_switch_and_align_stacks() {
    let mut bench = Bench::new(1);
    let state = long_user(&bench);
    long_gate(&bench, 0x80, 0x12000, 0xee, 0);
    long_gate(&bench, 6, 0x12100, 0x8e, 1);
    bench.assemble(64, CODE, |a| {
        a.int(0x80)?;
        a.ud2()
    });
    bench.assemble(64, 0x12000, |a| a.iretq());
    bench.load(&state);
    bench.cpu().step().unwrap();
    let top = bench.cpu().user.gpr[4];
    assert_eq!((bench.cpu().cpl, top), (0, 0x30000 - 40), "the stack is aligned to 16 first");
    let frame: Vec<u64> = (0..5).map(|i| bench.get64(top + 8 * i)).collect();
    assert_eq!([frame[0], frame[1], frame[3], frame[4]], [CODE + 2, 0x1b, STACK, 0x23]);
    assert!(bench.cpu().segments[seg::SS].unusable);
    bench.cpu().step().unwrap();
    assert_eq!((bench.cpu().cpl, bench.cpu().user.rip, bench.cpu().user.gpr[4]), (3, CODE + 2, STACK));
    assert!(bench.cpu().execute().is_ok());
    assert_eq!((bench.cpu().user.rip, bench.cpu().user.gpr[4]), (0x12100, 0x38000 - 40), "through the IST");
    assert_eq!(bench.get64(0x38000 - 24) & rflags::RF, rflags::RF, "a fault saves RF set");
}

#[test]
fn syscall_and_sysret() {
    let mut bench = Bench::new(1);
    let mut state = long_user(&bench);
    state.control.efer |= 1;
    state.set_msr(x86::msr::STAR, 0x0010_0008 << 32);
    state.set_msr(x86::msr::LSTAR, 0x12000);
    state.set_msr(x86::msr::SFMASK, rflags::IF);
    state.regs.rflags |= rflags::IF;
    bench.assemble(64, CODE, |a| a.syscall());
    bench.assemble(64, 0x12000, |a| a.sysretq());
    bench.load(&state);
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.cpl, cpu.user.rip, cpu.user.gpr[1]), (0, 0x12000, CODE + 2));
    assert_eq!(cpu.rflags() & rflags::IF, 0);
    assert_eq!(cpu.user.gpr[11] & rflags::IF, rflags::IF);
    assert_eq!((cpu.segments[seg::CS].selector, cpu.segments[seg::SS].selector), (0x08, 0x10));
    bench.cpu().step().unwrap();
    let cpu = bench.cpu();
    assert_eq!((cpu.cpl, cpu.user.rip, cpu.mode), (3, CODE + 2, Mode::Long));
    assert_eq!((cpu.segments[seg::CS].selector, cpu.segments[seg::SS].selector), (0x23, 0x1b));
    assert_ne!(cpu.rflags() & rflags::IF, 0);
}

#[test]
fn faults_in_delivery_escalate() {
    let mut bench = Bench::new(1);
    let mut state = bench.long_mode(0);
    bench.set64(GDT + 0x08, descriptor(0, 0xf_ffff, 0xa09b));
    bench.assemble(64, CODE, |a| a.ud2());
    // #UD cannot be delivered: #GP; that neither, but #UD is benign, so #GP is tried, then #DF.
    long_gate(&bench, 8, 0x12000, 0x8e, 0);
    bench.load(&state);
    assert!(bench.cpu().execute().is_ok());
    assert_eq!(bench.cpu().user.rip, 0x12000);
    assert_eq!(bench.get64(STACK - 48), 0, "error code of #DF");
    // Without that gate the processor shuts down.
    state.segments.idt.limit = 0x7f;
    bench.load(&state);
    assert_eq!(bench.vcpus[0].run().unwrap(), Exit::TripleFault);
}

#[test]
fn single_steps_and_breakpoints() {
    let mut bench = Bench::new(1);
    let mut state = bench.long_mode(0);
    bench.set64(GDT + 0x08, descriptor(0, 0xf_ffff, 0xa09b));
    bench.set64(GDT + 0x10, descriptor(0, 0xf_ffff, 0xc093));
    long_gate(&bench, 1, 0x12000, 0x8e, 0);
    bench.assemble(64, CODE, |a| {
        a.nop()?;
        a.mov(qword_ptr(0x60000), rax)?;
        a.nop()
    });
    bench.assemble(64, 0x12000, |a| a.iretq());
    state.regs.rflags |= rflags::TF;
    bench.load(&state);
    assert!(bench.cpu().execute().is_ok());
    assert_eq!(bench.cpu().user.rip, 0x12000, "a trap after the instruction");
    assert_eq!(bench.get64(STACK - 40), CODE + 1);
    assert_eq!(bench.cpu().debug.dr6 & dr6::BS, dr6::BS);
    assert!(bench.cpu().execute().is_ok());
    assert_eq!(bench.cpu().user.rip, CODE + 1);
    assert!(bench.cpu().execute().is_ok());
    assert_eq!(bench.cpu().user.rip, 0x12000, "IRET arms it again for one instruction");

    // DR0: execution; DR1: writes to the quadword.
    state.regs.rflags &= !rflags::TF;
    state.debug.dr = [CODE, 0x60000, 0, 0];
    state.debug.dr7 |= 1 | 1 << 2 | 1 << 20 | 2 << 22;
    bench.load(&state);
    assert!(bench.cpu().execute().is_ok());
    assert_eq!((bench.cpu().user.rip, bench.cpu().debug.dr6 & 0xf), (0x12000, 1));
    assert_eq!(bench.get64(STACK - 40), CODE, "a fault before the instruction");
    state.regs.rflags |= rflags::RF;
    bench.load(&state);
    assert!(bench.cpu().execute().is_ok());
    assert_eq!(bench.cpu().user.rip, CODE + 1, "RF lets it pass once");
    let mut guard = 0;
    while bench.cpu().user.rip != 0x12000 {
        assert!(bench.cpu().execute().is_ok());
        guard += 1;
        assert!(guard < 3, "the store does not trap");
    }
    assert_eq!(bench.cpu().debug.dr6 & 0xf, 2);
}

#[test]
fn disabled_and_reserved_things_fault() {
    let mut bench = Bench::new(1);
    let state = bench.long_mode(0);
    let nm = Err(Exception::plain(Vector::DeviceNotAvailable));
    let mut check = |change: &dyn Fn(&mut engine::VcpuState),
                     code: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
                     expected| {
        let mut state = state.clone();
        change(&mut state);
        bench.assemble(64, CODE, code);
        bench.load(&state);
        assert_eq!(bench.cpu().step(), expected);
    };
    let ud = Err(Exception::ud());
    let gp = Err(Exception::gp(0));
    check(&|s| s.control.cr0 |= cr0::TS, |a| a.fld1(), nm);
    check(&|s| s.control.cr0 |= cr0::EM, |a| a.fld1(), nm);
    check(&|s| s.control.cr0 |= cr0::TS, |a| a.addps(xmm0, xmm1), nm);
    check(&|s| s.control.cr0 |= cr0::EM, |a| a.addps(xmm0, xmm1), ud);
    check(&|s| s.control.cr4 &= !cr4::OSFXSR, |a| a.addps(xmm0, xmm1), ud);
    check(&|_| (), |a| a.vaddps(xmm0, xmm0, xmm1), ud);
    check(&|_| (), |a| a.addps(xmm0, xmm1), Ok(()));
    check(&|s| s.control.cr0 |= cr0::EM | cr0::TS, |a| a.andn(eax, ebx, ecx), Ok(()));
    check(&|s| s.regs.gpr[0] = 1 << 32, |a| a.mov(cr0, rax), gp);
    check(&|s| s.regs.gpr[0] = 1 << 31, |a| a.mov(cr4, rax), gp);
    check(&|s| s.regs.gpr[0] = 1 << 31, |a| a.mov(cr0, rax), gp);
    check(&|s| s.regs.gpr[1] = 0xdead, |a| a.rdmsr(), gp);
    check(&|s| s.regs.gpr[0] = 0x60008, |a| a.fxsave(ptr(rax)), gp);
    check(&|s| s.regs.gpr[0] = 0x60004, |a| a.movaps(xmm0, xmmword_ptr(rax)), gp);
    check(&|_| (), |a| a.xgetbv(), ud);
}

#[test]
fn sysenter_in_long_mode_is_the_vendors_choice() {
    let mut bench = Bench::new(1);
    let mut state = long_user(&bench);
    state.set_msr(x86::msr::SYSENTER_CS, 0x08);
    state.set_msr(x86::msr::SYSENTER_EIP, 0x12000);
    bench.assemble(64, CODE, |a| a.sysenter());
    bench.load(&state);
    let amd = bench.cpu().cpuid.lookup(0, 0).ebx == u32::from_le_bytes(*b"Auth");
    if amd {
        assert_eq!(bench.cpu().step(), Err(Exception::ud()));
    } else {
        assert_eq!(bench.cpu().step(), Ok(()));
        assert_eq!((bench.cpu().cpl, bench.cpu().user.rip), (0, 0x12000));
    }
}

#[test]
fn alignment_is_checked_in_ring_3_when_asked_for() {
    let mut bench = Bench::new(1);
    bench.assemble(64, CODE, |a| {
        a.mov(eax, dword_ptr(0x60004))?;
        a.mov(eax, dword_ptr(0x60002))
    });
    for (cpl, am, ac, expected) in [
        (3, true, true, Err(Exception::with_code(Vector::AlignmentCheck, 0))),
        (3, false, true, Ok(())),
        (3, true, false, Ok(())),
        (0, true, true, Ok(())),
    ] {
        let mut state = bench.long_mode(cpl);
        state.control.cr0 |= if am { cr0::AM } else { 0 };
        state.regs.rflags |= if ac { rflags::AC } else { 0 };
        bench.load(&state);
        assert_eq!(bench.cpu().step(), Ok(()));
        assert_eq!(bench.cpu().step(), expected, "cpl {cpl}, AM {am}, AC {ac}");
    }
}
