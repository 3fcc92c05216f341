//! Programs of random verbs, and those that once went wrong.

mod program;

/// As many random programs: a fuzzer runs many more (`ci/fuzz.sh`).
const PROGRAMS: u64 = 300;

#[test]
fn programs_of_random_verbs_end_with_everything_accounted_for() {
    for seed in 0..PROGRAMS {
        let mut random = fastrand::Rng::with_seed(seed);
        let len = random.usize(..1000);
        let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(len).collect();
        println!("seed {seed}");
        program::run(&bytes);
    }
}
