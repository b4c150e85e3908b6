//! The same code in different states of the processor: privilege, code size, and which instructions the OS has enabled.

use iced_x86::code_asm::*;
use x86::bits::{self, cr0};

use crate::world::*;

const TURNS: u32 = 25;
const SHARED: u64 = PAGES + 0x40;
/// INT of this vector asks the kernel for something.
const CALL: u8 = 0x81;

#[test]
fn code_that_the_kernel_and_users_share() {
    each(&[3], |world| {
        world.code(SHARED, |a| {
            a.paddq(xmm0, xmm1)?;
            a.add(qword_ptr(DATA), rbx)?;
            a.mov(rcx, qword_ptr(DATA))?;
            a.ret()
        });
        world.handler(CALL, |a| {
            a.call(SHARED)?;
            a.iretq()
        });
        world.repeat(TURNS, |a| {
            a.call(SHARED)?;
            a.int(i32::from(CALL))?;
            a.call(SHARED)
        });
        let mut state = world.start();
        state.regs.gpr[3] = 7;
        state.xsave[160] = 0;
        state.xsave[160 + 16] = 3;
        state.xsave[x86::xsave::XSTATE_BV] = 3;
        world.run(&state);
        let calls = 3 * u64::from(TURNS);
        assert_eq!(world.bench.get64(DATA), 7 * calls);
        assert_eq!(world.gpr(1), 7 * calls);
        let sum = u64::from_le_bytes(world.bench.cpu().user.vector[0][..8].try_into().expect("eight bytes"));
        assert_eq!(sum, 3 * calls);
    });
}

#[test]
fn the_same_bytes_as_32_bit_and_64_bit_code() {
    each(&[0, 3], |world| {
        // 64-bit: INC EBX with REX; RETF. 32-bit: INC EAX; INC EBX; RETF.
        world.bench.write(SHARED, &[0x40, 0xff, 0xc3, 0xcb]);
        let (code64, code32) = if world.cpl == 0 { (0x08u32, 0x18u32) } else { (0x2b, 0x33) };
        world.repeat(TURNS, |a| {
            let (mut first, mut second) = (a.create_label(), a.create_label());
            // In this mode.
            a.lea(rsi, ptr(first))?;
            a.sub(rsp, 8)?;
            a.mov(dword_ptr(rsp), esi)?;
            a.mov(dword_ptr(rsp + 4), code64)?;
            a.jmp(SHARED)?;
            a.set_label(&mut first)?;
            // In the other, and back.
            a.lea(rsi, ptr(second))?;
            a.sub(rsp, 16)?;
            a.mov(dword_ptr(rsp), SHARED as u32)?;
            a.mov(dword_ptr(rsp + 4), code32)?;
            a.mov(dword_ptr(rsp + 8), esi)?;
            a.mov(dword_ptr(rsp + 12), code64)?;
            a.db(&[0xcb])?;
            a.set_label(&mut second)?;
            a.nop()
        });
        let mut state = world.start();
        state.regs.gpr[0] = 0;
        state.regs.gpr[3] = 0;
        world.run(&state);
        assert_eq!((world.gpr(0), world.gpr(3)), (u64::from(TURNS), 2 * u64::from(TURNS)));
    });
}

#[test]
fn vector_instructions_that_the_kernel_disables() {
    each(&[0, 3], |world| {
        world.handler(7, |a| {
            a.clts()?;
            a.inc(qword_ptr(NOTES))?;
            a.iretq()
        });
        world.handler(CALL, |a| {
            a.push(rax)?;
            a.mov(rax, iced_x86::code_asm::cr0)?;
            a.or(eax, cr0::TS as i32)?;
            a.mov(iced_x86::code_asm::cr0, rax)?;
            a.pop(rax)?;
            a.iretq()
        });
        world.code(SHARED, |a| {
            a.paddq(xmm0, xmm1)?;
            a.paddq(xmm0, xmm1)?;
            a.ret()
        });
        world.repeat(TURNS, |a| {
            a.call(SHARED)?;
            a.int(i32::from(CALL))?;
            a.inc(rbx)?;
            a.call(SHARED)?;
            a.int(i32::from(CALL))?;
            // Without a vector register, and nothing at all of it.
            a.cvtsd2si(rax, qword_ptr(DATA))?;
            a.andn(ecx, ebx, ebx)
        });
        let mut state = world.start();
        state.xsave[160 + 16] = 3;
        state.xsave[x86::xsave::XSTATE_BV] = 3;
        world.run(&state);
        assert_eq!(world.note(0), 2 * u64::from(TURNS), "two #NM each turn");
        let sum = u64::from_le_bytes(world.bench.cpu().user.vector[0][..8].try_into().expect("eight bytes"));
        assert_eq!(sum, 4 * 3 * u64::from(TURNS));
    });
}

#[test]
fn sse_and_avx_that_cr4_and_xcr0_disable() {
    each(&[0], |world| {
        // #UD: enable everything.
        world.handler(6, |a| {
            a.push(rax)?;
            a.push(rcx)?;
            a.push(rdx)?;
            a.mov(rax, cr4)?;
            a.or(eax, (bits::cr4::OSFXSR | bits::cr4::OSXSAVE) as i32)?;
            a.mov(cr4, rax)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.mov(eax, 7)?;
            a.xsetbv()?;
            a.inc(qword_ptr(NOTES))?;
            a.pop(rdx)?;
            a.pop(rcx)?;
            a.pop(rax)?;
            a.iretq()
        });
        world.code(SHARED, |a| {
            a.paddq(xmm0, xmm1)?;
            a.vpaddq(ymm2, ymm1, ymm1)?;
            a.ret()
        });
        world.repeat(TURNS, |a| {
            a.call(SHARED)?;
            // Without OSFXSR no SSE, then without the AVX bit no AVX.
            a.mov(rax, cr4)?;
            a.and(eax, !(bits::cr4::OSFXSR as i32))?;
            a.mov(cr4, rax)?;
            a.call(SHARED)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.mov(eax, 3)?;
            a.xsetbv()?;
            a.call(SHARED)
        });
        let mut state = world.start();
        if world.bench.cpu().xcr0_allowed() & 4 == 0 {
            return;
        }
        state.control.cr4 |= bits::cr4::OSXSAVE;
        state.control.xcr0 = 7;
        state.xsave[160 + 16] = 3;
        state.xsave[x86::xsave::XSTATE_BV] = 3;
        world.run(&state);
        assert_eq!(world.note(0), 2 * u64::from(TURNS), "two #UD each turn");
        let sum = u64::from_le_bytes(world.bench.cpu().user.vector[0][..8].try_into().expect("eight bytes"));
        assert_eq!(sum, 3 * 3 * u64::from(TURNS));
    });
}

#[test]
fn simd_exceptions_that_are_switched_on_and_off() {
    each(&[0, 3], |world| {
        // Masked again, with no flag set.
        world.handler(19, |a| {
            a.inc(qword_ptr(NOTES))?;
            a.ldmxcsr(dword_ptr(NOTES + 64))?;
            a.iretq()
        });
        world.bench.set32(NOTES + 64, 0x1f80);
        world.bench.set32(NOTES + 72, 0x1d80);
        // Rounds to zero.
        world.bench.set32(NOTES + 80, 0x7f80);
        world.bench.set64(DATA, 2.75f64.to_bits());
        world.bench.set64(DATA + 8, 1f64.to_bits());
        world.code(SHARED, |a| {
            a.movsd_2(xmm0, qword_ptr(DATA + 8))?;
            a.divsd(xmm0, xmm1)?;
            a.cvtsd2si(rax, qword_ptr(DATA))?;
            a.add(rbx, rax)?;
            a.ret()
        });
        world.repeat(TURNS, |a| {
            // 1 / 0 is infinity, then an exception, then infinity again; 2.75 is 3, or 2 when it is cut.
            a.call(SHARED)?;
            a.ldmxcsr(dword_ptr(NOTES + 72))?;
            a.call(SHARED)?;
            a.ldmxcsr(dword_ptr(NOTES + 80))?;
            a.call(SHARED)?;
            a.ldmxcsr(dword_ptr(NOTES + 64))
        });
        let mut state = world.start();
        state.regs.gpr[3] = 0;
        state.xsave[x86::xsave::XSTATE_BV] = 3;
        world.run(&state);
        assert_eq!(world.gpr(3), u64::from(TURNS) * (3 + 3 + 2));
        assert_eq!(world.note(0), u64::from(TURNS), "one #XM each turn");
    });
}
