//! A prompt end on SIGTERM and SIGINT.
//!
//! In a container or a microVM the worker can be PID 1 of its namespace, for which the kernel
//! ignores signals that have no handler. So the signals are blocked in every thread and one
//! thread waits for them. Nothing needs tidying: files appear by rename, peers see the
//! connection close.

use nix::sys::signal::{SigSet, Signal};

/// Starts to watch. Call it first in `main`: threads inherit the blocked signals.
pub fn on_signals() {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    if let Err(e) = signals.thread_block() {
        eprintln!("least-squares: cannot block signals: {e}");
        return;
    }
    std::thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            eprintln!("least-squares: ended by {signal}");
            std::process::exit(128 + signal as i32);
        }
    });
}
