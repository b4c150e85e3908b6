//! Interrupts, and what holds them back; SMAP; what makes a running vCPU stop.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use engine::{Exit, Vcpu};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, MemoryRegionAddress};
use x86::bits::{cr4, rflags};

use crate::common::*;
use crate::world::*;

/// Notes RIP of each interrupt, with those of NMIs behind.
fn interrupt_handlers(world: &World) {
    world.handler(IRQ, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rax, qword_ptr(rsp + 24))?;
        a.mov(rcx, qword_ptr(NOTES))?;
        a.mov(qword_ptr(rcx * 8 + NOTES + 8), rax)?;
        a.inc(qword_ptr(NOTES))?;
        eoi(a)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
}

const TURNS: u32 = 30;

#[test]
fn sti_holds_interrupts_back_for_one_instruction() {
    each(&[0], |world| {
        interrupt_handlers(world);
        let state = world.start();
        let mut places = Vec::new();
        let at = CODE + 0x400;
        world.code(at, |a| {
            send(a, IRQ.into())?; // 5 + 5 + 2 + 2
            a.nop()?; // 1
            a.sti()?; // 1
            a.inc(rbx)?; // 3
            a.inc(rbx)?;
            a.cli()?;
            a.ret()
        });
        places.push(at + 14 + 2 + 3);
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, TURNS)?;
            a.set_label(&mut turn)?;
            a.call(at)?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        world.run(&state);
        let count = world.note(0);
        assert_eq!(count, u64::from(TURNS));
        let found = world.notes(1 + count);
        assert!(found[1..].iter().all(|rip| *rip == places[0]), "{found:x?}, not {places:x?}");
    });
}

#[test]
fn mov_ss_holds_interrupts_back_for_one_instruction() {
    each(&[0], |world| {
        interrupt_handlers(world);
        let state = world.start();
        let at = CODE + 0x400;
        world.code(at, |a| {
            send(a, IRQ.into())?; // 14
            a.mov(ecx, ss)?; // 2
            // POPF brings IF; it has no shadow, but what follows it has.
            a.nop()?; // 1
            a.sti()?; // 1
            a.mov(ss, ecx)?; // 2: in the shadow of STI, with one of its own
            a.inc(rbx)?; // 3
            a.inc(rbx)?;
            a.cli()?;
            a.ret()
        });
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, TURNS)?;
            a.set_label(&mut turn)?;
            a.call(at)?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        world.run(&state);
        let count = world.note(0);
        assert_eq!(count, u64::from(TURNS));
        let found = world.notes(1 + count);
        let expected = at + 14 + 2 + 1 + 1 + 2 + 3;
        assert!(found[1..].iter().all(|rip| *rip == expected), "{found:x?}, not {expected:x}");
    });
}

#[test]
fn popf_and_iret_let_interrupts_in_at_once() {
    each(&[0], |world| {
        interrupt_handlers(world);
        let state = world.start();
        let at = CODE + 0x400;
        world.code(at, |a| {
            send(a, IRQ.into())?; // 14
            a.push(rflags::IF as i32 | 2)?; // 5
            a.popfq()?; // 1
            a.inc(rbx)?; // 3
            a.cli()?;
            a.ret()
        });
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, TURNS)?;
            a.set_label(&mut turn)?;
            a.call(at)?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        world.run(&state);
        let count = world.note(0);
        assert_eq!(count, u64::from(TURNS));
        let found = world.notes(1 + count);
        assert!(found[1..].iter().all(|rip| *rip == at + 20), "{found:x?}, not {:x}", at + 20);
    });
}

#[test]
fn an_nmi_waits_until_the_handler_of_another_returns() {
    each(&[0], |world| {
        const NMI: u32 = 4 << 8;
        world.handler(2, |a| {
            let (mut nested, mut second, mut done) = (a.create_label(), a.create_label(), a.create_label());
            a.push(rax)?;
            a.push(rcx)?;
            a.push(rdx)?;
            a.inc(qword_ptr(NOTES))?;
            a.inc(qword_ptr(NOTES + 16))?;
            a.cmp(qword_ptr(NOTES + 16), 1)?;
            a.jne(nested)?;
            // Every second one sends another, which has to wait for the IRET.
            a.test(qword_ptr(NOTES), 1)?;
            a.je(second)?;
            send(a, NMI)?;
            a.set_label(&mut second)?;
            a.mov(ecx, 20)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.dec(ecx)?;
            a.jne(wait)?;
            a.jmp(done)?;
            a.set_label(&mut nested)?;
            a.inc(qword_ptr(NOTES + 8))?;
            a.set_label(&mut done)?;
            a.dec(qword_ptr(NOTES + 16))?;
            a.pop(rdx)?;
            a.pop(rcx)?;
            a.pop(rax)?;
            a.iretq()
        });
        let state = world.start();
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, TURNS)?;
            a.set_label(&mut turn)?;
            send(a, NMI)?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        world.run(&state);
        assert_eq!(world.notes(3), [u64::from(2 * TURNS), 0, 0], "NMIs, nested ones, open ones");
    });
}

#[test]
fn smap_holds_for_translated_code() {
    each(&[0], |world| {
        if world.bench.cpu().cr4_allowed() & cr4::SMAP == 0 {
            return;
        }
        // Counts and steps over the access, whose length is in RCX.
        world.handler(14, |a| {
            a.inc(qword_ptr(NOTES))?;
            a.add(qword_ptr(rsp + 8), rcx)?;
            a.add(rsp, 8)?;
            a.iretq()
        });
        let mut state = world.start();
        // All but the data are the supervisor's.
        for page in 0..512u64 {
            let rights = x86::paging::pte::P | x86::paging::pte::RW;
            let user = if page << 12 == DATA { x86::paging::pte::US } else { 0 };
            world.bench.set64(PT + 8 * page, page << 12 | rights | user);
        }
        state.control.cr4 |= cr4::SMAP;
        let at = CODE + 0x400;
        world.code(at, |a| {
            a.mov(rsi, DATA)?;
            a.mov(ecx, 3)?;
            a.stac()?;
            a.mov(qword_ptr(rsi), rbp)?;
            a.mov(rax, qword_ptr(rsi))?;
            a.clac()?;
            a.mov(qword_ptr(rsi), rcx)?;
            a.add(rbx, qword_ptr(rsi))?;
            a.add(rbx, rax)?;
            a.ret()
        });
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.xor(ebx, ebx)?;
            a.mov(ebp, TURNS)?;
            a.set_label(&mut turn)?;
            a.call(at)?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        world.run(&state);
        assert_eq!(world.note(0), u64::from(2 * TURNS), "two faults each turn");
        assert_eq!(world.gpr(3), (1..=u64::from(TURNS)).sum::<u64>());
    });
}

/// Each loop counts its turns in the first note.
#[test]
fn endless_loops_can_be_stopped() {
    type Loop = fn(&mut CodeAssembler) -> Assembled;
    const COUNTER: u64 = NOTES;
    let loops: [(&str, Loop); 6] = [
        ("jumps", |a| {
            a.inc(qword_ptr(COUNTER))?;
            a.jmp(CODE)
        }),
        ("conditional jumps", |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(qword_ptr(COUNTER))?;
            a.jne(again)
        }),
        ("calls", |a| {
            a.inc(qword_ptr(COUNTER))?;
            a.mov(rsp, STACK)?;
            a.call(CODE)
        }),
        ("calls between pages", |a| {
            a.inc(qword_ptr(COUNTER))?;
            a.mov(rsp, STACK)?;
            a.call(CODE + 0x1000)
        }),
        ("indirect jumps", |a| {
            a.inc(qword_ptr(COUNTER))?;
            a.mov(rax, CODE)?;
            a.jmp(rax)
        }),
        ("returns", |a| {
            a.inc(qword_ptr(COUNTER))?;
            a.mov(rax, CODE)?;
            a.push(rax)?;
            a.ret()
        }),
    ];
    for (name, code) in loops {
        for cpl in [0, 3] {
            let mut world = World::new(1, "always", cpl, Arc::new(NoDevices));
            let state = world.start();
            world.code(CODE, code);
            world.code(CODE + 0x1000, |a| {
                a.mov(rsp, STACK)?;
                a.call(CODE)
            });
            world.bench.load(&state);
            let kick = world.bench.vcpus[0].kicker();
            let region = world.bench.region.clone();
            let (sender, receiver) = channel();
            // It is left alone if it does not stop.
            std::thread::spawn(move || {
                let exit = world.bench.vcpus[0].run();
                let _ = sender.send(exit.expect("an exit"));
            });
            // Linked, and running by itself.
            while region.read_obj::<u64>(MemoryRegionAddress(COUNTER)).expect("inside RAM") < 1000 {
                std::thread::yield_now();
            }
            kick.kick();
            let exit = receiver.recv_timeout(Duration::from_secs(60));
            assert_eq!(exit, Ok(Exit::Kicked), "{name}, CPL {cpl}: the vCPU cannot be stopped");
        }
    }
}
