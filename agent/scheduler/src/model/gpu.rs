//! GPUs: devices of a node, and shares of them.
//!
//! A share is counted in thousandths of a device. Only the hardware enforces shares: a device is
//! given whole, or in MIG slices where it is partitioned. [`Sharing::Milli`] divides freely and is
//! for published traces of clusters that share by time; no agent reports it.

/// Thousandths in a whole device.
pub const WHOLE: u16 = 1000;

/// A GPU of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Gpu {
    /// How the node names it: its PCI address.
    pub id: String,
    /// Model, as NVML names it.
    pub model: String,
    /// Its memory, bytes.
    pub memory_bytes: u64,
    /// NUMA node, if known.
    pub numa: Option<u8>,
    /// Devices with the same number are below one PCIe switch.
    pub switch: Option<u8>,
    /// Devices with the same number reach each other over NVLink.
    pub link: Option<u8>,
    /// Devices with the same number are one NVSwitch partition: given together or not at all.
    pub partition: Option<u8>,
    /// How it can be divided.
    pub sharing: Sharing,
}

/// How a device can be divided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Not at all.
    #[default]
    Whole,
    /// Into MIG instances of these profiles.
    Mig(Vec<Profile>),
    /// Into any thousandths: traces alone.
    Milli,
}

/// A MIG profile: an instance takes neighbouring memory slots, of which a device has eight
/// (NVIDIA Multi-Instance GPU User Guide, "Supported MIG Profiles").
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Profile {
    /// As NVIDIA names it: `3g.40gb`.
    pub name: String,
    /// Memory slots it takes, 1 to 8.
    pub slots: u8,
    /// Compute slices it takes, 1 to 7; a device has seven.
    pub compute: u8,
    /// First slots that it may take.
    pub starts: Vec<u8>,
}

/// What is free of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpuFree {
    /// Thousandths, 0 to [`WHOLE`].
    pub milli: u16,
    /// MIG memory slots that are free, one bit each; all set where there are none.
    pub slots: u8,
    /// MIG compute slices that are free; 7 where there are none.
    pub compute: u8,
}

impl GpuFree {
    /// Of a device that nobody uses.
    pub const ALL: Self = Self { milli: WHOLE, slots: 0xff, compute: 7 };
    /// Of a device that cannot be given to anybody now.
    pub const NONE: Self = Self { milli: 0, slots: 0, compute: 0 };

    /// Whether nobody uses it.
    #[inline]
    pub fn is_whole(&self) -> bool {
        *self == Self::ALL
    }
}

/// What each task asks of GPUs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GpuRequest {
    /// Devices, at least 1; exactly 1 for a share.
    pub count: u32,
    /// Of each device.
    pub share: Share,
    /// Models that do; all if empty.
    pub models: Vec<String>,
    /// Memory that each device (or instance) has at least, bytes.
    pub memory_bytes: u64,
}

/// How much of a device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Share {
    /// All of it.
    Whole,
    /// A MIG instance of this profile.
    Profile(String),
    /// Thousandths, 1 to 999, of a device with [`Sharing::Milli`].
    Milli(u16),
}

impl GpuRequest {
    /// Whole devices of any model.
    pub const fn whole(count: u32) -> Self {
        Self { count, share: Share::Whole, models: Vec::new(), memory_bytes: 0 }
    }

    /// Whether a device is one that it asks for, whatever is free of it.
    pub fn accepts(&self, gpu: &Gpu) -> bool {
        let model = self.models.is_empty() || self.models.contains(&gpu.model);
        model
            && match &self.share {
                Share::Whole => gpu.memory_bytes >= self.memory_bytes,
                Share::Milli(_) => gpu.sharing == Sharing::Milli && gpu.memory_bytes >= self.memory_bytes,
                Share::Profile(name) => gpu.profile(name).is_some_and(|profile| {
                    gpu.memory_bytes / 8 * u64::from(profile.slots) >= self.memory_bytes
                }),
            }
    }
}

impl Gpu {
    /// The profile of that name, if the device can be partitioned so.
    pub fn profile(&self, name: &str) -> Option<&Profile> {
        match &self.sharing {
            Sharing::Mig(profiles) => profiles.iter().find(|profile| profile.name == name),
            Sharing::Whole | Sharing::Milli => None,
        }
    }

    /// The part that a share of this device would be, if it is free; the instance at the place that
    /// leaves the longest run of slots.
    pub fn part(&self, free: GpuFree, share: &Share) -> Option<GpuFree> {
        match share {
            Share::Whole => free.is_whole().then_some(GpuFree::ALL),
            Share::Milli(milli) => {
                (free.milli >= *milli).then_some(GpuFree { milli: *milli, slots: 0, compute: 0 })
            }
            Share::Profile(name) => {
                let profile = self.profile(name).filter(|profile| profile.compute <= free.compute)?;
                let mask = |start: u8| (((1_u16 << profile.slots) - 1) << start) as u8;
                let places = profile.starts.iter().copied().filter(|&start| start + profile.slots <= 8);
                let start = places
                    .filter(|&start| free.slots & mask(start) == mask(start))
                    .max_by_key(|&start| (longest_run(free.slots & !mask(start)), start))?;
                let milli = u16::from(profile.slots) * (WHOLE / 8);
                Some(GpuFree { milli, slots: mask(start), compute: profile.compute })
            }
        }
    }
}

/// Most neighbouring bits that are set.
fn longest_run(slots: u8) -> u32 {
    let (mut rest, mut run) = (slots, 0);
    while rest != 0 {
        rest &= rest << 1;
        run += 1;
    }
    run
}

/// A device of a node, or a part of one, that a task has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GpuPlace {
    /// Its index among the node's GPUs.
    pub index: u8,
    /// What is taken of it.
    pub part: GpuFree,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mig() -> Gpu {
        let profile = |name: &str, slots, compute, starts: &[u8]| Profile {
            name: name.to_owned(),
            slots,
            compute,
            starts: starts.to_vec(),
        };
        Gpu {
            id: "0000:65:00.0".to_owned(),
            model: "H100".to_owned(),
            memory_bytes: 80 << 30,
            numa: None,
            switch: None,
            link: None,
            partition: None,
            sharing: Sharing::Mig(vec![
                profile("1g.10gb", 1, 1, &[0, 1, 2, 3, 4, 5, 6]),
                profile("3g.40gb", 4, 3, &[0, 4]),
            ]),
        }
    }

    #[test]
    fn an_instance_goes_where_it_leaves_room_for_the_largest() {
        let small = Share::Profile("1g.10gb".to_owned());
        let large = Share::Profile("3g.40gb".to_owned());
        let part = mig().part(GpuFree::ALL, &small).unwrap();
        assert_eq!((part.slots, part.milli, part.compute), (1, 125, 1));
        let rest = GpuFree { milli: 875, slots: !part.slots, compute: 6 };
        assert_eq!(mig().part(rest, &large).unwrap().slots, 0xf0);
        let full = GpuFree { milli: 375, slots: 0x0e, compute: 3 };
        assert_eq!(mig().part(full, &large), None);
    }

    #[test]
    fn a_request_takes_only_devices_it_names() {
        let mut request = GpuRequest::whole(1);
        assert!(request.accepts(&mig()));
        request.models = vec!["A100".to_owned()];
        assert!(!request.accepts(&mig()));
        let profile =
            |name: &str| GpuRequest { share: Share::Profile(name.to_owned()), ..GpuRequest::whole(1) };
        assert!(profile("3g.40gb").accepts(&mig()) && !profile("4g.40gb").accepts(&mig()));
        assert!(!GpuRequest { memory_bytes: 41 << 30, ..profile("3g.40gb") }.accepts(&mig()));
    }
}
