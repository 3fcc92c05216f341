//! Programs made of bytes: any sequence of verbs with any values that C allows, on the device of this process.
//!
//! Pointers are always to live objects and memory, as the verbs' contract asks; everything else is the bytes' choice:
//! keys, addresses, lengths, states, masks, flags, the order of calls. Whatever the program does,
//!
//! * a request completes at most once, in order, and once all is flushed every one is accounted for;
//! * memory without rights keeps its bytes, and no memory is touched after its deregistration (which an address
//!   sanitizer sees);
//! * an object in use is not destroyed, one that is not in use is, and events name live objects.
//!
//! Shared by `tests/abi_programs.rs` and the fuzz target `verbs`.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a harness that does as a C program would"
)]

mod account;
mod control;
mod events;
mod input;
mod requests;
mod world;

use std::panic::resume_unwind;
use std::thread;

use input::Input;
use world::World;

/// The most commands of a program: longer ones show nothing new, and take long.
const MOST_COMMANDS: usize = 200;

/// Runs the program that the bytes say, and checks it.
///
/// In a thread of its own: what the device keeps for a thread begins anew with each program and ends with it.
pub fn run(data: &[u8]) {
    let result = thread::scope(|scope| scope.spawn(|| program(data)).join());
    result.unwrap_or_else(|panic| resume_unwind(panic));
}

fn program(data: &[u8]) {
    let mut input = Input(data);
    let mut world = World::new(&mut input);
    for _ in 0..MOST_COMMANDS {
        if input.is_empty() {
            break;
        }
        world.step(&mut input);
    }
    world.finish();
}

impl World {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 32 {
            0..=6 => self.post_send(input),
            7..=9 => self.post_receive(input),
            10 => self.post_shared_receive(input),
            11..=13 => self.poll(input),
            14 => self.poll_extended(input),
            15 | 16 => self.build(input),
            17 => self.connect(input),
            18 => self.modify(input),
            19 => self.change_state(input),
            20 => self.queue_pairs(input),
            21 => self.completion_queues(input),
            22 => self.arm(input),
            23 => self.regions(input),
            24 => self.windows(input),
            25 => self.address_handles(input),
            26 => self.groups(input),
            27 => self.shared_queues(input),
            28 => self.query(input),
            29 => self.take_events(),
            30 => self.domains(input),
            _ => self.drain(),
        }
    }
}
