use crate::Core;
use crate::device::{Device, DeviceFile, DmaSpace, Opener, Registration};
use crate::iommufd::testing::{Pages, ReadOnly, Seen, Us, address, device};
use crate::{Errno, Result};
use std::sync::{Arc, Mutex};
use vfio_uapi::device::feature::{
    DmaLoggingControl, DmaLoggingRange, DmaLoggingReport, Feature, FeatureHeader,
};
use vfio_uapi::ioctl::DeviceIoctl;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;
const PAGE: u64 = 4096;

/// Memory of a client that is this process, from address 0.
struct Space(Mutex<Vec<u8>>);

impl DmaSpace for Space {
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result {
        let at = usize::try_from(iova).unwrap();
        buf.copy_from_slice(&self.0.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }
    fn write(&self, iova: u64, data: &[u8]) -> Result {
        let at = usize::try_from(iova).unwrap();
        let mut memory = self.0.lock().unwrap();
        let room = memory.get_mut(at..at + data.len()).ok_or(Errno::NOENT)?;
        room.copy_from_slice(data);
        Ok(())
    }
}

struct Bench {
    registration: Registration,
    seen: Arc<Seen>,
    file: Arc<DeviceFile>,
    us: Us,
}

fn open(device: &Device) -> Arc<DeviceFile> {
    let opener = Opener {
        pid: 1,
        comm: "test".into(),
        since: std::time::SystemTime::now(),
        node: None,
    };
    let space = Space(Mutex::new(vec![0; 1 << 20]));
    device.open_direct(opener, Arc::new(space)).unwrap()
}

impl Bench {
    fn new() -> Bench {
        let core = Core::new(crate::Config::default());
        let (registration, seen) = device(&core, "logged", None);
        let file = open(registration.device());
        Bench {
            registration,
            seen,
            file,
            us: Us::default(),
        }
    }

    fn writes(&self, iova: u64, data: &[u8]) -> Result {
        let dma = self.seen.dma.lock().unwrap().clone().unwrap();
        dma.write(iova, data)
    }

    /// The ioctl, with what is left in the argument.
    fn feature<T>(&self, argsz: u32, op: u32, feature: Feature, data: &mut T) -> Result
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        let mut arg = argsz.to_ne_bytes().to_vec();
        arg.extend((op | feature as u32).to_ne_bytes());
        arg.extend(data.as_bytes());
        let number = DeviceIoctl::Feature as u32;
        let done = self
            .file
            .ioctl(number, address(arg.as_mut_slice()), &self.us);
        *data = T::read_from_bytes(&std::hint::black_box(&arg)[8..]).unwrap();
        done.map(|answer| assert_eq!(answer, 0))
    }

    fn start(&self, page_size: u64, ranges: &mut [DmaLoggingRange]) -> Result<u64> {
        let mut control = DmaLoggingControl {
            page_size,
            num_ranges: u32::try_from(ranges.len()).unwrap(),
            reserved: 0,
            ranges: address(ranges),
        };
        self.feature(32, SET, Feature::DmaLoggingStart, &mut control)?;
        Ok(control.page_size)
    }

    fn stop(&self) -> Result {
        self.feature(8, SET, Feature::DmaLoggingStop, &mut [0u8; 0])
    }

    fn report(&self, iova: u64, length: u64, page_size: u64, bitmap: u64) -> Result {
        let mut report = DmaLoggingReport {
            iova,
            length,
            page_size,
            bitmap,
        };
        self.feature(40, GET, Feature::DmaLoggingReport, &mut report)
    }
}

fn range(iova: u64, length: u64) -> DmaLoggingRange {
    DmaLoggingRange { iova, length }
}

/// Nothing of migration is announced here: a client that found the flags would expect the data.
#[test]
fn migration_is_not_a_feature_of_the_file() {
    let bench = Bench::new();
    let mut data = [0u64; 2];
    for (feature, errno) in [
        (Feature::Migration, Errno::NOTTY),
        (Feature::MigDeviceState, Errno::NOTTY),
        (Feature::MigDataSize, Errno::NOTTY),
        (Feature::MigPrecopyInfoV2, Errno::INVAL),
        (Feature::DmaBuf, Errno::NOTTY),
    ] {
        for op in [GET, SET, GET | PROBE, PROBE] {
            assert_eq!(
                bench.feature(24, op, feature, &mut data),
                Err(errno),
                "{feature}"
            );
        }
    }
}

#[test]
fn generic_rules() {
    let bench = Bench::new();
    let mut none = [0u8; 0];
    for (argsz, op, feature, want) in [
        (8, PROBE | SET, Feature::DmaLoggingStart, Ok(())),
        (8, PROBE | SET, Feature::DmaLoggingStop, Ok(())),
        (8, PROBE | GET, Feature::DmaLoggingReport, Ok(())),
        (8, PROBE, Feature::DmaLoggingReport, Ok(())),
        (8, PROBE | GET, Feature::DmaLoggingStart, Err(Errno::INVAL)),
        (
            8,
            PROBE | GET | SET,
            Feature::DmaLoggingReport,
            Err(Errno::INVAL),
        ),
        (8, GET | SET, Feature::DmaLoggingStop, Err(Errno::INVAL)),
        (8, 0, Feature::DmaLoggingStop, Err(Errno::INVAL)),
        (8, GET, Feature::DmaLoggingStop, Err(Errno::INVAL)),
        (7, SET, Feature::DmaLoggingStop, Err(Errno::INVAL)),
        (31, SET, Feature::DmaLoggingStart, Err(Errno::INVAL)),
        (39, GET, Feature::DmaLoggingReport, Err(Errno::INVAL)),
        (8, SET | 1 << 19, Feature::DmaLoggingStop, Err(Errno::INVAL)),
        (8, SET, Feature::DmaLoggingStop, Ok(())),
    ] {
        let done = bench.feature(argsz, op, feature, &mut none);
        assert_eq!(done, want, "{argsz} {op:#x} {feature}");
    }
    assert_eq!(size_of::<FeatureHeader>(), 8);
}

#[test]
fn logging_start_errnos() {
    let bench = Bench::new();
    assert_eq!(bench.start(PAGE, &mut []), Err(Errno::INVAL));
    let mut many: Vec<_> = (0..257).map(|n| range(n * PAGE, PAGE)).collect();
    assert_eq!(bench.start(PAGE, &mut many), Err(Errno::TOOBIG));
    assert_eq!(bench.start(PAGE, &mut [range(1, PAGE)]), Err(Errno::INVAL));
    let end = u64::MAX - PAGE + 1;
    assert_eq!(
        bench.start(PAGE, &mut [range(end, PAGE)]),
        Err(Errno::OVERFLOW)
    );
    assert_eq!(
        bench.start(PAGE, &mut [range(0, 2 * PAGE), range(PAGE, PAGE)]),
        Err(Errno::INVAL)
    );
    for ranges in [0, u64::MAX, u64::MAX - 15] {
        let mut control = DmaLoggingControl {
            page_size: PAGE,
            num_ranges: 1,
            reserved: 0,
            ranges,
        };
        let done = bench.feature(32, SET, Feature::DmaLoggingStart, &mut control);
        assert_eq!(done, Err(Errno::FAULT));
    }
    // None of them has started it.
    assert_eq!(bench.start(PAGE, &mut many[..256]), Ok(PAGE));
    assert_eq!(bench.start(PAGE, &mut many[..1]), Err(Errno::INVAL));
    bench.stop().unwrap();
    bench.stop().unwrap();
    assert_eq!(
        bench.start(3 * PAGE, &mut [range(0, 0)]),
        Ok(2 * PAGE),
        "written back"
    );
}

/// The answer cannot be written: the log does not run, as in the kernel.
#[test]
fn a_start_whose_answer_faults_is_undone() {
    let bench = Bench::new();
    let mut ranges = [range(0, PAGE)];
    let head = [32, SET | Feature::DmaLoggingStart as u32];
    let mut pages = Pages::new(2);
    let control = DmaLoggingControl {
        page_size: PAGE,
        num_ranges: 1,
        reserved: 0,
        ranges: address(&mut ranges),
    };
    pages.bytes()[..8].copy_from_slice(head.as_bytes());
    pages.bytes()[8..32].copy_from_slice(control.as_bytes());
    let readonly = ReadOnly(&bench.us);
    let number = DeviceIoctl::Feature as u32;
    assert_eq!(
        bench.file.ioctl(number, pages.addr(), &readonly),
        Err(Errno::FAULT)
    );
    assert_eq!(
        bench.start(PAGE, &mut ranges),
        Ok(PAGE),
        "it is not running"
    );
}

#[test]
fn reports_into_the_clients_memory() {
    let bench = Bench::new();
    let mut bitmap = vec![1u64 << 63; 5000];
    let at = address(bitmap.as_mut_slice());
    assert_eq!(
        bench.report(0, PAGE, PAGE, at),
        Err(Errno::INVAL),
        "not running"
    );
    bench.start(PAGE, &mut [range(0, 1 << 40)]).unwrap();
    assert_eq!(bench.report(0, PAGE, 1024, at), Err(Errno::INVAL));
    assert_eq!(
        bench.report(u64::MAX - 1, PAGE, PAGE, at),
        Err(Errno::OVERFLOW)
    );
    assert_eq!(bench.report(0, 0, PAGE, 0), Ok(()));
    assert_eq!(
        bench.report(0, 1 << 40, PAGE, 0),
        Ok(()),
        "clean: nothing to write"
    );
    bench.writes(3 * PAGE + 7, &[1; 10]).unwrap();
    bench.writes(200 * PAGE - 1, &[1; 2]).unwrap();
    assert_eq!(bench.writes(1 << 30, &[1]), Err(Errno::NOENT));
    // A bitmap that is not there loses nothing.
    assert_eq!(bench.report(0, 1 << 40, PAGE, 8), Err(Errno::FAULT));
    assert_eq!(
        bench.report(0, 1 << 30, PAGE, u64::MAX - 3),
        Err(Errno::FAULT)
    );
    assert_eq!(bench.report(0, (1 << 30) + PAGE, PAGE, at), Ok(()));
    let bitmap = std::hint::black_box(&mut bitmap);
    assert_eq!(bitmap[0], 1 << 63 | 1 << 3, "bits are only set");
    assert_eq!(
        bitmap[200 / 64],
        1 << 63 | 1 << (199 % 64) | 1 << (200 % 64)
    );
    assert_eq!(bitmap[4096], 1 << 63 | 1, "what failed may have written");
    bitmap.fill(0);
    assert_eq!(bench.report(0, (1 << 30) + PAGE, PAGE, at), Ok(()));
    assert!(std::hint::black_box(bitmap).iter().all(|word| *word == 0));
}

#[test]
fn the_log_ends_with_the_last_close() {
    let bench = Bench::new();
    bench.start(PAGE, &mut [range(0, PAGE)]).unwrap();
    let old = bench.seen.dma.lock().unwrap().clone().unwrap();
    bench.file.release();
    let file = open(bench.registration.device());
    assert_eq!(
        file.dma_logging_report(0, PAGE, PAGE, &mut [0]),
        Err(Errno::INVAL)
    );
    assert_eq!(file.dma_logging_start(PAGE, &[]), Ok(PAGE));
    // A handle the driver has kept writes into another log, which nobody reads.
    let _ = old.write(0, &[1]);
    let mut bitmap = [0];
    assert_eq!(file.dma_logging_report(0, PAGE, PAGE, &mut bitmap), Ok(()));
    assert_eq!(bitmap, [0]);
    assert_eq!(
        file.dma_logging_report(0, 64 * PAGE + 1, PAGE, &mut bitmap),
        Err(Errno::INVAL)
    );
}

/// Migration for a client that somebody gives descriptors to.
mod with_files {
    use super::*;
    use crate::device::migration::tests::{bench, stream};
    use vfio_uapi::device::feature::MigState;
    use vfio_uapi::device::migration::{PrecopyInfo, State};
    use vfio_uapi::ioctl::VFIO_MIG_GET_PRECOPY_INFO;

    fn feature<T>(
        file: &DeviceFile,
        argsz: u32,
        op: u32,
        feature: Feature,
        data: &mut T,
    ) -> Result<u32>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        let mut arg = argsz.to_ne_bytes().to_vec();
        arg.extend((op | feature as u32).to_ne_bytes());
        arg.extend(data.as_bytes());
        let done = file.feature_with_files(address(arg.as_mut_slice()), &Us::default());
        *data = T::read_from_bytes(&std::hint::black_box(&arg)[8..]).unwrap();
        done
    }

    fn set(file: &DeviceFile, to: u32) -> (Result<u32>, MigState) {
        let mut state = MigState {
            device_state: to,
            data_fd: 77,
        };
        let done = feature(file, 16, SET, Feature::MigDeviceState, &mut state);
        (done, state)
    }

    fn data_file(
        registration: &Registration,
        of: &DeviceFile,
        session: u32,
    ) -> Result<Arc<DeviceFile>> {
        let file = registration.device().open_cdev(of.opener().clone())?;
        file.open_migration_data(of, session)?;
        Ok(file)
    }

    fn precopy_info(file: &DeviceFile, argsz: u32) -> Result<PrecopyInfo> {
        let mut info = PrecopyInfo {
            argsz,
            ..PrecopyInfo::default()
        };
        let mut bytes = info.as_bytes().to_vec();
        let at = address(bytes.as_mut_slice());
        file.ioctl(VFIO_MIG_GET_PRECOPY_INFO, at, &Us::default())?;
        info = PrecopyInfo::read_from_bytes(std::hint::black_box(&bytes)).unwrap();
        Ok(info)
    }

    #[test]
    fn features() {
        let bench = bench();
        let file = &bench.file;
        let mut word = 0u64;
        for (argsz, op, number, want) in [
            (16, GET, Feature::Migration, Ok(7)),
            (16, GET, Feature::MigDataSize, Ok(72)),
            (15, GET, Feature::Migration, Err(Errno::INVAL)),
            (16, SET, Feature::Migration, Err(Errno::INVAL)),
            (8, GET | PROBE, Feature::Migration, Ok(0)),
            (8, GET | SET | PROBE, Feature::MigDeviceState, Ok(0)),
            (16, GET, Feature::MigDeviceState, Ok(2 | 0xffff_ffff << 32)),
            (8, SET, Feature::MigPrecopyInfoV2, Ok(0)),
            (8, GET, Feature::MigPrecopyInfoV2, Err(Errno::INVAL)),
        ] {
            word = 0;
            let done = feature(file, argsz, op, number, &mut word);
            assert_eq!(done.map(|_| word), want, "{argsz} {op:#x} {number}");
        }
        // Not of the file alone, nor of a device that cannot migrate.
        let alone = file.ioctl(
            DeviceIoctl::Feature as u32,
            {
                let mut arg = [16, GET | Feature::Migration as u32, 0, 0];
                address(&mut arg)
            },
            &Us::default(),
        );
        assert_eq!(alone, Err(Errno::NOTTY));
        let other = Bench::new();
        for number in [
            Feature::Migration,
            Feature::MigDeviceState,
            Feature::MigDataSize,
        ] {
            let done = feature(&other.file, 16, GET, number, &mut word);
            assert_eq!(done, Err(Errno::NOTTY));
        }
        let done = feature(
            &other.file,
            8,
            SET | PROBE,
            Feature::MigPrecopyInfoV2,
            &mut word,
        );
        assert_eq!(done, Err(Errno::INVAL));
    }

    #[test]
    fn a_state_is_written_back_whatever_came_of_it() {
        let bench = bench();
        for (to, want) in [
            (State::Stop as u32, Ok(0)),
            (State::Error as u32, Err(Errno::INVAL)),
            (8, Err(Errno::INVAL)),
            (State::StopCopy as u32, Ok(1)),
            (State::PreCopy as u32, Err(Errno::INVAL)),
            (State::StopCopy as u32, Ok(0)),
            (State::Resuming as u32, Ok(2)),
        ] {
            let (done, state) = set(&bench.file, to);
            assert_eq!(done, want, "to {to}");
            assert_eq!((state.device_state, state.data_fd), (to, -1));
        }
    }

    #[test]
    fn data_files_live_as_long_as_their_session() {
        let stream = stream(9);
        let bench = bench();
        let (registration, file) = (&bench.registration, &bench.file);
        let users = registration.device().users();
        let Ok(session) = set(file, State::PreCopy as u32).0 else {
            panic!("refused");
        };
        assert_eq!(
            data_file(registration, file, session + 1).err(),
            Some(Errno::NODEV)
        );
        let data = data_file(registration, file, session).unwrap();
        assert_eq!(registration.device().users(), users, "it is no user");
        let bind = DeviceIoctl::BindIommufd as u32;
        assert_eq!(data.ioctl(bind, 0, &Us::default()), Err(Errno::NOTTY));
        assert_eq!(data.open_migration_data(file, session), Err(Errno::INVAL));
        let info = precopy_info(&data, 24).unwrap();
        assert_eq!((info.initial_bytes, info.dirty_bytes), (48, 0));
        assert_eq!(precopy_info(&data, 23).err(), Some(Errno::INVAL));
        let mut buf = [0; 100];
        // A stream: the offset says nothing.
        assert_eq!(data.read(1 << 40, &mut buf[..40]), Ok(40));
        assert_eq!(data.read(0, &mut buf[40..]), Ok(8));
        assert_eq!(data.read(0, &mut buf[48..]), Err(Errno::NOMSG));
        assert_eq!(set(file, State::StopCopy as u32).0, Ok(0));
        assert_eq!(precopy_info(&data, 24).err(), Some(Errno::INVAL));
        assert_eq!(data.read(0, &mut buf[48..]), Ok(16));
        assert_eq!(data.read(0, &mut buf), Ok(0));
        assert_eq!(data.write(0, &[1]), Err(Errno::BADF));

        // The next session is not this file's.
        let Ok(next) = set(file, State::Resuming as u32).0 else {
            panic!("refused");
        };
        assert_eq!(data.read(0, &mut buf), Err(Errno::NODEV));
        assert_eq!(data.write(0, &stream), Err(Errno::NODEV));
        assert_eq!(precopy_info(&data, 24).err(), Some(Errno::NODEV));
        let incoming = data_file(registration, file, next).unwrap();
        assert_eq!(incoming.read(0, &mut buf), Err(Errno::BADF));
        assert_eq!(incoming.write(0, &stream), Ok(stream.len()));
        assert_eq!(set(file, State::Running as u32).0, Ok(0));

        // Another device's, and one that is closed.
        let other = self::bench();
        let stray = registration
            .device()
            .open_cdev(file.opener().clone())
            .unwrap();
        let Ok(elsewhere) = set(&other.file, State::StopCopy as u32).0 else {
            panic!("refused");
        };
        assert_eq!(
            stray.open_migration_data(&other.file, elsewhere),
            Err(Errno::STALE)
        );
        let orphan = data_file(&other.registration, &other.file, elsewhere).unwrap();
        other.file.release();
        assert_eq!(orphan.read(0, &mut buf), Err(Errno::NODEV));
        other.registration.unregister().wait();
        assert_eq!(
            orphan.read(0, &mut buf),
            Err(Errno::NODEV),
            "it outlives its device"
        );
        orphan.release();
    }
}
