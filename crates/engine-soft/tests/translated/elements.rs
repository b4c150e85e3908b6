//! Gathers and masked moves: where one element's page is missing, and that what is in reach needs no help.

use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, MemoryOperand, Register};
use x86::bits::cr4;

use crate::common::*;
use crate::world::*;

const TURNS: u32 = 25;
/// The page that is missing.
const MISSING: u64 = DATA + PAGE;
/// INT of this vector takes the page away.
const REMOVE: u8 = 0x81;
/// What the handler of page faults finds in the destination and the mask.
const DESTINATION: u64 = NOTES + 0x40;
const MASK: u64 = NOTES + 0x80;
/// Indices and masks of programs.
const VECTORS: u64 = NOTES + 0x100;

/// The page fault handler counts, notes CR2, RFLAGS and YMM0 and YMM1, and maps the page.
fn handlers(world: &World) {
    world.mapping_handler(0, MISSING, |a| {
        a.inc(qword_ptr(NOTES))?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(NOTES + 8), rax)?;
        note_stack(a, &[(2, 32)])?;
        a.vmovdqu(ymmword_ptr(DESTINATION), ymm0)?;
        a.vmovdqu(ymmword_ptr(MASK), ymm1)
    });
    world.handler(REMOVE, |a| {
        a.mov(qword_ptr(entry(MISSING)), 0)?;
        a.invlpg(ptr(MISSING))?;
        a.iretq()
    });
}

fn words(world: &World, at: u64, words: [u32; 8]) {
    for (index, word) in words.into_iter().enumerate() {
        world.bench.set32(at + 4 * index as u64, word);
    }
}

fn read_words(world: &World, at: u64) -> [u32; 8] {
    std::array::from_fn(|index| world.bench.get32(at + 4 * index as u64))
}

/// A state with AVX on; `None` if the processor has no AVX2.
fn start(world: &mut World) -> Option<engine::VcpuState> {
    if !is_x86_feature_detected!("avx2") {
        return None;
    }
    let mut state = world.start();
    state.control.cr4 |= cr4::OSXSAVE;
    state.control.xcr0 = 7;
    Some(state)
}

/// Gathers YMM0 from a base with YMM2 as indices and YMM1 as the mask.
fn gather(a: &mut CodeAssembler, code: Code, base: Register) -> Assembled {
    let from = MemoryOperand::with_base_index_scale(base, Register::YMM2, 4);
    a.add_instruction(Instruction::with3(code, Register::YMM0, from, Register::YMM1)?)
}

#[test]
fn a_gather_whose_third_element_faults() {
    const INDICES: [u32; 8] = [3, 1, 0x400, 5, 0x401, 7, 2, 0x402];
    const OLD: u32 = 0x0101_0101;
    each(&[0, 3], |world| {
        let Some(mut state) = start(world) else { return };
        handlers(world);
        for page in [DATA, MISSING] {
            for index in 0..8 {
                world.bench.set32(page + 4 * index, page as u32 + index as u32);
            }
        }
        words(world, VECTORS, INDICES);
        words(world, VECTORS + 32, [OLD; 8]);
        for mask in [[u32::MAX; 8], [1 << 31, 0, 1 << 31, 0, 1 << 31, 1 << 31, 0, 0]] {
            words(world, VECTORS + 64, mask);
            world.bench.set64(NOTES, 0);
            world.repeat(TURNS, |a| {
                a.int(i32::from(REMOVE))?;
                a.vmovdqu(ymm2, ymmword_ptr(VECTORS))?;
                a.vmovdqu(ymm0, ymmword_ptr(VECTORS + 32))?;
                a.vmovdqu(ymm1, ymmword_ptr(VECTORS + 64))?;
                a.mov(r11, DATA)?;
                // The flags that the fault has to push: CF, PF and ZF not, SF.
                a.mov(eax, 0x80u32)?;
                a.add(al, 0)?;
                a.stc()?;
                gather(a, Code::VEX_Vpgatherdd_ymm_vm32y_ymm, Register::R11)?;
                a.setc(bl)?;
                a.vmovdqu(ymmword_ptr(VECTORS + 96), ymm0)?;
                a.vmovdqu(ymmword_ptr(VECTORS + 128), ymm1)
            });
            state.regs.gpr[3] = 0;
            world.run(&state);
            let notes = world.notes(3);
            assert_eq!(notes[..2], [u64::from(TURNS), MISSING], "faults, CR2");
            assert_eq!(notes[2] & 0x8d5, 0x81, "CF and SF");
            assert_eq!(world.gpr(3), 1, "CF afterwards");
            let chosen = |index: usize| mask[index] >> 31 != 0;
            let loaded = |index: usize| {
                let word = DATA as u32 + 4 * INDICES[index];
                world.bench.get32(u64::from(word))
            };
            let expected = |done: usize| -> [u32; 8] {
                std::array::from_fn(|i| if i < done && chosen(i) { loaded(i) } else { OLD })
            };
            assert_eq!(read_words(world, DESTINATION), expected(2), "what was loaded before the fault");
            let left = read_words(world, MASK).map(|word| word >> 31);
            assert_eq!(left, std::array::from_fn(|i| u32::from(i >= 2 && chosen(i))), "what is to be loaded");
            assert_eq!(read_words(world, VECTORS + 96), expected(8));
            assert_eq!(read_words(world, VECTORS + 128), [0; 8]);
        }
    });
}

#[test]
fn masked_moves_at_a_missing_page() {
    each(&[0, 3], |world| {
        let Some(state) = start(world) else { return };
        handlers(world);
        words(world, MISSING - 16, [1, 2, 3, 4, 5, 6, 7, 8]);
        words(world, VECTORS, [u32::MAX, 0, 0, u32::MAX, 0, 0, 0, 0]);
        words(world, VECTORS + 32, [u32::MAX, 0, 0, 0, u32::MAX, 0, 0, 0]);
        world.bench.set64(NOTES, 0);
        world.repeat(TURNS, |a| {
            a.int(i32::from(REMOVE))?;
            // Half of the operand is on the page, but none of its elements is chosen.
            a.vmovdqu(ymm3, ymmword_ptr(VECTORS))?;
            a.vpmaskmovd(ymm0, ymm3, ymmword_ptr(MISSING - 16))?;
            a.vpmaskmovd(ymmword_ptr(MISSING - 16), ymm3, ymm0)?;
            // One is.
            a.vmovdqu(ymm3, ymmword_ptr(VECTORS + 32))?;
            a.vpaddd(ymm1, ymm3, ymm3)?;
            a.vpmaskmovd(ymmword_ptr(MISSING - 16), ymm3, ymm1)?;
            a.vmaskmovps(ymm0, ymm3, ymmword_ptr(MISSING - 16))?;
            a.vmovdqu(ymmword_ptr(VECTORS + 96), ymm0)
        });
        world.run(&state);
        assert_eq!(world.notes(2), [u64::from(TURNS), MISSING], "faults, CR2");
        let stored = u32::MAX - 1;
        assert_eq!(read_words(world, MISSING - 16), [stored, 2, 3, 4, stored, 6, 7, 8]);
        assert_eq!(read_words(world, VECTORS + 96), [stored, 0, 0, 0, stored, 0, 0, 0]);
    });
}

#[test]
fn a_masked_store_to_code_is_noticed() {
    each(&[0, 3], |world| {
        let Some(state) = start(world) else { return };
        let function = PAGES + 0x40;
        world.code(function, |a| {
            a.mov(eax, 0u32)?;
            a.ret()
        });
        words(world, VECTORS, [0, u32::MAX, 0, 0, 0, 0, 0, 0]);
        world.repeat(TURNS, |a| {
            // The immediate operand of the function is the second word.
            a.vmovdqu(xmm3, xmmword_ptr(VECTORS))?;
            a.vmovd(xmm0, ebp)?;
            a.vpshufd(xmm0, xmm0, 0)?;
            a.vpmaskmovd(xmmword_ptr(function + 1 - 4), xmm3, xmm0)?;
            a.call(function)?;
            a.add(rbx, rax)
        });
        let mut state = state;
        state.regs.gpr[3] = 0;
        world.run(&state);
        assert_eq!(world.gpr(3), (1..=u64::from(TURNS)).sum::<u64>());
    });
}

#[test]
fn flags_outlive_gathers_and_masked_moves() {
    each(&[0, 3], |world| {
        let Some(mut state) = start(world) else { return };
        words(world, VECTORS, [0; 8]);
        world.repeat(TURNS, |a| {
            a.mov(r10, DATA)?;
            a.vpxor(ymm2, ymm2, ymm2)?;
            a.vpcmpeqd(ymm1, ymm1, ymm1)?;
            // What is compared is gone when the flags are asked for: without a borrow, one is added.
            a.mov(eax, 5)?;
            a.cmp(eax, 4)?;
            gather(a, Code::VEX_Vpgatherdd_ymm_vm32y_ymm, Register::R10)?;
            a.mov(eax, 9)?;
            a.sbb(rbx, -1)?;
            a.vpcmpeqd(ymm1, ymm1, ymm1)?;
            a.mov(ecx, 5)?;
            a.cmp(ecx, 4)?;
            a.vpmaskmovd(ymm0, ymm1, ymmword_ptr(r10))?;
            a.mov(ecx, 9)?;
            a.sbb(rbx, -1)
        });
        state.regs.gpr[3] = 0;
        world.run(&state);
        assert_eq!(world.gpr(3), 2 * u64::from(TURNS));
    });
}

#[test]
fn what_is_in_the_tlb_needs_no_help() {
    const MANY: u32 = 10_000;
    let mut world = World::new(1, "always", 3, std::sync::Arc::new(NoDevices));
    let world = &mut world;
    let Some(state) = start(world) else { return };
    words(world, VECTORS, [0, 0x400, 0x800, 3, 0x401, 0x802, 1, 2]);
    words(world, VECTORS + 32, [u32::MAX, 0, u32::MAX, 0, 0, 0, 0, u32::MAX]);
    world.code(CODE, |a| {
        let mut turn = a.create_label();
        a.mov(ebp, MANY)?;
        a.mov(r10, DATA)?;
        a.vmovdqu(ymm2, ymmword_ptr(VECTORS))?;
        a.set_label(&mut turn)?;
        a.vpcmpeqd(ymm1, ymm1, ymm1)?;
        gather(a, Code::VEX_Vpgatherdd_ymm_vm32y_ymm, Register::R10)?;
        a.vmovdqu(ymm1, ymmword_ptr(VECTORS + 32))?;
        gather(a, Code::VEX_Vgatherdps_ymm_vm32y_ymm, Register::R10)?;
        a.vmovdqu(ymm1, ymmword_ptr(VECTORS + 32))?;
        a.vpmaskmovd(ymm0, ymm1, ymmword_ptr(r10 + 8))?;
        a.vpmaskmovd(ymmword_ptr(r10 + 0x1008), ymm1, ymm0)?;
        a.dec(ebp)?;
        a.jne(turn)?;
        end(a)
    });
    world.run(&state);
    let calls = world.bench.cpu().counters.handler_calls;
    assert!(calls < u64::from(MANY) / 10, "{calls} calls of handlers in {MANY} turns");
}
