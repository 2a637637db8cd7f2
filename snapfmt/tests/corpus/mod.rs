//! Runs a fuzz target of a crate without libFuzzer.

#[path = "../../fuzz/harness/mutate.rs"]
mod mutate;

use std::path::Path;

/// The files of a folder in the order of their names. A folder that is empty is an error.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let entries = std::fs::read_dir(&folder).expect("the seeds are there");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", folder.display());
    paths.iter().map(|path| std::fs::read(path).expect("a seed")).collect()
}

/// Runs a target on all seeds and on mutations of seeds and of mutations. The input that makes it
/// panic is printed, in hexadecimal.
pub(crate) fn run(target: &str, default_runs: usize, body: fn(&[u8])) {
    let runs = std::env::var("SNAP_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok());
    let mut random = mutate::Random::new(4);
    let mut inputs = seeds(target);
    let seeds = inputs.len();
    for number in 0..seeds + runs.unwrap_or(default_runs) {
        let mut input =
            inputs[if number < seeds { number } else { random.below(inputs.len()) }].clone();
        if number >= seeds {
            random.mutate(&mut input);
        }
        let shown = OnPanic { target, number, input: &input };
        body(&input);
        drop(shown);
        // A bounded pool of mutations: old ones are replaced, the seeds stay.
        if number >= seeds && input.len() < 1 << 16 {
            if inputs.len() < seeds + 256 {
                inputs.push(input);
            } else {
                inputs[seeds + number % 256] = input;
            }
        }
    }
}

struct OnPanic<'a> {
    target: &'a str,
    number: usize,
    input: &'a [u8],
}

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.input.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("target {}, input {}: {hex}", self.target, self.number);
        }
    }
}
