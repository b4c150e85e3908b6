//! The interpreter: decodes guest code into blocks of [`op::Op`] and runs them. It executes every instruction of every
//! mode, and is what the translator is checked against.

pub mod alu;
pub mod block;
pub mod decode;
pub mod fetch;
pub mod integer;
pub mod native_op;
pub mod op;
pub mod run;
pub mod string;
pub mod xstate;
