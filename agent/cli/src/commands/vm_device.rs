//! `lathe vm device`: passed-through devices of a running microVM, through its control socket.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use lathe_vmm::client::VmmClient;
use lathe_vmm::config::{GpuDirectClique, HostPciAddress, PassthroughConfig};

use crate::exit::Exit;
use crate::output::{self, Format};

/// What to do with devices.
#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// List the devices and where the guest has them.
    List {
        /// The socket that `--api-socket` named.
        socket: PathBuf,
    },
    /// Plug a PCI function of this host, bound to vfio-pci, into a free slot.
    Plug(PlugArgs),
    /// Ask the guest to let go of a device; it is given back when it has.
    Unplug {
        /// The socket that `--api-socket` named.
        socket: PathBuf,
        /// The device's ID.
        id: String,
        /// Take it away at once, whatever the guest does with it.
        #[arg(long)]
        surprise: bool,
    },
}

/// Arguments of `lathe vm device plug`.
#[derive(Debug, Args)]
pub struct PlugArgs {
    /// The socket that `--api-socket` named.
    socket: PathBuf,
    /// The function's address, as 0000:65:00.0.
    address: HostPciAddress,
    /// How the machine shall call it [default: the address].
    #[arg(long)]
    id: Option<String>,
}

/// Does it.
///
/// # Errors
/// When nothing listens on the socket, or what the VMM said.
pub fn run(command: &DeviceCommand, format: Format) -> anyhow::Result<Exit> {
    match command {
        DeviceCommand::List { socket } => {
            let devices = VmmClient::new(socket).devices()?;
            if let Format::Json = format {
                output::json(&devices)?;
                return Ok(Exit::Success);
            }
            let mut table = output::table(&["ID", "HOST", "GUEST", "SLOT", "BACKEND", "RESET", "PEERS"]);
            for device in &devices {
                let slot = device.slot.map_or_else(|| "-".to_owned(), |slot| slot.to_string());
                let guest = device.guest_address.clone().unwrap_or_else(|| "-".to_owned());
                let peers = if device.peer_to_peer { "yes" } else { "no" }.to_owned();
                let address = device.address.to_string();
                let (id, backend, reset) = (&device.id, &device.backend, &device.reset);
                table.add_row([id, &address, &guest, &slot, backend, reset, &peers]);
            }
            println!("{table}");
        }
        DeviceCommand::Plug(args) => {
            let id = args.id.clone().unwrap_or_else(|| args.address.to_string());
            let gpudirect_clique = GpuDirectClique::Auto;
            let config = PassthroughConfig { id, address: args.address, gpudirect_clique };
            let device = VmmClient::new(&args.socket).plug(&config)?;
            match format {
                Format::Json => output::json(&device)?,
                Format::Table => println!(
                    "{} is in slot {} after a {} of {:.1} ms",
                    device.id,
                    device.slot.unwrap_or_default(),
                    device.reset,
                    device.reset_ms
                ),
            }
        }
        DeviceCommand::Unplug { socket, id, surprise } => VmmClient::new(socket).unplug(id, *surprise)?,
    }
    Ok(Exit::Success)
}
