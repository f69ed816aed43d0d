//! A driver cannot free, unregister or put its device: no value that could ever reaches it.
use vfio_core::device::OpenCx;

fn open(cx: &OpenCx<'_>) {
    let device = cx.device().upgrade().unwrap();
    device.unregister();
}

fn main() {}
