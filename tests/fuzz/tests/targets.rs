//! Every target over its seeds, over damaged seeds and over noise: what a fuzzer found once stays found.

use std::fs;
use std::path::Path;

use lathe_fuzz::{TARGETS, Target};

/// Inputs of noise for each target; fuzzing proper is `scripts/fuzz`.
const ROUNDS: u64 = 200;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target.name);
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| fs::read(path).expect("a seed")).collect()
}

fn exercise(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of that name");
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    (target.run)(&[]);
    let seeds = seeds(target);
    for seed in &seeds {
        (target.run)(seed);
    }
    for round in 0..ROUNDS {
        let mut bytes = match seeds.get(round as usize % (seeds.len() + 1)) {
            Some(seed) => seed.clone(),
            None => {
                let len = noise.next() as usize % 1024;
                noise.bytes(len)
            }
        };
        for _ in 0..noise.next() % 8 {
            if !bytes.is_empty() {
                let at = noise.next() as usize % bytes.len();
                bytes[at] = noise.next() as u8;
            }
        }
        (target.run)(&bytes);
    }
}

macro_rules! survives {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            exercise(stringify!($name));
        })*

        #[test]
        fn every_target_is_exercised() {
            let listed: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(listed, [$(stringify!($name)),*]);
        }
    };
}

survives!(
    virtio_block,
    virtio_console,
    virtio_rng,
    virtio_vsock,
    pci_config,
    pci_ports,
    device_capabilities,
    passthrough_config,
    passthrough_bars,
    guest_messages,
    serial_port,
    kernel_image,
    oci_documents,
    oci_layer,
    csv_dataset,
    vm_json,
    job_spec,
    cluster_trace,
    provider_answer,
);
