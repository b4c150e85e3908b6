//! The translator: guest code becomes host code.
//!
//! A guest instruction is a host instruction. What has no memory operand is copied, with registers renamed where the
//! guest's are elsewhere; a memory operand becomes a lookup in the vCPU's TLB and the same instruction on the host
//! address; branches go from translated block to translated block; everything else calls the interpreter's handler for
//! that one instruction and comes back. Only blocks that have run a few times are translated.
//!
//! - [`registers`]: which guest register is where; [`asm`]: encodings of what the translator adds.
//! - [`runtime`]: the ways in and out of translated code.
//! - [`block`]: one block's code; [`classes`], [`flags`], [`memory`], [`gather`], [`control`], [`stubs`]: its parts;
//!   [`recipe`]: flags that are made again;
//!   [`spans`]: which accesses share a lookup.
//! - [`cache`]: code memory, and the units in it; [`records`], [`table`], [`index`]: what is known of them, and where.
//! - [`targets`]: the table of jump targets; [`handled`]: instructions that are left to the interpreter.
//! - [`dispatch`]: when which code runs, and what happens between.
//! - [`check`]: the translator beside the interpreter, block by block.
//!
//! Why it is shaped so, and what was tried: decision 0003.

pub mod asm;
pub mod block;
pub mod cache;
pub mod check;
mod classes;
mod control;
pub mod dispatch;
pub mod flags;
mod gather;
mod handled;
mod index;
mod memory;
pub mod recipe;
pub mod records;
pub mod registers;
pub mod runtime;
pub mod spans;
mod stubs;
mod table;
pub mod targets;
