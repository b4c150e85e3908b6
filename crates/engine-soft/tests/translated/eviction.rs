//! More code than the cache for translations holds.

use std::sync::Arc;

use iced_x86::code_asm::*;
use x86::paging::pte;

use crate::common::*;
use crate::world::*;

/// vCPUs that share the cache; only the first is started, and little is left for it.
const VCPUS: u32 = 32;
const BLOCKS: u64 = 30_000;
/// Where the blocks are, and how far from one to the next.
const FIRST: u64 = 0x20_0000;
const STRIDE: u64 = 48;

#[test]
fn more_code_than_fits() {
    for cpl in [0, 3] {
        let mut world = World::new(VCPUS, "always", cpl, Arc::new(NoDevices));
        let state = world.start();
        for table in 1..4u64 {
            let large = pte::P | pte::RW | pte::US | pte::PS;
            world.bench.set64(PD + 8 * table, table << 21 | large);
        }
        let mut code = Vec::new();
        for block in 0..BLOCKS {
            // ADD RBX, number; the same to two words of memory; a jump to the next
            // block.
            let mut bytes = vec![0x48, 0x81, 0xc3];
            bytes.extend((block as u32).to_le_bytes());
            for word in [DATA, DATA + 4] {
                bytes.extend([0x81, 0x04, 0x25]);
                bytes.extend((word as u32).to_le_bytes());
                bytes.extend((block as u32).to_le_bytes());
            }
            let to = if block + 1 == BLOCKS { CODE + 0x800 } else { FIRST + (block + 1) * STRIDE };
            if block % 3 == 0 {
                // Through RSI.
                bytes.push(0xbe);
                bytes.extend((to as u32).to_le_bytes());
                bytes.extend([0xff, 0xe6]);
                bytes.resize(STRIDE as usize, 0xcc);
                code.extend(bytes);
                continue;
            }
            bytes.push(0xe9);
            let from = FIRST + block * STRIDE + bytes.len() as u64 + 4;
            bytes.extend((to.wrapping_sub(from) as u32).to_le_bytes());
            bytes.resize(STRIDE as usize, 0xcc);
            code.extend(bytes);
        }
        world.bench.write(FIRST, &code);
        world.code(CODE, |a| {
            a.mov(ebp, 3)?;
            a.xor(ebx, ebx)?;
            a.jmp(FIRST)
        });
        world.code(CODE + 0x800, |a| {
            let mut done = a.create_label();
            a.dec(ebp)?;
            a.je(done)?;
            a.jmp(FIRST)?;
            a.set_label(&mut done)?;
            end(a)
        });
        world.run(&state);
        let sum = 3 * (BLOCKS * (BLOCKS - 1) / 2);
        assert_eq!(world.gpr(3), sum);
        for word in [DATA, DATA + 4] {
            assert_eq!(world.bench.get32(word), sum as u32);
        }
        let translated = world.bench.cpu().counters.blocks_translated;
        assert!(
            translated > 2 * BLOCKS,
            "the cache is too large for this test: {translated} blocks translated"
        );
    }
}
