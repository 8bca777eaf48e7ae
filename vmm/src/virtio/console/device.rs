//! The console as the transport sees it.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};

use super::port::{ConsoleCounters, Port, RECEIVE, Sinks, TRANSMIT};
use crate::virtio::chain::ChainLimits;
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::virtio::queue::{ChainQueue, RING_FEATURES};
use crate::virtio::worker::{Worker, run_epoll};

const DEVICE_TYPE: u32 = 3;
const QUEUE_SIZE: u16 = 64;
const QUEUE_SIZES: [u16; 2] = [QUEUE_SIZE; 2];

/// Linux sends and receives a page at most; a chain beyond this is no console's.
const LIMITS: ChainLimits =
    ChainLimits { descriptors: QUEUE_SIZE as usize, readable: 64 << 10, writable: 64 << 10 };

/// A virtio-console device.
pub struct Console {
    sinks: Arc<Mutex<Sinks>>,
    counters: Arc<ConsoleCounters>,
    worker: Option<Worker>,
}

impl Console {
    /// A console that writes to `output` and reads from `input`, if any: a terminal, a pipe
    /// or a file. Who gives the VMM's standard input keeps it for this console alone.
    pub fn new(output: impl Write + Send + 'static, input: Option<File>) -> Self {
        let sinks = Sinks { output: Box::new(output), input };
        Self { sinks: Arc::new(Mutex::new(sinks)), counters: Arc::default(), worker: None }
    }

    /// What went through, to be read at any time.
    pub fn counters(&self) -> Arc<ConsoleCounters> {
        Arc::clone(&self.counters)
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let mut queues = queues.into_iter();
        let mut take = |index| {
            let active = queues.next().filter(|active| active.index == index);
            let ActiveQueue { index, queue, kick } = active.ok_or(ActivateError::MissingQueue(index))?;
            let interrupt = Arc::clone(&interrupt);
            Ok((ChainQueue::new(index, queue, memory.clone(), interrupt, features, LIMITS), kick))
        };
        let receive = take(RECEIVE)?;
        let transmit = take(TRANSMIT)?;
        let counters = Arc::clone(&self.counters);
        let port = Port::new(Arc::clone(&self.sinks), receive, transmit, interrupt, counters);
        let worker = run_epoll("console", port)
            .map_err(|source| ActivateError::Host { what: "no thread for the console", source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }

    fn workers(&self) -> &[Worker] {
        self.worker.as_slice()
    }
}
