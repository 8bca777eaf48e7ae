//! What NVML once said of a GPU, kept for when its driver does not run it: a model's name must not
//! change because a guest has it.

use std::collections::BTreeMap;
use std::path::Path;

use lathe_api::HostPciAddress;
use lathe_api::gpu::{Gpu, NvmlInfo};
use serde::{Deserialize, Serialize};

use crate::files;

/// What stays true without the driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    vendor: u16,
    device: u16,
    model: String,
    memory_bytes: u64,
    nvml: NvmlInfo,
}

/// Adds what is known to GPUs that NVML did not tell of now, and keeps what it told. A file that cannot
/// be read or written costs names alone.
pub(super) fn complete(gpus: &mut [Gpu], file: &Path) {
    let mut known: BTreeMap<HostPciAddress, Known> = files::read_json(file).unwrap_or_default();
    let before = known.clone();
    for gpu in gpus.iter_mut() {
        match &gpu.nvml {
            Some(nvml) => _ = known.insert(gpu.address, remember(gpu, nvml)),
            // Another card may be in the slot since.
            None => match known.get(&gpu.address) {
                Some(of) if (of.vendor, of.device) == (gpu.vendor, gpu.device) => {
                    gpu.model.clone_from(&of.model);
                    gpu.memory_bytes = of.memory_bytes;
                    gpu.nvml = Some(of.nvml.clone());
                }
                _ => {}
            },
        }
    }
    if known != before
        && let Err(error) = files::write_json(file, &known)
    {
        tracing::debug!(%error, "names of GPUs are not kept");
    }
}

fn remember(gpu: &Gpu, nvml: &NvmlInfo) -> Known {
    let nvml = NvmlInfo {
        // These were true then.
        ecc: None,
        recovery_action: None,
        last_xid: None,
        temperature_celsius: None,
        power_milliwatts: None,
        ..nvml.clone()
    };
    Known {
        vendor: gpu.vendor,
        device: gpu.device,
        model: gpu.model.clone(),
        memory_bytes: gpu.memory_bytes,
        nvml,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::HostFiles;
    use crate::inventory::fake::two_gpus;

    #[test]
    fn a_name_outlasts_the_driver_but_not_the_card() {
        let host = two_gpus();
        let file = host.path("state/gpus.json");
        let fresh = || crate::inventory::gpus::read(&HostFiles(host.root()), &[]);
        let mut gpus = fresh();
        gpus[1].model = "NVIDIA H100".to_owned();
        gpus[1].memory_bytes = 80 << 30;
        let nvml = NvmlInfo { uuid: "GPU-1".to_owned(), last_xid: Some(13), ..NvmlInfo::default() };
        gpus[1].nvml = Some(nvml);
        complete(&mut gpus, &file);

        let mut later = fresh();
        complete(&mut later, &file);
        assert_eq!((later[1].model.as_str(), later[1].memory_bytes), ("NVIDIA H100", 80 << 30));
        let nvml = later[1].nvml.as_ref().unwrap();
        assert_eq!((nvml.uuid.as_str(), nvml.last_xid), ("GPU-1", None));
        assert!(later[0].nvml.is_none());

        let mut other = fresh();
        other[1].device = 1;
        complete(&mut other, &file);
        assert_eq!(other[1].model, "10de:2330");
        std::fs::write(&file, "{").unwrap();
        let mut broken = fresh();
        complete(&mut broken, &file);
        assert_eq!(broken, fresh());
    }
}
