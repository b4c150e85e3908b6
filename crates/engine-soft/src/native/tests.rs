use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::*;
use crate::user::status;
use x86::bits::rflags;

fn decode(bitness: u32, bytes: &[u8]) -> Instruction {
    let instruction = Decoder::with_ip(bitness, bytes, 0x1000, DecoderOptions::NONE).decode();
    assert!(!instruction.is_invalid(), "{bytes:02x?}");
    instruction
}

/// Assembles one instruction.
fn one(make: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Instruction {
    let mut assembler = CodeAssembler::new(64).unwrap();
    make(&mut assembler).unwrap();
    decode(64, &assembler.assemble(0x1000).unwrap())
}

/// Compiles and runs one instruction.
fn run(instruction: &Instruction, regs: &mut UserRegs, memory: Option<&mut [u8]>) -> Result<(), NativeFault> {
    let mut thunks = Thunks::new().unwrap();
    let thunk = thunks.compile(instruction).unwrap();
    let operand = match memory {
        Some(bytes) => {
            assert!(bytes.len() >= usize::from(thunk.memory_bytes));
            Operand { host: bytes.as_mut_ptr(), guest: 0x7777_0000 }
        }
        None => {
            assert!(matches!(thunk.memory, MemoryUse::None));
            Operand::NONE
        }
    };
    // SAFETY: the thunks live to the end of the function; the operand was checked.
    unsafe { thunk.run(regs, operand) }
}

#[test]
fn arithmetic_sets_flags_and_only_its_destination() {
    let mut regs = UserRegs::default();
    for (number, gpr) in regs.gpr.iter_mut().enumerate() {
        *gpr = 0x1111_1111_1111_1111 * number as u64;
    }
    regs.gpr[0] = u64::MAX;
    regs.gpr[4] = 1;
    let before = regs.gpr;
    run(&one(|a| a.add(rax, rsp)), &mut regs, None).unwrap();
    assert_eq!(regs.gpr[0], 0);
    assert_eq!(regs.gpr[1..], before[1..]);
    assert_eq!(status::to_rflags(regs.status), rflags::CF | rflags::ZF | rflags::PF | rflags::AF);
}

#[test]
fn flags_pass_through_instructions_that_keep_them() {
    for bits in 0..64u64 {
        let all = [rflags::CF, rflags::PF, rflags::AF, rflags::ZF, rflags::SF, rflags::OF];
        let flags = (0..6).filter(|i| bits & (1 << i) != 0).fold(0, |f, i| f | all[i as usize]);
        let mut regs = UserRegs { status: status::from_rflags(flags), ..UserRegs::default() };
        run(&one(|a| a.inc(ecx)), &mut regs, None).unwrap();
        assert_eq!(status::to_rflags(regs.status), flags & rflags::CF);
        let mut regs = UserRegs { status: status::from_rflags(flags), ..UserRegs::default() };
        run(&one(|a| a.seto(dh)), &mut regs, None).unwrap();
        assert_eq!(regs.gpr[2], if flags & rflags::OF != 0 { 0x100 } else { 0 });
        assert_eq!(status::to_rflags(regs.status), flags);
    }
}

#[test]
fn the_guest_stack_pointer_is_a_number_like_any_other() {
    let mut regs = UserRegs::default();
    regs.gpr[4] = 0x1234_5678_9abc_def0;
    run(&one(|a| a.xchg(rsp, rax)), &mut regs, None).unwrap();
    assert_eq!((regs.gpr[0], regs.gpr[4]), (0x1234_5678_9abc_def0, 0));
    run(&one(|a| a.movzx(esp, ah)), &mut regs, None).unwrap();
    assert_eq!(regs.gpr[4], 0xde);
    run(&one(|a| a.mov(spl, 0x55)), &mut regs, None).unwrap();
    assert_eq!(regs.gpr[4], 0x55);
}

#[test]
fn a_renamed_stack_pointer_is_not_taken_for_its_stand_in() {
    let mut thunks = Thunks::new().unwrap();
    let mut regs = UserRegs::default();
    for number in 0..16 {
        regs.gpr[number] = number as u64;
    }
    let stand_ins: [(Instruction, u64); 4] = [
        (one(|a| a.mov(eax, esp)), 4),
        (one(|a| a.mov(eax, esi)), 6),
        (one(|a| a.mov(eax, r8d)), 8),
        (one(|a| a.mov(eax, edi)), 7),
    ];
    for (instruction, expected) in &stand_ins {
        let thunk = thunks.compile(instruction).unwrap();
        // SAFETY: the thunks are alive; there is no memory operand.
        unsafe { thunk.run(&mut regs, Operand::NONE) }.unwrap();
        assert_eq!(regs.gpr[0], *expected);
    }
}

#[test]
fn memory_is_read_and_written_where_the_caller_says() {
    let mut regs = UserRegs::default();
    regs.gpr[3] = 5;
    let mut bytes = 37u32.to_le_bytes();
    let instruction = one(|a| a.xadd(dword_ptr(rsp + rbx * 8 + 0x1234), ebx).and(Ok(())));
    run(&instruction, &mut regs, Some(&mut bytes)).unwrap();
    assert_eq!(u32::from_le_bytes(bytes), 42);
    assert_eq!(regs.gpr[3], 37);
}

#[test]
fn what_is_accessed_is_known() {
    let mut thunks = Thunks::new().unwrap();
    let mut check = |bytes: &[u8], memory, size| {
        let thunk = thunks.compile(&decode(64, bytes)).unwrap();
        assert_eq!((thunk.memory, thunk.memory_bytes), (memory, size), "{bytes:02x?}");
    };
    check(&[0x48, 0x03, 0x03], MemoryUse::Read, 8); // add rax, [rbx]
    check(&[0x88, 0x03], MemoryUse::Write, 1); // mov [rbx], al
    check(&[0xf0, 0x48, 0x0f, 0xc7, 0x0b], MemoryUse::ReadWrite, 16); // lock cmpxchg16b [rbx]
    check(&[0x3b, 0x03], MemoryUse::Read, 4); // cmp eax, [rbx]
    check(&[0x48, 0x8d, 0x03], MemoryUse::Address, 0); // lea rax, [rbx]
    check(&[0x0f, 0x18, 0x03], MemoryUse::Address, 0); // prefetchnta [rbx]
    check(&[0x0f, 0x1f, 0x03], MemoryUse::Address, 0); // nop [rbx]
    check(&[0x0f, 0xae, 0x3b], MemoryUse::Read, 1); // clflush [rbx]
    check(&[0xdd, 0x33], MemoryUse::Write, 108); // fnsave [rbx]
    check(&[0xd9, 0x23], MemoryUse::Read, 28); // fldenv [rbx]
    check(&[0xdb, 0x2b], MemoryUse::Read, 10); // fld tbyte [rbx]
    check(&[0x48, 0x0f, 0xa3, 0x03], MemoryUse::Read, 8); // bt [rbx], rax
}

#[test]
fn lea_takes_the_address_as_a_number() {
    let mut regs = UserRegs::default();
    let mut thunks = Thunks::new().unwrap();
    let thunk = thunks.compile(&one(|a| a.lea(r9d, qword_ptr(rbx + rcx * 4)))).unwrap();
    let operand = Operand { host: 0x1_2345_6789u64 as *mut u8, guest: 0 };
    // SAFETY: the thunks are alive and LEA accesses nothing.
    unsafe { thunk.run(&mut regs, operand) }.unwrap();
    assert_eq!(regs.gpr[9], 0x2345_6789);
}

#[test]
fn bit_strings_reach_beyond_their_word() {
    let instruction = one(|a| a.bts(dword_ptr(rbx), esp));
    let mut regs = UserRegs::default();
    regs.gpr[4] = 0xffff_ffdf; // -33
    assert_eq!(bit_string_displacement(&instruction, &regs), Some(-8));
    let mut word = [0; 4];
    run(&instruction, &mut regs, Some(&mut word)).unwrap();
    assert_eq!(word, [0, 0, 0, 0x80]);
    assert_eq!(regs.gpr[4], 0xffff_ffdf, "the offset register is unchanged");
    assert_eq!(bit_string_displacement(&one(|a| a.bts(dword_ptr(rbx), 3)), &regs), None);
    regs.gpr[0] = 0x1_0023;
    run(&one(|a| a.bt(word_ptr(rbx), ax)), &mut regs, Some(&mut [0xf7, 0xff])).unwrap();
    assert_eq!(status::to_rflags(regs.status) & rflags::CF, 0, "bit 3");
}

#[test]
fn faults_leave_the_registers_alone() {
    let mut regs = UserRegs::default();
    regs.gpr[0] = 7;
    regs.gpr[2] = 9;
    regs.status = status::from_rflags(rflags::CF | rflags::OF);
    let before = regs.clone();
    assert_eq!(run(&one(|a| a.div(rsp)), &mut regs, None), Err(NativeFault::DivideError));
    assert_eq!((regs.gpr, regs.status), (before.gpr, before.status));

    #[repr(align(64))]
    struct Aligned([u8; 64]);
    let mut bytes = Aligned([0xaa; 64]);
    let instruction = one(|a| a.movaps(xmm3, xmmword_ptr(rcx)));
    assert_eq!(run(&instruction, &mut regs, Some(&mut bytes.0[1..])), Err(NativeFault::GeneralProtection));
    assert_eq!(regs.vector[3], [0; 32]);
    run(&instruction, &mut regs, Some(&mut bytes.0)).unwrap();
    assert_eq!(regs.vector[3][..16], [0xaa; 16]);
    assert_eq!(regs.vector[3][16..], [0; 16]);
}

#[test]
fn unmasked_simd_exceptions_fault_with_their_flag() {
    let mut regs = UserRegs { mxcsr: 0x1f80 & !0x200, ..UserRegs::default() };
    regs.vector[1][..4].copy_from_slice(&1f32.to_le_bytes());
    assert_eq!(run(&one(|a| a.divss(xmm1, xmm0)), &mut regs, None), Err(NativeFault::Simd));
    assert_eq!(regs.mxcsr, 0x1f80 & !0x200 | 4);
    assert_eq!(regs.vector[1][..4], 1f32.to_le_bytes());
}

#[test]
fn x87_exceptions_wait_for_the_next_instruction() {
    let mut regs = UserRegs { rip: 0x5555_0000_1234, ..UserRegs::default() };
    regs.x87.0[0..2].copy_from_slice(&0x37bu16.to_le_bytes()); // zero divide unmasked
    run(&one(|a| a.fld1()), &mut regs, None).unwrap();
    run(&one(|a| a.fldz()), &mut regs, None).unwrap();
    run(&one(|a| a.fdivp(st1, st0)), &mut regs, None).unwrap();
    assert_eq!(regs.x87.0[2] & 0x84, 0x84, "ES and ZE");
    assert_eq!(regs.x87.0[8..16], regs.rip.to_le_bytes(), "FIP is the guest's");
    assert_eq!(run(&one(|a| a.fldz()), &mut regs, None), Err(NativeFault::X87));
    assert_eq!(run(&one(|a| a.wait()), &mut regs, None), Err(NativeFault::X87));
    run(&one(|a| a.fnclex()), &mut regs, None).unwrap();
    run(&one(|a| a.wait()), &mut regs, None).unwrap();
}

/// Intel processors record the pointers always, AMD's only with an unmasked exception, as here.
#[test]
fn x87_pointers_are_the_guests() {
    let mut regs = UserRegs { rip: 0x5555_0000_1234, ..UserRegs::default() };
    regs.x87.0[0..2].copy_from_slice(&0x340u16.to_le_bytes());
    let mut operand = 0x7ff0_0000_0000_0001u64.to_le_bytes(); // a signalling NaN
    run(&one(|a| a.fldpi()), &mut regs, None).unwrap();
    regs.rip += 2;
    let instruction = one(|a| a.fadd(qword_ptr(rsp + 8)));
    run(&instruction, &mut regs, Some(&mut operand)).unwrap();
    assert_eq!(regs.x87.0[8..16], regs.rip.to_le_bytes());
    assert_eq!(regs.x87.0[16..24], 0x7777_0000u64.to_le_bytes());
    let opcode = u16::from_le_bytes([regs.x87.0[6], regs.x87.0[7]]);
    assert!(opcode == 0 || opcode == 0x444, "DC 44 24 08 gives opcode 444 where it is recorded: {opcode:x}");
}

#[test]
fn vector_uppers_follow_the_encoding() {
    let mut regs = UserRegs { vector: [[0x5a; 32]; 16], ..UserRegs::default() };
    run(&one(|a| a.pxor(xmm9, xmm9)), &mut regs, None).unwrap();
    assert_eq!((regs.vector[9][..16].to_vec(), regs.vector[9][16..].to_vec()), (vec![0; 16], vec![0x5a; 16]));
    run(&one(|a| a.vmovaps(xmm2, xmm3)), &mut regs, None).unwrap();
    assert_eq!((regs.vector[2][..16].to_vec(), regs.vector[2][16..].to_vec()), (vec![0x5a; 16], vec![0; 16]));
    run(&one(|a| a.vzeroupper()), &mut regs, None).unwrap();
    assert!(regs.vector.iter().all(|r| r[16..] == [0; 16]));
    assert_eq!(regs.vector[15][..16], [0x5a; 16]);
    run(&one(|a| a.vzeroall()), &mut regs, None).unwrap();
    assert_eq!(regs.vector, [[0; 32]; 16]);
}

#[test]
fn mmx_and_xmm_state_meet() {
    let mut regs = UserRegs::default();
    regs.vector[6][..8].copy_from_slice(&0x0102_0304_0506_0708u64.to_le_bytes());
    run(&one(|a| a.movdq2q(mm3, xmm6)), &mut regs, None).unwrap();
    assert_eq!(regs.x87.0[32 + 48..][..8], 0x0102_0304_0506_0708u64.to_le_bytes());
    assert_eq!(regs.x87.0[4], 0xff, "every register is tagged valid");
    run(&one(|a| a.emms()), &mut regs, None).unwrap();
    assert_eq!(regs.x87.0[4], 0);
}

#[test]
fn code_of_smaller_modes_runs() {
    let mut regs = UserRegs::default();
    regs.gpr[4] = 0xffff;
    run(&decode(16, &[0x44]), &mut regs, None).unwrap(); // inc sp
    assert_eq!(regs.gpr[4], 0);
    let mut bytes = [1, 2, 3, 4];
    run(&decode(32, &[0xa1, 0x10, 0, 0, 0]), &mut regs, Some(&mut bytes)).unwrap(); // mov eax, [0x10]
    assert_eq!(regs.gpr[0], 0x0403_0201);
    run(&decode(16, &[0x03, 0x07]), &mut regs, Some(&mut bytes)).unwrap(); // add ax, [bx]
    assert_eq!(regs.gpr[0], 0x0403_0402);
}

#[test]
fn what_the_host_must_not_run_is_refused() {
    let mut thunks = Thunks::new().unwrap();
    let refused: [(u32, &[u8]); 20] = [
        (64, &[0x50]),                               // push rax
        (64, &[0xeb, 0x00]),                         // jmp
        (64, &[0xa4]),                               // movsb
        (64, &[0x0f, 0x05]),                         // syscall
        (64, &[0xf4]),                               // hlt
        (64, &[0xec]),                               // in al, dx
        (64, &[0x0f, 0xa2]),                         // cpuid
        (64, &[0x0f, 0x31]),                         // rdtsc
        (64, &[0x8c, 0xd8]),                         // mov eax, ds
        (64, &[0x0f, 0xae, 0x00]),                   // fxsave
        (64, &[0xc4, 0xe2, 0x75, 0x92, 0x04, 0x18]), // vgatherdps
        (64, &[0x66, 0x0f, 0xf7, 0xc1]),             // maskmovdqu
        (64, &[0x62, 0xf1, 0x7c, 0x48, 0x28, 0xc1]), // vmovaps zmm0, zmm1
        (64, &[0xd7]),                               // xlatb
        (64, &[0xfc]),                               // cld
        (64, &[0x9c]),                               // pushfq
        (64, &[0xf3, 0x0f, 0x01, 0xe8]),             // setssbsy
        (64, &[0xf3, 0x48, 0x0f, 0xae, 0xc0]),       // rdfsbase
        (32, &[0x27]),                               // daa
        (32, &[0x62, 0x00]),                         // bound
    ];
    for (bitness, bytes) in refused {
        let outcome = thunks.compile(&decode(bitness, bytes));
        assert!(matches!(outcome, Err(CompileError::Unsupported(_))), "{bytes:02x?}: {outcome:?}");
    }
}

#[test]
fn the_buffer_fills_and_clears() {
    let mut thunks = Thunks::with_capacity(4096).unwrap();
    let instruction = |value: u32| {
        let [a, b, c, d] = value.to_le_bytes();
        decode(64, &[0xb8, a, b, c, d])
    };
    let full = (0..1000).find(|v| matches!(thunks.compile(&instruction(*v)), Err(CompileError::Full)));
    assert!(full.is_some_and(|count| count > 20), "{full:?}");
    assert!(thunks.compile(&instruction(3)).is_ok(), "what is there stays");
    // SAFETY: no thunk is kept.
    unsafe { thunks.clear() };
    let thunk = thunks.compile(&instruction(999)).unwrap();
    let mut regs = UserRegs::default();
    // SAFETY: the thunk was made after the clearing.
    unsafe { thunk.run(&mut regs, Operand::NONE) }.unwrap();
    assert_eq!(regs.gpr[0], 999);
}
