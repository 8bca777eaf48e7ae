//! The whole device on real taps, each test in a network namespace of its own.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::HEADER_SIZE;
use crate::config::{NetworkConfig, VhostMode};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::net::{Net, NetParts, TapError, open_tap};
use crate::virtio::test_driver::{Buffer, DriverQueue, PATIENCE, TestInterrupt, guest_memory};

const QUEUE_SIZE: u16 = 64;
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xbb];

/// Runs `test` on a thread in a new network namespace with a tap `tap0` at 10.9.0.1, where 10.9.0.2 is
/// known to be the guest. The namespace goes with the thread.
fn with_tap(multi_queue: bool, test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: this needs root and /dev/net/tun");
            return;
        }
        let kind = if multi_queue { " multi_queue" } else { "" };
        ip(&format!("tuntap add dev tap0 mode tap vnet_hdr{kind}"));
        ip("link set tap0 address 02:00:00:00:00:aa");
        ip("address add 10.9.0.1/24 dev tap0");
        ip("link set tap0 up");
        ip("link set lo up");
        ip("neighbour add 10.9.0.2 lladdr 02:00:00:00:00:bb dev tap0");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Waits until the kernel has seen that somebody holds the tap: it says so from a work queue, and drops
/// what is sent before. A machine with much to do on its links lets it wait.
fn wait_until_up() {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let link = Command::new("ip").args(["-o", "link", "show", "dev", "tap0"]).output().unwrap();
        let link = String::from_utf8_lossy(&link.stdout).into_owned();
        if link.contains("state UP") {
            return;
        }
        assert!(Instant::now() < deadline, "the tap does not come up: {link}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn config(queue_pairs: u8) -> NetworkConfig {
    NetworkConfig {
        id: "net0".to_owned(),
        tap: "tap0".to_owned(),
        mac: "02:00:00:00:00:bb".to_owned(),
        mtu: Some(1500),
        queue_pairs,
        vhost: VhostMode::Off,
    }
}

/// A guest that knows UDP.
struct Guest {
    memory: GuestMemoryMmap,
    interrupt: Arc<TestInterrupt>,
    queues: Vec<DriverQueue>,
}

impl Guest {
    fn activate(device: &mut Net) -> Self {
        let (memory, ram) = guest_memory(16 << 20);
        let interrupt = TestInterrupt::new();
        let queues: Vec<DriverQueue> = (0..device.queue_sizes().len() as u16)
            .map(|index| DriverQueue::new(&memory, index, QUEUE_SIZE, 0x1000 + u64::from(index) * 0x1000))
            .collect();
        let activation = Activation {
            memory: ram,
            features: device.features(),
            queues: queues.iter().map(DriverQueue::activate).collect(),
            interrupt: interrupt.clone(),
        };
        device.activate(activation).unwrap();
        Self { memory, interrupt, queues }
    }

    fn address(queue: usize, head: u16) -> u64 {
        0x10_0000 + (queue as u64 * u64::from(QUEUE_SIZE) + u64::from(head)) * 2048
    }

    fn offer(&mut self, queue: usize, count: usize) {
        for _ in 0..count {
            let address = Self::address(queue, self.queues[queue].next_head().unwrap());
            self.queues[queue].add(&[Buffer { address, len: 2048, writable: true }]).unwrap();
        }
        self.queues[queue].kick();
    }

    fn put(&mut self, queue: usize, bytes: &[u8], room: u32) -> u16 {
        let address = Self::address(queue, self.queues[queue].next_head().unwrap());
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        let mut buffers = vec![Buffer { address, len: bytes.len() as u32, writable: false }];
        if room > 0 {
            buffers.push(Buffer { address: address + 1024, len: room, writable: true });
        }
        let head = self.queues[queue].add(&buffers).unwrap();
        self.queues[queue].kick();
        head
    }

    /// The payload of the next UDP datagram in `queue`, if there is one.
    fn datagram(&mut self, queue: usize) -> Option<Vec<u8>> {
        loop {
            let (head, len) = self.queues[queue].used()?;
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(Self::address(queue, head))).unwrap();
            let frame = &bytes[HEADER_SIZE..];
            // The host sends router solicitations and the like, too.
            if frame[12..14] == [8, 0] && frame[23] == 17 {
                assert_eq!(bytes[10..12], [1, 0], "one buffer");
                return Some(frame[42..].to_vec());
            }
            self.offer(queue, 1);
        }
    }

    fn wait_datagram(&mut self, queue: usize) -> Vec<u8> {
        let interrupt = Arc::clone(&self.interrupt);
        interrupt.wait_for("a datagram", || self.datagram(queue))
    }

    fn pairs_set(&mut self, count: u16) -> u8 {
        let control = self.queues.len() - 1;
        let [low, high] = count.to_le_bytes();
        let head = self.put(control, &[4, 0, low, high], 1);
        let interrupt = Arc::clone(&self.interrupt);
        interrupt.wait_for("an acknowledgement", || self.queues[control].used());
        self.memory.read_obj(GuestAddress(Self::address(control, head) + 1024)).unwrap()
    }
}

/// A datagram from the guest's port 7 to the host's `port`, with virtio's header in front.
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend((28 + payload.len() as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut bytes = vec![0; HEADER_SIZE];
    bytes.extend(HOST_MAC);
    bytes.extend(GUEST_MAC);
    bytes.extend([8, 0]);
    bytes.extend(ip);
    bytes.extend(7_u16.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend((8 + payload.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn datagrams_go_both_ways_through_pauses_and_resets() {
    with_tap(false, || {
        let mut device = Net::new(NetParts::open(&config(1)).unwrap()).unwrap();
        wait_until_up();
        let socket = host_socket();
        let port = socket.local_addr().unwrap().port();
        for round in 0..2_u8 {
            let mut guest = Guest::activate(&mut device);
            // More than there are buffers for: the rest waits in the tap.
            for n in 0..100_u8 {
                socket.send_to(&[round, n], "10.9.0.2:7").unwrap();
            }
            guest.offer(0, 8);
            for n in 0..100_u8 {
                assert_eq!(guest.wait_datagram(0), [round, n]);
                guest.offer(0, 1);
                if n == 50 {
                    device.pause();
                    device.resume();
                }
            }
            for n in 0..32_u8 {
                guest.put(1, &datagram(port, &[n; 600]), 0);
                let mut bytes = [0; 2000];
                assert_eq!(socket.recv(&mut bytes).unwrap(), 600);
                assert_eq!(bytes[..600], [n; 600]);
            }
            device.reset();
        }
        let metrics = device.metrics();
        assert_eq!(metrics.frames_from_guest.load(Ordering::Relaxed), 64);
        assert!(metrics.frames_to_guest.load(Ordering::Relaxed) >= 200);
    });
}

#[test]
fn pairs_are_used_as_the_driver_asks() {
    with_tap(true, || {
        let mut device = Net::new(NetParts::open(&config(2)).unwrap()).unwrap();
        assert_eq!(device.queue_sizes().len(), 5);
        assert_eq!(device.features() >> VIRTIO_NET_F_MQ & device.features() >> VIRTIO_NET_F_CTRL_VQ & 1, 1);
        wait_until_up();
        let mut guest = Guest::activate(&mut device);
        for queue in [0, 2] {
            guest.offer(queue, usize::from(QUEUE_SIZE));
        }
        // Flows from many ports: at first all come to the first pair.
        let flows: Vec<UdpSocket> = (0..40).map(|_| host_socket()).collect();
        let send_all =
            || flows.iter().for_each(|flow| assert_eq!(flow.send_to(b"x", "10.9.0.2:7").unwrap(), 1));
        send_all();
        for _ in &flows {
            guest.wait_datagram(0);
        }
        assert_eq!(guest.datagram(2), None);
        for impossible in [0, 3, u16::MAX] {
            assert_eq!(guest.pairs_set(impossible), 1);
        }
        assert_eq!(guest.pairs_set(2), 0);
        guest.offer(0, 30);
        send_all();
        let mut found = [0, 0];
        let interrupt = Arc::clone(&guest.interrupt);
        interrupt.wait_for("all flows", || {
            for (at, queue) in [0, 2].into_iter().enumerate() {
                found[at] += std::iter::from_fn(|| guest.datagram(queue)).count();
            }
            (found[0] + found[1] == flows.len()).then_some(())
        });
        assert!(found[0] > 0 && found[1] > 0, "{found:?} of the flows in each pair");
        // The second pair sends, too.
        let port = flows[0].local_addr().unwrap().port();
        guest.put(3, &datagram(port, b"from the second pair"), 0);
        let mut bytes = [0; 100];
        assert_eq!(flows[0].recv(&mut bytes).unwrap(), 20);
        assert_eq!(guest.pairs_set(1), 0);
        device.reset();
    });
}

#[test]
fn taps_that_cannot_be_used_are_told_apart() {
    with_tap(false, || {
        assert!(matches!(open_tap("tap7", 1), Err(TapError::Missing(_))));
        assert!(matches!(open_tap("lo", 1), Err(TapError::NotTap(_))));
        assert!(matches!(open_tap("tap0", 2), Err(TapError::Queues { multi_queue: false, .. })));
        for bad in ["", "a/b", "tap 0", "tap%d", "sixteen-bytes-xx", ".."] {
            assert!(matches!(open_tap(bad, 1), Err(TapError::BadName(_))), "{bad:?}");
        }
        let first = open_tap("tap0", 1).unwrap();
        assert!(matches!(open_tap("tap0", 1), Err(TapError::Busy(_))));
        drop(first);
        open_tap("tap0", 1).unwrap();
    });
    with_tap(true, || {
        assert!(matches!(open_tap("tap0", 1), Err(TapError::Queues { multi_queue: true, .. })));
        assert_eq!(open_tap("tap0", 4).unwrap().len(), 4);
    });
}

#[test]
fn the_configuration_space_tells_address_pairs_and_mtu() {
    with_tap(true, || {
        let device = Net::new(NetParts::open(&config(2)).unwrap()).unwrap();
        let mut bytes = [0xff; 14];
        device.read_config(0, &mut bytes);
        assert_eq!(bytes, [2, 0, 0, 0, 0, 0xbb, 1, 0, 2, 0, 0xdc, 5, 0, 0]);
        let bad = NetworkConfig { mtu: Some(67), ..config(2) };
        assert!(NetParts::open(&bad).is_err());
        assert!(NetParts::open(&config(9)).is_err());
        assert!(NetParts::open(&config(0)).is_err());
    });
}
