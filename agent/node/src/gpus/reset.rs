//! Resets a device, by the method that leaves the least behind.
//!
//! On GPUs that is a reset of the bus they sit on: on H200 a function-level reset left state that made the
//! next attach fail, and a secondary bus reset cleared it (PCIe 6.0 §6.6.1 has both). A bus reset hits every
//! function on that bus, so it is taken only where all of them are being handed over. The kernel's
//! `reset_method` attribute tells which methods a function has and lets one be chosen; what was in it
//! before is put back.

use std::time::Instant;

use lathe_api::HostPciAddress;
use serde::{Deserialize, Serialize};

use super::host::PciHost;

/// Resets the buses below a bridge; an attribute of bridges in newer kernels. It reaches devices with
/// several functions, which the kernel's `bus` method leaves alone.
const SUBORDINATE: &str = "../reset_subordinate";

/// How a device was reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetDone {
    /// The kernel's name of the method: `bus`, `flr`, `pm`, ...; `bus_all` is a bus reset that reached several
    /// functions.
    pub method: String,
    /// How long it took, until the device answered again.
    pub milliseconds: u64,
}

/// Why a device was not reset.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// It has none.
    #[error("it has no reset that the kernel can do (its reset_method is empty)")]
    NoMethod,
    /// The kernel failed.
    #[error("the reset by {method} failed: {source}")]
    Failed {
        /// The kernel's name of the method.
        method: String,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// It did not come back.
    #[error("it does not answer after the reset by {0}")]
    Gone(String),
}

/// A way to reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// All buses below the bridge above.
    Subordinate,
    /// One that the function lists.
    Listed(String),
    /// An older kernel without the attribute: its own choice.
    Kernel,
}

/// What a choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// Whether it is a GPU: display class or processing accelerator.
    pub gpu: bool,
    /// The function's `reset_method`; the kernel has it for functions that it can reset by themselves.
    pub listed: Option<&'a str>,
    /// Whether an older kernel without that offers a `reset`.
    pub plain: bool,
    /// Whether every function on its bus is being handed over.
    pub alone: bool,
    /// Whether the bridge above can reset what is below it.
    pub subordinate: bool,
}

/// The method to use.
pub fn choose(situation: Situation<'_>) -> Option<Method> {
    let Situation { gpu, listed, plain, alone, subordinate } = situation;
    let listed = match listed {
        // Emptied by an operator, which the kernel takes as: it must not be reset.
        Some("") => return None,
        Some(text) => text,
        None if plain => return Some(Method::Kernel),
        None => return (alone && subordinate).then_some(Method::Subordinate),
    };
    let has = |method: &str| listed.split_whitespace().any(|m| m == method);
    if gpu && alone {
        if has("bus") {
            return Some(Method::Listed("bus".into()));
        }
        if subordinate {
            return Some(Method::Subordinate);
        }
    }
    let order = ["device_specific", "flr", "af_flr", "acpi", "bus", "cxl_bus", "pm"];
    let gpu_order = ["flr", "af_flr", "device_specific", "acpi", "bus", "cxl_bus", "pm"];
    let order = if gpu { gpu_order } else { order };
    let wanted = order.into_iter().find(|method| has(method) && (alone || !method.ends_with("bus")));
    // One that this version does not know is the kernel's best.
    let unknown = || listed.split_whitespace().find(|m| !order.contains(m));
    wanted.or_else(unknown).map(|method| Method::Listed(method.to_owned()))
}

/// What [`choose`] decides on, read from the host.
fn method_of(
    host: &dyn PciHost,
    function: HostPciAddress,
    ours: &[HostPciAddress],
    gpu: bool,
) -> Option<Method> {
    let listed = host.read(function, "reset_method").ok();
    let same_bus = |f: &HostPciAddress| f.domain() == function.domain() && f.bus() == function.bus();
    choose(Situation {
        gpu,
        listed: listed.as_deref(),
        plain: host.has(function, "reset"),
        alone: host.functions().iter().filter(|f| same_bus(f)).all(|f| ours.contains(f)),
        // On a root bus the parent is a host bridge, which has no such attribute.
        subordinate: host.has(function, SUBORDINATE),
    })
}

/// Whether the function can be reset; `ours` are all that are being handed over.
pub fn is_possible(host: &dyn PciHost, function: HostPciAddress, ours: &[HostPciAddress]) -> bool {
    method_of(host, function, ours, true).is_some()
}

/// Resets `function`; `ours` are all that are being handed over, itself included.
///
/// # Errors
/// When it has no reset, or does not come back from it.
pub fn reset(
    host: &dyn PciHost,
    function: HostPciAddress,
    ours: &[HostPciAddress],
    gpu: bool,
) -> Result<ResetDone, ResetError> {
    let begun = Instant::now();
    let method = method_of(host, function, ours, gpu).ok_or(ResetError::NoMethod)?;
    let name = match &method {
        Method::Subordinate => "bus_all".to_owned(),
        Method::Listed(name) => name.clone(),
        Method::Kernel => "the kernel's choice".to_owned(),
    };
    let failed = |source| ResetError::Failed { method: name.clone(), source };
    match method {
        Method::Subordinate => host.write(function, SUBORDINATE, "1").map_err(failed)?,
        Method::Kernel => host.write(function, "reset", "1").map_err(failed)?,
        Method::Listed(method) => {
            let before = host.read(function, "reset_method").map_err(failed)?;
            host.write(function, "reset_method", &method).map_err(failed)?;
            let result = host.write(function, "reset", "1");
            // The kernel drops methods that it cannot use at the moment, so this may be refused.
            let restored = host.write(function, "reset_method", &before);
            result.and(restored).map_err(failed)?;
        }
    }
    if !host.answers(function) {
        return Err(ResetError::Gone(name));
    }
    let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(ResetDone { method: name, milliseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(gpu: bool, listed: &str, alone: bool, subordinate: bool) -> Option<String> {
        let situation = Situation { gpu, listed: Some(listed), plain: true, alone, subordinate };
        choose(situation).map(|method| match method {
            Method::Subordinate => "subordinate".into(),
            Method::Listed(name) => name,
            Method::Kernel => "kernel".into(),
        })
    }

    #[test]
    fn gpus_are_reset_with_their_bus_where_that_hits_nobody_else() {
        assert_eq!(chosen(true, "flr bus", true, false).as_deref(), Some("bus"));
        assert_eq!(chosen(true, "flr bus", false, true).as_deref(), Some("flr"));
        // A GPU with an audio function: the kernel offers no bus reset, the bridge above does.
        assert_eq!(chosen(true, "flr", true, true).as_deref(), Some("subordinate"));
        assert_eq!(chosen(true, "flr", true, false).as_deref(), Some("flr"));
    }

    #[test]
    fn other_devices_get_what_was_made_for_them() {
        assert_eq!(chosen(false, "flr bus", true, true).as_deref(), Some("flr"));
        assert_eq!(chosen(false, "device_specific flr pm", true, true).as_deref(), Some("device_specific"));
        assert_eq!(chosen(false, "pm bus", true, true).as_deref(), Some("bus"));
        assert_eq!(chosen(false, "pm bus", false, true).as_deref(), Some("pm"));
        assert_eq!(chosen(false, "new_way", false, true).as_deref(), Some("new_way"));
    }

    #[test]
    fn a_reset_that_would_hit_others_is_none() {
        assert_eq!(chosen(true, "bus", false, true), None);
        assert_eq!(chosen(true, "", false, false), None);
        assert_eq!(chosen(true, "", true, true), None);
        let old = Situation { gpu: true, listed: None, plain: true, alone: false, subordinate: false };
        assert_eq!(choose(old), Some(Method::Kernel));
        assert_eq!(choose(Situation { plain: false, ..old }), None);
        let below_a_bridge = Situation { plain: false, alone: true, subordinate: true, ..old };
        assert_eq!(choose(below_a_bridge), Some(Method::Subordinate));
    }
}
