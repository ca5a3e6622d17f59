//! The simulator itself: that each fault of a kernel is found and named, that what is right is not reported, and that each
//! function of `kernels/sim.h` is what the PTX ISA says of the instruction in whose place it stands.

#[path = "common/memory.rs"]
mod memory;

#[path = "simulator/harness.rs"]
mod harness;

#[path = "simulator/faults.rs"]
mod faults;
#[path = "simulator/hopper.rs"]
mod hopper;
#[path = "simulator/sound.rs"]
mod sound;
#[path = "simulator/twins.rs"]
mod twins;
