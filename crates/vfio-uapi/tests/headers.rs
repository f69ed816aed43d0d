//! Our structures, words and flags against two other views of the same headers: what bindgen made of them in published crates, and what
//! the C compiler makes of the newest kernel headers at hand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use iommufd_bindings as ib;
use vfio_bindings::bindings::vfio as vb;
use vfio_uapi::caps;
use vfio_uapi::container;
use vfio_uapi::device;
use vfio_uapi::device::feature;
use vfio_uapi::device::migration;
use vfio_uapi::group;
use vfio_uapi::ioctl;
use vfio_uapi::iommufd;
use vfio_uapi::pci;

/// One structure under its C name.
struct Structure {
    header: &'static str,
    c_name: &'static str,
    size: usize,
    /// C name and offset; unions without a name are left out.
    fields: Vec<(&'static str, usize)>,
}

/// Compares a structure with the bindgen one of the same layout, field by field, and records it for the C compiler.
/// `ours = theirs` where the names differ.
macro_rules! same {
    (@header vb) => { "linux/vfio.h" };
    (@header ib) => { "linux/iommufd.h" };
    (@one $list:ident $ours:ty, $theirs:ty, $field:ident) => { same!(@one $list $ours, $theirs, $field $field) };
    (@one $list:ident $ours:ty, $theirs:ty, $field:ident $their:ident) => {
        let offset = std::mem::offset_of!($ours, $field);
        assert_eq!(
            offset,
            std::mem::offset_of!($theirs, $their),
            concat!(stringify!($theirs), ".", stringify!($their)),
        );
        match stringify!($their) {
            "__bindgen_anon_1" => {}
            "type_" => $list.push(("type", offset)),
            name => $list.push((name, offset)),
        }
    };
    ($all:ident, $ours:ty, $crate_:ident $theirs:ident { $($field:ident $(= $their:ident)?),+ $(,)? }) => {{
        assert_eq!(size_of::<$ours>(), size_of::<$crate_::$theirs>(), stringify!($theirs));
        let mut fields = Vec::new();
        $(same!(@one fields $ours, $crate_::$theirs, $field $($their)?);)+
        $all.push(Structure {
            header: same!(@header $crate_),
            c_name: stringify!($theirs),
            size: size_of::<$ours>(),
            fields,
        });
    }};
}

fn structures() -> Vec<Structure> {
    let mut all = Vec::new();
    same!(all, group::Status, vb vfio_group_status { argsz, flags });
    same!(all, device::Info, vb vfio_device_info { argsz, flags, num_regions, num_irqs, cap_offset, pad });
    same!(all, device::RegionInfo, vb vfio_region_info { argsz, flags, index, cap_offset, size, offset });
    same!(all, device::RegionGfxEdid, vb vfio_region_gfx_edid {
        edid_offset, edid_max_size, edid_size, max_xres, max_yres, link_state,
    });
    same!(all, device::IrqInfo, vb vfio_irq_info { argsz, flags, index, count });
    same!(all, device::IrqSet, vb vfio_irq_set { argsz, flags, index, start, count });
    same!(all, device::PciDependentDevice, vb vfio_pci_dependent_device { id = __bindgen_anon_1, segment, bus, devfn });
    same!(all, device::PciHotResetInfo, vb vfio_pci_hot_reset_info { argsz, flags, count });
    same!(all, device::PciHotReset, vb vfio_pci_hot_reset { argsz, flags, count });
    same!(all, device::GfxPlaneInfo, vb vfio_device_gfx_plane_info {
        argsz, flags, drm_plane_type, drm_format, drm_format_mod, width, height, stride, size, x_pos, y_pos, x_hot, y_hot,
        id = __bindgen_anon_1, reserved,
    });
    same!(all, device::Ioeventfd, vb vfio_device_ioeventfd { argsz, flags, offset, data, fd, reserved });
    same!(all, device::BindIommufd, vb vfio_device_bind_iommufd { argsz, flags, iommufd, out_devid, token_uuid_ptr });
    same!(all, device::AttachIommufdPt, vb vfio_device_attach_iommufd_pt { argsz, flags, pt_id, pasid });
    same!(all, device::DetachIommufdPt, vb vfio_device_detach_iommufd_pt { argsz, flags, pasid });

    same!(all, feature::FeatureHeader, vb vfio_device_feature { argsz, flags });
    same!(all, feature::Migration, vb vfio_device_feature_migration { flags });
    same!(all, feature::MigState, vb vfio_device_feature_mig_state { device_state, data_fd });
    same!(all, feature::LowPowerEntryWithWakeup, vb vfio_device_low_power_entry_with_wakeup { wakeup_eventfd, reserved });
    same!(all, feature::DmaLoggingControl, vb vfio_device_feature_dma_logging_control {
        page_size, num_ranges, reserved = __reserved, ranges,
    });
    same!(all, feature::DmaLoggingRange, vb vfio_device_feature_dma_logging_range { iova, length });
    same!(all, feature::DmaLoggingReport, vb vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap });
    same!(all, feature::MigDataSize, vb vfio_device_feature_mig_data_size { stop_copy_length });
    same!(all, feature::BusMaster, vb vfio_device_feature_bus_master { op });
    same!(all, feature::DmaBuf, vb vfio_device_feature_dma_buf { region_index, open_flags, flags, nr_ranges });
    same!(all, feature::DmaBufRange, vb vfio_region_dma_range { offset, length });
    same!(all, migration::PrecopyInfo, vb vfio_precopy_info { argsz, flags, initial_bytes, dirty_bytes });

    same!(all, caps::Header, vb vfio_info_cap_header { id, version, next });
    same!(all, caps::SparseMmapArea, vb vfio_region_sparse_mmap_area { offset, size });
    same!(all, caps::ArrayCap, vb vfio_region_info_cap_sparse_mmap { header, count = nr_areas, reserved });
    same!(all, caps::ArrayCap, vb vfio_iommu_type1_info_cap_iova_range { header, count = nr_iovas, reserved });
    same!(all, caps::RegionTypeCap, vb vfio_region_info_cap_type { header, type_, subtype });
    same!(all, caps::PciAtomicCompCap, vb vfio_device_info_cap_pci_atomic_comp { header, flags, reserved });
    same!(all, caps::IovaRange, vb vfio_iova_range { start, end });
    same!(all, caps::MigrationCap, vb vfio_iommu_type1_info_cap_migration {
        header, flags, pgsize_bitmap, max_dirty_bitmap_size,
    });
    same!(all, caps::DmaAvailCap, vb vfio_iommu_type1_info_dma_avail { header, avail });

    same!(all, container::Info, vb vfio_iommu_type1_info { argsz, flags, iova_pgsizes, cap_offset, pad });
    same!(all, container::DmaMap, vb vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova, size });
    same!(all, container::DmaUnmap, vb vfio_iommu_type1_dma_unmap { argsz, flags, iova, size });
    same!(all, container::Bitmap, vb vfio_bitmap { pgsize, size, data });
    same!(all, container::DirtyBitmap, vb vfio_iommu_type1_dirty_bitmap { argsz, flags });
    same!(all, container::DirtyBitmapGet, vb vfio_iommu_type1_dirty_bitmap_get { iova, size, bitmap });

    same!(all, iommufd::Destroy, ib iommu_destroy { size, id });
    same!(all, iommufd::IoasAlloc, ib iommu_ioas_alloc { size, flags, out_ioas_id });
    same!(all, iommufd::IovaRange, ib iommu_iova_range { start, last });
    same!(all, iommufd::IoasIovaRanges, ib iommu_ioas_iova_ranges {
        size, ioas_id, num_iovas, reserved = __reserved, allowed_iovas, out_iova_alignment,
    });
    same!(all, iommufd::IoasAllowIovas, ib iommu_ioas_allow_iovas {
        size, ioas_id, num_iovas, reserved = __reserved, allowed_iovas,
    });
    same!(all, iommufd::IoasMap, ib iommu_ioas_map { size, flags, ioas_id, reserved = __reserved, user_va, length, iova });
    same!(all, iommufd::IoasMapFile, ib iommu_ioas_map_file { size, flags, ioas_id, fd, start, length, iova });
    same!(all, iommufd::IoasCopy, ib iommu_ioas_copy { size, flags, dst_ioas_id, src_ioas_id, length, dst_iova, src_iova });
    same!(all, iommufd::IoasUnmap, ib iommu_ioas_unmap { size, ioas_id, iova, length });
    same!(all, iommufd::IommuOption, ib iommu_option { size, option_id, op, reserved = __reserved, object_id, val64 });
    same!(all, iommufd::VfioIoas, ib iommu_vfio_ioas { size, ioas_id, op, reserved = __reserved });
    same!(all, iommufd::HwptAlloc, ib iommu_hwpt_alloc {
        size, flags, dev_id, pt_id, out_hwpt_id, reserved = __reserved, data_type, data_len, data_uptr, fault_id,
        reserved2 = __reserved2,
    });
    same!(all, iommufd::HwInfo, ib iommu_hw_info {
        size, flags, dev_id, data_len, data_uptr, data_type = __bindgen_anon_1, out_max_pasid_log2, reserved = __reserved,
        out_capabilities,
    });
    same!(all, iommufd::HwptSetDirtyTracking, ib iommu_hwpt_set_dirty_tracking { size, flags, hwpt_id, reserved = __reserved });
    same!(all, iommufd::HwptGetDirtyBitmap, ib iommu_hwpt_get_dirty_bitmap {
        size, hwpt_id, flags, reserved = __reserved, iova, length, page_size, data,
    });
    same!(all, iommufd::HwptInvalidate, ib iommu_hwpt_invalidate {
        size, hwpt_id, data_uptr, data_type, entry_len, entry_num, reserved = __reserved,
    });
    same!(all, iommufd::FaultAlloc, ib iommu_fault_alloc { size, flags, out_fault_id, out_fault_fd });
    same!(all, iommufd::IoasChangeProcess, ib iommu_ioas_change_process { size, reserved = __reserved });
    all
}

/// Every command word we name, with the header that defines it.
fn words() -> Vec<(&'static str, &'static str, u32)> {
    let mut all: Vec<(&str, &str, u32)> = Vec::new();
    all.extend(
        ioctl::DeviceIoctl::ALL
            .iter()
            .map(|c| ("linux/vfio.h", c.name(), c.cmd())),
    );
    all.extend(
        ioctl::GroupIoctl::ALL
            .iter()
            .map(|c| ("linux/vfio.h", c.name(), c.cmd())),
    );
    all.extend(
        ioctl::ContainerIoctl::ALL
            .iter()
            .map(|c| ("linux/vfio.h", c.name(), c.cmd())),
    );
    all.extend(
        ioctl::MigrationIoctl::ALL
            .iter()
            .map(|c| ("linux/vfio.h", c.name(), c.cmd())),
    );
    all.extend(
        ioctl::IommufdIoctl::ALL
            .iter()
            .map(|c| ("linux/iommufd.h", c.name(), c.cmd())),
    );
    all
}

#[test]
fn bindgen_agrees_on_every_structure() {
    // The assertions are in the list itself, one per size and offset.
    let names: std::collections::BTreeSet<_> = structures().iter().map(|s| s.c_name).collect();
    assert_eq!(
        names.len(),
        structures().len(),
        "a structure is listed twice"
    );
}

#[test]
fn bindgen_agrees_on_numbers() {
    use ioctl::IommufdIoctl as I;
    assert_eq!(u32::from(vb::VFIO_TYPE), u32::from(ioctl::TYPE));
    assert_eq!(vb::VFIO_BASE, ioctl::VFIO_BASE);
    for (ours, theirs) in [
        (I::Destroy, ib::IOMMUFD_CMD_DESTROY),
        (I::IoasAlloc, ib::IOMMUFD_CMD_IOAS_ALLOC),
        (I::IoasAllowIovas, ib::IOMMUFD_CMD_IOAS_ALLOW_IOVAS),
        (I::IoasCopy, ib::IOMMUFD_CMD_IOAS_COPY),
        (I::IoasIovaRanges, ib::IOMMUFD_CMD_IOAS_IOVA_RANGES),
        (I::IoasMap, ib::IOMMUFD_CMD_IOAS_MAP),
        (I::IoasUnmap, ib::IOMMUFD_CMD_IOAS_UNMAP),
        (I::Option, ib::IOMMUFD_CMD_OPTION),
        (I::VfioIoas, ib::IOMMUFD_CMD_VFIO_IOAS),
        (I::HwptAlloc, ib::IOMMUFD_CMD_HWPT_ALLOC),
        (I::GetHwInfo, ib::IOMMUFD_CMD_GET_HW_INFO),
        (
            I::HwptSetDirtyTracking,
            ib::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING,
        ),
        (I::HwptGetDirtyBitmap, ib::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP),
        (I::HwptInvalidate, ib::IOMMUFD_CMD_HWPT_INVALIDATE),
        (I::FaultQueueAlloc, ib::IOMMUFD_CMD_FAULT_QUEUE_ALLOC),
        (I::IoasMapFile, ib::IOMMUFD_CMD_IOAS_MAP_FILE),
        (I::ViommuAlloc, ib::IOMMUFD_CMD_VIOMMU_ALLOC),
        (I::VdeviceAlloc, ib::IOMMUFD_CMD_VDEVICE_ALLOC),
        (I::IoasChangeProcess, ib::IOMMUFD_CMD_IOAS_CHANGE_PROCESS),
        (I::VeventqAlloc, ib::IOMMUFD_CMD_VEVENTQ_ALLOC),
        (I::HwQueueAlloc, ib::IOMMUFD_CMD_HW_QUEUE_ALLOC),
    ] {
        assert_eq!(ioctl::nr(ours.cmd()), theirs, "{ours}");
    }
}

#[test]
fn bindgen_agrees_on_flags() {
    for (ours, theirs) in [
        (device::InfoFlags::RESET.bits(), vb::VFIO_DEVICE_FLAGS_RESET),
        (device::InfoFlags::PCI.bits(), vb::VFIO_DEVICE_FLAGS_PCI),
        (
            device::InfoFlags::PLATFORM.bits(),
            vb::VFIO_DEVICE_FLAGS_PLATFORM,
        ),
        (device::InfoFlags::AMBA.bits(), vb::VFIO_DEVICE_FLAGS_AMBA),
        (device::InfoFlags::CCW.bits(), vb::VFIO_DEVICE_FLAGS_CCW),
        (device::InfoFlags::AP.bits(), vb::VFIO_DEVICE_FLAGS_AP),
        (
            device::InfoFlags::FSL_MC.bits(),
            vb::VFIO_DEVICE_FLAGS_FSL_MC,
        ),
        (device::InfoFlags::CAPS.bits(), vb::VFIO_DEVICE_FLAGS_CAPS),
        (device::InfoFlags::CDX.bits(), vb::VFIO_DEVICE_FLAGS_CDX),
        (
            device::RegionFlags::READ.bits(),
            vb::VFIO_REGION_INFO_FLAG_READ,
        ),
        (
            device::RegionFlags::WRITE.bits(),
            vb::VFIO_REGION_INFO_FLAG_WRITE,
        ),
        (
            device::RegionFlags::MMAP.bits(),
            vb::VFIO_REGION_INFO_FLAG_MMAP,
        ),
        (
            device::RegionFlags::CAPS.bits(),
            vb::VFIO_REGION_INFO_FLAG_CAPS,
        ),
        (device::IrqFlags::EVENTFD.bits(), vb::VFIO_IRQ_INFO_EVENTFD),
        (
            device::IrqFlags::MASKABLE.bits(),
            vb::VFIO_IRQ_INFO_MASKABLE,
        ),
        (
            device::IrqFlags::AUTOMASKED.bits(),
            vb::VFIO_IRQ_INFO_AUTOMASKED,
        ),
        (
            device::IrqFlags::NORESIZE.bits(),
            vb::VFIO_IRQ_INFO_NORESIZE,
        ),
        (
            device::IrqSetFlags::DATA_NONE.bits(),
            vb::VFIO_IRQ_SET_DATA_NONE,
        ),
        (
            device::IrqSetFlags::DATA_BOOL.bits(),
            vb::VFIO_IRQ_SET_DATA_BOOL,
        ),
        (
            device::IrqSetFlags::DATA_EVENTFD.bits(),
            vb::VFIO_IRQ_SET_DATA_EVENTFD,
        ),
        (
            device::IrqSetFlags::ACTION_MASK.bits(),
            vb::VFIO_IRQ_SET_ACTION_MASK,
        ),
        (
            device::IrqSetFlags::ACTION_UNMASK.bits(),
            vb::VFIO_IRQ_SET_ACTION_UNMASK,
        ),
        (
            device::IrqSetFlags::ACTION_TRIGGER.bits(),
            vb::VFIO_IRQ_SET_ACTION_TRIGGER,
        ),
        (
            device::IrqSetFlags::DATA_MASK.bits(),
            vb::VFIO_IRQ_SET_DATA_TYPE_MASK,
        ),
        (
            device::IrqSetFlags::ACTION_MASKS.bits(),
            vb::VFIO_IRQ_SET_ACTION_TYPE_MASK,
        ),
        (
            device::HotResetFlags::DEV_ID.bits(),
            vb::VFIO_PCI_HOT_RESET_FLAG_DEV_ID,
        ),
        (
            device::HotResetFlags::DEV_ID_OWNED.bits(),
            vb::VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED,
        ),
        (
            device::GfxPlaneFlags::PROBE.bits(),
            vb::VFIO_GFX_PLANE_TYPE_PROBE,
        ),
        (
            device::GfxPlaneFlags::DMABUF.bits(),
            vb::VFIO_GFX_PLANE_TYPE_DMABUF,
        ),
        (
            device::GfxPlaneFlags::REGION.bits(),
            vb::VFIO_GFX_PLANE_TYPE_REGION,
        ),
        (
            device::IoeventfdFlags::all().bits(),
            vb::VFIO_DEVICE_IOEVENTFD_SIZE_MASK,
        ),
        (
            device::BindFlags::TOKEN.bits(),
            vb::VFIO_DEVICE_BIND_FLAG_TOKEN,
        ),
        (
            device::AttachFlags::PASID.bits(),
            vb::VFIO_DEVICE_ATTACH_PASID,
        ),
        (
            device::DetachFlags::PASID.bits(),
            vb::VFIO_DEVICE_DETACH_PASID,
        ),
        (
            device::region_type::PCI_VENDOR,
            vb::VFIO_REGION_TYPE_PCI_VENDOR_TYPE,
        ),
        (device::region_type::GFX, vb::VFIO_REGION_TYPE_GFX),
        (device::region_type::CCW, vb::VFIO_REGION_TYPE_CCW),
        (
            feature::FeatureFlags::INDEX.bits(),
            vb::VFIO_DEVICE_FEATURE_MASK,
        ),
        (
            feature::FeatureFlags::GET.bits(),
            vb::VFIO_DEVICE_FEATURE_GET,
        ),
        (
            feature::FeatureFlags::SET.bits(),
            vb::VFIO_DEVICE_FEATURE_SET,
        ),
        (
            feature::FeatureFlags::PROBE.bits(),
            vb::VFIO_DEVICE_FEATURE_PROBE,
        ),
        (
            feature::Feature::LowPowerExit as u32,
            vb::VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
        ),
        (
            feature::Feature::DmaLoggingReport as u32,
            vb::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
        ),
        (
            feature::Feature::MigDataSize as u32,
            vb::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
        ),
        (
            feature::Feature::BusMaster as u32,
            vb::VFIO_DEVICE_FEATURE_BUS_MASTER,
        ),
        (
            feature::Feature::DmaBuf as u32,
            vb::VFIO_DEVICE_FEATURE_DMA_BUF,
        ),
        (
            feature::Feature::MigPrecopyInfoV2 as u32,
            vb::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
        ),
        (
            u32::from(caps::region_cap::SPARSE_MMAP),
            vb::VFIO_REGION_INFO_CAP_SPARSE_MMAP,
        ),
        (
            u32::from(caps::region_cap::TYPE),
            vb::VFIO_REGION_INFO_CAP_TYPE,
        ),
        (
            u32::from(caps::region_cap::MSIX_MAPPABLE),
            vb::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
        ),
        (
            u32::from(caps::device_cap::PCI_ATOMIC_COMP),
            vb::VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP,
        ),
        (
            u32::from(caps::type1_cap::IOVA_RANGE),
            vb::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
        ),
        (
            u32::from(caps::type1_cap::MIGRATION),
            vb::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION,
        ),
        (
            u32::from(caps::type1_cap::DMA_AVAIL),
            vb::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
        ),
        (
            group::StatusFlags::VIABLE.bits(),
            vb::VFIO_GROUP_FLAGS_VIABLE,
        ),
        (
            group::StatusFlags::CONTAINER_SET.bits(),
            vb::VFIO_GROUP_FLAGS_CONTAINER_SET,
        ),
        (container::extension::TYPE1, vb::VFIO_TYPE1_IOMMU),
        (container::extension::TYPE1_V2, vb::VFIO_TYPE1v2_IOMMU),
        (container::extension::DMA_CC, vb::VFIO_DMA_CC_IOMMU),
        (container::extension::NOIOMMU, vb::VFIO_NOIOMMU_IOMMU),
        (container::extension::UNMAP_ALL, vb::VFIO_UNMAP_ALL),
        (container::extension::UPDATE_VADDR, vb::VFIO_UPDATE_VADDR),
        (container::MapFlags::READ.bits(), vb::VFIO_DMA_MAP_FLAG_READ),
        (
            container::MapFlags::WRITE.bits(),
            vb::VFIO_DMA_MAP_FLAG_WRITE,
        ),
        (
            container::MapFlags::VADDR.bits(),
            vb::VFIO_DMA_MAP_FLAG_VADDR,
        ),
        (
            container::UnmapFlags::GET_DIRTY_BITMAP.bits(),
            vb::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
        ),
        (
            container::UnmapFlags::ALL.bits(),
            vb::VFIO_DMA_UNMAP_FLAG_ALL,
        ),
        (
            container::UnmapFlags::VADDR.bits(),
            vb::VFIO_DMA_UNMAP_FLAG_VADDR,
        ),
        (
            container::DirtyFlags::START.bits(),
            vb::VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
        ),
        (
            container::DirtyFlags::STOP.bits(),
            vb::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
        ),
        (
            container::DirtyFlags::GET_BITMAP.bits(),
            vb::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
        ),
        (pci::region::ROM, vb::VFIO_PCI_ROM_REGION_INDEX),
        (pci::region::CONFIG, vb::VFIO_PCI_CONFIG_REGION_INDEX),
        (pci::region::VGA, vb::VFIO_PCI_VGA_REGION_INDEX),
        (pci::region::COUNT, vb::VFIO_PCI_NUM_REGIONS),
        (pci::irq::INTX, vb::VFIO_PCI_INTX_IRQ_INDEX),
        (pci::irq::MSI, vb::VFIO_PCI_MSI_IRQ_INDEX),
        (pci::irq::MSIX, vb::VFIO_PCI_MSIX_IRQ_INDEX),
        (pci::irq::ERR, vb::VFIO_PCI_ERR_IRQ_INDEX),
        (pci::irq::REQ, vb::VFIO_PCI_REQ_IRQ_INDEX),
        (pci::irq::COUNT, vb::VFIO_PCI_NUM_IRQS),
        (
            iommufd::MapFlags::FIXED_IOVA.bits(),
            ib::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
        ),
        (
            iommufd::MapFlags::WRITEABLE.bits(),
            ib::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
        ),
        (
            iommufd::MapFlags::READABLE.bits(),
            ib::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
        ),
        (
            iommufd::HwptAllocFlags::NEST_PARENT.bits(),
            ib::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT,
        ),
        (
            iommufd::HwptAllocFlags::DIRTY_TRACKING.bits(),
            ib::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
        ),
        (
            iommufd::HwptAllocFlags::FAULT_ID_VALID.bits(),
            ib::iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID,
        ),
        (
            iommufd::HwptAllocFlags::PASID.bits(),
            ib::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID,
        ),
        (
            iommufd::option_id::HUGE_PAGES,
            ib::iommufd_option_IOMMU_OPTION_HUGE_PAGES,
        ),
        (
            u32::from(iommufd::option_op::GET),
            ib::iommufd_option_ops_IOMMU_OPTION_OP_GET,
        ),
        (
            u32::from(iommufd::vfio_ioas_op::GET),
            ib::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_GET,
        ),
        (
            u32::from(iommufd::vfio_ioas_op::SET),
            ib::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET,
        ),
        (
            u32::from(iommufd::vfio_ioas_op::CLEAR),
            ib::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_CLEAR,
        ),
    ] {
        assert_eq!(ours, theirs);
    }
}

/// The body of a structure in a header without its comments, if the header has that structure.
fn body<'a>(header: &'a str, c_name: &str) -> Option<&'a str> {
    let start = header.find(&format!("struct {c_name} {{"))?;
    let rest = &header[start..];
    Some(&rest[..rest.find("\n};")?])
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .any(|found| found == word)
}

/// Says that the test does not run here, also to whoever runs all suites.
fn skip(reason: &str) {
    let line = format!("the_c_compiler_agrees_where_this_machine_has_the_structure\t{reason}");
    eprintln!("SKIPPED {line}");
    if let Some(log) = std::env::var_os("VFIOD_SKIP_LOG") {
        use std::io::Write;
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(log);
        let _ = log.and_then(|mut log| writeln!(log, "{line}"));
    }
}

#[test]
fn the_c_compiler_agrees_where_this_machine_has_the_structure() {
    // The tests' own headers, if they were fetched: newer than those of this machine.
    let private = std::env::var_os("VFIOD_PRIVATE_DIR")
        .map(|dir| Path::new(&dir).join("bookworm-backports/usr/include"))
        .filter(|dir| dir.is_dir());
    let include = private.as_deref().unwrap_or(Path::new("/usr/include"));
    if Command::new("cc").arg("--version").output().is_err() {
        skip("no `cc`");
        return;
    }
    let mut program =
        String::from("#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n");
    let mut texts = BTreeMap::new();
    for header in ["linux/vfio.h", "linux/iommufd.h"] {
        match std::fs::read_to_string(include.join(header)) {
            Ok(text) => {
                writeln!(program, "#include <{header}>").expect("a string");
                texts.insert(header, text);
            }
            Err(error) => eprintln!("not compared, what is in {header}: {error}"),
        }
    }
    program.push_str("int main(void) {\n");
    let mut wanted = BTreeMap::new();
    let mut ask = |key: String, expression: String, value: usize| {
        writeln!(program, "printf(\"{key} %zu\\n\", (size_t)({expression}));").expect("a string");
        wanted.insert(key, value);
    };
    for structure in structures() {
        let Some(text) = texts.get(structure.header) else {
            continue;
        };
        let Some(body) = body(text, structure.c_name) else {
            eprintln!(
                "not compared, struct {}: these headers have no such thing in {}",
                structure.c_name, structure.header
            );
            continue;
        };
        let c_name = structure.c_name;
        let (here, missing): (Vec<_>, Vec<_>) = structure
            .fields
            .iter()
            .copied()
            .partition(|(field, _)| has_word(body, field));
        for (field, offset) in here {
            ask(
                format!("{c_name}.{field}"),
                format!("offsetof(struct {c_name}, {field})"),
                offset,
            );
        }
        // An older header's structure may end before the fields it lacks; then its size says nothing about ours.
        if missing.is_empty() {
            ask(
                c_name.to_owned(),
                format!("sizeof(struct {c_name})"),
                structure.size,
            );
        }
    }
    for (header, name, cmd) in words() {
        if texts
            .get(header)
            .is_some_and(|text| text.contains(&format!("#define {name}")) && has_word(text, name))
        {
            ask(name.to_owned(), name.to_owned(), cmd as usize);
        } else {
            eprintln!("not compared, {name}: not in {header}");
        }
    }
    program.push_str("return 0; }\n");

    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, binary) = (dir.join("headers.c"), dir.join("headers"));
    std::fs::write(&source, &program).expect("writing the C program");
    let built = Command::new("cc")
        .args(["-Wall", "-Werror", "-isystem"])
        .arg(include)
        .arg("-o")
        .arg(&binary)
        .arg(&source)
        .output()
        .expect("running cc");
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let output = Command::new(&binary)
        .output()
        .expect("running the C program")
        .stdout;
    let output = String::from_utf8(output).expect("text");
    let got: BTreeMap<String, usize> = output
        .lines()
        .map(|line| {
            let (key, value) = line.split_once(' ').expect("two words");
            (key.to_owned(), value.parse().expect("a number"))
        })
        .collect();
    assert_eq!(got, wanted);
    assert!(
        got.is_empty() == texts.is_empty(),
        "a header was there and nothing in it was compared"
    );
    eprintln!("compared {} numbers with C", got.len());
}
