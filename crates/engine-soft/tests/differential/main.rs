//! Every user-mode instruction form of the CPU model, on random operands, against the host processor: registers, flags,
//! memory and faults have to be the same.
//!
//! `make test` runs a short form of it, `make differential` thousands of states for each form.
//!
//! `DIFFERENTIAL_STATES` sets the number of states for each form (default 100), `DIFFERENTIAL_SEED` the seed,
//! `DIFFERENTIAL_FORM` keeps the forms whose name contains it, `DIFFERENTIAL_VERBOSE=1` lists the skipped forms,
//! `DIFFERENTIAL_TRACE=1` names each form before it runs.

mod forms;
mod host;
mod inputs;
mod interpreter;
mod state;
mod thunks;
mod values;

use std::collections::BTreeMap;
use std::fmt::Write;

use engine_soft::user::status;
use iced_x86::{Code, FastFormatter, Mnemonic};
use x86::bits::rflags;

use forms::Skip;
use host::Host;
use state::*;
use values::Random;

/// States for which one encoding is used.
const STATES_PER_ENCODING: u64 = 4;
/// After so many differing forms the rest is only counted.
const SHOWN: usize = 16;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

#[derive(Default)]
struct Report {
    tested: usize,
    unsupported: Vec<String>,
    skipped: BTreeMap<Skip, Vec<String>>,
    states: u64,
    faults: BTreeMap<u8, u64>,
    differing: Vec<String>,
    shown: String,
}

fn compare_mode(bitness: u32, subject: &mut dyn Subject) -> Report {
    let mut report = Report::default();
    let mut host = Host::new().expect("the host runner");
    if bitness == 16 && !host.has_16_bit() {
        println!("16-bit code cannot be run on this host (modify_ldt is refused)");
        return report;
    }
    let states = setting("DIFFERENTIAL_STATES", 100);
    let seed = setting("DIFFERENTIAL_SEED", 1);
    let filter = std::env::var("DIFFERENTIAL_FORM").unwrap_or_default();
    let mut background = Memory::new();
    Random::new(seed).fill(&mut background.0);
    let mut memory = Memory::new();
    let mut after = Memory::new();
    for (form, testable) in forms::forms(bitness) {
        let name = format!("{:?}", form.code);
        if !name.contains(&filter) {
            continue;
        }
        if let Err(skip) = testable {
            report.skipped.entry(skip).or_default().push(name);
            continue;
        }
        let mut encoding = None;
        let mut supported = true;
        let mut differs = false;
        if setting("DIFFERENTIAL_TRACE", 0) != 0 {
            eprintln!("{name}");
        }
        for round in 0..states {
            // Each state can be repeated alone, whatever ran before.
            let mut random = Random::new(
                seed.wrapping_mul(0x1_0000_0001)
                    .wrapping_add((form.code as u64) << 40 ^ u64::from(bitness) << 32 ^ round),
            );
            if round % STATES_PER_ENCODING == 0 || encoding.is_none() {
                encoding = forms::encoding(form, &mut random);
            }
            let Some(encoding) = &encoding else { break };
            if branches_into_itself(&encoding.instruction) {
                continue;
            }
            memory.0.copy_from_slice(&background.0);
            let state = inputs::state(form, encoding, &mut memory, &mut random);
            after.0.copy_from_slice(&memory.0);
            let case =
                Case { instruction: &encoding.instruction, bytes: &encoding.bytes, bitness, state: &state };
            let Some(outcome) = subject.step(&case, &mut after) else {
                supported = false;
                break;
            };
            host.set_memory(&memory);
            let expected = host.run(&case);
            report.states += 1;
            if let End::Fault { vector, .. } = expected.end {
                *report.faults.entry(vector).or_default() += 1;
            }
            let differences = differences(
                &case,
                &expected,
                &outcome,
                host.memory(),
                &after.0,
                subject.undefined_like_host(),
            );
            if !differences.is_empty() && !differs {
                differs = true;
                if report.differing.len() < SHOWN {
                    let title = format!("{:?} ({bitness}-bit), seed {seed}, state {round}", form.code);
                    report.shown += &describe(&title, &case, &expected, &outcome, &differences);
                }
                report.differing.push(name.clone());
            }
        }
        if encoding.is_none() {
            report.skipped.entry(Skip::NoEncoding).or_default().push(name);
        } else if supported {
            report.tested += 1;
        } else {
            report.unsupported.push(name);
        }
    }
    report
}

/// The host runs on until it meets an INT3, which is not at the target of such a branch.
fn branches_into_itself(instruction: &iced_x86::Instruction) -> bool {
    use iced_x86::FlowControl;
    let direct = matches!(
        instruction.flow_control(),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
    );
    direct && (instruction.ip()..instruction.next_ip()).contains(&instruction.near_branch_target())
}

/// Everything needed to understand, or repeat, one execution.
fn describe(
    title: &str,
    case: &Case<'_>,
    expected: &Outcome,
    outcome: &Outcome,
    differences: &[String],
) -> String {
    let mut text = String::new();
    FastFormatter::new().format(case.instruction, &mut text);
    let bytes: Vec<_> = case.bytes.iter().map(|b| format!("{b:02x}")).collect();
    let mut out = format!("\n{title}\n  {}   {text}\n", bytes.join(" "));
    let _ = writeln!(out, "  host {:x?}\n  we   {:x?}", expected.end, outcome.end);
    for difference in differences {
        let _ = writeln!(out, "  differs: {difference}");
    }
    let state = case.state;
    let _ = writeln!(
        out,
        "  input: rip {:x} rflags {:x} mxcsr {:x} fcw {:02x}{:02x} fsw {:02x}{:02x} tags {:02x}",
        state.rip,
        state.rflags,
        state.mxcsr(),
        state.x87[1],
        state.x87[0],
        state.x87[3],
        state.x87[2],
        state.x87[4]
    );
    let _ = writeln!(out, "  gpr {:x?}", state.gpr);
    let used = case.instruction;
    for operand in 0..used.op_count() {
        let register = used.op_register(operand);
        if register.is_vector_register() {
            let _ = writeln!(out, "  {register:?} {:02x?}", state.vector[register.number()]);
        } else if register.is_mm() || register.is_st() {
            let at = image::REGISTERS + 16 * register.number();
            let _ = writeln!(out, "  {register:?} {:02x?}", &state.x87[at..at + 10]);
        }
    }
    out
}

/// Bits of a vector byte to compare.
fn defined(mask_of_gather: bool) -> u8 {
    if mask_of_gather { 0x80 } else { 0xff }
}

/// Where Linux's part of the address space begins for user mode: the last user page is never mapped.
const LINUX_END: u64 = 0x7fff_ffff_f000;

/// Without what the manuals leave open: which byte of a page CR2 names when an
/// operand is stored or loaded in pieces.
fn comparable_end(case: &Case<'_>, end: End) -> End {
    use Mnemonic::*;
    let piecewise = matches!(
        case.instruction.mnemonic(),
        Fldenv | Fnstenv | Frstor | Fnsave | Maskmovq | Maskmovdqu | Vmaskmovdqu
    );
    let image = matches!(case.instruction.mnemonic(), Fxsave | Fxsave64 | Fxrstor | Fxrstor64)
        || inputs::is_xsave(case.instruction);
    match end {
        End::Fault { vector, error_code, address } if piecewise => {
            End::Fault { vector, error_code, address: address & !(PAGE - 1) }
        }
        // Which of its two operands CMPS looks at first is not defined, and AMD's processors do both.
        End::Fault { vector: 13 | 14, .. }
            if matches!(case.instruction.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq) =>
        {
            End::Fault { vector: 14, error_code: 0, address: 0 }
        }
        // Nor whether the first or the last page of a state image.
        End::Fault { vector: 14, error_code, .. } if image => {
            End::Fault { vector: 14, error_code: error_code & !1, address: 0 }
        }
        // Linux claims for its own half of the address space that every page is present.
        End::Fault { vector: 14, error_code, address } if address >= LINUX_END => {
            End::Fault { vector: 14, error_code: error_code & !1, address }
        }
        other => other,
    }
}

/// What is not the same.
fn differences(
    case: &Case<'_>,
    expected: &Outcome,
    outcome: &Outcome,
    host_memory: &[u8],
    memory: &[u8],
    exact: bool,
) -> Vec<String> {
    let mut found = Vec::new();
    // AMD's processors read four bytes and use two.
    let reads_more = case.instruction.code() == Code::Movsxd_r16_rm16;
    if reads_more && matches!(expected.end, End::Fault { vector: 14, .. }) {
        return found;
    }
    if comparable_end(case, expected.end) != comparable_end(case, outcome.end) {
        found.push("the end".to_string());
    }
    // A branch through a register or memory that happens to lead into its own bytes: the host runs on.
    let own = case.instruction.ip()..case.instruction.next_ip();
    let branch = case.instruction.flow_control() != iced_x86::FlowControl::Next;
    if branch && outcome.end == End::Done && own.contains(&outcome.state.rip) {
        return Vec::new();
    }
    // AMD's processors have loaded some of the registers when a later one faults.
    let popped_in_part =
        matches!(case.instruction.mnemonic(), Mnemonic::Popa | Mnemonic::Popad) && expected.end != End::Done;
    // A return that lands in memory of the test's own process runs on there.
    let lost = case.instruction.mnemonic() == Mnemonic::Ret
        && expected.end != End::Done
        && expected.state.rip != case.state.rip;
    if lost {
        return Vec::new();
    }
    if popped_in_part {
        return found;
    }
    let random_result = matches!(case.instruction.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed);
    let (host, ours) = (&expected.state, &outcome.state);
    for number in 0..16 {
        let (mut a, mut b) = (host.gpr[number], ours.gpr[number]);
        if random_result && case.instruction.op0_register().full_register().number() == number {
            continue;
        }
        if case.bitness != 64 {
            a &= 0xffff_ffff;
            b &= 0xffff_ffff;
        }
        if a != b {
            found.push(format!("gpr {number}: host {a:x}, we {b:x}"));
        }
    }
    if host.rip != ours.rip {
        found.push(format!("rip: host {:x}, we {:x}", host.rip, ours.rip));
    }
    let mut mask = rflags::STATUS | rflags::DF;
    // After a rotation through carry by more than one, OF is what happened to be in the processor.
    let by_one = matches!(case.instruction.code(), Code::Rcl_rm8_1 | Code::Rcr_rm8_1)
        || matches!(case.instruction.code(), Code::Rcl_rm16_1 | Code::Rcl_rm32_1 | Code::Rcl_rm64_1)
        || matches!(case.instruction.code(), Code::Rcr_rm16_1 | Code::Rcr_rm32_1 | Code::Rcr_rm64_1);
    if matches!(case.instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) && !by_one {
        mask &= !rflags::OF;
    }
    if !exact && expected.end == End::Done {
        mask &= !status::rflags_of_iced(case.instruction.rflags_undefined());
    }
    if random_result {
        mask &= !rflags::CF;
    }
    if (host.rflags ^ ours.rflags) & mask != 0 {
        found.push(format!("rflags: host {:x}, we {:x}", host.rflags & mask, ours.rflags & mask));
    }
    // Of the mask of an interrupted gather, only the highest bit of each element is defined.
    let gather_mask = (case.instruction.is_vsib() && expected.end != End::Done)
        .then(|| case.instruction.op2_register().number());
    let lane_bytes = case.instruction.memory_size().size().max(1);
    for (number, (a, b)) in host.vector.iter().zip(&ours.vector).enumerate() {
        let undefined = |at: usize| gather_mask == Some(number) && at % lane_bytes != lane_bytes - 1;
        let same = |at: usize| {
            if undefined(at) { true } else { (a[at] ^ b[at]) & defined(gather_mask == Some(number)) == 0 }
        };
        if !(0..32).all(same) {
            found.push(format!("vector {number}: host {a:02x?}, we {b:02x?}"));
        }
    }
    if host.mxcsr() != ours.mxcsr() {
        found.push(format!("mxcsr: host {:x}, we {:x}", host.mxcsr(), ours.mxcsr()));
    }
    // MASKMOVQ may turn the x87 state into MMX state before its memory access faults.
    if case.instruction.mnemonic() == Mnemonic::Maskmovq && expected.end != End::Done {
        return found;
    }
    for (name, range) in [
        ("fcw", image::FCW..image::FCW + 2),
        ("fsw", image::FSW..image::FSW + 2),
        ("tags", image::TAGS..image::TAGS + 1),
        ("fop", image::FOP..image::FOP + 2),
        ("fip", image::FIP..image::FIP + 8),
        ("fdp", image::FDP..image::FDP + 8),
    ] {
        let (a, b) = (&host.x87[range.clone()], &ours.x87[range]);
        if a != b {
            found.push(format!("{name}: host {a:02x?}, we {b:02x?}"));
        }
    }
    for number in 0..8 {
        let at = image::REGISTERS + 16 * number;
        let (a, b) = (&host.x87[at..at + 10], &ours.x87[at..at + 10]);
        if a != b {
            found.push(format!("st {number}: host {a:02x?}, we {b:02x?}"));
        }
    }
    if host_memory != memory {
        // Which of the stored components are in their initial state a processor need not notice.
        let in_use = matches!(case.instruction.mnemonic(), Mnemonic::Xsave | Mnemonic::Xsave64).then(|| {
            let area = inputs::linear_address(case.instruction, 0, case.bitness, case.state, 0);
            area.wrapping_sub(DATA).wrapping_add(512) as usize
        });
        let stored = case.state.gpr[0] as u8;
        let differ = |(at, (a, b)): &(usize, (&u8, &u8))| {
            if Some(*at) == in_use { (*a ^ *b) & !stored != 0 } else { a != b }
        };
        for (at, (a, b)) in host_memory.iter().zip(memory).enumerate().filter(differ).take(8) {
            found.push(format!("memory {:x}: host {a:02x}, we {b:02x}", DATA + at as u64));
        }
    }
    found
}

fn check(bitness: u32, subject: &mut dyn Subject) {
    let name = subject.name();
    let report = compare_mode(bitness, subject);
    println!(
        "{bitness}-bit, {name}: {} forms tested with {} states, {} not for this subject; faults by vector {:?}",
        report.tested,
        report.states,
        report.unsupported.len(),
        report.faults
    );
    let verbose = setting("DIFFERENTIAL_VERBOSE", 0) != 0;
    for (skip, names) in &report.skipped {
        println!("  skipped, {}: {}", skip.reason(), names.len());
        if verbose && *skip != Skip::NotInModel {
            println!("    {}", names.join(" "));
        }
    }
    if verbose {
        println!("  not for this subject: {}", report.unsupported.join(" "));
    }
    assert!(
        report.differing.is_empty(),
        "{} forms differ from the host: {:?}\n{}",
        report.differing.len(),
        report.differing,
        report.shown
    );
}

#[test]
fn thunks_64_bit() {
    check(64, &mut thunks::ThunkSubject::new());
}

#[test]
fn thunks_32_bit() {
    check(32, &mut thunks::ThunkSubject::new());
}

#[test]
fn thunks_16_bit() {
    check(16, &mut thunks::ThunkSubject::new());
}

#[test]
fn interpreter_64_bit() {
    check(64, &mut interpreter::InterpreterSubject::new(64));
}

#[test]
fn translator_64_bit() {
    check(64, &mut interpreter::InterpreterSubject::translating(64));
}

#[test]
fn translator_32_bit() {
    check(32, &mut interpreter::InterpreterSubject::translating(32));
}

#[test]
fn interpreter_32_bit() {
    check(32, &mut interpreter::InterpreterSubject::new(32));
}

#[test]
fn interpreter_16_bit() {
    check(16, &mut interpreter::InterpreterSubject::new(16));
}
