//! mtty and mbochs in v3: `release` freed the state and then read it.
use vfio_core::device::Device;

fn after_put(device: Device) -> u32 {
    drop(device);
    device.index()
}

fn main() {}
