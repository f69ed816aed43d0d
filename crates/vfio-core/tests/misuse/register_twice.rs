//! A completion is never re-armed: a device is registered at most once. And a driver cannot
//! register at all.
use vfio_core::device::{DeviceOps, GroupType, UnregisteredDevice};

fn twice<O: DeviceOps>(device: UnregisteredDevice<O>) {
    let _first = device.register(GroupType::Emulated);
    let _second = device.register(GroupType::Emulated);
}

fn main() {}
