//! What guests, images and callers feed to Lathe, as functions of arbitrary bytes.
//!
//! | module | who writes the bytes |
//! | --- | --- |
//! | [`virtio`] | a guest's kernel: PCI configuration, BARs, MSI-X table, rings and buffers of each device |
//! | [`ports`] | a guest's kernel: bus numbers, windows, resets and slots of ports and what is below them |
//! | [`passthrough`] | a passed-through device: configuration space; a guest's kernel: its BARs, messages and resets |
//! | [`guest`] | a guest's init: the messages to the agent; the serial port |
//! | [`image`] | whoever made an image: kernels, OCI documents, layers, datasets |
//! | [`document`] | callers: machine and job descriptions, traces for the simulator; providers' answers |
//!
//! A target returns, whatever it is given; it panics where a promise is broken. `scripts/fuzz NAME`
//! runs one under libFuzzer; the tests run each over its seeds and over noise.

pub mod document;
pub mod guest;
pub mod image;
mod input;
pub mod passthrough;
pub mod ports;
pub mod virtio;

/// One target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// As `scripts/fuzz` takes it, and the name of its folder of seeds.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 19] = [
    Target { name: "virtio_block", run: virtio::block },
    Target { name: "virtio_console", run: virtio::console },
    Target { name: "virtio_rng", run: virtio::rng },
    Target { name: "virtio_vsock", run: virtio::vsock },
    Target { name: "pci_config", run: virtio::pci_config },
    Target { name: "pci_ports", run: ports::pci_ports },
    Target { name: "device_capabilities", run: passthrough::device_capabilities },
    Target { name: "passthrough_config", run: passthrough::hostile_device },
    Target { name: "passthrough_bars", run: passthrough::hostile_guest },
    Target { name: "guest_messages", run: guest::messages },
    Target { name: "serial_port", run: guest::serial_port },
    Target { name: "kernel_image", run: image::kernel },
    Target { name: "oci_documents", run: image::documents },
    Target { name: "oci_layer", run: image::layer },
    Target { name: "csv_dataset", run: image::csv },
    Target { name: "vm_json", run: document::vm_json },
    Target { name: "job_spec", run: document::job_spec },
    Target { name: "cluster_trace", run: document::cluster_trace },
    Target { name: "provider_answer", run: document::provider_answer },
];
