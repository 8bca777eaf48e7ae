//! Tap devices, which rtnetlink cannot make.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, libc::TUNSETPERSIST);

/// Makes a tap device that stays when this descriptor is closed. It carries no packet information
/// and is ready for offloads (`IFF_VNET_HDR`), as the VMM opens it.
///
/// # Errors
/// When `/dev/net/tun` cannot be opened or the kernel refuses the name.
pub fn make(name: &str) -> io::Result<()> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut ifr_name = [0; libc::IFNAMSIZ];
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is not an interface's name"),
        ));
    }
    for (slot, byte) in ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let request = libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short },
    };
    // SAFETY: the descriptor is open, and `request` is a whole ifreq that outlives the call.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }?;
    // SAFETY: the descriptor is open; the argument is a number.
    unsafe { tun_set_persist(tun.as_raw_fd(), 1) }?;
    Ok(())
}
