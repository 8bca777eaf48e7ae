//! QEMU's educational device (docs/specs/edu.rst), driven through VFIO:
//!
//! ```text
//! edu_identification 0x10000ed
//! edu_liveness ok
//! edu_factorial polled 479001600     polled, intx, msi: how its end was learnt
//! edu_dma BYTES SHA-256              memory to device to memory, over two pages
//! edu_dma_interrupt msi
//! ```

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::Failure;
use crate::direct::Random;
use crate::memory::{Mapping, PAGE};
use crate::options::Options;
use crate::sysfs::{self, Device};
use crate::vfio::{Interrupt, Listener, VfioDevice};

/// Vendor and device ID.
pub const ID: (u16, u16) = (0x1234, 0x11e8);

/// Registers of BAR 0.
const IDENTIFICATION: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const INTERRUPT_STATUS: u64 = 0x24;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;

/// Bits of [`STATUS`].
const COMPUTING: u32 = 0x01;
const INTERRUPT_WHEN_COMPUTED: u32 = 0x80;
/// Bits of [`DMA_COMMAND`].
const DMA_RUN: u64 = 0x01;
const DMA_TO_MEMORY: u64 = 0x02;
const DMA_INTERRUPT: u64 = 0x04;
/// What [`INTERRUPT_STATUS`] then says.
const COMPUTED: u32 = 0x001;
const TRANSFERRED: u32 = 0x100;

/// The device's own memory, as its DMA engine knows it.
const BUFFER: u64 = 0x40000;
const BUFFER_SIZE: usize = 4096;

/// The engine takes a tenth of a second; a computation less. Emulation on a busy machine takes longer.
const LIMIT: Duration = Duration::from_secs(20);

/// Runs everything that the device can do.
pub fn exercise(options: &Options) -> Result<(), Failure> {
    let device = sysfs::find(options, "edu device", |device| device.id == ID)?;
    let memory = Memory::new()?;
    let edu = Edu::open(&device)?;
    println!("edu_identification {:#x}", edu.identify()?);
    println!("edu_liveness ok");
    edu.vfio.write(STATUS, 0)?;
    println!("edu_factorial polled {}", edu.factorial(None)?);
    let pin = options.text("pin") != Some("off");
    let kinds = [(Interrupt::Intx, "intx"), (Interrupt::Msi, "msi")];
    for (interrupt, name) in kinds.into_iter().filter(|(kind, _)| pin || *kind != Interrupt::Intx) {
        let listener = edu.vfio.listen(interrupt)?;
        // Twice: a line that was not unmasked, or not lowered, shows at the second.
        edu.factorial(Some((&listener, interrupt)))?;
        println!("edu_factorial {name} {}", edu.factorial(Some((&listener, interrupt)))?);
    }
    edu.vfio.write(STATUS, 0)?;
    let mut engine = Engine::new(&edu, &memory, 1);
    let mut sum = Sha256::new();
    let mut total = 0;
    for _ in 0..3 {
        let data = engine.round_trip(None)?;
        total += data.len();
        sum.update(data);
    }
    println!("edu_dma {total} {:x}", sum.finalize());
    let listener = edu.vfio.listen(Interrupt::Msi)?;
    engine.round_trip(Some(&listener))?;
    println!("edu_dma_interrupt msi");
    Ok(())
}

/// An open device.
pub struct Edu {
    vfio: VfioDevice,
}

impl Edu {
    /// Takes the device.
    pub fn open(device: &Device) -> Result<Self, Failure> {
        Ok(Self { vfio: VfioDevice::open(device)? })
    }

    /// Tells when the kernel wants the device back.
    pub fn request(&self) -> Result<Listener<'_>, Failure> {
        self.vfio.listen(Interrupt::Request)
    }

    /// Its version, once it has shown that it is alive.
    pub fn identify(&self) -> Result<u32, Failure> {
        let version = self.vfio.read(IDENTIFICATION)?;
        if version & 0xffff != 0x00ed {
            return Err(Failure::wrong(format!("identification {version:#x} does not end in 00ed")));
        }
        for word in [0x1234_5678_u32, 0, u32::MAX] {
            self.vfio.write(LIVENESS, word)?;
            let answer = self.vfio.read(LIVENESS)?;
            if answer != !word {
                return Err(Failure::wrong(format!("liveness check: {word:#x} became {answer:#x}")));
            }
        }
        Ok(version)
    }

    /// Computes 12!, the largest that fits.
    fn factorial(&self, interrupt: Option<(&Listener, Interrupt)>) -> Result<u32, Failure> {
        const ARGUMENT: u32 = 12;
        const EXPECTED: u32 = 479_001_600;
        if interrupt.is_some() {
            self.vfio.write(STATUS, INTERRUPT_WHEN_COMPUTED)?;
        }
        self.vfio.write(FACTORIAL, ARGUMENT)?;
        match interrupt {
            Some((listener, kind)) => self.interrupted(listener, kind, COMPUTED)?,
            None => {
                self.until("the factorial is not computed", || Ok(self.vfio.read(STATUS)? & COMPUTING == 0))?
            }
        }
        match self.vfio.read(FACTORIAL)? {
            EXPECTED => Ok(EXPECTED),
            other => Err(Failure::wrong(format!("12! is {EXPECTED}, the device says {other}"))),
        }
    }

    /// Waits for an interrupt for this reason alone, and ends it.
    fn interrupted(&self, listener: &Listener, kind: Interrupt, reason: u32) -> Result<(), Failure> {
        if !listener.wait(LIMIT)? {
            let status = self.vfio.read(INTERRUPT_STATUS)?;
            return Err(Failure::wrong(format!("no {kind:?} interrupt came; interrupt status {status:#x}")));
        }
        let status = self.vfio.read(INTERRUPT_STATUS)?;
        self.vfio.write(INTERRUPT_ACKNOWLEDGE, status)?;
        if status != reason {
            return Err(Failure::wrong(format!(
                "{kind:?} interrupt with status {status:#x}, not {reason:#x}"
            )));
        }
        if kind == Interrupt::Intx { listener.unmask() } else { Ok(()) }
    }

    fn until(&self, not: &str, done: impl Fn() -> Result<bool, Failure>) -> Result<(), Failure> {
        let deadline = Instant::now() + LIMIT;
        while !done()? {
            if Instant::now() > deadline {
                return Err(Failure::wrong(format!("{not} after {} s", LIMIT.as_secs())));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Moves `BUFFER_SIZE` bytes.
    fn transfer(&self, from: u64, to: u64, command: u64, listener: Option<&Listener>) -> Result<(), Failure> {
        self.vfio.write_long(DMA_SOURCE, from)?;
        self.vfio.write_long(DMA_DESTINATION, to)?;
        self.vfio.write_long(DMA_COUNT, BUFFER_SIZE as u64)?;
        let interrupt = if listener.is_some() { DMA_INTERRUPT } else { 0 };
        self.vfio.write_long(DMA_COMMAND, DMA_RUN | command | interrupt)?;
        match listener {
            Some(listener) => self.interrupted(listener, Interrupt::Msi, TRANSFERRED),
            None => self.until("the transfer is not done", || {
                Ok(u64::from(self.vfio.read(DMA_COMMAND)?) & DMA_RUN == 0)
            }),
        }
    }
}

/// Memory for both ends of the engine's transfers. It is made before the device is opened and goes after that is
/// closed: a transfer that nobody waits for any more, as of a device that is torn out, still writes to it.
pub struct Memory {
    source: Page,
    destination: Page,
}

impl Memory {
    /// A page for each end, which stays where it is: the kernel moves locked pages too when it makes room for large
    /// ones, unless it is told not to (Documentation/admin-guide/sysctl/vm.rst), and the device is told once.
    pub fn new() -> Result<Self, Failure> {
        // A kernel that never moves pages has no such file.
        let _ = fs::write("/proc/sys/vm/compact_unevictable_allowed", "0");
        Ok(Self { source: Page::new()?, destination: Page::new()? })
    }
}

/// The DMA engine.
pub struct Engine<'a> {
    edu: &'a Edu,
    memory: &'a Memory,
    random: Random,
}

struct Page {
    mapping: Mapping,
    physical: u64,
}

impl Page {
    fn new() -> Result<Self, Failure> {
        let mapping = Mapping::page().map_err(Failure::at("a page for DMA"))?;
        let physical = mapping.physical_address().map_err(Failure::at("the page's physical address"))?;
        Ok(Self { mapping, physical })
    }
}

impl<'a> Engine<'a> {
    /// With data that follows from the seed.
    pub fn new(edu: &'a Edu, memory: &'a Memory, seed: u64) -> Self {
        Self { edu, memory, random: Random::new(seed) }
    }

    /// Sends random data to the device, has it sent back to another page, and compares; the data.
    pub fn round_trip(&mut self, listener: Option<&Listener>) -> Result<Vec<u8>, Failure> {
        let Memory { source, destination } = self.memory;
        let mut data = Vec::with_capacity(BUFFER_SIZE);
        for offset in (0..PAGE.min(BUFFER_SIZE)).step_by(8) {
            let word = self.random.next();
            source.mapping.write(offset, word);
            destination.mapping.write(offset, !word);
            data.extend(word.to_le_bytes());
        }
        self.edu.transfer(source.physical, BUFFER, 0, listener)?;
        self.edu.transfer(BUFFER, destination.physical, DMA_TO_MEMORY, listener)?;
        for (offset, word) in (0..).step_by(8).zip(data.chunks_exact(8)) {
            let found = destination.mapping.read(offset).to_le_bytes();
            if found != word {
                return Err(Failure::wrong(format!(
                    "DMA: at byte {offset} {found:02x?} came back, {word:02x?} was sent; \
                     from {:#x} to {:#x}",
                    source.physical, destination.physical
                )));
            }
        }
        Ok(data)
    }
}
