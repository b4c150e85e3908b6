//! What translated code has to notice: that code changes, that its mapping changes, that the next page is not there, that
//! somebody looks at each instruction, that an interrupt waits. Every test states what a processor does, and runs with the
//! translator off, on, and eager.

mod boundary;
mod calls;
#[path = "../common/mod.rs"]
mod common;
mod debug;
mod elements;
mod events;
mod eviction;
mod modify;
mod remap;
mod spans;
#[allow(dead_code)]
#[path = "../differential/values.rs"]
mod values;
mod variants;
mod world;
