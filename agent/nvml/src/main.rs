//! `lathe-nvml`: prints a [`Document`] and ends. Takes no arguments; failures are one line on standard
//! error and a status of 1.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::Write;
use std::process::ExitCode;

use lathe_nvml::{Device, Document};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION;

/// `NVML_NVLINK_MAX_LINKS` of NVML 13; asking for one too many is an error like any other.
const MAX_LINKS: u32 = 18;

fn main() -> ExitCode {
    match document().and_then(|document| print(&document)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lathe-nvml: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(document: &Document) -> Result<(), String> {
    let json = serde_json::to_vec(document).map_err(|error| error.to_string())?;
    std::io::stdout().write_all(&json).map_err(|error| error.to_string())
}

fn document() -> Result<Document, String> {
    if cfg!(target_feature = "crt-static") {
        return Err("this is a static build, which cannot load libnvidia-ml.so.1: \
                    install the one that scripts/build-nvml makes"
            .to_owned());
    }
    let nvml = Nvml::init().map_err(|error| match error {
        NvmlError::LibloadingError(error) => {
            format!("libnvidia-ml.so.1 not found: install NVIDIA's driver or its NVML package ({error})")
        }
        NvmlError::DriverNotLoaded => "NVIDIA's driver is not loaded: modprobe nvidia".to_owned(),
        error => format!("NVML does not start: {error}"),
    })?;
    let mut document = Document {
        driver_version: nvml.sys_driver_version().map_err(|error| format!("no driver version: {error}"))?,
        ..Document::default()
    };
    let count = nvml.device_count().map_err(|error| format!("cannot count GPUs: {error}"))?;
    for index in 0..count {
        // A GPU that fell off the bus fails here; the others still answer.
        match nvml.device_by_index(index).and_then(|gpu| Ok((gpu.pci_info()?.bus_id, gpu))) {
            Ok((address, gpu)) => document.gpus.push(device(address, &gpu)),
            Err(error) => document.lost.push(format!("GPU {index}: {error}")),
        }
    }
    Ok(document)
}

fn device(address: String, gpu: &nvml_wrapper::Device<'_>) -> Device {
    let mut asked = Asked::default();
    let mut device = Device {
        address,
        uuid: asked.take("UUID", gpu.uuid()).unwrap_or_default(),
        name: asked.take("name", gpu.name()).unwrap_or_default(),
        serial: asked.take("serial number", gpu.serial()),
        memory_bytes: asked.take("memory", gpu.memory_info()).map(|memory| memory.total),
        mig_mode: asked.take("MIG mode", gpu.mig_mode()).map(|mode| mode.current != 0),
        ecc_enabled: asked.take("ECC mode", gpu.is_ecc_enabled()).map(|mode| mode.currently_enabled),
        ecc_corrected: asked.errors(gpu, MemoryError::Corrected),
        ecc_uncorrected: asked.errors(gpu, MemoryError::Uncorrected),
        nvlink_peers: nvlink_peers(gpu),
        recovery_action: recovery_action(gpu),
        temperature_celsius: asked.take("temperature", gpu.temperature(TemperatureSensor::Gpu)),
        power_milliwatts: asked.take("power", gpu.power_usage()),
        failures: Vec::new(),
    };
    device.failures = asked.failures;
    device
}

/// Collects what failed.
#[derive(Default)]
struct Asked {
    failures: Vec<String>,
}

impl Asked {
    fn take<T>(&mut self, what: &str, result: Result<T, NvmlError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            // Not every GPU has everything, nor does every driver.
            Err(NvmlError::NotSupported | NvmlError::FunctionNotFound | NvmlError::NotFound) => None,
            Err(error) => {
                self.failures.push(format!("{what}: {error}"));
                None
            }
        }
    }

    fn errors(&mut self, gpu: &nvml_wrapper::Device<'_>, kind: MemoryError) -> Option<u64> {
        self.take("ECC errors", gpu.total_ecc_errors(kind, EccCounter::Volatile))
    }
}

fn nvlink_peers(gpu: &nvml_wrapper::Device<'_>) -> Vec<String> {
    let active = (0..MAX_LINKS).map(|link| gpu.link_wrapper_for(link));
    let active = active.filter(|link| link.is_active().unwrap_or(false));
    let peers: BTreeSet<_> = active.filter_map(|link| Some(link.remote_pci_info().ok()?.bus_id)).collect();
    peers.into_iter().collect()
}

/// Drivers before 570 do not know the field.
fn recovery_action(gpu: &nvml_wrapper::Device<'_>) -> Option<u64> {
    let fields = gpu.field_values_for(&[FieldId(NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)]).ok()?;
    match fields.into_iter().next()?.ok()?.value.ok()? {
        SampleValue::U32(value) => Some(value.into()),
        SampleValue::U64(value) => Some(value),
        SampleValue::I64(value) => u64::try_from(value).ok(),
        SampleValue::F64(_) => None,
    }
}
