//! Guests of a few instructions: 32-bit code in an ELF image that is entered by PVH, with paging off and interrupts
//! masked.

use iced_x86::code_asm::{CodeAssembler, al, ax, dx};

/// Where the code is loaded and entered.
const ENTRY: u64 = 0x10_0000;

/// COM1's data port.
pub const COM1: u16 = 0x3f8;
/// PM1 status and, two ports on, PM1 enable (ACPI 6.5 §4.8.3.1).
pub const PM1_STATUS: u16 = 0x400;
/// PM1 control.
pub const PM1_CONTROL: u16 = 0x404;
/// What to write to PM1 control to turn the machine off: SLP_TYP 5, SLP_EN.
pub const POWER_OFF: u16 = 5 << 10 | 1 << 13;

/// A kernel image whose code is written by `program`.
pub fn kernel(program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut code = CodeAssembler::new(32).unwrap();
    program(&mut code);
    elf(&code.assemble(ENTRY).unwrap())
}

/// Writes `value` to a byte-wide port.
pub fn out8(code: &mut CodeAssembler, port: u16, value: u8) {
    code.mov(dx, u32::from(port)).unwrap();
    code.mov(al, u32::from(value)).unwrap();
    code.out(dx, al).unwrap();
}

/// Writes `value` to a word-wide port.
pub fn out16(code: &mut CodeAssembler, port: u16, value: u16) {
    code.mov(dx, u32::from(port)).unwrap();
    code.mov(ax, u32::from(value)).unwrap();
    code.out(dx, ax).unwrap();
}

/// Writes text to COM1.
pub fn print(code: &mut CodeAssembler, text: &str) {
    text.bytes().for_each(|byte| out8(code, COM1, byte));
}

/// Turns the machine off by ACPI.
pub fn power_off(code: &mut CodeAssembler) {
    out16(code, PM1_CONTROL, POWER_OFF);
    spin(code);
}

/// Does nothing for ever, with exits to the machine on the way.
pub fn spin(code: &mut CodeAssembler) {
    let mut again = code.create_label();
    code.set_label(&mut again).unwrap();
    code.mov(dx, 0x80).unwrap();
    code.in_(al, dx).unwrap();
    code.jmp(again).unwrap();
}

/// Says `ready`, then waits for the power button and turns the machine off.
pub fn obey_power_button(code: &mut CodeAssembler) {
    let mut again = code.create_label();
    print(code, "ready\n");
    code.set_label(&mut again).unwrap();
    code.mov(dx, u32::from(PM1_STATUS)).unwrap();
    code.in_(ax, dx).unwrap();
    code.test(ax, 1 << 8).unwrap();
    code.jz(again).unwrap();
    print(code, "button\n");
    power_off(code);
}

/// An ELF image of one segment with a PVH entry note (Xen `docs/misc/pvh.pandoc`).
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((ENTRY as u32).to_le_bytes());
    let code_at = (note_at + note.len() as u64).next_multiple_of(16);

    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend(2u16.to_le_bytes()); // ET_EXEC
    image.extend(62u16.to_le_bytes()); // EM_X86_64
    image.extend(1u32.to_le_bytes());
    image.extend(ENTRY.to_le_bytes());
    image.extend(HEADER.to_le_bytes()); // program headers
    image.extend(0u64.to_le_bytes()); // section headers
    image.extend(0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut program_header = |kind: u32, at: u64, address: u64, len: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for field in [at, address, address, len, len, 16] {
            image.extend(field.to_le_bytes());
        }
    };
    program_header(1, code_at, ENTRY, code.len() as u64);
    program_header(4, note_at, 0, note.len() as u64);
    image.extend(note);
    image.resize(code_at as usize, 0);
    image.extend(code);
    image
}
