//! Model-specific registers as guests and snapshots see them.

mod common;

use common::*;
use engine::Vcpu;
use engine_soft::msr::BadMsr;
use x86::msr;

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
    let mut bench = Bench::with_cpuid(1, |cpuid| cpuid.update(7, |leaf| leaf.ebx &= !TSC_ADJUST));
    assert_eq!(bench.cpu().read_msr(msr::TSC_ADJUST), Err(BadMsr));
    assert_eq!(bench.cpu().write_msr(msr::TSC_ADJUST, 0), Err(BadMsr));
    let mut state = bench.vcpus[0].state().unwrap();
    assert_eq!(state.msr(msr::TSC_ADJUST), None);
    state.set_msr(msr::TSC_ADJUST, 0);
    bench.vcpus[0].set_state(&state).unwrap();
    state.set_msr(msr::TSC_ADJUST, 5);
    assert!(bench.vcpus[0].set_state(&state).is_err(), "the guest would miss it");
}
