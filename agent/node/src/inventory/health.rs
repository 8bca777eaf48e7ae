//! Whether a GPU works, decided from what its driver and the kernel log say: pure.
//!
//! NVML's recovery action is the driver's own judgement of now, so where there is one it decides: a
//! GPU whose fault is gone is healthy again whatever was logged. Only drivers that have none (before
//! 570) are judged by the gravest Xid since the last reset. An Xid that is not in the table below makes
//! nothing unhealthy: NVIDIA adds some with every generation, and most concern the program that ran.

use lathe_api::gpu::{GpuHealth, NvmlInfo, RecoveryAction};

/// What an Xid asks for, the most urgent last: the immediate action ("resolution bucket") in NVIDIA's Xid catalogue
/// for Ampere and later (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum XidClass {
    /// The program that ran is at fault or must start again; the GPU is not (`RESTART_APP`).
    Application,
    /// Told for the record (`IGNORE`).
    Informational,
    /// Somebody should look at it soon: what to do depends on more than the number.
    Attention,
    /// A reset makes it work again (`RESET_GPU`).
    Reset,
    /// A reset makes it work again, and NVIDIA's support decides whether it is returned.
    Replace,
    /// The host has to be restarted (`RESTART_BM`).
    Reboot,
}

/// The class of an Xid, with what it is; none for those that are not listed.
pub(super) fn classify(xid: u32) -> Option<(XidClass, &'static str)> {
    use XidClass::{Application, Attention, Informational, Reboot, Replace, Reset};
    Some(match xid {
        8 => (Application, "the GPU stopped processing"),
        11 | 25 | 32 => (Application, "invalid or corrupted push buffer"),
        13 => (Application, "graphics engine exception"),
        31 => (Application, "memory page fault"),
        // Follows from another error, or from the end of a program.
        45 => (Application, "a channel was removed after an earlier error"),
        68 => (Application, "video decoder exception"),
        69 => (Application, "graphics engine class error"),
        94 => (Application, "contained memory error"),
        37 => (Informational, "driver firmware error in a channel"),
        43 => (Informational, "a channel was stopped"),
        63 => (Informational, "a memory row was remapped"),
        92 => (Informational, "many corrected memory errors"),
        121 => (Informational, "corrected error on the link to the CPU"),
        // Says only that the recovery action changed, which NVML tells.
        154 => (Informational, "the recovery action changed"),
        // `CHECK_MECHANICALS`.
        54 => (Attention, "auxiliary power is missing"),
        // Workflows that go by registers in the rest of the line: from nothing to a reset of all that the link joins.
        74 => (Attention, "NVLink error"),
        144..=150 => (Attention, "NVLink error"),
        46 => (Reset, "the GPU stopped processing"),
        // A workflow, of which each way begins with a reset.
        48 => (Reset, "uncorrectable memory error"),
        62 => (Reset, "the internal microcontroller halted"),
        95 => (Reset, "uncontained memory error"),
        109 => (Reset, "context switch timed out"),
        110 => (Reset, "security fault"),
        119 => (Reset, "the GPU's system processor does not answer"),
        120 => (Reset, "the GPU's system processor failed"),
        136 => (Reset, "link training failed"),
        140 => (Reset, "unrecovered memory error"),
        143 => (Reset, "initialisation failed"),
        155 => (Reset, "an NVLink went down"),
        156 => (Reset, "a part of the GPU was retired"),
        158 => (Reset, "fatal timeout"),
        // `RESET_GPU`, then `CONTACT_SUPPORT`: a repair failed, which is worth a word even after the reset.
        64 => (Replace, "a memory row could not be remapped"),
        79 => (Reboot, "the GPU fell off the bus"),
        _ => return None,
    })
}

/// What an Xid asks of whoever runs the host, if anything: an order among those that follow each other.
pub(super) fn urgency(xid: u32) -> Option<XidClass> {
    classify(xid).map(|(class, _)| class).filter(|class| *class >= XidClass::Attention)
}

/// The judgement of one GPU.
pub(super) fn assess(nvml: &NvmlInfo) -> GpuHealth {
    let xid = nvml.last_xid.map(|xid| match classify(xid) {
        Some((class, what)) => (Some(class), format!("Xid {xid}, {what}")),
        None => (None, format!("Xid {xid}")),
    });
    let because = match &xid {
        Some((_, xid)) => format!(" (in the kernel log: {xid})"),
        None => String::new(),
    };
    match nvml.recovery_action {
        Some(RecoveryAction::None) => attention(xid),
        Some(RecoveryAction::Reset) => GpuHealth::Failed(format!("the driver asks for a reset{because}")),
        Some(RecoveryAction::DrainAndReset) => {
            GpuHealth::Failed(format!("the driver asks to let its work end and reset it{because}"))
        }
        Some(RecoveryAction::Reboot) => {
            GpuHealth::Failed(format!("the driver asks to restart the host{because}"))
        }
        Some(RecoveryAction::DrainPeers) => {
            GpuHealth::Degraded(format!("the driver asks to end what uses its links to other GPUs{because}"))
        }
        Some(RecoveryAction::Unknown) => {
            GpuHealth::Degraded(format!("the driver asks for something that Lathe does not know{because}"))
        }
        None => by_xid(xid),
    }
}

/// Nothing needs to be done now; what may come back is still worth a word.
fn attention(xid: Option<(Option<XidClass>, String)>) -> GpuHealth {
    match xid {
        Some((Some(XidClass::Attention | XidClass::Replace), xid)) => GpuHealth::Degraded(xid),
        _ => GpuHealth::Healthy,
    }
}

fn by_xid(xid: Option<(Option<XidClass>, String)>) -> GpuHealth {
    let Some((Some(class), xid)) = xid else { return GpuHealth::Healthy };
    match class {
        XidClass::Application | XidClass::Informational => GpuHealth::Healthy,
        XidClass::Attention => GpuHealth::Degraded(xid),
        XidClass::Reset => GpuHealth::Failed(format!("{xid}: reset it")),
        XidClass::Reboot => {
            GpuHealth::Failed(format!("{xid}: restart the host, then check power and seating"))
        }
        XidClass::Replace => {
            GpuHealth::Failed(format!("{xid}: reset it, and have it replaced if that comes again"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(recovery_action: Option<RecoveryAction>, last_xid: Option<u32>) -> GpuHealth {
        assess(&NvmlInfo { recovery_action, last_xid, ..NvmlInfo::default() })
    }

    fn failed(health: &GpuHealth, words: &str) -> bool {
        matches!(health, GpuHealth::Failed(reason) if reason.contains(words))
    }

    #[test]
    fn the_driver_s_own_judgement_counts_more_than_the_log() {
        assert_eq!(gpu(Some(RecoveryAction::None), Some(79)), GpuHealth::Healthy, "it recovered");
        assert!(failed(&gpu(Some(RecoveryAction::Reset), Some(95)), "Xid 95, uncontained"));
        assert!(failed(&gpu(Some(RecoveryAction::DrainAndReset), None), "let its work end"));
        assert!(failed(&gpu(Some(RecoveryAction::Reboot), None), "restart the host"));
        assert!(matches!(gpu(Some(RecoveryAction::DrainPeers), None), GpuHealth::Degraded(_)));
    }

    #[test]
    fn programs_faults_and_unknown_xids_leave_a_gpu_healthy() {
        // 123 is listed as unused.
        for xid in [13, 31, 43, 45, 63, 94, 154, 7, 123, 133, 999, u32::MAX] {
            assert_eq!(gpu(None, Some(xid)), GpuHealth::Healthy, "Xid {xid}");
        }
        assert_eq!(gpu(None, None), GpuHealth::Healthy);
    }

    #[test]
    fn hardware_faults_say_what_to_do() {
        assert!(failed(&gpu(None, Some(79)), "restart the host"));
        assert!(failed(&gpu(None, Some(48)), "reset it"));
        assert!(failed(&gpu(None, Some(64)), "replaced"));
        assert!(matches!(gpu(None, Some(74)), GpuHealth::Degraded(_)));
    }

    #[test]
    fn an_action_of_the_future_degrades_and_does_not_fail() {
        assert!(matches!(gpu(Some(RecoveryAction::Unknown), None), GpuHealth::Degraded(_)));
    }
}
