//! What callers write.

use lathe_api::job::JobSpec;
use lathe_vmm::config::VmConfig;

/// A machine's description: what is accepted can be written down and is accepted again.
pub fn vm_json(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(config) = VmConfig::from_json(text) else { return };
    let written = serde_json::to_string(&config).expect("a description can be written");
    let again = VmConfig::from_json(&written).expect("what was written can be read");
    assert_eq!(again, config);
    assert_eq!(again.check().is_ok(), config.check().is_ok());
}

/// A job's description, in both of its formats.
pub fn job_spec(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let specs = [toml::from_str::<JobSpec>(text).ok(), serde_json::from_str::<JobSpec>(text).ok()];
    for spec in specs.into_iter().flatten() {
        let written = serde_json::to_string(&spec).expect("a job can be written");
        let again: JobSpec = serde_json::from_str(&written).expect("what was written can be read");
        assert_eq!(serde_json::to_string(&again).expect("a job can be written"), written);
    }
}
