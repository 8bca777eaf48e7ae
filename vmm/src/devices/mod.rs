//! What little of a PC's board remains: serial port, power and reset registers, panic notifier.

mod console;
mod platform;
mod serial;

pub use console::{ConsoleError, ConsoleOutput};
pub use platform::{KeyboardController, PanicNotifier, PowerRegisters};
pub use serial::{Serial, SerialCounters};
