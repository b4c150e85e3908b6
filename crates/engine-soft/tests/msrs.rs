//! Model-specific registers as guests and snapshots see them.

mod common;

use common::*;
use engine::Vcpu;
use engine_soft::msr::BadMsr;
use x86::{Exception, Vector, msr};

/// The TSC goes on while a test looks; nothing here takes this long.
const SLACK: u64 = 1 << 40;

fn near(value: u64, wanted: u64) -> bool {
    value.wrapping_sub(wanted) < SLACK
}

#[test]
fn the_tsc_and_its_adjustment_move_together() {
    let mut bench = Bench::new(2);
    let cpu = bench.cpu();
    assert_eq!(cpu.read_msr(msr::TSC_ADJUST), Ok(0), "after power-up");
    // SDM 3B §18.17.3: what a write adds to one is added to the other.
    let before = cpu.read_msr(msr::TSC).unwrap();
    cpu.write_msr(msr::TSC, 1 << 60).unwrap();
    assert!(near(cpu.read_msr(msr::TSC).unwrap(), 1 << 60));
    let adjust = cpu.read_msr(msr::TSC_ADJUST).unwrap();
    assert!(near((1 << 60) - before, adjust), "{adjust:#x}");
    cpu.write_msr(msr::TSC_ADJUST, adjust + (1 << 50)).unwrap();
    assert_eq!(cpu.read_msr(msr::TSC_ADJUST), Ok(adjust + (1 << 50)));
    assert!(near(cpu.read_msr(msr::TSC).unwrap(), (1 << 60) + (1 << 50)));
    // Backwards, and below zero.
    cpu.write_msr(msr::TSC_ADJUST, 0).unwrap();
    assert!(near(cpu.read_msr(msr::TSC).unwrap(), before));
    cpu.write_msr(msr::TSC, 0).unwrap();
    let adjust = cpu.read_msr(msr::TSC_ADJUST).unwrap();
    assert!(near(adjust.wrapping_neg(), before), "{adjust:#x}");
    // Each processor has its own.
    assert_eq!(bench.vcpus[1].cpu().read_msr(msr::TSC_ADJUST), Ok(0));
}

#[test]
fn a_snapshot_carries_the_tsc_and_its_adjustment() {
    let mut from = Bench::new(1);
    from.cpu().write_msr(msr::TSC, 1 << 60).unwrap();
    let state = from.vcpus[0].state().unwrap();
    let adjust = state.msr(msr::TSC_ADJUST).unwrap();
    assert_ne!(adjust, 0);
    // In whichever order the two stand.
    for reverse in [false, true] {
        let mut state = state.clone();
        if reverse {
            state.msrs.reverse();
        }
        let mut to = Bench::new(1);
        to.vcpus[0].set_state(&state).unwrap();
        assert!(near(to.cpu().read_msr(msr::TSC).unwrap(), 1 << 60));
        assert_eq!(to.cpu().read_msr(msr::TSC_ADJUST), Ok(adjust));
    }
}

#[test]
fn a_model_without_tsc_adjust_has_none() {
    const TSC_ADJUST: u32 = 1 << 1;
    let mut bench = Bench::showing(1, true, |cpuid| cpuid.update(7, |leaf| leaf.ebx &= !TSC_ADJUST));
    assert_eq!(bench.cpu().read_msr(msr::TSC_ADJUST), Err(BadMsr::Unknown));
    assert_eq!(bench.cpu().write_msr(msr::TSC_ADJUST, 0), Err(BadMsr::Unknown));
    let mut state = bench.vcpus[0].state().unwrap();
    assert_eq!(state.msr(msr::TSC_ADJUST), None);
    state.set_msr(msr::TSC_ADJUST, 0);
    bench.vcpus[0].set_state(&state).unwrap();
    state.set_msr(msr::TSC_ADJUST, 5);
    assert!(bench.vcpus[0].set_state(&state).is_err(), "the guest would miss it");
}

/// What the instruction at [`CODE`] does with ECX = `index` and EDX:EAX = `value`: EDX:EAX after it, or nothing if it
/// raises #GP(0).
fn access(strict_msr: bool, write: bool, index: u32, value: u64) -> Option<u64> {
    let mut bench = Bench::showing(1, strict_msr, |_| ());
    let mut state = bench.long_mode(0);
    // The upper halves, which RDMSR clears and WRMSR leaves.
    state.regs.gpr[0] = value & 0xffff_ffff | 0xaaaa_0000_0000;
    state.regs.gpr[1] = u64::from(index) | 0xbbbb_0000_0000;
    state.regs.gpr[2] = value >> 32 | 0xcccc_0000_0000;
    let end = bench.assemble(64, CODE, |a| if write { a.wrmsr() } else { a.rdmsr() });
    bench.load(&state);
    let stepped = bench.cpu().step();
    let cpu = bench.cpu();
    let gpr = cpu.user.gpr;
    if let Err(exception) = stepped {
        assert_eq!(exception, Exception::with_code(Vector::GeneralProtection, 0));
        assert_eq!(gpr, state.regs.gpr, "a fault changes nothing");
        return None;
    }
    assert_eq!(cpu.user.rip, end);
    if write {
        assert_eq!((gpr[0], gpr[2]), (state.regs.gpr[0], state.regs.gpr[2]));
    }
    if !write {
        assert_eq!((gpr[0] >> 32, gpr[2] >> 32), (0, 0));
    }
    Some(gpr[0] & 0xffff_ffff | gpr[2] << 32)
}

#[test]
fn unknown_registers_fault_unless_the_machine_is_lenient() {
    // Both sides of every kind of range, and a register of the hypervisor's own range.
    for index in [0x0, 0x48, 0xda0, 0x1000, 0x4000_0000, 0xc001_1fff, 0xffff_ffff] {
        let value = 0x1234_5678_9abc_def0;
        assert_eq!(access(true, false, index, value), None, "RDMSR {index:#x}");
        assert_eq!(access(true, true, index, value), None, "WRMSR {index:#x}");
        assert_eq!(access(false, false, index, value), Some(0), "RDMSR {index:#x}");
        assert!(access(false, true, index, value).is_some(), "WRMSR {index:#x}");
    }
}

#[test]
fn a_lenient_machine_still_checks_the_registers_it_has() {
    for strict in [true, false] {
        assert_eq!(access(strict, true, msr::LSTAR, 1 << 63), None, "not canonical");
        assert_eq!(access(strict, true, msr::PAT, 0x0202_0202_0202_0202), None, "a reserved memory type");
        assert_eq!(access(strict, true, msr::EFER, 1 << 40), None, "a reserved bit");
        assert_eq!(access(strict, false, msr::X2APIC_BASE + 2, 0), None, "not in x2APIC mode");
        assert_eq!(access(strict, true, msr::TSC_AUX, 7), Some(0xcccc_0000_0000 << 32 | 7));
        assert_eq!(access(strict, false, msr::PAT, 1), Some(0x0007_0406_0007_0406));
    }
}
