//! What only an operating system does: segments, control transfers between privileges, interrupts, tasks, control
//! registers.

pub mod control;
pub mod debug;
pub mod instructions;
pub mod interrupt;
pub mod segmentation;
pub mod task;
pub mod transfer;
