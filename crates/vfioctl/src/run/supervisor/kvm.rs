//! What KVM is told of VFIO files (`virt/kvm/vfio.c`).
//!
//! A virtual machine monitor tells KVM which VFIO files its guest uses, and QEMU gives up if KVM does
//! not know a file (iommufd mode) or complains (group mode). The kernel's KVM cannot know vfiod's files,
//! and a kernel without VFIO has no such device at all. What KVM does with the files, cache coherency
//! and the lifetime of a group, means nothing to devices made of software: so they are accepted.
//!
//! Where KVM has the device, it is the kernel's, and is told of files that are not vfiod's. Where it
//! has none, the client gets a file that stands for one.

use super::calls::Supervisor;
use super::nodes::Nodes;
use super::sys::{self, KvmCreateDevice, KvmDeviceAttr};
use client_process::Caller;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, MemfdFlags, readlinkat};
use rustix::io::Errno;
use seccomp_notify::Notification;
use std::sync::OnceLock;
use zerocopy::IntoBytes;

/// `_IOWR(KVMIO, 0xe0, struct kvm_create_device)`, on a virtual machine.
pub(super) const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`, on what that made.
pub(super) const KVM_SET_DEVICE_ATTR: u32 = 0x4018_aee1;
/// `_IOW(KVMIO, 0xe3, struct kvm_device_attr)`.
pub(super) const KVM_HAS_DEVICE_ATTR: u32 = 0x4018_aee3;

/// The device that is told of VFIO files.
pub(super) const KVM_DEV_TYPE_VFIO: u32 = 4;
const KVM_CREATE_DEVICE_TEST: u32 = 1;
/// Its only group of attributes. `KVM_DEV_VFIO_GROUP` is its old name.
const KVM_DEV_VFIO_FILE: u32 = 1;
const KVM_DEV_VFIO_FILE_ADD: u64 = 1;
const KVM_DEV_VFIO_FILE_DEL: u64 = 2;

/// What is known of KVM.
#[derive(Default)]
pub(super) struct Kvm {
    has_vfio: OnceLock<bool>,
}

/// The name of the files that stand for KVM's VFIO device.
const NAME: &str = "kvm-vfio of vfioctl run";

/// What a call comes to.
pub(super) enum Outcome {
    /// The kernel's to do.
    LetThrough,
    /// This result.
    Result(i64),
    /// The caller has its answer.
    Answered,
}

impl Kvm {
    /// KVM_CREATE_DEVICE.
    pub(super) fn create(
        &self,
        supervisor: &Supervisor,
        caller: Caller,
        call: &Notification,
    ) -> Result<Outcome, Errno> {
        let [fd, _, arg, ..] = call.args;
        if !names(caller, fd, "anon_inode:kvm-vm") {
            return Ok(Outcome::LetThrough);
        }
        let mut create = KvmCreateDevice::default();
        caller.copy_in(arg, create.as_mut_bytes())?;
        if create.kind != KVM_DEV_TYPE_VFIO || *self.has_vfio.get_or_init(sys::kvm_has_vfio) {
            return Ok(Outcome::LetThrough);
        }
        if create.flags & KVM_CREATE_DEVICE_TEST != 0 {
            return Ok(Outcome::Result(0));
        }
        let file = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC)?;
        supervisor.check(call)?;
        // What the client cannot write is found before it has a descriptor that nobody takes back.
        caller.copy_out(arg, create.as_bytes())?;
        let number = supervisor.listener.add_fd(call.id, &file, true)?;
        create.fd = number.cast_unsigned();
        supervisor.check(call)?;
        caller.copy_out(arg, create.as_bytes())?;
        Ok(Outcome::Result(0))
    }

    /// KVM_SET_DEVICE_ATTR and KVM_HAS_DEVICE_ATTR.
    pub(super) fn attribute(
        &self,
        supervisor: &Supervisor,
        caller: Caller,
        call: &Notification,
    ) -> Result<Outcome, Errno> {
        let [fd, _, arg, ..] = call.args;
        let stands_in = names(caller, fd, &format!("/memfd:{NAME} (deleted)"));
        if !stands_in && !names(caller, fd, "anon_inode:kvm-vfio") {
            return Ok(Outcome::LetThrough);
        }
        let mut attr = KvmDeviceAttr::default();
        caller.copy_in(arg, attr.as_mut_bytes())?;
        supervisor.check(call)?;
        let known = attr.group == KVM_DEV_VFIO_FILE
            && matches!(attr.attr, KVM_DEV_VFIO_FILE_ADD | KVM_DEV_VFIO_FILE_DEL);
        if !known || super::calls::word(call, 1) == KVM_HAS_DEVICE_ATTR {
            return match (stands_in, known) {
                (true, true) => Ok(Outcome::Result(0)),
                (true, false) => Err(Errno::NXIO),
                (false, _) => Ok(Outcome::LetThrough),
            };
        }
        let mut number = 0_i32;
        caller.copy_in(attr.addr, number.as_mut_bytes())?;
        supervisor.check(call)?;
        match file(&supervisor.nodes, caller, number) {
            Ok(_) => Ok(Outcome::Result(0)),
            Err(errno) if stands_in => Err(errno),
            Err(_) => Ok(Outcome::LetThrough),
        }
    }
}

/// A descriptor of a file of vfiod's. `BADF`: not open. `INVAL`: another file, as KVM has it.
fn file(nodes: &Nodes, caller: Caller, number: i32) -> Result<OwnedFd, Errno> {
    nodes.get(caller, number).map_err(|errno| match errno {
        Errno::NOTTY => Errno::INVAL,
        other => other,
    })
}

/// Whether the link of a caller's descriptor says this.
fn names(caller: Caller, fd: u64, text: &str) -> bool {
    #[expect(clippy::cast_possible_truncation, reason = "descriptors are ints")]
    let fd = fd as i32;
    let path = format!("/proc/{}/fd/{fd}", caller.tid().as_raw_nonzero());
    readlinkat(CWD, path, Vec::new()).is_ok_and(|link| link.as_bytes() == text.as_bytes())
}

#[cfg(test)]
mod tests {
    #![expect(unsafe_code, reason = "ioctls of a virtual machine's monitor")]

    use super::super::nodes;
    use super::super::pool::Handler;
    use super::*;
    use rustix::fd::{AsRawFd, FromRawFd};
    use std::sync::Arc;

    fn ioctl<T>(fd: i32, word: u32, arg: &mut T) -> Result<i32, Errno> {
        // SAFETY: the commands read and write this structure; its address is no address to KVM_CREATE_VM
        // on a descriptor that is not KVM's.
        let result = unsafe { libc::ioctl(fd, word.into(), std::ptr::from_mut(arg)) };
        match result {
            -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
            value => Ok(value),
        }
    }

    /// A virtual machine, if one can be made.
    fn machine() -> Option<OwnedFd> {
        let kvm = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .ok()?;
        // SAFETY: KVM_CREATE_VM takes a number and returns a new descriptor.
        unsafe {
            let vm = libc::ioctl(kvm.as_raw_fd(), 0xae01, 0);
            (vm >= 0).then(|| OwnedFd::from_raw_fd(vm))
        }
    }

    /// What a monitor sees where the kernel's KVM knows no VFIO.
    fn monitor(vm: &OwnedFd, other: i32) {
        let vm = vm.as_raw_fd();
        let mut create = KvmCreateDevice {
            kind: KVM_DEV_TYPE_VFIO,
            fd: 77,
            flags: KVM_CREATE_DEVICE_TEST,
        };
        assert_eq!(ioctl(vm, KVM_CREATE_DEVICE, &mut create), Ok(0));
        assert_eq!(create.fd, 77, "a test makes none");
        create.flags = 0;
        assert_eq!(ioctl(vm, KVM_CREATE_DEVICE, &mut create), Ok(0));
        let device = create.fd.cast_signed();
        assert!(device > 2 && device != 77);
        create.kind = 1000;
        assert_eq!(
            ioctl(vm, KVM_CREATE_DEVICE, &mut create),
            Err(Errno::NODEV),
            "the kernel's answer"
        );
        let attribute = |word, group, attr, number: i32| {
            let mut attr = KvmDeviceAttr {
                flags: 0,
                group,
                attr,
                addr: &raw const number as u64,
            };
            ioctl(device, word, &mut attr)
        };
        let (has, set) = (KVM_HAS_DEVICE_ATTR, KVM_SET_DEVICE_ATTR);
        assert_eq!(attribute(has, KVM_DEV_VFIO_FILE, 1, 0), Ok(0));
        assert_eq!(attribute(has, KVM_DEV_VFIO_FILE, 3, 0), Err(Errno::NXIO));
        assert_eq!(attribute(has, 2, 1, 0), Err(Errno::NXIO));
        // `other` counts as ours here, standard input does not.
        for (number, result) in [
            (other, Ok(0)),
            (0, Err(Errno::INVAL)),
            (-1, Err(Errno::BADF)),
        ] {
            assert_eq!(attribute(set, KVM_DEV_VFIO_FILE, 1, number), result);
            assert_eq!(attribute(set, KVM_DEV_VFIO_FILE, 2, number), result);
        }
        assert_eq!(attribute(set, 2, 1, 0), Err(Errno::NXIO));
        // SAFETY: it is this thread's.
        drop(unsafe { OwnedFd::from_raw_fd(device) });
    }

    #[test]
    fn without_vfio_in_the_kernel_a_file_stands_for_its_device() {
        let Some(vm) = machine() else {
            vfiod_tests::skip("no virtual machine can be made here (/dev/kvm)");
            return;
        };
        let anywhere = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(anywhere.path().join("vfio/devices")).unwrap();
        let mut nodes = nodes::Nodes::new(anywhere.path(), anywhere.path()).unwrap();
        let file = rustix::fs::memfd_create("ours", MemfdFlags::CLOEXEC).unwrap();
        nodes.adopted = Some(super::super::task::FileId::at(&file, "").unwrap());
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let installed = super::super::calls::filter().install().unwrap();
            sender.send(installed.listener).unwrap();
            monitor(&vm, file.as_raw_fd());
        });
        let listener = Arc::new(receiver.recv().unwrap());
        let supervisor = Supervisor {
            listener: Arc::clone(&listener),
            nodes,
            kvm: Kvm {
                has_vfio: OnceLock::from(false),
            },
            proc_dev: nodes::proc_dev().unwrap(),
        };
        loop {
            match listener.recv() {
                Ok(call) => supervisor.slow(&call, &mut super::super::calls::Thread::default()),
                Err(Errno::NOENT) if thread.is_finished() => break,
                Err(Errno::NOENT | Errno::INTR) => {}
                Err(errno) => panic!("{errno}"),
            }
        }
        thread.join().unwrap();
    }
}
