//! On a host: makes virtual functions of an NVMe controller and gives each its queues and interrupts, as
//! `nvme virt-mgmt` does (NVM Express Base 2.0 §8.26). `nvme_function ADDRESS` for each; no driver takes them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::Failure;
use crate::options::Options;
use crate::sysfs::{self, Device};

/// `NVME_IOCTL_ADMIN_CMD`: `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const ADMIN_COMMAND: libc::Ioctl = 0xc048_4e41_u32 as libc::Ioctl;
/// NVMe 2.0 §5.27.
const VIRTUALIZATION_MANAGEMENT: u8 = 0x1c;

/// Class of an NVMe controller.
const CLASS: u32 = 0x01_08_02;

/// Resources by type, and how many a function gets: pairs of queues, one of them for administration, and
/// interrupts.
const QUEUES: (u32, u16) = (0, 3);
const INTERRUPTS: (u32, u16) = (1, 3);

/// What is done to a controller's resources.
#[derive(Clone, Copy)]
enum Action {
    AssignToPrimary = 1,
    AssignToSecondary = 8,
    Online = 9,
}

/// `struct nvme_passthru_cmd` (include/uapi/linux/nvme_ioctl.h).
#[repr(C)]
#[derive(Default)]
struct Command {
    opcode: u8,
    flags: u8,
    _reserved: u16,
    namespace: u32,
    words: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_length: u32,
    data_length: u32,
    /// Command words 10 to 15.
    command_words: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// Makes them.
pub fn enable(options: &Options) -> Result<(), Failure> {
    let functions: u16 = options.number("functions")?.unwrap_or(2);
    let device = sysfs::find(options, "NVMe disk with virtual functions", |device| {
        device.class == CLASS && device.path.join("sriov_totalvfs").exists()
    })?;
    let controller = controller_of(&device)?;
    device.set("sriov_drivers_autoprobe", "0")?;
    // The controller starts with all resources; they are free after the reset.
    for (kind, _) in [QUEUES, INTERRUPTS] {
        manage(&controller, 0, kind, Action::AssignToPrimary, 0)?;
    }
    let reset = Path::new("/sys/class/nvme").join(&controller).join("reset_controller");
    fs::write(&reset, "1").map_err(Failure::at(format!("writing {}", reset.display())))?;
    device.set("sriov_numvfs", &functions.to_string())?;
    // Without queues no driver could have started; from here on whoever names one may.
    device.set("sriov_drivers_autoprobe", "1")?;
    for function in 1..=functions {
        for (kind, count) in [QUEUES, INTERRUPTS] {
            manage(&controller, function, kind, Action::AssignToSecondary, count)?;
        }
        manage(&controller, function, 0, Action::Online, 0)?;
        let link = device.path.join(format!("virtfn{}", function - 1));
        let address = fs::read_link(&link).map_err(Failure::at(format!("reading {}", link.display())))?;
        println!("nvme_function {}", address.file_name().unwrap_or_default().to_string_lossy());
    }
    Ok(())
}

/// The name of a device's controller, such as `nvme0`.
fn controller_of(device: &Device) -> Result<String, Failure> {
    let directory = device.path.join("nvme");
    sysfs::wait_for(&format!("{} has no controller in {}", device.address, directory.display()), || {
        let Ok(mut entries) = fs::read_dir(&directory) else { return Ok(None) };
        Ok(entries.next().and_then(Result::ok).map(|entry| entry.file_name().to_string_lossy().into_owned()))
    })
}

fn manage(controller: &str, function: u16, kind: u32, action: Action, count: u16) -> Result<(), Failure> {
    let path = format!("/dev/{controller}");
    let device = File::open(&path).map_err(Failure::at(format!("opening {path}")))?;
    let mut command = Command { opcode: VIRTUALIZATION_MANAGEMENT, ..Command::default() };
    command.command_words[0] = action as u32 | kind << 8 | u32::from(function) << 16;
    command.command_words[1] = u32::from(count);
    // SAFETY: the argument is the structure that this request takes, and lives over the call.
    let status = unsafe { libc::ioctl(device.as_raw_fd(), ADMIN_COMMAND, &raw mut command) };
    let what = format!("virtualization management, action {} of function {function}", action as u32);
    match status {
        0 => Ok(()),
        ..0 => Err(Failure::at(what)(io::Error::last_os_error())),
        status => Err(Failure::wrong(format!("{what}: the controller answers with status {status:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_has_the_kernels_size() {
        assert_eq!(size_of::<Command>(), 72);
    }
}
