//! Code that is written: by itself, by another vCPU, by a device.

use std::sync::{Arc, Mutex};

use engine::{GuestRegion, IoHandler, VcpuState};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, MemoryRegionAddress};
use x86::paging::pte;

use crate::common::*;
use crate::values::Random;
use crate::world::*;

/// Where code pages are mapped a second time.
const ALIAS: u64 = 0x10_0000;

/// A place in a program that rewrites itself.
#[derive(Clone, Copy)]
enum Part {
    /// ADD, SUB or XOR of RBX with an immediate, at an address.
    Operate(u64),
    /// Writes to the operation of this number; the way it does.
    Write(usize, Way),
    /// To the next part, by a jump.
    Jump,
}

#[derive(Clone, Copy, Debug)]
enum Way {
    /// The whole immediate.
    Move,
    /// One byte of it.
    MoveByte(u64),
    /// Adds to it.
    Add,
    /// With LOCK.
    Exchange,
    /// By a string instruction.
    Store,
    /// The operation itself.
    Opcode(u8),
    /// By a push: eight bytes, the immediate among them.
    Push,
}

/// ModRM bytes of 81h with RBX: ADD, SUB, XOR.
const OPERATIONS: [u8; 3] = [0xc3, 0xeb, 0xf3];

/// What the processor does with the program.
#[derive(Clone)]
struct Model {
    rbx: u64,
    edx: u32,
    code: Vec<u8>,
}

impl Model {
    fn operate(&mut self, at: u64) {
        let at = (at - PAGES) as usize;
        let value = i32::from_le_bytes(self.code[at + 3..at + 7].try_into().expect("four bytes")) as u64;
        self.rbx = match self.code[at + 2] {
            0xc3 => self.rbx.wrapping_add(value),
            0xeb => self.rbx.wrapping_sub(value),
            _ => self.rbx ^ value,
        };
    }

    fn write(&mut self, at: u64, way: Way) {
        let at = (at - PAGES) as usize;
        let old = u32::from_le_bytes(self.code[at + 3..at + 7].try_into().expect("four bytes"));
        match way {
            Way::MoveByte(byte) => self.code[at + 3 + byte as usize] = self.edx as u8,
            Way::Opcode(operation) => self.code[at + 2] = operation,
            _ => {
                let new = if matches!(way, Way::Add) { old.wrapping_add(self.edx) } else { self.edx };
                self.code[at + 3..at + 7].copy_from_slice(&new.to_le_bytes());
                if matches!(way, Way::Exchange) {
                    self.edx = old;
                }
            }
        }
        self.edx = self.edx.wrapping_mul(0x1001).wrapping_add(0x1234_5677);
    }
}

/// Bytes of the longest [`Part::Write`] with what follows it.
const WRITE_BYTES: u64 = 64;

fn write(a: &mut CodeAssembler, at: u64, way: Way) -> Assembled {
    let immediate = at + 3;
    match way {
        Way::Move => a.mov(dword_ptr(immediate), edx)?,
        Way::MoveByte(byte) => a.mov(byte_ptr(immediate + byte), dl)?,
        Way::Add => a.add(dword_ptr(immediate), edx)?,
        Way::Exchange => a.lock().xchg(dword_ptr(immediate), edx)?,
        Way::Store => {
            a.mov(edi, immediate as u32)?;
            a.mov(eax, edx)?;
            a.stosd()?;
        }
        Way::Opcode(operation) => a.mov(byte_ptr(at + 2), u32::from(operation))?,
        Way::Push => {
            // What comes after it stays as it is.
            a.mov(rsi, rsp)?;
            a.mov(eax, dword_ptr(immediate + 4))?;
            a.shl(rax, 32)?;
            a.or(rax, rdx)?;
            a.mov(rsp, immediate + 8)?;
            a.push(rax)?;
            a.mov(rsp, rsi)?;
        }
    }
    a.imul_3(edx, edx, 0x1001)?;
    a.add(edx, 0x1234_5677)
}

/// Random programs, in two pages, of operations and writes to them, several times over.
fn rewrites_itself(world: &mut World, seed: u64, alias: bool) {
    let mut random = Random::new(seed);
    let mut parts: Vec<Part> = Vec::new();
    let mut places = Vec::new();
    let mut at = PAGES + random.below(64);
    let mut layout = Vec::new();
    let wanted = 6 + random.below(24);
    for number in 0..wanted {
        // Around the end of the page, and in the next one.
        if number == wanted / 2 {
            let next = PAGES + PAGE - random.below(40);
            if next > at + 5 {
                layout.push((at, Part::Jump, next));
                parts.push(Part::Jump);
                at = next;
            }
        }
        match random.below(10) {
            0..5 => {
                let part = Part::Operate(at);
                places.push(at);
                layout.push((at, part, at + 7));
                parts.push(part);
                at += 7;
            }
            5..9 => {
                let way = match random.below(8) {
                    0 => Way::MoveByte(random.below(4)),
                    1 => Way::Add,
                    2 => Way::Exchange,
                    3 => Way::Store,
                    4 => Way::Opcode(random.pick(&OPERATIONS)),
                    5 => Way::Push,
                    _ => Way::Move,
                };
                let part = Part::Write(random.next() as usize, way);
                // Room for it, then a jump over what is left of the room, or none of both.
                layout.push((at, part, 0));
                parts.push(part);
                at += WRITE_BYTES;
            }
            _ => {
                let next = at + 5 + random.below(30);
                layout.push((at, Part::Jump, next));
                parts.push(Part::Jump);
                at = next;
            }
        }
    }
    if places.is_empty() {
        return;
    }
    let end_at = at;
    let mut state = world.start();
    if alias {
        for page in 0..2 {
            let all = pte::P | pte::RW | pte::US;
            world.bench.set64(entry(ALIAS + page * PAGE), (PAGES + page * PAGE) | all);
        }
    }
    world.bench.write(PAGES, &vec![0x90; 2 * PAGE as usize]);
    let turns = 4 + random.below(12) as u32;
    for (at, part, next) in &layout {
        match *part {
            Part::Operate(at) => {
                let mut bytes = vec![0x48, 0x81, random.pick(&OPERATIONS)];
                bytes.extend((random.next() as u32).to_le_bytes());
                world.bench.write(at, &bytes);
            }
            Part::Write(place, way) => {
                let place = places[place % places.len()];
                let place = if alias { place - PAGES + ALIAS } else { place };
                world.code(*at, |a| write(a, place, way));
            }
            Part::Jump => {
                world.code(*at, |a| {
                    a.db(&[0xe9])?;
                    a.dd(&[(*next as u32).wrapping_sub(*at as u32 + 5)])
                });
            }
        }
    }
    world.code(end_at, |a| {
        let mut done = a.create_label();
        a.dec(ebp)?;
        a.je(done)?;
        a.jmp(layout[0].0)?;
        a.set_label(&mut done)?;
        end(a)
    });
    let code = world.bench.bytes(PAGES, 2 * PAGE);
    let mut model = Model { rbx: random.next(), edx: random.next() as u32, code };
    state.regs.rip = layout[0].0;
    state.regs.gpr[3] = model.rbx;
    state.regs.gpr[2] = u64::from(model.edx);
    state.regs.gpr[5] = u64::from(turns);
    world.run(&state);
    for _ in 0..turns {
        for part in &parts {
            match *part {
                Part::Operate(at) => model.operate(at),
                Part::Write(place, way) => model.write(places[place % places.len()], way),
                Part::Jump => {}
            }
        }
    }
    let (found, expected) = ((world.gpr(3), world.gpr(2)), (model.rbx, u64::from(model.edx)));
    assert_eq!(found, expected, "seed {seed}, alias {alias}, {turns} turns: RBX and RDX");
    assert_eq!(world.bench.bytes(PAGES, 2 * PAGE), model.code, "seed {seed}");
}

/// Programs of each kind.
const PROGRAMS: u64 = 150;

#[test]
fn code_that_rewrites_itself() {
    each(&[0, 3], |world| {
        for seed in 0..PROGRAMS {
            rewrites_itself(world, seed, false);
        }
    });
}

#[test]
fn code_that_rewrites_itself_through_another_mapping() {
    each(&[0, 3], |world| {
        for seed in 0..PROGRAMS {
            rewrites_itself(world, 1000 + seed, true);
        }
    });
}

/// Where the code is that the tests below change: `mov eax, …; ret`.
const FUNCTION: u64 = PAGES + 0x123;

fn function(world: &World, at: u64, value: u32) {
    world.code(at, |a| {
        a.mov(eax, value)?;
        a.ret()
    });
}

/// The state of a second vCPU that runs from an address: like that of the first, with stacks of its own.
fn second(world: &World, first: &VcpuState, rip: u64) -> VcpuState {
    const SECOND_TSS: u64 = TSS + 0x100;
    let mut state = first.clone();
    state.regs.rip = rip;
    state.regs.gpr[4] = STACK - 0x2000;
    if world.cpl == 3 {
        world.bench.set64(SECOND_TSS + 4, NOTES - 0x1000);
        state.segments.tr.base = SECOND_TSS;
    }
    let VcpuState { msrs, lapic, .. } = VcpuState::reset(1);
    VcpuState { msrs, lapic, ..state }
}

/// One vCPU runs code in a loop while another rewrites it; they agree by a word in memory, and the reader serialises.
fn rewritten_by_another(cpl: u16, at: u64) {
    const ROUNDS: u32 = 300;
    for name in ENGINES {
        let mut world = World::new(2, name, cpl, Arc::new(NoDevices));
        let mut writer = world.start();
        let (sequence, acknowledged) = (dword_ptr(NOTES), dword_ptr(NOTES + 64));
        function(&world, at, 0);
        world.code(CODE, |a| {
            let (mut round, mut wait) = (a.create_label(), a.create_label());
            a.mov(ebp, 1)?;
            a.set_label(&mut round)?;
            a.imul_3(edx, ebp, 0x0101_0103)?;
            a.mov(dword_ptr(at + 1), edx)?;
            a.mov(sequence, ebp)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(acknowledged, ebp)?;
            a.jne(wait)?;
            a.inc(ebp)?;
            a.cmp(ebp, ROUNDS)?;
            a.jbe(round)?;
            end(a)
        });
        const READER: u64 = CODE + 0x1000;
        world.code(READER, |a| {
            let mut wait = a.create_label();
            a.mov(ebp, 1)?;
            a.xor(r12d, r12d)?;
            a.set_label(&mut wait)?;
            a.call(at)?;
            a.cmp(sequence, ebp)?;
            a.jne(wait)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.call(at)?;
            a.imul_3(edx, ebp, 0x0101_0103)?;
            a.cmp(eax, edx)?;
            a.setne(al)?;
            a.movzx(eax, al)?;
            a.add(r12d, eax)?;
            a.mov(acknowledged, ebp)?;
            a.inc(ebp)?;
            a.cmp(ebp, ROUNDS)?;
            a.jbe(wait)?;
            end(a)
        });
        writer.regs.gpr[4] = STACK;
        let reader = second(&world, &writer, READER);
        world.load_all(&[writer, reader]);
        world.go_on();
        let wrong = world.bench.vcpus[1].cpu().user.gpr[12];
        assert_eq!(world.bench.get32(NOTES + 64), ROUNDS);
        assert_eq!(wrong, 0, "translate={name}: old code was executed");
    }
}

#[test]
fn code_that_another_vcpu_rewrites() {
    for cpl in [0, 3] {
        rewritten_by_another(cpl, FUNCTION);
    }
}

#[test]
fn code_that_another_vcpu_rewrites_across_pages() {
    // The immediate is the next page's.
    for cpl in [0, 3] {
        rewritten_by_another(cpl, PAGES + PAGE - 1);
    }
}

/// Two vCPUs, each of which rewrites and runs code of its own in the same page: each takes away the other's permission to store
/// to it, again and again.
#[test]
fn two_vcpus_that_rewrite_code_in_one_page() {
    const ROUNDS: u32 = 20_000;
    const CORNERS: [u64; 2] = [PAGES + 0x100, PAGES + 0xc00];
    for name in ENGINES {
        let mut world = World::new(2, name, 3, Arc::new(NoDevices));
        let mut state = world.start();
        for corner in CORNERS {
            function(&world, corner, 0);
        }
        world.code(CODE, |a| {
            let (mut round, mut wait) = (a.create_label(), a.create_label());
            a.xor(ebp, ebp)?;
            a.xor(r12d, r12d)?;
            a.set_label(&mut round)?;
            a.mov(dword_ptr(rbx + 1), ebp)?;
            a.call(rbx)?;
            a.xor(eax, ebp)?;
            a.or(r12d, eax)?;
            a.inc(ebp)?;
            a.cmp(ebp, ROUNDS)?;
            a.jne(round)?;
            a.lock().inc(dword_ptr(NOTES))?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(NOTES), 2)?;
            a.jne(wait)?;
            end(a)
        });
        state.regs.gpr[4] = STACK;
        state.regs.gpr[3] = CORNERS[0];
        let mut other = second(&world, &state, CODE);
        other.regs.gpr[3] = CORNERS[1];
        world.load_all(&[state, other]);
        world.go_on();
        let wrong = [0, 1].map(|vcpu: usize| world.bench.vcpus[vcpu].cpu().user.gpr[12]);
        assert_eq!(wrong, [0, 0], "translate={name}: old code was executed");
    }
}

/// A device that writes to memory what was written to its port, when it is written.
struct Writer {
    region: Arc<GuestRegion>,
    at: Mutex<u64>,
}

impl IoHandler for Writer {
    fn port_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u32, _: u16, data: &[u8]) {
        let at = *self.at.lock().expect("a lock");
        self.region.write_slice(data, MemoryRegionAddress(at)).expect("inside RAM");
    }
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
}

/// A loop calls code, in its own page or another, directly or through a register, that a device rewrites each time.
fn rewritten_by_a_device(function_at: u64, through_register: bool) {
    const ROUNDS: u32 = 40;
    for name in ENGINES {
        let region = region();
        let device = Arc::new(Writer { region: region.clone(), at: Mutex::new(function_at + 1) });
        let mut world = World::on(region, 1, name, 0, device);
        let state = world.start();
        function(&world, function_at, 0);
        world.code(CODE, |a| {
            let mut round = a.create_label();
            a.mov(ebp, ROUNDS)?;
            a.xor(r12d, r12d)?;
            a.mov(rsi, function_at)?;
            a.set_label(&mut round)?;
            a.imul_3(ebx, ebp, 0x0101_0103)?;
            a.mov(eax, ebx)?;
            a.mov(dx, 0x5c0u32)?;
            a.out(dx, eax)?;
            a.xor(eax, eax)?;
            a.push(rbx)?;
            a.cpuid()?;
            a.pop(rbx)?;
            if through_register {
                a.call(rsi)?;
            } else {
                a.call(function_at)?;
            }
            a.cmp(eax, ebx)?;
            a.setne(al)?;
            a.movzx(eax, al)?;
            a.add(r12d, eax)?;
            a.dec(ebp)?;
            a.jne(round)?;
            end(a)
        });
        world.run(&state);
        assert_eq!(world.gpr(12), 0, "translate={name}: old code was executed");
    }
}

#[test]
fn code_that_a_device_rewrites() {
    rewritten_by_a_device(FUNCTION, false);
}

#[test]
fn code_that_a_device_rewrites_called_through_a_register() {
    rewritten_by_a_device(FUNCTION, true);
}

#[test]
fn code_that_a_device_rewrites_in_the_caller_s_page() {
    rewritten_by_a_device(CODE + 0x800, false);
}

#[test]
fn code_that_is_rewritten_while_the_vcpu_is_out() {
    each(&[0, 3], |world| {
        let state = world.start();
        // The function is in the page of what calls it, or in another; what calls it stays the same.
        for at in [CODE + 0x800, FUNCTION] {
            world.code(CODE, |a| {
                let mut next = a.create_label();
                a.jmp(next)?;
                a.set_label(&mut next)?;
                a.call(at)?;
                a.call(at)?;
                end(a)
            });
            for value in 1..20 {
                function(world, at, value);
                world.run(&state);
                assert_eq!(world.gpr(0), u64::from(value));
            }
        }
    });
}
