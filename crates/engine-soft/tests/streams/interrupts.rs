//! Interrupts at random places: a program that another thread interrupts, with interrupts, NMIs and kicks, has to end as it does
//! when it is left alone.

use std::sync::atomic::{AtomicBool, Ordering};

use engine::{Exit, MsiMessage, Vcpu, Vm};
use x86::bits::rflags;
use x86::msr;

use super::generate::{self, Forms};
use super::machine::{self, Image, Machine, Mode};
use super::program::Program;
use super::values::Random;
use super::{Outcome, differences, load, setting};

/// Programs for each mode.
const COUNT: u64 = 16;
/// Turns of all loops of a program together.
const TURNS: u32 = 40_000;
/// Each program is repeated until it has been interrupted so often.
const WANTED: u64 = 60;

/// A message to the first LAPIC.
fn message(data: u32) -> MsiMessage {
    MsiMessage { address: engine::LAPIC_BASE, data }
}

/// Delivery mode of NMIs.
const NMI: u32 = 4 << 8;

/// Runs a program with interrupts enabled; `disturb` runs on another thread until it is told to stop.
fn run(
    machine: &mut Machine,
    template: &Image,
    program: &Program,
    seed: u64,
    disturb: impl Fn(&dyn Vm, &dyn engine::Kick, &AtomicBool) + Sync,
) -> Outcome {
    load(machine, template, program, seed, rflags::IF);
    let mut state = machine.vcpu.state().expect("a state");
    let base = state.msr(msr::APIC_BASE).unwrap_or_default();
    state.set_msr(msr::APIC_BASE, base | msr::apic_base::EXTD | msr::apic_base::EN);
    // Enabled by software.
    state.lapic = engine::VcpuState::reset(0).lapic;
    state.lapic.registers[0x20 / 16] = 0;
    state.lapic.registers[0xf0 / 16] = 0x1ff;
    machine.vcpu.set_state(&state).expect("a state");
    let done = AtomicBool::new(false);
    let kick = machine.vcpu.kicker();
    let Machine { vcpu, vm, watchdog, .. } = machine;
    let exit = std::thread::scope(|scope| {
        scope.spawn(|| disturb(vm, kick.as_ref(), &done));
        let exit = machine::run_to_end(vcpu, watchdog);
        done.store(true, Ordering::Relaxed);
        exit
    });
    Outcome { exit, state: machine.vcpu.state().expect("a state"), memory: machine.memory() }
}

/// Whether all turns are used up, so that there is time for interrupts.
fn is_long(outcome: &Outcome) -> bool {
    outcome.exit == Exit::AllHalted && machine::turns_left(&outcome.memory) < 0
}

/// An end without what differs from one run to the next.
fn without_interrupts(outcome: &Outcome) -> Outcome {
    let (mut state, mut memory) = (outcome.state.clone(), outcome.memory.clone());
    state.events = Default::default();
    machine::forget_interrupts(&mut memory);
    Outcome { exit: outcome.exit.clone(), state, memory }
}

fn check(cpl: u16) {
    let mode = Mode { bits: 64, cpl };
    let forms = Forms::new(mode, &super::without());
    let template = Image::new();
    let (mut interpreter, mut translator) = (Machine::new("off"), Machine::new("always"));
    let (mut tested, mut interrupts) = (0, 0);
    for seed in setting("STREAMS_SEED", 1).. {
        if tested == setting("STREAMS_INTERRUPTED", COUNT) {
            break;
        }
        let mut program = generate::program(&forms, seed);
        program.turns = TURNS / 100;
        let undisturbed = run(&mut interpreter, &template, &program, seed, |_, _, _| {});
        if !is_long(&undisturbed) {
            continue;
        }
        program.turns = TURNS;
        let expected = run(&mut interpreter, &template, &program, seed, |_, _, _| {});
        if !is_long(&expected) {
            continue;
        }
        tested += 1;
        let (mut seen, mut round) = (0, 0);
        while seen < WANTED {
            round += 1;
            let disturbed = run(&mut translator, &template, &program, seed, |vm, kick, done| {
                let mut random = Random::new(seed << 16 ^ round);
                while !done.load(Ordering::Relaxed) {
                    for _ in 0..random.below(1500) {
                        std::hint::spin_loop();
                    }
                    match random.below(8) {
                        0 => kick.kick(),
                        1 => vm.send_msi(message(NMI)).expect("sent"),
                        _ => vm.send_msi(message(machine::INTERRUPT_VECTOR.into())).expect("sent"),
                    }
                }
            });
            let word = |at| machine::kernel_word(&disturbed.memory, at);
            seen += word(machine::INTERRUPTED);
            assert_eq!(
                word(machine::WRONG),
                0,
                "seed {seed}: an interrupt at {:x}\n{}",
                word(machine::WRONG + 8),
                program.listing()
            );
            let found = differences(&without_interrupts(&expected), &without_interrupts(&disturbed));
            assert!(
                found.is_empty(),
                "seed {seed}, {} interrupts: {found:#?}\n{}",
                word(machine::INTERRUPTED),
                program.listing()
            );
        }
        interrupts += seen;
    }
    println!("{mode:?}: {tested} programs, {interrupts} interrupts");
}

#[test]
fn interrupted_user_code() {
    check(3);
}

#[test]
fn interrupted_supervisor_code() {
    check(0);
}
