//! The translator beside the interpreter (`soft.translate=check`): every block runs both ways from the same state, and both
//! have to come to the same registers, the same memory and the same exception.
//!
//! The interpreter goes first. What it did is taken back ([`journal`]: memory, [`state`]: registers), the translated code
//! runs, and its end is compared; then the vCPU goes on from there. Code is never linked to other code, so that it comes
//! back where the block ends. A difference ends the machine with a [`report`].
//!
//! What cannot be taken back runs once, by the interpreter: instructions that read clocks or random numbers, or reach
//! devices ([`is_repeatable`]), and whatever turns out to access a device's memory. The instructions before and behind
//! such a one are compared.
//!
//! vCPUs run one at a time ([`crate::shared::Turns`]), so no other changes memory between the two runs. Devices
//! may: a difference counts only if it is there again when the block is run again from its start, both ways.

mod journal;
mod report;
mod state;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use iced_x86::{Code, Decoder, FlowControl, Instruction, Mnemonic};
use rustc_hash::FxHashMap;
use x86::paging::PAGE_MASK;

pub use journal::Journal;
use report::Report;
use state::State;

use super::cache::Variant;
use super::flags::Place;
use crate::area::SOME_RIP;
use crate::cpu::{Cpu, R};
use crate::interp::block::{Block, MAX_OPS};
use crate::interp::decode;
use crate::interp::op::{Flow, Op};
use crate::shared::Counters;
use crate::user::status;

/// How often a block is run before a difference counts.
const ATTEMPTS: u32 = 8;
/// How many rounds of a loop are compared at once.
const ROUNDS: u32 = 8;

/// What the comparison of one vCPU keeps.
pub struct Check {
    pieces: Pieces,
    /// As the block began.
    start: State,
    /// As the interpreter ended.
    interpreted: State,
}

impl Check {
    /// For a processor.
    pub fn new(cpu: &mut Cpu) -> Self {
        // Nothing but `Cpu::enter_piece` enters any.
        cpu.user.targets().forget_everything();
        let (start, interpreted) = (State::of(cpu, Ok(())), State::of(cpu, Ok(())));
        Check { pieces: Pieces::default(), start, interpreted }
    }
}

/// All that was compared so far.
#[derive(Default)]
struct Pieces {
    /// By guest-physical address, variant, and how many instructions it may have at most.
    known: FxHashMap<(u64, Variant, usize), Piece>,
    /// [`super::cache::Cache::clears`] when they were made.
    clears: u64,
}

impl Pieces {
    /// Forgets those whose code is gone.
    fn drop_old(&mut self, clears: u64) {
        if self.clears != clears {
            self.known.clear();
            self.clears = clears;
        }
    }
}

/// Instructions that run both ways: a block, or the beginning of one.
struct Piece {
    /// The block's bytes.
    bytes: Box<[u8]>,
    /// Of each of its instructions that run both ways, the status flags that are undefined behind it, as in
    /// [`crate::user::UserRegs::status`].
    undefined: Box<[u16]>,
    /// Where each of them begins, in bytes.
    offsets: Box<[u64]>,
    /// The last branches to an address that the code does not say.
    is_indirect: bool,
    /// It is a loop whose translation runs all rounds.
    goes_round: bool,
    /// The ways into its translation.
    entries: Entries,
    /// The same of translations without spans that begin at an instruction of it, by the instruction's place.
    rests: Vec<(usize, Entries)>,
}

/// The ways into a unit.
#[derive(Clone, Copy)]
struct Entries([u64; 3]);

impl Entries {
    /// They take turns.
    fn by_turn(self, turn: u64) -> u64 {
        self.0[(turn % self.0.len() as u64) as usize]
    }
}

/// What the interpreter did.
struct Interpreted {
    result: R<()>,
    /// How many instructions it began.
    instructions: usize,
    /// How many in the last round, if the piece is a loop.
    place: usize,
}

/// What came out of running both ways.
enum Verdict {
    /// The same. The vCPU is in that state.
    Same(R<()>),
    /// Only so many of the instructions can be compared. Nothing has happened.
    Shorter(usize),
    /// A translation without spans is wanted that begins at this of the instructions. Nothing has happened.
    Rest(usize),
    /// Something else. Nothing has happened.
    Different(Box<Report>),
}

impl Cpu {
    /// Runs the block at RIP both ways, or one instruction of it that can only be run once.
    pub fn run_checked(&mut self, variant: Variant) -> R<()> {
        let Some(mut check) = self.check.take() else { return self.run_translated(variant) };
        let result = self.compare_block(&mut check, variant);
        self.check = Some(check);
        result
    }

    fn compare_block(&mut self, check: &mut Check, variant: Variant) -> R<()> {
        if self.user.area().attention().load(Ordering::SeqCst) != 0 {
            // Asked for while other vCPUs ran; what it is may concern this block.
            return Ok(());
        }
        let Check { pieces, start, interpreted } = check;
        let mut most = MAX_OPS;
        let mut difference = None;
        for _ in 0..ATTEMPTS {
            self.notice_code_changes();
            let found = self.find_block()?;
            // SAFETY: the block is alive until translated code runs or another is looked for.
            let block = unsafe { &*found };
            let Some(piece) = self.piece(pieces, block, variant, most) else {
                return self.run_first(found);
            };
            match self.run_both(block, piece, variant, start, interpreted) {
                Verdict::Same(result) => return result,
                Verdict::Shorter(count) => most = count,
                Verdict::Rest(place) => {
                    let part = block.part(place..piece.offsets.len());
                    let Some((entries, _)) = self.translate_part(&part, variant.without_spans()) else {
                        continue;
                    };
                    piece.rests.push((place, entries));
                }
                Verdict::Different(report) => {
                    self.counters.comparisons_repeated += 1;
                    difference = Some(report);
                }
            }
        }
        self.fatal = difference.map(|report| report.text(self, start, variant));
        Ok(())
    }

    /// The instructions of a block that are to be compared, at most so many; `None` if the first cannot be.
    fn piece<'a>(
        &mut self,
        pieces: &'a mut Pieces,
        block: &Block,
        variant: Variant,
        most: usize,
    ) -> Option<&'a mut Piece> {
        let key = (block.gpa(), variant, most);
        let is_it = |piece: &Piece| piece.bytes == block.bytes;
        pieces.drop_old(self.translator.as_ref()?.cache.clears());
        if !pieces.known.get(&key).is_some_and(is_it) {
            let piece = self.new_piece(block, variant, most)?;
            pieces.drop_old(self.translator.as_ref()?.cache.clears());
            pieces.known.insert(key, piece);
        }
        pieces.known.get_mut(&key)
    }

    fn new_piece(&mut self, block: &Block, variant: Variant, most: usize) -> Option<Piece> {
        if block.bytes.is_empty() {
            // It does not lie in RAM.
            return None;
        }
        let mut instructions = repeatable(block, variant.code_bits(), most);
        if ends_with_loop(&instructions) {
            instructions.pop();
        }
        let last = instructions.last()?;
        let (entries, unit) = self.translate_part(&block.part(0..instructions.len()), variant)?;
        let is_loop = last.is_jcc_short_or_near() && last.near_branch_target() == 0;
        Some(Piece {
            bytes: block.bytes.clone(),
            undefined: undefined_flags(&instructions),
            is_indirect: matches!(
                last.flow_control(),
                FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
            ),
            goes_round: is_loop && !self.translator.as_ref()?.cache.is_linked_to_itself(unit),
            entries,
            offsets: instructions.iter().map(Instruction::ip).collect(),
            rests: Vec::new(),
        })
    }

    /// Where a translation of a part of a block is entered, and the unit's number.
    fn translate_part(&mut self, part: &Block, variant: Variant) -> Option<(Entries, u32)> {
        let unit = self.translate_block(part, variant)?;
        let cache = &self.translator.as_ref()?.cache;
        let ways = [Place::Memory, Place::Host, Place::Both];
        Some((Entries(ways.map(|flags| cache.entry(unit, flags))), unit))
    }

    fn run_both(
        &mut self,
        block: &Block,
        piece: &Piece,
        variant: Variant,
        start: &mut State,
        interpreted: &mut State,
    ) -> Verdict {
        let all_but_one = piece.undefined.len() - 1;
        if piece.goes_round && self.way() >= 2 {
            // In turns it is a loop and instructions with a branch behind them.
            return Verdict::Shorter(all_but_one);
        }
        let (gpa, counters) = (block.gpa(), self.counters);
        *start = State::of(self, Ok(()));
        self.journal.begin_stores();
        let run = self.interpret_piece(block, piece, variant);
        *interpreted = State::of(self, run.result);
        self.journal.take_back_stores(&self.map, self.user.area().tlb());
        start.restore(self);
        self.counters = counters;
        if self.journal.met_device() {
            return Verdict::Shorter(if run.instructions > run.place { all_but_one } else { run.place - 1 });
        }
        if piece.goes_round && run.result.is_ok() && interpreted.rip == start.rip {
            return Verdict::Shorter(all_but_one);
        }

        let stored_before = self.way() != 3;
        self.journal.begin_pages(self.user.area().tlb(), stored_before);
        let entered = self.enter_piece(piece, variant, interpreted.rip);
        let same_memory = self.journal.end_pages(self.user.area().tlb());
        let result = match entered {
            Ok(result) => result,
            Err(place) => {
                self.take_back(start, counters);
                return Verdict::Rest(place);
            }
        };
        let other_flags = interpreted.status ^ self.user.status;
        if same_memory
            && !self.journal.met_device()
            && interpreted.is_state_of(self, result)
            && (other_flags == 0 || other_flags & !piece.undefined_flags(run.place) == 0)
        {
            self.journal.accept();
            self.counters.blocks_compared += 1;
            self.counters.instructions_compared += run.instructions as u64;
            return Verdict::Same(result);
        }
        let (translated, undefined) = (State::of(self, result), piece.undefined_flags(run.place));
        let report = Report::new(gpa, piece, undefined, interpreted, &translated, &self.journal);
        self.take_back(start, counters);
        Verdict::Different(Box::new(report))
    }

    /// Makes everything what it was before the block, after translated code ran.
    fn take_back(&mut self, start: &State, counters: Counters) {
        self.journal.reject(&self.map, self.user.area().tlb());
        start.restore(self);
        self.counters = counters;
    }

    /// Interprets as far as translated code would go without coming back, but not too many rounds of a loop.
    fn interpret_piece(&mut self, block: &Block, piece: &Piece, variant: Variant) -> Interpreted {
        let (start, count) = (self.user.rip, piece.undefined.len());
        let mut instructions = 0;
        for _ in 0..ROUNDS {
            let (result, place) = self.interpret_round(&block.ops[..count], variant);
            instructions += place;
            let goes_round = piece.goes_round && place == count && self.user.rip == start;
            if result.is_err() || !goes_round || self.journal.met_device() {
                return Interpreted { result, instructions, place };
            }
        }
        Interpreted { result: Ok(()), instructions, place: count }
    }

    /// Also returns how many instructions were begun.
    fn interpret_round(&mut self, ops: &[Op], variant: Variant) -> (R<()>, usize) {
        self.stop_block = false;
        self.user.select_returns(variant.privilege());
        for (index, op) in ops.iter().enumerate() {
            self.next_ip = self.user.rip.wrapping_add(u64::from(op.len));
            let flow = match (op.run)(self, op) {
                Ok(flow) => flow,
                Err(raised) => {
                    self.fault_segment = op.segment;
                    return (Err(raised), index + 1);
                }
            };
            self.user.rip = self.next_ip;
            let leaves = flow == Flow::End
                || self.stop_block
                || self.user.are_returns_forgotten()
                || self.variant() != Some(variant)
                || self.journal.met_device();
            if leaves {
                return (Ok(()), index + 1);
            }
        }
        (Ok(()), ops.len())
    }

    /// Runs the translation, undisturbed. `next` is where it is expected to lead. Fails as [`Verdict::Rest`] says.
    fn enter_piece(&mut self, piece: &Piece, variant: Variant, next: u64) -> Result<R<()>, usize> {
        // Translated code looks at the attention word and leaves early.
        let asked = self.user.area().attention().swap(0, Ordering::SeqCst);
        let is_known = piece.is_indirect && self.way() == 0;
        if is_known && let Some(exit) = self.exit_at(variant, next) {
            self.user.targets().expect(variant.privilege(), next, exit);
        }
        let result = self.enter_rounds(piece, variant, next);
        if is_known {
            self.user.targets().forget(variant.privilege(), next);
        }
        self.user.area().attention().fetch_or(asked, Ordering::SeqCst);
        result
    }

    /// Enters the translation, and again where it was left for one without spans, which does not go round.
    fn enter_rounds(&mut self, piece: &Piece, variant: Variant, next: u64) -> Result<R<()>, usize> {
        let start = self.user.rip;
        let mut result = self.enter_unlinked(variant, piece.entries, next);
        for _ in 0..2 * ROUNDS {
            let offset = self.user.rip.wrapping_sub(start);
            let entries = if self.has_left_spans() {
                piece.rest_at(offset)?
            } else if piece.goes_round && result.is_ok() && offset == 0 {
                piece.entries
            } else {
                break;
            };
            result = self.enter_unlinked(variant, entries, next);
        }
        Ok(result)
    }

    /// Which of four ways the present block goes, where there are several to be tried.
    fn way(&self) -> u64 {
        self.counters.blocks_compared % 4
    }

    /// Enters a unit that is to be left at its end. If it ends with a return, that is in turns one to where the last call or the
    /// one before was made, or to somewhere else.
    fn enter_unlinked(&mut self, variant: Variant, entries: Entries, next: u64) -> R<()> {
        let callers = match self.way() {
            1 => [next, SOME_RIP],
            2 => [SOME_RIP, next],
            _ => [SOME_RIP; 2],
        };
        let Some(translator) = &self.translator else { return Ok(()) };
        let leave = translator.cache.routines(variant.kind()).exit_to;
        self.user.forget_returns();
        self.user.prepare_returns(variant.privilege(), leave, callers);
        self.enter(variant, entries.by_turn(self.counters.blocks_compared))
    }

    /// Where a jump to a RIP leads that leaves translated code.
    fn exit_at(&mut self, variant: Variant, rip: u64) -> Option<u64> {
        let cache = &mut self.translator.as_mut()?.cache;
        cache.exit_at(variant.kind(), (rip & PAGE_MASK) as u16)
    }
}

impl Piece {
    /// The ways into the translation without spans that begins at an offset. Fails with the place of the instruction there.
    fn rest_at(&self, offset: u64) -> Result<Entries, usize> {
        let place = self.offsets.iter().position(|other| *other == offset).unwrap_or_default();
        self.rests.iter().find(|(known, _)| *known == place).map(|(_, entries)| *entries).ok_or(place)
    }

    /// The status flags that are undefined where so many instructions have been executed, or the last of them has faulted.
    fn undefined_flags(&self, executed: usize) -> u16 {
        let last = &self.undefined[executed.saturating_sub(2)..executed];
        let round_before = self.undefined.last().filter(|_| self.goes_round);
        last.iter().chain(round_before).fold(0, |flags, more| flags | more)
    }
}

/// The instructions of a block, at most so many, that can be run twice, from the first.
fn repeatable(block: &Block, bits: u32, most: usize) -> Vec<Instruction> {
    let mut decoder = Decoder::new(bits, &block.bytes, decode::options());
    let most = most.min(block.ops.len());
    (0..most).map(|_| decoder.decode()).take_while(is_repeatable).collect()
}

/// Whether the end of a block is a loop: the last instruction branches to one behind the first. A translation without spans that
/// begins there goes round, so the branch is left to be compared by itself.
fn ends_with_loop(instructions: &[Instruction]) -> bool {
    let Some((last, others)) = instructions.split_last() else { return false };
    last.is_jcc_short_or_near() && others.iter().skip(1).any(|other| other.ip() == last.near_branch_target())
}

/// Behind each of these instructions, the status flags that the manuals leave undefined.
fn undefined_flags(instructions: &[Instruction]) -> Box<[u16]> {
    let mut undefined = 0;
    let behind = |instruction: &Instruction| {
        undefined &= !instruction.rflags_modified();
        undefined |= instruction.rflags_undefined();
        packed(undefined)
    };
    instructions.iter().map(behind).collect()
}

/// Status flags in iced's form as [`crate::user::UserRegs::status`] has them.
fn packed(flags: u32) -> u16 {
    status::from_rflags(status::rflags_of_iced(flags)) & !status::ALWAYS
}

/// Whether an instruction does the same when it is run a second time from the same state, and nothing that reaches beyond
/// registers and memory.
fn is_repeatable(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    match instruction.mnemonic() {
        // Clocks, random numbers.
        Rdtsc | Rdtscp | Rdpmc | Rdrand | Rdseed => false,
        // Devices and other processors; the interrupt controller's registers, also as MSRs and as CR8.
        In | Insb | Insw | Insd | Out | Outsb | Outsw | Outsd | Rdmsr | Wrmsr => false,
        Mov if matches!(instruction.code(), Code::Mov_r32_cr | Code::Mov_r64_cr) => {
            instruction.op1_register() != iced_x86::Register::CR8
        }
        Mov if matches!(instruction.code(), Code::Mov_cr_r32 | Code::Mov_cr_r64) => {
            instruction.op0_register() != iced_x86::Register::CR8
        }
        // The processor sleeps.
        Hlt | Mwait | Monitor | Umwait | Tpause => false,
        _ => true,
    }
}
