// SPDX-License-Identifier: Apache-2.0
//! The common configuration registers (virtio 1.2, section 4.1.4.3): a state machine with no
//! side effects; what a write asks for comes back as an `Effect`.
//!
//! Everything the driver sets is frozen once it is in use: features at FEATURES_OK, a queue when
//! it is enabled, all of it at DRIVER_OK (CVE-2026-5747).

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Device status bits (section 2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
}

/// Feature bits of the ring and the transport (section 6).
pub(super) const INDIRECT_DESC: u64 = 1 << 28;
pub(super) const EVENT_IDX: u64 = 1 << 29;
pub(super) const VERSION_1: u64 = 1 << 32;

/// "No vector" in the vector registers.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// What a write asks of the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing more.
    None,
    /// The driver set DRIVER_OK: start the device.
    Activate,
    /// The driver wrote 0 to the status: reset the device.
    Reset,
}

#[derive(Debug, Clone, Copy)]
struct QueueRegisters {
    max_size: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        }
    }
}

/// The registers. The status lives beside them: the worker may set NEEDS_RESET in it.
#[derive(Debug)]
pub(super) struct CommonConfig {
    device_features: u64,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    vectors: u16,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// Why the driver's set-up can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {0} has a bad size, or rings outside of memory")]
pub(super) struct BadQueue(pub(super) u16);

impl CommonConfig {
    pub(super) fn new(device_features: u64, queue_max_sizes: &[u16], vectors: u16) -> Self {
        Self {
            device_features: device_features | VERSION_1 | INDIRECT_DESC | EVENT_IDX,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            vectors,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: queue_max_sizes
                .iter()
                .copied()
                .map(QueueRegisters::new)
                .collect(),
        }
    }

    /// The features both sides agreed on.
    pub(super) fn features(&self) -> u64 {
        self.driver_features & self.device_features
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Every queue's vector, by queue index.
    pub(super) fn queue_vectors(&self) -> impl Iterator<Item = u16> {
        self.queues.iter().map(|queue| queue.vector)
    }

    /// Back to the state after reset.
    pub(super) fn reset(&mut self) {
        self.driver_features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.config_vector = NO_VECTOR;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
    }

    /// The enabled queues with their index, checked against memory.
    pub(super) fn queues(&self, memory: &GuestMemoryMmap) -> Result<Vec<(u16, Queue)>, BadQueue> {
        let mut queues = Vec::new();
        for (index, registers) in (0_u16..).zip(&self.queues) {
            if registers.enabled {
                let queue = registers.build(self.features(), memory);
                queues.push((index, queue.ok_or(BadQueue(index))?));
            }
        }
        Ok(queues)
    }

    /// Reads registers; an access that is not one whole field reads as zero, but for 64-bit
    /// fields, which may be read by halves.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], status: u8, generation: u8) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let queue_u16 = |field: fn(&QueueRegisters) -> u16| queue.map_or(0, field);
        let queue_u64 = |field: fn(&QueueRegisters) -> u64| queue.map_or(0, field);
        let value: u64 = match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select.into(),
            (0x04, 4) => half(self.device_features, self.device_feature_select).into(),
            (0x08, 4) => self.driver_feature_select.into(),
            (0x0c, 4) => half(self.driver_features, self.driver_feature_select).into(),
            (0x10, 2) => self.config_vector.into(),
            (0x12, 2) => u16::try_from(self.queues.len()).unwrap_or(u16::MAX).into(),
            (0x14, 1) => status.into(),
            (0x15, 1) => generation.into(),
            (0x16, 2) => self.queue_select.into(),
            (0x18, 2) => queue_u16(|queue| queue.size).into(),
            (0x1a, 2) => queue.map_or(NO_VECTOR, |queue| queue.vector).into(),
            (0x1c, 2) => queue_u16(|queue| queue.enabled.into()).into(),
            // The notify offset: doorbells are in queue order.
            (0x1e, 2) => queue.map_or(0, |_| self.queue_select).into(),
            (0x20, 4 | 8) => queue_u64(|queue| queue.descriptors),
            (0x24, 4) => queue_u64(|queue| queue.descriptors) >> 32,
            (0x28, 4 | 8) => queue_u64(|queue| queue.driver),
            (0x2c, 4) => queue_u64(|queue| queue.driver) >> 32,
            (0x30, 4 | 8) => queue_u64(|queue| queue.device),
            (0x34, 4) => queue_u64(|queue| queue.device) >> 32,
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Writes registers; an access that is not one whole field (or half of a 64-bit one) is
    /// ignored, as is a write to what is read-only or frozen.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], status: &mut u8) -> Effect {
        let mut bytes = [0; 8];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        let value = u64::from_le_bytes(bytes);
        let [b0, b1, b2, b3, ..] = bytes;
        let (value8, value16) = (b0, u16::from_le_bytes([b0, b1]));
        let value32 = u32::from_le_bytes([b0, b1, b2, b3]);
        let frozen = *status & status::DRIVER_OK != 0;
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value32,
            (0x08, 4) => self.driver_feature_select = value32,
            (0x0c, 4) if *status & status::FEATURES_OK == 0 => {
                set_half(
                    &mut self.driver_features,
                    self.driver_feature_select,
                    value32,
                );
            }
            (0x10, 2) if !frozen => self.config_vector = self.vector(value16),
            (0x14, 1) => return self.set_status(value8, status),
            (0x16, 2) => self.queue_select = value16,
            (0x18..=0x37, _) if !frozen => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Effect::None
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the access's width was matched"
    )]
    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let vector = self.vector(value as u16);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled {
            return;
        }
        match (offset, len) {
            (0x18, 2) => queue.size = value as u16,
            (0x1a, 2) => queue.vector = vector,
            // Writing 0 is forbidden to drivers (4.1.4.3.2): only a reset disables.
            (0x1c, 2) => queue.enabled = value as u16 == 1,
            (0x20, 8) => queue.descriptors = value,
            (0x28, 8) => queue.driver = value,
            (0x30, 8) => queue.device = value,
            (0x20 | 0x24, 4) => set_half(&mut queue.descriptors, half_of(offset), value as u32),
            (0x28 | 0x2c, 4) => set_half(&mut queue.driver, half_of(offset), value as u32),
            (0x30 | 0x34, 4) => set_half(&mut queue.device, half_of(offset), value as u32),
            _ => {}
        }
    }

    /// The vector if there is such a one; reading back "no vector" tells the driver otherwise
    /// (section 4.1.5.1.2).
    fn vector(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn set_status(&mut self, value: u8, status: &mut u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        const STEPS: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;
        let old = *status;
        // Bits are only ever set (2.1.1); NEEDS_RESET is the device's to set.
        *status |= value & STEPS;
        let ready = status::ACKNOWLEDGE | status::DRIVER;
        if value & status::FEATURES_OK != 0 && *status & ready == ready {
            let unknown = self.driver_features & !self.device_features;
            if unknown == 0 && self.driver_features & VERSION_1 != 0 {
                *status |= status::FEATURES_OK;
            }
        }
        let stop = status::FAILED | status::NEEDS_RESET;
        if value & status::DRIVER_OK != 0
            && *status & status::FEATURES_OK != 0
            && *status & stop == 0
        {
            *status |= status::DRIVER_OK;
        }
        if *status & !old & status::DRIVER_OK != 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }
}

impl QueueRegisters {
    fn build(&self, features: u64, memory: &GuestMemoryMmap) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .ok()?;
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}

/// Half `select` (0 or 1) of a 64-bit register; other halves are zero.
fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(register: &mut u64, select: u32, value: u32) {
    let (low, high) = (half(*register, 0), half(*register, 1));
    let (low, high) = match select {
        0 => (value, high),
        1 => (low, value),
        _ => return,
    };
    *register = u64::from(high) << 32 | u64::from(low);
}

/// Which half of its 64-bit field an offset names.
fn half_of(offset: u64) -> u32 {
    if offset & 4 == 0 { 0 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
    }

    struct Driver {
        config: CommonConfig,
        status: u8,
    }

    impl Driver {
        fn new() -> Self {
            Self {
                config: CommonConfig::new(1 << 9, &[256, 64], 3),
                status: 0,
            }
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
            self.config.write(offset, data, &mut self.status)
        }

        fn status(&mut self, value: u8) -> Effect {
            self.write(0x14, &[value])
        }

        fn read16(&self, offset: u64) -> u16 {
            let mut data = [0xee; 2];
            self.config.read(offset, &mut data, self.status, 0);
            u16::from_le_bytes(data)
        }

        fn features(&mut self, features: u64) {
            for half in 0..2_u32 {
                self.write(0x08, &half.to_le_bytes());
                let bits = (features >> (32 * half)) as u32;
                self.write(0x0c, &bits.to_le_bytes());
            }
        }

        fn queue(&mut self, index: u16, size: u16, base: u64) {
            self.write(0x16, &index.to_le_bytes());
            self.write(0x18, &size.to_le_bytes());
            self.write(0x1a, &index.to_le_bytes());
            for (register, at) in [(0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)] {
                let at = at.to_le_bytes();
                self.write(register, &at[..4]);
                self.write(register + 4, &at[4..]);
            }
            self.write(0x1c, &1_u16.to_le_bytes());
        }

        fn negotiate(&mut self) {
            self.status(1);
            self.status(3);
            self.features(VERSION_1 | EVENT_IDX);
            self.status(11);
            assert_eq!(self.status, 11);
        }
    }

    #[test]
    fn a_driver_that_follows_the_steps_activates_the_device() {
        let mut driver = Driver::new();
        driver.negotiate();
        driver.queue(0, 128, 0x1000);
        assert_eq!(driver.status(15), Effect::Activate);
        assert_eq!(driver.status(15), Effect::None);
        let queues = driver.config.queues(&memory()).unwrap();
        assert_eq!(queues.len(), 1);
        assert_eq!(queues[0].1.size(), 128);
        assert_eq!(queues[0].1.used_ring(), 0x3000);
        assert!(queues[0].1.event_idx_enabled());
        assert_eq!(
            driver.config.queue_vectors().collect::<Vec<_>>(),
            [0, NO_VECTOR]
        );
        assert_eq!(driver.status(0), Effect::Reset);
    }

    #[test]
    fn features_outside_of_the_offer_are_refused() {
        for features in [VERSION_1 | 1 << 5, 1 << 9, 0] {
            let mut driver = Driver::new();
            driver.status(3);
            driver.features(features);
            driver.status(11);
            assert_eq!(driver.status & status::FEATURES_OK, 0);
            assert_eq!(driver.status(15), Effect::None);
        }
    }

    #[test]
    fn features_are_frozen_once_agreed_on() {
        let mut driver = Driver::new();
        driver.negotiate();
        driver.features(u64::MAX);
        assert_eq!(driver.config.features(), VERSION_1 | EVENT_IDX);
    }

    #[test]
    fn a_queue_is_frozen_when_enabled_and_at_driver_ok() {
        let mut driver = Driver::new();
        driver.negotiate();
        driver.queue(0, 128, 0x1000);
        driver.queue(0, 64, 0x8000);
        driver.status(15);
        driver.queue(0, 32, 0x9000);
        driver.queue(1, 32, 0x9000);
        driver.write(0x10, &[0, 0]);
        let queues = driver.config.queues(&memory()).unwrap();
        assert_eq!(queues.len(), 1);
        assert_eq!(queues[0].1.size(), 128);
        assert_eq!(queues[0].1.desc_table(), 0x1000);
        assert_eq!(driver.config.config_vector(), NO_VECTOR);
    }

    #[test]
    fn bad_queues_are_told() {
        let past_the_end = 0x10_0000 - 0x1000;
        for (size, base) in [
            (0, 0x1000),
            (3, 0x1000),
            (512, 0x1000),
            (64, past_the_end),
            (64, 1),
        ] {
            let mut driver = Driver::new();
            driver.negotiate();
            driver.queue(1, size, base);
            driver.status(15);
            assert_eq!(driver.config.queues(&memory()).unwrap_err(), BadQueue(1));
        }
    }

    #[test]
    fn registers_of_missing_queues_read_as_nothing() {
        let mut driver = Driver::new();
        driver.negotiate();
        driver.queue(2, 128, 0x1000);
        driver.queue(0xffff, 128, 0x1000);
        assert_eq!(driver.read16(0x18), 0);
        assert_eq!(driver.read16(0x1a), NO_VECTOR);
        assert_eq!(driver.read16(0x12), 2);
        assert!(driver.config.queues(&memory()).unwrap().is_empty());
    }

    #[test]
    fn a_vector_that_is_not_there_reads_back_as_none() {
        let mut driver = Driver::new();
        driver.write(0x10, &2_u16.to_le_bytes());
        assert_eq!(driver.read16(0x10), 2);
        driver.write(0x10, &3_u16.to_le_bytes());
        assert_eq!(driver.read16(0x10), NO_VECTOR);
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let mut driver = Driver::new();
        for offset in (0..0x50).chain([u64::MAX, u64::MAX - 3]) {
            for len in 0..=16 {
                if (offset, len) != (0x14, 1) {
                    assert_eq!(driver.write(offset, &[0xff; 16][..len]), Effect::None);
                }
                let mut data = [0xee; 16];
                driver.config.read(offset, &mut data[..len], 0, 0);
            }
        }
        assert_eq!(driver.status, 0);
    }
}
