//! The translator against the interpreter: random programs that run on two machines, one that translates everything and one
//! that translates nothing, have to end with the same registers, the same memory and the same faults on the way.
//!
//! `STREAMS_COUNT` sets the number of programs for each mode, `STREAMS_SEED` the first one's seed, `STREAMS_WITHOUT`
//! (words with commas between) leaves out instruction forms whose names contain one of the words, `STREAMS_TRACE=1` names each seed
//! before it runs. A program that fails
//! is repeated on fresh machines, made as small as possible and listed.

#[allow(dead_code)]
#[path = "../differential/forms.rs"]
mod forms;
mod generate;
#[allow(dead_code)]
#[path = "../differential/inputs.rs"]
mod inputs;
mod interrupts;
mod machine;
mod program;
#[allow(dead_code)]
#[path = "../differential/state.rs"]
mod state;
#[allow(dead_code)]
#[path = "../differential/values.rs"]
mod values;

use engine::{Exit, Vcpu, VcpuState};

use generate::Forms;
use machine::{Image, Machine, Mode};
use program::Program;

/// Programs for each mode.
const COUNT: u64 = 1500;
/// One in so many programs also runs with what is usual, only what runs often is translated, and with each block compared by
/// itself.
const MIXED: u64 = 4;
/// Differences that are listed.
const SHOWN: usize = 24;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// Which instruction forms are left out.
fn without() -> Vec<String> {
    let words = std::env::var("STREAMS_WITHOUT").unwrap_or_default();
    words.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// How a program ended on one machine.
struct Outcome {
    exit: Exit,
    state: VcpuState,
    memory: Vec<u8>,
}

/// Puts a program and the state it starts in into a machine.
fn load(machine: &mut Machine, template: &Image, program: &Program, seed: u64, rflags: u64) {
    let mut image = template.clone();
    let assembled = program.assemble();
    image.set_program(program.at, &assembled.bytes, &assembled.next, program.turns);
    let start = generate::start(program.mode, seed, image.data());
    let mut state = machine.start(program.mode);
    state.regs.gpr = start.gpr;
    state.regs.rflags = start.rflags | rflags;
    state.regs.rip = program.at;
    state.xsave = start.xsave;
    machine.load(&image, &state);
}

fn run(machine: &mut Machine, template: &Image, program: &Program, seed: u64) -> Outcome {
    load(machine, template, program, seed, 0);
    let exit = machine.run();
    Outcome { exit, state: machine.vcpu.state().expect("a state"), memory: machine.memory() }
}

fn differences(interpreted: &Outcome, translated: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |name: String, a: String, b: String| {
        if a != b {
            found.push(format!("{name}: interpreter {a}, translator {b}"));
        }
    };
    check("exit".into(), format!("{:?}", interpreted.exit), format!("{:?}", translated.exit));
    let (a, b) = (&interpreted.state, &translated.state);
    for number in 0..16 {
        check(
            format!("gpr {number}"),
            format!("{:x}", a.regs.gpr[number]),
            format!("{:x}", b.regs.gpr[number]),
        );
    }
    check("rip".into(), format!("{:x}", a.regs.rip), format!("{:x}", b.regs.rip));
    check("rflags".into(), format!("{:x}", a.regs.rflags), format!("{:x}", b.regs.rflags));
    check("segments".into(), format!("{:x?}", a.segments), format!("{:x?}", b.segments));
    check("control".into(), format!("{:x?}", a.control), format!("{:x?}", b.control));
    check("debug".into(), format!("{:x?}", a.debug), format!("{:x?}", b.debug));
    check("events".into(), format!("{:x?}", a.events), format!("{:x?}", b.events));
    for (index, (a, b)) in a.xsave.chunks(16).zip(b.xsave.chunks(16)).enumerate() {
        if a != b {
            check(format!("xsave {:#x}", 16 * index), format!("{a:02x?}"), format!("{b:02x?}"));
        }
    }
    for (index, (a, b)) in interpreted.memory.chunks(8).zip(translated.memory.chunks(8)).enumerate() {
        if a != b && !(machine::is_table(8 * index as u64) && is_only_accessed(a, b)) {
            check(machine::place(8 * index as u64), format!("{a:02x?}"), format!("{b:02x?}"));
        }
    }
    found
}

/// Whether all that the second entry of a page table has more is the accessed bit: a processor may set it for an access that
/// it does not make in the end (SDM 3A §4.8).
fn is_only_accessed(interpreted: &[u8], translated: &[u8]) -> bool {
    let accessed = x86::paging::pte::A as u8;
    interpreted[0] | accessed == translated[0] && interpreted[1..] == translated[1..]
}

fn compare_afresh(template: &Image, program: &Program, seed: u64) -> Vec<String> {
    let interpreted = run(&mut Machine::new("off"), template, program, seed);
    let translated = run(&mut Machine::new("always"), template, program, seed);
    differences(&interpreted, &translated)
}

/// Removes what does not matter to the difference.
fn minimized(template: &Image, program: &Program, seed: u64) -> Program {
    let mut smallest = program.clone();
    let mut size = smallest.items.len();
    while size > 0 {
        let mut at = 0;
        while at < smallest.items.len() {
            let end = (at + size).min(smallest.items.len());
            let mut smaller = smallest.clone();
            let mut index = 0;
            smaller.items.retain(|item| {
                index += 1;
                !(at < index && index <= end && item.is_removable())
            });
            if smaller.items.len() < smallest.items.len()
                && !compare_afresh(template, &smaller, seed).is_empty()
            {
                smallest = smaller;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    smallest
}

fn explain(template: &Image, program: &Program, seed: u64, first: &[String]) -> String {
    let afresh = compare_afresh(template, program, seed);
    let mut out = format!("seed {seed}:\n");
    if afresh.is_empty() {
        out += "only after other programs on the same machines\n";
        for difference in first.iter().take(SHOWN) {
            out += &format!("  {difference}\n");
        }
        return out + &program.listing();
    }
    let smallest = minimized(template, program, seed);
    let interpreted = run(&mut Machine::new("off"), template, &smallest, seed);
    let translated = run(&mut Machine::new("always"), template, &smallest, seed);
    out += &smallest.listing();
    for difference in differences(&interpreted, &translated).iter().take(SHOWN) {
        out += &format!("  {difference}\n");
    }
    let mut data = template.clone();
    let start = generate::start(program.mode, seed, data.data());
    out += &format!("  start: gpr {:x?} rflags {:x}\n", start.gpr, start.rflags);
    out += &format!("  faults: {:#?}\n", machine::records(&interpreted.memory));
    out
}

fn check(bits: u32, cpl: u16) {
    let mode = Mode { bits, cpl };
    let forms = Forms::new(mode, &without());
    let template = Image::new();
    let (mut interpreter, mut translator) = (Machine::new("off"), Machine::new("always"));
    // The first translates what it has interpreted once, in the same programs.
    let mut others = ["on", "check"].map(|name| (name, Machine::new(name)));
    let first = setting("STREAMS_SEED", 1);
    let mut faults = [0u64; 256];
    for seed in first..first + setting("STREAMS_COUNT", COUNT) {
        if setting("STREAMS_TRACE", 0) != 0 {
            eprintln!("{mode:?}: seed {seed}");
        }
        let program = generate::program(&forms, seed);
        let interpreted = run(&mut interpreter, &template, &program, seed);
        let translated = run(&mut translator, &template, &program, seed);
        let found = differences(&interpreted, &translated);
        assert!(found.is_empty(), "{}", explain(&template, &program, seed, &found));
        if seed % MIXED == 0 {
            for (name, machine) in &mut others {
                let translated = run(machine, &template, &program, seed);
                let found = differences(&interpreted, &translated);
                assert!(
                    found.is_empty(),
                    "translate={name}, seed {seed}:\n{found:#?}\n{}",
                    program.listing()
                );
            }
        }
        for record in 0..machine::kernel_word(&interpreted.memory, machine::RECORDED) {
            faults[machine::kernel_word(&interpreted.memory, machine::RECORDS + (record << 10) + 120)
                as usize] += 1;
        }
    }
    let faults: Vec<_> = faults.iter().enumerate().filter(|(_, count)| **count > 0).collect();
    println!("{mode:?}: exceptions by vector {faults:?}; {:?}", translator.vcpu.cpu().counters);
    assert!(translator.vcpu.cpu().counters.blocks_translated > 0, "nothing was translated");
}

#[test]
fn user_64_bit() {
    check(64, 3);
}

#[test]
fn supervisor_64_bit() {
    check(64, 0);
}

#[test]
fn user_32_bit() {
    check(32, 3);
}

#[test]
fn supervisor_32_bit() {
    check(32, 0);
}
